"""The Slurm controller: submitting, and what squeue, scontrol and sacct say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher import runs
from launcher.backends import State, Status
from launcher.backends.slurm.script import ENTRY
from launcher.bundle import STOPPED_EARLY
from launcher.errors import Problem, Unreachable, UserError
from launcher.plan import Plan
from launcher.run import Result, Run
from launcher.spec import JobSpec


def submit(folder: Path, spec: JobSpec, run: Run) -> str:
    """The job id. Raises UserError with Slurm's own words, Unreachable when there was no answer."""
    places = [str(folder), str((folder / "submitted-from").resolve())]
    odd = [place for place in places if any(c in place for c in ',: "')]
    if spec.box and odd:
        raise UserError(Problem(f"{odd[0]} holds a comma, colon, quote or space, which container mounts cannot"))
    return parse_submitted(run(_sbatch(folder, "--parsable"), env=environment(os.environ, spec)))


def test_only(folder: Path, spec: JobSpec, run: Run) -> str:
    """What the controller would do with it, in its own words."""
    result = run(_sbatch(folder, "--test-only"), env=environment(os.environ, spec))
    _refuse_failure(result)
    return result.err.strip() or result.out.strip()


def environment(environ: Mapping[str, str], spec: JobSpec) -> dict[str, str]:
    """What sbatch sees, and hands to the job: nothing that overrides the script, and no secret.

    SBATCH_* are options that win over the script's own lines, SLURM_* describe an allocation one may be
    sitting in, and slurmctld keeps the environment of every batch job on its disk.
    """
    secret = {source.from_env for source in spec.secrets.values()}
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name in secret or name.startswith(("SBATCH_", "SLURM_", "SRUN_")))
    }


def notes(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """What is left out, and what will surprise."""
    found = [
        f"{name}={environ[name]} in this shell does not reach the job: say it in the job file (slurm.{option})"
        for name in sorted(environ)
        if name.startswith("SBATCH_") and (option := name.removeprefix("SBATCH_").lower())
    ]
    resources = plan.spec.resources
    if resources.gpus_per_node and not resources.cpus_per_node:
        found.append(
            f"resources.cpus_per_node is not given: many sites then give one core to {plan.spec.per_node} ranks"
        )
    return found


def _sbatch(folder: Path, flag: str) -> list[str]:
    return ["sbatch", flag, f"--chdir={folder}", f"--comment=dslaunch:{folder.name}", str(folder / ENTRY)]


def parse_submitted(result: Result) -> str:
    """ "12\\n" and "12;cluster\\n" are job 12; anything else is not taken for one."""
    _refuse_failure(result)
    job = result.out.strip().split("\n")[-1].split(";")[0]
    if not job.isdigit():
        raise Unreachable(Problem(f"sbatch answered `{result.out.strip()[:200]}`, which is no job id"))
    return job


NO_ANSWER = (
    "Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were transmitted",
    "Transport endpoint", "Munge encode failed", "Invalid authentication credential", "Protocol authentication error",
    "slurm_load_jobs error", "Slurm temporarily unable",
)  # fmt: skip
BLAME = (
    ("invalid partition", ("slurm", "partition")),
    ("invalid account", ("slurm", "account")),
    ("invalid qos", ("slurm", "qos")),
    ("invalid feature", ("slurm", "constraint")),
    ("reservation", ("slurm", "reservation")),
    ("invalid node name", ("slurm", "nodelist")),
    ("gres", ("resources", "gpus_per_node")),
    ("memory specification", ("resources", "memory")),
    ("time limit", ("slurm", "time")),
    ("node count", ("resources", "nodes")),
    ("node configuration", ("resources",)),
)


def _refuse_failure(result: Result) -> None:
    if result.code == 0:
        return
    words = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in result.err.split("\n")).strip()
    if result.code is None and "not found" in result.err:
        raise UserError(
            Problem("sbatch is not on this machine", hint="run dslaunch on a login node, or use --dry-run")
        )
    if result.code is None or any(phrase in result.err for phrase in NO_ANSWER):
        raise Unreachable(Problem(f"Slurm did not answer: {words}", hint="the job may exist: squeue --me"))
    at = next((at for phrase, at in BLAME if phrase in words.lower()), ("slurm",))
    raise UserError(Problem(f"Slurm refuses the job: {words}", at=at))


STATES = {
    "PENDING": State.PENDING, "CONFIGURING": State.PENDING, "REQUEUED": State.PENDING, "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING, "SPECIAL_EXIT": State.PENDING, "RESV_DEL_HOLD": State.PENDING,
    "RUNNING": State.RUNNING, "COMPLETING": State.RUNNING, "SUSPENDED": State.RUNNING, "STOPPED": State.RUNNING,
    "RESIZING": State.RUNNING, "SIGNALING": State.RUNNING, "STAGE_OUT": State.RUNNING,
    "COMPLETED": State.COMPLETED,
    "FAILED": State.FAILED, "TIMEOUT": State.FAILED, "NODE_FAIL": State.FAILED, "OUT_OF_MEMORY": State.FAILED,
    "BOOT_FAIL": State.FAILED, "DEADLINE": State.FAILED, "PREEMPTED": State.FAILED,
    "CANCELLED": State.CANCELLED, "REVOKED": State.CANCELLED,
}  # fmt: skip


def parse_state(word: str) -> State:
    """ "CANCELLED by 1000" is cancelled; no word, and a word nobody has seen, is UNKNOWN."""
    words = word.split()
    return STATES.get(words[0].rstrip("+"), State.UNKNOWN) if words else State.UNKNOWN


def state(record: runs.Record, run: Run) -> Status:
    """squeue, then scontrol, then sacct; no answer from any of them is UNKNOWN."""
    asked = run(["squeue", "--noheader", "--states=all", "--format=%T|%R", f"--jobs={record.job}"])
    if asked.code == 0 and asked.out.strip():
        word, _, reason = asked.out.strip().split("\n")[0].removesuffix("|(None)").partition("|")
        if not parse_state(word).over:
            return Status(parse_state(word), f"{word.lower()}: {reason}" if reason else word.lower())
    shown = run(["scontrol", "--oneliner", "show", "job", record.job])
    if shown.code == 0 and "JobState=" in shown.out:
        fields: dict[str, str] = {}
        for part in shown.out.split():
            name, equals, value = part.partition("=")
            if equals:
                fields.setdefault(name, value)  # a path behind may hold " JobState="
        return _with_marker(record, fields.get("JobState", ""), fields.get("ExitCode", ""))
    listed = run(["sacct", "--noheader", "--parsable2", "-X", "--format=State,ExitCode", f"--jobs={record.job}"])
    if listed.code == 0 and listed.out.strip():
        word, _, code = listed.out.strip().split("\n")[-1].partition("|")
        return _with_marker(record, word, code)
    marker = runs.exit_code(record)
    if marker is not None and "Invalid job id" in asked.err + shown.err:  # forgotten after MinJobAge
        found = State.COMPLETED if marker == 0 else State.FAILED
        return Status(found, "Slurm has forgotten the job; the exit code is the one its script wrote", marker)
    why = asked.err.strip() or shown.err.strip() or listed.err.strip() or "no answer"
    silent = asked.code is None or any(phrase in asked.err for phrase in NO_ANSWER if "load_jobs" not in phrase)
    who = "Slurm did not answer" if silent else "neither squeue, scontrol nor sacct knows the job"
    return Status(State.UNKNOWN, f"{who}: {why.splitlines()[0]}")


def _with_marker(record: runs.Record, word: str, exit_code: str) -> Status:
    """A job is complete when the scheduler says so and its own script wrote 0 as well."""
    found = parse_state(word)
    marker = runs.exit_code(record)
    code = marker
    if code is None and exit_code:
        status, _, number = exit_code.partition(":")
        code = 128 + int(number) if number.isdigit() and number != "0" else int(status) if status.isdigit() else None
    if found is not State.COMPLETED and code == 0:
        code = None  # a node that fails leaves 0:0
    detail = word.lower()
    if found is State.COMPLETED and marker != 0:
        found, detail = State.UNKNOWN, "Slurm says completed, but the script left no exit code"
    if marker == STOPPED_EARLY and found.over:
        detail += "; stopped early, checkpoint saved: submit again to go on"
    return Status(found, detail, code)


def events(record: runs.Record, run: Run) -> Iterator[dict[str, Any]]:
    yield from runs.events(record, lambda: state(record, run))


def verdict(record: runs.Record, run: Run) -> dict[str, Any] | None:
    return runs.verdict(record)


def drain(nodes: Mapping[str, str], run: Run) -> list[str]:
    """Nodes with the reason that Slurm will show; what the controller answers, a sentence each."""
    told = []
    for node, why in nodes.items():
        reason = f"dslaunch: {' '.join(why.split())[:200]}"
        done = run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}"])
        answer = " ".join((done.err or done.out).split())
        told.append(f"{node} is drained" if done.code == 0 else f"{node} is not drained: {answer}")
    return told


def logs(record: runs.Record, *, rank: int | None, follow: bool, run: Run) -> Iterator[str]:
    def over() -> bool:
        found = state(record, run).state
        return found.over or (found is State.UNKNOWN and runs.exit_code(record) is not None)

    yield from runs.read_logs(record, rank=rank, follow=follow, over=over, main="logs/slurm-*.out")


def cancel(record: runs.Record, run: Run) -> None:
    result = run(["scancel", record.job])
    if result.code is None or any(phrase in result.err for phrase in NO_ANSWER):
        raise Unreachable(Problem(f"Slurm did not answer: {result.err.strip()}"))
    if result.code != 0 and "already completing or completed" not in result.err:
        raise UserError(Problem(f"scancel {record.job}: {result.err.strip()}"))
