import os
import stat
from pathlib import Path

import pytest

from launcher.preflight import Setting, nccl_tests, transport

LOGS = Path(__file__).parent / "data" / "nccl"
IB4 = Setting(nodes=4, fabric="infiniband", ports=4)


def log(name):
    return transport.read((LOGS / f"{name}.log").read_text())


def test_a_log_says_what_data_went_over():
    found = log("infiniband")
    assert found.version == "2.27.7+cuda12.9"
    assert (found.network, found.rdma, found.nvls) == ("IB", True, True)
    assert (found.between, found.direct, found.within) == ({"IB": 4}, 4, {"P2P": 4})
    assert found.devices == ("mlx5_0:1/IB", "mlx5_1:1/IB", "mlx5_4:1/IB", "mlx5_5:1/IB")
    assert found.variables == {"NCCL_SOCKET_IFNAME": "ens3", "NCCL_IB_HCA": "=mlx5_0,mlx5_1,mlx5_4,mlx5_5"}


@pytest.mark.parametrize(
    ("name", "network", "rdma", "plugin", "provider", "gids"),
    [
        ("infiniband-sharp-plugin", "IBext_v8", True, "NCCL RDMA Plugin v8 (v8)", "", ()),
        ("roce-through-host", "IB", True, "", "", (3,)),
        ("efa", "Libfabric", True, "Libfabric (v10)", "efa", ()),
        ("efa-old", "AWS Libfabric", True, "", "efa", ()),
        ("efa-tcp-provider", "Libfabric", True, "", "tcp", ()),
        ("gib", "gIB", True, "", "", ()),
        ("tcpx-fastsocket", "FastSocket", False, "FastSocket (v6)", "", ()),
        ("ethernet", "Socket", False, "", "", ()),
    ],
)
def test_every_network_by_its_own_name(name, network, rdma, plugin, provider, gids):
    found = log(name)
    assert (found.network, found.rdma, found.plugin, found.provider) == (network, rdma, plugin, provider)
    assert found.gids == gids


@pytest.mark.parametrize(
    ("name", "setting", "level", "words"),
    [
        ("infiniband", IB4, "", ""),
        ("infiniband", Setting(nodes=4, fabric="infiniband", ports=8), "exclude", "NCCL uses 4 of 8 ports"),
        ("infiniband-sharp-plugin", Setting(nodes=4, fabric="sharp", ports=2), "", ""),
        ("ib-disabled", IB4, "exclude", "NCCL_IB_DISABLE=1 turns RDMA off"),
        ("no-device", IB4, "exclude", "no device: NET/IB : No device found."),
        ("no-device", Setting(nodes=4, ports=4), "exclude", "NCCL uses TCP"),
        ("hca-of-another-node", IB4, "exclude", "no active port is named by NCCL_IB_HCA==mlx5_10,mlx5_11"),
        ("no-libibverbs", IB4, "exclude", "libibverbs is not there"),
        ("locked-memory", IB4, "exclude", "no memory may be locked: Call to ibv_reg_mr_iova2 failed"),
        ("gid-index", Setting(nodes=4, fabric="roce", ports=2), "exclude", "failed with 110 Connection timed out"),
        (
            "roce-through-host",
            Setting(nodes=4, fabric="roce", ports=2),
            "warn",
            "GPUDirect RDMA, off for mlx5_0, mlx5_1",
        ),
        ("efa", Setting(nodes=4, fabric="efa", ports=16), "", ""),
        ("efa-old", Setting(nodes=4, fabric="efa", ports=4), "", ""),
        ("efa-no-plugin", Setting(nodes=4, fabric="efa", ports=16), "exclude", "aws-ofi-nccl is not found"),
        (
            "efa-no-libfabric",
            Setting(nodes=4, fabric="efa"),
            "exclude",
            "aws-ofi-nccl does not work: NET/Plugin: libnccl-net.so",
        ),
        (
            "efa-no-devices",
            Setting(nodes=4, fabric="efa"),
            "exclude",
            "no device: NET/OFI OFI fi_getinfo() call failed",
        ),
        ("gib", Setting(nodes=4, fabric="gcp-gib", ports=8), "", ""),
        (
            "tcpx-fastsocket",
            Setting(nodes=4, fabric="gcp-tcpx"),
            "exclude",
            "NCCL uses TCP: its log does not say why",
        ),
        ("ethernet", Setting(nodes=4, fabric="ethernet"), "", ""),
        ("docker0", Setting(nodes=4, fabric="ethernet"), "exclude", "NCCL uses docker0, which reaches no other node"),
        ("no-interface", IB4, "exclude", "no interface for NCCL_SOCKET_IFNAME=eth0"),
    ],
)
def test_who_is_to_blame(name, setting, level, words):
    findings = transport.blame(log(name), setting, node="node1")
    assert [(one.level, one.node, one.check) for one in findings] == (
        [(level, "node1", "transport")] if level else []
    )
    for one in findings:
        assert words in one.what
        assert one.fix


def test_a_wrong_gid_index_is_named_with_the_variable():
    (finding,) = transport.blame(log("gid-index"), Setting(nodes=4, fabric="roce", ports=2))
    assert finding.fix.startswith("NCCL_IB_GID_INDEX=3 may be no GID of RoCE v2")


def test_a_tcp_provider_is_named_and_its_host_memory_too():
    findings = transport.blame(log("efa-tcp-provider"), Setting(nodes=4, fabric="efa"))
    assert [one.level for one in findings] == ["exclude", "warn"]
    assert findings[0].what == "libfabric uses tcp"


def test_a_port_that_goes_down_shows_with_the_packets_it_loses():
    findings = transport.blame(log("port-error"), IB4)
    assert [one.level for one in findings] == ["warn", "exclude"]
    assert "error 12" in findings[0].what
    assert "port error" in findings[1].what


@pytest.mark.parametrize("name", ["ib-disabled", "docker0", "roce-through-host"])
def test_on_one_node_nothing_is_promised(name):
    assert transport.blame(log(name), Setting(fabric="infiniband", ports=4)) == []


@pytest.mark.parametrize(
    "text", ["", "something else entirely\n", "node1:7:7 [0] NCCL INFO cudaDriverVersion 12090\n"]
)
def test_a_log_that_names_no_network_is_unknown_never_a_pass(text):
    assert [one.level for one in transport.blame(transport.read(text), IB4)] == ["unknown"]


# --- nccl-tests

TABLE = """\
# nThread 1 nGpus 8 minBytes 8589934592 maxBytes 8589934592 step: 1048576(bytes) warmup iters: 5 iters: 20
#
# Using devices
#  Rank  0 Group  0 Pid   2748 on      node1 device  0 [0x01] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
  8589934592    2147483648     float     sum      -1    31297  274.46  480.31      0    31310  274.35  480.11      0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 480.21
#
"""
OLD = """\
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)           (us)  (GB/s)  (GB/s)
  1073741824     268435456   float     sum    13512   79.47  139.07  2e-07    13498   79.55  139.21    N/A
"""
PER_ITERATION = """\
#       size  count  type  redop  root  time  algbw  busbw  #wrong  i_min  i_max  i_p99  i_cv%  time  algbw  busbw  \
#wrong  i_min  i_max  i_p99  i_cv%
        1024    256 float    sum    -1  10.0   0.10   0.18       3    9.0   11.0   11.0    1.0  10.5   0.10   0.17  \
     0    9.0   11.0   11.0    1.0
"""
REPORT = """{"version":2,"args":[],"results":[{"size":8589934592,"count":2147483648,"type":"float","redop":"sum",
"root":"    -1","out_of_place":{"time":31297.0,"alg_bw":274.46,"bus_bw":480.31,"nwrong":0.000000},
"in_place":{"time":31310.0,"alg_bw":274.35,"bus_bw":480.11,"nwrong":null},"actual_iterations":20}]}"""


@pytest.mark.parametrize(
    ("rows", "meant"),
    [
        (nccl_tests.parse(TABLE), [(8 << 30, 274.35, 480.11, 0)]),
        (nccl_tests.parse(OLD), [(1 << 30, 79.47, 139.07, None)]),
        (nccl_tests.parse(PER_ITERATION), [(1024, 0.10, 0.17, 3)]),
        (nccl_tests.parse_json(REPORT), [(8 << 30, 274.35, 480.11, 0)]),
    ],
)
def test_layouts_of_nccl_tests(rows, meant):
    assert [(row.bytes, row.algbw, row.busbw, row.wrong) for row in rows] == meant


@pytest.mark.parametrize(
    "text",
    [
        "",
        TABLE.replace("busbw", "bandwidth"),  # another header
        TABLE.replace("  480.11      0", ""),  # a row cut off
        "8589934592 2147483648 float sum -1 31297 274.46 480.31 0\n",  # no header
    ],
)
def test_a_layout_that_is_not_known_is_no_figure(text):
    assert nccl_tests.parse(text) == []
    assert nccl_tests.parse_json(text) == []
    assert nccl_tests.parse_json('{"results": [{"size": 8}]}') == []


def program(folder, script):
    path = folder / "all_reduce_perf"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@pytest.mark.slow
def test_binaries_answer_with_a_figure_or_with_why_not(tmp_path):
    (tmp_path / "table").write_text(TABLE)
    old = 'for word; do [ "$word" != -J ] || { echo "$0: invalid option -- J" >&2; exit 1; }; done\n'
    options = {"gpus": 8, "size": 8 << 30, "timeout": 5}
    where = program(tmp_path, f"{old}cat {tmp_path}/table")
    assert nccl_tests.run(where, **options) == {"bytes": 8 << 30, "busbw": 480.11, "algbw": 274.35, "wrong": 0}
    (tmp_path / "report").write_text(REPORT)
    where = program(tmp_path, f'for word; do file=$word; done; cp {tmp_path}/report "$file"')
    assert nccl_tests.run(where, **options)["busbw"] == 480.11
    assert "is not there" in nccl_tests.run(os.devnull, **options)["error"]
    where = program(tmp_path, "echo 'Test CUDA failure: no device' >&2; exit 3")
    assert "exit code 3" in nccl_tests.run(where, **options)["error"]
    where = program(tmp_path, "exec sleep 20")
    assert "no answer within 0.3 s" in nccl_tests.run(where, **{**options, "timeout": 0.3})["error"]


def test_binaries_do_not_open_the_log_that_ours_is_in(tmp_path, monkeypatch):
    """NCCL opens NCCL_DEBUG_FILE to write, which empties it."""
    (tmp_path / "table").write_text(TABLE)
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "here")
    where = program(tmp_path, f"env > {tmp_path}/seen; cat {tmp_path}/table")
    assert "error" not in nccl_tests.run(where, gpus=8, size=8 << 30, timeout=5)
    seen = [line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("NCCL_")]
    assert seen == ["NCCL_SOCKET_IFNAME=here"]
