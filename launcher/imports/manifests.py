"""Kubernetes manifests of others as job files: PyTorchJobs, TrainJobs, JobSets, and what is used in their place.

A template's pod is read by `pods`; its command goes through the reader of shell scripts, behind its variables, as if
it were a script. What dslaunch does itself is left out and said; what no field says goes into kubernetes.patch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from posixpath import basename, join, normpath
from typing import Any

from launcher import manifestlint, shell, spec
from launcher.backends import kubernetes
from launcher.backends.kubernetes import DIGEST, kinds, patch
from launcher.backends.kubernetes.queueing import PRIORITY, QUEUE, SCHEDULERS
from launcher.bundle import ASKED, Tree
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, Kind, Note, pods, programs, reference, sbatch
from launcher.imports.pods import Object, Pod, takes, whole
from launcher.imports.programs import said
from launcher.plan.launchers import TOLD
from launcher.shell import Command, Word
from launcher.spec.check import NOT_YOURS, SECRET_NAME, SECRET_VALUE
from launcher.spec.machines import Recover
from launcher.spec.words import Label, LabelKey, Variable

MANIFEST = re.compile(r"^[ \t]*[\"']?apiVersion[\"']?[ \t]*:", re.MULTILINE)
TEMPLATE = re.compile(r"\{\{-?\s*(\.|\$|if\b|with\b|range\b|include\b|template\b|end\b|define\b|toYaml\b|quote\b|-)")
HOLE = re.compile(r"\$\{?([A-Za-z_]\w*)(?::-[^}]*)?\}?")
MAX_DEPTH = 64
LARGEST = 200_000  # values in a file: anchors that repeat each other would take the machine's memory

# --- which file -----------------------------------------------------------------------------------


def recognised(text: str, *, name: str) -> bool:
    """Whether a file is a manifest, or what becomes one: by its content, as standard input has no name."""
    if text.startswith("#!") or re.search(r"^#SBATCH\b", text, re.MULTILINE):
        return False
    return bool(MANIFEST.search(text)) or name.endswith((".yaml", ".yml", ".json", ".tpl"))


@dataclass(frozen=True)
class Group:
    """Pods that train together, whichever object asks for them."""

    document: Object
    kind: str  # of the job file
    template: Object
    nodes: Any  # a number, or the hole of a template
    was: str = ""  # where the object becomes another one
    notes: tuple[Note, ...] = ()
    per_node: Any = None
    command: tuple[Any, ...] = ()  # in place of the template's own
    policy: Mapping[str, Any] = field(default_factory=dict)  # of run_policy
    attempts: int | None = None
    elastic: Object | None = None
    gang: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of `kubernetes`
    known: Mapping[str, str] = field(default_factory=dict)  # variables of the operator
    rest: Object = field(default_factory=dict)  # of the object's spec, for the patch
    recover: Mapping[str, float] = field(default_factory=dict)


def read(text: str, *, name: str, environ: Mapping[str, str] | None = None) -> Imported:
    """The job of a file of manifests. Raises UserError for what is no job, with what to do instead."""
    found = documents(text, name=name)
    own = _ours(found, name)
    if own is not None:
        return own
    filled: list[str] = []
    found = [_filled(one, environ or {}, filled) for one in found]
    group, beside = _group(found, name)
    job = _Job(group, beside, name, environ or {})
    for variable in dict.fromkeys(filled):
        job.note("carried", f"${variable}, as the environment says now")
    return job.made()


def documents(text: str, *, name: str) -> list[Object]:
    """Every object of a file, lists taken apart. Raises UserError for templates and what is no YAML."""
    import yaml

    template = TEMPLATE.search(text)
    try:
        _bounded(text, name)
        given = list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
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
        message = "nothing in it is a Kubernetes object: none has an apiVersion and a kind"
        raise UserError(Problem(message, "dslaunch import job.yaml, or train.sbatch", where=name))
    return found


def _bounded(text: str, name: str) -> None:
    """Refuses what unfolds to too many values, or nests too deeply, before anything is made of it."""
    import yaml

    sizes: dict[str, int] = {}  # of what an anchor names, unfolded
    around: list[tuple[str, int]] = []  # the anchors of what is open, and how much there was before it
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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


def _filled(value: Any, environ: Mapping[str, str], told: list[str], key: str = "") -> Any:
    """What envsubst would fill in, where the environment says it; commands have a shell of their own."""
    if isinstance(value, dict):
        if key in ("data", "binaryData", "stringData"):
            return value
        return {name: _filled(child, environ, told, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return value if key in ("command", "args") else [_filled(child, environ, told, key) for child in value]
    if isinstance(value, str) and "$" in value and key != "value":

        def put(match: re.Match[str]) -> str:
            if match[1] not in environ or SECRET_NAME.regex.fullmatch(match[1]):
                return match[0]
            told.append(match[1])
            return environ[match[1]]

        return HOLE.sub(put, value)
    return value


# --- of our own making ----------------------------------------------------------------------------


def _ours(found: Sequence[Object], name: str) -> Imported | None:
    """Manifests that dslaunch rendered: job.json travels in them, and what was changed since becomes the patch."""
    made = [one for one in found if one.get("kind") in kinds.BY_KIND
            and (_metadata(one).get("labels") or {}).get("app.kubernetes.io/managed-by") == "dslaunch"]  # fmt: skip
    if not made:
        return None
    if len(made) > 1:
        message = f"dslaunch rendered these {len(made)} jobs: the points of a sweep"
        raise UserError(Problem(message, "its job.yaml, or one of them with its ConfigMaps", where=name))
    told = [
        one["data"][ASKED] for one in found if one.get("kind") == "ConfigMap" and ASKED in (one.get("data") or {})
    ]
    if not told:
        called = _metadata(made[0]).get("name")
        message = (
            f"dslaunch rendered this {made[0]['kind']}, and the ConfigMap {called}-bundle with its {ASKED} is missing"
        )
        raise UserError(Problem(message, f"kubectl get configmap {called}-bundle -o yaml beside it", where=name))
    try:
        job = json.loads(told[0])
    except ValueError as error:
        message = f"the {ASKED} of its ConfigMap is no JSON: {error}"
        raise UserError(Problem(message, "the ConfigMap as dslaunch rendered it", where=name)) from None
    notes = [Note("carried", f"rendered by dslaunch: the job stands in {ASKED}")]
    code = kubernetes.tree(found)
    if code:
        notes.append(Note("left out", "the code that the manifests carry: the job file takes what lies beside it"))
    notes += _edited(job, made[0], code)
    return Imported(job, tuple(notes), {})


def _edited(job: Object, now: Object, code: Tree | None) -> list[Note]:
    """What somebody wrote into the object since it was rendered, as its patch."""
    from launcher import plan

    document = spec.load(json.dumps(job), name=ASKED)
    before = kubernetes.manifests(plan.make(document.spec), code=code)[-1]
    clean = {**now, "metadata": {key: value for key, value in now["metadata"].items() if key not in SERVERS}}
    clean.pop("status", None)
    changed = _difference(before, clean)
    if not changed:
        return []
    digest = (_metadata(now).get("annotations") or {}).get(DIGEST)
    if digest and digest != before["metadata"]["annotations"][DIGEST]:
        return [Note("left out", "another dslaunch rendered it: what this one renders of the same job differs")]
    container = kinds.of(document.spec).container
    try:
        patched = patch.apply(before, changed, container=container)
    except UserError as error:
        return [Note("left out", f"written into it since: {problem.message}") for problem in error.problems]
    if _difference(patched, clean):
        return [Note("left out", "written into it since, in lists that no patch reaches")]
    earlier = job.setdefault("kubernetes", {}).get("patch")
    job["kubernetes"]["patch"] = changed if earlier is None else patch._merged(earlier, changed, patch.AT, [])
    return [Note("kept", "written into it since -> kubernetes.patch")]


SERVERS = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "selfLink", "finalizers",
           "ownerReferences")  # fmt: skip


def _difference(before: Any, now: Any, key: str = "") -> Any:
    """The strategic merge patch from one to the other; {} where they are the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, Any] = {}
        for name in [*before, *(name for name in now if name not in before)]:
            if str(name).startswith("dslaunch.dev/") or str(name).startswith("kubectl.kubernetes.io/"):
                continue
            if name not in now:
                found[name] = None
            elif name not in before:
                found[name] = now[name]
            elif before[name] != now[name]:
                child = _difference(before[name], now[name], name)
                if child not in ({}, []):
                    found[name] = child
        return found
    names = patch.KEYS.get(key, ())
    if names and isinstance(before, list) and isinstance(now, list):
        index = {tuple(map(str, (row.get(name) for name in names))): row for row in before}
        rows = []
        for row in now:
            old = index.pop(tuple(map(str, (row.get(name) for name in names))), None)
            change = row if old is None else _difference(old, row)
            if change:
                rows.append({**{name: row[name] for name in names}, **change})
        rows += [{**{name: row[name] for name in names}, patch.WORD: "delete"} for row in index.values()]
        return rows
    return now


# --- which object ---------------------------------------------------------------------------------


def _metadata(document: Mapping[str, Any]) -> Object:
    return document.get("metadata") or {}


def _spec(document: Mapping[str, Any]) -> Object:
    return document.get("spec") or {}


REFUSED = {  # what cannot be said as a job of dslaunch's, and the way out
    **dict.fromkeys(["RayJob", "RayCluster", "RayService"], (
        "Ray's head places the work of its own workers, and dslaunch starts a program's ranks",
        "a job file whose train.command is your torchrun or deepspeed line; on Slurm `services:` start Ray")),
    **dict.fromkeys(["TFJob", "XGBoostJob", "PaddleJob", "MXJob", "JAXJob"], (
        "its operator tells pods what that framework reads, and dslaunch starts torch's ranks",
        "leave it with its operator")),
    **dict.fromkeys(["Workflow", "WorkflowTemplate", "CronWorkflow", "PipelineRun", "CronJob"], (
        "it starts steps at a time of its own choosing", "import the manifest of the one step that trains")),
    **dict.fromkeys(["InferenceService", "LeaderWorkerSet", "SparkApplication"], (
        "its pods serve, and no program in it trains to an end", "leave it with its operator")),
    **dict.fromkeys(["Deployment", "DaemonSet", "ReplicaSet"], (
        "its pods are started again for ever, and a job of training ends",
        "import the Job, JobSet or PyTorchJob that trains")),
}  # fmt: skip
BESIDE = {  # what lies beside a job
    "PersistentVolumeClaim": "it stays yours: kubectl apply it before", "PersistentVolume": "it stays yours",
    "StorageClass": "it stays yours", "Namespace": "it stays yours: kubectl create namespace",
    "Secret": "its values are not read; references to it are kept, and it stays yours",
    "ConfigMap": "it stays yours: kubectl apply it before, where a volume or variable reads it",
    "Service": "the operator makes the one that names pods", "PodGroup": "dslaunch or the operator makes it",
    **dict.fromkeys(["ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"], "it stays yours"),
    **dict.fromkeys(["LocalQueue", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "Topology", "Queue",
                     "PriorityClass"], "it is the cluster's"),
    "ComputeDomain": "it stays yours: kubectl apply it before, its channel is network.claim_template",
    "ResourceClaimTemplate": "it stays yours: kubectl apply it before",
    "NetworkAttachmentDefinition": "it is the cluster's, network.multus names it",
    **dict.fromkeys(["ClusterTrainingRuntime", "TrainingRuntime"], "it is the cluster's, and kubernetes.runtime"),
    **dict.fromkeys(["Network", "GKENetworkParamSet"], "it is the cluster's"),
}  # fmt: skip


def _group(found: Sequence[Object], name: str) -> tuple[Group, list[Object]]:
    """The one job among the documents, and the others."""
    jobs = [one for one in found if one["kind"] in READERS and _is_job(one)]
    if len(jobs) > 1:
        strong = [one for one in jobs if one["kind"] not in ("StatefulSet", "Pod", "Job")]
        gpus = [one for one in jobs if re.search(r"/gpu['\"]?: ", json.dumps(one))]
        jobs = strong if len(strong) == 1 else gpus if len(gpus) == 1 else jobs
    if len(jobs) > 1:
        listed = ", ".join(f"{one['kind']} {_metadata(one).get('name')}" for one in jobs[:4])
        message = f"{len(jobs)} jobs in one file ({listed}), and a job file starts one"
        raise UserError(Problem(message, "a file for each, imported alone", where=name))
    if not jobs:
        for one in found:
            if one["kind"] in REFUSED:
                why, hint = REFUSED[one["kind"]]
                raise UserError(Problem(f"{one['kind']} {_metadata(one).get('name', '')}: {why}", hint, where=name))
        listed = ", ".join(dict.fromkeys(one["kind"] for one in found))
        message = f"no job that trains is in it: {listed}"
        raise UserError(Problem(message, "a PyTorchJob, TrainJob, JobSet, Job, MPIJob or Volcano Job", where=name))
    return READERS[jobs[0]["kind"]](jobs[0], name), [one for one in found if one is not jobs[0]]


def _is_job(one: Object) -> bool:
    return one["kind"] != "StatefulSet" or bool(pods.gpus(pods.trains(_pod(_spec(one).get("template"))))[1])


def _pod(template: Any) -> Object:
    return ((template or {}).get("spec") or {}) if isinstance(template, dict) else {}


def _sum(counts: Sequence[Any]) -> Any:
    """2 and 1 are 3; with a hole among them, the hole is."""
    numbers = [whole(1 if count is None else count) for count in counts]
    return next((count for count, number in zip(counts, numbers, strict=True) if number is None), sum(
        number for number in numbers if number is not None))  # fmt: skip


LIMITS = ("backoffLimit", "jobMaxRetryCount", "maxRetry", "maxRestarts")
RETRIES = "workload.codeflare.dev.appwrapper/retryLimit"


def _policy(given: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[Note]]:
    """run_policy, attempts, and what is said of a runPolicy or a Job's own."""
    names = {"cleanPodPolicy": "clean_pods", "ttlSecondsAfterFinished": "ttl", "activeDeadlineSeconds": "deadline",
             "suspend": "suspend", "managedBy": "managed_by"}  # fmt: skip
    policy = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) not in (None, False, "")}
    limit = next((given[key] for key in LIMITS if whole(given.get(key)) is not None), None)
    attempts = min(whole(limit) or 0, 100) if limit is not None else None
    several = [f"{key} {given[key]}" for key in LIMITS if whole(given.get(key)) is not None]
    what = ", ".join(several)
    notes = [] if limit is None else [Note("carried", f"{what}: {limit} restarts, each without a new checkpoint")]
    return policy, attempts, notes


def _pytorchjob(one: Object, name: str) -> Group:
    content = _spec(one)
    replicas = content.get("pytorchReplicaSpecs") or {}
    if isinstance(content.get("replicaSpecs"), list):  # HyperPod's
        replicas = {str(row.get("name", index)): row for index, row in enumerate(content["replicaSpecs"])}
    rows = [row for row in replicas.values() if isinstance(row, dict) and row.get("template")]
    if not rows:
        raise UserError(Problem(f"{one['kind']} has no replicas", "pytorchReplicaSpecs with a template", where=name))
    chosen, notes = _alike(rows, list(replicas), [row["template"] for row in rows])
    run = dict(content.get("runPolicy") or {})
    policy, attempts, told = _policy(run)
    policy.pop("managed_by", None) if one["kind"] != "PyTorchJob" else None
    wanted = run.get("schedulingPolicy") or {}
    gang = {"queue": wanted.get("queue"), "min_available": wanted.get("minAvailable"),
            "timeout": wanted.get("scheduleTimeoutSeconds")}  # fmt: skip
    nodes = _sum([rows[index].get("replicas") for index in chosen])
    elastic = content.get("elasticPolicy")
    if elastic and not whole(elastic.get("maxReplicas")):
        notes.append(Note("left out", f"elasticPolicy {json.dumps(elastic)}: it names no maxReplicas"))
        elastic = None
    restarts = list(dict.fromkeys(str(rows[index]["restartPolicy"]) for index in chosen if
                                  rows[index].get("restartPolicy")))  # fmt: skip
    if elastic and restarts:  # its pods meet again, whoever started them
        if restarts[-1] != "OnFailure":
            policy["restart_policy"] = restarts[-1]
        notes.append(Note("carried", f"restartPolicy {restarts[-1]} -> kubernetes.run_policy.restart_policy"))
    elif restarts == ["Never"] and attempts is None:
        attempts = 0
        notes.append(Note("carried", "restartPolicy Never -> recover.attempts: 0"))
    elif restarts:
        notes.append(Note("left out", f"restartPolicy {', '.join(restarts)}: recover.attempts starts ranks again"))
    recover = _monitored(run, notes)
    per_node = content.get("nprocPerNode") or (elastic or {}).get("nProcPerNode")
    world = whole(nodes)
    known = {"PET_NNODES": str(nodes), "WORLD_SIZE": str(nodes)} if world and whole(per_node) in (None, 1) else {}
    was = "" if one["kind"] == "PyTorchJob" else f"this was a {one['kind']}: the object is a PyTorchJob now"
    return Group(
        one, "pytorchjob", rows[chosen[-1]]["template"], nodes, was, (*notes, *told), per_node,
        policy=policy, attempts=attempts, elastic=elastic, gang=gang, known=known, recover=recover,
    )  # fmt: skip


def _monitored(run: Mapping[str, Any], notes: list[Note]) -> dict[str, float]:
    """HyperPod's agent reads the log for lines that come again: steps are looked at here."""
    found: dict[str, float] = {}
    for row in run.get("logMonitoringConfiguration") or ():
        what, told = f"logMonitoringConfiguration {row.get('name')} ({row.get('logPattern')})", len(found)
        for theirs, ours in (("expectedRecurringFrequencyInSeconds", "hang"), ("expectedStartCutOffInSeconds",
                                                                                "first_step")):  # fmt: skip
            seconds = whole(row.get(theirs))
            if seconds:
                found[ours] = seconds
                notes.append(Note("carried", f"{what}: {seconds} s -> recover.{ours}, by the steps and not the log"))
        left = {key: value for key, value in row.items() if key not in ("name", "logPattern") and
                not key.startswith(("expectedRecurring", "expectedStart"))}  # fmt: skip
        if left or len(found) == told:
            notes.append(Note("left out", f"{what} {json.dumps(left)}: recover.hang looks at the steps"))
    again = run.get("restartPolicy")
    if isinstance(again, dict):
        why = "recover.attempts counts starts with no new checkpoint in between"
        notes.append(Note("left out", f"restartPolicy {json.dumps(again)}: {why}"))
    return found


UNEVEN = "resources.gpus_per_node: "  # what a note of pods with other numbers of GPUs begins with


def _alike(rows: Sequence[Object], names: Sequence[str], templates: Sequence[Object]) -> tuple[list[int], list[Note]]:
    """Which of several kinds of pods train: those with GPUs; of them the last is taken, and differences are said."""
    with_gpus = [index for index, one in enumerate(templates) if pods.gpus(pods.trains(_pod(one)))[1]]
    chosen = with_gpus or list(range(len(rows)))
    notes = []
    for index, name in enumerate(names):
        if index not in chosen:
            notes.append(Note("left out", f"{name}: pods without GPUs; the ranks of dslaunch need no other pod"))
    last = templates[chosen[-1]]
    counts = {names[index]: pods.gpus(pods.trains(_pod(templates[index])))[1] for index in chosen}
    if len({str(count) for count in counts.values()}) > 1:
        listed = " and ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(Note("fill in", f"{UNEVEN}{listed} GPUs, and every node of a job has as many"))
    for index in chosen[:-1]:
        for key in sorted({*_pod(last), *_pod(templates[index])}):
            theirs, ours = _pod(templates[index]).get(key), _pod(last).get(key)
            if key == "containers":
                theirs, ours = pods.trains(_pod(templates[index])), pods.trains(_pod(last))
                for part in sorted({*theirs, *ours} - {"name", "command", "args", "ports"}):
                    if theirs.get(part) != ours.get(part):
                        notes.append(
                            Note("left out", f"{part} of {names[index]}: all pods are as {names[chosen[-1]]}")
                        )
            elif theirs != ours:
                notes.append(Note("left out", f"{key} of {names[index]}: all pods are as {names[chosen[-1]]}"))
    return chosen, notes


def _jobset(one: Object, name: str) -> Group:
    content = dict(_spec(one))
    jobs = [row for row in content.pop("replicatedJobs", None) or () if isinstance(row, dict)]
    if not jobs:
        raise UserError(Problem("the JobSet has no replicatedJobs", "one, whose pods train", where=name))
    works = [(row.get("template") or {}).get("spec") or {} for row in jobs]
    names = [str(row.get("name", index)) for index, row in enumerate(jobs)]
    chosen, notes = _alike(jobs, names, [work.get("template") or {} for work in works])
    counts = []
    for index in chosen:
        pods_ = works[index].get("completions") or works[index].get("parallelism") or 1
        replicas = jobs[index].get("replicas", 1)
        both = (whole(pods_), whole(replicas))
        counts.append(pods_ if both[0] is None else replicas if both[1] is None else both[0] * both[1])
    failure = content.pop("failurePolicy", None) or {}
    work = works[chosen[-1]]
    run = {key: content.pop(key, None) for key in ("ttlSecondsAfterFinished", "suspend", "managedBy")}
    run |= {"activeDeadlineSeconds": work.get("activeDeadlineSeconds"), "backoffLimit": failure.get("maxRestarts")}
    policy, attempts, told = _policy(run)
    for key, why in (("network", "pods find each other by the names of the JobSet's Service"),
                     ("successPolicy", "a job is over when all of its pods are"), ("coordinator", "rank 0 is the "
                      "first pod"), ("startupPolicy", "one kind of pods starts")):  # fmt: skip
        if value := content.pop(key, None):
            notes.append(Note("left out", f"{key} {json.dumps(value)}: {why}"))
    for key in ("backoffLimit", "podFailurePolicy", "backoffLimitPerIndex"):
        if work.get(key):
            what = f"{key} {json.dumps(work[key])} of {names[chosen[-1]]}"
            notes.append(Note("left out", f"{what}: recover.attempts starts all pods again"))
    template = dict(work.get("template") or {})
    annotations = {**(_metadata(jobs[chosen[-1]].get("template") or {}).get("annotations") or {}),
                   **(_metadata(template).get("annotations") or {})}  # fmt: skip
    if annotations:
        template["metadata"] = {**_metadata(template), "annotations": annotations}
    told_too = {key: failure[key] for key in ("rules", "restartStrategy") if failure.get(key)}
    if told_too:
        why = "dslaunch knows which end of a pod starts the gang again"
        notes.append(Note("left out", f"failurePolicy {json.dumps(told_too)}: {why}"))
    after = work.get("ttlSecondsAfterFinished")
    if after is not None and "ttl" not in policy:
        policy["ttl"] = after
    return Group(
        one, "jobset", template, _sum(counts), "", (*notes, *told), command=_starter(works, chosen),
        policy=policy, attempts=attempts, rest=content,
    )  # fmt: skip


def _batch(one: Object, name: str) -> Group:
    if str(one["apiVersion"]).startswith("batch.volcano"):
        return _volcano(one, name)
    content = _spec(one)
    nodes = content.get("completions") or content.get("parallelism") or 1
    notes = []
    if content.get("completionMode") != "Indexed" and (whole(nodes) or 2) > 1:
        notes.append(Note("carried", "its pods had no index: completionMode Indexed, which rank each is"))
    policy, attempts, told = _policy({key: value for key, value in content.items() if key != "cleanPodPolicy"})
    was = "this was a Job: the object is a JobSet with that one Job now, which starts all pods again"
    return Group(one, "jobset", content.get("template") or {}, nodes, was, (*notes, *told), policy=policy,
                 attempts=attempts)  # fmt: skip


def _volcano(one: Object, name: str) -> Group:
    content = _spec(one)
    tasks = [row for row in content.get("tasks") or () if isinstance(row, dict) and row.get("template")]
    if not tasks:
        raise UserError(Problem("the Volcano Job has no tasks", "a task with a template", where=name))
    names = [str(row.get("name", index)) for index, row in enumerate(tasks)]
    chosen, notes = _alike(tasks, names, [row["template"] for row in tasks])
    template, command = tasks[chosen[-1]]["template"], _starter(tasks, chosen)
    nodes = _sum([tasks[index].get("replicas") for index in chosen])
    plugins = content.get("plugins") or {}
    if plugins:
        listed = ", ".join(plugins)
        notes.append(Note("left out", f"plugins {listed}: pods find each other by the names of a JobSet's Service"))
    if content.get("policies") or any(row.get("policies") for row in tasks):
        notes.append(
            Note("left out", "policies: a pod that ends badly ends the Job, and recover.attempts starts again")
        )
    policy, attempts, told = _policy(content)
    least = content.get("minAvailable")
    fewer = (whole(least) or 0) < (whole(nodes) or 0)
    gang = {"by": "volcano", "queue": content.get("queue"), "min_available": least if least and fewer else None}
    if least == 0:
        notes.append(Note("left out", "minAvailable 0: ranks wait for each other, so all pods start together here"))
    scheduler = content.get("schedulerName")
    pod = dict(_pod(template))
    if scheduler:
        pod.setdefault("schedulerName", scheduler)
    if content.get("priorityClassName"):
        pod.setdefault("priorityClassName", content["priorityClassName"])
    extra, mounts = [], []
    for index, row in enumerate(content.get("volumes") or ()):
        if row.get("volumeClaimName"):
            extra.append(
                {"name": f"job-volume-{index}", "persistentVolumeClaim": {"claimName": row["volumeClaimName"]}}
            )
            mounts.append({"name": f"job-volume-{index}", "mountPath": row.get("mountPath")})
        else:
            notes.append(
                Note("left out", f"volume at {row.get('mountPath')}: a claim that Volcano makes for the job")
            )
    if extra:
        box = pods.trains(pod)
        boxes = [{**b, "volumeMounts": [*(b.get("volumeMounts") or ()), *mounts]} if b is box else b
                 for b in pod["containers"]]  # fmt: skip
        pod |= {"volumes": [*(pod.get("volumes") or ()), *extra], "containers": boxes}
    known = {
        f"VC_{row.upper().replace('-', '_')}_NUM": str(tasks[i].get("replicas", 1)) for i, row in enumerate(names)
    }
    was = "this was a Volcano Job: the object is a JobSet now, in a PodGroup of Volcano's"
    return Group(
        one, "jobset", {**template, "spec": pod}, nodes, was, (*notes, *told), command=command,
        policy=policy, attempts=attempts, gang=gang, known=known,
    )  # fmt: skip


def _starter(rows: Sequence[Object], chosen: Sequence[int]) -> tuple[Any, ...]:
    """The command of the pod without GPUs that starts the others, where those only wait for it."""

    def words(row: Object) -> list[Any]:
        box = pods.trains(_pod(row.get("template")))
        return [*(box.get("command") or ()), *(box.get("args") or ())]

    last = " ".join(map(str, words(rows[chosen[-1]])))
    others = [row for index, row in enumerate(rows) if index not in chosen or index != chosen[-1]]
    if last and not re.search(r"\bsshd\b|sleep (infinity|inf|[0-9]{4,})", last):
        return ()
    starts = re.compile(r"mpirun|mpiexec|deepspeed|horovodrun|torchrun|accelerate|python")
    return next((tuple(words(row)) for row in others if starts.search(" ".join(map(str, words(row))))), ())


def _mpijob(one: Object, name: str) -> Group:
    content = _spec(one)
    replicas = content.get("mpiReplicaSpecs") or {}
    launcher, worker = replicas.get("Launcher") or {}, replicas.get("Worker") or replicas.get("Launcher") or {}
    if not worker.get("template"):
        raise UserError(Problem("the MPIJob has no workers", "mpiReplicaSpecs.Worker with a template", where=name))
    box = pods.trains(_pod(launcher.get("template")))
    names = ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "cleanPodPolicy")
    run = {**(content.get("runPolicy") or {}), **{key: content[key] for key in names if key in content}}
    policy, attempts, told = _policy(run)
    policy.pop("managed_by", None)
    wanted = run.get("schedulingPolicy") or {}
    gang = {"queue": wanted.get("queue"), "timeout": wanted.get("scheduleTimeoutSeconds")}
    template = dict(worker["template"])
    main = dict(pods.trains(_pod(template)))
    known = {one.get("name") for one in main.get("env") or ()}
    more = [one for one in box.get("env") or () if one.get("name") not in known]
    if more:  # mpirun hands on what its -x names
        pod = dict(_pod(template))
        pod["containers"] = [{**main, "env": [*(main.get("env") or ()), *more]}
                             if b.get("name") == main.get("name") else b for b in pod["containers"]]  # fmt: skip
        template["spec"] = pod
    command = (*(box.get("command") or ()), *(box.get("args") or ()))
    was = "this was an MPIJob: dslaunch starts the ranks on every node, and no pod starts others over ssh"
    note = Note("left out", "the launcher's pod, ssh and the hostfile: every pod starts its own ranks")
    return Group(one, "pytorchjob", template, worker.get("replicas", 1), was, (note, *told),
                 content.get("slotsPerWorker"), command, policy, attempts, gang=gang)  # fmt: skip


def _trainjob(one: Object, name: str) -> Group:
    content = dict(_spec(one))
    trainer = dict(content.pop("trainer", None) or {})
    ref = content.pop("runtimeRef", None) or {}
    notes: list[Note] = []
    options: dict[str, Any] = {}
    runtime = str(ref.get("name") or "torch-distributed")
    if runtime in kinds.MPI or (runtime.startswith("mpi")):
        message = f"runtime {runtime} starts ranks by mpirun: dslaunch starts them in torch-distributed"
        notes.append(Note("left out", message))
        runtime = "torch-distributed"
    if runtime != "torch-distributed":
        options["runtime"] = runtime
    if ref.get("kind") == "TrainingRuntime":
        options["runtime_kind"] = "TrainingRuntime"
    box: Object = {key: trainer[key] for key in ("image", "command", "args", "env") if key in trainer}
    box |= {"name": "node", **({"resources": trainer["resourcesPerNode"]} if trainer.get("resourcesPerNode") else {})}
    template: Object = {"metadata": {"labels": content.pop("labels", None) or {},
                                     "annotations": content.pop("annotations", None) or {}}}  # fmt: skip
    pod: Object = {"containers": [box]}
    for metadata, said_, release in _overrides(content, notes):
        options["trainer"] = release
        for key in ("labels", "annotations"):
            template["metadata"][key] = {**template["metadata"].get(key, {}), **(metadata.get(key) or {})}
        for key, value in said_.items():
            if key in ("containers", "initContainers"):
                for row in value or ():
                    if row.get("name") in ("node", "trainer"):
                        mounts = [*(box.get("volumeMounts") or ()), *(row.get("volumeMounts") or ())]
                        env = [*(box.get("env") or ()), *(row.get("env") or ())]
                        box |= {**{k: v for k, v in row.items() if k != "name"}, "env": env, "volumeMounts": mounts}
                    else:
                        notes.append(Note("left out", f"container {row.get('name')}: its runtime's own"))
            elif isinstance(value, list) and isinstance(pod.get(key), list):
                pod[key] = [*pod[key], *value]
            else:
                pod[key] = value
    if options.get("trainer") == "2.2":
        del options["trainer"]  # as the job file has it by itself
    policy, _, told = _policy(content)
    for key in ("suspend", "managedBy", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        content.pop(key, None)
    if policy.get("deadline"):
        options["trainer"] = "2.3"
    if content.pop("modelConfig", None) or content.pop("datasetConfig", None):
        notes.append(Note("left out", "modelConfig, datasetConfig: Trainer before 2.0; `stage:` copies data"))
    template["spec"] = pod
    known = {"PET_NNODES": str(trainer.get("numNodes", 1))}
    return Group(
        one, "trainjob", template, trainer.get("numNodes", 1), "", (*notes, *told), trainer.get("numProcPerNode"),
        policy=policy, options=options, known=known, rest=content,
    )  # fmt: skip


def _overrides(content: Object, notes: list[Note]) -> Iterator[tuple[Object, Object, str]]:
    """Metadata and pod spec of each override that is meant for the nodes that train, in any dialect."""
    for row in content.pop("podTemplateOverrides", None) or ():
        if _for_nodes(row, notes):
            yield row.get("metadata") or {}, dict(row.get("spec") or {}), "2.1"
    for row in content.pop("podSpecOverrides", None) or ():
        if _for_nodes(row, notes):
            yield {}, {key: value for key, value in row.items() if key != "targetJobs"}, "2.1"
    for row in content.pop("runtimePatches", None) or ():
        inside = ((row.get("trainingRuntimeSpec") or {}).get("template") or {}).get("spec") or {}
        for job in inside.get("replicatedJobs") or ():
            if job.get("name") not in ("node", None):
                notes.append(Note("left out", f"a patch of {job.get('name')}: no pods that train"))
                continue
            template = (((job.get("template") or {}).get("spec") or {}).get("template")) or {}
            yield template.get("metadata") or {}, dict(template.get("spec") or {}), "2.2"


def _for_nodes(row: Object, notes: list[Note]) -> bool:
    names = [one.get("name") for one in row.get("targetJobs") or ()]
    if names and "node" not in names:
        notes.append(Note("left out", f"overrides for {', '.join(map(str, names))}: no pods that train"))
        return False
    return True


def _statefulset(one: Object, name: str) -> Group:
    content = _spec(one)
    template = dict(content.get("template") or {})
    notes = [Note("left out", "serviceName: a JobSet's Service names its pods")]
    claims = []
    for row in content.get("volumeClaimTemplates") or ():
        claims.append(
            {"name": _metadata(row).get("name"), "ephemeral": {"volumeClaimTemplate": {"spec": _spec(row)}}}
        )
        notes.append(
            Note("carried", f"volume {_metadata(row).get('name')}: a claim of each pod's, gone with the pod now")
        )
    if claims:
        pod = dict(_pod(template))
        template["spec"] = {**pod, "volumes": [*(pod.get("volumes") or ()), *claims]}
    was = "this was a StatefulSet: the object is a JobSet now, which ends when the program does"
    return Group(one, "jobset", template, content.get("replicas", 1), was, tuple(notes))


def _one_pod(one: Object, name: str) -> Group:
    was = "this was a Pod: the object is a JobSet of one pod now"
    return Group(one, "jobset", {"spec": _spec(one), "metadata": {
        "labels": {}, "annotations": _metadata(one).get("annotations") or {}}}, 1, was)  # fmt: skip


READERS: dict[str, Callable[[Object, str], Group]] = {
    "PyTorchJob": _pytorchjob, "HyperPodPyTorchJob": _pytorchjob, "JobSet": _jobset, "TrainJob": _trainjob,
    "Job": _batch, "MPIJob": _mpijob, "StatefulSet": _statefulset, "Pod": _one_pod,
}  # fmt: skip

# --- the job --------------------------------------------------------------------------------------

SHELLS = ("bash", "sh", "dash", "ash", "zsh")
AT_RUN_TIME = {  # what operators tell a pod, and its name here
    **dict.fromkeys(["RANK", "NODE_RANK", "PET_NODE_RANK", "VC_TASK_INDEX", "VK_TASK_INDEX", "JOB_COMPLETION_INDEX",
                     "OMPI_COMM_WORLD_RANK", "GROUP_RANK", "POD_INDEX"], "${NODE_RANK}"),
    **dict.fromkeys(["MASTER_ADDR", "PET_MASTER_ADDR", "VC_MASTER_HOSTS", "HEAD_NODE"], "${MASTER_ADDR}"),
    **dict.fromkeys(["MASTER_PORT", "PET_MASTER_PORT"], "${MASTER_PORT}"),
    "HOSTNAME": "${HOSTNAME}",
}  # fmt: skip
MPI_VALUES = {  # options of mpirun, and how many words follow
    **dict.fromkeys(["np", "n", "c", "N", "npernode", "ppn", "hostfile", "machinefile", "f", "H", "host", "hosts",
                     "map-by", "bind-to", "rank-by", "x", "wdir", "wd", "prefix", "output-filename", "timeout",
                     "bootstrap", "iface", "genvlist", "launcher", "plm_rsh_args", "tune", "am"], 1),
    **dict.fromkeys(["mca", "gmca", "genv", "env"], 2),
}  # fmt: skip


PREPARES = frozenset(
    """mkdir cp mv ln tar unzip wget curl aws gsutil gcloud azcopy rclone rsync huggingface-cli hf git touch chmod
    chown sysctl mount""".split()
)
NUMBERED = re.compile(  # hostname | ... of trainer-0: the number at its end
    r"\|\s*(awk\s+-F\s*['\"]?-['\"]?\s+'\{\s*print \$NF\s*\}'|rev\b.*\|\s*rev|grep -oE? '\[0-9\]([*+]|\\\+)\$'"
    r"|sed\s+(-E\s+)?['\"]s/\^?\.\*-//['\"])\s*\)$"
)
ITS_OWN = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HOSTNAME", "PS1", "DSLAUNCH",
           "SRUN_CPUS_PER_TASK", "LOCAL_RANK", "CUDA_LAUNCH_BLOCKING")  # fmt: skip
SSH = re.compile(r"\bsshd?\b|\.ssh\b|hostfile")
HEARTBEATS = re.compile(r"ft_|fault_tol|ignore_missing_fault")
HYPERPOD = re.compile(r"--(server[-_](host|port)|(pre|post)[-_]train[-_]script|inprocess[-_]restart)\b.*=")


class _Job(sbatch.Import):
    """A group of pods as a job file: its pod by `pods`, its command as if it were a script."""

    def __init__(self, group: Group, beside: Sequence[Object], name: str, environ: Mapping[str, str]) -> None:
        super().__init__(shell.read("", name), environ)
        self.group, self.beside = group, beside
        self.called = _called(group.document, name)
        self.fields = {"name": self.called}
        self.at_run_time: dict[str, str] = dict(AT_RUN_TIME)
        self.clone = ""
        self.told: dict[str, str] = {}  # variables of the program that starts ranks: as a shell has them
        metadata = _metadata(group.document)
        names = sorted({str(metadata["name"]) if metadata.get("name") else self.called, self.called})
        self.names = tuple(names)
        one = "|".join(map(re.escape, names))
        domain = r"(?:\.[A-Za-z0-9.-]*[A-Za-z0-9])?"
        self.pods = re.compile(rf"(?<![\w.-])(?:{one})(?:-[a-z][a-z0-9]*)*(?:-0)?-([0-9]+){domain}(?![\w-])")
        files = {
            str(_metadata(one).get("name")): {key: pods._text(text) for key, text in (one.get("data") or {}).items()}
            for one in beside
            if one["kind"] == "ConfigMap"
        }
        self.needs.nodes = self.count(group.nodes, ("resources", "nodes"), "the number of pods")
        labels = {key: pods._text(value) for key, value in (_metadata(group.document).get("labels") or {}).items()}
        self.pod = Pod(
            self, group.template, nodes=self.needs.nodes, own=labels, files=files, kind=group.kind,
            container=kinds.KINDS[group.kind].container, called=self.names,
            runtime=" ".join(str(group.options[key]) for key in ("runtime", "runtime_kind") if key in group.options),
        )  # fmt: skip

    def drop(self, path: Path) -> None:
        at: Any = self.fields
        for key in path[:-1]:
            at = at.get(key, {})
        at.pop(path[-1], None)

    def note(self, kind: Kind, message: str, line: int = 0) -> None:
        if not any(one.kind == kind and one.message == sbatch.MASK.sub("***", message) for one in self.notes):
            self.notes.append(Note(kind, sbatch.MASK.sub("***", message)))

    def count(self, value: Any, path: Path, what: str) -> int:
        number = whole(1 if value is None else value)
        if number is None:
            self.fill(path, f"{what} is {value} there, which only filling in the template tells")
        return number or 1

    def kubernetes(self, *path: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            self.put(("kubernetes", *path), value)

    def made(self) -> Imported:
        group = self.group
        if group.was:
            self.note("carried", group.was)
        self.notes += group.notes
        if group.kind != "pytorchjob":
            self.kubernetes("kind", value=group.kind)
        for key, value in group.options.items():
            self.kubernetes(key, value=value)
        self.identity()
        self.container()
        self.pod.read()
        if group.kind == "trainjob":
            self.unsaid()
        self.scheduling()
        for key, value in group.policy.items():
            if kinds.POLICIES[group.kind].get(key):
                self.note("left out", f"{key}: {kinds.POLICIES[group.kind][key]}")
            elif key != "suspend" or "queue" not in self.fields.get("kubernetes", {}):
                self.kubernetes("run_policy", key, value=value)
            else:
                self.note("left out", "suspend: Kueue suspends the job itself until it may start")
        for key, seconds in group.recover.items():
            self.put(("recover", key), seconds)
        if self.elastic:
            self.elastically()
        self.fabric, self.fabric_why = self.pod.fabric, ""
        self.script = shell.read(self.text(), self.script.name)
        self.besides()
        done = self.job()
        self.rest()
        retries = (_metadata(group.document).get("annotations") or {}).get(RETRIES)
        attempts = group.attempts if whole(retries) is None else whole(retries)
        if attempts != group.attempts:
            self.notes = [one for one in self.notes if not one.message.startswith("restartPolicy Never")]
            self.note("left out", "restartPolicy Never: the AppWrapper started the whole job again")
        if attempts is not None and group.kind != "trainjob" and not group.elastic:
            self.attempts(min(attempts, 100))
        self.unheard()
        return replace(done, job=_ordered(_holes(self.fields, self)), notes=tuple(self.notes), comments=self.comments)

    def attempts(self, asked: int) -> None:
        """They are counted beside the checkpoints, on a volume that outlives the pods; elsewhere none could be."""
        train = self.fields.get("train", {})
        place = train.get("checkpoint", {}).get("dir") or "checkpoints"
        folder = join(str(train.get("workdir", ".")), str(place))
        around = [
            row
            for row in self.fields.get("kubernetes", {}).get("volumes", [])
            if f"{folder}/".startswith(join(str(row.get("mount", "")), ""))
        ]
        volume: Object = max(around, key=lambda row: len(str(row["mount"])), default={})
        if asked == 0 or {"claim", "nfs", "csi", "host_path"} & set(volume):
            self.put(("recover", "attempts"), asked)
        elif self.group.kind == "jobset":
            self.kubernetes("run_policy", "max_restarts", value=asked)
            self.note("carried", f"{asked} restarts -> kubernetes.run_policy.max_restarts")
        else:
            rows = [row for row in self.fields.get("kubernetes", {}).get("volumes", []) if not row.get("read_only")
                    and {"claim", "nfs", "csi", "host_path"} & set(row)]  # fmt: skip
            place = f"{rows[0]['mount']}/{self.called}" if rows else "a directory of a volume"
            if asked == Recover().attempts:
                self.put(("recover", "attempts"), asked)
            self.fill(("train",), f"{asked} restarts: a job starts again from checkpoints on a volume: checkpoint: "
                      f"{{dir: {place}}} if the program saves there, and recover.attempts: {asked}")  # fmt: skip

    def missing(self) -> None:
        """Names in the program's line that neither the manifest nor dslaunch sets: the image may."""
        command = self.fields.get("train", {}).get("command") or []
        text = str(command[2]) if command[:2] == ["bash", "-c"] and len(command) > 2 else ""
        known = {*self.at_run_time, *self.pod.exports, *sbatch.SET_FOR_EVERY_JOB, *self.fields.get("env", {})}
        known |= {name.removeprefix("env.") for name in self.fields.get("sweep", {}).get("over", {})}
        known |= {one.name for one in self.script.assignments}
        for name in dict.fromkeys(re.findall(r"(?<!\\)\$\{([A-Za-z_]\w*)", text)):
            if name not in known and not name.startswith("DSLAUNCH_"):
                self.note("left out", f"${{{name}}}: the manifest does not set it; the image, or envFrom, may")

    def account(self) -> None:
        super().account()
        unused = tuple(f"{name}=" for name in self.group.known)  # told the script by ourselves
        started = ("mpirun ... ", "mpiexec ... ") if self.mpi else ()
        self.notes = [one for one in self.notes if not (one.message.startswith(unused) and "uses it" in one.message)
                      and not one.message.startswith(started)]  # fmt: skip

    def unheard(self) -> None:
        """What neither the job file nor a note speaks of is named, so that nothing is lost without a word."""
        told = _told(self.fields, [*(one.message for one in self.notes), *self.comments.values()])
        named = {*self.pod.gone, *(("Launcher",) if self.group.document["kind"] == "MPIJob" else ())}
        named |= {one.message.partition(":")[0] for one in self.notes if ": pods without GPUs" in one.message}
        lost: dict[str, list[str]] = {}
        for path, value in _said(self.group.document, skip=named):
            if not told(path, value):
                lost.setdefault(".".join(key for key in path if key), []).append(pods._text(value))
        for where, values in lost.items():
            what = ", ".join(" ".join(value.split()) for value in dict.fromkeys(values))
            self.note("left out", f"{where} {what}: no field of a job file says it")

    # -- what it is called, and where

    def identity(self) -> None:
        metadata = _metadata(self.group.document)
        self.kubernetes("namespace", value=metadata.get("namespace"))
        if metadata.get("generateName"):
            self.note("left out", f"generateName {metadata['generateName']}: dslaunch names the run {self.called}")
        labels = {key: pods._text(value) for key, value in (metadata.get("labels") or {}).items()}
        pod = _metadata(self.group.template).get("labels") or {}
        queue = labels.pop(QUEUE, None) or pod.get(QUEUE)
        priority = labels.pop(PRIORITY, None) or pod.get(PRIORITY)
        if queue:
            self.kubernetes("queue", "name", value=queue)
            self.note("carried", f"{QUEUE} {queue} -> kubernetes.queue")
            if priority:
                self.kubernetes("queue", "priority", value=priority)
        for key, value in labels.items():
            if pods.OPERATORS.fullmatch(key):
                self.note("left out", f"label {key}: dslaunch's own, or the operator's")
            elif takes(LabelKey, key) and takes(Label, value):
                self.kubernetes("labels", key, value=value)
            else:
                self.note("left out", f"label {key}: {value!r} is none that Kubernetes takes")
        for key, value in (metadata.get("annotations") or {}).items():
            if key == RETRIES:
                self.note("carried", f"retryLimit {value} of the AppWrapper: restarts of the job")
            elif key.startswith("workload.codeflare.dev"):
                self.note("left out", f"annotation {key} {value}: the AppWrapper's, and there is none now")
            elif key in ("scheduling.volcano.sh/queue-name", "volcano.sh/queue-name"):
                self.kubernetes("gang", value={"by": "volcano", "queue": value})
            elif key.startswith(("kubectl.kubernetes.io/", "dslaunch.dev/")) or self.group.was.startswith(
                "this was a P"
            ):
                continue
            else:
                self.kubernetes("annotations", key, value=pods._text(value))

    def container(self) -> None:
        box = self.pod.box
        image = box.pop("image", None)
        if image:
            self.put(("container", "image"), self.path(_word(str(image)), ("container",), 0))
        else:
            runtime = self.group.options.get("runtime", "torch-distributed")
            self.put(("container", "image"), "FILL_IN_IMAGE")
            self.fill(("container",), f"the manifest names no image; that of runtime {runtime}, or your own")
        if place := box.pop("workingDir", None):
            self.put(("train", "workdir"), place)
            self.note("carried", "workingDir -> train.workdir")

    def scheduling(self) -> None:
        given = {key: value for key, value in self.group.gang.items() if value is not None}
        scheduler = self.pod.scheduler
        if self.group.kind == "trainjob":
            if scheduler:
                self.note("left out", f"schedulerName {scheduler}: a TrainJob's runtime says that")
            return
        by = next((name for name, row in SCHEDULERS.items() if scheduler in (name, row.name, "scheduler-plugins")
                   and (scheduler != "scheduler-plugins" or name == "coscheduling")), "")  # fmt: skip
        earlier = self.fields.get("kubernetes", {}).get("gang")
        if by:
            given["by"] = by
            if scheduler not in ("", SCHEDULERS[by].name):
                given["scheduler"] = scheduler
        elif scheduler:
            given["scheduler"] = scheduler
        if isinstance(earlier, dict):
            given = {**earlier, **given}
        least = given.get("min_available")
        if least is not None and whole(least) == self.needs.nodes:
            del given["min_available"]
        if given.get("by") == "volcano":
            given.pop("timeout", None)
        if given and (given.get("by") or self.group.kind == "pytorchjob" or set(given) == {"scheduler"}):
            self.kubernetes("gang", value=given)
            what = ", ".join(f"{key} {value}" for key, value in given.items())
            what += f", schedulerName {scheduler}" if scheduler else ""
            self.note("carried", f"{what} -> kubernetes.gang")

    @property
    def elastic(self) -> Object | None:
        return self.group.elastic

    def elastically(self) -> None:
        given = dict(self.group.elastic or {})
        nodes = self.needs.nodes or 1
        least, most = whole(given.get("minReplicas")) or 1, whole(given.get("maxReplicas")) or nodes
        row: dict[str, Any] = {"min": least, "max": most}
        if whole(given.get("maxRestarts")):
            row["max_restarts"] = whole(given["maxRestarts"])
        backend = given.get("rdzvBackend") or "c10d"
        if backend != "c10d":
            row["backend"] = backend
            if given.get("rdzvHost"):
                row["endpoint"] = (
                    f"{given['rdzvHost']}:{given['rdzvPort']}" if given.get("rdzvPort") else given["rdzvHost"]
                )
        self.kubernetes("elastic", value=row)
        self.note(
            "carried", "elasticPolicy -> kubernetes.elastic; the program's own torchrun meets again at a change"
        )
        if given.get("metrics"):
            self.note("left out", "metrics of elasticPolicy: dslaunch asks for no autoscaler")
        if nodes > 1 and self.pod.gpus:
            self.put(("preflight", "run"), False)
            self.note("left out", "the preflight: it waits for all nodes, and an elastic job starts with fewer")

    def unsaid(self) -> None:
        """Of a pod's fields, what no TrainJob says: its runtime does."""
        options = self.fields.get("kubernetes", {})
        release = str(options.get("trainer", "2.2"))
        words = kinds.OVERRIDES if release < "2.2" else kinds.PATCHES if release < "2.3" else kinds.PATCHES_2_3
        for key, path in kinds.FIELDS.items():
            if key in words.pod | words.container or path[0] not in options:
                continue
            at = options if len(path) == 1 else options[path[0]]
            if path[-1] in at:
                at.pop(path[-1])
                self.note(
                    "left out", f"{key}: a TrainJob of Trainer {release} has no field for it, its runtime says it"
                )
                if at == {}:
                    options.pop(path[0], None)

    def besides(self) -> None:
        for one in self.beside:
            kind, called = one["kind"], _metadata(one).get("name", "")
            why = BESIDE.get(kind, "it is no part of the job, and stays yours")
            if kind == "Service" and _spec(one).get("clusterIP") != "None":
                why = "it stays yours: kubectl apply it before"
            if kind in REFUSED:
                why = "it is no part of the job, and stays yours"
            self.note("left out", f"{kind} {called}: {why}")

    def rest(self) -> None:
        """What no field says, in the object's own words."""
        rest, kind = self.pod.rest, self.group.kind
        if rest and kind == "trainjob":
            self.note("left out", f"{json.dumps(rest['spec'])}: a TrainJob's runtime says that")
        elif rest:
            self.put(("kubernetes", "pod_patch"), rest)
            self.note("kept", f"{', '.join(_paths(rest['spec']))} -> kubernetes.pod_patch")
        left = {key: value for key, value in self.group.rest.items() if value not in (None, [], {})}
        if left:
            self.put(("kubernetes", "patch"), {"spec": left})
            self.note("kept", f"{', '.join(left)} -> kubernetes.patch")

    # -- what it runs

    def text(self) -> str:
        """The pod's variables and its command, as a script."""
        group, pod = self.group, self.pod
        options = self.fields.get("kubernetes", {})
        told = {**options.get("env_fields", {}), **options.get("env_keys", {}), **self.fields.get("secrets", {})}
        self.at_run_time |= {name: f"${{{name}}}" for name in told}
        known = {*pod.exports, *told, *AT_RUN_TIME, *group.known}
        from_maps = bool(options.get("env_from") or options.get("secret_env_from"))
        lines = [f"{name}={shlex.quote(value)}" for name, value in group.known.items()]
        for path, content in pod.paths.items():
            if path.endswith((".json", ".yaml", ".yml")) and "END_OF_FILE" not in content:
                lines.append(f"cat > {shlex.quote(path)} <<'END_OF_FILE'\n{content.rstrip()}\nEND_OF_FILE")
        for name, value in pod.exports.items():
            earlier = set(REFERENCE.findall(value)) if from_maps else pod.earlier.get(name, set())
            lines.append(f"export {name}={_quoted(self.first(value, name), {*earlier, *group.known})}")
        words = list(group.command) or [*(pod.box.get("command") or ()), *(pod.box.get("args") or ())]
        words = [self.first(pods._text(word)) for word in words]
        if not words:
            return "\n".join(lines)
        body = self.body(words, known)
        words = [HOLE.sub(lambda hole: self.environ.get(hole[1], hole[0]), word) for word in words]
        if body is not None:
            return "\n".join([*lines, body])
        if basename(words[0]) == "tini" or words[0] in ("dumb-init",):
            words = [word for word in words[1:] if word not in ("--", "-g", "-s")]
        return "\n".join([*lines, " ".join(_quoted(word, known) for word in words)])

    def hosts(self, text: str, name: str = "") -> Iterator[re.Match[str]]:
        """The manifest's pods in a text: a-worker-0, a-0.svc and a-0:29500; a run that is called a-1 is none."""
        meant = re.search(r"(?i)addr|host|master|endpoint|head|server|rdzv", name)
        for match in self.pods.finditer(text):
            plain = match[0] in {f"{one}-{match[1]}" for one in self.names}
            if not plain or meant or text[match.end() :].startswith(":"):
                yield match

    def first(self, text: str, name: str = "") -> str:
        """A text with ${MASTER_ADDR} for the first pod, as the manifest's operator called it."""
        parts, at = [], 0
        for match in self.hosts(text, name):
            if int(match[1]) == 0:
                self.note("carried", f"{match[0]} -> MASTER_ADDR, as pods are called otherwise now")
                parts += [text[at : match.start()], "${MASTER_ADDR}"]
                at = match.end()
        return "".join([*parts, text[at:]])

    def stale(self, text: str, name: str) -> str:
        """Which pod or Service that is no more a variable names."""
        if match := next(self.hosts(text, name), None):
            return f"pod {match[0]}"
        for one in self.beside:
            name = str(_metadata(one).get("name"))
            own = _spec(one).get("clusterIP") == "None" if one["kind"] == "Service" else False
            if own and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])|\.{re.escape(name)}(?![\w-])", text):
                return f"Service {name}"
        return ""

    def body(self, words: Sequence[str], known: set[str]) -> str | None:
        """The script that a shell gets: behind -c, or in a ConfigMap beside the job."""
        if basename(words[0]) not in SHELLS:
            place = normpath(words[0])
            return self.pod.paths.get(place) if len(words) == 1 else None
        at = 1
        while at < len(words) and words[at].startswith("-"):
            flag = words[at]
            if "c" in flag[1:] and not flag.startswith("--"):
                at += 1
                while at < len(words) and words[at].startswith("-"):
                    at += 2 if words[at] == "-o" else 1
                if at >= len(words):
                    return None
                given = [_quoted(word, known) for word in words[at + 2 :]]
                return _with_arguments(_own_references(words[at], known), given)
            at += 2 if flag.endswith("o") else 1
        if at < len(words) and (content := self.pod.paths.get(normpath(words[at]))) is not None:
            self.note("carried", f"{words[at]}: read in the ConfigMap beside the job")
            return _with_arguments(content, [_quoted(word, known) for word in words[at + 1 :]])
        return None

    def environment(self, command: Command, start: Any) -> bool:
        words = [said(word) for word in command.argv]
        if basename(words[0]) == "ray":
            why, hint = REFUSED["RayJob"]
            raise UserError(Problem(f"{sbatch._short(command.text)}: {why}", hint, where=self.script.name))
        if words[:2] == ["git", "clone"] and self.cloned(command.argv[2:]):
            return True
        if words[:2] == ["git", "checkout"] and self.clone and len(words) > 2:
            self.put(("code", "ref"), words[-1])
            return True
        if words[0] == "cd" and len(words) > 1 and self.clone and not self.started:
            place = normpath(words[1])
            if place == self.clone or place.startswith(f"{self.clone}/") or not place.startswith("/"):
                below = place.removeprefix(self.clone).lstrip("/")
                earlier = self.fields.get("train", {}).get("workdir", "")
                self.put(("train", "workdir"), normpath(f"{'' if place.startswith(self.clone) else earlier}/{below}")
                         .lstrip("/") or ".", what=f"cd {place}")  # fmt: skip
                return True
        if basename(words[0]) in ("apt-get", "apt", "yum", "dnf", "apk", "microdnf", "ldconfig"):
            self.keep(command)
            if not self.started and self.group.kind != "trainjob":
                self.put(("kubernetes", "security", "root"), True)
                self.note("carried", f"{words[0]} is the root user's -> kubernetes.security.root")
            return True
        alone = not (command.redirects or command.pipeline or command.heredoc or command.inside or self.started)
        if basename(words[0]) in PREPARES and alone and not SSH.search(command.text):
            self.keep(command)  # a pod is new each time: what it prepares, it prepares again
            return True
        return super().environment(command, start)

    def cloned(self, words: Sequence[Word]) -> bool:
        plain, ref, at = [], "", 0
        while at < len(words):
            text = said(words[at])
            if text in ("-b", "--branch") and at + 1 < len(words):
                ref, at = said(words[at + 1]), at + 1
            elif text in ("--depth", "-c", "-j", "--config"):
                at += 1
            elif not text.startswith("-"):
                plain.append(text)
            at += 1
        if not plain or not plain[0].startswith("https://") or "@" in plain[0] or "$" in plain[0] or self.clone:
            return False
        self.clone = normpath(plain[1]) if len(plain) > 1 else basename(plain[0].rstrip("/")).removesuffix(".git")
        self.fields.get("train", {}).pop("workdir", None)
        self.put(("code", "clone"), plain[0])
        if ref:
            self.put(("code", "ref"), ref)
        text = " ".join(said(word) for word in words)
        self.note("carried", f"git clone {text} -> code.clone: an init container does it, workdir begins there")
        return True

    def peel(self, command: Command, around: Any) -> Any:
        argv = command.argv
        while len(argv) > 1 and said(argv[0]) in ("exec", "nohup"):
            argv = argv[1:]
        if argv and basename(said(argv[0])) == "ft_launcher":  # torchrun that looks at heartbeats
            argv = (programs.made("torchrun", argv[0]), *self.without_heartbeats(argv[1:]))
            command = replace(command, argv=argv)
        if argv and basename(said(argv[0])) == "hyperpodrun":  # torchrun, with options for Amazon's agent
            rest = [word for word in argv[1:] if not HYPERPOD.match(said(word))]
            command = replace(command, argv=(programs.made("torchrun", argv[0]), *rest))
            gone = [said(word) for word in argv[1:] if HYPERPOD.match(said(word))]
            self.note("carried", "hyperpodrun -> torchrun" + (f", without {' '.join(gone)}" if gone else ""))
        elif argv and basename(said(argv[0])) in ("mpirun", "mpiexec", "orterun"):
            command = replace(command, argv=self.without_mpi(argv))
        return super().peel(command, around)

    def without_heartbeats(self, words: Sequence[Word]) -> Iterator[Word]:
        """ft_launcher's options without what its agent is told: dslaunch looks at the steps."""
        rest = list(words)
        gone = []
        while rest and said(rest[0]).startswith("-"):
            option = rest.pop(0)
            name, equals, _ = said(option).lstrip("-").replace("-", "_").partition("=")
            takes_one = name in programs.TORCHRUN or HEARTBEATS.match(name)
            value = [rest.pop(0)] if takes_one and not equals and rest else []
            if HEARTBEATS.match(name):
                gone.append(" ".join(said(word) for word in (option, *value)))
            else:
                yield from (option, *value)
        if gone:
            self.note("left out", f"{', '.join(gone)}: recover.hang looks at the steps themselves")
        self.note("carried", "ft_launcher -> torchrun")
        yield from rest

    def without_mpi(self, argv: Sequence[Word]) -> tuple[Word, ...]:
        """mpirun -np 16 -x A=1 python train.py is torchrun train.py, with A among the variables."""
        rest, gone = list(argv[1:]), list[str]()
        while rest and said(rest[0]).startswith("-"):
            option = rest.pop(0)
            name = said(option).lstrip("-").partition("=")[0]
            follow = 0 if "=" in said(option) else MPI_VALUES.get(name, 0)
            values, rest = rest[:follow], rest[follow:]
            assigned = name in ("genv", "env") or (name == "x" and "=" in said(values[0] if values else option))
            gone += [] if assigned else [said(word) for word in (option, *values)]
            if name in ("x", "genv", "env") and values:
                key, equals, _ = said(values[0]).partition("=")
                if name == "x" and equals and takes(Variable, key):
                    self.variable(key, shell.cut(values[0], len(key) + 1), 0)
                elif name != "x" and len(values) == 2:
                    self.variable(key, values[1], 0)
        found = programs.read(rest)
        shelled = rest and basename(said(rest[0])) in SHELLS
        if not rest or (found is None and not shelled):
            what = said(rest[0]) if rest else "nothing"
            message = f"mpirun starts {what}, whose processes ask MPI who they are; ranks here are told by variables"
            raise UserError(Problem(message, "an MPIJob stays an MPIJob; or a Python program with torch.distributed",
                                    where=self.script.name))  # fmt: skip
        self.note("carried", "mpirun -> train.launcher: torchrun starts a rank for each GPU; what asked MPI or OMPI_ "
                  "variables for its rank has RANK, LOCAL_RANK and WORLD_SIZE")  # fmt: skip
        if gone:
            self.note("left out", f"{' '.join(gone)}: mpirun's own, and dslaunch starts the ranks")
        self.mpi = True
        return tuple(rest)

    mpi = False
    reaches = False  # pods have neither srun nor ssh to each other

    def refuse_mpi(self, name: str, command: Command) -> None:
        hint = "the program's own line with torchrun or deepspeed; RANK, LOCAL_RANK and WORLD_SIZE are set"
        message = f"{name} starts these ranks, and dslaunch cannot watch what another launcher starts on other nodes"
        raise UserError(Problem(message, hint, where=self.script.name))

    def service(self, start: Any, trainer: Any) -> None:
        text = sbatch._short(" ".join(said(word) for word in start.argv))
        self.note("left out", f"{text}: a program beside the training is a Deployment of its own on Kubernetes")

    def variable(self, name: str, word: Word, line: int) -> None:
        text = said(word)
        secret = (SECRET_NAME.regex.fullmatch(name) and not name.endswith("_DIR")) or SECRET_VALUE.regex.fullmatch(
            text
        )
        if secret and name not in self.fields.get("secrets", {}) and takes(Variable, name):
            if not text:
                return
            self.put(("secrets", name), {"secret": f"{self.called}-secrets", "key": name})
            create = f"kubectl create secret generic {self.called}-secrets --from-literal={name}=..."
            self.fill(("secrets", name), f"its value stood in the manifest and is not carried: {create}")
            return
        if self.opaque and self.handed_on(name, word):
            return
        if any(piece.name in self.at_run_time for piece in word.pieces) and name not in programs.RENDEZVOUS:
            whole_ = self.run_time(word, None)
            if self.opaque:
                self.told[name] = whole_
                self.note("carried", f"{name}: known in the pod alone -> train.command")
            elif "MASTER_" in whole_:
                self.env[name] = (self.pod.exports.get(name, said(word)), line)
                self.fill(("env", name), "it names pods, which are called otherwise now; the program has MASTER_ADDR")
            else:
                self.setup_line(f"export {name}={whole_}", line, name)
            return
        if word.value is not None and (what := self.stale(word.value, name)) and name not in programs.RENDEZVOUS:
            self.fill(("env", name), f"it names {what}, and pods are called otherwise now")
        super().variable(name, word, line)

    opaque = False  # a program whose command says nothing of ranks: it may read any variable

    def handed_on(self, name: str, word: Word) -> bool:
        """What dslaunch says itself, and the script that starts the ranks asks for by another name."""
        if name not in programs.RENDEZVOUS or name in ITS_OWN or name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            return False
        if name in TOLD:
            return False
        if name in NOT_YOURS:  # of ranks: a program that starts them gets it in its line
            self.told[name] = self.run_time(word, None)
            self.note("carried", f"{name} -> train.command: the program that starts the ranks reads it")
        elif word.value is not None and not self.stale(word.value, name):
            self.env[name] = (word.value, 0)
        elif any(piece.name in self.at_run_time for piece in word.pieces):
            self.told[name] = self.run_time(word, None)
            self.note("carried", f"{name}: known in the pod alone -> train.command")
        elif word.value is not None:
            self.env[name] = (word.value, 0)
            self.fill(("env", name), f"it names {self.stale(word.value, name)}, and pods are called otherwise now")
        else:
            return False
        return True

    def trainer(self) -> Any:
        found = super().trainer()
        self.opaque = found is not None and programs.read(found.argv) is None
        if self.opaque and self.group.document["kind"] == "PyTorchJob" and not self.elastic:
            self.told["RANK"] = '"${NODE_RANK}"'
            if size := self.group.known.get("WORLD_SIZE"):
                self.told["WORLD_SIZE"] = size
            listed = " and ".join(self.told)
            self.note("carried", f"{listed}: of the operator, which means pods by them -> train.command")
        return found

    def keep(self, command: Command) -> None:
        """`source` in a condition is done where its file is; everything else in one is left out."""
        inside = [word for word in command.inside if word in ("for", "while", "case", "if")]
        name = said(command.argv[0])
        sources = name in ("source", ".") and len(command.argv) == 2
        if set(inside) == {"if"} and sources and not self.started:
            word = command.argv[1]
            file = f'"{sbatch._shell_text(word)}"' if word.value is None else shlex.quote(word.value)
            line = f"if [ -e {file} ]; then source {file}; fi"
            if line not in self.setup:
                self.setup.append(line)
                self.note("kept", f"{sbatch._short(command.text)} -> setup: its condition is that the file is there")
            return
        super().keep(command)

    def plain(self, word: Word) -> Any:
        for piece in word.pieces:
            if re.fullmatch(r"V[CK]_\w+_HOSTS", piece.name):
                self.fill(("train",), f"{piece.name} is Volcano's list of hosts: MASTER_ADDR is the first")
                self.at_run_time[piece.name] = "${MASTER_ADDR}"
        if any(piece.name in self.at_run_time for piece in word.pieces):
            return None
        return super().plain(word)

    def expression(self, piece: Any, *, port: bool) -> str:
        if piece.meaning == "this-node" and "|" in piece.text:
            if NUMBERED.search(piece.text):
                self.note("carried", f"{piece.text}: which pod it is -> NODE_RANK")
                return "${NODE_RANK}"
            return str(piece.text)
        known = self.at_run_time.get(piece.name)
        return known if known else super().expression(piece, port=port)

    def program(self, start: Any) -> None:
        if self.elastic and programs.read(start.argv):
            for name, word in start.own:
                self.variable(name, word, 0)
            self.put(("train", "launcher"), "node")
            self.put(("train", "config_flag"), "none")
            self.put(("train", "command"), self.command(replace(start, own=())))
            return
        found = programs.read(start.argv)
        if self.mpi and found and found.launcher == "python" and found.target and found.kind != "command":
            near = start.argv[0]
            module = (programs.made("-m", near),) if found.kind == "module" else ()
            argv = (programs.made("torchrun", near), *module, found.target, *found.arguments)
            start = replace(start, argv=argv)
        super().program(start)
        train = self.fields["train"]
        if self.told and "command" in train:
            self.fields["train"]["command"] = _with_variables(train["command"], self.told)
        if self.clone and isinstance(train.get("script"), str):
            train["script"] = train["script"].removeprefix(f"{self.clone}/")

    # -- how much

    def gpus(self, start: Any, found: Any) -> int | None:
        return self.pod.gpus or (found.per_node if found and self.hole else None) or None

    @property
    def hole(self) -> bool:
        return ("resources", "gpus_per_node") in self.comments

    def resources(self, start: Any) -> None:
        found = programs.read(start.argv) if start else None
        self.put(("resources", "nodes"), self.needs.nodes or 1)
        gpus = self.pod.gpus
        told = whole(self.group.per_node) or (found.per_node if found else None)
        if gpus:
            if self.hole and told:
                gpus = told
                self.comments.pop(("resources", "gpus_per_node"))
                self.notes = [one for one in self.notes if not one.message.startswith("resources.gpus_per_node")]
            self.put(("resources", "gpus_per_node"), gpus)
            if told and told != gpus:
                self.note("left out", f"{told} processes on a node of {gpus} GPUs: one for each GPU here")
            for one in self.group.notes:
                if one.kind == "fill in" and one.message.startswith(UNEVEN):
                    self.fill(("resources", "gpus_per_node"), one.message.removeprefix(UNEVEN))
        elif told and told > 1:
            self.put(("resources", "processes_per_node"), told)


def _with_variables(command: Sequence[Any], told: Mapping[str, str]) -> list[Any]:
    """["sh", "run.sh"] with NODES: 4 is ["env", "NODES=4", "sh", "run.sh"]; in a line of shell what it expands."""
    rows = [f"{name}={text}" for name, text in told.items()]
    rank = '"${NODE_RANK}"'
    plain = all(text == rank or not re.search(r"[$\"'\\`]", text) for text in told.values())
    if plain and list(command[:2]) != ["bash", "-c"]:
        typed = [{"node": "rank", "prepend": f"{name}="} if text == rank else f"{name}={text}" for name, text in
                 told.items()]  # fmt: skip
        return ["env", *typed, *command]
    if list(command[:2]) == ["bash", "-c"] and len(command) == 3 and isinstance(command[2], str):
        line = command[2].removeprefix("exec ").removeprefix("env ")
        return ["bash", "-c", f"exec env {' '.join(rows)} {line}"]
    words = [_of_environment(word) if isinstance(word, dict) else shlex.quote(str(word)) for word in command]
    return ["bash", "-c", f"exec env {' '.join([*rows, *words])}"]


def _of_environment(word: Mapping[str, str]) -> str:
    return f'"{word.get("prepend", "")}${{{word["env"]}}}{word.get("append", "")}"'


# What only ties an object together, or is so in whatever dslaunch renders.
TIES = re.compile(
    r".*\.(containers|initContainers|volumes|volumeMounts|volumeDevices|resourceClaims|claims|ports|tasks|replicatedJobs"
    r"|replicaSpecs|targetJobs|components)\.name|.*\.replicatedJobs\.replicas|.*\.completionMode|.*\.emptyDir\.medium"
    r"|.*\.mountPath /dev/shm|.*\.hostPath\.path /dev/shm|.*\.dnsPolicy ClusterFirst(WithHostNet)?"
    r"|.*\.capabilities\.drop ALL|.*\.accessModes ReadWriteOnce|.*/last-applied-configuration.*"
    r"|.*\.runtimePatches\.manager|.*\.runtimeRef\.(name torch-distributed|kind ClusterTrainingRuntime|apiGroup)"
    r"|.*\.(replicas|parallelism|completions|numNodes|divisor)( .*)?|metadata\.(name|generateName|creationTimestamp)"
    r"|metadata\.(uid|resourceVersion|generation|selfLink|managedFields.*|finalizers|ownerReferences.*)"
)
UNREAD = ("command", "args", "apiVersion", "kind", "status")
BROAD = frozenset(  # keys that stand in many a note about something else
    """spec template metadata containers initContainers name value env valueFrom resources limits requests labels
    annotations volumes volumeMounts image key path Master Worker""".split()
)


def _said(value: Any, path: tuple[str, ...] = (), *, skip: Collection[str] = ()
          ) -> Iterator[tuple[tuple[str, ...], Any]]:  # fmt: skip
    """Leaves of an object that say something; commands are read as scripts, and a secret is nobody's to repeat."""
    if isinstance(value, dict):
        if str(value.get("name")) in skip and {"image", "template"} & set(value):
            return
        variable = path[-1:] == ("env",) and value.get("name")
        path = (*path, str(variable)) if variable else path
        named = SECRET_NAME.regex.fullmatch(str(value.get("name", ""))) if "value" in value else None
        for key, child in value.items():
            if key in UNREAD or key in skip or (named and key == "value"):
                continue
            yield from _said(child, (*path, str(key)), skip=skip)
    elif isinstance(value, list):
        for child in value:
            yield from _said(child, path, skip=skip)
    elif value not in (None, False, "", 0) and not SECRET_VALUE.regex.fullmatch(str(value)):
        yield path, value


def _told(fields: Any, notes: Sequence[str]) -> Callable[[tuple[str, ...], Any], bool]:
    """Whether a leaf of the manifest is spoken of: by its value, or by its key in a note."""
    words: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                words.append(str(key))
                walk(child)
        elif isinstance(value, (list, tuple)):
            for child in value:
                walk(child)
        else:
            words.append(pods._text(value))

    walk(fields)
    spoken = "\n".join([*words, *notes])
    noted = "\n".join(notes)

    def told(path: tuple[str, ...], value: Any) -> bool:
        text, where = HOLE.sub(r"\1", pods._text(value)).strip(), ".".join(path)
        if TIES.fullmatch(where) or TIES.fullmatch(f"{where} {text}"):
            return True
        inner = path[len(path) - path[::-1].index("template") :] if "template" in path else path
        keys = [key for key in inner if key not in BROAD]
        if any(_word_in(key, noted) for key in keys):
            return True
        if value is True:
            return _word_in(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path[-1]).lower(), spoken)
        size = pods.memory(text)
        mode = f"0{value:o}" if path[-1] == "defaultMode" and isinstance(value, int) else ""
        return any(_word_in(word, spoken) for word in (text, size, mode) if word)

    return told


def _word_in(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text) is not None


def _called(document: Object, name: str) -> str:
    metadata = _metadata(document)
    text = str(metadata.get("name") or metadata.get("generateName") or basename(name).partition(".")[0])
    tame = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "imported"
    return f"job-{tame}"[:40].rstrip("-") if tame[0].isdigit() else tame


def _word(text: str) -> Word:
    """A text in which ${NAME} is a variable's."""
    if re.search(r"[\"`\\\s]", text) or "$(" in text:
        return Word(text, (shell.Piece(text),), 0, 0)
    return shell.read(f'x "{text}"').commands[0].argv[1]


REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


def _quoted(text: str, known: set[str]) -> str:
    """A word of a pod's command for a shell: $(NAME) is Kubernetes' own, ${NAME} a hole that envsubst fills."""
    if "$" not in text:
        return shlex.quote(text)
    parts, at = [], 0
    for match in re.finditer(r"\$\$|\$\(([A-Za-z_]\w*)\)|\$\{([A-Za-z_]\w*)\}|\$([A-Z_][A-Z0-9_]*)", text):
        parts.append(re.sub(r'([\\"$`])', r"\\\1", text[at : match.start()]))
        at = match.end()
        name = match[1] or match[2] or match[3]
        if name and (match[1] is None or name in known):
            parts.append(f"${{{name}}}")
        else:
            parts.append("\\$" if match[0] == "$$" else "\\" + match[0])
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", text[at:]) + '"'


def _with_arguments(text: str, arguments: Sequence[str]) -> str:
    """A script with what it was told behind its name: "$@" and $1, but not awk's."""
    lines = []
    for line in text.splitlines():
        if "awk" not in line:
            line = re.sub(r"\"\$\{?[@*]\}?\"|\$\{?[@*]\}?", lambda _: " ".join(arguments), line)
            for number, word in enumerate(arguments[:9], 1):
                line = re.sub(rf"\"\$\{{?{number}\}}?\"|\$\{{?{number}\}}?", lambda _, word=word: word, line)  # type: ignore[misc]
        lines.append(line)
    return "\n".join(lines)


def _own_references(text: str, known: set[str]) -> str:
    """A script with $(NAME) of Kubernetes' as the shell's ${NAME}; $(hostname) stays."""

    def put(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return f"${{{match[1]}}}" if match[1] in known else match[0]

    return REFERENCE.sub(put, text)


def _paths(value: Any) -> list[str]:
    """What stands in a patch, as a person calls it: volumeMounts of the container."""
    found = []
    for key, child in value.items():
        if key in ("containers", "initContainers"):
            found += [f"{name} of {row['name']}" for row in child for name in row if name != "name"]
        else:
            found.append(str(key))
    return found


def _holes(value: Any, job: _Job, path: Path = ()) -> Any:
    """Texts that envsubst has yet to fill in, as {env: NAME}; commands and variables have a shell of their own."""
    if isinstance(value, dict):
        left = ("patch", "pod_patch", "sidecars", "pod_env")  # they have a shell of their own, or Kubernetes' rules
        if path in (("train",), ("env",), *(("kubernetes", key) for key in left)) or (path and reference(value)):
            return value
        return {key: _holes(child, job, (*path, key)) for key, child in value.items()}
    if isinstance(value, list):
        if path in (("setup",), ("kubernetes", "sidecars")):
            return value
        return [_holes(child, job, (*path, index)) for index, child in enumerate(value)]
    if isinstance(value, str) and "$" in value:
        match = re.fullmatch(r"([^$]*)\$\{?([A-Za-z_]\w*)\}?([^$]*)", value)
        if match:
            around = {"prepend": match[1], "append": match[3]}
            return {"env": match[2], **{side: text for side, text in around.items() if text}}
        job.fill(path, f"{value} is known to whoever fills in the template")
        return re.sub(r"\$\{?(\w+)\}?", "fill-in", value)
    return value


def _ordered(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in ({}, [], None)}
