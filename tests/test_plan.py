"""The decisions: batch arithmetic, sizes, ZeRO stages, and what DeepSpeed would refuse hours later."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import facts, nccl, plan, spec
from launcher.errors import UserError
from launcher.plan import batch, memory

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


# --- what is chosen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "seq", "resources", "stage", "recompute", "precision"),
    [
        ("gpt-demo", 128, "{nodes: 2, processes_per_node: 2}", 0, "none", "fp32"),
        ("gpt2", 1024, "{nodes: 1, gpus_per_node: 1, gpu: a100}", 0, "none", "bf16"),
        ("gpt2", 1024, "{nodes: 1, gpus_per_node: 1, gpu: v100}", 0, "none", "fp16"),
        ("llama-7b", 2048, "{nodes: 1, gpus_per_node: 8, gpu: h100}", 1, "none", "bf16"),
        ("llama-7b", 2048, "{nodes: 1, gpus_per_node: 8, gpu: h200}", 1, "none", "bf16"),
        ("llama-70b", 2048, "{nodes: 8, gpus_per_node: 8, gpu: h100, fabric: ib}", 3, "full", "bf16"),
        ("llama-70b", 4096, "{nodes: 8, gpus_per_node: 8, gpu: h100, fabric: ib}", 3, "full", "bf16"),
    ],
)
def test_the_simplest_of_the_fast_ways_that_fit_is_chosen(model, seq, resources, stage, recompute, precision):
    result = made(f"train: {{script: a.py, seq_len: {seq}}}\nresources: {resources}\n", model=model)
    assert (result.setup.stage, result.setup.recompute, result.setup.precision) == (stage, recompute, precision)
    assert result.config["zero_optimization"]["stage"] == stage
    if result.estimate:
        assert result.alternatives[0].verdict == "fits"


def test_every_lower_stage_would_not_have_fitted():
    text = "train: {{script: a.py, zero: {stage}, micro_batch: 1}}\n" + GPUS.replace("{", "{{").replace("}", "}}")
    for stage in (0, 1, 2):
        ((message, hint, _),) = refused(text.format(stage=stage), model="llama-70b")
        assert re.match(r"does not fit: needs [0-9,]+ of 80 GiB per GPU with ZeRO-", message)
        assert "zero: 3" in hint
    assert made(text.format(stage=3), model="llama-70b").setup.stage == 3


def test_what_does_not_fit_is_refused_with_the_sizes_and_no_other_complaint():
    resources = "resources: {nodes: 1, gpus_per_node: 1, gpu: t4}\n"
    ((message, hint, where),) = refused(f"train: {{script: a.py}}\n{resources}", model="llama-70b")
    assert re.match(
        r"does not fit: needs [0-9,]+ of 15 GiB per GPU with ZeRO-3, .* \(.*\d+ optimizer states", message
    )
    assert hint
    assert where == "job.yaml:4:1"
    offload = "train: {script: a.py, offload: {optimizer: cpu, parameters: cpu}, micro_batch: 64}\n"
    ((message, hint, _),) = refused(offload + resources, model="gpt3-175b")  # not that stage 0 ignores the offload
    assert message.startswith("does not fit")
    assert "micro_batch: 1" in hint


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
    assert made(f"train: {{script: a.py, {train}}}\n{resources}", model="gpt2").setup.stage == stage


def test_a_micro_batch_is_as_large_as_fits_and_divides():
    result = made("train: {script: a.py, global_batch: 768, seq_len: 1024}\n" + GPUS, model="gpt2")
    assert (result.batch.total, result.batch.replicas) == (768, 64)
    assert result.batch.micro * result.batch.accumulation == 12
    assert result.batch.micro > 1


def test_tensor_and_pipeline_ranks_share_a_replica():
    result = made("train: {script: a.py, micro_batch: 1, parallel: {tensor: 4, pipeline: 2}}\n" + GPUS, model="gpt2")
    assert result.batch.replicas == 8
    found = {message: where for message, _, where in refused("train: {script: a.py, parallel: {tensor: 3}}\n" + GPUS)}
    assert found["tensor 3 x pipeline 1 = 3 does not divide 64 ranks"] == "job.yaml:3:23"
    assert found["tensor 3 does not divide 4 attention heads"] == "job.yaml:3:34"
    two = refused("train: {script: a.py, parallel: {tensor: 3}}\nresources: {nodes: 2}\n")
    assert [message for message, _, _ in two if "train_batch_size" in message] == []  # nobody wrote it


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
    assert re.match(r"does not fit: needs [0-9,]+ of 80 GiB per GPU with ZeRO-\d.*, micro-batch 1024 \(", message)
    assert "gradient_accumulation: " in hint
    assert where == "job.yaml:3:43"
    fits = made(text.replace("accumulation: 1}", "accumulation: 256}"), model="llama-7b")
    assert fits.batch.micro == 4
    assert fits.alternatives[0].verdict == "fits"


@pytest.mark.parametrize(("total", "accumulation"), [(64, 1), (256, 4), (128, 1), (512, 2)])
def test_the_stage_is_chosen_for_the_micro_batch_that_results(total, accumulation):
    result = made(
        f"train: {{script: a.py, global_batch: {total}, gradient_accumulation: {accumulation}}}\n" + ONE % "",
        model="llama-7b",
    )
    assert result.batch.micro == total // accumulation // 8
    assert result.alternatives[0].verdict == "fits"


@pytest.mark.parametrize(
    ("train", "says", "hint"),
    [
        ("optimizer: {freeze_step: 5}", "freeze_step 5 belongs to the 1-bit optimizers, and AdamW is none", "out"),
        ("optimizer: {betas: [0.9]}", "betas [0.9] are not two numbers", "[0.9, 0.999]"),
        ("optimizer: {betas: [0.9, 1]}", "betas [0.9, 1.0] are not two numbers", "[0.9, 0.999]"),
        ("optimizer: {type: SGD, eps: 1e-8}", "SGD takes no eps", "known here: dampening"),
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
    assert made(sgd.format(""), model="gpt2").setup.stage == 0
    ((message, hint, _),) = refused(sgd.format(", zero: 3"), model="gpt2")
    assert message.startswith("SGD does not run with ZeRO stage 3")
    assert "zero_allow_untested_optimizer: true" in hint
    untested = ", zero: 3, deepspeed: {zero_allow_untested_optimizer: true}"
    assert made(sgd.format(untested), model="gpt2").setup.stage == 3


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
    ("offload", "nodes", "least", "size"),
    [
        ("{optimizer: cpu}", 1, 12, "90G"),
        ("{optimizer: cpu}", 2, 6, "50G"),
        ("{optimizer: cpu, parameters: cpu}", 1, 14, "100G"),
    ],
)
def test_what_is_offloaded_has_to_fit_the_hosts(offload, nodes, least, size):
    """At least 12 bytes of states and 2 of weights for each of 6.7e9, over the nodes; buffers come on top."""

    def text(size: str) -> str:
        resources = f"{{nodes: {nodes}, gpus_per_node: 8, gpu: h100, fabric: ib, memory: {size}}}"
        return f"train: {{script: a.py, offload: {offload}}}\nresources: {resources}\n"

    for enough in ("900G", "'0'"):
        need = float(chosen(made(text(enough), model="llama-7b"))["host memory"].split()[0])
        assert need > least * 6.7e9 / 2**30
    ((message, _, place),) = refused(text(size), model="llama-7b")
    assert re.match(rf"does not fit: needs \d+ of {size[:-1]} GiB of host memory per node with ", message)
    assert place.startswith("job.yaml:4:")


@pytest.mark.parametrize(("size", "stage"), [("1000G", 0), ("300G", 1), ("210G", 3)])
def test_on_cpu_the_hosts_memory_decides(size, stage):
    """LLaMA 7B in fp32 on four processes: 16 bytes for each of 6.7e9 on every process are 402 GiB."""
    text = f"train: {{script: a.py}}\nresources: {{processes_per_node: 4, memory: {size}}}\n"
    assert made(text, model="llama-7b").setup.stage == stage
    ((message, hint, place),) = refused(text.replace(size, "64G"), model="llama-7b")
    assert re.match(
        r"does not fit: the model states of 4 processes are \d+ GiB per node, and memory 64G is 64", message
    )
    assert hint.startswith("memory: ")
    assert place == "job.yaml:4:36"


def test_memory_without_a_unit_is_megabytes_and_the_hint_says_so():
    text = "train: {script: a.py}\nresources: {processes_per_node: 4, memory: '500'}\n"
    ((message, hint, _),) = refused(text, model="llama-7b")
    assert message.endswith("and memory 500 is 0.49")
    assert hint == "memory: 500G; without a unit Slurm reads megabytes"
    ((_, hint, _),) = refused(text.replace("'500'", "'4'"), model="llama-7b")
    assert re.match(r"memory: \d+G, or more nodes", hint)  # 4 GiB would not do either


def test_a_goodput_that_is_poor_is_said():
    slow = GPUS.replace("fabric", "storage: 0.1, fabric")
    made_slow = made("train: {script: a.py}\nslurm: {warn_before_end: 40000}\n" + slow, model="llama-70b")
    assert any(re.match(r"only \d+\.\d% of the time would be training that counts", n) for n in made_slow.notes)
    assert not any("only" in note for note in made("train: {script: a.py}\n" + GPUS, model="llama-7b").notes)
    ((message, hint, place),) = refused("train: {script: a.py}\n" + slow, model="llama-70b")
    assert message.startswith("the job is told to save 180 s before its end")
    assert hint.startswith("slurm.warn_before_end: ")
    assert place
    for pods in ({"text": "site: {backend: kubernetes}\n"}, {"backend": "kubernetes"}):  # they have a grace period
        made(pods.pop("text", "") + "train: {script: a.py}\n" + slow, model="llama-70b", **pods)


# --- names no table has -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model", "says", "hint", "where"),
    [
        ("", "lama-7b", "no model preset `lama-7b`", "did you mean `llama-7b`?", "2:1"),
        ("", "gtp2", "no model preset `gtp2`", "did you mean `gpt2`?", "2:1"),
        ("", "zebra", "no model preset `zebra`", "", "2:1"),
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
        ("resources: {nodes: 2, fabric: all}", "gpt-demo", "no fabric `all`", "known here: azure-gb200", "3:23"),
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
        (
            json.dumps({**LLAMA, "model_type": "gpt2", "n_positions": -1, "max_position_embeddings": None}),
            "n_positions: -1 is not between 0 and",
        ),
        (
            json.dumps({**LLAMA, "hidden_size": 64, "num_attention_heads": 400}),
            "hidden 64 is not a multiple of heads",
        ),
        (json.dumps({**LLAMA, "num_key_value_heads": 5}), "heads 32 is not a multiple of kv_heads 5"),
    ],
)
def test_a_config_that_is_none_is_refused(text, says):
    assert says in refused("train: {script: a.py}\n", model="config.json", config_json=text)[0][0]


# --- rules in a plan ----------------------------------------------------------------------------------------


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
        ("", "OneBitAdam left DeepSpeed in 0.19.7, and nobody said which the nodes have"),
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
    assert result.setup.stage == 0
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


@pytest.mark.parametrize(("value", "problem"), [("31", False), ("32", True), ("9" * 5000, True)])
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
    assert read.zero_config.stage == result.setup.stage
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (
        result.setup.precision == "bf16",
        result.setup.precision == "fp16",
    )
    if read.scheduler_name:
        import inspect

        signature = inspect.signature(getattr(lr_schedules, read.scheduler_name))
        signature.bind(object(), **read.scheduler_params)
