"""What goes wrong on a real Slurm, and what the job does about it itself. `make chaos` has more, with times."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from test_slurm import TINY, Site, site  # noqa: F401 - a fixture

from launcher.node import journal

# Waits at the first attempt and is done at the second.
SECOND = (
    "import os, time; a = int(os.environ['DSLAUNCH_ATTEMPT']); "
    "open(f'on-{a}-' + os.environ['RANK'], 'w').write(os.uname().nodename); time.sleep(0 if a else 300)"
)


def job(name: str, *, nodes: int = 2, spares: int = 0, train: dict, **more: object) -> dict:
    return {
        "name": name,
        "model": TINY,
        "train": {"global_batch": 4 * nodes, "micro_batch": 4, "seq_len": 64, "zero": 2, "steps": 40, **train},
        "resources": {"nodes": nodes, "spares": spares},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
        **more,
    }


def until(what: str, found: Callable[[], object], *, seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return value


def told(folder: Path, event: str) -> list[dict]:
    return [entry for entry in journal.read(folder)[0] if entry["event"] == event]


def metrics(folder: Path) -> list[dict]:
    path = folder / "logs" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_rank_costs_a_few_steps_and_the_allocation_stays(site, slurm):  # noqa: F811
    """Scenarios 62 and 72: the second start takes a port of its own."""
    run = site.submit(job("kill", train={"steps": 300, "optimizer": {"lr": 2e-3}, "checkpoint": {"every": 10}}))
    folder = site.folder / "dslaunch-runs" / run
    until("25 steps", lambda: len(metrics(folder)) > 25)
    rank = json.loads((folder / "logs" / "rank-00001.json").read_text())
    assert slurm.exec(rank["host"], ["kill", "-KILL", str(rank["pid"])]).returncode == 0
    killed, seen = time.time(), len(metrics(folder))
    rows = until("steps again", lambda: [row for row in metrics(folder)[seen + 3 :] if row["time"] > killed + 1])
    assert rows[0]["time"] - killed < 60
    ended = told(folder, "ended")[0]
    assert (ended["code"], ended["rank"], ended["node"], ended["checkpoint"] > 0) == (137, 1, rank["host"], True)
    (resumed,) = [row["step"] for row, last in zip(metrics(folder)[1:], metrics(folder), strict=False)
                  if row["step"] != last["step"] + 1]  # fmt: skip
    assert resumed == ended["checkpoint"] + 1
    assert len({entry["job"] for entry in told(folder, "started")}) == 1
    assert site.wait(run)["state"] == "completed", site.log(run)[-3000:]
    assert [entry["action"] for entry in told(folder, "decided")] == ["restart"]
    assert metrics(folder)[-1]["step"] == 300


def test_a_node_that_loses_power_is_replaced_by_the_spare(site, slurm):  # noqa: F811
    """Scenario 60."""
    asked = job("power", spares=1, train={"command": ["python3", "-c", SECOND], "launcher": "srun"})
    run = site.submit({**asked, "preflight": {"stages": ["inventory"]}})
    folder = site.folder / "dslaunch-runs" / run
    until("the ranks run", lambda: (site.folder / "on-0-1").exists())
    (first,) = told(folder, "attempt")
    lost = first["hosts"][1]
    slurm.crash(lost)
    try:
        assert site.wait(run, seconds=90)["state"] == "completed", site.log(run)[-3000:]
    finally:
        slurm.boot(lost)
    (ended, _), (decided,) = told(folder, "ended"), told(folder, "decided")
    assert (ended["cause"], ended["node"]) == ("slurm_node_fail", lost)
    assert (decided["action"], decided["exclude"]) == ("restart", [lost])
    (spare,) = {"node1", "node2", "node3", "node4"} & set(told(folder, "attempt")[1]["hosts"]) - set(first["hosts"])
    assert sorted(told(folder, "attempt")[1]["hosts"]) == sorted([first["hosts"][0], spare])


def test_a_typo_ends_the_job_at_once_with_its_diagnosis(site):  # noqa: F811
    """Scenario 74: nothing that would fail again is started again."""
    run = site.submit(job("typo", train={"command": ["python3", "-c", "import nunpy"], "launcher": "srun"}))
    found = site.wait(run, seconds=60)
    folder = site.folder / "dslaunch-runs" / run
    assert (found["state"], found["code"]) == ("failed", 1)
    assert len(told(folder, "attempt")) == 1
    assert told(folder, "decided")[0]["action"] == "stop"
    assert told(folder, "finished")[0]["code"] == 1
    assert "is the last one" in site.log(run)


def test_when_the_host_of_the_script_goes_away_slurm_starts_the_job_again_and_it_counts_on(site, slurm):  # noqa: F811
    """Scenario 61."""
    run = site.submit(job("head", train={"command": ["python3", "-c", SECOND], "launcher": "srun"}))
    folder = site.folder / "dslaunch-runs" / run
    until("the ranks run", lambda: (site.folder / "on-0-0").exists())
    (first,) = told(folder, "attempt")
    slurm.crash(first["hosts"][0])
    try:
        until("the job starts again", lambda: len(told(folder, "started")) == 2)
        assert site.wait(run, seconds=90)["state"] == "completed", site.log(run)[-3000:]
    finally:
        slurm.boot(first["hosts"][0])
    assert [(entry["restart"], entry["job"]) for entry in told(folder, "started")] == [
        (count, told(folder, "started")[0]["job"]) for count in (0, 1)
    ]
    assert [entry["attempt"] for entry in told(folder, "attempt")] == [0, 1]
    assert told(folder, "ended")[0]["cause"] == "slurm_node_fail"


def test_a_second_copy_of_a_job_ends_and_leaves_the_first_alone(site, slurm):  # noqa: F811
    program = "import os, time; open('up', 'w'); [time.sleep(0.2) for _ in range(300) if not os.path.exists('go')]"
    run = site.submit(job("twice", nodes=1, train={"command": ["python3", "-c", program], "launcher": "srun"}))
    folder = site.folder / "dslaunch-runs" / run
    until("it runs", lambda: (site.folder / "up").exists())
    before = (folder / journal.NAME).read_bytes()
    copy = slurm.sbatch([f"--chdir={folder}", str(folder / "job.sbatch")])
    assert slurm.wait(copy)["ExitCode"] == "0:0"
    assert "is a second copy, and ends without touching it" in (folder / "logs" / f"slurm-{copy}.out").read_text()
    assert (folder / journal.NAME).read_bytes() == before
    assert not (folder / "exit-code").exists()
    (site.folder / "go").touch()
    assert site.wait(run, seconds=60)["state"] == "completed"
