"""global = micro x accumulation x replicas: whichever number is missing, and never a wrong one."""

from __future__ import annotations

from typing import Literal

from launcher.errors import Path, Problem, UserError
from launcher.record import record

Given = int | Literal["auto"]


@record
class Batch:
    """`total` samples per step: `micro` per replica and pass, `accumulation` passes, `replicas` copies."""

    total: int
    micro: int
    accumulation: int
    replicas: int


def solve(total: Given, micro: Given, accumulation: Given, *, replicas: int, largest_micro: int = 1) -> Batch:
    """solve(512, 4, "auto", replicas=64) accumulates 2. Raises UserError with the nearest that divides.

    With micro unknown too, the largest divisor up to `largest_micro` is taken.
    """
    if total == "auto":
        known_micro = largest_micro if micro == "auto" else micro
        passes = 1 if accumulation == "auto" else accumulation
        return Batch(known_micro * passes * replicas, known_micro, passes, replicas)
    if micro != "auto":
        if accumulation != "auto" and total != micro * accumulation * replicas:
            raise UserError(_mismatch(total, micro, accumulation, replicas))
        passes = _divide(total, micro * replicas, f"{_replicas(replicas)} x micro_batch {micro}")
        return Batch(total, micro, passes, replicas)
    if accumulation != "auto":
        known_micro = _divide(total, accumulation * replicas, f"{_replicas(replicas)} x accumulation {accumulation}")
        return Batch(total, known_micro, accumulation, replicas)
    per_replica = _divide(total, replicas, _replicas(replicas))
    known_micro = max(m for m in range(1, min(largest_micro, per_replica) + 1) if per_replica % m == 0)
    return Batch(total, known_micro, per_replica // known_micro, replicas)


def options(total: Given, micro: Given, accumulation: Given, *, replicas: int, largest_micro: int) -> list[Batch]:
    """Every way to fill what is left open, the smallest micro-batch first. Raises UserError when there is none.

    options(96, "auto", "auto", replicas=8, largest_micro=4): 1 x 12, 2 x 6, 3 x 4 and 4 x 3.
    """
    only = given_micro(total, micro, accumulation, replicas=replicas)
    if only is not None:
        return [solve(total, micro, accumulation, replicas=replicas)]
    if total == "auto":
        passes = 1 if accumulation == "auto" else accumulation
        micros = [m for m in range(1, largest_micro + 1) if m & (m - 1) == 0]
        return [Batch(m * passes * replicas, m, passes, replicas) for m in micros]
    per_replica = solve(total, "auto", accumulation, replicas=replicas).accumulation
    micros = [m for m in range(1, min(largest_micro, per_replica) + 1) if per_replica % m == 0]
    return [Batch(total, m, per_replica // m, replicas) for m in micros]


def given_micro(total: Given, micro: Given, accumulation: Given, *, replicas: int) -> int | None:
    """The micro-batch that the other numbers leave no choice about: given_micro(512, "auto", 2, replicas=64) is 4."""
    if micro != "auto":
        return micro
    if total == "auto" or accumulation == "auto" or total % (accumulation * replicas):
        return None
    return total // (accumulation * replicas)


AT: Path = ("train", "global_batch")


def _replicas(replicas: int) -> str:
    return f"{replicas} data-parallel rank{'s' if replicas > 1 else ''}"


def _divide(total: int, step: int, says: str) -> int:
    if total % step == 0:
        return total // step
    below, above = total // step * step, -(-total // step) * step
    nearest = above if not below or above - total <= total - below else below
    other = f" ({below} and {above} are the neighbours)" if below and above != below else ""
    equals = f" = {step}" if " x " in says else ""
    raise UserError(
        Problem(
            f"global_batch {total} is not a multiple of {says}{equals}",
            hint=f"{nearest} is the nearest that is{other}",
            at=AT,
        )
    )


def _mismatch(total: int, micro: int, accumulation: int, replicas: int) -> Problem:
    product = micro * accumulation * replicas
    passes, rest = divmod(total, micro * replicas)
    other = "" if rest else f" or gradient_accumulation: {passes}"
    return Problem(
        f"global_batch {total} is not micro_batch {micro} x accumulation {accumulation} x "
        f"{_replicas(replicas)} = {product}",
        hint=f"global_batch: {product}{other}; or leave one of the three out",
        at=AT,
    )
