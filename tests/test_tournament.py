"""Who is slow: schedule, worked examples, and a small simulation with fixed seeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.preflight import FABRIC, TOO_FEW, Limit, from_json, to_json
from launcher.preflight.tournament import Localised, Tournament, circle, p90, rate, rounds
from tests.detector import Kind, predicted_seconds, tally, wilson

TABLE = Limit("all_reduce", 8 << 30, passes=36.0, excludes=30.0, source="a table")


def names(count: int) -> list[str]:
    return [f"node{i}" for i in range(1, count + 1)]


def play(tournament: Tournament, speed: Callable[[str, str], float | None]) -> Localised:
    """Until it is decided, with speed(a, b) for every cell."""
    for _ in range(100):
        pairs = tournament.next()
        if not pairs:
            return tournament.result()
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
        assert tournament.total() > tournament.done
        tournament.record({cell: speed(*cell) for a, b in pairs for cell in ((a, b), (b, a))})
    raise AssertionError("not decided after 100 rounds")


def world(
    tx: dict[str, float] | None = None,
    rx: dict[str, float] | None = None,
    links: dict[tuple[str, str], float] | None = None,
    seed: int = 0,
) -> Callable[[str, str], float]:
    """40 GB/s, with 1 % noise and these factors."""
    noise = random.Random(seed)

    def speed(a: str, b: str) -> float:
        factor = min((tx or {}).get(a, 1.0), (rx or {}).get(b, 1.0), (links or {}).get((a, b), 1.0))
        return 40.0 * factor * noise.gauss(1.0, 0.01)

    return speed


def both(node: str, factor: float, seed: int = 0) -> Callable[[str, str], float]:
    return world({node: factor}, {node: factor}, seed=seed)


def excluded(result: Localised) -> set[str]:
    return {finding.node for finding in result.findings if finding.level == "exclude"}


def named(result: Localised) -> set[str]:
    return {finding.node for finding in result.findings if finding.node and not finding.peer}


def links(result: Localised) -> set[tuple[str, str]]:
    return {(finding.node, finding.peer) for finding in result.findings if finding.peer}


def blocks(result: Localised) -> list[int]:
    return [finding.code for finding in result.findings if finding.level == "block"]


# The schedule


@pytest.mark.parametrize("count", range(2, 34))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    played = circle(count)
    assert len(played) == (count - 1 if count % 2 == 0 else count)
    for pairs in played:
        seats = [seat for pair in pairs for seat in pair]
        assert len(seats) == len(set(seats)) == count - count % 2
    met = sorted(tuple(sorted(pair)) for pairs in played for pair in pairs)
    assert met == list(itertools.combinations(range(count), 2))


@given(count=st.integers(2, 33), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_a_healthy_set_plays_the_planned_rounds_and_no_more(count, seed):
    tournament = Tournament(names(count), seed=seed)
    met = []
    while pairs := tournament.next():
        assert tournament.next() == pairs  # the same round until it is recorded
        met += [frozenset(pair) for pair in pairs]
        tournament.record({cell: 40.0 for a, b in pairs for cell in ((a, b), (b, a))})
    result = tournament.result()
    assert result.rounds == rounds(count) == tournament.total()
    assert len(met) == len(set(met))
    if count <= 16:
        assert len(met) == count * (count - 1) // 2
    assert result.findings == ()
    assert not result.fabric_wide


@pytest.mark.parametrize(
    ("count", "planned", "most"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 120), (4, 3, 120), (16, 15, 240), (64, 6, 240), (1024, 6, 360)],
)
def test_rounds_and_seconds(count, planned, most):
    assert rounds(count) == planned
    assert predicted_seconds(count) <= most


def test_one_node_has_nobody_to_meet():
    for count in (0, 1):
        tournament = Tournament(names(count))
        assert tournament.next() == []
        assert tournament.result().findings == ()
        assert tournament.total() == 0


def test_seeds_choose_other_partners():
    first = {frozenset(pair) for pair in Tournament(names(64), seed=1).next()}
    assert first == {frozenset(pair) for pair in Tournament(names(64), seed=1).next()}
    assert first != {frozenset(pair) for pair in Tournament(names(64), seed=2).next()}


# Slow nodes


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 16, 17, 64, 65])
@pytest.mark.parametrize("factor", [0.5, 0.7, 0.8])
@pytest.mark.parametrize(("way", "signs"), [("tx", "(tx)"), ("rx", "(rx)"), ("both", "(tx/rx)")])
def test_a_slow_node_is_named_with_its_direction(count, factor, way, signs):
    slow = {"node3": factor}
    result = play(
        Tournament(names(count), seed=count), world(slow if way != "rx" else {}, slow if way != "tx" else {})
    )
    (finding,) = result.findings
    assert (finding.level, finding.node, finding.peer, finding.check) == ("exclude", "node3", "", "pairs")
    assert signs in finding.what
    assert finding.source.startswith("85% of ")
    assert not result.fabric_wide
    assert result.rounds <= rounds(count) + 2  # two partners agree, and no more


@pytest.mark.parametrize("factor", [0.7, 0.8])
def test_the_median_of_four_nodes_is_no_reference(factor):
    """3 of 6 pairs contain the bad node: the median of all lies between good and bad, p90 is good."""
    cells = [40.0 * factor if "node2" in pair else 40.0 for pair in itertools.permutations(names(4), 2)]
    assert sorted(cells)[5] < 40.0 * 0.85 < 40.0 == p90(cells)
    assert excluded(play(Tournament(names(4)), both("node2", factor))) == {"node2"}


def test_a_little_slow_is_a_warning():
    result = play(Tournament(names(8)), both("node2", 0.9))
    assert [(finding.level, finding.node) for finding in result.findings] == [("warn", "node2")]
    assert "92% of" in result.findings[0].source


def test_what_a_person_reads():
    result = play(Tournament(names(4)), lambda a, b: 21.3 if a == "node3" else 44.0)
    (finding,) = result.findings
    assert finding.what == "node3 sends slowly (tx)"
    assert finding.measured.startswith("21.3 GB/s, median of 3 partners, again with node")
    assert finding.expected == ">= 37.4 GB/s"
    assert finding.source == "85% of 44.0 GB/s, p90 of this run"
    assert "node3" in finding.fix


def test_a_slow_result_has_to_repeat():
    """node2 is slow for the three planned rounds, then never again: told, not excluded."""
    tournament = Tournament(names(4))
    result = play(tournament, lambda a, b: 20.0 if "node2" in (a, b) and tournament.done < 3 else 40.0)
    assert excluded(result) == set()
    assert [finding.level for finding in result.findings if finding.node == "node2"] == ["warn", "warn"]
    assert "then not any more" in result.findings[0].what


def test_one_dip_says_nothing():
    tournament = Tournament(names(6))
    first = tournament.next()[0]
    result = play(tournament, lambda a, b: 10.0 if (a, b) == first and tournament.done == 0 else 40.0)
    assert result.findings == ()
    assert result.rounds > rounds(6)


def test_two_bad_of_64_are_excluded_and_too_many_are_the_fabric():
    few = {"node3": 0.7, "node60": 0.6}
    assert excluded(play(Tournament(names(64)), world(few, few))) == set(few)
    many = {f"node{i}": 0.6 for i in range(1, 9)}
    result = play(Tournament(names(64)), world(many, many))
    assert result.fabric_wide
    assert blocks(result) == [FABRIC]
    assert excluded(result) == set()
    assert named(result) == set(many)  # still told


def test_two_bad_of_four_are_too_many():
    slow = {"node1": 0.7, "node2": 0.6}
    result = play(Tournament(names(4)), world(slow, slow))
    assert result.fabric_wide
    assert named(result) == set(slow)
    assert excluded(result) == set()


def test_three_nodes_can_leave_two_explanations_open():
    """node1 and node2 send slowly, or node3 receives slowly and two links are bad: nobody is excluded."""
    result = play(Tournament(names(3)), world({"node1": 0.6, "node2": 0.6}))
    assert result.fabric_wide
    assert excluded(result) == set()


def test_a_node_with_a_history_is_looked_at_again():
    plain, lemon = Tournament(names(64)), Tournament(names(64), history={"node9": 2.0, "node1000": 1.0})
    assert play(plain, world()).rounds == 6
    assert play(lemon, world()).rounds == 8
    assert len([pair for pair in lemon.logs if lemon.index["node9"] in pair]) == 2 * 8  # with other partners


# Two nodes


@pytest.mark.parametrize(
    ("there", "back", "limit", "code"),
    [
        (40.0, 40.0, None, None),
        (40.0, 40.0, TABLE, None),
        (4.0, 4.0, None, None),  # nothing to compare with
        (20.0, 21.0, TABLE, FABRIC),
        (20.0, 40.0, None, TOO_FEW),
        (40.0, 20.0, TABLE, TOO_FEW),
        (0.0, 0.0, None, FABRIC),
        (None, 40.0, None, TOO_FEW),
    ],
)
def test_of_two_nodes_neither_is_blamed(there, back, limit, code):
    result = play(Tournament(names(2), limit=limit), lambda a, b: there if a == "node1" else back)
    assert named(result) == set() == excluded(result)
    assert blocks(result) == ([code] if code else [])
    assert result.fabric_wide == (code == FABRIC)
    assert result.rounds == (1 if code is None else 2 if there == back == 0 else 3)


def test_two_nodes_between_the_lines_are_a_warning():
    result = play(Tournament(names(2), limit=TABLE), lambda a, b: 33.0)
    assert [(finding.level, finding.source) for finding in result.findings] == [("warn", "a table")]
    assert "not localised" in result.findings[0].what


# The table


def test_everything_under_the_table_is_the_fabric():
    result = play(Tournament(names(8), limit=TABLE), lambda a, b: 12.0)
    assert result.fabric_wide
    assert blocks(result) == [FABRIC]
    assert excluded(result) == set()
    assert result.findings[0].source == "a table"


def test_without_a_table_slow_everywhere_cannot_be_seen():
    assert play(Tournament(names(8)), lambda a, b: 12.0).findings == ()


def test_everything_between_the_lines_is_one_warning():
    result = play(Tournament(names(8), limit=TABLE), lambda a, b: 33.0)
    assert [(finding.level, finding.node) for finding in result.findings] == [("warn", "")]
    assert not result.fabric_wide


def test_the_table_excludes_what_this_run_would_only_warn_of():
    limit = Limit("all_reduce", 8 << 30, passes=38.0, excludes=36.5, source="a table")
    result = play(Tournament(names(8), limit=limit), both("node2", 0.89))
    assert excluded(result) == {"node2"}
    assert result.findings[0].source == "a table"
    assert result.findings[0].expected == ">= 36.5 GB/s"


def test_half_slow_fabric_hides_no_slow_node():
    result = play(Tournament(names(8), limit=TABLE), world({"node2": 0.4}))
    assert excluded(result) == {"node2"}
    assert not result.fabric_wide


# Links


@pytest.mark.parametrize("count", [3, 4, 6, 16])
def test_a_slow_link_is_a_link_in_one_direction(count):
    result = play(Tournament(names(count)), world(links={("node1", "node3"): 0.5}))
    (finding,) = result.findings
    assert (finding.level, finding.node, finding.peer) == ("warn", "node1", "node3")
    assert finding.what.startswith("link node1 -> node3 is slow")


def test_a_node_and_a_link_are_told_apart():
    result = play(Tournament(names(8)), world({"node5": 0.7}, {"node5": 0.7}, {("node1", "node3"): 0.5}))
    assert excluded(result) == {"node5"}
    assert links(result) == {("node1", "node3")}


def test_a_slow_link_of_a_slow_node_is_told_too():
    result = play(Tournament(names(8)), world({"node5": 0.7}, {"node5": 0.7}, {("node5", "node3"): 0.3}))
    assert excluded(result) == {"node5"}
    assert links(result) == {("node5", "node3")}


def test_two_slow_links_of_three_are_not_the_node():
    result = play(Tournament(names(4)), world(links={("node1", "node2"): 0.5, ("node1", "node3"): 0.6}))
    assert excluded(result) == set() == named(result)
    assert links(result) == {("node1", "node2"), ("node1", "node3")}


@pytest.mark.parametrize(
    ("pattern", "level"),
    [
        ("sss", "warn"),
        ("ssgs", "warn"),
        ("ssgg", "note"),
        ("sgss", "warn"),
        ("sgsg", "note"),
        ("sgg", None),
        ("g", None),
    ],
)
def test_a_link_that_flaps_is_told_and_never_the_node(pattern, level):
    """The nth measurement of the link is slow (s) or good (g)."""
    told = iter(pattern)

    def speed(a: str, b: str) -> float:
        return 20.0 if (a, b) == ("node1", "node3") and next(told) == "s" else 40.0

    result = play(Tournament(names(4)), speed)
    found = [finding.level for finding in result.findings if finding.peer]
    assert found == ([level] if level else [])
    assert next(told, None) is None
    assert named(result) == set()


def test_a_dead_link_costs_one_of_its_ends():
    result = play(Tournament(names(6)), lambda a, b: None if {a, b} == {"node2", "node4"} else 40.0)
    assert links(result) == {("node2", "node4"), ("node4", "node2")}
    assert excluded(result) == {"node4"}
    assert not result.fabric_wide
    lemon = Tournament(names(6), history={"node2": 1.0})
    assert excluded(play(lemon, lambda a, b: 0.0 if {a, b} == {"node2", "node4"} else 40.0)) == {"node2"}


def test_two_dead_links_of_one_node_cost_that_node():
    dead = [{"node2", "node4"}, {"node2", "node5"}]
    result = play(Tournament(names(8)), lambda a, b: 0.0 if {a, b} in dead else 40.0)
    assert excluded(result) == {"node2"}


def test_two_halves_that_cannot_talk_are_the_fabric():
    half = {"node1", "node2", "node3"}
    result = play(Tournament(names(6)), lambda a, b: 40.0 if (a in half) == (b in half) else 0.0)
    assert result.fabric_wide
    assert excluded(result) == set()


def test_two_switches_with_a_slow_link_between_them_are_one_finding():
    half = {"node1", "node2"}
    result = play(Tournament(names(4)), lambda a, b: 40.0 if (a in half) == (b in half) else 20.0)
    (finding,) = result.findings
    assert finding.what == "slow between node1 and node2 | node3 and node4, fast within"
    assert (finding.level, finding.node) == ("warn", "")


def test_many_leaves_with_slow_links_between_them_blame_nobody():
    leaf = {name: number // 8 for number, name in enumerate(names(64))}
    result = play(Tournament(names(64)), lambda a, b: 40.0 if leaf[a] == leaf[b] else 20.0)
    assert not result.fabric_wide
    assert named(result) == set()


# Dead nodes


@pytest.mark.parametrize("count", [3, 4, 6, 17, 64])
def test_a_node_that_nobody_reaches_is_excluded_and_left_alone(count):
    tries = []

    def speed(a: str, b: str) -> float | None:
        tries.extend({a, b} & {"node3"})
        return None if "node3" in (a, b) else 40.0

    result = play(Tournament(names(count)), speed)
    assert excluded(result) == {"node3"} == named(result)
    assert len(tries) <= 2 * 3  # each costs a time-out


def test_a_node_that_only_hears_is_excluded():
    result = play(Tournament(names(5)), lambda a, b: 0.0 if a == "node2" else 40.0)
    assert excluded(result) == {"node2"}
    assert "cannot send to" in result.findings[0].what
    assert links(result) == set()


def test_when_no_pair_works_it_is_the_fabric_and_over_soon():
    for count in (3, 8, 64):
        result = play(Tournament(names(count)), lambda a, b: 0.0)
        assert result.fabric_wide
        assert blocks(result) == [FABRIC]
        assert excluded(result) == set()
        assert result.rounds == 3


def test_dead_nodes_are_no_part_of_the_cap():
    dead = {f"node{i}" for i in range(1, 4)}
    result = play(Tournament(names(8)), lambda a, b: 0.0 if {a, b} & dead else 40.0)
    assert excluded(result) == dead
    most = {f"node{i}" for i in range(1, 6)}
    result = play(Tournament(names(8)), lambda a, b: 0.0 if {a, b} & most else 40.0)
    assert result.fabric_wide
    assert excluded(result) == set()


@pytest.mark.parametrize("late", [False, True])
def test_a_dropped_node_meets_nobody_and_costs_its_partner_nothing(late):
    tournament = Tournament(names(5))
    pairs = tournament.next()
    gone = pairs[0][0]
    cells = {cell: None if gone in cell else 40.0 for a, b in pairs for cell in ((a, b), (b, a))}
    if late:
        tournament.record(cells)
        tournament.drop(gone)
    else:
        tournament.drop(gone)
        assert all(gone not in pair for pair in tournament.next())
        tournament.record(cells)

    def speed(a: str, b: str) -> float:
        assert gone not in (a, b)
        return 40.0

    result = play(tournament, speed)
    assert result.findings == ()


def test_of_two_nodes_one_may_drop():
    tournament = Tournament(names(2))
    tournament.next()
    tournament.drop("node1")
    assert tournament.next() == []
    assert tournament.result().findings == ()


def test_a_slow_node_is_found_after_another_dropped():
    tournament = Tournament(names(6))
    tournament.next()
    tournament.drop("node6")
    assert excluded(play(tournament, both("node2", 0.6))) == {"node2"}


# The rest of a result


def test_the_matrix_holds_the_best_of_each_cell_and_goes_through_json():
    result = play(Tournament(names(4)), lambda a, b: 21.3 if (a, b) == ("node1", "node3") else 44.0)
    assert result.matrix.nodes == ("node1", "node2", "node3", "node4")
    assert result.matrix.cells[0] == (None, 44.0, 21.3, 44.0)
    assert (result.matrix.reference, result.matrix.source) == (44.0, "p90 of this run")
    assert result.matrix.warn == pytest.approx(44.0 * 0.92)
    assert result.matrix.exclude == pytest.approx(44.0 * 0.85)
    assert from_json(type(result.matrix), to_json(result.matrix)) == result.matrix


def test_the_matrix_of_many_nodes_shows_who_is_named():
    result = play(Tournament(names(256)), both("node200", 0.6))
    assert "node200" in result.matrix.nodes
    assert len(result.matrix.nodes) == 9  # with the 6 + 2 it met


@pytest.mark.parametrize(
    ("value", "text"), [(43.96, "44.0 GB/s"), (487.2, "487.2 GB/s"), (4.2, "4.20 GB/s"), (0.0051, "5.10 MB/s")]
)
def test_rates(value, text):
    assert rate(value) == text


def test_values_that_are_no_numbers_failed():
    result = play(Tournament(names(4)), lambda a, b: float("nan") if "node2" in (a, b) else 40.0)
    assert excluded(result) == {"node2"}


@pytest.mark.slow
@given(
    count=st.integers(2, 20),
    cells=st.lists(
        st.one_of(st.none(), st.floats(0, 100), st.sampled_from([0.0, 20.0, 40.0])), min_size=1, max_size=40
    ),
    drops=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=3),
    limit=st.sampled_from([None, TABLE]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_measured_it_ends_and_excludes_no_more_than_half(count, cells, drops, limit):
    told = itertools.cycle(cells)
    tournament = Tournament(names(count), limit=limit)
    gone = set()
    for number in range(200):
        for when, node in drops:
            if when == number and node <= count:
                tournament.drop(f"node{node}")
                gone.add(f"node{node}")
        pairs = tournament.next()
        if not pairs:
            break
        assert not gone & {node for pair in pairs for node in pair}
        tournament.record({cell: next(told) for a, b in pairs for cell in ((a, b), (b, a))})
    assert number < 60
    result = tournament.result()
    assert not gone & excluded(result)
    if result.fabric_wide:
        assert excluded(result) == set()
    if count == 2:
        assert excluded(result) == set()


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8])
def test_two_groups_that_reach_only_themselves_are_never_called_mute(count):
    for number in range(1, 2 ** (count - 1)):
        group = {f"node{i + 1}" for i in range(count) if number >> i & 1}
        result = play(Tournament(names(count)), lambda a, b, group=group: 40.0 if (a in group) == (b in group) else 0)
        assert not any("none of the" in one.what for one in result.findings), group


@pytest.mark.parametrize(
    ("count", "rounds", "what"),
    [
        (3, 3, "none of the 3 pairs of nodes could exchange data"),
        (4, 3, "none of the 6 pairs of nodes could exchange data"),
        (8, 3, "none of the 12 pairs of nodes measured so far could exchange data"),
        (16, 3, "none of the 24 pairs of nodes measured so far could exchange data"),
    ],
)
def test_where_nothing_arrives_the_pairs_that_were_tried_are_counted(count, rounds, what):
    result = play(Tournament(names(count)), lambda a, b: None)
    assert ([one.what for one in result.findings], result.rounds) == ([what], rounds)
    assert result.fabric_wide


# The simulation in small; `make detector` has all of it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "worlds"),
    [
        (Kind(4, bad=1), 300),
        (Kind(6, bad=1), 200),
        (Kind(8, bad=1, links=1), 150),
        (Kind(16, bad=1, links=1), 60),
        (Kind(64, bad=4), 40),
        (Kind(4, noise=0.05, dips=0.05), 300),
        (Kind(6, noise=0.02, dips=0.20), 200),
    ],
    ids=str,
)
def test_simulated_worlds(kind, worlds):
    count, _ = tally(("tournament", kind, range(worlds)))
    assert count["found >=20 %"] == count["bad >=20 %"]
    assert count["excluded >=20 %"] == count["bad >=20 %"]
    assert count["found 12-20 %"] == count["bad 12-20 %"]
    assert count["healthy excluded"] == 0
    assert count["links found"] == count["links"]
    assert count["wide"] == 0


def test_wilson():
    assert wilson(25, 25)[0] == pytest.approx(0.867, abs=5e-4)
    assert wilson(0, 160)[1] == pytest.approx(0.0234, abs=5e-4)
