"""The API server: creating the job, and what becomes of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

from launcher import bundle as bundles
from launcher import runs, yamldoc
from launcher.backends import State, Status
from launcher.backends.kubernetes import api, kinds, output, watch
from launcher.backends.kubernetes.kinds import Kind
from launcher.backends.kubernetes.manifests import COMPONENT, DIGEST, ENTRY, MANAGED_BY, REASON, RUN
from launcher.backends.kubernetes.watch import kind_of
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
GROUPS = "podgroups"  # their plural, whoever serves them
INDEX = "batch.kubernetes.io/job-completion-index"  # label of the pods of a Job


def written(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The job of a run directory, and what has to be there before it: ConfigMaps, and a PodGroup."""
    import yaml

    text = (folder / ENTRY).read_text(encoding="utf-8")
    *before, job = yaml.load_all(text, Loader=yamldoc.loader())
    return before, job


def kind_in(folder: Path) -> Kind:
    """Of the job that is written there, without reading all of it as YAML."""
    with contextlib.suppress(OSError):
        found = re.findall(r"^kind: (\w+)$", (folder / ENTRY).read_text(encoding="utf-8"), re.MULTILINE)
        if found and found[-1] in kinds.BY_KIND:
            return kinds.BY_KIND[found[-1]]
    return kinds.KINDS["pytorchjob"]


def submit(folder: Path, spec: JobSpec, run: Run) -> str:
    """Create what is written there, or adopt it when exactly this job is in the cluster already. namespace/name.

    Done again after an answer that was lost, it finds its own: the name can be taken once, and the object says for
    which run it was made. What the cluster would refuse is refused before anything is created.
    """
    before, job = marked(folder)
    return api.ask(lambda client: _submit(client, folder, before, job))


def marked(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As written there, and each object with the run it is for; pods have it too, for their count of attempts.

    ConfigMaps are called by what is in them, demo-bundle-1f2e3d4c: two jobs of one name never share their scripts.
    """
    before, job = written(folder)
    names = {}
    for one in before:
        if one["kind"] == "ConfigMap":
            content = json.dumps([one.get("data"), one.get("binaryData")], sort_keys=True)
            name = one["metadata"]["name"]
            names[name] = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
            one["metadata"]["name"] = names[name]
    for template in kinds.templates(job):
        for source in _sources(template):
            source["name"] = names.get(source["name"], source["name"])
    mark = {RUN: folder.name}
    for one in (job, *before, *kinds.templates(job)):
        one["metadata"]["annotations"] = {**one["metadata"].get("annotations", {}), **mark}
    return before, job


def _sources(template: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The ConfigMaps that a pod mounts."""
    for volume in template["spec"].get("volumes", []):
        yield from (one["configMap"] for one in volume.get("projected", {}).get("sources", []) if "configMap" in one)


def _submit(client: Any, folder: Path, before: Sequence[dict[str, Any]], job: dict[str, Any]) -> str:
    namespace = job["metadata"].get("namespace") or api.namespace()
    name, kind = job["metadata"]["name"], kind_of(job)
    objects = client.client.CustomObjectsApi()
    strict = {"field_validation": "Strict", "_request_timeout": TIMEOUT}  # an old operator's CRD would drop fields
    found = _get(objects, namespace, name, kind)
    if found and _is_done_checking(found):
        found = _remove(objects, namespace, name, kind)
    new: list[dict[str, Any]] = []
    if found is None:
        _would_be_taken(client, namespace, job)
        try:
            new += [row for row in before if _put(client, namespace, row)]
            found = objects.create_namespaced_custom_object(
                kind.group, kind.version, namespace, kind.plural, job, **strict
            )
            _belong(client, namespace, before, found)
        except client.client.ApiException as error:
            if error.status != 409:
                if 400 <= (error.status or 0) < 500 and not api.away(error):
                    _take_back(client, namespace, new)
                raise
            found = _get(objects, namespace, name, kind)
    try:
        how = _is_this(found or {}, job, namespace)
    except UserError:
        used = {source["name"] for template in kinds.templates(found or job) for source in _sources(template)}
        _take_back(client, namespace, [row for row in new if row["metadata"]["name"] not in used])
        raise
    with contextlib.suppress(FileNotFoundError):
        (folder / UID).unlink()
    bundles.write_private(folder / UID, str(found["metadata"].get("uid", "")) if found else "")
    if how:
        journal.append(folder, "adopted", job=f"{namespace}/{name}", why=how)
    return f"{namespace}/{name}"


def _take_back(client: Any, namespace: str, documents: Sequence[dict[str, Any]]) -> None:
    for one in documents:
        with contextlib.suppress(client.client.ApiException):
            _delete(client, namespace, one)


def _belong(client: Any, namespace: str, before: Sequence[dict[str, Any]], job: dict[str, Any]) -> None:
    """So that kubectl delete, and a ttl, take the ConfigMaps along. Whoever may not say so deletes them himself."""
    whose = {key: job.get(key) for key in ("apiVersion", "kind")}
    owner = {**whose, "name": job["metadata"]["name"], "uid": job["metadata"].get("uid", "")}
    for one in before if owner["uid"] and owner["apiVersion"] else ():
        if one["kind"] == "ConfigMap":
            with contextlib.suppress(UserError, client.client.ApiException):
                change = {"metadata": {"ownerReferences": [owner]}}
                client.client.CoreV1Api().patch_namespaced_config_map(
                    one["metadata"]["name"], namespace, change, _request_timeout=TIMEOUT
                )


def look_up(folder: Path, run: Run) -> list[tuple[str, bool]]:
    """The job of this run, by its name and what it says it is for, and whether its pods were seen to run.

    Empty: the cluster answered, and has no such job. Raises Unreachable when nobody answers.
    """
    _, job = written(folder)

    def look(client: Any) -> list[tuple[str, bool]]:
        namespace = job["metadata"].get("namespace") or api.namespace()
        found = _get(client.client.CustomObjectsApi(), namespace, job["metadata"]["name"], kind_of(job))
        if not found or (found["metadata"].get("annotations") or {}).get(RUN) != folder.name:
            return []
        path = folder / UID
        if not path.exists():
            bundles.write_private(path, str(found["metadata"].get("uid", "")))
        said = (found.get("status") or {}).get("conditions") or ()
        started = any(row.get("type") == "Running" for row in said) or watch.standing(found).state is State.RUNNING
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
    objects, kind = client.client.CustomObjectsApi(), kind_of(job)
    tried = {"dry_run": "All", "field_validation": "Strict", "_request_timeout": TIMEOUT}
    where = (kind.group, kind.version, namespace, kind.plural)
    try:
        objects.create_namespaced_custom_object(*where, copy.deepcopy(job), **tried)
    except client.client.ApiException as error:
        if error.status == 404 and "namespaces" not in api.words(error):
            raise UserError(_no_operator(client, kind, api.words(error))) from None
        if error.status != 409 and "dry run" not in api.words(error):  # a webhook that cannot: the real one will tell
            raise
    if "trainer" not in job["spec"]:  # the rest of a TrainJob's pod is its runtime's
        _pod_would_be_taken(client, namespace, job)


def _pod_would_be_taken(client: Any, namespace: str, job: dict[str, Any]) -> None:
    tried = {"dry_run": "All", "field_validation": "Strict", "_request_timeout": TIMEOUT}
    template = kinds.templates(job)[0]
    metadata = {**template["metadata"], "generateName": f"{job['metadata']['name']}-"}
    content = {**template["spec"], "restartPolicy": "Never"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": content}
    try:
        client.client.CoreV1Api().create_namespaced_pod(namespace, pod, **tried)
    except client.client.ApiException as error:
        said = api.words(error)
        if error.status in (400, 422) or (error.status == 403 and any(part in said for part in ADMISSION)):
            raise


def validate(text: str) -> list[Problem]:
    """What the cluster would refuse of these manifests: a strict dry run of each, and of one of the pods.

    Empty: it would take all of them. Nothing is created. Raises UserError where there is no cluster to ask.
    """
    import yaml

    documents = list(yaml.load_all(text, Loader=yamldoc.loader()))
    return api.ask(lambda client: _refused(client, documents))


def _refused(client: Any, documents: Sequence[dict[str, Any]]) -> list[Problem]:
    found: list[Problem] = []
    for one in documents:
        namespace = one["metadata"].get("namespace") or api.namespace()
        try:
            if one["kind"] in kinds.BY_KIND:
                _would_be_taken(client, namespace, one)
            else:
                _create(client, namespace, one, dry_run="All")
        except client.client.ApiException as error:
            if api.away(error):
                raise
            if error.status == 404 and one["kind"] == "PodGroup":
                found.append(_no_groups(one))
            elif error.status != 409:  # there already, and would be replaced
                found.append(api.refusal(error))
        except Unreachable:
            raise
        except UserError as error:
            found += error.problems
    return list(dict.fromkeys(found))


def _no_groups(group: Mapping[str, Any]) -> Problem:
    message = f"the cluster has no PodGroup {group['apiVersion']}"
    hint = "is that scheduler installed? kubectl get crd shows it; or leave gang.by out"
    return Problem(message, hint, ("kubernetes", "gang", "by"))


def _no_operator(client: Any, kind: Kind, said: str) -> Problem:
    """Which versions there are, and which one it takes."""
    try:
        groups = client.client.ApisApi().get_api_versions(_request_timeout=TIMEOUT).groups
    except client.client.ApiException:
        groups = []
    versions = {group.name: [one.version for one in group.versions] for group in groups or ()}
    wanted, group = f"{kind.kind} {kind.api}", kind.group
    others = [row for row in kinds.KINDS.values() if row.group in versions and row is not kind]
    if group in versions:
        there = f"it serves {group}/{', '.join(versions[group])} without {kind.kind}s of {kind.version}"
    elif others:
        served = [f"{row.kind}s ({row.group}/{', '.join(versions[row.group])})" for row in others]
        there = f"it has {' and '.join(served)}"
    else:
        there = f"there is no {group} at all" if versions else f"404: {said}"
    hint = f"{kind.served_by}; kubectl get crd {kind.plural}.{group} shows it"
    if group not in versions and others:
        hint += f"; or kubernetes.kind: {others[0].word}"
    return Problem(f"the cluster has no {wanted}: {there}", hint, ("kubernetes",))


def _is_done_checking(found: dict[str, Any]) -> bool:
    """An earlier preflight of ours: its verdict is told, and nodes are checked more than once."""
    labels = found["metadata"].get("labels") or {}
    ours = labels.get(MANAGED_BY) == "dslaunch" and labels.get(COMPONENT) == "preflight"
    return ours and watch.standing(found).state.over


def _remove(objects: Any, namespace: str, name: str, kind: Kind) -> dict[str, Any] | None:
    """Delete the job and wait for its pods to go, whose names the next one's will have. What is left of it."""
    objects.delete_namespaced_custom_object(
        kind.group, kind.version, namespace, kind.plural, name,
        propagation_policy="Foreground", _request_timeout=TIMEOUT,
    )  # fmt: skip
    until = time.monotonic() + 60
    while (found := _get(objects, namespace, name, kind)) and time.monotonic() < until:
        time.sleep(1)
    return found


def _is_this(found: dict[str, Any], job: dict[str, Any], namespace: str) -> str:
    """Empty when it is this run's; else who made this very job. Raises UserError when it is another job, or over."""
    name, kind = job["metadata"]["name"], kind_of(job)
    delete = f"kubectl delete {kind.word} {name} -n {namespace}"
    annotations = found.get("metadata", {}).get("annotations") or {}
    mine = job["metadata"]["annotations"]
    if annotations.get(RUN) == mine[RUN]:
        return ""
    who = f"run {annotations[RUN]}" if annotations.get(RUN) else "kubectl"
    if annotations.get(DIGEST) != mine[DIGEST]:
        by = f"run {annotations[RUN]}" if annotations.get(RUN) else "something that is not dslaunch"
        message = f"{namespace} has another {kind.kind} `{name}`: the name is taken by {by}"
        raise UserError(Problem(message, f"another name, or {delete}", ("name",)))
    status = watch.standing(found)
    if status.state.over:
        message = f"{namespace} has this very {kind.kind} `{name}`, and it is over: {status.detail}"
        raise UserError(Problem(message, f"to run it again, {delete}", ("name",)))
    return f"{who} created this very job"


def _put(client: Any, namespace: str, document: dict[str, Any]) -> bool:
    """Whether it is new."""
    if document["kind"] == "ConfigMap":
        return _put_config_map(client.client.CoreV1Api(), namespace, document)
    try:
        _create(client, namespace, document)
    except client.client.ApiException as error:
        if error.status == 404:
            raise UserError(_no_groups(document)) from None
        if error.status != 409:
            raise
        objects, (group, _, version) = client.client.CustomObjectsApi(), document["apiVersion"].partition("/")
        where = (group, version, namespace, GROUPS, document["metadata"]["name"])
        found = objects.get_namespaced_custom_object(*where, _request_timeout=TIMEOUT)
        if (found["metadata"].get("labels") or {}).get(MANAGED_BY) != "dslaunch":
            hint = f"another name, or kubectl delete podgroup {where[-1]} -n {namespace}"
            message = f"{namespace} has a PodGroup `{where[-1]}` that is not ours"
            raise UserError(Problem(message, hint, ("name",))) from None
        objects.patch_namespaced_custom_object(*where, {"spec": document["spec"]}, _request_timeout=TIMEOUT)
        return False
    return True


def _create(client: Any, namespace: str, document: dict[str, Any], **options: Any) -> None:
    """A ConfigMap or a PodGroup."""
    options = {"field_validation": "Strict", "_request_timeout": TIMEOUT, **options}
    if document["kind"] == "ConfigMap":
        client.client.CoreV1Api().create_namespaced_config_map(namespace, document, **options)
    else:
        group, _, version = document["apiVersion"].partition("/")
        objects = client.client.CustomObjectsApi()
        objects.create_namespaced_custom_object(group, version, namespace, GROUPS, document, **options)


def _delete(client: Any, namespace: str, document: dict[str, Any]) -> None:
    name = document["metadata"]["name"]
    if document["kind"] == "ConfigMap":
        client.client.CoreV1Api().delete_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT)
        return
    group, _, version = document["apiVersion"].partition("/")
    plural = kinds.BY_KIND[document["kind"]].plural if document["kind"] in kinds.BY_KIND else GROUPS
    objects = client.client.CustomObjectsApi()
    objects.delete_namespaced_custom_object(group, version, namespace, plural, name, _request_timeout=TIMEOUT)


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


def _get(objects: Any, namespace: str, name: str, kind: Kind = kinds.KINDS["pytorchjob"]) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = objects.get_namespaced_custom_object(
            kind.group, kind.version, namespace, kind.plural, name, _request_timeout=TIMEOUT
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
    kind = kind_in(record.folder)
    found = _get(objects, namespace, name, kind)
    if found is None or not _ours(record, found):
        return None, _gone(namespace, name, bool(found), kind)
    return found, ""


def state(record: runs.Record, run: Run) -> Status:
    return states([record], run)[record.id]


def states(records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """By the run's id. One job is asked for by its name; of several, each namespace has three questions."""
    found: dict[str, Status] = {}
    groups: dict[tuple[str, str], list[runs.Record]] = {}
    for record in records:
        groups.setdefault((record.job.partition("/")[0], kind_in(record.folder).word), []).append(record)
    for (namespace, word), group in groups.items():
        try:
            found |= _states(namespace, group, kinds.KINDS[word])
        except Unreachable as error:
            found |= {record.id: Status(State.UNKNOWN, str(error)) for record in group}
    return found


def _states(namespace: str, records: Sequence[runs.Record], kind: Kind) -> dict[str, Status]:
    def look(client: Any) -> tuple[dict[str, Any], str]:
        objects = client.client.CustomObjectsApi()
        if len(records) == 1:
            one = _get(objects, namespace, records[0].job.partition("/")[2], kind)
            return ({one["metadata"]["name"]: one} if one else {}), ""
        items, _, date = api.listed(watch.collection(client, namespace, "jobs", kind))
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
            found[record.id] = Status(State.CANCELLED, f"cancelled: the {kind.kind} is deleted")
        else:
            found[record.id] = Status(State.UNKNOWN, _gone(namespace, name, bool(job), kind), absent=True)
    alone = next(iter(there.values()))["metadata"]["name"] if len(records) == 1 and there else ""
    asked = [one for one in there.values() if watch.standing(one).state is not State.COMPLETED]
    around, events, date = _around(namespace, alone, date, kind) if asked else ([], [], date)
    for run_id, job in there.items():
        name = job["metadata"]["name"]
        mine = [pod for pod in around if alone or watch.owner(pod) == name]
        queue = _queue(namespace, job)
        found[run_id] = watch.judge(job, mine, events, now=watch.server_time(date), queue=queue)
    return found


def _around(
    namespace: str, alone: str, date: str, kind: Kind
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Pods and warnings; without them the job's own conditions are what is left."""

    def pods_of(client: Any) -> tuple[list[dict[str, Any]], str, str]:
        core = client.client.CoreV1Api()
        selector = f"{kind.owner}={alone}" if alone else watch.OWN
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
    held = watch.standing(job).detail.startswith("suspended")
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
        what = f"{kind_of(job).kind}s"
        return f"Kueue has no Workload for it: is there a LocalQueue {queue}, and does it look after {what}?"

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


def _gone(namespace: str, name: str, other: bool, kind: Kind) -> str:
    if other:
        return f"the {kind.kind} {name} in {namespace} is another run's: this one was deleted"
    return f"there is no {kind.kind} {name} in {namespace}: deleted, or never created"


def changes(records: Sequence[runs.Record], run: Run) -> Iterator[dict[str, Any]]:
    """{"event": "state", "run": id, "state": , "detail": }, as it happens, for runs of one namespace."""
    (namespace,) = {record.job.partition("/")[0] for record in records}
    by_kind: dict[str, dict[str, str]] = {}
    for record in records:
        by_kind.setdefault(kind_in(record.folder).word, {})[record.job.partition("/")[2]] = record.id
    for word, change in _heard(namespace, sorted(by_kind)):
        if change["job"] in by_kind[word]:
            yield {**change, "run": by_kind[word][change["job"]]}


def _heard(namespace: str, words: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change with its kind's word: three watches for each kind that there is."""
    if len(words) == 1:
        for change in watch.changes(namespace, of=kinds.KINDS[words[0]]):
            yield words[0], change
        return
    queue: Queue[Any] = Queue(maxsize=1000)
    over = threading.Event()

    def listen(word: str) -> None:
        try:
            for change in watch.changes(namespace, of=kinds.KINDS[word], stop=over.is_set):
                queue.put((word, change))
        except Exception as error:
            queue.put(error)

    for word in words:
        threading.Thread(target=listen, args=(word,), daemon=True).start()
    try:
        while True:
            heard = queue.get()
            if isinstance(heard, Exception):
                raise heard
            yield heard
    finally:
        over.set()


def evidence(record: runs.Record, run: Run) -> tuple[Evidence, list[watch.Trouble]]:
    """What the cluster knows of why a run fails or waits, in a diagnosis' words; and each trouble by itself."""
    namespace, _, name = record.job.partition("/")
    around, events, _ = _around(namespace, name, "", kind_in(record.folder))
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
    total, kind = kinds.nodes(job), kind_of(job)
    node = (rank or 0) // per_node
    if node >= total:
        raise UserError(Problem(f"no rank {rank}: the job has 0 to {total * per_node - 1}"))
    names = [_pod(job, namespace, name, index) for index in (range(total) if rank is None else (node,))]
    mark = "" if rank is None else f"[rank {rank}] "
    over = watch.standing(job).state.over
    try:
        if follow and not over:
            found = output.followed(namespace, names, lambda: state(record, run).state.over, kind.container)
        else:
            found = output.merged(namespace, names, kind.container)
        for raw in found:
            line = printable(raw)
            if line.startswith(mark):
                yield line.removeprefix(mark)
    except output.Nothing as error:
        hint = "the operator ends pods when a job is over" if over else "-f waits for it"
        alone = names[0] if isinstance(names[0], str) else f"{node} of {name}"
        which = f"pod {alone}" if len(names) == 1 else f"any of the {len(names)} pods of {name}"
        raise UserError(Problem(f"no log of {which} in {namespace}: {error}", hint)) from None


def _pod(job: Mapping[str, Any], namespace: str, name: str, node: int) -> output.Pod:
    """The name of one of its pods; of a Job's, which have no lasting one, the newest of that number."""
    kind = kind_of(job)
    if kind.word == "pytorchjob":
        first = "Master" in job["spec"]["pytorchReplicaSpecs"]
        return (f"{name}-worker-{node - 1}" if node else f"{name}-master-0") if first else f"{name}-worker-{node}"

    def newest(client: Any) -> str:
        selector = f"{kind.owner}={name},{INDEX}={node}"
        items, *_ = api.listed(client.client.CoreV1Api().list_namespaced_pod, namespace, label_selector=selector)
        rows = sorted((str(one["metadata"].get("creationTimestamp", "")), one["metadata"]["name"]) for one in items)
        return rows[-1][1] if rows else ""

    return newest


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
            kind = kind_in(record.folder)
            checks = {"kind": kind.kind, "spec": {"pytorchReplicaSpecs": ["Master"]}}
            first = _pod(checks, namespace, name, 0)
            return [printable(raw) for raw in output.merged(namespace, [first], kind.container)]
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
    before, job = marked(record.folder)
    kind = kind_of(job)

    def end(client: Any) -> None:
        found = _get(client.client.CustomObjectsApi(), namespace, name, kind)
        if found and not _ours(record, found):
            raise UserError(Problem(f"the {kind.kind} {name} in {namespace} is another run's: nothing was deleted"))
        for one in (job, *before):
            try:
                _delete(client, namespace, one)
            except client.client.ApiException as error:
                if error.status != 404:
                    raise

    api.ask(end)
    (record.folder / CANCELLED).touch(mode=0o600)
