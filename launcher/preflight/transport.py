"""NCCL's own lines (NCCL_DEBUG=INFO) -> what data really went over, and who is to blame when that is not the fabric.

A job whose network plugin, devices or library are missing runs all the same, over TCP and ten times slower: only
these lines tell. Wording differs between releases, from 2.4 to 2.30; what is not recognised is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.preflight import Finding, Level, Setting

# What NCCL calls the network that a fabric's RDMA goes through. Fabrics that are not here promise none.
VERBS = ("IB", "IBext")  # inside NCCL, or of the plugin in HPC-X, which adds _v8
RDMA = {
    "infiniband": VERBS,
    "infiniband-rail": VERBS,
    "roce": VERBS,
    "oci": VERBS,
    "azure-nd": VERBS,
    "azure-gb200": VERBS,
    "coreweave": VERBS,
    "sharp": VERBS,
    "nvl72": VERBS,
    "efa": ("Libfabric", "AWS Libfabric"),
    "slingshot": ("Libfabric", "AWS Libfabric"),
    "gcp-gib": ("gIB",),
    "gcp-tcpx": ("GPUDirectTCPX",),
    "gcp-tcpxo": ("FasTrak",),
}
PROVIDER = {"efa": "efa", "slingshot": "cxi"}
STAGED = ("gcp-tcpx", "gcp-tcpxo", "slingshot")  # whose plugins do not say GDRDMA of a channel
PLUGIN = {
    "efa": "aws-ofi-nccl",
    "slingshot": "aws-ofi-nccl",
    "gcp-gib": "gIB",
    "gcp-tcpx": "GPUDirect-TCPX",
    "gcp-tcpxo": "GPUDirect-TCPXO",
}
TCP = ("Socket", "FastSocket")
VIRTUAL = re.compile(r"lo|docker\d*|virbr\d*|veth\w*|br-\w+|cni\d*|flannel[.\w]*|cali\w+")

# Kind of trouble -> the line that shows it, whoever wrote it.
TROUBLE = {
    "no interface": r"no socket interface found",
    "no verbs": r"Failed to open libibverbs\.so",
    "no device": r"NET/IB ?: No device found"
    r"|NET/OFI.*(?:fi_getinfo\(\).*(?:No data available|failed)|No eligible providers)",
    "no plugin": r"NET/Plugin ?: ?(?:Could not find:|No plugin found|Plugin load .*libnccl-net\S*: cannot open"
    r"|.*dlerror=libnccl-net)",
    "plugin failed": r"Failed to initialize (?:NET|network) plugin (?!IB\b|Socket\b)"
    r"|External network plugin .* is unsupported"
    r"|NET/Plugin ?: ?(?:\S*libnccl-net\S*: \S|Failed to find ncclNetPlugin symbol)",
    "locked memory": r"Call to (?:ibv_reg_mr\w*|ibv_create_cq|ibv_create_qp|ibv_reg_dmabuf_mr) failed"
    r"(?: with error)?.*Cannot allocate memory",
    "address": r"Call to ibv_modify_qp failed with (?:error )?(?:22|101|110|113|Invalid argument"
    r"|Network is unreachable|Connection timed out|No route to host)|Call to ibv_query_gid\w* failed",
    "completion": r"Got completion .*(?:error|status)[ =](?:IBV_WC_RETRY_EXC_ERR\()?12\b|status=IBV_WC_RETRY_EXC_ERR",
    "port": r"Got async (?:error )?event ?: port error",
}


@dataclass(frozen=True)
class Transport:
    """What one or more NCCL logs of one node say."""

    version: str = ""
    network: str = ""  # that NCCL chose: "IB", "Socket", "AWS Libfabric", "gIB"
    between: Mapping[str, int] = field(default_factory=dict)  # channels to other nodes: {"IB": 32}
    direct: int = 0  # of those, with GPUDirect RDMA
    within: Mapping[str, int] = field(default_factory=dict)  # channels inside the node: {"P2P": 96, "SHM": 0}
    nvls: bool = False
    devices: tuple[str, ...] = ()  # "mlx5_0:1/IB", or "eth0" of sockets
    gids: tuple[int, ...] = ()  # GID indices in use
    plugin: str = ""  # that was loaded
    provider: str = ""  # of libfabric
    no_gdr: tuple[str, ...] = ()  # devices that NCCL says GPUDirect RDMA is off for
    variables: Mapping[str, str] = field(default_factory=dict)  # that NCCL says it read
    trouble: Mapping[str, str] = field(default_factory=dict)  # kind -> the first line that shows it

    @property
    def rdma(self) -> bool | None:
        """Whether data goes around the kernel; None where the log does not say."""
        used = set(self.between) or ({self.network} if self.network else set())
        return None if not used else not used & set(TCP)


def read(text: str) -> Transport:
    """NCCL's INFO lines of one node's ranks, joined in any order, with any prefix."""
    between: dict[str, int] = {}
    within: dict[str, int] = {}
    trouble: dict[str, str] = {}
    direct = 0
    for line in text.splitlines():
        if (channel := re.search(r" via NET/([^/\n]+)/\d+[^/\s]*((?:/\w+)*)", line)) and "[receive]" not in line:
            between[channel[1]] = between.get(channel[1], 0) + 1
            direct += "GDRDMA" in channel[2]
        elif inside := re.search(r" via (P2P|SHM)\b", line):
            within[inside[1]] = within.get(inside[1], 0) + 1
        for kind, pattern in TROUBLE.items():
            if kind not in trouble and re.search(pattern, line):
                trouble[kind] = message(line)
    lines = re.findall(r"NET/(?:IB|Socket|FastSocket|gIB) ?: Using (\[0\].*?)(?:;|$)", text, re.MULTILINE)
    devices = {name for line in lines for name in re.findall(r"\[\d+\]([\w.+-]+(?::\d+/\w+)?)", line)}
    variables = dict(re.findall(r"\b(NCCL_[A-Z0-9_]+) set (?:by environment )?to (.*?)\.?$", text, re.MULTILINE))
    network = _last(r"Using network (.+?)\s*$", text)
    if network not in TCP:  # sockets are looked for too, where they are not used
        devices = {name for name in devices if ":" in name} or devices
    return Transport(
        version=_last(r"NCCL version (\d[\w.+]*)", text),
        network=network,
        between=between,
        direct=direct,
        within=within,
        nvls=bool(re.search(r"Connected NVLS tree|NVLS comm 0x|\b[1-9]\d* nvls channels", text)),
        devices=tuple(sorted(devices)),
        gids=tuple(sorted({int(gid) for gid in re.findall(r"NET/IB ?: NCCL Dev .*\bGID (\d+) \(", text)})),
        plugin=_last(r"NET/Plugin ?: ?Loaded net plugin (.+?)\s*$", text)
        or _last(r"Successfully loaded external network plugin (\S+)", text),
        provider=_last(r"NET/OFI Selected [Pp]rovider is ([\w;-]+)", text).split(";")[0],
        no_gdr=tuple(sorted(set(re.findall(r"GPU Direct RDMA Disabled for HCA \d+ '([^']+)'", text)))),
        variables=variables,
        trouble=trouble,
    )


def message(line: str) -> str:
    """Without host, process, rank and source file: "NET/IB : No device found."."""
    return re.split(r"NCCL (?:INFO|WARN) ", line, maxsplit=1)[-1].strip()[:200]


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    return str(found[-1]) if found else ""


def blame(transport: Transport, setting: Setting, *, node: str = "") -> list[Finding]:
    """Why this node's data does not go over the fabric's RDMA, or not from the GPU's memory."""
    promised = RDMA.get(setting.fabric, VERBS if setting.ports else ())
    out = []

    def find(level: Level, what: str, fix: str, *, measured: str = "", expected: str = "") -> None:
        source = "NCCL's own log"
        out.append(
            Finding("transport", level, what, node, measured=measured, expected=expected, source=source, fix=fix)
        )

    seen = transport.trouble
    if line := seen.get("no interface"):
        name = transport.variables.get("NCCL_SOCKET_IFNAME", "")
        text = (
            f"NCCL finds no interface for NCCL_SOCKET_IFNAME={name}" if name else f"NCCL finds no interface: {line}"
        )
        find("exclude", text, "name one that every node has: ip -br addr")
        return out
    if transport.rdma is None:
        find("unknown", "NCCL's log names no network", "is NCCL_DEBUG_FILE written? its directory has to exist")
        return out
    if line := seen.get("locked memory"):
        find(
            "exclude", f"no memory may be locked: {line}", "ulimit -l unlimited for this job's step, see limits.conf"
        )
    if line := seen.get("address"):
        find("exclude", f"a connection of the NICs fails: {line}", _address(transport, setting))
    elif line := seen.get("completion"):
        find("warn", f"packets are lost until NCCL gives up: {line}", "look at the link, its cable and the GID")
    if line := seen.get("port"):
        find("exclude", f"a port went down: {line}", "look at the cable and the switch port: ibstat, mlxlink")
    if setting.nodes + setting.spares < 2:
        return out  # nothing leaves the node, and NCCL may choose what it likes
    if promised and not transport.rdma:
        what, fix = _fallback(transport, setting)
        names = ", ".join(sorted(transport.between)) or transport.network
        find("exclude", f"NCCL uses TCP: {what}", fix, measured=names, expected=promised[0])
        return out
    if not promised:
        if odd := [name for name in transport.devices if VIRTUAL.fullmatch(name)]:
            fix = "set NCCL_SOCKET_IFNAME to the interface that the nodes share"
            find("exclude", f"NCCL uses {', '.join(odd)}, which reaches no other node", fix)
        return out
    provider = PROVIDER.get(setting.fabric, "")
    if provider and transport.provider and transport.provider != provider:
        fix = "leave FI_PROVIDER unset, and install the fabric's own libfabric"
        find("exclude", f"libfabric uses {transport.provider}", fix, measured=transport.provider, expected=provider)
    if transport.between and not transport.direct and setting.fabric not in STAGED:
        off = f", off for {', '.join(transport.no_gdr)}" if transport.no_gdr else ""
        what = (
            f"data goes through host memory: no channel of {sum(transport.between.values())} has GPUDirect RDMA{off}"
        )
        find("warn", what, "load nvidia-peermem, or a driver and kernel with dma-buf; see NCCL_NET_GDR_LEVEL")
    real = [name for name in transport.devices if ":" in name]
    count = sum(name.count("+") + 1 for name in real)
    if setting.ports and promised == VERBS and 0 < count < setting.ports:
        hcas = transport.variables.get("NCCL_IB_HCA", "")
        fix = f"NCCL_IB_HCA={hcas} leaves the others out" if hcas else "the others are down or hidden: ibstat"
        find("exclude", f"NCCL uses {count} of {setting.ports} ports", fix, measured=", ".join(real))
    return out


def _fallback(transport: Transport, setting: Setting) -> tuple[str, str]:
    """Who is to blame for TCP, and what to do: the most certain reason first."""
    seen, read = transport.trouble, transport.variables
    verbs = RDMA.get(setting.fabric, VERBS) == VERBS
    plugin = PLUGIN.get(setting.fabric, "")
    if read.get("NCCL_IB_DISABLE", "0") not in ("", "0") and verbs:
        return f"NCCL_IB_DISABLE={read['NCCL_IB_DISABLE']} turns RDMA off", "unset NCCL_IB_DISABLE"
    if read.get("NCCL_NET") in TCP:
        return f"NCCL_NET={read['NCCL_NET']} asks for it", "unset NCCL_NET"
    if plugin and read.get("NCCL_NET_PLUGIN", "").lower() == "none":
        return f"NCCL_NET_PLUGIN=none, and this fabric needs {plugin}", "unset NCCL_NET_PLUGIN"
    if plugin and (line := seen.get("plugin failed")):
        return f"{plugin} does not work: {line}", f"a build of {plugin} for NCCL {transport.version or 'in use'}"
    if plugin and "no plugin" in seen:
        return f"{plugin} is not found", f"put the directory of {plugin}'s libnccl-net.so into LD_LIBRARY_PATH"
    if "no verbs" in seen:
        return "libibverbs is not there", "install rdma-core in this image"
    if line := seen.get("no device"):
        if hcas := read.get("NCCL_IB_HCA", ""):
            return f"no active port is named by NCCL_IB_HCA={hcas}", "compare with ibdev2netdev or rdma link"
        return f"no device: {line}", "is the driver loaded, are ports active, is /dev/infiniband in the container?"
    return "its log does not say why", "run with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET,ENV and read the log"


def _address(transport: Transport, setting: Setting) -> str:
    if gid := transport.variables.get("NCCL_IB_GID_INDEX", ""):
        return f"NCCL_IB_GID_INDEX={gid} may be no GID of RoCE v2 on this node: unset it, NCCL finds it since 2.21"
    if setting.fabric == "infiniband-rail" and transport.variables.get("NCCL_CROSS_NIC") != "0":
        return "rails do not reach each other: NCCL_CROSS_NIC=0"
    return "compare the GIDs with show_gids, and ping between the NICs' own addresses"
