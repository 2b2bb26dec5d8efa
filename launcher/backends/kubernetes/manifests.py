"""The job object of whichever kind, and the ConfigMaps with its scripts, dicts until one dump."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import posixpath
import shlex
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, setting, software, yamldoc
from launcher.backends.kubernetes import kinds, patch, pod, queueing
from launcher.backends.kubernetes.pod import MOUNT as MOUNT
from launcher.backends.kubernetes.pod import RUN as RUN
from launcher.bundle import Bundle, File, Tree
from launcher.errors import Problem, UserError
from launcher.plan import Plan
from launcher.plan.checkpoint import SLACK_SECONDS, SLOWEST_WRITE
from launcher.preflight import Setting
from launcher.spec import JobSpec, Preflight, Recover, check
from launcher.spec.words import AT_RUN

ENTRY = "manifests.yaml"
GRACE = 120  # seconds between a pod's SIGTERM and its end, at least: time for a checkpoint
CLOSING = 20  # of them for the supervisor to kill, sweep and report
ARCHIVE = f"{bundles.CODE}.zip"
TREE = "snapshot"
HERE = "/tmp/dslaunch"  # noqa: S108 - where a pod puts it together: a mounted ConfigMap cannot be written to
APPLY_LIMIT = 260_000  # bytes of JSON: `kubectl apply` writes it into an annotation too, and those end at 262,144
ROOM = 10_000  # of them for names and labels
PART = 240_000  # characters of base64 in one ConfigMap
JOIN = 900.0  # seconds for all pods to report: one node has the image, another pulls 20 GB at 50 MB/s in 400
DIGEST, REASON = "dslaunch.dev/digest", "dslaunch.dev/reason"
MANAGED_BY, COMPONENT = "app.kubernetes.io/managed-by", "app.kubernetes.io/component"


def render(plan: Plan, *, code: Tree | None = None) -> Bundle:
    """One YAML file with all documents; the same job and code give the same bytes."""
    _check(plan.spec, plan, training=True, code=code)
    return Bundle((File(ENTRY, yamldoc.dump(manifests(plan, code=code))),), ENTRY)


def preflight(spec: JobSpec, plan: Plan | None, *, code: Tree | None = None) -> Bundle:
    """A job of its own that checks the nodes of its pods and ends with the verdict's code."""
    _check(spec, plan, training=False, code=code)
    name = checking(spec.name)
    files = bundles.preflight_files(spec, nccl.variables(spec), _setting(spec, plan, name), submitted_from=False)
    documents = _documents(spec, name, files, CHECK, code=code)
    told = next(file for file in files if file.path == "preflight.json")
    return Bundle((File(ENTRY, yamldoc.dump(documents)), told), ENTRY)


def kind(spec: JobSpec) -> str:
    """What it is called: a JobSet."""
    return kinds.of(spec).kind


def checking(name: str) -> str:
    """The job that checks the nodes of `demo` is demo-preflight."""
    return name if name.split("-")[-1] == "preflight" else f"{name}-preflight"


def _setting(spec: JobSpec, plan: Plan | None, name: str) -> Setting:
    asked = spec.preflight.join_timeout
    patience = JOIN if asked == Preflight().join_timeout else asked
    return replace(
        setting.make(spec, plan), name=name, join_timeout=patience, late=patience, left_out=spec.kubernetes.exclude
    )


def _check(spec: JobSpec, plan: Plan | None, *, training: bool, code: Tree | None = None) -> None:
    problems: list[Problem] = []
    problems += kinds.problems(spec, plan, training=training)
    if spec.services:
        message = "services run beside the training in an allocation of Slurm's; pods are no steps of one"
        hint = "a Deployment or a JobSet of its own, whose Service name train.command is given"
        problems.append(Problem(message, hint, ("services",)))
    if spec.box is None:
        problems.append(Problem("pods need an image", "container: IMAGE with torch and deepspeed in it", ("name",)))
    if spec.train.launcher == "srun" and training:
        problems.append(Problem("launcher srun needs Slurm", "torchrun or deepspeed", ("train", "launcher")))
    if spec.train.launcher == "job" and training:
        message = "launcher job needs Slurm: pods have neither srun nor ssh to each other"
        problems.append(Problem(message, "launcher: node runs your command on every node", ("train", "launcher")))
    if spec.resources.spares:
        message = "a PyTorchJob has no spare pods: Kubernetes itself replaces a node that is not ready"
        problems.append(Problem(message, "spares: 0", ("resources", "spares")))
    if spec.modules:
        problems.append(Problem("pods have no environment modules", "put the software in the image", ("modules",)))
    for at, text in check.texts(spec):
        for name in AT_RUN.findall(text):
            if name.startswith("SLURM_"):
                message = f"a pod has no {name}"
                problems.append(Problem(message, "a path, or {job: id}, {node: rank}, {node: name}", at))
    if spec.box and spec.box.mounts:
        hint = "kubernetes.volumes: [{claim: , mount: }]"
        problems.append(Problem("container.mounts are for Slurm's runtimes", hint, ("container", "mounts")))
    problems += software.problems(spec, "kubernetes")
    if pod.taken(spec) and code is None:
        message = "the code was not taken: manifests alone have no directory to take it from"
        problems.append(Problem(message, "code: {clone: https://..., ref: COMMIT} fetches it there", ("code",)))
    for name, secret in spec.credentials.items():
        if not secret.secret:
            hint = (
                f"kubectl create secret generic NAME --from-literal=KEY=..., then {name}: {{secret: NAME, key: KEY}}"
            )
            at = software.credential(spec, name)
            problems.append(Problem(f"secret {name} has no Kubernetes Secret", hint, at))
    for what, path in (("workdir", spec.train.workdir), ("venv", spec.venv)):
        brought = what == "workdir" and (pod.cloned(spec) or pod.taken(spec))  # which it begins at
        if path and path != "." and not path.startswith("/") and not brought:
            at = ("train", what) if what == "workdir" else (what,)
            problems.append(Problem(f"{what} {path} is relative, and a pod has no job file to be relative to",
                                    "a path in the image or on a volume", at))  # fmt: skip
    problems += pod.problems(spec, plan)
    if not problems and plan and training:
        problems += _uncounted(plan)
    if not problems and training:
        empty = {"name": "bundle", "emptyDir": {}}
        problems += kinds.unsaid(spec, pod.template(spec, labels={}, bundle=empty, command="", training=True,
                                                    recovers=False, ending=GRACE))  # fmt: skip
    if problems:
        raise UserError(*problems)


def _uncounted(plan: Plan) -> Iterator[Problem]:
    """A number of attempts that is not the default's was meant, and nobody would count it."""
    spec, asked = plan.spec, plan.spec.recover.attempts
    if asked in (0, Recover().attempts) or recovers(plan):
        return
    policy = spec.kubernetes.run_policy
    if spec.kubernetes.kind == "trainjob":
        why, hint = f"the runtime of a TrainJob, {spec.kubernetes.runtime}, says how often", "kind: jobset"
    elif spec.kubernetes.elastic:
        why, hint = "ranks of an elastic job meet again", "kubernetes.elastic.max_restarts"
    elif not kinds.recovers(spec):
        said = f"restart_policy: {policy.restart_policy}" if policy.restart_policy else "max_restarts: 0"
        why, hint = f"run_policy.{said} says how often", "leave that out"
    else:
        why = "a job starts again from checkpoints, and these end with the pods"
        hint = "kubernetes.volumes with a claim around train.checkpoint.dir"
    message = f"attempts {asked}, and nobody would count them: {why}"
    yield Problem(message, f"{hint}; or leave attempts out", ("recover", "attempts"))


def notes(plan: Plan) -> list[str]:
    """What runs, and will surprise."""
    found, train = [], plan.spec.train
    if pod.lasting(plan) is None:
        found.append(f"checkpoints in {plan.checkpoint_dir} end with the pods: put train.checkpoint.dir on a volume")
    elif plan.spec.recover.attempts == 0 and plan.spec.kubernetes.kind != "trainjob":  # its runtime counts
        found.append("recover.attempts is 0: the first pod that fails ends the job")
    again = plan.spec.kubernetes.run_policy.max_restarts
    if pod.lasting(plan) is None and plan.spec.recover.attempts and kinds.recovers(plan.spec):
        found.append(
            f"run_policy.max_restarts {again}: all pods start again, from nothing: no checkpoint outlives them"
            if again
            else "a failure ends the job: starting again needs checkpoints on a volume, which keeps count too"
        )
    if (ending := grace(plan)) < kinds.KUBELET:
        found.append(f"grace {ending}: the ranks get {saving(ending)} s of it, and a checkpoint may need more")
    brought = pod.cloned(plan.spec) or pod.taken(plan.spec)
    if train.script and not train.script.startswith("/") and train.workdir == "." and not brought:
        found.append(f"{train.script} has to be in the image, in its own working directory; or set train.workdir")
    patched = []
    if plan.spec.kubernetes.patch or plan.spec.kubernetes.pod_patch:
        job = manifests(plan)[-1]
        patched = [one["spec"] for one in kinds.templates(job) if "trainer" not in job["spec"]]
    variables = {row.name for row in plan.variables.rows}
    return [*found, *kinds.notes(plan.spec), *pod.notes(plan.spec, variables, patched)]


def manifests(plan: Plan, *, code: Tree | None = None) -> list[dict[str, Any]]:
    """The job, behind the ConfigMaps that it mounts."""
    spec = plan.spec
    told = _setting(spec, plan, spec.name) if spec.checks_nodes else None
    flags = [f"--grace {saving(grace(plan))}"]
    if not recovers(plan):
        files = bundles.common(plan, told, flags=flags, submitted_from=False)
        return _documents(spec, spec.name, files, TRAIN, ending=grace(plan), code=code)
    files = bundles.common(plan, told, flags=[*flags, "--shared-logs"], submitted_from=False)
    there = {file.path for file in files}
    more = [bundles.node_file(name) for name in POD if f"node/{name}" not in there]
    more = [*files, *more]
    return _documents(spec, spec.name, more, _again(plan), recovers=True, ending=grace(plan), code=code)


def recovers(plan: Plan) -> bool:
    """Whether pods start again after a failure: the count of it has to outlive them, and so have checkpoints."""
    found = pod.lasting(plan)
    return bool(plan.spec.recover.attempts and found and not found.read_only and kinds.recovers(plan.spec))


def grace(plan: Plan) -> int:
    """Seconds to end the step, to save as slowly as a slow write does, and to close: 1.5 x 40 + 60 + 12 = 132."""
    options = plan.spec.kubernetes
    if not kinds.says_grace(options):
        return kinds.KUBELET  # the runtime's, which says nothing about it as it is installed
    if options.grace is not None:
        return options.grace
    write = plan.saving.write_seconds if plan.saving else 0.0
    step = plan.time.seconds if plan.time else 0.0
    return max(GRACE, ceil(SLOWEST_WRITE * write + SLACK_SECONDS + step))


def saving(ending: int) -> int:
    """Seconds of a gentle end that the ranks get to save in: 100 of 120, 7 of 15."""
    return ending - CLOSING if ending >= kinds.KUBELET else max(1, ending // 2)


def _bundle(name: str) -> str:
    return f"{name}-bundle"


def _documents(
    spec: JobSpec,
    name: str,
    files: Sequence[File],
    start: str,
    *,
    recovers: bool = False,
    ending: int = 30,
    code: Tree | None = None,
) -> list[dict[str, Any]]:
    training = start != CHECK
    code = code if pod.taken(spec) else None
    start = _unpacked(code) + start if code else start
    options = spec.kubernetes
    labels = {
        **options.labels,
        "app.kubernetes.io/name": name,
        COMPONENT: "training" if training else "preflight",
        MANAGED_BY: "dslaunch",
    }
    carried, archive = _archived(files)
    paths = {_key(file.path): file.path for file in carried}
    config_maps = [
        _config_map(spec, f"{_bundle(name)}-{number}" if number else _bundle(name), labels, data=data)
        for number, data in enumerate(_spread(carried))
    ]
    packed = base64.b64encode(code.data).decode() if code else ""
    for suffix, path, content in (("code", ARCHIVE, archive), ("tree", f"{TREE}.tar.gz", packed)):
        for number, start_of in enumerate(range(0, len(content), PART)):
            key = _key(f"{path}.{number}")
            paths[key] = f"{path}.{number}"
            part = {key: content[start_of : start_of + PART]}
            config_maps.append(_config_map(spec, f"{name}-{suffix}-{number}", labels, binaryData=part))
    called = kinds.of(spec, training=training)
    ranks = "" if kinds.elastic(spec, training=training) else called.ranks
    template = pod.template(
        spec, labels=labels, bundle=_mounted(config_maps, paths), command=COMMAND.replace(RANKS, ranks) + start,
        training=training, recovers=recovers, ending=ending, container=called.container,
    )  # fmt: skip
    gpu = pod.gpu_resource(spec) if spec.resources.gpus_per_node else ""
    if options.pod_patch:
        at = ("kubernetes", "pod_patch")
        template = patch.apply(template, options.pod_patch, container=called.container, gpu=gpu, at=at)
    made = kinds.job(spec, name, template, training=training, recovers=recovers)
    job_labels = {**labels, **queueing.labels(options)}
    metadata = _metadata(spec, name, job_labels, options.annotations)
    job = {"apiVersion": made["apiVersion"], "kind": made["kind"], "metadata": metadata, "spec": made["spec"]}
    if options.patch and called is kinds.of(spec):  # a TrainJob's nodes are checked by another kind
        job = patch.apply(job, options.patch, container=called.container, gpu=gpu)
    group = queueing.pod_group(spec, name)
    if group:
        group["metadata"] = _metadata(spec, name, labels, {})
    # a changed script is a changed job, also for whoever compares manifests
    told = [[file.path, file.text] for file in files]  # not the archive: compressors differ
    told += [[TREE, code.digest]] if code else []
    whole = [told, job, group] if group else [told, job]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
    job["metadata"]["annotations"] = {**job["metadata"].get("annotations", {}), DIGEST: digest}
    return [*config_maps, *([group] if group else []), job]


def _config_map(spec: JobSpec, name: str, labels: dict[str, str], **content: dict[str, str]) -> dict[str, Any]:
    found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(spec, name, labels, {}), **content}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    size = len(text.encode()) + 5 * sum(map(text.count, "<>&"))  # which kubectl writes as \u003c
    if size > APPLY_LIMIT:
        largest = max(content.get("data", {"": ""}).items(), key=lambda row: len(row[1]))[0]
        message = f"{largest} has {size:,} bytes, and `kubectl apply` takes {APPLY_LIMIT:,} in a ConfigMap"
        raise UserError(Problem(message, "what is so long belongs in the image, or on a volume"))
    return found


def _spread(files: Sequence[File]) -> list[dict[str, str]]:
    """The files over as few ConfigMaps as take them, in their order."""
    maps: list[dict[str, str]] = [{}]
    for file in files:
        size = sum(map(_size, [*maps[-1].values(), file.text]))
        if maps[-1] and size > APPLY_LIMIT - ROOM:
            maps.append({})
        maps[-1][_key(file.path)] = file.text
    return maps


def _size(text: str) -> int:
    """Bytes of it in the annotation in which kubectl writes down what it applied."""
    return len(json.dumps(text, ensure_ascii=False).encode()) + 5 * sum(map(text.count, "<>&"))


def _archived(files: Sequence[File]) -> tuple[list[File], str]:
    """The 50 modules that travel as one zip file, base64: Python runs it as it is, and a manifest stays readable."""
    code = tuple(file for file in files if file.path.startswith(bundles.CODE + "/"))
    return [file for file in files if file not in code], _zipped(code)


@lru_cache(maxsize=4)  # every point of a sweep has the same ones, and a submission asks several times
def _zipped(code: tuple[File, ...]) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compresslevel=9) as archive:
        for file in code:
            entry = zipfile.ZipInfo(file.path.removeprefix(bundles.CODE + "/"))  # of 1980: nothing varies by itself
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, file.text)
    return base64.b64encode(buffer.getvalue()).decode()


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


def _unpacked(code: Tree) -> str:
    """The first step of a pod that brings its code: into a directory it can write to, and to the job file's place."""
    place = shlex.quote(code.job).replace("$(", "$$(")  # $( in a command is Kubernetes' own
    return (
        f'mkdir -p "{HERE}/{TREE}" && cat "{MOUNT}/{TREE}.tar.gz."* | tar -xzmf - -C "{HERE}/{TREE}" '
        f'&& cd "{HERE}/{TREE}"/{place} && '
    )


def tree(documents: Sequence[Mapping[str, Any]]) -> Tree | None:
    """The code that manifests carry, as `render` was given it."""
    held = [one["binaryData"] for one in documents if one.get("kind") == "ConfigMap" and one.get("binaryData")]
    parts = {key: value for row in held for key, value in row.items() if key.startswith(f"{TREE}.tar.gz.")}
    if not parts:
        return None
    data = b"".join(base64.b64decode(parts[key]) for key in sorted(parts))
    whole = gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        first = archive.getnames()[0]
    return Tree(data, first, hashlib.sha256(whole).hexdigest())


RANKS = "export NODE_RANK; "  # which line does that is the kind's
# a uid that the image does not know has / as its home
COMMAND = (
    f'{RANKS}mkdir -p "{HERE}" && cp -rL "{MOUNT}"/* "{HERE}" && cat "{HERE}/{ARCHIVE}".* >"{HERE}/{ARCHIVE}" && '
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
    folder = posixpath.join(pod.checkpoints(plan), ".dslaunch", plan.spec.name)
    venv = [shlex.quote(f"{plan.spec.venv}/bin/python3")] if plan.spec.venv else []
    gang = "--gang " if plan.spec.kubernetes.kind == "jobset" else ""
    return (
        f"{{ for python in python3 {' '.join([*venv, '/opt/conda/bin/python3'])}; do "
        'command -v "$python" >/dev/null && break; done; '
        f'exec "$python" -u "{HERE}/node/pod.py" --folder {shlex.quote(folder)} --nodes {plan.spec.resources.nodes} '
        f'--attempts {plan.spec.recover.attempts} {gang}-- bash "{HERE}/node.sh"; }}'
    )
