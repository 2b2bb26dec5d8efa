"""JobSpec: what the user asks for. Field names are the job file's keys; its sections are the modules beside this.

Annotations are evaluated as the classes are made: reading a job file then needs no second look at them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Union

from launcher import yamldoc
from launcher.errors import Path, Problem, UserError
from launcher.record import record
from launcher.spec.advice import Advice
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, SECRET_NAME, SECRET_VALUE, contradictions
from launcher.spec.kubernetes import Kubernetes
from launcher.spec.machines import Environment, Preflight, Recover, Resources, Service, Site, Sweep
from launcher.spec.slurm import Slurm
from launcher.spec.software import Code, Conda, Container, Modules, Secret, Stage, Tracking, Uv
from launcher.spec.train import Lora, LrSchedule, Optimizer, Shape, Train
from launcher.spec.words import (
    OF_NODE,
    OF_SERVICES,
    VARIABLES,
    FilePath,
    Image,
    Line,
    LocalDisk,
    Module,
    Name,
    Section,
    Text,
    Variable,
    Whole,
    at_run,
    of_service,
)
from launcher.yamldoc import Help


@record
class JobSpec(Section):
    """One training job."""

    name: Annotated[Name, Help("names the run, the Slurm job and the pods")]
    model: Annotated[
        Union[FilePath, Shape, None],  # noqa: UP007 - read at run time on 3.10
        Help(
            "a preset (`dslaunch presets`), a path to a Hugging Face config.json, or a shape; absent: the program "
            "brings its own configuration, and nothing is predicted"
        ),
    ] = None
    train: Train = field(default_factory=Train)
    resources: Resources = field(default_factory=Resources)
    services: Annotated[tuple[Service, ...], Help("programs that run beside the training")] = ()
    sweep: Annotated[Sweep | None, Help("the same job for several values")] = None
    preflight: Preflight = field(default_factory=Preflight)
    recover: Recover = field(default_factory=Recover)
    environment: Environment = field(default_factory=Environment)
    env: Annotated[dict[Variable, Text], Help("variables for every rank, byte for byte")] = field(
        default_factory=dict
    )
    code: Annotated[
        Code | Literal["none", "git", "copy"], Help("whether the code is taken along as it is when submitting")
    ] = "none"
    modules: Annotated[
        Modules | tuple[Module, ...], Help("environment modules, loaded in this order after a purge; or a section")
    ] = ()
    stage: Annotated[tuple[Stage, ...], Help("copied to every node's local disk first")] = ()
    local_disk: Annotated[LocalDisk | None, Help("of a node; absent: $SLURM_TMPDIR, $TMPDIR or /tmp")] = None
    venv: Annotated[FilePath | None, Help("a Python virtual environment, activated on every node")] = None
    conda: Annotated[Conda | FilePath | None, Help("a conda environment, by name or path; or a section")] = None
    uv: Annotated[Uv | FilePath | None, Help("a uv project's directory; or a section")] = None
    container: Annotated[Image | Container | None, Help("an image; or a section")] = None
    source: Annotated[
        tuple[FilePath, ...], Help("shell files read on every node behind the modules; what they set is exported")
    ] = ()
    ulimit: Annotated[
        dict[Literal["core", "memlock", "nofile", "nproc", "stack"], Whole | Literal["unlimited"]],
        Help("limits of the ranks' processes, as bash's ulimit counts; a node that allows less says so and goes on"),
    ] = field(default_factory=dict)
    mkdir: Annotated[tuple[Text, ...], Help("directories made where the program runs, before `setup`")] = ()
    setup: Annotated[tuple[Line, ...], Help("shell lines run on every node before training")] = ()
    tracking: Tracking = field(default_factory=Tracking)
    secrets: Annotated[dict[Variable, Secret], Help("variables whose values never appear in a file")] = field(
        default_factory=dict
    )
    paths: Annotated[dict[Name, FilePath], Help("names for a site's places: {path: data, append: /c4} reads one")] = (
        field(default_factory=dict)
    )
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    site: Annotated[Site, Help("what a site file says of itself")] = field(default_factory=Site)

    @property
    def per_node(self) -> int:
        """Ranks on one node: one per GPU, or `processes_per_node` on CPU."""
        return self.resources.gpus_per_node or self.resources.processes_per_node or 1

    @property
    def world(self) -> int:
        return self.resources.nodes * self.per_node

    @property
    def steps(self) -> int:
        """Of the whole run; 0 where nobody said, for a program that brings its own configuration."""
        return 0 if self.model is None and self.train.steps == Train.steps else self.train.steps

    @property
    def seq_len(self) -> int:
        """Tokens of a sample; 0 as for `steps`."""
        return 0 if self.model is None and self.train.seq_len == Train.seq_len else self.train.seq_len

    @property
    def serving(self) -> int:
        """Nodes of the same allocation that services have for themselves."""
        return sum(service.nodes for service in self.services if service.on == "own" and not service.component)

    @property
    def checks_nodes(self) -> bool:
        """Whether a preflight comes before training."""
        asked, resources = self.preflight.run, self.resources
        return (
            (resources.nodes > 1 and resources.gpus_per_node > 0) or resources.spares > 0
            if asked == "auto"
            else asked
        )

    @property
    def box(self) -> Container | None:
        return Container(self.container) if isinstance(self.container, str) else self.container

    @property
    def credentials(self) -> dict[str, Secret]:
        """`secrets`, and the keys of the trackers under the names that these read."""
        asked = self.tracking
        keys = {
            "WANDB_API_KEY": asked.wandb and asked.wandb.key,
            "MLFLOW_TRACKING_TOKEN": asked.mlflow and asked.mlflow.token,
            "COMET_API_KEY": asked.comet and asked.comet.key,
        }
        return {**self.secrets, **{name: key for name, key in keys.items() if key}}

    @property
    def module_section(self) -> Modules:
        return self.modules if isinstance(self.modules, Modules) else Modules(load=self.modules)


@dataclass(frozen=True)
class Document:
    """A job with the files it came from, so that any later problem finds its line."""

    spec: JobSpec
    root: yamldoc.Node
    notes: tuple[str, ...] = ()  # where job file and site file tell different things

    def place(self, problem: Problem) -> Problem:
        if problem.where or not problem.at:
            return problem
        return Problem(problem.message, problem.hint, problem.at, str(yamldoc.place(self.root, problem.at)))

    def leaves(self) -> list[tuple[Path, str]]:
        """Each text or number that was given, as it is written: (("train", "args", 0), "--lr")."""
        found: list[tuple[Path, str]] = []

        def visit(node: yamldoc.Node, path: Path) -> None:
            if isinstance(node, yamldoc.Table):
                for key, child in node.entries.items():
                    visit(child, (*path, key))
            elif isinstance(node, yamldoc.Sequence):
                for index, child in enumerate(node.items):
                    visit(child, (*path, index))
            else:
                found.append((path, node.raw))

        visit(self.root, ())
        return found

    def origins(self) -> list[tuple[Path, str]]:
        """Where each value that was given stands: (("train", "steps"), "job.yaml:7:3")."""
        found: list[tuple[Path, str]] = []

        def visit(node: yamldoc.Node, path: Path, mark: yamldoc.Mark) -> None:
            if isinstance(node, yamldoc.Table):
                for key, child in node.entries.items():
                    visit(child, (*path, key), node.keys[key])
            else:
                found.append((path, str(mark)))

        visit(self.root, (), self.root.mark)
        return found


__all__ = [
    "NOT_YOURS",
    "NOT_YOUR_PREFIXES",
    "SECRET_NAME",
    "SECRET_VALUE",
    "Code",
    "Conda",
    "Container",
    "Document",
    "Environment",
    "JobSpec",
    "Kubernetes",
    "Lora",
    "LrSchedule",
    "Modules",
    "Name",
    "Optimizer",
    "Preflight",
    "Recover",
    "Resources",
    "Secret",
    "Section",
    "Service",
    "Shape",
    "Site",
    "Slurm",
    "Stage",
    "Sweep",
    "Tracking",
    "Train",
    "Uv",
    "load",
]  # fmt: skip

SPEC_AT_TOP = "a job file is a section with keys: name, model, train, resources, ..."


def _paths(root: yamldoc.Node) -> dict[str, str]:
    """The job's own names of places; what is wrong with them the reader says."""
    found = root.entries.get("paths") if isinstance(root, yamldoc.Table) else None
    rows = found.entries if isinstance(found, yamldoc.Table) else {}
    return {name: node.raw for name, node in rows.items() if isinstance(node, yamldoc.Scalar) and not node.empty}


def _while_it_runs(root: yamldoc.Node) -> list[yamldoc.Lookup]:
    """What arguments and variables may take from the job: its id, the node, where a service is."""
    known = {key: {name: at_run(variable) for name, variable in row.items()} for key, row in VARIABLES.items()}
    listed = root.entries.get("services") if isinstance(root, yamldoc.Table) else None
    rows = listed.items if isinstance(listed, yamldoc.Sequence) else []
    found = [row.entries.get("name") for row in rows if isinstance(row, yamldoc.Table)]
    names = [node.raw for node in found if isinstance(node, yamldoc.Scalar)]
    known |= {key: {name: at_run(of_service(key, name)) for name in names} for key in OF_SERVICES}
    hints = {
        **{key: " or ".join(row) for key, row in VARIABLES.items()},
        **dict.fromkeys(OF_SERVICES, ", ".join(names)),
    }
    hints["node"] += ", or a variable of the node in capitals: PATH; every rank reads RANK and LOCAL_RANK itself"
    return [
        yamldoc.Lookup(
            key, row, f"{key} has no {{}}", f"known: {hints[key] or 'no services are named'}", only=Text,
            other=_variable if key == "node" else None,
        )
        for key, row in known.items()
    ]  # fmt: skip


def _variable(name: str) -> str | None:
    return at_run(name) if OF_NODE.fullmatch(name) and not SECRET_NAME.regex.fullmatch(name) else None


def _hardware(job: yamldoc.Node, site: yamldoc.Node) -> tuple[str, ...]:
    """What the job file asks for and the site says it has not: more GPUs in a node, another type, another network."""
    found = []
    for key in ("gpus_per_node", "gpu", "fabric"):
        asked, there = (_of_resources(node, key) for node in (job, site))
        if not asked or not there:
            continue
        wanted, known = asked.value(), there.value()
        if isinstance(wanted, int) and isinstance(known, int):
            differs = wanted > known
        else:  # h100 is h100-80gb
            differs = not (asked.raw.startswith(there.raw) or there.raw.startswith(asked.raw))
        if differs:
            found.append(f"{asked.mark}: {key} {asked.raw}, and the site has {there.raw} ({there.mark})")
    return tuple(found)


def _of_resources(root: yamldoc.Node, key: str) -> yamldoc.Scalar | None:
    section = root.entries.get("resources") if isinstance(root, yamldoc.Table) else None
    found = section.entries.get(key) if isinstance(section, yamldoc.Table) else None
    return found if isinstance(found, yamldoc.Scalar) and not found.empty else None


def load(
    text: str,
    *,
    name: str,
    site: tuple[str, str] | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Document:
    """Job text over site text (name, text), `--set` over both. Raises UserError with every mistake."""
    job = yamldoc.parse(text, name=name)
    problems: list[Problem] = []
    blank = re.compile(r"\s*(#.*)?\Z")
    layers = []
    if site and not all(blank.match(line) for line in site[1].splitlines()):  # an empty site file says nothing
        layers.append(yamldoc.parse(site[1], name=site[0]))
    layers.append(job)
    for layer in layers:
        if not isinstance(layer, yamldoc.Table):
            problems.append(Problem(SPEC_AT_TOP, where=str(layer.mark)))
    if problems:
        raise UserError(*problems)
    for override in overrides:
        layers.append(yamldoc.assignment(override))
    root = layers[0]
    for layer in layers[1:]:
        root = yamldoc.merge(root, layer)
    if isinstance(root, yamldoc.Table):  # what is missing is missing from the job file
        root = yamldoc.Table(root.entries, root.keys, job.mark)
    variables = yamldoc.Lookup(
        "env", environ or {}, "the environment has no variable {}",
        "export {}=... before dslaunch, or write the value here", SECRET_NAME.regex,
    )  # fmt: skip
    root = yamldoc.looked_up(root, [variables], problems, kind=JobSpec)
    places = yamldoc.Lookup(
        "path", _paths(root), "no path is called {}", "paths: {{{}: /where/it/is}} in the site file"
    )
    root = yamldoc.looked_up(root, [variables, places, *_while_it_runs(root)], problems, kind=JobSpec)
    try:
        spec = yamldoc.read(root, JobSpec, Advice(JobSpec))
    except UserError as error:
        named = {problem.where for problem in problems}  # a variable that is missing is one mistake
        rest = [problem for problem in error.problems if problem.where not in named]
        raise UserError(*problems, *rest) from None
    if problems:
        raise UserError(*problems)
    under = layers[0] if site and len(layers) > 1 and layers[0] is not job else None
    document = Document(spec, root, _hardware(job, under) if under else ())
    problems = [document.place(problem) for problem in contradictions(spec)]
    if problems:
        raise UserError(*problems)
    return document
