"""A PyTorchJob v1 and the ConfigMap with its scripts, dicts until one dump."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import posixpath
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, setting, yamldoc
from launcher.bundle import Bundle, File
from launcher.errors import Problem, UserError
from launcher.plan import Plan
from launcher.plan.checkpoint import SLACK_SECONDS, SLOWEST_WRITE
from launcher.preflight import Setting, pods
from launcher.spec import JobSpec, Preflight
from launcher.spec.kubernetes import Volume

ENTRY = "manifests.yaml"
MOUNT = "/opt/dslaunch"
LOGS = "/tmp/dslaunch-logs"  # noqa: S108 - inside the pod, which nobody shares
PORT = 23456  # the operator's default, named so that its Service carries it
SHM = "/dev/shm"  # noqa: S108 - where NCCL and data loaders expect it
GRACE = 120  # seconds between a pod's SIGTERM and its end, at least: time for a checkpoint
CLOSING = 20  # of them for the supervisor to kill, sweep and report
ARCHIVE = f"{bundles.CODE}.zip"
HERE = "/tmp/dslaunch"  # noqa: S108 - where a pod puts it together: a mounted ConfigMap cannot be written to
APPLY_LIMIT = 260_000  # bytes of JSON: `kubectl apply` writes it into an annotation too, and those end at 262,144
PART = 240_000  # characters of base64 in one ConfigMap
JOIN = 900.0  # seconds for all pods to report: one node has the image, another pulls 20 GB at 50 MB/s in 400
GROUP, VERSION, PLURAL = "kubeflow.org", "v1", "pytorchjobs"
DIGEST, REASON = "dslaunch.dev/digest", "dslaunch.dev/reason"
RUN = "dslaunch.dev/run"  # the run that created an object; text that is printed has none
NO_LIMIT = 2**31 - 1
MANAGED_BY, COMPONENT = "app.kubernetes.io/managed-by", "app.kubernetes.io/component"


def render(plan: Plan) -> Bundle:
    """One YAML file with all documents; the same job gives the same bytes."""
    _check(plan.spec, plan, training=True)
    return Bundle((File(ENTRY, yamldoc.dump(manifests(plan))),), ENTRY)


def preflight(spec: JobSpec, plan: Plan | None) -> Bundle:
    """A PyTorchJob of its own that checks the nodes of its pods and ends with the verdict's code."""
    _check(spec, plan, training=False)
    name = checking(spec.name)
    files = bundles.preflight_files(spec, nccl.variables(spec), _setting(spec, plan, name), submitted_from=False)
    documents = _documents(spec, name, files, CHECK)
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
    name = options.gpu_resource
    if "/" not in name:
        yield Problem(f"gpu_resource {name} has no domain", "such as nvidia.com/gpu", ("kubernetes", "gpu_resource"))
    for name in options.network.resources:
        if "/" not in name:
            at = ("kubernetes", "network", "resources", name)
            yield Problem(f"resource {name} has no domain", "such as rdma/hca", at)
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
    elif plan.spec.recover.attempts == 0:
        found.append("recover.attempts is 0: the first pod that fails ends the job")
    if _volume_with(_checkpoints(plan), plan.spec) is None and plan.spec.recover.attempts:
        found.append("a failure ends the job: starting again needs checkpoints on a volume, which keeps count too")
    if train.script and not train.script.startswith("/") and train.workdir == ".":
        found.append(f"{train.script} has to be in the image, in its own working directory; or set train.workdir")
    return found


def manifests(plan: Plan) -> list[dict[str, Any]]:
    """The job, behind the ConfigMap that it mounts."""
    spec = plan.spec
    told = _setting(spec, plan, spec.name) if spec.checks_nodes else None
    flags = [f"--grace {grace(plan) - CLOSING}"]  # what the ranks get to save in
    if not recovers(plan):
        files = bundles.common(plan, told, flags=flags, submitted_from=False)
        return _documents(spec, spec.name, files, TRAIN, ending=grace(plan))
    files = bundles.common(plan, told, flags=[*flags, "--shared-logs"], submitted_from=False)
    there = {file.path for file in files}
    more = [bundles.node_file(name) for name in POD if f"node/{name}" not in there]
    return _documents(spec, spec.name, [*files, *more], _again(plan), recovers=True, ending=grace(plan))


def recovers(plan: Plan) -> bool:
    """Whether pods start again after a failure: the count of it has to outlive them, and so have checkpoints."""
    found = _volume_with(_checkpoints(plan), plan.spec)
    return bool(plan.spec.recover.attempts and found and not found.read_only)


def grace(plan: Plan) -> int:
    """Seconds to end the step, to save as slowly as a slow write does, and to close: 1.5 x 40 + 60 + 12 = 132."""
    write = plan.saving.write_seconds if plan.saving else 0.0
    step = plan.time.seconds if plan.time else 0.0
    return max(GRACE, ceil(SLOWEST_WRITE * write + SLACK_SECONDS + step))


def _bundle(name: str) -> str:
    return f"{name}-bundle"


def _documents(
    spec: JobSpec, name: str, files: Sequence[File], start: str, *, recovers: bool = False, ending: int = 30
) -> list[dict[str, Any]]:
    training = start != CHECK
    options = spec.kubernetes
    labels = {
        **options.labels,
        "app.kubernetes.io/name": name,
        COMPONENT: "training" if training else "preflight",
        MANAGED_BY: "dslaunch",
    }
    carried, archive = _archived(files)
    paths = {_key(file.path): file.path for file in carried}
    config_maps = [_config_map(spec, _bundle(name), labels, data={_key(file.path): file.text for file in carried})]
    for number, start_of in enumerate(range(0, len(archive), PART)):
        path = f"{ARCHIVE}.{number}"
        paths[_key(path)] = path
        part = {_key(path): archive[start_of : start_of + PART]}
        config_maps.append(_config_map(spec, f"{name}-code-{number}", labels, binaryData=part))
    template = _template(spec, labels, _mounted(config_maps, paths), start, recovers, ending)
    # ExitCode: a pod that ends with 128 or more is deleted and created again, and less ends the job
    replica: dict[str, Any] = {"restartPolicy": "ExitCode" if recovers else "Never", "template": template}
    replicas: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
    if spec.resources.nodes > 1:
        replicas["Worker"] = {"replicas": spec.resources.nodes - 1, **replica}
    # when one pod has failed, the others free their GPUs; those of a preflight end by themselves, and one of them
    # that fails is no reason to stop before there is a verdict
    policy: dict[str, Any] = {"cleanPodPolicy": "Running" if training else "None"}
    if recovers:
        # node/pod.py counts, on the volume. The operator forgets what it counted when it creates a pod again, cannot
        # know that a new checkpoint was saved, and with 0 ends the job at the first failure
        policy["backoffLimit"] = NO_LIMIT
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
    return [*config_maps, job]


def _config_map(spec: JobSpec, name: str, labels: dict[str, str], **content: dict[str, str]) -> dict[str, Any]:
    found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(spec, name, labels, {}), **content}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    size = len(text.encode()) + 5 * sum(map(text.count, "<>&"))  # which kubectl writes as \u003c
    if size > APPLY_LIMIT:
        message = f"scripts and config have {size:,} bytes, and `kubectl apply` takes {APPLY_LIMIT:,} in a ConfigMap"
        raise UserError(Problem(message))
    return found


def _archived(files: Sequence[File]) -> tuple[list[File], str]:
    """The 50 modules that travel as one zip file, base64: Python runs it as it is, and a manifest stays readable."""
    code = [file for file in files if file.path.startswith(bundles.CODE + "/")]
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


def _mounted(config_maps: Sequence[dict[str, Any]], paths: Mapping[str, str]) -> dict[str, Any]:
    """The volume that has every file at its path again, whichever ConfigMap it came in."""
    sources = []
    for one in config_maps:
        keys = one.get("data") or one["binaryData"]
        items = [{"key": key, "path": paths[key]} for key in keys]
        sources.append({"configMap": {"name": one["metadata"]["name"], "items": items}})
    return {"name": "bundle", "projected": {"sources": sources}}


def _metadata(spec: JobSpec, name: str, labels: dict[str, str], annotations: dict[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if spec.kubernetes.namespace:
        metadata["namespace"] = spec.kubernetes.namespace
    metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata


# a uid that the image does not know has / as its home; the operator's RANK is the node's
COMMAND = (
    '[ -w "$HOME" ] || export HOME=/tmp; '
    f'export NODE_RANK=$RANK; mkdir -p "{HERE}" && cp -rL "{MOUNT}"/* "{HERE}" && '
    f'cat "{HERE}/{ARCHIVE}".* >"{HERE}/{ARCHIVE}" && '
)
TRAIN = f'exec bash "{HERE}/node.sh"'
# no $(( )): Kubernetes reads $( itself. The first process of a pod ignores a SIGTERM that it has no trap for
CHECK = (
    "{ ((port = MASTER_PORT + 1)); export DSLAUNCH_COORDINATOR=$MASTER_ADDR:$port; "
    f"""trap 'exit 143' TERM; bash "{HERE}/preflight.sh" & wait "$!"; }}"""
)
POD = ("pod.py", "journal.py", "recover.py")  # what counts a job's attempts, before any environment is loaded


def _again(plan: Plan) -> str:
    """As TRAIN, in the hands of node/pod.py. Its Python is whichever there is without the job's environment."""
    folder = posixpath.join(_checkpoints(plan), ".dslaunch", plan.spec.name)
    venv = [shlex.quote(f"{plan.spec.venv}/bin/python3")] if plan.spec.venv else []
    return (
        f"{{ for python in python3 {' '.join([*venv, '/opt/conda/bin/python3'])}; do "
        'command -v "$python" >/dev/null && break; done; '
        f'exec "$python" -u "{HERE}/node/pod.py" --folder {shlex.quote(folder)} --nodes {plan.spec.resources.nodes} '
        f'--attempts {plan.spec.recover.attempts} -- bash "{HERE}/node.sh"; }}'
    )


def _template(
    spec: JobSpec, labels: dict[str, str], bundle: dict[str, Any], start: str, recovers: bool, ending: int
) -> dict[str, Any]:
    options, training = spec.kubernetes, start != CHECK
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
    if spec.checks_nodes or not training or recovers:  # what is found bad, and what the next attempt excludes
        env.append({"name": "DSLAUNCH_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    if not training:
        env.append({"name": pods.TO_LOG, "value": "1"})
    if recovers:  # empty where kubectl created the job
        run = {"fieldRef": {"fieldPath": f"metadata.annotations['{RUN}']"}}
        env.append({"name": "DSLAUNCH_RUN", "valueFrom": run})
    for index, volume in enumerate(options.volumes):
        volumes.append({"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": f"volume-{index}", "mountPath": volume.mount, "readOnly": volume.read_only})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": spec.box.image,
        "command": ["bash", "-c", COMMAND + start],
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
    if options.security.run_as_user:
        security = {
            "runAsNonRoot": True,
            "runAsUser": options.security.run_as_user,
            "fsGroup": options.security.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",  # a volume of checkpoints takes minutes to walk through
            **security,
        }
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": ending,
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
    amounts.update(options.network.resources)
    return amounts
