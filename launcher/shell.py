"""Shell scripts of others, read and never run: directives, assignments, commands with what is known of their words.

A word becomes pieces: text, or a name that only running the script would replace. What earlier lines assign is put
in where it is simple; the rest keeps its name. Nothing here raises on an odd script: what was not understood stands
in `Script.unread`.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher import facts

AROUND = ("pipeline", "position", "last", "background", "before", "after")
TEXTS = frozenset(
    """word variable_name special_variable_name number test_operator regex file_descriptor extglob_pattern""".split()
)
EXPANSIONS = frozenset(["simple_expansion", "expansion", "command_substitution", "arithmetic_expansion"])
BLANKS = re.compile(rb"(\s|\\\r?\n)*")
DEPTH = 8  # `bash -c "bash -c ..."`: deeper than any script that a person wrote
# Values that double with each line stay names: Linux takes 128 KiB for one argument, bytes or bytes of two-byte text.
LONGEST = 64 << 10  # characters of one value
MOST = 4096  # words of one array
BUDGET = 8 << 20  # characters that one reading puts in for names, all nested scripts together
EACH = 64  # a piece's own share of that
CALL = 32768  # and that of reading a function again

# What stands for what, whoever wrote it. Values that #SBATCH lines give (4 nodes) are put in; the rest stays a name.
MEANINGS = {
    **dict.fromkeys(["SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_NODES"], "nodes"),
    **dict.fromkeys(["SLURM_NODEID"], "node-rank"),
    **dict.fromkeys(["SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"], "rank"),
    **dict.fromkeys(["SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"], "local-rank"),
    **dict.fromkeys(["SLURM_NTASKS", "SLURM_NPROCS", "OMPI_COMM_WORLD_SIZE"], "tasks"),
    **dict.fromkeys(["SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"], "gpus"),
    **dict.fromkeys(["SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"], "tasks-per-node"),
    **dict.fromkeys(["SLURM_JOB_ID", "SLURM_JOBID"], "job-id"),
    **dict.fromkeys(["SLURM_JOB_NODELIST", "SLURM_NODELIST"], "node-list"),
    **dict.fromkeys(["SLURM_SUBMIT_DIR", "PWD", "SLURM_JOB_WORKDIR"], "submit-dir"),
    **dict.fromkeys(["SLURM_TMPDIR", "TMPDIR", "LOCAL_SCRATCH", "JOBSCRATCH", "SLURM_JOBTMP"], "local-disk"),
    **dict.fromkeys(["SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_HOST"], "first-node"),
    "SLURM_ARRAY_TASK_ID": "array-index",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_JOB_NAME": "job-name",
    "HOSTNAME": "this-node",
    "SLURMD_NODENAME": "this-node",
    "RANDOM": "random",
}
# Slurm sets these where a directive says so, else a default holds: ${SLURM_CPUS_PER_TASK:-4}
FROM_DIRECTIVES = ("directive", "submit-dir", "cpus-per-task", "tasks-per-node", "gpus", "nodes")
FIRST = r"(head\s+(-n\s*1|-1|--lines[= ]1)|sed\s+(-n\s+)?['\"]?1(p|q)['\"]?|awk\s+'?(NR==1|\{print \$1; exit\}).*)"
SUBSTITUTIONS = (  # of a command's text; the first that fits says what it means
    (rf"scontrol\s+show\s+(hostname|hostnames|host)\b.*\|\s*{FIRST}", "first-node"),
    (rf"(getent|host|dig|nslookup)\b.*\|.*|.*nodeset\b.*\|\s*{FIRST}", "first-node"),
    (r"srun\b.*\bhostname\b.*|.*ssh\s.*hostname.*", "first-node"),
    (r"scontrol\s+show\s+(hostname|hostnames|host)\b.*\|\s*wc\s+-l.*", "nodes"),
    (r"scontrol\s+show\s+(hostname|hostnames|host)\b.*", "hosts"),
    (r"(nodeset|python3?\s.*hostlist).*", "hosts"),
    (r"hostname(\s+(-I|-i|--ip-address|--all-ip-addresses)).*", "this-address"),
    (r"hostname\b.*|uname\s+-n", "this-node"),
    (r"nvidia-smi\b.*(\|\s*wc\s+-l|count).*|rocm-smi\b.*wc.*", "gpus"),
    (r"(pwd|git\s+rev-parse\s+--show-toplevel)\s*(-P)?", "submit-dir"),
    (r"date\b.*", "time"),
    (r"(shuf|comm)\b.*|.*\b(RANDOM|get_free_port|bind\(\(|ephemeral)\b.*", "random"),
    (r".*\b(SLURM_JOBID|SLURM_JOB_ID|SLURM_JOBID\}?|SLURM_JOB_ID\}?)\b.*", "job-id"),
)


@dataclass(frozen=True)
class Piece:
    """Text, or with a `name` what a shell would put there: `text` is then how it was written."""

    text: str
    name: str = ""
    meaning: str = ""
    quoted: bool = False

    @property
    def shown(self) -> str:
        return self.text if not self.name or not self.name.isidentifier() else f"${{{self.name}}}"


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Word:
    """One word of a command: as it was written, and what is known of it."""

    text: str
    pieces: Pieces
    line: int
    column: int
    quoting: str = "none"  # none, single, double or mixed

    @property
    def value(self) -> str | None:
        """What the program would get; None where only running the script would tell."""
        return None if self.left else "".join(piece.text for piece in self.pieces)

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(piece.name for piece in self.pieces if piece.name)

    @property
    def partial(self) -> str:
        """The value with ${NAME} for what is not known."""
        return "".join(piece.shown for piece in self.pieces)

    @property
    def meaning(self) -> str:
        """Of a word that is one thing: first-node for "$(scontrol show hostnames ... | head -n 1)"."""
        known = [piece for piece in self.pieces if piece.name or piece.text]
        return known[0].meaning if len(known) == 1 else ""


@dataclass(frozen=True)
class Directive:
    """`#SBATCH -N4`: option nodes, value 4. A flag has no value."""

    option: str
    value: str | None
    line: int
    column: int
    text: str
    known: bool = True  # one of sbatch's options


@dataclass(frozen=True)
class Assignment:
    name: str
    value: Word | None  # None for an array
    array: tuple[Word, ...] | None
    exported: bool
    line: int
    column: int
    inside: tuple[str, ...] = ()
    append: bool = False
    prefix: bool = False  # of one command, `A=1 python`


@dataclass(frozen=True)
class Redirect:
    operator: str  # >, >>, 2>&1, <<<
    target: Word | None


@dataclass(frozen=True)
class Heredoc:
    text: str  # with what is known put in, unless its delimiter was quoted
    raw: str
    quoted: bool
    line: int


@dataclass(frozen=True)
class Command:
    """`words` as written; `argv` as its program would get them: strings split, arrays spread, known values put in."""

    words: tuple[Word, ...]
    argv: tuple[Word, ...]
    line: int
    column: int
    end: int
    text: str
    inside: tuple[
        str, ...
    ] = ()  # ("function main", "for", "if", "subshell", "bash -c", "substitution"), outermost first
    assignments: tuple[Assignment, ...] = ()
    redirects: tuple[Redirect, ...] = ()
    heredoc: Heredoc | None = None
    pipeline: int = 0  # commands of one pipeline share a number; 0: none
    position: int = 0  # in that pipeline
    last: bool = True  # of its pipeline
    background: bool = False
    before: str = ""  # the && or || that stands before it
    after: str = ""  # and behind it
    script: Script | None = None  # `bash -c '...'`, `bash <<EOF`, or a script that a heredoc wrote

    @property
    def name(self) -> str:
        return (self.argv[0].value or self.argv[0].partial) if self.argv else ""


@dataclass(frozen=True)
class Trap:
    action: str
    signals: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Unread:
    line: int
    text: str


@dataclass(frozen=True)
class Choice:
    """A variable that a condition may change: `if [ -d X ]; then OPT=--a; fi` takes "" and leaves --a."""

    name: str
    taken: str
    other: str
    condition: str
    line: int  # of the condition


@dataclass(frozen=True)
class Script:
    name: str
    text: str
    directives: tuple[Directive, ...] = ()
    late: tuple[Directive, ...] = ()  # behind the first command: sbatch does not see them
    disabled: tuple[Directive, ...] = ()  # ##SBATCH
    assignments: tuple[Assignment, ...] = ()
    commands: tuple[Command, ...] = ()
    functions: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()  # errexit, nounset, pipefail, xtrace
    traps: tuple[Trap, ...] = ()
    files: Mapping[str, Heredoc] = field(default_factory=dict)  # what heredocs write
    loops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # for SEED in 1 2 3
    variables: Mapping[str, tuple[Pieces, ...]] = field(default_factory=dict)  # at the end; an array has several
    exported: frozenset[str] = frozenset()
    choices: tuple[Choice, ...] = ()
    unread: tuple[Unread, ...] = ()
    broken: tuple[Unread, ...] = ()  # where the grammar finds no sense, or something that is not there

    def everything(self) -> Iterator[Command]:
        """Nested scripts too, each behind the command that runs it."""
        for command in self.commands:
            yield command
            if command.script:
                yield from command.script.everything()

    def directive(self, option: str) -> Directive | None:
        """The last of a name holds."""
        return next((one for one in reversed(self.directives) if one.option == option), None)


# --- options --------------------------------------------------------------------------------------

INHERITED = frozenset(  # what the shell that submits, modules and images put there before the script's first line
    "PATH LD_LIBRARY_PATH LIBRARY_PATH PYTHONPATH CPATH MANPATH MODULEPATH PKG_CONFIG_PATH CMAKE_PREFIX_PATH".split()
)
SYNONYMS = {
    "tasks-per-node": "ntasks-per-node", "job-id": "jobid", "workdir": "chdir", "job_name": "job-name",
    "cpu_bind": "cpu-bind", "share": "oversubscribe", "cluster": "clusters", "mem_bind": "mem-bind",
    "accel_bind": "accel-bind", "exclusive_user": "exclusive",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    name: str  # the long one
    value: Word | None
    word: Word


def long_name(name: str) -> str:
    """ntasks-per-node for ntasks-per-no, as getopt takes every beginning that fits one name alone."""
    name = SYNONYMS.get(name, name)
    table = facts.slurm_options()
    if name in table:
        return name
    fits = [one for one, row in table.items() if one.startswith(name) and "=" not in one and "p" not in row.of]
    return fits[0] if len(fits) == 1 else name


def _value(name: str, *, srun: bool) -> str:
    """= where it needs one, [=] where it may have one, else nothing."""
    row = facts.slurm_options().get(name)
    value = row.value if row else ""
    return value if value != "s=" else "=" if srun else "[=]"


def options(argv: Sequence[Word], *, srun: bool = True) -> tuple[list[Option], tuple[Word, ...]]:
    """What stands behind `srun` or #SBATCH: its options, and the program with its arguments."""
    found: list[Option] = []
    words = list(argv)
    while words:
        word = words[0]
        text = word.partial
        if text == "--":
            words.pop(0)
            break
        if not text and words[1:] and words[1].partial.startswith("-"):  # "$MORE", which is empty here
            words.pop(0)
            continue
        if text.startswith("--"):
            words.pop(0)
            written, equals, rest = text[2:].partition("=")
            name = long_name(written)
            needs = _value(name, srun=srun) == "="
            if equals:
                found.append(Option(name, cut(word, 3 + len(written)), word))
            elif needs and words:
                found.append(Option(name, words.pop(0), word))
            else:
                found.append(Option(name, None, word))
        elif text.startswith("-") and len(text) > 1:
            words.pop(0)
            for at, letter in enumerate(text[1:], 1):
                name = facts.letters_of("s").get(letter) or facts.letters_of("b").get(letter, letter)
                needs = _value(name, srun=srun) == "="
                rest = text[at + 1 :]
                if needs or (rest and _value(name, srun=srun)):
                    value = cut(word, at + 1) if rest else (words.pop(0) if words and needs else None)
                    if value is not None and value.partial.startswith("=") and rest:
                        value = cut(value, 1)
                    found.append(Option(name, value, word))
                    break
                found.append(Option(name, None, word))
        else:
            break
    return found, tuple(words)


def cut(word: Word, count: int) -> Word:
    """Without its first characters, which are text: --nodes=$N from 8 on."""
    pieces: list[Piece] = []
    for piece in word.pieces:
        if count and not piece.name:
            taken = min(count, len(piece.text))
            piece, count = replace(piece, text=piece.text[taken:]), count - taken
        if piece.text or piece.name:
            pieces.append(piece)
    return replace(word, pieces=tuple(pieces))


def directives(text: str) -> tuple[list[Directive], list[Directive], list[Directive]]:
    """#SBATCH lines as sbatch reads them, those behind the first command, and those with a second #."""
    found: tuple[list[Directive], list[Directive], list[Directive]] = ([], [], [])
    body = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            found[1 if body else 0].extend(_directive(line, "#SBATCH", number))
        elif re.match(r"##+\s?SBATCH\b|#\s+SBATCH\b", line):
            magic = re.match(r"[#\s]+SBATCH", line)
            assert magic is not None
            found[2].extend(_directive(line, magic.group(), number))
        elif line.strip() and not line.lstrip().startswith("#"):
            body = True
    return found


def _directive(line: str, magic: str, number: int) -> list[Directive]:
    words = []
    at = len(magic)
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        if line[at] == "#":
            break
        start, out, quote = at, "", ""
        while at < len(line) and (quote or not line[at].isspace()):
            letter = line[at]
            if quote:
                if letter == quote:
                    quote = ""
                else:
                    out += letter
            elif letter in "'\"":
                quote = letter
            elif letter == "\\" and at + 1 < len(line):
                at += 1
                out += line[at]
            else:
                out += letter
            at += 1
        words.append(Word(line[start:at], (Piece(out),), number, start + 1))
    given, rest = options(words, srun=False)
    result = [
        Directive(
            one.name, one.value.value if one.value else None, number, one.word.column, line.strip(),
            one.name in facts.options_of("b") or one.name in facts.options_of("s"),
        )
        for one in given
    ]  # fmt: skip
    return result + [Directive(word.text, None, number, word.column, line.strip(), False) for word in rest[:1]]


def near(name: str) -> str:
    """near("gpu-per-node") is gpus-per-node; "" for what sbatch has, and for what fits nothing."""
    known = [*facts.options_of("b"), *facts.options_of("p")]
    fits = [option for option in facts.options_of("b") if option.startswith(name)]
    if name in known or len(fits) == 1 or name in facts.options_of("s"):
        return ""
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.75) or fits[-1:]
    return close[0] if close else ""


# --- the script -----------------------------------------------------------------------------------


def read(text: str, name: str = "<stdin>", arguments: Sequence[str] = ()) -> Script:
    """Everything that can be said of a script without running it; `arguments` are its $1, $2 ... if known."""
    given, late, disabled = directives(text)
    reader = _Reader(text, name, _of_directives(given), frozenset(), 0)
    if arguments:
        reader.positional([Word(one, (Piece(one),), 0, 0) for one in arguments])
    script = reader.script()
    return replace(script, directives=tuple(given), late=tuple(late), disabled=tuple(disabled))


def resolve(word: Word, known: Mapping[str, str]) -> Word:
    """The same word with more names known: resolve(word, {"SLURM_NODEID": "0"})."""
    pieces = tuple(
        Piece(known[piece.name], quoted=piece.quoted) if piece.name in known else piece for piece in word.pieces
    )
    return replace(word, pieces=pieces)


def _of_directives(given: Iterable[Directive]) -> dict[str, str]:
    """Variables that Slurm makes of #SBATCH lines: --nodes=4 is SLURM_NNODES=4."""
    last = {one.option: one.value or "" for one in given}
    found: dict[str, str] = {}
    number = re.compile(r"[0-9]+\Z")
    nodes = last.get("nodes", "")
    tasks = last.get("ntasks-per-node", "")
    if number.match(nodes):
        found |= {"SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes}
    if number.match(tasks):
        found |= {"SLURM_NTASKS_PER_NODE": tasks}
    total = last.get("ntasks", "")
    if not total and number.match(nodes) and number.match(tasks):
        total = str(int(nodes) * int(tasks))
    if number.match(total):
        found |= {"SLURM_NTASKS": total, "SLURM_NPROCS": total}
    if number.match(last.get("cpus-per-task", "")):
        found["SLURM_CPUS_PER_TASK"] = last["cpus-per-task"]
    gres = re.search(r"gpu(:[A-Za-z0-9_.-]*[A-Za-z][A-Za-z0-9_.-]*)?:([0-9]+)", last.get("gres", ""))
    gpus = last.get("gpus-per-node", "").rpartition(":")[2] or (gres.group(2) if gres else "")
    if number.match(gpus):
        found |= {"SLURM_GPUS_ON_NODE": gpus}
        if last.get("gpus-per-node"):
            found["SLURM_GPUS_PER_NODE"] = gpus
    if re.match(r"[A-Za-z0-9_.-]+\Z", last.get("job-name", "")):
        found["SLURM_JOB_NAME"] = last["job-name"]
    return found


PLACED = re.compile(r"(?:realpath|readlink -f) ([A-Za-z0-9_.][\w./-]*)|cd ([A-Za-z0-9_.][\w./-]*) ?(?:;|&&) ?pwd")
# $(((SLURM_NODEID)) && echo 0 || echo 1) is a command to bash, which tries both; the grammar sees arithmetic alone.
NOT_ARITHMETIC = re.compile(r"\$\(\(\(\s*(\w+)\s*\)\) ?(?=&&|\|\|)")


class _Reader:
    """One pass over the tree, in the order in which a shell would go."""

    def __init__(
        self,
        text: str,
        name: str,
        given: Mapping[str, str],
        exported: frozenset[str],
        depth: int,
        line: int = 0,
        budget: list[int] | None = None,
    ) -> None:
        self.budget = [BUDGET] if budget is None else budget  # one for all nested readers
        text = NOT_ARITHMETIC.sub(r"$(let \1 ", text)
        self.text, self.name, self.depth, self.first = text, name, depth, line
        self.source = text.encode("utf-8", "surrogateescape")
        self.known: dict[str, tuple[Pieces, ...]] = {key: ((Piece(value),),) for key, value in given.items()}
        self.arrays: set[str] = set()
        self.lost: set[str] = set()  # names whose values became too long
        self.exported = set(exported)
        self.assignments: list[Assignment] = []
        self.commands: list[Command] = []
        self.functions: list[str] = []
        self.flags: set[str] = set()
        self.traps: list[Trap] = []
        self.files: dict[str, Heredoc] = {}
        self.loops: dict[str, tuple[str, ...]] = {}
        self.bodies: dict[str, tuple[Any, tuple[str, ...]]] = {}  # of functions that nobody has called yet
        self.wrappers: dict[str, tuple[Any, tuple[str, ...]]] = {}  # run() { srun "$@"; }: read at every call
        self.calling: list[str] = []
        self.choices: list[Choice] = []
        self.unread: list[Unread] = []
        self.pipelines = 0

    def script(self) -> Script:
        import tree_sitter
        import tree_sitter_bash

        shebang = re.match(r"#!\S+\s+(-\S+)", self.text)
        if shebang and "e" in shebang.group(1):
            self.flags.add("errexit")
        parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))
        root = parser.parse(self.source).root_node
        broken = tuple(self.broken(root)) if root.has_error and not self.depth else ()
        try:
            self.walk(root, (), {})
            while self.bodies:  # that nobody calls
                self.call(next(iter(self.bodies)), None)
        except RecursionError:
            self.unread.append(Unread(1, "nested too deeply"))
        return Script(
            name=self.name,
            text=self.text,
            assignments=tuple(self.assignments),
            commands=tuple(self.commands),
            functions=tuple(self.functions),
            options=frozenset(self.flags),
            traps=tuple(self.traps),
            files=dict(self.files),
            loops=dict(self.loops),
            variables=dict(self.known),
            exported=frozenset(self.exported),
            choices=tuple(self.choices),
            unread=tuple(self.unread),
            broken=broken,
        )

    # -- statements

    def broken(self, node: Any) -> Iterator[Unread]:
        """The innermost nodes that are wrong, and what is missing."""
        if node.is_missing:  # what begins there has no end
            yield Unread(self.line(node.parent or node), f"{node.type} is missing")
        elif node.has_error:
            inner = [one for child in node.children for one in self.broken(child)]
            yield from inner
            gap = re.fullmatch(r"for\s+\w+\s*", self.raw(node))  # `for i do`, which bash has and the grammar has not
            if node.type == "ERROR" and not inner and not gap:
                yield Unread(self.line(node), (self.raw(node).strip().splitlines() or [""])[0][:60])

    def line(self, node: Any) -> int:
        return int(node.start_point[0]) + 1 + self.first

    def raw(self, node: Any) -> str:
        return self.source[node.start_byte : node.end_byte].decode("utf-8", "surrogateescape")

    def walk(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        """`how`: what stands around a command: its redirects, pipeline, && and &."""
        kind = node.type
        if kind in ("program", "compound_statement", "do_group", "else_clause", "elif_clause", "case_item"):
            inside = (*inside, "if") if kind in ("else_clause", "elif_clause") else inside
            self.block(node, inside, how)
        elif kind == "command":
            self.command(node, inside, how)
        elif kind == "redirected_statement":
            self.redirected(node, inside, how)
        elif kind == "pipeline":
            self.pipelines += 1
            number = self.pipelines
            parts = [child for child in node.named_children if child.type != "comment"]
            for at, child in enumerate(parts):
                self.walk(child, inside, {**how, "pipeline": number, "position": at, "last": at == len(parts) - 1})
        elif kind == "list":
            self.joined(node, inside, how)
        elif kind in ("variable_assignment", "variable_assignments"):
            for one in [node] if kind == "variable_assignment" else node.named_children:
                self.assign(one, inside, exported=False)
        elif kind in ("declaration_command", "unset_command"):
            self.declare(node, inside)
        elif kind == "function_definition":
            name = node.child_by_field_name("name")
            self.functions.append(self.raw(name) if name else "")
            body = node.child_by_field_name("body")
            if body:
                found = (body, (*inside, f"function {self.functions[-1]}"))
                self.bodies[self.functions[-1]] = found
                if re.search(r"\$\{?[@*]", self.raw(body)):
                    self.wrappers[self.functions[-1]] = found
        elif kind == "if_statement":
            self.branched(node, inside, how)
        elif kind in ("for_statement", "c_style_for_statement", "while_statement"):
            variable = node.child_by_field_name("variable")
            if variable:
                self.loop(self.raw(variable), node)
            self.block(node, (*inside, kind.replace("c_style_", "").removesuffix("_statement")), how)
        elif kind == "case_statement":
            self.cases(node, inside, how)
        elif kind == "subshell":
            before, arrays = dict(self.known), set(self.arrays)
            self.block(node, (*inside, "subshell"), how)
            self.known, self.arrays = before, arrays
        elif kind == "negated_command":
            self.block(node, inside, how)
        elif kind == "ERROR":
            self.unread.append(
                Unread(self.line(node), self.raw(node).splitlines()[0][:120] if self.raw(node) else "")
            )
            self.block(node, inside, how)

    def loop(self, name: str, node: Any) -> None:
        """`for SEED in 1 2 3`: SEED is a name in what follows, and its values are known where they are text."""
        self.known[name] = ((Piece(f"${name}", name, "loop"),),)
        self.arrays.discard(name)
        values = [
            part.value for child in node.children_by_field_name("value") for part in self.spread(self.word(child))
        ]
        if values and all(value is not None for value in values):
            self.loops[name] = tuple(str(value) for value in values)

    def block(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        for child in node.children:
            if not child.is_named:
                continue
            following = child.next_sibling
            background = following is not None and following.type == "&"
            self.walk(child, inside, {**how, "background": True} if background else how)

    def joined(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        parts = [child for child in node.children if child.type in ("&&", "||") or child.is_named]
        for at, child in enumerate(parts):
            if child.type in ("&&", "||"):
                continue
            before = parts[at - 1].type if at else how.get("before", "")
            after = parts[at + 1].type if at + 1 < len(parts) else how.get("after", "")
            around = {**how, "before": before, "after": after}
            if at and self.tests(parts[at - 2]):  # [ -n "$X" ] && A=1
                holds = self.holds(parts[at - 2])
                runs = holds if before == "&&" or holds is None else not holds
                sign = "" if before == "&&" else "not "
                self.choose([([child], runs, sign + self.bare(parts[at - 2]))], node, inside, around)
            else:
                self.walk(child, inside, around)

    # -- conditions

    def tests(self, node: Any) -> bool:
        """Whether it asks something of variables or files; a command that may fail is no question."""
        if node.type in ("list", "negated_command", "parenthesized_expression"):
            return any(self.tests(child) for child in node.named_children)
        return node.type == "test_command" or (node.type == "command" and bool(re.match(r"test\b", self.bare(node))))

    def holds(self, node: Any) -> bool | None:
        """A condition of values that the script itself has set; None for what only running it would tell."""
        text = self.bare(node)
        names = re.findall(r"\$[{(]?[#!]?([A-Za-z_]\w*|[0-9@*?#])", text)
        if any(name not in self.known for name in names):
            return None
        inner = [child for child in node.named_children if child.type != "comment"]
        if node.type in ("test_command", "parenthesized_expression"):
            return self.holds(inner[0]) if len(inner) == 1 else None
        if node.type == "negated_command" or (node.type == "unary_expression" and text.startswith("!")):
            found = self.holds(inner[-1]) if inner else None
            return None if found is None else not found
        if node.type == "list" or (node.type == "binary_expression" and re.search(r"&&|\|\|", text)):
            sign = next((child.type for child in node.children if child.type in ("&&", "||")), "")
            if len(inner) != 2 or not sign:
                return None
            both = [self.holds(child) for child in inner]
            if (sign == "||") in both:
                return sign == "||"
            return None if None in both else sign == "&&"
        if node.type == "binary_expression" and len(inner) in (2, 3):
            left, right = self.word(inner[0]), self.word(inner[-1])
            start, end = inner[0].end_byte, inner[-1].start_byte
            sign = self.source[start:end].decode("utf-8", "replace").strip()
            return _compared(left.value, sign, right.value, pattern=right.quoting == "none")
        if node.type == "unary_expression" and len(inner) == 2:
            value = self.word(inner[1]).value
            sign = self.raw(inner[0])
            if sign in ("-n", "-z") and value is not None:
                return (value == "") == (sign == "-z")
        return None

    def branched(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        """if, elif, else: what is known to be false is never run, what is known to be true is no condition."""
        parts = [[child for child in node.children if child.type not in ("elif_clause", "else_clause")]]
        parts += [child.children for child in node.children if child.type in ("elif_clause", "else_clause")]
        rows: list[tuple[list[Any], bool | None, str]] = []
        for part in parts:
            then = next((at for at, child in enumerate(part) if child.type == "then"), 0)  # an else has none
            asked = [child for child in part[:then] if child.is_named and child.type != "comment"]
            for child in asked:  # it may run programs
                self.walk(child, (*inside, "if"), how)
            holds = self.holds(asked[-1]) if asked else True
            body = [child for child in part[then:] if child.is_named]
            shown = " ".join(self.bare(child) for child in asked) or f"not {rows[0][2]}"
            rows.append((body, holds, shown))
        self.choose(rows, node, inside, how)

    def cases(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        value = node.child_by_field_name("value")
        asked = self.word(value).value if value is not None else None
        rows: list[tuple[list[Any], bool | None, str]] = []
        for item in node.named_children:
            if item.type != "case_item":
                continue
            patterns = item.children_by_field_name("value")
            texts = [self.raw(pattern).strip("'\"") for pattern in patterns]
            body = [child for child in item.named_children if child not in patterns]
            holds = None if asked is None else any(fnmatch.fnmatchcase(asked, text) for text in texts)
            whole = texts == ["*"]
            shown = f"case {self.raw(value) if value is not None else ''} in {'|'.join(texts)}"
            rows.append((body, True if whole else holds, shown))
        self.choose(rows, node, (*inside, "case"), how)

    def choose(
        self, rows: list[tuple[list[Any], bool | None, str]], node: Any, inside: tuple[str, ...], how: dict[str, Any]
    ) -> None:
        """Every branch is read; what is known behind them is what is certain, and the rest becomes a Choice."""
        before, arrays = dict(self.known), set(self.arrays)
        ends: list[tuple[str, dict[str, tuple[Pieces, ...]], set[str]]] = []
        decided = False  # a branch before this one is known to be taken
        whole = False  # one of them runs, whatever holds
        certain = None
        for body, holds, shown in rows:
            self.known, self.arrays = dict(before), set(arrays)
            never = decided or holds is False
            sure = holds is True and not ends and not never
            for child in body:
                self.walk(child, inside if sure else (*inside, "if", *(["never"] if never else [])), how)
            if not never:
                ends.append((shown, self.known, self.arrays))
            decided = decided or holds is True
            whole = whole or holds is True
            if sure:
                certain = ends[-1]
        if certain:
            self.known, self.arrays = certain[1], certain[2]
            return
        self.known, self.arrays = dict(before), set(arrays)
        changed = [name for _, known, _ in ends for name in known if known[name] != before.get(name)]
        for name in dict.fromkeys(changed):
            values = [(shown, known, kinds) for shown, known, kinds in ends if known.get(name) != before.get(name)]
            every = whole and len(values) == len(ends)
            asked = any(re.search(rf"\b{re.escape(name)}\b", shown) for shown, _, _ in values)
            options = all(self.shown(known[name]).startswith("-") for _, known, _ in values)
            if name not in before and not every and not asked and options:  # a program does without
                self.known[name] = ((Piece(""),),)
                others = values
            elif every or name not in before:
                taken = values[-1] if every else values[0]
                self.known[name] = taken[1][name]
                (self.arrays.add if name in taken[2] else self.arrays.discard)(name)
                others = [row for row in values if row is not taken]
            else:
                others = values
            for condition, known, _ in others:
                self.choices.append(
                    Choice(name, self.shown(self.known[name]), self.shown(known[name]), condition, self.line(node))
                )
            if name not in before and not every and others is not values:
                condition = values[0][0]
                condition = condition.removeprefix("not ") if condition.startswith("not ") else f"not {condition}"
                self.choices.append(Choice(name, self.shown(self.known[name]), "", condition, self.line(node)))

    @staticmethod
    def shown(values: Iterable[Pieces]) -> str:
        return " ".join("".join(piece.shown for piece in pieces) for pieces in values).strip()

    def redirected(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        redirects, heredoc = list(how.get("redirects", ())), how.get("heredoc")
        body = node.child_by_field_name("body")
        more: list[Any] = []
        for child in node.children:
            if child.type == "file_redirect" or child.type == "herestring_redirect":
                redirects.append(self.redirect(child))
            elif child.type == "heredoc_redirect":
                heredoc = self.heredoc(child)
                for inner in child.named_children:
                    if inner.type == "file_redirect":
                        redirects.append(self.redirect(inner))
                    elif (
                        inner.type in ("command", "pipeline", "list", "redirected_statement")
                        and inner.start_point[0] == child.start_point[0]  # else the grammar takes the body for one
                    ):
                        more.append(inner)  # what follows `<<EOF |` on its line
        if body is not None:
            self.walk(body, inside, {**how, "redirects": tuple(redirects), "heredoc": heredoc})
        elif heredoc or redirects:
            pass  # `> file` alone makes an empty one
        for inner in more:
            self.walk(inner, inside, how)

    def redirect(self, node: Any) -> Redirect:
        target = node.child_by_field_name("destination")
        if target is None:
            named = [child for child in node.named_children if child.type != "file_descriptor"]
            target = named[-1] if named else None
        sign = self.source[node.start_byte : target.start_byte if target else node.end_byte].decode(
            "utf-8", "replace"
        )
        return Redirect(sign.strip(), self.word(target) if target is not None else None)

    def heredoc(self, node: Any) -> Heredoc:
        start = next((child for child in node.children if child.type == "heredoc_start"), None)
        body = next((child for child in node.children if child.type == "heredoc_body"), None)
        quoted = bool(start and re.match(r"['\"\\]", self.raw(start)))
        if body is None:
            return Heredoc("", "", quoted, self.line(node))
        raw = self.raw(body)
        if any(child.type == "<<-" for child in node.children):
            raw = re.sub(r"(?m)^\t+", "", raw)
        text = raw if quoted else "".join(piece.shown for piece in self.inner(body, quoted=True))
        return Heredoc(text, raw, quoted, self.line(body))

    # -- commands

    def command(self, node: Any, inside: tuple[str, ...], how: dict[str, Any]) -> None:
        words: list[Word] = []
        prefix: list[Assignment] = []
        redirects = list(how.get("redirects", ()))
        heredoc = how.get("heredoc")
        ended = -1
        for child in node.children:
            if child.type == "variable_assignment":
                prefix.append(self.assignment(child, inside, exported=True, prefix=True))
            elif child.type in ("file_redirect", "herestring_redirect"):
                redirects.append(self.redirect(child))
            elif child.type == "heredoc_redirect":
                heredoc = self.heredoc(child)
            elif child.type == "command_name":
                word = self.word(child.named_children[0] if child.named_children else child)
                value = prefix[-1].value if prefix and ended == child.start_byte else None
                if value is not None and value.text.endswith("$"):
                    prefix[-1] = replace(prefix[-1], value=self.joined_words(value, word))
                else:
                    words.append(word)
            elif child.is_named and child.type != "comment":
                word = self.word(child)
                if words and ended == child.start_byte and words[-1].text.endswith("$"):
                    words[-1] = self.joined_words(words[-1], word)  # the grammar cuts a_$NAME.log behind its $
                else:
                    words.append(word)
            ended = child.end_byte
        if not words and prefix:  # LOG=$D/a_$N.log, which the grammar takes for a command
            for one in prefix:
                self.record(replace(one, prefix=False), exported=False)
            return
        argv = tuple(part for word in words for part in self.spread(word))
        self.assignments += prefix
        found = Command(
            words=tuple(words), argv=argv, line=self.line(node), column=int(node.start_point[1]) + 1,
            end=int(node.end_point[0]) + 1 + self.first, text=self.raw(node), inside=inside,
            assignments=tuple(prefix), redirects=tuple(redirects), heredoc=heredoc,
            **{key: how[key] for key in AROUND if key in how},
        )  # fmt: skip
        if heredoc and argv and found.name in ("cat", "tee"):
            for target in [one.target for one in redirects if one.operator.startswith(">")] + list(argv[1:]):
                if target is not None and not target.partial.startswith("-"):
                    self.files[target.partial.removeprefix("./")] = heredoc
        found = replace(found, script=self.nested(found))
        self.commands.append(found)
        self.effects(found)
        if argv and (found.name in self.bodies or found.name in self.wrappers) and found.name not in self.calling:
            self.call(found.name, argv[1:])

    def whole(self, nodes: Iterable[Any]) -> list[Word]:
        """Words, whole again where the grammar cuts `$A/$B` behind its second $."""
        words: list[Word] = []
        ended = -1
        for node in nodes:
            word = self.word(node)
            if words and ended == node.start_byte and words[-1].text.endswith("$"):
                words[-1] = self.joined_words(words[-1], word)
            else:
                words.append(word)
            ended = node.end_byte
        return words

    def joined_words(self, first: Word, second: Word) -> Word:
        """`a_$` and `NAME.log`, which are one word."""
        name = re.match(r"[0-9]|[A-Za-z_][A-Za-z0-9_]*", second.text)
        pieces = list(first.pieces)
        if name is None or not pieces or pieces[-1].name or not pieces[-1].text.endswith("$"):
            return replace(first, text=first.text + second.text, pieces=(*first.pieces, *second.pieces))
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text[:-1])
        more = [*self.variable(name[0], f"${name[0]}", False), *cut(second, name.end()).pieces]
        return replace(first, text=first.text + second.text, pieces=self.merge([*pieces, *more]))

    def call(self, name: str, arguments: Sequence[Word] | None) -> None:
        """A function is read where it is first called, with what it is told; None: nobody calls it."""
        first = self.bodies.pop(name, None)
        if not first and self.budget[0] < CALL:
            return
        self.budget[0] -= 0 if first else CALL
        body, inside = first or self.wrappers[name]
        names = ("@", *map(str, range(1, 10)))
        before = {key: self.known.get(key) for key in names}
        listed = "@" in self.arrays
        if arguments is not None:
            self.positional(arguments)
        self.calling.append(name)
        self.walk(body, inside, {})
        self.calling.pop()
        (self.arrays.add if listed else self.arrays.discard)("@")
        for key, value in before.items():
            if value is None:
                self.known.pop(key, None)
            else:
                self.known[key] = value

    def positional(self, words: Sequence[Word]) -> None:
        """$1, $2 ... and "$@"."""
        self.known["@"] = tuple(word.pieces for word in words)
        self.arrays.add("@")
        for at in range(1, 10):
            self.known.pop(str(at), None)
        for at, word in enumerate(words[:9], 1):
            self.known[str(at)] = (word.pieces,)

    def effects(self, command: Command) -> None:
        """What a builtin does to everything behind it."""
        words = [word.value or word.partial for word in command.argv]
        if not words:
            return
        if words[0] == "set":
            for at, word in enumerate(words[1:], 1):
                if word == "-o" or (word.startswith("-") and word.endswith("o") and at + 1 < len(words)):
                    self.flags.add(words[at + 1] if at + 1 < len(words) else "")
                if re.match(r"-[a-zA-Z]+\Z", word):
                    names = {"e": "errexit", "u": "nounset", "x": "xtrace"}
                    self.flags |= {names[letter] for letter in word[1:] if letter in names}
                if word == "+e":
                    self.flags.discard("errexit")
        elif words[0] == "trap" and len(words) > 1:
            self.traps.append(Trap(words[1], tuple(words[2:]), command.line))
        elif words[0] == "shift" and "@" in self.arrays:
            count = int(words[1]) if len(words) > 1 and words[1].isdigit() else 1
            rest = self.known.get("@", ())[count:]
            self.positional([replace(command.argv[0], pieces=pieces) for pieces in rest])
        elif words[0] == "unset":
            for name in words[1:]:
                self.known.pop(name, None)
        elif words[0] in ("mapfile", "readarray", "read") and len(words) > 1:
            if words[0] == "read" and command.heredoc:
                self.known[words[-1]] = ((Piece(command.heredoc.text),),)
                return
            host = "scontrol" in command.text or any(
                "scontrol" in one.target.text for one in command.redirects if one.target
            )
            meaning = "hosts" if host else ""
            self.known[words[-1]] = ((Piece(f"${words[-1]}", words[-1], meaning),),)
            self.arrays.add(words[-1])

    def nested(self, command: Command) -> Script | None:
        """The script inside `bash -c`, `bash <<EOF`, `eval`, or of a file that a heredoc wrote."""
        if self.depth >= DEPTH:
            return None
        for at, word in enumerate(command.argv):
            name = (word.value or "").rpartition("/")[2]
            if name in ("bash", "sh", "zsh", "dash"):
                rest = list(command.argv[at + 1 :])
                while rest and re.match(r"[-+][a-zA-Z-]+\Z", rest[0].partial):
                    flag = rest.pop(0)
                    if not flag.partial.startswith("--") and "c" in flag.partial and rest:
                        return self.inside(rest[0], rest[0].partial, rest[1:])
                    if flag.partial.endswith("o") and not flag.partial.startswith("--") and rest:
                        rest.pop(0)
                if not rest and command.heredoc:
                    return self.inside(command.argv[at], command.heredoc.text, [], line=command.heredoc.line - 1)
                if rest and rest[0].partial.removeprefix("./") in self.files:
                    written = self.files[rest[0].partial.removeprefix("./")]
                    return self.inside(rest[0], written.text, rest[1:], line=written.line - 1)
                return None
            if name == "eval" and at == 0:
                text = " ".join(one.partial for one in command.argv[1:])
                return self.inside(command.argv[0], text, []) if text and not re.match(r"\$\(|`", text) else None
            if at and word.partial.removeprefix("./") in self.files and command.name in ("srun", "exec", "time"):
                written = self.files[word.partial.removeprefix("./")]
                return self.inside(word, written.text, command.argv[at + 1 :], line=written.line - 1)
        return None

    def inside(self, word: Word, text: str, arguments: Sequence[Word], line: int | None = None) -> Script:
        known = {
            name: "".join(piece.text for piece in self.known[name][0])
            for name in self.known
            if name not in self.arrays
            and (name in self.exported or name.startswith("SLURM_"))
            and not any(piece.name for piece in self.known[name][0])
        }
        where = line if line is not None else word.line - 1
        reader = _Reader(text, self.name, known, frozenset(self.exported), self.depth + 1, where, self.budget)
        for name, values in self.known.items():  # that is not known but means something: the nodes, the first of them
            if name not in known and any(piece.meaning for pieces in values for piece in pieces):
                reader.known[name] = values
                reader.arrays |= {name} & self.arrays
        # `bash -c text zero one` counts from $0, `bash file one` from $1
        for at, one in enumerate(arguments, 1 if line is not None else 0):
            reader.known[str(at)] = (one.pieces,)
        if line is not None and arguments:
            reader.known["@"] = tuple(one.pieces for one in arguments)
            reader.arrays.add("@")
        reader.files = dict(self.files)
        return reader.script()

    # -- variables

    def declare(self, node: Any, inside: tuple[str, ...]) -> None:
        verb = node.children[0].type
        if verb in ("unset", "unsetenv"):
            for child in node.named_children:
                self.known.pop(self.raw(child), None)
            return
        flags = " ".join(self.raw(child) for child in node.named_children if child.type == "word")
        exported = verb == "export" or (verb in ("declare", "typeset") and "x" in flags)
        torn = {child.start_byte: child for child in node.named_children if child.type in ("word", "concatenation")}
        for child in node.named_children:
            if child.type == "variable_assignment":
                one = self.assignment(child, inside, exported=exported)
                rest = torn.pop(child.end_byte, None)
                if rest is not None and one.value is not None:
                    one = replace(one, value=self.joined_words(one.value, self.word(rest)))
                self.record(one, exported=exported)
            elif child.type in ("variable_name", "word", "simple_expansion") and exported:
                name = self.raw(child)
                self.exported.add(name)
                for at, one in enumerate(self.assignments):
                    if one.name == name:
                        self.assignments[at] = replace(one, exported=True)

    def assignment(self, node: Any, inside: tuple[str, ...], *, exported: bool, prefix: bool = False) -> Assignment:
        name = node.child_by_field_name("name")
        value = node.child_by_field_name("value")
        written = self.raw(name) if name is not None else ""
        array: tuple[Word, ...] | None = None
        word: Word | None = None
        if value is not None and value.type == "array":
            items = [child for child in value.named_children if child.type != "comment"]
            every = (part for word in self.whole(items) for part in self.spread(word))
            array = tuple(itertools.islice(every, MOST + 1))
        elif value is not None:
            word = self.word(value)
        else:
            word = Word("", (Piece(""),), self.line(node), int(node.end_point[1]) + 1)
        append = any(child.type == "+=" for child in node.children)
        return Assignment(
            written, word, array, exported, self.line(node), int(node.start_point[1]) + 1, inside, append, prefix
        )

    def assign(self, node: Any, inside: tuple[str, ...], *, exported: bool) -> None:
        self.record(self.assignment(node, inside, exported=exported), exported=exported)

    def record(self, one: Assignment, *, exported: bool) -> None:
        name = one.name
        if not exported and one.exported:
            one = replace(one, exported=False)
        if name in self.exported:
            one = replace(one, exported=True)
        if exported:
            self.exported.add(name)
        if "[" in name:  # arr[3]=x
            self.assignments.append(one)
            self.arrays.add(name.partition("[")[0])
            return
        before = self.known.get(name)
        if one.array is not None:
            values = tuple(word.pieces for word in one.array)
            if any(piece.meaning == "hosts" for pieces in values for piece in pieces):
                values = ((Piece(f"${name}", name, "hosts"),),)
            values = ((before or ()) + values) if one.append else values
            self.known[name] = values if len(values) <= MOST and not self.doubles(values) else self.unknown(name)
            self.arrays.add(name)
        elif one.value is not None:
            pieces = one.value.pieces
            if one.append and before:
                pieces = before[0] + pieces
            cut_off = any(piece.meaning == "too-long" for piece in pieces)
            short = _size(pieces) <= LONGEST and not cut_off and not self.doubles((pieces,))
            self.known[name] = (pieces,) if short else self.unknown(name)
            self.arrays.discard(name)
        self.assignments.append(one)

    def unknown(self, name: str) -> tuple[Pieces, ...]:
        self.lost.add(name)
        return ((Piece(f"${{{name}}}", name),),)

    def doubles(self, values: tuple[Pieces, ...]) -> bool:
        """Whether it goes on as a value that became too long did: A="$A $A" once more."""
        return bool(self.lost) and sum(piece.name in self.lost for pieces in values for piece in pieces) > 1

    # -- words

    def word(self, node: Any) -> Word:
        pieces = self.short(node)
        kinds = {"raw_string": "single", "ansi_c_string": "single", "string": "double", "translated_string": "double"}
        quoting = kinds.get(node.type, "none")
        if node.type == "concatenation":
            inner = {kinds.get(child.type, "none") for child in node.named_children}
            quoting = inner.pop() if len(inner) == 1 else "mixed"
        return Word(self.raw(node), pieces, self.line(node), int(node.start_point[1]) + 1, quoting)

    def short(self, node: Any) -> Pieces:
        """The pieces of a word; of one that what is put in makes too long, what was written."""
        found: list[Piece] = []
        room = LONGEST + EACH * (node.end_byte - node.start_byte)
        for piece in self.pieces(node):
            found.append(piece)
            room -= EACH + len(piece.text)
            if room < 0:
                return (Piece(self.raw(node), self.raw(node), "too-long"),)
        return self.merge(found)

    @staticmethod
    def merge(pieces: Iterable[Piece]) -> Pieces:
        out: list[Piece] = []
        for piece in pieces:
            if piece.name == "USER" and out and out[-1].text.endswith("/mnt/bb/") and not out[-1].name:
                # Frontier's local disk, as its users write it
                whole = Piece("/mnt/bb/${USER}", "/mnt/bb/${USER}", "local-disk", piece.quoted)
                out[-1:] = [*([replace(out[-1], text=out[-1].text[:-8])] if out[-1].text[:-8] else []), whole]
            elif out and not piece.name and not out[-1].name and out[-1].quoted == piece.quoted:
                out[-1] = replace(out[-1], text=out[-1].text + piece.text)
            elif piece.text or piece.name:
                out.append(piece)
        return tuple(out)

    def spread(self, word: Word) -> Iterator[Word]:
        """What one written word becomes: none, one, or several where it is an array or a string that splits."""
        share = re.fullmatch(r"\"?\$\{([A-Za-z_]\w*(?=\[)|@)(?:\[[@*]\])?:\s*([0-9]+)(?::([0-9]+))?\}\"?", word.text)
        if share and share[1] in self.arrays:  # "${T[@]:1}"; "${@:1}" counts from $0
            begin = max(int(share[2]) - (share[1] == "@"), 0)
            values = self.known.get(share[1], ())[begin:]
            if not self.affords(values):
                yield word
                return
            for pieces in values[: int(share[3])] if share[3] else values:
                yield replace(word, pieces=pieces)
            return
        name = re.fullmatch(r"\"?\$\{?([A-Za-z_][A-Za-z0-9_]*|@)(\[[@*]\](?::?\?[^}]*)?)?(\}?)\"?", word.text)
        if name and name.group(1) in self.arrays and (name.group(2) or name.group(1) == "@"):
            values = self.known.get(name.group(1), ())
            if not self.affords(values):
                yield word
                return
            for pieces in values:
                yield replace(word, pieces=pieces)
            return
        parts: list[list[Piece]] = [[]]
        begun = False
        for piece in word.pieces:
            if piece.name or piece.quoted or not re.search(r"\s", piece.text):
                parts[-1].append(piece)
                begun = begun or bool(piece.name or piece.text or piece.quoted)
                continue
            chunks = re.split(r"(\s+)", piece.text)
            for chunk in chunks:
                if chunk.isspace():
                    if parts[-1]:
                        parts.append([])
                elif chunk:
                    parts[-1].append(replace(piece, text=chunk))
                    begun = True
        if not begun and word.quoting == "none":
            if any(piece.name for piece in word.pieces):
                yield word
            return
        for part in parts:
            if part:
                yield replace(word, pieces=tuple(part))
            elif word.quoting != "none" and len(parts) == 1:
                yield replace(word, pieces=())

    def pieces(self, node: Any, *, quoted: bool = False) -> Iterator[Piece]:
        kind = node.type
        if kind in TEXTS:
            if node.named_children:
                yield from self.inner(node, quoted=quoted)
            else:
                text = self.raw(node)
                yield Piece(text if quoted else re.sub(r"\\(\n|.)", lambda m: "" if m[1] == "\n" else m[1], text),
                            quoted="\\" in text or quoted)  # fmt: skip
        elif kind == "raw_string":
            yield Piece(self.raw(node)[1:-1], quoted=True)
        elif kind == "ansi_c_string":
            yield Piece(_ansi(self.raw(node)[2:-1]), quoted=True)
        elif kind in ("string", "translated_string"):
            if kind == "translated_string":
                node = next((child for child in node.named_children if child.type == "string"), node)
            yield Piece("", quoted=True)
            yield from self.inner(node, quoted=True, trim=1)
        elif kind in ("concatenation", "command_name"):
            yield from self.inner(node, quoted=quoted)
        elif kind == "simple_expansion":
            written = self.bare(node)
            yield from self.variable(written[1:], written, quoted)
        elif kind == "expansion":
            yield from self.expansion(node, quoted)
        elif kind == "command_substitution":
            yield from self.substitution(node, quoted)
        elif kind == "arithmetic_expansion":
            yield from self.arithmetic(node, quoted)
        elif kind == "process_substitution":
            meaning = "hosts" if "scontrol" in self.raw(node) else ""
            yield Piece(self.raw(node), self.raw(node), meaning, quoted)
            self.inner_commands(node)
        elif kind == "brace_expression":
            yield Piece(self.raw(node), quoted=quoted)
        else:
            yield Piece(self.raw(node), quoted=quoted)

    def inner(self, node: Any, *, quoted: bool, trim: int = 0) -> Iterator[Piece]:
        """Children with the text between them, which the grammar leaves out."""
        at, end = node.start_byte + trim, node.end_byte - trim
        children = [child for child in node.named_children if child.type not in ("string_content", "heredoc_content")]
        for child in children:
            begin = child.start_byte
            if child.type in EXPANSIONS:  # the grammar counts blanks before them as theirs
                begin += self.blanks(child)
            if begin > at:
                yield self.between(at, begin, quoted)
            yield from self.pieces(child, quoted=quoted)
            at = child.end_byte
        if end > at:
            yield self.between(at, end, quoted)

    def blanks(self, node: Any) -> int:
        """Bytes before an expansion that the grammar counts as its own: blanks and continued lines."""
        match = BLANKS.match(self.source, node.start_byte, node.end_byte)
        return match.end() - node.start_byte if match else 0

    def bare(self, node: Any) -> str:
        start = node.start_byte + self.blanks(node)
        return self.source[start : node.end_byte].decode("utf-8", "surrogateescape")

    def between(self, start: int, end: int, quoted: bool) -> Piece:
        text = self.source[start:end].decode("utf-8", "surrogateescape")
        if quoted:
            text = re.sub(r"\\([$`\"\\\n])", lambda m: "" if m[1] == "\n" else m[1], text)
        else:
            text = re.sub(r"\\(\n|.)", lambda m: "" if m[1] == "\n" else m[1], text)
        return Piece(text, quoted=quoted)

    def variable(self, name: str, written: str, quoted: bool) -> Iterator[Piece]:
        if name == "*" and "@" in self.arrays:
            name = "@"
        values = self.known.get(name)
        if name == "@" and name in self.arrays:
            yield from self.item("@", "@", written, quoted)
        elif values and self.affords(values[:1]):
            for piece in values[0]:
                yield replace(piece, quoted=quoted) if piece.quoted != quoted else piece
        else:
            yield Piece(written, name, MEANINGS.get(name, ""), quoted)

    def affords(self, values: Iterable[Pieces]) -> bool:
        """Whether they are still put in; what is not stays a name."""
        cost = sum(_size(pieces) for pieces in values)
        if cost > self.budget[0]:
            return False
        self.budget[0] -= cost
        return True

    def expansion(self, node: Any, quoted: bool) -> Iterator[Piece]:
        written = self.bare(node)
        simple = re.fullmatch(r"\$\{([A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!])\}", written)
        if simple:
            yield from self.variable(simple.group(1), written, quoted)
            return
        item = re.fullmatch(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\[([^\]]*)\](?::?\?[^}]*)?\}", written)
        if item:
            yield from self.item(item.group(1), item.group(2), written, quoted)
            return
        size = re.fullmatch(r"\$\{#([A-Za-z_][A-Za-z0-9_]*)(\[[@*]\])?\}", written)
        if size:
            values = self.known.get(size.group(1))
            if values and any(piece.meaning == "hosts" for piece in values[0]):
                yield from self.variable("SLURM_NNODES", "$SLURM_NNODES", quoted)
            elif values and size.group(2):
                yield Piece(str(len(values)), quoted=quoted)
            else:
                yield Piece(written, written, "", quoted)
            return
        other = re.match(r"\$\{([A-Za-z_][A-Za-z0-9_]*|[0-9])(:?[-=+?]|##?|%%?|//?|\^\^?|,,?|:)", written)
        if not other:
            yield Piece(written, written, "", quoted)
            return
        name, sign = other.groups()
        known = "".join(p.text for p in self.known[name][0]) if self.plain(name) else None
        if name in INHERITED and name not in self.known:  # ${PATH:+:$PATH}: never empty where the job runs
            yield Piece(written, written, "", quoted)
        elif sign in ("-", ":-", "=", ":="):
            if known is not None and (known or sign in ("-", "=")):
                yield Piece(known, quoted=quoted)
            elif known is None and (name in self.known or MEANINGS.get(name, "directive") not in FROM_DIRECTIVES):
                yield from self.variable(name, f"${{{name}}}", quoted)
            else:
                default = list(self.default(node, other.end(), quoted))
                if name.isdigit() and not self.calling and not self.depth:  # sbatch x.sbatch 1e-4
                    taken, asked = self.shown([tuple(default)]), f"sbatch {self.name} ..."
                    self.choices.append(Choice(name, taken, f"argument {name}", asked, self.line(node)))
                if sign in ("=", ":="):
                    self.known[name] = (tuple(default),)
                yield from default
        elif sign in ("+", ":+"):
            if known or name in self.known:
                yield from self.default(node, other.end(), quoted)
            elif not name.isdigit():
                other_way = self.shown([tuple(self.default(node, other.end(), quoted))])
                self.choices.append(Choice(name, "", other_way, f'[ -n "${name}" ]', self.line(node)))
        elif sign in ("?", ":?"):
            yield from self.variable(name, f"${{{name}}}", quoted)
        elif known is not None and max(len(known), len(written)) <= MOST:  # matching it takes the square of that
            pattern = written[other.end() : -1]
            yield Piece(_changed(known, sign, pattern), quoted=quoted)
        else:
            meaning = next((p.meaning for p in self.known.get(name, ((),))[0]), MEANINGS.get(name, ""))
            yield Piece(written, written, meaning, quoted)

    def default(self, node: Any, skip: int, quoted: bool) -> Iterator[Piece]:
        """The word behind :- of an expansion."""
        at, end = node.start_byte + skip, node.end_byte - 1
        for child in node.named_children:
            if child.start_byte < at or child.type in ("variable_name", "subscript", "special_variable_name"):
                continue
            if child.start_byte > at:
                yield self.between(at, child.start_byte, quoted)
            yield from self.pieces(child, quoted=quoted)
            at = child.end_byte
        if end > at:
            yield self.between(at, end, quoted)

    def plain(self, name: str) -> bool:
        values = self.known.get(name)
        return bool(values) and len(values or ()) == 1 and not any(piece.name for piece in (values or ((),))[0])

    def item(self, name: str, index: str, written: str, quoted: bool) -> Iterator[Piece]:
        values = self.known.get(name, ())
        if values and name != "@" and any(piece.meaning == "hosts" for piece in values[0]):
            yield Piece(written, written, "first-node" if index == "0" else "hosts", quoted)
        elif index in ("@", "*") and values and self.affords(values):
            for at, pieces in enumerate(values):
                if at:
                    yield Piece(" ", quoted=quoted)
                yield from pieces
        elif re.fullmatch(r"[0-9]{1,9}", index) and int(index) < len(values):
            yield from values[int(index)]
        else:
            meaning = "array-index" if "SLURM_ARRAY_TASK_ID" in index else ""
            yield Piece(written, f"{name}[{index}]", meaning, quoted)

    def substitution(self, node: Any, quoted: bool) -> Iterator[Piece]:
        written = self.bare(node)
        text = written[2:-1].strip() if written.startswith("$(") else written.strip("`").strip()
        flat = " ".join(text.replace("\\\n", " ").split())
        if flat in ("whoami", "id -un"):
            yield from self.variable("USER", "$USER", quoted)
            return
        simple = self.builtin(node)
        if simple is not None:
            yield Piece(simple, quoted=quoted)
            return
        if here := PLACED.fullmatch(flat):  # beside where the job was submitted
            yield Piece("$(pwd)", "$(pwd)", "submit-dir", quoted)
            yield Piece("/" + (here[1] or here[2]).rstrip("/"), quoted=quoted)
            return
        self.inner_commands(node)
        meaning = next((what for pattern, what in SUBSTITUTIONS if re.fullmatch(pattern, flat, re.DOTALL)), "")
        if not meaning:  # $(echo $hosts | ...) of a variable with a meaning, $(head -n1 $nodefile)
            names = set(re.findall(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)", flat))
            meanings = {piece.meaning for name in names for piece in self.known.get(name, ((),))[0]}
            meanings |= {MEANINGS.get(name, "") for name in names if name not in self.known}
            if meanings & {"hosts", "node-list"}:
                count = re.search(r"wc\s+-[lw]", flat)
                meaning = "nodes" if count else "first-node"
            elif "first-node" in meanings:
                meaning = "first-node"
            elif meanings & {"job-id", "random"}:
                meaning = "job-id"
            if not meaning:  # what runs it may not know the script's own names
                written = re.sub(r"\$\{?([A-Za-z_]\w*)\}?", self.put_in, written)
        if meaning == "nodes" and self.plain("SLURM_NNODES"):
            yield from self.variable("SLURM_NNODES", written, quoted)
        elif meaning == "gpus" and self.plain("SLURM_GPUS_ON_NODE"):
            yield from self.variable("SLURM_GPUS_ON_NODE", written, quoted)
        else:
            yield Piece(written, written, meaning, quoted)

    def put_in(self, match: re.Match[str]) -> str:
        """The value of a name in a line that stays a line: $D/tool.py is /d/tool.py."""
        values = self.known.get(match[1], ())
        whole = match[0].startswith("${") == match[0].endswith("}")
        return self.shown(values) if len(values) == 1 and whole else match[0]

    def builtin(self, node: Any) -> str | None:
        """$(echo x), $(basename a/b), $(realpath x): what can be said without running it."""
        inner = [child for child in node.named_children if child.type != "comment"]
        if len(inner) != 1 or inner[0].type != "command":
            return None
        nodes = [child for child in inner[0].named_children if child.type != "variable_assignment"]
        nodes = [(child.named_children or [child])[0] if child.type == "command_name" else child for child in nodes]
        words = [part for node in nodes for part in self.spread(self.word(node))]
        values = [word.value for word in words]
        if not values or any(value is None for value in values):
            return None
        said = [str(value) for value in values]
        if said[0] == "echo" and not any(word.startswith("-") for word in said[1:2]):
            return " ".join(said[1:])
        if said[0] == "basename" and len(said) in (2, 3):
            name = said[1].rstrip("/").rpartition("/")[2]
            return name.removesuffix(said[2]) if len(said) == 3 else name
        if said[0] == "dirname" and len(said) == 2:
            return said[1].rstrip("/").rpartition("/")[0] or ("/" if said[1].startswith("/") else ".")
        if said[0] in ("realpath", "readlink") and len(said) > 1 and said[-1].startswith("/"):
            return said[-1]
        if said[0] == "expr" and len(said) > 3 and all(word in "+-*/%" for word in said[2::2]):
            return calculated("".join(said[1:]))
        if said[0] == "seq" and len(said) == 3 and said[1].isdigit() and said[2].isdigit() and int(said[2]) < 4096:
            return " ".join(map(str, range(int(said[1]), int(said[2]) + 1)))
        return None

    def inner_commands(self, node: Any) -> None:
        for child in node.named_children:
            self.walk(child, ("substitution",), {})

    def arithmetic(self, node: Any, quoted: bool) -> Iterator[Piece]:
        written = self.bare(node)
        text = written[3:-2] if written.startswith("$((") else written[2:-1]
        meanings: set[str] = set()

        def known(match: re.Match[str]) -> str:
            name = match.group(1) or match.group(3)
            if self.plain(name):
                return "".join(piece.text for piece in self.known[name][0])
            if match.group(2) and name not in self.known and name not in MEANINGS:
                return match.group(2)
            pieces = self.known.get(name, ((),))[0]
            meanings.update(piece.meaning for piece in pieces)
            meanings.add(MEANINGS.get(name, ""))
            return match.group()

        size = re.compile(r"\$\{#([A-Za-z_]\w*)\[[@*]\]\}")
        text = size.sub(lambda m: str(len(self.known[m[1]])) if m[1] in self.known else m[0], text)
        text = re.sub(r"\$\{?([A-Za-z_]\w*)(?::-([0-9]+))?\}?|\b([A-Za-z_]\w*)\b", known, text)
        value = calculated(text)
        if value is not None:
            yield Piece(value, quoted=quoted)
        else:
            job = meanings & {"job-id", "random"} or "JOB" in text or "RANDOM" in text
            yield Piece(written, written, "job-id" if job else "", quoted)


def _size(pieces: Pieces) -> int:
    return sum(EACH + len(piece.text) for piece in pieces)


OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def calculated(text: str) -> str | None:
    """ "4 * 8" is "32"; None for what holds a name, or is no arithmetic of whole numbers."""
    if not re.fullmatch(r"[\s0-9+*/%()-]{1,200}", text):
        return None

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            result = OPERATORS[type(node.op)](value(node.left), value(node.right))
            return int(result)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(text)

    try:
        return str(value(ast.parse(text.strip(), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
        return None


NUMERIC = {"-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt,
           "-ge": operator.ge}  # fmt: skip


def _compared(left: str | None, sign: str, right: str | None, *, pattern: bool) -> bool | None:
    """_compared("8", "-gt", "0", ...) is True; None for what is not known, or no comparison of values."""
    if left is None or right is None:
        return None
    if sign in ("=", "==", "!="):
        same = fnmatch.fnmatchcase(left, right) if pattern else left == right
        return same == (sign != "!=")
    if sign in NUMERIC and re.fullmatch(r"-?[0-9]{1,18}", left) and re.fullmatch(r"-?[0-9]{1,18}", right):
        return bool(NUMERIC[sign](int(left), int(right)))
    return None


def _changed(value: str, sign: str, pattern: str) -> str:
    """${name##*/} and its kind: _changed("/a/b.py", "##", "*/") is "b.py"."""
    pattern = pattern.strip("'\"")
    if sign in ("#", "##", "%", "%%"):
        match = re.compile(fnmatch.translate(pattern)).match
        cuts = range(len(value) + 1)
        if sign[0] == "#":
            order = reversed(cuts) if sign == "##" else cuts
            return next((value[at:] for at in order if match(value[:at])), value)
        order = cuts if sign == "%%" else reversed(cuts)
        return next((value[:at] for at in order if match(value[at:])), value)
    if sign in ("/", "//"):
        old, _, new = pattern.partition("/")
        return value.replace(old, new, -1 if sign == "//" else 1) if old and not set(old) & set("*?[") else value
    if sign in ("^^", ",,"):
        return value.upper() if sign == "^^" else value.lower()
    if sign in ("^", ","):
        return (value[:1].upper() if sign == "^" else value[:1].lower()) + value[1:]
    begin, _, length = pattern.partition(":")
    try:
        start = int(begin)
        return value[start:] if not length else value[start:][: int(length)]
    except ValueError:
        return value


def _ansi(text: str) -> str:
    plain = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "a": "\a", "e": "\x1b", "0": "\0"}
    return re.sub(r"\\(.)", lambda match: plain.get(match[1], match[0]), text)
