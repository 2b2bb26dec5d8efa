"""The live view of runs: a View in, what rich draws out. Looks at nothing itself."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from launcher.runs import Phase
from launcher.runs.logs import printable
from launcher.runs.view import Node, View, worst_first

COLORS = {
    Phase.RUNNING: "green", Phase.DONE: "bold green", Phase.FAILED: "bold red", Phase.CANCELLED: "yellow",
    Phase.SUSPECT: "bold yellow", Phase.RECOVERING: "magenta", Phase.UNKNOWN: "bold yellow", Phase.QUEUED: "cyan",
    Phase.PREFLIGHT: "blue",
}  # fmt: skip
MARKS = {Phase.DONE: "✔", Phase.FAILED: "✘", Phase.CANCELLED: "■", Phase.UNKNOWN: "?", Phase.SUSPECT: "!",
         Phase.RECOVERING: "↻"}  # fmt: skip
BARS = "▁▂▃▄▅▆▇█"
LEAVE = "Ctrl-C leaves; the job goes on"


def screen(views: Sequence[View], *, width: int, height: int, now: float) -> RenderableType:
    """One run fills the screen; of several each gets a line, and the newest events of all stand below."""
    if len(views) == 1:
        return one(views[0], width=width, height=height, now=now)
    return many(views, width=width, height=height)


# --- one run --------------------------------------------------------------------------------------


def one(view: View, *, width: int, height: int, now: float) -> RenderableType:
    inner = width - 4
    head: list[RenderableType] = [_state(view, now)]
    if reason := _reason(view):
        head.append(reason)
    if view.steps or view.step is not None:
        head += [_bar(view, inner), *([speed] if (speed := _speed(view, inner)) else [])]
    head += [Text(f"first failure: {failure}", style="red", overflow="ellipsis", no_wrap=True)
             for failure in view.failures[:2]]  # fmt: skip
    top = Panel(
        Group(*head), title=Text(view.run, style="bold"), title_align="left",
        subtitle=Text(where(view), style="dim"), subtitle_align="right",
        border_style=COLORS.get(view.phase, "dim"),
    )  # fmt: skip
    left = height - len(head) - 2 - 1  # the panel's edges, the last line
    events = spoken(view)
    few = min(len(events), max(3, left // 4))
    room = left - few - 2 - 2  # two titles, the table's head and its last line
    parts: list[RenderableType] = [top]
    if view.nodes:
        parts += [_nodes(view, max(1, room), width)]
    elif not view.phase.over:
        parts += [Text(f"  {waiting(view)}", style="dim", overflow="ellipsis", no_wrap=True)]
    if events:
        few = min(len(events), max(1, left - (min(len(view.nodes), max(1, room)) + 4 if view.nodes else 2)))
        parts += [Rule(Text("events"), style="dim", align="left"), *_events(events[-few:])]
    parts.append(_foot(view, now))
    return Group(*parts)


def _foot(view: View, now: float) -> Text:
    """When it is, how fresh the scheduler's word is, and how to leave."""
    if view.phase.over:
        return Text(view.folder, style="dim", overflow="ellipsis", no_wrap=True)
    heard = f"{view.backend} answered {span(view.age)} ago  ·  " if view.age is not None else ""
    return Text(f"{clock(now)}  ·  {heard}{LEAVE}", style="dim", overflow="ellipsis", no_wrap=True)


def where(view: View) -> str:
    job = view.job.partition(":")[0]
    return f"{view.backend} job {job}" if job else view.backend


def waiting(view: View) -> str:
    if view.phase is Phase.PREFLIGHT:
        return "the preflight checks the nodes; their heartbeats begin with training"
    if view.phase in (Phase.RUNNING, Phase.UNKNOWN):
        return "no heartbeat of a node yet"
    return "heartbeats begin when it trains"


def _state(view: View, now: float) -> Text:
    color = COLORS.get(view.phase, "")
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{MARKS.get(view.phase, '●')} {view.phase.value.upper()}", style=color)
    if view.since and not view.phase.over and view.phase not in (Phase.UNKNOWN, Phase.SUSPECT):
        text.append(f" {span(max(0.0, now - view.since))}", style=color)
    if view.code:
        text.append(f"  exit code {view.code}", style="red")
    if view.attempt:
        text.append(f"  ·  attempt {view.attempt}")
    if view.hosts:
        text.append(f"  ·  {view.hosts:,} node{'s' * (view.hosts != 1)}")
    return text


def _reason(view: View) -> Text | None:
    """A line of its own, where the state alone does not say enough."""
    words = staleness(view)
    if not words and not plain(view):
        words = view.why
    style = COLORS[view.phase] if view.phase in TROUBLED else "dim"
    return Text(words, style=style, no_wrap=True, overflow="ellipsis") if words else None


def plain(view: View) -> bool:
    """Whether the reason only repeats the state: "running: node[1-4]"."""
    head = view.why.partition(":")[0].strip()
    said = head in ("running", "completed", "cancelled", "failed") or view.why == f"exit code {view.code}"
    return not view.why or view.why == view.phase.value or said


def staleness(view: View) -> str:
    """ "running when last heard, 34 s ago": only where the last question had no answer."""
    if view.phase is not Phase.UNKNOWN:
        return ""
    alive = [node for node in view.nodes if not node.late]
    beats = f"; {len(alive)} of {len(view.nodes)} nodes report" if view.nodes else ""
    if view.age is None or not view.word:
        return f"{view.why}{beats}"
    return f"{view.word} when last heard, {span(view.age)} ago{beats} ({view.why})"


def _bar(view: View, width: int) -> Text:
    """step 412 / 10,000 ━━━━━━╺──────── 4.1 %  ETA 3 h 30 min."""
    if view.step is None:
        return Text(f"step - / {view.steps:,}" if view.steps else "no step yet", style="dim")
    part = min(1.0, view.step / view.steps) if view.steps else 0.0
    left = f"step {view.step:,} / {view.steps:,} "
    right = f" {100 * part:.1f} %" + (f"   ETA {span(view.eta)}" if view.eta is not None else "")
    cells = max(4, width - len(left) - len(right))
    full = round(part * cells)
    text = Text(left, no_wrap=True, overflow="ellipsis")
    text.append("━" * full, style=COLORS.get(view.phase, "green"))
    text.append("─" * (cells - full), style="dim")
    return text.append(right)


def _speed(view: View, width: int) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if view.loss is not None:
        text.append(f"loss {view.loss:.4f} ")
        text.append(spark(view.losses, 24 if width >= 90 else 12), style="cyan")
    if view.tokens_per_s:
        text.append(f"{'   ' if text else ''}{view.tokens_per_s:,.0f} tokens/s")
        if view.of_plan is not None and view.predicted:
            style = "green" if view.of_plan >= 0.9 else "yellow"
            text.append(f" {100 * view.of_plan:.0f} % of plan", style=style)
            if width >= 90:
                text.append(f" ({view.predicted:,.0f})", style="dim")
    if view.step_seconds:
        text.append(f"   {seconds(view.step_seconds)}/step")
    return text


def spark(values: Sequence[float], cells: int) -> str:
    """[3, 2, 1] on three cells is "█▅▁"; more values than cells are averaged."""
    good = [value for value in values if math.isfinite(value)]
    if len(good) < 2:
        return ""
    cells = min(cells, len(good))
    edges = [round(i * len(good) / cells) for i in range(cells + 1)]
    means = [sum(good[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    top = len(BARS) - 1
    return "".join(BARS[round((mean - low) / (high - low) * top) if high > low else 0] for mean in means)


def _nodes(view: View, room: int, width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    narrow = width < 76
    table.add_column(" node", no_wrap=True)
    for name in ("heartbeat", "phase", "step", *(() if narrow else ("s/step", "own work")), ""):
        table.add_column(name, justify="left" if name in ("phase", "") else "right", no_wrap=True)
    ordered = worst_first(view.nodes)
    for node in ordered[:room]:
        table.add_row(*_node(node, width))
    troubled = len(view.troubled)
    title = f"{len(view.nodes)} node{'s' * (len(view.nodes) != 1)}"
    title += f", {troubled} with trouble" if troubled else ", all well"
    parts: list[RenderableType] = [Rule(Text(title), style="dim" if not troubled else "yellow", align="left"), table]
    if len(ordered) > room:
        rest = ordered[room:]
        bad = sum(bool(node.trouble) for node in rest)
        more = f"{bad} of them with trouble" if bad else "all well"
        parts.append(Text(f" and {len(rest):,} more, {more}", style="yellow" if bad else "dim"))
    return Group(*parts)


def _node(node: Node, width: int) -> list[RenderableType]:
    color = ALARM.get(node.trouble, "")
    said = {
        "slow": "straggler",
        "no step": f"no step for {span(node.stalled or 0)}",
        "out of memory": f"{node.oom_kills} killed for memory",
    }.get(node.trouble, node.trouble)
    said += f"{': ' if said else ''}{node.note}" if node.note else ""
    host = short(node.host.partition(".")[0] or str(node.node), 24 if width >= 100 else 14)
    cells = [f" {host}", f"{span(node.age)} ago", node.phase, "-" if node.step is None else f"{node.step:,}"]
    if width >= 76:
        cells += [seconds(node.step_seconds), seconds(node.busy)]
    left = width - (54 if width >= 76 else 38) - len(host)
    return [Text(cell, style=color) for cell in (*cells, _cut(said, left))]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: max(1, most - 1)]}…"


ALARM = {"silent": "bold red", "out of memory": "red", "no step": "bold yellow", "slow": "yellow"}


def short(text: str, most: int) -> str:
    """`gpt-7b-…4f2a90c1`: the ends tell names apart."""
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[len(text) - (most - 1 - (most - 1) // 2) :]}"


def _events(lines: Iterable[tuple[float, str, str]]) -> list[Text]:
    found = []
    for at, words, style in lines:
        text = Text(no_wrap=True, overflow="ellipsis").append(f" {clock(at)}  ", style="dim")
        found.append(text.append(words, style=style))
    return found


# --- several --------------------------------------------------------------------------------------


def many(views: Sequence[View], *, width: int, height: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    wide = width >= 110
    columns = ["run", "state", "step", "", "tokens/s", "ETA", *(["of plan", "loss", "nodes"] if wide else [])]
    for name in columns:
        table.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=True)
    few = 3 if height < 30 else 6
    room = max(1, height - few - 4)
    order = sorted(views, key=lambda view: (view.phase.over, view.phase not in TROUBLED, view.run))
    for view in order[:room]:
        part = f"{100 * view.step / view.steps:.0f} %" if view.step is not None and view.steps else ""
        age = f" {span(view.age)}" if view.phase is Phase.UNKNOWN and view.age is not None else ""
        bad = len(view.troubled)
        cells: list[str | Text] = [
            short(view.run, width - (90 if wide else 61)),
            Text(
                short(f"{MARKS.get(view.phase, '●')} {view.phase.value}{age}", 24 if wide else 20),
                style=COLORS.get(view.phase, ""),
            ),
            f"{view.step:,}" if view.step is not None else "-",
            part,
            f"{view.tokens_per_s:,.0f}" if view.tokens_per_s else "-",
            span(view.eta) if view.eta is not None else "-",
        ]
        if wide:
            cells += [
                f"{100 * view.of_plan:.0f} %" if view.of_plan is not None else "-",
                f"{view.loss:.4f}" if view.loss is not None else "-",
                Text(f"{view.hosts or '-'}" + (f", {bad} bad" if bad else ""), style="yellow" if bad else ""),
            ]
        table.add_row(*cells)
    parts: list[RenderableType] = [table]
    if len(order) > room:
        parts.append(Text(f"and {len(order) - room} more", style="dim"))
    lines = sorted(
        (at, f"{short(view.run, 28)}: {words}", style) for view in views for at, words, style in spoken(view)
    )
    parts += [Rule(Text("events"), style="dim", align="left"), *_events(lines[-few:])] if lines else []
    return Group(*parts, Text(LEAVE.replace("job goes", "jobs go"), style="dim"))


TROUBLED = (Phase.SUSPECT, Phase.UNKNOWN, Phase.RECOVERING, Phase.FAILED)


# --- words ----------------------------------------------------------------------------------------


def spoken(view: View) -> list[tuple[float, str, str]]:
    """Journal entries as lines: when, what, and a style. What only prepares something is left out."""
    found = []
    for entry in view.events:
        words, style = say(entry)
        if words and isinstance(entry.get("time"), (int, float)):
            found.append((float(entry["time"]), printable(words.encode()), style))
    return found


def news(before: View, after: View) -> list[tuple[float, str, str]]:
    """Of the journal what came since; states of the scheduler have lines of their own."""
    told = max((entry.get("seq", 0) for entry in before.events), default=0)
    fresh = tuple(entry for entry in after.events if entry.get("seq", 0) > told and entry["event"] != "state")
    return spoken(replace(after, events=fresh))


def aged(views: Sequence[View], seconds: float) -> list[View]:
    """The same a moment later: what was heard is older by so much."""
    return [
        replace(
            view,
            age=None if view.age is None else view.age + seconds,
            nodes=tuple(replace(node, age=node.age + seconds) for node in view.nodes),
        )
        for view in views
    ]


def say(entry: Any) -> tuple[str, str]:
    """ended, code 137, node2: "attempt 1 ended with 137 on node2: GPU fell off the bus"."""
    event, told = entry["event"], entry.get
    nth = f"attempt {told('attempt')}" if isinstance(told("attempt"), int) else "attempt"
    why = str(told("why") or told("detail") or "")
    because = f": {why}" if why else ""
    hosts = told("hosts") or ()
    if event in ("submitted", "adopted", "resubmitted", "requeued", "cancelled"):
        return f"{event}" + (f" as job {told('job')}" if told("job") else ""), "cyan"
    if event == "attempt":
        resume = f", from {str(told('resume')).rstrip('/').rpartition('/')[2]}" if told("resume") else ""
        return f"{nth} begins on {len(hosts)} node{'s' * (len(hosts) != 1)}{resume}", "green"
    if event == "ended":
        place = "".join((f", rank {told('rank')}" if told("rank") is not None else "",
                         f" on {told('node')}" if told("node") else ""))  # fmt: skip
        cause = f": {told('cause')}" if told("cause") else ""
        return f"{nth} ended with {told('code')}{place}{cause}{because}", "green" if told("code") == 0 else "red"
    if event == "decided":
        without = (
            f" without {', '.join(told('exclude'))}" if isinstance(told("exclude"), list) and told("exclude") else ""
        )
        return f"{told('action')}{without}{because}", "magenta"
    if event == "finished":
        return f"finished with {told('code')}{because}", "green" if told("code") == 0 else "red"
    if event == "preflight":
        return f"preflight ended with {told('code')}", "green" if told("code") in (0, 10) else "red"
    if event == "started":
        return f"job {told('job')} started on {told('host')}", "cyan"
    if event == "state":
        return f"{told('state')}{because}" if why != told("state") else str(told("state")), "yellow" * (
            told("state") == "unknown"
        )
    if event in ("refused", "unanswered", "absent"):
        return f"{event}{because}", "red"
    return "", ""


def line(view: View) -> str:
    """`running, step 412/10000 (4 %), loss 2.3145, 61,204 tokens/s (97 % of plan), ETA 3 h 30 min`."""
    parts = [view.phase.value + (f" (exit code {view.code})" if view.code else "")]
    if stale := staleness(view):
        parts = [f"unknown: {stale}"]
    elif not plain(view):
        parts = [f"{parts[0]}: {view.why}"]
    if view.attempt:
        parts.append(f"attempt {view.attempt}")
    if view.step is not None:
        percent = f" ({100 * view.step / view.steps:.0f} %)" if view.steps else ""
        parts.append(f"step {view.step}/{view.steps}{percent}")
        parts += [f"loss {view.loss:.4f}"] if view.loss is not None else []
    if view.tokens_per_s and not view.phase.over:
        plan = f" ({100 * view.of_plan:.0f} % of plan)" if view.of_plan is not None else ""
        parts.append(f"{view.tokens_per_s:,.0f} tokens/s{plan}")
    if view.eta is not None:
        parts.append(f"ETA {span(view.eta)}")
    parts += [f"{node.host or node.node}: {node.trouble}" for node in worst_first(view.troubled)[:3]]
    return ", ".join(parts)


def span(value: float) -> str:
    """9 s, 3 min, 3 h 30 min, 2 d 4 h."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 86_400:
        return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")
    return f"{whole // 86_400} d" + (f" {whole % 86_400 // 3600} h" if whole % 86_400 // 3600 else "")


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else span(value)


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
