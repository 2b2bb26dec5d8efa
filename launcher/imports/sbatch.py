"""sbatch scripts of others as job files.

A script is read in the order in which bash would go through it. Every directive, export, module and step ends in one
place: a typed field, a pass-through (slurm.sbatch, slurm.srun, setup), or a note that says why it is left out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from posixpath import basename, normpath
from typing import Any

from launcher import envlint, facts, shell
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, Kind, Note, deepspeed, programs, reference
from launcher.imports.programs import Program, said
from launcher.shell import Assignment, Command, Option, Piece, Script, Word
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, SECRET_NAME, SECRET_VALUE

OTHERS = (  # what no #SBATCH line stands beside
    (r"^#PBS\b", "PBS", "qsub"),
    (r"^#BSUB\b", "LSF", "bsub"),
    (r"^#COBALT\b", "Cobalt", "qsub"),
    (r"^#\$ -[a-zA-Z]", "Grid Engine", "qsub"),
    (r"^#(PJM|OAR|FLUX|flux:)", "another scheduler", "its own command"),
)

# --- directives -----------------------------------------------------------------------------------

TEXT = {
    "partition": "partition", "account": "account", "qos": "qos", "reservation": "reservation", "wckey": "wckey",
    "constraint": "constraint", "comment": "comment", "time": "time", "time-min": "time_min", "begin": "begin",
    "deadline": "deadline", "dependency": "dependency", "nodelist": "nodelist", "nodefile": "nodefile",
    "exclude": "exclude", "switches": "switches", "network": "network", "tmp": "tmp", "hint": "hint",
    "distribution": "distribution", "cpu-bind": "cpu_bind", "mem-bind": "mem_bind", "gpu-bind": "gpu_bind",
    "accel-bind": "accel_bind", "mpi": "mpi", "mail-user": "mail_user", "mail-type": "mail_type",
}  # fmt: skip
NUMBERS = {
    "nice": "nice", "segment": "segment", "ntasks-per-socket": "ntasks_per_socket", "core-spec": "core_spec",
    "threads-per-core": "threads_per_core",
}  # fmt: skip
SWITCHES = {
    "oversubscribe": "oversubscribe", "overcommit": "overcommit", "contiguous": "contiguous", "spread-job": "spread",
}  # fmt: skip
RUNTIME = {  # left out: what dslaunch does itself
    "output": "a run directory has logs of its own, per rank", "error": "a run directory has logs of its own",
    "open-mode": "dslaunch appends", "chdir": "", "export": "a job file says every variable itself",
    "parsable": "dslaunch reads the answer", "wait": "dslaunch wait", "verbose": "it is for the command line",
    "quiet": "it is for the command line", "hold": "hold the job with scontrol once it is submitted",
    "get-user-env": "a job file describes the environment", "clusters": "submit from the other cluster",
    "ignore-pbs": "there are no such lines", "kill-on-invalid-dep": "dslaunch status says so",
    "no-kill": "resources.spares brings it", "unbuffered": "dslaunch says it", "label": "logs are per rank",
    "jobid": "a step runs in its own job",
    "overlap": "a job has one step at a time", "exact": "a step has the whole job", "input": "ranks read nothing",
    "whole": "a step has the whole job", "wait-for-children": "dslaunch waits",
    "oom-kill-step": "", "disable-status": "", "quit-on-interrupt": "", "pty": "no terminal in a batch job",
    "export-file": "a job file says every variable itself", "resv-ports": "dslaunch finds ports itself",
    "propagate": "limits are checked on the nodes",
}  # fmt: skip
OF_A_STEP = frozenset(  # its share of the job: the same as the job's, or a service's
    """nodes ntasks ntasks-per-node cpus-per-task gpus-per-node gpus-per-task gpus gres mem nodelist exclude exclusive
    relative het-group wait time cpus-per-gpu partition account constraint qos mem-per-gpu mem-per-cpu""".split()
)
COUNTS = {
    **dict.fromkeys(["ntasks", "ntasks-per-node"], "train.launcher, resources"), "nodes": "resources.nodes",
    **dict.fromkeys(["cpus-per-task", "cpus-per-gpu"], "resources.cpus_per_node"),
    **dict.fromkeys(["gpus-per-node", "gpus-per-task", "gpus"], "resources.gpus_per_node"),
    **dict.fromkeys(["mem", "mem-per-gpu", "mem-per-cpu"], "resources.memory"), "job-name": "name",
}  # fmt: skip


@dataclass
class _Needs:
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
class _Start:
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


def read(text: str, *, name: str, environ: Mapping[str, str] | None = None) -> Imported:
    """The job of a script. Raises UserError for what is no sbatch script, with what to do instead."""
    script = shell.read(text, name)
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


class Import:
    def __init__(self, script: Script, environ: Mapping[str, str]) -> None:
        self.script, self.environ = script, environ
        self.fields: dict[str, Any] = {"name": _name(script)}
        self.notes: list[Note] = []
        self.comments: dict[Path, str] = {}
        self.needs = _Needs()
        self.starts: list[_Start] = []
        self.setup: list[str] = []
        self.modules: dict[str, Any] = {"purge": False, "use": [], "unload": [], "swap": {}, "load": []}
        self.conda_root: Any = None
        self.indexed: dict[str, list[str]] = {}  # arrays of values that an array job picks from
        self.array: list[int] = []
        self.started = False
        self.env: dict[str, Any] = {}
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

    # -- the whole

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
        return Imported(_ordered(self.fields), tuple(sorted(self.notes, key=lambda one: one.line)), self.comments)

    # -- #SBATCH and srun options

    def directive(self, option: str, value: str | None, line: int, text: str) -> None:
        value = value or ""
        if "$" in value:
            self.note("left out", f"{text}: sbatch expands no variables in its lines", line)
            return
        if not self.option(option, value, line, text, batch=True):
            row = facts.slurm_options().get(option)
            if row and (row.why or row.field):
                self.note("left out", f"{text}: {row.why or f'{row.field} says it'}", line)
            elif row and "b" in row.of:
                self.put(("slurm", "sbatch", option), value or True)
                self.note("kept", f"{text} -> slurm.sbatch", line)
            elif shell.near(option):
                self.misspelt(option, text, line)
            elif re.fullmatch(r"[a-z][a-z-]*", option):
                self.put(("slurm", "sbatch", option), value or True)
                self.plugin(option)
                self.note("kept", f"{text} -> slurm.sbatch, as an option that a plugin of the site brings", line)
            else:
                self.note("left out", f"{text}: not an option of sbatch", line)

    def misspelt(self, option: str, text: str, line: int) -> None:
        self.fill(("slurm",), f"{text}: Slurm has no --{option}; did you mean --{shell.near(option)}?", line)
        self.fields.setdefault("slurm", {})

    def plugin(self, option: str) -> None:
        """An option that Slurm itself does not have."""
        names = self.fields.setdefault("slurm", {}).setdefault("plugin_options", [])
        if option not in names:
            names.append(option)

    def option(self, option: str, value: str, line: int, text: str, *, batch: bool) -> bool:
        """One option of sbatch or srun as fields; False where none takes it."""
        if option in COUNTS:
            self.note("carried", f"{text} -> {COUNTS[option]}", line)
        elif option == "gres":
            self.note("carried", f"{text} -> resources.gpus_per_node, slurm.gres", line)
        needs, number = self.needs, _number(value)
        if option == "job-name":
            pass
        elif option == "comment":
            self.put(("slurm", "comment"), re.sub(r"[^A-Za-z0-9_.,:@%+/=&|*()\[\]-]+", "_", value), line, text)
        elif option in ("cpu-bind", "mem-bind", "gpu-bind"):
            loud = ("v", "verbose", "q", "quiet")
            value = ",".join(word for word in value.split(",") if word not in loud)
            value = re.sub(r"^([a-z_]+)=", r"\1:", value)  # Slurm takes both; a job file has mask_cpu:
            if value:
                self.put(("slurm", TEXT[option]), value, line, text)
            if value and option == "cpu-bind" and self.fields["slurm"].pop("hint", None):
                self.note("left out", "--hint: srun takes --cpu-bind instead of it", line)
        elif option in TEXT:
            if value:
                self.put(("slurm", TEXT[option]), value, line, text)
            else:
                self.note("left out", f"{text}: it has no value", line)
        elif option in NUMBERS and re.fullmatch(r"-?[0-9]+", value or "100"):
            self.put(("slurm", NUMBERS[option]), int(value or "100"), line, text)
        elif option in SWITCHES:
            self.put(("slurm", SWITCHES[option]), True, line, text)
        elif option == "exclusive":
            self.put(("slurm", "exclusive"), value if value in ("user", "mcs", "topo") else True, line, text)
        elif option == "licenses":
            self.put(("slurm", "licenses"), value.split(","), line, text)
        elif option == "nodes":
            first, _, last = value.partition("-")
            needs.nodes = _number(last or first)
            if last:
                self.note("carried", f"{text}: {last} nodes; a job file has one number", line)
        elif option == "ntasks":
            needs.tasks = number
        elif option == "ntasks-per-node":
            needs.tasks_per_node = number
        elif option == "ntasks-per-gpu":
            needs.gpus_as = "gpus-per-task"
        elif option == "cpus-per-task":
            needs.cpus_per_task = number
        elif option == "cpus-per-gpu":
            needs.cpus_per_gpu = number
        elif option in ("gpus-per-node", "gpus-per-task", "gpus"):
            kind, _, count = value.rpartition(":")
            setattr(needs, option.replace("-", "_"), _number(count))
            needs.gpus_as, needs.gpu_type = option, kind or needs.gpu_type
        elif option == "gres":
            self.gres(value, line, text)
        elif option == "mem":
            needs.memory = value
        elif option == "mem-per-gpu":
            needs.memory_per_gpu = value
        elif option == "mem-per-cpu":
            needs.memory_per_cpu = value
        elif option in ("requeue", "no-requeue"):
            self.put(("slurm", "requeue"), option == "requeue", line, text)
        elif option == "signal":
            seconds = re.search(r"@([0-9]+)", value)
            before = int(seconds[1]) if seconds else 60
            self.put(("slurm", "warn_before_end"), before, line, text)
        elif option == "wait-all-nodes":
            self.put(("slurm", "wait_all_nodes"), value != "0", line, text)
        elif option == "kill-on-bad-exit":
            if value == "0":
                self.put(("slurm", "kill_on_bad_exit"), False, line, text)
            else:
                self.note("left out", f"{text}: dslaunch says it", line)
        elif option == "array":
            self.sweep(value, line, text)
        elif option == "chdir":
            self.workdir(Word(value, (Piece(value),), line, 1), line, text)
        elif option == "mincpus" and number:
            self.put(("resources", "cpus_per_node"), number, line, text)
        elif option in ("image", "module", "volume", "environment", "uenv") or "container-" in option:
            return self.box_option(option, value, line, text)
        elif option in RUNTIME:
            if option == "export" and value not in ("ALL", "NONE", "NIL", ""):
                self.listed(Word(value, (Piece(value),), line, 1), line)
            if option not in ("chdir", "job-name"):
                self.note("left out", f"{text}: {RUNTIME[option] or 'dslaunch has its own'}", line)
        else:
            return False
        return True

    def gres(self, value: str, line: int, text: str) -> None:
        others = []
        for item in value.split(","):
            match = re.fullmatch(
                r"(gres[:/])?gpu(?::([A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*))?(?::([0-9]+))?", item
            )
            if match:
                self.needs.gpus_per_node = int(match[3] or 1)
                self.needs.gpus_as, self.needs.gpu_type = "gres", match[2] or self.needs.gpu_type
            elif item and item != "none":
                others.append(item)
        if others:
            self.put(("slurm", "gres"), others, line, text)

    def sweep(self, value: str, line: int, text: str) -> None:
        numbers, _, parallel = value.partition("%")
        if "SLURM_ARRAY_TASK_ID" not in self.script.text:
            why = "no line uses its index: slurm.requeue and recover go on with a run" if parallel == "1" else (
                "no line uses its index: dslaunch submit as often as you want it")  # fmt: skip
            self.note("left out", f"{text}: {why}", line)
            return
        for part in numbers.split(","):
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?", part)
            if match:
                last = int(match[2] or match[1])
                self.array += list(range(int(match[1]), last + 1, int(match[3] or 1)))[:1000]
        if parallel.isdigit():
            self.put(("sweep", "parallel"), int(parallel))
        self.note("carried", f"{text} -> sweep", line)

    def box_option(self, option: str, value: str, line: int, text: str) -> bool:
        """Options of pyxis, shifter and CSCS' container engine."""
        where: dict[str, tuple[str, Any]] = {
            "container-image": ("image", value), "image": ("image", value.removeprefix("docker:")),
            "container-workdir": ("workdir", value), "container-name": ("name", value),
            "container-writable": ("writable", True), "container-readonly": ("writable", False),
            "container-mount-home": ("mount_home", True), "no-container-mount-home": ("mount_home", False),
            "container-remap-root": ("remap_root", True), "no-container-remap-root": ("remap_root", False),
            "container-entrypoint": ("entrypoint", True), "no-container-entrypoint": ("entrypoint", False),
            "container-mounts": ("mounts", value.split(",")), "volume": ("mounts", value.split(";")),
            "container-env": ("host_env", value.split(",")), "module": ("modules", value.split(",")),
            "environment": ("environment", value),
        }  # fmt: skip
        if option not in where:
            return False
        key, made = where[option]
        if key == "name" and ":" in str(made):
            made = str(made).partition(":")[0]
        self.put(("container", key), made, line, text)
        if option in ("image", "volume", "module"):
            self.put(("container", "runtime"), "shifter")
        return True

    # -- commands, in order

    def commands(self, commands: Iterable[Command], start: _Start | None = None) -> None:
        """`start` is what stands around them: srun with its options, a container."""
        for command in commands:
            if "substitution" in command.inside or not command.argv:
                continue
            if "never" in command.inside:
                self.note("left out", f"{_flat(command.text)}: its condition does not hold here", command.line)
                continue
            if self.environment(command, start):
                continue
            found = self.peel(command, start)
            if found is None:
                continue
            self.starts.append(found)
            known = programs.read(found.argv)
            if (found.stepped or (known and known.launcher != "python")) and not programs.serves(found.argv):
                self.started = not programs.PREPARES.search(" ".join(said(word) for word in found.argv[:4]))

    def peel(self, command: Command, around: _Start | None) -> _Start | None:
        """What a command starts, behind srun, containers, numactl and the like; None when it was dealt with."""
        now = around or _Start((), command.line)
        now = replace(
            now,
            argv=command.argv,
            line=command.line,
            background=command.background or now.background,
            inside=(*now.inside, *command.inside),
            own=(*now.own, *((one.name, one.value) for one in command.assignments if one.value)),
        )
        while now.argv:
            name = basename(said(now.argv[0]))
            if name == "srun":
                options, rest = shell.options(now.argv[1:])
                while len(rest) > 1 and _holds_options(rest):
                    self.note("left out", f"srun {rest[0].text}: no line says what it holds", command.line)
                    more, rest = shell.options(rest[1:])
                    options += more
                now = replace(now, argv=rest, options=(*now.options, *options), stepped=True)
            elif name == "env":
                behind = list(now.argv[1:])
                own = list(now.own)
                while behind and re.fullmatch(r"-[a-z0-9]|--?|--[a-z-]+(=.*)?", behind[0].partial):
                    flag = behind.pop(0).partial
                    dropped = f"env {flag}"
                    if flag in ("-u", "--unset", "-C", "--chdir", "-S", "--split-string") and behind:
                        dropped += f" {said(behind.pop(0))}"
                    self.note("left out", f"{dropped}: a job file says what a program gets", command.line)
                while behind and (match := re.match(r"([A-Za-z_]\w*)=", behind[0].partial)):
                    own.append((match[1], shell.cut(behind.pop(0), len(match[0]))))
                now = replace(now, argv=tuple(behind), own=tuple(own))
            elif name in programs.WRAPPERS and len(now.argv) > 1:
                rest = programs.unwrapped(name, now.argv[1:])
                head = now.argv[: len(now.argv) - len(rest)]
                if name == "numactl" and all(word.value is not None for word in head):
                    now = replace(now, prefix=(*now.prefix, *head))
                elif name not in ("exec", "time", "nohup", "stdbuf", "command"):
                    dropped = " ".join(said(word) for word in now.argv[: len(now.argv) - len(rest)])
                    self.note("left out", f"{dropped}: {programs.WRAPPERS[name]}", command.line)
                now = replace(now, argv=rest)
            elif name in ("apptainer", "singularity", "shifter") and len(now.argv) > 1:
                box, rest = self.boxed(name, now.argv[1:], command.line)
                if not rest or box is None:
                    return None
                now = replace(now, argv=rest, box={**now.box, **box})
            elif name == "uv" and len(now.argv) > 2 and said(now.argv[1]) == "run":
                rest = programs.unwrapped("uv", now.argv[2:])
                self.put(("uv",), {"project": "."}, command.line, "uv run")
                if rest and said(rest[0]).endswith(".py"):
                    rest = (programs.made("python", rest[0]), *rest)
                now = replace(now, argv=rest)
            elif name in ("conda", "mamba", "micromamba") and len(now.argv) > 2 and said(now.argv[1]) == "run":
                now = self.conda_run(name, now, command.line)
            else:
                break
        if not now.argv:
            return None
        name = basename(said(now.argv[0]))
        nested = command.script
        opens = name in ("bash", "sh", "zsh", "dash", "eval")
        opens = opens or said(now.argv[0]).removeprefix("./") in self.script.files
        if name == "eval":
            self.comment_in(now)
        if opens and nested is not None and nested.commands:
            self.commands(nested.commands, now)
            return None
        if name in programs.MPI and (name in programs.ELSEWHERE or not self.reaches or now.box):
            self.refuse_mpi(name, command)
        if now.stepped and programs.changes(now.argv) and not programs.read(now.argv):
            bare = replace(command, argv=now.argv)
            if name == "mkdir":
                self.directories(bare)
            elif not self.staged(bare):
                self.keep(bare)
            return None
        if now.stepped or programs.read(now.argv) or programs.looks_like_work(now.argv):
            if programs.informs(now.argv, nested):
                self.note("left out", f"{_short(command.text)}: it prints, and the preflight looks closer", now.line)
                return None
            return now
        self.note("left out", f"{_short(command.text)}: it is neither training nor known preparation", command.line)
        return None

    def comment_in(self, start: _Start) -> None:
        """eval "$CMD" with `--a 1 # depth --b 2` in it: bash takes the rest of the line for a comment."""
        text = " ".join(word.partial for word in start.argv[1:])
        for found in re.finditer(r"(?:^|\s)#([^\n]*)", text):
            before = text[: found.start()]
            if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
                message = f"to eval a comment begins at `#{found[1].rstrip()}`: none of it reached the program"
                self.fill(("train",), message, start.line)
                return

    reaches = True  # what runs on the first node may start the ranks of all: train.launcher: job

    def refuse_mpi(self, name: str, command: Command) -> None:
        hint = (
            "one Slurm task per rank does the same: train.launcher: srun with the program's own line; "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set for every rank"
        )
        message = f"{name} starts these ranks, and dslaunch cannot watch what another launcher starts on other nodes"
        if name not in programs.ELSEWHERE:
            message = f"{name} inside a container starts ranks on other nodes, where the container is not"
            hint = f"{hint}; or enter the container behind {name}"
        raise UserError(Problem(message, hint, where=f"{self.script.name}:{command.line}:{command.column}"))

    def conda_run(self, name: str, now: _Start, line: int) -> _Start:
        rest = list(now.argv[2:])
        while rest and said(rest[0]).startswith("-"):
            flag = said(rest.pop(0))
            if flag in ("-n", "--name", "-p", "--prefix") and rest:
                self.conda(rest.pop(0), name, line)
        return replace(now, argv=tuple(rest))

    def conda(self, word: Word, tool: str, line: int) -> None:
        section: dict[str, Any] = {"env": self.path(word, ("conda",), line)}
        if tool != "conda":
            section["tool"] = tool
        if self.conda_root:
            section["root"] = self.conda_root
        if self.fields.get("venv"):
            del self.fields["venv"]
        self.put(("conda",), section["env"] if len(section) == 1 else section, line, f"{tool} activate")

    def boxed(self, name: str, argv: Sequence[Word], line: int) -> tuple[dict[str, Any] | None, tuple[Word, ...]]:
        """apptainer exec --nv -B a:b image.sif program ..."""
        words = list(argv)
        box: dict[str, Any] = {"runtime": name}
        if name != "shifter":
            while words and said(words[0]) in ("-q", "--quiet", "-s", "--silent", "-v", "--debug", "-d"):
                words.pop(0)
            if not words or said(words[0]) not in ("exec", "run"):
                self.note(
                    "left out", f"{name} {said(words[0]) if words else ''}: only exec and run start programs", line
                )
                return None, ()
            words.pop(0)
        mounts: list[Any] = []
        args: list[str] = []
        while words and said(words[0]).startswith("-"):
            word = words.pop(0)
            flag, equals, _ = said(word).partition("=")
            takes = flag in programs.BOX_VALUES
            value = shell.cut(word, len(flag) + 1) if equals else (words.pop(0) if takes and words else None)
            if flag in ("-B", "--bind", "--mount", "--volume", "-V") and value:
                mounts += self.mounts(value, line)
            elif flag in ("--pwd", "--cwd", "--workdir") and value:
                box["workdir"] = self.path(value, ("container", "workdir"), line)
            elif flag in ("--nv", "--nvccli", "--rocm"):
                box["gpus"] = "rocm" if flag == "--rocm" else "nv"
            elif flag in ("-e", "--cleanenv"):
                box["clean_env"] = True
            elif flag in ("--no-home",):
                box["mount_home"] = False
            elif flag in ("--writable", "-w"):
                box["writable"] = True
            elif flag == "--env" and value:
                self.listed(value, line)
            elif flag in ("--image", "-i") and value:
                box["image"] = self.path(value, ("container", "image"), line)
            elif flag in ("--module", "-m") and value:
                box["modules"] = said(value).split(",")
            else:
                args.append(flag if value is None else f"{flag}={said(value)}")
        flags = " ".join(said(word) for word in argv[: len(argv) - len(words)])
        self.note("carried", f"{name} {flags} -> container", line)
        if name != "shifter" and words:
            box["image"] = self.path(words.pop(0), ("container", "image"), line)
        if isinstance(box.get("image"), str):
            box["image"] = box["image"].removeprefix("docker:") if name == "shifter" else box["image"]
        if mounts:
            box["mounts"] = mounts
        if args:
            box["args"] = args
        return box, tuple(words)

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

    # -- what prepares

    def environment(self, command: Command, start: _Start | None) -> bool:
        """Modules, activations, cd and everything else that starts no program of interest. True: dealt with."""
        words = [said(word) for word in command.argv]
        name, line = words[0], command.line
        if name == "mkdir":
            self.directories(command)
        elif name in ("module", "ml"):
            self.module(words[1:] if name == "module" else ["load", *words[1:]], command)
        elif name in ("source", ".") and len(words) > 1:
            self.source(command, command.argv[1])
        elif name in ("conda", "mamba", "micromamba", "pyenv") and words[1:2] in (["activate"], ["deactivate"]):
            if words[1] == "activate" and len(words) > 2:
                self.conda(command.argv[2], name, line)
            else:
                self.note("left out", f"{_flat(command.text)}: a batch job begins without an environment", line)
        elif name == "eval" and ("shell.bash" in command.text or "shell hook" in command.text):
            match = re.search(r"(\S+)/bin/(conda|mamba|micromamba)\b", command.text)
            if match:
                self.conda_root = match[1].lstrip("\"'$(") if not re.search(r"[${]", match[1]) else None
                if not self.conda_root:
                    inner = match[1].lstrip("\"'").removeprefix("$(")
                    self.conda_root = self.reference(inner)
            self.note("left out", f"{_short(command.text)}: dslaunch activates conda itself", line)
        elif (name == "cd" and not command.inside) or (name in ("cd", "pushd") and start is not None):
            if len(words) > 1 and not self.started:
                self.workdir(command.argv[1], line, _short(command.text))
            else:
                self.note("left out", f"{_flat(command.text)}: {AFTER if self.started else 'it goes nowhere'}", line)
        elif name == "ulimit":
            self.keep(command)
        elif name == "sbcast":
            self.sbcast(command)
        elif name in ("tar", "cp", "rsync", "unzip") and self.staged(command):
            pass
        elif name == "env" and any("=" not in word and not word.startswith("-") for word in words[1:]):
            return False
        elif name in programs.QUIET or name.startswith("log"):
            if self.started and name in programs.CHANGES:
                self.note("left out", f"{_flat(command.text)}: {AFTER}", line)
            elif name in programs.WHY:
                self.note("left out", f"{_flat(command.text)}: {programs.WHY[name]}", line)
            else:
                self.printed.append(command)
        elif name in self.script.functions or name in ("function", "export", "return", "local", "declare"):
            pass
        elif name in ("uv", "pip", "pip3", "poetry", "pixi") and words[1:2] != ["run"]:
            if name == "uv" and words[1:2] == ["sync"]:
                self.put(("uv",), {"project": ".", "sync": True}, line, "uv sync")
            else:
                self.keep(command)
        elif (start is not None and not programs.read(command.argv) and programs.prepares(words, command)) or (
            start is None and programs.prepares(words, command)
        ):
            self.keep(command)
        else:
            return False
        return True

    def directories(self, command: Command) -> None:
        """mkdir as a line of setup; on a local disk `stage` makes what it needs."""
        words = [word for word in command.argv[1:] if not said(word).startswith("-")]
        if words and all(any(piece.meaning == "local-disk" for piece in word.pieces) for word in words):
            self.note("left out", f"{_flat(command.text)}: stage makes the directories that it needs", command.line)
        else:
            self.keep(command)

    def keep(self, command: Command) -> None:
        """A line of setup, as it was written where nothing in it was resolved."""
        if self.started or any(word in ("for", "while", "case", "if") for word in command.inside):
            why = AFTER if self.started else "it stands in a condition or a loop"
            self.note("left out", f"{_flat(command.text)}: {why}", command.line)
            return
        if any(SECRET_VALUE.regex.fullmatch(word.partial) for word in command.argv):
            why = "it holds a secret; secrets: {NAME: {from_env: NAME}} hands one over"
            self.note("left out", f"{_short(command.text)}: {why}", command.line)
            return
        words = [f"{one.name}={_shell_word(one.value)}" for one in command.assignments if one.value is not None]
        for word in command.argv:
            text = word.value
            home = text is not None and text.startswith("~/") and word.quoting == "none"
            words.append(_shell_word(word) if text is None else text if home else shlex.quote(text))
        line = " ".join(words)
        if command.argv and said(command.argv[0]) == "mkdir":  # every node runs it, each time
            line = re.sub(r"^mkdir (?!.*-p)", "mkdir -p ", line)
            if self.setup and self.setup[-1].startswith("mkdir -p ") and line.startswith("mkdir -p "):
                more = [word for word in line[9:].split(" ") if word not in self.setup[-1].split(" ")]
                line = " ".join([self.setup.pop(), *more])
        if command.after == "||":
            line += " || true"
        if line not in self.setup:
            self.setup.append(line)
            self.note("kept", f"{_flat(command.text)} -> setup", command.line)

    def module(self, words: Sequence[str], command: Command) -> None:
        words = [word for word in words if word not in ("-q", "--quiet", "-s", "--silent", "--force", "-f", "--auto")]
        verb = words[0] if words else ""
        rest = list(words[1:])
        if verb == "load" and rest[:1] and rest[0] in MODULE_VERBS:  # ml purge
            verb, rest = rest[0], rest[1:]
        if any("$" in word for word in rest) and verb != "use":
            self.keep(command)
        elif verb in ("load", "add", "try-load", "use", "swap", "switch", "sw") and set(command.inside) & {
            "if",
            "case",
        }:
            message = f"{_flat(command.text)} stands in a condition of the script: say it here where it holds"
            self.fill(("modules",), message, command.line)
        elif verb in ("load", "add", "try-load"):
            for one in rest:
                if one.startswith("-"):
                    self.modules["unload"].append(one[1:])
                elif one not in self.modules["load"]:
                    self.modules["load"].append(one)
            self.note("carried", f"module load {' '.join(rest)} -> modules", command.line)
        elif verb in ("purge", "reset"):
            self.modules["purge"] = True
            self.note("carried", f"{_flat(command.text)} -> modules.purge", command.line)
        elif verb == "use":
            words_behind = [word for word in command.argv if said(word) in rest]
            paths = [self.path(word, ("modules", "use"), command.line) for word in words_behind
                     if not said(word).startswith("-")]  # fmt: skip
            self.modules["use"] += paths
            self.note("carried", "module use -> modules.use", command.line)
        elif verb in ("unload", "rm", "del"):
            self.modules["unload"] += rest
        elif verb in ("swap", "switch", "sw") and len(rest) == 2:
            self.modules["swap"][rest[0]] = rest[1]
        elif verb in ("swap", "switch", "sw") and len(rest) == 1:
            self.modules["load"].append(rest[0])
        elif verb in ("list", "avail", "show", "spider", "whatis", ""):
            self.printed.append(command)
        else:
            self.keep(command)

    def source(self, command: Command, word: Word) -> None:
        text = said(word)
        line = command.line
        if basename(text) == "activate" and "/bin/" in text and len(command.argv) == 2:
            trimmed = _without_end(word, "/bin/activate")
            if any(piece.meaning == "local-disk" for piece in word.pieces):
                self.keep(command)
                return
            self.put(("venv",), self.path(trimmed, ("venv",), line), line, f"source {text}")
        elif basename(text) == "activate" and len(command.argv) > 2:
            if "/bin/" in text and not self.conda_root:
                self.conda_root = self.path(_without_end(word, "/bin/activate"), ("conda", "root"), line)
            self.conda(command.argv[2], "conda", line)
        elif text.endswith(("/etc/profile.d/conda.sh", "/etc/profile.d/mamba.sh")):
            if "$(" in text:
                self.conda_root = None
            else:
                end = "/etc/profile.d/" + basename(text)
                self.conda_root = self.path(_without_end(word, end), ("conda", "root"), line)
            self.note("left out", f"{_short(command.text)}: dslaunch activates conda itself", line)
        elif re.search(
            r"(/etc/profile(\.d/(modules|lmod|z00_lmod)\.sh)?|bashrc|lmod/init/bash|modules/init/bash)$", text
        ):
            self.note("left out", f"{_short(command.text)}: dslaunch finds the module command itself", line)
        else:
            self.keep(command)

    def workdir(self, word: Word, line: int, text: str) -> None:
        value = self.path(word, ("train", "workdir"), line)
        if value in (".", "..", "-", "", "~"):
            self.note("left out", f"{text}: a job begins in the job file's directory", line)
            return
        self.put(("train", "workdir"), value, line, text)

    def sbcast(self, command: Command) -> None:
        words = [word for word in command.argv[1:] if not said(word).startswith("-")]
        if len(words) == 2:
            self.stage(words[0], words[1], command, unpack=False)

    def staged(self, command: Command) -> bool:
        """tar -xf a.tar -C $SLURM_TMPDIR, cp or rsync to a local disk."""
        if self.started:
            return False
        words = list(command.argv[1:])
        local = [word for word in words if any(piece.meaning == "local-disk" for piece in word.pieces)]
        if not local:
            return False
        if command.name == "tar":
            archive = next((word for word in words if re.search(r"\.(tar|tgz|tar\.\w+|tzst)$", said(word))), None)
            if archive is None:
                return False
            self.stage(archive, local[-1], command, unpack=True)
            return True
        plain = [word for word in words if not said(word).startswith("-")]
        if len(plain) < 2 or plain[-1] is not local[-1]:
            return False
        for source in plain[:-1]:
            self.stage(source, plain[-1], command, unpack=False)
        return True

    unpacked = ""  # where an archive lies that the script unpacks into the local disk itself

    def local(self, behind: str) -> str:
        """$TMPDIR as it is there: /data/x of an archive unpacked into it is below the archive's own directory."""
        copied = any(row["to"] != self.unpacked and f"{behind}/".startswith(f"/{row['to']}/")
                     for row in self.fields.get("stage", []))  # fmt: skip
        return "${DSLAUNCH_LOCAL}" + (f"/{self.unpacked}" if self.unpacked and not copied else "")

    def stage(self, source: Word, to: Word, command: Command, *, unpack: bool) -> None:
        pieces = [piece for piece in to.pieces if piece.meaning != "local-disk"]
        place = "".join(piece.shown for piece in pieces)
        below = len(pieces) != len(to.pieces)
        place = place.lstrip("/") if below else place
        if unpack and below and not place.strip("/"):  # a copy has a directory of its own
            self.unpacked = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", basename(said(source)))
            self.note("carried", f"what {self.unpacked} holds is in $DSLAUNCH_LOCAL/{self.unpacked}", command.line)
        if not place or place.endswith("/"):
            name = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", basename(said(source).rstrip("/"))) if unpack else ""
            place += (name if unpack and place else "") or basename(said(source).rstrip("/"))
            if unpack:
                place = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", place)
        earlier = self.fields.get("stage", [])
        whole = "".join("" if piece.meaning == "local-disk" else piece.text for piece in source.pieces).lstrip("/")
        local = any(piece.meaning == "local-disk" for piece in source.pieces)
        copied = next((one for one in earlier if local and one["to"] == whole), None)
        if copied is not None and unpack:  # sbcast a.tar /mnt/bb/..., then tar -xf of it
            copied.pop("unpack", None)
            copied["to"] = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", place)
            self.note("carried", f"{_flat(command.text)} -> stage.unpack", command.line)
            return
        row: dict[str, Any] = {"source": self.path(source, ("stage",), command.line), "to": place}
        if not unpack and re.search(r"\.(tar|tgz|tar\.\w+|squashfs|sqsh)$", said(source)):
            row["unpack"] = False
        self.fields.setdefault("stage", []).append(row)
        self.note("carried", f"{_short(command.text)} -> stage", command.line)

    # -- variables

    def exports(self) -> None:
        spliced = {name for command in self.script.everything() for name in _names_in(command)}
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
                kept[one.name] = (value, one.line)
        for name, (word, line) in kept.items():
            text = said(word)
            if name in spliced and name not in programs.RENDEZVOUS and _for_the_script(name, text):
                self.note("left out", f"{name}={_flat(text)}: it stands in the command by now", line)
                continue
            self.variable(name, word, line)

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
        text = said(word)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return
        if name in ("APPTAINER_BIND", "SINGULARITY_BIND", "APPTAINER_BINDPATH", "SINGULARITY_BINDPATH"):
            mounts = self.fields.setdefault("container", {}).setdefault("mounts", [])
            mounts += [one for one in self.mounts(word, line) if one not in mounts]
            self.note("carried", f"{name} -> container.mounts", line)
        elif name == "SLURM_CPU_BIND":
            self.put(("slurm", "cpu_bind"), text, line, name)
        elif name in OWN_GPU and word.meaning == "local-rank":
            self.put(("train", "visible_gpus"), "own", line, name)
        elif name in programs.RENDEZVOUS or name in NOT_YOURS or name.startswith(tuple(NOT_YOUR_PREFIXES)):
            why = programs.RENDEZVOUS.get(name) or NOT_YOURS.get(name) or next(
                (why for prefix, why in NOT_YOUR_PREFIXES.items() if name.startswith(prefix)), ""
            )  # fmt: skip
            self.note("left out", f"{name}: {why}", line)
        elif (SECRET_NAME.regex.fullmatch(name) and not name.endswith("_DIR")) or SECRET_VALUE.regex.fullmatch(text):
            self.put(("secrets", name), {"from_env": name})
            self.note("carried", f"{name} -> secrets: its value stays in the shell that submits", line)
        elif name in ("NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
            self.note("left out", f"{name}: dslaunch sets TORCH_NCCL_ASYNC_ERROR_HANDLING=3 itself", line)
        elif word.value is not None:
            self.env[self.renamed(name, line)] = (word.value, line)
        elif any(piece.meaning in NODES for piece in word.pieces):
            self.note("left out", f"{name}={_flat(word.text)}: {programs.RENDEZVOUS['NODES']}", line)
        elif name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LIBRARY_PATH", "CPATH", "MANPATH"):
            self.path_variable(name, word, line)
        else:
            value = self.path(word, ("env", name), line, tidy=False, soft=True)
            if value is not None and not isinstance(value, str):
                self.env[name] = (value, line)
            elif value is not None and any(piece.meaning == "submit-dir" for piece in word.pieces):
                self.setup_line(f'export {name}="{_shell_text(word)}"', line, name)
            else:
                self.setup_line(f'export {name}="{_shell_text(word)}"', line, name)

    def path_variable(self, name: str, word: Word, line: int) -> None:
        self.setup_line(f'export {name}="{_shell_text(word)}"', line, name)

    def setup_line(self, text: str, line: int, what: str) -> None:
        if "\n" in text or "scontrol" in text or "MASTER_" in text:
            self.note("left out", f"{_flat(text)}: only a running job knows its value", line)
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

    # -- what was not understood

    def choices(self, trainer: _Start | None) -> None:
        """What a condition of the script would have made different."""
        scripts = [self.script, *(command.script for command in self.script.everything() if command.script)]
        used = self.used(trainer)
        told = set()
        for one in (choice for script in scripts for choice in script.choices):
            if one.taken == one.other or (one.name, one.other) in told:
                continue
            told.add((one.name, one.other))
            other, taken = _flat(one.other), _flat(one.taken)
            if one.name.isdigit():
                message = f"${{{one.name}}} is {taken or 'empty'} here, its default: {one.condition} may say another"
                self.note("left out", message, one.line)
                continue
            changed = f"makes it {other or 'empty'}"
            if other.startswith(taken) and len(taken) > 30:
                changed = f"adds {other.removeprefix(taken).strip()}"
            if SECRET_NAME.regex.fullmatch(one.name):
                continue
            message = f"{one.name}={_short(taken)} here; `{_flat(one.condition)}` {changed}"
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

    def used(self, trainer: _Start | None) -> set[str]:
        """Names of variables that the training's own line is made of, directly or through others."""
        if trainer is None:
            return set()
        lines = [command for command in self.script.everything() if command.line <= trainer.line <= command.end]
        found = {name for command in lines for name in _names_in(command)}
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
        elif self.needs.nodes is None and self.needs.tasks is None:
            self.note("left out", "no #SBATCH line says --nodes: 1, as sbatch takes it")
        if "time" not in self.fields.get("slurm", {}):
            self.note("left out", "no #SBATCH line says --time: the partition's default holds")
        train = self.fields.get("train", {})
        command = train.get("command") or []
        text = str(command[2]) if command[:2] == ["bash", "-c"] and len(command) > 2 else ""
        said_so = " ".join(self.setup) + " ".join(f"{name}=" for name in self.fields.get("env", {}))
        names = dict.fromkeys(re.findall(r"(?<!\\)\$\{?([A-Za-z_]\w*)", text))
        sourced = any(re.match(r"(source|\.) ", line) for line in self.setup)
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
            names = ", ".join(dict.fromkeys(_flat(command.text) for command in self.printed))
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
                    shown = _flat(" ".join(word.text for word in words))
                    self.note("left out", f"{one.name}={shown}: nothing that is carried over uses it", one.line)
            for command in script.commands:
                if "substitution" in command.inside or command.name in script.functions:
                    continue
                lost = [token for word in command.argv for token in _tokens(word) if token not in told]
                if lost and _flat(command.text).replace("{", "").replace("}", "") not in told and not command.script:
                    shown = " ".join([_flat(said(command.argv[0])), "...", *dict.fromkeys(lost)])
                    self.note("left out", f"{shown}: no field has it", command.line)

    # -- paths and run-time values

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
        found = _reference(pieces, job=at[:1] == ("env",))
        if found is not None:
            if tidy and "append" in found:
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

    # -- what trains

    def trainer(self) -> _Start | None:
        """The one start that trains; servers beside it become services, everything else is named in a note."""
        servers = [one for one in self.starts if programs.serves(one.argv)]
        others = [one for one in self.starts if one not in servers]
        if not others:
            return None
        scored = [(self.score(one), -index, one) for index, one in enumerate(others)]
        best = max(scored, key=lambda row: row[:2])
        chosen = best[2]
        for _, index, one in scored:
            if one is chosen:
                continue
            text = " ".join(said(word) for word in one.argv)
            text += "".join(f" {option.word.text}" for option in one.options)
            if [said(word) for word in one.argv[:3]] == [said(word) for word in chosen.argv[:3]]:
                self.note("left out", f"{text}: the same program again; a job file starts one", one.line)
            elif -index < -best[1]:
                self.note("left out", f"{text}: it prepares; run it before, or as a line of setup", one.line)
            else:
                self.note("left out", f"{text}: {AFTER}", one.line)
        for one in servers:
            self.service(one, chosen)
        return chosen

    def score(self, start: _Start) -> float:
        found = programs.read(start.argv)
        score = 1.0
        if found and found.launcher not in ("python", "node"):
            score = 4.0
        elif start.stepped:
            score = 3.0 if found or programs.looks_like_work(start.argv) else 2.5
            score -= 2.0 if programs.FETCHES.match(basename(said(start.argv[0]))) else 0.0
        elif found is None:
            score = 0.5
        alone = start.number("ntasks") == 1 or (start.number("nodes") == 1 and not start.number("ntasks"))
        if start.stepped and alone and (self.needs.nodes or 1) > 1 and "for" not in start.inside:
            score -= 2.2
        if programs.PREPARES.search(" ".join(said(word) for word in start.argv[:4])):
            score -= 2.5
        if any(said(word) in ("ray", "submit") for word in start.argv[:1]) and "submit" in map(said, start.argv):
            score += 2
        return score

    def service(self, start: _Start, trainer: _Start) -> None:
        name = programs.service_name(start.argv)
        start = replace(start, argv=self.arguments(start.argv))
        taken = [row["name"] for row in self.services]
        while name in taken:
            name = f"{name}-{len(taken) + 1}"
        nodes = start.number("nodes") or start.number("ntasks") or 1
        row: dict[str, Any] = {"name": name, "command": self.command(start, trainer=False)}
        box = self.box(start)
        if box.get("image"):
            row["container"] = box["image"] if set(box) == {"image"} else box
        if nodes != 1:
            row["nodes"] = nodes
        if not start.stepped or (start.option("nodelist") in (None, "") and start.option("nodes") is None):
            row["on"] = "first"
        ports = [said(word) for flag, word in zip(start.argv, start.argv[1:], strict=False) if said(flag) == "--port"]
        ports += [said(word)[7:] for word in start.argv if said(word).startswith("--port=")]
        if ports and ports[0].isdigit():
            row["port"] = int(ports[0])
            row["ready"] = {"port": int(ports[0])}
        group = start.option("het-group") or ""
        if group.isdigit() and 0 < int(group) <= len(self.components):
            self.component(row, self.components[int(group) - 1])
        gpus = start.number("gpus") or start.number("gpus-per-node")
        if gpus is not None and gpus != self.needs.gpus_per_node:
            row["gpus_per_node"] = gpus
        if name.startswith("ray"):
            self.ray(row, start)
        self.services.append(row)
        self.fields.setdefault("services", []).append(row)
        shown = " ".join(said(word) for word in start.argv)
        share = " ".join(one.word.text for one in start.options if one.name in OF_A_STEP)
        self.note("carried", f"{_short(shown)} -> services" + (f"; srun {share}" if share else ""), start.line)

    def box(self, start: _Start) -> dict[str, Any]:
        """The container of a step: of apptainer before its program, or of srun's options."""
        job = self.fields.pop("container", None)
        self.fields["container"] = dict(start.box)
        for one in start.options:
            if one.name.startswith("container") and one.value is not None:
                text, path = f"srun {one.word.partial}", ("services",)
                if one.name == "container-mounts":
                    self.put(("container", "mounts"), self.mounts(one.value, start.line), start.line, text)
                elif one.name == "container-image":
                    self.put(("container", "image"), self.path(one.value, path, start.line), start.line, text)
                elif one.value.value is not None:
                    self.box_option(one.name, one.value.value, start.line, text)
        found: dict[str, Any] = self.fields.pop("container")
        if job is not None:
            self.fields["container"] = job
        return found

    def component(self, row: dict[str, Any], group: Mapping[str, str]) -> None:
        """Nodes of another kind, as a component of a heterogeneous job has them."""
        names = ("partition", "account", "qos", "constraint")
        row["component"] = {name: group[name] for name in names if group.get(name)}
        if "exclusive" in group:
            row["component"]["exclusive"] = True
        row.pop("on", None)
        if (_number(group.get("nodes", "")) or 1) != 1:
            row["nodes"] = int(group["nodes"])
        kind, _, count = (group.get("gpus-per-node") or group.get("gres", "")).removeprefix("gpu:").rpartition(":")
        row["gpus_per_node"] = _number(count) or 0
        if kind:
            row["component"]["gpu_type"] = kind
        if _number(group.get("cpus-per-task", "")):
            row["cpus_per_node"] = int(group["cpus-per-task"]) * (_number(group.get("ntasks-per-node", "")) or 1)
        if group.get("mem"):
            row["memory"] = _size(group["mem"])

    def ray(self, row: dict[str, Any], start: _Start) -> None:
        """`ray start` as services: the head beside the driver, workers on nodes of their own."""
        if row["name"] == "ray-head":
            port = next(
                (said(word).partition("=")[2] for word in start.argv if said(word).startswith("--port")), "6379"
            )
            row["on"], row["port"] = "first", int(port) if port.isdigit() else 6379
            row.pop("nodes", None)
            row["ready"] = {"port": row["port"]}
            gpus = self.gpus(start, None)
            row["command"] = ["bash", "-c", "exec " + programs.ray_head(start.argv, gpus)]
            row["gpus_per_node"] = gpus or 1
            if not gpus:
                at = len(self.services)
                self.fill(("services", at, "gpus_per_node"), "as many as the job has on a node", start.line)
        else:
            row["nodes"] = max((self.needs.nodes or 2) - 1, 1)
            row.pop("on", None)
            row["after"] = ["ray-head"]
            row["command"] = [
                "bash", "-c",
                f'exec {said(start.argv[0])} start --block '
                '--address="${DSLAUNCH_HOST_RAY_HEAD}:${DSLAUNCH_PORT_RAY_HEAD}"',
            ]  # fmt: skip

    def command(self, start: _Start, *, trainer: bool = True) -> list[Any]:
        """argv where everything is known, else a line of shell that is expanded where it runs."""
        words = self.own_variables(start, trainer)
        plain = [self.plain(word) for word in start.argv]
        if all(word is not None for word in plain) and not words:
            return plain
        line = " ".join(
            self.run_time(word, before) for before, word in zip((None, *start.argv), start.argv, strict=False)
        )
        return ["bash", "-c", " ".join([*words, "exec", line] if not words else ["exec", "env", *words, line])]

    def own_variables(self, start: _Start, trainer: bool) -> list[str]:
        """A=1 before a program: the trainer's are the job's, a service's stand in its line."""
        found = []
        for name, word in start.own:
            if trainer:
                continue
            found.append(f"{name}={self.run_time(word, None)}")
        return found

    def arguments(self, words: Iterable[Word]) -> tuple[Word, ...]:
        """$1 and "$@" of a script are sbatch's arguments: the user says them."""
        found: list[Word] = []
        for word in words:
            if [piece.name for piece in word.pieces if piece.name or piece.text] in (["@"], ["*"]):
                self.note("left out", f"{word.text}: whatever sbatch was told behind the script's name", word.line)
                continue
            pieces = []
            if SECRET_VALUE.regex.fullmatch(word.partial):
                found.append(self.secret(word, found[-1] if found else None))
                continue
            for piece in word.pieces:
                if SECRET_NAME.regex.fullmatch(piece.name):
                    self.put(("secrets", piece.name), {"from_env": piece.name})
                if re.fullmatch(r"[0-9@*]", piece.name):
                    self.fill(("train",), f"{piece.text} stands for an argument of the script's", word.line)
                    piece = Piece(f"FILL_IN_ARGUMENT_{piece.name if piece.name.isdigit() else 'ALL'}")
                pieces.append(piece)
            found.append(replace(word, pieces=tuple(pieces)))
        return tuple(found)

    def secret(self, word: Word, before: Word | None) -> Word:
        """A secret in plain text on a command line: a variable that the shell that submits has."""
        flag, equals, _ = word.partial.partition("=")
        said_before = flag if equals else said(before) if before else ""
        name = re.sub(r"\W+", "_", said_before.strip("-")).upper() or "SECRET"
        name = "HF_TOKEN" if "hf_" in word.partial else name if SECRET_NAME.regex.fullmatch(name) else f"{name}_TOKEN"
        self.put(("secrets", name), {"from_env": name})
        self.note(
            "carried", f"a secret in the program's arguments -> secrets.{name}: export it, and renew it", word.line
        )
        head = (Piece(f"{flag}="),) if equals else ()
        return replace(word, pieces=(*head, Piece(f"${name}", name, "secret")))

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
        return _reference(pieces, job=True)

    def run_time(self, word: Word, before: Word | None) -> str:
        """A word for `bash -c`, with names that mean the same in a job of dslaunch's."""
        if word.value is not None:
            return shlex.quote(word.value)
        parts = []
        hint = (said(before) if before else "") + word.text
        previous = ""
        suffix = self.fields.get("slurm", {}).get("address_suffix", "")
        for at, piece in enumerate(word.pieces):
            if piece.meaning == "local-disk":
                parts.append(self.local("".join(one.text for one in word.pieces[at + 1 :] if not one.name)))
            elif not piece.name:
                # the name of the first node has it by then
                text = piece.text.removeprefix(suffix) if previous == "host" else piece.text
                parts.append(_inside_quotes(text))
                hint += piece.text
            elif piece.meaning == "time" and any(one.meaning == "job-id" for one in word.pieces):
                self.expression(piece, port=False)  # run_${SLURM_JOB_ID}_$(date +%F): the id stands there already
                if parts:
                    parts[-1] = parts[-1].rstrip("_-.")
            else:
                parts.append(self.expression(piece, port=bool(re.search(r"(?i)port", hint)) or previous == "host"))
            previous = "host" if piece.meaning == "first-node" else (previous if piece.text == ":" else "")
        text = "".join(parts)
        lone = len(word.pieces) == 1 and not word.meaning and not word.pieces[0].quoted and word.quoting == "none"
        if lone and word.pieces[0].name.isidentifier() and not SECRET_NAME.regex.fullmatch(word.pieces[0].name):
            return text  # it may hold several words
        return f'"{text}"'

    def expression(self, piece: Piece, *, port: bool) -> str:
        meaning = piece.meaning
        if meaning in ("job-id", "random", "time") and port:
            return "${MASTER_PORT}"
        if meaning in ("random", "time"):
            message = f"{piece.text} -> the job's id: one name for every rank and attempt"
            if message not in [note.message for note in self.notes]:
                self.note("carried", message)
        if meaning == "hosts" and self.services:
            name = self.services[0]["name"].upper().replace("-", "_")
            return f"${{DSLAUNCH_HOST_{name}}}"
        simple = {
            "first-node": "${MASTER_ADDR}", "this-address": "${MASTER_ADDR}", "node-rank": "${NODE_RANK}",
            "rank": "${RANK}", "local-rank": "${LOCAL_RANK}", "tasks": "${WORLD_SIZE}", "this-node": "$(hostname)",
            "local-disk": "${DSLAUNCH_LOCAL}", "submit-dir": "${PWD}", "time": "${SLURM_JOB_ID}",
            "random": "${SLURM_JOB_ID}", "array-index": "${ARRAY_INDEX}",
        }  # fmt: skip
        if meaning in ("rank", "local-rank", "tasks") and self.fields["train"].get("launcher") == "node":
            tasks = self.needs.tasks_per_node or 1
            if tasks > 1 or meaning == "local-rank":
                self.fill(("train", "launcher"), f"{piece.shown} counts {tasks} tasks on a node, and node starts one")
        if meaning == "array-index" and "[" in piece.name:
            return "${" + _one_of(piece.name.partition("[")[0]) + "}"
        if meaning == "tasks" and self.whole:
            return "${SLURM_NTASKS}"
        if meaning == "job-id":
            return f"${{{piece.name}}}" if piece.name.isidentifier() else "${SLURM_JOB_ID}"
        if meaning in simple:
            return simple[meaning]
        return f"${{{piece.name}}}" if piece.name.isidentifier() else piece.text

    def program(self, start: _Start) -> None:
        start = replace(start, argv=self.arguments(start.argv))
        if not start.argv:
            self.unknown("the program of this step is an argument of the script's", start.line)
            return
        start = self.swept(self.installed(start))
        for name, word in start.own:
            self.variable(name, word, start.line)
        if (start.option("het-group") or "0") != "0":
            message = f"the training runs in component {start.option('het-group')} of a heterogeneous job"
            self.fill(
                ("resources",), f"{message}: say its nodes and GPUs here, and its partition under slurm", start.line
            )
        if len(self.components) > sum("component" in row for row in self.services):
            self.note("left out", "#SBATCH hetjob: a component that runs no service", start.line)
        found = programs.read(start.argv) or Program("node", "command", None, start.argv)
        tasks = self.tasks_per_node(start)
        gpus = self.gpus(start, found)
        launcher: str = found.launcher
        self.whole = launcher == "job"
        if launcher == "python":
            several = start.stepped and (tasks or 0) > 1 and (not gpus or tasks == gpus)
            launcher = (
                "srun" if several or (start.stepped and (self.needs.tasks or 0) > (self.needs.nodes or 1)) else ""
            )
            if not launcher:
                launcher = (
                    "torchrun" if (gpus or 1) == 1 and not start.stepped else "node" if (gpus or 1) > 1 else "srun"
                )
        elif launcher == "node" and start.stepped and gpus and tasks == gpus and gpus > 1:
            launcher = "srun"
        if launcher != "torchrun":
            self.put(("train", "launcher"), launcher)
        self.note("carried", f"{_short(' '.join(said(word) for word in start.argv[:6]))} -> train", start.line)
        dropped = [text for text in found.dropped if text]
        if dropped:
            self.note(
                "left out", f"{' '.join(dropped)}: ranks and their meeting point are dslaunch's part", start.line
            )
        launcher_args: list[Any] = []
        for word in found.options:
            value = self.plain(word)
            if value is None:  # its flag goes with it, or would take the next argument for its value
                flag = launcher_args.pop() if launcher_args and re.match(r"-[^=]*$", str(launcher_args[-1])) else ""
                message = f"{flag} {_short(said(word))} is known to the script alone".strip()
                self.fill(("train",), f"launcher_args: {message}", start.line)
            else:
                launcher_args.append(value)
        if launcher_args:
            self.put(("train", "launcher_args"), launcher_args)
        arguments = self.config(found, start)
        self.megatron(arguments, start.line)
        plain = [self.plain(word) for word in arguments]
        target = None if found.target is None else self.plain(found.target)
        per_node = launcher in ("node", "job")
        if per_node or found.kind == "command" or any(word is None for word in plain) or target is None:
            words = [*found.head, *([found.target] if found.target else []), *arguments]
            whole = replace(start, argv=tuple(words), own=())
            self.put(("train", "command"), self.command(whole))
        else:
            self.put(("train", found.kind), _tidy_script(target) if found.kind == "script" else target)
            if isinstance(target, dict) and set(target) == {"env"}:
                message = (
                    f"no line of the script says what {target['env']} is: the program, with its arguments behind it"
                )
                self.fill(("train", found.kind), message, start.line)
            if plain:
                self.put(("train", "args"), plain)
        if found.note:
            self.note("carried", found.note, start.line)
        if start.prefix:
            prefix = [said(word) for word in start.prefix]
            self.put(("train", "prefix"), prefix, start.line, " ".join(prefix))
        for key, value in start.box.items():
            self.put(("container", key), value)
        if self.whole and start.options:
            boxes = tuple(
                one for one in start.options if one.name.startswith("container") or one.name == "environment"
            )
            others = " ".join(
                f"{one.word.text} {one.value.text if one.value else ''}" for one in start.options if one not in boxes
            )
            message = f"srun's options {_flat(others)}: dslaunch starts the program as the one task of a step"
            self.note("left out", message, start.line)
            start = replace(start, options=boxes)
        self.step_options(start)

    whole = False  # the program starts the ranks of all nodes itself

    def installed(self, start: _Start) -> _Start:
        """/envs/x/bin/torchrun is torchrun of the environment /envs/x; torchrun_jsc meets at other names."""
        word = start.argv[0]
        if basename(said(word)) == programs.JSC:
            slurm = self.fields.setdefault("slurm", {})
            slurm.setdefault("address_suffix", "i")
            self.note("carried", f"{said(word)} -> torchrun, with slurm.address_suffix", start.line)
        match = re.search(r"/bin/(torchrun|python[0-9.]*|accelerate|deepspeed)\Z", said(word))
        system = re.match(r"(/usr|/bin|/opt/conda/bin|/usr/local)\b|.*/\.local/bin/", said(word))
        if not match or system or not word.pieces or word.pieces[-1].name:
            return start
        given = self.path(_without_end(word, match[0]), ("venv",), start.line)
        active = [self.fields[key] for key in ("venv", "conda", "uv") if key in self.fields]
        name = "python" if match[1].startswith("python") else match[1]
        if not active:
            kind = "conda" if re.search(r"(?i)(conda|mamba|miniforge)[^/]*/(.*/)?envs/", said(word)) else "venv"
            self.put((kind,), given, start.line, said(word))
        elif given not in active:
            if name != "python":  # whose path stays in the command
                self.fill(
                    ("train",), f"{said(word)} is not the {name} of the environment that is activated", start.line
                )
            return start
        return replace(start, argv=(programs.made(name, word), *start.argv[1:]))

    def megatron(self, words: Sequence[Word], line: int) -> None:
        """Degrees and batches that Megatron's own arguments say: a DeepSpeed config is made of the same ones."""
        texts = [text for word in words for text in said(word).split("=", 1)]
        numbers = {flag.replace("_", "-"): int(value) for flag, value in pairwise(texts)
                   if flag.startswith("--") and re.fullmatch(r"[0-9][0-9_]{0,8}", value)}  # fmt: skip
        given = {path: numbers[flag] for flag, path in MEGATRON.items() if flag in numbers}
        if not any(flag in numbers for flag in ("--micro-batch-size", "--tensor-model-parallel-size")):
            return
        inner = numbers.get("--context-parallel-size", 1)
        if inner > 1:  # no field has it, and a batch of less ranks is another one
            self.note("left out", f"--context-parallel-size {inner} is the program's own: train has no batch", line)
            given = {path: value for path, value in given.items() if path[0] in ("seq_len", "steps")}
        for path, value in given.items():
            at = self.fields["train"]
            if path[0] == "parallel" and value == 1:
                continue
            if at.get(path[0]) not in (None, value) and len(path) == 1:
                message = f"the program is told {value}, its DeepSpeed config {at[path[0]]}"
                self.fill(("train", *path), message, line)
                continue
            self.put(("train", *path), value)
        if given:
            self.note("carried", f"what the program is told of its ranks and batches -> train ({len(given)})", line)

    def config(self, found: Program, start: _Start) -> tuple[Word, ...]:
        """Arguments without the DeepSpeed config that the script itself writes; it becomes fields."""
        words = list(found.arguments)
        for at, word in enumerate(words):
            flag, equals, inline = said(word).partition("=")
            if flag not in programs.CONFIG_FLAGS:
                continue
            value = inline if equals else (said(words[at + 1]) if at + 1 < len(words) else "")
            heredoc = self.script.files.get(value.removeprefix("./"))
            if not value or value.startswith("-"):
                continue
            if heredoc is not None and self.deepspeed(heredoc.text, heredoc.line):
                self.put(("train", "config_flag"), flag)
                return tuple(words[:at] + words[at + (1 if equals else 2) :])
            self.put(("train", "config_flag"), "none")
            self.note("carried", f"{flag} {value}: the program's own config stays (config_flag: none)", start.line)
            return tuple(words)
        self.put(("train", "config_flag"), "none")
        return tuple(words)

    def deepspeed(self, text: str, line: int) -> bool:
        """A DeepSpeed config as fields of train; what has no field stays under train.deepspeed."""
        try:
            config = json.loads(text)
        except ValueError:
            return False
        if not isinstance(config, dict):
            return False
        fields, rest = deepspeed.fields(config)
        for path, value in fields.items():
            self.put(("train", *path), value)
        if rest:
            self.put(("train", "deepspeed"), rest)
        self.note("carried", "the DeepSpeed config in the script -> train", line)
        return True

    def swept(self, start: _Start) -> _Start:
        """An array that picks values by its index, or a loop around the training: the same job for several values."""
        words = [*start.argv, *(option.value for option in start.options if option.value is not None)]
        looped = [piece.name for word in words for piece in word.pieces if piece.meaning == "loop"]
        looped += [name for word in words for name in self.script.loops
                   for piece in word.pieces if re.search(rf"\[\$?\{{?{name}\}}?\]", piece.name)]  # fmt: skip
        for name in dict.fromkeys(looped):
            values = self.script.loops.get(name)
            if self.over_nodes(name, values, start):
                start = self.one_of_the_nodes(name, values, start)
                continue
            if values is None or not any(piece.name == name for word in start.argv for piece in word.pieces):
                continue
            if any(re.search(r"[*?\[]", value) for value in values):
                message = f"for {name} in {' '.join(values)}: one of the files, or a sweep over them"
                self.fill(("train",), message, start.line)
                continue
            self.put(("sweep", "over", f"env.{name}"), list(values))
            self.note("carried", f"for {name} in ... -> sweep: each value is a job of its own", start.line)
            if start.background:
                message = f"the script runs all {name} at once on parts of its nodes: say the nodes of one here"
                self.fill(("resources", "nodes"), message, start.line)
        if not self.array:
            return start
        picked = {
            piece.name.partition("[")[0]
            for word in start.argv
            for piece in word.pieces
            if piece.meaning == "array-index" and "[" in piece.name
        }
        if picked:
            for name in sorted(picked & set(self.indexed)):
                chosen = [self.indexed[name][index] for index in self.array if index < len(self.indexed[name])]
                self.put(("sweep", "over", f"env.{_one_of(name)}"), chosen)
            if len(picked) > 1:
                self.put(("sweep", "how"), "zip")
        else:
            self.put(("sweep", "over", "env.ARRAY_INDEX"), [str(index) for index in self.array])
        return start

    def over_nodes(self, name: str, values: tuple[str, ...] | None, start: _Start) -> bool:
        """`for i in 0 1; do srun -w ${nodes[$i]} ... --machine_rank $i & done`: a turn is a node of one job."""
        inside = re.compile(rf"\$\{{?{re.escape(name)}\b")
        chosen = [one.value.text for one in start.options if one.name in ("nodelist", "relative") and one.value]
        texts = [word.text for word in start.argv]
        for flag, value in zip(["", *texts], texts, strict=False):
            whole = value if flag.startswith("-") and not value.startswith("-") else ""
            flag, _, joined = (flag, "", whole) if whole else value.partition("=")
            if flag.lstrip("-").replace("-", "_") in ("machine_rank", "node_rank"):
                chosen.append(joined)
        if any(inside.search(text) for text in chosen):
            return True
        numbers = values is None or values == tuple(str(index) for index in range(len(values)))
        return start.background and numbers

    def one_of_the_nodes(self, name: str, values: tuple[str, ...] | None, start: _Start) -> _Start:
        number = values is not None and all(value.isdigit() for value in values)
        meaning = "node-rank" if number else "this-node"
        argv = tuple(
            replace(word, pieces=tuple(replace(piece, meaning=meaning) if piece.name == name else piece
                                       for piece in word.pieces))
            for word in start.argv
        )  # fmt: skip
        self.loop_nodes = len(values) if values is not None else 0
        own = {"nodes", "ntasks", "nodelist", "relative"}  # of one turn
        words = dict.fromkeys(one.word.text for one in start.options if one.name in own)
        message = f"for {name} in ... ({' '.join(words)}): a turn is a node -> resources.nodes"
        self.note("carried", message, start.line)
        return replace(start, argv=argv, options=tuple(one for one in start.options if one.name not in own))

    loop_nodes: int | None = None  # the training is started once for each of them, in a loop; 0: of all

    def step_options(self, start: _Start) -> None:
        for one in start.options:
            text = f"srun {one.word.partial}"
            if one.value is not None and one.value.partial not in one.word.partial:
                text += f" {one.value.partial}"
            if one.name in OF_A_STEP:
                self.note("carried", f"{text}: the step has what the job has", one.word.line)
                continue
            if one.name.startswith("container") and one.value is not None:
                key = "container-mounts"
                if one.name == key:
                    self.put(("container", "mounts"), self.mounts(one.value, one.word.line), one.word.line, text)
                elif one.name in ("container-image", "container-workdir", "container-name"):
                    name = one.name.removeprefix("container-")
                    value = self.path(one.value, ("container", name), one.word.line)
                    self.put(("container", name), value, one.word.line, text)
                elif one.value.value is None:
                    self.note("left out", f"{text}: only a running job knows its value", one.word.line)
                else:
                    self.option(one.name, one.value.value, one.word.line, text, batch=False)
                continue
            if one.name == "environment" and one.value is not None:
                self.put(
                    ("container", "environment"), self.path(one.value, ("container", "environment"), one.word.line)
                )
                self.put(("container", "runtime"), "edf")
                continue
            if one.name == "export" and one.value is not None:
                self.listed(one.value, one.word.line)
                self.note("carried", f"{text}: its variables are the job's", one.word.line)
                continue
            if one.value is not None and one.value.value is None:
                self.note("left out", f"{text}: only a running job knows its value", one.word.line)
                continue
            value = one.value.value if one.value and one.value.value else ""
            if not self.option(one.name, value, one.word.line, text, batch=False):
                if shell.near(one.name):
                    self.misspelt(one.name, text, one.word.line)
                    continue
                self.fields.setdefault("slurm", {}).setdefault("srun", []).append(
                    f"--{one.name}={value}" if value else f"--{one.name}"
                )
                if one.name not in facts.options_of("s"):
                    self.plugin(one.name)
                self.note("kept", f"{text} -> slurm.srun", one.word.line)

    # -- numbers

    def tasks_per_node(self, start: _Start | None) -> int | None:
        needs = self.needs
        if start and start.stepped:
            if start.number("ntasks-per-node"):
                return start.number("ntasks-per-node")
            total, nodes = start.number("ntasks"), start.number("nodes") or needs.nodes
            if total and nodes and total % nodes == 0:
                return total // nodes
        if needs.tasks_per_node:
            return needs.tasks_per_node
        if needs.tasks and needs.nodes and needs.tasks % needs.nodes == 0:
            return needs.tasks // needs.nodes
        return None

    def gpus(self, start: _Start | None, found: Program | None) -> int | None:
        needs = self.needs
        if needs.gpus_per_node is not None:
            return needs.gpus_per_node
        nodes = needs.nodes or 1
        if needs.gpus:
            return needs.gpus // nodes or 1
        tasks = self.tasks_per_node(start)
        if needs.gpus_per_task:
            return needs.gpus_per_task * (tasks or 1)
        if start:
            given = start.option("gpus-per-node") or start.option("gres") or ""
            match = re.search(r"([0-9]+)$", given)
            if match:
                return int(match[1])
            if start.number("gpus-per-task") and tasks:
                return (start.number("gpus-per-task") or 1) * tasks
            if start.number("gpus"):
                return (start.number("gpus") or 1) // nodes or 1
        if found and found.per_node:
            return found.per_node
        if found and found.processes and found.processes % nodes == 0:
            return found.processes // nodes
        return None

    def resources(self, start: _Start | None) -> None:
        needs = self.needs
        found = programs.read(start.argv) if start else None
        tasks = self.tasks_per_node(start)
        if self.fabric:
            self.put(("resources", "fabric"), self.fabric)
            self.note("carried", f"{self.fabric_why} -> resources.fabric: {self.fabric}")
        if needs.nodes is None and self.loop_nodes:
            needs.nodes = self.loop_nodes
        if needs.nodes is None and self.loop_nodes is None and start and start.number("nodes"):
            needs.nodes = start.number("nodes")
        nodes = needs.nodes
        if nodes is None and needs.tasks and (found is None or found.launcher != "python"):
            nodes = needs.tasks if not needs.tasks_per_node else max(needs.tasks // needs.tasks_per_node, 1)
        nodes = nodes or 1
        gpus = self.gpus(start, found)
        listed = start.number("nodes") if start and self.services and self.loop_nodes is None else None
        listed = listed or self.loop_nodes
        own = [row for row in self.services if row.get("on", "own") == "own" and "component" not in row]
        apart = sum(row.get("nodes", 1) for row in own)
        self.put(("resources", "nodes"), max(listed or nodes - apart, 1))
        cpu = bool(re.search(r"(?i)(--?device[= ]cpu|\bgloo\b|DS_ACCELERATOR=cpu)", self.script.text))
        if gpus is None and not cpu:
            whole = tasks if (found and found.launcher == "python" and tasks and tasks > 1) else None
            gpus = whole or 0
            self.put(("resources", "gpus_per_node"), gpus or 1)
            if whole:
                self.note("carried", f"{whole} tasks on a node -> resources.gpus_per_node: one for each")
            else:
                self.fill(("resources", "gpus_per_node"), "the script does not say how many GPUs a node has")
            if not any((needs.gpus_per_node, needs.gpus, needs.gpus_per_task)):
                self.put(("slurm", "gpus_as"), "none")
        else:
            self.put(("resources", "gpus_per_node"), gpus or 0)
            asked = needs.gpus_as or next((name for name in ("gpus-per-node", "gres", "gpus-per-task", "gpus")
                                           if start and start.option(name)), "none" if gpus else "")  # fmt: skip
            if asked and asked != "gpus-per-node":
                self.put(("slurm", "gpus_as"), asked)
        if cpu and not gpus and tasks and tasks > 1:
            self.put(("resources", "processes_per_node"), tasks)
        if needs.gpu_type:
            self.put(("slurm", "gpu_type"), needs.gpu_type)
        self.cpus(start, tasks or 1, gpus or 0)
        self.memory(gpus or 0)

    def cpus(self, start: _Start | None, tasks: int, gpus: int) -> None:
        needs = self.needs
        per_task = needs.cpus_per_task or (start.number("cpus-per-task") if start else None)
        if per_task:
            self.put(("resources", "cpus_per_node"), per_task * (needs.tasks_per_node or tasks))
        elif needs.cpus_per_gpu and gpus:
            self.put(("resources", "cpus_per_node"), needs.cpus_per_gpu * gpus)
            self.put(("slurm", "cpus_as"), "cpus-per-gpu")

    def memory(self, gpus: int) -> None:
        needs = self.needs
        if needs.memory:
            self.put(("resources", "memory"), _size(needs.memory))
        elif needs.memory_per_gpu and gpus:
            self.put(("resources", "memory"), _times(needs.memory_per_gpu, gpus))
            self.put(("slurm", "memory_as"), "mem-per-gpu")
        elif needs.memory_per_cpu and self.fields.get("resources", {}).get("cpus_per_node"):
            cpus = self.fields["resources"]["cpus_per_node"]
            self.put(("resources", "memory"), _times(needs.memory_per_cpu, cpus))
            self.put(("slurm", "memory_as"), "mem-per-cpu")

    def software(self) -> None:
        modules = {key: value for key, value in self.modules.items() if value}
        if set(modules) == {"purge", "load"}:
            self.fields["modules"] = modules["load"]
        elif set(modules) - {"purge"}:
            self.fields["modules"] = {"purge": self.modules["purge"], **modules}
        given = [key for key in ("venv", "conda", "uv") if key in self.fields]
        for key in given[1:]:
            value = self.fields.pop(key)
            if key == "conda":
                env = value["env"] if isinstance(value, dict) and "env" in value and len(value) > 1 else value
                if isinstance(env, str):
                    self.setup.append('eval "$(conda shell.bash hook)"')
                    self.setup.append(f"conda activate {shlex.quote(env)}")
            self.note("kept", f"{key} beside {given[0]} -> setup: a job file activates one of them", 0)
        box = self.fields.get("container")
        if box is not None and not box.get("image") and not box.get("environment"):
            del self.fields["container"]
            self.note("left out", f"container settings without an image: {', '.join(box)}")
        elif box is not None and set(box) == {"image"}:
            self.fields["container"] = box["image"]
        if self.setup:
            self.fields["setup"] = self.setup


AFTER = "it runs after the training: a job of its own, or slurm.dependency of the next"
NODES = ("first-node", "hosts", "node-list", "this-address")
MEGATRON: dict[str, Path] = {  # degrees of 1 say nothing
    "--tensor-model-parallel-size": ("parallel", "tensor"),
    "--pipeline-model-parallel-size": ("parallel", "pipeline"),
    "--ds-sequence-parallel-size": ("parallel", "sequence"), "--micro-batch-size": ("micro_batch",),
    "--global-batch-size": ("global_batch",), "--seq-length": ("seq_len",), "--train-iters": ("steps",),
}  # fmt: skip
OWN_GPU = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# What a note says instead of a secret; and whatever stands behind `wandb login`.
MASK = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|(AKIA|ASIA)[A-Z0-9]{16}"
    r"|eyJ[A-Za-z0-9_.-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY.*"
    r"|(?<=[Bb]earer )[^\s'\"]+|(?<= login )\S.*|(?<=[-_]key[= ])\S+|(?<=[-_]token[= ])\S+",
    re.DOTALL,
)
MODULE_VERBS = (
    "load",
    "purge",
    "reset",
    "use",
    "unload",
    "swap",
    "list",
    "restore",
    "save",
    "avail",
    "spider",
    "switch",
)


def _ordered(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in ({}, [], None)}


def _name(script: Script) -> str:
    """A name for the run, from --job-name or the file's."""
    given = script.directive("job-name")
    text = given.value if given and given.value else basename(script.name).rpartition(".")[0] or basename(script.name)
    tame = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return tame or "imported"


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text or "") else None


def _size(text: str) -> str:
    """480GB is 480G to Slurm, too."""
    match = re.fullmatch(r"([0-9]+)([KMGTkmgt]?)[bB]?", text)
    return (match[1].lstrip("0") or "0") + match[2].upper() if match else text


def _times(text: str, count: int) -> str:
    match = re.fullmatch(r"([0-9]+)([KMGTkmgt]?)[bB]?", text)
    return f"{int(match[1]) * count}{match[2].upper()}" if match else text


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 90 else flat[:87] + "..."


def _one_of(name: str) -> str:
    """LRS holds values of LR."""
    one = re.sub(r"(?<=[A-Za-z0-9])(?<![Ss])[Ss]$", "", name)
    return one if one != name else f"{name}_VALUE"


def _tame(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")[:30].upper() or "VALUE"


def _without_end(word: Word, end: str) -> Word:
    """~/env/bin/activate without /bin/activate."""
    last = word.pieces[-1]
    if not last.name and last.text.endswith(end):
        shorter = replace(last, text=last.text.removesuffix(end))
        pieces = (*word.pieces[:-1], shorter) if shorter.text else word.pieces[:-1]
        return replace(word, pieces=pieces)
    return word


def _reference(pieces: Sequence[Piece], *, job: bool = False) -> dict[str, Any] | None:
    """/scratch/$USER/x as {env: USER, prepend: /scratch/, append: /x}: text around one name; else None."""
    named = [at for at, piece in enumerate(pieces) if piece.name]
    if len(named) != 1:
        return None
    piece = pieces[named[0]]
    if job and piece.meaning == "job-id" and piece.name.isidentifier():
        found = {"job": "id"}
    elif (
        piece.name.isidentifier()
        and not piece.meaning
        and not piece.name.startswith("SLURM")
        and not SECRET_NAME.regex.fullmatch(piece.name)
        and not piece.name.islower()  # of the script's own making, in a way that is not known
    ):
        found = {"env": piece.name}
    else:
        return None
    before, behind = ("".join(one.text for one in part) for part in (pieces[: named[0]], pieces[named[0] + 1 :]))
    return {**found, **({"prepend": before} if before else {}), **({"append": behind} if behind else {})}


def _holds_options(rest: Sequence[Word]) -> bool:
    """srun $SRUN_ARGS python: a variable alone that nothing sets, before what is a program or an option."""
    first = rest[0]
    alone = len(first.pieces) == 1 and first.pieces[0].name.isidentifier() and not first.pieces[0].meaning
    if not alone or first.quoting != "none":
        return False
    options = re.search(r"(?i)(args|opts|options|flags|resume|extra|pinning|bind|params)", first.pieces[0].name)
    return bool(options) or programs.read(shell.options(rest[1:])[1]) is not None


def _for_the_script(name: str, text: str) -> bool:
    """CMD, LAUNCHER, TRAIN_SCRIPT: parts of a command, which a program has no use for."""
    part = re.search(r"(?i)(script|cmd|command|launcher|torchrun|args|opts|program|executable)", name)
    return bool(part) or bool(re.search(r"\s", text.strip()) and name.isupper() and programs.command_like(text))


SET_FOR_EVERY_JOB = frozenset(
    """USER HOME LOGNAME PWD PATH LD_LIBRARY_PATH PYTHONPATH HOSTNAME SHELL RANDOM MASTER_ADDR MASTER_PORT NODE_RANK
    RANK LOCAL_RANK WORLD_SIZE ARRAY_INDEX NNODES NPROC_PER_NODE TMPDIR""".split()
)


def _texts(value: Any) -> Iterable[str]:
    """Every text of a job, with references as a shell would write them."""
    if isinstance(value, Mapping):
        if reference(value):
            name = value.get("env") or "SLURM_JOB_ID"
            yield f"{value.get('prepend', '')}${name}{value.get('append', '')}"
        else:
            for key, child in value.items():
                yield str(key)
                yield from _texts(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _texts(child)
    else:
        yield str(value)


def _tokens(word: Word) -> Iterable[str]:
    """Of a word what has to stand somewhere: text, and names that mean nothing special."""
    if SECRET_VALUE.regex.fullmatch(word.partial) or MASK.search(word.partial):
        return
    for piece in word.pieces:
        if not piece.name:
            for token in re.findall(r"[A-Za-z0-9_./%+@-]*[A-Za-z0-9][A-Za-z0-9_./%+@-]*", piece.text):
                if token not in ("srun", "exec"):
                    yield token.rstrip("/")
        elif piece.name.isidentifier() and not piece.meaning and not piece.name.startswith("SLURM"):
            yield piece.name


def _flat(text: str) -> str:
    return " ".join(text.split())


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


def _tidy_script(path: Any) -> Any:
    return path.removeprefix("./") if isinstance(path, str) else path


def _names_in(command: Command) -> set[str]:
    return {name for word in command.words for name in re.findall(r"\$\{?([A-Za-z_]\w*)", word.text)}


def _inside_quotes(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def _shell_text(word: Word) -> str:
    """Inside double quotes: known text, and ${NAME} for the rest."""
    return "".join(
        "${SLURM_JOB_ID}" if piece.meaning == "time"  # each node and each attempt would have its own
        else piece.shown if piece.name else _inside_quotes(piece.text)
        for piece in word.pieces
    )  # fmt: skip


def _shell_word(word: Word) -> str:
    return f'"{_shell_text(word)}"' if not re.fullmatch(r"[\w./${}=:,+-]+", _shell_text(word)) else _shell_text(word)
