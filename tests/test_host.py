"""Host health: each fault is found once, on its node, and healthy nodes give nothing.

data/host has the layouts that nvidia-smi of four driver generations writes, reduced to what is read (its README says
where they are from); the lines of the kernel log are the driver's own, as public reports of faults show them.
"""

import csv
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

import launcher
from launcher import checks, preflight
from launcher.checks import Probe, dcgm, filesystems, gpus, memory, nvlink, ports, processes, xids
from launcher.preflight import DIFFERS, Setting, Xid, from_json, kernel, nvidia, to_json

DATA = Path(__file__).parent / "data" / "host"


@pytest.fixture(autouse=True)
def every_gpu(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)


LAYOUTS = ["v100-418", "a100-470", "h100-550", "h200-575"]
NODES = [f"node{number}" for number in range(1, 9)]
TABLE = preflight.xids((Path(launcher.__file__).parent / "data" / "xids.tsv").read_text())
SETTING = Setting(gpus=8, gpu="h100-80gb", gpu_names=("H100",), xids=TABLE)


def smi(layout="h100-550", gpus=8, edits=None):
    """`nvidia-smi -q -x` of a node: one GPU as often as wanted. edits: {3: [("was", "is")]} or {"all": ...}."""
    head, _, rest = (DATA / f"{layout}.xml").read_text().partition("\t<gpu id")
    one, tail = ("\t<gpu id" + rest).split("</nvidia_smi_log>")
    blocks = []
    for index in range(gpus):
        block = one.replace(":1B:00.0", f":{0x1B + index:02X}:00.0").replace("GPU-00000000", f"GPU-{index:08d}")
        for was, now in [*(edits or {}).get(index, []), *(edits or {}).get("all", [])]:
            assert was in block, was
            block = block.replace(was, now)
        blocks.append(block)
    return head.replace("<attached_gpus>1<", f"<attached_gpus>{gpus}<") + "".join(blocks) + "</nvidia_smi_log>" + tail


def cluster(nodes=4, layout="h100-550", **odd):
    """What the check measures on healthy nodes; odd: node3=text of that one."""
    return {node: nvidia.parse(odd[node]) if node in odd else healthy(layout) for node in NODES[:nodes]}


@cache
def healthy(layout):
    return nvidia.parse(smi(layout))


def serious(findings):
    return [one for one in findings if one.level != "note"]


def only(findings):
    (one,) = serious(findings)
    return one


def tools(folder, **scripts):
    """A PATH of commands that answer like the recorded ones."""
    folder.mkdir(exist_ok=True)
    for needed in ("cat", "sleep"):
        (folder / needed).symlink_to(shutil.which(needed))
    for name, text in scripts.items():
        file = folder / (name if name == "fi_info" else name.replace("_", "-"))
        file.write_text("#!/bin/sh\n" + text)
        file.chmod(0o755)
    return str(folder)


def through_json(check, found, setting=SETTING):
    """As it happens: what a node measured and the setting are JSON in between."""
    assert json.loads(json.dumps(found)) == found
    setting = from_json(Setting, json.loads(json.dumps(to_json(setting))))
    return check.judge(json.loads(json.dumps(found)), setting)


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name", "driver", "power", "slowdown"),
    [
        ("v100-418", "Tesla V100-SXM2-32GB", "418.87.01", 300, 87),
        ("a100-470", "NVIDIA A100-SXM4-80GB", "470.82.01", 400, 89),
        ("h100-550", "NVIDIA H100 80GB HBM3", "550.54.15", 700, -2),
        ("h200-575", "NVIDIA H200", "575.51.02", 700, -2),
    ],
)
def test_every_layout_of_nvidia_smi_is_read(layout, name, driver, power, slowdown):
    value = nvidia.parse(smi(layout))
    gpu = value["gpus"][3]
    assert f"<driver_version>{driver}<" in smi(layout)
    assert [gpu["index"] for gpu in value["gpus"]] == list(range(8))
    assert (gpu["name"], gpu["power"], gpu["power_default"], gpu["bus"]) == (name, power, power, "0000:1e:00")
    assert (gpu["volatile"], gpu["width"], gpu["absent"], gpu["lost"]) == (0, 16, [], "")
    assert slowdown in (gpu["slowdown"], gpu["margin_slowdown"])
    assert gpu["throttle"]["gpu_idle"] is True
    assert gpu["throttle"]["hw_thermal_slowdown"] is False


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_healthy_nodes_give_no_finding(layout, nodes):
    assert through_json(gpus, cluster(nodes, layout), Setting(gpus=8)) == []


NOT_ACTIVE, ACTIVE = ">Not Active</clocks_event_reason_{}>", ">Active</clocks_event_reason_{}>"


def throttled(*reasons):
    return [(NOT_ACTIVE.format(reason), ACTIVE.format(reason)) for reason in reasons]


@pytest.mark.parametrize(
    ("layout", "edits", "level", "what"),
    [
        (
            "h100-550",
            [("<dram_uncorrectable>0</dram_uncorrectable>\n\t\t\t</volatile>",
              "<dram_uncorrectable>2</dram_uncorrectable>\n\t\t\t</volatile>")],
            "exclude", "GPU 3: 2 uncorrected ECC errors since the driver was loaded",
        ),
        (
            "h100-550",
            [("<sram_uncorrectable_parity>0</sram_uncorrectable_parity>\n\t\t\t\t<sram_uncorrectable_secded>0<"
              "/sram_uncorrectable_secded>\n\t\t\t\t<dram_correctable>",
              "<sram_uncorrectable_parity>1</sram_uncorrectable_parity>\n\t\t\t\t<sram_uncorrectable_secded>0<"
              "/sram_uncorrectable_secded>\n\t\t\t\t<dram_correctable>")],
            "exclude", "GPU 3: 1 uncorrected ECC error since",
        ),
        (
            "v100-418",
            [("<l2_cache>0</l2_cache>\n\t\t\t\t\t<total>0<", "<l2_cache>1</l2_cache>\n\t\t\t\t\t<total>1<")],
            "exclude", "GPU 3: 1 uncorrected ECC error since",
        ),
        ("a100-470", [("row_failure>No<", "row_failure>Yes<")], "exclude", "GPU 3: a memory row could not"),
        ("h100-550", [("row_pending>No<", "row_pending>Yes<")], "warn", "GPU 3: a memory row waits for a reset"),
        ("v100-418", [("retirement>No<", "retirement>Yes<")], "warn", "GPU 3: a memory page waits for a reset"),
        ("h100-550", [("threshold_exceeded>No<", "threshold_exceeded>Yes<")], "exclude", "GPU 3: more SRAM errors"),
        ("h200-575", [("channel_repair_pending>No<", "channel_repair_pending>Yes<")], "warn", "a memory channel"),
        ("h100-550", [("reset_required>No<", "reset_required>Yes<")], "exclude", "the driver asks for a reset"),
        ("h200-575", [("action>None<", "action>Reset<")], "exclude", "the driver asks for a recovery: Reset"),
        ("h200-575", [("action>None<", "action>Pray<")], "unknown", "the driver asks for a recovery: Pray"),
        ("h100-550", [("current_mig>Disabled<", "current_mig>Enabled<")], "exclude", "GPU 3: split by MIG"),
        ("h100-550", [("compute_mode>Default<", "compute_mode>Prohibited<")], "exclude", "mode is Prohibited"),
        ("h100-550", [("compute_mode>Default<", "compute_mode>Exclusive_Process<")], "warn", "Exclusive_Process"),
        ("h100-550", throttled("hw_thermal_slowdown", "hw_slowdown"), "exclude", "slows it down for heat"),
        ("h100-550", throttled("hw_power_brake_slowdown", "hw_slowdown"), "exclude", "(power brake)"),
        ("h100-550", throttled("hw_slowdown"), "exclude", "GPU 3: its hardware slows it down"),
        ("h100-550", throttled("sw_thermal_slowdown"), "warn", "GPU 3: the driver slows it down for heat"),
        ("a100-470", [("<gpu_temp>31 C", "<gpu_temp>90 C")], "exclude", "GPU 3: 90 °C"),
        ("h100-550", [("tlimit>53 C", "tlimit>-2 C")], "exclude", "GPU 3: 33 °C, as hot as where it slows down"),
        ("h100-550", [("current_link_width>16x", "current_link_width>8x")], "exclude", "PCIe x8 instead of x16"),
        ("h100-550", [("max_link_gen>5<", "max_link_gen>3<")], "exclude", "GPU 3: PCIe generation 3 at best"),
        ("h100-550", [("<current_link_gen>5", "<current_link_gen>3"), ("idle>Active", "idle>Not Active")],
         "warn", "GPU 3: PCIe runs at generation 3 of 5 under load"),
        ("h100-550", [("<total>81559", "<total>73000")], "exclude", "GPU 3: 73000 MiB of memory instead of 81559"),
        ("h100-550", [("current_power_limit>700.00", "current_power_limit>500.00")], "warn", "held to 500 W"),
        ("a100-470", [("enforced_power_limit>400.00", "enforced_power_limit>250.00")], "warn", "held to 250 W"),
        ("h100-550", [("current_ecc>Enabled<", "current_ecc>Disabled<")], "warn", "GPU 3: ECC is off"),
        ("h100-550", [("<gpu_temp>33 C", "<gpu_temp>GPU is lost")], "exclude", "does not answer (GPU is lost)"),
        ("h100-550", [("temperature>", "temperatures>")], "unknown", "GPU 3: nvidia-smi does not say: temperature"),
        ("h100-550", [("clocks_event_reasons>", "clocks_why>")], "unknown", "does not say: throttle"),
        ("h100-550", [("uncorrectable", "not_correctable")], "unknown", "GPU 3: nvidia-smi does not say: volatile"),
        ("h100-550", [("96.00.89.00.01", "96.00.61.00.01")], "warn", "the VBIOS of the GPUs is"),
    ],
)  # fmt: skip
def test_a_fault_of_one_gpu_is_one_finding_on_its_node(layout, edits, level, what):
    one = only(through_json(gpus, cluster(3, layout, node3=smi(layout, edits={3: edits})), Setting(gpus=8)))
    assert (one.node, one.level) == ("node3", level)
    assert what in one.what
    assert one.level == "unknown" or (one.source and one.fix and one.measured and one.expected)


def test_an_idle_gpu_may_run_its_pcie_link_slowly():
    slow = smi(edits={"all": [("<current_link_gen>5", "<current_link_gen>1")]})
    assert through_json(gpus, cluster(3, node2=slow)) == []


def test_gpus_with_the_same_fault_share_a_sentence():
    hot = {index: throttled("hw_thermal_slowdown") for index in (0, 5)}
    assert only(gpus.judge(cluster(2, node1=smi(edits=hot)), SETTING)).what.startswith("GPUs 0 and 5: ")
    off = gpus.judge(cluster(2, node2=smi(edits={"all": [("mode>Enabled<", "mode>Disabled<")]})), SETTING)
    assert [(one.level, one.node) for one in off] == [("note", "node2")]
    assert off[0].what.startswith("all 8 GPUs: persistence mode is off")


def test_a_power_cap_on_all_gpus_is_a_note():
    capped = {
        node: smi(edits={"all": [("current_power_limit>700.00", "current_power_limit>600.00")]}) for node in NODES
    }
    findings = gpus.judge(cluster(3, **capped), SETTING)
    assert [(one.level, one.what.split(",")[0]) for one in findings] == [
        ("note", "all 8 GPUs: held to 600 of 700 W")
    ] * 3


def test_a_node_with_seven_of_eight_gpus_is_excluded():
    one = only(through_json(gpus, cluster(4, node4=smi(gpus=7))))
    assert (one.node, one.level, one.what, one.code) == ("node4", "exclude", "7 of 8 GPUs", 0)


def test_nodes_that_all_have_too_few_gpus_block():
    one = only(gpus.judge(cluster(2, node1=smi(gpus=4), node2=smi(gpus=4)), SETTING))
    assert (one.node, one.level, one.code) == ("", "block", DIFFERS)
    assert "4 of 8 GPUs" in one.what
    alone = only(gpus.judge(cluster(1, node1=smi(gpus=7)), SETTING))
    assert (alone.node, alone.level) == ("node1", "exclude")


def test_a_node_with_other_gpus_is_different_not_broken():
    one = only(through_json(gpus, cluster(4, node2=smi("h200-575"))))
    assert (one.node, one.level, one.code) == ("node2", "exclude", DIFFERS)
    assert "NVIDIA H200 instead of h100-80gb" in one.what


def test_two_types_of_gpu_without_a_majority_block():
    findings = gpus.judge(cluster(2, node2=smi("h200-575")), Setting(gpus=8))
    assert [(one.level, one.node) for one in serious(findings) if "type" in one.what] == [("block", "")]


@pytest.mark.parametrize(
    ("word", "name", "is_it"),
    [
        ("A100", "NVIDIA A100-SXM4-80GB", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("A10", "NVIDIA A10G", False),
        ("H200", "NVIDIA GH200 480GB", False),
        ("L4", "NVIDIA L40S", False),
        ("RTX3090", "NVIDIA GeForce RTX 3090", True),
        ("A6000", "NVIDIA RTX A6000", True),
        ("MI300X", "AMD Instinct MI300X OAM", True),
    ],
)
def test_a_type_of_gpu_is_a_word_of_its_name(word, name, is_it):
    value = {"gpus": [{"name": name}], "amd": True}
    findings = gpus.judge({"node1": value}, Setting(gpus=1, gpu_names=(word,)))
    assert [one.code for one in findings] == ([] if is_it else [DIFFERS])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no XML"),
        ("<nvidia_smi_log>", "no XML"),
        ("<rocm/>", "layout not known: <rocm>"),
        ("<nvidia_smi_log/>", "layout not known"),
        (smi().replace("<attached_gpus>8<", "<attached_gpus>9<"), "says 9 GPUs and describes 8"),
        (smi().replace("<attached_gpus>8</attached_gpus>", ""), "says None GPUs"),
    ],
)
def test_a_layout_not_known_is_unknown(text, says):
    one = only(gpus.judge({"node1": nvidia.parse(text)}, SETTING))
    assert one.level == "unknown"
    assert says in one.what


def measured(check, tmp_path, setting=SETTING, root="", **scripts):
    return check.measure(setting, Probe(root=str(root), path=tools(tmp_path / "bin", **scripts)))


def test_gpus_are_measured_by_one_command(tmp_path):
    (tmp_path / "smi.xml").write_text(smi())
    script = f'[ "$*" = "-q -x" ] && echo called >>{tmp_path}/calls && cat {tmp_path}/smi.xml'
    value = measured(gpus, tmp_path, nvidia_smi=script)
    assert through_json(gpus, {"node1": value}) == []
    assert (tmp_path / "calls").read_text() == "called\n"
    assert gpus.facts(value) == {"GPUs": "8 x NVIDIA H100 80GB HBM3", "VBIOS": "96.00.89.00.01"}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9),
        ("Failed to initialize NVML: Driver/library version mismatch", 18),
        ("Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error", 15),
        ("No devices were found", 6),
    ],
)
def test_nvidia_smi_that_fails_excludes_with_its_words(tmp_path, message, code):
    value = measured(gpus, tmp_path, nvidia_smi=f'echo "{message}"; exit {code}')
    one = only(gpus.judge({**cluster(2), "node3": value}, SETTING))
    assert (one.node, one.level, one.measured) == ("node3", "exclude", f"exit code {code}")
    assert message in one.what


def test_nvidia_smi_that_hangs_excludes(tmp_path, monkeypatch):
    monkeypatch.setattr(nvidia, "SECONDS", 0.2)
    one = only(gpus.judge({"node1": measured(gpus, tmp_path, nvidia_smi="sleep 60")}, SETTING))
    assert (one.node, one.level) == ("node1", "exclude")
    assert "did not answer within 0.2 s" in one.what


def test_a_gpu_job_without_nvidia_smi(tmp_path):
    empty = measured(gpus, tmp_path)
    one = only(gpus.judge({**cluster(3), "node4": empty}, SETTING))
    assert (one.node, one.level) == ("node4", "exclude")
    assert "the job was planned for 8 GPUs a node" in one.what
    assert only(gpus.judge({"node1": empty, "node2": empty}, SETTING)).level == "block"
    (tmp_path / "root/proc/driver/nvidia/gpus/0000:1b:00.0").mkdir(parents=True)
    blind = gpus.measure(SETTING, Probe(root=str(tmp_path / "root"), path=str(tmp_path / "bin")))
    assert only(gpus.judge({"node1": blind}, SETTING)).level == "unknown"  # GPUs there, the tool is not


@pytest.mark.parametrize(
    ("environ", "count", "kept"),
    [
        ({}, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 8, [4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": "3, 1"}, 8, [1, 3]),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 8, [1]),  # CUDA stops at the first that is none
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 8, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_GPUS": "4,5,6,7"}, 4, [0, 1, 2, 3]),  # a device cgroup
        ({"CUDA_VISIBLE_DEVICES": "GPU-00000005-0000-0000-0000-000000000000,GPU-00000002"}, 8, [2, 5]),
        ({"CUDA_VISIBLE_DEVICES": "gpu-00000005"}, 8, [5]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-00000006-0000-0000-0000-000000000000/1/0"}, 8, [6]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-11111111-0000-0000-0000-000000000000"}, 8, [7]),
        ({"SLURM_STEP_GPUS": "4-6", "SLURM_JOB_GPUS": "0,1,2,3"}, 8, [4, 5, 6]),
        ({"SLURM_JOB_GPUS": "0,1,2"}, 8, [0, 1, 2]),
        ({"SLURM_JOB_GPUS": "0,1,2", "SLURM_STEP_ID": "0"}, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # the first node's
        ({"SLURM_STEP_GPUS": "4,5"}, 2, [0, 1]),
        ({"SLURM_STEP_GPUS": "0,2"}, 2, [0, 1]),
        ({"SLURM_STEP_GPUS": "(null)"}, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_jobs_gpus_are_those_that_it_may_use(environ, count, kept):
    split = {7: [("<current_mig>Disabled", "<current_mig>Enabled")]} if count == 8 else {}
    found, by = nvidia.jobs(nvidia.parse(smi(gpus=count, edits=split))["gpus"], environ)
    assert [gpu["index"] for gpu in found] == kept
    assert bool(by) == (len(kept) < count)


def test_gpus_of_other_jobs_are_not_judged(tmp_path, monkeypatch):
    """Four of eight are this job's. What is wrong with GPU 1 is another job's, with GPU 6 ours."""
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/uptime").write_text("9060.0 1.0\n")
    fault = [("<remapped_row_failure>No", "<remapped_row_failure>Yes"), *running(920), *IN_PROGRESS]
    (tmp_path / "smi.xml").write_text(smi(edits={1: fault, 6: fault}))
    (tmp_path / "links").write_text(status(odd={1: {4: "<inactive>"}, 6: {4: "<inactive>"}}))
    lost = "NVRM: Xid (PCI:0000:{}:00): 79, pid=9, GPU has fallen off the bus."
    lines = [f"[ 9000.000000] {lost.format(bus)}" for bus in ("1c", "21", "47")]  # GPU 1, GPU 6, and one in no list
    scripts = {
        "nvidia_smi": f'case "$*" in "-q -x") cat {tmp_path}/smi.xml;; *) cat {tmp_path}/links;; esac',
        "dmesg": "cat <<'END'\n" + "\n".join(lines) + "\nEND\n",
        "dcgmi": f'echo "$*" >{tmp_path}/asked; echo "{{}}"',
    }
    probe = Probe(root=str(root), path=tools(tmp_path / "bin", **scripts))
    setting = Setting(gpus=4, xids=TABLE)

    def said(check):
        return sorted(one.what.partition(":0")[0].partition(": ")[0] for one in serious(
            through_json(check, {"node1": check.measure(setting, probe)}, setting)))  # fmt: skip

    assert said(gpus) == ["GPUs 1 and 6"]
    assert said(processes) == ["GPU 1", "GPU 6"]
    assert said(nvlink) == ["GPU 1", "GPU 6", "GPUs 1 and 6"]
    assert len(said(xids)) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert said(gpus) == said(processes) == ["GPU 6"]  # by nvidia-smi's numbers
    assert said(nvlink) == ["GPU 6", "GPU 6"]
    found = serious(through_json(xids, {"node1": xids.measure(setting, probe)}, setting))
    assert [one.what.split(": ")[0] for one in found] == ["GPU 0000:21:00", "GPU 0000:47:00"]
    dcgm.measure(setting, probe)
    assert (tmp_path / "asked").read_text() == "diag -r 2 -j -i 4,5,6,7\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    short = gpus.judge({"node1": gpus.measure(setting, probe)}, setting)
    assert "2 of 4 GPUs, by CUDA_VISIBLE_DEVICES=4,5" in [one.what for one in short]


def test_gpus_that_nobody_asked_for_are_told(tmp_path):
    for index in range(8):
        (tmp_path / f"nvidia/proc/driver/nvidia/gpus/0000:{0x1B + index:02x}:00.0").mkdir(parents=True)
    for index, name in enumerate(["0", "51140", "28500"]):
        node = tmp_path / f"amd/sys/class/kfd/kfd/topology/nodes/{index}"
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(name + "\n")
    for root, count in (("nvidia", 8), ("amd", 2)):
        value = gpus.measure(Setting(), Probe(root=str(tmp_path / root)))
        one = only(through_json(gpus, {"node1": value}, Setting()))
        assert (one.level, one.node, one.fix[:17]) == ("unknown", "node1", f"--gpus-per-node {count}")
        assert one.what.startswith(f"this node has {count} GPUs, and none were asked for")
        everywhere = only(gpus.judge({"node1": value, "node2": value}, Setting()))
        assert (everywhere.level, everywhere.node) == ("unknown", "")
        beside = only(gpus.judge({"node1": value, "node2": {"skipped": "a CPU job"}}, Setting()))
        assert beside.node == "node1"
        assert gpus.facts(value) == {"GPUs": f"{count}, not asked for"}


def test_a_cpu_job_has_no_gpu_checks():
    for check in (gpus, processes, xids, nvlink, dcgm):
        value = check.measure(Setting(), Probe(root="/nowhere"))
        assert value == {"skipped": "a CPU job"}
        assert check.judge({"node1": value}, Setting()) == []


MI300X = {"market_name": "AMD Instinct MI300X", "vendor_id": "0x1002"}


@pytest.mark.parametrize(
    ("tool", "answer"),
    [
        ("amd_smi", [{"gpu": index, "asic": MI300X} for index in range(8)]),
        ("amd_smi", {"gpu_data": [{"gpu": index, "asic": MI300X} for index in range(8)]}),
        ("rocm_smi", {f"card{index}": {"Card Series": "AMD Instinct MI300X"} for index in range(8)}),
        ("rocm_smi", {f"card{index}": {"Card series": "AMD Instinct MI300X"} for index in range(8)}),
    ],
)
def test_amd_gpus_are_counted_and_named(tmp_path, tool, answer):
    value = measured(gpus, tmp_path, **{tool: f"cat <<'END'\n{json.dumps(answer)}\nEND\n"})
    assert gpus.facts(value) == {"GPUs": "8 x AMD Instinct MI300X"}
    assert through_json(gpus, {"node1": value}, Setting(gpus=8, gpu_names=("MI300X",))) == []
    assert only(gpus.judge({"node1": value}, SETTING)).code == DIFFERS


def test_an_amd_layout_not_known_is_unknown(tmp_path):
    value = measured(gpus, tmp_path, amd_smi="echo '{\"devices\": 8}'")
    assert only(gpus.judge({"node1": value}, SETTING)).level == "unknown"


# --- processes ------------------------------------------------------------------------------------------------------

PROCESS = (
    "<processes>\n<process_info><pid>{pid}</pid><type>{type}</type><process_name>{name}</process_name>"
    "<used_memory>{mib} MiB</used_memory></process_info>\n"
)


def running(pid, name="/usr/bin/python3", kind="C", mib=40000):
    return [("<processes>\n", PROCESS.format(pid=pid, type=kind, name=name, mib=mib))]


def proc(root, pid, parent, job="", uid="1000", environ=""):
    folder = root / "proc" / str(pid)
    folder.mkdir(parents=True)
    (folder / "status").write_text(f"Name:\tpython3\nPPid:\t{parent}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    (folder / "cgroup").write_text(f"0::/system.slice/slurmstepd.scope/job_{job}/step_0\n" if job else "0::/\n")
    (folder / "environ").write_text(environ)


@pytest.mark.parametrize(
    ("edits", "level", "what"),
    [
        ([], "", ""),
        (running(900), "", ""),  # child of a child of the agent
        (running(910), "", ""),  # another step of this job
        (running(915), "", ""),  # of this job by its environment
        (running(920), "exclude", "GPU 3: python3 (process 920 of user 1001 with 40000 MiB) is not of this job"),
        (running(999), "exclude", "GPU 3: python3 (process 999 with 40000 MiB) is not of this job"),  # not to be seen
        (running(920, kind="G", name="/usr/lib/xorg/Xorg"), "", ""),
        (running(920, name="/usr/bin/nvidia-cuda-mps-server", mib=30), "note", "nvidia-cuda-mps-server"),
        ([("<used>1 MiB", "<used>40960 MiB")], "warn", "GPU 3: 40.0 GiB in use, and no process to see"),
        ([("<used>1 MiB", "<used>560 MiB")], "", ""),
    ],
)
def test_processes_of_others_are_found(tmp_path, edits, level, what):
    root = tmp_path / "root"
    proc(root, "self", 800, job="77")
    for pid, parent, job, uid, environ in [
        (800, 1, "77", "1000", ""),
        (850, 800, "", "1000", ""),
        (900, 850, "", "1000", ""),
        (910, 1, "77", "1000", ""),
        (915, 1, "", "1000", "HOME=/root\0SLURM_JOB_ID=77\0"),
        (920, 1, "76", "1001", "SLURM_JOB_ID=76\0"),
    ]:
        proc(root, pid, parent, job, uid, environ)
    (tmp_path / "smi.xml").write_text(smi(edits={3: edits}))
    value = measured(processes, tmp_path, root=root, nvidia_smi=f"cat {tmp_path}/smi.xml")
    found = through_json(processes, {"node1": {"gpus": []}, "node2": value})
    assert [(one.node, one.level) for one in found] == ([("node2", level)] if level else [])
    assert all(what in one.what for one in found)


# --- Xids -----------------------------------------------------------------------------------------------------------


def logged(*lines, uptime=10000.0):
    return {"events": xids.parse(kernel.lines("\n".join(lines), uptime=uptime, words=("NVRM", "SXid")))}


def test_the_applications_own_xids_and_network_cards_are_no_finding(tmp_path):
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/uptime").write_text("6000.00 90000.00\n")
    value = measured(xids, tmp_path, root=tmp_path / "root", dmesg=f"cat {DATA}/dmesg.txt")
    assert sorted(event["number"] for event in value["events"]) == [13, 31, 43]
    assert value["events"][0]["age"] == pytest.approx(5187.6)
    assert through_json(xids, {"node1": value}) == []


RECOVERY = "[ 9000.1] NVRM: Xid (PCI:0008:01:00): 154, GPU recovery action changed from "
LOST = (
    "[ 1843.308145] NVRM: The NVIDIA GPU 0000:b3:00.0",
    "               NVRM: (PCI ID: 10de:26b5) installed in this system has",
    "               NVRM: fallen off the bus and is not responding to commands.",
)


@pytest.mark.parametrize(
    ("lines", "level", "what"),
    [
        (["[ 9000.1] NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus"], "exclude", "0000:44:00: Xid 79"),
        (LOST, "exclude", "GPU 0000:b3:00: Xid 79"),
        ([line.replace("              ", "[ 1843.308146]") for line in LOST], "exclude", "GPU 0000:b3:00: Xid 79"),
        (
            ["[ 9000.1] NVRM: GPU 0000:91:00.0: GPU has fallen off the bus.",
             "[ 9000.1] NVRM: Xid (PCI:0000:91:00): 79, pid='<unknown>', GPU has fallen off the bus."],
            "exclude", "GPU 0000:91:00: Xid 79, the GPU fell off the bus (17 min ago)",
        ),
        (["[ 9000.1] NVRM: Xid (PCI:0000:0f:00): 64, pid='<unknown>', name=<unknown>, Row Remapper Error"],
         "exclude", "a memory row could not be remapped (17 min ago)"),
        (["[ 9000.1] NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping"], "", ""),
        (["[ 9000.1] NVRM: Xid (PCI:0000:0f:00): 94, pid=2503421, name=python3, Ch 00000008"], "warn", "contained"),
        (["[ 9000.1] NVRM: Xid (PCI:0000:9b:00): 119, pid=2, name=nvidia-smi, Timeout after 6s of waiting"],
         "exclude", "GSP"),
        (["[ 9000.1] NVRM: Xid (PCI:0019:01:00): 149, NETIR Fatal XC0 i0 Link -1 (0x000fe406 0x00000000)"],
         "exclude", "Xid 149"),
        (["[ 9000.1] NVRM: Xid (PCI:0018:01:00): 145, RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2)"],
         "warn", "Xid 145"),
        ([RECOVERY + "0x4 (Drain and Reset) to 0x1 "
          "(GPU Reset Required)"], "exclude", "the driver asks for: GPU Reset Required"),
        ([RECOVERY + "0x0 (None) to 0x9 (Dance)"],
         "unknown", "the driver asks for: Dance"),
        ([RECOVERY + "0x1 (GPU Reset Required) to 0x0 "
          "(None)"], "", ""),
        (["[ 8000.1] NVRM: Xid (PCI:0008:01:00): 109, pid=17, name=python, Ch 8, errorString CTX SWITCH TIMEOUT",
          RECOVERY + "0x0 (None) to 0x1 (GPU Reset "
          "Required)",
          RECOVERY + "0x1 (GPU Reset Required) to 0x0 "
          "(None)"], "warn", "before the driver took its recovery action back"),
        (["[ 9000.1] NVRM: Xid (PCI:0000:0f:00): 48, pid=9, DBE (double bit error) ECC Error",
          "[ 9000.2] NVRM: Xid (PCI:0000:0f:00): 45, pid=9, Ch 00000010",
          "[ 9000.3] NVRM: Xid (PCI:0000:0f:00): 95, pid=9, Uncontained error"], "exclude", "; also Xid 48"),
        (["[ 9000.2] NVRM: Xid (PCI:0000:0f:00): 45, pid=9, Ch 00000010"], "", ""),
        (["[ 5000.0] NVRM: Xid (PCI:0000:0f:00): 48, pid=9, DBE", "[ 6000.0] NVRM: loading NVIDIA UNIX x86_64"],
         "warn", "before the driver was loaded again"),
        (["[ 9000.1] NVRM: Xid (PCI:0000:0f:00): 999, something of tomorrow"], "unknown", "not one of the 172"),
        (["[ 9000.1] nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up"],
         "exclude", "NVSwitch 0000:06:00: SXid 20034, fatal: Link 48 LTSSM Fault Up"),
        (["[ 9000.1] nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32 egress PRIV error"],
         "warn", "not fatal"),
        (["[ 9000.1] nvidia-nvswitch2: SXid (PCI:0000:07:00.0): 20034, Severity 1 Engine instance 60"], "", ""),
        (["[ 9000.1] r8169 0000:03:00.0 eth0: RTL8168h, XID 641, IRQ 131"], "", ""),
        (["[Sun Feb 23 16:24:18 2025] NVRM: Xid (PCI:0000:9b:00): 79, GPU has fallen off the bus."],
         "exclude", "at a time not known"),
        (["[ 9000.100000] node3 kernel: NVRM: Xid (PCI:0000:9b:00): 62, pid=1"], "exclude", "(17 min ago)"),
    ],
)  # fmt: skip
def test_xids_are_weighed_by_number_text_and_time(lines, level, what):
    found = through_json(xids, {"node1": logged(), "node2": logged(*lines), "node3": logged()})
    assert [(one.node, one.level) for one in found] == ([("node2", level)] if level else [])
    for one in found:
        assert what in one.what
        assert one.fix
        assert "{" not in one.fix


def test_an_xid_of_two_days_ago_is_a_warning():
    lines = ["[ 100.0] NVRM: Xid (PCI:0000:0f:00): 48, pid=9, DBE"]
    one = only(xids.judge({"node1": logged(*lines, uptime=200_000)}, SETTING))
    assert (one.level, one.what.partition("(")[2][:4]) == ("warn", "doub")
    assert "2.3 days ago" in one.what
    assert only(xids.judge({"node1": logged(*lines, uptime=80_000)}, SETTING)).level == "exclude"


def test_faults_of_two_gpus_are_two_findings():
    lines = [f"[ 9000.1] NVRM: Xid (PCI:0000:{bus}:00): 79, GPU has fallen off the bus" for bus in ("0f", "1f")]
    assert [one.what[:16] for one in xids.judge({"node1": logged(*lines)}, SETTING)] == [
        "GPU 0000:0f:00: ",
        "GPU 0000:1f:00: ",
    ]


def test_without_a_table_an_xid_is_unknown():
    value = logged("[ 9000.1] NVRM: Xid (PCI:0000:0f:00): 79, lost")
    assert only(xids.judge({"node1": value}, Setting(gpus=8))).level == "unknown"


@pytest.mark.parametrize(
    ("restrict", "says"),
    [("1", "kernel.dmesg_restrict = 1"), ("0", "dmesg: read kernel buffer failed: Operation not")],
)
def test_a_kernel_log_that_may_not_be_read_is_unknown(tmp_path, restrict, says):
    (tmp_path / "root/proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "root/proc/sys/kernel/dmesg_restrict").write_text(restrict + "\n")
    value = measured(
        xids, tmp_path, root=tmp_path / "root", journalctl="exit 0",
        dmesg="echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1",
    )  # fmt: skip
    one = only(xids.judge({"node1": value}, SETTING))
    assert one.level == "unknown"
    assert says in one.what


def test_an_empty_kernel_log_is_unknown(tmp_path):
    one = only(xids.judge({"node1": measured(xids, tmp_path, dmesg="exit 0", journalctl="exit 0")}, SETTING))
    assert (one.level, one.what) == ("unknown", "the kernel log could not be read (it is empty)")


def test_the_journal_stands_in_for_dmesg(tmp_path):
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/uptime").write_text("9060.0 1.0\n")
    line = "[ 9000.000000] node1 kernel: NVRM: Xid (PCI:0000:0f:00): 79, pid=9, GPU has fallen off the bus."
    value = measured(xids, tmp_path, root=tmp_path / "root", dmesg="exit 1", journalctl=f'echo "{line}"')
    assert "(1 min ago)" in only(xids.judge({"node1": value}, SETTING)).what


def test_the_xid_table_is_whole():
    with (Path(launcher.__file__).parent / "data" / "xids.tsv").open() as file:
        lines = (line for line in file if line[0] != "#")
        rows = {int(row["number"]): row for row in csv.DictReader(lines, delimiter="\t")}
    assert sorted(rows) == list(range(1, xids.LAST + 1)) == sorted(map(int, TABLE))
    for number, row in rows.items():
        assert re.fullmatch(r"[A-Z0-9_]+", row["name"])
        assert row["level"] in ("note", "warn", "exclude")
        assert TABLE[str(number)] == Xid(row["means"] or row["name"], row["action"], row["level"])
        if row["level"] == "exclude":
            assert row["means"]
            assert row["action"] in xids.ACTIONS or row["why"], row  # what to do, or why we say so
    assert all(row["level"] == "exclude" for row in rows.values() if row["action"] == "RESET_GPU")
    assert all(rows[n]["level"] == "note" for n in (13, 31, 43, 45, 63, 68, 69))  # the application's, or the log's


# --- NVLink ---------------------------------------------------------------------------------------------------------


def status(gpus=8, links=18, rate="26.562 GB/s", odd=None):
    """`nvidia-smi nvlink --status`; odd: {3: ["<inactive>" for link 0, ...]}."""
    lines = []
    for gpu in range(gpus):
        lines.append(f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu:08d}-0000-0000-0000-000000000000)")
        words = [rate] * links
        for link, word in (odd or {}).get(gpu, {}).items():
            words[link] = word
        lines += [f"\t Link {link}: {word}" for link, word in enumerate(words)]
    return "\n".join(lines) + "\n"


def linked(text=None, xml=None, **more):
    value = nvidia.parse(xml or smi())
    keep = ("index", "name", "fabric", "fabric_status", "clique", "cluster")
    rows = [{key: gpu[key] for key in keep} for gpu in value["gpus"]]
    return {"gpus": rows, "links": nvlink.status(status() if text is None else text), **more}


IN_PROGRESS = [("<state>Completed", "<state>In Progress"), ("<status>Success", "<status>N/A")]


@pytest.mark.parametrize(
    ("value", "level", "what"),
    [
        (linked(), "", ""),
        (linked(status(odd={3: {4: "<inactive>"}})), "exclude", "GPU 3: 17 of 18 NVLink links are active"),
        (linked(status(odd={3: {4: "a word of tomorrow"}})), "exclude", "GPU 3: 17 of 18"),
        (linked(status(odd={3: dict.fromkeys(range(18), "<inactive>")})), "exclude", "GPU 3: 0 of 18"),
        (linked(status(odd={3: {2: "1.0 GB/s", 4: "1.562 GB/s"}})), "exclude", "GPU 3: NVLink 2, 4 at 1 GB/s"),
        (linked(xml=smi(edits={3: IN_PROGRESS})), "exclude", "GPU 3: not joined to the NVLink fabric (In Progress)"),
        (linked(xml=smi(edits={"all": IN_PROGRESS})), "exclude", "all 8 GPUs: not joined"),
        (linked(xml=smi("a100-470"), manager="active"), "", ""),
        (linked(xml=smi("a100-470"), manager="failed"), "exclude", "the fabric manager is failed"),
        (linked(xml=smi("a100-470"), manager=""), "unknown", "of the fabric manager systemctl is not here"),
        (linked(manager=""), "", ""),  # in a container, and the GPUs themselves say Completed
    ],
)
def test_nvlink_faults_are_found_on_their_node(value, level, what):
    found = through_json(nvlink, {"node1": linked(), "node2": value, "node3": linked()})
    assert [(one.node, one.level) for one in found] == ([("node2", level)] if level else [])
    assert all(what in one.what for one in found)


def test_a_gpu_without_any_link_is_found():
    """What nvidia-smi says then has no `Link` line at all."""
    lines = status().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("GPU 4"))
    lines[at + 1 : at + 19] = ["\t NVML: Unable to retrieve Nvlink information as all links are inActive"]
    one = only(nvlink.judge({"node1": linked("\n".join(lines)), "node2": linked()}, SETTING))
    assert (one.node, one.what) == ("node1", "GPU 4: 0 of 18 NVLink links are active")


def test_cards_without_nvlink_are_no_finding():
    text = "".join(f"GPU {index}: NVIDIA L40S (UUID: GPU-{index})\n" for index in range(8))
    l40s = smi("a100-470").replace("NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    assert nvlink.judge({"node1": linked(text, l40s), "node2": linked(text, l40s)}, SETTING) == []


def test_links_that_are_missing_on_all_gpus_are_a_warning():
    half = linked(status(links=9))
    found = nvlink.judge({"node1": half, "node2": half}, SETTING)
    assert [(one.level, one.expected) for one in found] == [("warn", "18")] * 2


def test_nodes_of_one_nvlink_domain():
    def rack(clique, cluster="5cd30dc8-0000-0000-0000-000000000000"):
        edit = [
            ("<cliqueId>0", f"<cliqueId>{clique}"),
            ("Uuid>00000000-0000-0000-0000-000000000000", f"Uuid>{cluster}"),
        ]
        return smi(edits={"all": edit})

    def node(clique="388", imex="UP"):
        return linked(
            xml=rack(clique), imex=imex, imex_says="" if imex else "nvidia-imex-ctl: No such file or directory"
        )

    assert nvlink.judge({"node1": node(), "node2": node()}, SETTING) == []
    odd = only(nvlink.judge({"node1": node(), "node2": node("184"), "node3": node()}, SETTING))
    assert (odd.node, odd.level) == ("node2", "warn")
    assert only(nvlink.judge({"node1": node(imex="DOWN"), "node2": node()}, SETTING)).level == "exclude"
    assert only(nvlink.judge({"node1": node(imex="DEGRADED"), "node2": node()}, SETTING)).level == "warn"
    assert only(nvlink.judge({"node1": node(imex=""), "node2": node()}, SETTING)).level == "unknown"


def test_nvlink_is_measured(tmp_path):
    root = tmp_path / "root"
    (root / "proc/driver/nvidia-nvswitch/devices/0000:05:00.0").mkdir(parents=True)
    cluster_id = [("Uuid>00000000-", "Uuid>5cd30dc8-")]
    (tmp_path / "smi.xml").write_text(smi(edits={"all": cluster_id}))
    (tmp_path / "links").write_text(status())
    value = measured(
        nvlink, tmp_path, root=root, systemctl="echo active",
        nvidia_smi=f'case "$*" in "-q -x") cat {tmp_path}/smi.xml;; "nvlink --status") cat {tmp_path}/links;; esac',
        nvidia_imex_ctl="echo 'Node #0   - 10.0.0.1   - READY'; echo 'Domain State: UP'",
    )  # fmt: skip
    assert (value["manager"], value["imex"], len(value["links"])) == ("active", "UP", 8)
    assert through_json(nvlink, {"node1": value}) == []
    assert nvlink.facts(value) == {"NVLink links": "18"}
    broken = nvlink.measure(
        SETTING, Probe(path=tools(tmp_path / "other", nvidia_smi=f'[ "$1" = -q ] && cat {tmp_path}/smi.xml'))
    )
    assert only(nvlink.judge({"node1": broken}, SETTING)).level == "unknown"


# --- ports ----------------------------------------------------------------------------------------------------------


class Sysfs:
    """A node's /sys and /proc, with ports as the kernel shows them."""

    def __init__(self, root):
        self.root = root
        self.write("proc/uptime", "50000.0 1.0")

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def port(self, device, state="4: ACTIVE", physical="5: LinkUp", rate="400 Gb/sec (4X NDR)", layer="InfiniBand",
             driver="mlx5_core", gid="", firmware="28.39.1002", **counters):  # fmt: skip
        at = f"sys/class/infiniband/{device}"
        self.write(f"{at}/device/uevent", f"DRIVER={driver}\nPCI_CLASS=20700")
        self.write(f"{at}/fw_ver", firmware)
        for name, text in (("state", state), ("phys_state", physical), ("rate", rate), ("link_layer", layer)):
            self.write(f"{at}/ports/1/{name}", text)
        for name in (*ports.COUNTERS, "link_downed"):
            self.write(f"{at}/ports/1/counters/{name}", str(counters.get(name, 0)))
        if gid:
            self.write(f"{at}/ports/1/gid_attrs/types/3", gid)
        return self

    def hca(self, count=8, **more):
        for index in range(count):
            self.port(f"mlx5_{index}", **more)
        return self

    def nic(self, name, speed, state="up"):
        for key, text in (("operstate", state), ("type", "1"), ("speed", str(speed)), ("device/vendor", "0x15b3")):
            self.write(f"sys/class/net/{name}/{key}", text)
        return self

    def measure(self, setting=None, path="/nowhere"):
        return ports.measure(setting or Setting(), Probe(root=str(self.root), path=path))


@pytest.fixture(scope="module")
def eight_ports(tmp_path_factory):
    return Sysfs(tmp_path_factory.mktemp("ports")).hca().measure()


@pytest.mark.parametrize(
    ("fault", "level", "what"),
    [
        (lambda node: node, "", ""),
        (lambda node: node.port("mlx5_3", "1: DOWN", "2: Polling"), "exclude", "mlx5_3:1 is DOWN (Polling)"),
        (lambda node: node.port("mlx5_3", "2: INIT"), "exclude", "mlx5_3:1 is INIT (LinkUp)"),
        (lambda node: node.port("mlx5_3", rate="200 Gb/sec (4X HDR)"), "exclude", "mlx5_3:1 runs at 200 Gbit/s"),
        (lambda node: node.port("mlx5_3", symbol_error=11), "warn", "mlx5_3:1 counts errors: symbol_error 11"),
        (lambda node: node.port("mlx5_3", symbol_error=10), "", ""),
        (lambda node: node.port("mlx5_3", link_downed=4), "", ""),
        (
            lambda node: node.port("mlx5_3", link_downed=5),
            "exclude",
            "mlx5_3:1 lost its link 5 times in the last day",
        ),
        (
            lambda node: shutil.rmtree(node.root / "sys/class/infiniband/mlx5_3") or node,
            "exclude",
            "7 of 8 RDMA ports",
        ),
        (lambda node: shutil.rmtree(node.root / "sys/class/infiniband") or node, "exclude", "0 of 8 RDMA ports"),
    ],
)
def test_faults_of_ports_are_found_on_their_node(tmp_path, eight_ports, fault, level, what):
    odd = fault(Sysfs(tmp_path).hca()).measure()
    for nodes in (2, 4):  # with and without a majority
        found = {**dict.fromkeys(NODES[:nodes], eight_ports), "node2": odd}
        findings = through_json(ports, found, Setting(ports=8, link_gbits=3200))
        assert [(one.node, one.level) for one in serious(findings)] == ([("node2", level)] if level else [])
        assert all(what in one.what and one.fix for one in findings)


def test_another_firmware_is_a_warning(tmp_path):
    found = {node: Sysfs(tmp_path / node).hca(1).measure() for node in NODES[:3]}
    found["node2"] = Sysfs(tmp_path / "odd").hca(1, firmware="28.36.1010").measure()
    one = only(ports.judge(found, Setting()))
    assert (one.node, one.level, one.measured) == ("node2", "warn", "28.36.1010")


def test_losses_of_a_link_are_counted_by_the_day(tmp_path):
    node = Sysfs(tmp_path).hca(1, link_downed=20)
    node.write("proc/uptime", str(10 * 86400.0))
    assert {one.level for one in ports.judge({"node1": node.measure()}, Setting())} == {"warn"}
    node.write("proc/uptime", str(4 * 86400.0))
    assert {one.level for one in ports.judge({"node1": node.measure()}, Setting())} == {"exclude"}


def test_a_port_that_nobody_uses_may_be_down(tmp_path):
    def node(name):
        return Sysfs(tmp_path / name).hca(2).port("mlx5_8", "1: DOWN", "3: Disabled").measure()

    assert ports.judge({name: node(name) for name in NODES[:3]}, Setting(ports=2)) == []


def test_too_few_ports_on_every_node_are_seen_against_the_table(tmp_path):
    found = {node: Sysfs(tmp_path / node).hca(4).measure() for node in NODES[:3]}
    assert ports.judge(found, Setting()) == []
    assert [one.what for one in ports.judge(found, Setting(ports=8))] == ["4 of 8 RDMA ports are active"] * 3
    slow = ports.judge(found, Setting(ports=4, link_gbits=3200))
    assert [(one.level, one.measured) for one in slow] == [("warn", "1600 Gbit/s")] * 3


def test_a_node_without_rdma_among_nodes_with_it_is_found(tmp_path):
    found = {node: Sysfs(tmp_path / node).hca(2).measure() for node in NODES[:3]}
    found["node2"] = Sysfs(tmp_path / "bare").measure()
    assert only(ports.judge(found, Setting())).node == "node2"
    none = {node: Sysfs(tmp_path / f"no{node}").measure() for node in NODES[:3]}
    assert ports.judge(none, Setting()) == []


def test_a_roce_port_needs_an_address(tmp_path):
    roce = {"layer": "Ethernet", "gid": "RoCE v2"}
    found = {node: Sysfs(tmp_path / node).hca(2, **roce).measure() for node in NODES[:3]}
    assert ports.judge(found, Setting()) == []
    found["node3"] = Sysfs(tmp_path / "odd").hca(2, layer="Ethernet", gid="IB/RoCE v1").measure()
    one = only(ports.judge(found, Setting()))
    assert (one.node, one.level) == ("node3", "exclude")
    assert "no RoCE v2 address" in one.what


@pytest.mark.parametrize(
    ("modules", "version", "level"),
    [
        ("nvidia_peermem 16384 0 - Live", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15", ""),
        ("ib_core 1 0 - Live", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15", ""),
        ("ib_core 1 0 - Live", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15", "warn"),
        ("", "", "unknown"),
    ],
)
def test_gpus_and_adapters_need_a_way_to_each_other(tmp_path, modules, version, level):
    node = Sysfs(tmp_path).hca(2)
    node.write("proc/modules", modules)
    node.write("proc/driver/nvidia/version", version)
    findings = ports.judge({"node1": node.measure(Setting(gpus=8))}, Setting(gpus=8))
    assert [one.level for one in findings] == ([level] if level else [])
    assert ports.judge({"node1": node.measure()}, Setting()) == []  # nothing to a CPU job


EFA = "provider: efa\n    fabric: efa\n    domain: rdmap{0}s0-rdm\n    type: FI_EP_RDM\n"


@pytest.mark.parametrize(
    ("fi_info", "level", "what"),
    [
        (
            "".join(EFA.format(index) + EFA.format(index).replace("efa\n", "efa-direct\n") for index in range(4)),
            "",
            "",
        ),
        ("".join(EFA.format(index) for index in range(3)), "exclude", "libfabric sees 3 of 4 EFA devices"),
        (None, "exclude", "libfabric sees 0 of 4 EFA devices"),
    ],
)
def test_libfabric_has_to_see_every_efa_device(tmp_path, fi_info, level, what):
    node = Sysfs(tmp_path / "root")
    for index in range(4):
        node.port(f"rdmap{index}s0", driver="efa", layer="Unspecified", rate="100 Gb/sec (4X EDR)")
    (tmp_path / "fi").write_text(fi_info or "")
    script = f"cat {tmp_path}/fi" if fi_info else "echo 'fi_getinfo: -61 (No data available)' >&2; exit 61"
    value = node.measure(Setting(fabric="efa"), tools(tmp_path / "bin", fi_info=script))
    found = serious(ports.judge({"node1": value}, Setting(fabric="efa")))
    assert [(one.level, one.what) for one in found] == ([(level, what)] if level else [])
    blind = node.measure(Setting(fabric="efa"), str(tmp_path))
    assert only(ports.judge({"node1": blind}, Setting(fabric="efa"))).level == "unknown"


def test_what_the_adapter_says_in_the_kernel_log(tmp_path):
    lines = [
        "[ 12.1] mlx5_core 0000:5c:00.0: mlx5_pcie_event:299: Detected insufficient power on the PCIe slot (27W).",
        "[ 90.1] mlx5_port_module_event:1131: Port module event[error]: module 0, Cable error, High Temperature",
        "[ 95.1] mlx5_port_module_event:1131: Port module event[error]: module 0, Cable error, High Temperature",
        "[ 99.1] mlx5_core 0000:5c:00.0: Port module event: module 0, Cable plugged",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    value = Sysfs(tmp_path / "root").hca(2).measure(path=tools(tmp_path / "bin", dmesg=f"cat {tmp_path}/log"))
    found = ports.judge({"node1": value}, Setting())
    assert [(one.level, one.what) for one in found] == [
        ("warn", "the adapter 0000:5c:00.0 says that its slot gives 27 W, too little"),
        ("warn", "transceiver or cable in module 0: High Temperature"),
    ]


def test_an_ethernet_link_that_came_up_slow(tmp_path):
    found = {node: Sysfs(tmp_path / node).nic("eth0", 25000).nic("eth1", -1).measure() for node in NODES[:3]}
    assert ports.judge(found, Setting()) == []
    found["node2"] = Sysfs(tmp_path / "odd").nic("eth0", 1000).measure()
    one = only(ports.judge(found, Setting()))
    assert (one.node, one.level, one.measured) == ("node2", "warn", "1 Gbit/s")


# --- memory, file systems -------------------------------------------------------------------------------------------


def host(root, total=2_113_000_000, cpus="0-191", swap=0, errors=0, governor="performance"):
    node = Sysfs(root)
    node.write("proc/meminfo", f"MemTotal:       {total} kB\nSwapTotal: 8000000 kB\nSwapFree: {8_000_000 - swap} kB")
    node.write("sys/devices/system/cpu/online", cpus)
    node.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", governor)
    node.write("sys/devices/system/edac/mc/mc0/ue_count", "0")
    node.write("sys/devices/system/edac/mc/mc1/ue_count", str(errors))
    return memory.measure(Setting(), Probe(root=str(root)))


@pytest.mark.parametrize(
    ("odd", "level", "what"),
    [
        ({}, "", ""),
        ({"total": 2_113_000_000 * 31 // 32}, "", ""),
        ({"total": 2_113_000_000 * 15 // 16}, "warn", "1889.2 GiB of host memory, others have 2015.1 GiB"),
        ({"total": 2_300_000_000}, "", ""),
        ({"cpus": "0-95"}, "warn", "96 CPUs online, others have 192"),
        ({"errors": 3}, "exclude", "3 uncorrected host memory errors since boot"),
        ({"swap": 4_000_000}, "note", "3.8 GiB of swap in use"),
        ({"governor": "powersave"}, "note", "the CPU governor is powersave"),
    ],
)
@pytest.mark.parametrize("nodes", [3, 8])
def test_faults_of_memory_and_cpus_are_found_on_their_node(tmp_path, odd, level, what, nodes):
    found = {node: host(tmp_path / node) for node in NODES[:nodes]}
    found["node2"] = host(tmp_path / "odd", **odd)
    findings = through_json(memory, found)
    assert [(one.node, one.level) for one in findings] == ([("node2", level)] if level else [])
    assert all(what in one.what for one in findings)


def test_of_two_nodes_the_one_with_less_memory_is_named(tmp_path):
    found = {"node1": host(tmp_path / "1", total=1_000_000_000), "node2": host(tmp_path / "2")}
    assert only(memory.judge(found, SETTING)).node == "node1"


MOUNTS = """\
proc /proc proc rw,relatime 0 0
/dev/nvme0n1p2 / ext4 {root} 0 0
tmpfs /dev/shm tmpfs rw,nosuid,nodev 0 0
/dev/nvme1n1 /var xfs {var} 0 0
/dev/loop0 /snap squashfs ro,nodev 0 0
fs:/home /home nfs4 rw,vers=4.2 0 0
/dev/nvme2n1 /local\\040scratch ext4 {scratch} 0 0
"""
WRITABLE = {"root": "rw,relatime,errors=remount-ro", "var": "rw,noatime", "scratch": "rw"}


def mounted(folder, log="", **options):
    node = Sysfs(folder)
    node.write("proc/mounts", MOUNTS.format(**{**WRITABLE, **options}))
    (folder / "log").write_text(log or "[ 1.0] EXT4-fs (nvme0n1p2): mounted filesystem\n")
    setting = Setting(checkpoint_dir="/local scratch/run/checkpoints")
    return filesystems.measure(
        setting, Probe(root=str(folder), path=tools(folder / "bin", dmesg=f"cat {folder}/log"))
    )


ABORTED = """\
[ 90.0] EXT4-fs error (device nvme0n1p2): ext4_journal_check_start:83
[ 90.1] EXT4-fs (nvme0n1p2): Remounting filesystem read-only
"""


@pytest.mark.parametrize(
    ("odd", "level", "what"),
    [
        ({}, "", ""),
        (
            {"root": "ro,relatime,errors=remount-ro", "log": ABORTED},
            "exclude",
            "/ (ext4 on /dev/nvme0n1p2) is read-only",
        ),
        ({"var": "ro,noatime"}, "exclude", "/var (xfs on /dev/nvme1n1) is read-only"),
        ({"scratch": "ro,emergency_ro"}, "exclude", "/local scratch (ext4 on /dev/nvme2n1) is read-only"),
        ({"log": "[ 90.0] XFS (nvme1n1): Log I/O error. Shutting down filesystem.\n"}, "warn", "stopped writing"),
    ],
)
def test_a_file_system_that_turned_read_only_is_found(tmp_path, odd, level, what):
    found = {node: mounted(tmp_path / node) for node in NODES[:3]}
    found["node3"] = mounted(tmp_path / "odd", **odd)
    findings = through_json(filesystems, found)
    assert [(one.node, one.level) for one in findings] == ([("node3", level)] if level else [])
    assert all(what in one.what for one in findings)


def test_a_root_that_is_read_only_by_design_is_no_finding(tmp_path):
    found = {node: mounted(tmp_path / node, root="ro,relatime") for node in NODES[:3]}
    assert filesystems.judge(found, SETTING) == []


# --- DCGM -----------------------------------------------------------------------------------------------------------


def dcgm3(status="Pass", **more):
    result = {"gpu_ids": "3", "status": status, **more}
    others = [{"gpu_ids": str(gpu), "status": "PASS"} for gpu in range(3)]
    tests = [{"name": "Denylist", "results": [{"gpu_ids": "0,1,2,3", "status": "PASS"}]}, None,
             {"name": "PCIe", "results": [*others, result]}]  # fmt: skip
    return "WARNING: a line before\n" + json.dumps(
        {
            "DCGM GPU Diagnostic": {
                "test_categories": [{"category": "Integration", "tests": tests}],
                "version": "3.1.8",
            }
        }
    )


def dcgm4(status="Pass", severity=None):
    warnings = [
        {"warning": "GPU 3: not as it should be", "error_id": 29, "error_category": 8, "error_severity": severity}
    ]
    result = {"entity_group": "GPU", "entity_id": 3, "status": status, **({"warnings": warnings} if severity else {})}
    tests = [{"name": "software", "results": [result], "test_summary": {"status": status}}]
    return json.dumps({
        "DCGM Diagnostic": {"test_categories": [{"category": "Deployment", "tests": tests}]},
        "metadata": {"version": "4.2.3"},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("text", "level", "what"),
    [
        (dcgm3(), "", ""),
        (dcgm3("FAIL", warnings=["PCIe bandwidth is low"]), "exclude", "GPU 3: DCGM's test PCIe fails"),
        (dcgm3("Fail", warnings="PCIe bandwidth is low"), "exclude", "GPU 3: DCGM's test PCIe fails"),
        (dcgm3("Warn"), "warn", "GPU 3: DCGM's test PCIe warns"),
        (dcgm3("Skip"), "", ""),
        (dcgm3("Dances"), "unknown", "DCGM's test PCIe: dances"),
        (dcgm4(), "", ""),
        (dcgm4("Fail", 2), "exclude", "GPU 3: DCGM's test software fails"),
        (dcgm4("Fail", 6), "exclude", "GPU 3: DCGM's test software fails"),
        (dcgm4("Fail", 5), "warn", "GPU 3: DCGM's test software fails"),  # persistence mode is off, say
        (dcgm4("Skip"), "unknown", "DCGM skipped every test"),
        ("Error: unable to establish a connection to the specified host", "unknown", "unable to establish"),
        ('{"DCGM Diagnostic": {"runtime_error": "GPU busy"}}', "unknown", "did not run: GPU busy"),
        ('{"results": []}', "unknown", "layout not known"),
    ],
)
def test_dcgm_is_read_in_both_layouts(tmp_path, text, level, what):
    (tmp_path / "out").write_text(text)
    value = measured(dcgm, tmp_path, dcgmi=f'[ "$*" = "diag -r 2 -j" ] && cat {tmp_path}/out')
    found = through_json(dcgm, {"node1": dcgm.parse(dcgm4()), "node2": value})
    assert [(one.node, one.level) for one in found] == ([("node2", level)] if level else [])
    assert all(what in one.what for one in found)


def test_dcgm_is_skipped_where_it_is_not_installed(tmp_path):
    value = measured(dcgm, tmp_path)
    assert value == {"skipped": "dcgmi is not installed"}
    assert dcgm.judge({"node1": value}, SETTING) == []


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [Setting(), SETTING], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["dcgm", "filesystems", "gpus", "memory", "nvlink", "ports", "processes", "xids"])
def test_every_check_measures_this_machine_without_a_traceback(name, setting):
    check = checks.load(name)
    value = check.measure(setting, Probe())
    findings = through_json(check, {"node1": value}, setting)
    assert all(one.check == name and one.node == "node1" for one in findings)
    assert all(isinstance(text, str) for text in getattr(check, "facts", lambda _: {})(value).values())


@pytest.mark.parametrize("name", ["dcgm", "filesystems", "gpus", "memory", "nvlink", "ports", "processes", "xids"])
def test_a_check_that_hung_or_failed_is_never_a_pass(name):
    check = checks.load(name)
    hung = {"unknown": "no answer within 120 s", "timeout": 120}
    broken = {"unknown": "KeyError: 'x' (gpus.py:10)"}
    found = check.judge({"node1": hung, "node2": broken}, SETTING)
    assert [(one.node, one.level) for one in found] == [("node1", "exclude"), ("node2", "unknown")]
