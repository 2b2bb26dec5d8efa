"""Networks as data: what each emits, what it must not, how fast it has to be. `--bless` writes the .env files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import bundle, envlint, expected, facts, nccl, spec
from launcher.errors import UserError

ENVS = Path(__file__).parent / "data/fabrics"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
FABRICS = facts.fabric_names()
GPU = {"nvl72": "gb200", "azure-gb200": "gb200", "rocm": "mi300x", "slingshot": "a100-40gb", "gloo": ""}
GCP_TCPX = 15  # its plugin has no script of settings to source, so every one is here


def job(name: str, gpu: str | None = None, **env: str) -> spec.JobSpec:
    """Two nodes on a fabric; one for what ends at a node, without GPUs for what has none."""
    row = facts.fabric(name)
    gpu = GPU.get(row.name, "h100") if gpu is None else gpu
    gpus = f"gpu: {gpu}, gpus_per_node: {4 if 'gb200' in gpu else 8}, " if gpu else ""
    nodes = 1 if row.only == "node" else 2
    text = {
        "name": "demo",
        "model": "gpt-demo",
        "train": {"script": "a.py"},
        "env": env,
    }
    resources = f"resources: {{nodes: {nodes}, {gpus}fabric: {name}}}\n"
    return spec.load(yaml.safe_dump(text) + resources, name="job.yaml").spec


def script(name: str, gpu: str | None = None, **env: str) -> str:
    return "\n".join(bundle.exports(nccl.variables(job(name, gpu, **env)))) + "\n"


@pytest.mark.parametrize("name", FABRICS)
def test_the_environment_of_a_fabric_is_the_file(name, request):
    file = ENVS / f"{name}.env"
    if request.config.getoption("--bless"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script(name))
    assert file.read_text() == script(name), f"{file.name} is not what dslaunch emits: pytest --bless"


def test_nothing_else_lies_beside_them():
    assert {path.stem for path in ENVS.iterdir()} == set(FABRICS)


@pytest.mark.parametrize("name", FABRICS)
def test_an_environment_is_short(name):
    base = {"DS_ACCELERATOR"} | set(facts.every_network().variables)
    own = {row.name for row in nccl.variables(job(name)).rows} - base
    assert len(own) <= (GCP_TCPX if name == "gcp-tcpx" else 12)


@pytest.mark.parametrize("gpu", ["v100", "a100", "a100-40gb", "h100", "h200", "b200", "gb200", "mi300x", "mi250x"])
@pytest.mark.parametrize("name", FABRICS)
def test_a_fabric_emits_nothing_that_it_forbids(name, gpu):
    row = facts.fabric(name)
    given = [envlint.Assignment(key, value) for key, (value, _) in row.emits(facts.gpu(gpu)).items()]
    forbidden = {
        key for key, (value, _) in row.emits(facts.gpu(gpu)).items() if {key, f"{key}={value}"} & banned(row)
    }
    assert forbidden == set()
    worst = [one for one in envlint.judge(given, fabric=row, gpu=facts.gpu(gpu)) if one.severity == "error"]
    assert worst == []


def banned(row: facts.Fabric) -> set[str]:
    return {*row.never, *row.breaks}


@pytest.mark.parametrize("name", FABRICS)
def test_every_row_says_what_must_not_be_set_and_where_it_is_from(name):
    row = facts.fabric(name)
    assert row.never
    assert row.source
    assert row.title
    assert row.detect
    assert all(len(why) > 9 for why in (*row.never.values(), *row.breaks.values()))
    assert all(one["why"] for one in (*row.variables.values(), *row.setup))
    assert "other" in row.nominal
    if any(one.get("rdma", "none") != "none" or "driver" in one for one in row.detect) and name != "sharp":
        assert row.breaks, "what would take RDMA away silently"


@pytest.mark.parametrize("name", FABRICS)
def test_every_threshold_states_size_and_source(name):
    for row in facts.fabric(name).expected:
        assert 0 < row.excludes < row.passes
        assert row.size >= 1
        assert row.source
        assert row.measured
        assert all(facts.gpu(gpu).name == gpu for gpu in row.gpus)
        assert (
            row.passes <= 1.3 * row.wire or not row.wire or row.nodes == [2, 2]
        )  # two nodes: a tree sends 0.53 of it
        if row.measured == "none":
            assert row.source.startswith("derived")
    for passes, excludes in facts.fabric(name).share.values():
        assert 0.4 < excludes < passes < 1


def test_variables_of_nccl_are_ones_it_reads():
    """`NCCL_*` that a row emits or forbids stands in the catalogue."""
    known = {*envlint.catalogue()["variables"], *envlint.catalogue()["others"]}
    for row in (facts.every_network(), *facts.fabrics().values()):
        for key in (*row.variables, *(key.partition("=")[0] for key in banned(row))):
            plugin = any(key.startswith(prefix) for prefix in envlint.catalogue()["prefixes"])
            assert not key.startswith(("NCCL_", "TORCH_NCCL_")) or key in known or plugin, f"{row.name}: {key}"


# --- on a node ----------------------------------------------------------------------------------------------


def run(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -eo pipefail\n{text}env"],
        capture_output=True, text=True, env={"PATH": "/bin:/usr/bin", **env}, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FABRICS)
def test_the_lines_run_and_pass_shellcheck(name):
    for gpu in ("", "a100", "h100") if not facts.fabric(name).only else (None,):
        text = "#!/usr/bin/env bash\n" + script(name, gpu)
        checked = subprocess.run([SHELLCHECK, "-s", "bash", "-e", "SC1090,SC1091", "-"], input=text,
                                 capture_output=True, text=True, check=False)  # fmt: skip
        assert checked.returncode == 0, checked.stdout
    done = run(script(name), LD_LIBRARY_PATH="/mine/lib")
    if name in ("gcp-tcpxo", "gcp-gib"):  # this is no such machine
        assert done.returncode == 1
        return
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    for row in nccl.variables(job(name)).rows:
        assert found[row.name] == row.value
    assert found["LD_LIBRARY_PATH"].endswith("/mine/lib"), "what the user had is kept"


def test_vendors_scripts_are_sourced_and_the_user_has_the_last_word(tmp_path):
    text = script("gcp-gib", NCCL_IB_TC="7").replace("/usr/local/gib", str(tmp_path))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/set_nccl_env.sh").write_text("export NCCL_IB_TC=52 NCCL_IB_QPS_PER_CONNECTION=4\nfalse\n")
    done = run(text)
    assert done.returncode == 0, done.stderr
    assert {"NCCL_IB_TC=7", "NCCL_IB_QPS_PER_CONNECTION=4", "NCCL_NET=gIB"} <= set(done.stdout.splitlines())
    assert f"LD_LIBRARY_PATH={tmp_path}/lib64" in done.stdout


def test_a_topology_file_that_is_not_there_is_not_named():
    assert "NCCL_TOPO_FILE" not in run(script("azure-nd")).stdout
    here = script("azure-nd").replace("/opt/microsoft/ndv5-topo.xml", __file__)
    assert f"NCCL_TOPO_FILE={__file__}" in run(here).stdout
    assert "ndv4" in script("azure-nd", "a100")


def test_the_interface_of_gloo_is_the_routed_one():
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    routed = next((row[0] for row in routes if row[1] == "00000000"), None)
    expected_lines = {f"GLOO_SOCKET_IFNAME={routed}"} if routed else set()
    found = {line for line in run(script("gloo")).stdout.splitlines() if line.startswith("GLOO")}
    assert found == expected_lines


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row"),
    [("ib", "infiniband"), ("IB", "infiniband"), ("p5", "efa"), ("a3-mega", "gcp-tcpxo"), ("roce", "roce")],
)
def test_a_fabric_has_other_names(name, row):
    assert facts.fabric(name).name == row


def test_one_file_is_read_for_one_fabric():
    code = (
        "from launcher import facts; facts.fabric('infiniband'); facts.every_network()\n"
        "print(facts._fabric_in.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2\n"


def test_plan_reads_no_catalogue_where_no_variable_is_set():
    code = (
        "import sys; from launcher import nccl, spec\n"
        "text = 'name: a\\nmodel: gpt2\\ntrain: {script: a.py}\\n'\n"
        "text += 'resources: {nodes: 2, gpus_per_node: 8, gpu: h100, fabric: ib}\\n'\n"
        "nccl.variables(spec.load(text, name='j').spec); print('launcher.envlint' in sys.modules)\n"
        "nccl.variables(spec.load(text + 'env: {WANDB_MODE: offline}\\n', name='j').spec)\n"
        "from launcher import envlint; print(envlint.catalogue.cache_info().currsize)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n0\n", done.stderr


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ("{nodes: 2, gpus_per_node: 8, gpu: h100}", "no network is named"),
        ("{nodes: 2, gpus_per_node: 8, gpu: h100, fabric: nvlink}", "ends at one node, and 2 nodes"),
        ("{nodes: 2, gpus_per_node: 8, gpu: h100, fabric: gloo}", "carries jobs without GPUs"),
        ("{nodes: 2, gpus_per_node: 8, gpu: h100, fabric: infinband}", "did you mean `infiniband`"),
    ],
)
def test_a_network_that_cannot_be_is_refused(resources, says):
    text = f"name: demo\nmodel: gpt-demo\ntrain: {{script: a.py}}\nresources: {resources}\n"
    with pytest.raises(UserError) as refused:
        nccl.variables(spec.load(text, name="job.yaml").spec)
    (problem,) = refused.value.problems
    assert says in f"{problem.message}; {problem.hint}"


# --- limits -------------------------------------------------------------------------------------------------


def pair(limit):
    return limit and (limit.op, limit.passes, limit.excludes)


@pytest.mark.parametrize(
    ("gpu", "fabric", "nodes", "network", "node", "two", "whole"),
    [
        ("h100", "infiniband", 2, 3200, (460, 400), ("sendrecv", 352, 320), ("all_reduce", 440, 370)),
        ("h100", "infiniband", 4, 3200, (460, 400), ("sendrecv", 352, 320), ("all_reduce", 350, 290)),
        ("h100", "infiniband", 64, 3200, (460, 400), ("sendrecv", 352, 320), ("all_reduce", 292, 240)),
        ("h100", "infiniband", 4, 1600, (460, 400), ("sendrecv", 176, 160), ("all_reduce", 146, 120)),
        ("h100", "infiniband", 4, None, (460, 400), None, None),  # how many NICs it has, nobody said
        ("a100", "infiniband", 2, 1600, (225, 205), ("sendrecv", 176, 160), ("all_reduce", 180, 155)),
        ("h100", "efa", 2, None, (460, 400), ("sendrecv", 352, 320), ("all_reduce", 440, 370)),
        ("a100", "efa", 4, None, (225, 205), ("sendrecv", 44, 40), ("all_reduce", 38, 30)),
        ("h200", "azure-nd", 3, None, (431, 400), ("sendrecv", 352, 320), ("all_reduce", 400, 300)),
        ("h100", "gcp-tcpx", 2, None, (350, 300), ("sendrecv", 60, 50), ("all_gather", 60, 50)),
        ("h200", "gcp-gib", 2, None, (431, 400), ("sendrecv", 250, 210), ("all_gather", 250, 210)),
        ("a10g", "ethernet", 2, 100, None, ("sendrecv", 8.5, 7), ("all_reduce", 8.5, 7)),
        ("a10g", "ethernet", 2, 25, None, ("sendrecv", 2.4, 2.0), ("all_reduce", 2.4, 2.0)),
        ("a10g", "ethernet", 2, 50, None, ("sendrecv", 4.25, 3.5), ("all_reduce", 4.25, 3.5)),
        ("b200", "nvlink", 1, None, (780, 680), None, None),
    ],
)
def test_limits_are_rows_or_shares_of_the_wire(gpu, fabric, nodes, network, node, two, whole):
    found = expected.known(facts.gpu(gpu), facts.fabric(fabric), nodes=nodes, per_node=8, network=network)
    assert pair(found.node) == (node and ("all_reduce", *node))
    assert pair(found.pair) == two
    assert pair(found.whole) == whole
    assert all(re.search(r"GiB|derived", one.source) for one in (found.node, found.pair, found.whole) if one)


def test_ports_are_known_where_the_seller_fixes_them():
    found = expected.known(facts.gpu("h100"), facts.fabric("efa"), nodes=2, per_node=8)
    assert (found.ports, found.link_gbits) == (32, 3200)
    assert expected.known(facts.gpu("h100"), facts.fabric("efa"), nodes=2, per_node=4).ports == 0


def test_without_nvls_rings_are_what_counts():
    found = expected.known(
        facts.gpu("h100"), facts.fabric("infiniband"), nodes=2, per_node=8, env={"NCCL_NVLS_ENABLE": "0"}
    )
    assert pair(found.node) == ("all_reduce", 350, 300)


def test_a_cpu_job_is_held_to_what_gloo_reaches_of_its_link():
    text = "name: demo\nmodel: gpt-demo\nresources: {nodes: 4, network: 1}\n"
    found = expected.limits(spec.load(text, name="job.yaml").spec)
    assert pair(found.pair) == ("sendrecv", 0.1, 0.085)
    assert pair(found.whole) == ("all_reduce", 0.1, 0.085)
    assert found.node is None
