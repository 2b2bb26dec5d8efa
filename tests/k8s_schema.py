"""Manifests judged offline, as strictly as an API server with the training operator's webhook would.

`problems(documents)` lists what is wrong, "spec.template.spec: unknown field `image`"; empty is good. Pods and
ConfigMaps are walked along the models of the `kubernetes` client, the jobs along tables of ours. With
DSLAUNCH_CRD_DIR naming a folder with their CRDs, kubeflow.org_pytorchjobs.yaml first, `crd_problems` asks those, too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z")
LABEL_KEY = re.compile(
    r"((?=[^/]{1,253}/)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z"
)
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
QUANTITY = re.compile(
    r"[+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)))?\Z"
)
CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}\Z")
STANDARD_RESOURCES = {"cpu", "memory", "ephemeral-storage"}
OVERCOMMITTED = {"cpu", "memory", "ephemeral-storage"}  # of anything else request has to be limit

# Where the client's models say less than the API: Quantity and IntOrString.
QUANTITIES = {("V1ResourceRequirements", "limits"), ("V1ResourceRequirements", "requests"), ("V1PodSpec", "overhead"),
              ("V1EmptyDirVolumeSource", "size_limit"), ("V1ResourceFieldSelector", "divisor")}  # fmt: skip
ENUMS = {
    ("V1PodSpec", "restart_policy"): {"Always", "OnFailure", "Never"},
    ("V1PodSpec", "dns_policy"): {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    ("V1Container", "image_pull_policy"): {"Always", "IfNotPresent", "Never"},
    ("V1Container", "termination_message_policy"): {"File", "FallbackToLogsOnError"},
    ("V1Toleration", "operator"): {"Exists", "Equal"},
    ("V1Toleration", "effect"): {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    ("V1SeccompProfile", "type"): {"RuntimeDefault", "Unconfined", "Localhost"},
    ("V1EmptyDirVolumeSource", "medium"): {"", "Memory", "HugePages"},
    ("V1PodSecurityContext", "fs_group_change_policy"): {"OnRootMismatch", "Always"},
    ("V1ContainerPort", "protocol"): {"TCP", "UDP", "SCTP"},
    ("V1NodeSelectorRequirement", "operator"): {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"},
}
FIELDS = {"metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
          "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs"}  # fmt: skip

# The PyTorchJob of training-operator 1.9, without its pod templates. A set is a choice of words.
SCHEDULING = {"minAvailable": int, "queue": str, "minResources": {str: "quantity"}, "priorityClass": str,
              "scheduleTimeoutSeconds": int}  # fmt: skip
RUN_POLICY = {
    "cleanPodPolicy": {"All", "Running", "None"},  # the server takes any word, and acts like All
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "schedulingPolicy": SCHEDULING,
    "suspend": bool,
    "managedBy": {"kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"},
}
ELASTIC = {
    "minReplicas": int,
    "maxReplicas": int,
    "rdzvBackend": {"c10d", "etcd", "etcd-v2"},
    "rdzvPort": int,
    "rdzvHost": str,
    "rdzvId": str,
    "rdzvConf": [{"key": str, "value": str}],
    "standalone": bool,
    "nProcPerNode": int,
    "maxRestarts": int,
    "metrics": [dict],
}
REPLICA = {"replicas": int, "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"}, "template": "template"}
JOB = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": "metadata",
    "spec": {
        "nprocPerNode": str,
        "runPolicy": RUN_POLICY,
        "elasticPolicy": ELASTIC,
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}

# JobSet 0.12, v1alpha2. A Job is one of core's, and so is its pod template.
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": "metadata",
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
            "rules": [
                {
                    "name": str,
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
                               "RestartJobAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": [
                        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                         "PodFailurePolicy"}
                    ],
                    "onJobFailureMessagePatterns": [str],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "startupPolicy": {"startupPolicyOrder": {"AnyOrder", "InOrder"}},
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "managedBy": str,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "replicatedJobs": [{"name": str, "groupName": str, "replicas": int, "template": "job"}],
    },
}  # fmt: skip
# A TrainJob of Trainer, v1alpha1: what it may say of its runtime's pods came in three steps.
ENV = ["V1EnvVar"]
TRAINER = {
    "image": str,
    "command": [str],
    "args": [str],
    "env": ENV,
    "numNodes": int,
    "numProcPerNode": int,
    "resourcesPerNode": "V1ResourceRequirements",
}
POD = {
    "serviceAccountName": str,
    "nodeSelector": {str: str},
    "affinity": "V1Affinity",
    "tolerations": ["V1Toleration"],
    "volumes": ["V1Volume"],
    "schedulingGates": ["V1PodSchedulingGate"],
    "imagePullSecrets": ["V1LocalObjectReference"],
}
META = {"labels": {str: str}, "annotations": {str: str}}


def trainjob(trainer: str) -> dict[str, Any]:
    release = tuple(map(int, trainer.split(".")))
    box: dict[str, Any] = {"name": str, "env": ENV, "volumeMounts": ["V1VolumeMount"]}
    if release >= (2, 2):
        box["securityContext"] = "V1SecurityContext"
    pod: dict[str, Any] = {**POD, "containers": [box], "initContainers": [box]}
    if release >= (2, 2):
        pod["securityContext"] = "V1PodSecurityContext"
    if release >= (2, 3):
        pod["terminationGracePeriodSeconds"] = int
    template = {"metadata": META, "spec": pod}
    job = {"name": str, "template": {"metadata": META, "spec": {"template": template}}}
    runtime = {"template": {"metadata": META, "spec": {"replicatedJobs": [job]}}}
    step = {"storageUri": str, "secretRef": {"name": str}, "env": ENV}
    spec: dict[str, Any] = {
        "initializer": {"dataset": step, "model": step},
        "runtimeRef": {"apiGroup": str, "kind": {"ClusterTrainingRuntime", "TrainingRuntime"}, "name": str},
        "trainer": TRAINER,
        "suspend": bool,
        "managedBy": {"trainer.kubeflow.org/trainjob-controller", "kueue.x-k8s.io/multikueue"},
    }
    if release >= (2, 2):
        spec["runtimePatches"] = [{"manager": str, "trainingRuntimeSpec": runtime}]
    else:
        spec["podTemplateOverrides"] = [{"targetJobs": [{"name": str}], **template}]
    if release >= (2, 3):
        spec["activeDeadlineSeconds"] = int
    api = {"trainer.kubeflow.org/v1alpha1"}
    return {"apiVersion": api, "kind": {"TrainJob"}, "metadata": "metadata", "spec": spec}


POD_GROUPS = {
    "scheduling.volcano.sh/v1beta1": {"minMember": int, "minResources": {str: "quantity"}, "queue": str,
                                      "minTaskMember": {str: int}, "priorityClassName": str,
                                      "networkTopology": {"mode": {"hard", "soft"}, "highestTierAllowed": int}},
    "scheduling.x-k8s.io/v1alpha1": {"minMember": int, "minResources": {str: "quantity"},
                                     "scheduleTimeoutSeconds": int},
}  # fmt: skip


# Ten times as fast as SafeLoader, which test_every_reader_reads_the_same compares with.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def documents(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=LOADER))


def problems(documents: list[Any], *, trainer: str = "2.2") -> list[str]:
    """Everything wrong with a bundle of manifests, references between them included."""
    found: list[str] = []
    maps = {}
    for number, document in enumerate(documents):
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind == "ConfigMap":
            found += config_map(document)
            maps[document.get("metadata", {}).get("name")] = document
        elif kind == "PyTorchJob":
            found += pytorchjob(document)
        elif kind == "JobSet":
            found += jobset(document)
        elif kind == "TrainJob":
            found += list(_shape(document, trainjob(trainer), "")) or list(_trainer_webhook(document))
        elif kind == "PodGroup" and document.get("apiVersion") in POD_GROUPS:
            spec = POD_GROUPS[document["apiVersion"]]
            table = {"apiVersion": str, "kind": str, "metadata": "metadata", "spec": spec}
            found += list(_shape(document, table, ""))
        else:
            found.append(f"document {number}: kind {kind!r} is unknown")
    for document in documents:
        if not found and document["kind"] in ("PyTorchJob", "JobSet", "TrainJob"):
            found += _references(document, maps)
    return found


# --- core/v1 --------------------------------------------------------------------------------------


def config_map(document: dict[str, Any]) -> list[str]:
    found = [*_model(document, "V1ConfigMap", ""), *_metadata(document.get("metadata"), SUBDOMAIN)]
    if document.get("apiVersion") != "v1":
        found.append(f"apiVersion: {document.get('apiVersion')!r} is not v1")
    data = document.get("data") or {}
    found += [f"data: key {key!r}" for key in data if not CONFIG_KEY.match(str(key))]
    if sum(len(str(value).encode()) for value in data.values()) > 1 << 20:
        found.append("data: over 1 MiB")
    return found


def template(value: Any, at: str) -> Iterator[str]:
    wrong = list(_model(value, "V1PodTemplateSpec", at))
    yield from wrong
    if not wrong:  # the rules below rely on types
        yield from _labels(value.get("metadata", {}), f"{at}.metadata")
        yield from _pod(value["spec"], f"{at}.spec")


def _model(value: Any, name: str, at: str) -> Iterator[str]:
    """Unknown fields, wrong types and missing ones, all the way down."""
    model = getattr(client, name)
    if not isinstance(value, dict):
        yield f"{at}: {value!r} is not a {name}"
        return
    attributes = {theirs: ours for ours, theirs in model.attribute_map.items()}
    for key, child in value.items():
        here = f"{at}.{key}".lstrip(".")
        if key not in attributes:
            yield f"{at}: unknown field `{key}`"
            continue
        attribute = attributes[key]
        if (name, attribute) in QUANTITIES:
            rows = (
                child.items()
                if model.openapi_types[attribute] != "str" and isinstance(child, dict)
                else [("", child)]
            )
            yield from (f"{here}.{row}: {text!r} is no quantity" for row, text in rows if not _is_quantity(text))
            continue
        yield from _typed(child, model.openapi_types[attribute], here)
        if (name, attribute) in ENUMS and child not in ENUMS[name, attribute]:
            yield f"{here}: {child!r} is not one of {sorted(ENUMS[name, attribute])}"
    yield from (f"{at}: `{key}` is missing" for key in _required(model) if value.get(key) is None)


@cache
def _required(model: Any) -> list[str]:
    if hasattr(model, "model_fields"):  # the client from version 36 on is made of pydantic
        return [model.attribute_map[name] for name, field in model.model_fields.items() if field.is_required()]
    needed: dict[str, Any] = {}
    while True:  # before, the constructor complains about one field at a time
        try:
            model(**needed)
        except ValueError as error:
            names = re.findall(r"`(\w+)`", str(error))
            if not names or names[0] in needed:
                return [model.attribute_map[name] for name in needed]
            needed[names[0]] = ()
        else:
            return [model.attribute_map[name] for name in needed]


def _typed(value: Any, kind: str, at: str) -> Iterator[str]:
    if inner := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{at}: {value!r} is not a list"
            return
        for index, child in enumerate(value):
            yield from _typed(child, inner[1], f"{at}[{index}]")
    elif inner := re.fullmatch(r"[Dd]ict[(\[]str, ?(.+)[)\]]", kind):
        if not isinstance(value, dict):
            yield f"{at}: {value!r} is not a mapping"
            return
        for key, child in value.items():
            if not isinstance(key, str):
                yield f"{at}: key {key!r} is not text"
            yield from _typed(child, inner[1], f"{at}.{key}")
    elif kind in ("str", "int", "bool"):
        if type(value).__name__ != kind:
            yield f"{at}: {value!r} is not {kind}"
    elif kind == "object":  # IntOrString
        if isinstance(value, (bool, list)):
            yield f"{at}: {value!r} is neither number nor text"
    elif hasattr(getattr(client, kind, None), "attribute_map"):
        yield from _model(value, kind, at)


def _is_quantity(value: Any) -> bool:
    if isinstance(value, str):
        return bool(QUANTITY.match(value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def amount(value: Any) -> float:
    """500m is 0.5, 8Gi is 2^33."""
    text = str(value)
    units = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    units |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def _metadata(value: Any, name: re.Pattern[str], at: str = "metadata") -> Iterator[str]:
    wrong = list(_model(value, "V1ObjectMeta", at))
    yield from wrong
    if wrong:
        return
    if not name.match(value.get("name", "")):
        yield f"{at}.name: {value.get('name')!r}"
    if "namespace" in value and not DNS_1123.match(value["namespace"]):
        yield f"{at}.namespace: {value['namespace']!r}"
    yield from _labels(value, at)


def _labels(metadata: dict[str, Any], at: str) -> Iterator[str]:
    for key, value in (metadata.get("labels") or {}).items():
        if not LABEL_KEY.match(key) or not LABEL_VALUE.match(value):
            yield f"{at}.labels: {key}={value!r}"
    yield from (f"{at}.annotations: {key!r}" for key in metadata.get("annotations") or {} if not LABEL_KEY.match(key))


def _pod(pod: dict[str, Any], at: str) -> Iterator[str]:
    """What the API server refuses in a Pod, and therefore never runs from a template."""
    containers = pod["containers"]
    if not containers:
        yield f"{at}.containers: empty"
    volumes = [row["name"] for row in pod.get("volumes", [])]
    yield from _twice(volumes, f"{at}.volumes")
    yield from _twice([row["name"] for row in containers], f"{at}.containers")
    for row in pod.get("volumes", []):
        if not DNS_1123.match(row["name"]):
            yield f"{at}.volumes: name {row['name']!r}"
        if len(row) != 2:
            yield f"{at}.volumes.{row['name']}: exactly one source is needed"
    for index, row in enumerate(pod.get("tolerations", [])):
        if row.get("operator") == "Exists" and row.get("value"):
            yield f"{at}.tolerations[{index}]: Exists with a value"
        if not row.get("key") and row.get("operator") != "Exists":
            yield f"{at}.tolerations[{index}]: no key and not Exists"
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", []):
        for row in term.get("matchFields", []):
            name = row.get("values", [])
            if row["key"] != "metadata.name" or row["operator"] not in ("In", "NotIn") or len(name) != 1:
                yield f"{at}.affinity: matchFields compares metadata.name with one name"
            elif not SUBDOMAIN.match(name[0]):
                yield f"{at}.affinity: {name[0]!r} is no node's name"
    for container in containers:
        yield from _container(container, set(volumes), f"{at}.containers.{container['name']}")


def _container(container: dict[str, Any], volumes: set[str], at: str) -> Iterator[str]:
    if not DNS_1123.match(container["name"]):
        yield f"{at}: name {container['name']!r}"
    if not container.get("image"):
        yield f"{at}: no image"
    env = container.get("env", [])
    yield from _twice([row["name"] for row in env], f"{at}.env")
    yield from (
        f"{at}.env.{row['name']}: value and valueFrom" for row in env if "value" in row and "valueFrom" in row
    )
    for row in env:
        field = row.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if field and field not in FIELDS and not re.fullmatch(r"metadata\.(labels|annotations)\['[^']+'\]", field):
            yield f"{at}.env.{row['name']}: a pod has no field {field!r}"
    yield from _twice([row["mountPath"] for row in container.get("volumeMounts", [])], f"{at}.volumeMounts")
    for row in container.get("volumeMounts", []):
        if row["name"] not in volumes:
            yield f"{at}.volumeMounts: no volume {row['name']!r}"
        if ":" in row["mountPath"]:
            yield f"{at}.volumeMounts: {row['mountPath']!r} holds a colon"
    for row in container.get("ports", []):
        if not 0 < row["containerPort"] < 65536:
            yield f"{at}.ports: {row['containerPort']}"
        if not re.fullmatch(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", row.get("name", "x")):
            yield f"{at}.ports: name {row['name']!r}"
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for name in {**limits, **requests}:
        if name not in STANDARD_RESOURCES and not name.startswith("hugepages-") and "/" not in name:
            yield f"{at}.resources: {name!r} is no resource"
        elif name not in OVERCOMMITTED:
            if name not in limits or amount(requests.get(name, limits[name])) != amount(limits[name]):
                yield f"{at}.resources: of {name} the request has to be the limit"
            elif amount(limits[name]) % 1:
                yield f"{at}.resources: part of a {name}"
        elif name in requests and amount(requests[name]) > amount(limits.get(name, requests[name])):
            yield f"{at}.resources: {name} request {requests[name]} over limit {limits[name]}"


def _twice(names: list[str], at: str) -> Iterator[str]:
    yield from (f"{at}: {name!r} stands there {count} times" for name, count in Counter(names).items() if count > 1)


# --- PyTorchJob -----------------------------------------------------------------------------------


def pytorchjob(document: dict[str, Any]) -> list[str]:
    found = list(_shape(document, JOB, ""))
    return found or list(_webhook(document))


def _shape(value: Any, kind: Any, at: str) -> Iterator[str]:
    if kind == "template":
        yield from template(value, at)
    elif kind == "job":
        wrong = list(_model(value, "V1JobTemplateSpec", at))
        yield from wrong or template(value["spec"]["template"], f"{at}.spec.template")
    elif isinstance(kind, str) and kind.startswith("V1"):
        yield from _model(value, kind, at)
    elif kind == "metadata":
        yield from _metadata(value, DNS_1035, at)
    elif kind == "quantity":
        if not _is_quantity(value):
            yield f"{at}: {value!r} is no quantity"
    elif isinstance(kind, set):
        if value not in kind:
            yield f"{at}: {value!r} is not one of {sorted(kind)}"
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{at}: {value!r} is not a list"
            return
        for index, child in enumerate(value):
            yield from _shape(child, kind[0], f"{at}[{index}]")
    elif isinstance(kind, type):
        if type(value) is not kind:
            yield f"{at}: {value!r} is not {kind.__name__}"
    elif not isinstance(value, dict):
        yield f"{at}: {value!r} is not a mapping"
    else:
        for key, child in value.items():
            if key in kind or str in kind:
                yield from _shape(child, kind.get(key, kind.get(str)), f"{at}.{key}".lstrip("."))
            else:
                yield f"{at}: unknown field `{key}`"


def _webhook(job: dict[str, Any]) -> Iterator[str]:
    """The operator's own rules, and the one it forgets: its pods' names."""
    name, spec = job["metadata"]["name"], job.get("spec", {})
    if len(f"{name}-worker-9999") > 63:
        yield f"metadata.name: the service {name}-worker-9999 has more than 63 characters"
    replicas = spec.get("pytorchReplicaSpecs")
    if not replicas:
        yield "spec.pytorchReplicaSpecs: missing"
        return
    if "Master" in replicas and replicas["Master"].get("replicas") != 1:
        yield "spec.pytorchReplicaSpecs.Master.replicas: has to be 1, and written"
    if "elasticPolicy" in spec and "Worker" not in replicas:
        yield "spec.elasticPolicy: needs Worker"
    for kind, row in replicas.items():
        at = f"spec.pytorchReplicaSpecs.{kind}"
        if row.get("replicas", 1) < 0:
            yield f"{at}.replicas: {row['replicas']}"
        if "template" not in row:
            yield f"{at}.template: missing"
        elif "pytorch" not in [container["name"] for container in row["template"]["spec"]["containers"]]:
            yield f"{at}: no container is called `pytorch`"


def jobset(document: dict[str, Any]) -> list[str]:
    return list(_shape(document, JOBSET, "")) or list(_jobset_webhook(document))


def _jobset_webhook(document: dict[str, Any]) -> Iterator[str]:
    """What the JobSet webhook, and the API server for the Jobs it makes, refuse."""
    name, spec = document["metadata"]["name"], document["spec"]
    names = [row["name"] for row in spec["replicatedJobs"]]
    yield from _twice(names, "spec.replicatedJobs")
    for row in spec["replicatedJobs"]:
        job = row["template"]["spec"]
        pod = job["template"]["spec"]
        at = f"spec.replicatedJobs.{row['name']}"
        longest = f"{name}-{row['name']}-{row.get('replicas', 1) - 1}-{job.get('completions', 1) - 1}-xxxxx"
        if len(longest) > 63:
            yield f"metadata.name: a pod {longest} has more than 63 characters"
        if pod.get("restartPolicy") not in ("Never", "OnFailure"):
            yield f"{at}: a Job's pods take restartPolicy Never or OnFailure, not {pod.get('restartPolicy')}"
        policy = job.get("podFailurePolicy")
        if (policy or "backoffLimitPerIndex" in job) and pod["restartPolicy"] != "Never":
            yield f"{at}: podFailurePolicy and backoffLimitPerIndex need restartPolicy Never"
        if "backoffLimitPerIndex" in job and job.get("completionMode") != "Indexed":
            yield f"{at}: backoffLimitPerIndex needs completionMode Indexed"
        boxes = [one["name"] for one in pod["containers"]]
        for rule in (policy or {}).get("rules", []):
            codes = rule.get("onExitCodes", {})
            if codes.get("containerName", boxes[0]) not in boxes:
                yield f"{at}.podFailurePolicy: no container {codes['containerName']!r}"
            values = codes.get("values", [1])
            if values != sorted(set(values)) or (codes.get("operator") == "In" and 0 in values):
                yield f"{at}.podFailurePolicy: values {values}"


RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def _trainer_webhook(document: dict[str, Any]) -> Iterator[str]:
    spec = document["spec"]
    env = [row["name"] for row in spec["trainer"].get("env", [])]
    yield from _twice(env, "spec.trainer.env")
    yield from (f"spec.trainer.env: {name} is reserved" for name in env if name in RESERVED)
    for at, pod in _laid(spec):
        for box in [*pod.get("containers", []), *pod.get("initContainers", [])]:
            if box["name"] != "node":
                yield f"{at}: the runtime has no container {box['name']!r}"
            if "env" in box:
                yield f"{at}: of node, env is said in spec.trainer"
            volumes = {row["name"] for row in pod.get("volumes", [])}
            missing = [row["name"] for row in box.get("volumeMounts", []) if row["name"] not in volumes]
            yield from (f"{at}: no volume {name!r}" for name in missing)


def _laid(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pods of a TrainJob, as far as it says something about them."""
    for row in spec.get("podTemplateOverrides", []):
        yield "spec.podTemplateOverrides", row["spec"]
    for patch in spec.get("runtimePatches", []):
        for row in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            yield f"spec.runtimePatches.{row['name']}", row["template"]["spec"]["template"]["spec"]


def pods(job: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every pod spec of a job, with the name of its part."""
    spec = job["spec"]
    if job["kind"] == "PyTorchJob":
        return [(kind, row["template"]["spec"]) for kind, row in spec["pytorchReplicaSpecs"].items()]
    if job["kind"] == "JobSet":
        return [(row["name"], row["template"]["spec"]["template"]["spec"]) for row in spec["replicatedJobs"]]
    return list(_laid(spec))


def _references(job: dict[str, Any], maps: dict[str, Any]) -> Iterator[str]:
    for kind, pod in pods(job):
        for volume in pod.get("volumes", []):
            # ours: one that a job names by itself is the cluster's
            sources = [part["configMap"] for part in volume.get("projected", {}).get("sources", [])]
            for source in sources:
                yield from _reference(source, maps, job, kind)
            yield from _twice([item["path"] for source in sources for item in source.get("items", [])], kind)


def _reference(source: dict[str, Any], maps: dict[str, Any], job: dict[str, Any], kind: str) -> Iterator[str]:
    if source["name"] not in maps:
        yield f"{kind}: no ConfigMap {source['name']}"
        return
    found = maps[source["name"]]
    if found["metadata"].get("namespace") != job["metadata"].get("namespace"):
        yield f"{kind}: ConfigMap {source['name']} is in another namespace"
    keys = {**found.get("data", {}), **found.get("binaryData", {})}
    missing = [item["key"] for item in source.get("items", []) if item["key"] not in keys]
    if missing:
        yield f"{kind}: ConfigMap {source['name']} has no {', '.join(missing)}"


# --- the CRD itself, where there is one -----------------------------------------------------------


CRDS = {
    "PyTorchJob": "kubeflow.org_pytorchjobs.yaml",
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "PodGroup": "scheduling.volcano.sh_podgroups.yaml",
}


def crd(kind: str = "PyTorchJob") -> Path | None:
    folder = os.environ.get("DSLAUNCH_CRD_DIR")
    path = Path(folder) / CRDS[kind] if folder else None
    return path if path and path.is_file() else None


def crd_schema(path: Path) -> dict[str, Any]:
    document = yaml.load(path.read_text(), Loader=LOADER)
    version = next(row for row in document["spec"]["versions"] if row["served"])
    schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    """OpenAPI to JSON schema, and nothing but what it names."""
    if isinstance(schema, list):
        return [_strict(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"properties", "patternProperties", "definitions"}
    result = {
        key: {name: _strict(row) for name, row in child.items()} if key in names else _strict(child)
        for key, child in schema.items()
        if key not in ("description", "example", "default")
    }
    if result.pop("x-kubernetes-int-or-string", False):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if result.pop("nullable", False) and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    if "properties" in result and not result.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if result.get("x-kubernetes-list-type") == "set":
        result["uniqueItems"] = True
    return result


def crd_problems(job: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft7Validator(schema)
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(job)
    ]
