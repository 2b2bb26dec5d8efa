"""The files of one checkpoint, by DeepSpeed's names and each file's structure: which there have to be, which are.

The names are those of DeepSpeed 0.19.8 and 0.19.6 (runtime/engine.py, runtime/pipe/module.py) and the older
`...optim_states.pt` without an underscore that it still reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launcher.checkpoints import MANIFEST, Health, Tag
from launcher.checkpoints import archive as archives

RANK = r"mp_rank_(?P<mp>\d+)"
# kind: what a name says. A file that matches none is somebody else's: zero_to_fp32.py, a tokenizer.
NAMES = {
    "model": re.compile(RANK + r"_model_states\.pt"),
    "optimizer": re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_" + RANK + r"_?optim_states\.pt"),
    "partition": re.compile(r"zero_pp_rank_(?P<dp>\d+)_" + RANK + r"_model_states\.pt"),  # ZeRO-3's weights
    "layer": re.compile(r"layer_(?P<layer>\d+)-(?:(?P<part>.+)-)?model_states\.pt"),  # a pipeline's
    "expert": re.compile(r"(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_" + RANK + r"_model_states\.pt"),
    "experts": re.compile(r"expp_rank_(?P<ep>\d+)_" + RANK + r"_optim_states\.pt"),
    "universal": re.compile(r"zero/(?P<parameter>.+)/(?:fp32|exp_avg|exp_avg_sq|step)\.pt"),
    "common": re.compile(r"zero/optimizer_state\.pt"),  # of a universal one, saved last
    "offloaded": re.compile(r"offloaded_tensors/rank(?P<rank>\d+)/.+"),  # ZeRO-Infinity's states on NVMe
}
STEP = re.compile(r"(?:.*/)?(?:.*[^A-Za-z0-9])?(?:global_?)?(?:step|checkpoint|iter)[_-]?(\d+)(?:_universal)?")
THREADS = 16  # most of the time is a file system's answer


@dataclass(frozen=True)
class File:
    size: int
    written: float


def step_of(name: str) -> int | None:
    """global_step200: 200; step00000050: 50; checkpoint-500/global_step500: 500; best: None."""
    found = STEP.fullmatch(name)
    return int(found[1]) if found else None


def files(folder: str) -> dict[str, File]:
    """{"mp_rank_00_model_states.pt": File(1234, ...)}, folders below included, the manifest left out."""
    found: dict[str, File] = {}
    below = [""]
    while below:
        prefix = below.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    below.append(name + "/")
                elif not name.startswith(MANIFEST):
                    try:
                        stat = entry.stat()
                    except OSError:  # a link that leads nowhere, a file that has just gone
                        continue
                    found[name] = File(stat.st_size, stat.st_mtime)
    return dict(sorted(found.items()))


def kind(name: str) -> str:
    return next((kind for kind, pattern in NAMES.items() if pattern.fullmatch(name)), "")


def owner(name: str) -> int:
    """The rank that wrote a file, where all ranks are data-parallel: rank 3 wrote zero_pp_rank_3_...; else rank 0."""
    found = re.match(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_", name)
    return int(found[1]) if found else 0


def is_checkpoint(names: Iterable[str]) -> bool:
    return any(kind(name) for name in names)


@dataclass(frozen=True)
class Layout:
    """What the names say. `world_size` counts ranks of all kinds; `missing` are files that have to be there."""

    dp: int | None
    mp: int
    stage: int | None
    universal: bool
    missing: tuple[str, ...]


def layout(names: Iterable[str], words: archives.Words) -> Layout:
    """The world and the stage that names and `words` of a file of model states tell, and what is missing.

    Without words the highest rank counts as the last: what is missing after it goes unseen.
    """
    found: dict[str, list[dict[str, str]]] = {name: [] for name in NAMES}
    there = set(names)
    prefix = ""
    for name in there:
        for what, pattern in NAMES.items():
            match = pattern.fullmatch(name)
            if match:
                found[what].append(match.groupdict(""))
                if what == "optimizer" and not name.startswith("zero"):
                    prefix = name[:5]
                break
    mp = 1 + max((int(f["mp"]) for f in found["model"] + found["optimizer"] + found["partition"]), default=0)
    ranked = found["optimizer"] + found["partition"]
    told = words.get("dp_world_size")
    dp = told if isinstance(told, int) else (1 + max(int(f["dp"]) for f in ranked)) if ranked else None
    stage = words.get("stage")
    universal = bool(found["universal"])
    if found["partition"]:
        stage = 3
    elif (found["optimizer"] and stage not in (1, 2)) or (
        not words and found["model"] and not found["optimizer"] and not universal
    ):
        stage = None
    wanted: set[str] = set()
    if not found["partition"]:
        wanted |= {f"mp_rank_{m:02d}_model_states.pt" for m in range(mp)}
    if not universal and (ranked or (isinstance(stage, int) and stage > 0)):
        for rank in range(dp or 1):
            for m in range(mp):
                wanted.add(f"{prefix}zero_pp_rank_{rank}_mp_rank_{m:02d}_optim_states.pt")
                if stage == 3:
                    wanted.add(f"zero_pp_rank_{rank}_mp_rank_{m:02d}_model_states.pt")
    if found["layer"]:  # a layer without parameters has no file: numbers may have gaps
        parts = {f["part"] for f in found["layer"]}
        named = words.get("layers")
        layers = {int(f["layer"]) for f in found["layer"]} | set(named if isinstance(named, frozenset) else ())
        wanted |= {f"layer_{n:02d}-{part + '-' if part else ''}model_states.pt" for part in parts for n in layers}
    wanted |= _experts(found, words.get("experts"))
    for parameter in {f["parameter"] for f in found["universal"]}:
        wanted.add(f"zero/{parameter}/fp32.pt")
    missing = [
        name
        for name in wanted - there
        if not (name.endswith("_optim_states.pt") and _spelled_otherwise(name, prefix) & there)
    ]
    if found["offloaded"]:
        ranks = {int(f["rank"]) for f in found["offloaded"]}
        missing += [f"offloaded_tensors/rank{r:02d}" for r in range((dp or 1) * mp) if r not in ranks]
    return Layout(dp, mp, stage if isinstance(stage, int) else None, universal, tuple(sorted(missing)))


def _spelled_otherwise(name: str, prefix: str) -> set[str]:
    bare = name[len(prefix) :]
    plain = {start + bare for start in ("", "bf16_", "fp16_")}
    return plain | {spelled.replace("_optim_states", "optim_states") for spelled in plain}


def _experts(found: dict[str, list[dict[str, str]]], told: object) -> set[str]:
    """Experts are numbered from 0 in each layer, and so are the layers that have some."""
    wanted: set[str] = set()
    ranks = {f["mp"] for f in found["expert"]}
    counts: dict[int, int] = dict(enumerate(told)) if isinstance(told, tuple) and found["expert"] else {}
    for f in found["expert"]:
        counts[int(f["layer"] or 0)] = max(counts.get(int(f["layer"] or 0), 0), int(f["expert"]) + 1)
    layered = any(f["layer"] for f in found["expert"])
    for layer in range(1 + max(counts, default=-1)):
        start = f"layer_{layer}_" if layered else ""
        for expert in range(counts.get(layer, 1)):
            wanted |= {f"{start}expert_{expert}_mp_rank_{m}_model_states.pt" for m in ranks}
    if found["experts"]:
        for rank in range(1 + max(int(f["ep"]) for f in found["experts"])):
            wanted |= {f"expp_rank_{rank}_mp_rank_{m}_optim_states.pt" for m in {f["mp"] for f in found["experts"]}}
    return wanted


def survey(folder: str, *, name: str = "", contents: bool = False) -> Tag:
    """A checkpoint without a manifest: whole when each file that has to be there is, and is whole by its structure.

    With `contents` every record of every file is held against its checksum too.
    """
    name = name or os.path.basename(folder)
    there = files(folder)
    ours = [file for file in there if kind(file) and file.endswith(".pt")]
    damaged, words = _structure(folder, ours, contents=contents)
    found = layout(there, words)
    step = step_of(name)
    told = words.get("global_steps")
    health: Health = "whole"
    why = ""
    if damaged:
        health, why = "damaged", some(damaged)
    elif found.missing:
        health, why = "incomplete", some([f"{file} is missing" for file in found.missing])
    elif not any(kind(file) in ("model", "partition", "expert") for file in ours):
        health, why = "incomplete", "no model states: the save was cut off"
    elif found.universal and any(file.startswith("tmp/") for file in there) and not words:
        health, why = "incomplete", "the conversion to universal was cut off"
    return Tag(
        name=name,
        path=folder,
        health=health,
        why=why,
        step=step if step is not None else told if isinstance(told, int) else None,
        world_size=None if found.dp is None else found.dp * found.mp,
        stage=found.stage,
        model_parallel=found.mp,
        files=len(there),
        bytes=sum(file.size for file in there.values()),
        universal=found.universal,
        deepspeed=str(words.get("ds_version", "")),
        written=max((file.written for file in there.values()), default=0.0),
    )


def some(sentences: list[str]) -> str:
    if not sentences:
        return ""
    more = f", and {len(sentences) - 1} more like it" if len(sentences) > 1 else ""
    return sentences[0] + more


def _structure(folder: str, names: list[str], *, contents: bool) -> tuple[list[str], archives.Words]:
    """What is wrong with which file, and what files of model states say."""
    speaks = sorted(name for name in names if kind(name) in ("model", "partition"))
    if not any(kind(name) == "layer" for name in names):
        del speaks[1:]  # all say the same, but for the layers of a pipeline's stage
    stems = {os.path.basename(name)[: -len(".pt")]: name for name in names}

    def look(name: str) -> tuple[str, archives.Words]:
        try:
            found = archives.read(os.path.join(folder, name), contents=contents, words=name in speaks)
        except archives.Damaged as damage:
            return f"{name} {damage}", {}
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}", {}
        if "/" not in name and found.stem != os.path.basename(name)[: -len(".pt")] and found.stem in stems:
            return f"{name} holds what was written as {stems[found.stem]}", {}
        return "", found.words

    with ThreadPoolExecutor(THREADS) as pool:
        said = list(pool.map(look, names))
    words: archives.Words = {}
    layers: set[int] = set()
    for _, spoken in said:
        words = words or dict(spoken)
        named = spoken.get("layers")
        layers |= named if isinstance(named, frozenset) else set()
    words.update({"layers": frozenset(layers)} if words else {})
    return [why for why, _ in said if why], words
