"""Our verdict on a cell beside DeepSpeed's: where they differ, the rule is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.plan import rules

from .cells import OLD, Cell

HERE = Path(__file__).parent
STEPS = 3  # as many as engine.py runs
CACHE = HERE.parents[1] / ".cache"
Answer = dict[str, Any]


def can_run(cell: Cell) -> bool:
    return not cell.needs or Path("/usr/include", cell.needs).exists()


def situation(cell: Cell, release: str) -> rules.Situation:
    """What the rules get to know of a cell: everything."""
    return rules.Situation(
        config=cell.config,
        gpus=False,
        world=cell.world,
        per_node=cell.per_node or cell.world,
        pipeline=cell.pipeline,
        steps=STEPS,
        deepspeed=release,
        client=cell.client,
        packages=frozenset(name for name in rules.PACKAGES.values() if importlib.util.find_spec(name)),
    )


def findings(cell: Cell, release: str) -> list[rules.Finding]:
    return [found for found in rules.judge(situation(cell, release)) if found.severity != "note"]


def without(config: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy of the config that lacks one key."""
    first, *rest = path
    inner = config.get(first)
    if rest and isinstance(inner, dict):
        return {**config, first: without(inner, tuple(rest))}
    return {key: value for key, value in config.items() if key != first}


def probes(cell: Cell, release: str) -> list[tuple[Any, ...]]:
    """The settings whose effect has to be looked for: those we call ignored, and those the cell names."""
    ignored = [found.path for found in findings(cell, release) if found.row.outcome == "ignored"]
    return [*dict.fromkeys([*ignored, *([cell.setting] if cell.setting else [])])]


def disagreements(cell: Cell, release: str, answer: Answer, bare: dict[tuple[Any, ...], Answer]) -> Iterator[str]:
    """`bare` holds what DeepSpeed did without each of the probes."""
    found = findings(cell, release)
    ours = {outcome: [f.rule for f in found if f.row.outcome == outcome] for outcome in OUTCOMES}
    if answer["verdict"] != "ran":
        if not ours["refused"]:
            said = ", ".join(f.rule for f in found) or "nothing"
            yield f"accepted by us ({said}), {answer['verdict']}: {answer['error']} {answer['at']}"
        return
    if ours["refused"]:
        yield f"refused by us ({', '.join(ours['refused'])}), runs"
        return
    for path, other in bare.items():
        same = other["verdict"] == "ran" and alike(other["seen"], answer["seen"])
        name = ".".join(map(str, path))
        if same and not any(f.path == path and f.row.outcome in ("ignored", "differs") for f in found):
            yield f"accepted by us, and DeepSpeed ignores {name}"
        if not same and any(f.path == path and f.row.outcome == "ignored" for f in found):
            yield f"called ignored by us, and {name} has an effect"
    for key, value in cell.seen.items():
        if answer["seen"][key] != value:
            yield f"{key} should be {value}, and is {answer['seen'][key]}"


def alike(one: Answer, other: Answer) -> bool:
    """The same engine by all we can see; losses may differ in the digits that another order of summing moves."""
    losses = [[f"{loss:.4g}" for loss in seen["losses"]] for seen in (one, other)]
    return losses[0] == losses[1] and {**one, "losses": 0} == {**other, "losses": 0}


OUTCOMES = ("refused", "ignored", "differs", "advice")


def interpreter(release: str) -> tuple[Path, dict[str, str]]:
    """The Python that has this DeepSpeed, and its environment: compiled ops are kept in .cache."""
    from onebit import env

    old = release == OLD
    python = env.ensure(CACHE) / "bin/python" if old else Path(sys.executable)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"  # ninja
    variables["TORCH_EXTENSIONS_DIR"] = str(CACHE / f"torch-extensions-{'old' if old else 'ours'}")
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    if old:
        variables["PYTHONPATH"] = str(HERE.parent / "onebit")  # a stand-in for cupy
    return python, variables


def ask(program: str, lines: Iterable[Any], *, release: str) -> list[Any]:
    """What a program beside this file answers to each line, all in one process with that DeepSpeed."""
    python, variables = interpreter(release)
    variables.pop("PYTHONPATH", None)  # as a user has it, without the stand-in
    done = subprocess.run(
        [python, HERE / program],
        env=variables,
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


class Engine:
    """DeepSpeed in a process of its own; ask() gives what it did with a config."""

    def __init__(self, release: str) -> None:
        python, variables = interpreter(release)
        self.process = subprocess.Popen(
            [python, HERE / "engine.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        )
        self.release = self._read()["deepspeed"]

    def _read(self) -> Answer:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise RuntimeError(f"the process with DeepSpeed ended with {self.process.wait()}")

    def ask(self, cell: Cell, config: dict[str, Any]) -> Answer:
        asked = {name: getattr(cell, name) for name in ("world", "per_node", "pipeline", "client")}
        asked["config"] = config
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._read()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def compare(cells: Iterable[Cell], release: str) -> Iterator[tuple[Cell, Answer, list[str]]]:
    """Each cell with DeepSpeed's answer and where ours differs."""
    with Engine(release) as engine:
        assert engine.release == release, f"this is DeepSpeed {engine.release}"
        for cell in cells:
            answer = engine.ask(cell, cell.config)
            ran = answer["verdict"] == "ran"
            paths = probes(cell, release) if ran else []
            bare = {path: engine.ask(cell, without(cell.config, path)) for path in paths}
            yield cell, answer, list(disagreements(cell, release, answer, bare))
