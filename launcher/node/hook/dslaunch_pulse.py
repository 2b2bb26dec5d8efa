"""One line for a training loop, so that dslaunch knows which step it is at: `dslaunch_pulse.step(n)`.

    import dslaunch_pulse

    for n, batch in enumerate(loader, 1):
        ...
        dslaunch_pulse.step(n, loss=loss)
        if n % 500 == 0:
            with dslaunch_pulse.phase("checkpoint"):
                engine.save_checkpoint(...)

dslaunch puts this module on every rank's path; outside of a dslaunch job all of it does nothing. Where torch is
loaded, the collective that the rank is in is noted too, and how long it waited there. Nothing is sent anywhere: the
state of the rank is one line of JSON in a file on this node, mapped into memory, which the node's supervisor reads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import math
import mmap
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

SIZE, TAIL = 1024, 512  # bytes of the file, a line of JSON with spaces; from TAIL on what changes at each collective
IDLE = b'""}'.ljust(SIZE - TAIL - 1) + b"\n"
BLANK = b" " * 40  # over what a longer call has left
NOTHING = b'""}'.ljust(128)  # over the longest
IDLE_BYTES = len(NOTHING)
WINDOW = 20  # steps: a rank that was slow in each of them is a straggler
# Asks for the stacks of all threads. No program, NCCL nor Slurm uses the ninth real-time signal; a handler in C
# answers even while Python waits inside a collective.
STACKS = signal.SIGRTMIN + 9

# What torch.distributed and DeepSpeed call in the end, whichever name of a collective the program used.
COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}


class _Pulse:
    def __init__(self, path: str) -> None:
        self.number: int | None = None
        self.steps = 0  # told since this program began
        self.name = b"starting"
        self.busy: deque[float] = deque(maxlen=WINDOW)  # seconds of each of the last steps outside collectives
        self.loss = b"null"
        self.calls: dict[str, list[Any]] = {}  # by the group's name: how many, and what is said of it
        self.last = IDLE
        self.waited = 0.0  # seconds in collectives since the last step
        self.device = False  # NCCL's waiting is the GPU's: what this process waits for says nothing
        self.at = time.monotonic()
        self.stacks = 0
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        # a worker that Python started anew imports its parent's modules, and is not the rank
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self.descriptor, SIZE)
        self.view = mmap.mmap(self.descriptor, SIZE)
        self.answer(path)
        self.view[TAIL:] = IDLE
        self.write()

    def answer(self, path: str) -> None:
        """Write all stacks beside `path` when asked."""
        if signal.getsignal(STACKS) == signal.SIG_DFL:
            self.file = open(path + ".stacks", "w", encoding="utf-8")  # noqa: SIM115  # for as long as we live
            faulthandler.register(STACKS, self.file, all_threads=True)
            self.stacks = STACKS

    def write(self) -> None:
        busy = sorted(self.busy)
        line = (
            b'{"step": %s, "phase": "%s", "busy": %s, "least": %s, "loss": %s, "steps": %d, '
            b'"pid": %d, "stacks": %d, "doing": '
            % (
                b"null" if self.number is None else b"%d" % self.number,
                self.name[:64],
                b"%.6f" % busy[len(busy) // 2] if busy else b"null",
                b"%.6f" % busy[0] if len(busy) == WINDOW else b"null",
                self.loss,
                self.steps,
                os.getpid(),
                self.stacks,
            )
        )
        self.view[:TAIL] = line.ljust(TAIL)

    def step(self, number: int, loss: Any) -> None:
        now = time.monotonic()
        steps = 0 if self.number is None else number - self.number
        if steps > 0 and self.calls and not self.device:
            self.busy.append(max(0.0, now - self.at - self.waited) / steps)
        self.at, self.waited = now, 0.0
        self.number = number
        self.steps += 1
        value = math.nan if loss is None else float(loss)
        self.loss = b"%.6g" % value if math.isfinite(value) else b"null"
        self.name = b"training"
        self.write()

    def enter(self, group: Any, what: bytes) -> bytes:
        """The tail for this call: `all_reduce #1421`, the group's 1421st; the default group is not named."""
        name = group.group_name
        known = self.calls.get(name)
        if known is None:
            known = self.calls[name] = [0, b"" if name == _default else b" of group %s" % name[:16].encode()]
        known[0] += 1
        return b'"%s #%d%s"}' % (what, known[0], known[1]) + BLANK


_pulse: _Pulse | None = None
_default = ""
_wrapped = False


def step(n: int, loss: Any = None) -> None:
    """Step `n` is done. `loss` costs a copy from the GPU if it is a tensor there: leave it out, or give a float."""
    if _pulse:
        watch()
        _pulse.step(int(n), loss)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """`checkpoint` or `eval`: no steps are expected meanwhile."""
    if not _pulse:
        yield
        return
    before, _pulse.name = _pulse.name, json.dumps(name)[1:-1].encode()
    _pulse.write()
    started, waited = time.monotonic(), _pulse.waited
    try:
        yield
    finally:
        _pulse.name = before
        _pulse.at += time.monotonic() - started  # neither busy nor waiting
        _pulse.waited = waited
        _pulse.write()


def watch() -> None:
    """Note collectives from here on; the first step does it by itself. Needs torch.distributed to be set up."""
    global _wrapped, _default
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if not _pulse or _wrapped or distributed is None:
        return
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    _wrapped = True
    _default = distributed.group.WORLD.group_name
    _pulse.device = distributed.get_backend() != "gloo"
    group, work = distributed.ProcessGroup, distributed.Work
    for name, what in COLLECTIVES.items():
        original = getattr(group, name, None)
        if original is not None:
            setattr(group, name, _noted(original, _pulse, what))
    work.wait = _noted(work.wait, _pulse)


def _noted(original: Callable[..., Any], pulse: _Pulse, name: str = "") -> Callable[..., Any]:
    """A collective that notes itself while it runs; without a name it waits for the one that began last."""
    what, view, clock = name.encode(), pulse.view, time.monotonic

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        started = clock()
        if what:
            pulse.last = pulse.enter(self, what)
        tail = pulse.last
        view[TAIL : TAIL + len(tail)] = tail
        try:
            return original(self, *arguments, **options)
        finally:
            view[TAIL : TAIL + IDLE_BYTES] = NOTHING
            pulse.waited += clock() - started

    return call


def _begin() -> None:
    global _pulse
    path = os.environ.get("DSLAUNCH_PROGRESS", "")
    if path:
        with contextlib.suppress(OSError, ValueError):  # a full disk: training goes on without
            _pulse = _Pulse(path)


_begin()
