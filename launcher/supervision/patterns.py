"""Progress read out of a rank's log, by the patterns of progress.tsv."""

from __future__ import annotations

import os
import pkgutil
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from re import Pattern

from launcher.supervision import Told

CHUNK = 1 << 18  # bytes at a look; of more, only the last are read
LONG = 2000  # characters of a line that are looked at
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Row:
    kind: str  # step, tick, or the phase that begins
    program: str
    word: str
    pattern: Pattern[str]
    sample: str
    gives: str  # "step=312 total=250000"
    source: str


@lru_cache(maxsize=1)
def table() -> tuple[Row, ...]:
    text = (pkgutil.get_data("launcher", "data/progress.tsv") or b"").decode()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    rows = []
    for line in lines[1:]:
        kind, program, word, pattern, sample, gives, source = line.split("\t")
        rows.append(Row(kind, program, word, re.compile(pattern), sample, gives, source))
    return tuple(rows)


class Reader:
    """What a rank's log has told so far."""

    def __init__(self, path: str, start: int = 0) -> None:
        self.path, self.at = path, start
        self.begun = b""
        self.told = Told()
        self.steps: dict[int, tuple[int, int]] = {}  # by the row's number: step and total
        self.counted = 0

    def read(self) -> Told | None:
        """None before the first line that tells anything."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.at:  # somebody has emptied it
                    self.at, self.begun = 0, b""
                if size - self.at > CHUNK:
                    self.at, self.begun = size - CHUNK, b""
                file.seek(self.at)
                new = file.read(CHUNK)
        except OSError:
            return None
        self.at += len(new)
        *whole, self.begun = re.split(rb"[\r\n]+", self.begun[-LONG:] + new)
        for line in whole:
            self.line(line.decode("utf-8", "replace"))
        return replace(self.told, heard=self.at) if self.told != Told() else None

    def line(self, text: str) -> None:
        text = COLOUR.sub("", text[:LONG]) if "\x1b" in text else text[:LONG]
        for number, row in enumerate(table()):
            if row.word in text:
                found = row.pattern.search(text)
                if found:
                    self.found(number, row, found.groupdict())
                    return

    def found(self, number: int, row: Row, groups: dict[str, str]) -> None:
        if row.kind not in ("step", "tick"):
            self.told = replace(self.told, phase=row.kind)
            return
        phase = "training"
        if row.kind == "step":
            step, total = int(groups["step"]), int(groups.get("total") or 0)
            before = self.steps.get(number)
            if before and before[1] and total != before[1] and before[0] < before[1]:
                # a second bar before the first is full: an evaluation has one of its own
                self.told = replace(self.told, phase="eval")
                return
            if before and before[0] == step:
                return
            self.steps[number] = (step, total)
            if total and step >= total:
                phase = "ending"
        self.counted += 1
        shown = self.steps[min(self.steps)][0] if self.steps else None
        self.told = replace(self.told, step=shown, mark=self.counted, phase=phase)
