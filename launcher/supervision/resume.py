"""Which checkpoint an attempt goes on from, agreed on before any rank starts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Callable  # noqa: UP035  # of typing, for Python 3.8

from launcher import diagnose
from launcher.checkpoints import Choice, choose
from launcher.supervision import FIRST, NO_HOST, PAUSE, Refused, write

SILENCE = 120.0  # seconds without a beat of node 0 after which nobody waits for its choice; it has one every 5 s
PR_SET_PDEATHSIG = 1

Pause = Callable[[float, str], None]  # waits, or raises Refused when told to stop


@dataclass(frozen=True)
class Run:
    world: int
    stage: int | None
    model_parallel: int
    fresh: bool


def gate(
    directory: str,
    *,
    config: str,
    first: bool,
    logs: str | None,
    attempt: int,
    run: Run,
    say: Callable[[str], None],
    pause: Pause,
) -> str:
    """The path of the tag that this attempt resumes from, empty at a start. Rank 0's supervisor, `first`, decides.

    The others wait for its word for as long as its beat goes on; where they cannot see its `logs` they look for
    themselves. `config` is DeepSpeed's, which has to say whether a universal checkpoint is loaded.
    """
    if not first and logs:
        value = awaited(logs, attempt, pause)
        if value["action"] == "refuse":
            raise Refused(f"node 0 refuses: {value['why']}")
        configure(config, Choice(value["action"]))
        return str(value["resume"])
    choice = chosen(directory, run)
    if first and choice.action == "convert":
        say(f"{choice.why}: {' '.join(choice.command)}")
        convert(choice.command, pause)
        again = chosen(directory, run)
        choice = (
            again if again.action != "convert" else replace(again, action="refuse", why=f"{again.why}; it failed")
        )
    tag = choice.tag.path if choice.tag and choice.action in ("load", "universal") else ""
    if first:
        if tag:
            choose.prepare(choice, directory)
        if logs:
            write(os.path.join(logs, f"resume-{attempt}.json"), {**diagnose.to_json(choice), "resume": tag})
        for one in choice.skipped:
            say(f"checkpoint {one.name} is {one.health}" + (f": {one.why}" if one.why else ""))
        if tag:
            say(f"going on from {tag}")
    if choice.action == "refuse":
        mend = f"; {' '.join(choice.command)}" if choice.command else ""
        raise Refused(f"{choice.why}{mend}")
    configure(config, choice)
    return tag


def configure(path: str, choice: Choice) -> None:
    """DeepSpeed's configuration as this choice needs it, by rename; every node may do so, with the same bytes."""
    if not path:
        return
    with open(path, encoding="utf-8") as file:
        before = json.load(file)
    after = choose.configured(before, choice)
    if after == before:
        return
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(json.dumps(after, indent=2) + "\n")
        os.replace(draft, path)
    except OSError as error:
        said = "true" if choice.action == "universal" else "left out"
        raise Refused(
            f"{path} cannot be written ({error.strerror}): checkpoint.load_universal has to be {said}"
        ) from None


def chosen(directory: str, run: Run) -> Choice:
    return choose.choose(
        directory, world_size=run.world, stage=run.stage, model_parallel=run.model_parallel, fresh=run.fresh
    )


def convert(command: Iterable[str], pause: Pause) -> None:
    """Run it in this Python, until it ends or we are told to stop. What it left is judged afterwards."""
    argv = [sys.executable if word == "python" else word for word in command]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=before_convert)
    try:
        while process.poll() is None:
            pause(0.5, "converting a checkpoint")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def before_convert() -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def awaited(logs: str, attempt: int, pause: Pause) -> dict[str, Any]:
    """What node 0 has chosen, once it has."""
    beats = [os.path.join(logs, name.replace("node-", "beat-") + ".json") for name in FIRST]
    changed: list[int] = []
    at = looked = time.monotonic()
    while True:
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(logs, f"resume-{attempt}.json"), encoding="utf-8") as file:
                value: dict[str, Any] = json.load(file)
            return value
        stamps = []
        for beat in beats:
            with contextlib.suppress(OSError):
                stamps.append(os.stat(beat).st_mtime_ns)
        now = time.monotonic()
        if stamps != changed or now - looked > PAUSE:  # a job that was suspended: node 0 was as well
            changed, at = stamps, now
        looked = now
        if now - at > SILENCE:
            raise Refused(f"node 0 has not said within {SILENCE:.0f} s which checkpoint to go on from", code=NO_HOST)
        pause(0.5, "waiting for node 0 to choose a checkpoint")
