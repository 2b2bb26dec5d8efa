"""A job as it was asked for: what stands in it beyond the defaults, as plain values that make the same job again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from launcher.spec.words import written


def given(section: Any) -> dict[str, Any]:
    """JobSpec(name="a", train=Train(steps=5)) is {"name": "a", "train": {"steps": 5}}."""
    found: dict[str, Any] = {}
    for row in fields(section):
        value = getattr(section, row.name)
        default = row.default_factory() if row.default_factory is not MISSING else row.default
        if default is MISSING or value != default or type(value) is not type(default):
            found[row.name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """A section is its dict, a tuple a list."""
    if is_dataclass(value) and not isinstance(value, type):
        return given(value)
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return written(value) if isinstance(value, str) else value
