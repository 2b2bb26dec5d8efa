r"""The failure table: causes.tsv and signatures.tsv, read from where this package lies (also from a zip).

Tab separated, no quoting: the first line names the columns, which are the fields of `Cause` and `Signature` in their
order, and a line that starts with `#` is a comment. An empty or missing cell is the field's default. In `sample` a
line break is written `\n` and a tab `\t`; `rank` stands where a row knows the writer of a line rather than what is
wrong, and such a row speaks only of lines that no other row knows. `pattern` and `unless` are regular expressions as
they stand, where `\n` and `\t` mean the same. Patterns know upper and lower case apart (write `(?i)` first where they
should not), and `^`, `$` are the borders of a line freed of its prefixes.
"""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from functools import lru_cache
from typing import Any

from launcher.diagnose import Cause, Signature


def parse(text: str) -> list[dict[str, str]]:
    """Rows of a table as column -> cell; a row with more cells than columns is a mistake and is refused."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if not lines:
        return []
    columns = lines[0].split("\t")
    rows = []
    for line in lines[1:]:
        cells = line.split("\t")
        if len(cells) > len(columns):
            raise ValueError(f"{len(cells)} cells in {len(columns)} columns: {line[:80]}")
        rows.append({name: cells[number] for number, name in enumerate(columns) if number < len(cells)})
    return rows


def _row(kind: Any, cells: dict[str, str]) -> Any:
    known = {row.name: str(row.type) for row in fields(kind)}
    strange = sorted(set(cells) - set(known))
    if strange:
        raise ValueError("no such column: " + ", ".join(strange))
    return kind(**{name: int(cell) if known[name] == "int" else cell for name, cell in cells.items() if cell})


def read_causes(text: str) -> dict[str, Cause]:
    rows = [_row(Cause, cells) for cells in parse(text)]
    return {row.id: row for row in rows}


def read_signatures(text: str) -> tuple[Signature, ...]:
    rows = []
    for cells in parse(text):
        if "sample" in cells:
            cells["sample"] = cells["sample"].replace("\\n", "\n").replace("\\t", "\t")
        rows.append(_row(Signature, cells))
    return tuple(rows)


def _data(name: str) -> str:
    return (pkgutil.get_data("launcher", "data/" + name) or b"").decode("utf-8")


@lru_cache(maxsize=1)
def read() -> tuple[dict[str, Cause], tuple[Signature, ...]]:
    """Causes by id, and the signatures in the table's order."""
    return read_causes(_data("causes.tsv")), read_signatures(_data("signatures.tsv"))
