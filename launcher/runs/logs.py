"""Log files of a run: read piece by piece, merged in time order, safe for a terminal."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Problem, UserError


def progress(folder: Path) -> dict[str, Any] | None:
    """The newest line of the metrics: step, loss, tokens per second."""
    lines = _end(folder / "logs" / "metrics.jsonl", 8192).split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    return None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file of any size, for a terminal."""
    return [printable(raw) for raw in _end(path, 64 * 1024).split(b"\n") if raw][-lines:]


def _end(path: Path, size: int) -> bytes:
    """At most the last `size` bytes of a file; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read()
    except OSError:
        return b""


@dataclass(frozen=True)
class Choice:
    """Which of a run's lines: of these ranks, of this node's launcher and ranks, the last so many."""

    ranks: frozenset[int] = frozenset()  # none: all
    node: int | None = None
    tail: int | None = None

    @property
    def own(self) -> int | None:
        """The rank whose own file has it all: complete, and as the program wrote it. Those files have no times, so
        several ranks are picked from the job's output instead, which is in the order in which lines came."""
        return next(iter(self.ranks)) if len(self.ranks) == 1 and self.node is None else None

    def takes(self, line: str) -> bool:
        """ "[rank 3] loss 2.1" is of rank 3, "[node 1] ..." of the launcher on node 1."""
        if not self.ranks and self.node is None:
            return True
        mark = MARK.match(line)
        if not mark:
            return False
        number = int(mark[2])
        return number in self.ranks if mark[1] == "rank" else number == self.node


MARK = re.compile(r"\[(rank|node) ([0-9]+)\] ")


def parse_ranks(text: str) -> frozenset[int]:
    """ "0,3-5" is {0, 3, 4, 5}."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]) or int(match[2] or 0) - int(match[1]) > 1 << 20:
            raise UserError(Problem(f"--rank {text}: `{part}` is no rank and no range of ranks", "0,3-5"))
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def ranks_of(folder: Path, node: str) -> tuple[int, frozenset[int]]:
    """A node by its number or its host, and the ranks on it, as their own records and heartbeats tell."""
    found: dict[int, set[int]] = {}
    hosts: dict[str, int] = {}
    for path in (*(folder / "logs").glob("rank-*.json"), *(folder / "logs").glob("beat-*.json")):
        try:
            said = json.loads(path.read_bytes())
            number = int(said["node"] if "node" in said else said["node_rank"])
            there = {int(rank) for rank in said.get("ranks") or ()} if "ranks" in said else {int(said["rank"])}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        found.setdefault(number, set()).update(there)
        hosts[str(said.get("host"))] = number
    wanted = int(node) if node.isdigit() else hosts.get(node, hosts.get(node.partition(".")[0]))
    if wanted is None or wanted not in found:
        names = ", ".join(f"{number} ({host})" for host, number in sorted(hosts.items(), key=lambda one: one[1])[:8])
        raise UserError(Problem(f"no rank of node {node} has shown up in {folder}", names and f"there are {names}"))
    return wanted, frozenset(found[wanted])


def read(
    folder: Path, output: str, choice: Choice, *, follow: bool = False, over: Callable[[], bool] = lambda: True
) -> Iterator[str]:
    """Lines for a terminal, in the order in which they came; with `follow` until the run is over."""
    own = choice.own
    pattern = output if own is None else f"logs/rank-{own:05d}.log"
    wanted = Choice() if own is not None else choice
    positions: dict[str, int] = {}
    if choice.tail is not None:
        yield from last(folder, pattern, wanted, choice.tail, positions)
    finished, looked = False, 0.0
    while True:
        for line in news(folder, pattern, positions, last=finished or not follow):
            if wanted.takes(line):
                yield line
        if finished or not follow:
            break
        if time.monotonic() - looked > LOOK:
            finished, looked = over(), time.monotonic()
        if not finished:
            time.sleep(0.3)
    if not positions:
        ranks = sorted(int(path.stem[5:]) for path in (folder / "logs").glob("rank-*.log"))
        hint = f"there are logs of ranks {ranks[0]} to {ranks[-1]}" if ranks else "the job has not started here yet"
        what = "the job" if own is None else f"rank {own}"
        if asked := re.fullmatch(r"logs/service-(.*)\*\.log", output):
            what, services = f"a service {asked[1]}", sorted(path.name for path in folder.glob("logs/service-*.log"))
            hint = f"there are {', '.join(services)}" if services else "no service has written one yet"
        raise UserError(Problem(f"no log of {what} in {folder}", hint))


LOOK = 2.0  # seconds between two looks at what is known of the run


def in_order(folder: Path, pattern: str) -> list[Path]:
    """slurm-9.out, then slurm-10.out: jobs of one run in the order in which they were submitted."""

    def key(path: Path) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in SPLIT.split(path.name)]

    return sorted(folder.glob(pattern), key=key)


SPLIT = re.compile(r"(\d+)")


def news(folder: Path, pattern: str, positions: dict[str, int], *, last: bool = False) -> Iterator[str]:
    """Lines that came since; `positions` remembers how far each file was read. A half line waits for its rest."""
    for path in in_order(folder, pattern):
        start = positions.setdefault(path.name, 0)
        for raw, whole in _pieces(path, start):
            if not whole and not last:
                break
            positions[path.name] += len(raw)
            text = printable(raw)
            if text or raw.endswith(b"\n"):  # a piece of a line that shows nothing is no empty line
                yield text


def last(folder: Path, pattern: str, choice: Choice, lines: int, positions: dict[str, int]) -> list[str]:
    """The last lines of that choice, read from the end; what follows goes on behind them."""
    found: list[str] = []
    for path in reversed(in_order(folder, pattern)):
        try:
            size = path.stat().st_size
            ends = size
            for raw in _backwards(path, size):
                if ends == size and not raw.endswith(b"\n") and len(raw) < LONGEST:
                    size = ends = size - len(raw)  # a half line, which waits for its rest
                    continue
                ends -= len(raw)
                text = printable(raw)
                if len(found) < lines and (text or raw.endswith(b"\n")) and choice.takes(text):
                    found.append(text)
                if len(found) >= lines:
                    break
        except OSError:
            continue
        positions[path.name] = size
        if len(found) >= lines:
            break
    for path in in_order(folder, pattern):  # older ones are done with
        positions.setdefault(path.name, path.stat().st_size)
    return found[::-1]


LONGEST = 1 << 16


def _backwards(path: Path, size: int) -> Iterator[bytes]:
    """Lines from the end, the last first; of a line of megabytes pieces of at most 64 KiB."""
    rest = b""
    with path.open("rb") as file:
        at = size
        while at > 0:
            step = min(LONGEST, at)
            at -= step
            file.seek(at)
            rest = file.read(step) + rest
            head, newline, body = rest.partition(b"\n")
            lines = body.split(b"\n")
            if newline:
                whole = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
                yield from reversed(whole)
                rest = head + newline
            while len(rest) > LONGEST:
                yield rest[-LONGEST:]
                rest = rest[:-LONGEST]
    if rest:
        yield rest


def _pieces(path: Path, start: int) -> Iterator[tuple[bytes, bool]]:
    """Lines from `start` on, and whether each is whole; a line of megabytes comes in pieces of 64 KiB."""
    with path.open("rb", buffering=4 * LONGEST) as file:
        file.seek(start)
        while raw := file.readline(LONGEST):
            yield raw, raw.endswith(b"\n") or len(raw) == LONGEST


SILENT = bytes(code for code in (*range(32), 127) if code not in b"\t\n\r\x1b\x07")  # BEL ends a title
KEEP = {9: "\t"}
STRIP = {
    code: KEEP.get(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\|$)|[PX^_][^\x1b]*(?:\x1b\\|$)|[ -/]+[0-~]|[0-Z\\-~])"
)


def printable(raw: bytes) -> str:
    """A log line for a terminal: no escape sequences, no control bytes, no half characters, no text turned around.
    Of a progress bar that redraws itself the last state."""
    text = raw.translate(None, SILENT).decode(errors="replace").rstrip("\r\n")
    if text.isprintable():
        return text
    return ESCAPES.sub("", text).rstrip("\r").rpartition("\r")[2].translate(STRIP)
