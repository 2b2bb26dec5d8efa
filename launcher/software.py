"""What the programs find on a node, as shell: modules, Python environments, local copies, containers, trackers."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator

from launcher.errors import Path, Problem
from launcher.spec import Conda, Container, JobSpec, Stage, Uv
from launcher.spec.words import at_run

HOST = "host.sh"  # what comes before a container that is started by a command of its own
OUTSIDE = ("apptainer", "singularity", "shifter")  # a command on the node; pyxis and edf are options of srun
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".squashfs")
FILES = (".sif", ".simg", ".sqsh", ".squashfs", ".img")  # images that are a file
# What a kubelet takes for an image; of any other it says InvalidImageName, once the pod is on a node.
PULLED = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"
    r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{32,})?"
)

# Which fields of `container` each runtime has a word for. On another one they would do nothing.
ACTS = {
    "pyxis": {"mounts", "workdir", "host_env", "writable", "remap_root", "mount_home", "entrypoint", "name", "args"},
    "apptainer": {"mounts", "workdir", "host_env", "writable", "mount_home", "gpus", "clean_env", "args"},
    "singularity": {"mounts", "workdir", "host_env", "writable", "mount_home", "gpus", "clean_env", "args"},
    "shifter": {"mounts", "workdir", "entrypoint", "modules", "args"},
    "edf": {"workdir", "writable", "environment", "args"},
    "kubernetes": {"mounts"},  # which names its own volumes in the message
}  # fmt: skip


def runtime(spec: JobSpec) -> str:
    """What runs the container on Slurm: image.sif is apptainer's, an environment definition file is edf's."""
    box = spec.box
    if box is None:
        return "none"
    if box.runtime != "auto":
        return box.runtime
    if box.environment:
        return "edf"
    return "apptainer" if (box.image or "").endswith((".sif", ".simg")) else "pyxis"


def hosted(spec: JobSpec) -> bool:
    """Whether modules and local copies come on the host, before the container: host.sh does that."""
    return runtime(spec) in OUTSIDE


def place(path: str, below: str) -> str:
    """A shell word: `a b` below "$here/submitted-from" is "$here/submitted-from"/'a b'."""
    if path.startswith("/"):
        return shlex.quote(path)
    return below + ("" if path == "." else "/" + shlex.quote(path))


def job_file(path: str, *, submitted_from: bool = True) -> str:
    """A path of the job file; in a pod it is the image's."""
    return place(path, '"$here/submitted-from"') if submitted_from else shlex.quote(path)


EDITABLE = """\
why="cannot tell which packages are installed from the tree itself"
value=$(python3 - "$here" <<'EOF'  # `pip install -e` leads to the tree as it is then: the snapshot comes first
import importlib.metadata, json, os, sys, urllib.parse
here = sys.argv[1]
with open(os.path.join(here, "snapshot.root"), encoding="utf-8", errors="surrogateescape") as file:
    root = file.read()
found = []
for row in importlib.metadata.distributions():
    told = json.loads(row.read_text("direct_url.json") or "{}")
    place = os.path.realpath(urllib.parse.unquote(urllib.parse.urlsplit(told.get("url", "")).path))
    if told.get("dir_info", {}).get("editable") and os.path.commonpath([root, place]) == root:
        taken = os.path.join(here, "snapshot", os.path.relpath(place, root))
        found += [os.path.normpath(os.path.join(taken, name)) for name in ("src", ".")]
print(":".join(name for name in dict.fromkeys(found) if os.path.isdir(name)))
EOF
)
why=
[ -z "$value" ] || export PYTHONPATH="$value${PYTHONPATH:+:$PYTHONPATH}\""""


def taken(spec: JobSpec) -> list[str]:
    """What makes a snapshot the code that is imported."""
    return ["", "# --- code, as it was when submitted", EDITABLE] if snapshot(spec) != "none" else []


def workdir(spec: JobSpec, *, submitted_from: bool = True) -> str:
    """Where the program runs: of a snapshot, where there is one; of a container, where it names its own."""
    path = spec.train.workdir
    if spec.box and spec.box.workdir and path == "." and submitted_from:
        return shlex.quote(spec.box.workdir)
    if snapshot(spec) != "none" and submitted_from:
        return place(path, '"$here/code"')
    return job_file(path, submitted_from=submitted_from)


def snapshot(spec: JobSpec) -> str:
    """none, git or copy."""
    return spec.code if isinstance(spec.code, str) else spec.code.take


# --- before the container -------------------------------------------------------------------------

MODULES = """\
why="no environment modules: none of the usual places has their init script"
if ! type module >/dev/null 2>&1; then  # a batch shell is no login shell
  for init in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" \\
    /etc/profile.d/{modules,lmod,z00_lmod,zz00_lmod}.sh /usr/share/{lmod/lmod,modules,Modules}/init/bash \\
    /opt/cray/pe/lmod/lmod/init/bash /opt/apps/lmod/lmod/init/bash; do
    # shellcheck disable=SC1090  # whichever this site has
    if [ -r "$init" ]; then . "$init" || true; fi
    if type module >/dev/null 2>&1; then break; fi  # a script may be left of a package that is gone
  done
fi
type module >/dev/null 2>&1 || exit 69
why=
modules() {  # COMMAND WORD... NAME; Tcl modules before 5 answer 0 whatever comes of a load
  local before=${LOADEDMODULES-} name=${!#} rc=0
  module "$@" || rc=$?
  if [ "$rc" = 0 ] && [ -n "${LOADEDMODULES+x}" ] && [ "$LOADEDMODULES" = "$before" ]; then
    case :$before: in *":$name:"* | *":$name/"*) ;; *) rc=78 ;; esac
  fi
  [ "$rc" = 0 ] || why="module $* failed; module avail ${name%%/*} shows what this site has"
  return "$rc"
}"""

LOCAL = """\
value={disk}
export DSLAUNCH_LOCAL=$value/dslaunch-$UID-${{SLURM_JOB_ID:-${{here##*/}}}}
why="$DSLAUNCH_LOCAL is not yours to write"
(umask 077; mkdir -p -- "$DSLAUNCH_LOCAL")
[ ! -L "$DSLAUNCH_LOCAL" ] && [ -O "$DSLAUNCH_LOCAL" ] && [ -w "$DSLAUNCH_LOCAL" ] || exit 73
chmod 700 -- "$DSLAUNCH_LOCAL"
why="anybody can replace what is in $value: it is writable for all, and not sticky"
(( (8#$(stat -Lc %a -- "$value") & 8#1002) != 2 )) || exit 73
why="""

ACTIVATE = """\
activate() {  # such scripts use variables that are not set, and end with codes that mean nothing
  why="$1 is not there"
  [ -r "$1" ] || exit 66
  # shellcheck disable=SC1090  # of the environment
  . "$1" || true
  why=
}"""
CALLS = re.compile(r"^ *activate ", re.MULTILINE)  # and not `conda activate`


def modules(spec: JobSpec) -> list[str]:
    asked = spec.module_section
    if not spec.modules:
        return []
    return [
        "",
        "# --- modules",
        MODULES,
        *(["module purge"] if asked.purge else []),
        *(f"module use {shlex.quote(path)}" for path in asked.use),
        *(f"module unload {shlex.quote(name)}" for name in asked.unload),
        *(f"modules swap {shlex.quote(old)} {shlex.quote(new)}" for old, new in asked.swap.items()),
        *(f"modules load {shlex.quote(name)}" for name in asked.load),
    ]


ULIMITS = {"core": "c", "memlock": "l", "nofile": "n", "nproc": "u", "stack": "s"}
SOURCED = """\
why="there is no "{path}
[ -r {path} ] || exit 66
set -a
# shellcheck disable=SC1090,SC1091  # of the user
. {path} || true  # such files use what is not set, and end with codes that mean nothing
set +a
why="""


def limits(spec: JobSpec) -> list[str]:
    """ulimit for what starts from here; more than a node allows is said, and training goes on."""
    lines = []
    for name, size in spec.ulimit.items():
        flag = ULIMITS[name]
        least = f"ulimit.{name}: {size} is more than this node allows: $(ulimit -{flag})"
        lines.append(f'ulimit -{flag} {size} 2>/dev/null || ulimit -S{flag} {size} 2>/dev/null || '
                     f'echo "dslaunch: {least}" >&2')  # fmt: skip
    return lines and ["", "# --- limits", *lines]


def sourced(spec: JobSpec, *, submitted_from: bool = True) -> list[str]:
    """Files of shell: they set what the rest needs."""
    paths = [job_file(path, submitted_from=submitted_from) for path in spec.source]
    if not paths:
        return []
    here = [f"cd -P -- {job_file('.')}"] if submitted_from else []
    return ["", "# --- files of shell", *here, *(SOURCED.format(path=path) for path in paths)]


def uses_local_disk(spec: JobSpec) -> bool:
    asked = ascii(at_run("DSLAUNCH_LOCAL"))[1:-1] in repr(spec)  # {node: local}
    return bool(spec.stage or spec.local_disk or (spec.uv and uv(spec).sync) or asked)


def target(stage: Stage) -> str:
    """Where a copy lies, as a shell word."""
    return place(stage.to, '"$DSLAUNCH_LOCAL"')


def stages(spec: JobSpec, *, submitted_from: bool = True) -> list[str]:
    """The node's own disk, and what is copied there."""
    if not uses_local_disk(spec):
        return []
    disk = shlex.quote(spec.local_disk) if spec.local_disk else '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"'
    lines = ["", "# --- local disk", LOCAL.format(disk=disk)]
    for row in spec.stage:
        unpack = int(row.unpack and row.source.endswith(ARCHIVES))
        source = job_file(row.source, submitted_from=submitted_from)
        # a virtual environment made in a container has its Python there
        run = int(not (submitted_from and hosted(spec)))
        words = f"{source} {target(row)} {unpack} {row.activate} {run}"
        lines.append(f'why=$(bash "$here/node/stage.sh" {words})')
    return lines


def cleanup(spec: JobSpec) -> str:
    """A line of the batch script's end: a /tmp that no epilog clears would keep the copies."""
    if not uses_local_disk(spec):
        return ""
    disk = shlex.quote(spec.local_disk) if spec.local_disk else '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"'
    command = shlex.quote(f'rm -rf -- {disk}/"dslaunch-$UID-$SLURM_JOB_ID"')
    return (
        "  # shellcheck disable=SC2016  # every task expands this for itself\n"
        '  timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" '
        f"--ntasks-per-node=1 \\\n    bash -c {command}  # the copies on their disks\n"
    )


# --- Python environments --------------------------------------------------------------------------

CONDA = """\
why="there is no {tool}: give conda.root, or load its module"
{find}
why="{tool} cannot set up this shell"
hook=$({hook})
eval "$hook"
why="{tool} has no environment "{env}
{function} activate {env} || true  # its scripts may end with codes that mean nothing
[ -n "${{CONDA_PREFIX-}}" ] || exit 66
[ "${{CONDA_DEFAULT_ENV-}}" = {env} ] || [ "$CONDA_PREFIX" -ef {env} ] || exit 66
why="""

PACKED = """\
if [ -r {to}/bin/activate ]; then  # of conda-pack
  activate {to}/bin/activate
else
  export CONDA_PREFIX={to} PATH={to}/bin:$PATH
  for init in "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; do
    [ ! -e "$init" ] || activate "$init"
  done
fi"""

SYNC = """\
why="there is no uv"
command -v uv >/dev/null || exit 69
export UV_PROJECT_ENVIRONMENT=$DSLAUNCH_LOCAL/uv
why="uv sync failed"
flock "$DSLAUNCH_LOCAL/uv.lock" uv sync --frozen {words}
activate "$DSLAUNCH_LOCAL/uv/bin/activate\""""


def conda(spec: JobSpec) -> Conda:
    assert spec.conda is not None
    return Conda(spec.conda) if isinstance(spec.conda, str) else spec.conda


def uv(spec: JobSpec) -> Uv:
    assert spec.uv is not None
    return Uv(spec.uv) if isinstance(spec.uv, str) else spec.uv


def environments(spec: JobSpec, *, submitted_from: bool = True) -> list[str]:
    """Whatever brings a Python: venv, conda, uv, or a copy of one on the node's disk."""
    copied = [row for row in spec.stage if row.activate != "none"]
    lines: list[str] = []
    for row in copied:
        to = target(row)
        lines.append(f"activate {to}/bin/activate" if row.activate == "venv" else PACKED.format(to=to))
    if spec.venv:
        lines.append(f"activate {job_file(spec.venv, submitted_from=submitted_from)}/bin/activate")
    if spec.conda:
        lines.append(_conda(conda(spec), submitted_from))
    if spec.uv:
        asked = uv(spec)
        if asked.sync:
            # what it installs is the project itself too: that of the snapshot
            taken = snapshot(spec) != "none" and submitted_from
            project = (
                place(asked.project, '"$here/code"')
                if taken
                else job_file(asked.project, submitted_from=submitted_from)
            )
            words = ["--project", project, *(word for extra in asked.extras for word in ("--extra", extra))]
            lines.append(SYNC.format(words=" ".join(words)))
        else:
            lines.append(f"activate {job_file(asked.project, submitted_from=submitted_from)}/.venv/bin/activate")
    return (
        ["", "# --- Python environment", *([ACTIVATE] if CALLS.search("\n".join(lines)) else []), *lines]
        if lines
        else []
    )


def _conda(asked: Conda, submitted_from: bool) -> str:
    env = job_file(asked.env, submitted_from=submitted_from) if "/" in asked.env else shlex.quote(asked.env)
    root = job_file(asked.root, submitted_from=submitted_from) if asked.root else ""
    tool, function = asked.tool, str(asked.tool)
    program = f"{root}/bin/{tool}" if root else tool
    find = f"[ -x {program} ] || exit 69" if root else f"type {tool} >/dev/null 2>&1 || exit 69"
    hook = f"{program} shell.bash hook" if tool == "conda" else f"{program} shell hook --shell bash"
    if tool == "micromamba" and root:
        find += f"\nexport MAMBA_ROOT_PREFIX={root}"
    if tool == "mamba":  # before 2.0 it has conda's hook alone
        beside = f"{root}/bin/conda" if root else "conda"
        hook = f"{program} shell hook --shell bash 2>/dev/null || {beside} shell.bash hook"
        function = '"$(type mamba 2>/dev/null | grep -q function && echo mamba || echo conda)"'
    return CONDA.format(tool=tool, find=find, hook=hook, env=env, function=function)


# --- containers -----------------------------------------------------------------------------------

APPTAINER = """\
why="there is no {tool}: a module may bring it"
command -v {tool} >/dev/null || exit 69
why="there is no image "{image}
{found}why=
for name in $(compgen -e); do  # what the scheduler's side says goes in whatever the image sets
  case $name in
    {names}) export "{prefix}_$name=${{!name}}" ;;
  esac
done
origin=$(readlink -f -- "$here/submitted-from")
exec {words} "$@\""""

SHIFTER = """\
why="there is no shifter"
command -v shifter >/dev/null || exit 69
why=
{origin}exec {words} "$@\""""

HANDED = (
    "NODE_RANK|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|DSLAUNCH_*|SLURM*"
    "|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)


def image(spec: JobSpec, root: str) -> str:
    """A shell word; a file is relative to the job file, or one of the copies on the local disk."""
    box = spec.box
    assert box is not None
    assert box.image is not None
    if any(row.to == box.image for row in spec.stage):
        return place(box.image, '"$DSLAUNCH_LOCAL"')
    if box.image.startswith("/") or "://" in box.image:
        return shlex.quote(box.image)
    if box.image.endswith(FILES) or box.image.startswith("."):
        return f'"{root}/submitted-from"/{shlex.quote(box.image)}'
    if runtime(spec) in ("apptainer", "singularity"):
        return shlex.quote(f"docker://{box.image}")
    registry, slash, name = box.image.partition("/")
    if runtime(spec) == "pyxis" and slash and "#" not in box.image and ("." in registry or ":" in registry):
        return shlex.quote(
            f"{registry}#{name}"
        )  # enroot's spelling; a slash alone means Docker Hub to its old versions
    return shlex.quote(box.image)


def mounts(spec: JobSpec, root: str) -> list[str]:
    """source:target[:flags] inside double quotes; the run, the job's directory and checkpoints come by themselves."""
    box = spec.box
    assert box is not None
    found = [f"{root}:{root}", "$origin:$origin", *_asked(box)]
    if uses_local_disk(spec) and hosted(spec):
        found.append("$DSLAUNCH_LOCAL:$DSLAUNCH_LOCAL")
    elif uses_local_disk(spec) and spec.local_disk:
        found.append(f"{spec.local_disk}:{spec.local_disk}")
    saves = spec.train.checkpoint.dir or ""
    if saves.startswith("/") and outside(spec, saves) == saves and not _mounted(spec, saves):
        found.append(f"$(mkdir -p -- {saves} && echo {saves}):{saves}")  # a mount needs it to be there
    return found


def _asked(box: Container) -> Iterator[str]:
    for mount in box.mounts:
        source, _, rest = mount.partition(":")
        goal, _, flags = rest.partition(":")
        source = source if source.startswith("/") else f"$origin/{source}"
        yield f"{source}:{goal or source}" + (f":{flags}" if flags else "")


def _mounted(spec: JobSpec, path: str) -> bool:
    box = spec.box
    rows = [mount.split(":") for mount in (box.mounts if box else ())]
    return any(_below(path, (row[1] if len(row) > 1 else row[0])) for row in rows)


def _below(path: str, folder: str) -> bool:
    return posixpath.normpath(path) == posixpath.normpath(folder) or posixpath.normpath(path).startswith(
        posixpath.join(posixpath.normpath(folder), "")
    )


def outside(spec: JobSpec, path: str) -> str:
    """Where a path of the container lies on the host: with /lustre/me:/data, /data/run is /lustre/me/run."""
    if not spec.box:
        return path
    rows = [(row[1], row[0]) for row in (mount.split(":") for mount in spec.box.mounts) if len(row) > 1]
    for goal, source in sorted(rows, key=lambda row: -len(row[0])):
        if _below(path, goal) and source.startswith("/"):
            return posixpath.normpath(posixpath.join(source, posixpath.relpath(path, goal)))
    return path


def srun_words(spec: JobSpec) -> list[str]:
    """Words of srun in the batch script, quoted: for pyxis, and for CSCS's container engine."""
    box, kind = spec.box, runtime(spec)
    if box is None or kind not in ("pyxis", "edf"):
        return []
    words: list[str] = []
    if kind == "edf":
        name = box.environment or ""
        path = name if not (name.endswith(".toml") or "/" in name) or name.startswith("/") else ""
        words.append(
            f"--environment={shlex.quote(path)}"
            if path
            else f'--environment="$run/submitted-from"/{shlex.quote(name)}'
        )
        if box.workdir:
            words.append(f"--container-workdir={shlex.quote(box.workdir)}")
    else:
        origin = '$(readlink -f -- "$run/submitted-from")'
        rows = [row.replace("$origin", origin) for row in mounts(spec, "$run")]
        rows = [
            ":".join([*row.split(":")[:2], *(flag.replace(",", "+") for flag in row.split(":")[2:])]) for row in rows
        ]
        words.append(f"--container-image={image(spec, '$run')}")
        words.append(f'--container-mounts="{",".join(rows)}"')
        words.append(
            f"--container-workdir={shlex.quote(box.workdir)}" if box.workdir else '--container-workdir="$run"'
        )
        if box.host_env:
            words.append(f"--container-env={','.join(box.host_env)}")
        if box.name:
            words.append(f"--container-name={shlex.quote(box.name)}")
        switches = {"remap-root": box.remap_root, "mount-home": box.mount_home, "entrypoint": box.entrypoint}
        words += [f"--{'' if on else 'no-'}container-{name}" for name, on in switches.items() if on is not None]
    if box.writable is not None:
        words.append("--container-writable" if box.writable else "--container-readonly")
    return [*words, *map(shlex.quote, box.args)]


def inside(spec: JobSpec, run: str, script: str = HOST) -> str:
    """What comes right before `bash node.sh`: with apptainer, `bash "$0/host.sh" ` for the run directory $0."""
    return f'bash "{run}/{script}" ' if hosted(spec) else ""


def container(spec: JobSpec) -> list[str]:
    """The last lines of host.sh: its arguments run inside."""
    box, kind = spec.box, runtime(spec)
    assert box is not None
    if kind == "shifter":
        words = ["shifter", f"--image={image(spec, '$here')}"]
        words += [f"--module={','.join(box.modules)}"] if box.modules else []
        words += [f'--volume="{row}"' for row in _asked(box)]  # a site's own file systems are there anyway
        words += [f"--workdir={shlex.quote(box.workdir)}"] if box.workdir else []
        words += ["--entrypoint"] if box.entrypoint else []
        relative = any("$origin" in row for row in _asked(box))
        origin = 'origin=$(readlink -f -- "$here/submitted-from")\n' if relative else ""
        return [
            "",
            "# --- container",
            SHIFTER.format(words=_wrapped([*words, *map(shlex.quote, box.args)]), origin=origin),
        ]
    words = [f"{kind} exec"]
    words += [{"nv": "--nv", "rocm": "--rocm"}[driver(spec)]] if driver(spec) != "none" else []
    words += [f'--bind "{row}"' for row in mounts(spec, "$here")]
    words += ["--cleanenv"] if box.clean_env else []
    words += ["--writable-tmpfs"] if box.writable else []
    words += ["--no-home"] if box.mount_home is False else []
    words.append(f"--pwd {shlex.quote(box.workdir) if box.workdir else chr(34) + '$here' + chr(34)}")
    picture = image(spec, "$here")
    found = "" if "://" in picture else f"[ -e {picture} ] || exit 66\n"
    text = APPTAINER.format(
        tool=kind,
        image=picture,
        found=found,
        names="|".join([HANDED, *box.host_env]),
        prefix=kind.upper() + "ENV",
        words=_wrapped([*words, *map(shlex.quote, box.args), picture]),
    )
    return ["", "# --- container", text]


def _wrapped(words: list[str]) -> str:
    return " \\\n  ".join(words)


def driver(spec: JobSpec) -> str:
    """nv, rocm or none: an MI250X wants --rocm."""
    box = spec.box
    assert box is not None
    if box.gpus != "auto":
        return box.gpus
    if not spec.resources.gpus_per_node:
        return "none"
    return "rocm" if (spec.resources.gpu or "").upper().startswith("MI") else "nv"


# --- trackers -------------------------------------------------------------------------------------


def trackers(spec: JobSpec, *, submitted_from: bool = True) -> list[str]:
    """Exports of what is no secret. A run of several starts is one group, named like the run."""
    rows: list[tuple[str, str]] = []
    asked = spec.tracking
    if asked.wandb:
        group = shlex.quote(asked.wandb.group) if asked.wandb.group else ""
        if not group:
            group = '"${here##*/}"' if submitted_from else f'"${{DSLAUNCH_RUN:-{spec.name}}}"'
        rows += [
            ("WANDB_PROJECT", shlex.quote(asked.wandb.project or "")),
            ("WANDB_ENTITY", shlex.quote(asked.wandb.entity or "")),
            ("WANDB_RUN_GROUP", group),
            ("WANDB_MODE", asked.wandb.mode),
            ("WANDB_DIR", _output(asked.wandb.dir, submitted_from)),
        ]
    if asked.mlflow:
        rows += [
            ("MLFLOW_TRACKING_URI", shlex.quote(asked.mlflow.uri)),
            ("MLFLOW_EXPERIMENT_NAME", shlex.quote(asked.mlflow.experiment or "")),
        ]
    if asked.comet:
        rows += [
            ("COMET_PROJECT_NAME", shlex.quote(asked.comet.project or "")),
            ("COMET_WORKSPACE", shlex.quote(asked.comet.workspace or "")),
        ]
    rows.append(("TENSORBOARD_LOGDIR", _output(asked.tensorboard, submitted_from)))
    lines = [f"export {name}={value}" for name, value in rows if value not in ("", "''")]
    folders = [value for name, value in rows if name in ("WANDB_DIR", "TENSORBOARD_LOGDIR") and value]
    lines += [f"mkdir -p -- {' '.join(folders)}  # wandb falls back to /tmp where it is missing"] if folders else []
    return ["", "# --- trackers", *lines] if lines else []


def credential(spec: JobSpec, name: str) -> Path:
    """Where a secret stands in the job file: WANDB_API_KEY may be that of `tracking`."""
    if name in spec.secrets:
        return ("secrets", name)
    places: dict[str, Path] = {
        "WANDB_API_KEY": ("tracking", "wandb", "key"),
        "MLFLOW_TRACKING_TOKEN": ("tracking", "mlflow", "token"),
        "COMET_API_KEY": ("tracking", "comet", "key"),
    }
    return places[name]


def _output(path: str | None, submitted_from: bool) -> str:
    return job_file(path, submitted_from=submitted_from) if path else ""


# --- what cannot be -------------------------------------------------------------------------------


def problems(spec: JobSpec, backend: str) -> list[Problem]:
    """What a backend, slurm, kubernetes or local, cannot do of it."""
    return [*_box_problems(spec, backend), *_place_problems(spec, backend), *_snapshot_problems(spec, backend)]


def _box_problems(spec: JobSpec, backend: str) -> Iterator[Problem]:
    box = spec.box
    if box is None or backend == "local":
        return
    kind = runtime(spec) if backend == "slurm" else "kubernetes"
    at: Path = ("container",) if isinstance(spec.container, str) else ("container", "image")
    if box.image is None and kind != "edf":
        yield Problem(
            "container has no image", "container.image: IMAGE with torch and deepspeed in it", ("container",)
        )
    if kind == "edf" and not box.environment:
        yield Problem(
            "runtime edf needs an environment definition", "container.environment: FILE.toml", ("container",)
        )
    if kind == "edf" and box.image:
        yield Problem("the environment definition file names the image", "leave container.image out", at)
    if kind == "kubernetes" and box.image and (box.image.endswith(FILES) or not PULLED.fullmatch(box.image)):
        hint = "REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:..., as docker pull takes it, the name in lower case"
        yield Problem(f"pods pull images from a registry, and {box.image} is none", hint, at)
    plain = Container()
    for name in vars(plain):
        if name in ("image", "runtime") or getattr(box, name) == getattr(plain, name) or name in ACTS[kind]:
            continue
        able = [other for other, fields in ACTS.items() if name in fields]
        hint = f"{' or '.join(able)} has one" + (
            "; container.args takes any word of the runtime's" if backend == "slurm" else ""
        )
        yield Problem(f"{kind} has no word for container.{name}", hint, ("container", name))
    if backend != "slurm":
        return
    if kind in ("pyxis", "edf") and spec.modules:
        message = "modules are loaded where the ranks run, and a container has none of the host's"
        yield Problem(message, "put the software in the image, or leave container out", ("modules",))
    if kind in ("pyxis", "edf") and spec.stage:
        message = f"{kind} starts the container together with the step: nothing can be copied to the node before it"
        yield Problem(message, "runtime: apptainer, or read from a mounted directory", ("stage",))
    if box.workdir and spec.train.workdir != ".":
        yield Problem(
            "container.workdir and train.workdir both say where programs start", "keep one", ("container", "workdir")
        )
    saves = spec.train.checkpoint.dir or ""
    if saves.startswith("/") and not _mounted(spec, saves) and kind not in ("edf", "shifter"):
        odd = [c for c in saves if not (c.isalnum() or c in "/._+-@%")]
        if odd:
            message = f"{saves} has to be mounted into the container, and a mount cannot hold {odd[0]!r}"
            yield Problem(message, "a path of letters, digits and /._+-", ("train", "checkpoint", "dir"))


def _place_problems(spec: JobSpec, backend: str) -> Iterator[Problem]:
    copied = [row for row in spec.stage if row.activate != "none"]
    brought = [key for key in ("venv", "conda", "uv") if getattr(spec, key)]
    if copied and (len(copied) > 1 or brought):
        other = brought[0] if brought else "stage"
        yield Problem("two Python environments would be activated", f"keep {other} or stage.activate", (other,))
    if backend == "kubernetes":
        relative: list[tuple[str, str | None, Path]] = [
            *(("stage source", row.source, ("stage", index, "source")) for index, row in enumerate(spec.stage)),
            ("the uv project", uv(spec).project if spec.uv else None, ("uv",)),
            ("conda.root", conda(spec).root if spec.conda else None, ("conda", "root")),
            ("conda.env", conda(spec).env if spec.conda and "/" in conda(spec).env else None, ("conda",)),
            ("tracking.tensorboard", spec.tracking.tensorboard, ("tracking", "tensorboard")),
            ("wandb.dir", spec.tracking.wandb.dir if spec.tracking.wandb else None, ("tracking", "wandb", "dir")),
        ]
        for what, path, at in relative:
            if path and not path.startswith("/"):
                message = f"{what} {path} is relative, and a pod has no job file to be relative to"
                yield Problem(message, "a path in the image or on a volume", at)


def _snapshot_problems(spec: JobSpec, backend: str) -> Iterator[Problem]:
    taken = snapshot(spec)
    cloned = not isinstance(spec.code, str) and spec.code.clone
    if backend == "kubernetes" and cloned:
        return
    if cloned:
        message = "code.clone is for pods: here it would do nothing"
        yield Problem(message, "`code: git` takes the code that is here now", ("code", "clone"))
    if taken == "none":
        return
    saves = posixpath.normpath(posixpath.join(spec.train.workdir, spec.train.checkpoint.dir or "checkpoints"))
    if spec.slurm.login and backend == "slurm" and saves.startswith("../"):
        message = f"checkpoints would go to {saves} of slurm.login_dir, outside of it"
        hint = f"an absolute path at {spec.slurm.login}"
        yield Problem(message, hint, ("train", "checkpoint", "dir"))
    if spec.train.workdir.startswith("/"):
        message = f"workdir {spec.train.workdir} is absolute: the program would run there, and not in the snapshot"
        yield Problem(message, "a path relative to the job file", ("train", "workdir"))
    if spec.train.script and spec.train.script.startswith("/"):
        message = f"script {spec.train.script} is absolute: it would run as it is then, and not as it is now"
        yield Problem(message, "a path relative to train.workdir", ("train", "script"))
    if spec.box and spec.box.workdir:
        message = "container.workdir is not in the snapshot, where programs start"
        yield Problem(message, "leave container.workdir or code out", ("container", "workdir"))
