"""Processes on the GPUs that are not of this job: they hold memory and time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Setting, nvidia

STAGE = "host"

# Part of a node's own equipment, with little memory of its own.
DAEMONS = ("nvidia-cuda-mps-server", "nv-hostengine", "dcgm-exporter", "Xorg", "gnome-shell")
# Memory in use where no process shows, ours: the driver's own share is below 1 % of a data-centre GPU [derived].
LEFT = 0.05
JOB = re.compile(r"job_?(\d+)")
SLURM = re.compile(r"(?:^|\0)SLURM_JOB_ID=(\d+)")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    if not setting.gpus:
        return {"skipped": "a CPU job"}
    found = nvidia.query(probe)
    if "gpus" not in found:
        return {"skipped": "nvidia-smi shows no GPUs; the gpus check says why"}
    ours = _kin("self", probe)
    gpus = []
    for gpu in found["gpus"]:
        foreign = [
            {**one, "user": _status(one["pid"], probe).get("Uid", "").partition("\t")[0]}
            for one in gpu["processes"]
            if "C" in one["type"] and not _ours(one["pid"], ours, probe)
        ]
        gpus.append(
            {
                "index": gpu["index"],
                "foreign": foreign,
                "processes": len(gpu["processes"]),
                "used": gpu["used"],
                "memory": gpu["memory"],
            }
        )
    return {"gpus": gpus}


def _status(pid: Any, probe: Probe) -> dict[str, str]:
    """{"PPid": "712", "Uid": "1000\\t1000\\t1000\\t1000"}; empty for a process that is not to be seen from here."""
    text = probe.read(f"/proc/{pid}/status") or ""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _job(pid: Any, probe: Probe) -> str:
    """The Slurm job that a process belongs to, by its control group or its environment."""
    for pattern, path in ((JOB, "cgroup"), (SLURM, "environ")):
        match = pattern.search(probe.read(f"/proc/{pid}/{path}") or "")
        if match:
            return match[1]
    return ""


def _kin(pid: Any, probe: Probe) -> tuple[str, str]:
    """The process that started this check, and the job."""
    return _status(pid, probe).get("PPid", ""), _job(pid, probe)


def _ours(pid: int, ours: tuple[str, str], probe: Probe) -> bool:
    parent, job = ours
    if job and _job(pid, probe) == job:
        return True
    one = str(pid)
    for _ in range(64):  # a chain of parents is not longer than that
        if not one or one in ("0", "1"):
            return False
        if one == parent:
            return True
        one = _status(one, probe).get("PPid", "")
    return False


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    return [
        *unknowns("processes", found),
        *(finding for node, value in seen(found).items() for gpu in value["gpus"] for finding in _gpu(node, gpu)),
    ]


def _gpu(node: str, gpu: Mapping[str, Any]) -> Iterator[Finding]:
    for one in gpu["foreign"]:
        name = one["name"].rpartition("/")[2] or "a process"
        daemon = any(word in one["name"] for word in DAEMONS)
        size = f" with {one['mib']:g} MiB" if one["mib"] else ""
        user = f" of user {one['user']}" if one["user"] else ""
        yield Finding(
            "processes",
            "note" if daemon else "exclude",
            f"GPU {gpu['index']}: {name} (process {one['pid']}{user}{size}) is not of this job",
            node=node,
            measured=f"{one['mib']:g} MiB" if one["mib"] else "",
            expected="no other compute process",
            source="a GPU of the job is the job's alone",
            fix="" if daemon else f"end process {one['pid']}, or find who runs beside the scheduler",
        )
    share = (gpu["used"] or 0) / (gpu["memory"] or 1)
    if not gpu["processes"] and share > LEFT:
        yield Finding(
            "processes",
            "warn",
            f"GPU {gpu['index']}: {gpu['used'] / 1024:.1f} GiB in use, and no process to see",
            node=node,
            measured=f"{share:.0%} of the memory",
            expected=f"< {LEFT:.0%} on a GPU where nothing runs",
            source="the driver's own share is below 1 % [derived]",
            fix="a process outside this container, or one that died and left its memory: reset the GPU",
        )
