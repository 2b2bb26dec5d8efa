"""What it is trained on, what runs beside it, and what is done when that fails."""

from dataclasses import field
from typing import Annotated, Any, Literal

from launcher.record import record
from launcher.spec.software import Container
from launcher.spec.words import (
    Argument,
    Constraint,
    Count,
    FilePath,
    Image,
    Line,
    Memory,
    Name,
    Section,
    Text,
    Token,
    Variable,
    Version,
)
from launcher.yamldoc import Help, Matches, Range


@record
class Resources(Section):
    nodes: Annotated[int, Range(1, 100_000), Help("machines that train")] = 1
    gpus_per_node: Annotated[int, Range(0, 64), Help("0 trains on CPU, with gloo")] = 0
    processes_per_node: Annotated[
        Annotated[int, Range(1, 256)] | None, Help("ranks per node on CPU; with GPUs it is one per GPU")
    ] = None
    gpu: Annotated[Token | None, Help("GPU type as in `dslaunch presets --gpus`, such as h100-80gb")] = None
    cpus_per_node: Annotated[Count | None, Help("CPU cores asked for on each node")] = None
    memory: Annotated[Memory | None, Help("host memory asked for on each node, such as 500G")] = None
    fabric: Annotated[Token | None, Help("the network between nodes, as in `dslaunch presets --fabrics`")] = None
    network: Annotated[
        Annotated[float, Range(0.1, 100_000)] | None, Help("Gbit/s of one node, all its NICs together: 1600")
    ] = None
    bandwidth: Annotated[
        Annotated[float, Range(0.001, 100_000)] | None,
        Help("GB/s of bus bandwidth between nodes, per node, as a preflight measured it"),
    ] = None
    nvme: Annotated[Memory | None, Help("local NVMe of one node that offload may fill, such as 3500G")] = None
    storage: Annotated[
        Annotated[float, Range(0.001, 100_000)] | None, Help("GB/s at which all nodes together write a checkpoint")
    ] = None
    price: Annotated[Annotated[float, Range(0, 10_000)] | None, Help("of one GPU for an hour")] = None
    node_mttf: Annotated[
        Annotated[float, Range(0.01, 1e6)] | None, Help("mean days between failures of one node")
    ] = None
    spares: Annotated[int, Range(0, 1000), Help("extra nodes, for those that are unfit or go away")] = 0


@record
class Preflight(Section):
    """What is checked in the allocation before training starts."""

    run: Annotated[
        bool | Literal["auto"], Help("auto: with GPUs on several nodes, and wherever there are spares")
    ] = "auto"
    stages: Annotated[
        tuple[Literal["inventory", "host", "node", "pairs", "whole", "deep"], ...],
        Help("deep runs dcgmi on suspects and takes minutes"),
    ] = ("inventory", "host", "node", "pairs", "whole")
    resubmit: Annotated[
        int, Range(0, 10), Help("Slurm: with too few healthy nodes, submit again without the others, so many times")
    ] = 0
    seconds: Annotated[float, Range(0.1, 60), Help("of one bandwidth measurement")] = 1.0
    join_timeout: Annotated[float, Range(5, 7200), Help("seconds for all nodes to report")] = 180.0
    nccl_tests: Annotated[FilePath | None, Help("directory of nccl-tests binaries to run too, on every node")] = None


@record
class Recover(Section):
    """What happens when a job that trains fails or stands still."""

    attempts: Annotated[
        int, Range(0, 100), Help("starts again without a new checkpoint in between; 0: a failure ends the job")
    ] = 3
    hang: Annotated[
        float,
        Range(0, 86_400),
        Help("seconds without a step, and 10 x the median step, after which ranks hang; 0: never"),
    ] = 300.0
    first_step: Annotated[
        float, Range(1, 86_400), Help("seconds to the first step, for programs that tell their steps")
    ] = 1800.0


@record
class Environment(Section):
    """Versions on the nodes, where they are not this machine's."""

    deepspeed: Annotated[Version | None, Help("rules differ by version: 1-bit needs < 0.19.7")] = None


@record
class Ready(Section):
    """How one knows that a service answers; everything given has to hold."""

    port: Annotated[bool | Annotated[int, Range(1, 65535)], Help("it listens there; true: its own port")] = False
    http: Annotated[
        Annotated[str, Matches(r"/[!-~]*", "a path such as /health")] | None, Help("a GET of it answers 200")
    ] = None
    log: Annotated[Line | None, Help("this text stands in its output")] = None
    file: Annotated[FilePath | None, Help("this file exists")] = None
    hosts: Annotated[
        Literal["first", "all"] | None,
        Help("which of its nodes are asked; absent: all with `on: all`, else the first"),
    ] = None
    timeout: Annotated[float, Range(1, 86_400), Help("seconds; then the job fails")] = 900.0


@record
class Component(Section):
    """A heterogeneous component of its own, for a service that needs other nodes than training does."""

    partition: Token | None = None
    account: Token | None = None
    qos: Token | None = None
    constraint: Constraint | None = None
    gpu_type: Annotated[Token | None, Help("the type as Slurm's gres names it")] = None
    exclusive: bool = False


@record
class Service(Section):
    """A program beside the training: an inference or reward server, a Ray head. It ends with the trainer."""

    name: Name
    command: Annotated[tuple[Argument, ...], Help("its argv; DSLAUNCH_HOST_NAME and _PORT_NAME tell the others")]
    nodes: Annotated[int, Range(1, 10_000), Help("of its own, behind those that train")] = 1
    on: Annotated[
        Literal["own", "first", "all"], Help("own: nodes of its own; first, all: beside the ranks that train")
    ] = "own"
    tasks_per_node: Annotated[int, Range(1, 1024), Help("how often it is started on a node")] = 1
    gpus_per_node: Annotated[
        Annotated[int, Range(0, 64)] | None, Help("absent: those of the job where the nodes are its own, else none")
    ] = None
    cpus_per_node: Count | None = None
    memory: Memory | None = None
    port: Annotated[Annotated[int, Range(1, 65535)] | None, Help("it is told; absent: a free one")] = None
    env: dict[Variable, Text] = field(default_factory=dict)
    setup: Annotated[tuple[Line, ...], Help("shell lines before it, instead of the job's")] = ()
    container: Annotated[Image | Container | None, Help("another image than the job's")] = None
    after: Annotated[tuple[Name, ...], Help("services that have to be ready first")] = ()
    ready: Annotated[Ready, Help("training waits for it")] = field(default_factory=Ready)
    essential: Annotated[bool, Help("the job fails when it ends before the trainer does")] = True
    component: Annotated[Component | None, Help("Slurm: nodes of another kind, as a heterogeneous job")] = None


@record
class Sweep(Section):
    """The same job for several values: an array of Slurm's, or as many objects on Kubernetes."""

    over: Annotated[
        dict[
            Annotated[str, Matches(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)*", "a field, train.optimizer.lr")],
            tuple[Any, ...],
        ],
        Help("values by field: {train.optimizer.lr: [1e-4, 3e-4]}"),
    ]
    how: Annotated[Literal["grid", "zip"], Help("every combination, or the first of each, the second, ...")] = "grid"
    parallel: Annotated[Count | None, Help("how many run at the same time")] = None


@record
class Site(Section):
    """What a site file says of itself."""

    backend: Annotated[
        Literal["slurm", "kubernetes", "local"] | None, Help("where `dslaunch render` and `submit` send a job")
    ] = None
    title: Line | None = None
