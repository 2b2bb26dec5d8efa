"""Objects to text, tables and JSON."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher import facts, nccl
    from launcher import runs as runs_
    from launcher.backends import Status
    from launcher.backends.kubernetes.network import Profile
    from launcher.errors import Problem
    from launcher.plan import Plan
    from launcher.plan.setup import Alternative, Estimate, Part, StepTime
    from launcher.spec import Document


def problems(found: Iterable[Problem]) -> str:
    told = []
    for problem in sorted(found, key=lambda problem: place_order(problem.where)):
        hint = f"\n  try: {plain(problem.hint)}" if problem.hint else ""
        told.append(f"error: {plain(str(problem))}{hint}")
    return "\n".join(dict.fromkeys(told))  # two parts of a plan may stumble over the same word


def place_order(where: str) -> tuple[str, int, int]:
    """job.yaml:10:3 behind job.yaml:9:1."""
    file, _, rest = where.partition(":")
    line, _, column = rest.partition(":")
    return (file, int(line) if line.isdigit() else 0, int(column) if column.isdigit() else 0)


WIDTH = 130  # columns of a plan: what a person's screen has, and a log keeps


def plain(text: str) -> str:
    """One line without control characters: a job file's text may not move the terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], *, indent: str = "", width: int = 0) -> str:
    """Columns as wide as their widest cell, the last one as long as it likes or wrapped to `width` in all."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    before = len(indent) + sum(widths) + 2 * len(widths)
    lines = []
    for row in rows:
        cells = [cell.ljust(wide) for cell, wide in zip(row, widths, strict=False)]
        said = textwrap.wrap(row[-1], max(width - before, 40)) if width else [row[-1]]
        lines.append(indent + "  ".join([*cells, *said[:1]]).rstrip())
        lines += [" " * before + more for more in said[1:]]
    return "\n".join(lines)


def plan(made: Plan, document: Document, *, others: bool = False, tokens: float | None = None) -> str:
    spec = made.spec
    rows = [(decision.name, decision.value, decision.why) for decision in made.decisions]
    parts = [
        f"{spec.name}: {plain(made.program)} on {spec.resources.nodes} x {spec.per_node}",
        "",
        table(rows, indent="  ", width=WIDTH),
    ]
    if made.estimate and made.machine:
        estimate, gpu = made.estimate, made.machine.gpu
        parts += [
            "",
            f"  memory per GPU: {estimate.total:.1f} GiB ({estimate.low:.0f} to {estimate.high:.0f}) of "
            f"{gpu.memory:g}, {made.alternatives[0].verdict}",
            breakdown(estimate.gpu, "GiB"),
        ]
        parts += host(estimate)
    if made.time:
        parts += [
            "",
            f"  one step: {made.time.seconds:.3g} s for {made.time.tokens:,} tokens",
            breakdown(made.time.parts, "s"),
            *(f"    {line}" for line in duration(made, tokens)),
        ]
    if made.compression:
        parts += ["", "  compression", *(f"    {line}" for line in made.compression)]
    if others and made.alternatives:
        parts += ["", alternatives(made)]
    starts = {
        "node": "each node runs, and that starts its ranks",
        "job": "the first node runs, and that starts the ranks of all",
    }
    runs = starts.get(spec.train.launcher, "one rank runs")
    parts += ["", f"  {runs}", "    " + shlex.join(made.command)]
    files = sorted({where.split(":")[0] for _, where in document.origins()})
    parts += ["", f"  read from {', '.join(files)}"]
    from launcher.spec.words import shown

    return shown("\n".join(parts))


def breakdown(parts: Iterable[Part], unit: str) -> str:
    rows = [(f"{part.value:9.3g} {unit}", part.name, part.why) for part in parts if part.value > 0]
    return table(rows, indent="  ")


def host(estimate: Estimate) -> list[str]:
    rows = (("host memory per node", estimate.host), ("NVMe per node", estimate.nvme))
    return [
        line
        for title, parts in rows
        if sum(part.value for part in parts) >= 1
        for line in (f"  {title}: {sum(part.value for part in parts):.0f} GiB", breakdown(parts, "GiB"))
    ]


def duration(made: Plan, tokens: float | None) -> list[str]:
    """What the run takes with checkpoints and failures, and what so many tokens would: days, and what that costs."""
    if not made.time:
        return []
    steps, useful = made.spec.train.steps, made.saving.goodput if made.saving else 1.0
    rows = [(f"{steps:,} steps", steps * made.time.seconds)]
    if tokens:
        rows.append((f"{tokens:.3g} tokens", tokens / made.time.tokens_per_s))
    price = made.spec.resources.price
    found = []
    for what, seconds in rows:
        whole = seconds / max(useful, 1e-6)
        cost = f", {price * made.time.world * whole / 3600:,.0f} at {price:g} per GPU and hour" if price else ""
        found.append(f"{what}: {span(seconds)}, {span(whole)} with checkpoints and failures{cost}")
    return found


def span(seconds: float) -> str:
    """5 days, 3.2 hours, 12 minutes or 40 s: two digits are as much as a prediction knows."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}" if seconds < 20 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def alternatives(made: Plan) -> str:
    """The taken way first, then what else was weighed: its memory, its time, and what to write to get it."""
    shown = _shown(made)
    rows = [("", "GiB", "s/step", "tokens/s/GPU", "")]
    for i, way in enumerate(way for way in shown if way.verdict != "does not fit"):
        rows.append(
            (
                ("* " if i == 0 else "  ") + way.name,
                f"{way.estimate.total:.0f}",
                f"{way.time.seconds:.3g}",
                f"{way.time.tokens_per_s_per_gpu:,.0f}",
                way.why + (f": --set {' --set '.join(way.changes)}" if way.changes else ""),
            )
        )
    unable = [way for way in shown if way.verdict == "does not fit"]
    rows += [("  " + way.name, f"{way.estimate.total:.0f}", "-", "-", way.why) for way in unable]
    lines = ["  alternatives", table(rows, indent="    ")]
    left = len(made.alternatives) - len(shown)
    if left:
        lines.append(f"    ... and {left} more, slower or larger: --json has them all")
    return "\n".join(lines)


def _shown(made: Plan) -> list[Alternative]:
    """The fastest eight and the smallest four of those too large: what a person can weigh."""
    able = [way for way in made.alternatives if way.verdict != "does not fit"]
    unable = [way for way in made.alternatives if way.verdict == "does not fit"]
    return [*able[:8], *unable[:4]]


def picture(made: Plan, *, tokens: float | None = None) -> str:
    """The plan as one HTML page."""
    from launcher import report
    from launcher.plan.memory import USABLE

    resources, machine = made.spec.resources, made.machine
    return report.plan(
        report.PlanView(
            job=made.spec.name,
            model=made.program + (f" ({made.parameters:,} parameters)" if made.parameters is not None else ""),
            nodes=resources.nodes,
            per_node=made.spec.per_node,
            gpu=machine.gpu.name if machine else "",
            memory=machine.gpu.memory if machine else 0.0,
            usable=machine.gpu.memory * USABLE if machine else 0.0,
            host=machine.host_gib if machine else 0.0,
            nvme=machine.nvme_gib if machine else 0.0,
            steps=made.spec.train.steps,
            tokens=tokens or 0.0,
            price=resources.price or 0.0,
            chosen=made.alternatives[0] if made.alternatives else None,
            alternatives=tuple(_shown(made)[1:]),
            by_stage=tuple(report.Stage(*row) for row in made.by_stage),
            decisions=tuple((row.name, row.value, row.why) for row in made.decisions),
            notes=made.notes,
            compression="; ".join(made.compression),
            checkpoint=made.saving.why if made.saving else "",
            config=made.config or {},
            environment=tuple((row.name, row.value, row.why) for row in made.variables.rows),
        )
    )


def plan_json(made: Plan, document: Document) -> str:
    spec, model, setup = made.spec, made.model, made.setup
    return dumps(
        {
            "name": spec.name,
            "model": {"name": model.name, "parameters": made.parameters, "source": model.source} if model else None,
            "nodes": spec.resources.nodes,
            "ranks_per_node": spec.per_node,
            "world_size": spec.world,
            "batch": asdict(made.batch) if made.batch else None,
            "zero_stage": made.stage,
            "precision": setup.precision if setup else None,
            "activation_checkpointing": setup.recompute if setup else None,
            "offload": {"optimizer": setup.offload_optimizer, "parameters": setup.offload_parameters}
            if setup
            else None,
            "memory_gib": _memory(made.estimate) if made.estimate else None,
            "verdict": made.alternatives[0].verdict if made.alternatives else None,
            "step_time": _time(made.time) if made.time else None,
            "alternatives": [
                {
                    "name": way.name,
                    "verdict": way.verdict,
                    "why": way.why,
                    "set": list(way.changes),
                    "memory_gib": way.estimate.total,
                    "step_time_s": way.time.seconds,
                }
                for way in made.alternatives
            ],
            "days": made.spec.train.steps * made.time.seconds / 86400 if made.time else None,
            "compression": list(made.compression),
            "checkpointing": asdict(made.saving) if made.saving else None,
            "deepspeed": made.config,
            "environment": [asdict(row) for row in made.variables.rows],
            "command": list(made.command),
            "checkpoint_dir": made.checkpoint_dir,
            "decisions": [asdict(decision) for decision in made.decisions],
            "notes": list(made.notes),
            "origins": {".".join(map(str, path)): where for path, where in document.origins()},
        }
    )


def _memory(estimate: Estimate) -> dict[str, Any]:
    return {
        "total": estimate.total,
        "low": estimate.low,
        "high": estimate.high,
        "parts": {part.name: part.value for part in estimate.gpu},
        "host_per_node": {part.name: part.value for part in estimate.host},
        "nvme_per_node": {part.name: part.value for part in estimate.nvme},
    }


def _time(time: StepTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "error": time.error,
        "tokens_per_s": time.tokens_per_s,
        "tokens_per_s_per_gpu": time.tokens_per_s_per_gpu,
        "mfu": time.mfu,
        "model_tflops_per_gpu": time.model_flops / time.seconds / time.world / 1e12,
        "parts": {part.name: part.value for part in time.parts},
        "bytes_sent_per_gpu": time.volume,
    }


def dumps(value: Any) -> str:
    return json.dumps(value, indent=2)


def exports(variables: nccl.Variables) -> str:
    from launcher.bundle import exports

    return "".join(f"{line}\n" for line in exports(variables))


def models(rows: Iterable[facts.Model]) -> str:
    from launcher.plan.shape import active_parameters, parameters

    lines = []
    for row in rows:
        active = f"{active_parameters(row.shape) / 1e9:.3g} B per token" if row.shape.experts else ""
        lines.append((row.name, f"{parameters(row.shape) / 1e9:8.3f} B", active, row.shape.kind, row.source))
    return table(lines)


def models_json(rows: Iterable[facts.Model]) -> str:
    from launcher.plan.shape import active_parameters, parameters

    return dumps(
        [
            {
                "name": row.name,
                "parameters": parameters(row.shape),
                "active": active_parameters(row.shape),
                "published": row.published,
                "shape": asdict(row.shape),
                "source": row.source,
            }
            for row in rows
        ]
    )


def configurations(rows: Iterable[facts.Preset]) -> str:
    """What DeepSpeed does with each as written, and what is emitted instead."""
    every = list(rows)
    whole, blocks = [row for row in every if row.job], [row for row in every if not row.job]
    refused = sum(row.parser != "accepts" for row in whole)
    runs = sum("runs" in row.start.values() for row in whole)
    parts = [_configuration(row) for row in whole]
    parts.append(
        f"{len(whole)} configurations: {refused} refused by DeepSpeed's config parser, "
        f"{len(whole) - refused - runs} accepted there and ended by its engine, {runs} that train as printed; "
        f"dslaunch init --preset NAME prints the job"
    )
    parts.append("Further blocks of such guides, which belong to no configuration:")
    return "\n\n".join([*parts, *map(_configuration, blocks)])


def _configuration(row: facts.Preset) -> str:
    verdict = "the config parser " + ("accepts it" if row.parser == "accepts" else f"refuses it: {row.parser}")
    verdict += _unread(row.ignored)
    starts = list(dict.fromkeys(row.start.values()))
    if len(starts) == 1:
        verdict += f"; the engine {_engine(starts[0])}"
    elif starts:
        by_version = ", ".join(f"{says} ({version})" for version, says in row.start.items())
        verdict += f"; the engine ends: {by_version}"
    gpus = "GPU" if row.world == 1 else "GPUs"
    lines = [f"{row.name}: {row.says}", *_wrapped(f"  as written, on {row.world} {gpus}: ", verdict)]
    for variant in row.variants:
        said = "accepted" if variant.parser == "accepts" else f"refused: {variant.parser}"
        lines += _wrapped("  also printed: ", f"{variant.says}, on {variant.world}: {said}{_unread(variant.ignored)}")
    for mistake in row.corrections:
        lines += _wrapped(f"  {mistake.at or 'a claim'}: ", f"{mistake.wrong} -> {mistake.instead}")
    return "\n".join(lines)


def _unread(keys: list[str]) -> str:
    return f" and ignores {', '.join(keys)}" if keys else ""


def _engine(says: str) -> str:
    return "runs it" if says == "runs" else f"ends: {says}"


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        first + text, 116, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
    )


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
    """What each is called, what it sets and what must not be set on it."""
    lines = []
    for row in rows:
        also = f" (also {', '.join(row.aliases)})" if row.aliases else ""
        lines.append(f"{row.name}{also}: {row.title}")
        sets = list(row.variables)
        sets += ["shell lines of the vendor" for _ in row.setup[:1]]
        lines += _wrapped("    sets   ", ", ".join(sets) or "nothing")
        lines += _wrapped("    never  ", ", ".join([*row.breaks, *row.never]))
        for one in row.expected:
            first, last = one.nodes
            counted = f"{first} to {last} nodes" if last else f"{first}+ nodes"
            where = {"node": "one node", "pair": "a pair"}.get(one.what, counted)
            wire = f" on {one.wire * 8:g} Gbit/s" if one.wire else ""
            who = f"{'/'.join(one.gpus)}{wire}".strip()
            text = f"{where}, {who}: {one.passes:g} GB/s, bad under {one.excludes:g} ({one.size} GiB; {one.source})"
            lines += _wrapped("    passes ", text.replace("2 to 2 nodes", "2 nodes"))
        lines += _wrapped("    source ", row.source)
    return "\n".join(lines)


def networks(rows: Iterable[Profile]) -> str:
    """What each brings to a pod, which rights it takes, and where that was read."""
    lines = []
    for row in rows:
        by = f" (with fabric {', '.join(row.fabrics)})" if row.fabrics else ""
        lines.append(f"{row.name}{by}: {row.title}")
        brings = []
        if row.resource:
            counts = [f"{count} with {gpu}" for gpu, count in row.resource.get("by", {}).items()]
            if "other" in row.resource:
                counts.append(f"{row.resource['other']}{' otherwise' if counts else ''}")
            brings.append(f"{row.resource['name']}: {', '.join(counts)}")
        if row.networks:
            brings.append("interfaces by annotation")
        brings += [f"sidecar {one['name']}" for one in row.sidecars]
        brings += [f"hostPath {one['host_path']}" for one in row.volumes.values()]
        lines += _wrapped("    brings ", "; ".join(brings) or "nothing by itself")
        for name, why in row.needs.items():
            lines += _wrapped("    needs  ", f"{name}: {why}")
        for name, said in row.advice.items():
            lines += _wrapped("    maybe  ", f"{name}: {said['why'] if isinstance(said, dict) else said}")
        lines += _wrapped("    source ", row.recipe)
    return "\n".join(lines)


def runs(rows: list[dict[str, Any]], *, now: float) -> str:
    """One line for each run, the newest first."""
    lines = [("RUN", "STATE", "JOB", "STEP", "SINCE", "WHY")]
    for row in rows:
        step = f"{row['step'] or 0}/{row['steps']}" if row["steps"] else ""
        job, why = str(row["job"]).partition(":")[0], plain(str(row["why"]).split("\n")[0])[:60]
        lines.append((row["run"], row["state"], job, step, ago(now - row["since"]), why))
    return table(lines)


def ago(seconds: float) -> str:
    """45 is "45 s", 200 is "3 min", 7300 is "2 h"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def status(
    record: runs_.Record, found: Status, step: dict[str, Any] | None, failures: list[str], phase: runs_.Phase,
    *, cause: str = "", heard: str = "",
) -> str:  # fmt: skip
    """The scheduler's word, the run's own, how each attempt ended, and what to look at next."""
    state, detail = found.state.value, plain(found.detail.removeprefix(f"{found.state.value}: "))
    code = f", exit code {found.code}" if found.code else ""
    lines = [
        f"{record.id}: {state}{code}"
        + (f" ({detail})" if detail not in ("", state, f"exit code {found.code}") else "")
    ]
    if state == "unknown" and heard:
        lines.append(f"  {heard}")
    if record.job:
        lines.append(f"  {record.backend} job {record.job.partition(':')[0]}")
    story = record.story
    lines.append(f"  {phase.value}" + (f": {PHASES[phase.value]}" if phase.value in PHASES else ""))
    if step:
        lines.append("  " + progress_line(step, record.steps))
    for attempt in story.attempts:
        lines.append("  " + attempt_line(attempt))
    lines += [f"  first failure: {plain(failure)}" for failure in failures[:1]]
    lines += [f"  then: {plain(failure)}" for failure in failures[1:4]]
    lines += [f"  cause: {plain(cause)}"] if cause else []
    lines += [f"  why: dslaunch diagnose {record.id}"] if failures and phase.value == "failed" else []
    lines.append(f"  {record.folder}")
    return "\n".join(lines)


PHASES = {
    "rendered": "its files are there, and no job",
    "preflight": "its nodes are checked before anything trains",
    "recovering": "training ended and goes on by itself",
    "unknown": "nobody knows, and nothing is done about it",
}


def attempt_line(attempt: runs_.Attempt) -> str:
    """ "attempt 0 ended with 137 (cuda-oom) on node3, rank 3, step 412; then requeue without node3"."""
    code = "" if attempt.code is None else f" with {attempt.code}"
    words = [f"attempt {attempt.number} {'ended' if attempt.ended else 'runs'}{code}"]
    words += [f" ({attempt.cause})"] if attempt.cause else []
    rank = "" if attempt.rank is None else f"rank {attempt.rank}"
    step = "" if attempt.step is None else f"step {attempt.step}"
    where = ", ".join(filter(None, (attempt.node, rank, step)))
    words += [f" on {where}"] if where else []
    words += [f": {attempt.why}"] if attempt.why else []
    words += [f"; then {attempt.decision}"] if attempt.decision else []
    return plain("".join(words))


def progress_line(step: dict[str, Any], steps: int) -> str:
    speed = step.get("tokens_per_s")
    loss = step.get("loss")
    parts = [f"step {step['step']}/{steps}"]
    if isinstance(loss, (int, float)):
        parts.append(f"loss {loss:.4f}")
    if isinstance(speed, (int, float)):
        parts.append(f"{speed:,.0f} tokens/s")
    return "  ".join(parts)
