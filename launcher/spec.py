"""JobSpec: what the user asks for. Field names are the job file's keys.

Annotations are evaluated as the classes are made: reading a job file then needs no second look at them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Union

from launcher import yamldoc
from launcher.errors import Path, Problem, UserError
from launcher.yamldoc import Help, Matches, Range

# What may stand where. `#SBATCH` lines have no safe quoting, so whatever reaches one is limited to
# characters that need none; command lines and exports are quoted and may hold anything but NUL.
Name = Annotated[
    str,
    Matches(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", "1 to 40 lower-case letters, digits and inner dashes"),
]
Text = Annotated[str, Matches(r"[^\x00]*", "free of NUL")]
Line = Annotated[str, Matches(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+", "one line of text")]
FilePath = Annotated[
    str,
    Matches(
        r"(?!-)[^\x00-\x1f\x7f-\x9f\u2028\u2029~$`][^\x00-\x1f\x7f-\x9f\u2028\u2029$`]*",
        "a path: it may not begin with - or ~ nor hold $ or control characters; "
        "nothing is expanded, {env: SCRATCH, append: /runs} reads a variable",
    ),
]
Token = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.,:@%+/=-]*", "letters, digits and _.,:@%+/=- without spaces")]
Constraint = Annotated[str, Matches(r"[A-Za-z0-9(\[][A-Za-z0-9_.,:&|*()\[\]-]*", "a Slurm constraint without spaces")]
Nodes = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.,/\[\]-]*", "a Slurm node list, gpu[001-004,7]")]
Time = Annotated[
    str,
    Matches(
        r"[0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]{1,2}(:[0-5]?[0-9]){0,2}",
        "a Slurm time: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
    ),
]
Memory = Annotated[str, Matches(r"[1-9][0-9]*[KMGT]?|0", "a Slurm memory size: 500G, 64000M, or 0 for all")]
Quantity = Annotated[str, Matches(r"[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?", "a Kubernetes quantity such as 64Gi")]
Variable = Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_]*", "a name for a variable: letters, digits, _")]
Version = Annotated[
    str, Matches(r"[0-9]+(\.[0-9]+){2,3}([A-Za-z0-9.+-]*)", "a version of three numbers such as 0.19.6")
]
Label = Annotated[str, Matches(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", "a Kubernetes label value")]
LabelKey = Annotated[
    str,
    Matches(
        r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
        "a Kubernetes label key",
    ),
]
DnsName = Annotated[str, Matches(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "a DNS name")]
Module = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.+/=-]*", "a module name such as cuda/12.4")]

Auto = Literal["auto"]
Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Argument = Text

_STRICT: dict[str, Any] = {"extra": "forbid"}


class Section:
    """Unknown keys are refused, by the reader and by the editor's schema alike.

    Comparing and printing are said once here: made anew for each class they take a quarter of this module's import.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


@dataclass(frozen=True, repr=False, eq=False)
class Shape(Section):
    """A transformer's architecture, for a model that is neither a preset nor a config.json."""

    layers: Annotated[int, Range(1, 10_000), Help("transformer layers (encoder layers for encoder-decoder)")]
    hidden: Annotated[int, Range(1, 1_000_000), Help("model width")]
    heads: Annotated[int, Range(1, 10_000), Help("attention heads")]
    vocab: Annotated[int, Range(2, 10**8), Help("vocabulary size")] = 256
    kv_heads: Annotated[Count | None, Help("key/value heads, fewer than heads for GQA")] = None
    head_dim: Annotated[Count | None, Help("width of one head; hidden / heads when absent")] = None
    ffn: Annotated[Count | None, Help("inner width of the MLP; 4 x hidden when absent")] = None
    gated: Annotated[bool, Help("gated MLP (SwiGLU): three matrices instead of two")] = False
    tied: Annotated[bool, Help("input and output embeddings share one matrix")] = True
    biases: Annotated[bool, Help("linear layers have biases, norms are LayerNorm")] = True
    positions: Annotated[Whole, Help("learned position embeddings; 0 for rotary or relative")] = 0
    kind: Annotated[Literal["decoder", "encoder", "encoder-decoder"], Help("architecture")] = "decoder"
    decoder_layers: Annotated[Whole, Help("decoder layers of an encoder-decoder")] = 0
    experts: Annotated[Whole, Help("experts per MLP of a mixture of experts; 0 for a dense model")] = 0
    experts_per_token: Annotated[Count, Help("experts that one token visits")] = 2
    expert_ffn: Annotated[Count | None, Help("inner width of one expert; ffn when absent")] = None
    shared_ffn: Annotated[Whole, Help("inner width of the expert that every token visits")] = 0
    norms: Annotated[Count, Help("norms per layer: 1 where attention and MLP share one, 4 in Gemma 2")] = 2
    norm_bias: Annotated[bool | None, Help("norms are LayerNorm; as `biases` when absent")] = None
    qkv_bias: Annotated[bool, Help("q, k and v have biases, whatever `biases` says (Qwen 2)")] = False
    qk_norm: Annotated[bool, Help("q and k are normed per head (Qwen 3, Gemma 3)")] = False


@dataclass(frozen=True, repr=False, eq=False)
class Optimizer(Section):
    type: Annotated[Token, Help("AdamW, Adam, Lamb, Lion, SGD, OneBitAdam, ...")] = "AdamW"
    lr: Annotated[float, Range(1e-12, 1e3), Help("learning rate at its peak")] = 1e-4
    betas: Annotated[tuple[float, ...] | None, Help("Adam's betas")] = None
    eps: Annotated[Annotated[float, Range(1e-30, 1)] | None, Help("added to the denominator")] = None
    weight_decay: Annotated[Annotated[float, Range(0, 1e3)] | None, Help("decoupled weight decay")] = None
    freeze_step: Annotated[Count | None, Help("1-bit optimizers: the step at which compression begins")] = None
    params: Annotated[dict[str, Any], Help("further parameters, passed on as they are")] = field(default_factory=dict)


@dataclass(frozen=True, repr=False, eq=False)
class LrSchedule(Section):
    type: Annotated[Literal["constant", "linear", "cosine"], Help("after the warm-up")] = "constant"
    warmup_steps: Annotated[Whole, Help("steps from 0 to the learning rate")] = 0


@dataclass(frozen=True, repr=False, eq=False)
class Offload(Section):
    optimizer: Annotated[
        Literal["auto", "none", "cpu", "nvme"],
        Help("where optimizer states live; auto leaves the GPU only when nothing else fits and the host has room"),
    ] = "auto"
    parameters: Annotated[Literal["auto", "none", "cpu", "nvme"], Help("where ZeRO-3 parameters live")] = "auto"
    nvme_path: Annotated[FilePath | None, Help("a directory on every node's local NVMe")] = None


@dataclass(frozen=True, repr=False, eq=False)
class Parallel(Section):
    """What your program implements; the plan counts on it."""

    tensor: Annotated[
        Annotated[int, Range(1, 1024)] | Auto, Help("tensor-parallel ranks; auto: DSLAUNCH_TENSOR_PARALLEL says")
    ] = 1
    pipeline: Annotated[
        Annotated[int, Range(1, 1024)] | Auto,
        Help("pipeline stages (DeepSpeed needs a PipelineModule); auto: DSLAUNCH_PIPELINE_PARALLEL says"),
    ] = 1
    virtual: Annotated[int, Range(1, 64), Help("model chunks per pipeline rank, for an interleaved schedule")] = 1
    sequence: Annotated[int, Range(1, 1024), Help("sequence-parallel ranks (Ulysses)")] = 1
    split_hidden: Annotated[bool, Help("tensor ranks split norms too: Megatron's sequence parallelism")] = False


@dataclass(frozen=True, repr=False, eq=False)
class Lora(Section):
    """Adapters that your program trains beside frozen weights; the plan counts on it."""

    rank: Annotated[int, Range(1, 65536), Help("inner width of an adapter")] = 8
    targets: Annotated[
        Literal["qv", "attention", "linear"], Help("matrices with an adapter: q and v, all of attention, or all")
    ] = "qv"
    bits: Annotated[Literal[16, 8, 4], Help("of a frozen weight; 4 is QLoRA")] = 16


@dataclass(frozen=True, repr=False, eq=False)
class Checkpoint(Section):
    dir: Annotated[FilePath | None, Help("where checkpoints go; checkpoints/NAME when absent")] = None
    every: Annotated[
        Whole | Auto,
        Help("steps between; 0: at the end only; auto: what wastes least, or a tenth of the run"),
    ] = 0
    keep: Annotated[Count, Help("how many complete checkpoints stay")] = 2


@dataclass(frozen=True, repr=False, eq=False)
class Train(Section):
    script: Annotated[FilePath | None, Help("a Python file, run once per rank")] = None
    module: Annotated[
        Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_.]*", "a Python module")] | None, Help("python -m ...")
    ] = None
    command: Annotated[tuple[Argument, ...] | None, Help("any program, run once per rank")] = None
    args: Annotated[tuple[Argument, ...], Help("arguments, passed byte for byte")] = ()
    config_flag: Annotated[
        Line | None, Help("the flag that receives the DeepSpeed config's path; none leaves it out")
    ] = None
    workdir: Annotated[FilePath, Help("relative to the job file")] = "."
    global_batch: Annotated[Count | Auto, Help("samples per step over all ranks")] = "auto"
    micro_batch: Annotated[Count | Auto, Help("samples per rank and forward pass")] = "auto"
    gradient_accumulation: Annotated[Count | Auto, Help("forward passes per step")] = "auto"
    seq_len: Annotated[Count, Help("tokens per sample")] = 1024
    steps: Annotated[Count, Help("optimizer steps in the whole run")] = 1000
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], Help("auto: bf16 where the GPU has it")] = "auto"
    optimizer: Annotated[Optimizer | Token, Help("a name, or a section")] = field(default_factory=Optimizer)
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    gradient_clipping: Annotated[float, Range(0, 1e6), Help("largest gradient norm; 0 switches it off")] = 1.0
    zero: Annotated[Annotated[int, Range(0, 3)] | Auto, Help("ZeRO stage; auto: the planner's choice")] = "auto"
    offload: Offload = field(default_factory=Offload)
    activation_checkpointing: Annotated[
        bool | Literal["auto", "selective", "cpu"],
        Help("recompute activations in the backward pass; selective: attention only; cpu: checkpoints on the host"),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "flash", "eager"],
        Help("flash: fused, SDPA; eager keeps the seq x seq matrix in memory; auto: eager for T5's kind"),
    ] = "auto"
    lora: Annotated[Lora | None, Help("adapters instead of all weights")] = None
    compression: Annotated[
        Literal["auto", "none", "lossy"],
        Help("auto: hpZ where it pays; lossy: quantized ZeRO++ and the 1-bit optimizers too"),
    ] = "auto"
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    deepspeed: Annotated[dict[str, Any], Help("DeepSpeed config keys laid on top of ours")] = field(
        default_factory=dict
    )
    launcher: Annotated[
        Literal["torchrun", "deepspeed", "srun"],
        Help("what starts the ranks on a node; srun: one Slurm task per rank"),
    ] = "torchrun"

    @property
    def optimizer_section(self) -> Optimizer:
        return Optimizer(type=self.optimizer) if isinstance(self.optimizer, str) else self.optimizer


@dataclass(frozen=True, repr=False, eq=False)
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


@dataclass(frozen=True, repr=False, eq=False)
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


@dataclass(frozen=True, repr=False, eq=False)
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


@dataclass(frozen=True, repr=False, eq=False)
class Environment(Section):
    """Versions on the nodes, where they are not this machine's."""

    deepspeed: Annotated[Version | None, Help("rules differ by version: 1-bit needs < 0.19.7")] = None


@dataclass(frozen=True, repr=False, eq=False)
class Container(Section):
    image: Annotated[str, Matches(r"[A-Za-z0-9./][A-Za-z0-9._/:@#+-]*", "an image reference without spaces")]
    mounts: Annotated[
        tuple[
            Annotated[
                str,
                Matches(
                    r"/[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*:/[^\x00-\x1f\x7f-\x9f\u2028\u2029,$`\"'\\ ]*",
                    "/source:/target",
                ),
            ],
            ...,
        ],
        Help("directories made visible inside, for pyxis: /data:/data"),
    ] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Secret(Section):
    """Where a secret comes from; the value itself never stands in a job file."""

    from_env: Annotated[Variable | None, Help("Slurm, local: a variable of the submitting shell")] = None
    from_file: Annotated[FilePath | None, Help("Slurm, local: a file only you can read (0600)")] = None
    secret: Annotated[DnsName | None, Help("Kubernetes: name of a Secret")] = None
    key: Annotated[
        Annotated[str, Matches(r"[-._a-zA-Z0-9]{1,253}", "a Secret's key")] | None,
        Help("Kubernetes: key in that Secret"),
    ] = None


@dataclass(frozen=True, repr=False, eq=False)
class Slurm(Section):
    partition: Annotated[Token | None, Help("one or several, a,b")] = None
    account: Token | None = None
    qos: Token | None = None
    reservation: Token | None = None
    constraint: Constraint | None = None
    time: Annotated[Time, Help("wall time; the job is warned before it ends")] = "1:00:00"
    nodelist: Annotated[Nodes | None, Help("exactly these nodes")] = None
    exclude: Annotated[Nodes | None, Help("never these nodes")] = None
    exclusive: Annotated[bool, Help("whole nodes")] = False
    gpus_as: Annotated[Literal["gpus-per-node", "gres"], Help("how this site wants GPUs asked for")] = "gpus-per-node"
    gpu_type: Annotated[Token | None, Help("the type as Slurm's gres names it")] = None
    warn_before_end: Annotated[
        int, Range(0, 65535), Help("seconds before the end at which ranks get SIGUSR2 and save")
    ] = 180
    requeue: Annotated[
        bool | Literal["auto"],
        Help("back to the queue after node failure, preemption and time limit; auto: not after the time limit"),
    ] = "auto"
    mail_user: Annotated[
        Annotated[str, Matches(r"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+", "a mail address")] | None, Help("")
    ] = None
    mail_type: Token | None = None
    sbatch: Annotated[
        dict[
            Annotated[str, Matches(r"[a-z][a-z-]*", "a long sbatch option without its dashes")],
            bool | Annotated[str, Matches(r"[A-Za-z0-9_.,:@%+/=&|*()\[\]-]+", "text without spaces or quotes")],
        ],
        Help("any other long sbatch option: {nice: 100, contiguous: true}"),
    ] = field(default_factory=dict)
    srun: Annotated[tuple[Line, ...], Help("further arguments of srun")] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Volume(Section):
    claim: Annotated[DnsName, Help("name of a PersistentVolumeClaim")]
    mount: Annotated[FilePath, Help("where it appears in the pod")]
    read_only: bool = False


@dataclass(frozen=True, repr=False, eq=False)
class Toleration(Section):
    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Kubernetes(Section):
    namespace: DnsName | None = None
    queue: Annotated[Label | None, Help("Kueue LocalQueue")] = None
    priority_class: DnsName | None = None
    service_account: DnsName | None = None
    image_pull_secrets: tuple[DnsName, ...] = ()
    gang: Annotated[bool, Help("all pods start together: needs an operator with a gang scheduler")] = True
    gpu_resource: Annotated[LabelKey, Help("the resource that a GPU is")] = "nvidia.com/gpu"
    rdma_resource: Annotated[LabelKey | None, Help("the resource that gives a pod its RDMA devices")] = None
    rdma_count: Count = 1
    shm: Annotated[Quantity, Help("size of /dev/shm, in memory")] = "16Gi"
    node_selector: dict[LabelKey, Label] = field(default_factory=dict)
    exclude: Annotated[tuple[DnsName, ...], Help("never these nodes, by name")] = ()
    tolerations: tuple[Toleration, ...] = ()
    volumes: tuple[Volume, ...] = ()
    run_as_user: Annotated[Count | None, Help("uid in the pod; absent leaves it to the image")] = None
    labels: dict[LabelKey, Label] = field(default_factory=dict)
    annotations: dict[LabelKey, Text] = field(default_factory=dict)


@dataclass(frozen=True, repr=False, eq=False)
class JobSpec(Section):
    """One training job."""

    name: Annotated[Name, Help("names the run, the Slurm job and the pods")]
    model: Annotated[
        Union[FilePath, Shape],  # noqa: UP007 - read at run time on 3.10
        Help("a preset (`dslaunch presets`), a path to a Hugging Face config.json, or a shape"),
    ]
    train: Train = field(default_factory=Train)
    resources: Resources = field(default_factory=Resources)
    preflight: Preflight = field(default_factory=Preflight)
    recover: Recover = field(default_factory=Recover)
    environment: Environment = field(default_factory=Environment)
    env: Annotated[dict[Variable, Text], Help("variables for every rank, byte for byte")] = field(
        default_factory=dict
    )
    modules: Annotated[tuple[Module, ...], Help("environment modules, loaded in this order after a purge")] = ()
    venv: Annotated[FilePath | None, Help("a Python virtual environment, activated on every node")] = None
    conda: Annotated[FilePath | None, Help("a conda environment, by name or path")] = None
    container: Annotated[
        Annotated[str, Matches(r"[A-Za-z0-9./][A-Za-z0-9._/:@#+-]*", "an image reference")] | Container | None,
        Help("an image; on Slurm through pyxis"),
    ] = None
    setup: Annotated[tuple[Line, ...], Help("shell lines run on every node before training")] = ()
    secrets: Annotated[dict[Variable, Secret], Help("variables whose values never appear in a file")] = field(
        default_factory=dict
    )
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)

    @property
    def per_node(self) -> int:
        """Ranks on one node: one per GPU, or `processes_per_node` on CPU."""
        return self.resources.gpus_per_node or self.resources.processes_per_node or 1

    @property
    def world(self) -> int:
        return self.resources.nodes * self.per_node

    @property
    def checks_nodes(self) -> bool:
        """Whether a preflight comes before training."""
        asked, resources = self.preflight.run, self.resources
        return (
            (resources.nodes > 1 and resources.gpus_per_node > 0) or resources.spares > 0
            if asked == "auto"
            else asked
        )

    @property
    def box(self) -> Container | None:
        return Container(self.container) if isinstance(self.container, str) else self.container


@dataclass(frozen=True)
class Document:
    """A job with the files it came from, so that any later problem finds its line."""

    spec: JobSpec
    root: yamldoc.Node

    def place(self, problem: Problem) -> Problem:
        if problem.where or not problem.at:
            return problem
        return Problem(problem.message, problem.hint, problem.at, str(yamldoc.place(self.root, problem.at)))

    def origins(self) -> list[tuple[Path, str]]:
        """Where each value that was given stands: (("train", "steps"), "job.yaml:7:3")."""
        found: list[tuple[Path, str]] = []

        def visit(node: yamldoc.Node, path: Path, mark: yamldoc.Mark) -> None:
            if isinstance(node, yamldoc.Table):
                for key, child in node.entries.items():
                    visit(child, (*path, key), node.keys[key])
            else:
                found.append((path, str(mark)))

        visit(self.root, (), self.root.mark)
        return found


SPEC_AT_TOP = "a job file is a section with keys: name, model, train, resources, ..."


def load(
    text: str,
    *,
    name: str,
    site: tuple[str, str] | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Document:
    """Job text over site text (name, text), `--set` over both. Raises UserError with every mistake."""
    job = yamldoc.parse(text, name=name)
    problems: list[Problem] = []
    blank = re.compile(r"\s*(#.*)?\Z")
    layers = []
    if site and not all(blank.match(line) for line in site[1].splitlines()):  # an empty site file says nothing
        layers.append(yamldoc.parse(site[1], name=site[0]))
    layers.append(job)
    for layer in layers:
        if not isinstance(layer, yamldoc.Table):
            problems.append(Problem(SPEC_AT_TOP, where=str(layer.mark)))
    if problems:
        raise UserError(*problems)
    for override in overrides:
        layers.append(yamldoc.assignment(override))
    root = layers[0]
    for layer in layers[1:]:
        root = yamldoc.merge(root, layer)
    if isinstance(root, yamldoc.Table):  # what is missing is missing from the job file
        root = yamldoc.Table(root.entries, root.keys, job.mark)
    root = yamldoc.from_environment(root, environ or {}, problems, kind=JobSpec, secret=SECRET_NAME.regex)
    try:
        spec = yamldoc.read(root, JobSpec)
    except UserError as error:
        named = {problem.where for problem in problems}  # a variable that is missing is one mistake
        rest = [problem for problem in error.problems if problem.where not in named]
        raise UserError(*problems, *rest) from None
    if problems:
        raise UserError(*problems)
    document = Document(spec, root)
    problems = [document.place(problem) for problem in _contradictions(spec)]
    if problems:
        raise UserError(*problems)
    return document


def _contradictions(spec: JobSpec) -> list[Problem]:
    """Fields that cannot stand together, and names that cannot be set."""
    found: list[Problem] = []
    programs = [key for key in ("script", "module", "command") if getattr(spec.train, key)]
    if len(programs) > 1:
        found.append(
            Problem(
                f"{' and '.join(programs)} are both given; a rank runs one program",
                hint=f"keep train.{programs[0]}",
                at=("train", programs[1]),
            )
        )
    if spec.train.command == ():
        found.append(Problem("command is an empty list: nothing would run", at=("train", "command")))
    if spec.train.args and spec.train.command:
        found.append(Problem("args belong to script or module; a command holds its own", at=("train", "args")))
    flag = spec.train.config_flag or "--deepspeed_config"
    given = [i for i, word in enumerate(spec.train.args) if word.split("=")[0] in (flag, flag.replace("_", "-"))]
    if given and flag != "none" and (spec.train.script or spec.train.module):
        found.append(
            Problem(
                f"{flag} stands in args, and dslaunch hands its own config over with it",
                hint="train.deepspeed: for keys of yours, or config_flag: none to bring the whole config",
                at=("train", "args", given[0]),
            )
        )
    resources = spec.resources
    if resources.gpus_per_node and resources.processes_per_node not in (None, resources.gpus_per_node):
        found.append(
            Problem(
                f"processes_per_node {resources.processes_per_node} with {resources.gpus_per_node} GPUs: "
                "DeepSpeed runs one rank per GPU",
                hint="leave processes_per_node out",
                at=("resources", "processes_per_node"),
            )
        )
    if resources.gpu and not resources.gpus_per_node:
        found.append(
            Problem(
                f"gpu {resources.gpu} is named but gpus_per_node is 0: this would train on CPU",
                hint="set resources.gpus_per_node",
                at=("resources", "gpu"),
            )
        )
    if not spec.preflight.stages:
        hint = "leave stages out, or preflight.run: false"
        found.append(Problem("a preflight without a stage checks nothing", hint=hint, at=("preflight", "stages")))
    if spec.venv and spec.conda:
        found.append(Problem("venv and conda are both given", hint="keep one", at=("conda",)))
    for index, module in enumerate(spec.modules):
        if module.startswith("-"):
            found.append(Problem(f"module `{module}` begins with a dash", at=("modules", index)))
    for key, value in spec.env.items():
        found += _env_problems(key, value)
    for where, words in (("args", spec.train.args), ("command", spec.train.command or ())):
        for index, word in enumerate(words):
            if SECRET_VALUE.regex.fullmatch(word):
                message = "this looks like a secret, and command lines are written to files and seen by everybody"
                hint = "secrets: {NAME: {from_env: NAME}} hands it over in a variable"
                found.append(Problem(message, hint, ("train", where, index)))
    for key, secret in spec.secrets.items():
        at: Path = ("secrets", key)
        if key in spec.env:
            found.append(Problem(f"{key} stands in env and in secrets", hint="keep it in secrets", at=at))
        if not (secret.from_env or secret.from_file or secret.secret):
            found.append(
                Problem(f"secret {key} has no source", hint="give from_env, from_file, or secret and key", at=at)
            )
        if secret.from_env and secret.from_file:
            found.append(Problem(f"secret {key} has two sources", hint="keep from_env or from_file", at=at))
        if bool(secret.secret) != bool(secret.key):
            found.append(Problem(f"secret {key} needs both secret and key for Kubernetes", at=at))
        found += [Problem(p.message, p.hint, at) for p in _env_problems(key, "")]
    return found


# Variables a job file may not set: each would take effect before or beneath what dslaunch arranges.
NOT_YOURS = {
    "BASH_ENV": "bash runs that file before the script",
    "ENV": "sh runs that file before the script",
    "LD_PRELOAD": "it is loaded into every process, bash and srun included",
    "LD_AUDIT": "it is loaded into every process, bash and srun included",
    "SHELLOPTS": "it changes how the script itself is read",
    "BASHOPTS": "it changes how the script itself is read",
    "IFS": "it changes how the script itself is read",
    "PS4": "bash expands it as a command line",
    **dict.fromkeys(["UID", "EUID", "PPID"], "bash refuses to change it"),
    **dict.fromkeys(
        """RANDOM SRANDOM SECONDS LINENO EPOCHSECONDS EPOCHREALTIME PIPESTATUS FUNCNAME GROUPS DIRSTACK HISTCMD
        OPTIND SHLVL PWD OLDPWD BASHPID EXECIGNORE _""".split(),
        "bash gives it a value or a meaning of its own",
    ),
    **dict.fromkeys(["here", "logs", "value"], "node.sh itself uses it"),
    "RANK": "the launcher sets it on every rank",
    "LOCAL_RANK": "the launcher sets it on every rank",
    "WORLD_SIZE": "the launcher sets it on every rank",
    "CUDA_VISIBLE_DEVICES": "the scheduler and the launcher hand out the devices",
    "NODE_RANK": "the scheduler's side sets it on every node",
    "MASTER_ADDR": "the scheduler's side sets it on every node",
    "MASTER_PORT": "the scheduler's side sets it on every node",
}
NOT_YOUR_PREFIXES = {
    "SLURM_": "Slurm sets it",
    "SBATCH_": "sbatch reads it as an option",
    "SRUN_": "srun reads it as an option",
    "BASH_FUNC_": "bash takes it for a function",
    "BASH_": "bash gives it a value or a meaning of its own",
    "PET_": "torchrun reads it as an option",
    "TORCHELASTIC_": "torchrun sets it",
    "DSLAUNCH_": "dslaunch sets it",
}
SECRET_NAME = Matches(
    r"(?i:.*(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|API_KEY|ACCESS_KEY|SECRET_KEY|CREDENTIALS?))", ""
)
SECRET_VALUE = Matches(
    r"(?s:.*(hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9_-]{20}|gh[pousr]_[A-Za-z0-9]{20}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}).*)",
    "",
)


def _env_problems(key: str, value: str) -> list[Problem]:
    at: Path = ("env", key)
    prefix = next((prefix for prefix in NOT_YOUR_PREFIXES if key.startswith(prefix)), None)
    reason = NOT_YOURS.get(key) or (NOT_YOUR_PREFIXES[prefix] if prefix else None)
    if reason:
        return [Problem(f"{key} cannot be set from a job file: {reason}", hint="remove it", at=at)]
    if value and (SECRET_NAME.regex.fullmatch(key) or SECRET_VALUE.regex.fullmatch(value)):
        hint = f"secrets: {{{key}: {{from_env: {key}}}}} hands it over without writing it anywhere"
        return [Problem(f"{key} looks like a secret, and env is written to files", hint=hint, at=at)]
    return []
