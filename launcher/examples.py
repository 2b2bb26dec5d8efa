"""Job files to begin with: the gallery's, and one written for a model, GPU and number of nodes."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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
    site: Path | None = None  # a file that the job needs beside it: `--site`


def shipped() -> list[Example]:
    """The gallery's job files: beside the package in a checkout, inside it when installed.

    A site file that lies beside one is an example too: slurm/NAME/site.yaml.
    """
    base = HERE / "gallery" if (HERE / "gallery").is_dir() else HERE.parent
    found = []
    for path in (*sorted(base.glob("slurm/*/job.yaml")), *sorted(base.glob("manifests/*/job.yaml"))):
        name, site = "/".join(path.parts[-3:-1]), path.with_name("site.yaml")
        if site.is_file():
            found.append(Example(name, _first_sentence(path), path, site))
            found.append(Example(f"{name}/{site.name}", _first_sentence(site), site))
        else:
            found.append(Example(name, _first_sentence(path), path))
    return found


def _first_sentence(path: Path) -> str:
    """Of the comment that a file begins with, which may go on over several lines."""
    with path.open(encoding="utf-8") as file:
        comment = itertools.takewhile(lambda line: line.startswith("#"), file)
        text = " ".join(line.lstrip("#").strip() for line in comment)
    return re.split(r"(?<=[a-z0-9)]\.) ", text)[0]


def text(name: str) -> str:
    rows = {row.name: row for row in shipped()}
    if name not in rows:
        inside = [known for known in rows if name.lower() in known][:3]  # without the directory, say
        hint = f"there are {', '.join(inside)}" if inside else yamldoc.suggest(name, rows)
        raise UserError(Problem(f"no example `{name}`", hint or "dslaunch init --example list shows them"))
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
    name = _job_name(name, model.removesuffix(".json"))
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
        zero = "auto                     # the planner's choice: dslaunch plan"
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
            "  checkpoint: {every: auto, keep: 2}  # under checkpoints/NAME; a second submission resumes there",
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


def preset(
    configuration: str,
    *,
    gpu: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    fabric: str | None = None,
    name: str | None = None,
) -> str:
    """A guide's configuration as a job file whose comments say what was wrong, why, and what stands there instead."""
    row = facts.preset(configuration)
    asked = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "gpu": facts.gpu(gpu).name if gpu else None,
        "fabric": facts.fabric(fabric).name if fabric else None,
    }
    resources = {**row.job["resources"], **{key: value for key, value in asked.items() if value is not None}}
    train = {"script": "train.py", **row.job["train"]}
    sections = {"model": row.job["model"], "train": train, "resources": resources}
    corrections: dict[str, list[str]] = {}
    for mistake in row.corrections:
        corrections.setdefault(_nearest(mistake.at, sections), []).extend(_says(mistake))
    remarks = {"train.script": "yours", "resources.gpu": "dslaunch presets --gpus", **row.remarks}
    lines = [SCHEMA_LINE, f"# {row.says}.", *_comment(f"After the guide's `{row.name}`: {row.hardware}.")]
    if resources != row.job["resources"]:
        here = f"{resources['nodes']} x {resources['gpus_per_node']} {resources['gpu']}"
        lines.append(f"# Here it is {here}.")
    if corrections.get(""):
        lines += ["#", *corrections[""]]
    lines.append(f"name: {_job_name(name, row.name)}")
    for key, value in sections.items():
        if key != "model":
            lines.append("")
        lines += corrections.get(key, [])
        lines += _entries(key, value, corrections, remarks)
    return "\n".join(
        [*lines, "", "slurm:", "  time: 1-00:00:00", "  # partition: gpu", "  # account: my-project", ""]
    )


def _entries(key: str, value: Any, corrections: dict[str, list[str]], remarks: dict[str, str]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{key}: {value}"
        return
    yield f"{key}:"
    for name, inner in value.items():
        path = f"{key}.{name}"
        yield from ("  " + line for line in corrections.get(path, ()))
        line = f"  {name}: {_flow(inner)}"
        yield f"{line:<38}  # {remarks[path]}" if path in remarks else line


def _flow(value: Any) -> str:
    """{type: AdamW, lr: 2e-05} on one line, as YAML 1.2 reads it back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nearest(at: str, sections: dict[str, Any]) -> str:
    """The key itself where the job has it, its section otherwise, so that nothing is left unsaid."""
    section, _, key = at.partition(".")
    if not at or key in sections[section]:
        return at
    return section


def _says(mistake: facts.Correction) -> list[str]:
    return [
        *_comment(f"The guide: {mistake.wrong}."),
        *_comment(mistake.check, indent="  "),
        *_comment(f"instead: {mistake.instead}", indent="  "),
    ]


def _comment(text: str, *, indent: str = "") -> list[str]:
    lines = textwrap.wrap(text, 108 - len(indent), break_long_words=False, break_on_hyphens=False)
    return [f"# {indent}{line}" for line in lines]


def _job_name(asked: str | None, otherwise: str) -> str:
    name = asked or re.sub(r"[^a-z0-9]+", "-", otherwise.lower()).strip("-")[:40].strip("-")
    if not get_args(Name)[1].regex.fullmatch(name):
        raise UserError(Problem(f"--name {name}: a name is 1 to 40 lower-case letters, digits and inner dashes"))
    return name
