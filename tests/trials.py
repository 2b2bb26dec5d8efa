"""Real tournaments over links that are really slow: namespaces, tc, gloo. `make trials`

    python -m tests.trials --nodes 4 6 --trials 20

Agents and their torch workers stay up over all trials of one size; the outer process shapes the links, the inner
one, inside the first node's namespace, is the coordinator.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from namespaces import Namespaces, why_not  # noqa: E402

from launcher.preflight import START, Setting, to_json  # noqa: E402
from launcher.preflight.coordinator import Coordinator  # noqa: E402

RATE = 40.0  # Mbit/s of every NIC: CPUs are no limit there
PORT = 29400


def told(nodes: int) -> Setting:
    return Setting(nodes=nodes, stages=("pairs",), seconds=0.8, at_once=nodes // 2, round_timeout=40)


async def inner(setting: Setting, names: list[str], out: str) -> None:
    """A tournament for every line on standard input; what it found, on standard output."""
    coordinator = Coordinator(setting, names, out, "")
    server = await asyncio.start_server(coordinator.welcome, None, PORT, limit=1 << 24)
    watcher = asyncio.create_task(coordinator.watch())
    await coordinator.join()
    await coordinator.start_workers()
    print(json.dumps({"ready": len(coordinator.peers)}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        coordinator.findings.clear()
        coordinator.verdict.clear()
        coordinator.unsteady.clear()
        coordinator.measured.clear()
        begun = time.monotonic()
        await coordinator.pairs()
        found = [to_json(one) for one in coordinator.findings if one.level != "note" or one.peer]
        matrix = coordinator.verdict["matrix"]
        print(
            json.dumps(
                {
                    "findings": found,
                    "rounds": coordinator.verdict["rounds"],
                    "seconds": round(time.monotonic() - begun, 1),
                    "cells": to_json(matrix.cells),
                }
            ),
            flush=True,
        )
    watcher.cancel()
    server.close()


class Lab:
    """Namespaces with an agent in each, and the coordinator in the first."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.names = [f"n{index}" for index in range(nodes)]
        self.children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Lab:
        self.stack = contextlib.ExitStack()
        self.net = self.stack.enter_context(Namespaces(self.nodes, rate_mbit=RATE))
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "preflight.json").write_text(json.dumps(to_json(told(self.nodes))))
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        options = {"cwd": folder, "env": env, "text": True, "stdin": subprocess.PIPE}
        inside = [sys.executable, str(ROOT / "tests" / "trials.py"), "--inner", *self.names]
        self.judge = subprocess.Popen(self.net.inside(0, inside), stdout=subprocess.PIPE, **options)
        self.children.append(self.judge)
        for index, name in enumerate(self.names):
            agent = [
                sys.executable, "-c", START, str(ROOT), "preflight.agent", "--setting", "preflight.json", "--connect",
                f"{self.net.address(0)}:{PORT}", "--name", name, "--index", str(index), "--logs", "logs",
            ]  # fmt: skip
            child = subprocess.Popen(self.net.inside(index, agent), stderr=subprocess.DEVNULL, **options)
            self.children.append(child)
        ready = json.loads(self.judge.stdout.readline() or '{"ready": 0}')
        if ready["ready"] != self.nodes:
            self.__exit__()
            raise RuntimeError(f"{ready['ready']} of {self.nodes} agents")
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        self.stack.close()

    def run(self) -> dict:
        self.judge.stdin.write("go\n")
        self.judge.stdin.flush()
        line = self.judge.stdout.readline()
        if not line:
            raise RuntimeError("the coordinator is gone")
        return json.loads(line)

    def heal(self) -> None:
        for node in range(self.nodes):
            for other in range(self.nodes):
                if other in self.net.links.get(node, {}):
                    self.net.shape_link(node, other, None)
            self.net.shape(node)


# kind -> what is done to the lab; it gives the nodes and directed links that have to be found

Truth = tuple[set[str], set[tuple[str, str]]]


def slow(share: float, *, tx: bool = True, rx: bool = True, count: int = 1) -> Callable[[Lab, random.Random], Truth]:
    def make(lab: Lab, chance: random.Random) -> Truth:
        bad = chance.sample(range(lab.nodes), count)
        for node in bad:
            lab.net.shape(node, tx=RATE * share if tx else None, rx=RATE * share if rx else None)
        return {lab.names[node] for node in bad}, set()

    return make


def link(share: float) -> Callable[[Lab, random.Random], Truth]:
    def make(lab: Lab, chance: random.Random) -> Truth:
        left, right = chance.sample(range(lab.nodes), 2)
        lab.net.shape_link(left, right, RATE * share)
        return set(), {(lab.names[left], lab.names[right])}

    return make


KINDS: dict[str, Callable[[Lab, random.Random], Truth]] = {
    "healthy": lambda lab, chance: (set(), set()),
    "node at 50 %": slow(0.5),
    "node at 70 %": slow(0.7),
    "node at 80 %": slow(0.8),
    "tx only at 70 %": slow(0.7, rx=False),
    "rx only at 70 %": slow(0.7, tx=False),
    "directed link at 50 %": link(0.5),
    "two bad nodes": slow(0.6, count=2),
    "flapping link": link(0.3),
}


@contextlib.contextmanager
def flapping(lab: Lab, links: set[tuple[str, str]]) -> Iterator[None]:
    """The link is slow for 0.4 seconds in 0.8."""
    over = threading.Event()

    def flap() -> None:
        bad = True
        while not over.wait(0.4):
            bad = not bad
            for left, right in links:
                rate = RATE * 0.3 if bad else None
                lab.net.shape_link(lab.names.index(left), lab.names.index(right), rate)

    thread = threading.Thread(target=flap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def judged(kind: str, truth: Truth, found: dict) -> tuple[bool, list[str]]:
    """(everything was found, healthy nodes or links that were blamed)."""
    nodes, links = truth
    serious = [one for one in found["findings"] if one["level"] in ("warn", "exclude")]
    named = {one["node"] for one in serious if not one["peer"]}
    linked = {(one["node"], one["peer"]) for one in found["findings"] if one["peer"]}
    excluded = {one["node"] for one in serious if one["level"] == "exclude" and not one["peer"]}
    blocks = [one for one in found["findings"] if one["level"] == "block"]
    blamed = sorted(named - nodes)
    blamed += [f"{a} -> {b}" for a, b in sorted(linked - links) if not {a, b} & nodes and kind != "flapping link"]
    if len(nodes) > 1:  # more than one in ten: it is called the fabric, and nobody is excluded
        return bool(blocks) and not excluded and nodes <= named, blamed
    if nodes:
        return excluded == nodes, blamed
    if links:
        return links <= linked and not excluded and not blocks, blamed
    return not serious and not blocks, blamed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--trials", type=int, default=20, help="of each number of nodes")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="these alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inner", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        asyncio.run(inner(told(len(options.inner)), options.inner, "."))
        return 0
    if reason := why_not():
        print(reason)
        return 2
    missed, kinds = 0, options.kind or list(KINDS)
    for nodes in options.nodes:
        chance = random.Random(options.seed)
        with Lab(nodes) as lab:
            for trial in range(options.trials):
                kind = kinds[trial % len(kinds)]
                lab.heal()
                truth = KINDS[kind](lab, chance)
                with flapping(lab, truth[1]) if kind == "flapping link" else contextlib.nullcontext():
                    found = lab.run()
                ok, blamed = judged(kind, truth, found)
                missed += not ok or bool(blamed)
                said = "found" if ok else "MISSED"
                said += f", healthy but blamed: {', '.join(blamed)}" if blamed else ""
                bad = ", ".join([*sorted(truth[0]), *(f"{a} -> {b}" for a, b in truth[1])]) or "-"
                print(
                    f"{nodes} nodes  {kind:22} {bad:12} {said:8} {found['rounds']:3} rounds {found['seconds']:5.1f} s"
                    f"  load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
                if not ok or blamed:
                    for one in found["findings"]:
                        print(f"    {one['level']:8}{one['node']} {one['peer']} {one['what']} {one['measured']}")
    total = len(options.nodes) * options.trials
    print(f"{total - missed} of {total} trials: everything found, nothing healthy blamed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
