"""Ranks that the others wait for at every step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

FACTOR = 1.1  # of the median
STEPS = 20  # in a row; dslaunch_pulse gives the least of as many


def stragglers(busy: Mapping[int, tuple[float | None, float | None]]) -> dict[int, float]:
    """How much slower than the median, of ranks that were so in each of their last 20 steps.

    `busy` holds a rank's median and least time outside collectives. {0: (1.0, 0.9), 1: (1.0, 0.9), 2: (1.3, 1.2)}:
    rank 2 is 1.3 times slower, and even its quickest step took longer than 1.1.
    """
    middle = [median for median, _ in busy.values() if median is not None]
    if len(middle) < 2:
        return {}
    usual = statistics.median(middle)
    return {
        rank: median / usual
        for rank, (median, least) in sorted(busy.items())
        if median is not None and least is not None and usual > 0 and least > FACTOR * usual
    }
