"""Who lets a job start: Kueue's queues, and schedulers that start all pods of a group or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem
from launcher.spec import JobSpec
from launcher.spec.kubernetes import Gang, Kubernetes, Queueing

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # labels of the job
TOPOLOGY = {  # annotations of its pods, by `topology_required`
    True: "kueue.x-k8s.io/podset-required-topology",
    False: "kueue.x-k8s.io/podset-preferred-topology",
}
UNCONSTRAINED = "kueue.x-k8s.io/podset-unconstrained-topology"
SLICE_TOPOLOGY = "kueue.x-k8s.io/podset-slice-required-topology"
SLICE_SIZE = "kueue.x-k8s.io/podset-slice-size"


KAI_QUEUE = "kai.scheduler/queue"  # label of the job and of its pods, as KAI Scheduler's own documentation has it


@dataclass(frozen=True)
class Scheduler:
    """One that knows pod groups: its name, its PodGroup, and how a pod says to which one it belongs."""

    name: str
    api: str
    annotation: str = ""
    label: str = ""


SCHEDULERS = {
    "volcano": Scheduler("volcano", "scheduling.volcano.sh/v1beta1", annotation="scheduling.k8s.io/group-name"),
    # its pod-grouper makes the group of whatever owns the pods, and takes the queue from a label
    "kai": Scheduler("kai-scheduler", ""),
    "coscheduling": Scheduler(  # the chart of sigs.k8s.io/scheduler-plugins installs it beside the default one
        "scheduler-plugins-scheduler", "scheduling.x-k8s.io/v1alpha1", label="scheduling.x-k8s.io/pod-group"
    ),
}


def section(options: Kubernetes) -> Queueing | None:
    return Queueing(options.queue) if isinstance(options.queue, str) else options.queue


def gang(options: Kubernetes) -> Gang | None:
    return (Gang() if options.gang is True else options.gang) or None


def labels(options: Kubernetes) -> dict[str, str]:
    """Of the job: Kueue looks at nothing else."""
    queue, wanted = section(options), gang(options)
    found = {KAI_QUEUE: wanted.queue} if wanted and wanted.by == "kai" and wanted.queue else {}
    if not queue or not queue.name:
        return found
    return {**found, QUEUE: queue.name, **({PRIORITY: queue.priority} if queue.priority else {})}


def mark(spec: JobSpec, name: str, template: dict[str, Any]) -> None:
    """What a pod has to say of itself: how close to the others, and to which group it belongs."""
    options, metadata = spec.kubernetes, template["metadata"]
    queue, wanted = section(options), gang(options)
    annotations, told = dict(metadata.get("annotations") or {}), metadata["labels"]
    if queue and queue.topology:
        annotations[TOPOLOGY[queue.topology_required]] = queue.topology
    if queue and queue.unconstrained:
        annotations[UNCONSTRAINED] = "true"
    if queue and queue.slice_topology:
        annotations |= {SLICE_TOPOLOGY: queue.slice_topology, SLICE_SIZE: str(queue.slice_size)}
    if wanted and (scheduler := SCHEDULERS.get(wanted.by)):
        template["spec"]["schedulerName"] = wanted.scheduler or scheduler.name
        if options.kind != "pytorchjob" and scheduler.annotation:
            annotations[scheduler.annotation] = name
        if options.kind != "pytorchjob" and scheduler.label:
            told[scheduler.label] = name
        if wanted.by == "kai" and wanted.queue:
            told[KAI_QUEUE] = wanted.queue
    elif wanted and wanted.scheduler:
        template["spec"]["schedulerName"] = wanted.scheduler
    if annotations:
        metadata["annotations"] = annotations


def scheduling_policy(spec: JobSpec) -> dict[str, Any]:
    """A PyTorchJob's: its operator makes the PodGroup if it runs with a gang scheduler, and else ignores it."""
    wanted = gang(spec.kubernetes)
    if wanted is None:
        return {}
    policy: dict[str, Any] = {"minAvailable": wanted.min_available or spec.resources.nodes}
    if wanted.queue and wanted.by != "kai":
        policy["queue"] = wanted.queue
    if spec.kubernetes.priority_class and (wanted.by != "operator" or wanted.queue):  # a queue is Volcano's
        policy["priorityClass"] = spec.kubernetes.priority_class
    if wanted.timeout:
        policy["scheduleTimeoutSeconds"] = wanted.timeout
    return policy


def pod_group(spec: JobSpec, name: str) -> dict[str, Any] | None:
    """The group that no operator makes, without its metadata; None where one does, or nobody asked for one."""
    wanted = gang(spec.kubernetes)
    scheduler = SCHEDULERS.get(wanted.by) if wanted else None
    if wanted is None or scheduler is None or not scheduler.api or spec.kubernetes.kind != "jobset":
        return None
    content: dict[str, Any] = {"minMember": wanted.min_available or spec.resources.nodes}
    if wanted.by == "volcano":
        if wanted.queue:
            content["queue"] = wanted.queue
        if spec.kubernetes.priority_class:
            content["priorityClassName"] = spec.kubernetes.priority_class
        if wanted.tier:
            mode = "hard" if wanted.tier_required else "soft"
            content["networkTopology"] = {"mode": mode, "highestTierAllowed": wanted.tier}
    elif wanted.timeout:
        content["scheduleTimeoutSeconds"] = wanted.timeout
    return {"apiVersion": scheduler.api, "kind": "PodGroup", "metadata": {"name": name}, "spec": content}


def problems(spec: JobSpec) -> Iterator[Problem]:
    options = spec.kubernetes
    queue, wanted = section(options), gang(options)
    if queue and not queue.name:
        yield Problem("queue has no name", "the LocalQueue's", ("kubernetes", "queue"))
    if queue:
        yield from _queue_problems(spec, queue)
    for key, said in ((QUEUE, queue and queue.name), (KAI_QUEUE, wanted and wanted.by == "kai" and wanted.queue)):
        if said and options.labels.get(key, said) != said:
            message = f"label {key} says {options.labels[key]}, and the job's queue is {said}"
            yield Problem(message, "one of both", ("kubernetes", "labels", key))
    if wanted is None:
        return
    at = ("kubernetes", "gang")
    nodes = spec.resources.nodes
    if wanted.tier and (wanted.by != "volcano" or options.kind != "jobset"):
        message = "a tier stands in a PodGroup of Volcano's, and dslaunch makes those of a JobSet alone"
        yield Problem(message, "kind: jobset and by: volcano; or Kueue's queue.topology", (*at, "tier"))
        return
    if wanted.min_available and wanted.min_available > nodes:
        message = f"min_available {wanted.min_available}, and the job has {nodes} pods: it would never start"
        yield Problem(message, "leave it out: all pods", (*at, "min_available"))
    if options.kind == "trainjob" and options.gang is not True:
        message = "a TrainJob's pods take their scheduler and their group from the runtime"
        yield Problem(message, "a runtime with podGroupPolicy, and kubernetes.runtime: its name; or kind: jobset", at)
        return
    if options.kind == "jobset" and wanted.by == "operator":
        if wanted.queue or wanted.min_available or wanted.timeout:
            message = "JobSet makes no pod groups: nobody would read this"
            yield Problem(message, "by: volcano, by: coscheduling, or by: kai", at)
    elif wanted.by == "kai" and (wanted.timeout or (options.kind == "jobset" and wanted.min_available)):
        name = "timeout" if wanted.timeout else "min_available"
        message = f"KAI's pod-grouper counts the pods of a {options.kind} itself, and nobody would read {name}"
        yield Problem(message, "leave it out", (*at, name))
    elif wanted.by == "volcano" and wanted.timeout:
        yield Problem("Volcano's PodGroups have no timeout", "leave it out", (*at, "timeout"))
    elif wanted.by == "coscheduling" and wanted.queue:
        yield Problem("coscheduling has no queues", "leave it out; kubernetes.queue is Kueue's", (*at, "queue"))


def _queue_problems(spec: JobSpec, queue: Queueing) -> Iterator[Problem]:
    at = ("kubernetes", "queue")
    if queue.unconstrained and queue.topology:
        message = f"unconstrained, and below one {queue.topology}: Kueue takes one of both"
        yield Problem(message, "one of both", (*at, "unconstrained"))
    if bool(queue.slice_topology) != bool(queue.slice_size):
        name = "slice_size" if queue.slice_topology else "slice_topology"
        yield Problem(f"slices without {name}", f"{name} with it", (*at, name))
    elif queue.slice_size:
        if spec.kubernetes.kind == "pytorchjob":
            message = "a PyTorchJob's master is a pod set of its own, and no slice of several pods"
            yield Problem(message, "kind: jobset", (*at, "slice_size"))
        elif queue.slice_size > spec.resources.nodes:
            message = f"slices of {queue.slice_size} pods, and the job has {spec.resources.nodes}"
            yield Problem(message, f"{spec.resources.nodes} or less", (*at, "slice_size"))


def notes(spec: JobSpec) -> Iterator[str]:
    options = spec.kubernetes
    queue, wanted = section(options), gang(options)
    if queue and options.kind == "pytorchjob":
        yield (
            "Kueue 0.19 as installed has kubeflow.org/pytorchjob off in its integrations: there the queue's label "
            "does nothing, and the job starts at once"
        )
    if QUEUE in options.labels and not queue:
        yield f"label {QUEUE} is what kubernetes.queue: {options.labels[QUEUE]} writes, and judges"
        queue = Queueing(options.labels[QUEUE])
    if wanted and wanted.by in ("volcano", "coscheduling") and options.kind == "pytorchjob":
        flag = {"volcano": "volcano", "coscheduling": "scheduler-plugins"}[wanted.by]
        yield (
            f"the training operator makes PodGroups when it runs with --gang-scheduler-name={flag}; "
            "without it the group is ignored in silence"
        )
    alone = wanted and wanted.by == "operator" and not wanted.scheduler  # one of another name may know groups
    if alone and options.kind == "jobset" and spec.resources.nodes > 1 and not queue:
        yield "pods of a JobSet are scheduled one by one: kubernetes.queue, or gang.by: volcano, starts all or none"
    if wanted and options.kind == "trainjob" and spec.resources.nodes > 1 and not queue:
        yield (
            f"whether all pods start or none is the podGroupPolicy's of runtime {options.runtime}; "
            "kubernetes.queue is another way"
        )
