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
    rows = made.__dataclass_fields__.values()  # type: ignore[attr-defined]
    made.__layout__ = (  # type: ignore[attr-defined]
        {row.name: None if row.default is MISSING else row.default for row in rows},  # all of them, in their order
        {row.name for row in rows if row.default is MISSING and row.default_factory is MISSING},
        [(row.name, row.default_factory) for row in rows if row.default_factory is not MISSING],
    )
    return made


def _init(self: Any, *given: Any, **values: Any) -> None:
    """Every field as given, or its default. Raises TypeError for one too many, and for one that is missing."""
    empty, needed, factories = type(self).__layout__
    if given:
        values = {**dict(zip(empty, given, strict=False)), **values}
    own = self.__dict__
    own.update(empty)
    own.update(values)
    if len(given) > len(empty) or len(own) != len(empty):
        strange = ", ".join(values.keys() - empty.keys()) or f"number {len(given)}"
        raise TypeError(f"{type(self).__name__} has no field {strange}")
    if not needed <= values.keys():
        missing = ", ".join(name for name in empty if name in needed - values.keys())
        raise TypeError(f"{type(self).__name__} needs {missing}")
    for name, factory in factories:
        if name not in values:
            own[name] = factory()


def _setattr(self: Any, name: str, _: Any) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _eq(self: Any, other: object) -> bool:
    return self is other or (type(other) is type(self) and self.__dict__ == other.__dict__)


def _hash(self: Any) -> int:
    return hash((type(self), *self.__dict__.values()))


def _repr(self: Any) -> str:
    shown = (f"{name}={value!r}" for name, value in self.__dict__.items())
    return f"{type(self).__name__}({', '.join(shown)})"


METHODS = {
    "__init__": _init, "__setattr__": _setattr, "__delattr__": _delattr, "__eq__": _eq, "__hash__": _hash,
    "__repr__": _repr,
}  # fmt: skip
