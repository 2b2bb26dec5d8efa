"""What DeepSpeed refuses, and what it accepts and then ignores. Each row: when, what, what instead.

The rules look at the finished DeepSpeed config, so that raw `deepspeed:` keys are judged too.
Sources: the check in DeepSpeed named in each row, and runs on CPU with 0.19.6 and 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
        return facts.optimizer(self.optimizer)

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
        yield (
            True,
            f"dslaunch's table has no optimizer `{s.optimizer}`: nobody checked what it needs",
            hint,
            OPTIMIZER,
        )


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
    if s.row and s.stage not in stages(s.row, s.config):
        if s.row.onebit:
            hint = (
                "train.zero: 0 with it, or AdamW with ZeRO; ZeRO-3 compresses with ZeRO++ "
                "(zero_quantized_weights, zero_hpz_partition_size)"
            )
        else:
            hint = "train.zero: 0, or AdamW, or train.deepspeed: {zero_allow_untested_optimizer: true}"
        yield (
            True,
            f"{s.optimizer} does not run with ZeRO stage {s.stage} ({s.row.source})",
            hint,
            ("train", "zero"),
        )


def stages(row: facts.OptimizerRow, config: dict[str, Any]) -> list[int]:
    """The ZeRO stages an optimizer runs with; the raw key that calls off DeepSpeed's test lets it through."""
    refused = row.zero == [0] and not row.onebit
    untested = refused and config.get("zero_allow_untested_optimizer") is True
    return [0, 1, 2, 3] if untested else row.zero


def optimizer_runs_here(s: Situation) -> Found:
    if s.row and s.row.gpu_only and not s.gpus:
        yield True, f"{s.optimizer} has no CPU implementation in DeepSpeed", "AdamW", OPTIMIZER


def optimizer_takes_its_params(s: Situation) -> Found:
    for key in s.row.lacks if s.row else ():
        if key in s.params:
            yield True, f"{s.optimizer} takes no {key}: a TypeError on every rank", "leave it out", (*OPTIMIZER, key)
    betas = s.params.get("betas", [0.9, 0.999])
    if betas != "auto" and not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(map(_is_beta, betas))):
        yield (
            True,
            f"betas {betas} are not two numbers of at least 0 and below 1",
            "betas: [0.9, 0.999]",
            (*OPTIMIZER, "betas"),
        )
    for key, positive in (("lr", False), ("eps", True), ("weight_decay", False)):
        value = s.params.get(key, 1.0)
        if value != "auto" and (not _is_number(value) or value < 0 or (positive and value == 0)):
            wanted = "a number above 0" if positive else "a number of at least 0"
            yield True, f"{key} is {wanted}, not `{value}`", "1e-8" if positive else "0.01", (*OPTIMIZER, key)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_beta(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


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
    for name in ("optimizer", "scheduler"):
        section = s.config.get(name)
        if isinstance(section, dict) and not isinstance(section.get("params", {}), dict):
            yield (
                True,
                f"{name}.params is a section with keys, not `{section['params']!r}`",
                "leave it out, or write the keys below it",
                ("train", "deepspeed", name, "params"),
            )
    for key in sorted(SECTIONS & set(s.config)):
        if not isinstance(s.config[key], dict):
            yield (
                True,
                f"{key} is a section with keys, not `{s.config[key]!r}`",
                "leave it out, or write the keys below it",
                ("train", "deepspeed", key),
            )


def zero_keys_are_known(s: Situation) -> Found:
    from launcher.yamldoc import suggest

    parts: tuple[tuple[tuple[str, ...], Any, Iterable[str]], ...] = (
        (("zero_optimization",), s.zero, [*ZERO, *REMOVED_FROM_ZERO]),
        *((("zero_optimization", name), s.zero.get(name), keys) for name, keys in OFFLOAD.items()),
    )
    for path, section, known in parts:
        for key in section if isinstance(section, dict) else ():
            where = ".".join(path)
            if key not in known:
                message = f"{where} has no key `{key}`, and DeepSpeed refuses to start with one it does not know"
                yield True, message, suggest(key, known), ("train", "deepspeed", *path, key)
            elif key in ADDED_TO_ZERO and s.deepspeed and facts.version(s.deepspeed) <= facts.version(NEWEST_ONEBIT):
                message = f"{where}.{key} came after DeepSpeed {s.deepspeed}, which refuses to start with it"
                yield True, message, "leave it out", ("train", "deepspeed", *path, key)


def values_have_their_type(s: Situation) -> Found:
    parts: tuple[tuple[tuple[str, ...], Any, dict[str, str]], ...] = (
        ((), s.config, TOP_LEVEL_TYPES),
        (("zero_optimization",), s.zero, ZERO),
        *((("zero_optimization", name), s.zero.get(name), types) for name, types in OFFLOAD.items()),
    )
    for path, section, types in parts:
        for key, value in section.items() if isinstance(section, dict) else ():
            wanted = types.get(key, "")
            if wanted and value != "auto" and not (value is None and key in MAY_BE_NULL) and not FITS[wanted](value):
                message = f"{'.'.join((*path, key))} is {wanted}, not `{value!r}`"
                yield True, message, "", ("train", "deepspeed", *path, key)


def gradients_have_the_models_type(s: Situation) -> Found:
    section = s.config.get("data_types")
    asked = section.get("grad_accum_dtype") if isinstance(section, dict) else None
    model = "fp16" if s.on("fp16") else "bf16" if s.on("bf16") or s.on("bfloat16") else "fp32"
    gradients = DTYPES.get(asked, model) if isinstance(asked, str) else model
    if s.stage == 0 and gradients != model:
        yield (
            True,
            f"grad_accum_dtype {gradients} with {model} weights runs only with ZeRO: at stage 0 DeepSpeed ends in "
            "`unsupported mix` (engine.py)",
            "train.zero: 1, or leave grad_accum_dtype out",
            ("train", "deepspeed", "data_types", "grad_accum_dtype"),
        )


def scheduler_runs(s: Situation) -> Found:
    from launcher.yamldoc import suggest

    section = s.config.get("scheduler")
    if not isinstance(section, dict):
        return
    at: Path = ("train", "deepspeed", "scheduler")
    kind, params = section.get("type"), section.get("params")
    if kind is None:
        yield True, "a scheduler without a type: DeepSpeed ignores it without a word", "type: WarmupLR", at
    elif kind in TORCH_SCHEDULERS:
        return
    elif not isinstance(kind, str) or kind not in SCHEDULERS:
        known = [*SCHEDULERS, *TORCH_SCHEDULERS]
        yield True, f"no scheduler `{kind}` in DeepSpeed or torch", suggest(str(kind), known), (*at, "type")
    elif params is None:
        yield True, f"{kind} without params is a TypeError on every rank", "params: {...}", at
    elif isinstance(params, dict):
        yield from _scheduler_params(kind, params, at=(*at, "params"))


def _scheduler_params(kind: str, params: dict[str, Any], *, at: Path) -> Found:
    from launcher.yamldoc import suggest

    required, optional = (row.split() for row in SCHEDULERS[kind])
    for key in required:
        if key not in params:
            yield True, f"{kind} without {key} is a TypeError on every rank", f"params: {{{key}: ...}}", at
    for key, value in params.items():
        if key not in (*required, *optional, "last_batch_iteration"):
            hint = suggest(key, [*required, *optional])
            yield True, f"{kind} takes no {key}: a TypeError on every rank", hint, (*at, key)
        elif isinstance(value, str) and key != "warmup_type" and value != "auto":
            yield True, f"{key} is a number, not the text `{value}`", "write it without quotes", (*at, key)
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        message = "WarmupDecayLR without warmup_max_lr takes 0.001, whatever the optimizer's lr says"
        yield True, message, "warmup_max_lr: the learning rate, or train.lr_schedule", at
    warmup = params.get("warmup_num_steps", 1000)
    if warmup != "auto" and not isinstance(warmup, str) and not (FITS[WHOLE](warmup) and warmup >= 1):
        yield True, f"warmup_num_steps is a whole number of at least 1, not `{warmup}`", "", (*at, "warmup_num_steps")


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

ADDED_TO_ZERO = frozenset({"compute_grad_norm", "parameter_alignment"})  # in 0.19.8, not in 0.19.6

# What the value of a key may be.
BOOL, NUMBER, WHOLE, SECTION = "true or false", "a number of at least 0", "a whole number", "a section with keys"
STAGE, DEVICE, TEXT = "0, 1, 2 or 3", "none, cpu or nvme", "text"
FITS: dict[str, Callable[[Any], bool]] = {
    BOOL: lambda value: isinstance(value, bool),
    NUMBER: lambda value: _is_number(value) and value >= 0,
    WHOLE: lambda value: _is_number(value) and value >= 0 and value % 1 == 0,
    SECTION: lambda value: isinstance(value, dict),
    STAGE: lambda value: _is_number(value) and value in (0, 1, 2, 3),
    DEVICE: lambda value: value in ("none", "cpu", "nvme"),
    TEXT: lambda value: isinstance(value, str),
}
MAY_BE_NULL = frozenset(
    """overlap_comm offload_param offload_optimizer zenflow cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory nvme_path steps_per_print""".split()
)
TOP_LEVEL_TYPES = {
    **dict.fromkeys("gradient_clipping gradient_predivide_factor".split(), NUMBER),
    **dict.fromkeys("steps_per_print sequence_parallel_size".split(), WHOLE),
    **dict.fromkeys(
        """prescale_gradients disable_allgather dump_state disable_python_gc wall_clock_breakdown memory_breakdown
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer dataloader_drop_last
        use_data_before_expert_parallelism managed_gradient_accumulation""".split(),
        BOOL,
    ),
}
_STAGE3_COUNTS = """prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance module_granularity_threshold""".split()
_STAGE3_BOOLS = "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential".split()
# What DeepSpeedZeroConfig takes, by names and aliases (runtime/zero/config.py of 0.19.6 and 0.19.8).
ZERO: dict[str, str] = {
    "stage": STAGE,
    **dict.fromkeys("offload_param offload_optimizer zenflow leaf_module".split(), SECTION),
    **dict.fromkeys("reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size".split(), WHOLE),
    **dict.fromkeys((form + name for name in _STAGE3_COUNTS for form in ("", "stage3_")), WHOLE),
    **dict.fromkeys((form + name for name in _STAGE3_BOOLS for form in ("", "stage3_")), BOOL),
    **dict.fromkeys(
        """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
        compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param cpu_offload_use_pin_memory
        cpu_offload stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
        round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights
        zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
        log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory""".split(),
        BOOL,
    ),
}
# The same of its two offload sections (runtime/zero/offload_config.py).
_OFFLOAD_BOTH = {"device": DEVICE, "nvme_path": TEXT, "buffer_count": WHOLE, "pin_memory": BOOL}
OFFLOAD: dict[str, dict[str, str]] = {
    "offload_param": {**_OFFLOAD_BOTH, "buffer_size": WHOLE, "max_in_cpu": WHOLE},
    "offload_optimizer": {
        **_OFFLOAD_BOTH,
        **dict.fromkeys("pipeline_read pipeline_write fast_init super_offload".split(), BOOL),
        **dict.fromkeys("ratio cpuadam_cores_perc".split(), NUMBER),
    },
}
DTYPES = {
    **dict.fromkeys(["torch.float16", "fp16", "float16", "half"], "fp16"),
    **dict.fromkeys(["torch.float32", "fp32", "float32", "float"], "fp32"),
    **dict.fromkeys(["torch.bfloat16", "bf16", "bfloat16"], "bf16"),
}

_WARMUP = "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type"
# type: parameters it needs, parameters it may have (runtime/lr_schedules.py of 0.19.6 and 0.19.8)
SCHEDULERS = {
    "WarmupLR": ("", _WARMUP),
    "WarmupDecayLR": ("total_num_steps", _WARMUP),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type"),
    "OneCycle": (
        "cycle_min_lr cycle_max_lr",
        """decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count
        cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate""",
    ),
    "LRRangeTest": (
        "",
        "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase",
    ),
}
# DeepSpeed looks for other names in torch.optim.lr_scheduler; these need numbers only.
TORCH_SCHEDULERS = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
    "MultiStepLR", "OneCycleLR", "PolynomialLR", "StepLR",
)  # fmt: skip

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
    zero_keys_are_known,
    values_have_their_type,
    gradients_have_the_models_type,
    scheduler_runs,
    optimizer_is_known,
    onebit_needs_an_old_deepspeed,
    optimizer_accepts_the_stage,
    optimizer_runs_here,
    optimizer_takes_its_params,
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
