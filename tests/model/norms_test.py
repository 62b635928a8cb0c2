import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.model import norms
from tests import oracles

FP32 = 1e-6


def _inputs():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, size=(2, 3, 7)), rng.normal(size=7)


def test_rms_norm_equals_numpy():
    x, scale = _inputs()
    got = norms.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), eps=0.1)
    np.testing.assert_allclose(got, oracles.rms_norm(x, scale, 0.1), atol=10 * FP32)


def test_the_gradient_of_rms_norm_is_autodiffs():
    x, scale = (jnp.asarray(a, jnp.float32) for a in _inputs())
    d_y = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.1) * scale

    got = jax.vjp(lambda *a: norms.rms_norm(*a, 0.1), x, scale)[1](d_y)
    for mine, theirs in zip(got, jax.vjp(plain, x, scale)[1](d_y), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=10 * FP32)


def test_the_gradient_of_rms_norm_in_bf16_is_that_of_fp32_rounded_once():
    x, scale = (jnp.asarray(a, jnp.bfloat16) for a in _inputs())
    d_y = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (x, scale, d_y)]
    d_x, d_scale = jax.vjp(lambda *a: norms.rms_norm(*a, 0.1), x, wide[1])[1](d_y)
    want_x, want_scale = jax.vjp(lambda *a: norms.rms_norm(*a, 0.1), *wide[:2])[1](wide[2])
    assert d_x.dtype == jnp.bfloat16 and d_scale.dtype == jnp.float32
    np.testing.assert_array_equal(d_x, want_x.astype(jnp.bfloat16))
    np.testing.assert_allclose(d_scale, want_scale, rtol=FP32)


def test_layer_norm_equals_numpy():
    x, _ = _inputs()
    got = norms.layer_norm(jnp.asarray(x, jnp.float32), eps=0.1)
    np.testing.assert_allclose(got, oracles.layer_norm(x, 0.1), atol=10 * FP32)


def test_bf16_is_normed_in_fp32_then_cast_then_scaled():
    x, scale = (jnp.asarray(a, jnp.bfloat16) for a in _inputs())
    x = x * 100  # squares and their mean would lose digits in bf16
    normed = oracles.rms_norm(np.asarray(x, np.float64), 1.0, 1e-5)
    want = jnp.asarray(normed, jnp.bfloat16) * scale
    got = norms.rms_norm(x, scale.astype(jnp.float32), eps=1e-5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_a_new_norm_scales_by_one_and_the_nonparametric_one_has_no_parameters():
    x = jnp.asarray(_inputs()[0], jnp.float32)
    np.testing.assert_array_equal(
        norms.RMSNorm(1e-5).init(jax.random.key(0), x)["params"]["scale"], np.ones(7)
    )
    assert not norms.LayerNorm(1e-5).init(jax.random.key(0), x)


def test_both_ways_to_sum_for_the_gradient_agree():
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 7), (7,), (2, 3))]
    for one, other in zip(norms._sums(*arrays), norms._products(*arrays), strict=True):
        np.testing.assert_allclose(one, other, atol=10 * FP32)
