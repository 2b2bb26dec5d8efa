"""Nodes that are network namespaces on a bridge, with links as slow as a test wants them. Needs root.

    with Namespaces(4, rate_mbit=40) as net:
        net.shape(2, tx=20)            # node 2 sends at half the rate
        net.shape_link(0, 1, 10)       # and 0 to 1, that direction alone, at a quarter
        subprocess.run(net.inside(0, ["ping", "-c1", net.address(1)]))

Names begin with the process that made them: what a process left that is dead by now, the next one removes. The
bridge has no address of its own, so nothing here is seen by, or collides with, the machine's own network.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PREFIX = "dsn"
OWNER = re.compile(rf"{PREFIX}(\d+)[a-z]\d*")
INSTALL = "apt-get install -y iproute2"
QUEUE = 0.05  # seconds of traffic that wait before a shaped NIC
ACKNOWLEDGEMENT = ["u16", "0", "0xffc0", "at", "2"]  # IP packets below 64 bytes
_made = 0


def why_not() -> str | None:
    """`None`, or why there can be no namespaces here and what would change that."""
    if os.geteuid() != 0:
        return "network namespaces with shaped links need root: run the tests with sudo"
    if missing := [name for name in ("ip", "tc") if not shutil.which(name)]:
        return f"{', '.join(missing)} not found: {INSTALL}"
    try:
        with Namespaces(2, rate_mbit=100) as net:
            net.shape_link(0, 1, 10)
    except RuntimeError as error:
        return f"no namespaces, bridges or traffic shaping here ({error}): in a container, docker run --privileged"
    return None


class Namespaces:
    def __init__(self, nodes: int, *, rate_mbit: float = 0.0):
        """`rate_mbit` of every NIC in both directions; 0: as fast as the machine."""
        global _made
        self.nodes = nodes
        self.rate = rate_mbit
        self.tag = f"{PREFIX}{os.getpid()}{chr(ord('a') + _made % 26)}"
        self.links: dict[int, dict[int, float]] = {}
        self.tx = dict.fromkeys(range(nodes), rate_mbit)
        _made += 1

    def __enter__(self) -> Namespaces:
        sweep()
        try:
            _run(["ip", "link", "add", self.tag, "type", "bridge"])
            _run(["ip", "link", "set", self.tag, "up"])
            for node in range(self.nodes):
                name = self.name(node)
                _run(["ip", "netns", "add", name])
                _run(["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name])
                _run(["ip", "link", "set", name, "master", self.tag, "up"])
                # Packets of 64 KiB would make an acknowledgement wait 13 ms behind one at 40 Mbit/s.
                _run(["ip", "-n", name, "link", "set", "eth0", "gso_max_segs", "1"])
                _run(["ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0"])
                _run(["ip", "-n", name, "link", "set", "lo", "up"])
                _run(["ip", "-n", name, "link", "set", "eth0", "up"])
                if self.rate:
                    self.shape(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self.tag)

    def name(self, node: int) -> str:
        """Of the namespace, and of its cable's end at the bridge."""
        return f"{self.tag}{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def inside(self, node: int, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on a node; its only NICs are lo and eth0."""
        return ["ip", "netns", "exec", self.name(node), *argv]

    def shape(self, node: int, *, tx: float | None = None, rx: float | None = None) -> None:
        """Mbit/s that a node sends and receives; what is left out is as at the start."""
        self.tx[node] = self.rate if tx is None else tx
        self._send(node)
        _shape(["tc"], self.name(node), self.rate if rx is None else rx, {})

    def shape_link(self, a: int, b: int, rate: float | None) -> None:
        """Mbit/s from `a` to `b`, and not the other way; None: as fast as `a` sends."""
        links = self.links.setdefault(a, {})
        links.pop(b, None)
        if rate is not None:
            links[b] = rate
        self._send(a)

    def _send(self, node: int) -> None:
        slow = {self.address(to): rate for to, rate in self.links.get(node, {}).items()}
        _shape(["tc", "-n", self.name(node)], "eth0", self.tx[node] or (1e5 if slow else 0), slow)


def sweep() -> None:
    """Removes what processes left that are dead by now."""
    names = _run(["ip", "netns", "list"]) + _run(["ip", "-o", "link", "show", "type", "bridge"])
    owners = {match[0].rstrip("0123456789"): int(match[1]) for match in OWNER.finditer(names)}
    for tag, pid in owners.items():
        if not Path(f"/proc/{pid}").exists():
            _remove(tag)


def _remove(tag: str) -> None:
    """Ends every process in the namespaces of `tag`, and everything that is named so."""
    for line in _run(["ip", "netns", "list"]).splitlines():
        name = line.split()[0] if line.strip() else ""
        if re.fullmatch(rf"{tag}\d+", name):
            for pid in _run(["ip", "netns", "pids", name]).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
            _run(["ip", "netns", "del", name])
    subprocess.run(["ip", "link", "del", tag], capture_output=True, check=False)


def _shape(tc: Sequence[str], nic: str, rate: float, slow: Mapping[str, float]) -> None:
    """Mbit/s of everything that leaves a NIC, and of what goes to the addresses in `slow`; 0: no limit.

    Acknowledgements go first: a real NIC's queue is too short for one direction to slow down the other.
    """
    port = ["dev", nic]
    subprocess.run([*tc, "qdisc", "del", *port, "root"], capture_output=True, check=False)
    if not rate:
        return
    _run([*tc, "qdisc", "add", *port, "root", "handle", "1:", "htb", "default", "10"])
    _run([*tc, "class", "add", *port, "parent", "1:", "classid", "1:1", *_htb(rate)])
    classes = [(5, rate, 0, ACKNOWLEDGEMENT), (10, rate, 1, [])]
    slower = enumerate(slow.items(), start=100)
    classes += [(number, min(limit, rate), 1, ["ip", "dst", f"{to}/32"]) for number, (to, limit) in slower]
    for number, limit, urgency, match in classes:
        _run(
            [
                *tc,
                "class",
                "add",
                *port,
                "parent",
                "1:1",
                "classid",
                f"1:{number}",
                *_htb(limit),
                "prio",
                str(urgency),
            ]
        )
        queue = str(_burst(limit) + int(limit * 1e6 / 8 * QUEUE))
        _run([*tc, "qdisc", "add", *port, "parent", f"1:{number}", "bfifo", "limit", queue])
        if match:
            way = ["protocol", "ip", "prio", "1", "u32", "match", *match, "flowid", f"1:{number}"]
            _run([*tc, "filter", "add", *port, "parent", "1:", *way])


def _burst(mbit: float) -> int:
    """Bytes that a NIC sends at once after a pause: 5 ms, and some packets at least."""
    return max(8 << 10, int(mbit * 1e6 / 8 * 0.005))


def _htb(mbit: float) -> list[str]:
    rate, burst = f"{int(mbit * 1e6)}bit", str(_burst(mbit))
    return ["htb", "rate", rate, "ceil", rate, "burst", burst, "cburst", burst, "quantum", "60000"]


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
