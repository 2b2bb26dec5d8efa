"""Where sweeps stand, and their points: the tasks of an array, in Slurm's words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from launcher import runs
from launcher.backends import State, Status
from launcher.backends.slurm import queue
from launcher.backends.slurm.queue import Job
from launcher.run import Run

NAMED = {State.COMPLETED: "done"}  # the others by their own word


def belongs(record: runs.Record) -> bool:
    """Whether it is a sweep, or a point of one."""
    return bool(record.extra.get("points")) or runs.sweep_of(record.folder) is not None


def states(records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """One squeue for all of them. What it has forgotten, sacct may know, or the result that its script wrote."""
    names = {record.id: _sweep(record) for record in records}
    environ = queue.clean(os.environ)
    asked = run(_squeue(sorted(set(names.values()))), env=environ)
    if asked.code != 0:
        return {record.id: Status(State.UNKNOWN, f"Slurm did not answer: {asked.err.strip()}") for record in records}
    listed = {job.id: job for job in queue.parse_queue(asked.out) if job.name in names.values()}
    every = {record.id: runs.points(record) or [record] for record in records}
    forgotten = {_array(record) for points in every.values() for record in points if record.job not in listed} - {""}
    if forgotten:
        books = run(
            ["sacct", "--noheader", "--parsable2", "-X", "--format=JobID,State,Submit,ExitCode,JobName,Comment",
             f"--jobs={','.join(sorted(forgotten))}"], env=environ,
        )  # fmt: skip
        rows = [line.split("|", 5) for line in books.out.split("\n")] if books.code == 0 else []
        for row in rows:
            if len(row) == 6 and row[4] in names.values():
                listed.setdefault(row[0], Job(row[0], row[1], row[2], queue.pair(row[3]), row[4], row[5]))
    return {
        record.id: together([_state(point, listed) for point in every[record.id]], record.job)
        if record.extra.get("points")
        else _state(record, listed)
        for record in records
    }


def _squeue(names: Sequence[str]) -> list[str]:
    fields = ",".join(f"{'JobArrayID' if name == 'JobID' else name}:{width}" for name, width in queue.COLUMNS)
    return ["squeue", "--noheader", "--array", "--states=all", f"--name={','.join(names)}", f"--Format={fields}"]


def _sweep(record: runs.Record) -> str:
    """The name of the array."""
    above = runs.sweep_of(record.folder)
    return above.name if above else record.id


def _array(record: runs.Record) -> str:
    return record.job.partition("_")[0]


def _state(point: runs.Record, listed: dict[str, Job]) -> Status:
    job = listed.get(point.job)
    if job:
        return queue.status(point, job)
    marker = runs.exit_code(point)
    if marker is not None:
        over = State.COMPLETED if marker == 0 else State.FAILED
        words = "Slurm has forgotten the task; the exit code is the one its script wrote"
        return Status(over, words, marker, job=point.job)
    return Status(State.UNKNOWN, f"Slurm does not know task {point.job or 'of this point'}", absent=True)


def together(points: Sequence[Status], job: str) -> Status:
    """Of a sweep: it runs while one of its points does, and has failed when all are over and one has.

    >>> done, bad = Status(State.COMPLETED, "", 0), Status(State.FAILED, "", 7)
    >>> together([done, bad, Status(State.PENDING, "")], "7").detail
    '1 pending, 1 failed, 1 done'
    >>> together([done, bad], "7").code
    7
    """
    count = Counter(point.state for point in points)
    detail = ", ".join(f"{count[state]} {NAMED.get(state, state.value)}" for state in ORDER if count[state])
    for state in (State.RUNNING, State.PENDING, State.UNKNOWN, State.FAILED, State.CANCELLED, State.COMPLETED):
        if count[state]:
            codes = [point.code for point in points if point.code] if state is State.FAILED else []
            code = codes[0] if codes else (0 if state is State.COMPLETED else None)
            absent = state is State.UNKNOWN and all(point.absent for point in points)
            return Status(state, detail, code, job=job, absent=absent)
    return Status(State.UNKNOWN, "no points", job=job, absent=True)


ORDER = (State.RUNNING, State.PENDING, State.UNKNOWN, State.FAILED, State.CANCELLED, State.COMPLETED)


def arrays(record: runs.Record, run: Run) -> list[tuple[str, bool]] | None:
    """Arrays of this sweep, and whether a task of each has started; None when squeue gives no answer."""
    asked = run(_squeue([record.id]), env=queue.clean(os.environ))
    if asked.code != 0:
        return None
    found: dict[str, bool] = {}
    for job in queue.parse_queue(asked.out):
        if job.name == record.id:
            array = job.id.partition("_")[0]
            found[array] = found.get(array, False) or queue.parse_state(job.word) is not State.PENDING
    return list(found.items())
