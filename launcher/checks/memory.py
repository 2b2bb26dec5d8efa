"""Host memory and CPUs: the same on all nodes, and no uncorrected error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns, vote
from launcher.preflight import Finding, Setting

STAGE = "host"

# Of the others' memory. One of 16 modules is 6 %, one of 32 is 3 %; firmware and crash kernels take 1 to 2 [derived].
SHARE = 0.95
EDAC = "the kernel's EDAC counters"


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB", probe.read("/proc/meminfo") or "", re.M))
    cpus = processors(probe.read("/sys/devices/system/cpu/online"))
    if "MemTotal" not in info or not cpus:
        return {"unknown": "/proc/meminfo or /sys/devices/system/cpu/online could not be read"}
    controllers = [name for name in probe.list("/sys/devices/system/edac/mc") if re.fullmatch(r"mc\d+", name)]
    errors = {name: probe.read(f"/sys/devices/system/edac/mc/{name}/ue_count") for name in controllers}
    return {
        "total": int(info["MemTotal"]) * 1024,
        "swap": (int(info.get("SwapTotal", 0)) - int(info.get("SwapFree", 0))) * 1024,
        "cpus": cpus,
        "errors": {name: int(count) for name, count in errors.items() if count and count.isdigit()},
        "governor": probe.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "",
    }


def processors(text: str | None) -> int:
    """processors("0-3,8") is 5."""
    total = 0
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            total += int(last or first) - int(first) + 1
    return total


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    nodes = seen(found)
    return [*unknowns("memory", found), *_sizes(nodes), *_states(nodes)]


def _sizes(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    totals = sorted(value["total"] for value in nodes.values())
    if not totals:
        return
    usual = totals[len(totals) // 2]  # the upper middle: of two nodes the larger, for a fault takes away
    for node, value in nodes.items():
        if value["total"] < SHARE * usual:
            yield Finding(
                "memory", "warn", f"{_gib(value['total'])} of host memory, others have {_gib(usual)}", node=node,
                measured=_gib(value["total"]), expected=f">= {_gib(SHARE * usual)}",
                source="95 % of what the middle node has; a memory module is 3 to 6 % [derived]",
                fix="look for a module that is missing or mapped out (dmidecode -t memory, the BMC's log)",
            )  # fmt: skip
    counts = {node: value["cpus"] for node, value in nodes.items()}
    votes = vote(counts)
    usual = max(counts.values()) if votes.tied else votes.common
    for node, count in counts.items():
        if count < usual:
            yield Finding(
                "memory", "warn", f"{count} CPUs online, others have {usual}", node=node, measured=str(count),
                expected=f"{usual}, as on most nodes", source="what most nodes have",
                fix="look for CPUs that are offline, and for hyper-threading in the firmware",
            )  # fmt: skip


def _states(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for node, value in nodes.items():
        bad = {name: count for name, count in value["errors"].items() if count}
        if bad:
            count = sum(bad.values())
            yield Finding(
                "memory", "exclude", f"{count} uncorrected host memory error{'s' if count > 1 else ''} since boot",
                node=node, measured=", ".join(f"{name}: {count}" for name, count in bad.items()), expected="0",
                source=EDAC, fix="replace the module that the BMC's log or `ras-mc-ctl --errors` names",
            )  # fmt: skip
        if value["swap"]:
            yield Finding(
                "memory", "note", f"{_gib(value['swap'])} of swap in use", node=node, measured=_gib(value["swap"]),
                expected="0", source="pages that are swapped out come back in the middle of a step", fix="swapoff -a",
            )  # fmt: skip
    governors = {node: value["governor"] for node, value in nodes.items() if value["governor"]}
    for node in vote(governors).odd:
        yield Finding(
            "memory", "note", f"the CPU governor is {governors[node]}, others have {vote(governors).common}",
            node=node, measured=governors[node], expected=f"{vote(governors).common}, as on most nodes",
            source="what most nodes have", fix=f"cpupower frequency-set -g {vote(governors).common}",
        )  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    if "total" not in value:
        return {}
    return {"host memory": _gib(value["total"]), "CPUs": str(value["cpus"])}
