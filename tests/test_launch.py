"""From a bundle to one job: run directories, locks, processes of this machine, and what Slurm's commands answer."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from launcher import backends, launch, runs, spec
from launcher.backends import local, slurm
from launcher.backends.slurm import queue as squeue
from launcher.bundle import Bundle, File
from launcher.errors import Unreachable, UserError
from launcher.launch import Order
from launcher.node import journal
from launcher.run import Result, run
from launcher.runs import Phase
from launcher.runs.submit import Unsent

SCRIPT = 'echo here >>"$(dirname "$0")/ran"\nsleep 60\n'


def order(base: Path, *, name: str = "here", script: str = SCRIPT, **more: object) -> Order:
    document = spec.load(f"name: {name}\nmodel: gpt-demo\n", name="job.yaml", environ={})
    facts = {"extra": {"per_node": 1, "checkpoints": str(base / "checkpoints")}}
    files = (File(local.ENTRY, script), File("node/x", "x\n"))
    return Order("local", document.spec, Bundle(files, local.ENTRY), base, {"KEY": "s"}, facts, **more)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path):
    """Where runs live; what runs there is gone afterwards."""
    yield tmp_path / "runs"
    for path in (tmp_path / "runs").glob("*/pid"):
        pid = int(path.read_text().split(":")[0])
        if local._started(pid) == path.read_text().split(":")[1].strip():
            os.killpg(pid, signal.SIGKILL)


def processes(folder: Path) -> int:
    """How many times the script of this run was started."""
    deadline = time.monotonic() + 60
    while not (folder / "ran").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    return len((folder / "ran").read_text().split())


def test_a_run_directory_explains_itself_and_is_the_owner_s(tmp_path, root):
    before = os.umask(0)
    try:
        found = launch.begin(order(tmp_path), root, run)
    finally:
        os.umask(before)
    folder = found.record.folder
    assert found.how == "submitted"
    assert [entry["event"] for entry in found.record.entries] == ["rendered", "submitting", "submitted"]
    files = found.record.entries[0]["files"]
    assert files["node/x"] == "73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac"
    assert processes(folder) == 1  # and by now has the file with its number its name
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.name != "ran":
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in root.iterdir()] == [folder.name]


def test_the_same_job_again_is_the_run_that_lives_and_another_one_into_its_checkpoints_is_refused(tmp_path, root):
    """scenario 56"""
    first = launch.begin(order(tmp_path), root, run)
    again = launch.begin(order(tmp_path), root, run)
    assert (again.how, again.record.id) == ("already", first.record.id)
    with pytest.raises(UserError, match="trains into") as caught:
        launch.begin(order(tmp_path, script=SCRIPT + "true\n"), root, run)
    assert f"dslaunch cancel {first.record.id}" in caught.value.problems[0].hint
    on_purpose = launch.begin(order(tmp_path, again=True), root, run)
    assert on_purpose.how == "submitted"
    for one in (first, on_purpose):
        local.cancel(one.record, run)
    new = launch.begin(order(tmp_path, script=SCRIPT + "true\n"), root, run)
    assert new.how == "submitted"
    assert len(runs.known(root)) == 3


def begin_in_child(one: Order, root: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            launch.begin(one, root, run)
        finally:
            os._exit(0)
    return pid


@pytest.mark.slow
def test_kill_9_of_a_local_start_leaves_one_process_tree_or_none(tmp_path, root, capsys):
    """scenario 55: 40 times; the next command finds it, and the same command leaves exactly one."""
    launch.begin(order(tmp_path, name="warm"), root, run)
    begun = time.monotonic()
    os.waitpid(begin_in_child(order(tmp_path, name="first"), root), 0)
    took = time.monotonic() - begun
    dice, seen = random.Random(3), Counter()
    for number in range(40):
        one = order(tmp_path, name=f"here{number}")
        pid = begin_in_child(one, root)
        while number % 4 and not runs.known(root, name=one.spec.name):
            time.sleep(0)
        time.sleep(dice.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for folder in runs.known(root, name=one.spec.name):
            before = runs.read(folder).state
            after = launch.reconcile(runs.read(folder), run)
            seen[f"{before.value}: " + ("a job" if after.job else "no job")] += 1
        found = launch.begin(one, root, run)
        assert processes(found.record.folder) == 1
        assert local.state(found.record, run).state is backends.State.RUNNING
        assert len(runs.known(root, name=one.spec.name)) == 1
        os.killpg(int(found.record.job.split(":")[0]), signal.SIGKILL)
    assert not list(root.glob(".*"))
    with capsys.disabled():
        print(f"\nkilled 40 local starts within {took * 1000:.0f} ms: {dict(seen)}")


@pytest.mark.slow
def test_two_at_once_on_this_machine_are_one(tmp_path, root):
    """scenario 56"""
    children = [begin_in_child(order(tmp_path), root) for _ in range(6)]
    for pid in children:
        os.waitpid(pid, 0)
    (folder,) = runs.known(root)
    assert processes(folder) == 1


def test_what_a_killed_dslaunch_left_half_written_is_swept_with_its_secrets(tmp_path, root):
    """scenario 58: and nobody takes it for a run."""
    half = root / ".here-20261121-031502-4f2a90c1.half"
    other = root / ".here-too-20261121-031502-4f2a90c1.half"  # of another job
    for folder in (half, other):
        (folder / "secrets").mkdir(parents=True)
        journal.append(folder, "rendered")
    assert runs.known(root) == []
    launch.begin(order(tmp_path), root, run)
    assert (half.exists(), other.exists()) == (False, True)


def test_a_place_for_runs_that_cannot_be_written_is_refused(tmp_path):
    """scenario 58: a file in the way, a name of 300 bytes, a file system that is read-only."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "runs", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write") as caught:
            launch.begin(order(tmp_path), place, run)
        assert caught.value.problems[0].hint == "--runs names another place"
    if os.geteuid() == 0:
        place = tmp_path / "readonly"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=True)
        try:
            with pytest.raises(UserError, match="Read-only file system"):
                launch.begin(order(tmp_path), place, run)
        finally:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_nothing(tmp_path, root):
    """scenario 58: where a small file system cannot be mounted, a file larger than this process may write."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_launch as t; from pathlib import Path; from launcher import launch\n"
        "from launcher.run import run\n"
        "from launcher.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "one = t.order(Path(sys.argv[2]), script='#' * 100_000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: launch.begin(one, Path(sys.argv[2]) / 'runs', run)\n"
        "except UserError as error: print(error)\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert f"cannot write {root}/here-" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert list(root.iterdir()) == []


def test_a_journal_that_cannot_be_written_after_the_submission_is_not_a_refusal(tmp_path, root, monkeypatch):
    """scenario 58: the process is there; the next command finds it."""
    append = journal.append

    def full(folder: Path, event: str, **fields: object) -> dict:
        if event == "submitted":
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(folder, event, **fields)

    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(Unreachable, match="a job may exist"):
        launch.begin(order(tmp_path), root, run)
    monkeypatch.setattr(journal, "append", append)
    (folder,) = runs.known(root)
    found = launch.begin(order(tmp_path), root, run)
    assert (found.how, found.record.folder) == ("already", folder)
    assert processes(folder) == 1


def test_somebody_else_s_submission_is_left_alone_while_it_goes_on(tmp_path, root):
    """scenario 56: a command about a run that is being submitted says so."""
    found = launch.begin(order(tmp_path), root, run).record
    journal.append(found.folder, "submitting", token=found.id)
    with journal.Lock(root / ".here.lock"), pytest.raises(Unreachable, match="is being submitted right now"):
        launch.reconcile(runs.read(found.folder), run)
    assert launch.reconcile(runs.read(found.folder), run).state is Phase.QUEUED


def test_a_signal_before_the_submission_leaves_nothing(tmp_path, root):
    """scenario 54"""

    one = order(tmp_path)
    write = launch._write

    def interrupted(*arguments: object) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)  # type: ignore[arg-type]

    launch._write = interrupted  # type: ignore[assignment]
    try:
        with pytest.raises(launch.Interrupted) as caught:
            launch.begin(one, root, run)
    finally:
        launch._write = write
    assert (caught.value.number, caught.value.says) == (signal.SIGTERM, "nothing was submitted")
    assert list(root.iterdir()) == []


# --- Slurm's answers ------------------------------------------------------------------------------


def answering(**replies: Result):
    def answer(argv: list[str], **_: object) -> Result:
        return replies.get(argv[0], Result(None, "", f"{argv[0]} did not answer within 30 s"))

    return answer


def queued(*rows: tuple[str, ...]) -> Result:
    """squeue's columns: id, state, submitted, exit code, name, comment."""
    widths = [width for _, width in squeue.COLUMNS]
    lines = ["".join(cell.ljust(width) for cell, width in zip((*row, "", ""), widths, strict=True)) for row in rows]
    return Result(0, "\n".join(lines) + "\n", "")


RUN = "demo-20261121-031502-4f2a90c1"
NOBODY = queued()
NO_BOOKS = Result(1, "", "Slurm accounting storage is disabled")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / RUN
    (path / "logs").mkdir(parents=True)
    journal.append(path, "rendered", backend="slurm", name="demo", steps=9)
    journal.append(path, "submitting", token=RUN)
    return path


def row(job: str, state: str, *, name: str = RUN, comment: str = f"dslaunch:{RUN}") -> tuple[str, ...]:
    return job, state, "2026-11-21T03:15:04", "0", name, comment


@pytest.mark.parametrize(
    ("replies", "found"),
    [
        ({"squeue": queued(row("7", "PENDING"))}, [("7", False)]),
        ({"squeue": queued(row("7", "RUNNING"), row("8", "PENDING"))}, [("7", True), ("8", False)]),
        ({"squeue": queued(row("7", "COMPLETED"))}, [("7", True)]),
        # a younger one that was cancelled before it ran is no second job; alone it is the one
        ({"squeue": queued(row("7", "PENDING"), row("8", "CANCELLED"))}, [("7", False)]),
        ({"squeue": queued(row("8", "CANCELLED"))}, [("8", True)]),
        # somebody else's, with a number or a comment that looks like ours
        ({"squeue": queued(row("7", "RUNNING", name="x", comment="dslaunch:x")), "sacct": NO_BOOKS}, []),
        ({"squeue": NOBODY, "sacct": NO_BOOKS}, []),
        ({"squeue": NOBODY, "sacct": Result(0, f"7|FAILED|2026-11-21T03:15:04|1:0|{RUN}|\n", "")}, [("7", True)]),
        ({"squeue": NOBODY, "sacct": Result(0, f"7|PENDING|2026-11-21T03:15:04|0:0|{RUN}|\n", "")}, [("7", False)]),
        ({"squeue": NOBODY}, []),
    ],
)
def test_a_look_up_goes_by_the_token_alone(folder, replies, found):
    """scenarios 42 to 44: numbers are used again, squeue forgets, and there may be no accounting."""
    assert slurm.look_up(folder, answering(**replies)) == found


def test_a_job_that_slurm_has_forgotten_has_left_its_output(folder):
    """scenario 43: MinJobAge after its end, without accounting."""
    silent = answering(squeue=NOBODY, sacct=NO_BOOKS)
    (folder / "logs" / "slurm-12.out").write_text("")
    assert slurm.look_up(folder, silent) == [("12", True)]
    journal.append(folder, "started", job="11")
    assert slurm.look_up(folder, silent) == [("11", True), ("12", True)]


def test_squeue_is_asked_for_our_own_jobs(folder):
    """A site with PrivateData refuses any other question, or answers it with nothing."""
    asked: list[list[str]] = []

    def listen(argv: list[str], **_: object) -> Result:
        asked.append(argv)
        return NOBODY

    slurm.look_up(folder, listen)
    assert [argv[0] for argv in asked] == ["squeue", "sacct"]
    assert all(f"--user={os.getuid()}" in argv and f"--name={RUN}" in argv for argv in asked)


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        (
            'Munge encode failed: Failed to access "/run/munge": No such file or directory (Did you start munged?)\n'
            "sbatch: error: Batch job submission failed: Protocol authentication error",
            Unsent,
            "systemctl status munge",
        ),
        ("Batch job submission failed: Invalid authentication credential", Unreachable, "munge -n | unmunge"),
        ("Batch job submission failed: Protocol authentication error", Unreachable, "date on both"),
        (
            "Batch job submission failed: Unable to contact slurm controller (connect failure)",
            Unsent,
            "scontrol ping",
        ),
        ("Batch job submission failed: Unable to contact slurm controller (receive failure)", Unreachable, "ping"),
        ("Batch job submission failed: Socket timed out on send/recv operation", Unreachable, "sinfo"),
        ("Batch job submission failed: Unspecified error", Unreachable, "sinfo"),
    ],
)
def test_what_is_wrong_between_here_and_the_controller_is_named(said, kind, hint):
    """scenarios 37 and 41: exit 8, as the job may live; only what never left this machine is known not to."""
    with pytest.raises(Unreachable) as caught:
        slurm.parse_submitted(Result(1, "", f"sbatch: error: {said}"))
    assert type(caught.value) is kind
    assert hint in caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("said", "at"),
    [
        ("Batch job submission failed: Invalid qos specification", ("slurm", "qos")),
        ("invalid partition specified: x\nBatch job submission failed: Invalid partition name specified",
         ("slurm", "partition")),
        ("Batch job submission failed: Invalid account or account/partition combination specified",
         ("slurm", "account")),
        ("Memory specification can not be satisfied", ("resources", "memory")),
        ("site policy: give --time", ("slurm",)),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_slurm_s_words_at_the_field(said, at):
    """scenario 39"""
    with pytest.raises(UserError) as caught:
        slurm.parse_submitted(Result(1, "", f"sbatch: error: {said}"))
    assert type(caught.value) is UserError
    (problem,) = caught.value.problems
    assert problem.at == at
    assert said.split("\n")[0] in problem.message


@pytest.mark.parametrize(
    ("out", "err", "job"),
    [
        ("12;cluster2\n", "", "12"),
        ("site says hello\n12\n", "sbatch: lua: your project has 3 hours left\n", "12"),
        ("Submitted batch job 12\n", "", None),
        ("Sollicitatie 12 ingediend\n", "", None),
        ("12a\n", "", None),
    ],
)
def test_an_id_is_a_number_on_the_last_line(out, err, job):
    """scenario 40: warnings, other languages, federations. What is no id is looked up, not guessed."""
    if job:
        assert slurm.parse_submitted(Result(0, out, err)) == job
    else:
        with pytest.raises(Unreachable, match="no job id"):
            slurm.parse_submitted(Result(0, out, err))


def test_commands_are_asked_in_the_c_locale(monkeypatch):
    """scenario 40"""
    monkeypatch.setenv("LC_ALL", "nl_NL.UTF-8")
    monkeypatch.setenv("LANG", "nl_NL.UTF-8")
    assert run(["sh", "-c", "echo $LC_ALL"]).out == "C\n"


@pytest.mark.slow
def test_a_bounded_command_ends_after_its_time_though_nobody_waits(tmp_path):
    """scenario 55: the sbatch of a dslaunch that was killed does not submit minutes later."""
    code = (
        "import sys; from launcher.run import run\n"
        "print(run(['sh', '-c', 'echo $$ >pid; exec sleep 60'], timeout=2, bounded=True), flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    child.kill()
    child.wait()
    assert local._started(pid)
    deadline = time.monotonic() + 20
    while local._started(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not local._started(pid)
    assert run(["sleep", "5"], timeout=0.2, bounded=True) == Result(None, "", "sleep did not answer within 0.2 s")


@pytest.mark.parametrize(
    ("asked", "after", "given"),
    [
        ({}, "", "singleton"),
        ({"dependency": "afterok:7"}, "", "singleton,afterok:7"),
        ({}, "12", "singleton,afterany:12"),
    ],
)
def test_a_run_is_a_singleton_beside_what_the_job_file_asks_for(tmp_path, asked, after, given):
    """scenario 38: the server-side guard."""
    text = json.dumps({"name": "x", "model": "gpt-demo", "slurm": asked})
    seen: list[list[str]] = []

    def listen(argv: list[str], **_: object) -> Result:
        seen.append(argv)
        return Result(0, "12\n", "")

    document = spec.load(text, name="job.yaml", environ={})
    assert slurm.submit(tmp_path / RUN, document.spec, listen, after=after) == "12"
    ((program, *words),) = seen
    assert program == "sbatch"
    assert {f"--dependency={given}", f"--job-name={RUN}", f"--comment=dslaunch:{RUN}", "--parsable"} <= set(words)


def test_an_array_is_refused():
    """scenario 46: a run is one job, so its state is that job's and cancel ends all of it."""
    text = json.dumps({"name": "x", "model": "gpt-demo", "slurm": {"sbatch": {"array": "1-4"}}})
    from launcher import plan

    with pytest.raises(UserError, match="sbatch option array is dslaunch's own"):
        slurm.render(plan.make(spec.load(text, name="job.yaml", environ={}).spec))
