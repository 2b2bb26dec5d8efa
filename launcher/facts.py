"""What we know but did not compute: typed rows, read from the YAML tables in data/."""

from __future__ import annotations

import re
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from launcher import yamldoc
from launcher.errors import Problem, UserError
from launcher.record import record
from launcher.spec import Shape

DATA = Path(__file__).parent / "data"
PRESET_ORDER = ["llama", "gpt", "bert", "t5", "blocks"]  # the guide's own
# Words of a DeepSpeed config for a type (runtime/config.py DtypeEnum of 0.19.8), and what we call it.
DTYPES: dict[str, str] = {
    **dict.fromkeys(["torch.float16", "fp16", "float16", "half"], "fp16"),
    **dict.fromkeys(["torch.float32", "fp32", "float32", "float"], "fp32"),
    **dict.fromkeys(["torch.bfloat16", "bf16", "bfloat16"], "bf16"),
}
# Share of the steps with whole gradients before a 1-bit optimizer compresses: 15 to 25 % in its papers (2102.02888).
WARM = 0.2


@record
class Gpu:
    name: str
    memory: float  # GiB
    peak: float  # dense TFLOP/s
    bf16: bool
    aliases: list[str]
    source: str
    arch: str = ""  # generation: ampere, hopper, cdna3
    matmul: float = 0.8  # share of peak that a large matrix product reaches
    fp32: float = 0.0  # TFLOP/s without tensor cores
    tf32: float = 0.0  # TFLOP/s; 0 where there is none
    hbm: float = 1.0  # TB/s of its memory
    units: int = 100  # streaming multiprocessors or compute units
    clock: float = 1.5  # GHz at boost
    bus: float = 20.0  # GB/s of bus bandwidth between the GPUs of one node
    pcie: float = 12.0  # GB/s to the host, one direction


@record
class Model:
    name: str
    shape: Shape
    source: str
    published: float = 0.0  # the count its authors give, which the shape must give too
    active: float = 0.0  # the same of what one token passes through, in a mixture of experts


@record
class Correction:
    """What a guide's configuration gets wrong, what DeepSpeed does about it, and what the job file says instead."""

    wrong: str
    check: str
    instead: str
    at: str = ""  # the key of the job file, train.optimizer; empty where the mistake is in a claim


@record
class Variant:
    says: str
    world: int
    config: dict[str, Any]
    parser: str
    ignored: list[str] = field(default_factory=list)


@record
class Preset:
    """A configuration as a guide prints it, what DeepSpeed does with it, and the job that keeps its intent."""

    name: str
    says: str
    hardware: str
    world: int  # the GPUs it names
    as_written: dict[str, Any]
    parser: str  # `accepts`, or what the config parser says
    corrections: tuple[Correction, ...]
    start: dict[str, str] = field(default_factory=dict)  # by version: `runs`, or what ends the engine's first step
    ignored: list[str] = field(default_factory=list)  # keys that the parser never reads
    variants: tuple[Variant, ...] = ()
    job: dict[str, Any] = field(default_factory=dict)  # empty for a block that is no whole configuration
    remarks: dict[str, str] = field(default_factory=dict)  # by key of the job file


@record
class OptimizerRow:
    name: str
    state: int  # bytes per parameter
    zero: list[int]
    source: str
    onebit: bool = False
    gpu_only: bool = False
    torch: bool = False  # a class of torch.optim
    before: str = ""


@record
class Expected:
    """A row of bus bandwidth, GB/s: who has to match, what passes, what excludes, and who measured it."""

    what: Literal["node", "pair", "whole"]
    size: int  # GiB per rank
    passes: float
    excludes: float
    measured: str
    source: str
    op: str = ""  # all_reduce, and sendrecv for a pair, where empty
    gpus: list[str] = field(default_factory=list)  # names or generations; any where empty
    per_node: int = 0  # GPUs; any where 0
    wire: float = 0.0  # GB/s that leave a node; any where 0
    nodes: list[int] = field(default_factory=lambda: [1, 0])  # from, to; 0 is no end
    nvls: bool = True  # NVLink SHARP on, where the GPUs have it

    def fits(self, gpu: Gpu | None, *, per_node: int, nodes: int, wire: float, nvls: bool) -> bool:
        first, last = self.nodes
        return (
            (not self.gpus or (gpu is not None and bool({gpu.name, gpu.arch} & set(self.gpus))))
            and self.per_node in (0, per_node)
            and (not self.wire or abs(wire / self.wire - 1) < 0.03)
            and nodes >= first
            and (not last or nodes <= last)
            and (self.nvls == nvls or gpu is None or gpu.arch not in ("hopper", "blackwell"))
        )


@record
class Fabric:
    name: str
    title: str
    source: str
    variables: dict[str, dict[str, Any]]  # value, why; `by` has the value by GPU name or generation
    aliases: list[str] = field(default_factory=list)
    nominal: dict[str, float] = field(default_factory=dict)  # Gbit/s per node by GPU; "other" for the rest
    efficiency: float = 0.75  # share of the line rate that collectives reach as bus bandwidth
    latency: float = 10e-6  # seconds for one hop between nodes inside a collective
    setup: list[dict[str, Any]] = field(default_factory=list)  # shell lines before the exports: line, why, gpus
    breaks: dict[str, str] = field(default_factory=dict)  # NAME=VALUE that takes the fabric away, and why
    never: dict[str, str] = field(default_factory=dict)  # NAME or NAME=VALUE that has no place here, and why
    only: Literal["", "node", "cpu"] = ""  # for one node, for jobs without GPUs
    links: dict[str, dict[str, int]] = field(default_factory=dict)  # by GPU, where the seller fixes it
    share: dict[str, list[float]] = field(default_factory=lambda: {"pair": [0.88, 0.80], "whole": [0.73, 0.60]})
    expected: list[Expected] = field(default_factory=list)
    detect: list[dict[str, Any]] = field(default_factory=list)  # conditions, any one of these sets: launcher/probe.py
    possible: str = ""  # why a node alone cannot tell

    def gbits(self, gpu: Gpu) -> float:
        """What a node is assumed to have: 3200 for H100 over InfiniBand."""
        return self.nominal.get(gpu.name, self.nominal.get(gpu.arch, self.nominal["other"]))

    def emits(self, gpu: Gpu | None) -> dict[str, tuple[str, str]]:
        """Variables with value and reason, for one GPU type."""
        found = {}
        for name, row in self.variables.items():
            by = row.get("by", {})
            value = by.get(gpu.name, by.get(gpu.arch)) if gpu else None
            if value is None:
                value = row.get("value")
            if value is not None:
                found[name] = (value, row["why"])
        return found

    def lines(self, gpu: Gpu | None) -> list[tuple[str, str]]:
        """Shell lines with their reason."""
        chosen = {gpu.name, gpu.arch} if gpu else set()
        return [(row["line"], row["why"]) for row in self.setup if "gpus" not in row or chosen & set(row["gpus"])]


@record
class SlurmOption:
    """An option of sbatch or srun, or a value of one: "exclusive=topo"."""

    name: str
    of: str  # b: sbatch, s: srun, p: a plugin at some sites
    short: str = ""
    value: str = ""  # =: it needs one, [=]: it may have one, s=: with srun alone
    since: str = ""
    until: str = ""
    field: str = ""  # of the job file, which says the same
    why: str = ""  # nothing does
    source: str = ""


@cache
def slurm_options() -> dict[str, SlurmOption]:
    lines = [line for line in (DATA / "slurm.tsv").read_text("utf-8").splitlines() if not line.startswith("#")]
    return {row.name: row for row in (SlurmOption(*line.split("\t")) for line in lines[1:])}


@cache
def options_of(program: str) -> dict[str, SlurmOption]:
    """Of sbatch (b) or srun (s), by their long names; values of options are left out."""
    return {name: row for name, row in slurm_options().items() if program in row.of and "=" not in name}


@cache
def letters_of(program: str) -> dict[str, str]:
    """letters_of("b")["J"] is job-name."""
    return {row.short: name for name, row in options_of(program).items() if row.short}


@cache
def gpus() -> dict[str, Gpu]:
    return {name: Gpu(name, **row) for name, row in yamldoc.load_tables(DATA / "gpus.yaml").items()}


@cache
def optimizers() -> dict[str, OptimizerRow]:
    rows = yamldoc.load_tables(DATA / "optimizers.yaml")
    return {name: OptimizerRow(name, **{**row, "before": str(row.get("before", ""))}) for name, row in rows.items()}


@cache
def models() -> dict[str, Model]:
    return {name: row for path in _model_files() for name, row in _models_in(path).items()}


def _model_files() -> list[Path]:
    return sorted((DATA / "models").glob("*.yaml"))


@cache
def _models_in(path: Path) -> dict[str, Model]:
    return {
        name: Model(name, Shape(**row["shape"]), row["source"], row["parameters"], row.get("active", 0.0))
        for name, row in yamldoc.load_tables(path).items()
    }


@cache
def presets() -> dict[str, Preset]:
    shared = yamldoc.load_tables(DATA / "mistakes.yaml")
    found = {}
    for path in sorted((DATA / "presets").glob("*.yaml"), key=lambda path: PRESET_ORDER.index(path.stem)):
        for name, row in yamldoc.load_tables(path).items():
            mistakes = (shared[said] if isinstance(said, str) else said for said in row["corrections"])
            row["corrections"] = tuple(Correction(**mistake) for mistake in mistakes)
            row["variants"] = tuple(Variant(**variant) for variant in row.get("variants", ()))
            found[name] = Preset(name, **row)
    return found


@cache
def fabrics() -> dict[str, Fabric]:
    return {path.stem: _fabric_in(path) for path in _fabric_files()}


def every_network() -> Fabric:
    """What holds whatever the network is."""
    return _fabric_in(DATA / "fabrics" / "all.yaml")


def fabric_names() -> list[str]:
    return [path.stem for path in _fabric_files()]


def _fabric_files() -> list[Path]:
    return sorted(path for path in (DATA / "fabrics").glob("*.yaml") if path.stem != "all")


@cache
def _fabric_in(path: Path) -> Fabric:
    row = yamldoc.load_tables(path)
    return Fabric(path.stem, **{**row, "expected": [Expected(**one) for one in row.get("expected", ())]})


def optimizer(name: str) -> OptimizerRow | None:
    """optimizer("adamw") is AdamW's row; the names of torch.optim's own count letter by letter."""
    for row in optimizers().values():
        if name == row.name or (name.lower() == row.name.lower() and not row.torch):
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
    """fabric("ib") is InfiniBand's row. Raises UserError for a name nobody has."""
    asked = name.lower()
    for path in _fabric_files():  # a dozen files, of which one is worth reading in full
        if path.stem == asked:
            return _fabric_in(path)
    for path in _fabric_files():
        listed = re.search(r"^aliases: \[(.*)\]$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if listed and asked in listed[1].split(", "):
            return _fabric_in(path)
    hint = yamldoc.suggest(name, fabric_names())
    raise UserError(Problem(f"no fabric `{name}` in the table", hint, ("resources", "fabric")))


def model(name: str, *, config_json: str | None = None) -> Model:
    """A preset by name, or a Hugging Face config by its text (the caller has read the file)."""
    if config_json is not None:
        from launcher import huggingface

        shape, part = huggingface.read(config_json, source=name)
        return Model(name, shape, f"{name} (Hugging Face config{f'; {part}' if part else ''})")
    for path in _model_files():  # a dozen files, of which one is worth reading in full
        if f"\n{name}:" in "\n" + path.read_text(encoding="utf-8"):
            return _models_in(path)[name]
    hint = yamldoc.suggest(name, models()) or "dslaunch presets lists them; or a shape, or a config.json"
    raise UserError(Problem(f"no model preset `{name}`", hint, ("model",)))


def preset(name: str) -> Preset:
    """preset("llama-70b-multi-node") too. Raises UserError for a block that no job comes of."""
    rows = {key: row for key, row in presets().items() if row.job}
    row = rows.get(name.lower().replace("-", "_"))
    if row is None:
        raise UserError(Problem(f"no preset `{name}`", yamldoc.suggest(name, rows)))
    return row


def version(text: str) -> tuple[int, ...]:
    """version("0.19.6+cpu") is (0, 19, 6): enough to compare releases."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
