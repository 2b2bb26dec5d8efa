"""What a preflight says, as text: the verdict's table, a ticket for whoever repairs the node, lines of progress."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from launcher import preflight
from launcher.errors import UserError
from launcher.hostfile import fold
from launcher.preflight import STAGES, Finding, Limit, Matrix, Setting, Verdict
from launcher.report import figure
from launcher.show import WIDTH, plain, span

MEANS = {
    preflight.OK: "every node that is needed is healthy: training may start",
    preflight.OK_WITHOUT: "enough healthy nodes without the excluded ones: training may start",
    preflight.TOO_FEW: "too few healthy nodes: nothing starts",
    preflight.DIFFERS: "the environment differs across nodes: nothing starts",
    preflight.FABRIC: "the fabric or its settings, not single nodes: nobody is excluded, and nothing starts",
    preflight.COULD_NOT: "there is no verdict: nothing starts",
}
LEVELS = {
    "exclude": "excluded",
    "block": "blocks the start",
    "warn": "warning",
    "unknown": "not seen",
    "note": "note",
}
ORDER = tuple(LEVELS)
MOST = 8  # findings of one kind: the others are named in one line
FEWEST = 8  # columns of a cell, however narrow the terminal
PARTNERS = 8  # of a ticket's figures: further ones say nothing new

# How to see it again, for someone who has the node and not our program.
REPEAT = {
    "addresses": "getent ahosts $(hostname); ip -brief address",
    "clock": "timedatectl",
    "memory": "free -g; df -h /dev/shm",
    "storage": "df -h; dmesg -T | grep -iE 'i/o error|remount'",
    "processes": "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
    "gpus": "nvidia-smi -q -d ECC,PAGE_RETIREMENT,ROW_REMAPPER",
    "xids": "dmesg -T | grep -E 'NVRM: Xid|SXid'",
    "nvlink-bandwidth": "all_reduce_perf -b 8G -e 8G -g $(nvidia-smi -L | wc -l)",
    "nvlink": "nvidia-smi nvlink --status; nvidia-smi nvlink --errorcounters",
    "ports": "ibstat; rdma link show; perfquery -x",
    "filesystems": "findmnt -o TARGET,SOURCE,FSTYPE,OPTIONS",
    "gemm": "dcgmi diag -r 3",
    "dcgm": "dcgmi diag -r 3",
}


@dataclass(frozen=True)
class Block:
    """What was found alike on several nodes."""

    nodes: tuple[str, ...]
    finding: Finding


def table(verdict: Verdict, setting: Setting | None = None, *, width: int = WIDTH) -> str:
    """Six lines where all is well; what was found stands between the headline and them."""
    parts = _wrap(plain(verdict.headline), width)
    if verdict.findings:
        parts += ["", *_findings(verdict, width), ""]
    return "\n".join([*parts, *_grid(summary(verdict, setting), width=width)])


def summary(verdict: Verdict, setting: Setting | None = None) -> list[tuple[str, str]]:
    """Who was checked, what that took, and what follows: ("train on", "3 nodes: node[1-2,4]"), ..."""
    spare = [node for node in verdict.nodes if node not in {*verdict.train, *verdict.excluded}]
    rows = [("checked" if verdict.stages else "asked for", nodes(verdict.nodes))]
    if verdict.excluded:
        rows.append(("excluded", nodes(verdict.excluded)))
    if verdict.train and len(verdict.train) < len(verdict.nodes):
        rows.append(("train on", nodes(verdict.train)))
        rows += [("spare", nodes(spare))] if spare else []
    if took := timing(verdict):
        rows.append(("took", took))
    if missed := [stage for stage in (setting.stages if setting else ()) if stage not in verdict.stages]:
        rows.append(("not reached", ", ".join(missed)))
    if verdict.bandwidth:
        rows.append(("bandwidth", bandwidth(verdict, setting)))
        rows += [("job file", paste)] if (paste := to_paste(verdict)) else []
    return [*rows, ("exit code", f"{verdict.code}: {means(verdict.code)}")]


def means(code: int) -> str:
    return MEANS.get(code, "not an answer of a preflight")


def timing(verdict: Verdict) -> str:
    """17 s: join 1.2 s, inventory 4.2 s, pairs 12 s (3 rounds)"""
    said = [
        f"{stage} {seconds(verdict.stages[stage])}"
        + (f" ({_count(verdict.rounds, 'round')})" if stage == "pairs" and verdict.rounds else "")
        for stage in ordered(verdict.stages)
    ]
    return f"{seconds(sum(verdict.stages.values()))}: {', '.join(said)}" if said else ""


def ordered(stages: Iterable[str]) -> list[str]:
    """As they ran: what is no stage of ours, joining, comes first."""
    return sorted(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else -1)


def bandwidth(verdict: Verdict, setting: Setting | None = None) -> str:
    """42.1 GB/s of bus bandwidth over 4 nodes (all_reduce); all_reduce of 1 GiB is to reach 38.0"""
    healthy = [node for node in verdict.nodes if node not in verdict.excluded]
    limit = setting.whole if setting else None
    said = f"{figure(verdict.bandwidth)} GB/s of bus bandwidth over {count(healthy)}{by(verdict)}"
    return f"{said}; {expected(limit)}" if limit else said


def by(verdict: Verdict) -> str:
    """Of which operation: " (reduce_scatter)", the slowest of those that training uses."""
    found = [one.op for one in verdict.curves if one.busbw and figure(one.busbw[-1]) == figure(verdict.bandwidth)]
    return f" ({found[0]})" if found else ""


def expected(limit: Limit) -> str:
    return f"{limit.op} of {size(limit.bytes)} is to reach {figure(limit.passes)} ({limit.source})"


def to_paste(verdict: Verdict) -> str:
    """resources: {bandwidth: 42.1}; nothing under 0.001, which no job file takes."""
    if verdict.bandwidth < 0.001 or not verdict.train:
        return ""
    return f"resources: {{bandwidth: {figure(verdict.bandwidth).replace(',', '')}}}"


def progress(event: Mapping[str, Any]) -> str:
    """{"event": "joined", "node": "node3", "count": 3, "of": 4} is "node3 reports (3 of 4)"."""
    match event:
        case {"event": "joined", "node": node, "count": count, "of": of}:
            said = f"{node} reports ({count} of {of})"
        case {"event": "stage", "stage": stage, "nodes": count}:
            said = f"{stage}: {_count(count, 'node')}"
        case {"event": "checked", "stage": stage, "seconds": took, "findings": found}:
            said = f"{stage}: {_count(found, 'finding') if found else 'nothing found'} in {seconds(took)}"
        case {"event": "round", "round": number, "of": of, "pairs": pairs, "slowest": slowest, "best": best}:
            said = f"pairs: round {number} of {of}, {_count(pairs, 'pair')}, {_range(slowest, best)}"
        case {"event": "finding", "finding": finding}:
            said = sentence(preflight.from_json(Finding, finding))
        case {"event": "verdict", "code": code, "headline": headline}:
            said = f"{headline} (exit code {code})"
        case _:  # of a newer coordinator
            said = ", ".join(f"{key} {value}" for key, value in event.items() if key != "time")
    return plain(said)


def _range(slowest: float | None, best: float | None) -> str:
    """1.1 to 2.3 GB/s; nothing came through where there is no best."""
    if not best:
        return "nothing came through"
    return f"{figure(slowest or 0.0)} to {figure(best)} GB/s"


def sentence(finding: Finding) -> str:
    """warning: node3: 0.19.6 of deepspeed (measured 0.19.6, expected 0.19.8)"""
    figures = (("measured", finding.measured), ("expected", finding.expected))
    said = ", ".join(f"{name} {value}" for name, value in figures if value)
    who = f"{subject(finding)}: " if finding.node and not names(finding.node, finding.what) else ""
    return f"{LEVELS[finding.level]}: {who}{finding.what}" + (f" ({said})" if said else "")


def names(node: str, text: str) -> bool:
    """Whether a sentence says the node's name already: "gpu1 sends slowly" says gpu1, and not gpu."""
    return re.search(rf"(?<![\w.-]){re.escape(node)}(?![\w-])", text) is not None


def subject(finding: Finding) -> str:
    return f"{finding.node} -> {finding.peer}" if finding.peer else finding.node or "all nodes"


def level(finding: Finding, verdict: Verdict) -> str:
    """A node that was to be excluded and was not, because too many were, is unfit and not excluded."""
    if finding.level == "exclude" and finding.node not in verdict.excluded:
        return "unfit"
    return LEVELS[finding.level]


# Findings, worst first


def blocks(verdict: Verdict) -> list[Block]:
    """The worst node first, then links, then notes; what is said alike of several nodes stands there once."""
    same: dict[Finding, list[str]] = {}
    for finding in verdict.findings:
        alike = finding if finding.peer else replace(finding, node="")
        same.setdefault(alike, []).append(finding.node)
    found = [Block(tuple(dict.fromkeys(names)), replace(finding, node=names[0])) for finding, names in same.items()]
    worst: dict[tuple[str, ...], int] = {}
    for block in found:  # a node's warning stands with its exclusion
        rank = ORDER.index(block.finding.level)
        worst[block.nodes] = min(rank, worst.get(block.nodes, rank))
    at = {node: i for i, node in enumerate(verdict.nodes)}
    return sorted(
        found,
        key=lambda block: (
            block.finding.level == "note",
            bool(block.finding.peer),
            worst[block.nodes],
            at.get(block.nodes[0], -1),
            block.nodes,
            ORDER.index(block.finding.level),
        ),
    )


def who(block: Block, *, arrow: str = "->") -> str:
    if block.finding.peer:
        return f"{block.finding.node} {arrow} {block.finding.peer}"
    return folded(block.nodes) if block.nodes[0] else "all nodes"


def cut(found: Sequence[Block], *, most: int = MOST) -> tuple[list[Block], list[Block]]:
    """The first eight of each kind, and for every kind the rest as one."""
    shown: list[Block] = []
    rest: dict[tuple[str, str], list[Block]] = {}
    for block in found:
        kind = (block.finding.level, block.finding.check)
        if sum((one.finding.level, one.finding.check) == kind for one in shown) < most:
            shown.append(block)
        else:
            rest.setdefault(kind, []).append(block)
    more = [
        Block(tuple(dict.fromkeys(node for block in same for node in block.nodes)), same[0].finding)
        for same in rest.values()
    ]
    return shown, more


def _findings(verdict: Verdict, width: int) -> list[str]:
    """A row of figures for each, with what it is and what to do below; notes are a line."""
    shown, more = cut(blocks(verdict))
    head = ("node", "check", "measured", "expected", "source")
    rows, under = [head], [list[str]()]
    notes, last = [], ""
    for block in shown:
        finding, name = block.finding, who(block)
        if finding.level == "note":
            notes.append(_also(finding.what, name if block.nodes[0] else ""))
            continue
        rows.append(("" if name == last else name, finding.check, finding.measured, finding.expected, finding.source))
        last = name
        said = [f"{level(finding, verdict)}: {finding.what}"]
        under.append([*said, f"do: {finding.fix}"] if finding.fix else said)
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows[1:])]
    lines = _grid([[row[i] for i in kept] for row in rows], width=width, under=under) if len(rows) > 1 else []
    for block in more:
        where = f" on {folded(block.nodes)}" if block.nodes[0] else ""
        notes.append(f"and more of {block.finding.check}{where}")
    for note in notes:
        lines += [f"  {line}" for line in _wrap(plain(note), width - 2, hang="  ")]
    return lines


def _also(what: str, name: str) -> str:
    """note: dcgmi is not installed (node[1-2])"""
    return f"note: {what}" + (f" ({name})" if name and not names(name, what) else "")


def _grid(rows: Sequence[Sequence[str]], *, width: int, under: Sequence[Sequence[str]] = ()) -> list[str]:
    """Columns whose cells wrap, the widest first, until a line has `width` characters; `under` each row its text."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = width - 2 * len(widths)
    while sum(widths) > room and max(widths) > FEWEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row, below in zip(cells, under or [()] * len(cells), strict=True):
        wrapped = [_wrap(cell, wide) or [""] for cell, wide in zip(row, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            line = "  ".join(
                (part[i] if i < len(part) else "").ljust(wide) for part, wide in zip(wrapped, widths, strict=True)
            )
            lines.append(f"  {line}".rstrip())
        for text in below:
            lines += [f"    {line}" for line in _wrap(plain(text), width - 6, hang="  ")]
    return lines


def _wrap(text: str, width: int, *, hang: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=hang, break_on_hyphens=False)


# Tickets


def tickets(verdict: Verdict) -> list[tuple[str, str]]:
    """("node3", its text) for each node and link with something to repair: not where only a version differs."""
    broken = [one for one in verdict.findings if one.level == "exclude" and one.node and one.code == 0]
    slow = [one for one in verdict.findings if one.peer and one.level in ("warn", "exclude", "block")]
    ends = sorted({(one.node, "") for one in broken if not one.peer})
    links = sorted({(one.node, one.peer) for one in slow})
    return [
        (f"{node} -> {peer}" if peer else node, ticket(verdict, node, peer=peer)) for node, peer in [*ends, *links]
    ]


def ticket(verdict: Verdict, node: str, *, peer: str = "") -> str:
    """For whoever repairs the node, or the link from `node` to `peer`: what, how much, how seen, how to repeat."""
    about = [
        finding  # a node's own; its links have tickets of their own
        for finding in verdict.findings
        if (finding.node, finding.peer) == (node, peer) and finding.level != "note"
    ]
    about.sort(key=lambda finding: ORDER.index(finding.level))
    name = f"link {node} -> {peer}" if peer else f"node {node}"
    first = about[0].what if about else "nothing was found"
    lines = [plain(first if names(node, first) else f"{name}: {first}"), ""]
    for finding in about:
        rows = [
            ("found    ", finding.what),
            ("measured", finding.measured),
            ("expected", finding.expected),
            ("threshold", finding.source),
            ("suggested", "; ".join(part for part in finding.fix.split("; ") if "dslaunch" not in part)),
        ]
        lines += _grid([row for row in rows if row[1]], width=WIDTH)
        commands = repeat(verdict, finding)
        lines += [*(f"  {'' if i else 'to repeat':9}  {command}" for i, command in enumerate(commands)), ""]
    lines += _partners(verdict, node, peer)
    if node in verdict.excluded and not peer:
        lines.append(f"The node was left out of a training job on {count(verdict.nodes)}.")
    return "\n".join(lines).rstrip("\n") + "\n"


def repeat(verdict: Verdict, finding: Finding) -> list[str]:
    """Commands of the field's own tools; between nodes iperf3 says of the same two, and nccl-tests on GPUs."""
    if finding.check not in ("pairs", "whole"):
        return [REPEAT[finding.check]] if finding.check in REPEAT else []
    other = finding.peer or _partner(verdict, finding.node)
    if not (finding.node and other):
        return []
    here, there = shlex.quote(plain(finding.node)), shlex.quote(plain(other))
    return [
        f"iperf3 -s                 # on {there}",
        f"iperf3 -c {there} -P 4    # on {here}; the way back with -R",
        f"mpirun -np 2 -H {here},{there} sendrecv_perf -b 1G -e 1G    # nccl-tests, on GPUs",
    ]


def _partner(verdict: Verdict, node: str) -> str:
    """The healthy node that it was measured with."""
    matrix = verdict.matrix
    if not matrix or node not in matrix.nodes:
        return ""
    row = matrix.cells[matrix.nodes.index(node)]
    sound = [other for other, cell in zip(matrix.nodes, row, strict=True) if cell is not None]
    return next((other for other in sound if other not in verdict.excluded), "")


def _partners(verdict: Verdict, node: str, peer: str) -> list[str]:
    """How it was confirmed: the figures of every measurement with this node, the slowest first."""
    matrix = verdict.matrix
    if not matrix or node not in matrix.nodes or (peer and peer not in matrix.nodes):
        return []
    if peer:
        there, back = cell(matrix, node, peer), cell(matrix, peer, node)
        rows = [
            (f"{node} -> {peer}", rate(there)),
            (f"{peer} -> {node}", rate(back)),
            (f"{node} to others", _typical(matrix, sends=node, besides=peer)),
            (f"others to {peer}", _typical(matrix, receives=peer, besides=node)),
        ]
        return [f"GB/s{_healthy(matrix)}:", *_grid(rows, width=WIDTH), ""]
    both = {other: (cell(matrix, node, other), cell(matrix, other, node)) for other in matrix.nodes if other != node}
    seen = {other: least for other, pair in both.items() if (least := slower(*pair)) is not None}
    # what it does with another bad node says nothing about it
    seen = {other: least for other, least in seen.items() if other not in verdict.excluded} or seen
    if not seen:
        return []
    slowest = sorted(seen, key=lambda other: seen[other])[:PARTNERS]
    figures = [("with", "sends", "receives"), *((other, *map(rate, both[other])) for other in slowest)]
    more = f", the slowest {PARTNERS}" if len(seen) > PARTNERS else ""
    title = f"Measured with {_count(len(seen), 'partner')}{more}, GB/s{_healthy(matrix)}:"
    return [title, *_grid(figures, width=WIDTH), ""]


def slower(*values: float | None) -> float | None:
    """Of what was measured."""
    return min((value for value in values if value is not None), default=None)


def _healthy(matrix: Matrix) -> str:
    return f"; healthy is {figure(matrix.reference)} ({plain(matrix.source)})" if matrix.reference else ""


def _typical(matrix: Matrix, *, sends: str = "", receives: str = "", besides: str) -> str:
    others = [node for node in matrix.nodes if node not in (sends, receives, besides)]
    found = [cell(matrix, sends or node, receives or node) for node in others]
    some = [value for value in found if value is not None]
    more = f", the median of {len(some)}" if len(some) > 1 else ""
    return f"{figure(median(some))}{more}" if some else "not measured"


def cell(matrix: Matrix, sender: str, receiver: str) -> float | None:
    return matrix.cells[matrix.nodes.index(sender)][matrix.nodes.index(receiver)]


def rate(value: float | None) -> str:
    return "-" if value is None else "failed" if value <= 0 else figure(value)


# Words


def folded(names: Iterable[str]) -> str:
    """gpu-[001-004]; a name that is no host's stays as it is."""
    some = [name for name in names if name]
    try:
        return fold(some)
    except UserError:
        return plain(", ".join(some))


def natural(text: str) -> tuple[float, str]:
    """9.5 GB is before 10 GB; words come after."""
    number = re.match(r"-?[0-9]+(\.[0-9]+)?", text)
    return (float(number[0]) if number else math.inf, text)


def nodes(some: Sequence[str]) -> str:
    return count(some) + (f": {folded(some)}" if some else "")


def count(some: Sequence[str]) -> str:
    return _count(len(some), "node")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def seconds(value: float) -> str:
    """0.4 s, 4.2 s, 45 s, 2.5 minutes"""
    return f"{value:.1f} s" if value < 9.95 else span(value)


def size(value: float) -> str:
    """1 GiB, 256 MiB, 1.5 KiB"""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"
