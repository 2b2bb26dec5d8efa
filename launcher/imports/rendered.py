"""Scripts that dslaunch rendered, back to job files: job.json beside them is the job as it was asked for.

Whatever a person changed in the #SBATCH lines since is carried over; other files are compared, and named if changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher import shell, spec
from launcher.bundle import ASKED
from launcher.errors import Path, Problem, UserError
from launcher.imports import Imported, Note
from launcher.imports.options import TEXT
from launcher.spec.given import plain

OURS = re.compile(r"^run=\$PWD  # the run directory: sbatch --chdir$|^# One task of the array for each point\b", re.M)
Beside = Callable[[str], "str | None"]  # the text of a file beside the script


def ours(text: str) -> bool:
    return bool(OURS.search(text))


def read(text: str, *, name: str, beside: Beside) -> Imported:
    """The job of a script that dslaunch rendered. Raises UserError where its job.json is not there."""
    told = beside(ASKED)
    job = json.loads(told) if told else _sweep(beside, text)
    if job is None:
        message = f"dslaunch rendered this script, and the {ASKED} that lies beside it in a run directory is missing"
        raise UserError(Problem(message, "import it where it was rendered, or use its job.yaml", where=name))
    notes = [Note("carried", f"rendered by dslaunch: the job stands in {ASKED}")]
    notes += _edited(text, job)
    return Imported(job, tuple(notes), {})


def _sweep(beside: Beside, text: str) -> dict[str, Any] | None:
    """A sweep's points, each with a job of its own: what differs between them is what it goes over."""
    points: list[dict[str, Any]] = []
    while told := beside(f"points/{len(points)}/{ASKED}"):
        points.append(json.loads(told))
    if not points:
        return None
    job = points[0]
    paths = dict.fromkeys(path for point in points for path, _ in _leaves(point))
    specs = [spec.load(json.dumps(point), name=ASKED).spec for point in points]
    values = {path: [_value(one, path) for one in specs] for path in paths}
    over = {".".join(map(str, path)): row for path, row in values.items() if len(set(map(json.dumps, row))) > 1}
    parallel = re.search(r"^#SBATCH --array=\S*%([0-9]+)", text, re.M)
    job["sweep"] = {"over": over, "how": "zip", **({"parallel": int(parallel[1])} if parallel else {})}
    return job


def _leaves(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        return [row for key, child in value.items() for row in _leaves(child, (*path, key))]
    return [(path, value)]


def _value(section: Any, path: Path) -> Any:
    """Of a job as it was read, defaults included."""
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else getattr(section, str(key), None)
    return plain(section)


def _edited(text: str, job: dict[str, Any]) -> list[Note]:
    """#SBATCH lines that the job does not say: somebody wrote them since."""
    slurm = job.get("slurm", {})
    notes = []
    for one in shell.read(text, "").directives:
        if one.option == "hetjob":  # what follows is of a service's nodes
            break
        key = TEXT.get(one.option)
        if key is None or key == "comment" or one.value is None:
            continue
        said = slurm.get(key, "1:00:00" if key == "time" else None)
        if said is None or str(said) != one.value:
            job.setdefault("slurm", {})[key] = one.value
            notes.append(Note("carried", f"{one.text}, written since -> slurm.{key}", one.line))
    return notes
