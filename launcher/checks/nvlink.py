"""NVLink of every GPU, the fabric manager that joins them, and IMEX that joins nodes of one NVLink domain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns, vote
from launcher.preflight import Finding, Setting, nvidia, parity

STAGE = "host"

# Active links of a GPU on a board with NVSwitches: NVLink bandwidth of the data sheet by that of one link, both ways.
LINKS = {
    "A100-SXM4": (12, "NVIDIA A100 data sheet: 600 GB/s in links of 50"),
    "A800-SXM4": (8, "NVIDIA A800 data sheet: 400 GB/s in links of 50"),
    "H100 80GB HBM3": (18, "NVIDIA H100 data sheet: 900 GB/s in links of 50"),
    "B200": (18, "NVIDIA DGX B200 data sheet: 1.8 TB/s in links of 100"),
}
FABRIC = "NVIDIA fabric manager user guide: CUDA does not start before state Completed, status Success"
IMEX = "NVIDIA IMEX guide: the domain is UP when all nodes of it are connected"
NONE = ("", "N/A", "[N/A]", "Not Supported")
NO_CLUSTER = "00000000-0000-0000-0000-000000000000"
HEAD = re.compile(r"^GPU (\d+): (.*?)(?: \(UUID: .*\))?\s*$")
LINK = re.compile(r"^\s*Link (\d+): (.+?)\s*$")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    if not setting.gpus:
        return {"skipped": "a CPU job"}
    found = nvidia.query(probe)
    if "gpus" not in found:
        return {"skipped": "nvidia-smi shows no GPUs; the gpus check says why"}
    answer = probe.run(["nvidia-smi", "nvlink", "--status"])
    if answer.code is None and "did not answer" in answer.err:
        return {"unknown": answer.err, "timeout": 20}
    links = status(answer.out)
    if links is None:
        said = (answer.err.strip() or answer.out.strip() or f"exit code {answer.code}").splitlines()[0]
        return {"unknown": f"nvidia-smi nvlink --status answered in a layout not known: {said}"}
    mine = {str(gpu["index"]) for gpu in found["gpus"]}
    value: dict[str, Any] = {
        "gpus": [
            {key: gpu[key] for key in ("index", "name", "fabric", "fabric_status", "clique", "cluster")}
            for gpu in found["gpus"]
        ],
        "links": {index: row for index, row in links.items() if index in mine or not found["by"]},
    }
    if probe.list("/proc/driver/nvidia-nvswitch/devices"):
        manager = probe.run(["systemctl", "is-active", "nvidia-fabricmanager"])
        value["manager"] = manager.out.strip() if manager.code is not None else ""
    if any(_cluster(gpu) for gpu in found["gpus"]):
        imex = probe.run(["nvidia-imex-ctl", "-N"])
        match = re.search(r"Domain State: (\w+)", imex.out)
        value["imex"] = match[1] if match else ""
        value["imex_says"] = "" if match else (imex.err.strip() or imex.out.strip() or "no answer").splitlines()[-1]
    return value


def status(text: str) -> dict[str, Any] | None:
    """{"0": {"rates": {"0": 26.562}, "down": ["1"]}}; a GPU without NVLink has neither. None for an unknown layout.

    Only a figure is a link that runs: <inactive>, or a word that we have never seen, is not.
    """
    found: dict[str, Any] = {}
    gpu = None
    for line in text.splitlines():
        if match := HEAD.match(line):
            gpu = found.setdefault(match[1], {"rates": {}, "down": []})
        elif gpu is not None and (match := LINK.match(line)):
            rate = re.fullmatch(r"(\d+(?:\.\d+)?) GB/s", match[2])
            if rate:
                gpu["rates"][match[1]] = float(rate[1])
            else:
                gpu["down"].append(match[1])
    return found or None


def _cluster(gpu: Mapping[str, Any]) -> str:
    """The NVLink domain over nodes that a GPU belongs to, "5cd30dc8-...clique 388"; nothing within one node."""
    cluster = gpu["cluster"] or ""
    return "" if cluster in (*NONE, NO_CLUSTER) else f"{cluster} clique {gpu['clique']}"


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    nodes = seen(found)
    return [
        *unknowns("nvlink", found),
        *_links(nodes),
        *(finding for node, value in nodes.items() for finding in _fabric(node, value)),
        *_domain(nodes),
    ]


def _links(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Fewer links than most GPUs have, or slower ones: every collective on the node waits for that GPU."""
    counts = {(node, gpu): len(row["rates"]) for node, value in nodes.items() for gpu, row in value["links"].items()}
    rates = [rate for value in nodes.values() for row in value["links"].values() for rate in row["rates"].values()]
    if not counts:
        return
    votes = vote({f"{node} {gpu}": count for (node, gpu), count in counts.items()})
    usual = max(counts.values()) if votes.tied else votes.common
    speed = vote({str(index): rate for index, rate in enumerate(rates)})
    full = (max(rates) if speed.tied else speed.common) if rates else 0.0
    fix = "reset all GPUs of the node; then reseat or replace the GPU or its baseboard"
    for (node, gpu), count in counts.items():
        row = nodes[node]["links"][gpu]
        if count < usual:
            yield Finding(
                "nvlink", "exclude", f"GPU {gpu}: {count} of {usual} NVLink links are active", node=node,
                measured=f"{count} active" + (f", not {', '.join(row['down'])}" if row["down"] else ""),
                expected=f"{usual}, as on most GPUs", source="what most GPUs of these nodes have", fix=fix,
            )  # fmt: skip
        slow = {link: rate for link, rate in row["rates"].items() if rate < full}
        if slow:
            yield Finding(
                "nvlink", "exclude", f"GPU {gpu}: NVLink {', '.join(slow)} at {min(slow.values()):g} GB/s", node=node,
                measured=f"{min(slow.values()):g} GB/s", expected=f"{full:g} GB/s, as most links",
                source="what most links of these nodes have", fix=fix,
            )  # fmt: skip
    for node, value in nodes.items():
        names = {gpu["name"] or "" for gpu in value["gpus"]}
        for word, (links, source) in LINKS.items():
            if len(value["gpus"]) > 1 and usual < links and len(names) == 1 and word in next(iter(names)):
                yield Finding(
                    "nvlink", "warn", f"{usual} NVLink links on a GPU that has {links} beside NVSwitches", node=node,
                    measured=str(usual), expected=str(links), source=source,
                    fix="look at the fabric manager, and at what part of the board this machine was given",
                )  # fmt: skip


def _fabric(node: str, value: Mapping[str, Any]) -> Iterator[Finding]:
    gpus = value["gpus"]
    states: dict[str, list[int]] = {}
    for gpu in gpus:
        state, how = gpu["fabric"] or "", gpu["fabric_status"] or ""
        if state not in NONE and (state, how) != ("Completed", "Success"):
            states.setdefault(f"{state}, {how}" if how not in NONE else state, []).append(gpu["index"])
    for state, indices in states.items():
        yield Finding(
            "nvlink", "exclude", f"{nvidia.which(indices, len(gpus))}: not joined to the NVLink fabric ({state})",
            node=node, measured=state, expected="Completed, Success", source=FABRIC,
            fix="start nvidia-fabricmanager of the driver's own version, then reset the GPUs",
        )  # fmt: skip
    manager = value.get("manager")
    if states or manager in (None, "active"):
        return
    if manager in ("inactive", "failed", "deactivating"):
        yield Finding(
            "nvlink", "exclude", f"there are NVSwitches, and the fabric manager is {manager}", node=node,
            measured=manager, expected="active", source=FABRIC,
            fix="systemctl restart nvidia-fabricmanager, of the driver's own version",
        )  # fmt: skip
    elif all((gpu["fabric"] or "") in NONE for gpu in gpus):
        says = f"systemctl says {manager}" if manager else "systemctl is not here"
        yield Finding("nvlink", "unknown", f"there are NVSwitches, and of the fabric manager {says}", node=node)


def _domain(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    cliques = {}
    for node, value in nodes.items():
        inside = {_cluster(gpu) for gpu in value["gpus"]}
        cliques[node] = ", ".join(sorted(inside))
        if "imex" not in value:
            continue
        if value["imex"] in ("DOWN", "DEGRADED"):
            yield Finding(
                "nvlink", "exclude" if value["imex"] == "DOWN" else "warn", f"the IMEX domain is {value['imex']}",
                node=node, measured=value["imex"], expected="UP", source=IMEX,
                fix="systemctl restart nvidia-imex on the nodes of the domain; nodes_config.cfg has to list them all",
            )  # fmt: skip
        elif value["imex"] != "UP":
            said = value["imex"] or value["imex_says"]
            yield Finding(
                "nvlink", "unknown", f"an NVLink domain over nodes, and IMEX does not say UP: {said}", node=node
            )
    if any(cliques.values()):
        yield from parity.differing(
            "nvlink", "the NVLink domain (ClusterUUID and CliqueId)", cliques, level="warn",
            why="NVLink joins the nodes of one clique, the network the others",
            fix="ask the scheduler for nodes of one rack",
        )  # fmt: skip


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    if "links" not in value:
        return {}
    counts = sorted({len(row["rates"]) for row in value["links"].values()})
    return {"NVLink links": " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))} if counts else {}
