"""A job as the text of a job file: keys in the order of the documentation, short things on one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Literal

from launcher import spec, yamldoc
from launcher.bundle import Tree
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, reference
from launcher.spec import JobSpec
from launcher.spec.train import Train

WIDTH = 100
_flow = partial(yamldoc.flow, typed=True)
SPACED = ("train", "resources", "slurm", "kubernetes", "container")  # sections with a blank line before them


def text(job: Mapping[str, Any], *, comments: Mapping[Path, str] | None = None, head: Iterable[str] = ()) -> str:
    """{"name": "a", "train": {"args": ["--lr", "1"]}} as YAML that `spec.load` reads back to the same."""
    said = dict(comments or {})
    job = {**job, **{key: _free(job[key], (key,)) for key in job}}
    lines = [f"# {line}" if line else "#" for line in head]
    for key, _ in ordered(job, JobSpec):
        if lines and (key in SPACED or (isinstance(job[key], dict) and not reference(job[key]))) and lines[-1]:
            lines.append("")
        lines += _entry(key, job[key], 0, (key,), said)
    lines += [f"# FILL IN: {note}" for note in said.values()]  # of what has no line of its own
    return "\n".join(lines) + "\n"


FREE: tuple[Path, ...] = (
    ("kubernetes", "patch"), ("kubernetes", "pod_patch"), ("train", "deepspeed"), ("train", "optimizer", "params"),
)  # fmt: skip


def _free(value: Any, path: Path) -> Any:
    """ "2" in a patch is text to Kubernetes, and 2 is none."""
    if isinstance(value, Mapping):
        return {key: _free(child, (*path, key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_free(child, (*path, index)) for index, child in enumerate(value)]
    inside = any(path[: len(one)] == one for one in FREE)
    return yamldoc.Untyped(value) if inside and isinstance(value, str) else value


def _entry(key: str, value: Any, depth: int, path: Path, said: dict[Path, str]) -> Iterator[str]:
    indent = "  " * depth
    note = said.pop(path, "")
    end = f"  # FILL IN: {note}" if note else ""
    begin = f"{indent}{yamldoc.key(key)}:"
    flow = _flow(value)
    inner = any(other[: len(path)] == path for other in said)
    short = len(begin) + len(flow) + 1 <= WIDTH
    whole = isinstance(value, dict) and reference(value)
    if not isinstance(value, (dict, list, tuple)) or (depth and short and not inner) or whole or not value:
        yield f"{begin} {flow}{end}"
    elif isinstance(value, dict):
        yield begin + end
        for name, child in ordered(value, SECTIONS[key]) if not depth and key in SECTIONS else value.items():
            yield from _entry(name, child, depth + 1, (*path, name), said)
    elif short and not inner and not any(isinstance(item, dict) and not reference(item) for item in value):
        yield f"{begin} {flow}{end}"
    elif (
        not inner
        and not any(isinstance(item, dict) and not reference(item) for item in value)
        and (max(len(_flow(item)) for item in value) < WIDTH - len(indent))
    ):
        yield begin + " [" + end
        yield from _wrapped([_flow(item) for item in value], indent + "  ")
        yield f"{indent}]"
    else:
        yield begin + end
        for index, item in enumerate(value):
            note = said.pop((*path, index), "")
            end = f"  # FILL IN: {note}" if note else ""
            if isinstance(item, dict) and len(_flow(item)) + len(indent) + 4 > WIDTH:
                rows = [line for name, child in item.items()
                        for line in _entry(name, child, depth + 2, (*path, index, name), said)]  # fmt: skip
                yield f"{indent}  - {rows[0].lstrip()}{end}"
                yield from rows[1:]
            else:
                yield f"{indent}  - {_flow(item)}{end}"


def _wrapped(items: list[str], indent: str) -> Iterator[str]:
    """As many to a line as fit; a line begins with an option where there are any."""
    line = ""
    for at, item in enumerate(items):
        option = item.startswith("--")
        ahead = item if not option or at + 1 == len(items) else f"{item}, {items[at + 1]}"
        if line and len(indent) + len(line) + len(ahead) + 2 > WIDTH:
            yield indent + line.rstrip()
            line = ""
        line += f"{item}, "
    yield indent + line.rstrip()


SECTIONS: dict[str, type] = {"train": Train, "resources": spec.Resources, "slurm": spec.Slurm,
                             "container": spec.Container, "kubernetes": spec.Kubernetes}  # fmt: skip


def ordered(section: Mapping[str, Any], kind: type) -> list[tuple[str, Any]]:
    order = [row.name for row in fields(kind)]
    return sorted(section.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order))


# --- checked --------------------------------------------------------------------------------------


def checked(
    made: Imported, *, name: str, backend: Literal["slurm", "kubernetes"] = "slurm"
) -> tuple[str, list[Problem], set[str]]:
    """The text, what keeps it from being submitted as it is, and the variables it reads where it is loaded.

    What is not right gets its comment, so that the user sees it in its place.
    """
    variables = set(_variables(made.job))
    head = heading(made, name)
    body = text(made.job, comments=made.comments, head=head)
    paths_of = {variable: f"/{variable.lower()}" for variable in variables}
    problems = _problems(body, paths_of, backend)
    if problems and backend == "kubernetes":  # names of objects stand in variables as often as paths do
        names_of = {variable: variable.lower().replace("_", "-") for variable in variables}
        problems = min(problems, _problems(body, names_of, backend), key=len)
    if not problems:
        return body, [], variables
    root = yamldoc.parse(body, name=JOB)
    paths = _paths(root)
    comments = dict(made.comments)
    for problem in problems:
        path = paths.get(problem.where, ())
        comments.setdefault(path, "; ".join(filter(None, [problem.message, problem.hint])))
    return text(made.job, comments=comments, head=head), problems, variables


JOB = "job.yaml"
UNSEEN = Tree(b"", ".", "")  # the code lies where the job file will


def _problems(body: str, environ: Mapping[str, str], backend: str) -> list[Problem]:
    """What loading, planning and rendering say of it."""
    from launcher import plan
    from launcher.backends import kubernetes, slurm

    try:
        document = spec.load(body, name=JOB, environ=environ)
    except UserError as error:
        return list(error.problems)
    named = document.spec.model
    if document.spec.sweep or (isinstance(named, str) and named.endswith(".json")):
        return []  # its points are jobs of their own; the file lies where the job file is
    try:
        if backend == "kubernetes":
            kubernetes.render(plan.make(document.spec), code=UNSEEN)
        else:
            slurm.render(plan.make(document.spec))
    except UserError as error:
        return [document.place(problem) for problem in error.problems]
    return []


def heading(made: Imported, name: str) -> list[str]:
    share = f"{made.typed} of {made.typed + made.raw} fields are typed"
    return [f"From {name} by `dslaunch import`; {share}."]


def _variables(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if reference(value) and "env" in value:
            yield str(value["env"])
        for child in value.values():
            yield from _variables(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _variables(child)


def _paths(node: yamldoc.Node, path: Path = ()) -> dict[str, Path]:
    """Which field stands at job.yaml:6:3."""
    found: dict[str, Path] = {str(node.mark): path}
    if isinstance(node, yamldoc.Table):
        for key, child in node.entries.items():
            found |= {str(node.keys[key]): (*path, key), **_paths(child, (*path, key))}
    elif isinstance(node, yamldoc.Sequence):
        for index, child in enumerate(node.items):
            found |= _paths(child, (*path, index))
    return found
