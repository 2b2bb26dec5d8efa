"""Whether ranks still make progress, and which of them the others wait for."""

from __future__ import annotations

import re
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.diagnose import Hang
from launcher.supervision import PAUSE, QUIET, Fact, Told

FACTOR = 10  # times the median step: a step that takes longer than ten others is none
RECENT = 50  # steps that the median is taken of
REPORTS = 3  # steps that are made before one is late, and lines before a log is believed to tell of all


class Pace:
    """The steps of one rank, as seen from here. Times are this machine's monotonic clock.

    `since` is the last sign of life. Where steps are read out of a log any output is one: an evaluation of 20 minutes
    need not say a word that a pattern knows.
    """

    def __init__(self, now: float) -> None:
        self.told = Told()
        self.since = self.stepped = self.looked = now
        self.gaps: deque[float] = deque(maxlen=RECENT)  # between two reports of steps
        self.steps: deque[float] = deque(maxlen=RECENT)  # the same for each step
        self.reports = 0

    def note(self, told: Told | None, now: float) -> None:
        if now - self.looked > PAUSE:
            self.since += now - self.looked
            self.stepped += now - self.looked
        self.looked = now
        if told is None:
            return
        before, self.told = self.told, told
        stepped = told.mark != before.mark and told.mark >= 0
        quiet = told.phase in QUIET or before.phase in QUIET
        if stepped:
            if self.reports and not quiet:
                gap = now - self.stepped
                count = (told.step or 0) - (before.step or 0)
                self.steps.append(gap / count if count > 0 else gap)
                # a log may tell every tenth step, and is silent for ten; a rank by itself tells each
                self.gaps.append(self.steps[-1] if told.hooked else gap)
            self.reports += 1
        if stepped or quiet:
            self.since = self.stepped = now
        elif not told.hooked and told.heard != before.heard:
            self.since = now

    @property
    def settled(self) -> bool:
        """Whether its first steps, which compile and fill caches, are behind it."""
        return max(len(self.gaps), self.told.steps - 1) >= REPORTS

    @property
    def tells(self) -> bool:
        """Whether it can be held against this rank that it says nothing."""
        return self.told.hooked or self.reports >= REPORTS


@dataclass(frozen=True)
class Stall:
    """Ranks of this node that made no step for longer than the limit."""

    ranks: tuple[int, ...]
    step: int | None
    seconds: float
    limit: float


def limit(paces: Iterable[Pace], *, floor: float) -> float:
    """Steps of 1.3 s and a floor of 300 s: 300 s. Steps of 60 s: 600 s."""
    gaps = [gap for pace in paces for gap in pace.gaps]
    return max(FACTOR * statistics.median(gaps), floor) if gaps else floor


def step_seconds(paces: Iterable[Pace]) -> float | None:
    steps = [step for pace in paces for step in pace.steps]
    return statistics.median(steps) if steps else None


def stalled(paces: Mapping[int, Pace], now: float, *, floor: float, first_step: float) -> Stall | None:
    """None as long as all is well, which is also when nothing is known.

    A rank that tells its steps by itself stands still for itself. What is read out of logs counts only when all of
    them fall silent: a program may print its steps on one rank alone. Until three steps have been made `first_step`
    holds. A floor of 0 is never.
    """
    telling = {rank: pace for rank, pace in paces.items() if pace.tells}
    if not floor or not telling or any(pace.told.phase in QUIET for pace in paces.values()):
        return None
    late = {}
    for rank, pace in telling.items():
        patience = limit(telling.values(), floor=floor) if pace.settled else first_step
        if now - pace.since > patience:
            late[rank] = (now - pace.since, patience)
    hooked = [rank for rank in late if telling[rank].told.hooked]
    if not hooked and len(late) < len(telling):
        return None
    seconds, patience = max(late.values())
    steps = [pace.told.step for pace in telling.values() if pace.told.step is not None]
    return Stall(tuple(sorted(late)), min(steps, default=None), seconds, patience)


def verdict(facts: Iterable[Fact], *, seconds: float, limit: float, silent: Mapping[str, tuple[int, ...]]) -> Hang:
    """Whom the others wait for; the same on every node, as all look at the same facts.

    Rank 5 is stopped, ranks 0 to 4 are in all_reduce #1421: rank 5. `silent` are hosts, with their ranks, that no
    longer answer.
    """
    known = sorted(facts, key=lambda one: one.rank)
    steps = [one.step for one in known if one.step is not None]
    step = min(steps, default=0)
    waiting = Counter(one.doing for one in known if one.doing)
    collective = waiting.most_common(1)[0][0] if waiting else ""

    def named(kind: str, late: Iterable[Fact], words: str) -> Hang:
        late = list(late)
        ranks, hosts = tuple(one.rank for one in late), tuple(dict.fromkeys(one.host for one in late))
        others = [one for one in known if one.rank not in ranks and one.doing]
        in_what = Counter(one.doing for one in others).most_common(1)
        what = in_what[0][0] if in_what else collective
        waits = f"; {in_what[0][1]} of the others wait in {what}" if in_what else ""
        why = f"{_list('rank', ranks)} on {', '.join(hosts)} {words}{waits}"
        return Hang(step, seconds, limit, ranks, hosts, what, kind, why)  # type: ignore[arg-type]

    if silent:
        ranks = tuple(sorted(rank for found in silent.values() for rank in found))
        why = f"{', '.join(silent)} with {_list('rank', ranks)} no longer answers"
        return Hang(step, seconds, limit, ranks, tuple(silent), collective, "dead", why)
    if gone := [one for one in known if one.letter in ("", "Z", "X")]:
        return named("dead", gone, f"{_has(gone)} no process any more")
    if stopped := [one for one in known if one.letter in ("T", "t")]:
        return named("laggard", stopped, f"{_is(stopped)} stopped (state {stopped[0].letter})")
    if len(set(steps)) > 1:
        late = [one for one in known if one.step == step]
        return named("laggard", late, f"{_is(late)} at step {step}, others at {max(steps)}{_where(late)}")
    outside = [one for one in known if not one.doing]
    if waiting and outside and len(outside) < len(known):
        return named("laggard", outside, f"{_is(outside)} in no collective{_where(outside)}")
    groups: dict[str, dict[int, int]] = {}  # "" or " of group 3" -> rank -> the number of its call there
    for one in known:
        call = re.fullmatch(r"\w+ #(\d+)(.*)", one.doing)
        if call:
            groups.setdefault(call[2], {})[one.rank] = int(call[1])
    for numbers in groups.values():
        least, most = min(numbers.values()), max(numbers.values())
        if most > least:
            late = [one for one in known if numbers.get(one.rank) == least]
            return named("laggard", late, f"{_is(late)} only at {late[0].doing}{_where(late)}")
        words = Counter(one.doing for one in known if one.rank in numbers)
        if len(words) > 1:
            odd = [one for one in known if one.rank in numbers and one.doing != words.most_common(1)[0][0]]
            return named("desync", odd, f"{_is(odd)} in {odd[0].doing}")
    if len(waiting) == 1 and not outside:
        return Hang(
            step, seconds, limit, (), (), collective, "all wait", f"all {len(known)} ranks wait in {collective}"
        )
    return Hang(
        step, seconds, limit, (), (), collective, "unknown", f"{len(known)} ranks make no step{_where(known)}"
    )


def _list(word: str, numbers: tuple[int, ...]) -> str:
    """rank 5; ranks 0, 1, 2; of many the first eight."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{word}{'s' if len(numbers) != 1 else ''} {shown}"


def _is(late: list[Fact]) -> str:
    return "is" if len(late) == 1 else "are"


def _has(late: list[Fact]) -> str:
    return "has" if len(late) == 1 else "have"


def _where(late: list[Fact]) -> str:
    frames = list(dict.fromkeys(one.frame for one in late if one.frame))
    return f", in {frames[0]}" if frames else ""
