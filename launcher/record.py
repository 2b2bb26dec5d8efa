"""Frozen dataclasses that are cheap to define: what a dataclass compiles anew for each class is written once here.

Compiling it for the hundred classes that a command loads took a third of that command's time.
"""

from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F")
T = TypeVar("T")
if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[F], F]:
        return lambda function: function


@dataclass_transform(frozen_default=True)
def record(kind: type[T]) -> type[T]:
    """As `dataclass(frozen=True)`; `fields`, `replace` and `asdict` know it."""
    kind.__doc__ = kind.__doc__ or kind.__name__  # else it is made from a signature, which takes longest of all
    made = dataclass(init=False, repr=False, eq=False)(kind)
    for name, method in METHODS.items():
        if name not in kind.__dict__:
            setattr(made, name, method)
    return made


def _init(self: Any, *given: Any, **values: Any) -> None:
    """Every field as given, or its default. Raises TypeError for one too many, and for one that is missing."""
    rows = self.__dataclass_fields__
    if given:
        values = {**dict(zip(rows, given, strict=False)), **values}
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
    if len(given) > len(rows) or not rows.keys() >= values.keys():
        strange = ", ".join(values.keys() - rows.keys()) or f"number {len(given)}"
        raise TypeError(f"{type(self).__name__} has no field {strange}")


def _values(self: Any) -> tuple[Any, ...]:
    return tuple([self.__dict__[name] for name in self.__dataclass_fields__])


def _setattr(self: Any, name: str, _: Any) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _eq(self: Any, other: object) -> bool:
    return type(other) is type(self) and _values(self) == _values(other)


def _hash(self: Any) -> int:
    return hash((type(self), *_values(self)))


def _repr(self: Any) -> str:
    shown = (f"{name}={self.__dict__[name]!r}" for name in self.__dataclass_fields__)
    return f"{type(self).__name__}({', '.join(shown)})"


METHODS = {
    "__init__": _init, "__setattr__": _setattr, "__delattr__": _delattr, "__eq__": _eq, "__hash__": _hash,
    "__repr__": _repr,
}  # fmt: skip
