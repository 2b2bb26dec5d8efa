"""Slurm: an sbatch script by submitit with a body that can be read, kept and re-run by hand."""

from launcher.backends.slurm.controller import (
    cancel,
    drain,
    environment,
    events,
    logs,
    notes,
    parse_state,
    parse_submitted,
    state,
    submit,
    test_only,
    verdict,
)
from launcher.backends.slurm.script import ENTRY, minutes, preflight, render

__all__ = [
    "ENTRY", "cancel", "drain", "environment", "events", "logs", "minutes", "notes", "parse_state",
    "parse_submitted", "preflight", "render", "state", "submit", "test_only", "verdict",
]  # fmt: skip
