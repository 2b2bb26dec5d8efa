"""PyTorchJob, JobSet and TrainJob: as an API server judges them, as their pods run, and asked about in a cluster."""

import copy
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_kube
import k8s_schema
import pytest
import yaml
from test_kube_recover import Operator, entries
from test_kubernetes import finish, lay_out, make, over, own_address

from launcher import bundle, cli, runs
from launcher.backends import State, kubernetes
from launcher.backends.kubernetes import kinds, output, server, watch
from launcher.backends.kubernetes.manifests import POD
from launcher.errors import UserError
from launcher.preflight import pods
from launcher.run import run

VOLUME = {"train": {"checkpoint": {"dir": "/ckpt/x"}}, "kubernetes": {"volumes": [{"claim": "c", "mount": "/ckpt"}]}}
GPUS = {"resources": {"nodes": 4, "processes_per_node": None, "gpus_per_node": 8, "gpu": "h100-80gb",
                      "fabric": "infiniband", "cpus_per_node": None, "memory": None},
        "train": {"global_batch": "auto"}}  # fmt: skip
OWN = {"command": ["bash", "-c", "torchrun train.py"], "launcher": "node", "global_batch": "auto"}


def k8s(**options):
    return {"kubernetes": options}


JOBS = {
    "jobset": [k8s(kind="jobset")],
    "jobset-one-node": [k8s(kind="jobset"), {"resources": {"nodes": 1}}],
    "jobset-gpus": [k8s(kind="jobset"), GPUS],
    "jobset-recovers": [VOLUME, k8s(kind="jobset", run_policy={"deadline": 3600, "ttl": 0})],
    "jobset-policies": [
        k8s(kind="jobset", run_policy={"max_restarts": 3, "suspend": True, "restart_policy": "OnFailure",
                                       "backoff_limit": 2, "managed_by": "kueue.x-k8s.io/multikueue"})
    ],
    "jobset-volcano": [k8s(kind="jobset", gang={"by": "volcano", "queue": "q"}, priority_class="high")],
    "jobset-kai": [k8s(kind="jobset", gang={"by": "kai", "queue": "team"})],
    "kai": [k8s(gang={"by": "kai", "queue": "team"})],
    "trainjob-fields": [k8s(kind="trainjob", cpu_limit="none", env_fields={"A": "requests.cpu"},
                            env_keys={"B": {"config_map": "c", "key": "k", "optional": True}}, pod_env={"a.b": "c"},
                            node_affinity_any=[[{"key": "a", "operator": "Exists"}]],
                            security={"supplemental_groups": [3000]}), {"resources": {"cpus_per_node": 8}}],
    "jobset-fields": [k8s(kind="jobset", network={"claims": ["cd", "nics"]}, memory_limit="900Gi", grace=0,
                          pod_patch={"spec": {"dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}}},
                          sidecars=[{"name": "s", "image": "i", "run_as_user": 0, "capabilities": ["NET_ADMIN"],
                                     "secrets": {"T": {"secret": "s", "key": "k", "optional": True}},
                                     "env_fields": {"IP": "status.podIP"}, "image_pull_policy": "Always"}])],
    "jobset-coscheduling": [k8s(kind="jobset", gang={"by": "coscheduling", "timeout": 300, "min_available": 1})],
    "jobset-kueue": [k8s(kind="jobset", queue={"name": "q", "priority": "p", "topology": "cloud.provider.com/rack"})],
    "jobset-longest-name": [k8s(kind="jobset"), {"name": "a" * 40, "resources": {"nodes": 2000},
                                                 "train": {"global_batch": "auto"}}],
    "trainjob": [k8s(kind="trainjob")],
    "trainjob-gpus": [k8s(kind="trainjob"), GPUS],
    "trainjob-volumes": [VOLUME, k8s(kind="trainjob", node_selector={"a": "b"}, tolerations=[{"key": "gpu"}],
                                     service_account="s", image_pull_secrets=["r"], exclude=["node-7"])],
    "trainjob-secrets": [k8s(kind="trainjob"), {"secrets": {"HF_TOKEN": {"secret": "hf", "key": "token"}}}],
    "trainjob-policies": [
        k8s(kind="trainjob", trainer="2.3", runtime="mine", runtime_kind="TrainingRuntime", queue="q",
            run_policy={"deadline": 60, "suspend": True, "managed_by": "kueue.x-k8s.io/multikueue"})
    ],
    "trainjob-2.1": [VOLUME, k8s(kind="trainjob", trainer="2.1", node_selector={"a": "b"})],
    "policies": [
        k8s(run_policy={"clean_pods": "All", "ttl": 60, "deadline": 600, "backoff_limit": 3, "suspend": True,
                        "restart_policy": "OnFailure", "managed_by": "kubeflow.org/training-operator"})
    ],
    "volcano": [k8s(gang={"by": "volcano", "queue": "q", "min_available": 1}, priority_class="high")],
    "coscheduling": [k8s(gang={"by": "coscheduling", "timeout": 300, "scheduler": "mine"})],
    "kueue": [k8s(queue={"name": "q", "topology": "rack", "topology_required": False})],
    "elastic": [k8s(elastic={"min": 1, "max": 4, "max_restarts": 100, "backend": "etcd", "endpoint": "etcd:2379"}),
                {"train": OWN}],
    "elastic-c10d": [k8s(elastic={"min": 1, "max": 2}), {"train": OWN}],
}  # fmt: skip


def plan_of(name):
    return make(*JOBS[name])


def documents(name):
    return copy.deepcopy(kubernetes.manifests(plan_of(name)))


def trainer_of(name):
    return plan_of(name).spec.kubernetes.trainer


def first_pod(job):
    return k8s_schema.pods(job)[0][1]


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_manifests_are_ones_that_a_strict_server_takes(name):
    found = list(yaml.load_all(kubernetes.render(plan_of(name)).text(kubernetes.ENTRY), Loader=k8s_schema.LOADER))
    assert k8s_schema.problems(found, trainer=trainer_of(name)) == []


@pytest.mark.parametrize("name", JOBS)
def test_manifests_fit_the_operators_own_crds(name):
    for one in documents(name):
        known = one["kind"] in k8s_schema.CRDS and "scheduling.x-k8s.io" not in one["apiVersion"]
        path = k8s_schema.crd(one["kind"]) if known else None
        if known and path is None:
            pytest.skip("DSLAUNCH_CRD_DIR names no folder with the CRDs")
        if path and trainer_of(name) != "2.1":  # what the file is of is newer, and has another field for it
            assert k8s_schema.crd_problems(one, k8s_schema.crd_schema(path)) == []


def at(job, *path):
    for key in path:
        job = job[key]
    return job


WORK = ("spec", "replicatedJobs", 0, "template", "spec")
PATCH = ("spec", "runtimePatches", 0, "trainingRuntimeSpec", "template", "spec", "replicatedJobs", 0, "template",
         "spec", "template", "spec")  # fmt: skip
BAD = [
    ("jobset", ("spec", "network"), {"enableDNS": True}, "unknown field `enableDNS`"),
    ("jobset", ("spec", "failurePolicy"), {"maxRestarts": "3"}, "is not int"),
    ("jobset", WORK, {"completionMode": "Indexed", "parallelisms": 2}, "unknown field `parallelisms`"),
    ("jobset", (*WORK, "template", "spec"), {"restartPolicy": "Always"}, "Never or OnFailure"),
    ("jobset", (*WORK, "template", "spec"), {"nodeSelectors": {}}, "unknown field `nodeSelectors`"),
    ("jobset", ("metadata",), {"name": "a" * 50}, "more than 63"),
    (
        "jobset-recovers",
        (*WORK, "podFailurePolicy", "rules", 0, "onExitCodes"),
        {"containerName": "x"},
        "no container",
    ),
    ("trainjob", ("spec", "trainer"), {"numProcPerNode": "auto"}, "is not int"),
    ("trainjob", ("spec",), {"podTemplateOverrides": []}, "unknown field `podTemplateOverrides`"),
    ("trainjob", PATCH, {"terminationGracePeriodSeconds": 60}, "unknown field `terminationGracePeriodSeconds`"),
    ("trainjob", PATCH, {"priorityClassName": "high"}, "unknown field `priorityClassName`"),
    ("trainjob", (*PATCH, "containers", 0), {"name": "trainer"}, "no container 'trainer'"),
    ("trainjob", (*PATCH, "containers", 0), {"image": "x"}, "unknown field `image`"),
    ("trainjob-2.1", ("spec",), {"runtimePatches": []}, "unknown field `runtimePatches`"),
    ("jobset-volcano", ("spec",), {"minMembers": 1}, "unknown field `minMembers`"),
]


@pytest.mark.parametrize(("name", "path", "change", "words"), BAD)
def test_the_validator_sees_a_bad_manifest(name, path, change, words):
    found = documents(name)
    at(found[-2 if "minMembers" in change else -1], *path).update(change)
    said = k8s_schema.problems(found, trainer=trainer_of(name))
    assert said
    assert all(words in line for line in said), said


def test_a_jobset_is_one_gang():
    job = documents("jobset-gpus")[-1]
    work, pod = at(job, *WORK), first_pod(job)
    assert {key: work[key] for key in ("parallelism", "completions", "completionMode", "backoffLimit")} == {
        "parallelism": 4, "completions": 4, "completionMode": "Indexed", "backoffLimit": 0,
    }  # fmt: skip
    assert job["spec"]["failurePolicy"] == {"maxRestarts": 0}  # nowhere to count
    assert pod["restartPolicy"] == "Never"
    assert pod["containers"][0]["name"] == "node"
    env = {row["name"]: row.get("value") for row in pod["containers"][0]["env"]}
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("demo-node-0-0.demo", "23456")


def test_a_jobset_starts_the_gang_again_and_a_code_that_is_the_end_ends_it():
    job = documents("jobset-recovers")[-1]
    rule = {
        "name": "the-end",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    assert job["spec"]["failurePolicy"] == {"maxRestarts": 2**31 - 1, "rules": [rule]}
    codes = at(job, *WORK)["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["operator"], codes["values"]) == ("NotIn", [137, 143, 144])
    assert "--gang -- bash" in first_pod(job)["containers"][0]["command"][-1]
    assert kubernetes.recovers(plan_of("jobset-recovers"))


def test_policies_are_said_where_each_kind_has_them():
    assert documents("policies")[-1]["spec"]["runPolicy"] == {
        "cleanPodPolicy": "All", "ttlSecondsAfterFinished": 60, "activeDeadlineSeconds": 600, "backoffLimit": 3,
        "suspend": True, "managedBy": "kubeflow.org/training-operator", "schedulingPolicy": {"minAvailable": 2},
    }  # fmt: skip
    job = documents("jobset-policies")[-1]
    assert (job["spec"]["suspend"], job["spec"]["managedBy"]) == (True, "kueue.x-k8s.io/multikueue")
    assert job["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert at(job, *WORK)["backoffLimit"] == 2
    assert first_pod(job)["restartPolicy"] == "OnFailure"
    job = documents("trainjob-policies")[-1]
    assert (job["spec"]["activeDeadlineSeconds"], job["spec"]["suspend"]) == (60, True)
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "mine",
    }  # fmt: skip


@pytest.mark.parametrize(("trainer", "field"), [("2.0", "podTemplateOverrides"), ("2.1", "podTemplateOverrides"),
                                                ("2.2", "runtimePatches"), ("2.3", "runtimePatches")])  # fmt: skip
def test_a_trainjob_is_of_the_release_that_is_installed(trainer, field):
    made = make(VOLUME, k8s(kind="trainjob", trainer=trainer))
    found = kubernetes.manifests(made)
    job = found[-1]
    assert k8s_schema.problems(found, trainer=trainer) == []
    assert set(job["spec"]) == {"runtimeRef", "trainer", field}
    pod = first_pod(job)
    assert [row["mountPath"] for row in pod["containers"][0]["volumeMounts"]] == [
        "/opt/dslaunch",
        "/dev/shm",
        "/ckpt",
    ]
    assert {row["name"] for row in pod["volumes"]} == {row["name"] for row in pod["containers"][0]["volumeMounts"]}
    assert ("securityContext" in pod) is (field == "runtimePatches")
    # what a pod is not told, its ranks may not count on
    told = pod.get("terminationGracePeriodSeconds", 30)
    assert f"--grace {told - 20} " in found[0]["data"]["node.sh"]
    trainer_section = job["spec"]["trainer"]
    assert (trainer_section["numNodes"], trainer_section["numProcPerNode"]) == (2, 2)
    assert trainer_section["resourcesPerNode"]["limits"] == {"cpu": "4", "memory": "8Gi"}


def test_elastic_pods_are_workers_that_know_the_first():
    job = documents("elastic")[-1]
    assert job["spec"]["elasticPolicy"] == {
        "minReplicas": 1, "maxReplicas": 4, "maxRestarts": 100, "rdzvBackend": "etcd", "rdzvHost": "etcd",
        "rdzvPort": 2379,
    }  # fmt: skip
    (worker,) = job["spec"]["pytorchReplicaSpecs"].items()
    assert (worker[0], worker[1]["replicas"], worker[1]["restartPolicy"]) == ("Worker", 2, "OnFailure")
    env = {row["name"]: row for row in first_pod(job)["containers"][0]["env"]}
    label = env["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert label == "metadata.labels['training.kubeflow.org/replica-index']"
    assert env["MASTER_ADDR"]["value"] == "demo-worker-0"


def test_groups_and_queues_are_where_their_schedulers_look():
    *_, group, job = documents("jobset-volcano")
    assert group["spec"] == {"minMember": 2, "queue": "q", "priorityClassName": "high"}
    template = kinds.templates(job)[0]
    assert template["spec"]["schedulerName"] == "volcano"
    assert template["metadata"]["annotations"] == {"scheduling.k8s.io/group-name": group["metadata"]["name"]}
    for name in ("jobset-kai", "kai"):
        *maps, job = documents(name)
        assert {one["kind"] for one in maps} == {"ConfigMap"}  # its pod-grouper makes the group
        assert job["metadata"]["labels"]["kai.scheduler/queue"] == "team"
        assert first_pod(job)["schedulerName"] == "kai-scheduler"
        assert {one["metadata"]["labels"]["kai.scheduler/queue"] for one in kinds.templates(job)} == {"team"}
    *_, group, job = documents("jobset-coscheduling")
    assert group["apiVersion"] == "scheduling.x-k8s.io/v1alpha1"
    assert group["spec"] == {"minMember": 1, "scheduleTimeoutSeconds": 300}
    template = kinds.templates(job)[0]
    assert template["spec"]["schedulerName"] == "scheduler-plugins-scheduler"
    assert template["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == "demo"
    *_, job = documents("jobset-kueue")
    labels = job["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == ("q", "p")
    annotations = kinds.templates(job)[0]["metadata"]["annotations"]
    assert annotations == {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/rack"}
    *_, job = documents("kueue")
    for template in kinds.templates(job):
        assert template["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-preferred-topology": "rack"}
    *maps, job = documents("volcano")
    assert {one["kind"] for one in maps} == {"ConfigMap"}  # the operator makes the group
    policy = job["spec"]["runPolicy"]["schedulingPolicy"]
    assert policy == {"minAvailable": 1, "queue": "q", "priorityClass": "high"}
    *_, job = documents("coscheduling")
    assert job["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 2, "scheduleTimeoutSeconds": 300}
    assert first_pod(job)["schedulerName"] == "mine"
    assert "schedulingPolicy" not in kubernetes.manifests(make(k8s(gang=False)))[-1]["spec"]["runPolicy"]


def test_slices_and_tiers_say_how_close_pods_are():
    asked = {"name": "q", "slice_topology": "cloud.provider.com/rack", "slice_size": 2}
    job = kubernetes.manifests(make(k8s(kind="jobset", queue=asked)))[-1]
    assert kinds.templates(job)[0]["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-slice-required-topology": "cloud.provider.com/rack",
        "kueue.x-k8s.io/podset-slice-size": "2",
    }
    job = kubernetes.manifests(make(k8s(kind="jobset", queue={"name": "q", "unconstrained": True})))[-1]
    annotations = kinds.templates(job)[0]["metadata"]["annotations"]
    assert annotations == {"kueue.x-k8s.io/podset-unconstrained-topology": "true"}
    for required, mode in ((True, "hard"), (False, "soft")):
        gang = {"by": "volcano", "tier": 2, "tier_required": required}
        *_, group, _ = kubernetes.manifests(make(k8s(kind="jobset", gang=gang)))
        assert group["spec"]["networkTopology"] == {"mode": mode, "highestTierAllowed": 2}
        assert list(k8s_schema.problems([group])) == []


def test_a_trainjob_s_runtime_is_told_what_to_download():
    asked = {"uri": "hf://trl-lib/tldr", "secret": "hf", "env": {"HF_HUB_CACHE": "/cache"}}
    plan = make(k8s(kind="trainjob", dataset=asked, weights={"uri": "hf://org/model"}))
    text = kubernetes.render(plan).text(kubernetes.ENTRY)
    assert k8s_schema.problems(k8s_schema.documents(text)) == []
    assert kubernetes.manifests(plan)[-1]["spec"]["initializer"] == {
        "dataset": {"storageUri": "hf://trl-lib/tldr", "secretRef": {"name": "hf"},
                    "env": [{"name": "HF_HUB_CACHE", "value": "/cache"}]},
        "model": {"storageUri": "hf://org/model"},
    }  # fmt: skip


def test_an_autoscaler_of_the_operator_s_looks_at_what_pods_request():
    world = {"min": 1, "max": 4, "autoscale": {"cpu": 90}}
    plan = make(k8s(elastic=world), {"train": OWN})
    policy = kubernetes.manifests(plan)[-1]["spec"]["elasticPolicy"]
    target = {"type": "Utilization", "averageUtilization": 90}
    assert policy["metrics"] == [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    assert not any("autoscale" in note for note in kinds.notes(plan.spec))
    asks = make(k8s(elastic=world), {"train": OWN, "resources": {"cpus_per_node": None}})
    assert any("they request none: resources.cpus_per_node" in note for note in kinds.notes(asks.spec))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([k8s(kind="jobset", queue={"name": "q", "slice_size": 2})], "slices without slice_topology"),
        ([k8s(kind="jobset", queue={"name": "q", "slice_topology": "r"})], "slices without slice_size"),
        ([k8s(kind="jobset", queue={"name": "q", "slice_topology": "r", "slice_size": 3})], "slices of 3 pods"),
        ([k8s(queue={"name": "q", "slice_topology": "r", "slice_size": 2})], "master is a pod set of its own"),
        ([k8s(queue={"name": "q", "topology": "r", "unconstrained": True})], "takes one of both"),
        ([k8s(gang={"by": "volcano", "tier": 1})], "of a JobSet alone"),
        ([k8s(dataset={"uri": "hf://a/b"})], "a PyTorchJob downloads nothing before its ranks start"),
        ([k8s(kind="trainjob", weights={"uri": "hf://a/b", "env": {"HF_TOKEN": "x" * 20}})], "looks like a secret"),
        ([k8s(kind="trainjob", dns={"policy": "Default"})], "has no dnsPolicy"),
        ([k8s(kind="trainjob", host_aliases={"10.0.0.1": ["a"]})], "has no hostAliases"),
        ([k8s(kind="jobset", run_policy={"clean_pods": "All"})], "a JobSet has no clean_pods"),
        ([k8s(run_policy={"max_restarts": 3})], "a PyTorchJob has no max_restarts"),
        ([k8s(kind="trainjob", run_policy={"ttl": 3})], "a TrainJob has no ttl"),
        ([k8s(run_policy={"managed_by": "example.com/x"})], "takes kubeflow.org/training-operator or"),
        ([k8s(run_policy={"backoff_limit": 3})], "unless pods are restarted in place"),
        ([k8s(kind="jobset", run_policy={"restart_policy": "ExitCode"})], "take Never or OnFailure"),
        ([VOLUME, k8s(kind="jobset", run_policy={"backoff_limit": 3})], "recover.attempts the whole gang"),
        ([k8s(kind="trainjob", runtime="deepspeed-distributed")], "mpirun starts the ranks"),
        ([k8s(kind="trainjob", run_policy={"deadline": 60})], "Trainer 2.2 has no activeDeadlineSeconds"),
        ([k8s(kind="trainjob", gang={"by": "volcano"})], "from the runtime"),
        ([k8s(kind="trainjob", priority_class="high")], "has no priorityClassName"),
        ([k8s(kind="trainjob", secret_env_from=["s"])], "has no envFrom"),
        ([k8s(kind="trainjob", grace=200)], "has no terminationGracePeriodSeconds"),
        ([k8s(kind="jobset", elastic={"min": 2, "max": 2}), {"train": OWN}], "a JobSet has no elasticPolicy"),
        ([k8s(elastic={"min": 2, "max": 2})], "of one world"),
        ([k8s(elastic={"min": 3, "max": 4}), {"train": OWN}], "starts on 2 nodes"),
        ([k8s(elastic={"min": 1, "max": 4, "backend": "etcd"}), {"train": OWN}], "needs its address"),
        ([k8s(elastic={"min": 1, "max": 4, "endpoint": "a:1"}), {"train": OWN}], "names by itself"),
        ([k8s(elastic={"min": 1, "max": 2}), {"train": OWN, "preflight": {"run": True}}], "waits for all nodes"),
        ([k8s(gang={"min_available": 3})], "it would never start"),
        ([k8s(kind="jobset", gang={"queue": "q"})], "JobSet makes no pod groups"),
        ([k8s(kind="jobset", gang={"by": "volcano", "timeout": 3})], "have no timeout"),
        ([k8s(gang={"by": "coscheduling", "queue": "q"})], "has no queues"),
        ([k8s(queue="")], "queue has no name"),
        ([k8s(kind="jobset", gang={"by": "kai", "min_available": 2})], "nobody would read min_available"),
        ([k8s(gang={"by": "kai", "timeout": 2})], "nobody would read timeout"),
        ([k8s(queue="a", labels={"kueue.x-k8s.io/queue-name": "b"})], "the job's queue is a"),
        ([k8s(kind="trainjob", network={"claims": ["a"]})], "has no resourceClaims"),
        ([k8s(kind="trainjob", pod_patch={"spec": {"dnsPolicy": "None"}})], "made from its runtime"),
        ([VOLUME, k8s(run_policy={"restart_policy": "ExitCode", "backoff_limit": 3})], "forgets what it counted"),
        ([{"recover": {"attempts": 7}}], "these end with the pods"),
        ([VOLUME, {"recover": {"attempts": 7}}, k8s(kind="trainjob")], "the runtime of a TrainJob"),
        ([VOLUME, {"recover": {"attempts": 7}}, k8s(run_policy={"restart_policy": "OnFailure"})],
         "run_policy.restart_policy: OnFailure says"),
        ([VOLUME, {"recover": {"attempts": 7}}, k8s(kind="jobset", run_policy={"max_restarts": 0})],
         "run_policy.max_restarts: 0 says"),
        ([k8s(kind="jobset"), {"name": "7b"}], "begins with a digit"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_and_placed(changes, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        kubernetes.render(make(*changes))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].at
    assert caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([k8s(queue="q")], "Kueue 0.19 as installed has kubeflow.org/pytorchjob off"),
        ([k8s(gang={"by": "volcano"})], "--gang-scheduler-name=volcano"),
        ([k8s(run_policy={"clean_pods": "None"})], "keep their GPUs"),
        ([k8s(run_policy={"deadline": 60})], "it may be late"),
        ([VOLUME, k8s(run_policy={"ttl": 60})], "never removed by its ttl"),
        ([k8s(run_policy={"restart_policy": "OnFailure"})], "nobody counts recover.attempts"),
        ([k8s(run_policy={"restart_policy": "Never", "backoff_limit": 3})], "never looks at backoffLimit"),
        ([k8s(run_policy={"suspend": True})], "no queue that would start the job"),
        ([k8s(grace=15)], "the ranks get 7 s"),
        ([k8s(kind="jobset", run_policy={"max_restarts": 4})], "max_restarts 4: all pods start again, from nothing"),
        ([k8s(kind="jobset", labels={"kueue.x-k8s.io/queue-name": "q"})], "is what kubernetes.queue: q writes"),
        ([k8s(kind="jobset")], "scheduled one by one"),
        ([k8s(kind="trainjob")], "recover.attempts does not count in a TrainJob"),
        ([k8s(kind="trainjob", trainer="2.1")], "leaves a pod's security context to the runtime"),
        ([k8s(kind="jobset", run_policy={"restart_policy": "OnFailure"})], "recover.attempts does not count here"),
        ([k8s(elastic={"min": 1, "max": 2}), {"train": OWN}], "max_restarts does"),
    ],
)
def test_what_surprises_is_noted(changes, words):
    assert any(words in note for note in kubernetes.notes(make(*changes)))
    quiet = kubernetes.notes(make(VOLUME))
    assert not any(words in note for note in quiet)


@pytest.mark.parametrize(
    "changes",
    [
        [k8s(kind="jobset", gang={"scheduler": "kai-scheduler"})],
        [k8s(kind="jobset", gang={"by": "kai"})],
        [k8s(kind="jobset", labels={"kueue.x-k8s.io/queue-name": "q"})],
        [k8s(kind="jobset", queue="q", run_policy={"suspend": True, "max_restarts": 2})],
    ],
)
def test_who_starts_all_pods_together_is_known(changes):
    told = kubernetes.notes(make(*changes))
    assert not [note for note in told if "one by one" in note or "would start the job" in note]


def test_a_short_end_is_what_the_pod_gets():
    *_, job = documents("jobset-fields")
    assert first_pod(job)["terminationGracePeriodSeconds"] == 0
    assert kubernetes.grace(plan_of("jobset-fields")) == 0


def test_a_trainjob_is_not_told_that_its_runtime_starts_nothing_again():
    told = [
        kubernetes.notes(make(VOLUME, {"recover": {"attempts": 0}}, k8s(kind=kind)))
        for kind in ("pytorchjob", "jobset", "trainjob")
    ]
    assert [any("the first pod that fails" in note for note in notes) for notes in told] == [True, True, False]


def test_nodes_of_a_trainjob_are_checked_by_a_jobset():
    made = make(k8s(kind="trainjob"), {"preflight": {"stages": ["inventory"]}})
    found = k8s_schema.documents(kubernetes.preflight(made.spec, made).text(kubernetes.ENTRY))
    assert k8s_schema.problems(found) == []
    work = at(found[-1], *WORK)
    assert (found[-1]["kind"], work["backoffLimitPerIndex"]) == ("JobSet", 0)  # one that fails stops no other
    assert "backoffLimit" not in work


def test_pods_are_called_as_their_kind_calls_them(monkeypatch):
    for kind in ("jobset", "trainjob"):
        job = documents(kind)[-1]
        box = job["spec"].get("trainer") or first_pod(job)["containers"][0]
        called = next(row["value"] for row in box["env"] if row["name"] == "DSLAUNCH_PODS")
        monkeypatch.setenv("DSLAUNCH_PODS", called)
        assert pods.waiting("demo", 3) == "pod demo-node-0-3"
        assert kinds.hosts(plan_of(kind).spec) == ["demo-node-0-0.demo", "demo-node-0-1.demo"]
    assert kinds.hosts(make().spec) == ["demo-master-0", "demo-worker-0"]
    assert kinds.hosts(plan_of("elastic").spec) == ["demo-worker-0", "demo-worker-1"]


def test_many_files_are_several_config_maps():
    """What `kubectl apply` can write down of one is 256 KiB."""
    made = make({"env": {f"A{number}": "x" * 9_000 for number in range(20)}})
    config = {**made.config, "long": "y" * 150_000}
    found = kubernetes.manifests(dataclasses.replace(made, config=config))
    assert k8s_schema.problems(found) == []
    assert [one["metadata"]["name"] for one in found[:-1]][:2] == ["demo-bundle", "demo-bundle-1"]


def test_a_preflights_pods_have_names_that_fit():
    job = make(k8s(kind="jobset"), {"name": "a" * 40}).spec
    with pytest.raises(UserError, match=r"over 63 characters"):
        kubernetes.preflight(job, None)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_thousand_pods_are_as_much_text_as_two_and_no_more_work(kind):
    texts = []
    for nodes in (2, 1000):
        made = make(k8s(kind=kind), {"resources": {"nodes": nodes}, "train": {"global_batch": "auto"}})
        began = time.process_time()
        texts.append(kubernetes.render(made).text(kubernetes.ENTRY))
        spent = time.process_time() - began
    assert abs(len(texts[0]) - len(texts[1])) < 200
    assert spent < 0.5


# --- as the pods run it ---------------------------------------------------------------------------


def told(kind, node, address, port):
    """What each operator gives the container, on top of what the manifest says."""
    pet = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": address,
           "PET_MASTER_PORT": str(port)}  # fmt: skip
    master = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return {
        "pytorchjob": {**pet, **master, "RANK": str(node), "WORLD_SIZE": "4"},
        "jobset": {**master, "JOB_COMPLETION_INDEX": str(node)},
        "trainjob": pet,
        "elastic": {**master, "NODE_RANK": str(node), "PET_NNODES": "1:2", "PET_NPROC_PER_NODE": "auto",
                    "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{address}:{port}", "PET_MAX_RESTARTS": "0"},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["pytorchjob", "jobset", "trainjob", "elastic"])
def test_a_pod_knows_its_number_and_the_first_one(tmp_path, kind):
    made = plan_of("elastic-c10d") if kind == "elastic" else make(k8s(kind=kind))
    command, _ = lay_out(kubernetes.render(made).text(kubernetes.ENTRY), tmp_path / "mount")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3"
    fake.write_text("#!/bin/sh\nexec env -0\n")
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "DSLAUNCH_LOGS": str(tmp_path)}
    env |= told(kind, 1, "10.1.2.3", 23456)
    out = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=True).stdout
    found = dict(row.split("=", 1) for row in out.decode().split("\0")[:-1])
    assert (found["NODE_RANK"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("1", "10.1.2.3", "23456")


SHOW = 'echo "here is $RANK of $WORLD_SIZE, $LOCAL_RANK on $GROUP_RANK"'


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_two_pods_are_one_world_of_four_ranks(tmp_path, kind):
    address = own_address()
    if not address or address.startswith("127."):
        pytest.skip("this machine has no address but loopback, and a pod's master is elsewhere")
    made = make(k8s(kind=kind), {"train": {"command": ["bash", "-c", SHOW]}})
    text = kubernetes.render(made).text(kubernetes.ENTRY)
    with socket.socket() as sock:
        sock.bind((address, 0))
        port = sock.getsockname()[1]
    started = []
    for node in range(2):
        command, box = lay_out(text, tmp_path / f"mount-{node}")
        env = {row["name"]: row["value"] for row in box["env"] if "value" in row}
        env |= {"DSLAUNCH_LOGS": str(tmp_path / f"logs-{node}"), "DSLAUNCH_CACHE": str(tmp_path / "cache")}
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        env |= told(kind, node, address, port)
        with (tmp_path / f"log-{node}").open("wb") as log:
            started.append(
                subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True, stdout=log, stderr=log)
            )
    codes, said, _ = finish(tmp_path, started)
    assert codes == [0, 0], said
    for rank in range(4):
        assert f"[rank {rank}] here is {rank} of 4, {rank % 2} on {rank // 2}" in said[rank // 2]


# --- a gang that starts again -----------------------------------------------------------------------


class Gang(Operator):
    """A JobSet as it was rendered: one pod that ends badly ends its Job, and then all pods come again, or none."""

    restarts = 0

    def create(self, node):
        self.env["JOB_COMPLETION_INDEX"], self.env["DSLAUNCH_RESTARTED"] = str(node), str(self.restarts)
        super().create(node)

    def reconcile(self):
        for node, one in list(self.pods.items()):
            code = one.poll()
            if code is None:
                continue
            code = 128 - code if code < 0 else code
            self.codes[node].append(code)
            del self.pods[node]
            if not code:
                continue
            for other in list(self.pods):
                self.pods[other].send_signal(signal.SIGTERM)
            for other in list(self.pods):
                self.delete(other, 15)
                del self.pods[other]
            if code not in kinds.AGAIN:
                self.ended = f"failed: {code}"
                return
            self.restarts += 1
            for other in range(len(self.commands)):
                self.create(other)
            return
        if not self.pods:
            self.ended = "succeeded"


def gang(tmp_path, text, *, nodes=2, attempts=2):
    here = tmp_path / "node"
    here.mkdir()
    for name in POD:
        source = (bundle.NODE / name).read_text()
        for constant, value in (("OWN = 15.0", "OWN = 0.5"), ("HARD = 20.0", "HARD = 2.0"),
                                ("WORDS = 15.0", "WORDS = 0.7"), ("LOOK = 1.0", "LOOK = 0.1"),
                                ("PAUSES = (0.0, 5.0, 15.0)", "PAUSES = (0.0,)")):  # fmt: skip
            source = source.replace(constant, value)
        (here / name).write_text(source)
    (tmp_path / "node.sh").write_text(text)
    command = [sys.executable, "-u", str(here / "pod.py"), "--folder", str(tmp_path / "ckpt" / ".dslaunch" / "demo")]
    command += ["--nodes", str(nodes), "--attempts", str(attempts), "--gang", "--", "bash", str(tmp_path / "node.sh")]
    (tmp_path / "ckpt").mkdir()
    return Gang(tmp_path, [command] * nodes, dict(os.environ, CKPT=str(tmp_path / "ckpt")))


WORKER_DIES = """
trap "exit 143" TERM
if [ "$NODE_RANK" = 1 ]; then sleep 0.3; kill -KILL WHOM; fi
sleep 60 & wait
"""


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["$$", "$PPID"], ids=["its ranks", "the pod"])
def test_a_gang_that_makes_no_progress_is_not_started_for_ever(tmp_path, whom):
    """The pod that fails ends the first one too, which has to count it all the same."""
    job = gang(tmp_path, WORKER_DIES.replace("WHOM", whom), attempts=2)
    assert job.run(120).startswith("failed: ")
    assert job.made[0] == job.made[1] <= 4  # where the decision comes too late, the next start sees it and ends
    assert [one["action"] for one in entries(tmp_path, "decided")][-1] == "stop"
    assert "without a new checkpoint" in entries(tmp_path, "finished")[-1]["why"]
    assert len(entries(tmp_path, "attempt")) in (2, 3)


@pytest.mark.slow
def test_a_gang_that_came_to_its_end_does_not_start_again(tmp_path):
    job = gang(tmp_path, "exit 93\n", nodes=1)
    assert job.run() == "failed: 93"
    assert job.made == [1]
    job.ended, job.restarts = "", 1  # as where another pod's end was seen first, and meant "again"
    assert job.run() == "failed: 93"
    assert len(entries(tmp_path, "attempt")) == 1
    job.ended, job.restarts = "", 0  # a new job of this name
    job.run()
    assert len(entries(tmp_path, "attempt")) == 2


@pytest.mark.slow
def test_a_gang_goes_on_from_what_it_saved(tmp_path):
    text = """
save() { mkdir -p "$CKPT/step$1"; echo "{\\"step\\": $1, \\"files\\": {}}" >"$CKPT/step$1/complete.json"; }
trap "exit 143" TERM
if [ "$NODE_RANK" = 0 ]; then save "$DSLAUNCH_ATTEMPT"; fi
if [ "$NODE_RANK$DSLAUNCH_ATTEMPT" != 13 ] && [ "$NODE_RANK" = 1 ]; then sleep 0.5; kill -KILL $$; fi
[ "$DSLAUNCH_ATTEMPT" = 3 ] || { sleep 60 & wait; }
"""
    job = gang(tmp_path, text, attempts=1)
    assert job.run(120) == "succeeded"
    assert job.made == [4, 4]


# --- in a cluster -------------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path, monkeypatch):
    with fake_kube.serving(tmp_path, monkeypatch) as simulated:
        yield simulated


LAB = "/api/v1/namespaces/lab"
WHERE = {
    "jobset": "/apis/jobset.x-k8s.io/v1alpha2/namespaces/lab/jobsets/demo",
    "trainjob": "/apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainjobs/demo",
}
GROUP = "/apis/scheduling.volcano.sh/v1beta1/namespaces/lab/podgroups/demo"


def record(folder):
    return runs.Record("demo-1", folder, "kubernetes", "lab/demo", "demo", 60, {"per_node": 2})


def submit(folder, *changes):
    made = make(*changes)
    found = kubernetes.render(made)
    (folder / found.entry).write_text(found.text(found.entry))
    return kubernetes.submit(folder, made.spec, run)


def status(*types, ready=0, active=0, **more):
    rows = [{"name": "node", "ready": ready, "active": active, "succeeded": 0, "failed": 0, "suspended": 0}]
    conditions = [{"type": word, "status": "True", "message": f"is {word}"} for word in types]
    return {"conditions": conditions, "replicatedJobsStatus": rows, "jobsStatus": rows, **more}


def put_pod(api, name, node, *, at="01", phase="Running"):
    labels = {"jobset.sigs.k8s.io/jobset-name": "demo", "batch.kubernetes.io/job-completion-index": str(node),
              "app.kubernetes.io/managed-by": "dslaunch"}  # fmt: skip
    metadata = {"labels": labels, "creationTimestamp": f"2026-01-01T00:00:{at}Z"}
    api.put(f"{LAB}/pods/{name}", {"metadata": metadata, "status": {"phase": phase}, "spec": {}})


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHERE)
def test_a_run_from_submission_to_cancellation(api, tmp_path, kind):
    assert submit(tmp_path, VOLUME, k8s(kind=kind)) == "lab/demo"
    created = api.objects[WHERE[kind]]
    assert [one["metadata"]["annotations"][kubernetes.RUN] for one in kinds.templates(created)] == [tmp_path.name]
    mounted = {source["name"] for template in kinds.templates(created) for source in server._sources(template)}
    assert {f"{LAB}/configmaps/{name}" for name in mounted} == set(api.objects) - {WHERE[kind]}
    # a TrainJob's pods cannot be tried: the rest of them is the runtime's
    assert bool(api.asks("POST", f"{LAB}/pods")) is (kind == "jobset")
    one = record(tmp_path)
    for said, state in (
        ({}, State.UNKNOWN),
        (status(active=1), State.PENDING),
        (status(ready=1, active=1), State.RUNNING),
        (status("Suspended"), State.PENDING),
        (status("Completed" if kind == "jobset" else "Complete"), State.COMPLETED),
        (status("Failed"), State.FAILED),
    ):
        api.put(WHERE[kind], {**api.objects[WHERE[kind]], "status": said})
        assert kubernetes.state(one, run).state is state
    api.put(WHERE[kind], {**api.objects[WHERE[kind]], "status": status(ready=1)})
    assert kubernetes.look_up(tmp_path, run) == [("lab/demo", True)]
    put_pod(api, "demo-node-0-0-aaaaa", 0, at="01")
    put_pod(api, "demo-node-0-0-bbbbb", 0, at="09")  # started again
    put_pod(api, "demo-node-0-1-ccccc", 1)
    api.logs = {"demo-node-0-0-aaaaa": [b"[rank 0] old\n"], "demo-node-0-0-bbbbb": [b"[rank 0] new\n"],
                "demo-node-0-1-ccccc": [b"[rank 2] here\n"]}  # fmt: skip
    assert list(kubernetes.logs(one, rank=0, follow=False, run=run)) == ["new"]
    assert sorted(kubernetes.logs(one, rank=None, follow=False, run=run)) == ["[rank 0] new", "[rank 2] here"]
    assert "container=node" in api.asks("GET", "bbbbb/log")[0]
    kubernetes.cancel(one, run)
    assert [path for path in api.objects if "/pods/" not in path] == []
    assert kubernetes.state(one, run).state is State.CANCELLED


@pytest.mark.slow
def test_a_followed_log_goes_on_in_the_pod_that_comes_next(api, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "AGAIN", 0.1)
    submit(tmp_path, k8s(kind="jobset"), {"resources": {"nodes": 1}})
    api.put(WHERE["jobset"], {**api.objects[WHERE["jobset"]], "status": status(ready=1)})
    put_pod(api, "demo-node-0-0-aaaaa", 0, at="01")
    api.logs["demo-node-0-0-aaaaa"] = [("2026-01-01T00:00:01Z", b"[rank 0] first\n"), ("2026-01-01T00:00:02Z", b"")]
    heard = kubernetes.logs(record(tmp_path), rank=0, follow=True, run=run)
    assert next(heard) == "first"
    api.logs["demo-node-0-0-bbbbb"] = [("2026-01-01T00:00:08Z", b"[rank 0] second\n"), ("2026-01-01T00:00:09Z", b"")]
    put_pod(api, "demo-node-0-0-bbbbb", 0, at="07")
    assert next(heard) == "second"
    api.put(WHERE["jobset"], {**api.objects[WHERE["jobset"]], "status": status("Completed")})
    assert list(heard) == []


def test_a_pod_group_comes_before_the_job_and_goes_with_it(api, tmp_path):
    submit(tmp_path, k8s(kind="jobset", gang={"by": "volcano", "queue": "q"}))
    assert api.objects[GROUP]["spec"] == {"minMember": 2, "queue": "q"}
    posted = [path for method, path, query in api.asked if method == "POST" and "dryRun" not in query]
    assert posted.index(GROUP.rpartition("/")[0]) < posted.index(WHERE["jobset"].rpartition("/")[0])
    kubernetes.cancel(record(tmp_path), run)
    assert api.objects == {}


def test_a_cluster_without_volcano_is_said_and_nothing_is_left(api, tmp_path):
    api.script["POST", "/podgroups"] = (404, "404 page not found\n")
    with pytest.raises(UserError, match=r"no PodGroup scheduling.volcano.sh/v1beta1") as caught:
        submit(tmp_path, k8s(kind="jobset", gang={"by": "volcano"}))
    assert caught.value.problems[0].at == ("kubernetes", "gang", "by")
    assert WHERE["jobset"] not in api.objects


@pytest.mark.parametrize("kind", WHERE)
def test_a_cluster_without_the_kind_says_which_one_it_has(api, tmp_path, kind):
    api.script["POST", WHERE[kind].rpartition("/")[0].rpartition("/")[2]] = (404, "404 page not found\n")
    with pytest.raises(UserError, match=f"no {kinds.KINDS[kind].kind}") as caught:
        submit(tmp_path, k8s(kind=kind))
    assert "or kubernetes.kind: pytorchjob" in caught.value.problems[0].hint


def test_two_jobs_of_one_name_keep_their_own_scripts(api, tmp_path):
    """Both find the name free; the one that comes second is refused, and the first one's maps are as they were."""
    for name in "ab":
        (tmp_path / name).mkdir()
    submit(tmp_path / "a", {"env": {"A": "1"}})
    before = copy.deepcopy(api.objects)
    api.script["GET", "/pytorchjobs/demo"] = [(404, {"message": "not found"})]  # as it was a moment ago
    with pytest.raises(UserError, match="another PyTorchJob"):
        submit(tmp_path / "b", {"env": {"A": "2"}})
    assert set(api.objects) == set(before)
    assert {path: one.get("data") for path, one in api.objects.items()} == {
        path: one.get("data") for path, one in before.items()
    }


def test_changes_of_runs_of_two_kinds_are_heard(api, tmp_path):
    records = []
    for kind in ("jobset", "pytorchjob"):
        folder = tmp_path / kind
        folder.mkdir()
        submit(folder, k8s(kind=kind), {"name": kind})
        records.append(runs.Record(kind, folder, "kubernetes", f"lab/{kind}", kind, 60, {"per_node": 2}))
    assert {name: one.state for name, one in kubernetes.states(records, run).items()} == {
        "jobset": State.UNKNOWN, "pytorchjob": State.UNKNOWN,
    }  # fmt: skip
    heard = kubernetes.changes(records, run)
    assert {next(heard)["run"], next(heard)["run"]} == {"jobset", "pytorchjob"}
    heard.close()


def test_a_gang_that_waits_says_what_for():
    job = {**documents("jobset")[-1], "status": status(active=1)}
    said = "Error creating: pods is forbidden: exceeded quota: gpus"
    event = {"involvedObject": {"name": "demo-node-0"}, "reason": "FailedCreate", "type": "Warning", "message": said}
    assert watch.judge(job, [], [{**event, "reason": "FailedCreatePod"}]).detail.startswith("pods cannot be created")
    assert watch.judge(job, [], [event]).detail.startswith("pods cannot be created: Error creating")


# --- asked beforehand ---------------------------------------------------------------------------------


def test_a_dry_run_finds_everything_at_once_and_creates_nothing(api):
    text = kubernetes.render(make(k8s(kind="jobset"))).text(kubernetes.ENTRY)
    assert server.validate(text) == []
    assert api.objects == {}
    assert all("dryRun=All" in query and "fieldValidation=Strict" in query for query in api.asks("POST", ""))
    unknown = (
        'JobSet in version "v1alpha2" cannot be handled: strict decoding error: unknown field "spec.failurePolicy"'
    )
    api.script["POST", "/jobsets"] = (400, {"message": unknown})
    api.script["POST", "/configmaps"] = (403, {"message": "configmaps is forbidden: User cannot create"})
    found = server.validate(text)
    assert [one.at for one in found] == [("kubernetes",), ("kubernetes", "run_policy", "max_restarts")]
    assert "unknown field" in found[1].message


@pytest.fixture
def dslaunch(tmp_path, monkeypatch, capsys):
    """The command's code and words, in this process: the client library alone takes a second to import."""
    monkeypatch.chdir(tmp_path)

    def said(*words):
        monkeypatch.setattr(sys, "argv", ["dslaunch", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pytorchjob", "jobset", "trainjob"])
def test_validation_from_the_command_line(api, tmp_path, kind, dslaunch):
    (tmp_path / "job.yaml").write_text(json.dumps(over(k8s(kind=kind))))
    code, out, err = dslaunch("k8s", "job.yaml", "--validate", "server")
    assert (code, out) == (0, ""), err
    assert "takes it" in err
    assert api.objects == {}
    api.script["POST", kinds.KINDS[kind].plural] = (422, {"message": "spec.nodeSelector: Invalid value"})
    code, _, err = dslaunch("k8s", "job.yaml", "--validate", "server")
    assert code == 2
    assert "kubernetes.node_selector" in err or "job.yaml" in err
    code, out, err = dslaunch("k8s", "job.yaml", "--validate", "client")
    assert (code, out) == (0, ""), err


@pytest.mark.slow
def test_validation_in_a_process_of_its_own(api, tmp_path):
    (tmp_path / "job.yaml").write_text(json.dumps(over(k8s(kind="jobset"))))
    command = [Path(sys.executable).with_name("dslaunch"), "k8s", "job.yaml", "--validate", "server"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "takes it" in done.stderr
