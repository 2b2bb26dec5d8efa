"""Submitting once, watching and reading logs where an API server does what they do. The server is simulated."""

import copy
import json
import random
import threading
import time
from datetime import datetime, timezone

import fake_kube
import pytest

from launcher import plan, runs, spec, yamldoc
from launcher.backends import State, kubernetes
from launcher.backends.kubernetes import api as client
from launcher.backends.kubernetes import output, server, watch
from launcher.errors import Unreachable, UserError
from launcher.node import journal
from launcher.run import run

DEMO = {
    "name": "demo",
    "model": "gpt-demo",
    "container": "ghcr.io/example/train:1",
    "train": {"global_batch": 16, "seq_len": 128, "steps": 60, "zero": 3},
    "resources": {"nodes": 2, "processes_per_node": 2, "cpus_per_node": 4, "memory": "8G"},
}
MADE = plan.make(spec.load(yamldoc.dump([DEMO]), name="job.yaml").spec)
LAB = "/api/v1/namespaces/lab"
JOBS = "/apis/kubeflow.org/v1/namespaces/lab/pytorchjobs"
JOB = f"{JOBS}/demo"


@pytest.fixture
def api(tmp_path, monkeypatch):
    with fake_kube.serving(tmp_path, monkeypatch) as simulated:
        yield simulated


def folder(tmp_path, name="demo-20260101-000000-00000001"):
    (tmp_path / name).mkdir(exist_ok=True)
    bundle = kubernetes.render(MADE)
    (tmp_path / name / bundle.entry).write_text(bundle.text(bundle.entry))
    return tmp_path / name


def record(path, name="demo"):
    return runs.Record(path.name, path, "kubernetes", f"lab/{name}", name, 60, {"per_node": 2})


def conditions(*types):
    return {"conditions": [{"type": word, "status": "True", "message": f"is {word}"} for word in types]}


def job(name="demo", *types, nodes=2):
    found = copy.deepcopy(kubernetes.manifests(MADE)[-1])
    found["metadata"] = {**found["metadata"], "name": name, "uid": f"uid-{name}"}
    found["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = nodes - 1
    return {**found, "status": conditions(*(types or ("Created",)))}


def pod(number, *, of="demo", phase="Pending", gpus=0, **status):
    name = f"{of}-worker-{number - 1}" if number else f"{of}-master-0"
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    labels = {"training.kubeflow.org/job-name": of, "app.kubernetes.io/managed-by": "dslaunch"}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "nodeName": status.pop("node", ""),
            "containers": [{"name": "pytorch", "resources": {"limits": limits}}],
        },
        "status": {"phase": phase, **status},
    }


def container(state, **values):
    return [{"name": "pytorch", "image": "ghcr.io/example/train:1", "state": state, **values}]


def waiting(reason, message=""):
    return container({"waiting": {"reason": reason, "message": message}})


def terminated(code, reason="Error", message=None, at="2026-01-01T00:00:05Z"):
    return container({"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}})


def running(at="2026-01-01T00:00:00Z"):
    return container({"running": {"startedAt": at}})


def unscheduled(message, reason="Unschedulable"):
    return [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]


def warning(name, reason, message, count=1):
    return {"metadata": {"name": f"{name}.{reason}"}, "type": "Warning", "involvedObject": {"name": name},
            "reason": reason, "message": message, "count": count}  # fmt: skip


# --- submitted once ---------------------------------------------------------------------------------


def posts(api):
    return [query for query in api.asks("POST", "/pytorchjobs") if "dryRun" not in query]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_that_is_lost_leaves_one_job_or_none(api, tmp_path, when):
    """Scenario 48, and 38 for Kubernetes."""
    path = folder(tmp_path)
    api.script["POST", "/pytorchjobs"] = [(201, {}), ("lost" if when == "after" else 0, "")]
    with pytest.raises(Unreachable):
        kubernetes.submit(path, MADE.spec, run)
    assert kubernetes.look_up(path, run) == ([("lab/demo", False)] if when == "after" else [])
    assert kubernetes.submit(path, MADE.spec, run) == "lab/demo"
    assert kubernetes.submit(path, MADE.spec, run) == "lab/demo"
    assert len([one for one in api.objects if "/pytorchjobs/" in one]) == 1
    assert len(posts(api)) == (1 if when == "after" else 2)
    api.objects[JOB]["status"] = conditions("Created", "Running")
    assert kubernetes.look_up(path, run) == [("lab/demo", True)]


@pytest.mark.slow
def test_crash_points_of_submit_leave_one_job(api, tmp_path, monkeypatch):
    """Scenarios 48 and 55: whatever is lost at whichever question, trying again ends with one job, and it is ours."""
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    draw = random.Random(7)
    for number in range(15):
        api.objects.clear()
        path = folder(tmp_path, f"demo-{number}")
        faults = [
            draw.choice([(0, ""), ("lost", ""), (500, {"message": "etcd"}), (503, "")])
            for _ in range(draw.randint(1, 3))
        ]
        target = draw.choice([("POST", "/pytorchjobs"), ("POST", "/configmaps"), ("GET", "/pytorchjobs/demo")])
        api.script = {
            target: [*([(201, {})] if target == ("POST", "/pytorchjobs") and draw.random() < 0.5 else []), *faults]
        }
        for _ in range(8):
            try:
                found = kubernetes.submit(path, MADE.spec, run)
                break
            except Unreachable:
                known = {uid["metadata"]["uid"] for name, uid in api.objects.items() if "/pytorchjobs/" in name}
                assert len(known) <= 1
        assert found == "lab/demo"
        api.script = {}
        assert kubernetes.look_up(path, run) == [("lab/demo", False)]
        assert (path / kubernetes.UID).read_text() == api.objects[JOB]["metadata"]["uid"]


def test_the_same_job_by_kubectl_or_another_run_is_adopted_and_journalled(api, tmp_path):
    """Scenario 48: same content, alive."""
    api.put(JOB, {**job(), "metadata": {**job()["metadata"], "uid": "kubectl"}})
    path = folder(tmp_path)
    assert kubernetes.submit(path, MADE.spec, run) == "lab/demo"
    entries, _ = journal.read(path)
    assert [(one["event"], one["why"]) for one in entries] == [("adopted", "kubectl created this very job")]
    assert kubernetes.look_up(path, run) == []  # not one that this run made


def test_a_name_that_is_taken_is_an_error(api, tmp_path):
    """Scenario 48: other content."""
    other = job()
    other["metadata"]["annotations"] = {kubernetes.DIGEST: "else", kubernetes.RUN: "demo-20250101-000000-0000000a"}
    api.put(JOB, other)
    with pytest.raises(UserError, match="the name is taken by run demo-20250101-000000-0000000a"):
        kubernetes.submit(folder(tmp_path), MADE.spec, run)


DENIED = [
    (
        403,
        'pods "demo-x" is forbidden: exceeded quota: team, requested: nvidia.com/gpu=8, used: 8, limited: 8',
        "exceeded quota",
    ),
    (403, 'pods "demo-x" is forbidden: maximum cpu usage per Container is 2, but limit is 4', "maximum cpu usage"),
    (
        403,
        'pods "demo-x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
        "PodSecurity",
    ),
    (403, 'admission webhook "policy.example" denied the request: no', "denied the request"),
    (422, 'Pod "demo-x" is invalid: spec.nodeSelector: Invalid value: "a b"', "nodeSelector"),
]


@pytest.mark.parametrize(("code", "said", "words"), DENIED)
def test_what_admission_denies_is_said_and_nothing_is_created(api, tmp_path, code, said, words):
    """Scenario 50: by a dry run of a pod, which nobody would be told of later."""
    api.script["POST", "/pods"] = (code, {"message": said})
    with pytest.raises(UserError, match=words) as caught:
        kubernetes.submit(folder(tmp_path), MADE.spec, run)
    assert not isinstance(caught.value, Unreachable)
    assert api.objects == {}


def test_a_field_that_is_refused_is_a_line_of_the_job_file(api, tmp_path):
    api.script["POST", "/pods"] = (422, {"message": 'Pod "x" is invalid: spec.nodeSelector: Invalid value: "a b"'})
    with pytest.raises(UserError) as caught:
        kubernetes.submit(folder(tmp_path), MADE.spec, run)
    assert caught.value.problems[0].at == ("kubernetes", "node_selector")


def test_who_may_not_create_pods_submits_all_the_same(api, tmp_path):
    said = 'pods is forbidden: User "u" cannot create resource "pods" in API group "" in the namespace "lab"'
    api.script["POST", "/pods"] = (403, {"message": said})
    assert kubernetes.submit(folder(tmp_path), MADE.spec, run) == "lab/demo"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"apps": ["v1"]}, "there is no kubeflow.org at all"),
        ({"kubeflow.org": ["v2beta1"]}, "it serves kubeflow.org/v2beta1"),
        ({"trainer.kubeflow.org": ["v1alpha1"]}, "it has TrainJobs"),
    ],
)
def test_another_operator_is_named_with_the_one_that_is_wanted(api, tmp_path, groups, words):
    """Scenario 51."""
    api.groups = groups
    api.script["POST", "/pytorchjobs"] = (404, "404 page not found\n")
    with pytest.raises(UserError, match=words) as caught:
        kubernetes.submit(folder(tmp_path), MADE.spec, run)
    assert "training-operator 1.x, which serves kubeflow.org/v1" in caught.value.problems[0].hint
    assert api.objects == {}


# --- what pods wait for, and why they ended -----------------------------------------------------------

PULL = 'Failed to pull image "ghcr.io/example/train:1": not found'
GPUS = (
    "0/12 nodes are available: 4 node(s) had untolerated taint {team: a}, 8 Insufficient nvidia.com/gpu. "
    "preemption: 0/12 nodes are available: 12 Preemption is not helpful for scheduling."
)
REASONS = [
    (
        [pod(0, containerStatuses=waiting("ErrImagePull", PULL))],
        [warning("demo-master-0", "Failed", PULL)],
        "1 of 2 pods cannot pull ghcr.io/example/train:1 (ErrImagePull): Failed",
        "k8s_image_pull",
        False,
    ),
    (
        [pod(0, containerStatuses=waiting("ImagePullBackOff", "Back-off pulling image"))],
        [warning("demo-master-0", "Failed", PULL, 2)],
        "cannot start: 1 of 2 pods cannot pull",
        "k8s_image_pull",
        True,
    ),
    (
        [pod(0, containerStatuses=waiting("InvalidImageName", "couldn't parse"))],
        [],
        "cannot start: ",
        "k8s_image_pull",
        True,
    ),
    (
        [pod(0, containerStatuses=waiting("CreateContainerConfigError", 'secret "hf" not found'))],
        [warning("demo-master-0", "Failed", 'Error: secret "hf" not found', 2)],
        "the Secret hf is missing",
        "k8s_config_error",
        True,
    ),
    (
        [pod(0, containerStatuses=waiting("CreateContainerConfigError", 'configmap "demo-bundle" not found'))],
        [],
        "the ConfigMap demo-bundle is missing",
        "k8s_config_error",
        False,
    ),
    (
        [pod(number, gpus=8, conditions=unscheduled(GPUS)) for number in (0, 1)],
        [],
        "2 of 2 pods cannot be scheduled: 0/12 nodes: 4 have an untolerated taint {team: a}, 8 have fewer than 8 n",
        "k8s_insufficient_gpu",
        False,
    ),
    (
        [pod(0, conditions=unscheduled("0/3 nodes are available: 3 Insufficient memory."))],
        [],
        "3 have too little memory",
        "k8s_insufficient_memory",
        False,
    ),
    (
        [
            pod(
                0,
                conditions=unscheduled(
                    "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
                ),
            )
        ],
        [],
        "3 didn't match Pod's node affinity/selector",
        "k8s_unschedulable",
        False,
    ),
    (
        [
            pod(
                0,
                conditions=unscheduled("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
            )
        ],
        [],
        "unbound immediate PersistentVolumeClaims",
        "k8s_volume_failed",
        False,
    ),
    (
        [pod(0, conditions=unscheduled('persistentvolumeclaim "ckpt" not found'))],
        [],
        '"ckpt" not found',
        "k8s_volume_failed",
        False,
    ),
    (
        [pod(0, phase="Failed", node="n1", containerStatuses=terminated(137, "OOMKilled"))],
        [],
        "ended with 137 on n1: over its memory limit",
        "k8s_oomkilled",
        False,
    ),
    (
        [pod(0, phase="Failed", node="n1", containerStatuses=terminated(137))],
        [],
        "killed from outside, and not for its memory",
        "",
        False,
    ),
    (
        [
            pod(
                0,
                phase="Failed",
                node="n1",
                reason="Evicted",
                message="The node was low on resource: ephemeral-storage.",
            )
        ],
        [],
        "ended with Evicted on n1: The node was low on resource: ephemeral-storage.",
        "k8s_evicted",
        False,
    ),
    (
        [
            pod(
                0,
                phase="Failed",
                node="n1",
                conditions=[
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "preempted by a pod of higher priority",
                    }
                ],
            )
        ],
        [],
        "PreemptionByScheduler on n1: preempted",
        "k8s_evicted",
        False,
    ),
    (
        [
            pod(
                0,
                phase="Running",
                node="n1",
                reason="NodeLost",
                message="Node n1 which was running the pod is unresponsive",
            )
        ],
        [],
        "NodeLost on n1",
        "k8s_node_not_ready",
        False,
    ),
    (
        [
            pod(
                0,
                phase="Running",
                node="n1",
                containerStatuses=running(),
                conditions=[{"type": "Ready", "status": "False"}],
            )
        ],
        [warning("demo-master-0", "NodeNotReady", "Node is not ready")],
        "are on n1, which is not ready",
        "k8s_node_not_ready",
        False,
    ),
    (
        [
            pod(
                0,
                phase="Failed",
                reason="DeadlineExceeded",
                message="Pod was active on the node longer than the deadline",
            )
        ],
        [],
        "DeadlineExceeded",
        "k8s_deadline",
        False,
    ),
    (
        [
            pod(
                1,
                initContainerStatuses=[
                    {
                        "name": "init-pytorch",
                        "image": "alpine:3.10",
                        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}},
                    }
                ],
            )
        ],
        [],
        "in init container init-pytorch cannot pull alpine:3.10",
        "k8s_image_pull",
        False,
    ),
    (
        [pod(0)],
        [warning("demo-master-0", "FailedMount", 'MountVolume.SetUp failed: configmap "x" not found')],
        "cannot mount a volume",
        "k8s_volume_failed",
        False,
    ),
    (
        [],
        [warning("demo", "FailedCreatePod", 'pods "demo-master-0" is forbidden: exceeded quota: team')],
        "pods cannot be created: ",
        "k8s_quota_exceeded",
        False,
    ),
]


@pytest.mark.parametrize(("pods", "events", "words", "cause", "stuck"), REASONS, ids=[row[2][:40] for row in REASONS])
def test_why_pods_wait_or_ended_is_named(pods, events, words, cause, stuck):
    """Scenarios 52 and 53."""
    (found,) = watch.troubles(pods, events, job="demo")
    assert (found.cause, found.stuck) == (cause, stuck)
    status = watch.judge(job(), pods, events)
    assert words in status.detail
    assert status.state is State.PENDING
    assert "\n" not in status.detail


def test_every_cause_that_pods_have_is_one_of_the_table():
    from launcher.diagnose import tables

    named = {cause for cause, _ in (*watch.WAITING.values(), *watch.EVENTS.values())}
    named |= {*watch.ENDED.values(), *watch.TERMINATED.values()} - {""}
    assert named - {""} <= set(tables.read()[0])


def test_the_code_of_a_job_is_that_of_its_ranks_where_the_pod_had_to_say_another():
    """137 is none that ends a job: node/pod.py ends the pod with 9, and says so first."""
    said = "attempt 3 ended with 137; the end: 3 starts without a new checkpoint\nrank 3 on vm was killed"
    found = watch.judge(
        job("demo", "Created", "Failed"), [pod(0, phase="Failed", containerStatuses=terminated(9, "Error", said))]
    )
    assert (found.state, found.code) == (State.FAILED, 137)
    assert "3 starts without a new checkpoint" in found.detail


def test_a_part_of_a_gang_is_named_with_what_the_others_lack():
    """Scenario 52: they hold their GPUs for pods that do not come."""
    pods = [pod(number, phase="Running", containerStatuses=running()) for number in range(3)]
    pods += [pod(number, gpus=8, conditions=unscheduled(GPUS)) for number in range(3, 8)]
    began = datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()
    early = watch.judge(job("demo", "Created", "Running", nodes=8), pods, now=began + 600)
    assert early.detail.startswith("5 of 8 pods cannot be scheduled")
    late = watch.judge(job("demo", "Created", "Running", nodes=8), pods, now=began + 1200)
    assert late.detail.startswith(
        "partial gang: 3 of 8 pods run for 20 min and wait for the others; 5 of 8 pods cannot"
    )


def test_state_names_the_reason_and_evidence_has_it(api, tmp_path):
    """Scenario 53, through the API."""
    path = folder(tmp_path)
    api.put(JOB, job())
    api.put(f"{LAB}/pods/demo-master-0", pod(0, containerStatuses=waiting("ImagePullBackOff", "Back-off pulling")))
    api.put(f"{LAB}/events/e1", warning("demo-master-0", "Failed", PULL, 5))
    found = kubernetes.state(record(path), run)
    assert found.state is State.PENDING
    assert found.detail.startswith("cannot start: 1 of 2 pods cannot pull ghcr.io/example/train:1")
    evidence, troubles = kubernetes.evidence(record(path), run)
    assert evidence.state == "ImagePullBackOff"
    assert [one.cause for one in troubles] == ["k8s_image_pull"]
    api.put(
        f"{LAB}/pods/demo-master-0", pod(0, phase="Failed", node="n1", containerStatuses=terminated(137, "OOMKilled"))
    )
    evidence, _ = kubernetes.evidence(record(path), run)
    assert (evidence.state, evidence.code, dict(evidence.oom_kills)) == ("OOMKilled", 137, {"n1": 1})


def test_a_job_that_kueue_holds_says_what_for(api, tmp_path):
    path, held = folder(tmp_path), job("demo", "Created", "Suspended")
    held["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "team-a"
    api.put(JOB, held)
    said = "couldn't assign flavors to pod set worker: insufficient unused quota for nvidia.com/gpu, 8 more needed"
    row = {"type": "QuotaReserved", "status": "False", "message": said}
    load = {"metadata": {"ownerReferences": [{"uid": "uid-demo"}]}, "status": {"conditions": [row]}}
    api.put("/apis/kueue.x-k8s.io/v1beta2/namespaces/lab/workloads/pytorchjob-demo-1", load)
    assert kubernetes.state(record(path), run).detail == f"suspended: waits in queue team-a: {said}"


@pytest.mark.slow
def test_many_runs_are_three_questions(api, tmp_path):
    records = []
    for number in range(40):
        path = tmp_path / f"run-{number}"
        path.mkdir()
        api.put(f"{JOBS}/demo-{number}", job(f"demo-{number}", "Created", "Running"))
        records.append(record(path, f"demo-{number}"))
    api.asked.clear()
    found = kubernetes.states(records, run)
    assert {one.state for one in found.values()} == {State.RUNNING}
    assert len(found) == 40
    assert len(api.asked) == 3


# --- hearing of it -----------------------------------------------------------------------------------


class Listener(threading.Thread):
    """Follows a namespace in a thread; what it was told, as it came."""

    def __init__(self):
        super().__init__(daemon=True)
        self.said, self.over = [], threading.Event()
        self.start()

    def run(self):
        for change in watch.changes("lab", stop=self.over.is_set):
            self.said.append(change)

    def until(self, state, words="", seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(one["state"] == state and words in one["detail"] for one in self.said):
                return
            time.sleep(0.02)
        raise AssertionError(self.said)


@pytest.fixture
def listener(api, monkeypatch):
    monkeypatch.setattr(watch, "PAUSES", (0.05, 0.2))
    monkeypatch.setattr(watch, "SAID", 1.0)
    threads = []

    def listen():
        threads.append(Listener())
        return threads[-1]

    yield listen
    for one in threads:
        one.over.set()
    api.put(f"{JOBS}/last", job("last", "Created"))  # they look up when something is said
    for one in threads:
        one.join(5)


def test_changes_come_as_they_happen(api, listener):
    api.put(JOB, job())
    heard = listener()
    heard.until("pending", "created")
    api.put(f"{LAB}/pods/demo-master-0", pod(0, gpus=8, conditions=unscheduled(GPUS)))
    heard.until("pending", "nvidia.com/gpu free")
    api.put(f"{LAB}/pods/demo-master-0", pod(0, phase="Running", containerStatuses=running()))
    api.put(JOB, job("demo", "Created", "Running"))
    heard.until("running")
    api.put(JOB, job("demo", "Created", "Succeeded"))
    heard.until("completed")
    assert not any(one["state"] in ("failed", "unknown") for one in heard.said)
    assert len(api.asks("GET", "/pytorchjobs")) == 2  # a list, a watch


@pytest.mark.slow
@pytest.mark.parametrize("how", ["status", "stream", "cut", "429", "500", "reset", "slow"])
def test_a_watch_goes_on_after_whatever_breaks_it(api, listener, how):
    """Scenario 47: 410 both ways, 429 with Retry-After, 5xx, resets and slow answers. Never FAILED."""
    api.put(JOB, job("demo", "Created", "Running"))
    heard = listener()
    heard.until("running")
    if how in ("status", "stream"):
        api.gone_as = how
        api.cut_off()
        api.forget()
    if how == "cut":
        api.cuts[JOBS] = 0
    if how == "429":
        api.script["GET", "/pytorchjobs"] = [(429, {"message": "slow down"}, {"Retry-After": "0.2"})] * 2
        api.cut_off()
    if how == "500":
        api.script["GET", "/pytorchjobs"] = [(500, {"message": "etcd is away"})] * 3
        api.cut_off()
    if how == "reset":
        api.script["GET", "/pytorchjobs"] = [(0, "")] * 3
        api.cut_off()
    if how == "slow":
        api.script["GET", "/pytorchjobs"] = [("slow", 1.0)]
        api.cut_off()
    api.put(JOB, job("demo", "Created", "Succeeded"))
    heard.until("completed")
    assert not any(one["state"] == "failed" for one in heard.said)
    for query in api.asks("GET", "/pytorchjobs"):
        assert "watch" not in query or ("resourceVersion" in query and "allowWatchBookmarks" in query)


@pytest.mark.slow
def test_a_server_that_is_gone_is_unknown_and_comes_back(api, listener):
    """Scenario 47: silence is neither success nor failure."""
    api.put(JOB, job("demo", "Created", "Running"))
    heard = listener()
    heard.until("running")
    api.script["GET", "/pytorchjobs"] = (503, {"message": "no backend"})
    api.cut_off()
    heard.until("unknown", "heard")
    del api.script["GET", "/pytorchjobs"]
    count = len(heard.said)
    end = time.monotonic() + 15
    while time.monotonic() < end and not any(one["state"] == "running" for one in heard.said[count:]):
        time.sleep(0.05)
    assert heard.said[-1]["state"] == "running"
    assert not any(one["state"] == "failed" for one in heard.said)


@pytest.mark.slow
def test_a_token_that_expires_is_read_again(api, listener, tmp_path, monkeypatch):
    """Scenario 49: a rotated token file, while asking and in the middle of a watch."""
    token = tmp_path / "token"
    token.write_text("first")
    fake_kube.configure(tmp_path, monkeypatch, api.server_address[1], user={"tokenFile": str(token)})
    api.token = "first"
    api.put(JOB, job("demo", "Created", "Running"))
    heard = listener()
    heard.until("running")
    token.write_text("second")
    api.token = "second"
    api.cut_off()
    api.put(JOB, job("demo", "Created", "Succeeded"))
    heard.until("completed")
    assert not any(one["state"] in ("unknown", "failed") for one in heard.said)


def test_an_exec_plugin_is_asked_again_after_a_401(api, tmp_path, monkeypatch):
    """Scenario 49: once, and a second 401 is no answer, not a failure."""
    plugin = tmp_path / "plugin"
    word = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "TOKEN"}}
    text = json.dumps(word).replace("TOKEN", '\'"$(wc -l <"$0.count")"\'')
    plugin.write_text(f"#!/bin/bash\necho >>\"$0.count\"\necho '{text}'\n")
    plugin.chmod(0o755)
    user = {"exec": {"apiVersion": word["apiVersion"], "command": str(plugin), "interactiveMode": "Never"}}
    fake_kube.configure(tmp_path, monkeypatch, api.server_address[1], user=user)
    api.put(JOB, job("demo", "Created", "Running"))
    path = folder(tmp_path)
    api.token = "2"  # what the plugin gives the second time
    library_said = client.ask(
        lambda library: library.client.CoreV1Api().list_namespaced_pod("lab", _preload_content=False).status
    )
    assert library_said == 200
    api.token = "never"
    found = kubernetes.state(record(path), run)
    assert (found.state, "401" in found.detail) == (State.UNKNOWN, True)


@pytest.mark.parametrize(
    "reply", [(429, {"message": "slow down"}, {"Retry-After": "1"}), (503, "", {"Retry-After": "1"})]
)
def test_a_retry_after_is_kept(api, tmp_path, reply):
    """Scenario 47."""
    api.put(JOB, job("demo", "Created", "Running"))
    api.script["GET", "/pytorchjobs/demo"] = [reply]
    paused = []
    answer = client.ask(
        lambda library: server._get(library.client.CustomObjectsApi(), "lab", "demo"), sleep=paused.append
    )
    assert answer["metadata"]["name"] == "demo"
    assert 1.0 <= sum(paused) <= 1.5
    api.script["GET", "/pytorchjobs/demo"] = (429, {"message": "slow down"}, {"Retry-After": "3600"})
    with pytest.raises(Unreachable):  # not an hour
        client.ask(lambda library: server._get(library.client.CustomObjectsApi(), "lab", "demo"), sleep=paused.append)


def test_step_is_a_fold():
    """Pure: what was heard twice changes nothing, and what is missing from a list is gone."""
    view, said = watch.step(watch.View(), {"kind": "jobs", "type": "LISTED", "items": [job(), job("other")]})
    assert [(one["job"], one["state"]) for one in said] == [("demo", "pending"), ("other", "pending")]
    view, said = watch.step(view, {"kind": "jobs", "type": "MODIFIED", "object": job()})
    assert said == []
    view, said = watch.step(view, {"kind": "jobs", "type": "SILENT", "why": "no route; heard 12 s ago"})
    assert {one["state"] for one in said} == {"unknown"}
    view, said = watch.step(view, {"kind": "jobs", "type": "LISTED", "items": [job()]})
    assert [(one["job"], one["state"]) for one in said] == [("demo", "pending"), ("other", "unknown")]
    assert "deleted" in said[1]["detail"]


# --- logs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_followed_log_loses_nothing_and_repeats_nothing(api, tmp_path, monkeypatch):
    """Connections break in the middle; lines of one nanosecond are two lines."""
    monkeypatch.setattr(output, "AGAIN", 0.1)
    api.put(JOB, job("demo", "Created", "Running"))
    began = time.time()

    def stamp(number):
        whole = datetime.fromtimestamp(began + number // 20, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{whole}.{number % 20 // 2:09d}Z"

    expected = []
    for node, name in enumerate(("demo-master-0", "demo-worker-0")):
        rows = [(stamp(number), f"[rank {2 * node}] line {number}\n".encode()) for number in range(60)]
        api.logs[name] = [*rows, (stamp(60), b"")]
        expected += [f"[rank {2 * node}] line {number}" for number in range(60)]
    api.cuts = {"log/demo-master-0": 25, "log/demo-worker-0": 7}
    found = []
    heard = kubernetes.logs(record(folder(tmp_path)), rank=None, follow=True, run=run)
    for line in heard:
        found.append(line)
        if len([one for one in found if one]) == 120:
            api.put(JOB, job("demo", "Created", "Succeeded"))
            break
    found += list(heard)
    found = [line for line in found if line]
    assert sorted(found) == sorted(expected)
    for rank in (0, 2):
        mine = [line for line in found if line.startswith(f"[rank {rank}]")]
        assert mine == [f"[rank {rank}] line {number}" for number in range(60)]
    assert any("sinceSeconds" in query for query in api.asks("GET", "demo-master-0/log"))


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1970-01-01T00:00:01Z", 10**9),
        (b"1970-01-01T00:00:01.5Z", 1_500_000_000),
        (b"1970-01-01T01:00:01.000000007+01:00", 1_000_000_007),
        (b"1970-01-01T00:00:01+00:00", 10**9),
        (b"[rank", None),
    ],
)
def test_times_of_lines(text, nanoseconds):
    assert output.when(text) == nanoseconds
