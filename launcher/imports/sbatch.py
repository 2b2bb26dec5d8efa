"""sbatch scripts of others as job files.

A script is read in the order in which bash would go through it. Every directive, export, module and step ends in one
place: a typed field, a pass-through (slurm.sbatch, slurm.srun, setup), or a note that says why it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher import shell
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, programs, reference
from launcher.imports.draft import MASK, Start, flat, short, without_empty
from launcher.imports.programs import said
from launcher.imports.training import Training
from launcher.imports.variables import names_in
from launcher.shell import Command, Script, Word
from launcher.spec.check import SECRET_NAME, SECRET_VALUE

OTHERS = (  # what no #SBATCH line stands beside
    (r"^#PBS\b", "PBS", "qsub"),
    (r"^#BSUB\b", "LSF", "bsub"),
    (r"^#COBALT\b", "Cobalt", "qsub"),
    (r"^#\$ -[a-zA-Z]", "Grid Engine", "qsub"),
    (r"^#(PJM|OAR|FLUX|flux:)", "another scheduler", "its own command"),
)
SET_FOR_EVERY_JOB = frozenset(
    """USER HOME LOGNAME PWD PATH LD_LIBRARY_PATH PYTHONPATH HOSTNAME SHELL RANDOM MASTER_ADDR MASTER_PORT NODE_RANK
    RANK LOCAL_RANK WORLD_SIZE ARRAY_INDEX NNODES NPROC_PER_NODE TMPDIR""".split()
)


def read(
    text: str, *, name: str, environ: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
) -> Imported:
    """The job of a script. Raises UserError for what is no sbatch script, with what to do instead.

    `arguments`: what sbatch would get behind the script's name.
    """
    script = shell.read(text, name, arguments)
    _refuse(script)
    return Import(script, environ or {}).job()


def _refuse(script: Script) -> None:
    if not script.directives:
        for pattern, who, how in OTHERS:
            found = re.search(pattern, script.text, re.MULTILINE)
            if found:
                line = script.text.count("\n", 0, found.start()) + 1
                hint = "write a job file with `dslaunch init`; the program and its arguments stay the same"
                message = f"this is a script for {who} ({how}); dslaunch submits to Slurm and Kubernetes"
                raise UserError(Problem(message, hint, where=f"{script.name}:{line}:1"))
    for command in script.commands:
        if command.name == "salloc":
            hint = "`dslaunch init`, then `dslaunch slurm job.yaml`"
            message = "salloc opens an interactive allocation: there is no batch job in it to carry over"
            raise UserError(Problem(message, hint, where=f"{script.name}:{command.line}:{command.column}"))
    if not script.directives and not any(_starts_something(command) for command in script.everything()):
        message = "this is no batch script: no #SBATCH line, no srun and no launcher stands in it"
        raise UserError(Problem(message, "dslaunch import train.sbatch", where=script.name))


def _starts_something(command: Command) -> bool:
    return command.name == "srun" or programs.read(command.argv) is not None


class Import(Training):
    def job(self) -> Imported:
        for late in self.script.late:
            self.note("left out", f"{late.text}: sbatch does not see it behind the first command", late.line)
        for one in self.script.disabled:
            if not one.text.startswith("##"):
                self.note("left out", f"{one.text}: a blank behind # makes it a comment to sbatch", one.line)
        group: dict[str, str] | None = None
        for one in self.script.directives:
            if one.option in ("hetjob", "packjob"):
                group = {}
                self.components.append(group)
                continue
            if group is not None:
                group[one.option] = one.value or ""
                continue
            several = sum(other.line == one.line for other in self.script.directives) > 1
            text = f"#SBATCH --{one.option}" + (f"={one.value}" if one.value else "") if several else one.text
            self.directive(one.option, one.value, one.line, text)
        for unread in self.script.unread:
            self.note("left out", f"not understood: {unread.text}", unread.line)
        self.commands(self.script.commands)
        trainer = self.trainer()
        self.exports()
        if trainer:
            self.program(trainer)
        else:
            broken = [f": line {one.line} is no complete shell, {one.text}" for one in self.script.broken[:1]]
            self.unknown("no line of the script was recognised as the training" + "".join(broken))
        self.judge()
        self.resources(trainer)
        self.software()
        self.choices(trainer)
        self.missing()
        self.account()
        return Imported(
            without_empty(self.fields), tuple(sorted(self.notes, key=lambda one: one.line)), self.comments
        )

    # -- what was not understood

    def choices(self, trainer: Start | None) -> None:
        """What a condition of the script would have made different."""
        scripts = [self.script, *(command.script for command in self.script.everything() if command.script)]
        used = self.used(trainer)
        told = set()
        for one in (choice for script in scripts for choice in script.choices):
            if one.taken == one.other or (one.name, one.other) in told:
                continue
            told.add((one.name, one.other))
            other, taken = flat(one.other), flat(one.taken)
            if one.name.isdigit():
                message = f"${{{one.name}}} is {taken or 'empty'} here, its default: {one.condition} may say another"
                self.note("left out", message, one.line)
                continue
            changed = f"makes it {other or 'empty'}"
            if other.startswith(taken) and len(taken) > 30:
                changed = f"adds {other.removeprefix(taken).strip()}"
            if SECRET_NAME.regex.fullmatch(one.name):
                continue
            message = f"{one.name}={short(taken)} here; `{flat(one.condition)}` {changed}"
            asked = set(re.findall(r"\$\{?([A-Za-z_]\w*)", one.condition))
            default = not one.other and one.name in asked
            ours = one.name in programs.RENDEZVOUS or (trainer is None)
            place: Path = ("env", one.name) if one.name in self.fields.get("env", {}) else ("train",)
            needs = self.needs
            if re.search(r"(?i)gpu|nproc", one.name) and not (
                needs.gpus_per_node or needs.gpus or needs.gpus_per_task
            ):
                ours, place = False, ("resources", "gpus_per_node")
            if ours or default or (place == ("train",) and one.name not in used):
                self.note("left out", message, one.line)
            else:
                self.fill(place, message, one.line)

    def used(self, trainer: Start | None) -> set[str]:
        """Names of variables that the training's own line is made of, directly or through others."""
        if trainer is None:
            return set()
        lines = [command for command in self.script.everything() if command.line <= trainer.line <= command.end]
        found = {name for command in lines for name in names_in(command)}
        found |= {name for command in lines for name in re.findall(r"\$\{?([A-Za-z_]\w*)", command.text)}
        while True:
            more = {
                name
                for one in self.script.assignments
                if one.name in found
                for word in (one.array or (one.value,))
                if word is not None
                for name in re.findall(r"\$\{?([A-Za-z_]\w*)", word.text)
            }
            if more <= found:
                return found
            found |= more

    def missing(self) -> None:
        """What #SBATCH lines leave to the site's defaults, and names that nothing of the script sets."""
        if self.needs.nodes is None and re.search(r"SLURM_(JOB_NUM_NODES|NNODES)", self.script.text):
            message = "no #SBATCH line says it; `sbatch --nodes` did, or the site's default of 1"
            self.fill(("resources", "nodes"), message)
        elif self.needs.nodes is None and self.needs.tasks is None and ("resources", "nodes") not in self.comments:
            self.note("left out", "no #SBATCH line says --nodes: 1, as sbatch takes it")
        if "time" not in self.fields.get("slurm", {}):
            self.note("left out", "no #SBATCH line says --time: the partition's default holds")
        train = self.fields.get("train", {})
        command = train.get("command") or []
        text = str(command[2]) if command[:2] == ["bash", "-c"] and len(command) > 2 else ""
        said_so = " ".join(self.setup) + " ".join(f"{name}=" for name in self.fields.get("env", {}))
        names = dict.fromkeys(re.findall(r"(?<!\\)\$\{?([A-Za-z_]\w*)", text))
        sourced = "source" in self.fields or any(re.match(r"(source|\.) ", line) for line in self.setup)
        for name in names:
            array = re.search(rf"\$\{{{name}\[[^]]*\][^}}]*\}}", text)
            if array and not sourced:
                self.fill(("train", "command"), f"{array[0]} is an array that only the script knows: write its words")
                continue
            if name in SET_FOR_EVERY_JOB or name.startswith(("SLURM_", "DSLAUNCH_")) or f"{name}=" in said_so:
                continue
            if name in self.fields.get("secrets", {}) or name in self.fields.get("sweep", {}).get("over", {}):
                continue
            if f"env.{name}" in self.fields.get("sweep", {}).get("over", {}):
                continue
            written = any(one.name == name for one in self.script.assignments)
            if name.isupper() and not sourced and not written:  # sbatch handed it on from the shell that submitted
                self.put(("env", name), {"env": name})
                self.note("carried", f"{name} -> env: as the shell that submits has it")
            else:
                why = "is made of what only the script knows" if written else "is set by no line of the script"
                self.fill(("train", "command"), f"${{{name}}} {why}: write what it holds")

    def account(self) -> None:
        """Whatever stands in no field and in no note so far is named now: nothing is lost without a word."""
        if self.printed:
            names = ", ".join(dict.fromkeys(flat(command.text) for command in self.printed))
            self.note("left out", f"what prints, or only moves within the script: {names}", self.printed[0].line)
        told = "\n".join([*_texts(self.fields), *(note.message for note in self.notes)])
        told = told.replace("{", "").replace("}", "")
        scripts = [self.script, *(command.script for command in self.script.everything() if command.script)]
        for script in scripts:
            for one in script.assignments:
                words = one.array if one.array is not None else (one.value,) if one.value else ()
                if any(re.match(rf"{re.escape(one.name)}[: =]", note.message) for note in self.notes):
                    continue
                lost = [token for word in words for token in _tokens(word) if token not in told]
                if lost and not SECRET_NAME.regex.fullmatch(one.name):
                    shown = flat(" ".join(word.text for word in words))
                    self.note("left out", f"{one.name}={shown}: nothing that is carried over uses it", one.line)
            for command in script.commands:
                if "substitution" in command.inside or command.name in script.functions:
                    continue
                lost = [token for word in command.argv for token in _tokens(word) if token not in told]
                if lost and flat(command.text).replace("{", "").replace("}", "") not in told and not command.script:
                    shown = " ".join([flat(said(command.argv[0])), "...", *dict.fromkeys(lost)])
                    self.note("left out", f"{shown}: no field has it", command.line)


def _texts(value: Any) -> Iterable[str]:
    """Every text of a job, with references as a shell would write them."""
    if isinstance(value, Mapping):
        if reference(value):
            yield _written(value)
        else:
            for key, child in value.items():
                yield str(key)
                yield from _texts(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _texts(child)
    else:
        yield str(value)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    name = value.get("env") or value.get("node") or "SLURM_JOB_ID"
    return f"{_written(value.get('prepend', ''))}${name}{_written(value.get('append', ''))}"


def _tokens(word: Word) -> Iterable[str]:
    """Of a word what has to stand somewhere: text, and names that mean nothing special."""
    if SECRET_VALUE.regex.fullmatch(word.partial) or MASK.search(word.partial):
        return
    for piece in word.pieces:
        if not piece.name:
            for token in re.findall(r"[A-Za-z0-9_./%+@-]*[A-Za-z0-9][A-Za-z0-9_./%+@-]*", piece.text):
                if token not in ("srun", "exec"):
                    yield token.rstrip("/").removeprefix("./").removesuffix("/bin/activate")
        elif piece.name.isidentifier() and not piece.meaning and not piece.name.startswith("SLURM"):
            yield piece.name
