"""The vocabulary of a job file: what may stand in which kind of field."""

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
DnsName = Annotated[str, Matches(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "a DNS name")]
Mount = Annotated[
    str,
    Matches(
        r"[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ -][^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*"
        r"(:/[^\x00-\x1f\x7f-\x9f\u2028\u2029,:$`\"'\\ ]*(:[a-z]+([,+][a-z]+)*)?)?",
        "/source:/target, with :ro behind it where nothing may be written",
    ),
]
Image = Annotated[str, Matches(r"[A-Za-z0-9./][A-Za-z0-9._/:@#+-]*", "an image reference without spaces")]
Module = Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9_.+/=-]*", "a module name such as cuda/12.4")]

Auto = Literal["auto"]
Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Argument = Text

_STRICT: dict[str, Any] = {"extra": "forbid"}


class Section:
    """Unknown keys are refused, by the reader and by the editor's schema alike."""

    __pydantic_config__: ClassVar[Any] = _STRICT
