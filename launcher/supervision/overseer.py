"""Follows a node's ranks in a thread of its own: the beat, stragglers, and what is done about a hang.

Where all nodes see the logs, they agree on one verdict through files in `logs/hang-A/`: whoever notices leaves
`suspect-NODE`; node 0 looks whether all ranks are late and none is saving or evaluating, and writes `collect`; every
node then writes down what its ranks do, and `verdict.json` is made once, from all of it. A node 0 that no longer
answers is replaced by whoever comes first.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher import diagnose
from launcher.diagnose import Hang, flight
from launcher.supervision import (
    BEAT,
    FIRST,
    QUIET,
    Fact,
    Told,
    evidence,
    fact,
    hang,
    memory,
    patterns,
    progress,
    straggler,
    write,
)

LOOK = 1.0  # seconds between two looks at the ranks
QUEUE = 20  # beats of other nodes that node 0 reads a second, at most
GONE = 30.0  # seconds without a beat after which a node no longer answers
ANSWER = evidence.SECONDS + 10  # seconds that the others get to write down their facts
LATE = 10.0  # seconds after that until somebody else than node 0 concludes
TURN = 0.05  # seconds between two of these: all at once would read 1,000 files on each of 1,000 nodes
DUMPS = 512 << 20  # bytes of flight recorders' dumps that are read here, 10 s; `dslaunch diagnose` reads them all


@dataclass(frozen=True)
class Settings:
    node: int
    nodes: int  # supervisors: one a node, or one a rank
    name: str  # of this supervisor's files: node-0001, or node-0001-03 with one supervisor a rank
    host: str
    attempt: int
    logs: str
    shared: bool
    state: str  # where rank.py writes, on this node
    floor: float  # recover.hang
    first_step: float
    steps: int = 0  # of the whole run; 0: not known
    recorder: str = ""  # prefix of the flight recorders' dumps

    @property
    def folder(self) -> str:
        return os.path.join(self.logs, f"hang-{self.attempt}")

    @property
    def first(self) -> bool:
        """The one that decides for all, as long as it lives: rank 0's."""
        return self.name in FIRST

    @property
    def together(self) -> bool:
        return self.shared and self.nodes > 1


@dataclass
class Followed:
    """One rank, as its rank.py has written it down."""

    record: dict[str, Any]
    pace: hang.Pace
    log: patterns.Reader
    file: str
    told: Told = field(default_factory=Told)


def leave(path: str, value: Any) -> None:
    """Best effort: a full disk must not end a training run."""
    with contextlib.suppress(OSError):
        write(path, value)


def beat_of(name: str) -> str:
    """node-0001-03: beat-0001-03.json."""
    return name.replace("node-", "beat-", 1) + ".json"


def there(folder: str) -> bool:
    """Whether a folder is there, and what is in it, as of now.

    Opening it makes an NFS client ask again: a name that it once found missing stays missing to it for 30 s.
    """
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except OSError:
        return False
    return True


def read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def once(path: str, value: Any) -> None:
    """Only if nobody was quicker; what is there is whole at once."""
    draft = f"{path}.{os.uname().nodename}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(value, file)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # FUSE and SMB may have no links: of two that came at once the later one stays
            if not os.path.exists(path):
                os.replace(draft, path)
                return
        os.unlink(draft)


def hang_of(value: Mapping[str, Any]) -> Hang:
    known = {name: value[name] for name in Hang.__dataclass_fields__ if name in value}
    return Hang(**{**known, "ranks": tuple(known.get("ranks", ())), "hosts": tuple(known.get("hosts", ()))})


class Overseer(threading.Thread):
    """`hang` is set once, when the ranks are to be ended; `phase` is the supervisor's own before and after them."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.settings, self.say = settings, say
        self.phase = "starting"
        self.hang: Hang | None = None
        self.ended = threading.Event()
        self.ranks: dict[int, Followed] = {}
        self.oom_before = memory.count()
        self.named: set[int] = set()
        self.note = ""
        self.broken: set[str] = set()  # parts of ours that failed, each told once
        self.beaten = self.compared = self.asked = float("-inf")
        self.suspected: float | None = None  # when this node noticed
        self.seen: dict[
            str, tuple[float, float]
        ] = {}  # others' beats: their mtime and when it last changed, our clock

    def run(self) -> None:
        while not self.ended.wait(LOOK if self.beaten > float("-inf") else 0):
            now = time.monotonic()
            known = self.guarded(self.look, now)
            if known and self.hang is None and self.phase == "training":
                self.guarded(self.watch, now)
            if now - self.beaten >= BEAT:
                self.beaten = now
                self.guarded(self.beat, now)
                self.guarded(self.compare, now)

    def guarded(self, part: Callable[[float], None], now: float) -> bool:
        """Whether it went well. A mistake of ours ends no training: without a beat this node would count as lost."""
        try:
            part(now)
        except OSError as error:  # the logs' file system is away: nothing is known, nothing is done
            self.note = f"{error.strerror}: {error.filename}"
        except Exception as error:
            self.note = f"{type(error).__name__}: {error}"
            if part.__name__ not in self.broken:
                self.broken.add(part.__name__)
                traceback.print_exc()
        else:
            return True
        return False

    def stop(self) -> None:
        """The last beat is that of a node that has ended its ranks."""
        if self.ended.is_set():
            return
        self.ended.set()
        self.join(evidence.SECONDS + 5)
        now = time.monotonic()
        with contextlib.suppress(OSError):
            self.look(now)
        self.phase = "ending"
        self.beat(now)

    # What the ranks tell

    def look(self, now: float) -> None:
        state = self.settings.state
        for name in os.listdir(state):
            if name.startswith("rank-") and name.endswith(".json"):
                record = read(os.path.join(state, name))
                if record is None:
                    continue
                known = self.ranks.get(record["rank"])
                if known is not None:
                    known.record = record
                elif record["pid"] is not None:
                    self.phase = "training"
                    log = patterns.Reader(record["log"], record["log_from"])
                    file = os.path.join(state, f"progress-{record['rank']:05d}")
                    self.ranks[record["rank"]] = Followed(record, hang.Pace(now), log, file)
        for one in self.ranks.values():
            one.told = self.told(one)
            one.pace.note(one.told, now)

    def told(self, one: Followed) -> Told:
        """By the rank itself, else what its log says."""
        try:
            with open(one.file, "rb") as file:
                said = progress(file.read(4096))
        except OSError:
            said = None
        if said is None and one.told.hooked:  # it was just being written
            said = one.told
        if said is None or said.step is None:
            logged = one.log.read()
            if logged and logged.mark >= 0:
                said = replace(logged, pid=said.pid, doing=said.doing, stacks=said.stacks) if said else logged
            said = said or logged or one.told
        if self.settings.steps and said.step is not None and said.step >= self.settings.steps:
            return replace(said, phase="ending")
        return said

    def living(self) -> dict[int, Followed]:
        return {rank: one for rank, one in self.ranks.items() if one.record["ended"] is None}

    def step(self) -> int | None:
        return min((one.told.step for one in self.ranks.values() if one.told.step is not None), default=None)

    def oom_kills(self) -> int | None:
        return memory.grown(self.oom_before, memory.count())

    # The beat

    def beat(self, now: float) -> None:
        living = self.living()
        phases = [one.told.phase for one in living.values() if one.told != Told()]
        phase = next((name for name in ("checkpoint", "eval", "starting") if name in phases), self.phase)
        ages = [now - one.pace.since for one in living.values() if one.pace.tells]
        seconds = hang.step_seconds(one.pace for one in self.ranks.values())
        value = {
            "node": self.settings.node,
            "host": self.settings.host,
            "attempt": self.settings.attempt,
            "time": time.time(),
            "phase": phase if self.phase == "training" else self.phase,
            "step": self.step(),
            "step_seconds": None if seconds is None else round(seconds, 4),
            "progress_age": round(max(ages), 1) if ages else None,
            "ranks": {
                str(rank): {
                    "step": one.told.step,
                    "phase": one.told.phase if rank in living else "ended",
                    "busy": one.told.busy,
                    "least": one.told.least,
                    "age": round(now - one.pace.since, 1) if rank in living and one.pace.tells else None,
                    "doing": one.told.doing,
                }
                for rank, one in sorted(self.ranks.items())
            },
            "oom_kills": self.oom_kills(),
            "note": self.note,
        }
        leave(os.path.join(self.settings.logs, beat_of(self.settings.name)), value)

    def beats(self) -> dict[str, dict[str, Any]]:
        """Of all nodes whose ranks run, by file name; of this attempt."""
        found = {}
        for name in os.listdir(self.settings.logs):
            if name.startswith("beat-") and name.endswith(".json"):
                value = self.other(name)
                if value:
                    found[name] = value
        return found

    def other(self, name: str) -> dict[str, Any] | None:
        """The beat in this file, where it is one of this attempt and of ranks that run."""
        value = read(os.path.join(self.settings.logs, name))
        current = value and value.get("attempt") == self.settings.attempt and value.get("phase") != "ending"
        return value if current else None

    def compare(self, now: float) -> None:
        """Name the ranks that the others wait for at every step: node 0 of all, else each node of its own."""
        everywhere = self.settings.together
        if everywhere and not self.settings.first:
            return
        if now - self.compared < max(BEAT, self.settings.nodes / QUEUE):
            return
        self.compared = now
        rows = {rank: (one.told.busy, one.told.least, self.settings.host) for rank, one in self.living().items()}
        if everywhere:
            for value in self.beats().values():
                for rank, row in value["ranks"].items():
                    rows[int(rank)] = (row.get("busy"), row.get("least"), str(value["host"]))
        slow = straggler.stragglers({rank: (busy, least) for rank, (busy, least, _) in rows.items()})
        words = [
            f"rank {rank} on {rows[rank][2]} is {ratio:.1f}x slower than the median for {straggler.STEPS} steps"
            for rank, ratio in slow.items()
        ]
        self.note = "; ".join(words)
        for rank, text in dict(zip(slow, words)).items():  # noqa: B905  # Python 3.8
            if rank not in self.named:
                self.named.add(rank)
                self.say(text)

    # Hangs

    def watch(self, now: float) -> None:
        settings = self.settings
        stall = hang.stalled(
            {rank: one.pace for rank, one in self.living().items()},
            now,
            floor=settings.floor,
            first_step=settings.first_step,
        )
        together = settings.together
        suspect = os.path.join(settings.folder, f"suspect-{settings.name}")
        if stall is None and self.suspected is not None:
            self.suspected = None
            with contextlib.suppress(OSError):
                os.unlink(suspect)
                os.rmdir(settings.folder)
        elif stall and self.suspected is None:
            if together:
                os.makedirs(settings.folder, 0o700, exist_ok=True)
            self.suspected = now
            if together:
                self.beat(now)
                once(suspect, asdict(stall))
        if not together:
            if stall:
                self.conclude(stall, [])
            return
        if not there(settings.folder):
            return
        call = os.path.join(settings.folder, "collect")
        often = min(BEAT, settings.nodes / QUEUE)  # beats of 1,000 nodes are not read each second
        if not os.path.exists(call) and now - self.asked >= often and (settings.first or self.alone(now)):
            self.asked = now
            suspects = [name for name in os.listdir(settings.folder) if name.startswith("suspect-")]
            said = read(os.path.join(settings.folder, min(suspects))) if suspects else None
            if said and self.still(float(said["limit"])):
                once(call, {"seconds": said["seconds"], "limit": said["limit"], "step": said["step"]})
        said = read(call)
        if said:
            step = said["step"] if isinstance(said["step"], int) else None
            self.conclude(hang.Stall((), step, float(said["seconds"]), float(said["limit"])), self.others())

    def still(self, limit: float) -> bool:
        """Whether every rank that tells its steps, of any node, was late when its node last said so.

        A rank that saves or evaluates is not late, nor is it at once when it has done so: the others waited for it.
        """
        rows = [row for value in self.beats().values() for row in value["ranks"].values()]
        ages = [row["age"] for row in rows if row["age"] is not None]
        return bool(ages) and min(ages) >= limit and not any(row["phase"] in QUIET for row in rows)

    def alone(self, now: float) -> bool:
        """Whether this node noticed long ago and node 0 gives no sign: its beat did not change while ours did."""
        if self.suspected is None or now - self.suspected < GONE:
            return False
        return not any(self.other(name) and self.fresh(name, now) for name in map(beat_of, FIRST))

    def fresh(self, name: str, now: float) -> bool:
        """A beat that changed within the last 30 s of our own clock, as far as we have looked."""
        try:
            changed = os.stat(os.path.join(self.settings.logs, name)).st_mtime_ns / 1e9
        except OSError:
            return False
        before = self.seen.get(name)
        if before is None or before[0] != changed:
            self.seen[name] = (changed, now)
            return True
        return now - before[1] < GONE

    def others(self) -> list[str]:
        """The other supervisors of the job, by the names of their files."""
        own = self.settings.name
        names = [name[len("beat-") : -len(".json")] for name in self.beats()]
        return [f"node-{name}" for name in sorted(names) if f"node-{name}" != own]

    def conclude(self, stall: hang.Stall, others: list[str]) -> None:
        """Write down what the ranks do, agree with the others on who it was, and let the ranks be ended."""
        settings = self.settings
        self.say(
            f"no step for {stall.seconds:.0f} s (limit {stall.limit:.0f} s, last step {stall.step}): "
            f"writing down what the ranks do in {settings.folder}"
        )
        self.note = "hang"
        self.beat(time.monotonic())
        ranks = [
            evidence.Rank(rank, one.record["pid"], one.record["log"], one.record["log_from"], one.file, one.told)
            for rank, one in sorted(self.living().items())
        ]
        until = time.monotonic() + ANSWER
        found = evidence.collect(
            ranks,
            node=settings.node,
            name=settings.name,
            host=settings.host,
            folder=settings.folder,
            recorder=settings.recorder,
        )
        leave(os.path.join(settings.folder, f"{settings.name}.json"), {"facts": [asdict(one) for one in found]})
        path = os.path.join(settings.folder, "verdict.json")
        if others and not settings.first:
            until += LATE + TURN * settings.node
        heard: dict[str, list[Fact]] = {settings.name: found}
        while not (there(settings.folder) and os.path.exists(path)):
            late = time.monotonic() > until
            if settings.first or late:
                self.hear(heard, others)
            if late or (settings.first and len(heard) > len(others)):
                once(path, asdict(self.judged(stall, heard, others)))
                break
            time.sleep(0.5)
        value = read(path)
        verdict = hang_of(value) if value else self.judged(stall, heard, others)
        self.say(f"hang at step {verdict.step}: {verdict.why}")
        self.hang = verdict

    def hear(self, heard: dict[str, list[Fact]], others: list[str]) -> None:
        """What the others have written down by now."""
        with contextlib.suppress(OSError):
            names = set(os.listdir(self.settings.folder))
            for name in others:
                new = name not in heard and f"{name}.json" in names
                value = read(os.path.join(self.settings.folder, f"{name}.json")) if new else None
                if value:
                    heard[name] = [fact(row) for row in value["facts"]]

    def judged(self, stall: hang.Stall, heard: Mapping[str, list[Fact]], others: list[str]) -> Hang:
        beats = self.beats() if others else {}
        silent: dict[str, tuple[int, ...]] = {}
        for name in others:
            value = beats.get(beat_of(name))
            if name not in heard and value:
                silent[str(value["host"])] = tuple(sorted(map(int, value["ranks"])))
        facts = [one for rows in heard.values() for one in rows]
        found = hang.verdict(facts, seconds=stall.seconds, limit=stall.limit, silent=silent)
        folder = os.path.join(self.settings.folder, "flight")
        if found.kind in ("unknown", "all wait") and os.path.isdir(folder) and size(folder) <= DUMPS:
            dumps, _ = flight.read(folder)
            hosts = {one.rank: one.host for one in facts}
            found = flight.verdict(dumps, found, hosts=hosts, alive=[one.rank for one in facts])
        return found


def size(folder: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def to_json(found: Hang | None) -> Any:
    return None if found is None else diagnose.to_json(found)
