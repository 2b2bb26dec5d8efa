"""The objects that run pods: what each is called, takes, and tells a pod; a pod's template becomes one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from launcher.backends.kubernetes import queueing
from launcher.errors import Path, Problem
from launcher.plan import Plan
from launcher.spec import JobSpec
from launcher.spec.check import looks_secret
from launcher.spec.kubernetes import Elastic, Initializer, Kubernetes, RunPolicy

Object = dict[str, Any]

NO_LIMIT = 2**31 - 1
NODE = "node"  # the replicated job whose pods train; in Trainer's own runtimes too
JOBSET_OF = "jobset.sigs.k8s.io/jobset-name"
RESTARTS = "jobset.sigs.k8s.io/restart-attempt"  # label of a JobSet's pods: how often the gang was started again
REPLICA = "training.kubeflow.org/replica-index"
LONGEST = 63  # characters of a Service's or a pod's name
SUFFIX = 6  # characters that a Job puts behind the names of its pods: -x7k2p
KUBELET = 30  # seconds between SIGTERM and SIGKILL where the pod says nothing


@dataclass(frozen=True)
class Kind:
    """One kind of job, as the API server, its pods and the job file call it."""

    word: str  # of the job file
    kind: str
    group: str
    version: str
    plural: str
    owner: str  # the label of its pods that has the job's name
    container: str  # the one that trains, which the operators look for
    served_by: str
    managers: tuple[str, ...]  # what managedBy may be
    ranks: str  # shell: what the operator tells a pod, as node.sh wants it told

    @property
    def api(self) -> str:
        return f"{self.group}/{self.version}"


KUEUE = "kueue.x-k8s.io/multikueue"
KINDS = {
    row.word: row
    for row in (
        Kind(
            "pytorchjob", "PyTorchJob", "kubeflow.org", "v1", "pytorchjobs", "training.kubeflow.org/job-name",
            "pytorch", "training-operator 1.x, which serves kubeflow.org/v1",
            ("kubeflow.org/training-operator", KUEUE),
            "export NODE_RANK=$RANK; ",  # RANK is the node's
        ),
        Kind(
            "jobset", "JobSet", "jobset.x-k8s.io", "v1alpha2", "jobsets", JOBSET_OF,
            NODE, "JobSet, which serves jobset.x-k8s.io/v1alpha2",
            ("jobset.sigs.k8s.io/jobset-controller", KUEUE),
            "export NODE_RANK=$JOB_COMPLETION_INDEX; ",  # an Indexed Job sets it
        ),
        Kind(  # its JobSet has its name, and so have the pods' labels
            "trainjob", "TrainJob", "trainer.kubeflow.org", "v1alpha1", "trainjobs", JOBSET_OF,
            NODE, "Kubeflow Trainer 2.x, which serves trainer.kubeflow.org/v1alpha1",
            ("trainer.kubeflow.org/trainjob-controller", KUEUE),
            "export NODE_RANK=$PET_NODE_RANK MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT; ",
        ),
    )
}  # fmt: skip
BY_KIND = {row.kind: row for row in KINDS.values()}
MPI = ("deepspeed-distributed", "mlx-distributed")  # Trainer's own runtimes in which mpirun starts the ranks


def of(spec: JobSpec, *, training: bool = True) -> Kind:
    """Nodes of a TrainJob are checked by a JobSet, which Trainer brings: a runtime would repeat what ended badly."""
    word = spec.kubernetes.kind
    return KINDS["jobset" if word == "trainjob" and not training else word]


def hosts(spec: JobSpec) -> list[str]:
    """What the pods call each other: demo-master-0, or demo-node-0-0.demo."""
    name, count = spec.name, spec.resources.nodes
    if spec.kubernetes.kind != "pytorchjob":
        return [f"{name}-{NODE}-0-{number}.{name}" for number in range(count)]
    first = [] if spec.kubernetes.elastic else [f"{name}-master-0"]
    return [*first, *(f"{name}-worker-{number}" for number in range(count - len(first)))]


def elastic(spec: JobSpec, *, training: bool = True) -> Elastic | None:
    return spec.kubernetes.elastic if training and spec.kubernetes.kind == "pytorchjob" else None


def recovers(spec: JobSpec) -> bool:
    """Whether this kind starts pods again as node/pod.py asks for it, and as often."""
    policy = spec.kubernetes.run_policy
    if spec.kubernetes.kind == "trainjob" or spec.kubernetes.elastic:
        return False
    if spec.kubernetes.kind == "pytorchjob":
        return policy.restart_policy in (None, "ExitCode")
    return policy.restart_policy in (None, "Never") and policy.max_restarts != 0


def job(spec: JobSpec, name: str, template: Object, *, training: bool, recovers: bool) -> Object:
    """{"apiVersion", "kind", "spec"} around a pod's template; of 1,000 workers as long as of two."""
    kind = of(spec, training=training)
    queueing.mark(spec, name, template)
    make = {"pytorchjob": _pytorchjob, "jobset": _jobset, "trainjob": _trainjob}[kind.word]
    return {"apiVersion": kind.api, "kind": kind.kind, "spec": make(spec, name, template, training, recovers)}


def templates(document: Mapping[str, Any]) -> list[Object]:
    """What in a job has a pod's metadata: the place for what only its pods can be told."""
    spec = document["spec"]
    if "pytorchReplicaSpecs" in spec:
        return [row["template"] for row in spec["pytorchReplicaSpecs"].values()]
    jobs = spec.get("replicatedJobs", [])
    for patch in spec.get("runtimePatches", []):
        jobs = [*jobs, *patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]]
    return [*(row["template"]["spec"]["template"] for row in jobs), *spec.get("podTemplateOverrides", [])]


def nodes(document: Mapping[str, Any]) -> int:
    """How many pods a job has."""
    spec = document["spec"]
    if "pytorchReplicaSpecs" in spec:
        return sum(row.get("replicas", 1) for row in spec["pytorchReplicaSpecs"].values())
    if "trainer" in spec:
        return int(spec["trainer"].get("numNodes", 1))
    rows = spec["replicatedJobs"]
    return sum(row.get("replicas", 1) * row["template"]["spec"].get("completions", 1) for row in rows)


# --- PyTorchJob -------------------------------------------------------------------------------------


def _pytorchjob(spec: JobSpec, name: str, template: Object, training: bool, recovers: bool) -> Object:
    asked = spec.kubernetes.run_policy if training else RunPolicy()
    world = elastic(spec, training=training)
    # ExitCode: a pod that ends with 128 or more is deleted and created again, and less ends the job. Elastic pods
    # meet again, so that whichever ended comes back by itself
    restart = asked.restart_policy or ("ExitCode" if recovers else "OnFailure" if world else "Never")
    if world:
        _lead(template, f"{name}-worker-0", REPLICA)
    replica: Object = {"restartPolicy": restart, "template": template}
    replicas: Object = {"Master": {"replicas": 1, **replica}}
    if world:
        replicas = {"Worker": {"replicas": spec.resources.nodes, **replica}}
    elif spec.resources.nodes > 1:
        replicas["Worker"] = {"replicas": spec.resources.nodes - 1, **replica}
    # when one pod has failed, the others free their GPUs; those of a preflight end by themselves, and one of them
    # that fails is no reason to stop before there is a verdict
    policy: Object = {"cleanPodPolicy": asked.clean_pods or ("Running" if training else "None")}
    given = {
        "ttlSecondsAfterFinished": asked.ttl,
        "activeDeadlineSeconds": asked.deadline,
        # node/pod.py counts, on the volume. The operator forgets what it counted when it creates a pod again, cannot
        # know that a new checkpoint was saved, and with 0 ends the job at the first failure
        "backoffLimit": NO_LIMIT if recovers else asked.backoff_limit,
        "suspend": asked.suspend or None,
        "managedBy": asked.managed_by,
    }
    policy |= {key: value for key, value in given.items() if value is not None}
    if scheduling := queueing.scheduling_policy(spec):
        policy["schedulingPolicy"] = scheduling
    # a string by its schema. The operator's WORLD_SIZE and RANK are no rank's: node.sh starts those
    content: Object = {"nprocPerNode": str(spec.per_node), "runPolicy": policy}
    if world:
        content["elasticPolicy"] = _elastic_policy(world)
    return {**content, "pytorchReplicaSpecs": replicas}


def _elastic_policy(world: Elastic) -> Object:
    policy: Object = {"minReplicas": world.min, "maxReplicas": world.max, "maxRestarts": world.max_restarts}
    policy["rdzvBackend"] = world.backend
    if world.endpoint:
        host, _, port = world.endpoint.partition(":")
        policy |= {"rdzvHost": host, **({"rdzvPort": int(port)} if port else {})}
    if world.autoscale:
        policy["metrics"] = [
            {
                "type": "Resource",
                "resource": {"name": name, "target": {"type": "Utilization", "averageUtilization": percent}},
            }
            for name, percent in world.autoscale.items()
        ]
    return policy


def _lead(template: Object, address: str, label: str = "") -> None:
    """Tell a pod what its operator does not: where the first one is, and by `label` which one it is itself."""
    box = template["spec"]["containers"][0]
    port = next(row["containerPort"] for row in box["ports"])
    more: list[Object] = []
    if label:
        more.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}})
    else:
        more.append({"name": "DSLAUNCH_PODS", "value": address.partition(".")[0].removesuffix("0")})
    more += [{"name": "MASTER_ADDR", "value": address}, {"name": "MASTER_PORT", "value": str(port)}]
    box["env"] = [*box["env"], *more]
    if not label:  # nobody looks for the operator's own word
        box["ports"] = [{**row, "name": "rendezvous"} for row in box["ports"]]


# --- JobSet -----------------------------------------------------------------------------------------

AGAIN = (137, 143, 144)  # killed, told to go, and node/pod.py's own: the gang starts again; any other code ends it


def _jobset(spec: JobSpec, name: str, template: Object, training: bool, recovers: bool) -> Object:
    asked = spec.kubernetes.run_policy if training else RunPolicy()
    # the Service that names pods is called as the JobSet is
    _lead(template, f"{name}-{NODE}-0-0.{name}")
    if recovers:
        field = {"fieldRef": {"fieldPath": f"metadata.labels['{RESTARTS}']"}}
        template["spec"]["containers"][0]["env"].append({"name": "DSLAUNCH_RESTARTED", "valueFrom": field})
    template["spec"]["restartPolicy"] = asked.restart_policy or "Never"
    pods = spec.resources.nodes
    work: Object = {"parallelism": pods, "completions": pods, "completionMode": "Indexed"}
    if training:
        # one pod that ends badly ends the Job; the JobSet then starts all of them again, or none
        work["backoffLimit"] = asked.backoff_limit or 0
    else:
        work["backoffLimitPerIndex"] = 0  # one that fails is no reason to stop before there is a verdict
    if asked.deadline:
        work["activeDeadlineSeconds"] = asked.deadline
    policy: Object = {"maxRestarts": NO_LIMIT if recovers and asked.max_restarts is None else asked.max_restarts or 0}
    ends = ["PodFailurePolicy"] if recovers else []
    if recovers:
        codes = {"containerName": NODE, "operator": "NotIn", "values": list(AGAIN)}
        work["podFailurePolicy"] = {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    if asked.deadline:
        ends.append("DeadlineExceeded")
    if ends and policy["maxRestarts"]:
        policy["rules"] = [{"name": "the-end", "action": "FailJobSet", "onJobFailureReasons": ends}]
    work["template"] = template
    given = {"suspend": asked.suspend or None, "ttlSecondsAfterFinished": asked.ttl, "managedBy": asked.managed_by}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": policy,
        **{key: value for key, value in given.items() if value is not None},
        "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": work}}],
    }


# --- TrainJob ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """What a TrainJob may say about its runtime's pods, by the release of Trainer."""

    field: str
    pod: frozenset[str]
    container: frozenset[str]


_POD = {"affinity", "imagePullSecrets", "initContainers", "nodeSelector", "schedulingGates", "serviceAccountName",
        "tolerations", "volumes"}  # fmt: skip
OVERRIDES = Dialect("podTemplateOverrides", frozenset(_POD), frozenset({"volumeMounts"}))
_BOX = frozenset({"volumeMounts", "securityContext"})
PATCHES = Dialect("runtimePatches", frozenset({*_POD, "securityContext"}), _BOX)
PATCHES_2_3 = Dialect("runtimePatches", PATCHES.pod | {"terminationGracePeriodSeconds"}, _BOX)
LATER = (("2.2", PATCHES), ("2.3", PATCHES_2_3))
TRAINER = {"image", "command", "args", "env", "resources", "name"}  # of a container, said in `trainer` itself
# What only hardens a pod, or names things: left to the runtime, with a word where a person would want to know.
LEFT_OUT = {"automountServiceAccountToken", "enableServiceLinks", "ports", "terminationMessagePolicy"}
# By which field of the job file a pod gets what no TrainJob can say. A field at its default is left to the runtime.
FIELDS: dict[str, tuple[str, ...]] = {
    "priorityClassName": ("priority_class",),
    "runtimeClassName": ("runtime_class",),
    "imagePullPolicy": ("image_pull_policy",),
    "hostNetwork": ("network", "host_network"),
    "dnsPolicy": ("network", "host_network"),
    "hostIPC": ("security", "host_ipc"),
    "hostPID": ("security", "host_pid"),
    "dnsConfig": ("dns",),
    "hostAliases": ("host_aliases",),
    "securityContext": ("security",),
    "topologySpreadConstraints": ("spread",),
    "resourceClaims": ("network", "claim_template"),  # or claims
    "terminationGracePeriodSeconds": ("grace",),
    "schedulerName": ("gang",),
    "envFrom": ("env_from",),
    "containers": ("sidecars",),
}


def release(options: Kubernetes) -> tuple[int, ...]:
    return tuple(map(int, options.trainer.split(".")))


def dialect(options: Kubernetes) -> Dialect:
    known = release(options)
    return OVERRIDES if known < (2, 2) else PATCHES if known < (2, 3) else PATCHES_2_3


def says_grace(options: Kubernetes) -> bool:
    return options.kind != "trainjob" or "terminationGracePeriodSeconds" in dialect(options).pod


def _trainjob(spec: JobSpec, name: str, template: Object, training: bool, recovers: bool) -> Object:
    options, asked, words = spec.kubernetes, spec.kubernetes.run_policy, dialect(spec.kubernetes)
    pod = template["spec"]
    box = pod["containers"][0]
    env = [*box["env"], {"name": "DSLAUNCH_PODS", "value": f"{name}-{NODE}-0-"}]
    trainer: Object = {"image": box["image"], "command": box["command"], "env": env}
    trainer |= {"numNodes": spec.resources.nodes, "numProcPerNode": spec.per_node}
    if "resources" in box:
        trainer["resourcesPerNode"] = box["resources"]
    said: Object = {key: value for key, value in pod.items() if key in words.pod}
    said["containers"] = [{"name": NODE, **{key: value for key, value in box.items() if key in words.container}}]
    laid = {"metadata": template["metadata"], "spec": said}
    content: Object = {"runtimeRef": {"apiGroup": KINDS["trainjob"].group, "kind": options.runtime_kind}}
    content["runtimeRef"]["name"] = options.runtime
    given = {
        "suspend": asked.suspend or None,
        "managedBy": asked.managed_by,
        "activeDeadlineSeconds": asked.deadline,
    }
    content |= {key: value for key, value in given.items() if value is not None}
    steps = {"dataset": options.dataset, "model": options.weights}
    if training and any(steps.values()):
        content["initializer"] = {name: _initializer(step) for name, step in steps.items() if step}
    content["trainer"] = trainer
    if words is OVERRIDES:
        return {**content, "podTemplateOverrides": [{"targetJobs": [{"name": NODE}], **laid}]}
    work = {"name": NODE, "template": {"spec": {"template": laid}}}
    runtime = {"template": {"spec": {"replicatedJobs": [work]}}}
    return {**content, "runtimePatches": [{"manager": "dslaunch.dev/dslaunch", "trainingRuntimeSpec": runtime}]}


def _initializer(step: Initializer) -> Object:
    given = {
        "storageUri": step.uri,
        "secretRef": {"name": step.secret} if step.secret else None,
        "env": [{"name": name, "value": value} for name, value in step.env.items()],
    }
    return {key: value for key, value in given.items() if value}


def _get(options: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        options = getattr(options, name)
    return options


def unsaid(spec: JobSpec, template: Object) -> Iterator[Problem]:
    """What a TrainJob has no field for, each where the job file asks for it."""
    if spec.kubernetes.kind != "trainjob":
        return
    template = copy.deepcopy(template)
    queueing.mark(spec, spec.name, template)
    options, words, pod = spec.kubernetes, dialect(spec.kubernetes), template["spec"]
    box, default = pod["containers"][0], Kubernetes()
    found = [key for key in pod if key not in {*words.pod, *LEFT_OUT, "containers"}]
    found += [key for key in box if key not in {*words.container, *TRAINER, *LEFT_OUT}]
    told: set[Path] = set()
    more = [row["name"] for row in [*pod["containers"][1:], *pod.get("initContainers", [])]]
    if more:
        where = ("sidecars",) if options.sidecars else ("network", "profile")
        told.add(("kubernetes", *where))
        message = f"a TrainJob adds no containers to its runtime's pods, and these are {', '.join(more)}"
        yield Problem(message, "a runtime that has them, or kind: jobset", ("kubernetes", *where))
    for key in found:
        path = FIELDS.get(key, ())
        if key == "envFrom" and not options.env_from:
            path = ("secret_env_from",)
        if key == "dnsPolicy" and options.dns and options.dns.policy:
            path = ("dns",)
        if key == "resourceClaims" and not options.network.claim_template:
            path = ("network", "claims")
        at: Path = ("kubernetes", *path)
        if at in told or (path and _get(options, path) == _get(default, path)):
            continue
        told.add(at)
        message = f"Trainer {options.trainer}: {words.field} of a TrainJob has no {key}"
        newer = [name for name, later in LATER if key in later.pod | later.container]
        hint = f"Trainer {newer[0]} has: kubernetes.trainer" if newer else "a runtime that says it, or kind: jobset"
        yield Problem(message, hint, at)


# --- what cannot run, and what surprises ------------------------------------------------------------

# Which of run_policy's fields a kind has; what to write instead of the others.
POLICIES: dict[str, dict[str, str]] = {
    "pytorchjob": {"max_restarts": "recover.attempts; a PyTorchJob starts single pods again, never the gang"},
    "jobset": {"clean_pods": "leave it out: a JobSet that is over keeps no pod running"},
    "trainjob": {
        **dict.fromkeys(("clean_pods", "backoff_limit", "max_restarts", "restart_policy"), "its runtime says that"),
        "ttl": "its runtime says that; kubectl delete trainjob",
    },
}


def problems(spec: JobSpec, plan: Plan | None, *, training: bool) -> Iterator[Problem]:
    options, asked = spec.kubernetes, spec.kubernetes.run_policy
    kind, at = KINDS[options.kind], ("kubernetes", "run_policy")
    default = RunPolicy()
    for field in fields(RunPolicy):
        hint = POLICIES[options.kind].get(field.name)
        if hint and getattr(asked, field.name) != getattr(default, field.name):
            yield Problem(f"a {kind.kind} has no {field.name}", hint, (*at, field.name))
    if asked.managed_by not in (None, *kind.managers):
        message = f"managed_by {asked.managed_by}: a {kind.kind} takes {' or '.join(kind.managers)}"
        yield Problem(message, kind.managers[1], (*at, "managed_by"))
    yield from _name_problems(spec, training)
    yield from queueing.problems(spec)
    if options.pod_patch and options.kind == "trainjob":
        message = "a TrainJob's pods are made from its runtime, and it says of them only what its API has fields for"
        yield Problem(message, "kubernetes.patch of what it has, or kind: jobset", ("kubernetes", "pod_patch"))
    for name in ("dataset", "weights"):
        yield from _initializer_problems(options, name)
    if options.kind == "jobset":
        yield from _jobset_problems(spec)
    if options.kind == "trainjob":
        if options.runtime in MPI:
            message = f"in runtime {options.runtime} mpirun starts the ranks, and dslaunch starts them itself"
            yield Problem(message, "runtime: torch-distributed", ("kubernetes", "runtime"))
        if asked.deadline and release(options) < (2, 3):
            message = f"a TrainJob of Trainer {options.trainer} has no activeDeadlineSeconds"
            yield Problem(message, 'Trainer 2.3 has: kubernetes.trainer: "2.3"', (*at, "deadline"))
    if options.elastic and training:
        yield from _elastic_problems(spec, plan)
    if options.kind == "pytorchjob" and training and asked.backoff_limit is not None and not asked.restart_policy:
        message = f"backoff_limit {asked.backoff_limit}: nothing is counted by it unless pods are restarted in place"
        yield Problem(message, "restart_policy: OnFailure with it, or recover.attempts", (*at, "backoff_limit"))
    if options.kind == "pytorchjob" and asked.backoff_limit is not None and asked.restart_policy == "ExitCode":
        message = f"backoff_limit {asked.backoff_limit}: with ExitCode the operator forgets what it counted"
        yield Problem(message, f"recover.attempts: {asked.backoff_limit}, which counts", (*at, "backoff_limit"))


def _name_problems(spec: JobSpec, training: bool) -> Iterator[Problem]:
    kind = of(spec, training=training)
    name = spec.name if training or spec.name.split("-")[-1] == "preflight" else f"{spec.name}-preflight"
    if name[0].isdigit():
        message = f"name {spec.name} begins with a digit, and the Service of a {kind.kind} wants a letter"
        yield Problem(message, f"job-{spec.name}"[:40].rstrip("-"), ("name",))
    last = spec.resources.nodes - 1
    longest = f"{name}-worker-{last}" if kind.word == "pytorchjob" else f"{name}-{NODE}-0-{last}"
    over = len(longest) + (0 if kind.word == "pytorchjob" else SUFFIX) - LONGEST
    if over > 0:
        message = f"a pod of {kind.kind} {name} would be called {longest}-xxxxx: over {LONGEST} characters"
        yield Problem(message, f"a name of {len(spec.name) - over} characters or less", ("name",))


def _initializer_problems(options: Kubernetes, name: str) -> Iterator[Problem]:
    step: Initializer | None = getattr(options, name)
    if step and options.kind != "trainjob":
        message = f"a {KINDS[options.kind].kind} downloads nothing before its ranks start"
        yield Problem(message, "kind: trainjob; or a sidecar with init: true", ("kubernetes", name))
    for variable, value in step.env.items() if step else ():
        if looks_secret(variable, value):
            message = f"{variable} looks like a secret, and manifests are written to files"
            yield Problem(message, f"{name}.secret names one", ("kubernetes", name, "env", variable))


def _jobset_problems(spec: JobSpec) -> Iterator[Problem]:
    asked, at = spec.kubernetes.run_policy, ("kubernetes", "run_policy")
    if asked.restart_policy in ("Always", "ExitCode"):
        message = f"pods of a Job take Never or OnFailure, and not {asked.restart_policy}"
        yield Problem(message, "leave it out: the gang starts again as a whole", (*at, "restart_policy"))
    if asked.backoff_limit and recovers(spec) and spec.recover.attempts:
        message = f"backoff_limit {asked.backoff_limit} starts a pod again alone, and recover.attempts the whole gang"
        yield Problem(message, "backoff_limit: 0, or recover.attempts: 0", (*at, "backoff_limit"))


def _elastic_problems(spec: JobSpec, plan: Plan | None) -> Iterator[Problem]:
    world, at = spec.kubernetes.elastic, ("kubernetes", "elastic")
    assert world is not None
    if spec.kubernetes.kind != "pytorchjob":
        yield Problem(f"a {KINDS[spec.kubernetes.kind].kind} has no elasticPolicy", "kind: pytorchjob", at)
        return
    if not world.min <= spec.resources.nodes <= world.max:
        message = f"the job starts on {spec.resources.nodes} nodes, and elastic is {world.min} to {world.max}"
        yield Problem(message, "resources.nodes between them", at)
    if world.backend != "c10d" and not world.endpoint:
        yield Problem(f"rendezvous by {world.backend} needs its address", "endpoint: etcd:2379", (*at, "endpoint"))
    if world.backend == "c10d" and world.endpoint:
        message = "c10d meets at the first worker, which the operator names by itself"
        yield Problem(message, "leave endpoint out, or backend: etcd-v2", (*at, "endpoint"))
    if spec.train.launcher != "node":
        message = f"ranks that launcher {spec.train.launcher} starts are of one world, which may not change"
        hint = "launcher: node, with your own torchrun as the command; or leave it out: recover.attempts starts again"
        yield Problem(message, hint, at)
    if spec.checks_nodes:
        message = "a preflight waits for all nodes, and an elastic job starts with fewer"
        yield Problem(message, "preflight: {run: false}", ("preflight", "run"))
    told = spec.train.config_flag != "none" and spec.train.global_batch != "auto"
    if told and plan is not None and plan.batch is not None:
        micro, total = plan.batch.micro, plan.batch.total
        parallel = spec.world // plan.batch.replicas
        odd = [
            count
            for count in range(world.min, min(world.max, world.min + 10_000) + 1)
            if total % (micro * max(1, count * spec.per_node // parallel))
        ]
        if odd:
            message = f"global_batch {total} is no multiple of micro_batch {micro} x the ranks of {odd[0]} nodes"
            yield Problem(message, "config_flag: none, or min and max at which it divides", at)


def notes(spec: JobSpec) -> Iterator[str]:
    """What runs, and will surprise."""
    options, asked = spec.kubernetes, spec.kubernetes.run_policy
    again = recovers(spec)
    if options.kind == "pytorchjob":
        if asked.clean_pods == "None":
            yield "clean_pods None: when one pod has failed the others stay, and keep their GPUs"
        if asked.deadline:
            yield "the operator looks at activeDeadlineSeconds only when something happens to a pod: it may be late"
        if asked.ttl is not None and (again or asked.restart_policy == "ExitCode"):
            yield "a job that failed with restartPolicy ExitCode is never removed by its ttl: kubectl delete does it"
        if asked.restart_policy in ("OnFailure", "Always") and not options.elastic:
            yield (
                f"restart_policy {asked.restart_policy} starts a pod again alone and at once: nobody counts "
                "recover.attempts, and the other pods have to fail too before all meet again"
            )
        if asked.restart_policy == "Never" and asked.backoff_limit is not None:
            yield "restart_policy Never: the operator never looks at backoffLimit"
    if asked.suspend and not queueing.labels(options) and queueing.QUEUE not in options.labels:
        yield (
            "suspend: true, and no queue that would start the job: kubernetes.queue, or "
            f"kubectl patch {KINDS[options.kind].plural} {spec.name} with the field false"
        )
    if options.elastic:
        yield "an elastic job plans its batch for resources.nodes; recover.attempts does not count, max_restarts does"
        asks = {"cpu": spec.resources.cpus_per_node, "memory": spec.resources.memory}
        for name in options.elastic.autoscale:
            if not asks[name]:
                field = {"cpu": "cpus_per_node", "memory": "memory"}[name]
                yield f"autoscale by {name} is a share of what pods request, and they request none: resources.{field}"
    if options.kind == "jobset" and spec.recover.attempts and not again:
        yield "recover.attempts does not count here: run_policy says how often pods start again"
    if options.kind == "trainjob":
        if spec.recover.attempts:
            yield (
                f"recover.attempts does not count in a TrainJob: whether pods start again is the runtime's "
                f"({options.runtime}: restartPolicy, backoffLimit); kind: jobset starts the gang again"
            )
        if not says_grace(options):
            yield f"Trainer {options.trainer} leaves a pod {KUBELET} s between SIGTERM and SIGKILL; 2.3 can be told"
        if dialect(options) is OVERRIDES:
            yield (
                f"Trainer {options.trainer} leaves a pod's security context to the runtime: the restricted profile "
                "refuses the pods where that says nothing"
            )
        if not options.service_account_token:
            yield "a TrainJob's pods mount a service account's token unless their runtime or the account says no"
    yield from queueing.notes(spec)
