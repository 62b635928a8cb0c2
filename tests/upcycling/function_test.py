"""Which upcycled models compute what the dense one does, and which do not: as `recipe` says."""

import dataclasses

import jax
import numpy as np
import pytest

from olmoe_jax.upcycling import recipe as recipe_lib
from tests.upcycling import dense

FP32 = 1e-5  # order of summation, and what "scaled" leaves: relative to the largest logit
OLMO = {"norm": "layernorm_nonparametric", "qk_norm": False}
POST = {"norm_position": "post", "norm_eps": 1e-12}
PARTS = {"num_experts": 12, "granularity": 3, "num_experts_per_token": 6}


def error(model, **settings):
    """(largest relative difference from the dense logits, what the recipe says of it)."""
    recipe, new, params = dense.upcycled(model, **settings)
    want = dense.compute(model, dense.random_params(model))
    return dense.difference(dense.compute(new, params), want), recipe_lib.preserves(recipe, model)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {"method": "normalized"}),
        ({}, {"method": "normalized", "num_experts_per_token": 1}),
        ({}, {"method": "normalized", **PARTS}),
        ({}, {"method": "normalized", "shared_expert": True, **PARTS}),
        ({}, {"method": "normalized", "moe_every": 2}),
        ({}, {"method": "scaled"}),
        ({}, {"method": "scaled", **PARTS}),
        ({}, {"num_experts_per_token": 4}),
        (OLMO, {"method": "scaled"}),
        (POST, {}),
    ],
)
def test_function_preserving_upcycling_gives_the_dense_logits(fields, settings):
    found, said = error(dense.change(**fields), **settings)
    assert said and found < FP32


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PARTS,
        {"method": "normalized", "diversify": "noise"},
        {"method": "normalized", "diversify": "drop"},
    ],
)
def test_what_is_said_not_to_preserve_the_function_does_not(settings):
    found, said = error(dense.MODEL, **settings)
    assert said is None and found > 1e-2


def test_a_constant_factor_is_wrong_with_a_router_of_ordinary_size():
    """Why "scaled" has a small one."""
    recipe, new, params = dense.upcycled(dense.MODEL, method="scaled")
    moe = params["layers"]["block_0"]["moe"]
    moe["router"] = moe["router"] * (0.02 / recipe.router_std(dense.MODEL.d_model))
    want = dense.compute(dense.MODEL, dense.random_params(dense.MODEL))
    assert dense.difference(dense.compute(new, params), want) > 1e-3


def test_the_small_router_still_tells_tokens_apart():
    model = dense.change(d_model=60)
    recipe, new, params = dense.upcycled(model, method="scaled", num_experts=8)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 60)).astype(np.float32)  # as behind a norm
    for router in np.asarray(params["layers"]["block_0"]["moe"]["router"]):
        probs = jax.nn.softmax(x @ router)
        _, chosen = jax.lax.top_k(probs, 2)
        load = np.bincount(np.ravel(chosen), minlength=8) / chosen.size
        assert 0.09 < load.min() and load.max() < 0.17  # 0.125 each


def test_parts_under_the_reference_compute_what_whole_copies_do():
    _, whole, params = dense.upcycled(dense.MODEL)
    _, parts, cut = dense.upcycled(dense.MODEL, **PARTS)
    moe = params["layers"]["block_0"]["moe"]
    moe["router"] = cut["layers"]["block_0"]["moe"]["router"][..., ::3]
    want = dense.compute(whole, params)
    assert dense.difference(dense.compute(parts, cut), want) < FP32


def test_whole_groups_are_chosen_also_where_groups_tie():
    """With a router in bfloat16, whose logits often are equal."""
    _, new, params = dense.upcycled(dense.MODEL, method="normalized", **PARTS)
    new = dataclasses.replace(new, router_dtype="bfloat16")
    want = dense.compute(dense.MODEL, dense.random_params(dense.MODEL))
    moe = params["layers"]["block_0"]["moe"]
    for router in (moe["router"], moe["router"] * 0):
        moe["router"] = router
        assert dense.difference(dense.compute(new, params), want) < FP32
