"""How often to save, and what share of the time is then training: the exact renewal formula, not a rule of thumb."""

from __future__ import annotations

from math import exp, expm1, log2

from launcher.errors import Problem
from launcher.plan import shape as shapes
from launcher.plan.setup import Setup
from launcher.record import record

# Failures of a node: 6.5 in 1,000 node-days on Meta's RSC-1 (2.3 on RSC-2; arXiv 2410.21680).
NODE_MTTF_DAYS = 1000 / 6.5
# And of a job for reasons that are not its nodes': what is left of the 7.9 h measured there at 128 nodes.
JOB_MTTF_HOURS = 10.9
# GB/s that one node writes when nobody said: BLOOM's 2.3 TB in 40 s from 48 nodes.
NODE_WRITE = 1.2
# Slurm sends its signal up to a minute off, and the slowest writes take half as long again as the mean.
SLACK_SECONDS = 60
SLOWEST_WRITE = 1.5


@record
class Advice:
    seconds: float  # of training between two checkpoints
    steps: int | None  # the same in steps, when a step's time is known
    write_seconds: float  # while training stands still
    bytes: float  # of one checkpoint, all ranks together
    mttf_hours: float  # of the whole job
    restart_seconds: float
    goodput: float  # share of the time that is training which counts
    why: str
    notes: tuple[str, ...] = ()
    problem: Problem | None = None


def goodput(interval: float, *, write: float, restart: float, mttf: float) -> float:
    """Seconds in, share out: 4,908 s between writes of 120 s, 600 s to restart, a failure every 28.8 h: 0.947.

    Failures arrive at random (Poisson); each costs the restart and what was done since the last checkpoint, and the
    time between checkpoints starts anew (Daly's renewal form).
    """
    if max(restart, interval + write) > 500 * mttf:
        return 0.0
    return interval / (mttf * exp(restart / mttf) * expm1((interval + write) / mttf))


def best_interval(*, write: float, mttf: float) -> float:
    """The interval of the highest goodput: 8,126 s for writes of 40 s and a failure every 230.8 h.

    Where the derivative is zero, exp((interval + write) / mttf) x (1 - interval / mttf) = 1; the restart cancels.
    """
    if write > 500 * mttf:
        return mttf
    low, high = 0.0, mttf
    for _ in range(80):
        middle = (low + high) / 2
        if exp((middle + write) / mttf) * (1 - middle / mttf) > 1:
            low = middle
        else:
            high = middle
    return low


def size(setup: Setup) -> float:
    """Bytes of a checkpoint: 14 per parameter in bf16 with Adam (weights 2, their fp32 copy 4, moments 8).

    Frozen weights are saved too, without states.
    """
    element = setup.element
    states = setup.optimizer_state + (4 if element == 2 else 0)
    weights = shapes.parameters(setup.shape)
    trained = shapes.adapter_parameters(setup.shape, setup.lora) if setup.lora else weights
    return element * (weights + (trained if setup.lora else 0)) + states * trained


def restart_seconds(nodes: int) -> float:
    """From a failure to the next step: 300 s up to 16 nodes, 480 at 128, 660 at 1,024.

    To notice, queue, start and load; ByteDance measured 454, 545, 635 and 768 s for a requeue at 128 to 1,024
    machines (arXiv 2509.16293).
    """
    return 300 + 60 * max(0.0, log2(nodes / 16))


def advise(
    setup: Setup,
    *,
    nodes: int,
    write_gb_per_s: float | None = None,
    node_mttf_days: float | None = None,
    step_seconds: float | None = None,
    restart: float | None = None,
    warn_before_end: float | None = None,
) -> Advice:
    """Llama 70B on 64 nodes at 77 GB/s: 0.99 TB in 13 s, every 15 minutes, goodput 0.96."""
    saved = size(setup)
    rate = write_gb_per_s or NODE_WRITE * nodes
    write = saved / (rate * 1e9)
    days = node_mttf_days or NODE_MTTF_DAYS
    mttf = 3600 / (1 / JOB_MTTF_HOURS + nodes / (24 * days))
    waits = restart_seconds(nodes) if restart is None else restart
    interval = best_interval(write=write, mttf=mttf)
    steps = None
    if step_seconds:
        steps = max(1, round(interval / step_seconds))
        interval = steps * step_seconds
    share = goodput(interval, write=write, restart=waits, mttf=mttf)
    writing = f"{rate:,.3g} GB/s" + (
        "" if write_gb_per_s else f" ({NODE_WRITE:g} per node assumed: resources.storage)"
    )
    living = f"{days:,.3g} days each" + ("" if node_mttf_days else " (assumed: resources.node_mttf)")
    why = (
        f"{saved / 1e9:,.0f} GB at {writing} takes {write:,.3g} s; one failure in {mttf / 3600:,.3g} h "
        f"({nodes} nodes at {living}, and the job's own every {JOB_MTTF_HOURS:g} h): "
        f"every {clock(interval)} wastes least, and {share:.1%} of the time is training that counts"
    )
    notes = []
    problem = None
    if warn_before_end is not None:
        needed = SLOWEST_WRITE * write + SLACK_SECONDS + (step_seconds or 0)
        rounded = -(-int(needed) // 30) * 30 + 30
        if warn_before_end < needed and write_gb_per_s:
            problem = Problem(
                f"the job is told to save {warn_before_end:,.0f} s before its end, and a checkpoint takes "
                f"{write:,.3g} s: that needs {SLOWEST_WRITE:g} times as long for a slow one, a step, and "
                f"{SLACK_SECONDS} s by which the word may come late",
                hint=f"slurm.warn_before_end: {rounded}",
                at=("slurm", "warn_before_end"),
            )
        elif warn_before_end < needed:  # an assumed rate refuses nothing
            notes.append(
                f"slurm.warn_before_end {warn_before_end:,.0f} leaves little: {rounded} covers a slow write "
                f"({SLOWEST_WRITE:g} x {write:,.3g} s), a step and {SLACK_SECONDS} s"
            )
    return Advice(interval, steps, write, saved, mttf / 3600, waits, share, why, tuple(notes), problem)


def clock(seconds: float) -> str:
    """45 s, 12 min, 2.3 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
