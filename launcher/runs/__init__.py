"""The run directory is the database: `ls` and `cat` explain a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Problem, UserError

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Record:
    """What the journal of one run says."""

    id: str
    folder: Path
    backend: str
    job: str  # the scheduler's id; empty when no submission was recorded
    name: str
    steps: int
    extra: dict[str, Any]  # what this backend needs to find the job again


def root(option: str | None, environ: dict[str, str]) -> Path:
    """Where runs live: --runs, else DSLAUNCH_RUNS, else ./dslaunch-runs."""
    return Path(option or environ.get("DSLAUNCH_RUNS") or "dslaunch-runs").absolute()


def new_id(name: str) -> str:
    """demo-1121-031502-4f2a: sorts by time, never twice, fits every scheduler."""
    return f"{name}-{time.strftime('%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def note(folder: Path, event: str, **fields: Any) -> None:
    """One line of the journal, on disk before this returns."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
    descriptor = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(run: str, runs: Path) -> Record:
    """A run by directory, id, or name (the newest of that name)."""
    folder = Path(run) if (Path(run) / JOURNAL).is_file() else runs / run
    if not (folder / JOURNAL).is_file():
        named = [path for path in runs.glob(f"{run}-*") if (path / JOURNAL).is_file()] if "/" not in run else []
        if not named:
            known = sorted(path.parent.name for path in runs.glob(f"*/{JOURNAL}"))[-5:]
            hint = f"the newest here: {', '.join(known)}" if known else "--runs names another place"
            raise UserError(Problem(f"no run `{run}` in {runs}", hint))
        folder = max(named, key=lambda path: path.stat().st_mtime)
    fields: dict[str, Any] = {}
    for line in (folder / JOURNAL).read_text(encoding="utf-8").splitlines():
        try:
            fields.update(json.loads(line))
        except ValueError:
            continue  # a line cut off by a crash
    folder = folder.absolute()
    return Record(
        id=folder.name, folder=folder, backend=fields.get("backend", ""), job=str(fields.get("job", "")),
        name=fields.get("name", ""), steps=fields.get("steps", 0), extra=fields.get("extra", {}),
    )  # fmt: skip


def exit_code(record: Record) -> int | None:
    """What the job's own script wrote at its end; None while it has not."""
    try:
        return int((record.folder / "exit-code").read_text())
    except (OSError, ValueError):
        return None


def progress(record: Record) -> dict[str, Any] | None:
    """The newest line of the metrics: step, loss, tokens per second."""
    try:
        with (record.folder / "logs" / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    return None


def failures(record: Record) -> list[str]:
    """`rank 3 on node2 ended with exit code 7`, the first failure of every node, earliest first."""
    found = []
    for path in sorted((record.folder / "logs").glob("node-*.json")):
        try:
            first = json.loads(path.read_text()).get("first_failure")
        except (OSError, ValueError):
            continue
        if first:
            found.append(first)
    found.sort(key=lambda failure: failure.get("ended") or 0)
    return [
        f"rank {failure['rank']} on {failure['host']} "
        + (
            f"was killed by {failure['signal']}"
            if failure.get("signal")
            else f"ended with exit code {failure['code']}"
        )
        for failure in found
    ]


def read_logs(
    record: Record, *, rank: int | None, follow: bool, over: Callable[[], bool], main: str
) -> Iterator[str]:
    """Lines of the job's output, or of one rank's, control bytes taken out."""
    pattern = main if rank is None else f"logs/rank-{rank:05d}.log"
    positions: dict[Path, int] = {}
    last_look = 0.0
    finished = False
    while True:
        for path in sorted(record.folder.glob(pattern)):
            with path.open("rb") as file:
                file.seek(positions.get(path, 0))
                for raw in file:
                    if not raw.endswith(b"\n") and follow and not finished:
                        break  # the rest of the line is still to come
                    positions[path] = positions.get(path, 0) + len(raw)
                    yield printable(raw)
        if finished or not follow:
            break
        if time.monotonic() - last_look > 3:
            finished, last_look = over(), time.monotonic()
        if not finished:
            time.sleep(0.3)
    if not positions:
        ranks = sorted(int(path.stem[5:]) for path in (record.folder / "logs").glob("rank-*.log"))
        hint = f"there are logs of ranks {ranks[0]} to {ranks[-1]}" if ranks else "the job has not started here yet"
        raise UserError(
            Problem(f"no log of {'the job' if rank is None else f'rank {rank}'} in {record.folder}", hint)
        )


KEEP = {9: "\t"}
STRIP = {code: KEEP.get(code) for code in (*range(32), *range(127, 160))}


def printable(raw: bytes) -> str:
    """A log line for a terminal: no escape sequences, no control bytes, no half characters."""
    import re

    text = re.sub(
        r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])", "", raw.decode(errors="replace")
    )
    return text.rstrip("\r\n").split("\r")[-1].translate(STRIP)
