"""What a run left behind that tells why it ended: logs of its newest attempt, the nodes' and ranks' own words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from launcher.diagnose import Evidence, Exit, Hang
from launcher.node import journal

T = TypeVar("T")
LOGS = (
    "*.log",
    "*.out",
    "*.err",
    "*.txt",
    "*.dmesg",
    "*.gz",
    "dmesg*",
    "messages*",
    "syslog*",
    "failed-before-ranks",
)
KINDS = ("laggard", "all wait", "desync", "dead")


@dataclass(frozen=True)
class Gathered:
    """`starts` says where in a log the newest attempt begins."""

    files: tuple[str, ...]
    starts: dict[str, int]
    evidence: Evidence
    attempt: int = 0


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def config(folder: Path) -> dict[str, Any]:
    """The DeepSpeed config that the run started with; empty where it has none."""
    return _json(folder / "ds_config.json")


def gather(folder: Path, *, state: str = "", code: int | None = None) -> Gathered:
    """Of a run directory; `state` and `code` are the scheduler's newest words, where somebody asked."""
    logs = folder / "logs"
    entries = journal.read(str(folder))[0]
    words = [word for word in map(_json, sorted(logs.glob("node-[0-9]*.json"))) if "node_rank" in word]
    attempts = [entry for entry in entries if entry.get("event") == "attempt"]
    newest = max([word.get("attempt", 0) for word in words] + [entry.get("attempt", 0) for entry in attempts] + [0])
    words = [word for word in words if word.get("attempt", 0) == newest]
    ended = [entry for entry in entries if entry.get("event") == "ended" and entry.get("attempt") == newest]
    hosts = _hosts(words, [entry for entry in attempts if entry.get("attempt", 0) == newest])
    ranks = [row for row in map(_json, sorted(logs.glob("rank-*.json"))) if row.get("attempt", 0) == newest]
    exits = tuple(_exit(row) for row in ranks if isinstance(row.get("rank"), int))
    if code is None:
        code = next((entry.get("code") for entry in reversed(ended)), None)
    hang = next((_hang(word["hang"]) for word in words if isinstance(word.get("hang"), dict)), None)
    evidence = Evidence(
        state=state,
        code=code,
        exits=exits,
        oom_kills={
            str(word.get("host", "")): word["oom_kills"] for word in words if type(word.get("oom_kills")) is int
        },
        hang=hang,
        hosts=hosts,
    )
    files = tuple(_files(logs, newest))
    starts = {name: _begins(Path(name), newest) for name in files if newest and Path(name).parent == logs}
    return Gathered(files, starts, evidence, newest)


def of_cluster(own: Evidence, told: Evidence, troubles: list[T]) -> tuple[Evidence, list[T]]:
    """A run's own evidence and what its cluster says, and those of the cluster's troubles that name a cause."""
    kills = {**told.oom_kills, **own.oom_kills}
    code = told.code if own.code is None else own.code
    merged = replace(own, state=own.state or told.state, code=code, oom_kills=kills, down=told.down)
    return replace(merged, hosts=own.hosts or told.hosts), [one for one in troubles if getattr(one, "cause", "")]


def _files(logs: Path, attempt: int) -> Iterator[str]:
    """Logs of the run and of its newest bundle of a hang; launchers' logs do not say where an attempt begins."""
    ranks = any(logs.glob("rank-*.log"))
    bundles = sorted(logs.glob("hang-*"), key=lambda path: int(path.name[5:]) if path.name[5:].isdigit() else -1)
    for folder in [logs, *bundles[-1:]]:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in sorted(inside, key=lambda path: path.suffix == ".out"):  # a copy of what ranks wrote, and more
            old = attempt and ranks and path.name.endswith(".launcher.log")
            if path.is_file() and not old and any(path.match(pattern) for pattern in LOGS):
                yield str(path)


def _begins(path: Path, attempt: int) -> int:
    """Where a rank's first line of this attempt stands, in the last 64 MiB; 0 where it says nothing of it."""
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        base = stream.seek(max(0, size - (64 << 20)))
        found = stream.read().find(b"dslaunch: attempt %d " % attempt)
    return base + found if found >= 0 else 0


def _hosts(words: list[dict[str, Any]], attempts: list[dict[str, Any]]) -> tuple[str, ...]:
    if attempts and isinstance(attempts[-1].get("hosts"), list):
        return tuple(map(str, attempts[-1]["hosts"]))
    return tuple(str(word.get("host", "")) for word in sorted(words, key=lambda word: word["node_rank"]))


def _exit(row: dict[str, Any]) -> Exit:
    return Exit(
        row["rank"], str(row.get("host", "")), row.get("code"), str(row.get("signal") or ""), row.get("ended")
    )


def _hang(value: dict[str, Any]) -> Hang:
    kind = value.get("kind")
    return Hang(
        step=int(value.get("step") or 0),
        seconds=float(value.get("seconds") or 0),
        limit=float(value.get("limit") or 0),
        ranks=tuple(value.get("ranks") or ()),
        hosts=tuple(value.get("hosts") or ()),
        collective=str(value.get("collective") or ""),
        kind=kind if kind in KINDS else "unknown",
        why=str(value.get("why") or ""),
    )


def logs_of(paths: list[str]) -> Iterator[str]:
    """Files as they are named, and the logs in named directories (all files where none is called a log)."""
    for name in paths:
        path = Path(name)
        if not path.is_dir():
            yield name
            continue
        inside = [one for one in sorted(path.rglob("*")) if one.is_file()]
        logs = [one for one in inside if any(one.match(pattern) for pattern in LOGS)]
        yield from map(str, logs or inside)
