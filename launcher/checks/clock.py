"""How far each node's clock is from the others', and whether anything sets it.

The coordinator adds to every answer when it asked and when it had the answer, by its own clock: `asked`, `answered`.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Setting
from launcher.preflight.parity import listing, together

STAGE = "inventory"

# Seconds, ours: NTP holds hosts within some milliseconds, so that half a second is no drift but a clock left alone.
WARN = 0.5  # beyond what the round trip leaves open
BAD = 2.0  # rendezvous and leases that compare stamps of two hosts go wrong
VAGUE = 2.0  # a round trip that leaves more open than this says nothing
TIME_ERROR = 5  # adjtimex(2): the kernel's clock is not synchronised


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    return {"synchronised": synchronised(), "time": time.time()}


def synchronised() -> bool | None:
    """What chrony, ntpd or systemd-timesyncd told the kernel; None where the kernel does not answer."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    timex = ctypes.create_string_buffer(512)  # all zero: nothing is set, it only answers
    state = adjtimex(timex) if adjtimex else -1
    return None if state < 0 else state != TIME_ERROR


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    return {"clock set by": {True: "a time service", False: "nobody", None: "unknown"}[value["synchronised"]]}


def offset(value: Mapping[str, Any]) -> tuple[float, float]:
    """(-0.1, 0.3): between these lies what the node's clock is ahead of the coordinator's, in seconds."""
    return value["time"] - value["answered"], value["time"] - value["asked"]


def skews(answered: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of each node against the middle one, so that a coordinator whose own clock is wrong blames nobody else."""
    spans = {node: offset(value) for node, value in answered.items() if "asked" in value and "answered" in value}
    if len(spans) < 3:
        return spans
    low = statistics.median(span[0] for span in spans.values())
    high = statistics.median(span[1] for span in spans.values())
    return {node: (span[0] - high, span[1] - low) for node, span in spans.items()}


def least(span: tuple[float, float]) -> float:
    """The smallest skew in a span: 0.2 of (0.2, 0.7), 0 of (-0.1, 0.3)."""
    return max(0.0, span[0], -span[1])


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    out = unknowns("clock", found)
    spans = skews(answered)
    for node, span in sorted(spans.items()):
        off, half = sum(span) / 2, (span[1] - span[0]) / 2
        if least(span) <= WARN:
            continue
        what = f"the clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"
        bad = least(span) > BAD
        what += ": stamps of this node are of no use beside others'" if bad else ""
        others = "the other nodes" if len(spans) > 2 else "the coordinator"
        out.append(
            Finding(
                "clock",
                "warn",
                what,
                node=node,
                measured=f"{off:+.2f} s +- {half:.2f} s",
                expected=f"within {BAD if bad else WARN:g} s of {others}",
                source="torch compares stamps of two hosts (pytorch PR 56538)"
                if bad
                else "ours: clocks that a time service sets are within milliseconds",
                fix="chronyc makestep on the node; enable chronyd or systemd-timesyncd",
            )
        )
    vague = [node for node in spans if (answered[node]["answered"] - answered[node]["asked"]) / 2 > VAGUE]
    if vague:
        out.append(
            Finding(
                "clock",
                "note",
                f"the clocks of {listing(vague)} were read to more than +-{VAGUE:g} s only: busy nodes",
            )
        )
    unset = [
        Finding("clock", "note", "nothing sets the clock", node=node, fix="enable chronyd or systemd-timesyncd")
        for node, value in sorted(answered.items())
        if value["synchronised"] is False
    ]
    return out + together(unset, answered)
