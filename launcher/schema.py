"""The job file's JSON schema, made from the very types that read it."""

from __future__ import annotations

from typing import Any, get_args

from launcher.spec import JobSpec
from launcher.spec.words import OF_NODE, OF_SERVICES, VARIABLES, Text

NESTED = ("FromEnvironment", "FromPaths", "FromJob")
AROUND = {
    side: {"anyOf": [{"type": ["string", "number", "boolean"]}, *({"$ref": f"#/$defs/{name}"} for name in NESTED)]}
    for side in ("prepend", "append")
}
FROM_JOB = {
    "type": "object",
    "description": "what a job knows only while it runs, and what stands around it",
    "properties": {
        "job": {"enum": list(VARIABLES["job"])},
        "node": {
            "anyOf": [{"enum": list(VARIABLES["node"])}, {"type": "string", "pattern": rf"^({OF_NODE.pattern})$"}]
        },
        **{key: {"type": "string", "description": f"the {key} of a service"} for key in OF_SERVICES},
        **AROUND,
    },
    "anyOf": [{"required": [key]} for key in (*VARIABLES, *OF_SERVICES)],
    "additionalProperties": False,
}
FROM_ENVIRONMENT = {
    "type": "object",
    "description": "the text of a variable where dslaunch runs, and what follows it",
    "properties": {"env": {"type": "string"}, **AROUND},
    "required": ["env"],
    "additionalProperties": False,
}
FROM_PATHS = {
    "type": "object",
    "description": "one of the job's `paths`, and what follows it",
    "properties": {"path": {"type": "string"}, **AROUND},
    "required": ["path"],
    "additionalProperties": False,
}
TEXT = get_args(Text)[1].__get_pydantic_json_schema__({}, dict)["pattern"]  # the fields that take it
SCALARS = ("string", "number", "integer", "boolean")


def job() -> dict[str, Any]:
    from pydantic import TypeAdapter

    schema = _soften(TypeAdapter(JobSpec).json_schema())
    schema["$defs"]["FromEnvironment"] = FROM_ENVIRONMENT
    schema["$defs"]["FromPaths"] = FROM_PATHS
    schema["$defs"]["FromJob"] = FROM_JOB
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dslaunch job file", **schema}


def _soften(node: dict[str, Any]) -> dict[str, Any]:
    """What the reader also takes: numbers where text is meant, blanks, {env: NAME} for any one value."""
    node = {key: value for key, value in node.items() if key != "title"}
    for key in ("$defs", "properties", "patternProperties"):
        if key in node:
            node[key] = {name: _soften(child) for name, child in node[key].items()}
    if "properties" in node:
        required = node.get("required", [])
        node["properties"] = {
            name: _blank(v) if name not in required else v for name, v in node["properties"].items()
        }
    if "patternProperties" in node:
        node.setdefault("additionalProperties", False)
    if isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = _soften(node["additionalProperties"])
    if "items" in node:
        node["items"] = _soften(node["items"])
    if "anyOf" in node:
        choices = [choice for child in node["anyOf"] for choice in _soften(child).pop("anyOf", [_soften(child)])]
        node["anyOf"] = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    if node.get("type") in SCALARS or "const" in node:
        if node.get("type") == "string" and "enum" not in node and "const" not in node:
            node["type"] = ["string", "number", "boolean"]  # 1.10 and true are text where text is asked for
        kept: dict[str, Any] = {key: node.pop(key) for key in ("description", "default") if key in node}
        names = ["FromEnvironment", "FromPaths", *(["FromJob"] if node.get("pattern") == TEXT else [])]
        return {"anyOf": [node, *({"$ref": f"#/$defs/{name}"} for name in names)], **kept}
    return node


def _blank(node: dict[str, Any]) -> dict[str, Any]:
    """`steps: null` means the default; a schema cannot tell it from nothing behind the colon, which is refused."""
    kept: dict[str, Any] = {key: node[key] for key in ("description", "default") if key in node}
    rest = {key: value for key, value in node.items() if key not in kept}
    choices = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    nothing = [] if {"type": "null"} in choices else [{"type": "null"}]
    return {"anyOf": [*choices, *nothing], **kept} if rest else node
