"""DeepSpeed's own report of the node, and the versions of everything that has to be the same on all of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.checks import Probe, seen, unknowns, vote
from launcher.preflight import DIFFERS, Finding, Level, Setting
from launcher.preflight.parity import SHOWN, differing, listing, together

STAGE = "inventory"


@dataclass(frozen=True)
class Fact:
    """A version, and what follows where it is not the same on all nodes."""

    key: str
    name: str
    of: Literal["node", "torch", "ds_report"]  # what has to have answered
    level: Level
    why: str


# Excluded for being different: what runs in every rank and has to agree with the others over the wire.
# A warning: what is below that, and hurts only under a condition.
FACTS = (
    Fact(
        "deepspeed",
        "DeepSpeed",
        "ds_report",
        "exclude",
        "two releases call other collectives, or in another order: a hang",
    ),
    Fact("commit", "DeepSpeed's commit", "ds_report", "exclude", "two builds of one release are two programs"),
    Fact("torch", "torch", "torch", "exclude", "c10d promises nothing between releases, and results differ"),
    Fact("cuda", "torch's CUDA", "torch", "exclude", "other kernels and another NCCL come with it"),
    Fact("hip", "torch's HIP", "torch", "exclude", "other kernels and another RCCL come with it"),
    Fact("python", "python", "node", "exclude", "compiled ops and wheels belong to one minor version"),
    Fact("nccl", "NCCL", "torch", "exclude", "NCCL ends with `Mismatched NCCL version` (init.cc)"),
    Fact(
        "driver",
        "NVIDIA driver",
        "node",
        "exclude",
        "NCCL chooses cuMem and NVLS by it, and all ranks must choose alike",
    ),
    Fact("nvcc", "nvcc", "ds_report", "warn", "an op compiled on this node may not load on the others"),
    Fact(
        "kernel", "kernel", "node", "warn", "training does not see it, but the GPU and network modules come with it"
    ),
    Fact("glibc", "glibc", "node", "warn", "an op compiled against a newer one does not load from a shared home"),
)
DEVICE = {"driver"}  # of no importance without GPUs

# device_id in init_process_group, https://github.com/pytorch/pytorch/issues/153960
HANGS = ((2, 6, 0), (2, 7, 1))  # after the first, before the second

MARK = "dslaunch: versions "
# One process for both, because each would import torch. What follows the mark is what the command ds_report does.
ASK = f"MARK = {MARK!r}"
ASK += """
import sys
sys.path[:] = [path for path in sys.path if path]
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda or ""
    found["hip"] = getattr(torch.version, "hip", None) or ""
    found["gpus"] = torch.cuda.device_count()
    if found["cuda"] or found["hip"]:
        try:
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        except Exception:  # built without it
            found["nccl"] = ""
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
packages = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
found["packages"] = {name.lower().replace("_", "-"): version for name, version in packages if name}
print("\\n" + MARK + json.dumps(found), flush=True)
if "error" not in found:
    from deepspeed.env_report import cli_main
    cli_main()
"""


# --- ds_report -------------------------------------------------------------------------------------------------

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OP = re.compile(r"(?P<op>\w+) \.* ?\[(?P<installed>YES|NO)\] \.+ \[(?P<compatible>OKAY|NO)\]")
_LIKE_AN_OP = re.compile(r"\w+ \.* ?\[[^\]]*\]")
_LINE = re.compile(r"(?P<name>.+?) \.+ (?P<value>.*)")
_OPS_HEAD = re.compile(r"op name \.+ installed \.+ compatible")
_WARNING = re.compile(r"\[WARNING\]\s*(?:\[[^\]]*\]\s*)?(?P<said>.+)")


def parse(text: str) -> dict[str, Any]:
    """ops, ninja, general and warnings; {"unknown": why} where this is not a layout that we know.

    Compilers and builders print between the lines, so that a line of no known form is passed over; one that has
    the form of an op and other words in it is not.
    """
    ops: dict[str, list[bool]] = {}
    general: dict[str, str] = {}
    warnings: list[str] = []
    ninja: bool | None = None
    part = ""
    for raw in text.splitlines():
        line = _COLOUR.sub("", raw).strip()
        if _OPS_HEAD.fullmatch(line):
            part = "ops"
        elif line.startswith("DeepSpeed general environment info"):
            part = "general"
        elif (said := _WARNING.search(line)) and not line.startswith("ninja "):
            warnings.append(said["said"].strip())
        elif part == "" and line.startswith("ninja "):
            ninja = {"[OKAY]": True, "[FAIL]": False}.get(line.split()[-1])
        elif part == "ops" and (op := _OP.fullmatch(line)):
            ops[op["op"]] = [op["installed"] == "YES", op["compatible"] == "OKAY"]
        elif part == "ops" and _LIKE_AN_OP.match(line):
            return {"unknown": f"ds_report says {line!r} of an op"}
        elif part == "general" and (entry := _LINE.fullmatch(line)):
            general[entry["name"]] = entry["value"].strip()
    missing = [name for name in ("torch version", "deepspeed info") if not general.get(name)]
    if not ops:
        missing.insert(0, "the table of ops")
    if ninja is None:
        missing.insert(0, "ninja")
    if missing:
        return {"unknown": f"ds_report's answer has no line that we know for {listing(missing)}"}
    return {"ops": ops, "ninja": ninja, "general": general, "warnings": list(dict.fromkeys(warnings))}


# --- on the node -----------------------------------------------------------------------------------------------


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    timeout = setting.stage_timeout * 0.9
    answer = probe.run([sys.executable, "-c", ASK], timeout)
    if answer.code is None:
        return {"unknown": f"torch and ds_report: no answer within {timeout:g} s", "timeout": timeout}
    _, _, rest = answer.out.partition(f"\n{MARK}")
    versions, _, text = rest.partition("\n")
    if not versions:
        return {"unknown": f"import torch ended with exit code {answer.code}: {_last(answer.err)}"}
    found: dict[str, Any] = json.loads(versions)
    said = parse(text)
    if "error" in found:
        said = {"error": found["error"]}
    elif answer.code:
        said = {"error": _last(answer.err) or f"ds_report ended with exit code {answer.code}"}
    return {
        **found,
        "executable": sys.executable,
        "report": said,
        "driver": driver(probe.read("/proc/driver/nvidia/version") or ""),
        "kernel": probe.read("/proc/sys/kernel/osrelease") or "",
        "glibc": glibc(),
    }


def driver(text: str) -> str:
    """535.104.05 from /proc/driver/nvidia/version, of the closed and of the open module."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    return found[1] if found else ""


def glibc() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").replace("glibc ", "")
    except (ValueError, OSError):
        return ""  # musl


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# --- of all nodes ----------------------------------------------------------------------------------------------


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    """What the inventory table shows of one node; a row that is not here is not known."""
    out = {fact.key: str(value[fact.key]) for fact in FACTS if value.get(fact.key)}
    said = value.get("report", {})
    general = said.get("general", {})
    if info := general.get("deepspeed info"):
        version, commit = [*info.split(", "), "", ""][:2]
        out["deepspeed"] = version
        if commit not in ("", "unknown"):
            out["commit"] = commit
    if (nvcc := general.get("nvcc version", "")) and nvcc[0].isdigit():
        out["nvcc"] = nvcc
    if ops := said.get("ops"):
        able = [name for name, (installed, compatible) in ops.items() if installed or compatible]
        out["ops"] = f"{len(able)} of {len(ops)}"
        out["no ops"] = ", ".join(sorted(set(ops) - set(able)))
        out["ninja"] = "yes" if said["ninja"] else "no"
    return {key: word for key, word in out.items() if word}


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    out = unknowns("software", found)
    out += together(_missing(answered), answered)
    rows = {node: facts(value) for node, value in answered.items()}
    reported = {node: value["report"] for node, value in answered.items() if "ops" in value["report"]}
    planned = _planned({node: rows[node]["deepspeed"] for node in reported}, setting)
    out += planned
    out += _parity(answered, rows, setting, but="deepspeed" if planned else "")
    out += together(_known_to_hang(rows, setting), answered)
    out += together(_no_gpus(answered, setting), answered)
    out += together(_ops(reported, rows, setting), answered)
    out += _ops_differ(reported, rows)
    return out + _packages(answered)


def _missing(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    out = []
    for node, value in sorted(answered.items()):
        said = value["report"]
        if "error" in said:
            what = "torch" if "error" in value else "DeepSpeed"
            out.append(
                Finding(
                    "software",
                    "exclude",
                    f"{what} does not start: {said['error']}",
                    node=node,
                    measured=said["error"],
                    expected=f"{what} in {value['executable']}",
                    fix="the image or the virtual environment of this node is not the job's",
                    code=DIFFERS,
                )
            )
        elif "unknown" in said:
            out.append(
                Finding("software", "unknown", said["unknown"], node=node, expected="ds_report as of 0.16 to 0.19")
            )
    return out


def _parity(
    answered: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Mapping[str, str]], setting: Setting, *, but: str
) -> list[Finding]:
    out = []
    for fact in FACTS:
        if fact.key == but:
            continue
        values = {
            node: rows[node].get(fact.key, "")
            for node, value in answered.items()
            if fact.of == "node" or (fact.of == "torch" and "torch" in value) or "ops" in value["report"]
        }
        if fact.key == "python":
            values = {node: ".".join(version.split(".")[:2]) for node, version in values.items()}
        level: Level = "warn" if fact.key in DEVICE and not setting.gpus else fact.level
        fix = "the same image or environment on every node" if level == "exclude" else ""
        out += differing("software", fact.name, values, level=level, why=fact.why, fix=fix)
    return out


def _planned(versions: Mapping[str, str], setting: Setting) -> list[Finding]:
    """The plan's rules and memory belong to one release."""
    if not setting.deepspeed or not versions:
        return []
    other = {node: version for node, version in versions.items() if _public(version) != _public(setting.deepspeed)}
    if len(other) * 2 <= len(versions):
        return []  # the odd ones are named, or nobody has a majority
    releases = {_public(version) for version in other.values()}
    which = listing(releases)
    change = f'environment.deepspeed: "{which}" in the job file, or ' if len(releases) == 1 else ""
    return [
        Finding(
            "software",
            "block",
            f"the plan is for DeepSpeed {setting.deepspeed}, and {listing(other)} "
            f"{'have' if len(other) > 1 else 'has'} {which}",
            measured=which,
            expected=f"{setting.deepspeed} (environment.deepspeed in the job file)",
            source="rules and memory differ between releases",
            fix=f"{change}pip install deepspeed=={setting.deepspeed} on the nodes",
            code=DIFFERS,
        )
    ]


def _known_to_hang(rows: Mapping[str, Mapping[str, str]], setting: Setting) -> list[Finding]:
    return [
        Finding(
            "software",
            "warn",
            f"torch {row['torch']} can hang in init_process_group with a device_id",
            node=node,
            measured=row["torch"],
            expected="<= 2.6.0 or >= 2.7.1",
            source="https://github.com/pytorch/pytorch/issues/153960",
            fix="torch 2.7.1 or newer",
        )
        for node, row in sorted(rows.items())
        if setting.gpus and HANGS[0] < _numbers(row.get("torch", "")) < HANGS[1]
    ]


def _no_gpus(answered: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    out = []
    for node, value in sorted(answered.items()):
        if not setting.gpus or "torch" not in value or value.get("gpus", 0) >= setting.gpus:
            continue
        built = value.get("cuda") or value.get("hip")
        what = f"torch sees {value.get('gpus', 0)} of {setting.gpus} GPUs"
        if not built:
            what = f"torch {value['torch']} is built for CPU, and the job is for {setting.gpus} GPUs a node"
        out.append(
            Finding(
                "software",
                "exclude",
                what,
                node=node,
                measured=str(value.get("gpus", 0)),
                expected=str(setting.gpus),
                fix="the driver, CUDA_VISIBLE_DEVICES, or fewer GPUs granted" if built else "torch with CUDA or ROCm",
                code=0 if built else DIFFERS,
            )
        )
    return out


def _ops(reported: Mapping[str, Any], rows: Mapping[str, Mapping[str, str]], setting: Setting) -> list[Finding]:
    """Every op that the job needs is installed, or can be compiled here."""
    out = []
    for node, said in sorted(reported.items()):
        cannot = [(op, *reason) for op in setting.ops if (reason := _cannot(op, said, rows[node]))]
        out += [
            Finding(
                "software",
                "exclude",
                f"the job needs {op}: {why}",
                node=node,
                measured="[NO]",
                expected="[YES] installed, or [OKAY] compatible",
                source="ds_report's table of ops",
                fix=fix,
            )
            for op, why, fix in cannot
        ]
        if not said["ninja"] and not cannot:
            what, fix = "no ninja: an op that is not installed cannot be compiled", "pip install ninja"
            out.append(Finding("software", "warn", what, node=node, source="ds_report", fix=fix))
        built = [op for op, (installed, _) in said["ops"].items() if installed and op not in setting.ops]
        if built and (other := _built_for_another(said, rows[node])):
            what, fix = f"{listing(built)}: {other}", "install DeepSpeed again with this torch"
            out.append(Finding("software", "warn", what, node=node, source="DeepSpeed does not load them", fix=fix))
    return out


def _cannot(op: str, said: Mapping[str, Any], row: Mapping[str, str]) -> tuple[str, str] | None:
    """Why this node cannot have the op, and what to do; None where it can."""
    if op not in said["ops"]:
        return "it is not in the table", "another release of DeepSpeed, or DS_ACCELERATOR"
    installed, compatible = said["ops"][op]
    if installed:
        other = _built_for_another(said, row)
        return (other, "install DeepSpeed again with this torch") if other else None
    if not compatible:
        hints = [one for one in said["warnings"] if op in one] or ["ds_report calls it incompatible"]
        return hints[0], hints[-1] if len(hints) > 1 else ""
    if not said["ninja"]:
        return "it is not installed, and without ninja it cannot be compiled", "pip install ninja"
    if cuda := row.get("cuda"):
        nvcc = row.get("nvcc", "")
        toolkit = f"the toolkit of CUDA {cuda}, and CUDA_HOME"
        if not nvcc:
            no = said["general"].get("nvcc version", "no nvcc")
            return f"it is not installed, and cannot be compiled: {no}", toolkit
        if nvcc.split(".")[0] != cuda.split(".")[0]:
            return f"it is not installed, and nvcc {nvcc} does not compile for torch's CUDA {cuda}", toolkit
    return None


def _built_for_another(said: Mapping[str, Any], row: Mapping[str, str]) -> str:
    """Installed ops are of one CUDA, major and minor: 12.1 does not load beside torch's 12.8."""
    wheel = re.search(r"\b(?:cuda|hip) (\d+\.\d+)", said["general"].get("deepspeed wheel compiled w.", ""))
    now = ".".join((row.get("cuda") or row.get("hip") or "").split(".")[:2])
    return f"built for CUDA {wheel[1]}, and torch has {now}" if wheel and now and wheel[1] != now else ""


def _ops_differ(reported: Mapping[str, Any], rows: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Among nodes of the same DeepSpeed: another release has another table."""
    common = vote({node: rows[node]["deepspeed"] for node in reported})
    alike = {node: said["ops"] for node, said in reported.items() if rows[node]["deepspeed"] == common.common}
    out = []
    for op in sorted({op for ops in alike.values() for op in ops}):
        words = {node: _can(ops.get(op)) for node, ops in alike.items()}
        why = "one rank would compile what another one loads, or fail alone"
        out += differing("software", f"op {op}", words, level="warn", why=why)
    return out


def _can(op: list[bool] | None) -> str:
    if op is None:
        return "not in the table"
    return "installed" if op[0] else "compatible" if op[1] else "incompatible"


def _packages(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Other packages, together in one finding a node: transformers 4.40.0 (not 4.41.2) changes a model."""
    packages = {node: value["packages"] for node, value in answered.items() if value.get("packages")}
    known = {"torch", "deepspeed"}
    odd: dict[str, list[str]] = {}
    tied = []
    for name in sorted({name for one in packages.values() for name in one} - known):
        for one in differing(
            "", name, {node: having.get(name, "") for node, having in packages.items()}, level="warn"
        ):
            if one.node:
                odd.setdefault(one.node, []).append(f"{name} {one.measured} (not {one.expected.split(',')[0]})")
            else:
                tied.append(name)
    out = [
        Finding(
            "software",
            "warn",
            f"{len(names)} python package{'s' if len(names) > 1 else ''} differ: {listing(names)}",
            node=node,
            measured="; ".join(names[: SHOWN * SHOWN]),
            expected="as on most nodes",
            fix="the same image or environment on every node",
        )
        for node, names in sorted(odd.items())
    ]
    if tied:
        out.append(Finding("software", "warn", f"python packages differ, none with a majority: {listing(tied)}"))
    return out


def _public(version: str) -> str:
    return version.partition("+")[0]


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 7, 0) of 2.7.0a0+git; () of what is no version."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
