"""`dslaunch lint --env`: variables in scripts, files and this shell, and what is said about them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import cli, envlint, facts, lint, nccl, spec
from launcher.errors import UserError

DSLAUNCH = Path(sys.executable).parent / "dslaunch"
RULES = envlint.rules()


def found(text: str, *, name: str = "run.sh", fabric: str | None = None) -> list[str]:
    row = facts.fabric(fabric) if fabric else None
    return [finding.rule for finding in envlint.judge(envlint.read(text, name=name), fabric=row)]


def values(text: str, *, name: str = "run.sh") -> dict[str, str | None]:
    return {one.name: one.value for one in envlint.read(text, name=name)}


# --- the tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_fault_that_it_finds_and_a_line_that_it_leaves_alone(rule):
    row = RULES[rule]
    assert rule in found(row["bad"], name="x.env", fabric=row.get("fabric"))
    assert rule not in found(row["good"], name="x.env", fabric=row.get("fabric"))
    assert all(row[key] for key in ("name", "title", "why", "fix", "source"))
    assert row["severity"] in lint.SEVERITIES


def test_ids_and_names_are_one_each():
    assert list(RULES) == sorted(RULES)
    names = [row.name for row in lint.rows().values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained(rule):
    text = lint.explained(lint.row(rule))
    assert text.startswith(f"{rule} {RULES[rule]['name']}")
    assert RULES[rule]["bad"].split()[0] in text
    assert "DeepSpeed  " not in text
    assert lint.row(RULES[rule]["name"]).id == rule


def test_the_catalogue_has_nccls_252_names():
    table = envlint.catalogue()
    assert len(table["variables"]) == 252
    assert set(table["variables"]) & set(table["others"]) == set()
    for name, row in table["variables"].items():
        assert set(row) <= {
            "kind",
            "least",
            "most",
            "words",
            "default",
            "since",
            "status",
            "until",
            "instead",
            "note",
        }, name
        assert row["kind"] in ("int", "bool", "enum", "list", "string"), name
        assert row.get("status") in (None, "undocumented", "deprecated", "removed"), name
        assert row.get("instead", "NCCL_CHECK_MODE") in table["variables"], name
        assert ("until" in row) == (row.get("status") in ("deprecated", "removed")), name


@pytest.mark.parametrize("name", envlint.catalogue()["variables"])
def test_a_default_is_never_a_fault(name):
    row = envlint.catalogue()["variables"][name]
    default = str(row["default"])
    if default != "auto" and name != "NCCL_CROSS_NIC":
        assert not {"ENV001", "ENV006", "ENV007", "ENV008"} & set(found(f"{name}={default}", name="x.env"))


def test_names_of_torch_are_those_of_the_installed_one():
    """A later torch brings other variables: then this table is to be looked at."""
    torch = pytest.importorskip("torch")
    folder = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    text = "".join((folder / name).read_text() for name in ("ProcessGroupNCCL.hpp", "FlightRecorder.hpp"))
    read = {word for word in text.split('"') if word.startswith(("TORCH_NCCL_", "TORCH_FR_")) and word.isidentifier()}
    assert len(read) > 20
    assert {name for name in read if found(f"{name}=1", name="x.env") == ["ENV001"]} == set()


# --- the advice that goes around ----------------------------------------------------------------------------

ADVICE = [
    ("NCCL_IB_GID_INDEX=3", None, "ENV017"),
    ("NCCL_IB_GID_INDEX=3", "infiniband", "ENV012"),
    ("NCCL_IB_DISABLE=1", None, "ENV011"),
    ("NCCL_IB_DISABLE=1", "infiniband", "ENV010"),
    ("NCCL_IB_DISABLE=1", "roce", "ENV010"),
    ("NCCL_P2P_DISABLE=1", None, "ENV021"),
    ("NCCL_ASYNC_ERROR_HANDLING=1", None, "ENV004"),
    ("FI_EFA_USE_DEVICE_RDMA=1", None, "ENV030"),
    ("FI_EFA_USE_DEVICE_RDMA=1", "efa", "ENV012"),
    ("FI_PROVIDER=efa", "efa", "ENV012"),
    ("FI_PROVIDER=tcp", "efa", "ENV010"),
    ("NCCL_PROTO=simple", "efa", "ENV012"),
    ("NCCL_NET_GDR_LEVEL=2", None, "ENV018"),
    ("NCCL_NET_GDR_LEVEL=5", None, "ENV018"),
    ("NCCL_IB_CUDA_SUPPORT=1", None, "ENV002"),
    ("NCCL_TREE_THRESHOLD=0", None, "ENV002"),
    ("NCCL_DEBUG=INFO", None, "ENV022"),
    ("NCCL_MIN_CHANNELS=8", None, "ENV001"),
    ("NCCL_SOCKET_IFNAME=eth0", None, "ENV016"),
    ("GLOO_SOCKET_IFNAME=eth0", None, "ENV016"),
    ("NCCL_IB_TIMEOUT=50", None, "ENV008"),
    ("CUDA_LAUNCH_BLOCKING=1", None, "ENV021"),
    ("CUDA_DEVICE_MAX_CONNECTIONS=1", None, "ENV029"),
    ("NCCL_IB_HCA=mlx5_1", None, "ENV014"),
    ("NCCL_IB_HCA=mlx5_1", "infiniband", "ENV014"),
    ("NCCL_IB_HCA=mlx5_0,mlx5_1", None, "ENV014"),
    ("NCCL_IB_HCA=mlx5_0:1,mlx5_1:1", None, "ENV014"),
    ("NCCL_NVLS_ENABLE=0", None, "ENV023"),
    ("NCCL_CROSS_NIC=1", "infiniband-rail", "ENV010"),
    ("NCCL_CROSS_NIC=1", None, "ENV033"),
    ("NCCL_DYNAMIC_CHUNK_SIZE=524288", "gcp-tcpxo", "ENV012"),
    ("NCCL_IB_HCA=eth0", "coreweave", "ENV010"),
    ("NCCL_ALGO=Ring", "gcp-tcpxo", "ENV012"),
]


@pytest.mark.parametrize(("text", "fabric", "rule"), ADVICE)
def test_wrong_advice_that_goes_around_is_recognised(text, fabric, rule):
    assert rule in found(text, name="x.env", fabric=fabric)


@pytest.mark.parametrize(
    ("text", "fabric"),
    [
        ("NCCL_DEBUG=WARN", None),
        ("NCCL_IB_DISABLE=0", "infiniband"),
        ("NCCL_IB_DISABLE=1", "ethernet"),  # the fabric's own
        ("NCCL_IB_GID_INDEX=3", "oci"),
        ("NCCL_ALGO=Ring\nNCCL_PROTO=Simple", "gcp-tcpx"),
        ("NCCL_IB_HCA==mlx5_0,mlx5_1", "infiniband"),
        ("NCCL_IB_HCA=mlx5_0", None),
        ("NCCL_IB_HCA=^mlx5_bond", None),
        ("NCCL_IB_HCA==mlx5_0:1,mlx5_1:1", None),
        ("GLOO_SOCKET_IFNAME=eth0", "gcp-tcpx"),  # the fabric says eth0 for NCCL
        ("NCCL_SOCKET_IFNAME=^lo,docker", None),
        ("NCCL_VERSION=2.27.3-1", None),  # NVIDIA's images carry it
        ("NCCL_HOME=/usr/local", None),
        ("NCCL_TESTS_MIN_BW=100", None),
        ("NCCL_FASTRAK_CTRL_DEV=eth0", None),
        ("NCCL_IB_TIMEOUT=0x16", None),
        ("NCCL_DEBUG_SUBSYS=INIT,NET", None),
        ("NCCL_NET_GDR_LEVEL=PHB", None),
        ("NCCL_DEBUG_FILE=/dev/stderr", None),
        ("PATH=/bin\nCCL_LOG_LEVEL=info\nRCCL_MSCCL_ENABLE=0\nMSCCL_X=1", None),
    ],
)
def test_what_is_right_is_left_alone(text, fabric):
    assert found(text, name="x.env", fabric=fabric) == []


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("NCCL_SOCKET_IFNMAE=ens5", "did you mean NCCL_SOCKET_IFNAME?"),
        ("NCLL_DEBUG=INFO", "did you mean NCCL_DEBUG?"),
        ("nccl_debug=INFO", "did you mean NCCL_DEBUG?"),
        ("TORCH_NCCL_ASYNC_EROR_HANDLING=1", "did you mean TORCH_NCCL_ASYNC_ERROR_HANDLING?"),
        ("NCCL_MIN_CHANNELS=4", "NCCL_MIN_NCHANNELS"),
        ("NCCL_ALGO=Rign", "did you mean `Ring`?"),
        ("NCCL_TRACE_BUFFER_SIZE=2000", "TORCH_FR_BUFFER_SIZE"),
        ("NCCL_BLOCKING_WAIT=1", "TORCH_NCCL_BLOCKING_WAIT=1"),
        ("NCCL_CHECKS_DISABLE=1", "NCCL_CHECK_MODE"),
        ("NCCL_MIN_NCHANNELS=4", "NCCL_MIN_CTAS"),
        ("NCCL_TIMEOUT=10", "DEEPSPEED_TIMEOUT, in minutes (10 where it is not set)"),
        ("GLOO_SOCKET_IFNAME=eth0", "set it on each node to the interface that has the route to the other nodes"),
    ],
)
def test_slips_say_what_was_meant(text, hint):
    findings = envlint.judge(envlint.read(text, name="x.env"))
    assert hint in [finding.fix for finding in findings]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("NCCL_IB_DISABLE=true", "ENV006"),
        ("NCCL_IB_TIMEOUT=²", "ENV006"),
        ("NCCL_IB_TIMEOUT=" + "9" * 5000, "ENV008"),
        ("NCCL_IB_TIMEOUT=0", "ENV008"),
        ("NCCL_IB_TIMEOUT=-1", "ENV008"),
        ("NCCL_SOCKET_NTHREADS=17", "ENV007"),
        ("NCCL_CROSS_NIC=3", "ENV007"),
        ("NCCL_P2P_DISABLE=2", "ENV007"),
        ("NCCL_IB_QPS_PER_CONNECTION=0", "ENV007"),
        ("NCCL_DEBUG=ERROR", "ENV006"),
        ("NCCL_ALGO=allreduce:tree,rign", "ENV006"),
        ("NCCL_NET_GDR_LEVEL=PHY", "ENV006"),
    ],
)
def test_values_that_cannot_be_are_errors(text, rule):
    (finding,) = [one for one in envlint.judge(envlint.read(text, name="x.env")) if one.severity == "error"]
    assert finding.rule == rule
    assert len(finding.message) < 300


def test_sockets_are_counted_with_those_that_stand_beside():
    ours = {"NCCL_SOCKET_NTHREADS": "4"}
    (finding,) = envlint.judge([envlint.Assignment("NCCL_NSOCKS_PERTHREAD", "32")], given=ours)
    assert (finding.rule, "128 sockets" in finding.message) == ("ENV024", True)
    assert envlint.judge([envlint.Assignment("NCCL_NSOCKS_PERTHREAD", "16")], given=ours) == []


def test_a_name_that_nothing_replaced_is_to_be_left_out():
    (result,) = lint.environment("NCCL_LAUNCH_MODE=GROUP", name="x.env").results
    assert (result.rule, result.fix) == ("ENV003", "leave it out")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("ENV00x", "ENV001 to ENV008 are the nearest; dslaunch explain lists them"),
        ("ENV099", f"ENV001 to {max(RULES)} are the nearest; dslaunch explain lists them"),
        ("env009", "ENV001 to ENV008 are the nearest; dslaunch explain lists them"),
        ("ENC001", "did you mean ENV001?"),
        ("rdma-of", "did you mean rdma-off?"),
        ("zzz", "dslaunch explain lists them"),
    ],
)
def test_an_id_that_there_is_not_suggests_those_that_begin_like_it(asked, hint):
    with pytest.raises(UserError) as refused:
        lint.row(asked)
    assert refused.value.problems[0].hint == hint


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("export A=1 B='2 3'; C=\"4\"", {"A": "1", "B": "2 3", "C": "4"}),
        ("A=1 B=2 srun python x.py", {"A": "1", "B": "2"}),
        ("mpirun -x A=1 \\\n  -x B=2 prog", {"A": "1", "B": "2"}),
        ("docker run -e A=1 --env B=2 --env=C=3 -eD=4 img", {"A": "1", "B": "2", "C": "3", "D": "4"}),
        ("#SBATCH --export=ALL,A=1,B=2", {"A": "1", "B": "2"}),
        ("srun --export=ALL,NCCL_DEBUG=INFO x", {"NCCL_DEBUG": "INFO"}),
        ("srun --export=A=1,B=2 x", {"A": "1", "B": "2"}),
        ("#!/bin/sh\n# export A=1\nB=2 # C=3", {"B": "2"}),
        ("echo A=1\nprintf 'B=2'\nC=3", {"C": "3"}),
        ("export A=$X B=${Y:-7} C=`d` D=a$(e f)g", {"A": None, "B": "7", "C": None, "D": None}),
        (
            "export A=${A:-${B:-7}} B=${D:-/tmp}/x C='$X' D=${Y:-\"q\"} E=${F:+1}",
            {"A": "7", "B": "/tmp/x", "C": "$X", "D": "q", "E": None},
        ),
        (
            ': ${A:=1}\n: "${B:=2}" ${C=3} ${D:-4} ${E:=$X}\nexport F=${F:=6}',
            {"A": "1", "B": "2", "C": "3", "E": None, "F": "6"},
        ),
        ("A=1\nunset A\nB=2", {"B": "2"}),
        ("singularity exec --env A=1,B=2 img cmd", {"A": "1", "B": "2"}),
        ("apptainer exec --env=A=1,B==m_0,m_1,C=3 img", {"A": "1", "B": "=m_0,m_1", "C": "3"}),
        ("docker run --env A=1,B=2 -e C=3,D=4 img", {"A": "1,B=2", "C": "3,D=4"}),
        ("srun --export ALL,A=1,B=2 x", {"A": "1", "B": "2"}),
        ("srun --export=A=1,HOME,B=2,PATH x", {"A": "1", "B": "2"}),
        ("srun --export=ALL,A==m_0,m_1,B=2 x", {"A": "=m_0,m_1", "B": "2"}),
        ('srun --export=\'ALL,"A=m_0,m_1",B="2,3"\' x', {"A": "m_0,m_1", "B": "2,3"}),
        ("export A==m_0,m_1,B=2", {"A": "=m_0,m_1,B=2"}),
        ("mpiexec -genv A 1 -genv B=2 -env C $D x", {"A": "1", "B": "2", "C": None}),
        ("mpirun -x A=m_0,m_1 -x B -x C=3 x", {"A": "m_0,m_1", "C": "3"}),
        ("setenv A 1\nENV B 2\nENV C=3", {"A": "1", "B": "2", "C": "3"}),
        ('declare -x A="1"\nenv B=2 cmd', {"A": "1", "B": "2"}),
        ("if [ $A = 1 ]; then export B=2; fi", {"B": "2"}),
        ("echo \"don't\"; A='x\ny' B=1", {"A": "x\ny", "B": "1"}),
        ("A='never closed\nB=2", {"A": "never closed", "B": "2"}),
        ("cat > x <<EOF\nA=1\nEOF", {"A": "1"}),
        ("A==mlx5_0", {"A": "=mlx5_0"}),
        ("A+=x", {"A": None}),
        ("", {}),
        ("((x=1)) && $((", {"x": "1"}),
    ],
)
def test_assignments_of_a_shell_script(text, expected):
    assert values(text) == expected


def test_a_place_is_the_line_and_column_of_the_name():
    text = '#!/bin/bash\nexport A=1 \\\n  NCCL_X=2\nB="a\nb" C=3\n'
    assert [(one.name, one.line, one.column) for one in envlint.read(text, name="x")] == [
        ("A", 2, 8), ("NCCL_X", 3, 3), ("B", 4, 1), ("C", 5, 4),
    ]  # fmt: skip


def test_each_variable_of_a_list_has_its_own_column():
    text = 'srun --export=ALL,AB=1,B=2 x\ndocker run -eB=3\n: "${C:=4}"'
    places = [(one.name, one.line, one.column) for one in envlint.read(text, name="x")]
    assert places == [("AB", 1, 19), ("B", 1, 24), ("B", 2, 14), ("C", 3, 6)]
    row = "cmd: srun --export=ALL,NCCL_DEBUG=INFO,NCCL_ALGO=Ring x"
    assert found(row, name="x.yaml") == ["ENV022", "ENV019"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("srun --export=ALL,NCCL_IB_HCA==mlx5_0,mlx5_1 x", "=mlx5_0"),
        ("srun --export=NCCL_DEBUG_SUBSYS=INIT,NET,HOME x", "INIT"),
        ("srun --export=ALL,NCCL_DEBUG=WARN,HOME x", None),
        ("srun --export=ALL,'\"NCCL_IB_HCA==mlx5_0,mlx5_1\"' x", None),
        ("singularity exec --env NCCL_IB_HCA==mlx5_0,mlx5_1 img", None),
        ("export NCCL_IB_HCA==mlx5_0,mlx5_1", None),
    ],
)
def test_slurm_ends_a_value_at_a_comma(text, kept):
    messages = [one.message for one in envlint.judge(envlint.read(text, name="a.sh")) if one.rule == "ENV036"]
    assert [f"comma, and {kept} is what arrives" in message for message in messages] == [True] * (kept is not None)


def test_a_list_for_singularity_is_no_wrong_number():
    text = "singularity exec --env NCCL_P2P_DISABLE=1,NCCL_SHM_DISABLE=1 img cmd"
    assert found(text) == ["ENV021", "ENV021"]


def test_defaults_of_variables_in_yaml_are_their_values():
    text = "NCCL_DEBUG: ${NCCL_DEBUG:-INFO}\nNCCL_ALGO: $(ALGO)\nenv: {NCCL_PROTO: '${P:-LL}', NCCL_IB_HCA: mlx5}\n"
    expected = {"NCCL_DEBUG": "INFO", "NCCL_ALGO": None, "NCCL_PROTO": "LL", "NCCL_IB_HCA": "mlx5"}
    assert values(text, name="compose.yaml") == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NCCL_PROTO=simple", "safe, and slow for small messages"),
        ("NCCL_PROTO=LL", "half of the bandwidth"),
        ("NCCL_PROTO=LL128", "corrupt data"),
        ("NCCL_PROTO=LL,LL128,Simple", "corrupt data"),
        ("NCCL_PROTO=allreduce:ll128;broadcast:ll", "corrupt data"),
        ("NCCL_PROTO=^LL128", "holds for every size"),
        ("NCCL_PROTO=^LL,LL128", "holds for every size"),
        ("NCCL_ALGO=Ring", "forbids NVLS"),
        ("NCCL_ALGO=NVLS", "NVLS does not exist for all of them"),
        ("NCCL_ALGO=Ring,NVLS", "leaves algorithms out"),
        ("NCCL_ALGO=^PAT", "leaves algorithms out"),
        ("NCCL_IB_DISABLE=1", "NCCL_IB_DISABLE=1: switches InfiniBand and RoCE off: "),
        ("NCCL_NET=Socket", "NCCL_NET=Socket: switches InfiniBand, RoCE and EFA off: "),
        ("NCCL_TIMEOUT=10", "nobody reads NCCL_TIMEOUT; collectives time out after the timeout of"),
    ],
)
def test_a_finding_is_about_its_value(text, says):
    (finding,) = envlint.judge(envlint.read(text, name="x.env"))
    assert says in finding.message


POD = """\
spec:
  containers:
  - env:
    - name: NCCL_DEBUG
      value: "INFO"
    - {name: NCCL_ALGO, value: Ring}
    # - {name: NCCL_PROTO, value: LL}
    command: ["bash", "-c"]
    args:
    - |
      export NCCL_P2P_DISABLE=1  # don't
      torchrun train.py
"""
JOB = """\
name: demo
model: gpt2
train: {script: a.py}
resources: {nodes: 2, gpus_per_node: 8, gpu: h100, fabric: ib}
env: {NCCL_IB_DISABLE: "1"}
"""
PYTHON = """\
import os
os.environ["NCCL_DEBUG"] = "INFO"
os.environ.setdefault('NCCL_ALGO', 'Ring')
env = {"NCCL_P2P_DISABLE": "1"}
"""


def test_variables_in_yaml_and_python():
    expected = {"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring", "NCCL_P2P_DISABLE": "1"}
    assert {k: v for k, v in values(POD, name="pod.yaml").items() if k.startswith("NCCL")} == expected
    assert values(PYTHON, name="train.py") == expected
    places = {one.name: one.line for one in envlint.read(POD, name="pod.yaml")}
    assert (places["NCCL_DEBUG"], places["NCCL_P2P_DISABLE"]) == (4, 11)


def test_a_tilde_is_the_shells_business_or_nobodys():
    assert "ENV025" not in found("export NCCL_DEBUG_FILE=~/n.%h.%p.log", name="run.sh")
    assert "ENV025" in found("export NCCL_DEBUG_FILE='~/n.%h.%p.log'", name="run.sh")
    assert "ENV025" in found("NCCL_DEBUG_FILE=~/n.%h.%p.log", name="nccl.conf")


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from(list("NCCL_AX=1 \"'$`(){}\\\n#;|&<>~-,:é\0")), max_size=80),
    st.sampled_from(["a.sh", "a.yaml", "a.py", "a"]),
)
def test_no_text_is_too_odd_to_read(text, name):
    lines = text.count("\n") + 1
    for one in envlint.read(text, name=name):
        assert 1 <= one.line <= lines
    envlint.judge(envlint.read(text, name=name))


def test_a_long_script_is_read_at_once():
    for opener in ("${", "$(", "`", "'", '"'):
        text = f"echo {opener}\n" * 5_000 + "\nexport NCCL_DEBUG=INFO\n"
        started = time.process_time()
        envlint.read(text, name="a.sh")
        assert time.process_time() - started < 5, opener


# --- jobs of our own ----------------------------------------------------------------------------------------


def test_a_job_that_loses_its_fabric_is_refused_with_the_rule():
    with pytest.raises(UserError) as refused:
        nccl.variables(spec.load(JOB, name="job.yaml").spec)
    (problem,) = refused.value.problems
    assert problem.message.startswith("NCCL_IB_DISABLE=1: on InfiniBand")
    assert problem.message.endswith("[ENV010]")
    assert problem.at == ("env", "NCCL_IB_DISABLE")


@pytest.mark.parametrize(
    ("pods", "host", "noted"), [(False, "false", True), (True, "false", False), (True, "true", True)]
)
def test_eth0_is_right_in_pods_that_have_a_network_of_their_own(pods, host, noted):
    text = JOB.replace('NCCL_IB_DISABLE: "1"', "NCCL_SOCKET_IFNAME: eth0, GLOO_SOCKET_IFNAME: eth0")
    text += f"kubernetes: {{network: {{host_network: {host}}}}}\n"
    notes = nccl.variables(spec.load(text, name="job.yaml").spec, pods=pods).notes
    assert any("[ENV016]" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("train", "noted"),
    [
        ("{script: a.py}", True),  # the planner may choose ZeRO
        ("{script: a.py, zero: 0}", False),
        ("{script: a.py, zero: 2}", True),
        ("{script: a.py, deepspeed: {zero_optimization: {stage: 1}}}", True),
    ],
)
def test_one_connection_is_of_interest_where_zero_may_overlap(train, noted):
    text = JOB.replace('NCCL_IB_DISABLE: "1"', 'CUDA_DEVICE_MAX_CONNECTIONS: "1"').replace("{script: a.py}", train)
    assert any("[ENV029]" in note for note in nccl.variables(spec.load(text, name="job.yaml").spec).notes) == noted


def test_one_connection_is_right_for_megatron_without_zero():
    text = JOB.replace('NCCL_IB_DISABLE: "1"', 'CUDA_DEVICE_MAX_CONNECTIONS: "1"').replace("model: gpt2\n", "")
    assert not any("[ENV029]" in note for note in nccl.variables(spec.load(text, name="job.yaml").spec).notes)


def test_the_backend_decides_whose_interfaces_they_are(tmp_path):
    text = JOB.replace('NCCL_IB_DISABLE: "1"', "NCCL_SOCKET_IFNAME: eth0")
    said = {}
    for section in ("", "kubernetes: {image: a/b:1}\n"):
        job = _write(tmp_path, "job.yaml", text + section)
        rows = json.loads(CliRunner().invoke(cli.cli, ["lint", job, "--json"]).stdout)[0]["results"]
        said[section != ""] = "ENV016" in [row["rule"] for row in rows]
    assert said == {False: True, True: False}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("efa", True), ("rdmap0s31", True), ("=mlx5_0", True), ("mlx5", True),
        ("^efa", False), ("rdma0", False), ("ibp1s0", False),
    ],
)  # fmt: skip
def test_an_rdma_device_is_no_interface(value, wrong):
    assert ("ENV015" in found(f"NCCL_SOCKET_IFNAME={value}", name="x.env")) == wrong


def test_lint_of_a_job_file_places_what_the_plan_notes(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace('NCCL_IB_DISABLE: "1"', "NCCL_ALGO: Ring"))
    rows = json.loads(CliRunner().invoke(cli.cli, ["lint", str(job), "--json"]).stdout)[0]["results"]
    (row,) = [row for row in rows if row["rule"] == "ENV019"]
    assert (row["line"], row["severity"], row["name"]) == (5, "warning", "forced-algorithm")
    refused = CliRunner().invoke(cli.cli, ["lint", _write(tmp_path, "b.yaml", JOB), "--json"])
    (row,) = json.loads(refused.stdout)[0]["results"]
    assert (row["rule"], row["line"], refused.exit_code) == ("ENV010", 5, 1)


# --- the command --------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_command_judges_scripts(tmp_path):
    script = _write(tmp_path, "run.sbatch", "#!/bin/bash\nexport NCCL_IB_DISABLE=1\n")
    done = CliRunner().invoke(cli.cli, ["lint", "--env", script])
    assert (done.exit_code, "warning ENV011" in done.output) == (0, True)
    done = CliRunner().invoke(cli.cli, ["lint", "--env", "--fabric", "ib", script])
    assert (done.exit_code, f"{script}:2:8: error ENV010" in done.output) == (1, True)
    assert CliRunner().invoke(cli.cli, ["lint", "--env", "--strict", script]).exit_code == 1
    assert CliRunner().invoke(cli.cli, ["lint", "--env", str(tmp_path / "none")]).exit_code != 0
    job = CliRunner().invoke(cli.cli, ["lint", "--env", _write(tmp_path, "job.yaml", JOB)])
    assert "job.yaml:5:7: error ENV010" in job.output  # the fabric that it names itself


def test_results_as_sarif_carry_their_rule(tmp_path):
    script = _write(tmp_path, "run.sh", "export NCCL_MIN_CHANNELS=4\n")
    log = json.loads(CliRunner().invoke(cli.cli, ["lint", "--env", "--sarif", script]).stdout)
    (result,) = log["runs"][0]["results"]
    assert result["ruleId"] == "ENV001"
    assert result["locations"][0]["physicalLocation"]["region"] == {
        "startLine": 1, "startColumn": 8, "endLine": 1, "endColumn": 25,
    }  # fmt: skip


def test_without_a_file_it_is_this_shell_and_what_nccl_reads_by_itself(tmp_path):
    _write(tmp_path, ".nccl.conf", "NCCL_P2P_DISABLE=1\n")
    env = {"PATH": "/bin:/usr/bin", "HOME": str(tmp_path), "NCCL_DEBUG": "INFO"}
    done = subprocess.run([DSLAUNCH, "lint", "--env"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "the environment: note ENV022" in done.stdout
    assert f"{tmp_path}/.nccl.conf:1:1: warning ENV021" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["lint"], "no file is named"),
        (["lint", "--fabric", "ib", "x.json"], "--fabric goes with --env"),
        (["lint", "--env", "--fabric=xy", "-"], "--fabric: "),
        (["lint", "--env", "--fix", "-"], "with --env --fix has no effect"),
        (["lint", "--env", "--diff", "--nodes=4", "--gpus", "8"], "with --env --nodes, --gpus, --diff has no effect"),
        (["lint", "--trainer=auto", "--env", "--site", "x.yaml"], "with --env --trainer, --site has no effect"),
        (["lint", "--env", "--optimizer=none", "--model=gpt2"], "with --env --model, --optimizer has no effect"),
    ],
)
def test_what_goes_together_is_said(argv, says):
    done = subprocess.run([DSLAUNCH, *argv], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert f"error: {says}" in done.stderr
    assert "resources.fabric" not in done.stderr
