"""The objects in a file of manifests: YAML or JSON, with lists taken apart; templates and huge files are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher import manifestlint, yamldoc
from launcher.errors import Problem, UserError
from launcher.imports.pods import Object
from launcher.spec.check import SECRET_NAME

TEMPLATE = re.compile(r"\{\{-?\s*(\.|\$|if\b|with\b|range\b|include\b|template\b|end\b|define\b|toYaml\b|quote\b|-)")
HOLE = re.compile(r"\$\{?([A-Za-z_]\w*)(?::-[^}]*)?\}?")
MAX_DEPTH = 64
LARGEST = 200_000  # values in a file: anchors that repeat each other would take the machine's memory


SAME = "as a job file: resources.nodes, resources.gpus_per_node, container, setup, train.command; `dslaunch schema`"
ELSEWHERE = (  # what other tools take, by the keys that tell it
    ("a task of SkyPilot's", {"run", "resources"}, SAME),
    ("a task of SkyPilot's", {"run", "num_nodes"}, SAME),
    ("a run of MosaicML's mcli", {"command", "compute", "image"}, SAME),
    ("an experiment of Beaker's", {"tasks", "version", "budget"}, SAME),
    ("a task of dstack's", {"type", "commands"}, SAME),
    ("an experiment of Determined's", {"entrypoint", "searcher"}, SAME),
    ("a file of docker compose", {"services"}, "the service that trains, as a job file: container, train.command"),
)


def documents(text: str, *, name: str) -> list[Object]:
    """Every object of a file, lists taken apart. Raises UserError for templates and what is no YAML."""
    import yaml

    template = TEMPLATE.search(text)
    try:
        _bounded(text, name)
        given = list(yaml.load_all(text, Loader=yamldoc.loader()))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if not template and "{{" not in text:
            said_ = getattr(error, "problem", None) or "it is cut off or not indented"
            raise UserError(
                Problem(f"no YAML: {said_}", "kubectl apply --dry-run=client -f it", where=where)
            ) from None
        given = []
    if template or (not given and "{{" in text):
        line = text.count("\n", 0, text.index("{{")) + 1
        hint = "helm template CHART -f VALUES > job.yaml, then dslaunch import job.yaml"
        message = "this is a template of Helm's or Jinja's: what it becomes depends on values"
        raise UserError(Problem(message, hint, where=f"{name}:{line}:1"))
    manifestlint.shaped(text, name=name)
    found = [item for one in given for item in _items(_of_json(one))]
    for one in found:
        if "apiVersion" not in one and "kind" not in one and ("train" in one or {"name", "model"} <= set(one)):
            raise UserError(Problem("this is a job file already", f"dslaunch submit {name}", where=name))
        if one.get("kind") in ("Kustomization", "Component") or ("apiVersion" not in one and any(
            isinstance(one.get(key), list) for key in ("resources", "patches", "configMapGenerator"))):  # fmt: skip
            message = "this is a kustomization: it names the files that it changes"
            raise UserError(Problem(message, "kubectl kustomize DIR > job.yaml, then import that", where=name))
    found = [
        one for one in found if all(one.get(key) and isinstance(one[key], str) for key in ("apiVersion", "kind"))
    ]
    if not found:
        for one in (one for one in given if isinstance(one, dict)):
            for what, keys, hint in ELSEWHERE:
                if keys <= set(one):
                    raise UserError(Problem(f"this is {what}, and no Kubernetes object", hint, where=name))
        message = "nothing in it is a Kubernetes object: none has an apiVersion and a kind"
        raise UserError(Problem(message, "dslaunch import job.yaml, or train.sbatch", where=name))
    return found


def _bounded(text: str, name: str) -> None:
    """Refuses what unfolds to too many values, or nests too deeply, before anything is made of it."""
    import yaml

    sizes: dict[str, int] = {}  # of what an anchor names, unfolded
    around: list[tuple[str, int]] = []  # the anchors of what is open, and how much there was before it
    total = 0
    for event in yaml.parse(text, Loader=yamldoc.loader()):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            around.append((event.anchor or "", total))
            total += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, before = around.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes[event.anchor or ""] = 1
        else:
            continue
        mark: Any = event.start_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}"
        if isinstance(event, yaml.AliasEvent) and event.anchor in dict(around):
            raise UserError(Problem(f"*{event.anchor} stands in itself", "one job", where=place))
        if len(around) > MAX_DEPTH:
            raise UserError(Problem(f"nested more than {MAX_DEPTH} levels deep", "one job", where=place))
        if total > LARGEST:
            raise UserError(Problem(f"more than {LARGEST:,} values, anchors unfolded", "one job", where=place))


def _of_json(value: Any) -> Any:
    """As Kubernetes' reader has it: keys are text, and so is what YAML alone knows, as 2026-01-01."""
    if isinstance(value, dict):
        return {str(key): _of_json(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_of_json(child) for child in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _items(one: Any) -> Iterator[Object]:
    if isinstance(one, dict) and isinstance(one.get("items"), list) and str(one.get("kind", "")).endswith("List"):
        for item in one["items"]:
            yield from _items(item)
    elif isinstance(one, list):
        for item in one:
            yield from _items(item)
    elif isinstance(one, dict) and one.get("kind") == "AppWrapper":
        for row in (one.get("spec") or {}).get("components") or ():
            inner = dict(row.get("template") or {})
            around, metadata = one.get("metadata") or {}, dict(inner.get("metadata") or {})
            for key in ("labels", "annotations"):
                metadata[key] = {**(around.get(key) or {}), **(metadata.get(key) or {})}
            inner["metadata"] = metadata
            yield inner
    elif isinstance(one, dict):
        yield one


def filled(value: Any, environ: Mapping[str, str], told: list[str], key: str = "") -> Any:
    """What envsubst would fill in, where the environment says it; commands have a shell of their own."""
    if isinstance(value, dict):
        if key in ("data", "binaryData", "stringData"):
            return value
        return {name: filled(child, environ, told, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return value if key in ("command", "args") else [filled(child, environ, told, key) for child in value]
    if isinstance(value, str) and "$" in value and key != "value":

        def put(match: re.Match[str]) -> str:
            if match[1] not in environ or SECRET_NAME.regex.fullmatch(match[1]):
                return match[0]
            told.append(match[1])
            return environ[match[1]]

        return HOLE.sub(put, value)
    return value


def metadata_of(document: Mapping[str, Any]) -> Object:
    return document.get("metadata") or {}


def spec_of(document: Mapping[str, Any]) -> Object:
    return document.get("spec") or {}
