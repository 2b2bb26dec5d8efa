"""What is trained, and how."""

from dataclasses import field
from typing import Annotated, Any, Literal

from launcher.record import record
from launcher.spec.words import Argument, Auto, Count, FilePath, Line, Section, Token, Whole
from launcher.yamldoc import Help, Matches, Range


@record
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


@record
class Optimizer(Section):
    type: Annotated[Token, Help("AdamW, Adam, Lamb, Lion, SGD, OneBitAdam, ...")] = "AdamW"
    lr: Annotated[float, Range(1e-12, 1e3), Help("learning rate at its peak")] = 1e-4
    betas: Annotated[tuple[float, ...] | None, Help("Adam's betas")] = None
    eps: Annotated[Annotated[float, Range(1e-30, 1)] | None, Help("added to the denominator")] = None
    weight_decay: Annotated[Annotated[float, Range(0, 1e3)] | None, Help("decoupled weight decay")] = None
    freeze_step: Annotated[Count | None, Help("1-bit optimizers: the step at which compression begins")] = None
    params: Annotated[dict[str, Any], Help("further parameters, passed on as they are")] = field(default_factory=dict)


@record
class LrSchedule(Section):
    type: Annotated[Literal["constant", "linear", "cosine"], Help("after the warm-up")] = "constant"
    warmup_steps: Annotated[Whole, Help("steps from 0 to the learning rate")] = 0


@record
class Offload(Section):
    optimizer: Annotated[
        Literal["auto", "none", "cpu", "nvme"],
        Help("where optimizer states live; auto leaves the GPU only when nothing else fits and the host has room"),
    ] = "auto"
    parameters: Annotated[Literal["auto", "none", "cpu", "nvme"], Help("where ZeRO-3 parameters live")] = "auto"
    nvme_path: Annotated[FilePath | None, Help("a directory on every node's local NVMe")] = None


@record
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


@record
class Lora(Section):
    """Adapters that your program trains beside frozen weights; the plan counts on it."""

    rank: Annotated[int, Range(1, 65536), Help("inner width of an adapter")] = 8
    targets: Annotated[
        Literal["qv", "attention", "linear"], Help("matrices with an adapter: q and v, all of attention, or all")
    ] = "qv"
    bits: Annotated[Literal[16, 8, 4], Help("of a frozen weight; 4 is QLoRA")] = 16


@record
class Checkpoint(Section):
    dir: Annotated[FilePath | None, Help("where checkpoints go; checkpoints/NAME when absent")] = None
    every: Annotated[
        Whole | Auto,
        Help("steps between; 0: at the end only; auto: what wastes least, or a tenth of the run"),
    ] = 0
    keep: Annotated[Count, Help("how many complete checkpoints stay")] = 2


@record
class Train(Section):
    script: Annotated[FilePath | None, Help("a Python file, run once per rank")] = None
    module: Annotated[
        Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_.]*", "a Python module")] | None, Help("python -m ...")
    ] = None
    command: Annotated[
        tuple[Argument, ...] | None,
        Help("any program, run once per rank; with launcher node once per node, with job once"),
    ] = None
    prefix: Annotated[
        tuple[Argument, ...], Help("what each rank's program is started by: [numactl, --membind=0], [nsys, profile]")
    ] = ()
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
        Literal["torchrun", "deepspeed", "srun", "accelerate", "composer", "node", "job"],
        Help(
            "what starts the ranks on a node; srun: one Slurm task per rank; node: your command, once per node; "
            "job: your command, once, on the first node; it reaches the others itself"
        ),
    ] = "torchrun"
    launcher_args: Annotated[tuple[Argument, ...], Help("further arguments of that launcher")] = ()
    visible_gpus: Annotated[Literal["all", "own"], Help("own: a rank sees its own GPU alone, as number 0")] = "all"
    numa: Annotated[
        tuple[Whole, ...] | Literal["auto", "none"],
        Help("NUMA node of each local rank, [3, 3, 1, 1]; auto: the one its GPU hangs on"),
    ] = "none"

    @property
    def optimizer_section(self) -> Optimizer:
        return Optimizer(type=self.optimizer) if isinstance(self.optimizer, str) else self.optimizer
