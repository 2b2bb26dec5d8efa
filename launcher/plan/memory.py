"""Bytes on a GPU, on a host and on its NVMe: what a setup holds at its fullest moment, item by item.

The peak is the largest over the pipeline's ranks (the first has the embeddings and most micro-batches in flight,
the last the logits) and over three moments: the end of the forward pass, the end of the backward pass, and the
optimizer step. What DeepSpeed allocates was read in 0.19.8: runtime/zero/stage_1_and_2.py, zero/stage3.py,
bf16_optimizer.py, fp16/fused_optimizer.py. Activations follow Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from launcher.facts import Gpu
from launcher.plan import shape as shapes
from launcher.plan.setup import Estimate, Part, Setup, Verdict
from launcher.record import record
from launcher.spec import Shape
from launcher.spec.words import mebibytes

Rung = Callable[[Setup], Iterator[tuple[str, Setup]]]
GIB = 1 << 30


@record
class Constants:
    """What no formula gives: fitted on measured runs, see tests/accuracy/memory.py."""

    context: float = 1.0  # GiB: the CUDA context, kernels, cuBLAS workspaces; set, the runs cannot tell it apart
    communicator: float = 1.0  # GiB of NCCL buffers per group: data, tensor, each pipeline neighbour, ...
    fragments: float = 0.14  # of what comes and goes: what the allocator holds and nobody uses


FITTED = Constants()
# Relative error of the band's ends: of what is counted (weights, states), and of what is modelled (all else). Nine of
# ten measured runs are inside.
COUNTED = 0.02
MODELLED = 0.2
# Of a GPU's memory as sold; an 80 GiB A100 reports 79.2 GiB, a 40 GiB one 39.4, and the driver takes some.
USABLE = 0.97
# Of a host's memory: the operating system, file caches and data loaders want some.
HOST_USABLE = 0.9

# Elements, DeepSpeed's defaults: stage3_max_reuse_distance, sub_group_size, plain data parallelism's bucket;
# offload_param's max_in_cpu, which stay on the host even with NVMe.
REUSE = 1e9
SUBGROUP = 1e9
PLAIN_BUCKET = 5e8
KEPT = 1e9
# Buffers of offload_param on NVMe: buffer_count and buffer_size, in elements; ours grows in steps.
SWAP_BUFFERS = 5
SWAP_SIZE = 100_000_000
SWAP_STEP = 10_000_000
# Buffers of offload_optimizer on NVMe, each as large as a sub-group.
SWAP_COUNT = 4
# torch rounds page-locked memory up to a power of two: on average over all sizes to 1/ln 2 times as much. The NVMe
# swapper's own buffers are page-locked without torch, and not rounded.
PINNED = 1.44
# GiB of a training process on its host, model aside: PEFT's README measured 2.96 with a 3B model on the GPU.
PROCESS = 3.0
# Bytes of a frozen weight: int8, and NF4 with double quantization at 4.127 bits (Dettmers et al. 2023, section 3).
QUANTIZED = {8: 1.0, 4: 4.127 / 8}
# Per logit in bf16: itself, its fp32 copy, its softmax and the gradient. A fused loss keeps 4 of these bytes.
LOGIT = {2: 14.0, 4: 12.0}
FUSED = 4.0
GRADIENT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}


def estimate(setup: Setup, constants: Constants = FITTED) -> Estimate:
    """GiB per GPU, per host and on its NVMe."""
    size = setup.element
    peaks = [_peak(setup, rank, size, constants) for rank in ranks(setup)]
    rank, items = max(peaks, key=lambda peak: sum(peak[1].values()))
    total = sum(items.values())
    counted = items["weights"] + items["weights for the node"] + items["optimizer states"]
    slack = items["fragments"] + items["logits"] * (1 - FUSED / LOGIT[size])
    return Estimate(
        gpu=tuple(Part(name, held / GIB, _why(name, setup, rank)) for name, held in items.items() if held),
        host=_host(setup, size),
        nvme=_nvme(setup),
        error=(COUNTED * counted + MODELLED * (total - counted)) / total,
        slack=slack / GIB,
    )


def verdict(estimate: Estimate, gpu: Gpu, *, host_gib: float = 0, nvme_gib: float = 0) -> Verdict:
    """Fits: the band's upper end does. Does not fit: even its lower end does not. 0 means: nobody said how much."""
    usable = gpu.memory * USABLE
    short = (host_gib and estimate.host_total > host_gib) or (nvme_gib and estimate.nvme_total > nvme_gib)
    if estimate.low > usable or short:
        return "does not fit"
    if estimate.high > usable or (host_gib and estimate.host_total > host_gib * HOST_USABLE):
        return "tight"
    return "fits"


def host_gib(size: str) -> float:
    """What Slurm's --mem says, in GiB: 500G is 500, and a number alone counts MiB."""
    return mebibytes(size) / 1024


# --- what a rank of the pipeline holds --------------------------------------------------------------------


@record
class Rank:
    """Elements of one tensor-parallel slice, its layers, and the micro-batches whose activations it holds at once."""

    name: str
    weights: float
    trained: float
    frozen: float  # those of the weights that may be quantized
    largest: float  # trained parameter
    layers: float
    in_flight: float
    embeds: bool
    ends: bool


def ranks(setup: Setup) -> list[Rank]:
    """Those that can be the fullest: the only one, or the pipeline's first, second and last."""
    shape, lora, p, t = setup.shape, setup.lora, setup.pipeline, setup.tensor
    layers = shape.layers + shape.decoder_layers
    table = float(shape.vocab * shape.hidden)
    front = table + shape.positions * shape.hidden
    per_layer = (shapes.parameters(shape) - shapes.embedding_parameters(shape)) / layers
    adapters = shapes.adapter_parameters(shape, lora) / layers if lora else 0.0
    quantizable = per_layer - _small(shape)
    matrix = float(shape.hidden * (shape.expert_ffn or shapes.ffn(shape)))

    def rank(name: str, count: float, in_flight: float, *, embeds: bool, ends: bool) -> Rank:
        tables = (front if embeds else 0.0) + (table if ends and not (embeds and shape.tied) else 0.0)
        weights = (count * per_layer + tables) / t
        largest = max(matrix, table if embeds or ends else 0.0)
        if lora:
            trained, frozen, largest = count * adapters / t, count * quantizable / t, float(shape.hidden * lora.rank)
        else:
            trained, frozen = weights, 0.0
        return Rank(name, weights, trained, frozen, largest / t, count, in_flight, embeds, ends)

    if p == 1:
        return [rank("", layers, 1, embeds=True, ends=True)]
    inner, outer = split(layers, p)
    v, m = setup.virtual, setup.accumulation

    def alive(position: int) -> float:
        """1F1B: one micro-batch per rank from here to the end; interleaved, the chunks of its longer warm-up."""
        chunks = 2 * (p - position - 1) + (v - 1) * p + 1 if v > 1 else p - position
        return min(chunks / v, m)

    found = [rank("first", outer, alive(0), embeds=True, ends=False)]
    if p > 2:
        found.append(rank("second", inner, alive(1), embeds=False, ends=False))
    return [*found, rank("last", outer, alive(p - 1), embeds=False, ends=True)]


def split(layers: int, p: int) -> tuple[int, int]:
    """Layers of an inner and of an outer rank: 72 over 12 give 6 and 6; 70 give 6 and 5 (embeddings count)."""
    if layers % p and (layers + 2) % p == 0:
        return (layers + 2) // p, (layers + 2) // p - 1
    return -(-layers // p), -(-layers // p)


def _small(shape: Shape) -> float:
    """Norms and biases of a layer: ZeRO-3 leaves them whole, and nobody quantizes them."""
    q, kv = shapes.head_widths(shape)
    biases = q + 2 * kv if shape.biases or shape.qkv_bias else 0
    biases += 2 * shape.hidden + shapes.ffn(shape) if shape.biases else 0
    return float(shape.norms * shape.hidden * (2 if _layer_norm(shape) else 1) + biases)


def _layer_norm(shape: Shape) -> bool:
    return shape.biases if shape.norm_bias is None else shape.norm_bias


# --- activations ------------------------------------------------------------------------------------------


def layer_bytes(setup: Setup) -> tuple[float, float]:
    """Per token: what a layer keeps for its backward pass, and what that pass needs at a time besides.

    GPT with flash attention and dropout in bf16: 34 bytes per unit of width, and 5 x heads x tokens / width more
    when attention is eager (Korthikanti et al., equation 1). LLaMA 7B: 45.5, since its RMSNorm works in fp32 and its
    MLP has three matrices.
    """
    shape, t = setup.shape, setup.tensor
    e = float(setup.element)
    q, kv = shapes.head_widths(shape)
    h, ffn = float(shape.hidden), float(shapes.ffn(shape))
    u = t if setup.split_hidden else 1
    targets = setup.lora.targets if setup.lora else ""
    full = setup.lora is None
    # A norm's input and its output, the input of the next product; an eager RMSNorm has its input in fp32, and the
    # normed input before the weight. Frozen weights need neither output.
    norm = e * h if _layer_norm(shape) else max(e, 4.0) * h
    norm += (e * h if _layer_norm(shape) else 2 * e * h) if full else 0.0
    mask = h if shape.biases and full else 0.0  # of a dropout
    attention = (norm + mask + (0.0 if full else e * h)) / u + e * (2 * q + 2 * kv) / t
    if setup.attention == "eager" and setup.recompute != "selective":
        attention += _scores(setup, e)
    # Between the products: one value, or the gate, its activation and the other half; then the last one's input.
    between = 3 if shape.gated else 1
    inputs = 1 if full or targets == "linear" else 0
    if shape.experts:  # every visited expert has its own copy of the token, in and out
        width = float(shape.expert_ffn or ffn)
        inner = shape.experts_per_token * e * ((between + inputs) * width + 2 * h)
        inner += e * (between + inputs) * shape.shared_ffn + 8.0 * shape.experts
        ffn = shape.experts_per_token * width + shape.shared_ffn
    else:
        inner = e * (between + inputs) * ffn
    mlp = (norm * (shape.norms - 1) + mask + (e * h if targets == "linear" else 0.0)) / u + inner / t
    if not full:  # an adapter has its own copy of the input, after dropout, with the mask
        copies = {"qv": 2 * h, "attention": 3 * h + q / t}.get(targets)
        attention += (e + 1) * (copies or (3 * h + q / t + (2 if shape.gated else 1) * h + ffn / t))
    kept = attention + mlp
    if shape.decoder_layers:  # a decoder's layer attends twice
        kept += attention * shape.decoder_layers / (shape.layers + shape.decoder_layers)
    return kept, e * ((1 + between) * ffn / t + 2 * h / u)


def _scores(setup: Setup, e: float) -> float:
    """Eager attention, per token: the softmax, dropout's mask and its result, for every head and key."""
    return (2 * e + 1) * setup.shape.heads / setup.tensor * setup.seq_len


def _activations(setup: Setup, rank: Rank, e: float) -> tuple[float, float, float, float]:
    """Bytes: kept by one micro-batch; beside them where the backward pass begins, and where it ends; the logits."""
    tokens = setup.micro * setup.seq_len / setup.sequence
    hidden = e * setup.shape.hidden / (setup.tensor if setup.split_hidden else 1)
    layer, work = layer_bytes(setup)
    if setup.recompute == "selective" and setup.attention == "eager":
        work += _scores(setup, e)
    if setup.lora and setup.lora.bits < 16:  # one matrix at a time is made 16-bit again
        work += e * setup.shape.hidden * shapes.ffn(setup.shape) / setup.tensor / tokens
    ending = layer + work
    if setup.recompute == "full":
        kept, beginning = hidden * rank.layers, ending
    elif setup.recompute == "cpu":
        kept, beginning = hidden, ending
    else:
        kept, beginning = layer * rank.layers, work
    # Beside the layers: the embeddings and the last norm; between ranks, what was received or is being sent.
    kept += hidden * (2 if rank.embeds else 1)
    logits = LOGIT[setup.element] * setup.shape.vocab / setup.tensor if rank.ends else 0.0
    return tokens * kept, tokens * beginning, tokens * ending, tokens * logits


# --- the GPU ----------------------------------------------------------------------------------------------


def _peak(setup: Setup, rank: Rank, e: float, constants: Constants) -> tuple[Rank, dict[str, float]]:
    """Bytes by item at the rank's fullest moment."""
    stage, n, trained = setup.stage, setup.shards, rank.trained
    offloaded = setup.offload_optimizer != "none" and stage > 0
    grad = GRADIENT.get(setup.gradient, e)
    # DeepSpeed's BF16_Optimizer partitions states, keeps the sum of gradients whole, and 16-bit gradients beside it
    own = setup.precision == "bf16" and not offloaded
    own = own and ((stage == 1 and grad == 4.0) or (stage == 0 and setup.pipeline > 1))

    weights, live, secondary = _weights(setup, rank, e)
    states = 0.0 if offloaded else trained * (setup.optimizer_state + _copy(setup))
    states /= n if stage or own else 1
    if setup.onebit < 1 and stage == 0:  # fp32 errors of worker and server (0.19.6, fp16/onebit/adam.py)
        states += 4.0 * trained * (1 + 1 / n)

    # Gradients and buffers at the end of the forward pass, at the end of the backward pass, and in the step.
    keeps = setup.accumulation > 1  # from one micro-batch to the next
    bucket = setup.reduce_bucket * (grad if stage == 1 else e)
    added = e * rank.largest  # a gradient on its way into the sum
    if own:
        between = grad * trained + (e * trained if setup.pipeline > 1 else 0.0)
        gradients = (between, (grad + e) * trained, (grad + e) * trained)
        buffers = (0.0, max(e, grad) * rank.largest, 0.0)
    elif stage == 0:
        step = 8.0 * trained if grad < 4.0 else 0.0  # fp32 copies one by one, then a flat one
        gradients = (keeps * grad * trained, grad * trained, grad * trained + step)
        buffers = (0.0, keeps * added + (e * min(trained, PLAIN_BUCKET) if n > 1 else 0.0), 0.0)
    elif stage < 3:
        # The last micro-batch's backward pass leaves a share only; a pipeline reduces after it.
        whole, share = (0.0, 0.0) if offloaded else (grad * trained, grad * trained / n)
        step = 0.0 if offloaded else (grad + e + 4.0) * trained / n
        gradients = (
            keeps * (whole if stage == 1 else share),
            whole if stage == 1 and setup.pipeline > 1 else share,
            step,
        )
        twice = bucket * (2 if setup.overlap and setup.pipeline == 1 else 1)
        buffers = (
            twice if setup.pipeline == 1 else 0.0,
            twice + (added if offloaded or (stage == 1 and keeps) else 0.0),
            bucket,
        )
    else:
        held = 0.0 if offloaded else grad * trained / n
        step = 0.0 if offloaded else (e + 4.0) * min(trained / n, SUBGROUP)
        gradients = (held, held, held + step)
        layer = trained / max(rank.layers, 1)  # its gradients wait for a full bucket, which is then reduced
        waiting = e * max(layer, rank.largest)
        buffers = (bucket, (3 if setup.quantized_gradients else 2) * bucket + waiting, bucket)

    micro, beginning, ending, logits = _activations(setup, rank, e)
    kept = micro * rank.in_flight
    turn = (kept, logits) if logits > beginning else (kept + beginning, 0.0)
    moments = (
        (gradients[0], buffers[0], live, *turn),
        (gradients[1], buffers[1], live, kept - micro + ending, 0.0),
        (gradients[2], buffers[2], 0.0, 0.0, 0.0),
    )
    moment = max(moments, key=sum)
    groups = (n > 1) + (setup.tensor > 1) + (setup.sequence > 1) + (setup.hpz > 1)
    groups += 3 * (setup.pipeline > 1)  # a pair with each neighbour, and the tied embeddings
    groups += setup.tensor > 1 and setup.pipeline > 1  # the model's ranks together
    return rank, {
        "weights": weights,
        "weights for the node": secondary,
        "optimizer states": states,
        "gradients": moment[0],
        "gathered weights": moment[2],
        "activations": moment[3],
        "logits": moment[4],
        "buffers": moment[1],
        "CUDA context": constants.context * GIB,
        "NCCL": constants.communicator * groups * GIB,
        "fragments": constants.fragments * sum(moment),
    }


def _copy(setup: Setup) -> int:
    """Bytes of the optimizer's own fp32 copy of a weight; ZeRO has one of fp32 weights too."""
    return 4 if setup.precision != "fp32" or setup.stage > 0 else 0


def _weights(setup: Setup, rank: Rank, e: float) -> tuple[float, float, float]:
    """Bytes: that stay, gathered at a time by ZeRO-3, and the node's copy of hpZ."""
    whole = _stored(setup, rank)
    if setup.stage < 3:
        return whole, 0.0, 0.0
    persists = e * _small(setup.shape) * rank.layers if setup.shape.hidden <= setup.persistence else 0.0
    shard = 0.0 if setup.offload_parameters != "none" else (whole - persists) / setup.shards
    # Weights are released unless used again soon: around the turn to the backward pass half the distance stays.
    tables = 1 if setup.shape.tied else rank.embeds + rank.ends
    layer = (rank.weights - tables * setup.shape.vocab * setup.shape.hidden / setup.tensor) / max(rank.layers, 1)
    live = e * min(rank.weights, max(REUSE / 2, layer, rank.largest) + layer + setup.prefetch_bucket)
    if setup.quantized_weights:
        live *= 1.5  # an int8 copy arrives first
    return shard + persists, live, whole / setup.hpz if setup.hpz > 1 else 0.0


def _stored(setup: Setup, rank: Rank) -> float:
    """Bytes of a slice's weights wherever they are: quantized where frozen, with the adapters that come on top."""
    e = setup.element
    if setup.lora is None:
        return e * rank.weights
    return e * (rank.weights + rank.trained) - rank.frozen * (e - QUANTIZED.get(setup.lora.bits, e))


def _why(name: str, setup: Setup, rank: Rank) -> str:
    shape, n = setup.shape, setup.shards
    place = f" on the pipeline's {rank.name} rank" if rank.name else ""
    over = f", over {n} ranks"
    if name == "weights":
        billions = f"{rank.weights / 1e9:.2f}e9 weights{place}"
        if setup.offload_parameters != "none":
            return f"{billions} are on {setup.offload_parameters}; norms and biases stay"
        bits = f"{setup.lora.bits}-bit where frozen" if setup.lora else f"{setup.element} bytes each"
        return f"{billions}, {bits}{over if setup.stage == 3 else ''}"
    if name == "weights for the node":
        return f"hpZ keeps all weights within {setup.hpz} ranks"
    if name == "optimizer states":
        each = setup.optimizer_state + _copy(setup)
        what = f"{each} bytes for each of {rank.trained / 1e9:.2f}e9"
        return what + (over if setup.stage else "") + (", and the 1-bit errors" if setup.onebit < 1 else "")
    if name == "gradients":
        kind = setup.gradient or setup.precision
        return f"{kind}{over if setup.stage >= 2 else ''}, with the optimizer's copies where the step is the peak"
    if name == "gathered weights":
        return "ZeRO-3: the layer at work, what is fetched ahead and what is used again soon"
    if name == "activations":
        kept = {
            "none": "all kept",
            "selective": "attention recomputed",
            "full": "layer inputs kept, one layer at work",
        }
        flight = f", {rank.in_flight:.3g} micro-batches in flight{place}" if rank.name else ""
        what = kept.get(setup.recompute, "layer inputs on the host, one layer at work")
        return f"micro-batch {setup.micro} x {setup.seq_len} tokens, {rank.layers:g} layers, {what}{flight}"
    if name == "logits":
        return f"{shape.vocab:,} per token, in 16-bit and fp32, softmax and gradient; a fused loss needs a third"
    if name == "buffers":
        return f"gradients being reduced: buckets of {setup.reduce_bucket:,} elements, the largest gradient"
    if name == "CUDA context":
        return "driver, kernels, cuBLAS workspaces"
    if name == "NCCL":
        return "buffers of every group: data, tensor, pipeline neighbours, sequence"
    return "what the allocator holds and nobody uses, as share of what comes and goes"


# --- the host and its NVMe --------------------------------------------------------------------------------


def _on_host(setup: Setup) -> tuple[int, float, float]:
    """Ranks on a node; the trained elements that each of them owns, and the bytes of its share of all weights."""
    whole = ranks(replace(setup, tensor=1, pipeline=1))[0]
    return min(setup.per_node, setup.world), whole.trained / setup.world, _stored(setup, whole) / setup.world


def largest_partition(setup: Setup) -> int:
    """Elements of one parameter that ZeRO-3 leaves a rank with, at most: 65,667,072 of Llama 3.1 8B on 8 GPUs.

    Its embeddings are 128,256 x 4096. What a program may keep in one tensor counts as one: q, k and v; gate and up
    projection; all experts of a layer. Unquantized, since embeddings are.
    """
    shape = setup.shape
    q, kv = shapes.head_widths(shape)
    halves = 2 if shape.gated else 1
    inner = shape.experts * (shape.expert_ffn or shapes.ffn(shape)) or shapes.ffn(shape)
    widest = max(shape.vocab, shape.positions, q + 2 * kv, halves * max(inner, shape.shared_ffn))
    return -(-widest * shape.hidden // (setup.tensor * setup.shards))


def swap_buffer(setup: Setup) -> int:
    """offload_param's buffer_size on NVMe: DeepSpeed stops where a rank's part of a parameter is larger.

    Never below its default, 1e8; Llama 3.1 8B on 2 GPUs needs 262,668,288, and gets 270,000,000.
    """
    return max(SWAP_SIZE, -(-largest_partition(setup) // SWAP_STEP) * SWAP_STEP)


def _host(setup: Setup, e: float) -> tuple[Part, ...]:
    """Empty unless something is offloaded."""
    optimizer, weights = setup.offload_optimizer, setup.offload_parameters
    if setup.recompute != "cpu" and (optimizer == weights == "none" or setup.stage == 0):
        return ()
    many, owned, stored = _on_host(setup)
    subgroup = min(owned, SUBGROUP + largest_partition(setup))  # the last parameter of one may go beyond its size
    parts = [Part("processes", PROCESS * many, f"{PROCESS:g} GiB each of {many} ranks, model aside")]

    def add(name: str, held: float, why: str) -> None:
        parts.append(Part(name, many * held / GIB, why))

    if optimizer != "none" and setup.stage > 0:
        if optimizer == "cpu":
            each = 4 + setup.optimizer_state
            add("optimizer states", owned * each, f"{each} bytes per parameter: an fp32 copy and the moments")
            add("fp32 gradients", owned * 4 * PINNED, "page-locked, for the optimizer on CPU")
        else:
            add("swap buffers", SWAP_COUNT * 4 * subgroup, f"{SWAP_COUNT} sub-groups at a time, page-locked")
        copies = 1 + (setup.stage < 3 and setup.accumulation > 1)
        add("16-bit copies", owned * e * copies * PINNED, "page-locked, between GPU and optimizer")
    if weights == "cpu":
        add("weights", stored * PINNED, f"{_each(setup)}, page-locked")
    elif weights == "nvme":
        size = swap_buffer(setup)
        add("weight buffers", SWAP_BUFFERS * size * e, f"{SWAP_BUFFERS} buffers of {size:,} elements per rank")
        add("weights", min(owned, KEPT) * e * PINNED, f"max_in_cpu: {KEPT:g} trained elements per rank stay")
        if owned > KEPT:
            add("new weights", subgroup * e, "a sub-group on its way to NVMe")
    if setup.recompute == "cpu":
        layers = (setup.shape.layers + setup.shape.decoder_layers) / setup.pipeline
        hidden = e * setup.shape.hidden * setup.micro * setup.seq_len / setup.sequence
        add("activations", hidden * layers * min(setup.pipeline, setup.accumulation), "every layer's input")
    return tuple(parts)


def _each(setup: Setup) -> str:
    return f"{setup.lora.bits}-bit where frozen" if setup.lora else f"{setup.element} bytes per parameter"


def _nvme(setup: Setup) -> tuple[Part, ...]:
    if setup.stage < 3:
        return ()
    many, owned, stored = _on_host(setup)
    parts = []
    if setup.offload_optimizer == "nvme":
        each = 8 + setup.optimizer_state
        parts.append(
            Part("optimizer states", many * owned * each / GIB, f"{each} bytes per parameter, gradients too")
        )
    if setup.offload_parameters == "nvme":
        parts.append(Part("weights", many * stored / GIB, _each(setup)))
    return tuple(parts)


# --- what to change ---------------------------------------------------------------------------------------


def ways_to_fit(
    setup: Setup, gpu: Gpu, *, host_gib: float = 0, nvme_gib: float = 0, total: int | None = None
) -> list[tuple[str, Setup, Estimate]]:
    """What makes it fit, the least costly in time first: each alone where that is enough, else one after the other.

    The texts are lines of a job file. Where nothing fits, tight ways; none at all where everything is too large. A
    shorter sequence comes last, where sequences are what fills the GPU or nothing else helps. `total` is the global
    batch: numbers of nodes that it cannot be divided over are left out.
    """
    weighed: list[tuple[str, Setup, Estimate, Verdict]] = []

    def answer(changed: Setup) -> tuple[Estimate, Verdict]:
        found = estimate(changed)
        return found, verdict(found, gpu, host_gib=host_gib, nvme_gib=nvme_gib)

    def fits(changed: Setup) -> bool:
        return answer(changed)[1] == "fits"

    def weigh(text: str, changed: Setup) -> Verdict:
        found, judged = answer(changed)
        weighed.append((text, changed, found, judged))
        return judged

    rungs = [rung for rung in RUNGS if nvme_gib or rung is not _optimizer_to_nvme]
    rungs.append(partial(_more_nodes, total=total))
    for rung in rungs:
        for text, changed in rung(setup):
            weigh(text, changed)
    if all(judged != "fits" for *_, judged in weighed):
        for enough in range(2, len(rungs) + 1):  # the most of each, until it fits
            if weigh(*_climb(setup, rungs, [-1] * enough)) == "fits":
                weighed.pop()
                weigh(*_least(setup, rungs, enough, fits=fits))
                break
    ways: list[tuple[str, Setup, Estimate]] = []
    for wanted in ("tight", "fits"):
        found = [(text, changed, size) for text, changed, size, judged in weighed if text and judged == wanted]
        ways = _first_of_each(found) if found else ways
    if not fits(setup) and (not ways or _long(estimate(setup))):
        for text, changed in _shorter(setup, rungs, fits=fits):
            if changed.seq_len == setup.seq_len:  # the most of everything is not always the best: less of it fits
                ways = [way for way in ways if way[0] != text and fits(way[1])]
            ways.append((text, changed, estimate(changed)))
    return ways


def _long(estimate: Estimate) -> bool:
    """Whether more than half of a GPU's memory grows with the sequence: no number of nodes makes that smaller."""
    grows = sum(part.value for part in estimate.gpu if part.name in ("activations", "logits"))
    return grows > estimate.total / 2


def _shorter(setup: Setup, rungs: Sequence[Rung], *, fits: Callable[[Setup], bool]) -> Iterator[tuple[str, Setup]]:
    """The largest power of two that fits: alone, else with the least of all other changes."""

    def cut(changed: Setup, length: int) -> Iterator[tuple[str, Setup]]:
        yield f"train.seq_len: {length}", replace(changed, seq_len=length)

    longest = (1 << (setup.seq_len - 1).bit_length()) // 2
    others: list[Sequence[Rung]] = [[], rungs]
    for taken in others:
        for halvings in range(MOST):
            length = longest >> halvings
            steps: list[Rung] = [*taken, partial(cut, length=length)]
            if length and length % setup.sequence == 0 and fits(_climb(setup, steps, [-1] * len(steps))[1]):
                yield _least(setup, steps, len(steps), fits=fits)
                return


def _least(setup: Setup, rungs: Sequence[Rung], enough: int, *, fits: Callable[[Setup], bool]) -> tuple[str, Setup]:
    """Of the first `enough` rungs, whose most fits together, no more of each than it takes."""
    taken: list[int | None] = [-1] * enough
    for place in range(enough):
        for strength in (None, *range(MOST)):
            weaker = [*taken[:place], strength, *taken[place + 1 :]]
            if fits(_climb(setup, rungs, weaker)[1]):
                taken = weaker
                break
    return _climb(setup, rungs, taken)


def _climb(setup: Setup, rungs: Sequence[Rung], strengths: Sequence[int | None]) -> tuple[str, Setup]:
    """One step of each rung after the other: None leaves it out, -1 is the most it can do."""
    lines: dict[str, str] = {}  # a later step has the last word on a key
    for rung, strength in zip(rungs, strengths, strict=False):
        steps = list(rung(setup))
        if steps and strength is not None:
            text, setup = steps[min(strength, len(steps) - 1)]
            lines |= {line.split(":")[0]: line for line in text.split(", ")}
    if "train.gradient_accumulation" in lines:
        lines["train.gradient_accumulation"] = f"train.gradient_accumulation: {setup.accumulation}"
    return ", ".join(lines.values()), setup


def _first_of_each(found: list[tuple[str, Setup, Estimate]]) -> list[tuple[str, Setup, Estimate]]:
    """The least change of each kind: micro-batch 4 where 4, 2 and 1 all fit."""
    kinds: dict[str, tuple[str, Setup, Estimate]] = {}
    for row in found:
        kinds.setdefault(",".join(line.split(":")[0] for line in row[0].split(", ")), row)
    return list(kinds.values())


def _smaller(setup: Setup) -> Iterator[tuple[str, Setup]]:
    micro = setup.micro
    while micro % 2 == 0:
        micro //= 2
        yield _micro(setup, micro)
    if micro > 1:
        yield _micro(setup, 1)


def _micro(setup: Setup, micro: int) -> tuple[str, Setup]:
    accumulation = setup.accumulation * setup.micro // micro
    changed = replace(setup, micro=micro, accumulation=accumulation)
    return f"train.micro_batch: {micro}, train.gradient_accumulation: {accumulation}", changed


def _recomputed(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.recompute in ("none", "selective"):
        yield "train.activation_checkpointing: true", replace(setup, recompute="full")


def _higher(setup: Setup) -> Iterator[tuple[str, Setup]]:
    top = 0 if setup.onebit < 1 else 1 if setup.pipeline > 1 else 3
    for stage in range(setup.stage + 1, top + 1):
        yield f"train.zero: {stage}", replace(setup, stage=stage)


def _optimizer_to_cpu(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.offload_optimizer == "none" and setup.stage > 0:
        yield "train.offload.optimizer: cpu", replace(setup, offload_optimizer="cpu")


def _parameters_to_cpu(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.offload_parameters == "none" and setup.stage == 3:
        yield "train.offload.parameters: cpu", replace(setup, offload_parameters="cpu")


def _optimizer_to_nvme(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.stage == 3 and setup.offload_optimizer != "nvme":
        yield "train.offload.optimizer: nvme", replace(setup, offload_optimizer="nvme")


def _sequence_over_ranks(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Degrees that divide heads, tokens and ranks, within a node first and then over whole ones."""
    if setup.pipeline > 1:
        return
    heads, nodes = setup.shape.heads // setup.tensor, setup.world // setup.per_node
    inside = [n for n in range(2, setup.per_node + 1) if setup.per_node % (n * setup.tensor) == 0]
    beyond = [n * setup.per_node // setup.tensor for n in range(2, nodes + 1) if setup.per_node % setup.tensor == 0]
    for degree in (*inside, *beyond):
        times, rest = divmod(degree, setup.sequence)
        if times > 1 and not (rest or heads % degree or setup.seq_len % degree or setup.shards % degree):
            changed = replace(setup, sequence=degree, accumulation=setup.accumulation * times)
            yield f"train.parallel.sequence: {degree}", changed


def _more_nodes(setup: Setup, total: int | None) -> Iterator[tuple[str, Setup]]:
    if setup.stage == 0:
        return
    nodes = -(-setup.world // setup.per_node)
    for times in (2, 4, 8, 16):
        step = setup.micro * setup.replicas * times
        if total is None or total % step == 0:
            accumulation = total // step if total else max(1, setup.accumulation // times)
            changed = replace(setup, world=setup.world * times, accumulation=accumulation)
            yield f"resources.nodes: {nodes * times}", changed


# By what they cost: smaller products, a third of compute, communication, the PCIe bus, disks, a program written
# for it. More nodes, which cost money, come after these.
RUNGS: tuple[Rung, ...] = (
    _smaller,
    _recomputed,
    _higher,
    _optimizer_to_cpu,
    _parameters_to_cpu,
    _optimizer_to_nvme,
    _sequence_over_ranks,
)
# As many steps as a rung has at most: halvings of a micro-batch of 64.
MOST = 6
