"""Schedulers, one module each: the folder is the registry.

A backend is a module with

    render(plan) -> Bundle                     pure
    preflight(spec, plan) -> Bundle            pure: a job that checks its nodes and ends
    submit(folder, spec, run) -> str           the scheduler's id of the job
    state(record, run) -> Status
    logs(record, rank, follow, run) -> Iterator[str]
    cancel(record, run) -> None
    events(record, run) -> Iterator[dict]      of a preflight, as it goes on
    verdict(record, run) -> dict | None
    drain(nodes, run) -> list[str]             node -> reason; what became of it, in words
"""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass
from types import ModuleType

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


@dataclass(frozen=True)
class Status:
    state: State
    detail: str = ""
    code: int | None = None  # the job's exit code, once it is known


def load(name: str) -> ModuleType:
    if name not in NAMES:
        raise LookupError(name)
    return importlib.import_module(f"launcher.backends.{name}")
