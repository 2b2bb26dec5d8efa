"""Variables that a script exports: fields of the job, its secrets, lines of setup, or a note that says why not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launcher import envlint, facts, shell
from launcher.errors import Path
from launcher.imports import programs
from launcher.imports.draft import Draft, flat, shell_text
from launcher.imports.programs import said
from launcher.shell import Assignment, Command, Piece, Word
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, looks_secret

OWN_GPU = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
NODES = ("first-node", "hosts", "node-list", "this-address")


class Variables(Draft):
    def exports(self) -> None:
        spliced = {name for command in self.script.everything() for name in names_in(command)}
        for one in self.script.assignments:
            for word in one.array or ([one.value] if one.value else []):
                spliced |= set(re.findall(r"\$\{?([A-Za-z_]\w*)", word.text)) - {one.name}
        kept: dict[str, tuple[Word, int]] = {}
        scripts = [self.script, *(command.script for command in self.script.everything() if command.script)]
        for script in scripts:
            for one in script.assignments:
                if script is self.script:
                    self.suffix(one)
                    if one.array is not None and self.array and not one.prefix and not one.exported:
                        values = [word.value for word in one.array]
                        if all(value is not None for value in values):
                            self.indexed[one.name] = [str(value) for value in values]
                if not one.exported or one.prefix or "[" in one.name or one.value is None or "never" in one.inside:
                    continue
                value = one.value
                if any(word.startswith("function") for word in one.inside) and one.name in kept:
                    continue
                if any(word in ("if", "case", "for", "while") for word in one.inside):
                    known = script.variables.get(one.name, ())
                    value = replace(value, pieces=known[0]) if len(known) == 1 else value
                kept[one.name] = (self.gone(value, one.line), one.line)
        for name, (word, line) in kept.items():
            text = said(word)
            if name in spliced and name not in programs.RENDEZVOUS and _for_the_script(name, text):
                self.note("left out", f"{name}={flat(text)}: it stands in the command by now", line)
                continue
            self.variable(name, word, line)

    def gone(self, word: Word, line: int) -> Word:
        """$PWD behind `cd X` is X."""
        place = next((said for at, said in reversed(self.places) if at < line), None)
        if place is None:
            return word
        pieces: list[Piece] = []
        for piece in word.pieces:
            here = piece.name in ("PWD", "$(pwd)", "`pwd`") and piece.meaning == "submit-dir"
            pieces += place if here else [piece]
        return replace(word, pieces=tuple(pieces))

    def suffix(self, one: Assignment) -> None:
        """MASTER_ADDR="${MASTER_ADDR}i": the name of the fast network, on machines that have two."""
        pieces = [piece for piece in one.value.pieces if piece.name or piece.text] if one.value else []
        if (
            len(pieces) == 2
            and pieces[0].meaning == "first-node"
            and not pieces[1].name
            and (
                re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9.-]*|\.[A-Za-z0-9.-]+", pieces[1].text)
                and "MASTER" in one.name.upper()
            )
        ):
            self.put(("slurm", "address_suffix"), pieces[1].text, one.line, f"{one.name}=...{pieces[1].text}")

    def variable(self, name: str, word: Word, line: int) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return
        word = self.asked(("env", name), word, line)
        text = said(word)
        inner = re.sub(r"^(SINGULARITY|APPTAINER)ENV_(?!(APPEND|PREPEND)_PATH\Z)", "", name)
        if inner != name:  # what the runtime hands on as NAME: the job's own are there already
            if inner in self.env:
                self.note("carried", f"{name} -> env.{inner}", line)
            else:
                self.variable(inner, word, line)
            return
        if name in ("APPTAINER_BIND", "SINGULARITY_BIND", "APPTAINER_BINDPATH", "SINGULARITY_BINDPATH"):
            mounts = self.fields.setdefault("container", {}).setdefault("mounts", [])
            mounts += [one for one in self.mounts(word, line) if one not in mounts]
            self.note("carried", f"{name} -> container.mounts", line)
        elif name == "SLURM_CPU_BIND":
            self.put(("slurm", "cpu_bind"), text, line, name)
        elif name in OWN_GPU and word.meaning == "local-rank":
            self.put(("train", "visible_gpus"), "own", line, name)
        elif name == "LD_PRELOAD" and word.value:
            prefix = self.fields.setdefault("train", {}).setdefault("prefix", ["env"])
            prefix.append(f"{name}={word.value}")
            self.note("carried", f"{name} -> train.prefix: for the ranks alone", line)
        elif name in programs.RENDEZVOUS or name in NOT_YOURS or name.startswith(tuple(NOT_YOUR_PREFIXES)):
            why = programs.RENDEZVOUS.get(name) or NOT_YOURS.get(name) or next(
                (why for prefix, why in NOT_YOUR_PREFIXES.items() if name.startswith(prefix)), ""
            )  # fmt: skip
            self.note("left out", f"{name}: {why}", line)
        elif looks_secret(name, text):
            self.put(("secrets", name), {"from_env": name})
            self.note("carried", f"{name} -> secrets: its value stays in the shell that submits", line)
        elif name in ("NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
            self.note("left out", f"{name}: dslaunch sets TORCH_NCCL_ASYNC_ERROR_HANDLING=3 itself", line)
        elif word.value is not None or re.fullmatch(r"[\w./+-]+", text):  # $(which gcc) is gcc
            self.env[self.renamed(name, line)] = (text if word.value is None else word.value, line)
        elif any(piece.meaning in NODES for piece in word.pieces):
            self.note("left out", f"{name}={flat(word.text)}: {programs.RENDEZVOUS['NODES']}", line)
        else:
            value = self.referred(self.submitted(word.pieces), at_run=True)
            loops = {piece.name: self.script.loops.get(piece.name, ("",)) for piece in word.pieces
                     if piece.meaning == "loop"}  # fmt: skip
            over = self.fields.get("sweep", {}).get("over", {})
            if len(loops) == 1 and not {f"env.{one}" for one in loops} & set(over):
                loop, values = next(iter(loops.items()))
                chosen = shell.resolve(word, {loop: values[0]})
                if chosen.value is not None:
                    self.env[name] = (chosen.value, line)
                    message = f"{loop} is one of {', '.join(values)}, and the script's loop says which"
                    self.fill(("env", name), message, line)
                    return
            if value is not None:
                self.env[name] = (value, line)
            else:
                self.setup_line(f'export {name}="{shell_text(word)}"', line, name)

    def asked(self, at: Path, word: Word, line: int) -> Word:
        """$1 of a script is what sbatch was told behind its name: the user says it."""
        if not any(re.fullmatch(r"[0-9@*]", piece.name) for piece in word.pieces):
            return word
        pieces = []
        for piece in word.pieces:
            if re.fullmatch(r"[0-9@*]", piece.name):
                self.fill(at, f"{piece.text} stands for an argument of the script's", line)
                piece = Piece(f"FILL_IN_ARGUMENT_{piece.name if piece.name.isdigit() else 'ALL'}")
            pieces.append(piece)
        return replace(word, pieces=tuple(pieces))

    def submitted(self, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """$PWD and $SLURM_SUBMIT_DIR of the script: where one stands when submitting."""
        return tuple(
            replace(piece, name="PWD", meaning="") if piece.meaning == "submit-dir" and "git" not in piece.name
            else piece
            for piece in pieces
        )  # fmt: skip

    def setup_line(self, text: str, line: int, what: str) -> None:
        if "\n" in text or "scontrol" in text or "MASTER_" in text:
            self.note("left out", f"{flat(text)}: only a running job knows its value", line)
        elif text not in self.setup:
            self.setup.append(text)
            self.note("kept", f"{what} -> setup: its value is known on the node", line)

    def renamed(self, name: str, line: int) -> str:
        """NCCL_BLOCKING_WAIT is torch's: TORCH_NCCL_BLOCKING_WAIT."""
        for found in envlint.judge([envlint.Assignment(name, "1")]):
            if found.rule in ("ENV003", "ENV004") and re.fullmatch(r"[A-Z][A-Z0-9_]+", found.fix or ""):
                self.note("carried", f"{name} -> env.{found.fix}, its name today", line)
                return found.fix
            if found.rule == "ENV004":
                self.note("carried", f"{name} -> env.TORCH_{name}, its name today", line)
                return f"TORCH_{name}"
        return name

    def judge(self) -> None:
        """Variables that `plan` would refuse are left out, with its own words; the fabric's own are its row's."""
        plain = {name: value for name, (value, _) in self.env.items() if isinstance(value, str)}
        network = facts.fabric(self.fabric) if self.fabric else None
        given = {name: value for name, (value, _) in network.emits(None).items()} if network else {}
        rows = [envlint.Assignment(name, value) for name, value in plain.items()]
        for found in envlint.judge(rows, fabric=network, given=given):
            if found.severity == "error" and found.at.name in self.env:
                _, line = self.env.pop(found.at.name)
                self.note("left out", f"{found.message} [{found.rule}]", line)
        every = {name: value for name, (value, _) in facts.every_network().emits(None).items()}
        for name, (value, line) in self.env.items():
            if value in (given.get(name), every.get(name)):
                self.note("carried", f"{name}: dslaunch sets it so by itself", line)
                continue
            self.put(("env", name), value)
            self.note("carried", f"{name} -> env", line)

    # -- lists of them

    def mounts(self, word: Word, line: int) -> list[Any]:
        """--bind a:b,c with what is known of it; a variable in front is read from the environment."""
        found: list[Any] = []
        for pieces in _listed(word):
            twice = "".join(piece.shown for piece in pieces).split(":")
            if len(twice) == 2 and twice[0] == twice[1]:
                pieces = _until_colon(pieces)
            found.append(self.path(replace(word, pieces=tuple(pieces)), ("container", "mounts"), line, tidy=False))
        return found

    def listed(self, word: Word, line: int) -> None:
        """ALL,A=1,B=$HOME/x of --export and --env."""
        for pieces in _listed(word):
            one = replace(word, pieces=tuple(pieces))
            match = re.match(r"([A-Za-z_]\w*)=", one.partial)
            if match:
                value = shell.cut(one, len(match[0]))
                self.variable(match[1], value if value.pieces else replace(value, pieces=(Piece(""),)), line)
            elif one.partial not in ("ALL", "NONE", "NIL"):
                self.note("left out", f"{one.partial}: a job file says every variable itself", line)


def _for_the_script(name: str, text: str) -> bool:
    """CMD, LAUNCHER, TRAIN_SCRIPT: parts of a command, which a program has no use for."""
    part = re.search(r"(?i)(script|cmd|command|launcher|torchrun|args|opts|program|executable)", name)
    return bool(part) or bool(re.search(r"\s", text.strip()) and name.isupper() and programs.command_like(text))


def names_in(command: Command) -> set[str]:
    return {name for word in command.words for name in re.findall(r"\$\{?([A-Za-z_]\w*)", word.text)}


def _listed(word: Word) -> list[list[Piece]]:
    """a=$X,b in two."""
    parts: list[list[Piece]] = [[]]
    for piece in word.pieces:
        if piece.name:
            parts[-1].append(piece)
            continue
        for at, chunk in enumerate(piece.text.split(",")):
            if at:
                parts.append([])
            if chunk:
                parts[-1].append(replace(piece, text=chunk))
    return [part for part in parts if part]


def _until_colon(pieces: Sequence[Piece]) -> list[Piece]:
    """/home/$USER/x of /home/$USER/x:/home/$USER/x."""
    found: list[Piece] = []
    for piece in pieces:
        if not piece.name and ":" in piece.text:
            head = piece.text.partition(":")[0]
            return [*found, *([replace(piece, text=head)] if head else [])]
        found.append(piece)
    return found
