"""A strategic merge patch over the job object: what no field says, said in the object's own words.

Mappings merge, null deletes, lists are replaced; a list whose items have a merge key in Kubernetes' API merges item
by item: `containers: [{name: pytorch, tty: true}]` changes that container and leaves the others. `$patch: delete` in
an item removes it, `$patch: replace` puts the item or mapping in the place of what was there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from launcher.errors import Path, Problem, UserError
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, looks_secret

AT: Path = ("kubernetes", "patch")
# The patchMergeKey of core/v1, and the listMapKey of a JobSet and a TrainJob. Other lists are replaced.
KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort",),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey",),
    "resourceClaims": ("name",),
    "claims": ("name",),
    "schedulingGates": ("name",),
    "ownerReferences": ("uid",),
    "replicatedJobs": ("name",),
    "runtimePatches": ("manager",),
}
UNIONS = ("finalizers",)  # of plain values, merged
WORD = "$patch"
# What is counted on elsewhere: ranks, names and the script that starts them.
COUNTS = ("replicas", "parallelism", "completions", "numNodes", "numProcPerNode", "nprocPerNode", "minReplicas",
          "maxReplicas")  # fmt: skip
GPUS = ("nvidia.com/gpu", "nvidia.com/mig-", "amd.com/gpu")
SHARES = ("nvidia.com/gpumem", "nvidia.com/gpucores")  # HAMi's: how much of each GPU, and no further one
OWN_LABELS = "app.kubernetes.io/"
IDENTITY = (("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"))


def is_gpu(name: str) -> bool:
    """nvidia.com/gpu.shared is one; nvidia.com/gpumem-percentage is a part of those that a pod has."""
    return name.startswith(GPUS) and not name.startswith(SHARES)


def apply(
    job: dict[str, Any], patch: dict[str, Any] | str, *, container: str = "pytorch", gpu: str = "", at: Path = AT
) -> dict[str, Any]:
    """The object with the patch laid over it. Raises UserError where that breaks what dslaunch counts on.

    `container` is the name of the one that trains, `gpu` the resource that a GPU is, and `at` where the patch stands.
    """
    if isinstance(patch, str):  # pure code reads no files
        raise UserError(Problem(f"the patch {patch} was not read", "a section in its place", at))
    problems: list[Problem] = []
    made = _merged(job, patch, at, problems)
    if not problems:
        problems += _broken(job, made, container, gpu, at)
    if problems:
        raise UserError(*(replace(p, message=f"{'.'.join(map(str, p.at[2:]))}: {p.message}") for p in problems))
    assert isinstance(made, dict)
    return made


def _merged(under: Any, over: Any, at: Path, problems: list[Problem]) -> Any:
    if isinstance(over, dict):
        return _mapping(under if isinstance(under, dict) else {}, over, at, problems)
    if isinstance(over, list):
        name = str(at[-1])
        if name in UNIONS and isinstance(under, list):
            return [*under, *(one for one in over if one not in under)]
        if name in KEYS:
            return _items(under if isinstance(under, list) else [], over, KEYS[name], at, problems)
        return [_merged(None, one, (*at, index), problems) for index, one in enumerate(over)]
    return over


def _mapping(under: dict[str, Any], over: dict[str, Any], at: Path, problems: list[Problem]) -> dict[str, Any]:
    word = over.get(WORD, "merge")
    if word not in ("merge", "replace", "delete"):
        problems.append(Problem(f"{WORD} {word} is none", "delete or replace", (*at, WORD)))
    for name in over:
        if str(name).startswith("$") and name != WORD:
            problems.append(Problem(f"{name} is not done here", f"{WORD}: delete or replace", (*at, name)))
    made = {} if word != "merge" else copy.deepcopy(under)
    if word == "delete":
        return made
    for name, value in over.items():
        if str(name).startswith("$"):
            continue
        if value is None or (isinstance(value, dict) and value.get(WORD) == "delete"):
            made.pop(name, None)
        else:
            made[name] = _merged(made.get(name), value, (*at, name), problems)
    return made


def _items(under: list[Any], over: list[Any], keys: tuple[str, ...], at: Path, problems: list[Problem]) -> list[Any]:
    made = copy.deepcopy(under)
    if any(isinstance(one, dict) and set(one) == {WORD} and one[WORD] == "replace" for one in over):
        made, over = [], [one for one in over if one != {WORD: "replace"}]
    for index, one in enumerate(over):
        here = (*at, index)
        if not isinstance(one, dict) or any(key not in one for key in keys):
            problems.append(Problem(f"an item of {at[-1]} without {' and '.join(keys)} is nobody's", at=here))
            continue
        found = [row for row in made if isinstance(row, dict) and all(row.get(key) == one[key] for key in keys)]
        if one.get(WORD) == "delete":
            made = [row for row in made if row not in found]
        elif found:
            place = made.index(found[0])
            made[place] = _mapping(found[0], one, here, problems)
        else:
            made.append(_mapping({}, one, here, problems))
    return made


# --- what has to stay -----------------------------------------------------------------------------


def _broken(job: dict[str, Any], made: dict[str, Any], container: str, gpu: str, root: Path) -> Iterator[Problem]:
    for where in IDENTITY:
        if _at(job, where) != _at(made, where):
            yield Problem(f"{'.'.join(where)} is dslaunch's own: the job is found by it", at=(*root, *where))
    for where, value in _labels(job, ()):
        if _at(made, where) != value:
            yield Problem(f"label {where[-1]} is dslaunch's own: pods are found by it", at=(*root, *where))
    for where, value in _counts(job, ()):
        if _at(made, where) != value:
            message = f"{where[-1]} is {value}, which the plan was made for"
            yield Problem(message, "resources.nodes, gpus_per_node or kubernetes.elastic", (*root, *where))
    for where, value in _amounts(job, ()):
        now = _at(made, where) or {}
        before = value.get(gpu)
        if gpu and str(now.get(gpu)) != str(before):
            message = f"{gpu} is {before}, which the plan was made for"
            yield Problem(message, "resources.gpus_per_node", (*root, *where, gpu))
        for name in sorted(set(now) - set(value) - {gpu}):
            if is_gpu(name) and gpu:
                hint = "resources.gpus_per_node, kubernetes.gpu_resource"
                yield Problem(f"{name} beside {gpu} is a GPU that the plan has not", hint, (*root, *where, name))
    known = {where for where, _ in _amounts(job, ())}
    for where, value in _amounts(made, ()):
        if where not in known and where[-1] == "limits":
            for name in sorted(filter(is_gpu, value)):
                message = f"{name} of another container is a GPU that the plan has not"
                yield Problem(message, "resources.gpus_per_node", (*root, *where, name))
    for where, pod in _pods(job, ()):
        now = _at(made, where)
        at = (*root, *where)
        boxes = now.get("containers") if isinstance(now, dict) else None
        rows = [one for one in boxes if one.get("name") == container] if isinstance(boxes, list) else []
        before = next((one for one in pod["containers"] if one["name"] == container), None)
        if before is None:
            continue
        if len(rows) != 1:
            message = f"the container {container} is gone, and it is the one that trains"
            yield Problem(message, at=(*at, "containers"))
            continue
        for name in ("command", "args"):
            if rows[0].get(name) != before.get(name):
                yield Problem(f"{name} of {container} starts the ranks", "train.command", (*at, "containers", name))
        told = {one["name"]: one for one in before.get("env") or ()}
        for one in rows[0].get("env") or ():
            yield from _variable(one, told, (*at, "containers", "env"))
        for name, key in (("volumeMounts", "mountPath"), ("env", "name")):
            now_there = {one[key]: one for one in rows[0].get(name) or ()}
            for one in before.get(name) or ():
                ours = one[key].startswith("DSLAUNCH_") or one.get("name") == "bundle"
                if ours and now_there.get(one[key]) != one:
                    yield Problem(f"{one[key]} of {container} is dslaunch's own", at=(*at, "containers", name))
        volumes = [one for one in now.get("volumes") or () if one.get("name") == "bundle"]
        if volumes != [one for one in pod.get("volumes") or () if one["name"] == "bundle"]:
            yield Problem("the volume bundle has the scripts", "another name", (*at, "volumes"))


def _variable(one: dict[str, Any], before: dict[str, Any], at: Path) -> Iterator[Problem]:
    name, value = str(one["name"]), one.get("value")
    if one == before.get(name):
        return
    prefix = next((prefix for prefix in NOT_YOUR_PREFIXES if name.startswith(prefix)), "")
    if name in NOT_YOURS or (prefix and prefix != "DSLAUNCH_"):  # which has a message of its own
        yield Problem(f"{name} cannot be set: {NOT_YOURS.get(name) or NOT_YOUR_PREFIXES[prefix]}", "remove it", at)
    elif isinstance(value, str) and value and looks_secret(name, value):
        hint = f"secrets: {{{name}: {{secret: NAME, key: KEY}}}}"
        yield Problem(f"{name} looks like a secret, and manifests are written to files", hint, at)


def _at(value: Any, where: tuple[Any, ...]) -> Any:
    for step in where:
        if isinstance(value, list) and isinstance(step, str):  # an item, by its name
            value = next((one for one in value if isinstance(one, dict) and one.get("name") == step), None)
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _steps(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((one["name"], one) for one in value if isinstance(one, dict) and "name" in one)


def _counts(value: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, child in _steps(value):
        if name in COUNTS and not isinstance(child, (dict, list)):
            yield (*where, name), child
        else:
            yield from _counts(child, (*where, name))


def _labels(value: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, child in _steps(value):
        if name == "labels" and isinstance(child, dict):
            yield from (((*where, name, key), one) for key, one in child.items() if key.startswith(OWN_LABELS))
        elif name not in ("matchLabels", "env", "volumes"):
            yield from _labels(child, (*where, name))


def _amounts(value: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Limits and requests of containers that have some, and of a TrainJob's trainer."""
    for name, child in _steps(value):
        if name in ("resources", "resourcesPerNode") and isinstance(child, dict):
            yield from (((*where, name, side), child[side]) for side in ("limits", "requests") if side in child)
        else:
            yield from _amounts(child, (*where, name))


def _pods(value: Any, where: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(value, dict) and isinstance(value.get("containers"), list):
        yield where, value
        return
    for name, child in _steps(value):
        yield from _pods(child, (*where, name))
