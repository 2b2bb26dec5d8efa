"""Kubernetes manifests of others as job files, and those that dslaunch rendered back to what they were rendered from.

data/manifests/ has objects in the patterns that clouds and frameworks publish.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import k8s_schema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import cli, plan, spec, yamldoc
from launcher.backends import kubernetes
from launcher.backends.kubernetes import kinds
from launcher.errors import UserError
from launcher.imports import Imported, groups, manifests, objects, pods, write

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data" / "manifests"
REFUSED = {"rayjob": "places the work of its own workers", "mpijob-nccl-tests": "ask MPI who they are"}
FILES = sorted(path for path in DATA.iterdir() if path.stem not in REFUSED)
GALLERY = sorted((ROOT / "manifests").glob("*/job.yaml"))
VARIABLES = {"IMAGE_URI": "registry.example.com/fsdp:1"}


@pytest.fixture(autouse=True)
def no_site_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)


def imported(name: str) -> Imported:
    path = next(path for path in DATA.iterdir() if path.stem == name)
    return manifests.read(path.read_text(), name=path.name)


def read(pod: dict[str, Any] | None = None, box: dict[str, Any] | None = None, **metadata: Any) -> Imported:
    """A PyTorchJob of four pods with this in its pods and their container."""
    container = {"name": "pytorch", "image": "registry.example.com/train:1", "command": ["torchrun", "train.py"],
                 "resources": {"limits": {"nvidia.com/gpu": 8}}, **(box or {})}  # fmt: skip
    template = {"spec": {"containers": [container], **(pod or {})}}
    content = {"pytorchReplicaSpecs": {"Worker": {"replicas": 4, "template": template}}}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "a", **metadata},
        "spec": content,
    }
    return manifests.read(json.dumps(job), name="job.json")


def at(job: Any, path: str | tuple[Any, ...]) -> Any:
    for key in path.split("/") if isinstance(path, str) else path:
        job = job[int(key)] if isinstance(job, (list, tuple)) else job[key]
    return job


def said(made: Imported, kind: str) -> str:
    return "\n".join(note.message for note in made.notes if note.kind == kind)


def rendered(made: Imported) -> dict[str, Any]:
    """The object that the job file of it renders to."""
    document = spec.load(write.text(made.job), name="job.yaml", environ=VARIABLES)
    text = kubernetes.render(plan.make(document.spec)).text(kubernetes.ENTRY)
    return [one for one in k8s_schema.documents(text) if one["kind"] in kinds.BY_KIND][-1]


# --- whole manifests ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_manifest_becomes_a_job_file_that_loads_and_renders(path):
    made = manifests.read(path.read_text(), name=path.name)
    assert made.typed / (made.typed + made.raw) >= 0.8
    text, problems, variables = write.checked(made, name=path.name, backend="kubernetes")
    unknown = path.stem == "trainer-patches"  # what network its own runtime's pods have
    assert [problem.message for problem in problems] == ["4 nodes with GPUs, and no network is named"] * unknown
    assert variables <= set(VARIABLES)
    if not unknown:
        document = spec.load(text, name="job.yaml", environ=VARIABLES)
        documents = k8s_schema.documents(kubernetes.render(plan.make(document.spec)).text(kubernetes.ENTRY))
        assert documents[-1]["kind"] == kinds.of(document.spec).kind


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_what_cannot_be_said_is_refused_with_the_reason(name, words):
    with pytest.raises(UserError) as error:
        imported(name)
    assert words in str(error.value)
    assert all(problem.hint for problem in error.value.problems)


def test_on_average_nearly_all_fields_are_typed():
    made = [manifests.read(path.read_text(), name=path.name) for path in FILES]
    assert sum(one.typed for one in made) / sum(one.typed + one.raw for one in made) >= 0.95


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of any of the kinds: every template with pods that ask for GPUs."""
    found = []
    if isinstance(document, dict):
        if isinstance(document.get("spec"), dict) and "containers" in document["spec"]:
            found += [document] if pods.gpus(pods.trains(document["spec"]))[1] else []
        for value in document.values():
            found += templates(value)
    elif isinstance(document, list):
        for value in document:
            found += templates(value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.stem.startswith("trainer")], ids=lambda p: p.stem
)
def test_pods_ask_for_what_they_asked_for_before(path):
    """Amounts, places, claims and interfaces: the rendered pod has all that the imported one had."""
    before = next(iter(templates(k8s_schema.documents(path.read_text()))))
    now = templates(rendered(manifests.read(path.read_text(), name=path.name)))[-1]
    theirs, ours = pods.trains(before["spec"]), pods.trains(now["spec"])
    amounts = {name: pods.quantity(amount) for name, amount in pods.amounts(ours).items()}
    for name, amount in pods.amounts(theirs).items():
        if name not in ("cpu", "memory"):
            assert amounts[name] == pods.quantity(amount), name
        else:  # whole cores, and whole MiB
            assert amounts[name] == pytest.approx(float(pods.quantity(amount)), rel=0.07), name
    if path.stem == "volcano-gang-pytorchjob":  # its group's, which its pods have now
        before["spec"].setdefault("priorityClassName", "high")
    for key in ("nodeSelector", "priorityClassName", "runtimeClassName", "serviceAccountName", "hostNetwork",
                "imagePullSecrets", "hostAliases", "hostPID"):  # fmt: skip
        assert now["spec"].get(key) == before["spec"].get(key), key
    tolerated = [{key: row.get(key) for key in ("key", "effect")} for row in now["spec"].get("tolerations", [])]
    for row in before["spec"].get("tolerations", []):
        assert {key: row.get(key) for key in ("key", "effect")} in tolerated
    where = {row["mountPath"]: row["name"] for row in ours["volumeMounts"]}
    sources = {row["name"]: row for row in now["spec"]["volumes"]}
    olds = {row["name"]: row for row in before["spec"].get("volumes", [])}
    for mount in theirs.get("volumeMounts", []):
        source = sources[where[mount["mountPath"]]]
        for kind in ("persistentVolumeClaim", "nfs", "csi", "hostPath", "configMap", "secret"):
            old = olds.get(mount["name"], {}).get(kind, {})
            if mount["mountPath"] != "/dev/shm":
                given = {key: value for key, value in old.items() if key not in ("defaultMode", "readOnly")}
                assert given.items() <= source.get(kind, {}).items()
    assert now["spec"].get("resourceClaims", []) == [
        {**row, "name": f"network-{number}" if number else "network"}
        for number, row in enumerate(before["spec"].get("resourceClaims", []))
    ]


EXPECTED: dict[str, dict[str, Any]] = {
    "eks-fsdp-etcd": {
        "kubernetes/elastic": {"min": 2, "max": 16, "max_restarts": 100, "backend": "etcd", "endpoint": "etcd:2379",
                               "autoscale": {"cpu": 90}},
        "train/launcher": "node", "train/command/0": "torchrun", "resources/fabric": "efa", "preflight/run": False,
        "kubernetes/network/devices": 32, "container": {"env": "IMAGE_URI"}, "kubernetes/image_pull_policy": "Always",
        "secrets/HF_TOKEN": {"secret": "hugging-face", "key": "token"}, "resources/gpu": "h100-80gb",
    },
    "hyperpod-pytorchjob": {
        "kubernetes/queue": {"name": "hyperpod-ns-team-a-localqueue", "priority": "training-priority",
                             "topology": "topology.k8s.aws/network-node-layer-1"},
        "kubernetes/network": {"hugepages": "5120Mi", "devices": 32}, "setup": ["pip install -r requirements.txt"],
        "kubernetes/volumes/0/sub_path": "team-a", "kubernetes/sidecars/0/init": True, "recover/attempts": 3,
        "kubernetes/env_fields/POD_NAME": "metadata.name", "train/workdir": "/fsx/code", "resources/memory": "1800G",
        "kubernetes/node_affinity/2/weight": 100, "kubernetes/run_policy/ttl": 86400, "kubernetes/shm": "512Gi",
    },
    "hyperpod-operator": {"train/script": "/opt/train/sft.py", "train/args": ["--lr", "1e-5"]},
    "gke-a3mega-jobset": {
        "resources/fabric": "gcp-tcpxo", "resources/nodes": 16, "kubernetes/kind": "jobset",
        "kubernetes/shm": "250Gi",
        "kubernetes/volumes/0/csi/driver": "gcsfuse.csi.storage.gke.io", "env/OMP_NUM_THREADS": "12",
        "kubernetes/queue/topology_required": False, "kubernetes/labels": {"team": "llm"},
        "kubernetes/run_policy/max_restarts": 2,
    },
    "gke-a3ultra-gib": {
        "resources/fabric": "gcp-gib", "resources/gpu": "h200-141gb", "train/module": "torchtitan.train",
        "train/workdir": "/workspace/torchtitan",
        "kubernetes/security": {"privileged": True, "root": True, "host_pid": True},
        "secrets/WANDB_API_KEY": {"secret": "llama70b-a3u-secrets", "key": "WANDB_API_KEY"},
    },
    "aks-ndv5-ib": {
        "resources/fabric": "azure-nd", "kubernetes/network/devices": 8, "train/zero": 3, "train/micro_batch": 2,
        "kubernetes/volumes/0/read_only": True, "kubernetes/image_pull_secrets": ["acr"], "resources/nodes": 4,
        "kubernetes/tolerations/0": {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    },
    "oci-roce-hostnetwork": {
        "resources/fabric": "oci", "kubernetes/network/host_network": True, "kubernetes/ephemeral_storage": "32Gi",
        "kubernetes/gang": {"by": "volcano", "queue": "gpu"}, "train/script": "pretrain_gpt.py",
        "kubernetes/volumes":
            [{"name": "fss", "mount": "/mnt/fss", "nfs": {"server": "10.0.4.11", "path": "/export"}}],
    },
    "coreweave-ib": {
        "resources/fabric": "coreweave", "kubernetes/env_from": ["nccl-settings"], "resources/nodes": 2,
        "kubernetes/pod_affinity": [{"topology_key": "backend.coreweave.cloud/leafgroup", "weight": 50}],
        "kubernetes/secret_env_from": ["trackers"], "kubernetes/node_affinity/0/values": ["H100_NVLINK_80GB"],
    },
    "volcano-gang-pytorchjob": {
        "kubernetes/gang": {"queue": "training", "by": "volcano"}, "kubernetes/runtime_class": "nvidia",
        "kubernetes/run_policy/deadline": 86400, "kubernetes/spread/0/when_unsatisfiable": "ScheduleAnyway",
        "kubernetes/host_aliases": {"10.1.2.3": ["minio.local"]},
    },
    "volcano-ssh-deepspeed": {
        "train/launcher": "deepspeed", "train/script": "main.py", "resources/nodes": 2, "kubernetes/kind": "jobset",
        "kubernetes/network/resources": {"rdma/hca": "1"}, "train/workdir": "/workspace/DeepSpeedExamples",
    },
    "trainer-overrides": {
        "kubernetes/trainer": "2.1", "kubernetes/service_account": "trainer", "resources/cpus_per_node": 32,
        "kubernetes/volumes/0": {"name": "out", "mount": "/mnt/out", "claim": "out"}, "kubernetes/kind": "trainjob",
    },
    "trainer-patches": {
        "kubernetes/runtime": "torch-infiniband", "kubernetes/runtime_kind": "TrainingRuntime",
        "kubernetes/pod_annotations": {"cost-center": "42"}, "kubernetes/volumes/0/read_only": True,
    },
    "gb200-compute-domain": {
        "kubernetes/network/claim_template": "nvl-channel", "resources/fabric": "nvl72",
        "resources/gpu": "gb200-186gb",
        "kubernetes/pod_affinity": [{"topology_key": "nvidia.com/gpu.clique"}],
    },
    "multus-roce": {
        "kubernetes/network": {"resources": {"nvidia.com/roce": "2"}, "multus": ["net/roce-0", "net/roce-1"]},
        "kubernetes/sidecars/0/mounts": {"scratch": "/scratch"}, "kubernetes/security/run_as_user": 1001,
        "kubernetes/volumes/1/scratch": {"size": "2Ti", "storage_class": "local-nvme"},
        "train/launcher_args": ["--config_file", "/etc/accelerate/fsdp.yaml"],
        "kubernetes/env_fields/CPUS": "limits.cpu",
    },
    "mpijob-deepspeed": {
        "train/script": "/examples/cifar10_deepspeed.py", "env": {"NCCL_DEBUG": "INFO"},
        "resources/memory": "476837M",
    },
    "indexed-job": {
        "code": {"clone": "https://github.com/example/trainer.git", "ref": "v2"}, "kubernetes/kind": "jobset",
        "train/args": ["--lr", "3e-4", "--data", "/data/tokens"], "setup": ["pip install -e ."],
        "secrets/WANDB_API_KEY": {"secret": "tracker", "key": "api-key"}, "resources/gpus_per_node": 4,
    },
    "statefulset": {"kubernetes/volumes/0/scratch": {"size": "500Gi", "storage_class": "fast"}, "resources/nodes": 2},
    "gke-hostnetwork-ft": {
        "kubernetes/network": {"profile": "none", "host_network": True}, "resources/fabric": "gcp-tcpxo",
        "kubernetes/run_policy": {"max_restarts": 3}, "train/script": "examples/train.py",
        "setup": ["if [ -e /usr/local/nccl/env.sh ]; then source /usr/local/nccl/env.sh; fi"],
        "kubernetes/sidecars/0/privileged": True, "kubernetes/sidecars/0/image_pull_policy": "Always",
        "kubernetes/pod_env": {"WORKLOAD_model.data.dir": "/gcs/index"},
    },
    "kai-etcd-elastic": {
        "kubernetes/sidecars/0/name": "wait-etcd", "kubernetes/run_policy": {"restart_policy": "Never"},
        "kubernetes/env_fields/MEMORY": "limits.memory", "setup": ['export STORE="tcp://${NODE_IP}:7000"'],
        "kubernetes/env_keys/MODE": {"config_map": "settings", "key": "mode", "optional": True},
        "secrets/WANDB_API_KEY": {"secret": "wandb", "key": "key", "optional": True},
        "kubernetes/cpu_limit": "none", "kubernetes/memory_limit": "1900Gi", "resources/memory": "1800G",
        "kubernetes/volumes/1": {"name": "conf", "mount": "/workspace/conf", "config_map": "sft-conf",
                                 "items": {"a.yaml": "a.yaml"}, "default_mode": "0555"},
    },
    "appwrapper-roce": {
        "kubernetes/security": {"fs_group": 1000, "supplemental_groups": [3000]}, "env": {"NODES": "4"},
        "train/command/2": 'exec env RANK="${NODE_RANK}" WORLD_SIZE=32 ENDPOINT="${MASTER_ADDR}:29400" '
                           "sh /workspace/launch.sh",
        "kubernetes/dns": {"options": {"ndots": "1"}}, "kubernetes/queue/name": "default-queue",
    },
    "gke-dranet": {
        "kubernetes/network": {"claim_template": "titan-channel", "claims": ["all-rdma"]}, "resources/nodes": 4,
        "resources/gpu": "gb300-279gb", "kubernetes/run_policy": {"ttl": 43200, "max_restarts": 2},
    },
    "plain-pod": {"train/module": "axolotl.cli.train", "train/launcher": "accelerate", "resources/nodes": 1},
    "kubectl-get": {"name": "old-style-job", "train/script": "/opt/mnist.py", "resources/nodes": 3},
}  # fmt: skip


def test_every_manifest_is_looked_at():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize(
    ("name", "path", "value"), [(name, *row) for name, rows in EXPECTED.items() for row in rows.items()]
)
def test_what_matters_arrives_in_its_field(name, path, value):
    assert at(imported(name).job, path) == value


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("eks-fsdp-etcd", "left out", "Deployment etcd: it is no part of the job"),
        ("gke-hostnetwork-ft", "left out", "restartPolicy Never: recover.attempts"),
        ("kai-etcd-elastic", "carried", "restartPolicy Never -> kubernetes.run_policy.restart_policy"),
        ("gke-a3mega-jobset", "carried", "container tcpxo-daemon: network profile gcp-tcpxo"),
        ("gke-a3mega-jobset", "left out", "MASTER_ADDR: of each attempt"),
        ("gke-a3ultra-gib", "fill in", "kubectl create secret generic llama70b-a3u-secrets"),
        ("gke-a3ultra-gib", "left out", "Service llama70b: the operator makes"),
        ("multus-roce", "left out", "init container wait-for-master: it waits for the others"),
        ("mpijob-deepspeed", "carried", "this was an MPIJob"),
        ("mpijob-deepspeed", "carried", "mpirun -> train.launcher: torchrun"),
        ("mpijob-deepspeed", "left out", "-x LD_LIBRARY_PATH"),
        ("volcano-ssh-deepspeed", "left out", "master: pods without GPUs"),
        ("volcano-ssh-deepspeed", "left out", "plugins ssh, svc, env"),
        ("indexed-job", "left out", "Secret tracker: its values are not read"),
        ("indexed-job", "left out", "PersistentVolumeClaim data"),
        ("statefulset", "carried", "this was a StatefulSet"),
        ("kubectl-get", "left out", "restartPolicy ExitCode: recover.attempts"),
        ("hyperpod-operator", "fill in", "5 restarts: a job starts again from checkpoints on a volume"),
        ("appwrapper-roce", "fill in", "on a volume: checkpoint: {dir: /data/granite}"),
        ("appwrapper-roce", "left out", "suspend: Kueue suspends the job itself"),
        ("appwrapper-roce", "left out", "warmupGracePeriodDuration 300s"),
        ("kai-etcd-elastic", "left out", "annotation pod-group-name sft-671b of the pods: that PodGroup"),
        ("kai-etcd-elastic", "left out", "preemptionPolicy Never"),
        ("gke-hostnetwork-ft", "left out", "--ft-param-rank_heartbeat_timeout=600: recover.hang"),
        ("gke-hostnetwork-ft", "left out", "kubectl.kubernetes.io/default-container trainer"),
        ("gke-hostnetwork-ft", "left out", "setHostnameAsFQDN"),
        ("gke-hostnetwork-ft", "left out", "tty true"),
        ("gke-dranet", "left out", '"restartStrategy": "BlockingRecreate"'),
    ],
)
def test_nothing_is_dropped_without_a_word(name, kind, words):
    assert words in said(imported(name), kind)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_secret_s_value_goes_nowhere(path):
    made = manifests.read(path.read_text(), name=path.name)
    everything = write.text(made.job, comments=made.comments) + str(made.notes)
    assert "not-the-real-one" not in everything
    assert "not-for-the-job-file" not in everything


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pod", "box", "path", "value"),
    [
        ({}, {"resources": {"limits": {"amd.com/gpu": 8}}}, "kubernetes/gpu_resource", "amd.com/gpu"),
        ({}, {"resources": {"limits": {"nvidia.com/mig-3g.40gb": 2}}}, "resources/gpus_per_node", 2),
        ({}, {"resources": {"limits": {"nvidia.com/gpualloc": 1, "nvidia.com/gpumem": 8192}}}, "kubernetes",
         {"gpu_resource": "nvidia.com/gpualloc", "network": {"resources": {"nvidia.com/gpumem": "8192"}}}),
        ({}, {"resources": {"limits": {"nvidia.com/gpu": 8, "cpu": None}, "requests": {"cpu": 64}}},
         "kubernetes/cpu_limit", "none"),
        ({"activeDeadlineSeconds": 3600}, {}, "kubernetes/run_policy", {"deadline": 3600}),
        ({"hostPID": True}, {}, "kubernetes/security", {"host_pid": True}),
        ({"schedulingGates": [{"name": "a/b"}]}, {}, "kubernetes/scheduling_gates", ["a/b"]),
        ({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.2"], "options": [{"name": "rotate"}]}}, {},
         "kubernetes/dns", {"policy": "None", "nameservers": ["10.0.0.2"], "options": {"rotate": ""}}),
        ({"volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}]},
         {"volumeMounts": [{"name": "m", "mountPath": "/dev/shm"}]}, "kubernetes/shm", "none"),
        ({"volumes": [{"name": "v", "configMap": {"name": "c", "optional": True}}]},
         {"volumeMounts": [{"name": "v", "mountPath": "/v", "mountPropagation": "HostToContainer"}]},
         "kubernetes/volumes/0",
         {"name": "v", "mount": "/v", "config_map": "c", "optional": True, "propagation": "HostToContainer"}),
        ({}, {"envFrom": [{"secretRef": {"name": "a"}},
                          {"prefix": "DB_", "secretRef": {"name": "b", "optional": True}}]},
         "kubernetes/secret_env_from", ["a", {"name": "b", "prefix": "DB_", "optional": True}]),
        ({}, {"env": [{"name": "GIB", "valueFrom": {"resourceFieldRef": {
            "containerName": "pytorch", "resource": "limits.memory", "divisor": "1Gi"}}}]},
         "kubernetes/env_fields/GIB", "limits.memory/1Gi"),
        ({"initContainers": [{"name": "get", "image": "b", "command": ["curl"],
                              "envFrom": [{"secretRef": {"name": "s"}}],
                              "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": 2}}}]},
         {},
         "kubernetes/sidecars/0",
         {"name": "get", "image": "b", "command": ["curl"], "resources": {"cpu": "2"},
          "requests": {"cpu": "100m", "memory": "1Gi"}, "secret_env_from": ["s"], "init": True}),
        ({"schedulerName": "scheduler-plugins-scheduler"}, {}, "kubernetes/gang", {"by": "coscheduling"}),
        ({"schedulerName": "runai-scheduler"}, {}, "kubernetes/gang", {"scheduler": "runai-scheduler"}),
        ({"schedulerName": "corp/own"}, {}, "kubernetes/pod_patch/spec", {"schedulerName": "corp/own"}),
        ({"terminationGracePeriodSeconds": 600}, {}, "kubernetes/grace", 600),
        ({"hostIPC": True}, {}, "kubernetes/security/host_ipc", True),
        ({"securityContext": {"fsGroup": 2000, "runAsUser": 1000}}, {}, "kubernetes/security",
         {"run_as_user": 1000, "fs_group": 2000}),
        ({}, {"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}}, "kubernetes/security",
         {"capabilities": ["SYS_PTRACE"], "root": True}),
        ({}, {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "kubernetes/security/seccomp",
         "Unconfined"),
        ({"tolerations": [{"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}]}, {},
         "kubernetes/tolerations", [{"operator": "Exists", "effect": "NoExecute", "seconds": 60}]),
        ({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["gpu-7"]}]}]}}}}, {},
         "kubernetes/exclude", ["gpu-7"]),
        ({}, {"env": [{"name": "A", "value": "x"}, {"name": "B", "value": "$(A)/y"}]}, "env/B", "x/y"),
        ({}, {"env": [{"name": "A", "value": "1"}], "command": ["torchrun", "t.py", "--a=$(A)", "$$(B)"]},
         "train/args", ["--a=1", "$(B)"]),
        ({}, {"command": ["sh", "-c", "exec torchrun t.py --x '{\"a\": 1}'"]}, "train/args", ["--x", '{"a": 1}']),
        ({}, {"command": ["python", "t.py", "--rank", "$(RANK)"]}, "train/command",
         ["bash", "-c", 'exec python t.py --rank "${NODE_RANK}"']),
        ({}, {"command": ["/bin/bash", "-lc", "apt-get update; torchrun t.py"]}, "kubernetes/security/root", True),
        ({}, {"command": ["bash", "-c", "mkdir -p /c && cp /x/a.json /c; nvidia-smi; torchrun t.py"]}, "setup",
         ["mkdir -p /c", "cp /x/a.json /c"]),
        ({}, {"command": ["bash", "-c", "mpirun -np 32 bash -c 'python t.py --lr 1'"]}, "train",
         {"script": "t.py", "args": ["--lr", "1"], "config_flag": "none"}),
        ({}, {"command": ["sh", "-c", "for lr in 1 2; do torchrun t.py --lr $lr; done"]}, "sweep/over/env.lr",
         ["1", "2"]),
        ({}, {"command": ["horovod.sh"], "args": []}, "train/command",
         ["env", {"node": "rank", "prepend": "RANK="}, "WORLD_SIZE=4", "horovod.sh"]),
        ({}, {"command": ["bash", "-c", "python t.py --rank $(hostname | awk -F- '{print $NF}') -x "
                          "$(hostname | tr a b)"]}, "train/command/2",
         'exec python t.py --rank "${NODE_RANK}" -x "$(hostname | tr a b)"'),
        ({}, {"env": [{"name": "P", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                      {"name": "A", "value": "$(P):1/$(B)"}, {"name": "B", "value": "2"}]}, "setup",
         ['export A="${P}:1/\\$(B)"']),
        ({"securityContext": {"runAsNonRoot": True}}, {}, "kubernetes/security/run_as_user", "image"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/mnt/disk"}}]},
         {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, "kubernetes/security", {"root": True}),
        ({}, {"command": ["torchrun", "t.py", "--out", "/root/out"]}, "kubernetes/security", {"root": True}),
        ({"initContainers": [{"name": "wait-db", "image": "b", "args": ["until nc -z db 1; do sleep 1; done"]}]}, {},
         "kubernetes/sidecars/0/init", True),
        ({"initContainers": [{"name": "net", "image": "b", "command": ["tune"], "imagePullPolicy": "Always",
                              "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                                      {"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                              "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}]}, {},
         "kubernetes/sidecars/0",
         {"name": "net", "image": "b", "command": ["tune"], "env_fields": {"IP": "status.podIP"},
          "secrets": {"T": {"secret": "s", "key": "k"}}, "capabilities": ["NET_ADMIN"], "run_as_user": 0,
          "image_pull_policy": "Always", "init": True}),
        ({"volumes": [{"name": "v", "projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {
            "name": "s", "optional": True, "items": [{"key": "k", "path": "p"}]}}]}}]},
         {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, "kubernetes/volumes/0/projected",
         [{"config_map": "c"}, {"secret": "s", "items": {"k": "p"}, "optional": True}]),
    ],
)  # fmt: skip
def test_a_field_of_a_pod_becomes_a_field(pod, box, path, value):
    assert at(read(pod, box).job, path) == value


def test_a_volume_in_two_places_and_a_mount_with_more_said_are_kept():
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    mounts = [{"name": "data", "mountPath": "/a", "subPath": "a"}, {"name": "data", "mountPath": "/b"},
              {"name": "data", "mountPath": "/c", "mountPropagation": "HostToContainer"}]  # fmt: skip
    pod = templates(rendered(read({"volumes": [volume]}, {"volumeMounts": mounts})))[-1]["spec"]
    found = {row["mountPath"]: row for row in pod["containers"][0]["volumeMounts"]}
    claims = {row["name"]: row.get("persistentVolumeClaim") for row in pod["volumes"]}
    assert [claims[found[path]["name"]] for path in ("/a", "/b", "/c")] == [{"claimName": "data"}] * 3
    assert found["/a"]["subPath"] == "a"
    assert found["/c"]["mountPropagation"] == "HostToContainer"


def test_what_no_field_says_is_rendered_by_the_patch():
    projected = {"name": "tokens", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}
    made = read({"volumes": [projected], "shareProcessNamespace": True},
                {"volumeMounts": [{"name": "tokens", "mountPath": "/tokens"}]})  # fmt: skip
    pod = templates(rendered(made))[-1]["spec"]
    assert pod["shareProcessNamespace"] is True
    assert projected in pod["volumes"]
    assert {"name": "tokens", "mountPath": "/tokens"} in pod["containers"][0]["volumeMounts"]
    assert "shareProcessNamespace" in said(made, "kept")


def test_several_terms_of_affinity_of_which_one_is_enough_stay_as_they_are():
    terms = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in ("a", "b")]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    assert templates(rendered(read({"affinity": affinity})))[-1]["spec"]["affinity"] == affinity


def test_a_block_device_keeps_its_volume():
    pod = {"volumes": [{"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}}]}
    spec = templates(rendered(read(pod, {"volumeDevices": [{"name": "raw", "devicePath": "/dev/xvda"}]})))[-1]["spec"]
    assert pod["volumes"][0] in spec["volumes"]
    assert spec["containers"][0]["volumeDevices"] == [{"name": "raw", "devicePath": "/dev/xvda"}]


@pytest.mark.parametrize(
    ("box", "asks"),
    [
        ({}, True),  # eight GPUs
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}, "securityContext": {"privileged": True}}, True),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, False),
    ],
)
def test_a_network_that_nothing_names_is_the_user_s_to_say_where_it_matters(box, asks):
    made = read({}, box)
    assert made.job["resources"]["fabric"] == "ethernet"
    assert ("resources.fabric: a guess" in said(made, "fill in")) is asks


def test_what_a_script_that_starts_ranks_reads_is_handed_on():
    """Names of pods that are called otherwise now are the user's to say, but the first one's."""
    values = {"GPUS_PER_NODE": "8", "NNODES": "4", "MASTER_ENDPOINT": "a-worker-0.pods:29400", "RUN": "a-2025",
              "PEERS": "a-worker-1:1"}  # fmt: skip
    box = {"command": ["sh", "run.sh"], "env": [{"name": name, "value": value} for name, value in values.items()]}
    made = read({}, box)
    assert made.job["env"] == {"GPUS_PER_NODE": "8", "RUN": "a-2025", "PEERS": "a-worker-1:1"}
    assert 'MASTER_ENDPOINT="${MASTER_ADDR}:29400"' in made.job["train"]["command"][2]
    assert "env.PEERS: it names pod a-worker-1" in said(made, "fill in")


def test_the_gvnic_in_front_of_a_node_s_own_networks_stays():
    names = ["nic-1", *(f"ib-{number}" for number in range(8))]
    pairs = [{"interfaceName": f"eth{number}", "network": name} for number, name in enumerate(["default", *names])]
    box = {"name": "t", "image": "i", "command": ["torchrun", "t.py"], "resources": {"limits": {"nvidia.com/gpu": 8}},
           "volumeMounts": [{"name": "gib", "mountPath": "/usr/local/gib"}]}  # fmt: skip
    volumes = [{"name": "gib", "hostPath": {"path": "/home/kubernetes/bin/gib"}}]
    template = {"metadata": {"annotations": {"networking.gke.io/interfaces": json.dumps(pairs)}},
                "spec": {"containers": [box], "volumes": volumes}}  # fmt: skip
    one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
    made = manifests.read(json.dumps({**one, "spec": {"completions": 2, "template": template}}), name="x.json")
    assert made.job["kubernetes"]["network"]["multus"] == names
    found = templates(rendered(made))[-1]["metadata"]["annotations"]["networking.gke.io/interfaces"]
    assert json.loads(found) == pairs


def test_hyperpod_s_watch_of_the_log_is_one_of_steps():
    rows = [{"name": "start", "logPattern": "loss", "expectedStartCutOffInSeconds": 240},
            {"name": "hang", "logPattern": "loss", "expectedRecurringFrequencyInSeconds": 600},
            {"name": "slow", "logPattern": "tflops", "metricThreshold": 80}]  # fmt: skip
    template = {"spec": {"containers": [{"name": "a", "image": "i", "command": ["hyperpodrun", "--tee=3", "t.py"]}]}}
    content = {"runPolicy": {"logMonitoringConfiguration": rows, "restartPolicy": {"maxFullJobRestarts": 7}},
               "replicaSpecs": [{"name": "pods", "replicas": 2, "template": template}]}  # fmt: skip
    job = {"apiVersion": "sagemaker.amazonaws.com/v1", "kind": "HyperPodPyTorchJob", "metadata": {"name": "a"}}
    made = manifests.read(json.dumps({**job, "spec": content}), name="x.json")
    assert made.job["recover"] == {"first_step": 240, "hang": 600}
    for words in ('{"metricThreshold": 80}', '{"maxFullJobRestarts": 7}', "--tee=3"):
        assert words in said(made, "left out")


@pytest.mark.parametrize("text", ["2", "1e5", ".5", "0x10", "017", "true", "null", "~", "12:30:45", "2025-01-01",
                                  "1_0", "+1", "-2.", "NaN", ".inf", "y", "", "- a", "a: b", "#", "{a}"])  # fmt: skip
@pytest.mark.parametrize("place", [("patch", "spec"), ("pod_patch", "spec")])
def test_text_in_a_patch_stays_text(place, text):
    job = {"name": "a", "train": {"script": "t.py"}, "kubernetes": {place[0]: {place[1]: {"a": text, "b": [text]}}}}
    document = spec.load(write.text(job), name="job.yaml")
    assert getattr(document.spec.kubernetes, place[0]) == {"spec": {"a": text, "b": [text]}}


# What only ties an object together, or that whatever dslaunch renders has; and words of a shell's own.
TIES = set(
    """name apiVersion kind replicas parallelism completions completionMode medium uid resourceVersion
    creationTimestamp dnsPolicy divisor apiGroup accessModes last-applied-configuration""".split()
)
SHELL = set("bash /bin/bash /bin/sh echo done then exec export while sleep true python python3 torchrun".split())


def leaves(value: Any, notes: str, path: tuple[str, ...] = ()) -> Any:
    """Of an object, with variables by their names, and without containers of which a note speaks as a whole."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, notes, (*path, str(key)))
    elif isinstance(value, list):
        for child in value:
            name = child.get("name") if isinstance(child, dict) else None
            if not name or f"container {name}: " not in notes:
                yield from leaves(child, notes, (*path, name) if name and path[-1:] == ("env",) else path)
    else:
        yield path, value


def bare(text: str) -> str:
    """Without what a shell or YAML puts around words."""
    return re.sub(r"[${}()\s\"'\\]+", "", text.lower())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_is_in_the_job_file_or_named_in_a_note(path):
    made = manifests.read(path.read_text(), name=path.name)
    notes = "\n".join(note.message for note in made.notes)
    told = bare(write.text(made.job) + notes)
    every = objects.documents(path.read_text(), name=path.name)
    for where, value in leaves([one for one in every if one["kind"] in groups.READERS and templates(one)], notes):
        key = where[-1]
        if TIES & {key, key.rpartition("/")[2]} or value in (None, False, "", 0, "/dev/shm"):
            continue
        if key in ("command", "args"):
            for token in re.findall(r"[\w./:-]{4,}", str(value)):
                assert token in SHELL or bare(token.rstrip("/:")) in told, (where, token)
            continue
        keys = [one for one in where if one not in ("spec", "template", "metadata", "containers", "env", "value")]
        named = any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", notes) for one in keys)
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
        texts = [snake] if value is True else [str(value), pods.memory(value)]
        texts += [f"0{value:o}"] if key == "defaultMode" else []
        assert named or any(bare(text) in told for text in texts if text), (where, value)


def test_what_no_field_and_no_note_says_is_named():
    made = read({"hostnameOverride": "x"}, {}, annotations={"a/b": "c"}, ownerReferences=[{"uid": "1"}])
    assert made.job["kubernetes"]["pod_patch"] == {"spec": {"hostnameOverride": "x"}}
    job = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "a"}}
    box = {"name": "pytorch", "image": "i", "args": ["a.py"]}
    replica = {"replicas": 2, "template": {"spec": {"containers": [box]}}}
    content = {"runPolicy": {"schedulingPolicy": {"minResources": {"cpu": "37"}}, "later": {"added": "field-7"}},
               "pytorchReplicaSpecs": {"Worker": replica}}  # fmt: skip
    made = manifests.read(json.dumps({**job, "spec": content}), name="x.json")
    assert "spec.runPolicy.later.added field-7: no field of a job file says it" in said(made, "left out")
    assert 'minResources {"cpu": "37"}: what min_available pods ask for' in said(made, "left out")


def test_a_leader_that_starts_waiting_workers_says_what_they_run():
    def job(name: str, pods: int, command: str) -> dict[str, Any]:
        box = {"name": "t", "image": "i", "command": ["sh", "-c", command]}
        box["resources"] = {"limits": {"nvidia.com/gpu": 8}}
        work = {"parallelism": pods, "completions": pods, "template": {"spec": {"containers": [box]}}}
        return {"name": name, "replicas": 1, "template": {"spec": work}}

    jobs = [job("leader", 1, "deepspeed --hostfile h train.py"), job("worker", 3, "/usr/sbin/sshd -D")]
    one = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "a"}}
    made = manifests.read(json.dumps({**one, "spec": {"replicatedJobs": jobs}}), name="x.json")
    assert made.job["train"] == {"launcher": "deepspeed", "config_flag": "none", "script": "train.py"}
    assert made.job["resources"]["nodes"] == 4


HOLES = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: fsdp, namespace: "${NS}"}
spec:
  pytorchReplicaSpecs:
    Worker:
      replicas: $NUM_NODES
      template:
        spec:
          volumes: [{name: d, persistentVolumeClaim: {claimName: $PVC}}]
          containers:
          - name: pytorch
            image: ${REGISTRY}/fsdp:1
            resources: {limits: {nvidia.com/gpu: $GPUS, vpc.amazonaws.com/efa: $EFA}}
            volumeMounts: [{name: d, mountPath: /d}]
            command: [torchrun, --nproc_per_node=$GPUS, --nnodes=$NUM_NODES, train.py, --data, $DATA]
"""


def test_what_envsubst_would_fill_in_comes_from_the_environment():
    environ = {"NS": "ml", "NUM_NODES": "4", "PVC": "fsx", "REGISTRY": "r.example.com", "GPUS": "8", "EFA": "32"}
    made = manifests.read(HOLES, name="x.yaml", environ=environ)
    job = made.job
    assert (job["resources"]["nodes"], job["resources"]["gpus_per_node"], job["container"]) == (
        4,
        8,
        "r.example.com/fsdp:1",
    )
    assert job["kubernetes"]["volumes"] == [{"name": "d", "mount": "/d", "claim": "fsx"}]
    assert job["train"]["args"] == ["--data", {"env": "DATA"}]
    assert made.to_fill == ()


def test_what_the_environment_does_not_say_is_the_user_s_to_say():
    made = manifests.read(HOLES, name="x.yaml")
    assert made.job["kubernetes"]["namespace"] == {"env": "NS"}
    assert made.job["container"] == {"env": "REGISTRY", "append": "/fsdp:1"}
    assert "resources.nodes: the number of pods is $NUM_NODES there" in said(made, "fill in")
    assert "resources.gpus_per_node" in said(made, "fill in")


# --- refused --------------------------------------------------------------------------------------

JOB = "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: {name: %s}\n"
POD = "apiVersion: v1\nkind: Pod\nspec: {containers: [{name: a, image: i, command: %s}]}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: {{ .Values.name }}\n", "helm template"),
        ("{{- if .Values.on }}\napiVersion: v1\nkind: Pod\n{{- end }}\n", "helm template"),
        (
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [a.yaml]\n",
            "kubectl kustomize",
        ),
        ("resources: [a.yaml]\npatches: []\n", "kubectl kustomize"),
        ("apiVersion: v1\nkind: Pod\n  bad: [", "no YAML"),
        ("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {}\n", "started again for ever"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: d}\n", "no job that trains"),
        (JOB % "a" + "---\n" + JOB % "b", "2 jobs in one file (PyTorchJob a, PyTorchJob b)"),
        (JOB % "a", "no replicas"),
        (
            POD % "[sh, -c, 'ray start --head']",
            "places the work of its own workers",
        ),
        (
            POD % "[horovodrun, python, t.py]",
            "torchrun or deepspeed",
        ),
        (POD % "[python, deepy.py, train.py, conf.yml]", "over ssh or by srun an MPIJob stays an MPIJob"),
        ("name: x\ntrain: {script: t.py}\n", "a job file already dslaunch submit"),
        (
            "name: x\nmodel: llama-3.1-8b\nresources: {nodes: 2}\ntrain: {script: t.py}\n",
            "a job file already dslaunch submit x.yaml",
        ),
        ("a: 1\n", "nothing in it is a Kubernetes object"),
        ("num_nodes: 2\nresources: {accelerators: 'H100:8'}\nrun: torchrun t.py\n", "a task of SkyPilot's"),
        ("image: i\ncompute: {gpus: 8}\ncommand: composer t.py\n", "a run of MosaicML's mcli"),
        ("apiVersion: run.ai/v2alpha1\nkind: TrainingWorkload\nspec: {}\n", "kubectl get pytorchjobs"),
        (
            "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {generateName: ft-}\n",
            "Workflow ft-: it starts steps",
        ),
        (
            "apiVersion: leaderworkerset.x-k8s.io/v1\nkind: LeaderWorkerSet\nmetadata: {name: s}\nspec:\n"
            "  leaderWorkerTemplate: {size: 2, workerTemplate: {spec: {containers: [{name: a, args: [vllm]}]}}}",
            "its pods serve",
        ),
        (POD % "torchrun train.py", "command is 'torchrun train.py', and has to be a list"),
    ],
)
def test_what_is_no_job_is_refused_with_a_way_out(text, words):
    with pytest.raises(UserError) as error:
        manifests.read(text, name="x.yaml")
    assert words in " ".join(f"{problem.message} {problem.hint}" for problem in error.value.problems)


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        (
            "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: x\nspec: {}\n",
            "3:11",
            "metadata is 'x'",
            "{name: x}",
        ),
        ("apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nspec: []\n", "3:7", "spec is a list", "a mapping"),
        (
            "apiVersion: trainer.kubeflow.org/v1alpha1\nkind: TrainJob\nspec:\n  runtimeRef: torch\n",
            "4:15",
            "runtimeRef is 'torch', and has to be a mapping",
            "runtimeRef: {name: torch}",
        ),
        ("apiVersion: v1\nkind: Pod\nspec: {containers: {a: b}}\n", "3:20", "containers is a mapping", "a list"),
        (
            "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - {name: a, resources: {limits: 8}}\n",
            "5:35",
            "resources.limits is '8', and has to be a mapping",
            "a mapping in limits",
        ),
        (POD % "torchrun train.py", "3:50", "command is 'torchrun train.py'", 'command: ["torchrun", "train.py"]'),
        (
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, spec: {containers: [null]}}\n",
            "4:51",
            "containers[0] is empty",
            "",
        ),
        (
            "apiVersion: v1\nkind: Pod\nspec: {containers: [{name: a, volumeMounts: [{name: b}]}]}\n",
            "3:46",
            "volumeMounts[0] has no mountPath",
            "mountPath: ...",
        ),
    ],
)
def test_a_value_of_the_wrong_shape_is_refused_where_it_stands(text, place, message, hint):
    with pytest.raises(UserError) as error:
        manifests.read(text, name="x.yaml")
    (problem,) = error.value.problems
    assert problem.where == f"x.yaml:{place}"
    assert message in problem.message
    assert hint in problem.hint


DOCUMENTS = {path: k8s_schema.documents(path.read_text()) for path in sorted(DATA.iterdir())}
ODD = st.sampled_from(
    ["x", 8, -1, 0, "", None, True, 2.5, "a $C ${D}", "8Gi", "two", 10**30, [], {}, ["a"], [1], [None], [[]],
     {"a": "b"}, {1: 2}, {"name": "x"}, {"name": ["a"]}, [{"a": "b"}], [{"name": ["a"]}],
     {"a": {"b": [1]}}, date(2026, 1, 1)]
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in below] + [one for key, child in below for one in places(child, (*path, key))]


PLACES = [(path, place) for path, found in DOCUMENTS.items() for place in places(found)]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PLACES), ODD)
def test_any_value_replaced_by_anything_is_imported_or_refused(where, value):
    path, place = where
    changed = copy.deepcopy(DOCUMENTS[path])
    at(changed, place[:-1])[place[-1]] = value
    with suppress(UserError):
        assert manifests.read(yaml.safe_dump_all(changed), name="x.yaml").job["name"]


def test_masters_and_workers_with_other_numbers_of_gpus_are_the_user_s_to_say():
    def role(replicas: int, gpus: int) -> Any:
        box = {"name": "pytorch", "image": "registry.example.com/train:1", "command": ["torchrun", "train.py"],
               "resources": {"limits": {"nvidia.com/gpu": gpus}}}  # fmt: skip
        return {"replicas": replicas, "template": {"spec": {"containers": [box]}}}

    job = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "a"},
           "spec": {"pytorchReplicaSpecs": {"Master": role(1, 8), "Worker": role(3, 4)}}}  # fmt: skip
    made = manifests.read(json.dumps(job), name="job.json")
    assert [one for one in made.to_fill if "Master 8 and Worker 4 GPUs" in one]
    assert "Master 8 and Worker 4" in made.comments["resources", "gpus_per_node"]
    job["spec"]["pytorchReplicaSpecs"]["Master"] = role(1, 4)
    assert not any("Master" in one for one in manifests.read(json.dumps(job), name="job.json").to_fill)


def test_anchors_that_unfold_without_end_are_refused():
    rows = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))
    with pytest.raises(UserError, match="anchors unfolded"):
        manifests.read(f"apiVersion: v1\nkind: Pod\na0: &a0 [x, x]\n{rows}\n", name="x.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DATA.iterdir()), ids=lambda path: path.stem)
def test_a_manifest_that_is_cut_off_is_imported_or_refused(path):
    lines = path.read_text().splitlines(keepends=True)
    for count in range(1, len(lines), 7):
        try:
            made = manifests.read("".join(lines[:count]), name=path.name)
        except UserError:
            continue
        assert made.job["name"]


# --- objects of other kinds -----------------------------------------------------------------------


def job_of(text: str) -> Imported:
    return manifests.read(text, name="x.yaml")


BOX = "{name: node, image: i, command: [torchrun, --nnodes=4, train.py], resources: {limits: {nvidia.com/gpu: 8}}}"


def test_a_leader_and_workers_that_train_are_one_jobset():
    command = "torchrun --nnodes=$LWS_GROUP_SIZE --node_rank=$LWS_WORKER_INDEX --master_addr=$LWS_LEADER_ADDRESS t.py"
    made = job_of(f"""
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata: {{name: lws, annotations: {{leaderworkerset.sigs.k8s.io/exclusive-topology: rack}}}}
spec:
  replicas: 2
  startupPolicy: LeaderReady
  leaderWorkerTemplate:
    size: 4
    restartPolicy: RecreateGroupOnPodRestart
    workerTemplate:
      spec:
        containers:
        - {{name: w, image: i, command: [bash, -c, "{command}"], resources: {{limits: {{nvidia.com/gpu: 4}}}}}}
""")
    assert made.job["train"]["script"] == "t.py"
    assert (made.job["resources"]["nodes"], made.job["resources"]["gpus_per_node"]) == (4, 4)
    annotations = rendered(made)["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "rack"
    for words in ("replicas 2: so many jobs alike", "startupPolicy LeaderReady", "restartPolicy RecreateGroup"):
        assert words in said(made, "left out")


def test_a_trainjob_takes_what_its_runtime_beside_it_says():
    made = job_of("""
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
metadata: {name: ours}
spec:
  mlPolicy: {numNodes: 3, torch: {numProcPerNode: 2}}
  template:
    spec:
      replicatedJobs:
      - name: dataset-initializer
        template: {spec: {template: {spec: {containers: [{name: dataset-initializer, image: d}]}}}}
      - name: node
        template: {spec: {template: {spec: {containers: [
          {name: node, image: "reg/own:1", command: [torchrun, train.py],
           resources: {limits: {nvidia.com/gpu: 2}}}]}}}}
---
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: a}
spec:
  runtimeRef: {kind: TrainingRuntime, name: ours}
  podGroupPolicy: {coscheduling: {scheduleTimeoutSeconds: 900}}
  initializer:
    dataset: {storageUri: "hf://trl-lib/tldr", secretRef: {name: hf}, env: [{name: B, value: c}]}
    model: {storageUri: "hf://org/model"}
  trainer: {env: [{name: A, value: b}], resourcesPerNode: {requests: {cpu: 4}, limits: {cpu: 8, nvidia.com/gpu: 2}}}
""")
    assert (made.job["container"], made.job["train"]["script"]) == ("reg/own:1", "train.py")
    assert (made.job["resources"]["nodes"], made.job["resources"]["gpus_per_node"]) == (3, 2)
    assert "podGroupPolicy" in said(made, "left out")
    assert made.job["kubernetes"]["dataset"] == {"uri": "hf://trl-lib/tldr", "secret": "hf", "env": {"B": "c"}}
    assert made.job["kubernetes"]["weights"] == {"uri": "hf://org/model"}
    assert "patch" not in made.job["kubernetes"]
    made.job["resources"]["fabric"] = "ethernet"
    trainer = rendered(made)["spec"]["trainer"]
    assert trainer["image"] == "reg/own:1"
    amounts = trainer["resourcesPerNode"]
    assert (amounts["requests"]["cpu"], amounts["limits"]["cpu"]) == ("4", "8")
    assert rendered(made)["spec"]["runtimeRef"]["name"] == "ours"


def test_a_pod_group_beside_the_job_becomes_its_gang():
    made = job_of(f"""
apiVersion: scheduling.volcano.sh/v1beta1
kind: PodGroup
metadata: {{name: group}}
spec: {{minMember: 4, queue: research, priorityClassName: high, minResources: {{nvidia.com/gpu: "32"}},
        networkTopology: {{mode: soft, highestTierAllowed: 2}}}}
---
apiVersion: batch/v1
kind: Job
metadata: {{name: a}}
spec:
  completions: 4
  parallelism: 4
  completionMode: Indexed
  backoffLimitPerIndex: 1
  maxFailedIndexes: 0
  template:
    metadata: {{annotations: {{scheduling.volcano.sh/group-name: group}}}}
    spec: {{schedulerName: volcano, restartPolicy: Never, containers: [{BOX}]}}
""")
    options = made.job["kubernetes"]
    assert options["gang"] == {"by": "volcano", "queue": "research", "tier": 2, "tier_required": False}
    assert options["priority_class"] == "high"
    assert "pod_annotations" not in options
    for words in ("backoffLimitPerIndex 1", "maxFailedIndexes 0", "minResources"):
        assert words in said(made, "left out")


def test_slices_and_places_of_a_jobset_keep_their_meaning():
    made = job_of(f"""
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {{name: a, labels: {{kueue.x-k8s.io/queue-name: q}}}}
spec:
  replicatedJobs:
  - name: w
    template:
      metadata: {{annotations: {{alpha.jobset.sigs.k8s.io/exclusive-topology: pool}}}}
      spec:
        completions: 4
        parallelism: 4
        podReplacementPolicy: Failed
        template:
          metadata:
            annotations:
              kueue.x-k8s.io/podset-slice-required-topology: rack
              kueue.x-k8s.io/podset-slice-size: "2"
          spec: {{restartPolicy: Never, containers: [{BOX}]}}
""")
    assert made.job["kubernetes"]["queue"] == {"name": "q", "slice_topology": "rack", "slice_size": 2}
    made_of = rendered(made)
    assert made_of["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "pool"
    assert "pod_annotations" not in made.job["kubernetes"]
    assert 'podReplacementPolicy "Failed"' in said(made, "left out")


VOLCANO = """
apiVersion: batch.volcano.sh/v1alpha1
kind: Job
metadata: {name: a}
spec:
  minAvailable: 2
  schedulerName: volcano
  networkTopology: {mode: hard, highestTierAllowed: 1}
  volumes:
  - mountPath: /work
    volumeClaim: {accessModes: [%s], storageClassName: fast, resources: {requests: {storage: 5Gi}}}
  tasks:
  - name: worker
    replicas: 2
    template:
      spec:
        containers:
        - name: w
          image: i
          resources: {limits: {nvidia.com/gpu: 8}}
          command:
          - bash
          - -c
          - |
            COUNT=$(echo "${VC_WORKER_HOSTS}" | awk -F',' '{print NF}')
            FIRST=$(echo "$VC_WORKER_HOSTS" | cut -d, -f1)
            cd /work
            cat > conf.yaml <<EOF
            lr: 1e-4  # "small"
            out: $OUT
            EOF
            torchrun --nnodes $COUNT --node_rank $VC_TASK_INDEX --master_addr $FIRST train.py --conf conf.yaml
          env: [{name: OUT, value: /work/out}]
"""


def test_a_volcano_job_s_claim_hosts_and_files_arrive():
    made = job_of(VOLCANO % "ReadWriteOnce")
    options = made.job["kubernetes"]
    assert options["gang"] == {"by": "volcano", "tier": 1}
    assert options["volumes"] == [
        {"name": "job-volume-0", "mount": "/work", "scratch": {"size": "5Gi", "storage_class": "fast"}}
    ]
    assert made.job["train"]["args"] == ["--conf", "conf.yaml"]
    assert "of Volcano's list of hosts -> 2" in said(made, "carried")
    assert not said(made, "fill in").count("VC_")
    (line,) = made.job["setup"]
    found = subprocess.run(
        ["bash", "-c", line.replace("> conf.yaml", "")], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == 'lr: 1e-4  # "small"\nout: /work/out\n'
    shared = job_of(VOLCANO % "ReadWriteMany").job["kubernetes"]["volumes"]
    assert shared == [{"name": "job-volume-0", "mount": "/work", "claim": "a-volume-0"}]


def test_a_clone_that_the_script_leaves_again_is_not_its_code():
    script = """
git clone -b v1 https://git.example.com/lib.git
cd lib
pip install .
cd ..
git clone https://git.example.com/app
cd app
pip install -e .
cd examples
torchrun train.py
"""
    made = read({}, {"command": ["bash", "-c", script]})
    assert made.job["code"] == {"clone": "https://git.example.com/app"}
    assert made.job["train"]["workdir"] == "examples"
    assert made.job["setup"] == [
        "git clone --recurse-submodules -b v1 https://git.example.com/lib.git lib",
        "(cd lib && pip install .)",
        "(cd .. && pip install -e .)",
    ]


def test_the_socket_of_a_daemon_is_where_its_profile_has_it():
    made = job_of("""
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers:
  - name: tcpx-daemon
    image: us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/tcpgpudmarxd-dev:v2.0.11
    volumeMounts: [{name: tcpx-socket, mountPath: /run/tcpx}]
  - name: node
    image: i
    command: [torchrun, train.py]
    resources: {limits: {nvidia.com/gpu: 8}}
    volumeMounts: [{name: tcpx-socket, mountPath: /tmp}, {name: unused, mountPath: /unused}]
  volumes:
  - {name: tcpx-socket, hostPath: {path: /run/tcpx}}
  - {name: unused, emptyDir: {}}
""")
    assert "hostPath /run/tcpx at /tmp: network profile gcp-tcpx" in said(made, "carried")
    assert [one["name"] for one in made.job["kubernetes"]["volumes"]] == ["unused"]
    assert rendered(made)["kind"] == "JobSet"


# --- of our own making ----------------------------------------------------------------------------


def site(path: Path) -> str | None:
    """Beside a job file that goes to several clusters."""
    beside = path.with_name("site.yaml")
    return str(beside) if beside.is_file() else None


def own(path: Path) -> list[str]:
    """What is rendered of a job file, or of each point of its sweep."""
    points = [(one.document, one.plan) for one in cli.swept(str(path), site(path), (), suffixed=True)]
    jobs = points or [cli.load(str(path), site(path), ())]
    return [cli.render(kubernetes, document, made).text(kubernetes.ENTRY) for document, made in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.parent.name)
def test_rendered_imported_and_rendered_again_is_the_same(path):
    for text in own(path):
        made = manifests.read(text, name="manifests.yaml")
        document, planned = cli.load(str(path.parent / "again.yaml"), None, (), text=write.text(made.job))
        assert cli.render(kubernetes, document, planned).text(kubernetes.ENTRY) == text


def test_the_points_of_a_sweep_are_imported_one_by_one():
    texts = own(ROOT / "manifests" / "tinyllama-sweep-1x8" / "job.yaml")
    with pytest.raises(UserError, match=f"these {len(texts)} jobs: the points of a sweep"):
        manifests.read("---\n".join(texts), name="manifests.yaml")


def test_what_was_written_into_a_rendered_object_since_becomes_its_patch():
    path = ROOT / "manifests" / "llama-70b-8x8" / "job.yaml"
    documents = k8s_schema.documents(own(path)[0])
    job = documents[-1]
    job["status"] = {"conditions": []}
    job["metadata"]["resourceVersion"] = "7"
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["hostAliases"] = [{"ip": "10.0.0.1", "hostnames": ["a"]}]
        replica["template"]["spec"]["containers"][0]["tty"] = True
    made = manifests.read(yamldoc.dump(documents), name="manifests.yaml")
    added = {
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}],
        "containers": [{"name": "pytorch", "tty": True}],
    }
    replicas = made.job["kubernetes"]["patch"]["spec"]["pytorchReplicaSpecs"]
    assert replicas == {name: {"template": {"spec": added}} for name in ("Master", "Worker")}
    again = rendered(made)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert again["containers"][0]["tty"] is True


def test_a_rendered_object_alone_says_what_is_missing():
    job = own(ROOT / "manifests" / "cpu-demo" / "job.yaml")[0].rpartition("\n---\n")[2]
    with pytest.raises(UserError, match="cpu-demo-bundle"):
        manifests.read(job, name="manifests.yaml")


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reads_a_manifest_from_standard_input(tmp_path):
    text = (DATA / "coreweave-ib.yaml").read_text()
    done = CliRunner().invoke(cli.cli, ["import", "-"], input=text)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# From <stdin> by `dslaunch import`; 31 of 31 fields are typed.\nname: cw-olmo\n")
    assert "carried: affinity to pods -> kubernetes.pod_affinity" in done.stderr
    (tmp_path / "job.yaml").write_text(done.stdout)
    shown = CliRunner().invoke(cli.cli, ["k8s", str(tmp_path / "job.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "rdma/ib: '1'" in shown.stdout or 'rdma/ib: "1"' in shown.stdout


def test_the_command_exits_1_when_something_is_left_to_say():
    done = CliRunner().invoke(cli.cli, ["import", str(DATA / "gke-a3ultra-gib.yaml")])
    assert done.exit_code == 1
    assert "# FILL IN: its value stood in the manifest" in done.stdout


def test_the_command_exits_2_for_what_it_refuses():
    command = [sys.executable, "-m", "launcher", "import", str(DATA / "rayjob.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "`services:` start Ray" in done.stderr
