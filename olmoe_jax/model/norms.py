"""Normalisation layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, eps):
    """x / sqrt(mean(x²) + eps) · scale over the last axis.

    The mean is in float32; the result is cast to x's dtype *before* the multiplication by `scale`,
    as in the code that trained OLMoE (Llama's reference does the same; Grok, and OLMo 2 in
    transformers, multiply first). Gradients are in float32 throughout; kept for them are the
    arguments only.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    normed = x.astype(jnp.float32) * _inverse_rms(x, eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype), (x, scale)


def _rms_norm_backward(eps, residuals, d_y):
    x, scale = residuals
    inverse, x32, d_y = _inverse_rms(x, eps), x.astype(jnp.float32), d_y.astype(jnp.float32)
    along, d_scale = jax.lax.platform_dependent(
        d_y * x32, scale.astype(jnp.float32), inverse[..., 0], cpu=_products, default=_sums
    )
    along = along[..., None] / x.shape[-1]
    d_x = inverse * (d_y * scale) - x32 * (inverse**3 * along)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _sums(x, of_columns, of_rows):
    """[..., d], [d], [...] → ([...], [d]): the rows' and the columns' weighted sums."""
    axes = tuple(range(x.ndim - 1))
    return jnp.sum(x * of_columns, axis=-1), jnp.sum(x * of_rows[..., None], axis=axes)


def _products(x, of_columns, of_rows):
    """The same as products with a vector: XLA sums the columns of what came from bfloat16 on one
    CPU thread, six times as slowly."""
    return jnp.tensordot(x, of_columns, axes=1), jnp.tensordot(of_rows, x, axes=x.ndim - 1)


def _inverse_rms(x, eps):
    square = jnp.square(x.astype(jnp.float32))
    return jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + eps)


def layer_norm(x, *, eps):
    """(x − mean) / sqrt(variance + eps) over the last axis in float32, without parameters (OLMo
    v1)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a learnt float32 `scale`, initially 1."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.eps)


class LayerNorm(nn.Module):
    """Layer norm without parameters."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return layer_norm(x, eps=self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm_nonparametric": LayerNorm}
