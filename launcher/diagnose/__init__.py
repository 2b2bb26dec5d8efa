"""Why a job ended: lines of its logs and what the scheduler says, held against a table of signatures.

Travels to the nodes beside the job's script: standard library only. A cause's rank says what it may be blamed for:
1 to 4 is a root, 5 carries the root's words, 6 to 9 follows from one. The earliest root on any node wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What excludes the node that the cause was found on: "yes", "no", "temp" (once it is mended it is back), "probe"
# (ask the preflight first), "repeat" (at the second time within a week), "monitor".
Exclude = Literal["yes", "no", "temp", "probe", "repeat", "monitor"]
# Whether to start again: "yes", "elsewhere" (without the node), "once", "after fix" and "no" (both: stop now),
# "wait" (the scheduler's business), "-" (it follows from something else).
Retry = Literal["yes", "elsewhere", "once", "after fix", "no", "wait", "-"]


@dataclass(frozen=True)
class Cause:
    """A row of causes.tsv."""

    id: str  # cuda_oom
    rank: int  # 1-4 root, 5 carrier, 6-9 secondary
    layer: str  # app, env, node, net, sched, k8s
    meaning: str
    exclude: Exclude
    retry: Retry
    fix: str
    key: str = ""  # of the job file, where the fix is a line there: "train.micro_batch"


@dataclass(frozen=True)
class Signature:
    """A row of signatures.tsv: `sample` is a line as it was seen, and the proof of `pattern`."""

    id: str  # S001
    cause: str
    pattern: str  # a regular expression, found anywhere in a line freed of prefixes and escape sequences
    sample: str
    joins: int = 1  # lines that are read as one
    unless: str = ""  # a pattern that takes it back: the retry succeeded, the line is a look-alike
    source: str = ""  # where the format is documented or was seen
    rank: int = 0  # in place of the cause's: of words that say whose they are and little else


@dataclass(frozen=True)
class Line:
    """One line of one log. `at` in seconds since the epoch, None where the line does not say."""

    file: str
    number: int  # from 1
    text: str
    at: float | None = None
    node: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Exit:
    """How one rank ended, as its rank.py wrote it down."""

    rank: int
    host: str
    code: int | None
    signal: str = ""
    ended: float | None = None


@dataclass(frozen=True)
class Hang:
    """What a supervisor concluded before it ended ranks that made no progress."""

    step: int
    seconds: float  # without a step
    limit: float
    ranks: tuple[int, ...] = ()  # that did not arrive; empty when all wait
    hosts: tuple[str, ...] = ()  # theirs
    collective: str = ""  # "ALLREDUCE #1421"
    kind: Literal["laggard", "all wait", "desync", "dead", "unknown"] = "unknown"
    why: str = ""


@dataclass(frozen=True)
class Evidence:
    """What is known beside the logs."""

    state: str = ""  # the scheduler's word: OUT_OF_MEMORY, NODE_FAIL, TIMEOUT, PREEMPTED, OOMKilled
    code: int | None = None  # of the job
    exits: tuple[Exit, ...] = ()
    oom_kills: Mapping[str, int] = field(default_factory=dict)  # host -> processes the cgroup's limit killed
    down: tuple[str, ...] = ()  # hosts that the scheduler lost, or that said nothing any more
    hang: Hang | None = None
    hosts: tuple[str, ...] = ()  # of the job, in the order of their node ranks


@dataclass(frozen=True)
class Found:
    """A cause with the lines that speak for it."""

    cause: Cause
    signature: str  # its id; empty when evidence other than a line says so
    lines: tuple[Line, ...] = ()
    node: str = ""
    rank: int | None = None
    at: float | None = None
    said: str = ""  # what the evidence says, in words, where no line does


@dataclass(frozen=True)
class Diagnosis:
    """What happened, where, why we think so, and what to change. `root` is None when nothing names a cause."""

    root: Found | None
    others: tuple[Found, ...] = ()  # carriers and secondaries, for the reader
    exclude: tuple[str, ...] = ()  # hosts to leave out, decided here except for "repeat" and "probe"
    code: int | None = None

    @property
    def cause(self) -> str:
        """`unknown` where nothing names one."""
        return self.root.cause.id if self.root else "unknown"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON has them."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {row.name: to_json(getattr(value, row.name)) for row in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return value
