"""Which checkpoints go when a new one is there, and whether the disk has room for the next."""

from __future__ import annotations

import errno
import os
import re
import shutil

from launcher.checkpoints import layout

FULL = 1 << 20  # bytes: what a full disk still has
DELETING = ".deleting-"
OURS = re.compile(r"step\d{8,}")
LEFT = re.compile(r"(latest|latest_universal|newest-verified)\.\d+\.tmp")


def retain(directory: str, *, keep: int) -> list[str]:
    """Leave the newest `keep` verified checkpoints and whatever is newer than those; the names of what went.

    With fewer than `keep` verified ones nothing goes, whatever lies beside them.
    """
    found = [tag for tag in layout.scan(directory) if OURS.fullmatch(tag.name) and tag.step is not None]
    verified = [tag for tag in found if tag.health == "verified"]
    if len(verified) < max(1, keep):
        return []
    last = verified[max(1, keep) - 1].step or 0
    gone = [tag.name for tag in found if (tag.step or 0) < last]
    for name in gone:
        remove(directory, name)
    return gone


def remove(directory: str, name: str) -> None:
    """A checkpoint, with what ds_to_universal made of it: first out of sight, so that half of one is never seen."""
    for part in (name, name + "_universal"):
        path = os.path.join(directory, part)
        if os.path.isdir(path) and not os.path.islink(path):
            aside = os.path.join(directory, DELETING + part)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def sweep(directory: str) -> None:
    """At a start, what a process that was killed left behind: deletions half done, pointers half written."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(directory, name)
        if name.startswith(DELETING):
            shutil.rmtree(path, ignore_errors=True)
        elif LEFT.fullmatch(name):
            os.unlink(path)


def free(directory: str) -> int:
    """Bytes that this user can write where `directory` is, or will be."""
    there = os.path.abspath(directory)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    space = os.statvfs(there)
    return space.f_bavail * space.f_frsize


def shortage(directory: str) -> str:
    """Why the next checkpoint has no room, where it is as large as the last; "" when it has."""
    try:
        has = free(directory)
        needed = next((tag.bytes for tag in layout.scan(directory) if tag.usable), 0)
    except OSError as error:
        return f"{directory}: {error.strerror}"
    if has > needed:
        return ""
    return f"{directory} has {has / 1e9:,.3g} GB free, and a checkpoint takes {needed / 1e9:,.3g}"


def is_full(error: BaseException, directory: str) -> bool:
    """Whether a write failed for want of room: torch hides ENOSPC behind errors of its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    behind = error.__context__ or error.__cause__
    if behind is not None and is_full(behind, directory):
        return True
    return isinstance(error, RuntimeError) and free(directory) < FULL
