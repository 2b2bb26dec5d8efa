"""File systems that the kernel turned read-only after an error: the node boots, and every write on it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Setting, kernel

STAGE = "host"

LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs")  # that go read-only, or away, on an error
PLACES = ("/", "/tmp", "/var", "/var/tmp", "/home", "/dev/shm")  # noqa: S108 - looked at, never written
REMOUNTED = "Remounting filesystem read-only"
SHUT = "Shutting down filesystem"  # XFS
SOURCE = "ext4 and xfs stop writing when they meet an error (mount option errors=remount-ro, xfs shutdown)"
FIX = "look at the disk (dmesg, smartctl -a), repair the file system, and reboot"


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    text = probe.read("/proc/mounts")
    if not text:
        return {"unknown": "/proc/mounts could not be read"}
    places = [*PLACES, *filter(None, [setting.checkpoint_dir])]
    with contextlib.suppress(OSError):  # a directory that is gone
        places.append(os.getcwd())
    log = kernel.log(probe, REMOUNTED, SHUT)
    return {"mounts": mounts(text, places), "log": [line[1] for line in log.get("lines", [])]}


def mounts(text: str, places: list[str]) -> list[dict[str, Any]]:
    """The file systems that hold one of the places; of two on one directory, the last is the one seen."""
    table = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 4:
            table[fields[1].replace("\\040", " ")] = (fields[0], fields[2], fields[3].split(","))
    found = {}
    for place in places:
        over = [at for at in table if place == at or place.startswith(at.rstrip("/") + "/") or at == "/"]
        if over:
            at = max(over, key=len)
            device, kind, options = table[at]
            found[at] = {
                "at": at, "device": device, "kind": kind, "readonly": "ro" in options,
                "error": "errors=remount-ro" in options or "emergency_ro" in options,
            }  # fmt: skip
    return list(found.values())


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    nodes = seen(found)
    return [
        *unknowns("filesystems", found),
        *(finding for node, value in nodes.items() for finding in _node(node, value, nodes)),
    ]


def _node(node: str, value: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Read-only by design is read-only on every node, and without the option that an error leaves."""
    for mount in value["mounts"]:
        if not mount["readonly"] or mount["kind"] not in LOCAL:
            continue
        writable = [
            other for other, there in nodes.items()
            if other != node and any(one["at"] == mount["at"] and not one["readonly"] for one in there["mounts"])
        ]  # fmt: skip
        if mount["error"] or writable:
            as_on = f"writable, as on {writable[0]}" if writable else "writable"
            yield Finding(
                "filesystems", "exclude", f"{mount['at']} ({mount['kind']} on {mount['device']}) is read-only",
                node=node, measured="ro", expected=as_on, source=SOURCE, fix=FIX,
            )  # fmt: skip
            return
    for line in value["log"][-1:]:
        yield Finding(
            "filesystems", "warn", "the kernel stopped writing to a file system since boot", node=node,
            measured=line[:120], source=SOURCE, fix=FIX,
        )  # fmt: skip
