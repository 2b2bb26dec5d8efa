"""Models: what a shape counts, what Hugging Face's configs say, and the presets that carry a guide's intent."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from conformance.verdicts import ask
from onebit import env

from launcher import examples, facts, huggingface, plan, spec, yamldoc
from launcher.errors import UserError
from launcher.plan import shape as shapes
from launcher.spec import Lora, Shape

TESTS = Path(__file__).parent
CACHE = TESTS.parent / ".cache"
MODELS = facts.models()

# --- counting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_has_the_published_count(name):
    row = MODELS[name]
    assert shapes.parameters(row.shape) == pytest.approx(row.published, rel=0.005)


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.shape.experts])
def test_a_mixture_has_the_published_active_count(name):
    row = MODELS[name]
    # authors round it to one or two figures: 3.3B, 22B, 12.9B
    assert shapes.active_parameters(row.shape) == pytest.approx(row.active, rel=0.02)
    assert shapes.active_parameters(row.shape) < row.published / 3


def test_most_presets_are_exact():
    """What is rounded by its authors, or has a bias on the output embeddings, is not."""
    inexact = {name for name, row in MODELS.items() if shapes.parameters(row.shape) != row.published}
    assert inexact == {
        *("gpt3-175b", "gpt-j-6b", "phi-2", "bloom-7b1", "bloom-176b", "opt-66b", "mpt-30b"),
        *("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"),
        *("roberta-base", "roberta-large", "xlm-roberta-base", "xlm-roberta-large"),
    }


def test_a_dense_model_is_all_active():
    shape = MODELS["llama-7b"].shape
    assert shapes.active_parameters(shape) == shapes.parameters(shape)
    assert shapes.expert_parameters(shape) == 0


@pytest.mark.parametrize(
    ("lora", "count"),
    [
        (Lora(rank=8), 32 * 2 * 8 * (4096 + 4096)),
        (Lora(rank=16, targets="attention"), 32 * 4 * 16 * (4096 + 4096)),
        (Lora(rank=8, targets="linear"), 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
    ],
)
def test_adapters_of_llama_7b(lora, count):
    assert shapes.adapter_parameters(MODELS["llama-7b"].shape, lora) == count


@pytest.mark.parametrize(
    ("model", "lora", "count"),
    [
        # q is 4096 wide and v 1024
        ("llama-3.1-8b", Lora(rank=8), 32 * 8 * ((4096 + 4096) + (4096 + 1024))),
        # both halves, and the decoder's cross-attention: 6 + 6 + 6 attentions
        ("t5-small", Lora(rank=4), 18 * 2 * 4 * (512 + 512)),
        # every expert has its own
        (
            "mixtral-8x7b",
            Lora(rank=8, targets="linear"),
            32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 8 * 3 * (4096 + 14336)),
        ),
    ],
)
def test_adapters_follow_the_architecture(model, lora, count):
    assert shapes.adapter_parameters(MODELS[model].shape, lora) == count


def test_parts_add_up_to_the_whole():
    shape = MODELS["mixtral-8x7b"].shape
    layer = shapes.attention_parameters(shape) + shapes.mlp_parameters(shape) + 2 * 4096
    assert shapes.layer_parameters(shape) == layer
    assert shapes.parameters(shape) == 32 * layer + shapes.embedding_parameters(shape) + 4096
    assert shapes.mlp_parameters(shape) == 8 * shapes.expert_parameters(shape) + 8 * 4096


# --- Hugging Face -----------------------------------------------------------------------------------------

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
MISTRAL = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336}
MIXTRAL = {**MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
QWEN3_MOE = {
    **QWEN3, "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
FALCON_7B = {
    "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
    "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True,
    "bias": False, "vocab_size": 65024, "alibi": False,
}  # fmt: skip
FALCON_40B = {  # as its first checkpoint spelled it
    "model_type": "RefinedWeb", "hidden_size": 8192, "n_layer": 60, "n_head": 128, "n_head_kv": 8, "bias": False,
    "vocab_size": 65024, "parallel_attn": True,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}
GPTJ = {
    "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None, "n_positions": 2048,
    "rotary_dim": 64, "vocab_size": 50400, "tie_word_embeddings": False,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
MPT = {
    "model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 4, "no_bias": True,
    "vocab_size": 50432, "attn_config": {"attn_type": "multihead_attention", "alibi": True}, "max_seq_len": 2048,
}  # fmt: skip
PHI2 = {
    "model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 10240, "vocab_size": 51200, "tie_word_embeddings": False,
}  # fmt: skip
PHI4 = {
    "model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 10, "intermediate_size": 17920, "vocab_size": 100352, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000,
    "hidden_act": "gelu",
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA3 = {  # heads, key/value heads, width of a head and vocabulary are the class's own
    "model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240,
    },
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
    "word_embed_proj_dim": 4096, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
ROBERTA = {
    **BERT, "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
}  # fmt: skip
MT5 = {
    **T5, "model_type": "mt5", "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6, "d_ff": 1024,
    "vocab_size": 250112, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def shape_of(config: dict[str, object]) -> Shape:
    return huggingface.read(json.dumps(config), source="config.json")[0]


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        (LLAMA, "llama-7b"), (GPT2, "gpt2"), (T5, "t5-small"), (T5_1_1, "t5-xl"), (BERT, "bert-base"),
        ({**LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}, "llama-3.1-8b"),
        (MISTRAL, "mistral-7b"), (MIXTRAL, "mixtral-8x7b"), (QWEN2, "qwen-2.5-7b"), (QWEN3, "qwen-3-0.6b"),
        (QWEN3_MOE, "qwen-3-30b-a3b"), (FALCON_7B, "falcon-7b"), (FALCON_40B, "falcon-40b"), (BLOOM, "bloom-176b"),
        ({**FALCON_40B, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8}, "falcon-40b"),
        (GPTJ, "gpt-j-6b"), (NEOX, "gpt-neox-20b"), (MPT, "mpt-7b"), (PHI2, "phi-2"), (PHI4, "phi-4"),
        (GEMMA, "gemma-2b"), (GEMMA2, "gemma-2-9b"), (GEMMA3, "gemma-3-4b"), (OPT, "opt-6.7b"),
        (ROBERTA, "roberta-base"), (MT5, "mt5-small"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_config_is_its_preset(config, preset):
    found, expected = shape_of(config), MODELS[preset].shape
    assert found.kind == expected.kind
    assert shapes.parameters(found) == shapes.parameters(expected)
    assert shapes.active_parameters(found) == shapes.active_parameters(expected)


def test_shared_experts_are_counted():
    """Qwen2-57B-A14B is 57.4B with 14B at work: 64 experts of 2560, 8 at a time, and one of 20480 for all."""
    config = {
        **QWEN2, "model_type": "qwen2_moe", "vocab_size": 151936, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
    }  # fmt: skip
    found = shape_of(config)
    assert shapes.parameters(found) == pytest.approx(57.4e9, rel=0.005)
    assert shapes.active_parameters(found) == pytest.approx(14.2e9, rel=0.005)


@pytest.mark.parametrize(
    ("config", "traits"),
    [
        # a family without a row, with Llama's norms
        ({**LLAMA, "model_type": "newcomer", "rms_norm_eps": 1e-6}, {"gated": True, "biases": False, "tied": False}),
        ({**BERT, "model_type": "newcomer", "hidden_act": "gelu"}, {"gated": False, "biases": True, "tied": True}),
        ({**LLAMA, "attention_bias": True}, {"qkv_bias": True, "biases": False}),
        ({**MPT, "attn_config": {"kv_n_heads": 4}}, {"kv_heads": 4, "ffn": 16384}),
        ({**GPT2, "model_type": "gpt_bigcode", "multi_query": True}, {"kv_heads": 1, "positions": 1024}),
        ({**FALCON_7B, "multi_query": False}, {"kv_heads": None, "norms": 1}),
        ({**MIXTRAL, "num_local_experts": 1}, {"experts": 0}),
    ],
)
def test_what_a_config_says_becomes_the_shape(config, traits):
    found = shape_of(config)
    assert {name: getattr(found, name) for name in traits} == traits


def test_the_text_model_of_a_multimodal_config_is_named_as_such():
    config = {"text_config": LLAMA, "vision_config": {"hidden_size": 1024}, "tie_word_embeddings": True}
    row = facts.model("llava.json", config_json=json.dumps(config))
    assert "text_config alone" in row.source
    assert row.shape == shape_of(LLAMA)
    untold = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    assert facts.model("x.json", config_json=json.dumps({**config, "text_config": untold})).shape.tied
    assert facts.model("x.json", config_json=json.dumps(LLAMA)).source == "x.json (Hugging Face config)"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**LLAMA, "model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "experts in some layers only (`decoder_sparse_step`)"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "experts in some layers only (`mlp_only_layers`)"),
        ({**OPT, "word_embed_proj_dim": 512}, "embeddings of another width"),
        ({**LLAMA, "mamba_d_state": 16}, "state-space layers"),
        ({**LLAMA, "n_routed_experts": 64}, "routed and shared experts"),
        ({**LLAMA, "ffn_config": {"moe_num_experts": 16}}, "a mixture of experts in a spelling that is not known"),
        ({"text_config": {"model_type": "odd"}}, "config.json: text_config lacks hidden_size"),
    ],
)
def test_what_a_shape_cannot_say_is_refused(config, says):
    with pytest.raises(UserError) as caught:
        shape_of(config)
    assert says in caught.value.problems[0].message
    assert caught.value.problems[0].at == ("model",)


def test_more_experts_cost_memory_and_no_work():
    shape = MODELS["mixtral-8x7b"].shape
    more = replace(shape, experts=16)
    assert shapes.parameters(more) > shapes.parameters(shape) + 32 * 8 * shapes.expert_parameters(shape)
    assert shapes.active_parameters(more) == shapes.active_parameters(shape) + 32 * 8 * 4096  # a wider router


# --- a guide's configurations -----------------------------------------------------------------------------

PRESETS = facts.presets()
CONFIGURATIONS = [name for name, row in PRESETS.items() if row.job]


def planned(configuration: str, **options: object) -> plan.Plan:
    return plan.make(spec.load(examples.preset(configuration, **options), name="job.yaml").spec)


def test_all_thirteen_are_there():
    assert len(CONFIGURATIONS) == 13
    assert {row.world for row in PRESETS.values()} == {1, 2, 4, 8, 32}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_presets_job_plans_where_the_guide_runs_it(name):
    made, row = planned(name), PRESETS[name]
    assert made.spec.world == row.world
    assert made.spec.train.script == "train.py"
    written = row.as_written.get("train_batch_size")
    assert made.batch.total == (written or made.batch.total)


# 70B at two nodes is at the edge of what fits
ON_NODES = [
    (name, nodes) for name in CONFIGURATIONS for nodes in (1, 2, 4, 8) if nodes > 2 or name != "llama_70b_multi_node"
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nodes"), ON_NODES)
def test_a_presets_batch_divides_on_any_usual_number_of_nodes(name, nodes):
    assert planned(name, nodes=nodes).spec.resources.nodes == nodes


def test_a_preset_on_too_few_nodes_is_refused_for_memory_alone():
    with pytest.raises(UserError) as caught:
        planned("llama_70b_multi_node", nodes=1)
    assert all("does not fit" in problem.message for problem in caught.value.problems)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_presets_file_says_every_correction(name):
    text = " ".join(line.strip().lstrip("# ") for line in examples.preset(name).splitlines())
    for mistake in PRESETS[name].corrections:
        for said in (mistake.wrong, mistake.check, mistake.instead):
            assert " ".join(said.split()) in text
    for remark in PRESETS[name].remarks.values():
        assert remark in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_correction_names_a_key_of_the_job_file(name):
    sections = {"train": yamldoc.hints(spec.Train), "resources": yamldoc.hints(spec.Resources)}
    for place in [*(mistake.at for mistake in PRESETS[name].corrections if mistake.at), *PRESETS[name].remarks]:
        section, key = place.split(".")
        assert key in sections[section]


def test_every_shared_mistake_is_somebodys():
    shared = yamldoc.load_tables(facts.DATA / "mistakes.yaml")
    made = {correction for row in PRESETS.values() for correction in row.corrections}
    assert {facts.Correction(**row) for row in shared.values()} <= made


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpu": "h100", "nodes": 2, "fabric": "efa"}, ["gpu: h100-80gb", "nodes: 2", "fabric: efa"]),
        ({"gpus_per_node": 4, "name": "mine"}, ["gpus_per_node: 4", "name: mine\n"]),
    ],
)
def test_a_preset_moves_to_another_machine(options, says):
    text = examples.preset("llama-7b-single-node", **options)
    assert all(line in text for line in says)
    assert "# Here it is" in text
    assert "# Here it is" not in examples.preset("llama-7b-single-node")
    planned("llama-7b-single-node", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "llama_70b_multinode"], "did you mean `llama_70b_multi_node`?"),
        (["--preset", "pipeline_parallelism"], "no preset `pipeline_parallelism`"),
        (["--preset", "gpt2_baseline", "--gpu", "h100-80g"], "did you mean `h100-80gb`?"),
        (["--preset", "gpt2_baseline", "--name", "My job"], "--name My job: a name is"),
        (["--preset", "gpt2_baseline", "--model", "gpt2"], "--model and --preset each name a job file"),
    ],
)
def test_init_refuses_a_preset_that_is_none(options, says):
    done = dslaunch("init", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def dslaunch(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launcher", *argv], capture_output=True, text=True)


def test_presets_lists_models_with_what_is_active():
    lines = dslaunch("presets").stdout.splitlines()
    assert len(lines) == len(MODELS)
    assert (
        next(line for line in lines if line.startswith("mixtral-8x7b")).split()[1:6] == "46.703 B 12.9 B per".split()
    )
    rows = {row["name"]: row for row in json.loads(dslaunch("presets", "--json").stdout)}
    assert rows["mixtral-8x7b"]["active"] == 12_879_925_248
    assert rows["llama-7b"]["parameters"] == 6_738_415_616


@pytest.mark.slow
def test_presets_says_what_becomes_of_each_configuration():
    text = dslaunch("presets", "--configurations").stdout
    assert (
        "13 configurations: 3 refused by DeepSpeed's config parser, 10 accepted there and ended by its engine" in text
    )
    assert "1bit-Adam is not compatible with ZeRO (0.19.6)" in text
    for name, row in PRESETS.items():
        assert f"\n{name}: {row.says}\n" in f"\n{text}"
    rows = json.loads(dslaunch("presets", "--configurations", "--json").stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert dslaunch("init", "--preset", "list").stdout.split("\n")[0].startswith("llama_7b_single_node ")


# --- the same, asked of DeepSpeed itself ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["0.19.8", "0.19.6"])
def release(request: pytest.FixtureRequest) -> str:
    """A release of DeepSpeed that the table speaks of, where an interpreter has it."""
    pytest.importorskip("deepspeed")
    if metadata.version("deepspeed").partition("+")[0] == request.param:
        return request.param
    if request.param != env.VERSION:
        pytest.skip(f"deepspeed {request.param} is not installed")
    return request.param


@pytest.mark.slow
def test_the_config_parser_does_what_the_table_says(release):
    rows = [(name, row.as_written, row.world, row.parser, row.ignored) for name, row in PRESETS.items()]
    rows += [
        (f"{name}, {variant.says}", variant.config, variant.world, variant.parser, variant.ignored)
        for name, row in PRESETS.items()
        for variant in row.variants
    ]
    emitted = [(name, made) for name in CONFIGURATIONS for made in [planned(name)]]
    lines = [{"config": config, "replicas": world} for _, config, world, _, _ in rows]
    lines += [{"config": made.config, "replicas": made.setup.replicas} for _, made in emitted]
    answers = ask("parser.py", lines, release=release)
    assert len(answers) == len(rows) + len(CONFIGURATIONS)
    for (about, _, _, parser, ignored), answer in zip(rows, answers, strict=False):
        if parser == "accepts":
            assert (answer["error"], answer["unread"]) == ("", ignored), about
        else:
            assert parser in answer["error"], about
    for (name, made), answer in zip(emitted, answers[len(rows) :], strict=True):
        assert (answer["error"], answer["unread"]) == ("", []), name
        assert answer["batch"] == [made.batch.total, made.batch.micro, made.batch.accumulation], name


@pytest.mark.slow
def test_the_engine_does_what_the_table_says(release):
    rows = {name: row for name, row in PRESETS.items() if row.parser == "accepts"}
    answers = ask("engine_start.py", (row.as_written for row in rows.values()), release=release)
    for (name, row), answer in zip(rows.items(), answers, strict=True):
        assert row.start[release] in str(answer), name
