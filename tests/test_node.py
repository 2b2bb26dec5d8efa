"""The node side: real supervisors, real launchers, programs that end in every way there is."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.node import port, rank, supervise

SUPERVISE = Path(supervise.__file__)
NASTY = "a,b 'c' \"d\" $(id) `id` $$ ${local_rank} \\ new\nline \udcff é"


@dataclass
class Node:
    """One supervisor, started in a directory of its own."""

    home: Path
    launcher: str = "srun"
    nodes: int = 1
    per_node: int = 1
    rank: int = 0  # under srun; else the node's
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        (self.home / "tmp").mkdir(exist_ok=True)
        given = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
        given |= {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port.pick(self.mark))}
        given |= {"TMPDIR": str(self.home / "tmp"), "DSLAUNCH_TEST_MARK": self.mark}
        if self.launcher == "srun":
            world = str(self.nodes * self.per_node)
            given |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": world}
        else:
            given["NODE_RANK"] = str(self.rank)
        command = [sys.executable, "-u", str(SUPERVISE), "--launcher", self.launcher]
        command += ["--nodes", str(self.nodes), "--per-node", str(self.per_node), "--logs", str(self.logs)]
        return subprocess.Popen(
            [*command, *self.flags, "--", *argv],
            env=given | self.env,
            cwd=self.home,
            stdout=(self.home / f"out{self.rank}").open("wb"),
            stderr=(self.home / f"err{self.rank}").open("wb"),
        )

    def run(self, *argv: str) -> int:
        return self.start(*argv).wait(timeout=90)

    def python(self, program: str) -> int:
        return self.run(sys.executable, "-c", program)

    @property
    def out(self) -> str:
        return (self.home / f"out{self.rank}").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.home / f"err{self.rank}").read_text(errors="replace")

    def record(self, number: int) -> dict[str, object]:
        return dict(json.loads((self.logs / f"rank-{number:05d}.json").read_text()))

    def left(self) -> list[str]:
        """Command lines of processes that this job has left behind."""
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and self.mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        return found


def until(true, *, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def says(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text(errors="replace")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


# How a rank ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "echo last words; exit 7"], 7, "ended with exit code 7 first"),
        (["sh", "-c", "kill -KILL $$"], 137, "was killed by SIGKILL (9) first"),
        (["sh", "-c", "kill -ABRT $$"], 134, "was killed by SIGABRT (6) first"),
        (["sh", "-c", "exit 139"], 139, "exit code 139 (128 + signal 11)"),
        (["sh", "-c", "exit 75"], 75, "stopped early with exit code 75"),
        (["no-such-program"], 127, "no such program here"),
        (["./plain"], 126, "is it executable"),
    ],
)
def test_the_exit_code_is_the_ranks_and_says_why(node, argv, code, words):
    (node.home / "plain").write_text("not a program")
    assert node.run(*argv) == code
    summary = json.loads((node.logs / "node-0000-00.json").read_text())
    assert summary["code"] == node.record(0)["code"] == code
    assert words in node.err
    assert (summary["first_failure"] is None) == (code in (0, 75))
    assert node.left() == []
    left = [path for path in (node.home / "tmp").glob("dslaunch-*/*") if not path.name.startswith("jit-")]
    assert left == []
    if code == 7:
        assert f"rank 0 (local 0) on {os.uname().nodename}" in node.err
        assert "    last words" in node.err
        assert "[rank 0] last words" in node.out


@pytest.mark.slow
def test_the_environment_and_the_arguments_arrive_byte_for_byte(node):
    node.env = {"NASTY": NASTY, "DSLAUNCH_METRICS": "mine", "TRITON_CACHE_DIR": "mine too"}
    show = "import os, sys, json; json.dump([dict(os.environ), sys.argv[1:]], open('seen', 'w'))"
    assert node.run(sys.executable, "-c", show, NASTY, "--", "") == 0
    env, argv = json.loads((node.home / "seen").read_text())
    assert env["NASTY"] == NASTY
    assert argv == [NASTY, "--", ""]
    assert (env["DSLAUNCH_METRICS"], env["TRITON_CACHE_DIR"]) == ("mine", "mine too")
    assert env["TORCH_EXTENSIONS_DIR"].startswith(f"{node.home}/tmp/dslaunch-{os.getuid()}/jit-")


@pytest.mark.slow
def test_output_is_passed_on_line_by_line_whatever_it_is(node):
    text = r"\xff\x00\x1b[1mred\n\n 1%\r 50%\r100%\nwindows\r\nno end"
    assert node.python(f"import sys; sys.stdout.buffer.write(b'{text}')") == 0
    lines = (node.home / "out0").read_bytes().split(b"\n")
    bodies = [b"\xff\x00\x1b[1mred", b"", b"100%", b"windows", b"no end"]
    assert lines == [b"[rank 0] " + body for body in bodies] + [b""]
    assert b" 50%\r" in (node.logs / "rank-00000.log").read_bytes()


@pytest.mark.slow
def test_a_second_attempt_appends_and_is_judged_by_itself(node):
    assert node.run("sh", "-c", "echo one; exit 3") == 3
    node.env = {"SLURM_RESTART_COUNT": "1"}
    assert node.run("sh", "-c", "echo two; exit 4") == 4
    assert "one" not in node.out + node.err
    assert (node.logs / "rank-00000.log").read_text().split("\n")[0] == "one"
    assert node.record(0)["attempt"] == 1


@pytest.mark.slow
def test_nothing_stays_behind(node):
    daemon = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(99)\n os._exit(0)"
    assert node.python(daemon) == 0
    assert node.left() == []


@pytest.mark.slow
def test_a_killed_supervisor_takes_everything_with_it(node):
    process = node.start(sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(99)")
    until(lambda: says(node.logs / "rank-00000.log", "ready"))
    process.kill()
    process.wait()
    until(lambda: not node.left(), seconds=35)


# Signals

SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.7 * int(os.environ["RANK"])); print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
HEEDS_USR2 = """
import os, signal, sys, time
from pathlib import Path
if os.environ["RANK"] == "0": signal.signal(signal.SIGUSR2, lambda *_: Path("noted").touch())
print("ready", flush=True)
while not Path("noted").exists(): time.sleep(0.05)
time.sleep(0.5)
"""


def ready(node: Node, *ranks: int) -> None:
    until(lambda: all(says(node.logs / f"rank-{number:05d}.log", "ready") for number in ranks))


@pytest.mark.slow
@pytest.mark.parametrize("shell", [False, True])
def test_term_reaches_the_program_even_behind_a_shell(node, shell):
    program = [sys.executable, "-c", SAVES]
    process = node.start(*(["sh", "-c", '"$@"; exit $?', "sh", *program] if shell else program))
    ready(node, 0)
    process.terminate()
    assert process.wait(60) == 75
    assert "[rank 0] saved" in node.out


@pytest.mark.slow
def test_a_program_that_ignores_term_is_ended_after_the_grace(node):
    node.flags = ("--grace", "1")
    process = node.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    ready(node, 0)
    before = time.monotonic()
    process.terminate()
    assert process.wait(60) == 137
    assert time.monotonic() - before < 15
    assert "stopped by SIGTERM; rank 0 (local 0)" in node.err
    assert json.loads((node.logs / "node-0000-00.json").read_text())["signalled"] == "SIGTERM"
    assert node.left() == []


def test_a_node_that_stops_early_says_so_on_the_shared_logs_and_ends_with_0(tmp_path):
    # srun --kill-on-bad-exit would kill the other node, which is about to stop as well
    one = Node(tmp_path, nodes=2, rank=0, flags=("--same-host", "--shared-logs"))
    one.env = {"NODE_RANK": "0"}
    assert one.start("sh", "-c", "exit 75").wait(60) == 0
    assert (tmp_path / "logs" / "stopped-0").exists()
    assert not (tmp_path / "logs" / "first-failure-0").exists()


@pytest.mark.slow
def test_where_logs_are_not_shared_the_other_nodes_get_time_to_stop(tmp_path):
    one = Node(tmp_path, nodes=2, rank=0, flags=("--same-host",))
    one.env = {"NODE_RANK": "0"}
    process = one.start("sh", "-c", "exit 75")
    until(lambda: (tmp_path / "logs" / "node-0000-00.json").exists())
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # nothing is left to save
    assert process.wait(20) == 75


@pytest.mark.slow
def test_usr2_reaches_a_program_behind_a_shell(node):
    process = node.start("bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-c", HEEDS_USR2)
    ready(node, 0)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 0


@pytest.mark.slow
def test_usr2_does_not_end_a_program_that_does_not_heed_it(node):
    process = node.start("sh", "-c", "echo ready; sleep 2; exit 5")
    ready(node, 0)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 5


# What is refused before the program runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "flags", "code", "words"),
    [
        ({"NODE_RANK": ""}, (), 78, "NODE_RANK is not set"),
        ({"NODE_RANK": "2"}, (), 78, "NODE_RANK is '2', it should be a number from 0 to 1"),
        ({"NODE_RANK": "one"}, (), 78, "NODE_RANK is 'one'"),
        ({"MASTER_ADDR": ""}, (), 78, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "0"}, (), 78, "MASTER_PORT is '0'"),
        ({"NODE_RANK": "1"}, (), 78, "MASTER_ADDR localhost resolves to"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "127.0.1.1"}, (), 78, "/etc/hosts maps the name to 127.0.1.1"),
        ({"MASTER_ADDR": "no.such.invalid"}, ("--resolve-timeout", "0"), 69, "does not resolve"),
        ({"WORLD_SIZE": "1"}, (), 78, "planned for 2 ranks, WORLD_SIZE is 1: refusing to train 2 separate w"),
        ({"WORLD_SIZE": "3"}, (), 78, "planned for 2 ranks, WORLD_SIZE is 3"),
        ({"DSLAUNCH_CACHE": "/dev/null"}, (), 78, "/dev/null"),
    ],
)
def test_a_node_that_cannot_be_right_runs_nothing(node, env, flags, code, words):
    node.nodes, node.flags, node.env = 2, flags, env
    assert node.run("touch", "it-ran") == code
    assert words in node.err
    assert not (node.home / "it-ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "flags"), [("0", ()), ("1", ("--same-host",))], ids=["node 0", "all on one host"])
def test_a_loopback_master_is_fine_where_it_is(node, number, flags):
    node.nodes, node.flags, node.env = 2, flags, {"NODE_RANK": number}
    assert node.run("true") == 0


def test_a_name_that_appears_late_is_waited_for(monkeypatch, capsys):
    answers = itertools.chain([OSError("not yet"), OSError("not yet")], itertools.repeat(None))

    def look_up(name: str, number: int) -> list[str]:
        if answer := next(answers):
            raise answer
        return ["10.0.0.5"]

    monkeypatch.setattr(supervise, "look_up", look_up)
    monkeypatch.setattr(signal, "sigtimedwait", lambda signals, seconds: None)
    where = supervise.Place(1, "job-0.svc", 29500, [1], "node-0001")
    assert supervise.resolve(where, timeout=30) == ["10.0.0.5"]
    assert capsys.readouterr().err.count("waiting") == 1


def test_a_cache_that_belongs_to_someone_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(supervise.Refused, match="belongs to uid 4711"):
        supervise.private_directory({"DSLAUNCH_CACHE": str(tmp_path)})


# The environment

PLACES = {"jit": "/jit", "state": "/state", "tag": ""}


@pytest.mark.parametrize(
    ("launcher", "given", "expected"),
    [
        ("torchrun", {"RANK": "1", "WORLD_SIZE": "2", "PET_NNODES": "2", "MINE": "1"}, {"MINE": "1"}),
        ("deepspeed", {"LOCAL_RANK": "0", "CROSS_SIZE": "4"}, {}),
        ("srun", {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}),
    ],
)
def test_stale_ranks_do_not_reach_the_launcher(launcher, given, expected):
    options = supervise.Options(launcher, 1, 2, "/logs", 25, 300, False, False, ["true"])
    env, _ = supervise.rank_environment(options, given, addresses=["127.0.0.1"], **PLACES)
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "CROSS_SIZE", "MINE"}
    assert {name: env[name] for name in names - {"LOCAL_RANK"} if name in env} == expected
    assert env["DSLAUNCH_METRICS"] == "/logs/metrics.jsonl"
    assert env["TORCHINDUCTOR_CACHE_DIR"] == "/jit/inductor"
    assert int(env["OMP_NUM_THREADS"]) >= 1
    assert "GLOO_SOCKET_IFNAME" not in env


def test_gloo_is_told_the_interface_that_leads_to_the_master(monkeypatch):
    options = supervise.Options("torchrun", 2, 1, "/logs", 25, 300, False, False, ["true"])
    assert supervise.interface_of("127.0.0.1") == "lo"
    monkeypatch.setattr(supervise, "local_address", lambda remote: "127.0.0.1")
    env, notes = supervise.rank_environment(options, {}, addresses=["10.0.0.5"], **PLACES)
    assert (env["GLOO_SOCKET_IFNAME"], notes) == ("lo", [])
    env, notes = supervise.rank_environment(options, {}, addresses=["127.0.1.1"], **PLACES)
    assert "GLOO_SOCKET_IFNAME" not in env
    assert "GLOO_SOCKET_IFNAME is left to gloo" in notes[0]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "2"}, "planned for 8 ranks, WORLD_SIZE is 2: refusing to train 4 separate worlds"),
        ({"WORLD_SIZE": "5"}, "planned for 8 ranks, WORLD_SIZE is 5: refusing to train in that world"),
        ({"RANK": "8"}, "RANK is 8, but a world of 8 has the ranks 0 to 7"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: that should be a number"),
    ],
)
def test_a_rank_knows_its_world(env, words):
    good = {"RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    problem = rank.wrong_world(good | env, 8)
    assert words in problem
    assert bool(problem) == bool(words)


# The verdict


def ended(
    number: int, code: int | None, at: float | None, name: str | None = None, *, orphaned: bool = False
) -> dict[str, object]:
    value = {"rank": number, "local_rank": number, "host": "n2", "log": "/logs/r", "log_from": 0}
    return {**value, "code": code, "ended": at, "signal": name, "orphaned": orphaned}


@pytest.mark.parametrize(
    ("ranks", "end", "code", "words"),
    [
        ([ended(0, 0, 5), ended(1, 0, 6)], (0, 7), 0, ""),
        ([ended(0, 0, 5), ended(1, 0, 6)], (1, 7), 0, ""),
        ([ended(0, 143, 6, "SIGTERM"), ended(1, 7, 5)], (1, 7), 7, "rank 1 (local 1) on n2 ended with exit code 7"),
        ([ended(0, 1, 6), ended(1, 137, 5, "SIGKILL")], (1, 7), 137, "rank 1 (local 1) on n2 was killed by SIGK"),
        ([ended(0, 75, 5), ended(1, 75, 6)], (75, 7), 75, "all ranks"),
        ([ended(0, 75, 5), ended(1, 0, 6)], (75, 7), 75, "all ranks"),
        ([ended(0, 75, 5), ended(1, 143, 6, "SIGTERM")], (75, 7), 143, "rank 1"),
        ([ended(0, 75, 5), ended(1, 1, 6)], (75, 7), 1, "rank 1"),
        ([ended(0, 143, 6, "SIGTERM"), ended(1, None, None)], (1, 7), 137, "rank 1 (local 1) on n2 vanished"),
        ([ended(0, 7, 6), ended(1, None, None)], (1, 7), 7, "rank 0"),
        ([], (1, 7), 1, "torchrun on"),
        ([], (0, 7), 70, "before any rank started"),
        ([], (75, 7), 70, "before any rank started"),
        ([ended(0, 0, 5)], (0, 7), 70, "rank 1 never started"),
        ([ended(0, 143, 8), ended(1, 0, 8)], (137, 7, True), 137, "was killed by signal 9 before its ranks"),
        ([ended(0, 0, 8), ended(1, 0, 8)], (137, 7, True), 137, "was killed by signal 9 before its ranks"),
        ([ended(0, 143, 8), ended(1, 143, 9)], (1, 7, False, "SIGTERM"), 143, "stopped by SIGTERM; rank 0"),
        # the launcher's death reached the ranks before us
        ([ended(0, 143, 6, orphaned=True), ended(1, None, None)], (137, 7, True), 137, "9 before its ranks"),
        ([ended(0, 7, 6), ended(1, 143, 6, orphaned=True)], (137, 7, True), 7, "rank 0"),
        ([], (137, 7, True, "SIGTERM"), 143, "stopped by SIGTERM"),
    ],
)
def test_the_verdict(ranks, end, code, words):
    options = supervise.Options("torchrun", 1, 2, "/logs", 25, 300, False, False, ["true"])
    where = supervise.Place(0, "n2", 29500, [0, 1], "node-0000")
    result = supervise.verdict(options, where, ranks, supervise.End(*end))
    assert result.code == code
    assert words in result.reason
    assert bool(result.reason) == (code != 0)


def test_kubernetes_is_told_in_short(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "TERMINATION_LOG", str(tmp_path / "termination-log"))
    supervise.tell_kubernetes("nobody asked")
    assert not (tmp_path / "termination-log").exists()
    (tmp_path / "termination-log").touch()
    supervise.tell_kubernetes("é" * 9999)
    assert (tmp_path / "termination-log").stat().st_size == 4096


# Launchers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", 1, "libcudart.so.12: cannot open"),
        ("", 70, "torchrun on"),
        (
            "import os, signal, subprocess, sys, time\n"
            "for n in '01': subprocess.Popen(sys.argv[-3:], env={**os.environ, 'RANK': n, 'LOCAL_RANK': n, "
            "'WORLD_SIZE': '2'})\n"
            "from pathlib import Path\n"
            "while len(list(Path(sys.argv[-1]).parent.glob('rank-*.json'))) < 2: time.sleep(0.1)\n"
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "was killed by signal 9 before its ranks did",
        ),
    ],
    ids=["cannot import", "does nothing", "is killed"],
)
def test_a_launcher_that_fails_by_itself_is_not_a_success(node, source, code, words):
    folder = node.home / "fake" / "torch" / "distributed"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder.parent / "__init__.py").touch()
    (folder / "run.py").write_text(source)
    node.launcher, node.per_node, node.env = "torchrun", 2, {"PYTHONPATH": str(node.home / "fake")}
    assert node.run("sleep", "60") == code
    assert words in node.err
    assert "node-0000.launcher.log" in node.err
    assert node.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_rank_has_its_place_whatever_an_operator_has_set(node, launcher):
    node.launcher, node.per_node = launcher, 2
    node.env = {"RANK": "1", "WORLD_SIZE": "9", "PET_NNODES": "3", "NASTY": NASTY, "CUDA_VISIBLE_DEVICES": "5,4"}
    show = "import os, sys, json; json.dump([dict(os.environ), sys.argv[1:]], open('seen' + os.environ['RANK'], 'w'))"
    assert node.run(sys.executable, "-c", show, NASTY, "--") == 0
    for number in (0, 1):
        env, argv = json.loads((node.home / f"seen{number}").read_text())
        assert argv == [NASTY, "--"]
        seen = [env[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "NASTY", "CUDA_VISIBLE_DEVICES")]
        assert seen == ["2", str(number), NASTY, "5,4"]
        assert (env["MASTER_ADDR"], "PET_NNODES" in env) == ("localhost", False)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_rank_that_failed_first_is_named(node, launcher):
    """Scenario 62, on one node."""
    node.launcher, node.per_node = launcher, 2
    program = "import os, time; r = int(os.environ['RANK']); time.sleep(60 * (1 - r)); print('bye'); os._exit(7)"
    assert node.python(program) == 7
    assert "rank 1 (local 1)" in node.err
    assert node.record(0)["code"] in (143, 137)
    assert node.left() == []


@pytest.mark.slow
def test_usr2_passes_by_torchrun_and_reaches_those_who_heed_it(node):
    node.launcher, node.per_node = "torchrun", 2
    process = node.start(sys.executable, "-c", HEEDS_USR2)
    ready(node, 0, 1)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0
    assert [node.record(number)["code"] for number in (0, 1)] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_all_ranks_save_before_the_launcher_kills_them(node, launcher):
    node.launcher, node.per_node = launcher, 2
    process = node.start(sys.executable, "-c", SAVES)
    ready(node, 0, 1)
    process.terminate()
    assert process.wait(40) == 75
    assert [node.record(number)["code"] for number in (0, 1)] == [75, 75]
    assert node.left() == []


@pytest.mark.slow
def test_each_node_reports_its_own(tmp_path):
    common = str(port.pick(uuid.uuid4().hex))
    nodes = [
        Node(tmp_path, "torchrun", 2, 2, number, ("--same-host",), env={"MASTER_PORT": common}, mark=f"job-{common}")
        for number in (0, 1)
    ]
    program = "import os, sys, time; print('ready', flush=True); time.sleep(2); "
    program += "sys.exit(9) if os.environ['RANK'] == '3' else time.sleep(60)"
    first, second = (one.start(sys.executable, "-c", program) for one in nodes)
    assert second.wait(60) == 9
    assert "rank 3 (local 1)" in nodes[1].err
    assert first.poll() is None
    first.terminate()
    assert first.wait(40) == 143
    assert "stopped by SIGTERM; rank" in nodes[0].err
    assert nodes[0].left() == []
    assert {path.name for path in nodes[0].logs.glob("*.json")} == {
        *(f"rank-{number:05d}.json" for number in range(4)),
        *(f"{what}-{number:04d}.json" for number in range(2) for what in ("node", "beat")),
    }


# The port


@pytest.mark.parametrize(
    ("taken", "low", "high"),
    [
        ((32768, 60999), 20000, 29999),
        ((20000, 28000), 28001, 29999),
        ((15000, 61000), 10000, 65535),
        ((9000, 65500), 1025, 8999),
        ((1024, 65535), 20000, 29999),
    ],
)
def test_a_port_is_outside_the_kernels_range(taken, low, high):
    ports = list(port.candidates("4711:0", taken=taken))
    assert len(ports) == 50
    assert all(low <= one <= high for one in ports)
    if taken != (1024, 65535):
        assert not any(taken[0] <= one <= taken[1] for one in ports)
    assert ports == list(port.candidates("4711:0", taken=taken))
    assert ports != list(port.candidates("4711:1", taken=taken))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_in_use_is_skipped(family):
    command = [sys.executable, port.__file__, uuid.uuid4().hex, "0"]
    first = int(subprocess.check_output(command))
    try:
        holder = socket.create_server(("", first), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    with holder:
        second = int(subprocess.check_output(command))
    assert second != first
    assert int(subprocess.check_output(command)) == first


def test_no_port_at_all_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(port, "pick", lambda seed: None)
    assert port.main(["4711", "0"]) == 1
    assert "none of 50 ports" in capsys.readouterr().err


def test_a_lock_that_a_killed_job_left_in_the_compile_cache_is_taken_away_only_when_nobody_compiles(tmp_path):
    lock = tmp_path / "jit" / "extensions" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with supervise.compiled(str(tmp_path / "jit")):
        assert not lock.exists()
        lock.touch()  # this job's own
        with supervise.compiled(str(tmp_path / "jit")):
            assert lock.exists()
