"""The vocabulary of a job file: what may stand in which kind of field."""

import re
from typing import Annotated, Any, ClassVar, Literal

from launcher.yamldoc import Matches, Range

# What may stand where. `#SBATCH` lines have no safe quoting, so whatever reaches one is limited to
# characters that need none; command lines and exports are quoted and may hold anything but NUL.
Name = Annotated[
    str,
    Matches(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", "1 to 40 lower-case letters, digits and inner dashes"),
]
Text = Annotated[str, Matches(r"[^\x00]*", "free of NUL")]
Line = Annotated[str, Matches(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+", "one line of text")]
FilePath = Annotated[
    str,
    Matches(
        r"(?!-)[^\x00-\x1f\x7f-\x9f\u2028\u2029~$`][^\x00-\x1f\x7f-\x9f\u2028\u2029$`]*",
        "a path: it may not begin with - or ~ nor hold $ or control characters; "
        "nothing is expanded, {env: SCRATCH, append: /runs} reads a variable",
    ),
]
Token = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.,:@%+/=-]*", "letters, digits and _.,:@%+/=- without spaces")]
Constraint = Annotated[str, Matches(r"[A-Za-z0-9(\[][A-Za-z0-9_.,:&|*()\[\]-]*", "a Slurm constraint without spaces")]
Nodes = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.,/\[\]-]*", "a Slurm node list, gpu[001-004,7]")]
Time = Annotated[
    str,
    Matches(
        r"[0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]{1,2}(:[0-5]?[0-9]){0,2}",
        "a Slurm time: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS",
    ),
]
Memory = Annotated[str, Matches(r"[1-9][0-9]*[KMGT]?|0", "a Slurm memory size: 500G, 64000M, or 0 for all")]
Quantity = Annotated[str, Matches(r"[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?", "a Kubernetes quantity such as 64Gi")]
Variable = Annotated[str, Matches(r"[A-Za-z_][A-Za-z0-9_]*", "a name for a variable: letters, digits, _")]
Version = Annotated[
    str, Matches(r"[0-9]+(\.[0-9]+){2,3}([A-Za-z0-9.+-]*)", "a version of three numbers such as 0.19.6")
]
Label = Annotated[str, Matches(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", "a Kubernetes label value")]
LabelKey = Annotated[
    str,
    Matches(
        r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
        "a Kubernetes label key",
    ),
]
Namespace = Annotated[
    str,
    Matches(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "a namespace: up to 63 lower-case letters, digits, inner dashes"),
]
DnsName = Annotated[str, Matches(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "a DNS name")]
Mount = Annotated[
    str,
    Matches(
        r"[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ -][^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*"
        r"(:/[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*(:[a-z]+([,+][a-z]+)*)?)?",
        "/source:/target, with :ro behind it where nothing may be written",
    ),
]
LocalDisk = Annotated[
    str,
    Matches(
        r"/[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*",
        "an absolute path without spaces, quotes and any of , : $: containers get it as a mount",
    ),
]
Image = Annotated[str, Matches(r"[A-Za-z0-9./][A-Za-z0-9._/:@#+-]*", "an image reference without spaces")]
Module = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.+/=-]*", "a module name such as cuda/12.4")]

# What a job knows only while it runs: `{job: id}` in a text stands for "$DSLAUNCH_JOB_ID" in the script. Between two
# characters that no text has, so that whoever quotes a word sees where the variable is.
AT_RUN = re.compile("\ue000([A-Z][A-Z0-9_]*)\ue001")
VARIABLES = {
    "job": {"id": "DSLAUNCH_JOB_ID"},
    "node": {"rank": "NODE_RANK", "name": "DSLAUNCH_NODE_NAME", "local": "DSLAUNCH_LOCAL"},
}
OF_SERVICES = {"host": "DSLAUNCH_HOST_", "port": "DSLAUNCH_PORT_"}
# {node: PATH} is what that variable holds on the node before the ranks start, where it is no secret.
OF_NODE = re.compile(r"(?!DSLAUNCH_|BASH|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)\Z)[A-Z][A-Z0-9_]*")


def at_run(variable: str) -> str:
    return f"\ue000{variable}\ue001"


def of_service(key: str, service: str) -> str:
    """The host of `ray-head` is DSLAUNCH_HOST_RAY_HEAD."""
    return OF_SERVICES[key] + service.upper().replace("-", "_")


def shown(text: str) -> str:
    """For a person: run-$DSLAUNCH_JOB_ID."""
    return AT_RUN.sub(r"$\1", text)


def written(text: str) -> str | dict[str, Any]:
    """As it stands in a job file: {"job": "id", "prepend": "/runs/"}; a second variable stands in `append`."""
    found = AT_RUN.search(text)
    if not found:
        return text
    key, name = _meant(found[1])
    around = {"prepend": text[: found.start()], "append": written(text[found.end() :])}
    return {key: name, **{side: part for side, part in around.items() if part}}


def _meant(variable: str) -> tuple[str, str]:
    for key, names in VARIABLES.items():
        for name, known in names.items():
            if known == variable:
                return key, name
    for key, prefix in OF_SERVICES.items():
        if variable.startswith(prefix):
            return key, variable.removeprefix(prefix).lower().replace("_", "-")
    return "node", variable


Auto = Literal["auto"]
Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Argument = Text

_STRICT: dict[str, Any] = {"extra": "forbid"}


class Section:
    """Unknown keys are refused, by the reader and by the editor's schema alike."""

    __pydantic_config__: ClassVar[Any] = _STRICT


def seconds(text: str) -> int | None:
    """seconds("2-00:30:00") is 174600; "90" is minutes, "90:30" minutes and seconds, "1-12" days and hours."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if (
        not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts)
        or len(parts) > 3
        or (dash and not days.isdigit())
    ):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + secs
    if len(numbers) == 1:
        return numbers[0] * 60
    return sum(number * unit for number, unit in zip(reversed(numbers), (1, 60, 3600), strict=False))


def mebibytes(text: str) -> float:
    """Slurm's memory: "500G" is 512000, and so is "512000"; "64K" is 0.0625."""
    scale = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    return int(text[:-1]) * scale[text[-1]] if text[-1] in scale else int(text)
