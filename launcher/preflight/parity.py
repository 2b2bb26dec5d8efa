"""The same on every node, or not: who is odd, in a sentence each. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace

from launcher.checks import vote
from launcher.preflight import DIFFERS, Finding, Level

SHOWN = 4  # nodes, values or packages that one sentence names


def listing(words: Collection[str]) -> str:
    """node1, node2 and node4; of 1024 nodes "node1, node2, node3 and 1021 more"."""
    shown = sorted(words)
    if len(shown) > SHOWN:
        shown = [*shown[: SHOWN - 1], f"{len(shown) - SHOWN + 1} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""


def differing(
    check: str, what: str, values: Mapping[str, Hashable], *, level: Level = "exclude", why: str = "", fix: str = ""
) -> list[Finding]:
    """One finding for each odd node. Where no value has a majority, one for the whole set, and nobody is wrong."""
    ballot = vote(values)
    strict = level in ("exclude", "block")
    code = DIFFERS if strict else 0
    if ballot.tied:
        groups: dict[str, list[str]] = {}
        for node, value in sorted(values.items()):
            groups.setdefault(_word(value), []).append(node)
        said = [f"{value} on {listing(nodes)}" for value, nodes in sorted(groups.items())]
        more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        return [
            Finding(
                check,
                "block" if strict else level,
                f"{what} differs and no value has a majority: {'; '.join(said[:SHOWN])}{more}",
                expected="the same on every node",
                source=why,
                fix=fix,
                code=code,
            )
        ]
    right = [node for node in values if node not in ballot.odd]
    common = _word(ballot.common)
    return [
        Finding(
            check,
            level,
            f"{what} is {_word(values[node])}, not {common}",
            node=node,
            measured=_word(values[node]),
            expected=f"{common}, as on {listing(right)}",
            source=why,
            fix=fix,
            code=code,
        )
        for node in ballot.odd
    ]


def together(findings: Sequence[Finding], nodes: Collection[str], *, code: int = DIFFERS) -> list[Finding]:
    """What is wrong with every one of several nodes is wrong with the set: said once, and an exclusion is a block.

    `measured` may differ from node to node, the sentence may not.
    """
    if len(nodes) < 2:
        return list(findings)
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.level, one.what, one.expected), []).append(one)
    out = []
    for group in groups.values():
        if {one.node for one in group} == set(nodes):
            first = group[0]
            blocks = first.level == "exclude"
            everywhere = replace(first, node="", what=f"on every node: {first.what}")
            out.append(replace(everywhere, level="block", code=code) if blocks else everywhere)
        else:
            out += group
    return out


def _word(value: Hashable) -> str:
    return str(value) if value not in (None, "") else "none"
