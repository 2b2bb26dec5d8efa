"""The preflight on a real Slurm of four nodes, whose cables are as slow as a test makes them."""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from onebit.env import ensure
from test_slurm import Site, site  # noqa: F401 - a fixture

from launcher import runs

CACHE = Path(__file__).parents[1] / ".cache"
NODES = ("node1", "node2", "node3", "node4")
CABLE = 60  # Mbit/s: far below what this machine moves, so that it is the cable which is measured


def check(site: Site, *arguments: str, nodes: int = 4, seconds: float = 0.4) -> dict:  # noqa: F811
    """The verdict, with the exit code that the command ended with."""
    fast = ["--set", f"preflight.seconds={seconds}", "--set", f"venv={sys.prefix}", "--set", "slurm.time=10"]
    done = site.dslaunch("preflight", "--nodes", str(nodes), "--json", *fast, *arguments)
    assert done.stdout, done.stderr
    verdict = json.loads(done.stdout)
    assert done.returncode == verdict["code"], done.stderr
    return {**verdict, "stderr": done.stderr}


def bad(verdict: dict, level: str = "exclude") -> list[tuple[str, str]]:
    return sorted({(one["node"], one["peer"]) for one in verdict["findings"] if one["level"] == level})


@pytest.fixture
def cables(slurm):
    """All of them as slow as each other; a test makes one slower."""
    for node in NODES:
        slurm.shape(node, tx=CABLE, rx=CABLE)
    yield slurm
    for node in NODES:
        slurm.shape(node)


def test_healthy_nodes_pass_every_stage(site, cables):  # noqa: F811
    verdict = check(site)
    assert (verdict["code"], verdict["excluded"], tuple(verdict["train"])) == (0, [], NODES), verdict["findings"]
    assert set(verdict["stages"]) == {"join", "inventory", "host", "node", "pairs", "whole"}
    assert 0.5 * CABLE / 8e3 < verdict["bandwidth"] <= 1.05 * CABLE / 8e3
    assert "pairs: round 3" in verdict["stderr"]
    assert verdict["inventory"]["node2"] == {**verdict["inventory"]["node1"], **verdict["inventory"]["node2"]}


def test_a_node_with_half_a_cable_is_named(site, cables):  # noqa: F811
    cables.shape("node3", tx=CABLE / 2, rx=CABLE)
    verdict = check(site, "--stages", "pairs")
    assert (verdict["code"], verdict["excluded"]) == (20, ["node3"]), verdict["findings"]
    assert "sends" in verdict["headline"]


def test_a_slow_direction_of_one_link_is_a_link_and_no_nodes_fault(site, cables):  # noqa: F811
    cables.shape("node1", tx=CABLE, rx=CABLE, to={"node4": CABLE / 2})
    verdict = check(site, "--stages", "pairs")
    assert (verdict["code"], verdict["excluded"]) == (0, []), verdict["findings"]
    assert bad(verdict, "warn") == [("node1", "node4")]


def test_a_node_with_another_deepspeed_is_named_and_nothing_starts(site, slurm):  # noqa: F811
    (other,) = (ensure(CACHE) / "lib").glob("python*/site-packages")
    ours = Path(sysconfig.get_paths()["purelib"])
    there = [(other / "deepspeed", ours / "deepspeed")]
    there += zip(other.glob("deepspeed-*.dist-info"), ours.glob("deepspeed-*.dist-info"), strict=True)
    for source, target in there:
        assert slurm.exec("node3", ["mount", "--bind", str(source), str(target)]).returncode == 0
    try:
        verdict = check(site, "--stages", "inventory")
    finally:
        for _, target in there:
            slurm.exec("node3", ["umount", str(target)])
    assert (verdict["code"], verdict["excluded"]) == (21, ["node3"]), verdict["findings"]
    found = next(one for one in verdict["findings"] if one["level"] == "exclude")
    assert (found["node"], found["measured"]) == ("node3", "0.19.6")
    assert "0.19.8" in found["expected"]


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_an_agent_that_dies_or_hangs_is_named_and_the_spare_trains(site, slurm, signal):  # noqa: F811
    program = "import os; open('rank-' + os.environ['RANK'], 'w').write(os.uname().nodename)"
    train = {"command": ["python3", "-c", program], "launcher": "srun", "global_batch": 12, "zero": 0, "steps": 10}
    asked = {
        "name": "spare",
        "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
        "train": {"micro_batch": 4, "seq_len": 64, **train},
        "resources": {"nodes": 3, "spares": 1},
        "preflight": {"stages": ["inventory", "host"]},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
    }
    run = site.submit(asked)
    progress = site.folder / "dslaunch-runs" / run / "preflight" / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not progress.exists() or '"stage"' not in progress.read_text():
        assert time.monotonic() < deadline, site.log(run)
        time.sleep(0.1)
    pids = slurm.exec("node2", ["pgrep", "-f", "agent .*--name node2"]).stdout.split()
    assert pids
    assert slurm.exec("node2", ["kill", f"-{signal}", pids[0]]).returncode == 0
    assert site.wait(run, seconds=120)["state"] == "completed", site.log(run)[-3000:]
    assert [(site.folder / f"rank-{i}").read_text() for i in range(3)] == ["node1", "node3", "node4"]
    verdict = runs.verdict(runs.find(run, site.folder / "dslaunch-runs"))
    assert (verdict["code"], verdict["excluded"]) == (10, ["node2"])


def without_node2(site, slurm, asked: dict) -> str:  # noqa: F811
    """The run of a job that completes on the other nodes, as node2 does not see the runs."""
    blind = site.folder / "dslaunch-runs"
    blind.mkdir()
    assert slurm.exec("node2", ["mount", "-t", "tmpfs", "tmpfs", str(blind)]).returncode == 0
    try:
        run = site.submit(asked)
        assert site.wait(run, seconds=150)["state"] == "completed", site.log(run)[-3000:]
    finally:
        slurm.exec("node2", ["umount", str(blind)])
    assert [(site.folder / f"rank-{i}").read_text() for i in range(3)] == ["node1", "node3", "node4"]
    return run


def test_a_node_that_does_not_see_the_run_is_replaced_by_a_spare(site, slurm):  # noqa: F811
    program = "import os; open('rank-' + os.environ['RANK'], 'w').write(os.uname().nodename)"
    train = {"command": ["python3", "-c", program], "launcher": "srun", "global_batch": 12, "zero": 0, "steps": 10}
    asked = {
        "name": "blind",
        "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
        "train": {"micro_batch": 4, "seq_len": 64, **train},
        "resources": {"nodes": 3, "spares": 1},
        "preflight": {"stages": ["host"], "join_timeout": 15},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
    }
    run = without_node2(site, slurm, asked)
    assert "3 nodes are ready without node2" in site.log(run)


def test_with_too_few_healthy_nodes_the_job_goes_again_without_them(site, slurm):  # noqa: F811
    """node2 does not see the runs; three of four nodes are asked for, so that a second try finds node4."""
    program = "import os; open('rank-' + os.environ['RANK'], 'w').write(os.uname().nodename)"
    train = {"command": ["python3", "-c", program], "launcher": "srun", "global_batch": 12, "zero": 0, "steps": 10}
    asked = {
        "name": "again",
        "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
        "train": {"micro_batch": 4, "seq_len": 64, **train},
        "resources": {"nodes": 3},
        "preflight": {"run": True, "stages": ["host"], "resubmit": 1, "join_timeout": 15},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
    }
    run = without_node2(site, slurm, asked)
    assert "submitted again as job" in site.log(run)


def test_a_first_node_without_the_environment_is_named_although_it_is_the_one_that_judges(site, slurm):  # noqa: F811
    assert slurm.exec("node1", ["mount", "-t", "tmpfs", "tmpfs", f"{sys.prefix}/bin"]).returncode == 0
    try:
        verdict = check(site, "--stages", "host", "--set", "preflight.join_timeout=15")
    finally:
        slurm.exec("node1", ["umount", f"{sys.prefix}/bin"])
    assert (verdict["code"], verdict["excluded"]) == (20, ["node1"]), verdict
    assert "preflight.sh on node1 ended with 66: " in verdict["headline"]
    assert "bin/activate is not there" in verdict["headline"]


def test_in_a_larger_allocation_only_what_was_asked_for_is_checked(site, slurm):  # noqa: F811
    dslaunch = Path(sys.executable).parent / "dslaunch"
    inside = [dslaunch, "preflight", "--here", "--stages", "host", "--json", "--set", f"venv={sys.prefix}"]
    for more, nodes in (["--nodes", "2"], 2), ([], 3):
        done = slurm.run(["salloc", "-N3", *inside, *more], cwd=site.folder)
        verdict = json.loads(done.stdout)
        assert (verdict["code"], len(verdict["train"]), verdict["excluded"]) == (0, nodes, []), done.stderr
        assert done.returncode == 0
    done = slurm.run(["salloc", "-N2", *inside, "--nodes", "3"], cwd=site.folder)
    assert done.returncode == 2
    assert "--nodes 3: this allocation has 2" in done.stderr


def test_time_that_is_up_before_training_leaves_nothing_running(site, slurm):  # noqa: F811
    asked = {
        "name": "late",
        "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
        "train": {
            "command": ["touch", "trained"],
            "launcher": "srun",
            "global_batch": 8,
            "micro_batch": 4,
            "seq_len": 64,
        },
        "resources": {"nodes": 2},
        "preflight": {"run": True, "stages": ["inventory"]},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
    }
    run = site.submit(asked)
    progress = site.folder / "dslaunch-runs" / run / "preflight" / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not progress.exists() or '"stage"' not in progress.read_text():
        assert time.monotonic() < deadline, site.log(run)
        time.sleep(0.1)
    job = json.loads(site.dslaunch("status", run, "--json").stdout)["job"]
    assert slurm.run(["scancel", "--signal=USR2", "--batch", job]).returncode == 0
    found = site.wait(run, seconds=120)
    assert (found["state"], found["code"]) == ("failed", 75), site.log(run)[-2000:]
    assert not (site.folder / "trained").exists()
