"""The job file's JSON schema, made from the very types that read it."""

from __future__ import annotations

from typing import Any

from launcher.spec import JobSpec


def job() -> dict[str, Any]:
    from pydantic import TypeAdapter

    schema = TypeAdapter(JobSpec).json_schema()
    _soften(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dslaunch job file", **schema}


def _soften(node: Any) -> None:
    """What the reader also takes: numbers where text is meant, {env: NAME} for any value."""
    if isinstance(node, dict):
        node.pop("title", None) if isinstance(node.get("title"), str) else None
        if node.get("type") == "string":
            node["type"] = ["string", "number", "boolean"]  # 1.10 and true are text where text is asked for
        for child in node.values():
            _soften(child)
    elif isinstance(node, list):
        for child in node:
            _soften(child)
