"""Xids and SXids in the kernel log: what the driver reported of GPUs and NVSwitches since the node booted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Level, Setting, kernel, nvidia

STAGE = "host"

LAST = 172  # of the catalogue, docs.nvidia.com/deploy/xid-errors as of 2025-10-29
# Seconds. What is older, and did not come back, is warned of: Azure's node checks count link flaps over that time.
FRESH = 24 * 3600
SOURCE = "NVIDIA's Xid catalogue"
SWITCH = "NVIDIA fabric manager user guide, NVSwitch SXid errors"
FATAL_OR_NOT = range(144, 151)  # NVLink 5: the line says which
RANK: dict[Level, int] = {"note": 0, "unknown": 1, "warn": 2, "exclude": 3, "block": 4}

# The catalogue's action -> what a person does.
ACTIONS = {
    "RESET_GPU": "drain the node and reset the GPU: nvidia-smi --gpu-reset -i {at}.0",
    "RESTART_BM": "power-cycle the node; when it comes back, replace the GPU or its riser",
    "RESTART_VM": "restart the virtual machine",
    "RESTART_APP": "start the application again",
    "CHECK_MECHANICALS": "look at the GPU's power cable and seat",
    "UPDATE_SWFW": "update driver and firmware",
    "CONTACT_SUPPORT": "collect nvidia-bug-report.sh and call the vendor",
    "WORKFLOW_XID_48": "drain the node and reset the GPU; replace it when the error comes back",
    "WORKFLOW_NVLINK_ERR": "look at `nvidia-smi nvlink --status`, then reset the GPUs of the node",
    "WORKFLOW_NVLINK5_ERR": "look at `nvidia-smi nvlink --status`, then reset the GPUs of the node",
    "IGNORE": "call the vendor when it comes back",
}
# Xid 154's own words -> what a person does. `None` takes an earlier action back.
RECOVERY = {
    "GPU Reset Required": "drain the node and reset the GPU: nvidia-smi --gpu-reset -i {at}.0",
    "Node Reboot Required": "reboot the node",
    "Drain P2P": "end all processes on the node's GPUs, then look at the recovery action again",
    "Drain and Reset": "end all processes on the node's GPUs, then reset the GPU",
}

XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:, ?(.*))?$")
SXID = re.compile(r"nvidia-nvswitch\d+: SXid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+), (Fatal|Non-fatal), ?(.*)$", re.I)
GPU = re.compile(r"NVRM: (?:The NVIDIA )?GPU (?:at )?(?:PCI:)?([0-9a-fA-F:.]+)")
CHANGED = re.compile(r"changed from \S+ \((.*?)\) to \S+ \((.*?)\)")
LOADED = "NVRM: loading NVIDIA UNIX"


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    if not setting.gpus:
        return {"skipped": "a CPU job"}
    found = kernel.log(probe, "NVRM", "SXid")
    if "unknown" in found:
        return found
    # Of GPUs that are another job's. One that fell off the bus is in no list, and counts.
    others = nvidia.query(probe).get("others", ()) if nvidia.named(os.environ) else ()
    return {"events": [event for event in parse(found["lines"]) if event["at"] not in others]}


def parse(lines: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """One event for each Xid of each GPU: {"number": 79, "at": "0000:44:00", "text": ..., "age": 12.0, "count": 2}.

    Xid 45 after another one of the same GPU is that one's consequence and left out. `over` is said of what came
    before the driver was loaded again, or before Xid 154 took the recovery action back.
    """
    events: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = list(lines)
    for index, (age, text) in enumerate(rows):
        if LOADED in text:
            for event in events.values():
                event["over"] = "before the driver was loaded again"
        kind, at, number, said, fatal = _event(text, [row[1] for row in rows[index + 1 : index + 3]])
        if not kind:
            continue
        before = [one for one in events.values() if one["at"] == at and not one["over"]]
        if number == 45 and before:
            continue
        if number == 154 and (change := CHANGED.search(said)) and change[2] == "None":
            for event in before:
                event["over"] = "before the driver took its recovery action back"
            continue
        key = (kind, number, at, fatal)
        count = events.pop(key)["count"] if key in events else 0
        events[key] = {
            "kind": kind, "number": number, "at": at, "text": said, "fatal": fatal, "age": age, "count": count + 1,
            "over": "",
        }  # fmt: skip
    return list(events.values())


def _event(text: str, following: Sequence[str]) -> tuple[str, str, int, str, bool | None]:
    """What one line of the log reports; a lost GPU's message goes over three lines."""
    if match := XID.search(text):
        said = (match[3] or "").strip()
        fatal = True if re.search(r"\bFatal\b", said) else False if re.search(r"\bNonfatal\b", said) else None
        return "Xid", nvidia.bus(match[1]), int(match[2]), said, fatal if int(match[2]) in FATAL_OR_NOT else None
    if match := SXID.search(text):
        return "SXid", nvidia.bus(match[1]), int(match[2]), match[4].strip(), match[3].lower() == "fatal"
    if match := GPU.search(text):
        whole = " ".join([text, *(line.partition("NVRM:")[2] for line in following)])
        if "fallen off the bus" in whole and not any(GPU.search(line) or XID.search(line) for line in following[:1]):
            return "Xid", nvidia.bus(match[1]), 79, "GPU has fallen off the bus", None
    return "", "", 0, "", None


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    findings = unknowns("xids", found)
    for node, value in sorted(seen(found).items()):
        places: dict[str, list[tuple[Level, dict[str, Any], str, str]]] = {}
        for event in value["events"]:
            level, what, fix = _weigh(event, setting)
            if level != "note":
                places.setdefault(event["at"], []).append((level, event, what, fix))
        for at, rows in places.items():
            findings.append(_finding(node, at, rows))
    return findings


def _finding(node: str, at: str, rows: list[tuple[Level, dict[str, Any], str, str]]) -> Finding:
    """The worst of one GPU's events; the others, which mostly follow from it, are named."""
    level, event, what, fix = max(rows, key=lambda row: (RANK[row[0]], -(row[1]["age"] or 0)))
    thing = "GPU" if event["kind"] == "Xid" else "NVSwitch"
    times = f", {event['count']} times" if event["count"] > 1 else ""
    when = event["over"] or kernel.ago(event["age"])
    others = sorted({str(row[1]["number"]) for row in rows if row[1] is not event})
    also = f"; also {event['kind']} {', '.join(others)}" if others else ""
    return Finding(
        "xids", level, f"{thing} {at}: {event['kind']} {event['number']}, {what} ({when}{times}){also}", node=node,
        measured=event["text"][:120], expected="none within 24 h",
        source=SOURCE if event["kind"] == "Xid" else SWITCH, fix=fix.format(at=at),
    )  # fmt: skip


def _weigh(event: Mapping[str, Any], setting: Setting) -> tuple[Level, str, str]:
    number = event["number"]
    row = setting.xids.get(str(number))
    level: Level
    if event["kind"] == "SXid":
        level = "exclude" if event["fatal"] else "warn"
        what = f"{'fatal' if event['fatal'] else 'not fatal'}: {event['text']}"
        fix = "reset all GPUs and NVSwitches of the node together, or reboot it"
    elif number == 154:
        change = CHANGED.search(event["text"])
        action = change[2] if change else event["text"]
        level = "exclude" if action in RECOVERY else "unknown"
        what = f"the driver asks for: {action}"
        fix = RECOVERY.get(action, "look at GPU Recovery Action in `nvidia-smi -q`")
    elif row is not None:
        level = row.level if event["fatal"] is None else "exclude" if event["fatal"] else "warn"
        what, fix = row.name, ACTIONS.get(row.action, "collect nvidia-bug-report.sh and call the vendor")
    elif setting.xids and 0 < number <= LAST:
        return "note", "", ""
    else:
        return "unknown", f"not one of the {LAST} of the catalogue: {event['text']}", "look it up with the vendor"
    if level == "exclude" and (event["over"] or (event["age"] or 0) > FRESH):
        level = "warn"
    return level, what, fix
