"""A process group of one, for what DeepSpeed asks of it on the way."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator

with contextlib.redirect_stdout(sys.stderr):
    import deepspeed


@contextlib.contextmanager
def alone() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            deepspeed.init_distributed(
                "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                init_method=f"file://{folder}/store",
                rank=0,
                world_size=1,
            )
        yield
