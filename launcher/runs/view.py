"""A run as one looks at it: what its scheduler says, its journal, its metrics and the heartbeats of its nodes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import runs
from launcher.backends import State
from launcher.runs import Phase, poll
from launcher.runs.logs import printable

BEAT = 5.0  # seconds between two heartbeats of a node
LATE = 30.0  # seconds without one after which something is wrong with a node
HANG = 10  # median steps without a step, as the node's own supervisor counts
SLOW = 1.1  # times the median of all nodes
LOSSES = 240
VERSION = 1  # of the lines of `watch --json`


@dataclass(frozen=True)
class Node:
    """The newest heartbeat of one node; `age` is seconds since it was written, by the file system's own clock."""

    node: int
    host: str = ""
    age: float = 0.0
    attempt: int = 0
    phase: str = ""
    step: int | None = None
    step_seconds: float | None = None
    stalled: float | None = None  # seconds since the last step of its slowest rank
    busy: float | None = None  # seconds of a step that its slowest rank works, the rest it waits for others
    note: str = ""
    oom_kills: int = 0
    slow: bool = False

    @property
    def late(self) -> bool:
        return self.age > LATE

    @property
    def stuck(self) -> bool:
        """No step for ten median steps, and more than a late heartbeat could explain."""
        if self.phase != "training" or not self.step_seconds or self.stalled is None:
            return False
        return self.stalled + self.age > max(HANG * self.step_seconds, LATE)

    @property
    def trouble(self) -> str:
        """What is wrong with it, the worst first; empty when nothing is."""
        if self.late:
            return "silent"
        if self.oom_kills:
            return "out of memory"
        if self.stuck:
            return "no step"
        return "slow" if self.slow else ""


@dataclass(frozen=True)
class View:
    """Everything that `watch` shows of one run at one moment."""

    run: str
    backend: str
    job: str
    folder: str
    phase: Phase
    why: str = ""
    word: str = ""  # the scheduler's last word, and
    age: float | None = None  # how many seconds old it is
    gone: bool = False  # the scheduler says that it has no such job, and has said so for MinJobAge
    stuck: bool = False  # it cannot start, however long one waits
    code: int | None = None
    since: float = 0.0  # when this phase began
    attempt: int | None = None
    hosts: int = 0
    step: int | None = None
    steps: int = 0
    loss: float | None = None
    losses: tuple[float, ...] = ()
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    predicted: float | None = None  # tokens per second, by the plan
    nodes: tuple[Node, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def eta(self) -> float | None:
        """Seconds to the last step at the pace of the last ones; None while nothing trains."""
        if self.step is None or not self.step_seconds or self.phase not in (Phase.RUNNING, Phase.SUSPECT):
            return None
        return max(0, self.steps - self.step) * self.step_seconds

    @property
    def of_plan(self) -> float | None:
        """0.97: tokens per second by what the plan predicted."""
        return self.tokens_per_s / self.predicted if self.tokens_per_s and self.predicted else None

    @property
    def troubled(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.trouble)


TROUBLES = ("silent", "out of memory", "no step", "slow", "")


def worst_first(nodes: Iterable[Node]) -> list[Node]:
    """Silent ones, then those without a step, then the slow; among equals the one that works longest."""
    return sorted(
        nodes, key=lambda node: (TROUBLES.index(node.trouble), -(node.busy or 0) if node.slow else 0, node.node)
    )


def stragglers(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Those whose own work takes more than 1.1 times the median. Of two nodes nobody can say which is slow."""
    works = [node.busy for node in nodes if node.busy]
    if len(works) < 3:
        return tuple(nodes)
    limit = SLOW * statistics.median(works)
    return tuple(replace(node, slow=bool(node.busy and node.busy > limit)) for node in nodes)


def suspicion(phase: Phase, why: str, nodes: Sequence[Node]) -> tuple[Phase, str]:
    """RUNNING with a node that says nothing, or makes no step, is SUSPECT; while Slurm suspends a job none does.
    Nothing follows from it here."""
    bad = [node for node in nodes if node.late or node.stuck]
    if phase is not Phase.RUNNING or not bad or why.startswith("suspended"):
        return phase, why
    worst = worst_first(bad)[0]
    name = worst.host or f"node {worst.node}"
    what = f"no heartbeat for {worst.age:.0f} s" if worst.late else f"no step for {(worst.stalled or 0):.0f} s"
    return Phase.SUSPECT, f"{name}: {what}" + (f", and {len(bad) - 1} more nodes" if len(bad) > 1 else "")


def changes(before: View | None, after: View, now: float) -> list[dict[str, Any]]:
    """What to tell of the difference, as `watch --json` prints it: stable keys, one object each.

    kind is state, event, progress, node or end; all have v (1), time, run.
    """
    head = {"v": VERSION, "time": round(now, 3), "run": after.run}
    found: list[dict[str, Any]] = []
    told = 0 if before is None else max((int(entry.get("seq", 0)) for entry in before.events), default=0)
    for entry in after.events:
        if int(entry.get("seq", 0)) > told and entry["event"] != "state":
            rest = {key: value for key, value in entry.items() if key not in UNTOLD}
            found.append({**head, "kind": "event", "event": entry["event"], "at": entry.get("time"), **rest})
    if before is None or _standing(before) != _standing(after):
        found.append({**head, "kind": "state", "state": after.phase.value, "why": after.why, "job": after.job,
                      "attempt": after.attempt, "scheduler": after.word,
                      "age": None if after.age is None else round(after.age, 1)})  # fmt: skip
    if after.step is not None and (before is None or before.step != after.step):
        found.append({**head, "kind": "progress", "step": after.step, "steps": after.steps, "loss": after.loss,
                      "tokens_per_s": after.tokens_per_s, "predicted_tokens_per_s": after.predicted,
                      "step_seconds": after.step_seconds, "eta_seconds": after.eta})  # fmt: skip
    old = {} if before is None else {node.node: node for node in before.nodes}
    for node in after.nodes:
        was = old.get(node.node)
        if was is None or (was.trouble, was.phase, was.host) != (node.trouble, node.phase, node.host):
            found.append({**head, "kind": "node", "node": node.node, "host": node.host, "phase": node.phase,
                          "trouble": node.trouble, "heartbeat_age": round(node.age, 1), "step": node.step,
                          "step_seconds": node.step_seconds, "busy": node.busy, "note": node.note})  # fmt: skip
    if after.phase.over and (before is None or not before.phase.over):
        found.append({**head, "kind": "end", "state": after.phase.value, "code": after.code,
                      "failures": list(after.failures)})  # fmt: skip
    return found


UNTOLD = ("crc", "event", "time", "files", "extra")  # of a journal's entry: told otherwise, or of no use to others


def _standing(view: View) -> tuple[Any, ...]:
    """What makes a new line: "suspended: node1" after "running: node1" does, "running: node2" does not."""
    return view.phase, view.job, view.attempt, view.word, view.why.partition(":")[0]


def exit_code(view: View) -> int | None:
    """What `wait` returns: the job's own verdict; None while it goes on.

    0 done; the job's code when it failed, 1 when nobody knows it, or when its pods can never start; 130 when it was
    cancelled; 8 when the scheduler says, time and again, that it has no such job and no node shows a sign of life.
    """
    if view.phase is Phase.DONE:
        return 0
    if view.phase is Phase.CANCELLED:
        return 130
    if view.phase is Phase.FAILED:
        return view.code or 1
    alive = any(not node.late for node in view.nodes)
    if view.stuck and not alive:
        return 1
    return 8 if view.phase is Phase.UNKNOWN and view.gone and not alive else None


# --- the files ------------------------------------------------------------------------------------


class Files:
    """The files of one run, each read on from where it was read last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = 0
        self.half = b""
        self.rows: deque[dict[str, Any]] = deque(maxlen=LOSSES)
        self.read = runs.read(folder)
        self.size = -1

    def record(self) -> runs.Record:
        """As its journal is now."""
        with contextlib.suppress(OSError):
            size = (self.folder / "journal.jsonl").stat().st_size
            if size != self.size:
                self.read, self.size = runs.read(self.folder), size
        return self.read

    def steps(self) -> deque[dict[str, Any]]:
        """The newest steps; of a file of gigabytes its end."""
        try:
            with (self.folder / "logs" / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self.metrics:  # another file
                    self.metrics, self.half = 0, b""
                if size - self.metrics > END:
                    self.metrics, self.half = size - END, b""
                file.seek(self.metrics)
                data = file.read(END)
        except OSError:
            return self.rows
        self.metrics += len(data)
        *lines, self.half = (self.half + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    self.rows.append(row)
        return self.rows

    def beats(self) -> tuple[Node, ...]:
        """Every node's newest heartbeat, of the newest attempt."""
        logs = self.folder / "logs"
        found = []
        try:
            paths = sorted(logs.glob("beat-*.json"))
            now = self._now() if paths else 0.0
        except OSError:
            return ()
        for path in paths:
            with contextlib.suppress(OSError, ValueError), path.open("rb") as file:  # opened: NFS asks the server
                found.append(beat(json.loads(file.read()), age=max(0.0, now - os.fstat(file.fileno()).st_mtime)))
        newest = max((node.attempt for node in found), default=0)
        return stragglers([node for node in found if node.attempt == newest])

    def _now(self) -> float:
        """The file system's clock: a file's age is no comparison of two hosts."""
        path = self.folder / f".now-{os.getpid()}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)


END = 1 << 18  # bytes of metrics read at once; a line has about 200


def beat(found: Any, *, age: float) -> Node:
    """{"node": 1, "host": "node2", "step": 412, ...}; what has another type than it should is left out."""
    if not isinstance(found, dict) or not isinstance(found.get("node"), int):
        raise ValueError("no heartbeat")

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def text(name: str) -> str:
        return printable(str(found.get(name) or "").encode(errors="replace"))

    ranks = found.get("ranks")
    rows = [row for row in ranks.values() if isinstance(row, dict)] if isinstance(ranks, dict) else []
    works = [work for row in rows if (work := number(row.get("busy")))]
    step = found.get("step")
    return Node(
        found["node"], host=text("host"), age=age, attempt=int(number(found.get("attempt")) or 0),
        phase=text("phase"), step=step if isinstance(step, int) else None,
        step_seconds=number(found.get("step_seconds")), stalled=number(found.get("progress_age")),
        busy=max(works, default=None), note=text("note"),
        oom_kills=int(number(found.get("oom_kills")) or 0),
    )  # fmt: skip


def pace(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of a step: the median of the last twenty, by the clock of the host that wrote them."""
    last = list(rows)[-21:]
    gaps = [
        (b["time"] - a["time"]) / (b["step"] - a["step"])
        for a, b in itertools.pairwise(last)
        if isinstance(a.get("time"), float) and isinstance(b.get("time"), float) and b["step"] > a["step"]
    ]
    return statistics.median(gaps) if gaps and statistics.median(gaps) > 0 else None


def view(files: Files, known: poll.Known, now: float) -> View:
    """Everything at once. A run that is over shows no ages."""
    record = files.record()
    story = record.story
    phase, why = poll.standing(story, known)
    rows = files.steps()
    nodes = () if phase.over else files.beats()
    phase, why = suspicion(phase, why, nodes)
    last = rows[-1] if rows else {}
    begun = [entry for entry in record.entries if entry["event"] == "attempt"]
    told = [entry["predicted"] for entry in record.entries if isinstance(entry.get("predicted"), dict)]
    predicted: Mapping[str, Any] = told[-1] if told else {}
    code = known.status.code
    if code is None and phase.over:
        code = story.code if story.code is not None else runs.exit_code(record)
    failed = runs.failures(record) if phase in (Phase.FAILED, Phase.RECOVERING) else []
    return View(
        run=record.id, backend=record.backend, job=known.status.job or record.job, folder=str(record.folder),
        phase=phase, why=printable(why.encode(errors="replace")),
        word=known.status.state.value if known.status.state is not State.UNKNOWN else "",
        age=None if phase.over else known.age(now), gone=known.gone(now),
        stuck=known.shown.stuck, code=code, since=story.since,
        attempt=begun[-1].get("attempt") if begun else None,
        hosts=len(begun[-1].get("hosts") or ()) if begun else len(nodes), step=last.get("step"), steps=record.steps,
        loss=_finite(last.get("loss")),
        losses=tuple(loss for row in rows if (loss := _finite(row.get("loss"))) is not None),
        tokens_per_s=_finite(last.get("tokens_per_s")), step_seconds=pace(list(rows)),
        predicted=_finite(predicted.get("tokens_per_s")), nodes=nodes, events=record.entries[-50:],
        failures=tuple(failed),
    )  # fmt: skip


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < float("inf") else None
