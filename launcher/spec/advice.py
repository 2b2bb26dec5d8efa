"""What was meant by a key that stands in the wrong section, or by a value in the short form of another."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin

from launcher import yamldoc
from launcher.errors import UserError
from launcher.spec.kubernetes import Gang, Kubernetes, Network, Volume
from launcher.spec.machines import Preflight, Recover, Resources, Service
from launcher.spec.slurm import Slurm
from launcher.spec.train import Checkpoint, Lora, Train
from launcher.spec.words import Argument, Constraint, Memory, Time

TOP = "JobSpec"
# What a key is called here, by the section in which somebody writes it; JobSpec is the job file itself.
PLACES: dict[str, dict[str, str]] = {
    TOP: {
        "partition": "slurm.partition", "account": "slurm.account", "qos": "slurm.qos", "time": "slurm.time",
        "sbatch": "slurm.sbatch", "image": "container", "script": "train.script", "gpus": "resources.gpus_per_node",
    },
    Slurm.__name__: {
        "nodes": "resources.nodes", "mem": "resources.memory", "gpus": "resources.gpus_per_node",
        "gpus_per_node": "resources.gpus_per_node", "cpus_per_task": "resources.cpus_per_node",
        "ntasks_per_node": "train.launcher: srun, which starts one task for each rank",
        "ntasks": "resources.nodes, with train.launcher: srun for one task for each rank",
        "job_name": "name", "output": "logs/ of the run, where dslaunch writes it", "array": "sweep",
        "export": "env",
    },
    Resources.__name__: {"gpus": "gpus_per_node", "mem": "memory", "cpus": "cpus_per_node"},
    Kubernetes.__name__: {
        "priority": "priority_class, or queue.priority for Kueue's",
        "resources": "resources.gpus_per_node, .cpus_per_node and .memory of the job file, or network.resources",
        "image": "container",
    },
    Network.__name__: {"host": "host_network"},
    Volume.__name__: {"pvc": "claim", "mount_path": "mount"},
    Service.__name__: {"gpus": "gpus_per_node", "cpus": "cpus_per_node", "image": "container"},
}  # fmt: skip
PLACES[Slurm.__name__]["tolerations"] = "kubernetes.tolerations"

# The field that a section's value is for, where it is given as one word: gang: volcano.
SHORT: dict[type, str] = {
    Gang: "by", Network: "profile", Preflight: "run", Recover: "attempts", Lora: "rank", Checkpoint: "dir",
    Train: "script",
}  # fmt: skip
PLAIN = re.compile(r"-{0,2}[A-Za-z_/][A-Za-z0-9_./=+-]*( [A-Za-z0-9_./=+-]+)*\Z")  # in a list of YAML's, unquoted
SPOKEN = re.compile(r"(?:(\d+) ?d(?:ays?)?)? ?(?:(\d+) ?h(?:ours?|rs?)?)? ?(?:(\d+) ?m(?:in(?:ute)?s?)?)?")
MOST = 2  # places named where a key is known


class Advice(yamldoc.Advice):
    """Of a job file, whose sections begin at `root`."""

    def __init__(self, root: type) -> None:
        self.root = root

    def unknown(self, kind: type, key: str) -> str:
        word = key.replace("-", "_")
        if there := PLACES.get(kind.__name__, {}).get(word):
            return f"it is {there}"
        if word in yamldoc.hints(kind):  # spelt with a dash
            return ""
        found = [place for name, place in _fields(self.root, "") if name == word]
        shallow = sorted(found, key=lambda place: place.count("."))[:MOST]
        return f"it is {' or '.join(shallow)}" if shallow else ""

    def instead(self, kind: Any, node: yamldoc.Node) -> str:
        if isinstance(kind, type) and is_dataclass(kind):
            field = SHORT.get(kind)
            return f"{{{field}: {node.raw}}}" if field and _fits(kind, field, node) else ""  # type: ignore[union-attr]
        if get_origin(kind) is not tuple:
            return _joined(kind, node)
        item = get_args(kind)[0]
        if isinstance(node, yamldoc.Table) and isinstance(item, type) and is_dataclass(item):
            known = yamldoc.hints(item)
            if "name" not in known or not known.keys().isdisjoint(node.entries):
                return f"a list, each with a dash: - {next(iter(node.entries), 'name')}: ..."
            return f"- {{name: {next(iter(node.entries), 'NAME')}, ...}}"
        if isinstance(node, yamldoc.Scalar) and not is_dataclass(item):
            return _listed(item, node.raw)
        return ""

    def text(self, limit: yamldoc.Matches, text: str) -> str:
        """24h of a Slurm time is 24:00:00, and 1.5Ti of memory 1536G."""
        if limit in get_args(Memory):
            return _memory(text)
        if limit not in get_args(Time):
            return ""
        found = SPOKEN.fullmatch(text)
        if not found or not any(found.groups()):
            return ""
        days, hours, minutes = (int(part or 0) for part in found.groups())
        hours, minutes = hours + minutes // 60, minutes % 60
        return f"{f'{days}-' if days else ''}{hours:02}:{minutes:02}:00"


def _memory(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?([kKmMgGtT])(?:i?[bB]|i)?", text)
    if not found:
        return ""
    units = "KMGT"
    size, at = float(found[1]), units.index(found[2].upper())
    while size != int(size) and at:
        size, at = size * 1024, at - 1
    return f"{round(size)}{units[at]}" if size >= 1 else ""


def _joined(kind: Any, node: yamldoc.Node) -> str:
    """[a, b], where one text holds several: "a,b"."""
    if not isinstance(node, yamldoc.Sequence) or get_origin(kind) is not Annotated or kind == Constraint:
        return ""  # whether a node has to have both is for the user to say
    words = [item.raw for item in node.items if isinstance(item, yamldoc.Scalar)]
    text = yamldoc.Scalar(",".join(words), False, node.mark)
    return f'"{text.raw}"' if len(words) == len(node.items) > 1 and _reads(text, kind) else ""


def _fits(kind: type, field: str, node: yamldoc.Node) -> bool:
    return isinstance(node, yamldoc.Scalar) and _reads(node, yamldoc.hints(kind)[field])


def _reads(node: yamldoc.Node, kind: Any) -> bool:
    try:
        yamldoc.read(node, kind)
    except UserError:
        return False
    return True


def _listed(item: Any, text: str) -> str:
    """python train.py of words is [python, train.py]; of lines it is one."""
    try:
        words = shlex.split(text) if item == Argument else [text]
    except ValueError:
        words = [text]
    if "\n" in text or not words:
        return ""
    return f"[{', '.join(word if PLAIN.match(word) else _quoted(word) for word in words)}]"


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"


def _fields(section: type, above: str) -> Iterator[tuple[str, str]]:
    """("memory", "resources.memory") of every key of a section and of those within; not of lists."""
    for name, kind in yamldoc.hints(section).items():
        yield name, f"{above}{name}"
        for choice in yamldoc.choices(kind):
            if isinstance(choice, type) and is_dataclass(choice):
                yield from _fields(choice, f"{above}{name}.")
