"""Bandwidth between ranks through torch: NCCL on GPUs, gloo on CPU, the same code.

    join(store, rank=0, size=2, ...)   a process group, and what its ranks agree on
    measure(group, {"op": "all_reduce", "bytes": 0, "seconds": 1.0, "check": True})

Times are taken around every iteration, with no barrier inside the loop. A rank's time is its median; the figure
is the slowest rank's. A mean would hide a straggler and the slowest iteration a flap, so p99 is kept beside it.
GB/s are 10^9 bytes, and algbw and busbw are those of nccl-tests.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import importlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# These are ours; tests/test_bandwidth.py holds them against a plain TCP stream over shaped links.
WARM = 5  # iterations; the first ones open connections
DISCARD = 0.3  # of all bytes: a token bucket that was idle lets its first bytes through faster
FEWEST, MOST = 5, 200  # timed iterations
ITERATION = 0.05  # seconds that one takes at least where the size is ours to choose
PROBE = 64 << 10  # bytes that the choice starts from
LARGEST = {"cpu": 64 << 20, "cuda": 8 << 30}  # that it ends at, memory allowing
CHECKED = {"cpu": 16 << 20, "cuda": 1 << 30}  # bytes that are compared, at most
ROOM = 4  # a message is that part of a GPU's free memory at most: all_to_all holds two, a check four halves
PERIOD = 1021  # values 0..1020: sums over 16000 ranks are exact in 32-bit floats
ELEMENT = 4  # bytes of one

# Of a rank's share of the message that crosses the busiest wire, over algorithm bandwidth; n ranks.
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "sendrecv": lambda n: 1.0,
}
SUMS = ("all_reduce", "reduce_scatter")  # where a wrong value does not say whose it is
Spoil = Callable[[str, int, Any], None]


def busbw_factor(op: str, n: int) -> float:
    """busbw over algbw: 1.75 of an all_reduce on 8 ranks, 0.875 of an all_gather, 1 of sendrecv."""
    return FACTORS[op](n)


def whole(op: str, size: int, n: int) -> int:
    """`size` rounded down to whole elements for every rank: all_gather's 1000 bytes on 3 ranks are 996."""
    step = ELEMENT if op in ("all_reduce", "sendrecv") else ELEMENT * n
    return max(step, size // step * step)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that `part` of all are not above: 0.99 of 1..200 is 198."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def iterations(one: float, seconds: float) -> tuple[int, int]:
    """(timed, warm-up right before them): 0.05 s each in 1 s are 20, after another 4 with the first 5."""
    timed = min(MOST, max(FEWEST, round(seconds / max(one, 1e-9))))
    return timed, max(1, math.ceil(DISCARD / (1 - DISCARD) * timed) - WARM)


def grow(size: int, took: float, seconds: float, largest: int) -> int:
    """The next size to try on the way to iterations that take long enough; the same size: it is reached."""
    wanted = max(ITERATION, seconds / 8)
    if took >= 0.5 * wanted or size >= largest:
        return size
    return min(largest, max(size + 1, int(size * min(8.0, wanted / max(took, 1e-9)))))


def figures(
    op: str, size: int, rails: Mapping[int, int], medians: Sequence[float], *, lanes: int = 1
) -> dict[str, Any]:
    """The figures of the slowest rank. `rails` of sendrecv, {from: to}: only who receives saw it arrive.

    400 MB all_reduced by 4 ranks in 0.1 s are 4 GB/s of algbw and 6 of busbw. `lanes` lead from one node to
    another side by side: together they have so many times the slowest one's bandwidth.
    """
    counted = sorted(rails.values()) if rails else range(len(medians))
    slowest = max(counted, key=lambda rank: medians[rank])
    algbw = size / medians[slowest] / 1e9
    found = {"median": medians[slowest], "algbw": algbw, "slowest_rank": slowest, "per_rank": list(medians)}
    per_rail = [size / medians[to] / 1e9 for to in rails.values()]
    found |= {"per_rail": per_rail, "slow_rail": slow_rail(per_rail)}
    return {**found, "busbw": algbw * lanes * busbw_factor(op, len(medians))}


def slow_rail(rates: Sequence[float]) -> dict[str, Any] | None:
    """slow_rail([44, 21, 45, 43]) is {"rail": 1, "rate": 21, "others": 44}: GB/s, and the median of the others."""
    if len(rates) < 2:
        return None
    rail = min(range(len(rates)), key=lambda one: rates[one])
    return {"rail": rail, "rate": rates[rail], "others": statistics.median([*rates[:rail], *rates[rail + 1 :]])}


def room(free: int | None) -> int:
    """Bytes that a message may have: 6 GiB with 24 GiB free on a GPU. On CPU (None) only the allocation tells."""
    return LARGEST["cuda"] << 10 if free is None else free // ROOM


def odd_pieces(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Of pieces (from, to) that arrived wrong: the ranks at which two or more meet, and the pieces of nobody.

    [(2, 0), (2, 1), (2, 3)] is rank 2; (0, 1) alone may be either's.
    """
    left, ranks = set(pairs), []
    while left:
        ends = {rank for pair in left for rank in pair}
        most = {rank: max(sum(a == rank for a, _ in left), sum(b == rank for _, b in left)) for rank in sorted(ends)}
        rank = max(most, key=lambda one: most[one])
        if most[rank] < 2:
            break
        ranks.append(rank)
        left = {pair for pair in left if rank not in pair}
    return sorted(ranks), sorted(left)


def contributor(bad: Sequence[tuple[bool, bool]], n: int) -> int | None:
    """Who spoils a sum: bad[b][v] is whether it is wrong when only ranks contribute whose bit b is v."""
    if any(low == high for low, high in bad):
        return None
    rank = sum(1 << bit for bit, (_, high) in enumerate(bad) if high)
    return rank if rank < n else None


@dataclass
class Group:
    """The ranks of one process group. What they have to agree on goes through its store, not through the wire."""

    store: Any
    rank: int
    size: int
    device: Any
    timeout: float
    step: int = 0

    def agree(self, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 decides from everyone's word."""
        self.step += 1
        key = f"step{self.step}"
        self.store.set(f"{key}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            self.store.set(key, json.dumps(decide(self.words(key))))
        return json.loads(self.store.get(key))

    def words(self, key: str) -> list[Any]:
        """Everyone's, in one round trip where the store can: thousands of ranks are thousands of them else."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        if getattr(self.store, "has_extended_api", bool)():
            try:
                return [json.loads(word) for word in self.store.multi_get(keys)]
            except Exception as error:
                silent = self.first_silent(keys)
                raise TimeoutError(f"rank {silent} did not answer: {str(error)[:80]}") from error
        said = []
        for rank, one in enumerate(keys):
            try:
                said.append(json.loads(self.store.get(one)))
            except Exception as error:
                raise TimeoutError(f"rank {rank} did not answer: {str(error)[:80]}") from error
        return said

    def first_silent(self, keys: Sequence[str]) -> int | str:
        try:
            return bisect.bisect_left(range(len(keys)), True, key=lambda rank: not self.store.check(keys[: rank + 1]))
        except Exception:  # the store itself is gone
            return "?"


def join(store: Any, *, rank: int, size: int, backend: str, device: Any, timeout: float) -> Group:
    """All ranks in one process group, connected by a first all_reduce.

    Not by `device_id`: torch 2.6.1 to 2.7.0 can hang with it (pytorch issue 153960).
    """
    import torch
    import torch.distributed as dist

    # NCCL's watchdog ends the process when it fires; ours, a question to the stream, is there before it.
    patience = timedelta(seconds=timeout + (60 if backend == "nccl" else 0))
    # torch numbers groups in each process, puts the number into the store's keys, and counts those that failed too.
    importlib.import_module("torch.distributed.distributed_c10d")._world.group_count = 0
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    group = Group(store, rank, size, device, timeout)
    one = torch.ones(1, device=device)
    loop(group, lambda: dist.all_reduce(one), 1)
    if one.item() != size:
        raise ValueError(f"{size} ranks add up to {one.item():g}")
    return group


def loop(group: Group, run: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` iterations."""
    torch: Any = importlib.import_module("torch")
    if group.device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(count):
            run()
            stamps.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()  # on NCCL's stream; the current one waits for it, the host does not
        event.record()
    deadline = time.monotonic() + group.timeout
    while not events[-1].query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} iterations are not done after {group.timeout:g} s")
        time.sleep(0.0005)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def measure(group: Group, wanted: Mapping[str, Any], *, spoil: Spoil | None = None) -> dict[str, Any]:
    """One operation at one size: every rank answers the same, but the lists that only rank 0 has.

    `spoil(when, rank, tensor)` damages the checked data when it is "made", "sent" or "received".
    """
    op, seconds, size = str(wanted["op"]), float(wanted.get("seconds", 1.0)), int(wanted.get("bytes", 0))
    rails = dict(zip(wanted.get("from", ()), wanted.get("to", ()), strict=True))
    lanes = len(rails) or 1
    if op == "sendrecv" and not rails:  # as nccl-tests has it: everyone to the next
        rails = {rank: (rank + 1) % group.size for rank in range(group.size)}
    if op not in FACTORS:
        return {"op": op, "unsupported": f"{op} is none of {', '.join(FACTORS)}"}
    try:
        most = group.agree(room(free(group.device)), min)
        largest = min(size or LARGEST[group.device.type], most)
        size = whole(op, largest if size else chosen(group, op, rails, seconds, largest), group.size)
        run = _operation(group, op, rails, *buffers(group, op, size))
        warm = loop(group, run, WARM)
        one = group.agree(min(warm[WARM // 2 :]) if _takes_part(group, rails) else 0.0, max)
        timed, again = iterations(one, seconds)
        loop(group, run, again)
        before = occupied()
        times = loop(group, run, timed)
        busy = (occupied() - before) / max(sum(times), 1e-9)
        del run
        found = _result(group, op, size, rails, lanes, times, busy)
        if wanted.get("check"):
            checked = min(size, most // 2, CHECKED[group.device.type])
            found.update(check(group, op, checked, rails, spoil=spoil))
    except DoesNotFit as error:
        return {"op": op, "unsupported": f"does not fit: {error}"}
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or "does not support" in str(error):
            return {"op": op, "unsupported": str(error).strip().partition("\n")[0]}
        raise
    return found


def chosen(group: Group, op: str, rails: Mapping[int, int], seconds: float, largest: int) -> int:
    """Bytes of which one iteration takes long enough to be timed."""
    size = PROBE
    while True:
        size = whole(op, size, group.size)
        took = min(loop(group, _operation(group, op, rails, *buffers(group, op, size)), 3)[1:])
        slowest = group.agree(took if _takes_part(group, rails) else 0.0, max)
        after = whole(op, grow(size, slowest, seconds, largest), group.size)
        if after <= size:
            return size
        size = after


def occupied() -> float:
    """Seconds that the threads of this process have run, or waited for a CPU to run on."""
    total = 0
    for task in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(task, encoding="ascii") as file:
            ran, waited, _ = file.read().split()
            total += int(ran) + int(waited)
    return total / 1e9


def _takes_part(group: Group, rails: Mapping[int, int]) -> bool:
    return not rails or group.rank in rails.values()


def _result(
    group: Group, op: str, size: int, rails: Mapping[int, int], lanes: int, times: list[float], busy: float
) -> dict[str, Any]:
    """`busy` is the share of the time in which a rank ran, or waited for a CPU: of the busiest one."""
    mine = [statistics.median(times), percentile(times, 0.99), busy]
    everyone: list[list[list[float]]] = []

    def decide(said: list[list[float]]) -> dict[str, Any]:
        everyone.append(said)
        counted = list(rails.values()) or list(range(len(said)))
        found = figures(op, size, rails, [one[0] for one in said], lanes=lanes)
        return {
            **found,
            "busy": max(said[rank][2] for rank in {*counted, *rails}),
            "p99": max(said[rank][1] for rank in counted),
            "per_rank": [],
            "per_rail": [],
        }

    agreed: dict[str, Any] = group.agree(mine, decide)
    if everyone:
        whole_lists = figures(op, size, rails, [one[0] for one in everyone[0]], lanes=lanes)
        agreed.update(per_rank=whole_lists["per_rank"], per_rail=whole_lists["per_rail"])
    return {"op": op, "bytes": size, "iterations": len(times), **agreed, "correct": None, "wrong": [], "why": ""}


def free(device: Any) -> int | None:
    """Bytes of a GPU's memory that torch can still have; None on CPU, where nobody knows what others will take."""
    torch: Any = importlib.import_module("torch")
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


class DoesNotFit(Exception):
    """The memory of one rank or more does not hold the message: all ranks know, and go on with the next one."""


def buffers(group: Group, op: str, size: int) -> tuple[Any, Any]:
    """On every rank or on none: one rank alone that cannot take part would leave the others waiting."""
    torch: Any = importlib.import_module("torch")
    made, why = None, ""
    try:
        made = _buffers(group, op, size)
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        why = str(error).strip().partition("\n")[0]
    full = group.agree(why, lambda said: [[rank, word] for rank, word in enumerate(said) if word])
    if full or made is None:
        rank, why = full[0]
        raise DoesNotFit(f"{size} bytes on {len(full)} of {group.size} ranks, rank {rank}: {why}")
    return made


def _buffers(group: Group, op: str, size: int) -> tuple[Any, Any]:
    """(in, out) of an operation of `size` bytes, as nccl-tests counts them."""
    import torch

    count = size // ELEMENT
    share = count // group.size
    given, got = {
        "all_reduce": (count, 0),
        "all_gather": (share, count),
        "reduce_scatter": (count, share),
        "all_to_all": (count, count),
        "sendrecv": (count, count),
    }[op]
    return torch.zeros(given, device=group.device), torch.zeros(got, device=group.device)


def _operation(group: Group, op: str, rails: Mapping[int, int], given: Any, got: Any) -> Callable[[], object]:
    import torch.distributed as dist

    if op == "sendrecv":
        return lambda: _send(group, rails, given, got)
    # Older releases of torch, up to 2.12, only have the second name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(given),
        "all_gather": lambda: gather(got, given),
        "reduce_scatter": lambda: scatter(got, given),
        "all_to_all": lambda: dist.all_to_all_single(got, given),
    }
    return calls[op]


def _send(group: Group, rails: Mapping[int, int], given: Any, got: Any) -> None:
    """Everything that this rank sends and receives on its rails, at once."""
    import torch.distributed as dist

    turns = []
    for source, to in rails.items():
        if group.rank == source:
            turns.append(dist.P2POp(dist.isend, given, to))
        if group.rank == to:
            turns.append(dist.P2POp(dist.irecv, got, source))
    for work in dist.batch_isend_irecv(turns) if turns else ():
        work.wait()


# --- is what arrives what was sent


def _values(source: int, to: int) -> list[int]:
    """One period of what `source` has for `to`."""
    return [(7 * i + 131 * source + 31 * to) % PERIOD for i in range(PERIOD)]


def _tensor(group: Group, period: Sequence[int], count: int) -> Any:
    import torch

    one = torch.tensor(period, dtype=torch.float32, device=group.device)
    return one.repeat(count // PERIOD + 1)[:count].clone()


def check(
    group: Group, op: str, size: int, rails: Mapping[int, int], *, spoil: Spoil | None = None
) -> dict[str, Any]:
    """{"correct": False, "wrong": [2], "why": "rank 2 ..."}; nobody in `wrong` where nobody can be told."""
    size = whole(op, size, group.size)
    if op in SUMS:
        return _check_sum(group, op, size, spoil or _leave)
    return _check_pieces(group, op, size, rails, spoil or _leave)


def _leave(when: str, rank: int, tensor: Any) -> None:
    """Damages nothing."""


def _check_sum(group: Group, op: str, size: int, spoil: Spoil) -> dict[str, Any]:
    everyone = range(group.size)
    mine, wrong = _sum_is_wrong(group, op, size, everyone, spoil)
    own, odd = group.agree([mine, wrong], _sides)
    if own:
        return _wrong(own, "has wrong values before it sends them")
    if not odd:
        return {"correct": True}
    if op == "all_reduce" and len(odd) < group.size:
        return _wrong(odd, "gets a wrong sum while others get the right one")
    bad = []
    for bit in range((group.size - 1).bit_length()):
        halves = [[rank for rank in everyone if rank >> bit & 1 == side] for side in (0, 1)]
        answers = [_sum_is_wrong(group, op, size, half, spoil)[1] for half in halves]
        low, high = group.agree(answers, lambda said: [any(one[side] for one in said) for side in (0, 1)])
        bad.append((low, high))
    rank = contributor(bad, group.size)
    if rank is not None:
        return _wrong([rank], "spoils every sum that it contributes to")
    if len(odd) < group.size:
        return _wrong(odd, "gets a wrong sum while others get the right one")
    return {"correct": False, "wrong": [], "why": "every rank gets a wrong sum, and whose part is wrong is unclear"}


def _sides(said: list[list[bool]]) -> list[list[int]]:
    """The ranks whose own data is wrong, and those whose result is."""
    return [[rank for rank, one in enumerate(said) if one[side]] for side in (0, 1)]


def _sum_is_wrong(group: Group, op: str, size: int, who: Sequence[int], spoil: Spoil) -> tuple[bool, bool]:
    """Is our own data wrong, is the sum wrong, when only the ranks in `who` have anything but zeros."""
    import torch

    count = size // ELEMENT
    share = count // group.size
    to = [0] if op == "all_reduce" else list(range(group.size))
    length = count if op == "all_reduce" else share

    def fresh() -> Any:
        periods = [_values(group.rank, one) if group.rank in who else [0] * PERIOD for one in to]
        return torch.cat([_tensor(group, period, length) for period in periods])

    given = fresh()
    spoil("made", group.rank, given)
    own = bool((given != fresh()).any())
    spoil("sent", group.rank, given)
    got = torch.zeros(0 if op == "all_reduce" else share, device=group.device)
    loop(group, _operation(group, op, {}, given, got), 1)
    result = given if op == "all_reduce" else got
    spoil("received", group.rank, result)
    mine = to[0] if op == "all_reduce" else group.rank
    total = [sum(column) for column in zip(*(_values(rank, mine) for rank in who), strict=True)]
    return own, bool((result != _tensor(group, total, length)).any())


def _check_pieces(group: Group, op: str, size: int, rails: Mapping[int, int], spoil: Spoil) -> dict[str, Any]:
    import torch

    count = size // ELEMENT
    given, got = _buffers(group, op, size)
    length = count if op == "sendrecv" else count // group.size
    to = {"all_gather": [0], "all_to_all": list(range(group.size)), "sendrecv": [rails.get(group.rank, 0)]}[op]
    meant = torch.cat([_tensor(group, _values(group.rank, one), length) for one in to])
    given.copy_(meant)
    spoil("made", group.rank, given)
    own = bool((given != meant).any())
    del meant
    spoil("sent", group.rank, given)
    loop(group, _operation(group, op, rails, given, got), 1)
    spoil("received", group.rank, got)
    if op == "sendrecv":
        pieces = {source: got for source, one in rails.items() if one == group.rank}
    else:
        pieces = dict(enumerate(got.split(length)))
    mine = 0 if op == "all_gather" else group.rank
    odd = [
        source
        for source, piece in pieces.items()
        if bool((piece != _tensor(group, _values(source, mine), length)).any())
    ]

    def decide(said: list[list[Any]]) -> list[Any]:
        pairs = [(source, rank) for rank, (_, sources) in enumerate(said) for source in sources]
        return [[rank for rank, (bad, _) in enumerate(said) if bad], *odd_pieces(pairs)]

    owns, ranks, pairs = group.agree([own, odd], decide)
    if owns:
        return _wrong(owns, "has wrong values before it sends them")
    if ranks:
        return _wrong(ranks, "sends or gets wrong values")
    if pairs:
        way = ", ".join(f"from rank {source} to rank {rank}" for source, rank in pairs[:4])
        return {"correct": False, "wrong": [], "why": f"values arrive wrong {way}; which of the two is unclear"}
    return {"correct": True}


def _wrong(ranks: Sequence[int], what: str) -> dict[str, Any]:
    who = ", ".join(map(str, ranks))
    return {"correct": False, "wrong": list(ranks), "why": f"rank {who} {what}"}
