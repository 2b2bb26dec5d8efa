"""Who is slow: rounds of disjoint pairs, and what their directed bandwidths say about nodes and links.

A node that sends slowly is a hot row of the matrix, one that receives slowly a hot column, a slow link one cell.
Up to 16 nodes every pair meets once (circle method: 4 nodes 3 rounds, 16 nodes 15); above, six rounds screen, each
node with six others. Whatever looks slow is then measured again with partners that were good, because a dip
passes: of repeated measurements of a cell the best counts, and a node is named once two partners agree.

Figures are chosen with `make detector`, which simulates this and what other tools do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.preflight import FABRIC, TOO_FEW, Finding, Level, Limit, Matrix
from launcher.preflight.parity import listing

# These are ours, as the lines below: `make detector` shows what they find and whom they blame.
ALL_PAIRS = 16  # nodes up to which every pair meets
SCREENS = 6  # rounds above that
CONFIRMS = 12  # rounds of second looks, at most
AGREE = 2  # partners that have to see it too
DISAGREE = 5  # second looks where a node's own cells lie far apart: its best that much above their median
APART = 0.06  # of the reference. At 2 % noise the best of 17 lies 0.04 above, at 10 % the best of 5 0.12
HOPELESS = 3  # rounds without any data at all
NAMED = 64  # nodes in the matrix of a result, at most, where there are more

# Of the reference, p90 of this run: one pair in ten is faster. With 2 % noise it lies 2.6 % above the mean of healthy
# pairs, so that 0.85 is a node 13 % slow and 0.92 one 6 % slow. With more noise it would lie higher and make healthy
# nodes look slow: then 3 % above the median of pairs without a suspect counts.
EXCLUDES = 0.85
WARNS = 0.92
ABOVE = 1.03
GOOD = 0.95  # one cell this good, and the node can do it: what is slow is a link, or was a dip

SHARE = 0.1  # of the nodes that slowness may exclude, and at least one: beyond that it is not the nodes


@dataclass(frozen=True)
class Localised:
    findings: tuple[Finding, ...]
    matrix: Matrix
    rounds: int
    fabric_wide: bool


def rounds(count: int) -> int:
    """Of a healthy set: 1 for 2 nodes, 3 for 3 or 4, 15 for 16, 6 for 64 or 1024. Second looks come on top."""
    if count < 2:
        return 0
    every = count - 1 + count % 2
    return every if count <= ALL_PAIRS else SCREENS


def circle(count: int) -> list[list[tuple[int, int]]]:
    """Every pair once, disjoint in each round; with an odd count one node rests in each.

    circle(4) is [[(0, 3), (1, 2)], [(1, 3), (2, 0)], [(2, 3), (0, 1)]].
    """
    return [turn(count, number) for number in range(count - 1 + count % 2)] if count > 1 else []


def turn(count: int, number: int) -> list[tuple[int, int]]:
    """Round `number` of circle(count): the last seat stands still while the others move on by one."""
    seats = count + count % 2
    moving = seats - 1
    pairs = [(number, moving)] + [((number + k) % moving, (number - k) % moving) for k in range(1, seats // 2)]
    return [(a, b) for a, b in pairs if a < count and b < count]


def rate(value: float) -> str:
    """rate(43.96) is "44.0 GB/s", rate(0.0051) is "5.10 MB/s"."""
    scaled, unit = (value, "GB/s") if value >= 0.1 else (value * 1e3, "MB/s")
    return f"{scaled:.{1 if scaled >= 10 else 2}f} {unit}"


def middle(values: Sequence[float]) -> float:
    """The median; of two, their mean."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def p90(values: Sequence[float]) -> float:
    """p90([1, 2, 3]) is 2.8; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = 0.9 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Lines:
    """What a cell has to reach."""

    reference: float
    warn: float
    good: float
    exclude: float
    source: str  # of the reference


class Side(NamedTuple):
    """What a node sends, or receives, over its partners."""

    median: float
    best: float


@dataclass(frozen=True)
class View:
    """What the measurements say so far; nodes by index."""

    lines: Lines
    dead: frozenset[int]  # nothing went to or from them, though their partners reach others
    tx: Mapping[int, Side]  # suspects, by what they send
    rx: Mapping[int, Side]
    typical: float  # median of the cells between nodes that are no suspects
    uneven: bool  # most of those are slow beside the best tenth: groups of nodes, not nodes

    @property
    def slow(self) -> set[int]:
        return set(self.tx) | set(self.rx)


@dataclass(frozen=True)
class Link:
    """How often a cell was measured slow and how often good, against what its two ends can do."""

    source: int
    target: int
    slow: int
    good: int
    best: float
    expected: float

    @property
    def down(self) -> bool:
        return self.best == 0 and self.slow >= 2


class Tournament:
    """Call next, measure those pairs, record; until next has none.

    >>> tournament = Tournament(["node1", "node2", "node3"])
    >>> while pairs := tournament.next():
    ...     tournament.record({cell: 40.0 for a, b in pairs for cell in ((a, b), (b, a))})
    >>> tournament.result().findings
    ()
    """

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        limit: Limit | None = None,
        history: Mapping[str, float] = {},
        seed: int = 0,
    ) -> None:
        self.nodes = tuple(nodes)
        self.limit = limit
        self.history = history
        self.index = {node: number for number, node in enumerate(self.nodes)}
        self.seats = list(range(len(self.nodes)))  # another seed, other partners
        random.Random(seed).shuffle(self.seats)  # noqa: S311
        self.planned = rounds(len(self.nodes))
        self.screened = len(self.nodes) > ALL_PAIRS
        self.turns = 0  # of the planned
        self.looks = 0  # rounds of second looks
        self.done = 0
        self.open: list[tuple[int, int]] = []
        self.dropped: set[int] = set()
        self.logs: dict[tuple[int, int], list[float]] = {}
        self.sends: list[dict[int, float]] = [{} for _ in self.nodes]  # the best of each cell
        self.receives: list[dict[int, float]] = [{} for _ in self.nodes]
        self.proofs: dict[int, list[int]] = {}  # partners of second looks
        self.failed = False  # any cell, ever
        self.seen: View | None = None

    def next(self) -> list[tuple[str, str]]:
        """The next round of disjoint pairs, the same one until it is recorded; [] when all is decided."""
        while not self.open and self.turns < self.planned:
            ring = turn(len(self.nodes), self.turns)
            self.turns += 1
            out = self.dropped | self.given_up()
            pairs = [(self.seats[a], self.seats[b]) for a, b in ring]
            self.open = [(a, b) for a, b in pairs if a not in out and b not in out]
        if not self.open and self.looks < CONFIRMS:
            self.open = self.second_look()
            self.looks += bool(self.open)
        return [(self.nodes[a], self.nodes[b]) for a, b in self.open]

    def record(self, cells: Mapping[tuple[str, str], float | None]) -> None:
        """GB/s from a to b for every (a, b) of the round, both ways; 0 or None failed or did not end in time."""
        for (a, b), value in cells.items():
            i, j = self.index[a], self.index[b]
            speed = value if value is not None and math.isfinite(value) and value > 0 else 0.0
            self.failed = self.failed or speed == 0
            self.logs.setdefault((i, j), []).append(speed)
            best = max(speed, self.sends[i].get(j, 0.0))
            self.sends[i][j] = self.receives[j][i] = best
        if self.looks:
            for i, j in self.open:
                self.proofs.setdefault(i, []).append(j)
                self.proofs.setdefault(j, []).append(i)
        self.done += 1
        self.open = []
        self.seen = None

    def drop(self, node: str) -> None:
        """A node that died: it meets nobody any more, and what failed with it is held against nobody."""
        self.dropped.add(self.index[node])
        self.open = [pair for pair in self.open if self.index[node] not in pair]
        self.seen = None

    def total(self) -> int:
        """Rounds expected now: the planned ones, and what is known to need a second look."""
        left = self.planned - self.turns + bool(self.open)
        if self.turns < self.planned or self.looks >= CONFIRMS:
            return self.done + left
        view = self.view()
        lacking = [max(1, AGREE - len(self.proofs.get(i, ()))) for i in view.slow if not self.agreed(view, i)]
        return self.done + max([left, *lacking, bool(self.open or self.doubts(view))])

    # What is slow

    def dead(self) -> frozenset[int]:
        """Nodes that failed with two partners or more that reach others, and reached none."""
        if not self.failed:
            return frozenset()
        reached = {i for i, row in enumerate(self.sends) if any(row.values()) or any(self.receives[i].values())}
        return frozenset(
            i
            for i, row in enumerate(self.sends)
            if i not in reached and i not in self.dropped and len(reached.intersection(row) - self.dropped) >= 2
        )

    def given_up(self) -> frozenset[int]:
        """A node that cannot be reached costs a time-out in every round: after two partners it rests.

        So do all of them where nobody was reached. Nodes of 4 to 16 that fall into two groups, each of which only
        reaches itself, show that within three rounds, whatever the groups; two are too few for that.
        """
        if (
            self.failed
            and self.done >= min(HOPELESS, self.planned + 1)
            and not any(any(row.values()) for row in self.sends)
        ):
            return frozenset(range(len(self.nodes)))
        return self.dead()

    def view(self) -> View:
        if self.seen is None:
            dead = self.dead()
            out = dead | self.dropped
            sends = self.without_blame(self.sends, out)
            receives = self.without_blame(self.receives, out)
            reference = p90([value for row in sends for value in row.values() if value])
            lines = relative(reference)
            tx, rx = suspects(sends, receives, lines)
            typical = median_of_clean(sends, tx, rx) or reference
            if EXCLUDES * reference <= typical < reference / ABOVE:
                reference = ABOVE * typical
                lines = relative(reference, f"{ABOVE - 1:.0%} above the median of this run")
                tx, rx = suspects(sends, receives, lines)
                typical = median_of_clean(sends, tx, rx) or reference
            uneven = self.screened and typical < EXCLUDES * reference
            if uneven:
                reference = typical
                lines = relative(reference, "median of this run")
                tx, rx = suspects(sends, receives, lines)
                typical = median_of_clean(sends, tx, rx) or reference
            if self.limit:
                lines = with_limit(lines, self.limit, typical)
                tx, rx = suspects(sends, receives, lines)
            self.seen = View(lines, dead, tx, rx, typical, uneven)
        return self.seen

    def agreed(self, view: View, i: int) -> bool:
        """Whether enough partners have looked again."""
        apart = APART * view.lines.reference
        wide = any(side[i].best - side[i].median > apart for side in (view.tx, view.rx) if i in side)
        return len(self.proofs.get(i, ())) >= (DISAGREE if wide else AGREE)

    def without_blame(self, rows: list[dict[int, float]], out: frozenset[int] | set[int]) -> list[dict[int, float]]:
        """Without what failed because the other end is dead."""
        if not self.failed:
            return rows
        return [
            {} if i in out else {j: value for j, value in row.items() if value or j not in out}
            for i, row in enumerate(rows)
        ]

    def links(self, view: View, *, settled: bool) -> list[Link]:
        """Cells that were slow for their two ends. `settled` leaves out ends that are still looked at."""
        found = []
        out = view.dead | self.dropped
        waiting = {i for i in view.slow if not self.agreed(view, i)} if settled else set()
        for (i, j), log in self.logs.items():
            expected = view.lines.reference
            if i in view.tx:
                expected = min(expected, view.tx[i].median)
            if j in view.rx:
                expected = min(expected, view.rx[j].median)
            least = EXCLUDES * expected
            if min(log) >= least or i in out or j in out or i in waiting or j in waiting:
                continue
            slow = sum(value < least for value in log)
            found.append(Link(i, j, slow, len(log) - slow, max(log), expected))
        return found

    def doubts(self, view: View) -> list[Link]:
        """Slow once may be a dip, twice of three times a link that flaps. Of very many links some dip twice."""
        again = ((1, 1), (2, 1)) if not self.screened else ((2, 1),)
        return [
            link
            for link in self.links(view, settled=True)
            if ((link.slow, link.good) in again if link.good else link.slow < 3 and not link.down)
        ]

    # Second looks

    def second_look(self) -> list[tuple[int, int]]:
        """Suspects meet good nodes, slow cells are measured again, nodes with a history once more in any case."""
        view = self.view()
        out = self.given_up() | self.dropped
        free = {i for i in range(len(self.nodes)) if i not in out}
        if len(free) < 2:
            return []
        if len(self.measured()) <= 2:
            return self.second_look_at_two()
        pairs: list[tuple[int, int]] = []

        def meet(a: int, b: int) -> None:
            pairs.append((a, b))
            free.difference_update((a, b))

        slow = view.slow
        good = free - slow  # where there are none, everybody is measured again with anybody
        lemons = {self.index[node] for node, score in self.history.items() if score > 0 and node in self.index}
        for i in sorted(slow | lemons, key=lambda i: (len(self.proofs.get(i, ())), i not in slow, i)):
            if i not in free or self.agreed(view, i):
                continue
            partners = (free - slow if good else free) - {i}
            if partners:
                meet(i, self.partner(i, partners, lemons))
        for link in sorted(self.doubts(view), key=lambda link: -link.slow):
            if link.source in free and link.target in free:
                meet(link.source, link.target)
        return pairs

    def partner(self, i: int, among: set[int], lemons: set[int]) -> int:
        """Somebody new, without a history of its own where there is one."""
        met, before, count = self.proofs.get(i, ()), self.sends[i], len(self.nodes)
        ring = [j for step in range(1, count) if (j := (i + step) % count) in among]
        fresh = (j for j in ring if j not in before and j not in lemons)
        found = next(fresh, None)
        return min(ring, key=lambda j: (j in met, j in before, j in lemons)) if found is None else found

    def counted(self) -> dict[tuple[int, int], list[float]]:
        """Without what failed because an end had died."""
        if not self.dropped:
            return self.logs
        return {pair: log for pair, log in self.logs.items() if max(log) or not self.dropped.intersection(pair)}

    def measured(self) -> set[int]:
        return {i for pair in self.counted() for i in pair}

    def second_look_at_two(self) -> list[tuple[int, int]]:
        (a, b), log = min(self.counted().items(), default=((0, 0), []))
        if not log or len(log) > AGREE or self.dropped.intersection((a, b)):
            return []
        there, back = self.sends[a][b], self.sends[b].get(a, 0.0)
        least = max(EXCLUDES * max(there, back), self.limit.passes if self.limit else 0.0)
        return [(a, b)] if min(there, back) < least or there == 0 else []

    # What it means

    def result(self) -> Localised:
        if len(self.measured()) <= 2:
            return self.localised(self.two())
        if not any(any(row.values()) for row in self.sends):
            met = len({frozenset(pair) for pair in self.counted()})
            every = len(self.nodes) - len(self.dropped)
            rest = "" if met >= every * (every - 1) // 2 else " measured so far"
            what = f"none of the {met} pairs of nodes{rest} could exchange data"
            return self.localised([self.fabric(what, measured="every pair failed or ran out of time")])
        view = self.view()
        links = self.links(view, settled=False)
        mute = {i for i in view.slow if worst(view, i) == 0}
        gone = sorted(view.dead | mute)
        apart = self.apart([link for link in links if link.down and not {link.source, link.target} & set(gone)])
        blocks = self.fabric_wide(view, gone, apart, links)
        level: Level = "warn" if blocks else "exclude"
        findings = [self.gone(i, level) for i in gone]
        findings += [self.node(view, i, level) for i in sorted(view.slow - mute)]
        findings += self.left_out(apart, links, level)
        groups = self.groups(links)
        findings += self.between(groups, links)
        side = {i: k for k, group in enumerate(groups) for i in group}
        within = [link for link in links if len(groups) < 2 or side[link.source] == side[link.target]]
        findings += self.link_findings([link for link in within if not {link.source, link.target} & mute])
        findings += self.restless(view, links)
        if view.uneven:
            findings.append(
                Finding(
                    "pairs",
                    "warn",
                    "most pairs of nodes are slow beside the fastest tenth",
                    measured=f"{rate(view.typical)} is typical",
                    expected=f">= {rate(EXCLUDES * self.best())}",
                    source=f"{EXCLUDES:.0%} of {rate(self.best())}, p90 of this run",
                    fix="no node is to blame: nodes under several switches, or links between them that others use",
                )
            )
        if self.limit and self.limit.excludes <= view.typical < self.limit.passes:
            findings.append(
                Finding(
                    "pairs",
                    "warn",
                    "pairs of nodes are slower than this fabric should be, everywhere",
                    measured=f"{rate(view.typical)} is typical",
                    expected=f">= {rate(self.limit.passes)}",
                    source=self.limit.source,
                    fix="no node is to blame: look at the fabric's settings and at other jobs on it",
                )
            )
        gone_by_itself = {self.nodes[i] for i in self.dropped}  # whoever dropped it has said why
        return self.localised([one for one in blocks + findings if not {one.node, one.peer} & gone_by_itself])

    def fabric_wide(
        self, view: View, gone: Sequence[int], apart: Sequence[int], links: Sequence[Link]
    ) -> list[Finding]:
        """Why it is not single nodes, if it is not."""
        found = []
        count = len(self.nodes)
        cap = max(1, int(SHARE * count))
        at_most = {"expected": f"at most {cap}", "source": "a tenth of the nodes, at least one"}
        if len(gone) * 2 > count - len(self.dropped):
            what = f"{len(gone)} of {count} nodes cannot exchange data"
            found.append(self.fabric(what, measured=listing([self.nodes[i] for i in gone])))
        if self.limit and view.typical < self.limit.excludes:
            found.append(
                self.fabric(
                    "pairs of nodes are slow everywhere",
                    measured=f"{rate(view.typical)} is typical, {rate(self.best())} the best tenth",
                    expected=f">= {rate(self.limit.passes)}, not under {rate(self.limit.excludes)}",
                    source=self.limit.source,
                )
            )
        slow = [i for i in sorted(view.slow) if worst(view, i) > 0 and too_slow(view, i) and self.agreed(view, i)]
        if len(slow) > cap:
            what = f"{len(slow)} of {count} nodes are slow, too many for it to be the nodes"
            found.append(self.fabric(what, measured=listing([self.nodes[i] for i in slow]), **at_most))
        if len(apart) > cap:
            what = f"{sum(link.down for link in links)} links between working nodes are down"
            found.append(self.fabric(what, measured=f"{len(apart)} nodes would have to stay out", **at_most))
        return found

    def best(self) -> float:
        return p90([value for row in self.sends for value in row.values() if value])

    def localised(self, findings: list[Finding]) -> Localised:
        wide = any(finding.level == "block" and finding.code == FABRIC for finding in findings)
        return Localised(tuple(findings), self.matrix(findings), self.done, wide)

    def matrix(self, findings: Sequence[Finding]) -> Matrix:
        """Of up to 64 nodes all; of more, those that findings name and whom they met."""
        shown = list(range(len(self.nodes)))
        if len(shown) > NAMED:
            named = [self.index[node] for one in findings for node in (one.node, one.peer) if node]
            met = [j for i in named for j in self.sends[i]]
            shown = sorted(list(dict.fromkeys(named + met))[:NAMED])
        lines = self.view().lines
        return Matrix(
            nodes=tuple(self.nodes[i] for i in shown),
            cells=tuple(tuple(self.sends[i].get(j) for j in shown) for i in shown),
            reference=lines.reference,
            source=lines.source,
            warn=lines.warn,
            exclude=lines.exclude,
        )

    def two(self) -> list[Finding]:
        """One pair cannot tell its ends apart: neither is named."""
        a, b = min(self.counted(), default=(0, 0))
        if a == b or self.dropped.intersection((a, b)):
            return []
        there, back = self.sends[a][b], self.sends[b].get(a, 0.0)
        pair = f"{self.nodes[a]} and {self.nodes[b]}"
        both = f"{rate(there)} there, {rate(back)} back"
        if not there and not back:
            return [self.fabric(f"{pair} cannot exchange data", measured="every attempt failed or ran out of time")]
        if self.limit and max(there, back) < self.limit.excludes:
            return [
                self.fabric(
                    f"{pair}: pair slow, not localised",
                    measured=both,
                    expected=f">= {rate(self.limit.passes)}, not under {rate(self.limit.excludes)}",
                    source=self.limit.source,
                )
            ]
        least = max(EXCLUDES * max(there, back), self.limit.excludes if self.limit else 0.0)
        for i, j, speed in ((a, b, there), (b, a, back)):
            if speed < least:
                beside = f"{EXCLUDES:.0%} of the other direction"
                return [
                    Finding(
                        "pairs",
                        "block",
                        f"{self.nodes[i]} -> {self.nodes[j]}: pair slow, not localised: "
                        f"{self.nodes[i]} sends slowly or {self.nodes[j]} receives slowly",
                        measured=both,
                        expected=f">= {rate(least)}",
                        source=self.limit.source if self.limit and least == self.limit.excludes else beside,
                        fix="a third node tells which end it is: spares: 1 in the job file",
                        code=TOO_FEW,
                    )
                ]
        if self.limit and min(there, back) < self.limit.passes:
            return [
                Finding(
                    "pairs",
                    "warn",
                    f"{pair}: pair slower than expected, not localised",
                    measured=both,
                    expected=f">= {rate(self.limit.passes)}",
                    source=self.limit.source,
                    fix="a third node tells which end it is: spares: 1 in the job file",
                )
            ]
        return []

    def fabric(self, what: str, *, measured: str = "", expected: str = "", source: str = "") -> Finding:
        fix = "look at the fabric and its settings (NCCL_* of the job, switches, subnet manager), not at single nodes"
        return Finding(
            "pairs", "block", what, measured=measured, expected=expected, source=source, fix=fix, code=FABRIC
        )

    def gone(self, i: int, level: Level) -> Finding:
        node = self.nodes[i]
        view = self.view()
        partners = [self.nodes[j] for j in {**self.sends[i], **self.receives[i]} if j not in view.dead | self.dropped]
        verb = "cannot be reached by" if i not in view.slow else "cannot send to" if i in view.tx else "cannot hear"
        return Finding(
            "pairs",
            level,
            f"{node} {verb} other nodes, which reach each other",
            node=node,
            measured=f"failed or ran out of time with {listing(partners)}",
            expected=rate(view.lines.reference),
            source="what other pairs of this run have",
            fix=f"check link state, addresses and firewall of {node}",
        )

    def node(self, view: View, i: int, level: Level) -> Finding:
        node = self.nodes[i]
        value = worst(view, i)
        ways = [way for way, side in (("sends", view.tx), ("receives", view.rx)) if i in side]
        signs = "/".join(sign for sign, side in (("tx", view.tx), ("rx", view.rx)) if i in side)
        again = self.proofs.get(i, [])
        repeated = f"again with {listing({self.nodes[j] for j in again})}" if again else "not repeated"
        slow = too_slow(view, i)
        line = view.lines.exclude if slow else view.lines.warn
        return Finding(
            "pairs",
            level if slow and self.agreed(view, i) else "warn",
            f"{node} {' and '.join(ways)} slowly ({signs})",
            node=node,
            measured=f"{rate(value)}, median of {len(self.sends[i])} partners, {repeated}",
            expected=f">= {rate(line)}",
            source=self.source(view, line),
            fix=f"check cable, port and NIC of {node}; `dslaunch preflight --drain` takes it out of the queue",
        )

    def source(self, view: View, line: float) -> str:
        if self.limit and line in (self.limit.passes, self.limit.excludes):
            return self.limit.source
        return f"{line / view.lines.reference:.0%} of {rate(view.lines.reference)}, {view.lines.source}"

    def link_findings(self, links: Sequence[Link]) -> list[Finding]:
        """A link that was slow every time, one that is slow now and then, and not one that was slow once."""
        found = []
        for link in links:
            a, b = self.nodes[link.source], self.nodes[link.target]
            times = f"{link.slow} of {link.slow + link.good} times"
            level: Level = "warn"
            if link.slow < 2 or (self.screened and link.slow <= link.good):
                continue
            if link.down:
                what, measured = "is down, though both reach other nodes", f"failed {times}"
            elif not link.good:
                what, measured = (
                    "is slow, though both are fast with other nodes",
                    f"{rate(link.best)} at best, {times}",
                )
            else:
                what, measured = f"was slow {times}", f"{rate(min(self.logs[link.source, link.target]))} at worst"
                level = "warn" if link.slow > link.good else "note"
            least = EXCLUDES * link.expected
            found.append(
                Finding(
                    "pairs",
                    level,
                    f"link {a} -> {b} {what}",
                    node=a,
                    peer=b,
                    measured=measured,
                    expected=f">= {rate(least)}",
                    source=f"{EXCLUDES:.0%} of {rate(link.expected)}, what its ends have with others",
                    fix=f"check the path from {a} to {b}: switch port, cable between leaves, routing",
                )
            )
        return found

    def groups(self, links: Sequence[Link]) -> list[list[int]]:
        """Nodes by who is fast with whom, where that makes two groups of two nodes or more: two switches, say."""
        if self.screened:
            return []
        slow = {frozenset((link.source, link.target)) for link in links if link.slow >= 2}
        left = list(range(len(self.nodes)))
        found = []
        while left:
            group = [left.pop(0)]
            for i in group:
                near = [
                    j for j in left if j in {**self.sends[i], **self.receives[i]} and frozenset((i, j)) not in slow
                ]
                group += near
                left = [j for j in left if j not in near]
            found.append(sorted(group))
        return found if len(found) > 1 and all(len(group) > 1 for group in found) else []

    def between(self, groups: Sequence[Sequence[int]], links: Sequence[Link]) -> list[Finding]:
        if not groups:
            return []
        side = {i: k for k, group in enumerate(groups) for i in group}
        across = [link.best for link in links if side[link.source] != side[link.target]]
        if not across:  # they never met: a node between them went away
            return []
        sides = " | ".join(listing([self.nodes[i] for i in group]) for group in groups)
        return [
            Finding(
                "pairs",
                "warn",
                f"slow between {sides}, fast within",
                measured=f"{rate(middle(across))} across",
                expected=rate(self.view().lines.reference),
                source="what pairs of one group have",
                fix="no node is to blame: look at the links between their switches",
            )
        ]

    def apart(self, down: Sequence[Link]) -> list[int]:
        """Nodes to leave out so that no dead link is left: the end with most, else with a history, else the later."""
        chosen = []
        left = [(link.source, link.target) for link in down]
        while left:
            ends = [end for pair in left for end in pair]
            most = max(set(ends), key=lambda i: (ends.count(i), self.history.get(self.nodes[i], 0.0), i))
            chosen.append(most)
            left = [pair for pair in left if most not in pair]
        return sorted(chosen)

    def left_out(self, chosen: Sequence[int], links: Sequence[Link], level: Level) -> list[Finding]:
        found = []
        for i in chosen:
            down = [{link.source, link.target} for link in links if link.down and i in (link.source, link.target)]
            others = listing({self.nodes[j] for ends in down for j in ends - {i}})
            found.append(
                Finding(
                    "pairs",
                    level,
                    f"{self.nodes[i]} stays out because one end of a dead link has to; it may be healthy",
                    node=self.nodes[i],
                    measured=f"no data between {self.nodes[i]} and {others}",
                    expected=rate(self.view().lines.reference),
                    source="what other pairs of this run have",
                    fix=f"check the path between {self.nodes[i]} and {others}",
                )
            )
        return found

    def restless(self, view: View, links: Sequence[Link]) -> list[Finding]:
        """A node that was slow with several partners and fast when looked at again: told, not excluded."""
        named = {(link.source, link.target) for link in links if link.slow >= 2}
        counts: dict[tuple[int, str], list[int]] = {}
        for link in links:
            if (link.source, link.target) not in named:
                for i, way in ((link.source, "sent"), (link.target, "received")):
                    counts.setdefault((i, way), []).append(link.slow)
        found = []
        for (i, way), slow in sorted(counts.items()):
            rows = self.sends[i] if way == "sent" else self.receives[i]
            tries = sum(len(self.logs[(i, j) if way == "sent" else (j, i)]) for j in rows)
            if i not in view.slow and len(slow) >= 3 and sum(slow) * 3 >= tries:
                found.append(
                    Finding(
                        "pairs",
                        "warn",
                        f"{self.nodes[i]} {way} slowly {sum(slow)} of {tries} times, then not any more",
                        node=self.nodes[i],
                        measured=f"slow with {len(slow)} partners",
                        expected="the same speed each time",
                        source="this run",
                        fix=f"look for other work on {self.nodes[i]}, throttling, or a port that flaps",
                    )
                )
        return found


def worst(view: View, i: int) -> float:
    return min(side[i].median for side in (view.tx, view.rx) if i in side)


def too_slow(view: View, i: int) -> bool:
    """Its cells lie under the line, and not one of them is as it should be."""
    sides = [side[i] for side in (view.tx, view.rx) if i in side]
    return any(side.median < view.lines.exclude and side.best < view.lines.warn for side in sides)


def relative(reference: float, source: str = "p90 of this run") -> Lines:
    return Lines(reference, WARNS * reference, GOOD * reference, EXCLUDES * reference, source)


def median_of_clean(sends: Sequence[Mapping[int, float]], tx: Container[int], rx: Container[int]) -> float:
    clean = [v for i, row in enumerate(sends) if i not in tx for j, v in row.items() if v and j not in rx]
    return middle(clean) if clean else 0.0


def with_limit(lines: Lines, limit: Limit, typical: float) -> Lines:
    """The table's lines, where typical cells reach them; where they do not, no single node is to blame for it."""
    warn, good, exclude = lines.warn, lines.good, lines.exclude
    if typical >= limit.passes:
        warn, good = max(warn, limit.passes), max(good, limit.passes)
    if typical >= limit.excludes:
        exclude = max(exclude, limit.excludes)
        warn, good = max(warn, exclude), max(good, exclude)
    return Lines(lines.reference, warn, good, exclude, lines.source)


def suspects(
    sends: Sequence[Mapping[int, float]], receives: Sequence[Mapping[int, float]], lines: Lines
) -> tuple[dict[int, Side], dict[int, Side]]:
    """Rows and columns that are slow with everybody, each with its median over ends that are not suspects themselves.

    One good cell clears a node: three slow links of four are links.
    """

    def hot(which: Iterable[int], rows: Sequence[Mapping[int, float]], others: Container[int]) -> dict[int, Side]:
        found = {}
        for i in which:
            values: Sequence[float] = list(rows[i].values())
            if len(values) < 2:
                continue
            if others:
                rest = [value for j, value in rows[i].items() if j not in others]
                values = rest if len(rest) >= 2 else values
            if max(values) < lines.good and (half := middle(values)) < lines.warn:
                found[i] = Side(half, max(values))
        return found

    every = range(len(sends))
    tx, rx = hot(every, sends, ()), hot(every, receives, ())
    if not tx and not rx:
        return {}, {}
    met_rx = sorted({i for j in rx for i in receives[j]}.union(tx))
    met_tx = sorted({j for i in tx for j in sends[i]}.union(rx))
    return hot(met_rx, sends, rx), hot(met_tx, receives, tx)
