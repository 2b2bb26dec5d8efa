"""A directory of checkpoints, told to a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.checkpoints import Choice, Tag
from launcher.show import ago

SPARE = 1.1  # of a checkpoint's size: logs, a larger one


def table(directory: str, tags: Sequence[Tag], choice: Choice, *, latest: str, now: float) -> str:
    """One line a checkpoint, newest first, which of them a resume takes, and why none that is newer."""
    if not tags:
        return f"no checkpoints in {directory}"
    head = ("CHECKPOINT", "STEP", "RANKS", "ZeRO", "FILES", "SIZE", "AGE", "HEALTH")
    taken = choice.tag.name if choice.tag and choice.action in ("load", "universal", "convert") else None
    rows = [head]
    for tag in tags:
        rows.append(
            (
                tag.name or ".",
                _or(tag.step),
                _or(tag.world_size) + (f" ({tag.model_parallel} model-parallel)" if tag.model_parallel > 1 else ""),
                _or(tag.stage) + (" universal" if tag.universal else ""),
                str(tag.files),
                size(tag.bytes),
                ago(now - tag.written) if tag.written else "-",
                tag.health + (f": {tag.why}" if tag.why else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(head) - 1)), row[-1]])
        for row in rows
    ]
    if taken is None:
        lines.append(f"a resume takes none: {choice.why}")
    else:
        lines.append(f"a resume on as many ranks takes {taken or directory}")
    lines += [f"not {tag.name}: {_passed_over(tag)}" for tag in choice.skipped if taken is not None]
    if latest not in ("", taken):
        lines.append(f"`latest` names {latest}: DeepSpeed by itself would load that one")
    return "\n".join(lines)


def _passed_over(tag: Tag) -> str:
    return tag.why or "no manifest vouches for it, and an older one is verified"


def as_json(directory: str, tags: Sequence[Tag], choice: Choice, *, latest: str) -> dict[str, Any]:
    resume = {"action": choice.action, "tag": choice.tag.name if choice.tag else None, "why": choice.why}
    return {"directory": directory, "latest": latest, "resume": resume, "checkpoints": [asdict(tag) for tag in tags]}


def room(directory: str, *, free: float, one: float, keep: int) -> list[str]:
    """A note where `keep` checkpoints and the one being written do not fit: 2.2 x its size for keep: 1."""
    needed = SPARE * (keep + 1) * one
    if free >= needed:
        return []
    return [
        f"{directory} has {size(free)} free, and {keep + 1} checkpoints of {size(one)} take {size(needed)} "
        "(train.checkpoint.keep of them stay while the next is written)"
    ]


def _or(value: int | None) -> str:
    return "-" if value is None else str(value)


def size(count: float) -> str:
    """2_300_000_000_000: 2.3 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
