"""Which checkpoint a run goes on from, and what has to be in place for DeepSpeed to take it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.checkpoints import Choice, Tag, layout, manifest, shards

UNIVERSAL = "_universal"
CONVERT = ("python", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")


def choose(
    directory: str,
    *,
    world_size: int,
    stage: int | None,
    model_parallel: int = 1,
    fresh: bool = False,
    seconds: float = 30.0,
    distrusted: Mapping[str, str] | None = None,
) -> Choice:
    """The newest verified checkpoint that is whole, else the newest whole one; never a start over by itself.

    Up to `seconds` go into reading the one that is chosen, byte by byte: a bit that flipped must not be trained on.
    `distrusted` names tags that somebody else read, and what was wrong.
    """
    if fresh:
        return Choice("start", why="asked to start over")
    found = layout.scan(directory)
    if not found:
        return Choice("start", why=f"no checkpoint in {directory}")
    plain = [tag for tag in found if not tag.name.endswith(UNIVERSAL)]
    spoiled: list[Tag] = []
    until = time.monotonic() + seconds
    for tag in [t for t in plain if t.health == "verified"] + [t for t in plain if t.health == "whole"]:
        wrong, note = (distrusted or {}).get(tag.name, ""), ""
        if not wrong:
            wrong, note = _read(tag, until)
        if wrong:
            spoiled.append(replace(tag, health="damaged", why=wrong))
            continue
        bad = {t.name: t for t in spoiled}
        newer = plain[: plain.index(tag)]
        skipped = tuple(bad.get(t.name, t) for t in newer)
        made = _fit(tag, found, world_size=world_size, stage=stage, model_parallel=model_parallel)
        return replace(made, skipped=skipped, why="; ".join(filter(None, (made.why, note))))
    bad = {t.name: t for t in spoiled}
    skipped = tuple(bad.get(t.name, t) for t in found)
    first = skipped[0]
    return Choice(
        "refuse",
        why=f"none of the {len(skipped)} checkpoints in {directory} is whole; the newest, {first.name}: {first.why}",
        skipped=skipped,
    )


def _read(tag: Tag, until: float) -> tuple[str, str]:
    """What is wrong with the bytes of `tag`, and what was left unread."""
    if time.monotonic() >= until:
        return "", ""
    names = list(shards.files(tag.path))
    wrong, count = manifest.changed(tag.path, names, until=until)
    return shards.some(wrong), f"{len(names) - count} of its {len(names)} files were not read" if count < len(
        names
    ) else ""


def _fit(tag: Tag, found: list[Tag], *, world_size: int, stage: int | None, model_parallel: int) -> Choice:
    """Whether this run can load `tag`, directly or as a universal checkpoint."""
    saved = f"{tag.name} was saved by {tag.world_size or '?'} ranks at ZeRO stage {_stage(tag)}"
    here = f"this run has {world_size} at stage {stage}"
    same_stage = stage is None or tag.stage is None or {tag.stage, stage} <= {1, 2} or tag.stage == stage
    same_world = tag.world_size is None or tag.world_size == world_size or tag.stage == 0
    if tag.model_parallel != model_parallel and tag.model_parallel * model_parallel > 1:
        saved += f", {tag.model_parallel} model-parallel"
        here += f", {model_parallel} model-parallel"
        if tag.stage == 0:
            return Choice("refuse", tag, f"{saved}, {here}: without ZeRO nothing converts that")
        same_world = False
    if not same_stage:
        return Choice("refuse", tag, f"{saved}, {here}: give this run the same stage, or start over with --fresh")
    if tag.universal:
        return Choice("universal", tag)
    if same_world:
        return Choice("load", tag)
    folder = tag.path + UNIVERSAL
    made = next((t for t in found if t.path == folder), None)
    if made and made.usable:
        return Choice("universal", made, f"{saved}, {here}")
    if any(shards.kind(name) in ("expert", "experts") for name in shards.files(tag.path)):
        return Choice("refuse", tag, f"{saved}, {here}: DeepSpeed does not convert a checkpoint with experts")
    command = (*CONVERT, "--input_folder", tag.path, "--output_folder", folder)
    cut = f" (what is in {made.name} is not whole: {made.why})" if made else ""
    return Choice("convert", tag, f"{saved}, {here}: it has to be converted first{cut}", command)


def _stage(tag: Tag) -> str:
    return "1 or 2" if tag.stage is None else str(tag.stage)


def prepare(choice: Choice, directory: str) -> None:
    """Point DeepSpeed's `latest` (`latest_universal`) at what was chosen, whatever it said before."""
    if choice.tag is None or choice.action not in ("load", "universal"):
        return
    path = os.path.abspath(choice.tag.path)
    where, name = os.path.split(path)
    latest = os.path.join(where, "latest_universal" if choice.action == "universal" else "latest")
    if layout.pointer(where, os.path.basename(latest)) != name:
        manifest.replace(latest, name)
    if choice.tag.health == "verified":
        manifest.point(directory, choice.tag.name)


def configured(config: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """The DeepSpeed configuration with which this choice loads: checkpoint.load_universal as it has to be."""
    if choice.action not in ("load", "universal"):
        return dict(config)
    part = dict(config.get("checkpoint", {}))
    part.pop("load_universal", None)
    if choice.action == "universal":
        part["load_universal"] = True
    changed = {**config, "checkpoint": part}
    if not part:
        del changed["checkpoint"]
    return changed
