"""What is made of the workers' measurements: GEMM, copies, the node's own GPUs, corruption, the whole set."""

from __future__ import annotations

import itertools

import pytest

from launcher.preflight import FABRIC, TOO_FEW, Limit, Setting, speed

GPUS = Setting(nodes=2, gpus=4, gpu="h100-80gb", backend="nccl", matmul_tflops=794.0, host_copy=52.0)
CPU = Setting(nodes=4)
FAST = {"tflops": 780.0, "repeatable": True, "host_to_device": 53.0, "device_to_host": 52.0}


def node(*odd: dict, count: int = 4) -> list[dict]:
    return [*({**FAST, **one} for one in odd), *[FAST] * (count - len(odd))]


def judged(compute=None, inside=None, setting=GPUS, *, shared=False):
    return speed.judge_node(compute or {}, inside or {}, setting, shared=shared)


def test_equal_gpus_say_nothing():
    assert judged({"a": node(), "b": node()}) == []


@pytest.mark.parametrize(("tflops", "level"), [(740.0, None), (720.0, "warn"), (680.0, "exclude")])
def test_a_gpu_slower_than_its_neighbours_is_named(tflops, level):
    found = judged({"a": node({"tflops": tflops}), "b": node()})
    assert [(one.node, one.level) for one in found] == ([("a", level)] if level else [])
    if level:
        assert found[0].what == "GPU 0 computes slower than the others"


def test_gpus_that_are_all_slow_are_their_types_business():
    (found,) = judged({name: node(*[{"tflops": 500.0}] * 4) for name in "ab"})
    assert (found.level, found.node, found.expected) == ("warn", "", "794 TFLOP/s")


def test_two_results_for_one_product_exclude_a_node():
    (found,) = judged({"a": node({"repeatable": False}), "b": node()})
    assert (found.node, found.level, found.what) == ("a", "exclude", "GPU 0 gives two results for one product")


def test_a_gpu_that_does_not_answer_excludes_its_node_and_a_node_that_is_gone_has_its_finding_already():
    found = judged({"a": node({"error": "no answer within 60 s"}), "b": [{"error": "gone", "gone": True}] * 4})
    assert [(one.node, one.level) for one in found] == [("a", "exclude")]
    assert "no answer within 60 s" in found[0].what


def test_a_card_in_half_a_slot_copies_slowly():
    (found,) = judged({"a": node({"device_to_host": 26.0})})
    assert (found.node, found.level, found.measured, found.expected) == ("a", "warn", "26 GB/s", ">= 36.4 GB/s")
    assert found.what == "GPU 0 copies slowly (device to host)"


def test_cpus_are_compared_only_where_they_are_nodes_of_their_own():
    rates = {name: [{"tflops": 1.0, "repeatable": True}] for name in "abc"} | {"d": [{"tflops": 0.3}]}
    (found,) = judged(rates, setting=CPU)
    assert (found.node, found.level) == ("d", "warn")
    assert judged(rates, setting=CPU, shared=True) == []
    two = {name: [{"tflops": rate}] for name, rate in (("a", 1.0), ("b", 0.3))}
    assert judged(two, setting=CPU) == []  # which of two is odd nobody knows


LIMIT = Limit("all_reduce", 8 << 30, 460, 400, "who measured it")


@pytest.mark.parametrize(("busbw", "level"), [(470.0, None), (430.0, "warn"), (300.0, "exclude")])
def test_the_nodes_own_gpus_are_held_against_the_table(busbw, level):
    setting = Setting(gpus=4, backend="nccl", node=LIMIT)
    found = judged(inside={"a": {"results": [{"busbw": busbw, "correct": True}]}}, setting=setting)
    expected = [("a", level, "who measured it")] if level else []
    assert [(one.node, one.level, one.source) for one in found] == expected
    tests = speed.judge_nccl_tests({"a": {"busbw": busbw, "wrong": 0}}, setting)
    assert [one.level for one in tests] == [level or "note"]


def test_a_collective_that_does_not_end_or_gives_wrong_values_excludes_the_node():
    found = judged(inside={"a": {"error": "timed out"}, "b": {"results": [{"busbw": 500.0, "correct": False}]}})
    assert [(one.node, one.level) for one in found] == [("a", "exclude"), ("b", "exclude")]
    wrong = speed.judge_nccl_tests({"a": {"busbw": 500.0, "wrong": 3}, "b": {"error": "no table"}}, GPUS)
    assert [(one.node, one.level) for one in wrong] == [("a", "exclude"), ("a", "note"), ("b", "unknown")]


def test_who_corrupts_is_who_a_transfer_names_or_the_end_of_two_bad_ones():
    named = speed.corruption({"correct": False, "wrong": [5], "why": "sends wrong values"}, ("a", "b"), 4)
    assert (named.guilty, named.why) == (("b",), "sends wrong values")
    assert speed.corruption({"correct": True, "wrong": []}, ("a", "b"), 4) is None
    assert speed.corruption({"correct": None}, ("a", "b"), 4) is None
    (found,) = speed.judge_corruption([named], "pairs")
    assert (found.node, found.level) == ("b", "exclude")

    unclear = [speed.Corruption(pair, (), "values arrive wrong") for pair in (("a", "b"), ("a", "c"), ("a", "b"))]
    (found,) = speed.judge_corruption(unclear, "pairs")
    assert (found.node, found.level) == ("a", "exclude")
    (found,) = speed.judge_corruption(unclear[:1], "pairs")  # one of two, and nobody knows which
    assert (found.node, found.level, found.code) == ("", "block", TOO_FEW)
    (found,) = speed.judge_corruption([unclear[0], unclear[2]], "pairs")  # the same pair twice is one witness
    assert found.level == "block"


def test_a_link_that_comes_and_goes_has_to_do_it_twice():
    best = {("a", "b"): 4.8, ("c", "d"): 4.8}
    (found,) = speed.judge_unsteady({("a", "b"): [1.4, 1.6], ("c", "d"): [1.0]}, best, set())
    assert (found.node, found.peer, found.level) == ("a", "b", "warn")
    assert (found.measured, found.expected) == ("1.4 GB/s at times, seen 2 times", "4.8 GB/s, as in most iterations")
    assert speed.judge_unsteady({("a", "b"): [1.4, 1.6]}, best, {"b"}) == []


def result(op: str, busbw: float, *, size: int = 64 << 20, **more) -> dict:
    return {"op": op, "bytes": size, "busbw": busbw, "median": 0.1, "p99": 0.2, "correct": True, **more}


def test_the_whole_set_is_held_against_the_fabric_at_its_largest_size():
    setting = Setting(backend="nccl", whole=Limit("all_gather", 8 << 30, 60, 50, "CHS"))
    sweep = [result("all_gather", 20.0, size=1 << 20), result("all_reduce", 10.0), result("all_gather", 61.0)]
    assert speed.judge_whole(sweep, ["a", "b"], setting, slowest_pair=0.0) == []
    for busbw, level, code in ((55.0, "warn", 0), (30.0, "block", FABRIC)):
        (found,) = speed.judge_whole([result("all_gather", busbw)], ["a", "b"], setting, slowest_pair=0.0)
        assert (found.level, found.code, found.source) == (level, code, "CHS")


def test_without_a_table_all_nodes_reach_half_of_their_slowest_pair():
    assert speed.judge_whole([result("all_reduce", 0.6)], list("abcd"), CPU, slowest_pair=1.0) == []
    (found,) = speed.judge_whole([result("all_reduce", 0.4)], list("abcd"), CPU, slowest_pair=1.0)
    assert (found.level, found.expected) == ("warn", ">= 0.5 GB/s, all_reduce of 64 MiB")
    spoilt = result("all_reduce", 2, correct=False, wrong=[3])
    (found,) = speed.judge_whole([spoilt], list("abcd"), CPU, slowest_pair=0)
    assert (found.node, found.level) == ("d", "exclude")


def test_the_plan_counts_on_the_slowest_collective_that_training_uses():
    results = [result("all_reduce", 1.0, size=1), result("all_reduce", 487.0), result("all_gather", 330.0)]
    results += [result("all_to_all", 9.0), result("sendrecv", 8.0)]
    assert speed.planned(results, "nccl") == 330.0
    assert speed.planned(results, "gloo") == 487.0
    assert speed.planned([], "nccl") == 0.0
    assert speed.tail(results[1]) == 243.5


@pytest.mark.parametrize(
    ("setting", "slowest", "top"),
    [
        (Setting(backend="nccl", whole=LIMIT), 50.0, 8 << 30),
        (CPU, 2.5, 256 << 20),
        (CPU, 0.125, 16 << 20),
        (CPU, 0.001, 1 << 20),
    ],
)
def test_sizes_grow_eightfold_to_one_that_takes_half_a_second(setting, slowest, top):
    found = speed.sizes(setting, slowest)
    assert found[-1] == top
    assert all(after == 8 * before for before, after in itertools.pairwise(found))
    assert found[0] >= 256


def test_one_slow_rail_of_eight_is_named():
    assert speed.slow_rail({"slow_rail": {"rail": 3, "rate": 21.0, "others": 44.0}}) == (
        "rail 3 carries 21 GB/s, the others 44"
    )
    assert speed.slow_rail({"slow_rail": {"rail": 3, "rate": 42.0, "others": 44.0}}) == ""
    assert speed.slow_rail({"slow_rail": None}) == speed.slow_rail({}) == ""


def test_what_could_not_be_measured_is_unknown():
    (found,) = judged(inside={"a": {"results": [{"op": "all_reduce", "unsupported": "does not fit"}]}})
    assert (found.level, found.node) == ("unknown", "a")
