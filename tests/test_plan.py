"""The decisions: batch arithmetic, sizes, ZeRO stages, and what DeepSpeed would refuse hours later."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher import facts, nccl, plan, spec
from launcher.errors import UserError
from launcher.plan import batch, memory, rules

AUTO = "auto"
GPUS = "resources: {nodes: 8, gpus_per_node: 8, gpu: h100, fabric: infiniband}\n"


def made(text: str, *, model: str = "gpt-demo", **more: object) -> plan.Plan:
    return plan.make(spec.load(f"name: demo\nmodel: {model}\n{text}", name="job.yaml").spec, **more)


def refused(text: str, *, model: str = "gpt-demo", **more: object) -> list[tuple[str, str, str]]:
    """(message, hint, place) of every problem."""
    document = spec.load(f"name: demo\nmodel: {model}\n{text}", name="job.yaml")
    with pytest.raises(UserError) as error:
        plan.make(document.spec, **more)
    return [(p.message, p.hint, document.place(p).where) for p in error.value.problems]


def chosen(made: plan.Plan) -> dict[str, str]:
    return {decision.name: decision.value for decision in made.decisions}


# --- batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "replicas", "largest", "answer"),
    [
        (512, 4, AUTO, 64, 1, (512, 4, 2)),
        (512, AUTO, 2, 64, 1, (512, 4, 2)),
        (AUTO, 4, 2, 64, 1, (512, 4, 2)),
        (512, 4, 2, 64, 1, (512, 4, 2)),
        (512, AUTO, AUTO, 64, 1, (512, 1, 8)),
        (512, AUTO, AUTO, 64, 4, (512, 4, 2)),
        (512, AUTO, AUTO, 64, 64, (512, 8, 1)),
        (480, AUTO, AUTO, 16, 16, (480, 15, 2)),
        (AUTO, AUTO, AUTO, 64, 4, (256, 4, 1)),
        (AUTO, AUTO, 8, 64, 4, (2048, 4, 8)),
        (1, 1, 1, 1, 1, (1, 1, 1)),
        (7, AUTO, AUTO, 1, 4, (7, 1, 7)),
    ],
)
def test_the_missing_numbers_of_a_batch_are_found(total, micro, accumulation, replicas, largest, answer):
    solved = batch.solve(total, micro, accumulation, replicas=replicas, largest_micro=largest)
    assert (solved.total, solved.micro, solved.accumulation) == answer


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "replicas", "says", "hint"),
    [
        (100, 8, AUTO, 16, "100 is not a multiple of 16 data-parallel ranks x micro_batch 8", "128 is the nearest"),
        (500, 4, AUTO, 64, "64 data-parallel ranks x micro_batch 4 = 256", "512 is the nearest that is (256 and 512"),
        (300, 4, AUTO, 64, "= 256", "256 is the nearest that is (256 and 512 are the neighbours)"),
        (100, AUTO, 3, 8, "8 data-parallel ranks x accumulation 3 = 24", "96 is the nearest"),
        (100, AUTO, AUTO, 64, "100 is not a multiple of 64 data-parallel ranks", "128 is the nearest"),
        (512, 4, 4, 64, "512 is not micro_batch 4 x accumulation 4 x 64 data-parallel ranks = 1024",
         "global_batch: 1024 or gradient_accumulation: 2; or leave one of the three out"),
        (100, 3, 2, 8, "= 48", "global_batch: 48; or leave one of the three out"),
        (3, AUTO, AUTO, 4, "3 is not a multiple of 4", "4 is the nearest"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(total, micro, accumulation, replicas, says, hint):
    with pytest.raises(UserError) as error:
        batch.solve(total, micro, accumulation, replicas=replicas)
    (problem,) = error.value.problems
    assert says in problem.message
    assert hint in problem.hint
    assert problem.at == ("train", "global_batch")


Number = st.one_of(st.just(AUTO), st.integers(1, 5000))


@given(Number, Number, Number, st.integers(1, 600), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_every_batch_multiplies_out_and_every_refusal_names_one_that_does(
    total, micro, accumulation, replicas, largest
):
    given = {"total": total, "micro": micro, "accumulation": accumulation}
    try:
        solved = batch.solve(total, micro, accumulation, replicas=replicas, largest_micro=largest)
    except UserError as error:
        hint = error.problems[0].hint
        nearest = int(re.search(r"\d+", hint)[0])
        solved = batch.solve(nearest, micro, accumulation, replicas=replicas, largest_micro=largest)
        given["total"] = nearest
        if "nearest" in hint:
            step = (1 if micro == AUTO else micro) * (1 if accumulation == AUTO else accumulation) * replicas
            assert abs(nearest - total) <= step / 2 or nearest == step
    assert solved.total == solved.micro * solved.accumulation * replicas
    assert min(solved.total, solved.micro, solved.accumulation) >= 1
    for name, value in given.items():
        assert value in (AUTO, getattr(solved, name))
    if micro == AUTO and accumulation == AUTO:
        assert solved.micro <= largest


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", facts.models())
def test_a_preset_has_the_published_number_of_parameters(name):
    row = facts.models()[name]
    assert memory.parameters(row.shape) == pytest.approx(row.published, rel=0.005)
    assert row.source


@pytest.mark.parametrize(("stage", "gib"), [(0, 104.3), (1, 4 * 7e9 / 2**30 + 7e9 * 12 / 16 / 2**30), (3, 6.5)])
def test_model_states_of_seven_billion_on_sixteen(stage, gib):
    assert memory.model_states(7e9, stage=stage, gpus=16) == pytest.approx(gib, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "ranks", "low", "per_parameter"),
    [
        (0, 64, True, 16), (1, 64, True, 4 + 12 / 64), (2, 64, True, 2 + 14 / 64), (3, 64, True, 16 / 64),
        (0, 64, False, 16), (1, 4, False, 10), (3, 4, False, 4), (3, 1, True, 16),
    ],
)  # fmt: skip
def test_bytes_per_parameter_are_those_of_the_zero_paper(stage, ranks, low, per_parameter):
    assert memory.state_bytes(stage=stage, ranks=ranks, low_precision=low) == pytest.approx(per_parameter)


@pytest.mark.parametrize(
    ("stage", "offload", "left"),
    [
        (1, {"offload_optimizer": True}, 4.0),
        (2, {"offload_optimizer": True}, 2.0),
        (3, {"offload_optimizer": True}, 2 / 8),
        (3, {"offload_optimizer": True, "offload_parameters": True}, 0.0),
        (3, {"offload_parameters": True}, 14 / 8),
    ],
)
def test_what_is_offloaded_is_not_on_the_gpu(stage, offload, left):
    assert memory.model_states(2**30, stage=stage, gpus=8, **offload) == pytest.approx(left)


@pytest.mark.parametrize(("recompute", "gib"), [(False, 9.5), (True, 1.6)])
def test_activations_of_a_seven_billion_llama(recompute, gib):
    shape = facts.models()["llama-7b"].shape
    size = memory.activations(shape, micro=1, seq_len=2048, recompute=recompute, low_precision=True)
    assert size == pytest.approx(gib, abs=0.6)


@given(st.sampled_from(sorted(facts.models())), st.integers(1, 512), st.booleans())
def test_a_higher_stage_never_needs_more(name, gpus, low):
    count = memory.parameters(facts.models()[name].shape)
    sizes = [memory.model_states(count, stage=s, gpus=gpus, low_precision=low) for s in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)


# --- what is chosen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "seq", "resources", "stage", "recompute", "precision"),
    [
        ("gpt-demo", 128, "{nodes: 2, processes_per_node: 2}", 0, False, "fp32"),
        ("gpt2", 1024, "{nodes: 1, gpus_per_node: 1, gpu: a100}", 0, False, "bf16"),
        ("gpt2", 1024, "{nodes: 1, gpus_per_node: 1, gpu: v100}", 0, False, "fp16"),
        ("llama-7b", 2048, "{nodes: 1, gpus_per_node: 8, gpu: h100}", 1, False, "bf16"),
        ("llama-7b", 2048, "{nodes: 1, gpus_per_node: 8, gpu: h200}", 0, False, "bf16"),
        ("llama-70b", 2048, "{nodes: 8, gpus_per_node: 8, gpu: h100, fabric: ib}", 3, False, "bf16"),
        ("llama-70b", 4096, "{nodes: 8, gpus_per_node: 8, gpu: h100, fabric: ib}", 3, True, "bf16"),
        ("llama-3.1-70b", 4096, "{nodes: 8, gpus_per_node: 8, gpu: h200, fabric: ib}", 3, False, "bf16"),
    ],
)
def test_the_lowest_stage_that_fits_is_chosen(model, seq, resources, stage, recompute, precision):
    result = made(f"train: {{script: a.py, seq_len: {seq}}}\nresources: {resources}\n", model=model)
    assert (result.stage, result.recompute, result.precision) == (stage, recompute, precision)
    assert result.config["zero_optimization"]["stage"] == stage
    if result.estimate:
        assert result.estimate.fits(facts.gpu(result.spec.resources.gpu).memory)


def test_every_lower_stage_would_not_have_fitted():
    text = "train: {{script: a.py, zero: {stage}, micro_batch: 1}}\n" + GPUS.replace("{", "{{").replace("}", "}}")
    for stage in (0, 1, 2):
        ((message, hint, _),) = refused(text.format(stage=stage), model="llama-70b")
        assert message.startswith("does not fit: about ")
        assert "h100-80gb has 80" in message
        assert "zero: 3 (with AdamW)" in hint
    assert made(text.format(stage=3), model="llama-70b").stage == 3


def test_what_does_not_fit_is_refused_with_the_sizes_and_no_other_complaint():
    resources = "resources: {nodes: 1, gpus_per_node: 1, gpu: t4}\n"
    ((message, hint, where),) = refused(f"train: {{script: a.py}}\n{resources}", model="llama-70b")
    assert re.match(r"does not fit: about \d+ GiB per GPU \(\d+ model states, \d+ activations, ", message)
    assert hint == "offload.optimizer: cpu, then more nodes"
    assert where == "job.yaml:4:1"
    offload = "train: {script: a.py, offload: {optimizer: cpu, parameters: cpu}, micro_batch: 64}\n"
    ((message, hint, _),) = refused(offload + resources, model="gpt3-175b")  # not that stage 0 ignores the offload
    assert message.startswith("does not fit")
    assert hint == "micro_batch: 1, then a shorter seq_len"


@pytest.mark.parametrize(
    ("train", "stage"),
    [
        ("offload: {optimizer: cpu}", 1),
        ("offload: {optimizer: cpu, parameters: cpu}", 3),
        ("offload: {optimizer: nvme, nvme_path: /nvme}", 3),
        ("parallel: {pipeline: 2}", 0),
        ("optimizer: Lion", 0),
    ],
)
@pytest.mark.parametrize("resources", [GPUS, GPUS.replace("8, gpu:", "8, gpu:")])
def test_offload_and_pipeline_narrow_the_stages(train, stage, resources):
    assert made(f"train: {{script: a.py, {train}}}\n{resources}", model="gpt2").stage == stage


def test_a_micro_batch_is_as_large_as_fits_and_divides():
    result = made("train: {script: a.py, global_batch: 768, seq_len: 1024}\n" + GPUS, model="gpt2")
    assert (result.batch.total, result.batch.replicas) == (768, 64)
    assert result.batch.micro * result.batch.accumulation == 12
    assert result.batch.micro > 1


def test_tensor_and_pipeline_ranks_share_a_replica():
    result = made("train: {script: a.py, micro_batch: 1, parallel: {tensor: 4, pipeline: 2}}\n" + GPUS, model="gpt2")
    assert result.batch.replicas == 8
    ((message, _, where),) = refused("train: {script: a.py, parallel: {tensor: 3}}\n" + GPUS)
    assert message == "tensor 3 x pipeline 1 = 3 does not divide 64 ranks"
    assert where == "job.yaml:3:23"


def test_every_decision_has_a_reason():
    for row in made("train: {script: a.py}\n" + GPUS, model="gpt2").decisions:
        assert row.name
        assert row.value
        assert row.why


def test_the_command_of_a_rank_carries_the_config():
    def command(train: str) -> list[str]:
        return list(made(f"train: {{{train}}}").command)

    assert command("script: a.py, args: [--x, '1 2']") == [
        *("python3", "-u", "a.py", "--x", "1 2", "--deepspeed_config", "ds_config.json")
    ]
    assert command("module: a.b, config_flag: none") == ["python3", "-u", "-m", "a.b"]
    assert command("script: a.py, config_flag: --ds") == ["python3", "-u", "a.py", "--ds", "ds_config.json"]
    assert command("script: a.py, config_flag: none") == ["python3", "-u", "a.py"]
    assert command("command: [./a, b], config_flag: none") == ["./a", "b"]
    assert command("command: [./a, b]") == ["./a", "b"]
    assert command("command: [./a, b], config_flag: -c") == ["./a", "b", "-c", "ds_config.json"]
    assert command("args: [--lr, 2]")[-2:] == ["--lr", "2"]
    assert command("steps: 7")[:4] == ["python3", "-u", "node/train_gpt.py", "--deepspeed_config"]


# --- what a person may write by mistake ---------------------------------------------------------------------


ONE = "resources: {gpus_per_node: 8, gpu: h100%s}\n"


def test_a_batch_that_divides_and_does_not_fit_is_refused():
    text = "train: {script: a.py, global_batch: 8192, gradient_accumulation: 1}\n" + ONE % ""
    ((message, hint, where),) = refused(text, model="llama-7b")
    assert re.match(r"does not fit: about \d+ GiB per GPU \(.*\) at micro-batch 1024, and h100-80gb has 80", message)
    assert hint.startswith("gradient_accumulation: 1024 (micro-batch 1), then ")
    assert where == "job.yaml:3:43"
    fits = made(text.replace("accumulation: 1}", "accumulation: 256}"), model="llama-7b")
    assert fits.batch.micro == 4
    assert fits.estimate.fits(80)


@pytest.mark.parametrize(("total", "accumulation"), [(64, 1), (256, 4), (512, 1), (1024, 2)])
def test_the_stage_is_chosen_for_the_micro_batch_that_results(total, accumulation):
    result = made(
        f"train: {{script: a.py, global_batch: {total}, gradient_accumulation: {accumulation}}}\n" + ONE % "",
        model="llama-7b",
    )
    assert result.batch.micro == total // accumulation // 8
    assert result.estimate.fits(80)


@pytest.mark.parametrize(
    ("train", "says", "hint"),
    [
        ("optimizer: {freeze_step: 5}", "freeze_step 5 belongs to the 1-bit optimizers, and AdamW is none", "out"),
        ("optimizer: {betas: [0.9]}", "betas [0.9] are not two numbers", "[0.9, 0.999]"),
        ("optimizer: {betas: [0.9, 1]}", "betas [0.9, 1.0] are not two numbers", "[0.9, 0.999]"),
        ("optimizer: {type: SGD, eps: 1e-8}", "SGD takes no eps", "leave it out"),
        ("lr_schedule: {warmup_steps: 1000}", "warmup_steps 1000 and the run has 1000", "warmup_steps: 50"),
        ("offload: {nvme_path: /x}", "nvme_path /x is named and nothing is offloaded", "optimizer: nvme"),
        ("optimizer: {params: {lr: 0.1}}", "optimizer.params.lr 0.1 contradicts train.optimizer.lr 0.0001",
         "use train.optimizer.lr alone"),
        ("optimizer: {eps: 1e-6, params: {eps: 1e-8}}", "contradicts train.optimizer.eps 1e-06", "alone"),
        ("optimizer: {betas: [0.8, 0.9], params: {betas: [0.9, 0.9]}}", "contradicts train.optimizer.betas", ""),
        ("optimizer: {weight_decay: 0, params: {weight_decay: 0.1}}", "contradicts train.optimizer.weight_decay 0.0",
         ""),
        ("optimizer: Adadelto", "dslaunch's table has no optimizer `Adadelto`", "`Adadelta`?"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(train, says, hint):
    found = refused(f"train: {{script: a.py, {train}}}\n")
    assert [row[0] for row in found if says in row[0]], found
    ((message, said, place),) = found
    assert says in message
    assert hint in said
    assert place.startswith("job.yaml:3:")


@pytest.mark.parametrize(
    "train",
    ["eps: 0", "eps: -1", "weight_decay: -0.1", "betas: [a, b]"],
)
def test_a_number_of_the_optimizer_out_of_its_range_is_refused(train):
    with pytest.raises(UserError, match=r"not between|expected a number"):
        made(f"train: {{script: a.py, optimizer: {{{train}}}}}\n")


@pytest.mark.parametrize(("text", "good"), [("0.19", False), ("0.19.6", True), ("0.20.0+cu12", True), ("1", False)])
def test_a_version_has_three_numbers(text, good):
    if good:
        assert made(f"environment: {{deepspeed: {text}}}").spec.environment.deepspeed == text
        return
    with pytest.raises(UserError, match=r"not a version of three numbers such as 0\.19\.6"):
        made(f"environment: {{deepspeed: {text}}}")


def test_an_untested_optimizer_runs_with_zero_once_that_is_said():
    sgd = (
        "train: {{script: a.py, optimizer: {{type: SGD, params: {{momentum: 0.9}}}}{}}}\n"
        + ONE.replace("{", "{{").replace("}", "}}") % ""
    )
    assert made(sgd.format(""), model="gpt2").stage == 0
    ((message, hint, _),) = refused(sgd.format(", zero: 3"), model="gpt2")
    assert message.startswith("SGD does not run with ZeRO stage 3")
    assert "zero_allow_untested_optimizer: true" in hint
    untested = ", zero: 3, deepspeed: {zero_allow_untested_optimizer: true}"
    assert made(sgd.format(untested), model="gpt2").stage == 3


def test_independent_faults_are_reported_together():
    found = refused(
        "train: {zero: 3, optimizer: {freeze_step: 3}, lr_schedule: {warmup_steps: 2000}, global_batch: 7,"
        " deepspeed: {zero_optimisation: {}, gradient_clipping: '1'}}\n"
        "resources: {nodes: 2, gpus_per_node: 8, gpu: h10, fabric: infinband}\nenv: {NCCL_IB_TIMEOUT: '99'}\n",
        model="lama-7b",
    )
    messages = [message for message, _, _ in found]
    for says in (
        *("no model preset", "no GPU type", "no fabric", "NCCL_IB_TIMEOUT", "freeze_step 3", "warmup_steps 2000"),
        *("global_batch 7 is not a multiple", "no key `zero_optimisation`", "gradient_clipping is a number"),
    ):
        assert any(says in message for message in messages), (says, messages)
    assert len(messages) == len(set(messages)) == 9


# --- the reference trainer, and a program of one's own -------------------------------------------------------


@pytest.mark.parametrize(("seq", "count"), [(128, 875_264), (1024, 875_264 + 896 * 128)])
def test_the_plan_of_the_reference_trainer_is_of_what_it_trains(seq, count):
    result = made(f"train: {{seq_len: {seq}}}")
    assert result.parameters == count
    assert (result.model.shape.positions, result.model.shape.tied) == (seq, False)
    assert not result.notes
    assert "the reference trainer's GPT: 4 layers of 128, 4 heads, 256 tokens" in result.decisions[0].why


def test_a_model_that_the_reference_trainer_only_resembles_is_said_to_be_a_gpt():
    result = made("train: {seq_len: 2048}\n" + GPUS, model="llama-3.1-8b")
    h, layers, vocab = 4096, 32, 128256
    assert result.parameters == 2 * vocab * h + 2048 * h + layers * (12 * h * h + 13 * h) + 2 * h
    (note,) = [note for note in result.notes if "plain GPT" in note]
    assert "not llama-3.1-8b itself (kv_heads 8, ffn 14336, gated, no biases)" in note
    own = made("train: {script: a.py, seq_len: 2048}\n" + GPUS, model="llama-3.1-8b")
    assert own.parameters == facts.models()["llama-3.1-8b"].published
    assert not [note for note in own.notes if "plain GPT" in note]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "seq"), [("gpt-demo", 128), ("{layers: 3, hidden: 48, heads: 6, vocab: 300}", 77)])
def test_the_reference_trainer_s_own_model_has_as_many_parameters(model, seq, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from argparse import Namespace

    from launcher.node import train_gpt

    planned = made(f"train: {{seq_len: {seq}}}", model=model)
    sizes = {name: getattr(planned.model.shape, name) for name in ("layers", "hidden", "heads", "vocab")}
    trained = train_gpt.GPT(Namespace(**sizes, seq_len=seq, activation_checkpointing=False))
    assert sum(p.numel() for p in trained.parameters()) == planned.parameters


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ("activation_checkpointing: true", "model.gradient_checkpointing_enable()"),
    ],
)
@pytest.mark.parametrize("program", ["script: a.py", "module: a.b", "command: [./a]"])
def test_what_a_program_of_ones_own_must_do_is_said(program, train, says):
    assert any(says in note for note in made(f"train: {{{program}, {train}}}").notes)
    assert not any(says in note for note in made(f"train: {{{train}}}").notes)
    why = {row.name: row.why for row in made(f"train: {{{program}, checkpoint: {{every: 9}}}}").decisions}
    assert why["checkpoint"].startswith("asked for every 9 steps, 2 kept")
    assert "DSLAUNCH_CHECKPOINT_DIR, DSLAUNCH_CHECKPOINT_EVERY and DSLAUNCH_CHECKPOINT_KEEP" in why["checkpoint"]


# --- host memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gib"), [("500G", 500), ("2048M", 2), ("1T", 1024), ("1048576K", 1), ("1024", 1)])
def test_a_slurm_memory_size_in_gib(size, gib):
    assert memory.host_gib(size) == gib


@pytest.mark.parametrize(
    ("offload", "nodes", "says", "size"),
    [
        ("{optimizer: cpu}", 1, "75 GiB per node", "70G"),
        ("{optimizer: cpu}", 2, "38 GiB per node", "30G"),
        ("{optimizer: cpu, parameters: cpu}", 1, "88 GiB per node", "87000M"),
        ("{optimizer: nvme, parameters: cpu, nvme_path: /x}", 1, "13 GiB per node", "12G"),
    ],
)
def test_what_is_offloaded_has_to_fit_the_hosts(offload, nodes, says, size):
    def text(size: str) -> str:
        resources = f"{{nodes: {nodes}, gpus_per_node: 8, gpu: h100, fabric: ib, memory: {size}}}"
        return f"train: {{script: a.py, offload: {offload}}}\nresources: {resources}\n"

    for enough in ("400G", "'0'"):
        assert chosen(made(text(enough), model="llama-7b"))["host memory"] == says
    ((message, hint, _),) = refused(text(size), model="llama-7b")
    assert message.startswith(f"offload needs {says.split()[0]} GiB of host memory per node (")
    assert f"memory {size} is " in message
    assert hint.startswith("memory: ")


# --- names no table has -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model", "says", "hint", "where"),
    [
        ("", "lama-7b", "no model preset `lama-7b`", "did you mean `llama-7b`?", "2:1"),
        ("", "gtp2", "no model preset `gtp2`", "did you mean `gpt2`?", "2:1"),
        ("", "zebra", "no model preset `zebra`", "known here: bert-base", "2:1"),
        ("resources: {gpus_per_node: 1, gpu: h100-80g}", "gpt2", "no GPU type `h100-80g`", "`h100-80gb`?", "3:31"),
        ("resources: {gpus_per_node: 1, gpu: zebra}", "gpt2", "no GPU type `zebra`", "known here: a100-40gb", "3:31"),
        ("resources: {nodes: 2, fabric: infinband}", "gpt-demo", "no fabric `infinband`", "`infiniband`?", "3:23"),
        ("resources: {nodes: 1, fabric: infinband}", "gpt-demo", "no fabric `infinband`", "`infiniband`?", "3:23"),
        (
            "resources: {gpus_per_node: 1, gpu: t4, fabric: infinband}",
            "gpt-demo",
            "no fabric `infinband`",
            "`infiniband`?",
            "3:40",
        ),
        ("resources: {nodes: 2, fabric: all}", "gpt-demo", "no fabric `all`", "known here: efa, ethernet", "3:23"),
        (
            "resources: {gpus_per_node: 1, nodes: 2, gpu: t4}",
            "gpt2",
            "no network is named",
            "infiniband, roce",
            "3:1",
        ),
        (
            "resources: {gpus_per_node: 1}",
            "gpt2",
            "the GPU type is not named",
            "resources.gpu, or give train.zero",
            "",
        ),
        (
            "train: {precision: bf16}\nresources: {gpus_per_node: 1, gpu: t4}",
            "gpt2",
            "t4-16gb has no bf16",
            "fp16",
            "",
        ),
        ("", "bert-base", "trains decoders, and this model is an encoder", "give train.script", "2:1"),
        ("", "{layers: 2, hidden: 10, heads: 4}", "hidden 10 is not a multiple of heads 4", "hidden: 12", "2:20"),
        ("", "{layers: 2, hidden: 10, heads: 4, head_dim: 4}", "hidden 10 is not a multiple of heads", "12", "2:20"),
        ("", "{layers: 2, hidden: 16, heads: 4, vocab: 255}", "vocab 255 is less than the 256 bytes", "256", "2:42"),
        ("train: {config_flag: --ds}", "gpt-demo", "config_flag --ds without a program", "leave it out", "3:9"),
        ("", "{layers: 2, hidden: 16, heads: 4, kv_heads: 3}", "heads 4 is not a multiple of kv_heads 3", "", "2:42"),
    ],
)
def test_what_nobody_can_know_is_refused_with_what_would_do(text, model, says, hint, where):
    found = refused(text, model=model)
    assert any(says in m and hint in h and where in w for m, h, w in found), found


@pytest.mark.parametrize("name", ["h100", "H100", "h100-80gb", "h100-sxm5-80gb"])
def test_a_gpu_has_several_names(name):
    assert facts.gpu(name).name == "h100-80gb"


def test_names_in_a_table_mean_one_row_each():
    for rows in (facts.gpus(), facts.fabrics()):
        names = [name for row in rows.values() for name in (row.name, *row.aliases)]
        assert len(names) == len(set(names))
        assert all(row.source for row in rows.values())


# --- Hugging Face ------------------------------------------------------------------------------------------


LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
    "n_inner": None,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 2048, "d_kv": 64,
    "vocab_size": 32128, "is_encoder_decoder": True, "feed_forward_proj": "relu",
}  # fmt: skip
T5_1_1 = {
    **T5, "d_model": 2048, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32, "d_ff": 5120,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = {**LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (LLAMA, "llama-7b"), (GPT2, "gpt2"), (T5, "t5-small"), (T5_1_1, "t5-xl"), (BERT, "bert-base"),
        (GROUPED, "llama-3.1-8b"),
    ],
)  # fmt: skip
def test_a_hugging_face_config_has_the_size_of_its_preset(config, preset):
    shape = facts.from_hugging_face(json.dumps(config), source="config.json")
    assert shape.kind == facts.models()[preset].shape.kind
    assert memory.parameters(shape) == pytest.approx(facts.models()[preset].published, rel=0.005)


def test_a_hugging_face_config_is_planned():
    result = made("train: {script: a.py}\n" + GPUS, model="./config.json", config_json=json.dumps(LLAMA))
    assert result.parameters == 6_738_415_616
    assert "config.json (Hugging Face config)" in result.decisions[0].why


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a Hugging Face config"),
        ("{}", "lacks hidden_size, num_hidden_layers, num_attention_heads, vocab_size"),
        (json.dumps({**LLAMA, "hidden_size": "4096"}), "lacks hidden_size as a positive whole number"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "lacks num_hidden_layers"),
        (json.dumps({**LLAMA, "vocab_size": True}), "lacks vocab_size"),
        (
            json.dumps({**LLAMA, "num_key_value_heads": "x"}),
            "num_key_value_heads: expected a whole number, found `x`",
        ),
        (json.dumps({**LLAMA, "num_key_value_heads": -8}), "num_key_value_heads: -8 is not between 1 and"),
        (json.dumps({**LLAMA, "intermediate_size": [1]}), "intermediate_size: expected"),
        (json.dumps({**LLAMA, "num_hidden_layers": 10**6}), "num_hidden_layers: 1000000 is not between"),
        (json.dumps({**GPT2, "n_positions": -1}), "n_positions: -1 is not between 0 and"),
        (
            json.dumps({**LLAMA, "hidden_size": 64, "num_attention_heads": 400}),
            "hidden 64 is not a multiple of heads",
        ),
        (json.dumps({**LLAMA, "num_key_value_heads": 5}), "heads 32 is not a multiple of kv_heads 5"),
        (json.dumps({**LLAMA, "num_local_experts": 8}), "is a mixture of experts"),
    ],
)
def test_a_config_that_is_none_is_refused(text, says):
    assert says in refused("train: {script: a.py}\n", model="config.json", config_json=text)[0][0]


# --- rules -------------------------------------------------------------------------------------------------


def situation(config: dict[str, object] | None = None, **more: object) -> rules.Situation:
    base = rules.Situation(config={}, gpus=True, world=8, pipeline=1, steps=1000, deepspeed="")
    return replace(base, config=config or {}, **more)


def optimizer(kind: str, **params: object) -> dict[str, object]:
    return {"optimizer": {"type": kind, "params": params}}


def zero(**section: object) -> dict[str, object]:
    return {"zero_optimization": section}


ONEBIT = optimizer("OneBitAdam", freeze_step=200)
OLD = {"deepspeed": "0.19.6"}
# rule: what it refuses (None: only notes), what it says, what it lets pass
TABLE = [
    (rules.keys_are_known, situation({"zero_optimisation": {}}), "ignores it without a word", situation(zero())),
    (rules.keys_are_known, situation({"gradient_checkpointing": 1}), "no key `gradient_checkpointing`", situation()),
    (rules.keys_are_not_removed, situation({"amp": {}}), "left DeepSpeed in 0.19.8", situation({"amp": {}}, **OLD)),
    (rules.keys_are_not_removed, situation({"nebula": {}}, deepspeed="0.19.7"), "left DeepSpeed in 0.19.7",
     situation({"elasticity": {}}, deepspeed="0.19.7")),
    (rules.keys_are_not_removed, situation(zero(mics_shard_size=8)), "`mics_shard_size`", situation(zero(stage=3))),
    (rules.sections_are_sections, situation({"optimizer": "Adam"}), "optimizer is a section", situation(ONEBIT)),
    (rules.sections_are_sections, situation({"zero_optimization": 3}), "zero_optimization is a section", situation()),
    (rules.optimizer_is_known, situation(optimizer("Adm")), "table has no optimizer `Adm`",
     situation(optimizer("adam"))),
    (rules.optimizer_is_known, situation(optimizer("onebitadam")), "no optimizer `onebitadam`", situation(ONEBIT)),
    (rules.optimizer_is_known, situation(optimizer("sgd")), "no optimizer `sgd`", situation(optimizer("SGD"))),
    (rules.onebit_needs_an_old_deepspeed, situation(ONEBIT), "does not say which the nodes have",
     situation(ONEBIT, **OLD)),
    (rules.onebit_needs_an_old_deepspeed, situation(ONEBIT, deepspeed="0.19.8"), "is not in DeepSpeed 0.19.8",
     situation(optimizer("Adam"), deepspeed="0.19.8")),
    (rules.onebit_needs_an_old_deepspeed, situation(optimizer("ZeroOneAdam"), deepspeed="0.19.7"), "left in 0.19.7",
     situation(optimizer("OneBitLamb"), deepspeed="0.9.5")),
    (rules.optimizer_accepts_the_stage, situation({**ONEBIT, **zero(stage=3)}), "does not run with ZeRO stage 3",
     situation({**ONEBIT, **zero(stage=0)})),
    (rules.optimizer_accepts_the_stage, situation({**optimizer("Lamb"), **zero(stage=1)}), "ZeRO stage 1",
     situation({**optimizer("AdamW"), **zero(stage=3)})),
    (rules.optimizer_runs_here, situation(optimizer("Lamb"), gpus=False), "no CPU implementation",
     situation(optimizer("Lamb"))),
    (rules.optimizer_accepts_the_stage, situation({**optimizer("SGD"), **zero(stage=1)}), "ZeRO stage 1",
     situation({**optimizer("SGD"), **zero(stage=3), "zero_allow_untested_optimizer": True})),
    (rules.optimizer_accepts_the_stage,
     situation({**ONEBIT, **zero(stage=1), "zero_allow_untested_optimizer": True}), "ZeRO stage 1",
     situation(ONEBIT)),
    (rules.optimizer_accepts_the_stage,
     situation({**optimizer("Muon"), **zero(stage=3), "zero_allow_untested_optimizer": True}), "ZeRO stage 3",
     situation({**optimizer("muon"), **zero(stage=2)})),
    *((rules.optimizer_takes_its_params, situation(optimizer(kind, **params)), says, situation(optimizer(kind)))
      for kind, params, says in [
          ("SGD", {"betas": [0.9, 0.95]}, "SGD takes no betas"), ("Lion", {"eps": 1e-8}, "Lion takes no eps"),
          ("Adam", {"betas": [0.9]}, "betas [0.9] are not two numbers"),
          ("Adam", {"betas": [0.9, 1.0]}, "below 1"), ("Adam", {"betas": [-0.1, 0.9]}, "at least 0"),
          ("Adam", {"eps": 0}, "eps is a number above 0, not `0`"), ("Adam", {"weight_decay": -1}, "at least 0"),
          ("Adam", {"lr": "1e-3x"}, "lr is a number"),
      ]),
    *((rules.zero_keys_are_known, situation(zero(**bad), **more), says, situation(zero(**good)))
      for bad, says, good, more in [
          ({"overlap_com": True}, "zero_optimization has no key `overlap_com`", {"overlap_comm": True}, {}),
          ({"stage3_overlap_comm": True}, "no key `stage3_overlap_comm`", {"stage3_prefetch_bucket_size": 1}, {}),
          ({"offload_param": {"devices": "cpu"}}, "offload_param has no key `devices`",
           {"offload_param": {"device": "cpu"}}, {}),
          ({"offload_param": {"ratio": 0.5}}, "no key `ratio`", {"offload_optimizer": {"ratio": 0.5}}, {}),
          ({"compute_grad_norm": False}, "came after DeepSpeed 0.19.6", {"prefetch_bucket_size": 1}, OLD),
      ]),
    *((rules.values_have_their_type, situation(bad), says, situation(good))
      for bad, says, good in [
          ({"gradient_clipping": "1.0"}, "gradient_clipping is a number of at least 0, not `'1.0'`",
           {"gradient_clipping": 1}),
          ({"gradient_clipping": -1}, "not `-1`", {"gradient_clipping": 0.5}),
          ({"gradient_clipping": True}, "not `True`", {"gradient_clipping": "auto"}),  # another rule's
          ({"wall_clock_breakdown": "false"}, "is true or false", {"wall_clock_breakdown": False}),
          (zero(reduce_bucket_size="5e8"), "reduce_bucket_size is a whole number", zero(reduce_bucket_size=5e8)),
          (zero(reduce_bucket_size=1.5), "not `1.5`", zero(reduce_bucket_size=1)),
          (zero(overlap_comm="yes"), "zero_optimization.overlap_comm is true or false", zero(overlap_comm=None)),
          (zero(stage=4), "stage is 0, 1, 2 or 3, not `4`", zero(stage=3)),
          (zero(stage=True), "not `True`", zero(stage=0)),
          (zero(offload_param="cpu"), "offload_param is a section with keys", zero(offload_param=None)),
          (zero(offload_optimizer=True), "offload_optimizer is a section", zero(offload_optimizer={"device": "cpu"})),
          (zero(offload_param={"device": "gpu"}), "device is none, cpu or nvme", zero(offload_param={})),
      ]),
    (rules.sections_are_sections, situation({"optimizer": {"type": "Adam", "params": None}}),
     "optimizer.params is a section with keys, not `None`", situation(optimizer("Adam"))),
    (rules.gradients_have_the_models_type,
     situation({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}), "at stage 0",
     situation({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **zero(stage=1)})),
    *((rules.scheduler_runs, situation({"scheduler": bad}), says, situation({"scheduler": good}))
      for bad, says, good in [
          ({"params": {}}, "ignores it without a word", {"type": "StepLR", "params": {"step_size": 3}}),
          ({"type": "inverse_sqrt"}, "no scheduler `inverse_sqrt`", {"type": "LRRangeTest", "params": {}}),
          ({"type": ["x"]}, "no scheduler `['x']`", {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}),
          ({"type": "WarmupLR"}, "without params is a TypeError", {"type": "WarmupLR", "params": {}}),
          ({"type": "WarmupLR", "params": {"warmup_steps": 5}}, "WarmupLR takes no warmup_steps: a TypeError",
           {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}),
          ({"type": "WarmupCosineLR", "params": {}}, "without total_num_steps",
           {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": 1e-4}}),
          ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}, "takes 0.001, whatever the optimizer's lr",
           {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1}}),
          ({"type": "WarmupLR", "params": {"warmup_max_lr": "1e-3"}}, "is a number, not the text `1e-3`",
           {"type": "WarmupLR", "params": {"warmup_type": "linear"}}),
          ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "of at least 1, not `0`",
           {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}),
      ]),
    (rules.freeze_step_lies_within_the_run, situation(optimizer("OneBitAdam")), "would begin at step 100,000",
     situation(ONEBIT)),
    (rules.freeze_step_lies_within_the_run, situation(optimizer("OneBitAdam", freeze_step=0)), "the loss diverges",
     situation(optimizer("Adam"))),
    (rules.freeze_step_lies_within_the_run, situation(optimizer("ZeroOneAdam", var_freeze_step=1000)), "step 1,000",
     situation(optimizer("ZeroOneAdam", var_freeze_step=999))),
    (rules.precision_is_one, situation({"fp16": {"enabled": True}, "bf16": {"enabled": True}}), "both enabled",
     situation({"fp16": {"enabled": False}, "bf16": {"enabled": True}})),
    (rules.precision_is_one, situation({"fp16": {"enabled": True}}, gpus=False), "fp16 does not run on CPU",
     situation({"fp16": {"enabled": True}})),
    (rules.offload_is_not_ignored, situation(zero(stage=2, offload_param={"device": "cpu"})), "only with ZeRO-3",
     situation(zero(stage=3, offload_param={"device": "cpu"}))),
    (rules.offload_is_not_ignored, situation(zero(stage=0, offload_optimizer={"device": "cpu"})), "only with ZeRO",
     situation(zero(stage=1, offload_optimizer={"device": "cpu"}))),
    (rules.offload_is_not_ignored, situation(zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/x"})),
     "goes to NVMe only with ZeRO-3",
     situation(zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/x"}))),
    (rules.offload_is_not_ignored, situation(zero(stage=3, offload_param={"device": "nvme"})), "needs a directory",
     situation(zero(stage=3, offload_param={"device": "none"}))),
    (rules.pipeline_and_zero, situation(zero(stage=2), pipeline=2), "does not run with ZeRO-2",
     situation(zero(stage=1), pipeline=2)),
    (rules.pipeline_and_zero, situation(ONEBIT, pipeline=2), "does not run with pipeline", situation(ONEBIT)),
    (rules.params_are_known, situation(optimizer("Adam", max_grad_norm=1.0)), "max_grad_norm",
     situation({**optimizer("Adam"), "gradient_clipping": 1.0})),
    (rules.nothing_is_left_auto, situation({"train_batch_size": "auto"}), "train_batch_size is `auto`",
     situation({"train_batch_size": 8})),
    (rules.nothing_is_left_auto, situation(zero(reduce_bucket_size="auto")), "zero_optimization.reduce_bucket_size",
     situation(zero(stage=3))),
    (rules.hpz_divides_the_world, situation(zero(zero_hpz_partition_size=3)), "does not divide the 8 ranks",
     situation(zero(zero_hpz_partition_size=4))),
]  # fmt: skip
NOTES = [
    (rules.freeze_step_lies_within_the_run, situation(ONEBIT, world=1), "nobody to send", situation(ONEBIT)),
    (rules.pipeline_and_zero, situation({"pipeline": {"enabled": True}}), "does nothing",
     situation({"pipeline": {}})),
    (rules.params_are_known, situation({**ONEBIT, "gradient_clipping": 1.0}), "next to no effect",
     situation({**ONEBIT, "gradient_clipping": 0.0})),
    (rules.onebit_resume, situation(ONEBIT), "does not restore", situation(optimizer("ZeroOneAdam"))),
]  # fmt: skip


def _ids(rows: list[tuple[object, ...]]) -> list[str]:
    return [f"{row[0].__name__}-{row[2]}" for row in rows]


@pytest.mark.parametrize(("rule", "bad", "says", "good"), TABLE, ids=_ids(TABLE))
def test_a_rule_refuses_one_config_and_lets_another_pass(rule, bad, says, good):
    assert any(refuses and says in message for refuses, message, _, _ in rule(bad))
    assert not any(refuses for refuses, _, _, _ in rule(good))
    assert all(at[0] == "train" for _, _, _, at in rule(bad))


@pytest.mark.parametrize(("rule", "bad", "says", "good"), NOTES, ids=_ids(NOTES))
def test_a_rule_notes_one_config_and_says_nothing_of_another(rule, bad, says, good):
    assert any(not refuses and says in message for refuses, message, _, _ in rule(bad))
    assert not list(rule(good))


def test_every_rule_has_a_row_here_and_is_in_force():
    tried = {rule for rule, *_ in (*TABLE, *NOTES)}
    assert tried == set(rules.RULES)


Json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(0, 1), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["type", "params", "stage",
        "enabled", "device", "offload_param", "offload_optimizer", "freeze_step"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(rules.TOP_LEVEL)), Json, max_size=5), st.booleans(), st.integers(1, 3))
def test_no_raw_config_breaks_a_rule(config, gpus, pipeline):
    found, notes = rules.judge(situation(config, gpus=gpus, pipeline=pipeline))
    assert all(problem.message for problem in found)
    assert all(notes)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("train_batch_size: 3", "deepspeed.train_batch_size 3 contradicts the plan's"),
        ("gradient_accumulation_steps: 77", "contradicts the plan's"),
        ("zero_optimization: {stage: 2}", "deepspeed.zero_optimization.stage 2 contradicts the plan's 0"),
        ("bf16: {enabled: true}", "deepspeed.bf16.enabled True contradicts the plan's False"),
        ("optimizer: {type: Adam}", "deepspeed.optimizer.type Adam contradicts the plan's AdamW"),
        ("optimizer: Adam", "optimizer is a section with keys"),
        ("zero_optimization: 3", "zero_optimization is a section with keys"),
        ("optimizer: {params: {max_grad_norm: 1}}", "max_grad_norm"),
        ("zero_optimization: {reduce_bucket_size: auto}", "is `auto`"),
        ("optimizer: {params: null}", "optimizer.params is a section with keys, not `None`"),
        ("zero_optimization: {overlap_com: true}", "zero_optimization has no key `overlap_com`"),
        ("scheduler: {type: WarmupLR, params: {warmup_steps: 5}}", "a TypeError on every rank"),
        ("optimizer: {params: {lr: 0.5}}", "deepspeed.optimizer.params.lr 0.5 contradicts train.optimizer.lr 0.0001"),
        ("elasticity: {}", "left DeepSpeed in 0.19.8, and the newest DeepSpeed refuses to start with it"),
    ],
)
def test_raw_keys_are_judged_like_ours(raw, says):
    found = refused(f"train: {{script: a.py, deepspeed: {{{raw}}}}}")
    assert any(says in message for message, _, _ in found), found
    assert all(where.startswith("job.yaml:3:") for _, _, where in found)


def test_raw_keys_are_laid_on_top():
    result = made("train: {script: a.py, zero: 1, deepspeed: {zero_optimization: {round_robin_gradients: true}}}")
    section = result.config["zero_optimization"]
    assert (section["stage"], section["round_robin_gradients"], section["overlap_comm"]) == (1, True, True)


PIN = 'pip install "deepspeed==0.19.6" on the nodes and environment.deepspeed: 0.19.6'


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ("", "OneBitAdam left DeepSpeed in 0.19.7, and the job file does not say which the nodes have"),
        ("environment: {deepspeed: 0.19.8}", "OneBitAdam is not in DeepSpeed 0.19.8: it left in 0.19.7"),
        ("environment: {deepspeed: 0.20.0+cu12}", "OneBitAdam is not in DeepSpeed 0.20.0+cu12"),
    ],
)
def test_onebit_adam_is_refused_where_deepspeed_has_none(environment, says):
    ((message, hint, where),) = refused(
        f"train: {{script: a.py, zero: 0, optimizer: {{type: OneBitAdam, freeze_step: 200}}}}\n{environment}\n"
    )
    assert message.startswith(says)
    assert hint == PIN
    assert where == "job.yaml:3:32"


def test_onebit_adam_runs_with_its_last_deepspeed():
    result = made(
        "train: {script: a.py, optimizer: {type: OneBitAdam, freeze_step: 200}}\n"
        f"environment: {{deepspeed: 0.19.6}}\n{GPUS}",
        model="gpt2",
    )
    assert result.stage == 0
    assert result.config["optimizer"]["params"]["freeze_step"] == 200
    assert result.config["optimizer"]["params"]["comm_backend_name"] == "nccl"
    assert (
        "plain Adam until step 200, then compressed" in {row.name: row.why for row in result.decisions}["optimizer"]
    )


def test_onebit_adam_and_zero_3_do_not_meet():
    found = refused(
        "train: {script: a.py, zero: 3, optimizer: {type: OneBitAdam, freeze_step: 200}}\n"
        "environment: {deepspeed: 0.19.6}\n"
    )
    ((message, hint, where),) = found
    assert message.startswith("OneBitAdam does not run with ZeRO stage 3")
    assert "train.zero: 0 with it, or AdamW with ZeRO" in hint
    assert where == "job.yaml:3:23"


# --- the network -------------------------------------------------------------------------------------------


def variables(text: str) -> nccl.Variables:
    return nccl.variables(spec.load(f"name: demo\nmodel: gpt-demo\n{text}", name="job.yaml").spec)


@pytest.mark.parametrize(
    ("resources", "there", "absent"),
    [
        ("{nodes: 2}", {"DS_ACCELERATOR"}, {"NCCL_DEBUG"}),
        ("{nodes: 1, gpus_per_node: 8}", {"NCCL_DEBUG"}, {"NCCL_IB_HCA", "DS_ACCELERATOR"}),
        ("{nodes: 2, gpus_per_node: 8, fabric: ib}", {"NCCL_DEBUG", "NCCL_IB_HCA"}, {"NCCL_IB_DISABLE"}),
        ("{nodes: 2, gpus_per_node: 8, fabric: tcp}", {"NCCL_IB_DISABLE"}, {"NCCL_IB_HCA"}),
        ("{nodes: 2, gpus_per_node: 8, fabric: aws-efa}", {"NCCL_SOCKET_IFNAME"}, {"NCCL_IB_DISABLE"}),
    ],
)
def test_the_variables_fit_the_network(resources, there, absent):
    names = {row.name for row in variables(f"resources: {resources}").rows}
    assert there <= names
    assert not absent & names


def test_the_users_variable_wins_and_it_is_said():
    found = variables(f"{GPUS}env: {{NCCL_IB_HCA: mlx5_0, NCCL_ALGO: Ring, NCCL_DEBUG: WARN}}")
    rows = {row.name: row for row in found.rows}
    assert (rows["NCCL_IB_HCA"].value, rows["NCCL_IB_HCA"].why) == ("mlx5_0", "from the job file")
    assert found.notes[0].startswith("NCCL_IB_HCA=mlx5_0 from the job file replaces mlx5 (")
    assert found.notes[1].startswith("NCCL_ALGO=Ring: forcing an algorithm")
    assert len(found.notes) == 2


@pytest.mark.parametrize(("value", "problem"), [("31", False), ("32", True), ("9" * 5000, True), ("²", False)])
def test_a_timeout_that_means_for_ever_is_refused(value, problem):
    text = f"{GPUS}env: {{NCCL_IB_TIMEOUT: '{value}'}}"
    if not problem:
        assert variables(text)
        return
    with pytest.raises(UserError, match="means for ever"):
        variables(text)


# --- DeepSpeed itself -----------------------------------------------------------------------------------------


SPREAD = {
    "cpu": ("gpt-demo", "train: {global_batch: 8}\nresources: {nodes: 2, processes_per_node: 2}"),
    "cpu-zero-3": ("gpt-demo", "train: {zero: 3, lr_schedule: {type: cosine, warmup_steps: 5}}"),
    "one-gpu": ("gpt2", "resources: {gpus_per_node: 1, gpu: t4}"),
    "seven": ("llama-7b", "train: {script: a.py, global_batch: 512, lr_schedule: {warmup_steps: 9}}\n" + GPUS),
    "seventy": ("llama-70b", "train: {script: a.py, seq_len: 4096, lr_schedule: {type: linear}}\n" + GPUS),
    "offload": ("llama-13b", "train: {script: a.py, offload: {optimizer: cpu}}\n" + GPUS),
    "nvme": (
        "gpt3-175b",
        "train: {script: a.py, offload: {optimizer: nvme, parameters: nvme, nvme_path: /nvme}}\n" + GPUS,
    ),
    "recompute": ("gpt2-xl", "train: {activation_checkpointing: true, zero: 2, gradient_clipping: 0}\n" + GPUS),
    "params": (
        "gpt2",
        "train: {optimizer: {type: AdamW, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1}}\n" + GPUS,
    ),
    "raw": ("gpt2", "train: {zero: 3, deepspeed: {zero_optimization: {zero_hpz_partition_size: 8}}}\n" + GPUS),
    "lion": ("gpt2", "train: {optimizer: Lion}\n" + GPUS),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", SPREAD)
def test_deepspeed_reads_every_config_we_write(job, monkeypatch):
    config_module = pytest.importorskip("deepspeed.runtime.config")
    from deepspeed.runtime import lr_schedules

    model, text = SPREAD[job]
    result = made(text, model=model)
    fake = type(
        "dist", (), {"get_rank": staticmethod(int), "get_world_size": staticmethod(lambda: result.batch.replicas)}
    )
    monkeypatch.setattr(config_module, "dist", fake)
    read = config_module.DeepSpeedConfig(json.loads(json.dumps(result.config)))  # sections refuse unknown keys
    assert read.train_batch_size == result.batch.total
    assert read.zero_config.stage == result.stage
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (
        result.precision == "bf16",
        result.precision == "fp16",
    )
    if read.scheduler_name:
        import inspect

        signature = inspect.signature(getattr(lr_schedules, read.scheduler_name))
        signature.bind(object(), **read.scheduler_params)


def sources() -> Path:
    import importlib.util

    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("DeepSpeed is not installed")
    return Path(found.origin).parent


def _strings(tree: ast.Module) -> dict[str, str]:
    """Names of the module that stand for text."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def keys_deepspeed_reads() -> set[str]:
    """Text by which some module looks into the whole config: param_dict[KEY], KEY in param_dict, .get(KEY)."""
    folder = sources()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [
        *folder.glob("runtime/*.py"), *folder.glob("runtime/*/config*.py"), *folder.glob("runtime/*/constants.py"),
        *folder.glob("runtime/swap_tensor/*.py"), *folder.glob("*/config.py"), *folder.glob("*/constants.py"),
        *folder.glob("utils/*.py"), *folder.glob("runtime/activation_checkpointing/*.py"),
    ]]  # fmt: skip
    names: dict[str, set[str]] = {}
    for tree in trees:
        for name, text in _strings(tree).items():
            names.setdefault(name, set()).add(text)
    keys: set[str] = set()

    def whole(node: ast.expr) -> bool:
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in ("param_dict", "_param_dict", "config_dict", "monitor_config", "ds_config", "config")

    def text(node: ast.expr) -> set[str]:
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        return names.get(node.id, set()) if isinstance(node, ast.Name) else set()

    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Subscript) and whole(node.value):
            keys |= text(node.slice)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            inside = node.comparators[0]
            inside = inside.func.value if isinstance(inside, ast.Call) and hasattr(inside.func, "value") else inside
            keys |= text(node.left) if whole(inside) else set()
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "get" and isinstance(node.func, ast.Attribute) and whole(node.func.value):
                keys |= text(node.args[0])
            elif called in ("get_scalar_param", "get_list_param", "get_dict_param") and whole(node.args[0]):
                keys |= text(node.args[1])
    return keys


def keys_deepspeed_removed(name: str) -> set[str]:
    tree = ast.parse((sources() / "runtime/config.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return {key.value for key in node.value.keys}
    return set()


def test_the_table_of_keys_is_what_this_deepspeed_reads():
    from importlib.metadata import version

    read = keys_deepspeed_reads()
    looked_for = {"communication_data_type", "seq_parallel_communication_data_type"}  # through a variable
    monitors = {"tensorboard", "wandb", "csv_monitor", "comet"}  # through a loop
    assert rules.TOP_LEVEL - read - looked_for - monitors - set(rules.REMOVED) == set()
    config = ast.parse((sources() / "runtime/config.py").read_text(encoding="utf-8"))
    called = {node.attr for node in ast.walk(config) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(config) if isinstance(node, ast.Name)
    }
    constants = _strings(ast.parse((sources() / "runtime/constants.py").read_text(encoding="utf-8")))
    assert len(called & set(constants)) > 30
    if facts.version(version("deepspeed")) >= (0, 19, 8):
        assert keys_deepspeed_removed("_REMOVED_TOP_LEVEL_CONFIG_KEYS") == set(rules.REMOVED)
        assert keys_deepspeed_removed("_REMOVED_ZERO_CONFIG_KEYS") == set(rules.REMOVED_FROM_ZERO)


def test_a_key_that_deepspeed_reads_at_the_top_is_in_the_table():
    """The calls in DeepSpeedConfig._initialize_params, each with the function behind it."""
    folder = sources()
    config = ast.parse((folder / "runtime/config.py").read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for path in [
        *folder.glob("runtime/**/constants.py"),
        *folder.glob("*/constants.py"),
        folder / "runtime/config.py",
    ]:
        names |= _strings(ast.parse(path.read_text(encoding="utf-8")))
    found: set[str] = set()
    for function in (node for node in ast.walk(config) if isinstance(node, ast.FunctionDef)):
        if not function.name.startswith("get_"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "get_scalar_param":
                section, key = node.args[0], node.args[1]
                if isinstance(section, ast.Name) and section.id == "param_dict" and isinstance(key, ast.Name):
                    found.add(names.get(key.id, ""))
    assume_known = found - {""}
    assert len(assume_known) > 15
    assert assume_known <= rules.TOP_LEVEL


def _class(path: str, name: str) -> ast.ClassDef:
    tree = ast.parse((sources() / path).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _pydantic_keys(path: str, name: str) -> dict[str, str]:
    """Names and aliases of a section's fields, each with its annotation."""
    found = {}
    for node in _class(path, name).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = kind = ast.unparse(node.annotation)
            for word in node.value.keywords if isinstance(node.value, ast.Call) else ():
                if word.arg == "alias":
                    found[word.value.value] = kind
    return found


@pytest.mark.parametrize(
    ("path", "name", "table"),
    [
        ("runtime/zero/config.py", "DeepSpeedZeroConfig", rules.ZERO),
        ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig", rules.OFFLOAD["offload_param"]),
        ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig", rules.OFFLOAD["offload_optimizer"]),
    ],
)
def test_the_keys_of_zero_are_those_of_this_deepspeed(path, name, table):
    found = _pydantic_keys(path, name)
    may_lack = rules.ADDED_TO_ZERO if table is rules.ZERO else set()
    assert set(table) - may_lack <= set(found) <= set(table) | set(rules.REMOVED_FROM_ZERO)
    kinds = {"bool": rules.BOOL, "Optional[bool]": rules.BOOL, "int": rules.WHOLE, "float": rules.NUMBER}
    for key in set(table) & set(found):
        assert kinds.get(found[key], table[key]) == table[key], key


@pytest.mark.parametrize("name", rules.SCHEDULERS)
def test_the_parameters_of_a_scheduler_are_those_of_this_deepspeed(name):
    init = next(n for n in _class("runtime/lr_schedules.py", name).body if getattr(n, "name", "") == "__init__")
    names = [arg.arg for arg in init.args.args[2:]]
    required, optional = (row.split() for row in rules.SCHEDULERS[name])
    assert names[: len(names) - len(init.args.defaults)] == required
    assert sorted(names) == sorted([*required, *optional, "last_batch_iteration"])


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=20))
def test_a_key_nobody_reads_is_refused(key):
    assume(key not in rules.TOP_LEVEL)
    ((refuses, message, _, at),) = rules.keys_are_known(situation({key: 1}))
    assert refuses
    assert key in message
    assert at == ("train", "deepspeed", key)
