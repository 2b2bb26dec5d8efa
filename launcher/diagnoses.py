"""A diagnosis for a person: what happened, where, why we think so, what to change, and whether to start again."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.diagnose import Cause, Diagnosis, Line, Signature, to_json

WIDTH = 110
SHOWN = 8
# Where an environment variable is the answer and has one good value.
VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "HF_HUB_OFFLINE": "1",
    "NCCL_CROSS_NIC": "0",
    "NCCL_CUMEM_HOST_ENABLE": "0",
    "NCCL_DEBUG": "WARN",
    "PYTHONFAULTHANDLER": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "WANDB_MODE": "offline",
}
AGAIN = {
    "yes": "yes, as it is",
    "elsewhere": "yes, without the node",
    "once": "once; if it comes back, not before it is understood",
    "after fix": "not before this is changed",
    "no": "no: it would end the same way",
    "wait": "not needed: the scheduler goes on by itself",
    "-": "that depends on the cause, which is not known",
}


def causes(diagnosis: Diagnosis) -> list[str]:
    """The root's id, then what was seen beside it; `none` alone where nothing was found."""
    root = [diagnosis.root] if diagnosis.root else []
    return [one.cause.id for one in [*root, *diagnosis.others]] if root else ["none"]


def headline(value: Mapping[str, Any]) -> str:
    """One line of a diagnosis as JSON has it; empty where there is no cause.

    `cuda_oom: a GPU's memory ran out (rank 3 on node2, rank-00003.log:812)`
    """
    root = value.get("root")
    if not root:
        return ""
    lines = root.get("lines") or []
    who = [_who(root.get("rank"), root.get("node") or "")]
    if lines:
        who.append(_place(lines[0]["file"], lines[0]["number"]))
    where = ", ".join(part for part in who if part)
    return f"{root['cause']['id']}: {root['cause']['meaning']}" + (f" ({where})" if where else "")


def text(
    diagnosis: Diagnosis, *, config: Mapping[str, Any] | None = None, notes: Sequence[str] = (), done: bool = False
) -> str:
    """All of it; `config` is the run's DeepSpeed config, for values to change, `done` that it ended well."""
    root = diagnosis.root
    rows: list[tuple[str, str]] = []
    if root is None:
        seen = ", ".join(one.cause.id for one in diagnosis.others)
        nothing = "nothing to explain: the run is done" if done else "no cause found"
        lines = [nothing + (f"; seen: {seen}" if seen else "")]
        return "\n".join([*lines, *_block([("note", note) for note in notes])])
    lines = [f"{root.cause.id}: {root.cause.meaning}", ""]
    if root.cause.rank > 4:
        rows.append(("", "Only what follows from a cause was seen; the cause itself left no word that we know."))
    where = _who(root.rank, root.node)
    rows += [("where", where)] if where else []
    spoken = [_spoken(line) for line in root.lines[:SHOWN]]
    said = [root.said] if root.said else []
    rows += [("why" if number == 0 else "", row) for number, row in enumerate([*said, *spoken])]
    change = suggestion(root.cause, config)
    rows += [("change", change)] if change else []
    rows.append(("fix" if not change else "", root.cause.fix))
    rows.append(("again", _again(diagnosis, root.cause)))
    for number, one in enumerate(diagnosis.others):
        place = f" ({_place(one.lines[0].file, one.lines[0].number)})" if one.lines else ""
        rows.append(("seen too" if number == 0 else "", f"{one.cause.id}: {one.cause.meaning}{place}"))
    rows += [("note", note) for note in notes]
    return "\n".join([*lines, *_block(rows)])


def as_json(
    diagnosis: Diagnosis, *, config: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    root = diagnosis.root
    return {
        "cause": causes(diagnosis)[0],
        **to_json(diagnosis),
        "change": suggestion(root.cause, config) if root else "",
        "again": _again(diagnosis, root.cause) if root else "",
        "notes": list(notes),
    }


def suggestion(cause: Cause, config: Mapping[str, Any] | None) -> str:
    """`train.micro_batch: 2   # was 4`, as a line of the job file; empty where no line helps."""
    if not cause.key:
        return ""
    made = VALUES.get(cause.id)
    value = made(config) if made and config else ""
    section, _, name = cause.key.partition(".")
    if section == "env":
        value = VARIABLES.get(name, "")
        return f"{cause.key}: {value!r}" if value else f"{cause.key} of the job file"
    return f"{cause.key}: {value}" if value else f"{cause.key} of the job file"


def _halved(config: Mapping[str, Any]) -> str:
    micro = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int):
        return ""
    if micro > 1:
        return f"{micro // 2}   # was {micro}; the global batch stays, by accumulating more"
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    return f"1   # it is 1 already: train.zero {stage + 1} next" if stage < 3 else ""


def _precision(config: Mapping[str, Any]) -> str:
    half = config.get("fp16") or {}
    return "bf16   # was fp16" if half.get("enabled") else ""


VALUES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cuda_oom": _halved,
    "cublas_cudnn_failed": _halved,
    "ds_min_loss_scale": _precision,
}


def _again(diagnosis: Diagnosis, cause: Cause) -> str:
    if diagnosis.exclude:
        nodes = ", ".join(diagnosis.exclude)
        return f"without {nodes}" + (" until it is mended" if cause.exclude == "temp" else "")
    return AGAIN[cause.retry]


def _who(rank: int | None, node: str) -> str:
    parts = [f"rank {rank}" if rank is not None else "", f"on {node}" if node else ""]
    return " ".join(part for part in parts if part)


def _place(file: str, number: int) -> str:
    name = file.rsplit("/", 1)[-1]
    return f"{name}:{number}" if number else f"{name}, near its end"


def _spoken(line: Line) -> str:
    who = _who(line.rank, line.node)
    return f"{_place(line.file, line.number)}{f' ({who})' if who else ''}: {line.text.strip()[:300]}"


def _block(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of a name and a text, the text wrapped beside its name."""
    wide = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, words in rows:
        wrapped = textwrap.wrap(words, WIDTH - wide - 4, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"  {name:{wide}}  {wrapped[0]}".rstrip())
        lines += [f"  {'':{wide}}  {rest}" for rest in wrapped[1:]]
    return lines


def explained(asked: str, known: Mapping[str, Cause], signatures: Sequence[Signature]) -> str | None:
    """A cause, or the cause of a signature, in full; None where neither has this id."""
    own = next((row for row in signatures if row.id.lower() == asked.lower()), None)
    cause = known.get(own.cause if own else asked.lower())
    if cause is None:
        return None
    kind = "root" if cause.rank <= 4 else "carries a root's words" if cause.rank == 5 else "follows from a cause"
    rows = [
        ("layer", cause.layer),
        ("blame", f"{kind} (rank {cause.rank})"),
        ("node", f"exclude: {cause.exclude}"),
        ("again", AGAIN[cause.retry]),
        ("fix", cause.fix),
        ("job file", cause.key),
    ]
    for row in [own] if own else [row for row in signatures if row.cause == cause.id]:
        rows.append((row.id, row.sample.split("\n")[0][:300]))
    return "\n".join([f"{cause.id}: {cause.meaning}", "", *_block([row for row in rows if row[1]])])
