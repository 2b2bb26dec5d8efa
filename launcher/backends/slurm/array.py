"""A sweep as one array job: each task runs the whole script of its point, in the point's own run directory."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.slurm import script
from launcher.bundle import Bundle, File
from launcher.errors import Problem, UserError
from launcher.plan import Plan

FOLDER = "points"
SHARED = "node/"  # the same for every point, and there once: a point's own `node` leads there

TASK = """\
# One task of the array for each point, whose run directory, points/N, has a script, journal and logs of its own.
cd -- "{folder}/$SLURM_ARRAY_TASK_ID" || exit 69
exec bash {entry}
"""
# Of the whole array Slurm's own number would be: it is its last task's as well.
JOB = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"


def render(plans: Sequence[Plan], *, parallel: int | None = None) -> Bundle:
    """The script of the array, what is the same for all points, and below points/N what is not."""
    _check(plans)
    bundles = [script.render(plan) for plan in plans]
    heads = [_head(bundle.text(bundle.entry)) for bundle in bundles]
    for number, head in enumerate(heads):
        if head != heads[0]:
            asked = sorted({line.removeprefix("#SBATCH ") for line in {*heads[0]} ^ {*head}})
            message = f"point {number} asks Slurm for something else than point 0: {', '.join(asked)}"
            hint = (
                "all tasks of an array get the same: sweep what the program does, and submit the others by themselves"
            )
            raise UserError(Problem(message, hint, ("sweep", "over")))
    limit = f"%{parallel}" if parallel else ""
    lines = [
        "#!/bin/bash",
        "",
        f"#SBATCH --array=0-{len(plans) - 1}{limit}",
        *(f"#SBATCH --output={FOLDER}/%a/logs/slurm-%j.out" if _is_output(line) else line for line in heads[0]),
        "",
        TASK.format(folder=FOLDER, entry=script.ENTRY),
    ]
    shared = {file.path: file for bundle in bundles for file in bundle.files if file.path.startswith(SHARED)}
    own = [
        File(f"{FOLDER}/{number}/{file.path}", _of_task(file.text) if file.path == bundle.entry else file.text)
        for number, bundle in enumerate(bundles)
        for file in bundle.files
        if file.path not in shared
    ]
    return Bundle((File(script.ENTRY, "\n".join(lines)), *shared.values(), *own), script.ENTRY)


def _check(plans: Sequence[Plan]) -> None:
    spec = plans[0].spec
    problems = []
    if any(service.component for service in spec.services):
        message = "a heterogeneous job can be no array: Slurm refuses the two together"
        problems.append(Problem(message, "submit the points one by one, with --set", ("sweep",)))
    if spec.slurm.login:
        message = "a sweep is submitted from the login node itself"
        problems.append(Problem(message, "run dslaunch there, or leave slurm.login out", ("slurm", "login")))
    if problems:
        raise UserError(*problems)


def _of_task(text: str) -> str:
    return text.replace('"$SLURM_JOB_ID"', f'"{JOB}"')


def _head(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("#SBATCH ")]


def _is_output(line: str) -> bool:
    return line.startswith("#SBATCH --output=")
