"""Start-up and host lists. The machine's speed drifts, so everything is a ratio within one run: `make bench`."""

from __future__ import annotations

import compileall
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from launcher import hostfile

ROOT = Path(__file__).parents[1]
DSLAUNCH = Path(sys.executable).parent / "dslaunch"
ROUNDS = 15

CLICK = [sys.executable, "-c", "import click"]
COMMANDS = [
    ("dslaunch --version", [DSLAUNCH, "--version"], 1.2),
    ("dslaunch --help", [DSLAUNCH, "--help"], 1.5),
    ("dslaunch plan", [DSLAUNCH, "plan", ROOT / "slurm/llama-70b-8x8/job.yaml"], 5.0),
    ("validate, plan, render: slurm", [DSLAUNCH, "slurm", "--dry-run", ROOT / "slurm/llama-70b-8x8/job.yaml"], 5.0),
    ("validate, plan, render: k8s", [DSLAUNCH, "k8s", ROOT / "manifests/llama-70b-8x8/job.yaml"], 5.0),
]


def cpu_and_wall(command: list[object]) -> tuple[float, float]:
    """Seconds of processor and of clock that one whole process took."""
    begun = time.perf_counter()
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begun


def main() -> int:
    compileall.compile_dir(ROOT / "launcher", quiet=1)  # as pip does for whoever installs the package
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS + 1):  # in turn, so that a slow moment hits all alike
        for name, command, _ in [("click", CLICK, 0.0), *COMMANDS]:
            runs.setdefault(name, []).append(cpu_and_wall(command))
    base_cpu, base_wall = (statistics.median(column) for column in zip(*runs["click"][1:], strict=True))
    print(f'python -c "import click": {base_cpu * 1000:.0f} ms CPU, {base_wall * 1000:.0f} ms; medians of {ROUNDS}')
    missed = 0
    for name, _, limit in COMMANDS:
        cpu, wall = (statistics.median(column) for column in zip(*runs[name][1:], strict=True))
        ratio = wall / base_wall
        missed += ratio > limit
        print(f"{name:32} {ratio:5.2f} x wall  {cpu / base_cpu:5.2f} x CPU   (at most {limit:g} x)")
    text = "gpu[00001-10000]"
    hosts = hostfile.expand(text)
    for name, work in (("expand", lambda: hostfile.expand(text)), ("fold", lambda: hostfile.fold(hosts))):
        best = min(_timed(work) for _ in range(7))
        missed += best > 0.05
        print(f"{name + ' 10,000 hosts':32} {best * 1000:5.1f} ms  (at most 50 ms)")
    return 1 if missed else 0


def _timed(work: object) -> float:
    begun = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
