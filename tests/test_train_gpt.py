"""The reference trainer, trained: two ranks on this machine, gloo, a model of 136 thousand parameters."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "launcher/node/train_gpt.py"
CACHE = ROOT / ".cache"
SHAPE = ["--layers", "2", "--hidden", "64", "--heads", "2", "--seq-len", "64"]


def config(path: Path, *, stage: int, optimizer: dict | None = None, **more) -> Path:
    adamw = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}  # DeepSpeed's own needs a compiler
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": optimizer or adamw,
        "zero_optimization": {"stage": stage},
        **more,
    }
    path.write_text(json.dumps(settings))
    return path


def environment(python: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("DSLAUNCH_METRICS", "PYTHONPATH")}
    env["OMP_NUM_THREADS"] = "1"
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # ninja
    env["TORCH_EXTENSIONS_DIR"] = str(CACHE / f"torch-extensions-{'ours' if python == sys.executable else 'old'}")
    return env


def train(settings: Path, *flags, ranks: int = 2, python: str = sys.executable, pythonpath: str = ""):
    env = environment(python)
    if pythonpath:
        env["PYTHONPATH"] = pythonpath
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [python, *launch, str(TRAINER), "--deepspeed_config", str(settings), *SHAPE, *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def losses(metrics: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, metrics.read_text().splitlines())}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """60 steps of ZeRO-3, checkpoints at 20, 40 and 60 of which two are kept."""
    folder = tmp_path_factory.mktemp("trained")
    settings = config(folder / "ds.json", stage=3)
    saves = ["--checkpoint-dir", folder / "ckpt", "--checkpoint-every", 20]
    run = train(settings, "--steps", 60, *saves, "--metrics", folder / "metrics.jsonl")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run


@pytest.fixture
def copy(trained, tmp_path):
    """The same run's checkpoints, to spoil."""
    shutil.copytree(trained[0] / "ckpt", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_zero_3_learns_and_its_checkpoint_is_complete(trained):
    folder, run = trained
    seen = losses(folder / "metrics.jsonl")
    assert list(seen) == list(range(1, 61))
    assert mean(seen[step] for step in range(51, 61)) < seen[1] - 2
    assert "finished: 60 steps, loss" in run.stdout
    assert "Warning" not in run.stderr
    assert sorted(p.name for p in (folder / "ckpt").glob("step*")) == ["step00000040", "step00000060"]
    newest = folder / "ckpt/step00000060"
    said = json.loads((newest / "complete.json").read_text())
    assert (said["step"], said["world_size"], said["zero_stage"]) == (60, 2, 3)
    there = {p.name: p.stat().st_size for p in newest.iterdir() if p.name != "complete.json"}
    assert said["files"] == there
    assert len(there) == 4
    assert said["sha256"] == {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in there}
    assert (folder / "ckpt/newest-verified").read_text() == "step00000060\n"


def test_finished_is_finished(trained, copy):
    run = train(trained[0] / "ds.json", "--steps", 60, "--checkpoint-dir", copy)
    assert run.returncode == 0
    assert "already at step 60 of 60" in run.stdout


def test_a_truncated_shard_sends_resume_to_the_older_checkpoint(trained, copy, tmp_path):
    shard = copy / "step00000060/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(shard, shard.stat().st_size // 2)
    metrics = tmp_path / "metrics.jsonl"
    run = train(trained[0] / "ds.json", "--steps", 60, "--checkpoint-dir", copy, "--metrics", metrics)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"skipping checkpoint step00000060: {shard.name} has" in run.stdout
    assert "resumed at step 40 from step00000040" in run.stdout
    again, before = losses(metrics), losses(trained[0] / "metrics.jsonl")
    assert again == pytest.approx({step: before[step] for step in range(41, 61)}, abs=1e-4)
    assert json.loads((copy / "step00000060/complete.json").read_text())["step"] == 60  # saved anew


def test_a_flipped_bit_in_one_ranks_shard_sends_all_of_them_to_the_older_checkpoint(trained, copy):
    shard = copy / "step00000060/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)
    run = train(trained[0] / "ds.json", "--steps", 41, "--checkpoint-dir", copy)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"train_gpt (rank 1): step00000060: {shard.name} has changed since it was saved" in run.stdout
    assert "resumed at step 40 from step00000040" in run.stdout


def test_another_world_size_is_refused_until_the_checkpoint_is_converted(trained, copy):
    steps = ["--steps", 62, "--checkpoint-dir", copy]
    run = train(trained[0] / "ds.json", *steps, ranks=1)
    assert "exitcode  : 2" in run.stderr
    assert "was saved by 2 ranks at ZeRO stage 3, this run has 1" in run.stderr
    (said,) = {line for line in run.stderr.splitlines() if line.startswith("train_gpt (rank 0)")}
    convert = said.partition("convert it: python ")[2].split()
    subprocess.run([sys.executable, *convert], env=environment(sys.executable), check=True, capture_output=True)
    run = train(trained[0] / "ds.json", *steps, ranks=1)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "resumed at step 60 from step00000060_universal" in run.stdout
    first = float(run.stdout.partition("finished: 62 steps, loss ")[2].split()[0])
    assert first < 4


def start_as_srun_does(settings: Path, *flags) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(TRAINER), "--deepspeed_config", str(settings), *SHAPE, *map(str, flags)]
    where = environment(sys.executable) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command,
            env=where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_signal_to_one_rank_stops_both_and_the_next_run_goes_on(tmp_path):
    settings = config(tmp_path / "ds.json", stage=2)
    saves = ["--checkpoint-dir", tmp_path / "ckpt"]
    first, second, whole = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "whole"))

    ranks = start_as_srun_does(settings, "--steps", 100_000, *saves, "--metrics", first)
    try:
        deadline = time.monotonic() + 120
        while not (first.exists() and first.read_text().count("\n") >= 5):
            assert time.monotonic() < deadline
            assert [rank.poll() for rank in ranks] == [None, None]
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGUSR2)
        ranks[1].send_signal(signal.SIGTERM)  # a second one does not break the save
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert "Warning" not in said[0] + said[1]
    stopped = max(losses(first))
    assert f"stopped at step {stopped} of 100000 by a signal, checkpoint saved" in said[0]

    run = train(settings, "--steps", stopped + 10, *saves, "--metrics", second)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"resumed at step {stopped} from step{stopped:08d}" in run.stdout
    run = train(settings, "--steps", stopped + 10, "--metrics", whole)
    assert run.returncode == 0, run.stdout + run.stderr
    assert losses(first) | losses(second) == pytest.approx(losses(whole), abs=1e-4)


def ready_for_signals(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught & 1 << signal.SIGTERM - 1)


def test_a_signal_during_start_up_is_honoured(tmp_path):
    settings = config(tmp_path / "ds.json", stage=1)
    ranks = start_as_srun_does(settings, "--steps", 100_000, "--checkpoint-dir", tmp_path / "ckpt")
    try:
        while not ready_for_signals(ranks[0].pid):  # torch is still to be imported
            time.sleep(0.01)
        ranks[0].send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert "stopped at step 0" in said[0]


def test_one_bit_adam_compresses_learns_resumes_and_keeps_its_replicas_alike(tmp_path):
    from onebit import env  # deepspeed 0.19.6: later ones have no 1-bit optimizers

    old = {"python": str(env.ensure(CACHE) / "bin/python"), "pythonpath": str(ROOT / "tests/onebit")}
    params = {"lr": 3e-3, "freeze_step": 10, "comm_backend_name": "nccl"}
    optimizer = {"type": "OneBitAdam", "params": params}
    settings = config(tmp_path / "ds.json", stage=0, optimizer=optimizer, gradient_clipping=0)
    metrics = tmp_path / "metrics.jsonl"
    saves = ["--checkpoint-dir", tmp_path / "ckpt", "--metrics", metrics]

    run = train(settings, "--steps", 30, *saves, **old)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "deepspeed 0.19.6" in run.stdout
    assert "compressed stage from step 11: engine all-reduce off" in run.stdout
    assert "replicas agree" in run.stdout
    seen = losses(metrics)
    assert mean(seen[step] for step in range(21, 31)) < seen[1] - 2

    run = train(settings, "--steps", 35, *saves, **old)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "resumed at step 30" in run.stdout
    assert "compressed stage from step 31: engine all-reduce off" in run.stdout
    assert "replicas agree" in run.stdout


@pytest.fixture(scope="module")
def trainer():
    before = dict(os.environ)  # importing it tells DeepSpeed that this machine has no GPU
    spec = importlib.util.spec_from_file_location("train_gpt", TRAINER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_logs_that_are_full_end_no_training(trainer, tmp_path, monkeypatch):
    run = train(config(tmp_path / "ds.json", stage=2), "--steps", 3, "--metrics", "/dev/full", ranks=1)
    assert run.returncode == 0, run.stderr
    monkeypatch.setenv("RANK", "0")
    full = open("/dev/full", "w")  # noqa: PTH123, SIM115  # closing it fails as well
    monkeypatch.setattr(sys, "stdout", full)
    trainer.say("step 10")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}', 'optimizer.params.lr still "auto"'),
        ('{"train_batch_size": "auto", "optimizer": {"type": "Adam"}}', 'train_batch_size still "auto"'),
        ("{}", "no optimizer.type"),
        ("[]", "not a JSON object"),
        ("{", "Expecting property name"),
    ],
)
def test_a_configuration_that_cannot_train_is_refused(trainer, tmp_path, text, complaint):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(trainer.Refused, match=complaint):
        trainer.configuration(str(tmp_path / "ds.json"))


def test_missing_text_is_refused_and_text_is_read_in_a_fixed_order(trainer, tmp_path):
    with pytest.raises(trainer.Refused, match="no such file"):
        trainer.corpus([str(tmp_path / "none")], at_least=3)
    for name, text in (("b", "bbb"), ("a/z", "zz"), ("a/c", "c")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert bytes(trainer.corpus([str(tmp_path)], at_least=3).tolist()) == b"bbbczz"
    with pytest.raises(trainer.Refused, match="holds 6 bytes; one sequence takes 7"):
        trainer.corpus([str(tmp_path)], at_least=7)


HERE = {"world_size": 2, "zero_stage": 0, "shape": {"layers": 2}, "precision": "fp32"}


def checkpoint(directory: Path, number: int, *, broken: bool = False, **said) -> None:
    folder = directory / f"step{number:08d}"
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_text("12345" if broken else "123456")
    text = json.dumps({"step": number, "files": {"mp_rank_00_model_states.pt": 6}} | HERE | said)
    (folder / "complete.json").write_text(text)


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        ({"zero_stage": 2, "world_size": 4}, "saved by 4 ranks at ZeRO stage 2, this run has 2 at stage 0"),
        ({"precision": "bf16"}, "precision bf16, this run has fp32"),
        ({"shape": {"layers": 3}}, "shape"),
        ({"step": 6}, "none of the 1 checkpoints"),
        ({"world_size": None}, "none of the 1 checkpoints"),
        ({"broken": True}, "none of the 1 checkpoints"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(trainer, tmp_path, saved, complaint):
    checkpoint(tmp_path, 5, **saved)
    with pytest.raises(trainer.Refused, match=complaint):
        trainer.choose(str(tmp_path), HERE, {})


def test_another_programs_checkpoints_are_not_trained_on(trainer, tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / "step00000005").rename(tmp_path / "global_step5")
    with pytest.raises(trainer.Refused, match="not this trainer's"):
        trainer.choose(str(tmp_path), HERE, {})


@pytest.mark.parametrize("latest", ["", "../step00000099", "step00000007", "step00000005\n"])
def test_the_newest_complete_checkpoint_is_chosen_whatever_latest_says(trainer, tmp_path, latest):
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 6)
    checkpoint(tmp_path, 7, broken=True)
    (tmp_path / "step00000008").mkdir()
    (tmp_path / "latest").write_text(latest)
    assert trainer.choose(str(tmp_path), HERE, {}) == (6, False)
    assert (tmp_path / "latest").read_text() == "step00000006"
    assert trainer.choose(str(tmp_path), HERE, {"step00000006": "a rank read something else"}) == (5, False)
    assert trainer.choose(str(tmp_path / "nothing here"), HERE, {}) == (-1, False)


def test_fresh_sets_the_earlier_run_aside(trainer, tmp_path):
    checkpoint(tmp_path, 4)
    trainer.set_aside(str(tmp_path))
    assert trainer.choose(str(tmp_path), HERE, {}) == (-1, False)
    assert (tmp_path / "before-fresh-1/step00000004/complete.json").exists()


def test_it_starts_from_a_run_directory_and_from_a_zip(tmp_path):
    """The one implementation of a manifest travels with it, as files or, in a pod, packed."""
    packages = [ROOT / "launcher/__init__.py", *(ROOT / "launcher/checkpoints").glob("*.py")]
    for place in ("code", "code.zip"):
        node = tmp_path / place.replace(".", "-")
        node.mkdir()
        shutil.copy(TRAINER, node)
        if place == "code":
            for path in packages:
                (node / "code" / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, node / "code" / path.relative_to(ROOT))
        else:
            with zipfile.ZipFile(node / "code.zip", "w") as packed:
                for path in packages:
                    packed.write(path, path.relative_to(ROOT))
        ask = "import train_gpt, launcher.checkpoints as found; print(found.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", ask], cwd=node, env=environment(sys.executable), capture_output=True, text=True
        )
        assert str(node / place) in done.stdout, done.stdout + done.stderr
