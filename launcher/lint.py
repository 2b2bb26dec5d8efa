"""DeepSpeed configs, job files, scripts and manifests, judged: every mistake with its id, place, reason, remedy."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from launcher import envlint, facts, jsondoc, launchlint, manifestlint, scriptlint, show, yamldoc
from launcher.errors import Path, Problem, UserError
from launcher.plan import advice, rules
from launcher.plan.rules import REMOVE, Finding, Row
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.spec import Document

SEVERITIES = ("error", "warning", "note")
Kind = Literal["deepspeed", "job", "script", "manifest"]
YAML, JSON = (".yaml", ".yml"), (".json", ".hjson", ".json5", ".jsonc")


@cache
def rows() -> dict[str, Row]:
    """Every id there is: DeepSpeed's rules, our advice, variables of the environment, scripts and manifests."""
    shown = ("name", "severity", "title", "why", "fix", "source")
    others = {**envlint.rules(), **scriptlint.rules()}
    found = {**advice.rows(), **{id: Row(id, **{key: row[key] for key in shown}) for id, row in others.items()}}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Known:
    """What surrounds a config, as far as somebody said."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    model: facts.Model | None = None
    gpu: facts.Gpu | None = None
    seq_len: int = advice.SEQ_LEN
    steps: int | None = None
    deepspeed: str = ""
    trainer: Literal["auto", "plain", "hf"] = "auto"
    saved: advice.Saved | None = None
    optimizer: str | None = None  # the class of the one that the program hands over; "none" for no such

    @property
    def world(self) -> int | None:
        """With GPUs per node and no nodes it is one node."""
        return (self.nodes or 1) * self.gpus_per_node if self.gpus_per_node else None


@dataclass(frozen=True)
class Result:
    """One finding in one file. Lines and columns count from 1; a place of 0 is the whole file."""

    rule: str
    severity: str
    file: str
    line: int
    column: int
    end_line: int
    end_column: int
    message: str
    fix: str
    fixable: bool  # `lint --fix` mends it

    @property
    def row(self) -> Row:
        return rows()[self.rule]

    @property
    def why(self) -> str:
        return self.row.why

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Report:
    file: str
    kind: str  # "DeepSpeed config", "DeepSpeed config for Hugging Face", "job file"
    results: tuple[Result, ...]
    config: bool = False  # a DeepSpeed config, which --fix can mend

    def count(self, severity: str) -> int:
        return sum(result.severity == severity for result in self.results)


@dataclass(frozen=True)
class Fixed:
    """A text after `lint --fix`: what was changed, and what is left to say."""

    text: str
    changes: tuple[str, ...]
    report: Report


def kind(text: str, *, name: str) -> Kind:
    """Scripts and manifests by what is in them; other YAML is a job file, other JSON a DeepSpeed config."""
    if manifestlint.looks_like(text) and not scriptlint.is_script(text):
        return "manifest"
    if scriptlint.looks_like(text, name=name):
        return "script"
    if name.lower().endswith(YAML):
        return "job"
    if name.lower().endswith(JSON):
        return "deepspeed"
    first = re.compile(r"(\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL).match(text.lstrip("\ufeff"))
    rest = text.lstrip("\ufeff")[first.end() if first else 0 :]
    return "deepspeed" if rest[:1] in ("{", "[", "") else "job"


def another(kind: Kind, text: str, *, name: str) -> bool:
    """A program or a page of text, which is taken for a job file only as nothing else fits."""
    if kind in ("script", "manifest") or name.lower().endswith((*YAML, *JSON)):
        return False
    keys = re.search(rf"^({'|'.join(yamldoc.hints(JobSpec))})[ \t]*:", text, re.MULTILINE)
    return name.lower().endswith(".py") or (kind == "job" and not keys and "." in name.rpartition("/")[2])


def lint(text: str, *, name: str, known: Known | None = None) -> Report:
    """Everything about a DeepSpeed config at once, in the order of the lines."""
    document, results, _ = _judge(text, name, known or Known())
    hugging = isinstance(document.value, dict) and _trainer(document.value, known or Known()) == "hf"
    what = "DeepSpeed config for Hugging Face" if hugging else "DeepSpeed config"
    return Report(name, what, tuple(sorted(results, key=_order)), config=True)


def _order(result: Result) -> tuple[int, int, int, str]:
    return (result.line, result.column, SEVERITIES.index(result.severity), result.rule)


def _judge(text: str, name: str, known: Known) -> tuple[jsondoc.Document, list[Result], list[Finding]]:
    document = jsondoc.parse(text)
    trainer = _trainer(document.value, known)
    config = _as_hjson(document.value) if trainer == "plain" else document.value
    results = _slips(document, name, trainer)
    if document.root is None:
        return document, results, []
    if not isinstance(config, dict) or not config:
        found = "nothing" if not config else "a list" if isinstance(config, list) else "a value"
        message = f"a DeepSpeed config is an object with keys, and here is {found}"
        findings = [Finding("DSL196", message, "{ ... }")]
    elif not set(config) & set(_deepspeed_keys()):
        findings = [Finding("DSL196", *_what_else(config))]
    else:
        findings = _findings(config, known, trainer)
    return document, [*results, *(_placed(document, name, finding) for finding in findings)], findings


def _as_hjson(value: Any) -> Any:
    """What DeepSpeed's reader makes of numbers in a file: 4.0 and 1e3 are whole, and 1e10 is not."""
    if isinstance(value, dict):
        return {key: _as_hjson(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_as_hjson(child) for child in value]
    if isinstance(value, float) and abs(value) < 1e10 and value.is_integer():
        return int(value)
    return value


def _findings(config: dict[str, Any], known: Known, trainer: Literal["plain", "hf"]) -> list[Finding]:
    situation = rules.Situation(
        config=config,
        gpus=known.gpus_per_node != 0,
        world=known.world,
        per_node=known.gpus_per_node or None,
        steps=known.steps,
        deepspeed=known.deepspeed,
        shape=known.model.shape if known.model else None,
        gpu=known.gpu,
        client="" if known.optimizer == "none" else known.optimizer,
        trainer=trainer,
    )
    case = advice.Case(situation, known.model.name if known.model else "", known.seq_len, known.saved)
    found = [*rules.judge(situation), *advice.judge(case)]
    switch = ("gradient_checkpointing",)  # what many take for one
    return [replace(one, fix=advice.RECOMPUTE[trainer]) if one.path == switch else one for one in found]


def _deepspeed_keys() -> dict[str, str]:
    """What may stand at the top of a config."""
    return rules.sections()[()].keys


def _trainer(config: Any, known: Known) -> Literal["plain", "hf"]:
    """Hugging Face's configs are told by their `auto`."""
    if known.trainer != "auto":
        return known.trainer
    return "hf" if _has_auto(config) else "plain"


def _has_auto(value: Any, path: Path = ()) -> bool:
    if isinstance(value, dict):
        return any(_has_auto(child, (*path, key)) for key, child in value.items())
    return bool(value == "auto") and not rules.own_auto(path)


def _what_else(config: dict[str, Any]) -> tuple[str, str]:
    """What a JSON object without any key of DeepSpeed's might be: (message, hint)."""
    if "model_type" in config or "architectures" in config:
        return "this is a model's config.json, not a DeepSpeed config", "give it as --model"
    if "compute_environment" in config or "deepspeed_config" in config:
        return "this is Accelerate's config", "lint the file that its deepspeed_config_file names"
    close = (difflib.get_close_matches(key[:60], _deepspeed_keys(), n=1, cutoff=0.75) for key in list(config)[:50])
    hint = next((f"did you mean `{match[0]}`?" for match in close if match), "")
    return "no key here is one that DeepSpeed reads", hint


# What a slip is called, where DeepSpeed reads the file itself and where Hugging Face does.
SLIPS = {
    "syntax": ("DSL190", "DSL190"),
    "twice": ("DSL191", "DSL191"),
    "lax": ("DSL192", "DSL193"),
    "word": ("DSL194", "DSL194"),
    "infinite": ("DSL195", "DSL195"),
}


def _slips(document: jsondoc.Document, name: str, trainer: str) -> list[Result]:
    results = []
    alike: dict[tuple[str, str], list[jsondoc.Slip]] = {}
    for slip in document.slips:
        rule = SLIPS[slip.kind][trainer == "hf"]
        key = slip.message if slip.kind == "lax" else str(slip.start)
        alike.setdefault((rule, key), []).append(slip)
    for (rule, _), slips in alike.items():
        first, more = slips[0], len(slips) - 1
        row = rows()[rule]
        message = first.message + (f", and {more} more" if more else "")
        if first.kind == "lax":
            reads = "Python's json stops here" + (", DeepSpeed's hjson does not" if trainer != "hf" else "")
            message = f"{message}: {reads}"
        fixable = row.severity != "note" and all(slip.instead is not None for slip in slips) and rule != "DSL192"
        fix = first.hint or row.fix
        results.append(_result(document, name, rule, (first.start, first.end), message, fix, fixable))
    return results


def _placed(document: jsondoc.Document, name: str, finding: Finding) -> Result:
    row = rows()[finding.rule]
    span = document.span(finding.path)
    fix = finding.fix or row.fix
    return _result(document, name, finding.rule, span, finding.message, fix, _mends(finding))


def _mends(finding: Finding) -> bool:
    """What --fix writes: edits that are certain, of what is at least a warning."""
    return bool(finding.edits) and rows()[finding.rule].severity != "note"


def _result(
    document: jsondoc.Document, name: str, rule: str, span: tuple[int, int], message: str, fix: str, fixable: bool
) -> Result:
    (line, column), (end_line, end_column) = document.place(span[0]), document.place(span[1])
    severity = rows()[rule].severity
    return Result(rule, severity, name, line, column, end_line, end_column, message, fix, fixable)


# --- mending ----------------------------------------------------------------------------------------

ROUNDS = 20  # what one edit brings to light the next round mends; a rule that undoes another's edit ends here


def fix(text: str, *, name: str, known: Known | None = None) -> Fixed:
    """The text with every certain mend made, order and indentation kept. A second time changes nothing."""
    known = known or Known()
    changes: list[str] = []
    seen = {text}
    for _ in range(ROUNDS):
        mended, said = _round(text, name, known)
        if mended in seen:
            break
        seen.add(mended)
        text = mended
        changes += said
    return Fixed(text, tuple(changes), lint(text, name=name, known=known))


def _round(text: str, name: str, known: Known) -> tuple[str, list[str]]:
    document, _, findings = _judge(text, name, known)
    hugging = _trainer(document.value, known) == "hf"
    slips = [slip for slip in document.slips if slip.instead is not None and (slip.kind != "lax" or hugging)]
    if document.root is None or slips:
        said = [f"{SLIPS[slip.kind][hugging]} line {document.place(slip.start)[0]}: {slip.message}" for slip in slips]
        return jsondoc.replaced(text, slips), said
    changes: list[str] = []
    touched: list[Path] = []
    for finding in findings:
        if not _mends(finding):
            continue
        paths = [path for path, _ in finding.edits]
        if any(_overlap(path, other) for path in paths for other in touched):
            continue
        text, said = _edited(text, finding)
        changes += said
        touched += paths
    return text, changes


def _overlap(path: Path, other: Path) -> bool:
    shorter = min(len(path), len(other))
    return path[:shorter] == other[:shorter]


def _edited(text: str, finding: Finding) -> tuple[str, list[str]]:
    """One finding's edits; a key that goes while another comes with its value is renamed where it stands."""
    edits = list(finding.edits)
    said = []
    config = jsondoc.parse(text).value
    for old, removed in finding.edits:
        new = _new_name(config, old, finding.edits) if removed is REMOVE else None
        if new is not None:
            text = jsondoc.renamed(text, tuple(map(str, old)), str(new[-1]))
            edits = [edit for edit in edits if edit[0] not in (old, new)]
            said.append(f"{finding.rule} {_dotted(old)} is now {new[-1]}")
    moved = [_at(config, old) for old, removed in finding.edits if removed is REMOVE]
    for path, value in edits:
        keys = tuple(map(str, path))
        value = next((written for written in moved if written == value), value)  # 1.0 as it stands, not 1
        before = _at(config, path)
        if value is REMOVE:
            mended = jsondoc.without(text, keys)
            what = f"{_dotted(path)} taken out"
        else:
            mended = jsondoc.with_value(text, keys, value)
            was = "" if before is None else f" (was {_short(before)})"
            what = f"{_dotted(path)}: {_short(value)}{was}"
        if mended != text:
            text = mended
            said.append(f"{finding.rule} {what}")
    return text, said


def _new_name(config: Any, old: Path, edits: tuple[tuple[Path, Any], ...]) -> Path | None:
    """Where a key's value goes within its section."""
    value = _at(config, old)
    names = [path for path, to in edits if path[:-1] == old[:-1] and to == value and path != old]
    return next((name for name in names if value is not None and _at(config, name) is None), None)


def _at(config: Any, path: Path) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def diff(before: str, after: str, *, name: str) -> str:
    """The change as a unified diff; empty when there is none."""
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    found = []
    for line in difflib.unified_diff(old, new, f"a/{name.lstrip('/')}", f"b/{name.lstrip('/')}"):
        found.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(found)


# --- job files --------------------------------------------------------------------------------------

ID = re.compile(r"\s*\[((?:DSL|ENV)[0-9]{3})\]")


def refused(problems: Iterable[Problem], *, name: str, text: str = "") -> Report:
    """A job file that cannot be planned: its problems as results."""
    problems = list(problems)
    other = _other_yaml(text, name)
    if other:
        return Report(name, "YAML", (other,))
    results = []
    for problem in problems:
        file, line, column = _where(problem.where or name)
        found = ID.search(problem.message)
        rule = found[1] if found and found[1] in rows() else "DSL198"
        severity = rows()[rule].severity if rule != "DSL198" else "error"
        message = ID.sub("", problem.message)
        results.append(Result(rule, severity, file, line, column, line, column, message, problem.hint, False))
    return Report(name, "job file", tuple(sorted(results, key=_order)))


def accepted(document: Document, plan: Plan, *, name: str) -> Report:
    """A job file that has a plan: its notes, and advice about what the user's own keys say."""
    results = []
    for note in plan.notes:
        found = ID.search(note)
        rule = found[1] if found and found[1] in rows() else "DSL199"
        row = rows()[rule]
        file, line, column, fix = name, 0, 0, ""
        if rule.startswith("ENV"):
            variable = re.match(r"\w+", note)
            assert variable is not None  # envlint's messages begin with the name
            file, line, column = _where(str(yamldoc.place(document.root, ("env", variable[0]))))
            fix = row.fix
        results.append(Result(rule, row.severity, file, line, column, line, column, ID.sub("", note), fix, False))
    spec = plan.spec
    situation = rules.Situation(
        config=plan.config or {},
        gpus=spec.resources.gpus_per_node > 0,
        world=spec.world,
        per_node=spec.per_node,
        steps=spec.steps or None,
        deepspeed=spec.environment.deepspeed or "",
    )
    for finding in advice.judge(advice.Case(situation)):
        if not _said(spec.train.deepspeed, finding.path):
            continue  # what the plan chose has its reason there
        at = rules.job_path(finding.path, spec.train.deepspeed)
        file, line, column = _where(str(yamldoc.place(document.root, at)))
        row = rows()[finding.rule]
        hint = finding.job_fix or finding.fix or row.fix
        result = Result(finding.rule, row.severity, file, line, column, line, column, finding.message, hint, False)
        results.append(result)
    return Report(name, "job file", tuple(sorted(results, key=_order)))


def _said(raw: dict[str, Any], path: Path) -> bool:
    node: Any = raw
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return bool(path)


def _where(place: str) -> tuple[str, int, int]:
    """job.yaml:6:3 in its parts; a place without a line is the whole file."""
    match = re.fullmatch(r"(.*?):([0-9]+):([0-9]+)", place, re.DOTALL)
    return (match[1], int(match[2]), int(match[3])) if match else (place, 0, 0)


def _other_yaml(text: str, name: str) -> Result | None:
    """Accelerate's config, or a DeepSpeed config that somebody wrote as YAML."""
    keys = set(re.findall(r"^([A-Za-z_][A-Za-z0-9_]*)[ \t]*:", text, re.MULTILINE))
    if keys & {"train", "resources", "slurm", "kubernetes"}:
        return None
    if keys & {"compute_environment", "distributed_type", "deepspeed_config"}:
        message = "this is Accelerate's config"
        hint = "lint the file that its deepspeed_config_file names"
    elif keys & (set(_deepspeed_keys()) - {"checkpoint", "optimizer", "scheduler"}):
        message = "this is a DeepSpeed config in YAML, and DeepSpeed reads JSON"
        hint = "write it as JSON, or as train.deepspeed of a job file"
    else:
        return None
    return Result("DSL196", "error", name, 1, 1, 1, 1, message, hint, False)


# --- scripts and manifests ----------------------------------------------------------------------------


def script(text: str, *, name: str, known: Known | None = None) -> Report:
    """A batch script or shell script, with the variables it sets and the DeepSpeed configs that it writes."""
    known = known or Known()
    case = scriptlint.Case(text, name, nodes=known.nodes, gpus=known.gpus_per_node)
    results = [_as_result(found, name) for found in scriptlint.judge(text, name=name, case=case)]
    if not case.ours:  # of its own variables and configs `plan` says what there is to say, and knows the fabric
        results += variables(envlint.read(text, name="script.sh"), name=name).results
    inside = replace(known, nodes=case.nodes or known.nodes, gpus_per_node=known.gpus_per_node or case.gpus or None)
    for body, line in scriptlint.configs(case):
        found = lint(body, name=name, known=inside)
        results += [_moved(one, line, 0) for one in found.results]
    kind = "batch script" if case.batch else "shell script"
    return Report(name, kind, tuple(sorted(results, key=_order)))


def manifest(text: str, *, name: str, known: Known | None = None) -> Report:
    """Kubernetes manifests, with the environments of their containers and the configs of their ConfigMaps."""
    results = [_as_result(found, name) for found in manifestlint.judge(text, name=name)]
    results += variables(manifestlint.variables(text, name=name), name=name).results
    for body, line, column, nodes, gpus in manifestlint.configs(text, name=name):
        inside = replace(known or Known(), nodes=nodes, gpus_per_node=gpus)
        results += [_moved(one, line, column) for one in lint(body, name=name, known=inside).results]
    return Report(name, "manifest", tuple(sorted(results, key=_order)))


def _moved(one: Result, line: int, column: int) -> Result:
    """A result of a text that stands within a file; nothing in there is mended."""
    if not one.line:
        return replace(one, line=line + 1, column=column + 1, end_line=line + 1, end_column=column + 1, fixable=False)
    place = replace(one, line=one.line + line, column=one.column + column, fixable=False)
    return replace(place, end_line=one.end_line + line, end_column=one.end_column + column)


def _as_result(found: launchlint.Found, name: str) -> Result:
    row = rows()[found.rule]
    line, column, end = found.line, found.column, max(found.end, found.column)
    severity, fix = found.severity or row.severity, found.fix or row.fix
    return Result(row.id, severity, name, line, column, line, end, found.message, fix, False)


# --- environments -----------------------------------------------------------------------------------


def environment(text: str, *, name: str, fabric: str | None = None) -> Report:
    """A script, a K=V file, or YAML with variables; a job file's own fabric counts where none is given."""
    network = facts.fabric(fabric) if fabric else None
    named = envlint.fabric_in(text) if name.lower().endswith((".yaml", ".yml")) else None
    if named and not network:
        with contextlib.suppress(UserError):  # a word of somebody else's YAML
            network = facts.fabric(named)
    return variables(envlint.read(text, name=name), name=name, fabric=network)


def variables(assignments: Iterable[envlint.Assignment], *, name: str, fabric: facts.Fabric | None = None) -> Report:
    results = []
    for found in envlint.judge(assignments, fabric=fabric):
        row, at = rows()[found.rule], found.at
        end = at.column + len(at.name) if at.line else 0
        fix = found.fix or row.fix
        result = Result(row.id, row.severity, name, at.line, at.column, at.line, end, found.message, fix, False)
        results.append(result)
    return Report(name, "environment", tuple(sorted(results, key=_order)))


# --- looking up -------------------------------------------------------------------------------------


def row(id: str) -> Row:
    """row("dsl031") and row("31") are DSL031's. Raises UserError with what was probably meant."""
    asked = id.strip().upper()
    if re.fullmatch(r"[0-9]{1,3}", asked):
        asked = f"DSL{int(asked):03}"
    known = rows()
    if asked in known:
        return known[asked]
    named = next((row for row in known.values() if row.name == id.strip().lower()), None)
    if named:
        return named
    close = difflib.get_close_matches(id.strip().lower(), [row.name for row in known.values()], n=1, cutoff=0.6)
    alike = [] if close else _alike(asked, known)
    close = close or alike or difflib.get_close_matches(asked, known, n=1, cutoff=0.6)
    shown = ascii(id)[1:-1][:60]
    hint = f"did you mean {close[0]}?" if close else "dslaunch explain lists them"
    if len(alike) > 1:
        hint = f"{alike[0]} to {alike[-1]} are the nearest; dslaunch explain lists them"
    raise UserError(Problem(f"no rule {shown}", hint))


def _alike(asked: str, known: Iterable[str]) -> list[str]:
    """The ids that begin most like one that there is not: ENV001 to ENV008 for ENV00X, all of ENV for ENV099."""
    if not re.match(r"(DSL|ENV|SLM|LCH|K8S)[0-9]", asked):
        return []
    begins = (asked[:length] for length in range(len(asked), 2, -1))
    return next((alike for begin in begins if (alike := [id for id in known if id.startswith(begin)])), [])


def examples() -> dict[str, dict[str, Any]]:
    """`bad` and `good` configs by id, with what has to be `given` for them."""
    return yamldoc.load_tables(facts.DATA / "examples.yaml")


# --- telling ------------------------------------------------------------------------------------------


def text(reports: Iterable[Report]) -> str:
    """Every result as one line, its reason where its id comes up first, and what would mend it."""
    lines = []
    explained = set[str]()
    for report in reports:
        for result in report.results:
            lines.append(f"{show.plain(result.where)}: {result.severity} {result.rule} {show.plain(result.message)}")
            if result.rule not in explained and result.rule not in ("DSL198", "DSL199"):
                lines.append(f"  why: {show.plain(result.why)}")
            if result.fix:
                lines.append(f"  try: {show.plain(result.fix)}")
            explained.add(result.rule)
    return "\n".join(lines)


def summary(reports: Iterable[Report]) -> str:
    """`2 errors, 1 warning in ds_config.json (DeepSpeed config); --fix mends 1`."""
    reports = list(reports)
    counts = {severity: sum(report.count(severity) for report in reports) for severity in SEVERITIES}
    parts = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count]
    where = f"{show.plain(reports[0].file)} ({reports[0].kind})" if len(reports) == 1 else f"{len(reports)} files"
    fixable = sum(result.fixable for report in reports for result in report.results)
    mends = f"; --fix mends {fixable}" if fixable else ""
    return f"{', '.join(parts) or 'nothing to say'} in {where}{mends}"


def as_json(reports: Iterable[Report]) -> list[dict[str, Any]]:
    return [
        {
            "file": report.file,
            "kind": report.kind,
            "results": [{**asdict(result), "name": result.row.name, "why": result.why} for result in report.results],
        }
        for report in reports
    ]


def explained(row: Row) -> str:
    """A row in full, with a config that has the fault and one that has not."""
    held = f"{row.since or 'all'} to {row.until or 'newest'}" if row.since or row.until else "all"
    outcome = {"refused": "DeepSpeed refuses it", "ignored": "DeepSpeed ignores it", "differs": "it runs, otherwise"}
    rows = [
        ("severity", f"{row.severity}; {outcome[row.outcome]}" if row.outcome in outcome else row.severity),
        ("DeepSpeed", held if row.id.startswith("DSL") else ""),
        ("why", row.why),
        ("instead", row.fix),
        ("source", row.source),
    ]
    lines = [f"{row.id} {row.name}: {row.title}", ""]
    for name, value in rows:
        if value:
            wrapped = textwrap.wrap(value, 100, break_long_words=False, break_on_hyphens=False)
            lines += [f"  {name:10}{part}" if not i else f"{'':12}{part}" for i, part in enumerate(wrapped)]
    example = envlint.rules().get(row.id) or scriptlint.rules().get(row.id) or examples().get(row.id, {})
    given = " ".join(f"--{key} {value}" for key, value in example.get("given", {}).items() if key != "checkpoint")
    names = example.get("given", {}).get("checkpoint", "")
    given += f"{' ' if given else ''}--checkpoint DIR, with {names}" if names else ""
    for name in ("bad", "good"):
        if name in example:
            given = given or (f"--fabric {example['fabric']}" if "fabric" in example else "")
            said = f" ({given})" if given and name == "bad" else ""
            config = example[name]
            if "\r" in str(config):
                config = config.replace("\r", "^M")
            body = config.rstrip("\n") if isinstance(config, str) else json.dumps(config, indent=2)
            lines += ["", f"  {name}{said}", textwrap.indent(body, "    ")]
    return "\n".join(lines)


def listed() -> str:
    return show.table([(row.id, row.severity, row.name, row.title) for row in rows().values()])
