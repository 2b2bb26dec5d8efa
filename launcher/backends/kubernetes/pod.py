"""The pod of a job, whichever object asks for it: one template, dicts until one dump."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher import facts, software
from launcher.backends.kubernetes import network, patch, security
from launcher.errors import Path, Problem, UserError
from launcher.plan import Plan
from launcher.preflight import pods
from launcher.spec import JobSpec
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, looks_secret
from launcher.spec.kubernetes import EnvFrom, Kubernetes, NodeTerm, PodTerm, Scratch, Sidecar, Volume
from launcher.spec.software import Code, Secret

Object = dict[str, Any]

MOUNT = "/opt/dslaunch"
LOGS = "/tmp/dslaunch-logs"  # noqa: S108 - inside the pod, which nobody shares
PORT = 23456  # the operator's default, named so that its Service carries it
SHM = "/dev/shm"  # noqa: S108 - where NCCL and data loaders expect it
RUN = "dslaunch.dev/run"  # the run that created an object; text that is printed has none
OURS = ("app.kubernetes.io/name", "app.kubernetes.io/component")  # labels that tell a job's pods from others
NODE = "kubernetes.io/hostname"
# Most images for training say nothing of a user, or root. The restricted profile wants neither, and one that is
# said here runs them as they are: files of the image can be read, /tmp and volumes written.
USER = 1000
CODE = "/workspace"  # where a clone lies when workdir names no place
SECRET_MODE = 0o440  # the group's, which fsGroup is
SOURCES = ("claim", "nfs", "csi", "host_path", "scratch", "config_map", "secret", "projected")
# a uid that the image does not know has / as its home, and no name: torch asks for both
WELCOME = '[ -w "$HOME" ] || export HOME=/tmp; export USER=${USER:-dslaunch}; '
# not after hours: fsGroup changes nothing on volumes that several nodes share (FSx, EFS, Filestore, NFS)
KEEP = (
    "mkdir -p {place} 2>/dev/null; [ -w {place} ] || {{ echo dslaunch: user $UID cannot write to {place}: "
    "kubernetes.security.run_as_user: UID of its owner >&2; exit 73; }}; "
)
# the image's own directory, with room for what the job writes: checkpoints, logs of trackers
ROOM = (
    '[ -w . ] || { mkdir -p /tmp/workdir; for one in "$PWD"/* "$PWD"/.[!.]*; do '
    '[ ! -e "$one" ] || ln -sf "$one" /tmp/workdir; done; cd /tmp/workdir; }; '
)
RESTRICTED: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def template(
    spec: JobSpec,
    *,
    labels: dict[str, str],
    bundle: Object,
    command: str,
    training: bool,
    recovers: bool,
    ending: int,
    container: str = "pytorch",
) -> Object:
    """{"metadata", "spec"} of a pod; the first of its containers, named so, is the one that trains.

    `bundle` is the volume with the scripts, `command` what bash runs, `ending` the seconds of a gentle end.
    """
    options, fabric = spec.kubernetes, network.attachment(spec)
    assert spec.box is not None
    volumes, mounts = _volumes(spec, bundle, fabric)
    libraries = ":".join(fabric.profile.ranks.get("libraries", ())) if fabric.profile else ""
    if libraries:  # in front of the image's own, which a variable of the pod would replace
        command = f"export LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}; {command}"
    trainer: Object = {
        "name": container,  # the operators look for it by its name
        "image": spec.box.image,
        "command": ["bash", "-c", WELCOME + _writable(spec, training) + command],
        "env": [*_variables(spec, training=training, recovers=recovers), *_secrets(spec.credentials)],
        "terminationMessagePolicy": "FallbackToLogsOnError",  # what fails before it can write its own
        "ports": [_port(spec, labels)],
        "securityContext": _rights(spec),
        "volumeMounts": mounts,
    }
    if options.image_pull_policy:
        trainer["imagePullPolicy"] = options.image_pull_policy
    if options.env_from or options.secret_env_from:
        trainer["envFrom"] = _env_from(options.env_from, options.secret_env_from)
    if cloned(spec) and not spec.train.workdir.startswith("/"):
        trainer["workingDir"] = CODE
    amounts = _amounts(spec, fabric)
    if limits := _limits(spec, amounts):
        # requests too: a gang scheduler adds up requests and forgets what stands in limits alone
        trainer["resources"] = {"limits": limits, **({"requests": dict(amounts)} if amounts else {})}
    elif amounts:
        trainer["resources"] = {"requests": dict(amounts)}
    pod: Object = {
        "automountServiceAccountToken": options.service_account_token,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": ending,
        "securityContext": _user(spec),
        "containers": [trainer],
        "volumes": volumes,
    }
    if claims := _claims(spec):
        trainer.setdefault("resources", {})["claims"] = [{"name": name} for name in claims]
        pod["resourceClaims"] = [
            {"name": name, "resourceClaimTemplateName": template} for name, template in claims.items()
        ]
    if first := [*_beside(fabric), *_clone(spec), *(_sidecar(row) for row in options.sidecars)]:
        pod["initContainers"] = first
    if options.network.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # names of pods are the cluster's
    if options.security.host_ipc:
        pod["hostIPC"] = True
    if options.security.host_pid:
        pod["hostPID"] = True
    pod |= _names(options)
    pod |= _placed(spec, labels)
    metadata: Object = {"labels": {**labels, **options.pod_labels}}
    if annotations := {**fabric.annotations, **options.pod_annotations}:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": pod}


def _names(options: Kubernetes) -> Object:
    """How a pod looks up names; its own policy is in front of host_network's."""
    found: Object = {}
    if dns := options.dns:
        asked = [{"name": name, **({"value": value} if value else {})} for name, value in dns.options.items()]
        given = {"nameservers": list(dns.nameservers), "searches": list(dns.searches), "options": asked}
        if config := {key: value for key, value in given.items() if value}:
            found["dnsConfig"] = config
        if dns.policy:
            found["dnsPolicy"] = dns.policy
    if options.host_aliases:
        found["hostAliases"] = [{"ip": ip, "hostnames": list(names)} for ip, names in options.host_aliases.items()]
    return found


def _writable(spec: JobSpec, training: bool) -> str:
    """What somebody who is not root has to see to: where ranks begin, and where checkpoints go."""
    if spec.kubernetes.security.root:
        return ""
    own = spec.train.workdir == "." and not cloned(spec) and not taken(spec)
    room = ROOM if own else ""
    place = _checkpoints(spec)
    return room + (KEEP.format(place=shlex.quote(place)) if training and place.startswith("/") else "")


def trainer(template: Object) -> Object:
    """The container that trains."""
    found: Object = template["spec"]["containers"][0]
    return found


def _variables(spec: JobSpec, *, training: bool, recovers: bool) -> list[Object]:
    env: list[Object] = [{"name": "DSLAUNCH_LOGS", "value": LOGS}]
    if spec.checks_nodes or not training or recovers:  # what is found bad, and what the next attempt excludes
        env.append({"name": "DSLAUNCH_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    if not training:
        env.append({"name": pods.TO_LOG, "value": "1"})
    if recovers:  # empty where kubectl created the job
        run = {"fieldRef": {"fieldPath": f"metadata.annotations['{RUN}']"}}
        env.append({"name": "DSLAUNCH_RUN", "valueFrom": run})
    env += _fields(spec.kubernetes.env_fields)
    for name, value in spec.kubernetes.env_keys.items():
        key = {"name": value.config_map, "key": value.key, **({"optional": True} if value.optional else {})}
        env.append({"name": name, "valueFrom": {"configMapKeyRef": key}})
    # bash hands on what it cannot export
    env += [{"name": name, "value": _plain(value)} for name, value in spec.kubernetes.pod_env.items()]
    if (interfaces := network.interfaces(spec)) and "NCCL_SOCKET_IFNAME" not in spec.env:
        env.append({"name": "NCCL_SOCKET_IFNAME", "value": interfaces})
    return env


def _plain(value: str) -> str:
    """As it is: $( in a variable's value is Kubernetes' own."""
    return value.replace("$(", "$$(")


def _fields(asked: Mapping[str, str]) -> list[Object]:
    found: list[Object] = []
    for name, path in asked.items():
        if not path.startswith(("limits.", "requests.")):
            found.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
            continue
        resource, _, divisor = path.partition("/")
        source = {"resource": resource, **({"divisor": divisor} if divisor else {})}
        found.append({"name": name, "valueFrom": {"resourceFieldRef": source}})
    return found


def _amount_of(path: str) -> str:
    """limits.memory/1Gi is of memory."""
    return path.partition(".")[2].partition("/")[0]


def _env_from(maps: Sequence[str | EnvFrom], secrets: Sequence[str | EnvFrom]) -> list[Object]:
    found: list[Object] = []
    for kind, asked in (("configMapRef", maps), ("secretRef", secrets)):
        for row in asked:
            one = EnvFrom(row) if isinstance(row, str) else row
            source = {"name": one.name, **({"optional": True} if one.optional else {})}
            found.append({**({"prefix": one.prefix} if one.prefix else {}), kind: source})
    return found


def _secrets(asked: Mapping[str, Secret]) -> list[Object]:
    return [
        {
            "name": name,
            "valueFrom": {
                "secretKeyRef": {
                    "name": source.secret,
                    "key": source.key,
                    **({"optional": True} if source.optional else {}),
                }
            },
        }
        for name, source in asked.items()
    ]


def _claims(spec: JobSpec) -> dict[str, str]:
    """Templates by the names that the pod's claims get: network, network-1."""
    asked = spec.kubernetes.network
    templates = [*([asked.claim_template] if asked.claim_template else []), *asked.claims]
    return {f"network-{number}" if number else "network": template for number, template in enumerate(templates)}


def _port(spec: JobSpec, labels: dict[str, str]) -> Object:
    if not spec.kubernetes.network.host_network:
        return {"name": "pytorchjob-port", "containerPort": PORT}
    number = network.port(labels.get(OURS[0], spec.name))
    return {"name": "pytorchjob-port", "containerPort": number, "hostPort": number}


def _amounts(spec: JobSpec, fabric: network.Attachment) -> dict[str, str]:
    resources, options = spec.resources, spec.kubernetes
    amounts: dict[str, str] = {}
    if resources.cpus_per_node:
        amounts["cpu"] = str(resources.cpus_per_node)
    if resources.memory and resources.memory != "0":
        size = resources.memory  # Slurm's G is 2^30, and its bare number is megabytes
        amounts["memory"] = f"{size}i" if size[-1] in "KMGT" else f"{size}Mi"
    if options.ephemeral_storage:
        amounts["ephemeral-storage"] = str(options.ephemeral_storage)
    if resources.gpus_per_node:
        amounts[gpu_resource(spec)] = str(resources.gpus_per_node)
    return {**amounts, **fabric.resources}


def _limits(spec: JobSpec, amounts: dict[str, str]) -> dict[str, str]:
    limits = dict(amounts)
    for name, limit in (("cpu", spec.kubernetes.cpu_limit), ("memory", spec.kubernetes.memory_limit)):
        if limit == "none":
            limits.pop(name, None)
        elif limit:
            limits[name] = limit
    return limits


MAKERS = {"amd.com/": "AMD", "nvidia.com/": "NVIDIA"}
# Accelerators on which nothing of this runs: ranks are launched, checked and configured for CUDA, ROCm or CPUs.
OTHERS = {
    "habana.ai/": "Gaudi takes Habana's own DeepSpeed and HCCL",
    "aws.amazon.com/neuron": "Trainium and Inferentia take neuronx-distributed",
    "google.com/tpu": "TPUs take torch_xla or JAX",
    "huawei.com/": "Ascend takes torch_npu and HCCL",
    "gpu.intel.com/": "Intel's GPUs take oneCCL",
}


def _maker(spec: JobSpec) -> str:
    """AMD, NVIDIA, or "" where the GPU is not named; a name that no table has is told by the plan."""
    try:
        gpu = facts.gpu(spec.resources.gpu) if spec.resources.gpu and spec.resources.gpus_per_node else None
    except UserError:
        return ""
    return "" if gpu is None else "AMD" if gpu.arch.startswith("cdna") else "NVIDIA"


def gpu_resource(spec: JobSpec) -> str:
    """What a GPU is called: amd.com/gpu of an MI300X."""
    return spec.kubernetes.gpu_resource or ("amd.com/gpu" if _maker(spec) == "AMD" else "nvidia.com/gpu")


# --- who it runs as -------------------------------------------------------------------------------


def _user(spec: JobSpec) -> Object:
    """Of the pod: a user that is not root, whatever the image says."""
    asked = spec.kubernetes.security
    context: Object = {"seccompProfile": _seccomp(asked.seccomp)}
    user = USER if asked.run_as_user is None and not asked.root else asked.run_as_user
    if not asked.root:
        context["runAsNonRoot"] = True
    if isinstance(user, int):
        context["runAsUser"] = user
    if asked.run_as_group is not None:
        context["runAsGroup"] = asked.run_as_group
    if asked.supplemental_groups:
        context["supplementalGroups"] = list(asked.supplemental_groups)
    group = user if asked.fs_group is None and isinstance(user, int) and user else asked.fs_group
    if group is not None:
        # OnRootMismatch: a volume of checkpoints takes minutes to walk through
        context |= {"fsGroup": group, "fsGroupChangePolicy": "OnRootMismatch"}
    return context


def _seccomp(asked: str | None) -> Object:
    if asked in (None, "RuntimeDefault", "Unconfined"):
        return {"type": asked or "RuntimeDefault"}
    return {"type": "Localhost", "localhostProfile": asked}


def _rights(spec: JobSpec) -> Object:
    """Of the container that trains."""
    asked = spec.kubernetes.security
    names = [*(["IPC_LOCK"] if asked.allow_ipc_lock else []), *asked.capabilities]
    added = list(dict.fromkeys(name.removeprefix("CAP_") for name in names))
    if asked.privileged:
        return {"privileged": True, **({"capabilities": {"add": added}} if added else {})}
    # which a process with SYS_ADMIN has in any case, and the API server refuses to deny it
    context: Object = {} if "SYS_ADMIN" in added else {"allowPrivilegeEscalation": False}
    return {**context, "capabilities": {"drop": ["ALL"], **({"add": added} if added else {})}}


# --- volumes --------------------------------------------------------------------------------------


def _volumes(spec: JobSpec, bundle: Object, fabric: network.Attachment) -> tuple[list[Object], list[Object]]:
    """Those of the pod, and where the container that trains has them."""
    size = spec.kubernetes.shm
    volumes: list[Object] = [
        bundle,
        {"name": "shm", "emptyDir": {"medium": "Memory", **({} if size == "none" else {"sizeLimit": size})}},
    ]
    mounts: list[Object] = [
        {"name": "bundle", "mountPath": MOUNT, "readOnly": True},
        {"name": "shm", "mountPath": SHM},
    ]
    if code := cloned(spec):
        volumes.append({"name": "code", "emptyDir": {}})
        mounts.append({"name": "code", "mountPath": _code_at(spec), "subPath": "tree"})
        if code.secret:
            kept = {"secretName": code.secret, "defaultMode": SECRET_MODE}
            volumes.append({"name": "code-secret", "secret": kept})
    for index, volume in enumerate(spec.kubernetes.volumes):
        volumes.append({"name": name_of(volume, index), **_source(volume)})
        mount: Object = {"name": name_of(volume, index), "mountPath": volume.mount, "readOnly": volume.read_only}
        more = {"subPath": volume.sub_path, "mountPropagation": volume.propagation}
        mounts.append({**mount, **{key: value for key, value in more.items() if value}})
    if place := _room_for_checkpoints(spec):
        volumes.append({"name": "checkpoints", "emptyDir": {}})
        mounts.append({"name": "checkpoints", "mountPath": place})
    if fabric.profile:
        for name, source in fabric.profile.volumes.items():
            volumes.append({"name": name, "hostPath": {"path": source["host_path"]}})
        for path, name in fabric.profile.ranks.get("mounts", {}).items():
            mounts.append({"name": name, "mountPath": path})
    return volumes, mounts


def _checkpoints(spec: JobSpec) -> str:
    train = spec.train
    return posixpath.normpath(posixpath.join(train.workdir, train.checkpoint.dir or f"checkpoints/{spec.name}"))


def _room_for_checkpoints(spec: JobSpec) -> str | None:
    """Where they would go into the image, which a user that is not root cannot write to."""
    place = _checkpoints(spec)
    around = cloned(spec) and f"{place}/".startswith(f"{_code_at(spec)}/")
    temporary = f"{place}/".startswith(("/tmp/", f"{SHM}/"))  # noqa: S108 - in the pod
    if spec.kubernetes.security.root or not place.startswith("/") or around or temporary:
        return None
    return None if volume_with(place, spec) else place


def name_of(volume: Volume, index: int) -> str:
    return volume.name or f"volume-{index}"


def _source(volume: Volume) -> Object:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.nfs:
        return {"nfs": {"server": volume.nfs.server, "path": volume.nfs.path, "readOnly": volume.read_only}}
    if volume.csi:
        given = {
            "volumeAttributes": dict(volume.csi.attributes),
            "nodePublishSecretRef": {"name": volume.csi.secret} if volume.csi.secret else None,
            "fsType": volume.csi.fs_type,
        }
        set_too = {key: value for key, value in given.items() if value}
        return {"csi": {"driver": volume.csi.driver, "readOnly": volume.read_only, **set_too}}
    if volume.host_path:
        kind = {"type": volume.host_path_type} if volume.host_path_type else {}
        return {"hostPath": {"path": volume.host_path, **kind}}
    keys = _items(volume.items)
    mode: Object = {"defaultMode": int(volume.default_mode, 8)} if volume.default_mode else {}
    if volume.optional:
        mode["optional"] = True
    if volume.config_map:
        return {"configMap": {"name": volume.config_map, **keys, **mode}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret, "defaultMode": SECRET_MODE, **keys, **mode}}
    if volume.projected is not None:
        parts = [
            {
                "configMap" if part.config_map else "secret": {
                    "name": part.config_map or part.secret,
                    **_items(part.items),
                    **({"optional": True} if part.optional else {}),
                }
            }
            for part in volume.projected
        ]
        return {"projected": {"sources": parts, **mode}}
    return _scratch(volume.scratch or Scratch())


def _items(asked: Mapping[str, str]) -> Object:
    return {"items": [{"key": key, "path": path} for key, path in asked.items()]} if asked else {}


def _scratch(scratch: Scratch) -> Object:
    if scratch.storage_class:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": scratch.storage_class,
            "resources": {"requests": {"storage": scratch.size}},
        }
        return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    given = {"medium": "Memory" if scratch.memory else None, "sizeLimit": scratch.size}
    return {"emptyDir": {key: value for key, value in given.items() if value}}


# --- what runs beside it --------------------------------------------------------------------------


def _beside(fabric: network.Attachment) -> list[Object]:
    """A fabric's daemons: init containers that go on, and end with the ranks (Kubernetes 1.29)."""
    rows = fabric.profile.sidecars if fabric.profile else []
    return [
        {
            "name": row["name"],
            "image": row["image"],
            "restartPolicy": "Always",
            "command": list(row["command"]),
            "env": [{"name": name, "value": value} for name, value in row.get("env", {}).items()],
            "securityContext": {
                "runAsNonRoot": False,
                "runAsUser": 0,
                "capabilities": {"drop": ["ALL"], "add": list(row["capabilities"])},
            },
            "volumeMounts": [{"name": name, "mountPath": path} for path, name in row["mounts"].items()],
        }
        for row in rows
    ]


def _sidecar(row: Sidecar) -> Object:
    """As an init container in both cases: one that goes on beside the ranks may not keep the pod from its end."""
    uid = row.run_as_user
    user: Object = {} if uid is None else {"runAsUser": uid, "runAsNonRoot": uid != 0}
    added = [name.removeprefix("CAP_") for name in row.capabilities]
    if row.privileged:
        rights: Object = {"privileged": True, "runAsNonRoot": False, "runAsUser": 0}
    else:
        denied: Object = {} if "SYS_ADMIN" in added else {"allowPrivilegeEscalation": False}
        rights = {**denied, "capabilities": {"drop": ["ALL"], **({"add": added} if added else {})}, **user}
    amounts = {"limits": dict(row.resources), "requests": {**row.resources, **row.requests}}
    given: Object = {
        "restartPolicy": None if row.init else "Always",
        "command": list(row.command),
        "args": list(row.args),
        "imagePullPolicy": row.image_pull_policy,
        "env": [
            *({"name": name, "value": value} for name, value in row.env.items()),
            *_fields(row.env_fields),
            *_secrets(row.secrets),
        ],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in row.mounts.items()],
        "envFrom": _env_from(row.env_from, row.secret_env_from),
        "resources": {key: value for key, value in amounts.items() if value},
        "securityContext": rights,
    }
    return {"name": row.name, "image": row.image, **{key: value for key, value in given.items() if value}}


# A commit's name is fetched from servers that allow it, and a part of one from a whole clone.
CLONE = """\
set -eu
export HOME=/tmp GIT_TERMINAL_PROMPT=0
if [ -e /secret/password ]; then
  user=oauth2; [ ! -e /secret/username ] || user=$(cat /secret/username)
  export CLONE_USER="$user"
  git config --global credential.helper \\
    '!f() { echo "username=$CLONE_USER"; echo "password=$(cat /secret/password)"; }; f'
fi
rm -rf /code/tree
git init -q /code/tree
cd /code/tree
git remote add origin "$1"
if git fetch -q --depth 1 origin "$2"; then
  git checkout -q FETCH_HEAD
else
  git fetch -q --tags origin '+refs/heads/*:refs/remotes/origin/*'
  git checkout -q "$2" --
fi
if [ -e .gitmodules ]; then git submodule -q update --init --recursive --depth 1; fi
echo "dslaunch: $1 at $(git rev-parse HEAD)"
"""


def cloned(spec: JobSpec) -> Code | None:
    return spec.code if isinstance(spec.code, Code) and spec.code.clone else None


def taken(spec: JobSpec) -> bool:
    """Whether pods unpack the code as it was taken."""
    return software.snapshot(spec) != "none" and not cloned(spec)


def _code_at(spec: JobSpec) -> str:
    workdir = posixpath.normpath(spec.train.workdir)
    return workdir if workdir.startswith("/") else CODE


def _clone(spec: JobSpec) -> list[Object]:
    code = cloned(spec)
    if code is None:
        return []
    secret = [{"name": "code-secret", "mountPath": "/secret", "readOnly": True}] if code.secret else []
    return [
        {
            "name": "clone",
            "image": code.image,
            # $( in a command is Kubernetes' own: what it does not know it leaves alone, an address might know HOME
            "command": ["sh", "-c", CLONE, "clone", str(code.clone).replace("$(", "$$("), code.ref or "HEAD"],
            "securityContext": dict(RESTRICTED),
            "volumeMounts": [{"name": "code", "mountPath": "/code"}, *secret],
        }
    ]


# --- where it runs --------------------------------------------------------------------------------


def _placed(spec: JobSpec, labels: dict[str, str]) -> Object:
    options = spec.kubernetes
    own = {"matchLabels": {key: labels[key] for key in OURS if key in labels}}
    found: Object = {}
    if options.node_selector:
        found["nodeSelector"] = dict(options.node_selector)
    if affinity := _affinity(spec, own):
        found["affinity"] = affinity
    if options.spread:
        found["topologySpreadConstraints"] = [
            {
                "topologyKey": row.topology_key,
                "maxSkew": row.max_skew,
                "whenUnsatisfiable": row.when_unsatisfiable,
                "labelSelector": own,
            }
            for row in options.spread
        ]
    if options.tolerations:
        names = {"key": "key", "operator": "operator", "value": "value", "effect": "effect",
                 "seconds": "tolerationSeconds"}  # fmt: skip
        found["tolerations"] = [
            {theirs: getattr(row, name) for name, theirs in names.items() if getattr(row, name) is not None}
            for row in options.tolerations
        ]
    for name, value in (
        ("priorityClassName", options.priority_class),
        ("runtimeClassName", options.runtime_class),
        ("serviceAccountName", options.service_account),
    ):
        if value:
            found[name] = value
    if options.scheduling_gates:
        found["schedulingGates"] = [{"name": name} for name in options.scheduling_gates]
    if options.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    return found


REQUIRED, PREFERRED = (
    "requiredDuringSchedulingIgnoredDuringExecution",
    "preferredDuringSchedulingIgnoredDuringExecution",
)


def _affinity(spec: JobSpec, own: Object) -> Object:
    options = spec.kubernetes
    found: Object = {}
    # by name, which a label need not be; the API takes one name for each of these
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in options.exclude]
    labels = [_expression(row) for row in options.node_affinity if row.weight is None]
    anyhow = [[*labels, *map(_expression, rows)] for rows in options.node_affinity_any] or [labels]
    # the parts of a term all have to hold; of several terms one is enough
    terms = [
        {**({"matchExpressions": rows} if rows else {}), **({"matchFields": fields} if fields else {})}
        for rows in anyhow
    ]
    if terms != [{}]:
        found["nodeAffinity"] = {REQUIRED: {"nodeSelectorTerms": terms}}
    if preferred := [
        {"weight": row.weight, "preference": {"matchExpressions": [_expression(row)]}}
        for row in options.node_affinity
        if row.weight is not None
    ]:
        found.setdefault("nodeAffinity", {})[PREFERRED] = preferred
    rows = list(options.pod_affinity)
    if options.network.host_network and spec.resources.nodes > 1:  # two pods on one node would want one port
        alone = PodTerm(NODE, away=True)
        rows += [] if alone in rows else [alone]
    for name, away in (("podAffinity", False), ("podAntiAffinity", True)):
        if near := _pod_terms([row for row in rows if row.away is away], own):
            found[name] = near
    return found


def _expression(row: NodeTerm) -> Object:
    return {"key": row.key, "operator": row.operator, **({"values": list(row.values)} if row.values else {})}


def _pod_terms(rows: Sequence[PodTerm], own: Object) -> Object:
    found: Object = {}
    for row in rows:
        selector = {"matchLabels": dict(row.labels)} if row.labels else own
        term: Object = {"topologyKey": row.topology_key, "labelSelector": selector}
        if row.weight is None:
            found.setdefault(REQUIRED, []).append(term)
        else:
            found.setdefault(PREFERRED, []).append({"weight": row.weight, "podAffinityTerm": term})
    return found


# --- what cannot run ------------------------------------------------------------------------------


def problems(spec: JobSpec, plan: Plan | None) -> Iterator[Problem]:
    """What the API server takes, to fail at every pod for ever."""
    yield from _pod_problems(spec)
    yield from _placing_problems(spec)
    yield from network.problems(spec)
    yield from _user_problems(spec)
    yield from _volume_problems(spec, plan)
    yield from _sidecar_problems(spec)
    yield from _clone_problems(spec)


def _pod_problems(spec: JobSpec) -> Iterator[Problem]:
    options = spec.kubernetes
    yield from _gpu_problems(spec)
    yield from _limit_problems(spec)
    for index, row in enumerate(options.tolerations):
        at: Path = ("kubernetes", "tolerations", index)
        if row.operator == "Exists" and row.value:
            yield Problem(f"operator Exists takes no value, and this one is {row.value}", "operator: Equal", at)
        if row.operator == "Equal" and not row.key:
            yield Problem("operator Equal needs a key", "operator: Exists tolerates every taint", at)
        if row.seconds is not None and row.effect != "NoExecute":
            yield Problem("seconds are for taints that end pods", "effect: NoExecute", (*at, "seconds"))
    seen: dict[str, str] = {**dict.fromkeys(spec.credentials, "secrets"), **dict.fromkeys(spec.env, "env")}
    for where in ("env_fields", "env_keys", "pod_env"):
        for name in getattr(options, where):
            if name in seen:
                yield Problem(f"{name} stands in {seen[name]}, too", "once", ("kubernetes", where, name))
            seen[name] = where
            if reason := _reserved(name):
                yield Problem(f"{name} cannot be set: {reason}", "another name", ("kubernetes", where, name))
    for name, value in options.pod_env.items():
        here: Path = ("kubernetes", "pod_env", name)
        if name.isidentifier():
            yield Problem(f"{name} is a name that a shell can export", f"env: {{{name}: ...}}", here)
        if looks_secret(name.replace(".", "_"), value):
            message = f"{name} looks like a secret, and manifests are written to files"
            yield Problem(message, "a volume with secret:, mounted where the program looks", here)
    if (dns := options.dns) and dns.policy == "None" and not dns.nameservers:
        message = "policy None, and no nameserver: the API server refuses pods that could look up nothing"
        yield Problem(message, "nameservers: [10.0.0.10]", ("kubernetes", "dns", "policy"))
    if options.dns and len(options.dns.nameservers) > 3:  # the API's own limit
        message = f"{len(options.dns.nameservers)} nameservers, and a pod has 3 at most"
        yield Problem(message, "the first three", ("kubernetes", "dns", "nameservers"))
    for field in ("labels", "pod_labels"):
        for name in getattr(options, field):
            if name in OURS or name == "app.kubernetes.io/managed-by":
                yield Problem(f"label {name} is dslaunch's own", "another key", ("kubernetes", field, name))


def _reserved(name: str) -> str | None:
    prefix = next((prefix for prefix in NOT_YOUR_PREFIXES if name.startswith(prefix)), None)
    return NOT_YOURS.get(name) or (NOT_YOUR_PREFIXES[prefix] if prefix else None)


def _gpu_problems(spec: JobSpec) -> Iterator[Problem]:
    name, at = gpu_resource(spec), ("kubernetes", "gpu_resource")
    if "/" not in name:
        yield Problem(f"gpu_resource {name} has no domain", "such as nvidia.com/gpu", at)
    resources = ("kubernetes", "network", "resources")
    asked: list[tuple[str, Path]] = [
        (name, at),
        *((one, (*resources, one)) for one in spec.kubernetes.network.resources),
    ]
    for one, where in asked:
        for prefix, why in OTHERS.items():
            if one.startswith(prefix):
                message = f"{one} is no GPU of NVIDIA's or AMD's: {why}; dslaunch configures and checks CUDA and ROCm"
                yield Problem(message, "nvidia.com/gpu or amd.com/gpu", where)
        if where != at and (one == name or patch.is_gpu(one)):
            message = f"{one} is a GPU, and how many a pod has is resources.gpus_per_node"
            yield Problem(message, "resources.gpus_per_node, kubernetes.gpu_resource", where)
    theirs = next((maker for prefix, maker in MAKERS.items() if name.startswith(prefix)), "")
    if theirs and _maker(spec) not in ("", theirs):
        message = f"{name} is {theirs}'s, and a {spec.resources.gpu} is {_maker(spec)}'s: no node would have both"
        yield Problem(message, "leave it out", at)


UNITS = {"": 1.0, "m": 1e-3, **{unit: 10.0 ** (3 * n) for n, unit in enumerate("kMGTPE", 1)}, "K": 1e3,
         **{f"{unit}i": 1024.0**n for n, unit in enumerate("KMGTPE", 1)}}  # fmt: skip


def _bytes(amount: str) -> float:
    """1Gi is 1,073,741,824, and 500m half."""
    number = amount.rstrip("mkKMGTPEi")
    return float(number) * UNITS[amount[len(number) :]]


def _limit_problems(spec: JobSpec) -> Iterator[Problem]:
    requested = _amounts(spec, network.Attachment())
    names = {"cpu": "resources.cpus_per_node", "memory": "resources.memory"}
    for name, limit in (("cpu", spec.kubernetes.cpu_limit), ("memory", spec.kubernetes.memory_limit)):
        at = ("kubernetes", f"{name}_limit")
        if limit == "none" and name not in requested:
            yield Problem(f"no {name} is requested, so that none is limited", f"{names[name]} with it", at)
        elif limit and limit != "none" and name in requested and _bytes(limit) < _bytes(requested[name]):
            message = f"limit {limit}, and {names[name]} requests {requested[name]}: the API server refuses that"
            yield Problem(message, f"{requested[name]} or more, or none", at)
    if spec.kubernetes.cpu_limit is None and spec.kubernetes.memory_limit is None:
        return
    for name, path in spec.kubernetes.env_fields.items():  # which then is the node's
        side, amount = path.partition(".")[0], _amount_of(path)
        if side == "limits" and amount not in _limits(spec, requested):
            message = f"{path} of a container without one is what the node has"
            yield Problem(message, f"requests.{amount}", ("kubernetes", "env_fields", name))


def _placing_problems(spec: JobSpec) -> Iterator[Problem]:
    rows: list[tuple[Path, NodeTerm]] = [
        (("kubernetes", "node_affinity", index), row) for index, row in enumerate(spec.kubernetes.node_affinity)
    ]
    for number, terms in enumerate(spec.kubernetes.node_affinity_any):
        where: Path = ("kubernetes", "node_affinity_any", number)
        if not terms:
            yield Problem("a list without terms holds nowhere", "[{key: a, values: [b]}]", where)
        for index, row in enumerate(terms):
            rows.append(((*where, index), row))
            if row.weight is not None:
                message = f"weight {row.weight}: what has to hold is not preferred"
                yield Problem(message, "node_affinity, or no weight", (*where, index, "weight"))
    for at, row in rows:
        if row.operator in ("In", "NotIn") and not row.values:
            yield Problem(f"operator {row.operator} needs values", "values: [a100]", at)
        if row.operator in ("Exists", "DoesNotExist") and row.values:
            yield Problem(f"operator {row.operator} takes no values", "operator: In", at)
        if row.operator in ("Gt", "Lt") and (len(row.values) != 1 or not row.values[0].lstrip("-").isdigit()):
            yield Problem(f"operator {row.operator} compares with one integer", "values: ['8']", at)
    seen: dict[tuple[str, str], int] = {}
    for index, spread in enumerate(spec.kubernetes.spread):
        key = (spread.topology_key, spread.when_unsatisfiable)
        if key in seen:
            message = f"{spread.topology_key} with {spread.when_unsatisfiable} stands there twice"
            yield Problem(message, "once", ("kubernetes", "spread", index))
        seen[key] = index


def _user_problems(spec: JobSpec) -> Iterator[Problem]:
    asked = spec.kubernetes.security
    at = ("kubernetes", "security")
    if asked.run_as_user == 0 and not asked.root:
        hint = "security.root: true says that it is meant: beyond the restricted profile"
        yield Problem("run_as_user 0 is root", hint, (*at, "run_as_user"))
    if asked.root and isinstance(asked.run_as_user, int) and asked.run_as_user:
        yield Problem(f"root, and run_as_user {asked.run_as_user}, which is not", "one of both", (*at, "root"))
    if asked.root and asked.run_as_user == "image":
        yield Problem("root leaves the user to the image by itself", "root without run_as_user", (*at, "run_as_user"))


def _volume_problems(spec: JobSpec, plan: Plan | None) -> Iterator[Problem]:
    taken = {MOUNT: "has the scripts", SHM: "is shared memory", "/": "is the image"}
    names = {"bundle", "shm", "checkpoints", *(("code", "code-secret") if cloned(spec) else ())}
    row = _profile(spec)
    if cloned(spec):
        taken[_code_at(spec)] = "has the clone"
    if row:
        taken |= dict.fromkeys(row.ranks.get("mounts", {}), f"is brought by network profile {row.name}")
        names |= set(row.volumes)
    for index, volume in enumerate(spec.kubernetes.volumes):
        here = ("kubernetes", "volumes", index)
        mount = posixpath.normpath(volume.mount)
        sources = [name for name in SOURCES if getattr(volume, name) is not None]
        if len(sources) != 1:
            message = f"a volume has one source, and this has {' and '.join(sources) or 'none'}"
            yield Problem(message, f"one of {', '.join(SOURCES)}", here)
        if not mount.startswith("/") or ":" in mount:
            yield Problem(f"mount {volume.mount} is not an absolute path without colons", at=(*here, "mount"))
        elif mount in taken or mount.startswith(f"{MOUNT}/"):
            message = f"{mount} {taken.get(mount, taken[MOUNT])} already"
            yield Problem(message, "another mount", (*here, "mount"))
        else:
            taken[mount] = f"is the mount of {_called(volume, index)}"
        if name_of(volume, index) in names:
            yield Problem(f"volume {volume.name} is there already", "another name", (*here, "name"))
        names.add(name_of(volume, index))
        keyed = volume.config_map or volume.secret
        for name, has_keys in (
            ("items", keyed),
            ("default_mode", keyed or volume.projected),
            ("optional", keyed),
        ):
            if getattr(volume, name) and not has_keys:
                yield Problem(f"{name} without config_map or secret", "of what has keys", (*here, name))
        yield from _key_problems(volume.items, here)
        for number, part in enumerate(volume.projected or ()):
            there = (*here, "projected", number)
            if bool(part.config_map) == bool(part.secret):
                yield Problem("a part is of one config_map, or of one secret", "{config_map: NAME}", there)
            yield from _key_problems(part.items, there)
        if volume.projected == ():
            yield Problem("projected from nothing", "projected: [{config_map: a}, {secret: b}]", (*here, "projected"))
        if volume.propagation == "Bidirectional" and not spec.kubernetes.security.privileged:
            message = "what a container mounts is seen on the node only where it is privileged"
            yield Problem(message, "HostToContainer, or security.privileged", (*here, "propagation"))
        if volume.host_path_type and not volume.host_path:
            yield Problem("host_path_type without host_path", "host_path: /data", (*here, "host_path_type"))
        if volume.host_path and not volume.host_path.startswith("/"):
            yield Problem(f"host_path {volume.host_path} is relative", "an absolute path", (*here, "host_path"))
        if volume.sub_path and (volume.sub_path.startswith("/") or ".." in volume.sub_path.split("/")):
            message = f"sub_path {volume.sub_path} is no path below the volume"
            yield Problem(message, "such as runs/demo", (*here, "sub_path"))
        yield from _scratch_problems(volume.scratch, (*here, "scratch"))
    found = volume_with(checkpoints(plan), spec) if plan else None
    if plan and found and found.read_only:
        index = spec.kubernetes.volumes.index(found)
        message = f"checkpoints go to {checkpoints(plan)}, and {_called(found, index)} is read-only there"
        yield Problem(message, at=("kubernetes", "volumes", index, "read_only"))
    elif plan and found and (found.config_map or found.secret or found.projected):
        index = spec.kubernetes.volumes.index(found)
        message = f"checkpoints go to {checkpoints(plan)}, and {_called(found, index)} cannot be written to"
        yield Problem(message, "a claim", ("kubernetes", "volumes", index))


def _scratch_problems(scratch: Scratch | None, at: Path) -> Iterator[Problem]:
    if scratch and scratch.memory and scratch.storage_class:
        yield Problem("scratch in memory has no storage class", "one of both", at)
    if scratch and scratch.storage_class and not scratch.size:
        yield Problem("a volume of a storage class needs a size", "size: 2Ti", at)


def _key_problems(items: Mapping[str, str], at: Path) -> Iterator[Problem]:
    for key, path in items.items():
        if path.startswith("/") or ".." in path.split("/"):
            yield Problem(f"{path} is no path below the mount", f"such as {key}", (*at, "items", key))


def _called(volume: Volume, index: int) -> str:
    return volume.claim or volume.config_map or volume.secret or name_of(volume, index)


def _profile(spec: JobSpec) -> network.Profile | None:
    try:
        return network.profile(spec)
    except UserError:  # network.problems() tells it
        return None


def _sidecar_problems(spec: JobSpec) -> Iterator[Problem]:
    row = _profile(spec)
    taken = {"pytorch", "node", "clone", "init-pytorch", *(one["name"] for one in (row.sidecars if row else ()))}
    volumes = {"shm", *(name_of(volume, index) for index, volume in enumerate(spec.kubernetes.volumes))}
    volumes |= {"code"} if cloned(spec) else set()
    volumes |= set(row.volumes) if row else set()
    for index, sidecar in enumerate(spec.kubernetes.sidecars):
        at = ("kubernetes", "sidecars", index)
        if sidecar.name in taken:
            yield Problem(f"a container {sidecar.name} is there already", "another name", (*at, "name"))
        taken.add(sidecar.name)
        for name in sidecar.mounts:
            if name not in volumes:
                hint = f"{', '.join(sorted(volumes))}; volumes: [{{name: {name}, ...}}]"
                yield Problem(f"no volume is called {name}", hint, (*at, "mounts", name))
        for name, source in sidecar.secrets.items():
            if not (source.secret and source.key):
                message = f"secret {name} of a sidecar is a Secret's key"
                yield Problem(message, "{secret: NAME, key: KEY}", (*at, "secrets", name))
        for name in {*sidecar.env_fields, *sidecar.secrets}:
            if sum(name in rows for rows in (sidecar.env, sidecar.env_fields, sidecar.secrets)) > 1:
                yield Problem(f"{name} is said twice", "once", (*at, "env_fields"))
        for name, path in sidecar.env_fields.items():
            known = {*sidecar.resources, *(sidecar.requests if path.startswith("requests.") else ())}
            if path.startswith(("limits.", "requests.")) and _amount_of(path) not in known:
                message = f"{path} of a sidecar without resources is what the node has"
                yield Problem(message, f"resources: {{{_amount_of(path)}: ...}}", (*at, "env_fields", name))
        for name, amount in sidecar.requests.items():
            limit = sidecar.resources.get(name)
            if limit and _bytes(amount) > _bytes(limit):
                message = f"{name}: {amount} is requested, and {limit} is the limit: the API server refuses that"
                yield Problem(message, f"{limit} or less", (*at, "requests", name))
            if "/" in name and amount != limit:
                message = f"{name} is a device, and of those limit and request are one"
                yield Problem(message, "resources", (*at, "requests", name))
        for name in sidecar.resources:
            if patch.is_gpu(name) and not sidecar.init:  # one that ends first may have them before the ranks
                message = f"{name} beside the ranks': the pod would need a node with more GPUs than the plan has"
                yield Problem(message, "leave it out: privileged sees all of them", (*at, "resources", name))
        root = spec.kubernetes.security.root
        if sidecar.privileged and (sidecar.run_as_user or sidecar.capabilities):
            name = "run_as_user" if sidecar.run_as_user else "capabilities"
            yield Problem(f"privileged is root with every right, and {name} is less", "one of both", (*at, name))
        elif sidecar.capabilities and sidecar.run_as_user != 0 and not (root and sidecar.run_as_user is None):
            message = "capabilities reach root alone: Kubernetes sets no ambient ones"
            yield Problem(message, "run_as_user: 0 with them", (*at, "capabilities"))
        for name, value in sidecar.env.items():
            if looks_secret(name, value):
                message = f"{name} looks like a secret, and manifests are written to files"
                yield Problem(message, "a volume with secret:, mounted there", (*at, "env", name))


def _clone_problems(spec: JobSpec) -> Iterator[Problem]:
    code = cloned(spec)
    if code is None:
        return
    if not str(code.clone).startswith("https://"):
        message = "ssh wants a user that the image knows and a host's key, and a pod has neither"
        hint = "https://, and code.secret names a Secret with `password` (a token) where it is private"
        yield Problem(message, hint, ("code", "clone"))


# --- what surprises -------------------------------------------------------------------------------


def notes(spec: JobSpec, variables: set[str], patched: Sequence[Object] = ()) -> list[str]:
    """What runs where it is allowed to, and what it is: `variables` are the names that are exported.

    `patched` are the specs of the job's pods as they are in the end, where a patch changes what dslaunch makes.
    """
    found = list(network.notes(spec, variables))
    bundle: Object = {"name": "bundle", "projected": {"sources": []}}
    made = template(spec, labels={}, bundle=bundle, command="", training=True, recovers=False, ending=0)
    broken = [one for pod in patched or [made["spec"]] for one in security.violations(pod)]
    found += _admission(list(dict.fromkeys(broken)))
    options = spec.kubernetes
    who = f"user {_user(spec)['runAsUser']}" if "runAsUser" in _user(spec) else "the image's user"
    if spec.setup and not options.security.root:
        found.append(f"setup runs as {who}, who installs into its home alone; security.root: true is the other way")
    added = trainer(made)["securityContext"].get("capabilities", {}).get("add")
    if added and not options.security.root:
        found.append(
            f"{' and '.join(added)} reaches root alone, and the ranks are {who}: Kubernetes sets no ambient "
            "capabilities; security.root: true with it"
        )
    if options.security.run_as_user == "image":
        found.append(
            "pods run as the image's own user: where that is root, or a name, the kubelet answers "
            "CreateContainerConfigError; security.run_as_user: UID says which"
        )
    if options.scheduling_gates:
        gates = ", ".join(options.scheduling_gates)
        found.append(f"pods stay SchedulingGated until a controller removes {gates}")
    if any(row.get("restartPolicy") for row in made["spec"].get("initContainers", ())):
        found.append("sidecars end with the ranks from Kubernetes 1.29 on; before, the pod waits for them for ever")
    for volume in options.volumes:
        unsaid = options.security.run_as_user in (None, "image") and not options.security.root
        if (volume.nfs or volume.host_path) and not volume.read_only and unsaid:
            found.append(
                f"{volume.mount} is written as {who}, and no fsGroup changes whose it is: security.run_as_user: UID"
            )
        if volume.scratch and volume.scratch.memory:
            found.append(f"{volume.mount} counts as memory of the pod, as /dev/shm does")
    return found


def _admission(broken: Sequence[security.Violation]) -> list[str]:
    """Which namespace takes such pods, and what in them the next stricter one does not."""
    if not broken:
        return []
    admitted = security.admits(broken)
    refuses = security.RESTRICTED if admitted == security.BASELINE else security.BASELINE
    fields: dict[str, list[str]] = {}
    for one in broken:
        if one.profile == refuses:
            fields.setdefault(one.field, []).append(one.reason)
    told = "; ".join(f"{field} ({', '.join(reasons)})" for field, reasons in fields.items())
    return [f"the pods need a namespace with {security.LABEL}={admitted}; {refuses} refuses {told}"]


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoints(plan: Plan) -> str:
    return posixpath.normpath(posixpath.join(plan.spec.train.workdir, plan.checkpoint_dir))


def volume_with(path: str, spec: JobSpec) -> Volume | None:
    around = [row for row in spec.kubernetes.volumes if f"{path}/".startswith(posixpath.join(row.mount, ""))]
    return max(around, key=lambda row: len(row.mount), default=None)


def lasting(plan: Plan) -> Volume | None:
    """The volume of the checkpoints, where all pods share it and it outlives them: what recovery needs."""
    found = volume_with(checkpoints(plan), plan.spec)
    brief = found and (found.scratch or found.config_map or found.secret or found.projected)
    return None if brief else found
