"""What earlier preflights said about a node: a file in the user's state directory, a line for each exclusion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

from launcher.preflight import Finding

HALF = 10.0  # days in which an exclusion loses half its weight
KEPT = 30.0  # days after which it says nothing: Meta's lemon nodes are found over about a month (arXiv 2410.21680)


def default(environ: Mapping[str, str]) -> str:
    """$XDG_STATE_HOME/dslaunch/nodes.jsonl, else ~/.local/state/dslaunch/nodes.jsonl; empty without a home."""
    base = environ.get("XDG_STATE_HOME") or (f"{environ['HOME']}/.local/state" if environ.get("HOME") else "")
    return f"{base}/dslaunch/nodes.jsonl" if base else ""


def scores(lines: Iterable[str], now: float) -> dict[str, float]:
    """node -> 1.0 for an exclusion today, 0.5 for one ten days ago, all of them added up. Pure."""
    found: dict[str, float] = {}
    for line in lines:
        try:
            row = json.loads(line)
            node, days = str(row["node"]), (now - float(row["time"])) / 86400
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a machine that went down
        if 0 <= days <= KEPT:
            found[node] = found.get(node, 0.0) + 0.5 ** (days / HALF)
    return found


def load(path: str, now: float) -> dict[str, float]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return scores(file, now)
    except OSError:
        return {}


def append(path: str, findings: Iterable[Finding], now: float) -> None:
    """A line for each excluded node. Best effort: a full home is no reason to stop a job."""
    first = {one.node: one for one in reversed(list(findings)) if one.level == "exclude" and one.node}
    rows = [
        {"time": round(now, 3), "node": node, "check": one.check, "what": one.what}
        for node, one in sorted(first.items())
    ]
    if not rows or not path:
        return
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError:
        return
