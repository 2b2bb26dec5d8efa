"""The journal: what is written stays readable whatever happens to the file or to who writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.node import journal

MODULE = Path(journal.__file__)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key not in ("seq", "event", "crc")), VALUES, max_size=4
)


def entries(rows: list[dict]) -> list[dict]:
    return [{"seq": number, "time": 1.5, "host": "n", "event": "x", **row} for number, row in enumerate(rows, 1)]


def text(rows: list[dict]) -> list[bytes]:
    return [journal.line(entry) for entry in entries(rows)]


def plain(found: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key != "crc"} for entry in found]


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(FIELDS, max_size=6))
def test_what_is_written_is_read(rows):
    found, torn = journal.parse(b"".join(text(rows)))
    assert (plain(found), torn) == (entries(rows), [])


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(FIELDS, min_size=1, max_size=6), st.data())
def test_a_file_that_ends_anywhere_keeps_every_whole_line(rows, data):
    lines = text(rows)
    whole = b"".join(lines)
    end = data.draw(st.integers(0, len(whole)))
    found, torn = journal.parse(whole[:end])
    kept = 0
    while sum(map(len, lines[: kept + 1])) <= end:
        kept += 1
        if kept == len(lines):
            break
    without_newline = kept < len(lines) and sum(map(len, lines[: kept + 1])) - 1 == end
    assert plain(found) == entries(rows)[: kept + without_newline]
    assert torn == ([] if without_newline or end == sum(map(len, lines[:kept])) else [kept + 1])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(FIELDS, min_size=1, max_size=5), st.data())
def test_a_flipped_bit_costs_the_line_it_is_in_and_no_other(rows, data):
    lines = text(rows)
    whole = bytearray(b"".join(lines))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    hit = next(number for number in range(len(lines)) if at < sum(map(len, lines[: number + 1])))
    found, torn = journal.parse(bytes(whole))
    others = [entry for number, entry in enumerate(entries(rows)) if number != hit]
    assert [entry for entry in plain(found) if entry != entries(rows)[hit]] == others  # nothing else, nothing new
    assert torn or entries(rows)[hit] in plain(found)


def test_a_line_cut_off_by_a_crash_is_closed_before_the_next(tmp_path):
    journal.append(tmp_path, "submitting", token="t")
    path = tmp_path / journal.NAME
    path.write_bytes(path.read_bytes() + b'{"seq": 2, "time": 17')
    assert journal.append(tmp_path, "submitted", job="7")["seq"] == 2
    found, torn = journal.read(tmp_path)
    assert ([entry["event"] for entry in found], torn) == (["submitting", "submitted"], [2])


def test_two_lines_whose_newline_is_lost_and_one_written_twice(tmp_path):
    one, two = text([{"a": 1}, {"b": 'x{"seq": 3}'}])
    found, torn = journal.parse(one.rstrip() + two + two + b"\0" * 512)
    assert ([entry["seq"] for entry in found], torn) == ([1, 2], [1])


def test_two_entries_with_one_number_both_stay():
    """Whoever was paused longer than the lease may have written beside its successor."""
    one = journal.line({"seq": 1, "time": 1.0, "host": "a", "event": "x"})
    two = journal.line({"seq": 1, "time": 1.0, "host": "b", "event": "x"})
    assert [entry["host"] for entry in journal.parse(one + two)[0]] == ["a", "b"]


def test_files_are_the_owner_s_from_their_first_moment(tmp_path):
    before = os.umask(0)
    try:
        journal.append(tmp_path, "rendered")
        with journal.Lock(tmp_path / "x.lock"):
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {journal.NAME: 0o600, "x.lock": 0o600}
    assert [path.name for path in tmp_path.iterdir()] == [journal.NAME]


def test_no_journal_is_no_entries(tmp_path):
    assert journal.read(tmp_path) == journal.read(tmp_path / "none") == ([], [])


def _append(folder: str, who: int) -> None:
    for number in range(50):
        journal.append(folder, "x", who=who, number=number)


@pytest.mark.slow
def test_eight_processes_that_append_at_once_lose_nothing(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.starmap(_append, [(str(tmp_path), who) for who in range(8)])
    found, torn = journal.read(tmp_path)
    assert torn == []
    assert [entry["seq"] for entry in found] == list(range(1, 401))
    assert {(entry["who"], entry["number"]) for entry in found} == {(w, n) for w in range(8) for n in range(50)}
    for who in range(8):
        assert [entry["number"] for entry in found if entry["who"] == who] == list(range(50))
    assert [path.name for path in tmp_path.iterdir()] == [journal.NAME]


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import journal
journal._space = lambda: sys.argv[4]
with journal.Lock(sys.argv[2], lease=float(sys.argv[3])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path, *, lease: float, space: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(MODULE.parent), str(path), str(lease), space]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "held\n"
    return child


def test_a_lock_whose_holder_was_killed_here_is_taken_at_once(tmp_path):
    path = tmp_path / "x.lock"
    child = holder(path, lease=30, space=journal._space())
    child.kill()
    child.wait()
    begun = time.monotonic()
    with journal.Lock(path, lease=30, wait=10):
        assert time.monotonic() - begun < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_lock_of_another_host_is_taken_after_its_lease_and_never_while_it_is_refreshed(tmp_path):
    path = tmp_path / "x.lock"
    child = holder(path, lease=1, space="another machine")
    try:
        with pytest.raises(journal.Busy, match=f"held by process {child.pid}"):
            journal.Lock(path, lease=1, wait=2.5).__enter__()
    finally:
        child.kill()
        child.wait()
    begun = time.monotonic()
    with journal.Lock(path, lease=1, wait=20):
        assert time.monotonic() - begun < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_holder_that_slept_through_its_lease_knows_and_does_not_write(tmp_path):
    """Its successor's lock stays, too."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import sys, os, time; sys.path.insert(0, sys.argv[1]); import journal\n"
        "journal._space = lambda: 'another machine'\n"
        "lock = journal.Lock(sys.argv[2] + '/journal.lock', lease=1)\n"
        "lock.__enter__(); print('held', flush=True)\n"
        "sys.stdin.readline(); print(lock.held()); lock.__exit__(); print(os.path.exists(lock.path))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(MODULE.parent), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout
    child.stdout.readline()
    child.send_signal(signal.SIGSTOP)
    with journal.Lock(folder / "journal.lock", lease=1, wait=20):
        child.send_signal(signal.SIGCONT)
        assert child.communicate("\n", timeout=20)[0] == "False\nTrue\n"


def _steal(path: str, log: str, barrier_at: float) -> None:
    time.sleep(max(0.0, barrier_at - time.time()))
    with journal.Lock(path, lease=1, wait=60), Path(log).open("a") as file:
        file.write(f"in {os.getpid()}\n")
        file.flush()
        time.sleep(0.05)
        file.write(f"out {os.getpid()}\n")


@pytest.mark.slow
def test_of_many_that_find_a_stale_lock_one_is_in_at_a_time(tmp_path):
    path, log = tmp_path / "x.lock", tmp_path / "log"
    for _ in range(5):
        path.write_text(json.dumps({"host": "gone", "pid": 1, "nonce": "feed", "space": "another machine"}))
        os.utime(path, (0, 0))
        at = time.time() + 1
        with multiprocessing.get_context("fork").Pool(6) as pool:
            pool.starmap(_steal, [(str(path), str(log), at)] * 6)
    words = log.read_text().split()
    assert len(words) == 2 * 2 * 30
    for enter, one, leave, same in zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True):
        assert (enter, leave, one) == ("in", "out", same)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def _fill(folder: Path) -> None:
    for number in range(10_000):
        journal.append(folder, "x", number=number, text="y" * 200)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_line(tmp_path):
    """scenario 58: on a file system of 64 KiB."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("only root mounts a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            _fill(tmp_path)
        found, torn = journal.read(tmp_path)
        assert torn == []
        assert [entry["number"] for entry in found] == list(range(len(found)))
        assert len(found) > 50
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_shell_may_write_it_too(tmp_path):
    done = subprocess.run([sys.executable, str(MODULE), str(tmp_path), "started", "job=7", "restart:=0"])
    assert done.returncode == 0
    (entry,), _ = journal.read(tmp_path)
    assert (entry["event"], entry["job"], entry["restart"]) == ("started", "7", 0)


def test_the_batch_host_s_python_can_read_it():
    import ast

    ast.parse(MODULE.read_text(encoding="utf-8"), feature_version=(3, 6))
