"""The vocabulary of a job file: what may stand in which kind of field."""

from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

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

F = TypeVar("F")
T = TypeVar("T")
_STRICT: dict[str, Any] = {"extra": "forbid"}


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[F], F]:
        return lambda function: function


class Section:
    """Unknown keys are refused, by the reader and by the editor's schema alike.

    What a dataclass writes anew for each class is said once here: it took half of the time to import this package.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __init__(self, *given: Any, **values: Any) -> None:
        """As a frozen dataclass: every field given or its default. Raises TypeError for one too many or missing."""
        rows = self.__dataclass_fields__  # type: ignore[attr-defined]
        values.update(zip(rows, given, strict=False))
        if len(given) > len(rows) or not rows.keys() >= values.keys():
            raise TypeError(
                f"{type(self).__name__} has no field {', '.join(values.keys() - rows.keys()) or len(given)}"
            )
        own = self.__dict__
        for name, row in rows.items():
            if name in values:
                own[name] = values[name]
            elif row.default is not MISSING:
                own[name] = row.default
            elif row.default_factory is not MISSING:
                own[name] = row.default_factory()
            else:
                raise TypeError(f"{type(self).__name__} needs {name}")

    def __setattr__(self, name: str, _: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


@dataclass_transform(frozen_default=True)
def section(kind: type[T]) -> type[T]:
    """A frozen dataclass of keys."""
    kind.__doc__ = kind.__doc__ or kind.__name__  # else it is made from a signature, which takes longest of all
    return dataclass(init=False, repr=False, eq=False)(kind)
