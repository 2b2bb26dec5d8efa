"""What is particular to pods: what they are called, how one says why it ended, and what their log carries."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from launcher.preflight import Finding, Setting, Verdict

TERMINATION_LOG = "/dev/termination-log"  # what `kubectl describe pod` shows
LONGEST = 4096  # bytes of it that the kubelet keeps
# When one pod has failed the operator deletes those that still run, logs and exit codes included. The first node's
# has the verdict, and is over sooner: within 5 s for agents to close, and a second for the kubelet to notice.
LINGER = 15.0
TO_LOG = "DSLAUNCH_VERDICT_TO_LOG"  # set where a log is all that comes out of the coordinator's pod
PROGRESS, VERDICT = "dslaunch-progress: ", "dslaunch-verdict: "  # then JSON, on one line


def inside() -> bool:
    return os.path.exists(TERMINATION_LOG)


def waiting(job: str, index: int) -> str:
    """waiting("demo", 2) is "pod demo-worker-1", until that pod says on which node it runs."""
    if called := os.environ.get("DSLAUNCH_PODS"):  # demo-node-0-, of a Job
        return f"pod {called}{index}"
    return f"pod {job}-worker-{index - 1}" if index else f"pod {job}-master-0"


def named(node: str, index: int, taken: Iterable[str]) -> str:
    """named("node-7", 3, ["node-7"]) is "node-7/3": the pods of one node are told apart by their rank."""
    return f"{node}/{index}" if node in taken else node


def node(name: str) -> str:
    """node("node-7/3") is "node-7"; a pod that never said where it runs has none."""
    return "" if " " in name else name.partition("/")[0]


def again(excluded: Iterable[str], setting: Setting) -> str:
    """What keeps the next attempt off these nodes, and off those that the job file names already."""
    bad = list(dict.fromkeys(filter(None, map(node, excluded))))
    if not bad:
        return ""
    every = ",".join(dict.fromkeys([*setting.left_out, *bad]))
    return f"to go on without {', '.join(bad)}: --set kubernetes.exclude='[{every}]'"


def last_words(verdict: Verdict, setting: Setting, mine: Iterable[str]) -> list[str]:
    """Why nothing starts, the most useful first: 4096 bytes is all there is. `mine` is what this pod is called."""
    own = set(mine)
    found = [one for one in verdict.findings if one.level in ("warn", "exclude", "block")]
    found.sort(key=lambda one: not own & {one.node, one.peer})
    headline = f"preflight: {verdict.headline} (exit code {verdict.code})"
    return [headline, *filter(None, [again(verdict.excluded, setting)]), *map(sentence, found)]


def sentence(finding: Finding) -> str:
    where = f"{finding.node} -> {finding.peer}" if finding.peer else finding.node or "all nodes"
    values = [f"{word} {value}" for word in ("measured", "expected") if (value := getattr(finding, word))]
    said = f" ({', '.join(values)})" if values else ""
    return f"{finding.level} {where}: {finding.what}{said}{f'; {finding.fix}' if finding.fix else ''}"


def tell(lines: Iterable[str]) -> None:
    if inside():
        with contextlib.suppress(OSError), open(TERMINATION_LOG, "wb") as file:
            file.write("\n".join(lines).encode("utf-8", "replace")[:LONGEST])
