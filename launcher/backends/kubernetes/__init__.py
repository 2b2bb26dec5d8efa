"""Kubernetes: manifests that any kubectl applies, and the cluster asked about them."""

from launcher.backends.kubernetes.manifests import (
    DIGEST,
    ENTRY,
    GRACE,
    JOIN,
    MOUNT,
    REASON,
    checking,
    manifests,
    notes,
    preflight,
    render,
)
from launcher.backends.kubernetes.server import UID, cancel, drain, events, logs, state, submit, verdict

__all__ = [
    "DIGEST", "ENTRY", "GRACE", "JOIN", "MOUNT", "REASON", "UID", "cancel", "checking", "drain", "events", "logs",
    "manifests", "notes", "preflight", "render", "state", "submit", "verdict",
]  # fmt: skip
