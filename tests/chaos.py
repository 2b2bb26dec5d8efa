"""Faults on a real Slurm with real DeepSpeed: what each costs. `make chaos`, or by name:

    python tests/chaos.py rank-kill node-spare

One line a fault: steps that were made twice, then seconds.

pause  no training: from the fault (or from the last step, where training went on for a while) to the first step
found  from the same moment to the first sign that the launcher has: a rank that ended, a node called lost, a
       warning, the job started again by Slurm
acted  from there to what was decided being done: the next start, submission or requeue
own    found + acted, less what is not the launcher's: the job's limit for a hang, and, where the script's own
       host went, all of Slurm's part. Queue, imports and loading are in `pause` alone.
load   the highest 1-minute load average meanwhile, of how many CPUs: three ranks and their Slurm share them

The limits: 30 s for `own`, 60 s for `pause` where the allocation stays. Needs root, as every test with a Slurm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import Cluster, borrow, why_not
from test_recover_slurm import metrics, told, until
from test_slurm import TINY, Site

OWN, WHOLE = 30.0, 60.0  # seconds
PARTITIONS = """\
SlurmdTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass
class Cost:
    lost: int | None = None  # steps
    pause: float | None = None  # seconds, all four
    found: float | None = None
    acted: float | None = None
    own: float | None = None
    verdict: str = "PASS"
    note: str = ""


class Lab:
    """A cluster, a directory to submit from, and a checkpoint of 40 steps on 3 nodes to start from."""

    def __init__(self, slurm: Cluster, folder: Path, full: Path) -> None:
        self.slurm, self.site, self.full = slurm, Site(folder), full

    def job(self, name: str, *, nodes: int = 3, spares: int = 0, train: dict | None = None, **more: object) -> dict:
        given = {"global_batch": 12, "micro_batch": 4 if nodes == 3 else 2, "seq_len": 64, "zero": 3, "steps": 3000}
        asked = {
            "name": name,
            "model": TINY,
            "train": {**given, "optimizer": {"lr": 2e-3}, "checkpoint": {"every": 10}, **(train or {})},
            "resources": {"nodes": nodes, "spares": spares},
            "venv": sys.prefix,
            "slurm": {"time": "20"},
            **more,
        }
        return {"preflight": {"stages": ["inventory", "host"]}, **asked} if spares else asked

    def start(self, asked: dict, *, steps: int = 25) -> Path:
        run = self.site.submit(asked)
        folder = self.site.folder / "dslaunch-runs" / run
        until(f"{steps} steps of {run}", lambda: len(metrics(folder)) > steps, seconds=240)
        return folder

    def rank(self, folder: Path, number: int) -> dict:
        return json.loads((folder / "logs" / f"rank-{number:05d}.json").read_text())

    def end(self, folder: Path) -> None:
        self.site.dslaunch("cancel", str(folder))
        with contextlib.suppress(AssertionError):
            until("no job is left", lambda: not self.site.jobs().strip(), seconds=60)
        for node in self.slurm.nodes():
            with contextlib.suppress(RuntimeError):  # it has no power
                if not self.slurm.exec(node, ["pgrep", "-x", "slurmd"]).stdout:
                    self.slurm.crash(node)
            self.slurm.boot(node)
        idle = lambda: self.slurm.run(["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"]).stdout.strip() == "4"  # noqa: E731
        with contextlib.suppress(AssertionError):
            until("four nodes are idle", idle, seconds=60)

    def hit(
        self,
        asked: dict,
        fault: Callable[[Path], object],
        *,
        stays: bool,
        chosen: float = 0,
        slurms: bool = False,
        mend: Callable[[], None] = lambda: None,
        seconds: float = 240,
    ) -> Cost:
        """Start, let `fault` happen, wait for a step of the next attempt, and add up.

        `chosen`: seconds of waiting that the job file asks for. `slurms`: it is Slurm that finds the fault.
        """
        folder = self.start(asked)
        try:
            at = time.time()
            fault(folder)
            after = until(
                "steps after the fault",
                lambda: (
                    told(folder, "finished")
                    or [
                        row
                        for row in metrics(folder)
                        if len(told(folder, "attempt")) > 1 and row["time"] > begun(folder, 1)
                    ]
                ),
                seconds=seconds,
            )
            if "event" in after[0]:
                return Cost(verdict="FAIL", note=f"it ended: {after[0]['why']}"[:90])
            last = max(
                (row for row in metrics(folder) if row["time"] < begun(folder, 1)), key=lambda row: row["step"]
            )
            # a rank that is let go after a hang may make a last step
            since = at if chosen else max(at, last["time"])
            found, acted = sign(folder), executed(folder)
            cost = Cost(max(0, last["step"] - after[0]["step"] + 1), after[0]["time"] - since)
            cost.found, cost.acted = max(0.0, found - since), acted - max(found, since)
            cost.own = cost.acted if slurms else max(0.0, cost.found - chosen) + cost.acted
            decided = next((entry["action"] for entry in told(folder, "decided")), "Slurm requeued")
            cost.note = f"{decided}: {told(folder, 'ended')[0]['why']}"
            if cost.own > OWN or (stays and cost.pause > WHOLE):
                cost.verdict = "FAIL"
            return cost
        finally:
            mend()
            self.end(folder)


def begun(folder: Path, number: int) -> float:
    return next(entry["time"] for entry in told(folder, "attempt") if entry["attempt"] == number)


def sign(folder: Path) -> float:
    """When the first attempt's trouble was first seen: by a node, the batch host, or the job that follows."""
    (ended, *_) = told(folder, "ended")
    files = [folder / "logs" / name for name in ("told-0", "lost-0")]
    times = [ended["time"], *(path.stat().st_mtime for path in files if path.exists())]
    times += [entry["time"] for entry in told(folder, "started")[1:]]
    return min(times + ([ended["failed"]] if ended.get("failed") else []))


def executed(folder: Path) -> float:
    (ended, *_) = told(folder, "ended")
    last = [entry for name in ("attempt", "resubmitted", "requeued", "requeueing") for entry in told(folder, name)]
    return min(entry["time"] for entry in last if entry["time"] > ended["time"])


class Load(threading.Thread):
    """The highest load average since the last `take`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.highest = max(self.highest, os.getloadavg()[0])
            time.sleep(2)

    def take(self) -> float:
        found, self.highest = self.highest, os.getloadavg()[0]
        return found


# --- the faults -----------------------------------------------------------------------------------

Scenario = Callable[[Lab], Cost]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def kill(lab: Lab, folder: Path, rank: int, how: str) -> None:
    one = lab.rank(folder, rank)
    assert lab.slurm.exec(one["host"], ["kill", f"-{how}", str(one["pid"])]).returncode == 0


def slurmd(lab: Lab, node: str) -> None:
    (pid, *_) = lab.slurm.exec(node, ["pgrep", "-x", "slurmd"]).stdout.split()
    assert lab.slurm.exec(node, ["kill", "-KILL", pid]).returncode == 0


@scenario
def rank_kill(lab: Lab) -> Cost:
    """kill -9 of a rank."""
    return lab.hit(lab.job("kill"), lambda run: kill(lab, run, 1, "KILL"), stays=True)


@scenario
def rank_stop(lab: Lab) -> Cost:
    """SIGSTOP of a rank: it hangs, and is named. The limit of the hang is 15 s."""
    asked = lab.job("stop", recover={"hang": 15})
    return lab.hit(asked, lambda run: kill(lab, run, 1, "STOP"), stays=True, chosen=15)


def without_slurmd(lab: Lab, *, spares: int) -> Cost:
    asked = lab.job("slurmd", spares=spares, preflight={"run": False})
    return lab.hit(asked, lambda run: slurmd(lab, lab.rank(run, 1)["host"]), stays=spares > 0, slurms=True)


@scenario
def slurmd_kill(lab: Lab) -> Cost:
    """kill -9 of a node's slurmd alone: its ranks go on until Slurm calls the node down. A spare is there."""
    return without_slurmd(lab, spares=1)


@scenario
def slurmd_kill_alone(lab: Lab) -> Cost:
    """The same without a spare."""
    return without_slurmd(lab, spares=0)


@scenario
def node_spare(lab: Lab) -> Cost:
    """Power loss of a node, with a spare. Slurm itself notices after its SlurmdTimeout, here 60 s."""
    return lab.hit(lab.job("spare", spares=1), lambda run: lab.slurm.crash(lab.rank(run, 1)["host"]), stays=True)


@scenario
def node_crash(lab: Lab) -> Cost:
    """Power loss of a node, without a spare."""
    return lab.hit(lab.job("crash"), lambda run: lab.slurm.crash(lab.rank(run, 1)["host"]), stays=False)


@scenario
def head_crash(lab: Lab) -> Cost:
    """Power loss of rank 0's node, where the job's script runs too."""
    return lab.hit(lab.job("head"), lambda run: lab.slurm.crash(lab.rank(run, 0)["host"]), stays=False, slurms=True)


@scenario
def node_cut(lab: Lab) -> Cost:
    """A node whose cable is pulled: it lives, and nobody reaches it. With a spare."""

    def cable(node: str) -> str:
        return lab.slurm.tag + node.removeprefix("node")

    cut: list[str] = []

    def pull(run: Path) -> None:
        cut.append(lab.rank(run, 1)["host"])
        subprocess.run(["ip", "link", "set", cable(cut[0]), "down"], check=True)

    def mend() -> None:
        for node in cut:
            lab.slurm.crash(node)

    return lab.hit(lab.job("cut", spares=1), pull, stays=True, mend=mend)


@scenario
def preemption(lab: Lab) -> Cost:
    """Another job takes the nodes while checkpoints are written at every step."""
    asked = lab.job("preempt", train={"checkpoint": {"every": 1}})
    asked["slurm"] = {"time": "20", "partition": "low"}

    def take(run: Path) -> None:
        lab.slurm.sbatch(
            ["--partition=high", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 3"]
        )

    return lab.hit(asked, take, stays=False)


@scenario
def time_limit(lab: Lab) -> Cost:
    """Slurm's warning before the end, while checkpoints are written at every step; slurm.requeue is true."""
    asked = lab.job("limit", train={"checkpoint": {"every": 1}})
    asked["slurm"] = {"time": "20", "requeue": True}

    def warn(run: Path) -> None:
        number = told(run, "started")[0]["job"]
        assert lab.slurm.run(["scancel", "--batch", "--signal=USR2", number]).returncode == 0

    return lab.hit(asked, warn, stays=False)


@scenario
def disk_full(lab: Lab) -> Cost:
    """A disk with room for one checkpoint and a half: the job ends, the whole one stays, nothing is retried."""
    shutil.rmtree(lab.full / "ckpt", ignore_errors=True)
    asked = lab.job("full", train={"checkpoint": {"every": 10, "dir": str(lab.full / "ckpt")}})
    run = lab.site.submit(asked)
    folder = lab.site.folder / "dslaunch-runs" / run
    try:
        (finished,) = until("the job ends", lambda: told(folder, "finished"), seconds=240)
    finally:
        lab.end(folder)
    attempts, ended = told(folder, "attempt"), told(folder, "ended")[0]
    kept = ended["checkpoint"] > 0
    passed = len(attempts) == 1 and kept
    return Cost(
        verdict="PASS" if passed else "FAIL", note=f"{finished['why'][:110]}; step {ended['checkpoint']} kept"
    )


def damaged(
    lab: Lab, name: str, harm: Callable[[Path], object], *, step: int, nodes: int = 3, **train: object
) -> Cost:
    """A run that goes on from a copy of the 40 steps, after `harm`. It has to go on at `step`."""
    base = lab.site.folder / "checkpoints" / "base"
    if not base.exists():
        run = lab.site.submit(lab.job("base", train={"steps": 40, "checkpoint": {"every": 10, "keep": 4}}))
        found = lab.site.wait(run)
        assert found["state"] == "completed", lab.site.log(run)[-2000:]
    copy = lab.site.folder / "checkpoints" / name
    shutil.copytree(base, copy)
    harm(copy)
    asked = lab.job(name, nodes=nodes, train={"steps": 45, "checkpoint": {"every": 10, "keep": 4}, **train})
    run = lab.site.submit(asked)
    found = lab.site.wait(run, seconds=240)
    rows = metrics(lab.site.folder / "dslaunch-runs" / run)
    first = rows[0]["step"] - 1 if rows else -1
    cost = Cost(lost=40 - first, note=f"went on at step {first}, {found['state']}")
    if found["state"] != "completed" or first != step:
        cost.verdict, cost.note = "FAIL", cost.note + f" instead of {step}: {lab.site.log(run)[-300:]!r}"
    return cost


@scenario
def latest_empty(lab: Lab) -> Cost:
    """`latest` cut to nothing, as a crash in the middle of DeepSpeed's write leaves it."""
    return damaged(lab, "empty", lambda copy: (copy / "latest").write_text(""), step=40)


@scenario
def latest_dangling(lab: Lab) -> Cost:
    """`latest` names a tag that is not there."""
    return damaged(lab, "dangling", lambda copy: (copy / "latest").write_text("step00000050"), step=40)


@scenario
def latest_missing(lab: Lab) -> Cost:
    """No `latest`: DeepSpeed alone would start at step 0."""
    return damaged(lab, "missing", lambda copy: (copy / "latest").unlink(), step=40)


def shard(copy: Path) -> Path:
    return next((copy / "step00000040").glob("*_optim_states.pt"))


@scenario
def shard_cut(lab: Lab) -> Cost:
    """A shard of the newest tag is shorter than it was: the one before is taken."""
    return damaged(lab, "cut", lambda copy: os.truncate(shard(copy), shard(copy).stat().st_size // 2), step=30)


@scenario
def bit_flip(lab: Lab) -> Cost:
    """One bit of the newest tag's data is another."""

    def flip(copy: Path) -> None:
        with shard(copy).open("r+b") as file:
            file.seek(shard(copy).stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return damaged(lab, "flip", flip, step=30)


@scenario
def fewer_nodes(lab: Lab) -> Cost:
    """Two nodes instead of three, through a universal checkpoint; the loss goes on."""
    cost = damaged(lab, "fewer", lambda copy: None, step=40, nodes=2)
    folders = sorted((lab.site.folder / "dslaunch-runs").iterdir(), key=lambda path: path.stat().st_mtime)
    before = [row["loss"] for folder in folders if folder.name.startswith("base-") for row in metrics(folder)]
    after = [row["loss"] for folder in folders if folder.name.startswith("fewer-") for row in metrics(folder)]
    if after and before:
        first, last, new = sum(before[:5]) / 5, sum(before[-5:]) / 5, sum(after) / len(after)
        cost.note += f"; loss {first:.2f} -> {last:.2f} | {new:.2f}"
        if new > last + 0.1 * (first - last):
            cost.verdict = "FAIL"
    return cost


# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        full = folder / "full"
        full.mkdir()
        # before the nodes start: each has mounts of its own from then on
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", str(full)], check=True)
        try:
            with borrow("dslaunch-chaos", extra_conf=PARTITIONS) as slurm:
                os.environ.update(slurm.env, XDG_CONFIG_HOME=str(folder / "config"))
                yield Lab(slurm, folder, full)
        finally:
            subprocess.run(["umount", str(full)], check=False)


def row(name: str, cost: Cost, load: float) -> str:
    times = (cost.pause, cost.found, cost.acted, cost.own)
    cells = ["-" if cost.lost is None else str(cost.lost), *("-" if one is None else f"{one:.1f}" for one in times)]
    return f"{name:18}" + "".join(f"{cell:>8}" for cell in [*cells, f"{load:.1f}"]) + f"  {cost.verdict:8}{cost.note}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FAULT", help=", ".join(SCENARIOS))
    names = parser.parse_args().names or list(SCENARIOS)
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no fault {', '.join(unknown)}: {', '.join(SCENARIOS)}")
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    bad, load = 0, Load()
    titles = "".join(f"{title:>8}" for title in ("steps", "pause", "found", "acted", "own", "load"))
    print(f"{'fault':18}{titles}  verdict ({os.cpu_count()} CPUs)", flush=True)
    with lab() as here:
        for name in names:
            load.take()
            try:
                cost = SCENARIOS[name](here)
            except (AssertionError, subprocess.SubprocessError) as error:
                cost = Cost(verdict="FAIL", note=" ".join(str(error).split())[:300])
            bad += cost.verdict != "PASS"
            print(row(name, cost, load.take()), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
