"""What `dslaunch logs` prints: in order, of whom one asks for, safe for a terminal, in little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli import cli
from launcher.errors import UserError
from launcher.node import journal
from launcher.runs import logs
from launcher.runs.logs import Choice

RUN = "demo-20261121-031502-4f2a90c1"


@pytest.fixture
def run(tmp_path):
    """Two nodes of two ranks on Slurm; jobs 9 and 10, the second one by itself after the first."""
    folder = tmp_path / RUN
    (folder / "logs").mkdir(parents=True)
    journal.append(folder, "submitting", backend="slurm", name="demo", steps=10, extra={"per_node": 2})
    journal.append(folder, "submitted", job="9")
    journal.append(folder, "finished", code=0)
    output = folder / "logs"
    (output / "slurm-9.out").write_bytes(b"dslaunch: begins\n[rank 0] one\n[rank 2] two\n[node 1] torchrun up\n")
    (output / "slurm-10.out").write_bytes(b"[rank 3] three\n[rank 0] four\n[node 0] down\n[rank 10] five\n")
    for rank in range(4):
        host = {"rank": rank, "node_rank": rank // 2, "host": f"node{rank // 2 + 1}"}
        (output / f"rank-{rank:05d}.json").write_text(json.dumps(host))
    (folder / "logs" / "rank-00003.log").write_bytes(
        b"three, and what was too fast to be passed on\n\x1b[1mlast\x1b[0m"
    )
    return folder


def lines(folder: Path, *options: str) -> list[str]:
    done = CliRunner().invoke(cli, ["logs", folder.name, "--runs", str(folder.parent), *options])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_jobs_of_one_run_come_in_the_order_in_which_they_were_submitted(run):
    assert lines(run) == ["dslaunch: begins", "[rank 0] one", "[rank 2] two", "[node 1] torchrun up",
                          "[rank 3] three", "[rank 0] four", "[node 0] down", "[rank 10] five"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rank", "3"), ["three, and what was too fast to be passed on", "last"]),
        (("--rank", "0,2-3"), ["[rank 0] one", "[rank 2] two", "[rank 3] three", "[rank 0] four"]),
        (("--ranks", "10,0"), ["[rank 0] one", "[rank 0] four", "[rank 10] five"]),
        (("--node", "1"), ["[rank 2] two", "[node 1] torchrun up", "[rank 3] three"]),
        (("--node", "node2"), ["[rank 2] two", "[node 1] torchrun up", "[rank 3] three"]),
        (("--node", "node2", "--rank", "2"), ["[rank 2] two"]),
        (("--tail", "2"), ["[node 0] down", "[rank 10] five"]),
        (("--tail", "6"), ["[rank 2] two", "[node 1] torchrun up", "[rank 3] three", "[rank 0] four",
                           "[node 0] down", "[rank 10] five"]),
        (("--tail", "2", "--rank", "0,3"), ["[rank 3] three", "[rank 0] four"]),
        (("--tail", "99", "--rank", "0,3"), ["[rank 0] one", "[rank 3] three", "[rank 0] four"]),
        (("--tail", "0"), []),
    ],
)  # fmt: skip
def test_ranks_nodes_and_the_last_lines_are_picked(run, options, expected):
    if "--node" in options and "--rank" in options:  # one rank is its own file, whatever else is said
        (run / "logs" / "rank-00002.log").write_bytes(b"[rank 2] two\n")
    assert lines(run, *options) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rank", "7"), "there are logs of ranks 3 to 3"),
        (("--rank", "x"), "`x` is no rank"),
        (("--rank", "5-3"), "`5-3` is no rank"),
        (("--rank", "0-99999999"), "is no rank"),
        (("--node", "node9"), "there are 0 (node1), 1 (node2)"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(run, options, says):
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dslaunch"), "logs", RUN, "--runs", str(run.parent), *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x1b[31mred\x1b[0m\n", "red"),
        (b"  5%|#    |\r 50%|##   |\r100%|#####|\r\n", "100%|#####|"),
        (b"tab\tstays\n", "tab\tstays"),
        (b"\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n", "textlink"),
        (b"\x1bPq#0;2;0;0;0\x1b\\after\n", "after"),
        (b"\x1b(B\x1b[?25l\x1b[2K\x1b[1Gline\n", "line"),
        (b"\x1bcreset \x07bell \x08back \x00nul\n", "reset bell back nul"),
        ("\x9b31mC1 \x85 end\n".encode(), "31mC1  end"),
        (b"half \xe2\x82 byte\n", "half \ufffd byte"),
        ("\u202egnp.exe \u2066x\u2069\n".encode(), "gnp.exe x"),
        ("loss ↓ 2.3 损失\n".encode(), "loss ↓ 2.3 损失"),
    ],
)
def test_nothing_in_a_log_moves_the_cursor_or_rings_the_bell(raw, text):
    """Scenario 78."""
    assert logs.printable(raw) == text


@given(st.binary(max_size=300))
def test_whatever_bytes_come_what_is_printed_is_text(raw):
    text = logs.printable(raw)
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 12), st.booleans())
def test_the_last_lines_are_those_that_all_lines_end_with(tmp_path_factory, parts, number, ended):
    folder = tmp_path_factory.mktemp("run")
    data = b"\n".join(parts) + (b"\n" if ended else b"")
    (folder / "a.out").write_bytes(data)
    everything = list(logs.read(folder, "a.out", Choice()))
    half = bool(everything) and bool(logs.printable(data.rpartition(b"\n")[2]))  # NUL alone is nothing
    found = list(logs.read(folder, "a.out", Choice(tail=number)))
    assert found == everything[-(number + half) :]


def test_lines_longer_than_memory_should_hold_come_in_pieces_and_backwards_too(tmp_path):
    bar = b"".join(b"%6d/999999\r" % i for i in range(40_000))  # one line of 560 KB that redraws itself
    (tmp_path / "a.out").write_bytes(b"first\n" + bar + b"\n" + b"x" * 200_000 + b"\nlast\n")
    found = list(logs.read(tmp_path, "a.out", Choice()))
    assert (found[0], found[-1]) == ("first", "last")
    assert len(found) < 20
    assert "".join(found).count("x") == 200_000
    assert list(logs.read(tmp_path, "a.out", Choice(tail=1))) == ["last"]


def test_of_a_service_that_has_no_log_it_is_said_which_have(tmp_path):
    (tmp_path / "logs").mkdir()
    for hint in ("no service has written one yet", "there are service-vllm-0.log"):
        with pytest.raises(UserError, match="no log of a service ray in ") as caught:
            list(logs.read(tmp_path, "logs/service-ray*.log", Choice()))
        assert caught.value.problems[0].hint == hint
        (tmp_path / "logs" / "service-vllm-0.log").write_text("up\n")


@pytest.mark.slow
def test_following_ends_with_the_run_and_goes_on_into_the_job_that_comes_after(run):
    over = threading.Event()
    (run / "logs" / "slurm-10.out").unlink()
    found: list[str] = []
    reader = threading.Thread(
        target=lambda: found.extend(logs.read(run, "logs/slurm-*.out", Choice(tail=1), follow=True, over=over.is_set))
    )
    reader.start()
    time.sleep(0.5)
    with (run / "logs" / "slurm-9.out").open("ab") as file:
        file.write(b"[rank 0] ha")
        file.flush()
        time.sleep(0.5)
        file.write(b"lf\n")
    (run / "logs" / "slurm-10.out").write_bytes(b"[rank 0] again\n[rank 0] no newline")
    time.sleep(0.5)
    over.set()
    reader.join(20)
    assert found == ["[node 1] torchrun up", "[rank 0] half", "[rank 0] again", "[rank 0] no newline"]


MEASURE = """
import resource, sys, time
from pathlib import Path
from launcher.runs.logs import Choice, read
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun, count = time.monotonic(), 0
for line in read(Path(sys.argv[1]), "big.out", Choice(tail=int(sys.argv[2]) if sys.argv[2] else None)):
    count += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
print(count, grown // 1024, round(time.monotonic() - begun, 1))
"""


def measured(folder: Path, tail: str = "") -> tuple[int, int, float]:
    """Lines, MiB by which the process grew, seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), tail], capture_output=True, text=True, check=True
    )
    count, grown, seconds = done.stdout.split()
    return int(count), int(grown), float(seconds)


@pytest.mark.slow
def test_ten_gigabytes_take_a_few_megabytes_of_memory(tmp_path):
    """Scenario 78: the end of 10 GB; then from end to end, 1 GB of zeros that is one line, and 100 MB of lines, bars
    and colours. DSLAUNCH_TEST_FULL=1 reads all of 10 GB and 300 MB, half a minute."""
    full = bool(os.environ.get("DSLAUNCH_TEST_FULL"))
    big = tmp_path / "big.out"

    def zeros(gigabytes: int) -> None:
        with big.open("wb") as file:
            file.write(b"begin\n")
            file.truncate(gigabytes * 2**30)
            file.seek(0, os.SEEK_END)
            file.write(b"\nend\n")

    zeros(10)
    assert measured(tmp_path, "2")[:2] == (2, pytest.approx(0, abs=16))
    zeros(10 if full else 1)
    assert measured(tmp_path)[:2] == (3, pytest.approx(0, abs=16))
    block = b"".join(
        b"[rank %d] \x1b[32mstep %d\x1b[0m loss 2.345 " % (i % 64, i) + b"=" * (i % 90) + b"\n" for i in range(10_000)
    ) + b"".join(b"%5d%%|#####    |\r" % i for i in range(20_000)) + b"\n"  # fmt: skip
    blocks = (300 if full else 100) * 2**20 // len(block)
    with big.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
    count, grown, _ = measured(tmp_path, "1000")
    assert (count, grown) == (1000, pytest.approx(0, abs=16))
    count, grown, seconds = measured(tmp_path)
    assert count > 10_000 * blocks
    assert grown < 16
    assert seconds < 300
