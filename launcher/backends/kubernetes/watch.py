"""What a job, its pods and their events say together; and hearing of changes as they come.

`judge`, `troubles` and `step` are pure. A view holds one namespace, whatever the number of runs in it: three
lists and three watches. Silence is a change of its own kind: it makes runs UNKNOWN, with the age of what was heard.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from queue import Empty, Queue
from typing import Any

from launcher.backends import State, Status
from launcher.backends.kubernetes import api, kinds
from launcher.backends.kubernetes.kinds import Kind
from launcher.backends.kubernetes.manifests import JOIN, MANAGED_BY
from launcher.errors import Unreachable, UserError

Object = Mapping[str, Any]
OWN = f"{MANAGED_BY}=dslaunch"
OWNERS = tuple(dict.fromkeys(row.owner for row in kinds.KINDS.values()))
TRIES = 2  # pulls of an image that failed: the first may have met a registry that was busy

# Why a container does not start: its waiting reason -> cause, and after how many tries waiting is vain (0: never).
WAITING = {
    "ErrImagePull": ("k8s_image_pull", TRIES),
    "ImagePullBackOff": ("k8s_image_pull", TRIES),
    "InvalidImageName": ("k8s_image_pull", 1),
    "ErrImageNeverPull": ("k8s_image_pull", 1),
    "ImageInspectError": ("k8s_image_pull", TRIES),
    "RegistryUnavailable": ("k8s_image_pull", 0),
    "CreateContainerConfigError": ("k8s_config_error", TRIES),
    "CreateContainerError": ("k8s_config_error", TRIES),
    "RunContainerError": ("k8s_config_error", TRIES),
    "CrashLoopBackOff": ("k8s_back_off", 0),
}
# Why a pod ended without its own doing: its status.reason, or the reason of its DisruptionTarget condition.
ENDED = {
    "Evicted": "k8s_evicted",
    "Preempting": "k8s_evicted",
    "Preempted": "k8s_evicted",
    "PreemptionByScheduler": "k8s_evicted",
    "EvictionByEvictionAPI": "k8s_evicted",
    "TerminationByKubelet": "k8s_evicted",
    "DeletionByTaintManager": "k8s_node_not_ready",
    "DeletionByPodGC": "k8s_node_not_ready",
    "NodeLost": "k8s_node_not_ready",
    "NodeShutdown": "k8s_node_not_ready",
    "Shutdown": "k8s_node_not_ready",
    "Terminated": "k8s_node_not_ready",
    "UnexpectedAdmissionError": "k8s_device_unhealthy",
    "DeadlineExceeded": "k8s_deadline",
}
# How a container ended, where its exit code alone would not say it.
TERMINATED = {
    "OOMKilled": "k8s_oomkilled",
    "ContainerCannotRun": "command_not_found",
    "StartError": "command_not_found",
    "ContainerStatusUnknown": "k8s_node_not_ready",
}
# Events that no status repeats. On pods and, FailedCreatePod, on the job.
EVENTS = {
    "FailedMount": ("k8s_volume_failed", "cannot mount a volume"),
    "FailedAttachVolume": ("k8s_volume_failed", "cannot attach a volume"),
    "FailedCreatePodSandBox": ("k8s_sandbox_failed", "have no sandbox"),
    "NodeNotReady": ("k8s_node_not_ready", "are on a node that is not ready"),
    "FailedCreatePod": ("k8s_quota_exceeded", "cannot be created"),
    "FailedCreate": ("k8s_quota_exceeded", "cannot be created"),  # of a Job
    "FailedCreateService": ("", "have no Service"),
    "TaintManagerEviction": ("k8s_node_not_ready", "are taken off their node"),
}


@dataclass(frozen=True)
class Trouble:
    """Why pods of a job wait or ended. `stuck`: waiting longer changes nothing."""

    reason: str  # the cluster's own word, ImagePullBackOff
    words: str  # a clause: "cannot pull ghcr.io/x: not found"
    pods: tuple[str, ...]
    cause: str = ""  # an id of causes.tsv
    stuck: bool = False
    nodes: tuple[str, ...] = ()
    code: int | None = None
    at: str = ""


# --- one pod ----------------------------------------------------------------------------------------


def troubles(pods: Sequence[Object], events: Sequence[Object] = (), *, job: str = "") -> list[Trouble]:
    """Each kind once, with all its pods; those that ended first, the earliest of them first."""
    found: dict[tuple[str, str], Trouble] = {}
    for pod in sorted(pods, key=lambda one: one["metadata"]["name"]):
        name = pod["metadata"]["name"]
        mine = [event for event in events if event.get("involvedObject", {}).get("name") == name]
        for one in _of_pod(pod, mine):
            _add(found, one)
    for event in events:
        named = event.get("involvedObject", {}).get("name")
        # a JobSet's pods are made by a Job of its own
        if job and named in (job, f"{job}-{kinds.NODE}-0") and event.get("reason") in EVENTS:
            cause, does = EVENTS[event["reason"]]
            _add(found, Trouble(event["reason"], f"{does}: {_short(event.get('message'))}", (), cause, at=_at(event)))
    return sorted(found.values(), key=lambda one: (one.code is None, one.at or "9"))


def _add(found: dict[tuple[str, str], Trouble], one: Trouble) -> None:
    key = (one.reason, one.words if one.code else re.sub(r"\d+", "#", one.words))
    old = found.get(key)
    if old is None:
        found[key] = one
    else:
        nodes = tuple(dict.fromkeys((*old.nodes, *one.nodes)))
        found[key] = replace(old, pods=(*old.pods, *one.pods), nodes=nodes, stuck=old.stuck or one.stuck)


def _of_pod(pod: Object, events: Sequence[Object]) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    node = (pod.get("spec") or {}).get("nodeName") or ""
    where: dict[str, Any] = {"pods": (name,), "nodes": (node,) if node else ()}
    conditions = {row.get("type"): row for row in status.get("conditions") or ()}
    target = conditions.get("DisruptionTarget", {})
    ended = status.get("reason") or (target.get("reason") if target.get("status") == "True" else "")
    if ended in ENDED:
        said = _short(status.get("message") or target.get("message"))
        words = f"ended with {ended}{f' on {node}' if node else ''}{f': {said}' if said else ''}"
        yield Trouble(ended, words, **where, cause=ENDED[ended], code=_exit_code(status), at=_over_at(status))
        return
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        yield _unscheduled(pod, scheduled)
        return
    rows = [(row, True) for row in status.get("initContainerStatuses") or ()]
    rows += [(row, False) for row in status.get("containerStatuses") or ()]
    for row, first in rows:
        state = row.get("state") or {}
        which = f"in init container {row['name']} " if first else ""
        if waiting := state.get("waiting"):
            yield from _waits(waiting, row, which, where, events)
        if (over := state.get("terminated")) and over.get("exitCode"):
            yield _terminated(over, which, where, node)
    started = any((row.get("state") or {}).get("running") for row, first in rows if not first)
    for event in () if started and status.get("phase") == "Running" else events:
        if event.get("reason") in EVENTS:
            cause, does = EVENTS[event["reason"]]
            yield Trouble(event["reason"], f"{does}: {_short(event.get('message'))}", **where, cause=cause)
    lost = [event for event in events if event.get("reason") == "NodeNotReady"]
    if started and lost and conditions.get("Ready", {}).get("status") == "False":
        yield Trouble("NodeNotReady", f"are on {node}, which is not ready", **where, cause="k8s_node_not_ready")


def _waits(
    waiting: Object, row: Object, which: str, where: Mapping[str, Any], events: Sequence[Object]
) -> Iterator[Trouble]:
    reason = waiting.get("reason", "")
    if reason not in WAITING:  # ContainerCreating, PodInitializing: on its way
        return
    cause, patience = WAITING[reason]
    said = _short(waiting.get("message"))
    if cause == "k8s_image_pull":
        told = [
            event for event in events if event.get("reason") == "Failed" and "pull image" in event.get("message", "")
        ]
        said = next((_short(event["message"]) for event in told), said) if "Back-off" in said else said
        tries = sum(event.get("count") or 1 for event in told)
        words = f"{which}cannot pull {row.get('image', 'the image')} ({reason}): {said}"
    else:
        tries = sum(event.get("count") or 1 for event in events if event.get("reason") in (reason, "Failed"))
        missing = re.search(r'(secret|configmap) "([^"]+)" not found', said)
        thing = (
            f"the {missing[1].replace('configmap', 'ConfigMap').replace('secret', 'Secret')} {missing[2]} is missing"
            if missing
            else said
        )
        words = f"{which}cannot start ({reason}): {thing}"
    yield Trouble(reason, words, **where, cause=cause, stuck=0 < patience <= max(tries, 1))


def _terminated(over: Object, which: str, where: Mapping[str, Any], node: str) -> Trouble:
    """137 with the reason OOMKilled is the memory limit; without it somebody sent SIGKILL."""
    code, reason = over["exitCode"], over.get("reason") or "Error"
    said = (over.get("message") or "").strip().partition("\n")[0]
    on = f" on {node}" if node else ""
    if reason == "OOMKilled":
        words = f"{which}ended with {code}{on}: over its memory limit (OOMKilled)"
    elif code == 137 and not said:
        words = f"{which}ended with 137{on}: killed from outside, and not for its memory"
    else:
        words = f"{which}ended with {code}{on}: {said or reason}"
    return Trouble(
        reason, words, **where, cause=TERMINATED.get(reason, ""), code=code, at=over.get("finishedAt") or ""
    )


def _unscheduled(pod: Object, condition: Object) -> Trouble:
    """0/12 nodes are available: 8 Insufficient nvidia.com/gpu. -> 8 have fewer than 8 nvidia.com/gpu free."""
    said = condition.get("message") or condition.get("reason") or ""
    if condition.get("reason") == "SchedulingGated":
        return Trouble("SchedulingGated", "are held back by a scheduling gate", (pod["metadata"]["name"],))
    amounts: Counter[str] = Counter()
    for container in (pod.get("spec") or {}).get("containers") or ():
        resources = container.get("resources") or {}
        for name, text in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            with contextlib.suppress(ValueError):
                amounts[name] += int(text)
    head = re.match(r"(\d+)/(\d+) nodes are available: ", said)
    rest = said[head.end() :] if head else said
    rest = re.split(r"\.? preemption: ", rest)[0].rstrip(". ")
    parts, cause, largest = [], "", 0
    for part in re.split(r", (?=\d+ )", rest) if head else []:
        count, _, why = part.partition(" ") if part[:1].isdigit() else ("all", "", part)
        short = re.match(r"Insufficient (\S+)", why)
        if short:
            wanted = amounts.get(short[1])
            parts.append(
                f"{count} have fewer than {wanted} {short[1]} free"
                if wanted
                else f"{count} have too little {short[1]}"
            )
            what = (
                "k8s_insufficient_gpu"
                if "/" in short[1]
                else "k8s_insufficient_memory"
                if short[1] == "memory"
                else "k8s_insufficient_other"
            )
        else:
            parts.append(f"{count} {why.removeprefix('node(s) ').replace('had untolerated', 'have an untolerated')}")
            what = "k8s_volume_failed" if "volume" in why or "PersistentVolume" in why else "k8s_unschedulable"
        number = int(count) if count.isdigit() else int(head[2]) if head else 0
        if number > largest or (what == "k8s_insufficient_gpu" and number == largest):
            cause, largest = what, number
    if not parts:
        cause = "k8s_volume_failed" if "ersistent" in rest else "k8s_unschedulable"
    words = f"{head[1]}/{head[2]} nodes: {', '.join(parts)}" if head else _short(rest)
    return Trouble("Unschedulable", f"cannot be scheduled: {words}", (pod["metadata"]["name"],), cause)


def _short(text: Any, longest: int = 300) -> str:
    return " ".join(str(text or "").split())[:longest]


def _at(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def _ended_containers(status: Object) -> list[Object]:
    rows = [(row.get("state") or {}).get("terminated") for row in status.get("containerStatuses") or ()]
    return [row for row in rows if row]


def _exit_code(status: Object) -> int | None:
    return next((row["exitCode"] for row in _ended_containers(status) if row.get("exitCode")), None)


def _over_at(status: Object) -> str:
    return min((row.get("finishedAt") or "" for row in _ended_containers(status)), default="")


# --- one job ----------------------------------------------------------------------------------------


def kind_of(job: Object) -> Kind:
    return kinds.BY_KIND.get(str(job.get("kind")), kinds.KINDS["pytorchjob"])


def standing(job: Object) -> Status:
    """Where a job of any kind says that it stands."""
    status = job.get("status") or {}
    return parse_conditions(status) if kind_of(job).word == "pytorchjob" else parse_gang(status)


def parse_gang(status: Object) -> Status:
    """A JobSet, or the TrainJob around one: they say how they ended, and until then what their one Job is at."""
    true = {row.get("type", ""): row for row in status.get("conditions") or [] if row.get("status") == "True"}
    for word, found in (("Completed", State.COMPLETED), ("Complete", State.COMPLETED), ("Failed", State.FAILED)):
        if word in true:
            said = f"{word.lower()}: {true[word].get('message', '')}".rstrip(": ")
            return Status(found, said, 0 if found is State.COMPLETED else 1)
    if "Suspended" in true:
        return Status(State.PENDING, f"suspended: {true['Suspended'].get('message', '')}".rstrip(": "))
    rows = status.get("replicatedJobsStatus") or status.get("jobsStatus") or []
    if not rows:
        return Status(State.UNKNOWN, "the operator has not looked at the job yet")
    again = f", started again {status['restarts']} times" if status.get("restarts") else ""
    if any(row.get("ready") for row in rows):
        return Status(State.RUNNING, f"running: all pods are ready{again}")
    if any(row.get("suspended") for row in rows):
        return Status(State.PENDING, "suspended")
    return Status(State.PENDING, f"created: its pods are not ready yet{again}")


def parse_conditions(status: Object) -> Status:
    """The newest true condition of a PyTorchJob; none is UNKNOWN, a new one too."""
    states = {
        "Created": State.PENDING, "Running": State.RUNNING, "Restarting": State.RUNNING, "Suspended": State.PENDING,
        "Succeeded": State.COMPLETED, "Failed": State.FAILED,
    }  # fmt: skip
    true = [row for row in status.get("conditions") or [] if row.get("status") == "True"]
    if not true:
        return Status(State.UNKNOWN, "the operator has not looked at the job yet")
    last = true[-1]
    found = states.get(last.get("type", ""), State.UNKNOWN)
    code = 0 if found is State.COMPLETED else 1 if found is State.FAILED else None
    return Status(found, f"{last.get('type', '').lower()}: {last.get('message', '')}".rstrip(": "), code)


def judge(
    job: Object, pods: Sequence[Object], events: Sequence[Object] = (), *, now: float | None = None, queue: str = ""
) -> Status:
    """Where a job stands, and what keeps it: "3 of 8 pods cannot be scheduled: 0/12 nodes: ..."."""
    status = standing(job)
    name = job["metadata"]["name"]
    found = troubles(pods, events, job=name)
    if status.state is State.FAILED:
        return _why_failed(status, found)
    if status.state.over:
        return status
    total = kinds.nodes(job)
    if status.detail.startswith("suspended") and queue:
        return replace(status, detail=f"suspended: {queue}")
    said = [_counted(one, total) for one in found]
    gang = _partial(pods, total, now)
    if gang or said:
        stuck = any(one.stuck for one in found)
        head = "cannot start: " if stuck else ""
        detail = "; ".join([*([gang] if gang else []), *([head + said[0], *said[1:3]] if said else [])])
        return replace(status, detail=detail, stuck=stuck)
    return status


def _counted(one: Trouble, total: int) -> str:
    count = len(one.pods)
    if not count:
        return f"pods {one.words}"
    return f"{one.pods[0]} {one.words}" if count == 1 and total == 1 else f"{count} of {total} pods {one.words}"


def _partial(pods: Sequence[Object], total: int, now: float | None) -> str:
    """Some run, and have for longer than all need to come: they hold their GPUs for those that do not."""
    since = [
        _seconds(((row.get("state") or {}).get("running") or {}).get("startedAt"))
        for pod in pods
        for row in (pod.get("status") or {}).get("containerStatuses") or ()
    ]
    begun = [one for one in since if one is not None]
    over = sum((pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") for pod in pods)
    if now is None or not begun or over or len(begun) >= total or now - min(begun) <= JOIN:
        return ""
    minutes = (now - min(begun)) / 60
    return f"partial gang: {len(begun)} of {total} pods run for {minutes:.0f} min and wait for the others"


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def server_time(date: str) -> float | None:
    """Of an answer's Date header: this machine's clock is not the cluster's."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None


# What node/pod.py writes first into its termination log: the pod's own code says no more than "again" or "the end".
LAST = re.compile(r"attempt \d+ ended with (\d+)")


def _why_failed(status: Status, found: Sequence[Trouble]) -> Status:
    """With the exit code and the last words of the pod that failed first, where it is still there."""
    ended = [one for one in found if one.code]
    if not ended:
        lost = [one for one in found if one.cause in ENDED.values()]
        return replace(status, detail=f"{status.detail}; {lost[0].pods[0]} {lost[0].words}") if lost else status
    # a code of dslaunch's own says more than that of a pod which was ended because another one had failed
    last = min(ended, key=lambda one: ((one.code or 0) > 128 and not one.cause, one.at or "unknown", one.pods))
    told = LAST.search(last.words)
    return replace(
        status, detail=f"{status.detail}; {last.pods[0]} {last.words}", code=int(told[1]) if told else last.code
    )


# --- a namespace ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What was heard of one namespace. `told` is what was last said of each job."""

    jobs: Mapping[str, Object] = field(default_factory=dict)
    pods: Mapping[str, Object] = field(default_factory=dict)
    events: Mapping[str, Object] = field(default_factory=dict)
    told: Mapping[str, Status] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)  # kind -> why nothing is heard of it
    of: Kind = kinds.KINDS["pytorchjob"]


KINDS = ("jobs", "pods", "events")
Change = dict[str, Any]


def step(view: View, event: Mapping[str, Any]) -> tuple[View, list[Change]]:
    """One thing heard: {"kind": "pods", "type": "ADDED", "object": {...}}, and what it changes for whoever watches.

    Types are the API's, and LISTED (`items`: all there are, what is missing is gone), SILENT (`why`), HEARD.
    """
    kind, what = event["kind"], event["type"]
    if what == "SILENT":
        new = replace(view, silent={**view.silent, kind: event["why"]})
        return _tell(new, event) if kind == "jobs" else (new, [])
    silent = {name: why for name, why in view.silent.items() if name != kind}
    view = replace(view, silent=silent)
    if what in ("BOOKMARK", "HEARD"):
        return _tell(view, event)
    stored = dict(getattr(view, kind))
    if what == "LISTED":
        stored = {one["metadata"]["name"]: one for one in event["items"]}
    elif what == "DELETED":
        stored.pop(event["object"]["metadata"]["name"], None)
    elif what in ("ADDED", "MODIFIED"):
        one = event["object"]
        stored[one["metadata"]["name"]] = one
    changed: dict[str, Any] = {kind: stored}
    return _tell(replace(view, **changed), event)


def status_of(view: View, name: str, *, now: float | None = None) -> Status:
    if "jobs" in view.silent:
        return Status(State.UNKNOWN, view.silent["jobs"])
    job = view.jobs.get(name)
    if job is None:
        return Status(State.UNKNOWN, f"there is no {view.of.kind} {name}: deleted, or never created", absent=True)
    pods = [pod for pod in view.pods.values() if owner(pod) == name]
    return judge(job, pods, tuple(view.events.values()), now=now)


def owner(pod: Object) -> str:
    labels = pod["metadata"].get("labels") or {}
    return next((str(labels[name]) for name in OWNERS if name in labels), "")


def _tell(view: View, event: Mapping[str, Any]) -> tuple[View, list[Change]]:
    changes, told = [], dict(view.told)
    for name in {*view.jobs, *view.told}:
        status = status_of(view, name, now=event.get("now"))
        if told.get(name) != status:
            told[name] = status
            changes.append({"event": "state", "job": name, "state": status.state.value, "detail": status.detail})
    return replace(view, told=told), sorted(changes, key=lambda change: str(change["job"]))


# --- hearing of it ----------------------------------------------------------------------------------

QUIET = 300  # seconds that a watch is asked to last; bookmarks come every minute
PAUSES = (0.5, 30.0)  # seconds before asking again, doubled up to the second
TICK = 30.0  # seconds after which what only time changes is looked at again
SAID = 10.0  # seconds without an answer after which it is told: so often do those ask who only ask
LATE = 60.0  # seconds beyond QUIET after which a connection that says nothing is given up


def heard(
    namespace: str,
    kind: str,
    *,
    stop: Callable[[], bool],
    sleep: Callable[[float], object] = time.sleep,
    of: Kind = kinds.KINDS["pytorchjob"],
) -> Iterator[Change]:
    """Everything about jobs (of that kind), pods or events of a namespace, for ever: a list, then what changes.

    410 is a new list. 401 renews credentials, 429 and 5xx wait as asked or longer each time, a broken connection goes
    on at the version that was heard last: nothing is lost, nothing comes twice. Forbidden is said once, and it ends.
    """
    version, failed, since, down = "", 0, time.monotonic(), 0.0
    while not stop():
        try:
            if not version:
                items, version, date = api.ask(lambda library: api.listed(collection(library, namespace, kind, of)))
                yield {"kind": kind, "type": "LISTED", "items": items, "now": server_time(date)}
                failed, since = 0, time.monotonic()
            with contextlib.closing(_watch(namespace, kind, version, of)) as response:
                if failed:
                    yield {"kind": kind, "type": "HEARD"}
                failed, since = 0, time.monotonic()
                for line in api.lines(response):
                    event = json.loads(line)
                    one = event.get("object") or {}
                    if event.get("type") == "ERROR":
                        raise Told(one.get("code"), one.get("message") or "error")
                    version, since = str(one["metadata"]["resourceVersion"]), time.monotonic()
                    yield {"kind": kind, **event}
                    if stop():
                        return
        except Exception as error:
            if getattr(error, "status", None) == 410:
                version = ""
                continue
            if isinstance(error, UserError) and not isinstance(error, Unreachable):
                yield {"kind": kind, "type": "SILENT", "why": str(error)}
                return
            if not (isinstance(error, (Unreachable, Told, ValueError)) or api.away(error)):
                raise
            now = time.monotonic()
            down = down if failed else now
            failed += 1
            if now - down >= SAID:  # a connection ends now and then
                yield {"kind": kind, "type": "SILENT", "why": f"{api.words(error)}; heard {now - since:.0f} s ago"}
            pause = min(PAUSES[0] * 2.0 ** min(failed - 1, 10), PAUSES[1])
            sleep(max(pause, api.retry_after(error) or 0.0) * random.uniform(0.75, 1.25))  # noqa: S311


class Told(Exception):
    """An error that came within a stream, instead of a change."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


def collection(library: Any, namespace: str, kind: str, of: Kind = kinds.KINDS["pytorchjob"]) -> Callable[..., Any]:
    """What lists and watches one kind: our jobs, their pods, and whatever went wrong with anything."""
    objects, core = library.client.CustomObjectsApi(), library.client.CoreV1Api()
    if kind == "jobs":
        listing = partial(objects.list_namespaced_custom_object, of.group, of.version, namespace, of.plural)
        return partial(listing, label_selector=OWN)
    if kind == "pods":
        return partial(core.list_namespaced_pod, namespace, label_selector=OWN)
    return partial(core.list_namespaced_event, namespace, field_selector="type=Warning")


def _watch(namespace: str, kind: str, version: str, of: Kind) -> Any:
    return api.ask(
        lambda library: collection(library, namespace, kind, of)(
            watch=True, resource_version=version, allow_watch_bookmarks=True, timeout_seconds=QUIET,
            _preload_content=False, _request_timeout=(api.TIMEOUT[0], QUIET + LATE),
        )
    )  # fmt: skip


def changes(
    namespace: str, *, stop: Callable[[], bool] = lambda: False, of: Kind = kinds.KINDS["pytorchjob"]
) -> Iterator[Change]:
    """What becomes of every job of ours in a namespace, as it happens: three watches, whatever the number of runs."""
    queue: Queue[Any] = Queue(maxsize=1000)
    over = threading.Event()

    def ended() -> bool:
        return over.is_set() or stop()

    def listen(kind: str) -> None:
        try:
            for event in heard(namespace, kind, stop=ended, sleep=over.wait, of=of):
                queue.put(event)
        except Exception as error:
            queue.put(error)

    for kind in KINDS:
        threading.Thread(target=listen, args=(kind,), daemon=True).start()
    view, ahead, asked = View(of=of), None, time.monotonic()
    try:
        while not stop():
            try:
                event = queue.get(timeout=1.0)
            except Empty:
                if ahead is None or time.monotonic() - asked < TICK:
                    continue
                event = {"kind": "time", "type": "HEARD"}
            if isinstance(event, Exception):
                raise event
            if event.get("now"):
                ahead = event["now"] - time.monotonic()
            if ahead is not None:
                event["now"] = ahead + time.monotonic()
            asked = time.monotonic()
            view, said = step(view, event)
            yield from said
    finally:
        over.set()
