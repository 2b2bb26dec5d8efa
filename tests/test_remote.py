"""Submission over ssh: a real sshd on loopback is the login node of a real Slurm, and dslaunch is elsewhere.

Scenario 77: unknown host keys, prompts and noise of login scripts.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import test_slurm
from test_slurm import Site, site  # noqa: F401 - a fixture

from launcher import remote, runs
from launcher.errors import Unreachable
from launcher.node import far as agent
from launcher.node import journal

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
HOST = "login1"
NOISE = "Welcome to login1!\\n\\033[31mQuota: 90%\\033[0m\\n"
PROGRAM = "import os, sys; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], *sys.argv[1:])"


@pytest.fixture(scope="module")
def login(tmp_path_factory):
    """A login node: sshd with a key of its own, whose shell talks before every command."""
    if not SSHD or os.geteuid() != 0:
        reason = "needs root and openssh-server: apt-get install openssh-server"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("login")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nSetEnv SLURM_CONF=/none\n"
        f"""ForceCommand printf '{NOISE}'; . {folder}/env; eval "$SSH_ORIGINAL_COMMAND"\n"""
    )
    (folder / "env").write_text("")
    known = subprocess.run(["cut", "-d ", "-f1,2", folder / "host.pub"], capture_output=True, text=True).stdout
    (folder / "known").write_text(f"[127.0.0.1]:{port} {known}")
    (folder / "empty").write_text("")
    common = (
        f"HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user\n User root\n GlobalKnownHostsFile none\n"
    )
    (folder / "config").write_text(
        f"Host {HOST}\n {common} UserKnownHostsFile {folder}/known\n"
        f"Host stranger\n {common} UserKnownHostsFile {folder}/empty\n"
        f"Host locked\n {common.replace(f'{folder}/user', f'{folder}/host')} UserKnownHostsFile {folder}/known\n"
        f" IdentitiesOnly yes\n"
        f"Host nobody\n HostName 127.0.0.1\n Port 1\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield folder
    daemon.kill()
    daemon.wait()


@pytest.fixture
def reach(login, monkeypatch):
    monkeypatch.setenv("PATH", f"{login / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return login


@pytest.mark.slow
def test_commands_run_there_byte_for_byte_whatever_the_login_shell_says(reach):
    odd = ["a b", "'; touch /tmp/x; '", "$(id)", "ü\n\t", "", "-v"]
    done = remote.runner(HOST)([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:])); sys.exit(3)", *odd])
    assert (done.code, done.out) == (3, ascii(odd) + "\n")
    assert remote.runner(HOST)(["no-such-command-here"]).err == "no-such-command-here: command not found"
    slow = remote.runner(HOST)(["sleep", "30"], timeout=1)
    assert (slow.code, slow.err) == (None, "sleep did not answer within 1 s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "says", "hint"),
    [
        ("stranger", "Host key verification failed", "ssh stranger"),
        ("locked", "Permission denied", "ssh-add"),
        ("nobody", "Connection refused", "ssh -o BatchMode=yes nobody true"),
        ("no-such-host.invalid", "ould not resolve", "~/.ssh/config"),
    ],
)
def test_scenario_77_nothing_is_asked_and_no_unknown_host_is_trusted(reach, host, says, hint):
    begun = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        remote.ask(host, {"op": "missing", "paths": []})
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"ssh did not connect to {host}")
    assert says in problem.message
    assert hint in problem.hint
    assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_a_run_directory_arrives_once_and_as_a_whole(reach, tmp_path):
    def packed(text: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo("job.sbatch")
            member.size, member.mode = len(text), 0o600
            archive.addfile(member, io.BytesIO(text.encode()))
        return buffer.getvalue()

    request = {"op": "put", "folder": str(tmp_path / "runs" / "x"), "link": str(tmp_path), "make": []}
    for text in ("first", "second"):
        remote.ask(HOST, request, packed(text))
    assert (tmp_path / "runs" / "x" / "job.sbatch").read_text() == "first"
    assert (tmp_path / "runs" / "x").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


def archive(*members, mode=0o600):
    """Of ("a", "text"), ("l", None, "where it leads") and ("d/", None)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, text, *goal in members:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text or ""), mode
            if goal:
                member.type, member.linkname = tarfile.SYMTYPE, goal[0]
            packed.addfile(member, io.BytesIO((text or "").encode()))
    return buffer.getvalue()


def test_both_sides_agree_on_what_is_fetched_and_on_how_much_of_it():
    assert remote.WHOLE == agent.WHOLE
    assert remote.MOST == 2 * (agent.ENOUGH + agent.NEWEST)
    assert sorted(remote.BELOW) == ["logs/", "preflight/"]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("journal.jsonl", "another\n")], "is another run"),
        ([("../x", "out")], "leads out"),
        ([("a", None, "/tmp"), ("a/f", "x")], "a/f leads through a link"),
        ([("a/b", None, ".."), ("./a/b/c/f", "x")], "leads through a link"),
    ],
)
def test_an_archive_that_is_another_run_or_writes_through_links_is_refused(tmp_path, members, says):
    folder = tmp_path / "runs" / "x"
    request = {"folder": str(folder), "link": str(tmp_path), "make": []}
    if "another" in says:
        agent.put(request, archive(("journal.jsonl", "first\nsubmitting\n")))
        agent.put(request, archive(("journal.jsonl", "first\n")))  # jobs have written to it since
    with pytest.raises(ValueError, match=says):
        agent.put(request, archive(("secrets/K", "secret"), *members))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == (["x"] if "another" in says else [])


def test_a_run_directory_there_has_to_be_ones_own(tmp_path):
    runs = tmp_path / "runs"
    request = {"folder": str(runs / "x"), "link": str(tmp_path), "make": []}
    before = os.umask(0o002)
    try:
        agent.put(request, archive(("a", "x")))
    finally:
        os.umask(before)
    assert runs.stat().st_mode & 0o022 == 0
    (runs / "x").chmod(0o770)
    with pytest.raises(ValueError, match="not a directory of yours alone"):
        agent.put(request, archive(("a", "x")))
    (runs / "x").chmod(0o700)
    (runs / "y").symlink_to("x")
    with pytest.raises(ValueError, match="not a directory of yours alone"):
        agent.put({**request, "folder": str(runs / "y")}, archive(("a", "x")))
    if os.geteuid() == 0:
        os.chown(runs / "x", 65534, 65534)
        with pytest.raises(ValueError, match="not a directory of yours alone"):
            agent.put(request, archive(("a", "x")))
    runs.chmod(0o775)
    with pytest.raises(ValueError, match="chmod go-w"):
        agent.put({**request, "folder": str(runs / "z")}, archive(("a", "x")))
    runs.chmod(0o1777)
    agent.put({**request, "folder": str(runs / "z")}, archive(("a", "x")))


def test_a_put_that_fails_leaves_no_secrets(tmp_path):
    (tmp_path / "file").write_text("in the way")
    request = {"folder": str(tmp_path / "runs" / "x"), "link": str(tmp_path), "make": ["file/below"]}
    with pytest.raises(OSError, match="Not a directory"):
        agent.put(request, archive(("secrets/K", "secret")))
    assert list((tmp_path / "runs").iterdir()) == []


# A login node in the hands of somebody else: it knows the nonce, and answers what ANSWER prints.
EVIL = """#!{python}
import json, os, re, sys
nonce = re.search(rb'"nonce": "([0-9a-f]{{32}})"', sys.stdin.buffer.read()).group(1)
def frame(text, data=b""):
    return nonce + b"%16d%16d" % (len(text), len(data)) + text + data
{body}
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """answer(PYTHON) is the login node of the run in tmp_path / "x"."""
    home = tmp_path / "bin"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    folder = tmp_path / "x-20261121-031502-4f2a90c1"
    folder.mkdir()
    journal.append(folder, "rendered", backend="slurm", name="x", steps=0, extra={"login": "me@good"})
    journal.append(folder, "submitting", token="mine")

    def answer(body):
        (home / "ssh").write_text(EVIL.format(python=sys.executable, body=body))
        (home / "ssh").chmod(0o755)
        remote._fetched.clear()
        return runs.read(folder)

    return answer


def files(rows, data=b"", **more):
    text = json.dumps({"files": rows, "there": True, "more": False, **more}).encode()
    return f"sys.stdout.buffer.write(frame({text!r}, {data!r}))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "sys.stdout.buffer.write(nonce + b'x' * 40)",
        "sys.stdout.buffer.write(nonce + b'%16d%16d{}' % (-5, 2))",
        "sys.stdout.buffer.write(nonce + b'%16s%16d{}' % (b'1_0', 2))",
        "sys.stdout.buffer.write(frame(b'[1]'))",
        "sys.stdout.buffer.write(frame(b'{'))",
        "sys.stdout.buffer.write(frame(b'[' * 100000))",
        "sys.stdout.buffer.write(frame(b'{\"error\": 3}'))",
        "sys.stdout.buffer.write(frame(b'{\"files\": 3, \"there\": true, \"more\": false}'))",
        files([["logs/a.log", 10**13, 10**13, 0, 0]]),
        files([["logs/a.log", 10**13, 0, 0, 0]]),
        files([["logs/a.log", -1, 0, 0, 0]]),
        files([["logs/a.log", 0, -1, 1, 0]], b"x"),
        files([["logs/a.log", 2, 0, 2, 0]], b"x"),
        files([["logs/a.log", 1, 0, 1, 0]], b"xy"),
        files([["logs/a.log", 1, 0, 1, "0"]], b"x"),
        files([["logs/a.log", True, 0, 1, 0]], b"x"),
        files([["logs/a.log"]]),
        files([[1, 2, 3, 4, 5]]),
        files([], there=3),
        *(
            files([[name, 1, 0, 1, 0]], b"x")
            for name in ("", ".", "logs", "logs/", "/etc/x", "../up", "logs/../q", "./journal.jsonl", "logs//a", "q",
                         "there.json", "job.sbatch", "secrets/K", "logs/a\0b", "logs/\ud800", "logs/" + "a" * 300)
        ),
        files([["logs/a", 1, 0, 1, 0], ["logs/a/b", 1, 0, 1, 0]], b"xy"),
    ],
)  # fmt: skip
def test_nonsense_from_a_login_node_is_no_traceback_and_writes_nothing(hostile, tmp_path, body):
    record = hostile(body)
    before = (record.folder / journal.NAME).read_bytes()
    with pytest.raises(Unreachable, match="answered nonsense"):
        remote.fetch(record)
    assert {path.name for path in record.folder.iterdir()} <= {journal.NAME, journal.LOCK, "logs"}
    assert (record.folder / journal.NAME).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", record.folder.name]


def test_a_command_with_an_answer_that_is_none_did_not_answer(hostile):
    hostile('sys.stdout.buffer.write(frame(b\'{"code": "0", "out": "", "err": ""}\'))')
    done = remote.runner("me@good")(["squeue"])
    assert (done.code, done.err) == (None, "me@good answered nonsense: no code")


def test_a_login_node_does_not_say_what_a_run_is(hostile):
    entries = [
        {"event": "rendered", "backend": "local", "extra": {"login": "root@other", "login_dir": "/etc"}, "name": "y"},
        {"event": "submitting", "token": "theirs", "backend": "local"},
        {"event": "started", "job": "7", "time": "soon"},
        {"event": "attempt", "attempt": 0, "hosts": 3},
        {"event": "started", "job": "8"},
    ]
    rows = [{"seq": 50 + number, "time": 9e9 + number, "host": "evil", **one} for number, one in enumerate(entries)]
    lines = b"".join(map(journal.line, rows))
    record = hostile(files([["journal.jsonl", len(lines), 0, len(lines), 0]], lines))
    assert remote.fetch(record)
    found = runs.read(record.folder)
    assert (found.backend, found.name, found.token, found.job) == ("slurm", "x", "mine", "8")
    assert found.extra == {"login": "me@good"}
    assert len(found.entries) == 3


@pytest.mark.slow
def test_a_login_node_that_does_not_stop_talking_is_cut_off(hostile, monkeypatch):
    monkeypatch.setattr(remote, "MOST", 10 << 20)
    record = hostile("while True: sys.stdout.buffer.write(b'x' * 1000000)")
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="said more than 10 MiB"):
        remote.fetch(record)
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_more_than_one_answer_holds_is_asked_for_until_it_is_there(reach, tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "here" / "logs").mkdir(parents=True)
    for name in "abcdef":
        (there / "here" / "logs" / f"{name}.log").write_bytes(os.urandom(100) + b"\0" * (15 << 20))
    here.mkdir()
    extra = {"login": HOST, "login_dir": str(there)}
    journal.append(here, "rendered", backend="slurm", name="x", steps=0, extra=extra)
    assert remote.fetch(runs.read(here))
    for path in (there / "here" / "logs").iterdir():
        assert (here / "logs" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def far(site, reach, slurm, tmp_path, monkeypatch):  # noqa: F811
    """A laptop: no Slurm of its own is configured; the login node has it."""
    (reach / "env").write_text("".join(f"export {name}={value}\n" for name, value in slurm.env.items()))
    for name in slurm.env:
        monkeypatch.delenv(name)
    (tmp_path / "there").mkdir()
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    monkeypatch.chdir(laptop)
    return Site(laptop)


def job(tmp_path, *, venv=sys.prefix, **train):
    train = train or {"command": ["python3", "-c", PROGRAM]}
    train.setdefault("workdir", str(tmp_path / "there"))
    return {
        **test_slurm.job("far", train={"zero": 0, "steps": 10, **train}),
        "resources": {"nodes": 2, "processes_per_node": 2},
        "venv": venv,
        "slurm": {"time": "10", "login": HOST, "login_dir": str(tmp_path / "there" / "runs")},
    }


def test_a_job_submitted_over_ssh_runs_and_is_followed_from_here(far, tmp_path):
    run = far.submit(job(tmp_path))
    there = tmp_path / "there" / "runs" / run
    assert (there / "job.sbatch").is_file()
    found = far.wait(run)
    assert (found["state"], found["code"]) == ("completed", 0), far.log(run)
    assert all(f"rank {rank} of 4" in far.log(run) for rank in range(4))
    events = [entry["event"] for entry in map(json.loads, (there / "journal.jsonl").read_text().splitlines())]
    assert events[:2] == ["rendered", "submitting"]
    assert "finished" in events
    assert run in far.dslaunch("runs").stdout


LATE = """import os, sys, time
if os.environ["RANK"] == "0":
    open(os.path.join(sys.argv[1], "started"), "w").close()
while not os.path.exists(os.path.join(sys.argv[1], "go")):
    time.sleep(0.2)
from lib import word
path = os.path.join(os.environ["DSLAUNCH_CHECKPOINT_DIR"], "rank-" + os.environ["RANK"])
os.makedirs(os.path.dirname(path), exist_ok=True)
open(path, "w").write(word)
print("it is", word)
"""


def test_the_code_of_a_laptop_travels_and_a_later_edit_of_it_changes_nothing(far, tmp_path):
    project = far.folder
    for name, text in {"src/train.py": LATE, "lib.py": "word = 'first'\n", "data/big.bin": "x"}.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    (project / ".dslaunchignore").write_text("/data/\n/dslaunch-runs/\n")
    asked = job(tmp_path, script="train.py", workdir="src", args=[str(tmp_path / "there")])
    asked |= {"code": "copy", "env": {"PYTHONPATH": ".."}}
    run = far.submit(asked)
    (project / "lib.py").write_text("word = 'second'\n")
    there = tmp_path / "there"
    copy = there / "runs" / run / "snapshot"
    links = [path for path in copy.rglob("*") if path.is_symlink()]
    assert links == [copy / "src" / "checkpoints" / "far"]  # and none to data, which is not there
    assert links[0].resolve() == there / "runs" / "src" / "checkpoints" / "far"
    deadline = time.monotonic() + 60
    while not (there / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    (project / "lib.py").write_text("word = 'third'\n")
    (there / "go").touch()
    found = far.wait(run)
    assert (found["state"], found["code"]) == ("completed", 0), far.log(run)
    saved = [path.read_text() for path in (there / "runs" / "src" / "checkpoints" / "far").glob("rank-*")]
    assert saved == ["first"] * 4
    assert not (project / "src" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": {"script": "gone.py"}}, "gone.py is not in the code that is taken"),
        ({"train": {"command": ["./data/run.sh"]}}, "data/run.sh is not in the code that is taken"),
        ({"venv": ".venv"}, "venv .venv is on this machine"),
        ({"train": {"command": ["true"], "workdir": "/opt"}}, "workdir /opt is absolute"),
        ({"train": {"command": ["true"], "checkpoint": {"dir": "../x"}}}, "outside of it"),
    ],
)
def test_code_that_would_be_missing_there_is_refused_before_anything_is_sent(far, tmp_path, change, says):
    (far.folder / "data").mkdir()
    (far.folder / "data" / "run.sh").write_text("")
    (far.folder / ".dslaunchignore").write_text("/data/\n")
    train = {"command": ["true"], "workdir": ".", **change.get("train", {})}
    if "script" in train:
        del train["command"]
    asked = job(tmp_path, **train) | {"code": "copy"} | {key: change[key] for key in change if key != "train"}
    (far.folder / "job.yaml").write_text(json.dumps(asked))
    done = far.dslaunch("slurm", "job.yaml")
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "there" / "runs").exists()


def test_the_same_job_again_is_the_same_run_and_cancel_reaches_it(far, tmp_path):
    sleeper = job(tmp_path, command=["sleep", "300"])
    first = far.submit(sleeper)
    assert far.submit(sleeper) == first
    assert far.dslaunch("cancel", first).returncode == 0
    assert far.wait(first)["state"] == "cancelled"
    done = far.dslaunch("resume", first, "--fresh")
    assert done.returncode == 2
    assert "its checkpoints are on login1, out of reach of --fresh" in done.stderr


def test_what_is_not_there_is_refused_before_anything_is_sent(far, tmp_path):
    (far.folder / "job.yaml").write_text(json.dumps(job(tmp_path, script="train.py", workdir=".")))
    done = far.dslaunch("slurm", "job.yaml")
    assert done.returncode == 2
    assert "workdir . is on this machine, and the job runs at login1" in done.stderr
    absent = job(tmp_path, script="train.py", venv="/no/venv")
    (far.folder / "job.yaml").write_text(json.dumps(absent))
    done = far.dslaunch("slurm", "job.yaml")
    assert f"login1 has no file {tmp_path}/there/train.py" in done.stderr
    assert "login1 has no file /no/venv/bin/activate" in done.stderr
    assert not (tmp_path / "there" / "runs").exists()


def test_the_controller_there_is_asked_when_it_would_start(far, tmp_path):
    (far.folder / "job.yaml").write_text(json.dumps(job(tmp_path)))
    done = far.dslaunch("slurm", "job.yaml", "--test-only")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout
