"""The DeepSpeed config of a plan, as a dict until somebody prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from launcher import facts
from launcher.plan import memory
from launcher.plan.batch import Batch
from launcher.plan.setup import Setup
from launcher.spec import LrSchedule, Optimizer, Train

# ZeRO buckets in elements: large enough for the network to reach its bandwidth, small enough for memory.
BUCKET = 200_000_000


def make(train: Train, setup: Setup, *, batch: Batch, optimizer_type: str, gpus: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": batch.total,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.gradient_clipping,
        "steps_per_print": 100,
    }
    if setup.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif setup.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    asked = train.optimizer_section
    config["optimizer"] = optimizer(
        asked, kind=optimizer_type, steps=train.steps, on_gpu=gpus, offloaded=setup.offload_optimizer != "none"
    )
    schedule = scheduler(train.lr_schedule, lr=asked.lr, steps=train.steps)
    if schedule:
        config["scheduler"] = schedule
    config["zero_optimization"] = zero(setup, nvme_path=train.offload.nvme_path)
    if setup.recompute in ("full", "cpu"):
        config["activation_checkpointing"] = {
            "partition_activations": False,
            "cpu_checkpointing": setup.recompute == "cpu",
        }
    return laid_over(config, train.deepspeed)


def optimizer(asked: Optimizer, *, kind: str, steps: int, on_gpu: bool, offloaded: bool) -> dict[str, Any]:
    """The section; `kind` is the type, which compression may have changed."""
    params: dict[str, Any] = {"lr": asked.lr}
    if asked.betas is not None:
        params["betas"] = list(asked.betas)
    if asked.eps is not None:
        params["eps"] = asked.eps
    if asked.weight_decay is not None:
        params["weight_decay"] = asked.weight_decay
    row = facts.optimizer(kind)
    if row and row.onebit:
        params["comm_backend_name"] = "nccl"  # the back end that needs cupy only; `mpi` needs mpi4py too
        freeze = asked.freeze_step if kind == asked.type else max(1, int(steps * facts.WARM))
        if freeze is not None:
            params["var_freeze_step" if row.name == "ZeroOneAdam" else "freeze_step"] = freeze
    if not on_gpu and not offloaded and kind.lower() in ("adam", "adamw"):
        params["torch_adam"] = True  # torch's own: DeepSpeed's would be compiled on every node first
    return {"type": kind, "params": {**params, **asked.params}}


def scheduler(schedule: LrSchedule, *, lr: float, steps: int) -> dict[str, Any] | None:
    warmup = schedule.warmup_steps
    if schedule.type == "cosine":
        params = {"total_num_steps": steps, "warmup_num_steps": max(warmup, 2), "cos_min_ratio": 0.1}
        return {"type": "WarmupCosineLR", "params": params}
    # without warmup_max_lr DeepSpeed takes 1e-3, whatever the optimizer's lr says
    ramp = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": lr,
        "warmup_num_steps": max(warmup, 2),
        "warmup_type": "linear",
    }
    if schedule.type == "linear":
        return {"type": "WarmupDecayLR", "params": {"total_num_steps": steps, **ramp}}
    return {"type": "WarmupLR", "params": ramp} if warmup else None


def zero(setup: Setup, *, nvme_path: str | None) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": setup.stage}
    if setup.stage == 0:
        return section
    section.update(overlap_comm=setup.overlap, contiguous_gradients=True, reduce_bucket_size=setup.reduce_bucket)
    if setup.stage == 3:
        section.update(
            stage3_prefetch_bucket_size=setup.prefetch_bucket,
            stage3_param_persistence_threshold=setup.persistence,
            stage3_gather_16bit_weights_on_model_save=True,
        )
        if setup.hpz > 1:
            section["zero_hpz_partition_size"] = setup.hpz
        if setup.quantized_weights:
            section["zero_quantized_weights"] = True
        if setup.quantized_gradients:
            section["zero_quantized_gradients"] = True
    else:
        section["allgather_bucket_size"] = setup.allgather_bucket
    if setup.offload_optimizer != "none":
        section["offload_optimizer"] = offload(setup.offload_optimizer, nvme_path)
    if setup.offload_parameters != "none":
        section["offload_param"] = offload(setup.offload_parameters, nvme_path)
        if setup.offload_parameters == "nvme":
            section["offload_param"]["buffer_size"] = memory.swap_buffer(setup)
    return section


def with_buckets(setup: Setup) -> Setup:
    """The sizes that we write, in elements: DeepSpeed's documentation derives the last two from the width."""
    hidden = setup.shape.hidden
    return replace(
        setup,
        reduce_bucket=BUCKET,
        allgather_bucket=BUCKET,
        prefetch_bucket=min(BUCKET, int(0.9 * hidden * hidden) or 1),
        persistence=10 * hidden,
    )


def read(config: Mapping[str, Any], base: Setup) -> Setup:
    """What a DeepSpeed config says about a setup, over what it leaves open. Values of a wrong type say nothing."""
    found: dict[str, Any] = {}
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    for key, (field, kind) in ZERO_FIELDS.items():
        value = zero.get(key)
        if isinstance(value, bool) if kind is bool else _is_whole(value):
            found[field] = kind(value)
    for key, field in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        section = zero.get(key)
        device = section.get("device", "none") if isinstance(section, Mapping) else None
        if device in ("none", "cpu", "nvme"):
            found[field] = device
    for name in ("bf16", "bfloat16", "fp16"):
        section = config.get(name)
        if isinstance(section, Mapping) and section.get("enabled") is True:
            found["precision"] = "fp16" if name == "fp16" else "bf16"
    types = config.get("data_types")
    gradient = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    for field, word in (("gradient", gradient), ("communication", config.get("communication_data_type"))):
        if isinstance(word, str) and word.lower() in facts.DTYPES:
            found[field] = facts.DTYPES[word.lower()]
    section = config.get("optimizer")
    row = facts.optimizer(str(section.get("type", ""))) if isinstance(section, Mapping) else None
    if row:
        found["optimizer_state"] = row.state
    for key, field in (
        ("train_micro_batch_size_per_gpu", "micro"),
        ("gradient_accumulation_steps", "accumulation"),
    ):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[field] = value
    return replace(base, **found)


ZERO_FIELDS: dict[str, tuple[str, type]] = {
    "stage": ("stage", int),
    "overlap_comm": ("overlap", bool),
    "reduce_bucket_size": ("reduce_bucket", int),
    "allgather_bucket_size": ("allgather_bucket", int),
    "prefetch_bucket_size": ("prefetch_bucket", int),  # DeepSpeed takes both names
    "stage3_prefetch_bucket_size": ("prefetch_bucket", int),
    "param_persistence_threshold": ("persistence", int),
    "stage3_param_persistence_threshold": ("persistence", int),
    "zero_hpz_partition_size": ("hpz", int),
    "zero_quantized_weights": ("quantized_weights", bool),
    "zero_quantized_gradients": ("quantized_gradients", bool),
}


def _is_whole(value: Any) -> TypeGuard[int | float]:
    """5e8 is; -1, 1.5 and infinity are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 10**15 and value % 1 == 0


def offload(device: str, path: str | None) -> dict[str, Any]:
    section: dict[str, Any] = {"device": device, "pin_memory": True}
    if device == "nvme" and path:
        section["nvme_path"] = path
    return section


def laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Raw keys on top, section by section: {zero: {a: 1}} and {zero: {b: 2}} keep both."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
