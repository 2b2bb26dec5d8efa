"""The API server: creating the job, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import bundle as bundles
from launcher import runs
from launcher.backends import State, Status
from launcher.backends.kubernetes.manifests import (
    COMPONENT,
    DIGEST,
    ENTRY,
    GROUP,
    MANAGED_BY,
    PLURAL,
    REASON,
    VERSION,
)
from launcher.errors import Problem, Unreachable, UserError
from launcher.preflight import pods
from launcher.run import Run
from launcher.spec import JobSpec

UID, CANCELLED = "uid", "cancelled"  # files of the run: which job of that name is ours; that we deleted it
TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer


def _client() -> Any:
    import kubernetes
    import yaml

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries are no news
    try:
        if _in_cluster():
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config()
    except (kubernetes.config.ConfigException, yaml.YAMLError) as error:
        message = f"no Kubernetes cluster is configured: {' '.join(str(error).split())}"
        raise UserError(Problem(message, "kubectl config current-context")) from None
    return kubernetes


def _in_cluster() -> bool:
    """In a pod without a kubeconfig. The client's own load_config prints to stdout when it finds none."""
    kubeconfig = os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser().is_file()
    return not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ


class _Answers:
    """API errors as ours: refused with the server's words, or not reached."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        status = getattr(error, "status", None)
        library = type(error).__module__.split(".")[0]
        if library in ("urllib3", "http") or (hasattr(error, "status") and status in (None, 0)):
            raise Unreachable(Problem(f"the API server did not answer: {_words(error)}")) from None
        if status in (401, 429) or (isinstance(status, int) and status >= 500):
            raise Unreachable(Problem(f"the API server did not answer ({status}): {_words(error)}")) from None
        if isinstance(status, int):
            hint = "is there that namespace, and kubectl get crd pytorchjobs.kubeflow.org?" if status == 404 else ""
            raise UserError(
                Problem(f"Kubernetes refuses ({status}): {_words(error)}", hint, ("kubernetes",))
            ) from None


def _words(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError, AttributeError):
        return str(getattr(error, "reason", None) or error)


def written(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The ConfigMaps and the job of a run directory."""
    import yaml

    text = (folder / ENTRY).read_text(encoding="utf-8")
    *config_maps, job = yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config_maps, job


def submit(folder: Path, spec: JobSpec, run: Run) -> str:
    """Create what is written there, or adopt it when exactly this job is in the cluster already. namespace/name."""
    client = _client()
    config_maps, job = written(folder)
    namespace = job["metadata"].get("namespace") or _default_namespace(client)
    name = job["metadata"]["name"]
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    strict = {"field_validation": "Strict", "_request_timeout": TIMEOUT}  # an old operator's CRD would drop fields
    with _Answers():
        found = _get(objects, namespace, name)
        if found and _is_done_checking(found):
            found = _remove(objects, namespace, name)
        if found is None:
            new = [row["metadata"]["name"] for row in config_maps if _put_config_map(core, namespace, row)]
            try:
                found = objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job, **strict)
            except client.client.ApiException as error:
                if error.status != 409:
                    for bundle in new if 400 <= (error.status or 0) < 500 else ():
                        with contextlib.suppress(client.client.ApiException):
                            core.delete_namespaced_config_map(bundle, namespace, _request_timeout=TIMEOUT)
                    raise
                found = _get(objects, namespace, name)
    _is_this(found or {}, job, namespace)
    bundles.write_private(folder / UID, str(found["metadata"].get("uid", "")) if found else "")
    return f"{namespace}/{name}"


def _is_done_checking(found: dict[str, Any]) -> bool:
    """An earlier preflight of ours: its verdict is told, and nodes are checked more than once."""
    labels = found["metadata"].get("labels") or {}
    ours = labels.get(MANAGED_BY) == "dslaunch" and labels.get(COMPONENT) == "preflight"
    return ours and parse_conditions(found.get("status") or {}).state.over


def _remove(objects: Any, namespace: str, name: str) -> dict[str, Any] | None:
    """Delete the job and wait for its pods to go, whose names the next one's will have. What is left of it."""
    objects.delete_namespaced_custom_object(
        GROUP, VERSION, namespace, PLURAL, name, propagation_policy="Foreground", _request_timeout=TIMEOUT
    )
    until = time.monotonic() + 60
    while (found := _get(objects, namespace, name)) and time.monotonic() < until:
        time.sleep(1)
    return found


def _is_this(found: dict[str, Any], job: dict[str, Any], namespace: str) -> None:
    """Raises UserError unless the job in the cluster is the one to submit, and not over yet."""
    name = job["metadata"]["name"]
    delete = f"kubectl delete pytorchjob {name} -n {namespace}"
    annotations = found.get("metadata", {}).get("annotations") or {}
    if annotations.get(DIGEST) != job["metadata"]["annotations"][DIGEST]:
        raise UserError(
            Problem(f"{namespace} has another PyTorchJob `{name}`", f"another name, or {delete}", ("name",))
        )
    status = parse_conditions(found.get("status") or {})
    if status.state.over:
        message = f"{namespace} has this very PyTorchJob `{name}`, and it is over: {status.detail}"
        raise UserError(Problem(message, f"to run it again, {delete}", ("name",)))


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


def _default_namespace(client: Any) -> str:
    """As kubectl takes it: the context's, in a pod the pod's own, else `default`."""
    if _in_cluster():
        with contextlib.suppress(OSError):
            return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
        return "default"
    _, active = client.config.list_kube_config_contexts()
    return str(active["context"].get("namespace") or "default")


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


def parse_conditions(status: dict[str, Any]) -> Status:
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


def state(record: runs.Record, run: Run) -> Status:
    client = _client()
    try:
        with _Answers():
            found, why = _look(client.client.CustomObjectsApi(), record)
    except Unreachable as error:
        return Status(State.UNKNOWN, str(error))
    if found:
        status = parse_conditions(found.get("status") or {})
        return _explained(status, client, record) if status.state is State.FAILED else status
    if (record.folder / CANCELLED).exists():
        return Status(State.CANCELLED, "cancelled: the PyTorchJob is deleted")
    return Status(State.UNKNOWN, why)


def _explained(status: Status, client: Any, record: runs.Record) -> Status:
    """With the exit code and the last words of the pod that failed first, where it is still there."""
    namespace, _, name = record.job.partition("/")
    try:
        with _Answers():
            found = client.client.CoreV1Api().list_namespaced_pod(
                namespace, label_selector=f"training.kubeflow.org/job-name={name}", _request_timeout=TIMEOUT
            )
    except UserError:  # the job's own condition is what is left
        return status
    ended = [
        (row.state.terminated, pod.metadata.name)
        for pod in found.items
        for row in pod.status.container_statuses or ()
        if row.state.terminated and row.state.terminated.exit_code
    ]
    if not ended:
        return status
    # a code of dslaunch's own says more than that of a pod which was ended because another one had failed
    last, pod = min(ended, key=lambda end: (end[0].exit_code > 128, str(end[0].finished_at or "unknown"), end[1]))
    words = (last.message or last.reason or "").strip().partition("\n")[0]
    return replace(status, detail=f"{status.detail}; {pod} ended with {last.exit_code}: {words}", code=last.exit_code)


def logs(record: runs.Record, *, rank: int | None, follow: bool, run: Run) -> Iterator[str]:
    """Of the Master's pod; of one rank the lines that its pod marks `[rank N]`, without the mark."""
    client = _client()
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    namespace, _, name = record.job.partition("/")
    node = (rank or 0) // record.extra["per_node"]
    pod = f"{name}-master-0" if node == 0 else f"{name}-worker-{node - 1}"
    mark = "" if rank is None else f"[rank {rank}] "
    with _Answers():
        found, why = _look(objects, record)
        if found is None:
            raise UserError(Problem(why))
        pods = sum(row.get("replicas", 1) for row in found["spec"]["pytorchReplicaSpecs"].values())
        if node >= pods:
            raise UserError(Problem(f"no rank {rank}: the job has 0 to {pods * record.extra['per_node'] - 1}"))
        options: dict[str, Any] = {"follow": True} if follow else {"_request_timeout": TIMEOUT}
        while True:
            try:
                stream = core.read_namespaced_pod_log(
                    pod, namespace, container="pytorch", _preload_content=False, **options
                )
                break
            except client.client.ApiException as error:
                if error.status not in (400, 404):  # 400: the container waits for its image
                    raise
                status = parse_conditions((found or {}).get("status") or {})
                if not follow or found is None or status.state.over:
                    hint = "-f waits for it" if not status.state.over else "the operator ends pods when a job is over"
                    raise UserError(Problem(f"no log of pod {pod} in {namespace}: {_words(error)}", hint)) from None
            time.sleep(2)
            found, _ = _look(objects, record)
        for raw in _lines(stream):
            line = runs.printable(raw)
            if line.startswith(mark):
                yield line.removeprefix(mark)


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    for chunk in stream.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def events(record: runs.Record, run: Run) -> Iterator[dict[str, Any]]:
    """What the preflight tells on its way, and where its job stands, every two seconds. Ends when it is over."""
    client = _client()
    told = 0
    while True:
        try:
            with _Answers():
                found, words = _look(client.client.CustomObjectsApi(), record)
            status = parse_conditions(found.get("status") or {}) if found else Status(State.CANCELLED, words)
        except Unreachable as error:
            status = Status(State.UNKNOWN, str(error))
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
        return list(logs(record, rank=None, follow=False, run=run))
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
    client = _client()
    core = client.client.CoreV1Api()
    reasons: dict[str, str] = {}
    said = []
    for name, reason in nodes.items():
        if node := pods.node(name):
            reasons.setdefault(node, reason)
        else:
            said.append(f"{name} never said on which node it runs: nothing is cordoned for it")
    for node, reason in reasons.items():
        why = {"annotations": {REASON: f"dslaunch preflight: {reason}"}}
        try:
            with _Answers():
                core.patch_node(node, {"metadata": why, "spec": {"unschedulable": True}}, _request_timeout=TIMEOUT)
        except UserError as error:
            said += [f"{node} is not cordoned: {problem.message}" for problem in error.problems]
    return said


def cancel(record: runs.Record, run: Run) -> None:
    """All objects go; what is gone already is no mistake."""
    client = _client()
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    namespace, _, name = record.job.partition("/")
    config_maps, _ = written(record.folder)
    with _Answers():
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
    (record.folder / CANCELLED).touch(mode=0o600)
