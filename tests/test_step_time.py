"""The step-time model: volumes by hand, what follows from physics, and the checkpoint interval."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import pytest

from launcher import facts
from launcher.plan import checkpoint, step_time
from launcher.plan.setup import Machine, Setup
from launcher.plan.shape import parameters
from launcher.spec import Lora, Resources, Shape
from tests.accuracy import throughput

LLAMA_7B = Shape(layers=32, hidden=4096, heads=32, ffn=11008, vocab=32000, gated=True, tied=False, biases=False)
LLAMA_8B = replace(LLAMA_7B, kv_heads=8, ffn=14336, vocab=128256)
MIXTRAL = replace(LLAMA_7B, kv_heads=8, ffn=14336, experts=8, experts_per_token=2)
BERT = Shape(layers=24, hidden=1024, heads=16, vocab=30522, positions=512, kind="encoder")
T5 = Shape(layers=24, hidden=1024, heads=16, ffn=4096, vocab=32128, kind="encoder-decoder", decoder_layers=24)
A100 = Machine(facts.gpu("a100"), 160.0)
BASE = Setup(LLAMA_7B, 2048, 64, 8, micro=2, accumulation=4, stage=1)
P = parameters(LLAMA_7B)


def seconds(setup: Setup, machine: Machine = A100) -> float:
    return step_time.predict(setup, machine).seconds


def part(setup: Setup, name: str, machine: Machine = A100) -> float:
    return sum(p.value for p in step_time.predict(setup, machine).parts if p.name == name)


# --- volume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({"stage": 0}, 2),
        ({"stage": 1}, 2),
        ({"stage": 1, "accumulation": 16}, 2),
        ({"stage": 2}, 5),  # m + 1
        ({"stage": 2, "accumulation": 1}, 2),
        ({"stage": 3}, 12),  # 3m
        ({"stage": 3, "quantized_weights": True}, 8),  # (0.5 + 0.5 + 1)m
        ({"stage": 3, "hpz": 8}, 8),  # the backward gather stays inside
        ({"stage": 3, "hpz": 8, "quantized_weights": True, "quantized_gradients": True}, 3),  # (0.5 + 0 + 0.25)m
        ({"stage": 0, "onebit": 0.0}, 2 / 16),
        ({"stage": 0, "onebit": 0.2}, 2 * (0.2 + 0.8 / 16)),
        ({"stage": 0, "onebit": 0.0, "precision": "fp32"}, 2 * 2 / 32),  # elements of 4 bytes, counted in 2
    ],
)
def test_what_data_parallel_ranks_send(changes, elements):
    sent = step_time.volume(replace(BASE, **changes))
    assert sent.data == pytest.approx(elements * P * 2 * 63 / 64)
    assert sent.total == pytest.approx(sent.data + sent.gather_node)


def test_adapters_send_their_own_gradients_and_zero_3_still_gathers_everything():
    lora = replace(BASE, lora=Lora(rank=8, targets="qv"))
    adapters = 32 * 2 * 8 * (4096 + 4096)
    assert step_time.volume(lora).data == pytest.approx(2 * adapters * 2 * 63 / 64)
    third = step_time.volume(replace(lora, stage=3))
    assert third.gather == pytest.approx(2 * 4 * P * 2 * 63 / 64)
    assert third.reduce == pytest.approx(4 * adapters * 2 * 63 / 64)


@pytest.mark.parametrize(("recompute", "times"), [("none", 4), ("selective", 4), ("full", 6)])
def test_tensor_parallelism_sends_activations_of_every_layer(recompute, times):
    setup = replace(BASE, tensor=8, recompute=recompute)
    tokens = 2 * 2048 * 4
    assert step_time.volume(setup).tensor == pytest.approx(times * 32 * tokens * 4096 * 2 * 2 * 7 / 8)


def test_pipeline_and_sequence_parallelism_send_activations():
    tokens = 2 * 2048 * 4
    assert step_time.volume(replace(BASE, pipeline=4)).pipeline == pytest.approx(2 * tokens * 4096 * 2 * 3 / 4)
    ulysses = replace(BASE, shape=LLAMA_8B, sequence=4)
    out_and_back = 2 * 32 * 2 * (4096 + 1024) * tokens / 4 * 2 * 3 / 4
    assert step_time.volume(ulysses).sequence == pytest.approx(out_and_back)


def test_hpz_gathers_inside_the_node_what_it_no_longer_gathers_between_nodes():
    sent = step_time.volume(replace(BASE, stage=3, hpz=8))
    assert sent.gather_node == pytest.approx(4 * P * 2 * 7 / 8)


def test_one_rank_sends_nothing():
    assert step_time.volume(replace(BASE, world=1, stage=3)).total == 0


# --- work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "products"),
    [
        (LLAMA_7B, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
        (LLAMA_8B, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)),
        (MIXTRAL, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336)),
        (BERT, 24 * 12 * 1024**2),
        (T5, 24 * 12 * 1024**2 + 24 * 16 * 1024**2),
    ],
)
def test_one_token_multiplies_by_every_weight_it_meets(shape, products):
    assert step_time.work(shape).products == products


def test_model_flops_of_gpt_3_are_the_published_formula():
    """96 B s l h^2 (1 + s/6h + V/16lh), three quarters of it without recomputation (2104.04473, equation 3)."""
    shape = throughput.GPT_175
    h, layers, s, vocab = 12288, 96, 2048, 51200
    published = 72 * 1536 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    found = step_time.model_flops(shape, seq_len=s, tokens=1536 * s)
    assert found == pytest.approx(published, rel=1e-9)


def test_frozen_weights_need_four_flops_instead_of_six():
    full = step_time.predict(replace(BASE, accumulation=1), A100)
    lora = step_time.predict(replace(BASE, accumulation=1, lora=Lora()), A100)
    assert 0.62 < lora.model_flops / full.model_flops < 0.72
    assert lora.seconds < 0.85 * full.seconds


# --- time ----------------------------------------------------------------------------------------------------


def test_parts_add_up_and_say_why():
    made = step_time.predict(replace(BASE, tensor=2, pipeline=2, recompute="full"), A100)
    assert made.seconds == pytest.approx(sum(p.value for p in made.parts))
    assert all(p.value > 0 and p.why for p in made.parts)
    assert made.tokens == 2 * 4 * 16 * 2048
    assert 0.2 < made.mfu < 0.7


def test_a_known_run_is_met_within_a_tenth():
    """MosaicML: MPT-7B, ZeRO-3, 8 x A100-80GB, 6 samples of 2,048 tokens twice: 4,641 tokens/s/GPU."""
    shape = Shape(layers=32, hidden=4096, heads=32, vocab=50368, biases=False)
    made = step_time.predict(Setup(shape, 2048, 8, 8, micro=6, accumulation=2, stage=3), A100)
    assert made.tokens_per_s_per_gpu == pytest.approx(4641, rel=0.1)


def test_zero_2_pays_for_accumulation_and_zero_1_does_not():
    slow = replace(A100, node=10.0)
    assert seconds(replace(BASE, stage=2), slow) > 1.2 * seconds(BASE, slow)
    once = replace(BASE, accumulation=1)
    assert seconds(replace(once, stage=2), slow) == pytest.approx(seconds(once, slow), rel=0.01)


def test_a_slower_network_never_makes_a_step_faster():
    for stage in (0, 1, 2, 3):
        times = [seconds(replace(BASE, stage=stage), replace(A100, node=node)) for node in (1, 3, 10, 30, 100, 300)]
        assert times == sorted(times, reverse=True)


def test_doubling_the_gpus_gains_nothing_once_messages_are_all_that_counts():
    """The global batch stays: half the micro-batch on twice the GPUs, at a bandwidth that hides nothing."""
    slow = replace(A100, node=2.0)
    one = seconds(replace(BASE, stage=3, micro=4, accumulation=1), slow)
    two = seconds(replace(BASE, stage=3, world=128, accumulation=1), slow)
    assert two == pytest.approx(one, rel=0.05)


def test_tensor_groups_share_the_nics_of_their_node():
    """8 groups with one rank on a node get an eighth each, and send an eighth: as long as one group of all."""
    slow = replace(A100, node=2.0)
    apart = replace(BASE, tensor=8, micro=16)
    ratio = part(apart, "gathering weights", slow) / part(BASE, "gathering weights", slow)
    assert ratio == pytest.approx((7 / 8) / (63 / 64), rel=0.01)


def test_full_recomputation_costs_about_a_forward_pass():
    assert 1.25 < seconds(replace(BASE, recompute="full")) / seconds(BASE) < 1.37


def test_the_bubble_is_the_textbook_share():
    """4 stages, 8 micro-steps: (4 - 1) / 8 of the work; half of it with 2 chunks per stage."""
    setup = replace(BASE, pipeline=4, accumulation=8, shape=replace(LLAMA_7B, vocab=256), recompute="full")
    names = ("matrix products", "attention", "element-wise kernels", "logits and loss", "recomputation")
    made = step_time.predict(setup, A100)
    done = sum(p.value for p in made.parts if p.name in names)
    assert part(setup, "pipeline bubble") / done == pytest.approx(3 / 8, rel=0.01)
    assert part(replace(setup, virtual=2), "pipeline bubble") / done == pytest.approx(3 / 16, rel=0.01)


def test_small_micro_steps_wait_for_the_host():
    tiny = Setup(BERT, 64, 8, 8, micro=1, stage=0)
    busy = part(tiny, "matrix products") + part(tiny, "attention") + part(tiny, "element-wise kernels")
    assert part(tiny, "launching kernels") > busy
    assert part(replace(tiny, seq_len=512, micro=64), "launching kernels") == 0


def test_fp32_runs_at_the_rate_of_its_own_units():
    """A100: 19.5 TFLOP/s in fp32, 156 with TF32, 312 in bf16."""
    ratio = part(replace(BASE, precision="fp32"), "matrix products") / part(BASE, "matrix products")
    assert ratio == pytest.approx(16, rel=0.05)
    assert step_time.predict(replace(BASE, precision="tf32"), A100).peak == 156e12


def test_offload_costs_its_transfers_and_adam_on_the_cpu():
    """6.7e9 parameters on 8 GPUs of one node: Adam at 8e9 a second takes 0.84 s, on 8 cores 4.2 s."""
    setup = replace(BASE, world=8, stage=2, offload_optimizer="cpu")
    two_sockets = part(setup, "offload")
    assert two_sockets == pytest.approx(P / 8e9 + P / 8 * 2 / 24e9, rel=0.1)
    eight_cores = part(setup, "offload", replace(A100, cpus=8))
    assert eight_cores - two_sockets == pytest.approx(P / 1.6e9 - P / 8e9, rel=0.01)
    nvme = replace(setup, stage=3, offload_optimizer="nvme")
    assert part(nvme, "offload") == pytest.approx(2 * 12 * P / 5e9, rel=0.1)
    assert part(replace(setup, stage=3, offload_parameters="cpu"), "offload") > two_sockets
    assert seconds(replace(BASE, recompute="cpu")) > seconds(replace(BASE, recompute="full"))


def test_a_note_says_what_the_numbers_leave_out():
    odd = step_time.predict(replace(BASE, shape=replace(LLAMA_7B, hidden=3456)), A100)  # heads of 108
    assert any("width 108" in note for note in odd.notes)
    slow = replace(BASE, stage=3)
    assert any("GB/s per node" in note for note in step_time.predict(slow, replace(A100, node=5.0)).notes)
    assert step_time.predict(slow, replace(A100, node=5.0, measured=True)).notes == ()
    assert any("cpus_per_node" in n for n in step_time.predict(replace(slow, offload_optimizer="cpu"), A100).notes)


def test_every_gpu_of_the_table_gives_a_plausible_step():
    setup = Setup(BERT, 512, 8, 8, micro=16, stage=1, precision="fp16")
    for gpu in facts.gpus().values():
        made = step_time.predict(setup, Machine(gpu, 10.0))
        assert 0.05 < made.mfu < 0.75, gpu.name


def test_a_prediction_takes_less_than_a_tenth_of_a_millisecond():
    setup = replace(BASE, stage=3, tensor=2, recompute="full")
    best = min(_timed(setup) for _ in range(20))
    assert best < 100e-6


def _timed(setup: Setup) -> float:
    start = perf_counter()
    for _ in range(20):
        step_time.predict(setup, A100)
    return (perf_counter() - start) / 20


# --- bandwidth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "gpu", "fabric", "rate", "measured", "says"),
    [
        ({"bandwidth": 87.5, "network": 1600}, "a100", "infiniband", 87.5, True, "as measured"),
        ({"network": 1600}, "a100", "infiniband", 160, False, "1600 Gbit/s per node x 0.8 = 160 GB/s"),
        ({"network": 100}, "a100", "ethernet", 10, False, "100 Gbit/s"),
        ({}, "a100", "infiniband", 160, False, "assumed 1600 Gbit/s"),
        ({}, "h100", "infiniband", 320, False, "assumed 3200 Gbit/s"),
        ({}, "a100", "efa", 35, False, "assumed 400 Gbit/s"),
        ({}, "l4", "infiniband", 20, False, "assumed 200 Gbit/s"),
        ({}, "h100", None, 320, False, "resources.fabric is not given"),
        ({}, "rtx4090", None, 10, False, "plain Ethernet"),
    ],
)
def test_bandwidth_is_measured_or_given_or_assumed_and_says_which(resources, gpu, fabric, rate, measured, says):
    row = facts.fabric(fabric) if fabric else None
    found = step_time.bandwidth(Resources(**resources), facts.gpu(gpu), row)
    assert found[0] == pytest.approx(rate)
    assert found[1] is measured
    assert says in found[2]


# --- compression ---------------------------------------------------------------------------------------------

ONEBIT = Setup(BERT, 128, 64, 4, micro=16, accumulation=4, stage=0, precision="fp16", attention="eager")
ZERO3 = Setup(
    Shape(layers=43, hidden=6144, heads=48, vocab=50257, positions=1024), 1024, 384, 16,
    micro=1, stage=3, precision="fp16", recompute="full", attention="eager",
)  # fmt: skip
V100 = Machine(facts.gpu("v100"), 0.51)


def test_one_bit_adam_gains_what_was_published_on_slow_ethernet():
    """2102.02888: 3.3x over a BERT-Large pre-training at 4.1 Gbit/s, at most 1.74x at 32."""
    (way,) = step_time.candidates(ONEBIT)
    assert gain(ONEBIT, way.setup, V100) == pytest.approx(3.3, rel=0.2)
    assert gain(ONEBIT, way.setup, replace(V100, node=4.0)) < 1.74


def gain(base, other, machine):
    return step_time.fastest([base], machine) / step_time.fastest([other], machine)


def test_zero_plus_plus_gains_what_was_published():
    """2306.10209, 384 V100s: 1.28 to 1.36x at 1,000 tokens per GPU and 400 Gbit/s; up to 2.2x at 100 Gbit/s."""
    plain, *_, whole = [way.setup for way in step_time.candidates(ZERO3)]
    assert gain(ZERO3, whole, replace(V100, node=40.0)) == pytest.approx(1.32, abs=0.1)
    assert gain(ZERO3, whole, replace(V100, node=10.0)) == pytest.approx(2.2, rel=0.2)
    assert gain(ZERO3, plain, replace(V100, node=10.0)) > 1.15


def test_the_flip_point_is_where_the_gain_is_just_worth_it():
    for base, machine in ((ONEBIT, V100), (ZERO3, V100)):
        for way in step_time.candidates(base):
            flip = step_time.flip_point([base], [way.setup], machine)
            assert flip is not None
            assert gain(base, way.setup, replace(machine, node=flip)) == pytest.approx(1.15, abs=0.01)
            assert gain(base, way.setup, replace(machine, node=flip / 2)) > 1.15
            assert gain(base, way.setup, replace(machine, node=flip * 2)) < 1.15


def test_where_nothing_is_sent_nothing_is_compressed():
    alone = replace(ONEBIT, world=4)
    assert step_time.candidates(alone) == []
    assert step_time.flip_point([ONEBIT], [ONEBIT], V100) is None
    assert [way.name for way in step_time.candidates(BASE)] == []
    assert step_time.candidates(replace(ONEBIT, onebit=0.2)) == []
    assert step_time.candidates(replace(ZERO3, hpz=8)) == []


def test_only_hpz_leaves_the_numbers_alone():
    assert [way.lossy for way in step_time.candidates(ZERO3)] == [False, True, True]
    assert [way.lossy for way in step_time.candidates(ONEBIT)] == [True]


# --- accuracy ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_published_runs_are_met_as_promised(capsys):
    assert throughput.main() == 0, capsys.readouterr().out


def test_the_rows_are_read_as_they_were_run():
    data = throughput.rows(throughput.DATA / "throughput.tsv")
    assert len(data) == 204
    assert {row.group for row in data} >= {"bloom", "megatron sc21", "llm-foundry a100-40gb"}
    for row in data:
        assert row.setup.tensor * row.setup.pipeline * row.setup.replicas == row.setup.world


# --- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "write", "restart", "interval", "share"),
    [
        (16, 40, 300, 8119, 0.990),
        (128, 120, 600, 4908, 0.947),
        (128, 5, 60, 1015, 0.990),
        (512, 120, 600, 2418, 0.886),
        (512, 5, 60, 506, 0.978),
        (1024, 300, 900, 2596, 0.747),
        (1024, 5, 60, 357, 0.968),
        (2048, 120, 600, 1169, 0.747),
        (2048, 0.2, 60, 51, 0.983),
        (4096, 300, 900, 1203, 0.477),
    ],
)
def test_the_best_interval_and_its_goodput(nodes, write, restart, interval, share):
    """6.5 failures per 1,000 node-days; intervals and shares from a simulation of the same process."""
    mttf = 86400 / (nodes * 6.5e-3)
    found = checkpoint.best_interval(write=write, mttf=mttf)
    assert found == pytest.approx(interval, rel=0.01)
    best = checkpoint.goodput(found, write=write, restart=restart, mttf=mttf)
    assert best == pytest.approx(share, abs=0.0011)
    for other in (0.7, 1.4):
        assert checkpoint.goodput(found * other, write=write, restart=restart, mttf=mttf) < best


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({}, 14),
        ({"precision": "fp32"}, 12),
        ({"optimizer_state": 4}, 10),
    ],
)
def test_a_checkpoint_holds_weights_their_copy_and_states(changes, each):
    assert checkpoint.size(replace(BASE, **changes)) == each * P


def test_a_checkpoint_of_adapters_holds_the_frozen_weights_once():
    adapters = 32 * 2 * 8 * (4096 + 4096)
    assert checkpoint.size(replace(BASE, lora=Lora())) == 2 * P + 14 * adapters


def test_the_advice_counts_in_steps_and_names_what_it_assumed():
    made = checkpoint.advise(BASE, nodes=8, step_seconds=7.0)
    assert made.steps is not None
    assert made.seconds == made.steps * 7.0
    assert made.write_seconds == pytest.approx(14 * P / (8 * 1.2e9))
    assert made.notes == ()
    assert "assumed: resources.storage" in made.why
    assert "assumed: resources.node_mttf" in made.why
    known = checkpoint.advise(BASE, nodes=8, write_gb_per_s=50, node_mttf_days=300)
    assert known.steps is None
    assert known.notes == ()
    assert known.goodput > made.goodput
    assert "50 GB/s" in known.why


def test_a_slow_write_is_told_against_the_time_the_signal_leaves():
    slow = {"nodes": 8, "write_gb_per_s": 0.5, "node_mttf_days": 150, "step_seconds": 10.0}  # 189 s
    late = checkpoint.advise(BASE, warn_before_end=120, **slow)
    assert late.problem is not None
    assert late.problem.at == ("slurm", "warn_before_end")
    enough = int(late.problem.hint.rsplit(" ", 1)[1])
    tight = checkpoint.advise(BASE, warn_before_end=enough - 60, **slow)
    assert tight.problem is not None
    assumed = checkpoint.advise(BASE, warn_before_end=30, nodes=8, step_seconds=10.0)  # refuses nothing
    assert assumed.problem is None
    assert len(assumed.notes) == 1
    good = checkpoint.advise(BASE, warn_before_end=enough, **slow)
    assert good.problem is None
    assert good.notes == ()


def test_hopeless_numbers_end_in_zero_rather_than_in_an_overflow():
    made = checkpoint.advise(BASE, nodes=100_000, write_gb_per_s=0.001, node_mttf_days=0.01)
    assert made.goodput == 0
