"""Checkpoints written by DeepSpeed itself, then damaged in every way: none of them may be resumed from."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.checkpoints import choose, layout, manifest, retention, shards, vouch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
WRITER = ROOT / "tests/checkpoint_writer.py"
TRAINER = ROOT / "launcher/node/train_gpt.py"
SHAPE = ["--layers", "2", "--hidden", "64", "--heads", "2", "--seq-len", "64"]
# folder: ranks, kinds. A pipeline comes last: DeepSpeed keeps its grid for all engines that follow.
WORLDS = {
    "one": (1, ["2:fp32", "3:fp32"]),
    "two": (2, ["0:fp32", "0:bf16", "1:fp32", "1:bf16", "2:fp32", "2:bf16", "3:fp32", "3:bf16"]),
    "four": (4, ["1:bf16", "2:fp32", "3:bf16", "experts:0", "experts:2", "pipeline"]),
    "old": (2, ["1:fp32", "2:bf16", "3:fp32"]),  # by DeepSpeed 0.19.6
}


def environment(python: str = sys.executable) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("DSLAUNCH_METRICS", "PYTHONPATH")}
    env["OMP_NUM_THREADS"] = "1"
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # ninja
    env["TORCH_EXTENSIONS_DIR"] = str(CACHE / f"torch-extensions-{'ours' if python == sys.executable else 'old'}")
    return env


def torchrun(ranks: int, *words, check: bool = True):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *map(str, words),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for name, (ranks, kinds) in WORLDS.items():
        python = sys.executable
        if name == "old":
            from onebit import env

            python = str(env.ensure(CACHE) / "bin/python")
        command = [python, WRITER, str(ranks), folder / name, *kinds]
        done = subprocess.run(command, env=environment(python), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


CASES = [(name, kind.replace(":", "-")) for name, (_, kinds) in WORLDS.items() for kind in kinds]


@pytest.mark.parametrize(("world", "kind"), CASES)
def test_what_deepspeed_saved_is_whole_and_its_world_and_stage_are_read(written, world, kind):
    newest, older = layout.scan(str(written / world / kind))
    ranks = WORLDS[world][0]
    stage = {"pipeline": 1, "experts-0": 0, "experts-2": 2}.get(kind) if world == "four" else None
    stage = int(kind[0]) if stage is None else stage
    assert [(tag.health, tag.why, tag.step) for tag in (newest, older)] == [("whole", "", 2), ("whole", "", 1)]
    assert (newest.world_size, newest.stage) == (ranks, stage)
    assert newest.model_parallel == (2 if kind == "pipeline" else 1)
    assert newest.deepspeed == ("0.19.6" if world == "old" else version("deepspeed"))
    assert layout.pointer(str(written / world / kind)) == newest.name
    found = choose.choose(
        str(written / world / kind), world_size=ranks, stage=stage, model_parallel=newest.model_parallel
    )
    assert (found.action, found.tag) == ("load", newest)


# A last file that nothing names: ranks of expert parallelism stand in no file of model states.
UNNAMED = {"expp_rank_1_mp_rank_00_optim_states.pt"}


@pytest.mark.parametrize(("world", "kind"), CASES)
def test_every_file_is_missed(written, world, kind, tmp_path):
    shutil.copytree(written / world / kind, tmp_path / "ckpt")
    folder = tmp_path / "ckpt/global_step2"
    for name in sorted(path.name for path in folder.iterdir()):
        if name in UNNAMED:
            continue
        (folder / name).rename(tmp_path / name)
        newest, _ = layout.scan(str(tmp_path / "ckpt"))
        assert newest.health == "incomplete", name
        assert "missing" in newest.why or "no model states" in newest.why
        (tmp_path / name).rename(folder / name)


def data(path: Path) -> int:
    """A byte in the middle of the largest record."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    head = path.read_bytes()[record.header_offset : record.header_offset + 30]
    names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    return record.header_offset + 30 + names + record.file_size // 2


def directory(path: Path) -> int:
    """A byte of the directory: the name of its second record."""
    content = path.read_bytes()
    return content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4) + 50


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


DAMAGE = {
    "cut to a byte": lambda path: os.truncate(path, 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last byte lost": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "text": lambda path: path.write_text("x" * path.stat().st_size),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit of the header": lambda path: flip(path, 1),
    "bit of the data": lambda path: flip(path, data(path)),
    "bit of the directory": lambda path: flip(path, directory(path)),
    "bit of the end": lambda path: flip(path, path.stat().st_size - 7),
}
# Found by names, sizes and structure; the others only by reading every byte.
READ = {"bit of the data"}


def vouched(folder: Path) -> None:
    """Give both tags a manifest with hashes, as whoever saved them would."""
    for tag in layout.scan(str(folder)):
        hashes = manifest.seal(tag.path, shards.files(tag.path))
        manifest.write(tag.path, step=tag.step, world_size=tag.world_size, stage=tag.stage, hashes=hashes)


@pytest.mark.parametrize("hashed", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("kind", ["1-bf16", "2-fp32", "3-fp32"])
def test_no_damaged_checkpoint_is_resumed_from_and_the_newest_good_one_is(written, tmp_path, kind, hashed):
    """scenarios 67 and 68: every damage to every file."""
    shutil.copytree(written / "two" / kind, tmp_path / "good")
    if hashed:
        vouched(tmp_path / "good")
    names = sorted(path.name for path in (tmp_path / "good/global_step2").glob("*.pt"))
    assert len(names) == (4 if kind[0] == "3" else 3)
    for name in names:
        for what, damage in DAMAGE.items():
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            damage(tmp_path / "bad/global_step2" / name)
            newest, older = layout.scan(str(tmp_path / "bad"))
            sizes_tell = hashed and what.startswith(("text", "zeros", "bit"))
            assert newest.usable == (what in READ or sizes_tell), (name, what)
            assert not layout.scan(str(tmp_path / "bad"), hashes=True)[0].usable, (name, what)
            found = choose.choose(str(tmp_path / "bad"), world_size=2, stage=int(kind[0]))
            assert (found.action, found.tag) == ("load", older), (name, what)
            assert [tag.name for tag in found.skipped] == ["global_step2"]
            assert name in found.skipped[0].why, (name, what)
            choose.prepare(found, str(tmp_path / "bad"))
            assert (tmp_path / "bad/latest").read_text() == "global_step1"


@pytest.mark.parametrize("hashed", [True, False], ids=["manifest", "foreign"])
def test_two_shards_that_changed_places_are_found(written, tmp_path, hashed):
    shutil.copytree(written / "two/2-fp32", tmp_path / "ckpt")
    if hashed:
        vouched(tmp_path / "ckpt")
    one, two = (tmp_path / f"ckpt/global_step2/zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in (0, 1))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    found = choose.choose(str(tmp_path / "ckpt"), world_size=2, stage=2)
    assert found.tag.name == "global_step1"


def test_a_bit_that_goes_unseen_without_a_manifest_is_none_that_is_loaded(written, tmp_path):
    """Any bit, 300 times: with hashes all are found; without, all but those that torch.load does not use."""
    import torch

    chance = random.Random(5)
    good = written / "two/2-fp32/global_step2"
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copytree(good, tmp_path / "foreign")
    shutil.copytree(good, tmp_path / "ours")
    hashes = manifest.seal(str(tmp_path / "ours"), shards.files(str(tmp_path / "ours")))
    manifest.write(str(tmp_path / "ours"), step=2, world_size=2, stage=2, hashes=hashes)
    content = (good / name).read_bytes()
    right = torch.load(good / name, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    unseen = 0
    for _ in range(300):
        spoiled = bytearray(content)
        spoiled[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        for place in ("ours", "foreign"):
            (tmp_path / place / name).write_bytes(spoiled)
        assert manifest.verify(str(tmp_path / "ours"), hashes=True).health == "damaged"
        if manifest.verify(str(tmp_path / "foreign"), hashes=True).usable:
            unseen += 1
            state = torch.load(tmp_path / "foreign" / name, weights_only=False)["optimizer_state_dict"]
            assert all(torch.equal(state["base_optimizer_state"]["state"][0][key], right[key]) for key in right)
    assert unseen < 60  # padding and time stamps, a tenth of a file as small as this


def test_a_program_that_writes_no_manifest_is_vouched_for(written, tmp_path):
    shutil.copytree(written / "four/3-bf16", tmp_path / "ckpt")
    cut = tmp_path / "ckpt/global_step2/zero_pp_rank_3_mp_rank_00_model_states.pt"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:100])
    state = vouch.look(str(tmp_path / "ckpt"), {})
    assert [tag.health for tag in layout.scan(str(tmp_path / "ckpt"))] == ["damaged", "whole"]
    state = vouch.look(str(tmp_path / "ckpt"), state)
    assert [tag.health for tag in layout.scan(str(tmp_path / "ckpt"))] == ["damaged", "verified"]
    cut.write_bytes(whole)
    for expected in ("whole", "verified"):
        state = vouch.look(str(tmp_path / "ckpt"), state)
        assert layout.scan(str(tmp_path / "ckpt"))[0].health == expected
    assert (tmp_path / "ckpt/newest-verified").read_text() == "global_step2\n"
    said = manifest.read(str(tmp_path / "ckpt/global_step2"))
    assert (said.step, said.world_size, said.stage, said.deepspeed) == (2, 4, 3, version("deepspeed"))
    assert vouch.look(str(tmp_path / "ckpt"), state) == {}


# ------------------------------------------------------------------------------------ the reference trainer


def config(path: Path, *, stage: int) -> Path:
    adamw = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}  # DeepSpeed's own needs a compiler
    zero = {"stage": stage}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "optimizer": adamw, "zero_optimization": zero}))
    return path


def train(settings: Path, *flags, ranks: int, check: bool = True):
    return torchrun(ranks, TRAINER, "--deepspeed_config", settings, *SHAPE, *flags, check=check)


def losses(metrics: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, metrics.read_text().splitlines())}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_four_ranks_go_on_as_two_with_the_loss_where_it_was(tmp_path):
    """scenario 69, through a universal checkpoint, by the command that the refusal names; stage 3: test_train_gpt."""
    stage = 2
    settings = config(tmp_path / "ds.json", stage=stage)
    saves = ["--checkpoint-dir", tmp_path / "ckpt", "--checkpoint-every", 20]
    train(settings, "--steps", 30, *saves, "--metrics", tmp_path / "four.jsonl", ranks=4)
    shutil.rmtree(tmp_path / "ckpt/step00000030")  # the run without an interruption is what to compare with
    found = choose.choose(str(tmp_path / "ckpt"), world_size=2, stage=stage)
    assert (found.action, found.tag.name) == ("convert", "step00000020")
    assert "saved by 4 ranks" in found.why
    assert "this run has 2" in found.why
    subprocess.run([sys.executable, *found.command[1:]], env=environment(), check=True, capture_output=True)
    found = choose.choose(str(tmp_path / "ckpt"), world_size=2, stage=stage)
    assert (found.action, found.tag.name) == ("universal", "step00000020_universal")
    run = train(settings, "--steps", 30, *saves, "--metrics", tmp_path / "two.jsonl", ranks=2)
    assert "resumed at step 20 from step00000020_universal" in run.stdout
    assert (tmp_path / "ckpt/latest_universal").read_text() == "step00000020_universal"
    four, two = losses(tmp_path / "four.jsonl"), losses(tmp_path / "two.jsonl")
    assert sorted(two) == list(range(21, 31))
    after = range(21, 31)
    assert abs(mean(four[step] for step in after) - mean(two[step] for step in after)) < 0.15
    assert four[1] - two[21] > 1.5  # a start over would be at the first loss again
    assert layout.scan(str(tmp_path / "ckpt"))[0].world_size == 2


def test_a_disk_that_fills_up_costs_the_save_and_not_the_checkpoint_before(tmp_path):
    """scenario 66, on a file system of its own: first full in the middle of a save, then before one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        assert os.environ.get("CI") != "true", "CI can mount a tmpfs"
        pytest.skip("needs to mount a tmpfs: run as root")
    settings = config(tmp_path / "ds.json", stage=2)
    flags = ["--checkpoint-dir", disk / "ckpt", "--checkpoint-every", 5, "--steps", 30]
    try:
        run = train(settings, *flags, ranks=1, check=False)
        assert run.returncode != 0
        assert "exitcode  : 93" in run.stderr, run.stdout + run.stderr
        assert "DISK_FULL: No space left on device" in run.stderr
        kept = layout.scan(str(disk / "ckpt"))
        assert [tag.health for tag in kept if tag.usable] == ["verified"] * len([tag for tag in kept if tag.usable])
        last = next(tag.step for tag in kept if tag.usable)
        assert f"saved step{last:08d}" in run.stdout
        again = train(settings, *flags, ranks=1, check=False)
        assert f"resumed at step {last} from step{last:08d}" in again.stdout
        assert "DISK_FULL" in again.stderr
        assert next(tag.step for tag in layout.scan(str(disk / "ckpt")) if tag.usable) >= last
    finally:
        subprocess.run(["umount", disk], check=True)


def test_killed_at_any_moment_of_a_save_the_next_start_goes_on(tmp_path):
    """scenarios 67 and 70: SIGKILL while one checkpoint follows the other."""
    settings = config(tmp_path / "ds.json", stage=2)
    directory = tmp_path / "ckpt"
    command = [sys.executable, TRAINER, "--deepspeed_config", settings, *SHAPE, "--steps", "100000",
               "--checkpoint-dir", directory, "--checkpoint-every", "1", "--checkpoint-keep", "2"]  # fmt: skip
    chance = random.Random(7)
    before = 0
    for attempt in range(3):
        said = tmp_path / f"{attempt}.log"
        with socket.socket() as free, said.open("w") as log:
            free.bind(("127.0.0.1", 0))
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            env = environment() | alone | {"MASTER_PORT": str(free.getsockname()[1])}
            free.close()
            running = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while f"saved step{before + 2:08d}" not in said.read_text():
                assert time.monotonic() < deadline, said.read_text()
                assert running.poll() is None, said.read_text()
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.3))
        finally:
            running.kill()
            running.wait()
        text = said.read_text()
        if attempt:
            assert f"resumed at step {before} from step{before:08d}" in text
            assert not (directory / f"{retention.DELETING}step00000001").exists()
        last = max(int(line.split("step")[-1]) for line in text.splitlines() if line.startswith("saved step"))
        found = choose.choose(str(directory), world_size=1, stage=2)
        assert (found.action, found.tag.health) == ("load", "verified")
        assert found.tag.step in (last, last + 1)  # killed between the manifest and the line that tells
        before = found.tag.step
        (directory / f"{retention.DELETING}step00000001").mkdir()  # as if it had been killed while deleting, too
