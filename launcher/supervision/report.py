"""What a node says about its end: why, as far as its own logs tell."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from launcher import diagnose
from launcher.diagnose import Evidence, explain

SEARCHED = 4 << 20  # bytes at the end of each log
LINES = 200  # of the kernel
# Of lack of memory the kernel tells for every job on a host; ours is counted by our own limit.
MEMORY = re.compile(r"oom|out of memory|killed process", re.IGNORECASE)


def diagnosis(logs: Mapping[str, int], evidence: Evidence, *, kernel: str, since: float) -> Any:
    """`logs` are files and where this attempt begins in them; what the kernel has said since is kept in `kernel`."""
    starts = {}
    for path, start in logs.items():
        with contextlib.suppress(OSError):
            starts[path] = max(start, os.path.getsize(path) - SEARCHED)
    told = recent(dmesg(), since)
    if told:
        with contextlib.suppress(OSError):  # a full disk
            with open(kernel, "w", encoding="utf-8") as file:
                file.write(told)
            starts[kernel] = 0
    return diagnose.to_json(explain.diagnose(list(starts), evidence, starts=starts))


def dmesg() -> str:
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def recent(text: str, since: float) -> str:
    """Lines since `since`, in seconds as the kernel counts them, but for those about memory.

    "[ 100.5] eth0: link down\\n[ 200.1] NVRM: Xid" since 150 is the second line.
    """
    kept = []
    for line in text.splitlines():
        stamp = re.match(r"\[ *(\d+\.\d+)\]", line)
        if stamp and float(stamp[1]) >= since and not MEMORY.search(line):
            kept.append(line + "\n")
    return "".join(kept[-LINES:])
