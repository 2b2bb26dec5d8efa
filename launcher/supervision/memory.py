"""How many processes of ours the kernel killed because a limit on memory was reached."""

from __future__ import annotations

import os
import re

ROOT = "/sys/fs/cgroup"
OURS = re.compile(r"(job|step|task)_|kubepods|pod|docker|user$")  # levels above our own that hold nobody else


def files(groups: str, root: str = ROOT) -> list[str]:
    """Where the kernel counts, from /proc/self/cgroup: our group and those above it that are the job's.

    "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0" names three levels of a job.
    """
    found = []
    for row in groups.splitlines():
        _, controllers, path = row.split(":", 2)
        if not controllers:
            base, name = root, "memory.events"
        elif "memory" in controllers.split(","):
            base, name = os.path.join(root, "memory"), "memory.oom_control"
        else:
            continue
        parts = path.strip("/").split("/") if path.strip("/") else []
        while True:
            found.append(os.path.join(base, *parts, name))
            if not parts or not OURS.match(parts[-1]):
                break
            parts = parts[:-1]
        if not os.path.exists(found[0]):  # in a container our group is the root of what is mounted
            found.append(os.path.join(base, name))
    return list(dict.fromkeys(found))


def killed(text: str) -> int | None:
    """ "low 0\\nhigh 0\\nmax 12\\noom 1\\noom_kill 1\\n" is 1; None where an old kernel does not count."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def count(root: str = ROOT) -> dict[str, int]:
    """Per file; what grew in between is ours."""
    counted = {}
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            groups = file.read()
    except OSError:
        return {}
    for path in files(groups, root):
        try:
            with open(path, encoding="ascii") as file:
                value = killed(file.read())
        except (OSError, ValueError):
            continue
        if value is not None:
            counted[path] = value
    return counted


def grown(before: dict[str, int], after: dict[str, int]) -> int | None:
    """None where nothing counts, which is not 0."""
    return max((after[path] - before.get(path, after[path]) for path in after), default=None)
