"""`record` is `dataclass(frozen=True)` to whoever uses it."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.record import record


@record
class Point:
    x: int
    y: int = 2
    tags: list[str] = dataclasses.field(default_factory=list)


@record
class Named(Point):
    name: str = ""

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Plain:
    x: int
    y: int = 2


def test_it_is_made_as_a_dataclass_is():
    assert (Point(1).x, Point(1).y, Point(1).tags) == (1, 2, [])
    assert Point(1, 3) == Point(x=1, y=3) == dataclasses.replace(Point(1), y=3)
    assert Point(1).tags is not Point(1).tags
    assert Named(1, name="a") == Named(1, 2, [], "a")
    assert dataclasses.asdict(Point(1)) == {"x": 1, "y": 2, "tags": []}


@pytest.mark.parametrize("wrong", [(), (1, 2, [], 4), {"z": 1}, {"x": 1, "z": 1}])
def test_what_a_dataclass_refuses_it_refuses(wrong):
    given, named = ((), wrong) if isinstance(wrong, dict) else (wrong, {})
    for kind in (Point, Plain):
        with pytest.raises(TypeError):
            kind(*given, **named)


@pytest.mark.parametrize("kind", [Point, Plain])
def test_it_is_frozen(kind):
    one = kind(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.x
    assert one == kind(1)


def test_it_compares_hashes_and_prints():
    assert Point(1) != Point(2)
    assert Point(1) != Named(1)
    assert Point(1) != (1, 2, [])
    assert len({Plain(1), Plain(1)}) == len({Named(1, tags=(), name="a"), Named(1, tags=(), name="a")}) == 1
    assert repr(Point(1)) == "Point(x=1, y=2, tags=[])"
    assert repr(Named(1, name="own")) == "own"
