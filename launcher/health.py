"""A preflight's verdict as one HTML page: who trains, what is wrong with the others, and what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import median

from launcher import charts, preflight, verdicts
from launcher.charts import Bar, Chart, HeatMap, Line, Plot
from launcher.checks import vote
from launcher.page import Html, folded, join, section, table, tag
from launcher.page import page as document
from launcher.plan.setup import Part
from launcher.preflight import Curve, Limit, Matrix, Setting, Verdict
from launcher.report import STYLE as FIGURES
from launcher.report import figure
from launcher.verdicts import Block

Ends = tuple[float | None, float | None]  # GB/s that a node sends, and receives

EVERY = 32  # nodes up to which each has its row
LONG = 40  # findings shown before the rest is folded
OWN = 16  # values of a fact that are spelt out
FEW = 3  # nodes whose values are spelt out even where each has its own

MARKS = {  # of a verdict, and of what was found: a sign, and its colour
    preflight.OK: ("\u2713", "fits", "healthy"),
    preflight.OK_WITHOUT: ("!", "tight", "healthy without the excluded nodes"),
    preflight.TOO_FEW: ("\u2715", "over", "too few healthy nodes"),
    preflight.DIFFERS: ("\u2715", "over", "the environment differs"),
    preflight.FABRIC: ("\u2715", "over", "the fabric is slow"),
    preflight.COULD_NOT: ("\u2715", "over", "no verdict"),
}
KINDS = {
    "exclude": ("\u2715", "over"),
    "block": ("\u2715", "over"),
    "warn": ("!", "tight"),
    "unknown": ("?", "tight"),
    "note": ("\u00b7", "soft"),
}


def page(verdict: Verdict, setting: Setting | None = None) -> str:
    """One self-contained page; the same verdict gives the same bytes."""
    name = setting.name if setting else "preflight"
    return document(
        f"{name}: preflight",
        charts.HATCH,
        charts.BLANK,
        tag("h1", name if setting else "Preflight"),
        tag("p", _asked(verdict, setting), class_="soft"),
        _headline(verdict),
        _findings(verdict),
        _nodes(verdict),
        _between(verdict),
        _curves(verdict, setting),
        _inventory(verdict),
        _tickets(verdict),
        _stages(verdict),
        style=charts.STYLE + FIGURES + charts.MAP_STYLE + STYLE,
    )


def _asked(verdict: Verdict, setting: Setting | None) -> str:
    """Preflight of 5 nodes for a job on 4, 8 x h100-80gb each, over infiniband with nccl"""
    said = f"Preflight of {verdicts.count(verdict.nodes)}"
    if not setting:
        return said
    if setting.nodes != len(verdict.nodes):
        said += f" for a job on {setting.nodes}"
    if setting.gpus:
        said += f", {setting.gpus} x {setting.gpu or 'GPU'} each"
    over = f" over {setting.fabric}" if setting.fabric else ""
    return f"{said},{over} with {setting.backend}"


def _headline(verdict: Verdict) -> Html:
    sign, kind, word = MARKS.get(verdict.code, ("?", "tight", "unknown verdict"))
    healthy = len(verdict.nodes) - len({one.node for one in verdict.findings if one.level == "exclude" and one.node})
    spare = len(verdict.nodes) - len(verdict.excluded) - len(verdict.train)
    figures: list[tuple[str, str, str]] = []
    if verdict.code != preflight.COULD_NOT:
        trains = f"{len(verdict.train)} train" + (f", {spare} spare" if spare and verdict.train else "")
        figures.append(
            ("healthy nodes", f"{healthy} of {len(verdict.nodes)}", trains if verdict.train else "none train")
        )
    if verdict.bandwidth:
        figures.append(("bus bandwidth", f"{figure(verdict.bandwidth)} GB/s", verdicts.by(verdict).strip(" ()")))
    if verdict.stages:
        said = f"{verdict.rounds} rounds of pairs" if verdict.rounds else f"{len(verdict.stages)} stages"
        figures.append(("took", verdicts.seconds(sum(verdict.stages.values())), said))
    figures.append(("exit code", str(verdict.code), verdicts.means(verdict.code)))
    cells = (
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", says, class_="soft")))
        for name, value, says in figures
    )
    paste = verdicts.to_paste(verdict)
    return join(
        (
            tag(
                "p",
                tag("span", tag("span", sign, aria_hidden="true"), f" {word}", class_=f"verdict {kind}"),
                class_="lead",
            ),
            tag("p", verdict.headline, class_="said"),
            tag("dl", *cells, class_="figures"),
            tag("p", "For the job file, as measured: ", tag("code", paste), class_="paste") if paste else "",
        )
    )


def _findings(verdict: Verdict) -> Html:
    found = verdicts.blocks(verdict)
    if not found:
        return Html("")
    told, notes = (
        [one for one in found if one.finding.level != "note"],
        [one for one in found if one.finding.level == "note"],
    )
    first, more = verdicts.cut(told, most=LONG)
    rest = [one for one in told if one not in first]
    return section(
        "Findings",
        _table(first, verdict, "What was found, worst first"),
        folded(f"{len(rest)} more of the same kinds", _table(rest, verdict, "Further findings")) if more else "",
        folded(f"{len(notes)} notes" if len(notes) > 1 else "1 note", _table(notes, verdict, "Notes"))
        if notes
        else "",
    )


def _table(blocks: Sequence[Block], verdict: Verdict, caption: str) -> Html:
    head = ("Node", "What", "Measured", "Expected", "Source", "What to do")
    rows = []
    for block in blocks:
        finding = block.finding
        sign, kind = KINDS[finding.level]
        word = tag(
            "span",
            tag("span", sign, aria_hidden="true"),
            f" {verdicts.level(finding, verdict)}",
            class_=f"verdict {kind}",
        )
        what = join((word, f" {finding.what} ", tag("span", f"({finding.check})", class_="soft")))
        rows.append(
            (
                verdicts.who(block, arrow="\u2192"),
                what,
                finding.measured,
                finding.expected,
                finding.source,
                finding.fix,
            )
        )
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows], caption=caption, cards=True)


def _nodes(verdict: Verdict) -> Html:
    """Every node; of many only those with something to say."""
    told = {one.node for one in verdict.findings if one.level != "note"} | {one.peer for one in verdict.findings}
    named = verdict.nodes if len(verdict.nodes) <= EVERY else [node for node in verdict.nodes if node in told]
    ends = between(verdict.matrix) if verdict.matrix else {}
    rows = [
        (node, _state(verdict, node), *(_rate(value, verdict.matrix) for value in ends.get(node, (None, None))))
        for node in named
    ]
    head = ["Node", "State", "Sends, GB/s", "Receives, GB/s"]
    if not ends:
        head, rows = head[:2], [row[:2] for row in rows]
    others = [node for node in verdict.nodes if node not in named]
    said = f"{verdicts.nodes(others)}: nothing was found" if others else ""
    says = "Medians over its partners" if ends else "Who trains"
    return section(
        "Nodes",
        table(head, rows, caption=says, cards=True),
        tag("p", said, class_="soft") if said else "",
    )


def _rate(value: float | None, matrix: Matrix | None) -> Html:
    """Its sign beside the colour: nobody has to see red."""
    if value is None or matrix is None:
        return Html("\u2013")
    kind = "over" if value < matrix.exclude else "tight" if value < matrix.warn else ""
    sign = {"over": "\u2715 ", "tight": "! "}.get(kind, "")
    return tag("span", sign + (figure(value) if value > 0 else "failed"), class_=f"number {kind}".rstrip())


def _state(verdict: Verdict, node: str) -> Html:
    levels = {
        verdicts.level(one, verdict): one.level for one in verdict.findings if one.node == node and not one.peer
    }
    if node in verdict.excluded:
        sign, kind, word = "\u2715", "over", "excluded"
    elif "unfit" in levels:
        sign, kind, word = "\u2715", "over", "unfit"
    elif "block" in levels.values():
        sign, kind, word = "\u2715", "over", "blocks the start"
    elif node in verdict.train:
        sign, kind, word = (
            ("!", "tight", "trains, with a warning") if "warn" in levels.values() else ("\u2713", "fits", "trains")
        )
    elif verdict.train:
        sign, kind, word = "\u2713", "fits", "spare"
    elif "warn" in levels.values():
        sign, kind, word = "!", "tight", "warning"
    elif "unknown" in levels.values() or not verdict.stages:
        sign, kind, word = "?", "tight", "not seen"
    else:
        sign, kind, word = "\u2713", "fits", "nothing found"
    return tag("span", tag("span", sign, aria_hidden="true"), f" {word}", class_=f"verdict {kind}")


# Between the nodes


def between(matrix: Matrix) -> dict[str, Ends]:
    """node -> the medians of what it sends and receives."""
    found = {}
    for i, (node, row, column) in enumerate(
        zip(matrix.nodes, matrix.cells, zip(*matrix.cells, strict=True), strict=True)
    ):
        ways = ([value for value in (*way[:i], *way[i + 1 :]) if value is not None] for way in (row, column))
        sends, receives = (median(some) if some else None for some in ways)
        found[node] = (sends, receives)
    return found


def steps(matrix: Matrix) -> tuple[float, ...]:
    """Where a warmer colour ends: quarters of what excludes, it itself, what warns, half-way to a healthy cell."""
    low, middle = matrix.exclude, max(matrix.warn, matrix.exclude)
    return (low / 4, low / 2, 0.75 * low, low, middle, max(middle, (middle + matrix.reference) / 2))


def outlined(verdict: Verdict, matrix: Matrix) -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, str]]]:
    """Rows and columns of nodes that were found slow, by the way they are slow; cells of links."""
    found = [one for one in verdict.findings if one.check == "pairs" and one.level in ("warn", "exclude", "block")]
    slow = {one.node for one in found if one.node and not one.peer}
    ends = between(matrix)
    rows, columns = (
        frozenset(
            node for node in slow & ends.keys() if (value := ends[node][way]) is not None and value < matrix.warn
        )
        for way in (0, 1)
    )
    return rows, columns, frozenset((one.node, one.peer) for one in found if one.peer)


def _between(verdict: Verdict) -> Html:
    matrix = verdict.matrix
    if not matrix or len(matrix.nodes) < 2:
        return Html("")
    rows, columns, pairs = outlined(verdict, matrix)
    drawing = replace(_drawing(matrix), rows=rows, columns=columns, pairs=pairs)
    marks = [
        f"outlined {what}: {which}"
        for what, which in (
            ("rows send slowly", verdicts.folded(sorted(rows))),
            ("columns receive slowly", verdicts.folded(sorted(columns))),
            ("cells are slow links", ", ".join(f"{one} \u2192 {other}" for one, other in sorted(pairs))),
        )
        if which
    ]
    said = ["Each row sends, each column receives."]
    if (each := len(drawing.bins[0])) > 1:
        said.append(f"Each square is {each} x {each} nodes and has the colour of its slowest pair.")
    if matrix.reference:
        said.append(f"A healthy pair has {figure(matrix.reference)} GB/s ({matrix.source}).")
    if matrix.warn:
        said.append(f"Under {figure(matrix.warn)} warns, under {figure(matrix.exclude)} excludes once confirmed.")
    return section(
        "Bandwidth between nodes",
        tag("p", " ".join(said), class_="soft"),
        *(tag("p", mark[0].upper() + mark[1:] + ".") for mark in marks),
        drawing.key(),
        *(_tiles(drawing, between(matrix), frozenset(verdict.excluded)) if len(matrix.nodes) > EVERY else ()),
        drawing.picture(),
    )


def _tiles(drawing: HeatMap, ends: Mapping[str, Ends], marked: frozenset[str]) -> tuple[Html, ...]:
    said = "Each square is a node: the median of what it sends at the left, of what it receives at the right"
    more = "; the excluded are outlined" if marked & ends.keys() else ""
    return (
        tag("h3", "By node"),
        tag("p", f"{said}{more}.", class_="soft"),
        drawing.tiles(ends, marked=marked),
        tag("h3", "By pair"),
    )


def _drawing(matrix: Matrix) -> HeatMap:
    return HeatMap(matrix.nodes, matrix.cells, steps(matrix), "GB/s", figure, fold=verdicts.folded)


def _curves(verdict: Verdict, setting: Setting | None) -> Html:
    """A plot for each operation measured at several sizes, and the figures of all."""
    limit = setting.whole if setting else None
    plots = [
        tag("div", tag("h3", curve.op), _plot(curve, limit if limit and limit.op == curve.op else None))
        for curve in verdict.curves
        if len(curve.bytes) > 1
    ]
    rows = [
        (curve.op, verdicts.size(size), figure(rate), figure(tail))
        for curve in verdict.curves
        for size, rate, tail in zip(curve.bytes, curve.busbw, curve.p99, strict=True)
    ]
    head = ("operation", "size", "GB/s", "p99, GB/s")
    caption = "Bus bandwidth: median over iterations, minimum over ranks; p99 is the slowest iteration in a hundred"
    numbers = table(head, rows, caption=caption, numbers=True)
    if not rows:
        return Html("")
    return section(
        "All nodes together",
        tag(
            "p",
            "Bus bandwidth of the healthy nodes; the dashed line is the slowest iteration in a hundred (p99).",
            class_="soft",
        )
        if plots
        else "",
        tag("div", *plots, class_="plots") if plots else "",
        folded("Figures", numbers) if plots else numbers,
    )


def _plot(curve: Curve, limit: Limit | None) -> Html:
    lines = (
        Line(f"{curve.op} p99", tuple(zip(map(float, curve.bytes), curve.p99, strict=True)), dashed=True),
        Line(curve.op, tuple(zip(map(float, curve.bytes), curve.busbw, strict=True))),
    )
    band = (limit.excludes, limit.passes, float(limit.bytes)) if limit else None
    says = (
        f"at {verdicts.size(limit.bytes)} {figure(limit.passes)} passes and under {figure(limit.excludes)} excludes "
        f"({limit.source})"
        if limit
        else ""
    )
    return Plot(lines, "message size", "GB/s", figure, verdicts.size, band, says).picture()


# What the nodes are made of


def _inventory(verdict: Verdict) -> Html:
    facts = list(dict.fromkeys(chain.from_iterable(verdict.inventory.values())))
    if not facts:
        return Html("")
    values = {fact: {node: _value(had.get(fact)) for node, had in verdict.inventory.items()} for fact in facts}
    differ = sorted(
        (fact for fact in facts if len({*values[fact].values()}) > 1), key=lambda fact: _strange(values[fact])
    )
    rows = [(fact, *_odd(values[fact])) for fact in differ]
    every = [(fact, _spread(values[fact])) for fact in facts]
    where = verdicts.count([*verdict.inventory])
    same = f"{len(facts) - len(differ)} of {len(facts)} facts are the same on {where}."
    return section(
        "Inventory",
        tag("p", same, class_="soft"),
        table(("Fact", "Most nodes", "The others"), rows, caption="Where nodes differ", cards=True),
        folded("All facts", table(("Fact", "Value"), every, caption="Every fact of every node", cards=True)),
    )


def _value(value: object) -> str:
    """What a node did not tell, and what it has as an empty text, are two things."""
    return "not seen" if value is None else str(value) or "(empty)"


def _strange(values: Mapping[str, str]) -> tuple[bool, int]:
    """A majority and few others first; what every node has of its own last."""
    found = vote(values)
    return found.tied, len(found.odd) or len({*values.values()})


def _odd(values: Mapping[str, str]) -> tuple[object, object]:
    """("0.19.8", "0.19.6 on node3"); with no majority all values are on the right."""
    found = vote(values)
    if found.tied:
        own = len({*values.values()}) == len(values) > 2
        return tag("span", "each its own" if own else "no majority", class_="soft"), _spread(values)
    return str(found.common), _spread({node: value for node, value in values.items() if node in found.odd})


def _spread(values: Mapping[str, str]) -> Html:
    """0.19.8 on node[1-2]; 0.19.6 on node3. Where every node has its own, the first and the last."""
    counts = Counter(values.values()).most_common()
    if len(counts) > OWN or len(counts) == len(values) > FEW:
        ordered = sorted((value for value, _ in counts), key=verdicts.natural)
        return tag("span", f"{len(counts):,} values, from {ordered[0]} to {ordered[-1]}")
    lines = [
        join(
            (
                tag("b", value),
                tag("span", f" on {verdicts.folded(n for n in values if values[n] == value)}", class_="soft"),
            )
        )
        for value, _ in counts
    ]
    return join(lines, tag("br"))


# The rest


def _tickets(verdict: Verdict) -> Html:
    made = verdicts.tickets(verdict)
    shown = [folded(subject.replace("->", "\u2192"), tag("pre", text, tabindex="0")) for subject, text in made]
    return (
        section("Tickets", tag("p", "Ready to paste, for whoever repairs the hardware.", class_="soft"), *shown)
        if shown
        else Html("")
    )


def _stages(verdict: Verdict) -> Html:
    if not sum(verdict.stages.values()):
        return Html("")
    parts = tuple(Part(stage, verdict.stages[stage], "") for stage in verdicts.ordered(verdict.stages))
    said = verdicts.seconds(sum(verdict.stages.values()))
    chart = Chart((Bar("all stages", parts, said),), "seconds", _seconds)
    return section("Where the time went", chart.picture(), _key(chart, parts))


def _key(chart: Chart, parts: Sequence[Part]) -> Html:
    items = (tag("li", chart.key(part.name), f" {verdicts.seconds(part.value)}") for part in parts if part.value > 0)
    return tag("ul", *items, class_="scale")


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{math.ceil(value):,}"


STYLE = """
.lead .verdict { white-space: normal }
@media (max-width: 42rem) { .cards td:empty { display: none } }
.paste { margin-top: 1.25rem } .paste code { background: var(--panel); padding: .2rem .45rem; white-space: nowrap }
.plots figure { max-width: 44rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem }
.plots h3 { margin-top: 1rem }
"""
