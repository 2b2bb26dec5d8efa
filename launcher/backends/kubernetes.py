"""Kubernetes: a PyTorchJob v1 and the ConfigMap with its scripts, dicts until one dump."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import posixpath
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, runs, setting, yamldoc
from launcher.backends import State, Status
from launcher.bundle import Bundle, File
from launcher.errors import Problem, Unreachable, UserError
from launcher.plan import Plan
from launcher.preflight import Setting, pods
from launcher.run import Run
from launcher.spec import JobSpec, Preflight, Volume

ENTRY = "manifests.yaml"
MOUNT = "/opt/dslaunch"
LOGS = "/tmp/dslaunch-logs"  # noqa: S108 - inside the pod, which nobody shares
PORT = 23456  # the operator's default, named so that its Service carries it
SHM = "/dev/shm"  # noqa: S108 - where NCCL and data loaders expect it
GRACE = 120  # seconds between a pod's SIGTERM and its end: time for a checkpoint
ARCHIVE = f"{bundles.CODE}.zip"
APPLY_LIMIT = 260_000  # bytes of JSON: `kubectl apply` writes it into an annotation too, and those end at 262,144
JOIN = 900.0  # seconds for all pods to report: one node has the image, another pulls 20 GB at 50 MB/s in 400
GROUP, VERSION, PLURAL = "kubeflow.org", "v1", "pytorchjobs"
DIGEST, REASON = "dslaunch.dev/digest", "dslaunch.dev/reason"
MANAGED_BY, COMPONENT = "app.kubernetes.io/managed-by", "app.kubernetes.io/component"
UID, CANCELLED = "uid", "cancelled"  # files of the run: which job of that name is ours; that we deleted it
TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer


def render(plan: Plan) -> Bundle:
    """One YAML file with all documents; the same job gives the same bytes."""
    _check(plan.spec, plan, training=True)
    return Bundle((File(ENTRY, yamldoc.dump(manifests(plan))),), ENTRY)


def preflight(spec: JobSpec, plan: Plan | None) -> Bundle:
    """A PyTorchJob of its own that checks the nodes of its pods and ends with the verdict's code."""
    _check(spec, plan, training=False)
    name = checking(spec.name)
    files = bundles.preflight_files(spec, nccl.variables(spec), _setting(spec, plan, name), submitted_from=False)
    documents = _documents(spec, name, files, training=False)
    told = next(file for file in files if file.path == "preflight.json")
    return Bundle((File(ENTRY, yamldoc.dump(documents)), told), ENTRY)


def checking(name: str) -> str:
    """The job that checks the nodes of `demo` is demo-preflight."""
    return name if name.split("-")[-1] == "preflight" else f"{name}-preflight"


def _setting(spec: JobSpec, plan: Plan | None, name: str) -> Setting:
    asked = spec.preflight.join_timeout
    patience = JOIN if asked == Preflight().join_timeout else asked
    return replace(
        setting.make(spec, plan), name=name, join_timeout=patience, late=patience, left_out=spec.kubernetes.exclude
    )


def _check(spec: JobSpec, plan: Plan | None, *, training: bool) -> None:
    problems = []
    if spec.name[0].isdigit():
        message = f"name {spec.name} begins with a digit, and the training operator wants a letter"
        problems.append(Problem(message, f"job-{spec.name}"[:40].rstrip("-"), ("name",)))
    if spec.box is None:
        problems.append(Problem("pods need an image", "container: IMAGE with torch and deepspeed in it", ("name",)))
    if spec.train.launcher == "srun" and training:
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
    problems += [*_pod_problems(spec), *_volume_problems(spec, plan)]
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


def _volume_problems(spec: JobSpec, plan: Plan | None) -> Iterator[Problem]:
    taken = {MOUNT: "has the scripts", SHM: "is shared memory", "/": "is the image"}
    for index, volume in enumerate(spec.kubernetes.volumes):
        at = ("kubernetes", "volumes", index, "mount")
        mount = posixpath.normpath(volume.mount)
        if not mount.startswith("/") or ":" in mount:
            yield Problem(f"mount {volume.mount} is not an absolute path without colons", at=at)
        elif mount in taken or mount.startswith(f"{MOUNT}/"):
            yield Problem(f"{mount} {taken.get(mount, taken[MOUNT])} already", "another mount", at)
        else:
            taken[mount] = f"is the mount of {volume.claim}"
    found = _volume_with(_checkpoints(plan), spec) if plan else None
    if plan and found and found.read_only:
        at = ("kubernetes", "volumes", spec.kubernetes.volumes.index(found), "read_only")
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
    """The job, behind the ConfigMap that it mounts."""
    spec = plan.spec
    told = _setting(spec, plan, spec.name) if spec.checks_nodes else None
    # what the ranks get to save in; the rest is for the supervisor to kill, sweep and report
    files = bundles.common(plan, told, flags=[f"--grace {GRACE - 20}"], submitted_from=False)
    return _documents(spec, spec.name, files, training=True)


def _documents(spec: JobSpec, name: str, files: Sequence[File], *, training: bool) -> list[dict[str, Any]]:
    options = spec.kubernetes
    labels = {
        **options.labels,
        "app.kubernetes.io/name": name,
        COMPONENT: "training" if training else "preflight",
        MANAGED_BY: "dslaunch",
    }
    carried, archive = _archived(files)
    config_map: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, _bundle(name), labels, {}),
        "data": {_key(file.path): file.text for file in carried},
        **({"binaryData": {_key(ARCHIVE): archive}} if archive else {}),
    }
    text = json.dumps(config_map, ensure_ascii=False, separators=(",", ":"))
    size = len(text.encode()) + 5 * sum(map(text.count, "<>&"))  # which kubectl writes as \u003c
    if size > APPLY_LIMIT:
        message = f"scripts and config have {size:,} bytes, and `kubectl apply` takes {APPLY_LIMIT:,} in a ConfigMap"
        raise UserError(Problem(message))
    paths = {_key(path): path for path in (*(file.path for file in carried), *([ARCHIVE] if archive else []))}
    template = _template(spec, labels, _mounted(config_map, paths), training)
    replicas: dict[str, Any] = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": template}}
    if spec.resources.nodes > 1:
        workers = spec.resources.nodes - 1
        replicas["Worker"] = {"replicas": workers, "restartPolicy": "Never", "template": template}
    # when one pod has failed, the others free their GPUs; those of a preflight end by themselves, and one of them
    # that fails is no reason to stop before there is a verdict
    policy: dict[str, Any] = {"cleanPodPolicy": "Running" if training else "None"}
    if options.gang:
        policy["schedulingPolicy"] = {"minAvailable": spec.resources.nodes}
    job_labels = {**labels, **({"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {})}
    job: dict[str, Any] = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "PyTorchJob",
        "metadata": _metadata(spec, name, job_labels, options.annotations),
        # a string by its schema. The operator's WORLD_SIZE and RANK are no rank's: node.sh starts those
        "spec": {"nprocPerNode": str(spec.per_node), "runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
    # a changed script is a changed job, also for whoever compares manifests
    told = [[file.path, file.text] for file in files]  # not the archive: compressors differ
    digest = hashlib.sha256(json.dumps([told, job], sort_keys=True).encode()).hexdigest()[:16]
    job["metadata"]["annotations"] = {**options.annotations, DIGEST: digest}
    return [config_map, job]


def _archived(files: Sequence[File]) -> tuple[list[File], str]:
    """The preflight's 30 modules as one zip file, base64: Python runs it as it is, and a manifest stays readable."""
    code = [file for file in files if file.path.startswith(bundles.CODE + "/")]
    if not code:
        return list(files), ""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compresslevel=9) as archive:
        for file in code:
            entry = zipfile.ZipInfo(file.path.removeprefix(bundles.CODE + "/"))  # of 1980: nothing varies by itself
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, file.text)
    return [file for file in files if file not in code], base64.b64encode(buffer.getvalue()).decode()


def _key(path: str) -> str:
    """A ConfigMap's key has no slash: node.rank.py."""
    return path.replace("/", ".")


def _mounted(config_map: dict[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """The volume that has every file at its path again."""
    items = [{"key": key, "path": path} for key, path in paths.items()]
    return {"name": "bundle", "configMap": {"name": config_map["metadata"]["name"], "items": items}}


def _metadata(spec: JobSpec, name: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if spec.kubernetes.namespace:
        metadata["namespace"] = spec.kubernetes.namespace
    metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata


# a uid that the image does not know has / as its home; the operator's RANK is the node's
COMMAND = '[ -w "$HOME" ] || export HOME=/tmp; '
TRAIN = f'NODE_RANK=$RANK exec bash "{MOUNT}/node.sh"'
# no $(( )): Kubernetes reads $( itself. The first process of a pod ignores a SIGTERM that it has no trap for
CHECK = (
    "((port = MASTER_PORT + 1)); export NODE_RANK=$RANK DSLAUNCH_COORDINATOR=$MASTER_ADDR:$port; "
    f"""trap 'exit 143' TERM; bash "{MOUNT}/preflight.sh" & wait "$!\""""
)


def _template(spec: JobSpec, labels: dict[str, str], bundle: dict[str, Any], training: bool) -> dict[str, Any]:
    options = spec.kubernetes
    assert spec.box is not None
    mounts: list[dict[str, Any]] = [
        {"name": "bundle", "mountPath": MOUNT, "readOnly": True},
        {"name": "shm", "mountPath": SHM},
    ]
    volumes: list[dict[str, Any]] = [
        bundle,
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
    ]
    env: list[dict[str, Any]] = [{"name": "DSLAUNCH_LOGS", "value": LOGS}]
    if spec.checks_nodes or not training:  # nodes are what is found bad, and what the next attempt excludes
        env.append({"name": "DSLAUNCH_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    if not training:
        env.append({"name": pods.TO_LOG, "value": "1"})
    for index, volume in enumerate(options.volumes):
        volumes.append({"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{index}", "mountPath": volume.mount, "readOnly": volume.read_only})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": spec.box.image,
        "command": ["bash", "-c", COMMAND + (TRAIN if training else CHECK)],
        "env": [*env, *_secrets(spec)],
        "terminationMessagePolicy": "FallbackToLogsOnError",  # what fails before it can write its own
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
        "terminationGracePeriodSeconds": GRACE if training else 30,
        "securityContext": security,
        "containers": [container],
        "volumes": volumes,
    }
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    if options.exclude:
        # by name, which a label need not be; the API takes one name for each of these
        terms = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in options.exclude]
        required = {"nodeSelectorTerms": [{"matchFields": terms}]}
        pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
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
