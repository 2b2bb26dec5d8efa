"""Files that name nodes: `slurm.nodefile` and `slurm.exclude_file`, read where the job file is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher import hostfile, yamldoc
from launcher.errors import Problem, UserError
from launcher.spec import Document

FIELDS = {"nodefile": "nodelist", "exclude_file": "exclude"}


def names(text: str, *, source: str) -> tuple[str, ...]:
    """Names or ranges, one or several a line: "gpu[1-2]\\ngpu9  # broken fan" is gpu1, gpu2, gpu9."""
    found: dict[str, None] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.partition("#")[0].split():
            try:
                found |= dict.fromkeys(hostfile.expand(word.strip(",")))
            except UserError as error:
                problems += [Problem(p.message, p.hint, where=f"{source}:{number}") for p in error.problems]
    if problems:
        raise UserError(*problems)
    return tuple(found)


def read(document: Document, *, base: Path) -> Document:
    """The document with the lists themselves in the place of the files that hold them."""
    slurm = document.spec.slurm
    given = {field: str(path) for field in FIELDS if (path := getattr(slurm, field))}
    lists: dict[str, str] = {}
    problems: list[Problem] = []
    root = document.root
    for field, path in given.items():
        at = ("slurm", field)
        if field == "nodefile" and slurm.nodelist:
            problems.append(Problem("nodelist and nodefile both name the nodes", "keep one", at))
            continue
        try:
            text = yamldoc.decode(yamldoc.read_bytes(str(base / path)), name=path)
        except UserError as error:
            problems += [Problem(p.message, p.hint, at) for p in error.problems]
            continue
        try:
            found = names(text, source=path)
        except UserError as error:
            problems += error.problems
            continue
        if field == "exclude_file" and slurm.exclude:
            found = (*hostfile.expand(slurm.exclude), *found)
        if field == "nodefile" and not found:
            problems.append(Problem(f"{path} names no node", "one a line", at))
        lists[FIELDS[field]] = hostfile.fold(found)
        mark = yamldoc.place(document.root, at)
        entries: dict[str, yamldoc.Node] = {
            FIELDS[field]: yamldoc.Scalar(lists[FIELDS[field]], False, mark),
            field: yamldoc.Scalar("null", True, mark),
        }
        inside = yamldoc.Table(entries, dict.fromkeys(entries, mark), mark)
        root = yamldoc.merge(root, yamldoc.Table({"slurm": inside}, {"slurm": mark}, mark))
    if problems:
        raise UserError(*map(document.place, problems))
    changed = replace(
        slurm,
        nodefile=None,
        exclude_file=None,
        nodelist=lists.get("nodelist", slurm.nodelist),
        exclude=lists.get("exclude") or slurm.exclude,
    )
    return replace(document, spec=replace(document.spec, slurm=changed), root=root)
