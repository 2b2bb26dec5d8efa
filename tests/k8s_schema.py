"""Manifests judged offline, as strictly as an API server with the training operator's webhook would.

`problems(documents)` lists what is wrong, "spec.template.spec: unknown field `image`"; empty is good. Pods and
ConfigMaps are walked along the models of the `kubernetes` client, the PyTorchJob along a table of ours. With
DSLAUNCH_CRD_DIR naming a folder that has kubeflow.org_pytorchjobs.yaml, `crd_problems` asks that file, too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
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


def problems(documents: list[Any]) -> list[str]:
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
        else:
            found.append(f"document {number}: kind {kind!r} is unknown")
    for document in documents:
        if not found and document["kind"] == "PyTorchJob":
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


def _references(job: dict[str, Any], maps: dict[str, Any]) -> Iterator[str]:
    for kind, row in job["spec"]["pytorchReplicaSpecs"].items():
        for volume in row["template"]["spec"].get("volumes", []):
            several = [part["configMap"] for part in volume.get("projected", {}).get("sources", [])]
            sources = [volume["configMap"]] if "configMap" in volume else several
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


def crd() -> Path | None:
    folder = os.environ.get("DSLAUNCH_CRD_DIR")
    path = Path(folder) / "kubeflow.org_pytorchjobs.yaml" if folder else None
    return path if path and path.is_file() else None


def crd_schema(path: Path) -> dict[str, Any]:
    document = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(row for row in document["spec"]["versions"] if row["name"] == "v1")
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
