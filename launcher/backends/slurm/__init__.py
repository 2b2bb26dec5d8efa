"""Slurm: an sbatch script by submitit with a body that can be read, kept and re-run by hand."""

from launcher.backends.slurm.controller import (
    OUTPUT,
    cancel,
    drain,
    environment,
    events,
    look_up,
    notes,
    parse_submitted,
    sending,
    state,
    submit,
    test_only,
    verdict,
)
from launcher.backends.slurm.queue import parse_state, states
from launcher.backends.slurm.script import ENTRY, minutes, preflight, render

__all__ = [
    "ENTRY", "OUTPUT", "cancel", "drain", "environment", "events", "look_up", "minutes", "notes", "parse_state",
    "parse_submitted", "preflight", "render", "sending", "state", "states", "submit", "test_only", "verdict",
]  # fmt: skip
