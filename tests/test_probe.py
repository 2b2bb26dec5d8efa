"""`dslaunch probe`: what a machine shows, as files and real commands, and what is concluded from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launcher import cli, facts, nccl, probe, spec
from launcher.node import look

NODES = yaml.safe_load((Path(__file__).parent / "data/probe/nodes.yaml").read_text())
DSLAUNCH = Path(sys.executable).parent / "dslaunch"


def lay_out(root: Path, node: dict) -> str:
    """The machine as files below `root`, its nvidia-smi as a command; the PATH of that command."""

    def write(path, text):
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    ports = node.get("rdma", {"names": []})
    for name in ports["names"]:
        at = f"sys/class/infiniband/{name}"
        write(f"{at}/device/uevent", f"DRIVER={ports['driver']}\nPCI_ID=15B3:1021")
        write(f"{at}/ports/1/link_layer", ports["layer"])
        write(f"{at}/ports/1/state", ports.get("state", "4: ACTIVE"))
        write(f"{at}/ports/1/rate", ports["rate"])
    cards = node.get("nics", {"names": []})
    write("sys/class/net/lo/operstate", "unknown")
    for name in cards["names"]:
        at = f"sys/class/net/{name}"
        write(f"{at}/device/uevent", f"DRIVER={cards['driver']}")
        write(f"{at}/operstate", "up")
        write(f"{at}/speed", cards["mbits"] or -1)
    for name, text in node.get("dmi", {}).items():
        write(f"sys/class/dmi/id/{name}", text)
    for path in node.get("paths", ()):
        (root / path.lstrip("/")).mkdir(parents=True)
    amd = node.get("amd", {"count": 0})
    for i in range(amd["count"]):
        write(f"sys/class/drm/card{i}/device/vendor", "0x1002")
        write(f"sys/class/drm/card{i}/device/product_name", amd["name"])
        write(f"sys/class/drm/card{i}/device/mem_info_vram_total", amd["bytes"])
    write("proc/cpuinfo", "\n".join(f"processor\t: {i}\nmodel name\t: x\n" for i in range(96)))
    write("proc/meminfo", "MemTotal:       2113535944 kB\nMemFree:  1 kB")
    write("sys/block/nvme0n1/size", 7501476528)
    write("sys/block/loop0/size", 8)
    commands = root / "bin"
    commands.mkdir()
    gpus = node.get("gpus")
    if gpus:
        rows = f"{gpus['name']}, {gpus['mib']}\n" * gpus["count"]
        (commands / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{rows}END\n")
        (commands / "nvidia-smi").chmod(0o755)
    return f"{commands}:/bin:/usr/bin"


def seen(tmp_path: Path, name: str) -> dict:
    path = lay_out(tmp_path, NODES[name])
    return json.loads(json.dumps(look.look(str(tmp_path), path)))


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_told_by_what_it_shows(name, tmp_path):
    found = probe.conclude(seen(tmp_path, name))
    assert {key: found.values[key] for key in NODES[name]["expect"]} == NODES[name]["expect"], found
    assert (found.values["cpus_per_node"], found.values["memory"]) == (96, "1914G")
    possible = [remark.split()[0] for remark in found.remarks if "would look the same" in remark]
    assert possible == NODES[name].get("possible", [p for p in possible if p == "infiniband-rail"])
    assert all(line.why for line in found.lines)


@pytest.mark.parametrize("name", NODES)
def test_what_is_printed_is_a_site_file(name, tmp_path):
    found = probe.conclude(seen(tmp_path, name))
    block = probe.text(found)
    resources = yaml.safe_load(block)["resources"]
    assert resources == {key: value for key, value in found.values.items() if value is not None}
    nodes = 1 if found.values["fabric"] in ("nvlink", None) else 2
    job = f"name: demo\nmodel: gpt-demo\ntrain: {{script: a.py}}\nresources: {{nodes: {nodes}}}\n"
    document = spec.load(job, name="job.yaml", site=("site.yaml", block))
    assert nccl.variables(document.spec).rows


def test_every_fabric_that_a_node_can_tell_has_a_node_here():
    told = {node["expect"]["fabric"] for node in NODES.values()}
    assert {row.name for row in facts.fabrics().values() if not row.possible} == told - {None}
    assert {row.name for row in facts.fabrics().values() if row.possible} == {"infiniband-rail", "sharp"}


def test_the_collector_looks_for_every_path_that_tells_a_fabric():
    wanted = {row["path"] for fabric in facts.fabrics().values() for row in fabric.detect if "path" in row}
    assert wanted == set(look.PATHS)


def test_ports_come_from_ibv_devinfo_where_sysfs_is_hidden(tmp_path):
    tool = tmp_path / "ibv_devinfo"
    tool.write_text(
        "#!/bin/sh\ncat <<'END'\nhca_id:\tmlx5_0\n\ttransport:\t\t\tInfiniBand (0)\n\t\tport:\t1\n"
        "\t\t\tstate:\t\t\tPORT_ACTIVE (4)\n\t\t\tlink_layer:\t\tInfiniBand\nEND\n"
    )
    tool.chmod(0o755)
    (port,) = look.rdma(str(tmp_path / "nothing"), f"{tmp_path}:/bin:/usr/bin")
    assert (port["device"], port["state"], port["layer"]) == ("mlx5_0", "ACTIVE", "InfiniBand")


def test_gpus_without_nvidia_smi_are_counted_and_the_gap_is_said(tmp_path):
    for i in range(2):
        folder = tmp_path / f"proc/driver/nvidia/gpus/0000:{i}b:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   95\n")
    value = look.look(str(tmp_path), str(tmp_path))
    found = probe.conclude(value)
    assert found.values["gpus_per_node"] == 2
    assert "not seen: memory of the GPUs: there is no nvidia-smi" in found.remarks


@pytest.mark.parametrize(
    ("product", "mib", "name"),
    [
        ("Tesla V100-SXM2-32GB", 32768, "v100-32gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
        ("NVIDIA H100 NVL", 95830, "h100-nvl-94gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie-80gb"),
        ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),
        ("NVIDIA L40S", 46068, "l40s-48gb"),
        ("Tesla T4", 15360, "t4-16gb"),
        ("NVIDIA RTX A6000", 49140, "a6000-48gb"),
        ("NVIDIA H100 80GB HBM3", 0, "h100-80gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9856, None),
        ("Quadro P400", 2048, None),
    ],
)
def test_products_have_our_names(product, mib, name):
    row = probe.gpu_row(product, mib=mib)
    assert (row.name if row else None) == name


def test_nodes_that_differ_or_are_silent_are_named(tmp_path):
    values = []
    for host, name in (("n1", "dgx-h100"), ("n2", "dgx-h100"), ("n3", "port-down")):
        folder = tmp_path / host
        folder.mkdir()
        values.append(probe.conclude({**seen(folder, name), "host": host}))
    cluster = probe.together(values, asked=("n1", "n2", "n3", "n4"))
    assert cluster.common.values["fabric"] == "infiniband"
    assert cluster.differs == ("n3 has fabric None, most have infiniband", "n3 has network None, most have 3200")
    assert cluster.missing == ("n4",)
    assert "# DIFFERS: n3 has fabric None" in probe.text(cluster.common, cluster)


def test_the_collector_sees_this_machine():
    done = subprocess.run([sys.executable, look.__file__], capture_output=True, text=True, check=True)
    (value,) = probe.assembled(done.stdout)
    assert max(map(len, done.stdout.splitlines())) < 512  # srun cuts at 1024
    assert value["host"] == os.uname().nodename
    assert value["cpus"] == sum(row.startswith("processor") for row in Path("/proc/cpuinfo").read_text().splitlines())
    assert value["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert {nic["name"] for nic in value["nics"]} == {p.name for p in Path("/sys/class/net").iterdir()} - {"lo"}
    assert "resources" in yaml.safe_load(probe.text(probe.conclude(value)))


def test_pieces_of_several_nodes_come_together_and_a_lost_one_is_no_node():
    text = 'b\t2/2\t"b"}\nnoise\na\t1/1\t{"host": "a"}\nb\t1/2\t{"host": \nc\t2/2\t1}\n'
    assert probe.assembled(text) == [{"host": "a"}, {"host": "b"}]


def test_the_command_prints_this_machine():
    done = CliRunner().invoke(cli.cli, ["probe"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.output)["resources"]["cpus_per_node"] >= 1
    values = json.loads(CliRunner().invoke(cli.cli, ["probe", "--json"]).stdout)
    assert values["nodes"][0]["seen"]["host"] == os.uname().nodename


def test_options_for_srun_need_nodes():
    done = subprocess.run([DSLAUNCH, "probe", "--partition=gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is for srun" in done.stderr


def test_probe_goes_through_srun(slurm):
    done = slurm.run([str(DSLAUNCH), "probe", "--nodes", "2"])
    assert done.returncode == 0, done.stderr
    assert "# dslaunch probe, 2 nodes" in done.stdout
    assert "# partition" in done.stdout
    named = sorted(slurm.nodes())[:2]
    done = slurm.run([str(DSLAUNCH), "probe", "--json", "--nodes", ",".join(named)])
    assert sorted(row["found"]["host"] for row in json.loads(done.stdout)["nodes"]) == named
