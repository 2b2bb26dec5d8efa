"""The command table: the only module that reads argv, prints, or exits."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import click

from launcher import __version__, cli_runs
from launcher.cli_runs import runs_option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from launcher import launch, runs
    from launcher.bundle import Bundle, Tree
    from launcher.errors import Problem
    from launcher.facts import Model
    from launcher.lint import Known, Report
    from launcher.plan import Plan
    from launcher.plan.advice import Saved
    from launcher.spec import Document
    from launcher.sweep import Chosen

F = TypeVar("F", bound="Callable[..., Any]")


ORDER = (
    "init", "import", "presets", "probe", "schema", "plan", "lint", "explain", "config", "env", "hostfile",
    "preflight",
    "sites", "render", "submit", "local", "slurm", "k8s", "runs", "status", "watch", "wait", "logs", "diagnose",
    "attach", "cancel", "resume", "checkpoints",
)  # fmt: skip


class Table(click.Group):
    """Commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


@click.group(cls=Table, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dslaunch", message="%(prog)s %(version)s")
def cli() -> None:
    """One YAML file to a running multi-node DeepSpeed job.

    \b
      dslaunch init > job.yaml                       write a job file
      dslaunch plan job.yaml                         what will be done, and why
      dslaunch preflight --nodes 4                   whether the nodes can do it
      dslaunch local job.yaml                        run it on this machine
      dslaunch slurm job.yaml                        submit it to Slurm
      dslaunch k8s job.yaml | kubectl apply -f -     or to Kubernetes
    """


def main() -> NoReturn:
    """Exit 0 yes, 1 no, 2 could not, 3 a bug, 8 the scheduler was not reached, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    try:
        code = cli.main(prog_name="dslaunch", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `dslaunch ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from launcher.errors import DISK, Problem, Unreachable, UserError

        if isinstance(error, OSError) and (error.errno in DISK or not error.errno):  # no number: a lock that is held
            place = f"{error.filename}: " if error.filename else ""
            error = UserError(Problem(f"{place}{error.strerror or error}"))
        if not isinstance(error, UserError):
            import traceback

            traceback.print_exc()
            click.echo("this is a bug in dslaunch: please report it with the lines above", err=True)
            sys.exit(3)
        from launcher import show

        click.echo(show.problems(error.problems), err=True)
        sys.exit(8 if isinstance(error, Unreachable) else 2)


# --- what commands share --------------------------------------------------------------------------


def job_file(command: F) -> F:
    """JOB, --site and --set, for every command that reads a job file."""
    return click.argument("job", metavar="JOB")(site_option(set_option(command)))


site_option = click.option("--site", metavar="NAME|FILE", help="What a cluster is like; laid under the job file.")
again_option = click.option("--again", is_flag=True, help="Also when this very job is queued or runs already.")
force_option = click.option("--force", is_flag=True, help="Also over a file that is there.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="A value laid over it; repeatable."
)


def load(
    job: str,
    site: str | None,
    overrides: tuple[str, ...],
    *,
    text: str | None = None,
    others: bool = False,
    backend: str | None = None,
) -> tuple[Document, Plan]:
    """The job file with its plan; problems leave with their file:line:column.

    `text` when it is read already; `others` weighs the ways not taken too; `backend` is where it goes.
    """
    from dataclasses import replace

    from launcher import plan
    from launcher.errors import UserError

    document = read(job, site, overrides, text=text)
    if document.spec.sweep:
        from launcher import sweep

        sweep.refuse(document, "this command")
    try:
        config = _model_file(document, job)
        place = backend or _leads_to(document)
        made = plan.make(document.spec, config_json=config, others=others, backend=place)
        return document, replace(made, notes=(*document.notes, *made.notes))
    except UserError as error:
        raise placed(document, error) from None


def _leads_to(document: Document) -> str | None:
    """The backend that a job file is written for, as far as its sections say so."""
    from launcher.yamldoc import Table

    given = document.root.entries if isinstance(document.root, Table) else {}
    return "kubernetes" if "kubernetes" in given and "slurm" not in given else None


def swept(
    job: str,
    site: str | None,
    overrides: tuple[str, ...],
    *,
    suffixed: bool = False,
    text: str | None = None,
    backend: str | None = None,
) -> list[Chosen]:
    """The points of a sweep, each with its plan; none where the job file is one job."""
    from launcher import plan, sweep
    from launcher.errors import UserError

    document = read(job, site, overrides, text=text)
    if document.spec.sweep is None:
        return []
    tell(document.notes)
    try:
        return sweep.expand(
            document,
            lambda more: read(job, site, (*overrides, *more), text=text),
            lambda one: plan.make(one.spec, config_json=_model_file(one, job), backend=backend),
            suffixed=suffixed,
        )
    except UserError as error:
        raise placed(document, error) from None


def refuse_sweep(job: str, site: str | None, overrides: tuple[str, ...], what: str) -> None:
    document = read(job, site, overrides)
    if document.spec.sweep:
        from launcher import sweep

        sweep.refuse(document, what)


def _model_file(document: Document, job: str) -> str | None:
    """The text of a model's own config.json, where the job file names one."""
    from launcher import yamldoc
    from launcher.errors import Problem, UserError

    if not (isinstance(document.spec.model, str) and document.spec.model.endswith(".json")):
        return None
    path = _base(job) / document.spec.model
    try:
        return yamldoc.decode(yamldoc.read_bytes(str(path)), name=str(path))
    except UserError as error:
        raise UserError(*(Problem(p.message, p.hint, ("model",)) for p in error.problems)) from None


def read(job: str, site: str | None, overrides: tuple[str, ...], *, text: str | None = None) -> Document:
    """The job file over the site's defaults. `text` when it is read already."""
    from launcher import sites, spec

    text = _text(job) if text is None else text
    asked, site = site, sites.path(site, os.environ)
    under = (site, _text(site)) if site else None
    if (asked or os.environ.get("DSLAUNCH_SITE")) and under and not under[1].strip():
        raise sites.empty(under[0])
    document = spec.load(text, name=_name(job), site=under, overrides=overrides, environ=os.environ)
    return _patched(_listed(document, job), job)


def _listed(document: Document, job: str) -> Document:
    """With the nodes of slurm.nodefile and slurm.exclude_file in their place."""
    if not document.spec.slurm.names_files or document.spec.site.backend not in (None, "slurm"):
        return document
    from launcher import listed

    return listed.read(document, base=_base(job))


def _patched(document: Document, job: str) -> Document:
    """With the file that kubernetes.patch names in its place: what is wrong in it has a line there."""
    from dataclasses import replace

    from launcher import yamldoc
    from launcher.errors import Problem, UserError

    asked, at = document.spec.kubernetes.patch, ("kubernetes", "patch")
    if not isinstance(asked, str):
        return document
    path = str(_base(job) / asked)
    try:
        data = yamldoc.read_bytes(path)
    except UserError as error:  # of the name, which stands in the job file
        there = os.path.exists(path)  # noqa: PTH110
        hint = "" if there else "a section of the object, spec: {...}, or a YAML file beside the job file"
        raise placed(document, UserError(*(replace(p, hint=hint, at=at, where="") for p in error.problems))) from None
    try:
        node = yamldoc.parse(yamldoc.decode(data, name=path), name=path)
    except UserError as error:
        raise placed(document, UserError(*(replace(p, at=p.at or at) for p in error.problems))) from None
    if not isinstance(node, yamldoc.Table):
        raise placed(document, UserError(Problem(f"{asked} is no mapping", "spec: {...}", at)))
    mark = node.mark
    root = yamldoc.merge(document.root, yamldoc.Table({"kubernetes": yamldoc.Table(
        {"patch": node}, {"patch": mark}, mark)}, {"kubernetes": mark}, mark))  # fmt: skip
    options = replace(document.spec.kubernetes, patch=yamldoc.plain(node))
    return replace(document, spec=replace(document.spec, kubernetes=options), root=root)


def overwrites(path: str | None, *, force: bool) -> None:
    """What a person may have edited since is replaced on purpose only. Before the work, not after it."""
    from launcher.errors import Problem, UserError

    if force and not path:
        raise click.UsageError("--force is for --output")
    if path and os.path.isfile(path) and not force:  # noqa: PTH113
        raise UserError(Problem(f"{path} is there already", "--force writes over it; without -o it is only shown"))


STDIN = "launcher.cli.stdin"


def _text(path: str) -> str:
    from launcher import yamldoc

    context = click.get_current_context(silent=True)
    if path != "-" or context is None:
        return yamldoc.decode(yamldoc.read_bytes(path), name=_name(path))
    told: dict[str, Any] = context.find_root().meta  # standard input is there once, and a sweep is looked for first
    if STDIN not in told:
        told[STDIN] = yamldoc.decode(yamldoc.read_bytes(path), name=_name(path))
    return str(told[STDIN])


def _name(path: str) -> str:
    return "<stdin>" if path == "-" else path


def placed(document: Document, error: Exception) -> Exception:
    """The same error, every problem with its line in the job file."""
    return type(error)(*(document.place(problem) for problem in getattr(error, "problems", ())))


def _base(job: str) -> Path:
    from pathlib import Path

    return Path.cwd() if job == "-" else Path(job).absolute().parent


def tell(notes: Any) -> None:
    from launcher import show

    for note in notes:
        click.echo(f"note: {show.plain(note)}", err=True)


def carried(backend: Any, document: Document, base: Path, runs_dir: str | None) -> dict[str, Tree]:
    """What pods unpack: the code as it is now, where the job file asks for it."""
    from launcher import runs, snapshot, software
    from launcher.backends.kubernetes import pod
    from launcher.errors import UserError
    from launcher.run import run

    if backend.__name__.rpartition(".")[2] != "kubernetes" or not pod.taken(document.spec):
        return {}
    try:
        if problems := software.problems(document.spec, "kubernetes"):
            raise UserError(*problems)
        found = snapshot.take(document.spec, base, run, avoid=[runs.root(runs_dir, os.environ)], elsewhere=True)
        tree = snapshot.packed(found) if found else None
    except UserError as error:
        raise placed(document, error) from None
    tell(found.notes() if found else [])
    return {"code": tree} if tree else {}


FILL_IN = "FILL_IN_"  # what `dslaunch import` writes where only a person knows


def render(backend: Any, document: Document, made: Plan, **code: Tree) -> Bundle:
    from launcher.errors import Problem, UserError

    ours, theirs = backend.__name__.rpartition(".")[2], made.spec.site.backend
    open_still = [
        Problem(f"{'.'.join(map(str, path))} is still to be filled in", "what import could not know", path)
        for path, value in document.leaves()
        if FILL_IN in str(value)
    ]
    try:
        if open_still:
            raise UserError(*open_still)
        if theirs not in (None, ours):
            hint = "dslaunch submit goes where the site says; --site names another one"
            raise UserError(Problem(f"the site is {theirs}, and this is for {ours}", hint, ("site", "backend")))
        bundle: Bundle = backend.render(made, **code)
        if ours == "kubernetes":
            tell(_of_patches(backend, made, bundle, **code))
    except UserError as error:
        raise placed(document, error) from None
    return bundle


def _of_patches(backend: Any, made: Plan, bundle: Bundle, **code: Tree) -> list[str]:
    """What lint finds in the patched objects and not in dslaunch's own: warnings. Raises UserError for errors."""
    options = made.spec.kubernetes
    patches = [name for name in ("patch", "pod_patch") if getattr(options, name)]
    if not patches:
        return []
    from dataclasses import replace

    from launcher import lint
    from launcher.errors import Problem, UserError

    def found(text: str) -> dict[tuple[str, str], lint.Result]:
        # of variables of its own manifests lint leaves the judgement to `plan`, which has not seen the patch
        text = text.replace("app.kubernetes.io/managed-by: dslaunch", "app.kubernetes.io/managed-by: patch")
        return {(one.rule, one.message): one for one in lint.manifest(text, name=bundle.entry).results}

    bare = replace(options, patch=None, pod_patch=None)
    before = found(backend.render(replace(made, spec=replace(made.spec, kubernetes=bare)), **code).text(bundle.entry))
    new = [one for key, one in found(bundle.text(bundle.entry)).items() if key not in before]
    at = ("kubernetes", patches[0])
    problems = [Problem(f"{one.message} [{one.rule}]", one.fix, at) for one in new if one.severity == "error"]
    if problems:
        raise UserError(*problems)
    return [f"{'.'.join(at)}: {one.message} [{one.rule}]" for one in new]


# --- looking --------------------------------------------------------------------------------------


@cli.command(short_help="Show every decision with its reason, its memory, its time.")
@job_file
@click.option("--alternatives", "others", is_flag=True, help="Also the ways not taken, and what each would cost.")
@click.option("--tokens", type=float, metavar="N", help="Also the days that N tokens take: 1e12.")
@click.option("--html", metavar="FILE", help="Write it as one page with pictures instead.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def plan(
    job: str,
    site: str | None,
    overrides: tuple[str, ...],
    others: bool,
    tokens: float | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Show every decision with its reason, the memory it needs and the time it takes."""
    from launcher import show

    if points := swept(job, site, overrides):
        from launcher import sweep

        if html or tokens or others:
            sweep.refuse(read(job, site, overrides), "that picture" if html else "that")
        rows = [sweep.row(point) for point in points]
        click.echo(show.dumps(rows) if as_json else sweep.table(rows))
        tell({note: None for point in points for note in point.plan.notes})
        return
    document, made = load(job, site, overrides, others=True)
    if html:
        from pathlib import Path

        from launcher.bundle import write_text

        write_text(Path(html), show.picture(made, tokens=tokens))
        click.echo(f"written: {html}", err=True)
    elif as_json:
        click.echo(show.plan_json(made, document))
    else:
        click.echo(show.plan(made, document, others=others, tokens=tokens))
    tell(made.notes)


@cli.group(short_help="Print the job as it is read, or its DeepSpeed config.")
def config() -> None:
    """Print what a job file amounts to."""


@config.command("deepspeed")
@job_file
def config_deepspeed(job: str, site: str | None, overrides: tuple[str, ...]) -> None:
    """Print the DeepSpeed config."""
    from launcher.bundle import config_json

    _, made = load(job, site, overrides)
    if made.config is None:
        from launcher.errors import Problem, UserError

        message = "this job hands no DeepSpeed config over: its model is not named, and it asks for none"
        raise UserError(Problem(message, "train.config_flag, or keys under train.deepspeed, ask for one"))
    click.echo(config_json(made.config), nl=False)
    tell(made.notes)


@config.command("show", short_help="Print the job: the site's values, the job file's, and those of --set.")
@job_file
@click.option("--origin", is_flag=True, help="Say behind each value where it stands.")
@click.option("--defaults", is_flag=True, help="Also what nobody gave.")
@click.option("--json", "as_json", is_flag=True, help="Field, value and origin as JSON.")
def config_show(
    job: str, site: str | None, overrides: tuple[str, ...], origin: bool, defaults: bool, as_json: bool
) -> None:
    """Print the job that site, job file and --set make together; the result is a job file itself."""
    from launcher import origins
    from launcher.show import dumps

    found = origins.rows(read(job, site, overrides), defaults=defaults)
    if as_json:
        rows = [{"field": ".".join(map(str, path)), "value": value, "origin": where} for path, value, where in found]
        click.echo(dumps(rows))
    else:
        click.echo(origins.text(found, origin=origin), nl=False)


@cli.command(short_help="Print every rank's variables as exports, with reasons.")
@job_file
def env(job: str, site: str | None, overrides: tuple[str, ...]) -> None:
    """Print the variables of every rank as exports, each with its reason."""
    from launcher import show

    _, made = load(job, site, overrides)
    click.echo(show.exports(made.variables), nl=False)
    tell(made.notes)


@cli.command()
@click.argument("job", metavar="[JOB]", required=False)
@site_option
@set_option
@click.option("--nodes", metavar="LIST", help="A node list such as gpu[001-004,7].")
@click.option("--slots", type=click.IntRange(1, 1024), help="Ranks per node, where no job file says so.")
@click.option("--fold", is_flag=True, help="One line in Slurm's notation instead of a hostfile.")
@click.option("--check", metavar="FILE", help="Read a hostfile strictly instead, and print it.")
def hostfile(
    job: str | None,
    site: str | None,
    overrides: tuple[str, ...],
    nodes: str | None,
    slots: int | None,
    fold: bool,
    check: str | None,
) -> None:
    """Print `host slots=N` lines.

    Hosts come from --nodes, from the job file's slurm.nodelist, from the pods of a Kubernetes job with a
    container, or from the scheduler's environment inside an allocation.
    """  # fmt: skip
    from launcher import hostfile as hostfiles
    from launcher import yamldoc
    from launcher.errors import Problem, UserError

    if check:
        hosts = hostfiles.parse(yamldoc.decode(yamldoc.read_bytes(check), name=check), source=check)
    else:
        document, made = load(job, site, overrides) if job else (None, None)
        per_node = slots or (made.spec.per_node if made else None)
        given = nodes or (made.spec.slurm.nodelist if made else None)
        if given:
            if per_node is None:
                raise UserError(Problem("--nodes needs --slots or a job file to know the ranks per node"))
            names = hostfiles.expand(given)
            if made and document and len(names) < made.spec.resources.nodes:
                problem = Problem(
                    f"{made.spec.resources.nodes} nodes train and the list names {len(names)}",
                    at=("resources", "nodes"),
                )
                raise UserError(document.place(problem))
            if made and not nodes:  # spares wait; the first that are healthy train
                names = names[: made.spec.resources.nodes]
            hosts = tuple(hostfiles.Host(name, per_node) for name in names)
        elif "SLURM_JOB_NODELIST" in os.environ or not made or not made.spec.box:
            hosts = hostfiles.from_environment(os.environ)
        else:
            from launcher.backends.kubernetes import kinds

            hosts = tuple(hostfiles.Host(pod, per_node or 1) for pod in kinds.hosts(made.spec))
    if fold:
        click.echo(hostfiles.fold(host.name for host in hosts))
    else:
        click.echo(hostfiles.render(hosts), nl=False)


@cli.command(short_help="Judge DeepSpeed configs, job files, scripts, manifests, environments.")
@click.argument("files", metavar="FILE...", nargs=-1)
@click.option("--env", "variables", is_flag=True, help="Variables of NCCL and torch, in any file; or of this shell.")
@click.option("--fabric", metavar="NAME", help="With --env: the network, as in `dslaunch presets --fabrics`.")
@click.option("--nodes", type=click.IntRange(1, 100_000), help="Nodes [default with --gpus: 1].")
@click.option("--gpus", type=click.IntRange(0, 64), help="GPUs per node; 0 is CPU.")
@click.option("--gpu", metavar="TYPE", help="GPU type, as in `dslaunch presets --gpus`.")
@click.option("--model", metavar="NAME", help="A preset, or the path of a Hugging Face config.json.")
@click.option("--seq-len", type=click.IntRange(1, 10**9), help="Tokens per sample [default: 2048].")
@click.option("--steps", type=click.IntRange(1, 10**9), help="Optimizer steps of the run.")
@click.option("--deepspeed", metavar="VERSION", help="On the nodes [default: the newest].")
@click.option("--trainer", type=click.Choice(["auto", "plain", "hf"]), default="auto", show_default=True,
              help="Who reads the config; auto is hf where a value is auto.")  # fmt: skip
@click.option("--optimizer", metavar="CLASS", help="The optimizer that the program hands over; `none` for none.")
@click.option("--checkpoint", metavar="DIR", help="A checkpoint it has to load; only file names are looked at.")
@click.option("--fix", is_flag=True, help="Write what is certain into the files; `-` goes to standard output.")
@click.option("--diff", is_flag=True, help="Show what --fix would write; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON.")
@click.option("--sarif", "as_sarif", is_flag=True, help="Results as SARIF 2.1.0.")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
@site_option
def lint(
    files: tuple[str, ...],
    variables: bool,
    fabric: str | None,
    nodes: int | None,
    gpus: int | None,
    gpu: str | None,
    model: str | None,
    seq_len: int | None,
    steps: int | None,
    deepspeed: str | None,
    trainer: Literal["auto", "plain", "hf"],
    optimizer: str | None,
    checkpoint: str | None,
    fix: bool,
    diff: bool,
    as_json: bool,
    as_sarif: bool,
    strict: bool,
    site: str | None,
) -> None:
    """Judge DeepSpeed configs, also Hugging Face's, job files, sbatch scripts, manifests; name what to change.

    Exit 0 without errors, 1 with errors, 2 when a file could not be read.
    """  # fmt: skip
    from pathlib import Path

    from launcher import facts, show
    from launcher import lint as linter
    from launcher.bundle import write_text
    from launcher.errors import Problem, UserError
    from launcher.plan.advice import SEQ_LEN

    if variables:
        _without_effect()
        _lint_variables(files, fabric, as_json=as_json, as_sarif=as_sarif, strict=strict)
        return
    if not files or fabric:
        said = "--fabric goes with --env" if fabric else "no file is named"
        raise UserError(Problem(said, "dslaunch lint ds_config.json, or dslaunch lint --env run.sh"))
    if deepspeed and len(facts.version(deepspeed)) < 3:
        raise UserError(Problem(f"--deepspeed {deepspeed}: no version of three numbers", "--deepspeed 0.19.6"))
    known = linter.Known(
        nodes=nodes,
        gpus_per_node=gpus,
        model=_model(model) if model else None,
        gpu=facts.gpu(gpu) if gpu else None,
        seq_len=seq_len or SEQ_LEN,
        steps=steps,
        deepspeed=deepspeed or "",
        trainer=trainer,
        saved=_saved(checkpoint) if checkpoint else None,
        optimizer=optimizer,
    )
    reports: list[Report] = []
    unread: list[Problem] = []
    for file in files:
        try:
            text, report = _judged(file, known, site)
        except UserError as error:
            unread += error.problems
            continue
        if fix or diff:
            fixed = linter.fix(text, name=report.file, known=known) if report.config else None
            if fixed is None:
                tell([f"{report.file} is a {report.kind}: lint changes DeepSpeed configs only"])
            else:
                for change in fixed.changes:
                    click.echo(f"{show.plain(report.file)}: {show.plain(change)}", err=True)
                if diff:
                    click.echo(linter.diff(text, fixed.text, name=report.file), nl=False)
                elif file == "-":
                    click.echo(fixed.text, nl=False)
                elif fixed.text != text:
                    write_text(Path(file), fixed.text)
                report = report if diff else fixed.report
        reports.append(report)
    err = diff or (fix and "-" in files)
    _tell_reports(reports, unread, as_json=as_json, as_sarif=as_sarif, strict=strict, err=err)


def _tell_reports(
    reports: list[Report], unread: list[Problem], *, as_json: bool, as_sarif: bool, strict: bool, err: bool = False
) -> None:
    """Results to read or to parse, then exit 1 for errors, 2 for what could not be read."""
    from launcher import lint as linter
    from launcher import sarif, show
    from launcher.errors import UserError

    if as_json or as_sarif:
        click.echo(show.dumps(sarif.log(reports) if as_sarif else linter.as_json(reports)))
    elif any(report.results for report in reports):
        click.echo(linter.text(reports), err=err)
    if reports and not as_json and not as_sarif:
        click.echo(linter.summary(reports), err=True)
    if unread:
        raise UserError(*unread)
    if any(report.count("error") or (strict and report.count("warning")) for report in reports):
        sys.exit(1)


def _lint_variables(
    files: tuple[str, ...], fabric: str | None, *, as_json: bool, as_sarif: bool, strict: bool
) -> None:
    """Files, or this shell's environment with the two files that NCCL reads by itself."""
    from launcher import envlint, facts, yamldoc
    from launcher import lint as linter
    from launcher.errors import Problem, UserError

    try:
        network = facts.fabric(fabric) if fabric else None
    except UserError as error:
        raise UserError(*(Problem(f"--fabric: {one.message}", one.hint) for one in error.problems)) from None
    reports: list[Report] = []
    unread: list[Problem] = []
    if not files:
        here = [envlint.Assignment(name, value, expanded=True) for name, value in os.environ.items()]
        reports.append(linter.variables(here, name="the environment", fabric=network))
        own = [os.environ.get("NCCL_CONF_FILE") or os.path.expanduser("~/.nccl.conf"), "/etc/nccl.conf"]  # noqa: PTH111
        files = tuple(path for path in own if os.path.isfile(path))  # noqa: PTH113
    for file in files:
        name = "<stdin>" if file == "-" else file
        try:
            text = yamldoc.decode(yamldoc.read_bytes(file), name=name)
        except UserError as error:
            unread += error.problems
            continue
        reports.append(linter.environment(text, name=name, fabric=fabric))
    _tell_reports(reports, unread, as_json=as_json, as_sarif=as_sarif, strict=strict)


def _without_effect() -> None:
    """Refuse what was given beside --env and says nothing about variables."""
    from launcher.errors import Problem, UserError

    context = click.get_current_context()
    with_env = {"files", "variables", "fabric", "as_json", "as_sarif", "strict"}
    given = [
        str(option.opts[0])
        for option in context.command.params
        if option.name not in with_env
        and context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise UserError(Problem(f"with --env {', '.join(given)} has no effect", "leave it out, or leave --env out"))


def _judged(file: str, known: Known, site: str | None) -> tuple[str, Report]:
    """A file's text, and what lint says of it."""
    from launcher import lint as linter
    from launcher import yamldoc
    from launcher.errors import Problem, UserError

    name = "<stdin>" if file == "-" else file
    data = yamldoc.read_bytes(file)
    text = yamldoc.decode(data, name=name)
    kind = linter.kind(text, name=name)
    if linter.another(kind, text, name=name):
        message = f"{name} is nothing that lint reads"
        hint = (
            "a job file (.yaml), a DeepSpeed config (.json), an sbatch or shell script, Kubernetes manifests; "
            "of a program, the config that it hands over"
        )
        raise UserError(Problem(message, hint))
    if kind in ("script", "manifest"):
        judge = linter.script if kind == "script" else linter.manifest
        return text, judge(text, name=name, known=known)
    if kind == "deepspeed":
        text = ("\ufeff" if data.startswith(b"\xef\xbb\xbf") else "") + text
        return text, linter.lint(text, name=name, known=known)
    try:
        points = swept(file, site, (), text=text)
        document, made = (points[0].document, points[0].plan) if points else load(file, site, (), text=text)
    except UserError as error:
        return text, linter.refused(error.problems, name=name, text=text)
    return text, linter.accepted(document, made, name=name)


def _model(name: str) -> Model:
    from launcher import facts, yamldoc

    if not name.endswith(".json"):
        return facts.model(name)
    return facts.model(name, config_json=yamldoc.decode(yamldoc.read_bytes(name), name=name))


def _saved(folder: str) -> Saved:
    """The names below a checkpoint's folder, two levels deep, and what `latest` says."""
    from pathlib import Path

    from launcher.errors import Problem, UserError
    from launcher.plan import advice

    root = Path(folder)
    if not root.is_dir():
        raise UserError(Problem(f"{folder} is not a directory", "--checkpoint is the folder that holds `latest`"))
    names = [path.relative_to(root).as_posix() for pattern in ("*", "*/*") for path in root.glob(pattern)]
    file = root / "latest"
    latest = file.read_bytes()[:4096].decode(errors="replace") if file.is_file() else None
    return advice.saved(folder.rstrip("/"), names, latest=latest)


@cli.command(short_help="Explain an id of lint, plan or diagnose; or list lint's.")
@click.argument("rule", metavar="[DSL031]", required=False)
def explain(rule: str | None) -> None:
    """Explain what lint, plan and diagnose name by an id (DSL031, cuda_oom), or list lint's and plan's."""
    from launcher import diagnoses
    from launcher import lint as linter
    from launcher.diagnose import tables

    found = diagnoses.explained(rule, *tables.read()) if rule else None
    if found is None:
        found = linter.explained(linter.row(rule)) if rule else linter.listed()
    click.echo(found)


@cli.command()
@click.option("--gpus", is_flag=True, help="GPU types instead of models.")
@click.option("--fabrics", is_flag=True, help="Networks instead of models.")
@click.option("--networks", is_flag=True, help="What pods need to reach a network, instead of models.")
@click.option("--configurations", is_flag=True, help="A guide's configurations instead, with what is wrong in each.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def presets(gpus: bool, fabrics: bool, networks: bool, configurations: bool, as_json: bool) -> None:
    """List models, GPU types or networks that a job file can name."""
    from dataclasses import asdict

    from launcher import facts, show

    flags = {"--gpus": gpus, "--fabrics": fabrics, "--networks": networks, "--configurations": configurations}
    given = [flag for flag, asked in flags.items() if asked]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} are a list each: give one of them")

    if gpus:
        click.echo(show.dumps([asdict(row) for row in facts.gpus().values()]) if as_json
                   else show.gpus(facts.gpus().values()))  # fmt: skip
    elif fabrics:
        click.echo(show.dumps([asdict(row) for row in facts.fabrics().values()]) if as_json
                   else show.fabrics(facts.fabrics().values()))  # fmt: skip
    elif networks:
        from launcher.backends.kubernetes import network

        click.echo(show.dumps([asdict(row) for row in network.profiles().values()]) if as_json
                   else show.networks(network.profiles().values()))  # fmt: skip
    elif configurations:
        click.echo(show.dumps([asdict(row) for row in facts.presets().values()]) if as_json
                   else show.configurations(facts.presets().values()))  # fmt: skip
    else:
        click.echo(show.models_json(facts.models().values()) if as_json else show.models(facts.models().values()))


@cli.command(short_help="Explain the job file's fields, or print its JSON schema.")
@click.argument("section", metavar="[SECTION]", required=False)
def schema(section: str | None) -> None:
    """Explain the fields of one section: slurm, kubernetes.network. Without one, the JSON schema for editors."""
    import shutil

    from launcher import schema as schemas
    from launcher import show

    if section:
        from launcher import fields

        click.echo(fields.text(section, width=min(shutil.get_terminal_size((118, 24)).columns, 140)))
    else:
        click.echo(show.dumps(schemas.job()))


@cli.command(short_help="Print a commented job file for a model, a GPU, so many nodes.")
@click.option("--model", help="A preset, or a config.json [default: gpt-demo].")
@click.option("--gpu", help="GPU type; without it the job trains on CPU.")
@click.option("--nodes", type=click.IntRange(1, 100_000), help="[default: 2, or the --preset's]")
@click.option("--gpus-per-node", type=click.IntRange(1, 64), help="[default: 8 with --gpu, or the --preset's]")
@click.option("--fabric", help="Network between the nodes [default with --gpu: infiniband].")
@click.option("--name", help="Name of the job [default: from the model].")
@click.option("--preset", help="A guide's configuration, corrected, instead of --model; `list` lists them.")
@click.option("--example", help="A shipped example instead; `list` lists them.")
def init(
    model: str | None,
    gpu: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    fabric: str | None,
    name: str | None,
    preset: str | None,
    example: str | None,
) -> None:
    """Print a commented job file for a model, GPU and number of nodes."""  # fmt: skip
    from launcher import examples, facts
    from launcher.errors import Problem, UserError

    given = [flag for flag, value in (("--model", model), ("--preset", preset), ("--example", example)) if value]
    if len(given) > 1:
        raise UserError(Problem(f"{' and '.join(given)} each name a job file", hint="give one of them"))
    if preset == "list":
        click.echo("\n".join(f"{row.name:26}{row.says}" for row in facts.presets().values() if row.job))
    elif example == "list":
        click.echo("\n".join(f"{row.name:43}{row.says}" for row in examples.shipped()))
    elif example:
        click.echo(examples.text(example), nl=False)
    elif preset:
        click.echo(
            examples.preset(preset, gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node, fabric=fabric, name=name),
            nl=False,
        )
    else:
        click.echo(
            examples.write(
                model=model or "gpt-demo",
                gpu=gpu,
                nodes=nodes or 2,
                gpus_per_node=gpus_per_node,
                fabric=fabric,
                name=name,
            ),
            nl=False,
        )


@cli.command("import", short_help="Make a job file of an sbatch script or a manifest.")
@click.argument("file", metavar="FILE")
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-o", "--output", metavar="FILE", help="Write it there instead of to standard output.")
@force_option
def import_(file: str, arguments: tuple[str, ...], output: str | None, force: bool) -> None:
    """Make a job file of an sbatch script or of Kubernetes manifests, or of what dslaunch rendered; - reads stdin.

    ARGS are the script's own, its $1, $2 and "$@", as sbatch would get them; -- goes before those that begin with -.

    On standard error: what became of every line. Exit 1 when something is left for you to say, marked FILL IN.
    """
    from pathlib import Path

    from launcher import show
    from launcher.bundle import write_text
    from launcher.imports import manifests, masked, rendered, sbatch, write

    overwrites(output, force=force)
    text = masked.hidden(_text(file))
    environ = {name: masked.hidden(value) for name, value in os.environ.items()}

    def beside(name: str) -> str | None:
        path = Path(file).parent / name
        return _text(str(path)) if path.is_file() else None

    backend: Literal["slurm", "kubernetes"] = "slurm"
    manifest = manifests.recognised(text, name=file)
    if arguments and (manifest or rendered.ours(text)):
        raise click.UsageError(f"{file} takes no arguments: it is no script of yours")
    if manifest:
        made, backend = manifests.read(text, name=_name(file), environ=environ), "kubernetes"
    elif rendered.ours(text) and file != "-":
        made = rendered.read(text, name=file, beside=beside)
    else:
        told = [masked.hidden(one) for one in arguments]
        made = sbatch.read(text, name=_name(file), environ=environ, arguments=told)
    made = masked.finished(made)
    body, problems, variables = write.checked(made, name=_name(file), backend=backend)
    if output:
        write_text(Path(output), body)
    else:
        click.echo(body, nl=False)
    for note in made.notes:
        place = f"{show.plain(_name(file))}:{note.line}: " if note.line else ""
        click.echo(f"{place}{note.kind}: {show.plain(note.message)}", err=True)
    tell([f"it reads {name} where it is loaded" for name in sorted(variables)])
    click.echo(f"{made.typed} of {made.typed + made.raw} fields are typed", err=True)
    for problem in problems:
        click.echo(f"fill in: {show.plain(str(problem))}", err=True)
    if problems or made.to_fill:
        sys.exit(1)


@cli.command(
    context_settings={"ignore_unknown_options": True},
    short_help="See what nodes have; print it as resources of a job file.",
)
@click.option("--nodes", metavar="N|LIST", help="Through srun on N nodes, or on gpu[01-04]; without it, here.")
@click.option("--site", type=click.Choice(["slurm", "kubernetes"]), help="Ask the scheduler, and print a site file.")
@click.option("--login", metavar="USER@HOST", help="With --site slurm: over ssh.")
@click.option("--namespace", metavar="NAME", help="With --site kubernetes [default: the context's].")
@click.option("-o", "--output", metavar="FILE", help="With --site: write it there, when everything was answered.")
@force_option
@click.option("--json", "as_json", is_flag=True, help="What was seen and concluded, as JSON.")
@click.argument("srun", metavar="[SRUN OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def probe(
    nodes: str | None,
    site: str | None,
    login: str | None,
    namespace: str | None,
    output: str | None,
    force: bool,
    as_json: bool,
    srun: tuple[str, ...],
) -> None:
    """See what nodes have, and print the resources of a site file or job file.

    \b
      dslaunch probe                                        this machine
      dslaunch probe --nodes 4 --partition=gpu --gres=gpu:8 four of Slurm's
      dslaunch probe --site slurm -o ~/.config/dslaunch/sites/here.yaml

    Every line says what it was concluded from. Exit code 1 when nodes differ or do not answer.
    """  # fmt: skip
    if site:
        from pathlib import Path

        output = str(Path(output).expanduser()) if output else None
        overwrites(output, force=force)
        text = _probe_site(site, login, namespace, srun, as_json=as_json)
        if not output:
            click.echo(text, nl=False)
            return
        from launcher.bundle import write_text

        target = Path(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
        click.echo(f"written: {target}", err=True)
        return
    if output or force:
        raise click.UsageError("--output is for --site; what is seen of nodes goes to standard output")
    from dataclasses import asdict

    from launcher import hostfile as hostfiles
    from launcher import probe as probing
    from launcher import show
    from launcher.bundle import NODE
    from launcher.errors import Problem, UserError
    from launcher.run import run

    if srun and not nodes:
        raise UserError(Problem(f"{srun[0]} is for srun, and nothing is asked of it", "--nodes 4 with it"))
    look, count = NODE / "look.py", 1
    asked: tuple[str, ...] = ()
    command = [sys.executable, str(look)]
    if nodes:
        asked = () if nodes.isascii() and nodes.isdigit() else hostfiles.expand(nodes)
        count = len(asked) or int(nodes)
        command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--wait=0",
                   *([f"--nodelist={nodes}"] if asked else []), *srun,
                   "python3", "-c", look.read_text(encoding="utf-8")]  # fmt: skip
    done = run(command, timeout=900 if nodes else 120)
    seen = probing.assembled(done.out)
    if not seen:
        raise UserError(Problem(f"{command[0]} saw nothing: {done.err.strip()[-400:] or 'no output'}"))
    found = [probing.conclude(one) for one in seen]
    cluster = probing.together(found, asked=asked) if nodes else None
    silent = count - len(found)
    if as_json:
        together = {"differs": cluster.differs, "missing": cluster.missing, "silent": silent} if cluster else {}
        each = [{"seen": one, "found": asdict(its)} for one, its in zip(seen, found, strict=True)]
        click.echo(show.dumps({"nodes": each, **together}))
    else:
        click.echo(probing.text(cluster.common if cluster else found[0], cluster))
    if silent > 0:
        click.echo(f"{silent} of {count} nodes did not answer: {done.err.strip()[-400:]}", err=True)
    if silent > 0 or (cluster and (cluster.differs or cluster.missing)):
        sys.exit(1)


def _probe_site(kind: str, login: str | None, namespace: str | None, srun: tuple[str, ...], *, as_json: bool) -> str:
    """What the scheduler itself says, as a site file."""
    from dataclasses import asdict

    from launcher import profile, show

    if kind == "kubernetes":
        from launcher.backends.kubernetes import api

        space, said = api.facts(profile.KUBERNETES, namespace)
        found, head = profile.kubernetes(said, namespace=space), f"dslaunch probe --site kubernetes, {space}"
    else:
        from launcher import remote
        from launcher.backends.slurm import controller
        from launcher.run import run

        ask = remote.runner(login) if login else run
        options = dict(word.removeprefix("--").split("=", 1) for word in srun if "=" in word)
        answers = {"config": ask(list(profile.SLURM["config"]), timeout=60)}
        if answers["config"].code != 0:  # nobody else would answer, each after its own time
            raise controller.unreached(answers["config"], "run it on a login node, or with --login USER@HOST")
        answers |= {name: ask(list(argv), timeout=60) for name, argv in profile.SLURM.items() if name != "config"}
        told = {name: answer.out for name, answer in answers.items() if answer.code == 0}
        found = profile.slurm(told, partition=options.get("partition"), login=login)
        head = "dslaunch probe --site slurm"
    return f"{show.dumps(asdict(found))}\n" if as_json else profile.text(found, head=head)


# --- running --------------------------------------------------------------------------------------


@cli.command()
@job_file
@runs_option
@click.option("--detach", is_flag=True, help="Print the run's id and return at once.")
@again_option
def local(
    job: str, site: str | None, overrides: tuple[str, ...], runs: str | None, detach: bool, again: bool
) -> None:
    """Run the job on this machine: one process tree per node."""
    from launcher.backends import local as backend

    refuse_sweep(job, site, overrides, "dslaunch local")
    document, made = load(job, site, overrides)
    bundle = render(backend, document, made)
    tell(made.notes)
    begun = start("local", job, document, made, bundle, runs, again=again)
    if begun.how == "already" or detach:
        if begun.how == "already":
            tell([f"already running as {begun.record.id}: dslaunch status {handle(begun.record, runs)}"])
        click.echo(begun.record.id)
        return
    sys.exit(follow(begun.record))


@cli.command()
@job_file
@runs_option
@click.option("--dry-run", is_flag=True, help="Print the script that would be submitted; submit nothing.")
@click.option("--test-only", is_flag=True, help="Ask the controller when it would start; submit nothing.")
@again_option
def slurm(
    job: str,
    site: str | None,
    overrides: tuple[str, ...],
    runs: str | None,
    dry_run: bool,
    test_only: bool,
    again: bool,
) -> None:
    """Submit the job to Slurm, and print the run's id."""
    from launcher.backends import slurm as backend
    from launcher.errors import UserError

    points = swept(job, site, overrides, backend="slurm")
    if points:
        document, made, bundle = array(points, job, site, overrides)
    else:
        document, made = load(job, site, overrides, backend="slurm")
        bundle = render(backend, document, made)
    tell([*made.notes, *backend.notes(made, os.environ)])
    if dry_run:  # an exact script, also where the job's files are not: on a laptop
        try:
            present(document, made, _base(job), host=made.spec.slurm.login)
        except UserError as error:
            tell(f"a submission from here is refused: {problem}" for problem in error.problems)
        click.echo(bundle.text(bundle.entry), nl=False)
        return
    if test_only:
        present(document, made, _base(job), host=made.spec.slurm.login)
        import tempfile
        from pathlib import Path

        from launcher.bundle import write
        from launcher.run import run

        with tempfile.TemporaryDirectory(prefix="dslaunch-") as folder:
            write(bundle, Path(folder) / "run", submitted_from=_base(job), secrets={})
            try:
                click.echo(backend.test_only(Path(folder) / "run", made.spec, run))
            except UserError as error:
                raise placed(document, error) from None
        return
    told_started(start("slurm", job, document, made, bundle, runs, again=again, points=points), runs, "job")


def array(
    points: list[Chosen], job: str, site: str | None, overrides: tuple[str, ...]
) -> tuple[Document, Plan, Bundle]:
    """The job file, its first point's plan, and one bundle for all points."""
    from launcher.backends.slurm import array as arrays
    from launcher.errors import UserError

    document = read(job, site, overrides)
    sweep = document.spec.sweep
    try:
        bundle = arrays.render([point.plan for point in points], parallel=sweep.parallel if sweep else None)
    except UserError as error:
        raise placed(document, error) from None
    return document, points[0].plan, bundle


@cli.command(short_help="Print the Kubernetes manifests, or create the objects.")
@job_file
@runs_option
@click.option("--apply", is_flag=True, help="Create the objects with the kubernetes client instead of printing them.")
@click.option(
    "--validate",
    type=click.Choice(["client", "server"]),
    help="Only ask whether they would be taken: by the rules known here, or the cluster itself in a strict dry run.",
)
def k8s(
    job: str, site: str | None, overrides: tuple[str, ...], runs: str | None, apply: bool, validate: str | None
) -> None:
    """Print the Kubernetes manifests: the job, behind the ConfigMaps with its scripts."""
    from launcher.backends import kubernetes as backend

    points = swept(job, site, overrides, suffixed=True, backend="kubernetes")
    if points:
        from launcher import sweep

        sweep.unbounded(read(job, site, overrides))
    jobs = [(one.document, one.plan) for one in points] or [load(job, site, overrides, backend="kubernetes")]
    bundles = [
        render(backend, document, made, **carried(backend, document, _base(job), runs)) for document, made in jobs
    ]
    tell({note: None for _, made in jobs for note in (*made.notes, *backend.notes(made))})
    if validate and apply:
        raise click.UsageError("--validate asks, and --apply creates: one of them")
    if validate:
        for (document, _), bundle in zip(jobs, bundles, strict=True):
            taken(document, bundle, by=validate)
        return
    if not apply:
        click.echo("".join(bundle.text(bundle.entry) for bundle in bundles), nl=False)  # each begins with ---
        return
    for (document, made), bundle in zip(jobs, bundles, strict=True):
        told_started(start("kubernetes", job, document, made, bundle, runs), runs, backend.kind(made.spec))


BACKENDS = {"slurm": "slurm", "kubernetes": "k8s", "local": "local"}  # the command of each


def _where(job: str, site: str | None, overrides: tuple[str, ...]) -> click.Command:
    """The command of the backend that the site names."""
    from launcher import sites
    from launcher.errors import Problem, UserError

    backend = read(job, site, overrides).spec.site.backend
    if backend is None:
        if path := sites.path(site, os.environ):
            raise sites.silent(path)
        hint = "--site NAME of a file with `site: {backend: slurm}`; or dslaunch slurm, dslaunch k8s, dslaunch local"
        raise UserError(Problem("no site says where this job goes", hint))
    return cli.commands[BACKENDS[backend]]


@cli.command(short_help="Submit the job where its site says: Slurm, Kubernetes or here.")
@job_file
@runs_option
@again_option
@click.pass_context
def submit(
    ctx: click.Context, job: str, site: str | None, overrides: tuple[str, ...], runs: str | None, again: bool
) -> None:
    """Submit the job where its site says; the same job file goes to either scheduler."""
    command = _where(job, site, overrides)
    given: dict[str, Any] = {"job": job, "site": site, "overrides": overrides, "runs": runs}
    more = {"apply": True} if command is k8s else {"again": again}
    ctx.invoke(command, **given, **more)


@cli.command("render", short_help="Print what `submit` would hand over: the script, or the manifests.")
@job_file
@click.pass_context
def render_job(ctx: click.Context, job: str, site: str | None, overrides: tuple[str, ...]) -> None:
    """Print the script or the manifests that the job's site gets; nothing is submitted."""
    command = _where(job, site, overrides)
    given: dict[str, Any] = {"job": job, "site": site, "overrides": overrides, "runs": None}
    if command is local:
        from launcher.backends import local as backend

        document, made = load(job, site, overrides)
        click.echo(render(backend, document, made).text(backend.ENTRY), nl=False)
    else:
        ctx.invoke(command, **given, **({"dry_run": True} if command is slurm else {}))


@cli.command(short_help="List the sites that --site can name.")
def sites() -> None:
    """List the site files in ~/.config/dslaunch/sites, with where each sends a job."""
    from launcher import sites as known
    from launcher import spec
    from launcher.errors import UserError
    from launcher.show import plain

    found = known.known(os.environ)
    for name, path in found.items():
        try:
            said = spec.load("name: site\n", name=path, site=(path, _text(path)), environ=os.environ).spec.site
            click.echo(f"{name:<20} {said.backend or '-':<11} {plain(said.title or path)}")
        except UserError as error:
            click.echo(f"{name:<20} {'cannot be read':<11} {plain(error.problems[0].message)}")
    if not found:
        tell([f"no site files in {known.folder(os.environ)}/sites: dslaunch probe --site writes one"])


def taken(document: Document, bundle: Bundle, *, by: str) -> None:
    """Say that an API server takes the manifests; raise UserError with all that it, or what we know, refuses."""
    from launcher import lint
    from launcher.backends import kubernetes as backend
    from launcher.backends.kubernetes import api
    from launcher.errors import Problem, UserError

    text = bundle.text(bundle.entry)
    if by == "server":
        problems = backend.validate(text)
    else:
        found = [one for one in lint.manifest(text, name=bundle.entry).results
                 if one.severity == "error" or one.rule == "K8S001"]  # fmt: skip
        problems = [Problem(f"{one.message} ({one.where})", one.fix, api.place(one.message)) for one in found]
    if problems:
        raise placed(document, UserError(*problems))
    tell([f"{'the cluster' if by == 'server' else 'by what is known here, an API server'} takes it"])


@cli.command(short_help="Go on with a run that is over, from its newest checkpoint.")
@click.argument("run", metavar="RUN")
@runs_option
@click.option("--nodes", type=click.IntRange(1, 100_000), help="On another number of nodes.")
@click.option("--fresh", is_flag=True, help="Set its checkpoints aside, and start over.")
@set_option
def resume(run: str, runs: str | None, nodes: int | None, fresh: bool, overrides: tuple[str, ...]) -> None:
    """Go on with a run that is over: a new run of the same job, from its newest checkpoint that is whole.

    Refused while the old one lives (2), and while nobody knows whether it does (8). On another number of nodes the
    job makes a universal checkpoint first.
    """
    from launcher import backends, plan, spec
    from launcher import runs as records
    from launcher.errors import Problem, Unreachable, UserError
    from launcher.run import run as execute
    from launcher.runs import poll

    record = records.one(records.find(run, records.root(runs, os.environ)), "resume")
    backend = backends.load(record.backend)
    saved = record.folder / "job.yaml"
    if not saved.is_file():
        hint = "submit its job file again: it goes on from its checkpoints by itself"
        raise UserError(Problem(f"{record.id} keeps no job file", hint))
    if record.job:
        phase, why = poll.standing(record.story, poll.states([record], run=execute, fresh=True)[record.id])
        if phase is records.Phase.UNKNOWN:
            raise Unreachable(Problem(f"nobody knows whether {record.id} lives: {why}", "try again later"))
        if not phase.over:
            raise UserError(Problem(f"{record.id} lives: {why}", f"dslaunch cancel {handle(record, runs)}"))
    job = os.path.join(os.path.realpath(record.folder / "submitted-from"), "job.yaml")  # noqa: PTH118
    more = [f"resources.nodes={nodes}"] if nodes else []
    document = spec.load(_text(str(saved)), name=str(saved), overrides=[*overrides, *more], environ=os.environ)
    try:
        config = _model_file(document, job)
        made = plan.make(document.spec, config_json=config, backend=record.backend)
    except UserError as error:
        raise placed(document, error) from None
    bundle = render(backend, document, made, **carried(backend, document, _base(job), runs))
    tell(made.notes)
    place = str(record.extra.get("checkpoints", ""))
    far = record.extra.get("login") or ("the cluster" if record.backend == "kubernetes" else "")
    if fresh and far:
        message = f"its checkpoints are on {far}, out of reach of --fresh: {place or 'on a volume'}"
        raise UserError(Problem(message, "--set train.checkpoint.dir=... begins in another place"))
    if fresh and os.path.isdir(place):  # noqa: PTH112
        aside = f"{place}.before-{records.new_id('fresh')}"
        os.rename(place, aside)  # noqa: PTH104
        tell([f"earlier checkpoints are in {aside}"])
    begun = start(record.backend, job, document, made, bundle, runs, resumed_from=record.id)
    told_started(begun, runs, "job")


@cli.command(short_help="Check nodes: software, health, bandwidth between them.")
@click.argument("job", metavar="[JOB]", required=False)
@click.option(
    "--nodes", type=click.IntRange(1, 100_000), help="Nodes to check [default: the job file's, with spares]."
)
@click.option("--on", type=click.Choice(["slurm", "k8s", "local"]), help="Where [default: slurm, where sbatch is].")
@click.option("--here", is_flag=True, help="In the Slurm allocation that this shell is in; nothing is queued.")
@click.option("--gpus-per-node", type=click.IntRange(0, 64), help="GPUs expected on a node; 0 is CPU.")
@click.option("--gpu", metavar="TYPE", help="GPU type expected, as in `dslaunch presets --gpus`.")
@click.option("--fabric", metavar="NAME", help="The network between nodes, as in `dslaunch presets --fabrics`.")
@click.option("--stages", metavar="LIST", help="inventory,host,node,pairs,whole and deep [default: all but deep].")
@click.option("--nccl-tests", metavar="DIR", help="Also run the nccl-tests binaries found there on the nodes.")
@click.option("--html", metavar="FILE", help="Also write the verdict as one page, with the bandwidth of every pair.")
@click.option("--json", "as_json", is_flag=True, help="The verdict as JSON.")
@click.option("--ticket", is_flag=True, help="Also print, for each excluded node, a text for those who repair it.")
@click.option("--drain", is_flag=True, help="Drain the excluded nodes (Slurm), or cordon them (Kubernetes).")
@click.option("--strict", is_flag=True, help="Exit with 30 when something could not be looked at.")
@site_option
@set_option
@runs_option
def preflight(
    job: str | None,
    nodes: int | None,
    on: str | None,
    here: bool,
    site: str | None,
    overrides: tuple[str, ...],
    runs: str | None,
    html: str | None,
    as_json: bool,
    ticket: bool,
    drain: bool,
    strict: bool,
    **given: Any,
) -> None:
    """Check nodes: software, health, and bandwidth of and between them.

    JOB says what a node has to look like; without it, --nodes and the options do. Exit code 0: ready; 10: ready
    without excluded nodes; 20: too few healthy nodes; 21: the environment differs across nodes; 22: the fabric is
    slow; 30: it could not run; 2: bad input; 8: the scheduler was not reached; 130: interrupted.
    """
    import dataclasses
    import json
    import shutil
    from pathlib import Path

    from launcher import backends, health, show, verdicts
    from launcher import bundle as bundles
    from launcher import preflight as types
    from launcher.errors import Problem, UserError

    if here and on not in (None, "slurm"):
        raise UserError(Problem(f"--here is a Slurm allocation, and --on says {on}"))
    if here and not os.environ.get("SLURM_JOB_ID"):
        raise UserError(Problem("--here: this shell is in no Slurm allocation", "salloc -N4, or leave --here out"))
    if here:
        nodes = allocated(nodes, job)
    if on is None:
        if not here and not shutil.which("sbatch"):
            hint = "--on k8s, --on local, or run it on a login node"
            raise UserError(Problem("sbatch is not on this machine, so --on has no default", hint))
        on = "slurm"
    if html:
        writable(html)
    document, made = checked(job, nodes, site, overrides, given)
    name = {"k8s": "kubernetes"}.get(on, on)
    backend = backends.load(name)
    base = _base(job) if job else Path.cwd()
    try:
        bundle = backend.preflight(document.spec, made, **carried(backend, document, base, runs))
    except UserError as error:
        raise placed(document, error) from None
    told = types.from_json(types.Setting, json.loads(bundle.text("preflight.json")))
    values = {} if name == "kubernetes" else bundles.secret_values(document.spec, os.environ, base)
    where = {"entry": bundle.entry} if here else {}  # the batch script itself, as a process of this shell
    checking = "local" if here else name
    record = begin(checking, document, bundle, runs, base=base, values=values, alone=False, **where).record
    answer = await_verdict(record, backends.load(record.backend))
    verdict = types.from_json(types.Verdict, answer)
    blind = sum(one.level == "unknown" for one in verdict.findings)
    if strict and blind and verdict.code in (types.OK, types.OK_WITHOUT):
        headline = f"not fully checked ({blind} unknown), and --strict: {verdict.headline}"
        verdict = dataclasses.replace(verdict, code=types.COULD_NOT, headline=headline)
    if as_json:
        click.echo(show.dumps(types.to_json(verdict)))
    else:
        click.echo(verdicts.table(verdict, told, width=shutil.get_terminal_size((130, 24)).columns))
        for _, text in verdicts.tickets(verdict) if ticket else ():
            click.echo("\n" + text)
    if html:
        bundles.write_text(Path(html), health.page(verdict, told))
    if drain and verdict.excluded:
        from launcher.run import run as execute

        bad = [one for one in verdict.findings if one.level == "exclude" and one.node in verdict.excluded]
        why = {one.node: one.what for one in reversed(bad) if one.code != types.DIFFERS}
        tell(backend.drain(why, execute))
        others = [node for node in verdict.excluded if node not in why]
        tell(f"{node} is not drained: it is different, which is no fault of the machine" for node in others)
    sys.exit(verdict.code)


def allocated(nodes: int | None, job: str | None) -> int | None:
    """How many nodes of this allocation are meant: all, where neither --nodes nor a job file says."""
    from launcher.errors import Problem, UserError

    there = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or 0)
    if nodes and there and nodes > there:
        raise UserError(Problem(f"--nodes {nodes}: this allocation has {there}"))
    return nodes or (None if job else there or None)


def writable(path: str) -> None:
    """Before minutes of work, not after them."""
    from pathlib import Path

    from launcher.errors import Problem, UserError

    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise UserError(Problem(f"cannot write {path}: it is a directory"))
    if not os.access(folder, os.W_OK):
        raise UserError(Problem(f"cannot write {path}: {folder} is not there, or not yours to write"))


def checked(
    job: str | None, nodes: int | None, site: str | None, overrides: tuple[str, ...], given: dict[str, Any]
) -> tuple[Document, Plan | None]:
    """What the nodes are held against: the job file with its plan, or a job of nothing but its resources."""
    from launcher.errors import Problem, UserError

    keys = {
        "gpus_per_node": "resources.gpus_per_node",
        "gpu": "resources.gpu",
        "fabric": "resources.fabric",
        "nccl_tests": "preflight.nccl_tests",
    }
    more = [f"{keys[name]}={value}" for name, value in given.items() if name in keys and value is not None]
    if given["stages"] is not None:
        more.append(f"preflight.stages=[{given['stages']}]")
    if nodes is not None:
        more.append(f"resources.nodes={nodes}")
    if job:
        if nodes is None:
            return load(job, site, (*overrides, *more))
        document = read(job, site, (*overrides, *more, "resources.spares=0"))
        return document, None  # another number of nodes would be another plan
    if nodes is None:
        raise UserError(Problem("how many nodes? a job file or --nodes says", "dslaunch preflight --nodes 4"))
    return read("--nodes", site, (*overrides, *more), text="name: preflight\nmodel: gpt-demo\n"), None


def begin(
    backend_name: str,
    document: Document,
    bundle: Bundle,
    runs_dir: str | None,
    *,
    base: Path,
    values: dict[str, str],
    checkpoints: str = "",
    predicted: dict[str, float] | None = None,
    alone: bool = True,
    again: bool = False,
    resumed_from: str = "",
    points: Sequence[Mapping[str, Any]] = (),
    **more: str,
) -> launch.Begun:
    """Submit, once: what lives already is found. Nothing is left when it is refused. Exits when a signal came."""
    from launcher import launch, runs, snapshot
    from launcher.errors import Unreachable, UserError
    from launcher.run import run

    spec = document.spec
    code = None
    if backend_name != "kubernetes":
        try:
            code = snapshot.take(
                spec, base, run, avoid=[runs.root(runs_dir, os.environ)],
                elsewhere=backend_name == "slurm" and bool(spec.slurm.login),
            )  # fmt: skip
        except UserError as error:
            raise placed(document, error) from None
        tell(code.notes() if code else [])
    extra = {"per_node": spec.per_node, **({"checkpoints": checkpoints} if checkpoints else {})}
    if backend_name == "slurm" and spec.slurm.login:
        extra |= {"login": spec.slurm.login, "login_dir": spec.slurm.login_dir or ""}
        extra |= {"saves": snapshot.kept(code)} if code and snapshot.kept(code) else {}
    if points:
        extra["points"] = len(points)
    facts: dict[str, Any] = {"extra": extra if alone else {**extra, "checks": True}}
    if predicted:
        facts["predicted"] = predicted
    if resumed_from:
        facts["resumed_from"] = resumed_from
    order = launch.Order(
        backend_name, spec, bundle, base, values, facts, alone=alone, again=again, options=more, code=code,
        points=points,
    )  # fmt: skip
    try:
        begun = launch.begin(order, runs.root(runs_dir, os.environ), run)
    except launch.Interrupted as error:
        click.echo(f"interrupted by {launch.told(error.number)}: {error.says or 'nothing was submitted'}", err=True)
        sys.exit(128 + error.number)
    except Unreachable:
        raise
    except UserError as error:
        raise placed(document, error) from None
    record = begun.record
    job_id = record.job.partition(":")[0]
    if begun.cancelled:
        tell([f"job {job} of the same run was cancelled before it started" for job in begun.cancelled])
    if begun.signal:
        again_with = f"dslaunch cancel {handle(record, runs_dir)}"
        click.echo(
            f"interrupted by {launch.told(begun.signal)}: job {job_id} of {record.id} exists; {again_with} ends it",
            err=True,
        )
        sys.exit(128 + begun.signal)
    if begun.how == "adopted":
        tell([f"job {job_id} of an earlier submission was found: nothing was submitted again"])
    return begun


def await_verdict(record: runs.Record, backend: Any) -> dict[str, Any]:
    """The verdict once it is there, with a line on the way for all that happens; Ctrl-C ends the job."""
    import time

    from launcher import preflight as types
    from launcher import show, verdicts
    from launcher.errors import UserError
    from launcher.node import journal
    from launcher.run import run

    click.echo(f"{record.id}: checking, in {record.folder}", err=True)
    said = ""
    try:
        for event in backend.events(record, run):
            if event["event"] == "state":
                if event["detail"] != said:
                    said = event["detail"]
                    click.echo(f"{record.job or record.id}: {show.plain(said)}", err=True)
            else:
                click.echo(verdicts.progress(event), err=True)
        deadline = time.monotonic() + 30
        while (found := backend.verdict(record, run)) is None and time.monotonic() < deadline:
            time.sleep(0.5)
    except KeyboardInterrupt:
        click.echo("interrupted: cancelling the job", err=True)
        with contextlib.suppress(OSError):
            journal.append(record.folder, "cancelling")
        try:
            backend.cancel(record, run)
        except UserError as error:
            tell(str(problem) for problem in error.problems)
            click.echo(f"the job may be alive: dslaunch cancel {record.folder}", err=True)
        sys.exit(130)
    if found is not None:
        answer: dict[str, Any] = found
        return answer
    state = backend.state(record, run)
    what = f"the job ended without a verdict ({state.detail or state.state.value}); see {record.folder}/logs"
    lost = types.Verdict(
        types.COULD_NOT,
        f"nothing starts: {what}",
        (),
        (),
        (types.Finding("job", "block", what, code=types.COULD_NOT),),
        (),
    )
    empty: dict[str, Any] = types.to_json(lost)
    return empty


def told_started(begun: launch.Begun, runs_dir: str | None, what: str) -> None:
    record = begun.record
    done = f"already submitted as {record.id} ({what} {record.job})" if begun.how == "already" else ""
    done = done or f"{begun.how} {what} {record.job}"
    click.echo(f"{done}; dslaunch status {handle(record, runs_dir)}", err=True)
    click.echo(record.id)


def handle(record: runs.Record, runs_dir: str | None) -> str:
    """What one types to find the run again: its id, or its directory when that is elsewhere."""
    import shlex

    return shlex.quote(str(record.folder)) if runs_dir else record.id


def start(
    backend_name: str,
    job: str,
    document: Document,
    made: Plan,
    bundle: Bundle,
    runs_dir: str | None,
    *,
    again: bool = False,
    resumed_from: str = "",
    points: Sequence[Chosen] = (),
) -> launch.Begun:
    """The job with everything that has to be on this machine."""
    from dataclasses import replace

    from launcher import yamldoc
    from launcher.bundle import File

    base = _base(job)
    asked = yamldoc.dump([yamldoc.plain(document.root)])  # the site's defaults and --set are in it
    own = [
        File(f"points/{one.point.index}/job.yaml", yamldoc.dump([yamldoc.plain(one.document.root)])) for one in points
    ]
    bundle = replace(bundle, files=(*bundle.files, File("job.yaml", asked), *own))
    rows = [journalled(point, base) for point in points]
    pods = backend_name == "kubernetes"
    far = made.spec.slurm.login if backend_name == "slurm" else None
    values = {} if pods else present(document, made, base, host=far)
    place = "" if pods else os.path.realpath(base / made.spec.train.workdir / made.checkpoint_dir)
    if far:
        below = os.path.join(made.spec.slurm.login_dir or "", made.spec.train.workdir, made.checkpoint_dir)  # noqa: PTH118
        place = f"{far}:{os.path.normpath(below)}"
    elif points:  # each of them has its own
        place = os.path.dirname(place)  # noqa: PTH120
    elif place and made.saving:
        tell(_room(place, made))
    for point in points[1:]:
        present(point.document, point.plan, base, host=far)
    return begin(
        backend_name, document, bundle, runs_dir, base=base, values=values, checkpoints=place,
        predicted=predicted_by(made), again=again, resumed_from=resumed_from, points=rows,
    )  # fmt: skip


def predicted_by(made: Plan) -> dict[str, float] | None:
    time = made.time
    return {"step_seconds": time.seconds, "tokens_per_s": time.tokens_per_s} if time else None


def journalled(point: Chosen, base: Path) -> dict[str, Any]:
    """What the journal of one point of a sweep begins with."""
    spec = point.plan.spec
    place = os.path.realpath(base / spec.train.workdir / point.plan.checkpoint_dir)
    extra = {"per_node": spec.per_node, "checkpoints": place, "label": point.point.label}
    predicted = predicted_by(point.plan)
    return {"steps": spec.steps, "extra": extra, **({"predicted": predicted} if predicted else {})}


def _room(place: str, made: Plan) -> list[str]:
    """Whether the disk has room for the checkpoints, where this machine sees it."""
    from pathlib import Path

    from launcher import saves
    from launcher.checkpoints import retention

    there = next(path for path in (Path(place), *Path(place).parents) if path.is_dir())
    if there == Path("/") or not made.saving:
        return []
    return saves.room(
        place, free=retention.free(str(there)), one=made.saving.bytes, keep=made.spec.train.checkpoint.keep
    )


def present(document: Document, made: Plan, base: Path, *, host: str | None = None) -> dict[str, str]:
    """The secrets' values, once everything that has to be on this machine is there. All that is missing at once.

    `host`: the programs have to be on that login node instead.
    """
    from launcher.bundle import secret_values
    from launcher.errors import UserError

    problems: list[Problem] = []
    values: dict[str, str] = {}
    try:
        values = secret_values(made.spec, os.environ, base)
    except UserError as error:
        problems += error.problems
    try:
        _programs_exist_on(host, made) if host else _programs_exist(made, base)
    except UserError as error:
        problems += error.problems
    if not host:
        problems += _no_place(made, base)
    if problems:
        raise placed(document, UserError(*problems))
    return values


def _no_place(made: Plan, base: Path) -> list[Problem]:
    """Why checkpoints cannot lie where they shall, as far as this machine tells it of the nodes."""
    from launcher.errors import Problem

    spec = made.spec
    asked, at = spec.train.checkpoint.dir, ("train", "checkpoint", "dir")
    if spec.box or not (asked or made.reference_trainer):  # an image has directories of its own
        return []
    there = os.path.realpath(base / spec.train.workdir / made.checkpoint_dir)
    while not os.path.exists(there):  # noqa: PTH110 - which raises where one may not look
        there = os.path.dirname(there)  # noqa: PTH120
    if not os.path.isdir(there):  # noqa: PTH112
        return [Problem(f"checkpoints cannot go to {made.checkpoint_dir}: {there} is no directory", at=at)]
    device, own, root = (os.stat(one).st_dev for one in (there, base, "/"))  # noqa: PTH116
    if there == "/" or device == root != own:  # nodes may have another file system there; what has the job they see
        return []
    if os.access(there, os.W_OK | os.X_OK):
        return []
    return [Problem(f"checkpoints cannot go to {made.checkpoint_dir}: {there} is not yours to write", at=at)]


def _programs_exist(made: Plan, base: Path) -> None:
    """What the job runs has to be there before it queues for hours; what an image holds nobody can see from here."""
    from launcher.errors import Problem, UserError

    spec, problems = made.spec, []
    if spec.box:
        return
    workdir = base / spec.train.workdir
    if not workdir.is_dir():
        problems.append(Problem(f"there is no directory {workdir}", at=("train", "workdir")))
    elif spec.train.script and not (workdir / spec.train.script).is_file():
        problems.append(Problem(f"there is no file {workdir / spec.train.script}", at=("train", "script")))
    elif (
        spec.train.command
        and spec.train.command[0].startswith("./")
        and not (workdir / spec.train.command[0]).exists()
    ):
        problems.append(Problem(f"there is no program {workdir / spec.train.command[0]}", at=("train", "command")))
    # an absolute one may be on the nodes alone
    if spec.venv and not spec.venv.startswith("/") and not (base / spec.venv / "bin" / "activate").is_file():
        problems.append(Problem(f"{base / spec.venv} is no virtual environment", at=("venv",)))
    if problems:
        raise UserError(*problems)


def _programs_exist_on(host: str, made: Plan) -> None:
    """What the job runs, on the login node that it is submitted from."""
    from launcher import remote, software
    from launcher.errors import Problem, UserError

    spec, problems = made.spec, []
    taken = software.snapshot(spec) != "none"
    rows: list[tuple[str, str, tuple[str, ...]]] = []  # path, kind, field
    train = spec.train
    if not taken and not made.reference_trainer:
        if train.workdir.startswith("/"):
            rows.append((train.workdir, "directory", ("train", "workdir")))
            if train.script:
                rows.append((os.path.join(train.workdir, train.script), "file", ("train", "script")))  # noqa: PTH118
        elif not spec.box:
            hint = "code: git takes it along, or an absolute path there"
            at = ("train", "workdir")
            message = f"workdir {train.workdir} is on this machine, and the job runs at {host}"
            problems.append(Problem(message, hint, at))
    if spec.venv and not spec.venv.startswith("/"):
        problems.append(Problem(f"venv {spec.venv} is on this machine", f"an absolute path at {host}", ("venv",)))
    elif spec.venv and not spec.box:
        rows.append((f"{spec.venv}/bin/activate", "file", ("venv",)))
    if rows and not problems:
        gone = remote.missing(host, [(path, kind) for path, kind, _ in rows])
        problems += [Problem(f"{host} has no {kind} {path}", at=at) for path, kind, at in rows if path in gone]
    if problems:
        raise UserError(*problems)


def follow(record: runs.Record) -> int:
    """Watch a local run: a progress bar on a terminal, a line now and then elsewhere. The job's exit code."""
    import time

    from launcher import runs, show
    from launcher.backends import local as backend
    from launcher.node import journal
    from launcher.run import run
    from launcher.runs import logs

    click.echo(f"{record.id}: starting, logs in {record.folder}/logs", err=True)
    terminal = sys.stderr.isatty()
    bar: Any = None
    shown, said = -1, 0.0
    told: dict[str, int] = {}
    try:
        while True:
            found = backend.state(record, run)
            step = logs.progress(record.folder)
            if step is None:  # a program without metrics: its own output is what there is to see
                for line in logs.news(record.folder, "logs/job.out", told):
                    click.echo(line)
            elif step["step"] != shown or found.state.over:
                if terminal:
                    if bar is None:
                        bar = click.progressbar(
                            length=record.steps, file=sys.stderr, width=24, show_pos=True, show_eta=True,
                            item_show_func=lambda item: item, label="training",
                        )  # fmt: skip
                        bar.__enter__()
                        bar.update(max(shown, 0))
                    bar.update(
                        step["step"] - max(shown, 0), show.progress_line(step, record.steps).partition("  ")[2]
                    )
                elif time.monotonic() - said > 2 or found.state.over:
                    click.echo(show.progress_line(step, record.steps), err=True)
                    said = time.monotonic()
                shown = step["step"]
            if found.state.over:
                break
            time.sleep(0.2)
    except KeyboardInterrupt:
        if bar is not None:
            bar.__exit__(None, None, None)
        click.echo("interrupted: ranks get SIGTERM; those that listen save a checkpoint", err=True)
        with contextlib.suppress(OSError):  # a full disk is no reason to train on
            journal.append(record.folder, "cancelling")
        backend.cancel(record, run)
        return 130
    if bar is not None:
        bar.__exit__(None, None, None)
    if found.code == 0:
        click.echo(f"{record.id}: completed; the run is in {record.folder}", err=True)
        return 0
    for failure in runs.failures(record) or [found.detail]:
        click.echo(f"{record.id}: {failure}", err=True)
    for line in logs.tail(record.folder / "logs" / "job.out", 25) if step is not None or not told else ():
        click.echo(f"  {line}", err=True)
    return found.code or 1


for command in cli_runs.COMMANDS:
    cli.add_command(command)
