"""A sample of the conformance matrix: what our rules say of a config is what DeepSpeed does with it."""

from __future__ import annotations

import pytest
from conformance.cells import NEW, cells
from conformance.verdicts import compare

SAMPLE = (
    """
AdamW at stage 3|SGD at stage 2|SGD at stage 2, untested allowed|no optimizer at stage 3|OneBitAdam at stage 0
torch AdamW, max_grad_norm 1.0|Adafactor, scale_parameter False|scheduler without a type
WarmupDecayLR with lr 1e-5 and no warmup_max_lr|WarmupLR with lr 1e-5 and no warmup_max_lr
batch on 2: total 8, micro absent, accumulation 8|batch on 2: total 8, micro 2, accumulation absent
stage 2, parameters on cpu, torch AdamW|stage 0, optimizer on cpu, torch AdamW
stage 3, parameters to nvme without a path, torch AdamW|stage 1, small buckets|stage 0, small buckets
stage 1, compute_grad_norm off|fp16 at stage 1|bf16 weights, fp32 gradients at stage 0
pipeline at stage 2|pipeline at stage 1|pipeline.enabled on a plain module|hpZ 3 on 4|hpZ 8 on 4|hpZ 2 at stage 1
: gradient_checkpointing|zero_optimization: overlap_com|activation_checkpointing: enabled|auto: bf16.enabled
auto: gradient_clipping|removed key elasticity|prescale_gradients 'false'|clipping left out
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.slow
def test_deepspeed_does_what_the_rules_say():
    pytest.importorskip("deepspeed")
    chosen = [cell for cell in cells() if cell.name in SAMPLE]
    assert {cell.name for cell in chosen} == set(SAMPLE)
    answers = list(compare(chosen, NEW))
    assert [(cell.name, differences) for cell, _, differences in answers if differences] == []
    verdicts = [answer["verdict"] for _, answer, _ in answers]
    assert verdicts.count("ran") >= 12
    assert verdicts.count("refused") >= 12


def test_the_matrix_is_large_and_its_names_are_unique():
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names) >= 1000
