"""A sweep: the job file once for each combination of values, every one of them a job in its own right."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from launcher import yamldoc
from launcher.errors import Path, Problem, UserError
from launcher.plan import Plan
from launcher.record import record
from launcher.spec import Document, JobSpec, Sweep

MOST = 1001  # tasks of an array: Slurm's MaxArraySize, where a site does not change it


@record
class Point:
    """One combination: `values` by field, and where in the job file each of them stands."""

    index: int
    values: Mapping[str, Any]
    at: Mapping[str, Path]

    @property
    def label(self) -> str:
        """ "optimizer.lr=0.0001 seq_len=128" of train.optimizer.lr and train.seq_len."""
        return " ".join(f"{name.removeprefix('train.')}={_text(value)}" for name, value in self.values.items())

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(f"{name}={json.dumps(value)}" for name, value in self.values.items())


@record
class Chosen:
    """A point with its job and its plan."""

    point: Point
    document: Document
    plan: Plan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def points(sweep: Sweep) -> list[Point]:
    """{lr: [1, 2], seq_len: [64, 128]} is four points, the last field changing first; with `zip` two."""
    names = list(sweep.over)
    problems = [
        Problem(f"{name} has no values: nothing would run", at=("sweep", "over", name))
        for name in names
        if not sweep.over[name]
    ]
    if not names:
        problems.append(Problem("over names no field", "over: {train.optimizer.lr: [1e-4, 3e-4]}", ("sweep", "over")))
    lengths = {name: len(values) for name, values in sweep.over.items()}
    if sweep.how == "zip" and len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        problems.append(Problem(f"zip wants as many values of each field: {said}", "how: grid", ("sweep", "over")))
    for name in names:
        if name.partition(".")[0] in ("sweep", "name"):
            why = "a point's name is the job's" if name == "name" else "a sweep has no sweep in it"
            problems.append(Problem(f"{name} cannot be swept: {why}", "take it out", ("sweep", "over", name)))
        elif section := _section(name):
            fields = [f"{name}.{field}" for field in list(yamldoc.hints(section))[:4]]
            message = f"{name} is a section, and a sweep gives fields values"
            problems.append(Problem(message, f"one of its fields: {', '.join(fields)}, ...", ("sweep", "over", name)))
    if problems:
        raise UserError(*problems)
    places = [range(len(sweep.over[name])) for name in names]
    chosen = list(zip(*places, strict=True) if sweep.how == "zip" else itertools.product(*places))
    if len(chosen) > MOST:
        message = f"{len(chosen)} points, and an array of Slurm's holds {MOST}"
        raise UserError(Problem(message, "fewer values, or how: zip", ("sweep", "over")))
    first: dict[tuple[str, ...], int] = {}
    for number, indices in enumerate(chosen):
        values = tuple(json.dumps(sweep.over[name][place]) for name, place in zip(names, indices, strict=True))
        if first.setdefault(values, number) != number:
            pairs = zip(names, values, indices, chosen[first[values]], strict=True)
            name, value, place, _ = next(row for row in pairs if row[2] != row[3])
            message = f"{name} is {value} twice: two jobs would be the same"
            raise UserError(Problem(message, "each value once", ("sweep", "over", name, place)))
    return [
        Point(
            number,
            {name: sweep.over[name][place] for name, place in zip(names, indices, strict=True)},
            {name: ("sweep", "over", name, place) for name, place in zip(names, indices, strict=True)},
        )
        for number, indices in enumerate(chosen)
    ]


def _section(name: str) -> type | None:
    """Train of "train"; None of a field, and of what may be given as one value, too: train.optimizer."""
    kind: Any = JobSpec
    for part in name.split("."):
        if not is_dataclass(kind):
            return None
        kind = yamldoc.hints(kind).get(part)  # type: ignore[arg-type]
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def expand(
    document: Document,
    load: Callable[[tuple[str, ...]], Document],
    plan: Callable[[Document], Plan],
    *,
    suffixed: bool = False,
) -> list[Chosen]:
    """Every point read and planned as any job file is; what is wrong with a value is said where it stands.

    `load` reads the job file with further overrides. Checkpoints of two points never lie in one directory.
    `suffixed`: names too are made different, where every point is an object of its own.
    """
    assert document.spec.sweep is not None
    spec, found = document.spec, []
    problems: dict[tuple[str, str], Problem] = {}
    for point in points(document.spec.sweep):
        more = [] if "train.checkpoint.dir" in point.values else [f"train.checkpoint.dir={_place(spec, point)}"]
        more += [f"name={spec.name}-{point.index}"] if suffixed else []
        try:
            one = single(load((*point.overrides, *more)))
            try:
                found.append(Chosen(point, one, plan(one)))
            except UserError as error:
                raise UserError(*(one.place(problem) for problem in error.problems)) from None
        except UserError as error:
            for problem in error.problems:
                said = _placed(document, point, problem)
                problems.setdefault((said.message, said.where), said)
    if problems:
        raise UserError(*problems.values())
    return found


def _place(spec: JobSpec, point: Point) -> str:
    return json.dumps(f"{spec.train.checkpoint.dir or f'checkpoints/{spec.name}'}/{point.index}")


def _placed(document: Document, point: Point, problem: Problem) -> Problem:
    """`--set train.seq_len` is where the value of the sweep stands."""
    for name, at in point.at.items():
        if problem.where == f"--set {name}":
            return replace(problem, where=str(yamldoc.place(document.root, at)))
    if any(problem.where == f"--set {name}" for name in ("train.checkpoint.dir", "name")):
        return replace(problem, where=str(yamldoc.place(document.root, ("sweep",))))
    return replace(problem, message=f"{problem.message} (with {point.label})")


def single(document: Document) -> Document:
    """The job of one point: it is no sweep any more."""
    root = document.root
    if isinstance(root, yamldoc.Table):
        entries = {key: node for key, node in root.entries.items() if key != "sweep"}
        root = yamldoc.Table(entries, root.keys, root.mark)
    return replace(document, spec=replace(document.spec, sweep=None), root=root)


def refuse(document: Document, what: str) -> None:
    """For what knows one job only."""
    sweep = document.spec.sweep
    if sweep is None:
        return
    count = len(points(sweep))
    problem = Problem(
        f"this job file is a sweep of {count} points, and {what} is of one job",
        "take `sweep` out; dslaunch plan lists the points, and --set gives a field one of its values",
        ("sweep",),
    )
    raise UserError(document.place(problem))


def unbounded(document: Document) -> None:
    """For objects that nobody counts: `parallel` would do nothing."""
    if document.spec.sweep and document.spec.sweep.parallel:
        message = "parallel is of Slurm's arrays: the objects of a sweep are created all at once"
        hint = "leave parallel out; a queue of the cluster's (kubernetes.queue) lets as many run as fit"
        raise UserError(document.place(Problem(message, hint, ("sweep", "parallel"))))


def row(one: Chosen) -> dict[str, Any]:
    """Of `dslaunch plan`: what the point is, and what its plan predicts."""
    made, time = one.plan, one.plan.time
    return {
        "point": one.point.index,
        "values": dict(one.point.values),
        "label": one.point.label,
        "zero": made.stage,
        "global_batch": made.batch.total if made.batch else None,
        "step_seconds": time.seconds if time else None,
        "checkpoints": made.checkpoint_dir,
    }


COLUMNS = ("point", "label", "zero", "global_batch", "step_seconds", "state", "job", "step", "loss", "why")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of points: the columns that any of them has something in."""
    shown = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    cells = [[name.upper() for name in shown]] + [[_cell(row.get(name)) for name in shown] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(shown))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:100]
