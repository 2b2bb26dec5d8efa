"""Train a byte-level GPT with DeepSpeed, to the end or to the next interruption.

    torchrun --nproc-per-node 2 train_gpt.py --deepspeed_config ds.json --steps 200 --checkpoint-dir ckpt

The DeepSpeed configuration alone decides optimizer, learning rate, ZeRO stage, precision, offload and
batch sizes; the flags decide the model's shape, the text, the number of steps and the checkpoints. Needs
torch and deepspeed, nothing else, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which
torchrun, deepspeed and dslaunch set.

Started again with the same --checkpoint-dir it goes on where it stopped, with the same losses.

Exit codes: 0 all steps done; 1 failed (a traceback, or replicas that differ); 2 wrong input, said in one
line; 75 stopped by SIGTERM or SIGUSR2 with a checkpoint saved: start it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
received: list[int] = []

if __name__ == "__main__":
    # Before the slow imports, so that a stop during start-up is not a death. Blocked until the first step:
    # compilers that DeepSpeed starts inherit this, and a signal to the whole job does not kill them.
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: received.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when imported

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# DeepSpeed calls collectives by names that newer torch deprecates, and torch says so at every call.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

STOPPED_EARLY = 75  # EX_TEMPFAIL
DATA_CAP = 8_000_000  # bytes: enough to learn from, small beside any model
TAG = re.compile(r"step(\d{8,})")
MANIFEST = "complete.json"


class Refused(Exception):
    """What the user can mend, in words: exit code 2."""


# ---------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, hidden))
        return out


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.before_mlp = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.before_mlp(x))))
        return out


class GPT(nn.Module):
    """forward(tokens) is the loss: each token predicts the next, so seq + 1 tokens make seq guesses."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(options.vocab, options.hidden)
        self.positions = nn.Embedding(options.seq_len, options.hidden)
        self.blocks = nn.ModuleList(Block(options.hidden, options.heads) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.hidden)
        self.head = nn.Linear(options.hidden, options.vocab, bias=False)
        self.recompute = options.activation_checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        seen, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(seen) + self.positions(torch.arange(seen.shape[1], device=seen.device))
        for block in self.blocks:
            x = deepspeed.checkpointing.checkpoint(block, x) if self.recompute else block(x)
        guesses = self.head(self.norm(x)).float()
        return F.cross_entropy(guesses.flatten(0, 1), wanted.flatten())


def parameter_groups(model: GPT, optimizer: str) -> Any:
    """What the optimizer gets: everything alike, except for OneBitAdam's embeddings.

    A byte not yet seen has a gradient of exactly 0. One bit cannot say 0, so the compressed stage would push
    its row by +-scale / eps; `non_freeze` keeps OneBitAdam's embeddings uncompressed.
    """
    if optimizer.lower() != "onebitadam":
        return model.parameters()
    embeddings = [*model.tokens.parameters(), *model.positions.parameters()]
    others = [p for p in model.parameters() if all(p is not e for e in embeddings)]
    return [{"params": others}, {"params": embeddings, "non_freeze": True}]


def carry_on(engine: Any) -> None:
    """Tell a loaded 1-bit optimizer that its first step is behind it.

    DeepSpeed 0.19.6 forgets: it would spend one step without an update, then in the compressed stage one
    with each rank's own gradients, and the replicas differ from there on.
    """
    if getattr(engine.basic_optimizer, "initialize", None) is False:
        engine.basic_optimizer.initialize = True


# ----------------------------------------------------------------------------------------------- data


def text_files(paths: list[str]) -> Iterator[str]:
    """Files as given; directories walked in sorted order, the same on every node."""
    for path in paths:
        if os.path.isfile(path):
            yield path
        for folder, below, names in os.walk(path):
            below[:] = sorted(d for d in below if not d.startswith(".") and d not in SKIPPED)
            yield from (os.path.join(folder, n) for n in sorted(names) if not n.startswith("."))


SKIPPED = ("site-packages", "dist-packages", "__pycache__")


def corpus(paths: list[str], *, at_least: int) -> Tensor:
    """The bytes of every file, one after the other, up to 8 MB."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise Refused(f"--data {', '.join(missing)}: no such file or directory on this node")
    files: Iterator[str] = text_files(paths)
    if not paths:
        files = (f for f in text_files([sysconfig.get_paths()["stdlib"]]) if f.endswith(".py"))
    text = bytearray()
    for file in files:
        with open(file, "rb") as opened:
            text += opened.read(DATA_CAP - len(text))
        if len(text) >= DATA_CAP:
            break
    if len(text) < at_least:
        raise Refused(f"--data holds {len(text):,} bytes; one sequence takes {at_least:,}")
    return torch.frombuffer(text, dtype=torch.uint8)


def draw(text: Tensor, options: argparse.Namespace, *, step: int, micro: int, rows: int) -> Tensor:
    """The batch of one micro step on this rank, from the step's number alone.

    Nothing to save, nothing to fast-forward: a resumed run draws what an uninterrupted one would have. The
    same goes for torch's generator, should you add dropout.
    """
    chance = random.Random(f"{options.seed} {step} {micro} {dist.get_rank()}")  # noqa: S311 - to be repeated
    torch.manual_seed(chance.getrandbits(63))
    starts = [chance.randrange(len(text) - options.seq_len) for _ in range(rows)]
    return torch.stack([text[start : start + options.seq_len + 1] for start in starts]).long()


# ---------------------------------------------------------------------------------------- checkpoints
#
# A checkpoint is a folder step00000050 that DeepSpeed fills from every rank. It counts once complete.json is
# in it and names every file with the size it has. DeepSpeed's own `latest` is written too, and not trusted.


def sizes(folder: str, *, sync: bool = False) -> dict[str, int]:
    """{"mp_rank_00_model_states.pt": 1234}, folders below included, the manifest left out."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            relative = os.path.relpath(path, folder)
            if relative in (MANIFEST, MANIFEST + ".tmp"):
                continue
            if sync:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            found[relative] = os.path.getsize(path)
    return dict(sorted(found.items()))


def manifest(folder: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a complete checkpoint, or None and why it is not complete."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as opened:
            said = json.load(opened)
        wanted = dict(said["files"])
        if f"step{said['step']:08d}" != os.path.basename(folder) or said["world_size"] < 1:
            raise ValueError(f"step {said['step']}, world_size {said['world_size']}")
    except FileNotFoundError:
        return None, f"no {MANIFEST}: the save was cut off"
    except (ValueError, TypeError, KeyError) as error:
        return None, f"{MANIFEST} is unreadable: {error!r}"
    there = sizes(folder)
    for name, size in wanted.items():
        if there.get(name) != size:
            return None, f"{name} has {there.get(name, 'no')} bytes, saved were {size}"
    return said, ""


def tags(directory: str) -> list[str]:
    """Checkpoint folders, newest first, complete or not."""
    try:
        names = [name for name in os.listdir(directory) if TAG.fullmatch(name)]
    except FileNotFoundError:
        return []
    return sorted(names, key=lambda name: int(name.removeprefix("step")), reverse=True)


def set_aside(directory: str) -> None:
    """--fresh: a later restart must not take up the run before this one."""
    old = tags(directory)
    if not old:
        return
    count = 1
    while os.path.exists(aside := os.path.join(directory, f"before-fresh-{count}")):
        count += 1
    os.mkdir(aside)
    for tag in old:
        for name in (tag, tag + "_universal"):
            if os.path.exists(os.path.join(directory, name)):
                os.rename(os.path.join(directory, name), os.path.join(aside, name))
    say(f"--fresh: {len(old)} earlier checkpoints moved to {aside}")


def choose(directory: str, here: dict[str, Any]) -> tuple[int, bool]:
    """The newest complete checkpoint that fits this run: (its step, load it as universal); (-1, _) for none."""
    found = tags(directory)
    for tag in found:
        folder = os.path.join(directory, tag)
        said, why = manifest(folder)
        if said is None:
            say(f"skipping checkpoint {tag}: {why}")
            continue
        for what in ("zero_stage", "shape", "precision"):
            if said.get(what) != here[what]:
                raise Refused(
                    f"{folder} was saved with {what} {said.get(what)}, this run has {here[what]}: "
                    "give this run the same, or start over with --fresh"
                )
        if said["world_size"] == here["world_size"] or here["zero_stage"] == 0:
            return said["step"], False
        if os.path.isdir(folder + "_universal"):
            return said["step"], True
        raise Refused(
            f"{folder} was saved by {said['world_size']} ranks at ZeRO stage {said['zero_stage']}, this run "
            f"has {here['world_size']}: run on {said['world_size']}, or start over with --fresh, or convert "
            f"it: python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {folder} --output_folder {folder}_universal"
        )
    if found:
        raise Refused(f"none of the {len(found)} checkpoints in {directory} is complete: to start over, --fresh")
    return -1, False


def agree_on_resume(options: argparse.Namespace, here: dict[str, Any]) -> tuple[int, bool]:
    """Rank 0 looks, everyone hears: file systems do not show all nodes the same thing at the same time."""
    answer, refusal = (-1, False), ""
    if dist.get_rank() == 0 and options.checkpoint_dir:
        try:
            if options.fresh:
                set_aside(options.checkpoint_dir)
            else:
                answer = choose(options.checkpoint_dir, here)
        except Refused as why:
            answer, refusal = (-2, False), str(why)
    step, universal = (int(n) for n in broadcast([float(n) for n in answer]))
    if step == -2:
        raise Refused(refusal or "rank 0 cannot resume here: its log says why")
    return step, bool(universal)


def save(engine: Any, options: argparse.Namespace, *, step: int, here: dict[str, Any]) -> str:
    """Save, then vouch for it, then clear away what is no longer needed, in that order."""
    tag = f"step{step:08d}"
    folder = os.path.join(options.checkpoint_dir, tag)
    first = dist.get_rank() == 0
    if first:
        remove(folder)  # the rest of a save that was cut off
    dist.barrier()
    engine.save_checkpoint(options.checkpoint_dir, tag=tag)
    dist.barrier()
    files = sizes(folder, sync=True) if first else {}
    (shards,) = broadcast([sum(name.endswith("_optim_states.pt") for name in files)])
    if here["zero_stage"] and shards < here["world_size"]:
        raise Refused(
            f"{folder} holds the optimizer states of {shards:.0f} of {here['world_size']} ranks: "
            "--checkpoint-dir must be one directory that all nodes share"
        )
    if first:
        text = json.dumps({"step": step, **here, "files": files}, indent=1)
        path = os.path.join(folder, MANIFEST)
        with open(path + ".tmp", "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.rename(path + ".tmp", path)
        clear_away(options.checkpoint_dir, keep=options.checkpoint_keep)
    dist.barrier()
    return tag


def clear_away(directory: str, *, keep: int) -> None:
    """Leave the newest `keep` complete checkpoints, and whatever is newer than those."""
    complete = [tag for tag in tags(directory) if manifest(os.path.join(directory, tag))[0]]
    if len(complete) < keep:
        return
    for tag in tags(directory):
        if int(tag.removeprefix("step")) < int(complete[keep - 1].removeprefix("step")):
            remove(os.path.join(directory, tag))


def remove(folder: str) -> None:
    """A checkpoint, with what ds_to_universal may have made of it."""
    for path in (folder, folder + "_universal"):
        shutil.rmtree(path, ignore_errors=True)


# -------------------------------------------------------------------------------------- between ranks


def say(text: str) -> None:
    if os.environ.get("RANK") == "0":
        print(text, flush=True)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def broadcast(numbers: list[float]) -> list[float]:
    """Rank 0's numbers, on every rank."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.broadcast(tensor, src=0)
    answer: list[float] = tensor.tolist()
    return answer


def total(numbers: list[float]) -> list[float]:
    """The sums over all ranks."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    answer: list[float] = tensor.tolist()
    return answer


def replicas_agree(model: nn.Module) -> bool:
    """Bit for bit, every parameter, on every rank. For stage 0, where each rank holds all of them."""
    digest = hashlib.blake2b(digest_size=7)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mine = int.from_bytes(digest.digest(), "big")
    extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest_negated = extremes.tolist()
    return bool(highest == -lowest_negated)


def memory_bytes() -> int:
    """The most this rank held: of the GPU, or without one of the host (ru_maxrss counts KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------- training


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--deepspeed_config", "--deepspeed-config", required=True, metavar="FILE", help="DeepSpeed's JSON")
    add("--local_rank", "--local-rank", type=int, help="ignored: LOCAL_RANK counts")
    add("--steps", type=int, default=200, help="optimizer steps, those before a restart included (200)")
    add("--seq-len", type=int, default=128, metavar="S", help="bytes a sequence (128)")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--vocab", type=int, default=256, help="at least the 256 bytes; more only makes the model larger")
    add("--data", action="append", default=[], metavar="PATH", help="text to learn (Python's own sources)")
    add("--activation-checkpointing", action="store_true", help="recompute each block in backward")
    add("--checkpoint-dir", metavar="D", help="shared by all nodes; without it nothing is saved")
    add("--checkpoint-every", type=int, default=0, metavar="K", help="steps; 0: only at the end")
    add("--checkpoint-keep", type=int, default=2, metavar="K", help="complete checkpoints to keep (2)")
    add("--fresh", action="store_true", help="set earlier checkpoints aside and start at step 0")
    add("--seed", type=int, default=0)
    add("--metrics", metavar="FILE", default=os.environ.get("DSLAUNCH_METRICS"), help="one JSON line a step")
    add("--log-every", type=int, default=10, metavar="K", help="steps between lines on stdout (10)")
    options = parser.parse_args(argv)
    for name in ("steps", "seq_len", "layers", "hidden", "heads", "checkpoint_keep", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.vocab < 256:
        parser.error(f"--vocab {options.vocab}: text is bytes, so 256 is the least")
    if options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} is not a multiple of --heads {options.heads}")
    return options


def configuration(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as opened:
            config = json.load(opened)
    except (OSError, ValueError) as error:
        raise Refused(f"--deepspeed_config {path}: {error}") from None
    if not isinstance(config, dict):
        raise Refused(f"--deepspeed_config {path}: not a JSON object")
    if auto := list(autos(config)):
        raise Refused(
            f'{path}: {", ".join(auto)} still "auto": only Hugging Face\'s Trainer fills that in, '
            "DeepSpeed needs the value"
        )
    if "type" not in config.get("optimizer", {}):
        raise Refused(f"{path}: no optimizer.type, and this trainer has no optimizer of its own")
    return config


def autos(value: Any, at: str = "") -> Iterator[str]:
    """{"optimizer": {"params": {"lr": "auto"}}} has one: optimizer.params.lr."""
    if value == "auto":
        yield at
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from autos(inner, f"{at}.{key}" if at else key)


def join() -> None:
    """Meet the other ranks."""
    missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise Refused(f"{', '.join(missing)} not set: start this with torchrun, deepspeed or dslaunch")
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise Refused(
                f"LOCAL_RANK is {local} and this process sees {gpus} GPUs: show every rank all of its node's"
            )
        torch.cuda.set_device(local)
    deepspeed.init_distributed()


def main() -> int:
    options = arguments()
    config = configuration(options.deepspeed_config)
    text = corpus(options.data, at_least=options.seq_len + 1)
    join()
    try:
        code = train(options, config, text)
        dist.barrier()  # rank 0 keeps the meeting point: it leaves with the others, not before
    except Refused:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    return code


def train(options: argparse.Namespace, config: dict[str, Any], text: Tensor) -> int:
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    optimizer = str(config["optimizer"]["type"])
    here = {
        "world_size": dist.get_world_size(),
        "zero_stage": stage,
        "shape": {name: getattr(options, name) for name in ("layers", "hidden", "heads", "vocab", "seq_len")},
        "precision": next((p for p in ("fp16", "bf16") if config.get(p, {}).get("enabled")), "fp32"),
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
    }
    resumed, universal = agree_on_resume(options, here)
    step = max(resumed, 0)
    if step >= options.steps:
        say(f"already at step {step} of {options.steps}: nothing to do")
        return 0
    if universal:
        config.setdefault("checkpoint", {})["load_universal"] = True

    torch.manual_seed(options.seed)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):  # never whole on one rank
        model = GPT(options)
    if options.activation_checkpointing:
        deepspeed.checkpointing.configure(None, deepspeed_config=config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model, optimizer), config=config)
    rows, micros = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"gpt: {', '.join(f'{k} {v}' for k, v in here['shape'].items())}: {count:,} parameters")
    say(
        f"run: {here['world_size']} ranks on {device().type}, deepspeed {deepspeed.__version__}, torch "
        f"{torch.__version__}, ZeRO stage {stage}, {here['precision']}, {optimizer}, "
        f"batch {here['world_size']} x {rows} x {micros}, {len(text):,} bytes of text"
    )
    if resumed >= 0:
        tag = f"step{step:08d}" + ("_universal" if universal else "")
        loaded, _ = engine.load_checkpoint(options.checkpoint_dir, tag=tag)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {tag} from {options.checkpoint_dir}")
        carry_on(engine)
        say(f"resumed at step {step} from {tag}")

    metrics = None
    if options.metrics and dist.get_rank() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(options.metrics)), exist_ok=True)
        metrics = open(options.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open to the end

    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    saved = resumed
    compressed = False
    losses: list[float] = []
    stopping = total([len(received)])[0] > 0
    while step < options.steps and not stopping:
        if not compressed and not engine.enable_backward_allreduce:
            compressed = True
            say(f"compressed stage from step {step + 1}: engine all-reduce off")
        started = time.perf_counter()
        lr = engine.get_lr()[0]
        loss = torch.zeros((), device=device())
        for micro in range(micros):
            part = engine(draw(text, options, step=step, micro=micro, rows=rows).to(device()))
            engine.backward(part)
            engine.step()
            loss += part.detach() / micros
        step += 1
        # The loss travels together with the question whether any rank was told to stop.
        summed, told = total([loss.item(), len(received)])
        losses.append(summed / here["world_size"])
        stopping = told > 0
        if not math.isfinite(losses[-1]):
            say(f"loss is {losses[-1]} at step {step}: stopped, nothing saved since step {max(saved, 0)}")
            return 1
        tokens_per_s = here["world_size"] * rows * micros * options.seq_len / (time.perf_counter() - started)
        if metrics:
            norm = engine.get_global_grad_norm()
            line = {
                "step": step,
                "steps": options.steps,
                "loss": losses[-1],
                "tokens_per_s": tokens_per_s,
                **({} if norm is None else {"grad_norm": float(norm)}),
                "lr": lr,
                "memory_bytes": memory_bytes(),
                "time": time.time(),
            }
            metrics.write(json.dumps(line) + "\n")
        if step % options.log_every == 0 or step == options.steps:
            say(f"step {step}/{options.steps}  loss {losses[-1]:.4f}  tokens/s {tokens_per_s:,.0f}")
        last = step == options.steps or stopping
        due = options.checkpoint_every and step % options.checkpoint_every == 0
        if (due and options.checkpoint_dir) or last:
            agree = stage > 0 or replicas_agree(engine.module)
            if not agree and optimizer.lower() != "zerooneadam":  # 0/1 Adam's differ between synchronizations
                say(f"replicas differ at step {step}: the ranks no longer train one model; stopped, nothing saved")
                return 1
            if options.checkpoint_dir:
                say(f"saved {save(engine, options, step=step, here=here)}")
                saved = step
            if last and stage == 0:
                say("replicas agree" if agree else "replicas differ, as 0/1 Adam's do between synchronizations")

    if step < options.steps:
        if not options.checkpoint_dir:
            say(f"stopped at step {step} of {options.steps} by a signal; nothing saved: no --checkpoint-dir")
            return 1
        say(f"stopped at step {step} of {options.steps} by a signal, checkpoint saved")
        return STOPPED_EARLY
    say(f"finished: {step} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except Refused as why:
        if str(why):
            print(f"train_gpt (rank {os.environ.get('RANK', '?')}): {why}", file=sys.stderr, flush=True)
        code = 2
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved and said. A Python that shuts down in order ends torch's background threads in the middle of
    # C++ code, which now and then aborts the process: "terminate called without an active exception".
    os._exit(code)
