"""Submitting exactly once, against a scheduler that answers late, twice, wrongly or never, killed at every point."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from launcher import runs
from launcher.errors import Problem, Unreachable, UserError
from launcher.runs import Phase, fold
from launcher.runs import submit as submission

TOKEN = "demo-20261121-031502-4f2a90c1"
LATEST = 0.9 * submission.SETTLE  # seconds after the client gave up at which a request is taken at last


class Killed(BaseException):
    """kill -9: nothing of the process runs any more."""


@dataclass
class Job:
    id: str
    taken: float  # when the scheduler has it
    starts: float
    cancelled: bool = False


@dataclass
class World:
    """A scheduler, a clock and the journal on disk. Answers come from a script; when it ends, they are good."""

    submits: list[str] = field(default_factory=list)
    look_ups: list[str] = field(default_factory=list)
    unique: bool = False  # Kubernetes: names are, so a second creation finds the first
    seed: int = 0
    now: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    journal: list[dict] = field(default_factory=list)
    kill_at: int | None = None
    points: int = 0
    sent_until: float = 0.0  # an orphan of a killed client is at work until then

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # what the scheduler does

    def take(self, late: float = 0.0) -> Job:
        if self.unique and self.jobs:
            return self.jobs[0]
        job = Job("", self.now + late, self.now + late + self.random.choice((0.0, 5.0, 40.0, 1e9)))
        self.jobs.append(job)
        return job

    def there(self) -> list[Job]:
        """Numbers are given in the order in which requests are taken."""
        taken = sorted((job for job in self.jobs if job.taken <= self.now), key=lambda job: job.taken)
        for number, job in enumerate(taken, 12):
            job.id = job.id or str(number)
        return taken

    def started(self, job: Job) -> bool:
        """As a singleton: only the oldest that lives may."""
        first = next((one for one in self.there() if not one.cancelled), None)
        return job is first and job.starts <= self.now

    # what the client sees

    def point(self) -> bool:
        """One more place at which the client can be killed; whether it is here."""
        self.points += 1
        return self.kill_at is not None and self.points == self.kill_at

    def effects(self) -> submission.Effects:
        return submission.Effects(
            self.note, self.submit, self.look_up, self.cancel, lambda: self.now < self.sent_until, lambda: self.now,
            self.sleep, lambda: self.random.uniform(0.5, 1.5),
        )  # fmt: skip

    def note(self, event: str, **fields: object) -> None:
        if self.point():
            raise Killed
        self.journal.append({"event": event, "time": self.now, **fields})
        if self.point():
            raise Killed

    def submit(self) -> str:
        does = self.submits.pop(0) if self.submits else "takes"
        if self.point():  # the client dies; its sbatch lives on, and may or may not get through
            if self.random.random() < 0.7 and does not in ("refuses", "down"):
                self.take(late := self.random.uniform(0, submission.ANSWER))
                self.sent_until = self.now + late
            raise Killed
        self.there()
        if does == "refuses" or (does == "one at most" and self.there()):
            self.now += 1
            raise UserError(Problem("Slurm refuses the job: invalid partition specified: x"))
        if does == "down":
            self.now += 1
            raise submission.Unsent(Problem("Unable to contact slurm controller (connect failure)", "scontrol ping"))
        if does in ("loses", "takes unheard", "takes late"):
            if does == "takes unheard":
                self.take()
            self.now += submission.ANSWER
            if does == "takes late":
                self.take(late=self.random.uniform(0, LATEST))
            raise Unreachable(Problem("sbatch did not answer within 30 s"))
        job = self.take()
        self.now += 1
        self.there()
        if self.point():
            raise Killed
        return job.id

    def look_up(self) -> list[tuple[str, bool]]:
        if self.point():
            raise Killed
        self.now += 0.1
        if (self.look_ups.pop(0) if self.look_ups else "answers") == "fails":
            self.now += 5
            raise Unreachable(Problem("slurm_load_jobs error: Unable to contact slurm controller"))
        return [(job.id, self.started(job)) for job in self.there() if not job.cancelled]

    def cancel(self, job: str) -> None:
        if self.point():
            raise Killed
        next(one for one in self.jobs if one.id == job).cancelled = True
        if self.point():
            raise Killed

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.point():
            raise Killed

    # the command a user types

    def command(self) -> submission.Outcome | None:
        """As `dslaunch slurm` goes about it: first what an earlier one left, then, if there is no job, submit."""
        story = fold(self.journal)
        if story.open:
            submission.resume(self.effects())
            story = fold(self.journal)
        return None if story.job else submission.submit(self.effects(), TOKEN)

    def status(self) -> None:
        if fold(self.journal).open:
            submission.resume(self.effects())

    def wrong(self) -> str:
        """What the world and the journal disagree about; empty when nothing."""
        self.now += 1000
        live = [job for job in self.there() if not job.cancelled]
        story = fold(self.journal)
        if len(live) > 1:
            return "duplicate"
        if story.open:
            return ""  # it says that nobody knows
        if (live[0].id if live else "") != story.job:
            return "lost"
        return ""


def play(world: World, *, kills: list[int], statuses: random.Random | None = None) -> Counter:
    """Commands until one ends by itself; each is killed at its point. What happened, counted."""
    seen: Counter = Counter()
    for kill in [*kills, None, None, None]:
        world.kill_at, world.points = kill, 0
        try:
            (world.status if statuses and statuses.random() < 0.3 else world.command)()
            seen["ended"] += 1
        except Killed:
            seen["killed"] += 1
            world.now += world.random.choice((0.0, 1.0, 30.0, 700.0))
            continue
        except Unreachable:
            seen["nobody knows"] += 1
            world.now += 10
            continue
        except UserError:
            seen["refused"] += 1
        if fold(world.journal).job or seen["refused"]:
            break
    return seen


SUBMITS = ("takes", "loses", "takes unheard", "takes late", "refuses", "one at most", "down")
LOOKS = ("answers", "fails")


@pytest.mark.slow
@pytest.mark.parametrize("unique", [False, True], ids=["slurm", "kubernetes"])
def test_ten_thousand_random_schedules_leave_no_job_twice_and_none_unknown(unique, capsys):
    """scenarios 37, 38, 54 and 55: 10,000 for a scheduler with numbers, as many with names."""
    total: Counter = Counter()
    for seed in range(10_000):
        dice = random.Random(seed)
        world = World(
            submits=dice.choices(SUBMITS, (3, 3, 4, 4, 1, 2, 2), k=dice.randrange(4)),
            look_ups=dice.choices(LOOKS, (3, 1 + 3 * (seed % 3)), k=dice.randrange(12)),
            unique=unique, seed=seed,
        )  # fmt: skip
        total += play(world, kills=[dice.randrange(1, 14) for _ in range(dice.randrange(3))], statuses=dice)
        assert world.wrong() == "", (seed, world.journal, world.jobs)
        total["jobs"] += sum(not job.cancelled for job in world.jobs)
        total["cancelled"] += sum(job.cancelled for job in world.jobs)
    assert total["killed"] > 4000
    assert total["jobs"] > 8000
    with capsys.disabled():
        print(f"\n{'kubernetes' if unique else 'slurm'}: 10000 schedules, 0 duplicates, 0 lost; {dict(total)}")


@pytest.mark.slow
@pytest.mark.parametrize("unique", [False, True], ids=["slurm", "kubernetes"])
def test_every_crash_point_of_every_short_script(unique):
    """scenario 55: each script of two answers to submissions and two to look-ups, killed at each of its points."""
    played = 0
    for submits, looks in itertools.product(itertools.product(SUBMITS, repeat=2), itertools.product(LOOKS, repeat=2)):
        for point in itertools.count(1):
            world = World(list(submits), list(looks), unique, seed=point)
            killed = play(world, kills=[point])["killed"]
            assert world.wrong() == "", (submits, looks, point, world.journal, world.jobs)
            played += 1
            if not killed:
                break
    assert played > 2500


def ends(world: World) -> tuple[list[str], submission.Outcome]:
    outcome = submission.submit(world.effects(), TOKEN)
    return [entry["event"] for entry in world.journal], outcome


def test_an_answer_is_one_submission():
    events, outcome = ends(World())
    assert (events, outcome) == (["submitting", "submitted"], submission.Outcome("12"))


def test_a_time_out_after_slurm_took_the_job_is_looked_up_and_adopted():
    """scenario 38"""
    events, outcome = ends(World(["takes unheard"]))
    assert events == ["submitting", "unanswered", "adopted"]
    assert outcome == submission.Outcome("12", adopted=True)


def test_a_lost_request_is_sent_again_after_the_settle_time_and_not_before():
    """scenario 38: what arrives within the settle time is found, so nothing is sent twice."""
    world = World(["loses"])
    events, outcome = ends(world)
    assert events == ["submitting", "unanswered", "absent", "submitting", "submitted", "adopted"]
    assert outcome.job == "12"
    times = [entry["time"] for entry in world.journal]
    assert times[2] - times[1] >= submission.SETTLE
    for seed in range(50):
        assert ends(World(["takes late"], seed=seed))[0] == ["submitting", "unanswered", "adopted"]


def test_a_controller_that_stays_away_is_exit_8_and_the_next_command_goes_on():
    """scenario 37"""
    world = World(["loses"], ["fails"] * 1000)
    with pytest.raises(Unreachable, match="Unable to contact") as caught:
        ends(world)
    assert "looks for it before anything else" in caught.value.problems[0].hint
    assert world.now < submission.ANSWER + submission.SETTLE + submission.PATIENCE + 12
    assert fold(world.journal).phase is Phase.UNKNOWN
    world.look_ups = []
    assert world.command() == submission.Outcome("12")
    assert world.wrong() == ""


def test_a_controller_that_comes_back_may_have_requests_to_work_off():
    """scenario 38: nothing is found before it goes away, and the job 15 s after it is back."""
    world = World(["loses"], ["answers", *["fails"] * 4])
    look_up = world.look_up

    def backlog() -> list[tuple[str, bool]]:
        if len(world.look_ups) == 1:
            world.take(late=5 + 15)
        return look_up()

    world.look_up = backlog  # type: ignore[method-assign]
    assert ends(world) == (["submitting", "unanswered", "adopted"], submission.Outcome("12", adopted=True))


def test_a_controller_that_takes_nothing_is_asked_three_times():
    """scenario 37: bounded; with a look-up before each where the request may have arrived."""
    for does, events in (("loses", ["submitting", "unanswered", "absent"]), ("down", ["submitting", "absent"])):
        world = World([does] * 9)
        with pytest.raises(Unreachable, match="nothing was submitted, in 3 tries: ") as caught:
            ends(world)
        assert "the same command" in caught.value.problems[0].hint
        assert [entry["event"] for entry in world.journal] == events * 3
        assert fold(world.journal).phase is Phase.RENDERED


def test_a_refusal_is_final_and_says_so():
    """scenario 39"""
    world = World(["refuses"])
    with pytest.raises(UserError, match="invalid partition"):
        ends(world)
    assert [entry["event"] for entry in world.journal] == ["submitting", "refused"]


def test_a_job_that_arrives_beside_its_second_try_is_kept_and_the_younger_cancelled():
    """scenario 38: later than the settle time; the older has the lower number."""
    world = World(["loses"])
    note = world.note

    def late(event: str, **fields: object) -> None:
        note(event, **fields)
        if event == "absent":
            world.take().starts = 1e9

    world.note = late  # type: ignore[method-assign]
    events, outcome = ends(world)
    assert events[-2:] == ["submitted", "adopted"]
    assert outcome == submission.Outcome("12", adopted=True, cancelled=("13",))
    assert world.wrong() == ""


@pytest.mark.parametrize(
    ("found", "keep", "cancelled"),
    [
        ([("9", False), ("10", False)], "9", ("10",)),  # numbers, not words
        ([("9", False), ("10", True)], "10", ("9",)),
        ([("9", True), ("10", True)], "9", ()),  # who trains is never cancelled
        ([("10", False), ("10", True), ("9", False)], "10", ("9",)),
    ],
)
def test_which_of_two_jobs_is_the_run_s(found, keep, cancelled):
    gone: list[str] = []
    world = World()
    effects = world.effects()
    effects = submission.Effects(**{**vars(effects), "cancel": gone.append})
    outcome = submission.adopt(effects, found)
    assert (outcome.job, outcome.cancelled, tuple(gone)) == (keep, cancelled, cancelled)


S = {"event": "submitting", "time": 1.0, "token": TOKEN, "again": 0}


@pytest.mark.parametrize(
    ("events", "phase", "job"),
    [
        ([], Phase.PLANNED, ""),
        ([{"event": "rendered"}], Phase.RENDERED, ""),
        ([S], Phase.SUBMITTING, ""),
        ([S, {"event": "unanswered"}], Phase.UNKNOWN, ""),
        ([S, {"event": "unanswered"}, {"event": "adopted", "job": "7"}], Phase.QUEUED, "7"),
        ([S, {"event": "absent"}], Phase.RENDERED, ""),
        ([S, {"event": "submitted", "job": 7}], Phase.QUEUED, "7"),
        ([S, {"event": "submitted", "job": "7"}, {"event": "started", "job": "7"}], Phase.PREFLIGHT, "7"),
        # the scheduler knows nothing of preflights and recoveries
        ([{"event": "started", "job": "7"}, {"event": "state", "state": "running"}], Phase.PREFLIGHT, "7"),
        ([{"event": "attempt", "attempt": 0}, {"event": "state", "state": "SUSPECT"}], Phase.SUSPECT, ""),
        ([{"event": "attempt", "attempt": 0}, {"event": "state", "state": "polishing"}], Phase.UNKNOWN, ""),
        ([{"event": "attempt", "attempt": 0}, {"event": "state", "state": "unknown"}], Phase.UNKNOWN, ""),
        (
            [{"event": "attempt", "attempt": 0}, {"event": "decided", "attempt": 0, "action": "requeue"}],
            Phase.RECOVERING,
            "",
        ),
        ([{"event": "requeued"}, {"event": "state", "state": "pending"}], Phase.RECOVERING, ""),
        (
            [{"event": "attempt", "attempt": 0}, {"event": "decided", "attempt": 0, "action": "stop"}],
            Phase.FAILED,
            "",
        ),
        ([{"event": "finished", "code": 0}], Phase.DONE, ""),
        ([{"event": "finished", "code": 7}], Phase.FAILED, ""),
        ([{"event": "cancelled"}, {"event": "finished", "code": 143}], Phase.CANCELLED, ""),
        ([{"event": "finished", "code": 0}, {"event": "state", "state": "unknown"}], Phase.DONE, ""),
        ([{"event": "state", "state": "failed"}, {"event": "attempt", "attempt": 1}], Phase.RUNNING, ""),
        ([S, {"event": "resubmitting", "token": TOKEN}, {"event": "unanswered"}], Phase.UNKNOWN, ""),
        ([{"event": "started", "job": "7"}, {"event": "resubmitted", "job": "9"}], Phase.RECOVERING, "9"),
        ([{"event": "preflight", "code": 20}], Phase.FAILED, ""),
    ],
)
def test_a_journal_is_a_state(events, phase, job):
    """scenario 45: what the scheduler says in a word nobody has seen is UNKNOWN."""
    story = fold(events)
    assert (story.phase, story.job) == (phase, job)


def test_a_job_s_own_successor_is_not_looked_for_from_outside():
    """Both are there for a moment, and the younger is the one to keep."""
    story = fold([S, {"event": "submitted", "job": "7"}, {"event": "resubmitting", "token": TOKEN}])
    assert (story.open, story.phase, story.job) == (False, Phase.RECOVERING, "7")
    assert not fold([S, {"event": "started", "job": "7"}, {"event": "resubmitting"}, {"event": "unanswered"}]).open


def test_attempts_are_told_with_how_each_ended():
    story = fold(
        [
            {"event": "attempt", "attempt": 0, "hosts": ["n1", "n2"]},
            {"event": "ended", "attempt": 0, "code": 137, "cause": "oom-host", "node": "n2", "rank": 3, "step": 41},
            {"event": "decided", "attempt": 0, "action": "requeue", "exclude": ["n2"], "why": "the node failed"},
            {"event": "attempt", "attempt": 1, "hosts": ["n1", "n3"]},
        ]
    )
    first, second = story.attempts
    assert (first.code, first.node, first.rank, first.step, first.ended) == (137, "n2", 3, 41, True)
    assert first.decision == story.decision == "requeue without n2: the node failed"
    assert (second.hosts, second.ended, story.phase) == (("n1", "n3"), False, Phase.RUNNING)


def test_runs_of_before_are_found_beside_new_ones(tmp_path):
    """Ids had four hex digits, and lines neither number nor checksum."""
    old, new = tmp_path / "demo-20261121-031502-4f2a", tmp_path / "demo-20261121-031503-4f2a90c1"
    for folder in (old, new):
        folder.mkdir()
    (old / "journal.jsonl").write_text(
        '{"time": 1.0, "event": "submitting", "backend": "slurm", "name": "demo", "steps": 9, '
        '"extra": {"per_node": 2}}\n'
        '{"time": 2.0, "event": "submitted", "job": "7"}\n'
    )
    runs.journal.append(new, "rendered", backend="local", name="demo", steps=9)
    assert runs.known(tmp_path) == [new, old]
    record = runs.find("demo-20261121-031502-4f2a", tmp_path)
    assert (record.job, record.backend, record.steps, record.extra, record.state) == (
        "7", "slurm", 9, {"per_node": 2}, Phase.QUEUED,
    )  # fmt: skip
    assert runs.find("demo", tmp_path).folder == new
    assert runs.ID.fullmatch(runs.new_id("demo"))["name"] == "demo"
