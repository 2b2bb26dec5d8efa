"""What DeepSpeed's engine says to configs as they stand: JSON lines in, one JSON line out for each.

Each config starts an engine over a toy model and trains three steps, on one rank: only its batch numbers are made
to fit one. Run by the interpreter whose deepspeed is asked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
logging.disable(logging.WARNING)
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    import torch
    from alone import alone

BATCH = 8


def start(config: dict) -> str:
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "fp16"):  # there is no fp16 on CPU
        config.pop(key, None)
    config["train_batch_size"] = BATCH
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        for _ in range(3):
            engine.backward(engine(torch.randn(BATCH, 32)).pow(2).mean())
            engine.step()
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return "runs"


def main() -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    with alone():
        for line in sys.stdin:
            with contextlib.redirect_stdout(sys.stderr):
                answer = start(json.loads(line))
            print(json.dumps(answer), flush=True)
        sys.stdout.flush()
        os._exit(0)  # torch's threads need no farewell


if __name__ == "__main__":
    main()
