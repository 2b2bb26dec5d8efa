"""Fabric rows and the user's own variables -> the environment of every rank, each with its reason."""

from __future__ import annotations

from launcher import facts
from launcher.errors import Problem, UserError
from launcher.record import record
from launcher.spec import JobSpec


@record
class Variable:
    name: str
    value: str
    why: str


@record
class Line:
    """Shell that runs on a node before the exports."""

    text: str
    why: str


@record
class Variables:
    rows: tuple[Variable, ...]
    notes: tuple[str, ...]
    setup: tuple[Line, ...] = ()


def variables(spec: JobSpec, *, pods: bool = False) -> Variables:
    """The exports of a job, the user's last. Raises UserError for a network that is not named.

    `pods`: it runs in pods, whose interfaces are called as Kubernetes calls them, unless it asks for the host's.
    """
    gpus = spec.resources.gpus_per_node > 0
    rows: dict[str, Variable] = {}
    if not gpus:
        rows["DS_ACCELERATOR"] = Variable("DS_ACCELERATOR", "cpu", "gpus_per_node is 0: train on CPU, with gloo")
    notes: list[str] = []
    problems: list[Problem] = []
    used = [facts.every_network()] if gpus else []
    network = None
    try:
        network = _fabric(spec)
    except UserError as error:
        problems += error.problems
    if network and (network.only == "cpu" or not gpus or spec.resources.nodes == 1):
        network = network if network.only == "cpu" and not gpus and spec.resources.nodes > 1 else None
    used += [network] if network else []
    gpu = _gpu(spec)
    for fabric in used:
        rows |= {name: Variable(name, value, why) for name, (value, why) in fabric.emits(gpu).items()}
    setup = tuple(Line(text, why) for fabric in used for text, why in fabric.lines(gpu))
    ours = {name: row.value for name, row in rows.items()}
    for name, value in spec.env.items():
        if name in rows and rows[name].value != value:
            notes.append(f"{name}={value} from the job file replaces {rows[name].value} ({rows[name].why})")
        rows[name] = Variable(name, value, "from the job file")
    if spec.env:
        from launcher import envlint

        own = pods and not spec.kubernetes.network.host_network
        theirs = [envlint.Assignment(name, value, pod=own) for name, value in spec.env.items()]
        for found in envlint.judge(theirs, fabric=network, gpu=gpu, given=ours, zero=_shards(spec)):
            if found.severity == "error":
                fix = found.fix or str(envlint.rules()[found.rule]["fix"])
                problems.append(Problem(f"{found.message} [{found.rule}]", fix, ("env", found.at.name)))
            else:
                notes.append(f"{found.message} [{found.rule}]")
    if problems:
        raise UserError(*problems)
    return Variables(tuple(rows.values()), tuple(notes), setup)


def _shards(spec: JobSpec) -> bool:
    """Whether ZeRO is asked for, here or in raw keys; of a model that is named the planner may choose it."""
    raw = spec.train.deepspeed.get("zero_optimization")
    stage = spec.train.zero if spec.train.zero != "auto" else raw.get("stage", 0) if isinstance(raw, dict) else None
    return bool(spec.model) if stage is None else stage != 0


def _gpu(spec: JobSpec) -> facts.Gpu | None:
    """A name that no table has is a problem of the plan's, told there."""
    try:
        return facts.gpu(spec.resources.gpu) if spec.resources.gpu and spec.resources.gpus_per_node else None
    except UserError:
        return None


def _fabric(spec: JobSpec) -> facts.Fabric | None:
    """The network that is named, needed or not: a slip of the pen shows on one node too."""
    resources = spec.resources
    if resources.fabric is None:
        if resources.nodes == 1 or not resources.gpus_per_node:
            return None
        raise UserError(
            Problem(
                f"{resources.nodes} nodes with GPUs, and no network is named",
                hint="resources.fabric: infiniband, roce, efa, ethernet or another of `dslaunch presets --fabrics`; "
                "`dslaunch probe` on a node finds it; a wrong guess here runs ten times slower",
                at=("resources",),
            )
        )
    found = facts.fabric(resources.fabric)
    at = ("resources", "fabric")
    if found.only == "node" and resources.nodes > 1:
        message = f"fabric {found.name} ends at one node, and {resources.nodes} nodes need a network between them"
        raise UserError(Problem(message, "`dslaunch probe` on a node finds it", at))
    if found.only == "cpu" and resources.gpus_per_node:
        message = f"fabric {found.name} carries jobs without GPUs, and gpus_per_node is {resources.gpus_per_node}"
        raise UserError(Problem(message, "`dslaunch probe` on a node finds the network of its GPUs", at))
    return found
