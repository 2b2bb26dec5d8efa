"""A verdict for a preflight that came to none: the first node, which judges, did not start or went away.

`python3 lost.py DIR node1 node2 ...` reads what nodes left in DIR when they failed before their agent ran, and
writes code, exclude and verdict.json there. It runs on the batch host, before any environment is loaded: Python 3.6
has to read it.
"""

import json
import os
import sys
from typing import Dict, List

TOO_FEW, COULD_NOT = 20, 30


def reasons(folder: str, nodes: List[str]) -> Dict[str, str]:
    found = {}
    for node in nodes:
        try:
            with open(os.path.join(folder, "failed-" + node), encoding="utf-8", errors="replace") as file:
                found[node] = file.read().strip() or "it failed before its agent ran"
        except OSError:
            continue
    return found


def main(arguments: List[str]) -> int:
    folder, nodes = arguments[0], arguments[1:]
    failed = reasons(folder, nodes)
    some = bool(failed) and len(failed) < len(nodes)  # where all fail it is what they share
    code = TOO_FEW if some else COULD_NOT
    first = "; ".join("%s: %s" % row for row in list(failed.items())[:3])
    what = first or "the preflight gave no verdict: %s, which judges, hangs or went away" % nodes[0]
    findings = [
        {"check": "join", "level": "exclude" if some else "unknown", "what": why, "node": node, "code": 21}
        for node, why in failed.items()
    ]
    findings.append({"check": "coordinator", "level": "block", "what": what, "code": code})
    verdict = {
        "code": code,
        "headline": "nothing starts: " + what,
        "train": [],
        "excluded": list(failed) if some else [],
        "findings": findings,
        "nodes": nodes,
    }
    for name, text in (
        ("exclude", "".join(node + "\n" for node in verdict["excluded"])),  # type: ignore[attr-defined]
        ("verdict.json", json.dumps(verdict) + "\n"),
        ("code", "%d\n" % code),
    ):
        draft = os.path.join(folder, name + ".draft")
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, os.path.join(folder, name))
    print("dslaunch preflight: %s (exit code %d)" % (verdict["headline"], code), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
