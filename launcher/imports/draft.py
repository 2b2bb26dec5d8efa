"""A job file in the making: what is known of it so far, what was said about each line, and words as values of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from posixpath import basename, normpath
from typing import Any

from launcher import shell
from launcher.errors import Path
from launcher.imports import Kind, Note, programs
from launcher.imports.programs import said
from launcher.shell import Command, Option, Piece, Script, Word
from launcher.spec.check import SECRET_NAME
from launcher.spec.words import OF_NODE

# What a note says instead of a secret; and whatever stands behind `wandb login`.
MASK = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|eyJ[A-Za-z0-9_.-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY.*"
    r"|(?<=[Bb]earer )[^\s'\"]+|(?<= login )\S.*|(?<=[-_]key[= ])\S+|(?<=[-_]token[= ])\S+",
    re.DOTALL,
)


@dataclass
class Needs:
    """Counts as the script gives them; the job file has them per node."""

    nodes: int | None = None
    tasks: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    cpus_per_gpu: int | None = None
    gpus_per_node: int | None = None
    gpus_per_task: int | None = None
    gpus: int | None = None
    memory: str = ""
    memory_per_gpu: str = ""
    memory_per_cpu: str = ""
    gpus_as: str = ""
    gpu_type: str = ""


@dataclass(frozen=True)
class Start:
    """A program that the script starts, without what was wrapped around it."""

    argv: tuple[Word, ...]
    line: int
    options: tuple[Option, ...] = ()  # of srun
    stepped: bool = False  # under srun
    box: Mapping[str, Any] = field(default_factory=dict)
    background: bool = False
    inside: tuple[str, ...] = ()
    own: tuple[tuple[str, Word], ...] = ()  # A=1 before it
    prefix: tuple[Word, ...] = ()  # numactl --membind=0

    def option(self, name: str) -> str | None:
        found = next((one for one in reversed(self.options) if one.name == name), None)
        return None if found is None else (said(found.value) if found.value else "")

    def number(self, name: str) -> int | None:
        text = self.option(name) or ""
        return int(text) if text.isdigit() else None


class Draft:
    """Fields, comments and notes; what reads a script builds on it: variables, options, steps, training."""

    def __init__(self, script: Script, environ: Mapping[str, str]) -> None:
        self.script, self.environ = script, environ
        self.fields: dict[str, Any] = {"name": _name(script)}
        self.notes: list[Note] = []
        self.comments: dict[Path, str] = {}
        self.needs = Needs()
        self.starts: list[Start] = []
        self.setup: list[str] = []
        self.files_made: dict[str, str] = {}  # lines of setup that write a file, by its name
        self.directories: list[tuple[Word, int]] = []  # that the script makes
        self.modules: dict[str, Any] = {"purge": False, "use": [], "unload": [], "swap": {}, "load": []}
        self.conda_root: Any = None
        self.indexed: dict[str, list[str]] = {}  # arrays of values that an array job picks from
        self.array: list[int] = []
        self.started = False
        self.env: dict[str, Any] = {}
        self.places: list[tuple[int, Sequence[Piece]]] = []  # where `cd` went, by line
        self.services: list[dict[str, Any]] = []
        self.components: list[dict[str, str]] = []  # of a heterogeneous job, behind the first
        self.printed: list[Command] = []
        self.fabric, self.fabric_why = programs.fabric(script.text)

    # -- what is said

    def note(self, kind: Kind, message: str, line: int = 0) -> None:
        self.notes.append(Note(kind, MASK.sub("***", message), line))

    def put(self, path: Path, value: Any, line: int = 0, what: str = "") -> None:
        at: Any = self.fields
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
        if what:
            self.note("carried", f"{what} -> {'.'.join(map(str, path))}", line)

    def fill(self, path: Path, message: str, line: int = 0) -> None:
        before = self.comments.get(path, "")
        if message not in before:
            self.comments[path] = f"{before}; {message}" if before else message
        self.note("fill in", f"{'.'.join(map(str, path))}: {message}", line)

    def unknown(self, message: str, line: int = 0) -> None:
        self.put(("train", "command"), ["bash", "-c", "echo 'which program?'; exit 64"])
        self.fill(("train", "command"), message, line)

    ranked = False  # whether srun starts every rank

    def local(self, behind: str) -> str:  # by what the script copies there
        return "${DSLAUNCH_LOCAL}"

    unpacked = ""  # where an archive lies that the script unpacks into the local disk itself

    # -- words

    def reference(self, text: str) -> Any:
        match = re.fullmatch(r"\$\{?([A-Za-z_]\w*)\}?(/.*)?", text)
        return {"env": match[1], **({"append": match[2]} if match[2] else {})} if match else text

    def path(self, word: Word, at: Path, line: int, *, tidy: bool = True, soft: bool = False) -> Any:
        """A word as text, or {env: NAME, append: ...} where it begins with a variable of the user's."""
        text = word.value
        if text is not None:
            if text == "~" or text.startswith("~/"):
                return {"env": "HOME", **({"append": text[1:]} if text[1:] else {})}
            return text.rstrip("/") if tidy and len(text) > 1 else text
        pieces = [piece for piece in word.pieces if piece.name or piece.text]
        first, rest = pieces[0], pieces[1:]
        if first.meaning == "submit-dir" or first.name in ("$(pwd)", "`pwd`"):
            tail = "".join(piece.shown for piece in rest)
            if not any(piece.name for piece in rest):
                if ":" in tail:  # a mount
                    return {"env": "PWD", "append": tail}
                return normpath(tail.lstrip("/")) if tail.strip("/") else "."
        found = self.referred(pieces, at_run=at[:1] == ("env",))
        if found is not None:
            if tidy and isinstance(found.get("append"), str):
                found["append"] = found["append"].rstrip("/")
                if not found["append"]:
                    del found["append"]
            return found
        if soft:
            return None
        known = "".join(self.environ.get(piece.name, "") if piece.name else piece.text for piece in pieces)
        if all(piece.name in self.environ or not piece.name for piece in pieces):
            self.note("carried", f"{word.partial} -> {known}, as the environment says now", line)
            return known
        shown = "".join(f"FILL_IN_{_tame(piece.name)}" if piece.name else piece.text for piece in pieces)
        self.fill(at, f"{word.partial} is known to the script alone", line)
        return shown

    def plain(self, word: Word) -> Any:
        """A word that needs no shell: text, or {env: ...} for a variable of the user's in front; else None."""
        if word.value is not None:
            if word.value.startswith("~/") and word.quoting == "none":
                return {"env": "HOME", "append": word.value[1:]}
            return word.value
        pieces = [piece for piece in word.pieces if piece.name or piece.text]
        first, rest = pieces[0], pieces[1:]
        if first.meaning == "submit-dir" and not any(piece.name for piece in rest):
            tail = "".join(piece.text for piece in rest)
            return normpath("./" + tail.lstrip("/"))
        return self.referred(pieces, at_run=True, command=True)

    def referred(self, pieces: Sequence[Piece], *, at_run: bool, command: bool = False) -> dict[str, Any] | None:
        """/scratch/$USER/x as {env: USER, prepend: /scratch/, append: /x}; of two names one stands in `append`.

        `at_run`: a place that may know what only a running job does. None for what is no text around names.
        """
        found: list[dict[str, Any]] = []
        text = ""
        for at, piece in enumerate(pieces):
            if not piece.name:
                suffix = self.fields.get("slurm", {}).get("address_suffix", "")
                behind = at and pieces[at - 1].meaning == "first-node"  # whose name has it by then
                text += piece.text.removeprefix(suffix) if behind else piece.text
                continue
            if piece.meaning == "time" and any(one.meaning == "job-id" for one in pieces):
                self.note("left out", f"{piece.text}: the job's id stands beside it")
                text = text.rstrip("_-.")
                continue
            port = bool(re.search(r":\Z", text)) and bool(found)
            one = self.named(piece, at_run=at_run, command=command, port=port)
            if one is None:
                return None
            found.append({**one, **({"prepend": text} if text else {})})
            text = ""
            if one == {"node": "local"}:
                after = "".join("" if other.name else other.text for other in pieces[at + 1 : at + 2])
                text = self.local(after).removeprefix("${DSLAUNCH_LOCAL}")
        if not found:
            return None
        if text:
            found[-1]["append"] = text
        whole = found.pop()
        for one in reversed(found):
            whole = {**one, "append": whole}
        return whole

    reaches = True  # whether the script itself runs on the first node alone

    def on_first(self, piece: Piece) -> bool:
        """$(hostname) of the batch script is the first node; inside what srun starts it is each node's own."""
        within = (one.script.text for one in self.script.everything() if one.script)
        return self.reaches and not any(piece.text in text or piece.shown in text for text in within)

    def named(self, piece: Piece, *, at_run: bool, command: bool, port: bool) -> dict[str, str] | None:
        """What one name of the script is called in a job file."""
        name, meaning = piece.name, piece.meaning
        plain = re.fullmatch(r"[A-Za-z_]\w*", name) is not None
        if plain and SECRET_NAME.regex.fullmatch(name):
            return None
        if not meaning and plain and not name.startswith("SLURM") and name not in shell.INHERITED:
            return None if name.islower() else {"env": name}  # of the script's own making, in a way that is not known
        if not at_run:
            return None
        if port and meaning in ("job-id", "random", "time"):
            return {"node": "MASTER_PORT"}
        if meaning in ("time", "random"):
            message = f"{piece.text} -> the job's id: one name for every rank and attempt"
            if message not in [note.message for note in self.notes]:
                self.note("carried", message)
        if meaning in ("time", "random") or (meaning == "job-id" and plain):
            return {"job": "id"}
        if meaning == "hosts" and self.services and command:
            return {"host": self.services[0]["name"]}
        if meaning == "local-disk":
            if name.startswith("/mnt/bb/"):
                self.put(("local_disk",), {"env": "USER", "prepend": "/mnt/bb/"})
            if self.fields.get("stage") or not OF_NODE.fullmatch(name):
                return {"node": "local"}
            return {"node": name}
        if meaning == "rank" and (self.needs.tasks_per_node or 1) == 1 and not self.ranked:
            meaning = "node-rank"  # of the one task of a node
        if meaning == "this-node" and "|" in piece.text and not SHORT_NAME.search(piece.text):
            return None  # made into something else
        if meaning in ("this-node", "this-address") and self.on_first(piece):
            meaning = "first-node"
        if meaning in ("node-rank", "this-node", "first-node"):
            return {"node": {"node-rank": "rank", "this-node": "name"}.get(meaning, "MASTER_ADDR")}
        if meaning == "array-index":  # env.ARRAY_INDEX, env.FILE of a sweep
            over = name.partition("[")[0] if "[" in name else ""
            return {"node": one_of(over)} if over else {"node": "ARRAY_INDEX"}
        if plain and OF_NODE.fullmatch(name) and meaning in ("", "job-name"):
            return {"node": name}
        return None


SHORT_NAME = re.compile(r"^[^|]*\|\s*cut\s+-d\s*['\"]?\.['\"]?\s+-f\s*1\W*$")


def without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in ({}, [], None)}


def _name(script: Script) -> str:
    """A name for the run, from --job-name or the file's."""
    given = script.directive("job-name")
    text = given.value if given and given.value else basename(script.name).rpartition(".")[0] or basename(script.name)
    tame = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return tame or "imported"


def _tame(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")[:30].upper() or "VALUE"


def one_of(name: str) -> str:
    """LRS holds values of LR; files of FILE."""
    one = re.sub(r"(?<=[A-Za-z0-9])(?<![Ss])[Ss]$", "", name)
    return (one if one != name else f"{name}_VALUE").upper()


def digits(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text or "") else None


def size(text: str) -> str:
    """480GB is 480G to Slurm, too."""
    match = re.fullmatch(r"([0-9]+)([KMGTkmgt]?)[bB]?", text)
    return (match[1].lstrip("0") or "0") + match[2].upper() if match else text


def flat(text: str) -> str:
    return " ".join(text.split())


def short(text: str) -> str:
    line = flat(text)
    return line if len(line) <= 90 else line[:87] + "..."


def without_end(word: Word, end: str) -> Word:
    """~/env/bin/activate without /bin/activate."""
    last = word.pieces[-1]
    if not last.name and last.text.endswith(end):
        shorter = replace(last, text=last.text.removesuffix(end))
        pieces = (*word.pieces[:-1], shorter) if shorter.text else word.pieces[:-1]
        return replace(word, pieces=pieces)
    return word


def inside_quotes(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def shell_text(word: Word) -> str:
    """Inside double quotes: known text, and ${NAME} for the rest."""
    return "".join(
        "${SLURM_JOB_ID}" if piece.meaning == "time"  # each node and each attempt would have its own
        else piece.shown if piece.name else inside_quotes(piece.text)
        for piece in word.pieces
    )  # fmt: skip
