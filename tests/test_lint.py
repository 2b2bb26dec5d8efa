"""dslaunch lint: what is found, where, what --fix makes of it, and that no text at all makes a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import bundle, facts, jsondoc, lint, sarif
from launcher.errors import UserError
from launcher.plan import advice, memory, rules

JOB = "name: demo\nmodel: gpt-demo\n"


def known(**said):
    """What an example says is given, by the names of lint's options."""
    said = dict(said)
    names = said.pop("checkpoint", None)
    return lint.Known(
        nodes=said.pop("nodes", None),
        gpus_per_node=said.pop("gpus", None),
        model=facts.model(said.pop("model")) if "model" in said else None,
        gpu=facts.gpu(said.pop("gpu")) if "gpu" in said else None,
        seq_len=said.pop("seq-len", advice.SEQ_LEN),
        deepspeed=str(said.pop("deepspeed", "")),
        saved=advice.saved("DIR", names.split(), latest="step100") if names else None,
        **said,
    )


def as_text(config):
    return config if isinstance(config, str) else json.dumps(config, indent=2) + "\n"


def found(config, **said):
    return [result.rule for result in lint.lint(as_text(config), name="ds.json", known=known(**said)).results]


# --- the examples are the test ------------------------------------------------------------------------

EXAMPLES = lint.examples()
# needs a size that lies in the estimate's band, an empty folder, or a job file: each has a test of its own
ELSEWHERE = {"DSL123", "DSL183", "DSL198", "DSL199"}


@pytest.mark.parametrize("rule", EXAMPLES)
def test_the_bad_example_has_the_fault_and_the_good_one_has_not(rule):
    example = EXAMPLES[rule]
    said = example.get("given", {})
    assert rule in found(example["bad"], **said)
    assert rule not in found(example["good"], **said)


def test_every_piece_of_advice_has_an_example():
    own = set(advice.rows()) - set(rules.rows())
    assert own - set(EXAMPLES) == ELSEWHERE
    assert set(EXAMPLES) <= set(advice.rows())


@pytest.mark.parametrize("rule", sorted(set(EXAMPLES) & set(rules.rows())))
def test_the_good_example_of_a_rule_is_without_error(rule):
    example = EXAMPLES[rule]
    bad = [r for r in found(example["good"], **example.get("given", {})) if advice.rows()[r].severity == "error"]
    assert bad in ([], ["DSL021"])  # the 1-bit optimizers need a DeepSpeed that is old enough


@pytest.mark.parametrize("rule", EXAMPLES)
def test_fixing_twice_is_fixing_once_and_mends_what_it_says(rule):
    example = EXAMPLES[rule]
    text, said = as_text(example["bad"]), known(**example.get("given", {}))
    before = lint.lint(text, name="ds.json", known=said)
    once = lint.fix(text, name="ds.json", known=said)
    assert not any(result.fixable for result in once.report.results)
    assert bool(once.changes) == any(result.fixable for result in before.results)
    again = lint.fix(once.text, name="ds.json", known=said)
    assert (again.text, again.changes) == (once.text, ())


def test_advice_is_never_an_error_but_for_what_cannot_work():
    errors = {id for id, row in advice.rows().items() if row.severity == "error" and id >= "DSL120"}
    assert errors == {
        *("DSL170", "DSL180", "DSL181", "DSL182"),
        *("DSL190", "DSL191", "DSL193", "DSL194", "DSL195", "DSL196", "DSL198"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("row", [advice.rows()[id] for id in sorted(set(advice.rows()) - set(rules.rows()))])
def test_a_row_is_complete(row):
    assert row.id in lint.explained(row)
    assert all([row.name, row.title, row.why, row.fix, row.source])
    assert re.fullmatch(r"[a-z0-9-]+", row.name)


def test_names_of_rows_are_theirs_alone():
    names = [row.name for row in advice.rows().values()]
    assert len(set(names)) == len(names)


# --- files as people have them --------------------------------------------------------------------------

BIG = """\
{
    "train_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "fp16": {"enabled": true, "loss_scale_window": 100},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "offload_param": {"device": "cpu", "pin_memory": true},
        "overlap_comm": true,
        "contiguous_gradients": true,
        "reduce_bucket_size": 5e7,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5
    },
    "gradient_clipping": 1.0,
    "activation_checkpointing": {
        "partition_activations": true,
        "cpu_checkpointing": true,
        "contiguous_memory_optimization": true
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.01}
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 100, "total_num_steps": 10000}
    }
}
"""
HUGGING_FACE = """\
{
  "bf16": {"enabled": "auto"},
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
  },
  "scheduler": {
    "type": "WarmupDecayLR",
    "params": {
      "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"
    }
  },
  "zero_optimization": {
    "stage": 3,
    "overlap_comm": true,
    "contiguous_gradients": true,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_gather_16bit_weights_on_model_save": true
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": false
}
"""
STAGE1 = """\
{
  "train_batch_size": 64,
  "train_micro_batch_size_per_gpu": 4,
  "steps_per_print": 100,
  "optimizer": {"type": "Adam", "params": {"lr": 0.0003, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 1000}},
  "gradient_clipping": 1.0,
  "fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1},
  "zero_optimization": {"stage": 1, "overlap_comm": true}
}
"""
CPU = {"device": "cpu"}
ON = '"fp16": {"enabled": true}'
PLACES = [
    ("big", BIG, {}, "17:9 DSL152, 19:9 DSL150, 27:9 DSL046, 16:5 DSL153"),
    (
        "big on one node",
        BIG,
        {"model": "llama-3.1-8b", "gpus": 8, "gpu": "h100-80gb"},
        "4:5 DSL131, 6:9 DSL120, 7:9 DSL121, 8:9 DSL121, 16:5 DSL153, 17:9 DSL152, 19:9 DSL150, 27:9 DSL046",
    ),
    ("hugging face", HUGGING_FACE, {}, ""),
    ("stage 1", STAGE1, {"nodes": 2, "gpus": 8}, "5:17 DSL136"),
    ("tabs", "{\n\t" + ON + ',\n\t"zero_optimization": {\n\t\t"stag": 1\n\t}\n}', {}, "4:3 DSL002"),
    ("crlf", '{\r\n  "train_batch_size": 8,\r\n  "wall_clock_breakdown": true,\r\n  ' + ON + "}", {}, "3:3 DSL155"),
    ("byte order mark", '\ufeff{"train_batch_size": 8, ' + ON + ', "fp61": 1}', {}, "1:1 DSL192, 1:52 DSL001"),
    ("empty", "", {}, "1:1 DSL190"),
    ("blank", " \n\n", {}, "3:1 DSL190"),
    ("a list", "[1, 2]", {}, "1:1 DSL196"),
    ("a number", "3", {}, "1:1 DSL196"),
    ("nothing in it", "{}", {}, "1:1 DSL196"),
    ("unclosed", '{"train_batch_size": 8,\n "fp16": {', {}, "2:11 DSL190"),
    ("two documents", '{"train_batch_size": 8}\n{}', {}, "2:1 DSL190"),
    ("a missing comma", '{\n"train_batch_size": 8\n"fp16": {}}', {}, "3:1 DSL190"),
    ("bare text", '{"train_batch_size": 8, "zero_optimization": {"stage": two}}', {}, "1:56 DSL190"),
    ("twice", "{" + ON + ',\n "train_batch_size": 8, "train_batch_size": 8}', {}, "2:25 DSL191"),
    ("infinite", '{"train_batch_size": 1e999, ' + ON + "}", {}, "1:22 DSL195"),
    ("long", '{"train_batch_size": ' + "9" * 5000 + ", " + ON + "}", {}, "1:22 DSL195"),
    ("deep", '{"a":' * 100 + "1" + "}" * 100, {}, "1:326 DSL190"),
    ("python", '{"train_batch_size": 8, "bf16": {"enabled": True}}', {}, "1:45 DSL194"),
]


@pytest.mark.parametrize(("text", "said", "places"), [row[1:] for row in PLACES], ids=[row[0] for row in PLACES])
def test_results_stand_where_the_key_stands(text, said, places):
    report = lint.lint(text, name="ds.json", known=known(**said))
    places_found = {f"{result.line}:{result.column} {result.rule}" for result in report.results}
    wanted = set(filter(None, places.split(", ")))
    assert wanted <= places_found, [result.message for result in report.results]
    assert not {place for place in places_found - wanted if place[-6:] >= "DSL120"}


def test_places_and_values_are_those_of_json():
    document = jsondoc.parse(BIG)
    assert document.value == json.loads(BIG)
    assert document.place(document.span(("zero_optimization", "offload_param", "device"))[0]) == (8, 27)
    assert document.place(document.span(("optimizer", "params", "betas", 1))[0]) == (23, 47)
    assert document.place(document.span(("zero_optimization", "nothing"))[0]) == (5, 5)


LAX = [
    '{"a": 1, // c\n "b": 5e8 # d\n}',
    '{"a": 1 /* c */, "b": 2,}',
    "{a: 1, 'b': 'x\\'y'}",
    '{"a": [1, 2,], "b": {}}',
    '{"a": 1E5, "b": -0.5}',
    '\ufeff{"a": "x"}',
]


@pytest.mark.parametrize("text", LAX)
def test_what_deepspeeds_reader_takes_is_read_the_same(text):
    hjson = pytest.importorskip("hjson")
    document = jsondoc.parse(text)
    assert document.value == hjson.loads(text)
    assert {slip.kind for slip in document.slips} <= {"lax"}


NOT_EVEN_LAX = [
    *('{"a": True}', '{"a": 01}', '{"a": .5}', '{"a": +1}', '{"a": 1.}', '{"a": 1e999}', '{"a": NaN}'),
    *('{"a": "x\ty"}', '{"a": "\\x"}', '{"a": 1 "b": 2}', '{"a": auto}', '{"a": 1} x', '{"a": 1,, "b": 2}'),
]


@pytest.mark.parametrize("text", NOT_EVEN_LAX)
def test_what_deepspeeds_reader_does_not_take_is_an_error(text):
    hjson = pytest.importorskip("hjson")
    rules_found = {lint.SLIPS[slip.kind][0] for slip in jsondoc.parse(text).slips}
    assert {advice.rows()[rule].severity for rule in rules_found} == {"error"}
    with pytest.raises((hjson.HjsonDecodeError, OverflowError)):
        hjson.loads(text)


FILES = [
    '{"train_batch_size": 1}',
    '{"train_batch_size": 1, "train_batch_size": 2}',
    '{"train_batch_size": 1, "bf16": {"enabled": true, "enabled": false}}',
    '{"train_batch_size": 1, // one\n bf16: {"enabled": true,},}',
    '\ufeff{"train_batch_size": 1}',
    '{"train_batch_size": 01}',
    '{"train_batch_size": 1e999}',
    '{"train_batch_size": 1 "steps_per_print": 5}',
    '{"train_batch_size": 1, "bf16": {"enabled": True}}',
    "",
]
RECOMPUTING = [
    {"partition_activations": True, "contiguous_memory_optimization": True},
    {"contiguous_memory_optimization": True, "number_checkpoints": 4},
    {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 4},
    {"cpu_checkpointing": True},
]
ASK_DEEPSPEED = """
import json, pathlib, sys, torch, deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.comm.init_distributed("gloo")
asked, answers = json.load(sys.stdin), []
def refused(ask):
    try:
        ask()
    except Exception as error:
        return type(error).__name__
    return ""
for text in asked["files"]:
    pathlib.Path("ds.json").write_text(text, encoding="utf-8")
    answers.append(refused(lambda: DeepSpeedConfig("ds.json")))
for section in asked["sections"]:
    config = {"train_batch_size": 1, "activation_checkpointing": section}
    answers.append(refused(lambda: deepspeed.checkpointing.configure(None, config)))
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_deepspeed_refuses_the_files_and_sections_that_lint_names(tmp_path):
    pytest.importorskip("deepspeed")
    asked = json.dumps({"files": FILES, "sections": RECOMPUTING})
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_DEEPSPEED],
        input=asked,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **ranks},
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    for text, answer in zip(FILES, answers, strict=False):
        errors = [rule for rule in found(text) if "DSL190" <= rule < "DSL196" and rule != "DSL192"]
        assert bool(errors) == bool(answer), (text, answer)
    for section, answer in zip(RECOMPUTING, answers[len(FILES) :], strict=True):
        assert ("DSL150" in found({"train_batch_size": 1, "activation_checkpointing": section})) == bool(answer)


# --- who reads it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "errors"),
    [("auto", set()), ("hf", set()), ("plain", {"DSL008", "DSL011"})],
)
def test_auto_is_for_hugging_face(trainer, errors):
    report = lint.lint(HUGGING_FACE, name="ds.json", known=lint.Known(trainer=trainer))
    assert {result.rule for result in report.results if result.severity == "error"} == errors


@pytest.mark.parametrize(
    "section",
    [
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"autotuning": {"metric": "auto"}},
        {"zero_optimization": {"stage": 2, "zenflow": {"select_strategy": "auto"}}},
    ],
)
def test_deepspeeds_own_auto_is_no_sign_of_hugging_face(section):
    config = {"train_batch_size": 8, "bf16": {"enabled": True}, **section}
    assert lint.lint(json.dumps(config), name="ds.json").kind == "DeepSpeed config"
    config["gradient_clipping"] = "auto"
    assert lint.lint(json.dumps(config), name="ds.json").kind == "DeepSpeed config for Hugging Face"


@pytest.mark.parametrize(
    ("sections", "trainer", "said"),
    [
        ({}, "plain", True),
        ({}, "hf", False),  # Accelerate adds the section that TrainingArguments ask for
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "hf", False),
        ({"bf16": {"enabled": False}}, "hf", True),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "plain", False),
    ],
)
def test_who_decides_on_the_precision(sections, trainer, said):
    assert ("DSL130" in found({"train_batch_size": 8, **sections}, trainer=trainer)) is said


@pytest.mark.parametrize(("trainer", "says"), [("plain", "in the program"), ("hf", "TrainingArguments")])
def test_activation_checkpointing_is_switched_on_elsewhere(trainer, says):
    text = '{"train_batch_size": 8, "gradient_checkpointing": true}'
    report = lint.lint(text, name="ds.json", known=lint.Known(trainer=trainer))
    assert says in next(result.fix for result in report.results if result.rule == "DSL001")


def test_comments_are_deepspeeds_and_not_hugging_faces():
    text = '{"train_batch_size": 8, // eight\n "gradient_clipping": 1.0, "bf16": {"enabled": true}}'
    assert found(text) == ["DSL192"]
    assert "DSL193" in found(text, trainer="hf")


OTHERS = [
    ("config.json", '{"model_type": "llama", "hidden_size": 4096}', "--model"),
    ("a.json", '{"compute_environment": "LOCAL_MACHINE"}', "deepspeed_config_file"),
    ("b.json", '{"train_batch_sise": 8}', "train_batch_size"),
    ("accelerate.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n", "deepspeed_config_file"),
    ("ds.yaml", "train_batch_size: 8\nzero_optimization:\n  stage: 2\n", "JSON"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "says"), OTHERS, ids=[row[0] for row in OTHERS])
def test_another_tools_file_is_named(name, text, says, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    done = dslaunch("lint", path)
    assert (done.returncode, "DSL196" in done.stdout, says in done.stdout) == (1, True, True)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("x.json", "name: demo", "deepspeed"),
        ("x.yaml", "{}", "job"),
        ("<stdin>", "  // first\n {", "deepspeed"),
        ("<stdin>", "# first\nname: demo", "job"),
        ("<stdin>", "\ufeff{}", "deepspeed"),
        ("x", "", "deepspeed"),
    ],
)
def test_what_a_file_is(name, text, kind):
    assert lint.kind(text, name=name) == kind


# --- mending ---------------------------------------------------------------------------------------------

DELETED = [
    ('{\n  "a": 1,\n  "b": 2\n}', "a", '{\n  "b": 2\n}'),
    ('{\n  "a": 1,\n  "b": 2\n}', "b", '{\n  "a": 1\n}'),
    ('{"a": 1, "b": 2}', "a", '{"b": 2}'),
    ('{"a": 1, "b": 2}', "b", '{"a": 1}'),
    ('{"a": 1}', "a", "{}"),
    ('{\r\n\t"a": {\r\n\t\t"x": 1\r\n\t},\r\n\t"b": 2\r\n}', "a", '{\r\n\t"b": 2\r\n}'),
    ('{\n  "a": 1, // one\n  "b": 2 // two\n}', "b", '{\n  "a": 1 // one\n // two\n}'),
]


@pytest.mark.parametrize(("text", "key", "left"), DELETED)
def test_a_key_goes_with_its_comma(text, key, left):
    assert jsondoc.without(text, (key,)) == left
    assert jsondoc.without(text, ("c",)) == text


ADDED = [
    ("{}", ("a",), 1, '{\n  "a": 1\n}'),
    ('{"a": 1}', ("b",), True, '{"a": 1, "b": true}'),
    ('{"a": 1}', ("a",), None, '{"a": null}'),
    ('{\n    "a": 1\n}', ("b", "c"), 2, '{\n    "a": 1,\n    "b": {\n        "c": 2\n    }\n}'),
    ('{\r\n\t"a": {\r\n\t}\r\n}', ("a", "b"), 2, '{\r\n\t"a": {\r\n\t\t"b": 2\r\n\t}\r\n}'),
    ('{\n  "a": 1 // one\n}', ("b",), 2, '{\n  "a": 1, // one\n  "b": 2\n}'),
    ('{\n  "a": 3,\n}', ("b",), 2, '{\n  "a": 3,\n  "b": 2\n}'),
    ('{"a": 3}', ("a", "b"), 2, '{"a": {"b": 2}}'),
]


@pytest.mark.parametrize(("text", "path", "value", "after"), ADDED)
def test_a_value_goes_where_it_belongs(text, path, value, after):
    assert jsondoc.with_value(text, path, value) == after


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | FINITE | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
INDENTS = st.sampled_from([None, 2, 4, "\t"])


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=5), INDENTS, st.text(max_size=4), JSON, st.booleans())
@settings(max_examples=200, deadline=None)
def test_changing_text_is_changing_the_value(config, indent, key, value, windows):
    text = json.dumps(config, indent=indent, ensure_ascii=False)
    text = text.replace("\n", "\r\n") if windows else text
    assert jsondoc.parse(text).value == config
    assert not jsondoc.parse(text).slips
    assert json.loads(jsondoc.with_value(text, (key,), value)) == {**config, key: value}
    rest = {name: child for name, child in config.items() if name != key}
    assert json.loads(jsondoc.without(text, (key,))) == rest
    for name in config:
        left = json.loads(jsondoc.without(text, (name,)))
        assert (name in left, list(left)) == (False, [other for other in config if other != name])


def test_fix_keeps_order_indentation_and_what_is_not_its_business():
    zero = (
        '{\n\t"zero_optimization": {\n\t\t"stage": 2,\n\t\t"offload_param": {\n\t\t\t"device": "cpu"\n\t\t}\n\t},\n\t'
    )
    text = zero + '"train_batch_size": 8,\n\t"bf16": {"enabled": true},\n\t"steps_per_pint": 5\n}\n'
    fixed = lint.fix(text, name="ds.json")
    assert fixed.text == (
        '{\n\t"zero_optimization": {\n\t\t"stage": 2\n\t},\n\t"train_batch_size": 8,\n\t'
        '"bf16": {"enabled": true},\n\t"steps_per_print": 5\n}\n'
    )
    assert fixed.changes == (
        "DSL001 steps_per_pint is now steps_per_print",
        "DSL061 zero_optimization.offload_param taken out",
    )
    assert not fixed.report.count("error")


def test_fix_makes_json_of_what_hugging_face_cannot_read():
    text = "{\n  // sizes\n  'train_batch_size': 'auto', # all\n  bf16: {\"enabled\": True,},\n}\n"
    fixed = lint.fix(text, name="ds.json")
    assert fixed.text == '{\n  "train_batch_size": "auto",\n  "bf16": {"enabled": true}\n}\n'
    assert json.loads(fixed.text) == {"train_batch_size": "auto", "bf16": {"enabled": True}}


def test_fix_writes_what_a_file_can_hold():
    fixed = lint.fix("{'train_batch_size': 'auto', 'ü': '\\ud800'}", name="ds.json")
    assert fixed.text.encode() == '{"train_batch_size": "auto", "ü": "\\ud800"}'.encode()
    text = "{'optimizer': {'type': 'AdamW\\ud800'}, 'train_batch_size': 'auto'}"
    assert b"\\ud800" in lint.fix(text, name="ds.json").text.encode()


def test_fix_leaves_the_comments_of_a_file_that_deepspeed_reads():
    text = '{\n  "train_batch_size": 8, // eight\n  "bf16": {"enabled": true},\n  "steps_per_pint": 5\n}\n'
    assert lint.fix(text, name="ds.json").text == text.replace("pint", "print")


NOT_TOUCHED = [
    {"learning_rate": 1e-4},  # nobody knows where it should go
    {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-4}}},
    {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": "1.0"}}},
    {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 2.0}}, "gradient_clipping": 1.0},
    {"optimizer": {"type": "AdamW", "lr": 1e-4, "params": {"lr": 1e-5}}},
    {"optimizer": {"type": "SGD", "params": {"lr": 1}}, "zero_optimization": {"stage": 1}},
    {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},  # the stage may be what was forgotten
    {"zero_optimization": {"offload_param": {"device": "cpu"}, "sub_group_size": 1000, "zero_hpz_partition_size": 8}},
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_sise": 5, "prefetch_bucket_size": 6}},
    {"zero_optimization": {"stage": 2, "cpu_ofload": False, "offload_optimizer": {"device": "cpu"}}},
    {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 0, "stage3_prefetch_bucket_size": 6}},
    {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "offload_param": {"device": "cpu", "pin_memory": False},
        }
    },
    {"zero_optimization": True},
    {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "fp16": {"enabled": True, "loss_scale": 128}},
    {"fp16": {"enabled": True}, "fp16x": {"enabled": False}},
    {"stage": 3, "zero_optimization": {"stage": 2}},
]


@pytest.mark.parametrize("config", NOT_TOUCHED, ids=json.dumps)
def test_fix_leaves_what_is_the_readers_to_decide(config):
    text = as_text({"train_batch_size": 8, **config})
    report = lint.lint(text, name="ds.json")
    assert report.count("error") + report.count("warning")
    assert not any(result.fixable for result in report.results)
    assert lint.fix(text, name="ds.json").text == text


MOVED = [
    ({"optimizer": {"type": "AdamW", "lr": 1e-4}}, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}),
    (
        {"stage": 3, "offload_param": {"device": "cpu"}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ),
    ({"bf16": {"enable": True}}, {"bf16": {"enabled": True}}),
    (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 0.5}}},
        {"optimizer": {"type": "AdamW", "params": {}}, "gradient_clipping": 0.5},
    ),
    (
        {"zero_optimization": {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    ),
    ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, {"zero_optimization": {"stage": 0}}),
    ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, {"zero_optimization": {"stage": 2}}),
]


@pytest.mark.parametrize(("before", "after"), MOVED)
def test_fix_puts_a_value_where_it_belongs(before, after):
    fixed = lint.fix(as_text({"train_batch_size": 8, **before}), name="ds.json")
    assert json.loads(fixed.text) == {"train_batch_size": 8, **after}


def test_a_stage_that_hugging_face_decides_is_any_stage():
    section = {"offload_param": CPU, "offload_optimizer": CPU, "sub_group_size": 1000, "cpu_offload": False}
    text = as_text({"train_batch_size": "auto", "zero_optimization": {"stage": "auto", **section}})
    assert "DSL061" not in found(text)
    assert "DSL062" not in found(text)
    assert "DSL013" in found(text)  # at every stage
    fixed = json.loads(lint.fix(text, name="ds.json").text)["zero_optimization"]
    assert fixed == {"stage": "auto", "offload_param": CPU, "offload_optimizer": CPU, "sub_group_size": 1000}


@pytest.mark.parametrize(
    "section", [{}, {"offload_optimizer": None}, {"offload_param": "x"}, {"offload_param": True}]
)
@pytest.mark.parametrize("stage", [2, 3, "auto"])
def test_the_old_names_of_offload_are_read(section, stage):
    text = as_text(
        {
            "train_batch_size": 8,
            "zero_optimization": {"stage": stage, "cpu_offload": True, "cpu_offload_param": True, **section},
        }
    )
    assert ("DSL013" in found(text)) is bool(section)


def test_whole_numbers_are_whole_in_a_file():
    """hjson makes 4 of 4.0, and json, which Hugging Face reads with, does not."""
    schedule = '"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1e1}}'
    plain = '{"train_batch_size": 4.0, "train_micro_batch_size_per_gpu": 2e0, ' + schedule + "}"
    assert not {"DSL007", "DSL047"} & set(found(plain, trainer="plain"))
    assert {"DSL007", "DSL047"} <= set(found(plain, trainer="hf"))
    assert "DSL007" in found('{"train_batch_size": 1e10}')


def test_text_that_counts_as_true_counts_for_the_estimate():
    said = {"model": "llama-7b", "gpus": 8, "gpu": "a100-40gb"}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": "3"}, "bf16": {"enabled": "true"}}
    written = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    assert [rule for rule in found(config, **said) if rule != "DSL012"] == found(written, **said)


def test_a_note_is_not_mended():
    text = json.dumps({**config(2, overlap_comm=False), "train_batch_size": 8, "gradient_clipping": 1.0})
    assert found(text) == ["DSL141"]
    assert lint.fix(text, name="ds.json").text == text


# --- what fits -----------------------------------------------------------------------------------------


def config(stage=0, micro=1, **zero):
    return {
        "train_micro_batch_size_per_gpu": micro,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "overlap_comm": True, **zero},
    }


def case(config, **said):
    said = known(**said)
    situation = rules.Situation(
        config=config, world=said.world, per_node=said.gpus_per_node, shape=said.model.shape, gpu=said.gpu
    )
    return advice.Case(situation, said.model.name, said.seq_len)


def test_the_setup_is_what_the_config_says():
    asked = config(
        3, 4, offload_optimizer={"device": "nvme"}, reduce_bucket_size=5e7, stage3_prefetch_bucket_size=1e7
    )
    made = advice.setup(
        case({**asked, "gradient_accumulation_steps": 2}, model="llama-7b", nodes=2, gpus=8, gpu="a100")
    )
    assert (made.world, made.per_node, made.micro, made.accumulation, made.stage) == (16, 8, 4, 2, 3)
    assert (made.offload_optimizer, made.offload_parameters, made.precision) == ("nvme", "none", "bf16")
    assert (made.reduce_bucket, made.prefetch_bucket, made.overlap) == (50_000_000, 10_000_000, True)
    assert (made.allgather_bucket, made.persistence, made.communication) == (500_000_000, 100_000, "")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"data_types": {"grad_accum_dtype": "bfloat16"}}, {"gradient": "bf16"}),
        ({"communication_data_type": "FP32"}, {"communication": "fp32"}),
        ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 7, "param_persistence_threshold": 9.0}},
         {"prefetch_bucket": 7, "persistence": 9}),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": float("inf"), "zero_hpz_partition_size": 0}},
         {"reduce_bucket": 500_000_000, "hpz": 1}),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -1, "zero_hpz_partition_size": 3}},
         {"reduce_bucket": 500_000_000, "hpz": 1}),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}, "cpu_offload": True}},
         {"offload_parameters": "none", "offload_optimizer": "cpu", "overlap": False}),
    ],
)  # fmt: skip
def test_what_a_config_says_of_types_and_sizes_counts(said, wanted):
    made = advice.setup(case({**config(3), **said}, model="llama-7b", gpus=8, gpu="a100"))
    assert {field: getattr(made, field) for field in wanted} == wanted


@pytest.mark.parametrize(
    ("numbers", "batch"),
    [
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, (4, 2)),
        ({"train_batch_size": 64}, (8, 1)),
        ({"train_micro_batch_size_per_gpu": 4, "train_batch_size": 64}, (4, 2)),
        ({"train_micro_batch_size_per_gpu": "auto"}, (None, 1)),
        ({"gradient_accumulation_steps": 8}, (None, 8)),
        ({}, (None, 1)),
    ],
)
def test_the_batch_is_deepspeeds(numbers, batch):
    assert advice.batch(rules.Situation(config=numbers, world=8)) == batch


def test_what_is_advised_can_be_done_all_at_once():
    """Offload that is said to be without need is not what a lower stage counts on."""
    asked = config(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    for model in ("gpt2", "llama-7b", "llama-13b", "gpt-neox-20b", "llama-70b"):
        found = advice.judge(case(asked, model=model, gpus=8, gpu="a100-80gb"))
        fixes = [finding.fix for finding in found if finding.rule in ("DSL120", "DSL121")]
        stage = next((int(fix[-1]) for fix in fixes if "stage" in fix), 3)
        left = {
            key: {"device": "cpu"} for key in ("offload_optimizer", "offload_param") if key not in " ".join(fixes)
        }
        if stage < 3:
            left.pop("offload_param", None)
        again = advice.judge(case(config(stage, **left), model=model, gpus=8, gpu="a100-80gb"))
        assert not {finding.rule for finding in again} & {"DSL122", "DSL123"}, (model, fixes)


def test_the_numbers_in_the_advice_are_the_estimates():
    asked = case(config(3), model="gpt2", gpus=8, gpu="a100-80gb")
    lower = advice.setup(case(config(1), model="gpt2", gpus=8, gpu="a100-80gb"))
    message = next(finding.message for finding in advice.judge(asked) if finding.rule == "DSL120")
    assert (
        f"fits at ZeRO-1 with {memory.estimate(lower).total:.0f} of 80 GiB (micro-batch 1, 2,048 tokens)" in message
    )
    assert "ZeRO-3 sends 3 times its parameters per step, ZeRO-1 2" in message


def test_what_is_proposed_fits():
    large = case(config(1, 8), model="llama-13b", nodes=1, gpus=8, gpu="a100-40gb")
    finding = next(finding for finding in advice.judge(large) if finding.rule == "DSL122")
    stage = re.search(r"zero_optimization.stage: ([23])", finding.fix)
    micro = re.search(r"train_micro_batch_size_per_gpu: 1", finding.fix)
    assert stage or micro or "offload" in finding.fix
    offload = {"offload_optimizer": {"device": "cpu"}} if "offload_optimizer" in finding.fix else {}
    parameters = {"offload_param": {"device": "cpu"}} if "offload_param" in finding.fix else {}
    better = config(int(stage[1]) if stage else 1, 1 if micro else 8, **offload, **parameters)
    again = case(better, model="llama-13b", nodes=1, gpus=8, gpu="a100-40gb")
    assert "DSL122" not in {finding.rule for finding in advice.judge(again)}


def test_a_size_within_the_estimates_error_is_tight():
    verdicts = {}
    for seq_len in range(2048, 200_000, 2048):
        asked = case(config(3), model="llama-7b", gpus=8, gpu="a100-40gb", **{"seq-len": seq_len})
        verdict = memory.verdict(memory.estimate(advice.setup(asked, recompute="full")), asked.situation.gpu)
        verdicts.setdefault(verdict, asked)
        if len(verdicts) == 3:
            break
    ids = {verdict: {finding.rule for finding in advice.judge(asked)} for verdict, asked in verdicts.items()}
    assert "DSL123" in ids["tight"]
    assert "DSL122" in ids["does not fit"]
    assert not ids["fits"] & {"DSL122", "DSL123"}


def test_nothing_is_said_about_memory_that_nobody_can_know():
    memory_rules = {f"DSL12{digit}" for digit in range(6)}
    for said in ({"model": "gpt2"}, {"model": "gpt2", "gpus": 8}, {"gpu": "a100", "gpus": 8}):
        assert not memory_rules & set(found(config(3), **said))


# --- checkpoints ------------------------------------------------------------------------------------------

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
SAVED = [
    (["s/" + MODEL], (0,), None, None),
    (["s/" + MODEL, *("s/" + OPTIMIZER.format(i) for i in range(4))], (1, 2), 4, False),
    (["s/" + MODEL, *("s/bf16_" + OPTIMIZER.format(i) for i in range(2))], (1, 2), 2, True),
    (
        [f"s/zero_pp_rank_{i}_{MODEL}" for i in range(2)] + ["s/" + OPTIMIZER.format(i) for i in range(2)],
        (3,),
        2,
        False,
    ),
    (["s/readme.txt", "pytorch_model.bin"], (), None, None),
]


@pytest.mark.parametrize(("names", "stages", "ranks", "bf16"), SAVED)
def test_a_checkpoint_is_known_by_its_names(names, stages, ranks, bf16):
    saved = advice.saved("ckpt", names, latest="s")
    assert (saved.stages, saved.ranks, saved.bf16) == (stages, ranks, bf16)


def test_latest_names_the_tag_and_without_it_the_highest_counts():
    names = [f"global_step{step}/{MODEL}" for step in (900, 1000)]
    assert advice.saved("ckpt", names, latest="global_step900\n").tag == "global_step900"
    without = advice.saved("ckpt", names)
    assert (without.tag, without.latest) == ("global_step1000", False)


LOADS = [
    (0, {}, {"stages": (0,)}, []),
    (1, {}, {"stages": (1, 2), "ranks": 8, "bf16": False}, []),
    (2, {}, {"stages": (1, 2), "ranks": 8, "bf16": False}, []),
    (3, {}, {"stages": (1, 2), "ranks": 8}, ["DSL180"]),
    (0, {}, {"stages": (1, 2), "ranks": 8}, ["DSL180"]),
    (1, {}, {"stages": (1, 2), "ranks": 4}, ["DSL181"]),
    (1, {}, {"stages": (1, 2), "ranks": 4, "model_ranks": 2}, []),
    (1, {"checkpoint": {"load_universal": True}}, {"stages": (1, 2), "ranks": 4}, []),
    (3, {}, {"stages": (3,), "ranks": 8, "bf16": True}, ["DSL182"]),
    (3, {"bf16": {"enabled": True}}, {"stages": (3,), "ranks": 8, "bf16": True}, []),
    (3, {}, {"stages": (3,), "ranks": 8, "latest": False}, ["DSL183"]),
    (3, {}, {"stages": ()}, ["DSL183"]),
]


@pytest.mark.parametrize(("stage", "more", "saved", "wanted"), LOADS)
def test_a_checkpoint_loads_or_does_not(stage, more, saved, wanted):
    situation = rules.Situation(config={"zero_optimization": {"stage": stage}, **more}, world=8)
    asked = advice.Case(situation, saved=advice.Saved("ckpt", tag="s", **saved))
    assert [finding.rule for finding in advice.checkpoint_can_be_loaded(asked)] == wanted


# --- the command -------------------------------------------------------------------------------------------


def dslaunch(*argv, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, argv)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CONFIG_HOME": "/nonexistent", **(env or {})},
        cwd=Path(lint.__file__).parents[1],
    )


BF16 = '"bf16": {"enabled": true}'


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "ds config.json"
    path.write_text(
        '{\n  "train_batch_size": 8, "gradient_clipping": 1,\n  ' + BF16 + ',\n  "fp61": {"enabled": false}\n}\n'
    )
    return path


def test_a_result_is_one_line_with_its_reason_and_remedy(bad):
    done = dslaunch("lint", bad)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{bad}:4:3: error DSL001 DeepSpeed has no key `fp61`")
    assert [line[:7] for line in lines[1:]] == ["  why: ", "  try: "]
    assert done.stderr == f"1 error in {bad} (DeepSpeed config); --fix mends 1\n"
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options", "code"),
    [
        (STAGE1, [], 0),
        ('{"train_batch_size": 8, "wall_clock_breakdown": true, "fp16": {"enabled": true}}', [], 0),
        ('{"train_batch_size": 8, "wall_clock_breakdown": true, "fp16": {"enabled": true}}', ["--strict"], 1),
        ('{"train_batch_size": 8, "steps_per_print": 1, "fp16": {"enabled": true}}', ["--strict"], 0),
        ('{"train_batch_sise": 8, "fp16": {"enabled": true}}', [], 1),
    ],
)
def test_exit_codes(text, options, code):
    assert dslaunch("lint", "-", *options, stdin=text).returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--deepspeed=new", "--gpu=h1000", "--model=llama-8", "--trainer=me", "--gpus=-1"])
def test_an_option_that_means_nothing_is_2(option):
    assert dslaunch("lint", "-", option, stdin=STAGE1).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [("train.py", "import torch\nprint('x: y')\n"), ("empty.py", ""), ("notes.md", "# Notes\n\nthe lr: 3\n")],
)
def test_a_program_or_a_page_is_no_job_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    done = dslaunch("lint", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path} is nothing that lint reads\n  try: a job file (.yaml), a DeepSpeed config (.json)" in done.stderr
    job = tmp_path / "job.txt"
    job.write_text("name: a\nmodel: gpt-demo\n")
    assert dslaunch("lint", job).returncode == 0


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_2_and_the_others_are_judged(bad, tmp_path):
    (tmp_path / "binary.json").write_bytes(b"{\xff}")
    (tmp_path / "big.json").write_text("{" + " " * (2 << 20) + "}")
    done = dslaunch("lint", tmp_path / "none.json", bad, tmp_path / "binary.json", tmp_path / "big.json", tmp_path)
    assert done.returncode == 2
    assert "DSL001" in done.stdout
    assert done.stderr.count("error: ") == 4


def test_fix_writes_the_file_in_one_go_and_keeps_its_mode(bad, tmp_path):
    bad.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(bad)
    done = dslaunch("lint", "--fix", link)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{link}: DSL001 fp61" in done.stderr
    assert json.loads(bad.read_text())["fp16"] == {"enabled": False}
    assert (bad.stat().st_mode & 0o777, link.is_symlink()) == (0o640, True)
    assert json.loads(link.read_text())["fp16"] == {"enabled": False}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds config.json", "link.json"]


def test_fix_keeps_the_byte_order_mark_and_line_ends_of_a_plain_config(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(
        b'\xef\xbb\xbf{\r\n  "train_batch_size": 8,\r\n  "fp16": {"enabled": true},\r\n  "steps_per_pint": 5\r\n}'
    )
    dslaunch("lint", "--fix", path)
    assert path.read_bytes().startswith(b'\xef\xbb\xbf{\r\n  "train_batch_size": 8,\r\n')
    assert b'"steps_per_print": 5\r\n' in path.read_bytes()


def test_diff_shows_and_writes_nothing(bad):
    before = bad.read_bytes()
    done = dslaunch("lint", "--diff", bad)
    assert bad.read_bytes() == before
    assert f"--- a{bad}" in done.stdout or f"--- a/{bad}" in done.stdout
    assert '-  "fp61": {"enabled": false}' in done.stdout
    assert done.returncode == 1


def test_fix_of_standard_input_goes_to_standard_output():
    done = dslaunch("lint", "--fix", "-", stdin='{"train_batch_sise": 8, "wall_clock_breakdown": true}')
    assert json.loads(done.stdout) == {"train_batch_size": 8, "wall_clock_breakdown": True}
    assert "DSL130" in done.stderr


def test_a_place_that_takes_no_file_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for place in ("gone/ds.json", "file/ds.json", "pipe", "."):
        with pytest.raises(UserError, match="cannot write"):
            bundle.write_text(tmp_path / place, "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "found"),
    [("none", {"DSL036"}), ("AdamW", {"DSL060"}), ("SGD", {"DSL022", "DSL060"}), ("DeepSpeedCPUAdam", set())],
)
def test_the_programs_optimizer_is_judged_when_it_is_named(optimizer, found):
    text = '{"train_batch_size": 8, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}'
    said = dslaunch("lint", "-", "--optimizer", optimizer, stdin=text)
    assert set(re.findall("error (DSL[0-9]+)", said.stdout)) == found


def test_fix_takes_the_optimizers_learning_rate_for_the_schedules():
    fixed = lint.fix(BIG, name="ds.json")
    assert jsondoc.parse(fixed.text).value["scheduler"]["params"]["warmup_max_lr"] == 1e-5
    assert "DSL046 scheduler.params.warmup_max_lr: 1e-05" in fixed.changes


def test_results_as_json(bad):
    report = json.loads(dslaunch("lint", "--json", bad).stdout)[0]
    assert report["file"] == str(bad)
    result = report["results"][0]
    assert (result["rule"], result["name"], result["severity"], result["line"], result["column"]) == (
        *("DSL001", "unknown-key", "error", 4, 3),
    )
    assert result["fixable"] is True
    assert result["why"]


@pytest.mark.slow
def test_job_files_come_with_the_line_and_the_id(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(
        JOB + "train:\n  steps: 20\n  deepspeed:\n    train_batch_sise: 4\n    wall_clock_breakdown: true\n"
    )
    done = dslaunch("lint", job)
    assert done.returncode == 1
    assert re.search(rf"{job}:6:\d+: error DSL001 ", done.stdout)
    assert "note: " in dslaunch("lint", "--fix", job).stderr
    job.write_text(JOB + "train:\n  steps: 20\n  deepspeed: {wall_clock_breakdown: true}\n")
    done = dslaunch("lint", job)
    assert done.returncode == 0
    assert f"{job}:5:15: warning DSL155" in done.stdout
    job.write_text(JOB + "trian: 1\n")
    assert f"{job}:3:1: error DSL198 unknown key `trian`" in dslaunch("lint", job).stdout


@pytest.mark.slow
def test_a_checkpoint_folder_is_compared(bad, tmp_path):
    tag = tmp_path / "ckpt" / "global_step10"
    tag.mkdir(parents=True)
    (tag / f"zero_pp_rank_0_{MODEL}").write_text("not opened")
    (tag / OPTIMIZER.format(0)).write_text("not opened")
    (tmp_path / "ckpt" / "latest").write_text("global_step10")
    bad.write_text('{"train_batch_size": 8, "fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    done = dslaunch("lint", bad, "--checkpoint", tmp_path / "ckpt")
    assert "ckpt/global_step10 was saved with ZeRO-3, and the config has stage 2" in done.stdout
    assert done.returncode == 1
    assert dslaunch("lint", bad, "--checkpoint", tmp_path / "none").returncode == 2


@pytest.mark.slow
def test_explain_one_and_all():
    assert "offload-param-ignored" in dslaunch("explain", "DSL061").stdout
    assert dslaunch("explain", "dsl061").stdout == dslaunch("explain", "offload-param-ignored").stdout
    everything = dslaunch("explain").stdout.splitlines()
    assert [line[:6] for line in everything] == sorted(lint.rows())
    done = dslaunch("explain", "offload-parm-ignored")
    assert (done.returncode, "did you mean offload-param-ignored?" in done.stderr) == (2, True)


def test_lint_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['dslaunch', 'lint', '-']\n"
        "from launcher.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ['torch', 'pydantic', 'kubernetes', 'submitit'] if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=STAGE1, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- SARIF -----------------------------------------------------------------------------------------------

# What SARIF 2.1.0 requires of the parts that are written here, and nothing else may stand in them.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}},
        "additionalProperties": False}  # fmt: skip
LEVEL = {"enum": ["none", "note", "warning", "error"]}
PLACE = {"type": "integer", "minimum": 1}


def shape(required, **properties):
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def listing(items):
    return {"type": "array", "items": items}


RULE = shape(
    "id",
    id={"type": "string", "pattern": "^DSL[0-9]{3}$"},
    name={"type": "string", "pattern": "^[A-Z][A-Za-z0-9]+$"},
    shortDescription=TEXT,
    fullDescription=TEXT,
    help=TEXT,
    defaultConfiguration=shape("level", level=LEVEL),
)
REGION = shape(
    "startLine startColumn endLine endColumn", startLine=PLACE, startColumn=PLACE, endLine=PLACE, endColumn=PLACE
)
URI = shape("uri", uri={"type": "string", "pattern": r"^(file:///)?([A-Za-z0-9._~/-]|%[0-9A-F]{2})+$"})
RESULT = shape(
    "message",
    ruleId={"type": "string"},
    ruleIndex={"type": "integer", "minimum": 0},
    level=LEVEL,
    message=TEXT,
    locations=listing(
        shape("physicalLocation", physicalLocation=shape("artifactLocation", artifactLocation=URI, region=REGION))
    ),
)
SARIF = shape(
    "version runs",
    **{"$schema": {"const": "https://json.schemastore.org/sarif-2.1.0.json"}},
    version={"const": "2.1.0"},
    runs=listing(
        shape(
            "tool results",
            tool=shape(
                "driver",
                driver=shape("name", name={"type": "string"}, version={"type": "string"}, rules=listing(RULE)),
            ),
            columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
            results=listing(RESULT),
        )
    ),
)


def test_sarif_is_what_the_standard_asks_for(bad):
    import jsonschema

    reports = [lint.lint(as_text(EXAMPLES[rule]["bad"]), name=f"a b/{rule}.json") for rule in EXAMPLES]
    log = json.loads(json.dumps(sarif.log([*reports, lint.Report("x", "job file", ())])))
    jsonschema.Draft7Validator(SARIF).validate(log)
    run = log["runs"][0]
    ids = [row["id"] for row in run["tool"]["driver"]["rules"]]
    assert ids == sorted(set(ids))
    assert all(ids[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    regions = [place["physicalLocation"]["region"] for result in run["results"] for place in result["locations"]]
    assert all((r["startLine"], r["startColumn"]) <= (r["endLine"], r["endColumn"]) for r in regions)
    assert len(run["results"]) == sum(len(report.results) for report in reports)
    printed = json.loads(dslaunch("lint", "--sarif", bad).stdout)
    jsonschema.Draft7Validator(SARIF).validate(printed)
    place = printed["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == f"file://{bad}".replace(" ", "%20")
    assert place["region"] == {"startLine": 4, "startColumn": 3, "endLine": 4, "endColumn": 9}


# --- any text at all ---------------------------------------------------------------------------------------

KEYS = [
    *sorted(rules.sections()[()].keys),
    *"stage device offload_param offload_optimizer enabled type params lr betas pin_memory nvme_path".split(),
    *"reduce_bucket_size overlap_comm loss_scale cpu_offload cpu_offload_param prefetch_bucket_size".split(),
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(["auto", "cpu", "nvme", "AdamW", "OneBitAdam", 2, 3, 1e5, "fp32", "WarmupLR"])
NAMES = st.sampled_from(KEYS) | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=30,
)
SAID = st.sampled_from(
    [
        {},
        {"model": "llama-7b", "gpus": 8, "gpu": "a100-40gb", "steps": 100},
        {"model": "t5-large", "nodes": 3, "gpus": 1, "gpu": "v100-32gb", "deepspeed": "0.19.6"},
        {"gpus": 0, "trainer": "hf"},
        {"gpus": 8, "nodes": 4, "trainer": "plain"},
    ]
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8), SAID)
@settings(max_examples=300, deadline=None)
def test_no_config_makes_a_traceback_and_fix_ends(config, said):
    text = json.dumps(config, indent=2)
    said = known(**said)
    report = lint.lint(text, name="ds.json", known=said)
    assert lint.text([report]).count("\n") < 10_000
    fixed = lint.fix(text, name="ds.json", known=said)
    assert lint.fix(fixed.text, name="ds.json", known=said).text == fixed.text


ZERO = st.sampled_from(sorted(rules.sections()[("zero_optimization",)].keys))
PLAUSIBLE = (
    st.booleans() | st.integers(-1, 9) | st.sampled_from([None, "auto", "true", "2", 1e9, CPU, {"device": "nvme"}])
)


@pytest.mark.slow
@given(st.sampled_from([0, 1, 2, 3, "auto", "3", None]), st.dictionaries(ZERO, PLAUSIBLE, max_size=8), SAID)
@settings(max_examples=300, deadline=None)
def test_no_zero_section_makes_a_traceback_and_fix_adds_no_error(stage, section, said):
    config = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {**section, "stage": stage}}
    said = known(**said)
    before = lint.lint(json.dumps(config), name="ds.json", known=said)
    fixed = lint.fix(json.dumps(config), name="ds.json", known=said)
    assert fixed.report.count("error") <= before.count("error")
    assert lint.fix(fixed.text, name="ds.json", known=said).text == fixed.text


@pytest.mark.slow
@given(st.text(max_size=60) | st.text(alphabet="{}[]\",:'/#* \n\t01.eE-+truefalsn\\", max_size=60))
@settings(max_examples=500, deadline=None)
def test_no_text_makes_a_traceback(text):
    report = lint.lint(text, name="ds.json")
    lines = text.count("\n") + 1
    assert all(0 < result.line <= lines for result in report.results)
    lint.fix(text, name="ds.json")
    try:
        value = json.loads(text)
    except ValueError:
        return
    document = jsondoc.parse(text)
    slips = {slip.kind for slip in document.slips}
    assert slips <= {"twice", "infinite"}
    assert slips or document.value == value


@pytest.mark.slow
def test_two_megabytes_are_read():
    many = {f"key{index}": {"a": [1, 2, 3], "b": "text " * 60} for index in range(6_000)}
    text = json.dumps({"train_batch_size": 8, "data_efficiency": many}, indent=1)
    assert len(text) > 2 << 20
    document = jsondoc.parse(text)
    assert document.value["data_efficiency"] == many
    assert not document.slips


GALLERY = Path(lint.__file__).parents[1] / "slurm"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in GALLERY.glob("*/ds_config.json")), ids=lambda p: p.name
)
def test_what_we_render_is_without_errors(folder):
    onebit = "onebit" in folder.name
    said = lint.Known(deepspeed="0.19.6" if onebit else "", gpus_per_node=0 if folder.name == "cpu-demo" else None)
    text = (folder / "ds_config.json").read_text()
    results = lint.lint(text, name="ds_config.json", known=said).results
    assert {result.rule for result in results if result.severity != "note"} <= ({"DSL032"} if onebit else set())
    assert lint.fix(text, name="ds_config.json", known=said).text == text
