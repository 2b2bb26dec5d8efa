"""The door: YAML text to frozen dataclasses, every mistake pointed at; and YAML out again.

Reading is strict where YAML 1.1 surprises: `off`, `NO`, `04:00:00` and `022` stay text, `5e8` is a
number, and repeated keys, aliases, merge keys, tags and second documents are refused with their line.
A value is converted by the type of the field that receives it, so `torch: 2.10` stays "2.10".
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import stat
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from launcher.errors import Path, Problem, UserError

T = TypeVar("T")

MAX_BYTES = 1 << 20
MAX_DEPTH = 64

NULLS = frozenset(["", "~", "null", "Null", "NULL"])
TRUE, FALSE = frozenset(["true", "True", "TRUE"]), frozenset(["false", "False", "FALSE"])
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
LEADING_ZERO = re.compile(r"[-+]?0o?[0-9]+\Z")
NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)\Z", re.IGNORECASE)
MARKS = re.compile("[\ue000\ue001]")  # private use; around the names of variables that `{job: id}` stands for
FORBIDDEN = "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # by YAML 1.2; 2 ms to compile


class Matches:
    """Text limited to a pattern: Matches(r"[a-z]+", "lower-case letters")."""

    def __init__(self, pattern: str, says: str) -> None:
        self.pattern, self.says = pattern, says

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "pattern": f"^(?:{self.pattern})$"}


class Range:
    """A number from `low` to `high`, both included."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "minimum": self.low, "maximum": self.high}


class Help:
    """One line for the editor's tooltip and for `dslaunch schema`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core), "description": self.text}


# --- text to nodes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """Where something stands; lines and columns count from 1, as editors do."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Scalar:
    raw: str
    plain: bool
    mark: Mark
    written: Table | None = None  # what stands there, where `raw` was put in its place

    @property
    def empty(self) -> bool:
        return self.plain and self.raw in NULLS

    def value(self) -> Any:
        """What YAML 1.2 makes of it: 5e8 is a number, 022 and off are text."""
        if not self.plain:
            return self.raw
        if self.raw in NULLS:
            return None
        if self.raw in TRUE or self.raw in FALSE:
            return self.raw in TRUE
        if INTEGER.match(self.raw) and len(self.raw) < 400:  # Python refuses to read thousands of digits
            return int(self.raw)
        if NUMBER.match(self.raw) and not LEADING_ZERO.match(self.raw):
            return float(self.raw)
        return self.raw


@dataclass(frozen=True)
class Sequence:
    items: list[Node]
    mark: Mark


@dataclass(frozen=True)
class Table:
    entries: dict[str, Node]
    keys: dict[str, Mark]
    mark: Mark


Node = Union[Scalar, Sequence, Table]  # noqa: UP007 - read at run time on 3.10


def read_bytes(path: str) -> bytes:
    """The file's bytes, or standard input for "-"; never more than 1 MiB, never a device."""
    if path == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(Problem("standard input is larger than 1 MiB", where="<stdin>"))
        return data
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(Problem(f"cannot read {path}: {error.strerror}", where=path)) from None
    try:  # not os.fdopen yet, which a directory fails
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            kind = "a directory" if stat.S_ISDIR(info.st_mode) else "a device, pipe or socket"
            raise UserError(Problem(f"{path} is {kind}, not a file", where=path))
        if info.st_size > MAX_BYTES:
            raise UserError(Problem(f"{path} has {info.st_size:,} bytes; a job file has 1 MiB at most", where=path))
        file = os.fdopen(os.dup(descriptor), "rb")
    finally:
        os.close(descriptor)
    with file:
        data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:  # it grew, or is one of those that say 0
            raise UserError(Problem(f"{path} is larger than 1 MiB", where=path))
        return data


def decode(data: bytes, *, name: str) -> str:
    """UTF-8, with or without a byte order mark; anything else is named with its byte offset."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            Problem(
                "the file is UTF-16 (byte order mark at byte 0); dslaunch reads UTF-8",
                hint=f"iconv -f UTF-16 -t UTF-8 {name}",
                where=f"{name}:1:1",
            )
        )
    mark = b"\xef\xbb\xbf"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        what, at = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8", error.start
    else:
        at = data.find(b"\0")
        if at < 0:
            return text.removeprefix("\ufeff")
        what = f"byte {at} is NUL, which no text holds"
    before = data[:at].removeprefix(mark).decode("utf-8")
    place = f"{name}:{before.count(chr(10)) + 1}:{len(before.rpartition(chr(10))[2]) + 1}"
    raise UserError(Problem(what, hint="save the file as UTF-8", where=place))


def loader() -> Any:
    """libyaml's safe loader where PyYAML has it: the same, much faster."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str, *, name: str) -> Node:
    """One YAML document to nodes. Raises UserError with every structural mistake."""
    import yaml

    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=loader()):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax(error, text, name)) from None
    except yaml.YAMLError:  # a character YAML does not allow
        at = re.search(FORBIDDEN, text)
        line = text.count("\n", 0, at.start()) + 1 if at else 0
        column = len(text[: at.start()].rpartition("\n")[2]) + 1 if at else 0
        character = f"U+{ord(at[0]):04X}" if at else "a character"
        problem = Problem(f"not YAML: {character} may not stand in it", where=str(Mark(name, line, column)))
        raise UserError(problem) from None
    if builder.problems:
        raise UserError(*builder.problems)
    if builder.root is None:
        raise UserError(Problem("the file is empty", hint="dslaunch init writes one", where=f"{name}:1:1"))
    return builder.root


def _syntax(error: Any, text: str, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    if re.match(r"\s*\t", line):
        return Problem(
            f"tab at line {mark.line + 1}: YAML indents with spaces", hint=f"`{line.strip()}`", where=where
        )
    if opened := _never_closed(error, text, name):
        return opened
    context = f"{error.context}, " if error.context else ""
    return Problem(f"not YAML: {context}{error.problem}", hint=f"`{line.strip()}`" if line else "", where=where)


def _never_closed(error: Any, text: str, name: str) -> Problem | None:
    """A bracket or quote whose end the parser looked for as far as another line: it is the opening that helps."""
    opened, at, lines = error.context_mark, error.problem_mark, text.splitlines()
    within = ("flow sequence", "flow mapping", "quoted scalar")
    if not opened or not at or opened.line >= len(lines) or not str(error.context).endswith(within):
        return None
    line = lines[opened.line]
    if at.line == opened.line and at.column < len(line.rstrip()):  # a comma of this line, say
        return None
    sign = line[opened.column : opened.column + 1]
    end = {"[": "]", "{": "}"}.get(sign, sign)
    rest = lines[at.line] if at.line < len(lines) else ""
    behind = (rest if rest[at.column :].startswith(":") else rest[at.column :]).strip()  # `train:`, and not its colon
    problem = f"not YAML: `{sign}` opens here and nothing closes it"
    hint = f"`{end}` where it ends"
    if behind and end != sign:
        problem = f"not YAML: `{sign}` opens here and is not closed before line {at.line + 1}"
        hint = f"`{end}`, or a comma, before `{_short(behind)}`"
    return Problem(problem, hint=hint, where=str(Mark(name, opened.line + 1, opened.column + 1)))


class _Builder:
    """Events to nodes. Refuses while it builds, so that nothing is ever expanded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self.stack: list[tuple[Any, list[Scalar | None]]] = []  # container, and the key that waits
        self.documents = 0

    def refuse(self, message: str, mark: Mark, hint: str = "") -> None:
        self.problems.append(Problem(message, hint=hint, where=str(mark)))

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        mark = Mark(self.name, event.start_mark.line + 1, event.start_mark.column + 1)
        if kind == "DocumentStartEvent":
            self.documents += 1
            if self.documents == 2:
                self.refuse("a second document starts here; a job file is one document", mark)
        elif self.documents > 1:
            return
        elif kind == "AliasEvent":
            self.refuse(f"alias *{event.anchor}: aliases are not read", mark, "write the value where it is used")
            self.add(Scalar("", False, mark))
        elif kind == "ScalarEvent":
            self.check_tag(event, mark)
            if found := MARKS.search(event.value):
                self.refuse(f"U+{ord(found[0]):04X} may not stand in it", mark, "{job: id} reads what a job knows")
            self.add(Scalar(event.value, event.style in (None, ""), mark))
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self.check_tag(event, mark)
            if len(self.stack) >= MAX_DEPTH:
                raise UserError(*self.problems, Problem(f"nested more than {MAX_DEPTH} levels deep", where=str(mark)))
            container = Table({}, {}, mark) if kind[0] == "M" else Sequence([], mark)
            self.stack.append((container, [None]))
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            container, _ = self.stack.pop()
            self.add(container)

    def check_tag(self, event: Any, mark: Mark) -> None:
        if event.tag is not None:
            self.refuse(f"tag {event.tag}: tags are not read", mark, "remove it")
        if event.anchor is not None:
            self.refuse(f"anchor &{event.anchor}: anchors are not read", mark, "remove it")

    def add(self, node: Node) -> None:
        if not self.stack:
            self.root = node
            return
        container, waiting = self.stack[-1]
        if isinstance(container, Sequence):
            container.items.append(node)
        elif waiting[0] is None:
            if not isinstance(node, Scalar):
                self.refuse("a key must be plain text", node.mark)
                node = Scalar("", False, node.mark)
            waiting[0] = node
        else:
            key, waiting[0] = waiting[0], None
            if key.plain and key.raw == "<<":
                self.refuse("merge key <<: not read", key.mark, "write the keys where they are used")
            elif key.raw in container.entries:
                first = container.keys[key.raw]
                self.refuse(f"`{_short(key.raw)}` stands twice: first in line {first.line}", key.mark, "keep one")
            else:
                container.entries[key.raw] = node
                container.keys[key.raw] = key.mark


# --- nodes to nodes -----------------------------------------------------------------------------


def merge(under: Node, over: Node) -> Node:
    """`over` laid on top: tables key by key, anything else replaced; marks stay with their file."""
    if isinstance(under, Table) and isinstance(over, Table):
        entries, keys = dict(under.entries), {**under.keys, **over.keys}
        for key, node in over.entries.items():
            entries[key] = merge(entries[key], node) if key in entries else node
        return Table(entries, keys, over.mark)
    blank = isinstance(over, Scalar) and over.empty
    return under if blank and isinstance(under, Table) else over  # `slurm:` with nothing under it says nothing


def assignment(text: str) -> Node:
    """`--set train.steps=20` as the document {train: {steps: 20}}; the value is YAML."""
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise UserError(Problem(f"--set {text}: expected a.b=value", hint="for example --set train.steps=20"))
    mark = Mark(f"--set {path}")
    if _not_text(text):
        raise UserError(Problem("the value is not UTF-8", where=f"--set {ascii(path)[1:-1]}"))
    node = _remark(parse(value, name=str(mark)) if value.strip() else Scalar("", True, mark), mark)
    for key in reversed(parts):
        node = Table({key: node}, {key: mark}, mark)
    return node


def _remark(node: Node, mark: Mark) -> Node:
    if isinstance(node, Scalar):
        return Scalar(node.raw, node.plain, mark)
    if isinstance(node, Sequence):
        return Sequence([_remark(item, mark) for item in node.items], mark)
    return Table({k: _remark(v, mark) for k, v in node.entries.items()}, dict.fromkeys(node.keys, mark), mark)


@dataclass(frozen=True)
class Lookup:
    """What `{env: SCRATCH}` or `{path: data}` stand for, and what to say of one that is missing."""

    key: str
    values: Mapping[str, str]
    missing: str  # "the environment has no variable {}"
    hint: str
    secret: re.Pattern[str] | None = None
    only: Any = None  # the kind of field that takes it; absent: any
    other: Callable[[str], str | None] | None = None  # what names beside `values` stand for

    def find(self, name: str) -> str | None:
        found = self.values.get(name)
        return self.other(name) if found is None and self.other else found


def looked_up(node: Node, lookups: list[Lookup], problems: list[Problem], *, kind: Any) -> Node:
    """`{env: SCRATCH}` and `{env: SCRATCH, append: /runs}` replaced by text; nothing else expands.

    `kind` is what the node will be read as: where keys are the user's own, {env: prod} is a label.
    """
    if isinstance(node, Scalar):
        return node
    kinds = list(choices(kind))
    if isinstance(node, Sequence):
        item_kind = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return Sequence([looked_up(item, lookups, problems, kind=item_kind) for item in node.items], node.mark)
    known: dict[str, Any] = {}
    for section in reversed([kind for kind in kinds if is_dataclass(kind)]):
        known |= hints(section)  # type: ignore[arg-type]
    own = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), None)
    for lookup in lookups:
        key = lookup.key
        if lookup.only is not None and kind != lookup.only:
            continue
        if (
            own is None
            and key not in known
            and key in node.entries
            and set(node.entries) <= {key, "prepend", "append"}
        ):
            said = node.entries[key]
            if Any in kinds and key == "path" and not (isinstance(said, Scalar) and said.raw in lookup.values):
                continue  # hostPath: {path: /data} of somebody else's schema
            around = {
                side: looked_up(child, lookups, problems, kind=kind) if side != key else child
                for side, child in node.entries.items()
            }
            whole = Table(around, node.keys, node.mark)
            known_keys = {one.key for one in lookups}
            if any(isinstance(child, Table) and not known_keys & set(child.entries) for child in around.values()):
                return whole  # it holds another reference, which is not to be known yet
            return _replaced(whole, lookup, problems, asked=node)
    entries = {
        key: looked_up(child, lookups, problems, kind=own or known.get(key, Any))
        for key, child in node.entries.items()
    }
    return Table(entries, node.keys, node.mark)


def _replaced(node: Table, lookup: Lookup, problems: list[Problem], *, asked: Table) -> Scalar:
    none = Scalar("", False, node.mark)
    name, before, behind = (node.entries.get(key, none) for key in (lookup.key, "prepend", "append"))
    hint = ""
    value = lookup.find(name.raw) if isinstance(name, Scalar) else None
    if not isinstance(name, Scalar) or not isinstance(before, Scalar) or not isinstance(behind, Scalar) or name.empty:
        problem, hint = (
            f"{lookup.key} is one name, prepend and append are one text each",
            f"{{{lookup.key}: NAME, append: /runs}}",
        )
    elif lookup.secret and lookup.secret.fullmatch(name.raw):
        problem = f"{_short(name.raw)} looks like a secret, and this value is written to files"
        hint = f"secrets: {{{_short(name.raw)}: {{from_env: {_short(name.raw)}}}}}"
    elif value is None:
        problem, hint = lookup.missing.format(_short(name.raw)), lookup.hint.format(_short(name.raw))
    elif _not_text(value):
        problem = f"the variable {_short(name.raw)} is not UTF-8"
    elif lookup.only is None and (found := MARKS.search(value)):
        problem = f"U+{ord(found[0]):04X} may not stand in {_short(name.raw)}"
    else:
        text = "".join(["" if before.empty else before.raw, value, "" if behind.empty else behind.raw])
        # plain: a number stays a number
        return Scalar(text, text not in NULLS, node.mark, asked if MARKS.search(text) else None)
    problems.append(Problem(problem, hint=hint, where=str(name.mark)))
    return Scalar("", False, name.mark)  # what the reader says of this place is said already


def _not_text(value: str) -> bool:
    """Bytes that were no UTF-8 reach Python as lone surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in value)


def choices(kind: Any) -> Iterable[Any]:
    """The types behind Annotated and Union."""
    if get_origin(kind) is Annotated:
        yield from choices(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for choice in get_args(kind):
            yield from choices(choice)
    else:
        yield kind


def place(root: Node, at: Path) -> Mark:
    """The mark of a path into the document; of its deepest part that stands there."""
    node, mark = root, root.mark
    for part in at:
        if isinstance(node, Table) and str(part) in node.entries:
            mark = node.keys[str(part)]
            node = node.entries[str(part)]
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            mark = node.mark
        else:
            break
    return mark


def plain(node: Node) -> Any:
    """Nodes as dict, list and scalar, for sections that are passed on as they are."""
    if isinstance(node, Scalar) and node.written is not None:
        return plain(node.written)
    if isinstance(node, Scalar):
        return node.value()
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return {key: plain(child) for key, child in node.entries.items()}


# --- nodes to dataclasses -----------------------------------------------------------------------


class Advice:
    """What else a hint may say: the reader knows types, and not what people expect where. Empty: nothing."""

    def unknown(self, kind: type, key: str) -> str:
        """Where a key belongs that section `kind` has not."""
        return ""

    def instead(self, kind: Any, node: Node) -> str:
        """How a section or list is written that stands there as something else."""
        return ""

    def text(self, limit: Matches, text: str) -> str:
        """How a text is written that `limit` refuses."""
        return ""


def read(node: Node, kind: type[T], advice: Advice | None = None) -> T:
    """A frozen dataclass of type `kind`. Raises UserError with every mistake in the document."""
    reader = _Reader(advice or Advice())
    value = reader.read(node, kind)
    if reader.problems:
        raise UserError(*reader.problems)
    return value  # type: ignore[no-any-return]


@cache
def hints(kind: type) -> dict[str, Any]:
    """A section's types by key; its module evaluates annotations, which `typing` would take long over."""
    return {row.name: row.type for row in fields(kind)}


WRONG: Any = object()


class _Reader:
    def __init__(self, advice: Advice) -> None:
        self.advice = advice
        self.problems: list[Problem] = []

    def refuse(self, message: str, mark: Mark, hint: str = "") -> Any:
        self.problems.append(Problem(message, hint=hint, where=str(mark)))
        return WRONG

    def read(self, node: Node, kind: Any) -> Any:
        origin = get_origin(kind)
        if kind is Any:
            return self.anything(node)
        if origin is Annotated:
            base, *limits = get_args(kind)
            value = self.read(node, base)
            return value if value is WRONG else self.check(value, limits, node)
        if origin in (Union, types.UnionType):
            return self.union(node, get_args(kind))
        if is_dataclass(kind):
            return self.table(node, kind)
        if origin is dict:
            return self.mapping(node, *get_args(kind))
        if origin is tuple:
            return self.sequence(node, get_args(kind)[0])
        return self.scalar(node, kind)

    def anything(self, node: Node) -> Any:
        if isinstance(node, Sequence):
            return [self.anything(item) for item in node.items]
        if isinstance(node, Table):
            return {key: self.anything(child) for key, child in node.entries.items()}
        value = node.value()
        if isinstance(value, float) and not math.isfinite(value):
            return self.refuse(f"expected a finite number, found `{_short(node.raw)}`", node.mark)
        return value

    def union(self, node: Node, choices: tuple[Any, ...]) -> Any:
        if isinstance(node, Scalar) and node.empty and types.NoneType in choices:
            return None
        fitting = [choice for choice in choices if choice is not types.NoneType and _takes(choice, node)]
        if not fitting:
            hint = self.instead(choices, node)
            return self.refuse(f"expected {_say(choices)}, found {_seen(node)}", node.mark, hint)
        trials = []
        for choice in fitting:
            trial = _Reader(self.advice)
            value = trial.read(node, choice)
            if not trial.problems:
                return value
            trials.append(trial.problems)
        if len(fitting) == 1:
            better = self.instead([choice for choice in choices if choice is not fitting[0]], node)
            if better and all(problem.message.startswith("expected") for problem in trials[0]):
                return self.refuse(f"expected {_say(choices)}, found {_seen(node)}", node.mark, better)
            self.problems += trials[0]
            return WRONG
        found = [problem for trial in trials for problem in trial]
        specific = [problem for problem in found if not problem.message.startswith("expected")]
        if specific:  # "0 is out of range" says more than "expected a number or auto"
            self.problems.append(specific[0])
            return WRONG
        hint = next((problem.hint for problem in found if problem.hint), "")
        return self.refuse(f"expected {_say(choices)}, found {_seen(node)}", node.mark, hint)

    def instead(self, choices: Iterable[Any], node: Node) -> str:
        return next(filter(None, (self.advice.instead(choice, node) for choice in choices)), "")

    def unknown(self, key: str, kind: Any, known: Iterable[str]) -> str:
        return self.advice.unknown(kind, key) or suggest(key, known)

    def table(self, node: Node, kind: Any) -> Any:
        if not isinstance(node, Table):
            if isinstance(node, Scalar) and node.empty:  # `train:` with nothing under it
                node = Table({}, {}, node.mark)
            else:
                hint = self.advice.instead(kind, node)
                return self.refuse(f"expected a section with keys, found {_seen(node)}", node.mark, hint)
        known = {field.name: field for field in fields(kind)}
        values: dict[str, Any] = {}
        for key, child in node.entries.items():
            if key in known:
                field = known[key]
                optional = field.default is not MISSING or field.default_factory is not MISSING
                if isinstance(child, Scalar) and child.empty and optional:
                    if not child.raw and _one_value(hints(kind)[key]):  # a forgotten one, or $N of a shell
                        self.refuse(f"`{key}` has no value", node.keys[key], _blank_hint(key, field.default))
                    continue  # `train:`, and `steps: null`: the default
                values[key] = self.read(child, hints(kind)[key])
            else:
                self.refuse(f"unknown key `{_short(key)}`", node.keys[key], self.unknown(key, kind, known))
        for name, field in known.items():
            if name not in node.entries and field.default is MISSING and field.default_factory is MISSING:
                self.refuse(f"`{name}` is missing", node.mark, f"add `{name}:` here")
                values[name] = WRONG
        return WRONG if any(value is WRONG for value in values.values()) else kind(**values)

    def mapping(self, node: Node, key_kind: Any, kind: Any) -> Any:
        if isinstance(node, Scalar) and node.empty:
            return {}
        if not isinstance(node, Table):
            return self.refuse(f"expected keys with values, found {_seen(node)}", node.mark)
        result = {}
        for key, child in node.entries.items():
            name = self.read(Scalar(key, False, node.keys[key]), key_kind)
            value = self.read(child, kind)
            result[key] = WRONG if name is WRONG else value
        return WRONG if any(value is WRONG for value in result.values()) else result

    def sequence(self, node: Node, kind: Any) -> Any:
        if isinstance(node, Scalar) and node.empty:
            return ()
        if not isinstance(node, Sequence):
            hint = self.advice.instead(tuple[kind, ...], node) or "write [a, b] or - a"
            return self.refuse(f"expected a list, found {_seen(node)}", node.mark, hint)
        items = [self.read(item, kind) for item in node.items]
        return WRONG if any(item is WRONG for item in items) else tuple(items)

    def scalar(self, node: Node, kind: Any) -> Any:
        if not isinstance(node, Scalar):
            return self.refuse(f"expected {_say((kind,))}, found {_seen(node)}", node.mark)
        raw = node.raw
        if get_origin(kind) is Literal:
            options = [str(option) for option in get_args(kind)]
            if raw in options:
                return get_args(kind)[options.index(raw)]
            return self.refuse(f"expected {_say((kind,))}, found `{_short(raw)}`", node.mark, suggest(raw, options))
        if node.empty:
            return self.refuse(f"expected {_say((kind,))}, found nothing", node.mark)
        if kind is str:
            return raw
        value = node.value()
        if kind is bool:
            if isinstance(value, bool):
                return value
            hint = "write true or false" + (", without quotes" if not node.plain else "")
            return self.refuse(f"expected true or false, found `{_short(raw)}`", node.mark, hint)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if kind is float:
                value = float(value)
                if math.isfinite(value):
                    return value
                return self.refuse(f"expected a finite number, found `{_short(raw)}`", node.mark)
            if abs(value) < 2**63 and int(value) == value:  # 5e8 is a fine bucket size
                return int(value)
            below = "" if abs(value) < 2**63 else " below 2^63"
            return self.refuse(f"expected a whole number{below}, found `{_short(raw)}`", node.mark)
        return self.refuse(f"expected {_say((kind,))}, found `{_short(raw)}`", node.mark, _number_hint(node))

    def check(self, value: Any, limits: Iterable[Any], node: Node) -> Any:
        for limit in limits:
            if isinstance(limit, Matches) and not limit.regex.fullmatch(value):
                hint = _expansion_hint(value) or self.advice.text(limit, value)
                return self.refuse(f"`{_short(value)}` is not {limit.says}", node.mark, hint)
            if isinstance(limit, Range) and not limit.low <= value <= limit.high:
                return self.refuse(f"{value} is not between {limit.low:,} and {limit.high:,}", node.mark)
        return value


def _expansion_hint(text: str) -> str:
    """~/x and $SCRATCH/x, where nothing is expanded, as what reads the variable."""
    found = re.fullmatch(r"(?:~|\$\{?(\w+)\}?)(/[^\x00-\x1f]*)?", text)
    if not found:
        return ""
    tail = f", append: {found[2]}" if found[2] else ""
    return f"{{env: {found[1] or 'HOME'}{tail}}}"


def _number_hint(node: Scalar) -> str:
    raw = node.raw
    if not node.plain and NUMBER.match(raw):
        return f"write {raw} without quotes"
    if LEADING_ZERO.match(raw):
        return f"write {raw.lower().replace('0o', '').lstrip('0') or '0'}: a leading zero means octal to some"
    if re.fullmatch(r"[-+]?[0-9][0-9_,]*", raw):
        return f"write {raw.replace('_', '').replace(',', '')}"
    if NOT_FINITE.match(raw):
        return "a finite number is needed"
    if re.fullmatch(r"0x[0-9a-fA-F]+", raw):
        return f"write {int(raw, 16)}"
    return ""


def _takes(kind: Any, node: Node) -> bool:
    """Whether a node of this sort can become `kind` at all: a table a section, a scalar text."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _takes(get_args(kind)[0], node)
    if kind is Any:
        return True
    if is_dataclass(kind) or origin is dict:
        return isinstance(node, Table)
    if origin is tuple:
        return isinstance(node, Sequence)
    return isinstance(node, Scalar)


def _one_value(kind: Any) -> bool:
    """Whether it is one text or number, and no section or list, which may well be empty."""
    return not any(one is Any or is_dataclass(one) or get_origin(one) in (dict, tuple) for one in choices(kind))


def _blank_hint(key: str, default: Any) -> str:
    if default is None:
        return f"leave the line out, or `{key}: null`, which takes back what a site file says"
    return f"leave the line out for the default, {scalar(default)}" if default is not MISSING else ""


def _say(kinds: Iterable[Any]) -> str:
    words: list[str] = []
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Annotated:
            words.append(_say(get_args(kind)[:1]))
        elif origin is Literal:
            words += [str(option) for option in get_args(kind)]
        elif is_dataclass(kind) or origin is dict:
            words.append("a section with keys")
        elif origin is tuple:
            words.append("a list")
        elif kind is not types.NoneType:
            words.append({int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text"))
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def _seen(node: Node) -> str:
    if isinstance(node, Scalar):
        return "nothing" if node.empty else f"`{_short(node.raw)}`"
    return "a list" if isinstance(node, Sequence) else "a section with keys"


def _short(text: Any) -> str:
    """Fit for a terminal: what is no printable character, and a turn of the direction of writing, is escaped."""
    text = str(text)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "".join(one if one.isprintable() and one != "\\" else ascii(one)[1:-1] for one in text)


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a slip of a letter or two; otherwise what there is."""
    known = list(known)
    alike = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word[:100].lower().replace("-", "_"), alike, n=1, cutoff=0.75)
    if close:
        return f"did you mean `{alike[close[0]]}`?"
    return f"known here: {', '.join(known)}" if len(known) <= 40 else ""


# --- out ------------------------------------------------------------------------------------------

# Text that some YAML reader (1.1, 1.2 or Kubernetes' own) takes for something else is quoted: only
# words that begin with a letter, hold no odd character and are no boolean, null or number anywhere.
BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*\Z")
NEVER_BARE = re.compile(r"(y|n|yes|no|on|off|true|false|null|~|nan|inf|infinity|[0-9.eE+-]+)\Z", re.IGNORECASE)
# The same where a field's type says that it is text: 2:00:00 and 1e-5 mean nothing else there.
TYPED = re.compile(r"-{0,2}[A-Za-z0-9_./+][A-Za-z0-9_./:+@%=-]*(?<!:)\Z")
NEVER_TYPED = re.compile(r"(y|n|yes|no|on|off|true|false|null|nan|inf|infinity|\.\.\.)\Z", re.IGNORECASE)


class Untyped(str):
    """Text inside typed fields where no field says that it is text."""

    __slots__ = ()


def bare(text: str) -> bool:
    return bool(BARE.match(text)) and not NEVER_BARE.match(text)


def flow(value: Any, *, typed: bool = False) -> str:
    """One line: [1, a, "yes"]."""
    if isinstance(value, Mapping):
        rows = (f"{key(name)}: {flow(child, typed=typed)}" for name, child in value.items())
        return "{" + ", ".join(rows) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(child, typed=typed) for child in value) + "]"
    return scalar(value, typed=typed)


def key(name: Any) -> str:
    """A key is text wherever it is read; `on` is one of services."""
    return name if isinstance(name, str) and name.isidentifier() else scalar(name, typed=True)


def scalar(value: Any, *, typed: bool = False) -> str:
    """12 as 12, "a b" in quotes, "on" in quotes; "1e-5" in quotes unless `typed`."""
    if not isinstance(value, str):
        return json.dumps(value)
    if typed and not isinstance(value, Untyped):
        plain = TYPED.match(value) and not NEVER_TYPED.match(value)
    else:
        plain = bare(value) and " " not in value  # [bash, -c, a b] would be misread by people
    if plain:
        return str(value)
    if '"' in value and value.isascii() and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    # JSON halves what YAML has in one
    return '"' + "".join(f"\\U{ord(one):08x}" if one > "\uffff" else json.dumps(one)[1:-1] for one in value) + '"'


def dump(documents: Iterable[Any]) -> str:
    """Documents as YAML that every reader understands the same way; multi-line text in blocks."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        # a block where both dumpers write the same bytes
        body = value.endswith("\n") and not value.endswith("\n\n") and value != "\n"
        if body and value.replace("\n", "").isprintable() and (value.isascii() or max(value) < "\U00010000"):
            style = "|"
        elif bare(value):
            style = None
        else:
            style = '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return "".join(
        "---\n" + yaml.dump(d, Dumper=Dumper, sort_keys=False, width=10**6, allow_unicode=True) for d in documents
    )


def load_tables(path: FilePath) -> dict[str, Any]:
    """One of our own data files as plain values; a mistake in it is a bug."""
    node = parse(path.read_text(encoding="utf-8"), name=path.name)
    return plain(node)  # type: ignore[no-any-return]
