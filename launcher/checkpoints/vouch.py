"""A manifest for checkpoints of programs that write none, by whoever watches them being written."""

from __future__ import annotations

import os
from typing import Any

from launcher.checkpoints import MANIFEST, layout, manifest, shards

LOOKS = 2


def look(directory: str, state: dict[str, Any], *, over: bool = False) -> dict[str, Any]:
    """One look, some seconds after the one before: what is whole and has stood still for two looks is verified.

    `state` is what the look before returned: each tag without a manifest, its files, and how often they were the
    same. When training is `over` one look is enough: nobody writes any more.
    """
    seen: dict[str, Any] = {}
    for name in layout.names(directory):
        folder = layout.folder(directory, name)
        if os.path.exists(os.path.join(folder, MANIFEST)):
            continue
        try:
            files = [(file, found.size, found.written) for file, found in shards.files(folder).items()]
            before, count = state.get(name, ([], 0))
            seen[name] = files, count + 1 if before == files else 1
            if over or seen[name][1] == LOOKS:  # at later looks it is what it was
                _vouch(directory, name)
        except OSError:  # it is being deleted, or the disk is full
            continue
    return seen


def _vouch(directory: str, name: str) -> None:
    tag = shards.survey(layout.folder(directory, name), name=name)
    if tag.health != "whole" or tag.universal or tag.step is None or tag.world_size is None:
        return
    manifest.write(
        tag.path,
        step=tag.step,
        world_size=tag.world_size,
        stage=tag.stage,
        deepspeed=tag.deepspeed,
        model_parallel=tag.model_parallel,
    )
    manifest.point(directory, name)
