"""One way to train, and what it runs on: the arguments of the memory and step-time models."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from launcher.facts import Gpu
from launcher.record import record
from launcher.spec import Lora, Shape

Recompute = Literal["none", "selective", "full", "cpu"]  # cpu: full, with the checkpoints in host memory
Device = Literal["none", "cpu", "nvme"]
Verdict = Literal["fits", "tight", "does not fit"]


@record
class Setup:
    """Everything that memory and step time depend on. Batch numbers count samples, buckets count elements."""

    shape: Shape
    seq_len: int
    world: int  # ranks
    per_node: int = 8  # ranks on one node
    micro: int = 1
    accumulation: int = 1
    stage: int = 0
    precision: str = "bf16"  # of weights: bf16, fp16, fp32
    tensor: int = 1
    split_hidden: bool = False  # Megatron's sequence parallelism: tensor ranks split norms and hidden states too
    pipeline: int = 1
    virtual: int = 1  # model chunks per pipeline rank (interleaved schedule)
    sequence: int = 1
    optimizer_state: int = 8  # bytes per parameter beside the fp32 copy
    gradient: str = ""  # type gradients are accumulated in; empty: DeepSpeed's default for the stage
    communication: str = ""  # type gradients travel in (communication_data_type); empty: as the weights
    offload_optimizer: Device = "none"
    offload_parameters: Device = "none"
    recompute: Recompute = "none"
    attention: str = "flash"  # eager keeps the seq x seq matrix
    lora: Lora | None = None
    quantized_weights: bool = False  # ZeRO++ qwZ
    quantized_gradients: bool = False  # ZeRO++ qgZ
    hpz: int = 1  # ZeRO++ secondary partition, in ranks
    onebit: float = 1.0  # share of steps that send whole gradients: 1.0 is no compression at all
    reduce_bucket: int = 200_000_000
    allgather_bucket: int = 200_000_000
    prefetch_bucket: int = 50_000_000
    persistence: int = 100_000  # parameters of at most this many elements are never partitioned
    overlap: bool = True

    @property
    def replicas(self) -> int:
        """Data-parallel ranks: those that see other samples."""
        return self.world // (self.tensor * self.pipeline * self.sequence)

    @property
    def shards(self) -> int:
        """The ranks that ZeRO divides by: sequence-parallel ranks hold the same weights and take part."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 4 if self.precision == "fp32" else 2

    @property
    def samples(self) -> int:
        return self.micro * self.accumulation * self.replicas


@record
class Machine:
    """What the ranks run on. Bandwidths in GB/s (10^9 bytes), one direction."""

    gpu: Gpu
    node: float  # between nodes, all NICs of a node together, bus bandwidth of large collectives
    measured: bool = False  # `node` comes from a preflight rather than from a table
    host_gib: float = 0.0  # host memory per node; 0 when nobody said
    nvme_gib: float = 0.0
    cpus: int = 0  # cores per node; 0 when nobody said
    latency: float = 8e-6  # seconds for one hop between nodes inside a collective


@record
class Part:
    """One item of a sum, with its reason: GiB in a memory breakdown, seconds in a step."""

    name: str
    value: float
    why: str


@record
class Estimate:
    """Memory in GiB. `error` is the relative half-width of the band around the GPU's total.

    `slack` is what the total counts and a run short of memory may do without: fragments that the allocator gives
    back, and the copies of the logits that a fused loss never makes.
    """

    gpu: tuple[Part, ...]
    host: tuple[Part, ...] = ()  # per node
    nvme: tuple[Part, ...] = ()  # per node
    error: float = 0.1
    slack: float = 0.0

    @property
    def total(self) -> float:
        return sum(part.value for part in self.gpu)

    @property
    def low(self) -> float:
        return (self.total - self.slack) * (1 - self.error)

    @property
    def high(self) -> float:
        return self.total * (1 + self.error)

    @property
    def host_total(self) -> float:
        return sum(part.value for part in self.host)

    @property
    def nvme_total(self) -> float:
        return sum(part.value for part in self.nvme)


@record
class StepTime:
    """One optimizer step. `parts` add up to `seconds`; what is hidden behind compute is not in them."""

    parts: tuple[Part, ...]
    tokens: int  # per step, over all ranks
    world: int
    model_flops: float  # of one step over all ranks: no recomputation counted
    peak: float  # FLOP/s of one GPU
    volume: float = 0.0  # bytes that one GPU sends per step, bus-bandwidth convention
    communication: float = 0.0  # seconds on the wire, hidden or not
    error: float = 0.15
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(part.value for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.world

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.world * self.peak)


@record
class Alternative:
    """A way that was weighed: what it is, what it costs, and why it is not the one taken."""

    name: str  # "ZeRO-2, recomputation, micro-batch 4 x 2"
    setup: Setup
    estimate: Estimate
    time: StepTime
    verdict: Verdict
    why: str  # "taken: the fastest that fits", "1.14x the time of a step", "needs 92 of 80 GiB per GPU"
    changes: tuple[str, ...] = ()  # what --set takes to get it: ("train.zero=2", "train.micro_batch=4")
