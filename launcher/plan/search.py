"""The ways to train that a job file leaves open, weighed: what fits, how long a step takes, which one is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from launcher.errors import UserError
from launcher.plan import batch as batches
from launcher.plan import memory, step_time
from launcher.plan.setup import Alternative, Device, Estimate, Machine, Recompute, Setup, StepTime, Verdict
from launcher.record import record
from launcher.spec import Shape

LARGEST_MICRO = 64
# Predicted times this close are one time, as far as a prediction can tell: then the simpler way wins.
TIE = 1.1
# And within one kind of way the one that needs less memory.
SAME = 1.01
ORDER: tuple[Recompute, ...] = ("none", "selective", "full", "cpu")
PLACES: tuple[Device, ...] = ("none", "cpu", "nvme")
WORDS = {"none": "", "selective": "selective recomputation", "full": "recomputation", "cpu": "recomputation, on CPU"}


@record
class Space:
    """What may be chosen from; one value where the job file says it."""

    stages: tuple[int, ...]
    recomputes: tuple[Recompute, ...]
    places: tuple[tuple[Device, Device], ...]  # of optimizer states and parameters
    tensors: tuple[int, ...] = (1,)
    pipelines: tuple[int, ...] = (1,)
    total: batches.Given = "auto"
    micro: batches.Given = "auto"
    accumulation: batches.Given = "auto"


@record
class Weighed:
    setup: Setup
    estimate: Estimate
    verdict: Verdict


@record
class Timed(Weighed):
    time: StepTime

    @property
    def per_token(self) -> float:
        return self.time.seconds / self.time.tokens


def setups(base: Setup, space: Space) -> Iterator[Setup]:
    """Every setup of the space whose numbers divide. Raises UserError when no batch does."""
    error: UserError | None = None
    found = False
    for tensor in space.tensors:
        for pipeline in space.pipelines:
            inner = tensor * pipeline * base.sequence
            if base.world % inner or not divides(base.shape, tensor=tensor, pipeline=pipeline):
                continue
            try:
                pairs = batches.options(
                    space.total,
                    space.micro,
                    space.accumulation,
                    replicas=base.world // inner,
                    largest_micro=LARGEST_MICRO,
                )
            except UserError as problem:
                error = error or problem
                continue
            for stage in space.stages:
                for optimizer, weights in space.places:
                    if not possible(stage, pipeline, optimizer, weights):
                        continue
                    here = base if stage == 3 else replace(base, **NO_ZERO_3)
                    for recompute in space.recomputes:
                        for pair in pairs:
                            found = True
                            yield replace(
                                here,
                                tensor=tensor,
                                pipeline=pipeline,
                                stage=stage,
                                offload_optimizer=optimizer,
                                offload_parameters=weights,
                                recompute=recompute,
                                micro=pair.micro,
                                accumulation=pair.accumulation,
                            )
    if not found and error:
        raise error


# What a job file's raw keys may say and DeepSpeed reads at stage 3 alone.
NO_ZERO_3: dict[str, Any] = {"hpz": 1, "quantized_weights": False, "quantized_gradients": False}


def divides(shape: Shape, *, tensor: int, pipeline: int) -> bool:
    """Heads and key/value heads share out over tensor ranks, layers over pipeline stages."""
    kv_heads = shape.kv_heads or shape.heads
    return not (shape.heads % tensor or (kv_heads % tensor and tensor % kv_heads) or shape.layers < pipeline)


def possible(stage: int, pipeline: int, optimizer: Device, weights: Device) -> bool:
    """What DeepSpeed does not ignore or refuse (rules.py has the checks)."""
    if weights != "none" and stage != 3:
        return False
    if (optimizer == "nvme" and stage != 3) or (optimizer != "none" and stage == 0):
        return False
    return not (pipeline > 1 and stage >= 2)


def weigh(found: Iterable[Setup], machine: Machine) -> list[Weighed]:
    weighed = []
    for setup in found:
        estimate = memory.estimate(setup)
        verdict = memory.verdict(estimate, machine.gpu, host_gib=machine.host_gib, nvme_gib=machine.nvme_gib)
        weighed.append(Weighed(setup, estimate, verdict))
    return weighed


def timed(weighed: Iterable[Weighed], machine: Machine) -> list[Timed]:
    return [Timed(w.setup, w.estimate, w.verdict, step_time.predict(w.setup, machine)) for w in weighed]


def best(weighed: list[Weighed], machine: Machine) -> Timed | None:
    """The simplest of those nearly as fast as the fastest that fits; the smallest tight one where none fits."""
    ways = timed((way for way in weighed if way.verdict == "fits"), machine)
    if not ways:
        tight = [way for way in weighed if way.verdict == "tight"]
        return smallest(tight, machine) if tight else None
    fastest = min(way.per_token for way in ways)
    kinds: dict[tuple[object, ...], list[Timed]] = {}
    for way in ways:
        kinds.setdefault(group(way.setup), []).append(way)
    leaders = [leader(kind) for kind in kinds.values()]
    equals = [way for way in leaders if way.per_token <= fastest * TIE]
    return min(equals, key=lambda way: (simplicity(way.setup), way.per_token))


def leader(kind: list[Timed]) -> Timed:
    """Of one kind, the fastest; of those within a hundredth the smallest."""
    fastest = min(way.per_token for way in kind)
    return min((way for way in kind if way.per_token <= fastest * SAME), key=lambda way: way.estimate.total)


def smallest(weighed: list[Weighed], machine: Machine) -> Timed:
    """What comes closest: where the host is too small, the way that asks least of it among those a GPU can hold."""
    held = [way for way in weighed if way.estimate.low <= machine.gpu.memory * memory.USABLE]
    least = min(held, key=lambda way: (way.estimate.host_total, way.estimate.total)) if held else None
    if least is None or least.verdict != "does not fit":
        least = min(weighed, key=lambda way: way.estimate.total)
    (way,) = timed([least], machine)
    return way


def why(taken: Timed, weighed: list[Weighed], machine: Machine) -> str:
    """Why this one and no other."""
    if taken.verdict != "fits":
        return "nothing fits with room to spare, and this needs least"
    fastest = min(way.per_token for way in timed((way for way in weighed if way.verdict == "fits"), machine))
    if taken.per_token <= fastest * SAME:
        return "the fastest that fits"
    return f"the simplest within {TIE - 1:.0%} of the fastest that fits"


def why_not_without(taken: Timed, without: list[Weighed], machine: Machine) -> str:
    """Why offload or recomputation was worth it."""
    other = best(without, machine)
    if other is None or (other.verdict != "fits" and taken.verdict == "fits"):
        return "nothing fits without it"
    return f"{other.per_token / taken.per_token:.2f}x faster than the best without it"


def simplicity(setup: Setup) -> tuple[int, ...]:
    return (
        PLACES.index(setup.offload_optimizer) + PLACES.index(setup.offload_parameters),
        setup.pipeline,
        setup.tensor,
        setup.stage,
        ORDER.index(setup.recompute),
    )


def group(setup: Setup) -> tuple[object, ...]:
    """What makes two setups different ways rather than two sizes of one."""
    return (
        *(setup.stage, setup.offload_optimizer, setup.offload_parameters, setup.recompute),
        *(setup.tensor, setup.pipeline, setup.hpz, setup.quantized_weights, setup.quantized_gradients, setup.onebit),
    )


def alternatives(
    weighed: list[Weighed], taken: Timed, space: Space, machine: Machine, *, said: str, compression: bool
) -> tuple[Alternative, ...]:
    """The taken way first, then the best of every other kind: by time what fits, by size what does not.

    `said` is why the first was taken. `compression`: the planner might compress where it is not told off.
    """
    kinds: dict[tuple[object, ...], list[Weighed]] = {}
    for way in weighed:
        kinds.setdefault(group(way.setup), []).append(way)
    kinds.pop(group(taken.setup), None)
    found = []
    for ways in kinds.values():
        found.append(best(ways, machine) or smallest(ways, machine))
    order = {"fits": 0, "tight": 0, "does not fit": 1}
    found.sort(
        key=lambda way: (
            order[way.verdict],
            way.estimate.total if way.verdict == "does not fit" else way.per_token,
            simplicity(way.setup),
        )
    )
    off = ("train.compression=none",) if compression else ()
    first = Alternative(name(taken.setup), taken.setup, taken.estimate, taken.time, taken.verdict, f"taken: {said}")
    return (first, *(alternative(way, taken, space, machine, off) for way in found))


def alternative(way: Timed, taken: Timed, space: Space, machine: Machine, off: tuple[str, ...]) -> Alternative:
    changes = (*changed(way.setup, taken.setup, space), *off)
    ratio = way.per_token / taken.per_token
    if way.verdict == "does not fit":
        why = short(way.estimate, machine)
    elif way.verdict == "tight" and taken.verdict == "fits":
        why = f"{ratio:.2f}x the time, and memory is tight"
    elif ratio >= SAME:
        why = f"{ratio:.2f}x the time of a step"
    elif ratio < 1 / TIE:
        ruled = "; the job file rules it out" if taken.verdict == "fits" else ", and larger"
        why = f"{1 / ratio:.2f}x faster{ruled}"
    elif ratio <= 1 / SAME:
        why = f"{1 / ratio:.2f}x faster at best: too little for what is less simple"
    else:
        why = "as fast, and less simple"
    return Alternative(name(way.setup), way.setup, way.estimate, way.time, way.verdict, why, changes)


def short(estimate: Estimate, machine: Machine) -> str:
    """What there is too little of: "needs 92 of 80 GiB per GPU"."""
    rows = (
        (estimate.total, machine.gpu.memory, "per GPU"),
        (estimate.host_total, machine.host_gib, "of host memory per node"),
        (estimate.nvme_total, machine.nvme_gib, "of NVMe per node"),
    )
    for need, have, where in rows[1:]:
        if have and need > have:
            return f"needs {need:,.0f} of {have:,.0f} GiB {where}"
    return f"needs {rows[0][0]:,.0f} of {rows[0][1]:,.0f} GiB per GPU"


def name(setup: Setup) -> str:
    """ZeRO-3, optimizer on CPU, recomputation, micro-batch 4 x 2."""
    parts = [f"ZeRO-{setup.stage}"]
    if setup.tensor > 1:
        parts.append(f"tensor {setup.tensor}")
    if setup.pipeline > 1:
        parts.append(f"pipeline {setup.pipeline}")
    if setup.offload_optimizer != "none" and setup.offload_optimizer == setup.offload_parameters:
        parts.append(f"all on {place(setup.offload_optimizer)}")
    else:
        if setup.offload_optimizer != "none":
            parts.append(f"optimizer on {place(setup.offload_optimizer)}")
        if setup.offload_parameters != "none":
            parts.append(f"parameters on {place(setup.offload_parameters)}")
    if setup.recompute != "none":
        parts.append(WORDS[setup.recompute])
    if setup.hpz > 1:
        parts.append(f"hpZ {setup.hpz}")
    quantized = (("weights", setup.quantized_weights), ("gradients", setup.quantized_gradients))
    if any(on for _, on in quantized):
        parts.append("quantized " + " and ".join(word for word, on in quantized if on))
    if setup.onebit < 1:
        parts.append("1-bit optimizer")
    parts.append(f"micro-batch {setup.micro}" + (f" x {setup.accumulation}" if setup.accumulation > 1 else ""))
    return ", ".join(parts)


def place(device: Device) -> str:
    return {"cpu": "CPU", "nvme": "NVMe"}.get(device, device)


def changed(setup: Setup, taken: Setup, space: Space) -> tuple[str, ...]:
    """What to write in the job file to get `setup`: what it leaves open, and what differs from what is planned."""
    total = space.total != "auto"
    rows = (
        ("train.zero", "stage", len(space.stages) > 1),
        ("train.micro_batch", "micro", space.micro == "auto"),
        ("train.gradient_accumulation", "accumulation", space.accumulation == "auto" and not total),
        ("train.offload.optimizer", "offload_optimizer", len({optimizer for optimizer, _ in space.places}) > 1),
        ("train.offload.parameters", "offload_parameters", len({weights for _, weights in space.places}) > 1),
        ("train.parallel.tensor", "tensor", len(space.tensors) > 1),
        ("train.parallel.pipeline", "pipeline", len(space.pipelines) > 1),
    )
    found = []
    for key, field, open_ in rows:
        value = getattr(setup, field)
        derived = field == "accumulation" and total and space.accumulation == "auto"
        if open_ or (value != getattr(taken, field) and not derived):
            found.append(f"{key}={value}")
    if len(space.recomputes) > 1 or setup.recompute != taken.recompute:
        found.append(f"train.activation_checkpointing={RECOMPUTE_VALUES[setup.recompute]}")
    return tuple(found)


RECOMPUTE_VALUES = {"none": "false", "selective": "selective", "full": "true", "cpu": "cpu"}


@record
class Compressed:
    """One kind of compression, at its best: `gain` over the fastest that sends everything, `flip` in GB/s."""

    row: step_time.Candidate
    way: Timed
    gain: float
    flip: float | None


def compressed(weighed: list[Weighed], plain: Timed, machine: Machine, *, flips: bool) -> list[Compressed]:
    """What sending less would gain, kind by kind, over every stage and size that may be chosen."""
    kinds: dict[str, list[step_time.Candidate]] = {}
    for way in weighed:
        for row in step_time.candidates(way.setup):
            kinds.setdefault(row.name, []).append(row)
    whole = timed((way for way in weighed if way.verdict == "fits"), machine) or [plain]
    fastest = min(way.per_token for way in whole)
    found = []
    for rows in kinds.values():
        sized = weigh((row.setup for row in rows), machine)
        able = timed((way for way in sized if way.verdict == "fits"), machine)
        way = leader(able) if able else smallest(sized, machine)
        flip = step_time.flip_point(extremes(whole), extremes(able or [way]), machine) if flips else None
        row = next(row for row in rows if row.setup == way.setup)
        found.append(Compressed(row, way, fastest / way.per_token, flip))
    return found


def extremes(ways: list[Timed]) -> list[Setup]:
    """Of every kind the fastest here and the one with the largest micro-batch, which sends least often."""
    kinds: dict[tuple[object, ...], list[Timed]] = {}
    for way in ways:
        kinds.setdefault(group(way.setup), []).append(way)
    found: dict[Setup, None] = {}
    for kind in kinds.values():
        for way in (min(kind, key=lambda way: way.per_token), max(kind, key=lambda way: way.setup.micro)):
            found[way.setup] = None
    return list(found)


def by_stage(taken: Setup, machine: Machine) -> tuple[tuple[str, Estimate, Verdict], ...]:
    """The same batch at every stage, and with offload: label, what a GPU would hold, verdict."""
    plain = replace(taken, offload_optimizer="none", offload_parameters="none", hpz=1)
    rows = [(f"ZeRO-{stage}", replace(plain, stage=stage)) for stage in (0, 1, 2, 3)]
    rows += [
        ("ZeRO-3, optimizer on CPU", replace(plain, stage=3, offload_optimizer="cpu")),
        ("ZeRO-3, all on CPU", replace(plain, stage=3, offload_optimizer="cpu", offload_parameters="cpu")),
    ]
    able = [
        (label, setup)
        for label, setup in rows
        if possible(setup.stage, setup.pipeline, setup.offload_optimizer, setup.offload_parameters)
    ]
    weighed = weigh((setup for _, setup in able), machine)
    return tuple((label, way.estimate, way.verdict) for (label, _), way in zip(able, weighed, strict=True))
