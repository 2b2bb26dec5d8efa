"""One GPU alone: products of matrices, whether they repeat, and copies to and from the host."""

from __future__ import annotations

import statistics
from typing import Any

from launcher.preflight.bandwidth import WARM, Group, iterations, loop, percentile


def matmul(device: Any, seconds: float) -> dict[str, Any]:
    """TFLOP/s of a large product, whether repeating it gives the same bits, and copies to and from the host.

    A GPU that gives other bits for the same product corrupts data silently. Copies only on a GPU.
    """
    import torch

    gpu = device.type == "cuda"
    # Ours: 1.1e12 operations, 2 ms on an H100 at 500 TFLOP/s and 0.4 GB; on CPU 2e9, some hundredths of a second.
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    source = torch.Generator().manual_seed(7)
    a, b = (torch.randn(size, size, generator=source).to(device, dtype) for _ in range(2))
    out, first = torch.empty_like(a), torch.matmul(a, b)
    alone = Group(None, 0, 1, device, timeout=60 + 10 * seconds)

    def run() -> None:
        torch.matmul(a, b, out=out)

    one = min(loop(alone, run, WARM)[1:])
    timed, again = iterations(one, seconds)
    loop(alone, run, again)
    times = loop(alone, run, timed)
    repeatable = True
    for _ in range(WARM):
        run()
        repeatable = repeatable and bool(torch.equal(out, first))
    median = statistics.median(times)
    found = {
        "tflops": 2 * size**3 / median / 1e12,
        "median": median,
        "p99": percentile(times, 0.99),
        "iterations": timed,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "repeatable": repeatable,
    }
    return {**found, **(_copies(alone) if gpu else {})}


def _copies(alone: Group) -> dict[str, float]:
    """GB/s from and to pinned host memory."""
    import torch

    size = 256 << 20  # ours: 5 ms over PCIe 5 x16, 20 over a slot of a quarter of the lanes
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=alone.device)
    ways = {
        "host_to_device": lambda: there.copy_(host, non_blocking=True),
        "device_to_host": lambda: host.copy_(there, non_blocking=True),
    }
    return {way: size / statistics.median(loop(alone, run, 10)[3:]) / 1e9 for way, run in ways.items()}
