"""Manifests for checkpoints of programs that write none, while they train."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from launcher.checkpoints import vouch

EVERY = 10.0  # seconds between two looks; files that are the same at both are written
LAST = 60.0  # seconds that the look after the end may take


class Voucher(threading.Thread):
    """One per job, beside rank 0: a directory of 1,000 shards may take a second to read, so not in the heartbeat."""

    def __init__(self, directory: str, *, every: float = EVERY) -> None:
        super().__init__(daemon=True)
        self.directory, self.every = directory, every
        self.over = threading.Event()

    def run(self) -> None:
        looked: dict[str, Any] = {}
        while not self.over.wait(self.every):
            with contextlib.suppress(OSError):  # the file system is away for a while
                looked = vouch.look(self.directory, looked)
        with contextlib.suppress(OSError):
            vouch.look(self.directory, looked, over=True)

    def finish(self, seconds: float) -> None:
        """Nobody writes any more: what is whole now is vouched for at once."""
        self.over.set()
        self.join(seconds)
