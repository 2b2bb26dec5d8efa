"""Train a byte-level GPT with DeepSpeed, to the end or to the next interruption.

    torchrun --nproc-per-node 2 train_gpt.py --deepspeed_config ds.json --steps 200 --checkpoint-dir ckpt

The DeepSpeed configuration alone decides optimizer, learning rate, ZeRO stage, precision, offload and
batch sizes; the flags decide the model's shape, the text, the number of steps and the checkpoints. Needs
torch, deepspeed and launcher.checkpoints, which lies beside it; and RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT, which torchrun, deepspeed and dslaunch set.

Started again with the same --checkpoint-dir it goes on where it stopped, with the same losses.

Exit codes: 0 all steps done; 1 failed (a traceback, or replicas that differ); 2 wrong input, said in one
line; 75 stopped by SIGTERM or SIGUSR2 with a checkpoint saved: start it again; 93 the disk is full: make room
first, the last checkpoint is still good.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import resource
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

# launcher.checkpoints: in a run directory beside this file, in a pod in a zip, in dslaunch itself where it is.
HERE = os.path.dirname(os.path.abspath(__file__))
PLACES = ("code", "code.zip", os.path.join(os.pardir, os.pardir))
sys.path.insert(0, next(path for name in PLACES if os.path.exists(path := os.path.join(HERE, name))))
from launcher.checkpoints import choose as choosing  # noqa: E402
from launcher.checkpoints import layout, manifest, retention, shards  # noqa: E402

del sys.path[0]

try:
    import dslaunch_pulse as pulse  # type: ignore[import-not-found]  # on every rank's path
except ImportError:
    pulse = None

# DeepSpeed calls collectives by names that newer torch deprecates, and torch says so at every call.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

STOPPED_EARLY = 75  # EX_TEMPFAIL
DO_NOT_RESTART = 93
DATA_CAP = 8_000_000  # bytes: enough to learn from, small beside any model
TAG = re.compile(r"step\d{8,}")


class Refused(Exception):
    """What the user can mend, in words: exit code 2."""


class DiskFull(Exception):
    """Only this checkpoint is lost, and the next would not fit either: exit code 93, not to be restarted."""


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
# in it, with the size and hash of every file. DeepSpeed's own `latest` is written too, and not trusted.


def set_aside(directory: str) -> None:
    """--fresh: a later restart must not take up the run before this one."""
    old = [name for name in layout.names(directory) if TAG.fullmatch(name)]
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


def choose(directory: str, here: dict[str, Any], distrusted: dict[str, str]) -> tuple[int, bool]:
    """The newest verified checkpoint that fits this run: (its step, load it as universal); (-1, _) for none."""
    retention.sweep(directory)
    found = choosing.choose(
        directory, world_size=here["world_size"], stage=here["zero_stage"], seconds=0, distrusted=distrusted
    )
    for tag in found.skipped:
        say(f"skipping checkpoint {tag.name}: {tag.why or 'it has no complete.json: the save was cut off'}")
    if found.action == "start":
        return -1, False
    if found.tag is not None and not found.tag.universal:
        said = manifest.read(found.tag.path)
        for what in ("shape", "precision"):
            if said and what in said.more and said.more[what] != here[what]:
                raise Refused(
                    f"{found.tag.path} was saved with {what} {said.more[what]}, this run has {here[what]}: "
                    "give this run the same, or start over with --fresh"
                )
    if found.action == "convert":
        raise Refused(f"{found.why}; start over with --fresh, or convert it: {' '.join(found.command)}")
    if found.tag is None or found.action == "refuse":
        raise Refused(f"{found.why}: to start over, --fresh")
    step, universal = found.tag.step or 0, found.action == "universal"
    if found.tag.name != tag_of(step, universal=universal):
        raise Refused(f"{found.tag.path} is not this trainer's: to start over, another --checkpoint-dir")
    choosing.prepare(found, directory)
    return step, universal


def tag_of(step: int, *, universal: bool = False) -> str:
    return f"step{step:08d}" + ("_universal" if universal else "")


def agree_on_resume(options: argparse.Namespace, here: dict[str, Any]) -> tuple[int, bool]:
    """Rank 0 looks, everyone hears: file systems do not show all nodes the same thing at the same time.

    Then each rank reads its part of what was chosen, which loading reads anyway. Where a bit has changed, the next
    older checkpoint is taken.
    """
    distrusted: dict[str, str] = {}
    while True:
        answer, refusal = (-1, False), ""
        if dist.get_rank() == 0 and options.checkpoint_dir:
            try:
                if options.fresh:
                    set_aside(options.checkpoint_dir)
                else:
                    answer = choose(options.checkpoint_dir, here, distrusted)
            except Refused as why:
                answer, refusal = (-2, False), str(why)
        step, universal = (int(n) for n in broadcast([float(n) for n in answer]))
        if step == -2:
            raise Refused(refusal or "rank 0 cannot resume here: its log says why")
        if step == -1:
            return step, False
        tag = tag_of(step, universal=bool(universal))
        wrong = spoiled(os.path.join(options.checkpoint_dir, tag))
        if wrong:
            print(f"train_gpt (rank {dist.get_rank()}): {tag}: {wrong}", flush=True)
        if not total([bool(wrong)])[0]:
            return step, bool(universal)
        distrusted[tag] = wrong or "another rank read what was not saved"


def spoiled(folder: str) -> str:
    """What is wrong with the files that this rank reads for all: its own shards, and its part of the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    names = sorted(shards.files(folder))
    mine = [name for number, name in enumerate(names) if (shards.owner(name) or number) % world == rank]
    return shards.some(manifest.changed(folder, mine)[0])


def save(engine: Any, options: argparse.Namespace, *, step: int, here: dict[str, Any]) -> str:
    """Save, then vouch for it, then clear away what is no longer needed, in that order."""
    tag = tag_of(step)
    directory = options.checkpoint_dir
    folder = os.path.join(directory, tag)
    first = dist.get_rank() == 0
    short = ""
    if first:
        retention.remove(directory, tag)  # the rest of a save that was cut off
        short = retention.shortage(directory)
    if broadcast([float(bool(short))])[0]:
        raise DiskFull(short or "rank 0 says how much is free")
    try:
        engine.save_checkpoint(directory, tag=tag)
        names = shards.files(folder)
        hashes = manifest.seal(folder, [name for name in names if shards.owner(name) == dist.get_rank()])
    except (OSError, RuntimeError) as error:
        if retention.is_full(error, directory):
            retention.remove(directory, tag)  # room for logs, and nothing half written stays
            raise DiskFull(f"{directory} was full before {tag} was on disk: {error}") from None
        raise
    everywhere: list[dict[str, str]] = [{}] * here["world_size"]
    dist.all_gather_object(everywhere, hashes)
    there = shards.files(folder)
    wanted = {"dp_world_size": here["world_size"], "stage": here["zero_stage"]}
    missing = shards.layout(there, wanted).missing if first else ()
    (count,) = broadcast([len(missing)])
    if count:
        raise Refused(
            f"{folder} has no {missing[0] if missing else 'file of some rank'}: "
            "--checkpoint-dir must be one directory that all nodes share"
        )
    if first:
        told = {name: here[name] for name in ("shape", "precision", "deepspeed", "torch")}
        sealed = {name: value for part in everywhere for name, value in part.items()}
        manifest.write(
            folder, step=step, world_size=here["world_size"], stage=here["zero_stage"], hashes=sealed, **told
        )
        manifest.point(directory, tag)
        retention.retain(directory, keep=options.checkpoint_keep)
    dist.barrier()
    return tag


# -------------------------------------------------------------------------------------- between ranks


def say(text: str) -> None:
    if os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):  # as below
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
    if pulse:
        pulse.watch()


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
        tag = tag_of(step, universal=universal)
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
        if pulse:
            pulse.step(step, losses[-1])
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
            with contextlib.suppress(OSError):  # logs that are full end no training
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
                with pulse.phase("checkpoint") if pulse else contextlib.nullcontext():
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
    except DiskFull as why:
        rank = os.environ.get("RANK", "?")
        print(f"train_gpt (rank {rank}): DISK_FULL: No space left on device: {why}", file=sys.stderr, flush=True)
        code = DO_NOT_RESTART
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All is saved and said. A Python that shuts down in order ends torch's background threads in the middle of
    # C++ code, which now and then aborts the process: "terminate called without an active exception".
    os._exit(code)
