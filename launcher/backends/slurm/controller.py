"""The Slurm controller: submitting, and what squeue, scontrol and sacct say."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import remote, runs, yamldoc
from launcher.backends import State, Status
from launcher.backends.slurm import queue, tasks
from launcher.backends.slurm.queue import NO_ANSWER, parse_state
from launcher.backends.slurm.script import ENTRY
from launcher.errors import Problem, Unreachable, UserError
from launcher.run import Result, Run
from launcher.runs.submit import ANSWER, Unsent
from launcher.spec import JobSpec


def submit(folder: Path, spec: JobSpec, run: Run, *, after: str = "") -> str:
    """The job id. Raises UserError with Slurm's own words, Unreachable when there was no answer.

    The run's id is the job's name, which nothing else ever has: the job can be looked up by it whether or not
    sbatch was answered, and as a singleton at most one of that name runs. `after` is what has to
    end first, 7:9.
    """
    places = [str(folder), str((folder / "submitted-from").resolve())]
    odd = [place for place in places if any(c in place for c in ',: "')]
    if spec.box and odd:
        raise UserError(Problem(f"{odd[0]} holds a comma, colon, quote or space, which container mounts cannot"))
    array = (folder / runs.POINTS).is_dir()  # whose tasks would wait for each other
    if spec.slurm.login:
        folder = Path(remote.put(runs.read(folder)))
        run = remote.runner(spec.slurm.login)
    command = _sbatch(folder, spec, "--parsable", *_dependency(spec, after, alone=not array))
    try:
        return parse_submitted(run(command, env=environment(os.environ, spec), timeout=ANSWER, bounded=True))
    except UserError as error:
        raise _with_what_there_is(error, spec, run) from None


def _dependency(spec: JobSpec, after: str = "", *, alone: bool = True) -> list[str]:
    """The run's own singleton, with what the job file asks for: "--dependency=singleton,afterok:7"."""
    asked = [one for one in (spec.slurm.dependency or "").split(",") if one not in ("", "singleton")]
    words = [*(["singleton"] if alone else []), *asked, *([f"afterany:{after}"] if after else [])]
    return [f"--dependency={','.join(words)}"] if words else []


def look_up(folder: Path, run: Run) -> list[tuple[str, bool]]:
    """Jobs with the run's token, and whether each has started. Raises Unreachable when squeue gives no answer.

    Asked by name and for this user's jobs alone, which every site allows. What squeue has forgotten, sacct may know,
    where there is one; a job that ran has left its output in the run directory.
    """
    record = runs.read(folder)
    host = remote.login(record.extra)
    if host:
        run = remote.runner(host)
        remote.fetch(record)
    if record.extra.get("points"):
        there = tasks.arrays(record, run)
        if there is None:
            raise Unreachable(Problem("Slurm did not answer when asked for the array"))
        return there
    environ, user = queue.clean(os.environ), "--me" if host else f"--user={os.getuid()}"
    columns = ",".join(f"{name}:{width}" for name, width in queue.COLUMNS)
    named = [f"--name={record.id}", user]
    asked = run(["squeue", "--noheader", "--states=all", *named, f"--Format={columns}"], env=environ)
    if asked.code != 0:
        raise _no_answer(_words(asked))
    jobs = [job for job in queue.parse_queue(asked.out) if queue.is_ours(record, job)]
    if not jobs:
        since = time.strftime("%Y-%m-%d", time.localtime(record.story.asked - DAY))  # sacct starts at midnight
        columns = "JobIDRaw,State,Submit,ExitCode,JobName,Comment"
        books = ["sacct", "--noheader", "--parsable2", "-X", f"--format={columns}", f"--starttime={since}"]
        listed = run([*books, *(named[:1] if host else named)], env=environ)
        accounted = queue.parse_accounted(listed.out) if listed.code == 0 else []
        jobs = [job for job in accounted if queue.is_ours(record, job)]
    told = {str(entry["job"]) for entry in record.entries if entry["event"] == "started" and entry.get("job")}
    ran = told | {path.stem.removeprefix("slurm-") for path in record.folder.glob("logs/slurm-*.out")}
    state = {job.id: parse_state(job.word) for job in jobs}
    # one that was cancelled before it ran is no job beside another
    kept = [job for job in state if state[job] is not State.CANCELLED or job in ran] or list(state)
    found = {job: state[job] is not State.PENDING or job in ran for job in kept}
    return list((found or dict.fromkeys(sorted(ran), True)).items())


DAY = 86_400


def sending(record: runs.Record) -> bool:
    """Whether an sbatch of this run is at work on this machine; one whose dslaunch was killed goes on for a while."""
    mark = f"--job-name={record.id}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if mark in words and b"sbatch" in words:
                return True
    return False


def test_only(folder: Path, spec: JobSpec, run: Run) -> str:
    """What the controller would do with it, in its own words."""
    command = _sbatch(folder, spec, "--test-only", *_dependency(spec, alone=not (folder / runs.POINTS).is_dir()))
    if spec.slurm.login:  # the script itself, as nothing of it lies there yet
        script = (folder / ENTRY).read_bytes()
        words = [word for word in command[:-1] if not word.startswith("--chdir=")]
        run = remote.runner(spec.slurm.login)
        result = run(words, stdin=script)
    else:
        result = run(command, env=environment(os.environ, spec))
    try:
        _refuse_failure(result)
    except UserError as error:
        raise _with_what_there_is(error, spec, run) from None
    return result.err.strip() or result.out.strip()


def environment(environ: Mapping[str, str], spec: JobSpec) -> dict[str, str]:
    """What sbatch sees, and hands to the job: nothing that overrides the script, and no secret.

    SBATCH_* are options that win over the script's own lines, SLURM_* describe an allocation one may be
    sitting in, and slurmctld keeps the environment of every batch job on its disk.
    """
    secret = {source.from_env for source in spec.credentials.values()}
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name in secret or name.startswith(("SBATCH_", "SLURM_", "SRUN_")))
    }


def _sbatch(folder: Path, spec: JobSpec, *flags: str) -> list[str]:
    words = ",".join(filter(None, [spec.slurm.comment, f"dslaunch:{folder.name}"]))
    token = [f"--job-name={folder.name}", f"--comment={words}"]
    # another component of the same name would wait for this one, which is its singleton
    parts = sum(service.component is not None for service in spec.services)
    more = [word for number in range(1, parts + 1) for word in (":", f"--job-name={folder.name}.{number}")]
    return ["sbatch", *flags, f"--chdir={folder}", *token, *more, str(folder / ENTRY)]


def parse_submitted(result: Result) -> str:
    """ "12\\n" and "12;cluster\\n" are job 12; anything else is not taken for one."""
    _refuse_failure(result)
    job = result.out.strip().split("\n")[-1].split(";")[0]
    if not job.isdigit():
        raise Unreachable(Problem(f"sbatch answered `{result.out.strip()[:200]}`, which is no job id"))
    return job


BLAME = (
    ("invalid partition", ("slurm", "partition")),
    ("no partition specified", ("slurm", "partition")),
    ("invalid account", ("slurm", "account")),
    ("invalid qos", ("slurm", "qos")),
    ("invalid feature", ("slurm", "constraint")),
    ("reservation", ("slurm", "reservation")),
    ("invalid node name", ("slurm", "nodelist")),
    ("gres", ("resources", "gpus_per_node")),
    ("memory specification", ("resources", "memory")),
    ("license", ("slurm", "licenses")),
    ("wckey", ("slurm", "wckey")),
    ("dependency", ("slurm", "dependency")),
    ("time limit", ("slurm", "time")),
    ("node count", ("resources", "nodes")),
    ("node configuration", ("resources",)),
)


LOST = (  # a request that left may have arrived
    "Communication connection failure", "Message receive failure", "Connection timed out",
    "Unexpected message received", "standby mode", "Unspecified error",
)  # fmt: skip
KEYS = "this host's munge key or clock is not the controller's: munge -n | unmunge, and date on both"
# before anything was sent, in the words of Slurm's client and of ssh
UNSENT = (
    "(connect failure)", "Munge encode failed", "configuration source", "resolve_ctls_from_dns_srv",
    remote.UNCONNECTED,
)  # fmt: skip
UNCONFIGURED = ("configuration source", "resolve_ctls_from_dns_srv")  # neither a slurm.conf nor a controller in DNS
LOGIN = (
    "run dslaunch on a login node, give slurm.login: USER@HOST, or SLURM_CONF=.../slurm.conf; --dry-run asks nobody"
)
MEND = (  # what Slurm's client says when it does not get through, and what to do next
    ("munge", "munged does not run on this host, or its socket is not where slurm.conf says: systemctl status munge"),
    ("credential", KEYS),
    ("authentication", KEYS),
    ("unable to contact", "the controller is down or not to be reached from here: scontrol ping"),
)  # fmt: skip


OWN = re.compile(r"^((sbatch|squeue|scontrol|sacct|scancel|sinfo): )?((error|fatal): )?")


def unreached(result: Result, hint: str) -> UserError:
    """Of a question that changes nothing: Unreachable, or that the command is not here; `hint` is the way to ask."""
    if result.code is None and "command not found" in result.err:
        return UserError(Problem("Slurm's commands are not on this machine", hint))
    told = _no_answer(_words(result)).problems[0]
    configured = not any(phrase in result.err for phrase in UNCONFIGURED)
    return Unreachable(Problem(told.message, told.hint if configured else hint))


def _words(result: Result) -> str:
    lines = (OWN.sub("", line) for line in (result.err or result.out).split("\n"))
    return " ".join(" ".join(lines).split())


def _no_answer(words: str) -> Unreachable:
    if any(phrase in words for phrase in UNCONFIGURED):
        return Unsent(
            Problem("Slurm is not reached: this machine has no slurm.conf, and DNS names no controller", LOGIN)
        )
    hint = next(
        (mend for phrase, mend in MEND if phrase in words.lower()), "sinfo, or scontrol ping, shows when it is back"
    )
    kind = Unsent if any(phrase in words for phrase in UNSENT) else Unreachable
    return kind(Problem(f"Slurm did not answer: {words}", hint))


def _refuse_failure(result: Result) -> None:
    if result.code == 0:
        return
    words = _words(result)
    if result.code is None and "command not found" in result.err:
        raise UserError(
            Problem("sbatch is not on this machine", hint="run dslaunch on a login node, or use --dry-run")
        )
    if result.code is None or any(phrase in result.err for phrase in (*NO_ANSWER, *LOST)):
        raise _no_answer(words)
    at = next((at for phrase, at in BLAME if phrase in words.lower()), ("slurm",))
    raise UserError(Problem(f"Slurm refuses the job: {words}", at=at))


def _with_what_there_is(error: UserError, spec: JobSpec, run: Run) -> UserError:
    """The same refusal, with the partitions or the limit of time that sinfo knows."""
    field = ".".join(map(str, error.problems[0].at))
    if isinstance(error, Unreachable) or field not in ("slurm.partition", "slurm.time"):
        return error
    told = run(["sinfo", "--noheader", "--format=%R %l"])
    rows = dict(line.split()[:2] for line in told.out.splitlines() if len(line.split()) > 1)
    asked = (spec.slurm.partition or "").split(",")
    if field == "slurm.time":
        limits = [f"{limit} in {name}" for name, limit in rows.items() if name in asked or not spec.slurm.partition]
        hint = f"the longest is {', '.join(limits)}" if limits else ""
    else:
        hint = yamldoc.suggest(asked[0], rows) if rows else ""
    return UserError(replace(error.problems[0], hint=hint)) if hint else error


def states(records: Sequence[runs.Record], run: Run) -> dict[str, Status]:
    """Of each run, one question for all of a controller. What a login node elsewhere has of them is copied first."""
    found: dict[str, Status] = {}
    for host in {remote.login(record.extra): None for record in records}:
        mine = [record for record in records if remote.login(record.extra) == host]
        if host:
            for record in mine:
                with contextlib.suppress(Unreachable):  # squeue says it, too
                    remote.fetch(record)
            mine = [runs.read(record.folder) for record in mine]
        arrays = [record for record in mine if tasks.belongs(record)]
        found |= tasks.states(arrays, run) if arrays else {}
        if rest := [record for record in mine if not tasks.belongs(record)]:
            found |= queue.states(rest, remote.runner(host) if host else run)
    return found


def state(record: runs.Record, run: Run) -> Status:
    return states([record], run)[record.id]


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


OUTPUT = "logs/slurm-*.out"  # of all nodes, as lines came


def cancel(record: runs.Record, run: Run) -> None:
    host = remote.login(record.extra)
    result = (remote.runner(host) if host else run)(["scancel", record.job])
    if result.code is None or any(phrase in result.err for phrase in NO_ANSWER):
        raise Unreachable(Problem(f"Slurm did not answer: {result.err.strip()}"))
    if result.code != 0 and "already completing or completed" not in result.err:
        raise UserError(Problem(f"scancel {record.job}: {result.err.strip()}"))
