"""Kubernetes manifests of others as job files: PyTorchJobs, TrainJobs, JobSets, and what is used in their place.

A template's pod is read by `pods`; its command goes through the reader of shell scripts, behind its variables, as if
it were a script. What dslaunch does itself is left out and said; what no field says goes into kubernetes.patch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from posixpath import join
from typing import Any

from launcher import shell, spec
from launcher.backends import kubernetes
from launcher.backends.kubernetes import DIGEST, kinds, patch
from launcher.backends.kubernetes.queueing import PRIORITY, QUEUE, SCHEDULERS
from launcher.bundle import ASKED, Tree
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, Note, pods, programs, reference, sbatch
from launcher.imports.draft import without_empty
from launcher.imports.entrypoint import Entrypoint
from launcher.imports.groups import BESIDE, REFUSED, RETRIES, UNEVEN, one_job, tier
from launcher.imports.objects import HOLE, documents, filled, metadata_of, spec_of
from launcher.imports.pods import Object, takes, whole
from launcher.shell import Word
from launcher.spec.check import SECRET_NAME, SECRET_VALUE
from launcher.spec.machines import Recover
from launcher.spec.words import Label, LabelKey

MANIFEST = re.compile(r"^[ \t]*[\"']?apiVersion[\"']?[ \t]*:", re.MULTILINE)


def recognised(text: str, *, name: str) -> bool:
    """Whether a file is a manifest, or what becomes one: by its content, as standard input has no name."""
    if text.startswith("#!") or re.search(r"^#SBATCH\b", text, re.MULTILINE):
        return False
    return bool(MANIFEST.search(text)) or name.endswith((".yaml", ".yml", ".json", ".tpl"))


def read(text: str, *, name: str, environ: Mapping[str, str] | None = None) -> Imported:
    """The job of a file of manifests. Raises UserError for what is no job, with what to do instead."""
    found = documents(text, name=name)
    own = _ours(found, name)
    if own is not None:
        return own
    from_shell: list[str] = []
    found = [filled(one, environ or {}, from_shell) for one in found]
    group, beside = one_job(found, name)
    job = _Job(group, beside, name, environ or {})
    for variable in dict.fromkeys(from_shell):
        job.note("carried", f"${variable}, as the environment says now")
    return job.made()


# --- of our own making ----------------------------------------------------------------------------


def _ours(found: Sequence[Object], name: str) -> Imported | None:
    """Manifests that dslaunch rendered: job.json travels in them, and what was changed since becomes the patch."""
    made = [one for one in found if one.get("kind") in kinds.BY_KIND
            and (metadata_of(one).get("labels") or {}).get("app.kubernetes.io/managed-by") == "dslaunch"]  # fmt: skip
    if not made:
        return None
    if len(made) > 1:
        message = f"dslaunch rendered these {len(made)} jobs: the points of a sweep"
        raise UserError(Problem(message, "its job.yaml, or one of them with its ConfigMaps", where=name))
    told = [
        one["data"][ASKED] for one in found if one.get("kind") == "ConfigMap" and ASKED in (one.get("data") or {})
    ]
    if not told:
        called = metadata_of(made[0]).get("name")
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
    digest = (metadata_of(now).get("annotations") or {}).get(DIGEST)
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


# --- the job --------------------------------------------------------------------------------------


class _Job(Entrypoint):
    """A group of pods as a job file: its pod by `pods`, its command as if it were a script."""

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
        retries = (metadata_of(group.document).get("annotations") or {}).get(RETRIES)
        attempts = group.attempts if whole(retries) is None else whole(retries)
        if attempts != group.attempts:
            self.notes = [one for one in self.notes if not one.message.startswith("restartPolicy Never")]
            self.note("left out", "restartPolicy Never: the AppWrapper started the whole job again")
        if attempts is not None and group.kind != "trainjob" and not group.elastic:
            self.attempts(min(attempts, 100))
        self.unheard()
        fields = without_empty(_holes(self.fields, self))
        return replace(done, job=fields, notes=tuple(self.notes), comments=self.comments)

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
        metadata = metadata_of(self.group.document)
        self.kubernetes("namespace", value=metadata.get("namespace"))
        if metadata.get("generateName"):
            self.note("left out", f"generateName {metadata['generateName']}: dslaunch names the run {self.called}")
        labels = {key: pods._text(value) for key, value in (metadata.get("labels") or {}).items()}
        pod = metadata_of(self.group.template).get("labels") or {}
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
            elif key.startswith("leaderworkerset.sigs.k8s.io/"):
                if not key.endswith("/exclusive-topology"):
                    self.note("left out", f"annotation {key} {value}: the LeaderWorkerSet's, and there is none now")
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
            for one in self.beside:
                if one["kind"] == "PodGroup" and isinstance(spec_of(one), dict):
                    given = {**self.gathered(spec_of(one)), **given}
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

    def gathered(self, group: Object) -> Object:
        """What a PodGroup beside the job says, of which dslaunch makes its own."""
        found = {"queue": group.get("queue"), "min_available": group.get("minMember"),
                 "timeout": group.get("scheduleTimeoutSeconds"),
                 **tier(group.get("networkTopology"))}  # fmt: skip
        if (name := group.get("priorityClassName")) and not self.fields["kubernetes"].get("priority_class"):
            self.kubernetes("priority_class", value=name)
            self.note("carried", "priorityClassName of the PodGroup -> kubernetes.priority_class")
        if group.get("minResources"):
            what = f"minResources {json.dumps(group['minResources'])}"
            self.note("left out", f"{what} of the PodGroup: what its pods ask for")
        return {key: value for key, value in found.items() if value is not None}

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
        if scale := _shares(given.get("metrics")):
            row["autoscale"] = scale
        elif given.get("metrics"):
            what = f"metrics of elasticPolicy {json.dumps(given['metrics'])}"
            self.note("left out", f"{what}: a share of cpu or memory is what elastic.autoscale says")
        self.kubernetes("elastic", value=row)
        self.note(
            "carried", "elasticPolicy -> kubernetes.elastic; the program's own torchrun meets again at a change"
        )
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
            kind, called = one["kind"], metadata_of(one).get("name", "")
            why = BESIDE.get(kind, "it is no part of the job, and stays yours")
            if kind == "Service" and spec_of(one).get("clusterIP") != "None":
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


def _shares(metrics: Any) -> dict[str, int]:
    """{"cpu": 90} of an autoscaler's metrics; {} where one of them is of another kind."""
    found: dict[str, int] = {}
    for one in metrics if isinstance(metrics, list) else ():
        resource = one.get("resource") if isinstance(one, dict) else None
        target = resource.get("target") if isinstance(resource, dict) else None
        percent = whole(target.get("averageUtilization")) if isinstance(target, dict) else None
        name = resource.get("name") if isinstance(resource, dict) and one.get("type") == "Resource" else None
        if name not in ("cpu", "memory") or not percent:
            return {}
        found[str(name)] = percent
    return found


# What only ties an object together, or is so in whatever dslaunch renders.
TIES = re.compile(
    r".*\.(containers|initContainers|volumes|volumeMounts|volumeDevices|resourceClaims|claims|ports|tasks|replicatedJobs"
    r"|replicaSpecs|targetJobs|components)\.name|.*\.replicatedJobs\.replicas|.*\.completionMode|.*\.emptyDir\.medium"
    r"|.*\.mountPath /dev/shm|.*\.hostPath\.path /dev/shm|.*\.dnsPolicy ClusterFirst(WithHostNet)?"
    r"|.*\.capabilities\.drop ALL|.*\.accessModes ReadWriteOnce|.*/last-applied-configuration.*"
    r"|.*\.networkTopology\.mode hard|.*\.runtimePatches\.manager"
    r"|.*\.runtimeRef\.(name torch-distributed|kind ClusterTrainingRuntime|apiGroup)"
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
        if str(value.get("name")) in skip and ({"image", "template"} & set(value) or path[-1:] == ("volumes",)):
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


def _word(text: str) -> Word:
    """A text in which ${NAME} is a variable's."""
    if re.search(r"[\"`\\\s]", text) or "$(" in text:
        return Word(text, (shell.Piece(text),), 0, 0)
    return shell.read(f'x "{text}"').commands[0].argv[1]


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
