"""A job file, the tables and, where there is one, the plan -> what a preflight is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launcher import expected, facts
from launcher import plan as plans
from launcher.errors import UserError
from launcher.plan import Plan
from launcher.preflight import Rung, Setting
from launcher.spec import JobSpec

Config = dict[str, Any]
OWN = "ds_config.json"
RECOMMENDED_SHM = 8 << 30  # NCCL and data loaders on a node of 8 GPUs; the Kubernetes default in `shm` is 16Gi


def make(spec: JobSpec, plan: Plan | None = None, *, rungs: Sequence[tuple[Rung, Config]] = ()) -> Setting:
    """`rungs` of the plan's ladder, where its config may be exchanged.

    Raises UserError for a GPU or fabric that no table has.
    """
    resources, asked = spec.resources, spec.preflight
    gpus = resources.gpus_per_node
    gpu = facts.gpu(resources.gpu) if gpus and resources.gpu else None
    several = resources.nodes + resources.spares > 1
    fabric = facts.fabric(resources.fabric) if gpus and resources.fabric and several else None
    limits = expected.limits(spec)
    saving = plan.saving if plan else None
    return Setting(
        name=spec.name,
        nodes=resources.nodes,
        spares=resources.spares,
        per_node=spec.per_node,
        gpus=gpus,
        gpu=gpu.name if gpu else "",
        gpu_names=product_words(gpu.name) if gpu else (),
        fabric=fabric.name if fabric else "",
        backend="nccl" if gpus else "gloo",
        stages=asked.stages,
        deepspeed=spec.environment.deepspeed or "",
        checkpoint_dir=plan.checkpoint_dir if plan else "",
        checkpoint_bytes=round(saving.bytes) if saving else 0,
        files=(spec.train.script,) if plan and spec.train.script else (),
        ops=needed_ops(plan) if plan else (),
        shm_bytes=RECOMMENDED_SHM if gpus else 0,
        link_gbits=limits.link_gbits,
        ports=limits.ports,
        node=limits.node,
        pair=limits.pair,
        whole=limits.whole,
        assumed=plan.machine.node if plan and plan.machine and several else 0.0,
        ladder=tuple(rung for rung, _ in rungs),
        matmul_tflops=gpu.peak * gpu.matmul if gpu else 0.0,
        host_copy=gpu.pcie if gpu else 0.0,
        seconds=asked.seconds,
        join_timeout=asked.join_timeout,
        nccl_tests=asked.nccl_tests or "",
    )


def product_words(gpu: str) -> tuple[str, ...]:
    """h100-80gb -> ("H100",): the word of nvidia-smi's product name that tells the type."""
    return (gpu.split("-")[0].upper(),)


def needed_ops(plan: Plan) -> tuple[str, ...]:
    """The compiled operators that DeepSpeed loads for this plan, as ds_report names them."""
    config = plan.config or {}
    optimizer = str((config.get("optimizer") or {}).get("type", "")).lower()
    zero = config.get("zero_optimization")
    sections = [zero.get(key) for key in ("offload_optimizer", "offload_param")] if isinstance(zero, dict) else []
    states, weights = [
        str(section.get("device", "none")) if isinstance(section, dict) else "none" for section in sections
    ] or ("none", "none")
    adam = optimizer in ("adam", "adamw")
    found = []
    if "nvme" in (states, weights):
        found.append("async_io")
    if adam and states != "none":
        found.append("cpu_adam")
    elif adam and plan.spec.resources.gpus_per_node:
        found.append("fused_adam")
    elif optimizer == "lamb" and plan.spec.resources.gpus_per_node:
        found.append("fused_lamb")
    return tuple(found)


STEPS = (1.0, 0.3, 0.1)  # of the bandwidth that the plan counts on


def ladder(plan: Plan) -> list[tuple[Rung, Config]]:
    """What the same job file becomes for less bandwidth, with the DeepSpeed config of each.

    Only what can be exchanged in place: the same batch, command and environment. Two rungs with one config share
    its file. Nothing on one node, where the job file says what was measured, or where no step time is known.
    """
    resources = plan.spec.resources
    if plan.machine is None or plan.time is None or resources.nodes < 2 or resources.bandwidth:
        return []
    assert plan.setup is not None  # whoever knows the time of a step
    assert plan.config is not None
    # whether activations are recomputed is up to the program, which does not plan anew
    kept: Any = next(word for word, way in plans.RECOMPUTE.items() if way == plan.setup.recompute)
    train = replace(plan.spec.train, activation_checkpointing=kept)
    found: list[tuple[Rung, Config]] = []
    files = {repr(plan.config): OWN}
    for share in STEPS:
        bandwidth = float(f"{share * plan.machine.node:.3g}")
        spec = replace(plan.spec, resources=replace(resources, bandwidth=bandwidth), train=train)
        try:
            made = plan if share == 1 else plans.make(spec, others=False)
        except UserError:
            continue  # refused there: the plan as it is stays
        same = _outside(made) == _outside(plan)
        config = made.config if same and made.config else plan.config
        seconds = made.time.seconds if same and made.time else 0.0
        name = files.setdefault(repr(config), f"ds_config.{len(files)}.json")
        found.append((Rung(bandwidth, round(seconds, 3), name), config))
    return found


def _outside(plan: Plan) -> tuple[object, ...]:
    """What a program sees of a plan besides its DeepSpeed config."""
    setup, batch = plan.setup, plan.batch
    assert setup is not None
    assert batch is not None
    degrees = (setup.tensor, setup.pipeline, setup.virtual, setup.sequence)
    return (batch.total, plan.command, plan.variables, setup.recompute, setup.precision, degrees)


def configs(rungs: Sequence[tuple[Rung, Config]]) -> dict[str, Config]:
    """The DeepSpeed configs beside the plan's own, by file."""
    return {rung.config: config for rung, config in rungs if rung.config != OWN}
