"""Checkpoints as DeepSpeed itself writes them, of every layout: checkpoint_writer.py RANKS DIR KIND...

A kind is a ZeRO stage and a precision (`2:bf16`), `pipeline`, or experts with a stage (`experts:2`). Each gets a
folder of its own with two tags. The ranks are forked, so that torch and DeepSpeed are imported once for all of them.
"""

from __future__ import annotations

import os
import socket
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

WIDTH = 32


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.before = torch.nn.Linear(WIDTH, WIDTH)
        self.first = MoE(WIDTH, torch.nn.Linear(WIDTH, WIDTH), num_experts=4, ep_size=2)
        self.second = MoE(WIDTH, torch.nn.Linear(WIDTH, WIDTH), num_experts=4, ep_size=2)


def engine(kind: str):
    name, _, rest = kind.partition(":")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1 if name == "pipeline" else int(rest if name == "experts" else name)},
    }
    if name == "pipeline":
        from deepspeed.pipe import LayerSpec, PipelineModule

        layers = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(4)]
        model = PipelineModule([*layers[:2], torch.relu, *layers[2:]], num_stages=2, loss_fn=torch.nn.MSELoss())
    elif name == "experts":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        model = Experts()
        del config["optimizer"]
        groups = split({"params": list(model.parameters()), "name": "all"})
        return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]
    else:
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        if rest != "fp32":
            config[rest] = {"enabled": True}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def forked(ranks: int) -> list[int]:
    """In every rank but the first: nobody. In the first: the others, to wait for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {**where, "RANK": "0", "LOCAL_RANK": "0"}
    others = []
    for rank in range(1, ranks):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return []
        others.append(pid)
    return others


def main() -> None:
    others = forked(int(sys.argv[1]))
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo")
    for kind in sys.argv[3:]:
        made = engine(kind)
        folder = f"{sys.argv[2]}/{kind.replace(':', '-')}"
        for step in (1, 2):
            if kind[0].isdigit():
                loss = made(torch.randn(2, WIDTH, dtype=next(made.module.parameters()).dtype)).float().pow(2).mean()
                made.backward(loss)
                made.step()
            made.save_checkpoint(folder, tag=f"global_step{step}")
    failed = any(os.waitpid(pid, 0)[1] for pid in others)
    os._exit(failed)  # nothing left to do that torch's threads could break


main()
