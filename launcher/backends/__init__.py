"""Schedulers, one module each: the folder is the registry.

A backend is a module with

    render(plan) -> Bundle                     pure
    preflight(spec, plan) -> Bundle            pure: a job that checks its nodes and ends
    submit(folder, spec, run) -> str           the scheduler's id of the job
    look_up(folder, run) -> list[(str, bool)]  jobs with the run's token, and whether each has started
    state(record, run) -> Status
    states(records, run) -> dict[str, Status]  by the run's id, with one question for all; where it is missing,
                                               each is asked for with state
    OUTPUT                                     where its output is, a pattern within the run directory; or
    logs(record, rank, follow, run) -> Iterator[str]
    cancel(record, run) -> None
    events(record, run) -> Iterator[dict]      of a preflight, as it goes on
    verdict(record, run) -> dict | None
    drain(nodes, run) -> list[str]             node -> reason; what became of it, in words
"""

from __future__ import annotations

import enum
import importlib
from types import ModuleType

from launcher.record import record

NAMES = ("local", "slurm", "kubernetes")


class State(enum.Enum):
    """UNKNOWN is what an empty, late or new answer means: never success, never failure."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def over(self) -> bool:
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)


@record
class Status:
    state: State
    detail: str = ""
    code: int | None = None  # the job's exit code, once it is known
    job: str = ""  # the scheduler's id of the run's newest job, where its answer names one
    absent: bool = False  # the scheduler answered, and says that it has no such job
    stuck: bool = False  # it cannot start, and waiting longer changes nothing


def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise LookupError(name)
    return importlib.import_module(f"launcher.backends.{name}")
