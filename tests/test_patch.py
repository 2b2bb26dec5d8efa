"""Strategic merge patches: Kubernetes' own rules, and what may not be patched away."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import k8s_schema
import pytest
from test_pods import BASE, at, job, k8s, lay, make

from launcher.backends import kubernetes
from launcher.backends.kubernetes import patch, security
from launcher.errors import UserError

POD = {
    "metadata": {"name": "p", "labels": {"a": "b"}, "finalizers": ["x"]},
    "spec": {
        "containers": [
            {
                "name": "pytorch",
                "command": ["run"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"containerPort": 1, "name": "one"}],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "w", "mountPath": "/w"}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
            },
            {"name": "side", "image": "s"},
        ],
        "volumes": [{"name": "v", "emptyDir": {}}, {"name": "w", "hostPath": {"path": "/w"}}],
        "tolerations": [{"key": "a"}, {"key": "b"}],
    },
}
BOX = "spec/containers/pytorch"


def containers(*rows):
    return {"spec": {"containers": list(rows)}}


def box(more):
    return containers({"name": "pytorch", **more})


@pytest.mark.parametrize(
    ("over", "path", "value"),
    [
        ({"metadata": {"labels": {"c": "d"}}}, "metadata/labels", {"a": "b", "c": "d"}),
        ({"metadata": {"labels": {"a": None}}}, "metadata/labels", {}),
        ({"metadata": {"labels": {"$patch": "replace", "c": "d"}}}, "metadata/labels", {"c": "d"}),
        ({"metadata": {"labels": {"$patch": "delete"}}}, "metadata/labels", None),
        ({"metadata": {"finalizers": ["x", "y"]}}, "metadata/finalizers", ["x", "y"]),
        ({"spec": {"tolerations": [{"key": "c"}]}}, "spec/tolerations", [{"key": "c"}]),
        (box({"tty": True}), f"{BOX}/tty", True),
        (box({"tty": True}), f"{BOX}/command", ["run"]),
        (containers({"name": "third", "image": "t"}), "spec/containers/2", {"name": "third", "image": "t"}),
        (containers({"name": "side", "$patch": "delete"}), "spec/containers/side", None),
        (
            containers({"name": "side", "$patch": "replace", "tty": True}),
            "spec/containers/side",
            {"name": "side", "tty": True},
        ),
        (
            box({"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]}),
            f"{BOX}/env",
            [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
        ),
        (
            box({"env": [{"name": "A", "value": None, "valueFrom": {"x": "y"}}]}),
            f"{BOX}/env/A",
            {"name": "A", "valueFrom": {"x": "y"}},
        ),
        (
            box({"env": [{"$patch": "replace"}, {"name": "C", "value": "4"}]}),
            f"{BOX}/env",
            [{"name": "C", "value": "4"}],
        ),
        (
            box({"volumeMounts": [{"mountPath": "/w", "readOnly": True}]}),
            f"{BOX}/volumeMounts",
            [{"name": "v", "mountPath": "/v"}, {"name": "w", "mountPath": "/w", "readOnly": True}],
        ),
        (
            box({"ports": [{"containerPort": 1, "hostPort": 1}]}),
            f"{BOX}/ports",
            [{"containerPort": 1, "name": "one", "hostPort": 1}],
        ),
        (
            box({"resources": {"limits": {"cpu": "2"}}}),
            f"{BOX}/resources/limits",
            {"cpu": "2", "memory": "1Gi"},
        ),
        (
            {"spec": {"volumes": [{"name": "w", "$patch": "replace", "emptyDir": {}}]}},
            "spec/volumes/w",
            {"name": "w", "emptyDir": {}},
        ),
        (
            {"spec": {"dnsConfig": {"options": [{"name": "ndots"}], "$patch": "replace"}}},
            "spec/dnsConfig",
            {"options": [{"name": "ndots"}]},
        ),
    ],
)
def test_merging_is_kubernetes_own(over, path, value):
    before = copy.deepcopy(POD)
    assert at(patch.apply(POD, over), path) == value
    assert before == POD


def of_the_master(**pod):
    return {"spec": {"pytorchReplicaSpecs": {"Master": {"template": {"spec": pod}}}}}


def trainer(**more):
    return of_the_master(containers=[{"name": "pytorch", **more}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"kind": "Job"}, "kind is dslaunch's own"),
        ({"metadata": {"name": "other"}}, "metadata.name is dslaunch's own"),
        ({"spec": {"nprocPerNode": "4"}}, "nprocPerNode is 8"),
        ({"spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 3}}}}, "replicas is 1"),
        ({"spec": {"pytorchReplicaSpecs": {"Worker": None}}}, "replicas is 1"),
        (of_the_master(containers=[{"name": "pytorch", "$patch": "delete"}]), "pytorch is gone"),
        (of_the_master(containers=None), "pytorch is gone"),
        (trainer(command=["sleep"]), "command of pytorch"),
        (trainer(args=["x"]), "args of pytorch"),
        (trainer(env=[{"name": "DSLAUNCH_LOGS", "value": "/x"}]), "DSLAUNCH_LOGS of pytorch"),
        (trainer(volumeMounts=[{"mountPath": "/opt/dslaunch", "$patch": "delete"}]), "/opt/dslaunch of pytorch"),
        (of_the_master(volumes=[{"name": "bundle", "emptyDir": {}}]), "bundle has the scripts"),
        (trainer(resources={"limits": {"nvidia.com/gpu": 4}}), "nvidia.com/gpu is 8"),
        (trainer(resources={"limits": {"nvidia.com/gpu": None}}), "nvidia.com/gpu is 8"),
        (trainer(resources={"limits": {"nvidia.com/mig-1g.10gb": 4}}), "a GPU that the plan has not"),
        (trainer(resources=None), "nvidia.com/gpu is 8"),
        (
            of_the_master(containers=[{"name": "b", "image": "i", "resources": {"limits": {"nvidia.com/gpu": 1}}}]),
            "nvidia.com/gpu of another container",
        ),
        (trainer(env=[{"name": "MASTER_ADDR", "value": "x"}]), "MASTER_ADDR cannot be set"),
        (trainer(env=[{"name": "PET_NNODES", "value": "2"}]), "PET_NNODES cannot be set"),
        (trainer(env=[{"name": "WANDB_API_KEY", "value": "x"}]), "looks like a secret"),
        ({"metadata": {"labels": {"app.kubernetes.io/name": "x"}}}, "label app.kubernetes.io/name"),
        (of_the_master(containers=[{"tty": True}]), "without name"),
        (of_the_master(**{"$setElementOrder/containers": []}), "is not done here"),
        (of_the_master(affinity={"$patch": "remove"}), "$patch remove is none"),
    ],
)
def test_what_dslaunch_counts_on_stays(over, words):
    with pytest.raises(UserError, match="patch") as caught:
        job(k8s(patch=over))
    assert any(words in problem.message for problem in caught.value.problems)


def test_all_that_is_wrong_is_told_at_once():
    over = lay(trainer(command=["sleep"]), {"kind": "Job"})
    with pytest.raises(UserError) as caught:
        job(k8s(patch=over))
    assert len(caught.value.problems) == 2


def test_a_patch_of_every_pod_is_held_to_the_same():
    over = {"spec": {"hostPID": True, "containers": [{"name": "pytorch", "tty": True}]}}
    made = job(k8s(pod_patch=over))
    for role in ("Master", "Worker"):
        assert at(made, f"spec/pytorchReplicaSpecs/{role}/template/spec/containers/pytorch/tty") is True
    with pytest.raises(UserError) as caught:
        job(k8s(pod_patch={"spec": {"containers": [{"name": "pytorch", "command": ["sleep"]}]}}))
    assert caught.value.problems[0].at[:2] == ("kubernetes", "pod_patch")


@pytest.mark.parametrize(
    "change", [k8s(patch=of_the_master(hostNetwork=True)), k8s(pod_patch={"spec": {"hostPID": True}})]
)
def test_what_a_patched_pod_needs_of_its_namespace_is_told(change):
    told = kubernetes.notes(make(change))
    assert [note for note in told if f"{security.LABEL}=privileged" in note]


@pytest.mark.slow
def test_lint_judges_what_a_patch_makes(tmp_path):
    def run(over):
        (tmp_path / "job.yaml").write_text(json.dumps(lay(BASE, k8s(**over))))
        return dslaunch("k8s", "job.yaml", cwd=tmp_path)

    typo = run({"patch": of_the_master(tolleration=[])})
    assert (typo.returncode, "tolleration" in typo.stderr, "job.yaml:1:" in typo.stderr) == (2, True, True)
    typo = run(
        {
            "pod_patch": {
                "spec": {"containers": [{"name": "pytorch", "env": [{"name": "NCCL_DEBGU", "value": "INFO"}]}]}
            }
        }
    )
    assert (typo.returncode, "note: kubernetes.pod_patch: " in typo.stderr) == (0, True), typo.stderr
    assert "NCCL_DEBGU" in typo.stderr
    fine = run({"patch": of_the_master(dnsConfig={"options": [{"name": "ndots", "value": "1"}]})})
    assert (fine.returncode, "kubernetes.patch" in fine.stderr) == (0, False), fine.stderr


def test_a_patch_changes_the_digest_that_tells_jobs_apart():
    first, second = job(), job(k8s(patch=trainer(tty=True)))
    marks = [made["metadata"]["annotations"]["dslaunch.dev/digest"] for made in (first, second)]
    assert len(set(marks)) == 2
    assert at(second, "spec/pytorchReplicaSpecs/Worker/template/spec/containers/pytorch/tty") is None


def dslaunch(*words, cwd):
    command = [str(Path(sys.executable).with_name("dslaunch")), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_patch_file_lies_beside_the_job_file_and_is_pointed_into(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text(json.dumps(lay(BASE, k8s(patch="over.yaml"))))
    file = tmp_path / "jobs" / "over.yaml"
    file.write_text("spec:\n  runPolicy:\n    ttlSecondsAfterFinished: 600\n")
    found = dslaunch("k8s", "jobs/job.yaml", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert k8s_schema.documents(found.stdout)[-1]["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == 600
    file.write_text("metadata:\n  name: other\n")
    wrong = dslaunch("k8s", "jobs/job.yaml", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "over.yaml:2:3" in wrong.stderr
    file.write_text("- a\n")
    assert "is no mapping" in dslaunch("k8s", "jobs/job.yaml", cwd=tmp_path).stderr
    file.unlink()
    gone = dslaunch("k8s", "jobs/job.yaml", cwd=tmp_path)
    assert (gone.returncode, "over.yaml" in gone.stderr) == (2, True)
