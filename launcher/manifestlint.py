"""Kubernetes manifests of others, judged: fields that nobody reads, gangs that hang, traps of the operators.

PyTorchJob, TrainJob, JobSet, MPIJob, Volcano's and batch/v1 Jobs are read as groups of pods; of any other kind the
pods that stand somewhere in it. What an id means stands in data/scriptrules.yaml.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from launcher import envlint, facts, launchlint, scriptlint, yamldoc
from launcher.backends.kubernetes import network
from launcher.errors import Problem, UserError
from launcher.launchlint import Around, Found, Word

MAX_DEPTH = 64
GPU = re.compile(r"(nvidia\.com/(gpu|mig-.*)|amd\.com/gpu|gpu\.intel\.com/.*|habana\.ai/gaudi)")
HOLE = re.compile(r"\$\{?[A-Za-z_]|\{\{|<[A-Za-z_ -]+>")  # what envsubst or helm has yet to fill


# --- reading ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A value of YAML and where it stands. A list has `items`, a map `entries` and the places of its `keys`."""

    line: int
    column: int
    raw: str | None = None
    plain: bool = True
    block: bool = False  # | or >: the text begins on the next line
    folded: bool = False  # by >, which leaves no lines
    indent: int = 0  # of that text
    entries: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Node] = field(default_factory=dict)
    items: tuple[Node, ...] = ()
    is_list: bool = False

    def get(self, *path: str) -> Node | None:
        here: Node | None = self
        for name in path:
            here = here.entries.get(name) if here else None
        return here

    def text(self, *path: str) -> str:
        """A scalar below it; "" where there is none, or where it has yet to be filled in."""
        here = self.get(*path)
        return here.raw if here and here.raw is not None and not HOLE.search(here.raw) else ""

    def number(self, *path: str) -> int | None:
        text = self.text(*path)
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None

    def list(self, *path: str) -> tuple[Node, ...]:
        here = self.get(*path)
        return here.items if here else ()

    @property
    def is_map(self) -> bool:
        return self.raw is None and not self.is_list

    @property
    def is_string(self) -> bool:
        """Whether Kubernetes' YAML reader takes a scalar for text."""
        return self.raw is not None and not (self.plain and NOT_TEXT.fullmatch(self.raw))


# What Kubernetes' reader takes for a number, a boolean or nothing where PyYAML may see text: 5e-05, y, 08.
NOT_TEXT = re.compile(
    r"[-+]?(0x[0-9a-fA-F_]+|0o?[0-7]+|[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|\.inf|\.nan)"
    r"|(y|yes|n|no|on|off|true|false)|~|null|",
    re.IGNORECASE,
)


def documents(text: str, *, name: str) -> list[Node]:
    """Every document of a file that is an object. Raises UserError with the place of what is no YAML."""
    return [one for one in _documents(text, name=name) if one.is_map and one.entries]


def _documents(text: str, *, name: str) -> list[Node]:
    import yaml

    found: list[Node] = []
    anchors: dict[str, Node] = {}
    lines = text.splitlines()
    try:
        events = yaml.parse(text, Loader=yamldoc.loader())
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                anchors = {}
            elif not isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                found.append(_node(event, events, anchors, lines, 0))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = getattr(error, "problem", None) or "no YAML"
        hint = "lint what `helm template` or envsubst prints" if "{{" in text else ""
        raise UserError(Problem(f"no YAML: {said}", hint, where=where)) from None
    return found


def _node(event: Any, events: Iterator[Any], anchors: dict[str, Node], lines: list[str], depth: int) -> Node:
    import yaml

    if depth > MAX_DEPTH:
        raise yaml.YAMLError("nested too deeply")
    line, column = event.start_mark.line + 1, event.start_mark.column + 1
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=f"no anchor {event.anchor} before it", problem_mark=mark)
        return anchors[event.anchor]
    if isinstance(event, yaml.ScalarEvent):
        block = event.style in ("|", ">")
        row = lines[line] if block and line < len(lines) else ""
        indent = len(row) - len(row.lstrip())
        node = Node(
            line,
            column,
            raw=event.value,
            plain=not event.style,
            block=block,
            folded=event.style == ">",
            indent=indent,
        )
    elif isinstance(event, yaml.SequenceStartEvent):
        items = []
        for child in events:
            if isinstance(child, yaml.SequenceEndEvent):
                break
            items.append(_node(child, events, anchors, lines, depth + 1))
        node = Node(line, column, items=tuple(items), is_list=True)
    else:
        entries: dict[str, Node] = {}
        keys: dict[str, Node] = {}
        for child in events:
            if isinstance(child, yaml.MappingEndEvent):
                break
            key = _node(child, events, anchors, lines, depth + 1)
            value = _node(next(events), events, anchors, lines, depth + 1)
            if key.raw == "<<" and key.plain:
                for merged in value.items or (value,):
                    entries = {**merged.entries, **entries}
                    keys = {**merged.keys, **keys}
                continue
            entries[key.raw or ""], keys[key.raw or ""] = value, key
        node = Node(line, column, entries=entries, keys=keys)
    if event.anchor:
        anchors[event.anchor] = node
    return node


def ours(job: Node) -> bool:
    """What dslaunch rendered: `plan` has judged its config and variables, with the model and the fabric known."""
    return job.text("metadata", "labels", "app.kubernetes.io/managed-by") == "dslaunch"


def looks_like(text: str) -> bool:
    """apiVersion and kind at the top of some document; JSON as well."""
    both = all(re.search(rf"^{word}\s*:", text, re.MULTILINE) for word in ("apiVersion", "kind"))
    return both or bool(re.match(r"\s*\{", text) and re.search(r'"apiVersion"\s*:', text) and '"kind"' in text)


# --- groups of pods ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Pods that are alike. `count` is None where nobody said."""

    kind: str
    role: str
    count: int | None
    pod: Node
    job: Node
    restart: str = ""

    @property
    def containers(self) -> tuple[Node, ...]:
        return self.pod.list("containers")

    @property
    def trainer(self) -> Node | None:
        """The container with the GPUs; the one of the operator's name; else the first."""
        by_gpu = next((one for one in self.containers if _gpus(one)), None)
        named = next((one for one in self.containers if one.text("name") in ("pytorch", "node", "trainer")), None)
        return by_gpu or named or next(iter(self.containers), None)


def _gpus(container: Node) -> int | None:
    for side in ("limits", "requests"):
        section = container.get("resources", side)
        for name in section.entries if section else ():
            if GPU.fullmatch(name):
                return section.number(name) if section else None
    return None


def _kind(job: Node) -> str:
    kind = job.text("kind")
    return "VolcanoJob" if kind == "Job" and "volcano" in job.text("apiVersion") else kind


def groups(job: Node) -> list[Group]:
    kind, found = _kind(job), []
    replicas = job.get("spec", "pytorchReplicaSpecs") or job.get("spec", "mpiReplicaSpecs")
    if replicas:
        for role, section in replicas.entries.items():
            pod = section.get("template", "spec")
            if pod:
                count = section.number("replicas") if section.get("replicas") else 1
                found.append(Group(kind, role, count, pod, job, section.text("restartPolicy")))
    elif kind == "JobSet":
        for section in job.list("spec", "replicatedJobs"):
            inner = section.get("template", "spec")
            pod = inner.get("template", "spec") if inner else None
            if inner and pod:
                jobs = section.number("replicas") if section.get("replicas") else 1
                each = inner.number("parallelism") if inner.get("parallelism") else 1
                count = jobs * each if jobs and each else None
                found.append(Group(kind, section.text("name"), count, pod, job, pod.text("restartPolicy")))
    elif kind == "VolcanoJob":
        for section in job.list("spec", "tasks"):
            pod = section.get("template", "spec")
            if pod:
                count = section.number("replicas") if section.get("replicas") else 1
                found.append(Group(kind, section.text("name"), count, pod, job, pod.text("restartPolicy")))
    elif kind == "Job":
        pod = job.get("spec", "template", "spec")
        if pod:
            count = job.number("spec", "parallelism") if job.get("spec", "parallelism") else 1
            found.append(Group(kind, "", count, pod, job, pod.text("restartPolicy")))
    elif kind == "Pod" and job.get("spec"):
        found.append(Group(kind, "", 1, job.entries["spec"], job, job.text("spec", "restartPolicy")))
    elif kind != "TrainJob":
        found = [Group(kind, "", None, pod, job) for pod in _pods(job)]
    return found


def _pods(job: Node) -> Iterator[Node]:
    """Every map with a list of containers, once, however many aliases lead to it."""
    seen: set[int] = set()
    left = [job]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        here = node.entries.get("containers")
        if here is not None and here.is_list:
            yield node
        else:
            left += [*node.entries.values(), *node.items]


# --- judging ----------------------------------------------------------------------------------------


def judge(text: str, *, name: str = "<stdin>") -> list[Found]:
    """Everything about a file of manifests. What is no YAML is one result."""
    found: list[Found] = []
    try:
        jobs = documents(text, name=name)
    except UserError as error:
        problem = error.problems[0]
        place = re.search(r":([0-9]+):([0-9]+)$", problem.where)
        line, column = (int(place[1]), int(place[2])) if place else (1, 1)
        return [Found("K8S005", problem.message, line, column, problem.hint)]
    for job in jobs:
        broken = [one for inner in objects(job) for one in list(misshapen(inner)) or _missing(inner)]
        found += broken
        if broken:
            continue  # what else could be said follows from it
        found += _fields(job)
        kind = _kind(job)
        if kind in ("ConfigMap", "Secret", "Service"):
            found += _config(job)
            continue
        members = groups(job)
        for part in (_operator, _trainjob, _volcano, _gang, _job, _addresses, _roles, _suspended):
            found += part(job, members)
        for group in members:
            for judged in (_pod, _network, _containers, _commands, _beside, _references):
                found += judged(group, members)
    seen: dict[tuple[str, int, int], Found] = {}
    for one in found:
        seen.setdefault((one.rule, one.line, one.column), one)
    return sorted(seen.values(), key=lambda one: (one.line, one.column, one.rule))


def _readable(text: str, name: str) -> list[Node]:
    try:
        return documents(text, name=name)
    except UserError:
        return []  # judge says so


def variables(text: str, *, name: str = "<stdin>") -> list[envlint.Assignment]:
    """The environments of all containers, for envlint; what aliases repeat, once."""
    found: dict[tuple[int, int], envlint.Assignment] = {}
    for job in _readable(text, name):
        for container, pod in [] if ours(job) else _all_containers(job):
            said_there = " ".join(item.raw or "" for words in ("command", "args") for item in container.list(words))
            read = set(re.findall(r"\$\{?([A-Za-z_]\w*)", said_there))
            for one in container.list("env"):
                value = one.get("value")
                if one.text("name") and value is not None and value.raw is not None:
                    said = None if HOLE.search(value.raw) else value.raw
                    place = one.entries["name"]
                    assigned = envlint.Assignment(one.text("name"), said, place.line, place.column, pod=pod)
                    found[place.line, place.column] = replace(assigned, used=assigned.name in read)
    return list(found.values())


def _all_containers(job: Node) -> list[tuple[Node, bool]]:
    """Each with whether it has a network of its own, whose first interface is eth0."""
    found = [
        (one, group.pod.text("hostNetwork") != "true")
        for group in groups(job)
        for one in (*group.containers, *group.pod.list("initContainers"))
    ]
    trainer = job.get("spec", "trainer")
    return [*found, (trainer, True)] if _kind(job) == "TrainJob" and trainer else found


def _at(node: Node, rule: str, message: str, fix: str = "", severity: str = "") -> Found:
    end = (
        node.column + len(node.raw)
        if node.raw is not None and not node.block and "\n" not in node.raw
        else node.column + 1
    )
    return Found(rule, message, node.line, node.column, fix, severity, end)


def _key(node: Node, name: str) -> Node:
    """Where a key stands; the map itself where it is missing."""
    return node.keys.get(name) or next(iter(node.keys.values()), node)


# -- fields


@cache
def _table() -> dict[str, Any]:
    return yamldoc.load_tables(facts.DATA / "manifestfields.yaml")


def _fields(job: Node) -> Iterator[Found]:
    kind, spec = _kind(job), job.get("spec")
    root = _table()["kinds"].get(kind)
    if root and spec and not (kind == "PyTorchJob" and job.text("apiVersion") != "kubeflow.org/v1"):
        yield from _section(
            spec, root, f"{job.text('kind')}.spec", sure=kind not in ("MPIJob", "VolcanoJob"), seen=set()
        )


def _section(node: Node, type_name: str, where: str, *, sure: bool, seen: set[tuple[int, str]]) -> Iterator[Found]:
    if (id(node), type_name) in seen:
        return  # an alias of what was judged
    seen.add((id(node), type_name))
    if type_name.startswith("*"):
        for child in node.entries.values():
            yield from _section(child, type_name[1:], where, sure=sure, seen=seen)
        return
    if node.is_list:
        for child in node.items:
            yield from _section(child, type_name, where, sure=sure, seen=seen)
        return
    if type_name in SCALARS:
        yield from _scalar(node, type_name, where)
        return
    known = _table()["types"][type_name]
    for name, child in node.entries.items():
        if name == "podTemplateOverrides" and "runtimePatches" in known:
            continue  # its own rule
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            fix = f"did you mean {close[0]}?" if close else ""
            if sure or close:
                message = f"{where} has no field {name[:60]}"
                yield _at(node.keys[name], "K8S001", message, fix, "" if close else "warning")
        elif known[name]:
            yield from _section(child, known[name], f"{where.rpartition('.')[2]}.{name}", sure=sure, seen=seen)


def _scalar(node: Node, kind: str, where: str) -> Iterator[Found]:
    if node.raw is None or HOLE.search(node.raw):
        return
    if kind == "str" and not node.is_string and node.raw not in ("", "~", "null"):
        if where.endswith("nprocPerNode"):
            yield _at(
                node, "K8S002", f"nprocPerNode: {node.raw} is a number, and the field wants text", f'"{node.raw}"'
            )
        else:
            yield _at(node, "K8S003", f"{where}: {node.raw} is no text for Kubernetes", f'"{node.raw}"')
    elif kind == "int" and (not node.plain or not re.fullmatch(r"-?[0-9]+|~|null|", node.raw)):
        yield _at(node, "K8S004", f"{where}: {node.raw[:40]!r} is no whole number")
    elif kind == "bool" and (
        not node.plain or not re.fullmatch(r"(?i)true|false|yes|no|on|off|y|n|~|null|", node.raw)
    ):
        yield _at(node, "K8S004", f"{where}: {node.raw[:40]!r} is no boolean")


# -- shapes

SCALARS = ("str", "int", "bool", "scalar")
REPLICAS = ("PyTorchJob", "MPIJob")


def shaped(text: str, *, name: str) -> None:
    """Raises UserError with each value of the wrong shape in a file; whoever reads it on need not look again."""
    found = [
        one
        for document in _documents(text, name=name)
        for inner in objects(document)
        for one in misshapen(inner, filled=True)
    ]
    if found:
        raise UserError(*(Problem(one.message, one.fix, where=f"{name}:{one.line}:{one.column}") for one in found))


def objects(node: Node) -> Iterator[Node]:
    """A document, and the objects in it: of a List, or an AppWrapper."""
    left, seen = [node], set()
    while left:
        one = left.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        left += one.items
        if one.is_map:
            yield one
        if one.text("kind").endswith("List"):
            left += one.list("items")
        elif one.text("kind") == "AppWrapper":
            left += [row.entries["template"] for row in one.list("spec", "components") if "template" in row.entries]


def misshapen(job: Node, *, filled: bool = False) -> Iterator[Found]:
    """Text where a list has to stand, a list for a mapping. Unless `filled`, a hole may become anything."""
    known = {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "metadata",
        "spec": "*",
        **_table()["objects"].get(_kind(job), {}),
    }
    seen: set[tuple[int, str]] = set()
    for name, child in job.entries.items():
        if name in known:
            yield from _shape(child, known[name], name, filled=filled, seen=seen)


def _shape(node: Node, type_name: str | None, where: str, *, filled: bool, seen: set[tuple[int, str]]
           ) -> Iterator[Found]:  # fmt: skip
    if type_name is None or (id(node), type_name) in seen or _nothing(node):
        return
    seen.add((id(node), type_name))
    if type_name in SCALARS:
        if node.raw is None and (filled or not _template(node)):
            yield _wrong(node, where, "a number or text" if type_name == "scalar" else SAID[type_name])
        return
    inner = type_name[1:] or None if type_name.startswith("*") else ""
    known = {} if inner != "" else _known(type_name)
    if not filled and _template(node):
        return
    if not node.is_map:
        if filled or node.is_list or not HOLE.search(node.raw or ""):
            yield _wrong(node, where, "a mapping", named="name" in known)
        return
    needed = _table()["required"].get(type_name, ())
    lacks = [name for name in needed if name not in node.entries or _nothing(node.entries[name])]
    if lacks:
        fields = " and no ".join(lacks)
        yield _at(node, "K8S007", f"{where} has no {fields}", ", ".join(f"{name}: ..." for name in lacks))
    for name, child in node.entries.items():
        wanted = known.get(name) if inner == "" else inner
        at = f"{where.rpartition('.')[2]}.{name}"
        lists = _table()["lists"]
        if f"{type_name}.{name}" not in lists and not (wanted and inner == "" and name in lists):
            yield from _shape(child, wanted, at, filled=filled, seen=seen)
        elif child.is_list:
            for index, item in enumerate(child.items):
                if _nothing(item) and wanted:
                    yield _at(item, "K8S006", f"{at}[{index}] is empty", "a value, or nothing there at all")
                yield from _shape(item, wanted, f"{at}[{index}]", filled=filled, seen=seen)
        elif not _nothing(child) and (filled or child.raw is None or not HOLE.search(child.raw)):
            yield _wrong(child, at, "a list")


SAID = {"str": "text", "int": "a whole number", "bool": "a boolean"}


@cache
def _known(type_name: str) -> dict[str, str | None]:
    """The fields of a type, and those that only a reader of other versions knows."""
    row = {**_table()["types"].get(type_name, {}), **_table()["shapes"].get(type_name, {})}
    above = row.pop("<", None)
    return {**(_known(above) if above else {}), **row}


def _template(node: Node) -> bool:
    """{{ .Values.image }}, which YAML reads as a mapping whose key is one."""
    return any(key.raw is None for key in node.keys.values())


def _nothing(node: Node) -> bool:
    return node.raw in ("", "~", "null", "Null", "NULL") and node.plain and not node.block


def _wrong(node: Node, where: str, wanted: str, *, named: bool = False) -> Found:
    name = where.rpartition(".")[2].partition("[")[0]
    words = (node.raw or "").split()
    stands = "a list" if node.is_list else "a mapping" if node.is_map else f"{' '.join(words)[:40]!r}"
    fix = f"{wanted} in {name}"
    if wanted == "a list" and node.raw is not None and 0 < len(words) < 9 and name in ("command", "args"):
        fix = f"{name}: {json.dumps(words)}"
    elif named and len(words) == 1:
        fix = f"{name}: {{name: {words[0][:40]}}}"
    return _at(node, "K8S006", f"{where} is {stands}, and has to be {wanted}", fix)


def _missing(job: Node) -> Iterator[Found]:
    """Fields without which there is no pod."""
    kind = _kind(job)
    if kind not in _table()["kinds"] or (kind == "PyTorchJob" and job.text("apiVersion") != "kubeflow.org/v1"):
        return
    faults: dict[tuple[int, int], tuple[Node, list[str]]] = {}

    def wants(node: Node, *path: str, where: str = "") -> bool:
        here, place = node, _key(node, "kind")
        for index, name in enumerate(path):
            if here.raw is not None or _template(here):
                return False  # it has yet to be filled in
            below = here.get(name)
            if below is None or _nothing(below) or not (below.raw or below.entries or below.items):
                place = here.keys.get(name) or place
                text = ".".join(path[: index + 1])
                at = faults.setdefault((place.line, place.column), (place, []))
                at[1].append(text + where)
                return False
            here, place = below, here.keys.get(name) or place
        return here.raw is None  # a hole may become anything

    metadata = job.get("metadata")
    if not (metadata and metadata.entries.get("generateName")):
        wants(job, "metadata", "name")
    templates: list[tuple[Node, tuple[str, ...], str]] = []
    if kind in REPLICAS:
        field_ = "pytorchReplicaSpecs" if kind == "PyTorchJob" else "mpiReplicaSpecs"
        if wants(job, "spec", field_):
            roles = job.entries["spec"].entries[field_].entries
            templates = [(one, ("template", "spec"), f" of {role}") for role, one in roles.items()]
    elif kind == "TrainJob":
        wants(job, "spec", "runtimeRef", "name")
    elif kind in ("JobSet", "VolcanoJob"):
        field_, inside = LISTED[kind]
        if wants(job, "spec", field_):
            templates = [(one, inside, f" of {one.text('name') or 'a row'}") for one in job.list("spec", field_)]
    else:
        templates = [(job, ("spec",) if kind == "Pod" else ("spec", "template", "spec"), "")]
    for node, path, where in templates:
        if wants(node, *path, "containers", where=where):
            pod = node.get(*path)
            for box in pod.list("containers") if pod else ():
                wants(box, "name", where=f" of a container{where}")
    for place, names in faults.values():
        yield _at(place, "K8S007", f"the {job.text('kind')} has no {' and no '.join(names)}")


LISTED = {
    "JobSet": ("replicatedJobs", ("template", "spec", "template", "spec")),
    "VolcanoJob": ("tasks", ("template", "spec")),
}


# -- the operators

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
STATIC = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def _operator(job: Node, members: list[Group]) -> Iterator[Found]:
    if _kind(job) != "PyTorchJob":
        return
    spec = job.get("spec")
    replicas = job.get("spec", "pytorchReplicaSpecs")
    if spec is None or replicas is None:
        return
    master, workers = replicas.get("Master"), replicas.get("Worker")
    elastic = spec.get("elasticPolicy")
    for role in replicas.keys:
        if role not in ("Master", "Worker"):
            yield _at(replicas.keys[role], "K8S010", f"the operator knows Master and Worker, and {role} is neither")
    if master and master.number("replicas") != 1 and not (master.get("replicas") and not master.text("replicas")):
        said = master.text("replicas") or "missing"
        yield _at(
            master.get("replicas") or replicas.keys["Master"],
            "K8S010",
            f"Master.replicas is {said}, and has to be 1",
            "replicas: 1",
        )
    count = sum(group.count or 0 for group in members)
    if master is None and workers and not elastic and count > 1:
        message = "without a Master or an elasticPolicy nobody sets MASTER_ADDR, RANK and WORLD_SIZE"
        yield _at(replicas.keys["Worker"], "K8S010", message, "a Master of 1 replica, or elasticPolicy")
    if master and elastic:
        yield _at(
            spec.keys["elasticPolicy"],
            "K8S011",
            "with elasticPolicy PET_NNODES counts the Workers and not the Master",
        )
    for group in members:
        names = [one.text("name") for one in group.containers]
        if names and "pytorch" not in names and all(names):
            place = group.containers[0].get("name") or group.containers[0]
            yield _at(place, "K8S012", f"no container of {group.role} is called pytorch", "name: pytorch")
        if master and not elastic and group.restart in ("", "OnFailure", "Always") and count > 1:
            section = replicas.entries[group.role]
            place = section.get("restartPolicy") or replicas.keys[group.role]
            said = group.restart or "the default, OnFailure,"
            yield _at(
                place, "K8S013", f"{said} restarts one pod of {count} alone", "restartPolicy: ExitCode or Never"
            )
    yield from _policies(job, spec, members)
    name = job.get("metadata", "name")
    if name is not None and name.raw and not HOLE.search(name.raw):
        digits = len(str(max((group.count or 1) - 1 for group in members))) if members else 1
        room = 63 - len("-worker-") - digits if workers else 63 - len("-master-0")
        room = min(room, 63 - len("-master-0")) if master else room
        if len(name.raw) > room or not NAME.fullmatch(name.raw):
            why = (
                f"has {len(name.raw)} characters, and its pods leave {room}"
                if len(name.raw) > room
                else "is no DNS label"
            )
            yield _at(name, "K8S014", f"the name {name.raw[:70]} {why}")


def _policies(job: Node, spec: Node, members: list[Group]) -> Iterator[Found]:
    policy = spec.get("runPolicy")
    clean = spec.get("runPolicy", "cleanPodPolicy")
    exit_code = any(group.restart == "ExitCode" for group in members)
    if sum(group.count or 0 for group in members) > 1 and (clean is None or clean.raw == "None"):
        place = clean or spec.keys.get("runPolicy") or spec.keys.get("pytorchReplicaSpecs") or spec
        yield _at(
            place, "K8S015", "after a failure the other pods keep their GPUs", "runPolicy: {cleanPodPolicy: Running}"
        )
    elif clean is not None and clean.raw not in ("Running", "All") and not HOLE.search(clean.raw or "$X"):
        yield _at(
            clean, "K8S015", f"cleanPodPolicy {clean.raw} is no word of it, and acts like All", "Running or All"
        )
    if policy is None:
        return
    limit = policy.number("backoffLimit")
    if exit_code and limit is not None and limit < 2**31 - 1:
        what = "fails at the first restart" if limit == 0 else "is never reached: only restarts in place are counted"
        yield _at(
            policy.entries["backoffLimit"], "K8S016", f"backoffLimit {limit} with restartPolicy ExitCode {what}"
        )
    if policy.get("activeDeadlineSeconds"):
        yield _at(
            policy.keys["activeDeadlineSeconds"],
            "K8S017",
            "the operator looks at the deadline only when a pod changes",
        )
    if policy.get("ttlSecondsAfterFinished") and exit_code:
        yield _at(
            policy.keys["ttlSecondsAfterFinished"], "K8S018", "with ExitCode a job that failed is never cleaned up"
        )


def _volcano(job: Node, members: list[Group]) -> Iterator[Found]:
    """OnFailure restarts a container within its pod, so the pod never fails and no policy hears of it."""
    if _kind(job) != "VolcanoJob" or sum(group.count or 0 for group in members) < 2:
        return
    sections = [job.get("spec"), *job.list("spec", "tasks")]
    policies = [policy for section in sections if section for policy in section.list("policies")]
    heard = [policy.text("event") or " ".join(one.raw or "" for one in policy.list("events")) for policy in policies]
    waiting = any("PodFailed" in event for event in heard)
    for group in members:
        place = group.pod.get("restartPolicy")
        said = " ".join(
            item.raw or "" for one in group.containers for item in (*one.list("command"), *one.list("args"))
        )
        if place is None or group.restart != "OnFailure" or not (group.trainer and _gpus(group.trainer)):
            continue
        if waiting:
            message = "OnFailure restarts a container in its pod, so the pod never fails and PodFailed never comes"
            yield _at(place, "K8S013", message, "restartPolicy: Never")
        elif not re.search(r"rdzv|elastic", said):  # ranks that meet anew let one of them come back
            message = "OnFailure restarts one pod alone"
            yield _at(place, "K8S013", message, "restartPolicy: Never, and PodFailed: RestartJob in policies", "note")


def _part_of_a_gang(job: Node, members: list[Group]) -> Iterator[Found]:
    """Volcano waits for minAvailable pods. Its webhook makes all of them of 0 and of none."""
    said_there = " ".join(word.raw or "" for group in members for word in _words(group.trainer))
    if not all(group.count for group in members) or re.search(r"nnodes[= ]\S*[0-9}]:|elastic", said_there):
        return  # what takes fewer nodes may start with fewer
    total = sum(group.count or 0 for group in members if group.trainer and _gpus(group.trainer))
    least = job.number("spec", "minAvailable")
    if least and least < total:
        place, said = job.entries["spec"].keys["minAvailable"], f"minAvailable {least} of {total} pods"
        yield _at(place, "K8S023", f"{said}: the others may never come", f"minAvailable: {total}")
    for task in [] if least else job.list("spec", "tasks"):
        some, count = task.number("minAvailable"), task.number("replicas")
        if some is not None and count and some < count:
            said = f"minAvailable {some} of {count} pods of {task.text('name')}"
            yield _at(task.keys["minAvailable"], "K8S023", f"{said}: the others may never come", f"{count}")


def _job(job: Node, members: list[Group]) -> Iterator[Found]:
    """What the API server refuses in a Job, also in the ones that a JobSet makes; and one that starts fewer pods."""
    kind = _kind(job)
    if kind not in ("Job", "JobSet"):
        return
    for group in members:
        if group.restart == "Always":
            place = group.pod.entries["restartPolicy"]
            yield _at(place, "K8S004", "a Job's pods restart Never or OnFailure, not Always", "restartPolicy: Never")
    rows = (
        [job.get("spec")]
        if kind == "Job"
        else [one.get("template", "spec") for one in job.list("spec", "replicatedJobs")]
    )
    for spec in rows:
        wanted, least = (spec.number("parallelism"), spec.number("completions")) if spec else (None, None)
        if spec and wanted and least is not None and least < wanted:
            message = f"completions {least}: of {wanted} pods {least} start, and ranks that are counted on do not"
            yield _at(spec.entries["completions"], "K8S025", message, f"completions: {wanted}")


def _addresses(job: Node, members: list[Group]) -> Iterator[Found]:
    """Pods of a JobSet are called JOBSET-REPLICATEDJOB-JOB-POD."""
    name = job.text("metadata", "name")
    if _kind(job) != "JobSet" or not name:
        return
    sizes: dict[str, tuple[int | None, int | None]] = {}
    for one in job.list("spec", "replicatedJobs"):
        inner = one.get("template", "spec")
        each = inner.number("parallelism") if inner and inner.get("parallelism") else 1
        sizes[one.text("name")] = (one.number("replicas") if one.get("replicas") else 1, each)
    if "" in sizes:
        return
    pod = rf"{re.escape(name)}-([a-z0-9-]+)-([0-9]{{1,6}})-([0-9]{{1,6}})(\.[a-z0-9.-]*)?"
    meeting = re.compile(
        rf"(?i)(?:master[-_]addr|rdzv[-_]endpoint|main_process_ip)(?:=|\s)[\"']?({pod})(?![a-z0-9-])"
    )
    for group in members:
        for container in group.containers:
            env = [one for one in container.list("env") if one.text("name") == "MASTER_ADDR"]
            hosts = [(value, value.raw or "", 0) for one in env if (value := one.get("value"))]
            words = _words(container)
            for before, word in zip([None, *words], words, strict=False):
                option = (before.raw or "") if before else ""
                text = word.raw or ""
                if re.fullmatch(r"--(master[-_]addr|rdzv[-_]endpoint|main_process_ip)", option):
                    hosts.append((word, text.partition(":")[0], 0))
                hosts += [(word, m[1], m.start(1)) for m in meeting.finditer(text)]
            for value, host, at in hosts:
                m = re.fullmatch(pod, host)
                if not m:
                    continue
                jobs, each = sizes.get(m[1], (0, 0))
                said = f"{host[:80]} is the name of no pod"
                if m[1] not in sizes:
                    found = _at(value, "K8S026", f"there is no replicatedJob {m[1]}, and {said}")
                elif (jobs and int(m[2]) >= jobs) or (each and int(m[3]) >= each):
                    found = _at(value, "K8S026", f"{m[1]} has {jobs} jobs of {each} pods, counted from 0, and {said}")
                else:
                    continue
                fix = f"{name}-{m[1] if m[1] in sizes else group.role}-0-0{m[4] or ''}"
                yield _within(replace(found, fix=fix), value, at, at + len(host))


FABRIC = re.compile(r"vpc\.amazonaws\.com/efa|rdma/.*|.*/(hca|roce|ib|hostdev|rdma-vf)[a-z0-9_-]*")


def _roles(job: Node, members: list[Group]) -> Iterator[Found]:
    """Master and Worker run one program: a rank without the others' network hangs or drags all of them to TCP."""
    pair = {group.role.lower(): group for group in members if group.role.lower() in ("master", "worker")}
    limits = [one.get("resources", "limits") for group in pair.values() if (one := group.trainer) and _gpus(one)]
    asked = [one for one in limits if one]
    if len(pair) != 2 or len(asked) != 2:
        return
    for name in sorted(name for name in {*asked[0].entries, *asked[1].entries} if FABRIC.fullmatch(name)):
        said = [one.entries[name].raw or "" if name in one.entries else "none" for one in asked]
        if said[0] != said[1] and not HOLE.search(" ".join(said)):
            roles = ", ".join(f"{role} {count}" for role, count in zip(pair, said, strict=True))
            less = min(zip(asked, said, strict=True), key=lambda one: int(one[1]) if one[1].isdigit() else 0)[0]
            yield _at(less.keys.get(name) or _key(less, ""), "K8S027", f"{name}: {roles}", "the same for both")


def _suspended(job: Node, members: list[Group]) -> Iterator[Found]:
    spec = job.get("spec")
    holder = spec.get("runPolicy") if spec and _kind(job) in ("PyTorchJob", "MPIJob") else spec
    if holder is None or holder.text("suspend") != "true" or ours(job):
        return
    if _kind(job) not in ("PyTorchJob", "MPIJob", "TrainJob", "JobSet", "Job") or _queued(job):
        return
    yield _at(holder.keys["suspend"], "K8S028", "suspended, and no queue is named that would let it go")


def _words(container: Node | None) -> list[Node]:
    return [item for name in ("command", "args") for item in (container.list(name) if container else ())]


def _queued(job: Node) -> bool:
    labels = job.get("metadata", "labels")
    return labels is not None and "kueue.x-k8s.io/queue-name" in labels.entries


def _trainjob(job: Node, members: list[Group]) -> Iterator[Found]:
    if _kind(job) != "TrainJob":
        return
    spec, trainer = job.get("spec"), job.get("spec", "trainer")
    if spec and spec.get("podTemplateOverrides"):
        yield _at(
            spec.keys["podTemplateOverrides"],
            "K8S019",
            "podTemplateOverrides is the name of Trainer 2.0 and 2.1; 2.2 drops it silently",
        )
    if trainer is None:
        return
    for one in trainer.list("env"):
        name = one.text("name")
        if name.startswith("PET_"):
            yield _at(one.entries["name"], "K8S021", f"{name} is the Trainer's, whose webhook refuses it")
    each = trainer.number("numProcPerNode")
    gpus = next(
        (
            _gpus(Node(0, 0, entries={"resources": section}))
            for section in (trainer.get("resourcesPerNode"),)
            if section
        ),
        None,
    )
    if each and gpus and each != gpus:
        severity = "" if each > gpus else "warning"
        yield _at(
            trainer.entries["numProcPerNode"], "K8S022", f"{each} ranks on pods of {gpus} GPUs", f"{gpus}", severity
        )
    yield from _image(trainer)
    yield from _variables(trainer)
    around = Around(trainer.number("numNodes") or 1, gpus, given=True)
    yield from _command(trainer, around, {})


def _gang(job: Node, members: list[Group]) -> Iterator[Found]:
    kind = _kind(job)
    if kind not in ("PyTorchJob", "JobSet", "MPIJob", "Job", "TrainJob", "VolcanoJob"):
        return
    with_gpus = sum(group.count or 0 for group in members if group.trainer and _gpus(group.trainer))
    if kind == "TrainJob":
        with_gpus = job.number("spec", "trainer", "numNodes") or 1
        if not job.get("spec", "trainer", "resourcesPerNode"):
            return
    if with_gpus < 2 or ours(job):
        return  # the preflight of ours gives pods up that wait for others too long
    if kind == "VolcanoJob":
        yield from _part_of_a_gang(job, members)
        return
    queued = _queued(job)
    policy = job.get("spec", "runPolicy", "schedulingPolicy")
    scheduler = any(group.pod.get("schedulerName") for group in members)
    # a provisioning request brings all of its nodes or none
    words = ("pod-group", "group-name", "consume-provisioning-request")
    groups_of = any(word in key for group in members for key in _labels(group) for word in words)
    exclusive = job.get("metadata", "annotations")
    topology = exclusive is not None and any("exclusive-topology" in key for key in exclusive.entries)
    if not (queued or policy or scheduler or groups_of or topology) and not _annotated(job):
        place = job.get("metadata", "name") or job
        message = f"nothing starts the {with_gpus} pods all or none: some may hold GPUs and wait for the rest"
        yield _at(place, "K8S023", message)
    if policy:
        for group in members:
            trainer = group.trainer
            requests = trainer.get("resources", "requests") if trainer else None
            if trainer and requests and _gpus(trainer) and not any(GPU.fullmatch(key) for key in requests.entries):
                message = "GPUs stand in limits alone, and the pod group asks for the requests only"
                yield _at(trainer.entries["resources"].keys["requests"], "K8S024", message)


def _annotated(job: Node) -> bool:
    notes = job.get("metadata", "annotations")
    labels = job.get("metadata", "labels")
    words = ("scheduling", "volcano", "gang", "queue", "run.ai", "runai")
    return any(word in key for section in (notes, labels) if section for key in section.entries for word in words)


def _labels(group: Group) -> list[str]:
    """Names of the labels and annotations of a group's pods, wherever in the job their template stands."""
    found: list[str] = []
    seen: set[int] = set()
    left = [group.job]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.entries.get("spec") is group.pod:
            for name in ("labels", "annotations"):
                inner = node.get("metadata", name)
                found += inner.entries if inner else ()
        left += [*node.entries.values(), *node.items]
    return found


# -- pods

SHM = "/dev/shm"  # noqa: S108 - of a container
RESTART = {"Always", "OnFailure", "Never"}


PLATFORM = ("/home/kubernetes/bin/", "/run/tcpx")  # where GKE's installers put drivers, plugins and sockets
NO_STORAGE = (  # paths of a node that no volume of a storage class replaces
    ("/dev/shm/", "emptyDir: {medium: Memory}"),  # noqa: S108 - of a container
    ("/dev/", "the resource of a device plugin, where there is one for it"),
    ("/sys/", "leave it out: a pod has a /sys of its own; or mount only what is read, with readOnly"),
    ("/proc/", "leave it out: a pod has a /proc of its own; or mount only what is read, with readOnly"),
)


def _pod(group: Group, members: list[Group]) -> Iterator[Found]:
    pod, trainer = group.pod, group.trainer
    volumes = {one.text("name"): one for one in pod.list("volumes")}
    for one in pod.list("containers") + pod.list("initContainers"):
        for mount in one.list("volumeMounts"):
            name = mount.text("name")
            templates = group.job.list("spec", "volumeClaimTemplates")
            if name and name not in volumes and not group.job.get("spec", "volumes") and not templates:
                yield _at(
                    mount.entries["name"], "K8S030", f"there is no volume {name}", yamldoc.suggest(name, volumes)
                )
    restart = pod.get("restartPolicy")
    if restart is not None and restart.raw and restart.raw not in RESTART and not HOLE.search(restart.raw):
        yield _at(restart, "K8S004", f"restartPolicy {restart.raw[:40]} is none of {', '.join(sorted(RESTART))}")
    gpus = _gpus(trainer) if trainer else None
    if trainer and gpus and (gpus > 1 or sum(one.count or 1 for one in members) > 1) and gpus > 1:
        yield from _shm(group, trainer, volumes, gpus)
    for name, volume in volumes.items():
        path = volume.text("hostPath", "path").rstrip("/")
        if path and path not in _of_the_platform() and not path.startswith(PLATFORM):
            message = f"volume {name} is {path} of whichever node the pod comes to"
            fix = next((fix for start, fix in NO_STORAGE if f"{path}/".startswith(start)), "")
            yield _at(volume.keys["hostPath"], "K8S032", message, fix)


@cache
def _of_the_platform() -> frozenset[str]:
    """What a cloud's own recipe has pods take from a node: libraries and devices of its network."""
    rows = network.profiles().values()
    return frozenset(one["host_path"] for row in rows for one in row.volumes.values())


def _alone(pod: Node) -> bool:
    """Whether no two pods of a kind may share a node."""
    terms = pod.get("affinity", "podAntiAffinity")
    required = terms.list("requiredDuringSchedulingIgnoredDuringExecution") if terms else ()
    return any(one.text("topologyKey") == "kubernetes.io/hostname" for one in required)


def _shm(group: Group, trainer: Node, volumes: dict[str, Node], gpus: int) -> Iterator[Found]:
    mount = next((one for one in trainer.list("volumeMounts") if one.text("mountPath").rstrip("/") == SHM), None)
    if mount is None:
        if group.pod.text("hostIPC") != "true":
            message = f"{SHM} is 64 MiB, and {gpus} ranks share it"
            place = trainer.get("name") or trainer
            yield _at(place, "K8S031", message, f"an emptyDir with medium: Memory at {SHM}")
        return
    volume = volumes.get(mount.text("name"))
    empty = volume.get("emptyDir") if volume else None
    if empty is not None and volume is not None and empty.text("medium") != "Memory":
        yield _at(
            volume.keys["emptyDir"],
            "K8S031",
            f"{SHM} is an emptyDir on the node's disk",
            "medium: Memory",
            "warning",
        )


def _network(group: Group, members: list[Group]) -> Iterator[Found]:
    pod, trainer = group.pod, group.trainer
    host = pod.text("hostNetwork") == "true"
    policy = pod.text("dnsPolicy")
    if host and policy in ("", "ClusterFirst") and group.kind in ("PyTorchJob", "JobSet", "MPIJob", "VolcanoJob"):
        message = "on the host's network names of Services do not resolve, and MASTER_ADDR is one"
        yield _at(pod.keys["hostNetwork"], "K8S033", message, "dnsPolicy: ClusterFirstWithHostNet")
    if host and trainer and not _alone(pod):
        for port in trainer.list("ports"):
            number = port.number("containerPort")
            if number:
                message = f"port {number} on the host's network: a second pod on the node finds it taken"
                yield _at(port.entries["containerPort"], "K8S034", message)
    for one in group.containers:
        limits = one.get("resources", "limits")
        rdma = [name for name in (limits.entries if limits else ()) if re.match(r"rdma/|.*/(hca|roce|ib)", name)]
        added = [item.raw for item in one.list("securityContext", "capabilities", "add")]
        chosen = one.get("securityContext", "capabilities", "drop")  # somebody thought of capabilities
        if (
            rdma
            and limits
            and _pins(rdma[0], limits.text(rdma[0]))
            and not chosen
            and not {"IPC_LOCK", "ALL", "SYS_ADMIN"} & set(added)
            and one.text("securityContext", "privileged") != "true"
        ):
            yield _at(
                limits.keys[rdma[0]],
                "K8S035",
                f"{rdma[0]} without IPC_LOCK: the memory that RDMA pins is limited by ulimit -l",
            )
        if one.text("securityContext", "privileged") == "true":
            severity = "" if one is trainer else "note"
            yield _at(
                one.entries["securityContext"].keys["privileged"],
                "K8S036",
                f"container {one.text('name')} is privileged",
                "",
                severity,
            )


def _pins(resource: str, count: str) -> bool:
    """Whether a resource wants IPC_LOCK: one rdma/ib is CoreWeave's, who ask for none, 8 are Azure's, who do."""
    rows = [row for row in network.profiles().values() if row.resource.get("name") == resource]
    rows = [row for row in rows if str(row.resource.get("other")) == count] or rows
    return all("allow_ipc_lock" in {**row.needs, **row.advice} for row in rows)


QUANTITY = re.compile(r"[+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?")


def _containers(group: Group, members: list[Group]) -> Iterator[Found]:
    for one in (*group.containers, *group.pod.list("initContainers")):
        yield from _image(one)
        yield from _variables(one, mastered=group.job.get("spec", "pytorchReplicaSpecs", "Master") is not None)
        yield from _resources(one)
    trainer = group.trainer
    if (
        trainer
        and not trainer.get("resources")
        and group.kind in ("PyTorchJob", "JobSet")
        and group.role != "Launcher"
    ):
        place = trainer.get("name") or trainer
        yield _at(place, "K8S044", f"container {trainer.text('name')} asks for no resources, so for no GPU")
    spec = group.job.get("spec")
    said = spec.get("nprocPerNode") if spec else None
    gpus = _gpus(trainer) if trainer else None
    if said and said.raw and said.raw.isdigit() and gpus and int(said.raw) != gpus:
        severity = "" if int(said.raw) > gpus else "warning"
        yield _at(said, "K8S022", f"nprocPerNode {said.raw} on pods of {gpus} GPUs", f'"{gpus}"', severity)
    slots = group.job.number("spec", "slotsPerWorker")
    if slots and gpus and group.kind == "MPIJob" and slots != gpus and group.role == "Worker":
        severity = "" if slots > gpus else "warning"
        yield _at(
            group.job.entries["spec"].entries["slotsPerWorker"],
            "K8S022",
            f"{slots} slots on pods of {gpus} GPUs",
            f"{gpus}",
            severity,
        )


def _image(one: Node) -> Iterator[Found]:
    image = one.get("image")
    if image is None or not image.raw or HOLE.search(image.raw) or "@sha256:" in image.raw:
        return
    tag = image.raw.rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        yield _at(image, "K8S043", f"{image.raw[:80]} is whatever was pushed last, perhaps another on each pod")


def _variables(one: Node, *, mastered: bool = False) -> Iterator[Found]:
    """`mastered`: of a PyTorchJob with a Master; where all are Workers the operator names none."""
    seen: dict[str, Node] = {}
    for item in one.list("env"):
        name, value = item.text("name"), item.get("value")
        place = item.get("name") or item
        if name in seen and name:
            yield _at(place, "K8S040", f"{name} stands here and in line {seen[name].line}")
        seen[name] = place
        if (
            value is not None
            and value.raw is not None
            and not value.is_string
            and not HOLE.search(value.raw)
            and value.raw
        ):
            yield _at(value, "K8S003", f"{name}: {value.raw} is no text for Kubernetes", f'"{value.raw}"')
        if value is not None and launchlint.assigned_secret(name, value.raw) and not HOLE.search(value.raw or ""):
            yield _at(
                place,
                "K8S041",
                f"{name} is a secret in plain text",
                "valueFrom: {secretKeyRef: {name: ..., key: ...}}",
            )
        if mastered and name in STATIC and (value is None or value.raw is not None):
            yield _at(place, "K8S020", f"the operator appends its own {name}, which wins")
    for words in ("command", "args"):
        for item in one.list(words):
            if item.raw is not None and not item.is_string and item.raw and not HOLE.search(item.raw):
                yield _at(item, "K8S003", f"{item.raw} in {words} is no text for Kubernetes", f'"{item.raw}"')


def _resources(one: Node) -> Iterator[Found]:
    limits, requests = one.get("resources", "limits"), one.get("resources", "requests")
    for section in (limits, requests):
        for name, value in section.entries.items() if section else ():
            nothing = value.raw in ("", "null", "~") and not value.is_string  # `cpu:` alone, which is left out
            if value.raw is None or nothing or HOLE.search(value.raw):
                continue
            whole = GPU.fullmatch(name) or name.startswith(("rdma/", "vpc.amazonaws.com/", "hugepages-"))
            if not QUANTITY.fullmatch(value.raw) or (GPU.fullmatch(name) and not value.raw.isdigit()):
                message = f"{name}: {value.raw[:40]} is no {'whole number' if whole else 'quantity'}"
                yield _at(value, "K8S004", message)
    named = {name: key for section in (requests, limits) if section for name, key in section.keys.items()}
    huge = next((name for name in named if name.startswith("hugepages-")), None)
    if huge and not {"cpu", "memory"} & set(named):
        yield _at(named[huge], "K8S046", f"{huge} without cpu or memory: no such pod is taken")
    if requests is None:
        return
    for name, value in requests.entries.items():
        if not (GPU.fullmatch(name) or name.startswith(("rdma/", "vpc.amazonaws.com/", "hugepages-"))):
            continue
        limit = limits.get(name) if limits else None
        if limit is None or (limit.raw != value.raw and not HOLE.search(f"{limit.raw}{value.raw}")):
            shown = limit.raw if limit else "nothing"
            yield _at(
                requests.keys[name],
                "K8S042",
                f"{name}: requests {value.raw}, limits {shown}, and they have to be equal",
            )


# -- what runs beside the ranks

DAEMON = re.compile(
    r"(tcpgpudmarxd|rxdm)\b|sshd\b.* -D\b|\bsleep\s+(infinity|inf)\b|\btail\s+-f\s+/dev/null"
    r"|\b(dcgm-exporter|node_exporter|tensorboard|fluent-bit|nvidia-cuda-mps-control -f)\b"
)
ENDS = re.compile(r"\b(while|until)\b.*(-[efs]\s|kill|pgrep|wait)|\bpkill\b|\btimeout\b", re.DOTALL)


def _beside(group: Group, members: list[Group]) -> Iterator[Found]:
    """A pod has succeeded when all of its containers have, and a daemon never ends."""
    trainer = group.trainer
    if group.kind not in ("Job", "JobSet", "VolcanoJob") or trainer is None or not _gpus(trainer):
        return
    if group.pod.text("shareProcessNamespace") == "true":
        return  # the ranks may end it
    for one in group.containers:
        words = [one.text("image"), *(item.raw or "" for name in ("command", "args") for item in one.list(name))]
        said = " ".join(words)
        called = re.search(r"(^|-)(daemon|rxdm)$", one.text("name"))
        if one is trainer or _gpus(one) or not (called or DAEMON.search(said)) or ENDS.search(said):
            continue
        place = one.get("name") or one
        message = f"{one.text('name') or 'a container'} never ends, so the pod and its Job never complete"
        yield _at(place, "K8S037", message, "an init container with restartPolicy: Always")


KNOWN = {"PyTorchJob", "MPIJob", "JobSet", "VolcanoJob", "Job", "Pod"}
REFERENCE = re.compile(r"(?<!\$)\$\(([A-Z][A-Z0-9_]*)\)")
GIVEN = re.compile(  # what controllers, Volcano's plugins and Services put there
    r"JOB_COMPLETION_INDEX|MASTER_(ADDR|PORT)|WORLD_SIZE|RANK|(PET|V[CK]|JOBSET|JAX|OMPI|NODE|KUBERNETES)_\w+|TF_CONFIG"
    r"|\w+_SERVICE_(HOST|PORT)\w*|\w+_PORT(_\w+)?|\w+_(HOSTS|NUM)|PWD|RANDOM|UID"
)


def _references(group: Group, members: list[Group]) -> Iterator[Found]:
    """$(NAME) is Kubernetes' own, and stays as it is where the container has no such variable."""
    for one in (*group.containers, *group.pod.list("initContainers")):
        names = {item.text("name") for item in one.list("env")}
        if "" in names or one.get("envFrom") or group.kind not in KNOWN:
            continue  # somebody else's controller may add variables
        words = [item for name in ("command", "args") for item in one.list(name)]
        at = scriptlint.script_in([item.raw or "" for item in words])
        values = [value for item in one.list("env") if (value := item.get("value"))]
        for item in (*words, *values):
            for m in REFERENCE.finditer(item.raw or ""):
                if m[1] in names or GIVEN.fullmatch(m[1]):
                    continue
                runs = at is not None and item is words[at]
                then = "and the shell runs it as a command" if runs else "and is taken as it stands"
                message = f"{m[0]} stays: the container has no variable {m[1]}, {then}"
                fix = f"env: [{{name: {m[1]}, valueFrom: ...}}]" + (
                    f", or ${{{m[1]}}} for a shell's own" if runs else ""
                )
                yield _within(_at(item, "K8S047", message, fix), item, m.start(), m.end())


def _within(found: Found, node: Node, start: int, end: int) -> Found:
    """About a piece of a text: its own place in a block; the text's where YAML has moved its lines."""
    if not node.block or node.folded:
        return found
    before = (node.raw or "")[:start]
    column = node.indent + start - before.rfind("\n")
    return replace(found, line=node.line + 1 + before.count("\n"), column=column, end=column + end - start)


# -- commands

TRAINS = re.compile(r"train|tune|sft|dpo|ddp|fsdp|run_[cm]lm", re.IGNORECASE)
STARTS = re.compile(
    r"--?(devices|gpus?|num[-_](gpus|processes)|n?proc\w*|world[-_]size)\b|spawn|launch|jax|maxtext|\bray\b",
    re.IGNORECASE,
)


def _one_rank(one: Node, gpus: int, severity: str) -> Iterator[Found]:
    """`python train.py` in a pod of 8 GPUs: one rank, unless the program starts others by itself."""
    words = [item for name in ("command", "args") for item in one.list(name) if item.raw is not None]
    at = scriptlint.script_in([item.raw or "" for item in words])
    env = " ".join(item.text("name") for item in one.list("env"))
    if STARTS.search(" ".join([*(item.raw or "" for item in words), one.text("image")])) or "JAX" in env:
        return
    if at is None:
        argv, place = [item.raw or "" for item in words], words[0] if words else one
    else:
        case = scriptlint.Case(words[at].raw or "", "pod")
        plain = [command for command, _ in case.commands if not command.inside and not command.background]
        if case.launches or not plain or len(plain) != len(case.commands):
            return
        last = next((command for command in reversed(plain) if command.name not in scriptlint.TELLS), plain[-1])
        argv, place = [word.partial for word in last.argv], words[at]
    argv = argv[1:] if argv[:1] == ["exec"] else argv
    program = next((word for word in argv[1:] if not word.startswith("-")), "")
    if not argv or not re.fullmatch(r"(.*/)?python[0-9.]*", argv[0]) or not program.endswith(".py"):
        return
    if TRAINS.search(program.rpartition("/")[2]):
        message = f"python starts one rank on a pod of {gpus} GPUs"
        yield _at(place, "K8S048", message, f"torchrun --nproc-per-node {gpus}", severity)


def _commands(group: Group, members: list[Group]) -> Iterator[Found]:
    alike = [one for one in members if one.trainer and (_gpus(one.trainer) or len(members) == 1)] or members
    if group.kind == "MPIJob":
        return  # its launcher reads a hostfile
    counts = [one.count for one in alike]
    nodes = sum(count for count in counts if count) if all(counts) else None
    given = group.kind in ("PyTorchJob", "TrainJob")
    for one in group.containers:
        gpus = _gpus(one)
        env = {item.text("name"): item.text("value") for item in one.list("env")}
        yield from _command(one, Around(nodes, gpus, env, given), env)
        if one is group.trainer and gpus and gpus > 1 and nodes and nodes > 1:
            yield from _one_rank(one, gpus, "" if group.kind == "PyTorchJob" else "note")
    if group.kind == "Job" and (group.count or 1) > 1 and group.job.text("spec", "completionMode") != "Indexed":
        trainer = group.trainer
        if trainer and _gpus(trainer):
            place = group.job.entries["spec"].keys.get("parallelism") or group.job
            yield _at(
                place,
                "K8S045",
                f"{group.count} pods without an index: none knows its rank",
                "completionMode: Indexed",
            )


def _command(one: Node, around: Around, env: dict[str, str]) -> Iterator[Found]:
    words = [item for name in ("command", "args") for item in one.list(name) if item.raw is not None]
    at = scriptlint.script_in([word.raw or "" for word in words])
    if at is not None:
        yield from _script(words[at], around)
        return
    argv = [
        Word(word.raw or "", word.line, word.column, not re.search(r"\$\(|\$\{", word.raw or "")) for word in words
    ]
    launch = launchlint.read(argv)
    if launch:
        yield from _as_pod(launchlint.judge(launch, around))
    yield from launchlint.secrets(argv)


def _as_pod(found: Iterator[Found]) -> Iterator[Found]:
    """A port is a pod's own, so what collides on a node does not collide here."""
    return (one for one in found if one.rule not in ("LCH012", "LCH013"))


def _script(node: Node, around: Around) -> Iterator[Found]:
    """What `bash -c` runs, judged as a script; its lines are those of the file where it is a block."""
    text = node.raw or ""
    case = scriptlint.Case(text, "pod")
    shift = node.line if node.block else node.line - 1
    for launch, _, step in case.launches:
        if step is None:
            for one in _as_pod(launchlint.judge(launch, around)):
                yield _moved(one, node, shift)
    for command, remote in case.commands:
        for one in launchlint.secrets(case.words(command.argv, remote)):
            yield _moved(one, node, shift)
    for assigned in case.script.assignments:
        if assigned.value is not None and launchlint.assigned_secret(assigned.name, assigned.value.value):
            yield _moved(case.at(assigned, "LCH010", f"{assigned.name} is a secret in plain text"), node, shift)
    for code, command in scriptlint.codes(case):
        message = f"{code.name}=$? is the code of `{command.name}`, which stands between"
        yield _moved(case.at(code, "SLM042", message, f"{code.name}=$? before `{command.name}`"), node, shift)
    hidden = [c for launch, c, step in case.launches if c.pipeline and not c.last]
    if hidden and "pipefail" not in case.script.options:
        yield _moved(
            case.at(hidden[0], "SLM041", "the exit code is that of the last command of the pipe"), node, shift
        )


def _moved(one: Found, node: Node, shift: int) -> Found:
    if not node.block or node.folded:
        return replace(one, line=node.line, column=node.column, end=node.column + 1)
    return replace(one, line=one.line + shift, column=one.column + node.indent, end=one.end + node.indent)


def _config(job: Node) -> Iterator[Found]:
    if _kind(job) != "ConfigMap":
        return
    data = job.get("data")
    for name, value in data.entries.items() if data else ():
        if launchlint.assigned_secret(name, value.raw):
            yield _at(data.keys[name] if data else value, "K8S041", f"{name} is a secret in a ConfigMap", "a Secret")


def configs(text: str, *, name: str = "<stdin>") -> list[tuple[str, int, int, int | None, int | None]]:
    """DeepSpeed configs in ConfigMaps: text, the line before, indentation, nodes and GPUs of the job beside it."""
    jobs = _readable(text, name)
    sizes = {size for size in (_size(job) for job in jobs) if size}
    nodes, gpus = sizes.pop() if len(sizes) == 1 else (None, None)
    found = []
    for job in jobs:
        data = job.get("data") if _kind(job) == "ConfigMap" and not ours(job) else None
        for value in data.entries.values() if data else ():
            body = value.raw or ""
            if (
                value.block
                and body.lstrip().startswith("{")
                and scriptlint.CONFIG.search(body)
                and not HOLE.search(body)
            ):
                found.append((body, value.line, value.indent, nodes, gpus))
    return found


def _size(job: Node) -> tuple[int, int] | None:
    members = [group for group in groups(job) if group.trainer and _gpus(group.trainer)]
    each = {_gpus(group.trainer) for group in members if group.trainer}
    counts = [group.count for group in members]
    if len(each) != 1 or not all(counts):
        return None
    return sum(count or 0 for count in counts), each.pop() or 0
