"""complete.json in a checkpoint: written by rename after every file is on disk, it makes the checkpoint verified.

{"tag": "step00000050", "step": 50, "world_size": 4, "zero_stage": 2, "deepspeed": "0.19.8",
 "files": {"mp_rank_00_model_states.pt": 1234}, "sha256": {"mp_rank_00_model_states.pt": "9f86..."}}
An older one has no "sha256" and no "tag".
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from launcher.checkpoints import MANIFEST, POINTER, Tag, archive, shards

BLOCK = 4 << 20
THREADS = 4  # one reads 1.8 GB/s on a core with SHA instructions


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    stage: int | None
    files: dict[str, int]
    hashes: dict[str, str] = field(default_factory=dict)
    deepspeed: str = ""
    model_parallel: int = 1
    more: dict[str, Any] = field(default_factory=dict)  # what the program that saved wants to know again


KNOWN = ("tag", "step", "world_size", "zero_stage", "files", "sha256", "deepspeed", "model_parallel")


class Unreadable(Exception):
    pass


def read(folder: str) -> Manifest | None:
    """None where there is none. Unreadable when it says what cannot be."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as opened:
            said = json.load(opened)
        tag = said.get("tag", os.path.basename(folder))
        step, world_size, stage = said["step"], said["world_size"], said.get("zero_stage")
        named = shards.step_of(os.path.basename(folder))
        if tag != os.path.basename(folder) or (named is not None and named != step):
            raise ValueError(f"it is of {tag}, step {step}")
        if not isinstance(step, int) or not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"step {step}, world_size {world_size}")
        files = {str(name): int(size) for name, size in said["files"].items()}
        return Manifest(
            step=step,
            world_size=world_size,
            stage=stage if isinstance(stage, int) else None,
            files=files,
            hashes=dict(said.get("sha256", {})),
            deepspeed=str(said.get("deepspeed", "")),
            model_parallel=int(said.get("model_parallel", 1)),
            more={key: value for key, value in said.items() if key not in KNOWN},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(f"{MANIFEST} is unreadable: {error}") from None


def digest(path: str) -> str:
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while True:
            block = file.read(BLOCK)
            if not block:
                return sha.hexdigest()
            sha.update(block)


def seal(folder: str, names: Iterable[str]) -> dict[str, str]:
    """Force these files to disk and return their hashes: each rank those it wrote, while they are in its memory."""

    def one(name: str) -> tuple[str, str]:
        path = os.path.join(folder, name)
        sync(path)
        return name, digest(path)

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(one, names))


def write(
    folder: str,
    *,
    step: int,
    world_size: int,
    stage: int | None,
    hashes: Mapping[str, str] | None = None,
    deepspeed: str = "",
    model_parallel: int = 1,
    **more: Any,
) -> Tag:
    """Vouch for the files in `folder`. Those without a hash are forced to disk here."""
    there = shards.files(folder)
    hashes = {name: value for name, value in (hashes or {}).items() if name in there}
    for name in there:
        if name not in hashes:
            sync(os.path.join(folder, name))
    for below in {os.path.dirname(name) for name in there}:
        sync(os.path.join(folder, below))
    said = {
        "tag": os.path.basename(folder),
        "step": step,
        "world_size": world_size,
        "zero_stage": stage,
        "deepspeed": deepspeed,
        "model_parallel": model_parallel,
        **more,
        "files": {name: file.size for name, file in there.items()},
        "sha256": dict(sorted(hashes.items())),
    }
    replace(os.path.join(folder, MANIFEST), json.dumps(said, indent=1) + "\n")
    return verify(folder)


def verify(folder: str, hashes: bool = False, *, name: str = "") -> Tag:
    """The checkpoint's health: sizes against the manifest; without one, layout and structure.

    With `hashes` every byte is read: against the manifest's hashes, or each record's own checksum.
    """
    name = name or os.path.basename(folder)
    try:
        said = read(folder)
    except Unreadable as why:
        return _tag(folder, name, "damaged", str(why), shards.files(folder), None)
    if said is None:
        return shards.survey(folder, name=name, contents=hashes)
    there = shards.files(folder)
    wrong = []
    for file, size in said.files.items():
        found = there.get(file)
        if found is None or found.size != size:
            wrong.append(f"{file} has {found.size if found else 'no'} bytes, saved were {size}")
    if hashes and not wrong:
        wrong = changed(folder, list(said.files))[0]
    return _tag(folder, name, "damaged" if wrong else "verified", shards.some(wrong), there, said)


def changed(folder: str, names: Iterable[str], *, until: float = float("inf")) -> tuple[list[str], int]:
    """What is wrong with which of these files, and how many were read before `until`, by time.monotonic().

    Held against the manifest's hashes; files without one against the checksums that torch.save wrote into them.
    """
    try:
        said = read(folder)
    except Unreadable as why:
        return [str(why)], 0
    hashes = said.hashes if said else {}

    def one(name: str) -> str | None:
        if time.monotonic() > until:
            return None
        path = os.path.join(folder, name)
        try:
            if name in hashes:
                return "" if digest(path) == hashes[name] else f"{name} has changed since it was saved: its hash"
            if shards.kind(name) and name.endswith(".pt"):
                archive.read(path, contents=True)
        except archive.Damaged as damage:
            return f"{name} {damage}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return ""

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(one, names))
    return [why for why in found if why], sum(why is not None for why in found)


def _tag(folder: str, name: str, health: Any, why: str, there: dict[str, shards.File], said: Manifest | None) -> Tag:
    universal = any(shards.kind(file) == "universal" for file in there)
    return Tag(
        name=name,
        path=folder,
        health=health,
        why=why,
        step=said.step if said else shards.step_of(name),
        world_size=said.world_size if said else None,
        stage=said.stage if said else None,
        model_parallel=said.model_parallel if said else 1,
        files=len(there),
        bytes=sum(file.size for file in there.values()),
        universal=universal,
        deepspeed=said.deepspeed if said else "",
        written=max((file.written for file in there.values()), default=0.0),
    )


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot, of a folder
        if not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def replace(path: str, text: str) -> None:
    """Write by rename, all of it or nothing; a link at `path` is replaced, not followed."""
    draft = f"{path}.{os.getpid()}.tmp"  # the supervisor and rank 0 may both be at it
    with open(draft, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    if os.path.isdir(path) and not os.path.islink(path):
        os.rename(path, f"{path}.{os.getpid()}.aside")  # nothing that belongs here
    os.replace(draft, path)
    sync(os.path.dirname(path) or ".")


def point(directory: str, name: str) -> None:
    """Our pointer to the newest verified checkpoint."""
    replace(os.path.join(directory, POINTER), name + "\n")
