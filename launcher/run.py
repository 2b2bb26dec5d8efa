"""The only place that starts a process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """`code` is None when the command was not there or did not answer in time; `err` says which."""

    code: int | None
    out: str
    err: str


Run = Callable[..., Result]


def run(argv: Sequence[str], *, timeout: float = 30.0, env: Mapping[str, str] | None = None) -> Result:
    """A command without a shell, its text in the C locale so that it can be parsed."""
    environ = {**(os.environ if env is None else env), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(argv), capture_output=True, timeout=timeout, env=environ, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        return Result(None, "", f"{argv[0]}: command not found")
    except subprocess.TimeoutExpired:
        return Result(None, "", f"{argv[0]} did not answer within {timeout:g} s")
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def spawn(argv: Sequence[str], *, log: str, cwd: str, env: Mapping[str, str]) -> int:
    """A process in a session of its own that outlives this one; its pid."""
    with open(log, "ab") as out, open(os.devnull, "rb") as null:  # noqa: PTH123 - descriptors for a child
        child = subprocess.Popen(
            list(argv),
            stdin=null,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
    return child.pid
