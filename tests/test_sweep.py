"""Sweeps: which points there are, what is refused and where, one array of scripts that are each a job's own."""

from __future__ import annotations

import json
from pathlib import Path

import k8s_schema
import pytest
from click.testing import CliRunner

from launcher import plan, runs, spec, sweep
from launcher.backends import State, Status
from launcher.backends.slurm import array, tasks
from launcher.cli import cli
from launcher.errors import UserError
from launcher.node import journal
from launcher.run import Result

JOB = {
    "name": "sw",
    "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
    "train": {"global_batch": 16, "micro_batch": 4, "seq_len": 64, "zero": 0, "steps": 10},
    "resources": {"nodes": 2},
}


def text(over: dict, **more: object) -> str:
    """A line for each field, so that a problem's line says which it is."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in JOB.items()]
    lines += ["sweep:", *(f"  {key}: {json.dumps(value)}" for key, value in more.items()), "  over:"]
    return "\n".join([*lines, *(f"    {key}: {json.dumps(value)}" for key, value in over.items())]) + "\n"


def chosen(over: dict, *, suffixed: bool = False, **more: object) -> list[sweep.Chosen]:
    said = text(over, **more)

    def load(overrides: tuple[str, ...] = ()) -> spec.Document:
        return spec.load(said, name="job.yaml", overrides=overrides)

    return sweep.expand(load(), load, lambda one: plan.make(one.spec), suffixed=suffixed)


def test_a_grid_has_every_combination_and_zip_has_pairs():
    over = {"train.optimizer.lr": [1e-4, 3e-4], "train.seq_len": [64, 128]}
    grid = [one.point.label for one in chosen(over)]
    assert grid == [
        "optimizer.lr=0.0001 seq_len=64", "optimizer.lr=0.0001 seq_len=128",
        "optimizer.lr=0.0003 seq_len=64", "optimizer.lr=0.0003 seq_len=128",
    ]  # fmt: skip
    pairs = chosen(over, how="zip")
    assert [(one.plan.spec.train.optimizer.lr, one.plan.spec.train.seq_len) for one in pairs] == [
        (1e-4, 64), (3e-4, 128),
    ]  # fmt: skip


def test_no_two_points_save_into_one_directory():
    assert [one.plan.checkpoint_dir for one in chosen({"train.zero": [0, 1]})] == [
        "checkpoints/sw/0", "checkpoints/sw/1",
    ]  # fmt: skip
    swept = chosen({"train.checkpoint.dir": ["here", "there"]})
    assert [one.plan.checkpoint_dir for one in swept] == ["here", "there"]


def test_a_point_is_a_job_like_any_other():
    (one, _) = chosen({"train.zero": [0, 1]}, suffixed=True)
    assert one.document.spec.sweep is None
    assert one.document.spec.name == "sw-0"
    assert "sweep" not in one.document.root.entries


@pytest.mark.parametrize(
    ("over", "more", "says"),
    [
        ({"train.seq_len": [64, "x"]}, {}, "job.yaml:7:25: expected a whole number"),
        ({"train.zero": [0, 7]}, {}, "job.yaml:7:"),
        ({"train.nonsense": [1]}, {}, "nonsense"),
        ({"train.zero": []}, {}, "train.zero has no values"),
        ({"train.seq_len": [64, 64]}, {}, "sweep.over.train.seq_len.1: train.seq_len is 64 twice"),
        ({"train.zero": [0, 1], "train.seq_len": [64, 32, 64]}, {}, "train.seq_len is 64 twice"),
        ({"train.zero": [0, 0], "train.seq_len": [64, 64]}, {"how": "zip"}, "train.zero is 0 twice"),
        ({"train.zero": [0, 1], "train.seq_len": [64]}, {"how": "zip"}, "zip wants as many values"),
        ({"name": ["a", "b"]}, {}, "name cannot be swept"),
        ({"sweep.parallel": [1, 2]}, {}, "sweep.parallel cannot be swept"),
        ({"train.steps": list(range(1, 40)), "train.seq_len": list(range(1, 40))}, {}, "1521 points"),
    ],
)
def test_what_cannot_be_swept_is_refused_where_it_stands(over, more, says):
    with pytest.raises(UserError) as caught:
        chosen(over, **more)
    said = str(caught.value)
    assert says in said
    assert "--set" not in said.partition("try")[0]


def test_zip_may_repeat_a_value_beside_another():
    made = chosen({"train.zero": [0, 0], "train.seq_len": [64, 32]}, how="zip")
    assert [list(one.point.values.values()) for one in made] == [[0, 64], [0, 32]]


def test_a_value_that_does_not_fit_names_its_point():
    with pytest.raises(UserError) as caught:
        chosen({"train.micro_batch": [4, 3]})
    assert "micro_batch=3" in str(caught.value) or "job.yaml:7:29" in str(caught.value)


def test_an_array_has_one_script_and_a_run_directory_for_each_point():
    plans = [one.plan for one in chosen({"train.seq_len": [64, 128, 256]})]
    bundle = array.render(plans, parallel=2)
    script = bundle.text("job.sbatch")
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --output=points/%a/logs/slurm-%j.out\n" in script
    paths = [file.path for file in bundle.files]
    assert len(paths) == len(set(paths))
    assert "node/recover.py" in paths
    assert "points/0/node/recover.py" not in paths
    for number in range(3):
        own = bundle.text(f"points/{number}/job.sbatch")
        assert '--job "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in own
        assert '"$SLURM_JOB_ID"' not in own  # the last task has the number of the whole array
        assert bundle.text(f"points/{number}/node.sh") != bundle.text(f"points/{(number + 1) % 3}/node.sh")


def test_what_slurm_is_asked_for_cannot_be_swept():
    plans = [one.plan for one in chosen({"resources.nodes": [1, 2]})]
    with pytest.raises(UserError, match="point 1 asks Slurm for something else than point 0: --nodes=1, --nodes=2"):
        array.render(plans)


def test_a_heterogeneous_job_is_no_array():
    row = {"name": "a", "command": ["true"], "component": {"partition": "cpu"}}
    plans = [one.plan for one in chosen({"services": [[row]]})]
    with pytest.raises(UserError, match="heterogeneous"):
        array.render(plans)


# --- commands ---------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "job.yaml").write_text(text({"train.seq_len": [64, 128]}, parallel=1))
    return tmp_path


def call(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


def test_plan_lists_the_points(job):
    done = call("plan", "job.yaml")
    assert [line.split()[:2] for line in done.stdout.split("\n")[:3]] == [
        ["POINT", "LABEL"], ["0", "seq_len=64"], ["1", "seq_len=128"],
    ]  # fmt: skip
    rows = json.loads(call("plan", "job.yaml", "--json").stdout)
    assert [row["values"] for row in rows] == [{"train.seq_len": 64}, {"train.seq_len": 128}]


def test_lint_judges_every_point(job):
    assert call("lint", "job.yaml").exit_code == 0
    (job / "job.yaml").write_text(text({"train.seq_len": [64, 0]}))
    done = call("lint", "job.yaml")
    assert "job.yaml:7:" in done.stdout + done.stderr
    assert done.exit_code == 1 or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("command", [["local"], ["env"], ["config", "deepspeed"]])
def test_what_knows_one_job_refuses_a_sweep(job, command):
    error = call(*command, "job.yaml").exception
    assert isinstance(error, UserError)
    assert "a sweep of 2 points" in str(error)


def test_on_kubernetes_a_sweep_is_an_object_for_each_point(job):
    (job / "job.yaml").write_text(text({"train.seq_len": [64, 128]}) + "container: a/b:1\n")
    done = call("k8s", "job.yaml")
    assert done.exception is None
    names = [line.strip() for line in done.stdout.split("\n") if line.startswith("  name: ")]
    assert "name: sw-0" in names
    assert "name: sw-1" in names
    assert all(k8s_schema.documents(done.stdout))  # no empty document between them


def test_parallel_would_do_nothing_on_kubernetes(job):
    (job / "job.yaml").write_text(text({"train.seq_len": [64, 128]}, parallel=1) + "container: a/b:1\n")
    assert "parallel is of Slurm's arrays" in str(call("k8s", "job.yaml").exception)


# --- where it stands --------------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path):
    """A sweep of three points that is array 7."""
    folder = tmp_path / "sw-20261121-120000-00000000"
    for place in (folder, *(folder / "points" / str(number) for number in range(3))):
        (place / "logs").mkdir(parents=True)
        extra = {"points": 3} if place == folder else {"label": f"zero={place.name}"}
        journal.append(place, "rendered", name="sw", backend="slurm", steps=10, extra=extra)
    journal.append(folder, "submitting", token=folder.name)
    journal.append(folder, "submitted", job="7")
    return folder


def queue_of(folder: Path, rows: dict[str, tuple[str, str]]) -> str:
    widths = (24, 24, 24, 12, 256, 256, 256, 64)
    lines = []
    for job_id, (word, code) in rows.items():
        cells = (job_id, word, "2026-11-21T12:00:00", code, folder.name, f"dslaunch:{folder.name}", "", "")
        lines.append("".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def test_a_point_is_found_by_its_number_and_has_its_tasks_job(submitted):
    point = runs.find(f"{submitted.name}.2", submitted.parent)
    assert (point.folder.name, point.job, point.id) == ("2", "7_2", f"{submitted.name}.2")
    assert point.state is runs.Phase.QUEUED
    assert [one.job for one in runs.points(runs.read(submitted))] == ["7_0", "7_1", "7_2"]


def test_a_sweep_stands_where_its_points_do(submitted):
    (submitted / "points" / "0" / "exit-code").write_text("0\n")
    (submitted / "points" / "1" / "exit-code").write_text("7\n")
    listed = queue_of(submitted, {"7_0": ("COMPLETED", "0"), "7_1": ("FAILED", "1792"), "7_2": ("RUNNING", "0")})
    record = runs.read(submitted)
    everything = [record, *runs.points(record)]
    found = tasks.states(everything, lambda argv, **_: Result(0, listed if argv[0] == "squeue" else "", ""))
    assert found[record.id].state is State.RUNNING
    assert found[record.id].detail == "1 running, 1 failed, 1 done"
    assert [found[f"{record.id}.{number}"].state for number in range(3)] == [
        State.COMPLETED, State.FAILED, State.RUNNING,
    ]  # fmt: skip
    assert found[f"{record.id}.1"].code == 7


def test_what_slurm_has_forgotten_its_script_knows(submitted):
    for number in range(3):
        (submitted / "points" / str(number) / "exit-code").write_text("0\n")
    record = runs.read(submitted)
    found = tasks.states([record], lambda argv, **_: Result(0 if argv[0] == "squeue" else 1, "", ""))
    assert (found[record.id].state, found[record.id].code) == (State.COMPLETED, 0)


def test_silence_is_no_answer(submitted):
    record = runs.read(submitted)
    found = tasks.states([record], lambda argv, **_: Result(1, "", "Unable to contact slurm controller"))
    assert found[record.id].state is State.UNKNOWN
    assert tasks.together([Status(State.UNKNOWN, ""), Status(State.COMPLETED, "", 0)], "7").state is State.UNKNOWN
    assert tasks.arrays(record, lambda argv, **_: Result(1, "", "")) is None


def test_an_array_that_was_not_answered_for_is_found_as_one_job(submitted):
    listed = queue_of(submitted, {"7_0": ("RUNNING", "0"), "7_1": ("PENDING", "0"), "7_2": ("PENDING", "0")})
    assert tasks.arrays(runs.read(submitted), lambda argv, **_: Result(0, listed, "")) == [("7", True)]


@pytest.mark.parametrize("name", ["train", "train.checkpoint", "resources", "slurm"])
def test_a_section_is_not_swept(name):
    with pytest.raises(UserError) as caught:
        chosen({name: [1]})
    (problem,) = caught.value.problems
    assert f"{name} is a section" in problem.message
    assert f"{name}." in problem.hint
    assert [one.point.values for one in chosen({"train.optimizer": ["AdamW", "SGD"]})]  # a name is a value
