"""How well the failure table does on logs of projects that it was not written from: `make signatures`.

    python tests/signatures.py [FOLDER]    each has *.log and a labels.tsv: file, cause, others, layer, provenance

Leave one project out: a signature says in `source` where its format comes from, `org/name#12` for a report and
`org/name path` for a file. Before the logs of a project are judged, the signatures that come from that project alone
are taken out, so that none was written from what it is asked about. Where the log was reported as an issue, what the
software's own source files say stays: launcher/launch.py was read, and not the report.
DSLAUNCH_LOGS names a further folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import diagnoses
from launcher.diagnose import Diagnosis, Evidence, Signature, explain, match, tables

OURS = Path(__file__).parent / "data" / "logs"
HOSTS = ("n0", "n1")  # a job of two nodes, of which the log is the second's


@dataclass(frozen=True)
class Log:
    path: Path
    cause: str
    layer: str
    project: str
    reported: bool  # as an issue


def labelled(folder: Path) -> Iterator[Log]:
    rows = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()
    columns = rows[0].split("\t")
    for row in rows[1:]:
        cells = dict(zip(columns, row.split("\t"), strict=False))
        if row.startswith("#") or not row.strip():
            continue
        place = cells.get("provenance", "").split(":")[0]
        project = place.split("#")[0].strip()
        yield Log(folder / cells["file"], cells["cause"], cells.get("layer", ""), project, "#" in place)


def without(log: Log, signatures: tuple[Signature, ...]) -> tuple[Signature, ...]:
    """The table as somebody would have it who never saw the log's project."""

    def own(place: str) -> bool:
        same = re.split(r"[#: ]", place)[0].lower() == log.project.lower()
        return same and ("#" in place or not log.reported)

    def stays(row: Signature) -> bool:
        places = [one.strip() for one in re.split(r"[,;]", row.source) if one.strip()]
        return not places or not all(map(own, places))

    return tuple(row for row in signatures if stays(row)) if log.project else signatures


def judged(log: Log, signatures: tuple[Signature, ...]) -> Diagnosis:
    """The log as one of a job on two nodes; it is the second node's."""
    text = log.path.read_text(encoding="utf-8", errors="replace")
    return explain.explain(match.read_text(text, signatures, file="node-0001.log"), Evidence(hosts=HOSTS))


def main(folders: list[str]) -> int:
    causes, signatures = tables.read()
    places = [Path(one) for one in folders] or [OURS]
    places += [Path(os.environ["DSLAUNCH_LOGS"])] if os.environ.get("DSLAUNCH_LOGS") else []
    logs = [log for place in places if (place / "labels.tsv").exists() for log in labelled(place)]
    if not logs:
        print("no labels.tsv in " + ", ".join(map(str, places)), file=sys.stderr)
        return 2
    right = out = whole = excluded = quiet = healthy = 0
    by: dict[str, list[int]] = {}
    wrong = []
    for log in logs:
        left = without(log, signatures)
        made = judged(log, left)
        said = diagnoses.causes(made)[0]
        good = said == log.cause
        whole += diagnoses.causes(judged(log, signatures))[0] == log.cause
        row = by.setdefault(log.project or "-", [0, 0, len(signatures) - len(left)])
        row[0] += good
        row[1] += 1
        right += good
        if not good:
            wrong.append(f"  {log.path.name}: {log.cause}, said {said}")
        fault = causes.get(log.cause)
        if log.layer == "app" or (fault is not None and fault.layer == "app"):
            out += 1
            excluded += bool(made.exclude)
        if log.cause == "none":
            healthy += 1
            quiet += made.root is None and not made.others
    for project, (good_ones, count, taken) in sorted(by.items()):
        print(f"{good_ones:4} of {count:<4} {project}" + (f"   ({taken} signatures taken out)" if taken else ""))
    print("\n".join(wrong))
    print(f"{len(signatures)} signatures, {len({row.cause for row in signatures})} causes, {len(by)} projects")
    print(f"leave one project out: {right} of {len(logs)} right, {right / len(logs):.1%}")
    print(f"with the whole table:  {whole} of {len(logs)} right, {whole / len(logs):.1%}")
    print(f"healthy nodes excluded on application errors: {excluded} of {out}")
    print(f"healthy logs without a finding: {quiet} of {healthy}")
    lines = [path for path in sorted(OURS.glob("healthy*")) if path.is_file()]
    texts = [line for path in lines for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    noise = [line for line in texts if match.read_text(line, signatures).hits]
    print(f"healthy lines without a finding: {len(texts) - len(noise)} of {len(texts)}")
    return 1 if excluded or noise else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
