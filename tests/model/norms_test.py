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
