"""nccl-tests, where their binaries are and were asked for: all_reduce_perf on the GPUs of one node."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ["size", "count", "type", "redop"]


@dataclass(frozen=True)
class Row:
    """One size; bandwidths in GB/s, the lower of out of place and in place."""

    bytes: int
    algbw: float
    busbw: float
    wrong: int | None  # elements; None where it was not looked at


def parse(text: str) -> list[Row]:
    """The table on standard output. A layout that we do not know is no rows, never a guess.

    Releases before 2.10 have no root, and an error instead of the wrong elements; per-iteration columns may follow
    each half.
    """
    header: list[str] = []
    rows = []
    for line in text.splitlines():
        words = line.lstrip("# ").split() if line.lstrip().startswith("#") else line.split()
        if line.lstrip().startswith("#"):
            if words[:4] == COLUMNS and words.count("busbw") == 2:
                header = words
            continue
        if header and words and words[0].isdigit():
            if len(words) < len(header) - header.count("timestamp"):
                return []
            rows.append(_row(header, words))
    return rows


def _row(header: Sequence[str], words: Sequence[str]) -> Row:
    def both(name: str) -> list[str]:
        return [word for column, word in zip(header, words, strict=False) if column == name]

    wrong = both("wrong") or both("#wrong")
    counted = [int(float(one)) for one in wrong if one != "N/A"]
    return Row(
        int(words[0]),
        min(map(float, both("algbw"))),
        min(map(float, both("busbw"))),
        max(counted) if counted else None,
    )


def parse_json(text: str) -> list[Row]:
    """The file of -J, versions 1 and 2; no rows where it is something else."""
    try:
        return [_from_json(one) for one in json.loads(text)["results"]]
    except (ValueError, KeyError, TypeError):
        return []


def _from_json(one: dict[str, Any]) -> Row:
    halves = [one[name] for name in ("out_of_place", "in_place") if one.get(name)]
    wrong = [int(half["nwrong"]) for half in halves if half["nwrong"] is not None]
    return Row(
        int(one["size"]),
        min(float(half["alg_bw"]) for half in halves),
        min(float(half["bus_bw"]) for half in halves),
        max(wrong) if wrong else None,
    )


def run(directory: str, *, gpus: int, size: int, timeout: float) -> dict[str, Any]:
    """{"bytes": 8589934592, "busbw": 480.2, "algbw": 274.4, "wrong": 0}, or {"error": why}."""
    program = os.path.join(directory, "all_reduce_perf")
    if not os.access(program, os.X_OK):
        return {"error": f"{program} is not there, or may not be run"}
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.json")
        argv = [program, "-b", str(size), "-e", str(size), "-g", str(gpus), "-w", "5", "-n", "20", "-c", "1"]
        done = _call([*argv, "-J", report], timeout)
        if done.returncode and "invalid option" in done.stderr:  # before -J
            done = _call(argv, timeout)
        rows = []
        if os.path.exists(report):
            with open(report, encoding="utf-8", errors="replace") as file:
                rows = parse_json(file.read())
    rows = rows or parse(done.stdout)
    if done.returncode or not rows:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        why = said[-1] if said else "nothing"
        return {"error": f"all_reduce_perf ended with exit code {done.returncode} and no table we know: {why}"}
    last = rows[-1]
    return {"bytes": last.bytes, "busbw": last.busbw, "algbw": last.algbw, "wrong": last.wrong}


def _call(argv: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Without our NCCL_DEBUG_FILE, which NCCL would open anew and so empty, and without its lines in the table."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_DEBUG")}
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=environ,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no answer within {timeout:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(argv, 126, "", str(error))
