"""A rank that stands still in a real job: real Slurm of four nodes, real DeepSpeed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from test_slurm import job, site  # noqa: F401  # a fixture

from launcher.supervision import HUNG

FLOOR = 10


def until(true, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def step(logs: Path, node: int) -> int:
    try:
        return json.loads((logs / f"beat-{node:04d}.json").read_text())["step"] or 0
    except (OSError, ValueError):
        return 0


def test_a_stopped_rank_is_named_and_the_job_ends(site, slurm):  # noqa: F811
    """Scenario 63: rank 2 on node3 gets SIGSTOP; the others wait in a collective and know nothing."""
    train = {"zero": 1, "steps": 100000, "checkpoint": {"every": 100000}}
    run = site.submit(job("hang", train=train, recover={"hang": FLOOR, "attempts": 0}))
    logs = site.folder / "dslaunch-runs" / run / "logs"
    until(lambda: min(step(logs, node) for node in range(4)) >= 20, seconds=150)
    # inside the node's own process namespace, where rank.py has its pids from
    pid = json.loads((logs / "rank-00002.json").read_text())["pid"]
    assert slurm.exec("node3", ["kill", "-STOP", str(pid)]).returncode == 0
    stopped = time.monotonic()
    folder = logs / "hang-0"
    until(lambda: (folder / "verdict.json").exists(), seconds=FLOOR + 40)
    named = time.monotonic() - stopped
    found = site.wait(run, seconds=90)
    ended = time.monotonic() - stopped
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["kind"], verdict["ranks"], verdict["hosts"]) == ("laggard", [2], ["node3"]), verdict
    assert verdict["collective"].partition(" #")[0] in ("all_reduce", "reduce_scatter", "all_gather"), verdict
    assert "rank 2 on node3 is stopped (state T)" in verdict["why"]
    assert named < FLOOR + 40
    assert ended < FLOOR + 75  # collecting 20 s at most, last words 5 s, and Slurm's own end of the job
    assert (found["state"], found["code"]) == ("failed", HUNG), found
    for number in range(4):
        assert json.loads((folder / f"rank-{number:05d}.json").read_text())["rank"] == number
        word = json.loads((logs / f"node-{number:04d}.json").read_text())
        assert (word["code"], word["hang"]["ranks"], word["hang"]["hosts"]) == (HUNG, [2], ["node3"])
    assert slurm.exec("node3", ["kill", "-0", str(pid)]).returncode != 0
    print(f"named after {named:.1f} s, ended after {ended:.1f} s: {verdict['why']}")
