"""Kubernetes: a PyTorchJob v1 and the ConfigMap with its scripts, dicts until one dump."""

from __future__ import annotations

import hashlib
import json
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
from launcher.spec import JobSpec

ENTRY = "job.yaml"
MOUNT = "/opt/dslaunch"
LOGS = "/tmp/dslaunch-logs"  # noqa: S108 - inside the pod, which nobody shares
PORT = 23456  # the operator's default, named so that its Service carries it
CONFIG_MAP_LIMIT = 1_000_000  # bytes; the API server refuses 1 MiB with keys and metadata
GROUP, VERSION, PLURAL = "kubeflow.org", "v1", "pytorchjobs"
DIGEST = "dslaunch.dev/digest"


def render(plan: Plan) -> Bundle:
    """One YAML file with both documents; the same job gives the same bytes."""
    _check(plan.spec)
    return Bundle((File(ENTRY, yamldoc.dump(manifests(plan))),), ENTRY)


def _check(spec: JobSpec) -> None:
    problems = []
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
    for index, volume in enumerate(spec.kubernetes.volumes):
        if not volume.mount.startswith("/"):
            problems.append(Problem("mount is not an absolute path", at=("kubernetes", "volumes", index, "mount")))
    if problems:
        raise UserError(*problems)


def notes(plan: Plan) -> list[str]:
    """What runs, and will surprise."""
    volumes = [volume.mount.rstrip("/") for volume in plan.spec.kubernetes.volumes]
    if not any(f"{plan.checkpoint_dir}/".startswith(f"{mount}/") for mount in volumes):
        return [f"checkpoints in {plan.checkpoint_dir} end with the pods: put train.checkpoint.dir on a volume"]
    return []


def manifests(plan: Plan) -> list[dict[str, Any]]:
    spec, options = plan.spec, plan.spec.kubernetes
    files = bundles.common(plan, submitted_from=False)
    size = sum(len(file.text.encode()) + len(file.path) for file in files)
    if size > CONFIG_MAP_LIMIT:
        raise UserError(
            Problem(f"the scripts and config have {size:,} bytes; a ConfigMap takes {CONFIG_MAP_LIMIT:,}")
        )
    labels = {
        **options.labels,
        "app.kubernetes.io/name": spec.name,
        "app.kubernetes.io/component": "training",
        "app.kubernetes.io/managed-by": "dslaunch",
    }
    keys = {file.path.replace("/", "."): file for file in files}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, f"{spec.name}-bundle", labels, {}),
        "data": {key: file.text for key, file in keys.items()},
    }
    template = _template(plan, labels, {key: file.path for key, file in keys.items()})
    replicas: dict[str, Any] = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": template}}
    if spec.resources.nodes > 1:
        workers = spec.resources.nodes - 1
        replicas["Worker"] = {"replicas": workers, "restartPolicy": "Never", "template": template}
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": 0}  # one dead pod ends all, GPUs are freed
    if options.gang:
        policy["schedulingPolicy"] = {"minAvailable": spec.resources.nodes}
    job_labels = {**labels, **({"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {})}
    # the scripts' digest: a changed bundle is a changed job, also for whoever compares manifests
    digest = hashlib.sha256(json.dumps([config_map, replicas], sort_keys=True).encode()).hexdigest()[:16]
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "PyTorchJob",
        "metadata": _metadata(spec, spec.name, job_labels, {**options.annotations, DIGEST: digest}),
        # a number here would make the operator multiply WORLD_SIZE; the ranks are started by node.sh
        "spec": {"nprocPerNode": str(spec.per_node), "runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
    return [config_map, job]


def _metadata(spec: JobSpec, name: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if spec.kubernetes.namespace:
        metadata["namespace"] = spec.kubernetes.namespace
    metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = annotations
    return metadata


def _template(plan: Plan, labels: dict[str, str], paths: dict[str, str]) -> dict[str, Any]:
    spec, options = plan.spec, plan.spec.kubernetes
    assert spec.box is not None
    mounts: list[dict[str, Any]] = [
        {"name": "bundle", "mountPath": MOUNT, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - where NCCL and data loaders expect it
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "bundle", "configMap": {"name": f"{spec.name}-bundle",
         "items": [{"key": key, "path": path} for key, path in paths.items()]}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
    ]  # fmt: skip
    for index, volume in enumerate(options.volumes):
        volumes.append({"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{index}", "mountPath": volume.mount, "readOnly": volume.read_only})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": spec.box.image,
        # the operator's RANK is the node's
        "command": ["bash", "-c", f'NODE_RANK=$RANK exec bash "{MOUNT}/node.sh"'],
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
            **security,
        }
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 120,  # time for a checkpoint
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
        if amounts["memory"].endswith("Ki"):
            amounts["memory"] = size.replace("K", "Ki")
    if resources.gpus_per_node:
        amounts[options.gpu_resource] = str(resources.gpus_per_node)
    if options.rdma_resource:
        amounts[options.rdma_resource] = str(options.rdma_count)
    return amounts


# --- the API server -----------------------------------------------------------------------------------


def _client() -> Any:
    import kubernetes

    try:
        kubernetes.config.load_config()
    except kubernetes.config.ConfigException as error:
        raise UserError(
            Problem(f"no Kubernetes cluster is configured: {error}", "kubectl config current-context")
        ) from None
    return kubernetes


class _Answers:
    """API errors as ours: refused with the server's words, or not reached."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        status = getattr(error, "status", None)
        if status in (None, 0) and type(error).__module__.split(".")[0] in ("urllib3", "kubernetes", "http"):
            raise Unreachable(Problem(f"the API server did not answer: {error}")) from None
        if status in (401, 429) or (isinstance(status, int) and status >= 500):
            raise Unreachable(Problem(f"the API server did not answer ({status}): {_words(error)}")) from None
        if isinstance(status, int):
            raise UserError(Problem(f"Kubernetes refuses ({status}): {_words(error)}", at=("kubernetes",))) from None


def _words(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError, AttributeError):
        return str(getattr(error, "reason", error))


def submit(folder: Path, plan: Plan, run: Run) -> str:
    """Create both objects, or adopt them when exactly this job is there already. namespace/name."""
    client = _client()
    config_map, job = manifests(plan)
    namespace = plan.spec.kubernetes.namespace or _default_namespace(client)
    name = plan.spec.name
    objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
    with _Answers():
        found = _get(client, objects, namespace, name)
        if found is None:
            _put_config_map(client, core, namespace, config_map)
            try:
                objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job)
            except client.client.ApiException as error:
                if error.status != 409:
                    raise
            found = _get(client, objects, namespace, name)
        annotations = (found or {}).get("metadata", {}).get("annotations", {})
        if annotations.get(DIGEST) != job["metadata"]["annotations"][DIGEST]:
            hint = f"another name, or kubectl delete pytorchjob {name} -n {namespace}"
            raise UserError(Problem(f"{namespace} has another PyTorchJob `{name}`", hint, ("name",)))
    return f"{namespace}/{name}"


def _put_config_map(client: Any, core: Any, namespace: str, config_map: dict[str, Any]) -> None:
    """No job uses it at this point, so what an earlier run left is replaced."""
    try:
        core.create_namespaced_config_map(namespace, config_map)
    except client.client.ApiException as error:
        if error.status != 409:
            raise
        core.replace_namespaced_config_map(config_map["metadata"]["name"], namespace, config_map)


def _default_namespace(client: Any) -> str:
    try:
        _, active = client.config.list_kube_config_contexts()
        return str(active["context"].get("namespace", "default"))
    except (client.config.ConfigException, TypeError):
        return "default"


def _get(client: Any, objects: Any, namespace: str, name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = objects.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
    except client.client.ApiException as error:
        if error.status == 404:
            return None
        raise
    return found


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
    return Status(found, f"{last.get('type', '').lower()}: {last.get('message', '')}", code)


def state(record: runs.Record, run: Run) -> Status:
    client = _client()
    namespace, _, name = record.job.partition("/")
    try:
        with _Answers():
            found = _get(client, client.client.CustomObjectsApi(), namespace, name)
    except Unreachable as error:
        return Status(State.UNKNOWN, str(error))
    if found is None:
        return Status(State.UNKNOWN, f"there is no PyTorchJob {name} in {namespace}: deleted, or never created")
    return parse_conditions(found.get("status") or {})


def logs(record: runs.Record, *, rank: int | None, follow: bool, run: Run) -> Iterator[str]:
    """Of the Master's pod, or of the pod with that rank, whose lines are marked `[rank N]`."""
    client = _client()
    namespace, _, name = record.job.partition("/")
    node = (rank or 0) // record.extra["per_node"]
    pod = f"{name}-master-0" if node == 0 else f"{name}-worker-{node - 1}"
    with _Answers():
        stream = client.client.CoreV1Api().read_namespaced_pod_log(
            pod, namespace, container="pytorch", follow=follow, _preload_content=False
        )
        for raw in _lines(stream):
            line = runs.printable(raw)
            if rank is None or line.startswith(f"[rank {rank}] "):
                yield line


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    for chunk in stream.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def cancel(record: runs.Record, run: Run) -> None:
    client = _client()
    namespace, _, name = record.job.partition("/")
    with _Answers():
        objects, core = client.client.CustomObjectsApi(), client.client.CoreV1Api()
        for delete, where in (
            (objects.delete_namespaced_custom_object, (GROUP, VERSION, namespace, PLURAL, name)),
            (core.delete_namespaced_config_map, (f"{name}-bundle", namespace)),
        ):
            try:
                delete(*where)
            except client.client.ApiException as error:
                if error.status != 404:
                    raise
