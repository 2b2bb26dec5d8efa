"""Torch's flight recorder: which rank did not arrive at a collective where the others wait.

A dump is a pickle, or JSON; a pickle is a program, so only plain containers and numbers are let through. NCCL marks
what is over as `completed`. Gloo does not: there the entry is `retired`, which torch 2.13's JSON says of every entry,
and `pg_status` knows the last one that was completed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.diagnose import Hang

LARGEST = 256 << 20  # bytes of a dump; 2,000 entries with 30 frames each are about 10 MB
# Collectives that all ranks call with the same sizes; others may be uneven.
EVEN = frozenset(("ALLREDUCE", "BROADCAST", "REDUCE", "ALLREDUCECOALESCED", "BARRIER"))


class Refused(Exception):
    """A dump that is none, or that wants more than plain values."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise Refused(f"it wants to load {module}.{name}: a flight recorder's dump has plain values only")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to something outside of the file")


def load(data: bytes) -> dict[str, Any]:
    """The values of one dump, JSON or pickle; nothing in it is executed."""
    try:
        value = json.loads(data) if data[:1] == b"{" else _Plain(io.BytesIO(data)).load()
    except Refused:
        raise
    except Exception as error:  # a cut or foreign file fails in many ways inside of the unpickler
        raise Refused(f"not a flight recorder's dump: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("entries"), list):
        raise Refused("not a flight recorder's dump: no entries")
    return value


def read(folder: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Dumps in a folder by rank, which is the number that a file's name ends with, and what was refused."""
    dumps: dict[int, dict[str, Any]] = {}
    notes = []
    for name in sorted(os.listdir(folder)):
        ends = re.search(r"(\d+)(?:\.(?:json|pkl|pickle))?$", name)
        path = os.path.join(folder, name)
        if not ends or not os.path.isfile(path):
            continue
        try:
            if os.path.getsize(path) > LARGEST:
                raise Refused(f"larger than {LARGEST >> 20} MiB")
            with open(path, "rb") as stream:
                dumps[int(ends[1])] = load(stream.read())
        except (Refused, OSError) as error:
            notes.append(f"{name}: {error}")
    return dumps, notes


@dataclass(frozen=True)
class Call:
    """A collective as one rank recorded it."""

    number: int
    operation: str  # ALLREDUCE
    sizes: str
    over: bool
    place: str  # "train.py:31"

    @property
    def name(self) -> str:
        return f"{self.operation} #{self.number}"


@dataclass(frozen=True)
class Group:
    """A process group: what each member recorded."""

    name: str
    members: tuple[int, ...]
    calls: Mapping[int, Mapping[int, Call]]  # rank -> number -> call

    def waiting(self, rank: int) -> Call | None:
        """The oldest collective that the rank has called and that is not over."""
        pending = [call for call in self.calls.get(rank, {}).values() if not call.over]
        return min(pending, key=lambda call: call.number, default=None)

    def reached(self, rank: int) -> int:
        return max(self.calls.get(rank, {}), default=0)


def _over(entry: Mapping[str, Any], status: Any) -> bool:
    if entry.get("state") == "completed" or not entry.get("retired"):
        return bool(entry.get("state") == "completed")
    own = status.get(str(entry.get("pg_id"))) if isinstance(status, Mapping) else None
    last = own.get("last_completed_collective") if isinstance(own, Mapping) else None
    return last is None or int(entry.get("collective_seq_id") or 0) <= int(last)


def _call(entry: Mapping[str, Any], status: Any) -> Call:
    operation = str(entry.get("profiling_name", "")).split(":")[-1].split()[0:1]
    name = (operation[0] if operation else "?").replace("_", "").upper()
    frames = [one for one in entry.get("frames") or [] if isinstance(one, Mapping)]
    own = [one for one in frames if not re.search(r"(?:site|dist)-packages|/torch/", str(one.get("filename")))]
    place = f"{own[0].get('filename')}:{own[0].get('line')}" if own else ""
    sizes = json.dumps([entry.get("input_sizes"), entry.get("input_dtypes")])
    return Call(int(entry.get("collective_seq_id") or 0), name, sizes, _over(entry, status), place)


def groups(dumps: Mapping[int, Mapping[str, Any]]) -> list[Group]:
    """Process groups over all dumps; point-to-point calls are left out."""
    members: dict[str, set[int]] = {}
    calls: dict[str, dict[int, dict[int, Call]]] = {}
    for rank, dump in dumps.items():
        configured = dump.get("pg_config")
        for name, row in configured.items() if isinstance(configured, Mapping) else ():
            ranks = re.findall(r"\d+", str(row.get("ranks", ""))) if isinstance(row, Mapping) else []
            members.setdefault(str(name), set()).update(map(int, ranks))
        for entry in dump["entries"]:
            if not isinstance(entry, Mapping) or entry.get("is_p2p"):
                continue
            group = entry.get("process_group") or [entry.get("pg_name", "0")]
            call = _call(entry, dump.get("pg_status"))
            calls.setdefault(str(group[0]), {}).setdefault(rank, {})[call.number] = call
    found = []
    for name, by in sorted(calls.items()):
        # Gloo's default group is called "" in the configuration and "0" in the entries.
        known = members.get(name) or (members.get("") if name == "0" else None) or set()
        found.append(Group(name, tuple(sorted(known | set(by))), by))
    return found


def verdict(
    dumps: Mapping[int, Mapping[str, Any]],
    hang: Hang,
    *,
    hosts: Mapping[int, str],
    alive: Iterable[int] | None = None,
) -> Hang:
    """`hang` with ranks, hosts, collective and kind filled in from the dumps of all ranks.

    Ranks 0, 2, 3 wait in ALLREDUCE #12 and rank 1 has not called it: rank 1 is the laggard. `hosts` names the host
    of every rank of the job; `alive` the ranks known to live, for those that left no dump.
    """
    made = groups(dumps)
    waiting = {rank for group in made for rank in group.members if group.waiting(rank)}
    best: tuple[int, Hang] | None = None
    for group in made:
        found = _judged(group, hang, hosts, dumps, set(alive) if alive is not None else None)
        if found is None:
            continue
        # Who is late here because of a wait elsewhere is not the cause.
        blocked = found.kind == "laggard" and set(found.ranks) <= waiting
        weight = {"desync": 0, "dead": 1, "laggard": 2, "all wait": 4}.get(found.kind, 5) + (3 if blocked else 0)
        if best is None or weight < best[0]:
            best = (weight, found)
    return best[1] if best else hang


def _judged(
    group: Group, hang: Hang, hosts: Mapping[int, str], dumps: Mapping[int, Any], alive: set[int] | None
) -> Hang | None:
    waits = {rank: call for rank in group.members for call in [group.waiting(rank)] if call}
    if not waits or len(group.members) < 2:
        return None
    number = max(call.number for call in waits.values())
    here = {rank: group.calls[rank][number] for rank in group.calls if number in group.calls[rank]}
    told = next(iter(here.values()))
    odd = _odd(here)
    if odd:
        own, others = here[odd[0]], next(call for rank, call in here.items() if rank not in odd)
        why = f"{_ranks(odd)} called {own.name}{_at(own)} where others called {others.name}{_at(others)}"
        return replace(hang, kind="desync", ranks=odd, hosts=(), collective=others.name, why=why)
    late = tuple(rank for rank in group.members if group.reached(rank) < number)
    if not late:
        why = f"all {len(group.members)} ranks of the group wait in it: the network or a GPU holds it up"
        return replace(hang, kind="all wait", ranks=(), hosts=(), collective=told.name, why=why)
    silent = tuple(rank for rank in late if rank not in dumps)
    names = tuple(dict.fromkeys(hosts[rank] for rank in late if rank in hosts))
    if silent == late and (alive is None or not set(late) & alive):
        why = f"{_ranks(late)} left no record: dead, or on a host that is"
        return replace(hang, kind="dead", ranks=late, hosts=names, collective=told.name, why=why)
    why = f"{len(here)} ranks wait for {_ranks(late)}"
    last = group.calls.get(late[0], {}).get(group.reached(late[0]))
    if last:
        why += f", last seen in {last.name}{_at(last)}"
    whole = [name for name in names if all(rank in late for rank, one in hosts.items() if one == name)]
    if len(names) == 1 and whole and sum(one == names[0] for one in hosts.values()) > 1:
        why += f"; all ranks of {names[0]} are late: the node is the suspect"
    return replace(hang, kind="laggard", ranks=late, hosts=names, collective=told.name, why=why)


def _odd(here: Mapping[int, Call]) -> tuple[int, ...]:
    """Ranks whose call of this number is another one than most ranks'; with a tie, the higher ranks."""

    def shape(call: Call) -> tuple[str, str]:
        return (call.operation, call.sizes if call.operation in EVEN else "")

    shapes = Counter(shape(here[rank]) for rank in sorted(here))
    if len(shapes) < 2:
        return ()
    usual = shapes.most_common(1)[0][0]
    return tuple(sorted(rank for rank, call in here.items() if shape(call) != usual))


def _ranks(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return ("rank " if len(ranks) == 1 else "ranks ") + shown + (" and more" if len(ranks) > 8 else "")


def _at(call: Call) -> str:
    return " at " + call.place if call.place else ""
