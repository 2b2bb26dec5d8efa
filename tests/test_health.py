"""What a person sees of a preflight: its text, its tickets, and its page in a real browser."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import browser
import pytest
from test_report import NASTY, Outline, brightness, contrast, overlap
from test_report import TEXTS as REPORT_TEXTS

from launcher import charts, health, verdicts
from launcher.preflight import Curve, Finding, Limit, Matrix, Setting, Verdict

RING = Limit("all_reduce", 1 << 30, 38.0, 30.0, "0.72 and 0.60 of 50 GB/s of NICs per node")
SETTING = Setting(
    "llama-8b", nodes=4, per_node=8, gpus=8, gpu="h100-80gb", fabric="infiniband", backend="nccl", whole=RING
)
STAGES = {"join": 1.2, "inventory": 4.2, "host": 2.9, "node": 18.3, "pairs": 12.4, "whole": 9.1}
P90 = "90th percentile of this run"


def names(count, *, width=3):
    return tuple(f"gpu-{i:0{width}}" for i in range(1, count + 1))


def matrix(nodes, *, good=46.2, slow=None, dead=(), measured=None, source=P90):
    """Noise of 1 % from a fixed seed; `slow` is {(sender, receiver): share}, with "" for every node."""
    rng, slow = random.Random(7), slow or {}

    def rate(i, j):
        noise = 1 + 0.01 * rng.uniform(-1, 1)
        if i == j or (measured is not None and (i, j) not in measured):
            return None
        if {nodes[i], nodes[j]} & set(dead):
            return 0.0
        keys = (nodes[i], ""), ("", nodes[j]), (nodes[i], nodes[j])
        return round(good * noise * min(slow.get(key, 1.0) for key in keys), 6)

    size = range(len(nodes))
    cells = tuple(tuple(rate(i, j) for j in size) for i in size)
    return Matrix(nodes, cells, good, source, 0.93 * good, 0.85 * good)


def curves(top):
    """Rising with the size, as a fabric with a latency of its own does; the other operations at the largest alone."""
    sizes = tuple((1 << 30) >> shift for shift in (12, 9, 6, 3, 0))
    rates = tuple(round(top * (1 + 6e6 / sizes[-1]) * size / (size + 6e6), 6) for size in sizes)
    found = [Curve("all_reduce", sizes, rates, tuple(round(0.96 * rate, 6) for rate in rates))]
    return (*found, *(Curve(op, sizes[-1:], (1.02 * top,), (0.9 * top,)) for op in ("all_gather", "sendrecv")))


def inventory(nodes, **odd):
    """{"deepspeed": {"gpu-003": "0.19.6"}} differs there; the free space is every node's own."""
    same = {"python": "3.12.3", "torch": "2.7.1", "cuda": "12.8", "nccl": "2.26.2", "deepspeed": "0.19.8"}
    same |= {"driver": "570.86.15", "kernel": "5.15.0-122-generic"}
    return {
        node: {
            **same,
            **{fact: value[node] for fact, value in odd.items() if node in value},
            "free disk": f"{812.4 + i:.1f} GiB",
        }
        for i, node in enumerate(nodes)
    }


def verdict(nodes, *, code=0, headline="", excluded=(), train=None, findings=(), **more):
    train = tuple(node for node in nodes if node not in excluded) if train is None else train
    headline = headline or f"{len(train)} nodes are ready"
    more = {"stages": STAGES, "rounds": len(nodes) - 1, "inventory": inventory(nodes), **more}
    return Verdict(code, headline, train, tuple(excluded), tuple(findings), nodes, **more)


def slow_node(node, *, measured="21.3 GB/s", what="sends slowly to every partner"):
    return Finding(
        "pairs", "exclude", what, node=node, measured=measured, expected=">= 39.3 GB/s",
        source="85 % of the 90th percentile of this run", fix="reseat its cables, look at ibstat",
    )  # fmt: skip


def healthy(nodes=None):
    nodes = nodes or names(4)
    return verdict(nodes, matrix=matrix(nodes), curves=curves(42.1), bandwidth=42.1)


def one_bad():
    nodes = names(8)
    bad = "gpu-005"
    ecc = Finding(
        "gpus", "exclude", "GPU 3: 2 uncorrected ECC errors since boot", node="gpu-007", measured="2", expected="0",
        source="NVIDIA's GPU memory error management", fix="reset the GPU; replace it if they come again",
    )  # fmt: skip
    warm = Finding("throttle", "warn", "GPU 1 slows down for its temperature", node="gpu-002", measured="84 C")
    note = Finding("dcgm", "note", "dcgmi is not installed", node="gpu-001")
    measured = {(i, j) for i in range(8) for j in range(8) if 6 not in (i, j)}  # gpu-007 was left out before
    return verdict(
        nodes,
        code=10,
        headline="6 nodes are ready without gpu-005, gpu-007 (gpu-005: sends slowly to every partner; gpu-007: "
        "GPU 3: 2 uncorrected ECC errors since boot)",
        excluded=(bad, "gpu-007"),
        findings=(warm, note, ecc, slow_node(bad), replace(note, node="gpu-003"), replace(note, node="gpu-004")),
        matrix=matrix(nodes, slow={(bad, ""): 0.46, ("", bad): 0.97}, measured=measured),
        curves=curves(41.8),
        bandwidth=41.8,
    )


def one_link():
    nodes = names(6)
    link = Finding(
        "pairs", "warn", "this direction is slow, both ends are fast with others", node="gpu-002", peer="gpu-005",
        measured="23.0 GB/s", expected=">= 39.3 GB/s", source="85 % of the 90th percentile of this run",
        fix="look at the cable and the switch port between them",
    )  # fmt: skip
    return verdict(
        nodes, findings=(link,), matrix=matrix(nodes, slow={("gpu-002", "gpu-005"): 0.5}), curves=curves(36.0),
        bandwidth=36.0, train=tuple(node for node in nodes if node not in ("gpu-002", "gpu-005")),
    )  # fmt: skip


def sixty_four():
    nodes = names(64)
    dead = Finding("pairs", "exclude", "nothing came through to any partner", node="gpu-052", measured="0 GB/s")
    return verdict(
        nodes,
        code=10,
        headline="62 nodes are ready without gpu-017, gpu-052",
        excluded=("gpu-017", "gpu-052"),
        findings=(slow_node("gpu-017", what="receives slowly from every partner"), dead),
        matrix=matrix(nodes, slow={("", "gpu-017"): 0.55}, dead=("gpu-052",)),
        curves=curves(40.9),
        bandwidth=40.9,
        rounds=63,
    )


def thousand():
    """Six rounds of disjoint pairs among 1,024 nodes, of which one sends and receives at 60 %."""
    nodes, rng, seen = names(1024, width=4), random.Random(3), set()
    for _ in range(6):
        order = list(range(1024))
        rng.shuffle(order)
        seen |= {pair for a, b in zip(order[::2], order[1::2], strict=True) for pair in ((a, b), (b, a))}
    bad = "gpu-0400"
    return verdict(
        nodes,
        code=10,
        headline=f"1023 nodes are ready without {bad}",
        excluded=(bad,),
        findings=(slow_node(bad, what="sends and receives slowly"),),
        matrix=matrix(nodes, slow={(bad, ""): 0.6, ("", bad): 0.6}, measured=seen),
        curves=curves(39.2),
        bandwidth=39.2,
        rounds=6,
    )


def differs():
    nodes = names(4)
    odd = Finding(
        "software", "exclude", "another DeepSpeed than on the other nodes", node="gpu-003", measured="0.19.6",
        expected="0.19.8, as on gpu-001, gpu-002 and gpu-004", source="what most of the nodes have",
        fix="pip install deepspeed==0.19.8 there, or run all nodes from one image", code=21,
    )  # fmt: skip
    split = Finding("environment", "warn", "NCCL_IB_HCA is mlx5 on 2 nodes and unset on 2")
    hca = {"gpu-001": "mlx5", "gpu-002": "mlx5", "gpu-003": "", "gpu-004": ""}
    return verdict(
        nodes,
        code=21,
        headline="nothing starts: 4 nodes train, 3 are healthy (gpu-003: another DeepSpeed than on the other nodes)",
        excluded=("gpu-003",),
        train=(),
        findings=(odd, split),
        stages={"join": 1.2, "inventory": 4.2},
        rounds=0,
        inventory=inventory(nodes, deepspeed={"gpu-003": "0.19.6"}, NCCL_IB_HCA=hca),
    )


def could_not():
    late = Finding(
        "agent", "exclude", "it did not report within 180 s", node="gpu-002",
        fix="is the node up, and can it reach the first node's address?",
    )  # fmt: skip
    stopped = Finding("coordinator", "block", "stopped by SIGTERM before it was done", code=30)
    return verdict(
        names(4), code=30, headline="nothing starts: stopped by SIGTERM before it was done", train=(),
        findings=(late, stopped), stages={}, rounds=0, inventory={},
    )  # fmt: skip


def hostile():
    """Every text of the page tries to run something, or to load something."""
    nodes = tuple(f"{NASTY}{i}" for i in range(4))
    bad = Finding("pairs", "exclude", NASTY, nodes[0], "", NASTY, NASTY, NASTY, NASTY)
    link = replace(bad, level="warn", node=nodes[1], peer=nodes[2])
    return Verdict(
        10, NASTY, nodes[1:], nodes[:1], (bad, link), nodes, {NASTY: 3.0}, 3,
        matrix(nodes, slow={(nodes[0], ""): 0.5, (nodes[1], nodes[2]): 0.5}, source=NASTY),
        tuple(replace(curve, op=NASTY) for curve in curves(3.0)), 3.0,
        {node: {NASTY: f"{NASTY}{i}", "same": NASTY} for i, node in enumerate(nodes)},
    )  # fmt: skip


def long_names():
    """Names as a cloud gives them, and one pair of gloo on slow wires."""
    nodes = tuple(f"ip-10-0-{i}-133.eu-central-1.compute.internal" for i in (12, 9, 240))
    return replace(
        verdict(nodes, matrix=matrix(nodes, good=0.00121), curves=curves(0.00121), bandwidth=0.00121),
    )


SPOILT = replace(
    SETTING,
    name=NASTY,
    gpu=NASTY,
    fabric=NASTY,
    whole=replace(RING, op=NASTY, source=NASTY, passes=2.5, excludes=2.0),
)
GLOO = Setting("demo", nodes=3, fabric="", backend="gloo")
CASES = {
    "healthy": (healthy(), SETTING),
    "single": (verdict(names(1), rounds=0), replace(SETTING, nodes=1)),
    "sixteen": (healthy(names(16)), replace(SETTING, nodes=16)),
    "bad": (one_bad(), replace(SETTING, nodes=6)),
    "link": (one_link(), replace(SETTING, spares=2)),
    "large": (sixty_four(), replace(SETTING, nodes=62)),
    "thousand": (thousand(), replace(SETTING, nodes=1023)),
    "differs": (differs(), SETTING),
    "none": (could_not(), SETTING),
    "hostile": (hostile(), SPOILT),
    "long": (long_names(), GLOO),
    "bare": (one_bad(), None),
}


# Text


def test_a_healthy_run_says_so_in_six_lines():
    assert verdicts.table(*CASES["healthy"], width=150) == (
        "4 nodes are ready\n"
        "  checked    4 nodes: gpu-[001-004]\n"
        "  took       48 s: join 1.2 s, inventory 4.2 s, host 2.9 s, node 18 s, pairs 12 s (3 rounds), whole 9.1 s\n"
        "  bandwidth  42.1 GB/s of bus bandwidth over 4 nodes (all_reduce); all_reduce of 1 GiB is to reach 38.0 "
        "(0.72 and 0.60 of 50 GB/s of NICs per node)\n"
        "  job file   resources: {bandwidth: 42.1}\n"
        "  exit code  0: every node that is needed is healthy: training may start"
    )


def test_what_was_found_stands_worst_first_and_alike_once():
    said = verdicts.table(one_bad(), None, width=100)
    assert said.split("\n\n")[1] == (
        "  node     check     measured   expected      source\n"
        "  gpu-005  pairs     21.3 GB/s  >= 39.3 GB/s  85 % of the 90th percentile of this run\n"
        "    excluded: sends slowly to every partner\n"
        "    do: reseat its cables, look at ibstat\n"
        "  gpu-007  gpus      2          0             NVIDIA's GPU memory error management\n"
        "    excluded: GPU 3: 2 uncorrected ECC errors since boot\n"
        "    do: reset the GPU; replace it if they come again\n"
        "  gpu-002  throttle  84 C\n"
        "    warning: GPU 1 slows down for its temperature\n"
        "  note: dcgmi is not installed (gpu-[001,003-004])"
    )


def test_notes_keep_a_healthy_run_short():
    found = [Finding("clock", "note", "nothing sets the clock", node=node, fix="chronyd") for node in names(4)]
    found.append(Finding("gpus", "note", "link gpu-001 -> gpu-002 was slow once", "gpu-001", "gpu-002"))
    lines = verdicts.table(replace(healthy(), findings=tuple(found)), width=130).splitlines()
    assert lines[1:5] == [
        "",
        "  note: nothing sets the clock (gpu-[001-004])",
        "  note: link gpu-001 -> gpu-002 was slow once",
        "",
    ]
    assert len(lines) == 10


def test_what_was_not_reached_is_no_pass():
    assert verdicts.table(*CASES["none"]) == (
        "nothing starts: stopped by SIGTERM before it was done\n"
        "\n"
        "  node       check\n"
        "  gpu-002    agent\n"
        "    unfit: it did not report within 180 s\n"
        "    do: is the node up, and can it reach the first node's address?\n"
        "  all nodes  coordinator\n"
        "    blocks the start: stopped by SIGTERM before it was done\n"
        "\n"
        "  asked for    4 nodes: gpu-[001-004]\n"
        "  not reached  inventory, host, node, pairs, whole\n"
        "  exit code    30: there is no verdict: nothing starts"
    )


@pytest.mark.parametrize("width", [60, 80, 130])
@pytest.mark.parametrize("name", CASES)
def test_a_table_keeps_to_the_terminal(name, width):
    lines = verdicts.table(*CASES[name], width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.isprintable() for line in lines)


def test_a_thousand_nodes_fit_on_a_screen():
    nodes = names(1024, width=4)
    found = [slow_node(node, measured=f"{20 + i / 100:.2f} GB/s") for i, node in enumerate(nodes[:300])]
    hang = Finding("ports", "unknown", "could not look: ibstat did not answer within 20 s")
    found += [replace(hang, node=node) for node in nodes[500:]]
    said = verdicts.table(verdict(nodes, code=22, train=(), findings=found))
    assert len(said.splitlines()) < 45
    assert "and more of pairs on gpu-[0009-0300]" in said
    assert "gpu-[0501-1024]  ports" in said
    assert "unfit: sends slowly" in said  # too many were slow for them to be excluded
    assert "excluded" not in said.replace("nobody is excluded", "")


def test_a_ticket_says_what_was_found_how_and_how_to_see_it_again():
    assert verdicts.ticket(one_bad(), "gpu-005") == (
        "node gpu-005: sends slowly to every partner\n"
        "\n"
        "  found      sends slowly to every partner\n"
        "  measured   21.3 GB/s\n"
        "  expected   >= 39.3 GB/s\n"
        "  threshold  85 % of the 90th percentile of this run\n"
        "  suggested  reseat its cables, look at ibstat\n"
        "  to repeat  iperf3 -s                 # on gpu-001\n"
        "             iperf3 -c gpu-001 -P 4    # on gpu-005; the way back with -R\n"
        "             mpirun -np 2 -H gpu-005,gpu-001 sendrecv_perf -b 1G -e 1G    # nccl-tests, on GPUs\n"
        "\n"
        "Measured with 6 partners, GB/s; healthy is 46.2 (90th percentile of this run):\n"
        "  with     sends  receives\n"
        "  gpu-003  21.1   45.2\n"
        "  gpu-002  21.1   44.7\n"
        "  gpu-004  21.1   44.5\n"
        "  gpu-006  21.2   44.6\n"
        "  gpu-001  21.3   44.8\n"
        "  gpu-008  21.3   45.2\n"
        "\n"
        "The node was left out of a training job on 8 nodes.\n"
    )


def test_a_link_has_a_ticket_that_clears_both_ends():
    ((subject, said),) = verdicts.tickets(one_link())
    assert subject == "gpu-002 -> gpu-005"
    assert said.startswith("link gpu-002 -> gpu-005: this direction is slow, both ends are fast with others\n")
    assert "gpu-002 -> gpu-005  22.9\n  gpu-005 -> gpu-002  45.8\n" in said
    assert "gpu-002 to others   45.8, the median of 4\n  others to gpu-005   46.3, the median of 4\n" in said
    assert "left out" not in said


def test_what_is_only_different_needs_no_repair():
    assert verdicts.tickets(differs()) == []
    assert [subject for subject, _ in verdicts.tickets(one_bad())] == ["gpu-005", "gpu-007"]


def test_another_bad_node_says_nothing_about_a_partner():
    said = verdicts.ticket(sixty_four(), "gpu-017")
    assert "Measured with 62 partners, the slowest 8" in said
    assert "failed" not in said


def test_a_ticket_does_not_speak_of_our_program():
    fix = "check cable and port; `dslaunch preflight --drain` takes it out of the queue"
    found = replace(slow_node("gpu-002", what="gpu-002 sends slowly (tx)"), fix=fix)
    said = verdicts.ticket(verdict(names(4), findings=(found,), excluded=("gpu-002",)), "gpu-002")
    assert "suggested  check cable and port\n" in said
    assert "dslaunch" not in said
    assert said.startswith("gpu-002 sends slowly (tx)\n")


def test_a_ticket_runs_nothing_that_a_name_says():
    nodes = ("a; rm -rf ~", "b", "c")
    found = slow_node(nodes[0])
    said = verdicts.ticket(verdict(nodes, findings=(found,), matrix=matrix(nodes), excluded=nodes[:1]), nodes[0])
    assert "-H 'a; rm -rf ~',b sendrecv_perf" in said


FOUND = {"check": "software", "level": "warn", "what": "no libaio", "node": "node3", "measured": "none", "new": 1}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "joined", "node": "node3", "count": 3, "of": 4}, "node3 reports (3 of 4)"),
        ({"event": "stage", "stage": "inventory", "nodes": 4}, "inventory: 4 nodes"),
        ({"event": "stage", "stage": "deep", "nodes": 1}, "deep: 1 node"),
        (
            {"event": "checked", "stage": "host", "seconds": 4.2, "findings": 1},
            "host: 1 finding in 4.2 s",
        ),
        (
            {"event": "checked", "stage": "pairs", "seconds": 150.0, "findings": 0},
            "pairs: nothing found in 2.5 minutes",
        ),
        (
            {"event": "round", "round": 2, "of": 3, "pairs": 2, "slowest": 1.1, "best": 2.3},
            "pairs: round 2 of 3, 2 pairs, 1.10 to 2.30 GB/s",
        ),
        (
            {"event": "round", "round": 1, "of": 3, "pairs": 1, "slowest": 0, "best": 2.3},
            "pairs: round 1 of 3, 1 pair, 0 to 2.30 GB/s",
        ),
        (
            {"event": "round", "round": 1, "of": 3, "pairs": 1, "slowest": 0, "best": 0},
            "pairs: round 1 of 3, 1 pair, nothing came through",
        ),
        ({"event": "finding", "finding": FOUND}, "warning: node3: no libaio (measured none)"),
        (
            {
                "event": "finding",
                "finding": {"check": "pairs", "level": "warn", "what": "x", "node": "a", "peer": "b"},
            },
            "warning: a -> b: x",
        ),
        (
            {"event": "finding", "finding": {"check": "whole", "level": "block", "what": "too slow"}},
            "blocks the start: too slow",
        ),
        (
            {"event": "finding", "finding": {**FOUND, "what": "node3 sends slowly", "measured": ""}},
            "warning: node3 sends slowly",
        ),
        (
            {"event": "finding", "finding": {**FOUND, "what": "not node31 nor my-node3", "measured": ""}},
            "warning: node3: not node31 nor my-node3",
        ),
        ({"event": "verdict", "code": 0, "headline": "4 nodes are ready"}, "4 nodes are ready (exit code 0)"),
        ({"time": 1.5, "event": "later", "rail": 3}, "event later, rail 3"),
        ({"event": "joined", "node": "\x1b[2Jn\u202e", "count": 1, "of": 1}, "\\x1b[2Jn\\u202e reports (1 of 1)"),
    ],
)
def test_progress_is_one_line_an_event(event, line):
    assert verdicts.progress({"time": 12.5, **event} if event["event"] != "later" else event) == line


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (verdicts.seconds(0.42), "0.4 s"),
        (verdicts.seconds(45.2), "45 s"),
        (verdicts.size(1 << 30), "1 GiB"),
        (verdicts.size(256 << 20), "256 MiB"),
        (verdicts.size(1536), "1.5 KiB"),
        (verdicts.size(16 << 30), "16 GiB"),
        (verdicts.nodes(("gpu2", "gpu1")), "2 nodes: gpu[1-2]"),
        (verdicts.folded(("node 1", "x")), "node 1, x"),
        (verdicts.to_paste(replace(healthy(), bandwidth=1234.5)), "resources: {bandwidth: 1230}"),
        (verdicts.to_paste(replace(healthy(), bandwidth=0.0004)), ""),
        (verdicts.to_paste(differs()), ""),
        (verdicts.means(99), "not an answer of a preflight"),
        (" ".join(charts.shortened(names(3))), "001 002 003"),
        (" ".join(charts.shortened(("ip-10-0-12-133.ec2.internal", "ip-10-0-9-133.ec2.internal"))), "12 9"),
        (" ".join(charts.shortened(("n1", "n11"))), "1 11"),
        (" ".join(charts.shortened(("aa", "aba"))), "aa aba"),
        (" ".join(charts.labels(names(2), 200)), "gpu-001 gpu-002"),
        (" ".join(charts.labels(("first.of.a.very.long.name", "last.of.a.very.long.name"), 100)), "first last"),
        (charts.clipped("abcdefghij", 50), "\u2026ghij"),
    ],
)
def test_worked_examples(made, text):
    assert made == text


@pytest.mark.parametrize(
    ("value", "kind"), [(3.0, 0), (15.0, 1), (25.0, 2), (35.0, 3), (41.0, 4), (44.0, 5), (46.0, 6), (90.0, 6)]
)
def test_a_cell_is_as_warm_as_it_is_slow(value, kind):
    good = matrix(names(4))
    drawing = charts.HeatMap(good.nodes, good.cells, health.steps(good), "GB/s", str)
    assert (good.exclude, good.warn) == (pytest.approx(39.27), pytest.approx(42.966))
    assert drawing.warmth(value) == kind


@pytest.mark.parametrize(("count", "each", "size"), [(128, 127, 1), (256, 255, 4), (1024, 6, 27), (256, 6, 14)])
def test_bins_hold_about_four_measured_pairs(count, each, size):
    rows = tuple(tuple(1.0 if 0 < (j - i) % count <= each else None for j in range(count)) for i in range(count))
    drawing = charts.HeatMap(names(count), rows, (0.0,) * 6, "GB/s", str)
    assert {len(members) for members in drawing.bins[:-1]} == {size}
    assert sum(map(len, drawing.bins)) == count


# Colours as without one kind of cone: Machado, Oliveira and Fernandes 2009, at full severity.
CONES = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


@pytest.mark.parametrize("cones", CONES)
def test_slow_and_healthy_differ_for_every_eye(cones):
    def seen(colour):
        raw = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in raw]
        mixed = [sum(weight * c for weight, c in zip(row, linear, strict=True)) for row in CONES[cones]]
        return [255 * max(c, 0) ** (1 / 2.4) for c in mixed]

    slow, healthy = charts.SUNSET[:4], charts.SUNSET[5:]
    assert min(math.dist(seen(one), seen(other)) for one in slow for other in healthy) > 80
    assert min(math.dist(seen(one), seen(other)) for one, other in combinations(charts.SUNSET, 2)) > 15


# The page


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_page_is_well_formed_and_loads_nothing(case):
    made = Outline(health.page(*case))
    assert {tag for tag, _ in made.tags} <= set(
        "html head meta title style body main h1 h2 h3 p section div span b i dl dt dd table caption thead tbody tr "
        "th td code br ul li figure figcaption details summary pre svg pattern g rect line text circle polyline "
        "polygon desc".split()
    )
    assert not [attrs for _, attrs in made.tags if {"src", "href", "onerror", "onload"} & set(attrs)]
    ids = [attrs["id"] for _, attrs in made.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("healthy", ["\u2713 healthy", "4 of 4", "resources: {bandwidth: 42.1}", "44.6 and more"]),
        ("bad", ["Preflight of 8 nodes for a job on 6, 8 x h100-80gb each, over infiniband with nccl"]),
        ("bad", ["2 uncorrected ECC errors", "Outlined rows send slowly: gpu-005.", "not measured", "1 note"]),
        ("link", ["Outlined cells are slow links: gpu-002 \u2192 gpu-005.", "4 train, 2 spare"]),
        ("large", ["Outlined columns receive slowly: gpu-[017,052].", "62 nodes: gpu-[001-016,018-051,053-064]"]),
        ("thousand", ["Each square is 27 x 27 nodes", "1,024 values, from 812.4 GiB to 1835.4 GiB"]),
        (
            "differs",
            ["0.19.6", "no majority", "each its own", "(empty) on gpu-[003-004]", "6 of 9 facts are the same"],
        ),
        ("none", ["\u2715 no verdict", "? not seen", "stopped by SIGTERM"]),
    ],
)
def test_a_page_says(name, said):
    words = re.sub(r"\s+", " ", "".join(Outline(health.page(*CASES[name])).words))
    for phrase in said:
        assert phrase in words, phrase


def test_what_was_not_measured_has_no_section():
    words = " ".join(Outline(health.page(*CASES["none"])).words)
    for title in ("Bandwidth between nodes", "All nodes together", "Inventory", "Where the time went"):
        assert title not in words


@pytest.mark.slow
def test_the_same_verdict_gives_the_same_bytes():
    code = "import test_health as t; print(ascii([t.health.page(*case) for case in t.CASES.values()]))"
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in "12"]
    here = Path(__file__).parent
    made = [subprocess.check_output([sys.executable, "-c", code], env=seed, cwd=here) for seed in seeds]
    assert made[0] == made[1]
    assert len(made[0]) > 500_000


# What a real browser makes of it.

TEXTS = REPORT_TEXTS.replace("matches('.in')", "matches('.in, .cell text')")

# Every cell of the matrix, and what is drawn around some: where, its colour, its hint.
CELLS = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] };
  const fill = e => getComputedStyle(e.matches('rect') ? e : e.querySelector('rect')).fill;
  const of = s => [...document.querySelectorAll(s)];
  return {cells: of('.cell').map(e => ({title: e.querySelector('title').textContent, fill: fill(e), box: box(e),
      crossed: !!e.querySelector('.cross'), text: e.querySelector('text')?.textContent ?? ''})),
    blank: of('.numbered .blank').length, tiles: of('.tile').map(e => e.querySelector('title').textContent),
    marks: of('.numbered .mark, .heat:last-of-type .mark').map(box)}})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if reason := browser.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, case in CASES.items():
        (folder / f"{name}.html").write_text(health.page(*case), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("name", CASES)
def test_a_page_holds_together_at_any_width(chromium, pages, name, width):
    chromium.open(pages / f"{name}.html", width=width)
    texts = chromium.evaluate(TEXTS)
    assert chromium.requests == [(pages / f"{name}.html").as_uri()]
    assert chromium.complaints == []
    assert chromium.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    crossed = [(a["text"], b["text"]) for a, b in combinations(texts, 2) if overlap(a, b) > 2]
    assert crossed == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CASES)
def test_every_text_can_be_read(chromium, pages, name, scheme):
    chromium.open(pages / f"{name}.html", scheme=scheme)
    texts = chromium.evaluate(TEXTS)
    assert brightness(texts[0]["back"]) < 0.1 if scheme == "dark" else brightness(texts[0]["back"]) > 0.9
    faint = {text["text"]: contrast(text["ink"], text["back"]) for text in texts}
    assert {text: ratio for text, ratio in faint.items() if ratio < 4.5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["healthy", "bad", "link", "sixteen", "large"])
def test_each_measured_pair_has_its_cell_in_its_place(chromium, pages, name):
    chromium.open(pages / f"{name}.html")
    drawn = chromium.evaluate(CELLS)
    made = CASES[name][0].matrix
    at = {node: i for i, node in enumerate(made.nodes)}
    size = range(len(made.nodes))
    measured = {(i, j) for i in size for j in size if i != j and made.cells[i][j] is not None}
    found = {}
    for cell in drawn["cells"]:
        sender, receiver = cell["title"].split(":")[0].split(" \u2192 ")
        found[at[sender], at[receiver]] = cell
    assert len(drawn["cells"]) == len(found)
    assert set(found) == measured
    assert drawn["blank"] == (len(size) * (len(size) - 1) - len(measured) if len(size) <= 16 else 0)
    left, top = (min(cell["box"][way] for cell in found.values()) for way in (0, 1))
    wide, high = (max(cell["box"][way] for cell in found.values()) for way in (2, 3))
    for (i, j), cell in found.items():
        assert cell["box"][0] == pytest.approx(left + j * wide, abs=2)
        assert cell["box"][1] == pytest.approx(top + i * high, abs=2)
        assert cell["crossed"] == (made.cells[i][j] == 0)
        if len(size) <= 16:
            assert cell["text"] == f"{made.cells[i][j]:.1f}"
        if not cell["crossed"]:
            assert cell["title"].endswith(f": {made.cells[i][j]:.1f} GB/s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("healthy", lambda title: False),
        ("bad", lambda title: title.startswith("gpu-005 \u2192")),
        ("link", lambda title: title.startswith("gpu-002 \u2192 gpu-005:")),
        ("large", lambda title: "\u2192 gpu-017:" in title and "failed" not in title),
        ("thousand", lambda title: "gpu-0400," in title or "gpu-0400 \u2192" in title),
    ],
)
def test_a_slow_pair_has_another_colour(chromium, pages, name, slow):
    chromium.open(pages / f"{name}.html")
    cells = [cell for cell in chromium.evaluate(CELLS)["cells"] if not cell["crossed"]]
    warm = {cell["fill"] for cell in cells if slow(cell["title"])}
    cool = {cell["fill"] for cell in cells if not slow(cell["title"])}
    assert not warm & cool
    assert bool(warm) == (name != "healthy")


@pytest.mark.slow
def test_what_is_bad_is_outlined(chromium, pages):
    def marks(name):
        chromium.open(pages / f"{name}.html")
        return chromium.evaluate(CELLS)

    drawn = marks("bad")  # the row of gpu-005 and nothing else
    ((left, top, wide, high),) = drawn["marks"]
    row = [cell["box"] for cell in drawn["cells"] if cell["title"].startswith("gpu-005 ")]
    assert all(left <= x < left + wide and top - 3 <= y < top + high for x, y, _, _ in row)
    assert high < 2 * row[0][3]
    ((left, top, *_),) = (drawn := marks("link"))["marks"]
    (cell,) = (cell["box"] for cell in drawn["cells"] if cell["title"].startswith("gpu-002 \u2192 gpu-005"))
    assert (left, top) == (pytest.approx(cell[0], abs=3), pytest.approx(cell[1], abs=3))
    assert marks("healthy")["marks"] == []


@pytest.mark.slow
def test_every_node_of_a_large_set_has_its_tile(chromium, pages):
    chromium.open(pages / "thousand.html")
    drawn = chromium.evaluate(CELLS)
    assert len(drawn["tiles"]) == 1024
    assert drawn["tiles"][399].startswith("gpu-0400 sends 27.")
    assert len(drawn["cells"]) <= 64 * 64
    chromium.open(pages / "sixteen.html")
    assert chromium.evaluate(CELLS)["tiles"] == []


# Of each plot: points, in px from its left and bottom, and the band.
PLOTS = """[...document.querySelectorAll('.plot > svg:not(.axis)')].map(svg => {
  const all = svg.getBoundingClientRect(), px = e => { const r = e.getBoundingClientRect();
    return [(r.left + r.right) / 2 - all.left, all.bottom - (r.top + r.bottom) / 2] };
  const band = svg.querySelector('.expected')?.getBoundingClientRect();
  return {width: all.width, points: [...svg.querySelectorAll('.point')].map(px),
    hints: [...svg.querySelectorAll('.point title')].map(e => e.textContent),
    band: band ? [all.bottom - band.bottom, all.bottom - band.top] : null}})"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_curves_are_where_their_numbers_say(chromium, pages, width):
    chromium.open(pages / "healthy.html", width=width)
    (plot,) = chromium.evaluate(PLOTS)
    curve = healthy().curves[0]
    per_gb = plot["points"][-1][1] / curve.busbw[-1]
    assert [y for _, y in plot["points"]] == pytest.approx([rate * per_gb for rate in curve.busbw], abs=0.5)
    assert plot["band"] == pytest.approx([30 * per_gb, 38 * per_gb], abs=0.5)
    xs = [x for x, _ in plot["points"]]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.5)  # each size is 8 times the one before
    assert 0 < xs[0] < xs[-1] < plot["width"]
    assert plot["hints"][-1] == "all_reduce, 1 GiB: 42.1 GB/s"
