"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def rms_norm(x, scale, *, eps):
    """x / sqrt(mean(x²) + eps) · scale over the last axis.

    The mean is in float32; the result is cast to x's dtype *before* the multiplication by `scale`,
    as in the code that trained OLMoE (Llama's reference does the same; Grok, and OLMo 2 in
    transformers, multiply first).
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


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
        return rms_norm(x, scale, eps=self.eps)


class LayerNorm(nn.Module):
    """Layer norm without parameters."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return layer_norm(x, eps=self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm_nonparametric": LayerNorm}
