"""Commands about runs that are there already; like cli, this module may print and exit."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from launcher import cli_watch

if TYPE_CHECKING:
    from launcher import runs
    from launcher.diagnose import Diagnosis

runs_option = click.option("--runs", metavar="DIR", help="Where run directories live [default: ./dslaunch-runs].")
run_argument = click.argument("run", metavar="RUN")


def find(run: str, runs_dir: str | None) -> runs.Record:
    from launcher import runs

    record = runs.find(run, runs.root(runs_dir, os.environ))
    if not record.extra.get("login"):
        return record
    from launcher import remote
    from launcher.errors import Unreachable

    try:
        remote.fetch(record)
    except Unreachable as error:
        click.echo(f"note: what follows is as it was when last seen: {error.problems[0].message}", err=True)
    return runs.read(record.folder)


@click.command("runs")
@runs_option
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def runs_command(runs: str | None, as_json: bool) -> None:
    """List the runs, with where each stands.

    All that is known comes from the run directories and the scheduler: it is the same from every login node.
    """
    import time

    from launcher import runs as records
    from launcher import show
    from launcher.errors import Problem, UserError
    from launcher.run import run as execute
    from launcher.runs import poll
    from launcher.runs.logs import progress

    if runs and not os.path.isdir(runs):  # noqa: PTH112
        raise UserError(Problem(f"there is no directory {runs}", "--runs is where runs lie: dslaunch-runs"))
    found: list[Any] = []
    unread: list[Any] = []
    for folder in records.known(records.root(runs, os.environ)):
        try:
            found.append(records.read(folder))
        except UserError as error:
            unread += error.problems
    live = [record for record in found if not record.state.over and record.job]
    known = poll.states(live, run=execute)
    rows = []
    for record in found:
        phase, why = record.state, record.story.why
        if record.id in known:
            phase, why = poll.standing(record.story, known[record.id])
        step = (progress(record.folder) or {}).get("step")
        since = record.story.since if phase is record.state else (known[record.id].since or record.story.since)
        rows.append({"run": record.id, "state": phase.value, "job": record.job, "backend": record.backend,
                     "step": step, "steps": record.steps, "since": since, "why": why})  # fmt: skip
    click.echo(show.dumps(rows) if as_json else show.runs(rows, now=time.time()))
    for problem in unread:
        click.echo(f"note: {problem}", err=True)


@click.command(short_help="Show where a run stands, and what it failed of.")
@click.argument("run", metavar="[RUN]", required=False)
@runs_option
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.pass_context
def status(context: click.Context, run: str | None, runs: str | None, as_json: bool) -> None:
    """Show where a run stands; without RUN, what `dslaunch runs` shows.

    RUN is an id, a run directory, or a job's name (its newest run). Exit code 1 when it failed or was
    cancelled, 8 when nobody knows.
    """
    if run is None:
        context.invoke(runs_command, runs=runs, as_json=as_json)
        return
    sys.exit(tell_status(settled(find(run, runs)), as_json=as_json))


def settled(record: runs.Record) -> runs.Record:
    """With a submission that was cut short looked up, and told of."""
    from launcher import launch
    from launcher.run import run as execute

    if not record.story.open:
        return record
    click.echo(f"{record.id}: its submission was not answered; looking for its job", err=True)
    try:
        found = launch.reconcile(record, execute)
    except launch.Interrupted as error:
        click.echo(f"interrupted by {launch.told(error.number)}: whether a job exists is still not known", err=True)
        sys.exit(128 + error.number)
    job = found.job.partition(":")[0]
    click.echo(f"adopted job {job}" if job else "no job exists: nothing was submitted", err=True)
    return found


def tell_status(record: runs.Record, *, as_json: bool) -> int:
    """Prints it; the exit code of `status`."""
    import time
    from dataclasses import asdict

    from launcher import diagnoses, show
    from launcher import runs as records
    from launcher.backends import State, Status
    from launcher.run import run as execute
    from launcher.runs import Phase, poll
    from launcher.runs.logs import progress

    known = poll.Known()
    if record.job:
        known = poll.states([record], run=execute, fresh=True)[record.id]
        found = known.shown
        phase, _ = poll.standing(record.story, known)
    else:
        found = Status(State.UNKNOWN, "no job exists: nothing was submitted; the same command submits it")
        phase = record.state
    if found.state.over and phase is not Phase.RECOVERING:
        records.forget_secrets(record)
    step = progress(record.folder)
    failures = [] if found.state in (State.PENDING, State.COMPLETED, State.CANCELLED) else records.failures(record)
    cause = diagnoses.headline(records.diagnosis(record)) if failures else ""
    checked = records.verdict(record)
    if found.state is State.FAILED and checked and not checked["train"]:  # none of the user's code ran
        failures, cause = [f"preflight: {checked['headline']}"], ""
    age, story = known.age(time.time()), record.story
    if as_json:
        values = {**asdict(found), "state": found.state.value, "job": record.job, "phase": phase.value}
        click.echo(show.dumps({"run": record.id, "backend": record.backend, **values, "age": age,
                               "last": known.status.state.value, "steps": record.steps, "progress": step,
                               "failures": failures, "cause": cause, "decision": story.decision,
                               "attempts": [asdict(attempt) for attempt in story.attempts],
                               **({"points": points_of(record)} if record.extra.get("points") else {})}))  # fmt: skip
    else:
        heard = f"{known.status.state.value} when last heard, {show.ago(age)} ago" if age is not None else ""
        click.echo(show.status(record, found, step, failures, phase, cause=cause, heard=heard))
        if record.extra.get("points"):
            from launcher import sweep

            click.echo("\n".join(map(show.plain, sweep.table(points_of(record)).split("\n"))))
    if not record.job and phase is Phase.RENDERED:
        return 1
    return 8 if phase is Phase.UNKNOWN else int(phase in (Phase.FAILED, Phase.CANCELLED))


def points_of(record: runs.Record) -> list[dict[str, Any]]:
    """A row for each point of a sweep: where it stands, and how far it came."""
    from launcher import runs as records
    from launcher.run import run as execute
    from launcher.runs import poll
    from launcher.runs.logs import progress

    points = records.points(record)
    known = poll.states([point for point in points if point.job], run=execute, fresh=True)
    rows = []
    for number, point in enumerate(points):
        phase, why = point.state, ""
        if point.id in known:
            phase, why = poll.standing(point.story, known[point.id])
        step = progress(point.folder) or {}
        failed = records.failures(point) if phase is records.Phase.FAILED else []
        rows.append({"point": number, "label": str(point.extra.get("label", "")), "state": phase.value,
                     "job": point.job, "code": known[point.id].status.code if point.id in known else None,
                     "step": step.get("step"), "loss": step.get("loss"),
                     "why": failed[0] if failed else why if not phase.over else ""})  # fmt: skip
    return rows


@click.command(short_help="Take up a run from any login node, and follow it.")
@run_argument
@runs_option
@click.pass_context
def attach(context: click.Context, run: str, runs: str | None) -> None:
    """Take up a run from any login node: finish its submission, show where it stands, follow it to its end."""
    record = settled(find(run, runs))
    code = tell_status(record, as_json=False)
    if code or record.state.over or not record.job:
        sys.exit(code)
    context.invoke(cli_watch.watch, names=(str(record.folder),), runs=None, as_json=False, plain=False)


@click.command()
@run_argument
@runs_option
def cancel(run: str, runs: str | None) -> None:
    """End a run; its ranks are asked to save first."""
    from launcher import backends
    from launcher import runs as records
    from launcher.errors import Problem, UserError
    from launcher.node import journal
    from launcher.run import run as execute
    from launcher.runs import poll

    record = settled(find(run, runs))
    if not record.job:
        raise UserError(Problem(f"{record.id} has no job", "nothing is left to cancel"))
    found = poll.states([record], run=execute, fresh=True)[record.id].shown
    if found.state.over:
        records.forget_secrets(record)
        raise UserError(Problem(f"{record.id} is over: {found.state.value}", "nothing is left to cancel"))
    with contextlib.suppress(OSError):  # a full disk is no reason to train on
        journal.append(record.folder, "cancelling")
    backends.load(record.backend).cancel(record, execute)
    if poll.states([record], run=execute, fresh=True)[record.id].shown.state.over:
        journal.append(record.folder, "cancelled")  # until then its ranks save, and nothing else may write there
        records.forget_secrets(record)
    click.echo(f"{record.id}: cancelled; ranks that listen to SIGTERM save before they end", err=True)


def _of_run(
    name: str, runs: str | None, state: str, code: int | None
) -> tuple[Diagnosis, dict[str, Any], list[str], bool]:
    """Why a run failed, its DeepSpeed config, notes, and whether it is done; also where no scheduler answers."""
    from collections import deque
    from dataclasses import replace

    from launcher import backends
    from launcher import runs as records
    from launcher.diagnose import Found, explain, match, tables
    from launcher.errors import Problem, UserError
    from launcher.run import run as execute
    from launcher.runs import evidence, poll

    try:
        record = find(name, runs)
    except UserError as error:
        raise UserError(Problem(f"{name} is no file, and no run: {error}", "name a log, or --runs")) from None
    records.one(record, "diagnose")
    known, signatures = tables.read()
    gathered = evidence.gather(record.folder, state=state, code=code)
    told, notes = gathered.evidence, list[str]()
    more: list[Found] = []
    checked = records.verdict(record)
    if checked and not checked["train"]:
        more.append(Found(known["preflight_refused"], "", said=checked["headline"]))
    more += [Found(known["service_failed"], "", said=said) for said in records.services_failed(record)]
    one = records.explained(record)
    if one and one.cause in known:
        said = f"attempt {one.number}: {one.why}"
        more.append(Found(known[one.cause], "", node=one.node, rank=one.rank, said=said))
    reading = explain.read(gathered.files, gathered.starts)
    backend = backends.load(record.backend)
    found, phase = poll.Known().shown, record.story.phase
    if record.job:
        asked = poll.states([record], run=execute)[record.id]
        found, (phase, why) = asked.shown, poll.standing(record.story, asked)
        if not phase.over:
            notes.append(f"the run is not over: {phase.value}" + (f", {why}" if why else ""))
    try:
        if record.job and record.backend == "kubernetes":
            told, troubles = evidence.of_cluster(told, *backend.evidence(record, execute))
            more += [Found(known[one.cause], "", said=f"{one.reason}: {one.words}") for one in troubles]
            pods = "\n".join(deque(backend.logs(record, rank=None, follow=False, run=execute), maxlen=500_000))
            reading = match.joined(reading, match.read_text(pods, signatures, file="pods"))
        elif record.job and not state:
            told = replace(told, state=found.detail, code=found.code if told.code is None else told.code)
    except UserError as error:
        notes.append(str(error))
    made = explain.explain(reading, told, more=more)
    return made, evidence.config(record.folder), notes + reading.notes, phase is records.Phase.DONE


def _of_logs(what: tuple[str, ...], state: str, code: int | None) -> tuple[Diagnosis, list[str]]:
    from pathlib import Path

    from launcher.diagnose import Evidence, explain, match, tables
    from launcher.errors import Problem, UserError
    from launcher.runs import evidence

    named = [name for name in what if name != "-"]
    missing = [name for name in named if not Path(name).exists()]
    if missing:
        raise UserError(*[Problem(f"{name}: no such file or run", "see `dslaunch runs`") for name in missing])
    signatures = tables.read()[1]
    reading = match.read(list(evidence.logs_of(named)), signatures)
    if "-" in what:
        reading = match.joined(reading, match.read_stream(sys.stdin.buffer, signatures))
    return explain.explain(reading, Evidence(state=state, code=code)), reading.notes


@click.command(short_help="Say why a run failed, or what ended in these logs.")
@click.argument("what", metavar="RUN|LOG...", nargs=-1, required=True)
@runs_option
@click.option("--state", metavar="WORD", default="", help="What the scheduler says: OUT_OF_MEMORY, OOMKilled.")
@click.option("--exit-code", "code", type=int, help="What the job ended with.")
@click.option("--output", type=click.Choice(["text", "causes"]), default="text", help="Or just the ids of causes.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def diagnose(
    what: tuple[str, ...], runs: str | None, state: str, code: int | None, output: str, as_json: bool
) -> None:
    """Say why a run failed, from its logs and what the scheduler says.

    RUN is an id, a run directory, or a job's name (its newest run). LOG is a file, a directory of logs, or - for
    standard input, of any job. Exit code 1 when no cause was found of a failure.
    """
    from pathlib import Path

    from launcher import diagnoses, show

    at = Path(what[0])
    if len(what) == 1 and what[0] != "-" and (not at.exists() or (at / "journal.jsonl").exists()):
        made, config, notes, done = _of_run(what[0], runs, state, code)
    else:
        made, notes = _of_logs(what, state, code)
        config, done = {}, False
    if output == "causes":
        click.echo("\n".join(diagnoses.causes(made)))
    elif as_json:
        click.echo(show.dumps(diagnoses.as_json(made, config=config, notes=notes)))
    else:
        text = diagnoses.text(made, config=config, notes=notes, done=done)
        click.echo("\n".join(map(show.plain, text.split("\n"))))
    if made.root is None and not done:
        sys.exit(1)


@click.command(short_help="List checkpoints, and say which are whole.")
@click.argument("run", metavar="RUN|DIR")
@runs_option
@click.option("--hashes", is_flag=True, help="Read every byte: finds a bit that flipped.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def checkpoints(run: str, runs: str | None, hashes: bool, as_json: bool) -> None:
    """List checkpoints, those of a run or in any directory that DeepSpeed saved to, and say which are whole.

    Without a manifest a checkpoint is held against DeepSpeed's names and each file's structure. Nothing is
    unpickled. Exit code 1 when none can be resumed from.
    """
    import time

    from launcher import saves, show
    from launcher.checkpoints import choose, layout
    from launcher.errors import Problem, UserError

    directory = _checkpoints_of(run, runs)
    try:
        tags = layout.scan(directory, hashes=hashes)
    except OSError as error:
        raise UserError(Problem(f"cannot read {error.filename or directory}: {error.strerror}")) from None
    usable = next((tag for tag in tags if tag.health == "verified"), next((tag for tag in tags if tag.usable), None))
    wrong = {tag.name: tag.why for tag in tags if not tag.usable}
    choice = choose.choose(
        directory,
        world_size=usable.world_size or 1 if usable else 1,
        stage=usable.stage if usable else None,
        model_parallel=usable.model_parallel if usable else 1,
        seconds=0,
        distrusted=wrong,
    )
    latest = layout.pointer(directory)
    if as_json:
        click.echo(show.dumps(saves.as_json(directory, tags, choice, latest=latest)))
    else:
        click.echo(saves.table(directory, tags, choice, latest=latest, now=time.time()))
    if usable is None:
        sys.exit(1)


def _checkpoints_of(run: str, runs_dir: str | None) -> str:
    """A directory as it is given; of a run, which may be called as a folder here is, the one its journal names."""
    from pathlib import Path

    from launcher import runs as records
    from launcher.checkpoints import layout
    from launcher.errors import Problem, UserError

    given = Path(run).is_dir() and not (Path(run) / "journal.jsonl").exists()
    if given and (layout.names(run) or not records.known(records.root(runs_dir, dict(os.environ)), name=run)):
        return str(Path(run).absolute())
    record = records.one(records.find(run, records.root(runs_dir, dict(os.environ))), "checkpoints")
    directory = str(record.extra.get("checkpoints", ""))
    if not directory:
        raise UserError(
            Problem(f"{record.id} saves where this machine cannot look", "give the directory, where it is mounted")
        )
    return directory


COMMANDS = (runs_command, status, attach, cancel, diagnose, checkpoints, *cli_watch.COMMANDS)
