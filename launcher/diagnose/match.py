"""Lines of logs held against the signatures.

A log is read in blocks. Lines that differ in their digits alone have one shape, and the words that the signatures
need (their triggers) are looked for once a shape; only lines of the shapes that have one are freed of prefixes and
held against patterns, until the shape turns out to be of no use to a signature. So 100 MB take a few seconds whether
healthy or full of retries, and memory does not grow with the log: of a file above 72 MiB the first 8 and the last 64
MiB are read, and the reading says so.
"""

from __future__ import annotations

import bisect
import calendar
import gzip
import importlib
import io
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import IO, Any

from launcher.diagnose import Line, Signature

HEAD = 8 << 20
TAIL = 64 << 20
BLOCK = 4 << 20
PACKED = 4 << 30  # bytes that a packed log may unfold to; what comes after is not read
KEPT = 3  # hits of one signature in one process, and beside them the newest
CARRIED = 200  # lines that the next block sees again, for what spans two blocks
LONG = 64 << 10  # a line is cut there
WRAPPED = 60  # characters from which on a terminal may have broken a line
APART = 40  # lines between two of one process where several write into one log
LEAST = 4  # characters of a trigger
ALIKE = 20000  # shapes of lines that are remembered
WRAPS = 2000  # attempts of one signature to mend lines of one log that a terminal broke

_LETTERS = bytes(letter if 97 <= letter <= 122 else 32 for letter in range(256))
_ZEROS = bytes(48 if 48 <= letter <= 57 else letter for letter in range(256))
_NOUGHTS = dict.fromkeys(range(48, 58), "0")
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


@dataclass(frozen=True)
class Hit:
    """A signature found: the lines that it matched, and who wrote them."""

    signature: Signature
    lines: tuple[Line, ...]
    order: int  # place in all that was read, where no clock decides
    count: int = 1  # of this signature by this process

    @property
    def first(self) -> Line:
        return self.lines[0]


@dataclass(frozen=True)
class Crash:
    """The last exception of a Python traceback, and the line of code that raised it."""

    name: str  # ModuleNotFoundError, without its module
    message: str
    place: str  # "train.py:31", the innermost frame outside of installed packages
    inner: str  # "wandb/sdk/wandb_init.py init", the innermost frame that is not Python's nor an HTTP client's
    lines: tuple[Line, ...]
    order: int
    until: int  # the place of its last line

    @property
    def first(self) -> Line:
        return self.lines[0]


@dataclass
class Reading:
    hits: list[Hit] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes: int = 0


# What begins a traceback, is part of one whose beginning is elsewhere, or is one without.
_FRAMED = 'file "'
_CRASH = ("traceback (most recent call last)", _FRAMED, "syntaxerror: ", "indentationerror: ", "taberror: ")

# --- What a pattern needs -------------------------------------------------------------------------------------------


def triggers(pattern: str, *, joins: int = 1) -> frozenset[str]:
    """Lower-case literals of which one is in every text that the pattern matches; empty when there are none.

    `CUDA error: (?:out of memory|unknown)` needs "cuda error: ". Lines that are joined may end between two words,
    so there it is one word.
    """
    best = _needs(_parser.parse(pattern), joins > 1)
    return best if best and min(map(len, best)) >= LEAST else frozenset()


def _better(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    def worth(texts: frozenset[str]) -> tuple[int, int]:
        return (min(map(len, texts)), -len(texts)) if texts else (0, 0)

    return one if worth(one) >= worth(other) else other


def _needs(parsed: Any, words: bool) -> frozenset[str]:
    best: frozenset[str] = frozenset()
    run = ""
    for kind, value in [*parsed, (None, None)]:
        name = str(kind)
        if name == "IN" and {str(one) for one, _ in value} == {"LITERAL"}:
            cases = {chr(letter).lower() for _, letter in value}  # [Ee] is e
            if len(cases) == 1:
                run += cases.pop()
                continue
        if name == "LITERAL":
            run += chr(value).lower()
            continue
        if run:
            best = _better(best, frozenset([max(run.split(), key=len, default="") if words else run]))
        run = ""
        if name == "SUBPATTERN":
            best = _better(best, _needs(value[-1], words))
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and value[0] > 0:
            best = _better(best, _needs(value[2], words))
        elif name == "BRANCH":
            each = [_needs(branch, words) for branch in value[1]]
            if all(each):
                best = _better(best, frozenset().union(*each))
    return best


@dataclass(frozen=True)
class _Row:
    signature: Signature
    pattern: re.Pattern[str]
    unless: re.Pattern[str] | None
    shape: re.Pattern[str] | None  # found in the shape of each line that the pattern is found in


_COUNTS = re.compile(r"\{\d*,?\d*\}")
_OPENS = re.compile(r"\(\?<?!|.", re.S)


def _part(pattern: str, at: int) -> int:
    """Where the next part of a pattern ends: a letter, an escape, a set of letters, a count, what opens a group."""
    counts = _COUNTS.match(pattern, at)
    if counts:
        return counts.end()
    if pattern[at] == "\\":
        return at + 2
    if pattern[at] != "[":
        opened = _OPENS.match(pattern, at)
        return opened.end() if opened else at + 1
    at += 2 if pattern[at + 1] == "^" else 1
    at += 1 if pattern[at] == "]" else 0
    while pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def shaped(pattern: str) -> str | None:
    """A pattern for lines whose digits are all 0, that misses none of what this one finds; None where it is hard.

    `error (?:12|137)` is `error (?:00|000)`. Numbers that must not be there may be.
    """
    found = ""
    at = 0
    while at < len(pattern):
        start, at = at, _part(pattern, at)
        part = pattern[start:at]
        if _COUNTS.fullmatch(part):
            found += part
        elif part[0] == "\\":
            if part[1].isdigit():
                return None
            found += part
        elif part[0] == "[":
            digits = any(letter.isdigit() for letter in part)
            if digits and part[1] == "^":
                return None
            found += part[:-1] + "0]" if digits else part
        elif part in ("(?!", "(?<!"):
            deep = 1
            while deep:
                deep += {"(": 1, ")": -1}.get(pattern[at], 0)
                at = _part(pattern, at)
            found += "" if re.search("[0-9]", pattern[start:at]) else pattern[start:at]
        else:
            found += "0" if part.isdigit() else part
    return found


@dataclass
class _Shape:
    """Lines that differ in their digits alone."""

    rows: list[_Row]  # that may have a use for them
    crash: bool  # a traceback may begin there


@dataclass(frozen=True)
class _Word:
    """A trigger, its digits as zeros, and who waits for it."""

    text: bytes
    core: bytes  # its longest run of letters, which is looked for among a block's different words
    rows: tuple[_Row, ...]
    crash: bool  # it begins a traceback


class Table:
    """Signatures made ready; one is used for many logs."""

    def __init__(self, signatures: Iterable[Signature]) -> None:
        self.rows: list[_Row] = []
        wanted: dict[str, list[_Row]] = {word: [] for word in _CRASH}
        for one in signatures:
            needs = triggers(one.pattern, joins=one.joins)
            if not needs:
                raise ValueError(f"{one.id}: no {LEAST} letters in a row that every match has")
            unless = re.compile(one.unless, re.M) if one.unless else None
            loose = shaped(one.pattern)
            shape = re.compile(loose) if loose is not None else None
            self.rows.append(_Row(one, re.compile(one.pattern), unless, shape))
            for word in needs:
                wanted.setdefault(word, []).append(self.rows[-1])
        self.words = []
        for word, rows in wanted.items():
            core = max(re.findall("[a-z]+", word), key=len, default="")
            text = word.encode("utf-8").translate(_ZEROS)
            self.words.append(_Word(text, core.encode("ascii"), tuple(rows), word in _CRASH))
        self.reach = max((len(word.text) for word in self.words), default=1) - 1

    def shapes(self, lines: Sequence[bytes]) -> list[_Shape]:
        """What may be of use in each of these lines, which have zeros for digits.

        A log has few different words, so most of the thousand triggers are ruled out by a look at those.
        """
        flat = b"\n".join(lines).lower()
        starts = _starts(lines)
        found: dict[int, dict[str, _Row]] = {}
        crashes = set()
        for word, place in sorted(self._places(flat), key=lambda one: one[1]):
            index = bisect.bisect_right(starts, place) - 1
            of_line = found.setdefault(index, {})
            of_line.update((row.signature.id, row) for row in word.rows)
            if word.crash:
                crashes.add(index)
        return [_Shape(list(found[index].values()) if index in found else [], index in crashes)
                for index in range(len(lines))]  # fmt: skip

    def broken(self, ends: Sequence[tuple[bytes, bytes]]) -> list[list[_Row]]:
        """Who waits for words that begin at the end of a line and go on in the next one."""
        pairs = [end + b" " + begin for end, begin in ends]
        flat = b"\n".join(pairs).lower()
        starts = _starts(pairs)
        found: list[list[_Row]] = [[] for _ in ends]
        for word, place in self._places(flat):
            index = bisect.bisect_right(starts, place) - 1
            gap = starts[index] + len(ends[index][0])
            if place < gap < place + len(word.text) - 1:
                found[index].extend(word.rows)
        return found

    def _places(self, flat: bytes) -> Iterator[tuple[_Word, int]]:
        words = b" ".join(set(flat.translate(_LETTERS).split()))
        for word in self.words:
            if word.core not in words:
                continue
            place = flat.find(word.text)
            while place >= 0:
                yield word, place
                place = flat.find(word.text, place + 1)


def _starts(lines: Sequence[bytes]) -> list[int]:
    """Where each of these lines begins in the text that they make."""
    return list(itertools.accumulate((len(line) + 1 for line in lines[:-1]), initial=0))


@lru_cache(maxsize=8)
def table(signatures: tuple[Signature, ...]) -> Table:
    return Table(signatures)


# --- Prefixes -------------------------------------------------------------------------------------------------------

_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_BAR = re.compile(r"\d+%\|")
_CLOCK = r"\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?: ?(?:Z|[+-]\d\d:?\d\d))?"
_DAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d(?: [A-Z]{3,4})? \d{4}"
# What may stand before the text, in any order; groups say who wrote the line.
_PREFIXES = [
    re.compile(text)
    for text in (
        r"\[rank ?(?P<rank>\d+)\]:? ?",
        r"\[node (?P<node>\d+)\] ?",
        r"\[default(?P<task>\d+)\]: ?",
        rf"(?:{_DAY})?\[(?:\d+,)?(?P<rank>\d+)\]<std(?:out|err|diag)>: ?",
        r" {0,4}(?P<task>\d{1,5}): ",
        r"\[pod/(?P<node>[\w.-]+)/[\w.-]+\] ",
        r"(?P<node>[a-z][\w.-]{1,63}|\d{1,3}(?:\.\d{1,3}){3}): "
        r"(?=\[\d{4}-|\[rank|Traceback \(|  File \"|[A-Za-z_.]*(?:Error|Exception)(?:: |$)|[\w.-]+:\d+:\d+ \[)",
        r"(?P<node>[a-z][\w.-]*\d[\w.-]*|\d{1,3}(?:\.\d{1,3}){3}): (?=    \S)",  # a line of code of a traceback
        r"\((?P<task>(?:[\w.<>:=]+ ){0,3}pid=\d+(?:, ip=[\d.]+)?)\) ?",  # Ray, vLLM
        r"[\w.-]+/\d+ (?=\[(?:default|rank)\d+\])",  # TorchX
        r"(?P<task>[\w.-]+[-_]\d+)\s+\| ",  # Docker Compose
        rf"{_CLOCK} (?:- )?[\w.]+ - [A-Z]+ - ",  # Python's logging
        rf"{_CLOCK} \((?P<task>\w+)\) : ",
        r"(?:ERROR|INFO|WARNING) \d\d-\d\d \d\d:\d\d:\d\d \[?[\w./]+\.py:\d+\] ?",  # vLLM
        r"<\d{1,3}>",
        rf"{_CLOCK} std(?:out|err) [FP] ",
        rf"\[(?:task )?{_CLOCK}\] ",
        rf"{_CLOCK}(?: (?P<node>[\w.-]+) (?:kernel|nvidia-\w+|slurm\w+|systemd|dockerd)(?:\[\d+\])?:)? ",
        r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d (?P<node>[\w.-]+) [\w.@/-]+(?:\[\d+\])?: ",
        rf"\[{_DAY}\] ",
        r"\[ *\d+\.\d{6}\] ",
        r"\[[A-Z][a-z]{2} \d\d \d{4} \d\d:\d\d:\d\d\] ",
        r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+:\d+\] ",
    )
]
_NCCL = re.compile(r"(?:^|\s)(?P<node>[A-Za-z0-9._-]+):\d+:\d+ \[\d+\]")
_SAID = re.compile(r"\[(?:PG[^\]]{0,60} )?[Rr]ank (?P<rank>\d+)\]")
_ISO = re.compile(r"(\d{4})[-/](\d\d)[-/](\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d+))?(?: ?(Z|[+-]\d\d:?\d\d))?")
_TOLD = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) ([ \d]\d) (\d\d):(\d\d):(\d\d)(?: [A-Z]{3,4})? (\d{4})")
_YEAR = re.compile(r"\[([A-Z][a-z]{2}) (\d\d) (\d{4}) (\d\d):(\d\d):(\d\d)\]")
_EPOCH = re.compile(r"\[(1\d{9}\.\d+)\]")
_MONTHS = {name: number for number, name in enumerate(calendar.month_abbr)}


def moment(text: str) -> float | None:
    """Seconds since the epoch of the stamp near a line's beginning; a clock without a zone is this machine's.

    Seconds since boot, and stamps without a year, are none: they order the lines of one file only.
    """
    head = text[:160]
    found = _ISO.search(head)
    if found:
        *date, fraction, zone = found.groups()
        parts = tuple(map(int, date))
        seconds = float("0." + fraction) if fraction else 0.0
        return _epoch(parts, zone) + seconds if _real(parts) else None
    found = _TOLD.search(head)
    if found:
        month, day, hour, minute, second, year = found.groups()
        parts = (int(year), _MONTHS.get(month, 0), int(day), int(hour), int(minute), int(second))
        return _epoch(parts, None) if _real(parts) else None
    found = _YEAR.match(head)
    if found:
        month, day, year, hour, minute, second = found.groups()
        parts = (int(year), _MONTHS.get(month, 0), int(day), int(hour), int(minute), int(second))
        return _epoch(parts, None) if _real(parts) else None
    found = _EPOCH.match(head)
    return float(found[1]) if found else None


def _real(parts: Sequence[int]) -> bool:
    year, month, day, hour, minute, second = parts
    return 1970 < year < 2200 and 1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second < 61


def _epoch(parts: Sequence[int], zone: str | None) -> float:
    if zone is None:
        return time.mktime((*parts, 0, 0, -1))  # type: ignore[arg-type]
    at = float(calendar.timegm((*parts, 0, 0, 0)))
    if zone != "Z":
        sign = -1 if zone[0] == "-" else 1
        at -= sign * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)
    return at


@dataclass(frozen=True)
class Bare:
    """A line without its prefixes."""

    text: str
    node: str = ""
    rank: int | None = None
    at: float | None = None
    task: str = ""  # the writer as its prefix has it: lines with another are another's
    marked: bool = False  # it had a prefix: no terminal broke it off the line above


def bare(text: str) -> Bare:
    """`[rank 3] 2026-11-20T12:00:01Z RuntimeError: x` is `RuntimeError: x` of rank 3 at that time."""
    at = None
    if text.startswith('{"log":'):
        try:
            value = json.loads(text)
            text, at = str(value["log"]).rstrip("\n"), moment(str(value.get("time", "")))
        except (ValueError, KeyError):
            pass
    if "\r" in text:
        parts = [part for part in text.split("\r") if part.strip() and not _BAR.search(part)]
        text = " ".join(parts)
    at = at or moment(text)
    node, rank, task, marked = "", None, "", False
    for _ in range(6):
        for pattern in _PREFIXES:
            found = pattern.match(text)
            if found:
                break
        else:
            break
        groups = found.groupdict()
        node = node or groups.get("node") or ""
        if rank is None and groups.get("rank"):
            rank = int(groups["rank"])
        task = task + found[0].strip() if set(groups) & {"rank", "task", "node"} else task
        marked = True
        text = text[found.end() :]
    said = _NCCL.search(text)
    if said:
        node = node or said["node"]
        marked = marked or not said.start()
    said = _SAID.search(text) if rank is None else None
    if said:
        rank = int(said["rank"])
    return Bare(text.rstrip(), node, rank, at, task, marked)


_FILES = (
    (re.compile(r"rank[-_.]?0*(?P<rank>\d+)\b"), ""),
    (re.compile(r"node-(?P<node>\d{4})\b"), ""),
    (re.compile(r"(?:dmesg|kern|kernel|syslog|messages|journal)[-._](?P<node>[\w-]+?)(?:\.(?:log|txt|gz))*$"), ""),
    (re.compile(r"^(?P<node>[a-z][a-z-]*\d[\w-]*)\.(?:log|out|err|txt|dmesg)(?:\.gz)?$"), ""),
)


def named(file: str) -> tuple[str, int | None]:
    """Node and rank that a file's name says: rank-00003.log is of rank 3, node-0001.launcher.log of node "1"."""
    name = os.path.basename(file)
    for pattern, _ in _FILES:
        found = pattern.search(name)
        if found and not name.startswith("slurm-"):
            groups = found.groupdict()
            node = groups.get("node") or ""
            rank = groups.get("rank")
            return (str(int(node)) if node.isdigit() else node), (int(rank) if rank else None)
    return "", None


# --- Reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    data: bytes
    number: int  # of its first line; 0 where lines before it were not counted


DAMAGED = (EOFError, OSError, zlib.error)


def _some(stream: Any, size: int) -> bytes:
    """Up to that many bytes; of a packed file that is cut off, what comes before the cut."""
    parts: list[bytes] = []
    try:
        while size > 0:
            part = stream.read1(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
    except DAMAGED:
        if not parts:
            raise
    return b"".join(parts)


def _whole(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    """Blocks that end with a line; a line without an end is cut."""
    rest = b""
    while limit > 0:
        data = _some(stream, min(BLOCK, limit))
        if not data:
            break
        limit -= len(data)
        data = rest + data
        cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not cut and len(data) < BLOCK:
            rest = data
            continue
        cut = cut or len(data)
        rest = data[cut:]
        yield data[:cut]
    if rest:
        yield rest


def _numbered(pieces: Iterable[bytes], number: int = 1) -> Iterator[_Block]:
    for piece in pieces:
        yield _Block(piece, number)
        number += piece.count(b"\n") if number else 0


def _blocks(file: str, notes: list[str], head: int, tail: int, start: int) -> Iterator[_Block]:
    with open(file, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            stream.seek(0)
            with gzip.open(stream) as unfolded:
                yield from _unfolded(file, unfolded, notes, head, tail)
            return
        size = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        before = sum(piece.count(b"\n") for piece in _whole(stream, start)) if start <= tail else -1
        stream.seek(start)
        if size - start <= head + tail:
            yield from _numbered(_whole(stream, head + tail), before + 1)
            return
        yield from _numbered(_whole(stream, head), before + 1)
        notes.append(f"{file}: {(size - start - head - tail) >> 20} MiB in the middle were not read")
        stream.seek(size - tail)
        stream.readline(LONG)
        yield from _numbered(_whole(stream, tail), 0)


def _unfolded(file: str, stream: Any, notes: list[str], head: int, tail: int) -> Iterator[_Block]:
    yield from _numbered(_whole(stream, head))
    last: deque[bytes] = deque()
    held = dropped = 0
    total = head
    try:
        while total < PACKED:
            data = _some(stream, BLOCK)
            if not data:
                break
            total += len(data)
            last.append(data)
            held += len(data)
            while held - len(last[0]) >= tail:
                dropped += len(last[0])
                held -= len(last.popleft())
        else:
            notes.append(f"{file}: what comes after {PACKED >> 30} GiB was not read")
    except DAMAGED as error:
        notes.append(f"{file}: damaged, read as far as it goes ({error})")
    if dropped:
        notes.append(f"{file}: {dropped >> 20} MiB in the middle were not read")
    yield from _numbered(_whole(io.BytesIO(b"".join(last)), held), 0)


# --- Matching -------------------------------------------------------------------------------------------------------

_HEADED = re.compile("|".join(re.escape(word) for word in _CRASH if word != _FRAMED).encode("ascii"), re.I)
_CRASHED = re.compile(_HEADED.pattern + rb'|file "[^"]+", line \d+(?:, in |\s*$)', re.I)
_RAISED = re.compile(r"^(?:[\w]+\.)*(?P<name>[A-Z]\w*|\w+\.error)(?:: (?P<message>.*)|)$")
# The same where nothing else says that an exception ends here.
_SURELY = re.compile(
    r"^(?:[\w]+\.)*(?P<name>(?:[A-Z]\w*)?(?:Error|Exception|Interrupt|Exit|Exhausted))(?::(?: (?P<message>.*))?)?$"
)
_FRAME = re.compile(r'^\s*(?P<word>File) "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<name>\S+)|$)')
_PACKAGE = re.compile(r".*(?:site|dist)-packages/")
_BENEATH = re.compile(
    r"^(?:requests|urllib3|httpx|httpcore|aiohttp|retrying|tenacity|backoff)/|/lib/python3[\d.]*/(?!site-|dist-)|^<"
)
_INSTALLED = re.compile(r"(?:site|dist)-packages/|/lib/python3|<frozen|<string>")
_AROUND = ("Traceback", "During handling of the above", "The above exception was")
# What stands above a traceback of something that the program went on after.
_HARMLESS = (
    "Exception ignored in",
    "Exception ignored on",
    "Error in atexit._run_exitfuncs",
    "--- Logging error ---",
)
_EDGE = re.compile(r"[ \t]+(?:\| )?(?=(?:traceback : )?Traceback)")  # of a traceback that torchrun or pip quotes
_INSIDE = " \t|+│╭╰─"  # what lines of a traceback begin with, also in a frame that Rich draws


class _View:
    """The lines of one block, freed of prefixes when they are asked for."""

    def __init__(self, data: bytes, number: int, file: str) -> None:
        self.data, self.file, self.number = data, file, number
        self.starts = _starts(data.replace(b"\r", b"\n").split(b"\n"))
        self.ends = [*(start - 1 for start in self.starts[1:]), len(data)]
        self.node, self.rank = named(file)
        self._bare: dict[int, Bare] = {}
        self._breaks: list[int] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, index: int) -> Bare:
        found = self._bare.get(index)
        if found is None:
            found = self._bare[index] = bare(self.raw(index).decode("utf-8", "replace"))
        return found

    def raw(self, index: int) -> bytes:
        return self.data[self.starts[index] : min(self.ends[index], self.starts[index] + LONG)]

    def line(self, index: int) -> Line:
        one = self.at(index)
        if self._breaks is None:
            self._breaks = [found.start() for found in re.finditer(b"\n", self.data)]
        number = self.number + bisect.bisect_left(self._breaks, self.starts[index]) if self.number else 0
        rank = self.rank if self.rank is not None else one.rank
        return Line(self.file, number, one.text[:2000], one.at, one.node or self.node, rank)

    def following(self, index: int, count: int) -> list[int]:
        """This line and the next ones of the same process, empty ones left out."""
        own = self.at(index)
        found = [index]
        for later in range(index + 1, min(len(self), index + 1 + APART)):
            if len(found) == count:
                break
            one = self.at(later)
            if one.text and (one.task == own.task or not one.task):
                found.append(later)
        return found


_FURTHER = re.compile(r"^\s*(?:NVRM: )?\s*")


def _window(view: _View, indices: Sequence[int], glue: str = " ") -> tuple[str, list[int]]:
    """Lines joined, and where each of them begins in the text."""
    text, starts = "", []
    for index in indices:
        part = view.at(index).text
        part = _FURTHER.sub("", part, count=1) if text else part
        text = text + glue if text else text
        starts.append(len(text))
        text += part
    return text, starts


def _try(view: _View, row: _Row, indices: Sequence[int], glue: str = " ") -> list[int] | None:
    text, starts = _window(view, indices, glue)
    found = row.pattern.search(text)
    if not found or (row.unless and row.unless.search(text)):
        return None
    low = bisect.bisect_right(starts, found.start()) - 1
    high = bisect.bisect_left(starts, max(found.end(), found.start() + 1)) - 1
    while low < high and row.pattern.search(text[starts[low + 1] : found.end()]):  # a line that adds nothing
        low += 1
    return list(indices[low : high + 1])


def _match(view: _View, row: _Row, index: int) -> list[int] | None:
    """Indices of the lines that the signature matches around this one; `_over_lines` where it is broken."""
    text = view.at(index).text
    if not row.pattern.search(text) or (row.unless and row.unless.search(text)):
        return None
    return [index]


def _over_lines(view: _View, row: _Row, index: int) -> list[int] | None:
    """The same over as many lines as the signature joins, or over lines that a terminal wrapped."""
    count = row.signature.joins
    if count > 1:
        glues = (" ", "\n") if "\\n" in row.signature.pattern else (" ",)
        for start in range(max(0, index - count + 1), index + 1):
            for glue in glues:
                found = _try(view, row, view.following(start, count), glue)
                if found:
                    return found
        return None
    for start in (index, index - 1):
        if start < 0 or start + 1 >= len(view) or len(view.at(start).text) < WRAPPED or view.at(start + 1).marked:
            continue
        last = start + 2
        while last < len(view) and last < start + 4 and len(view.at(last - 1).text) >= WRAPPED:
            last += 1
        for glue in (" ", ""):
            found = _try(view, row, range(start, min(last, len(view))), glue)
            if found:
                return found
    return None


def _crash(view: _View, index: int, order: int) -> tuple[Crash | None, int]:
    """The exception that ends the traceback that begins here, or goes on here after lines of others.

    And the line up to which there is nothing else to find; its own where the log may go on.
    """
    own = view.at(index)
    place, outside, inner = "", "", ""
    frame = _FRAME.match(own.text)
    raises = _SURELY if frame else _RAISED
    edge = own.text[: max(frame.start("word") - 2, 0)] if frame else (_EDGE.match(own.text) or [""])[0]
    code = False  # the line of code of a frame comes next, and nothing tells it from others: indentation was lost
    for later in range(index, min(len(view), index + CARRIED)):
        one = view.at(later)
        if one.task != own.task or not one.text:
            continue
        text = one.text[len(edge) :] if one.text.startswith(edge) else one.text
        frame = _FRAME.match(text)
        if frame:
            outside = f"{frame['file']}:{frame['line']}"
            within = _PACKAGE.sub("", frame["file"])
            inner = inner if _BENEATH.search(within) else f"{within} {frame['name'] or ''}"
            place = place if _INSTALLED.search(frame["file"]) else outside
            code = text.startswith("File")
            continue
        if not text.strip("^~ ") or text[0] in _INSIDE or text.startswith(_AROUND) or _BAR.search(text):
            continue
        if code and not _SURELY.match(text):
            code = False
            continue
        raised = raises.match(text) or _SURELY.match(text)
        if raised:
            lines = tuple(view.line(one) for one in ([index] if later == index else [index, later]))
            name = raised["name"].split(".")[-1]
            until = order + view.starts[later] - view.starts[index]
            message = (raised["message"] or "").strip()[:500]
            return Crash(name, message, place or outside, inner, lines, order, until), later
        if later > index and one.at is None:
            return None, later
        raises = _SURELY  # a logger's line came between
    return None, index + CARRIED // 2 if index + CARRIED < len(view) else index


class _Search:
    """One log being read."""

    def __init__(self, file: str, rows: Table) -> None:
        self.file, self.rows = file, rows
        self.hits: dict[tuple[str, str, int | None, str], list[Hit]] = {}
        self.seen: set[tuple[str, int]] = set()
        self.totals: dict[str, int] = {}
        self.tries: dict[str, int] = {}
        self.shapes: dict[bytes, _Shape] = {}
        self.breaks: dict[tuple[bytes, bytes], list[_Row]] = {}  # what may be broken between these two
        self.crashes: list[Crash] = []
        self.told: dict[str, int] = {}  # where the last traceback of each process ends
        self.offset = 0  # of the block in what was read of the file

    def block(self, data: bytes, number: int) -> None:
        lines = data.translate(_ZEROS).replace(b"\r", b"\n").split(b"\n")
        if len(self.shapes) > ALIKE:
            self.shapes.clear()
        if len(self.breaks) > ALIKE:
            self.breaks.clear()
        new = list(dict.fromkeys(line for line in lines if line not in self.shapes))
        for line, found in zip(new, self.rows.shapes(new)):  # noqa: B905
            self.shapes[line] = found
        reach = self.rows.reach
        ends = [
            (index, (line[-reach:], lines[index + 1][:reach]))
            for index, line in enumerate(lines[:-1])
            if len(line) >= WRAPPED
        ]
        fresh = list(dict.fromkeys(pair for _, pair in ends if pair not in self.breaks))
        for pair, rows in zip(fresh, self.rows.broken(fresh)):  # noqa: B905
            self.breaks[pair] = rows
        across = {index: self.breaks[pair] for index, pair in ends if self.breaks[pair]}
        view = None
        for index, line in enumerate(lines):
            shape = self.shapes[line]
            if shape.rows or shape.crash or index in across:
                view = view or _View(data, number, self.file)
                self.look(view, index, shape, across.get(index, ()))
        if any(row.unless for row in self._pending()):
            self.recover(view or _View(data, number, self.file))

    def _pending(self) -> list[_Row]:
        held = {key[0] for key, hits in self.hits.items() if hits}
        return [row for row in self.rows.rows if row.unless and row.signature.id in held]

    def look(self, view: _View, index: int, shape: _Shape, across: Iterable[_Row]) -> None:
        useless = []
        known = False
        for row in sorted([*shape.rows, *across], key=lambda row: row.signature.rank):
            name = row.signature.id
            if known and row.signature.rank:  # a line that is known needs no vague word
                continue
            if self.totals.get(name, 0) > 10000:  # it is known by now
                known = True
                continue
            found = _match(view, row, index)
            tried = self.tries.setdefault(name, 0)
            if not found and tried < WRAPS:
                self.tries[name] += 1
                found = _over_lines(view, row, index)
            if found:
                known = True
                self.add(view, row, found, self.offset + view.starts[found[0]])
                continue
            alone = row.signature.joins == 1 or tried >= WRAPS
            if alone and row.shape and not row.shape.search(view.at(index).text.translate(_NOUGHTS)):
                useless.append(name)
        if useless:
            shape.rows = [row for row in shape.rows if row.signature.id not in useless]
        if shape.crash and len(self.crashes) < 200 and _CRASHED.search(view.raw(index)):
            place = ("crash", self.offset + view.starts[index])
            one = view.at(index)
            frame = _FRAME.match(one.text)
            if place in self.seen or (frame and place[1] <= self.told.get(one.task, -1)):
                return
            if not frame and not _HEADED.search(view.raw(index)):
                return
            crash, last = _crash(view, index, place[1])
            if crash or frame:
                self.told[one.task] = max(self.told.get(one.task, -1), self.offset + view.starts[last])
            if crash:
                self.seen.add(place)
                self.crashes += [] if index and view.at(index - 1).text.startswith(_HARMLESS) else [crash]

    def add(self, view: _View, row: _Row, found: list[int], order: int) -> None:
        name = row.signature.id
        if (name, order) in self.seen:
            return
        self.seen.add((name, order))
        if len(self.seen) > 200000:
            self.seen.clear()
        self.totals[name] = self.totals.get(name, 0) + 1
        lines = tuple(view.line(index) for index in found)
        text, _ = _window(view, found)
        said = row.pattern.search(text)
        groups = said.groupdict() if said else {}
        if groups.get("node"):
            lines = tuple(replace(line, node=groups["node"]) for line in lines)
        if groups.get("rank"):
            lines = tuple(replace(line, rank=int(groups["rank"])) for line in lines)
        key = (name, lines[0].node, lines[0].rank, view.at(found[0]).task)
        held = self.hits.setdefault(key, [])
        hit = Hit(row.signature, lines, order, held[-1].count + 1 if held else 1)
        held[KEPT:] = [hit]

    def recover(self, view: _View) -> None:
        """Takes back hits that a later line of the same process undoes."""
        text = None
        for row in self._pending():
            if row.unless is None:
                continue
            if text is None:
                text = view.data.decode("latin-1")
            for found in list(row.unless.finditer(text))[-200:]:
                index = bisect.bisect_right(view.starts, found.start()) - 1
                one = view.line(index)
                for key, hits in self.hits.items():
                    if key[0] != row.signature.id:
                        continue
                    if key[2] is not None and one.rank is not None and key[2] != one.rank:
                        continue
                    if key[1] and one.node and key[1] != one.node:
                        continue
                    hits[:] = [hit for hit in hits if hit.order > self.offset + view.starts[index]]


def read(
    files: Sequence[str], signatures: tuple[Signature, ...], *, head: int = HEAD, tail: int = TAIL, start: int = 0
) -> Reading:
    """All that the signatures find in these logs, in the order of files and lines; `start` skips bytes of each."""
    whole = Reading()
    for file in files:
        notes: list[str] = []
        whole = joined(whole, _read(file, _blocks(file, notes, head, tail, start), signatures, notes))
    return whole


def _read(file: str, blocks: Iterable[_Block], signatures: tuple[Signature, ...], notes: list[str]) -> Reading:
    search = _Search(file, table(signatures))
    carried = b""
    read = total = 0
    try:
        for block in blocks:
            data = _plain(block.data)
            number = block.number - carried.count(b"\n") if block.number else 0
            search.offset = read - len(carried)
            search.block(carried + data, number)
            read += len(data)
            total += len(block.data)
            lines = (carried + data)[-LONG:].splitlines(keepends=True)[-CARRIED:]
            carried = b"".join(lines[1:])
    except DAMAGED as error:
        why = getattr(error, "strerror", None) or f"damaged, read as far as it goes ({error})"
        notes.append(f"{file}: {why}")
    hits = sorted((hit for held in search.hits.values() for hit in held), key=lambda hit: hit.order)
    return Reading(hits, search.crashes, notes, total)


def _plain(data: bytes) -> bytes:
    """Without colours and NUL."""
    if b"\x1b" in data:
        data = _ESCAPE.sub(b"", data)
    return data.replace(b"\x00", b" ") if b"\x00" in data else data


def read_stream(stream: IO[bytes], signatures: tuple[Signature, ...], *, file: str = "-") -> Reading:
    """The same of a stream, of which the first 8 and the last 64 MiB are kept; `file` only names it."""
    notes: list[str] = []
    return _read(file, _unfolded(file, stream, notes, HEAD, TAIL), signatures, notes)


def read_text(text: str, signatures: tuple[Signature, ...], *, file: str = "-") -> Reading:
    return _read(file, [_Block(text.encode("utf-8", "replace"), 1)], signatures, [])


def joined(one: Reading, other: Reading) -> Reading:
    """Two readings, the second after the first."""
    base = 1 + max([hit.order for hit in one.hits] + [crash.order for crash in one.crashes], default=-1)
    hits = [*one.hits, *(replace(hit, order=base + hit.order) for hit in other.hits)]
    crashes = [
        *one.crashes,
        *(replace(crash, order=base + crash.order, until=base + crash.until) for crash in other.crashes),
    ]
    return Reading(hits, crashes, [*one.notes, *other.notes], one.bytes + other.bytes)
