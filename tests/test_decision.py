"""Who trains after what was found, and what history says about a node."""

from __future__ import annotations

import json

import pytest

from launcher.preflight import (
    COULD_NOT,
    DIFFERS,
    FABRIC,
    OK,
    OK_WITHOUT,
    TOO_FEW,
    Finding,
    Setting,
    decision,
    history,
)

FIVE = ("a", "b", "c", "d", "e")


def decide(*findings: Finding, nodes=4, spares=1, switches=(), **more) -> decision.Decision:
    return decision.decide(
        Setting(nodes=nodes, spares=spares, **more), FIVE[: nodes + spares], findings, dict(switches)
    )


def exclude(node: str, code: int = 0) -> Finding:
    return Finding("gpus", "exclude", f"{node} is broken", node=node, code=code)


def test_healthy_nodes_train_in_the_schedulers_order_and_the_last_one_is_the_spare():
    made = decide()
    assert (made.code, made.train, made.excluded) == (OK, ("a", "b", "c", "d"), ())
    assert made.headline == "4 nodes are ready"


def test_a_bad_node_is_left_out_while_enough_are_healthy():
    made = decide(exclude("b"))
    assert (made.code, made.train, made.excluded) == (OK_WITHOUT, ("a", "c", "d", "e"), ("b",))
    assert made.headline == "4 nodes are ready without b (b is broken)"


def test_two_bad_nodes_are_one_too_many():
    made = decide(exclude("b"), exclude("e"))
    assert (made.code, made.train, made.excluded) == (TOO_FEW, (), ("b", "e"))
    assert made.headline == "nothing starts: 4 nodes train, 3 are healthy (b is broken; e is broken)"


def test_a_node_that_is_only_different_makes_it_the_environment():
    assert decide(exclude("b", DIFFERS), spares=0).code == DIFFERS
    assert decide(exclude("b", DIFFERS), spares=1).code == OK_WITHOUT
    # one broken and one different: without the broken one the difference would still stop it
    assert decide(exclude("a"), exclude("b", DIFFERS), spares=1).code == DIFFERS
    assert decide(exclude("a"), exclude("c"), exclude("b", DIFFERS), spares=1).code == TOO_FEW


@pytest.mark.parametrize("code", [DIFFERS, FABRIC, COULD_NOT])
def test_a_block_gives_its_own_code_and_excludes_only_what_is_broken(code):
    made = decide(Finding("x", "block", "2 against 2", code=code), exclude("b", DIFFERS), exclude("c"))
    assert (made.code, made.train, made.excluded) == (code, (), ("c",))
    assert made.headline == "nothing starts: 2 against 2"


def test_a_block_without_a_code_is_never_a_pass():
    assert decide(Finding("x", "block", "no answer")).code == COULD_NOT


def test_warnings_and_unknowns_do_not_stop_a_job_but_the_doubtful_node_becomes_the_spare():
    made = decide(Finding("pairs", "warn", "slow", node="b"), Finding("xids", "unknown", "no dmesg", node="a"))
    assert (made.code, made.train) == (OK, ("a", "c", "d", "e"))
    assert decide(Finding("pairs", "warn", "slow link", node="d", peer="a"), nodes=3, spares=2).train == (
        "b",
        "c",
        "e",
    )
    assert decide(history={"a": 0.7}).train == ("b", "c", "d", "e")


def test_the_fewest_switches_win():
    switches = {"a": "s1", "b": "s0", "c": "s1", "d": "s0", "e": "s0"}
    assert decide(nodes=3, spares=2, switches=switches).train == ("b", "d", "e")


def slow(node: str, check: str) -> Finding:
    return Finding(check, "exclude", "its GPUs reach each other slowly", node=node, fix="nvidia-smi nvlink --status")


def test_what_is_wrong_with_many_nodes_is_what_they_share():
    one = decide(slow("b", "nvlink-bandwidth"))
    assert (one.code, one.excluded) == (OK_WITHOUT, ("b",))
    both = decide(slow("b", "nvlink-bandwidth"), slow("d", "nvlink-bandwidth"))
    assert (both.code, both.excluded, both.train) == (FABRIC, (), ())
    assert both.headline.startswith("nothing starts: 2 of 5 nodes, so it is hardly the nodes: its GPUs reach")
    # two with broken parts are two broken nodes
    assert decide(exclude("b"), exclude("d")).code == TOO_FEW


def test_most_nodes_without_torch_or_without_a_word_could_not_be_checked():
    assert decide(slow("a", "worker"), slow("b", "worker")).code == TOO_FEW
    most = decide(*(slow(node, "join") for node in "bcde"))
    assert (most.code, most.excluded) == (COULD_NOT, ())
    alone = decision.decide(Setting(nodes=1), ("a",), [slow("a", "join")], {})
    assert (alone.code, alone.excluded) == (TOO_FEW, ("a",))


def test_history_halves_in_ten_days_and_ends_after_thirty(tmp_path):
    day = 86400.0
    lines = [json.dumps({"node": "n", "time": 100 * day - age * day}) for age in (0, 10, 31)]
    assert history.scores([*lines, '{"node": "m", "ti'], 100 * day) == {"n": 1.5}
    path = str(tmp_path / "state" / "nodes.jsonl")
    found = [exclude("b"), Finding("pairs", "exclude", "slow too", node="b"), Finding("x", "warn", "y", node="c")]
    history.append(path, found, 100 * day)
    assert history.load(path, 100 * day) == {"b": 1.0}
    assert "b is broken" in (tmp_path / "state" / "nodes.jsonl").read_text()
    assert (tmp_path / "state" / "nodes.jsonl").stat().st_mode & 0o777 == 0o600
    assert history.load(str(tmp_path / "none"), 0.0) == {}


def test_the_state_directory_is_the_users():
    assert history.default({"HOME": "/home/a"}) == "/home/a/.local/state/dslaunch/nodes.jsonl"
    assert history.default({"HOME": "/home/a", "XDG_STATE_HOME": "/s"}) == "/s/dslaunch/nodes.jsonl"
    assert history.default({}) == ""
