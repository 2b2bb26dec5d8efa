"""What DeepSpeed refuses, and what it accepts and then ignores. Each row: when, what, what instead.

The rules look at the finished DeepSpeed config, so that raw `deepspeed:` keys are judged too.
Sources: the check in DeepSpeed named in each row, and runs on CPU with 0.19.6 and 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher import facts
from launcher.errors import Path, Problem

NEWEST_ONEBIT = "0.19.6"


@dataclass(frozen=True)
class Situation:
    """A config with what surrounds it. Numbers count ranks and steps."""

    config: dict[str, Any]
    gpus: bool
    world: int
    pipeline: int
    steps: int
    deepspeed: str  # on the nodes; empty when nobody said

    @property
    def zero(self) -> dict[str, Any]:
        section = self.config.get("zero_optimization", {})
        return section if isinstance(section, dict) else {}

    @property
    def stage(self) -> int:
        stage = self.zero.get("stage", 0)
        return stage if isinstance(stage, int) else 0

    @property
    def optimizer(self) -> str:
        section = self.config.get("optimizer")
        return str(section.get("type", "")) if isinstance(section, dict) else ""

    @property
    def row(self) -> facts.OptimizerRow | None:
        names = {name.lower(): row for name, row in facts.optimizers().items()}
        row = names.get(self.optimizer.lower())
        # DeepSpeed compares the 1-bit names exactly and lower-cases the others (engine.py)
        return None if row and row.onebit and row.name != self.optimizer else row

    @property
    def params(self) -> dict[str, Any]:
        section = self.config.get("optimizer")
        params = section.get("params") if isinstance(section, dict) else None
        return params if isinstance(params, dict) else {}

    def on(self, section: str) -> bool:
        value = self.config.get(section, {})
        return isinstance(value, dict) and value.get("enabled") is True

    def offloads(self, what: str) -> str:
        value = self.zero.get(what, {})
        return str(value.get("device", "none")) if isinstance(value, dict) else "none"


Found = Iterator[tuple[bool, str, str, Path]]  # refused?, what, what instead, where in the job file


def optimizer_is_known(s: Situation) -> Found:
    if s.optimizer and s.row is None:
        from launcher.yamldoc import suggest

        hint = suggest(s.optimizer, facts.optimizers())
        yield True, f"DeepSpeed has no optimizer `{s.optimizer}`", hint, OPTIMIZER


def onebit_needs_an_old_deepspeed(s: Situation) -> Found:
    if not (s.row and s.row.before):
        return
    pin = f'pip install "deepspeed=={NEWEST_ONEBIT}" on the nodes and environment.deepspeed: {NEWEST_ONEBIT}'
    if not s.deepspeed:
        yield (
            True,
            f"{s.optimizer} left DeepSpeed in {s.row.before}, and the job file does not say which the nodes have",
            pin,
            OPTIMIZER,
        )
    elif facts.version(s.deepspeed) >= facts.version(s.row.before):
        yield (
            True,
            f"{s.optimizer} is not in DeepSpeed {s.deepspeed}: it left in {s.row.before}, which ends after hours "
            f"in the queue with `{s.optimizer} is not a supported DeepSpeed Optimizer`",
            pin,
            OPTIMIZER,
        )


def optimizer_accepts_the_stage(s: Situation) -> Found:
    if s.row and s.stage not in s.row.zero:
        if s.row.onebit:
            hint = (
                "train.zero: 0 with it, or AdamW with ZeRO; ZeRO-3 compresses with ZeRO++ "
                "(zero_quantized_weights, zero_hpz_partition_size)"
            )
        else:
            hint = "train.zero: 0, or AdamW"
        yield (
            True,
            f"{s.optimizer} does not run with ZeRO stage {s.stage} ({s.row.source})",
            hint,
            ("train", "zero"),
        )


def optimizer_runs_here(s: Situation) -> Found:
    if s.row and s.row.gpu_only and not s.gpus:
        yield True, f"{s.optimizer} has no CPU implementation in DeepSpeed", "AdamW", OPTIMIZER
    if s.row and s.row.needs_offload and s.offloads("offload_optimizer") == "none":
        yield True, f"{s.optimizer} exists only on the CPU", "train.offload.optimizer: cpu", OPTIMIZER


def freeze_step_lies_within_the_run(s: Situation) -> Found:
    if not (s.row and s.row.onebit):
        return
    name = "var_freeze_step" if s.optimizer == "ZeroOneAdam" else "freeze_step"
    freeze = s.params.get(name, 100_000)
    at = (*OPTIMIZER, "freeze_step")
    if isinstance(freeze, int) and freeze >= s.steps:
        yield (
            True,
            f"compression would begin at step {freeze:,} and the run has {s.steps:,}: nothing is ever compressed",
            f"freeze_step: {max(1, s.steps // 5)} (15 to 25 % of the run)",
            at,
        )
    if freeze == 0:
        yield (
            True,
            "freeze_step 0 compresses from the start, and the loss diverges",
            "15 to 25 % of the steps",
            at,
        )
    if s.world == 1:
        yield False, "one rank has nobody to send gradients to: compression gains nothing", "AdamW", OPTIMIZER


def precision_is_one(s: Situation) -> Found:
    if s.on("fp16") and s.on("bf16"):
        yield True, "fp16 and bf16 are both enabled", "keep one", ("train", "deepspeed")
    if s.on("fp16") and not s.gpus:
        yield (
            True,
            "fp16 does not run on CPU: `Type fp16 is not supported on your device` (engine.py)",
            "bf16 or fp32",
            ("train", "precision"),
        )


def offload_is_not_ignored(s: Situation) -> Found:
    at: Path = ("train", "offload")
    if s.offloads("offload_param") != "none" and s.stage != 3:
        yield (
            True,
            f"parameters are offloaded only with ZeRO-3; at stage {s.stage} DeepSpeed ignores it without a word",
            "train.zero: 3, or leave offload.parameters out",
            (*at, "parameters"),
        )
    device = s.offloads("offload_optimizer")
    if device != "none" and s.stage == 0:
        yield (
            True,
            "the optimizer is offloaded only with ZeRO; at stage 0 DeepSpeed ignores it without a word",
            "train.zero: 1, 2 or 3",
            (*at, "optimizer"),
        )
    elif device == "nvme" and s.stage != 3:
        yield (
            True,
            f"the optimizer goes to NVMe only with ZeRO-3; at stage {s.stage} DeepSpeed ignores it",
            "train.zero: 3, or offload.optimizer: cpu",
            (*at, "optimizer"),
        )
    for what in ("offload_param", "offload_optimizer"):
        if s.offloads(what) == "nvme" and not s.zero[what].get("nvme_path"):
            yield True, f"{what} to NVMe needs a directory", "train.offload.nvme_path: /local_nvme", at


def onebit_resume(s: Situation) -> Found:
    if s.row and s.row.name == "OneBitAdam":
        yield (
            False,
            "DeepSpeed 0.19.6 does not restore OneBitAdam's `initialize` flag: replicas differ after a resume",
            "the reference trainer sets it (carry_on in train_gpt.py); a script of your own has to as well",
            OPTIMIZER,
        )


def pipeline_and_zero(s: Situation) -> Found:
    if s.pipeline > 1 and s.stage >= 2:
        yield (
            True,
            f"pipeline parallelism does not run with ZeRO-{s.stage}: gradients are partitioned before the stages "
            "have added theirs (runtime/pipe/engine.py asserts stage < 2)",
            "train.zero: 1, or no pipeline",
            ("train", "parallel", "pipeline"),
        )
    if s.pipeline > 1 and s.row and s.row.onebit:
        yield True, f"{s.optimizer} does not run with pipeline parallelism", "AdamW", OPTIMIZER
    if isinstance(s.config.get("pipeline"), dict) and s.config["pipeline"].get("enabled"):
        yield (
            False,
            "`pipeline: {enabled: true}` in the config does nothing: the model must be a PipelineModule",
            "leave it out",
            ("train", "deepspeed", "pipeline"),
        )


def params_are_known(s: Situation) -> Found:
    if "max_grad_norm" in s.params:
        yield (
            True,
            "max_grad_norm in the optimizer's params is refused by DeepSpeed",
            "train.gradient_clipping",
            (*OPTIMIZER, "params", "max_grad_norm"),
        )
    clipping = s.config.get("gradient_clipping", 0)
    if s.row and s.row.onebit and isinstance(clipping, (int, float)) and clipping > 0:
        yield (
            False,
            "gradient clipping has next to no effect in the compressed stage",
            "train.gradient_clipping: 0",
            ("train", "gradient_clipping"),
        )


def nothing_is_left_auto(s: Situation) -> Found:
    def visit(value: Any, path: Path) -> Iterator[Path]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from visit(child, (*path, key))
        elif value == "auto":
            yield path

    for path in visit(s.config, ()):
        yield (
            True,
            f"{'.'.join(map(str, path))} is `auto`, which only Hugging Face's Trainer resolves; plain DeepSpeed "
            "takes it for text",
            "write the value, or leave the key out",
            ("train", "deepspeed", *path),
        )


def hpz_divides_the_world(s: Situation) -> Found:
    part = s.zero.get("zero_hpz_partition_size", 1)
    if isinstance(part, int) and part > 1 and (part > s.world or s.world % part):
        yield (
            True,
            f"zero_hpz_partition_size {part} does not divide the {s.world} ranks",
            "the number of GPUs per node",
            ("train", "deepspeed", "zero_optimization"),
        )


def keys_are_known(s: Situation) -> Found:
    from launcher.yamldoc import suggest

    for key in s.config:
        if key not in TOP_LEVEL:
            hint = REPLACED.get(key) or suggest(key, sorted(TOP_LEVEL))
            yield (
                True,
                f"DeepSpeed has no key `{key}` and ignores it without a word",
                hint,
                ("train", "deepspeed", key),
            )


def keys_are_not_removed(s: Situation) -> Found:
    sections: tuple[tuple[Path, dict[str, Any], dict[str, str]], ...] = (
        ((), s.config, REMOVED),
        (("zero_optimization",), s.zero, REMOVED_FROM_ZERO),
    )
    for path, section, removed in sections:
        for key in section:
            if key in removed and not (s.deepspeed and facts.version(s.deepspeed) < facts.version(removed[key])):
                which = f"DeepSpeed {s.deepspeed}" if s.deepspeed else "the newest DeepSpeed"
                yield (
                    True,
                    f"`{key}` left DeepSpeed in {removed[key]}, and {which} refuses to start with it",
                    f"leave it out, or pin an older release on the nodes: environment.deepspeed: {NEWEST_ONEBIT}",
                    ("train", "deepspeed", *path, key),
                )


def sections_are_sections(s: Situation) -> Found:
    for key in sorted(SECTIONS & set(s.config)):
        if not isinstance(s.config[key], dict):
            yield (
                True,
                f"{key} is a section with keys, not `{s.config[key]!r}`",
                "leave it out, or write the keys below it",
                ("train", "deepspeed", key),
            )


OPTIMIZER: Path = ("train", "optimizer")
SECTIONS = frozenset(
    "optimizer scheduler zero_optimization bf16 bfloat16 fp16 activation_checkpointing aio flops_profiler".split()
)

# Keys that a release began to refuse (_REMOVED_TOP_LEVEL_CONFIG_KEYS in runtime/config.py of 0.19.7 and 0.19.8).
REMOVED = {
    **dict.fromkeys("nebula compression_training quantize_training sparse_attention".split(), "0.19.7"),
    **dict.fromkeys(
        "amp sparse_gradients eigenvalue elasticity graph_harvesting curriculum_learning "
        "progressive_layer_drop".split(),
        "0.19.8",
    ),
}
REMOVED_FROM_ZERO = {
    **dict.fromkeys("mics_shard_size mics_hierarchical_params_gather".split(), "0.19.7"),
    "zeropp_loco_param": "0.19.8",
}

# Top-level keys that DeepSpeed 0.19.6 to 0.19.8 read (runtime/config.py, runtime/constants.py).
TOP_LEVEL = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency
    data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue
    elasticity expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown nebula optimizer pipeline prescale_gradients
    progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type
    sequence_parallel_size sparse_attention
    sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown
    wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization""".split()
)
REPLACED = {
    "gradient_checkpointing": "train.activation_checkpointing",
    "sequence_length": "train.seq_len",
    "steps": "train.steps",
    "warmup_steps": "train.lr_schedule.warmup_steps",
    "max_source_length": "an argument of your script",
    "max_target_length": "an argument of your script",
}

RULES: tuple[Callable[[Situation], Found], ...] = (
    keys_are_known,
    keys_are_not_removed,
    sections_are_sections,
    optimizer_is_known,
    onebit_needs_an_old_deepspeed,
    optimizer_accepts_the_stage,
    optimizer_runs_here,
    freeze_step_lies_within_the_run,
    onebit_resume,
    precision_is_one,
    offload_is_not_ignored,
    pipeline_and_zero,
    params_are_known,
    nothing_is_left_auto,
    hpz_divides_the_world,
)


def judge(situation: Situation) -> tuple[list[Problem], list[str]]:
    """Every refusal, and notes on what runs but will surprise."""
    problems, notes = [], []
    for rule in RULES:
        for refused, message, hint, at in rule(situation):
            if refused:
                problems.append(Problem(message, hint, at))
            else:
                notes.append(f"{message}; {hint}" if hint else message)
    return problems, notes
