"""Batch scripts and shell scripts of others, judged: what sbatch does not do, what hangs, what hides a failure.

What an id means stands in data/scriptrules.yaml, with a script that has the fault and one that has not.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from posixpath import basename
from typing import Any

from launcher import facts, hostfile, launchlint, shell, yamldoc
from launcher.errors import UserError
from launcher.launchlint import Around, Found, Launch, Word
from launcher.spec.words import seconds

RANKS = {"SLURM_PROCID": "rank", "SLURM_NODEID": "node rank", "SLURM_LOCALID": "local rank"}
REMOTE = {"srun", "mpirun", "mpiexec", "pdsh", "ssh", "clush", "parallel-ssh", "pssh", "jsrun", "ibrun"}


@cache
def rules() -> dict[str, dict[str, Any]]:
    """SLM: batch scripts; LCH: command lines of launchers, wherever they stand; K8S: manifests."""
    return yamldoc.load_tables(facts.DATA / "scriptrules.yaml")


def is_script(text: str) -> bool:
    """By its first line."""
    return bool(re.match(r"\ufeff?#!\s*\S*(/|\s)(env\s+(-S\s+)?)?(ba|da|z|k)?sh\b", text))


def looks_like(text: str, *, name: str) -> bool:
    """A shell script by its first line, by its #SBATCH lines, or by its name where it has neither."""
    if is_script(text):
        return True
    if re.search(r"^#SBATCH\s", text, re.MULTILINE) and not re.search(
        r"^(apiVersion|name|train)\s*:", text, re.MULTILINE
    ):
        return True
    return name.lower().endswith((".sh", ".bash", ".sbatch", ".slurm", ".sub")) and not text.lstrip().startswith("{")


@dataclass(frozen=True)
class Step:
    """One srun (or ssh, pdsh, mpirun) of the batch shell, with the launchers that it starts on the nodes."""

    command: shell.Command
    kind: str
    options: dict[str, shell.Option]
    program: tuple[shell.Word, ...]
    launches: tuple[tuple[Launch, shell.Command], ...]
    nodes: int | None
    per_node: int | None  # tasks
    tasks: int | None

    @property
    def several(self) -> bool:
        """Certainly more than one task."""
        return (self.tasks or 1) > 1 or (self.nodes or 1) > 1

    @property
    def trains(self) -> bool:
        """A launcher, a Python program or a wrapper script; not hostname, mkdir, nvidia-smi."""
        if self.launches:
            return True
        words = [word.partial for word in self.program]
        if self.command.script:
            words += [word.partial for one in self.command.script.everything() for word in one.argv]
        if "-c" in words[1:3] and basename(words[0]).startswith("python"):
            return False
        return any(
            re.search(r"\.(py|sh)$|^(python[0-9.]*|torchrun|accelerate|deepspeed)$", basename(word)) for word in words
        )


NEXT = ("hetjob", "packjob")  # a line that begins the next component of a heterogeneous job; the older word last


class Case:
    """One script with what its header says, read once."""

    def __init__(self, text: str, name: str, *, nodes: int | None = None, gpus: int | None = None) -> None:
        self.text, self.lines = text, text.splitlines()
        self.script = shell.read(text, name)
        # of a heterogeneous job the script runs in the first component
        first = itertools.takewhile(lambda one: one.option not in NEXT, self.script.directives)
        self.header = {one.option: one for one in first}
        self.batch = bool(self.script.directives)
        self.ours = bool(re.search(r"^\s*(export )?DSLAUNCH_\w+=|\$\{DSLAUNCH_\w+:-", text, re.MULTILINE))
        self.is_shell = not re.match(r"#!.*\bpython", text)
        self.nodes = self._nodes() if self.batch else None
        if nodes and "nodes" not in self.header:
            self.nodes = nodes
        self.gpus = self._gpus() or gpus
        self.commands = [(c, r) for c, r in _walk(self.script, None) if "substitution" not in c.inside]
        # `if [ $SLURM_NNODES -gt 1 ]; then ... else`: of four nodes the else is never run
        self.running = [(c, r) for c, r in self.commands if "never" not in c.inside]
        self.local = [c for c, remote in self.running if remote is None]

    def value(self, option: str) -> str:
        one = self.header.get(option)
        return (one.value or "") if one else ""

    def number(self, *options: str) -> int | None:
        for option in options:
            value = self.value(option)
            if re.fullmatch(r"[0-9]{1,7}", value):
                return int(value)
        return None

    def _nodes(self) -> int | None:
        if "nodes" in self.header:
            return self.number("nodes")
        tasks, per_node = self.number("ntasks"), self.number("ntasks-per-node")
        if tasks and per_node and tasks % per_node == 0:
            return tasks // per_node
        if {"ntasks", "array", "nodelist", "gpus", "nodefile"} & set(self.header):
            return 1 if tasks == 1 else None
        return 1

    def _gpus(self) -> int | None:
        direct = re.fullmatch(r"(?:[A-Za-z0-9_.-]+:)?([0-9]+)", self.value("gpus-per-node"))
        if direct:
            return int(direct[1])
        gres = re.search(
            r"(?:^|,)(?:gres[:/])?gpu(?::[A-Za-z0-9_.-]*[A-Za-z][A-Za-z0-9_.-]*)?:([0-9]+)", self.value("gres")
        )
        if gres:
            return int(gres[1])
        total = re.fullmatch(r"(?:[A-Za-z0-9_.-]+:)?([0-9]+)", self.value("gpus"))
        if total and self.nodes and int(total[1]) % self.nodes == 0:
            return int(total[1]) // self.nodes
        per_task, tasks = self.number("gpus-per-task"), self.number("ntasks-per-node", "tasks-per-node")
        return per_task * tasks if per_task and tasks else None

    @cached_property
    def steps(self) -> list[Step]:
        return [self._step(one) for one in self.local if _kind(one) in REMOTE]

    def _step(self, command: shell.Command) -> Step:
        kind = _kind(command)
        at = next(i for i, word in enumerate(command.argv) if basename(word.partial) == kind)
        given, program = shell.options(command.argv[at + 1 :]) if kind == "srun" else ([], command.argv[at + 1 :])
        options = {one.name: one for one in given}

        def number(name: str) -> int | None:
            value = options[name].value if name in options else None
            text = value.value if value else None
            return int(text) if text and re.fullmatch(r"[0-9]{1,7}", text) else None

        nodes = number("nodes") if "nodes" in options else self.nodes
        per_node = number("ntasks-per-node") if "ntasks-per-node" in options else self.number("ntasks-per-node")
        tasks = number("ntasks")
        if "ntasks" not in options:
            stated = self.number("ntasks") if not {"nodes", "ntasks-per-node"} & set(options) else None
            tasks = stated or (nodes * (per_node or 1) if nodes else None)
        if tasks == 1:
            nodes, per_node = 1, 1
        elif tasks and nodes and (not per_node or ("ntasks" in options and "ntasks-per-node" not in options)):
            per_node = max(tasks // nodes, 1)
        launches = []
        direct = launchlint.read(self.words(program)) if kind != "mpirun" else None
        if direct:
            launches.append((direct, command))
        for inner in command.script.everything() if command.script else ():
            found = launchlint.read(self.words(inner.argv, command))
            if found:
                launches.append((found, inner))
        return Step(command, kind, options, program, tuple(launches), nodes, per_node, tasks)

    @cached_property
    def launches(self) -> list[tuple[Launch, shell.Command, Step | None]]:
        """Every launcher, with the step that starts it on the nodes where there is one."""
        found: list[tuple[Launch, shell.Command, Step | None]] = []
        found += [(launch, command, step) for step in self.steps for launch, command in step.launches]
        for command in self.local:
            # of `run torchrun ...` the line in the function is judged, which has srun or not
            if _kind(command) not in REMOTE - {"mpirun", "mpiexec"} and command.name not in self.script.functions:
                launch = launchlint.read(self.words(command.argv))
                if launch:
                    found.append((launch, command, None))
        return found

    @cached_property
    def assigned(self) -> dict[str, shell.Assignment]:
        return {one.name: one for one in self.script.assignments}

    def words(self, argv: Iterable[shell.Word], outer: shell.Command | None = None) -> list[Word]:
        return [self.word(word, outer) for word in argv]

    def word(self, word: shell.Word, outer: shell.Command | None = None) -> Word:
        line, column = self.place(word.text, word.line, word.column, outer)
        known = not word.left and not (outer and re.search(r"[$`]", word.partial))
        return Word(word.partial, line, column, known)

    def place(self, text: str, line: int, column: int, outer: shell.Command | None) -> tuple[int, int]:
        """A nested script counts columns from its own start: where the word stands in the file."""
        if outer is None:
            return line, column
        row = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        at = row.find(text) if text else -1
        return (line, at + 1) if at >= 0 else (outer.line, outer.column)

    def at(
        self, one: shell.Command | shell.Assignment, rule: str, message: str, fix: str = "", severity: str = ""
    ) -> Found:
        name = one.name if isinstance(one, shell.Assignment) else (one.words[0].text if one.words else "")
        return Found(rule, message, one.line, one.column, fix, severity, one.column + max(len(name), 1))

    def of(self, one: shell.Directive, rule: str, message: str, fix: str = "", severity: str = "") -> Found:
        row = self.lines[one.line - 1] if one.line <= len(self.lines) else ""
        rest = re.match(r"\S+", row[one.column - 1 :])
        return Found(rule, message, one.line, one.column, fix, severity, one.column + (rest.end() if rest else 1))

    def says(self, pattern: str) -> bool:
        """Of everything but comments."""
        return bool(re.search(pattern, self.code))

    @cached_property
    def code(self) -> str:
        return "\n".join(line for line in self.lines if not line.lstrip().startswith("#"))


def _walk(script: shell.Script, remote: shell.Command | None) -> Iterator[tuple[shell.Command, shell.Command | None]]:
    for command in script.commands:
        yield command, remote
        if command.script:
            yield from _walk(command.script, remote or (command if _kind(command) in REMOTE else None))


PREFIXES = {"time", "exec", "nohup", "env", "timeout", "command", "stdbuf", "sudo", "!", "nice"}


def _kind(command: shell.Command) -> str:
    """srun for `time srun ...` and `env A=1 srun ...`; else the command's own name."""
    for word in command.argv:
        name = basename(word.partial)
        if (
            name in PREFIXES
            or launchlint.ASSIGNMENT.fullmatch(word.partial)
            or re.fullmatch(r"-.*|[0-9]+[smh]?", name)
        ):
            continue
        return name
    return ""


def judge(text: str, *, name: str = "<stdin>", case: Case | None = None) -> list[Found]:
    """Everything about a script at once."""
    case = case or Case(text, name)
    found = list(_header(case))
    if case.is_shell:
        for part in (_meeting, _steps, _environment, _ends, _signals, _shell, _files, _secrets):
            found += part(case)
    seen: dict[tuple[object, ...], Found] = {}
    for one in found:  # a port is said once, not wherever $MASTER_PORT stands
        key = (one.rule, one.message) if one.rule in ("LCH012", "LCH013") else (one.rule, one.line, one.column)
        seen.setdefault(key, one)
    return sorted(seen.values(), key=lambda one: (one.line, one.column, one.rule))


CONFIG = re.compile(r'"(train_(micro_)?batch_size\w*|zero_optimization)"\s*:')


def configs(case: Case) -> list[tuple[str, int]]:
    """DeepSpeed configs that heredocs write, with the line before each; none that has $NAMES left in it."""
    found = []
    for document in case.script.files.values():
        body = document.text
        if body.lstrip().startswith("{") and CONFIG.search(body) and not re.search(r"\$[{(A-Za-z_]", body):
            found.append((body, document.line - 1))
    return found


# --- the header -------------------------------------------------------------------------------------


def _header(case: Case) -> Iterator[Found]:
    script = case.script
    if case.batch and not case.text.startswith("#!"):
        yield Found("SLM009", "the first line does not begin with #!", 1, 1, "#!/bin/bash", "", 2)
    if "\r\n" in case.text and (case.batch or case.text.startswith("#!")):
        yield Found("SLM014", "the lines end with CR LF", 1, 1, "dos2unix", "", 2)
    seen_lines = set()
    for one in script.directives:
        row = case.lines[one.line - 1]
        if one.value and re.search(r"\$[{(A-Za-z_]|`", one.value):
            message = f"--{one.option}={one.value}: sbatch takes it as it stands"
            yield case.of(one, "SLM001", message, _instead_of(one))
        if one.line not in seen_lines:
            found = _unknown(case, one, row)
            if found:
                seen_lines.add(one.line)
                yield found
    inside = _heredoc_lines(script)
    late = [one for one in script.late if one.line not in inside and case.is_shell]
    if late:
        first = late[0]
        more = f", and {len(late) - 1} more" if len(late) > 1 else ""
        yield case.of(
            first, "SLM002", f"{first.text[:60]}{more}: after the first command sbatch reads no more of them"
        )
    yield from _look_alikes(case)
    yield from _values(case)
    yield from _header_values(case)


def _look_alikes(case: Case) -> Iterator[Found]:
    """`# SBATCH --mem=0`, `#SBTACH -N 2`: comments, and somebody may not have meant that; ##SBATCH says so itself."""
    for number, line in enumerate(case.lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            return
        found = re.match(r"\s*#\s*([A-Za-z]{4,8})(?=\s+--?[A-Za-z])", line)
        if found is None or line.startswith("#SBATCH"):
            continue
        if difflib.SequenceMatcher(None, found[1].upper(), "SBATCH").ratio() >= 0.8:
            message = f"{found[0].strip()} is a comment: sbatch reads only lines that begin with #SBATCH"
            yield Found("SLM016", message, number, 1, "#SBATCH" + line[found.end() :], "", found.end() + 1)


MEMORY = re.compile(r"[0-9]+([KMGT]B?)?", re.IGNORECASE)
ENDLESS = ("UNLIMITED", "INFINITE")


def _values(case: Case) -> Iterator[Found]:
    """Times and sizes that sbatch cannot read."""
    for one in case.header.values():
        value = one.value or ""
        if not value or "$" in value or "`" in value:
            continue
        if one.option in ("time", "time-min") and seconds(value) is None and value.upper() not in ENDLESS:
            known = re.fullmatch(r"([0-9]+)\s*([dhm])\w*", value, re.IGNORECASE)
            forms = {"d": "{}-00", "h": "{}:00:00", "m": "{}"}
            fix = forms[known[2].lower()].format(known[1]) if known else "minutes, HH:MM:SS or D-HH:MM:SS"
            yield case.of(one, "SLM015", f"{value[:40]!r} is no time", f"--{one.option}={fix}" if known else fix)
        elif one.option in ("mem", "mem-per-cpu", "mem-per-gpu", "tmp") and not MEMORY.fullmatch(value):
            yield case.of(one, "SLM015", f"{value[:40]!r} is no size of memory", f"--{one.option}=64G, for 64 GiB")


def _heredoc_lines(script: shell.Script) -> set[int]:
    found: set[int] = set()
    for command in script.everything():
        if command.heredoc:
            first = command.heredoc.line
            found |= set(range(first, first + command.heredoc.raw.count("\n") + 2))
    return found


def _instead_of(one: shell.Directive) -> str:
    if one.option in ("output", "error"):
        return "%x is the job's name, %j its number; a folder has to be there already"
    return "write the value, or give it to sbatch on its command line"


def _unknown(case: Case, one: shell.Directive, row: str) -> Found | None:
    sbatch, srun = facts.options_of("b"), facts.options_of("s")
    word = re.match(r"\S+", row[one.column - 1 :])
    written = word[0] if word else ""
    if not written.startswith("-"):
        fine = one.known or one.option in NEXT
        return None if fine else case.of(one, "SLM004", f"{written[:60]!r} belongs to no option")
    if re.match(r"-[A-Za-z]", written):
        letter = written[1]
        if letter in facts.letters_of("b"):
            return None
        if letter in facts.letters_of("s"):
            return case.of(one, "SLM003", f"-{letter} is srun's option, and sbatch refuses it", f"srun -{letter} ...")
        return case.of(one, "SLM003", f"sbatch has no option -{letter}")
    name = written[2:].partition("=")[0]
    known = [*sbatch, *facts.options_of("p")]
    fits = [option for option in sbatch if option.startswith(name)]
    if name in known or len(fits) == 1:
        return None
    if name in srun:
        return case.of(one, "SLM003", f"--{name} is srun's option, and sbatch refuses it", f"srun --{name} ...")
    close = shell.near(name)
    if close:
        return case.of(one, "SLM003", f"sbatch has no option --{name}", f"did you mean --{close}?")
    return None  # a plugin of the site's may have brought it


def _header_values(case: Case) -> Iterator[Found]:
    limit = seconds(case.value("time"))
    signal = re.fullmatch(r"(?:(?P<who>[BRbr]+):)?(?P<name>[A-Za-z0-9]+)(?:@(?P<lead>[0-9]+))?", case.value("signal"))
    if signal and limit:
        lead = int(signal["lead"] or 60)
        if lead >= limit:
            message = f"the signal is due {lead} s before the end of a job of {limit} s"
            yield case.of(case.header["signal"], "SLM005", message)
    nodes = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", case.value("nodes"))
    named = _hosts(case.value("nodelist"))
    if nodes and named and named > int(nodes[2] or nodes[1]):
        message = f"{named} nodes are named and {nodes[0]} asked for"
        yield case.of(case.header["nodelist"], "SLM006", message, f"--nodes={named}")
    per_task, per_node = case.number("gpus-per-task"), case.number("ntasks-per-node", "tasks-per-node")
    bound = case.value("gpu-bind") or next(
        (
            s.options["gpu-bind"].value.partial
            for s in case.steps
            if "gpu-bind" in s.options and s.options["gpu-bind"].value
        ),
        "",
    )
    # of ours every step says how many GPUs a node has, and binds as the job file does
    if per_task and per_node and per_node > 1 and bound != "none" and not case.ours:
        message = f"each of {per_node} tasks on a node sees {per_task} GPU{'s' if per_task > 1 else ''}, called 0"
        yield case.of(case.header["gpus-per-task"], "SLM007", message)
    elif not case.ours:
        for step in case.steps:
            yield from _one_gpu(case, step)


ONE_GPU = re.compile(r"(?:(?:verbose|quiet|v|q),)*(?:single:1|per_task:1|map_gpu:.*)")
LOCAL_RANK = re.compile(r"(?i)\blocal_?rank[=\s]+[\"']?\\?\$\{?SLURM_LOCALID\b")


def _one_gpu(case: Case, step: Step) -> Iterator[Found]:
    """--gpus-per-task=1 with LOCAL_RANK=$SLURM_LOCALID: the second task takes GPU 1 of the one that it sees."""

    def said(option: str) -> str:
        given = step.options.get(option)
        return given.value.partial if given and given.value else case.value(option)

    single = said("gpus-per-task").rpartition(":")[2] == "1" or ONE_GPU.fullmatch(said("gpu-bind"))
    if step.kind != "srun" or (step.per_node or 1) < 2 or said("gpu-bind") == "none" or not single:
        return
    text = step.command.text + (step.command.script.text if step.command.script else "")
    if LOCAL_RANK.search(text):
        message = "each task sees one GPU, called 0, and is told LOCAL_RANK=$SLURM_LOCALID"
        yield case.at(step.command, "SLM007", message)


def _hosts(text: str) -> int | None:
    """_hosts("gpu[01-04,7],login1") is 6; None for a file or nothing."""
    try:
        return len(hostfile.expand(text)) if text and "/" not in text and "$" not in text else None
    except UserError:
        return None


# --- steps ------------------------------------------------------------------------------------------


def _steps(case: Case) -> Iterator[Found]:
    itself = any("$0" in step.command.text or "BASH_SOURCE" in step.command.text for step in case.steps)
    if not itself:
        yield from _ranks(case)
    for launch, command, step in case.launches:
        if step and step.kind in ("srun", "mpirun", "mpiexec"):
            yield from _per_task(case, launch, step)
        elif step is None and not itself:
            yield from _first_node_only(case, launch, command)
        if step and step.kind == "srun":
            yield from _fixed_rank(launch, step, command)
        yield from launchlint.judge(launch, _around(case, launch, step))
    for step in case.steps:
        yield from _deepy(case, step)
        if not step.launches and step.trains and step.per_node and step.nodes and step.per_node > 1:
            words = case.words(step.program)
            yield from launchlint.arithmetic(words, Around(step.nodes, step.per_node))


def _around(case: Case, launch: Launch, step: Step | None) -> Around:
    nodes = step.nodes if step else case.nodes
    said = launch.option("nnodes", "num_machines", "num_nodes")
    if nodes is None and said and (count := re.fullmatch(r"[0-9]+", said.text)):
        nodes = int(count[0])
    if step is None and launch.kind in ("torchrun", "accelerate", "composer") and (case.nodes or 1) > 1:
        nodes = case.nodes if said else nodes
    if step and step.nodes == 1 and (case.nodes or 1) > 1 and _one_of_several(launch, step):
        nodes = _joined(launch, case)
    gpus = case.gpus
    if step and (step.per_node or 1) > 1:
        gpus = None  # its own rule
        each = launch.option("nproc_per_node")
        if nodes and each and each.number == 1:  # a launcher for every rank: each counts as a node
            nodes *= step.per_node or 1
    env = {name: one.value.partial if one.value else "" for name, one in case.assigned.items()}
    return Around(nodes, gpus, env)


def _one_of_several(launch: Launch, step: Step) -> bool:
    """`srun -w $node -n1 torchrun --node-rank $i &` in a loop: a step of one node, in a job that all of them make."""
    command = step.command
    return bool(
        launch.option("node_rank", "machine_rank")
        or {"nodelist", "relative"} & set(step.options)
        or {"for", "while"} & set(command.inside)
        or command.background
    )


def _joined(launch: Launch, case: Case) -> int | None:
    """How many nodes the steps of one node make together: what they say themselves, and no more than there are."""
    assert case.nodes is not None
    said = launch.option("nnodes", "num_machines", "num_nodes")
    if said:
        return min(said.number, case.nodes) if said.number else None
    world = launch.option("world_size")
    if world is None:
        return None if launch.option("node_rank", "machine_rank") else 1  # else a job of its own on each node
    if not world.number or not case.gpus:
        return None
    whole = world.number % case.gpus == 0 and world.number <= case.nodes * case.gpus
    return world.number // case.gpus if whole else case.nodes


def _ranks(case: Case) -> Iterator[Found]:
    """$SLURM_PROCID and its kin, put in by the batch shell, where they are always 0."""
    many = [
        step
        for step in case.steps
        if step.kind == "srun" and (step.several or step.nodes is None) and step.tasks != 1
    ]
    for step in many:
        names = {piece.name for word in step.command.argv for piece in word.pieces} & set(RANKS)
        heredoc = step.command.heredoc
        if heredoc and not heredoc.quoted:
            names |= set(re.findall(r"(?<!\\)\$\{?(SLURM_(?:PROCID|NODEID|LOCALID))\b", heredoc.raw))
        for name in sorted(names):
            yield _rank(case, step, name)
    if not many:
        return
    for one in case.script.assignments:
        pieces = {piece.name for piece in one.value.pieces} & set(RANKS) if one.value else set()
        if (
            "never" not in one.inside
            and pieces
            and one.exported
            and not one.prefix
            and re.search(r"RANK|PROCID|NODEID", one.name)
        ):
            name = min(pieces)
            yield case.at(
                one, "SLM010", f"{one.name} is exported as ${name} of the batch shell, 0 for every {RANKS[name]}"
            )


def _rank(case: Case, step: Step, name: str) -> Found:
    fixed = f"srun bash -c '... ${name} ...' in single quotes, or \\${name}"
    message = f"${name} is put in by the batch shell: every task gets {RANKS[name]} 0"
    launch = next((launch for launch, _ in step.launches), None)
    backend = launch.option("rdzv_backend") if launch and launch.kind in ("torchrun", "accelerate") else None
    if backend and backend.text != "static":
        return case.at(
            step.command, "SLM010", f"{message}, which the {backend.text} rendezvous does not mind", fixed, "note"
        )
    return case.at(step.command, "SLM010", message, fixed)


def _per_task(case: Case, launch: Launch, step: Step) -> Iterator[Found]:
    word = launch.word
    end = word.column + len(word.text)
    if launch.kind == "mpi" and step.kind == "srun" and step.several:
        message = (
            f"{word.text} starts every rank of the job, and srun starts {word.text} {step.tasks or step.nodes} times"
        )
        yield Found("SLM012", message, word.line, word.column, "", "", end)
    hostfile = launch.option("hostfile", "H", "deepspeed_hostfile")
    by_ssh = launch.option("deepspeed_multinode_launcher")
    if launch.kind == "deepspeed" and step.several and "no_ssh" not in launch.options and not launch.open:
        what = "reaches all nodes by ssh" if hostfile else "without a hostfile is a job of one node"
        message = f"deepspeed {what}, and srun starts it {step.tasks or step.nodes} times"
        yield Found("SLM012", message, word.line, word.column, "", "", end)
    elif launch.kind == "accelerate" and hostfile and step.several and not (by_ssh and by_ssh.text == "standard"):
        message = f"accelerate with a hostfile reaches all nodes, and srun starts it {step.tasks or step.nodes} times"
        yield Found("SLM012", message, word.line, word.column, "", "", end)
    elif launch.kind in ("torchrun", "composer", "accelerate", "deepspeed-node") and (step.per_node or 1) > 1:
        per_node = launch.option("nproc_per_node", "nproc", "n", "num_processes")
        number = per_node.number if per_node else None
        if (launch.kind == "torchrun" and per_node is None and not launch.open) or number == 1:
            return
        shown = per_node.text if per_node else "several"
        message = f"srun starts {step.per_node} launchers on a node, and each starts {shown} ranks"
        yield Found("SLM011", message, word.line, word.column, "", "", end)


def _fixed_rank(launch: Launch, step: Step, command: shell.Command) -> Iterator[Found]:
    """`srun torchrun --nnodes 2 --node-rank 0`: one command line for all nodes has one rank for all of them."""
    said = launch.option("node_rank", "machine_rank")
    named = {"nodelist", "relative"} & set(step.options) and "nodes" not in step.options
    asked = command is not step.command and {"if", "case"} & set(command.inside)  # each node its own branch
    if said is None or said.number is None or (step.nodes or 1) < 2 or named or asked:
        return
    backend = launch.option("rdzv_backend")
    dynamic = backend is not None and backend.text != "static"
    message = f"every one of {step.nodes} nodes is told that its rank is {said.text}"
    if backend is not None and dynamic:
        message += f", which the {backend.text} rendezvous does not mind"
    fix = "srun bash -c '... $SLURM_NODEID ...' in single quotes"
    yield Found(
        "LCH014", message, said.line, said.column, fix, "note" if dynamic else "", said.column + len(said.text)
    )


def _deepy(case: Case, step: Step) -> Iterator[Found]:
    """GPT-NeoX's deepy.py is DeepSpeed's launcher: it reads a hostfile and starts the whole job."""
    if step.kind != "srun" or not step.several:
        return
    words = case.words(step.program)
    inner = step.command.script.everything() if step.command.script else ()
    words += [word for one in inner for word in case.words(one.argv, step.command)]
    for word in words:
        if basename(word.text) == "deepy.py":
            message = f"deepy.py starts every rank of the job, and srun starts it {step.tasks or step.nodes} times"
            yield Found("SLM012", message, word.line, word.column, "", "", word.column + len(word.text))
            return


def _first_node_only(case: Case, launch: Launch, command: shell.Command) -> Iterator[Found]:
    if (case.nodes or 1) <= 1 or launch.kind in ("mpi", "deepspeed-node"):
        return
    if (
        launch.option("hostfile", "H", "deepspeed_hostfile")
        or "no_ssh" in launch.options
        or (launch.open and launch.kind == "deepspeed")
    ):
        return
    words = [word.partial for word in command.argv]
    before = words[: next((i for i, word in enumerate(words) if word == launch.word.text), 0)]
    if any("$" in word for word in before):
        return  # "$RUN torchrun": perhaps an srun
    if any(one.line <= command.end for one in case.script.broken):
        return  # `if [ 1 ; then srun torchrun`: what starts it is not known
    function = next((part.partition(" ")[2] for part in command.inside if part.startswith("function")), "")
    if function and any(function in step.command.text for step in case.steps):
        return
    machine = launch.option("machine_rank", "node_rank")
    if machine and machine.text.isdigit() and machine.text != "0":
        return
    message = (
        f"the batch script runs on the first of {case.nodes} nodes, and nothing starts {launch.kind} on the others"
    )
    yield Found(
        "SLM013", message, launch.word.line, launch.word.column, f"srun --ntasks-per-node=1 {launch.kind} ...", "",
        launch.word.column + len(launch.word.text),
    )  # fmt: skip


# --- meeting ----------------------------------------------------------------------------------------

ADDRESS = re.compile(
    r"(?i)(MASTER_?(ADDR|IP|HOST|NODE)?|MAIN_PROCESS_IP|HEAD_?(NODE_?)?(IP|ADDR|ADDRESS)|HEAD_?NODE|RDZV_HOST|MASTER_ADDRESS|MAIN_IP)"
)
PORT = re.compile(r"(?i)(MASTER_?PORT|MAIN_PROCESS_PORT|RDZV_PORT|MPORT)")


def _meeting(case: Case) -> Iterator[Found]:
    several = (case.nodes or 0) > 1 or any(step.several for step in case.steps)
    alone = "exclusive" in case.header
    for one in case.script.assignments:
        if one.value is None or "never" in one.inside:
            continue
        if ADDRESS.fullmatch(one.name):
            yield from _address(case, one, several)
        elif PORT.fullmatch(one.name):
            yield from _port(case, one, alone)
        elif one.name == "WORLD_SIZE" and one.exported and case.nodes and case.gpus:
            said, ranks = one.value.value or "", case.nodes * case.gpus
            if said.isdigit() and int(said) not in (ranks, case.nodes):  # of nodes, as operators count them
                message = f"WORLD_SIZE={said} where {case.nodes} x {case.gpus} GPUs are {ranks}"
                yield case.at(one, "LCH005", message, f"{ranks}")
    for command, remote in case.running:
        for one in (
            command.script.assignments if command.script and remote is None and _kind(command) == "srun" else ()
        ):
            if one.value is None:
                continue
            outer = [name for word in command.argv for name in word.left]
            line, column = case.place(one.name, one.line, one.column, command)
            there = replace(one, line=line, column=column)
            if ADDRESS.fullmatch(one.name) and one.value.meaning in ("this-node", "this-address") and several:
                if not any("hostname" in name or name == "HOSTNAME" for name in outer):
                    yield case.at(
                        there, "SLM021", f"{one.name} is {one.value.partial} on every node, so each waits for itself"
                    )
            elif (
                PORT.fullmatch(one.name)
                and _random(one.value)
                and several
                and not any("RANDOM" in n or "shuf" in n for n in outer)
            ):
                yield case.at(there, "SLM023", f"{one.name} is drawn on every node, and no two agree", "", "error")


def _address(case: Case, one: shell.Assignment, several: bool) -> Iterator[Found]:
    assert one.value is not None
    text = one.value.text
    if re.search(r"(\|\||:-|:=)\s*(echo\s+)?[\"']?(localhost|127\.0\.0\.1)", text):
        yield case.at(
            one,
            "SLM022",
            f"{one.name} falls back to localhost",
            "${NAME:?not set} ends the job instead",
            "" if several else "note",
        )
    elif launchlint.LOCAL.fullmatch(one.value.partial) and several and one.value.partial:
        message = f"{one.name}={one.value.partial}: every node looks for the first rank on itself"
        yield case.at(
            one, "LCH006", message, 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    elif re.search(r"hostname\s+(-I|-i|--ip-address|--all-ip-addresses)\b", text) and several:
        yield case.at(one, "SLM020", f"{one.name} comes from {_command(text)}")


def _command(text: str) -> str:
    match = re.search(r"hostname\s+-\S+", text)
    return match[0].rstrip(")`'\"") if match else "hostname"


def _random(word: shell.Word) -> bool:
    return bool(re.search(r"\bRANDOM\b|\bshuf\b", word.text + word.partial))


def _port(case: Case, one: shell.Assignment, alone: bool) -> Iterator[Found]:
    assert one.value is not None
    if _random(one.value):
        yield case.at(one, "SLM023", f"{one.name}={one.value.text}: nobody checks that the port is free")
        return
    value = one.value.value
    if value is not None and "$" not in one.value.text:
        word = Word(value, one.line, one.column)
        for found in launchlint.port(value, word, alone=alone):
            yield replace(found, end=one.column + len(one.name))


# --- what steps get ---------------------------------------------------------------------------------


def _environment(case: Case) -> Iterator[Found]:
    exported = "SLURM_EXPORT_ENV" in case.code
    for step in case.steps:
        if step.kind != "srun":
            continue
        value = step.options["export"].value if "export" in step.options else None
        text = value.partial if value else ""
        if case.value("export").upper() in ("NONE", "NIL") and not text and not exported and step.trains:
            message = "#SBATCH --export=NONE holds for srun as well: what this script exports does not arrive"
            yield case.at(step.command, "SLM030", message)
        if "=" in text and not re.search(r"(^|,)ALL(,|$)", text.strip("'\"")):
            message = f"--export={text[:50]}: only that and SLURM_* arrive, no PATH"
            yield case.at(step.command, "SLM031", message, f"--export=ALL,{text[:50]}")
    for step in case.steps:
        yield from _lists(case, step)
    cpus = case.number("cpus-per-task")
    if not cpus or cpus < 2 or "SRUN_CPUS_PER_TASK" in case.code:
        return
    for step in case.steps:
        if step.kind == "srun" and step.trains and not {"cpus-per-task", "cpus-per-gpu"} & set(step.options):
            message = f"--cpus-per-task={cpus} is not handed to srun, whose tasks get one CPU each"
            yield case.at(step.command, "SLM050", message)


LISTS = re.compile(r"(?:(?:verbose|quiet|v|q),)*((?:map|mask)_(?:cpu|ldom|mem))[:=]([0-9A-Fa-fxX*,]+)")


def _lists(case: Case, step: Step) -> Iterator[Found]:
    """--cpu-bind=mask_cpu:ff,ff00: one entry for each task of a node, in turn; `0xff*8` is eight of them."""
    if step.kind != "srun" or not step.trains or not step.per_node:
        return
    for option in ("cpu-bind", "mem-bind"):
        given = step.options.get(option)
        match = LISTS.fullmatch(given.value.partial) if given and given.value else None
        if match is None:
            continue
        times = [re.search(r"\*([0-9]{1,4})$", one) for one in match[2].split(",") if one]
        count = sum(int(one[1]) if one else 1 for one in times)
        if count == step.per_node:
            continue
        less = "tasks share what it names" if count < step.per_node else "the rest of it is not used"
        one = "1 task" if step.per_node == 1 else f"{step.per_node} tasks"
        message = f"--{option}={match[1]} has {count} entr{'y' if count == 1 else 'ies'} for {one} on a node: {less}"
        yield case.at(step.command, "SLM051", message)


# --- how it ends ------------------------------------------------------------------------------------


def _ends(case: Case) -> Iterator[Found]:
    script = case.script
    top = [one for one in case.local if not set(one.inside) & {"substitution"}]
    launched = {id(command) for _, command, _ in case.launches}
    trains = {id(step.command) for step in case.steps if step.trains}
    work = [one for one in top if id(one) in launched | trains]
    working = {id(one) for one in work}
    for step in case.steps:
        told = "kill-on-bad-exit" in step.options or "SLURM_KILL_BAD_EXIT" in case.code
        if step.kind == "srun" and step.trains and step.several and not told:
            message = "when one task fails, the others go on waiting for it until the time limit"
            yield case.at(step.command, "SLM040", message)
    for command, remote in case.running:
        mine = id(command) in working or (remote is not None and id(command) in launched)
        if mine and command.pipeline and not command.last and not _pipefail(case, command, remote):
            yield case.at(
                _shown(case, command, remote), "SLM041", "the exit code is that of the last command of the pipe"
            )
    if not work or not case.batch:
        return
    if "errexit" not in script.options:
        for code, between in codes(case):
            earlier = [c for c in top if (c.line, c.column) < (between.line, between.column)]
            before = next((c for c in reversed(earlier) if c.name not in TELLS), None)
            ran = [one for one in work if before and (one is before or 0 < one.pipeline == before.pipeline)]
            asked = any(re.search(r"\$\?|PIPESTATUS", c.text) for c in earlier if ran and c.line >= ran[0].line)
            if ran and not asked:
                message = f"{code.name}=$? is the code of `{between.name}`, which stands between"
                yield case.at(code, "SLM042", message, f"{code.name}=$? before `{between.name}`")
    last = work[-1]
    for one in work:
        follower = next((c for c in top if c.line >= one.end and c is not one and c.before == "||"), None)
        if one.after == "||" and follower and follower.name in ("true", ":", "echo"):
            yield case.at(one, "SLM043", f"|| {follower.name} turns a failure into success")
    waits = [one for one in top if one.name == "wait"]
    if (
        any(one.background for one in work)
        and not waits
        and not any("wait" in c.text for c in top if "function" in "".join(c.inside))
    ):
        first = next(one for one in work if one.background)
        yield case.at(first, "SLM044", "it runs in the background and nothing waits for it: the job ends at once")
        return
    behind = top[[id(one) for one in top].index(id(last)) + 1 :]
    rest = [one for one in behind if not any(part.startswith("function") for part in one.inside)]
    rest = [one for one in rest if not last.pipeline or one.pipeline != last.pipeline]
    if "errexit" in script.options or set(last.inside) - {"subshell", "for"} or last.after:
        return
    asks = re.compile(r"\$\?|PIPESTATUS|\bwait\s+(-n\s+)?[\"']?\$")
    tail = "\n".join(case.lines[last.line - 1 :])
    if not rest:
        return
    end = rest[-1]
    if asks.search(tail):  # and says it, but does not end with it
        kept = any(one.name in ("exit", "return", "false", "kill", "scancel", "scontrol") for one in behind)
        if end.name in TELLS and not end.inside and not kept:
            yield case.at(end, "SLM042", f"the code of the training is read, and the job's is that of `{end.name}`")
        return
    if end.name == "exit" and [word.value for word in end.argv[1:]] == ["0"]:
        yield case.at(end, "SLM043", "exit 0: the job succeeds, whatever the training did")
    elif end.name == "wait":
        yield case.at(
            end, "SLM042", "wait without a process id is 0, whatever the steps did", 'wait "$pid" for each of them'
        )
    elif end.name not in ("exit", "exec", "scontrol", "sbatch"):
        yield case.at(end, "SLM042", f"the job's exit code is that of `{end.name[:40]}`, not of the training")


TELLS = {"touch", "echo", "printf", "date", "sleep", "sync"}  # nobody asks whether these failed


def codes(case: Case) -> Iterator[tuple[shell.Assignment, shell.Command]]:
    """`touch done; code=$?`: what takes the exit code of the wrong command, and that command."""
    every = case.script.commands
    for code in case.script.assignments:
        if code.value is None or code.value.text.strip('"') != "$?":
            continue
        earlier = [one for one in every if (one.line, one.column) < (code.line, code.column)]
        last = max(earlier, key=lambda one: (one.line, one.column), default=None)
        between = [one for one in case.script.assignments if last and last.line <= one.line and one is not code]
        between = [one for one in between if (one.line, one.column) < (code.line, code.column)]
        if last and last.name in TELLS and last.inside == code.inside and not last.pipeline and not between:
            yield code, last


def _pipefail(case: Case, command: shell.Command, remote: shell.Command | None) -> bool:
    if remote is None or remote.script is None:
        return "pipefail" in case.script.options or "PIPESTATUS" in case.code
    return "pipefail" in remote.script.options or "pipefail" in remote.text or "PIPESTATUS" in remote.text


def _shown(case: Case, command: shell.Command, remote: shell.Command | None) -> shell.Command:
    if remote is None:
        return command
    first = command.words[0].text if command.words else ""
    line, column = case.place(first, command.line, command.column, remote)
    return replace(command, line=line, column=column)


def _signals(case: Case) -> Iterator[Found]:
    if not case.batch:
        return
    work = [step for step in case.steps if step.trains]
    signal = re.fullmatch(r"(?:(?P<who>[BRbr]+):)?(?P<name>[A-Za-z0-9]+)(?:@[0-9]+)?", case.value("signal"))
    if signal is None:
        if (
            "time" in case.header
            and (work or case.launches)
            and not case.says(r"\bscontrol\s+requeue|\bSIGUSR|--exit-signal|--signal")
        ):
            yield case.of(
                case.header["time"], "SLM045", "nothing is told before the time limit, and KILL follows TERM"
            )
    else:
        name = signal["name"].upper().removeprefix("SIG")
        numbers = {"10": "USR1", "12": "USR2", "15": "TERM", "1": "HUP", "2": "INT"}
        name = numbers.get(name, name)
        trapped = [trap for trap in case.script.traps if any(_same(name, one) for one in trap.signals)]
        batch = "B" in (signal["who"] or "").upper()
        executes = any(one.name == "exec" for one in case.local)
        if trapped and not batch:
            message = (
                f"the trap for {name} is the batch shell's, and --signal={case.value('signal')} tells only steps"
            )
            yield case.of(case.header["signal"], "SLM046", message, f"--signal=B:{case.value('signal')}")
        elif batch and not trapped and not executes and work:
            message = f"the batch shell has no trap for {name}, and ends by it"
            yield case.of(
                case.header["signal"],
                "SLM046",
                message,
                f"--signal={case.value('signal').partition(':')[2]}, or a trap",
            )
        elif batch and trapped:
            blocking = [step for step in work if not step.command.background and not step.command.pipeline]
            if blocking and not any(one.name == "wait" for one in case.local):
                message = f"bash runs the trap for {name} when srun has ended, which is too late"
                yield case.at(blocking[-1].command, "SLM047", message, "srun ... & wait")
    resumes = (
        r"(?i)resume|restart|requeue|load[-_]?(dir|path|from|ckpt|checkpoint)?\b|latest|ckpt|checkpoint|auto_?resume"
    )
    if "requeue" in case.header and (work or case.launches) and not case.says(resumes):
        yield case.of(
            case.header["requeue"],
            "SLM008",
            "a requeued job starts again, and nothing here says from which checkpoint",
        )


def _same(name: str, trapped: str) -> bool:
    numbers = {"10": "USR1", "12": "USR2", "15": "TERM", "1": "HUP", "2": "INT"}
    return numbers.get(trapped, trapped.upper().removeprefix("SIG").strip("'\"")) == name


# --- the shell --------------------------------------------------------------------------------------


def _shell(case: Case) -> Iterator[Found]:
    conda = [
        c for c in case.local if c.name in ("conda", "mamba") and len(c.argv) > 1 and c.argv[1].partial == "activate"
    ]
    ready = (
        r"conda\.sh|mamba\.sh|shell\.bash|shell\s+hook|\bbashrc|bash_profile|/etc/profile|conda init"
        r"|source\s+activate|(module|ml)\s+(load|add)?.*(conda|mamba|python|forge|pytorch)|eval\s"
    )
    login = re.match(r"#!.*\s-\w*[li]", case.text) or re.search(r"^#SBATCH.*--get-user-env", case.text, re.MULTILINE)
    if conda and not login and not case.says(ready):
        yield case.at(
            conda[0], "SLM060", "a batch shell reads no .bashrc: conda is no function here, or not there at all"
        )
    strict = next((c for c in case.local if c.name == "set" and re.search(r"\s-[a-zA-Z]*u|nounset", c.text)), None)
    if strict:
        for command in case.local:
            activates = command in conda or (
                command.name in ("source", ".") and command.text.rstrip().split()[-2:-1] == ["activate"]
            )
            loads = command.name in ("module", "ml")
            relaxed = any(
                c.name == "set" and "+u" in c.text and strict.line < c.line < command.line for c in case.local
            )
            if (activates or loads) and command.line > strict.line and not relaxed:
                yield case.at(
                    command,
                    "SLM061",
                    f"`{command.name}` under set -u",
                    "set +u before it, set -u after",
                    "" if activates else "note",
                )
                break
    deep = [
        launch
        for launch, _, _ in case.launches
        if launch.kind.startswith("deepspeed") or any("deepspeed" in w.text for w in launch.arguments)
    ]
    if case.batch and deep and "TORCH_EXTENSIONS_DIR" not in case.text and (case.nodes or 1) > 1:
        word = deep[0].word
        message = "TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR are not set: all nodes compile in one home"
        yield Found("SLM062", message, word.line, word.column, "", "", word.column + len(word.text))

    yield from _split(case)
    for broken in case.script.broken[:1]:
        row = case.lines[broken.line - 1] if broken.line <= len(case.lines) else ""
        column = len(row) - len(row.lstrip()) + 1
        message = f"this makes no sense to a shell, from `{(row.strip() or broken.text)[:60]}` on"
        yield Found("SLM068", message, broken.line, column, "", "", len(row) + 1)


def _split(case: Case) -> Iterator[Found]:
    """`ARGS=a.py $MORE` without quotes: MORE is run as a program, which has ARGS, and the script has not."""
    kept = {one.name for one in case.script.assignments if not one.prefix} | set(case.script.exported)
    for command, remote in case.running:
        if not command.assignments or not command.argv or not command.words:
            continue
        given, word = command.assignments[-1], command.words[0]
        option = bool(re.match(r"--?[A-Za-z]", command.argv[0].partial))
        variable = re.fullmatch(r"\$\{?[A-Za-z_]\w*(\[[@*]\])?\}?", word.text)
        if not option and not variable:
            continue
        name = given.name
        rest = case.text.replace(command.text, "")
        # `DEVICE=0 $CMD` is fine; where the script reads DEVICE afterwards it was meant for the script
        if not option and (name in kept or not re.search(rf"\$(\{{{name}\b|{name}\b)", rest)):
            continue
        message = f"{word.text} is run as a program, and {name} is not set for what follows"
        fix = f'{name}="... {word.text} ..."'
        yield case.at(_shown(case, command, remote), "SLM067", message, fix)


# --- files ------------------------------------------------------------------------------------------


LOCAL_DISK = re.compile(r"/(var/)?tmp/|/dev/shm/")


def _files(case: Case) -> Iterator[Found]:
    several = (case.nodes or 1) > 1 or any(step.several for step in case.steps)
    written: dict[str, shell.Command] = {}
    told: set[str] = set()
    hosts = re.compile(r"(?i)(^|[/_.-])(my)?(host|machine|node)s?_?-?(file|list)?s?(\.\w+)?$")
    for command in case.local:
        for redirect in command.redirects:
            target = redirect.target
            if target is None or ">" not in redirect.operator or "&" in target.text:
                continue
            path = target.partial
            written.setdefault(path, command)
            listing = (
                "slots=" in command.text
                or "SLURM_JOB_NODELIST" in command.text
                or "scontrol show host" in command.text
            )
            shared = case.batch and several and hosts.search(basename(path)) and listing and not target.left
            if shared and path not in told:
                told.add(path)
                yield case.at(command, "SLM063", f"{path} is the same file for every job", f"{path}.$SLURM_JOB_ID")
    if not several or case.says(r"\bsbcast\b"):
        return
    for step in case.steps:
        if step.kind != "srun" or (step.nodes or 2) <= 1:
            continue
        inner = [word for c in step.command.script.everything() for word in c.argv] if step.command.script else []
        for word in (*step.program, *inner):
            path = word.partial.rpartition("=")[2]
            if LOCAL_DISK.match(path) and path in written and _kind(written[path]) != "srun":
                yield case.at(
                    written[path],
                    "SLM064",
                    f"{path} is written on the first node and read on all",
                    "a shared path, or sbcast",
                )
                return
    yield from _mounts(case)


def _mounts(case: Case) -> Iterator[Found]:
    for step in case.steps:
        image, mounts = step.options.get("container-image"), step.options.get("container-mounts")
        if image is None or (mounts and mounts.value and mounts.value.left) or "container-mount-home" in step.options:
            continue
        said = mounts.value.partial if mounts and mounts.value else ""
        inner = [word for c in step.command.script.everything() for word in c.argv] if step.command.script else []
        inside = [part.split(":")[1] if ":" in part else part for part in said.split(",") if part]
        for word in (*step.program, *inner):
            path = word.value or ""
            mounted = any(path.startswith(folder.rstrip("/") + "/") for folder in inside)
            if re.fullmatch(r"/(?!opt/|usr/|workspace|tmp/)\S+\.(py|sh|json|ya?ml)", path) and not mounted:
                yield case.at(step.command, "SLM066", f"{path} is under none of the container's mounts")
                return


# --- secrets ----------------------------------------------------------------------------------------


def _secrets(case: Case) -> Iterator[Found]:
    for one in case.script.assignments:
        if one.value is not None and launchlint.assigned_secret(one.name, one.value.value):
            yield case.at(one, "LCH010", f"{one.name} is a secret in plain text")
    for command, remote in case.commands:
        words = case.words(command.argv, remote)
        yield from launchlint.secrets(words)
        for word in words:
            for name, value in re.findall(
                r"(?:^--export=|,|^-e|^--env=|^)([A-Za-z_][A-Za-z0-9_]*)=([^,\s]+)", word.text
            ):
                if word.text.startswith(("--export=", "--env=", "ALL,")) and launchlint.assigned_secret(name, value):
                    yield Found(
                        "LCH010",
                        f"{name} is a secret in plain text",
                        word.line,
                        word.column,
                        "",
                        "",
                        word.column + len(word.text),
                    )
    export = case.value("export")
    for name, value in re.findall(r"([A-Za-z_][A-Za-z0-9_]*)=([^,\s]+)", export):
        if launchlint.assigned_secret(name, value):
            yield case.of(case.header["export"], "LCH010", f"{name} is a secret in plain text")


def script_in(words: Sequence[str]) -> int | None:
    """Where the script stands in `bash -c SCRIPT`: 2."""
    for at, word in enumerate(words[:-1]):
        if re.fullmatch(r"-[a-z]*c", word) and at and basename(words[0]) in ("bash", "sh", "zsh", "ash"):
            return at + 1
    return None
