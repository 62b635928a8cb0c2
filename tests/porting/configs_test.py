"""config.json: read in both spellings, refused where it means another model, written, warned of."""

import dataclasses
import json
import re

import pytest

from olmoe_jax import config, presets
from olmoe_jax.porting import configs, families, translation

# As in the released folders of OLMoE-1B-7B-0924 (version 4).
RELEASED = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
OLMOE = config.ModelConfig(vocab_size=50304, init_cutoff=None)
# One model of every family, with each option that its class has.
MODELS = {
    "olmoe": dict(num_kv_heads=8, clip_qkv=7.0, normalize_expert_weights=True),
    "mixtral": dict(
        qk_norm=False, normalize_expert_weights=True, sliding_window=7, head_dim=6, norm_eps=1e-6
    ),
    "llama": dict(num_experts=0, qk_norm=False, num_kv_heads=2, head_dim=6, rope_theta=5e5),
    "olmo": dict(
        num_experts=0, qk_norm=False, norm="layernorm_nonparametric", clip_qkv=8.0,
        tie_embeddings=True,
    ),
    "olmo2": dict(num_experts=0, norm_position="post", num_kv_heads=4),
    "flex_olmo": dict(norm_position="post", normalize_expert_weights=True),
    "qwen3_moe": dict(qk_norm_per_head=True, head_dim=6, num_kv_heads=4),
}  # fmt: skip


def class_defaults(name):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    architecture = families.FAMILIES[name].architecture
    return getattr(transformers, architecture.replace("ForCausalLM", "Config"))


def as_version_4(values):
    """The same config as version 4 wrote it, with what it wrote besides."""
    values = dict(values)
    if rope := values.pop("rope_parameters", None):
        values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    values |= {"torch_dtype": values.pop("dtype", None), "_attn_implementation_autoset": False}
    values |= {"is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
    return values | {"do_sample": False, "max_length": 20, "temperature": 1.0, "torchscript": False}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_field_that_a_class_writes_is_read_in_both_spellings(name):
    written = class_defaults(name)().to_dict()
    family, model_config = configs.read(written, "x")
    assert family.name == name
    assert configs.read(as_version_4(written), "x") == (family, model_config)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_missing_fields_have_the_defaults_of_the_class(name):
    written = class_defaults(name)().to_dict()
    _, full = configs.read(written, "x")
    _, empty = configs.read({"model_type": name}, "x")
    assert not translation.differences(full, empty)
    assert full.init_std == empty.init_std


def test_the_released_config_is_the_preset_of_that_name():
    family, model_config = configs.read(RELEASED, "x")
    assert family is families.FAMILIES["olmoe"]
    assert model_config == OLMOE
    assert not translation.differences(model_config, presets.get("olmoe-1b-7b"))
    assert model_config.dtype == "float32"
    without = {k: v for k, v in RELEASED.items() if k != "intermediate_size"}
    assert configs.read(without, "x")[1].d_ff == 2048  # the default of the class, not the model's


REFUSED = {
    "attention_bias": (True, r"only False"),
    "hidden_act": ("gelu", r"only 'silu'"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "only None"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}, "only None"),
    "rope_parameters ": ({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "only None"),
    "partial_rotary_factor": (0.5, "only 1.0"),
    "architectures": (["OlmoeForSequenceClassification"], "only"),
    "quantization_config": ({"bits": 4}, "unknown"),
    "sliding_window": (5, "only None"),
    "head_dim": (64, "only 128"),
    "pruned_heads": ({"0": [1]}, "only"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_with_another_meaning_is_refused(field):
    (value, why), field = REFUSED[field], field.strip()
    with pytest.raises(ValueError, match=rf"^DIR: config.json: .*{field}=.*{why}"):
        configs.read(RELEASED | {field: value}, "DIR")


def test_all_refused_fields_are_listed():
    wrong = {"attention_bias": True, "hidden_act": "gelu", "novelty": 3}
    with pytest.raises(ValueError) as error:
        configs.read(RELEASED | wrong, "DIR")
    assert all(f"{name}={value!r}" in str(error.value) for name, value in wrong.items())


@pytest.mark.parametrize(
    "change",
    [
        dict(rope_theta=5e5),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=None),
        dict(rope_scaling={"type": "default", "rope_theta": 5e5}, rope_theta=None),
        dict(rope_parameters={"rope_theta": 5e5}, rope_theta="null"),
        dict(rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 1.0}, rope_theta=5e5),
    ],
)
def test_rope_theta_is_found_in_every_spelling(change):
    values = {k: v for k, v in (RELEASED | change).items() if v is not None or k != "rope_theta"}
    if values.get("rope_theta") == "null":
        values["rope_theta"] = None  # there, but not set
    assert configs.read(values, "x")[1] == dataclasses.replace(OLMOE, rope_theta=5e5)


HARMLESS = {
    "novelty": None,
    "quantization_config": None,
    "layer_types": None,
    "initializer_range": None,
    "head_dim": 128,
    "hidden_act": None,
    "sliding_window": None,
}


@pytest.mark.parametrize("field", HARMLESS)
def test_a_field_that_says_nothing_new_is_accepted(field):
    assert configs.read(RELEASED | {field: HARMLESS[field]}, "x")[1] == OLMOE


def test_two_spellings_that_disagree_are_refused():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope_theta is 10000.0 but rope_parameters says 500000.0"):
        configs.read(RELEASED | {"rope_parameters": rope}, "DIR")
    with pytest.raises(ValueError, match="num_experts is 64 but num_local_experts is 32"):
        configs.read(RELEASED | {"num_local_experts": 32}, "DIR")


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("hidden_size", "2048", "int"),
        ("hidden_size", 2048.0, "int"),
        ("num_experts", True, "int"),
        ("norm_topk_prob", 1, "bool"),
        ("tie_word_embeddings", None, "bool"),
        ("clip_qkv", "8", "float or null"),
        ("rope_theta", None, "float"),
        ("model_type", ["olmoe"], "a name"),
        ("model_type", {"olmoe": 1}, "a name"),
        ("model_type", None, "a name"),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}: expected {expected}")):
        configs.read(RELEASED | {field: value}, "DIR")


def test_values_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="DIR: config.json: config.model.num_kv_heads is 3"):
        configs.read(RELEASED | {"num_key_value_heads": 3}, "DIR")


@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_experts_are_counted_under_either_name(name, field):
    assert configs.read({"model_type": name, field: 16}, "x")[1].num_experts == 16


def test_null_key_value_heads_are_as_many_as_heads():
    assert configs.read(RELEASED | {"num_key_value_heads": None}, "x")[1].num_kv_heads == 16


@pytest.mark.parametrize("name", families.UNSUPPORTED)
def test_what_an_architecture_lacks_is_said(name):
    with pytest.raises(ValueError, match=f"{name} is not covered: {families.UNSUPPORTED[name]}"):
        configs.read({"model_type": name}, "DIR")


@pytest.mark.parametrize("kind", [{"model_type": "gpt2"}, {}])
def test_an_unknown_architecture_gets_the_list(kind):
    with pytest.raises(
        ValueError, match="olmoe, mixtral, llama, olmo, olmo2, flex_olmo, qwen3_moe"
    ):
        configs.read(kind, "DIR")


def small(**options):
    sizes = dict(num_layers=2, d_model=32, num_heads=8, num_kv_heads=8, d_ff=7, vocab_size=11)
    return config.ModelConfig(**sizes | dict(num_experts=5, num_experts_per_token=3) | options)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_as_the_same_model(name):
    model_config = small(**MODELS[name])
    assert configs.family_of(model_config).name == name
    written = configs.write(model_config, dtype="bfloat16", eos_token_id=3, pad_token_id=1)
    json.dumps(written)
    family, read = configs.read(written, "x")
    assert family.name == name
    assert not translation.differences(read, model_config)
    families.parts(family, read)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(name):
    model_config = small(**MODELS[name])
    written = configs.write(model_config, dtype="bfloat16", eos_token_id=3, pad_token_id=None)
    theirs = class_defaults(name).from_dict(written).to_dict()
    assert not translation.differences(configs.read(theirs, "x")[1], model_config)
    ids = [theirs[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")]
    assert ids == [None, 3, None]  # not the defaults of the class


def test_both_spellings_are_written():
    written = configs.write(
        small(num_experts=0, qk_norm=False, rope_theta=5e5, vocab_multiple=13), dtype="float32"
    )
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"] is None
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert written["vocab_size"] == 13  # padded: what the tensors have
    assert written["architectures"] == ["LlamaForCausalLM"]


NO_CLASS = {
    "num_shared_experts": dict(num_shared_experts=1),
    "moe_every": dict(moe_every=2),
    "router": dict(router="expert_choice"),
    "expert_backend": dict(expert_backend="capacity"),
    "clip_before_qk_norm": dict(clip_qkv=8.0, clip_before_qk_norm=True),
    "qk_norm": dict(qk_norm=False),
    "head_dim": dict(head_dim=6),
    "num_experts": dict(num_experts=0),
    "norm_eps": dict(
        num_experts=0, qk_norm=False, norm="layernorm_nonparametric", norm_eps=1e-6, clip_qkv=8.0
    ),
}


@pytest.mark.parametrize("field", NO_CLASS)
def test_a_model_that_no_class_computes_is_refused(field):
    with pytest.raises(ValueError, match=f"nearest is .*ForCausalLM, but here .*{field}="):
        configs.family_of(small(**NO_CLASS[field]))


def test_options_that_change_no_number_do_not_matter():
    free = dict(remat=True, dtype="bfloat16", init_cutoff=2.0, expert_backend="dense", head_dim=4)
    assert configs.family_of(small(**free, router_dtype="bfloat16")).name == "olmoe"


def test_with_dtype_changes_the_spellings_that_are_there():
    assert configs.with_dtype({"a": 1, "dtype": "float32"}, "x") == {"a": 1, "dtype": "x"}
    assert configs.with_dtype({"torch_dtype": "float32"}, "x") == {"torch_dtype": "x"}
    assert configs.with_dtype({}, "x") == {"torch_dtype": "x", "dtype": "x"}


WARNINGS = {
    "vLLM, SGLang and llama.cpp .*norm_topk_prob": dict(normalize_expert_weights=True),
    "vLLM, SGLang and llama.cpp .*rms_norm_eps=1e-05": dict(norm_eps=1e-6),
    "vLLM, SGLang and llama.cpp .*clip": dict(clip_qkv=8.0),
    "vLLM, SGLang and llama.cpp .*head": dict(tie_embeddings=True),
    "SGLang and llama.cpp .*num_key_value_heads=2": dict(num_kv_heads=2),
}


@pytest.fixture
def known_tokenizer(monkeypatch):
    """A tokenizer.json that passes for OLMoE's."""
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    data = json.dumps({"model": model}).encode()
    monkeypatch.setattr(configs, "_OLMOE_TOKENIZER", configs.tokenizer_fingerprint(data))
    return data


@pytest.mark.parametrize("text", WARNINGS)
def test_readers_that_would_differ_are_named(text, known_tokenizer):
    olmoe = families.FAMILIES["olmoe"]
    (line,) = configs.reader_warnings(olmoe, small(**WARNINGS[text]), known_tokenizer)
    assert re.search(text, line)
    assert configs.reader_warnings(olmoe, small(), known_tokenizer) == ()


def test_a_tokenizer_that_llama_cpp_does_not_know_is_named(known_tokenizer):
    olmoe = families.FAMILIES["olmoe"]
    other = known_tokenizer.replace(b'"ab": 2', b'"ab": 3')
    (line,) = configs.reader_warnings(olmoe, small(), other)
    assert "llama.cpp" in line
    (line,) = configs.reader_warnings(olmoe, small(), None)
    assert "tokenizer" in line


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "{}", '{"model": null}', '{"model": {"merges": [[1, 2]]}}', "[" * 10**5, "\xff"]
    + ['{"model": {"merges": [3]}}', '{"model": {"merges": 3}}', '{"model": []}'],
)
def test_a_broken_tokenizer_is_a_warning(text):
    olmoe = families.FAMILIES["olmoe"]
    (line,) = configs.reader_warnings(olmoe, small(), text.encode("latin-1"))
    assert "tokenizer.json could not be read" in line and "\n" not in line


def test_the_fingerprint_does_not_depend_on_the_spelling_of_merges(known_tokenizer):
    pairs = known_tokenizer.replace(b'["a b"]', b'[["a", "b"]]')
    assert pairs != known_tokenizer
    same = configs.tokenizer_fingerprint(pairs)
    assert same == configs.tokenizer_fingerprint(known_tokenizer)
    unigram = json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}).encode()
    assert configs.tokenizer_fingerprint(unigram) != same
