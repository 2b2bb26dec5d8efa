"""A directory of checkpoints, anybody's: its tags newest first, and what its pointers say."""

from __future__ import annotations

import os
import re

from launcher.checkpoints import MANIFEST, Tag, manifest, shards

AHEAD = re.compile(r"\.|before-fresh-\d+$|.*\.tmp$")  # leftovers, and runs that were set aside
TRAINER = re.compile(r"checkpoint-\d+")  # Hugging Face's Trainer keeps DeepSpeed's folder one below


def scan(directory: str, *, hashes: bool = False) -> list[Tag]:
    """All checkpoints in `directory`, newest first; none where the directory is not there.

    A folder counts when files in it have DeepSpeed's names, or its own name is that of a step. Links are not
    followed: one could lead outside.
    """
    found = []
    for name in names(directory):
        try:
            found.append(manifest.verify(folder(directory, name), hashes, name=name))
        except FileNotFoundError:  # deleted since it was listed
            continue
    if all(tag.step is not None for tag in found):
        return sorted(found, key=lambda tag: (tag.step, not tag.universal, tag.written), reverse=True)
    return sorted(found, key=lambda tag: tag.written, reverse=True)


def names(directory: str) -> list[str]:
    """["step00000050", "checkpoint-500/global_step500"]; [""] when `directory` is itself a checkpoint."""
    below, files = _entries(directory)
    if MANIFEST in files or shards.is_checkpoint(files):
        return [""]
    found = []
    for name in below:
        if AHEAD.match(name):
            continue
        inner, held = _entries(os.path.join(directory, name))
        if TRAINER.fullmatch(name):
            found += [f"{name}/{tag}" for tag in inner if shards.step_of(tag) is not None]
        elif MANIFEST in held or shards.is_checkpoint(held) or "zero" in inner or shards.step_of(name) is not None:
            found.append(name)
    return sorted(found)


def folder(directory: str, name: str) -> str:
    return os.path.join(directory, name) if name else directory


def _entries(directory: str) -> tuple[list[str], list[str]]:
    folders, files = [], []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif not entry.is_symlink() or entry.is_file():
                    files.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return folders, files


def pointer(directory: str, name: str = "latest") -> str:
    """What a pointer says, where that is a plain name; "" where it is missing, empty or leads somewhere else."""
    path = os.path.join(directory, name)
    try:
        if os.path.islink(path):
            return ""
        with open(path, encoding="utf-8") as opened:
            said = opened.read(4096)
    except (OSError, ValueError):
        return ""
    plain = said[:-1] if said.endswith("\n") else said
    return plain if re.fullmatch(r"[A-Za-z0-9._-]+", plain) and plain not in (".", "..") else ""
