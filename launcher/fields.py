"""The job file's fields as a page of text: what each takes, what it is by default, what it does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from launcher import yamldoc
from launcher.errors import Problem, UserError
from launcher.spec import JobSpec
from launcher.yamldoc import Help, Matches, Range


@dataclass(frozen=True)
class Row:
    path: str  # slurm.gpus_as, kubernetes.volumes[].claim
    takes: str
    default: str  # empty where there is none
    help: str


def rows(kind: Any = JobSpec, at: str = "") -> Iterator[Row]:
    """Every field below a section, in the file's order; `x[]` is one of a list, `x.*` one of the user's own keys."""
    for field in fields(kind):
        path, said = f"{at}{field.name}", _Said()
        said.read(yamldoc.hints(kind)[field.name])
        yield Row(path, " | ".join(dict.fromkeys(said.takes)), _default(field), said.help)
        for section, suffix in said.sections:
            yield from rows(section, f"{path}{suffix}.")


class _Said:
    """What a type says: its choices, its help, the sections in it."""

    def __init__(self) -> None:
        self.takes: list[str] = []
        self.help = ""
        self.sections: list[tuple[Any, str]] = []

    def read(self, kind: Any, suffix: str = "") -> None:
        origin = get_origin(kind)
        if origin is Annotated:
            base, *more = get_args(kind)
            for one in more:
                if isinstance(one, Help) and not suffix:
                    self.help = self.help or one.text
            limit = next((one for one in more if isinstance(one, Range)), None)
            shape = next((one for one in more if isinstance(one, Matches)), None)
            if limit:
                self.takes.append(f"{limit.low:,} to {limit.high:,}")
            elif shape and not suffix:
                self.takes.append(shape.says.split(":")[0])
            else:
                self.read(base, suffix)
        elif origin is Union or str(origin) == "<class 'types.UnionType'>":
            for choice in get_args(kind):
                self.read(choice, suffix)
        elif origin is Literal:
            self.takes += [str(option) for option in get_args(kind)]
        elif origin is tuple:
            self.takes.append("a list")
            self.read(get_args(kind)[0], f"{suffix}[]") if _has_section(get_args(kind)[0]) else None
        elif origin is dict:
            self.takes.append("keys with values")
            self.read(get_args(kind)[1], f"{suffix}.*") if _has_section(get_args(kind)[1]) else None
        elif is_dataclass(kind):
            self.takes.append("a section")
            self.sections.append((kind, suffix))
        elif kind is not type(None):
            self.takes.append({int: "a whole number", float: "a number", bool: "true | false"}.get(kind, "text"))


def _has_section(kind: Any) -> bool:
    return is_dataclass(kind) or any(_has_section(one) for one in get_args(kind))


def _default(field: Any) -> str:
    value = field.default if field.default is not MISSING else None
    return "" if value in (None, ()) else yamldoc.flow(value)


def text(section: str, *, width: int) -> str:
    """The fields of `slurm`, or one field with what is below it. Raises UserError for one that there is not."""
    every = list(rows())
    wanted = section.replace("[]", "").replace(".*", "")
    plain = {row.path.replace("[]", "").replace(".*", ""): row for row in every}
    found = [row for path, row in plain.items() if path == wanted or path.startswith(f"{wanted}.")]
    if not found:
        raise UserError(Problem(f"the job file has no field {section}", yamldoc.suggest(wanted, plain)))
    column = min(40, max(len(row.path) for row in found) + 2)
    lines = []
    for row in found:
        what = "; ".join(filter(None, [row.takes, row.help, f"default {row.default}" if row.default else ""]))
        wrapped = textwrap.wrap(what, max(30, width - column)) or [""]
        lines.append(
            f"{row.path:<{column}}{wrapped[0]}"
            if len(row.path) < column
            else f"{row.path}\n{' ' * column}{wrapped[0]}"
        )
        lines += [" " * column + line for line in wrapped[1:]]
    return "\n".join(lines)
