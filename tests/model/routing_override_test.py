"""Interventions in the routing, each against a model whose weights were changed instead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import config as config_lib
from olmoe_jax.model import transformer
from olmoe_jax.model.routing import RoutingOverride
from tests import oracles

FP32_SUM = 2e-5  # order of summation over a few layers
E, LAYER, EXPERT = 7, 1, 4
CONFIG = config_lib.ModelConfig(
    vocab_size=31, max_length=11, num_layers=3, d_model=12, num_heads=3, num_kv_heads=3, d_ff=5,
    num_experts=E, num_experts_per_token=3, init_std=0.3,
)  # fmt: skip
NONE = RoutingOverride.none(CONFIG.num_layers, E)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module", params=["raw weights", "normalized", "grouped", "expert choice"])
def config(request):
    changes = {
        "normalized": {"normalize_expert_weights": True},
        "grouped": {"expert_backend": "loop"},
        "expert choice": {"router": "expert_choice"},
    }
    return dataclasses.replace(CONFIG, **changes.get(request.param, {}))


def _params(config):
    return oracles.random_params(transformer.Transformer(config), jnp.zeros((1, 2), jnp.int32))


def _run(config, params, override=None):
    @jax.jit
    def apply(params, override):
        return transformer.Transformer(config).apply(
            {"params": params}, TOKENS, routing_override=override, return_routing=True
        )

    return apply(params, override)


def _changed(params, name, change):
    """The parameters with `change` applied to this array of every MoE layer, as NumPy."""
    params = jax.tree.map(np.array, params)
    moe = params["layers"]["block_0"]["moe"]
    moe[name] = change(moe[name])
    return params


def test_none_changes_nothing(config):
    params = _params(config)
    plain, same = _run(config, params), _run(config, params, NONE)
    np.testing.assert_array_equal(plain.logits, same.logits)
    np.testing.assert_array_equal(plain.routing.expert_ids, same.routing.expert_ids)


def test_a_muted_expert_is_one_whose_down_projection_is_zero(config):
    params = _params(config)

    def zero(w_down):
        w_down[LAYER, EXPERT] = 0
        return w_down

    want = _run(config, _changed(params, "w_down", zero))
    override = NONE.replace(muted=NONE.muted.at[LAYER, EXPERT].set(True))
    got, plain = _run(config, params, override), _run(config, params)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=FP32_SUM)
    assert np.abs(plain.logits - got.logits).max() > 1e-3
    np.testing.assert_array_equal(got.routing.expert_ids[LAYER], plain.routing.expert_ids[LAYER])
    is_muted = np.asarray(plain.routing.expert_ids[LAYER]) == EXPERT
    assert is_muted.any()
    want_weights = np.where(is_muted, 0, plain.routing.weights[LAYER])
    np.testing.assert_allclose(got.routing.weights[LAYER], want_weights, rtol=1e-6)


def test_going_around_an_expert_is_a_model_without_it(config):
    if config.router == "expert_choice":
        pytest.skip("there the remaining experts would take more tokens each")
    params = _params(config)
    for name, axis in (("router", 2), ("w_gate", 1), ("w_up", 1), ("w_down", 1)):
        params = _changed(params, name, lambda w, axis=axis: np.delete(w, EXPERT, axis))
    want = _run(dataclasses.replace(config, num_experts=E - 1), params)
    override = NONE.replace(excluded=NONE.excluded.at[:, EXPERT].set(True))
    got = _run(config, _params(config), override)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=FP32_SUM)
    np.testing.assert_array_equal(
        got.routing.expert_ids, want.routing.expert_ids + (want.routing.expert_ids >= EXPERT)
    )


def test_random_routing_draws_every_expert_alike_and_keeps_the_weights():
    config = dataclasses.replace(CONFIG, max_length=2048)
    tokens = np.tile(np.arange(31, dtype=np.int32), 66)[None, :2048]
    model, params = transformer.Transformer(config), _params(config)
    override = NONE.replace(random_seed=NONE.random_seed.at[LAYER].set(3))
    plain, got = (
        model.apply({"params": params}, tokens, routing_override=o, return_routing=True).routing
        for o in (None, override)
    )
    np.testing.assert_allclose(got.weights[LAYER], plain.weights[LAYER], rtol=1e-6)
    np.testing.assert_array_equal(got.expert_ids[0], plain.expert_ids[0])
    ids = np.asarray(got.expert_ids[LAYER, 0])
    assert all(len(set(row)) == 3 for row in ids)
    counts = np.bincount(ids.ravel(), minlength=E)
    sd = np.sqrt(2048 * 3 / 7 * 4 / 7)
    assert np.abs(counts - 2048 * 3 / 7).max() < 4 * sd
    again = model.apply({"params": params}, tokens, routing_override=override, return_routing=True)
    np.testing.assert_array_equal(again.routing.expert_ids, got.expert_ids)


def test_padding_stays_without_expert():
    mask = np.ones(TOKENS.shape, bool)
    mask[:, 8:] = False
    override = NONE.replace(
        random_seed=NONE.random_seed + 6, muted=NONE.muted.at[:, E - 1].set(True)
    )
    routed = transformer.Transformer(CONFIG).apply(
        {"params": _params(CONFIG)}, TOKENS, token_mask=mask, routing_override=override,
        return_routing=True,
    ).routing  # fmt: skip
    assert (np.asarray(routed.expert_ids)[:, :, 8:] == -1).all()
    assert not np.asarray(routed.weights)[:, :, 8:].any()
