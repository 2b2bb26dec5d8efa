"""What follows a failure, as a function of what is known. Scenarios 60, 61, 65, 74 and 75."""

from __future__ import annotations

import argparse
import doctest
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NODE = Path(__file__).parents[1] / "launcher" / "node"
sys.path.insert(0, str(NODE))  # its modules are scripts that find each other beside themselves

import journal  # noqa: E402
import recover  # noqa: E402
from recover import Action, Resources, Verdict  # noqa: E402

from launcher import checkpoints, supervision  # noqa: E402
from launcher.checkpoints import layout, manifest  # noqa: E402
from launcher.diagnose import exits, tables  # noqa: E402

FIVE = Resources(nodes=3, attempts=3, hosts=("n1", "n2", "n3", "n4", "n5"), run="demo")
THREE = FIVE._replace(hosts=("n1", "n2", "n3"))
CAUSES = [
    dict(zip(("id", "rank", "layer", "retry", "exclude"), row, strict=True))
    for row in [
        ("user_import_error", 1, "app", "no", "no"),
        ("cuda_oom", 1, "app", "no", "no"),
        ("disk_full_or_quota", 2, "env", "after fix", "temp"),
        ("collective_desync", 1, "app", "no", "no"),
        ("collective_timeout", 4, "app", "once", "probe"),
        ("cuda_illegal_access", 2, "app", "once", "repeat"),
        ("xid_48_dbe", 1, "node", "elsewhere", "yes"),
        ("xid_94_contained_ecc", 1, "node", "yes", "temp"),
        ("port_in_use", 2, "env", "yes", "no"),
        ("nic_pcie_power", 1, "node", "yes", "monitor"),
    ]
]
KNOWN = {cause["id"]: cause for cause in CAUSES}


def failed(cause: str = "", **more: object) -> Verdict:
    row = KNOWN.get(cause, {})
    said = {
        "code": 1,
        "cause": cause,
        **{key: row[key] for key in ("layer", "retry", "exclude") if key in row},
        **more,
    }
    return Verdict(**said)


def line(verdict: Verdict) -> dict:
    """What the journal keeps of a verdict."""
    return {
        "event": "ended",
        **{key: value for key, value in verdict._asdict().items() if key not in ("lost", "leave")},
    }


def test_the_worked_examples_are_true():
    assert doctest.testmod(recover).failed == 0


@pytest.mark.parametrize(
    ("verdict", "kind", "exclude"),
    [
        (failed("user_import_error", node="n1"), "stop", ()),
        (failed("disk_full_or_quota", node="n1"), "stop", ()),
        (failed(node="n1"), "stop", ()),  # a plain exit code, and nothing known
        (failed("port_in_use", node="n1"), "restart", ()),
        (failed("xid_48_dbe", node="n2"), "restart", ("n2",)),
        (failed("xid_94_contained_ecc", node="n2"), "restart", ("n2",)),
        (failed("collective_timeout", node="n2"), "restart", ()),  # `probe`: not at the first time
        (failed("nic_pcie_power", node="n2"), "restart", ()),
        (failed("xid_48_dbe"), "restart", ()),  # on which host nobody knows: once more, anywhere
        (failed("a_cause_of_a_later_table", retry="perhaps"), "stop", ()),
        (failed(code=93, cause="port_in_use"), "stop", ()),
        (failed("user_import_error", lost=("n3",)), "stop", ()),
        (failed(code=1, retry="elsewhere", cause="slurm_node_fail", lost=("n3",)), "restart", ("n3",)),
        (Verdict(75, told=True), "stop", ()),
        (Verdict(143, told=True, preempted=True), "requeue", ()),
        (Verdict(75, told=True, warned=True), "stop", ()),
        (Verdict(0), "stop", ()),
    ],
)
def test_a_first_failure_is_answered_by_its_class(verdict, kind, exclude):
    found = recover.decide([], verdict, FIVE)
    assert (found.kind, found.exclude) == (kind, exclude), found
    assert found.why


@pytest.mark.parametrize("code", [137, 143, 139, 134, 135])
def test_a_rank_that_something_ended_starts_again_and_one_that_ends_by_itself_does_not(code):
    """Scenario 75: 137 and 143 are no exit of the program's own."""
    word = {"node_rank": 1, "host": "n2", "first_failure": {"rank": 1, "host": "n2", "code": code, "ended": 5.0}}
    verdict = recover.merge([word], code=code, hosts=["n1", "n2", "n3"])
    assert (verdict.node, verdict.rank) == ("n2", 1)
    assert recover.decide([], verdict, FIVE).kind == "restart"
    assert (
        recover.decide([], recover.merge([{**word, "oom_kills": 2}], code=137, hosts=["n1", "n2"]), FIVE).kind
        == "stop"
    )
    word["first_failure"]["code"] = 3
    assert recover.decide([], recover.merge([word], code=3, hosts=["n1", "n2", "n3"]), FIVE).kind == "stop"


@pytest.mark.parametrize("code", [137, 143])
def test_a_code_that_no_node_explains_is_tried_once_as_srun_may_have_ended_those_ranks_itself(code):
    verdict = recover.merge([], code=code, hosts=["n1", "n2", "n3"])
    assert recover.decide([], verdict, FIVE).kind == "restart"
    assert recover.decide([line(verdict)], verdict, FIVE).kind == "stop"


def test_time_that_is_up_goes_back_to_the_queue_where_the_job_file_says_so():
    told = Verdict(75, told=True, warned=True, checkpoint=40)
    assert recover.decide([], told, FIVE._replace(requeue=True)).kind == "requeue"
    action = recover.decide([], told, FIVE)
    assert (action.kind, action.why[:26]) == ("stop", "its time is up at step 40;")
    many = [line(told)] * 50  # uses up nothing
    assert recover.decide(many, failed("port_in_use", checkpoint=40), FIVE).kind == "restart"


def test_without_a_spare_a_bad_node_is_left_out_of_another_job_and_one_machine_has_no_other():
    bad = failed("xid_48_dbe", node="n2")
    assert recover.decide([], bad, THREE)[:2] == ("resubmit", ("n2",))
    assert recover.decide([], bad, THREE._replace(hosts=())).kind == "stop"
    again = recover.decide([], failed("port_in_use"), THREE._replace(hosts=()))
    assert (again.kind, again.hosts) == ("restart", ())


def test_nodes_that_are_left_out_stay_out_and_those_that_are_down_are_not_started_on():
    history = [{"event": "decided", "exclude": ["n1"]}, {"event": "preflight", "code": 10, "exclude": ["n4"]}]
    found = recover.decide(history, failed("port_in_use"), FIVE)
    assert found.hosts == ("n2", "n3", "n5")
    found = recover.decide(history, failed("port_in_use"), FIVE._replace(down=("n2",)))
    assert found[:2] == ("resubmit", ("n1", "n2", "n4"))


def test_the_same_node_twice_is_left_out_and_an_application_never_costs_a_node():
    """Scenario 74."""
    first = failed("collective_timeout", node="n2", step=10)
    assert recover.decide([line(first)], first._replace(step=20), FIVE)[:2] == ("restart", ("n2",))
    elsewhere = recover.decide([line(first)], first._replace(step=20, node="n3"), FIVE)
    assert (elsewhere.kind, elsewhere.exclude) == ("stop", ())  # once for each cause
    oom = failed("cuda_oom", node="n2", step=10)
    assert recover.decide([line(oom)] * 2, oom, FIVE).exclude == ()


def test_the_same_failure_at_the_same_step_stops_on_whatever_node_it_comes():
    """Scenario 74."""
    first = failed("cuda_illegal_access", code=134, node="n1", step=40, checkpoint=20)
    again = recover.decide([line(first)], first._replace(node="n3"), FIVE)
    assert (again.kind, "the same step, 40" in again.why) == ("stop", True)


def test_the_budget_is_of_starts_without_a_new_verified_checkpoint():
    row = failed("port_in_use", checkpoint=20)
    history = [line(row)]
    for _ in range(2):
        assert recover.decide(history, row, FIVE).kind == "restart"
        history.append(line(row))
    assert recover.decide(history, row, FIVE).kind == "stop"
    assert recover.decide(history, row._replace(checkpoint=30), FIVE).kind == "restart"
    assert recover.decide([], row, FIVE._replace(attempts=0)).kind == "stop"


def test_pauses_grow_and_two_jobs_do_not_come_back_together():
    assert [recover.wait_for("a", n) for n in (0, 1, 2, 9)] == [recover.wait_for("a", n) for n in (0, 1, 2, 9)]
    assert recover.wait_for("a", 0) == 0
    waits = {recover.wait_for(f"run-{n}", 2) for n in range(50)}
    assert len(waits) > 20
    assert 10 <= min(waits) <= max(waits) <= 20


def test_a_lost_node_is_the_root_of_what_the_others_say_about_the_network():
    """Scenarios 60, 61 and 65: rank 0's node as any other."""
    peer = {
        "cause": {"id": "net_connect_timeout", "rank": 3, "layer": "net", "retry": "after fix", "exclude": "probe"}
    }
    words = [{"node_rank": rank, "host": f"n{rank + 1}", "diagnosis": {"root": peer}} for rank in (1, 2)]
    verdict = recover.merge(words, code=1, hosts=["n1", "n2", "n3"], lost=["n1"])
    assert (verdict.cause, verdict.node) == ("slurm_node_fail", "n1")
    assert recover.decide([], verdict, FIVE)[:2] == ("restart", ("n1",))
    assert recover.decide([], recover.merge(words, code=1, hosts=["n1", "n2", "n3"]), FIVE).kind == "stop"


def test_the_earliest_root_on_any_node_wins():
    words = [
        {"node_rank": 0, "ended": 5.0, "diagnosis": {"root": {"cause": KNOWN["collective_timeout"], "at": 1.0}}},
        {"node_rank": 1, "ended": 5.0, "diagnosis": {"root": {"cause": KNOWN["xid_48_dbe"], "at": 4.0}}},
        {"node_rank": 2, "ended": 5.0, "diagnosis": {"root": {"cause": KNOWN["cuda_oom"], "at": 3.0, "rank": 2}}},
    ]
    verdict = recover.merge(words, code=1, hosts=["n1", "n2", "n3"])
    assert (verdict.cause, verdict.node, verdict.rank) == ("cuda_oom", "n3", 2)


def test_a_laggard_is_named_by_the_hang_and_starts_again():
    hang = {
        "kind": "laggard",
        "step": 30,
        "seconds": 60,
        "ranks": [1],
        "hosts": ["n2.cluster"],
        "collective": "ALLREDUCE #7",
        "why": "rank 1 on n2 is stopped (state T); the others wait in ALLREDUCE #7",
    }
    verdict = recover.merge([{"node_rank": 0, "hang": hang}], code=1, hosts=["n1", "n2", "n3"])
    assert (verdict.node, verdict.step, verdict.exclude) == ("n2", 30, "probe")
    assert verdict.why == f"no step for 60 s: {hang['why']}"
    assert recover.decide([], verdict, FIVE)[:2] == ("restart", ())


def anything(rng: random.Random) -> Verdict:
    cause = rng.choice([*CAUSES, {"id": "", "layer": "", "retry": "", "exclude": "no"}])
    return Verdict(
        rng.choice((1, 1, 1, 137, 93, 75)), cause["id"], cause["layer"], cause["retry"], cause["exclude"],
        node=rng.choice(("", *FIVE.hosts)), step=rng.choice((None, *range(50))),
        checkpoint=rng.choice((-1, 10, 20, 30)), lost=rng.choice(((), (), (), ("n4",))),
        told=rng.random() < 0.1, warned=rng.random() < 0.1,
    )  # fmt: skip


def test_whatever_happens_it_ends_within_the_budget_and_never_repeats_what_is_permanent():
    """Checkpoints 10, 20 and 30 reset the budget once each: at most 4 x 3 restarts, whatever fails."""
    rng = random.Random(74)
    for _ in range(3000):
        resources = rng.choice((FIVE, THREE, FIVE._replace(hosts=()), FIVE._replace(requeue=True)))
        history, starts = [], 0
        while True:
            verdict = anything(rng)
            found = recover.decide(history, verdict, resources)
            assert isinstance(found, Action)
            permanent = recover.RETRY.get(verdict.retry, "stop") == "stop"
            if permanent and not verdict.told and not (verdict.lost and verdict.layer != "app"):
                assert found.kind == "stop", (verdict, found)
            if verdict.exclude == "no" and not verdict.lost:
                assert set(found.exclude) <= recover.left_out(history) | set(resources.down)
            if found.kind == "restart" and resources.hosts:
                assert len(found.hosts) >= resources.nodes
                assert not set(found.hosts) & set(found.exclude)
            if found.kind == "stop":
                break
            starts += not verdict.told
            history += [line(verdict), {"event": "decided", "exclude": list(found.exclude)}]
            assert starts <= 12


def run(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    fixed = ["--run", str(folder), "--nodes", "1", "--attempts", "3"]
    command = [python, str(NODE / "recover.py"), *arguments[:1], *fixed, *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pythons() -> list[str]:
    """As old as can be found: the batch host's own comes before any environment."""
    old = [path for minor in range(6, 10) if (path := shutil.which(f"python3.{minor}"))]
    works = [path for path in old if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]
    return [*works, sys.executable]


@pytest.mark.slow
def test_an_attempt_is_counted_in_the_journal_from_claim_to_end(tmp_path):
    for number, python in enumerate(pythons()):
        counted(tmp_path / str(number), python)


def counted(folder: Path, python: str) -> None:
    (folder / "logs").mkdir(parents=True)
    mine = f"{journal.os.getpid()}:"
    assert run(folder, "begin", "--job", mine, python=python).stdout == "0\n"
    assert run(folder, "attempt", "--job", mine, "--attempt", "0", "--hosts", "me", python=python).returncode == 0
    answer = run(folder, "after", "--job", mine, "--code", "137", "--hosts", "me", python=python)
    assert answer.stdout == "restart 0\n", answer.stderr
    assert run(folder, "attempt", "--job", mine, "--attempt", "1", "--hosts", "me", python=python).returncode == 0
    answer = run(folder, "after", "--job", mine, "--attempt", "1", "--code", "3", "--hosts", "me", python=python)
    assert answer.stdout == "stop\n"
    entries, torn = journal.read(folder)
    assert not torn
    told = [(entry["event"], entry.get("attempt"), entry.get("action")) for entry in entries]
    assert told == [
        ("started", None, None),
        ("attempt", 0, None), ("ended", 0, None), ("decided", 0, "restart"),
        ("attempt", 1, None), ("ended", 1, None), ("decided", 1, "stop"), ("finished", None, None),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_module_that_one_node_does_not_find_is_why_and_not_the_signal_that_ends_the_others(tmp_path):
    """srun --kill-on-bad-exit: the step's code is 143, and no node wrote how it ended."""
    (tmp_path / "logs").mkdir()
    mine = f"{journal.os.getpid()}:"
    assert run(tmp_path, "begin", "--job", mine).stdout == "0\n"
    assert run(tmp_path, "attempt", "--job", mine, "--attempt", "0", "--hosts", "n1", "n2").returncode == 0
    said = "node.sh on n1 ended with 1: module load cuda/99.9 failed"
    (tmp_path / "logs" / recover.BEFORE).write_text(said + "\n")
    answer = run(tmp_path, "after", "--job", mine, "--code", "143", "--hosts", "n1", "n2")
    assert answer.stdout == "stop\n"
    entries = journal.read(tmp_path)[0]
    decided = entries[-2]
    assert (decided["event"], decided["action"]) == ("decided", "stop")
    assert decided["why"] == f"{said}: starting again would not help"
    assert entries[-3]["cause"] == ""


def test_what_failed_before_the_ranks_of_one_attempt_is_not_why_the_next_one_ended(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / recover.BEFORE).write_text("node.sh on n1 ended with 1: module load cuda/99.9 failed\n")
    mine = f"{journal.os.getpid()}:"
    assert run(tmp_path, "attempt", "--job", mine, "--attempt", "1", "--hosts", "n1").returncode == 0
    answer = run(tmp_path, "after", "--job", mine, "--attempt", "1", "--code", "143", "--hosts", "n1")
    assert answer.stdout.startswith("restart "), answer.stderr


def test_a_second_copy_of_a_job_that_lives_ends_without_a_word_in_the_journal(tmp_path):
    (tmp_path / "logs").mkdir()
    assert run(tmp_path, "begin", "--job", f"{journal.os.getpid()}:").returncode == 0
    before = (tmp_path / journal.NAME).read_bytes()
    other = subprocess.Popen(["sleep", "30"])
    try:
        done = run(tmp_path, "begin", "--job", f"{other.pid}:")
    finally:
        other.kill()
        other.wait()
    assert done.returncode == recover.DUPLICATE
    assert "is a second copy" in done.stderr
    assert (tmp_path / journal.NAME).read_bytes() == before


@pytest.mark.slow
def test_one_whose_process_is_gone_is_taken_over_and_its_attempt_is_counted_as_ended(tmp_path):
    """Scenario 61: the host of the job's script went away in the middle of an attempt."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoints" / "step00000020").mkdir(parents=True)
    manifest = {"step": 20, "files": {"a.pt": 3}}
    (tmp_path / "checkpoints" / "step00000020" / "complete.json").write_text(json.dumps(manifest))
    (tmp_path / "checkpoints" / "step00000020" / "a.pt").write_bytes(b"abc")
    where = ["--checkpoints", str(tmp_path / "checkpoints")]
    for number in range(4):
        gone = subprocess.Popen(["sleep", "30"])
        job = f"{gone.pid}:"
        answer = run(tmp_path, "begin", "--job", job, *where)
        gone.kill()
        gone.wait()
        assert (answer.returncode, answer.stdout) == (0, f"{number}\n"), answer.stderr
        run(tmp_path, "attempt", "--job", job, "--attempt", str(number), "--hosts", "me")
    last = run(tmp_path, "begin", "--job", f"{journal.os.getpid()}:", *where)
    assert last.returncode == recover.OVER
    assert "recover.attempts is 3" in last.stderr
    ended = [entry for entry in journal.read(tmp_path)[0] if entry["event"] == "ended"]
    assert [(one["attempt"], one["cause"], one["checkpoint"], one["exclude"]) for one in ended] == [
        (number, "slurm_node_fail", 20, "no") for number in range(4)
    ]


def test_what_a_script_of_python_3_6_cannot_import_says_what_the_packages_say():
    known, _ = tables.read()
    assert {cause.retry for cause in known.values() if cause.rank < 5} <= set(recover.RETRY)
    assert {cause.exclude for cause in known.values()} <= set(recover.EXCLUDE)
    assert {name for name, _, _ in recover.CODES.values()} <= set(known)
    assert {retry for _, retry, _ in recover.CODES.values()} <= set(recover.RETRY)
    assert recover.MANIFEST == checkpoints.MANIFEST
    assert (recover.BEAT, recover.STOPPED_EARLY) == (supervision.BEAT, exits.STOPPED_EARLY)


def test_the_newest_checkpoint_is_the_same_to_the_batch_host_as_to_the_nodes(tmp_path):
    for name, step in (
        ("step00000020", 20),
        ("checkpoint-500/global_step500", 500),
        ("before-fresh-1/step00000900", 900),
    ):
        tag = tmp_path / name
        tag.mkdir(parents=True)
        (tag / "a.pt").write_bytes(b"abc")
        manifest.write(str(tag), step=step, world_size=1, stage=2)
        newest = max(tag.step for tag in layout.scan(str(tmp_path)) if tag.health == "verified")
        assert recover.newest_checkpoint(str(tmp_path)) == newest
    assert recover.newest_checkpoint(str(tmp_path / "step00000020")) == 20


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_checkpoint_counts_as_progress_only_when_every_file_is_as_long_as_its_manifest_says(tmp_path, damage):
    for step in (20, 30):
        tag = tmp_path / f"step{step:08d}"
        tag.mkdir()
        (tag / "complete.json").write_text(json.dumps({"step": step, "files": {"a.pt": 3}}))
        (tag / "a.pt").write_bytes(b"abc")
    assert recover.newest_checkpoint(str(tmp_path)) == 30
    if damage == "cut":
        (tmp_path / "step00000030" / "a.pt").write_bytes(b"ab")
    else:
        (tmp_path / "step00000030" / "a.pt").unlink()
    assert recover.newest_checkpoint(str(tmp_path)) == 20


@pytest.mark.parametrize(
    ("state", "down"),
    [
        ("DOWN", True), ("DOWN+NOT_RESPONDING", True), ("MIXED+NOT_RESPONDING", True), ("IDLE*", True),
        ("FAILING", True), ("ALLOCATED", False), ("MIXED+DRAIN", False), ("IDLE+POLISHING", False), ("", False),
    ],
)  # fmt: skip
def test_which_states_of_a_node_are_down(state, down):
    assert recover.is_down(state) is down


def test_a_node_that_is_cut_off_and_still_writes_heartbeats_is_found_where_training_stands(tmp_path, monkeypatch):
    """Scenario 65: nobody asks while steps are made, or while nobody knows how long one takes."""
    beat = {"node": 0, "attempt": 0, "phase": "training", "progress_age": 0.5, "step_seconds": 0.4}
    (tmp_path / "logs").mkdir()
    asked, ended = [], []
    monkeypatch.setattr(recover, "BEAT", 0.1)
    monkeypatch.setattr(recover, "unreachable", lambda hosts: asked.append(list(hosts)) or ["n2"])
    monkeypatch.setattr(recover, "end_step", ended.append)
    options = argparse.Namespace(run=str(tmp_path), attempt=0, hosts=["n1", "n2"], script=os.getppid())
    for more, found in (({}, 0), ({"progress_age": 9.0, "step_seconds": None}, 0), ({"progress_age": 9.0}, 1)):
        (tmp_path / "logs" / "beat-0000.json").write_text(json.dumps({**beat, **more}))
        rounds = iter([options.script] * 2)
        monkeypatch.setattr(os, "getppid", lambda rounds=rounds: next(rounds, 0))
        assert recover.watch(options) == 0
        assert (asked, len(ended)) == ([["n1", "n2"]] * found, found)
    assert (tmp_path / "logs" / "lost-0").read_text() == "n2\n"


def test_a_preempted_job_that_has_saved_asks_for_its_requeue_itself(tmp_path, monkeypatch, capsys):
    """Scenario 70: Slurm takes one that ends within the grace time for done, and does not start it again."""
    asked = []

    def ask(argv, **_):
        asked.append(argv)
        return 0, "JobId=7 PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=2026-01-01T00:10:00\n", ""

    monkeypatch.setattr(recover, "ask", ask)
    command = ["after", "--run", str(tmp_path), "--job", "7", "--nodes", "2", "--attempts", "3", "--requeues"]
    assert recover.main([*command, "--code", "75", "--told", "1", "--hosts", "n1", "n2"]) == 0
    assert asked[-1] == ["scontrol", "requeue", "7"]
    assert capsys.readouterr().out == "leave\n"
    events = [entry["event"] for entry in journal.read(str(tmp_path))[0]]
    assert events == ["ended", "decided", "requeueing", "requeued"]


@pytest.mark.slow
def test_silence_of_slurm_names_no_node_and_ends_no_job(monkeypatch):
    """A day without a scheduler that answers: nothing is lost, nothing is decided; only an attempt's end asks."""
    monkeypatch.setattr(recover, "ask", lambda *_, **__: (-1, "", "timed out"))
    for _ in range(24 * 720):  # a question every five seconds
        assert recover.unreachable(["n1", "n2"]) == []
    assert recover.alive("7") is None
    assert recover.siblings("demo", "7") is None


def test_what_was_rendered_has_to_be_there_before_anything_starts(tmp_path):
    """Scenario 59."""
    (tmp_path / "node.sh").write_text("echo\n")
    digest = recover.digest_of(str(tmp_path / "node.sh"))
    history = [{"event": "rendered", "files": {"node.sh": digest, "ds_config.json": "changes"}}]
    assert recover.intact(str(tmp_path), history, patience=0)
    (tmp_path / "node.sh").write_text("echo half")
    assert not recover.intact(str(tmp_path), history, patience=0)
