"""The bundle: files a person can read, and the one place that writes them."""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher import nccl, preflight, software, yamldoc
from launcher.errors import Problem, UserError
from launcher.plan import InBundle, Plan, launchers
from launcher.preflight import START, Setting
from launcher.record import record
from launcher.spec import JobSpec
from launcher.spec.given import given
from launcher.spec.words import AT_RUN, at_run, shown

HERE = Path(__file__).parent
NODE = HERE / "node"
ASKED = "job.json"
CODE = "node/code"  # the folder in a bundle that holds the packages that travel
# What looks after every training run, and the tables it reads. The preflight's own packages come on top.
LOOKS_AFTER = ("supervision", "diagnose", "checkpoints")
TABLES = ("causes.tsv", "signatures.tsv", "progress.tsv")


@record
class File:
    path: str
    text: str


@record
class Bundle:
    """`entry` is the file handed to the scheduler."""

    files: tuple[File, ...]
    entry: str

    def text(self, path: str) -> str:
        return next(file.text for file in self.files if file.path == path)


@record
class Tree:
    """Code that travels as it was: a compressed tar file, and the job file's place in it, "." at the top."""

    data: bytes
    job: str
    digest: str  # of the files: compressors differ


def quote(text: str) -> str:
    """One shell word, byte for byte; a path inside the bundle begins at $here, {job: id} is a variable."""
    if isinstance(text, InBundle):
        return f'"$here/{text}"'
    parts = AT_RUN.split(text)  # every other one is the name of a variable
    words = (f'"${part}"' if index % 2 else shlex.quote(part) for index, part in enumerate(parts))
    return "".join(word for index, word in enumerate(words) if parts[index] or len(parts) == 1)


def comment(text: str) -> str:
    """Text that stays behind a `#`, whatever it holds."""
    return " ".join(shown(text).split())


def config_json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def node_files(plan: Plan) -> tuple[File, ...]:
    """What every backend carries to the nodes."""
    names = ["supervise.py", "rank.py", *(["train_gpt.py"] if plan.reference_trainer else [])]
    modules = [HERE / "__init__.py", *(path for name in LOOKS_AFTER for path in sorted(HERE.glob(f"{name}/*.py")))]
    modules.append(NODE / "hook" / "dslaunch_pulse.py")  # for the ranks' own path
    return (*map(node_file, names), *packed(modules), *packed(HERE / "data" / name for name in TABLES))


def packed(paths: Iterable[Path]) -> tuple[File, ...]:
    """Files of this package, at their places below CODE."""
    return tuple(
        File(f"{CODE}/launcher/{path.relative_to(HERE)}", path.read_text(encoding="utf-8")) for path in paths
    )


def node_file(name: str) -> File:
    return File(f"node/{name}", (NODE / name).read_text(encoding="utf-8"))


def common(
    plan: Plan, setting: Setting | None, *, flags: Iterable[str] = (), submitted_from: bool = True
) -> tuple[File, ...]:
    """`setting` of the preflight that comes first, if one does."""
    script = node_script(plan, flags=flags, submitted_from=submitted_from, first=bool(setting) and not submitted_from)
    checked: tuple[File, ...] = ()
    if setting:
        checked = preflight_files(plan.spec, plan.variables, setting, submitted_from=submitted_from, training=True)
    prepared = prepared_files(plan.spec) if submitted_from else stage_files(plan.spec)
    config = () if plan.config is None else (File("ds_config.json", config_json(plan.config)),)
    return (File("node.sh", script), *config, asked(plan.spec), *prepared, *node_files(plan), *checked)


def asked(spec: JobSpec) -> File:
    """The job as it was asked for, site file and --set included: `dslaunch import` makes a job file of it again."""
    return File(ASKED, json.dumps(given(spec), indent=1) + "\n")


def prepared_files(spec: JobSpec) -> tuple[File, ...]:
    """What prepares a node before the container, and copies to its disk."""
    hosted = (File(software.HOST, host_script(spec)),) if software.hosted(spec) else ()
    return (*hosted, *stage_files(spec))


def stage_files(spec: JobSpec) -> tuple[File, ...]:
    return (node_file("stage.sh"),) if spec.stage else ()


def preflight_files(
    spec: JobSpec, variables: nccl.Variables, setting: Setting, *, submitted_from: bool = True, training: bool = False
) -> tuple[File, ...]:
    """What checks the nodes: a script, what it is told, and the two packages that travel, below node/."""
    packages = [*sorted(HERE.glob("preflight/*.py")), *sorted(HERE.glob("checks/*.py"))]
    packages += [HERE / "data" / "xids.tsv"] if setting.gpus else []
    packages += [] if training else [HERE / "__init__.py"]
    told = json.dumps(preflight.to_json(setting), indent=1)
    prepared = () if training else prepared_files(spec) if submitted_from else stage_files(spec)
    return (
        *prepared,
        File("preflight.sh", preflight_script(spec, variables, submitted_from=submitted_from)),
        File("preflight.json", told + "\n"),
        *packed(packages),
    )


def exports(variables: nccl.Variables) -> list[str]:
    """The lines that make an environment; what a fabric's vendor runs stands before our own."""
    lines = [part for line in variables.setup for part in (f"# {comment(line.why)}", line.text)]
    for row in variables.rows:
        value = quote(row.value)
        value = f"'{value}'" if value.startswith("=") else value  # NCCL_IB_HCA='=mlx5_0', which is no ==
        lines.append(f"export {row.name}={value}  # {comment(row.why)}")
    return lines


SECRETS = """\
secret() {  # NAME: its value lies in a file that only you can read, and in no script
  [ -r "$here/secrets/$1" ] || { echo "dslaunch: the secret $1 is missing: $here/secrets/$1" >&2; exit 78; }
  value=$(cat -- "$here/secrets/$1"; printf x)
  export "$1=${value%x}"
  unset value
}"""

VERSION = """\
python3 - {version} <<'EOF'  # the plan was made for this release: others refuse what it accepts, or accept less
import importlib.metadata, sys
found = importlib.metadata.version("deepspeed")
if found.split("+")[0] != sys.argv[1].split("+")[0]:
    sys.exit(f"dslaunch: the job file says DeepSpeed {{sys.argv[1]}}, this node has {{found}}")
EOF"""


BATCH = ("port.py", "journal.py", "recover.py")  # what a script that starts the nodes runs itself
DUPLICATE, OVER = 100, 101  # that recover.py answers: another job has this run; its starts are used up
STOPPED_EARLY = 75  # EX_TEMPFAIL: a checkpoint was saved, the run is not finished

# Several nodes end with codes of their own; the job's is that of the rank that failed first anywhere.
VERDICT = f"""\
if [ "$rc" = 0 ] && [ -e "$run/logs/stopped-$attempt" ]; then
  rc={STOPPED_EARLY}  # stopped early, checkpoint saved
elif [ "$rc" != 0 ] && [ -s "$run/logs/first-failure-$attempt" ]; then
  read -r rc <"$run/logs/first-failure-$attempt"  # of the rank that failed first, on whichever node
fi
"""

GPUS = """\
python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < {gpus}:
    sys.exit(f"dslaunch: torch sees {{found}} GPUs on this node and the job was planned for {gpus}")
EOF"""

# The same, for a program whose Python this need not be, or that brings another library than torch.
SOME_GPUS = """\
python3 - <<'EOF'  # without this a node with no usable GPU would hang the others
import sys
try:
    import torch
except ImportError:
    sys.exit()
found = torch.cuda.device_count()
if found < {gpus}:
    sys.exit(f"dslaunch: torch sees {{found}} GPUs on this node and the job asks for {gpus}")
EOF"""


def preflight_script(spec: JobSpec, variables: nccl.Variables, *, submitted_from: bool = True) -> str:
    """The script that checks one node, in the environment that trains; on the first node also the one that judges."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {spec.name}: checks this node before anything trains, with NODE_RANK and DSLAUNCH_COORDINATOR set.",
        *prelude(spec, variables, submitted_from=submitted_from, failed="$out/failed-${DSLAUNCH_NODE:-$(hostname)}"),
        "",
        "# --- preflight",
    ]
    if submitted_from or spec.train.workdir != ".":
        lines.append(f"cd -P -- {software.workdir(spec, submitted_from=submitted_from)}")
    lines.append(PREFLIGHT)
    return "\n".join(lines)


PREFLIGHT = f"""\
start={quote(START)}
code=$here/{CODE}
[ -d "$code" ] || code=$code.zip  # in a pod
trap - ERR EXIT
if [ "$NODE_RANK" = 0 ]; then
  python3 -c "$start" "$code" preflight.coordinator --setting "$here/preflight.json" --out "$out" \\
    --port "${{DSLAUNCH_COORDINATOR##*:}}" --names "${{DSLAUNCH_NODES:-}}" &
fi
rc=0
python3 -c "$start" "$code" preflight.agent --setting "$here/preflight.json" --connect "$DSLAUNCH_COORDINATOR" \\
  --name "${{DSLAUNCH_NODE:-$(hostname)}}" --index "$NODE_RANK" --logs "$logs/preflight" || rc=$?
wait
[ "$rc" != 10 ] || rc=0  # ready, without a node that is not needed
exit "$rc"
"""


FIRST = """\
rc=0
trap 'exit 143' TERM  # the first process of a pod ignores it otherwise
DSLAUNCH_COORDINATOR=$MASTER_ADDR:$((MASTER_PORT + 1)) bash "$here/preflight.sh" &
wait "$!" || rc=$?
trap - TERM
if [ "$rc" != 0 ]; then
  trap - ERR EXIT
  exit "$rc"
fi"""


def prelude(
    spec: JobSpec, variables: nccl.Variables, *, submitted_from: bool, failed: str = "$logs/failed-before-ranks"
) -> list[str]:
    """From a bare shell to the environment of the job; what goes wrong on the way stands in `failed`."""
    lines = opening(failed)
    if not (submitted_from and software.hosted(spec)):
        lines += software.modules(spec) + software.stages(spec, submitted_from=submitted_from)
    lines += software.sourced(spec, submitted_from=submitted_from)
    lines += software.environments(spec, submitted_from=submitted_from)
    lines += software.taken(spec) if submitted_from else []
    said = repr(spec)
    told = [line for variable, line in _knows(spec, submitted_from).items() if ascii(at_run(variable))[1:-1] in said]
    lines += software.limits(spec)
    if spec.setup or spec.mkdir:
        lines += ["", "# --- setup, from the job file"]
        if submitted_from or spec.train.workdir != ".":
            lines.append(f"cd -P -- {software.workdir(spec, submitted_from=submitted_from)}")
    if spec.mkdir:
        lines += [*told, f"mkdir -p -- {wrap(map(quote, spec.mkdir))}"]
        told = []
    lines += spec.setup
    if variables.rows or told:
        lines += ["", "# --- environment", *told, *exports(variables)]
    lines += software.trackers(spec, submitted_from=submitted_from)
    if spec.credentials and submitted_from:
        lines += ["", "# --- secrets", SECRETS, *(f"secret {name}" for name in spec.credentials)]
    return lines


def _knows(spec: JobSpec, submitted_from: bool) -> dict[str, str]:
    """What a node knows of itself, for those who ask: {job: id}, {node: name}. Pods have the job's name alone."""
    run = "${here##*/}" if submitted_from else spec.name
    return {
        "DSLAUNCH_JOB_ID": f'export DSLAUNCH_JOB_ID="${{SLURM_JOB_ID:-{run}}}"',
        "DSLAUNCH_NODE_NAME": "DSLAUNCH_NODE_NAME=$(hostname -s)\nexport DSLAUNCH_NODE_NAME",
    }


def host_script(spec: JobSpec) -> str:
    """What a node does before it enters a container with a command: `host.sh bash node.sh` runs node.sh in there."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {spec.name}: prepares this node, and runs its arguments in the container.",
        *opening("${DSLAUNCH_PREFLIGHT_OUT:-$logs}/failed-${DSLAUNCH_NODE:-before-ranks}"),
        *software.modules(spec),
        *software.stages(spec),
        *software.container(spec),
    ]
    return "\n".join(lines) + "\n"


def opening(failed: str) -> list[str]:
    """How a script of a node begins: it stops at what fails, and says so in the file `failed`."""
    return [
        "set -eo pipefail",
        "trap '' USR2  # a warning before the ranks run has nothing to save; supervise.py listens again",
        'here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)',
        'logs=${DSLAUNCH_LOGS:-"$here/logs"}',
        *(['out=${DSLAUNCH_PREFLIGHT_OUT:-"$logs/preflight"}'] if "$out" in failed else []),
        'mkdir -p -- "$logs"' + (' "$out"' if "$out" in failed else ""),
        # one line that `dslaunch status` shows when a node never comes to its ranks
        "# shellcheck disable=SC2329  # the trap calls it; ERR alone does not hear of an `activate` that is missing",
        "failed() {",
        "  local rc=$? said",
        "  trap - ERR EXIT",
        '  if [ "$rc" != 0 ]; then',
        '    said="${BASH_SOURCE[0]##*/} on $(hostname) ended with $rc: ${why:-$1}"',
        '    echo "$said" >&2',
        # the first one stays: Slurm kills the others while they write
        f"""    (set -C; echo "$said" >"{failed}") 2>/dev/null || true""",
        "  fi",
        '  exit "$rc"',
        "}",
        """trap 'failed "$BASH_COMMAND"' ERR EXIT""",
    ]


def node_script(plan: Plan, *, flags: Iterable[str] = (), submitted_from: bool = True, first: bool = False) -> str:
    """The script that runs once per node, whatever the scheduler. `first`: a pod checks itself before it trains."""
    spec = plan.spec
    lines = [
        "#!/usr/bin/env bash",
        f"# {spec.name}: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.",
        *_trained(plan),
        *prelude(spec, plan.variables, submitted_from=submitted_from),
    ]
    if first:
        lines += ["", "# --- preflight", FIRST]
    if spec.environment.deepspeed:
        lines += ["", VERSION.format(version=quote(spec.environment.deepspeed))]
    if spec.resources.gpus_per_node:
        own = submitted_from and spec.train.launcher == "srun" and spec.slurm.binds_gpus
        gpus = 1 if own else spec.resources.gpus_per_node  # a rank sees its own alone
        lines += ["", (GPUS if plan.model else SOME_GPUS).format(gpus=gpus)]
    lines += ["", "# --- training"]
    if submitted_from or spec.train.workdir != ".":
        lines.append(f"cd -P -- {software.workdir(spec, submitted_from=submitted_from)}")
    lines += [
        *(
            []
            if plan.config is None
            else ['export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag']
        ),
        f"export DSLAUNCH_CHECKPOINT_DIR={quote(plan.checkpoint_dir)}",
        *(
            f"export DSLAUNCH_{name}_PARALLEL={degree}"
            for name, degree in zip(("TENSOR", "PIPELINE"), plan.degrees, strict=True)
            if degree > 1
        ),
        *(
            []
            if plan.reference_trainer
            else [
                f"export DSLAUNCH_CHECKPOINT_EVERY={plan.save_every}",
                f"export DSLAUNCH_CHECKPOINT_KEEP={spec.train.checkpoint.keep}",
                *([f"export DSLAUNCH_STEPS={spec.steps}"] if spec.steps else []),
                *([f"export DSLAUNCH_SEQ_LEN={spec.seq_len}"] if spec.seq_len else []),
            ]
        ),
        *(["# shellcheck disable=SC2016  # the program expands it for itself"] if _expands(plan) else []),
        'exec python3 -u "$here/node/supervise.py" \\',
        f"  --launcher {spec.train.launcher} --nodes {spec.resources.nodes} --per-node {spec.per_node} \\",
        *_to_the_launcher(plan),
        f"  --hang {spec.recover.hang:g} --first-step {spec.recover.first_step:g} --steps {spec.steps} "
        f"{'' if plan.stage is None else f'--stage {plan.stage} '}--model-parallel {math.prod(plan.degrees)} "
        f"{'' if plan.reference_trainer else '--vouch '}\\",
        f'  --logs "$logs" {"".join(f"{flag} " for flag in flags)}-- \\',
        "  " + wrap(quote(word) for word in plan.command),
    ]
    return "\n".join(lines) + "\n"


def _expands(plan: Plan) -> bool:
    """Whether a word is itself shell: bash -c 'exec trainer --server "$DSLAUNCH_HOST_VLLM"'."""
    return any("$" in word or "`" in word for word in plan.command)


def _trained(plan: Plan) -> list[str]:
    """What it is, as comments."""
    spec, setup, batch = plan.spec, plan.setup, plan.batch
    ranks = f"{spec.resources.nodes} x {spec.per_node} ranks"
    if not (plan.model and setup and batch):
        return [f"# {comment(plan.program)}: {ranks}, of a model that its own configuration names."]
    size = f"{plan.parameters:,} parameters"
    return [
        f"# {comment(plan.model.name)}: {size}, ZeRO-{setup.stage}, {setup.precision}, {ranks},",
        f"# batch {batch.total} = {batch.micro} x {batch.accumulation} x {batch.replicas}.",
    ]


def _to_the_launcher(plan: Plan) -> list[str]:
    """Its own arguments, and what each rank is bound to, as lines of a command."""
    train = plan.spec.train
    words = [quote(f"--launcher-arg={word}") for word in train.launcher_args]
    if plan.config is not None and launchers.takes_config(plan.spec):
        words += ["--launcher-arg=--deepspeed_config_file", '--launcher-arg="$here/ds_config.json"']
    if train.visible_gpus == "own":
        words.append("--own-gpu")
    if train.numa != "none":
        words.append(f"--numa {train.numa if isinstance(train.numa, str) else ','.join(map(str, train.numa))}")
    return [f"  {wrap(words)} \\"] if words else []


def checkpoints(plan: Plan, name: str = "") -> str:
    """The directory of the checkpoints, or a file in it, as a word of the script that starts the nodes."""
    folder, workdir = plan.checkpoint_dir, plan.spec.train.workdir
    path = f"{folder}{name}" if folder.startswith("/") else f"{workdir}/{folder}{name}"
    if path.startswith("/"):
        return quote(software.outside(plan.spec, path))
    return '"$run/submitted-from"/' + quote(path)


def indent(text: str, by: str) -> str:
    return "".join(by + line for line in text.splitlines(keepends=True))


def wrap(words: Iterable[str]) -> str:
    """Shell words, quoted already, on lines of about 100 characters."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) <= 100:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n  ".join(lines)


# --- the disk -------------------------------------------------------------------------------------


def write(bundle: Bundle, folder: Path, *, submitted_from: Path, secrets: dict[str, str]) -> None:
    """The files of a run, mode 0600 in a directory of mode 0700 that must not exist yet."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(
            Problem(f"cannot create {folder}: {error.strerror}", hint="--runs names another place")
        ) from None
    for file in bundle.files:
        write_private(folder / file.path, file.text)
    (folder / "logs").mkdir(mode=0o700)
    (folder / "submitted-from").symlink_to(submitted_from, target_is_directory=True)
    for name, value in secrets.items():
        write_private(folder / "secrets" / name, value)


def write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, with the mode of the file it replaces; a link stays one. Raises UserError."""
    target = Path(os.path.realpath(path))
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        there = target.stat() if target.exists() else None
        if there and not stat.S_ISREG(there.st_mode):  # /dev/stdout is not to become a file
            raise UserError(Problem(f"cannot write {path}: it is no file"))
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if there else 0o666)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.write(text)
                file.flush()
                if there:
                    os.fchmod(descriptor, stat.S_IMODE(there.st_mode))
                os.fsync(descriptor)
            half.replace(target)
        except BaseException:
            half.unlink()
            raise
    except OSError as error:
        raise UserError(Problem(f"cannot write {path}: {error.strerror}")) from None


def secret_values(spec: JobSpec, environ: Mapping[str, str], base: Path) -> dict[str, str]:
    """The values behind `secrets:`, for Slurm and local runs. Raises UserError for each that is not there."""
    values, problems = {}, []
    for name, source in spec.credentials.items():
        at = software.credential(spec, name)
        if source.from_env:
            if environ.get(source.from_env):
                values[name] = environ[source.from_env]
            else:
                hint = f"export {source.from_env} in the shell that submits"
                problems.append(Problem(f"the environment has no {source.from_env}", hint, at))
        elif source.from_file:
            path = base / source.from_file
            try:
                values[name] = yamldoc.decode(yamldoc.read_bytes(str(path)), name=str(path)).rstrip("\n")
                if path.stat().st_mode & 0o077:
                    problems.append(Problem(f"{path} can be read by others", f"chmod 600 {path}", at))
            except UserError as error:
                problems += [Problem(problem.message, problem.hint, at) for problem in error.problems]
        else:
            hint = "give from_env or from_file beside it"
            problems.append(Problem(f"secret {name} is a Kubernetes Secret, and this is not Kubernetes", hint, at))
    if problems:
        raise UserError(*problems)
    return values
