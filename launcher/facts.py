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
    torch: bool = False  # a class of torch.optim
    lacks: list[str] = field(default_factory=list)  # fields of train.optimizer that it does not take
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


def optimizer(name: str) -> OptimizerRow | None:
    """optimizer("adamw") is AdamW's row; the names of 1-bit and torch.optim's own count letter by letter."""
    for row in optimizers().values():
        if name == row.name or (name.lower() == row.name.lower() and not (row.onebit or row.torch)):
            return row
    return None


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

    kind = str(config.get("model_type", ""))
    required = {field: first(*SPELLINGS[field]) for field in ("hidden", "layers", "heads", "vocab")}
    missing = [
        SPELLINGS[field][0]
        for field, value in required.items()
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
    sizes = _sizes(config, source=source)
    if kind not in LEARNED_POSITIONS:
        sizes.pop("positions", None)
    decoder_layers = sizes.pop("decoder_layers", sizes["layers"])
    shape = Shape(
        **sizes,
        gated=gated,
        tied=bool(first("tie_word_embeddings", default=kind not in UNTIED)),
        biases=kind not in WITHOUT_BIASES,
        kind="encoder-decoder" if config.get("is_encoder_decoder") else "encoder" if kind in ENCODERS else "decoder",
    )
    return replace(shape, decoder_layers=decoder_layers) if shape.kind == "encoder-decoder" else shape


def _sizes(config: dict[str, Any], *, source: str) -> dict[str, int]:
    """The numbers of a config.json by our names, within the ranges of a shape in a job file."""
    sizes: dict[str, int] = {}
    problems = []
    for name, spellings in SPELLINGS.items():
        key = next((key for key in spellings if config.get(key) is not None), None)
        if key is None:
            continue
        try:
            node = yamldoc.parse(json.dumps(config[key]), name=source)
            sizes[name] = yamldoc.read(node, yamldoc.hints(Shape)[name])
        except UserError as error:
            problems += [Problem(f"{source}: {key}: {p.message}", p.hint, ("model",)) for p in error.problems]
    if problems:
        raise UserError(*problems)
    return sizes


# How the families spell the numbers of a shape; the first spelling is the one that complaints use.
SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "vocab": ("vocab_size",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": ("intermediate_size", "n_inner", "d_ff"),
    "positions": ("max_position_embeddings", "n_positions"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
}

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
