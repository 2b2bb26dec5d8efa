"""The DeepSpeed config of a plan, as a dict until somebody prints it."""

from __future__ import annotations

from typing import Any

from launcher import facts
from launcher.plan.batch import Batch
from launcher.spec import LrSchedule, Optimizer, Train

# ZeRO buckets in elements: large enough for the network to reach its bandwidth, small enough for memory.
BUCKET = 200_000_000


def make(
    train: Train,
    *,
    batch: Batch,
    stage: int,
    precision: str,
    recompute: bool,
    hidden: int,
    gpus: bool,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": batch.total,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.gradient_clipping,
        "steps_per_print": 100,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    config["optimizer"] = optimizer(train.optimizer_section, on_gpu=gpus, offloaded=train.offload.optimizer != "none")
    scheduler = _scheduler(train.lr_schedule, lr=train.optimizer_section.lr, steps=train.steps)
    if scheduler:
        config["scheduler"] = scheduler
    config["zero_optimization"] = zero(train, stage=stage, hidden=hidden)
    if recompute:
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
    return laid_over(config, train.deepspeed)


def optimizer(asked: Optimizer, *, on_gpu: bool, offloaded: bool) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": asked.lr}
    if asked.betas is not None:
        params["betas"] = list(asked.betas)
    if asked.eps is not None:
        params["eps"] = asked.eps
    if asked.weight_decay is not None:
        params["weight_decay"] = asked.weight_decay
    row = facts.optimizer(asked.type)
    if row and row.onebit:
        params["comm_backend_name"] = "nccl"  # the back end that needs cupy only; `mpi` needs mpi4py too
        if asked.freeze_step is not None:
            params["var_freeze_step" if row.name == "ZeroOneAdam" else "freeze_step"] = asked.freeze_step
    if not on_gpu and not offloaded and asked.type.lower() in ("adam", "adamw"):
        params["torch_adam"] = True  # torch's own: DeepSpeed's would be compiled on every node first
    return {"type": asked.type, "params": {**params, **asked.params}}


def _scheduler(schedule: LrSchedule, *, lr: float, steps: int) -> dict[str, Any] | None:
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


def zero(train: Train, *, stage: int, hidden: int) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return section
    section.update(overlap_comm=True, contiguous_gradients=True, reduce_bucket_size=BUCKET)
    if stage == 3:
        section.update(
            # the sizes that DeepSpeed's documentation derives from the width
            stage3_prefetch_bucket_size=min(BUCKET, int(0.9 * hidden * hidden) or 1),
            stage3_param_persistence_threshold=10 * hidden,
            stage3_gather_16bit_weights_on_model_save=True,
        )
    else:
        section["allgather_bucket_size"] = BUCKET
    offload = train.offload
    if offload.optimizer != "none":
        section["offload_optimizer"] = _offload(offload.optimizer, offload.nvme_path)
    if offload.parameters != "none":
        section["offload_param"] = _offload(offload.parameters, offload.nvme_path)
    return section


def _offload(device: str, path: str | None) -> dict[str, Any]:
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
