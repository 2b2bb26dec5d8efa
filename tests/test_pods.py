"""Pods: every field of the job file has its place in the template, and the default one is admitted anywhere."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from dataclasses import fields

import k8s_schema
import pytest

from launcher import plan, spec, yamldoc
from launcher.backends import kubernetes
from launcher.backends.kubernetes import pod as pods
from launcher.backends.kubernetes import security
from launcher.errors import UserError
from launcher.spec.kubernetes import (
    Csi,
    Dns,
    EnvFrom,
    Kubernetes,
    MapValue,
    Network,
    Nfs,
    NodeTerm,
    PodTerm,
    Projection,
    Scratch,
    Security,
    Sidecar,
    Spread,
    Toleration,
    Volume,
)

BASE = {
    "name": "demo",
    "model": "gpt-demo",
    "train": {"steps": 20, "global_batch": "auto", "zero": 3},  # not searched for in each of these tests
    "resources": {"nodes": 2, "gpus_per_node": 8, "gpu": "h100", "fabric": "ethernet", "memory": "512G"},
    "container": "reg/img:1",
}


def lay(under, top):
    both = isinstance(under, dict) and isinstance(top, dict)
    return {**under, **{key: lay(under.get(key), value) for key, value in top.items()}} if both else top


def make(*changes):
    job = copy.deepcopy(BASE)
    for change in changes:
        job = lay(job, change)
    return plan.make(spec.load(yamldoc.dump([job]), name="job.yaml").spec, others=False)


def render(*changes):
    """All documents, of a job that is not refused."""
    made = make(*changes)
    kubernetes.render(made)
    return kubernetes.manifests(made)


def job(*changes):
    return render(*changes)[-1]


def template(*changes):
    """Of the last replica: a worker's where there is one."""
    return list(job(*changes)["spec"]["pytorchReplicaSpecs"].values())[-1]["template"]


def at(value, path):
    """`containers/pytorch/resources`: items of lists by name, mount or number."""
    for step in re.split("/", path) if path else ():
        if isinstance(value, list):
            named = [one for one in value if isinstance(one, dict) and step in (one.get("name"), one.get("key"))]
            value = named[0] if named else value[int(step)] if step.isdigit() and int(step) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(step.replace("~", "/"))
        else:
            return None
    return value


def k8s(**options):
    return {"kubernetes": options}


def volume(**source):
    return k8s(volumes=[{"mount": "/v", **source}])


def sidecar(**more):
    return k8s(sidecars=[{"name": "side", "image": "i:1", **more}])


BOX = "spec/containers/pytorch"
OWN = {"matchLabels": {"app.kubernetes.io/name": "demo", "app.kubernetes.io/component": "training"}}
NEED, LIKE = pods.REQUIRED, pods.PREFERRED
ANY = {"operator": "Exists"}
# What is not of a pod, and tested where the kinds of job are.
OF_THE_KIND = {
    *("kind", "trainer", "runtime", "runtime_kind", "dataset", "weights"),
    *("queue", "gang", "elastic", "run_policy"),
}
# field: what the job file says, where it stands in a pod's template, what stands there
EXERCISED = {
    Kubernetes: {
        "namespace": (k8s(namespace="ml"), "job:metadata/namespace", "ml"),
        "priority_class": (k8s(priority_class="high"), "spec/priorityClassName", "high"),
        "service_account": (k8s(service_account="sa"), "spec/serviceAccountName", "sa"),
        "service_account_token": (k8s(service_account_token=True), "spec/automountServiceAccountToken", True),
        "image_pull_secrets": (k8s(image_pull_secrets=["r"]), "spec/imagePullSecrets", [{"name": "r"}]),
        "image_pull_policy": (k8s(image_pull_policy="Always"), f"{BOX}/imagePullPolicy", "Always"),
        "runtime_class": (k8s(runtime_class="nvidia"), "spec/runtimeClassName", "nvidia"),
        "gpu_resource": (
            k8s(gpu_resource="nvidia.com/mig-3g.40gb"),
            f"{BOX}/resources/limits/nvidia.com~mig-3g.40gb",
            "8",
        ),
        "network": (k8s(network={"resources": {"rdma/hca": 8}}), f"{BOX}/resources/requests/rdma~hca", "8"),
        "shm": (k8s(shm="64Gi"), "spec/volumes/shm/emptyDir/sizeLimit", "64Gi"),
        "ephemeral_storage": (k8s(ephemeral_storage="1Ti"), f"{BOX}/resources/limits/ephemeral-storage", "1Ti"),
        "cpu_limit": (k8s(cpu_limit="64"), f"{BOX}/resources/limits/cpu", "64"),
        "memory_limit": (
            k8s(memory_limit="960Gi"),
            f"{BOX}/resources",
            {
                "limits": {"memory": "960Gi", "nvidia.com/gpu": "8"},
                "requests": {"memory": "512Gi", "nvidia.com/gpu": "8"},
            },
        ),
        "node_selector": (k8s(node_selector={"a": "b"}), "spec/nodeSelector", {"a": "b"}),
        "node_affinity": (
            k8s(node_affinity=[{"key": "a", "operator": "Exists"}]),
            f"spec/affinity/nodeAffinity/{NEED}/nodeSelectorTerms/0",
            {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
        ),
        "node_affinity_any": (
            k8s(node_affinity=[{"key": "c"} | ANY], node_affinity_any=[[{"key": "a"} | ANY], [{"key": "b"} | ANY]]),
            f"spec/affinity/nodeAffinity/{NEED}/nodeSelectorTerms",
            [
                {"matchExpressions": [{"key": "c"} | ANY, {"key": "a"} | ANY]},
                {"matchExpressions": [{"key": "c"} | ANY, {"key": "b"} | ANY]},
            ],
        ),
        "pod_affinity": (
            k8s(pod_affinity=[{"topology_key": "rack"}]),
            f"spec/affinity/podAffinity/{NEED}",
            [{"topologyKey": "rack", "labelSelector": OWN}],
        ),
        "spread": (k8s(spread=[{"topology_key": "zone"}]), "spec/topologySpreadConstraints/0/labelSelector", OWN),
        "exclude": (
            k8s(exclude=["n1"]),
            f"spec/affinity/nodeAffinity/{NEED}/nodeSelectorTerms/0/matchFields/0/values",
            ["n1"],
        ),
        "tolerations": (k8s(tolerations=[{"key": "x"}]), "spec/tolerations", [{"key": "x", "operator": "Exists"}]),
        "scheduling_gates": (k8s(scheduling_gates=["a/b"]), "spec/schedulingGates", [{"name": "a/b"}]),
        "dns": (k8s(dns={"searches": ["a.b"]}), "spec/dnsConfig", {"searches": ["a.b"]}),
        "host_aliases": (
            k8s(host_aliases={"10.0.0.3": ["hub.local", "hub"]}),
            "spec/hostAliases",
            [{"ip": "10.0.0.3", "hostnames": ["hub.local", "hub"]}],
        ),
        "volumes": (
            volume(claim="c"),
            "spec/volumes/volume-0",
            {"name": "volume-0", "persistentVolumeClaim": {"claimName": "c"}},
        ),
        "sidecars": (sidecar(), "spec/initContainers/side/restartPolicy", "Always"),
        "env_from": (k8s(env_from=["cm"]), f"{BOX}/envFrom", [{"configMapRef": {"name": "cm"}}]),
        "secret_env_from": (k8s(secret_env_from=["se"]), f"{BOX}/envFrom", [{"secretRef": {"name": "se"}}]),
        "env_fields": (
            k8s(env_fields={"POD_IP": "status.podIP"}),
            f"{BOX}/env/POD_IP/valueFrom/fieldRef",
            {"fieldPath": "status.podIP"},
        ),
        "env_keys": (
            k8s(env_keys={"A": {"config_map": "cm", "key": "a"}}),
            f"{BOX}/env/A/valueFrom",
            {"configMapKeyRef": {"name": "cm", "key": "a"}},
        ),
        "pod_env": (k8s(pod_env={"a.b-c": "$(x)"}), f"{BOX}/env/a.b-c/value", "$$(x)"),
        "security": (k8s(security={"host_ipc": True}), "spec/hostIPC", True),
        "grace": (k8s(grace=300), "spec/terminationGracePeriodSeconds", 300),
        "labels": (k8s(labels={"t": "u"}), "metadata/labels/t", "u"),
        "annotations": (k8s(annotations={"x": "y"}), "job:metadata/annotations/x", "y"),
        "pod_labels": (k8s(pod_labels={"p": "q"}), "metadata/labels/p", "q"),
        "pod_annotations": (k8s(pod_annotations={"a/b": "c"}), "metadata/annotations/a~b", "c"),
        "pod_patch": (
            k8s(pod_patch={"spec": {"dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}}}),
            "spec/dnsConfig/options",
            [{"name": "ndots", "value": "1"}],
        ),
        "patch": (
            k8s(patch={"spec": {"pytorchReplicaSpecs": {"Worker": {"template": {"spec": {"nodeName": "n"}}}}}}),
            "spec/nodeName",
            "n",
        ),
    },
    Network: {
        "profile": (k8s(network={"profile": "coreweave"}), f"{BOX}/resources/limits/rdma~ib", "1"),
        "devices": (
            k8s(network={"profile": "efa", "devices": 16}),
            f"{BOX}/resources/limits/vpc.amazonaws.com~efa",
            "16",
        ),
        "resources": (k8s(network={"resources": {"a.b/c": "2"}}), f"{BOX}/resources/limits/a.b~c", "2"),
        "multus": (k8s(network={"multus": ["a", "b"]}), "metadata/annotations/k8s.v1.cni.cncf.io~networks", "a, b"),
        "claim_template": (k8s(network={"claim_template": "cd"}), f"{BOX}/resources/claims", [{"name": "network"}]),
        "claims": (
            k8s(network={"claim_template": "cd", "claims": ["nics"]}),
            "spec/resourceClaims",
            [
                {"name": "network", "resourceClaimTemplateName": "cd"},
                {"name": "network-1", "resourceClaimTemplateName": "nics"},
            ],
        ),
        "host_network": (k8s(network={"host_network": True}), "spec/dnsPolicy", "ClusterFirstWithHostNet"),
        "hugepages": (k8s(network={"hugepages": "5Gi"}), f"{BOX}/resources/requests/hugepages-2Mi", "5Gi"),
    },
    Security: {
        "run_as_user": (k8s(security={"run_as_user": 4242}), "spec/securityContext/runAsUser", 4242),
        "run_as_group": (k8s(security={"run_as_group": 7}), "spec/securityContext/runAsGroup", 7),
        "fs_group": (k8s(security={"fs_group": 8}), "spec/securityContext/fsGroup", 8),
        "supplemental_groups": (
            k8s(security={"supplemental_groups": [3000, 0]}),
            "spec/securityContext/supplementalGroups",
            [3000, 0],
        ),
        "root": (k8s(security={"root": True}), "spec/securityContext/runAsNonRoot", None),
        "allow_ipc_lock": (
            k8s(security={"allow_ipc_lock": True}),
            f"{BOX}/securityContext/capabilities/add",
            ["IPC_LOCK"],
        ),
        "capabilities": (
            k8s(security={"capabilities": ["CAP_SYS_PTRACE"]}),
            f"{BOX}/securityContext/capabilities/add",
            ["SYS_PTRACE"],
        ),
        "privileged": (k8s(security={"privileged": True}), f"{BOX}/securityContext", {"privileged": True}),
        "host_ipc": (k8s(security={"host_ipc": True}), "spec/hostIPC", True),
        "host_pid": (k8s(security={"host_pid": True}), "spec/hostPID", True),
        "seccomp": (
            k8s(security={"seccomp": "profiles/a.json"}),
            "spec/securityContext/seccompProfile",
            {"type": "Localhost", "localhostProfile": "profiles/a.json"},
        ),
    },
    Volume: {
        "mount": (volume(claim="c"), f"{BOX}/volumeMounts/volume-0/mountPath", "/v"),
        "claim": (volume(claim="c"), "spec/volumes/volume-0/persistentVolumeClaim/claimName", "c"),
        "nfs": (volume(nfs={"server": "s", "path": "/x"}), "spec/volumes/volume-0/nfs/path", "/x"),
        "csi": (volume(csi={"driver": "d"}), "spec/volumes/volume-0/csi/driver", "d"),
        "host_path": (volume(host_path="/mnt"), "spec/volumes/volume-0/hostPath", {"path": "/mnt"}),
        "host_path_type": (
            volume(host_path="/mnt", host_path_type="Directory"),
            "spec/volumes/volume-0/hostPath/type",
            "Directory",
        ),
        "scratch": (volume(scratch={}), "spec/volumes/volume-0/emptyDir", {}),
        "config_map": (volume(config_map="cm"), "spec/volumes/volume-0/configMap/name", "cm"),
        "secret": (volume(secret="se"), "spec/volumes/volume-0/secret/secretName", "se"),
        "projected": (
            volume(projected=[{"config_map": "a"}, {"secret": "b"}]),
            "spec/volumes/volume-0/projected",
            {"sources": [{"configMap": {"name": "a"}}, {"secret": {"name": "b"}}]},
        ),
        "items": (
            volume(secret="se", items={"k": "a/b"}),
            "spec/volumes/volume-0/secret/items",
            [{"key": "k", "path": "a/b"}],
        ),
        "default_mode": (
            volume(config_map="cm", default_mode="0755"),
            "spec/volumes/volume-0/configMap/defaultMode",
            493,
        ),
        "optional": (volume(secret="se", optional=True), "spec/volumes/volume-0/secret/optional", True),
        "sub_path": (volume(claim="c", sub_path="a/b"), f"{BOX}/volumeMounts/volume-0/subPath", "a/b"),
        "propagation": (
            volume(host_path="/m", propagation="HostToContainer"),
            f"{BOX}/volumeMounts/volume-0/mountPropagation",
            "HostToContainer",
        ),
        "read_only": (volume(claim="c", read_only=True), f"{BOX}/volumeMounts/volume-0/readOnly", True),
        "name": (volume(claim="c", name="data"), "spec/volumes/data/persistentVolumeClaim/claimName", "c"),
    },
    Nfs: {
        "server": (volume(nfs={"server": "s", "path": "/x"}), "spec/volumes/volume-0/nfs/server", "s"),
        "path": (volume(nfs={"server": "s", "path": "/x"}), "spec/volumes/volume-0/nfs/path", "/x"),
    },
    Csi: {
        "driver": (volume(csi={"driver": "d"}), "spec/volumes/volume-0/csi/driver", "d"),
        "attributes": (
            volume(csi={"driver": "d", "attributes": {"bucketName": "b"}}),
            "spec/volumes/volume-0/csi/volumeAttributes",
            {"bucketName": "b"},
        ),
        "secret": (
            volume(csi={"driver": "d", "secret": "s"}),
            "spec/volumes/volume-0/csi/nodePublishSecretRef",
            {"name": "s"},
        ),
        "fs_type": (volume(csi={"driver": "d", "fs_type": "xfs"}), "spec/volumes/volume-0/csi/fsType", "xfs"),
    },
    Scratch: {
        "size": (volume(scratch={"size": "1Ti"}), "spec/volumes/volume-0/emptyDir", {"sizeLimit": "1Ti"}),
        "memory": (volume(scratch={"memory": True}), "spec/volumes/volume-0/emptyDir", {"medium": "Memory"}),
        "storage_class": (
            volume(scratch={"size": "1Ti", "storage_class": "nvme"}),
            "spec/volumes/volume-0/ephemeral/volumeClaimTemplate/spec/storageClassName",
            "nvme",
        ),
    },
    Toleration: {
        "key": (k8s(tolerations=[{"key": "x"}]), "spec/tolerations/0/key", "x"),
        "operator": (
            k8s(tolerations=[{"key": "x", "operator": "Equal", "value": "y"}]),
            "spec/tolerations/0/operator",
            "Equal",
        ),
        "value": (
            k8s(tolerations=[{"key": "x", "operator": "Equal", "value": "y"}]),
            "spec/tolerations/0/value",
            "y",
        ),
        "effect": (
            k8s(tolerations=[{"key": "x", "effect": "NoSchedule"}]),
            "spec/tolerations/0/effect",
            "NoSchedule",
        ),
        "seconds": (
            k8s(tolerations=[{"key": "x", "effect": "NoExecute", "seconds": 60}]),
            "spec/tolerations/0/tolerationSeconds",
            60,
        ),
    },
    NodeTerm: {
        name: (
            k8s(node_affinity=[{"key": "a", "operator": "NotIn", "values": ["b"], "weight": 10}]),
            f"spec/affinity/nodeAffinity/{LIKE}/0/{path}",
            value,
        )
        for name, path, value in (
            ("key", "preference/matchExpressions/0/key", "a"),
            ("operator", "preference/matchExpressions/0/operator", "NotIn"),
            ("values", "preference/matchExpressions/0/values", ["b"]),
            ("weight", "weight", 10),
        )
    },
    PodTerm: {
        name: (
            k8s(pod_affinity=[{"topology_key": "host", "labels": {"app": "noisy"}, "away": True, "weight": 3}]),
            f"spec/affinity/podAntiAffinity/{path}",
            value,
        )
        for name, path, value in (
            ("topology_key", f"{LIKE}/0/podAffinityTerm/topologyKey", "host"),
            ("labels", f"{LIKE}/0/podAffinityTerm/labelSelector/matchLabels", {"app": "noisy"}),
            ("away", f"{LIKE}/0/podAffinityTerm/topologyKey", "host"),
            ("weight", f"{LIKE}/0/weight", 3),
        )
    },
    Spread: {
        name: (
            k8s(spread=[{"topology_key": "zone", "max_skew": 2, "when_unsatisfiable": "ScheduleAnyway"}]),
            f"spec/topologySpreadConstraints/0/{path}",
            value,
        )
        for name, path, value in (
            ("topology_key", "topologyKey", "zone"),
            ("max_skew", "maxSkew", 2),
            ("when_unsatisfiable", "whenUnsatisfiable", "ScheduleAnyway"),
        )
    },
    Sidecar: {
        "name": (sidecar(), "spec/initContainers/side/name", "side"),
        "image": (sidecar(), "spec/initContainers/side/image", "i:1"),
        "command": (sidecar(command=["a"]), "spec/initContainers/side/command", ["a"]),
        "args": (sidecar(args=["b"]), "spec/initContainers/side/args", ["b"]),
        "env": (sidecar(env={"A": "1"}), "spec/initContainers/side/env", [{"name": "A", "value": "1"}]),
        "mounts": (
            sidecar(mounts={"shm": "/dev/shm"}),
            "spec/initContainers/side/volumeMounts",
            [{"name": "shm", "mountPath": "/dev/shm"}],
        ),
        "resources": (sidecar(resources={"cpu": "1"}), "spec/initContainers/side/resources/limits", {"cpu": "1"}),
        "requests": (
            sidecar(resources={"cpu": "4"}, requests={"cpu": "500m", "memory": "1Gi"}),
            "spec/initContainers/side/resources",
            {"limits": {"cpu": "4"}, "requests": {"cpu": "500m", "memory": "1Gi"}},
        ),
        "env_from": (
            sidecar(env_from=["cm"]),
            "spec/initContainers/side/envFrom",
            [{"configMapRef": {"name": "cm"}}],
        ),
        "secret_env_from": (
            sidecar(secret_env_from=["se"]),
            "spec/initContainers/side/envFrom",
            [{"secretRef": {"name": "se"}}],
        ),
        "init": (
            sidecar(init=True),
            "spec/initContainers/side",
            {"name": "side", "image": "i:1", "securityContext": pods.RESTRICTED},
        ),
        "privileged": (sidecar(privileged=True), "spec/initContainers/side/securityContext/privileged", True),
        "env_fields": (
            sidecar(env_fields={"A": "requests.cpu"}, resources={"cpu": "1"}),
            "spec/initContainers/side/env/A/valueFrom",
            {"resourceFieldRef": {"resource": "requests.cpu"}},
        ),
        "secrets": (
            sidecar(secrets={"A": {"secret": "s", "key": "k"}}),
            "spec/initContainers/side/env/A/valueFrom",
            {"secretKeyRef": {"name": "s", "key": "k"}},
        ),
        "capabilities": (
            sidecar(capabilities=["CAP_NET_ADMIN"], run_as_user=0),
            "spec/initContainers/side/securityContext/capabilities",
            {"drop": ["ALL"], "add": ["NET_ADMIN"]},
        ),
        "run_as_user": (sidecar(run_as_user=7), "spec/initContainers/side/securityContext/runAsUser", 7),
        "image_pull_policy": (
            sidecar(image_pull_policy="Always"),
            "spec/initContainers/side/imagePullPolicy",
            "Always",
        ),
    },
    Projection: {
        name: (
            volume(projected=[{"config_map": "z"}, {"optional": True, "items": {"k": "a/b"}, source: "cm"}]),
            f"spec/volumes/volume-0/projected/sources/1/{theirs}",
            value,
        )
        for name, source, theirs, value in (
            ("config_map", "config_map", "configMap/name", "cm"),
            ("secret", "secret", "secret/name", "cm"),
            ("items", "secret", "secret/items", [{"key": "k", "path": "a/b"}]),
            ("optional", "config_map", "configMap/optional", True),
        )
    },
    EnvFrom: {
        name: (
            k8s(secret_env_from=[{"name": "se", "prefix": "S3_", "optional": True}]),
            f"{BOX}/envFrom/0/{theirs}",
            value,
        )
        for name, theirs, value in (
            ("name", "secretRef/name", "se"),
            ("prefix", "prefix", "S3_"),
            ("optional", "secretRef/optional", True),
        )
    },
    Dns: {
        name: (
            k8s(
                dns={
                    "policy": "None",
                    "nameservers": ["10.0.0.2"],
                    "searches": ["a.b"],
                    "options": {"ndots": "2", "rotate": ""},
                }
            ),
            f"spec/{theirs}",
            value,
        )
        for name, theirs, value in (
            ("policy", "dnsPolicy", "None"),
            ("nameservers", "dnsConfig/nameservers", ["10.0.0.2"]),
            ("searches", "dnsConfig/searches", ["a.b"]),
            ("options", "dnsConfig/options", [{"name": "ndots", "value": "2"}, {"name": "rotate"}]),
        )
    },
    MapValue: {
        name: (
            k8s(env_keys={"A": {"config_map": "cm", "key": "a", "optional": True}}),
            f"{BOX}/env/A/valueFrom/configMapKeyRef/{theirs}",
            value,
        )
        for name, theirs, value in (("config_map", "name", "cm"), ("key", "key", "a"), ("optional", "optional", True))
    },
}
ROWS = [(kind, name) for kind, rows in EXERCISED.items() for name in rows]


@pytest.mark.parametrize(
    ("gpu", "name"), [("mi300x", "amd.com/gpu"), ("mi355x", "amd.com/gpu"), ("gb300", "nvidia.com/gpu")]
)
def test_a_gpu_is_the_resource_of_who_makes_it(gpu, name):
    limits = at(template({"resources": {"gpu": gpu}}), f"{BOX}/resources/limits")
    assert limits == {"memory": "512Gi", name: "8"}


def test_a_secret_may_be_missing():
    secret = {"secret": "s", "key": "k", "optional": True}
    found = at(template({"secrets": {"HF_TOKEN": secret}}), f"{BOX}/env/HF_TOKEN/valueFrom/secretKeyRef")
    assert found == {"name": "s", "key": "k", "optional": True}
    with pytest.raises(UserError, match="optional without a Kubernetes Secret"):
        make({"secrets": {"HF_TOKEN": {"from_env": "HF_TOKEN", "optional": True}}})


def test_shared_memory_without_a_limit_is_the_node_s_to_end():
    assert at(template(k8s(shm="none")), "spec/volumes/shm/emptyDir") == {"medium": "Memory"}


def test_an_amount_is_told_in_the_unit_that_a_program_wants():
    found = at(template(k8s(env_fields={"GIB": "limits.memory/1Gi"})), f"{BOX}/env/GIB/valueFrom/resourceFieldRef")
    assert found == {"resource": "limits.memory", "divisor": "1Gi"}
    with pytest.raises(UserError, match=re.escape("limits.memory/3Gi")):
        make(k8s(env_fields={"GIB": "limits.memory/3Gi"}))


def test_a_policy_of_dns_is_in_front_of_host_network_s():
    found = template(k8s(network={"host_network": True}, dns={"policy": "Default"}))
    assert found["spec"]["dnsPolicy"] == "Default"


def test_how_much_of_a_gpu_is_no_further_gpu():
    shares = {"nvidia.com/gpumem": 8192, "nvidia.com/gpucores": 50}
    limits = at(template(k8s(network={"resources": shares})), f"{BOX}/resources/limits")
    assert (limits["nvidia.com/gpu"], limits["nvidia.com/gpumem"]) == ("8", "8192")
    with pytest.raises(UserError, match="is a GPU, and how many"):
        render(k8s(network={"resources": {"nvidia.com/gpu.shared": 2}}))


def test_no_limit_on_cpus_leaves_the_request():
    asked = {"resources": {"cpus_per_node": 64}}
    found = at(template(asked, k8s(cpu_limit="none")), f"{BOX}/resources")
    assert (found["requests"]["cpu"], "cpu" in found["limits"]) == ("64", False)


def test_bash_hands_on_what_it_cannot_export():
    found = subprocess.run(
        ["bash", "-c", "bash -c env"], env={"PATH": os.environ["PATH"], "a.b-c": "d"}, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert "a.b-c=d" in found.stdout.splitlines()


@pytest.mark.parametrize("kind", EXERCISED, ids=lambda kind: kind.__name__)
def test_every_field_has_a_row(kind):
    named = {field.name for field in fields(kind)} - (OF_THE_KIND if kind is Kubernetes else set())
    assert named == set(EXERCISED[kind])


@pytest.fixture(scope="module")
def plain():
    return job()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ROWS, ids=lambda one: getattr(one, "__name__", one))
def test_every_field_acts_where_the_api_wants_it(kind, name, plain):
    change, path, value = EXERCISED[kind][name]
    whole, before = job(change), plain
    assert list(k8s_schema.template(whole["spec"]["pytorchReplicaSpecs"]["Worker"]["template"], "")) == []
    if path.startswith("job:"):
        path = path.removeprefix("job:")
    else:
        whole, before = (one["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] for one in (whole, before))
    assert at(whole, path) == value
    assert at(before, path) != value


def test_node_terms_and_excluded_nodes_all_hold():
    """Of several nodeSelectorTerms one would be enough."""
    asked = k8s(
        node_affinity=[{"key": "a", "values": ["b"]}, {"key": "c", "operator": "Exists"}], exclude=["n1", "n2"]
    )
    [term] = at(template(asked), f"spec/affinity/nodeAffinity/{NEED}/nodeSelectorTerms")
    assert [row["key"] for row in term["matchExpressions"]] == ["a", "c"]
    assert [row["values"] for row in term["matchFields"]] == [["n1"], ["n2"]]


def test_pods_on_the_nodes_network_keep_apart():
    first, other = (template(change, k8s(network={"host_network": True})) for change in ({}, {"name": "other"}))
    for made in (first, other):
        assert made["spec"]["hostNetwork"] is True
        [term] = at(made, f"spec/affinity/podAntiAffinity/{NEED}")
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= made["metadata"]["labels"].items()
        [port] = at(made, f"{BOX}/ports")
        assert 20_000 <= port["containerPort"] == port["hostPort"] < 30_000
    assert at(first, f"{BOX}/ports") != at(other, f"{BOX}/ports")


# --- Pod Security ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"resources": {"gpus_per_node": 0, "gpu": None, "fabric": "gloo"}},
        k8s(
            volumes=[{"mount": "/c", "claim": "c"}, {"mount": "/s", "scratch": {"size": "1Ti", "storage_class": "x"}}]
        ),
        k8s(volumes=[{"mount": "/c", "config_map": "c"}, {"mount": "/s", "secret": "s"}]),
        {"code": {"clone": "https://example.com/a.git"}},
        sidecar(),
        k8s(security={"run_as_user": "image"}),
        k8s(network={"resources": {"rdma/hca": 8}, "multus": ["a"], "claim_template": "cd"}),
    ],
    ids=["default", "cpu", "claims", "maps", "clone", "sidecar", "image user", "rdma"],
)
def test_a_restricted_namespace_admits_it(change):
    assert security.violations(template(change)["spec"]) == []
    assert not [note for note in kubernetes.notes(make(change)) if security.LABEL in note]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "admitted", "field", "word"),
    [
        (k8s(security={"root": True}), "baseline", "runAsNonRoot", "has to be true"),
        (k8s(security={"root": True, "run_as_user": 0}), "baseline", "securityContext.runAsUser", "root"),
        (k8s(security={"allow_ipc_lock": True}), "privileged", "capabilities.add", "IPC_LOCK"),
        (k8s(security={"capabilities": ["CHOWN"]}), "baseline", "capabilities.add", "CHOWN"),
        (k8s(security={"privileged": True}), "privileged", "privileged", "every right"),
        (k8s(security={"host_ipc": True}), "privileged", "hostIPC", "shared memory"),
        (k8s(security={"seccomp": "Unconfined"}), "privileged", "seccompProfile", "Unconfined"),
        (k8s(network={"host_network": True}), "privileged", "hostNetwork", "own network"),
        (volume(host_path="/mnt"), "privileged", "volumes[volume-0]", "/mnt"),
        (volume(nfs={"server": "s", "path": "/x"}), "baseline", "volumes[volume-0]", "nfs"),
        (sidecar(privileged=True), "privileged", "initContainers[side]", "every right"),
    ],
)
def test_each_step_beyond_is_told_with_the_label_it_needs(change, admitted, field, word):
    found = security.violations(template(change)["spec"])
    assert security.admits(found) == admitted
    assert any(field in one.field and word in one.reason for one in found)
    [note] = [note for note in kubernetes.notes(make(change)) if security.LABEL in note]
    assert f"{security.LABEL}={admitted}" in note
    assert field in note


RESTRICTED = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [{"name": "a", "securityContext": dict(pods.RESTRICTED)}],
}


@pytest.mark.parametrize(
    ("change", "profile"),
    [
        ({"hostPID": True}, "baseline"),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax"}]}}, "baseline"),
        ({"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}, "baseline"),
        ({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}, "baseline"),
        ({"securityContext": {"windowsOptions": {"hostProcess": True}}}, "baseline"),
        ({"securityContext": {"runAsNonRoot": False}}, "restricted"),
        ({"securityContext": {"seccompProfile": None}}, "restricted"),
        ({"containers": [{"name": "a"}]}, "restricted"),
        ({"containers": [{"name": "a", "securityContext": {"procMount": "Unmasked"}}]}, "baseline"),
        ({"containers": [{"name": "a", "ports": [{"containerPort": 1, "hostPort": 1}]}]}, "baseline"),
        ({"containers": [{"name": "a", "livenessProbe": {"httpGet": {"host": "b", "port": 1}}}]}, "baseline"),
        ({"containers": [{"name": "a", "lifecycle": {"preStop": {"tcpSocket": {"host": "b"}}}}]}, "baseline"),
    ],
)
def test_the_standards_rules(change, profile):
    assert security.violations(RESTRICTED) == []
    found = security.violations(lay(RESTRICTED, change))
    assert profile in {one.profile for one in found}


def test_what_the_standards_allow():
    good = {
        "securityContext": {"sysctls": [{"name": "net.ipv4.tcp_rmem"}], "seLinuxOptions": {"type": "container_t"}}
    }
    assert security.violations(lay(RESTRICTED, good)) == []
    bound = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}
    assert security.violations({**RESTRICTED, "containers": [{"name": "a", "securityContext": bound}]}) == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        (volume(), "kubernetes.volumes.0", "one source, and this has none"),
        (volume(claim="a", secret="b"), "kubernetes.volumes.0", "claim and secret"),
        (volume(claim="a", host_path_type="File"), "kubernetes.volumes.0.host_path_type", "without host_path"),
        (volume(host_path="mnt"), "kubernetes.volumes.0.host_path", "relative"),
        (volume(claim="a", sub_path="../b"), "kubernetes.volumes.0.sub_path", "no path below"),
        (volume(claim="a", name="shm"), "kubernetes.volumes.0.name", "there already"),
        (volume(scratch={"storage_class": "a"}), "kubernetes.volumes.0.scratch", "needs a size"),
        (
            volume(scratch={"storage_class": "a", "size": "1Ti", "memory": True}),
            "kubernetes.volumes.0.scratch",
            "in memory",
        ),
        (
            {**volume(config_map="a"), "train": {"checkpoint": {"dir": "/v/x"}}},
            "kubernetes.volumes.0",
            "cannot be written",
        ),
        (volume(claim="a", optional=True), "kubernetes.volumes.0.optional", "without config_map"),
        (volume(claim="a", propagation="Bidirectional"), "kubernetes.volumes.0.propagation", "it is privileged"),
        (k8s(dns={"policy": "None"}), "kubernetes.dns.policy", "no nameserver"),
        (k8s(dns={"nameservers": ["1.1.1.1"] * 4}), "kubernetes.dns.nameservers", "3 at most"),
        (
            sidecar(resources={"cpu": "1"}, requests={"cpu": "1500m"}),
            "kubernetes.sidecars.0.requests.cpu",
            "1 is the limit",
        ),
        (sidecar(requests={"a.b/c": "1"}), "kubernetes.sidecars.0.requests.a.b/c", "is a device"),
        (k8s(tolerations=[{"key": "a", "seconds": 5}]), "kubernetes.tolerations.0.seconds", "end pods"),
        (k8s(node_affinity=[{"key": "a"}]), "kubernetes.node_affinity.0", "needs values"),
        (
            k8s(node_affinity=[{"key": "a", "operator": "Exists", "values": ["b"]}]),
            "kubernetes.node_affinity.0",
            "no values",
        ),
        (
            k8s(node_affinity=[{"key": "a", "operator": "Gt", "values": ["b"]}]),
            "kubernetes.node_affinity.0",
            "one integer",
        ),
        (k8s(spread=[{"topology_key": "z"}, {"topology_key": "z"}]), "kubernetes.spread.1", "twice"),
        (k8s(pod_labels={"app.kubernetes.io/name": "x"}), "kubernetes.pod_labels.app.kubernetes.io/name", "own"),
        (k8s(labels={"app.kubernetes.io/name": "x"}), "kubernetes.labels.app.kubernetes.io/name", "own"),
        (k8s(labels={"app.kubernetes.io/managed-by": "x"}), "kubernetes.labels.app.kubernetes.io/managed-by", "own"),
        (k8s(security={"run_as_user": 0}), "kubernetes.security.run_as_user", "is root"),
        (k8s(security={"run_as_user": 5, "root": True}), "kubernetes.security.root", "which is not"),
        (k8s(security={"run_as_user": "image", "root": True}), "kubernetes.security.run_as_user", "by itself"),
        (k8s(env_fields={"RANK": "metadata.name"}), "kubernetes.env_fields.RANK", "the launcher sets it"),
        (k8s(env_fields={"A": "metadata.name"}) | {"env": {"A": "b"}}, "kubernetes.env_fields.A", "stands in env"),
        (
            k8s(env_keys={"A": {"config_map": "c", "key": "k"}}, env_fields={"A": "metadata.name"}),
            "kubernetes.env_keys.A",
            "stands in env_fields",
        ),
        (k8s(env_keys={"RANK": {"config_map": "c", "key": "k"}}), "kubernetes.env_keys.RANK", "the launcher sets it"),
        (k8s(pod_env={"A": "b"}), "kubernetes.pod_env.A", "a shell can export"),
        (k8s(pod_env={"hf.token": "b"}), "kubernetes.pod_env.hf.token", "looks like a secret"),
        (k8s(gpu_resource="habana.ai/gaudi"), "kubernetes.gpu_resource", "HCCL"),
        (k8s(gpu_resource="aws.amazon.com/neuroncore"), "kubernetes.gpu_resource", "neuronx-distributed"),
        (k8s(gpu_resource="amd.com/gpu"), "kubernetes.gpu_resource", "is NVIDIA's"),
        (
            k8s(network={"resources": {"habana.ai/gaudi": 8}}),
            "kubernetes.network.resources.habana.ai/gaudi",
            "HCCL",
        ),
        (
            k8s(network={"resources": {"nvidia.com/gpu": 4}}),
            "kubernetes.network.resources.nvidia.com/gpu",
            "resources.gpus_per_node",
        ),
        (
            k8s(gpu_resource="nvidia.com/gpu") | {"resources": {"gpu": "mi300x"}},
            "kubernetes.gpu_resource",
            "a mi300x is AMD's",
        ),
        (k8s(cpu_limit="none"), "kubernetes.cpu_limit", "no cpu is requested"),
        (k8s(memory_limit="511Gi"), "kubernetes.memory_limit", "requests 512Gi"),
        (
            k8s(memory_limit="none", env_fields={"A": "limits.memory"}),
            "kubernetes.env_fields.A",
            "what the node has",
        ),
        (k8s(node_affinity_any=[[]]), "kubernetes.node_affinity_any.0", "holds nowhere"),
        (
            k8s(node_affinity_any=[[{"key": "a", "operator": "Exists", "weight": 5}]]),
            "kubernetes.node_affinity_any.0.0.weight",
            "not preferred",
        ),
        (k8s(network={"claims": ["a", "a"]}), "kubernetes.network.claims", "twice"),
        (volume(claim="c", items={"a": "b"}), "kubernetes.volumes.0.items", "without config_map"),
        (volume(claim="c", default_mode="755"), "kubernetes.volumes.0.default_mode", "without config_map"),
        (volume(secret="s", items={"a": "../b"}), "kubernetes.volumes.0.items.a", "no path below"),
        (volume(projected=[]), "kubernetes.volumes.0.projected", "from nothing"),
        (volume(projected=[{"items": {"a": "b"}}]), "kubernetes.volumes.0.projected.0", "one config_map"),
        (
            volume(projected=[{"secret": "s", "items": {"a": "/b"}}]),
            "kubernetes.volumes.0.projected.0.items.a",
            "no path below",
        ),
        (sidecar(capabilities=["NET_ADMIN"]), "kubernetes.sidecars.0.capabilities", "root alone"),
        (sidecar(privileged=True, run_as_user=5), "kubernetes.sidecars.0.run_as_user", "is less"),
        (sidecar(secrets={"A": {"from_env": "A"}}), "kubernetes.sidecars.0.secrets.A", "a Secret's key"),
        (
            sidecar(env={"A": "b"}, env_fields={"A": "metadata.name"}),
            "kubernetes.sidecars.0.env_fields",
            "said twice",
        ),
        (
            sidecar(resources={"nvidia.com/gpu": "1"}),
            "kubernetes.sidecars.0.resources.nvidia.com/gpu",
            "beside the ranks'",
        ),
        (sidecar(env_fields={"A": "limits.cpu"}), "kubernetes.sidecars.0.env_fields.A", "without resources"),
        (sidecar(mounts={"gone": "/x"}), "kubernetes.sidecars.0.mounts.gone", "no volume"),
        (sidecar(env={"HF_TOKEN": "x"}), "kubernetes.sidecars.0.env.HF_TOKEN", "secret"),
        (k8s(sidecars=[{"name": "pytorch", "image": "i"}]), "kubernetes.sidecars.0.name", "there already"),
        (
            k8s(network={"hugepages": "5Gi"}) | {"resources": {"memory": None}},
            "kubernetes.network.hugepages",
            "huge pages",
        ),
        ({"code": {"clone": "git@example.com:a/b"}}, "code.clone", "ssh"),
        ({"code": {"clone": "https://tok@example.com/a"}}, "code.clone", "manifests"),
        ({"code": {"take": "none", "ref": "main"}}, "code.ref", "no clone"),
    ],
)
def test_what_no_pod_can_be_is_refused_with_its_field(change, where, words):
    with pytest.raises(UserError) as caught:
        render(change)
    found = {".".join(map(str, problem.at)): problem.message for problem in caught.value.problems}
    assert words in found[where]


# --- recovery and users ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "lasts"),
    [
        ({"claim": "c"}, True),
        ({"nfs": {"server": "s", "path": "/x"}}, True),
        ({"csi": {"driver": "d"}}, True),
        ({"host_path": "/lustre"}, True),
        ({"scratch": {}}, False),
        ({"scratch": {"size": "1Ti", "storage_class": "nvme"}}, False),
    ],
)
def test_only_checkpoints_that_outlive_the_pods_are_started_from(source, lasts):
    made = make(volume(**source), {"train": {"checkpoint": {"dir": "/v/demo"}}})
    assert kubernetes.recovers(made) is lasts


def test_checkpoints_without_a_volume_have_a_place_that_a_user_can_write_to():
    inside = {"train": {"workdir": "/src", "script": "train.py"}}
    assert at(template(inside), f"{BOX}/volumeMounts/checkpoints/mountPath") == "/src/checkpoints/demo"
    for change in (
        k8s(security={"root": True}),
        volume(claim="c", mount="/src/checkpoints"),
        {"train": {"checkpoint": {"dir": "/tmp/x"}}},
    ):
        assert at(template(inside, change), f"{BOX}/volumeMounts/checkpoints") is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else")
def test_a_user_without_a_name_or_home_finds_room_in_the_images_directory(tmp_path):
    """As PyTorch's images have it: a working directory, and all in it, that is root's."""
    (tmp_path / "image").mkdir(mode=0o755)
    (tmp_path / "image" / "data").mkdir()
    (tmp_path / "image" / "train.py").write_text("import getpass; print(getpass.getuser())")
    for folder in (tmp_path, *tmp_path.parents):
        if folder == tmp_path or folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    room = pods.ROOM.replace("/tmp/workdir", str(tmp_path / "user" / "workdir"))
    (tmp_path / "user").mkdir()
    os.chown(tmp_path / "user", 4242, 4242)
    script = f'{pods.WELCOME}{room}echo "$HOME" "$USER"; python3 train.py; mkdir checkpoints; ls -d data checkpoints'
    found = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "image", user=4242, group=4242, extra_groups=[], capture_output=True,
        text=True, check=False, env={"PATH": "/usr/bin:/bin", "HOME": "/"}, timeout=60,
    )  # fmt: skip
    assert found.stderr == ""
    assert found.stdout.split() == ["/tmp", "dslaunch", "dslaunch", "checkpoints", "data"]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(("mode", "code", "words"), [(0o755, 73, "user 4242 cannot write to"), (0o777, 0, "")])
def test_a_volume_of_somebody_else_ends_a_job_at_its_start(tmp_path, mode, code, words):
    for folder in (tmp_path, *tmp_path.parents):
        if folder == tmp_path or folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume").chmod(mode)
    asked = {"train": {"checkpoint": {"dir": f"{tmp_path}/volume/demo"}}}
    shared = k8s(volumes=[{"claim": "c", "mount": f"{tmp_path}/volume"}])
    [_, _, script] = at(template(asked, shared), f"{BOX}/command")
    script = script[: script.index("export NODE_RANK")]
    found = subprocess.run(
        ["bash", "-c", script], cwd="/tmp", user=4242, group=4242, extra_groups=[], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert (found.returncode, words in found.stderr) == (code, True)
    assert found.returncode or (tmp_path / "volume" / "demo").is_dir()
    rooted = at(template(asked, shared, k8s(security={"root": True})), f"{BOX}/command")[2]
    assert "cannot write" not in rooted


# --- a clone --------------------------------------------------------------------------------------

CLONE = {"code": {"clone": "https://example.com/$(HOME)/a.git", "ref": "v1", "secret": "token"}}


def test_a_clone_lies_where_ranks_begin():
    made = template(CLONE, {"train": {"script": "train.py"}})["spec"]
    [clone] = made["initContainers"]
    assert clone["command"][-2:] == ["https://example.com/$$(HOME)/a.git", "v1"]  # for Kubernetes not to look up HOME
    assert made["containers"][0]["workingDir"] == "/workspace"
    assert at(made, "containers/pytorch/volumeMounts/code") == {
        "name": "code",
        "mountPath": "/workspace",
        "subPath": "tree",
    }
    assert at(made, "volumes/code-secret/secret/secretName") == "token"
    elsewhere = template(CLONE, {"train": {"script": "train.py", "workdir": "/src"}})["spec"]
    assert at(elsewhere, "containers/pytorch/volumeMounts/code/mountPath") == "/src"
    below = render(CLONE, {"train": {"script": "train.py", "workdir": "examples/gpt"}})
    assert "cd -P -- examples/gpt\n" in below[0]["data"]["node.sh"]
    assert (
        below[-1]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["workingDir"]
        == "/workspace"
    )
    assert not [
        note for note in kubernetes.notes(make(CLONE, {"train": {"script": "train.py"}})) if "in the image" in note
    ]


def git(folder, *words):
    names = ("-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "protocol.file.allow=always")
    return subprocess.run(
        ["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Three commits: the second tagged v1, the third on a branch of its own."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q", "-b", "main")
    commits = []
    for number in (1, 2, 3):
        if number == 3:
            git(folder, "checkout", "-q", "-b", "feature")
        (folder / "number").write_text(str(number))
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", str(number))
        commits.append(git(folder, "rev-parse", "HEAD"))
        if number == 2:
            git(folder, "tag", "v1")
    git(folder, "checkout", "-q", "main")
    return folder, commits


@pytest.mark.parametrize(
    ("ref", "number"),
    [("HEAD", "2"), ("feature", "3"), ("v1", "2"), ("commit 1", "1"), ("part of 1", "1"), ("nope", None)],
)
def test_branches_tags_and_commits_are_cloned(repository, tmp_path, ref, number):
    origin, commits = repository
    asked = {"commit 1": commits[0], "part of 1": commits[0][:9]}.get(ref, ref)
    script = pods.CLONE.replace("/code", f"{tmp_path}/code").replace("/secret", f"{tmp_path}/secret")
    (tmp_path / "code").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "password").write_text("hush")
    script = script.replace("HOME=/tmp", f"HOME={tmp_path}")
    words = ["sh", "-c", script, "clone", f"file://{origin}", asked]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if number is None:
        assert found.returncode != 0
        return
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "code" / "tree" / "number").read_text() == number
    assert "hush" not in found.stdout + found.stderr + (tmp_path / ".gitconfig").read_text()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLONE_USER": "me"}
    told = subprocess.run(
        ["git", "credential", "fill"], input="protocol=https\nhost=example.com\n\n", env=env, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert {"username=me", "password=hush"} <= set(told.stdout.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}], None),
        ([{"setup": ["pip install x"]}], "setup runs as user 1000"),
        ([{"setup": ["pip install x"]}, k8s(security={"root": True})], None),
        ([volume(nfs={"server": "s", "path": "/x"})], "written as user 1000"),
        ([volume(nfs={"server": "s", "path": "/x"}), k8s(security={"run_as_user": 4242})], None),
        ([volume(nfs={"server": "s", "path": "/x"}, read_only=True)], None),
        ([k8s(security={"run_as_user": "image"})], "CreateContainerConfigError"),
        ([k8s(security={"allow_ipc_lock": True})], "IPC_LOCK reaches root alone"),
        ([k8s(security={"capabilities": ["SYS_PTRACE"], "run_as_user": 7})], "SYS_PTRACE reaches root alone"),
        ([k8s(security={"allow_ipc_lock": True, "root": True})], None),
        ([sidecar()], "Kubernetes 1.29"),
        ([sidecar(init=True)], None),
        ([volume(scratch={"memory": True})], "counts as memory"),
    ],
)
def test_what_surprises_in_a_pod_is_told(changes, words):
    told = [note for note in pods.notes(make(*changes).spec, set()) if security.LABEL not in note]
    assert len(told) == (words is not None)
    assert all(words in note for note in told)
