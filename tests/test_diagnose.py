"""The diagnosis: reading logs, matching, which of many words is the cause. Its tables are in test_signatures."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher import diagnoses
from launcher.diagnose import (
    Cause,
    Evidence,
    Exit,
    Hang,
    Line,
    Signature,
    exits,
    explain,
    flight,
    match,
    tables,
    to_json,
)
from launcher.node import journal
from launcher.runs import evidence

CAUSES = {
    row.id: row
    for row in (
        Cause("cuda_oom", 1, "app", "a GPU's memory ran out", "no", "after fix", "halve it", "train.micro_batch"),
        Cause("cuda_illegal_access", 2, "app", "a wild pointer", "repeat", "once", "find it"),
        Cause("collective_timeout", 4, "app", "a rank did not arrive", "probe", "once", "see who"),
        Cause("gpu_fallen_off_bus", 1, "node", "a GPU is gone", "yes", "elsewhere", "power-cycle"),
        Cause("gpu_ecc_uncorrectable", 1, "node", "ECC", "yes", "elsewhere", "reset"),
        Cause("cuda_toolkit_mismatch", 1, "env", "another CUDA", "temp", "after fix", "same image"),
        Cause("ib_port_flap", 1, "node", "a port went down", "yes", "elsewhere", "cable"),
        Cause("ib_retry_exceeded", 1, "net", "no answer", "probe", "elsewhere", "pair test"),
        Cause("net_connect_refused", 3, "net", "nobody listens", "probe", "once", "is it up?"),
        Cause("net_connect_timeout", 3, "net", "packets dropped", "probe", "after fix", "firewall"),
        Cause("nic_pcie_power", 1, "node", "little power", "monitor", "yes", "BIOS"),
        Cause("xid_48_dbe", 1, "node", "double bit", "yes", "elsewhere", "reset"),
        Cause("xid_45_cleanup", 9, "-", "cleanup", "no", "-", "the one before"),
        Cause("xid_154_recovery_action", 1, "node", "says what it needs", "yes", "elsewhere", "do it"),
        Cause("xid_149_nvlink_netir", 2, "node", "a link", "probe", "elsewhere", "reset"),
        Cause("python_import_error", 2, "app", "a module is missing", "no", "after fix", "install it", "venv"),
        Cause("python_error", 3, "app", "an exception", "no", "no", "read it"),
        Cause("host_oom_killed", 6, "app", "SIGKILL, most likely for memory", "no", "after fix", "more memory"),
        Cause("killed_from_outside", 6, "sched", "SIGKILL by somebody", "no", "once", "who?"),
        Cause("bus_error", 6, "app", "SIGBUS", "temp", "after fix", "shm"),
        Cause("sigterm", 7, "sched", "SIGTERM", "no", "yes", "who?"),
        Cause("slurm_oom_kill", 1, "sched", "the memory limit", "no", "after fix", "more", "resources.memory"),
        Cause("slurm_node_fail", 1, "node", "Slurm lost the node", "yes", "elsewhere", "nothing"),
        Cause("slurm_preempted", 1, "sched", "preempted", "no", "yes", "nothing"),
        Cause("slurm_time_limit", 1, "sched", "wall time", "no", "yes", "more time"),
        Cause("slurm_step_cancelled", 6, "sched", "cancelled", "no", "-", "who?"),
        Cause("hang_laggard", 4, "app", "some did not arrive", "probe", "once", "see who"),
        Cause("hang_unknown", 4, "app", "no step", "probe", "once", "look"),
        Cause("node_lost", 1, "node", "gone silent", "yes", "elsewhere", "its log"),
        Cause("unknown_secondary_only", 9, "-", "a launcher ends the rest", "no", "-", "elsewhere"),
    )
}
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
TIMED = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)"
SIGNATURES = tuple(
    Signature(f"T{number:02}", *row)
    for number, row in enumerate(
        [
            ("cuda_oom", r"CUDA out of memory\. Tried to allocate", OOM),
            (
                "cuda_illegal_access",
                r"illegal memory access was encountered",
                "an illegal memory access was encountered",
            ),
            ("collective_timeout", r"Watchdog caught collective operation timeout", TIMED),
            ("gpu_fallen_off_bus", r"NVIDIA GPU .* installed in this system has fallen off the bus", "", 3),
            ("gpu_ecc_uncorrectable", r"uncorrectable ECC error encountered", "uncorrectable ECC error encountered"),
            (
                "cuda_toolkit_mismatch",
                r"detected CUDA version \(.*?\) mismatches",
                "detected CUDA version (1) mismatches",
            ),
            ("ib_port_flap", r"Got async event : port error", "Got async event : port error"),
            ("ib_retry_exceeded", r"Got completion .*with error 12\b", "Got completion with error 12"),
            ("net_connect_refused", r"Connection refused", "Connection refused"),
            ("net_connect_timeout", r"Connection timed out, retrying", "", 1, r"Init COMPLETE"),
            ("nic_pcie_power", r"insufficient power on the PCIe slot", "insufficient power on the PCIe slot"),
            ("xid_48_dbe", r"NVRM: Xid \([^)]*\): 48,", "NVRM: Xid (PCI:0000:01:00): 48,"),
            ("xid_45_cleanup", r"NVRM: Xid \([^)]*\): 45,", "NVRM: Xid (PCI:0000:01:00): 45,"),
            ("xid_154_recovery_action", r"NVRM: Xid \([^)]*\): 154,", "NVRM: Xid (PCI:0000:01:00): 154,"),
            ("xid_149_nvlink_netir", r"NVRM: Xid \([^)]*\): 149,", "NVRM: Xid (PCI:0000:01:00): 149,"),
            ("unknown_secondary_only", r"exits with return code = \d+", "exits with return code = 1"),
            ("host_oom_killed", r"exits with return code = -9\b", "exits with return code = -9"),
            ("slurm_step_cancelled", r"STEP \S+ ON (?P<node>\S+) CANCELLED AT", "STEP 1.0 ON n1 CANCELLED AT"),
        ]
    )
)


def read(text: str, *, file: str = "job.out") -> match.Reading:
    return match.read_text(text, SIGNATURES, file=file)


def told(text: str = "", **evidence: object) -> tuple[str, tuple[str, ...]]:
    """Cause and excluded hosts."""
    made = explain.explain(read(text), Evidence(**evidence), causes=CAUSES)  # type: ignore[arg-type]
    return made.cause, made.exclude


def both(first: tuple[str, str], second: tuple[str, str], **evidence: object) -> str:
    """The cause of two logs: (file, text) each."""
    readings = [read(text, file=file) for file, text in (first, second)]
    whole = match.joined(*readings)
    return explain.explain(whole, Evidence(**evidence), causes=CAUSES).cause  # type: ignore[arg-type]


# --- Lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text", "rank", "node"),
    [
        ("[rank 3] x y", "x y", 3, ""),
        ("[rank3]: x y", "x y", 3, ""),
        ("3: x y", "x y", None, ""),
        ("[1,23]<stdout>:x y", "x y", 23, ""),
        ("[node 1] x y", "x y", None, "1"),
        ("[default0]:x y", "x y", None, ""),
        ("[default0]:[rank8]: x y", "x y", 8, ""),
        ("2026-11-20T12:00:01.123456789Z x y", "x y", None, ""),
        ("[pod/demo-worker-0/pytorch] 2026-11-20T12:00:01Z x y", "x y", None, "demo-worker-0"),
        ('{"log":"x y\\n","stream":"stderr","time":"2026-11-20T12:00:01.1Z"}', "x y", None, ""),
        ("2026-11-20T12:00:01.1Z stderr F x y", "x y", None, ""),
        ("E1120 12:00:01.123456       7 pod.go:12] x y", "x y", None, ""),
        ("Nov 20 12:00:01 gpu7 kernel: [  12.345678] x y", "x y", None, "gpu7"),
        ("[  1843.308145] x y", "x y", None, ""),
        ("[Fri Nov 20 12:00:01 2026] x y", "x y", None, ""),
        ("<4>[  1843.308145] x y", "x y", None, ""),
        ("2026-11-20T12:00:01+0100 gpu7 kernel: x y", "x y", None, "gpu7"),
        ("worker-1: [rank9]: x y", "x y", 9, "worker-1"),
        (" 10%|# | 1/9\rx y", "x y", None, ""),
        ("n4:5776:5902 [0] NCCL WARN x", "n4:5776:5902 [0] NCCL WARN x", None, "n4"),
        ("[PG ID 2 PG GUID 3 Rank 5] x", "[PG ID 2 PG GUID 3 Rank 5] x", 5, ""),
        ("RuntimeError: x", "RuntimeError: x", None, ""),
    ],
)
def test_a_line_is_freed_of_its_prefixes(raw, text, rank, node):
    found = match.bare(raw)
    assert (found.text, found.rank, found.node) == (text, rank, node)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-11-20T12:00:01Z", 1795176001.0),
        ("2026-11-20T12:00:01.5Z x", 1795176001.5),
        ("[2026-11-20 13:00:01,250 +0100] x", 1795176001.25),
        ("2026/11/20 12:00:01 +00:00 x", 1795176001.0),
        ("[1668693503.473099] [host:1:0] UCX ERROR", 1668693503.473099),
        ("[ 1843.308145] NVRM", None),
        ("Nov 20 12:00:01 host kernel: x", None),
        ("2026-13-45T12:00:01Z", None),
        ("2026-02-31 99:99:99", None),
        ("no clock", None),
    ],
)
def test_only_a_whole_stamp_is_a_moment(text, at):
    assert match.moment(text) == at


def test_a_clock_without_a_zone_is_this_machines():
    assert match.moment("[2026-11-20 12:00:01,000] x") == time.mktime((2026, 11, 20, 12, 0, 1, 0, 0, -1))
    assert match.moment("[Fri Nov 20 12:00:01 2026] x") == match.moment("[Nov 20 2026 12:00:01] x")


@pytest.mark.parametrize(
    ("file", "node", "rank"),
    [
        ("logs/rank-00003.log", "", 3),
        ("logs/node-0001.launcher.log", "1", None),
        ("slurm-12.out", "", None),
        ("node3.log", "node3", None),
        ("dmesg-gpu7.txt", "gpu7", None),
        ("job.out", "", None),
    ],
)
def test_a_files_name_says_whose_it_is(file, node, rank):
    assert match.named(file) == (node, rank)


# --- Matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "needs"),
    [
        (r"CUDA error: (?:out of memory|unknown)", {"cuda error: "}),
        (r"(?:first word|second) \d", {"first word", "second"}),
        (r"(?i)Address ALREADY", {"address already"}),
        (r"(?:long optional text)?short", {"short"}),
        (r"ab.*cd", set()),
    ],
)
def test_a_pattern_names_what_it_needs(pattern, needs):
    assert match.triggers(pattern) == needs


def test_a_pattern_without_words_is_refused():
    with pytest.raises(ValueError, match="T1: no 4 letters"):
        match.Table([Signature("T1", "x", r"\d+ .* \w+", "")])


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (r"error (?:12|137)\b", r"error (?:00|000)\b"),
        (r"exit code -?\d{1,3}, [1-9]\d+", r"exit code -?\d{1,3}, [1-90]\d+"),
        (r"step (?!0\b|75\b)-?\d+ of (?!all)", r"step -?\d+ of (?!all)"),
        (r"a[]1]b", r"a[]10]b"),
        (r"(?<!v)2x(?<!12x)", r"(?<!v)0x"),
        (r"(\d) and \1", None),
        (r"port [^0-9]x", None),
    ],
)
def test_a_pattern_has_a_shape_that_misses_nothing(pattern, shape):
    assert match.shaped(pattern) == shape


def test_a_kernel_message_over_three_lines_is_one():
    text = (
        "[ 1843.308145] NVRM: The NVIDIA GPU 0000:b3:00.0\n"
        "               NVRM: (PCI ID: 10de:26b5) installed in this system has\n"
        "               NVRM: fallen off the bus and is not responding to commands.\n"
    )
    (hit,) = read(text).hits
    assert hit.signature.cause == "gpu_fallen_off_bus"
    assert [line.number for line in hit.lines] == [1, 2, 3]


def test_a_message_of_one_rank_is_joined_over_lines_of_others():
    text = (
        "[rank 1] NVRM: The NVIDIA GPU 0000:b3:00.0\n[rank 2] loss 2.1\n[rank 1] installed in this system has\n"
        "[rank 0] loss 2.1\n[rank 1] fallen off the bus\n"
    )
    (hit,) = read(text).hits
    assert [line.number for line in hit.lines] == [1, 3, 5]
    assert hit.first.rank == 1


def test_a_line_that_a_terminal_wrapped_is_whole_again():
    first = "RuntimeError: this is printed by a program into a narrow terminal: CUDA out of"
    text = f"{first}\nmemory. Tried to allocate 2 GiB\n"
    (hit,) = read(text).hits
    assert [line.number for line in hit.lines] == [1, 2]
    assert not read("CUDA out of\nmemory. Tried to allocate 2 GiB\n").hits  # too short to have been wrapped


def test_words_of_two_processes_are_not_one_message():
    left = "[rank 0] some long line of rank zero that is about nothing in particular: CUDA out of"
    assert not read(f"{left}\n[rank 1] memory. Tried to allocate 2 GiB\n").hits


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mRuntimeError: \x1b[1mCUDA out of memory. Tried to allocate\x1b[0m 2 GiB",
        " 12%|##  | 12/100 [00:01<00:09]\rCUDA out of memory. Tried to allocate 2 GiB\r\n",
        "prefix of another rank: CUDA out of memory. Tried to allocate 2 GiB[rank 2] loss",
        "\x00\x00CUDA out of memory. Tried to allocate 2 GiB",
        '{"log":"CUDA out of memory. Tried to allocate 2 GiB\\n","stream":"stderr","time":"2026-11-20T12:00:01Z"}',
    ],
)
def test_colours_progress_bars_and_wrappers_hide_nothing(text):
    assert [hit.signature.cause for hit in read(text).hits] == ["cuda_oom"]


def test_a_retry_that_succeeded_is_no_error():
    retry = "n1:1:2 [0] NCCL INFO Call to connect returned Connection timed out, retrying\n"
    assert told(retry)[0] == "net_connect_timeout"
    assert told(retry + "n1:1:2 [0] NCCL INFO comm 0x1 rank 0 nranks 2 Init COMPLETE\n")[0] == "unknown"
    assert told("n1:1:2 [0] NCCL INFO comm 0x1 Init COMPLETE\n" + retry)[0] == "net_connect_timeout"
    other = "[rank 1] Connection timed out, retrying\n[rank 0] Init COMPLETE\n"
    assert told(other)[0] == "net_connect_timeout"


def test_lines_that_differ_in_a_digit_are_told_apart():
    (hit,) = read("Got completion from peer x with error 10\nGot completion from peer x with error 12\n").hits
    assert hit.first.number == 2


def test_a_number_is_found_among_thousands_of_its_like():
    text = "".join(f"Got completion from peer x with error {10 + number % 2}\n" for number in range(5000))
    (hit,) = read(text + "Got completion from peer x with error 12\n").hits
    assert hit.first.number == 5001


@pytest.mark.parametrize("size", [64, 100, 4096])
def test_what_spans_two_blocks_is_found_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(match, "BLOCK", size)
    lines = [f"step {number} loss 2.1" for number in range(50)]
    lines[20:20] = ["NVRM: The NVIDIA GPU 0000:b3:00.0", "installed in this system has", "fallen off the bus"]
    lines[40:40] = [OOM]
    log = tmp_path / "job.out"
    log.write_text("\n".join(lines) + "\n")
    reading = match.read([str(log)], SIGNATURES)
    assert [(hit.signature.cause, hit.first.number) for hit in reading.hits] == [
        ("gpu_fallen_off_bus", 21),
        ("cuda_oom", 41),
    ]


def test_of_a_large_log_the_head_and_the_tail_are_read(tmp_path):
    """Scenario 78: memory and time do not grow with the log."""
    log = tmp_path / "job.out"
    with log.open("wb") as stream:
        stream.write(b"uncorrectable ECC error encountered\n")
        stream.write(b"step 1 loss 2\n" * 1000 + OOM.encode() + b"\n")
        stream.seek(10 << 30)  # a hole
        stream.write(b"\nillegal memory access was encountered\n")
    started = time.monotonic()
    reading = match.read([str(log)], SIGNATURES, head=1 << 10, tail=1 << 10)
    assert time.monotonic() - started < 5
    assert [hit.signature.cause for hit in reading.hits] == ["gpu_ecc_uncorrectable", "cuda_illegal_access"]
    assert reading.hits[1].first.number == 0  # nobody counted the lines before it
    assert "10239 MiB in the middle were not read" in reading.notes[0]


def test_of_a_log_of_many_attempts_the_newest_is_read(tmp_path):
    log = tmp_path / "rank-00000.log"
    old = "uncorrectable ECC error encountered\n" * 10
    log.write_text(old + OOM + "\n" + "step\n" * 1000 + "illegal memory access was encountered\n")
    reading = match.read([str(log)], SIGNATURES, start=len(old))
    assert [(hit.signature.cause, hit.first.number) for hit in reading.hits] == [
        ("cuda_oom", 11),
        ("cuda_illegal_access", 1012),
    ]
    reading = match.read([str(log)], SIGNATURES, start=len(old), head=100, tail=100)
    assert [hit.signature.cause for hit in reading.hits] == ["cuda_oom", "cuda_illegal_access"]


def test_packed_and_cut_logs_are_read(tmp_path):
    whole, cut = tmp_path / "a.log.gz", tmp_path / "b.log.gz"
    whole.write_bytes(gzip.compress(b"x\n" * 10 + OOM.encode()))
    cut.write_bytes(gzip.compress(OOM.encode() + b"\n" + os.urandom(100_000))[:-100])
    reading = match.read([str(whole), str(cut), str(tmp_path / "absent.log")], SIGNATURES)
    assert [(Path(hit.first.file).name, hit.first.number) for hit in reading.hits] == [
        ("a.log.gz", 11),
        ("b.log.gz", 1),
    ]
    assert "damaged" in reading.notes[0]
    assert "No such file" in reading.notes[1]


@pytest.mark.slow
def test_one_process_that_repeats_itself_fills_no_memory():
    reading = read("".join(f"[rank 2] {number} Connection refused\n" for number in range(20000)))
    assert len(reading.hits) == match.KEPT + 1
    assert reading.hits[0].first.number == 1


@pytest.mark.slow
def test_a_healthy_log_of_100_mb_takes_seconds(tmp_path):
    line = "[rank 3] [2026-11-20 12:00:01,123] [INFO] step 412 loss 2.33 lr 3.0e-4 grad norm 1.22 tokens/s 18231\n"
    log = tmp_path / "job.out"
    log.write_text(line * (20_000_000 // len(line)))
    started = time.process_time()
    reading = match.read([str(log)], tables.read()[1])
    assert not reading.hits
    assert time.process_time() - started < 2 * 4  # 100 MB in 10 s, and this machine may be busy


@pytest.mark.slow
def test_a_log_full_of_retries_takes_seconds_too(tmp_path):
    lines = (
        f"step {number} loss 2.33 lr 3.0e-4 grad norm 1.22 tokens/s 18231\n"
        f"WARNING: request {number * 7} failed with error {number}, retrying after timeout, cuda device memory low\n"
        for number in range(140_000)
    )
    log = tmp_path / "job.out"
    log.write_text("".join(lines))
    started = time.process_time()
    reading = match.read([str(log)], tables.read()[1])
    assert not reading.hits
    assert reading.bytes > 20_000_000
    assert time.process_time() - started < 2 * 4  # 100 MB in 10 s, and this machine may be busy


# --- Exceptions -----------------------------------------------------------------------------------------------------

TRACEBACK = """Traceback (most recent call last):
  File "/home/me/train.py", line 31, in <module>
    main()
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/module.py", line 8, in forward
    return x
"""


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        ("ModuleNotFoundError: No module named 'flash_attn'", "python_import_error"),
        ("ValueError: too many values", "python_error"),
        ("mylib.errors.BadThing: really", "python_error"),
        ("AssertionError", "python_error"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", "unknown"),
        ("subprocess.CalledProcessError: Command '['x']' returned non-zero exit status 1.", "unknown"),
        (OOM, "cuda_oom"),
    ],
)
def test_an_exception_nobody_knows_is_the_programs_own(last, cause):
    made = explain.explain(read(TRACEBACK + last + "\n"), causes=CAUSES)
    assert made.cause == cause
    if cause == "python_error":
        assert made.root is not None
        assert "/home/me/train.py:31" in made.root.said


def test_the_exception_that_was_raised_last_counts():
    chained = TRACEBACK + "KeyError: 'x'\n\nDuring handling of the above exception, another exception occurred:\n\n"
    made = explain.explain(read(chained + TRACEBACK + "ModuleNotFoundError: y\n"), causes=CAUSES)
    assert {one.cause.id for one in [made.root, *made.others] if one} == {"python_error", "python_import_error"}
    assert made.cause == "python_import_error"


def test_a_specific_root_explains_exceptions_of_others():
    text = "[rank 0] " + TRACEBACK.replace("\n", "\n[rank 0] ") + "RuntimeError: peer is gone\n[rank 3] " + OOM + "\n"
    assert told(text)[0] == "cuda_oom"


# --- Which is the cause ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"{TIMED}\nstep\n{OOM}", "cuda_oom"),  # what happened, not what did not come
        ("exits with return code = -9\n" + OOM, "cuda_oom"),
        ("Got async event : port error\nGot completion from peer x with error 12\n", "ib_port_flap"),
        ("Got completion from peer x with error 12\nGot async event : port error\n", "ib_port_flap"),
        (f"Connection refused\n{TIMED}", "net_connect_refused"),
        ("insufficient power on the PCIe slot\n" + "step\n" * 500 + TIMED, "collective_timeout"),
        ("insufficient power on the PCIe slot\n", "nic_pcie_power"),
        ("exits with return code = 1\n", "unknown_secondary_only"),
        ("exits with return code = -9\n", "host_oom_killed"),
        ("NVRM: Xid (PCI:0000:01:00): 45, pid=1, caused by previous Xid 48\n", "xid_48_dbe"),
        ("NVRM: Xid (PCI:0000:01:00): 45, pid=1, Ch 8\n", "xid_45_cleanup"),
        ("NVRM: Xid (PCI:0000:01:00): 154, recovery action changed\n", "xid_154_recovery_action"),
        (
            "NVRM: Xid (PCI:0000:01:00): 149, NETIR\nNVRM: Xid (PCI:0000:01:00): 154, changed\n",
            "xid_149_nvlink_netir",
        ),
        ("r8169 0000:03:00.0 eth0: RTL8168h, XID 541, IRQ 48\n", "unknown"),
        ("step 1 loss 2.0\n", "unknown"),
    ],
)
def test_root_before_carrier_before_what_follows(text, cause):
    assert told(text)[0] == cause


def test_the_earliest_root_on_any_node_wins():
    """Scenario 76: an ECC error on node 1 ends rank 8; rank 0 says so much more, and later."""
    ecc = "2026-11-20T12:00:01Z uncorrectable ECC error encountered\n"
    late = "2026-11-20T12:05:01Z CUDA out of memory. Tried to allocate\n"
    assert both(("node1.log", late), ("node2.log", ecc)) == "gpu_ecc_uncorrectable"
    assert both(("node2.log", ecc), ("node1.log", late)) == "gpu_ecc_uncorrectable"


def test_clocks_of_two_hosts_may_differ():
    """Scenario 73: 3 s apart is not earlier; which rank died first decides, and the order of files does not."""
    oom = ("rank-00000.log", "2026-11-20T12:00:01Z CUDA out of memory. Tried to allocate\n")
    wild = ("rank-00008.log", "2026-11-20T11:59:58Z illegal memory access was encountered\n")
    assert both(oom, wild) == both(wild, oom) == "cuda_oom"  # the more specific one


def test_what_a_job_outlived_did_not_end_it():
    old = "2026-11-19T12:00:01Z uncorrectable ECC error encountered\n"  # of yesterday's job, in the kernel's log
    new = "2026-11-20T12:00:01Z CUDA out of memory. Tried to allocate\n"
    assert both(("dmesg-n1.log", old), ("rank-00000.log", new)) == "cuda_oom"
    caught = OOM + "\n" + "step\n" * 600 + "illegal memory access was encountered\n"
    assert both(("rank-00000.log", caught), ("x.log", "")) == "cuda_illegal_access"
    assert both(("job.out", caught), ("x.log", "")) == "cuda_oom"  # of many ranks: the others are slow to say it


def test_the_rank_that_died_first_says_why():
    ranks = (Exit(0, "n0", 1, ended=2000.0), Exit(8, "n1", 1, ended=1000.0))
    first = ("rank-00000.log", "uncorrectable ECC error encountered\n")
    second = ("rank-00008.log", OOM + "\n")
    assert both(first, second, exits=ranks) == "cuda_oom"


def test_a_typo_on_one_rank_is_not_its_peers_lost_connection():
    """Scenario 62: one rank fails, the others say that they lost it."""
    lost = ("rank-00000.log", "Connection refused\n" + TIMED + "\n")
    typo = ("rank-00001.log", TRACEBACK + "ModuleNotFoundError: No module named 'x'\n")
    ranks = (Exit(0, "n0", 134, ended=1600.0), Exit(1, "n1", 1, ended=1000.0))
    assert both(lost, typo, exits=ranks) == "python_import_error"


# --- Evidence -------------------------------------------------------------------------------------------------------

KILLED = (Exit(2, "n1", 137, "SIGKILL", 1000.0), Exit(0, "n0", 143, "SIGTERM", 1001.0))


@pytest.mark.parametrize(
    ("text", "evidence", "cause"),
    [
        ("", {"state": "OUT_OF_MEMORY"}, "slurm_oom_kill"),
        ("exits with return code = -9", {"state": "OUT_OF_MEMORY", "code": 137}, "slurm_oom_kill"),
        (OOM, {"state": "FAILED", "code": 1}, "cuda_oom"),
        (OOM, {"state": "OUT_OF_MEMORY", "code": 1}, "cuda_oom"),  # nobody was killed, the program ended itself
        ("", {"code": 137}, "host_oom_killed"),
        ("", {"exits": KILLED}, "host_oom_killed"),
        ("", {"exits": KILLED, "oom_kills": {"n1": 1}}, "slurm_oom_kill"),
        ("", {"exits": KILLED, "oom_kills": {"n1": 0}}, "killed_from_outside"),
        ("", {"exits": KILLED, "oom_kills": {"n0": 0}}, "host_oom_killed"),  # of another host
        ("exits with return code = -9\n", {"exits": KILLED, "oom_kills": {"n0": 0, "n1": 0}}, "killed_from_outside"),
        ("exits with return code = -9\n", {"oom_kills": {"n0": 0}}, "killed_from_outside"),
        ("exits with return code = -9\n", {"oom_kills": {"n0": 0, "n1": 1}}, "slurm_oom_kill"),
        ("", {"state": "Error", "code": 137}, "killed_from_outside"),
        ("", {"code": -7}, "bus_error"),
        ("", {"code": 247}, "host_oom_killed"),
        ("", {"code": 241}, "sigterm"),
        ("", {"code": 255}, "unknown"),
        ("", {"code": 143}, "sigterm"),
        ("", {"state": "TIMEOUT"}, "slurm_time_limit"),
        (TIMED, {"state": "TIMEOUT"}, "slurm_time_limit"),
        (OOM, {"state": "TIMEOUT"}, "cuda_oom"),  # the others waited for it until the limit
        (OOM, {"state": "PREEMPTED"}, "slurm_preempted"),  # a scheduler preempts nothing that is over
        (TIMED, {"state": "NODE_FAIL"}, "slurm_node_fail"),
        ("uncorrectable ECC error encountered", {"state": "NODE_FAIL"}, "gpu_ecc_uncorrectable"),
        ("", {"down": ("n1",)}, "node_lost"),
        (
            "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT x ***",
            {"state": "CANCELLED by 0"},
            "slurm_step_cancelled",
        ),
        (OOM + "\nSTEP 1.0 ON n1 CANCELLED AT x", {"state": "CANCELLED by 1000"}, "cuda_oom"),
        (TIMED, {"hang": Hang(412, 600, 300, (3,), ("n1",), "ALLREDUCE #9", "laggard")}, "hang_laggard"),
        (OOM, {"hang": Hang(412, 600, 300)}, "cuda_oom"),
        ("", {"hang": Hang(412, 600, 300)}, "hang_unknown"),
        (TRACEBACK + "KeyError: 'x'", {"hang": Hang(412, 600, 300, (3,), kind="dead")}, "python_error"),
        ("", {"code": 0}, "unknown"),
        ("exits with return code = 1", {"code": 0}, "unknown"),
        ("", {"code": 75}, "unknown"),
        ("", {"state": "out_of_memory"}, "slurm_oom_kill"),
        ("", {"state": "timeout; stopped by slurmctld"}, "slurm_time_limit"),
        ("", {"state": "A_WORD_NOBODY_KNOWS", "code": 1}, "unknown"),
    ],
)
def test_exit_codes_and_the_scheduler_are_evidence(text, evidence, cause):
    assert told(text, **evidence)[0] == cause


def test_every_word_of_a_scheduler_has_a_cause_in_the_table():
    causes = tables.read()[0]
    named = {*exits.STATES.values(), *exits.CODES.values(), *exits.HANGS.values(), *explain.EXCEPTIONS.values()}
    named |= {"python_error", "hang_unknown", "node_lost", "killed_from_outside", "xid_other"}
    assert named <= set(causes)


# --- Which node -----------------------------------------------------------------------------------------------------

HOSTS = ("n0", "n1")
ECC = "uncorrectable ECC error encountered\n"
MISMATCH = "The detected CUDA version (12.2) mismatches the version\n"


@pytest.mark.parametrize(
    ("text", "evidence", "excluded"),
    [
        (f"[node 1] {ECC}", {"hosts": HOSTS}, ("n1",)),
        (ECC, {"hosts": HOSTS}, ()),  # nobody knows where
        (f"[rank 8] {ECC}", {"hosts": HOSTS, "exits": (Exit(8, "n1", 1),)}, ("n1",)),
        (f"[rank 8] {OOM}", {"hosts": HOSTS, "exits": (Exit(8, "n1", 1),)}, ()),  # an application's error
        (f"[node 1] {MISMATCH}", {"hosts": HOSTS}, ("n1",)),
        (f"[node 0] {MISMATCH}[node 1] {MISMATCH}", {"hosts": HOSTS}, ()),  # everywhere: the image, no node
        ("", {"hosts": HOSTS, "state": "NODE_FAIL", "down": ("n1",)}, ("n1",)),
        ("", {"hosts": HOSTS, "exits": KILLED}, ()),
        (f"2026-11-20T12:00:01Z n1 kernel: {ECC}", {"hosts": ("n0.site", "n1.site")}, ("n1.site",)),
        (f"[pod/demo-worker-0/pytorch] {ECC}", {"hosts": HOSTS}, ()),  # a pod is no host
        (f"2026-11-20T12:00:01Z n1 kernel: {ECC}", {}, ("n1",)),
        ("[node 1] NVRM: Xid (PCI:0000:01:00): 149, NETIR Nonfatal XC0", {"hosts": HOSTS}, ()),
        ("[node 1] NVRM: Xid (PCI:0000:01:00): 149, NETIR Fatal XC0", {"hosts": HOSTS}, ("n1",)),
    ],
)
def test_a_node_is_excluded_for_its_own_fault_only(text, evidence, excluded):
    assert told(text, **evidence)[1] == excluded


# --- Flight recorder ------------------------------------------------------------------------------------------------


def dump(
    *calls: tuple[int, str, bool], ranks: str = "[0, 1, 2, 3]", size: int = 4, group: str = "0"
) -> dict[str, object]:
    entries = [
        {
            "process_group": (group, "default_pg"),
            "collective_seq_id": number,
            "profiling_name": f"nccl:{name}",
            "input_sizes": [[size]],
            "input_dtypes": ["Float"],
            "state": "completed" if over else "started",
            "is_p2p": False,
            "frames": [{"name": "step", "filename": "/home/me/train.py", "line": 70 + number}],
        }
        for number, name, over in calls
    ]
    return {"version": "2.10", "pg_config": {group: {"ranks": ranks}}, "pg_status": {}, "entries": entries}


WAITS = dump((1, "all_reduce", True), (2, "all_reduce", False))
BEHIND = dump((1, "all_reduce", True))
WHERE = {0: "n0", 1: "n0", 2: "n1", 3: "n1"}


@pytest.mark.parametrize(
    ("dumps", "kind", "ranks", "hosts"),
    [
        ({0: WAITS, 1: WAITS, 2: WAITS, 3: BEHIND}, "laggard", (3,), ("n1",)),
        ({0: WAITS, 1: WAITS, 2: BEHIND, 3: BEHIND}, "laggard", (2, 3), ("n1",)),
        ({0: WAITS, 1: WAITS, 2: WAITS, 3: WAITS}, "all wait", (), ()),
        ({0: WAITS, 1: WAITS, 2: WAITS}, "dead", (3,), ("n1",)),
        (
            {0: WAITS, 1: WAITS, 2: WAITS, 3: dump((1, "all_reduce", True), (2, "broadcast", False))},
            "desync",
            (3,),
            (),
        ),
        ({0: WAITS, 1: WAITS, 2: WAITS, 3: dump((2, "all_reduce", False), size=8)}, "desync", (3,), ()),
        (dict.fromkeys(range(4), BEHIND), "unknown", (), ()),
        ({}, "unknown", (), ()),
    ],
)
def test_the_flight_recorder_names_who_is_late(dumps, kind, ranks, hosts):
    """Scenario 63."""
    found = flight.verdict(dumps, Hang(412, 600, 300), hosts=WHERE)
    assert (found.kind, found.ranks, found.hosts) == (kind, ranks, hosts)
    assert (found.step, found.limit) == (412, 300)
    if kind == "laggard":
        assert found.collective == "ALLREDUCE #2"
        assert "last seen in ALLREDUCE #1 at /home/me/train.py:71" in found.why
        assert ("all ranks of n1 are late" in found.why) == (ranks == (2, 3))


def test_a_rank_that_waits_in_another_group_is_not_the_cause():
    """Rank 1 is late for 0's group because it waits for rank 3 in a group of its own."""
    data = dump((5, "all_gather", False), ranks="[1, 3]", group="7")
    third = dump((4, "all_gather", True), ranks="[1, 3]", group="7")
    main = {"0": {"ranks": "[0, 1]"}}
    first = {**dump((2, "all_reduce", False)), "pg_config": main}
    second = {**data, "pg_config": {**main, "7": {"ranks": "[1, 3]"}}}
    second["entries"] = [*dump((1, "all_reduce", True))["entries"], *data["entries"]]  # type: ignore[misc]
    found = flight.verdict({0: first, 1: second, 3: third}, Hang(1, 2, 3), hosts=WHERE)
    assert (found.kind, found.ranks, found.collective) == ("laggard", (3,), "ALLGATHER #5")


def test_dumps_are_read_as_pickle_and_as_json(tmp_path):
    (tmp_path / "nccl_trace_rank_0").write_bytes(pickle.dumps(WAITS, protocol=2))
    (tmp_path / "nccl_trace_rank_1.json").write_text(json.dumps(WAITS))
    (tmp_path / "nccl_trace_rank_2").write_bytes(pickle.dumps(BEHIND)[:-20])
    (tmp_path / "nccl_trace_rank_3").write_bytes(b"")
    dumps, notes = flight.read(str(tmp_path))
    assert sorted(dumps) == [0, 1]
    assert len(notes) == 2


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("value", [Evil(), {"entries": [Evil()]}, {"entries": print}, {"entries": 3}, [], "x"])
def test_a_dump_that_wants_to_run_something_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flight.Refused):
        flight.load(pickle.dumps(value))
    assert not Path("executed").exists()


HANGING = """
import os, sys, threading, time
import torch, torch.distributed as dist
import torch._C._distributed_c10d as c
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(4))
if rank != 1:
    threading.Thread(target=lambda: dist.all_reduce(torch.ones(4)), daemon=True).start()
    time.sleep(2)
with open(sys.argv[1] + f"/trace_{rank}", "wb") as file:
    file.write(c._dump_fr_trace())
with open(sys.argv[1] + f"/json/trace_{rank}.json", "wb") as file:
    file.write(c._dump_fr_trace_json())
os.mkdir(sys.argv[1] + f"/done_{rank}")
while not all(os.path.exists(sys.argv[1] + f"/done_{one}") for one in range(3)):  # who leaves ends the others' call
    time.sleep(0.1)
os._exit(0)
"""


@pytest.mark.slow
def test_dumps_of_a_real_hang_name_the_rank_that_did_not_come(tmp_path):
    from launcher.node import port

    (tmp_path / "json").mkdir()
    script = tmp_path / "hang.py"
    script.write_text(HANGING)
    number = port.pick("flight")
    started = []
    for rank in range(3):
        env = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}
        env |= {"TORCH_FR_BUFFER_SIZE": "100", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=env))
    assert [one.wait(timeout=120) for one in started] == [0, 0, 0]
    for folder in (tmp_path, tmp_path / "json"):
        dumps, notes = flight.read(str(folder))
        assert (sorted(dumps), notes) == ([0, 1, 2], [])
        found = flight.verdict(dumps, Hang(1, 2, 3), hosts={0: "a", 1: "b", 2: "c"})
        assert (found.kind, found.ranks, found.hosts) == ("laggard", (1,), ("b",))
        assert found.collective == "ALLREDUCE #2"


# --- For a person ---------------------------------------------------------------------------------------------------


def test_a_diagnosis_says_what_where_why_and_what_to_change():
    text = f"[rank 3] step 1\n[rank 3] {OOM}\n[rank 0] {TIMED}\n"
    ranks = (Exit(3, "n1", 1, ended=1000.0), Exit(0, "n0", 134, ended=1600.0))
    made = explain.explain(read(text), Evidence(exits=ranks), causes=CAUSES)
    config = {"train_micro_batch_size_per_gpu": 4}
    shown = diagnoses.text(made, config=config)
    assert shown.startswith("cuda_oom: a GPU's memory ran out\n")
    assert "where     rank 3 on n1" in shown
    assert "job.out:2 (rank 3 on n1): torch.OutOfMemoryError: CUDA out of memory" in shown
    assert "train.micro_batch: 2   # was 4" in shown
    assert "again     not before this is changed" in shown
    assert "collective_timeout" in shown
    value = diagnoses.as_json(made, config=config)
    assert json.loads(json.dumps(value))["cause"] == "cuda_oom"
    assert diagnoses.headline(to_json(made)) == "cuda_oom: a GPU's memory ran out (rank 3 on n1, job.out:2)"
    assert diagnoses.causes(made) == ["cuda_oom", "collective_timeout", "sigabrt"][: 1 + len(made.others)]


def test_nothing_found_is_said():
    made = explain.explain(read("all is well\n"), causes=CAUSES)
    assert diagnoses.text(made) == "no cause found"
    assert diagnoses.causes(made) == ["none"]
    assert diagnoses.headline(to_json(made)) == ""


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"train_micro_batch_size_per_gpu": 8},
         "train.micro_batch: 4   # was 8; the global batch stays, by accumulating more"),
        ({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
         "train.micro_batch: 1   # it is 1 already: train.zero 3 next"),
        ({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
         "train.micro_batch of the job file"),
        ({}, "train.micro_batch of the job file"),
    ],
)  # fmt: skip
def test_a_change_is_a_line_of_the_job_file(config, line):
    assert diagnoses.suggestion(CAUSES["cuda_oom"], config) == line


# --- Commands -------------------------------------------------------------------------------------------------------


def invoke(*argv: str, stdin: str | None = None):
    from launcher.cli import cli

    return CliRunner().invoke(cli, ["diagnose", *argv], input=stdin)


def test_diagnose_reads_files_folders_and_standard_input(tmp_path):
    (tmp_path / "a.log").write_text(OOM + "\n")
    (tmp_path / "notes.md").write_text("not a log: uncorrectable ECC error encountered\n")
    for argv, stdin in (([str(tmp_path)], None), ([str(tmp_path / "a.log")], None), (["-"], OOM + "\n")):
        done = invoke(*argv, "--output", "causes", stdin=stdin)
        assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "cuda_oom")


def test_diagnose_without_a_cause_ends_with_one(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("step 1 loss 2.1\n")
    done = invoke(str(log), "--output", "causes")
    assert (done.exit_code, done.stdout) == (1, "none\n")
    assert invoke(str(log), "--state", "OUT_OF_MEMORY", "--output", "causes").stdout == "slurm_oom_kill\n"
    assert invoke(str(log), "--exit-code", "137", "--output", "causes").stdout == "host_oom_killed\n"
    assert json.loads(invoke(str(log), "--json").stdout)["cause"] == "none"


@pytest.fixture
def finished(tmp_path):
    """A run directory after two attempts on two nodes."""
    folder = tmp_path / "dslaunch-runs" / "demo-20261121-031502-4f2a0001"
    logs = folder / "logs"
    logs.mkdir(parents=True)
    journal.append(str(folder), "rendered", name="demo", backend="local", steps=10, extra={})
    journal.append(str(folder), "attempt", attempt=0, hosts=["n0", "n1"], resume="")
    journal.append(str(folder), "ended", attempt=0, code=1)
    journal.append(str(folder), "attempt", attempt=1, hosts=["n0", "n2"], resume="")
    (folder / "ds_config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    for rank, (host, text) in enumerate([("n0", TIMED), ("n2", OOM)]):
        old = "uncorrectable ECC error encountered\n"
        (logs / f"rank-{rank:05}.log").write_text(f"{old}dslaunch: attempt 1 of rank {rank} on {host}\n{text}\n")
        (logs / f"rank-{rank:05}.json").write_text(
            json.dumps({"rank": rank, "host": host, "code": 1, "signal": None, "ended": 100.0 - rank, "attempt": 1})
        )
        (logs / f"node-{rank:04}.json").write_text(
            json.dumps({"node_rank": rank, "host": host, "code": 1, "attempt": 1, "oom_kills": 0, "hang": None})
        )
        (logs / f"node-{rank:04}.launcher.log").write_text("exits with return code = -9\n")
    (logs / "job.out").write_text(f"{old}[rank 1] dslaunch: attempt 1 of rank 1 on n2\n[rank 1] {OOM}\n")
    return folder


def test_a_run_is_explained_by_its_newest_attempt(finished):
    gathered = evidence.gather(finished, state="FAILED", code=1)
    assert gathered.attempt == 1
    assert gathered.evidence.hosts == ("n0", "n2")
    assert gathered.evidence.exits[1] == Exit(1, "n2", 1, "", 99.0)
    assert gathered.evidence.oom_kills == {"n0": 0, "n2": 0}
    assert not [name for name in gathered.files if "launcher" in name]
    made = explain.diagnose(gathered.files, gathered.evidence, starts=gathered.starts)
    assert (made.cause, made.exclude) == ("cuda_oom", ())
    assert made.root is not None
    assert (made.root.rank, made.root.node) == (1, "n2")
    assert [Path(line.file).name for line in made.root.lines] == ["rank-00001.log"]  # and not its copy in job.out
    assert [one.cause.id for one in made.others] == ["collective_timeout"]


def test_a_hang_that_a_node_told_of_is_evidence(finished):
    word = finished / "logs" / "node-0001.json"
    hang = to_json(Hang(412, 600.0, 300.0, (1,), ("n2",), "ALLREDUCE #9", "laggard", "1 rank waits"))
    word.write_text(json.dumps({**json.loads(word.read_text()), "hang": hang}))
    (finished / "logs" / "hang-1").mkdir()
    (finished / "logs" / "hang-1" / "dmesg-n2.txt").write_text(
        "NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"
    )
    for log in (*finished.glob("logs/rank-*.log"), finished / "logs" / "job.out"):
        log.write_text("")
    gathered = evidence.gather(finished)
    assert gathered.evidence.hang == Hang(412, 600.0, 300.0, (1,), ("n2",), "ALLREDUCE #9", "laggard", "1 rank waits")
    made = explain.diagnose(gathered.files, gathered.evidence, starts=gathered.starts)
    assert (made.cause, made.exclude) == ("gpu_fallen_off_bus", ("n2",))


def test_diagnose_of_a_run_names_the_line_to_change(finished):
    done = invoke(finished.name, "--runs", str(finished.parent), "--exit-code", "1")
    assert done.exit_code == 0, done.output
    assert "train.micro_batch: 2   # was 4" in done.stdout
    assert invoke(str(finished), "--output", "causes").stdout.splitlines()[0] == "cuda_oom"


def test_a_run_that_the_preflight_stopped_says_so(finished):
    for path in (finished / "logs").iterdir():
        path.unlink()
    (finished / "preflight").mkdir()
    checked = {"train": False, "headline": "2 of 4 nodes are healthy and 4 are needed"}
    (finished / "preflight" / "verdict.json").write_text(json.dumps(checked))
    done = invoke(str(finished))
    assert done.stdout.startswith("preflight_refused: ")
    assert "2 of 4 nodes are healthy and 4 are needed" in done.stdout


def test_what_a_cluster_says_joins_what_the_run_left():
    own = Evidence(hosts=(), oom_kills={"n1": 1}, exits=(Exit(0, "n1", 1),))
    told = Evidence(state="OOMKilled", code=137, oom_kills={"n2": 1}, down=("n3",), hosts=("n1", "n2", "n3"))
    merged, none = evidence.of_cluster(own, told, [])
    assert none == []
    assert merged == Evidence("OOMKilled", 137, own.exits, {"n1": 1, "n2": 1}, ("n3",), None, told.hosts)


def test_explain_knows_causes_and_signatures():
    from launcher.cli import cli

    for asked in (
        "gpu_ecc_uncorrectable",
        next(row.id for row in tables.read()[1] if row.cause == "gpu_ecc_uncorrectable"),
    ):
        done = CliRunner().invoke(cli, ["explain", asked])
        assert done.stdout.startswith("gpu_ecc_uncorrectable: ")
        assert "exclude: yes" in done.stdout


def test_diagnose_of_nothing_is_refused():
    done = invoke("/nowhere/at-all.log")
    assert done.exit_code != 0
    assert "is no file, and no run" in str(done.exception)


def test_lines_have_their_place():
    (hit,) = match.read_text("x\n\n" + OOM, SIGNATURES, file="logs/rank-00003.log").hits
    assert hit.lines == (Line("logs/rank-00003.log", 3, OOM, None, "", 3),)


def test_a_table_is_read_as_it_is_written():
    head = "id\tcause\tpattern\tsample\tjoins\tunless\tsource\n"
    (row,) = tables.read_signatures(head + "# why\nS1\tx\ta\\tb\tone\\ntwo\\tthree\t2\t\tdocs\n")
    assert row == Signature("S1", "x", "a\\tb", "one\ntwo\tthree", 2, "", "docs")
    (short,) = tables.read_signatures(head + "S1\tx\tabcd\tabcd\n")
    assert (short.joins, short.unless) == (1, "")
    for wrong in ("nonsense\tcause\n1\t2\n", head + "1\t2\t3\t4\t5\t6\t7\t8\n"):
        with pytest.raises(ValueError, match="column"):
            tables.read_signatures(wrong)


def test_a_stream_is_read_like_a_file():
    stream = io.BytesIO((OOM + "\n").encode())
    assert [hit.first.number for hit in match.read_stream(stream, SIGNATURES).hits] == [1]
