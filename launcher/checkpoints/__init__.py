"""DeepSpeed checkpoints on disk: which are whole, which one to go on from. Nothing here ever unpickles.

Travels to the nodes beside the job's script: standard library only. A checkpoint directory holds tags, folders such
as global_step200 or step00000200; `latest` is DeepSpeed's pointer and not trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MANIFEST = "complete.json"  # in a tag, written by rename after every file is on disk
POINTER = "newest-verified"  # in the directory: the name of a tag, written by rename

# verified: it has a manifest and every file the size it names. whole: no manifest (another program's), and every
# shard that its names and zip structure promise is there. damaged: a file is cut, has changed or is no zip.
# incomplete: files are missing, or the save was cut off.
Health = Literal["verified", "whole", "damaged", "incomplete"]


@dataclass(frozen=True)
class Tag:
    name: str
    path: str
    health: Health
    why: str = ""  # one sentence, empty when verified
    step: int | None = None
    world_size: int | None = None  # data-parallel ranks x model-parallel ranks, as far as names or manifest tell
    stage: int | None = None  # of ZeRO
    model_parallel: int = 1
    files: int = 0
    bytes: int = 0
    universal: bool = False
    deepspeed: str = ""
    written: float = 0.0  # seconds since the epoch, of its newest file

    @property
    def usable(self) -> bool:
        return self.health in ("verified", "whole")


@dataclass(frozen=True)
class Choice:
    """What a run goes on from.

    load: `tag` as it is. universal: `tag` is universal. convert: it has to be made so first, `command` does.
    start: nothing was ever saved here. refuse: `why`, with `command` where one helps.
    """

    action: Literal["load", "universal", "convert", "start", "refuse"]
    tag: Tag | None = None
    why: str = ""
    command: tuple[str, ...] = ()
    skipped: tuple[Tag, ...] = ()  # newer ones that are not whole
