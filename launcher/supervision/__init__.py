"""While training runs: the step of each rank, whether it hangs, which rank is slow, and what a hang leaves behind.

Travels to the nodes beside the job's script: standard library only. Every duration here is of this machine's
monotonic clock; no time of another host is compared with one of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BEAT = 5.0  # seconds between two beats of a node
HUNG = 124  # exit code of a job that was ended because it hung, as timeout(1) has it
NO_HOST = 69  # EX_UNAVAILABLE: node 0 cannot be found, or says nothing
PAUSE = 10.0  # seconds between two looks: this process itself was stopped, with the whole job
QUIET = ("checkpoint", "eval", "ending")  # phases without steps
FIRST = ("node-0000", "node-0000-00")  # the files of rank 0's supervisor, the second with one supervisor a rank


def write(path: str, value: Any) -> None:
    """The whole file or the old one: readers come at any time. Raises OSError, where a disk is full."""
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}.tmp"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.write("\n")
    os.replace(draft, path)


class Refused(Exception):
    """Why nothing was started, and the exit code that says so: 78, EX_CONFIG, if somebody has to change something."""

    def __init__(self, message: str, *, code: int = 78) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Told:
    """What a rank says of itself, through dslaunch_pulse or in its log.

    `mark` changes with every step, also where a log tells of steps without their numbers.
    """

    step: int | None = None
    mark: int = -1
    phase: str = "starting"
    busy: float | None = None  # median seconds of the last 20 steps that it did not wait for others
    least: float | None = None  # the least of these 20, once there are 20
    doing: str = ""  # the collective it is in: "all_reduce #1421"
    steps: int = 0  # made since the program began, not since the run did
    pid: int = 0
    stacks: int = 0  # the signal that makes it write its stacks; 0: none
    hooked: bool = False  # it tells every step by itself, nothing was read out of a log
    heard: int = 0  # bytes of its log that were read: whoever prints is alive, also where no pattern knows the words


def progress(data: bytes) -> Told | None:
    """A rank's file of progress, as dslaunch_pulse or another writes it; None while it is being written."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    step = value.get("step")
    step = step if isinstance(step, int) and not isinstance(step, bool) else None
    return Told(
        step,
        mark=-1 if step is None else step,
        phase=_text(value, "phase") or "training",
        busy=_number(value, "busy"),
        least=_number(value, "least"),
        doing=_text(value, "doing"),
        steps=int(_number(value, "steps") or 0),
        pid=int(_number(value, "pid") or 0),
        stacks=int(_number(value, "stacks") or 0),
        hooked=True,
    )


def _number(value: Mapping[str, Any], name: str) -> float | None:
    found = value.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""


@dataclass(frozen=True)
class Fact:
    """One rank at the moment of a hang."""

    rank: int
    node: int
    host: str
    step: int | None = None
    phase: str = ""
    doing: str = ""
    letter: str = ""  # of its process, as ps shows it: R, S, D, T, Z; empty when it is gone
    cpu: float = 0.0  # seconds of processor time within a second
    frame: str = ""  # where Python is: "next (torch/utils/data/dataloader.py:701)"


def fact(value: Mapping[str, Any]) -> Fact:
    """As a node has written it down."""
    step = value.get("step")
    return Fact(
        rank=int(value["rank"]),
        node=int(value["node"]),
        host=_text(value, "host"),
        step=step if isinstance(step, int) else None,
        phase=_text(value, "phase"),
        doing=_text(value, "doing"),
        letter=_text(value, "letter"),
        cpu=_number(value, "cpu") or 0.0,
        frame=_text(value, "frame"),
    )
