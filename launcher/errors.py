"""What the user can mend, said so that it can be mended."""

from __future__ import annotations

import errno
from dataclasses import dataclass

Path = tuple[str | int, ...]
# What a disk says that is full, gone, or not ours.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong (with the numbers), what would work, and where it stands.

    `at` is a path into the job file, ("train", "global_batch"); the edge turns it into
    `where`, "job.yaml:6:3". Code that already knows the place fills `where` itself.
    """

    message: str
    hint: str = ""
    at: Path = ()
    where: str = ""

    def __str__(self) -> str:
        place = self.where or ".".join(str(part) for part in self.at)
        return (f"{place}: " if place else "") + self.message


class UserError(Exception):
    """Everything found wrong, at once. Whatever else escapes is a bug and keeps its traceback."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class Unreachable(UserError):
    """The scheduler gave no answer: the job may be alive. Exit code 8."""
