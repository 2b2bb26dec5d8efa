"""A site file from what a scheduler says: every value has a reason, what is not certain stays a comment."""

from __future__ import annotations

import pytest
from test_slurm import Site, site  # noqa: F401 - a fixture

from launcher import profile, spec

CONFIG = (
    "SLURM_VERSION           = 23.11.10\nSelectType              = select/cons_tres\nMpiDefault              = pmix\n"
)
NODES = """\
devel*   (null)                  48   92000   4    (null)
booster  gpu:a100-80gb:4(S:0-1)  96   500000+ 900  a100,nvme
booster  gpu:a100-80gb:4(S:0-1)  96   1000000 36   a100,large
"""
PARTITIONS = "PartitionName=booster MaxTime=1-00:00:00 OverSubscribe=EXCLUSIVE State=UP\n"
SAID = {
    "config": CONFIG, "nodes": NODES, "partitions": PARTITIONS, "accounts": "lab|normal|normal\n",
    "srun": "  --container-image=PATH\n", "programs": "apptainer\nmodule\n",
}  # fmt: skip


def values(found: profile.Profile) -> dict[str, object]:
    return {".".join(item.path): item.value for item in found.items}


def test_slurm_is_read_from_its_own_words():
    found = values(profile.slurm(SAID))
    assert found == {
        "site.backend": "slurm", "slurm.version": "23.11.10", "slurm.partition": "booster",
        "slurm.gpus_as": "gpus-per-node", "slurm.gpu_type": "a100-80gb", "resources.gpus_per_node": 4,
        "resources.gpu": "a100-80gb", "resources.cpus_per_node": 96, "resources.memory": "475000M",
        "resources.fabric": None, "slurm.account": "lab", "slurm.exclusive": True, "container.runtime": "pyxis",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "key", "value"),
    [
        ({"config": CONFIG.replace("cons_tres", "linear")}, "slurm.gpus_as", "gres"),
        ({"config": ""}, "slurm.version", None),
        ({"accounts": "lab|a|a\nother|a|a\n"}, "slurm.account", None),
        ({"accounts": ""}, "slurm.account", None),
        ({"srun": "  --environment=FILE"}, "container.runtime", "edf"),
        ({"srun": ""}, "container.runtime", "apptainer"),
        ({"nodes": "cpu* (null) 8 16000 2 (null)\n"}, "resources.gpus_per_node", 0),
        ({"nodes": ""}, "slurm.partition", None),
        ({"nodes": NODES.replace("a100-80gb", "weird")}, "resources.gpu", None),
    ],
)
def test_what_is_said_otherwise_is_concluded_otherwise(changed, key, value):
    assert values(profile.slurm({**SAID, **changed}))[key] == value


def test_a_partition_that_is_asked_for_is_taken():
    assert values(profile.slurm(SAID, partition="devel"))["resources.gpus_per_node"] == 0
    assert "sinfo knows no partition nope" in profile.slurm(SAID, partition="nope").remarks


CLUSTER = {
    "groups": {"groups": [{"name": name} for name in ("apps", "kubeflow.org", "jobset.x-k8s.io", "kueue.x-k8s.io")]},
    "nodes": {
        "items": [
            {
                "metadata": {"labels": {profile.PRODUCT: "NVIDIA-H100-80GB-HBM3"}},
                "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
                "status": {"allocatable": {"cpu": "192", "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}},
            }
        ] * 3
        + [{"metadata": {}, "status": {"allocatable": {"cpu": "4"}}}]
    },
    "queues": {"items": [{"metadata": {"name": "research"}}]},
    "namespace": {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    "claims": {"items": [{"metadata": {"name": "shared"}}]},
}  # fmt: skip


def test_kubernetes_is_read_from_its_api():
    found = profile.kubernetes(CLUSTER, namespace="lab")
    assert values(found) == {
        "site.backend": "kubernetes", "kubernetes.namespace": "lab", "kubernetes.kind": "pytorchjob",
        "kubernetes.queue": "research", "resources.gpus_per_node": 8, "resources.gpu": "h100-80gb",
        "kubernetes.node_selector": {profile.PRODUCT: "NVIDIA-H100-80GB-HBM3"},
        "kubernetes.network": {"resources": {"vpc.amazonaws.com/efa": "32"}},
        "kubernetes.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "resources.fabric": None,
    }  # fmt: skip
    assert "namespace lab enforces Pod Security restricted" in found.remarks
    assert "jobset is there as well: the cluster serves jobset.x-k8s.io" in found.remarks


def test_an_api_server_that_says_nothing_leaves_only_comments():
    found = profile.kubernetes({}, namespace="lab")
    assert values(found) == {
        "site.backend": "kubernetes", "kubernetes.namespace": "lab", "kubernetes.kind": None,
        "resources.gpus_per_node": None,
    }  # fmt: skip


@pytest.mark.parametrize("found", [profile.slurm(SAID), profile.kubernetes(CLUSTER, namespace="lab")])
def test_the_text_is_a_site_file(found):
    text = profile.text(found, head="here")
    read = spec.load("name: demo\n", name="job.yaml", site=("site.yaml", text)).spec
    assert read.site.backend in ("slurm", "kubernetes")
    assert read.resources.gpus_per_node in (4, 8)


def test_names_of_a_cluster_cannot_break_out_of_a_comment():
    hostile = {**SAID, "nodes": "a\x1b[2J* gpu:x\u2028y:4 8 16000 2 (null)\n", "accounts": "x\ny|a|a\n"}
    text = profile.text(profile.slurm(hostile), head="here\nname: evil")
    assert "\x1b" not in text
    assert not any(line.startswith("name:") for line in text.splitlines())


def test_a_real_slurm_fills_a_profile_that_loads(site):  # noqa: F811
    done = site.dslaunch("probe", "--site", "slurm")
    assert done.returncode == 0, done.stderr
    found = spec.load("name: demo\n", name="job.yaml", site=("site.yaml", done.stdout)).spec
    assert (found.slurm.partition, found.slurm.gpu_type, found.resources.gpus_per_node) == ("main", "fake", 2)
    assert found.slurm.version.startswith("22.05")
