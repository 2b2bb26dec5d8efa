"""`dslaunch resume`: a run that is over goes on as another one, with real DeepSpeed on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.node import journal

pytestmark = pytest.mark.slow
DSLAUNCH = str(Path(sys.executable).parent / "dslaunch")
JOB = {
    "name": "again",
    "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
    "train": {
        "global_batch": 8,
        "micro_batch": 4,
        "seq_len": 64,
        "zero": 2,
        "steps": 6,
        "optimizer": {"lr": 2e-3},
        "checkpoint": {"every": 5},
    },
    "resources": {"nodes": 2, "processes_per_node": 1},
}


def test_a_run_goes_on_at_the_next_step_on_fewer_nodes_too_and_afresh_only_where_that_is_said(tmp_path, monkeypatch):
    """One node of two goes on through a universal checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    Path("job.yaml").write_text(json.dumps(JOB))
    assert dslaunch("local", "job.yaml").returncode == 0
    (first,) = Path("dslaunch-runs").iterdir()

    endless = resumed(first.name, "--set", "train.steps=100000")
    deadline = time.monotonic() + 120
    while not steps(endless):
        assert time.monotonic() < deadline, (endless / "logs/job.out").read_text()
        time.sleep(0.2)
    assert steps(endless)[0] == 7
    (row,) = [entry for entry in journal.read(endless)[0] if entry.get("resumed_from")]
    assert row["resumed_from"] == first.name
    refused = dslaunch("resume", endless.name)
    assert refused.returncode == 2
    assert f"{endless.name} lives" in refused.stderr
    assert dslaunch("cancel", endless.name).returncode == 0
    assert (endless / "exit-code").read_text() == "75\n"
    saved = steps(endless)[-1]

    alone = resumed(endless.name, "--nodes", "1", "--set", f"train.steps={saved + 3}")
    assert dslaunch("wait", alone.name).returncode == 0, (alone / "logs/job.out").read_text()
    assert steps(alone) == [saved + 1, saved + 2, saved + 3]
    assert f"resumed at step {saved} from step{saved:08d}_universal" in (alone / "logs/job.out").read_text()

    fresh = resumed(alone.name, "--fresh", "--set", "train.steps=2")
    assert dslaunch("wait", fresh.name).returncode == 0, (fresh / "logs/job.out").read_text()
    assert steps(fresh) == [1, 2]
    (aside,) = Path("checkpoints").glob("again.before-*")
    assert (aside / f"step{saved + 3:08d}").is_dir()


def dslaunch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DSLAUNCH, *arguments], capture_output=True, text=True, timeout=240)


def resumed(run: str, *more: str) -> Path:
    """The new run's directory."""
    done = dslaunch("resume", run, *more)
    assert done.returncode == 0, done.stderr
    return Path("dslaunch-runs", done.stdout.strip())


def steps(run: Path) -> list[int]:
    rows = run / "logs/metrics.jsonl"
    return [json.loads(line)["step"] for line in rows.read_text().splitlines()] if rows.exists() else []
