"""What the workers measured, judged: matrix products and bandwidth inside a node, and the whole set. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.preflight import FABRIC, TOO_FEW, Finding, Level, Limit, Rung, Setting

GEMM_WARN, GEMM_EXCLUDE = 0.93, 0.88  # of the node's median GPU: 7 % slower is worth a look, 12 % is out
GEMM_SOURCE = "7 % / 12 % below the median of the GPUs"
SLOT = 0.7  # of the usual copy rate between host and GPU; half the lanes give half of it
CORRUPT = "silent corruption: test the memory of its GPUs, and its NICs, before anything trains there"
BUSY = 0.6  # share of the time in which gloo waited for a CPU: what it measured there is no network's
SHARE = 0.5  # of the slowest pair that the whole set reaches at least, else links are shared further up
GB = 1e9


@dataclass(frozen=True)
class Corruption:
    """Values that changed between these nodes. `guilty` where the transfer itself told who."""

    nodes: tuple[str, ...]
    guilty: tuple[str, ...]
    why: str


def corruption(result: Mapping[str, Any], nodes: Sequence[str], ranks: int) -> Corruption | None:
    """Of one measurement over these nodes, with so many ranks on each; None where all values arrived."""
    if result.get("correct") is not False:
        return None
    guilty = tuple(dict.fromkeys(nodes[rank // ranks] for rank in result.get("wrong", ())))
    return Corruption(tuple(nodes), guilty, str(result.get("why") or "values arrive wrong"))


def judge_corruption(found: Sequence[Corruption], check: str) -> list[Finding]:
    """A node is guilty when a transfer names it, or when it is an end of two that fail without naming anybody."""
    guilty = {node: one.why for one in found for node in one.guilty}
    pairs = {frozenset(one.nodes): one for one in reversed(found)}  # both directions are one witness
    unclear = [one for one in pairs.values() if not one.guilty and not set(one.nodes) & set(guilty)]
    ends = Counter(node for one in unclear for node in one.nodes)
    for one in unclear:
        guilty |= {node: one.why for node in one.nodes if len(one.nodes) == 2 and ends[node] > 1}
    findings = [Finding(check, "exclude", why, node=node, fix=CORRUPT) for node, why in guilty.items()]
    for one in unclear:
        if not set(one.nodes) & set(guilty):
            what = f"{one.why} between {' and '.join(one.nodes)}"
            findings.append(Finding(check, "block", what, code=TOO_FEW, fix=CORRUPT))
    return findings


def judge_unsteady(
    found: Mapping[tuple[str, str], Sequence[float]], best: Mapping[tuple[str, str], float], named: Container[str]
) -> list[Finding]:
    """Directed links whose slowest iterations were far below the others more than once, of nodes not `named` yet."""
    return [
        Finding(
            "pairs", "warn", f"link {left} -> {right} comes and goes", node=left, peer=right,
            measured=f"{min(slow):.3g} GB/s at times, seen {len(slow)} times",
            expected=f"{best[left, right]:.3g} GB/s, as in most iterations",
            fix=f"look at errors and link changes of the ports between {left} and {right}: ethtool -S, mlxlink",
        )
        for (left, right), slow in found.items()
        if len(slow) > 1 and left not in named and right not in named
    ]  # fmt: skip


def judge_node(
    compute: Mapping[str, Sequence[Mapping[str, Any]]],
    inside: Mapping[str, Mapping[str, Any]],
    setting: Setting,
    *,
    shared: bool,
) -> list[Finding]:
    """`compute`: node -> an answer of each GPU; `inside`: node -> all_reduce over the node's own GPUs."""
    findings: list[Finding] = []
    rates = {
        (node, rank): float(answer["tflops"])
        for node, answers in compute.items()
        for rank, answer in enumerate(answers)
        if "tflops" in answer
    }
    for node, answers in compute.items():
        for rank, answer in enumerate(answers):
            device = f"GPU {rank}" if setting.gpus else "its CPU"
            if "error" in answer and not answer.get("gone"):
                findings.append(
                    Finding(
                        "gemm", "exclude", f"{device} does not finish a matrix product: {answer['error']}", node=node
                    )
                )
            elif answer.get("repeatable") is False:
                fix = "silent corruption: replace it before anything trains there"
                findings.append(
                    Finding("gemm", "exclude", f"{device} gives two results for one product", node=node, fix=fix)
                )
    for (node, rank), rate in rates.items():
        device = f"GPU {rank}" if setting.gpus else "its CPU"
        peers = [value for (other, _), value in rates.items() if other == node] if setting.gpus > 1 else []
        middle = statistics.median(peers or rates.values())
        if setting.gpus and rate < GEMM_WARN * middle:
            level: Level = "exclude" if rate < GEMM_EXCLUDE * middle else "warn"
            findings.append(
                Finding(
                    "gemm", level, f"{device} computes slower than the others", node=node,
                    measured=f"{rate:.3g} TFLOP/s", expected=f">= {GEMM_WARN * middle:.3g} TFLOP/s",
                    source=GEMM_SOURCE,
                    fix="nvidia-smi -q -d PERFORMANCE,POWER: throttled, or its power limit lowered?",
                )
            )  # fmt: skip
        elif not setting.gpus and len(rates) > 2 and not shared and rate < 0.5 * middle:
            findings.append(
                Finding(
                    "gemm", "warn", f"{device} computes at less than half of the others' rate", node=node,
                    measured=f"{rate:.3g} TFLOP/s", expected=f"about {middle:.3g} TFLOP/s",
                    source="median of this run", fix="what else runs there?",
                )
            )  # fmt: skip
    if setting.matmul_tflops and rates and max(rates.values()) < GEMM_EXCLUDE * setting.matmul_tflops:
        findings.append(
            Finding(
                "gemm", "warn", "every GPU computes slower than its type does elsewhere",
                measured=f"{max(rates.values()):.3g} TFLOP/s at best",
                expected=f"{setting.matmul_tflops:.3g} TFLOP/s",
                source=f"the table's share of peak for {setting.gpu}",
                fix="power limit or clocks lowered on all nodes?",
            )
        )  # fmt: skip
    for node, answers in compute.items():
        findings += _copies(node, answers, setting)
    for node, answer in inside.items():
        findings += _inside(node, answer, setting)
    return findings


def _inside(node: str, answer: Mapping[str, Any], setting: Setting) -> list[Finding]:
    if "error" in answer:
        what = f"its own GPUs do not finish an all-reduce: {answer['error']}"
        return [
            Finding("nvlink-bandwidth", "exclude", what, node=node, fix="nvidia-smi nvlink --status; fabric manager")
        ]
    result = answer["results"][0]
    if "unsupported" in result:
        what = f"its own GPUs were not measured together: {result['unsupported']}"
        return [Finding("nvlink-bandwidth", "unknown", what, node=node)]
    spoiled = corruption(result, [node], max(1, setting.gpus))
    findings = judge_corruption([replace(spoiled, guilty=(node,))] if spoiled else [], "nvlink-bandwidth")
    found = _against(setting.node, "nvlink-bandwidth", node, float(result["busbw"]), "all_reduce")
    return [*findings, found] if found.level != "note" else findings


def _copies(node: str, answers: Sequence[Mapping[str, Any]], setting: Setting) -> list[Finding]:
    """Between each GPU and the host, against its type: a card in a slot of half the width copies at half rate."""
    findings = []
    for way in ("host_to_device", "device_to_host"):
        for rank, answer in enumerate(answers):
            rate = float(answer.get(way, 0.0))
            if rate and rate < SLOT * setting.host_copy:
                findings.append(
                    Finding(
                        "gemm", "warn", f"GPU {rank} copies slowly ({way.replace('_', ' ')})", node=node,
                        measured=f"{rate:.3g} GB/s", expected=f">= {SLOT * setting.host_copy:.3g} GB/s",
                        source=f"{SLOT:g} of what a {setting.gpu} reaches",
                        fix="lspci -vv: link width and speed; NUMA",
                    )
                )  # fmt: skip
    return findings


def slow_rail(result: Mapping[str, Any]) -> str:
    """The rail that carries less than the others of the same two nodes; empty where all carry the same."""
    rail = result.get("slow_rail") or {}
    if not rail or rail["rate"] >= 0.85 * rail["others"]:
        return ""
    return f"rail {rail['rail']} carries {rail['rate']:.3g} GB/s, the others {rail['others']:.3g}"


def sizes(setting: Setting, slowest: float) -> list[int]:
    """Bytes of the whole set's messages, each eight times the one before; the largest takes about half a second.

    8 GiB on a fabric whose table says so and whose pairs reach 36 GB/s, 16 MiB where the slowest has 0.125 GB/s.
    """
    top = (setting.whole.bytes if setting.whole else 8 << 30) if setting.backend == "nccl" else 256 << 20
    while top > 1 << 20 and top / GB > 0.25 * max(slowest, 1e-6):
        top >>= 1
    return [size for size in (top >> shift for shift in (12, 9, 6, 3, 0)) if size >= 1024]


def planned(results: Sequence[Mapping[str, Any]], backend: str) -> float:
    """GB/s of bus bandwidth that the plan may count on, at the largest size.

    On NCCL the slowest of the collectives that training uses: two nodes all_reduce by trees, 487 GB/s of busbw over
    400 of wire. gloo's other collectives are limited by its copies, and training on CPU takes all_reduce.
    """
    used = ("all_reduce", "all_gather", "reduce_scatter") if backend == "nccl" else ("all_reduce",)
    found = [rates[-1] for op in used if (rates := [one["busbw"] for one in results if one["op"] == op])]
    return float(f"{min(found):.3g}") if found else 0.0


def rung(bandwidth: float, setting: Setting) -> Rung | None:
    """The one nearest to what was measured, by ratio: 90 GB/s is nearer to 80 than to 160."""
    if not bandwidth or not setting.ladder:
        return None
    return min(setting.ladder, key=lambda one: abs(math.log(one.bandwidth / bandwidth)))


def told(bandwidth: float, setting: Setting) -> Finding | None:
    """What the measured bandwidth means for the plan, where it differs by a fifth or more from what it counts on."""
    near = rung(bandwidth, setting)
    if near is None or not setting.assumed or 0.8 <= bandwidth / setting.assumed <= 1.25:
        return None
    takes = f": a step takes about {near.seconds:.3g} s" if near.seconds else ""
    base = next((one.seconds for one in setting.ladder if one.bandwidth == setting.assumed), 0.0)
    takes += f" instead of {base:.3g}" if takes and base and abs(base - near.seconds) > 0.02 * base else ""
    other = f"; {near.config} suits that better and is used" if near.config != "ds_config.json" else ""
    return Finding(
        "plan", "note", f"the plan counts on other bandwidth between nodes{takes}{other}",
        measured=f"{bandwidth:.3g} GB/s", expected=f"{setting.assumed:.3g} GB/s",
        fix=f"resources.bandwidth: {bandwidth:.3g} plans with what was measured",
    )  # fmt: skip


def tail(result: Mapping[str, Any]) -> float:
    """GB/s in the slowest iteration of a hundred."""
    return float(result["busbw"] * result["median"] / result["p99"]) if result.get("p99") else 0.0


def judge_whole(
    results: Sequence[Mapping[str, Any]], nodes: Sequence[str], setting: Setting, *, slowest_pair: float
) -> list[Finding]:
    spoiled = [corruption(one, nodes, max(1, setting.gpus)) for one in results]
    findings = judge_corruption([one for one in spoiled if one], "whole")
    limit = setting.whole
    op = limit.op if limit else "all_reduce"
    rates = [one for one in results if one["op"] == op]
    if not rates:
        return findings
    last = rates[-1]
    measured, size = float(last["busbw"]), f"{op} of {last['bytes'] >> 20} MiB"
    if limit and measured < limit.passes:
        bad = measured < limit.excludes
        findings.append(
            Finding(
                "whole", "block" if bad else "warn", "all nodes together are slower than this fabric is",
                measured=f"{measured:.4g} GB/s", expected=f">= {limit.passes:.4g} GB/s, {size}", source=limit.source,
                code=FABRIC if bad else 0,
                fix="every pair passed: shared links above them, a rail missing, or NCCL on TCP",
            )
        )  # fmt: skip
    elif not limit and slowest_pair and measured < SHARE * slowest_pair and last.get("busy", 0.0) < BUSY:
        findings.append(
            Finding(
                "whole", "warn", "all nodes together are much slower than any two of them",
                measured=f"{measured:.3g} GB/s", expected=f">= {SHARE * slowest_pair:.3g} GB/s, {size}",
                source=f"half of the slowest pair's {slowest_pair:.3g} GB/s",
                fix="links that the nodes share are oversubscribed; nodes closer together would train faster",
            )
        )  # fmt: skip
    return findings


def judge_nccl_tests(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    """node -> what all_reduce_perf said over the node's own GPUs."""
    findings = []
    for node, answer in found.items():
        if "error" in answer:
            findings.append(
                Finding("nccl-tests", "unknown", f"nccl-tests gave no answer: {answer['error']}", node=node)
            )
            continue
        if answer["wrong"]:
            what = f"all_reduce_perf counts {answer['wrong']} wrong values"
            findings.append(Finding("nccl-tests", "exclude", what, node=node, fix=CORRUPT))
        findings.append(_against(setting.node, "nccl-tests", node, answer["busbw"], "all_reduce_perf"))
    return findings


def _against(limit: Limit | None, check: str, node: str, busbw: float, what: str) -> Finding:
    """A note where there is no limit, or it is kept."""
    measured = f"{busbw:.4g} GB/s"
    if limit is None or busbw >= limit.passes:
        return Finding(check, "note", f"{what} over its own GPUs", node=node, measured=measured)
    level: Level = "exclude" if busbw < limit.excludes else "warn"
    return Finding(
        check, level, "its GPUs reach each other slowly", node=node, measured=measured,
        expected=f">= {limit.passes:.4g} GB/s, all_reduce of {limit.bytes >> 20} MiB", source=limit.source,
        fix="nvidia-smi nvlink --status; is NVLS off (NCCL_NVLS_ENABLE=0)?",
    )  # fmt: skip
