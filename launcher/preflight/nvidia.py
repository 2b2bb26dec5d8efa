"""What `nvidia-smi -q -x` says, as plain values: layouts of drivers 390 to 580.

A tag that is not there is no zero: it is listed under `absent`, and who judges says that it is not known.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.checks import Probe

QUERY = ("nvidia-smi", "-q", "-x")
SECONDS = 40.0  # eight GPUs without persistence mode are initialised first, a few seconds each [derived]

# Name -> where it stands, the newest layout first.
TEXTS: dict[str, tuple[str, ...]] = {
    "name": ("product_name",),
    "uuid": ("uuid",),
    "vbios": ("vbios_version",),
    "persistence": ("persistence_mode",),
    "compute": ("compute_mode",),
    "state": ("performance_state",),
    "mig": ("mig_mode/current_mig",),
    "ecc": ("ecc_mode/current_ecc",),
    "sram_threshold": ("ecc_errors/aggregate/sram_threshold_exceeded",),
    "channel_repair": ("ecc_errors/channel_repair_pending",),
    "tpc_repair": ("ecc_errors/tpc_repair_pending",),
    "unrepairable": ("ecc_errors/unrepairable_memory",),
    "row_pending": ("remapped_rows/remapped_row_pending",),
    "row_failure": ("remapped_rows/remapped_row_failure",),
    "retired_pending": ("retired_pages/pending_retirement",),
    "reset": ("gpu_reset_status/reset_required",),
    "recovery": ("gpu_recovery_action",),
    "fabric": ("fabric/state",),
    "fabric_status": ("fabric/status",),
    "clique": ("fabric/cliqueId",),
    "cluster": ("fabric/clusterUuid", "fabric/clusterUUID"),
}
NUMBERS: dict[str, tuple[str, ...]] = {
    "memory": ("fb_memory_usage/total",),
    "used": ("fb_memory_usage/used",),
    "width": ("pci/pci_gpu_link_info/link_widths/current_link_width",),
    "width_max": ("pci/pci_gpu_link_info/link_widths/max_link_width",),
    "gen": ("pci/pci_gpu_link_info/pcie_gen/current_link_gen",),
    "gen_max": ("pci/pci_gpu_link_info/pcie_gen/max_link_gen",),
    "temperature": ("temperature/gpu_temp",),
    "slowdown": ("temperature/gpu_temp_slow_threshold",),
    "margin": ("temperature/gpu_temp_tlimit",),  # degrees left, on newer drivers in place of thresholds
    "margin_slowdown": ("temperature/gpu_temp_slow_tlimit_threshold",),
    "power": (
        "gpu_power_readings/current_power_limit",
        "gpu_power_readings/power_limit",
        "power_readings/enforced_power_limit",
        "power_readings/power_limit",
    ),
    "power_default": ("gpu_power_readings/default_power_limit", "power_readings/default_power_limit"),
}
# Without one of these the layout is not one that we know.
NEEDED = ("name", "uuid", "ecc", "memory", "width", "temperature", "volatile", "throttle")
# nvidia-smi writes these in the place of a value when the GPU does not answer.
LOST = ("GPU is lost", "Unknown Error", "ERR!", "GPU requires reset", "GPU access blocked")


def query(probe: Probe) -> dict[str, Any]:
    """{"gpus": [...], "driver": ...}; {"missing": why}; {"broken": its message}; or {"unknown": why}.

    Of the job's GPUs. `others` are the addresses of the rest, and `by` is the variable that says so.
    """
    answer = probe.run(QUERY, timeout=SECONDS)
    if answer.code is None:
        if "did not answer" in answer.err:
            return {"unknown": f"{answer.err}: a GPU or its driver hangs", "timeout": SECONDS}
        devices = probe.list("/proc/driver/nvidia/gpus")
        if devices:
            says = "NVIDIA_DRIVER_CAPABILITIES of this container may lack `utility`"
            return {"unknown": f"the driver shows {len(devices)} GPUs, and nvidia-smi is not here ({says})"}
        return {"missing": answer.err}
    if answer.code:
        lines = [line.strip() for line in (answer.out + "\n" + answer.err).splitlines() if line.strip()]
        message = next((line for line in lines if not line.startswith("<")), f"exit code {answer.code}")
        return {"broken": message, "code": answer.code}
    found = parse(answer.out)
    if "gpus" in found:
        every = found["gpus"]
        found["gpus"], found["by"] = jobs(every, os.environ)
        found["others"] = [gpu["bus"] for gpu in every if gpu not in found["gpus"]]
    return found


def named(environ: Mapping[str, str]) -> str:
    """The variable that names the job's GPUs. A step inherits SLURM_JOB_GPUS from another node's batch script."""
    step = environ.get("SLURM_STEP_ID") is not None
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", *(() if step else ("SLURM_JOB_GPUS",)))
    return next((name for name in names if name in environ), "")


def jobs(gpus: Sequence[dict[str, Any]], environ: Mapping[str, str]) -> tuple[list[dict[str, Any]], str]:
    """The GPUs that the job may use, by CUDA's rule or else Slurm's; nvidia-smi shows every GPU of the node.

    Of eight, CUDA_VISIBLE_DEVICES=4,5 leaves 4 and 5 (the order is nvidia-smi's where all are of one type), =GPU-8f3a
    the one whose UUID starts so, = none. SLURM_STEP_GPUS=4,5 leaves two of eight, and both of two: inside a device
    cgroup nvidia-smi shows the job's alone, from 0 on, and Slurm's numbers count all.
    """
    name = named(environ)
    words = [word.strip() for word in environ.get(name, "").split(",") if word.strip()]
    if name == "CUDA_VISIBLE_DEVICES":
        found: list[dict[str, Any]] = []
        for word in words:
            one = [gpu for gpu in gpus if _is(word, gpu)]
            if not one:  # CUDA stops at the first word that is no device
                break
            found += one
        kept = [gpu for gpu in gpus if gpu in found]
    else:
        places = {place for word in words for place in _places(word)}
        kept = [gpu for gpu in gpus if gpu["index"] in places] if len(places) < len(gpus) else []
        kept = kept or list(gpus)
    return kept, f"{name}={environ[name]}" if len(kept) < len(gpus) else ""


def _is(word: str, gpu: Mapping[str, Any]) -> bool:
    """An index, the start of a UUID, or an instance of MIG, whose newer names do not say of which GPU."""
    whole = word.removeprefix("MIG-").partition("/")[0].lower() if word.startswith("MIG-GPU-") else word.lower()
    if whole.startswith("mig-"):
        return bool(gpu["mig"] == "Enabled")
    if whole.startswith("gpu-"):
        return bool((gpu["uuid"] or "").lower().startswith(whole))
    return whole == str(gpu["index"])


def _places(word: str) -> range:
    """_places("4-7") is 4, 5, 6 and 7."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


def parse(text: str) -> dict[str, Any]:
    try:
        root = ET.fromstring(text)  # noqa: S314 - nvidia-smi's own words
    except ET.ParseError as error:
        return {"unknown": f"nvidia-smi -q -x gave no XML: {error}"}
    if root.tag != "nvidia_smi_log" or root.findtext("driver_version") is None:
        return {"unknown": f"nvidia-smi -q -x answered in a layout not known: <{root.tag}>"}
    gpus = [{**_gpu(node), "index": index} for index, node in enumerate(root.findall("gpu"))]
    attached = number(root.findtext("attached_gpus"))
    if attached is None or attached != len(gpus):
        return {"unknown": f"nvidia-smi -q -x says {root.findtext('attached_gpus')} GPUs and describes {len(gpus)}"}
    return {"gpus": gpus}


def _gpu(node: ET.Element) -> dict[str, Any]:
    found: dict[str, Any] = {"bus": bus(node.get("id", ""))}
    absent = []
    for name, places in TEXTS.items():
        found[name] = _text(node, places)
        if found[name] is None and name in NEEDED:
            absent.append(name)
    for name, places in NUMBERS.items():
        text = _text(node, places)
        found[name] = number(text)
        if text is None and name in NEEDED:
            absent.append(name)
    reasons = _reasons(node)
    found["throttle"] = reasons or {}
    found["volatile"], known = _uncorrected(node.find("ecc_errors/volatile"))
    absent += [] if reasons is not None else ["throttle"]
    absent += [] if known else ["volatile"]
    found["absent"] = absent
    found["lost"] = next((word for one in node.iter() for word in LOST if word in (one.text or "")), "")
    found["processes"] = [
        {
            "pid": int(number(one.findtext("pid")) or 0),
            "type": (one.findtext("type") or "").strip(),
            "name": (one.findtext("process_name") or "").strip(),
            "mib": number(one.findtext("used_memory")),
        }
        for one in node.findall("processes/process_info")
    ]
    return found


def _text(node: ET.Element, places: Sequence[str]) -> str | None:
    for place in places:
        text = node.findtext(place)
        if text is not None:
            return text.strip()
    return None


def _reasons(node: ET.Element) -> dict[str, bool] | None:
    """{"hw_slowdown": True, ...}: `clocks_event_reasons` since driver 535, `clocks_throttle_reasons` before."""
    for word in ("event", "throttle"):
        section = node.find(f"clocks_{word}_reasons")
        if section is not None:
            start = f"clocks_{word}_reason_"
            return {one.tag[len(start) :]: (one.text or "").strip() == "Active" for one in section}
    return None


def _uncorrected(section: ET.Element | None) -> tuple[int | None, bool]:
    """Uncorrected errors, None where ECC is off or missing, and whether the layout is one that we know."""
    if section is None:
        return None, False
    counts = [one for one in section.iter() if "uncorrectable" in one.tag]  # since Ampere
    if not counts:
        counts = section.findall("double_bit/total")  # before
    known = [number(one.text) for one in counts]
    present = [int(one) for one in known if one is not None]
    return (sum(present) if present else None), bool(counts)


def number(text: str | None) -> float | None:
    """number("400.00 W") is 400, number("16x") is 16, number("N/A") is None."""
    match = re.match(r"\s*(-?\d+(?:\.\d+)?)", text or "")
    return float(match[1]) if match else None


def bus(text: str) -> str:
    """One spelling of a PCI address: "00000000:9B:00.0", "PCI:0000:9b:00" and "0000:9b:00.0" are 0000:9b:00."""
    match = re.search(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})", text)
    return f"{match[1][-4:]}:{match[2]}:{match[3]}".lower() if match else text.lower()


def which(indices: Iterable[int], total: int) -> str:
    """which([3], 8) is "GPU 3", which([0, 3], 8) "GPUs 0 and 3"."""
    found = sorted(indices)
    if len(found) == total > 1:
        return f"all {total} GPUs"
    if len(found) == 1:
        return f"GPU {found[0]}"
    return f"GPUs {', '.join(map(str, found[:-1]))} and {found[-1]}"
