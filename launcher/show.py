"""Objects to text, tables and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher import facts, nccl, runs
    from launcher.backends import Status
    from launcher.errors import Problem
    from launcher.plan import Plan
    from launcher.spec import Document


def problems(found: Iterable[Problem]) -> str:
    lines = []
    for problem in sorted(found, key=lambda problem: place_order(problem.where)):
        lines.append(f"error: {plain(str(problem))}")
        if problem.hint:
            lines.append(f"  try: {plain(problem.hint)}")
    return "\n".join(lines)


def place_order(where: str) -> tuple[str, int, int]:
    """job.yaml:10:3 behind job.yaml:9:1."""
    file, _, rest = where.partition(":")
    line, _, column = rest.partition(":")
    return (file, int(line) if line.isdigit() else 0, int(column) if column.isdigit() else 0)


def plain(text: str) -> str:
    """One line without control characters: a job file's text may not move the terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Columns as wide as their widest cell, the last one as long as it likes."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append(indent + "  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def plan(made: Plan, document: Document) -> str:
    spec = made.spec
    rows = [(decision.name, decision.value, decision.why) for decision in made.decisions]
    parts = [
        f"{spec.name}: {made.model.name} on {spec.resources.nodes} x {spec.per_node}",
        "",
        table(rows, indent="  "),
    ]
    if made.estimate:
        size = made.estimate
        parts += [
            "",
            f"  memory per GPU, estimated: {size.total:.1f} GiB = {size.states:.1f} model states + "
            f"{size.activations:.1f} activations + {size.gathered:.1f} gathered weights + CUDA and NCCL",
        ]
    parts += ["", "  one rank runs", "    " + shlex.join(made.command)]
    files = sorted({where.split(":")[0] for _, where in document.origins()})
    parts += ["", f"  read from {', '.join(files)}"]
    return "\n".join(parts)


def plan_json(made: Plan, document: Document) -> str:
    spec = made.spec
    return dumps(
        {
            "name": spec.name,
            "model": {"name": made.model.name, "parameters": made.parameters, "source": made.model.source},
            "nodes": spec.resources.nodes,
            "ranks_per_node": spec.per_node,
            "world_size": spec.world,
            "batch": asdict(made.batch),
            "zero_stage": made.stage,
            "precision": made.precision,
            "activation_checkpointing": made.recompute,
            "memory_gib": {**asdict(made.estimate), "total": made.estimate.total} if made.estimate else None,
            "deepspeed": made.config,
            "environment": [asdict(row) for row in made.variables.rows],
            "command": list(made.command),
            "checkpoint_dir": made.checkpoint_dir,
            "decisions": [asdict(decision) for decision in made.decisions],
            "notes": list(made.notes),
            "origins": {".".join(map(str, path)): where for path, where in document.origins()},
        }
    )


def dumps(value: Any) -> str:
    return json.dumps(value, indent=2)


def exports(rows: Iterable[nccl.Variable]) -> str:
    from launcher.bundle import comment, quote

    return "".join(f"export {row.name}={quote(row.value)}  # {comment(row.why)}\n" for row in rows)


def models(rows: Iterable[facts.Model]) -> str:
    from launcher.plan.memory import parameters

    return table([(row.name, f"{parameters(row.shape) / 1e9:8.3f} B", row.shape.kind, row.source) for row in rows])


def gpus(rows: Iterable[facts.Gpu]) -> str:
    return table(
        [
            (
                row.name,
                f"{row.memory:g} GiB",
                f"{row.peak:g} TFLOP/s",
                "bf16" if row.bf16 else "fp16 only",
                row.source,
            )
            for row in rows
        ]
    )


def fabrics(rows: Iterable[facts.Fabric]) -> str:
    return table([(row.name, row.title, row.source) for row in rows if row.name != "all"])


def status(record: runs.Record, found: Status, step: dict[str, Any] | None, failures: list[str]) -> str:
    state, detail = found.state.value, found.detail.removeprefix(f"{found.state.value}: ")
    code = f", exit code {found.code}" if found.code else ""
    lines = [
        f"{record.id}: {state}{code}"
        + (f" ({detail})" if detail not in ("", state, f"exit code {found.code}") else "")
    ]
    if record.job:
        lines.append(f"  {record.backend} job {record.job.partition(':')[0]}")
    if step:
        lines.append("  " + progress_line(step, record.steps))
    lines += [f"  first failure: {failure}" for failure in failures[:1]]
    lines += [f"  then: {failure}" for failure in failures[1:4]]
    lines.append(f"  {record.folder}")
    return "\n".join(lines)


def progress_line(step: dict[str, Any], steps: int) -> str:
    speed = step.get("tokens_per_s")
    loss = step.get("loss")
    parts = [f"step {step['step']}/{steps}"]
    if isinstance(loss, (int, float)):
        parts.append(f"loss {loss:.4f}")
    if isinstance(speed, (int, float)):
        parts.append(f"{speed:,.0f} tokens/s")
    return "  ".join(parts)
