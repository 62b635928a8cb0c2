"""The tables, against transformers' own classes and the released models."""

import dataclasses
import json

import numpy as np
import pytest

from olmoe_jax import checkpoints, config
from olmoe_jax.checkpoints import layout
from olmoe_jax.porting import configs, families

# Distinct small sizes: 2 layers, d 12, 3 heads of 4, 1 kv head, f 7, 5 experts, 11 tokens.
TINY = dict(
    num_hidden_layers=2, hidden_size=12, num_attention_heads=3, num_key_value_heads=1,
    intermediate_size=7, vocab_size=11, max_position_embeddings=13, pad_token_id=None,
    eos_token_id=None, bos_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts=5, num_experts_per_tok=2)
OPTIONS = {
    "olmoe": EXPERTS,
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, head_dim=6),
    "llama": dict(head_dim=6),
    "olmo": {},
    "olmo2": {},
    "flex_olmo": EXPERTS,
    "qwen3_moe": dict(EXPERTS, moe_intermediate_size=7, head_dim=6),
}


def tiny(**options):
    sizes = dict(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=7, vocab_size=11)
    return config.ModelConfig(**sizes, num_experts=5, num_experts_per_token=2, **options)


def stored_arrays(model_config, seed=0):
    """Random float32 arrays under the names on disk."""
    shapes = layout.to_stored(checkpoints.abstract_params(model_config), model_config)
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(leaf.shape, np.float32)
        for name, leaf in layout.flatten(shapes).items()
    }


def fill(parts, arrays):
    """Foreign tensors from stored arrays, by the parts; NaN where no part writes."""
    out = {n: np.full(s, np.nan, np.float32) for n, s in families.tensor_shapes(parts).items()}
    for part in parts:
        value = arrays[part.ours] if part.index is None else arrays[part.ours][part.index]
        rows = out[part.theirs][part.start : part.start + part.shape[0]]
        assert np.isnan(rows).all()
        rows[...] = value.T if part.transpose else value
    return out


def test_every_family_has_a_case():
    assert set(OPTIONS) == set(families.FAMILIES)
    assert not set(families.FAMILIES) & set(families.UNSUPPORTED)
    assert all(name == family.name for name, family in families.FAMILIES.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_names_and_shapes_are_those_that_transformers_writes(name, tied, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    safetensors = pytest.importorskip("safetensors", reason="needs safetensors")
    architecture = families.FAMILIES[name].architecture
    theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(
        **TINY | OPTIONS[name], tie_word_embeddings=tied
    )
    getattr(transformers, architecture)(theirs).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
    family, model_config = configs.read(json.loads((tmp_path / "config.json").read_text()), "x")
    assert family.name == name
    parts = families.parts(family, model_config)
    assert families.tensor_shapes(parts) == shapes
    families.match(parts, shapes, (), "x")


def test_released_olmoe_has_3219_tensors_of_these_shapes():
    model_config = config.ModelConfig(vocab_size=50304)
    shapes = families.tensor_shapes(families.parts(families.FAMILIES["olmoe"], model_config))
    d, f = 2048, 1024
    expected = {
        "model.embed_tokens.weight": (50304, d),
        "lm_head.weight": (50304, d),
        "model.norm.weight": (d,),
    }
    for i in range(16):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{layer}.{norm}.weight"] = (d,)
        for letter in "qkvo":
            expected[f"{layer}.self_attn.{letter}_proj.weight"] = (d, d)
        for letter in "qk":
            expected[f"{layer}.self_attn.{letter}_norm.weight"] = (d,)
        expected[f"{layer}.mlp.gate.weight"] = (64, d)
        for e in range(64):
            expert = f"{layer}.mlp.experts.{e}"
            expected[f"{expert}.gate_proj.weight"] = expected[f"{expert}.up_proj.weight"] = (f, d)
            expected[f"{expert}.down_proj.weight"] = (d, f)
    assert len(expected) == 3219
    assert shapes == expected
    assert sum(int(np.prod(s)) for s in shapes.values()) == 6_919_161_856


def test_parts_put_each_expert_and_layer_where_it_belongs():
    model_config = tiny()
    arrays = stored_arrays(model_config)
    out = fill(families.parts(families.FAMILIES["olmoe"], model_config), arrays)
    assert not any(np.isnan(tensor).any() for tensor in out.values())
    expert = "model.layers.1.mlp.experts.3"
    for theirs, ours in {"gate": "w_gate", "up": "w_up", "down": "w_down"}.items():
        wanted = arrays[f"layers/01/moe/{ours}"][3].T
        assert np.array_equal(out[f"{expert}.{theirs}_proj.weight"], wanted)
    assert np.array_equal(out["lm_head.weight"], arrays["lm_head"])
    q = arrays["layers/00/attention/query"].T
    assert np.array_equal(out["model.layers.0.self_attn.q_proj.weight"], q)


def test_training_format_fuses_q_k_v_and_the_experts():
    model_config = tiny(vocab_multiple=13)
    arrays = stored_arrays(model_config)
    out = fill(families.parts(families.TRAINING, model_config), arrays)
    layer, block = "layers/01/", "transformer.blocks.1."
    qkv = [arrays[f"{layer}attention/{n}"].T for n in ("query", "key", "value")]
    assert np.array_equal(out[block + "att_proj.weight"], np.concatenate(qkv))
    for theirs, ours in {"w1": "w_gate", "v1": "w_up"}.items():
        experts = [arrays[f"{layer}moe/{ours}"][e].T for e in range(5)]
        assert np.array_equal(out[f"{block}ffn.experts.mlp.{theirs}"], np.concatenate(experts))
    down = arrays[layer + "moe/w_down"]
    assert np.array_equal(out[block + "ffn.experts.mlp.w2"], down.reshape(5 * 7, 12))
    assert np.array_equal(out[block + "ffn.router.layer.weight"], arrays[layer + "moe/router"].T)
    assert out["transformer.ff_out.weight"].shape == (13, 12)


def test_training_format_of_a_dense_model_has_up_before_gate():
    model_config = dataclasses.replace(
        tiny(norm="layernorm_nonparametric", qk_norm=False, tie_embeddings=True), num_experts=0
    )
    arrays = stored_arrays(model_config)
    out = fill(families.parts(families.TRAINING, model_config), arrays)
    up, gate = (arrays[f"layers/00/ffn/w_{n}"].T for n in ("up", "gate"))
    assert np.array_equal(out["transformer.blocks.0.ff_proj.weight"], np.concatenate([up, gate]))
    down = arrays["layers/00/ffn/w_down"].T
    assert np.array_equal(out["transformer.blocks.0.ff_out.weight"], down)
    names = ("att_proj", "attn_out", "ff_proj", "ff_out")
    blocks = {f"transformer.blocks.{i}.{name}.weight" for i in range(2) for name in names}
    assert set(out) == blocks | {"transformer.wte.weight"}


def test_layers_keep_their_numbers_beyond_ten():
    model_config = dataclasses.replace(tiny(), num_layers=12)
    found = families.parts(families.FAMILIES["olmoe"], model_config)
    pairs = {(part.theirs.split(".")[2], part.ours.split("/")[1]) for part in found[3:]}
    assert pairs == {(str(i), f"{i:02d}") for i in range(12)}


def change_rows(change):
    family = families.FAMILIES["olmoe"]
    return dataclasses.replace(family, rows=tuple(change(list(family.rows))))


def point_at(index, theirs):
    """Row number `index` named `theirs`."""

    def change(rows):
        rows[index] = dataclasses.replace(rows[index], theirs=theirs)
        return rows

    return change


BROKEN = {
    "no place for 2 of .*layers/00/attention/key": lambda rows: [
        row for row in rows if not row.ours.endswith("attention/key")
    ],
    "names layers/00/attention/query more than once": lambda rows: rows + [rows[5]],
    "layers/00/attention_norm/scale and layers/00/attention/query into one": point_at(
        5, "model.layers.{layer}.input_layernorm.weight"
    ),
    "layers/00/attention_norm/scale and layers/01/attention_norm/scale into one": point_at(
        3, "model.input_layernorm.weight"
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_table_is_refused(message):
    with pytest.raises(ValueError, match=message):
        families.parts(change_rows(BROKEN[message]), tiny())


def test_a_model_that_the_family_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="olmoe has no place for 6 .*moe/shared/w_down"):
        families.parts(families.FAMILIES["olmoe"], tiny(num_shared_experts=1))


@pytest.fixture(scope="module")
def olmoe():
    parts = families.parts(families.FAMILIES["olmoe"], tiny())
    return parts, families.tensor_shapes(parts)


def test_match_ignores_buffers_by_name(olmoe):
    parts, shapes = olmoe
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    families.match(parts, shapes | buffer, families.FAMILIES["olmoe"].ignored, "DIR")
    with pytest.raises(ValueError, match="DIR: .*1 unknown .*inv_freq"):
        families.match(parts, shapes | buffer, (), "DIR")


def test_match_names_what_is_missing_unknown_and_of_another_shape(olmoe):
    parts, shapes = olmoe
    broken = dict(shapes)
    for layer in range(2):
        for e in range(2):
            del broken[f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight"]
    broken["model.norm.bias"] = (12,)
    broken["model.layers.1.mlp.gate.weight"] = (12, 5)
    with pytest.raises(ValueError) as error:
        families.match(parts, broken, (), "DIR")
    message = str(error.value)
    first = [
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i, e in [(0, 0), (0, 1), (1, 0)]
    ]
    assert f"4 missing ({', '.join(first)}, …)" in message
    assert "1 unknown (model.norm.bias)" in message
    assert "(model.layers.1.mlp.gate.weight [12, 5], expected [5, 12])" in message
    assert "\n" not in message


def test_match_refuses_a_head_beside_tied_embeddings(olmoe):
    _, shapes = olmoe
    tied = families.parts(families.FAMILIES["olmoe"], tiny(tie_embeddings=True))
    with pytest.raises(ValueError, match="lm_head.weight.*ties the head to the embedding"):
        families.match(tied, shapes, (), "DIR")


HEADS = {
    "olmoe": ("lm_head.weight", "model.embed_tokens.weight"),
    "olmo_training": ("transformer.ff_out.weight", "transformer.wte.weight"),
}


@pytest.mark.parametrize("name", HEADS)
def test_match_accepts_a_head_with_the_bits_of_a_tied_embedding(name):
    family = (families.FAMILIES | {families.TRAINING.name: families.TRAINING})[name]
    head, embedding = HEADS[name]
    tied = families.parts(family, tiny(tie_embeddings=True))
    shapes = families.tensor_shapes(tied)
    weights = np.random.default_rng(0).standard_normal(shapes[embedding], np.float32)
    weights[3, 1] = np.nan
    other = weights.copy()
    other[10, 11] = np.nextafter(other[10, 11], np.float32(9))
    found = {embedding: weights, head: weights.copy()}

    def match(**change):
        shapes_found = shapes | {head: change.get(head, weights).shape}
        families.match(tied, shapes_found, (), "DIR", read=(found | change).__getitem__)

    match()
    for wrong in (other, weights[:-1], weights.view(np.int32)):
        with pytest.raises(ValueError, match=rf"1 unknown .{head}.; .*ties the head"):
            match(**{head: wrong})
    with pytest.raises(ValueError, match="1 missing"):  # nothing to compare with
        rest = {n: s for n, s in shapes.items() if n != embedding} | {head: weights.shape}
        families.match(tied, rest, (), "DIR", read={}.__getitem__)
    with pytest.raises(ValueError, match="1 unknown .model.other"):
        families.match(tied, shapes | {"model.other": (11, 12)}, (), "DIR", read={}.__getitem__)


def test_match_names_the_files(olmoe):
    parts, shapes = olmoe
    broken = shapes | {"model.norm.bias": (12,), "model.layers.1.mlp.gate.weight": (12, 5)}
    files = {"model.norm.bias": "a.safetensors", "model.layers.1.mlp.gate.weight": "b.safetensors"}
    with pytest.raises(ValueError) as error:
        families.match(parts, broken, (), "DIR", files=files)
    assert "1 unknown (model.norm.bias in a.safetensors)" in str(error.value)
    assert "gate.weight [12, 5], expected [5, 12] in b.safetensors)" in str(error.value)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_packed_tensors_make_up_the_experts(name):
    family = families.FAMILIES[name]
    rows = [row for row in family.rows if "{expert}" in row.theirs]
    found = [row for its in family.packed.values() for row in its]
    assert [row.theirs for row in rows] == [row for row in found if "{expert}" in row]
    assert set(found) <= {row.theirs for row in family.rows}
