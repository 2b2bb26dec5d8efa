"""How long `import torch` takes while every node does it: thousands of small files, from one server perhaps.

The coordinator times it on one node before it does on all, and adds that to every answer: `alone`, in seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import DIFFERS, Finding, Setting
from launcher.preflight.parity import together

STAGE = "inventory"

# Ours; the coordinator and the launcher wait minutes for this import, so that it is only told.
SLOW = 30.0  # seconds; from a warm cache it takes 1 to 5
ODD = 3.0  # times the median, or the time of one node alone
NOTICED = 5.0  # seconds more than that: less costs nobody anything

IMPORT = "import sys; sys.path[:] = [path for path in sys.path if path]; import torch"


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    """`seconds`; where that is slow `cached` too, of a second time: the difference is the file system's."""
    timeout = setting.stage_timeout * 0.45
    took: list[float] = []
    while not took or (len(took) == 1 and took[0] > NOTICED):
        begin = time.monotonic()
        answer = probe.run([sys.executable, "-c", IMPORT], timeout)
        took.append(round(time.monotonic() - begin, 2))
        if answer.code is None:
            return {"unknown": f"import torch: {answer.err}", "timeout": timeout}
        if answer.code:
            lines = answer.err.strip().splitlines()
            return {"error": lines[-1] if lines else f"exit code {answer.code}"}
    again = {"cached": took[1]} if len(took) > 1 else {}
    return {"seconds": took[0], **again}


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    return {"import torch": f"{value['seconds']:.1f} s"} if "seconds" in value else {}


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    failed = [
        Finding(
            "imports",
            "exclude",
            f"torch cannot be imported: {value['error']}",
            node=node,
            measured=value["error"],
            expected="import torch",
            fix="the image or the virtual environment of this node is not the job's",
            code=DIFFERS,
        )
        for node, value in sorted(answered.items())
        if "error" in value
    ]
    out = [*unknowns("imports", found), *together(failed, answered)]
    timed = {node: value for node, value in answered.items() if "seconds" in value}
    median = statistics.median(value["seconds"] for value in timed.values()) if timed else 0.0
    slow = []
    alone = next((value["alone"] for value in timed.values() if value.get("alone")), None)
    if len(timed) > 1 and alone and median > ODD * alone and median > alone + NOTICED:
        out.append(
            Finding(
                "imports",
                "warn",
                f"import torch takes {median:.1f} s on all {len(timed)} nodes at once, {alone:.1f} s on one alone",
                measured=f"{median:.1f} s",
                expected=f"about {alone:.1f} s",
                source="ours: the file system serves one node well, and not all of them",
                fix="python and torch on a local disk or in an image, not on a shared file system",
            )
        )
    for node, value in sorted(timed.items()):
        seconds = value["seconds"]
        again = f", the second time {value['cached']:.1f} s" if "cached" in value else ""
        odd = len(timed) > 2 and seconds > ODD * median and seconds > median + NOTICED
        if not odd and seconds <= SLOW:
            continue
        slow.append(
            Finding(
                "imports",
                "warn",
                "import torch is slow" + (" here alone" if odd and median <= SLOW else ""),
                node=node,
                measured=f"{seconds:.1f} s{again}",
                expected=f"<= {SLOW:g} s" if not odd else f"about {median:.1f} s, as on the other nodes",
                source="ours: every rank of every start waits for it",
                fix="python and torch on a local disk or in an image, not on a shared file system",
            )
        )
    return out + together(slow, timed)
