"""Causal self-attention with rotary positions, grouped key/value heads and optional QK-norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from olmoe_jax import sharding
from olmoe_jax.model import norms


def rotary(x, positions, *, theta):
    """Rotates pairs (i, i + head_dim/2) by positions · theta^(−2i/head_dim): half-split, as in
    Llama.

    Args:
      x: [batch, length, heads, head_dim].
      positions: int32 [batch, length].
    Returns:
      The same shape and dtype; the rotation itself is in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention; the residual stream goes in normed and comes out unadded.

    QK-norm covers the full projection (heads · head_dim) before the split into heads, as in OLMoE.
    `clip_qkv` clamps after QK-norm, as Hugging Face does; the original code clamps before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool
    clip_qkv: float | None
    norm_eps: float
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x, positions, segment_ids=None):
        """
        Args:
          x: [batch, length, d_model].
          positions: int32 [batch, length], for the rotary embedding.
          segment_ids: int32 [batch, length] or None; a position attends only inside its own
            segment.
        """
        b, length, d_model = x.shape
        widths = {"query": self.num_heads, "key": self.num_kv_heads, "value": self.num_kv_heads}
        heads = {}
        for name, count in widths.items():
            kernel = self.param(
                name, self.kernel_init, (d_model, count * self.head_dim), jnp.float32
            )
            projected = x @ kernel.astype(self.dtype)
            if self.qk_norm and name != "value":
                projected = norms.RMSNorm(self.norm_eps, name=f"{name}_norm")(projected)
            if self.clip_qkv is not None:
                projected = jnp.clip(projected, -self.clip_qkv, self.clip_qkv)
            heads[name] = projected.reshape(b, length, count, self.head_dim)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            rotary(heads["query"], positions, theta=self.rope_theta),
            rotary(heads["key"], positions, theta=self.rope_theta),
            heads["value"],
            mask=mask,
            is_causal=True,
        )
        mixed = mixed.reshape(b, length, self.num_heads * self.head_dim)
        kernel = self.param("output", self.kernel_init, (mixed.shape[-1], d_model), jnp.float32)
        return sharding.constrain(mixed @ kernel.astype(self.dtype), "batch", None, None)
