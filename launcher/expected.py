"""The bandwidth that nodes have to reach: a row of data/fabrics where somebody measured, else a share of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher import facts
from launcher.preflight import Limit
from launcher.spec import JobSpec

GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """None where nothing is known: then a node is judged against the best of its own run."""

    node: Limit | None = None  # all_reduce among the GPUs of one node
    pair: Limit | None = None  # sendrecv between two nodes over all rails, one direction
    whole: Limit | None = None  # over all nodes
    link_gbits: float = 0.0  # line rate of one node, all NICs together
    ports: int = 0  # active RDMA ports on a node


def limits(spec: JobSpec) -> Limits:
    """The limits of a job. Raises UserError for a GPU or fabric that no table has."""
    resources = spec.resources
    gpu = facts.gpu(resources.gpu) if resources.gpu and resources.gpus_per_node else None
    name = "gloo" if not resources.gpus_per_node else resources.fabric
    return known(
        gpu,
        facts.fabric(name) if name else None,
        nodes=resources.nodes,
        per_node=resources.gpus_per_node,
        network=resources.network,
        env=spec.env,
    )


def known(
    gpu: facts.Gpu | None,
    fabric: facts.Fabric | None,
    *,
    nodes: int,
    per_node: int,
    network: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Limits:
    """Eight H100 on 3200 Gbit/s of InfiniBand: node 460/400, pair 352/320, two nodes 440/370 GB/s."""
    nvls = (env or {}).get("NCCL_NVLS_ENABLE") != "0"
    link = _link(gpu, fabric, per_node)
    gbits = network or float(link.get("gbits", 0))
    wire = gbits / 8

    def row(what: str, source: facts.Fabric | None, count: int) -> Limit | None:
        for one in source.expected if source else ():
            if one.what == what and one.fits(gpu, per_node=per_node, nodes=count, wire=wire, nvls=nvls):
                op = one.op or ("sendrecv" if what == "pair" else "all_reduce")
                text = f"{one.source}; measured: {one.measured}; {one.size} GiB"
                return Limit(op, one.size * GIB, one.passes, one.excludes, text)
        return None

    def share(what: str) -> Limit | None:
        if not fabric or not wire:
            return None
        passes, excludes = fabric.share[what]
        op, size = ("sendrecv", GIB) if what == "pair" else ("all_reduce", 8 * GIB)
        if fabric.only == "cpu":
            size = GIB // 16
        text = f"derived: {passes:g} and {excludes:g} of the {wire:g} GB/s on the wire, which a ring cannot beat"
        return Limit(op, size, round(passes * wire, 3), round(excludes * wire, 3), text)

    several = nodes > 1 and fabric is not None and fabric.only != "node"
    return Limits(
        node=(row("node", fabric, 1) or row("node", facts.fabric("nvlink"), 1)) if gpu and per_node > 1 else None,
        pair=row("pair", fabric, 2) or share("pair") if several else None,
        whole=row("whole", fabric, nodes) or share("whole") if several else None,
        link_gbits=gbits if several else 0.0,
        ports=int(link.get("ports", 0)) if several else 0,
    )


def _link(gpu: facts.Gpu | None, fabric: facts.Fabric | None, per_node: int) -> Mapping[str, int]:
    """The NICs of a node, where who sells it fixes them: 16 x 200 Gbit/s beside eight H100 of OCI."""
    if gpu is None or fabric is None:
        return {}
    link = fabric.links.get(gpu.name, fabric.links.get(gpu.arch, {}))
    return link if link.get("per_node") == per_node else {}
