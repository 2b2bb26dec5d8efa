"""Bytes on a GPU: model states exactly, activations and buffers as an estimate."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.spec import Shape

GIB = 1 << 30

# CUDA context, NCCL buffers and the allocator's fragments; what is left is for tensors.
OVERHEAD_GIB = 3.0
USABLE = 0.92


def parameters(shape: Shape) -> int:
    """LLaMA 7B, 32 layers of 4096 with a SwiGLU of 11008, has 6,738,415,616."""
    h = shape.hidden
    head = shape.head_dim or h // shape.heads
    q, kv = shape.heads * head, (shape.kv_heads or shape.heads) * head
    ffn = shape.ffn or 4 * h
    bias = shape.biases
    norm = h * (2 if bias else 1)
    attention = h * q + 2 * h * kv + q * h + (q + 2 * kv + h if bias else 0)
    mlp = (3 if shape.gated else 2) * h * ffn + (ffn * (2 if shape.gated else 1) + h if bias else 0)
    layer = attention + mlp + 2 * norm
    total = shape.layers * layer + shape.vocab * h * (1 if shape.tied else 2) + shape.positions * h
    if shape.kind == "decoder":
        total += norm  # after the last layer
    elif shape.kind == "encoder":
        total += norm + 2 * h + h * h + h  # embeddings' norm, two segments, pooler
    else:
        total += shape.decoder_layers * (layer + attention + norm) + 2 * norm
        total += 2 * 32 * shape.heads  # relative positions: 32 buckets, in each half
    return total


def state_bytes(*, stage: int, ranks: int, low_precision: bool, optimizer: int = 8) -> float:
    """Bytes per parameter on one GPU: mixed-precision Adam needs 16 without ZeRO.

    Weights and gradients take 2 bytes each in bf16 (4 in fp32), the fp32 copy 4 and Adam's two
    moments 8. ZeRO 1 divides the states by the ranks, 2 the gradients too, 3 the weights too
    (Rajbhandari et al. 2020, section 3).
    """
    weights = gradients = 2.0 if low_precision else 4.0
    states = optimizer + (4.0 if low_precision else 0.0)
    if stage >= 1:
        states /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return weights + gradients + states


def model_states(
    count: float,
    *,
    stage: int,
    gpus: int,
    low_precision: bool = True,
    optimizer: int = 8,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> float:
    """7e9 parameters on 16 GPUs: stage 0 needs 104.3 GiB, stage 3 needs 6.5."""
    per = state_bytes(stage=stage, ranks=gpus, low_precision=low_precision, optimizer=optimizer)
    if offload_optimizer:
        per -= (optimizer + (4.0 if low_precision else 0.0)) / gpus
        per -= (2.0 if low_precision else 4.0) / gpus if stage >= 2 else 0.0  # gradients follow the optimizer
    if offload_parameters:
        per -= (2.0 if low_precision else 4.0) / gpus
    return count * max(per, 0.0) / GIB


def host_bytes(
    *, low_precision: bool = True, optimizer: int = 8, offload_optimizer: bool, offload_parameters: bool
) -> int:
    """Bytes per parameter that offload puts on the hosts, buffers aside: 12 for Adam's states, 2 for weights."""
    states = optimizer + (4 if low_precision else 0)
    weights = 2 if low_precision else 4
    return states * offload_optimizer + weights * offload_parameters


def host_gib(size: str) -> float:
    """What Slurm's --mem says, in GiB: 500G is 500, and a number alone counts MiB."""
    scale = {"K": 1 / (1 << 20), "M": 1 / (1 << 10), "G": 1.0, "T": 1024.0}
    return float(size.rstrip("KMGT")) * scale.get(size[-1], scale["M"])


def activations(shape: Shape, *, micro: int, seq_len: int, recompute: bool, low_precision: bool) -> float:
    """GiB of activations: LLaMA 7B, one sample of 2048 tokens, needs about 9.5, with recomputation 1.6.

    34 bytes per token and unit of width in a bf16 layer with fused attention (Korthikanti et al. 2022,
    eq. 1 without the attention matrix); with recomputation 2 bytes per layer and one layer at work.
    """
    scale = 1.0 if low_precision else 2.0
    tokens = micro * seq_len
    layers = shape.layers + shape.decoder_layers
    per_layer = 34.0 * tokens * shape.hidden * scale
    body = layers * 2.0 * tokens * shape.hidden * scale + per_layer if recompute else layers * per_layer
    logits = tokens * shape.vocab * (2.0 * scale + 4.0 + 4.0)  # the output, its fp32 copy, and the gradient
    return (body + logits) / GIB


def live_parameters(shape: Shape, count: float, *, stage: int, low_precision: bool) -> float:
    """GiB that ZeRO-3 gathers at a time: one layer and what it fetches ahead."""
    if stage < 3:
        return 0.0
    layers = shape.layers + shape.decoder_layers
    return 2 * min(count, max(count / max(layers, 1), 5e7)) * (2.0 if low_precision else 4.0) / GIB


@dataclass(frozen=True)
class Estimate:
    states: float  # GiB, each
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.gathered + OVERHEAD_GIB

    def fits(self, memory: float) -> bool:
        return self.total <= memory * USABLE
