"""Looking at runs: watch, wait and logs. Like cli, this module may print and exit."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher import runs as records
    from launcher.runs.logs import Choice
    from launcher.runs.view import Files, View

runs_option = click.option("--runs", metavar="DIR", help="Where run directories live [default: ./dslaunch-runs].")
LOOK = 2.0  # seconds between two looks at the files of a run; its scheduler is asked less often
MINUTE = 60.0


def open_runs(names: Sequence[str], runs: str | None) -> list[Files]:
    """These runs, or all that are not over."""
    from launcher import runs as records
    from launcher.errors import Problem, UserError
    from launcher.runs.view import Files

    root = records.root(runs, os.environ)
    if names:
        return [Files(records.find(name, root).folder) for name in names]
    live = []
    for folder in records.known(root)[:200]:
        try:
            record = records.read(folder)
        except UserError:
            continue
        if record.job and not record.state.over:
            live.append(Files(folder))
    if not live:
        raise UserError(Problem(f"no run in {root} goes on", "dslaunch runs lists those that are over"))
    return live


def look(files: Sequence[Files]) -> list[View]:
    """All of them now; the schedulers are asked when it is their time."""
    from launcher.run import run as execute
    from launcher.runs import poll
    from launcher.runs.view import view

    known = poll.states([one.record() for one in files], run=execute, patient=True)
    now = time.time()
    return [view(one, known[one.record().id], now) for one in files]


@click.command()
@click.argument("names", metavar="[RUN]...", nargs=-1)
@runs_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per change and line.")
@click.option("--plain", is_flag=True, help="Lines as when the output is no terminal.")
def watch(names: tuple[str, ...], runs: str | None, as_json: bool, plain: bool) -> None:
    """Watch runs until they are over; without RUN, all that go on.

    On a terminal a live view, elsewhere a line for each change and at least one every minute. Ctrl-C leaves the jobs
    as they are. Exit code as of `dslaunch wait`; of several runs, the first that is not 0.
    """
    from launcher.runs.view import exit_code

    files = open_runs(names, runs)
    try:
        if as_json:
            views = tell(files)
        elif plain or not sys.stdout.isatty():
            views = lines(files)
        else:
            views = live(files)
    except KeyboardInterrupt:
        click.echo(f"left; {'the job goes' if len(files) == 1 else 'the jobs go'} on", err=True)
        sys.exit(130)
    sys.exit(next((code for view in views if (code := exit_code(view))), 0))


def ended(views: Iterable[View]) -> bool:
    from launcher.runs.view import exit_code

    return all(exit_code(view) is not None for view in views)


def rounds(files: Sequence[Files]) -> Iterator[list[View]]:
    """What there is to see, again and again, until all runs are over."""
    while True:
        views = look(files)
        yield views
        if ended(views):
            return
        time.sleep(LOOK)


def tell(files: Sequence[Files]) -> list[View]:
    """Each change as a line of JSON."""
    import json

    from launcher.runs.view import changes

    before: dict[str, View] = {}
    for views in rounds(files):
        for view in views:
            for change in changes(before.get(view.run), view, time.time()):
                click.echo(json.dumps(change))
            before[view.run] = view
        sys.stdout.flush()
    return views


def lines(files: Sequence[Files]) -> list[View]:
    """A line for each change of state, attempt or node, and every minute one that says how far it is."""
    from launcher import screen
    from launcher.runs.view import changes

    before: dict[str, View] = {}
    said: dict[str, float] = {}
    for views in rounds(files):
        for view in views:
            was = before.get(view.run)
            kinds = {change["kind"] for change in changes(was, view, time.time())} - {"event", "progress", "node"}
            if was is not None:
                for at, words, _ in screen.news(was, view):
                    click.echo(f"{screen.clock(at)} {view.run}: {words}")
                if {node.host: node.trouble for node in was.troubled} != {n.host: n.trouble for n in view.troubled}:
                    kinds.add("node")
            if kinds or time.monotonic() - said[view.run] >= MINUTE:
                click.echo(f"{screen.clock(time.time())} {view.run}: {screen.line(view)}")
                for failure in view.failures[:2] if view.phase.over else ():
                    click.echo(f"{screen.clock(time.time())} {view.run}: first failure: {failure}")
                said[view.run] = time.monotonic()
            before[view.run] = view
        sys.stdout.flush()
    return views


def live(files: Sequence[Files]) -> list[View]:
    """The screen, drawn anew four times a second so that a resize and the ages show at once."""
    from rich.console import Console
    from rich.live import Live

    from launcher import screen

    console = Console()

    def picture(views: list[View], since: float) -> Any:
        width, height = console.size
        return screen.screen(
            screen.aged(views, time.monotonic() - since), width=width, height=height, now=time.time()
        )

    views, looked = look(files), time.monotonic()
    with Live(picture(views, looked), console=console, screen=True, auto_refresh=False) as shown:
        while not ended(views):
            if time.monotonic() - looked >= LOOK:
                views, looked = look(files), time.monotonic()
            shown.update(picture(views, looked), refresh=True)
            time.sleep(0.25)
    console.print(screen.screen(views, width=console.width, height=200, now=time.time()))
    return views


@click.command()
@click.argument("name", metavar="RUN")
@runs_option
@click.option("--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Give up waiting; exit code 124.")
def wait(name: str, runs: str | None, timeout: float | None) -> None:
    """Wait until a run is over, and return its own exit code.

    A run that is queued or submitted again by itself is followed to its end, and a scheduler that does not answer is
    waited for. 0: done; the job's code where it failed, 1 where nobody knows it, or where it can never start (no such
    image); 130: cancelled; 124: the time-out came first; 8: the scheduler says that it has no such job, and no node
    shows a sign of life.
    """
    from launcher import screen
    from launcher.runs.view import exit_code

    files = open_runs([name], runs)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            (view,) = look(files)
            code = exit_code(view)
            if code is None and deadline is not None and time.monotonic() >= deadline:
                code = 124
            if code is not None:
                click.echo(f"{view.run}: {screen.line(view)}")
                sys.exit(code)
            time.sleep(min(LOOK, max(0.0, deadline - time.monotonic())) if deadline is not None else LOOK)
    except KeyboardInterrupt:
        click.echo("left; the job goes on", err=True)
        sys.exit(130)


@click.command(short_help="Print a run's output, in the order in which it came.")
@click.argument("name", metavar="RUN")
@runs_option
@click.option("-f", "--follow", "following", is_flag=True, help="Wait for more until the run is over.")
@click.option("--rank", "--ranks", "ranks", metavar="0,3-5", help="Of these ranks; of one, its own file.")
@click.option("--node", metavar="N|HOST", help="Of one node: its launcher and its ranks.")
@click.option("--service", metavar="NAME", help="What a service beside the training said instead.")
@click.option("--tail", type=click.IntRange(0, 1_000_000), metavar="LINES", help="Only the last so many.")
def logs(
    name: str,
    runs: str | None,
    following: bool,
    ranks: str | None,
    node: str | None,
    tail: int | None,
    service: str | None,
) -> None:
    """Print a run's output: all nodes', in the order in which it came.

    Lines of ranks begin with `[rank 3] `. One rank's own output comes from its own file, complete and as its program
    wrote it; several are picked from the job's output, as their files do not say when a line came.
    """
    from launcher import backends
    from launcher import runs as records
    from launcher.run import run as execute
    from launcher.runs import poll
    from launcher.runs.logs import Choice, parse_ranks, ranks_of, read

    record = records.one(records.find(name, records.root(runs, os.environ)), "logs")
    module: Any = backends.load(record.backend)
    choice = Choice(parse_ranks(ranks) if ranks else frozenset(), tail=tail)

    def over() -> bool:
        now = records.read(record.folder)
        phase, _ = poll.standing(now.story, poll.states([now], run=execute, patient=True)[now.id])
        return phase.over

    found: Iterable[str]
    if service is not None:
        found = read(record.folder, f"logs/service-{service}*.log", Choice(tail=tail), follow=following, over=over)
    elif hasattr(module, "OUTPUT"):
        if node is not None:
            number, there = ranks_of(record.folder, node)
            choice = Choice(choice.ranks & there if choice.ranks else there, None if choice.ranks else number, tail)
        found = read(record.folder, module.OUTPUT, choice, follow=following, over=over)
    else:
        found = of_pods(module, record, choice, node, following)
    try:
        for line in found:
            click.echo(line)
    except KeyboardInterrupt:
        sys.exit(130)
    if following:
        now = records.read(record.folder)
        phase, _ = poll.standing(now.story, poll.states([now], run=execute)[now.id])
        click.echo(f"{record.id}: {phase.value}", err=True)


def of_pods(module: Any, record: records.Record, choice: Choice, node: str | None, following: bool) -> Iterable[str]:
    """As the cluster's API gives them: of one rank or of all, of which the wanted ones are picked by their marks."""
    from launcher.errors import Problem, UserError
    from launcher.run import run as execute

    if node is not None:
        if not node.isdigit():
            raise UserError(Problem(f"--node {node}: pods are told apart by number", "--node 0 is the master"))
        first = int(node) * record.extra["per_node"]
        there = frozenset(range(first, first + record.extra["per_node"]))
        choice = replace(choice, ranks=choice.ranks & there if choice.ranks else there, node=int(node))
    found = module.logs(record, rank=choice.own, follow=following, run=execute)
    picked = found if choice.own is not None else (line for line in found if choice.takes(line))
    if choice.tail is None or following:
        return picked
    return deque(picked, maxlen=choice.tail)


COMMANDS = (watch, wait, logs)
