"""Variables that change how ranks talk, compared across nodes, and the files that set them behind one's back."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Level, Setting
from launcher.preflight.parity import differing, listing

STAGE = "inventory"


@dataclass(frozen=True)
class Rule:
    """What a variable that is not the same everywhere means; the first rule whose names match counts."""

    names: str
    level: Level
    why: str


RULES = (
    Rule(
        r"(NCCL|GLOO)_SOCKET_IFNAME|NCCL_IB_HCA|UCX_NET_DEVICES|FI_\w*IFACE|NCCL_TOPO_FILE",
        "warn",
        "right only where the nodes name their interfaces differently",
    ),
    Rule(r"NCCL_HOSTID|NCCL_\w*DUMP\w*", "note", "may well be each node's own"),
    Rule(r"NCCL_DEBUG\w*|NCCL_CONF_FILE|TORCH_FR_\w+|TORCH_\w*DEBUG\w*", "note", "logging alone"),
    Rule(
        r"CUDA_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES", "warn", "other GPUs than on the other nodes"
    ),
    Rule(r"NCCL_\w+|RCCL_\w+", "exclude", "ranks that choose another algorithm, protocol or transport hang"),
    Rule(
        r"TORCH_NCCL_\w+|TORCH_DISTRIBUTED_\w+|DS_ACCELERATOR",
        "exclude",
        "ranks behave differently on the same event",
    ),
    Rule(r"(TORCH|CUDA|GLOO|FI|UCX|DS|HF|HSA|PYTORCH|OMP)_\w+", "warn", "the same program behaves differently"),
    Rule(
        r"LD_LIBRARY_PATH|LD_PRELOAD|PATH|PYTHONPATH|PYTHONHOME|VIRTUAL_ENV|CONDA_PREFIX",
        "warn",
        "other files are loaded",
    ),
)
PATHS = {"LD_LIBRARY_PATH", "PATH", "PYTHONPATH"}
# Where a name smells of a secret, or a value has one (https://user:word@host), nothing of it leaves the node.
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE")
SECRET_VALUE = re.compile(r"://[^/\s@]+@|\b(hf_|sk-|ghp_|AKIA)\w{8}")
LONGEST = 2048  # characters of a value that are compared, ours


def rule(name: str) -> Rule | None:
    return next((one for one in RULES if re.fullmatch(one.names, name)), None)


def told(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that may be told: of a name that we compare, and no secret."""
    return {
        name: value[:LONGEST]
        for name, value in sorted(environ.items())
        if rule(name) and not SECRET_NAME.search(name.upper()) and not SECRET_VALUE.search(value)
    }


def conf(text: str) -> dict[str, str]:
    """nccl.conf as NCCL reads it: NAME=value from the first column, the first of a name counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, is_set, value = line.partition("=")
        if is_set and not line.startswith("#"):
            found.setdefault(name, value)
    return found


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir  # NCCL does not look at $HOME
    except KeyError:
        home = ""
    files = {}
    for path in (os.environ.get("NCCL_CONF_FILE") or (f"{home}/.nccl.conf" if home else ""), "/etc/nccl.conf"):
        if path and (text := probe.read(path)) is not None:
            files[path] = told(conf(text))
    lost = os.environ.get("NCCL_CONF_FILE", "")
    return {"environment": told(os.environ), "files": files, "lost": lost if lost and lost not in files else ""}


def effective(value: Mapping[str, Any]) -> dict[str, str]:
    """What NCCL goes by: the environment, before the user's file, before /etc/nccl.conf."""
    out: dict[str, str] = {}
    for one in [value["environment"], *value["files"].values()]:
        for name, word in one.items():
            out.setdefault(name, word)
    return out


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    files = {
        path: " ".join(f"{name}={word}" for name, word in names.items()) for path, names in value["files"].items()
    }
    return {**value["environment"], **files}


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    out = unknowns("environment", found)
    answered = seen(found)
    values = {node: effective(value) for node, value in answered.items()}
    for name in sorted({name for one in values.values() for name in one}):
        kind = rule(name)
        assert kind is not None  # told() leaves out the others
        these = {node: one.get(name, "") for node, one in values.items()}
        if name in PATHS:
            these = _only_what_differs(these)
        fix = f"env: {name} in the job file sets it on every node alike"
        out += differing("environment", name, these, level=kind.level, why=kind.why, fix=fix)
    return out + _files(answered)


def _only_what_differs(paths: Mapping[str, str]) -> dict[str, str]:
    """Of a list of directories, those that not every node has; all of it where only the order differs."""
    parts = {node: value.split(os.pathsep) for node, value in paths.items()}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    short = {node: os.pathsep.join(one for one in part if one not in common) for node, part in parts.items()}
    return short if len(set(short.values())) == len(set(paths.values())) else dict(paths)


def _files(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A forgotten nccl.conf: nothing in the job's log says that it was read. One finding for each file."""
    where: dict[tuple[str, str], list[str]] = {}
    lost: dict[str, list[str]] = {}
    for node, value in sorted(answered.items()):
        for path, names in value["files"].items():
            said = [f"{name}={word}" for name, word in names.items() if value["environment"].get(name, word) == word]
            if said:
                where.setdefault((path, " ".join(said)), []).append(node)
        if value["lost"]:
            lost.setdefault(value["lost"], []).append(node)
    out = [
        Finding(
            "environment",
            "warn",
            f"{path} sets {said} on {listing(nodes)}, and NCCL follows it wherever the environment says nothing else",
            node=nodes[0] if len(nodes) == 1 else "",
            measured=said,
            source="https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html",
            fix=f"move it to env: in the job file, or remove {path}",
        )
        for (path, said), nodes in sorted(where.items())
    ]
    out += [
        Finding(
            "environment",
            "warn",
            f"NCCL_CONF_FILE is {path}, which is not there on {listing(nodes)}",
            node=nodes[0] if len(nodes) == 1 else "",
            measured=path,
            fix="unset it, or put the file there",
        )
        for path, nodes in sorted(lost.items())
    ]
    return out
