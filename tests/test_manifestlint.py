"""dslaunch lint on Kubernetes manifests: every rule by its example, and silence where nothing is wrong."""

# ruff: noqa: E501 - scripts and manifests stand here as people write them
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import lint, manifestlint, scriptlint

ROOT = Path(__file__).parent.parent
DSLAUNCH = Path(sys.executable).parent / "dslaunch"
RULES = {rule: row for rule, row in scriptlint.rules().items() if rule.startswith("K8S")}


def results(text, name="job.yaml"):
    return lint.manifest(text, name=name).results


def found(text):
    """Ids of what is more than a note."""
    return [one.rule for one in results(text) if one.severity != "note"]


def everything(text):
    return [one.rule for one in results(text)]


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_bad_example_has_the_fault_alone_and_the_good_one_is_quiet(rule):
    row = RULES[rule]
    assert rule in everything(row["bad"])
    assert set(found(row["bad"])) <= {rule}
    assert rule not in everything(row["good"])
    assert found(row["good"]) == []


@pytest.mark.parametrize("rule", RULES)
def test_what_is_found_lies_in_the_file(rule):
    lines = RULES[rule]["bad"].splitlines()
    for one in results(RULES[rule]["bad"]):
        assert 1 <= one.line <= len(lines)
        assert 1 <= one.column <= len(lines[one.line - 1]) + 1
        assert one.message
        assert one.fix


# --- silence ----------------------------------------------------------------------------------------

SHM = "volumes: [{name: dshm, emptyDir: {medium: Memory, sizeLimit: 64Gi}}]"
CLEAN = {
    "PyTorchJob with Kueue": """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: llama
  labels:
    kueue.x-k8s.io/queue-name: research
spec:
  nprocPerNode: "8"
  runPolicy:
    cleanPodPolicy: Running
  pytorchReplicaSpecs:
    Master: &replica
      replicas: 1
      restartPolicy: Never
      template:
        metadata:
          annotations: {sidecar.istio.io/inject: "false"}
        spec:
          containers:
          - name: pytorch
            image: ghcr.io/example/train:1.4
            command: [torchrun, --nnodes=2, --nproc-per-node=8, train.py]
            env:
            - {name: NCCL_DEBUG, value: WARN}
            - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hf, key: token}}}
            resources:
              limits: {nvidia.com/gpu: 8, memory: 1000Gi, cpu: "96"}
              requests: {nvidia.com/gpu: 8, memory: 1000Gi, cpu: "96"}
            volumeMounts:
            - {name: dshm, mountPath: /dev/shm}
          volumes: [{name: dshm, emptyDir: {medium: Memory}}]
    Worker: *replica
""",
    "elastic": f"""
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {{name: elastic, labels: {{kueue.x-k8s.io/queue-name: q}}}}
spec:
  elasticPolicy: {{rdzvBackend: c10d, minReplicas: 1, maxReplicas: 4, maxRestarts: 10}}
  runPolicy: {{cleanPodPolicy: Running}}
  pytorchReplicaSpecs:
    Worker:
      replicas: 4
      restartPolicy: OnFailure
      template:
        spec:
          containers:
          - name: pytorch
            image: example/train@sha256:0000000000000000000000000000000000000000000000000000000000000000
            command: [bash, -c]
            args:
            - |
              set -eo pipefail
              torchrun --nproc-per-node 4 train.py | tee /logs/out
            resources: {{limits: {{nvidia.com/gpu: 4, vpc.amazonaws.com/efa: 1}}}}
            volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
          {SHM}
""",
    "JobSet": f"""
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: gpt
  annotations: {{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}}
spec:
  failurePolicy: {{maxRestarts: 3}}
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: 4
        completions: 4
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            {SHM}
            containers:
            - name: main
              image: us-docker.pkg.dev/p/r/image:v3
              command:
              - bash
              - -c
              - |
                torchrun --nnodes=4 --nproc-per-node=8 --node-rank=$JOB_COMPLETION_INDEX \\
                  --master-addr=gpt-workers-0-0.gpt --master-port=29500 train.py
              resources: {{limits: {{nvidia.com/gpu: 8}}}}
              volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
""",
    "TrainJob": """
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: sft, labels: {kueue.x-k8s.io/queue-name: q}}
spec:
  runtimeRef: {name: torch-distributed}
  trainer:
    image: example/sft:2
    numNodes: 4
    numProcPerNode: 8
    command: [torchrun, train.py]
    resourcesPerNode: {limits: {nvidia.com/gpu: 8}}
    env: [{name: NCCL_DEBUG, value: WARN}]
""",
    "MPIJob": f"""
apiVersion: kubeflow.org/v2beta1
kind: MPIJob
metadata: {{name: mpi, labels: {{kueue.x-k8s.io/queue-name: q}}}}
spec:
  slotsPerWorker: 8
  runPolicy: {{cleanPodPolicy: Running}}
  mpiReplicaSpecs:
    Launcher:
      replicas: 1
      template:
        spec:
          containers:
          - name: launcher
            image: example/mpi:1
            command: [mpirun, --allow-run-as-root, -np, "16", python, train.py]
    Worker:
      replicas: 2
      template:
        spec:
          {SHM}
          containers:
          - name: worker
            image: example/mpi:1
            resources: {{limits: {{nvidia.com/gpu: 8}}}}
            volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
""",
    "Volcano": f"""
apiVersion: batch.volcano.sh/v1alpha1
kind: Job
metadata: {{name: vc}}
spec:
  minAvailable: 2
  schedulerName: volcano
  plugins: {{pytorch: ["--master=master", "--worker=worker", "--port=23456"]}}
  tasks:
  - name: worker
    replicas: 2
    template:
      spec:
        restartPolicy: OnFailure
        {SHM}
        containers:
        - name: pytorch
          image: example/train:1
          resources: {{limits: {{nvidia.com/gpu: 8}}}}
          volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
""",
    "an indexed Job and its Service": f"""
apiVersion: v1
kind: Service
metadata: {{name: train}}
spec: {{clusterIP: None, selector: {{job-name: train}}}}
---
apiVersion: batch/v1
kind: Job
metadata: {{name: train, labels: {{kueue.x-k8s.io/queue-name: q}}}}
spec:
  completions: 2
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      subdomain: train
      restartPolicy: Never
      {SHM}
      containers:
      - name: train
        image: example/train:1
        command: [sh, -c, "torchrun --nnodes 2 --nproc-per-node 8 --node-rank $JOB_COMPLETION_INDEX --master-addr train-0.train t.py"]
        resources: {{limits: {{nvidia.com/gpu: 8}}}}
        volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
""",
    "one pod of one GPU": """
apiVersion: v1
kind: Pod
metadata: {name: notebook}
spec:
  restartPolicy: Never
  containers:
  - {name: cuda, image: "nvidia/cuda:12.4.1-base-ubuntu22.04", command: [nvidia-smi], resources: {limits: {nvidia.com/gpu: 1}}}
""",
    "what envsubst has yet to fill in": f"""
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {{name: $JOB_NAME, labels: {{kueue.x-k8s.io/queue-name: q}}}}
spec:
  runPolicy: {{cleanPodPolicy: Running}}
  nprocPerNode: "$GPUS"
  pytorchReplicaSpecs:
    Worker:
      replicas: $NODES
      restartPolicy: ExitCode
      template:
        spec:
          {SHM}
          containers:
          - name: pytorch
            image: ${{IMAGE}}
            env: [{{name: WANDB_API_KEY, value: $WANDB_API_KEY}}]
            resources: {{limits: {{nvidia.com/gpu: $GPUS}}}}
            volumeMounts: [{{name: dshm, mountPath: /dev/shm}}]
""",
    "no job at all": "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [job.yaml]\n",
    "a claim": "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: d}\nspec: {accessModes: [ReadWriteMany]}\n",
    "RayCluster": """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: ray}
spec:
  headGroupSpec:
    template: {spec: {containers: [{name: head, image: "rayproject/ray:2.40.0", resources: {limits: {cpu: "4"}}}]}}
""",
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_manifest_with_nothing_wrong_is_left_alone(name):
    assert [(one.rule, one.line, one.message) for one in results(CLEAN[name]) if one.severity != "note"] == []


OURS = sorted(ROOT.glob("manifests/*/manifests.yaml"))


# What a job file asks for by its name, and lint would not advise: Oracle's own recipe; a dialect of Trainer 2.1.
ASKED = {"llama-70b-oke-8x8": {"K8S032", "K8S036"}, "t5-xl-trainer-2x4": {"K8S019"}}


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_nothing_is_said_about_what_dslaunch_renders(path):
    text = path.read_text(encoding="utf-8")
    assert lint.kind(text, name=path.name) == "manifest"
    assert {one.rule for one in results(text, name=str(path))} == ASKED.get(path.parent.name, set())


def test_the_operator_sets_no_address_where_all_are_workers():
    text = (ROOT / "manifests" / "fsdp-elastic-eks-8x8" / "manifests.yaml").read_text()
    assert "name: MASTER_ADDR" in text
    assert "K8S020" not in {one.rule for one in results(text)}
    assert "K8S020" in {one.rule for one in results(text.replace("    Worker:", "    Master:"))}


def test_a_port_of_the_node_is_no_trouble_to_pods_that_never_share_one():
    text = (ROOT / "manifests" / "llama-70b-oke-8x8" / "manifests.yaml").read_text()
    assert "K8S034" not in {one.rule for one in results(text)}
    assert "K8S034" in {one.rule for one in results(text.replace("podAntiAffinity:", "podAffinityNot:"))}


# --- cases ------------------------------------------------------------------------------------------

GOOD = CLEAN["PyTorchJob with Kueue"]


def changed(*edits):
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("edit", "rule", "severity"),
    [
        (("cleanPodPolicy: Running", "cleanPodPolicyy: Running"), "K8S001", "error"),
        (("resources:", "resource:"), "K8S001", "error"),
        (("volumeMounts:", "volumeMount:"), "K8S001", "error"),
        (('nprocPerNode: "8"', "nprocPerNode: 8"), "K8S002", "error"),
        (("value: WARN", "value: 1"), "K8S003", "error"),
        (("value: WARN", "value: y"), "K8S003", "error"),
        (("value: WARN", "value: 5e-05"), "K8S003", "error"),
        (("value: WARN", "value: 08"), "K8S003", "error"),
        (("replicas: 1", 'replicas: "1"'), "K8S004", "error"),
        (("memory: 1000Gi", "memory: 1000Gigs"), "K8S004", "error"),
        (("nvidia.com/gpu: 8,", "nvidia.com/gpu: eight,"), "K8S004", "error"),
        (("nvidia.com/gpu: 8,", "nvidia.com/gpu: 0.5,"), "K8S004", "error"),
        (("    Master: &replica", "    Chief: &replica"), "K8S010", "error"),
        (("replicas: 1", "replicas: 2"), "K8S010", "error"),
        (("- name: pytorch", "- name: main"), "K8S012", "error"),
        (("restartPolicy: Never", "restartPolicy: OnFailure"), "K8S013", "warning"),
        (("      restartPolicy: Never\n", ""), "K8S013", "warning"),
        (("name: llama\n", "name: Llama_3\n"), "K8S014", "error"),
        (("name: llama\n", f"name: {'l' * 56}\n"), "K8S014", "error"),
        (("cleanPodPolicy: Running", "cleanPodPolicy: None"), "K8S015", "warning"),
        (("cleanPodPolicy: Running", "cleanPodPolicy: Everything"), "K8S015", "warning"),
        (("name: NCCL_DEBUG,", "name: MASTER_ADDR,"), "K8S020", "warning"),
        (('nprocPerNode: "8"', 'nprocPerNode: "16"'), "K8S022", "error"),
        (('nprocPerNode: "8"', 'nprocPerNode: "4"'), "K8S022", "warning"),
        (("kueue.x-k8s.io/queue-name: research", "team: research"), "K8S023", "warning"),
        (("mountPath: /dev/shm", "mountPath: /data"), "K8S031", "warning"),
        (("medium: Memory", "sizeLimit: 8Gi"), "K8S031", "warning"),
        (("medium: Memory", "medium: memory"), "K8S031", "warning"),
        (("name: dshm, mountPath", "name: dsmh, mountPath"), "K8S030", "error"),
        (("name: HF_TOKEN,", "name: NCCL_DEBUG,"), "K8S040", "error"),
        (("requests: {nvidia.com/gpu: 8", "requests: {nvidia.com/gpu: 4"), "K8S042", "error"),
        (("train:1.4", "train"), "K8S043", "warning"),
        (("registry.example.com:5000/train", "registry.example.com:5000/train"), "", ""),
        (("train:1.4", "train:latest"), "K8S043", "warning"),
        (("--nnodes=2", "--nnodes=4"), "LCH004", "error"),
        (("--nproc-per-node=8", "--nproc-per-node=16"), "LCH001", "error"),
        (("--nnodes=2", "--standalone"), "LCH007", "error"),
        (("name: NCCL_DEBUG,", "name: NCCL_DEBUGG,"), "ENV001", "warning"),
        (("train.py]", 'train.py, --global-batch-size, "100", --micro-batch-size, "8"]'), "LCH009", "error"),
        (("train.py]", 'train.py, --tensor-model-parallel-size, "3"]'), "LCH008", "error"),
        (("train.py]", "train.py, --hf_token, hf_aaaaaaaaaaaaaaaaaaaaaaaaaa]"), "LCH010", "error"),
    ],
)
def test_one_change_to_a_good_manifest(edit, rule, severity):
    text = changed(edit) if edit[0] in GOOD else GOOD
    got = {(one.rule, one.severity) for one in results(text)}
    assert ((rule, severity) in got) if rule else not got


VOLCANO = CLEAN["Volcano"]
JOBSET = CLEAN["JobSet"]
INDEXED = CLEAN["an indexed Job and its Service"]
DAEMON = "            - {name: rxdm, image: 'example/d:1', command: [/fts/entrypoint_rxdm_container.sh]}\n"
LOOP = "bash, -c, '/fts/entrypoint_rxdm_container.sh & while [ ! -e /sem/done ]; do sleep 5; done; pkill rxdm'"
AFTER = "t.py; touch /sem/done; code=$?"


def edited(text, *edits):
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("text", "edit", "rule", "severity"),
    [
        (VOLCANO, ("minAvailable: 2", "minAvailable: 1"), "K8S023", "warning"),
        (VOLCANO, ("    replicas: 2\n", "    replicas: 2\n    minAvailable: 1\n"), "", ""),  # the job's own counts
        (VOLCANO, ("minAvailable: 2", "minAvailable: 0"), "", ""),  # its webhook makes 2 of it
        (VOLCANO, ("  minAvailable: 2\n", ""), "", ""),
        (VOLCANO, ("  minAvailable: 2\n  sch", "  policies: [{event: PodFailed, action: RestartJob}]\n  sch"), "K8S013", "warning"),
        (VOLCANO, ("restartPolicy: OnFailure", "restartPolicy: OnFailure"), "K8S013", "note"),
        (VOLCANO, ("image: example/train:1", "image: example/train:1\n          command: [torchrun, --nproc-per-node=8, --nnodes=2, --rdzv-backend=c10d, --rdzv-endpoint=a, t.py]"), "", ""),
        (JOBSET, ("            containers:\n", "            containers:\n" + DAEMON), "K8S037", "warning"),
        (JOBSET, ("            containers:\n", "            shareProcessNamespace: true\n            containers:\n" + DAEMON), "", ""),
        (JOBSET, ("            containers:\n", "            containers:\n" + DAEMON.replace("/fts/entrypoint_rxdm_container.sh", LOOP)), "", ""),
        (JOBSET, ("            containers:\n", "            initContainers:\n" + DAEMON.replace("command", "restartPolicy: Always, command") + "            containers:\n"), "", ""),
        (GOOD, ("          volumes:", "          - {name: tb, image: 'example/tb:1', command: [tensorboard]}\n          volumes:"), "", ""),  # Kubeflow looks at its own container
        (JOBSET, ("--master-port=29500 train.py", "--master-port=29500 train.py --name $(POD_NAME)"), "K8S047", "warning"),
        (JOBSET, ("--master-port=29500 train.py", "--master-port=29500 train.py --name $$(POD_NAME)"), "", ""),
        (JOBSET, ("--master-port=29500 train.py", "--master-port=29500 train.py --name $(hostname) $(JOB_COMPLETION_INDEX)"), "", ""),
        (JOBSET, ("              resources:", "              env: [{name: A, value: $(POD_NAME)-a}]\n              resources:"), "K8S047", "warning"),
        (JOBSET, ("              resources:", "              envFrom: [{configMapRef: {name: c}}]\n              env: [{name: A, value: $(POD_NAME)-a}]\n              resources:"), "", ""),
        (INDEXED, (", labels: {kueue.x-k8s.io/queue-name: q}", ""), "K8S023", "warning"),
        (JOBSET, ("restartPolicy: Never", "restartPolicy: Always"), "K8S004", "error"),
        (INDEXED, ("restartPolicy: Never", "restartPolicy: Always"), "K8S004", "error"),
        (INDEXED, ("restartPolicy: Never", "restartPolicy: OnFailure"), "", ""),
        (INDEXED, ("completions: 2", "completions: 1"), "K8S025", "warning"),
        (INDEXED, ("  completions: 2\n", ""), "", ""),
        (JOBSET, ("completions: 4", "completions: 8"), "", ""),
        (JOBSET, ("--master-addr=gpt-workers-0-0.gpt", "--master-addr=gpt-worker-0-0.gpt"), "K8S026", "error"),
        (JOBSET, ("--master-addr=gpt-workers-0-0.gpt", "--master-addr=gpt-workers-1-0.gpt"), "K8S026", "error"),
        (JOBSET, ("--master-addr=gpt-workers-0-0.gpt", "--master-addr=gpt-workers-0-3.gpt"), "", ""),
        (JOBSET, ("--master-addr=gpt-workers-0-0.gpt", "--master-addr=etcd-0-0.other"), "", ""),
        (JOBSET, ("nvidia.com/gpu: 8", "nvidia.com/gpu: 8, hugepages-2Mi: 1Gi"), "K8S046", "error"),
        (JOBSET, ("nvidia.com/gpu: 8}", "nvidia.com/gpu: 8, hugepages-2Mi: 1Gi}, requests: {cpu: 8}"), "", ""),
        (GOOD, ("memory: 1000Gi, cpu: \"96\"}\n              requests: {nvidia.com/gpu: 8", "memory: 1000Gi, hugepages-2Mi: 1Gi}\n              requests: {nvidia.com/gpu: 8, hugepages-2Mi: 2Gi"), "K8S042", "error"),
        (INDEXED, ("labels: {kueue.x-k8s.io/queue-name: q}}\nspec:\n", "annotations: {pod-group-name: a}}\nspec:\n  suspend: true\n"), "K8S028", "warning"),
        (INDEXED, ("q}}\nspec:\n", "q}}\nspec:\n  suspend: true\n"), "", ""),
        (CLEAN["TrainJob"], ("labels: {kueue.x-k8s.io/queue-name: q}}\nspec:\n", "annotations: {}}\nspec:\n  suspend: true\n"), "K8S028", "warning"),
        (GOOD, ("[torchrun, --nnodes=2, --nproc-per-node=8, train.py]", "[python, -u, train.py]"), "K8S048", "warning"),
        (GOOD, ("[torchrun, --nnodes=2, --nproc-per-node=8, train.py]", "[python, train.py, --devices, '8']"), "", ""),
        (GOOD, ("[torchrun, --nnodes=2, --nproc-per-node=8, train.py]", "[python, launch.py]"), "", ""),
        (GOOD, ("[torchrun, --nnodes=2, --nproc-per-node=8, train.py]", "[bash, -c, 'cd /src; python train.py; echo done']"), "K8S048", "warning"),
        (INDEXED, (" t.py", " " + AFTER), "SLM042", "warning"),
        (INDEXED, (" t.py", " t.py; code=$?; touch /sem/done; exit $code"), "", ""),
        (INDEXED, (" t.py", " t.py; cp -r /ckpt /out; code=$?"), "", ""),
        (GOOD, ("nvidia.com/gpu: 8,", "nvidia.com/gpu: 8, rdma/ib: 1,"), "", ""),  # CoreWeave's
        (GOOD, ("nvidia.com/gpu: 8,", "nvidia.com/gpu: 8, rdma/ib: 8,"), "K8S035", "warning"),  # Azure's
        (GOOD, ("name: NCCL_DEBUG, value: WARN", "name: NCCL_SOCKET_IFNAME, value: efa"), "ENV015", "warning"),
        (GOOD, ("name: NCCL_DEBUG, value: WARN", "name: NCCL_SOCKET_IFNAME, value: eth0"), "", ""),
        (GOOD, ("name: NCCL_DEBUG,", "name: NCCL_START_SCRIPT,"), "ENV001", "warning"),
    ],
)  # fmt: skip
def test_one_change_to_a_manifest_of_any_kind(text, edit, rule, severity):
    got = {(one.rule, one.severity) for one in results(edited(text, edit))}
    usual = {("K8S013", "note")} if text is VOLCANO and rule != "K8S013" else set()
    assert ((rule, severity) in got) if rule else got <= usual


@pytest.mark.parametrize(
    "key", ["autoscaling.x-k8s.io/consume-provisioning-request", "scheduling.x-k8s.io/pod-group"]
)
def test_what_brings_all_pods_or_none_may_stand_on_the_pods(key):
    text = edited(INDEXED, (", labels: {kueue.x-k8s.io/queue-name: q}", ""))
    assert "K8S023" in everything(text)
    template = "  template:\n"
    assert everything(text.replace(template, f"{template}    metadata: {{annotations: {{{key}: a}}}}\n")) == []


def test_master_and_workers_ask_for_the_same_network():
    text = RULES["K8S027"]["bad"]
    (one,) = [one for one in results(text) if one.rule == "K8S027"]
    assert text.splitlines()[one.line - 1][one.column - 1 :].startswith("vpc.amazonaws.com/efa: 4")
    without = [one.rule for one in results(text.replace(", vpc.amazonaws.com/efa: 4", ""))]
    assert without == ["K8S027"]


def test_eth0_is_what_kubernetes_calls_a_pods_own_interface():
    text = changed(("name: NCCL_DEBUG, value: WARN", "name: NCCL_SOCKET_IFNAME, value: eth0"))
    assert not [one for one in results(text) if one.rule.startswith("ENV")]
    host = text.replace("        spec:\n", "        spec:\n          hostNetwork: true\n")
    got = [one.rule for one in results(host) if one.rule.startswith("ENV")]
    assert got == ["ENV016", "ENV032"]  # once, though two roles have it


def test_a_variable_that_the_command_reads_is_read_by_somebody():
    text = CLEAN["elastic"].replace(
        "            resources:", "            env: [{name: NCCL_START_SCRIPT, value: /a.sh}]\n            resources:"
    )
    assert "ENV001" in everything(text)
    assert everything(text.replace("set -eo pipefail", "set -eo pipefail; . ${NCCL_START_SCRIPT}")) == []


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("/dev/shm", "medium: Memory"),
        ("/dev/gdrdrv", "device plugin"),
        ("/sys/class/net", "of its own"),
        ("/mnt/data", "PersistentVolumeClaim"),
        ("/device", "PersistentVolumeClaim"),
        ("/run/tcpx", None),
        ("/home/kubernetes/bin/nvidia/vulkan", None),
    ],
)  # fmt: skip
def test_what_a_path_of_the_node_is_replaced_by(path, fix):
    text = changed(("volumes: [", f"volumes: [{{name: here, hostPath: {{path: {path}}}}}, "))
    got = {one.fix for one in results(text) if one.rule == "K8S032"}
    assert (len(got) == 1 and fix in got.pop()) if fix else not got


JOBS = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: a, labels: {kueue.x-k8s.io/queue-name: q}}
spec:
  replicatedJobs:
  - name: w
    template:
      spec:
        parallelism: 4
        completions: 4
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            containers:
            - name: w
              image: reg/img:1
              command: [torchrun, --nproc-per-node=1, %s, train.py]
              resources: {limits: {nvidia.com/gpu: 1, cpu: %s}}
"""


@pytest.mark.parametrize(
    ("words", "limit", "rules"),
    [
        ("--master-addr=a-w-0-0.a", "4", ["LCH004"]),  # it knows where the others are, and waits for none of them
        ("--master-addr=a-w-0-0.a, --nnodes=4, --node-rank=$(JOB_COMPLETION_INDEX)", "4", []),
        ("--master-addr=localhost", "4", ["LCH006"]),
        ("--local-ranks-filter=0", "", []),  # `cpu:` alone asks for nothing
        ("--local-ranks-filter=0", '""', ["K8S004"]),
    ],
)
def test_pods_that_train_alone_and_amounts_that_are_none(words, limit, rules):
    assert found(JOBS % (words, limit)) == rules


def test_a_reference_in_a_block_is_placed_there():
    text = edited(JOBSET, ("--master-port=29500 train.py", "--master-port=29500 train.py --name $(POD_NAME)"))
    (one,) = [one for one in results(text) if one.rule == "K8S047"]
    assert text.splitlines()[one.line - 1][one.column - 1 : one.end_column - 1] == "$(POD_NAME)"


def test_the_field_meant_is_named():
    one = next(one for one in results(changed(("cleanPodPolicy", "cleanPodPolcy"))) if one.rule == "K8S001")
    assert (one.line, one.column, one.fix) == (11, 5, "did you mean cleanPodPolicy?")


def test_a_script_in_a_block_is_judged_where_it_stands():
    text = CLEAN["elastic"].replace("set -eo pipefail", "export HF_TOKEN=hf_" + "a" * 30)
    got = {one.rule: one for one in results(text)}
    assert {"LCH010", "SLM041"} <= set(got)
    row = text.splitlines()[got["LCH010"].line - 1]
    assert row[got["LCH010"].column - 1 :].startswith("HF_TOKEN")


def test_a_deepspeed_config_in_a_config_map_is_judged_with_the_job_beside_it():
    text = GOOD + (
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: ds}\ndata:\n  ds.json: |\n    {\n"
        '      "train_batch_size": 100,\n      "train_micro_batch_size_per_gpu": 4,\n'
        '      "gradient_accumulation_steps": 1,\n      "bf16": {"enabled": true}\n    }\n'
    )
    errors = [one for one in results(text) if one.severity == "error"]
    assert len(errors) == 1
    assert "train_batch_size" in text.splitlines()[errors[0].line - 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: {{ .Values.name }}}\n", "helm template"),
        ("apiVersion: v1\nkind: Pod\n\tspec: {}\n", ""),
        ("apiVersion: v1\nkind: Pod\nspec: " + "[" * 400 + "]" * 400 + "\n", ""),
        ("apiVersion: v1\nkind: Pod\nspec: *nobody\n", ""),
    ],
)
def test_what_is_no_yaml_is_a_result_with_its_place(text, says):
    report = lint.manifest(text, name="a.yaml")
    if report.results:
        assert report.results[0].rule == "K8S005"
        assert says in report.results[0].fix


BARE_JOBSET = "apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nmetadata: {name: a}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: x\nspec: []\n",
            ["metadata is 'x', and has to be a mapping", "spec is a list, and has to be a mapping"],
        ),
        (BARE_JOBSET + "spec: {replicatedJobs: x}\n", ["spec.replicatedJobs is 'x', and has to be a list"]),
        (
            BARE_JOBSET
            + "spec: {replicatedJobs: [{name: a, template: {spec: {template: {spec: {containers: null}}}}}]}\n",
            ["the JobSet has no template.spec.template.spec.containers of a"],
        ),
        (BARE_JOBSET + "spec: {}\n", ["the JobSet has no spec"]),
        ("apiVersion: v1\nkind: Pod\n", ["the Pod has no metadata and no spec"]),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{image: b}]}\n",
            ["no name of a container"],
        ),
        (
            "apiVersion: trainer.kubeflow.org/v1alpha1\nkind: TrainJob\nmetadata: {name: a}\nspec: {trainer: {}}\n",
            ["the TrainJob has no spec.runtimeRef"],
        ),
    ],
)
def test_an_object_that_cannot_work_is_an_error_and_nothing_is_derived_from_it(text, says):
    found = results(text)
    assert [one.severity for one in found] == ["error"] * len(says)
    assert all(part in one.message for one, part in zip(found, says, strict=True))


@pytest.mark.parametrize("hole", ["metadata: {{ .Values.metadata }}", "metadata: ${METADATA}"])
def test_what_has_yet_to_be_filled_in_may_become_a_mapping(hole):
    text = (
        f"apiVersion: v1\nkind: Pod\n{hole}\nspec: {{containers: [{{name: a, image: registry.example.com/a:1}}]}}\n"
    )
    assert not {"K8S006", "K8S007"} & set(everything(text))


@pytest.mark.slow
def test_validating_refuses_a_field_that_a_patch_invents(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)
    run = [DSLAUNCH, "k8s", ROOT / "manifests" / "phi-2-patch-1x4" / "job.yaml", "--validate", "client"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*run, "--set", "kubernetes.patch.spec.zzqq=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "has no field zzqq" in done.stderr


def test_aliases_of_aliases_cost_nothing():
    text = "apiVersion: v1\nkind: Pod\na: &a [1,1,1,1,1,1,1,1,1]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    assert results(text) is not None


@pytest.mark.slow
def test_the_command_line(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(changed(('nprocPerNode: "8"', "nprocPerNode: 8")))
    said = subprocess.run([DSLAUNCH, "lint", "--json", path], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    report = json.loads(said.stdout)[0]
    assert (report["kind"], report["results"][0]["rule"], report["results"][0]["line"]) == ("manifest", "K8S002", 9)
    good = tmp_path / "good.yaml"
    good.write_text(GOOD)
    said = subprocess.run([DSLAUNCH, "lint", "--strict", good], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


@given(st.text(alphabet=st.sampled_from(list("apiVersion: v1\nkd{}[],&*|>-\"'#$ \n")), max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_a_traceback(text):
    assert all(one.line for one in manifestlint.judge("apiVersion: v1\nkind: Pod\n" + text))
