"""The API server: creating the job, and what becomes of it."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launcher import bundle as bundles
from launcher import runs
from launcher.backends import State, Status
from launcher.backends.kubernetes import api, output, watch
from launcher.backends.kubernetes.manifests import (
    COMPONENT,
    DIGEST,
    ENTRY,
    GROUP,
    MANAGED_BY,
    PLURAL,
    REASON,
    RUN,
    VERSION,
)
from launcher.diagnose import Evidence
from launcher.errors import Problem, Unreachable, UserError
from launcher.node import journal
from launcher.preflight import pods
from launcher.run import Run
from launcher.runs.logs import printable
from launcher.spec import JobSpec

UID, CANCELLED = "uid", "cancelled"  # files of the run: which job of that name is ours; that we deleted it
TIMEOUT = api.TIMEOUT
SETTLE = 2.0  # seconds; a request that comes in later still finds the name taken, or is found by it
WANTED = "training-operator 1.x, which serves kubeflow.org/v1"


def written(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The ConfigMaps and the job of a run directory."""
    import yaml

    text = (folder / ENTRY).read_text(encoding="utf-8")
    *config_maps, job = yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config_maps, job


def submit(folder: Path, spec: JobSpec, run: Run) -> str:
    """Create what is written there, or adopt it when exactly this job is in the cluster already. namespace/name.

    Done again after an answer that was lost, it finds its own: the name can be taken once, and the object says for
    which run it was made. What the cluster would refuse is refused before anything is created.
    """
    config_maps, job = marked(folder)
    return api.ask(lambda client: _submit(client, folder, config_maps, job))


def marked(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As written there, and each object with the run it is for; pods have it too, for their count of attempts."""
    config_maps, job = written(folder)
    mark = {RUN: folder.name}
    for one in (job, *config_maps, *(row["template"] for row in job["spec"]["pytorchReplicaSpecs"].values())):
        one["metadata"]["annotations"] = {**one["metadata"].get("annotations", {}), **mark}
    return config_maps, job


def _submit(client: Any, folder: Path, config_maps: Sequence[dict[str, Any]], job: dict[str, Any]) -> str:
    namespace = job["metadata"].get("namespace") or api.namespace()
    name = job["metadata"]["name"]
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    strict = {"field_validation": "Strict", "_request_timeout": TIMEOUT}  # an old operator's CRD would drop fields
    found = _get(objects, namespace, name)
    if found and _is_done_checking(found):
        found = _remove(objects, namespace, name)
    if found is None:
        _would_be_taken(client, namespace, job)
        new = [row["metadata"]["name"] for row in config_maps if _put_config_map(core, namespace, row)]
        try:
            found = objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job, **strict)
        except client.client.ApiException as error:
            if error.status != 409:
                for bundle in new if 400 <= (error.status or 0) < 500 and not api.away(error) else ():
                    with contextlib.suppress(client.client.ApiException):
                        core.delete_namespaced_config_map(bundle, namespace, _request_timeout=TIMEOUT)
                raise
            found = _get(objects, namespace, name)
    how = _is_this(found or {}, job, namespace)
    with contextlib.suppress(FileNotFoundError):
        (folder / UID).unlink()
    bundles.write_private(folder / UID, str(found["metadata"].get("uid", "")) if found else "")
    if how:
        journal.append(folder, "adopted", job=f"{namespace}/{name}", why=how)
    return f"{namespace}/{name}"


def look_up(folder: Path, run: Run) -> list[tuple[str, bool]]:
    """The job of this run, by its name and what it says it is for, and whether its pods were seen to run.

    Empty: the cluster answered, and has no such job. Raises Unreachable when nobody answers.
    """
    _, job = written(folder)

    def look(client: Any) -> list[tuple[str, bool]]:
        namespace = job["metadata"].get("namespace") or api.namespace()
        found = _get(client.client.CustomObjectsApi(), namespace, job["metadata"]["name"])
        if not found or (found["metadata"].get("annotations") or {}).get(RUN) != folder.name:
            return []
        path = folder / UID
        if not path.exists():
            bundles.write_private(path, str(found["metadata"].get("uid", "")))
        started = any(row.get("type") == "Running" for row in (found.get("status") or {}).get("conditions") or ())
        return [(f"{namespace}/{job['metadata']['name']}", started)]

    return api.ask(look)


# What a Pod is refused for by admission, and not because this user may not create pods.
ADMISSION = (
    "exceeded quota",
    "violates PodSecurity",
    "admission webhook",
    " usage per ",
    "is forbidden: no ",
    "must specify",
)


def _would_be_taken(client: Any, namespace: str, job: dict[str, Any]) -> None:
    """Ask with dryRun: about the job, and about one of its pods, whose quota, limits and policies count later."""
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    tried = {"dry_run": "All", "field_validation": "Strict", "_request_timeout": TIMEOUT}
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    name = {**template["metadata"], "generateName": f"{job['metadata']['name']}-"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": name,
        "spec": {**template["spec"], "restartPolicy": "Never"},
    }
    try:
        objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, copy.deepcopy(job), **tried)
    except client.client.ApiException as error:
        if error.status == 404 and "namespaces" not in api.words(error):
            raise UserError(_no_operator(client, api.words(error))) from None
        if error.status != 409 and "dry run" not in api.words(error):  # a webhook that cannot: the real one will tell
            raise
    try:
        core.create_namespaced_pod(namespace, pod, **tried)
    except client.client.ApiException as error:
        said = api.words(error)
        if error.status in (400, 422) or (error.status == 403 and any(part in said for part in ADMISSION)):
            raise


def _no_operator(client: Any, said: str) -> Problem:
    """Which versions there are, and which one it takes."""
    try:
        groups = client.client.ApisApi().get_api_versions(_request_timeout=TIMEOUT).groups
    except client.client.ApiException:
        groups = []
    versions = {group.name: [one.version for one in group.versions] for group in groups or ()}
    wanted = f"PyTorchJob {GROUP}/{VERSION}"
    if GROUP in versions:
        there = f"it serves {GROUP}/{', '.join(versions[GROUP])} without PyTorchJobs of {VERSION}"
    elif "trainer.kubeflow.org" in versions:
        there = f"it has Trainer 2 (trainer.kubeflow.org/{', '.join(versions['trainer.kubeflow.org'])})"
    else:
        there = f"there is no {GROUP} at all" if versions else f"404: {said}"
    hint = f"{WANTED}; kubectl get crd pytorchjobs.kubeflow.org shows it"
    return Problem(f"the cluster has no {wanted}: {there}", hint, ("kubernetes",))


def _is_done_checking(found: dict[str, Any]) -> bool:
    """An earlier preflight of ours: its verdict is told, and nodes are checked more than once."""
    labels = found["metadata"].get("labels") or {}
    ours = labels.get(MANAGED_BY) == "dslaunch" and labels.get(COMPONENT) == "preflight"
    return ours and watch.parse_conditions(found.get("status") or {}).state.over


def _remove(objects: Any, namespace: str, name: str) -> dict[str, Any] | None:
    """Delete the job and wait for its pods to go, whose names the next one's will have. What is left of it."""
    objects.delete_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL, name, propagation_policy="Foreground", _request_timeout=TIMEOUT
    )
    until = time.monotonic() + 60
    while (found := _get(objects, namespace, name)) and time.monotonic() < until:
        time.sleep(1)
    return found


def _is_this(found: dict[str, Any], job: dict[str, Any], namespace: str) -> str:
    """Empty when it is this run's; else who made this very job. Raises UserError when it is another job, or over."""
    name = job["metadata"]["name"]
    delete = f"kubectl delete pytorchjob {name} -n {namespace}"
    annotations = found.get("metadata", {}).get("annotations") or {}
    mine = job["metadata"]["annotations"]
    if annotations.get(RUN) == mine[RUN]:
        return ""
    who = f"run {annotations[RUN]}" if annotations.get(RUN) else "kubectl"
    if annotations.get(DIGEST) != mine[DIGEST]:
        by = f"run {annotations[RUN]}" if annotations.get(RUN) else "something that is not dslaunch"
        message = f"{namespace} has another PyTorchJob `{name}`: the name is taken by {by}"
        raise UserError(Problem(message, f"another name, or {delete}", ("name",)))
    status = watch.parse_conditions(found.get("status") or {})
    if status.state.over:
        message = f"{namespace} has this very PyTorchJob `{name}`, and it is over: {status.detail}"
        raise UserError(Problem(message, f"to run it again, {delete}", ("name",)))
    return f"{who} created this very job"


def _put_config_map(core: Any, namespace: str, config_map: dict[str, Any]) -> bool:
    """Whether it is new. No job uses it at this point, so what an earlier run left is replaced."""
    name = config_map["metadata"]["name"]
    options = {"field_validation": "Strict", "_request_timeout": TIMEOUT}
    try:
        core.create_namespaced_config_map(namespace, config_map, **options)
    except Exception as error:
        if getattr(error, "status", None) != 409:
            raise
        found = core.read_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT)
        if (found.metadata.labels or {}).get(MANAGED_BY) != "dslaunch":
            hint = f"another name, or kubectl delete configmap {name} -n {namespace}"
            raise UserError(
                Problem(f"{namespace} has a ConfigMap `{name}` that is not ours", hint, ("name",))
            ) from None
        core.replace_namespaced_config_map(name, namespace, config_map, **options)
        return False
    return True


def _get(objects: Any, namespace: str, name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = objects.get_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, name, _request_timeout=TIMEOUT
        )
    except Exception as error:
        if getattr(error, "status", None) == 404:
            return None
        raise
    return found


def _ours(record: runs.Record, found: dict[str, Any]) -> bool:
    """A job of another run may have the name by now."""
    try:
        uid = (record.folder / UID).read_text()
    except OSError:
        return True
    return not uid or found["metadata"].get("uid") == uid


def _look(objects: Any, record: runs.Record) -> tuple[dict[str, Any] | None, str]:
    """The run's job, or why it is not there."""
    namespace, _, name = record.job.partition("/")
    found = _get(objects, namespace, name)
    if found is None:
        return None, f"there is no PyTorchJob {name} in {namespace}: deleted, or never created"
    if not _ours(record, found):
        return None, f"the PyTorchJob {name} in {namespace} is another run's: this one was deleted"
    return found, ""


def state(record: runs.Record, run: Run) -> Status:
    return states([record], run)[record.id]


def states(records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """By the run's id. One job is asked for by its name; of several, each namespace has three questions."""
    found: dict[str, Status] = {}
    by_namespace: dict[str, list[runs.Record]] = {}
    for record in records:
        by_namespace.setdefault(record.job.partition("/")[0], []).append(record)
    for namespace, group in by_namespace.items():
        try:
            found |= _states(namespace, group)
        except Unreachable as error:
            found |= {record.id: Status(State.UNKNOWN, str(error)) for record in group}
    return found


def _states(namespace: str, records: Sequence[runs.Record]) -> dict[str, Status]:
    def look(client: Any) -> tuple[dict[str, Any], str]:
        objects = client.client.CustomObjectsApi()
        if len(records) == 1:
            one = _get(objects, namespace, records[0].job.partition("/")[2])
            return ({one["metadata"]["name"]: one} if one else {}), ""
        items, _, date = api.listed(watch.collection(client, namespace, "jobs"))
        return {one["metadata"]["name"]: one for one in items}, date

    jobs, date = api.ask(look)
    found: dict[str, Status] = {}
    there: dict[str, dict[str, Any]] = {}
    for record in records:
        name = record.job.partition("/")[2]
        job = jobs.get(name)
        if job and _ours(record, job):
            there[record.id] = job
        elif (record.folder / CANCELLED).exists():
            found[record.id] = Status(State.CANCELLED, "cancelled: the PyTorchJob is deleted")
        else:
            found[record.id] = Status(State.UNKNOWN, _gone(namespace, name, bool(job)), absent=True)
    alone = next(iter(there.values()))["metadata"]["name"] if len(records) == 1 and there else ""
    asked = [
        one for one in there.values() if watch.parse_conditions(one.get("status") or {}).state is not State.COMPLETED
    ]
    around, events, date = _around(namespace, alone, date) if asked else ([], [], date)
    for run_id, job in there.items():
        name = job["metadata"]["name"]
        mine = [pod for pod in around if alone or watch.owner(pod) == name]
        queue = _queue(namespace, job)
        found[run_id] = watch.judge(job, mine, events, now=watch.server_time(date), queue=queue)
    return found


def _around(namespace: str, alone: str, date: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Pods and warnings; without them the job's own conditions are what is left."""

    def pods_of(client: Any) -> tuple[list[dict[str, Any]], str, str]:
        core = client.client.CoreV1Api()
        selector = f"{watch.JOB_NAME}={alone}" if alone else watch.OWN
        return api.listed(core.list_namespaced_pod, namespace, label_selector=selector)

    found: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    with contextlib.suppress(UserError):
        found, _, date = api.ask(pods_of)
        events = api.ask(lambda client: api.listed(watch.collection(client, namespace, "events")))[0]
    return found, events, date


def _queue(namespace: str, job: dict[str, Any]) -> str:
    """What Kueue says about a job that it holds back; empty where it does not, or we may not ask."""
    queue = (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
    held = watch.parse_conditions(job.get("status") or {}).detail.startswith("suspended")
    if not queue or not held:
        return ""

    def look(client: Any) -> str:
        objects = client.client.CustomObjectsApi()
        for version in ("v1beta2", "v1beta1"):
            try:
                items, *_ = api.listed(
                    objects.list_namespaced_custom_object, "kueue.x-k8s.io", version, namespace, "workloads"
                )
            except client.client.ApiException as error:
                if error.status == 404:
                    continue
                raise
            break
        else:
            return ""
        for one in items:
            if any(
                ref.get("uid") == job["metadata"].get("uid") for ref in one["metadata"].get("ownerReferences") or ()
            ):
                rows = {row["type"]: row for row in (one.get("status") or {}).get("conditions") or ()}
                row = rows.get("QuotaReserved") or rows.get("Evicted") or {}
                place = _position(objects, namespace, queue, one["metadata"]["name"])
                return f"waits in queue {queue}{place}: {row.get('message') or 'Kueue has not looked at it yet'}"
        return f"Kueue has no Workload for it: is there a LocalQueue {queue}, and does it look after PyTorchJobs?"

    with contextlib.suppress(UserError):
        return api.ask(look)
    return ""


def _position(objects: Any, namespace: str, queue: str, workload: str) -> str:
    """ ", third"-like: ", place 3"; Kueue's visibility API is not on everywhere."""
    with contextlib.suppress(Exception):
        where = ("visibility.kueue.x-k8s.io", "v1beta1", namespace, "localqueues", f"{queue}/pendingworkloads")
        found = objects.get_namespaced_custom_object(*where, _request_timeout=TIMEOUT)
        for one in found["items"]:
            if one["metadata"]["name"] == workload:
                return f", place {one['positionInLocalQueue'] + 1}"
    return ""


def _gone(namespace: str, name: str, other: bool) -> str:
    if other:
        return f"the PyTorchJob {name} in {namespace} is another run's: this one was deleted"
    return f"there is no PyTorchJob {name} in {namespace}: deleted, or never created"


def changes(records: Sequence[runs.Record], run: Run) -> Iterator[dict[str, Any]]:
    """{"event": "state", "run": id, "state": , "detail": }, as it happens, for runs of one namespace."""
    (namespace,) = {record.job.partition("/")[0] for record in records}
    names = {record.job.partition("/")[2]: record.id for record in records}
    for change in watch.changes(namespace):
        if change["job"] in names:
            yield {**change, "run": names[change["job"]]}


def evidence(record: runs.Record, run: Run) -> tuple[Evidence, list[watch.Trouble]]:
    """What the cluster knows of why a run fails or waits, in a diagnosis' words; and each trouble by itself."""
    namespace, _, name = record.job.partition("/")
    around, events, _ = _around(namespace, name, "")
    found = watch.troubles(around, events, job=name)
    worst = next((one for one in found if one.cause), None)
    nodes = [str((pod.get("spec") or {}).get("nodeName") or "") for pod in around]
    killed = [node for one in found if one.cause == "k8s_oomkilled" for node in one.nodes]
    return Evidence(
        state=worst.reason if worst else "",
        code=next((one.code for one in found if one.code), None),
        oom_kills={node: killed.count(node) for node in killed},
        down=tuple(node for one in found if one.cause == "k8s_node_not_ready" for node in one.nodes),
        hosts=tuple(node for node in nodes if node),
    ), found


def logs(record: runs.Record, *, rank: int | None, follow: bool, run: Run) -> Iterator[str]:
    """Of all pods in time order; of one rank the lines that its pod marks `[rank N]`, without the mark."""
    namespace, _, name = record.job.partition("/")
    per_node = record.extra["per_node"]
    job, why = api.ask(lambda client: _look(client.client.CustomObjectsApi(), record))
    if job is None:
        raise UserError(Problem(why))
    total = sum(row.get("replicas", 1) for row in job["spec"]["pytorchReplicaSpecs"].values())
    node = (rank or 0) // per_node
    if node >= total:
        raise UserError(Problem(f"no rank {rank}: the job has 0 to {total * per_node - 1}"))
    names = [_pod(name, index) for index in (range(total) if rank is None else (node,))]
    mark = "" if rank is None else f"[rank {rank}] "
    over = watch.parse_conditions(job.get("status") or {}).state.over
    try:
        if follow and not over:
            found = output.followed(namespace, names, lambda: state(record, run).state.over)
        else:
            found = output.merged(namespace, names)
        for raw in found:
            line = printable(raw)
            if line.startswith(mark):
                yield line.removeprefix(mark)
    except output.Nothing as error:
        hint = "the operator ends pods when a job is over" if over else "-f waits for it"
        which = f"pod {names[0]}" if len(names) == 1 else f"any of the {len(names)} pods of {name}"
        raise UserError(Problem(f"no log of {which} in {namespace}: {error}", hint)) from None


def _pod(name: str, node: int) -> str:
    return f"{name}-worker-{node - 1}" if node else f"{name}-master-0"


def events(record: runs.Record, run: Run) -> Iterator[dict[str, Any]]:
    """What the preflight tells on its way, and where its job stands, every two seconds. Ends when it is over."""
    told = 0
    while True:
        status = state(record, run)
        if status.absent:
            status = Status(State.CANCELLED, status.detail)
        yield {"event": "state", "detail": status.detail}
        lines = _first_log(record, run)
        progress = [line for line in lines if line.startswith(pods.PROGRESS)]
        for line in progress[told:]:
            try:
                event = json.loads(line.removeprefix(pods.PROGRESS))
            except ValueError:
                if line is lines[-1]:  # the rest of it is still on its way
                    break
            else:
                yield event
            told += 1
        if _keep_verdict(record, lines) or status.state.over:
            return
        time.sleep(2)


def verdict(record: runs.Record, run: Run) -> dict[str, Any] | None:
    """Out of the first pod's log, once; the run directory has it from then on."""
    return runs.verdict(record) or _keep_verdict(record, _first_log(record, run))


def _first_log(record: runs.Record, run: Run) -> list[str]:
    """As far as there is one: a pod that waits for its image has none, and one that is deleted neither."""
    with contextlib.suppress(UserError):
        namespace, _, name = record.job.partition("/")
        with contextlib.suppress(output.Nothing):
            return [printable(raw) for raw in output.merged(namespace, [_pod(name, 0)])]
    return []


def _keep_verdict(record: runs.Record, lines: Sequence[str]) -> dict[str, Any] | None:
    for line in lines:
        if line.startswith(pods.VERDICT):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line.removeprefix(pods.VERDICT))
                path = record.folder / "preflight" / "verdict.json"
                path.parent.mkdir(mode=0o700, exist_ok=True)
                bundles.write_text(path, json.dumps(found, indent=1) + "\n")
                return found
    return None


def drain(nodes: Mapping[str, str], run: Run) -> list[str]:
    """Cordon these nodes, each with its reason: no new pods, those that run stay. What did not work, as sentences."""
    reasons: dict[str, str] = {}
    said = []
    for name, reason in nodes.items():
        if node := pods.node(name):
            reasons.setdefault(node, reason)
        else:
            said.append(f"{name} never said on which node it runs: nothing is cordoned for it")
    for node, reason in reasons.items():
        why = {"annotations": {REASON: f"dslaunch preflight: {reason}"}}
        patch = partial(_patch, node, {"metadata": why, "spec": {"unschedulable": True}})
        try:
            api.ask(patch)
        except UserError as error:
            said += [f"{node} is not cordoned: {problem.message}" for problem in error.problems]
    return said


def _patch(node: str, change: dict[str, Any], client: Any) -> None:
    client.client.CoreV1Api().patch_node(node, change, _request_timeout=TIMEOUT)


def cancel(record: runs.Record, run: Run) -> None:
    """All objects go; what is gone already is no mistake."""
    namespace, _, name = record.job.partition("/")
    config_maps, _ = written(record.folder)

    def end(client: Any) -> None:
        objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
        found = _get(objects, namespace, name)
        if found and not _ours(record, found):
            raise UserError(Problem(f"the PyTorchJob {name} in {namespace} is another run's: nothing was deleted"))
        for delete, where in (
            (objects.delete_namespaced_custom_object, (GROUP, VERSION, namespace, PLURAL, name)),
            *((core.delete_namespaced_config_map, (row["metadata"]["name"], namespace)) for row in config_maps),
        ):
            try:
                delete(*where, _request_timeout=TIMEOUT)
            except client.client.ApiException as error:
                if error.status != 404:
                    raise

    api.ask(end)
    (record.folder / CANCELLED).touch(mode=0o600)
