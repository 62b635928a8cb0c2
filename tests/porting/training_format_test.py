"""config.yaml of allenai/OLMo, read and written."""

import dataclasses

import pytest
import yaml

from olmoe_jax import config
from olmoe_jax.porting import families, training_format, translation

# Section `model` of the config that trained OLMoE-1B-7B-0924, with some of its neighbours.
OLMOE = yaml.safe_load("""
run_name: olmoe
seed: 6198
model:
  {d_model: 2048, n_heads: 16, n_layers: 16, mlp_ratio: 1, weight_tying: false, alibi: false,
  rope: true, flash_attention: true, attention_dropout: 0.0, attention_layer_norm: true,
  include_bias: false, block_type: moe, layer_norm_type: rms, layer_norm_with_affine: true,
  bias_for_layer_norm: false, attention_layer_norm_with_affine: true, activation_type: swiglu,
  residual_dropout: 0.0, embedding_dropout: 0.0, max_sequence_length: 4096, vocab_size: 50280,
  embedding_size: 50304, eos_token_id: 0, pad_token_id: 1, init_device: meta, init_fn: normal,
  init_std: 0.02, init_cutoff_factor: 3, moe_top_k: 8, moe_num_experts: 64, moe_dropless: true,
  moe_mlp_impl: sparse, moe_zloss_weight: 0.001, moe_loss_weight: 0.01}
optimizer: {name: adamw, eps: 1.0e-8}
""")
# That of OLMo 1B, and of OLMo 2 1B.
OLMO = yaml.safe_load("""
model:
  {d_model: 2048, n_heads: 16, n_layers: 16, mlp_ratio: 8, weight_tying: true, alibi: false,
  rope: true, flash_attention: false, attention_dropout: 0.0, multi_query_attention: false,
  include_bias: false, block_type: sequential, layer_norm_type: default,
  layer_norm_with_affine: false, bias_for_layer_norm: false,
  attention_layer_norm_with_affine: false, activation_type: swiglu, clip_qkv: 8.0,
  max_sequence_length: 2048, vocab_size: 50280, embedding_size: 50304, init_fn: mitchell}
""")
OLMO_2 = yaml.safe_load("""
model:
  {d_model: 2048, n_heads: 16, n_layers: 16, mlp_ratio: 8, weight_tying: false, rope: true,
  rope_theta: 500000, attention_layer_norm: true, include_bias: false, block_type: sequential,
  layer_norm_type: rms, layer_norm_with_affine: true, layer_norm_eps: 1e-6, norm_after: true,
  attention_layer_norm_with_affine: true, max_sequence_length: 4096, vocab_size: 100278,
  embedding_size: 100352, init_std: 0.02, init_cutoff_factor: 3}
""")
DENSE = dict(num_layers=16, d_model=2048, num_heads=16, num_kv_heads=16, d_ff=8192, num_experts=0)
MODELS = {
    "olmoe": (OLMOE, config.ModelConfig(vocab_size=50280, vocab_multiple=128)),
    "olmo": (
        OLMO,
        config.ModelConfig(
            **DENSE, vocab_size=50280, vocab_multiple=128, max_length=2048, qk_norm=False,
            norm="layernorm_nonparametric", clip_qkv=8.0, tie_embeddings=True, init_cutoff=None,
        ),
    ),
    "olmo 2": (
        OLMO_2,
        config.ModelConfig(
            **DENSE, vocab_size=100278, vocab_multiple=128, norm_eps=1e-6, norm_position="post",
            rope_theta=5e5,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_released_configs_are_read(name):
    values, expected = MODELS[name]
    family, model_config = training_format.read(values, "DIR")
    assert family is families.TRAINING
    assert model_config == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_as_the_same_model(name):
    _, model_config = MODELS[name]
    written = training_format.write(model_config, eos_token_id=3)
    assert written["model"]["eos_token_id"] == 3
    again = yaml.safe_load(yaml.safe_dump(written))
    assert training_format.read(again, "x")[1] == model_config
    moe = [field for field in written["model"] if field.startswith("moe_")]
    assert bool(moe) == bool(model_config.num_experts)  # the branch main knows none of them
    assert type(written["model"]["rope_theta"]) is int


@pytest.mark.parametrize("section", [lambda v: v, lambda v: {"model": v, "eos_token_id": 7}])
def test_token_ids_are_found_in_both_configs(section):
    ids = {"eos_token_id": 50279, "pad_token_id": 1}
    assert training_format.token_ids(section(ids | {"vocab_size": 3})) == ids
    several = {"eos_token_id": [5, 2], "pad_token_id": None}
    assert training_format.token_ids(section(several)) == {"eos_token_id": 5}
    for nothing in ({}, {"eos_token_id": []}, {"eos_token_id": True}, {"pad_token_id": "1"}):
        assert training_format.token_ids(section(nothing)) == {}


def change(**values):
    return {"model": OLMOE["model"] | values}


def test_clipping_is_before_qk_norm():
    _, model_config = training_format.read(change(clip_qkv=8.0), "x")
    assert model_config.clip_before_qk_norm
    after = dataclasses.replace(model_config, clip_before_qk_norm=False)
    with pytest.raises(ValueError, match="here clip_before_qk_norm=False, not True"):
        training_format.write(after)
    assert training_format.write(model_config)["model"]["clip_qkv"] == 8.0


def test_key_value_heads_in_the_old_spelling():
    def heads(**values):
        return training_format.read(change(**values), "x")[1].num_kv_heads

    assert heads() == heads(multi_query_attention=False) == 16
    assert heads(multi_query_attention=True) == heads(n_kv_heads=1) == 1
    assert heads(n_kv_heads=4) == 4
    with pytest.raises(ValueError, match="multi_query_attention is True but n_kv_heads 4"):
        heads(n_kv_heads=4, multi_query_attention=True)


@pytest.mark.parametrize(
    "tokens, rows, multiple", [(50280, 50304, 128), (11, None, 1), (11, 11, 1), (11, 13, 13)]
)
def test_the_embedding_has_as_many_rows_as_it_says(tokens, rows, multiple):
    _, model_config = training_format.read(change(vocab_size=tokens, embedding_size=rows), "x")
    assert (model_config.vocab_size, model_config.vocab_multiple) == (tokens, multiple)
    assert model_config.padded_vocab_size == (rows or tokens)


REFUSED = [
    ("block_type", "llama", "covered are sequential, moe"),
    ("layer_norm_with_affine", False, "covered are 'rms' and True"),
    ("layer_norm_type", "low_precision", "covered are"),
    ("attention_layer_norm_with_affine", False, "they are 'rms' and False"),
    ("embedding_size", 50000, "below vocab_size"),
    ("mlp_hidden_size", 7, "expected an even number"),
    ("alibi", True, "only False"),
    ("rope", False, "only True"),
    ("include_bias", True, "only False"),
    ("activation_type", "gelu", "only 'swiglu'"),
    ("moe_shared_expert", True, "only False"),
    ("moe_dropless", False, "only True"),
    ("scale_logits", True, "only False"),
    ("block_group_size", 2, "only 1"),
    ("novelty", 3, "unknown"),
    ("n_layers", "deep", "expected int"),
    ("d_model", "wide", "expected an even number"),
]


@pytest.mark.parametrize("field, value, why", REFUSED)
def test_a_field_with_another_meaning_is_refused(field, value, why):
    with pytest.raises(ValueError, match=rf"^DIR: config.yaml.*\b{field}\b.*{why}"):
        training_format.read(change(**{field: value}), "DIR")


@pytest.mark.parametrize("field", ["rope", "include_bias"])
def test_a_missing_field_has_their_default(field):
    values = {k: v for k, v in OLMOE["model"].items() if k != field}
    with pytest.raises(ValueError, match=f"{field}="):
        training_format.read({"model": values}, "DIR")


@pytest.mark.parametrize("values", [{}, {"model": None}, None, []])
def test_a_config_without_a_model_is_refused(values):
    with pytest.raises(ValueError, match="DIR: config.yaml has no section `model`"):
        training_format.read(values, "DIR")


@pytest.mark.parametrize(
    "options",
    [
        dict(num_shared_experts=1),
        dict(moe_every=2),
        dict(router="expert_choice"),
        dict(normalize_expert_weights=True),
        dict(qk_norm_per_head=True),
        dict(head_dim=6),
        dict(sliding_window=7),
    ],
)
def test_a_model_that_they_do_not_compute_is_refused(options):
    field = next(iter(options))
    with pytest.raises(ValueError, match=f"allenai/OLMo does not compute.*{field}="):
        training_format.write(config.ModelConfig(**options))


def test_the_released_config_is_that_of_hugging_face():
    hugging_face = config.ModelConfig(vocab_size=50304)
    assert not translation.differences(training_format.read(OLMOE, "x")[1], hugging_face)
