"""Checkpoint directories of every kind: read, chosen from, kept, told. DeepSpeed's own: test_checkpoint_damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launcher import saves
from launcher.checkpoints import Choice, Tag, archive, choose, layout, manifest, retention, shards, vouch


def shard(path: Path, **words) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {"0.weight": torch.arange(500.0)}, **words}, path)


def checkpoint(directory: Path, name: str = "", *, step: int = 5, world: int = 2, stage: int = 2, vouch: bool = True):
    """What ZeRO leaves behind, with a manifest unless nobody vouches for it."""
    folder = directory / (name or f"step{step:08d}")
    config = {"zero_optimization": {"stage": stage}}
    told = {"global_steps": step, "dp_world_size": world, "ds_config": config, "ds_version": "0.19.8"}
    for rank in range(world if stage == 3 else 1):
        shard(folder / (f"zero_pp_rank_{rank}_" * (stage == 3) + "mp_rank_00_model_states.pt"), **told)
    for rank in range(world if stage else 0):
        shard(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if vouch:
        hashes = manifest.seal(str(folder), shards.files(str(folder)))
        manifest.write(str(folder), step=step, world_size=world, stage=stage, hashes=hashes)
    return folder


def chosen(directory: Path, **here) -> Choice:
    return choose.choose(str(directory), **{"world_size": 2, "stage": 2, **here})


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("global_step200", 200),
        ("step00000050", 50),
        ("step00000050_universal", 50),
        ("checkpoint-500/global_step500", 500),
        ("iter_0001000", 1000),
        ("epoch3-step12", 12),
        ("best", None),
        ("step", None),
    ],
)
def test_the_step_of_a_tag(name, step):
    assert shards.step_of(name) == step


@pytest.mark.parametrize(
    ("names", "words", "missing"),
    [
        # the highest rank is the last unless the file of model states knows better
        (["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"], {},
         ["zero_pp_rank_0_mp_rank_00_optim_states.pt"]),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], {"dp_world_size": 2},
         ["zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
        # shards of an earlier and larger world beside are not loaded
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
          "zero_pp_rank_1_mp_rank_00_optim_states.pt"], {"dp_world_size": 1}, []),
        (["mp_rank_01_model_states.pt"], {}, ["mp_rank_00_model_states.pt"]),
        (["mp_rank_00_model_states.pt"], {"dp_world_size": 2, "stage": 1},
         ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
         {"dp_world_size": 1, "stage": 3}, []),
        # how ZeRO's files were once called
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00optim_states.pt"], {"dp_world_size": 1}, []),
        (["mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt", "layer_00-model_01-model_states.pt",
          "layer_03-model_01-model_states.pt"], {}, ["layer_03-model_00-model_states.pt"]),
        (["mp_rank_00_model_states.pt", "zero/0.weight/exp_avg.pt"], {}, ["zero/0.weight/fp32.pt"]),
    ],
)  # fmt: skip
def test_what_has_to_be_there(names, words, missing):
    assert list(shards.layout(names, words).missing) == missing


def test_files_of_other_programs_are_told_whole_without_unpickling(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"trap": Trap(), "dp_world_size": 4, "ds_version": "9.9"}, tmp_path / "mp_rank_00_model_states.pt")
    found = archive.read(str(tmp_path / "mp_rank_00_model_states.pt"), contents=True, words=True)
    assert (found.words["dp_world_size"], found.words["ds_version"]) == (4, "9.9")
    tag = manifest.verify(str(tmp_path))
    assert (tag.health, tag.world_size) == ("whole", 4)
    assert not (tmp_path / "sprung").exists()


def test_the_format_of_torch_before_1_6_is_whole_to_its_last_byte(tmp_path):
    path = tmp_path / "old.pt"
    weights = {
        "a": torch.arange(100.0),
        "b": torch.ones(7, dtype=torch.bfloat16),
        "c": torch.ones(3, dtype=torch.int8),
    }
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    archive.read(str(path))
    content = path.read_bytes()
    for size in (20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(archive.Damaged):
            archive.read(str(path))
    path.write_bytes(content + b"\0")
    with pytest.raises(archive.Damaged, match="its contents end at"):
        archive.read(str(path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"weights", "is not a file of torch.save"),
        (b"PK\x03\x04 and no more", "was cut"),
        (b"PK\x05\x06" + bytes(18), "damaged end"),
    ],
)
def test_what_is_no_file_of_torch_save(tmp_path, content, why):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(archive.Damaged, match=why):
        archive.read(str(tmp_path / "x.pt"))


def test_tags_are_found_wherever_programs_put_them_and_nothing_else_is(tmp_path):
    checkpoint(tmp_path, "checkpoint-500/global_step500", step=500, vouch=False)
    checkpoint(tmp_path, "global_step600", step=600, vouch=False)
    checkpoint(tmp_path, "best", step=550, vouch=False)
    (tmp_path / "global_step700").mkdir()
    for other in ("runs", ".deleting-global_step800", "before-fresh-1", "global_step900.tmp"):
        checkpoint(tmp_path / other, "global_step800", step=800, vouch=False)
    checkpoint(tmp_path / "elsewhere", step=999)
    (tmp_path / "global_step999").symlink_to(tmp_path / "elsewhere/step00000999")
    found = [(tag.name, tag.step, tag.health) for tag in layout.scan(str(tmp_path))]
    assert found == [
        ("global_step700", 700, "incomplete"),
        ("global_step600", 600, "whole"),
        ("best", 550, "whole"),
        ("checkpoint-500/global_step500", 500, "whole"),
    ]
    (itself,) = layout.scan(str(tmp_path / "best"))
    assert (itself.path, itself.health) == (str(tmp_path / "best"), "whole")
    assert layout.scan(str(tmp_path / "nowhere")) == []


LATEST = {
    "empty": "",
    "dangling": "step00000099",
    "outside": "../secret/step00000001",
    "absolute": "/etc",
    "newline": "step00000005\n",
    "two lines": "step00000005\nstep00000006",
    "dots": "..",
    "binary": "\0\x1b[2J",
}


@pytest.mark.parametrize("latest", [*LATEST, "missing", "a link outside", "a folder"])
def test_latest_is_not_trusted(tmp_path, latest):
    """scenario 68"""
    checkpoint(tmp_path / "ckpt", step=5)
    checkpoint(tmp_path / "ckpt", step=6)
    checkpoint(tmp_path / "secret", step=1)
    path = tmp_path / "ckpt/latest"
    if latest in LATEST:
        path.write_text(LATEST[latest])
    elif latest == "a link outside":
        (tmp_path / "secret/latest").write_text("step00000001")
        path.symlink_to(tmp_path / "secret/latest")
    elif latest == "a folder":
        path.mkdir()
    found = chosen(tmp_path / "ckpt")
    assert (found.action, found.tag.step) == ("load", 6)
    choose.prepare(found, str(tmp_path / "ckpt"))
    assert path.read_text() == "step00000006"
    assert not path.is_symlink()
    assert (tmp_path / "ckpt/newest-verified").read_text() == "step00000006\n"
    if latest == "a link outside":
        assert (tmp_path / "secret/latest").read_text() == "step00000001"


def test_latest_of_a_trainer_stands_beside_its_tag(tmp_path):
    checkpoint(tmp_path, "checkpoint-500/global_step500", step=500, vouch=False)
    found = chosen(tmp_path)
    choose.prepare(found, str(tmp_path))
    assert (tmp_path / "checkpoint-500/latest").read_text() == "global_step500"
    assert not (tmp_path / "newest-verified").exists()  # whole, and nobody vouched


def test_a_run_never_starts_over_by_itself(tmp_path):
    """scenario 68: tags are there, and none is whole."""
    assert chosen(tmp_path).action == "start"
    folder = checkpoint(tmp_path, step=5)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (tmp_path / "step00000006").mkdir()
    found = chosen(tmp_path)
    assert found.action == "refuse"
    assert "none of the 2 checkpoints" in found.why
    assert [tag.step for tag in found.skipped] == [6, 5]
    assert chosen(tmp_path, fresh=True).action == "start"


def test_a_verified_checkpoint_comes_before_a_newer_one_that_nobody_vouched_for(tmp_path):
    """scenario 67: a save that was cut off after its last shard."""
    checkpoint(tmp_path, step=5)
    checkpoint(tmp_path, step=6, vouch=False)
    assert chosen(tmp_path).tag.step == 5
    shutil.rmtree(tmp_path / "step00000005")
    assert (chosen(tmp_path).tag.step, chosen(tmp_path).tag.health) == (6, "whole")


# What DeepSpeed 0.19.8 loads: 1 and 2 alike, 3 only as 3, without ZeRO any number of ranks.
FITS = [
    ((2, 2), (2, 2), "load"),
    ((2, 1), (2, 2), "load"),
    ((2, 2), (2, 1), "load"),
    ((2, 0), (4, 0), "load"),
    ((2, 2), (4, 2), "convert"),
    ((2, 3), (1, 3), "convert"),
    ((2, 2), (2, 3), "refuse"),
    ((2, 3), (2, 2), "refuse"),
    ((2, 0), (2, 1), "refuse"),
    ((2, 1), (2, 0), "refuse"),
]


@pytest.mark.parametrize(("saved", "here", "action"), FITS)
@pytest.mark.parametrize("vouched", [True, False])
def test_another_world_or_stage_is_noticed(tmp_path, saved, here, action, vouched):
    """scenario 69"""
    folder = checkpoint(tmp_path, world=saved[0], stage=saved[1], vouch=vouched)
    found = chosen(tmp_path, world_size=here[0], stage=here[1])
    assert (found.action, found.tag.path) == (action, str(folder))
    if action != "load":
        assert f"saved by {saved[0]} ranks at ZeRO stage {saved[1]}" in found.why
        assert f"this run has {here[0]} at stage {here[1]}" in found.why
    if action == "convert":
        assert found.command[-4:] == ("--input_folder", str(folder), "--output_folder", f"{folder}_universal")


def test_a_universal_form_is_taken_when_it_is_whole(tmp_path):
    checkpoint(tmp_path, step=5, world=4)
    made = tmp_path / "step00000005_universal"
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        shard(made / f"zero/0.weight/{state}.pt")
    assert chosen(tmp_path).action == "convert"  # cut off: the model states come last
    shutil.copy(tmp_path / "step00000005/mp_rank_00_model_states.pt", made)
    found = chosen(tmp_path)
    assert (found.action, found.tag.name) == ("universal", "step00000005_universal")
    choose.prepare(found, str(tmp_path))
    assert (tmp_path / "latest_universal").read_text() == "step00000005_universal"
    config = {"checkpoint": {"tag_validation": "Fail"}, "bf16": {"enabled": True}}
    changed = choose.configured(config, found)
    assert changed["checkpoint"] == {"tag_validation": "Fail", "load_universal": True}
    same = chosen(tmp_path, world_size=4)
    assert same.action == "load"
    assert choose.configured(changed, same) == config
    os.truncate(made / "zero/0.weight/exp_avg.pt", 100)
    found = chosen(tmp_path)
    assert found.action == "convert"
    assert "zero/0.weight/exp_avg.pt was cut" in found.why


def test_experts_are_not_converted(tmp_path):
    folder = checkpoint(tmp_path, stage=2, vouch=False)
    shard(folder / "layer_0_expert_0_mp_rank_00_model_states.pt")
    found = chosen(tmp_path, world_size=4)
    assert found.action == "refuse"
    assert "experts" in found.why


def test_reading_stops_when_its_time_is_over(tmp_path):
    folder = checkpoint(tmp_path, step=5)
    content = bytearray((folder / "mp_rank_00_model_states.pt").read_bytes())
    content[600] ^= 1
    (folder / "mp_rank_00_model_states.pt").write_bytes(content)
    assert chosen(tmp_path, seconds=0).action == "load"
    found = chosen(tmp_path)
    assert found.action == "refuse"
    assert "mp_rank_00_model_states.pt has changed since it was saved" in found.why


def test_the_newest_verified_ones_stay_whatever_lies_around_them(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step=step)
    checkpoint(tmp_path, "global_step1", step=1)  # another program's
    os.truncate(tmp_path / "step00000004/mp_rank_00_model_states.pt", 10)
    (tmp_path / "step00000003/complete.json").write_text("{")
    (tmp_path / "step00000005").mkdir()
    assert retention.retain(str(tmp_path), keep=3) == []
    assert retention.retain(str(tmp_path), keep=1) == ["step00000001"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["global_step1", "step00000002", "step00000003", "step00000004", "step00000005"]
    assert retention.retain(str(tmp_path), keep=1) == []


def test_what_a_kill_left_is_swept_and_never_taken_for_a_checkpoint(tmp_path):
    """scenario 70"""
    checkpoint(tmp_path, step=5)
    checkpoint(tmp_path, ".deleting-step00000004", step=4, vouch=False)
    (tmp_path / "latest.4711.tmp").write_text("step0")
    assert [tag.step for tag in layout.scan(str(tmp_path))] == [5]
    retention.sweep(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step00000005"]


def test_a_manifest_of_another_checkpoint_vouches_for_nothing(tmp_path):
    folder = checkpoint(tmp_path, step=5)
    folder.rename(tmp_path / "step00000006")
    (tag,) = layout.scan(str(tmp_path))
    assert tag.health == "damaged"
    assert "it is of step00000005" in tag.why


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": 3}', '{"step": 5, "world_size": 0, "files": {}}', "\0\xff"]
)
def test_an_unreadable_manifest_is_damage(tmp_path, text):
    folder = checkpoint(tmp_path, step=5)
    (folder / "complete.json").write_bytes(text.encode("latin-1"))
    (tag,) = layout.scan(str(tmp_path))
    assert tag.health == "damaged"
    assert "complete.json is unreadable" in tag.why


def test_a_manifest_of_sizes_alone_is_still_read(tmp_path):
    folder = checkpoint(tmp_path, step=5, vouch=False)
    sizes = {name: file.size for name, file in shards.files(str(folder)).items()}
    old = {"step": 5, "world_size": 2, "zero_stage": 2, "shape": {"layers": 2}, "precision": "bf16", "files": sizes}
    (folder / "complete.json").write_text(json.dumps(old))
    (tag,) = layout.scan(str(tmp_path))
    assert (tag.health, tag.world_size, tag.stage) == ("verified", 2, 2)
    assert manifest.read(str(folder)).more == {"shape": {"layers": 2}, "precision": "bf16"}
    content = bytearray((folder / "mp_rank_00_model_states.pt").read_bytes())
    content[1000] ^= 1
    (folder / "mp_rank_00_model_states.pt").write_bytes(content)
    assert chosen(tmp_path).action == "refuse"  # by the checksums that torch.save writes


def test_vouching_waits_for_two_looks_and_not_when_all_is_over(tmp_path):
    folder = checkpoint(tmp_path, step=5, vouch=False)
    state = vouch.look(str(tmp_path), {})
    os.utime(folder / "mp_rank_00_model_states.pt", (1, 1))  # it is still being written
    state = vouch.look(str(tmp_path), state)
    assert not (folder / "complete.json").exists()
    vouch.look(str(tmp_path), state)
    assert (folder / "complete.json").exists()
    last = checkpoint(tmp_path, step=6, vouch=False)
    (tmp_path / "step00000007").mkdir()
    vouch.look(str(tmp_path), {}, over=True)
    assert (last / "complete.json").exists()
    assert [tag.health for tag in layout.scan(str(tmp_path))] == ["incomplete", "verified", "verified"]


@pytest.mark.slow
@pytest.mark.parametrize("verified", [True, False])
def test_a_thousand_shards_a_second(tmp_path, verified):
    """10,000 small files by sizes and manifest; 1,000 shards by names and structure."""
    count = 10_000 if verified else 1000
    folder = tmp_path / "global_step5"
    shard(folder / "mp_rank_00_model_states.pt", dp_world_size=count)
    one = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard(one)
    for rank in range(1, count):
        other = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        os.link(one, other) if verified else shard(other)
    if verified:
        sizes = {name: file.size for name, file in shards.files(str(folder)).items()}
        said = {"step": 5, "world_size": count, "zero_stage": 2, "files": sizes}
        (folder / "complete.json").write_text(json.dumps(said))
    started = time.perf_counter()
    (tag,) = layout.scan(str(tmp_path))
    seconds = time.perf_counter() - started
    print(f"{tag.health}: {count} shards in {seconds:.2f} s")
    assert (tag.health, tag.files, tag.world_size) == ("verified" if verified else "whole", count + 1, count)
    assert seconds < count / 1000


def test_free_space_is_looked_at_where_the_checkpoint_will_be(tmp_path):
    """scenario 66"""
    assert retention.free(str(tmp_path / "not/yet/there")) > 0
    assert retention.shortage(str(tmp_path)) == ""
    folder = checkpoint(tmp_path, step=5)
    os.truncate(folder / "mp_rank_00_model_states.pt", 1 << 43)  # all holes
    manifest.write(str(folder), step=5, world_size=2, stage=2)
    assert "GB free, and a checkpoint takes 8.8e+03" in retention.shortage(str(tmp_path))


@pytest.mark.parametrize(("keep", "free", "told"), [(1, 221, False), (1, 219, True), (2, 300, True)])
def test_room_for_the_next_checkpoint_is_part_of_the_plan(keep, free, told):
    notes = saves.room("/c", free=free * 1e9, one=100e9, keep=keep)
    assert bool(notes) is told
    assert not told or f"{keep + 1} checkpoints of 100 GB take" in notes[0]


def test_the_table_says_which_one_a_resume_takes_and_why_none_that_is_newer(tmp_path):
    newest = Tag("global_step20", "/c/global_step20", "damaged", "x.pt is empty", 20, 8, 2, 1, 9, 2_300_000_000_000)
    older = Tag("global_step10", "/c/global_step10", "verified", "", 10, 8, 2, 1, 9, 12_000, written=1000.0)
    text = saves.table(
        "/c", [newest, older], Choice("load", older, "", (), (newest,)), latest="global_step20", now=4600
    )
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["CHECKPOINT", "global_step20", "global_step10"]
    assert "2.3 TB" in text
    assert "60 min  verified" in text
    assert "a resume on as many ranks takes global_step10\nnot global_step20: x.pt is empty" in text
    assert "`latest` names global_step20: DeepSpeed by itself would load that one" in text


def dslaunch(*words) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launcher", *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_lists_any_directory(tmp_path):
    checkpoint(tmp_path, "global_step5", step=5, vouch=False)
    checkpoint(tmp_path, "global_step6", step=6, vouch=False)
    said = dslaunch("checkpoints", tmp_path)
    assert said.returncode == 0, said.stderr
    assert "a resume on as many ranks takes global_step6" in said.stdout
    for name in ("global_step5", "global_step6"):
        path = tmp_path / name / "mp_rank_00_model_states.pt"
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    assert dslaunch("checkpoints", tmp_path).returncode == 0
    said = dslaunch("checkpoints", tmp_path, "--hashes", "--json")
    assert said.returncode == 1
    told = json.loads(said.stdout)
    assert [tag["health"] for tag in told["checkpoints"]] == ["damaged", "damaged"]
    assert told["resume"]["action"] == "refuse"


@pytest.mark.slow
def test_the_command_finds_a_runs_checkpoints_by_its_journal(tmp_path):
    from launcher.node import journal

    checkpoint(tmp_path / "ckpt", step=5)
    for name, extra in (("demo", {"checkpoints": str(tmp_path / "ckpt")}), ("pods", {})):
        folder = tmp_path / f"runs/{name}-20261121-031502-4f2a90c1"
        folder.mkdir(parents=True)
        journal.append(str(folder), "rendered", name=name, backend="local", steps=10, digest="", extra=extra)
    said = dslaunch("checkpoints", "demo", "--runs", tmp_path / "runs")
    assert said.returncode == 0, said.stderr
    assert "step00000005     5      2     2      3" in said.stdout
    assert "verified" in said.stdout
    said = dslaunch("checkpoints", "pods", "--runs", tmp_path / "runs")
    assert said.returncode == 2
    assert "give the directory, where it is mounted" in said.stderr


def test_nothing_here_unpickles_or_needs_torch():
    code = (
        "import sys\n"
        "from launcher.checkpoints import archive, choose, layout, manifest, retention, shards, vouch\n"
        "print([name for name in ('torch', 'pickle', '_pickle', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['pickle', '_pickle']"), done.stdout
    for path in Path(archive.__file__).parent.glob("*.py"):
        assert "pickle.load" not in path.read_text()
        assert "Unpickler" not in path.read_text()
