"""What `dslaunch watch` and `wait` show and return; on a real Slurm too, with a controller that goes away."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_slurm import job, site  # noqa: F401 - a fixture

from launcher import screen
from launcher.node import journal
from launcher.runs import Phase, poll
from launcher.runs.view import (
    Files,
    Node,
    View,
    changes,
    exit_code,
    pace,
    stragglers,
    suspicion,
    view,
    worst_first,
)

DSLAUNCH = str(Path(sys.executable).parent / "dslaunch")
RUN = "gpt-7b-20261121-031502-4f2a90c1"
NOW = 1_763_693_820.0
ENTRIES = (
    {"event": "submitted", "job": "4711"},
    {"event": "preflight", "code": 0},
    {"event": "attempt", "attempt": 0, "hosts": ["node1", "node2"]},
    {"event": "ended", "attempt": 0, "code": 137, "cause": "gpu_lost", "node": "node3", "rank": 17, "why": "Xid 79"},
    {"event": "decided", "action": "restart", "exclude": ["node3"], "why": "node9 is spare"},
    {"event": "attempt", "attempt": 1, "hosts": ["node1", "node2"], "resume": "/ckpt/step00000400"},
)


def node(number: int, **more: object) -> Node:
    plain = Node(number, host=f"node{number + 1}", age=2.0, attempt=1, phase="training", step=412, step_seconds=1.31,
                 stalled=0.7, busy=1.1)  # fmt: skip
    return replace(plain, **more)


def fixed(**more: object) -> View:
    events = tuple({"seq": i, "time": NOW - 900 + 60 * i, **entry} for i, entry in enumerate(ENTRIES))
    plain = View(
        run=RUN, backend="slurm", job="4711", folder=f"/runs/{RUN}", phase=Phase.RUNNING, word="running", age=3.0,
        since=NOW - 8040, attempt=1, hosts=4, step=412, steps=10_000, loss=2.3145,
        losses=tuple(9 - i / 40 for i in range(240)), tokens_per_s=61_204.0, step_seconds=1.31, predicted=63_000.0,
        nodes=tuple(node(i) for i in range(4)), events=events,
    )  # fmt: skip
    return replace(plain, **more)


def drawn(views: list[View], width: int, height: int) -> list[str]:
    console = Console(
        width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None, record=True
    )
    console.print(screen.screen(views, width=width, height=height, now=NOW))
    return [line.rstrip() for line in console.export_text().rstrip("\n").split("\n")]


def test_the_screen_of_a_run_at_a_hundred_columns(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    nodes = stragglers([node(0), node(1, busy=1.4, note="GPU 3 at 1,100 MHz"), node(2, age=41.0), node(3)])
    phase, why = suspicion(Phase.RUNNING, "running: node[1-4]", nodes)
    path = Path(__file__).parent / "data" / "watch-100.txt"
    assert "\n".join(drawn([fixed(phase=phase, why=why, nodes=nodes)], 100, 24)) + "\n" == path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (200, 50), (60, 15)])
@pytest.mark.parametrize("count", [0, 1, 8, 1000])
def test_every_size_of_terminal_and_job_fits(width, height, count):
    nodes = [node(i, host=f"gpu-a100-rack{i:04d}.cluster.example.org") for i in range(count)]
    if count > 2:
        nodes[count - 1] = replace(nodes[count - 1], age=50.0, note="x" * 300)
    for phase in Phase:
        shown = drawn([fixed(phase=phase, nodes=tuple(nodes), why="y" * 300, hosts=count)], width, height)
        assert len(shown) <= height
        assert max(len(line) for line in shown) <= width
        assert RUN in shown[0]
        if count > 2:
            worst = next(i for i, line in enumerate(shown) if "heartbeat" in line and "phase" in line) + 1
            assert "silent" in shown[worst]
        if count == 1000:
            assert any(re.search(r"and 9\d\d more, all well", line) for line in shown)
    several = drawn(
        [fixed(run=f"demo-20261121-031502-{i:08x}", phase=phase) for i, phase in enumerate(Phase)] * 4, width, height
    )
    assert len(several) <= height


def test_a_stale_answer_is_shown_with_its_age_and_what_the_nodes_say():
    """Scenarios 42 and 65: cut off from the cluster's controller, the view says so and ends nothing."""
    unknown = fixed(phase=Phase.UNKNOWN, why="Slurm did not answer: Socket timed out", age=94.0)
    text = "\n".join(drawn([unknown], 120, 24))
    assert (
        "running when last heard, 1 min 34 s ago; 4 of 4 nodes report (Slurm did not answer: Socket timed out)"
        in text
    )
    assert "ETA" not in text
    assert screen.line(unknown).startswith("unknown: running when last heard, 1 min 34 s ago")


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "running, attempt 1, step 412/10000 (4 %), loss 2.3145, 61,204 tokens/s (97 % of plan), ETA 3 h 29 min"),
        ({"why": "suspended: node[1-4]"}, "running: suspended: node[1-4], attempt 1, step"),
        ({"phase": Phase.FAILED, "code": 7, "why": "failed", "attempt": 0}, "failed (exit code 7), step 412"),
        ({"phase": Phase.QUEUED, "why": "pending: Priority", "step": None, "attempt": None, "tokens_per_s": None},
         "queued: pending: Priority"),
    ],
)  # fmt: skip
def test_a_line_says_it_all(known, words):
    assert screen.line(fixed(**known)).startswith(words)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3599, "59 min"), (12600, "3 h 30 min"), (187_200, "2 d 4 h")],
)
def test_spans_of_time_have_two_units(value, words):
    assert screen.span(value) == words


def test_a_spark_line_goes_down_with_the_loss():
    assert screen.spark([3, 2, 1], 3) == "█▅▁"
    assert screen.spark([1.0], 5) == screen.spark([], 5) == ""
    assert screen.spark([2.0, float("nan"), 2.0], 5) == "▁▁"
    assert len(screen.spark(list(range(1000)), 12)) == 12


# --- what is suspicious ----------------------------------------------------------------------------


def test_stragglers_work_longer_than_the_median_and_of_two_nobody_knows():
    """Scenario 64: more than 1.1 times the median."""
    slow = stragglers([node(0), node(1), node(2, busy=1.22), node(3, busy=1.2), node(4)])
    assert [one.slow for one in slow] == [False, False, True, False, False]
    assert not any(one.slow for one in stragglers([node(0), node(1, busy=9.0)]))
    assert not any(one.slow for one in stragglers([node(i, busy=None) for i in range(5)]))


def test_only_a_running_job_is_suspect_and_only_for_a_reason():
    quiet, stuck = node(5, age=31.0), node(6, stalled=29.0, age=2.0)
    assert suspicion(Phase.RUNNING, "running", [node(0)]) == (Phase.RUNNING, "running")
    assert suspicion(Phase.RUNNING, "running", [node(0), stuck]) == (Phase.SUSPECT, "node7: no step for 29 s")
    assert suspicion(Phase.RUNNING, "", [stuck, quiet]) == (
        Phase.SUSPECT, "node6: no heartbeat for 31 s, and 1 more nodes",
    )  # fmt: skip
    assert suspicion(Phase.UNKNOWN, "why", [quiet]) == (Phase.UNKNOWN, "why")
    saving = node(0, phase="checkpoint", stalled=500.0)
    assert suspicion(Phase.RUNNING, "running", [saving])[0] is Phase.RUNNING
    slow = node(0, step_seconds=60.0, stalled=400.0)
    assert suspicion(Phase.RUNNING, "running", [slow])[0] is Phase.RUNNING
    assert [one.node for one in worst_first([node(0), node(1, slow=True), stuck, quiet])] == [5, 6, 1, 0]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"phase": Phase.DONE, "code": 0}, 0),
        ({"phase": Phase.FAILED, "code": 7}, 7),
        ({"phase": Phase.FAILED, "code": None}, 1),
        ({"phase": Phase.CANCELLED, "code": 75}, 130),
        ({"phase": Phase.RECOVERING}, None),
        ({"phase": Phase.SUSPECT}, None),
        ({"phase": Phase.UNKNOWN}, None),
        ({"phase": Phase.UNKNOWN, "gone": True}, None),  # its nodes report: it lives
        ({"phase": Phase.UNKNOWN, "gone": True, "nodes": ()}, 8),
        ({"phase": Phase.RUNNING, "gone": True, "nodes": ()}, None),
        ({"phase": Phase.QUEUED, "stuck": True, "nodes": ()}, 1),  # its image is not there
        ({"phase": Phase.RUNNING, "stuck": True}, None),  # others train
    ],
)
def test_a_run_is_over_only_by_a_verdict(change, code):
    """Scenarios 43 and 57: silence, recovery and unknown states are waited through."""
    assert exit_code(fixed(**change)) == code


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / RUN
    (made / "logs").mkdir(parents=True)
    journal.append(made, "rendered", backend="slurm", name="gpt-7b", steps=100, extra={},
                   predicted={"tokens_per_s": 1000.0, "step_seconds": 2.0})  # fmt: skip
    journal.append(made, "submitting", token=RUN)
    journal.append(made, "submitted", job="7")
    return made


def metric(step: int, at: float) -> str:
    return json.dumps({"step": step, "steps": 100, "loss": 5.0 - step / 50, "tokens_per_s": 900.0, "time": at}) + "\n"


def test_files_are_read_on_from_where_they_were_read(folder):
    files = Files(folder)
    path = folder / "logs" / "metrics.jsonl"
    path.write_text("".join(metric(step, 100.0 + 2 * step) for step in range(5)) + '{"step": 5, "lo')
    assert [row["step"] for row in files.steps()] == [0, 1, 2, 3, 4]
    read = files.metrics
    with path.open("a") as file:
        file.write('ss": 1.0}\nnonsense\n' + metric(6, 112.0))
    assert [row["step"] for row in files.steps()] == [0, 1, 2, 3, 4, 5, 6]
    assert files.metrics == path.stat().st_size > read
    assert pace(list(files.steps())) == 2.0
    path.write_text(metric(1, 1.0))  # another file
    assert files.steps()[-1]["step"] == 1


def test_of_metrics_of_gigabytes_the_end_is_read(folder):
    path = folder / "logs" / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(("\n" + metric(99, 1.0)).encode())
    begun = time.monotonic()
    assert [row["step"] for row in Files(folder).steps()] == [99]
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"node": "x"}', '{"host": 3}', "null"])
def test_a_damaged_heartbeat_is_none(folder, text):
    (folder / "logs" / "beat-0000.json").write_text('{"node": 0, "host": "node1", "step": 3, "attempt": 0}')
    (folder / "logs" / "beat-0001.json").write_text(text)
    assert [one.host for one in Files(folder).beats()] == ["node1"]


def test_a_heartbeat_s_age_is_the_file_system_s_and_older_attempts_are_over(folder):
    """Scenario 73: no comparison of two hosts' clocks."""
    for number, attempt in ((0, 1), (1, 1), (2, 0)):
        told = {"node": number, "attempt": attempt, "time": 4e9, "ranks": {"0": {"busy": 1.5}, "1": {"busy": 2.0}}}
        (folder / "logs" / f"beat-{number:04d}.json").write_text(json.dumps(told))
    os.utime(folder / "logs" / "beat-0001.json", (time.time() - 100, time.time() - 100))
    found = Files(folder).beats()
    assert [one.node for one in found] == [0, 1]
    assert found[0].age < 5
    assert 95 < found[1].age < 110
    assert found[1].late
    assert found[0].busy == 2.0
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl", "logs"]


def test_what_is_told_has_stable_keys(folder):
    (folder / "logs" / "metrics.jsonl").write_text("".join(metric(step, 100.0 + 2 * step) for step in range(5)))
    (folder / "logs" / "beat-0000.json").write_text(json.dumps({"node": 0, "host": "node1", "phase": "training"}))
    files = Files(folder)
    live = poll.step(poll.Known(), poll.Status(poll.State.RUNNING, "running: node1", job="7"), 1000.0)
    first = view(files, live, 1003.0)
    assert (first.phase, first.age, first.of_plan, first.eta) == (Phase.RUNNING, 3.0, 0.9, 192.0)
    told = changes(None, first, 1003.0)
    assert [one["kind"] for one in told] == ["event"] * 3 + ["state", "progress", "node"]
    assert all((one["v"], one["time"], one["run"]) == (1, 1003.0, RUN) for one in told)
    keys = {one["kind"]: set(one) - {"v", "time", "run", "kind"} for one in told[3:]}
    assert keys == {
        "state": {"state", "why", "job", "attempt", "scheduler", "age"},
        "progress": {
            "step",
            "steps",
            "loss",
            "tokens_per_s",
            "predicted_tokens_per_s",
            "step_seconds",
            "eta_seconds",
        },
        "node": {"node", "host", "phase", "trouble", "heartbeat_age", "step", "step_seconds", "busy", "note"},
    }
    json.dumps(told)
    assert changes(first, first, 1005.0) == []
    silent = poll.step(live, poll.Status(poll.State.UNKNOWN, "Slurm did not answer"), 1010.0)
    (change,) = changes(first, view(files, silent, 1034.0), 1034.0)
    assert (change["kind"], change["state"], change["scheduler"], change["age"]) == (
        "state",
        "unknown",
        "running",
        34.0,
    )
    over = poll.step(live, poll.Status(poll.State.FAILED, "failed", 7, "7"), 1040.0)
    told = changes(first, view(files, over, 1041.0), 1041.0)
    assert told[-1] == {
        "v": 1,
        "time": 1041.0,
        "run": RUN,
        "kind": "end",
        "state": "failed",
        "code": 7,
        "failures": [],
    }


# --- the commands ------------------------------------------------------------------------------------


def dslaunch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DSLAUNCH, *arguments], capture_output=True, text=True, timeout=240, cwd=folder)


def local(folder: Path, program: str) -> str:
    """A run of that program on this machine, in the background."""
    job = {"name": "here", "model": {"layers": 2, "hidden": 64, "heads": 2},
           "train": {"global_batch": 8, "seq_len": 64, "steps": 100, "command": ["python3", "-c", program]},
           "resources": {"nodes": 1, "processes_per_node": 1}, "recover": {"attempts": 0}}  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    done = dslaunch("local", "job.yaml", "--detach", folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRAINS = """
import json, os, time
for step in range(1, 101):
    row = {"step": step, "loss": 5 - step / 50, "tokens_per_s": 900.0, "time": time.time()}
    with open(os.environ["DSLAUNCH_METRICS"], "a") as file:
        file.write(json.dumps(row) + chr(10))
    time.sleep(0.1)
raise SystemExit(7)
"""


@pytest.mark.slow
def test_lines_json_and_wait_end_with_the_job_s_own_code_and_a_time_out_is_124(tmp_path):
    run = local(tmp_path, TRAINS)
    told = subprocess.Popen([DSLAUNCH, "watch", run, "--json"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    early = dslaunch("wait", run, "--timeout", "1", folder=tmp_path)
    assert early.returncode == 124
    assert "running" in early.stdout
    plain = dslaunch("watch", run, folder=tmp_path)
    out, _ = told.communicate(timeout=60)
    assert told.returncode == plain.returncode == 7
    assert re.search(r"here-\S+: running", plain.stdout)
    assert "failed (exit code 7), step 100/100 (100 %), loss 3.0000" in plain.stdout
    assert "first failure: rank 0 on" in plain.stdout
    rows = [json.loads(line) for line in out.splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 100
    assert (rows[-1]["kind"], rows[-1]["state"], rows[-1]["code"]) == ("end", "failed", 7)
    done = dslaunch("wait", run, folder=tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (7, 1)
    assert "failed (exit code 7)" in done.stdout


@pytest.mark.slow
def test_on_a_terminal_it_is_live_follows_a_resize_and_ctrl_c_leaves_the_job_alone(tmp_path):
    """Scenario 57, the watching part."""
    run = local(tmp_path, TRAINS.replace("0.1", "2"))
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # those would win
    child = subprocess.Popen([DSLAUNCH, "watch", run], stdin=side, stdout=side, stderr=side, cwd=tmp_path,
                             start_new_session=True, env={**env, "TERM": "xterm-256color"})  # fmt: skip
    os.close(side)

    def until(pattern: str) -> str:
        seen, deadline = "", time.monotonic() + 120
        while not re.search(pattern, seen, re.DOTALL):
            assert time.monotonic() < deadline, seen[-3000:]
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 65536).decode(errors="replace")
        return seen

    try:
        first = until(r"RUNNING.*step \d+ / 100")
        assert "\x1b[?1049h" in first  # a screen of its own: the terminal is as before afterwards
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
        until("─" * 90)
        child.send_signal(signal.SIGINT)
        until(r"\?1049l.*left; the job goes on")
        assert child.wait(20) == 130
    finally:
        if child.poll() is None:
            child.kill()
        os.close(main)
    assert json.loads(dslaunch("status", run, "--json", folder=tmp_path).stdout)["state"] == "running"
    assert dslaunch("cancel", run, folder=tmp_path).returncode == 0
    assert dslaunch("wait", run, folder=tmp_path).returncode == 130


# --- on Slurm ----------------------------------------------------------------------------------------


class Told:
    """What a command prints, as it does."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.lines: list[str] = []
        self.child = subprocess.Popen([DSLAUNCH, *arguments], stdout=subprocess.PIPE, text=True, cwd=folder)
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.child.stdout), daemon=True)
        self.reader.start()

    def until(self, what: Callable[[list[str]], object], *, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what(self.lines):
            assert time.monotonic() < deadline, self.lines[-10:]
            assert self.reader.is_alive() or what(self.lines), self.lines[-10:]
            time.sleep(0.1)

    def end(self, seconds: float = 120) -> int:
        try:
            code = self.child.wait(seconds)
        finally:
            self.child.kill()
        self.reader.join(10)
        return code


def states(lines: list[str]) -> list[dict]:
    return [row for row in map(json.loads, lines) if row["kind"] == "state"]


def test_a_job_is_watched_through_a_suspension_and_a_controller_that_goes_away(site, slurm):  # noqa: F811
    """Scenarios 41, 42, 45, 57 and 65 on a real Slurm with real DeepSpeed: suspended is shown, no controller for 20 s
    is UNKNOWN with an age and nothing else, and whoever waits gets the job's own code."""
    asked = job("watched", train={"zero": 1, "steps": 300, "global_batch": 8})
    asked["resources"] = {"nodes": 2}
    run = site.submit(asked)
    told = Told("watch", run, "--json", folder=site.folder)
    waiter = Told("wait", run, folder=site.folder)
    follower = Told("logs", "-f", run, folder=site.folder)
    try:
        told.until(lambda lines: any('"kind": "progress"' in line for line in lines), seconds=200)
        number = states(told.lines)[-1]["job"]
        subprocess.run(["scontrol", "suspend", number], check=True)
        told.until(lambda lines: "suspended" in states(lines)[-1]["why"])
        os.kill(slurm._alive("slurmctld"), signal.SIGTERM)
        gone = time.monotonic()
        told.until(lambda lines: states(lines)[-1]["state"] == "unknown")
        time.sleep(max(0.0, 20 - (time.monotonic() - gone)))
        early = site.dslaunch("wait", run, "--timeout", "0")
        assert early.returncode == 124
        assert re.search(r"unknown: running when last heard, [12]\d s ago.*Slurm did not answer", early.stdout)
        slurm._spawn("slurmctld", ["slurmctld", "-D"])
        told.until(lambda lines: states(lines)[-1]["state"] == "running")
        subprocess.run(["scontrol", "resume", number], check=True)
    finally:  # a job that stays suspended would keep the cluster
        if not slurm._alive("slurmctld"):
            slurm._spawn("slurmctld", ["slurmctld", "-D"])
        for line in site.jobs().splitlines():
            subprocess.run(["scontrol", "resume", line.split()[0]], capture_output=True)
    assert waiter.end() == 0, waiter.lines
    assert re.search(r"done, step 300/300", waiter.lines[0])
    assert told.end() == 0
    assert [row["state"] for row in states(told.lines) if row["state"] in ("unknown", "failed", "cancelled")] == [
        "unknown"
    ]
    assert json.loads(told.lines[-1])["kind"] == "end"
    assert follower.end() == 0
    assert "[rank 0] finished: 300 steps" in "".join(follower.lines)
    events = [json.loads(line)["event"] for line in (site.folder / "dslaunch-runs" / run / "journal.jsonl").open()]
    assert events.count("attempt") == events.count("submitted") == 1  # nobody started anything again


def test_five_runs_and_three_watchers_ask_the_controller_once_every_ten_seconds(site, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.delenv("DSLAUNCH_POLL")
    asked = job("asked", train={"command": ["sleep", "120"], "zero": 0, "steps": 10, "launcher": "srun"})
    asked["resources"] = {"nodes": 1}
    names = [site.submit({**asked, "name": f"asked{number}"}) for number in range(5)]
    counted = tmp_path / "bin"
    counted.mkdir()
    real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
    (counted / "squeue").write_text(f'#!/bin/sh\necho >>{tmp_path}/calls\nexec {real} "$@"\n')
    (counted / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{counted}:{os.environ['PATH']}")
    begun = time.monotonic()
    watchers = [Told("watch", *these, "--json", folder=site.folder) for these in (names, names[:2], [])]
    for watcher, count in zip(watchers, (5, 2, 5), strict=True):
        watcher.until(lambda lines, count=count: len({row["run"] for row in states(lines)}) == count)
    time.sleep(13)  # without a common interval that would be three questions and more
    for watcher in watchers:
        watcher.child.send_signal(signal.SIGINT)
        assert watcher.end() == 130
    calls = len((tmp_path / "calls").read_text().splitlines())
    assert 1 <= calls <= 1 + (time.monotonic() - begun) / 10
    for watcher, count in zip(watchers, (5, 2, 5), strict=True):
        assert len({row["run"] for row in states(watcher.lines) if row["state"] != "unknown"}) == count
    monkeypatch.setenv("DSLAUNCH_POLL", "1")
    for name in names:
        assert site.dslaunch("cancel", name).returncode == 0
    assert site.dslaunch("wait", names[0]).returncode == 130
