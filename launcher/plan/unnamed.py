"""A job whose model nobody named: its program brings its own configuration, and no memory or time is predicted.

What only a planner can act on is refused where it is given; the rest is written into a DeepSpeed config if the job
asks for one, and into nothing else.
"""

from __future__ import annotations

from typing import Any

from launcher.errors import Path, Problem
from launcher.plan import dsconfig
from launcher.plan.batch import Batch
from launcher.spec import JobSpec
from launcher.spec.train import LrSchedule, Offload, Train

NAME_IT = "model: a preset (`dslaunch presets`), a config.json or a shape"
BY_HAND = "say it in your program's own arguments"
A_CONFIG = "train.config_flag, say --deepspeed, hands a DeepSpeed config over with it"


def wants_config(spec: JobSpec) -> bool:
    """Whether a DeepSpeed config is written: with a model always, without one only where the job asks for it."""
    train = spec.train
    return spec.model is not None or bool(train.deepspeed) or train.config_flag not in (None, "none")


def problems(spec: JobSpec) -> list[Problem]:
    """Fields that were given and would do nothing, each with where to say it instead."""
    train, plain = spec.train, Train()
    if not (train.script or train.module or train.command):
        message = "neither a model nor a program is named: there is nothing to train"
        hint = "model: gpt2 for the reference trainer; or train.script, module or command"
        return [Problem(message, hint, ("train",))]
    planned: tuple[tuple[Path, bool], ...] = (
        (("activation_checkpointing",), train.activation_checkpointing != "auto"),
        (("attention",), train.attention != "auto"),
        (("lora",), train.lora is not None),
        (("compression",), train.compression != "auto"),
        (("parallel", "virtual"), train.parallel.virtual != 1),
        (("parallel", "split_hidden"), train.parallel.split_hidden),
        (("parallel", "tensor"), train.parallel.tensor == "auto"),
        (("parallel", "pipeline"), train.parallel.pipeline == "auto"),
    )
    found = [_idle(path, f"{BY_HAND}; or {NAME_IT}") for path, given in planned if given]
    written: tuple[tuple[Path, bool], ...] = (
        (("zero",), train.zero != "auto"),
        (("offload",), train.offload != Offload()),
        (("precision",), train.precision != "auto"),
        (("optimizer",), train.optimizer_section != plain.optimizer),
        (("lr_schedule",), train.lr_schedule != LrSchedule()),
        (("gradient_clipping",), train.gradient_clipping != plain.gradient_clipping),
    )
    if not wants_config(spec):
        found += [_idle(path, f"{BY_HAND}; {A_CONFIG}; or {NAME_IT}") for path, given in written if given]
    elif train.offload != Offload() and train.zero == "auto":
        message = "offload is given, and without a model nobody chooses the ZeRO stage that it needs"
        found.append(Problem(message, "train.zero: 2, or 3 for parameters", ("train", "offload")))
    elif train.offload.nvme_path and "nvme" not in (train.offload.optimizer, train.offload.parameters):
        message = f"nvme_path {train.offload.nvme_path} is named and nothing is offloaded to nvme"
        found.append(Problem(message, "optimizer: nvme, or leave it out", ("train", "offload", "nvme_path")))
    if wants_config(spec) and train.lr_schedule.type != "constant" and not spec.steps:
        message = f"lr_schedule {train.lr_schedule.type} ends with the run, and nobody said how many steps that has"
        found.append(Problem(message, "train.steps", ("train", "lr_schedule", "type")))
    if train.checkpoint.every == "auto" and not spec.steps:
        message = "checkpoint.every auto is a share of a run whose steps nobody said"
        found.append(Problem(message, "a number of steps, or train.steps", ("train", "checkpoint", "every")))
    return found


def _idle(path: Path, hint: str) -> Problem:
    message = f"{'.'.join(map(str, path))} is given, and without a model or a DeepSpeed config it would do nothing"
    return Problem(message, hint, ("train", *path))


def config(spec: JobSpec, batch: Batch | None) -> dict[str, Any]:
    """What the job file says and no more: what it leaves out is DeepSpeed's default, or the program's affair."""
    train = spec.train
    found: dict[str, Any] = {}
    if batch:
        found = {
            "train_batch_size": batch.total,
            "train_micro_batch_size_per_gpu": batch.micro,
            "gradient_accumulation_steps": batch.accumulation,
        }
    if not fills_in(train.deepspeed) or train.gradient_clipping != Train.gradient_clipping:
        found["gradient_clipping"] = train.gradient_clipping
    if train.precision in ("bf16", "fp16"):
        found[train.precision] = {"enabled": True}
    asked = train.optimizer_section
    offloads = train.offload.optimizer in ("cpu", "nvme")
    if asked != Train().optimizer:
        gpus = spec.resources.gpus_per_node > 0
        found["optimizer"] = dsconfig.optimizer(
            asked, kind=asked.type, steps=train.steps, on_gpu=gpus, offloaded=offloads
        )
    schedule = dsconfig.scheduler(train.lr_schedule, lr=asked.lr, steps=train.steps)
    if schedule:
        found["scheduler"] = schedule
    if train.zero != "auto":
        zero: dict[str, Any] = {"stage": train.zero}
        places = (("offload_optimizer", train.offload.optimizer), ("offload_param", train.offload.parameters))
        for key, device in places:
            if device in ("cpu", "nvme"):
                zero[key] = dsconfig.offload(device, train.offload.nvme_path)
        found["zero_optimization"] = zero
    return found


def contradictions(typed: dict[str, Any], raw: dict[str, Any], at: tuple[str, ...] = ()) -> list[Problem]:
    """Keys of `train.deepspeed` that say something else than the fields do."""
    found = []
    for key, value in typed.items():
        if key not in raw or raw[key] == value:
            continue
        if isinstance(value, dict) and isinstance(raw[key], dict):
            found += contradictions(value, raw[key], (*at, key))
        elif (*at, key) != ("gradient_clipping",) or value != Train.gradient_clipping:
            path = ".".join((*at, key))
            message = f"deepspeed.{path} {raw[key]} contradicts the {value} of the fields beside it"
            found.append(Problem(message, "say it once", ("train", "deepspeed", *at, key)))
    return found


def fills_in(raw: object) -> bool:
    """Whether Hugging Face's Trainer reads this config: nobody else knows what "auto" is."""
    if isinstance(raw, dict):
        return any(map(fills_in, raw.values()))
    return raw == "auto"
