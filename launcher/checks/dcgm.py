"""NVIDIA's own diagnosis, level 2, for nodes under suspicion: 2.5 to 10.5 minutes, with the GPUs to itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import Finding, Level, Setting, nvidia

STAGE = "deep"

SECONDS = 900.0  # level 2 takes 2.5 to 10.5 minutes by machine (AWS's table of DCGM run times)
SOURCE = "dcgmi diag -r 2"
# DCGM's severity of an error (dcgm_errors.h): 1 monitor, 2 isolate, 3 unknown, 4 triage, 5 configuration, 6 reset.
SEVERITY: dict[int, Level] = {1: "warn", 2: "exclude", 3: "warn", 4: "warn", 5: "warn", 6: "exclude"}
RANK: dict[Level, int] = {"note": 0, "unknown": 1, "warn": 2, "exclude": 3, "block": 4}
FIXES = {
    "exclude": "drain the node, reset the GPU and run dcgmi diag -r 3; replace it when that fails too",
    "warn": "set the node up as DCGM asks, or watch it",
}
PASS, FAIL, WARN, SKIP = ("pass", "passed"), ("fail", "failed"), ("warn", "warning"), ("skip", "skipped")


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    if not setting.gpus:
        return {"skipped": "a CPU job"}
    found = nvidia.query(probe) if nvidia.named(os.environ) else {}
    mine = ["-i", ",".join(str(gpu["index"]) for gpu in found["gpus"])] if found.get("others") else []
    answer = probe.run(["dcgmi", "diag", "-r", "2", "-j", *mine], timeout=SECONDS)
    if answer.code is None:
        if "did not answer" in answer.err:
            return {"unknown": answer.err, "timeout": SECONDS}
        return {"skipped": "dcgmi is not installed"}
    return parse(answer.out, answer.err)


def parse(text: str, err: str = "") -> dict[str, Any]:
    """{"tests": [{"name", "gpu", "status", "says", "severity"}]}; DCGM 3 counts in gpu_ids, DCGM 4 in entities."""
    start = text.find("{")  # lines of warning may come first
    try:
        value = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        said = (err.strip() or text.strip() or "nothing").splitlines()[0]
        return {"unknown": f"dcgmi diag gave no JSON: {said}"}
    root = value.get("DCGM Diagnostic") or value.get("DCGM GPU Diagnostic") or value
    if not isinstance(root, dict) or not isinstance(root.get("test_categories"), list):
        said = str(root.get("runtime_error") or root.get("warning") or "") if isinstance(root, dict) else ""
        return {"unknown": f"dcgmi diag did not run: {said}" if said else "dcgmi diag answered in a layout not known"}
    tests = [
        row
        for category in root["test_categories"]
        for test in (category or {}).get("tests") or []
        if test
        for row in _results(test)
    ]
    return {"tests": tests} if tests else {"unknown": "dcgmi diag named no test"}


def _results(test: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for result in test.get("results") or [test.get("test_summary") or {}]:
        warnings = result.get("warnings") or []
        if isinstance(warnings, str):
            warnings = [warnings]
        words = [one if isinstance(one, str) else str(one.get("warning", "")) for one in warnings]
        severities = [one["error_severity"] for one in warnings if isinstance(one, dict) and "error_severity" in one]
        place = str(result.get("gpu_ids", result.get("entity_id", "")))
        if result.get("entity_group", "GPU") != "GPU":
            place = f"{result['entity_group']} {place}"
        yield {
            "name": str(test.get("name", "?")), "gpu": place, "status": str(result.get("status", "")).lower(),
            "says": "; ".join(filter(None, words)), "severities": severities,
        }  # fmt: skip


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    return [
        *unknowns("dcgm", found),
        *(finding for node, value in seen(found).items() for finding in _node(node, value["tests"])),
    ]


def _node(node: str, tests: list[Mapping[str, Any]]) -> Iterator[Finding]:
    for test in tests:
        place = f"GPU {test['gpu']}: " if test["gpu"].replace(",", "").isdigit() else f"{test['gpu']}: "
        if test["status"] in FAIL:
            levels = [SEVERITY.get(one, "warn") for one in test["severities"]]
            level: Level = max(levels, key=RANK.__getitem__) if levels else "exclude"
            yield Finding(
                "dcgm", level, f"{place if test['gpu'] else ''}DCGM's test {test['name']} fails", node=node,
                measured=test["says"][:200] or "fail", expected="pass", source=SOURCE, fix=FIXES[level],
            )  # fmt: skip
        elif test["status"] in WARN:
            yield Finding(
                "dcgm", "warn", f"{place if test['gpu'] else ''}DCGM's test {test['name']} warns", node=node,
                measured=test["says"][:200] or "warn", expected="pass", source=SOURCE, fix=FIXES["warn"],
            )  # fmt: skip
        elif test["status"] not in (*PASS, *SKIP):
            yield Finding(
                "dcgm", "unknown", f"DCGM's test {test['name']}: {test['status'] or 'no status'}", node=node
            )
    if not any(test["status"] in (*PASS, *FAIL, *WARN) for test in tests):
        yield Finding("dcgm", "unknown", "DCGM skipped every test", node=node)


def facts(value: Mapping[str, Any]) -> dict[str, Any]:
    if "tests" not in value:
        return {}
    passed = sum(test["status"] in PASS for test in value["tests"])
    return {"DCGM level 2": f"{passed} of {len(value['tests'])} results pass"}
