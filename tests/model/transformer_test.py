import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import config as config_lib
from olmoe_jax.model import routing, transformer
from tests import oracles

FP32_SUM = 5e-5  # order of summation over a few layers; relative to the largest value

B, LENGTH = 2, 7
CONFIG = config_lib.ModelConfig(
    vocab_size=31, vocab_multiple=4, max_length=LENGTH, num_layers=2, d_model=12, num_heads=3,
    num_kv_heads=3, d_ff=5, num_experts=7, num_experts_per_token=2, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "olmoe": {},
    "mixtral": {
        "qk_norm": False,
        "num_kv_heads": 1,
        "normalize_expert_weights": True,
        "rope_theta": 50.0,
    },
    "tied, clipped": {"tie_embeddings": True, "clip_qkv": 0.5},
    "every second layer": {"num_layers": 6, "moe_every": 3, "num_shared_experts": 2},
    "expert choice": {"router": "expert_choice"},
    "dense": {"num_experts": 0},
    "olmo": {"num_experts": 0, "norm": "layernorm_nonparametric", "qk_norm": False, "head_dim": 6},
    "flexolmo": {"norm_position": "post", "num_kv_heads": 1},
    "olmo 2": {"norm_position": "post", "num_experts": 0},
    "qwen3": {"qk_norm_per_head": True, "num_kv_heads": 1, "head_dim": 6, "sliding_window": 3},
    "clipped first": {"clip_qkv": 0.5, "clip_before_qk_norm": True},
}


def _config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def _params(config, seed=0):
    return oracles.random_params(
        transformer.Transformer(config), jnp.zeros((1, 2), jnp.int32), seed=seed
    )


def _tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 31, (B, LENGTH)).astype(np.int32)


class Result(typing.NamedTuple):
    logits: jax.Array
    routing: routing.Routing
    layer_rms: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "group"))
def _apply(params, tokens, config, group=0, **inputs):
    model = transformer.Transformer(config, routing_group=group)
    features = model.apply({"params": params}, tokens, method="features", **inputs)
    head = transformer.head_weights(params).astype(config.dtype)
    return Result(features.hidden @ head.T, features.routing, features.layer_rms)


def _close(got, want, tolerance=FP32_SUM):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_model_equals_numpy(name):
    config, tokens = _config(**CONFIGS[name]), _tokens()
    params, mask = _params(config), np.arange(LENGTH) < np.array([[LENGTH], [4]])
    group = 1 if config.router == "expert_choice" else 0
    out = _apply(params, tokens, config, group, token_mask=mask)
    want = oracles.transformer(params, config, tokens, mask=mask, group=group)
    assert out.logits.shape == (B, LENGTH, 32)
    _close(out.logits, want.logits)
    if config.num_experts:
        _close(out.routing.logits, want.router_logits)
        np.testing.assert_array_equal(out.routing.expert_ids, want.expert_ids)
    assert out.layer_rms.shape == (config.num_layers,)
    _close(out.layer_rms, want.layer_rms)


def test_calling_the_model_is_its_features_and_the_head():
    params, tokens, model = _params(CONFIG), _tokens(), transformer.Transformer(CONFIG)
    call = functools.partial(model.apply, return_routing=True)
    out, want = jax.jit(call)({"params": params}, tokens), _apply(params, tokens, CONFIG)
    _close(out.logits, want.logits)
    np.testing.assert_array_equal(out.routing.expert_ids, want.routing.expert_ids)
    assert jax.eval_shape(model.apply, {"params": params}, tokens).routing is None


def test_layers_lie_in_the_documented_tree():
    params = _params(_config(num_layers=6, moe_every=3, num_shared_experts=2))
    assert sorted(params) == ["embedding", "final_norm", "layers", "lm_head"]
    assert sorted(params["layers"]) == ["block_0", "block_1", "block_2"]
    assert ["moe" in params["layers"][f"block_{p}"] for p in range(3)] == [False, False, True]
    moe = params["layers"]["block_2"]["moe"]
    assert moe["w_gate"].shape == (2, 7, 12, 5) and moe["shared"]["w_down"].shape == (2, 10, 12)


def test_initialisation_is_a_cut_normal_with_layers_that_differ():
    config = _config(init_std=0.02, init_cutoff=2.0, d_ff=61, num_experts=13)
    params = transformer.Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]
    w = np.asarray(params["layers"]["block_0"]["moe"]["w_up"])
    assert 0.039 < np.abs(w).max() <= 0.04
    assert w.std() == pytest.approx(0.88 * 0.02, rel=0.02)  # a normal cut at ±2 σ has 0.8796 σ
    assert (w[0] != w[1]).mean() > 0.99
    assert (params["final_norm"]["scale"] == 1).all()


def test_segments_equal_separate_sequences():
    config, tokens = _config(), _tokens()
    params = _params(config)
    positions = np.tile(np.concatenate([np.arange(3), np.arange(4)]), (B, 1))
    segments = np.repeat([[0, 1]] * B, (3, 4), axis=1)
    packed = _apply(params, tokens, config, positions=positions, segment_ids=segments).logits
    alone = [_apply(params, part, config).logits for part in (tokens[:, :3], tokens[:, 3:])]
    _close(packed, np.concatenate(alone, axis=1))


def test_padding_does_not_change_real_tokens():
    config, tokens = _config(), _tokens()
    params, mask = _params(config), np.arange(LENGTH) < np.array([[LENGTH], [4]])
    other = np.where(mask, tokens, 0)
    first, second = (_apply(params, t, config, token_mask=mask) for t in (tokens, other))
    np.testing.assert_array_equal(np.asarray(first.logits)[mask], np.asarray(second.logits)[mask])
    assert (np.asarray(first.routing.expert_ids)[:, ~mask] == -1).all()


def _loss(params, tokens, config):
    features = transformer.Transformer(config).apply({"params": params}, tokens, method="features")
    values = jnp.sum(jnp.sin(features.hidden)) + jnp.sum(jnp.square(features.routing.logits))
    return values, features


_gradient = jax.jit(jax.grad(_loss, has_aux=True), static_argnums=2)


def _remat_inputs(router):
    config = _config(router=router, normalize_expert_weights=True, expert_backend="dense")
    return config, _params(config), _tokens()


@pytest.mark.parametrize("router", routing.ROUTERS)
def test_remat_changes_neither_values_nor_gradients(router):
    config, params, tokens = _remat_inputs(router)
    want, plain = _gradient(params, tokens, config)
    got, remat = _gradient(params, tokens, dataclasses.replace(config, remat=True))
    _close(remat.hidden, plain.hidden)
    np.testing.assert_array_equal(remat.routing.expert_ids, plain.routing.expert_ids)
    jax.tree.map(_close, got, want)


def _gradient_when_the_recomputation_chooses_otherwise(monkeypatch, config, params, tokens):
    """Gradient under remat, where all but a router's first evaluation see other logits."""
    calls, real_route = [], routing.route

    def noise(like):
        calls.append(None)
        rng = np.random.default_rng(len(calls))
        first = len(calls) <= config.num_layers
        return np.zeros_like(like) if first else rng.normal(0, 9, like.shape).astype(like.dtype)

    def route(router_logits, *args, **kwargs):
        shape = jax.ShapeDtypeStruct(router_logits.shape, router_logits.dtype)
        added = jax.pure_callback(noise, shape, jax.lax.stop_gradient(router_logits))
        return real_route(router_logits + added, *args, **kwargs)

    monkeypatch.setattr(routing, "route", route)
    remat = dataclasses.replace(config, remat=True)
    fresh = jax.jit(lambda params: jax.grad(_loss, has_aux=True)(params, tokens, remat)[0])
    return jax.block_until_ready(fresh(params)), len(calls)


@pytest.mark.parametrize(
    ("router", "saved"), [("token_choice", True), ("token_choice", False), ("expert_choice", True)]
)
def test_remat_saves_the_choice_of_experts(monkeypatch, router, saved):
    """A saved choice keeps the gradient that of the forward pass, whatever a recomputation finds.

    Without the saved names the same disturbance shows: the test would see it.
    """
    config, params, tokens = _remat_inputs(router)
    want, _ = _gradient(params, tokens, config)
    if not saved:
        monkeypatch.setattr(routing, "SAVED_NAMES", ())
    got, evaluations = _gradient_when_the_recomputation_chooses_otherwise(
        monkeypatch, config, params, tokens
    )
    assert evaluations == config.num_layers * (1 if saved else 2)
    if saved:
        jax.tree.map(_close, got, want)
    else:
        w_got, w_want = (np.asarray(g["layers"]["block_0"]["moe"]["w_up"]) for g in (got, want))
        assert np.abs(w_got - w_want).max() > 0.05 * np.abs(w_want).max()


def test_the_router_is_in_fp32_whatever_the_compute_dtype():
    """fp32 logits have digits that bf16 has not; mimicking Hugging Face rounds them away."""
    tokens, logits = _tokens(), {}
    params = _params(CONFIG)
    for router_dtype in config_lib.DTYPE_NAMES:
        out = _apply(params, tokens, _config(dtype="bfloat16", router_dtype=router_dtype))
        assert out.logits.dtype == jnp.bfloat16
        assert out.routing.logits.dtype == out.routing.weights.dtype == jnp.float32
        logits[router_dtype] = np.asarray(out.routing.logits[0])
    rounded = {
        name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for name, x in logits.items()
    }
    assert (rounded["bfloat16"] == logits["bfloat16"]).all()
    assert (rounded["float32"] != logits["float32"]).mean() > 0.9
    _close(logits["bfloat16"], logits["float32"], 0.02)  # the weights are rounded too: 2⁻⁸


def test_bf16_is_close_to_fp32():
    params, tokens = _params(CONFIG), _tokens()
    exact = _apply(params, tokens, CONFIG)
    rough = _apply(params, tokens, _config(dtype="bfloat16"))
    same = (np.asarray(exact.routing.expert_ids) == np.asarray(rough.routing.expert_ids)).all(
        (0, 3)
    )
    assert same.mean() > 0.5
    _close(np.asarray(rough.logits, np.float32)[same], np.asarray(exact.logits)[same], 0.1)
