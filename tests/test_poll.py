"""What is known of a run when its scheduler is late, silent, forgetful or wrong about numbers."""

from __future__ import annotations

import errno
import itertools
import json
import random
import stat
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import runs
from launcher.backends import State, Status
from launcher.backends.slurm import queue
from launcher.node import journal
from launcher.run import Result
from launcher.runs import Phase, poll

RUN = "demo-20261121-031502-4f2a90c1"
GONE = Result(1, "", "slurm_load_jobs error: Invalid job id specified")
LATE = Result(None, "", "squeue did not answer within 30 s")
MUNGE = Result(1, "", 'squeue: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2"')
DOWN = Result(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
OFF = Result(1, "", "Slurm accounting storage is disabled")
SILENT = [LATE, MUNGE, DOWN, Result(0, "", ""), Result(0, "\x00\xff<html>502</html>\n", ""), Result(1, "", ""),
          Result(127, "", "squeue: symbol lookup error"), Result(-9, "", ""), Result(0, "7\n", ""),
          Result(None, "", "squeue: command not found")]  # fmt: skip


def row(job: str = "7", word: str = "RUNNING", *, name: str = RUN, code: str = "0", nodes: str = "node[1-4]",
        submitted: str = "2026-11-21T03:15:03", comment: str = "", reason: str = "None") -> str:  # fmt: skip
    cells = {"JobID": job, "State": word, "SubmitTime": submitted, "exit_code": code, "Name": name,
             "Comment": comment, "NodeList": nodes, "Reason": reason}  # fmt: skip
    return "".join(cells[column].ljust(width) for column, width in queue.COLUMNS) + "\n"


def shown(word: str, code: str = "0:0", *, name: str = RUN, comment: str = "") -> Result:
    text = f"JobId=7 JobName={name} JobState={word} Reason=None SubmitTime=2026-11-21T03:15:03 ExitCode={code} "
    return Result(0, f"{text}Comment={comment} StdOut=/x JobState=COMPLETED\n", "")


def listed(word: str, code: str = "0:0", *, name: str = RUN) -> Result:
    return Result(0, f"7|{word}|2026-11-21T03:15:03|{code}|{name}|\n", "")


def answering(**replies: Result):
    """A Slurm that answers each command with the given reply, and everything else with silence."""
    return lambda argv, **_: replies.get(argv[0], Result(None, "", f"{argv[0]} did not answer within 30 s"))


def record(folder, *, job: str = "7", name: str = RUN) -> runs.Record:
    return runs.Record(name, folder, "slurm", job, "demo", 10, {})


@pytest.mark.parametrize(
    ("replies", "marker", "state", "code"),
    [
        ({"squeue": Result(0, row(), "")}, None, State.RUNNING, None),
        # scenario 45: words that are not an end, and one that nobody has seen
        ({"squeue": Result(0, row(word="CONFIGURING"), "")}, None, State.PENDING, None),
        ({"squeue": Result(0, row(word="REQUEUE_HOLD"), "")}, None, State.PENDING, None),
        ({"squeue": Result(0, row(word="SUSPENDED"), "")}, None, State.RUNNING, None),
        ({"squeue": Result(0, row(word="RESIZING"), "")}, None, State.RUNNING, None),
        ({"squeue": Result(0, row(word="POLISHING"), "")}, None, State.UNKNOWN, None),
        ({"squeue": Result(0, row(word="FAILED", code="1792"), "")}, None, State.FAILED, 7),
        ({"squeue": Result(0, row(word="FAILED", code="9"), "")}, None, State.FAILED, 137),
        ({"squeue": Result(0, row(word="NODE_FAIL"), "")}, None, State.FAILED, None),
        ({"squeue": Result(0, row(word="COMPLETED"), "")}, 0, State.COMPLETED, 0),
        # exit 0 without the script's own mark: its shell was killed, and Slurm does not know
        ({"squeue": Result(0, row(word="COMPLETED"), "")}, None, State.UNKNOWN, 0),
        # a job that was submitted again by itself is the run's newest
        ({"squeue": Result(0, row(word="FAILED", code="256") + row("12", "PENDING"), "")}, 1, State.PENDING, None),
        # scenario 44: our number, another's job; by hand, with the script's own name; the same, older than the run
        ({"squeue": Result(0, "", ""), "scontrol": shown("RUNNING", name="other")}, None, State.UNKNOWN, None),
        ({"squeue": Result(0, "", ""), "scontrol": shown("RUNNING", name="demo")}, None, State.RUNNING, None),
        (
            {"squeue": Result(0, "", ""), "scontrol": shown("RUNNING", name="demo", comment="dslaunch:demo-other")},
            None,
            State.UNKNOWN,
            None,
        ),
        (
            {
                "squeue": Result(0, "", ""),
                "scontrol": GONE,
                "sacct": Result(0, "7|FAILED|2026-11-20T03:15:03|1:0|demo|\n", ""),
            },
            None,
            State.UNKNOWN,
            None,
        ),
        # scenario 43: forgotten after MinJobAge; sacct, else the script's mark, else nobody knows
        ({"squeue": Result(0, "", ""), "scontrol": shown("COMPLETED")}, 0, State.COMPLETED, 0),
        ({"squeue": Result(0, "", ""), "scontrol": shown("NODE_FAIL")}, None, State.FAILED, None),
        ({"squeue": Result(0, "", ""), "scontrol": shown("FAILED", "0:9")}, None, State.FAILED, 137),
        (
            {"squeue": Result(0, "", ""), "scontrol": GONE, "sacct": listed("CANCELLED by 1000", "0:15")},
            None,
            State.CANCELLED,
            143,
        ),
        ({"squeue": Result(0, "", ""), "scontrol": GONE, "sacct": listed("OUT_OF_MEMORY", "0:125")}, 137,
         State.FAILED, 137),
        ({"squeue": Result(0, "", ""), "scontrol": GONE, "sacct": Result(0, "", "")}, None, State.UNKNOWN, None),
        ({"squeue": Result(0, "", ""), "scontrol": GONE, "sacct": OFF}, 0, State.COMPLETED, 0),
        ({"squeue": Result(0, "", ""), "scontrol": GONE, "sacct": OFF}, 7, State.FAILED, 7),
        # scenarios 41 and 42: munge, the controller or the database does not answer: the job is presumed alive
        ({"squeue": MUNGE}, None, State.UNKNOWN, None),
        ({"squeue": DOWN}, 0, State.UNKNOWN, None),
        ({"squeue": Result(0, "", ""), "scontrol": LATE, "sacct": listed("FAILED")}, None, State.UNKNOWN, None),
        ({}, 0, State.UNKNOWN, None),
    ],
)  # fmt: skip
def test_what_slurm_answers_becomes_a_state_and_silence_is_unknown(tmp_path, replies, marker, state, code):
    if marker is not None:
        (tmp_path / "exit-code").write_text(f"{marker}\n")
    found = queue.states([record(tmp_path)], answering(**replies))[RUN]
    assert (found.state, found.code) == (state, code)


def test_one_squeue_asks_for_all_runs_and_settings_of_the_shell_do_not_hide_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "elsewhere")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/here")
    calls = []

    def run(argv, *, env):
        calls.append(argv)
        assert not [name for name in env if name.startswith(("SQUEUE_", "SLURM_")) and name != "SLURM_CONF"]
        return Result(0, "".join(row(str(i), name=f"demo-20261121-031502-{i:08x}") for i in range(500)), "")

    records = [record(tmp_path, job=str(i), name=f"demo-20261121-031502-{i:08x}") for i in range(500)]
    found = queue.states(records, run)
    assert {status.state for status in found.values()} == {State.RUNNING}
    assert [found[one.id].job for one in records] == [str(i) for i in range(500)]
    assert len(calls) == 1


# --- what is known ------------------------------------------------------------------------------


def test_silence_keeps_the_last_answer_and_its_age_and_a_verdict_stays():
    """Scenario 42: the state is shown as stale, with its age."""
    known = poll.step(poll.Known(), Status(State.RUNNING, "running", job="7"), 100.0)
    quiet = poll.step(known, Status(State.UNKNOWN, "Slurm did not answer"), 134.0)
    assert (quiet.shown.state, quiet.age(134.0), quiet.status.state) == (State.UNKNOWN, 34.0, State.RUNNING)
    back = poll.step(quiet, Status(State.RUNNING, "running", job="7"), 144.0)
    assert (back.shown.state, back.age(144.0), back.since) == (State.RUNNING, 0.0, 100.0)
    over = poll.step(back, Status(State.FAILED, "failed", 7, "7"), 200.0)
    assert poll.step(over, Status(State.UNKNOWN, "gone", absent=True), 600.0).shown == over.status
    again = poll.step(over, Status(State.PENDING, "pending", job="7"), 210.0)  # scontrol requeue
    assert again.shown.state is State.PENDING


def test_a_job_that_is_not_there_is_never_a_failure_and_gone_only_when_said_twice_minjobage_apart():
    """Scenario 43."""
    known = poll.step(poll.Known(), Status(State.RUNNING, "running", job="7"), 0.0)
    absent = Status(State.UNKNOWN, "Slurm no longer knows job 7", absent=True)
    for now in range(10, 310, 10):
        known = poll.step(known, absent, float(now))
        assert (known.shown.state, known.gone(float(now))) == (State.UNKNOWN, False)
    known = poll.step(known, absent, 311.0)
    assert known.gone(311.0)
    assert known.shown.state is State.UNKNOWN
    assert not poll.step(known, Status(State.UNKNOWN, "Slurm did not answer"), 321.0).gone(321.0)


LIVE = [Result(0, row(word=word), "") for word in
        ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "RESIZING", "POLISHING")]  # fmt: skip
DAY = 8640  # questions, one every 10 s


@pytest.fixture(scope="module")
def silences(tmp_path_factory):
    """What every mixture of late, empty, broken and refused answers comes to."""
    folder = tmp_path_factory.mktemp("run")
    called = set()

    def ask(replies):
        def run(argv, **_):
            called.add(" ".join(argv[:1] if argv[0] != "scontrol" else argv[:4]))
            return replies[argv[0]]

        return queue.states([record(folder)], run)[RUN]

    kinds = [*SILENT, GONE, OFF]
    found = [
        ask({"squeue": a, "scontrol": b, "sacct": c}) for a, b, c in itertools.product([*SILENT, GONE], kinds, kinds)
    ]
    assert called <= {"squeue", "sacct", "scontrol --oneliner show job"}  # what asks; nothing that starts or ends
    return found


def test_no_mixture_of_silence_is_a_verdict(silences):
    assert len(silences) == 11 * 12 * 12
    assert {status.state for status in silences} == {State.UNKNOWN}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_day_without_any_status_source_leaves_a_healthy_job_alone(silences, seed, quiet):
    """Scenarios 42 and 65: 24 hours at a question every 10 s, every mixture of errors, with and without true answers
    in between: never over, and the age is that of the last true answer."""
    rng = random.Random(seed)
    known = poll.step(poll.Known(), Status(State.RUNNING, "running", job="7"), 0.0)
    story = runs.Story(phase=Phase.RUNNING, job="7")
    last = 0.0
    for turn in range(1, DAY + 1):
        now = 10.0 * turn
        if rng.random() < quiet:
            known = poll.step(known, rng.choice(silences), now)
            assert known.age(now) == now - last
        else:
            known = poll.step(known, Status(State.RUNNING, "running", job="7"), now)
            last = now
        phase, _ = poll.standing(story, known)
        assert phase is (Phase.RUNNING if last == now else Phase.UNKNOWN)
    known = poll.step(known, Status(State.RUNNING, "running", job="7"), 86_401.0)
    assert poll.standing(story, known) == (Phase.RUNNING, "running")


def test_a_live_word_is_never_over(tmp_path):
    """Scenario 45."""
    for reply in LIVE:
        assert not queue.states([record(tmp_path)], answering(squeue=reply))[RUN].state.over


def test_a_job_that_goes_on_by_itself_is_not_over_with_its_first_job():
    story = runs.Story(phase=Phase.RECOVERING, job="7", attempts=(runs.Attempt(0, ended=True),), decision="resubmit")
    failed = Status(State.FAILED, "failed", 1, "7")
    known = poll.step(poll.Known(), failed, 0.0)
    assert poll.standing(story, known)[0] is Phase.RECOVERING
    assert poll.due(known, Phase.RECOVERING, 10.0)
    silent = poll.step(known, Status(State.UNKNOWN, "Slurm did not answer"), 500.0)  # an old word is no new one
    assert poll.standing(story, silent)[0] is Phase.RECOVERING
    queued = poll.step(silent, Status(State.PENDING, "pending", job="8"), 510.0)
    assert poll.standing(story, queued)[0] is Phase.RECOVERING
    lost = poll.step(silent, failed, 510.0)
    assert poll.standing(story, lost) == (Phase.FAILED, "failed; the job that should have followed did not come")


@pytest.mark.parametrize(
    ("status", "phase", "attempts", "expected"),
    [
        (Status(State.PENDING), Phase.QUEUED, (), Phase.QUEUED),
        (Status(State.PENDING), Phase.RUNNING, (runs.Attempt(0),), Phase.RECOVERING),
        (Status(State.RUNNING), Phase.QUEUED, (), Phase.RUNNING),
        (Status(State.RUNNING), Phase.PREFLIGHT, (), Phase.PREFLIGHT),
        (Status(State.RUNNING), Phase.UNKNOWN, (), Phase.RUNNING),
        (Status(State.COMPLETED, code=0), Phase.RUNNING, (), Phase.DONE),
        (Status(State.CANCELLED), Phase.RECOVERING, (), Phase.CANCELLED),
        (Status(State.UNKNOWN, "no answer"), Phase.RUNNING, (), Phase.UNKNOWN),
        (Status(State.UNKNOWN, "no answer"), Phase.DONE, (), Phase.DONE),  # the job itself wrote that it finished
    ],
)
def test_where_a_run_stands_is_the_scheduler_s_word_and_the_job_s_own(status, phase, attempts, expected):
    known = poll.step(poll.Known(), status, 5.0)
    assert poll.standing(runs.Story(phase=phase, attempts=attempts), known)[0] is expected


@given(
    st.builds(
        poll.Known,
        st.builds(
            Status, st.sampled_from(State), st.text(), st.none() | st.integers(0, 255), st.text(), st.booleans()
        ),
        *[st.none() | st.floats(0, 2e9)] * 3,
        st.text(),
        st.none() | st.floats(0, 2e9),
    )
)
def test_what_was_seen_comes_back_from_disk(known):
    assert poll.from_json(json.loads(json.dumps(poll.to_json(known)))) == known


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"status": 1}', '{"status": {"state": "dancing"}}'])
def test_a_damaged_file_of_what_was_seen_is_nothing_seen(tmp_path, text):
    (tmp_path / "seen.json").write_text(text)
    assert poll.seen(record(tmp_path)) == poll.Known()


# --- shared --------------------------------------------------------------------------------------


class Slurm:
    """Answers for every run in it, counts how often it is asked, and tells its own time."""

    def __init__(self) -> None:
        self.asked, self.now, self.word = 0, 1000.0, "RUNNING"
        self.lock = threading.Lock()

    def __call__(self, argv, **_):
        assert argv[0] == "squeue"
        with self.lock:
            self.asked += 1
        names = next(word for word in argv if word.startswith("--name=")).partition("=")[2].split(",")
        time.sleep(0.05)
        return Result(0, "".join(row(str(i), self.word, name=name) for i, name in enumerate(names)), "")

    def look(self, records, **options):
        return poll.states(records, run=self, clock=lambda: self.now, **options)


@pytest.fixture
def five(tmp_path):
    for number in range(5):
        folder = tmp_path / f"demo-20261121-031502-0000000{number}"
        folder.mkdir(mode=0o700)
        journal.append(folder, "submitting", backend="slurm", name="demo", steps=10, extra={}, token=folder.name)
        journal.append(folder, "submitted", job=str(number))
    return [runs.read(folder) for folder in sorted(tmp_path.iterdir())]


@pytest.mark.slow
def test_five_runs_and_three_watchers_are_one_question_every_ten_seconds(five):
    slurm = Slurm()
    groups = [five, five[:2], five[3:]]
    for second in range(60):
        slurm.now = 1000.0 + second
        watchers = [threading.Thread(target=slurm.look, args=(group,), kwargs={"patient": True}) for group in groups]
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join()
    assert slurm.asked == 6
    found = slurm.look(five, patient=True)
    assert {known.shown.state for known in found.values()} == {State.RUNNING}
    for one in five:
        assert stat.S_IMODE((one.folder / "seen.json").stat().st_mode) == 0o600
        told = [entry["state"] for entry in runs.read(one.folder).entries if entry["event"] == "state"]
        assert told == ["running"]  # once, whoever asked


def test_a_command_that_looks_once_is_answered_at_once_and_then_from_what_was_seen(five):
    slurm = Slurm()
    assert slurm.look(five[:1])[five[0].id].shown.state is State.RUNNING
    assert slurm.look(five[1:2])[five[1].id].shown.state is State.RUNNING
    assert slurm.asked == 2
    slurm.now += 9
    slurm.look(five[:2])
    assert slurm.asked == 2
    slurm.word = "CANCELLED"
    assert slurm.look(five[:1], fresh=True)[five[0].id].shown.state is State.CANCELLED
    slurm.now += 1000
    slurm.look(five[:1])  # a verdict is not asked for again
    assert slurm.asked == 3


def test_a_full_disk_makes_nobody_ask_more_often(five, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(poll, "_write", full)
    slurm = Slurm()
    for _ in range(12):
        found = slurm.look(five, patient=True)
        slurm.now += 2
    assert {known.shown.state for known in found.values()} == {State.RUNNING}
    assert slurm.asked == 3  # in 24 s


def test_a_job_that_was_queued_again_after_its_verdict_is_asked_for_again(five):
    slurm = Slurm()
    slurm.word = "FAILED"
    assert slurm.look(five[:1])[five[0].id].shown.state is State.FAILED
    journal.append(five[0].folder, "started", job="7", restart=1, host="node1")
    slurm.word = "RUNNING"
    slurm.now += 11
    again = runs.read(five[0].folder)
    assert slurm.look([again])[again.id].shown.state is State.RUNNING


def test_a_run_that_was_never_submitted_is_not_asked_for(tmp_path):
    folder = tmp_path / RUN
    folder.mkdir()
    journal.append(folder, "rendered", backend="slurm", name="demo", steps=10, extra={})
    slurm = Slurm()
    assert poll.standing(runs.read(folder).story, slurm.look([runs.read(folder)])[RUN])[0] is Phase.RENDERED
    assert slurm.asked == 0
