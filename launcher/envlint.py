"""Variables of NCCL, torch and libfabric, judged: what nobody reads, what hurts, what takes the fabric away."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from launcher import facts, yamldoc


@dataclass(frozen=True)
class Assignment:
    """One NAME=VALUE and where it stands; the value is None where only running the script would tell."""

    name: str
    value: str | None
    line: int = 0
    column: int = 0
    expanded: bool = False  # a shell has replaced ~ in it
    kept: str | None = None  # what Slurm leaves of a value with commas
    pod: bool = False  # with a network of its own: the manifest says what its interfaces are called
    used: bool = False  # the program beside it reads it

    @property
    def text(self) -> str:
        if self.value is None:
            return self.name
        return f"{self.name}={self.value if len(self.value) <= 60 else self.value[:57] + '...'}"


@dataclass(frozen=True)
class Finding:
    rule: str
    message: str
    at: Assignment
    fix: str = ""

    @property
    def severity(self) -> str:
        return str(rules()[self.rule]["severity"])


@cache
def rules() -> dict[str, dict[str, Any]]:
    return yamldoc.load_tables(facts.DATA / "envrules.yaml")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """`variables` that NCCL reads, `others` in its style that it does not, `prefixes` of plugins."""
    return yamldoc.load_tables(facts.DATA / "nccl.yaml")


def judge(
    assignments: Iterable[Assignment],
    *,
    fabric: facts.Fabric | None = None,
    gpu: facts.Gpu | None = None,
    given: Mapping[str, str] | None = None,
    zero: bool = True,
) -> list[Finding]:
    """Findings in the order of the assignments. `given` is what stands beside them and is not judged; `zero` is
    whether what trains may shard with ZeRO.
    """
    rows = list(assignments)
    emitted = {name: value for name, (value, _) in fabric.emits(gpu).items()} if fabric else {}
    if "NCCL_SOCKET_IFNAME" in emitted:  # gloo may use the interface that the fabric has for NCCL
        emitted.setdefault("GLOO_SOCKET_IFNAME", emitted["NCCL_SOCKET_IFNAME"])
    found = []
    for one in rows:
        if one.kept is not None:
            message = f"{one.text}: Slurm ends it at the comma, and {one.kept or 'nothing'} is what arrives"
            found.append(Finding("ENV036", message, one))
        found += list(_name(one))
        if emitted.get(one.name) == one.value:
            continue  # the fabric's own row says so
        found += list(_value(one))
        on_fabric = list(_on_fabric(one, fabric)) if fabric else []
        found += on_fabric or list(_matched(one, zero=zero))
    theirs = {one.name: one for one in rows}  # the last of a name holds
    last = {**{name: Assignment(name, value) for name, value in (given or {}).items()}, **theirs}
    for rule, message, about in _together(last):
        at = next((theirs[name] for name in about if name in theirs), None)
        found += [Finding(rule, message, at)] if at else []
    order = {id(one): index for index, one in enumerate(rows)}
    return sorted(found, key=lambda finding: order.get(id(finding.at), len(order)))


# --- names ----------------------------------------------------------------------------------------

OURS = re.compile(r"(TORCH_)?NCCL_|TORCH_FR_", re.IGNORECASE)


def _name(one: Assignment) -> Iterator[Finding]:
    name = one.name
    if not OURS.match(name):
        head, _, rest = name.partition("_")
        if head not in ("NCCL", "RCCL", "CCL") and difflib.SequenceMatcher(None, head, "NCCL").ratio() >= 0.75:
            meant = f"NCCL_{rest}"
            if meant in catalogue()["variables"]:
                yield Finding("ENV001", f"{one.text}: nobody reads {name}", one, f"did you mean {meant}?")
        return
    known, others = catalogue()["variables"], catalogue()["others"]
    if name in known:
        row = known[name]
        status, note = row.get("status"), row.get("note", "")
        if status == "removed":
            yield Finding("ENV002", f"{one.text}: removed in NCCL {row['until']}; {note or 'it has no effect'}", one)
        elif status == "deprecated":
            yield Finding(
                "ENV003", f"{one.text}: deprecated since NCCL {row['until']}; {note}", one, row.get("instead", "")
            )
    elif name in others:
        yield from _read_by_others(one, others[name])
    elif not any(name.startswith(prefix) for prefix in catalogue()["prefixes"]):
        bare = name.removeprefix("TORCH_")
        if name.startswith("TORCH_") and bare in known:
            yield Finding("ENV005", f"{one.text}: torch has no such variable; NCCL reads {bare}", one, bare)
        elif not one.used:
            everything = [*known, *(other for other, row in others.items() if row["reader"] != "nobody")]
            close = difflib.get_close_matches(name.upper(), everything, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else ""
            yield Finding("ENV001", f"{one.text}: nobody reads {name}", one, hint)


def _read_by_others(one: Assignment, row: Mapping[str, str]) -> Iterator[Finding]:
    instead = row.get("instead", "")
    if row["reader"] == "nobody":
        says = f"{instead} is the name" if instead else row["note"]
        yield Finding("ENV001", f"{one.text}: nobody reads {one.name}; {says}", one, instead or row["fix"])
    elif row["reader"] == "torch" and one.name.startswith("NCCL_"):
        message = f"{one.text}: NCCL does not read it, and torch reads {instead}; this is its old name"
        yield Finding("ENV004", message, one, f"{instead}={one.value}" if one.value is not None else instead)
    elif instead:
        yield Finding("ENV003", f"{one.text}: torch's old name of {instead}", one, instead)


# --- values ---------------------------------------------------------------------------------------

WHOLE = re.compile(r"[+-]?(0x[0-9a-f]+|[0-9]+)", re.IGNORECASE)
TIMEOUT = "NCCL_IB_TIMEOUT"


def whole(value: str | None) -> int | None:
    """whole("4") is 4, whole("0x10") 16; None for what C does not read as a number. Nothing is past 10^9."""
    text = (value or "").strip()
    if not text.isascii() or not WHOLE.fullmatch(text):
        return None
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    base = 16 if digits[:2].lower() == "0x" else 10
    return sign * int(digits[:12], base) if len(digits) <= 12 else sign * 10**12


def _value(one: Assignment) -> Iterator[Finding]:
    if one.value is None or not one.name.startswith("NCCL_"):
        return
    row = catalogue()["variables"].get(one.name)
    if row is None or row.get("status") == "removed":
        return
    kind, number = row["kind"], whole(one.value)
    if kind in ("int", "bool") and one.value.strip() and number is None:
        wants = "0 or 1" if kind == "bool" else "a whole number"
        yield Finding("ENV006", f"{one.text}: NCCL reads {wants} and takes its default for anything else", one, wants)
    elif one.name == TIMEOUT and number is not None and not 0 < number < 32:
        message = f"{one.text}: 0, 32 and more means for ever: a dead link hangs instead of failing"
        yield Finding("ENV008", message, one)
    elif number is not None and kind in ("int", "bool"):
        least, most = (0, 1) if kind == "bool" else (row.get("least"), row.get("most"))
        standard = str(row["default"]) == one.value or number in (-1, -2)  # what stands for "not set"
        if not standard and ((least is not None and number < least) or (most is not None and number > most)):
            span = f"{least} to {most}" if most is not None else f"{least} or more"
            yield Finding("ENV007", f"{one.text}: the range is {span}", one, span)
    elif kind in ("enum", "list") and row.get("words"):
        known = {word.lower() for word in row["words"]}
        odd = [word for word in _words(one.value) if word.lower() not in known]
        if kind == "enum" and number is not None and one.name.endswith("_LEVEL"):
            return  # an old number: ENV018
        if odd:
            hint = yamldoc.suggest(odd[0], row["words"])
            yield Finding("ENV006", f"{one.text}: {odd[0][:60]} is none of {', '.join(row['words'])}", one, hint)


def _words(value: str) -> list[str]:
    """_words("allreduce:tree,ring;broadcast:^ll") is [tree, ring, ll]."""
    parts = [part.rpartition(":")[2] for part in value.split(";")]
    return [word.strip().lstrip("^=") for part in parts for word in part.split(",") if word.strip("^= ")]


def _on_fabric(one: Assignment, fabric: facts.Fabric) -> Iterator[Finding]:
    for table, rule in ((fabric.breaks, "ENV010"), (fabric.never, "ENV012")):
        for key, why in table.items():
            name, given, value = key.partition("=")
            if name == one.name and (not given or _same(one.value, value)):
                yield Finding(rule, f"{one.text}: {why}", one)
                return


def _same(value: str | None, other: str) -> bool:
    return value is not None and value.strip().lower() == other.lower()


def _matched(one: Assignment, *, zero: bool) -> Iterator[Finding]:
    spoken = set()
    for rule, row in _matches().get(one.name, ()):
        pattern = row.get("value")
        fits = pattern is None or (one.value is not None and re.fullmatch(pattern, one.value.strip(), re.IGNORECASE))
        elsewhere = (one.pod and row.get("host")) or (row.get("zero") and not zero)
        if fits and rule not in spoken and not elsewhere:
            spoken.add(rule)
            yield Finding(rule, f"{one.text}: {row['says']}", one, row.get("fix", ""))


@cache
def _matches() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    table: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for rule, row in rules().items():
        for match in row.get("match", ()):
            for name in match["names"]:
                table.setdefault(name, []).append((rule, match))
    return table


def _together(rows: Mapping[str, Assignment]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What variables do to each other, and what no pattern says: rule, message, the variables it is about."""
    numbers = {name: whole(one.value) for name, one in rows.items()}

    def text(name: str) -> str:
        return rows[name].text

    threads, sockets = "NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD"
    product = (numbers.get(threads) or 0) * (numbers.get(sockets) or 0)
    if product > 64:
        message = f"{text(threads)} x {text(sockets)} is {product} sockets, and NCCL allows 64"
        yield "ENV024", message, (sockets, threads)
    log = rows.get("NCCL_DEBUG_FILE")
    if log and log.value:
        if log.value.startswith("~") and not log.expanded:
            yield "ENV025", f"{log.text}: NCCL does not expand ~", (log.name,)
        elif "/" in log.value and "/dev/" not in log.value and "%" not in log.value:
            yield "ENV026", f"{log.text}: every rank writes into the same file", (log.name,)
    blocking, handling = "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if numbers.get(blocking) and numbers.get(handling):
        message = f"{text(blocking)} beside {text(handling)}: torch blocks, and no watchdog"
        yield "ENV027", message, (blocking, handling)
    buffer = "TORCH_FR_BUFFER_SIZE" if "TORCH_FR_BUFFER_SIZE" in rows else "TORCH_NCCL_TRACE_BUFFER_SIZE"
    if numbers.get(buffer) == 0 and numbers.get("TORCH_NCCL_DUMP_ON_TIMEOUT"):
        message = f"{text(buffer)}: there is nothing to dump on a time-out"
        yield "ENV028", message, (buffer, "TORCH_NCCL_DUMP_ON_TIMEOUT")
    if numbers.get("NCCL_MNNVL_ENABLE") == 1 and numbers.get("NCCL_CUMEM_ENABLE") == 0:
        message = f"{text('NCCL_CUMEM_ENABLE')}: NCCL_MNNVL_ENABLE=1 needs cuMem"
        yield "ENV031", message, ("NCCL_CUMEM_ENABLE", "NCCL_MNNVL_ENABLE")
    interface = rows.get("NCCL_SOCKET_IFNAME")
    # a pod's own name is its address in /etc/hosts, so gloo finds it there by itself
    own = interface is not None and interface.pod
    if interface and interface.value and "GLOO_SOCKET_IFNAME" not in rows and interface.value[0] != "^" and not own:
        message = f"{interface.text}: gloo does not read it, and GLOO_SOCKET_IFNAME is not set"
        yield "ENV032", message, (interface.name,)


# --- reading --------------------------------------------------------------------------------------

NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""["']([A-Z][A-Z0-9_]{2,})["']\s*(?:\]\s*=|[:,=])\s*(?:str\()?["']?([^"',)\]}\n]*)""")
YAML_PAIR = re.compile(
    r"""(?:^|[\s{,])["']?([A-Z][A-Z0-9_]{2,})["']?\s*:\s+("[^"]*"|'[^']*'|(?:\$\{[^}\n]*\}|[^,}#\n])+)"""
)
YAML_NAMED = re.compile(r"""name:\s*["']?([A-Z][A-Z0-9_]{2,})["']?\s*[,\n]\s*value:\s*("[^"]*"|'[^']*'|[^,}#\n]+)""")
TALK = {"echo", "printf", "grep", "[", "[[", "test", "case", "log", "info", "print"}  # their words are no assignments


def read(text: str, *, name: str) -> list[Assignment]:
    """Every assignment in a shell script, a K=V file, YAML, JSON or Python; what it cannot read it leaves out."""
    lower = name.lower()
    if lower.endswith((".py", ".json", ".ipynb")):
        return [Assignment(m[1], m[2].strip(), *_place(text, m.start(1))) for m in QUOTED.finditer(text)]
    if lower.endswith((".yaml", ".yml")):
        return _yaml(text)
    runs = lower.endswith((".sh", ".bash", ".sbatch", ".slurm", ".job", ".zsh")) or text.startswith("#!")
    return _shell(text, expands=runs)


def _place(text: str, at: int) -> tuple[int, int]:
    start = text.rfind("\n", 0, at)
    return text.count("\n", 0, at) + 1, at - start


def _yaml(text: str) -> list[Assignment]:
    """`env:` of a job file, `env` of a pod, and scripts in blocks."""
    found: dict[tuple[int, int], Assignment] = {}
    for pattern in (YAML_PAIR, YAML_NAMED):
        for m in pattern.finditer(re.sub(r"(?m)^\s*#.*$", lambda m: " " * len(m[0]), text)):
            value = m[2].strip()
            if value[:1] in ('"', "'"):
                value = value[1:-1]
            line, column = _place(text, m.start(1))
            found[line, column] = Assignment(m[1], _filled(value), line, column)
    for number, row in enumerate(text.splitlines(), 1):
        if "=" in row and not row.lstrip().startswith("#"):
            for one in _shell(row.replace('"', " ") if row.count('"') % 2 else row, expands=True):
                if one.name.isupper() and (number, one.column) not in found:
                    found[number, one.column] = Assignment(one.name, one.value, number, one.column, one.expanded)
    return [found[key] for key in sorted(found)]


@dataclass
class _Word:
    text: str = ""
    line: int = 0
    column: int = 0
    unknown: bool = False  # holds $ or a backtick
    tilde: bool = False  # begins a value with ~ outside quotes
    raw: str = ""


def _shell(text: str, *, expands: bool) -> list[Assignment]:
    found: list[Assignment] = []
    for words in _statements(text):
        command = next((w.text for w in words if not NAME.fullmatch(w.text)), "")
        if command == "unset":
            gone = {word.text for word in words}
            found = [one for one in found if one.name not in gone]
            continue
        lists = not any(w.text in WHOLE_VALUES for w in words)
        for at, (before, word) in enumerate(zip([_Word(), *words], words, strict=False), 1):
            if command in TALK and word.text == command:
                break
            found += _assigned(word, before.text, expands=expands, lists=lists)
            if before.text in PAIRS and not NAME.fullmatch(word.text):
                after = words[at] if at < len(words) else None
                if after is not None:
                    value = _filled(after.text) if after.unknown else after.text
                    found.append(Assignment(word.text, value, word.line, word.column, expands))
    rows = text.split("\n")
    return [replace(one, column=_column(rows[one.line - 1], one)) for one in found]


def _column(row: str, one: Assignment) -> int:
    """Where the name itself stands, in a word that may begin with --export=ALL,"""
    m = re.compile(rf"(?:(?<![A-Za-z0-9_])|(?<=-[exv])){one.name}(?![A-Za-z0-9_])").search(
        row, max(one.column - 1, 0)
    )
    return m.start() + 1 if m else one.column


PAIRS = {"setenv", "ENV", "-genv", "-env"}  # the name and the value are two words: csh, Docker, MPICH
WHOLE_VALUES = {
    "docker",
    "podman",
    "podman-hpc",
    "nerdctl",
    "kubectl",
    "shifter",
    "flux",
}  # --env A=1,B=2 is one variable
FLAG = re.compile(r"--?[A-Za-z][\w-]*=(?=(?:[A-Z0-9_]+,)*[\"']?[A-Za-z_]\w*=)|-[exv](?=[A-Z]\w*=)")
DEFAULT = re.compile(r"\$\{\w+:?[-=]([^${}`]*)\}")
GIVEN = re.compile(r"\$\{([A-Za-z_]\w*):?=")


def _assigned(word: _Word, before: str, *, expands: bool, lists: bool) -> list[Assignment]:
    """The assignments in a word: A=B, --export=ALL,A=B,C=D, --env=A=B, -eA=B, ${A:=B}."""
    m = FLAG.match(word.text)
    option, rest = (m[0].rstrip("="), word.text[m.end() :]) if m else (before, word.text)
    pieces: list[tuple[str, str | None]] = [(rest, None)]
    if option == "--export":
        pieces = _exported(rest)
    elif option == "--env" and lists:  # Singularity and Apptainer; a comma before no A= belongs to the value
        pieces = [(piece, None) for piece in re.split(r",(?=[A-Za-z_]\w*=)", rest)]
    found = []
    for piece, kept in pieces:
        if m := NAME.fullmatch(piece):
            value = None if m[2] else _filled(m[3]) if word.unknown else m[3]
            found.append(Assignment(m[1], value, word.line, word.column, expands and word.tilde, kept))
    if word.unknown:
        own = {one.name for one in found}
        for m in GIVEN.finditer(word.text):
            if m[1] not in own:
                value = _filled(word.text[m.start() : _expansion(word.text, m.start())])
                found.append(Assignment(m[1], value, word.line, word.column, expands))
    return found


def _exported(text: str) -> list[tuple[str, str | None]]:
    """ALL,A=1,B=x,y is A=1 and B=x,y as it is meant, of which Slurm keeps x; '"B=x,y"' is whole."""
    pieces: list[tuple[str, str | None]] = []
    for part in re.findall(r"""(?:'[^']*'|"[^"]*"|[^,])+""", text):
        bare = re.sub(r"""(^|=)(["'])(.*)\2$""", r"\1\3", part, flags=re.DOTALL)
        last = NAME.fullmatch(pieces[-1][0]) if pieces else None
        words = catalogue()["variables"].get(last[1], {}).get("words", ()) if last else ()
        if last and not NAME.fullmatch(bare) and (bare in words or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", bare)):
            whole, kept = pieces[-1]
            pieces[-1] = f"{whole},{bare}", last[3] if kept is None else kept
        else:
            pieces.append((bare, None))
    return pieces


def _filled(value: str) -> str | None:
    """_filled("${NCCL_DEBUG:-INFO}") is INFO; None where only running the script would tell."""
    for _ in range(4):  # ${A:-${B:-x}}
        value, changed = DEFAULT.subn(lambda m: re.sub(r"""^(["'])(.*)\1$""", r"\2", m[1]), value)
        if not changed:
            break
    return None if re.search(r"[$`]", value) else value


def _statements(text: str) -> Iterator[list[_Word]]:
    """Words of a shell script, statement by statement. Quotes that nobody closes end with their line."""
    words: list[_Word] = []
    word: _Word | None = None
    at, line, start = 0, 1, 0

    def begun() -> _Word:
        nonlocal word
        if word is None:
            word = _Word(line=line, column=at - start + 1)
        return word

    while at < len(text):
        c = text[at]
        if c in " \t\r\n;&|()<>":
            if word is not None:
                words.append(word)
                word = None
            if c in "\n;&|()" and words:
                yield words
                words = []
            at += 1
            if c == "\n":
                line, start = line + 1, at
            continue
        if c == "#" and word is None:
            if text[at : at + 7] in ("#SBATCH", "#SBATCH\t"):
                at += 7
                continue
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        if c == "\\" and at + 1 < len(text):
            if text[at + 1] == "\n":
                at += 2
                line, start = line + 1, at
            else:
                begun().text += text[at + 1]
                at += 2
            continue
        if c in "'\"":
            close = _closing(text, at)
            piece = text[at + 1 : close]
            one = begun()
            if c == '"':
                one.unknown |= bool(re.search(r"(?<!\\)[$`]", piece))
                piece = re.sub(r'\\(["\\$`])', r"\1", piece).replace("\\\n", "")
            one.text += piece
            line += text.count("\n", at, close)
            start = max(start, text.rfind("\n", 0, close) + 1)
            at = close + 1 if text[close : close + 1] == c else close
            continue
        one = begun()
        if c in "$`":
            end = _expansion(text, at)
            one.unknown = True
            one.text += text[at:end]
            line += text.count("\n", at, end)
            start = max(start, text.rfind("\n", 0, end) + 1)
            at = end
            continue
        if c == "~" and one.text.endswith("="):
            one.tilde = True
        one.text += c
        at += 1
    if word is not None:
        words.append(word)
    if words:
        yield words


def _closing(text: str, at: int) -> int:
    """Where a quote closes; the end of its line where it never does."""
    quote, to = text[at], at + 1
    while to < len(text):
        if text[to] == "\\" and quote == '"':
            to += 1
        elif text[to] == quote:
            return to
        to += 1
    end = text.find("\n", at)
    return len(text) if end < 0 else end


BRACKETS = {"${": re.compile(r"[{}\n]"), "$(": re.compile(r"[()]")}
REACH = 1000  # characters; a longer $(...) is read as if it ended with its line


def _expansion(text: str, at: int) -> int:
    """Where $NAME, ${...}, $(...) or `...` ends."""
    if text[at] == "`":
        end = text.find("`", at + 1, at + REACH)
        return end + 1 if end > 0 else at + 1
    brackets = BRACKETS.get(text[at : at + 2])
    if brackets is None:
        return at + 1
    depth = 0
    for bracket in brackets.finditer(text, at, at + REACH):
        if bracket[0] == "\n":
            break
        depth += 1 if bracket[0] in "{(" else -1
        if not depth:
            return bracket.end()
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def fabric_in(text: str) -> str | None:
    """The fabric that a job file names."""
    m = re.search(r"^[^#\n]*\bfabric:\s*[\"']?([a-z0-9-]+)", text, re.MULTILINE)
    return m[1] if m else None
