"""Exactly one job or none, on a real Slurm: the submitting process is killed, the controller hangs, dies, is slow."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from test_launch import begin_in_child

from launcher import cli, launch, runs
from launcher.backends import slurm as backend
from launcher.errors import Unreachable
from launcher.launch import Order
from launcher.run import run
from launcher.runs import Phase
from launcher.runs import submit as submission

pytestmark = pytest.mark.slow
JOB = {
    "name": "once",
    "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
    "train": {"global_batch": 4, "micro_batch": 4, "seq_len": 64, "zero": 0, "steps": 10, "launcher": "srun",
              "command": ["true"]},
    "resources": {"nodes": 1},
    "slurm": {"time": "10", "begin": "now+3600"},
}  # fmt: skip


@pytest.fixture
def here(slurm, tmp_path, monkeypatch):
    """A directory to submit from; jobs that wait in the queue are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DSLAUNCH_POLL", "1")  # this controller has nobody else to answer
    monkeypatch.setattr(submission, "SETTLE", 10.0)  # twice this cluster's MessageTimeout
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))
    yield tmp_path
    names = ",".join(path.name for path in (tmp_path / "dslaunch-runs").glob("*-*"))
    if names:
        subprocess.run(["scancel", f"--name={names}"], check=True)


def order(name: str = "once") -> Order:
    document, made = cli.load("job.yaml", None, (f"name={name}",))
    facts = {"extra": {"per_node": 1, "checkpoints": f"/nowhere/{name}"}}
    return Order("slurm", document.spec, backend.render(made), Path.cwd(), {}, facts)


def jobs(folder: Path) -> list[str]:
    """Ids of all the jobs that Slurm has of this run."""
    asked = ["squeue", "--noheader", "--states=all", "--format=%A", f"--name={folder.name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def dslaunch(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "dslaunch"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]


def test_kill_9_at_any_moment_leaves_one_job_or_none_and_the_next_command_says_which(here, capsys):
    """scenario 55: 36 times, with as many next commands at once; then the same command leaves exactly one."""
    root = here / "dslaunch-runs"
    orders = [order(f"once{number}") for number in range(36)]
    launch.begin(order("warm"), root, run)  # everything is loaded
    begun = time.monotonic()
    os.waitpid(begin_in_child(orders[0], root), 0)
    took = time.monotonic() - begun
    dice = random.Random(7)
    seen: Counter = Counter()
    for number, one in enumerate(orders[1:]):
        pid = begin_in_child(one, root)
        while number % 3 and not runs.known(root, name=one.spec.name):  # two of three from sbatch's start on
            time.sleep(0)
        time.sleep(dice.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said: dict[str, str] = {}

    def next_command(one: Order) -> None:
        folders = runs.known(root, name=one.spec.name)
        if not folders:
            said[one.spec.name] = "no run"
        for folder in folders:
            before = runs.read(folder).state
            after = launch.reconcile(runs.read(folder), run)
            said[one.spec.name] = f"{before.value}: " + ("a job" if after.job else "no job")
            assert jobs(folder) == ([after.job] if after.job else [])
        found = launch.begin(one, root, run)
        assert jobs(found.record.folder) == [found.record.job]
        assert len(runs.known(root, name=one.spec.name)) == 1

    failed: list[BaseException] = []

    def guarded(one: Order) -> None:
        try:
            next_command(one)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    seen.update(said.values())
    assert len(said) == 36
    assert not list(root.glob(".*.half"))
    with capsys.disabled():
        print(f"\nkilled 35 times within {took * 1000:.0f} ms of the start; before -> the next command: {dict(seen)}")


def test_two_launches_at_once_are_one_job(here):
    """scenario 56"""
    command = [str(Path(sys.executable).parent / "dslaunch"), "slurm", "job.yaml"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    (folder,) = runs.known(here / "dslaunch-runs")
    assert [out.strip() for out, _ in told] == [folder.name] * 2
    (job,) = jobs(folder)
    assert sorted(err.split(" ")[0] for _, err in told) == ["already", "submitted"]
    assert any(f"already submitted as {folder.name} (job {job})" in err for _, err in told)
    again = dslaunch("slurm", "job.yaml", "--again")
    assert again.returncode == 0, again.stderr
    second = here / "dslaunch-runs" / again.stdout.strip()
    assert second != folder
    shown = subprocess.run(["scontrol", "show", "job", *jobs(second)], capture_output=True, text=True).stdout
    assert f"afterany:{job}" in shown  # both train into one directory: one after the other
    other = dslaunch("slurm", "job.yaml", "--set", "train.steps=11")
    assert other.returncode == 2
    assert "trains into" in other.stderr
    assert "dslaunch cancel" in other.stderr
    assert len(runs.known(here / "dslaunch-runs")) == 2


def test_another_login_node_takes_a_run_up(here):
    """scenarios 54 and 57: whoever submitted is gone right after sbatch took the job, with all that it knew."""
    root = here / "dslaunch-runs"
    found = launch.begin(order(), root, run).record
    path = found.folder / runs.journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote down the answer
    assert runs.read(found.folder).state is Phase.SUBMITTING
    command = [str(Path(sys.executable).parent / "dslaunch"), "attach", found.id]
    attached = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
    deadline = time.monotonic() + 60
    while runs.read(found.folder).state is not Phase.QUEUED:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert jobs(found.folder) == [found.job]
    listed = json.loads(dslaunch("runs", "--json").stdout)
    assert [(row["run"], row["state"], row["job"]) for row in listed] == [(found.id, "queued", found.job)]
    assert found.id in dslaunch("status").stdout
    subprocess.run(["scancel", found.job], check=True)
    out, err = attached.communicate(timeout=120)
    assert attached.returncode == 130, err  # it followed the run to its end
    assert f"adopted job {found.job}" in err
    assert f"slurm job {found.job}" in out
    assert "cancelled" in out


def pid_of(slurm) -> int:
    pid = slurm._alive("slurmctld")
    assert pid
    return pid


def test_a_controller_that_hangs_and_takes_the_job_afterwards_is_one_job(here, slurm):
    """scenario 38: sbatch gives up, then slurmctld works off what it was sent."""
    pid = pid_of(slurm)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(7, os.kill, (pid, signal.SIGCONT))  # sbatch has gone by then: MessageTimeout is 5
    timer.start()
    try:
        found = launch.begin(order(), here / "dslaunch-runs", run)
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)
    events = [entry["event"] for entry in found.record.entries]
    assert events == ["rendered", "submitting", "unanswered", "adopted"], found.record.entries
    assert (found.how, [found.record.job]) == ("adopted", jobs(found.record.folder))


def test_a_controller_that_is_down_is_exit_8_and_the_same_command_submits_once_it_is_back(here, slurm, monkeypatch):
    """scenario 37"""
    monkeypatch.setattr(submission, "TRIES", 1)
    pid = pid_of(slurm)
    os.kill(pid, signal.SIGKILL)
    while slurm._alive("slurmctld"):
        time.sleep(0.05)
    try:
        with pytest.raises(Unreachable, match=r"nothing was submitted.*Unable to contact slurm controller") as caught:
            launch.begin(order(), here / "dslaunch-runs", run)
        assert "scontrol ping" in caught.value.problems[0].hint
    finally:
        slurm._spawn("slurmctld", ["slurmctld", "-D"])
        deadline = time.monotonic() + 60
        while subprocess.run(["scontrol", "ping"], capture_output=True).returncode and time.monotonic() < deadline:
            time.sleep(0.2)
    (folder,) = runs.known(here / "dslaunch-runs")
    assert runs.read(folder).state is Phase.RENDERED
    found = launch.begin(order(), here / "dslaunch-runs", run)
    assert (found.how, found.record.folder) == ("submitted", folder)
    assert jobs(folder) == [found.record.job]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_sbatch_is_asked_is_answered_with_whether_a_job_exists(here, slurm, number):
    """scenario 54: sbatch is at work, as the controller hangs, when it comes."""
    pid = pid_of(slurm)
    command = [str(Path(sys.executable).parent / "dslaunch"), "slurm", "job.yaml"]
    os.kill(pid, signal.SIGSTOP)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here)
        root, deadline = here / "dslaunch-runs", time.monotonic() + 60
        while not any(backend.sending(runs.read(folder)) for folder in runs.known(root)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None  # it waits for the answer
    finally:
        os.kill(pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    (folder,) = runs.known(root)
    (job,) = jobs(folder)
    assert process.returncode == 128 + number, err
    assert f"interrupted by {signal.Signals(number).name}: job {job} of {folder.name} exists" in err
    assert f"dslaunch cancel {folder.name}" in err


@pytest.mark.parametrize("asks", [("--test-only",), ()])
def test_a_refusal_says_what_there_is(here, asks):
    """Partitions main and short, the latter for two minutes."""
    for options, says in [
        (["slurm.partition=shrot"], "--set slurm.partition: Slurm refuses the job: *did you mean `short`?"),
        (["slurm.partition=gpu"], "--set slurm.partition: Slurm refuses the job: *known here: main, short"),
        (["slurm.partition=short", "slurm.time=1:00:00"], "--set slurm.time: Slurm*the longest is 2:00 in short"),
    ]:
        done = dslaunch("slurm", "job.yaml", *asks, *(f"--set={option}" for option in options))
        begin, end = says.split("*")
        assert done.returncode == 2, done.stderr
        assert f"error: {begin}" in done.stderr
        assert f"  try: {end}\n" in done.stderr
    assert not list(here.glob("dslaunch-runs/*-*"))


def test_a_full_disk_is_refused_before_anything_is_submitted(here):
    """scenario 58: a run directory on 64 KiB; nothing is left there, and no job."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("only root mounts a small tmpfs")
    small = here / "dslaunch-runs"
    small.mkdir()
    before = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        done = dslaunch("slurm", "job.yaml")
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert "--runs names another place" in done.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout == before


def test_the_same_job_after_a_cancel_waits_until_the_old_one_has_saved(here):
    """Two that write the same checkpoints at once would ruin them; what was cancelled lives until it is gone."""
    saves = "trap 'sleep 12; exit 75' TERM; touch up; sleep 300 & wait"
    job = {**JOB, "train": {**JOB["train"], "command": ["bash", "-c", saves]}, "slurm": {"time": "10"}}
    (here / "job.yaml").write_text(json.dumps(job))
    first = dslaunch("slurm", "job.yaml").stdout.strip()
    deadline = time.monotonic() + 60
    while not (here / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert dslaunch("cancel", first).returncode == 0
    old = runs.read(here / "dslaunch-runs" / first)
    assert not old.state.over, old.entries[-1]
    second = dslaunch("slurm", "job.yaml").stdout.strip()
    assert second != first
    new = runs.read(here / "dslaunch-runs" / second)
    shown = subprocess.run(["scontrol", "show", "job", new.job], capture_output=True, text=True, check=True).stdout
    assert f"afterany:{old.job}" in shown, shown
    ended = dslaunch("wait", first)
    assert ended.returncode == 130, ended.stdout
    assert dslaunch("cancel", second).returncode == 0
