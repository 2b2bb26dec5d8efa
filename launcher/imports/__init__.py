"""What others wrote, as job files: one module per kind of file. Nothing is run, and nothing is guessed silently.

`typed` and `raw` count the fields of the job file that dslaunch understands, and those it only passes on: lines of
`setup`, arguments of srun, of sbatch and of a container's runtime, a patch of the object, and programs that stay a
line of shell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import Path

Kind = Literal["carried", "kept", "left out", "fill in"]


@dataclass(frozen=True)
class Note:
    """What became of one thing: carried into a field, kept as it was, left out with the reason, or yours to say."""

    kind: Kind
    message: str
    line: int = 0


@dataclass(frozen=True)
class Imported:
    job: dict[str, Any]
    notes: tuple[Note, ...]
    comments: Mapping[Path, str]  # behind the line of a field: what the user has to say there

    @property
    def typed(self) -> int:
        return sum(not _passed_on(path, value) for path, value in leaves(self.job))

    @property
    def raw(self) -> int:
        return sum(_passed_on(path, value) for path, value in leaves(self.job))

    @property
    def to_fill(self) -> tuple[str, ...]:
        return tuple(note.message for note in self.notes if note.kind == "fill in")


PASSED_ON: tuple[Path, ...] = (
    ("setup",), ("slurm", "sbatch"), ("slurm", "srun"), ("container", "args"), ("kubernetes", "patch"),
    ("kubernetes", "pod_patch"),
)  # fmt: skip
WHOLE: tuple[Path, ...] = (("train", "args"), ("train", "command"), ("train", "launcher_args"))


def reference(value: Mapping[str, Any]) -> bool:
    """{env: SCRATCH, append: /runs}, {job: id}: a value that is put in later; around it there may be another."""
    names = {"env", "job", "node", "host"} & set(value)
    texts = all(
        isinstance(one, str) or (key in ("prepend", "append") and isinstance(one, Mapping) and reference(one))
        for key, one in value.items()
    )
    return bool(names) and texts and set(value) <= {*names, "prepend", "append"}


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Fields as one counts them: every variable and every mount is one, a command line is one."""
    if isinstance(value, dict) and not (path != () and reference(value)):
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, (list, tuple)) and path not in WHOLE:
        for index, child in enumerate(value):
            yield from leaves(child, (*path, index))
    else:
        yield path, value


def _passed_on(path: Path, value: Any) -> bool:
    shell = path == ("train", "command") and isinstance(value, list) and value[:2] == ["bash", "-c"]
    return shell or any(path[: len(one)] == one for one in PASSED_ON)
