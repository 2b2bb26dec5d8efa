"""What DeepSpeed refuses, ignores and takes for something else: our table, and DeepSpeed's own sources."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.cells import cells
from conformance.verdicts import findings
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher import facts
from launcher.plan import rules


def situation(config: dict[str, object] | None = None, **more: object) -> rules.Situation:
    base = rules.Situation(gpus=True, world=8, pipeline=1, steps=1000)
    return replace(base, config=config or {}, **more)


def optimizer(kind: str, **params: object) -> dict[str, object]:
    return {"optimizer": {"type": kind, "params": params}}


def zero(stage: object = 0, **section: object) -> dict[str, object]:
    return {"zero_optimization": {"stage": stage, **section}}


def scheduler(kind: object, **params: object) -> dict[str, object]:
    return {"scheduler": {"type": kind, "params": params}}


ONEBIT = optimizer("OneBitAdam", freeze_step=200)
OLD, NEW = {"deepspeed": "0.19.6"}, {"deepspeed": "0.19.8"}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/x"}
TORCH = optimizer("AdamW", torch_adam=True)
# id, what triggers it, what is said, what does not
TABLE = [
    ("DSL001", situation({"zero_optimisation": {}}), "ignores it without a word", situation(zero())),
    ("DSL001", situation({"gradient_checkpointing": 1}), "no key `gradient_checkpointing`", situation()),
    *(("DSL002", situation(bad), says, situation(good)) for bad, says, good in [
        (zero(overlap_com=True), "zero_optimization has no key `overlap_com`", zero(overlap_comm=True)),
        (zero(stage3_overlap_comm=True), "no key `stage3_overlap_comm`", zero(3, stage3_prefetch_bucket_size=1)),
        (zero(3, offload_param={"devices": "cpu"}), "offload_param has no key `devices`", zero(3, offload_param=CPU)),
        (zero(3, offload_param={"ratio": 0.5}), "no key `ratio`", zero(3, offload_optimizer={"ratio": 0.5})),
        ({"bf16": {"on": True}}, "bf16 has no key `on`", BF16),
        ({"tensor_parallel": {"tp": {"size": 2}}}, "tensor_parallel.tp has no key `size`", {"tensor_parallel": {}}),
    ]),
    ("DSL003", situation({"activation_checkpointing": {"enabled": True}}), "has no key `enabled`",
     situation({"activation_checkpointing": {"profile": True}})),
    ("DSL003", situation({"optimizer": {"type": "SGD", "lr": 0.1}}), "optimizer has no key `lr`",
     situation(optimizer("SGD", lr=0.1))),
    ("DSL004", situation({"amp": {}}), "left DeepSpeed in 0.19.8", situation({"amp": {}}, **OLD)),
    ("DSL004", situation({"nebula": {}}, deepspeed="0.19.7"), "left DeepSpeed in 0.19.7",
     situation({"elasticity": {}}, deepspeed="0.19.7")),
    ("DSL004", situation(zero(mics_shard_size=8)), "`mics_shard_size`", situation(zero(3))),
    ("DSL005", situation(zero(1, compute_grad_norm=True), **OLD), "came after DeepSpeed 0.19.6",
     situation(zero(1, compute_grad_norm=True), **NEW)),
    ("DSL006", situation({"optimizer": "Adam"}), "optimizer is a section", situation(ONEBIT)),
    ("DSL006", situation({"zero_optimization": 3}), "zero_optimization is a section", situation()),
    ("DSL006", situation(zero(3, offload_param="cpu")), "offload_param is a section",
     situation(zero(offload_param=None))),
    *(("DSL007", situation(bad), says, situation(good)) for bad, says, good in [
        ({"gradient_clipping": "1.0"}, "gradient_clipping is a number, not `'1.0'`", {"gradient_clipping": 1}),
        ({"wall_clock_breakdown": "false"}, "is true or false", {"wall_clock_breakdown": False}),
        (zero(1, reduce_bucket_size="5e8"), "reduce_bucket_size is a whole number", zero(1, reduce_bucket_size=5e8)),
        (zero(1, reduce_bucket_size=1.5), "not `1.5`", zero(1, reduce_bucket_size=1)),
        (zero(1, reduce_bucket_size=0), "above 0, not `0`", zero(1, allgather_bucket_size=0)),
        (zero(overlap_comm="maybe"), "zero_optimization.overlap_comm is true or false", zero(overlap_comm=None)),
        (zero(4), "stage is 0, 1, 2 or 3, not `4`", zero(3)),
        (zero(3, offload_param={"device": "gpu"}), "device is none, cpu or nvme", zero(3, offload_param={})),
        ({"gradient_allreduce_op": "max"}, "is mean or sum", {"gradient_allreduce_op": "MEAN"}),
        ({"train_batch_size": "8"}, "train_batch_size is a whole number above 0", {"train_batch_size": 8}),
        ({"steps_per_print": 0}, "a number other than 0", {"steps_per_print": None}),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "is fp32, fp16 or bf16", {"data_types": {}}),
    ]),
    ("DSL008", situation({"train_batch_size": "auto"}), "train_batch_size is `auto`",
     situation({"train_batch_size": "auto"}, trainer="hf")),
    ("DSL008", situation({**TORCH, "gradient_clipping": "auto"}), "gradient_clipping is `auto`", situation(TORCH)),
    ("DSL009", situation({"optimizer": {"type": "Adam", "params": [1]}}), "optimizer.params is a section",
     situation({"optimizer": {"type": "Adam", "params": None}})),
    ("DSL010", situation({"disable_python_gc": True}, **OLD), "came after DeepSpeed 0.19.6",
     situation({"disable_python_gc": True}, **NEW)),
    ("DSL011", situation(zero(reduce_bucket_size="auto")), "plain DeepSpeed takes its default", situation(zero(3))),
    ("DSL011", situation({"bf16": {"enabled": "auto"}}), "bf16.enabled is `auto`",
     situation({"bf16": {"enabled": "auto"}}, trainer="hf")),
    ("DSL012", situation(zero(overlap_comm="yes")), "`'yes'` is read as one", situation(zero(overlap_comm=True))),
    ("DSL012", situation(zero("2")), "stage is 0, 1, 2 or 3; `'2'` is read", situation(zero(2))),
    *(("DSL013", situation(zero(3, **{old: value, new: value})), "one setting", situation(zero(3, **{old: value})))
      for (old, new), value in [(pair, CPU if "cpu" in pair[0] else 1) for pair in rules.NAMES]),
    ("DSL013", situation(zero(3, cpu_offload=False, offload_optimizer=CPU)), "cpu_offload and offload_optimizer",
     situation(zero(3, cpu_offload="auto", offload_optimizer=CPU))),
    ("DSL014", situation({"zero_optimization": True}), "is read as {stage: 1}", situation(zero(1))),
    ("DSL015", situation({"prescale_gradients": "false"}), "counts as true",
     situation({"prescale_gradients": False})),
    ("DSL016", situation({"prescale_gradients": "auto"}), "takes it for text", situation({"prescale_gradients": 1})),
    ("DSL017", situation({"wandb": {"enabled": True}}), "package wandb on every node", situation({"wandb": {}})),
    ("DSL018", situation({"wandb": {"enabled": True}}, packages=frozenset()), "the nodes do not have it",
     situation({"wandb": {"enabled": True}}, packages=frozenset({"wandb"}))),
    ("DSL020", situation(optimizer("Adm")), "table has no optimizer `Adm`", situation(optimizer("adam"))),
    ("DSL020", situation(optimizer("onebit_adam")), "no optimizer `onebit_adam`", situation(optimizer("onebitadam"))),
    ("DSL020", situation(optimizer("sgd")), "no optimizer `sgd`", situation(optimizer("SGD"))),
    ("DSL021", situation(ONEBIT), "nobody said which the nodes have", situation(ONEBIT, **OLD)),
    ("DSL021", situation(ONEBIT, **NEW), "is not in DeepSpeed 0.19.8", situation(optimizer("Adam"), **NEW)),
    ("DSL021", situation(optimizer("ZeroOneAdam"), deepspeed="0.19.7"), "left in 0.19.7",
     situation(optimizer("OneBitLamb"), deepspeed="0.9.5")),
    ("DSL022", situation({**optimizer("Lamb"), **zero(1)}), "ZeRO stage 1", situation({**TORCH, **zero(3)})),
    ("DSL022", situation({**optimizer("SGD"), **zero(1)}), "ZeRO stage 1",
     situation({**optimizer("SGD"), **zero(3), "zero_allow_untested_optimizer": True})),
    *(("DSL022", situation(zero(2), client=bad), f"the program's {bad}", situation(zero(2), client=good))
      for bad, good in [("SGD", "AdamW"), ("Lion", "FusedLion"), ("adam", "DeepSpeedCPUAdam"), ("Muon", "Adagrad")]),
    ("DSL023", situation({**ONEBIT, **zero(3)}, **OLD), "does not run with ZeRO stage 3", situation(ONEBIT, **OLD)),
    ("DSL023", situation({**ONEBIT, **zero(1), "zero_allow_untested_optimizer": True}), "ZeRO stage 1",
     situation(ONEBIT)),
    ("DSL024", situation(optimizer("Lamb"), gpus=False), "no CPU implementation", situation(optimizer("Lamb"))),
    ("DSL025", situation(optimizer("SGD", betas=[0.9, 0.95])), "SGD takes no betas", situation(optimizer("SGD"))),
    ("DSL025", situation(optimizer("Lion", eps=1e-8)), "Lion takes no eps",
     situation(optimizer("Lion", betas=[0.9, 0.9]))),
    ("DSL025", situation(optimizer("Adafactor", scale_parameter=False)), "takes no scale_parameter",
     situation(optimizer("Adafactor", eps=[1e-30, 1e-3]))),
    ("DSL026", situation(optimizer("Adam", betas=[0.9])), "betas [0.9] are not two numbers",
     situation(optimizer("Adam", betas=[0.9, 0.95]))),
    ("DSL026", situation(optimizer("SGD", betas=[0.9, 1.0])), "below 1", situation(optimizer("Adam"))),
    ("DSL027", situation(optimizer("Adam", lr="1e-3x")), "lr is a number", situation(optimizer("Adam", lr=1e-3))),
    ("DSL027", situation(optimizer("SGD", weight_decay=-1)), "at least 0",
     situation(optimizer("SGD", weight_decay=0))),
    ("DSL028", situation(optimizer("OneBitAdam")), "would begin at step 100,000", situation(ONEBIT)),
    ("DSL028", situation(optimizer("ZeroOneAdam", var_freeze_step=1000)), "step 1,000",
     situation(optimizer("ZeroOneAdam", var_freeze_step=999))),
    ("DSL028", situation(optimizer("OneBitAdam")), "nothing", situation(optimizer("OneBitAdam"), steps=None)),
    ("DSL029", situation(optimizer("OneBitAdam", freeze_step=0)), "the loss diverges", situation(optimizer("Adam"))),
    ("DSL030", situation(ONEBIT, world=1), "nobody to send", situation(ONEBIT)),
    ("DSL031", situation({**ONEBIT, "gradient_clipping": 1.0}), "next to no effect",
     situation({**ONEBIT, "gradient_clipping": 0.0})),
    ("DSL032", situation(ONEBIT), "does not restore", situation(optimizer("ZeroOneAdam"))),
    ("DSL033", situation(optimizer("Adam", max_grad_norm=1.0)), "max_grad_norm",
     situation({**optimizer("Adam"), "gradient_clipping": 1.0})),
    ("DSL034", situation(optimizer("OneBitAdam", comm_backend_name="gloo")), "comm_backend_name `gloo`",
     situation(optimizer("OneBitAdam", comm_backend_name="mpi"))),
    ("DSL035", situation({**optimizer("Muon"), **zero(3)}), "ZeRO stage 3",
     situation({**optimizer("muon"), **zero(3, reduce_scatter=False)})),
    ("DSL036", situation(zero(1), client=""), "no optimizer", situation(zero(1))),
    ("DSL037", situation(optimizer("Adam", amsgrad=True)), "no AMSGrad", situation(optimizer("SGD"))),
    ("DSL037", situation(optimizer("Lamb", amsgrad=True)), "no AMSGrad",
     situation(optimizer("Adam", amsgrad=True, torch_adam=True))),
    ("DSL038", situation({"optimizer": {"params": {"lr": 1}}}), "an optimizer without a type", situation(TORCH)),
    ("DSL039", situation(scheduler("ReduceLROnPlateau")), "told no metric", situation(scheduler("LinearLR"))),
    *((id, situation({"scheduler": bad}), says, situation({"scheduler": good})) for id, bad, says, good in [
        ("DSL040", {"params": {}}, "ignores it without a word", {"type": "StepLR", "params": {"step_size": 3}}),
        ("DSL041", {"type": "inverse_sqrt"}, "no scheduler `inverse_sqrt`", {"type": "LRRangeTest", "params": {}}),
        ("DSL041", {"type": ["x"]}, "no scheduler `['x']`", {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}),
        ("DSL042", {"type": "WarmupLR"}, "without params is a TypeError", {"type": "WarmupLR", "params": {}}),
        ("DSL043", {"type": "WarmupCosineLR", "params": {}}, "without total_num_steps",
         {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": 1e-4}}),
        ("DSL043", {"type": "StepLR", "params": {}}, "without step_size",
         {"type": "StepLR", "params": {"step_size": 1}}),
        ("DSL044", {"type": "WarmupLR", "params": {"warmup_steps": 5}}, "WarmupLR takes no warmup_steps: a TypeError",
         {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}),
        ("DSL045", {"type": "WarmupLR", "params": {"warmup_max_lr": "1e-3"}}, "is a number, not the text `1e-3`",
         {"type": "WarmupLR", "params": {"warmup_type": "linear"}}),
        ("DSL046", {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}, "takes 0.001, whatever",
         {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1}}),
        ("DSL047", {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "of at least 1, not `0`",
         {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}),
    ]),
    ("DSL046", situation({**optimizer("Adam", lr=1e-5), **scheduler("WarmupDecayLR", total_num_steps=9)}), "0.001",
     situation({**optimizer("Adam", lr=1e-5), **scheduler("WarmupLR")})),
    ("DSL048", situation(optimizer("Muon", foo=1)), "drops it without a word",
     situation(optimizer("Muon", momentum=0.9))),
    ("DSL049", situation(optimizer("Adam", eps=0)), "divides by zero", situation(optimizer("Adam", eps=1e-8))),
    ("DSL050", situation({"train_batch_size": 32, "gradient_accumulation_steps": 8}), "leaves a micro-batch of 0",
     situation({"train_batch_size": 32, "gradient_accumulation_steps": 8}, world=4)),
    ("DSL050", situation({"train_batch_size": 32, "gradient_accumulation_steps": 8}, world=3),
     "1 per rank x 8 accumulation x 3 ranks = 24", situation({"train_batch_size": 32}, world=None)),
    ("DSL050", situation({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}), "accumulation of 0",
     situation({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, pipeline=2)),
    ("DSL051", situation(zero(3)), "neither train_batch_size nor", situation(zero(3), trainer="hf")),
    ("DSL051", situation({"gradient_accumulation_steps": 2}), "DeepSpeed needs one",
     situation({"train_batch_size": 8})),
    ("DSL052", situation(zero(3)), "DeepSpeed takes 1.0", situation({"gradient_clipping": 0})),
    ("DSL052", situation(zero(3), deepspeed="0.18.9"), "DeepSpeed takes 0 (off)",
     situation({"gradient_clipping": 1})),
    ("DSL053", situation({"gradient_clipping": -1}), "switches clipping off", situation({"gradient_clipping": 0})),
    ("DSL054", situation({**optimizer("Adam", amsgrad=True), **zero(1, offload_optimizer=CPU)}, **OLD),
     "computes without it", situation({**optimizer("Adam"), **zero(1, offload_optimizer=CPU)}, **OLD)),
    ("DSL055", situation(optimizer("Adam", betas=[0.9, 1.0])), "below 1",
     situation(optimizer("Adam", betas=[0.9, 0.9]))),
    ("DSL056", situation({"elasticity": {"enabled": True}}, **OLD), "without max_train_batch_size",
     situation({"elasticity": {}}, **OLD)),
    ("DSL057", situation({"elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1]},
                          "train_batch_size": 8}, **OLD), "elasticity chooses the batch",
     situation({"elasticity": {"enabled": False}, "train_batch_size": 8}, **OLD)),
    ("DSL058", situation({"elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1],
                                         "min_gpus": 9}}, **OLD), "for 9 to", situation({"elasticity": {}}, **OLD)),
    ("DSL059", situation(zero(1, offload_optimizer=CPU)), "has to be DeepSpeedCPUAdam",
     situation({**zero(1, offload_optimizer=CPU), **TORCH})),
    ("DSL060", situation(zero(1, offload_optimizer=CPU), client="AdamW"), "is not DeepSpeedCPUAdam",
     situation(zero(1, offload_optimizer=CPU), client="DeepSpeedCPUAdam")),
    ("DSL060", situation(zero(1, offload_optimizer=CPU), client="Adagrad"), "the program's Adagrad",
     situation(zero(1, offload_optimizer=CPU), client="DeepSpeedCPULion")),
    ("DSL061", situation(zero(2, offload_param=CPU)), "only with ZeRO-3", situation(zero(3, offload_param=CPU))),
    ("DSL062", situation(zero(0, offload_optimizer=CPU)), "only with ZeRO",
     situation(zero(1, offload_optimizer=CPU))),
    ("DSL063", situation(zero(2, offload_optimizer=NVME)), "goes to NVMe only with ZeRO-3",
     situation(zero(3, offload_optimizer=NVME))),
    ("DSL064", situation(zero(3, offload_param={"device": "nvme"})), "needs a directory",
     situation(zero(3, offload_param={"device": "none"}))),
    ("DSL065", situation(zero(2, offload_optimizer={**CPU, "ratio": 0.5})), "ratio 0.5",
     situation(zero(3, offload_optimizer={**CPU, "ratio": 0.5}))),
    ("DSL066", situation(zero(2, offload_optimizer={**CPU, "super_offload": True})), "super_offload is for ZeRO-3",
     situation(zero(3, offload_optimizer={**CPU, "super_offload": True}))),
    ("DSL067", situation(zero(3, offload_optimizer={**CPU, "super_offload": True}), gpus=False), "NVIDIA",
     situation(zero(3, offload_optimizer={**CPU, "super_offload": True}))),
    ("DSL068", situation(zero(3, compute_grad_norm=False)), "is for ZeRO-1 and ZeRO-2",
     situation({**zero(1, compute_grad_norm=False), "gradient_clipping": 0})),
    ("DSL069", situation(zero(1, compute_grad_norm=False)), "needs gradient_clipping 0",
     situation({**zero(1, compute_grad_norm=False), "gradient_clipping": 0})),
    ("DSL070", situation(zero(1, legacy_stage1=True)), "left DeepSpeed in 0.5.9",
     situation(zero(0, legacy_stage1=True))),
    ("DSL071", situation({**zero(3), "gradient_allreduce_op": "sum"}), "does not run with ZeRO-3",
     situation({**zero(2), "gradient_allreduce_op": "sum"})),
    ("DSL072", situation({**zero(1, overlap_comm=True), "managed_gradient_accumulation": False}), "needs ZeRO-2",
     situation({**zero(2, overlap_comm=True), "managed_gradient_accumulation": False})),
    ("DSL073", situation({**zero(2), "prescale_gradients": True}), "reduce_scatter is on",
     situation({**zero(2, reduce_scatter=False), "prescale_gradients": True})),
    ("DSL074", situation(zero(1, stage3_prefetch_bucket_size=5)), "belongs to ZeRO-3",
     situation(zero(3, stage3_prefetch_bucket_size=5))),
    ("DSL074", situation(zero(3, round_robin_gradients=True)), "belongs to ZeRO-1 to 2",
     situation(zero(2, round_robin_gradients=True))),
    ("DSL075", situation(zero(0, zenflow={})), "zenflow belongs to ZeRO", situation(zero(0))),
    ("DSL076", situation(zero(1, zenflow={})), "optimizer on the CPU",
     situation(zero(1, zenflow={}, offload_optimizer=CPU))),
    ("DSL077", situation({"aio": {"use_gds": True}}, gpus=False), "NVIDIA", situation({"aio": {"use_gds": True}})),
    ("DSL078", situation({**TORCH, **zero(1, zenflow={}, offload_optimizer=CPU)}), "torch_adam asks for torch's",
     situation({**optimizer("Adam"), **zero(1, zenflow={}, offload_optimizer=CPU)})),
    ("DSL079", situation({**TORCH, **zero(3, offload_optimizer={**CPU, "ratio": 0.5})}), "DeepSpeedCPUAdam only",
     situation({**optimizer("Adam"), **zero(3, offload_optimizer={**CPU, "ratio": 0.5})})),
    ("DSL080", situation({**FP16, **BF16}), "both enabled", situation({"fp16": {"enabled": False}, **BF16})),
    ("DSL081", situation(FP16, gpus=False), "fp16 does not run on CPU", situation(FP16)),
    ("DSL082", situation({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}), "at stage 0",
     situation({**BF16, "data_types": {"grad_accum_dtype": "fp32"}, **zero(1)})),
    ("DSL083", situation({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}), "needs ZeRO",
     situation({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
                **zero(1, offload_optimizer=CPU), **optimizer("Adam")})),
    ("DSL084", situation({"bf16": {"enabled": True, "bf16_optimizer_states": True}, **zero(1)}), "needs ZeRO and",
     situation({**BF16, **zero(1)})),
    ("DSL085", situation({**BF16, "bfloat16": {}}), "reads bf16 alone", situation({"bfloat16": {"enabled": True}})),
    ("DSL086", situation({"fp16": {"enabled": True, "loss_scale_window": 0}}), "loss_scale_window 0",
     situation({"fp16": {"enabled": False, "loss_scale_window": 0}})),
    ("DSL087", situation({"data_types": {"param_dtype": "bf16"}}), "a model in fp32",
     situation({"data_types": {"param_dtype": "bf16"}, **BF16})),
    ("DSL088", situation({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, **zero(1), **TORCH}),
     "needs the optimizer offloaded", situation({**BF16, **zero(1)})),
    ("DSL090", situation(zero(2), pipeline=2), "does not run with ZeRO-2", situation(zero(1), pipeline=2)),
    ("DSL091", situation({"pipeline": {"enabled": True}}), "does nothing", situation({"pipeline": {}})),
    ("DSL092", situation({"managed_gradient_accumulation": False}, pipeline=2), "does not run with pipelines",
     situation({"managed_gradient_accumulation": False})),
    ("DSL093", situation({"pipeline": {"stages": 4}}), "read and not used",
     situation({"pipeline": {"activation_checkpoint_interval": 1}})),
    ("DSL100", situation(zero(3, zero_hpz_partition_size=3)), "does not divide the 8 ranks",
     situation(zero(3, zero_hpz_partition_size=4))),
    ("DSL101", situation(zero(3, zero_hpz_partition_size=16)), "larger than the 8 ranks",
     situation(zero(3, zero_hpz_partition_size=16), world=None)),
    ("DSL102", situation(zero(3, zero_hpz_partition_size=4), world=16, per_node=8), "on nodes of 8",
     situation(zero(3, zero_hpz_partition_size=8), world=16, per_node=8)),
    ("DSL103", situation(zero(2, zero_hpz_partition_size=8)), "at stage 2",
     situation(zero(3, zero_hpz_partition_size=8))),
    ("DSL104", situation(zero(3, zero_quantized_weights=True), gpus=False), "no CPU implementation",
     situation(zero(3, zero_quantized_weights=True))),
    ("DSL105", situation(zero(3, mics_shard_size=8), gpus=False, **OLD), "MiCS needs NCCL",
     situation(zero(3, mics_shard_size=8), **OLD)),
    ("DSL106", situation(zero(3, zenflow={}, offload_optimizer=CPU), gpus=False), "NVIDIA",
     situation(zero(3, zenflow={}, offload_optimizer=CPU))),
    ("DSL107", situation(zero(3, zero_quantized_gradients=True), per_node=8), "works between nodes",
     situation(zero(3, zero_quantized_gradients=True), world=16, per_node=8)),
    ("DSL110", situation({"checkpoint": {"load_universal": True}}), "stage 0 finds no",
     situation({"checkpoint": {"load_universal": True}, **zero(1)})),
    ("DSL111", situation({"checkpoint": {"writer": {"type": "fast"}}}), "CROSS_RANK",
     situation({"checkpoint": {"writer": None}})),
]  # fmt: skip


@pytest.mark.parametrize(("id", "bad", "says", "good"), TABLE, ids=[f"{row[0]}-{row[2]}" for row in TABLE])
def test_a_rule_finds_one_config_and_lets_another_pass(id, bad, says, good):
    found = [finding for finding in rules.judge(bad) if finding.rule == id]
    assert any(says in finding.message for finding in found), rules.judge(bad)
    assert id not in {finding.rule for finding in rules.judge(good)}


def applied(config, edits):
    """What `lint --fix` makes of a config."""
    for path, value in edits:
        config = json.loads(json.dumps(config))
        section = config
        for key in path[:-1]:
            section = section.setdefault(key, {})
        if value is rules.REMOVE:
            section.pop(path[-1])
        else:
            section[path[-1]] = value
    return config


MENDED = [
    pytest.param(bad, finding, id=f"{id}-{says}")
    for id, bad, says, _ in TABLE
    for finding in rules.judge(bad)
    if finding.rule == id and finding.edits
]


def test_what_is_written_by_fix_is_what_deepspeed_refuses_or_ignores():
    """A setting that runs is somebody's choice; DSL046 adds what is missing, DSL062 needs `stage: 0` in writing."""
    outcomes = {finding.rule: finding.row.outcome for *_, finding in (row.values for row in MENDED)}
    assert {id for id, outcome in outcomes.items() if outcome not in ("refused", "ignored")} == {"DSL046", "DSL062"}
    assert {"DSL001", "DSL061", "DSL068"} <= outcomes.keys()


@pytest.mark.parametrize(("bad", "finding"), MENDED)
def test_what_mends_a_config_mends_it(bad, finding):
    again = rules.judge(replace(bad, config=applied(bad.config, finding.edits)))
    assert (finding.rule, finding.path) not in {(other.rule, other.path) for other in again}


def ids(found: list[rules.Finding]) -> set[str]:
    return {finding.rule for finding in found}


@pytest.mark.parametrize(
    ("world", "more", "fits"),
    [
        (2, {"sequence_parallel_size": 2, "data_parallel_size": 1}, True),
        (8, {"sequence_parallel_size": 2}, False),
        (2, {}, False),
        (2, {"sequence_parallel_size": "2"}, False),
    ],
)
def test_sequence_parallel_ranks_share_a_batch(world, more, fits):
    config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, **more}
    assert ("DSL050" not in ids(rules.judge(situation(config, world=world)))) is fits


@pytest.mark.parametrize("on", [True, "true", 1, "ON", "y"])
@pytest.mark.parametrize("stage", [1, "1"])
def test_a_value_counts_as_what_deepspeed_makes_of_it(on, stage):
    config = {"bf16": {"enabled": on}, **zero(stage, compute_grad_norm=False), "gradient_clipping": 0}
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    found = ids(rules.judge(situation(config)))
    assert "DSL068" in found
    assert ("DSL012" in found) is not (on is True and stage == 1)


def test_conversion_leaves_what_nobody_converts():
    config = {"bf16": {"enabled": "maybe"}, "train_batch_size": "8", **zero("4", sub_group_size="9" * 5000)}
    assert rules.converted(config) == config
    assert rules.converted(zero(1e0, ratio="x")) == zero(1, ratio="x")
    assert rules.converted(zero("2", offload_optimizer={"ratio": "0.5"})) == zero(2, offload_optimizer={"ratio": 0.5})


# a scheduler, what it needs, the parameter, values that end in an exception, values that do not
SCHEDULES = [
    ("WarmupLR", {}, "warmup_min_lr", [None, [], {}], [0, [1e-3], True]),
    ("WarmupLR", {}, "warmup_max_lr", [[], {}], [None, 1]),
    ("WarmupLR", {}, "warmup_num_steps", [None, 0, -1, 2.5, []], [3, True]),
    ("WarmupDecayLR", {"total_num_steps": 9, "warmup_max_lr": 1}, "total_num_steps", [None, [], {}], [0, 9, 9.5]),
    ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 2}, "cos_min_ratio", [None, []], [0, 0.5]),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}, "cycle_first_step_size", [None, 0, -1], [5, 2.5]),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}, "cycle_second_step_size", [-1, []], [None, 0, 5]),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}, "decay_step_size", [None, []], [0, 5]),
    ("LRRangeTest", {}, "lr_range_test_step_size", [None, 0, -1, 2.0, []], [5]),
    ("LRRangeTest", {}, "lr_range_test_step_rate", [None, []], [0, 1.5]),
    ("CosineAnnealingLR", {"T_max": 5}, "T_max", [None, 0, []], [5, 2.5]),
    ("CosineAnnealingLR", {"T_max": 5}, "eta_min", [None, []], [0, 1e-5]),
    ("CosineAnnealingWarmRestarts", {"T_0": 5}, "T_0", [None, 0, 2.5], [5]),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-3}, "step_size_up", [None, 0, []], [5]),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-3}, "step_size_down", [[]], [None, 5]),
    ("LinearLR", {}, "start_factor", [None, 2.5, -1, []], [0.5, 1]),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 50}, "total_steps", [None, 0, 2.5], [50]),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 50}, "div_factor", [None, 0, []], [25]),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 5, "steps_per_epoch": 9}, "epochs", [None], [5]),
    ("PolynomialLR", {}, "power", [None, []], [0, 2.0]),
    ("StepLR", {"step_size": 5}, "step_size", [None, 0, []], [5]),
]


@pytest.mark.parametrize(("kind", "needs", "key", "refused", "runs"), SCHEDULES, ids=str)
def test_a_schedule_computes_with_its_parameters(kind, needs, key, refused, runs):
    for value in [*refused, *runs]:
        found = ids(rules.judge(situation(scheduler(kind, **{**needs, key: value}))))
        assert bool(found & {"DSL043", "DSL045", "DSL047"}) is (repr(value) in map(repr, refused)), value


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "needs", "key", "refused", "runs"), SCHEDULES, ids=str)
def test_the_schedules_themselves_say_so(kind, needs, key, refused, runs):
    torch = pytest.importorskip("torch")
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    of = getattr(schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind)

    def steps(value):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        schedule = of(optimizer, **{**needs, key: value})
        for _ in range(6):
            optimizer.step()
            schedule.step()

    for value in runs:
        steps(value)
    for value in refused:
        with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
            steps(value)


@pytest.mark.parametrize("params", [{"lr": True}, {"lr": False}, {"betas": [0, False]}])
def test_true_and_false_are_numbers_to_an_optimizer(params):
    assert not {"DSL026", "DSL027", "DSL055"} & ids(rules.judge(situation(optimizer("AdamW", **params))))


def test_an_optimizer_without_a_type_is_no_unknown_one():
    found = ids(rules.judge(situation({"optimizer": {"type": None, "params": {}}})))
    assert found & {"DSL038", "DSL020"} == {"DSL038"}


@pytest.mark.parametrize(("release", "said"), [("", True), ("0.19.6", True), ("0.19.8", False)])
def test_what_an_old_release_does_not_restore_is_said_of_that_one(release, said):
    assert ("DSL032" in ids(rules.judge(situation(ONEBIT, deepspeed=release)))) is said


@pytest.mark.parametrize("steps", [10.0, 0, None, -1])
def test_a_warmup_is_a_whole_number_of_steps(steps):
    assert "DSL047" in ids(rules.judge(situation(scheduler("WarmupLR", warmup_num_steps=steps))))


@pytest.mark.parametrize(
    ("path", "own"),
    [
        (("autotuning", "metric"), True),
        (("expert_parallel", "router", "score_func"), True),
        (("pipeline", "stages"), True),
        (("pipeline", "partition"), False),
        (("data_types", "keep_in_fp32_modules"), True),
        (("data_types", "param_dtype"), False),
        (("zero_optimization", "zenflow", "select_strategy"), True),
        (("zero_optimization", "zenflow", "topk_ratio"), False),
        (("train_batch_size",), False),
    ],
)
def test_deepspeed_itself_knows_auto_in_few_places(path, own):
    config = {}
    section = config
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = "auto"
    assert rules.own_auto(path) is own
    said = {finding.rule for finding in rules.judge(situation(config)) if finding.path == path}
    assert bool(said & {"DSL008", "DSL011", "DSL016"}) is not own


OURS = {id: row for id, row in rules.rows().items() if id < "DSL120"}


def test_every_row_has_a_config_above_and_says_what_it_rests_on():
    assert set(OURS) <= {id for id, *_ in TABLE}
    for row in OURS.values():
        assert row.severity in ("error", "warning", "note")
        assert row.outcome in ("refused", "ignored", "differs", "advice")
        assert row.title
        assert row.why.endswith(".")
        assert row.source.startswith(("deepspeed", "torch/"))
        assert not row.fix.endswith(".")


@pytest.mark.slow
def test_every_row_that_a_cpu_can_show_is_in_the_conformance_matrix():
    shown = {finding.rule for cell in cells() for release in cell.releases for finding in findings(cell, release)}
    notes = {id for id, row in OURS.items() if row.severity == "note"}
    assert {id for id, row in OURS.items() if row.proof == "cpu"} - notes - shown == set()


def test_a_config_path_leads_to_the_line_of_the_job_file():
    stage, device = ("zero_optimization", "stage"), ("zero_optimization", "offload_param", "device")
    assert rules.job_path(stage, {}) == ("train", "zero")
    assert rules.job_path(stage, {"zero_optimization": {"stage": 1}}) == ("train", "deepspeed", *stage)
    assert rules.job_path(device, {"zero_optimization": {"stage": 1}}) == ("train", "offload", "parameters")
    assert rules.job_path(("optimizer", "params", "lr"), {}) == ("train", "optimizer", "lr")
    assert rules.job_path(("optimizer", "params", "foo"), {}) == ("train", "optimizer", "params", "foo")
    assert rules.job_path(("wandb", "enabled"), {}) == ("train", "deepspeed", "wandb", "enabled")
    scheduled = {"scheduler": {"type": "WarmupLR"}}
    assert rules.job_path(("scheduler", "params"), scheduled) == ("train", "deepspeed", "scheduler", "params")


Json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(0, 1), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["type", "params", "stage",
        "enabled", "device", "offload_param", "offload_optimizer", "freeze_step"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(sorted(rules.sections()[()].keys)), Json, max_size=5),
    st.sampled_from(["", "0.19.6"]),
)
def test_no_config_breaks_a_rule(config, deepspeed):
    for found in rules.judge(situation(config, deepspeed=deepspeed)):
        assert found.message
        assert found.severity in ("error", "warning", "note")


# --- DeepSpeed's sources ----


def sources() -> Path:
    import importlib.util

    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("DeepSpeed is not installed")
    return Path(found.origin).parent


def _strings(tree: ast.Module) -> dict[str, str]:
    """Names of the module that stand for text."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def keys_deepspeed_reads() -> set[str]:
    """Text by which some module looks into the whole config: param_dict[KEY], KEY in param_dict, .get(KEY)."""
    folder = sources()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [
        *folder.glob("runtime/*.py"), *folder.glob("runtime/*/config*.py"), *folder.glob("runtime/*/constants.py"),
        *folder.glob("runtime/swap_tensor/*.py"), *folder.glob("*/config.py"), *folder.glob("*/constants.py"),
        *folder.glob("utils/*.py"), folder / "__init__.py", *folder.glob("runtime/activation_checkpointing/*.py"),
    ]]  # fmt: skip
    names: dict[str, set[str]] = {}
    for tree in trees:
        for name, text in _strings(tree).items():
            names.setdefault(name, set()).add(text)
    keys: set[str] = set()

    def whole(node: ast.expr) -> bool:
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in ("param_dict", "_param_dict", "config_dict", "monitor_config", "ds_config", "config")

    def text(node: ast.expr) -> set[str]:
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        return names.get(node.id, set()) if isinstance(node, ast.Name) else set()

    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Subscript) and whole(node.value):
            keys |= text(node.slice)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            inside = node.comparators[0]
            inside = inside.func.value if isinstance(inside, ast.Call) and hasattr(inside.func, "value") else inside
            keys |= text(node.left) if whole(inside) else set()
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "get" and isinstance(node.func, ast.Attribute) and whole(node.func.value):
                keys |= text(node.args[0])
            elif called in ("get_scalar_param", "get_list_param", "get_dict_param") and whole(node.args[0]):
                keys |= text(node.args[1])
    return keys


def keys_deepspeed_removed(name: str) -> set[str]:
    tree = ast.parse((sources() / "runtime/config.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return {key.value for key in node.value.keys}
    return set()


TOP = rules.sections()[()]


@pytest.mark.slow
def test_the_table_of_keys_is_what_this_deepspeed_reads():
    from importlib.metadata import version

    read = keys_deepspeed_reads()
    looked_for = {"communication_data_type", "seq_parallel_communication_data_type"}  # through a variable
    monitors = {"tensorboard", "wandb", "csv_monitor", "comet"}  # through a loop
    assert set(TOP.keys) - read - looked_for - monitors - set(TOP.removed) == set()
    config = ast.parse((sources() / "runtime/config.py").read_text(encoding="utf-8"))
    called = {node.attr for node in ast.walk(config) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(config) if isinstance(node, ast.Name)
    }
    constants = _strings(ast.parse((sources() / "runtime/constants.py").read_text(encoding="utf-8")))
    assert len(called & set(constants)) > 30
    if facts.version(version("deepspeed")) >= (0, 19, 8):
        zero_section = rules.sections()[("zero_optimization",)]
        assert keys_deepspeed_removed("_REMOVED_TOP_LEVEL_CONFIG_KEYS") == set(TOP.removed)
        assert keys_deepspeed_removed("_REMOVED_ZERO_CONFIG_KEYS") == set(zero_section.removed)


def test_a_key_that_deepspeed_reads_at_the_top_is_in_the_table():
    """The calls in DeepSpeedConfig._initialize_params, each with the function behind it."""
    folder = sources()
    config = ast.parse((folder / "runtime/config.py").read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for path in [
        *folder.glob("runtime/**/constants.py"),
        *folder.glob("*/constants.py"),
        folder / "runtime/config.py",
    ]:
        names |= _strings(ast.parse(path.read_text(encoding="utf-8")))
    found: set[str] = set()
    for function in (node for node in ast.walk(config) if isinstance(node, ast.FunctionDef)):
        if not function.name.startswith("get_"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "get_scalar_param":
                section, key = node.args[0], node.args[1]
                if isinstance(section, ast.Name) and section.id == "param_dict" and isinstance(key, ast.Name):
                    found.add(names.get(key.id, ""))
    assume_known = found - {""}
    assert len(assume_known) > 15
    assert assume_known <= set(TOP.keys)


def _class(path: str, name: str) -> ast.ClassDef:
    tree = ast.parse((sources() / path).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _pydantic_keys(path: str, name: str) -> dict[str, str]:
    """Names and aliases of a section's fields, each with its annotation."""
    found = {}
    whole = _class(path, name)
    for base in (base.id for base in whole.bases if isinstance(base, ast.Name) and base.id.startswith("Base")):
        found |= _pydantic_keys(path, base)
    for node in whole.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = kind = ast.unparse(node.annotation)
            for word in node.value.keywords if isinstance(node.value, ast.Call) else ():
                if word.arg == "alias":
                    found[word.value.value] = kind
    return found


CLASSES = {
    ".".join(path): section.source.split()
    for path, section in rules.sections().items()
    if section.strict and section.source.startswith("deepspeed/")
}
KINDS = {
    "bool": "bool", "Optional[bool]": "bool?", "str": "text", "Optional[str]": "text?", "Optional[int]": "int?",
    "Optional[Path]": "text?", "OffloadDeviceEnum": "device", "ZeroStageEnum": "stage", "list": "list",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_strict_section_has_the_keys_of_its_class(name):
    """By names and aliases; what is left to the conversion of pydantic is what its class leaves to it."""
    file, kind = CLASSES[name]
    section = rules.sections()[tuple(name.split("."))]
    found = _pydantic_keys(file.removeprefix("deepspeed/"), kind)
    assert set(section.keys) - set(section.removed) == set(found)
    for key, annotation in found.items():
        assert KINDS.get(annotation, section.keys[key]) == section.keys[key], key


OPS = [name for name, row in rules._parameters().items() if row["source"].startswith("deepspeed/ops")]


@pytest.mark.parametrize("name", OPS)
def test_the_parameters_of_an_optimizer_are_those_of_its_class(name):
    """0.19.8's classes; the 1-bit optimizers' are proved where they are installed, by the conformance matrix."""
    row = rules._parameters()[name]
    tree = ast.parse((sources() / row["source"].removeprefix("deepspeed/")).read_text(encoding="utf-8"))
    init = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = {arg.arg for arg in init.args.args[2:]}
    engine = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # taken out before the class sees them
    assert set(row["takes"].split()) - engine == names - engine - {"adamw_mode", "max_grad_norm"}


TORCH_CLASSES = [name for name, row in rules._parameters().items() if row["source"].startswith("torch/")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_the_parameters_of_torchs_optimizers_are_theirs(name):
    torch = pytest.importorskip("torch")
    kind = getattr(torch.optim, name.removeprefix("torch "))
    names = set(inspect.signature(kind.__init__).parameters) - {"self", "params", "decoupled_weight_decay"}
    takes = set(rules._parameters()[name]["takes"].split())
    assert takes - {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "decoupled_weight_decay"} == names


@pytest.mark.slow
@pytest.mark.parametrize("name", rules.TORCH_SCHEDULERS)
def test_the_parameters_of_torchs_schedulers_are_theirs(name):
    torch = pytest.importorskip("torch")
    signature = list(inspect.signature(getattr(torch.optim.lr_scheduler, name).__init__).parameters.values())[2:]
    required, optional = (row.split() for row in rules.TORCH_SCHEDULERS[name])
    assert [p.name for p in signature if p.default is p.empty] == required
    assert {p.name for p in signature if p.default is not p.empty} == set(optional)


@pytest.mark.parametrize("name", rules.SCHEDULERS)
def test_the_parameters_of_a_scheduler_are_those_of_this_deepspeed(name):
    init = next(n for n in _class("runtime/lr_schedules.py", name).body if getattr(n, "name", "") == "__init__")
    names = [arg.arg for arg in init.args.args[2:]]
    required, optional = (row.split() for row in rules.SCHEDULERS[name])
    assert names[: len(names) - len(init.args.defaults)] == required
    assert sorted(names) == sorted([*required, *optional, "last_batch_iteration"])


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=20))
def test_a_key_nobody_reads_is_refused(key):
    assume(key not in TOP.keys)
    (found,) = rules.keys_are_known(situation({key: 1}, **NEW))
    assert found.rule == "DSL001"
    assert key in found.message
    assert rules.job_path(found.path, {key: 1}) == ("train", "deepspeed", key)
