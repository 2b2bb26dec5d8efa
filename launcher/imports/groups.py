"""The group of pods that trains, of each kind of object that starts one: PyTorchJob, TrainJob, JobSet and others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.backends.kubernetes import kinds
from launcher.errors import Problem, UserError
from launcher.imports import Note, pods
from launcher.imports.objects import metadata_of, spec_of
from launcher.imports.pods import Object, whole

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
    **dict.fromkeys(["TrainingWorkload", "DistributedWorkload", "InteractiveWorkload", "RunaiJob"], (
        "Run:ai's own, of which its control plane makes the pods",
        "the PyTorchJob that it made: kubectl get pytorchjobs -o yaml")),
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


def one_job(found: Sequence[Object], name: str) -> tuple[Group, list[Object]]:
    """The one job among the documents, and the others."""
    jobs = [one for one in found if one["kind"] in READERS and _is_job(one)]
    if len(jobs) > 1:
        strong = [one for one in jobs if one["kind"] not in ("StatefulSet", "Pod", "Job")]
        gpus = [one for one in jobs if re.search(r"/gpu['\"]?: ", json.dumps(one))]
        jobs = strong if len(strong) == 1 else gpus if len(gpus) == 1 else jobs
    if len(jobs) > 1:
        listed = ", ".join(f"{one['kind']} {metadata_of(one).get('name')}" for one in jobs[:4])
        message = f"{len(jobs)} jobs in one file ({listed}), and a job file starts one"
        raise UserError(Problem(message, "a file for each, imported alone", where=name))
    if not jobs:
        for one in found:
            if one["kind"] in REFUSED:
                why, hint = REFUSED[one["kind"]]
                called = metadata_of(one).get("name") or metadata_of(one).get("generateName") or ""
                raise UserError(Problem(f"{one['kind']} {called}".strip() + f": {why}", hint, where=name))
        listed = ", ".join(dict.fromkeys(one["kind"] for one in found))
        message = f"no job that trains is in it: {listed}"
        raise UserError(Problem(message, "a PyTorchJob, TrainJob, JobSet, Job, MPIJob or Volcano Job", where=name))
    beside = [one for one in found if one is not jobs[0]]
    job, told = _with_runtime(jobs[0], beside) if jobs[0]["kind"] == "TrainJob" else (jobs[0], [])
    group = READERS[job["kind"]](job, name)
    return replace(group, notes=(*told, *group.notes)), beside


SERVES = re.compile(r"\b(vllm|sglang|lmdeploy|tritonserver|trtllm-serve|text-generation-\w+|ray)\b")
TRAINS = re.compile(r"\b(torchrun|torch\.distributed|deepspeed|accelerate|composer|\w*train\w*\.py)\b")


def _is_job(one: Object) -> bool:
    if one["kind"] == "LeaderWorkerSet":
        rows = [_pod(template) for template in _leader_and_worker(one)]
        text = " ".join(str(word) for row in rows for word in _words(pods.trains(row)))
        return bool(TRAINS.search(text)) and not SERVES.search(text)
    return one["kind"] != "StatefulSet" or bool(pods.gpus(pods.trains(_pod(spec_of(one).get("template"))))[1])


def _words(box: Object) -> list[Any]:
    return [*(box.get("command") or ()), *(box.get("args") or ())]


def _pod(template: Any) -> Object:
    return ((template or {}).get("spec") or {}) if isinstance(template, dict) else {}


def _sum(counts: Sequence[Any]) -> Any:
    """2 and 1 are 3; with a hole among them, the hole is."""
    numbers = [whole(1 if count is None else count) for count in counts]
    return next((count for count, number in zip(counts, numbers, strict=True) if number is None), sum(
        number for number in numbers if number is not None))  # fmt: skip


LIMITS = ("backoffLimit", "jobMaxRetryCount", "maxRetry", "maxRestarts")
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
# Of a Job: what becomes of its pods one by one.
SINGLY = ("backoffLimit", *"podFailurePolicy backoffLimitPerIndex maxFailedIndexes successPolicy "
          "podReplacementPolicy".split())  # fmt: skip
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
    content = spec_of(one)
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
    template = rows[chosen[-1]]["template"]
    if wanted.get("priorityClass") and not _pod(template).get("priorityClassName"):
        template = {**template, "spec": {**_pod(template), "priorityClassName": wanted["priorityClass"]}}
        notes.append(Note("carried", "priorityClass of the schedulingPolicy: of the group, and of its pods now"))
    if wanted.get("minResources"):
        what = f"minResources {json.dumps(wanted['minResources'])}"
        notes.append(Note("left out", f"{what}: what min_available pods ask for, which the operator adds up"))
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
        one, "pytorchjob", template, nodes, was, (*notes, *told), per_node,
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
    content = dict(spec_of(one))
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
    for key in SINGLY:
        if work.get(key) is not None and (key != "backoffLimit" or work[key]):
            what = f"{key} {json.dumps(work[key])} of {names[chosen[-1]]}"
            notes.append(Note("left out", f"{what}: recover.attempts starts all pods again"))
    template = dict(work.get("template") or {})
    around = metadata_of(jobs[chosen[-1]].get("template") or {}).get("annotations") or {}
    own = {key: pods._text(value) for key, value in around.items() if key.startswith("alpha.jobset.sigs.k8s.io/")}
    annotations = {**{key: value for key, value in around.items() if key not in own},
                   **(metadata_of(template).get("annotations") or {})}  # fmt: skip
    if annotations:
        template["metadata"] = {**metadata_of(template), "annotations": annotations}
    told_too = {key: failure[key] for key in ("rules", "restartStrategy") if failure.get(key)}
    if told_too:
        why = "dslaunch knows which end of a pod starts the gang again"
        notes.append(Note("left out", f"failurePolicy {json.dumps(told_too)}: {why}"))
    after = work.get("ttlSecondsAfterFinished")
    if after is not None and "ttl" not in policy:
        policy["ttl"] = after
    return Group(
        one, "jobset", template, _sum(counts), "", (*notes, *told), command=_starter(works, chosen),
        policy=policy, attempts=attempts, rest=content, options={"annotations": own} if own else {},
    )  # fmt: skip


def _batch(one: Object, name: str) -> Group:
    if str(one["apiVersion"]).startswith("batch.volcano"):
        return _volcano(one, name)
    content = spec_of(one)
    nodes = content.get("completions") or content.get("parallelism") or 1
    notes = []
    if content.get("completionMode") != "Indexed" and (whole(nodes) or 2) > 1:
        notes.append(Note("carried", "its pods had no index: completionMode Indexed, which rank each is"))
    for key in SINGLY[1:]:
        if content.get(key) is not None:
            why = "a pod that ends badly ends the Job, and recover.attempts starts again"
            notes.append(Note("left out", f"{key} {json.dumps(content[key])}: {why}"))
    policy, attempts, told = _policy({key: value for key, value in content.items() if key != "cleanPodPolicy"})
    was = "this was a Job: the object is a JobSet with that one Job now, which starts all pods again"
    return Group(one, "jobset", content.get("template") or {}, nodes, was, (*notes, *told), policy=policy,
                 attempts=attempts)  # fmt: skip


def tier(topology: Any) -> Object:
    """Of Volcano's networkTopology; without a mode it is hard."""
    if not isinstance(topology, dict):
        return {}
    level = whole(topology.get("highestTierAllowed"))
    soft = {"tier_required": False} if topology.get("mode") == "soft" else {}
    return {"tier": level, **soft} if level else {}


def _volcano(one: Object, name: str) -> Group:
    content = spec_of(one)
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
    gang = {"by": "volcano", "queue": content.get("queue"), "min_available": least if least and fewer else None,
            **tier(content.get("networkTopology"))}  # fmt: skip
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
        elif isinstance(claim := row.get("volumeClaim"), dict):
            shared = (whole(nodes) or 1) > 1 and claim.get("accessModes") not in (None, ["ReadWriteOnce"])
            source: Object = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
            what = f"volume at {row.get('mountPath')}: a claim that Volcano makes for the job"
            if shared:
                called = f"{metadata_of(one).get('name', 'job')}-volume-{index}"
                source = {"persistentVolumeClaim": {"claimName": called}}
                told_ = "a claim of that name is yours to make before"
            else:
                told_ = "each pod has one of its own now, which goes with it"
            notes.append(Note("carried", f"{what}; {told_}"))
            extra.append({"name": f"job-volume-{index}", **source})
            mounts.append({"name": f"job-volume-{index}", "mountPath": row.get("mountPath")})
        else:
            notes.append(Note("left out", f"volume at {row.get('mountPath')}: it names no claim"))
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
    content = spec_of(one)
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


TRAINER = ("image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode")  # what fields say


def _trainjob(one: Object, name: str) -> Group:
    content = dict(spec_of(one))
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
    given = _below(content, "initializer")
    for theirs, ours in (("dataset", "dataset"), ("model", "weights")):
        step = _below(given, theirs)
        plain = not set(step) - {"storageUri", "secretRef", "env"} and all(
            isinstance(row, dict) and set(row) == {"name", "value"} for row in step.get("env") or ()
        )
        if step.get("storageUri") and plain:
            row = {"uri": step["storageUri"], "secret": _below(step, "secretRef").get("name"),
                   "env": {str(one["name"]): pods._text(one["value"]) for one in step.get("env") or ()}}  # fmt: skip
            options[ours] = {key: value for key, value in row.items() if value}
            notes.append(Note("carried", f"initializer.{theirs} -> kubernetes.{ours}"))
            given = {key: value for key, value in given.items() if key != theirs}
    if given:
        content["initializer"] = given
    else:
        content.pop("initializer", None)
    more = {key: value for key, value in trainer.items() if key not in TRAINER}
    if more:
        content["trainer"] = more
    if group := content.pop("podGroupPolicy", None):
        why = "a TrainJob has no such field, and the API server drops it: its runtime's has; or kubernetes.queue"
        notes.append(Note("left out", f"podGroupPolicy {json.dumps(group)}: {why}"))
    if content.pop("modelConfig", None) or content.pop("datasetConfig", None):
        notes.append(Note("left out", "modelConfig, datasetConfig: Trainer before 2.0; `stage:` copies data"))
    template["spec"] = pod
    known = {"PET_NNODES": str(trainer.get("numNodes", 1))}
    return Group(
        one, "trainjob", template, trainer.get("numNodes", 1), "", (*notes, *told), trainer.get("numProcPerNode"),
        policy=policy, options=options, known=known, rest=content,
    )  # fmt: skip


def _below(value: Any, *path: str) -> Object:
    """The mapping at a path; {} where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _with_runtime(one: Object, beside: Sequence[Object]) -> tuple[Object, list[Note]]:
    """A TrainJob with what its runtime says in its place, where that lies beside it: image, program, amounts."""
    content = dict(spec_of(one))
    called = (content.get("runtimeRef") or {}).get("name")
    runtime = next((row for row in beside if row["kind"] in ("TrainingRuntime", "ClusterTrainingRuntime")
                    and metadata_of(row).get("name") == called), None)  # fmt: skip
    if runtime is None:
        return one, []
    policy = _below(runtime, "spec", "mlPolicy")
    jobs = _below(runtime, "spec", "template", "spec").get("replicatedJobs")
    rows = [row for row in jobs if isinstance(row, dict)] if isinstance(jobs, list) else []
    node: Object = next((row for row in rows if row.get("name") == kinds.NODE), {})
    box = pods.trains(_below(node, "template", "spec", "template", "spec"))
    trainer = dict(content.get("trainer") or {})
    given = {
        "image": box.get("image"), "resourcesPerNode": box.get("resources"), "numNodes": policy.get("numNodes"),
        "numProcPerNode": next((value["numProcPerNode"] for value in policy.values() if isinstance(value, dict)
                                and whole(value.get("numProcPerNode"))), None),
        **({} if trainer.get("command") else {key: box.get(key) for key in ("command", "args")}),
    }  # fmt: skip
    taken = {key: value for key, value in given.items() if value and not trainer.get(key)}
    notes = [Note("carried", f"{', '.join(taken)} of runtime {called}, which lies beside it")] if taken else []
    if "mpi" in policy:
        notes.append(Note("left out", f"runtime {called} starts ranks by mpirun: dslaunch starts them itself"))
        content["runtimeRef"] = {"name": "torch-distributed"}
    content["trainer"] = {**trainer, **taken}
    return {**one, "spec": content}, notes


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


def _leader_and_worker(one: Object) -> list[Object]:
    """The template of the first pod of a LeaderWorkerSet, and of the others."""
    given = _below(one, "spec", "leaderWorkerTemplate")
    workers = _below(given, "workerTemplate")
    return [_below(given, "leaderTemplate") or workers, workers]


def _leaderworkerset(one: Object, name: str) -> Group:
    content = spec_of(one)
    given = _below(content, "leaderWorkerTemplate")
    templates = _leader_and_worker(one)
    _, notes = _alike(templates, ["the leader", "the workers"], templates)
    if (groups := whole(content.get("replicas"))) and groups > 1:
        notes.append(Note("left out", f"replicas {groups}: so many jobs alike, and a job file is one of them"))
    for key in ("startupPolicy", "restartPolicy"):
        if value := content.get(key) or given.get(key):
            notes.append(Note("left out", f"{key} {value}: all pods start together, and again by recover.attempts"))
    for key in ("rolloutStrategy", "networkConfig"):
        if content.get(key):
            notes.append(Note("left out", f"{key} {json.dumps(content[key])}: a job is not rolled out"))
    size = given.get("size", 1)
    options: dict[str, Any] = {}
    metadata = metadata_of(one)
    rack = (metadata.get("annotations") or {}).get("leaderworkerset.sigs.k8s.io/exclusive-topology")
    if rack:
        options["annotations"] = {EXCLUSIVE: rack}
        notes.append(Note("carried", f"leaderworkerset.sigs.k8s.io/exclusive-topology {rack} -> {EXCLUSIVE}"))
    was = "this was a LeaderWorkerSet: the object is a JobSet now, which ends when the program does"
    return Group(one, "jobset", templates[1], size, was, tuple(notes), options=options,
                 known={"LWS_GROUP_SIZE": str(size)})  # fmt: skip


def _statefulset(one: Object, name: str) -> Group:
    content = spec_of(one)
    template = dict(content.get("template") or {})
    notes = [Note("left out", "serviceName: a JobSet's Service names its pods")]
    claims = []
    for row in content.get("volumeClaimTemplates") or ():
        claims.append(
            {"name": metadata_of(row).get("name"), "ephemeral": {"volumeClaimTemplate": {"spec": spec_of(row)}}}
        )
        notes.append(
            Note("carried", f"volume {metadata_of(row).get('name')}: a claim of each pod's, gone with the pod now")
        )
    if claims:
        pod = dict(_pod(template))
        template["spec"] = {**pod, "volumes": [*(pod.get("volumes") or ()), *claims]}
    was = "this was a StatefulSet: the object is a JobSet now, which ends when the program does"
    return Group(one, "jobset", template, content.get("replicas", 1), was, tuple(notes))


def _one_pod(one: Object, name: str) -> Group:
    was = "this was a Pod: the object is a JobSet of one pod now"
    return Group(one, "jobset", {"spec": spec_of(one), "metadata": {
        "labels": {}, "annotations": metadata_of(one).get("annotations") or {}}}, 1, was)  # fmt: skip


READERS: dict[str, Callable[[Object, str], Group]] = {
    "PyTorchJob": _pytorchjob, "HyperPodPyTorchJob": _pytorchjob, "JobSet": _jobset, "TrainJob": _trainjob,
    "Job": _batch, "MPIJob": _mpijob, "StatefulSet": _statefulset, "Pod": _one_pod,
    "LeaderWorkerSet": _leaderworkerset,
}  # fmt: skip
