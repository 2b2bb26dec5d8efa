"""What the system grants a rank: locked memory, open files, stack, /dev/shm, memory and CPUs of the cgroup."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Level, Setting
from launcher.preflight.parity import differing, together

STAGE = "inventory"

UNLIMITED = -1
SHM = "/dev/shm"  # noqa: S108
LIMITS = {
    "memlock": "Max locked memory",
    "nofile": "Max open files",
    "stack": "Max stack size",
    "core": "Max core file size",
}
IPC_LOCK = 14  # CAP_IPC_LOCK: who has it locks as much as there is
RDMA = re.compile(r"infiniband|roce|efa|azure|oci|coreweave|sharp|gib")
NO_RDMA = re.compile(r"tcp|ethernet|gloo|nvlink")
MANY_NODES, MANY_FILES = 64, 1 << 20  # ours: every rank may hold a connection to every other one
FEW_FILES = 1024  # the soft limit that a Linux login has, and that torch's documentation says to raise
SMALL_THREADS = (2, 28)  # NCCL's threads have stacks of their own size since then


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    text = probe.read("/proc/self/limits")
    if text is None:
        return {"unknown": "/proc/self/limits cannot be read"}
    try:
        shm = os.statvfs(probe.root + SHM)
        shared: dict[str, Any] = {"shm": shm.f_blocks * shm.f_frsize, "shm_free": shm.f_bavail * shm.f_frsize}
    except OSError as error:
        shared = {"shm": 0, "shm_free": 0, "shm_error": error.strerror}
    status = probe.read("/proc/self/status") or ""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return {
        "limits": limits(text),
        "may_lock": bool(capabilities and int(capabilities[1], 16) >> IPC_LOCK & 1),
        **shared,
        "memory": cgroup_memory(probe),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_quota": cgroup_cpus(probe),
        "nccl": installed_nccl(),
    }


def limits(text: str) -> dict[str, list[int]]:
    """{"nofile": [1024, 1048576], ...}: soft and hard, of /proc/self/limits."""
    out = {}
    for name, title in LIMITS.items():
        if found := re.search(rf"^{title}\s+(\S+)\s+(\S+)", text, re.MULTILINE):
            out[name] = [UNLIMITED if word == "unlimited" else int(word) for word in found.groups()]
    return out


def _levels(probe: Probe, controller: str) -> list[str]:
    """The directories of this process's cgroup, from its own up to the root, of version 2 or 1."""
    for line in (probe.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base = "/sys/fs/cgroup" + (f"/{controllers}" if controllers else "")
            parts = [part for part in path.split("/") if part not in ("", "..")]
            return [base + "".join(f"/{part}" for part in parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []


def cgroup_memory(probe: Probe) -> int:
    """The smallest limit on the way up, in bytes; 0 is none."""
    found = []
    for level in _levels(probe, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            word = probe.read(f"{level}/{name}") or ""
            if word.isdigit() and int(word) < 1 << 60:  # version 1 says "none" with 2**63, rounded down to a page
                found.append(int(word))
    return min(found, default=0)


def cgroup_cpus(probe: Probe) -> float:
    """CPUs' worth of time that the quota gives; 0 is all."""
    found = []
    for level in _levels(probe, "cpu"):
        quota, period = [*(probe.read(f"{level}/cpu.max") or "").split(), "", ""][:2]
        if not quota:
            quota, period = (
                probe.read(f"{level}/cpu.cfs_quota_us") or "",
                probe.read(f"{level}/cpu.cfs_period_us") or "",
            )
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=0.0)


def installed_nccl() -> str:
    """From the package's metadata, without torch; empty where NCCL came another way."""
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _words(number: int) -> str:
    return "unlimited" if number == UNLIMITED else str(number)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    out = {f"ulimit {name}": _words(soft) for name, (soft, _) in value["limits"].items()}
    out[SHM] = _gib(value["shm"])
    out["memory limit"] = _gib(value["memory"]) if value["memory"] else "none"
    out["CPUs"] = f"{value['cpus']}" + (f", {value['cpu_quota']:g} by quota" if value["cpu_quota"] else "")
    return out


def locks(setting: Setting) -> Level | None:
    """What a limit on locked memory means for this network: of one that we do not know, a warning."""
    if setting.ports or RDMA.search(setting.fabric):
        return "exclude"
    if setting.backend == "gloo" or not setting.fabric or NO_RDMA.search(setting.fabric):
        return None
    return "warn"


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    out = []
    for node, value in sorted(answered.items()):
        out += _of_one(node, value, setting)
    return [*unknowns("limits", found), *together(out, answered), *_differences(answered)]


def _of_one(node: str, value: Mapping[str, Any], setting: Setting) -> list[Finding]:
    out: list[Finding] = []

    def say(level: Level, what: str, measured: str, expected: str, source: str, fix: str) -> None:
        out.append(
            Finding("limits", level, what, node=node, measured=measured, expected=expected, source=source, fix=fix)
        )

    soft = {name: pair[0] for name, pair in value["limits"].items()}
    if (level := locks(setting)) and soft.get("memlock", UNLIMITED) != UNLIMITED and not value["may_lock"]:
        say(
            level,
            f"locked memory is limited to {soft['memlock']} bytes, and RDMA registers all that it sends",
            f"{soft['memlock']} bytes",
            "unlimited",
            "Red Hat's networking guide, 13.5.3: RDMA pins memory",
            "LimitMEMLOCK=infinity for slurmd or the containers; PropagateResourceLimitsExcept=MEMLOCK",
        )
    shm = value["shm"]
    if shm < setting.shm_bytes:
        # NCCL's own segments are some MiB a pair of GPUs; data loaders want the rest
        missing = f" ({value['shm_error']})" if "shm_error" in value else ""
        say(
            "warn" if shm else "exclude",
            f"{SHM} has {_gib(shm)}{missing}",
            _gib(shm),
            f">= {_gib(setting.shm_bytes)}",
            "NCCL's guide, section Shared memory; the amount is the job's",
            "docker: --shm-size; Kubernetes: an emptyDir with medium Memory at /dev/shm",
        )
    elif value["shm_free"] * 2 < setting.shm_bytes:
        say(
            "warn",
            f"{SHM} has {_gib(value['shm_free'])} free of {_gib(shm)}: an earlier job left files there",
            _gib(value["shm_free"]),
            f">= {_gib(setting.shm_bytes / 2)}",
            "half of what the job is given",
            "remove what ended jobs left in /dev/shm",
        )
    files = soft.get("nofile", UNLIMITED)
    wanted = MANY_FILES if setting.nodes >= MANY_NODES else FEW_FILES + 1
    if files != UNLIMITED and files < wanted:
        source = (
            "connections grow with ranks: customary from 64 nodes on"
            if wanted == MANY_FILES
            else "torch's multiprocessing"
        )
        say(
            "warn",
            f"{files} open files are allowed",
            str(files),
            f">= {wanted}" if wanted == MANY_FILES else f"> {FEW_FILES}",
            source,
            "ulimit -n in the job's setup, up to the hard limit; LimitNOFILE= for slurmd above it",
        )
    if soft.get("stack") == UNLIMITED and setting.backend == "nccl" and not _since(value["nccl"], SMALL_THREADS):
        which = f"NCCL {value['nccl']}" if value["nccl"] else "NCCL older than 2.28"
        say(
            "warn",
            f"the stack is unlimited, and {which} gives each of its threads as much",
            "unlimited",
            "8192 KiB, or NCCL >= 2.28",
            "NCCL_SET_CPU_STACK_SIZE in NCCL's init.cc, since 2.28",
            "ulimit -s 8192 in the job's setup",
        )
    return out


def _since(version: str, when: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return bool(found) and tuple(map(int, found.groups())) >= when  # type: ignore[union-attr]


def _differences(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    out = []
    for name in LIMITS:
        soft = {node: _words(value["limits"][name][0]) for node, value in answered.items() if name in value["limits"]}
        out += differing("limits", f"ulimit {name}", soft, level="note" if name == "core" else "warn")
    rows = {node: facts(value) for node, value in answered.items()}
    for name, why in (
        ("memory limit", "the node with less runs out first, and ends the job for all"),
        ("CPUs", "the node with fewer feeds its GPUs more slowly, and all wait for it"),
    ):
        out += differing("limits", name, {node: row[name] for node, row in rows.items()}, level="warn", why=why)
    return out
