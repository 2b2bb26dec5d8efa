"""The job as it is read, each value with the place that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from launcher import yamldoc
from launcher.errors import Path
from launcher.spec import Document

DEFAULT = "default"


def rows(document: Document, *, defaults: bool = False) -> list[tuple[Path, Any, str]]:
    """(("slurm", "time"), "2:00:00", "booster.yaml:4:3"), in the order of the job file's sections."""
    given = {path: where for path, where in document.origins() if _value(document.root, path) is not None}
    found = [(path, _value(document.root, path), where) for path, where in given.items()]
    if defaults:
        above = {path[:length] for path in given for length in range(len(path) + 1)}
        found += [(path, value, DEFAULT) for path, value in _defaults(document.spec, ()) if path not in above]
    order = {name: index for index, name in enumerate(_order(document.spec))}
    return sorted(found, key=lambda row: order.get(".".join(map(str, row[0][:2])), order.get(str(row[0][0]), 0)))


def _value(root: yamldoc.Node, path: Path) -> Any:
    node: Any = root
    for part in path:
        node = node.entries[part]
    return yamldoc.plain(node)


def _defaults(section: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What a section holds where nothing was said: leaves alone, and none that is empty."""
    for field in fields(section):
        value, at = getattr(section, field.name), (*path, field.name)
        if is_dataclass(value):
            yield from _defaults(value, at)
        elif value not in (None, (), {}):
            yield at, list(value) if isinstance(value, tuple) else value


def _order(section: Any) -> Iterator[str]:
    for field in fields(section):
        yield field.name
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from (f"{field.name}.{inner.name}" for inner in fields(value))


def text(found: list[tuple[Path, Any, str]], *, origin: bool) -> str:
    """YAML that reads back as the same job; with `origin` each line says where its value stands."""
    lines: list[tuple[str, str]] = []
    above: Path = ()
    for path, value, where in found:
        shared = 0
        while shared < min(len(above), len(path) - 1) and above[shared] == path[shared]:
            shared += 1
        for depth in range(shared, len(path) - 1):
            lines.append((f"{'  ' * depth}{yamldoc.key(path[depth])}:", ""))
        lines.append((f"{'  ' * (len(path) - 1)}{yamldoc.key(path[-1])}: {yamldoc.flow(value)}", where))
        above = path[:-1]
    if not origin:
        return "".join(f"{line}\n" for line, _ in lines)
    width = min(60, max((len(line) for line, where in lines if where), default=0))
    return "".join(f"{line.ljust(width)}  # {where}\n" if where else f"{line}\n" for line, where in lines)
