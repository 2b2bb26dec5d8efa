"""Names, addresses and interfaces: what gloo and NCCL choose from on this node."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import FABRIC, Finding, Setting
from launcher.preflight.parity import differing, listing, together

STAGE = "inventory"

SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFMTU = 0x8913, 0x8915, 0x8921
UP = 1
# Bridges for containers and virtual machines: the other nodes are not behind them.
BRIDGES = ("docker", "virbr", "br-", "cni", "lxc", "podman", "veth", "flannel", "cali")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    name = socket.gethostname()
    try:
        resolved = sorted({str(one[4][0]) for one in socket.getaddrinfo(name, None)})
        why = ""
    except OSError as problem:
        resolved, why = [], problem.strerror or str(problem)
    used = os.environ.get("DSLAUNCH_ADDRESS", "")
    return {
        "name": name,
        "machine": probe.read("/proc/sys/kernel/random/boot_id") or "",
        "resolved": resolved,
        "why": why,
        "interfaces": interfaces(probe),
        "used": used,
        "wanted": {key: os.environ.get(key, "") for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
    }


def interfaces(probe: Probe) -> dict[str, dict[str, Any]]:
    """Those that are up: addresses and MTU. ioctl and /proc/net answer for this network namespace; /sys may not."""
    out: dict[str, dict[str, Any]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:

        def ask(request: int, name: str) -> bytes:
            return fcntl.ioctl(wire, request, struct.pack("40s", name.encode()))

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                if not struct.unpack_from("H", ask(SIOCGIFFLAGS, name), 16)[0] & UP:
                    continue
                out[name] = {"mtu": struct.unpack_from("i", ask(SIOCGIFMTU, name), 16)[0], "addresses": []}
            with contextlib.suppress(OSError):  # without an IPv4 address
                out[name]["addresses"].append(socket.inet_ntoa(ask(SIOCGIFADDR, name)[20:24]))
    for line in (probe.read("/proc/net/if_inet6") or "").splitlines():
        word, _, _, _, _, name = line.split()
        if name in out:
            out[name]["addresses"].append(str(ipaddress.ip_address(bytes.fromhex(word))))
    return out


def loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def routed(value: Mapping[str, Any]) -> str:
    """The interface that has the address by which this node reached the coordinator."""
    return next((name for name, one in value["interfaces"].items() if value["used"] in one["addresses"]), "")


def matches(pattern: str, name: str) -> bool:
    """NCCL_SOCKET_IFNAME: eth takes eth0 and eth1, =eth0 that one, ^docker all others, ^=lo,docker0 all but these."""
    negative = pattern.startswith("^")
    words = pattern.removeprefix("^")
    exact = words.startswith("=")
    hit = any(name == word if exact else name.startswith(word) for word in words.removeprefix("=").split(",") if word)
    return hit != negative


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    out = {"host name": value["name"], "resolves to": ", ".join(value["resolved"]) or value["why"]}
    if name := routed(value):
        out["interface"] = name
        out["address"] = value["used"]
        out["MTU"] = str(value["interfaces"][name]["mtu"])
    return out


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    out = []
    several = _several(answered)
    for node, value in sorted(answered.items()):
        if len(answered) > 1:
            out += _of_one(node, value, several=several)
        out += _wanted(node, value, setting)
    return [*unknowns("addresses", found), *together(out, answered, code=FABRIC), *_twice(answered), *_mtu(answered)]


def _several(answered: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether more than one machine takes part; containers of one machine have names, and a network each."""
    machines = {value["machine"] for value in answered.values() if value["machine"]}
    names = {value["name"] for value in answered.values()}
    return len(machines) > 1 or len(names) > 1


def _of_one(node: str, value: Mapping[str, Any], *, several: bool) -> list[Finding]:
    out = []
    if several and loopback(value["used"]):
        out.append(
            Finding(
                "addresses",
                "warn",
                f"it goes by {value['used']}, where the other machines find themselves",
                node=node,
                measured=value["used"],
                expected="an address that the other nodes reach",
                source="gloo and NCCL listen on the interface of that address",
                fix="start its agent with the address that the other nodes have for it",
            )
        )
    real = [address for address in value["resolved"] if not loopback(address)]
    if not real:
        # with an interface named for it, gloo does not look up the host name
        named = value["wanted"]["GLOO_SOCKET_IFNAME"] or (not several and routed(value) and loopback(value["used"]))
        what = f"its own name {value['name']} resolves to {', '.join(value['resolved'])}"
        if not value["resolved"]:
            what = f"its own name {value['name']} does not resolve ({value['why']})"
        out.append(
            Finding(
                "addresses",
                "note" if named else "warn",
                what,
                node=node,
                measured=", ".join(value["resolved"]) or value["why"],
                expected="an address that the other nodes reach",
                source="gloo listens on the address of the host name, and the others connect to themselves",
                fix=f"the node's real address for {value['name']} in /etc/hosts or DNS, or GLOO_SOCKET_IFNAME",
            )
        )
    names = [name for name, one in value["interfaces"].items() if any(not loopback(a) for a in one["addresses"])]
    if names and all(name.startswith(BRIDGES) for name in names):
        out.append(
            Finding(
                "addresses",
                "exclude",
                f"the only network is {listing(names)}, which ends on this node",
                node=node,
                measured=listing(names),
                expected="an interface that leads to the other nodes",
                fix="host networking for the container, or bring the real interface up",
            )
        )
    return out


def _wanted(node: str, value: Mapping[str, Any], setting: Setting) -> list[Finding]:
    """An interface named in the environment is there: NCCL ends with "no socket interface found" else."""
    out = []
    names = [name for name, one in value["interfaces"].items() if one["addresses"]]
    for key, pattern in value["wanted"].items():
        if not pattern or (key.startswith("NCCL") and setting.backend != "nccl"):
            continue
        exactly = key.startswith("GLOO")
        if exactly:
            missing = [word for word in pattern.split(",") if word not in names]
        else:
            missing = [] if any(matches(pattern, name) for name in names) else [pattern]
        if missing:
            out.append(
                Finding(
                    "addresses",
                    "exclude",
                    f"{key} is {pattern}, and this node has no such interface with an address",
                    node=node,
                    measured=", ".join(names),
                    expected=pattern,
                    source="gloo and NCCL end where the interface is not there",
                    fix=f"a name or prefix that all nodes have, in {key}",
                )
            )
    return out


def _twice(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Two machines of one name or address. Several nodes of one machine, as in a test, share both on purpose."""
    out = []
    machines: dict[str, list[str]] = {}
    for node, value in sorted(answered.items()):
        machines.setdefault(value["machine"], []).append(node)
    for machine, nodes in sorted(machines.items()):
        if machine and len(nodes) > 1:
            what = f"{listing(nodes)} are one machine, and share its cores, GPUs and network"
            out.append(Finding("addresses", "note", what, measured=machine, expected="a machine for each node"))
    for key, what, level in (("name", "the host name", "warn"), ("used", "the address", "block")):
        owners: dict[str, dict[str, str]] = {}
        for node, value in sorted(answered.items()):
            if value[key] and not loopback(value[key]):
                owners.setdefault(value[key], {})[value["machine"] or node] = node
        for word, by in sorted(owners.items()):
            if len(by) > 1:
                out.append(
                    Finding(
                        "addresses",
                        "block" if level == "block" else "warn",
                        f"{listing(by.values())} are different machines with {what} {word}",
                        measured=word,
                        expected="one of its own for each node",
                        fix="give each node its own"
                        if key == "name"
                        else "host networking, or a network across nodes",
                        code=FABRIC if level == "block" else 0,
                    )
                )
    return out


def _mtu(answered: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    sizes = {
        node: str(value["interfaces"][name]["mtu"])
        for node, value in answered.items()
        if (name := routed(value)) and not loopback(value["used"])
    }
    why = "large packets are lost or cut between nodes of different MTU: a hang on the first large message"
    return differing(
        "addresses", "the MTU", sizes, level="warn", why=why, fix="the same MTU on every node and switch port"
    )
