"""What was found -> who trains, or why nobody does. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.preflight import COULD_NOT, DIFFERS, FABRIC, OK, OK_WITHOUT, STAGES, TOO_FEW, Finding, Setting


@dataclass(frozen=True)
class Decision:
    code: int
    headline: str
    train: tuple[str, ...]
    excluded: tuple[str, ...]
    shared: tuple[Finding, ...] = ()  # blocks that follow from many nodes having the same trouble


# Checks whose complaint about many nodes is about what the nodes share: above `few` (one in ten, at least one) or
# `half` of them it is said of the set, with this code. Broken parts are never that.
SHARED = {
    **dict.fromkeys(("nvlink-bandwidth", "gemm", "nccl-tests", "transport", "ports"), ("few", FABRIC)),
    **dict.fromkeys(("worker", "join", *STAGES), ("half", COULD_NOT)),
}


def _shared(nodes: Sequence[str], findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """One block for each check that excludes more nodes than can be bad by themselves.

    All four nodes reach 365 GB/s inside, where 400 is asked for: a setting does that, not four broken machines.
    """
    blocks = []
    for check, (most, code) in SHARED.items():
        bad = {one.node: one for one in findings if one.check == check and one.level == "exclude" and one.node}
        if len(bad) > (max(1, len(nodes) // 10) if most == "few" else len(nodes) / 2) and len(nodes) > 1:
            first = next(iter(bad.values()))
            what = f"{len(bad)} of {len(nodes)} nodes, so it is hardly the nodes: {first.what}"
            fix = f"look for what they share; {first.fix}" if first.fix else "look for what they share"
            blocks.append(replace(first, level="block", node="", what=what, code=code, fix=fix))
    return tuple(blocks)


def decide(
    setting: Setting, nodes: Sequence[str], findings: Sequence[Finding], switches: Mapping[str, str]
) -> Decision:
    """`nodes` in the scheduler's order, `switches` the ones that are known.

    Four of five are healthy and four train: 10. Two of four differ from the other two: 21, and nobody is
    excluded. One of four has another DeepSpeed and there is no spare: 21.
    """
    shared = _shared(nodes, findings)
    blocks = [*(one for one in findings if one.level == "block"), *shared]
    blamed = {one.check for one in shared}
    bad: dict[str, list[Finding]] = {}
    for one in findings:
        if one.level == "exclude" and one.node and one.check not in blamed:
            bad.setdefault(one.node, []).append(one)
    excluded = tuple(node for node in nodes if node in bad)
    healthy = [node for node in nodes if node not in bad]
    if blocks:
        # a bad machine is bad whatever else is wrong; one that is only different may be the right one
        broken = tuple(node for node in excluded if any(one.code != DIFFERS for one in bad[node]))
        first = max(blocks, key=lambda one: one.code)
        code = first.code or COULD_NOT
        more = f" (and {len(blocks) - 1} more)" if len(blocks) > 1 else ""
        return Decision(code, f"nothing starts: {_said(first)}{more}", (), broken, shared)
    if len(healthy) < setting.nodes:
        different = [node for node in excluded if all(one.code == DIFFERS for one in bad[node])]
        code = DIFFERS if len(healthy) + len(different) >= setting.nodes else TOO_FEW
        why = "; ".join(_said(bad[node][0]) for node in excluded[:3])
        why += f"; and {len(excluded) - 3} more" if len(excluded) > 3 else ""
        are = "is" if len(healthy) == 1 else "are"
        return Decision(
            code, f"nothing starts: {setting.nodes} nodes train, {len(healthy)} {are} healthy ({why})", (), excluded
        )
    train = choose(setting, healthy, findings, switches)
    if excluded:
        why = "; ".join(_said(bad[node][0]) for node in excluded[:3])
        return Decision(
            OK_WITHOUT, f"{_nodes(len(train))} ready without {', '.join(excluded)} ({why})", train, excluded
        )
    return Decision(OK, f"{_nodes(len(train))} ready", train, ())


def _said(finding: Finding) -> str:
    """With the node in front, where the sentence does not begin with it."""
    named = not finding.node or finding.what.startswith(f"{finding.node} ")
    return finding.what if named else f"{finding.node}: {finding.what}"


def _nodes(count: int) -> str:
    return "1 node is" if count == 1 else f"{count} nodes are"


def choose(
    setting: Setting, healthy: Sequence[str], findings: Sequence[Finding], switches: Mapping[str, str]
) -> tuple[str, ...]:
    """The nodes that train, next to each other: under as few switches as can be, and the doubtful ones left out.

    choose of a, b, c, d for 3 nodes, where d hangs on a switch of its own: a, b, c.
    """
    doubt = {node: setting.history.get(node, 0.0) for node in healthy}
    for one in findings:
        for node in filter(None, (one.node, one.peer)):
            if one.level == "warn" and node in doubt:
                doubt[node] += 1
    order = sorted(healthy, key=lambda node: switches.get(node, ""))  # stable: the scheduler's order under each
    place = {node: index for index, node in enumerate(healthy)}

    def cost(window: Sequence[str]) -> tuple[float, int, int, int]:
        places = [place[node] for node in window]
        spread = max(places) - min(places)
        return (
            sum(doubt[node] for node in window),
            len({switches.get(node, "") for node in window}),
            spread,
            min(places),
        )

    windows = [order[start : start + setting.nodes] for start in range(len(order) - setting.nodes + 1)]
    # the least doubtful ones too, where no window avoids them all
    calm = set(sorted(order, key=lambda node: (doubt[node], place[node]))[: setting.nodes])
    windows.append([node for node in order if node in calm])
    best = min(windows, key=cost)
    return tuple(sorted(best, key=lambda node: place[node]))
