"""Kubernetes: manifests that any kubectl applies, and the cluster asked about them."""

from __future__ import annotations

from typing import Any

from launcher.backends.kubernetes.manifests import (
    DIGEST,
    ENTRY,
    GRACE,
    HERE,
    JOIN,
    MOUNT,
    REASON,
    RUN,
    checking,
    grace,
    kind,
    manifests,
    notes,
    preflight,
    recovers,
    render,
    tree,
)

__all__ = [
    "DIGEST", "ENTRY", "GRACE", "HERE", "JOIN", "MOUNT", "REASON", "RUN", "SETTLE", "UID", "cancel", "changes",
    "checking", "drain", "events", "evidence", "grace", "kind", "logs", "look_up", "manifests", "notes", "preflight",
    "recovers", "render", "state", "states", "submit", "tree", "validate", "verdict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What asks the cluster is loaded once it is asked for: to render manifests takes none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from launcher.backends.kubernetes import server

    return getattr(server, name)
