"""Fields that cannot stand together, and names that cannot be set."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import Path, Problem
from launcher.spec import services
from launcher.spec.software import Uv
from launcher.spec.words import AT_RUN, mebibytes, shown
from launcher.yamldoc import Matches

if TYPE_CHECKING:
    from launcher.spec import JobSpec


MOST = 1 << 30  # MiB, a pebibyte


def contradictions(spec: JobSpec) -> list[Problem]:
    """Fields that cannot stand together, and names that cannot be set."""
    found: list[Problem] = []
    programs = [key for key in ("script", "module", "command") if getattr(spec.train, key)]
    if len(programs) > 1:
        found.append(
            Problem(
                f"{' and '.join(programs)} are both given; a rank runs one program",
                hint=f"keep train.{programs[0]}",
                at=("train", programs[1]),
            )
        )
    if spec.train.command == ():
        found.append(Problem("command is an empty list: nothing would run", at=("train", "command")))
    if spec.train.args and spec.train.command:
        found.append(Problem("args belong to script or module; a command holds its own", at=("train", "args")))
    flag = spec.train.config_flag or "--deepspeed_config"
    hands_over = spec.model is not None or spec.train.deepspeed or spec.train.config_flag
    given = [i for i, word in enumerate(spec.train.args) if word.split("=")[0] in (flag, flag.replace("_", "-"))]
    if given and hands_over and flag != "none" and (spec.train.script or spec.train.module):
        found.append(
            Problem(
                f"{flag} stands in args, and dslaunch hands its own config over with it",
                hint="train.deepspeed: for keys of yours, or config_flag: none to bring the whole config",
                at=("train", "args", given[0]),
            )
        )
    resources = spec.resources
    if resources.gpus_per_node and resources.processes_per_node not in (None, resources.gpus_per_node):
        found.append(
            Problem(
                f"processes_per_node {resources.processes_per_node} with {resources.gpus_per_node} GPUs: "
                "DeepSpeed runs one rank per GPU",
                hint="leave processes_per_node out",
                at=("resources", "processes_per_node"),
            )
        )
    if resources.gpu and not resources.gpus_per_node:
        found.append(
            Problem(
                f"gpu {resources.gpu} is named but gpus_per_node is 0: this would train on CPU",
                hint="set resources.gpus_per_node",
                at=("resources", "gpu"),
            )
        )
    machines = [(("resources",), resources), *((("services", i), row) for i, row in enumerate(spec.services))]
    for place, one in machines:
        for key in ("memory", "nvme"):
            size = getattr(one, key, None)
            if size and mebibytes(size) > MOST:
                message = f"{key} {shown(size)}: no node has more than {MOST >> 20}T"
                found.append(Problem(message, hint="what one node has, such as 500G", at=(*place, key)))
    if not spec.preflight.stages:
        hint = "leave stages out, or preflight.run: false"
        found.append(Problem("a preflight without a stage checks nothing", hint=hint, at=("preflight", "stages")))
    homes = [key for key in ("venv", "conda", "uv") if getattr(spec, key)]
    if len(homes) > 1:
        found.append(Problem(f"{' and '.join(homes)} are both given", hint="keep one", at=(homes[1],)))
    for key, value in spec.env.items():
        found += _env_problems(key, value)
    for place, text in texts(spec):
        named = place[0] == "env" or (place[0] == "services" and "env" in place)  # said below, with its name
        if not named and SECRET_VALUE.regex.fullmatch(text):
            line = any(part in ("args", "command") for part in place)
            where = "command lines are written to files and seen by everybody" if line else "this is written to files"
            hint = "secrets: {NAME: {from_env: NAME}} hands it over in a variable"
            found.append(Problem(f"this looks like a secret, and {where}", hint, place))
    for number, folder in enumerate(spec.mkdir):
        if not folder:
            found.append(Problem("a directory needs a name", "leave it out", ("mkdir", number)))
    found += [*services.problems(spec), *_code(spec), *_stages(spec)]
    for number, service in enumerate(spec.services):
        for key, value in service.env.items():
            found += [Problem(p.message, p.hint, ("services", number, *p.at)) for p in _env_problems(key, value)]
    trackers = {"WANDB_API_KEY": "wandb", "MLFLOW_TRACKING_TOKEN": "mlflow", "COMET_API_KEY": "comet"}
    for key, secret in spec.credentials.items():
        at: Path = ("secrets", key) if key in spec.secrets else ("tracking", trackers[key])
        if key in trackers and key in spec.secrets and spec.credentials[key] is not spec.secrets[key]:
            found.append(Problem(f"{key} stands in secrets and in tracking", hint="keep one", at=at))
        if key in spec.env:
            found.append(Problem(f"{key} stands in env and in secrets", hint="keep it in secrets", at=at))
        if not (secret.from_env or secret.from_file or secret.secret):
            found.append(
                Problem(f"secret {key} has no source", hint="give from_env, from_file, or secret and key", at=at)
            )
        if secret.from_env and secret.from_file:
            found.append(Problem(f"secret {key} has two sources", hint="keep from_env or from_file", at=at))
        if bool(secret.secret) != bool(secret.key):
            found.append(Problem(f"secret {key} needs both secret and key for Kubernetes", at=at))
        if secret.optional and not secret.secret:
            message = f"secret {key} is optional without a Kubernetes Secret, and elsewhere none is"
            found.append(Problem(message, hint="secret and key, or leave optional out", at=at))
        found += [Problem(p.message, p.hint, at) for p in _env_problems(key, "")]
    for kind in ("annotations", "pod_annotations"):
        for key, value in getattr(spec.kubernetes, kind).items():
            if AT_RUN.search(value):
                message = f"{shown(value)} is known to a job that runs, and an annotation is written before"
                found.append(Problem(message, "a text", ("kubernetes", kind, key)))
    return found


def _code(spec: JobSpec) -> list[Problem]:
    if isinstance(spec.code, str):
        return []
    address = spec.code.clone
    if address is None:
        return [
            Problem(f"{name} of no clone", "code.clone: https://...", ("code", name))
            for name in ("ref", "secret")
            if getattr(spec.code, name)
        ]
    user, at, _ = address.partition("://")[2].split("/")[0].rpartition("@")
    said = SECRET_VALUE.regex.fullmatch(address)  # of every text
    if at and not said and (address.startswith("https:") or ":" in user):
        message = "a user or token in an address ends in manifests and in files of the run"
        return [Problem(message, "code.secret names a Secret with `password`", ("code", "clone"))]
    return []


def texts(value: Any, at: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every text of a job with its place: (("train", "args", 0), "--lr")."""
    if isinstance(value, str):
        yield at, value
    elif is_dataclass(value):
        for row in fields(value):
            yield from texts(getattr(value, row.name), (*at, row.name))
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from texts(child, (*at, key))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from texts(child, (*at, index))


def _stages(spec: JobSpec) -> list[Problem]:
    """Copies on the local disk: below the job's own directory there, and each in a place of its own."""
    found: list[Problem] = []
    places = [posixpath.normpath(row.to) for row in spec.stage]
    synced = isinstance(spec.uv, Uv) and spec.uv.sync
    for index, (row, place) in enumerate(zip(spec.stage, places, strict=True)):
        at: Path = ("stage", index, "to")
        if not row.to.startswith("/") and ".." in row.to.split("/"):
            message = f"{row.to} leads out of the job's own directory on the local disk"
            found.append(Problem(message, "a name below it, or an absolute path", at))
        elif place in (".", "/", "//"):
            message = f"{row.to} is a directory that is there already, and a copy makes its own"
            found.append(Problem(message, "a name below it", at))
        elif synced and place.split("/")[0] in ("uv", "uv.lock"):
            message = f"{row.to} is where uv.sync puts its environment on the local disk"
            found.append(Problem(message, "another name", at))
        for number, other in enumerate(places[:index]):
            if f"{place}/".startswith(f"{other}/") or f"{other}/".startswith(f"{place}/"):
                place = spec.stage[number].to
                message = f"{row.to} and {place} of another stage are one place, or one holds the other"
                found.append(Problem(message, "a place of its own for each", at))
                break
    return found


# Variables a job file may not set: each would take effect before or beneath what dslaunch arranges.
NOT_YOURS = {
    "BASH_ENV": "bash runs that file before the script",
    "ENV": "sh runs that file before the script",
    "LD_PRELOAD": "it is loaded into every process, bash and srun included",
    "LD_AUDIT": "it is loaded into every process, bash and srun included",
    "SHELLOPTS": "it changes how the script itself is read",
    "BASHOPTS": "it changes how the script itself is read",
    "IFS": "it changes how the script itself is read",
    "PS4": "bash expands it as a command line",
    **dict.fromkeys(["UID", "EUID", "PPID"], "bash refuses to change it"),
    **dict.fromkeys(
        """RANDOM SRANDOM SECONDS LINENO EPOCHSECONDS EPOCHREALTIME PIPESTATUS FUNCNAME GROUPS DIRSTACK HISTCMD
        OPTIND SHLVL PWD OLDPWD BASHPID EXECIGNORE _""".split(),
        "bash gives it a value or a meaning of its own",
    ),
    **dict.fromkeys(["here", "logs", "value", "why"], "node.sh itself uses it"),
    "RANK": "the launcher sets it on every rank",
    "LOCAL_RANK": "the launcher sets it on every rank",
    "WORLD_SIZE": "the launcher sets it on every rank",
    "CUDA_VISIBLE_DEVICES": "the scheduler and the launcher hand out the devices",
    "NODE_RANK": "the scheduler's side sets it on every node",
    "MASTER_ADDR": "the scheduler's side sets it on every node",
    "MASTER_PORT": "the scheduler's side sets it on every node",
}
NOT_YOUR_PREFIXES = {
    "SLURM_": "Slurm sets it",
    "SBATCH_": "sbatch reads it as an option",
    "SRUN_": "srun reads it as an option",
    "BASH_FUNC_": "bash takes it for a function",
    "BASH_": "bash gives it a value or a meaning of its own",
    "PET_": "torchrun reads it as an option",
    "TORCHELASTIC_": "torchrun sets it",
    "DSLAUNCH_": "dslaunch sets it",
}
SECRET_NAME = Matches(
    r"(?i:.*(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|APIKEY|API_KEY|ACCESS_KEY|SECRET_KEY|CREDENTIALS?)"
    r"|.+_PAT|(?!OLDPWD$).+PWD)",  # PWD and OLDPWD are directories
    "",
)
# Prefixes stand at the beginning of a word: /data/task-of-a-name-that-is-long is no sk-...
SECRET_VALUE = Matches(
    r"(?s:.*((?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9_-]{20}|gh[pousr]_[A-Za-z0-9]{20}"
    r"|github_pat_[A-Za-z0-9_]{20}|glpat-[A-Za-z0-9_-]{20}|xox[abeoprs]-[A-Za-z0-9-]{10}"
    r"|nvapi-[A-Za-z0-9_-]{20}|(AKIA|ASIA)[A-Z0-9]{16})"
    r"|(?i:aws_secret_access_key)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{20}"
    r"|://[^/\s:@\"']*:[^/\s:@$<{\"'][^/\s:@\"']*@"  # a URL's user:password@
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}).*)",
    "",
)


def looks_secret(name: str, value: str) -> bool:
    """WANDB_API_KEY=..., and any name with hf_... in its value; OLD_PWD=/home/a is a directory."""
    named = SECRET_NAME.regex.fullmatch(name) and not (name.upper().endswith("PWD") and value.startswith("/"))
    return bool(named or SECRET_VALUE.regex.fullmatch(value))


def _env_problems(key: str, value: str) -> list[Problem]:
    at: Path = ("env", key)
    prefix = next((prefix for prefix in NOT_YOUR_PREFIXES if key.startswith(prefix)), None)
    reason = NOT_YOURS.get(key) or (NOT_YOUR_PREFIXES[prefix] if prefix else None)
    if reason:
        return [Problem(f"{key} cannot be set from a job file: {reason}", hint="remove it", at=at)]
    if value and looks_secret(key, value):
        hint = f"secrets: {{{key}: {{from_env: {key}}}}} hands it over without writing it anywhere"
        return [Problem(f"{key} looks like a secret, and env is written to files", hint=hint, at=at)]
    return []
