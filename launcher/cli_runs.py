"""Commands about runs that are there already; like cli, this module may print and exit."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher import runs

runs_option = click.option("--runs", metavar="DIR", help="Where run directories live [default: ./dslaunch-runs].")
run_argument = click.argument("run", metavar="RUN")


def find(run: str, runs_dir: str | None) -> tuple[runs.Record, Any]:
    from launcher import backends, runs

    record = runs.find(run, runs.root(runs_dir, dict(os.environ)))
    return record, backends.load(record.backend)


@click.command()
@click.argument("run", metavar="[RUN]", required=False)
@runs_option
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def status(run: str | None, runs: str | None, as_json: bool) -> None:
    """Show where a run stands; without RUN, list the runs.

    RUN is an id, a run directory, or a job's name (its newest run). Exit code 1 when it failed or was
    cancelled, 8 when nobody knows.
    """
    from dataclasses import asdict

    from launcher import runs as journal
    from launcher import show
    from launcher.backends import State, Status
    from launcher.run import run as execute

    if run is None:
        folders = journal.known(journal.root(runs, dict(os.environ)))
        click.echo(show.dumps([folder.name for folder in folders]) if as_json else "\n".join(f.name for f in folders))
        return
    record, backend = find(run, runs)
    if record.job:
        found = backend.state(record, execute)
    else:
        found = Status(State.UNKNOWN, "the submission was not answered: the job may exist")
    if found.state.over:
        journal.forget_secrets(record)
    step = journal.progress(record)
    failures = [] if found.state in (State.PENDING, State.COMPLETED, State.CANCELLED) else journal.failures(record)
    checked = journal.verdict(record)
    if found.state is State.FAILED and checked and not checked["train"]:  # none of the user's code ran
        failures = [f"preflight: {checked['headline']}"]
    if as_json:
        values = {**asdict(found), "state": found.state.value}
        click.echo(show.dumps({"run": record.id, "job": record.job, "backend": record.backend, **values,
                               "steps": record.steps, "progress": step, "failures": failures}))  # fmt: skip
    else:
        click.echo(show.status(record, found, step, failures))
    if found.state in (State.FAILED, State.CANCELLED):
        sys.exit(1)
    if found.state is State.UNKNOWN:
        sys.exit(8)


@click.command()
@run_argument
@runs_option
@click.option("-f", "--follow", "following", is_flag=True, help="Wait for more until the job ends.")
@click.option("--rank", type=click.IntRange(0), help="One rank's own output.")
def logs(run: str, runs: str | None, following: bool, rank: int | None) -> None:
    """Print a run's output."""
    from launcher.run import run as execute

    record, backend = find(run, runs)
    for line in backend.logs(record, rank=rank, follow=following, run=execute):
        click.echo(line)
    if following:
        found = backend.state(record, execute)
        click.echo(f"{record.id}: {found.state.value}", err=True)


@click.command()
@run_argument
@runs_option
def cancel(run: str, runs: str | None) -> None:
    """End a run; its ranks are asked to save first."""
    from launcher import runs as journal
    from launcher.errors import Problem, Unreachable, UserError
    from launcher.run import run as execute

    record, backend = find(run, runs)
    if not record.job:
        hint = "squeue --me, or kubectl get pytorchjobs, shows whether it exists"
        raise Unreachable(Problem(f"{record.id}: the submission was not answered", hint))
    found = backend.state(record, execute)
    if found.state.over:
        journal.forget_secrets(record)
        raise UserError(Problem(f"{record.id} is over: {found.state.value}", "nothing is left to cancel"))
    journal.note(record.folder, "cancelling")
    backend.cancel(record, execute)
    journal.note(record.folder, "cancelled")
    if backend.state(record, execute).state.over:
        journal.forget_secrets(record)
    click.echo(f"{record.id}: cancelled; ranks that listen to SIGTERM save before they end", err=True)


COMMANDS = (status, logs, cancel)
