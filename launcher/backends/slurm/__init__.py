"""Slurm: an sbatch script by submitit with a body that can be read, kept and re-run by hand."""

from __future__ import annotations

from typing import Any

from launcher.backends.slurm.options import minutes
from launcher.backends.slurm.script import ENTRY, notes, preflight, render

__all__ = [
    "ENTRY", "OUTPUT", "cancel", "drain", "environment", "events", "look_up", "minutes", "notes", "parse_state",
    "parse_submitted", "preflight", "render", "sending", "state", "states", "submit", "test_only", "verdict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What asks the controller is loaded once it is asked for: to render a script takes none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from launcher.backends.slurm import controller

    return getattr(controller, name)
