"""Kubernetes: a PyTorchJob v1 and the ConfigMap with its scripts, dicts until one dump."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher import bundle as bundles
from launcher import runs, yamldoc
from launcher.backends import State, Status
from launcher.bundle import Bundle, File
from launcher.errors import Problem, Unreachable, UserError
from launcher.plan import Plan
from launcher.run import Run
from launcher.spec import JobSpec, Volume

ENTRY = "manifests.yaml"
MOUNT = "/opt/dslaunch"
LOGS = "/tmp/dslaunch-logs"  # noqa: S108 - inside the pod, which nobody shares
PORT = 23456  # the operator's default, named so that its Service carries it
SHM = "/dev/shm"  # noqa: S108 - where NCCL and data loaders expect it
GRACE = 120  # seconds between a pod's SIGTERM and its end: time for a checkpoint
CONFIG_MAP_LIMIT = 1_000_000  # bytes; the API server refuses 1 MiB with keys and metadata
GROUP, VERSION, PLURAL = "kubeflow.org", "v1", "pytorchjobs"
DIGEST = "dslaunch.dev/digest"
MANAGED_BY = "app.kubernetes.io/managed-by"
UID, CANCELLED = "uid", "cancelled"  # files of the run: which job of that name is ours; that we deleted it
TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer


def render(plan: Plan) -> Bundle:
    """One YAML file with both documents; the same job gives the same bytes."""
    _check(plan)
    return Bundle((File(ENTRY, yamldoc.dump(manifests(plan))),), ENTRY)


def _check(plan: Plan) -> None:
    spec = plan.spec
    problems = []
    if spec.name[0].isdigit():
        message = f"name {spec.name} begins with a digit, and the training operator wants a letter"
        problems.append(Problem(message, f"job-{spec.name}"[:40].rstrip("-"), ("name",)))
    if spec.box is None:
        problems.append(Problem("pods need an image", "container: IMAGE with torch and deepspeed in it", ("name",)))
    if spec.train.launcher == "srun":
        problems.append(Problem("launcher srun needs Slurm", "torchrun or deepspeed", ("train", "launcher")))
    if spec.resources.spares:
        message = "a PyTorchJob has no spare pods: Kubernetes itself replaces a node that is not ready"
        problems.append(Problem(message, "spares: 0", ("resources", "spares")))
    if spec.modules:
        problems.append(Problem("pods have no environment modules", "put the software in the image", ("modules",)))
    if spec.box and spec.box.mounts:
        hint = "kubernetes.volumes: [{claim: , mount: }]"
        problems.append(Problem("container.mounts are for Slurm's pyxis", hint, ("container", "mounts")))
    for name, secret in spec.secrets.items():
        if not secret.secret:
            hint = (
                f"kubectl create secret generic NAME --from-literal=KEY=..., then {name}: {{secret: NAME, key: KEY}}"
            )
            problems.append(Problem(f"secret {name} has no Kubernetes Secret", hint, ("secrets", name)))
    for what, path in (("workdir", spec.train.workdir), ("venv", spec.venv)):
        if path and path != "." and not path.startswith("/"):
            at = ("train", what) if what == "workdir" else (what,)
            problems.append(Problem(f"{what} {path} is relative, and a pod has no job file to be relative to",
                                    "a path in the image or on a volume", at))  # fmt: skip
    problems += [*_pod_problems(spec), *_volume_problems(plan)]
    if problems:
        raise UserError(*problems)


def _pod_problems(spec: JobSpec) -> Iterator[Problem]:
    """What the API server takes inside a PyTorchJob, to fail at every pod for ever."""
    options = spec.kubernetes
    for key in ("gpu_resource", "rdma_resource"):
        name = getattr(options, key)
        if name and "/" not in name:
            yield Problem(f"{key} {name} has no domain", "such as nvidia.com/gpu or rdma/hca", ("kubernetes", key))
    for index, row in enumerate(options.tolerations):
        at = ("kubernetes", "tolerations", index)
        if row.operator == "Exists" and row.value:
            yield Problem(f"operator Exists takes no value, and this one is {row.value}", "operator: Equal", at)
        if row.operator == "Equal" and not row.key:
            yield Problem("operator Equal needs a key", "operator: Exists tolerates every taint", at)


def _volume_problems(plan: Plan) -> Iterator[Problem]:
    taken = {MOUNT: "has the scripts", SHM: "is shared memory", "/": "is the image"}
    for index, volume in enumerate(plan.spec.kubernetes.volumes):
        at = ("kubernetes", "volumes", index, "mount")
        mount = posixpath.normpath(volume.mount)
        if not mount.startswith("/") or ":" in mount:
            yield Problem(f"mount {volume.mount} is not an absolute path without colons", at=at)
        elif mount in taken or mount.startswith(f"{MOUNT}/"):
            yield Problem(f"{mount} {taken.get(mount, taken[MOUNT])} already", "another mount", at)
        else:
            taken[mount] = f"is the mount of {volume.claim}"
    found = _volume_with(_checkpoints(plan), plan.spec)
    if found and found.read_only:
        at = ("kubernetes", "volumes", plan.spec.kubernetes.volumes.index(found), "read_only")
        yield Problem(f"checkpoints go to {_checkpoints(plan)}, and {found.claim} is read-only there", at=at)


def _checkpoints(plan: Plan) -> str:
    return posixpath.normpath(posixpath.join(plan.spec.train.workdir, plan.checkpoint_dir))


def _volume_with(path: str, spec: JobSpec) -> Volume | None:
    around = [row for row in spec.kubernetes.volumes if f"{path}/".startswith(posixpath.join(row.mount, ""))]
    return max(around, key=lambda row: len(row.mount), default=None)


def notes(plan: Plan) -> list[str]:
    """What runs, and will surprise."""
    found, train = [], plan.spec.train
    if _volume_with(_checkpoints(plan), plan.spec) is None:
        found.append(f"checkpoints in {plan.checkpoint_dir} end with the pods: put train.checkpoint.dir on a volume")
    if train.script and not train.script.startswith("/") and train.workdir == ".":
        found.append(f"{train.script} has to be in the image, in its own working directory; or set train.workdir")
    return found


def manifests(plan: Plan) -> list[dict[str, Any]]:
    spec, options = plan.spec, plan.spec.kubernetes
    # what the ranks get to save in; the rest is for the supervisor to kill, sweep and report
    files = bundles.common(plan, flags=[f"--grace {GRACE - 20}"], submitted_from=False)
    size = sum(len(file.text.encode()) + len(file.path) for file in files)
    if size > CONFIG_MAP_LIMIT:
        raise UserError(
            Problem(f"the scripts and config have {size:,} bytes; a ConfigMap takes {CONFIG_MAP_LIMIT:,}")
        )
    labels = {
        **options.labels,
        "app.kubernetes.io/name": spec.name,
        "app.kubernetes.io/component": "training",
        MANAGED_BY: "dslaunch",
    }
    keys = {file.path.replace("/", "."): file for file in files}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, _bundle(spec.name), labels, {}),
        "data": {key: file.text for key, file in keys.items()},
    }
    template = _template(plan, labels, {key: file.path for key, file in keys.items()})
    replicas: dict[str, Any] = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": template}}
    if spec.resources.nodes > 1:
        workers = spec.resources.nodes - 1
        replicas["Worker"] = {"replicas": workers, "restartPolicy": "Never", "template": template}
    policy: dict[str, Any] = {"cleanPodPolicy": "Running"}  # when one pod has failed, the others free their GPUs
    if options.gang:
        policy["schedulingPolicy"] = {"minAvailable": spec.resources.nodes}
    job_labels = {**labels, **({"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {})}
    job: dict[str, Any] = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "PyTorchJob",
        "metadata": _metadata(spec, spec.name, job_labels, options.annotations),
        # a string by its schema. The operator's WORLD_SIZE and RANK are no rank's: node.sh starts those
        "spec": {"nprocPerNode": str(spec.per_node), "runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
    # a changed script is a changed job, also for whoever compares manifests
    digest = hashlib.sha256(json.dumps([config_map, job], sort_keys=True).encode()).hexdigest()[:16]
    job["metadata"]["annotations"] = {**options.annotations, DIGEST: digest}
    return [config_map, job]


def _metadata(spec: JobSpec, name: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if spec.kubernetes.namespace:
        metadata["namespace"] = spec.kubernetes.namespace
    metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata


def _template(plan: Plan, labels: dict[str, str], paths: dict[str, str]) -> dict[str, Any]:
    spec, options = plan.spec, plan.spec.kubernetes
    assert spec.box is not None
    mounts: list[dict[str, Any]] = [
        {"name": "bundle", "mountPath": MOUNT, "readOnly": True},
        {"name": "shm", "mountPath": SHM},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "bundle", "configMap": {"name": _bundle(spec.name),
         "items": [{"key": key, "path": path} for key, path in paths.items()]}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
    ]  # fmt: skip
    for index, volume in enumerate(options.volumes):
        volumes.append({"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{index}", "mountPath": volume.mount, "readOnly": volume.read_only})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": spec.box.image,
        # a uid that the image does not know has / as its home; the operator's RANK is the node's
        "command": [
            "bash",
            "-c",
            f'[ -w "$HOME" ] || export HOME=/tmp; NODE_RANK=$RANK exec bash "{MOUNT}/node.sh"',
        ],
        "env": [{"name": "DSLAUNCH_LOGS", "value": LOGS}, *_secrets(spec)],
        "ports": [{"name": "pytorchjob-port", "containerPort": PORT}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    if amounts := _amounts(spec):
        # requests too: a gang scheduler adds up requests and forgets what stands in limits alone
        container["resources"] = {"limits": dict(amounts), "requests": dict(amounts)}
    security: dict[str, Any] = {"seccompProfile": {"type": "RuntimeDefault"}}
    if options.run_as_user:
        security = {
            "runAsNonRoot": True,
            "runAsUser": options.run_as_user,
            "fsGroup": options.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",  # a volume of checkpoints takes minutes to walk through
            **security,
        }
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE,
        "securityContext": security,
        "containers": [container],
        "volumes": volumes,
    }
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    if options.tolerations:
        names = ("key", "operator", "value", "effect")
        pod["tolerations"] = [
            {name: getattr(row, name) for name in names if getattr(row, name) is not None}
            for row in options.tolerations
        ]
    if options.priority_class:
        pod["priorityClassName"] = options.priority_class
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    return {"metadata": {"labels": dict(labels)}, "spec": pod}


def _secrets(spec: JobSpec) -> list[dict[str, Any]]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
        for name, source in spec.secrets.items()
    ]


def _amounts(spec: JobSpec) -> dict[str, str]:
    resources, options = spec.resources, spec.kubernetes
    amounts: dict[str, str] = {}
    if resources.cpus_per_node:
        amounts["cpu"] = str(resources.cpus_per_node)
    if resources.memory and resources.memory != "0":
        size = resources.memory  # Slurm's G is 2^30, and its bare number is megabytes
        amounts["memory"] = f"{size}i" if size[-1] in "KMGT" else f"{size}Mi"
    if resources.gpus_per_node:
        amounts[options.gpu_resource] = str(resources.gpus_per_node)
    if options.rdma_resource:
        amounts[options.rdma_resource] = str(options.rdma_count)
    return amounts


# --- the API server -----------------------------------------------------------------------------------


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


def submit(folder: Path, plan: Plan, run: Run) -> str:
    """Create both objects, or adopt them when exactly this job is there already. namespace/name."""
    client = _client()
    config_map, job = manifests(plan)
    namespace = plan.spec.kubernetes.namespace or _default_namespace(client)
    name = plan.spec.name
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    strict = {"field_validation": "Strict", "_request_timeout": TIMEOUT}  # an old operator's CRD would drop fields
    with _Answers():
        found = _get(objects, namespace, name)
        if found is None:
            new = _put_config_map(core, namespace, config_map)
            try:
                found = objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job, **strict)
            except client.client.ApiException as error:
                if error.status != 409:
                    if new and 400 <= (error.status or 0) < 500:
                        with contextlib.suppress(client.client.ApiException):
                            core.delete_namespaced_config_map(_bundle(name), namespace, _request_timeout=TIMEOUT)
                    raise
                found = _get(objects, namespace, name)
    _is_this(found or {}, job, namespace)
    bundles.write_private(folder / UID, str(found["metadata"].get("uid", "")) if found else "")
    return f"{namespace}/{name}"


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


def _bundle(name: str) -> str:
    return f"{name}-bundle"


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
        return parse_conditions(found.get("status") or {})
    if (record.folder / CANCELLED).exists():
        return Status(State.CANCELLED, "cancelled: the PyTorchJob is deleted")
    return Status(State.UNKNOWN, why)


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


def cancel(record: runs.Record, run: Run) -> None:
    """Both objects go; what is gone already is no mistake."""
    client = _client()
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    namespace, _, name = record.job.partition("/")
    with _Answers():
        found = _get(objects, namespace, name)
        if found and not _ours(record, found):
            raise UserError(Problem(f"the PyTorchJob {name} in {namespace} is another run's: nothing was deleted"))
        for delete, where in (
            (objects.delete_namespaced_custom_object, (GROUP, VERSION, namespace, PLURAL, name)),
            (core.delete_namespaced_config_map, (_bundle(name), namespace)),
        ):
            try:
                delete(*where, _request_timeout=TIMEOUT)
            except client.client.ApiException as error:
                if error.status != 404:
                    raise
    (record.folder / CANCELLED).touch(mode=0o600)
