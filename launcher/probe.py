"""What was seen on nodes -> the lines of a job file or site file, each with what it was concluded from."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher import facts

Seen = Mapping[str, Any]  # what launcher/node/look.py prints


@dataclass(frozen=True)
class Line:
    """One key of `resources`; without a value it could not be concluded, and `why` says what was missing."""

    key: str
    value: str | int | None
    why: str


@dataclass(frozen=True)
class Found:
    host: str
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    @property
    def values(self) -> dict[str, str | int | None]:
        return {line.key: line.value for line in self.lines}


def assembled(output: str) -> list[Seen]:
    """What look.py printed on machines, in the order of their names; one that lost a piece is left out."""
    pieces: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    for row in output.splitlines():
        found = re.fullmatch(r"(\S+)\t([0-9]{1,6})/([0-9]{1,6})\t(.*)", row)
        if found:
            pieces.setdefault(found[1], {})[int(found[2])] = found[4]
            wanted[found[1]] = int(found[3])
    whole = {host: parts for host, parts in pieces.items() if set(parts) == set(range(1, wanted[host] + 1))}
    return [json.loads("".join(whole[host][number] for number in sorted(whole[host]))) for host in sorted(whole)]


def conclude(seen: Seen) -> Found:
    """Pure: what look.py saw on one machine -> what a job file would say about it."""
    gpu, named, why = _gpu(seen)
    count = len(seen["gpus"])
    fabric, reason, possible = _fabric(seen)
    network, over = _network(seen, fabric)
    memory = int(seen["memory"] * 0.95) >> 30
    biggest = max((disk for disk in seen["disks"] if disk["name"].startswith("nvme")), key=_bytes, default=None)
    lines = (
        Line("gpu", named, why) if count else None,
        Line("gpus_per_node", count, gpu if count else "no GPU is seen: CPU jobs"),
        Line("fabric", fabric, reason),
        Line("network", network, over),
        Line(
            "cpus_per_node", seen["cpus"] or None, "threads in /proc/cpuinfo" if seen["cpus"] else "no /proc/cpuinfo"
        ),
        Line("memory", f"{memory}G" if memory else None, f"95 % of {seen['memory'] / 2**30:.0f} GiB"),
    )
    remarks = [f"{name} would look the same: {text}" for name, text in possible]
    if biggest:
        remarks.append(f"{biggest['name']} has {_bytes(biggest) / 1e9:.0f} GB: nvme: says what of it may be filled")
    if seen["shm"][0] and count and seen["shm"][0] < 8 << 30:
        remarks.append(f"/dev/shm has {seen['shm'][0] / 2**30:.1f} GiB; NCCL and data loaders want 8")  # noqa: S108
    remarks += [f"not seen: {text}" for text in seen["unseen"]]
    if seen["slurm"]:
        remarks.append(f"{seen['slurm']['version']}")
        for name, state, nodes, cpus, memory_mb, gres in seen["slurm"]["partitions"]:
            with_gpus = f", {gres}" if gres not in ("(null)", "") else ""
            remarks.append(f"partition {name} ({state}): {nodes} x {cpus} CPUs, {memory_mb} MB{with_gpus}")
    return Found(seen["host"], tuple(line for line in lines if line), tuple(remarks))


def _bytes(disk: Mapping[str, Any]) -> int:
    return int(disk["bytes"])


# --- GPUs -----------------------------------------------------------------------------------------


def _gpu(seen: Seen) -> tuple[str, str | None, str]:
    """What is there, our name of it, and why."""
    kinds = Counter((gpu["name"], gpu["mib"]) for gpu in seen["gpus"])
    text = ", ".join(f"{count} x {name}{f' ({mib} MiB)' if mib else ''}" for (name, mib), count in kinds.items())
    if len({name for name, _ in kinds}) > 1:
        return text, None, f"several types: {text}"
    for name, mib in kinds:
        row = gpu_row(name, mib=mib)
        return text, row.name if row else None, text if row else f"{text}: not in `dslaunch presets --gpus`"
    return text, None, ""


def gpu_row(product: str, *, mib: int) -> facts.Gpu | None:
    """gpu_row("NVIDIA H100 80GB HBM3", mib=81559) is h100-80gb; None for what the table does not have."""
    words = re.split(r"[\s_-]+", product.lower())
    told = {*words, *(a + b for a, b in itertools.pairwise(words))}
    fits = []
    for row in facts.gpus().values():
        head, *rest = row.name.split("-")
        variant = [part for part in rest if not part.endswith("gb")]
        if head in told and set(variant) == {word for word in words if word in ("pcie", "nvl")}:
            off = abs(mib / 1024 / row.memory - 1) if mib else 0.0
            fits.append((off, row))
    best = min(fits, key=lambda fit: fit[0], default=None)
    return best[1] if best and best[0] < 0.2 else None


# --- network --------------------------------------------------------------------------------------


def _active(seen: Seen) -> list[Mapping[str, Any]]:
    return [port for port in seen["rdma"] if port["state"] == "ACTIVE"]


def _physical(seen: Seen) -> list[Mapping[str, Any]]:
    """Interfaces that carry data: the machine's own, or in a container the one with the route."""
    return [nic for nic in seen["nics"] if nic["up"] and (nic["physical"] or nic["routed"])]


def _holds(key: str, wanted: Any, seen: Seen) -> str | None:
    """What shows that one condition of `detect` holds; None where it does not."""
    ports, nics = _active(seen), _physical(seen)
    words: list[str]
    if key == "nics":
        fits = not nics if wanted == 0 else len(nics) >= wanted
        return f"{len(nics)} network interfaces" if fits else None
    if key == "gpus":
        count = len(seen["gpus"])
        fits = not count if wanted == "none" else count >= wanted
        return f"{count} GPUs" if fits else None
    if key == "rdma" and wanted == "none":
        return None if seen["rdma"] else "no RDMA device"
    if key == "rdma":
        count = sum(port["layer"] == wanted and port["driver"] != "efa" for port in ports)
        return f"{count} active RDMA ports with link layer {wanted}" if count else None
    if key == "path":
        return f"{wanted} is there" if wanted in seen["paths"] else None
    if key == "vendor":
        words = list(seen["vendor"].values())
    elif key == "driver":
        words = [one["driver"] for one in (*seen["rdma"], *nics)] + (["efa"] if seen["efa"] else [])
    elif key == "device":
        words = [port["device"] for port in ports]
    elif key == "nic":
        words = [nic["name"] for nic in nics]
    else:
        words = [gpu["name"] for gpu in seen["gpus"]]
    found = [word for word in words if re.search(wanted, word)]
    return f"{key} {found[0]}" if found else None


WEIGHT = {"vendor": 2, "nics": 0, "gpus": 0}  # who sells it says most; a count decides between equals


def _fabric(seen: Seen) -> tuple[str | None, str, list[tuple[str, str]]]:
    """The fabric whose conditions say most, why, and those that a node cannot tell from it."""
    fits: list[tuple[tuple[int, int], facts.Fabric, str]] = []
    possible = []
    for row in facts.fabrics().values():
        for conditions in row.detect:
            shown = [_holds(key, wanted, seen) for key, wanted in conditions.items()]
            if None in shown:
                continue
            if row.possible:
                possible.append((row.name, row.possible))
                break
            score = sum(WEIGHT.get(key, 0 if wanted == "none" else 1) for key, wanted in conditions.items())
            count = sum(wanted for wanted in conditions.values() if isinstance(wanted, int))
            fits.append(((score, count), row, ", ".join(text for text in shown if text)))
    if not seen["gpus"]:
        fits = [fit for fit in fits if fit[1].only == "cpu"]
        possible = []
    if not fits:
        return None, "no port and no interface that is known", possible
    best = max(score for score, _, _ in fits)
    names = {row.name: why for score, row, why in fits if score == best}
    if len(names) > 1:
        return None, "fits several: " + "; ".join(f"{name} ({why})" for name, why in names.items()), possible
    ((name, why),) = names.items()
    return name, why, possible


def _network(seen: Seen, fabric: str | None) -> tuple[int | None, str]:
    """Gbit/s of one node, and which NICs were added up."""
    ports = [port for port in _active(seen) if port["gbits"]]
    total = sum(port["gbits"] for port in ports)
    if total and fabric not in ("gloo", "ethernet"):
        rates = Counter(f"{port['gbits']:g}" for port in ports)
        return round(total), " + ".join(
            f"{count} x {rate} Gbit/s" for rate, count in rates.items()
        ) + " of RDMA ports"
    if ports or seen["rdma"]:
        return None, "the rate of the RDMA ports is not shown here"
    nics = [nic for nic in _physical(seen) if nic["mbits"]]
    patterns = [row["nic"] for row in facts.fabric(fabric).detect if "nic" in row] if fabric else []
    own = [nic for nic in nics if any(re.match(pattern, nic["name"]) for pattern in patterns)]
    if own:  # hsn0 to hsn3 of Slingshot
        return sum(nic["mbits"] for nic in own) // 1000, f"speed of {', '.join(nic['name'] for nic in own)}"
    nic = next((nic for nic in nics if nic["routed"]), max(nics, key=lambda nic: int(nic["mbits"]), default=None))
    if nic and nic["mbits"] >= 100:
        return max(1, nic["mbits"] // 1000), f"speed of {nic['name']}"
    return None, "no interface says its speed: a virtual one does not"


# --- several nodes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The nodes together: what most of them have, and who differs."""

    common: Found
    differs: tuple[str, ...]
    missing: tuple[str, ...]


def together(found: list[Found], *, asked: tuple[str, ...]) -> Cluster:
    """Most nodes decide, key by key; a node that did not answer is named."""
    differs, lines = [], []
    for line in found[0].lines:
        values = {one.host: one.values.get(line.key) for one in found}
        common = Counter(values.values()).most_common(1)[0][0]
        shown = next((own for one in found for own in one.lines if own.key == line.key and own.value == common), line)
        lines.append(shown)
        for host, value in sorted(values.items()):
            if value != common:
                differs.append(f"{host} has {line.key} {value}, most have {common}")
    hosts = {one.host.split(".")[0] for one in found}
    missing = tuple(name for name in asked if name.split(".")[0] not in hosts)
    return Cluster(Found(f"{len(found)} nodes", tuple(lines), found[0].remarks), tuple(differs), missing)


# --- telling --------------------------------------------------------------------------------------


def text(found: Found, cluster: Cluster | None = None) -> str:
    """The block for a site file or a job file."""
    rows = [f"# dslaunch probe, {found.host}: for the site file or a job file", "resources:"]
    known = [(f"  {line.key}: {line.value}", line.why) for line in found.lines if line.value is not None]
    width = max((len(row) for row, _ in known), default=0)
    rows += [f"{row.ljust(width)}  # {_plain(why)}" for row, why in known]
    rows += [f"  # {line.key}: not concluded; {_plain(line.why)}" for line in found.lines if line.value is None]
    rows += [f"# {_plain(remark)}" for remark in found.remarks]
    if cluster:
        rows += [f"# DIFFERS: {_plain(one)}" for one in cluster.differs]
        rows += [f"# NO ANSWER: {_plain(name)}" for name in cluster.missing]
    return "\n".join(rows)


def _plain(text: str) -> str:
    """One line without control characters, whatever a driver calls its device."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
