"""`dslaunch status`, `diagnose` and `runs` where a run directory is not as a healthy one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli_runs, runs
from launcher.errors import UserError
from launcher.node import journal

RUN = "demo-20261121-031502-4f2a90c1"


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "dslaunch-runs" / RUN
    (found / "logs").mkdir(parents=True, mode=0o700)
    journal.append(found, "rendered", backend="local", name="demo", steps=9, extra={"per_node": 2})
    journal.append(found, "submitting", token=RUN)
    journal.append(found, "submitted", job="4194304:1")  # beyond every pid
    return found


def dslaunch(*arguments, cwd):
    command = [str(Path(sys.executable).parent / "dslaunch"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def word(node, rank, ended, cause):
    """How supervise.py says that a node ended."""
    meaning = {"cuda_oom": "a GPU's memory ran out", "sigterm": "it was asked to end"}[cause]
    line = {"file": f"rank-0000{rank}.log", "number": 812, "text": "x"}
    root = {"cause": {"id": cause, "meaning": meaning}, "rank": rank, "node": f"node{node}", "lines": [line]}
    failure = {"rank": rank, "host": f"node{node}", "code": 1, "ended": ended, "attempt": 0}
    return {"node_rank": node, "attempt": 0, "first_failure": failure, "diagnosis": {"root": root}}


def test_status_names_the_cause_of_the_node_that_failed_first_and_what_to_ask_next(folder, capsys):
    (folder / "exit-code").write_text("1\n")
    (folder / "logs" / "node-0000.json").write_text(json.dumps(word(0, 0, 20.0, "sigterm")))
    (folder / "logs" / "node-0001.json").write_text(json.dumps(word(1, 3, 10.0, "cuda_oom")))
    (folder / "logs" / "rank-00003.log").write_bytes(b"out of \x1b[31mmemory\n")
    assert cli_runs.tell_status(runs.read(folder), as_json=False) == 1
    said = capsys.readouterr().out
    assert "first failure: rank 3 on node1 ended with exit code 1: out of memory\n" in said
    assert "cause: cuda_oom: a GPU's memory ran out (rank 3 on node1, rank-00003.log:812)\n" in said
    assert f"dslaunch diagnose {RUN}\n" in said
    assert cli_runs.tell_status(runs.read(folder), as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["cause"].startswith("cuda_oom: ")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"first_failure": 3}', '{"first_failure": {"rank": "x"}}', "\udcff"]
)
def test_what_a_node_wrote_half_is_left_out(folder, capsys, text):
    (folder / "exit-code").write_text("1\n")
    (folder / "logs" / "node-0000.json").write_bytes(text.encode(errors="surrogateescape"))
    assert cli_runs.tell_status(runs.read(folder), as_json=False) == 1
    assert "first failure" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"\0" * 512, b"garbage\n", b'{"seq": 1, "event"'])
def test_a_journal_that_names_no_scheduler_is_said_and_no_bug(folder, data):
    (folder / journal.NAME).write_bytes(data)
    with pytest.raises(UserError, match="empty or damaged"):
        runs.find(str(folder), folder.parent)
    assert [found.backend for found in map(runs.read, runs.known(folder.parent))] == [""]  # the list goes on


def test_a_run_between_two_attempts_whose_processes_are_gone_has_failed(folder, capsys):
    journal.append(folder, "attempt", attempt=0, hosts=["here"])
    journal.append(folder, "ended", attempt=0, code=1)
    journal.append(folder, "decided", attempt=0, action="restart", why="a node failed")
    assert cli_runs.tell_status(runs.read(folder), as_json=False) == 1
    assert "recovering" not in capsys.readouterr().out


def ended(folder, *, code, told, warned=False):
    journal.append(folder, "started", job="4194304:1")
    journal.append(folder, "attempt", attempt=0, hosts=["here"])
    journal.append(folder, "ended", attempt=0, code=code, told=told, warned=warned)
    if code:
        journal.append(folder, "decided", attempt=0, action="stop", why="told to stop" if told else "it crashed")
    journal.append(folder, "finished", code=code)
    (folder / "exit-code").write_text(f"{code}\n")


def test_what_the_next_attempt_prints_is_not_said_of_the_rank_that_failed_before_it(folder):
    (folder / "logs" / "node-0001.json").write_text(json.dumps(word(1, 3, 10.0, "cuda_oom")))
    (folder / "logs" / "rank-00003.log").write_text("out of memory\n")
    journal.append(folder, "attempt", attempt=0, hosts=["node0", "node1"])
    assert runs.failures(runs.read(folder)) == ["rank 3 on node1 ended with exit code 1: out of memory"]
    journal.append(folder, "attempt", attempt=1, hosts=["node0", "node1"])
    with (folder / "logs" / "rank-00003.log").open("a") as log:
        log.write("dslaunch: attempt 1 of rank 3 on node1\nstep 280/3000  loss 2.2\n")
    assert runs.failures(runs.read(folder)) == ["rank 3 on node1 ended with exit code 1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "told", "code", "state"),
    [
        (True, True, 75, "cancelled"),
        (True, True, 143, "cancelled"),
        (True, True, 0, "done"),  # it was through before it heard
        (True, False, 7, "failed"),  # it crashed, and nobody told it anything
        (False, True, 75, "failed"),  # the time limit
    ],
)
def test_a_run_that_was_cancelled_is_so_in_the_list_before_anybody_asks_the_scheduler(
    folder, asked, told, code, state
):
    if asked:
        journal.append(folder, "cancelling")
    ended(folder, code=code, told=told)
    (row,) = json.loads(dslaunch("runs", "--json", cwd=folder.parent.parent).stdout)
    assert row["state"] == state


def test_what_the_scheduler_says_of_an_end_is_taken_over_by_the_list(folder):
    """scancel, without dslaunch: the journal alone says `failed`."""
    ended(folder, code=143, told=True)
    assert runs.read(folder).state is runs.Phase.FAILED
    journal.append(folder, "state", state="cancelled", detail="cancelled")
    assert runs.read(folder).state is runs.Phase.CANCELLED
    journal.append(folder, "state", state="running", detail="running")
    assert runs.read(folder).state is runs.Phase.CANCELLED


def diagnosed(folder):
    return dslaunch("diagnose", RUN, cwd=folder.parent.parent)


@pytest.fixture
def going(folder):
    """As `folder`, and its job is a process that lives."""
    child = subprocess.Popen(["sleep", "100"])
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    journal.append(folder, "submitted", job=f"{child.pid}:{fields[19]}")
    yield
    child.kill()
    child.wait()


@pytest.mark.usefixtures("going")
def test_a_diagnosis_of_a_run_that_goes_on_says_so(folder):
    done = diagnosed(folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert "the run is not over: running" in done.stdout


def test_a_run_that_is_done_has_nothing_to_explain(folder):
    ended(folder, code=0, told=False)
    done = diagnosed(folder)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "nothing to explain: the run is done")


def test_a_run_whose_time_was_up_says_so(folder):
    ended(folder, code=75, told=True, warned=True)
    done = diagnosed(folder)
    assert done.stdout.startswith("slurm_time_limit: ")
    assert "attempt 0: its time was up" in done.stdout


@pytest.mark.usefixtures("going")
def test_while_an_attempt_runs_the_one_before_is_explained(folder):
    journal.append(folder, "attempt", attempt=0, hosts=["node1"])
    told = {"code": 1, "cause": "xid_48_dbe", "node": "node1", "why": "a double-bit error on node1"}
    journal.append(folder, "ended", attempt=0, **told)
    journal.append(folder, "attempt", attempt=1, hosts=["node2"])
    done = diagnosed(folder)
    assert done.stdout.startswith("xid_48_dbe: ")
    assert "attempt 0: a double-bit error on node1" in done.stdout
    assert "the run is not over" in done.stdout


@pytest.mark.slow
def test_a_node_that_did_not_come_to_its_ranks_is_the_cause(folder):
    ended(folder, code=143, told=False)
    said = "node.sh on node2 ended with 1: module load cuda/99.9 failed\n"
    (folder / "logs" / "failed-before-ranks").write_text(said)
    done = diagnosed(folder)
    assert done.stdout.startswith("setup_failed: ")
    assert said in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_run_of_somebody_else_is_refused_and_no_bug(folder, tmp_path):
    folder.chmod(0o700)
    for above in (folder.parent, *tmp_path.parents, tmp_path):
        if above != Path("/") and above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from launcher import runs\n"
        "from launcher.errors import UserError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"assert not runs.known(Path({str(folder.parent)!r}))\n"
        f"try: runs.find({str(folder)!r}, Path('/nowhere'))\n"
        "except UserError as error: print(error)\n"
    )
    root = str(Path(runs.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.startswith("cannot look into"), done.stderr
