"""Fabric rows and the user's own variables -> the environment of every rank, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from launcher import facts
from launcher.errors import Problem, UserError
from launcher.spec import JobSpec


@dataclass(frozen=True)
class Variable:
    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Variables:
    rows: tuple[Variable, ...]
    notes: tuple[str, ...]


def variables(spec: JobSpec) -> Variables:
    """The exports of a job, the user's last. Raises UserError for a network that is not named."""
    gpu = spec.resources.gpus_per_node > 0
    rows: dict[str, Variable] = {}
    if not gpu:
        rows["DS_ACCELERATOR"] = Variable("DS_ACCELERATOR", "cpu", "gpus_per_node is 0: train on CPU, with gloo")
    notes: list[str] = []
    problems: list[Problem] = []
    used = [facts.fabrics()["all"]] if gpu else []
    try:
        network = _fabric(spec)
    except UserError as error:
        problems += error.problems
    else:
        used += [network] if network and gpu and spec.resources.nodes > 1 else []
    for fabric in used:
        for name, row in fabric.variables.items():
            rows[name] = Variable(name, row["value"], row["why"])
    for name, value in spec.env.items():
        if name in rows and rows[name].value != value:
            notes.append(f"{name}={value} from the job file replaces {rows[name].value} ({rows[name].why})")
        rows[name] = Variable(name, value, "from the job file")
        for fabric in used:
            if name in fabric.warn and value != fabric.variables.get(name, {}).get("value"):
                notes.append(f"{name}={value}: {fabric.warn[name]}")
            limit = fabric.refuse.get(name)
            if limit and value.isascii() and value.isdigit() and int(value[:9]) > limit["over"]:
                problems.append(Problem(f"{name}={value}: {limit['why']}", "leave it out", ("env", name)))
    if problems:
        raise UserError(*problems)
    return Variables(tuple(rows.values()), tuple(notes))


def _fabric(spec: JobSpec) -> facts.Fabric | None:
    """The network that is named, needed or not: a slip of the pen shows on one node too."""
    if spec.resources.fabric is None:
        if spec.resources.nodes == 1 or not spec.resources.gpus_per_node:
            return None
        known = ", ".join(name for name in facts.fabrics() if name != "all")
        raise UserError(
            Problem(
                f"{spec.resources.nodes} nodes with GPUs, and no network is named",
                hint=f"resources.fabric: one of {known}; a wrong guess here runs ten times slower",
                at=("resources",),
            )
        )
    return facts.fabric(spec.resources.fabric)
