"""Room and rights where checkpoints, temporary files and the job's own directory lie; one file system for all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import DIFFERS, TOO_FEW, Finding, Setting
from launcher.preflight.parity import differing, listing, together

STAGE = "inventory"

ROLES = {"checkpoints": "checkpoints", "temporary": "temporary files", "working": "the job's own directory"}
# The last checkpoint stays until the next one is whole: twice its size, and a tenth for what else is written.
CHECKPOINTS = 2.2
# Compiled ops and caches of kernels, ours: a build of DeepSpeed's CPU ops alone leaves 190 MB.
TEMPORARY = 1 << 30
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "f2fs", "vfat", "ramfs"}


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    asked = {"checkpoints": setting.checkpoint_dir, "temporary": tempfile.gettempdir(), "working": os.getcwd()}
    mounts = probe.read("/proc/self/mounts") or ""
    return {
        "machine": probe.read("/proc/sys/kernel/random/boot_id") or "",
        "places": {role: place(probe, path, mounts) for role, path in asked.items() if path},
    }


def place(probe: Probe, path: str, mounts: str) -> dict[str, Any]:
    """The directory, or the nearest one above it that is there; what may be written is written, and removed."""
    there = os.path.realpath(probe.root + os.path.abspath(path))
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    seen_as = there[len(probe.root) :] or "/" if probe.root and there.startswith(probe.root) else there
    out: dict[str, Any] = {"path": path, "there": seen_as, **mount(mounts, seen_as), "error": ""}
    try:
        size = os.statvfs(there)
        out.update(total=size.f_blocks * size.f_frsize, free=size.f_bavail * size.f_frsize)
        out.update(inodes=size.f_files, inodes_free=size.f_favail)
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"dslaunch")
            file.flush()
            os.fsync(file.fileno())  # a full or a stale one says so here at the latest
    except OSError as error:
        out["error"] = error.strerror or str(error)
    return out


def mount(mounts: str, path: str) -> dict[str, str]:
    """The line of /proc/self/mounts for a path: the longest that it lies under, the last of equal ones."""
    best = ("", "", "", "")
    for line in mounts.splitlines():
        source, point, kind, options = (_plain(word) for word in line.split()[:4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[1]):
            best = (source, point, kind, options)
    return {
        "source": best[0],
        "mount": best[1],
        "type": best[2],
        "mode": "ro" if "ro" in best[3].split(",") else "rw",
    }


def _plain(word: str) -> str:
    """\\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _gb(number: float) -> str:
    """22.0 GB, 1.5 MB: powers of ten, as disks are sold."""
    unit, factor = next(((name, size) for name, size in (("TB", 1e12), ("GB", 1e9)) if number >= size), ("MB", 1e6))
    return f"{number / factor:.1f} {unit}"


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for role, one in value["places"].items():
        out[role] = f"{one['there']}: {one['type']} {one['source']}"
        out[f"{role} free"] = one["error"] or f"{_gb(one['free'])} of {_gb(one['total'])}"
    return out


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    out = []
    for node, value in sorted(answered.items()):
        for role, one in value["places"].items():
            out += _of_one(node, role, one, setting)
    return [*unknowns("storage", found), *together(out, answered, code=TOO_FEW), *_one_for_all(answered)]


def _of_one(node: str, role: str, one: Mapping[str, Any], setting: Setting) -> list[Finding]:
    where = f"{one['path']} ({ROLES[role]})"
    if one["error"]:
        return [
            Finding(
                "storage",
                "exclude",
                f"{where} cannot be written: {one['error']}"
                + (" (mounted read-only)" if one["mode"] == "ro" else ""),
                node=node,
                measured=f"{one['there']}: {one['error']}",
                expected="a file written there and removed again",
                fix=f"check the mount {one['mount']} ({one['type']}) and the rights of {one['there']}",
            )
        ]
    out = []
    if role == "checkpoints" and one["free"] < (needed := CHECKPOINTS * setting.checkpoint_bytes):
        out.append(
            Finding(
                "storage",
                "exclude",
                f"{where} has too little room for two checkpoints of {_gb(setting.checkpoint_bytes)}",
                node=node,
                measured=f"{_gb(one['free'])} free",
                expected=f">= {_gb(needed)}",
                source=f"{CHECKPOINTS} x the size of a checkpoint: the last one stays until the next is whole",
                fix=f"make room on {one['mount']}, or train.checkpoint.dir elsewhere",
            )
        )
    if role == "temporary" and one["free"] < TEMPORARY:
        out.append(
            Finding(
                "storage",
                "warn",
                f"{where} is nearly full",
                node=node,
                measured=f"{_gb(one['free'])} free",
                expected=f">= {_gb(TEMPORARY)}",
                source="DeepSpeed's compiled CPU ops alone are 190 MB",
                fix=f"make room on {one['mount']}, or another TMPDIR",
            )
        )
    # ZeRO writes two files a rank, and two checkpoints lie side by side
    files = 4 * setting.nodes * setting.per_node if role == "checkpoints" else 1000
    if one["inodes"] and one["inodes_free"] < files:
        out.append(
            Finding(
                "storage",
                "exclude" if role == "checkpoints" else "warn",
                f"{where} has no inodes left for new files",
                node=node,
                measured=f"{one['inodes_free']} free",
                expected=f">= {files}",
                source="two files a rank, two checkpoints" if role == "checkpoints" else "a thousand small files",
                fix=f"remove small files on {one['mount']}",
            )
        )
    return out


def _one_for_all(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Ranks write their own parts of a checkpoint: on different disks nobody can load it again."""
    places = {
        node: value["places"]["checkpoints"] for node, value in answered.items() if "checkpoints" in value["places"]
    }
    places = {node: one for node, one in places.items() if not one["error"]}
    if len(places) < 2:
        return []
    fix = "mount the same file system on every node"
    why = "every rank writes its part of a checkpoint, and needs all parts to load it"
    kinds = {node: f"{one['type']} at {one['mount']}" for node, one in places.items()}
    out = differing("storage", f"the file system of {_path(places)}", kinds, why=why, fix=fix)
    if out:
        return out
    machines = {value["machine"] for value in answered.values()}
    first = next(iter(places.values()))
    if first["type"] in LOCAL:
        if len(machines) < 2:
            return []  # several nodes of one machine share its disks
        return [
            Finding(
                "storage",
                "warn",
                f"{_path(places)} is each node's own disk ({first['type']}): checkpoints lie in {len(places)} parts",
                measured=listing({f"{one['type']} {one['source']}" for one in places.values()}),
                expected="a shared file system",
                source=why,
                fix="train.checkpoint.dir on a shared file system",
                code=DIFFERS,
            )
        ]
    # servers of one file system have several names, but one size
    sizes = {node: f"{one['source']} of {one['total']} bytes" for node, one in places.items()}
    if len({one["total"] for one in places.values()}) > 1:
        return differing("storage", f"the file system of {_path(places)}", sizes, why=why, fix=fix)
    return []


def _path(places: Mapping[str, Mapping[str, Any]]) -> str:
    return str(next(iter(places.values()))["path"])
