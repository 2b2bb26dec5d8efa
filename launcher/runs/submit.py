"""Submitting exactly once, as a state machine: what the machine and the scheduler do is handed in.

The intent stands in the journal before the scheduler is asked, its answer after. A question that was not answered is
never asked again before a look-up by the run's token has been answered twice, `settle` seconds apart, with "no such
job". What is found is adopted. The scheduler's own guard (Slurm: singleton, Kubernetes: the name) and the claim that
a job makes in the journal when it starts stand behind that, for a request that arrives later still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.errors import Problem, Unreachable, UserError

ANSWER = 30.0  # seconds that a scheduler's command is given; it is killed then, even when we are dead
SETTLE = 20.0  # twice Slurm's default MessageTimeout: by then a request that nobody waits for is in, or lost
PATIENCE = 30.0  # seconds for a look-up to be answered, beyond the settling
TRIES = 3
Found = tuple[str, bool]  # the scheduler's id of a job, and whether it has started


class Unsent(Unreachable):
    """The request never left this machine: there is nothing to look for."""


@dataclass(frozen=True)
class Effects:
    note: Callable[..., object]  # event, fields: on disk when it returns
    submit: Callable[[], str]  # the job's id; Unreachable: nobody knows; UserError: refused for good
    look_up: Callable[[], Sequence[Found]]  # jobs with the run's token; Unreachable: no answer
    cancel: Callable[[str], object]
    sending: Callable[[], bool]  # whether a command of a dead dslaunch may still be on its way to the scheduler
    now: Callable[[], float]
    sleep: Callable[[float], object]
    spread: Callable[[], float]  # 0.5 to 1.5, by chance: many that wait do not come back together


@dataclass(frozen=True)
class Outcome:
    job: str
    adopted: bool = False  # it was there already
    cancelled: tuple[str, ...] = ()  # younger ones of the same run that had not started


def submit(effects: Effects, token: str, *, settle: float = SETTLE) -> Outcome:
    """The one job of this run. Raises UserError when it is refused, Unreachable when nobody knows or nobody answers.

    A time-out after Slurm took the job: submitting, unanswered, look-up finds job 12, adopted.
    A time-out before: submitting, unanswered, two look-ups find nothing, absent, submitting, submitted.
    """
    problem = Problem("")
    doubtful = 0  # tries that were sent, and not answered
    for number in range(TRIES):
        if number:
            effects.sleep(2.0**number * effects.spread())
        effects.note("submitting", token=token, again=doubtful)
        try:
            job = effects.submit()
        except Unsent as error:
            problem = error.problems[0]
            effects.note("absent", why=problem.message)
        except Unreachable as error:
            problem = error.problems[0]
            effects.note("unanswered", why=problem.message)
            doubtful += 1
            if found := certain(effects, settle=settle):
                return adopt(effects, found)
            effects.note("absent", why=f"looked for it for {settle:g} s")
        except UserError as error:
            # because an earlier one is there, perhaps; and a refusal in words that nobody has seen may be none
            if found := certain(effects, settle=settle) if doubtful else _look(effects):
                return adopt(effects, found)
            effects.note("refused", why=str(error))
            raise
        else:
            effects.note("submitted", job=job)
            return adopt(effects, [(job, False), *_look(effects)], mine=job) if doubtful else Outcome(job)
    hint = f"{problem.hint or 'wait until it is back'}; then the same command"
    raise Unreachable(Problem(f"nothing was submitted, in {TRIES} tries: {problem.message}", hint))


def resume(effects: Effects, *, settle: float = SETTLE) -> Outcome | None:
    """What became of a submission that somebody began: the job that was found, or None as there is none.

    Raises Unreachable when nobody knows.
    """
    while effects.sending():
        effects.sleep(0.5)
    if found := certain(effects, settle=settle):
        return adopt(effects, found)
    effects.note("absent", why="nothing was submitted")
    return None


def certain(effects: Effects, *, settle: float) -> list[Found]:
    """Jobs with the token; none only when two look-ups that lie `settle` apart, and all in between, found none.

    Raises Unreachable when that cannot be had in `settle` + PATIENCE seconds.
    """
    deadline = effects.now() + settle + PATIENCE
    empty_since: float | None = None
    pause = 0.5
    while True:
        try:
            if found := list(effects.look_up()):
                return found
        except Unreachable as error:
            empty_since = None  # whoever was away may have requests to work off when it is back
            if effects.now() >= deadline:
                hint = "the job may exist: the same command, or dslaunch status, looks for it before anything else"
                raise Unreachable(*(Problem(one.message, one.hint or hint) for one in error.problems)) from None
        else:
            if empty_since is None:
                empty_since = effects.now()
            if effects.now() - empty_since >= settle:
                return []
        effects.sleep(pause * effects.spread())
        pause = min(pause * 2, 5.0)


def adopt(effects: Effects, found: Sequence[Found], *, mine: str = "") -> Outcome:
    """Of several the one that has started, else the oldest; younger ones that have not started are cancelled."""
    started = {job: any(has for one, has in found if one == job) for job, _ in found}
    keep, *others = sorted(started, key=lambda job: (not started[job], _age(job)))
    cancelled = []
    for job in others:
        if not started[job]:
            effects.cancel(job)
            cancelled.append(job)
    effects.note("adopted", job=keep, **({"cancelled": cancelled} if cancelled else {}))
    return Outcome(keep, keep != mine, tuple(cancelled))


def _age(job: str) -> tuple[int, str]:
    """Slurm counts upwards: 9 is older than 10."""
    return (int(job), "") if job.isdigit() else (0, job)


def _look(effects: Effects) -> list[Found]:
    """After a second try: whether the first has arrived as well. The guards behind stand in when nobody answers."""
    try:
        return list(effects.look_up())
    except Unreachable:
        return []
