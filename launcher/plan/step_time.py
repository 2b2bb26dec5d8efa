"""How long one optimizer step takes: matrix products, memory traffic, messages, and what hides behind what.

Every part is work divided by a rate of the GPU's or the network's table row. The seven `Constants` are the shares of
those rates that training jobs reach; `tests/accuracy/throughput.py` fits them and scores the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import log2

from launcher import facts
from launcher.plan import shape as shapes
from launcher.plan.setup import Machine, Part, Setup, StepTime
from launcher.record import record
from launcher.spec import Resources, Shape


@record
class Constants:
    """Fitted on 204 published runs (tests/accuracy/data/throughput.tsv), each within physical bounds."""

    matmul: float = 0.947  # of the rate that a large matrix product reaches alone (gpus.yaml)
    elementwise: float = 1.05  # of the counted traffic between kernels
    flash: float = 0.651  # TFLOP/s per unit and GHz in fused attention, on the scores that a mask leaves
    wave: float = 0.438  # waves of tiles that a matrix product loses at its end
    blocking: float = (
        1.5e-4  # seconds that a tensor-parallel all-reduce takes beyond its bytes: launch, meeting, ramp
    )
    contention: float = 0.6  # of a hidden message's time that shows all the same
    jitter: float = 0.00719  # waiting for the slowest, for every doubling of nodes


SHIPPED = Constants()

# Not fitted; each from what it says.
MEMORY = 0.85  # of the data sheet's memory bandwidth: what STREAM-like kernels reach on A100 and H100
TILE = 128 * 256  # elements of a product that one unit computes at a time (cuBLAS's and hipBLASLt's usual tile)
LAUNCH = 5e-6  # seconds to launch one kernel from PyTorch, at best
KERNELS = 20  # of one layer's forward pass; the backward pass has twice as many
HOP = 1e-6  # seconds for one hop inside a node
ADAM_NODE = 8e9  # parameters a second that CPU Adam updates on two sockets (ZeRO-Offload, table 4: 10e9 in 1.0 s)
ADAM_CORE = 0.2e9  # and per core (the same table, 48 cores)
NVME_NODE = 5.0  # GB/s of one node's NVMe, both ways mixed: one to two drives of PCIe gen 4
FUSED = 0.75  # of the matrix rate: the most that fused attention reaches (FlashAttention-3, long sequences)
BESIDE = 0.15  # of a copy to or from the host that shows beside compute: the first and last buffers of a pass
CLIPPING = 4  # bytes per gradient element read once more for its norm
COMPRESS = 40  # bytes of traffic per element to pack a 1-bit message with its error feedback
QUANTIZE = 6  # bytes of traffic per element to quantize and restore a ZeRO++ message


@record
class Volume:
    """Bytes that one GPU sends in a step, bus-bandwidth convention: a ring's, so an all-reduce counts twice."""

    gather: float = 0.0  # weights of ZeRO, between nodes where the group spans them
    gather_node: float = 0.0  # weights that hpZ gathers inside a node
    reduce: float = 0.0  # gradients
    tensor: float = 0.0
    sequence: float = 0.0
    pipeline: float = 0.0

    @property
    def data(self) -> float:
        return self.gather + self.reduce

    @property
    def total(self) -> float:
        return self.data + self.gather_node + self.tensor + self.sequence + self.pipeline


def volume(setup: Setup) -> Volume:
    """1e9 parameters in bf16 on very many ranks, in GB: ZeRO-1 sends 4, ZeRO-2 in m micro-steps 2(m + 1), ZeRO-3 6m.

    ZeRO-0 sends 4 too (an all-reduce is a reduce-scatter and an all-gather); the 1-bit optimizers a sixteenth of it
    once they compress; qwZ halves what ZeRO-3 gathers, hpZ keeps the backward pass's gather inside the node, qgZ
    quarters what is reduced.
    """
    element = setup.element
    ranks = setup.shards
    ring = (ranks - 1) / ranks
    weights = work(setup.shape).weights / (setup.tensor * setup.pipeline)
    trained = (
        shapes.adapter_parameters(setup.shape, setup.lora) / (setup.tensor * setup.pipeline)
        if setup.lora
        else weights
    )
    m = setup.accumulation
    gather = gather_node = reduce = 0.0
    if setup.stage <= 1:
        reduce = gather = trained
        if setup.stage == 1 and setup.precision == "bf16" and setup.gradient == "fp32":
            reduce = 2 * trained  # DeepSpeed's BF16_Optimizer all-reduces where ZeRO-1 would reduce-scatter
        if setup.onebit < 1:
            share = setup.onebit + (1 - setup.onebit) / (8 * element)
            reduce, gather = reduce * share, gather * share
    elif setup.stage == 2:
        reduce, gather = m * trained, trained
    else:
        once = weights * (0.5 if setup.quantized_weights else 1.0)
        gather = m * once * (1 if setup.hpz > 1 else 2)
        if setup.hpz > 1:
            gather_node = m * weights * (setup.hpz - 1) / setup.hpz
        reduce = m * trained * (0.25 if setup.quantized_gradients else 1.0)
    layers = (setup.shape.layers + setup.shape.decoder_layers) / setup.pipeline
    tokens = m * setup.micro * setup.seq_len / setup.sequence
    hidden = tokens * setup.shape.hidden * element
    tensor = sequence = pipeline = 0.0
    if setup.tensor > 1:
        times = 6 if setup.recompute in ("full", "cpu") else 4
        tensor = times * layers * hidden * 2 * (setup.tensor - 1) / setup.tensor
    if setup.sequence > 1:
        q, kv = shapes.head_widths(setup.shape)
        times = 3 if setup.recompute in ("full", "cpu") else 2
        sent = 2 * (q + kv) * tokens * element / setup.tensor
        sequence = times * layers * sent * (setup.sequence - 1) / setup.sequence
    if setup.pipeline > 1:
        pipeline = 2 * hidden * setup.virtual * (setup.pipeline - 1) / setup.pipeline
    travels = {"fp32": 4, "bf16": 2, "fp16": 2}.get(setup.communication, element)
    return Volume(gather * ring * element, gather_node * element, reduce * ring * travels, tensor, sequence, pipeline)


@record
class Work:
    """What one token meets in all layers: widths of matrices, traffic between them. Counts over the whole model."""

    products: float  # sum of inner x outer width: multiply-adds of one token
    inner_whole: float  # sums of widths, of matrices split by column: the input is whole on every tensor rank
    outer_split: float
    inner_split: float  # and split by row: the output is whole
    outer_whole: float
    matrices: float
    whole: float  # elements moved by norms and residuals, which every tensor rank does
    split: float  # elements moved by activations and rotations, which tensor ranks share
    scores: float  # multiply-adds of attention per token and key: 2 x heads x head_dim x layers
    pairs: float  # heads x layers: scores of one token and one key
    causal: float  # share of the scores that a mask leaves
    stack: int  # layers
    layer_weights: float  # all experts
    weights: int  # of the whole model


@lru_cache(maxsize=64)
def work(shape: Shape) -> Work:
    """LLaMA 7B multiplies 32 x 202,375,168 times for a token, attention and output embeddings aside."""
    h = shape.hidden
    q, kv = shapes.head_widths(shape)
    up = 2 if shape.gated else 1  # matrices into the MLP
    width = shapes.ffn(shape)
    experts = shape.experts
    used = [shape.expert_ffn or width] * shape.experts_per_token if experts else [width]
    if experts and shape.shared_ffn:
        used.append(shape.shared_ffn)
    stack, crossed = shape.layers, shape.decoder_layers
    layers, attentions = stack + crossed, stack + 2 * crossed  # a decoder layer attends to the encoder too
    # (inner width, outer width, how many): split by column, then by row
    columns = [(h, q + 2 * kv, attentions), *((h, up * inner, layers) for inner in used)]
    across = [(q, h, attentions), *((inner, h, layers) for inner in used)]
    # Every expert that has tokens is a kernel of its own, not only the ones that a token visits.
    kernels = max(experts / shape.experts_per_token, 1.0) if experts else 1.0
    activations = sum((up + 2) * inner for inner in used)
    causal = {"decoder": 0.5, "encoder": 1.0}.get(shape.kind, (stack + 1.5 * crossed) / attentions)
    return Work(
        products=sum(i * o * n for i, o, n in (*columns, *across)),
        inner_whole=kernels * sum(i * n for i, _, n in columns),
        outer_split=kernels * sum(o * n for _, o, n in columns),
        inner_split=kernels * sum(i * n for i, _, n in across),
        outer_whole=kernels * sum(o * n for _, o, n in across),
        matrices=sum(n for _, _, n in (*columns, *across)),
        whole=10 * h * layers
        + 5 * h * crossed
        + sum(i * n for i, _, n in columns)
        + sum(o * n for _, o, n in across),
        split=activations * layers
        + 2 * (q + kv) * attentions
        + sum(o * n for _, o, n in columns)
        + sum(i * n for i, _, n in across),
        scores=2 * q * attentions,
        pairs=shape.heads * attentions,
        causal=causal,
        stack=layers,
        layer_weights=shapes.parameters(shape) - shape.vocab * h * (1 if shape.tied else 2),
        weights=shapes.parameters(shape),
    )


def model_flops(shape: Shape, *, seq_len: int, tokens: float, frozen: bool = False) -> float:
    """Of one step, no recomputation counted: 6 per weight that multiplies (4 if frozen) and 12 x layers x width x
    seq_len for attention, the whole square as published figures count it. LLaMA 7B at 2048: 42.9e9 per token."""
    done = work(shape)
    return tokens * ((4 if frozen else 6) * (done.products + shape.vocab * shape.hidden) + 6 * done.scores * seq_len)


def peak(setup: Setup, gpu: facts.Gpu) -> float:
    """FLOP/s of one GPU at the setup's precision. `tf32` is what fp32 becomes where PyTorch is told to allow it."""
    rates = {"fp32": gpu.fp32, "tf32": gpu.tf32 or gpu.fp32}
    return 1e12 * (rates.get(setup.precision) or gpu.peak)


def predict(setup: Setup, machine: Machine, constants: Constants = SHIPPED) -> StepTime:
    """LLaMA 7B, ZeRO-3, 8 x A100-80GB, 4 samples of 2048 tokens a GPU: 1.7 s, 4,750 tokens/s/GPU."""
    shape, gpu, k = setup.shape, machine.gpu, constants
    done = work(shape)
    element = setup.element
    t, p, m = setup.tensor, setup.pipeline, setup.accumulation
    full = setup.recompute in ("full", "cpu")
    n = setup.micro * setup.seq_len / setup.sequence  # tokens of one micro-step on one GPU
    top = peak(setup, gpu)
    rate = top * gpu.matmul * k.matmul
    memory = gpu.hbm * 1e12 * MEMORY
    # Output elements idle in a product's last wave; a product smaller than a wave is cut into smaller tiles.
    lost = k.wave * min(gpu.units * TILE, n * (done.products / done.matrices) ** 0.5 / t)
    scale = element / memory

    # Matrix products of one micro-step on one GPU: 2 x inner x (output + what the last wave leaves idle).
    products = n * done.products / t
    forward = 2 * (products + lost * (done.inner_whole + done.inner_split / t)) / rate
    to_inputs = 2 * (products + lost * (done.outer_split / t + done.outer_whole)) / rate
    to_weights = 2 * (products + lost * done.matrices * n) / rate
    held = done.layer_weights / t
    reading = held * scale
    frozen = setup.lora is not None
    multiply_f = max(forward, reading)
    multiply_b = max(to_inputs, reading) + (0.0 if frozen else max(to_weights, reading))

    # Traffic between them: the backward pass moves twice the elements.
    moved = n * (done.whole + done.split / t)
    if setup.lora is not None:
        moved += n * _adapter_traffic(shape, setup.lora.targets) / t
        if setup.lora.bits < 16:
            unpack = held * (setup.lora.bits / 8 + 2 * element) / memory
            multiply_f, multiply_b = multiply_f + unpack, multiply_b + unpack
    element_f = k.elementwise * moved * scale
    element_b = 2 * element_f

    # Attention itself.
    pairs = n * setup.seq_len / t
    head = shape.head_dim or shape.hidden // shape.heads
    if setup.attention == "eager":
        # Scores, softmax and dropout travel through memory: 6 passes forward, 10 backward, a byte of mask each way.
        # Tensor cores want rows of 16 bytes: heads of another width are multiplied without them.
        aligned = element == 4 or head % 8 == 0
        products_rate = rate if aligned else rate * gpu.fp32 / gpu.peak
        scores = done.pairs * pairs
        attention_f = 2 * done.scores * pairs / products_rate + scores * (6 * element + 1) / memory
        attention_b = 4 * done.scores * pairs / products_rate + scores * (10 * element + 1) / memory
    else:
        fused = min(k.flash * 1e12 * gpu.units * gpu.clock, FUSED * rate)
        padded = -(-head // 32) * 32 / head  # fused kernels know widths in steps of 32
        attention_f = 2 * done.scores * padded * pairs * done.causal / fused
        attention_b = 2.5 * attention_f  # computes the scores once more

    # The host launches kernels no faster than this; a small micro-step waits for it.
    launched = LAUNCH * KERNELS * done.stack
    idle_f = max(0.0, launched - multiply_f - element_f - attention_f)
    idle_b = max(0.0, 2 * launched - multiply_b - element_b - attention_b)
    again = multiply_f + element_f + attention_f + idle_f if full else 0.0
    if setup.recompute == "selective":
        again = attention_f

    # Output embeddings and loss; not recomputed.
    vocab = n * shape.vocab / t
    logits = (4 if frozen else 6) * vocab * shape.hidden / rate + vocab * (6 * element + 12) / memory

    sent = volume(setup)
    bus = gpu.bus * 1e9
    # Tensor ranks sit beside each other: inside a node as long as they fit.
    inside = bus if t <= setup.per_node else min(bus, machine.node * 1e9)
    messages = (6 if full else 4) * done.stack if t > 1 else 0
    tensor = sent.tensor / (m * inside) * p if t > 1 else 0.0
    tensor += messages * k.blocking
    apart = bus if t * setup.sequence <= setup.per_node else min(bus, machine.node * 1e9 / setup.per_node)
    sequence = sent.sequence / (m * apart) * p if setup.sequence > 1 else 0.0

    # One micro-step through all stages, and the stages' share of it.
    stages = (
        ("matrix products", multiply_f + multiply_b),
        ("attention", attention_f + attention_b),
        ("element-wise kernels", element_f + element_b),
        ("launching kernels", idle_f + idle_b),
        ("logits and loss", logits),
        ("recomputation", again),
        ("tensor-parallel all-reduce", tensor),
        ("sequence-parallel all-to-all", sequence),
    )
    micro = sum(seconds for _, seconds in stages)
    bubble = pipe = 0.0
    if p > 1:
        # The last stage has the logits too; meanwhile the others have time for their messages.
        slowest = (micro - logits) / done.stack * -(-done.stack // p) + logits
        spare = m * (slowest - micro / p)
        bubble = spare + (p - 1) / setup.virtual * micro / p
        pipe = max(0.0, _pipeline(setup, machine, sent.pipeline) - spare)

    # Weights and gradients of the data-parallel group.
    wide, hops = _group(setup, machine)
    forward_share = (multiply_f + element_f + attention_f + idle_f + logits / 3 + (tensor + sequence) / 3) / p
    backward_share = micro / p - forward_share
    gather, reduce, on_wire, compressing = _exchange(
        setup, machine, sent, wide, hops, forward_share, backward_share, memory, k
    )

    # The optimizer, and what lives on the host.
    weights = done.weights / (t * p)
    trained = shapes.adapter_parameters(shape, setup.lora) / (t * p) if setup.lora else weights
    shard = trained / setup.shards if setup.stage >= 1 else trained
    if setup.offload_optimizer == "none":
        bytes_each = 2 * (setup.optimizer_state + (4 if element == 2 else 0)) + 3 * element + CLIPPING
        update = shard * bytes_each / memory
    else:
        update = 0.0
    if m > 1:
        update += m * trained / (setup.shards if setup.stage >= 2 else 1) * _accumulation(setup) / memory
    offload = _offload(setup, machine, shard, weights, backward_share, forward_share) if _offloads(setup) else 0.0
    if setup.recompute == "cpu":
        offload += 2 * m * n * shape.hidden * element * done.stack / p / (gpu.pcie * 1e9)

    nodes = max(setup.world / setup.per_node, 1.0)
    working = m * micro / p + bubble + pipe + gather + reduce + compressing + update + offload
    parts = [Part(name, m * seconds / p, WHY[name]) for name, seconds in stages if seconds]
    rest = (
        ("pipeline bubble", bubble),
        ("pipeline transfers", pipe),
        ("gathering weights", gather),
        ("reducing gradients", reduce),
        ("compressing messages", compressing),
        ("optimizer", update),
        ("offload", offload),
        ("waiting for the slowest", k.jitter * log2(nodes) * working),
    )
    parts += [Part(name, seconds, WHY[name]) for name, seconds in rest if seconds]
    tokens = setup.samples * setup.seq_len
    return StepTime(
        parts=tuple(parts),
        tokens=tokens,
        world=setup.world,
        model_flops=model_flops(shape, seq_len=setup.seq_len, tokens=tokens, frozen=frozen),
        peak=top,
        volume=sent.total,
        communication=on_wire + m * (tensor + sequence) / p + pipe,
        notes=_notes(setup, machine, gather + reduce, working),
    )


WHY = {
    "matrix products": "6 FLOPs per weight and token (4 with frozen weights) at the rate large products reach",
    "attention": "scores and their sums; with a mask fused kernels compute half of them",
    "element-wise kernels": "norms, residuals, activations: traffic through the GPU's memory",
    "launching kernels": "the micro-step is too small to keep the GPU busy: the host launches kernels one by one",
    "logits and loss": "the output embeddings' product and the softmax over the vocabulary",
    "recomputation": "the forward pass once more, for the activations that were not kept",
    "tensor-parallel all-reduce": "two per layer and pass; nothing hides them",
    "sequence-parallel all-to-all": "heads for tokens and back, around every attention",
    "pipeline bubble": "stages wait for the first and the last micro-batch, and for the slowest stage",
    "pipeline transfers": "activations and their gradients from stage to stage",
    "gathering weights": "ZeRO's all-gather, as far as it is not hidden behind compute",
    "reducing gradients": "reduce-scatter or all-reduce of gradients, as far as not hidden behind the backward pass",
    "compressing messages": "quantizing, packing and restoring what is sent",
    "optimizer": "reads and writes of gradients, moments and weights; gradients added up over micro-steps",
    "offload": "transfers to and from the host or NVMe, and Adam on the CPU, as far as not hidden",
    "waiting for the slowest": "every doubling of nodes adds a node that may be late",
}


def _accumulation(setup: Setup) -> int:
    """Bytes of traffic per parameter to add a micro-step's gradients to the sum: 6 in bf16, 18 into fp32.

    An fp32 sum of 16-bit gradients is a copy (read 2, write 4) and an addition (read 8, write 4).
    """
    element = setup.element
    return 18 if element == 2 and setup.gradient == "fp32" else 3 * element


def _adapter_traffic(shape: Shape, targets: str) -> float:
    """Elements that the adapters read and write for one token: their input, and the sum with the frozen output."""
    h = shape.hidden
    q, kv = shapes.head_widths(shape)
    width = shapes.ffn(shape)
    pairs = {"qv": [(h, q), (h, kv)], "attention": [(h, q), (h, kv), (h, kv), (q, h)]}.get(targets)
    if pairs is None:
        pairs = [(h, q), (h, kv), (h, kv), (q, h), *[(h, width)] * (2 if shape.gated else 1), (width, h)]
    # reads the input, and adds its product to the frozen one's output
    return (shape.layers + shape.decoder_layers) * sum(i + 2 * o for i, o in pairs)


def _group(setup: Setup, machine: Machine) -> tuple[float, float]:
    """GB/s that one data-parallel group reaches, and the seconds of its ring's hops.

    Tensor ranks are neighbours, so each of a node's NICs serves as many groups as there are tensor ranks on it:
    8 x A100 nodes of 160 GB/s give 20 GB/s to each of the groups that tensor parallelism of 8 leaves.
    """
    bus = machine.gpu.bus * 1e9
    ranks = setup.tensor * setup.shards
    if ranks <= setup.per_node:
        return bus, setup.shards * HOP
    rings = min(setup.tensor, setup.per_node)
    return min(bus, machine.node * 1e9 / rings), ranks / setup.per_node * machine.latency + setup.shards * HOP


def _exchange(
    setup: Setup,
    machine: Machine,
    sent: Volume,
    wide: float,
    hops: float,
    forward: float,
    backward: float,
    memory: float,
    k: Constants,
) -> tuple[float, float, float, float]:
    """Seconds exposed gathering and reducing, seconds on the wire, and seconds compressing."""
    if setup.shards == 1:
        return 0.0, 0.0, 0.0, 0.0
    m = setup.accumulation
    weights = work(setup.shape).weights / (setup.tensor * setup.pipeline)
    layers = setup.shape.layers + setup.shape.decoder_layers
    node = machine.gpu.bus * 1e9
    compressing = 0.0
    if setup.stage == 3:
        # A layer's matrices travel together as far as the prefetch bucket holds them, and a large one alone.
        stack = layers / setup.pipeline
        matrices = work(setup.shape).matrices / setup.pipeline
        messages = max(stack, min(matrices, weights / max(setup.prefetch_bucket, 1)))
        passes = 1 if setup.hpz > 1 else 2
        first = sent.gather / passes / m / wide + messages * hops
        again = sent.gather_node / m / node if setup.hpz > 1 else first
        back = sent.reduce / m / wide + messages * hops
        compressing = m * QUANTIZE * weights * (setup.quantized_weights + setup.quantized_gradients) / memory
        on_wire = m * (first + again + back)
        if not setup.overlap or setup.pipeline > 1:
            return m * (first + again), m * back, on_wire, compressing
        shown_f = max(first - forward, k.contention * first)
        shown_b = max(again + back - backward, k.contention * (again + back))
        share = back / (again + back)
        return m * (shown_f + shown_b * (1 - share)), m * shown_b * share, on_wire, compressing
    trained = weights
    if setup.lora:
        trained = shapes.adapter_parameters(setup.shape, setup.lora) / (setup.tensor * setup.pipeline)
    messages = max(1.0, trained / max(setup.reduce_bucket, 1))
    gather = sent.gather / wide + max(1.0, trained / max(setup.allgather_bucket, 1)) * hops
    reductions = m if setup.stage == 2 else 1
    once = sent.reduce / reductions / wide + messages * hops
    if setup.onebit < 1:
        compressing = (1 - setup.onebit) * COMPRESS * trained / memory
    if setup.stage == 0:
        # One all-reduce after the last backward pass: the engine hides nothing of it.
        return 0.0, gather + once, gather + once, compressing
    shown = once
    if setup.overlap and setup.pipeline == 1:
        shown = max(once - backward, k.contention * once)
    return gather, reductions * shown, gather + reductions * once, compressing


def _pipeline(setup: Setup, machine: Machine, sent: float) -> float:
    """Tensor ranks each send their part of an activation, over the NICs of their node."""
    crosses = setup.tensor * setup.shards >= setup.per_node
    wide = machine.node * 1e9 if crosses else machine.gpu.bus * 1e9
    together = setup.per_node / setup.tensor if crosses else 1.0
    hops = 2 * setup.virtual * setup.accumulation * (machine.latency if crosses else HOP)
    return sent * together / wide + hops


def _offloads(setup: Setup) -> bool:
    return setup.offload_optimizer != "none" or setup.offload_parameters != "none"


def _offload(setup: Setup, machine: Machine, shard: float, weights: float, backward: float, forward: float) -> float:
    """13e9 parameters, states of 8 GPUs on the host: 1.6 s of Adam, and 0.14 s to fetch the weights back.

    Gradients leave during the backward pass; Adam starts when the last has arrived; the new weights come back.
    Weights on the host or NVMe are fetched for each pass, by every rank its shard, beside the compute.
    """
    element = setup.element
    link = machine.gpu.pcie * 1e9
    m, ranks = setup.accumulation, min(setup.per_node, setup.world)
    disk = NVME_NODE * 1e9 / ranks
    seconds = 0.0
    if setup.offload_optimizer != "none":
        cores = ADAM_CORE * machine.cpus if machine.cpus else ADAM_NODE
        out = shard * element / link
        adam = shard * ranks / min(ADAM_NODE, cores)
        back = shard * element / link
        if setup.offload_optimizer == "nvme":
            traffic = 2 * shard * (setup.optimizer_state + 4) / disk
            adam = max(adam, traffic)
        gradients = m if setup.stage >= 2 else 1
        seconds += gradients * max(out - backward, BESIDE * out) + adam + back
    if setup.offload_parameters != "none":
        fetch = weights / setup.shards * element / (disk if setup.offload_parameters == "nvme" else link)
        seconds += m * (max(fetch - forward, BESIDE * fetch) + max(fetch - backward, BESIDE * fetch))
        if setup.offload_parameters == "nvme":
            seconds += weights / setup.shards * element / disk  # the new weights are written once
    return seconds


def _notes(setup: Setup, machine: Machine, exposed: float, working: float) -> tuple[str, ...]:
    notes = []
    if exposed > 0.3 * working and setup.world > setup.per_node and not machine.measured:
        notes.append(
            f"{exposed / working:.0%} of the step waits for the network, at an assumed {machine.node:.4g} GB/s "
            "per node: a preflight measures it (resources.bandwidth)"
        )
    if setup.offload_optimizer != "none" and not machine.cpus:
        notes.append("Adam on the CPU is counted with two sockets per node: resources.cpus_per_node says how many")
    if setup.precision == "fp32" and machine.gpu.tf32:
        notes.append("fp32 without tensor cores; where the program allows TF32, products run faster")
    head = setup.shape.head_dim or setup.shape.hidden // setup.shape.heads
    if head % 8:
        # BLOOM's trials (chronicles-prequel.md:739, 740): heads of 108 instead of 144 cost a quarter of the speed.
        notes.append(f"heads of width {head} miss the tensor cores: a multiple of 8, better of 64, runs faster")
    if setup.shape.kind == "encoder-decoder":
        notes.append("encoder and decoder are both counted at seq_len")
    return tuple(notes)


def bandwidth(resources: Resources, gpu: facts.Gpu, fabric: facts.Fabric | None) -> tuple[float, bool, str]:
    """GB/s of bus bandwidth between nodes per node, whether it was measured, and why that number.

    network: 1600 over InfiniBand is 1600 / 8 x 0.8 = 160 GB/s.
    """
    if resources.bandwidth is not None:
        return resources.bandwidth, True, f"{resources.bandwidth:g} GB/s per node, as measured (resources.bandwidth)"
    usual = facts.fabric("infiniband")
    row = fabric or (usual if gpu.arch in usual.nominal and gpu.bus >= 100 else facts.fabric("ethernet"))
    share = row.efficiency
    if resources.network is not None:
        found = resources.network / 8 * share
        return found, False, f"{resources.network:g} Gbit/s per node x {share:g} = {found:.4g} GB/s"
    gbit = row.gbits(gpu)
    found = gbit / 8 * share
    named = row.title if fabric else f"{row.title}, since resources.fabric is not given"
    return found, False, f"assumed {gbit:g} Gbit/s per node ({named}) x {share:g} = {found:.4g} GB/s"


# --- compression ---------------------------------------------------------------------------------------------

GAIN = 1.15  # compression that wins less is not worth what it costs in trust


@record
class Candidate:
    name: str
    setup: Setup
    lossy: bool  # changes what is computed, so it needs the user's word


def candidates(setup: Setup) -> list[Candidate]:
    """The compressed ways beside a setup: ZeRO++ for ZeRO-3 over several nodes, 1-bit Adam without ZeRO."""
    if setup.world <= setup.per_node or setup.lora is not None:
        return []
    if setup.stage == 3 and setup.hpz == 1:
        near = replace(setup, hpz=setup.per_node)
        weights = replace(near, quantized_weights=True)
        both = replace(weights, quantized_gradients=True)
        return [
            Candidate("ZeRO++ hpZ", near, False),
            Candidate("ZeRO++ hpZ, qwZ", weights, True),
            Candidate("ZeRO++ hpZ, qwZ, qgZ", both, True),
        ]
    if setup.stage == 0 and setup.pipeline == 1 and setup.onebit == 1:
        return [Candidate("1-bit Adam", replace(setup, onebit=facts.WARM), True)]
    return []


def fastest(setups: Iterable[Setup], machine: Machine) -> float:
    """Seconds per token of the best of them."""
    times = (predict(setup, machine) for setup in setups)
    return min(time.seconds / time.tokens for time in times)


def flip_point(plain: Sequence[Setup], compressed: Sequence[Setup], machine: Machine) -> float | None:
    """GB/s per node below which the best compressed way is GAIN times faster than the best plain one.

    None where no network is slow enough, infinity where none is too fast. BERT-Large on 64 V100s, 4 a node,
    4,096 samples of 128 tokens: 1-bit Adam below 14 GB/s. Bisection: less bandwidth makes the network's share
    of a step larger.
    """
    low, high = 1e-3, 1e4

    def wins(node: float) -> bool:
        other = replace(machine, node=node)
        return fastest(plain, other) >= GAIN * fastest(compressed, other)

    if not wins(low):
        return None
    if wins(high):
        return math.inf
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low
