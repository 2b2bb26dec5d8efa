"""How often the tournament finds slow nodes and links, and blames healthy ones: `python -m tests.detector`.

Simulated measurements, no network. A directed cell is min(tx of one end, rx of the other, their link) with 2 % noise,
and one measurement in a hundred dips to 0.3-0.8 of it. A bad node is 0.5-0.92 of a healthy one, sending, receiving or
both; a bad link 0.4-0.7, one way. Cells are independent: no fabric contention, no slow minute that hits many pairs,
so that what is printed bounds the method and not the weather. What other tools do runs on the same worlds; they know
what a healthy pair reaches (1.0), which is more than the tournament is told, and cut at 0.88 of it.

Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy

from launcher.preflight import tournament
from launcher.preflight.tournament import Tournament

NOISE = 0.02
DIPS = 0.01
CUT = 0.88  # of other tools
GRADES = ((0.80, ">=20 %"), (0.88, "12-20 %"), (0.92, "8-12 %"))  # up to this factor
COLD = 20.0  # seconds of a round that starts its processes anew: 8 to 20
BLAMED = "healthy excluded of 1000 [95 %] of decisions"
WALL = {4: 120, 64: 240, 1024: 360}  # seconds, from nothing


@dataclass(frozen=True)
class Kind:
    """What is wrong with a world."""

    nodes: int
    bad: int = 0
    links: int = 0
    flaps: int = 0  # links that are slow every other time
    noise: float = NOISE
    dips: float = DIPS

    def __str__(self) -> str:
        wrong = [
            f"{count} {what}{'s' * (count > 1)}"
            for count, what in ((self.bad, "bad node"), (self.links, "link"), (self.flaps, "flapping link"))
            if count
        ]
        harsh = [f"{self.noise:.0%} noise, {self.dips:.0%} dips"] if (self.noise, self.dips) != (NOISE, DIPS) else []
        return ", ".join((wrong or ["healthy"]) + harsh)


class World:
    """A set of nodes 0..n-1 and the bandwidth between them."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self.random = random.Random(seed)
        self.weather = self.weathers(seed)
        count = kind.nodes
        self.kind = kind
        self.tx, self.rx = [1.0] * count, [1.0] * count
        self.factors = {i: self.random.uniform(0.5, 0.92) for i in self.random.sample(range(count), kind.bad)}
        for i, factor in self.factors.items():
            way = self.random.choice(("both", "tx", "rx"))
            if way != "rx":
                self.tx[i] = factor
            if way != "tx":
                self.rx[i] = factor
        good = [i for i in range(count) if i not in self.factors]
        self.links: dict[tuple[int, int], float] = {}
        self.flaps: dict[tuple[int, int], float] = {}
        while len(self.links) < kind.links:
            a, b = self.random.sample(good, 2)
            self.links[a, b] = self.random.uniform(0.4, 0.7)
        while len(self.flaps) < kind.flaps:
            a, b = self.random.sample(good, 2)
            self.flaps[a, b] = self.random.uniform(0.4, 0.7)

    def one(self, i: int, j: int) -> float:
        """GB/s from i to j, measured once."""
        value = min(self.tx[i], self.rx[j])
        if self.links:
            value = min(value, self.links.get((i, j), 1.0))
        if (i, j) in self.flaps and self.random.random() < 0.5:
            value = min(value, self.flaps[i, j])
        return value * next(self.weather)

    def weathers(self, seed: int) -> Iterator[float]:
        dice = numpy.random.default_rng(seed)
        size = 16 * self.kind.nodes
        while True:
            noise = numpy.maximum(0.01, dice.normal(1.0, self.kind.noise, size))
            dips = numpy.where(dice.random(size) < self.kind.dips, dice.uniform(0.3, 0.8, size), 1.0)
            yield from (noise * dips).tolist()

    def pair(self, i: int, j: int) -> float:
        """An all_reduce of two: the slower way."""
        return min(self.one(i, j), self.one(j, i))

    def ring(self, nodes: Sequence[int]) -> float:
        """A ring all_reduce: the slowest hop of them."""
        return min(self.one(a, b) for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True))


@dataclass
class Outcome:
    found: set[int]  # nodes that are warned of or excluded
    excluded: set[int]
    links: set[tuple[int, int]]  # warned of; a note tells of two slow measurements among as many good ones
    rounds: int
    wide: bool = False
    noted: set[tuple[int, int]] = field(default_factory=set)


def ours(world: World, seed: int) -> Outcome:
    names = [str(i) for i in range(world.kind.nodes)]
    run = Tournament(names, seed=seed)
    one = world.one
    while pairs := run.next():
        cells: dict[tuple[str, str], float | None] = {}
        for a, b in pairs:
            i, j = int(a), int(b)
            cells[a, b] = one(i, j)
            cells[b, a] = one(j, i)
        run.record(cells)
    result = run.result()
    named = [finding for finding in result.findings if finding.node and not finding.peer]
    return Outcome(
        found={int(finding.node) for finding in named},
        excluded={int(finding.node) for finding in named if finding.level == "exclude"},
        links={(int(f.node), int(f.peer)) for f in result.findings if f.peer and f.level != "note"},
        noted={(int(f.node), int(f.peer)) for f in result.findings if f.peer and f.level == "note"},
        rounds=result.rounds,
        wide=result.fabric_wide,
    )


# What other tools do, on pairs of 1.0


def shuffled(world: World) -> list[tuple[int, int]]:
    order = list(range(world.kind.nodes))
    world.random.shuffle(order)
    return list(zip(order[::2], order[1::2], strict=False))


def blame_both(world: World, seed: int) -> Outcome:
    """Each node once; both ends of a slow pair (gcm check-nccl pairwise-quick, first pass of ncclscout)."""
    bad = {i for pair in shuffled(world) if world.pair(*pair) < CUT for i in pair}
    return Outcome(bad, bad, set(), 1)


def two_passes(world: World, seed: int) -> Outcome:
    """Both ends of a slow pair once more, with a node that passed (cluster-health-scanner, ncclscout)."""
    pairs = shuffled(world)
    slow = [pair for pair in pairs if world.pair(*pair) < CUT]
    suspects = [i for pair in slow for i in pair]
    passed = [i for pair in pairs if pair not in slow for i in pair]
    if not suspects:
        return Outcome(set(), set(), set(), 1)
    if not passed:
        return Outcome(set(suspects), set(suspects), set(), 1)
    world.random.shuffle(passed)
    bad = {i for k, i in enumerate(suspects) if world.pair(i, passed[k % len(passed)]) < CUT}
    return Outcome(bad, bad, set(), 1 + math.ceil(len(suspects) / len(passed)))


def pairings(world: World, seed: int) -> Outcome:
    """15 random pairings; a node that passes less than half of them (cluster-health's test with a decision added)."""
    passed: Counter[int] = Counter()
    met: Counter[int] = Counter()
    for _ in range(15):
        for pair in shuffled(world):
            good = world.pair(*pair) >= CUT
            for i in pair:
                met[i] += 1
                passed[i] += good
    bad = {i for i in met if passed[i] * 2 < met[i]}
    return Outcome(bad, bad, set(), 15)


def bisection(world: World, seed: int) -> Outcome:
    """Rings, halved while slow; the last two each with a node of a ring that was fast."""
    level = [list(range(world.kind.nodes))]
    fast: list[int] = []
    twos: list[list[int]] = []
    count = 0
    while level:
        count += 1
        slow = []
        for ring in level:
            if world.ring(ring) >= CUT:
                fast += ring
            else:
                slow.append(ring)
        twos += [ring for ring in slow if len(ring) <= 2]
        level = [half for ring in slow if len(ring) > 2 for half in (ring[: len(ring) // 2], ring[len(ring) // 2 :])]
    suspects = [i for ring in twos for i in ring]
    if not suspects:
        return Outcome(set(), set(), set(), count)
    if not fast:
        return Outcome(set(suspects), set(suspects), set(), count)
    bad = {i for i in suspects if world.pair(i, world.random.choice(fast)) < CUT}
    return Outcome(bad, bad, set(), count + math.ceil(len(suspects) / len(fast)))


STRATEGIES: dict[str, Callable[[World, int], Outcome]] = {
    "each once, blame both": blame_both,
    "two passes": two_passes,
    "15 random pairings": pairings,
    "bisection with rings": bisection,
    "tournament": ours,
}


# Counting


def grade(factor: float) -> str:
    return next(name for most, name in GRADES if factor <= most)


def tally(job: tuple[str, Kind, range]) -> tuple[Counter[str], Counter[int]]:
    strategy, kind, seeds = job
    play = STRATEGIES[strategy]
    count: Counter[str] = Counter()
    took: Counter[int] = Counter()
    for seed in seeds:
        world = World(kind, seed)
        end = play(world, seed)
        count["worlds"] += 1
        count["wide"] += end.wide
        took[end.rounds] += 1
        for i, factor in world.factors.items():
            count[f"bad {grade(factor)}"] += 1
            count[f"found {grade(factor)}"] += i in end.found
            count[f"excluded {grade(factor)}"] += i in end.excluded
        count["healthy"] += kind.nodes - kind.bad
        count["healthy excluded"] += len(end.excluded - set(world.factors))
        count["healthy named"] += len(end.found - set(world.factors))
        links = {*world.links, *world.flaps}
        count["links"] += len(links)
        count["links found"] += len(end.links & links)
        count["links noted"] += len(end.noted & links)
        count["links wrong"] += len(end.links - links)
        count["notes wrong"] += len(end.noted - links)
    return count, took


def wilson(hits: int, tries: int) -> tuple[float, float]:
    """95 % interval: wilson(25, 25) is (0.867, 1.0)."""
    if not tries:
        return 0.0, 1.0
    z = 1.959964
    share = hits / tries
    middle = share + z * z / (2 * tries)
    wide = z * math.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries))
    scale = 1 + z * z / tries
    return (middle - wide) / scale if hits else 0.0, (middle + wide) / scale if hits < tries else 1.0


def percentile(took: Counter[int], share: float) -> int:
    left = share * sum(took.values())
    for rounds, times in sorted(took.items()):
        left -= times
        if left <= 0:
            return rounds
    return max(took)


def ratio(hits: int, tries: int) -> str:
    return f"{hits / tries:.4f}" if tries else "-"


@dataclass
class Row:
    kind: Kind
    strategy: str
    count: Counter[str]
    took: Counter[int]

    def recall(self, name: str) -> str:
        return ratio(self.count[f"found {name}"], self.count[f"bad {name}"])

    @property
    def blamed(self) -> str:
        """Healthy nodes excluded in a thousand, with the interval and how many decisions."""
        hits, tries = self.count["healthy excluded"], self.count["healthy"]
        low, high = wilson(hits, tries)
        return f"{1e3 * hits / tries:.3g} [{1e3 * low:.2g}, {1e3 * high:.2g}] of {tries:,}"

    @property
    def mean(self) -> float:
        return sum(rounds * times for rounds, times in self.took.items()) / sum(self.took.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    for number, line in enumerate(lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the seeds, for a quick look")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    start = time.monotonic()

    pool = multiprocessing.get_context("fork").Pool(given.processes)

    def run(kind: Kind, seeds: int, strategy: str = "tournament") -> Row:
        seeds = max(20, int(seeds * given.share))
        step = max(1, min(500, seeds // (4 * given.processes)))
        jobs = [(strategy, kind, range(low, min(seeds, low + step))) for low in range(0, seeds, step)]
        count: Counter[str] = Counter()
        took: Counter[int] = Counter()
        for one, two in pool.imap_unordered(tally, jobs):
            count.update(one)
            took.update(two)
        return Row(kind, strategy, count, took)

    plan = [
        (Kind(4), 10_000),
        (Kind(4, bad=1), 10_000),
        (Kind(4, links=1), 10_000),
        (Kind(4, flaps=1), 10_000),
        (Kind(8), 10_000),
        (Kind(8, bad=1), 10_000),
        (Kind(8, bad=1, links=1), 10_000),
        (Kind(16), 10_000),
        (Kind(16, bad=1), 10_000),
        (Kind(16, bad=1, links=2), 10_000),
        (Kind(16, flaps=1), 10_000),
        (Kind(64), 10_000),
        (Kind(64, bad=2, links=1), 10_000),
        (Kind(64, bad=8, links=2), 10_000),
        (Kind(256, bad=8, links=2), 10_000),
        (Kind(1024), 1_000),
        (Kind(1024, bad=20), 10_000),
    ]
    rows = [run(kind, seeds) for kind, seeds in plan]
    print("The tournament. Found: warned of or excluded. Links: found with their direction.\n")
    table(
        [
            *("N", "what is wrong", "worlds"),
            *(f"{name} found" for _, name in GRADES),
            *(
                ">=20 % excluded",
                BLAMED,
                "links",
                "noted",
                "false links of 1000 worlds",
                "false notes",
                "fabric-wide",
            ),
        ],
        [
            [
                str(row.kind.nodes),
                str(row.kind),
                f"{row.count['worlds']:,}",
                *(row.recall(name) for _, name in GRADES),
                ratio(row.count["excluded >=20 %"], row.count["bad >=20 %"]),
                row.blamed,
                ratio(row.count["links found"], row.count["links"]),
                ratio(row.count["links noted"], row.count["links"]),
                f"{1e3 * row.count['links wrong'] / row.count['worlds']:.2g}",
                f"{1e3 * row.count['notes wrong'] / row.count['worlds']:.2g}",
                ratio(row.count["wide"], row.count["worlds"]),
            ]
            for row in rows
        ],
    )
    every, screens = tournament.ALL_PAIRS, tournament.SCREENS
    print(f"Up to {every} nodes every link is measured, above that {screens} of a node's. A link that flaps is seen")
    print(
        "when it is slow while it is measured. With more slow nodes than a tenth (8 of 64) the verdict is the fabric:"
    )
    print("they are named and nobody is excluded.\n")

    print("Rounds and seconds from nothing: processes that stay up (15 s, then 6 s a round), or 20 s a round.\n")
    table(
        ["N", "what is wrong", "planned", "mean", "p99", "s at p99", "s at 20 s a round", "wanted"],
        [
            [
                str(row.kind.nodes),
                str(row.kind),
                str(tournament.rounds(row.kind.nodes)),
                f"{row.mean:.1f}",
                str(percentile(row.took, 0.99)),
                f"{seconds(row):.0f}",
                f"{COLD * percentile(row.took, 0.99):.0f}",
                f"<= {WALL[row.kind.nodes]}" if row.kind.nodes in WALL else "",
            ]
            for row in rows
        ],
    )

    print("Worse weather: more noise, more dips.\n")
    harsh = [(Kind(n, bad, noise=noise, dips=dips), 1_000) for n in (4, 16, 64) for bad in (0, 1)
             for noise, dips in ((0.05, 0.05), (0.10, 0.10))]  # fmt: skip
    weather = [run(kind, seeds) for kind, seeds in harsh]
    table(
        [
            *("N", "what is wrong", "worlds", ">=20 % found", "12-20 % found"),
            *(BLAMED, "healthy named of 1000", "fabric-wide"),
        ],
        [
            [
                str(row.kind.nodes),
                str(row.kind),
                f"{row.count['worlds']:,}",
                row.recall(">=20 %"),
                row.recall("12-20 %"),
                row.blamed,
                f"{1e3 * row.count['healthy named'] / row.count['healthy']:.2g}",
                ratio(row.count["wide"], row.count["worlds"]),
            ]
            for row in weather
        ],
    )

    print("Beside what other tools do.\n")
    contest = [
        (Kind(4, bad=1), 2_000),
        (Kind(8, bad=1, links=1), 2_000),
        (Kind(64, bad=2, links=1), 1_000),
        (Kind(64, bad=8, links=2), 1_000),
        (Kind(1024, bad=20), 200),
    ]
    beside = [run(kind, seeds, strategy) for kind, seeds in contest for strategy in STRATEGIES]
    table(
        [
            *("N", "what is wrong", "strategy", ">=20 % found", "12-20 % found"),
            *(BLAMED, "links", "mean rounds"),
        ],
        [
            [
                str(row.kind.nodes),
                str(row.kind),
                row.strategy,
                row.recall(">=20 %"),
                row.recall("12-20 %"),
                row.blamed,
                ratio(row.count["links found"], row.count["links"]),
                f"{row.mean:.1f}",
            ]
            for row in beside
        ],
    )
    pool.close()

    missed = list(misses(rows))
    print(f"{time.monotonic() - start:.0f} s. " + ("Every target is met." if not missed else "Missed:"))
    for line in missed:
        print(f"  {line}")
    return 1 if missed else 0


def seconds(row: Row) -> float:
    planned = tournament.rounds(row.kind.nodes)
    return predicted_seconds(row.kind.nodes, looks=percentile(row.took, 0.99) - planned)


def predicted_seconds(count: int, *, looks: int = tournament.AGREE) -> float:
    """Wall time from nothing: 64 nodes 15 + (6 + 2) x 6 = 63 s.

    A start takes 5 to 15 s, a round with processes that stay up 3 to 6 s (derived, not measured): the longer of both.
    """
    return 15.0 + (tournament.rounds(count) + looks) * 6.0 if count > 1 else 0.0


def misses(rows: Sequence[Row]) -> Iterable[str]:
    """Recall 0.99 and 0.95, one healthy node in a thousand at the upper end of the interval, every link up to 16."""
    for row in rows:
        what = f"N={row.kind.nodes}, {row.kind}: "
        for name, least in ((">=20 %", 0.99), ("12-20 %", 0.95)):
            if row.count[f"bad {name}"] and row.count[f"found {name}"] < least * row.count[f"bad {name}"]:
                yield what + f"{row.recall(name)} of nodes {name} slow found, not {least}"
        if wilson(row.count["healthy excluded"], row.count["healthy"])[1] > 1e-3:
            yield what + f"healthy nodes excluded of 1000: {row.blamed}"
        if (
            row.kind.nodes <= tournament.ALL_PAIRS
            and row.count["links found"] < row.count["links"]
            and not row.kind.flaps
        ):
            yield what + f"{ratio(row.count['links found'], row.count['links'])} of links found"
        if row.kind.nodes in WALL and seconds(row) > WALL[row.kind.nodes]:
            yield what + f"{seconds(row):.0f} s, not {WALL[row.kind.nodes]}"


if __name__ == "__main__":
    sys.exit(main())
