"""What schedulers say about runs: one question for all, shared by every dslaunch that looks, told with its age.

    runs/.poll-1000/slurm   when user 1000 last asked this backend
    runs/.poll-1000/RUN     somebody watches this run (the file's age says how long ago)
    runs/RUN/seen.json      the last answer about it, and why there was none since

Silence is never an answer. A scheduler that is slow, down or has forgotten leaves a run where it was, marked UNKNOWN
with the age of what is shown; nothing here, or anywhere on the client's side, starts or ends a job because of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher import backends, runs
from launcher.backends import State, Status
from launcher.errors import UserError
from launcher.node import journal
from launcher.run import Run

EVERY = 10.0  # seconds between two questions to one scheduler, whatever the number of runs and watchers
ABSENT = 60.0  # seconds between two questions about a job that the scheduler says it has not
WATCHED = 60.0  # seconds for which a watcher's run is asked for by others too
FORGETS = 300.0  # Slurm's MinJobAge, its default: so long an ended job is in squeue
SEEN, FOLDER = "seen.json", f".poll-{os.getuid()}"


NEVER = Status(State.UNKNOWN, "not asked yet")


# --- pure -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The last answer about a run, and what came since. Times are seconds since the epoch."""

    status: Status = NEVER
    since: float | None = None  # when the scheduler first said this
    answered: float | None = None  # and when it last did
    asked: float | None = None
    silence: str = ""  # why the last question had no answer; empty when it had
    absent: float | None = None  # since when the scheduler says it has no such job

    @property
    def shown(self) -> Status:
        """UNKNOWN while there is no answer, whatever the last one was."""
        if self.silence:
            return Status(State.UNKNOWN, self.silence, job=self.status.job, absent=self.absent is not None)
        return self.status

    def age(self, now: float) -> float | None:
        """Seconds since the last answer; None when there never was one."""
        return None if self.answered is None else max(0.0, now - self.answered)

    def gone(self, now: float) -> bool:
        """The scheduler has said twice, more than MinJobAge apart, that it has no such job."""
        return self.absent is not None and self.asked is not None and self.asked - self.absent > FORGETS


def step(known: Known, answer: Status, now: float) -> Known:
    """What is known after one more answer.

    RUNNING, then a time-out: UNKNOWN, and the RUNNING before it keeps its age. A verdict stays whatever is not heard
    afterwards; only the scheduler itself takes it back, for a job that was queued again.
    """
    if answer.state is not State.UNKNOWN:
        same = known.since is not None and (answer.state, answer.job) == (known.status.state, known.status.job)
        return Known(answer, since=known.since if same else now, answered=now, asked=now)
    if known.status.state.over:
        return replace(known, asked=now)
    since = (known.absent if known.absent is not None else now) if answer.absent else None
    return replace(known, asked=now, silence=answer.detail or "no answer", absent=since)


def due(known: Known, phase: runs.Phase, now: float, *, every: float = EVERY) -> bool:
    """Whether to ask about this run again: never after a verdict, seldom about a job that is not there."""
    if phase in (runs.Phase.PLANNED, runs.Phase.RENDERED):  # nobody was asked to run it
        return False
    if known.asked is None or known.asked > now + every:  # a clock that was set back
        return True
    if known.status.state.over and phase.over:  # a journal that says it lives again was queued again
        return False
    return now - known.asked >= (max(every, ABSENT) if every and known.absent is not None else every)


def standing(story: runs.Story, known: Known) -> tuple[runs.Phase, str]:
    """Where a run is, and why we say so: the scheduler's word for its newest job, and what the job itself wrote down.

    A job that ended with the decision to go on is not over: its successor has FOLLOWS seconds to show up.
    """
    phase, shown = story.phase, known.shown
    if shown.state is State.UNKNOWN:
        if phase.over or known.asked is None:
            return phase, story.why
        return runs.Phase.UNKNOWN, shown.detail
    if shown.state is State.PENDING:
        again = phase is runs.Phase.RECOVERING or bool(story.attempts)
        return (runs.Phase.RECOVERING if again else runs.Phase.QUEUED), shown.detail
    if shown.state is State.RUNNING:
        kept = phase in (runs.Phase.PREFLIGHT, runs.Phase.RECOVERING)
        return (phase if kept else runs.Phase.RUNNING), (story.why if kept and story.why else shown.detail)
    if shown.state is State.FAILED and phase is runs.Phase.RECOVERING:
        since = known.since or 0.0
        if (known.answered or 0.0) - min(since, story.since or since) < FOLLOWS:
            return phase, f"{shown.detail}; {story.decision}" if story.decision else shown.detail
        return runs.Phase.FAILED, f"{shown.detail}; the job that should have followed did not come"
    return OVER[shown.state], shown.detail


FOLLOWS = 120.0  # seconds: Slurm holds a job that is queued again for cred_expire, 120 s unless the site says less
OVER = {
    State.COMPLETED: runs.Phase.DONE,
    State.FAILED: runs.Phase.FAILED,
    State.CANCELLED: runs.Phase.CANCELLED,
}


def to_json(known: Known) -> dict[str, Any]:
    return {**asdict(known), "status": {**asdict(known.status), "state": known.status.state.value}}


def from_json(found: Any) -> Known:
    """Nothing known, where the file is of another shape."""
    try:
        status = found["status"]
        code = status["code"] if isinstance(status["code"], int) else None
        last = Status(
            State(status["state"]), str(status["detail"]), code, str(status["job"]), bool(status["absent"]),
            bool(status.get("stuck")),
        )  # fmt: skip
        times = {name: _number(found[name]) for name in ("since", "answered", "asked", "absent")}
        return Known(last, silence=str(found["silence"]), **times)
    except (LookupError, TypeError, ValueError):
        return Known()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# --- the machine ----------------------------------------------------------------------------------


def interval(environ: Mapping[str, str]) -> float:
    """DSLAUNCH_POLL: seconds between two questions, where a site wants fewer than one every 10."""
    try:
        return max(0.5, float(environ.get("DSLAUNCH_POLL", EVERY)))
    except ValueError:
        return EVERY


def seen(record: runs.Record) -> Known:
    """The last answer as anybody wrote it down; the scheduler is not asked."""
    try:
        found = from_json(json.loads((record.folder / SEEN).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Known()
    newer = record.job and found.status.job and found.status.job != record.job and found.status.state.over
    return Known() if newer else found  # a verdict on a job that was followed by another


def states(
    records: Sequence[runs.Record], *, run: Run, patient: bool = False, fresh: bool = False,
    clock: Callable[[], float] = time.time,
) -> dict[str, Known]:  # fmt: skip
    """Of each run by its id. A scheduler is asked when nobody asked it within the interval.

    A command that looks once asks for a run that nobody knows yet at once; `patient` ones, which come again, wait for
    their turn: so three watchers that begin together ask once. `fresh` is for what depends on how it is now: it asks
    whoever asked before, and tells all others.
    """
    every = 0.0 if fresh else interval(os.environ)
    found: dict[str, Known] = {}
    groups: dict[tuple[Path, str], list[runs.Record]] = {}
    for record in records:
        groups.setdefault((record.folder.parent, record.backend), []).append(record)
    for (root, backend), group in groups.items():
        if backend == "local":  # this machine's own processes: nobody is disturbed, nothing is to be shared
            for record in group:
                known = step(Known(), _ask(backend, [record], run)[record.id], clock())
                found[record.id] = replace(known, since=0.0)  # nothing follows processes that are gone
        else:
            found |= _shared(root, backend, group, run=run, patient=patient, every=every, clock=clock)
    return found


UNWRITTEN: dict[tuple[Path, str], tuple[float, dict[str, Known]]] = {}  # what this process knows, where no disk can


def _shared(
    root: Path, backend: str, records: list[runs.Record], *, run: Run, patient: bool, every: float,
    clock: Callable[[], float],
) -> dict[str, Known]:  # fmt: skip
    folder = root / FOLDER
    known = {record.id: seen(record) for record in records}
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if patient:
            for record in records:
                if not known[record.id].status.state.over:
                    (folder / record.id).touch(mode=0o600)
        if not _turn(folder / backend, records, known, patient=patient, every=every, now=clock()):
            return known
        with journal.Lock(str(folder / f"{backend}.lock"), wait=0 if patient else 90):
            known = {record.id: seen(record) for record in records}  # somebody may have asked meanwhile
            if not _turn(folder / backend, records, known, patient=patient, every=every, now=clock()):
                return known
            _write(folder / backend, {"asked": clock()})
            mine = [runs.read(record.folder) for record in records]  # as their journals are now
            everybody = {record.id: record for record in (*_watched(root, backend), *mine)}
            known = {name: seen(record) for name, record in everybody.items()}
            slack = every * 0.9  # the turn has come; whoever was asked for a moment later comes along
            asked = [
                record for name, record in everybody.items() if due(known[name], record.state, clock(), every=slack)
            ]
            for name, answer in _ask(backend, asked, run).items():
                known[name] = _remember(everybody[name], known[name], answer, clock())
    except journal.Busy:
        pass  # somebody asks right now: what was seen last, until the next look
    except OSError:  # a full disk, or one that we may only read: nothing is shared, and no more is asked for that
        at, last = UNWRITTEN.get((root, backend), (0.0, {}))
        known |= {name: last[name] for name in known if name in last}
        if not patient or not 0 <= clock() - at < every or not known.keys() <= last.keys():
            for name, answer in _ask(backend, records, run).items():
                known[name] = step(known[name], answer, clock())
            UNWRITTEN[root, backend] = clock(), dict(known)
    return {record.id: known[record.id] for record in records}


def _turn(
    path: Path, records: Iterable[runs.Record], known: Mapping[str, Known], *, patient: bool, every: float, now: float
) -> bool:
    wanted = [known[record.id] for record in records if due(known[record.id], record.state, now, every=every)]
    if not wanted:
        return False
    if not patient and any(one.asked is None for one in wanted):
        return True
    try:
        asked = float(json.loads(path.read_text(encoding="utf-8"))["asked"])
    except (OSError, ValueError, LookupError, TypeError):
        return True
    return not 0 <= now - asked < every


def _watched(root: Path, backend: str) -> Iterable[runs.Record]:
    """Runs that others look at: one question serves them too."""
    for path in (root / FOLDER).iterdir():
        if not (root / path.name / journal.NAME).is_file():
            continue
        try:
            if time.time() - path.stat().st_mtime > WATCHED:
                path.unlink()
                continue
            record = runs.read(root / path.name)
        except (OSError, UserError):
            continue
        if record.backend == backend:
            yield record


def _ask(backend: str, records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """Every run gets an answer, if only that there was none."""
    if not records:
        return {}
    if backend not in backends.NAMES:
        return {record.id: Status(State.UNKNOWN, "its journal is gone") for record in records}
    module = backends.load(backend)
    found: dict[str, Status] = {}
    if hasattr(module, "states"):
        try:
            found = module.states(records, run)
        except UserError as error:
            found = {record.id: Status(State.UNKNOWN, str(error)) for record in records}
    else:
        for record in records:
            try:
                found[record.id] = module.state(record, run)
            except UserError as error:
                found[record.id] = Status(State.UNKNOWN, str(error))
    return {record.id: found.get(record.id, Status(State.UNKNOWN, "no answer")) for record in records}


def _remember(record: runs.Record, known: Known, answer: Status, now: float) -> Known:
    """In seen.json, and in the journal where it says of the run what the journal did not know."""
    new = step(known, answer, now)
    with contextlib.suppress(OSError):
        _write(record.folder / SEEN, to_json(new))
        phase, why = standing(record.story, new)
        if phase is not record.state:
            journal.append(record.folder, "state", state=phase.value, detail=why)
    return new


def _write(path: Path, value: Any) -> None:
    """Whole or not at all, for the owner alone."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - created with its mode
        json.dump(value, file)
    part.replace(path)
