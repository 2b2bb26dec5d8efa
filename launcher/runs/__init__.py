"""The run directory is the database: `ls` and `cat` explain a run."""

from __future__ import annotations

import enum
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.errors import Problem, UserError
from launcher.node import journal
from launcher.runs.logs import printable, tail

THERE = "journal.there.jsonl"  # a copy of the journal on a login node elsewhere


class Phase(enum.Enum):
    """Where a run is, as its journal tells it. UNKNOWN is a phase of its own: nothing follows from it."""

    PLANNED = "planned"
    RENDERED = "rendered"  # the files are there, and no job
    SUBMITTING = "submitting"
    QUEUED = "queued"
    PREFLIGHT = "preflight"
    RUNNING = "running"
    SUSPECT = "suspect"
    RECOVERING = "recovering"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def over(self) -> bool:
        return self in (Phase.DONE, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True)
class Attempt:
    """One start of training, and how it ended; `cause` is an id of the failure table, `decision` what followed."""

    number: int
    hosts: tuple[str, ...] = ()
    ended: bool = False
    code: int | None = None
    cause: str = ""
    node: str = ""
    rank: int | None = None
    step: int | None = None
    why: str = ""
    decision: str = ""
    told: bool = False  # it ended because somebody, or the clock, said so
    warned: bool = False  # it was the clock


@dataclass(frozen=True)
class Story:
    """A journal, folded."""

    phase: Phase = Phase.PLANNED
    since: float = 0.0
    why: str = ""
    backend: str = ""
    name: str = ""
    steps: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    token: str = ""
    job: str = ""  # the newest that is known
    jobs: tuple[str, ...] = ()
    asked: float = 0.0  # when the newest submission was begun
    open: bool = False  # a submission was begun, and whether it left one job is not known
    again: int = 0  # tries before the newest
    cancelling: bool = False  # somebody asked for its end
    attempts: tuple[Attempt, ...] = ()
    decision: str = ""
    code: int | None = None


# What an event makes of a run. `state` and `finished` say it themselves.
PHASES = {
    "rendered": Phase.RENDERED,
    "submitting": Phase.SUBMITTING,
    "submitted": Phase.QUEUED,
    "adopted": Phase.QUEUED,
    "absent": Phase.RENDERED,
    "unanswered": Phase.UNKNOWN,
    "refused": Phase.FAILED,
    "cancelled": Phase.CANCELLED,
    "started": Phase.PREFLIGHT,
    "attempt": Phase.RUNNING,
    "requeueing": Phase.RECOVERING,
    "requeued": Phase.RECOVERING,
    "resubmitting": Phase.RECOVERING,
    "resubmitted": Phase.RECOVERING,
}
# What a scheduler, or somebody who watches it, says; live words do not turn a run that recovers into a queued one.
WATCHED = {
    "pending": Phase.QUEUED,
    "completed": Phase.DONE,
    **{phase.value: phase for phase in Phase if phase not in (Phase.PLANNED, Phase.RENDERED, Phase.SUBMITTING)},
}
ALIVE = ("submitting", "submitted", "adopted", "started", "attempt", "requeued", "resubmitting", "resubmitted")


def fold(entries: Sequence[Mapping[str, Any]]) -> Story:
    """rendered, submitting, submitted is a run that is QUEUED; submitting alone is one that is SUBMITTING.

    A run that is over stays so, whatever is told later, until something shows that it lives: a new attempt, a new
    submission. Of a resubmission that was not answered nothing is known, nor of any state that was not seen.
    """
    story = Story()
    for entry in entries:
        story = _next(story, entry)
    return story


def _next(story: Story, entry: Mapping[str, Any]) -> Story:
    event = entry["event"]
    phase = PHASES.get(event, story.phase)
    if event == "state":
        phase = _watched(story.phase, str(entry.get("state", "")).lower())
    elif event == "finished":
        phase = Phase.DONE if entry.get("code") == 0 else _ended(story)
    elif event == "decided":
        phase = _ended(story) if entry.get("action") == "stop" else Phase.RECOVERING
    elif event == "preflight" and entry.get("code") not in (0, 10):
        phase = Phase.FAILED
    if story.phase.over and event not in ALIVE:
        phase = phase if story.phase is Phase.FAILED and phase in BETTER_KNOWN else story.phase
    changed: dict[str, Any] = {}
    if phase is not story.phase:
        changed = {"phase": phase, "since": entry.get("time", 0.0), "why": _why(entry)}
    if event in ("rendered", "submitting"):  # `submitting` said all of it before there was `rendered`
        changed |= {key: entry[key] for key in ("backend", "name", "steps", "extra", "digest") if key in entry}
    if event == "submitting":  # a job that submits its own successor sees to that itself
        changed |= {"open": True, "asked": entry.get("time", 0.0), "token": entry.get("token", story.token)}
        changed["again"] = entry.get("again", 0)
    if event == "submitted":
        changed["open"] = story.again > 0  # `adopted` follows, once it was seen that the earlier tries left none
    if event in ("adopted", "resubmitted", "refused", "absent", "started"):
        changed["open"] = False
    if event in ("submitted", "adopted", "resubmitted", "started") and entry.get("job"):
        job = str(entry["job"])
        changed |= {"job": job, "jobs": (*(one for one in story.jobs if one != job), job)}
    if event == "cancelling":
        changed["cancelling"] = True
    if event in ("attempt", "ended", "decided"):
        changed["attempts"] = _attempts(story.attempts, entry)
    if event == "decided":
        changed["decision"] = _decision(entry)
    if event == "finished":
        changed["code"] = entry.get("code")
    return replace(story, **changed)


# What the scheduler knows of a run that its own job called failed: scancel is not in the journal.
BETTER_KNOWN = (Phase.DONE, Phase.CANCELLED)


def _ended(story: Story) -> Phase:
    """Cancelled where somebody asked for the end and the attempt was told; not 0, or it would be done."""
    told = story.cancelling and bool(story.attempts) and story.attempts[-1].told
    return Phase.CANCELLED if told else Phase.FAILED


def _watched(now: Phase, word: str) -> Phase:
    """RUNNING does not end a PREFLIGHT, nor QUEUED a recovery: the scheduler knows of neither."""
    said = WATCHED.get(word, Phase.UNKNOWN)
    kept = {Phase.RUNNING: (Phase.PREFLIGHT, Phase.RECOVERING), Phase.QUEUED: (Phase.RECOVERING,)}
    return now if now in kept.get(said, ()) else said


def _why(entry: Mapping[str, Any]) -> str:
    return str(entry.get("why") or entry.get("detail") or "")


def _attempts(known: tuple[Attempt, ...], entry: Mapping[str, Any]) -> tuple[Attempt, ...]:
    number = entry.get("attempt")
    if not isinstance(number, int):
        return known
    there = {attempt.number: attempt for attempt in known}
    one = there.get(number, Attempt(number))
    if entry["event"] == "decided":
        one = replace(one, decision=_decision(entry))
    else:
        ours = ("code", "cause", "node", "rank", "step", "why", "told", "warned")
        said = {key: entry[key] for key in ours if key in entry}
        hosts = tuple(entry.get("hosts") or one.hosts)
        one = replace(one, hosts=hosts, ended=one.ended or entry["event"] == "ended", **said)
    there[number] = one
    return tuple(there[key] for key in sorted(there))


def _decision(entry: Mapping[str, Any]) -> str:
    """ "requeue without node3: the node failed"."""
    without = entry.get("exclude") or ()
    names = without if isinstance(without, str) else ",".join(map(str, without))
    parts = [
        str(entry.get("action", "")),
        f" without {names}" if names else "",
        f": {_why(entry)}" if _why(entry) else "",
    ]
    return "".join(parts)


@dataclass(frozen=True)
class Record:
    """What the journal of one run says."""

    id: str
    folder: Path
    backend: str
    job: str  # the scheduler's id; empty when no submission was recorded
    name: str
    steps: int
    extra: Mapping[str, Any]  # what this backend needs to find the job again
    entries: tuple[Mapping[str, Any], ...] = ()
    token: str = ""  # what its jobs are found by, whatever their numbers
    state: Phase = Phase.UNKNOWN

    @cached_property
    def story(self) -> Story:
        return fold(self.entries)


def root(option: str | None, environ: Mapping[str, str]) -> Path:
    """Where runs live: --runs, else DSLAUNCH_RUNS, else ./dslaunch-runs."""
    return Path(option or environ.get("DSLAUNCH_RUNS") or "dslaunch-runs").absolute()


def new_id(name: str) -> str:
    """demo-20261121-031502-4f2a90c1: sorts by time, never twice, fits every scheduler."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"


ID = re.compile(r"(?P<name>.+)-(?P<when>[0-9]{8}-[0-9]{6}-(?:[0-9a-f]{8}|[0-9a-f]{4}))")


def known(runs: Path, *, name: str | None = None) -> list[Path]:
    """Run directories, the newest first; of one job name when given."""
    found = []
    for path in runs.glob(f"*/{journal.NAME}"):
        match = ID.fullmatch(path.parent.name)
        if match and name in (None, match["name"]):
            found.append((match["when"], path.parent))
    return [folder for _, folder in sorted(found, reverse=True)]


def find(run: str, runs: Path) -> Record:
    """A run by directory, id, or name (the newest of that name)."""
    folder = Path(run) if _is_run(Path(run)) else runs / run
    sweep, _, point = run.rpartition(".")
    if point.isdigit() and not _is_run(folder) and _is_run(runs / sweep / POINTS / point):
        folder = runs / sweep / POINTS / point
    if not _is_run(folder):
        named = known(runs, name=run)
        if not named:
            newest = ", ".join(path.name for path in known(runs)[:5])
            raise UserError(
                Problem(
                    f"no run `{run}` in {runs}", f"the newest here: {newest}" if newest else "--runs names another"
                )
            )
        folder = named[0]
    found = read(folder.absolute())
    if not found.backend:
        raise UserError(Problem(f"{folder / journal.NAME} is empty or damaged: it names no scheduler"))
    return found


def _is_run(folder: Path) -> bool:
    try:
        return (folder / journal.NAME).is_file()
    except OSError as error:  # of somebody else
        raise UserError(Problem(f"cannot look into {folder}: {error.strerror}")) from None


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The journal; of a run on a login node elsewhere with what its job wrote there, each line once, in order."""
    entries, _ = journal.read(folder)
    try:
        there = (folder / THERE).read_bytes()
    except OSError:
        return entries
    seen = {(entry.get("seq"), entry.get("time")) for entry in entries}
    theirs = [
        entry
        for entry in journal.parse(there)[0]
        if (entry.get("seq"), entry.get("time")) not in seen and _told(entry)
    ]
    return sorted([*entries, *theirs], key=lambda entry: entry.get("time", 0.0))


OURS = ("rendered", "submitting")  # what a run is, and where it is asked about: said here, never there
TOLD: dict[str, tuple[type, ...]] = {
    "time": (int, float), "attempt": (int,), "hosts": (list,), "exclude": (list, str),
}  # fmt: skip


def _told(entry: Mapping[str, Any]) -> bool:
    """Whether a line from elsewhere is one that a job writes."""
    typed = all(isinstance(entry[key], kinds) for key, kinds in TOLD.items() if entry.get(key) is not None)
    return entry["event"] not in OURS and entry.get("time") is not None and typed


def points(record: Record) -> list[Record]:
    """The run of each point of a sweep."""
    count = record.extra.get("points")
    return [read(record.folder / POINTS / str(number)) for number in range(count if isinstance(count, int) else 0)]


def one(record: Record, command: str) -> Record:
    """A run, where a sweep has none of what is asked for: its points have."""
    if count := record.extra.get("points"):
        message = f"{record.id} is a sweep of {count} points, and each has its own"
        raise UserError(Problem(message, f"dslaunch {command} {record.id}.0; dslaunch status {record.id} lists them"))
    return record


POINTS = "points"


def sweep_of(folder: Path) -> Path | None:
    """The sweep that has this run directory for one of its points."""
    above = folder.parent.parent
    return above if folder.parent.name == POINTS and folder.name.isdigit() and _is_run(above) else None


def read(folder: Path) -> Record:
    """The run of one directory."""
    try:
        entries = _entries(folder)
    except OSError as error:
        raise UserError(Problem(f"cannot read {folder / journal.NAME}: {error.strerror}")) from None
    story = fold(entries)
    above, job, phase = sweep_of(folder), story.job, story.phase
    if above is not None:  # one submission for all of its points
        array = fold(_entries(above)).job
        job = f"{array}_{folder.name}" if array else ""
        phase = Phase.QUEUED if array and phase is Phase.RENDERED else phase
    return Record(
        id=f"{above.name}.{folder.name}" if above else folder.name,
        folder=folder, backend=story.backend, job=job, name=story.name, steps=story.steps,
        extra=story.extra, entries=tuple(entries), token=story.token or folder.name, state=phase,
    )  # fmt: skip


def exit_code(record: Record) -> int | None:
    """What the job's own script wrote at its end; None while it has not."""
    try:
        return int((record.folder / "exit-code").read_text())
    except (OSError, ValueError):
        return None


def verdict(record: Record) -> dict[str, Any] | None:
    """What the preflight of this run said; None while it has not."""
    try:
        found = json.loads((record.folder / "preflight" / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def events(record: Record, state: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """What the preflight tells on its way, as it does, and every two seconds the Status that `state` gives."""
    path = record.folder / "preflight" / "progress.jsonl"
    read, asked, over = 0, 0.0, False
    while True:
        last = over
        try:
            with path.open("rb") as file:
                file.seek(read)
                text = file.read()
        except OSError:
            text = b""
        whole, newline, _ = text.rpartition(b"\n")
        read += len(whole) + len(newline)
        for line in whole.split(b"\n") if whole else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue
        if last or ((record.folder / "preflight" / "code").exists() and verdict(record) is not None):
            return
        if time.monotonic() - asked > 2:
            asked = time.monotonic()
            status = state()
            over = status.state.over
            yield {"event": "state", "detail": status.detail}
        time.sleep(0.2)


def forget_secrets(record: Record) -> None:
    """The job's script does that itself, unless it never ran or was killed."""
    shutil.rmtree(record.folder / "secrets", ignore_errors=True)


def failures(record: Record) -> list[str]:
    """`rank 3 on node2 ended with exit code 7: ValueError: x`, of the newest attempt, earliest first."""
    found = [node["first_failure"] for node in _failed(record)]
    lines = [*services_failed(record), *(_failure(record, failure) for failure in found)]
    if not lines:  # no rank ever ran
        try:
            lines = [printable((record.folder / "logs" / "failed-before-ranks").read_bytes()[:2000].split(b"\n")[0])]
        except OSError:
            lines = []
    return lines


def begun(record: Record) -> int:
    """The newest attempt that started."""
    return max((entry.get("attempt", 0) for entry in record.entries if entry["event"] == "attempt"), default=0)


def explained(record: Record) -> Attempt | None:
    """An attempt whose end the logs do not tell: its time was up, or the next one writes into the same files."""
    attempts = record.story.attempts
    if not attempts or record.story.phase is Phase.DONE:
        return None
    last = attempts[-1]
    if last.ended:
        return replace(last, cause="slurm_time_limit", why="its time was up") if last.warned else None
    return next((one for one in reversed(attempts) if one.ended and one.cause), None)


def services_failed(record: Record) -> list[str]:
    """The service that ended the newest attempt: what ranks say then follows from it."""
    newest = begun(record)
    found = [entry for entry in record.entries if entry["event"] == "service" and entry.get("state") == "failed"]
    return [str(entry.get("why", "")) for entry in found if entry.get("attempt") == newest]


def diagnosis(record: Record) -> dict[str, Any]:
    """What the node that failed first concluded from its own logs, as JSON; empty where none named a cause."""
    words = [node.get("diagnosis") for node in _failed(record)]
    return next((word for word in words if isinstance(word, dict) and word.get("root")), {})


def _failed(record: Record) -> list[dict[str, Any]]:
    """Nodes of the newest attempt on which a rank failed by itself, the earliest first."""
    words: list[dict[str, Any]] = []
    for path in sorted((record.folder / "logs").glob("node-[0-9]*.json")):
        try:
            node = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(node, dict):
            words.append(node)
    newest = max((node.get("attempt") or 0 for node in words), default=0)
    failed = []
    for node in words:
        failure = node.get("first_failure")
        if not isinstance(failure, dict) or not isinstance(failure.get("rank"), int) or node.get("signalled"):
            continue
        if (failure.get("attempt") or 0) == newest:
            failed.append(node)
    return sorted(failed, key=lambda node: node["first_failure"].get("ended") or 0)


def _failure(record: Record, failure: dict[str, Any]) -> str:
    code = failure.get("code")
    how = f"was killed by {failure['signal']}" if failure.get("signal") else f"ended with exit code {code}"
    log = record.folder / "logs" / f"rank-{failure['rank']:05d}.log"
    # the next attempt writes on in the same file: its lines say nothing of this end
    said = [line for line in tail(log, 5) if line.strip()] if (failure.get("attempt") or 0) >= begun(record) else []
    return f"rank {failure['rank']} on {failure.get('host')} {how}" + (f": {said[-1].strip()[:200]}" if said else "")
