"""The GPUs that the job was planned for: as many, the right ones, alike, and none that reports a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.checks import Probe, seen, unknowns, vote
from launcher.preflight import DIFFERS, Finding, Level, Setting, nvidia, parity

STAGE = "host"

MEMORY = "NVIDIA GPU memory error management (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt)"
NVML = "the driver's own report (NVML)"
RESET = "drain the node and reset the GPU: nvidia-smi --gpu-reset -i <GPU>; replace it when that does not help"
COOL = "look at fans, air flow and the rack's temperature; then reset the GPU"


class Rule(NamedTuple):
    """`bad` in `field` of a GPU is a finding. `what` goes on after "GPU 3: "."""

    field: str
    bad: str
    level: Level
    what: str
    source: str
    fix: str


RULES = (
    Rule("row_failure", "Yes", "exclude", "a memory row could not be remapped", MEMORY, "replace the GPU (RMA)"),
    Rule("row_pending", "Yes", "warn", "a memory row waits for a reset to be remapped", MEMORY, RESET),
    Rule("retired_pending", "Yes", "warn", "a memory page waits for a reset to be retired", MEMORY, RESET),
    Rule("sram_threshold", "Yes", "exclude", "more SRAM errors than it may have", MEMORY, "replace the GPU (RMA)"),
    Rule("unrepairable", "Yes", "exclude", "memory that cannot be repaired", MEMORY, "replace the GPU (RMA)"),
    Rule("channel_repair", "Yes", "warn", "a memory channel waits for a reset to be repaired", MEMORY, RESET),
    Rule("tpc_repair", "Yes", "warn", "a processing cluster waits for a reset to be repaired", MEMORY, RESET),
    Rule("reset", "Yes", "exclude", "the driver asks for a reset", NVML, RESET),
    Rule(
        "mig", "Enabled", "exclude", "split by MIG, and NCCL needs whole GPUs",
        "NVIDIA MIG user guide: no peer access between instances", "nvidia-smi -mig 0",
    ),
    Rule("compute", "Prohibited", "exclude", "compute mode is Prohibited", NVML, "nvidia-smi -c DEFAULT"),
    Rule(
        "compute", "Exclusive_Process", "warn",
        "compute mode is Exclusive_Process: a second process on it, of a data loader or a profiler, fails",
        NVML, "nvidia-smi -c DEFAULT",
    ),
    Rule(
        "persistence", "Disabled", "note", "persistence mode is off: the first process initialises the GPU",
        NVML, "enable nvidia-persistenced",
    ),
)  # fmt: skip

GOOD = {
    "Yes": "No",
    "Enabled": "Disabled",
    "Disabled": "Enabled",
    "Prohibited": "Default",
    "Exclusive_Process": "Default",
}

# The first that is active counts: hw_slowdown stands beside its own cause.
THROTTLES: dict[str, tuple[Level, str, str]] = {
    "hw_thermal_slowdown": ("exclude", "its hardware slows it down for heat", COOL),
    "hw_power_brake_slowdown": (
        "exclude",
        "the power supply tells it to slow down (power brake)",
        "look at the node's power supplies and the rack's power budget",
    ),
    "hw_slowdown": ("exclude", "its hardware slows it down", COOL),
    "sw_thermal_slowdown": ("warn", "the driver slows it down for heat", COOL),
}

# What nvidia-smi calls the recovery action -> what a person does. Any other word is not known.
RECOVERY = {
    "Reset": RESET,
    "Reboot": "reboot the node",
    "Drain P2P": "end all processes on all GPUs of the node, then look at the recovery action again",
    "Drain and Reset": "end all processes on all GPUs of the node, then reset the GPU",
}
NOTHING = ("", "None", "N/A", "Not Supported", "[N/A]")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    if not setting.gpus:
        idle = there(probe)
        return {"unasked": idle} if idle else {"skipped": "a CPU job"}
    found = nvidia.query(probe)
    if "missing" in found:
        return amd(probe) or found
    return found


def there(probe: Probe) -> int:
    """GPUs that the kernel's drivers show, without a tool: of NVIDIA, else of AMD, whose list has the CPUs too."""
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    ids = [probe.read(f"{nodes}/{name}/gpu_id") for name in probe.list(nodes)]
    return len(probe.list("/proc/driver/nvidia/gpus")) or sum(one not in (None, "", "0") for one in ids)


def amd(probe: Probe) -> dict[str, Any]:
    """Number and names from amd-smi, or the older rocm-smi; nothing where there is neither."""
    for argv in (("amd-smi", "static", "--asic", "--json"), ("rocm-smi", "--showproductname", "--json")):
        answer = probe.run(argv)
        if answer.code is None and "did not answer" in answer.err:
            return {"unknown": answer.err, "timeout": 20}
        if answer.code == 0:
            names = amd_names(answer.out)
            if names is None:
                return {"unknown": f"{argv[0]} answered in a layout not known"}
            return {"gpus": [{"name": name} for name in names], "amd": True}
    return {}


def amd_names(text: str) -> list[str] | None:
    """One name for each GPU; amd-smi gives a list, since ROCm 7 within `gpu_data`, rocm-smi {"card0": {...}}."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict) and "gpu_data" in value:
        value = value["gpu_data"]
    if isinstance(value, dict):
        cards = [row for key, row in sorted(value.items()) if key.startswith("card") and isinstance(row, dict)]
        rows = [{key.lower(): name for key, name in row.items()} for row in cards]
        return [str(row.get("card series") or row.get("card model") or "AMD GPU") for row in rows] or None
    if isinstance(value, list) and all(isinstance(row, dict) and "asic" in row for row in value):
        return [str(row["asic"].get("market_name", "AMD GPU")) for row in value]
    return None


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    nodes = {node: value for node, value in seen(found).items() if "gpus" in value}
    return [
        *unknowns("gpus", found),
        *parity.together(list(_unasked(found)), list(found)),
        # On every node the same, it is the allocation or the job file, not the nodes.
        *parity.together([*_tool(found, setting), *_count(nodes, setting), *_names(nodes, setting)], list(found)),
        *_vbios(nodes),
        *(finding for node, value in nodes.items() for finding in _health(node, value["gpus"])),
        *_hardware({node: value for node, value in nodes.items() if not value.get("amd")}),
    ]


def _tool(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> Iterator[Finding]:
    planned = f"the job was planned for {setting.gpus} GPU{'s' if setting.gpus > 1 else ''} a node"
    for node, value in sorted(found.items()):
        if "missing" in value:
            yield Finding(
                "gpus", "exclude",
                f"{planned}: neither nvidia-smi nor amd-smi is there, and the driver shows no GPU", node=node,
                measured=value["missing"], expected=str(setting.gpus), source="the job file",
                fix="start the image with the GPUs (--gpus all, --nv), or ask for nodes that have some",
            )  # fmt: skip
    for node, value in sorted(found.items()):
        if "broken" in value:
            yield Finding(
                "gpus", "exclude", f"nvidia-smi fails: {value['broken']}", node=node,
                measured=f"exit code {value['code']}", expected="exit code 0", source=NVML,
                fix="load the driver that the libraries belong to, or reboot; a GPU that is lost needs a power cycle",
            )  # fmt: skip


def _unasked(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for node, value in sorted(found.items()):
        if count := value.get("unasked"):
            have = f"{count} GPU{'s' if count > 1 else ''}"
            yield Finding(
                "gpus", "unknown", f"this node has {have}, and none were asked for: only CPUs are looked at",
                node=node, measured=have, source="/proc/driver/nvidia, /sys/class/kfd",
                fix=f"--gpus-per-node {count}; `dslaunch probe` writes the block",
            )  # fmt: skip


def _count(nodes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Iterator[Finding]:
    for node, value in nodes.items():
        count = len(value["gpus"])
        if count < setting.gpus:
            yield Finding(
                "gpus", "exclude",
                f"{count} of {setting.gpus} GPUs" + (f", by {value['by']}" if value.get("by") else ""),
                node=node, measured=str(count),
                expected=str(setting.gpus), source="the job file",
                fix="a GPU that fell off the bus comes back with a power cycle; else the allocation holds too few",
            )  # fmt: skip
        elif count > setting.gpus:
            yield Finding("gpus", "note", f"{count} GPUs, of which {setting.gpus} are used", node=node)


def _names(nodes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Iterator[Finding]:
    names = {node: tuple(sorted({gpu["name"] or "" for gpu in value["gpus"]})) for node, value in nodes.items()}
    names = {node: has for node, has in names.items() if has}
    if setting.gpu_names:
        wanted = " or ".join(setting.gpu_names)
        for node, has in names.items():
            if not all(re.search(r"[A-Z]+ ?\d", name.upper()) for name in has):
                yield Finding("gpus", "unknown", f"a GPU whose name tells no type: {', '.join(has)}", node=node)
            elif not all(_named(name, setting) for name in has):
                yield Finding(
                    "gpus", "exclude", f"{', '.join(has)} instead of {setting.gpu or wanted}", node=node,
                    measured=", ".join(has), expected=wanted, source="the job file", code=DIFFERS,
                    fix="ask the scheduler for one type of GPU, or set resources.gpu to what the nodes have",
                )  # fmt: skip
        return
    yield from parity.differing(
        "gpus", "the type of the GPUs", {node: ", ".join(has) for node, has in names.items()},
        why="memory and speed are planned for one type", fix="ask the scheduler for one type of GPU",
    )  # fmt: skip


def _named(name: str, setting: Setting) -> bool:
    """ "A100" is in "NVIDIA A100-SXM4-80GB" and "A10" is not; "RTX3090" is in "NVIDIA GeForce RTX 3090"."""
    words = [re.sub(r"(?<=[A-Z])(?=\d)", r"\\s*", word.upper()) for word in setting.gpu_names]
    return any(re.search(rf"(?<![A-Z0-9]){word}(?![A-Z0-9])", name.upper()) for word in words)


def _vbios(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """The driver is compared with the rest of the software."""
    models = {node: tuple(sorted({gpu["name"] or "" for gpu in value["gpus"]})) for node, value in nodes.items()}
    common = vote(models).common  # another model has another VBIOS, and is said already
    found = {
        node: sorted({gpu.get("vbios") or "" for gpu in value["gpus"]} - {""})
        for node, value in nodes.items()
        if models[node] == common
    }
    return parity.differing(
        "gpus", "the VBIOS of the GPUs", {node: ", ".join(has) for node, has in found.items() if has}, level="warn",
        why="clocks and power limits come with the VBIOS", fix="one VBIOS on all GPUs",
    )  # fmt: skip


def _health(node: str, gpus: list[Mapping[str, Any]]) -> Iterator[Finding]:
    """What the GPUs of one node say of themselves."""
    if not gpus or "bus" not in gpus[0]:
        return

    def where(test: Callable[[Mapping[str, Any]], Any]) -> list[int]:
        return [index for index, gpu in enumerate(gpus) if test(gpu)]

    def say(level: Level, indices: list[int], what: str, **more: Any) -> Iterator[Finding]:
        if indices:
            yield Finding("gpus", level, f"{_which(indices, gpus)}: {what}", node=node, **more)

    absent = sorted({name for gpu in gpus for name in gpu["absent"]})
    yield from say("unknown", where(lambda gpu: gpu["absent"]), f"nvidia-smi does not say: {', '.join(absent)}")
    for index in where(lambda gpu: gpu["lost"]):
        word = gpus[index]["lost"]
        yield from say(
            "exclude", [index], f"does not answer ({word})", measured=word, expected="a value", source=NVML,
            fix="power-cycle the node",
        )  # fmt: skip
    for rule in RULES:
        bad = where(lambda gpu, rule=rule: (gpu[rule.field] or "").replace(" ", "_") == rule.bad)  # type: ignore[misc]
        yield from say(
            rule.level, bad, rule.what, measured=rule.bad, expected=GOOD[rule.bad], source=rule.source, fix=rule.fix
        )
    for index in where(lambda gpu: gpu["volatile"]):
        errors = gpus[index]["volatile"]
        yield from say(
            "exclude", [index],
            f"{errors} uncorrected ECC error{'s' if errors > 1 else ''} since the driver was loaded",
            measured=str(errors), expected="0", source=MEMORY, fix=RESET,
        )  # fmt: skip
    for index in where(lambda gpu: (gpu["recovery"] or "") not in NOTHING):
        word = gpus[index]["recovery"]
        level: Level = "exclude" if word in RECOVERY else "unknown"
        fix = RECOVERY.get(word, "look the action up in the driver's documentation")
        what = f"the driver asks for a recovery: {word}"
        yield from say(level, [index], what, measured=word, expected="None", source=NVML, fix=fix)
    for reason, (level, what, fix) in THROTTLES.items():
        earlier = list(THROTTLES)[: list(THROTTLES).index(reason)]

        def first(gpu: Mapping[str, Any], reason: str = reason, earlier: list[str] = earlier) -> bool:
            return gpu["throttle"].get(reason, False) and not any(gpu["throttle"].get(one) for one in earlier)

        yield from say(
            level, where(first), what, measured=f"{reason}: Active", expected="Not Active", source=NVML, fix=fix
        )
    for index in where(_hot):
        gpu = gpus[index]
        limit = gpu["slowdown"]
        yield from say(
            "exclude", [index], f"{gpu['temperature']:g} °C, as hot as where it slows down, and nothing runs yet",
            measured=f"{gpu['temperature']:g} °C" if limit else f"{gpu['margin']:g} degrees to its limit",
            expected=f"< {limit:g} °C" if limit else f"> {gpu['margin_slowdown']:g} degrees to its limit",
            source=NVML, fix=COOL,
        )  # fmt: skip


def _which(places: list[int], gpus: Sequence[Mapping[str, Any]]) -> str:
    """By nvidia-smi's numbers, which go over all GPUs of a node, also where the job has some of them."""
    return nvidia.which([gpus[place]["index"] for place in places], len(gpus))


def _hot(gpu: Mapping[str, Any]) -> bool:
    """Newer drivers give the degrees that are left and where they end, older ones a temperature."""
    if gpu["margin"] is not None and gpu["margin_slowdown"] is not None:
        return bool(gpu["margin"] <= gpu["margin_slowdown"])
    return bool(gpu["slowdown"] and gpu["temperature"] is not None and gpu["temperature"] >= gpu["slowdown"])


def _hardware(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """PCIe, memory and power of every GPU against what most GPUs of all nodes have: they came from one order."""
    gpus = {(node, gpu["index"]): gpu for node, value in nodes.items() for gpu in value["gpus"]}
    for (node, index), field, has, most in _below(gpus):
        full = gpus[node, index][f"{field}_max"] if field == "width" else None
        slower: Level = "warn" if field == "power" else "exclude"
        text = {
            "width": f"PCIe x{has:g} instead of x{most:g}"
            + (f", of x{full:g} that it can" if full != most and full else ""),
            "gen_max": f"PCIe generation {has:g} at best instead of {most:g}",
            "memory": f"{has:g} MiB of memory instead of {most:g}",
            "power": f"held to {has:g} W where the others may take {most:g}",
        }[field]
        fix = "nvidia-smi -pl <watts>" if field == "power" else "reseat the GPU or its riser; then replace it"
        yield Finding(
            "gpus", slower, f"GPU {index}: {text}", node=node, measured=f"{has:g}", fix=fix,
            expected=f"{most:g}, as on most GPUs", source="what most GPUs of these nodes have",
        )  # fmt: skip
    usual = {field: _usual(gpus, field) for field in ("width", "power")}
    some_correct = any(gpu["ecc"] == "Enabled" for gpu in gpus.values())
    for node, value in nodes.items():
        # The generation drops when a GPU idles, so only one that works is looked at.
        slow = [
            index for index, gpu in enumerate(value["gpus"])
            if gpu["gen"] and gpu["gen_max"] and gpu["gen"] < gpu["gen_max"]
            and gpu["state"] == "P0" and not gpu["throttle"].get("gpu_idle", True)
        ]  # fmt: skip
        if slow:
            gpu = value["gpus"][slow[0]]
            yield Finding(
                "gpus", "warn", f"{_which(slow, value['gpus'])}: PCIe runs at generation {gpu['gen']:g} "
                f"of {gpu['gen_max']:g} under load", node=node, measured=f"{gpu['gen']:g}",
                expected=f"{gpu['gen_max']:g}", source=NVML, fix="reseat the GPU or its riser",
            )  # fmt: skip
        for field, full, text in (
            ("width", "width_max", "PCIe x{:g} of x{:g}"),
            ("power", "power_default", "held to {:g} of {:g} W"),
        ):
            low = [
                index for index, gpu in enumerate(value["gpus"])
                if gpu[field] and gpu[full] and gpu[field] == usual[field] and gpu[field] < gpu[full]
            ]  # fmt: skip
            if low:
                gpu = value["gpus"][low[0]]
                said = text.format(gpu[field], gpu[full])
                where = _which(low, value["gpus"])
                yield Finding("gpus", "note", f"{where}: {said}, as on most GPUs of these nodes", node=node)
        off = [index for index, gpu in enumerate(value["gpus"]) if gpu["ecc"] == "Disabled"]
        if off and some_correct:
            yield Finding(
                "gpus", "warn", f"{_which(off, value['gpus'])}: ECC is off, on others it is on", node=node,
                measured="Disabled", expected="Enabled", source="what the other GPUs have",
                fix="nvidia-smi -e 1, then reset",
            )  # fmt: skip


def _usual(gpus: Mapping[Any, Mapping[str, Any]], field: str) -> float | None:
    """What most have; the most where there is no majority, for a fault takes away and never adds."""
    values = {key: gpu[field] for key, gpu in gpus.items() if gpu[field] is not None}
    if not values:
        return None
    votes = vote({str(key): value for key, value in values.items()})
    return float(max(values.values()) if votes.tied else votes.common)


def _below(gpus: Mapping[tuple[str, int], Mapping[str, Any]]) -> Iterator[tuple[tuple[str, int], str, float, float]]:
    model = vote({str(key): gpu["name"] for key, gpu in gpus.items()}).common
    alike = {key: gpu for key, gpu in gpus.items() if gpu["name"] == model}  # another model is said already
    for field in ("width", "gen_max", "memory", "power"):
        usual = _usual(alike, field)
        for key, gpu in alike.items():
            if usual is not None and gpu[field] is not None and gpu[field] < usual:
                yield key, field, gpu[field], usual


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    if "gpus" not in value:
        unasked = {"GPUs": f"{value.get('unasked')}, not asked for"} if "unasked" in value else {}
        return {"GPUs": "none"} if "missing" in value else unasked
    names = [gpu["name"] or "?" for gpu in value["gpus"]]
    found = {"GPUs": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"}
    vbios = sorted({gpu["vbios"] for gpu in value["gpus"] if gpu.get("vbios")})
    if vbios:
        found["VBIOS"] = ", ".join(vbios)
    return found
