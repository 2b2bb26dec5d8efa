"""Memory per GPU, host and NVMe: worked examples, published runs, what must be monotone, and the accuracy targets."""

import itertools
from dataclasses import replace

import pytest
from accuracy import memory as accuracy
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher import facts
from launcher.facts import Gpu
from launcher.plan import dsconfig, memory
from launcher.plan import shape as shapes
from launcher.plan.setup import Estimate, Part, Setup
from launcher.spec import Lora, Shape

GPT = Shape(layers=96, hidden=12288, heads=96, vocab=51200, positions=2048)  # GPT-3
LLAMA = facts.models()["llama-7b"].shape
LLAMA_13B = facts.models()["llama-13b"].shape
LLAMA_8B = facts.models()["llama-3.1-8b"].shape
LLAMA_70B = facts.models()["llama-70b"].shape
OFFLOAD_13B = Shape(layers=65, hidden=4096, heads=32, vocab=50257, positions=1024)
SMALL = Shape(layers=4, hidden=512, heads=8, vocab=1000, positions=128)


def card(gib: float) -> Gpu:
    return Gpu(f"{gib:g} GiB", gib, 312.0, True, [], "a test")


def parts(estimate: Estimate) -> dict[str, float]:
    return {part.name: part.value for part in estimate.gpu}


# --- model states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "stage", "per_parameter"),
    # Bytes of all tensors of a DeepSpeed 0.19.8 engine after a step, on CPU with two ranks, gradients gone but for
    # stage 3's, which keeps its share: 1 byte per parameter in bf16, 2 in fp32.
    [
        *[("bf16", 0, 14.0), ("bf16", 1, 8.0), ("bf16", 2, 8.0), ("bf16", 3, 8.0 - 1.0)],
        *[("fp32", 0, 12.0), ("fp32", 1, 10.0), ("fp32", 2, 10.0), ("fp32", 3, 10.0 - 2.0)],
    ],
)
def test_states_are_what_the_engine_holds(precision, stage, per_parameter):
    setup = Setup(LLAMA, 128, 2, stage=stage, precision=precision, persistence=0, recompute="full")
    found = parts(memory.estimate(setup))
    held = (found["weights"] + found["optimizer states"]) * memory.GIB
    assert held / shapes.parameters(LLAMA) == pytest.approx(per_parameter, rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "accumulation", "gradient", "per_parameter"),
    [
        (0, 1, "", 2.0 + 8.0),  # in the step: fp32 copies one by one, then a flat one
        (1, 4, "", 2.0),  # whole between micro-batches
        (1, 1, "", 0.25 + 0.75),  # in the step: the share, flat, and in fp32
        (1, 1, "fp32", 4.0 + 2.0),  # fp32 sums beside 16-bit gradients
        (3, 4, "", 0.25),
    ],
)
def test_gradients_by_stage_at_the_fullest_moment(stage, accumulation, gradient, per_parameter):
    """LLaMA 7B, bf16, 8 ranks: with one token the states are the peak, with many the activations."""
    many = accumulation > 1
    setup = Setup(
        LLAMA,
        4096 if many else 1,
        8,
        stage=stage,
        accumulation=accumulation,
        gradient=gradient,
        micro=4 if many else 1,
    )
    found = parts(memory.estimate(setup))
    assert found["gradients"] * memory.GIB / shapes.parameters(LLAMA) == pytest.approx(per_parameter, rel=1e-6)


def test_adapters_alone_have_gradients_and_states():
    """LLaMA 7B with rank 8 on q and v: 4,194,304 trained, 4-bit weights; embeddings and norms stay 16-bit."""
    setup = Setup(LLAMA, 512, 1, lora=Lora(bits=4), recompute="full")
    found = parts(memory.estimate(setup))
    assert found["optimizer states"] * memory.GIB == pytest.approx(12 * 4_194_304)
    tables = 2 * 32000 * 4096 + 65 * 4096
    quantized = shapes.parameters(LLAMA) - tables
    expected = quantized * 4.127 / 8 + 2 * (tables + 4_194_304)
    assert found["weights"] * memory.GIB == pytest.approx(expected, rel=1e-4)


def test_one_bit_errors_and_the_secondary_partition_come_on_top():
    plain = Setup(LLAMA, 512, 16)
    compressed = parts(memory.estimate(replace(plain, onebit=0.2)))["optimizer states"]
    whole = parts(memory.estimate(plain))["optimizer states"]
    count = shapes.parameters(LLAMA)
    assert (compressed - whole) * memory.GIB == pytest.approx(4 * count * (1 + 1 / 16))
    node = parts(memory.estimate(replace(plain, stage=3, hpz=8)))["weights for the node"]
    assert node * memory.GIB == pytest.approx(2 * count / 8)


# --- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "per_width"),
    [  # Korthikanti et al. 2022: equations 1, 2 and 4, and their table 2; 5 a s / h is 80 for GPT-3
        ({}, 34.0),
        ({"attention": "eager"}, 34 + 80.0),
        ({"tensor": 8}, 10 + 24 / 8),
        ({"tensor": 8, "attention": "eager"}, 10 + 24 / 8 + 80 / 8),
        ({"tensor": 8, "attention": "eager", "split_hidden": True}, (34 + 80) / 8),
        ({"attention": "eager", "recompute": "selective"}, 34.0),
        ({"precision": "fp32"}, 2 * 34.0 - 2),  # masks have a byte in any precision
    ],
)
def test_a_gpt_layer_keeps_what_the_paper_says(changes, per_width):
    setup = Setup(GPT, 2048, 64, **changes)
    assert memory.layer_bytes(setup)[0] / GPT.hidden == pytest.approx(per_width)


def test_a_llama_layer_keeps_more_for_its_gate_and_less_with_grouped_heads():
    kept, _ = memory.layer_bytes(Setup(LLAMA, 2048, 8))
    assert kept / LLAMA.hidden == pytest.approx(16 + 8 + 8 * 11008 / 4096)
    grouped, _ = memory.layer_bytes(Setup(replace(LLAMA, kv_heads=8), 2048, 8))
    assert (kept - grouped) / LLAMA.hidden == pytest.approx(4 * 3 / 4)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "accumulation", "alive"),
    [
        (8, 1, 64, [8, 7, 1]),
        (8, 1, 4, [4, 4, 1]),
        (8, 3, 64, [8 * (1 + 7 / 24), 29 / 3, 17 / 3]),  # the paper's factor 1 + (p - 1) / (p v) on the first rank
        (2, 1, 64, [2, 1]),
        (1, 1, 64, [1]),
    ],
)
def test_micro_batches_in_flight(pipeline, virtual, accumulation, alive):
    setup = Setup(GPT, 2048, 64, pipeline=pipeline, virtual=virtual, accumulation=accumulation)
    assert [rank.in_flight for rank in memory.ranks(setup)] == pytest.approx(alive)


@pytest.mark.parametrize(("layers", "inner", "outer"), [(72, 6, 6), (70, 6, 5), (78, 7, 7)])
def test_layers_over_twelve_ranks(layers, inner, outer):
    assert memory.split(layers, 12) == (inner, outer)


def test_the_first_rank_is_fuller_than_the_last_unless_the_vocabulary_weighs():
    setup = Setup(GPT, 2048, 64, pipeline=8, accumulation=64, recompute="full", tensor=8)
    assert "first rank" in memory.estimate(setup).gpu[0].why
    wide = replace(GPT, vocab=2_000_000, layers=8)
    assert "last rank" in memory.estimate(replace(setup, shape=wide, micro=4)).gpu[0].why


def test_a_mixture_of_experts_keeps_what_its_experts_do():
    dense = replace(LLAMA, ffn=14336)
    mixed = replace(dense, experts=8, experts_per_token=2)
    one, two = (memory.layer_bytes(Setup(shape, 2048, 8))[0] for shape in (dense, mixed))
    assert two - one == pytest.approx(2 * (4 * 14336 + 2 * 2 * 4096) + 8 * 8)


# --- hosts and NVMe ---------------------------------------------------------------------------------------


def test_hosts_hold_nothing_unless_something_is_offloaded():
    assert memory.estimate(Setup(LLAMA, 2048, 8, stage=3)).host == ()


def test_a_host_holds_what_a_33b_run_with_all_on_cpu_was_seen_to_need():
    """DeepSpeed issue 3448: LLaMA 33B, 8 GPUs, ZeRO-3 with both offloads, took 750 to 800 GB of host memory."""
    shape = Shape(layers=60, hidden=6656, heads=52, vocab=32000, ffn=17920, gated=True, tied=False, biases=False)
    setup = Setup(
        shape, 2048, 8, stage=3, recompute="full", offload_optimizer="cpu", offload_parameters="cpu", accumulation=8
    )
    assert 700 <= memory.estimate(setup).host_total <= 850


def test_nvme_takes_states_and_gradients_from_the_host():
    """LLaMA 70B: 16 bytes per parameter of states and gradients, 2 of weights; 7B would fit into the swap buffers."""
    cpu = Setup(LLAMA_70B, 2048, 8, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    nvme = replace(cpu, offload_optimizer="nvme", offload_parameters="nvme")
    found = memory.estimate(nvme)
    assert found.nvme_total * memory.GIB == pytest.approx(18 * shapes.parameters(LLAMA_70B))
    assert found.host_total < memory.estimate(cpu).host_total
    assert found.total == memory.estimate(cpu).total


@pytest.mark.parametrize(
    ("model", "ranks", "tensor", "elements", "buffer"),
    [
        ("llama-3.1-8b", 8, 1, 128_256 * 4096 // 8, 100_000_000),
        ("llama-3.1-8b", 2, 1, 128_256 * 4096 // 2, 270_000_000),
        ("llama-70b", 1, 1, 2 * 28672 * 8192, 470_000_000),  # gate and up projection in one
        ("llama-70b", 4, 2, 2 * 28672 * 8192 // 4, 120_000_000),
        ("mixtral-8x7b", 8, 1, 8 * 2 * 14336 * 4096 // 8, 120_000_000),  # the experts of a layer in one
        ("gpt2", 3, 1, 12_865_792, 100_000_000),  # 50,257 x 768 over 3, the last one padded
    ],
)
def test_what_a_buffer_for_parameters_on_nvme_has_to_hold(model, ranks, tensor, elements, buffer):
    setup = Setup(facts.models()[model].shape, 1024, ranks, stage=3, tensor=tensor, offload_parameters="nvme")
    assert memory.largest_partition(setup) == elements
    assert memory.swap_buffer(setup) == buffer
    assert dsconfig.zero(setup, nvme_path="/nvme")["offload_param"] == {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": "/nvme",
        "buffer_size": buffer,
    }


def test_nvme_buffers_and_what_stays_are_counted_on_the_host():
    """LLaMA 70B on 8 GPUs: 5 buffers of 1e8, 1e9 weights per rank that stay, and 4 sub-groups for the optimizer."""
    setup = Setup(LLAMA_70B, 2048, 8, stage=3, offload_optimizer="nvme", offload_parameters="nvme")
    host = {part.name: part.value * memory.GIB / 8 for part in memory.estimate(setup).host}
    assert host["weight buffers"] == pytest.approx(5 * 1e8 * 2)
    assert host["weights"] == pytest.approx(1e9 * 2 * memory.PINNED)
    subgroup = 1e9 + memory.largest_partition(setup)
    assert host["swap buffers"] == pytest.approx(4 * 4 * subgroup)
    assert host["new weights"] == pytest.approx(2 * subgroup)
    one = {part.name: part.value * memory.GIB for part in memory.estimate(replace(setup, world=1)).host}
    assert one["weight buffers"] == pytest.approx(5 * 470_000_000 * 2)


@pytest.mark.parametrize(("bits", "each"), [(16, 2.0), (8, 1.0), (4, 4.127 / 8)])
def test_frozen_weights_have_as_many_bits_on_the_host_as_on_the_gpu(bits, each):
    """LLaMA 7B: all but embeddings and norms is frozen, and its adapters come on top."""
    setup = Setup(LLAMA, 512, 1, stage=3, lora=Lora(bits=bits), offload_parameters="cpu", persistence=0)
    tables = 2 * 32000 * 4096 + 65 * 4096
    expected = each * (shapes.parameters(LLAMA) - tables) + 2 * (tables + 4_194_304)
    host = {part.name: part.value for part in memory.estimate(setup).host}
    assert host["weights"] * memory.GIB == pytest.approx(expected * memory.PINNED, rel=1e-4)
    assert parts(memory.estimate(replace(setup, offload_parameters="none")))["weights"] * memory.GIB == pytest.approx(
        expected, rel=1e-4
    )
    disk = memory.estimate(replace(setup, offload_parameters="nvme")).nvme_total
    assert disk * memory.GIB == pytest.approx(expected, rel=1e-4)


def test_checkpoints_on_the_host_leave_the_gpu():
    full = Setup(LLAMA, 8192, 8, stage=3, recompute="full")
    found, kept = memory.estimate(replace(full, recompute="cpu")), memory.estimate(full)
    moved = {part.name: part.value for part in found.host}["activations"]
    assert moved == pytest.approx(8 * 32 * 8192 * 4096 * 2 / memory.GIB)
    assert kept.total - found.total > 0.9 * moved / 8 * 31 / 32


# --- verdicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "slack", "answer"),
    [
        (66.0, 0.0, "fits"),
        (70.0, 0.0, "tight"),
        (90.0, 0.0, "tight"),
        (92.0, 0.0, "does not fit"),
        (95.0, 9.0, "tight"),
    ],
)
def test_a_verdict_is_as_sure_as_the_estimate(total, slack, answer):
    """80 GiB, of which 77.6 can be had: 66 fits even 15 % off, 92 does not fit even 15 % off."""
    estimate = Estimate((Part("all", total, ""),), error=0.15, slack=slack)
    assert memory.verdict(estimate, card(80)) == answer


@pytest.mark.parametrize(
    ("host", "nvme", "answer"),
    [(0, 0, "fits"), (120, 0, "fits"), (105, 0, "tight"), (99, 0, "does not fit"), (0, 40, "does not fit")],
)
def test_hosts_and_disks_have_a_say_when_their_size_is_known(host, nvme, answer):
    estimate = Estimate((Part("all", 1, ""),), (Part("all", 100, ""),), (Part("all", 50, ""),))
    assert memory.verdict(estimate, card(80), host_gib=host, nvme_gib=nvme) == answer


@pytest.mark.parametrize(("size", "gib"), [("500G", 500), ("64000", 62.5), ("1T", 1024), ("1048576K", 1)])
def test_a_slurm_memory_size(size, gib):
    assert memory.host_gib(size) == gib


# Korthikanti et al. 2022, table 3: layers, width, heads; ranks, pipeline, chunks, micro-batch and how many. Figure 1:
# none fits into 80 GB with all activations kept, all do with split hidden states and attention recomputed.
MEGATRON = {
    "22B": Setup(Shape(48, 6144, 64, 51200, positions=2048), 2048, 8, micro=4),
    "175B": Setup(Shape(96, 12288, 96, 51200, positions=2048), 2048, 64, pipeline=8, virtual=3, accumulation=64),
    "530B": Setup(Shape(105, 20480, 128, 51200, positions=2048), 2048, 280, pipeline=35, virtual=3, accumulation=280),
    "1T": Setup(Shape(128, 25600, 160, 51200, positions=2048), 2048, 512, pipeline=64, accumulation=512),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_the_models_of_the_recomputation_paper(name):
    plain = replace(MEGATRON[name], tensor=8, attention="eager", precision="fp16", gradient="fp32")
    split = replace(plain, split_hidden=True, recompute="selective")
    assert memory.verdict(memory.estimate(plain), card(80)) == "does not fit"
    assert memory.verdict(memory.estimate(split), card(80)) != "does not fit"


FULL = {"recompute": "full", "precision": "fp16"}
RAN = {
    "ZeRO paper: 13B on 128 V100, stage 2": (Setup(OFFLOAD_13B, 1024, 128, stage=2, **FULL), 32),
    "ZeRO-Offload paper: 13B on one V100": (
        Setup(OFFLOAD_13B, 1024, 1, stage=2, offload_optimizer="cpu", **FULL),
        32,
    ),
    "Stanford Alpaca: 7B on 4 A100": (Setup(LLAMA, 512, 4, stage=3, micro=4, accumulation=8), 80),
    "Hugging Face: Llama 2 70B on 16 A100": (Setup(LLAMA_70B, 2048, 16, stage=3, recompute="full"), 80),
    "QLoRA paper: 65B on one 48 GB GPU": (  # its rank 64 pages optimizer states out, which nobody plans
        Setup(replace(LLAMA_70B, ffn=22016, kv_heads=None), 512, 1, recompute="full", lora=Lora(16, "linear", 4)),
        48,
    ),
    "QLoRA: 7B on a 16 GB GPU": (Setup(LLAMA, 512, 1, recompute="full", lora=Lora(8, "linear", 4)), 16),
    "torchtune: LoRA of 8B on a 24 GB GPU": (
        Setup(facts.models()["llama-3.1-8b"].shape, 2048, 1, micro=2, recompute="full", lora=Lora()),
        24,
    ),
}


@pytest.mark.parametrize("name", RAN)
def test_what_papers_report_to_run_is_not_refused(name):
    setup, gib = RAN[name]
    assert memory.verdict(memory.estimate(setup), card(gib)) != "does not fit"


@pytest.mark.parametrize(
    ("setup", "gib"),
    [
        (Setup(LLAMA, 512, 8, recompute="full"), 80),  # 7B, plain data parallelism: 16 bytes per parameter
        (Setup(OFFLOAD_13B, 1024, 1, stage=2, **FULL), 32),
        (Setup(LLAMA_70B, 2048, 8, stage=3, recompute="full"), 80),
        (Setup(LLAMA_13B, 2048, 1, recompute="full", lora=Lora()), 24),
    ],
)
def test_what_cannot_run_is_refused(setup, gib):
    assert memory.verdict(memory.estimate(setup), card(gib)) == "does not fit"


# --- what must be monotone --------------------------------------------------------------------------------

SHAPES = st.sampled_from([LLAMA, LLAMA_13B, OFFLOAD_13B, SMALL, *(row.shape for row in facts.models().values())])
SETUPS = st.builds(
    Setup,
    shape=SHAPES,
    seq_len=st.sampled_from([128, 2048, 8192]),
    world=st.sampled_from([8, 16, 64]),
    micro=st.integers(1, 8),
    accumulation=st.integers(1, 8),
    stage=st.integers(0, 3),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(["none", "selective", "full", "cpu"]),
    attention=st.sampled_from(["flash", "eager"]),
    offload_optimizer=st.sampled_from(["none", "cpu"]),
    lora=st.sampled_from([None, Lora(), Lora(16, "linear", 4)]),
)


@given(SETUPS)
def test_more_ranks_never_hold_more(setup):
    """Once there is a group of data-parallel ranks, with its buffers."""
    assume(setup.shards > 1)
    assert memory.estimate(replace(setup, world=setup.world * 2)).total <= memory.estimate(setup).total * (1 + 1e-9)


@given(SETUPS)
def test_a_higher_stage_never_holds_more_states(setup):
    sizes = [parts(memory.estimate(replace(setup, stage=stage, precision="bf16", pipeline=1))) for stage in range(4)]
    held = [size["weights"] + size.get("optimizer states", 0.0) for size in sizes]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(held))


@given(SETUPS, st.sampled_from(["micro", "seq_len", "accumulation"]))
def test_more_work_at_a_time_never_holds_less(setup, field):
    more = replace(setup, **{field: getattr(setup, field) * 2})
    assert memory.estimate(more).total >= memory.estimate(setup).total * (1 - 1e-9)


@given(SETUPS)
def test_recomputing_never_holds_more(setup):
    ways = [memory.estimate(replace(setup, recompute=way)).total for way in ("none", "full", "cpu")]
    if setup.shape.layers >= 2 * setup.pipeline and setup.lora is None:  # a layer of adapters keeps little
        assert ways[0] >= ways[1] * (1 - 1e-9) >= ways[2] * (1 - 2e-9)


@given(SETUPS)
def test_a_breakdown_has_a_reason_for_every_item(setup):
    found = memory.estimate(setup)
    for part in (*found.gpu, *found.host, *found.nvme):
        assert part.value > 0
        assert part.why
    assert 0 < found.low < found.total < found.high


# --- what to change ---------------------------------------------------------------------------------------


def test_ways_to_fit_begin_with_the_cheapest():
    """LLaMA 7B on 8 GPUs of 80 GiB, ZeRO-1, micro-batch 4: a smaller one is enough, and so is recomputing."""
    setup = Setup(LLAMA, 2048, 8, stage=1, micro=4)
    ways = memory.ways_to_fit(setup, card(80))
    texts = [text for text, _, _ in ways]
    assert texts[0] == "train.micro_batch: 2, train.gradient_accumulation: 2"
    assert "train.activation_checkpointing: true" in texts
    assert ways[0][1].samples == setup.samples


@pytest.mark.parametrize(
    ("setup", "gib", "text"),
    [
        (
            Setup(LLAMA_70B, 4096, 16, micro=2),
            40,
            "train.activation_checkpointing: true, train.zero: 3, train.offload.optimizer: cpu",
        ),
        (Setup(LLAMA, 2048, 8, micro=8), 80, "train.activation_checkpointing: true, train.zero: 1"),
    ],
)
def test_ways_are_taken_together_where_none_is_enough(setup, gib, text):
    """In the order of what they cost, and no more than it takes: the micro-batch stays as it is."""
    ((found, changed, estimate),) = memory.ways_to_fit(setup, card(gib))
    assert found == text
    assert changed.micro == setup.micro
    assert memory.verdict(estimate, card(gib)) == "fits"


def test_nodes_are_added_when_the_host_is_too_small_to_offload():
    setup = Setup(LLAMA_70B, 4096, 16, stage=3, recompute="full")
    texts = [text for text, _, _ in memory.ways_to_fit(setup, card(40), host_gib=200)]
    assert texts == ["resources.nodes: 8"]


@pytest.mark.parametrize(
    ("total", "texts"),
    [
        (128, ["resources.nodes: 8"]),
        (48, ["train.parallel.sequence: 4, resources.nodes: 8"]),  # 64 replicas cannot share 48 samples, 16 can
    ],
)
def test_nodes_are_offered_only_where_the_batch_can_be_divided(total, texts):
    setup = Setup(LLAMA_70B, 4096, 16, stage=3, recompute="full", accumulation=total // 16)
    ways = memory.ways_to_fit(setup, card(40), host_gib=200, total=total)
    assert [text for text, _, _ in ways] == texts
    assert all(changed.samples == total for _, changed, _ in ways)


@pytest.mark.parametrize(
    ("tokens", "world", "texts"),
    [
        (131_072, 8, ["train.parallel.sequence: 8", "train.seq_len: 16384"]),
        (262_144, 16, ["train.parallel.sequence: 16", "train.seq_len: 16384"]),  # two whole nodes
        (1_048_576, 8, ["train.seq_len: 16384"]),
    ],
)
def test_long_sequences_are_split_or_cut_and_no_nodes_are_bought_for_them(tokens, world, texts):
    """Llama 3.1 8B with ZeRO-3 and recomputation: 8 GPUs of 80 GiB take 2^17 tokens only with 8 sequence ranks."""
    setup = Setup(LLAMA_8B, tokens, world, stage=3, recompute="full", accumulation=4)
    ways = memory.ways_to_fit(setup, card(80))
    assert [text for text, _, _ in ways] == texts
    cut = ways[-1][1]
    assert memory.verdict(memory.estimate(replace(cut, seq_len=cut.seq_len * 2)), card(80)) != "fits"
    assert all(changed.samples == setup.samples for _, changed, _ in ways)


def test_a_sequence_is_split_over_what_divides_its_heads():
    """12 heads: 2, 4 and no 8; over a pipeline nothing."""
    setup = Setup(replace(SMALL, heads=12, hidden=768), 4096, 16)
    degrees = [changed.sequence for _, changed in memory._sequence_over_ranks(setup)]
    assert degrees == [2, 4]
    assert list(memory._sequence_over_ranks(replace(setup, pipeline=2))) == []


def test_steps_taken_together_end_in_one_line_per_key():
    """LLaMA 70B on one node of 40 GiB: to NVMe at once, not to the host first; accumulation as it ends."""
    rungs = [memory._smaller, memory._optimizer_to_cpu, memory._optimizer_to_nvme, memory._sequence_over_ranks]
    setup = Setup(LLAMA_70B, 4096, 8, stage=3, micro=4, accumulation=2)
    text, changed = memory._climb(setup, rungs, [0, -1, -1, 0])
    assert text == (
        "train.micro_batch: 2, train.gradient_accumulation: 8, train.offload.optimizer: nvme, "
        "train.parallel.sequence: 2"
    )
    assert (changed.accumulation, changed.samples) == (8, setup.samples)


@pytest.mark.slow
@given(SETUPS, st.sampled_from([16, 40, 80]), st.sampled_from([None, 96, 1024]))
def test_every_way_offered_is_as_good_as_it_says(setup, gib, total):
    ways = memory.ways_to_fit(setup, card(gib), total=total)
    as_long = [(changed, estimate) for _, changed, estimate in ways if changed.seq_len == setup.seq_len]
    assert len({memory.verdict(estimate, card(gib)) for _, estimate in as_long}) <= 1
    assert len({text for text, _, _ in ways}) == len(ways)
    for text, changed, estimate in ways:
        keys = [line.split(": ")[0] for line in text.split(", ")]
        assert len(set(keys)) == len(keys)
        assert all(key.startswith(("train.", "resources.")) for key in keys)
        assert estimate == memory.estimate(changed)
        assert memory.verdict(estimate, card(gib)) != "does not fit"
        if changed.world > setup.world and total:
            assert changed.samples == total


# --- accuracy ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_accuracy_targets_hold():
    assert accuracy.misses() == []


def test_the_shipped_constants_are_the_fitted_ones():
    fitted = accuracy.fit()
    assert fitted.communicator == pytest.approx(memory.FITTED.communicator)
    assert fitted.fragments == pytest.approx(memory.FITTED.fragments)


def test_nine_of_ten_measurements_are_inside_the_band():
    assert accuracy.inside(accuracy.rows()) >= 0.9


def test_the_estimate_beats_counting_states():
    by_name = {one.name.split(",")[0]: one for one in accuracy.scores()}
    ours, theirs = by_name["ours"], by_name["DeepSpeed's estimators"]
    assert ours.median < theirs.median / 5
    assert ours.called_fits < theirs.called_fits
