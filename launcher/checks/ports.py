"""RDMA ports and Ethernet links: all there, up, at full rate, and without a history of errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns, vote
from launcher.preflight import Finding, Level, Setting, kernel, parity

STAGE = "host"

SYSFS = "/sys/class/infiniband"
# Counters of a port since its driver was loaded -> how many are worth a warning (ibqueryerrors' suggested thresholds,
# rdma-core infiniband-diags/etc/error_thresholds). Without a history no more can be said of them.
COUNTERS = {
    "symbol_error": 10,
    "link_error_recovery": 10,
    "port_rcv_errors": 10,
    "local_link_integrity_errors": 10,
    "excessive_buffer_overrun_errors": 10,
    "port_rcv_remote_physical_errors": 100,
    "port_xmit_discards": 100,
}
RDMA_CORE = "rdma-core, infiniband-diags/etc/error_thresholds"
# So many losses of a link within 24 hours exclude. Azure's node checks count them by day (azurehpc-health-checks).
FLAPS = 5
AZURE = "azurehpc-health-checks: 5 link flaps in 24 h"
CABLE = "reseat or replace the cable or transceiver, and look at the switch port"
GDR = (
    "without nvidia_peermem or dma-buf every message goes through host memory, at a third of the bandwidth [derived]"
)
# Lines of the mlx5 driver in the kernel log.
MODULES = (
    (
        re.compile(r"mlx5_core (\S+):.*insufficient power on the PCIe slot \((\d+)W\)"),
        "the adapter {0} says that its slot gives {1} W, too little",
        "look at the slot's power setting in the firmware, or use another slot",
    ),
    (
        re.compile(r"Port module event\[error\]: module (\d+), Cable error, (.+?)\s*$"),
        "transceiver or cable in module {0}: {1}",
        CABLE,
    ),
)
EFA = ("fi_info", "/opt/amazon/efa/bin/fi_info")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    ports = [
        _port(device, port, probe) for device in probe.list(SYSFS) for port in probe.list(f"{SYSFS}/{device}/ports")
    ]
    value: dict[str, Any] = {
        "ports": ports,
        "links": _links(probe),
        "uptime": kernel.uptime(probe),
        "modules": _modules(probe) if ports else [],
    }
    if setting.gpus and any(one["driver"].startswith("mlx5") for one in ports):
        loaded = {line.split()[0] for line in (probe.read("/proc/modules") or "").splitlines() if line.strip()}
        version = probe.read("/proc/driver/nvidia/version") or ""
        value["direct"] = bool(loaded & {"nvidia_peermem", "nv_peer_mem"}) or "Open Kernel Module" in version
        value["direct_known"] = bool(loaded) and bool(version)
    if any(one["driver"] == "efa" for one in ports) or setting.fabric.startswith("efa"):
        value["efa"] = _efa(probe)
    return value


def _port(device: str, port: str, probe: Probe) -> dict[str, Any]:
    at = f"{SYSFS}/{device}/ports/{port}"
    driver = re.search(r"^DRIVER=(\S+)", probe.read(f"{SYSFS}/{device}/device/uevent") or "", re.M)
    layer = probe.read(f"{at}/link_layer") or ""
    rate = re.match(r"([\d.]+) Gb/sec", probe.read(f"{at}/rate") or "")
    counters = {name: probe.read(f"{at}/counters/{name}") for name in (*COUNTERS, "link_downed")}
    return {
        "port": f"{device}:{port}",
        "driver": driver[1] if driver else "",
        "layer": layer,
        "state": _word(probe.read(f"{at}/state")),  # "4: ACTIVE"
        "physical": _word(probe.read(f"{at}/phys_state")),  # "5: LinkUp"
        "rate": float(rate[1]) if rate else None,  # Gbit/s
        "counters": {name: int(text) for name, text in counters.items() if text and text.isdigit()},
        "gids": _gids(at, probe) if layer == "Ethernet" else None,
        "firmware": probe.read(f"{SYSFS}/{device}/fw_ver") or "",
    }


def _word(text: str | None) -> str:
    return (text or "").partition(":")[2].strip()


def _gids(at: str, probe: Probe) -> int:
    """How many RoCE v2 addresses the port has."""
    kinds = {name: probe.read(f"{at}/gid_attrs/types/{name}") for name in probe.list(f"{at}/gid_attrs/types")}
    return sum("v2" in (kind or "") for kind in kinds.values())


def _links(probe: Probe) -> dict[str, int]:
    """Mbit/s of Ethernet adapters that are hardware and up; virtual ones tell no speed."""
    found = {}
    for name in probe.list("/sys/class/net"):
        at = f"/sys/class/net/{name}"
        if not probe.list(f"{at}/device") or probe.read(f"{at}/operstate") != "up" or probe.read(f"{at}/type") != "1":
            continue
        speed = probe.read(f"{at}/speed") or ""
        if speed.isdigit() and int(speed) > 0:
            found[name] = int(speed)
    return found


def _modules(probe: Probe) -> list[str]:
    log = kernel.log(probe, "mlx5")
    return [line[1] for line in log.get("lines", []) if any(pattern.search(line[1]) for pattern, _, _ in MODULES)]


def _efa(probe: Probe) -> dict[str, Any]:
    """The EFA devices that libfabric sees. Each shows up to two providers, so domains are counted, by device."""
    for tool in EFA:
        answer = probe.run([tool, "-p", "efa", "-t", "FI_EP_RDM"])
        if answer.code == 0:
            domains = set(re.findall(r"^\s*domain: (\S+?)(?:-rdm|-dgrm)?\s*$", answer.out, re.M))
            return {"domains": len(domains)}
        if answer.code is not None:
            return {"domains": 0, "says": (answer.err.strip() or f"exit code {answer.code}").splitlines()[0]}
    return {"unknown": "fi_info is not here"}


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    nodes = seen(found)
    return [
        *unknowns("ports", found),
        *_down(nodes),
        *_count(nodes, setting),
        *_rates(nodes, setting),
        *(finding for node, value in nodes.items() for finding in _history(node, value)),
        *_software(nodes),
        *_ethernet(nodes),
    ]


def _active(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in value["ports"] if one["state"] == "ACTIVE"]


def _down(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """A port that is up on most nodes that have it, or on the other of two."""
    states: dict[str, dict[str, str]] = {}
    for node, value in nodes.items():
        for one in value["ports"]:
            states.setdefault(one["port"], {})[node] = one["state"]
    for node, value in nodes.items():
        for one in value["ports"]:
            if one["state"] == "ACTIVE":
                continue
            there = states[one["port"]]
            up = [other for other, state in there.items() if state == "ACTIVE"]
            if up and len(up) * 2 >= len(there):
                no_manager = one["state"] == "INIT"
                yield Finding(
                    "ports", "exclude", f"{one['port']} is {one['state'] or 'not known'} ({one['physical'] or '?'})",
                    node=node, measured=one["state"], expected=f"ACTIVE, as on {up[0]}",
                    source="the same port of the other nodes",
                    fix="look at the subnet manager, which has not set the port up" if no_manager else CABLE,
                )  # fmt: skip


def _count(nodes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Iterator[Finding]:
    counts = {node: len(_active(value)) for node, value in nodes.items()}
    votes = vote(counts)
    usual = max(counts.values(), default=0) if votes.tied else votes.common or 0
    expected = max(setting.ports, usual)
    said = {one.node for one in _down(nodes)}
    for node, count in counts.items():
        if count < expected and node not in said:
            source = "the table of fabrics" if setting.ports >= usual else "what most nodes have"
            yield Finding(
                "ports", "exclude", f"{count} of {expected} RDMA ports are active", node=node, measured=str(count),
                expected=str(expected), source=source,
                fix="look for adapters that are missing (lspci, ibstat); in a container, hand in /dev/infiniband",
            )  # fmt: skip


def _rates(nodes: Mapping[str, Mapping[str, Any]], setting: Setting) -> Iterator[Finding]:
    rates: dict[str, dict[str, float]] = {}
    for node, value in nodes.items():
        for one in _active(value):
            if one["rate"]:
                rates.setdefault(one["port"], {})[node] = one["rate"]
    short = False
    for port, there in sorted(rates.items()):
        votes = vote(there)
        usual = max(there.values()) if votes.tied else votes.common
        for node, rate in there.items():
            if rate < usual:
                short = True
                yield Finding(
                    "ports", "exclude", f"{port} runs at {rate:g} Gbit/s", node=node, measured=f"{rate:g} Gbit/s",
                    expected=f"{usual:g} Gbit/s, as on the other nodes", source="the same port of the other nodes",
                    fix=CABLE,
                )  # fmt: skip
    if short or not setting.link_gbits:
        return
    for node, value in nodes.items():
        total = sum(one["rate"] or 0 for one in _active(value))
        if 0 < total < setting.link_gbits and len(_active(value)) >= setting.ports:
            yield Finding(
                "ports", "warn", f"all RDMA ports together are {total:g} Gbit/s", node=node,
                measured=f"{total:g} Gbit/s", expected=f"{setting.link_gbits:g} Gbit/s",
                source="the table of fabrics",
                fix="name the fabric that the nodes have (resources.fabric), or look at the rate of the switch ports",
            )  # fmt: skip


def _history(node: str, value: Mapping[str, Any]) -> Iterator[Finding]:
    days = max(1.0, (value["uptime"] or 0) / 86400)
    for one in value["ports"]:
        if one["state"] != "ACTIVE":
            continue
        flaps = one["counters"].get("link_downed", 0)
        if flaps >= FLAPS:
            # By the pigeonhole, n losses over d days had a day with n/d of them.
            often = value["uptime"] is not None and flaps / days >= FLAPS
            level: Level = "exclude" if often else "warn"
            over = f"{days:.0f} days" if days > 1 else "the last day"
            yield Finding(
                "ports", level, f"{one['port']} lost its link {flaps} times in {over}", node=node,
                measured=str(flaps), expected=f"< {FLAPS} in a day", source=AZURE, fix=CABLE,
            )  # fmt: skip
        high = {name: one["counters"][name] for name, most in COUNTERS.items() if one["counters"].get(name, 0) > most}
        if high:
            text = ", ".join(f"{name} {count}" for name, count in high.items())
            yield Finding(
                "ports", "warn", f"{one['port']} counts errors: {text}", node=node, measured=text,
                expected=", ".join(f"{name} <= {COUNTERS[name]}" for name in high), source=RDMA_CORE,
                fix=f"perfquery -R resets the counters; when they grow again, {CABLE}",
            )  # fmt: skip
    told = set()
    for line in value["modules"]:
        for pattern, what, fix in MODULES:
            match = pattern.search(line)
            said = what.format(*match.groups()) if match else ""
            if said and said not in told:
                told.add(said)
                yield Finding(
                    "ports", "warn", said, node=node, measured=line[:120], source="the adapter's driver", fix=fix
                )


def _software(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    with_gids = [node for node, value in nodes.items() if any(one["gids"] for one in value["ports"])]
    for node, value in nodes.items():
        bare = [one["port"] for one in _active(value) if one["gids"] == 0]
        if bare:
            yield Finding(
                "ports", "exclude" if with_gids and node not in with_gids else "warn",
                f"{', '.join(bare)}: no RoCE v2 address (GID)", node=node, measured="0 GIDs of RoCE v2",
                expected=">= 1", source="NCCL reaches a RoCE port by its RoCE v2 GID (NCCL_IB_ROCE_VERSION_NUM is 2)",
                fix="give the port's network interface an IP address",
            )  # fmt: skip
        if value.get("direct") is False:
            if value["direct_known"]:
                yield Finding(
                    "ports", "warn", "no GPUDirect RDMA: neither nvidia_peermem nor the open kernel module",
                    node=node, measured="neither is loaded", expected="one of them", source=GDR,
                    fix="modprobe nvidia_peermem",
                )  # fmt: skip
            else:
                yield Finding("ports", "unknown", "whether nvidia_peermem is loaded cannot be seen here", node=node)
        if "efa" in value:
            devices = sum(one["driver"] == "efa" for one in value["ports"])
            seen_by = value["efa"].get("domains")
            if seen_by is None:
                yield Finding("ports", "unknown", f"EFA as libfabric sees it: {value['efa']['unknown']}", node=node)
            elif seen_by < max(devices, 1):
                yield Finding(
                    "ports", "exclude", f"libfabric sees {seen_by} of {max(devices, 1)} EFA devices", node=node,
                    measured=value["efa"].get("says", str(seen_by)), expected=str(max(devices, 1)),
                    source="fi_info -p efa -t FI_EP_RDM; without EFA NCCL goes over TCP without a word",
                    fix="install the EFA packages in the image, and hand /dev/infiniband in",
                )  # fmt: skip
    firmware = {node: sorted({one["firmware"] for one in value["ports"]} - {""}) for node, value in nodes.items()}
    yield from parity.differing(
        "ports", "the adapters' firmware", {node: ", ".join(has) for node, has in firmware.items() if has},
        level="warn", why="errors and rates come with the firmware", fix="one firmware on all nodes (mlxfwmanager)",
    )  # fmt: skip


def _ethernet(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    speeds: dict[str, dict[str, int]] = {}
    for node, value in nodes.items():
        for name, speed in value["links"].items():
            speeds.setdefault(name, {})[node] = speed
    for name, there in sorted(speeds.items()):
        votes = vote(there)
        usual = max(there.values()) if votes.tied else votes.common
        for node, speed in there.items():
            if speed < usual:
                yield Finding(
                    "ports", "warn", f"{name} runs at {speed / 1000:g} Gbit/s", node=node,
                    measured=f"{speed / 1000:g} Gbit/s", expected=f"{usual / 1000:g} Gbit/s, as on the other nodes",
                    source="the same interface of the other nodes", fix=CABLE,
                )  # fmt: skip


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    if "ports" not in value:
        return {}
    active = _active(value)
    kinds = [f"{one['layer']} {one['rate']:g} Gbit/s" if one["rate"] else one["layer"] for one in active]
    found = {"RDMA ports": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"}
    firmware = sorted({one["firmware"] for one in value["ports"] if one["firmware"]})
    return {**found, "NIC firmware": ", ".join(firmware)} if firmware else found
