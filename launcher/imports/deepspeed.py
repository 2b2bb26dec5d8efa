"""A DeepSpeed config as fields of a job file's `train`; what has no field stays a DeepSpeed key."""

from __future__ import annotations

from typing import Any

from launcher.errors import Path

SIMPLE: dict[str, Path] = {
    "train_batch_size": ("global_batch",),
    "train_micro_batch_size_per_gpu": ("micro_batch",),
    "gradient_accumulation_steps": ("gradient_accumulation",),
    "gradient_clipping": ("gradient_clipping",),
}
DEVICES = {"cpu", "nvme", "none"}
OPTIMIZER = ("lr", "betas", "eps", "weight_decay", "freeze_step")


def fields(config: dict[str, Any]) -> tuple[dict[Path, Any], dict[str, Any]]:
    """{"zero_optimization": {"stage": 3, "sub_group_size": 1e9}} is zero: 3, and one key that stays.

    Values `auto` are Hugging Face's to fill in and say nothing.
    """
    found: dict[Path, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in config.items():
        if value == "auto":
            continue
        if key in SIMPLE and isinstance(value, (int, float)):
            found[SIMPLE[key]] = value
        elif key in ("bf16", "bfloat16", "fp16") and isinstance(value, dict):
            more = {name: child for name, child in value.items() if name != "enabled" and child != "auto"}
            if value.get("enabled") is True:
                found[("precision",)] = "fp16" if key == "fp16" else "bf16"
                if more:
                    rest[key] = more
        elif key == "zero_optimization" and isinstance(value, dict):
            kept = _zero(value, found)
            if kept:
                rest[key] = kept
        elif key == "optimizer" and isinstance(value, dict) and isinstance(value.get("type"), str):
            found[("optimizer",)] = _optimizer(value)
        elif key == "scheduler":
            continue  # dslaunch makes it of lr_schedule and steps
        else:
            rest[key] = value
    return found, rest


def _zero(section: dict[str, Any], found: dict[Path, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in section.items():
        if key == "stage" and isinstance(value, int):
            found[("zero",)] = value
        elif key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            device = value.get("device", "none")
            if device in DEVICES:
                found[("offload", "optimizer" if key == "offload_optimizer" else "parameters")] = device
            if isinstance(value.get("nvme_path"), str) and device == "nvme":
                found[("offload", "nvme_path")] = value["nvme_path"]
            more = {name: child for name, child in value.items() if name not in ("device", "nvme_path", "pin_memory")}
            if more:
                kept[key] = more
        elif value != "auto":
            kept[key] = value
    return kept


def _optimizer(section: dict[str, Any]) -> dict[str, Any]:
    params = {key: value for key, value in section.get("params", {}).items() if value != "auto"}
    made = {"type": section["type"], **{key: params.pop(key) for key in OPTIMIZER if key in params}}
    if params:
        made["params"] = params
    return made
