"""The inventory: real answers of this machine, and made-up ones of several nodes that differ."""

from __future__ import annotations

import copy
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import checks
from launcher.checks import Probe, addresses, clock, code, environment, imports, limits, software, storage
from launcher.preflight import DIFFERS, FABRIC, TOO_FEW, Setting, from_json, parity, to_json

REPORTS = Path(__file__).parent / "data" / "ds_report"
ROOT = Path(__file__).parents[1]
INVENTORY = ["addresses", "clock", "code", "environment", "imports", "limits", "software", "storage"]


def ds_report(name):
    return software.parse((REPORTS / f"{name}.txt").read_text())


def node(report="0.19.8-cpu", **changes):
    """The answer of software on one healthy node."""
    value = {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "cuda": "",
        "hip": "",
        "gpus": 0,
        "packages": {"transformers": "4.57.1", "numpy": "2.3.5"},
        "executable": "/opt/venv/bin/python",
        "report": ds_report(report) if isinstance(report, str) else report,
        "driver": "",
        "kernel": "6.1.0-40-amd64",
        "glibc": "2.36",
    }
    return {**value, **changes}


def gpu_node(report="0.19.8-cuda.written", **changes):
    cuda = {"torch": "2.9.1+cu128", "cuda": "12.8", "nccl": "2.27.5", "gpus": 8, "driver": "570.86.15"}
    return node(report, **{**cuda, **changes})


def nodes(*values):
    return {f"node{n}": value for n, value in enumerate(values, start=1)}


def brief(findings):
    return [(one.level, one.node, one.code) for one in findings]


def apart(check, lines, kind, setting="Setting()"):
    """What a check measures after these shell commands, in a namespace of its own: n of network, m of mounts."""
    ask = (
        f"import json; from launcher.checks import {check} as check, Probe; from launcher.preflight import Setting; "
    )
    ask += f"print(json.dumps(check.measure({setting}, Probe())))"
    argv = ["unshare", f"-Ur{kind}", "sh", "-c", f'{lines} && exec "$@"', "sh", sys.executable, "-c", ask]
    answer = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if answer.returncode:
        why = f"no namespaces here: {answer.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    return json.loads(answer.stdout)


# --- all of them -------------------------------------------------------------------------------------------------


def test_the_folder_is_the_registry():
    assert set(INVENTORY) <= set(checks.of("inventory"))


@pytest.mark.parametrize("name", INVENTORY)
def test_a_check_that_hung_excludes_and_one_that_could_not_look_does_not_pass(name):
    found = nodes(
        {"unknown": "no answer within 120 s", "timeout": 120.0}, {"unknown": "Traceback"}, {"skipped": "no"}
    )
    assert brief(checks.load(name).judge(found, Setting())) == [("exclude", "node1", 0), ("unknown", "node2", 0)]


@pytest.mark.parametrize("name", INVENTORY)
def test_nobody_answering_is_no_crash(name):
    assert checks.load(name).judge({}, Setting()) == []


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in ("imports", "software"))) for one in INVENTORY]
)
def test_this_machine_is_measured_and_three_of_its_kind_are_alike(name, tmp_path):
    """Really: what measure gives survives JSON, has facts, and three nodes that give it have nothing to block."""
    check = checks.load(name)
    setting = Setting(
        checkpoint_dir=str(tmp_path), checkpoint_bytes=10, shm_bytes=1 << 20, files=(__file__,), nodes=3
    )
    value = json.loads(json.dumps(check.measure(setting, Probe())))
    assert not {"unknown", "skipped", "error"} & set(value)
    if name == "clock":
        value |= {"asked": value["time"] - 0.01, "answered": value["time"] + 0.01}
    assert all(isinstance(key, str) and isinstance(word, str) for key, word in check.facts(value).items())
    assert check.facts(value) or name == "environment"
    findings = check.judge(nodes(value, value, value), setting)
    assert [one for one in findings if one.level in ("exclude", "block", "unknown")] == []
    assert [one for one in findings if one.node] == []  # nobody is odd
    assert to_json(findings) == to_json([from_json(type(one), to_json(one)) for one in findings])


# --- who is odd --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), ""),
        (("a",), "a"),
        (("b", "a"), "a and b"),
        (("a", "b", "c", "d"), "a, b, c and d"),
        (tuple(f"node{n:04}" for n in range(1024)), "node0000, node0001, node0002 and 1021 more"),
    ],
)
def test_a_list_of_nodes_stays_readable(words, text):
    assert parity.listing(words) == text


@pytest.mark.parametrize(
    ("values", "who"),
    [
        (["a", "a"], []),
        (["a", "a", "b"], ["node3"]),
        (["a", "b", "a", "c", "a"], ["node2", "node4"]),
        (["a", "b"], [""]),
        (["a", "a", "b", "b"], [""]),
        (["a", "b", "c"], [""]),
        (["a", "a", "b", "c"], [""]),  # half is no majority
        (["", "", "b"], ["node3"]),
    ],
)
def test_the_minority_is_odd_and_half_against_half_is_nobody(values, who):
    findings = parity.differing("x", "torch", nodes(*values))
    assert [one.node for one in findings] == who
    assert {one.level for one in findings} <= {"block" if who == [""] else "exclude"}
    assert {one.code for one in findings} <= {DIFFERS}
    assert brief(parity.differing("x", "glibc", nodes("a", "b"), level="warn")) == [("warn", "", 0)]


def test_what_is_wrong_everywhere_is_said_once_and_blocks():
    bad = [parity.Finding("x", "exclude", "no torch", node=name, measured=name) for name in ("node1", "node2")]
    assert brief(parity.together(bad, ["node1", "node2"])) == [("block", "", DIFFERS)]
    assert brief(parity.together(bad, ["node1", "node2", "node3"])) == [
        ("exclude", "node1", 0),
        ("exclude", "node2", 0),
    ]
    assert brief(parity.together(bad[:1], ["node1"])) == [("exclude", "node1", 0)]  # one node is no set


# --- ds_report ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ops", "no", "deepspeed"),
    [
        ("0.16.0-cpu", 6, ["async_io"], "0.16.0"),
        ("0.19.6-cpu", 7, ["async_io"], "0.19.6"),
        ("0.19.8-cpu", 9, ["async_io"], "0.19.8"),
        ("0.19.8-cpu-forced", 9, ["async_io"], "0.19.8"),
        ("0.19.8-cpu-libaio", 9, [], "0.19.8"),
        ("0.19.8-cpu-warnings-hidden", 9, ["async_io"], "0.19.8"),
        ("0.19.8-cuda-forced-without-cuda", 23, ["async_io", "evoformer_attn", "gds"], "0.19.8"),
        ("0.19.8-cuda.written", 23, ["evoformer_attn"], "0.19.8"),
    ],
)
def test_every_captured_report_is_read(name, ops, no, deepspeed):
    found = ds_report(name)
    assert len(found["ops"]) == ops
    assert sorted(op for op, (_, compatible) in found["ops"].items() if not compatible) == no
    assert found["ninja"] is True
    assert software.facts({"report": found})["deepspeed"] == deepspeed


def test_a_report_gives_versions_warnings_and_what_is_installed():
    found = ds_report("0.19.8-cuda.written")
    assert found["ops"]["fused_adam"] == [True, True]
    assert found["ops"]["cpu_adam"] == [False, True]
    assert found["general"]["torch cuda version"] == "12.8"
    assert software.facts({"report": found})["nvcc"] == "12.8"
    assert "nvcc" not in software.facts({"report": ds_report("0.19.8-cuda-forced-without-cuda")})
    assert ds_report("0.19.8-cpu-without-ninja")["ninja"] is False
    assert "async_io: please install the libaio-dev package with apt" in ds_report("0.19.8-cpu")["warnings"]
    said = ds_report("0.19.8-cpu-shm-64m")["warnings"]
    assert any(one.startswith("/dev/shm size might be too small") for one in said)


def test_a_commit_is_read_and_a_local_version_kept():
    text = (
        (REPORTS / "0.19.8-cpu.txt")
        .read_text()
        .replace("0.19.8, unknown, unknown", "0.19.9+f583d42, f583d42, master")
    )
    row = software.facts({"report": software.parse(text)})
    assert (row["deepspeed"], row["commit"]) == ("0.19.9+f583d42", "f583d42")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("op name ................ installed .. compatible", "op .. state"),
        ("DeepSpeed general environment info:", "Environment:"),
        ("deepspeed info", "deepspeed release"),
        ("torch version ....................", "torch version:"),
        ("cpu_adam ............... \x1b[93m[NO]", "cpu_adam ............... [MAYBE]"),
        ("pin_memory ............. \x1b[93m[NO]\x1b[0m ....... \x1b[92m[OKAY]", "pin_memory ... [NO] ... [GOOD]"),
        ("ninja .................. \x1b[92m[OKAY]", "ninja .................. [PERHAPS]"),
    ],
)
def test_an_unknown_layout_is_unknown(old, new):
    text = (REPORTS / "0.19.8-cpu.txt").read_text()
    assert old in text
    found = software.parse(text.replace(old, new))
    assert set(found) == {"unknown"}
    [one] = software.judge(nodes(node(), node(), node(found)), Setting())
    assert (one.level, one.node) == ("unknown", "node3")


@pytest.mark.parametrize(
    "text", ["", "\n", "Traceback (most recent call last):", "{}", "op name .. installed .. compatible"]
)
def test_no_report_is_unknown(text):
    assert "unknown" in software.parse(text)
    assert "unknown" in ds_report("0.19.8-cpu-ops-hidden")


def test_compilers_may_speak_in_between():
    text = (REPORTS / "0.19.8-cpu.txt").read_text()
    noise = (
        "/usr/bin/ld: cannot find -laio: No such file\ncollect2: error: ld returned 1 exit status\ncpu_adagrad ..."
    )
    assert software.parse(text.replace("cpu_adagrad ...", noise, 1)) == software.parse(text)


# --- software ----------------------------------------------------------------------------------------------------


def test_healthy_nodes_have_nothing_to_say():
    assert software.judge(nodes(node(), node(), node(), node()), Setting(deepspeed="0.19.8", ops=("cpu_adam",))) == []
    setting = Setting(gpus=8, deepspeed="0.19.8", ops=("fused_adam", "cpu_adam", "async_io"))
    assert software.judge(nodes(gpu_node(), gpu_node()), setting) == []


def test_another_deepspeed_is_named_with_what_the_others_have():
    found = nodes(node(), node(), node("0.19.6-cpu"), node())
    [one] = software.judge(found, Setting(deepspeed="0.19.8"))
    assert (one.level, one.node, one.code) == ("exclude", "node3", DIFFERS)
    assert (one.measured, one.expected) == ("0.19.6", "0.19.8, as on node1, node2 and node4")
    assert one.what == "DeepSpeed is 0.19.6, not 0.19.8"


def test_half_against_half_blocks_and_blames_nobody():
    found = nodes(node(), node("0.19.6-cpu"), node("0.19.6-cpu"), node())
    for setting in (Setting(), Setting(deepspeed="0.19.8")):
        [one] = software.judge(found, setting)
        assert (one.level, one.node, one.code) == ("block", "", DIFFERS)
        assert "0.19.6 on node2 and node3; 0.19.8 on node1 and node4" in one.what


@pytest.mark.parametrize("reports", [["0.19.6-cpu"], ["0.19.6-cpu"] * 3, ["0.19.6-cpu"] * 2 + ["0.19.8-cpu"]])
def test_another_deepspeed_than_the_plan_s_blocks_and_names_the_key(reports):
    """Also where the few that are as planned are in the minority: they are not the odd ones."""
    [one] = software.judge(nodes(*map(node, reports)), Setting(deepspeed="0.19.8"))
    assert (one.level, one.node, one.code) == ("block", "", DIFFERS)
    assert "environment.deepspeed" in one.expected
    assert 'environment.deepspeed: "0.19.6"' in one.fix


def test_a_local_build_of_the_planned_release_is_as_planned():
    text = (REPORTS / "0.19.8-cpu.txt").read_text().replace("0.19.8, unknown", "0.19.8+unknown, unknown")
    found = node(software.parse(text))
    assert software.judge(nodes(found, found), Setting(deepspeed="0.19.8")) == []


@pytest.mark.parametrize(
    ("change", "gpus", "level"),
    [
        ({"torch": "2.9.0+cu128"}, 8, "exclude"),
        ({"cuda": "12.6"}, 8, "exclude"),
        ({"nccl": "2.27.3"}, 8, "exclude"),
        ({"python": "3.12.1"}, 8, "exclude"),
        ({"python": "3.11.9"}, 8, None),  # the patch release is no matter
        ({"driver": "570.124.06"}, 8, "exclude"),
        ({"driver": "570.124.06"}, 0, "warn"),
        ({"driver": ""}, 8, "exclude"),
        ({"kernel": "5.15.0-1"}, 8, "warn"),
        ({"glibc": "2.35"}, 8, "warn"),
        ({"packages": {"transformers": "4.41.2", "numpy": "2.3.5"}}, 8, "warn"),
        ({"packages": {"numpy": "2.3.5"}}, 8, "warn"),
    ],
)
def test_each_fact_has_its_row(change, gpus, level):
    found = nodes(gpu_node(), gpu_node(**change), gpu_node())
    expected = [(level, "node2", DIFFERS if level == "exclude" else 0)] if level else []
    said = software.judge(found, Setting(gpus=gpus))
    assert brief([one for one in said if "built for" not in one.what]) == expected


def test_packages_are_told_together():
    other = {"transformers": "4.41.2", "numpy": "2.3.4"}
    [one] = software.judge(nodes(node(), node(packages=other), node()), Setting())
    assert one.what == "2 python packages differ: numpy 2.3.4 (not 2.3.5) and transformers 4.41.2 (not 4.57.1)"
    [one] = software.judge(nodes(node(), node(packages=other)), Setting())
    assert (one.level, one.node) == ("warn", "")


@pytest.mark.parametrize(
    ("torch", "hangs"),
    [
        ("2.6.0+cu124", False),
        ("2.6.1", True),
        ("2.7.0+cu126", True),
        ("2.7.0a0+git", True),
        ("2.7.1", False),
        ("?", False),
    ],
)
def test_releases_of_torch_that_are_known_to_hang(torch, hangs):
    found = nodes(*[gpu_node(torch=torch)] * 3)
    said = [one for one in software.judge(found, Setting(gpus=8)) if "device_id" in one.what]
    assert brief(said) == [("warn", "", 0)] * hangs


def test_torch_without_the_gpus_of_the_job():
    found = nodes(gpu_node(), gpu_node(gpus=7), gpu_node())
    [one] = software.judge(found, Setting(gpus=8))
    assert (one.level, one.node, one.what, one.code) == ("exclude", "node2", "torch sees 7 of 8 GPUs", 0)
    said = software.judge(nodes(node(), node()), Setting(gpus=8))
    assert brief(said) == [("block", "", DIFFERS)]
    assert "built for CPU" in said[0].what


def test_an_op_that_the_job_needs_and_a_node_cannot_have():
    found = nodes(node("0.19.8-cpu-libaio"), node("0.19.8-cpu-libaio"), node("0.19.8-cpu"))
    needed, differs = software.judge(found, Setting(ops=("cpu_adam", "async_io")))
    assert (needed.level, needed.node) == ("exclude", "node3")
    assert "the job needs async_io: async_io requires the dev libaio" in needed.what
    assert "libaio-dev" in needed.fix
    assert (differs.level, differs.node, differs.what) == (
        "warn",
        "node3",
        "op async_io is incompatible, not compatible",
    )
    [differs] = software.judge(found, Setting())  # not needed: only a difference
    assert differs.level == "warn"


def test_an_op_that_has_to_be_compiled_needs_ninja_and_nvcc():
    bare = node("0.19.8-cpu-without-ninja")
    assert "ninja" in software.judge(nodes(bare), Setting(ops=("cpu_adam",)))[0].what
    assert brief(software.judge(nodes(bare, bare), Setting())) == [("warn", "", 0)]
    for text, said in [("12.8", None), ("11.8", "does not compile for"), ("[FAIL] nvcc missing", "nvcc missing")]:
        report = ds_report("0.19.8-cuda.written")
        report["general"]["nvcc version"] = text
        got = software.judge(nodes(gpu_node(report=report)), Setting(gpus=8, ops=("cpu_adam",)))
        assert [said in one.what and one.level == "exclude" for one in got] == ([True] if said else [])
    assert "not in the table" in software.judge(nodes(node()), Setting(ops=("fused_lamb",)))[0].what


def test_an_op_that_was_built_for_another_cuda():
    other = gpu_node(cuda="12.6")
    [one] = software.judge(nodes(other), Setting(gpus=8, ops=("fused_adam",)))
    assert (one.level, one.node) == ("exclude", "node1")
    assert "built for CUDA 12.8, and torch has 12.6" in one.what
    [one] = software.judge(nodes(other), Setting(gpus=8))
    assert one.level == "warn"


def test_a_node_without_deepspeed_or_torch():
    no = {"error": "ModuleNotFoundError: No module named 'deepspeed'"}
    assert brief(software.judge(nodes(node(), node(no), node()), Setting())) == [("exclude", "node2", DIFFERS)]
    assert brief(software.judge(nodes(node(no), node(no)), Setting())) == [("block", "", DIFFERS)]
    bare = {"python": "3.11.7", "error": "ImportError: libcudart.so.12", "packages": {}, "executable": "python"}
    bare |= {"report": {"error": bare["error"]}, "driver": "", "kernel": "6.1.0-40-amd64", "glibc": "2.36"}
    [one] = software.judge(nodes(node(), bare, node()), Setting())
    assert (one.level, one.node) == ("exclude", "node2")
    assert one.what == "torch does not start: ImportError: libcudart.so.12"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("", ""),
    ],
)
def test_the_driver_s_version(text, version):
    assert software.driver(text) == version


@pytest.mark.slow
def test_really_an_interpreter_without_torch_a_report_that_hangs_and_one_that_fails(tmp_path):
    """Other interpreters are run as the agent runs them: nothing of ours is installed there."""

    def measure(patience, **environ):
        ask = (
            "import json, sys; from launcher.checks import software, Probe; from launcher.preflight import Setting; "
        )
        ask += f"print(json.dumps(software.measure(Setting(stage_timeout={patience}), Probe())))"
        answer = subprocess.run(
            [sys.executable, "-c", ask], env=os.environ | environ, capture_output=True, check=True
        )
        return json.loads(answer.stdout)

    package = tmp_path / "broken" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')\n")
    found = measure(100, PYTHONPATH=f"{package.parent}:{ROOT}")
    assert found["report"] == {"error": "ImportError: libfoo.so.1: cannot open shared object file"}
    assert found["torch"]
    (package / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    begin = time.monotonic()
    found = measure(3, PYTHONPATH=f"{package.parent}:{ROOT}")
    assert "ds_report" in found["unknown"]
    assert found["timeout"] == pytest.approx(2.7)
    assert time.monotonic() - begin < 30
    torch = tmp_path / "none" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise OSError('libcudart.so.12: no such file')\n")
    found = measure(100, PYTHONPATH=f"{torch.parent}:{ROOT}")
    assert found["error"] == found["report"]["error"] == "OSError: libcudart.so.12: no such file"


# --- environment -------------------------------------------------------------------------------------------------


def env(files=None, lost="", **variables):
    return {"environment": variables, "files": files or {}, "lost": lost}


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("NCCL_ALGO", "exclude"),
        ("NCCL_SOCKET_IFNAME", "warn"),
        ("NCCL_DEBUG", "note"),
        ("TORCH_NCCL_BLOCKING_WAIT", "exclude"),
        ("FI_PROVIDER", "warn"),
        ("UCX_TLS", "warn"),
        ("HF_HOME", "warn"),
        ("CUDA_VISIBLE_DEVICES", "warn"),
        ("LD_LIBRARY_PATH", "warn"),
    ],
)
def test_a_variable_that_one_node_has_otherwise(name, level):
    found = nodes(env(**{name: "a"}), env(**{name: "a"}), env(**{name: "b"}))
    [one] = environment.judge(found, Setting())
    assert (one.level, one.node, one.measured) == (level, "node3", "b")
    assert one.expected == "a, as on node1 and node2"
    [missing] = environment.judge(nodes(env(**{name: "a"}), env(**{name: "a"}), env()), Setting())
    assert (missing.node, missing.measured) == ("node3", "none")


def test_half_against_half_in_the_environment():
    [one] = environment.judge(nodes(env(NCCL_PROTO="LL"), env()), Setting())
    assert (one.level, one.node, one.code) == ("block", "", DIFFERS)


def test_of_a_path_only_what_differs_is_told():
    paths = ["/usr/local/bin:/usr/bin", "/usr/local/bin:/usr/bin", "/opt/bin:/usr/local/bin:/usr/bin"]
    [one] = environment.judge(nodes(*(env(PATH=path) for path in paths)), Setting())
    assert (one.node, one.measured, one.expected) == ("node3", "/opt/bin", "none, as on node1 and node2")
    [one] = environment.judge(nodes(env(PATH="/a:/b"), env(PATH="/a:/b"), env(PATH="/b:/a")), Setting())
    assert one.measured == "/b:/a"  # only the order


def test_secrets_and_names_of_one_node_stay_where_they_are():
    told = environment.told(
        {
            "HF_TOKEN": "hf_abcdefghijk",
            "HF_HUB_API_KEY": "x",
            "NCCL_NET_PASSWORD": "x",
            "HF_ENDPOINT": "https://me:word@mirror.example",
            "HF_HOME": "hf_abcdefghijklmn",
            "AWS_REGION": "x",
            "SLURM_NODEID": "3",
            "HOSTNAME": "node3",
            "MASTER_ADDR": "node1",
            "NCCL_DEBUG": "WARN",
        }
    )
    assert told == {"NCCL_DEBUG": "WARN"}


def test_a_conf_file_is_read_as_nccl_reads_it():
    text = "# NCCL_ALGO=Ring\nNCCL_PROTO=LL\n NCCL_X=1\nNCCL_PROTO=Simple\nnothing\nNCCL_NET=a=b"
    assert environment.conf(text) == {"NCCL_PROTO": "LL", " NCCL_X": "1", "NCCL_NET": "a=b"}


def test_a_forgotten_conf_file_is_named(monkeypatch, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nccl.conf").write_text("NCCL_IB_DISABLE=1\nNCCL_DEBUG=INFO\n")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NCCL_CONF_FILE", "/gone/nccl.conf")
    value = environment.measure(Setting(), Probe(root=str(tmp_path)))
    assert value["files"] == {"/etc/nccl.conf": {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}}
    assert value["lost"] == "/gone/nccl.conf"
    said = environment.judge(nodes(value, value), Setting())
    assert [(one.level, one.node) for one in said] == [("warn", ""), ("warn", "")]
    # what the environment overrides is not NCCL's setting
    assert said[0].what.startswith("/etc/nccl.conf sets NCCL_IB_DISABLE=1 on node1 and node2")
    alone = {**env(NCCL_DEBUG="WARN"), "files": value["files"]}
    plain = env(NCCL_DEBUG="WARN")
    said = environment.judge(nodes(plain, alone, plain), Setting())
    assert [(one.level, one.node) for one in said] == [("exclude", "node2"), ("warn", "node2")]


def test_the_user_s_file_goes_before_the_system_s():
    files = {"/root/.nccl.conf": {"NCCL_ALGO": "Ring"}, "/etc/nccl.conf": {"NCCL_ALGO": "Tree", "NCCL_PROTO": "LL"}}
    assert environment.effective(env(files)) == {"NCCL_ALGO": "Ring", "NCCL_PROTO": "LL"}


# --- limits ------------------------------------------------------------------------------------------------------

PROC_LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max stack size            unlimited            unlimited            bytes
Max core file size        0                    unlimited            bytes
Max open files            1024                 1048576              files
Max locked memory         8388608              8388608              bytes
"""


def granted(shm=16 << 30, memory=0, cpus=64, nccl="2.29.2", may_lock=False, **soft):
    pairs = {"memlock": -1, "nofile": 1 << 20, "stack": 8 << 20, "core": 0, **soft}
    value = {"limits": {name: [number, -1] for name, number in pairs.items()}, "may_lock": may_lock, "memory": memory}
    return {**value, "shm": shm, "shm_free": shm, "cpus": cpus, "cpu_quota": 0.0, "nccl": nccl}


INFINIBAND = {"fabric": "infiniband-ndr", "backend": "nccl", "gpus": 8}


def test_limits_are_read_from_the_kernel_s_own_list(tmp_path):
    assert limits.limits(PROC_LIMITS) == {
        "stack": [-1, -1],
        "core": [0, -1],
        "nofile": [1024, 1 << 20],
        "memlock": [8 << 20, 8 << 20],
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits.measure(Setting(), Probe())["limits"]["nofile"] == [soft, hard]
    assert "unknown" in limits.measure(Setting(), Probe(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("value", "setting", "expected"),
    [
        (granted(), INFINIBAND, []),
        (granted(memlock=65536), INFINIBAND, ["exclude"]),
        (granted(memlock=65536), {"ports": 8}, ["exclude"]),
        (granted(memlock=65536, may_lock=True), INFINIBAND, []),  # as root
        (granted(memlock=65536), {"fabric": "slingshot", "backend": "nccl"}, ["warn"]),
        (granted(memlock=65536), {"fabric": "ethernet", "backend": "nccl"}, []),
        (granted(memlock=65536), {}, []),
        (granted(shm=64 << 20), {}, ["warn"]),
        (granted(shm=0), {}, ["exclude"]),
        (granted(shm=64 << 20), {"shm_bytes": 64 << 20}, []),
        ({**granted(), "shm_free": 1 << 30}, {}, ["warn"]),
        (granted(nofile=1024), {}, ["warn"]),
        (granted(nofile=1025), {}, []),
        (granted(nofile=65536), {"nodes": 64}, ["warn"]),
        (granted(nofile=-1), {"nodes": 64}, []),
        (granted(stack=-1, nccl="2.27.5"), INFINIBAND, ["warn"]),
        (granted(stack=-1, nccl=""), INFINIBAND, ["warn"]),
        (granted(stack=-1, nccl="2.28.3"), INFINIBAND, []),
        (granted(stack=-1, nccl="2.27.5"), {}, []),
    ],
)
def test_what_a_node_grants(value, setting, expected):
    setting = Setting(**setting)
    assert brief(limits.judge(nodes(value), setting)) == [(level, "node1", 0) for level in expected]
    everywhere = ["block" if level == "exclude" else level for level in expected]
    assert [(one.level, one.node) for one in limits.judge(nodes(value, value), setting)] == [
        (w, "") for w in everywhere
    ]


def test_a_node_that_grants_less_than_the_others():
    found = nodes(granted(), granted(memory=64 << 30), granted(), granted(cpus=32), granted(core=-1))
    said = limits.judge(found, Setting())
    assert [(one.level, one.node) for one in said] == [("note", "node5"), ("warn", "node2"), ("warn", "node4")]
    assert said[1].what == "memory limit is 64.0 GiB, not none"
    assert brief(limits.judge(nodes(granted(cpus=32), granted()), Setting())) == [("warn", "", 0)]


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [
        ({}, 0, 0.0),
        (
            {
                "proc/self/cgroup": "0::/system.slice/job_7/step_0",
                "sys/fs/cgroup/system.slice/job_7/memory.max": "68719476736",
                "sys/fs/cgroup/system.slice/job_7/step_0/memory.max": "max",
                "sys/fs/cgroup/system.slice/job_7/cpu.max": "400000 100000",
                "sys/fs/cgroup/system.slice/cpu.max": "max 100000",
            },
            64 << 30,
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm",
                "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "34359738368",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_period_us": "100000",
            },
            32 << 30,
            0.0,
        ),
    ],
)
def test_the_smallest_limit_of_all_cgroups_above(tmp_path, files, memory, cpus):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    probe = Probe(root=str(tmp_path))
    assert (limits.cgroup_memory(probe), limits.cgroup_cpus(probe)) == (memory, cpus)


def test_really_a_small_shared_memory():
    value = apart("limits", "mount -t tmpfs -o size=64m mine /dev/shm", "m")
    assert value["shm"] == 64 << 20
    [one] = [one for one in limits.judge(nodes(value), Setting()) if "/dev/shm" in one.what]
    assert (one.level, one.measured, one.expected) == ("warn", "0.1 GiB", ">= 8.0 GiB")


# --- storage -----------------------------------------------------------------------------------------------------


def disk(machine="a", **changes):
    """Checkpoints on NFS, the rest on a local disk, all healthy."""
    here = {"there": "/tmp", "source": "/dev/sda1", "mount": "/", "type": "ext4", "mode": "rw", "error": ""}
    here |= {"total": 10**12, "free": 10**11, "inodes": 10**6, "inodes_free": 10**5}
    shared = {**here, "path": "/ckpt/run", "there": "/ckpt", "source": "nas:/ckpt", "mount": "/ckpt", "type": "nfs4"}
    places = {"checkpoints": shared, "temporary": {**here, "path": "/tmp"}, "working": {**here, "path": "/home/a"}}
    for role, change in changes.items():
        places[role] = {**places[role], **change}
    return {"machine": machine, "places": places}


CHECKPOINT = Setting(checkpoint_dir="/ckpt/run", checkpoint_bytes=10**10, nodes=4, per_node=8)


@pytest.mark.parametrize(
    ("change", "level", "says"),
    [
        ({}, None, ""),
        ({"checkpoints": {"free": 22 * 10**9}}, None, ""),
        ({"checkpoints": {"free": 22 * 10**9 - 1}}, "exclude", "too little room"),
        ({"checkpoints": {"error": "Permission denied"}}, "exclude", "Permission denied"),
        ({"checkpoints": {"error": "Read-only file system", "mode": "ro"}}, "exclude", "mounted read-only"),
        ({"working": {"error": "Stale file handle"}}, "exclude", "the job's own directory"),
        ({"checkpoints": {"inodes_free": 127}}, "exclude", "inodes"),
        ({"checkpoints": {"inodes": 0, "inodes_free": 0}}, None, ""),  # btrfs and NFS servers that do not count
        ({"temporary": {"free": 10**8}}, "warn", "nearly full"),
        ({"temporary": {"inodes_free": 3}}, "warn", "inodes"),
    ],
)
def test_fault_66_a_full_disk_is_seen_before_the_first_checkpoint(change, level, says):
    said = storage.judge(nodes(disk(), disk(**change), disk()), CHECKPOINT)
    assert brief(said) == ([(level, "node2", 0)] if level else [])
    assert all(says in one.what for one in said)
    said = storage.judge(nodes(disk(**change), disk(**change)), CHECKPOINT)
    assert brief(said) == ([("block", "", TOO_FEW) if level == "exclude" else (level, "", 0)] if level else [])


def test_a_node_without_the_mount_is_named():
    other = {"type": "ext4", "mount": "/", "source": "/dev/sda1"}
    [one] = storage.judge(nodes(disk(), disk(), disk(checkpoints=other)), CHECKPOINT)
    assert (one.level, one.node, one.code) == ("exclude", "node3", DIFFERS)
    assert (one.measured, one.expected) == ("ext4 at /", "nfs4 at /ckpt, as on node1 and node2")


def test_one_file_system_under_two_server_names_is_one():
    assert storage.judge(nodes(disk(), disk(checkpoints={"source": "10.0.0.2:/ckpt"})), CHECKPOINT) == []
    another = {"source": "other:/ckpt", "total": 2 * 10**12}
    [one] = storage.judge(nodes(disk(), disk(), disk(checkpoints=another)), CHECKPOINT)
    assert (one.level, one.node, one.code) == ("exclude", "node3", DIFFERS)


def test_checkpoints_on_each_node_s_own_disk():
    local = {"checkpoints": {"type": "xfs", "source": "/dev/nvme0n1", "mount": "/"}}
    [one] = storage.judge(nodes(disk("a", **local), disk("b", **local)), CHECKPOINT)
    assert (one.level, one.node) == ("warn", "")
    assert storage.judge(nodes(disk("a", **local), disk("a", **local)), CHECKPOINT) == []  # one machine


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/scratch/a b/run", ("nas:/a b", "/scratch/a b", "nfs4", "ro")),
        ("/scratch", ("tmpfs", "/scratch", "tmpfs", "rw")),
        ("/scratchy", ("/dev/root", "/", "ext4", "rw")),
    ],
)
def test_the_mount_of_a_path(path, expected):
    mounts = "/dev/root / ext4 rw,relatime 0 0\n/dev/sdb /scratch xfs rw 0 0\ntmpfs /scratch tmpfs rw 0 0\n"
    mounts += "nas:/a\\040b /scratch/a\\040b nfs4 ro,vers=4.2 0 0"
    found = storage.mount(mounts, path)
    assert (found["source"], found["mount"], found["type"], found["mode"]) == expected


def test_really_a_directory_that_is_not_there_yet(tmp_path):
    setting = Setting(checkpoint_dir=str(tmp_path / "not" / "yet"))
    found = storage.measure(setting, Probe())["places"]["checkpoints"]
    assert (found["there"], found["error"]) == (str(tmp_path.resolve()), "")
    assert 0 < found["free"] <= found["total"]
    assert list(tmp_path.iterdir()) == []  # what was written is gone


def test_really_a_place_where_nothing_can_be_written():
    found = storage.measure(Setting(checkpoint_dir="/proc/1"), Probe())["places"]["checkpoints"]
    assert found["error"]
    assert found["type"] == "proc"


@pytest.mark.slow
def test_really_disks_that_are_full_read_only_or_out_of_inodes(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def checkpoints(lines):
        value = apart("storage", f"cd {tmp_path} && {lines}", "m", f"Setting(checkpoint_dir={str(disk)!r})")
        said = storage.judge(nodes(value), Setting(checkpoint_bytes=10**6))
        what = [one.what.split(" (checkpoints) ")[1] for one in said if "(checkpoints)" in one.what]
        return value["places"]["checkpoints"], what

    tmpfs = "mount -t tmpfs -o size={},nr_inodes={} mine disk"
    found, said = checkpoints(tmpfs.format("4m", 100))
    assert (found["type"], found["source"], found["total"], said) == ("tmpfs", "mine", 4 << 20, [])
    _, said = checkpoints(tmpfs.format("1m", 100))
    assert said == ["has too little room for two checkpoints of 1.0 MB"]
    _, said = checkpoints(f"{tmpfs.format('1m', 100)} && head -c 1048576 /dev/zero > disk/full")
    assert said == ["cannot be written: No space left on device"]
    _, said = checkpoints(tmpfs.format("4m", 4))
    assert said == ["has no inodes left for new files"]
    found, said = checkpoints("mount --bind disk disk && mount -o remount,bind,ro disk")
    assert (found["mode"], said) == ("ro", ["cannot be written: Read-only file system (mounted read-only)"])


# --- clock -------------------------------------------------------------------------------------------------------


def tick(ahead=0.0, before=0.1, after=0.1, synchronised=True):
    """A node whose clock is `ahead` of the coordinator's, read at 1000 s between asking and having the answer."""
    return {"time": 1000 + ahead, "asked": 1000 - before, "answered": 1000 + after, "synchronised": synchronised}


@pytest.mark.parametrize(
    ("values", "who"),
    [
        ([tick(), tick(0.2), tick(-0.2)], []),
        ([tick(), tick(), tick(0.8)], ["node3"]),
        ([tick(), tick(), tick(-300)], ["node3"]),
        ([tick(), tick(), tick(0.8, before=2, after=2)], []),  # within what the round trip leaves open
        ([tick(300), tick(300), tick(300), tick(300)], []),  # it is the coordinator's
        ([tick(300), tick(300), tick(0), tick(300)], ["node3"]),
        ([tick(), tick(5)], ["node2"]),
        ([tick()], []),
    ],
)
def test_fault_73_a_clock_that_is_off_is_named(values, who):
    said = clock.judge(nodes(*values), Setting())
    assert [(one.level, one.node) for one in said] == [("warn", name) for name in who]


def test_what_the_clock_finding_says():
    small, big = clock.judge(nodes(tick(), tick(1), tick(), tick(-5), tick()), Setting())
    assert (small.what, big.what[:28]) == ("the clock is 1.0 s ahead", "the clock is 5.0 s behind: s")
    assert small.measured == "+1.00 s +- 0.20 s"


def test_a_clock_that_nobody_sets_and_one_that_could_not_be_read_well():
    loose = tick(synchronised=False)
    assert brief(clock.judge(nodes(tick(), loose, tick()), Setting())) == [("note", "node2", 0)]
    assert brief(clock.judge(nodes(loose, loose), Setting())) == [("note", "", 0)]
    assert clock.judge(nodes(tick(synchronised=None)), Setting()) == []
    [one] = clock.judge(nodes(tick(), tick(before=5, after=5), tick()), Setting())
    assert (one.level, one.node) == ("note", "")


def test_without_the_coordinator_s_stamps_no_skew_is_claimed():
    assert (
        clock.judge(nodes({"time": 0.0, "synchronised": True}, {"time": 9e9, "synchronised": True}), Setting()) == []
    )


def test_really_the_kernel_says_whether_its_clock_is_set():
    assert clock.synchronised() in (True, False, None)
    before = time.time()
    assert before <= clock.measure(Setting(), Probe())["time"] <= time.time()


# --- addresses ---------------------------------------------------------------------------------------------------


def named(n=1, **changes):
    address = f"10.0.0.{n}"
    value = {"name": f"node{n}", "machine": f"boot-{n}", "resolved": [address], "why": "", "used": address}
    wires = {"lo": {"mtu": 65536, "addresses": ["127.0.0.1"]}, "eth0": {"mtu": 9000, "addresses": [address]}}
    value |= {"interfaces": wires, "wanted": {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": ""}}
    return {**copy.deepcopy(value), **changes}


def test_fault_35_a_name_that_is_a_loopback_address():
    said = addresses.judge(nodes(named(1), named(2, resolved=["127.0.1.1"]), named(3)), Setting())
    assert brief(said) == [("warn", "node2", 0)]
    assert "resolves to 127.0.1.1" in said[0].what
    wanted = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": ""}
    said = addresses.judge(nodes(named(1), named(2, resolved=["127.0.1.1"], wanted=wanted)), Setting())
    assert brief(said) == [("note", "node2", 0)]
    unresolved = named(2, resolved=[], why="Name or service not known")
    assert brief(addresses.judge(nodes(named(1), unresolved), Setting())) == [("warn", "node2", 0)]
    assert addresses.judge(nodes(unresolved), Setting()) == []  # one node reaches itself
    assert addresses.judge(nodes(named(1), named(2, resolved=["127.0.1.1", "10.0.0.2"])), Setting()) == []


def test_a_node_that_goes_by_a_loopback_address_among_other_machines():
    """Its agent runs where the coordinator does, and joined by 127.0.0.1."""
    local = {"used": "127.0.0.1", "wanted": {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": ""}}
    [one] = addresses.judge(nodes(named(1, **local), named(2), named(3)), Setting())
    assert (one.level, one.node, one.measured) == ("warn", "node1", "127.0.0.1")
    containers = [named(1, machine="boot", **local), named(2, machine="boot")]
    assert ("warn", "node1", 0) in brief(addresses.judge(nodes(*containers), Setting()))
    unreadable = [named(1, machine="", **local), named(2, machine="")]
    assert ("warn", "node1", 0) in brief(addresses.judge(nodes(*unreadable), Setting()))
    here = [named(n, name="vm", machine="boot", **local) for n in (1, 2)]
    assert [one.level for one in addresses.judge(nodes(*here), Setting())] == ["note"]
    assert addresses.judge(nodes(named(1, **local)), Setting()) == []


def test_a_name_of_loopback_is_no_note_where_that_address_is_used():
    """An address that is used excuses the name on one machine only."""
    odd = {"used": "127.0.0.1", "resolved": ["127.0.1.1"]}
    alone = [named(n, name="vm", machine="boot", **odd) for n in (1, 2)]
    assert {one.level for one in addresses.judge(nodes(*alone), Setting())} == {"note"}
    said = addresses.judge(nodes(named(1, **odd), named(2)), Setting())
    assert brief(said) == [("warn", "node1", 0)] * 2


def test_fault_28_two_machines_of_one_name_or_address():
    said = addresses.judge(nodes(named(1), named(2, name="node1"), named(3)), Setting())
    assert brief(said) == [("warn", "", 0)]
    wires = {"eth0": {"mtu": 9000, "addresses": ["172.17.0.2"]}}
    twice = [named(n, used="172.17.0.2", interfaces=wires) for n in (1, 2)]
    assert brief(addresses.judge(nodes(*twice), Setting())) == [("block", "", FABRIC)]


def test_nodes_that_are_one_machine_are_said_to_be():
    same = [named(n, name="vm", machine="boot") for n in (1, 2, 3)]
    [one] = addresses.judge(nodes(*same), Setting())
    assert (one.level, one.what[:41]) == ("note", "node1, node2 and node3 are one machine, a")


def test_fault_36_a_node_with_nothing_but_a_bridge():
    wires = {"lo": {"mtu": 65536, "addresses": ["127.0.0.1"]}, "docker0": {"mtu": 1500, "addresses": ["172.17.0.1"]}}
    said = addresses.judge(nodes(named(1), named(2, interfaces=wires, used="")), Setting())
    assert brief(said) == [("exclude", "node2", 0)]


def test_an_interface_with_another_mtu():
    wires = {"eth0": {"mtu": 1500, "addresses": ["10.0.0.2"]}}
    [one] = addresses.judge(nodes(named(1), named(2, interfaces=wires), named(3)), Setting())
    assert (one.level, one.node, one.measured) == ("warn", "node2", "1500")


@pytest.mark.parametrize(
    ("pattern", "name", "takes"),
    [
        ("eth", "eth0", True),
        ("=eth", "eth0", False),
        ("=eth0,eth1", "eth1", True),
        ("^docker,lo", "eth0", True),
        ("^docker,lo", "docker0", False),
        ("^=lo", "lo0", True),
        ("ens,eth", "ib0", False),
    ],
)
def test_nccl_s_interface_patterns(pattern, name, takes):
    assert addresses.matches(pattern, name) is takes


@pytest.mark.parametrize(
    ("wanted", "backend", "said"),
    [
        ({"NCCL_SOCKET_IFNAME": "ens"}, "nccl", ["exclude"]),
        ({"NCCL_SOCKET_IFNAME": "ens"}, "gloo", []),
        ({"NCCL_SOCKET_IFNAME": "eth,ens"}, "nccl", []),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "gloo", ["exclude"]),  # gloo takes whole names
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "gloo", []),
    ],
)
def test_an_interface_that_the_environment_names_and_the_node_has_not(wanted, backend, said):
    both = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "", **wanted}
    found = addresses.judge(nodes(named(1), named(2, wanted=both)), Setting(backend=backend))
    assert brief(found) == [(level, "node2", 0) for level in said]


def test_really_the_interfaces_of_this_machine(monkeypatch):
    monkeypatch.setenv("DSLAUNCH_ADDRESS", "127.0.0.1")
    value = addresses.measure(Setting(), Probe())
    lo = next(one for one in value["interfaces"].values() if "127.0.0.1" in one["addresses"])
    assert lo["mtu"] >= 1280
    assert addresses.facts(value)["interface"] == "lo"
    assert value["name"] == socket.gethostname()


def test_really_the_interfaces_of_a_network_namespace(monkeypatch):
    """/sys may still show another namespace's: these are asked of the kernel."""
    monkeypatch.setenv("DSLAUNCH_ADDRESS", "10.9.8.7")
    lines = "ip link set lo up && ip link add wire type bridge && ip link set wire mtu 1400 up"
    value = apart("addresses", f"{lines} && ip address add 10.9.8.7/24 dev wire", "n")
    assert set(value["interfaces"]) == {"lo", "wire"}
    assert value["interfaces"]["wire"]["mtu"] == 1400
    assert value["interfaces"]["wire"]["addresses"][0] == "10.9.8.7"
    facts = addresses.facts(value)
    assert (facts["interface"], facts["address"], facts["MTU"]) == ("wire", "10.9.8.7", "1400")


# --- code --------------------------------------------------------------------------------------------------------


def coded(sha="aa", git="", **files):
    return {"files": {"train.py": sha, **files}, "git": git, "here": "/job"}


def test_a_node_with_another_program_or_none():
    setting = Setting(files=("train.py",))
    [one] = code.judge(nodes(coded(), coded("bb"), coded()), setting)
    assert (one.level, one.node, one.code) == ("exclude", "node2", DIFFERS)
    gone = coded("!No such file or directory")
    [one] = code.judge(nodes(coded(), gone, coded()), setting)
    assert (one.level, one.node, one.code, one.expected) == ("exclude", "node2", 0, "the file, from /job")
    assert brief(code.judge(nodes(gone, gone), setting)) == [("block", "", TOO_FEW)]
    assert brief(code.judge(nodes(coded(), coded("bb")), setting)) == [("block", "", DIFFERS)]
    [one] = code.judge(nodes(coded(git="a1" * 20), coded(git="a1" * 20), coded(git="b2" * 20)), setting)
    assert (one.level, one.node, one.measured) == ("warn", "node3", "b2" * 6)


def test_really_files_are_hashed_and_a_large_one_by_size_and_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "WHOLE", 1000)
    small, large = tmp_path / "train.py", tmp_path / "data.bin"
    small.write_text("print(1)\n")
    large.write_bytes(b"x" * 2000)
    setting = Setting(files=("train.py", str(large), "gone.json"))

    def digests():
        return code.measure(setting, Probe())["files"]

    first = digests()
    assert first["gone.json"] == "!No such file or directory"
    assert digests() == first
    large.write_bytes(b"x" * 2001)
    assert digests()[str(large)] != first[str(large)]
    small.write_text("print(2)\n")
    assert digests()["train.py"] != first["train.py"]


def test_really_the_commit_of_a_checkout(tmp_path):
    def git(*argv, cwd=tmp_path / "repo"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *who, *argv], cwd=cwd, check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "repo" / "deep" / "er").mkdir(parents=True)
    git("init")
    git("commit", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD")
    probe = Probe()
    assert code.head(probe, str(tmp_path / "repo" / "deep" / "er")) == commit
    git("worktree", "add", "../tree", "-b", "other")
    assert code.head(probe, str(tmp_path / "tree")) == commit
    git("pack-refs", "--all")
    assert code.head(probe, str(tmp_path / "repo")) == commit
    assert code.head(probe, str(tmp_path / "tree")) == commit
    git("checkout", "--detach")
    assert code.head(probe, str(tmp_path / "repo")) == commit
    assert code.head(Probe(root=str(tmp_path)), "/nowhere") == ""


# --- imports -----------------------------------------------------------------------------------------------------


def imported(seconds, cached=1.0):
    return {"seconds": seconds, "cached": cached}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ([2, 2, 2], []),
        ([2, 2, 9], [("warn", "node3", 0)]),
        ([0.5, 0.5, 4], []),  # three times, and nobody notices
        ([2, 9], []),  # of two, nobody is the odd one
        ([2, 31], [("warn", "node2", 0)]),
        ([40, 45, 60], [("warn", "", 0)]),  # the file system, not a node
    ],
)
def test_a_slow_import(seconds, said):
    assert brief(imports.judge(nodes(*map(imported, seconds)), Setting())) == said


def test_a_file_system_that_serves_one_node_and_not_all():
    found = nodes(*({**imported(seconds), "alone": 2.0} for seconds in (20, 22, 25)))
    [one] = imports.judge(found, Setting())
    assert (one.level, one.node) == ("warn", "")
    assert one.what == "import torch takes 22.0 s on all 3 nodes at once, 2.0 s on one alone"
    busy = nodes(*({**imported(seconds), "alone": 2.0} for seconds in (6, 6, 6)))
    assert imports.judge(busy, Setting()) == []


def test_an_import_that_fails():
    bad = {"error": "ModuleNotFoundError: No module named 'torch'"}
    assert brief(imports.judge(nodes(imported(2), bad, imported(2)), Setting())) == [("exclude", "node2", DIFFERS)]
    assert brief(imports.judge(nodes(bad, bad), Setting())) == [("block", "", DIFFERS)]


@pytest.mark.slow
def test_really_an_import_that_fails_and_one_that_hangs(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert imports.measure(Setting(), Probe()) == {"error": "ImportError: libgomp.so.1"}
    fifo = tmp_path / "torch.py"
    fifo.unlink()
    os.mkfifo(fifo)  # reading it hangs, as a dead file server does
    found = imports.measure(Setting(stage_timeout=1.0), Probe())
    assert found["timeout"] == pytest.approx(0.45)
