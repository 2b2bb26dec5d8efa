"""From a bundle to exactly one job: the run directory, the lock on its name, and what is found of an earlier try."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher import backends, runs, snapshot
from launcher import bundle as bundles
from launcher.bundle import Bundle
from launcher.errors import DISK, Problem, Unreachable, UserError
from launcher.node import journal
from launcher.run import Run, signals_wait
from launcher.runs import submit as submission
from launcher.snapshot import Snapshot
from launcher.spec import JobSpec

EXPIRED = 600.0  # seconds: a munge credential is good for 300, by clocks that may differ by as much


class Interrupted(Exception):
    """A signal came before there was an answer. `says` whether a job exists."""

    def __init__(self, number: int, says: str = "") -> None:
        self.number, self.says = number, says
        super().__init__(says)


@dataclass(frozen=True)
class Begun:
    record: runs.Record
    how: str  # submitted, adopted: found after all; already: a live run of the same bundle
    signal: int = 0  # one that came while the scheduler was asked, too late to stop it
    cancelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is to run, and where."""

    backend: str
    spec: JobSpec
    bundle: Bundle
    base: Path  # the directory of the job file
    secrets: Mapping[str, str]
    facts: Mapping[str, Any]  # for the journal: extra, predicted
    alone: bool = True  # a live run of the same name is this one, or in its way
    again: bool = False  # submit another one on purpose
    options: Mapping[str, str] = field(default_factory=dict)  # of the backend's submit
    code: Snapshot | None = None  # which the run takes along
    points: Sequence[Mapping[str, Any]] = ()  # of a sweep: what the journal of each says


def begin(order: Order, root: Path, run: Run) -> Begun:
    """Submit, once. A run that lives already, or whose submission was cut short, is found and finished instead.
    One that was cancelled and still saves is waited for by the new job.

    Raises UserError when it is refused (nothing is left then), Unreachable when nobody knows, Interrupted.
    """
    backend = backends.load(order.backend)
    digest, files = digests(order.bundle, order.base, order.code)
    _make(root)
    with _locked(root, order.spec.name), signals_wait() as came:
        options = dict(order.options)
        if order.alone:
            for record in living(root, order.spec.name, backend, run, came):
                same = record.story.digest == digest
                ending = bool(record.job) and order.backend == "slurm" and record.story.cancelling
                if same and not order.again and not ending:
                    if record.job:
                        return Begun(record, "already")
                    return _submit(record, order, backend, run, came, options)
                if record.job and not (same and order.again) and not ending:
                    _apart(record, order)
                if record.job and order.backend == "slurm" and (same or _shares(record, order)):
                    options["after"] = ":".join(filter(None, (options.get("after"), record.job)))  # it saves yet
        folder = _write(order, root, digest, files)
        return _submit(runs.read(folder), order, backend, run, came, options)


def digests(bundle: Bundle, base: Path, code: Snapshot | None = None) -> tuple[str, dict[str, str]]:
    """One for what runs, and where from; and one for each file, which a node can hold its copy against."""
    files = {
        file.path: hashlib.sha256(file.text.encode(errors="surrogateescape")).hexdigest() for file in bundle.files
    }
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    lines += f"{code.digest}  {snapshot.CODE}\n" if code else ""
    return hashlib.sha256(f"{os.path.realpath(base)}\n{lines}".encode(errors="surrogateescape")).hexdigest(), files


def living(root: Path, name: str, backend: ModuleType, run: Run, came: Sequence[int] = ()) -> Iterator[runs.Record]:
    """Runs of that name that are not over, or not known to be; the newest first. Begun submissions are finished.

    What has no job is living as long as it has its files and was never refused: the next command goes on with it.
    """
    for folder in runs.known(root, name=name):
        record = runs.read(folder)
        if record.state.over or record.extra.get("checks") or record.backend != backend.__name__.rpartition(".")[2]:
            continue
        if record.story.open:
            record = resumed(record, run, came)
        if record.job:
            status = backend.state(record, run)
            if status.state.over:
                journal.append(folder, "state", state=status.state.value, detail=status.detail)
            if status.state.over or status.absent:
                continue
        yield record


def reconcile(record: runs.Record, run: Run) -> runs.Record:
    """Finish what a submission left open, for a command that asks about the run. Raises Unreachable: nobody knows."""
    if not record.story.open:
        return record
    try:
        with _locked(record.folder.parent, record.name or record.id, wait=0.0), signals_wait() as came:
            return resumed(runs.read(record.folder), run, came)
    except journal.Busy as error:
        raise Unreachable(Problem(f"{record.id} is being submitted right now: {error}", "ask again")) from None


def resumed(record: runs.Record, run: Run, came: Sequence[int] = ()) -> runs.Record:
    if record.story.open:
        backend = backends.load(record.backend)
        long_ago = time.time() - record.story.asked > EXPIRED
        with _disk(record.folder):
            submission.resume(_effects(record, backend, run, came), settle=0.0 if long_ago else _settle(backend))
    return runs.read(record.folder)


def _submit(
    record: runs.Record, order: Order, backend: ModuleType, run: Run, came: Sequence[int], options: Mapping[str, str]
) -> Begun:
    """The job of a run directory that has none."""

    def send() -> str:
        _look_at(came)
        job: str = backend.submit(record.folder, order.spec, run, **options)
        return job

    effects = replace(_effects(record, backend, run, came), submit=send)
    try:
        with _disk(record.folder):
            outcome = submission.submit(effects, record.id, settle=_settle(backend))
    except Unreachable:
        raise
    except UserError:
        shutil.rmtree(record.folder)
        raise
    except Interrupted as error:
        story = runs.read(record.folder).story
        if story.job:
            says = f"job {story.job} exists: dslaunch cancel {record.id} ends it"
        elif any(entry["event"] == "unanswered" for entry in runs.read(record.folder).entries) and story.open:
            says = f"whether a job exists is not known: dslaunch status {record.id} looks for it"
        else:
            shutil.rmtree(record.folder)
            says = "nothing was submitted"
        raise Interrupted(error.number, says) from None
    how = "adopted" if outcome.adopted else "submitted"
    return Begun(runs.read(record.folder), how, came[0] if came else 0, outcome.cancelled)


def _settle(backend: ModuleType) -> float:
    return float(getattr(backend, "SETTLE", submission.SETTLE))


def _effects(record: runs.Record, backend: ModuleType, run: Run, came: Sequence[int]) -> submission.Effects:
    def sleep(seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            _look_at(came)
            time.sleep(min(left, 0.2))

    def never() -> str:
        raise AssertionError("a look-up submits nothing")

    return submission.Effects(
        note=lambda event, **fields: journal.append(record.folder, event, **fields),
        submit=never,
        look_up=lambda: backend.look_up(record.folder, run),
        cancel=lambda job: backend.cancel(replace(record, job=job), run),
        sending=lambda: _sending(record, backend),
        now=time.monotonic,
        sleep=sleep,
        spread=lambda: random.uniform(0.5, 1.5),  # noqa: S311 - no secret
    )


def _sending(record: runs.Record, backend: ModuleType) -> bool:
    """On the host that began it one can see; from another one it is over when its time is."""
    begun = [entry for entry in record.entries if entry["event"] == "submitting"]
    if begun and begun[-1].get("host") == socket.gethostname():
        return hasattr(backend, "sending") and bool(backend.sending(record))
    return 0 <= time.time() - record.story.asked < submission.ANSWER


def _look_at(came: Sequence[int]) -> None:
    if came:
        raise Interrupted(came[0])


def _apart(record: runs.Record, order: Order) -> None:
    """Two jobs that write the same checkpoints would ruin them."""
    if _shares(record, order):
        place = record.extra["checkpoints"]
        message = f"{record.id} (job {record.job.partition(':')[0]}) lives, and trains into {place} as well"
        hint = f"dslaunch cancel {record.id} first, or another train.checkpoint.dir"
        raise UserError(Problem(message, hint, ("train", "checkpoint", "dir")))


def _shares(record: runs.Record, order: Order) -> bool:
    place = order.facts.get("extra", {}).get("checkpoints")
    return bool(place) and place == record.extra.get("checkpoints")


# --- the disk -------------------------------------------------------------------------------------


def _make(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(_unwritable(root, error)) from None


def _unwritable(place: Path, error: OSError) -> Problem:
    return Problem(f"cannot write {place}: {error.strerror or error}", "--runs names another place")


@contextlib.contextmanager
def _locked(root: Path, name: str, *, wait: float = 120.0) -> Iterator[None]:
    """One submission of a name at a time, on whichever login node."""
    lock = journal.Lock(root / f".{name}.lock", wait=wait)
    try:
        lock.__enter__()
    except journal.Busy as error:
        if not wait:
            raise
        raise UserError(Problem(f"another dslaunch is submitting `{name}`: {error}", "wait for it")) from None
    except OSError as error:
        raise UserError(_unwritable(root, error)) from None
    try:
        yield
    finally:
        lock.__exit__()


SHARED = ("node", "code")  # of a sweep: the same for every point


def _write_point(half: Path, place: str, order: Order, files: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """A point of a sweep is a run directory of its own: its journal, its logs, its copy of the secrets."""
    there = half / place
    (there / "logs").mkdir(mode=0o700)
    (there / "submitted-from").symlink_to(order.base, target_is_directory=True)
    for name in SHARED:
        if (half / name).is_dir():
            (there / name).symlink_to(Path("..", "..", name), target_is_directory=True)
    for name, value in order.secrets.items():
        bundles.write_private(there / "secrets" / name, value)
    mine = {path.removeprefix(f"{place}/"): digest for path, digest in files.items() if path.startswith(f"{place}/")}
    mine |= {path: digest for path, digest in files.items() if path.startswith(f"{SHARED[0]}/")}
    journal.append(there, "rendered", name=order.spec.name, backend=order.backend, files=mine, **facts)


def _write(order: Order, root: Path, digest: str, files: Mapping[str, str]) -> Path:
    """The run directory, there as a whole or not at all; what an earlier dslaunch was killed over is swept."""
    spec = order.spec
    for left in root.glob(f".{spec.name}-*.half"):
        named = runs.ID.fullmatch(left.name[1 : -len(".half")])
        if named and named["name"] == spec.name:
            shutil.rmtree(left, ignore_errors=True)
    run = runs.new_id(spec.name)
    half, folder = root / f".{run}.half", root / run
    try:
        values = {} if order.points else dict(order.secrets)  # each point has its own copy
        bundles.write(order.bundle, half, submitted_from=order.base, secrets=values)
        if order.code:
            snapshot.write(order.code, half)
        journal.append(
            half, "rendered", name=spec.name, backend=order.backend, steps=spec.steps, digest=digest,
            files=files, **({"code": order.code.facts()} if order.code else {}), **order.facts,
        )  # fmt: skip
        for number, facts in enumerate(order.points):
            _write_point(half, f"{runs.POINTS}/{number}", order, files, facts)
        half.rename(folder)
        journal.sync_folder(root)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        raise UserError(_unwritable(folder, error)) from None
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return folder


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A journal that cannot be written in the middle: what it does not say can still be looked up."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        message = f"cannot write {folder / journal.NAME}: {error.strerror}; a job may exist"
        raise Unreachable(
            Problem(message, "make room, then run the same command: it looks for the job first")
        ) from None


def told(number: int) -> str:
    """2 is SIGINT."""
    return signal.Signals(number).name
