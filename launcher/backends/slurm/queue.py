"""Where jobs stand, in Slurm's words: squeue for all at once, then scontrol and sacct for what it left out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher import runs
from launcher.backends import State, Status
from launcher.bundle import STOPPED_EARLY
from launcher.run import Result, Run

NO_ANSWER = (
    "Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were transmitted",
    "Transport endpoint", "Munge encode failed", "Invalid authentication credential", "Protocol authentication error",
    "slurm_load_jobs error",
    "configuration source", "resolve_ctls_from_dns_srv", "Unable to contact", "Slurm temporarily unable",
)  # fmt: skip
UNHEARD_OF = "Invalid job id"  # the controller's own word that it has no such job

STATES = {
    "PENDING": State.PENDING, "CONFIGURING": State.PENDING, "REQUEUED": State.PENDING, "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING, "SPECIAL_EXIT": State.PENDING, "RESV_DEL_HOLD": State.PENDING,
    "POWER_UP_NODE": State.PENDING,
    "RUNNING": State.RUNNING, "COMPLETING": State.RUNNING, "SUSPENDED": State.RUNNING, "STOPPED": State.RUNNING,
    "RESIZING": State.RUNNING, "SIGNALING": State.RUNNING, "STAGE_OUT": State.RUNNING, "UPDATE_DB": State.RUNNING,
    "COMPLETED": State.COMPLETED,
    "FAILED": State.FAILED, "TIMEOUT": State.FAILED, "NODE_FAIL": State.FAILED, "OUT_OF_MEMORY": State.FAILED,
    "BOOT_FAIL": State.FAILED, "DEADLINE": State.FAILED, "PREEMPTED": State.FAILED, "LAUNCH_FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED, "REVOKED": State.CANCELLED,
}  # fmt: skip

COLUMNS = (
    ("JobID", 24), ("State", 24), ("SubmitTime", 24), ("exit_code", 12), ("Name", 256), ("Comment", 256),
    ("NodeList", 256), ("Reason", 64),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A job as one of Slurm's commands shows it."""

    id: str
    word: str  # RUNNING
    submitted: str = ""  # 2026-11-21T12:10:40
    code: int | None = None  # a killed job has 128 + the signal
    name: str = ""
    comment: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def number(self) -> int:
        return int(re.match(r"\d*", self.id)[0] or 0)  # type: ignore[index]


def parse_state(word: str) -> State:
    """ "CANCELLED by 1000" is cancelled; no word, and a word nobody has seen, is UNKNOWN."""
    words = word.split()
    return STATES.get(words[0].rstrip("+"), State.UNKNOWN) if words else State.UNKNOWN


def states(records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """Of each run: one squeue for all. No answer is UNKNOWN; so is "no such job", which says `absent`.

    Runs are looked up by their own name, which is no other job's ever: a job that was submitted again by itself is
    found, and one that got a number of ours after the controller started counting anew is not.
    """
    environ = clean(os.environ)
    names = ",".join(record.id for record in records)
    fields = ",".join(f"{name}:{width}" for name, width in COLUMNS)
    asked = run(["squeue", "--noheader", "--states=all", f"--name={names}", f"--Format={fields}"], env=environ)
    if asked.code != 0:
        return {record.id: _silence(asked) for record in records}
    listed = parse_queue(asked.out)
    found: dict[str, Status] = {}
    for record in records:
        if job := newest(record, listed):
            found[record.id] = status(record, job)
    left = [record for record in records if record.id not in found]
    if left:
        found |= _forgotten(left, run, environ)
    return found


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what would change the meaning of an answer: SQUEUE_PARTITION hides jobs, SLURM_TIME_FORMAT times."""
    prefixes = ("SLURM_", "SQUEUE_", "SACCT_", "SCONTROL_")
    return {name: value for name, value in environ.items() if name == "SLURM_CONF" or not name.startswith(prefixes)}


def parse_queue(text: str) -> list[Job]:
    """Lines of columns of fixed width; a line of another shape is nobody's job."""
    jobs = []
    for line in text.split("\n"):
        cells, at = [], 0
        for _, width in COLUMNS:
            cells.append(line[at : at + width].strip())
            at += width
        job, word, submitted, code, name, comment, nodes, reason = cells
        if re.fullmatch(r"[0-9]+(\+[0-9]+|_\S+)?", job) and re.fullmatch(r"[A-Z_]+", word):
            jobs.append(Job(job, word, submitted, wait_status(code), name, comment, nodes, _unless_none(reason)))
    return jobs


def wait_status(text: str) -> int | None:
    """ "1792" is exit code 7, "9" is SIGKILL: 137."""
    if not text.isdigit():
        return None
    status = int(text)
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8


def _unless_none(word: str) -> str:
    return "" if word in ("None", "(null)", "n/a") else word


def newest(record: runs.Record, jobs: Iterable[Job]) -> Job | None:
    ours = [job for job in jobs if is_ours(record, job)]
    return max(ours, key=lambda job: job.number, default=None)


def is_ours(record: runs.Record, job: Job) -> bool:
    """Job numbers are used again. A job of the run's own name or comment is the run's. One that was submitted by
    hand has the script's name: it is ours where it has our number and is no older than the run."""
    if record.id == job.name or token(job.comment) == f"dslaunch:{record.id}":
        return True
    made = runs.ID.fullmatch(record.id)
    if not made or job.id != record.job or job.name != record.name or token(job.comment).startswith("dslaunch:"):
        return False
    try:
        created = time.strptime(made["when"][:15], "%Y%m%d-%H%M%S")
        submitted = time.strptime(job.submitted, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return False
    return time.mktime(submitted) > time.mktime(created) - CLOCKS


def token(comment: str) -> str:
    """The run's own word of a comment: "my words,dslaunch:ID" is "dslaunch:ID"."""
    return comment.rpartition(",")[2]


CLOCKS = 300  # seconds by which two hosts' clocks may differ


def status(record: runs.Record, job: Job) -> Status:
    found = parse_state(job.word)
    if found.over:
        return ended(record, job)
    more = job.reason or job.nodes
    return Status(found, f"{job.word.lower()}: {more}" if more else job.word.lower(), job=job.id)


def ended(record: runs.Record, job: Job) -> Status:
    """A job is complete when the scheduler says so and its own script wrote 0 as well."""
    found = parse_state(job.word)
    marker = runs.exit_code(record)
    code = job.code if marker is None else marker
    if found is not State.COMPLETED and code == 0:
        code = None  # a node that fails leaves 0:0
    detail = job.word.lower()
    if found is State.COMPLETED and marker != 0:
        found, detail = State.UNKNOWN, "Slurm says completed, but the script left no exit code"
    if marker == STOPPED_EARLY and found.over:
        detail += "; stopped early, checkpoint saved: submit again to go on"
    return Status(found, detail, code, job=job.id)


def _silence(asked: Result) -> Status:
    words = (asked.err.strip() or asked.out.strip() or "no answer").splitlines()[0]
    return Status(State.UNKNOWN, f"Slurm did not answer: {words}")


def _forgotten(records: Sequence[runs.Record], run: Run, environ: dict[str, str]) -> dict[str, Status]:
    """squeue answered, and these are not in it: the controller forgets a job MinJobAge after its end."""
    found: dict[str, Status] = {}
    absent: dict[str, runs.Record] = {}
    for record in records:
        if not record.job:
            found[record.id] = Status(State.UNKNOWN, "Slurm has no job of this run", absent=True)
            continue
        shown = run(["scontrol", "--oneliner", "show", "job", record.job], env=environ)
        job = parse_shown(shown.out) if shown.code == 0 else None
        if job and is_ours(record, job):
            found[record.id] = status(record, job)
        elif job or UNHEARD_OF in shown.err:
            absent[record.id] = record
        else:
            found[record.id] = _silence(shown)
    if not absent:
        return found
    numbers = ",".join(record.job for record in absent.values())
    columns = "JobIDRaw,State,Submit,ExitCode,JobName,Comment"
    listed = run(
        ["sacct", "--noheader", "--parsable2", "-X", f"--format={columns}", f"--jobs={numbers}"], env=environ
    )
    accounted = parse_accounted(listed.out) if listed.code == 0 else []
    for record in absent.values():
        marker = runs.exit_code(record)
        if job := newest(record, accounted):
            found[record.id] = status(record, job)
        elif marker is not None:
            over = State.COMPLETED if marker == 0 else State.FAILED
            words = "Slurm has forgotten the job; the exit code is the one its script wrote"
            found[record.id] = Status(over, words, marker, job=record.job)
        else:
            books = "sacct" if listed.code == 0 else "sacct, which does not answer,"
            words = f"Slurm no longer knows job {record.job}, nor does {books}"
            found[record.id] = Status(State.UNKNOWN, words.rstrip(","), absent=True)
    return found


def parse_shown(text: str) -> Job | None:
    """What `scontrol --oneliner show job` prints. A path behind may hold " JobState=": the first counts."""
    fields: dict[str, str] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if equals:
            fields.setdefault(name, value)
    if not fields.get("JobId", "").isdigit() or "JobState" not in fields:
        return None
    return Job(
        fields["JobId"], fields["JobState"], fields.get("SubmitTime", ""), pair(fields.get("ExitCode", "")),
        fields.get("JobName", ""), fields.get("Comment", ""), _unless_none(fields.get("NodeList", "")),
        _unless_none(fields.get("Reason", "")),
    )  # fmt: skip


def parse_accounted(text: str) -> list[Job]:
    """Lines of sacct; "7|CANCELLED by 1000|2026-11-21T12:10:40|0:15|name|comment"."""
    jobs = []
    for line in text.split("\n"):
        cells = line.split("|", 5)
        if len(cells) == 6 and cells[0].isdigit():
            job, word, submitted, code, name, comment = cells
            jobs.append(Job(job, word, submitted, pair(code), name, comment))
    return jobs


def pair(text: str) -> int | None:
    """ "7:0" is exit code 7, "0:9" is SIGKILL: 137."""
    status, _, number = text.partition(":")
    return 128 + int(number) if number.isdigit() and number != "0" else int(status) if status.isdigit() else None
