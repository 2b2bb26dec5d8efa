"""The embedded default: the same bundle on this machine, driven through the command line as a user does."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DSLAUNCH = str(Path(sys.executable).parent / "dslaunch")
TINY = {"layers": 2, "hidden": 64, "heads": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def write(folder: Path, *, train: dict, nodes: int = 2, **more: object) -> None:
    job = {
        "name": "here",
        "model": TINY,
        "train": {"global_batch": 8, "seq_len": 64, "zero": 3, "steps": 10, **train},
        "resources": {"nodes": nodes, "processes_per_node": 2},
        **more,
    }
    (folder / "job.yaml").write_text(json.dumps(job))


def dslaunch(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DSLAUNCH, *arguments], capture_output=True, text=True, timeout=240, **options)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "dslaunch-runs").iterdir()
    return run


def test_interrupting_saves_a_checkpoint_and_the_next_run_goes_on_there(here):
    write(here, train={"steps": 5000, "optimizer": {"lr": 2e-3}})
    child = subprocess.Popen([DSLAUNCH, "local", "job.yaml"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not any(here.glob("dslaunch-runs/*/logs/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 130, err
    assert "those that listen save a checkpoint" in err
    run = only_run(here)
    assert (run / "exit-code").read_text() == "75\n"
    saved = max(path.parent.name for path in here.glob("checkpoints/here/*/complete.json"))
    step = int(saved.removeprefix("step"))
    assert step > 0
    assert [row["state"] for row in json.loads(dslaunch("runs", "--json").stdout)] == ["cancelled"]
    asked = dslaunch("status", run.name)
    assert asked.returncode == 1
    assert "cancelled" in asked.stdout
    again = dslaunch("local", "job.yaml", "--set", f"train.steps={step + 3}", "--runs", "second")
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step}" in dslaunch("logs", "here", "--runs", "second").stdout
    assert f"step {step + 3}/{step + 3}" in dslaunch("status", "here", "--runs", "second").stdout


def test_a_crash_on_one_node_ends_both_and_names_the_rank(here):
    program = "import os, sys, time\nif os.environ['RANK'] == '3': print('boom'); sys.exit(9)\ntime.sleep(200)"
    write(here, train={"command": ["python3", "-c", program]})
    begun = time.monotonic()
    done = dslaunch("local", "job.yaml")
    assert done.returncode == 9
    assert time.monotonic() - begun < 60
    assert "rank 3 on " in done.stderr
    assert "ended with exit code 9" in done.stderr
    assert dslaunch("logs", "here", "--rank", "3").stdout == "boom\n"
    missing = dslaunch("logs", "here", "--rank", "7")
    assert missing.returncode == 2
    assert "there are logs of ranks 0 to 3" in missing.stderr


def test_detached_runs_answer_status_logs_and_cancel(here):
    program = "import time; print('up', flush=True); time.sleep(300)"
    write(here, train={"command": ["python3", "-c", program]}, nodes=1)
    run = dslaunch("local", "job.yaml", "--detach").stdout.strip()
    follower = subprocess.Popen([DSLAUNCH, "logs", "-f", run], stdout=subprocess.PIPE, text=True)
    seen = [follower.stdout.readline() for _ in range(2)]
    assert sorted(seen) == ["[rank 0] up\n", "[rank 1] up\n"]
    found = json.loads(dslaunch("status", run, "--json").stdout)
    assert (found["state"], found["backend"]) == ("running", "local")
    assert dslaunch("cancel", run).returncode == 0
    assert json.loads(dslaunch("status", run, "--json").stdout)["state"] == "cancelled"
    follower.communicate(timeout=30)  # -f ends with the job
    assert follower.returncode == 0


def test_a_secret_reaches_the_ranks_and_no_file_stays_behind(here, monkeypatch):
    secret = "".join(random.choices(string.ascii_letters + "'\"$`\\, ", k=24)) + "\n x"
    monkeypatch.setenv("SUBMITTER_SECRET", secret)
    program = "import os, hashlib; print(hashlib.sha256(os.fsencode(os.environ['API_TOKEN'])).hexdigest())"
    write(
        here,
        train={"command": ["python3", "-c", program]},
        nodes=1,
        secrets={"API_TOKEN": {"from_env": "SUBMITTER_SECRET"}},
    )
    done = dslaunch("local", "job.yaml")
    assert done.returncode == 0, done.stderr
    import hashlib

    assert hashlib.sha256(secret.encode()).hexdigest() in dslaunch("logs", "here", "--rank", "1").stdout
    run = only_run(here)
    assert not (run / "secrets").exists()
    for file in run.rglob("*"):
        if file.is_file() and "submitted-from" not in file.parts:
            assert secret.encode() not in file.read_bytes(), file
    for name in ("node.sh", "local.sh", "ds_config.json", "journal.jsonl", "node/supervise.py"):
        assert (run / name).stat().st_mode & 0o777 == 0o600
    assert run.stat().st_mode & 0o777 == 0o700


def test_what_is_missing_is_said_before_anything_is_written(here):
    write(
        here, train={"script": "nowhere.py", "workdir": "."}, secrets={"HF_TOKEN": {"from_env": "NOT_SET_ANYWHERE"}}
    )
    done = dslaunch("local", "job.yaml")
    assert done.returncode == 2
    assert "the environment has no NOT_SET_ANYWHERE" in done.stderr
    write(here, train={"script": "nowhere.py"})
    done = dslaunch("local", "job.yaml")
    assert "job.yaml:1:" in done.stderr
    assert "there is no file" in done.stderr
    assert not (here / "dslaunch-runs").exists()
    assert [path.name for path in here.iterdir()] == ["job.yaml"]


def test_a_run_nobody_knows_is_an_error_and_a_killed_one_is_not_success(here):
    done = dslaunch("status", "nobody")
    assert done.returncode == 2
    assert "no run `nobody`" in done.stderr
    write(here, train={"command": ["sleep", "100"]}, nodes=1)
    run = dslaunch("local", "job.yaml", "--detach").stdout.strip()
    pid = int(json.loads(dslaunch("status", run, "--json").stdout)["job"].partition(":")[0])
    os.killpg(pid, signal.SIGKILL)
    time.sleep(0.5)
    found = json.loads(dslaunch("status", run, "--json").stdout)
    assert found["state"] == "failed"
    assert "left no exit code" in found["detail"]
