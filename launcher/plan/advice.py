"""What runs and should not be left like that: memory, speed, precision, Hugging Face, checkpoints.

Rules as in rules.py, one step further from DeepSpeed's own checks. What an id means stands in data/advice.yaml.
Whatever claims that something fits or does not takes the assumption that speaks against the claim: the config
does not say whether the program recomputes activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, TypeGuard

from launcher import facts, yamldoc
from launcher.errors import Path
from launcher.plan import dsconfig, memory
from launcher.plan.rules import Finding, Found, Row, Situation, at_every_stage, converted
from launcher.plan.rules import rows as rules_rows
from launcher.plan.setup import Device, Estimate, Recompute, Setup
from launcher.record import record

SEQ_LEN = 2048  # tokens per sample where nobody says


@record
class Saved:
    """A checkpoint by its file names. Nothing of it is opened."""

    folder: str
    tag: str = ""
    stages: tuple[int, ...] = ()  # that write such files
    ranks: int | None = None  # data-parallel ranks that wrote
    model_ranks: int = 1  # tensor x pipeline ranks
    bf16: bool | None = None  # None: the names do not tell
    latest: bool = True


@record
class Case:
    """A situation, and what only advice asks for."""

    situation: Situation
    model: str = ""
    seq_len: int = SEQ_LEN
    saved: Saved | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.situation.config


@cache
def rows() -> dict[str, Row]:
    """Every id there is, DeepSpeed's own rules first."""
    own = yamldoc.load_tables(facts.DATA / "advice.yaml")
    return {**rules_rows(), **{id: Row(id, **row) for id, row in own.items()}}


def judge(case: Case) -> list[Finding]:
    def judged(situation: Situation) -> list[Finding]:
        return [finding for rule in RULES for finding in rule(replace(case, situation=situation))]

    read = replace(case.situation, config=converted(case.config))
    return at_every_stage(read, judged)


# --- what fits --------------------------------------------------------------------------------------


def setup(case: Case, *, recompute: Recompute = "none") -> Setup | None:
    """The config as the memory model's arguments; None without a model, a GPU and the number of ranks."""
    s = case.situation
    if s.shape is None or s.gpu is None or not s.world:
        return None
    tensor = _whole(_section(s.config, "tensor_parallel").get("autotp_size")) or 1
    if s.world % tensor or not 0 <= s.stage <= 3:
        return None
    samples, passes = batch(s)
    devices: dict[str, Device] = {"cpu": "cpu", "nvme": "nvme"}
    base = Setup(
        shape=s.shape,
        seq_len=case.seq_len,
        world=s.world,
        per_node=min(s.per_node or s.world, s.world),
        tensor=tensor,
        recompute=recompute,
        reduce_bucket=500_000_000,  # DeepSpeed's defaults, where the config says nothing
        allgather_bucket=500_000_000,
        overlap=s.stage == 3,
    )
    said = dsconfig.read(s.config, base)
    return replace(
        said,
        micro=samples or 1,
        accumulation=passes,
        stage=s.stage,
        precision=precision(s),
        offload_optimizer=devices.get(s.offloads("offload_optimizer"), "none") if s.stage else "none",
        offload_parameters=devices.get(s.offloads("offload_param"), "none") if s.stage == 3 else "none",
        hpz=said.hpz if s.stage == 3 and said.hpz > 1 and s.world % said.hpz == 0 else 1,
    )


def batch(s: Situation) -> tuple[int | None, int]:
    """Samples per rank and pass, None where they are open, and passes per step, by DeepSpeed's arithmetic.

    {train_batch_size: 64, train_micro_batch_size_per_gpu: 4} on 8 ranks accumulates 2.
    """
    total, micro, passes = (
        _whole(s.config.get(key))
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if total and s.data_parallel:
        micro = micro or max(1, total // s.data_parallel // (passes or 1))
        passes = passes or max(1, total // micro // s.data_parallel)
    return micro, passes or 1


def precision(s: Situation) -> str:
    """Of the weights: bf16, fp16 or fp32. Hugging Face's `auto` counts as on, bf16 first."""
    if _arguments_say(s):
        return "bf16"
    for name, sections in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        if any(_section(s.config, key).get("enabled") in (True, "auto") for key in sections):
            return name
    return "fp32"


def _arguments_say(s: Situation) -> bool:
    """Accelerate writes the section that is missing, as TrainingArguments or its own config have it."""
    return s.trainer == "hf" and not {"bf16", "bfloat16", "fp16"} & set(s.config)


def _weighed(case: Case, asked: Setup) -> tuple[Estimate, str]:
    gpu = case.situation.gpu
    assert gpu is not None
    estimate = memory.estimate(asked)
    return estimate, memory.verdict(estimate, gpu)


def _of(case: Case, estimate: Estimate) -> str:
    gpu = case.situation.gpu
    assert gpu is not None
    return f"{estimate.total:.0f} of {gpu.memory:.0f} GiB"


def _at(asked: Setup) -> str:
    offload = ", the optimizer offloaded" if asked.offload_optimizer != "none" else ""
    recompute = ", activations recomputed" if asked.recompute != "none" else ""
    return f"micro-batch {asked.micro}, {asked.seq_len:,} tokens{offload}{recompute}"


def _recomputed(case: Case) -> Recompute:
    """How activations are recomputed where they are."""
    on_host = _section(case.config, "activation_checkpointing").get("cpu_checkpointing") is True
    return "cpu" if on_host else "full"


def _least(case: Case, **changes: Any) -> tuple[Setup, Estimate] | None:
    """The setup with changes, if it fits: without recomputation where the original does, with it otherwise."""
    original = setup(case)
    if original is None:
        return None
    recompute = "none" if _weighed(case, original)[1] == "fits" else _recomputed(case)
    asked = replace(original, recompute=recompute, **changes)
    estimate, verdict = _weighed(case, asked)
    return (asked, estimate) if verdict == "fits" else None


def stage3_is_needed(case: Case) -> Found:
    s = case.situation
    original = setup(case)
    if original is None or s.stage != 3 or original.shards < 2:
        return
    whole: dict[str, Any] = {"offload_parameters": "none", "hpz": 1}
    found = _first(case, {**whole, "offload_optimizer": "none"})
    if not found and original.offload_optimizer != "none" and not _least(case, **NO_OFFLOAD):
        found = _first(case, whole)  # with offload as it is, where that is needed
    if found:
        asked, estimate = found
        sends = "2" if asked.stage == 1 else str(asked.accumulation + 1)
        message = (
            f"{_name(case)} fits at ZeRO-{asked.stage} with {_of(case, estimate)} ({_at(asked)}); ZeRO-3 sends "
            f"{3 * asked.accumulation} times its parameters per step, ZeRO-{asked.stage} {sends}"
        )
        yield Finding("DSL120", message, f"zero_optimization.stage: {asked.stage}", STAGE)


def _first(case: Case, changes: dict[str, Any]) -> tuple[Setup, Estimate] | None:
    """The lower of ZeRO-1 and ZeRO-2 that fits."""
    return _least(case, stage=1, **changes) or _least(case, stage=2, **changes)


NO_OFFLOAD = {"offload_optimizer": "none", "offload_parameters": "none"}


def offload_is_needed(case: Case) -> Found:
    s = case.situation
    original = setup(case)
    for key, name, changes in (
        ("offload_param", "parameters", {"offload_parameters": "none"}),
        ("offload_optimizer", "the optimizer", NO_OFFLOAD),
    ):
        if original is None or getattr(original, next(iter(changes))) == "none":
            continue
        found = _least(case, **changes)
        if found:
            through = "NVMe" if s.offloads(key) == "nvme" else "the host"
            asked, estimate = found
            message = (
                f"{_name(case)} fits without offloading {name}: {_of(case, estimate)} ({_at(asked)}); every step "
                f"waits for what goes through {through}"
            )
            yield Finding("DSL121", message, f"take zero_optimization.{key} out", ("zero_optimization", key))


def it_fits(case: Case) -> Found:
    s = case.situation
    plain, best = setup(case), setup(case, recompute=_recomputed(case))
    if plain is None or best is None or s.gpu is None:
        return
    estimate, verdict = _weighed(case, best)
    if verdict == "does not fit":
        parts = sorted(estimate.gpu, key=lambda part: -part.value)[:2]
        largest = " and ".join(f"{part.value:.0f} {part.name}" for part in parts)
        message = (
            f"{_name(case)} does not fit: at least {estimate.low:.0f} GiB per GPU ({largest}) with every weight "
            f"trained, {_at(best)}, and {s.gpu.name} has {s.gpu.memory * memory.USABLE:.0f} for it"
        )
        yield Finding("DSL122", message, _remedy(case, best), _deepest(s.config, STAGE))
        return
    if verdict == "tight":
        message = f"{_name(case)} is tight: {_of(case, estimate)} ({_at(best)}), where the estimate's error decides"
        yield Finding("DSL123", message, _remedy(case, best), _deepest(s.config, STAGE))
    without, verdict = _weighed(case, plain)
    if verdict == "does not fit" and "activation_checkpointing" not in s.config:
        message = (
            f"{_name(case)} needs activation checkpointing: {without.total:.0f} GiB without, {_of(case, estimate)} "
            f"with it ({plain.seq_len:,} tokens, micro-batch {plain.micro})"
        )
        yield Finding("DSL124", message, RECOMPUTE[s.trainer])


RECOMPUTE = {
    "plain": "in the program: model.gradient_checkpointing_enable() or torch.utils.checkpoint",
    "hf": "gradient_checkpointing=True in TrainingArguments",
}


def _remedy(case: Case, asked: Setup) -> str:
    """What makes it fit, the cheapest first; each way adds to the ones before."""
    at3 = {"micro": 1, "stage": 3}
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {"micro": 1}),
        ("", {"micro": 1, "stage": max(asked.stage, 2)}),
        ("", at3),
        ("offload_optimizer: {device: cpu}", {**at3, "offload_optimizer": "cpu"}),
        (
            "offload_optimizer and offload_param: {device: cpu}",
            {**at3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        ),
    )
    for offload, changes in ways:
        tried = replace(asked, **changes)
        estimate, verdict = _weighed(case, tried)
        if tried != asked and verdict == "fits":
            words = (
                "train_micro_batch_size_per_gpu: 1" if tried.micro != asked.micro else "",
                f"zero_optimization.stage: {tried.stage}" if tried.stage != asked.stage else "",
                offload,
            )
            return f"{', '.join(filter(None, words))}: {_of(case, estimate)}"
    return "more GPUs, or shorter samples: --nodes and --seq-len show what that gives"


def stage2_pays(case: Case) -> Found:
    s = case.situation
    passes = batch(s)[1]
    if s.stage != 2 or passes < 2 or (s.world or 1) < 2:
        return
    found = _least(case, stage=1)
    if found:
        asked, estimate = found
        message = (
            f"ZeRO-2 reduces gradients in each of {passes} micro-steps, {passes + 1} times the parameters per step; "
            f"ZeRO-1 sends them twice, and fits with {_of(case, estimate)} ({_at(asked)})"
        )
        yield Finding("DSL125", message, "zero_optimization.stage: 1", STAGE)


# --- precision and optimizer ------------------------------------------------------------------------


def precision_is_mixed(case: Case) -> Found:
    s = case.situation
    autocast = _section(s.config, "torch_autocast").get("enabled") is True
    amp = _section(s.config, "amp").get("enabled") in (True, "auto")
    if not s.gpus or autocast or amp or precision(s) != "fp32":
        return
    name = "fp16" if s.gpu and not s.gpu.bf16 else "bf16"
    path = next((_deepest(s.config, (key, "enabled")) for key in ("bf16", "fp16") if key in s.config), ())
    yield Finding(
        "DSL130", "neither bf16 nor fp16 is on: weights and gradients are fp32", f"{name}: {{enabled: true}}", path
    )


def precision_suits_the_gpu(case: Case) -> Found:
    s = case.situation
    if s.gpu and s.gpu.bf16 and s.on("fp16"):
        yield Finding(
            "DSL131", f"{s.gpu.name} has bf16, which needs no loss scaling", "bf16 instead of fp16", ("fp16",)
        )
    if s.gpu and not s.gpu.bf16 and (s.on("bf16") or s.on("bfloat16")):
        message = f"{s.gpu.name} has no bf16 units: it is emulated or refused"
        yield Finding("DSL132", message, "fp16: {enabled: true}", ("bf16",))
    if s.on("fp16") and re.search(r"\bm?t5\b|\bflan\b", case.model.lower().replace("_", " ").replace("-", " ")):
        message = f"{case.model} in fp16: T5's feed-forward activations exceed 65,504, and the loss turns nan"
        yield Finding("DSL133", message, "bf16, or fp32 where the GPU has none", ("fp16",))
    scale = _section(s.config, "fp16").get("loss_scale", 0)
    if s.on("fp16") and _is_number(scale) and scale > 0:
        message = (
            f"loss_scale {scale:g} is fixed: it does not come down after an overflow, nor grow when there is room"
        )
        yield Finding("DSL134", message, "fp16.loss_scale: 0", ("fp16", "loss_scale"))


def adam_is_adamw(case: Case) -> Found:
    s = case.situation
    decay = s.params.get("weight_decay")
    if s.optimizer.lower() == "adam" and "adam_w_mode" not in s.params and _is_number(decay) and decay > 0:
        message = f"Adam with weight_decay {decay:g} is AdamW here: adam_w_mode is on unless it is switched off"
        fix = "type: AdamW, or adam_w_mode: false for decay within the gradient"
        yield Finding("DSL136", message, fix, ("optimizer", "type"))


def optimizer_is_fused(case: Case) -> Found:
    s = case.situation
    if not s.gpus or s.params.get("torch_adam") is not True or s.optimizer.lower() not in ("adam", "adamw"):
        return
    path: Path = ("optimizer", "params", "torch_adam")
    offloaded = s.stage > 0 and s.offloads("offload_optimizer") != "none"
    ours = "DeepSpeedCPUAdam, which uses all cores," if offloaded else "FusedAdam, one kernel for all parameters,"
    message = f"torch_adam takes torch's own {s.optimizer} instead of {ours} that DeepSpeed has for it"
    yield Finding("DSL135", message, "leave torch_adam out", path)


# --- ZeRO -------------------------------------------------------------------------------------------

# elements; below the one, messages are too short for a network's bandwidth, above the other, buffers take GiBs
SMALL_BUCKET, LARGE_BUCKET = 1_000_000, 1_000_000_000


def zero_overlaps(case: Case) -> Found:
    s = case.situation
    path: Path = ("zero_optimization", "overlap_comm")
    if (s.world or 2) < 2:
        return
    if s.stage == 3 and s.zero.get("overlap_comm") is False:
        message = "overlap_comm is off: weights are fetched and gradients reduced while the GPU waits"
        yield Finding("DSL140", message, "overlap_comm: true", path)
    elif s.stage in (1, 2) and s.zero.get("overlap_comm") in (False, None):
        message = f"overlap_comm is off at ZeRO-{s.stage}: gradients are reduced while the GPU waits"
        yield Finding("DSL141", message, "overlap_comm: true; it takes a second bucket", _deepest(s.config, path))


def buckets_are_sensible(case: Case) -> Found:
    s = case.situation
    if not s.stage:
        return
    width = 4 if precision(s) == "fp32" else 2
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        size = s.zero.get(key)
        if not _is_number(size) or key == (
            "allgather_bucket_size" if s.stage == 3 else "stage3_prefetch_bucket_size"
        ):
            continue
        if 0 < size < SMALL_BUCKET and key != "stage3_prefetch_bucket_size" and (s.world or 2) > 1:
            message = f"{key} {size:,.0f} is {size * width / 1e6:.2g} MB per message: latency, not bandwidth, decides"
            yield Finding("DSL142", message, "5e7 to 5e8 elements", ("zero_optimization", key))
        two = key == "reduce_bucket_size" and s.stage in (1, 2) and s.zero.get("overlap_comm") is True
        taken = size * width * (2 if two else 1) / memory.GIB
        if size >= LARGE_BUCKET or (s.gpu and taken > s.gpu.memory / 10):
            of = f" of {s.gpu.memory:.0f}" if s.gpu else ""
            message = f"{key} {size:,.0f} elements take up to {taken:.1f}{of} GiB{' in two buffers' if two else ''}"
            yield Finding("DSL143", message, "5e7 to 5e8 elements", ("zero_optimization", key))


def offload_is_tuned(case: Case) -> Found:
    s = case.situation
    nvme: Path = ()
    for key in ("offload_optimizer", "offload_param"):
        device, needs = s.offloads(key), 3 if key == "offload_param" else 1
        if device not in ("cpu", "nvme") or s.stage < needs:
            continue
        path: Path = ("zero_optimization", key, "pin_memory")
        if _section(s.zero, key).get("pin_memory") is False:
            message = f"{key} without pinned memory: copies go through a second buffer, and nothing overlaps them"
            yield Finding("DSL144", message, "pin_memory: true", path)
        if device == "nvme":
            nvme = nvme or path[:2]
    if nvme and not _section(s.config, "aio"):
        message = "offload to NVMe without an aio section: blocks of 1 MiB, 8 in flight, one thread per rank"
        yield Finding("DSL145", message, "ds_nvme_tune measures the device and prints the section", nvme)
    if s.stage == 3 and s.offloads("offload_optimizer") == "cpu" and s.offloads("offload_param") == "nvme":
        message = (
            "parameters go to NVMe (2 bytes each) while the optimizer's states (12 with AdamW) stay in host memory"
        )
        fix = "offload_optimizer to nvme first, and offload_param to cpu"
        yield Finding("DSL146", message, fix, ("zero_optimization", "offload_param"))


def hugging_face_can_save(case: Case) -> Found:
    s = case.situation
    names = [
        form + "weights_on_model_save" for form in ("stage3_gather_16bit_", "gather_16bit_", "stage3_gather_fp16_")
    ]
    if s.trainer != "hf" or s.stage != 3 or any(s.zero.get(name) in (True, "auto") for name in names):
        return
    path: Path = ("zero_optimization", names[0])
    message = "save_model() writes no weights that from_pretrained() can read: at ZeRO-3 no rank has them whole"
    yield Finding("DSL147", message, f"{names[0]}: true", _deepest(s.config, path))


def compression_is_meant(case: Case) -> Found:
    s = case.situation
    if s.stage == 3 and s.zero.get("zero_quantized_gradients") is True:
        message = "zero_quantized_gradients sends gradients in 4 bits: the loss is no longer that of ZeRO-3"
        fix = "compare the loss with a run without it first"
        yield Finding("DSL149", message, fix, ("zero_optimization", "zero_quantized_gradients"))


# --- activation checkpointing, logs, batch ------------------------------------------------------------


def checkpointing_is_configured(case: Case) -> Found:
    s = case.situation
    name = "activation_checkpointing"
    section = _section(s.config, name)
    if not section:
        return
    partition = section.get("partition_activations") is True
    contiguous = section.get("contiguous_memory_optimization") is True
    count = section.get("number_checkpoints")
    path: Path = (name, "contiguous_memory_optimization")
    if contiguous and (not partition or count is None):
        lacks = "partition_activations" if not partition else "number_checkpoints"
        message = f"contiguous_memory_optimization without {lacks}: checkpointing.configure() ends in an assertion"
        fix = "contiguous_memory_optimization: false, or number_checkpoints: the layers that are checkpointed"
        yield Finding("DSL150", message, fix, path)
    if count is not None and not contiguous:
        message = "number_checkpoints sizes the contiguous buffer only: it does not set how much is recomputed"
        yield Finding("DSL151", message, "leave it out", (name, "number_checkpoints"))
    tensor = _whole(_section(s.config, "tensor_parallel").get("autotp_size")) or 1
    if partition and tensor == 1:
        message = "partition_activations divides by the tensor-parallel ranks: with one it copies and saves nothing"
        yield Finding(
            "DSL152",
            message,
            "partition_activations: false, unless the program has an mpu",
            (name, "partition_activations"),
        )
    if any(section.values()):
        yield Finding("DSL153", SECTION_ALONE[s.trainer], RECOMPUTE[s.trainer], (name,))


SECTION_ALONE = {
    "plain": "the section by itself recomputes nothing: it applies to what the program wraps in "
    "deepspeed.checkpointing.checkpoint",
    "hf": "Hugging Face's models recompute with torch.utils.checkpoint, which does not read this section",
}


def gradients_are_clipped(case: Case) -> Found:
    s = case.situation
    value = s.config.get("gradient_clipping")
    if _is_number(value) and value == 0 and precision(s) != "fp32" and not (s.row and s.row.onebit):
        message = f"gradients are not clipped: in {precision(s)} one bad batch can undo a run of a language model"
        yield Finding("DSL154", message, "gradient_clipping: 1.0", ("gradient_clipping",))


def diagnostics_are_off(case: Case) -> Found:
    s = case.situation
    if s.config.get("wall_clock_breakdown") is True:
        path: Path = ("wall_clock_breakdown",)
        message = "wall_clock_breakdown waits for the GPU after every micro-step, to read its timers"
        yield Finding("DSL155", message, "wall_clock_breakdown: false", path)
    if s.config.get("steps_per_print") == 1:
        message = "steps_per_print 1 writes a line from rank 0 in every step"
        yield Finding("DSL156", message, "steps_per_print: 100", ("steps_per_print",))
    if _section(s.config, "comms_logger").get("enabled") is True:
        path = ("comms_logger", "enabled")
        message = "comms_logger waits for the GPU after every collective: nothing overlaps any more"
        yield Finding("DSL157", message, "comms_logger.enabled: false", path)


def batch_is_said(case: Case) -> Found:
    s = case.situation
    if s.trainer == "hf":
        return
    total, given, passes = (
        _whole(s.config.get(key))
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if given and "train_batch_size" not in s.config:
        ranks = f"{s.world} ranks = {given * (passes or 1) * s.world}" if s.world else "the number of ranks"
        message = f"train_batch_size is not said: it is {given} x {passes or 1} x {ranks}, and changes with the ranks"
        path: Path = ("train_micro_batch_size_per_gpu",)
        yield Finding("DSL158", message, "train_batch_size, which then is checked at every start", path)
    lone = total and "train_micro_batch_size_per_gpu" not in s.config
    if lone and "gradient_accumulation_steps" not in s.config and s.world and total and total >= s.world:
        message = f"train_batch_size {total} alone: {total // s.world} samples per GPU at once, without accumulation"
        yield Finding(
            "DSL159", message, "train_micro_batch_size_per_gpu says what a GPU holds", ("train_batch_size",)
        )


def zero_has_ranks(case: Case) -> Found:
    s = case.situation
    offloads = any(s.offloads(key) != "none" for key in ("offload_optimizer", "offload_param"))
    if s.world == 1 and s.stage and not offloads:
        message = f"ZeRO-{s.stage} on one rank has nobody to divide anything with"
        yield Finding("DSL160", message, "zero_optimization.stage: 0, or offload", STAGE)


# --- Hugging Face -----------------------------------------------------------------------------------

# What the Trainer or Accelerate put in the place of `auto`
# (transformers/integrations/deepspeed.py, accelerate/utils/dataclasses.py and accelerator.py).
FILLED = frozenset(
    """train_micro_batch_size_per_gpu train_batch_size gradient_accumulation_steps gradient_clipping
    optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
    scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.total_num_steps fp16.enabled bf16.enabled amp.enabled amp.opt_level
    zero_optimization.reduce_bucket_size zero_optimization.stage3_prefetch_bucket_size
    zero_optimization.stage3_param_persistence_threshold zero_optimization.stage
    zero_optimization.offload_optimizer.device zero_optimization.offload_param.device
    zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param.nvme_path
    zero_optimization.stage3_gather_16bit_weights_on_model_save steps_per_print""".split()
)
# What TrainingArguments has too: the Trainer compares, and refuses to start when they differ.
COMPARED = frozenset(
    """train_micro_batch_size_per_gpu gradient_accumulation_steps train_batch_size gradient_clipping
    optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
    scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps scheduler.params.total_num_steps""".split()
)


def hugging_face_fills_auto(case: Case) -> Found:
    if case.situation.trainer != "hf":
        return
    same = []
    for path, value in _leaves(case.config):
        name = ".".join(map(str, path))
        if value == "auto" and name not in FILLED:
            message = f"{name} is `auto`, and neither the Trainer nor Accelerate fills it: it ends in a ValueError"
            yield Finding("DSL170", message, "write the value, or leave the key out", path)
        elif name in COMPARED and value not in ("auto", None):
            same.append((path, name))
    if same:
        names = ", ".join(name for _, name in same)
        message = f"the Trainer compares {names} with TrainingArguments, and refuses to start when they differ"
        yield Finding("DSL171", message, '"auto": the value of TrainingArguments', same[0][0])


# --- checkpoints --------------------------------------------------------------------------------------


def saved(folder: str, names: Iterable[str], *, latest: str | None = None) -> Saved:
    """What wrote a checkpoint, by the names below its folder; `latest` is the text of that file."""
    names = sorted(set(names))
    tags: dict[str, list[str]] = {}
    for name in names:
        tag, _, file = name.rpartition("/")
        if "/" not in tag and STATES.search(file):
            tags.setdefault(tag, []).append(file)
    known = latest is not None and latest.strip() in tags
    tag = str(latest).strip() if known else max(tags, key=_natural, default="")
    files = tags.get(tag, [])
    found = [match for file in files if (match := STATES.search(file))]
    ranks = {int(match["rank"]) for match in found if match["rank"] and match["what"] == "optim"}
    weights = {int(match["rank"]) for match in found if match["rank"] and match["what"] == "model"}
    layers = any(file.startswith("layer_") for file in files)
    model = {match["model"] for match in found}
    return Saved(
        folder=folder,
        tag=tag,
        stages=(3,) if weights else (1, 2) if ranks else (0,) if found else (),
        ranks=len(ranks) if ranks and not layers else None,
        model_ranks=max(1, len(model)),
        bf16=any(file.startswith("bf16_") for file in files) if ranks else None,
        latest=latest is not None or tag == "",
    )


STATES = re.compile(
    r"(?:^|/)(?:bf16_)?(?:zero_pp_rank_(?P<rank>[0-9]+)_)?mp_rank_(?P<model>[0-9]+)_(?P<what>model|optim)_states\.pt$"
)


def _natural(name: str) -> list[Any]:
    """global_step900 before global_step1000."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"([0-9]+)", name)]


def checkpoint_can_be_loaded(case: Case) -> Found:
    s, found = case.situation, case.saved
    if found is None:
        return
    where = f"{found.folder}/{found.tag}" if found.tag else found.folder
    if not found.stages:
        message = f"{where} holds no checkpoint: load_checkpoint returns (None, None) and training starts from zero"
        yield Finding("DSL183", message, "the folder that save_checkpoint was given")
        return
    if not found.latest:
        message = f"{found.folder} has no file `latest`: load_checkpoint returns (None, None) without a tag"
        yield Finding("DSL183", message, f'load_checkpoint(..., tag="{found.tag}")')
    universal = _section(s.config, "checkpoint").get("load_universal") is True
    if s.stage not in found.stages:
        wrote = " or ".join(str(stage) for stage in found.stages)
        message = f"{where} was saved with ZeRO-{wrote}, and the config has stage {s.stage}: it does not load"
        yield Finding("DSL180", message, f"zero_optimization.stage: {found.stages[-1]}", _deepest(s.config, STAGE))
        return
    ranks = s.world // found.model_ranks if s.world else None
    if s.stage and found.ranks and ranks and ranks != found.ranks and not universal:
        message = f"{where} was saved by {found.ranks} data-parallel ranks, and {ranks} would load it: ZeRO refuses"
        fix = f"{found.ranks} ranks, or ds_to_universal and checkpoint.load_universal: true"
        yield Finding("DSL181", message, fix, _deepest(s.config, STAGE))
    bf16 = precision(s) == "bf16"
    unknown = _arguments_say(s) or any(_section(s.config, key).get("enabled") == "auto" for key in ("bf16", "fp16"))
    if s.stage and found.bf16 is not None and found.bf16 != bf16 and not unknown and not universal:
        wrote, reads = ("bf16", "without it") if found.bf16 else ("fp16 or fp32", "with bf16")
        message = (
            f"{where} was saved in {wrote}, and the config loads {reads}: the optimizer's files have other names"
        )
        yield Finding("DSL182", message, "the precision it was saved with", _deepest(s.config, ("bf16", "enabled")))


# --- small things -------------------------------------------------------------------------------------

STAGE: Path = ("zero_optimization", "stage")


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
    """A positive whole number, also one that JSON spells 5e8; None for anything else."""
    if _is_number(value) and 0 < value < 10**15 and value == int(value):
        return int(value)
    return None


def _deepest(config: dict[str, Any], path: Path) -> Path:
    """The part of a path that the config has."""
    found: list[str | int] = []
    node: Any = config
    for part in path:
        if not isinstance(node, dict) or part not in node:
            break
        found.append(part)
        node = node[part]
    return tuple(found)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    else:
        yield path, value


def _name(case: Case) -> str:
    return case.model or "the model"


RULES: tuple[Callable[[Case], Found], ...] = (
    stage3_is_needed,
    offload_is_needed,
    it_fits,
    stage2_pays,
    precision_is_mixed,
    precision_suits_the_gpu,
    adam_is_adamw,
    optimizer_is_fused,
    zero_overlaps,
    buckets_are_sensible,
    offload_is_tuned,
    hugging_face_can_save,
    compression_is_meant,
    checkpointing_is_configured,
    gradients_are_clipped,
    diagnostics_are_off,
    batch_is_said,
    zero_has_ranks,
    hugging_face_fills_auto,
    checkpoint_can_be_loaded,
)
