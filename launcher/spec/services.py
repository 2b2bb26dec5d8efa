"""Services of a job file that cannot stand together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import Path, Problem
from launcher.spec.words import mebibytes

if TYPE_CHECKING:
    from launcher.spec import JobSpec
    from launcher.spec.machines import Service


def problems(spec: JobSpec) -> list[Problem]:
    found: list[Problem] = []
    names = [service.name for service in spec.services]
    for index, service in enumerate(spec.services):
        found += [Problem(p.message, p.hint, ("services", index, *p.at)) for p in _of(service, spec)]
        if service.name in names[:index]:
            message = f"two services are called {service.name}"
            found.append(Problem(message, "each needs a name of its own", ("services", index, "name")))
        strangers = [name for name in service.after if name not in names or name == service.name]
        for name in strangers:
            hint = f"there is {', '.join(other for other in names if other != service.name) or 'no other one'}"
            found.append(Problem(f"after names no other service: {name}", hint, ("services", index, "after")))
    if not found and (circle := _circle({service.name: service.after for service in spec.services})):
        at: Path = ("services", names.index(circle[0]), "after")
        found.append(Problem(f"{' after '.join(circle)}: none of them would start", "take one `after` out", at))
    return found


def _of(service: Service, spec: JobSpec) -> list[Problem]:
    found: list[Problem] = []
    if not service.command or not service.command[0]:
        found.append(Problem("command is an empty list: nothing would run", at=("command",)))
    if service.on != "own" and service.nodes != 1:
        message = f"nodes {service.nodes} are of its own, and `on: {service.on}` puts it beside the ranks"
        found.append(Problem(message, "on: own, or leave nodes out", ("nodes",)))
    if service.on != "own" and service.component:
        message = f"a component has nodes of its own, and `on: {service.on}` puts it beside the ranks"
        found.append(Problem(message, "on: own, or leave component out", ("component",)))
    if service.on != "own" and service.memory:
        message = "beside the ranks it shares their memory: a limit of its own cannot be had"
        found.append(Problem(message, "leave memory out", ("memory",)))
    same = [
        other.name for other in spec.services if other is not service and other.port and other.port == service.port
    ]
    if same and service.on != "own":
        message = f"port {service.port} is {same[0]}'s too, which may run on the same node"
        found.append(Problem(message, "leave port out: a free one is chosen", ("port",)))
    cpus = service.cpus_per_node
    if cpus and cpus % service.tasks_per_node:
        message = f"cpus_per_node {cpus} cannot be shared evenly by {service.tasks_per_node} tasks"
        hint = f"cpus_per_node: {max(1, cpus // service.tasks_per_node) * service.tasks_per_node}"
        found.append(Problem(message, hint, ("cpus_per_node",)))
    if service.component:
        return found
    for key, asked, there in (
        ("gpus_per_node", service.gpus_per_node, spec.resources.gpus_per_node),
        ("cpus_per_node", service.cpus_per_node, spec.resources.cpus_per_node),
        ("memory", _size(service.memory), _size(spec.resources.memory)),
    ):
        if asked and there is not None and asked > there:
            message = f"{key} of the service is more than resources.{key}, which every node of the job has"
            found.append(Problem(message, f"raise resources.{key}, or give the service a component", (key,)))
    return found


def _size(memory: str | None) -> float | None:
    """Mebibytes; None where nothing is said, and for all there is."""
    return None if memory in (None, "0") else mebibytes(memory)


def _circle(after: dict[str, tuple[str, ...]]) -> list[str]:
    """[a, b, a] where a waits for b and b for a; empty where they can be started one by one."""
    done: set[str] = set()
    while ready := [name for name, before in after.items() if name not in done and done.issuperset(before)]:
        done.update(ready)
    left = [name for name in after if name not in done]
    if not left:
        return []
    walked = [left[0]]
    while walked[-1] not in walked[:-1]:
        walked.append(next(name for name in after[walked[-1]] if name not in done))
    return walked[walked.index(walked[-1]) :]
