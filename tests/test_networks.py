"""Network profiles: what a fabric's pods ask for, and which rights they take."""

from __future__ import annotations

import json

import k8s_schema
import pytest
from test_patch import dslaunch
from test_pods import at, k8s, make, render, template

from launcher import facts
from launcher.backends import kubernetes
from launcher.backends.kubernetes import network, security
from launcher.errors import UserError

ROOT = k8s(security={"root": True})
GRANTED = {
    "gcp-tcpx": [ROOT, k8s(security={"allow_ipc_lock": True})],
    "gcp-tcpxo": [ROOT],
    "oci": [ROOT, k8s(security={"privileged": True}), k8s(network={"host_network": True})],
    "oci-vf": [ROOT, k8s(security={"privileged": True})],
}
BOX = "spec/containers/pytorch"


def on(fabric, gpu="h100"):
    return {"resources": {"fabric": fabric, "gpu": gpu, "gpus_per_node": 4 if gpu in ("gb200", "gb300") else 8}}


def named(profile, **more):
    return k8s(network={"profile": profile, **more})


def limits(*changes):
    return at(template(*changes), f"{BOX}/resources/limits")


@pytest.mark.slow
@pytest.mark.parametrize("name", network.profiles())
def test_every_row_makes_pods_that_a_strict_server_takes(name):
    documents = render(named(name), *GRANTED.get(name, ()))
    assert k8s_schema.problems(documents) == []
    row = network.profiles()[name]
    assert row.recipe
    assert set(row.fabrics) <= set(facts.fabric_names())
    used = [
        *row.ranks.get("mounts", {}).values(),
        *(mount for one in row.sidecars for mount in one["mounts"].values()),
    ]
    assert set(used) == set(row.volumes)


def test_a_fabric_has_one_profile():
    fabrics = [fabric for row in network.profiles().values() for fabric in row.fabrics]
    assert len(fabrics) == len(set(fabrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fabric", "gpu", "resource", "count"),
    [
        ("efa", "a100", "vpc.amazonaws.com/efa", "4"),
        ("efa", "h100", "vpc.amazonaws.com/efa", "32"),
        ("efa", "b200", "vpc.amazonaws.com/efa", "8"),
        ("coreweave", "h100", "rdma/ib", "1"),
        ("azure-nd", "h100", "rdma/ib", "8"),
    ],
)
def test_a_fabric_brings_the_devices_of_its_nodes(fabric, gpu, resource, count):
    assert limits(on(fabric, gpu))[resource] == count
    assert resource not in limits(on(fabric, gpu), named("none"))
    assert limits(on(fabric, gpu), k8s(network={"devices": 2}))[resource] == "2"
    assert limits(on(fabric, gpu), k8s(network={"resources": {resource: 3}}))[resource] == "3"


def test_an_instance_type_says_it_where_its_gpu_does_not():
    label = "node.kubernetes.io/instance-type"
    for machine, count in (("p5e.48xlarge", "32"), ("p5en.48xlarge", "16"), ("ml.p5en.48xlarge", "16")):
        found = limits(on("efa", "h200"), k8s(node_selector={label: machine}))
        assert found["vpc.amazonaws.com/efa"] == count


def test_ethernet_and_one_node_need_nothing():
    plain = set(limits())
    assert set(limits(on("efa"), {"resources": {"nodes": 1}})) == plain == {"memory", "nvidia.com/gpu"}


@pytest.mark.parametrize(
    ("change", "where", "words", "hint"),
    [
        (on("efa", "h200"), "devices", "not known for h200-141gb", "p5e with 32"),
        (named("efaa"), "profile", "no network profile `efaa`", "efa"),
        (k8s(network={"devices": 8}), "devices", "which resource", "--networks"),
        (k8s(network={"resources": {"hca": 8}}), "resources.hca", "no domain", "rdma/hca"),
        (on("oci"), "resources.fabric", "needs rights", "security.privileged: true"),
        (named("oci"), "profile", "needs rights", "network.host_network: true"),
        (on("gcp-tcpxo"), "resources.fabric", "needs rights", "security.root: true"),
        ((on("gcp-tcpxo"), ROOT, k8s(network={"multus": ["a"]})), "multus", "1 networks", "vpc1"),
        ((on("gcp-gib", "h200"), k8s(network={"multus": ["a"]})), "multus", "1 networks", "gvnic-1, rdma-0"),
        (
            k8s(network={"multus": ["a"]}, pod_annotations={network.MULTUS: "b"}),
            f"kubernetes.pod_annotations.{network.MULTUS}",
            "which it writes",
            "one of both",
        ),
        ((on("gcp-gib", "h200"), k8s(network={"host_network": True})), "host_network", "interfaces of", "both"),
        (
            (named("gcp-gib"), k8s(volumes=[{"mount": "/usr/local/gib", "claim": "c"}])),
            "kubernetes.volumes.0.mount",
            "brought by network profile gcp-gib",
            "another",
        ),
        ((named("gcp-gib"), k8s(volumes=[{"mount": "/x", "claim": "c", "name": "gib"}])), "kubernetes.volumes.0.name",
         "there already", "another"),
    ],
)  # fmt: skip
def test_what_a_network_lacks_is_refused_with_what_would_do(change, where, words, hint):
    with pytest.raises(UserError) as caught:
        render(*(change if isinstance(change, tuple) else (change,)))
    found = {".".join(map(str, problem.at)): problem for problem in caught.value.problems}
    problem = found[where if where.startswith(("kubernetes.", "resources.f")) else f"kubernetes.network.{where}"]
    assert words in problem.message
    assert hint in (problem.hint or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fabric", "gpu", "first", "last"),
    [("gcp-tcpx", "h100", "vpc1", ("eth4", "vpc4")), ("gcp-tcpxo", "h100", "vpc1", ("eth8", "vpc8")),
     ("gcp-gib", "h200", "rdma-0", ("eth9", "rdma-7")), ("gcp-gib", "gb200", "rdma-0", ("eth5", "rdma-3"))],
)  # fmt: skip
def test_pods_on_gke_get_an_interface_for_each_nic(fabric, gpu, first, last):
    rights = GRANTED.get(fabric, ())
    found = at(template(on(fabric, gpu), *rights), "metadata/annotations")
    rows = json.loads(found[network.GKE])
    assert rows[0] == {"interfaceName": "eth0", "network": "default"}
    assert rows[1]["network"] == first
    assert (rows[-1]["interfaceName"], rows[-1]["network"]) == last
    names = [f"nic-{number}" for number in range(len(rows) - 1)]
    mine = at(template(on(fabric, gpu), *rights, k8s(network={"multus": names})), "metadata/annotations")
    assert [row["network"] for row in json.loads(mine[network.GKE])][1:] == names
    assert network.MULTUS not in mine


def test_one_network_more_leads_and_nccl_meets_over_it():
    """As Google's recipes for a3-ultra and a4 attach them: the second gVNIC, then the RDMA NICs."""
    names = ["gvnic-1", *(f"rdma-{number}" for number in range(8))]
    made = template(on("gcp-gib", "b200"), k8s(network={"multus": names}))
    rows = json.loads(at(made, "metadata/annotations")[network.GKE])
    assert [(row["interfaceName"], row["network"]) for row in rows] == [
        ("eth0", "default"), *((f"eth{number}", name) for number, name in enumerate(names, 1))
    ]  # fmt: skip
    assert at(made, f"{BOX}/env/NCCL_SOCKET_IFNAME/value") == "eth0,eth1"
    mine = template(on("gcp-gib", "b200"), k8s(network={"multus": names}), {"env": {"NCCL_SOCKET_IFNAME": "eth1"}})
    assert at(mine, f"{BOX}/env/NCCL_SOCKET_IFNAME") is None  # the script exports it
    assert at(template(on("gcp-gib", "b200")), f"{BOX}/env/NCCL_SOCKET_IFNAME") is None


def test_annotations_of_the_user_stay():
    rows = '[{"interfaceName":"eth0","network":"default"}]'
    made = template(on("gcp-gib", "h200"), k8s(pod_annotations={network.GKE: rows}))
    assert made["metadata"]["annotations"] == {network.GKE_DEFAULT: "eth0", network.GKE: rows}
    made = template(named("rdma-hostdev"), k8s(pod_annotations={network.MULTUS: "a"}))
    assert made["metadata"]["annotations"] == {network.MULTUS: "a"}


def test_claims_bring_the_nics_of_a_gb300():
    made = template(on("gcp-gib", "gb300"), k8s(network={"claims": ["channel", "mrdma"]}))
    assert "annotations" not in made["metadata"]
    assert [one["resourceClaimTemplateName"] for one in made["spec"]["resourceClaims"]] == ["channel", "mrdma"]


def test_a_daemon_runs_beside_the_ranks_with_rights_of_its_own():
    made = template(on("gcp-tcpxo"), ROOT)["spec"]
    [daemon] = made["initContainers"]
    assert (daemon["name"], daemon["restartPolicy"]) == ("tcpxo-daemon", "Always")
    assert daemon["securityContext"]["capabilities"]["add"] == ["NET_ADMIN", "NET_BIND_SERVICE"]
    ranks = made["containers"][0]
    assert "add" not in ranks["securityContext"]["capabilities"]
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:" in ranks["command"][-1]
    assert security.admits(security.violations(made)) == "privileged"
    [note] = [note for note in kubernetes.notes(make(on("gcp-tcpxo"), ROOT)) if security.LABEL in note]
    assert "NET_ADMIN" in note
    assert "/home/kubernetes/bin/nvidia/lib64" in note


def test_virtual_functions_are_attached_as_often_as_they_are_asked_for():
    found = template(named("rdma-hostdev", devices=3))
    assert at(found, f"{BOX}/resources/limits")["nvidia.com/hostdev"] == "3"
    assert found["metadata"]["annotations"][network.MULTUS] == "hostdev-net, hostdev-net, hostdev-net"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([on("infiniband")], "names no device"),
        ([on("infiniband"), k8s(network={"resources": {"rdma/hca": 8}})], None),
        ([on("infiniband"), named("none")], None),
        ([on("ethernet")], None),
        ([on("azure-nd")], "security.allow_ipc_lock"),
        ([on("azure-nd"), k8s(security={"allow_ipc_lock": True})], None),
        ([on("nvl72", "gb200")], "network.claim_template"),
        ([on("nvl72", "gb200"), k8s(network={"claim_template": "cd"})], None),
        ([on("gcp-gib", "gb200")], "network.claim_template"),
        ([on("gcp-gib", "gb300")], "network.claims"),
        ([on("gcp-gib", "gb300"), k8s(network={"claims": ["cd", "nics"]})], None),
        ([on("gcp-gib", "h200")], None),
        ([k8s(network={"host_network": True})], "NCCL_SOCKET_IFNAME"),
        ([k8s(network={"host_network": True}), {"env": {"NCCL_SOCKET_IFNAME": "eth0"}}], None),
    ],
)
def test_what_some_clusters_want_is_told(changes, words):
    told = [
        note
        for note in kubernetes.notes(make(*changes))
        if any(word in note for word in ("names no device", "network profile", "shows NCCL"))
    ]
    assert len(told) == (words is not None)
    assert all(words in note for note in told)


def test_ports_lie_between_the_registered_and_those_of_services():
    """Two for each job: the rendezvous, and the preflight's beside it."""
    ports = {network.port(f"job-{number}") for number in range(2000)}
    assert all(20_000 <= port < 30_000 and port % 2 == 0 for port in ports)
    assert len(ports) > 1600  # of 2,000 names on 5,000 places
    assert network.port("demo") == 29412


@pytest.mark.slow
def test_the_list_says_what_each_brings_and_where_that_was_read():
    found = dslaunch("presets", "--networks", cwd="/")
    assert found.returncode == 0
    for name, row in network.profiles().items():
        assert f"\n{name}" in f"\n{found.stdout}"
        assert row.recipe.split(",")[0] in found.stdout
    rows = json.loads(dslaunch("presets", "--networks", "--json", cwd="/").stdout)
    assert [row["name"] for row in rows] == list(network.profiles())
