"""What the planner writes, DeepSpeed takes: every model on 1, 2, 4 and 8 nodes through DeepSpeed's own parser."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from conformance.cells import NEW
from conformance.verdicts import ask

from launcher import facts, plan, spec
from launcher.errors import UserError
from launcher.plan.shape import parameters
from launcher.spec import Shape

NODES = (1, 2, 4, 8)
# One script stands for every architecture: what is parsed here is the config.
JOB = """
name: demo
model: {model}
train:
  script: a.py
  seq_len: 512
  global_batch: 256
  optimizer: {{type: AdamW, lr: 3e-4, betas: [0.9, 0.95], weight_decay: 0.1}}
  lr_schedule: {{type: linear, warmup_steps: 100}}
resources: {{nodes: {nodes}, gpus_per_node: 8, gpu: {gpu}, fabric: infiniband, memory: 1800G}}
"""
GPUS = {1: "h100-80gb", 2: "v100-32gb", 4: "a100-40gb", 8: "h100-80gb"}  # by nodes


def planned(text: str) -> plan.Plan | None:
    """None where the planner refuses for memory, and for nothing else."""
    try:
        return plan.make(spec.load(text, name="job.yaml").spec, others=False)
    except UserError as error:
        if not all("does not fit" in problem.message for problem in error.problems):
            raise
        return None


def parsed(plans: list[plan.Plan]) -> list[dict]:
    """DeepSpeed's word on each config, all in one process."""
    return ask("parser.py", ({"config": p.config, "replicas": p.setup.replicas} for p in plans), release=NEW)


@pytest.mark.slow
def test_every_accepted_plan_is_read_whole_by_deepspeeds_parser():
    pytest.importorskip("deepspeed")
    plans = []
    for model in facts.models():
        for nodes in NODES:
            made = planned(JOB.format(model=model, nodes=nodes, gpu=GPUS[nodes]))
            plans += [made] if made else []
    assert len(plans) > len(facts.models()) * 3
    assert {made.setup.stage for made in plans} >= {0, 1, 3}
    assert {made.setup.offload_optimizer for made in plans} == {"none", "cpu"}
    for made, answer in zip(plans, parsed(plans), strict=True):
        setup, about = made.setup, f"{made.model.name} on {made.spec.resources.nodes} x 8 {made.machine.gpu.name}"
        assert not answer["error"], (about, answer["error"])
        assert answer["unread"] == [], about
        assert answer["batch"] == [setup.samples, setup.micro, setup.accumulation], about
        assert answer["stage"] == setup.stage, about
        assert answer["dtype"] == [setup.precision == "fp16", setup.precision == "bf16"], about
        assert (answer["optimizer"], answer["scheduler"]) == ("adamw", "WarmupDecayLR"), about


# --- what the shape of a model is, in torch --------------------------------------------------------------------


def scaled_down(shape: Shape) -> Shape:
    """The same architecture with two narrow layers: every field that is set stays set."""
    shared = shape.kv_heads is not None and shape.kv_heads != shape.heads
    return replace(
        shape,
        layers=2,
        decoder_layers=2 if shape.decoder_layers else 0,
        hidden=64,
        heads=4,
        kv_heads=(1 if shape.kv_heads == 1 else 2) if shared else None,
        head_dim=None if shape.head_dim is None else 24,
        vocab=300,
        ffn=None if shape.ffn is None else 96,
        positions=64 if shape.positions else 0,
        experts=4 if shape.experts else 0,
        experts_per_token=min(2, shape.experts_per_token),
        expert_ffn=40 if shape.expert_ffn else None,
        shared_ffn=56 if shape.shared_ffn else 0,
    )


@pytest.mark.slow
def test_the_count_of_every_architecture_is_that_of_its_modules():
    pytest.importorskip("torch")
    from conformance.network import Transformer

    different = {scaled_down(row.shape) for row in facts.models().values()}
    assert len(different) > 15
    for small in different:
        counted = sum(p.numel() for p in Transformer(asdict(small)).parameters())
        assert counted == parameters(small), small


# --- a sample trains ------------------------------------------------------------------------------------------


def trained(cells: list[dict]) -> list[dict]:
    """What DeepSpeed's engine does with each cell, on CPU, in forks of one process."""
    return ask("engine.py", cells, release=NEW)[1:]


SAMPLES = [  # model, what the job says, nodes, what is planned: stage, optimizer's and parameters' place
    ("gpt2", "zero: 0", 1, (0, "none", "none")),
    ("llama-3.1-8b", "zero: 1", 2, (1, "none", "none")),
    ("qwen-3-8b", "zero: 2, micro_batch: 1", 2, (2, "none", "none")),
    ("gemma-7b", "zero: 3", 2, (3, "none", "none")),
    ("mixtral-8x7b", "zero: 3", 8, (3, "none", "none")),
    ("t5-xl", "zero: 2", 2, (2, "none", "none")),
    ("bert-large", "zero: 1", 1, (1, "none", "none")),
    ("falcon-7b", "zero: 2, offload: {optimizer: cpu}", 1, (2, "cpu", "none")),
    ("llama-7b", "zero: 3, offload: {optimizer: cpu, parameters: cpu}", 1, (3, "cpu", "cpu")),
    ("llama-13b", "zero: 3, deepspeed: {zero_optimization: {zero_hpz_partition_size: 2}}", 1, (3, "none", "none")),
]


def cell(made: plan.Plan) -> dict:
    """The plan's config as it is, on two ranks with two samples each, for a model of the same architecture."""
    config = json.loads(json.dumps(made.config))
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    config["scheduler"]["params"].update(warmup_num_steps=2, warmup_max_lr=0.01)
    return {"config": config, "world": 2, "shape": asdict(scaled_down(made.model.shape)), "steps": 12}


@pytest.mark.slow
def test_a_sample_of_accepted_plans_trains_a_small_model_of_the_same_architecture():
    pytest.importorskip("deepspeed")
    cells = []
    for model, asked, nodes, planned_as in SAMPLES:
        lines = "".join(f"  {part}\n" for part in split(asked))
        text = JOB.format(model=model, nodes=nodes, gpu="h100-80gb").replace("  seq_len", f"{lines}  seq_len")
        made = planned(text)
        assert made, model
        assert (made.setup.stage, made.setup.offload_optimizer, made.setup.offload_parameters) == planned_as
        cells.append((model, asked, cell(made)))
    for (model, asked, _), answer in zip(cells, trained([row for *_, row in cells]), strict=True):
        assert answer["verdict"] == "ran", (model, asked, answer)
        losses = answer["seen"]["losses"]
        assert losses[-1] < losses[0] - 0.1, (model, asked, losses)


def split(asked: str) -> list[str]:
    """The keys of one line of YAML, those in braces whole."""
    parts, depth = [""], 0
    for character in asked:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
