"""What a preflight is told, what it finds, and what follows from it: the types that its parts share.

This package and `launcher.checks` travel to the nodes, where dslaunch is not installed: the standard library
and, in worker.py and bandwidth.py alone, torch. Everything here is plain data that goes through JSON.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# python3 -c START FOLDER preflight.agent ...: these packages from FOLDER, or a zip file, and nothing from the working
# directory, where a user's own launcher.py may lie.
START = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module('launcher.' + sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)

# In this order. A stage that names bad nodes leaves them out of the later ones.
STAGES = ("inventory", "host", "node", "pairs", "whole", "deep")

OK = 0
OK_WITHOUT = 10  # after exclusions, and enough nodes are left
TOO_FEW = 20  # healthy nodes
DIFFERS = 21  # the environment differs across nodes
FABRIC = 22  # every node is slow, or too many for it to be the nodes: the fabric or its settings
COULD_NOT = 30  # no answer in time, no permission: never 0

# note    worth a line, changes nothing          warn     below what is expected, above what excludes
# unknown could not be seen: never a pass        exclude  this node is not to train
# block   nothing can start; `code` says why
Level = Literal["note", "unknown", "warn", "exclude", "block"]


@dataclass(frozen=True)
class Finding:
    """One sentence about one node, one directed link, or (both empty) the whole set."""

    check: str  # the module in launcher/checks, or "pairs", "whole"
    level: Level
    what: str  # "GPU 3: 2 uncorrected ECC errors since boot"
    node: str = ""
    peer: str = ""  # of a link: from `node` to `peer`
    measured: str = ""  # "0.19.6", "21.3 GB/s"
    expected: str = ""  # "0.19.8, as on node1, node2 and node4", ">= 44 GB/s"
    source: str = ""  # of the threshold
    fix: str = ""  # what a person does about it
    code: int = 0  # of a block, the exit code; of an exclusion 21 where the node is only different, not broken


@dataclass(frozen=True)
class Limit:
    """Bus bandwidth in GB/s (10^9 bytes) of one operation at one size: pass at `passes`, exclude under `excludes`."""

    op: str  # "all_reduce", "sendrecv"
    bytes: int
    passes: float
    excludes: float
    source: str


@dataclass(frozen=True)
class Xid:
    name: str
    action: str  # the catalogue's immediate resolution, "RESET_GPU"
    level: Level  # what we make of it


def xids(text: str) -> dict[str, Xid]:
    """data/xids.tsv by number, as a word: "79" -> GPU has fallen off the bus, exclude."""
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    columns, found = rows[0], {}
    for row in rows[1:]:
        one = dict(zip(columns, row, strict=False))
        level: Any = one["level"]
        found[one["number"]] = Xid(one.get("means") or one["name"], one["action"], level)
    return found


@dataclass(frozen=True)
class Rung:
    """What the planner decides where this much bandwidth is measured between nodes."""

    bandwidth: float  # GB/s of bus bandwidth, per node
    seconds: float  # of one optimizer step
    config: str  # the file with its DeepSpeed config, ds_config.json for the one of the plan


@dataclass(frozen=True)
class Setting:
    """What the job file and the tables say, as preflight.json carries it to every node."""

    name: str = "preflight"
    nodes: int = 1  # that have to be healthy
    spares: int = 0
    per_node: int = 1  # ranks on a node: GPUs, or processes on CPU
    gpus: int = 0  # expected on each node; 0 is a CPU job
    gpu: str = ""  # our name of the type, h100-80gb
    gpu_names: tuple[str, ...] = ()  # one of these words stands in nvidia-smi's product name: "H100"
    fabric: str = ""  # our name of the network; empty with gloo alone
    backend: Literal["nccl", "gloo"] = "gloo"
    stages: tuple[str, ...] = STAGES[:-1]
    deepspeed: str = ""  # the release that the plan was made for
    ops: tuple[str, ...] = ()  # of ds_report's table, that the job loads: "cpu_adam", "async_io"
    checkpoint_dir: str = ""
    checkpoint_bytes: int = 0
    files: tuple[str, ...] = ()  # absolute, or from the working directory: the same bytes on every node
    shm_bytes: int = 8 << 30  # /dev/shm that NCCL and data loaders need on a node
    link_gbits: float = 0.0  # line rate of one node, all NICs together; 0 unknown
    ports: int = 0  # active RDMA ports expected on a node; 0 unknown
    node: Limit | None = None  # all ranks of one node
    pair: Limit | None = None  # two nodes; None: relative to this run's own best
    whole: Limit | None = None  # all nodes
    matmul_tflops: float = 0.0  # that one GPU reaches in a large bf16 product; 0 unknown
    assumed: float = 0.0  # GB/s between nodes that the plan counts on; 0 unknown
    ladder: tuple[Rung, ...] = ()  # the plan for other bandwidths, the highest first
    host_copy: float = 0.0  # GB/s between a GPU of this type and the host, one direction; 0 unknown
    xids: Mapping[str, Xid] = field(default_factory=dict)  # by number
    history: Mapping[str, float] = field(default_factory=dict)  # node -> lemon score; tested more
    at_once: int = 0  # pairs measured at the same time; 0: all, or one where nodes share a machine
    seconds: float = 1.0  # of one timed bandwidth measurement
    join_timeout: float = 180.0  # for all nodes to report
    late: float = 45.0  # that a node may start later than most
    deadline: float = 5400.0  # for everything: what is not done then could not run
    silence: float = 25.0  # without an answer: the node hangs. A saturated link delays one by some
    stage_timeout: float = 120.0  # of one check on one node
    round_timeout: float = 60.0  # of one round of pairs
    left_out: tuple[str, ...] = ()  # Kubernetes nodes that the job file excludes already
    nccl_tests: str = ""  # directory of nccl-tests binaries to measure the whole set with, besides torch


@dataclass(frozen=True)
class Curve:
    """Bus bandwidth over message size, of one operation over all healthy nodes."""

    op: str
    bytes: tuple[int, ...]
    busbw: tuple[float, ...]  # GB/s: median over iterations, minimum over ranks
    p99: tuple[float, ...]  # GB/s of the slowest iteration in a hundred


@dataclass(frozen=True)
class Matrix:
    """Directed GB/s: cells[i][j] is from nodes[i] to nodes[j], None where not measured, 0 where it failed."""

    nodes: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    reference: float = 0.0  # what a healthy cell has
    source: str = ""  # "p90 of this run", or the table's
    warn: float = 0.0
    exclude: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What preflight.json's answer, verdict.json, holds."""

    code: int
    headline: str  # one sentence, "node3 is excluded: ...; 4 healthy nodes train"
    train: tuple[str, ...]  # the nodes to train on, in rank order; empty when nothing may start
    excluded: tuple[str, ...]
    findings: tuple[Finding, ...]
    nodes: tuple[str, ...]  # all that were asked for, healthy or not
    stages: Mapping[str, float] = field(default_factory=dict)  # seconds that each took
    rounds: int = 0
    matrix: Matrix | None = None
    curves: tuple[Curve, ...] = ()
    bandwidth: float = 0.0  # GB/s of bus bandwidth of the whole set: resources.bandwidth of the plan
    inventory: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # node -> "torch": "2.13.0"


def to_json(value: Any) -> Any:
    """Dataclasses as JSON values; the inverse of from_json."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """from_json(Setting, json.loads(text)). Fields that this version does not know are left out."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_json(hint, value[name]) for name, hint in hints.items() if name in value})
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        inner = parts[0] if len(parts) == 2 and parts[1] is Ellipsis else Any
        return tuple(from_json(inner, one) for one in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: from_json(parts[1], one) for key, one in value.items()}
    if value is not None and type(None) in parts:
        return from_json(next(part for part in parts if part is not type(None)), value)
    return value
