"""What the programs find on a node."""

from dataclasses import field
from typing import Annotated, Literal

from launcher.record import record
from launcher.spec.words import (
    DnsName,
    FilePath,
    Image,
    Line,
    Memory,
    Module,
    Mount,
    Section,
    Token,
    Variable,
)
from launcher.yamldoc import Help, Matches


@record
class Modules(Section):
    """Environment modules, in this order: purge, use, unload, swap, load."""

    purge: bool = True
    use: Annotated[tuple[FilePath, ...], Help("directories of module files")] = ()
    unload: tuple[Module, ...] = ()
    swap: Annotated[dict[Module, Module], Help("{PrgEnv-cray: PrgEnv-gnu}")] = field(default_factory=dict)
    load: Annotated[tuple[Module, ...], Help("with versions: cuda/12.4")] = ()


@record
class Conda(Section):
    env: Annotated[FilePath, Help("by name or path")]
    tool: Literal["conda", "mamba", "micromamba"] = "conda"
    root: Annotated[FilePath | None, Help("where it is installed, when it is not on PATH")] = None


@record
class Uv(Section):
    project: Annotated[FilePath, Help("the directory of its pyproject.toml, relative to the job file")] = "."
    sync: Annotated[bool, Help("`uv sync --frozen` on every node, into its local disk; else its .venv is used")] = (
        False
    )
    extras: tuple[Token, ...] = ()


@record
class Stage(Section):
    """Copied to every node's local disk before anything else: an environment, an image, data."""

    source: Annotated[FilePath, Help("a directory, a file, or an archive: .tar, .tar.gz, .tar.zst, .squashfs")]
    to: Annotated[FilePath, Help("a place below the node's local disk ($DSLAUNCH_LOCAL), or an absolute path")]
    unpack: Annotated[bool, Help("an archive is unpacked there")] = True
    activate: Annotated[
        Literal["none", "venv", "conda"], Help("a virtual environment, or what conda-pack packed, to be used then")
    ] = "none"


@record
class Container(Section):
    image: Annotated[Image | None, Help("an image reference, or a .sif or .sqsh file")] = None
    runtime: Annotated[
        Literal["auto", "pyxis", "apptainer", "singularity", "shifter", "edf"],
        Help("what runs it on Slurm; auto: pyxis, apptainer for a .sif, edf where `environment` is given"),
    ] = "auto"
    mounts: Annotated[tuple[Mount, ...], Help("directories made visible inside: /data:/data, /ro:/ro:ro")] = ()
    workdir: Annotated[FilePath | None, Help("where programs start inside; absent: the run directory")] = None
    host_env: Annotated[tuple[Variable, ...], Help("variables whose host value wins over the image's (pyxis)")] = ()
    writable: Annotated[bool | None, Help("whether the image's own files may be changed")] = None
    remap_root: Annotated[bool | None, Help("pyxis: root inside")] = None
    mount_home: Annotated[bool | None, Help("the home directory inside")] = None
    entrypoint: Annotated[bool | None, Help("pyxis: run the image's entrypoint")] = None
    name: Annotated[Token | None, Help("pyxis: keep the unpacked container under this name")] = None
    gpus: Annotated[Literal["auto", "nv", "rocm", "none"], Help("apptainer: which driver to bind")] = "auto"
    clean_env: Annotated[bool | None, Help("apptainer: only what the job sets")] = None
    modules: Annotated[tuple[Token, ...], Help("shifter: gpu, nccl-plugin, mpich")] = ()
    environment: Annotated[FilePath | None, Help("CSCS: the environment definition file (.toml), or its name")] = None
    args: Annotated[tuple[Line, ...], Help("further arguments of that runtime")] = ()


@record
class Secret(Section):
    """Where a secret comes from; the value itself never stands in a job file."""

    from_env: Annotated[Variable | None, Help("Slurm, local: a variable of the submitting shell")] = None
    from_file: Annotated[FilePath | None, Help("Slurm, local: a file only you can read (0600)")] = None
    secret: Annotated[DnsName | None, Help("Kubernetes: name of a Secret")] = None
    key: Annotated[
        Annotated[str, Matches(r"[-._a-zA-Z0-9]{1,253}", "a Secret's key")] | None,
        Help("Kubernetes: key in that Secret"),
    ] = None
    optional: Annotated[bool, Help("Kubernetes: pods start without it")] = False


@record
class Code(Section):
    """The code as it is when the job is submitted; later edits change nothing of it."""

    take: Annotated[
        Literal["none", "git", "copy"],
        Help("git: what git tracks, with changes not committed; copy: all that is not ignored; none: as it is then"),
    ] = "git"
    ignore: Annotated[FilePath | None, Help("a file in .gitignore's syntax; absent: .dslaunchignore, .gitignore")] = (
        None
    )
    limit: Annotated[Memory, Help("a snapshot may not be larger")] = "200M"
    clone: Annotated[
        Annotated[str, Matches(r"(https://|git@|ssh://)[!-~]+", "a repository's address")] | None,
        Help("Kubernetes: an init container clones it, into the working directory"),
    ] = None
    ref: Annotated[Token | None, Help("branch, tag or commit to clone")] = None
    secret: Annotated[
        DnsName | None, Help("Kubernetes: a Secret for the clone, with `password` (a token) and perhaps `username`")
    ] = None
    image: Annotated[Image, Help("with git in it, for that init container")] = "alpine/git:2.49.1"


@record
class Wandb(Section):
    project: Line | None = None
    entity: Line | None = None
    group: Annotated[Line | None, Help("absent: the run's id")] = None
    mode: Literal["online", "offline", "disabled"] = "online"
    dir: FilePath | None = None
    key: Annotated[Secret | None, Help("WANDB_API_KEY, by reference")] = None


@record
class Mlflow(Section):
    uri: Annotated[Line, Help("of the tracking server")]
    experiment: Line | None = None
    token: Annotated[Secret | None, Help("MLFLOW_TRACKING_TOKEN, by reference")] = None


@record
class Comet(Section):
    project: Line | None = None
    workspace: Line | None = None
    key: Annotated[Secret | None, Help("COMET_API_KEY, by reference")] = None


@record
class Tracking(Section):
    """Variables of experiment trackers; keys by reference."""

    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
    comet: Comet | None = None
    tensorboard: Annotated[FilePath | None, Help("TENSORBOARD_LOGDIR")] = None
