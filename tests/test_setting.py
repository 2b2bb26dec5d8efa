"""What a preflight is told about a job, from the job file, the tables and the plan."""

from __future__ import annotations

import json

import pytest

from launcher import cli, plan, setting, spec
from launcher.backends import slurm
from launcher.preflight import Setting, from_json, speed, to_json

GPUS = "gpus_per_node: 8, gpu: h100-80gb, fabric: infiniband"


def planned(text: str) -> plan.Plan:
    return plan.make(spec.load(text, name="job.yaml").spec)


def job(resources: str = f"nodes: 4, {GPUS}", train: str = "zero: 3", more: str = "") -> plan.Plan:
    return planned(f"name: demo\nmodel: llama-3.1-8b\ntrain: {{{train}}}\nresources: {{{resources}}}\n{more}")


def test_a_setting_goes_through_json_and_back():
    made = job()
    told = setting.make(made.spec, made)
    assert from_json(Setting, json.loads(json.dumps(to_json(told)))) == told
    assert (told.nodes, told.gpus, told.gpu_names, told.backend, told.fabric) == (
        4,
        8,
        ("H100",),
        "nccl",
        "infiniband",
    )
    assert told.checkpoint_bytes == round(made.saving.bytes)


@pytest.mark.parametrize(
    ("resources", "more", "checks"),
    [
        (f"nodes: 4, {GPUS}", "", True),
        ("nodes: 1, gpus_per_node: 8, gpu: h100-80gb", "", False),
        ("nodes: 1, gpus_per_node: 8, gpu: h100-80gb", "preflight: {run: true}", True),
        ("nodes: 4", "", False),
        ("nodes: 4, spares: 1", "", True),
        (f"nodes: 4, {GPUS}", "preflight: {run: false}", False),
    ],
)
def test_a_preflight_comes_first_with_gpus_on_several_nodes_and_with_spares(resources, more, checks):
    text = f"name: demo\nmodel: gpt-demo\nresources: {{{resources}}}\n{more}"
    made = spec.load(text, name="job.yaml").spec
    assert made.checks_nodes is checks


def test_spares_may_wait_for_a_failure_alone_without_a_preflight():
    document = spec.load(
        "name: a\nmodel: gpt-demo\nresources: {nodes: 2, spares: 1}\npreflight: {run: false}", name="job.yaml"
    )
    assert not document.spec.checks_nodes
    script = slurm.render(plan.make(document.spec)).text("job.sbatch")
    assert "#SBATCH --nodes=3\n" in script
    assert "preflight" not in script
    assert 'allocation=("${allocation[@]:0:3}")' in script
    assert 'hosts=("${hosts[@]:0:2}")' in script


@pytest.mark.parametrize(
    ("train", "ops"),
    [
        ("zero: 3, optimizer: AdamW", ("fused_adam",)),
        ("zero: 3, optimizer: AdamW, offload: {optimizer: cpu}", ("cpu_adam",)),
        ("zero: 2, optimizer: Adagrad", ()),
    ],
)
def test_the_operators_that_deepspeed_will_load_are_known(train, ops):
    resources = f"nodes: 4, {GPUS}, memory: 2000G, cpus_per_node: 96"
    assert setting.make((made := job(resources, train)).spec, made).ops == ops


def test_the_plan_for_other_bandwidths_is_worked_out_before_the_job_starts():
    made = job(train="zero: 3, global_batch: 256, compression: lossy")
    rungs = setting.ladder(made)
    assert [rung.bandwidth for rung, _ in rungs] == [320.0, 96.0, 32.0]
    seconds = [rung.seconds for rung, _ in rungs]
    assert seconds == sorted(seconds)
    assert rungs[0][0].seconds == round(made.time.seconds, 3)
    # where the network is slow the compressed collectives that the job file allows pay off
    slow, config = rungs[-1]
    assert slow.config == "ds_config.1.json"
    assert config["zero_optimization"].get("zero_quantized_weights")
    bundle = slurm.render(made)
    assert json.loads(bundle.text("ds_config.1.json")) == config
    assert 'read -r config <"$run/preflight/config"' in bundle.text("job.sbatch")
    fixed = job(train="zero: 3, global_batch: 256, micro_batch: 8, compression: none")
    assert "read -r config" not in slurm.render(fixed).text("job.sbatch")


def test_what_a_program_does_itself_is_not_changed_behind_its_back():
    _, made = cli.load("slurm/llama-8b-pyxis-4x8/job.yaml", None, ())
    for rung, config in setting.ladder(
        made
    ):  # with 9.6 GB/s a fresh plan would recompute, which the model switches on
        assert "activation_checkpointing" not in config, rung


def test_the_rung_nearest_to_what_was_measured_is_taken_and_said():
    made = job(train="zero: 3, global_batch: 256, compression: lossy")
    told = setting.make(made.spec, made, rungs=setting.ladder(made))
    assert speed.rung(100.0, told).bandwidth == 96.0
    assert speed.rung(0.0, told) is None
    assert speed.told(300.0, told) is None
    note = speed.told(9.0, told)
    assert (note.level, note.measured, note.expected) == ("note", "9 GB/s", "320 GB/s")
    assert "ds_config.1.json suits that better and is used" in note.what
    assert note.fix == "resources.bandwidth: 9 plans with what was measured"
