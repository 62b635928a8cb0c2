import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.model import moe
from tests import oracles

FP32_SUM = 1e-5  # order of summation

B, LENGTH, D, E, F, K = 2, 5, 7, 11, 3, 2


def _module(**changes):
    options = {
        "num_experts": E, "num_experts_per_token": K, "num_shared_experts": 0, "d_ff": F,
        "router": "token_choice", "normalize_expert_weights": False, "router_dtype": jnp.float32,
        "expert_backend": "dense", "capacity_factor": 1.0, "group": 0,
        "kernel_init": nn.initializers.zeros,
    }  # fmt: skip
    return moe.MoE(**(options | changes))


def _inputs(module):
    x, mask = np.random.default_rng(0).normal(size=(B, LENGTH, D)), np.ones((B, LENGTH), bool)
    mask[1, 3:] = False
    return x, mask, oracles.random_params(module, jnp.zeros((B, LENGTH, D)), mask)


@pytest.mark.parametrize("shared", [0, 2])
def test_output_is_that_of_the_chosen_and_the_shared_experts(shared):
    module = _module(num_shared_experts=shared)
    x, mask, params = _inputs(module)
    y, routed = module.apply({"params": params}, jnp.asarray(x, jnp.float32), mask)
    ids, weights = oracles.token_choice(x @ params["router"], mask, K, False)
    np.testing.assert_array_equal(routed.expert_ids, ids)
    flat = [a.reshape(B * LENGTH, -1) for a in (x, ids, weights)]
    want = oracles.experts(*flat, params).reshape(x.shape)
    if shared:
        assert params["shared"]["w_up"].shape == (D, shared * F)
        want += oracles.swiglu(x, *(params["shared"][w] for w in ("w_gate", "w_up", "w_down")))
    np.testing.assert_allclose(y, want, atol=FP32_SUM)


def test_a_bf16_model_has_exact_router_logits():
    """Of its bf16 activations and the float32 router: neither rounded again, nor the result."""
    module = _module()
    x, mask, params = _inputs(module)
    x = jnp.asarray(x, jnp.bfloat16)
    y, routed = module.apply({"params": params}, x, mask)
    assert y.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    np.testing.assert_allclose(routed.logits, want, atol=1e-6)


def test_the_bf16_router_rounds_weights_and_logits():
    module = _module(router_dtype=jnp.bfloat16)
    x, mask, params = _inputs(module)
    x = jnp.asarray(x, jnp.bfloat16)
    _, routed = module.apply({"params": params}, x, mask)
    router = np.asarray(jnp.asarray(params["router"], jnp.bfloat16), np.float32)
    want = jnp.asarray(np.asarray(x, np.float32) @ router, jnp.bfloat16)
    np.testing.assert_allclose(routed.logits, np.asarray(want, np.float32), rtol=2**-7, atol=1e-6)
    assert (np.asarray(jnp.asarray(routed.logits, jnp.bfloat16), np.float32) == routed.logits).all()
