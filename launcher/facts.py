"""What we know but did not compute: typed rows, read from the YAML tables in data/."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher import yamldoc
from launcher.errors import Problem, UserError
from launcher.spec import Shape

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float  # GiB
    peak: float  # dense TFLOP/s
    bf16: bool
    aliases: list[str]
    source: str


@dataclass(frozen=True)
class Model:
    name: str
    shape: Shape
    source: str
    published: float = 0.0  # the count its authors give, which the shape must give too


@dataclass(frozen=True)
class OptimizerRow:
    name: str
    state: int  # bytes per parameter
    zero: list[int]
    source: str
    onebit: bool = False
    gpu_only: bool = False
    needs_offload: bool = False
    before: str = ""


@dataclass(frozen=True)
class Fabric:
    name: str
    title: str
    source: str
    variables: dict[str, dict[str, str]]
    aliases: list[str] = field(default_factory=list)
    warn: dict[str, str] = field(default_factory=dict)
    refuse: dict[str, dict[str, Any]] = field(default_factory=dict)


@cache
def gpus() -> dict[str, Gpu]:
    return {name: Gpu(name, **row) for name, row in yamldoc.load_tables(DATA / "gpus.yaml").items()}


@cache
def optimizers() -> dict[str, OptimizerRow]:
    rows = yamldoc.load_tables(DATA / "optimizers.yaml")
    return {name: OptimizerRow(name, **{**row, "before": str(row.get("before", ""))}) for name, row in rows.items()}


@cache
def models() -> dict[str, Model]:
    found = {}
    for path in sorted((DATA / "models").glob("*.yaml")):
        for name, row in yamldoc.load_tables(path).items():
            found[name] = Model(name, Shape(**row["shape"]), row["source"], row["parameters"])
    return found


@cache
def fabrics() -> dict[str, Fabric]:
    rows = {path.stem: yamldoc.load_tables(path) for path in sorted((DATA / "fabrics").glob("*.yaml"))}
    return {name: Fabric(name, **row) for name, row in rows.items()}


def gpu(name: str) -> Gpu:
    """gpu("h100") and gpu("h100-80gb") are the same row. Raises UserError for a name nobody has."""
    for row in gpus().values():
        if name.lower() in (row.name, *row.aliases):
            return row
    raise UserError(
        Problem(f"no GPU type `{name}` in the table", yamldoc.suggest(name, gpus()), ("resources", "gpu"))
    )


def fabric(name: str) -> Fabric:
    for row in fabrics().values():
        if row.name != "all" and name.lower() in (row.name, *row.aliases):
            return row
    known = [name for name in fabrics() if name != "all"]
    raise UserError(
        Problem(f"no fabric `{name}` in the table", yamldoc.suggest(name, known), ("resources", "fabric"))
    )


def model(name: str, *, config_json: str | None = None) -> Model:
    """A preset by name, or a Hugging Face config by its text (the caller has read the file)."""
    if config_json is not None:
        return Model(name, from_hugging_face(config_json, source=name), f"{name} (Hugging Face config)")
    if name in models():
        return models()[name]
    hint = yamldoc.suggest(name, models())
    raise UserError(Problem(f"no model preset `{name}`", hint, ("model",)))


def from_hugging_face(text: str, *, source: str) -> Shape:
    """The shape in a config.json: Llama, Mistral, Qwen, GPT-2, GPT-NeoX, BERT and T5 spellings."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(Problem(f"{source} is not JSON: {error}", at=("model",))) from None
    if not isinstance(config, dict):
        raise UserError(Problem(f"{source} is not a Hugging Face config: it holds no keys", at=("model",)))

    def first(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    kind = config.get("model_type", "")
    hidden = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = first("num_attention_heads", "n_head", "num_heads", "n_heads")
    vocab = first("vocab_size")
    missing = [
        name
        for name, value in {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocab,
        }.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if missing:
        raise UserError(
            Problem(
                f"{source} lacks {', '.join(missing)} as a positive whole number",
                hint="give the shape itself: model: {layers: , hidden: , heads: , vocab: }",
                at=("model",),
            )
        )
    if first("num_local_experts", "num_experts", "n_routed_experts"):
        raise UserError(Problem(f"{source} is a mixture of experts, which is not planned yet", at=("model",)))
    activation = str(first("hidden_act", "feed_forward_proj", default=""))
    gated = kind in GATED or "gated" in activation or bool(config.get("is_gated_act"))
    shape = Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocab=vocab,
        kv_heads=first("num_key_value_heads"),
        head_dim=first("head_dim", "d_kv"),
        ffn=first("intermediate_size", "n_inner", "d_ff"),
        gated=gated,
        tied=bool(first("tie_word_embeddings", default=kind not in UNTIED)),
        biases=kind not in WITHOUT_BIASES,
        positions=first("max_position_embeddings", "n_positions", default=0) if kind in LEARNED_POSITIONS else 0,
        kind="encoder-decoder" if config.get("is_encoder_decoder") else "encoder" if kind in ENCODERS else "decoder",
    )
    if shape.kind == "encoder-decoder":
        shape = replace(shape, decoder_layers=first("num_decoder_layers", "decoder_layers", default=layers))
    return shape


# By `model_type`; source: the modelling code of transformers 4.x.
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"}
WITHOUT_BIASES = GATED | {"t5", "mt5", "falcon"}
UNTIED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gptj"}
ENCODERS = {"bert", "roberta", "deberta", "deberta-v2", "electra"}
LEARNED_POSITIONS = {"gpt2", "bert", "roberta", "opt", "electra"}


def version(text: str) -> tuple[int, ...]:
    """version("0.19.6+cpu") is (0, 19, 6): enough to compare releases."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
