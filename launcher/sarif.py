"""Lint reports as SARIF 2.1.0, for code scanning in CI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from launcher import __version__
from launcher.lint import Report, Result, rows
from launcher.plan.rules import Row

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def log(reports: Iterable[Report]) -> dict[str, Any]:
    """One run; its rules are those that were found, in the order of their ids."""
    results = [result for report in reports for result in report.results]
    found = sorted({result.rule for result in results})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "dslaunch",
                        "version": __version__,
                        "rules": [_rule(rows()[rule]) for rule in found],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(result, found.index(result.rule)) for result in results],
            }
        ],
    }


def _rule(row: Row) -> dict[str, Any]:
    text = "\n\n".join(part for part in (row.why, row.fix and f"Instead: {row.fix}", f"Source: {row.source}") if part)
    return {
        "id": row.id,
        "name": "".join(part.capitalize() for part in row.name.split("-")),
        "shortDescription": {"text": row.title},
        "fullDescription": {"text": row.why},
        "help": {"text": text},
        "defaultConfiguration": {"level": row.severity},
    }


def _result(result: Result, index: int) -> dict[str, Any]:
    said = f"{result.message}. Try: {result.fix}" if result.fix else result.message
    scheme = "file://" if result.file.startswith("/") else ""
    place: dict[str, Any] = {"artifactLocation": {"uri": scheme + quote(result.file, safe="/~._-")}}
    if result.line:
        place["region"] = {
            "startLine": result.line,
            "startColumn": result.column,
            "endLine": result.end_line,
            "endColumn": result.end_column,
        }
    return {
        "ruleId": result.rule,
        "ruleIndex": index,
        "level": result.severity,
        "message": {"text": said},
        "locations": [{"physicalLocation": place}],
    }
