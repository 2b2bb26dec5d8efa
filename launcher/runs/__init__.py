"""The run directory is the database: `ls` and `cat` explain a run."""

from __future__ import annotations

import json
import os
import re
import shutil
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
    """demo-20261121-031502-4f2a: sorts by time, never twice, fits every scheduler."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


ID = re.compile(r"(?P<name>.+)-(?P<when>[0-9]{8}-[0-9]{6}-[0-9a-f]{4})")


def known(runs: Path, *, name: str | None = None) -> list[Path]:
    """Run directories, the newest first; of one job name when given."""
    found = []
    for journal in runs.glob(f"*/{JOURNAL}"):
        match = ID.fullmatch(journal.parent.name)
        if match and name in (None, match["name"]):
            found.append((match["when"], journal.parent))
    return [folder for _, folder in sorted(found, reverse=True)]


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
        named = known(runs, name=run)
        if not named:
            newest = ", ".join(path.name for path in known(runs)[:5])
            raise UserError(
                Problem(
                    f"no run `{run}` in {runs}", f"the newest here: {newest}" if newest else "--runs names another"
                )
            )
        folder = named[0]
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
    lines = _end(record.folder / "logs" / "metrics.jsonl", 8192).split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    return None


def verdict(record: Record) -> dict[str, Any] | None:
    """What the preflight of this run said; None while it has not."""
    try:
        found = json.loads((record.folder / "preflight" / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def events(record: Record, state: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """What the preflight tells on its way, as it does, and every two seconds the Status that `state` gives."""
    path = record.folder / "preflight" / "progress.jsonl"
    read, asked, over = 0, 0.0, False
    while True:
        last = over
        try:
            with path.open("rb") as file:
                file.seek(read)
                text = file.read()
        except OSError:
            text = b""
        whole, newline, _ = text.rpartition(b"\n")
        read += len(whole) + len(newline)
        for line in whole.split(b"\n") if whole else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue
        if last or ((record.folder / "preflight" / "code").exists() and verdict(record) is not None):
            return
        if time.monotonic() - asked > 2:
            asked = time.monotonic()
            status = state()
            over = status.state.over
            yield {"event": "state", "detail": status.detail}
        time.sleep(0.2)


def forget_secrets(record: Record) -> None:
    """The job's script does that itself, unless it never ran or was killed."""
    shutil.rmtree(record.folder / "secrets", ignore_errors=True)


def failures(record: Record) -> list[str]:
    """`rank 3 on node2 ended with exit code 7: ValueError: x`, of the newest attempt, earliest first."""
    found: list[dict[str, Any]] = []
    newest = 0
    for path in sorted((record.folder / "logs").glob("node-*.json")):
        try:
            node = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        newest = max(newest, node.get("attempt") or 0)
        if node.get("first_failure") and not node.get("signalled"):
            found.append(node["first_failure"])
    found = [failure for failure in found if (failure.get("attempt") or 0) == newest]
    found.sort(key=lambda failure: failure.get("ended") or 0)
    lines = [_failure(record, failure) for failure in found]
    if not lines:  # no rank ever ran
        try:
            lines = [printable((record.folder / "logs" / "failed-before-ranks").read_bytes()[:2000].split(b"\n")[0])]
        except OSError:
            lines = []
    return lines


def _failure(record: Record, failure: dict[str, Any]) -> str:
    how = f"was killed by {failure['signal']}" if failure.get("signal") else f"ended with exit code {failure['code']}"
    said = [line for line in tail(record.folder / "logs" / f"rank-{failure['rank']:05d}.log", 5) if line.strip()]
    return f"rank {failure['rank']} on {failure['host']} {how}" + (f": {said[-1].strip()[:200]}" if said else "")


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file of any size, for a terminal."""
    return [printable(raw) for raw in _end(path, 64 * 1024).split(b"\n") if raw][-lines:]


def _end(path: Path, size: int) -> bytes:
    """At most the last `size` bytes of a file; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read()
    except OSError:
        return b""


def read_logs(
    record: Record, *, rank: int | None, follow: bool, over: Callable[[], bool], main: str
) -> Iterator[str]:
    """Lines of the job's output, or of one rank's, control bytes taken out."""
    pattern = main if rank is None else f"logs/rank-{rank:05d}.log"
    positions: dict[str, int] = {}
    last_look = 0.0
    finished = False
    while True:
        yield from news(record, pattern, positions, last=finished or not follow)
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


def news(record: Record, pattern: str, positions: dict[str, int], *, last: bool = False) -> Iterator[str]:
    """Lines that came since; `positions` remembers how far each file was read. A half line waits for its rest."""
    for path in sorted(record.folder.glob(pattern)):
        start = positions.setdefault(path.name, 0)
        for raw, whole in _pieces(path, start):
            if not whole and not last:
                break
            positions[path.name] += len(raw)
            yield printable(raw)


LONGEST = 1 << 16


def _pieces(path: Path, start: int) -> Iterator[tuple[bytes, bool]]:
    """Lines from `start` on, and whether each is whole; a line of megabytes comes in pieces of 64 KiB."""
    with path.open("rb") as file:
        file.seek(start)
        while raw := file.readline(LONGEST):
            yield raw, raw.endswith(b"\n") or len(raw) == LONGEST


KEEP = {9: "\t"}
STRIP = {code: KEEP.get(code) for code in (*range(32), *range(127, 160))}


def printable(raw: bytes) -> str:
    """A log line for a terminal: no escape sequences, no control bytes, no half characters."""
    text = re.sub(
        r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])", "", raw.decode(errors="replace")
    )
    return text.rstrip("\r\n").split("\r")[-1].translate(STRIP)
