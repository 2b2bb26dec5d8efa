"""Job files to begin with: the gallery's, and one written for a model, GPU and number of nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from launcher import facts, yamldoc
from launcher.errors import Problem, UserError
from launcher.spec import Name

HERE = Path(__file__).parent
SCHEMA_LINE = "# yaml-language-server: $schema=dslaunch.schema.json  (dslaunch schema > dslaunch.schema.json)"


@dataclass(frozen=True)
class Example:
    name: str
    says: str
    path: Path


def shipped() -> list[Example]:
    """The gallery's job files: beside the package in a checkout, inside it when installed."""
    base = HERE / "gallery" if (HERE / "gallery").is_dir() else HERE.parent
    found = []
    for path in (*sorted(base.glob("slurm/*/job.yaml")), *sorted(base.glob("manifests/*/job.yaml"))):
        with path.open(encoding="utf-8") as file:
            says = file.readline().removeprefix("# ").strip()
        found.append(Example("/".join(path.parts[-3:-1]), says, path))
    return found


def text(name: str) -> str:
    rows = {row.name: row for row in shipped()}
    if name not in rows:
        raise UserError(Problem(f"no example `{name}`", yamldoc.suggest(name, rows)))
    return rows[name].path.read_text(encoding="utf-8")


def write(
    *, model: str, gpu: str | None, nodes: int, gpus_per_node: int | None, fabric: str | None, name: str | None
) -> str:
    """A job file with its comments. Raises UserError for names that no table has."""
    if not model.endswith(".json"):
        facts.model(model)
    kind = facts.gpu(gpu).name if gpu else None
    if gpus_per_node and not kind:
        raise UserError(Problem("--gpus-per-node without --gpu", hint="--gpu h100-80gb; dslaunch presets --gpus"))
    network = facts.fabric(fabric or "infiniband").name if kind else None
    name = name or re.sub(r"[^a-z0-9]+", "-", model.lower().removesuffix(".json")).strip("-")[:40].strip("-")
    if not get_args(Name)[1].regex.fullmatch(name):
        raise UserError(Problem(f"--name {name}: a name is 1 to 40 lower-case letters, digits and inner dashes"))
    own = model != "gpt-demo"  # a model of one's own comes with a script of one's own
    if kind:
        per_node = gpus_per_node or 8
        resources = [
            f"  nodes: {nodes}",
            f"  gpus_per_node: {per_node}",
            f"  gpu: {kind}                # dslaunch presets --gpus",
            f"  fabric: {network}             # dslaunch presets --fabrics",
            "  # cpus_per_node: 64           # without it Slurm gives its default, often one core",
            "  # memory: 500G",
        ]
        batch, sequence, steps = nodes * per_node * 8, 2048, 1000
        zero = "auto                     # the lowest stage that fits"
    else:
        resources = [
            f"  nodes: {nodes}",
            "  gpus_per_node: 0              # CPU, with gloo",
            "  processes_per_node: 2",
        ]
        batch, sequence, steps = nodes * 2 * 4, 128, 200
        zero = "3"
    return "\n".join(
        [
            SCHEMA_LINE,
            f"# {model} on {nodes} node{'s' if nodes > 1 else ''}; dslaunch plan shows every decision",
            f"name: {name}",
            f"model: {model}                 # a preset (dslaunch presets), a config.json, or a shape",
            "",
            "train:",
            f"  {'' if own else '# '}script: train.py            # yours; without one a GPT of this size trains",
            "  # args: [--data, /data/text]",
            f"  global_batch: {batch}             # micro_batch x accumulation x ranks; give any two",
            "  micro_batch: auto",
            f"  seq_len: {sequence}",
            f"  steps: {steps}",
            f"  zero: {zero}",
            "  optimizer: {type: AdamW, lr: 3e-4}",
            "  checkpoint: {every: 100, keep: 2}   # under checkpoints/NAME; a second submission resumes there",
            "",
            "resources:",
            *resources,
            "",
            "# env: {HF_HOME: /scratch/hf}  # byte for byte on every rank",
            "# secrets: {HF_TOKEN: {from_env: HF_TOKEN}}",
            "# modules: [cuda/12.4]",
            "# venv: .venv",
            "# container: nvcr.io/nvidia/pytorch:25.01-py3   # pods need one; on Slurm through pyxis",
            "",
            "slurm:",
            "  time: 4:00:00",
            "  # partition: gpu",
            "  # account: my-project",
            "",
        ]
    )
