"""The kernel log since boot, with the age of every line."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from launcher.checks import Probe

STAMP = re.compile(r"^\[\s*(\d+\.\d+)\]\s?(?:\S+ kernel: )?(.*)$")  # dmesg, and journalctl -o short-monotonic
COMMANDS = (
    ("dmesg",),
    ("journalctl", "--dmesg", "--boot", "--no-pager", "--quiet", "--output=short-monotonic"),
)


class Line(NamedTuple):
    age: float | None  # seconds
    text: str


def log(probe: Probe, *words: str) -> dict[str, Any]:
    """{"lines": [[age, text], ...]} that hold one of the words, or {"unknown": why}."""
    why = []
    for command in COMMANDS:
        answer = probe.run(command)
        if answer.code == 0 and answer.out.strip():
            return {"lines": lines(answer.out, uptime=uptime(probe), words=words)}
        if answer.code != 0:
            said = (answer.err.strip() or answer.out.strip()).splitlines()
            why.append(said[0] if said else f"{command[0]}: exit code {answer.code}")
    restrict = probe.read("/proc/sys/kernel/dmesg_restrict")
    if restrict == "1" and why:
        return {"unknown": "the kernel log is for root alone here (kernel.dmesg_restrict = 1)"}
    return {"unknown": f"the kernel log could not be read ({'; '.join(why) or 'it is empty'})"}


def lines(text: str, *, uptime: float | None, words: tuple[str, ...]) -> list[Line]:
    """`[ 1843.308145] NVRM: ...` on a machine that is up for 2000 s is 156.7 s old."""
    found = []
    for line in text.splitlines():
        if words and not any(word in line for word in words):
            continue
        match = STAMP.match(line)
        age = None if match is None or uptime is None else max(0.0, round(uptime - float(match[1]), 1))
        found.append(Line(age, match[2] if match else line))
    return found


def uptime(probe: Probe) -> float | None:
    text = probe.read("/proc/uptime")
    try:
        return float((text or "").split()[0])
    except (IndexError, ValueError):
        return None


def ago(seconds: float | None) -> str:
    """ago(90) is "1 min ago", ago(200000) "2.3 days ago"."""
    if seconds is None:
        return "at a time not known"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.0f} h ago"
    return f"{seconds / 86400:.1f} days ago"
