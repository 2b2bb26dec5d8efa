"""Checks of a node, one module each: the folder is the registry.

A check is a module with

    STAGE = "inventory", "host", "node" or "deep"
    measure(setting, probe) -> dict       on the node, in a process of its own that is killed when it hangs
    judge(found, setting) -> list         pure, in one place: what measure gave, by node -> findings
    facts(value) -> dict                  optional, pure: of one node, {"torch": "2.13.0"} for the inventory

`measure` answers {"skipped": why} where there is nothing to look at (no GPUs on a CPU job) and
{"unknown": why} where it could not look (no tool, no permission): unknown is never a pass. Whoever calls it puts
{"unknown": why, "timeout": seconds} or {"unknown": "Traceback ..."} in the place of an answer that never came.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import subprocess
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any


def of(stage: str = "") -> list[str]:
    """The checks of a stage, by name; every one without a stage."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if not stage or stage == load(name).STAGE]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True)
class Answer:
    """`code` is None when the command was not there or did not end in time; `err` says which."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Probe:
    """This node, as far as checks look at it. `root` stands before every absolute path, for fixtures."""

    root: str = ""
    path: str | None = None  # PATH of commands

    def run(self, argv: Sequence[str], timeout: float = 20.0) -> Answer:
        """A command without a shell, in the C locale; one that hangs is killed with all its children."""
        environ = {**os.environ, "LC_ALL": "C", **({"PATH": self.path} if self.path else {})}
        try:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environ,
                start_new_session=True,
            )
        except OSError as error:
            return Answer(None, "", f"{argv[0]}: {error.strerror}")
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            return Answer(None, "", f"{argv[0]} did not answer within {timeout:g} s")
        return Answer(child.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    def read(self, path: str) -> str | None:
        """A file's text, stripped; None when it is not there or may not be read."""
        try:
            with open(self.root + path, encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:
            return None

    def list(self, path: str) -> list[str]:
        """Names in a directory, sorted; none when there is no such directory."""
        try:
            return sorted(os.listdir(self.root + path))
        except OSError:
            return []


@dataclass(frozen=True)
class Vote:
    """What most nodes say. With 2 against 2 nobody can tell who is wrong: `tied`, and `odd` is empty."""

    common: Any
    odd: tuple[str, ...]
    tied: bool


def vote(values: Mapping[str, Hashable]) -> Vote:
    """vote({"a": 1, "b": 1, "c": 2}) is Vote(1, ("c",), False); more than half of the nodes decide."""
    counts = Counter(values.values()).most_common()
    if not counts:
        return Vote(None, (), False)
    common, most = counts[0]
    if len(counts) > 1 and most * 2 <= len(values):
        return Vote(common, (), True)
    return Vote(common, tuple(sorted(node for node, value in values.items() if value != common)), False)


def seen(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The nodes that really answered."""
    return {node: value for node, value in found.items() if "unknown" not in value and "skipped" not in value}


def unknowns(check: str, found: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """One finding for each node that could not be looked at. A check that hangs is a reason to leave the node out."""
    from launcher.preflight import Finding

    return [
        Finding(check, "exclude" if "timeout" in value else "unknown", str(value["unknown"]), node=node)
        for node, value in sorted(found.items())
        if "unknown" in value
    ]
