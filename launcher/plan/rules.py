"""What DeepSpeed refuses, and what it accepts and then ignores or takes for something else.

A rule is a function that looks at the finished DeepSpeed config and yields findings; what a finding's id
means, how bad it is and which check in DeepSpeed is behind it stands in data/rules.yaml.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import field, replace
from functools import cache
from typing import Any, Literal

from launcher import facts, yamldoc
from launcher.errors import Path
from launcher.record import record
from launcher.spec import Shape
from launcher.yamldoc import suggest

NEWEST_ONEBIT = "0.19.6"
REMOVE: Any = object()  # in an edit: take the key out


@record
class Row:
    """A row of data/rules.yaml. `outcome` is what DeepSpeed does about it."""

    id: str
    name: str
    severity: Literal["error", "warning", "note"]
    title: str
    why: str
    fix: str = ""
    source: str = ""
    outcome: Literal["refused", "ignored", "differs", "advice"] = "advice"
    since: str = ""  # the first release it holds for, when not for all
    until: str = ""  # the last one
    proof: str = "cpu"  # or why a CPU cannot show it: "needs gpu: ..."


@record
class Finding:
    """One row of the table, found in one config."""

    rule: str
    message: str
    fix: str = ""  # in words of a DeepSpeed config: "zero_optimization.stage: 3"
    path: Path = ()  # in the DeepSpeed config: ("zero_optimization", "offload_param")
    job_fix: str = ""  # in words of a job file, where they differ: "train.zero: 3"
    edits: tuple[tuple[Path, Any], ...] = ()  # what mends it for certain; REMOVE takes a key out

    @property
    def row(self) -> Row:
        return rows()[self.rule]

    @property
    def severity(self) -> str:
        return self.row.severity


@cache
def rows() -> dict[str, Row]:
    return {id: Row(id, **row) for id, row in yamldoc.load_tables(facts.DATA / "rules.yaml").items()}


@record
class Situation:
    """A config with what is known around it; None and "" mean that nobody said."""

    config: dict[str, Any] = field(default_factory=dict)
    gpus: bool = True
    world: int | None = None  # ranks
    per_node: int | None = None
    pipeline: int = 1  # stages of a PipelineModule
    steps: int | None = None
    deepspeed: str = ""  # on the nodes
    shape: Shape | None = None
    gpu: facts.Gpu | None = None
    replicas: int | None = None  # data-parallel ranks, where they are not world // pipeline
    packages: frozenset[str] | None = None  # Python packages on the nodes
    client: str | None = None  # the class of the optimizer that the program hands over; "" when there is none
    trainer: Literal["plain", "hf"] = "plain"  # hf: Hugging Face's Trainer fills in what is "auto"

    @property
    def zero(self) -> dict[str, Any]:
        section = self.config.get("zero_optimization", {})
        return section if isinstance(section, dict) else {}

    @property
    def stage(self) -> int:
        if isinstance(self.config.get("zero_optimization"), bool):
            return int(self.config["zero_optimization"])
        stage = self.zero.get("stage", 0)
        return int(stage) if FITS["stage"].plain(stage) or FITS["stage"].converted(stage) else 0

    @property
    def optimizer(self) -> str:
        section = self.config.get("optimizer")
        kind = section.get("type") if isinstance(section, dict) else None
        return "" if kind is None else str(kind)

    @property
    def data_parallel(self) -> int | None:
        """The ranks that DeepSpeed divides the batch by: 8 with a sequence_parallel_size of 2 are 4."""
        sequence = self.config.get("sequence_parallel_size")
        ways = sequence if isinstance(sequence, int) and sequence > 0 else 1
        return self.replicas or (self.world // (self.pipeline * ways) if self.world else None)

    @property
    def row(self) -> facts.OptimizerRow | None:
        return facts.optimizer(self.optimizer)

    @property
    def params(self) -> dict[str, Any]:
        section = self.config.get("optimizer")
        params = section.get("params") if isinstance(section, dict) else None
        return params if isinstance(params, dict) else {}

    @property
    def model_type(self) -> str:
        return "fp16" if self.on("fp16") else "bf16" if self.on("bf16") or self.on("bfloat16") else "fp32"

    @property
    def gradient_type(self) -> str:
        """What gradients are accumulated in; empty when DeepSpeed does not know the word."""
        section = self.config.get("data_types")
        asked = section.get("grad_accum_dtype") if isinstance(section, dict) else None
        if asked is None or asked == "auto":
            return self.model_type
        return facts.DTYPES.get(asked, "") if isinstance(asked, str) else ""

    def on(self, section: str) -> bool:
        value = self.config.get(section, {})
        enabled = value.get("enabled") if isinstance(value, dict) else False
        return enabled is True or enabled == 1 or (isinstance(enabled, str) and enabled.lower() in TRUE)

    def offloads(self, what: str) -> str:
        old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}.get(what, "")
        if self.zero.get(old) is True:
            return "cpu"
        value = self.zero.get(what, {})
        return str(value.get("device", "none")) if isinstance(value, dict) else "none"

    def before(self, release: str) -> bool:
        """The nodes have an older DeepSpeed; nobody said: they have the newest."""
        return bool(self.deepspeed) and facts.version(self.deepspeed) < facts.version(release)


Found = Iterator[Finding]
STAGE_PATH: Path = ("zero_optimization", "stage")
TYPE: Path = ("optimizer", "type")


def optimizer_is_known(s: Situation) -> Found:
    if s.optimizer and s.row is None:
        message = f"dslaunch's table has no optimizer `{s.optimizer}`: nobody checked what it needs"
        yield Finding("DSL020", message, suggest(s.optimizer, facts.optimizers()), TYPE)


def onebit_needs_an_old_deepspeed(s: Situation) -> Found:
    if not (s.row and s.row.before) or s.before(s.row.before):
        return
    if s.deepspeed:
        message = (
            f"{s.optimizer} is not in DeepSpeed {s.deepspeed}: it left in {s.row.before}, which ends after hours "
            f"in the queue with `{s.optimizer} is not a supported DeepSpeed Optimizer`"
        )
    else:
        message = f"{s.optimizer} left DeepSpeed in {s.row.before}, and nobody said which the nodes have"
    pin = f'pip install "deepspeed=={NEWEST_ONEBIT}" on the nodes'
    yield Finding("DSL021", message, pin, TYPE, f"{pin} and environment.deepspeed: {NEWEST_ONEBIT}")


def optimizer_accepts_the_stage(s: Situation) -> Found:
    if not s.row or s.stage in stages(s.row, s.config):
        return
    message = f"{s.optimizer} does not run with ZeRO stage {s.stage} ({s.row.source})"
    if s.row.onebit:
        rest = (
            "with it, or AdamW with ZeRO; ZeRO-3 compresses with ZeRO++ "
            "(zero_quantized_weights, zero_hpz_partition_size)"
        )
        yield Finding("DSL023", message, f"zero_optimization.stage: 0 {rest}", STAGE_PATH, f"train.zero: 0 {rest}")
    elif s.row.zero == [0]:
        key = "zero_allow_untested_optimizer"
        yield Finding(
            "DSL022",
            message,
            f"zero_optimization.stage: 0, or AdamW, or {key}: true",
            STAGE_PATH,
            f"train.zero: 0, or AdamW, or train.deepspeed: {{{key}: true}}",
        )
    else:
        scatter: Path = ("zero_optimization", "reduce_scatter")
        fix = "zero_optimization.reduce_scatter: false, or stage: 2"
        job_fix = "train.zero: 2, or train.deepspeed: {zero_optimization: {reduce_scatter: false}}"
        yield Finding("DSL035", message, fix, STAGE_PATH, job_fix, edits=((scatter, False),))


def stages(row: facts.OptimizerRow, config: dict[str, Any]) -> list[int]:
    """The ZeRO stages an optimizer runs with; the raw key that calls off DeepSpeed's test lets it through."""
    zero = config.get("zero_optimization")
    if row.name == "Muon" and isinstance(zero, dict) and zero.get("reduce_scatter") is False:
        return [0, 1, 2, 3]
    refused = row.zero == [0] and not row.onebit
    untested = refused and bool(config.get("zero_allow_untested_optimizer"))
    return [0, 1, 2, 3] if untested else row.zero


def optimizer_runs_here(s: Situation) -> Found:
    if not s.row or s.gpus:
        return
    compiled = s.row.name in ("Lion", "Adagrad") and s.offloads("offload_optimizer") != "none"
    if s.before("0.19.8") if compiled else s.row.gpu_only:
        yield Finding("DSL024", f"{s.optimizer} has no CPU implementation in DeepSpeed", "AdamW", TYPE)


def optimizer_takes_its_params(s: Situation) -> Found:
    made = _implementation(s)
    if not made:
        return
    takes = _takes(made)
    for key in s.params:
        path: Path = ("optimizer", "params", key)
        if key == "max_grad_norm" or key in takes:
            continue
        fix = suggest(key, sorted(takes))
        if _parameters()[made].get("ignored"):
            message = f"{s.optimizer} takes no {key}, and DeepSpeed drops it without a word"
            yield Finding("DSL048", message, fix, path, edits=_moved(s, path, _meant(path, fix)))
        else:
            message = f"{s.optimizer} takes no {key}: a TypeError on every rank"
            yield Finding("DSL025", message, fix or "leave it out", path, edits=_moved(s, path, _meant(path, fix)))
    if s.params.get("amsgrad") and "amsgrad" in takes and _is_deepspeeds(made):
        path = ("optimizer", "params", "amsgrad")
        if made == "DeepSpeedCPUAdam" and s.before("0.19.8"):
            message = "amsgrad: DeepSpeedCPUAdam takes it and computes without it"
            yield Finding("DSL054", message, "leave it out", path)
        else:
            message = f"{s.optimizer} has no AMSGrad in DeepSpeed: a RuntimeError on every rank"
            yield Finding("DSL037", message, "leave it out, or torch_adam: true", path, edits=((path, REMOVE),))


@cache
def _parameters() -> dict[str, dict[str, Any]]:
    return yamldoc.load_tables(facts.DATA / "parameters.yaml")


def _takes(name: str) -> frozenset[str]:
    return frozenset(_parameters()[name]["takes"].split())


def _implementation(s: Situation) -> str:
    """What DeepSpeed makes of the optimizer's type, a row of data/parameters.yaml; empty when nobody knows."""
    if s.row is None:
        return ""
    offloaded = s.offloads("offload_optimizer") != "none"
    if s.row.name in ("Adam", "AdamW"):
        return "torch Adam" if s.params.get("torch_adam") else "DeepSpeedCPUAdam" if offloaded else "FusedAdam"
    own = {
        "Lamb": "FusedLamb",
        "Lion": "DeepSpeedCPULion" if offloaded else "FusedLion",
        "Adagrad": "DeepSpeedCPUAdagrad" if offloaded else "Adagrad",
    }
    return own.get(s.row.name, s.row.name)


def _is_deepspeeds(implementation: str) -> bool:
    return implementation.startswith(("Fused", "DeepSpeed", "OneBit", "ZeroOne", "Muon"))


def optimizer_has_its_numbers(s: Situation) -> Found:
    """torch checks the range as an optimizer is made; DeepSpeed's own compute with whatever there is."""
    own = _is_deepspeeds(_implementation(s))
    for key, positive in NUMBERS.items():
        if key not in s.params or s.params[key] == "auto" or (key == "momentum" and own):
            continue
        value, path = s.params[key], ("optimizer", "params", key)
        if key == "betas":
            pair = (
                isinstance(value, (list, tuple))
                and len(value) == 2
                and all(isinstance(beta, (int, float)) for beta in value)
            )
            if not pair or not all(map(_is_beta, value)):
                message = f"betas {value} are not two numbers of at least 0 and below 1"
                yield Finding("DSL055" if own and pair else "DSL026", message, "betas: [0.9, 0.999]", path)
        elif key == "eps" and s.row and s.row.name == "Adafactor":
            continue
        elif key == "lr" and isinstance(value, bool):
            continue  # 1 or 0
        elif not _is_number(value) or value < 0:
            message = f"{key} is a number of at least 0, not `{value}`"
            rule = "DSL055" if own and _is_number(value) else "DSL027"
            yield Finding(rule, message, "1e-8" if positive else "0.01", path)
        elif positive and value == 0:
            message = "eps 0 divides by zero where a gradient has always been 0"
            yield Finding("DSL049", message, "1e-8", path)


NUMBERS = {"lr": False, "betas": False, "eps": True, "weight_decay": False, "momentum": False}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1  # false is 0


def optimizer_is_there(s: Situation) -> Found:
    """An optimizer comes from the config or from the program."""
    section = s.config.get("optimizer")
    typeless = isinstance(section, dict) and section.get("type") is None
    if typeless:
        message = "an optimizer without a type: DeepSpeed ignores the section without a word"
        yield Finding("DSL038", message, "type: AdamW", ("optimizer",), edits=((TYPE, "AdamW"),))
    if not (typeless or "optimizer" not in s.config) or not s.config or s.trainer == "hf":
        return
    offload = s.offloads("offload_optimizer")
    if s.client == "":
        fix = "optimizer: {type: AdamW, params: {lr: 1e-4}}"
        yield Finding("DSL036", "no optimizer, in the config or in the program", fix, ("optimizer",))
    untested = s.stage > 0 and not s.config.get("zero_allow_untested_optimizer")
    if s.client and s.client not in WITH_ZERO and untested:
        message = f"the program's {s.client} does not run with ZeRO stage {s.stage} (engine.py)"
        path: Path = ("zero_allow_untested_optimizer",)
        yield Finding("DSL022", message, "zero_allow_untested_optimizer: true", path)
    if offload != "none" and s.config.get("zero_force_ds_cpu_optimizer", True):
        path = ("zero_force_ds_cpu_optimizer",)
        fix = "DeepSpeedCPUAdam, or zero_force_ds_cpu_optimizer: false"
        if s.client and s.client not in ON_CPU:
            message = f"the program's {s.client} is not DeepSpeedCPUAdam, which the offloaded optimizer has to be"
            yield Finding("DSL060", message, fix, path)
        elif s.client is None:
            message = "the program's optimizer has to be DeepSpeedCPUAdam: it is offloaded, and the config has none"
            yield Finding("DSL059", message, fix, path)


# Classes of a program's optimizer that may be offloaded (engine.py _configure_optimizer), and all that ZeRO takes
# as tested (runtime/zero/utils.py).
ON_CPU = frozenset("DeepSpeedCPUAdam ZenFlowCPUAdam DeepSpeedCPULion".split())
WITH_ZERO = ON_CPU | frozenset("Adam AdamW FusedAdam Adagrad DeepSpeedCPUAdagrad FusedLion MuonWithAuxAdam".split())


def freeze_step_lies_within_the_run(s: Situation) -> Found:
    if not (s.row and s.row.onebit):
        return
    name = "var_freeze_step" if s.row.name == "ZeroOneAdam" else "freeze_step"
    freeze = s.params.get(name, 100_000)
    path: Path = ("optimizer", "params", name)
    if s.steps and isinstance(freeze, int) and freeze >= s.steps:
        message = f"compression would begin at step {freeze:,} and the run has {s.steps:,}: nothing gets compressed"
        fix = f"{max(1, int(s.steps * facts.WARM))} (15 to 25 % of the run)"
        yield Finding("DSL028", message, f"{name}: {fix}", path, f"freeze_step: {fix}")
    if freeze == 0:
        message = "freeze_step 0 compresses from the start, and the loss diverges"
        yield Finding("DSL029", message, "15 to 25 % of the steps", path)
    if s.world == 1:
        message = "one rank has nobody to send gradients to: compression gains nothing"
        yield Finding("DSL030", message, "AdamW", TYPE)


def precision_is_one(s: Situation) -> Found:
    if s.on("fp16") and s.on("bf16"):
        yield Finding("DSL080", "fp16 and bf16 are both enabled", "keep one", ("fp16", "enabled"))
    if s.on("fp16") and not s.gpus:
        message = "fp16 does not run on CPU: `Type fp16 is not supported on your device` (engine.py)"
        yield Finding("DSL081", message, "bf16 or fp32", ("fp16", "enabled"), "precision: bf16 or fp32")


def _taken_out(s: Situation, path: Path) -> tuple[tuple[Path, Any], ...]:
    """What the stage makes useless goes where the stage is written out; where it is not, it may be the slip."""
    return ((path, REMOVE),) if "stage" in s.zero else ()


def offload_is_not_ignored(s: Situation) -> Found:
    at: Path = ("zero_optimization",)
    params: Path = (*at, "offload_param" if "offload_param" in s.zero else "cpu_offload_param")
    states: Path = (*at, "offload_optimizer" if "offload_optimizer" in s.zero else "cpu_offload")
    if s.offloads("offload_param") != "none" and s.stage != 3:
        yield Finding(
            "DSL061",
            f"parameters are offloaded only with ZeRO-3; at stage {s.stage} DeepSpeed ignores it without a word",
            "zero_optimization.stage: 3, or leave offload_param out",
            params,
            "train.zero: 3, or leave offload.parameters out",
            edits=_taken_out(s, params),
        )
    device = s.offloads("offload_optimizer")
    if device != "none" and s.stage == 0:
        yield Finding(
            "DSL062",
            "the optimizer is offloaded only with ZeRO; at stage 0 its states stay, and Adam becomes the CPU's",
            "zero_optimization.stage: 1, 2 or 3",
            states,
            "train.zero: 1, 2 or 3",
            edits=((states, REMOVE),) if s.zero.get("stage") == 0 else (),
        )
    elif device == "nvme" and s.stage != 3:
        yield Finding(
            "DSL063",
            f"the optimizer goes to NVMe only with ZeRO-3; at stage {s.stage} DeepSpeed ignores it",
            "zero_optimization.stage: 3, or device: cpu",
            (*at, "offload_optimizer"),
            "train.zero: 3, or offload.optimizer: cpu",
        )
    for what in ("offload_param", "offload_optimizer"):
        if s.offloads(what) == "nvme" and s.stage == 3 and not s.zero[what].get("nvme_path"):
            fix = "nvme_path: /local_nvme"
            message = f"{what} to NVMe needs a directory"
            yield Finding("DSL064", message, fix, (*at, what, "nvme_path"), f"train.offload.{fix}")


def zero_settings_fit_the_stage(s: Situation) -> Found:
    zero, stage = s.zero, s.stage
    at: Path = ("zero_optimization",)
    section = zero.get("offload_optimizer")
    section = section if isinstance(section, dict) else {}
    ratio = section.get("ratio", 1.0)
    if FITS["0..1"].converted(ratio):
        ratio = float(ratio)
    path: Path = (*at, "offload_optimizer", "ratio")
    if _is_number(ratio) and 0 <= ratio < 1 and stage == 3 and s.offloads("offload_optimizer") != "none":
        if _implementation(s) not in ("", "DeepSpeedCPUAdam"):
            message = f"part of the optimizer (ratio {ratio}) is offloaded with DeepSpeedCPUAdam only"
            yield Finding("DSL079", message, "AdamW without torch_adam, or leave ratio out", path)
    elif _is_number(ratio) and 0 <= ratio < 1 and stage != 3:
        message = f"part of the optimizer (ratio {ratio}) is offloaded only with ZeRO-3, and the stage is {stage}"
        yield Finding("DSL065", message, "stage: 3, or leave ratio out", path, edits=_taken_out(s, path))
    if section.get("super_offload") is True:
        path = (*at, "offload_optimizer", "super_offload")
        if stage != 3:
            message = f"super_offload is for ZeRO-3; at stage {stage} DeepSpeed ignores it without a word"
            yield Finding("DSL066", message, "stage: 3, or leave it out", path, edits=_taken_out(s, path))
        elif not s.gpus:
            yield Finding("DSL067", "super_offload runs on NVIDIA GPUs only", "leave it out", path)
    if zero.get("compute_grad_norm") is False and not s.before("0.19.7"):
        path = (*at, "compute_grad_norm")
        if stage not in (1, 2):
            message = f"compute_grad_norm: false is for ZeRO-1 and ZeRO-2, and the stage is {stage}"
            yield Finding("DSL068", message, "leave it out", path, edits=_taken_out(s, path))
        elif s.config.get("gradient_clipping", 1.0) != 0:
            message = "compute_grad_norm: false needs gradient_clipping 0, and clipping is on unless it says 0"
            yield Finding("DSL069", message, "gradient_clipping: 0", path, edits=((("gradient_clipping",), 0.0),))
        elif stage == 1 and s.model_type == "bf16" and s.gradient_type == "fp32" and not section:
            message = "compute_grad_norm: false does not run with bf16 weights and fp32 gradients at stage 1"
            yield Finding("DSL068", message, "leave it out", path, edits=((path, REMOVE),))
    if zero.get("legacy_stage1") is True and stage > 0:
        path = (*at, "legacy_stage1")
        yield Finding(
            "DSL070", "legacy_stage1 left DeepSpeed in 0.5.9", "leave it out", path, edits=((path, REMOVE),)
        )
    if str(s.config.get("gradient_allreduce_op", "")).lower() == "sum" and not s.before("0.19.6") and stage == 3:
        message = "gradient_allreduce_op: sum does not run with ZeRO-3"
        yield Finding("DSL071", message, "mean, or stage: 2", ("gradient_allreduce_op",))
    if s.config.get("managed_gradient_accumulation") is False and not s.before("0.19.4"):
        path = ("managed_gradient_accumulation",)
        if s.pipeline > 1:
            yield Finding("DSL092", "managed_gradient_accumulation: false does not run with pipelines", "true", path)
        elif zero.get("overlap_comm") is True and stage < 2:
            message = f"managed_gradient_accumulation: false with overlap_comm needs ZeRO-2, and the stage is {stage}"
            yield Finding("DSL072", message, "overlap_comm: false", path, edits=(((*at, "overlap_comm"), False),))
    scatters = stage >= 2 and zero.get("reduce_scatter", True) is True
    for key, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        value = s.config.get(key, harmless)
        if scatters and (bool(value) if key == "prescale_gradients" else _is_number(value) and value != harmless):
            message = f"{key} {value} does not run with ZeRO-{stage} while reduce_scatter is on, and it is by default"
            yield Finding("DSL073", message, "zero_optimization.reduce_scatter: false, or leave it out", (key,))
    for key, stages_of in NEEDS_STAGE.items():
        value = zero.get(key)
        if value in (None, False, "auto") or stage in stages_of:
            continue
        path = (*at, key)
        wanted = f"ZeRO-{stages_of[0]}" if len(stages_of) == 1 else f"ZeRO-{stages_of[0]} to {stages_of[-1]}"
        message = f"{key} belongs to {wanted}; at stage {stage} DeepSpeed ignores it without a word"
        yield Finding("DSL074", message, "leave it out", path, edits=_taken_out(s, path))


NEEDS_STAGE: dict[str, tuple[int, ...]] = {
    "reduce_bucket_size": (1, 2, 3),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2),
    "sub_group_size": (3,),
    "zero_quantized_weights": (3,),
    "zero_quantized_gradients": (3,),
    "zero_quantized_nontrainable_weights": (3,),
    **{
        form + name: (3,)
        for form in ("", "stage3_")
        for name in """prefetch_bucket_size param_persistence_threshold model_persistence_threshold
        max_live_parameters max_reuse_distance""".split()
    },
}


def quantized_weights_run_here(s: Situation) -> Found:
    shard = s.zero.get("mics_shard_size", -1)
    if _is_number(shard) and shard > 0 and s.before("0.19.7"):
        path: Path = ("zero_optimization", "mics_shard_size")
        if s.stage != 3:
            message = f"mics_shard_size belongs to ZeRO-3; at stage {s.stage} DeepSpeed ignores it without a word"
            yield Finding("DSL074", message, "leave it out", path, edits=_taken_out(s, path))
        elif not s.gpus:
            yield Finding("DSL105", "MiCS needs NCCL: gloo has no coalesced collectives", "leave it out", path)
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if s.zero.get(key) is True and s.stage == 3 and not s.gpus:
            yield Finding("DSL104", f"{key} has no CPU implementation", "leave it out", ("zero_optimization", key))
    if s.zero.get("zero_quantized_gradients") is True and s.stage == 3 and s.world and s.per_node:
        path = ("zero_optimization", "zero_quantized_gradients")
        if s.world <= s.per_node:
            message = "zero_quantized_gradients works between nodes; on one DeepSpeed ignores it without a word"
            yield Finding("DSL107", message, "leave it out", path, edits=((path, REMOVE),))
        elif not s.gpus:
            yield Finding("DSL104", "zero_quantized_gradients has no CPU implementation", "leave it out", path)
    aio = s.config.get("aio")
    if isinstance(aio, dict) and aio.get("use_gds") and not s.gpus:
        yield Finding("DSL077", "aio.use_gds runs on NVIDIA GPUs only", "leave it out", ("aio", "use_gds"))


def batch_multiplies_out(s: Situation) -> Found:
    """DeepSpeed's own arithmetic: the missing number by whole division, and only then the test.

    train_batch_size 32 with gradient_accumulation_steps 8 runs on 1, 2 and 4 ranks, and ends on 3 and on 8.
    """
    values = [s.config.get(key) for key in BATCH]
    if any(value is not None and not (isinstance(value, int) and value > 0) for value in values):
        return  # another rule's
    total, micro, accumulation = values
    elastic = s.config.get("elasticity")
    if isinstance(elastic, dict) and elastic.get("enabled") is True and s.before("0.19.8"):
        return  # DeepSpeed chooses
    if total is None and micro is None:
        if s.trainer == "plain" and s.config:
            message = "neither train_batch_size nor train_micro_batch_size_per_gpu is there, and DeepSpeed needs one"
            yield Finding("DSL051", message, "train_micro_batch_size_per_gpu: 1", (BATCH[0],))
        return
    replicas = s.data_parallel
    if not replicas or total is None:
        return
    if micro is not None and accumulation is None:
        accumulation = total // micro // replicas
    elif accumulation is not None and micro is None:
        micro = total // replicas // accumulation
    elif micro is None:
        micro, accumulation = total // replicas, 1
    if not micro or not accumulation:
        zero = "micro-batch" if not micro else "gradient accumulation"
        least = replicas * (s.config.get(BATCH[1]) or s.config.get(BATCH[2]) or 1)
        message = f"train_batch_size {total} over {replicas} ranks leaves a {zero} of 0"
        yield Finding("DSL050", message, f"train_batch_size: {least}, or fewer ranks", (BATCH[0],))
    elif total != micro * accumulation * replicas:
        product = (
            f"{micro} per rank x {accumulation} accumulation x {replicas} ranks = {micro * accumulation * replicas}"
        )
        message = f"train_batch_size {total} is not {product}"
        fix = f"train_batch_size: {micro * accumulation * replicas}"
        yield Finding("DSL050", message, fix, (BATCH[0],))


BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def packages_are_there(s: Situation) -> Found:
    """Without its package a monitor ends every rank; nobody else looks for it."""
    for section, package in PACKAGES.items():
        part = s.config.get(section)
        if not isinstance(part, dict) or (section != "datastates_ckpt" and part.get("enabled") is not True):
            continue
        if s.packages is None:
            message = f"{section} needs the Python package {package} on every node"
            yield Finding("DSL017", message, f"pip install {package}", (section,))
        elif package not in s.packages:
            message = f"{section} needs the Python package {package}, and the nodes do not have it"
            yield Finding("DSL018", message, f"pip install {package}, or leave {section} out", (section,))


PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "comet": "comet_ml",
    "datastates_ckpt": "datastates",
    "amp": "apex",
}


def checkpoints_are_written(s: Situation) -> Found:
    part = s.config.get("checkpoint")
    if isinstance(part, dict) and isinstance(part.get("writer"), dict):
        message = (
            "checkpoint.writer needs CROSS_RANK and CROSS_SIZE, which the deepspeed launcher sets and torchrun not"
        )
        fix = "leave writer out, or set both: the node's number and the number of nodes"
        yield Finding("DSL111", message, fix, ("checkpoint", "writer"), edits=((("checkpoint", "writer"), REMOVE),))
    if isinstance(part, dict) and part.get("load_universal") is True and s.stage == 0:
        message = "universal checkpoints are made of ZeRO's: stage 0 finds no `latest_universal` to load"
        path: Path = ("checkpoint", "load_universal")
        yield Finding("DSL110", message, "stage: 1, 2 or 3, or leave it out", path)


def zenflow_is_offloaded(s: Situation) -> Found:
    if isinstance(s.zero.get("zenflow"), dict):
        path = ("zero_optimization", "zenflow")
        if s.stage == 0:
            message = "zenflow belongs to ZeRO; at stage 0 DeepSpeed does not use it"
            yield Finding("DSL075", message, "stage: 1, 2 or 3, or leave it out", path, edits=_taken_out(s, path))
        elif s.offloads("offload_optimizer") == "none":
            message = "zenflow needs the optimizer on the CPU"
            yield Finding("DSL076", message, "offload_optimizer: {device: cpu}", path)
        elif s.stage == 3 and not s.gpus:
            yield Finding("DSL106", "zenflow at stage 3 runs on NVIDIA GPUs only", "stage: 2", path)
        elif s.params.get("torch_adam"):
            message = "zenflow needs DeepSpeedCPUAdam, and torch_adam asks for torch's"
            at = ("optimizer", "params", "torch_adam")
            yield Finding("DSL078", message, "leave torch_adam out", at, edits=((at, REMOVE),))


def elasticity_adds_up(s: Situation) -> Found:
    """Before 0.19.8: DeepSpeed chooses the batch, and refuses one of yours and worlds that do not fit."""
    part = s.config.get("elasticity")
    if not isinstance(part, dict) or part.get("enabled") is not True or not s.before("0.19.8"):
        return
    missing = [key for key in ("max_train_batch_size", "micro_batch_sizes") if key not in part]
    if missing:
        yield Finding("DSL056", f"elasticity without {' and '.join(missing)}", "", ("elasticity",))
        return
    given = [key for key in BATCH if s.config.get(key) is not None]
    if given and part.get("ignore_non_elastic_batch_info") is not True:
        message = f"elasticity chooses the batch, and {given[0]} is given: DeepSpeed refuses both"
        yield Finding("DSL057", message, f"leave {given[0]} out", (given[0],), edits=(((given[0],), REMOVE),))
    low, high = part.get("min_gpus", 1), part.get("max_gpus", 10_000)
    if s.world and _is_number(low) and _is_number(high) and not low <= s.world <= high:
        yield Finding(
            "DSL058", f"elasticity is for {low} to {high} ranks, and there are {s.world}", "", ("elasticity",)
        )


def clipping_is_meant(s: Situation) -> Found:
    clipping = s.config.get("gradient_clipping")
    if _is_number(clipping) and clipping < 0:  # type: ignore[operator]
        message = f"gradient_clipping {clipping} switches clipping off, as 0 does"
        yield Finding("DSL053", message, "gradient_clipping: 0", ("gradient_clipping",), "train.gradient_clipping: 0")
    elif clipping is None and "gradient_clipping" not in s.config and s.config and s.trainer == "plain":
        now = "0 (off)" if s.before("0.19.3") else "1.0"
        message = f"gradient_clipping is not there, and DeepSpeed takes {now}: 1.0 since 0.19.3, off before"
        yield Finding("DSL052", message, f"gradient_clipping: {now.split()[0]}", ("gradient_clipping",))


def onebit_resume(s: Situation) -> Found:
    if s.row and s.row.name == "OneBitAdam" and (not s.deepspeed or s.before(s.row.before)):
        yield Finding(
            "DSL032",
            "DeepSpeed 0.19.6 does not restore OneBitAdam's `initialize` flag: replicas differ after a resume",
            "set optimizer.initialize to true on every rank after loading",
            TYPE,
            "the reference trainer sets it (carry_on in train_gpt.py); a script of your own has to as well",
        )


def pipeline_and_zero(s: Situation) -> Found:
    if s.pipeline > 1 and s.stage >= 2:
        yield Finding(
            "DSL090",
            f"pipeline parallelism does not run with ZeRO-{s.stage}: gradients are partitioned before the stages "
            "have added theirs (runtime/pipe/engine.py asserts stage < 2)",
            "zero_optimization.stage: 1, or no pipeline",
            STAGE_PATH,
            "train.zero: 1, or no pipeline",
            edits=((STAGE_PATH, 1),),
        )
    part = s.config.get("pipeline")
    if isinstance(part, dict) and part.get("enabled"):
        message = "`pipeline: {enabled: true}` in the config does nothing: the model must be a PipelineModule"
        yield Finding("DSL091", message, "leave it out", ("pipeline",), edits=((("pipeline",), REMOVE),))
    for key in ("stages", "partition", "seed_layers"):
        if isinstance(part, dict) and key in part and not part.get("enabled"):
            message = f"pipeline.{key} is read and not used: it is an argument of the program's PipelineModule"
            yield Finding("DSL093", message, "leave it out", ("pipeline", key), edits=((("pipeline", key), REMOVE),))


def params_are_known(s: Situation) -> Found:
    backend = s.params.get("comm_backend_name", "nccl")
    if s.row and s.row.onebit and backend not in ("nccl", "mpi", "compressed", "auto"):
        path: Path = ("optimizer", "params", "comm_backend_name")
        message = f"comm_backend_name `{backend}`: the 1-bit optimizers send over nccl, mpi or compressed"
        yield Finding("DSL034", message, "comm_backend_name: nccl", path, edits=((path, "nccl"),))
    if "max_grad_norm" in s.params:
        path = ("optimizer", "params", "max_grad_norm")
        norm = s.params["max_grad_norm"]
        same = _is_number(norm) and s.config.get("gradient_clipping") == norm
        yield Finding(
            "DSL033",
            "max_grad_norm in the optimizer's params is refused by DeepSpeed",
            "gradient_clipping, at the top",
            path,
            "train.gradient_clipping",
            edits=((path, REMOVE),) if same else _moved(s, path, ("gradient_clipping",)) if _is_number(norm) else (),
        )
    clipping = s.config.get("gradient_clipping", 0)
    if s.row and s.row.onebit and isinstance(clipping, (int, float)) and clipping > 0:
        message = "gradient clipping has next to no effect in the compressed stage"
        yield Finding("DSL031", message, "gradient_clipping: 0", ("gradient_clipping",), "train.gradient_clipping: 0")


def nothing_is_left_auto(s: Situation) -> Found:
    def visit(value: Any, path: Path) -> Iterator[Path]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from visit(child, (*path, key))
        elif value == "auto":
            yield path

    for path in visit(s.config, ()) if s.trainer == "plain" else ():
        name, fix = ".".join(map(str, path)), "write the value, or leave the key out"
        section = sections().get(path[:-1])  # type: ignore[arg-type]
        if own_auto(path):
            continue
        if section and section.strict:
            message = (
                f"{name} is `auto`, which only Hugging Face's Trainer resolves; plain DeepSpeed takes its default"
            )
            yield Finding("DSL011", message, fix, path)
        elif section and section.keys.get(str(path[-1])) in (None, "flag", "any") and path[0] != "optimizer":
            message = (
                f"{name} is `auto`, which only Hugging Face's Trainer resolves; plain DeepSpeed takes it for text"
            )
            yield Finding("DSL016", message, fix, path)
        else:
            message = f"{name} is `auto`, which only Hugging Face's Trainer resolves; plain DeepSpeed fails on it"
            yield Finding("DSL008", message, fix, path)


def own_auto(path: Path) -> bool:
    """DeepSpeed itself knows the word there: it is no sign of Hugging Face."""
    return any(path[:depth] in OWN_AUTO for depth in range(1, len(path) + 1))


# autotuning/config.py, module_inject/auto_ep_config.py, get_pipeline_config of runtime/config.py,
# runtime/keep_in_fp32.py and runtime/zenflow/zenflow_config.py of 0.19.8.
OWN_AUTO: frozenset[Path] = frozenset(
    {
        ("autotuning",),
        ("expert_parallel",),
        ("pipeline", "stages"),
        ("data_types", "keep_in_fp32_modules"),
        ("zero_optimization", "zenflow", "select_strategy"),
        ("zero_optimization", "zenflow", "select_interval"),
        ("zero_optimization", "zenflow", "update_interval"),
    }
)


def hpz_divides_the_world(s: Situation) -> Found:
    part, path = s.zero.get("zero_hpz_partition_size", 1), ("zero_optimization", "zero_hpz_partition_size")
    if not isinstance(part, int) or part <= 1:
        return
    if s.stage != 3:
        message = f"zero_hpz_partition_size belongs to ZeRO-3; at stage {s.stage} DeepSpeed ignores it without a word"
        yield Finding("DSL103", message, "stage: 3, or leave it out", path, edits=_taken_out(s, path))
    elif s.world and part > s.world:
        message = f"zero_hpz_partition_size {part} is larger than the {s.world} ranks, and DeepSpeed ignores it"
        yield Finding("DSL101", message, "the number of GPUs per node", path)
    elif s.world and s.world % part:
        message = f"zero_hpz_partition_size {part} does not divide the {s.world} ranks"
        yield Finding("DSL100", message, "the number of GPUs per node", path)
    elif s.per_node and s.world and s.world > s.per_node and part != s.per_node:
        message = f"zero_hpz_partition_size {part} on nodes of {s.per_node}: hpZ pays when the partition is one node"
        yield Finding("DSL102", message, f"zero_hpz_partition_size: {s.per_node}", path)


def keys_are_known(s: Situation) -> Found:
    for section, found in _present(s.config):
        for key in found:
            path: Path = (*section.path, key)
            name = ".".join(map(str, path))
            fix = "" if key in section.keys else _place(path) or suggest(key, sorted(section.keys))
            edits = _moved(s, path, _meant(path, fix))
            if key in section.removed and not s.before(section.removed[key]):
                since = section.removed[key]
                which = f"DeepSpeed {s.deepspeed}" if s.deepspeed else "the newest DeepSpeed"
                yield Finding(
                    "DSL004",
                    f"`{key}` left DeepSpeed in {since}, and {which} refuses to start with it",
                    f"leave it out, or keep DeepSpeed {NEWEST_ONEBIT} on the nodes",
                    path,
                    f"leave it out, or pin an older release on the nodes: environment.deepspeed: {NEWEST_ONEBIT}",
                )
            elif s.before(section.added.get(key, "0")):
                end = "refuses to start with it" if section.strict else "ignores it without a word"
                message = f"{name} came after DeepSpeed {s.deepspeed}, which {end}"
                yield Finding("DSL005" if section.strict else "DSL010", message, "leave it out", path)
            elif key in section.keys:
                continue
            elif section.strict:
                where = ".".join(section.path)
                message = f"{where} has no key `{key}`, and DeepSpeed refuses to start with one it does not know"
                yield Finding("DSL002", message, fix, path, edits=edits)
            elif section.path:
                message = f"{'.'.join(section.path)} has no key `{key}`: DeepSpeed ignores it without a word"
                yield Finding("DSL003", message, fix, path, edits=edits)
            else:
                message = f"DeepSpeed has no key `{key}` and ignores it without a word"
                yield Finding("DSL001", message, fix, path, REPLACED.get(key, ""), edits)


def _place(path: Path) -> str:
    """Where a key belongs that stands one section too high: `stage` in zero_optimization.stage."""
    below = ("optimizer", "params") if path[0] == "optimizer" else ("zero_optimization",)
    known = IN_PARAMS if path[0] == "optimizer" else sections()[("zero_optimization",)].keys
    return ".".join((*below, str(path[-1]))) if path[:-1] == below[:-1] and path[-1] in known else ""


IN_PARAMS = ("lr", "betas", "eps", "weight_decay", "freeze_step")


def _meant(path: Path, fix: str) -> Path:
    """The key that a remedy names, for one that is not known; () where it names none."""
    word = re.fullmatch(r"did you mean `([^`]+)`\?", fix)
    return (*path[:-1], word[1]) if word else tuple(fix.split(".")) if fix and fix == _place(path) else ()


def _moved(s: Situation, path: Path, to: Path) -> tuple[tuple[Path, Any], ...]:
    """The edits that give a value its right name or place, if nothing is there, under another name neither."""
    value: Any = s.config
    for key in path:
        value = value[key]
    section: Any = s.config
    for key in to[:-1]:
        section = section.get(key, {}) if isinstance(section, dict) else None
    names = {to[-1:], *((name,) for pair in NAMES if to[-1:] and to[-1] in pair for name in pair)}
    free = isinstance(section, dict) and not any(name and name[0] in section for name in names)
    return ((path, REMOVE), (to, value)) if to and free else ()


def names_are_given_once(s: Situation) -> Found:
    """stage3_prefetch_bucket_size may be written without stage3_, but not both ways at once."""
    given = {key: value for key, value in s.zero.items() if value != "auto"}
    for old, new in NAMES:
        if old in given and new in given:
            off = old.startswith("cpu_offload") and given[old] in (False, None)
            same = off or _same(given[old], given[new])  # otherwise nobody knows which is meant
            path: Path = ("zero_optimization", old)
            message = f"{old} and {new} are one setting, and DeepSpeed refuses to start with both"
            job_fix = f"leave {old} out; {new} stands for it"
            yield Finding("DSL013", message, f"leave {old} out", path, job_fix, ((path, REMOVE),) if same else ())


def _same(one: Any, other: Any) -> bool:
    """0 is not false here."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


_STAGE3 = """prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params
    allgather_sequential""".split()
# the name to take out where both are given, the name to keep (runtime/zero/config.py of 0.19.6 and 0.19.8)
NAMES = (
    *((name, f"stage3_{name}") for name in _STAGE3),
    ("stage3_gather_fp16_weights_on_model_save", "gather_16bit_weights_on_model_save"),
    ("stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    ("cpu_offload", "offload_optimizer"),
    ("cpu_offload_param", "offload_param"),
)


def values_have_their_type(s: Situation) -> Found:
    for section, found in _present(s.config):
        for key, value in found.items():
            path: Path = (*section.path, key)
            name, kind = ".".join(map(str, path)), section.keys.get(key, "any")
            if s.before(section.added.get(key, "0")):
                continue  # nobody reads it there
            if value == "auto" and (section.strict or kind != "section"):
                continue  # another rule's
            fits = _kind(kind.rstrip("?"))
            if (value is None and kind.endswith("?")) or fits.plain(value):
                continue
            if kind.rstrip("?") == "section":
                if path == ("zero_optimization",) and isinstance(value, bool):
                    stage = f"{{stage: {int(value)}}}"
                    message = f"zero_optimization: {str(value).lower()} is read as {stage}"
                    yield Finding("DSL014", message, stage, path)
                    continue
                message = f"{name} is a section with keys, not `{value!r}`"
                yield Finding("DSL006", message, "leave it out, or write the keys below it", path)
            elif kind == "flag" and not (isinstance(value, str) and value.lower() in TRUE):
                message = f"{name} is true or false; `{value!r}` counts as true, like anything that is not empty"
                yield Finding("DSL015", message, "false", path)
            elif fits.converted(value):
                message = f"{name} is {fits.words}; `{value!r}` is read as one"
                yield Finding("DSL012", message, "write it without quotes" if isinstance(value, str) else "", path)
            else:
                yield Finding("DSL007", f"{name} is {fits.words}, not `{value!r}`", "", path)
    for name in ("optimizer", "scheduler"):
        part = s.config.get(name)
        if not isinstance(part, dict) or part.get("type") is None:
            continue
        params = part.get("params", {})
        if not isinstance(params, dict) and not (params is None and name == "optimizer"):
            message = f"{name}.params is a section with keys, not `{params!r}`"
            yield Finding("DSL009", message, "leave it out, or write the keys below it", (name, "params"))


@record
class Section:
    """A section of a DeepSpeed config: a row of data/keys.yaml."""

    path: tuple[str, ...]
    keys: dict[str, str]  # what a value may be
    strict: bool  # refuses what it does not know
    added: dict[str, str]
    removed: dict[str, str]
    source: str


@cache
def sections() -> dict[tuple[str, ...], Section]:
    found = {}
    for name, row in yamldoc.load_tables(facts.DATA / "keys.yaml").items():
        path = () if name == "top" else tuple(name.split("."))
        added, removed = (
            {key: str(release) for key, release in row.get(part, {}).items()} for part in ("added", "removed")
        )
        found[path] = Section(path, row["keys"], row["unknown"] == "refused", added, removed, row["source"])
    return found


def _present(config: dict[str, Any]) -> Iterator[tuple[Section, dict[str, Any]]]:
    """Every section that stands in the config with keys below it."""
    for path, section in sections().items():
        found: Any = config
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            yield section, found


@record
class Kind:
    """What a value may be, what else is taken for one, and how to say it."""

    words: str
    plain: Callable[[Any], bool]
    converted: Callable[[Any], bool] = lambda value: False


def gradients_have_the_models_type(s: Situation) -> Found:
    if s.stage == 0 and s.gradient_type not in ("", s.model_type) and not (s.on("fp16") and s.on("bf16")):
        path = ("data_types", "grad_accum_dtype")
        yield Finding(
            "DSL082",
            f"grad_accum_dtype {s.gradient_type} with {s.model_type} weights runs only with ZeRO: at stage 0 "
            "DeepSpeed ends in `unsupported mix` (engine.py)",
            "zero_optimization.stage: 1, or leave grad_accum_dtype out",
            path,
            "train.zero: 1, or leave grad_accum_dtype out",
            edits=((path, REMOVE),),
        )
    for section, key in (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads")):
        part = s.config.get(section)
        if not isinstance(part, dict):
            continue
        if part.get(key) is True and s.stage == 0:
            yield Finding("DSL083", f"{key} needs ZeRO, and the stage is 0", "stage: 1, 2 or 3", (section, key))
        elif (
            part.get(key) is True
            and not part.get("bf16_optimizer_states")
            and (s.offloads("offload_optimizer") == "none" or _implementation(s) not in ("", "DeepSpeedCPUAdam"))
        ):
            message = f"{key} needs the optimizer offloaded, as DeepSpeedCPUAdam"
            yield Finding("DSL088", message, "offload_optimizer: {device: cpu}, and AdamW", (section, key))
        states = section == "bf16" and part.get("bf16_optimizer_states") is True
        if states and (s.stage == 0 or part.get(key) is not True):
            message = "bf16_optimizer_states needs ZeRO and bf16_master_weights_and_grads"
            yield Finding("DSL084", message, f"{key}: true", (section, "bf16_optimizer_states"))
    types = s.config.get("data_types")
    asked = types.get("param_dtype") if isinstance(types, dict) else None
    if isinstance(asked, str) and facts.DTYPES.get(asked, s.model_type) != s.model_type and not s.before("0.19.2"):
        message = f"param_dtype {asked} and a model in {s.model_type}: DeepSpeed refuses the contradiction"
        path = ("data_types", "param_dtype")
        yield Finding("DSL087", message, "leave it out", path, edits=((path, REMOVE),))
    if isinstance(s.config.get("bf16"), dict) and "bfloat16" in s.config:
        message = "bfloat16 is the old name of bf16: with both there, DeepSpeed reads bf16 alone"
        yield Finding("DSL085", message, "leave bfloat16 out", ("bfloat16",), edits=((("bfloat16",), REMOVE),))
    part = s.config.get("fp16")
    if isinstance(part, dict) and s.on("fp16") and part.get("loss_scale", 0) == 0:
        for key in ("loss_scale_window", "min_loss_scale"):
            value = part.get(key, 1)
            if _is_number(value) and value <= 0 and not s.before("0.19.4"):
                yield Finding(
                    "DSL086", f"fp16.{key} {value} with dynamic loss scaling", "a number above 0", ("fp16", key)
                )


def scheduler_runs(s: Situation) -> Found:
    section = s.config.get("scheduler")
    if not isinstance(section, dict):
        return
    at: Path = ("scheduler",)
    kind, params = section.get("type"), section.get("params")
    if kind is None:
        message = "a scheduler without a type: DeepSpeed ignores it without a word"
        yield Finding("DSL040", message, "type: WarmupLR", at)
    elif kind == "ReduceLROnPlateau":
        message = "ReduceLROnPlateau is told no metric by DeepSpeed: the learning rate never changes"
        yield Finding("DSL039", message, "WarmupDecayLR or WarmupCosineLR", (*at, "type"))
    elif not isinstance(kind, str) or kind not in {**SCHEDULERS, **TORCH_SCHEDULERS}:
        known = [*SCHEDULERS, *TORCH_SCHEDULERS]
        message = f"no scheduler `{kind}` in DeepSpeed or torch"
        yield Finding("DSL041", message, suggest(str(kind), known), (*at, "type"))
    elif params is None:
        yield Finding("DSL042", f"{kind} without params is a TypeError on every rank", "params: {...}", at)
    elif isinstance(params, dict):
        yield from _scheduler_params(kind, params, lr=s.params.get("lr"), at=(*at, "params"))


def _scheduler_params(kind: str, params: dict[str, Any], *, lr: Any, at: Path) -> Found:
    required, optional = (row.split() for row in {**SCHEDULERS, **TORCH_SCHEDULERS}[kind])
    for key in required:
        if key not in params:
            message = f"{kind} without {key} is a TypeError on every rank"
            yield Finding("DSL043", message, f"params: {{{key}: ...}}", at)
    for key, value in params.items():
        if key not in (*required, *optional, "last_batch_iteration"):
            message = f"{kind} takes no {key}: a TypeError on every rank"
            yield Finding("DSL044", message, suggest(key, [*required, *optional]), (*at, key))
        elif isinstance(value, str) and key not in WORDS and value != "auto":
            message = f"{key} is a number, not the text `{value}`"
            yield Finding("DSL045", message, "write it without quotes", (*at, key))
        elif not isinstance(value, str) and not _schedules(key, value):
            message = f"{key} is {_kind(SCHEDULED[key].rstrip('?')).words}, not `{value}`"
            yield Finding("DSL045", message, "a number that the schedule can compute with", (*at, key))
    counted = params.get("total_steps") or (params.get("epochs") and params.get("steps_per_epoch"))
    if kind == "OneCycleLR" and not counted:
        message = "OneCycleLR without total_steps, or epochs and steps_per_epoch, is a ValueError on every rank"
        yield Finding("DSL043", message, "params: {total_steps: ...}", at)
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        message = "WarmupDecayLR without warmup_max_lr takes 0.001, whatever the optimizer's lr says"
        fix = f"warmup_max_lr: {lr if _is_number(lr) else 'the learning rate'}"
        edits = (((*at, "warmup_max_lr"), lr),) if _is_number(lr) else ()
        yield Finding("DSL046", message, fix, at, f"{fix}, or train.lr_schedule", edits)
    warmup = params.get("warmup_num_steps", 1000)
    if not isinstance(warmup, str) and not (isinstance(warmup, int) and warmup > 0):
        message = f"warmup_num_steps is a whole number of at least 1, not `{warmup}`"
        yield Finding("DSL047", message, "", (*at, "warmup_num_steps"))


def _schedules(key: str, value: Any) -> bool:
    kind = SCHEDULED.get(key, "any?")
    fits = _kind(kind.rstrip("?"))
    return (value is None and kind.endswith("?")) or fits.plain(value) or (value is True and fits.converted(value))


def _integer(value: Any, least: float) -> bool:
    return _is_number(value) and value % 1 == 0 and value >= least


def _text_of(value: Any, *, whole: bool, least: float, most: float = math.inf) -> bool:
    """ "500" is taken for 500, and true for 1; "5e8" is no whole number."""
    if isinstance(value, bool):
        return least <= int(value) <= most
    if not isinstance(value, str) or not re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*" if whole else NUMBER, value):
        return False
    return least <= float(value) <= most


def _whole(words: str, least: float) -> Kind:
    return Kind(words, lambda v: _integer(v, least), lambda v: _text_of(v, whole=True, least=least))


@cache
def _kind(name: str) -> Kind:
    """A kind of keys.yaml; "mean|sum" is one of these, in any case."""
    if "|" not in name:
        return FITS[name]
    words = name.split("|")
    return Kind(f"{', '.join(words[:-1])} or {words[-1]}", lambda v: isinstance(v, str) and v.lower() in words)


NUMBER = r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*"
TRUE = frozenset("1 on t true y yes".split())
BOOLEANS = TRUE | frozenset("0 off f false n no".split())
FITS: dict[str, Kind] = {
    "any": Kind("anything", lambda value: True),
    "section": Kind("a section with keys", lambda value: isinstance(value, dict)),
    "list": Kind("a list", lambda value: isinstance(value, list)),
    "text": Kind("text", lambda value: isinstance(value, str)),
    "bool": Kind(
        "true or false",
        lambda value: isinstance(value, bool),
        lambda value: value in (0, 1) if _is_number(value) else isinstance(value, str) and value.lower() in BOOLEANS,
    ),
    "int": _whole("a whole number", -math.inf),
    "int>=0": _whole("a whole number of at least 0", 0),
    "int>0": _whole("a whole number above 0", 1),
    "float": Kind("a number", _is_number, lambda value: _text_of(value, whole=False, least=-math.inf)),
    "float>=0": Kind(
        "a number of at least 0",
        lambda value: _is_number(value) and 0 <= value < math.inf,
        lambda value: isinstance(value, str) and _text_of(value, whole=False, least=0),
    ),
    "0..1": Kind(
        "a number from 0 to 1",
        lambda value: _is_number(value) and 0 <= value <= 1,
        lambda value: _text_of(value, whole=False, least=0, most=1),
    ),
    "0<.<1": Kind(
        "a number between 0 and 1",
        lambda value: _is_number(value) and 0 < value < 1,
        lambda value: (
            isinstance(value, str) and _text_of(value, whole=False, least=0, most=1) and 0 < float(value) < 1
        ),
    ),
    "number": Kind("a number", _is_number, lambda value: isinstance(value, bool)),
    "number>0": Kind("a number above 0", lambda value: _is_number(value) and value > 0, lambda value: value is True),
    "rates": Kind(
        "a number, or a list of one per parameter group",
        lambda v: _is_number(v) or (isinstance(v, list) and bool(v) and all(map(_is_number, v))),
        lambda value: value is True,
    ),
    "number!=0": Kind(
        "a number other than 0", lambda value: _is_number(value) and value != 0, lambda value: value is True
    ),
    "count": Kind(
        "a whole number above 0",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
        lambda v: v is True,
    ),
    "flag": Kind("true or false", lambda value: value in (None, 0, 1, ""), lambda value: True),
    "switch": Kind("true or false", lambda value: isinstance(value, int)),
    "stage": Kind(
        "0, 1, 2 or 3",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value in (0, 1, 2, 3),
        lambda value: value in (0, 1, 2, 3, "0", "1", "2", "3"),
    ),
    "int!": Kind(
        "a whole number",
        lambda value: _integer(value, -math.inf),
        lambda v: not isinstance(v, bool) and _text_of(v, whole=True, least=-math.inf),
    ),
    "names": Kind("text, or a list of text", lambda v: isinstance(v, str) or FITS["texts"].plain(v)),
    "dtype": Kind("fp32, fp16 or bf16", lambda value: isinstance(value, str) and value in facts.DTYPES),
    "texts": Kind(
        "a list of text", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
    "patterns": Kind(
        "auto or a list of names",
        lambda v: v == "auto" or (isinstance(v, list) and all(isinstance(item, str) for item in v)),
    ),
    "passes": Kind(
        "a list of z1, z3, autosp and autotp",
        lambda v: isinstance(v, list) and all(item in ("z1", "z3", "autosp", "autotp") for item in v),
    ),
    "device": Kind("none, cpu or nvme", lambda value: value in ("none", "cpu", "nvme")),
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
# DeepSpeed looks for other names in torch.optim.lr_scheduler; these need numbers only (torch 2.13).
TORCH_SCHEDULERS = {
    "ConstantLR": ("", "factor total_iters last_epoch"),
    "CosineAnnealingLR": ("T_max", "eta_min last_epoch"),
    "CosineAnnealingWarmRestarts": ("T_0", "T_mult eta_min last_epoch"),
    "CyclicLR": (
        "base_lr max_lr",
        """step_size_up step_size_down mode gamma scale_fn scale_mode cycle_momentum base_momentum max_momentum
        last_epoch""",
    ),
    "ExponentialLR": ("gamma", "last_epoch"),
    "LinearLR": ("", "start_factor end_factor total_iters last_epoch"),
    "MultiStepLR": ("milestones", "gamma last_epoch"),
    "OneCycleLR": (
        "max_lr",
        """total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum base_momentum max_momentum
        div_factor final_div_factor three_phase last_epoch""",
    ),
    "PolynomialLR": ("", "total_iters power last_epoch"),
    "StepLR": ("step_size", "gamma last_epoch"),
}
# What a schedule's parameters may be; others are not computed with at once (the same classes, called).
SCHEDULED = {
    **dict.fromkeys("lr_range_test_step_size T_0 T_mult".split(), "count"),
    **dict.fromkeys("cycle_first_step_size step_size_up".split(), "number>0"),
    **dict.fromkeys("T_max step_size div_factor final_div_factor".split(), "number!=0"),
    **dict.fromkeys(
        """total_num_steps warmup_min_ratio cos_min_ratio decay_lr_rate cycle_first_stair_count decay_step_size
        lr_range_test_step_rate eta_min power""".split(),
        "number",
    ),
    **dict.fromkeys(
        """warmup_min_lr cycle_min_lr cycle_max_lr lr_range_test_min_lr base_lr max_lr base_momentum
        max_momentum""".split(),
        "rates",
    ),
    "warmup_max_lr": "rates?",
    "total_steps": "count?",
    "cycle_second_step_size": "float>=0?",
    "step_size_down": "number?",
    **dict.fromkeys("factor start_factor end_factor pct_start".split(), "0..1"),
}
WORDS = frozenset("warmup_type mode scale_mode anneal_strategy".split())  # parameters that are text

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
    names_are_given_once,
    values_have_their_type,
    gradients_have_the_models_type,
    scheduler_runs,
    optimizer_is_known,
    onebit_needs_an_old_deepspeed,
    optimizer_accepts_the_stage,
    optimizer_runs_here,
    optimizer_takes_its_params,
    optimizer_has_its_numbers,
    optimizer_is_there,
    freeze_step_lies_within_the_run,
    onebit_resume,
    precision_is_one,
    offload_is_not_ignored,
    zero_settings_fit_the_stage,
    quantized_weights_run_here,
    batch_multiplies_out,
    clipping_is_meant,
    packages_are_there,
    checkpoints_are_written,
    zenflow_is_offloaded,
    elasticity_adds_up,
    pipeline_and_zero,
    params_are_known,
    nothing_is_left_auto,
    hpz_divides_the_world,
)


AS_WRITTEN = (keys_are_known, values_have_their_type)  # the others see what DeepSpeed makes of it


def judge(situation: Situation) -> list[Finding]:
    """Every refusal, and every warning about what runs but will surprise."""
    return at_every_stage(situation, _judge)


def _judge(situation: Situation) -> list[Finding]:
    read = replace(situation, config=converted(situation.config))
    return [finding for rule in RULES for finding in rule(situation if rule in AS_WRITTEN else read)]


def at_every_stage(situation: Situation, judged: Callable[[Situation], list[Finding]]) -> list[Finding]:
    """Where Hugging Face decides on the stage ("auto"), what holds at all of them."""
    if situation.trainer != "hf" or situation.zero.get("stage") != "auto":
        return judged(situation)
    zero = situation.zero
    every = [
        judged(replace(situation, config={**situation.config, "zero_optimization": {**zero, "stage": stage}}))
        for stage in range(4)
    ]
    said = [{(finding.rule, finding.message, finding.path) for finding in found} for found in every]
    shared = set.intersection(*said)
    return [finding for finding in every[0] if (finding.rule, finding.message, finding.path) in shared]


def converted(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what pydantic makes of its values: bf16.enabled "true" is true, and a stage of "2" is 2."""

    def read(value: Any, path: tuple[str, ...], kind: str, strict: bool) -> Any:
        section = sections().get(path)
        if isinstance(value, dict) and section:
            return {
                key: read(child, (*path, key), section.keys.get(key, "any"), section.strict)
                for key, child in value.items()
            }
        return _converted(value, kind.rstrip("?")) if strict else value

    return {
        key: read(value, (key,), "any", False) if isinstance(value, dict) else value for key, value in config.items()
    }


def _converted(value: Any, kind: str) -> Any:
    fits = FITS.get(kind)
    if fits is None or not isinstance(value, (str, int, float)):
        return value
    try:
        if kind == "bool" and not isinstance(value, bool) and fits.converted(value):
            return value == 1 if _is_number(value) else str(value).lower() in TRUE
        if kind.startswith(("int", "stage")) and (fits.plain(value) or fits.converted(value)):
            return int(str(value).split(".")[0]) if isinstance(value, str) else int(value)
        if kind.startswith(("float", "0")) and fits.converted(value):
            return float(value)
    except (ValueError, OverflowError):  # thousands of digits
        pass
    return value


# Where a job file says what a DeepSpeed config says; the longest row counts.
FIELDS: dict[Path, Path] = {
    ("train_batch_size",): ("train", "global_batch"),
    ("train_micro_batch_size_per_gpu",): ("train", "micro_batch"),
    ("gradient_accumulation_steps",): ("train", "gradient_accumulation"),
    ("gradient_clipping",): ("train", "gradient_clipping"),
    ("bf16",): ("train", "precision"),
    ("fp16",): ("train", "precision"),
    ("optimizer",): ("train", "optimizer"),
    ("optimizer", "params"): ("train", "optimizer", "params"),
    **{("optimizer", "params", key): ("train", "optimizer", key) for key in "lr betas eps weight_decay".split()},
    ("optimizer", "params", "freeze_step"): ("train", "optimizer", "freeze_step"),
    ("optimizer", "params", "var_freeze_step"): ("train", "optimizer", "freeze_step"),
    ("scheduler",): ("train", "lr_schedule"),
    ("zero_optimization", "stage"): ("train", "zero"),
    ("zero_optimization", "offload_param"): ("train", "offload", "parameters"),
    ("zero_optimization", "offload_optimizer"): ("train", "offload", "optimizer"),
    ("zero_optimization", "offload_param", "nvme_path"): ("train", "offload", "nvme_path"),
    ("zero_optimization", "offload_optimizer", "nvme_path"): ("train", "offload", "nvme_path"),
    ("activation_checkpointing",): ("train", "activation_checkpointing"),
}


def job_path(path: Path, raw: dict[str, Any]) -> Path:
    """The line of a job file behind a key of its DeepSpeed config; `raw` is its train.deepspeed.

    ("zero_optimization", "stage") is train.zero, or train.deepspeed.zero_optimization.stage if that is there.
    """
    section: Any = raw
    depth = 0
    while depth < len(path) and isinstance(section, dict) and path[depth] in section:
        section, depth = section[path[depth]], depth + 1
    typed = next((size for size in range(len(path), 0, -1) if path[:size] in FIELDS), 0)
    if typed > depth:
        rest = path[typed:] if path[:typed] == ("optimizer", "params") else ()
        return (*FIELDS[path[:typed]], *rest)
    return ("train", "deepspeed", *path)
