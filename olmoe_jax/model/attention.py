"""Causal self-attention with rotary positions, grouped key/value heads, and optionally QK-norm, a
clamp and a sliding window."""

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
    """Multi-head attention, without norm and residual around it.

    QK-norm covers the full projection (heads · head_dim) before the split into heads, as in OLMoE,
    or each head by itself, with one scale [head_dim] for all of them, as in Qwen3; it comes before
    the rotation. `clip_qkv` clamps after QK-norm, as Hugging Face does, or before it, as the code
    that trained OLMoE does. With `sliding_window` = w, query t sees keys t − w < s <= t, as Mixtral
    does in transformers.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool
    qk_norm_per_head: bool
    clip_qkv: float | None
    clip_before_qk_norm: bool
    sliding_window: int | None
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
            if self.clip_before_qk_norm:
                projected = self._clip(projected)
            if self.qk_norm and name != "value":
                if self.qk_norm_per_head:
                    projected = projected.reshape(b, length, count, self.head_dim)
                projected = norms.RMSNorm(self.norm_eps, name=f"{name}_norm")(projected)
            if not self.clip_before_qk_norm:
                projected = self._clip(projected)
            heads[name] = projected.reshape(b, length, count, self.head_dim)
        mask = None
        if segment_ids is not None:
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        window = None if self.sliding_window is None else (self.sliding_window - 1, 0)
        mixed = jax.nn.dot_product_attention(
            rotary(heads["query"], positions, theta=self.rope_theta),
            rotary(heads["key"], positions, theta=self.rope_theta),
            heads["value"],
            mask=mask,
            is_causal=True,
            local_window_size=window,  # positions to the left and right, the own one not counted
        )
        mixed = mixed.reshape(b, length, self.num_heads * self.head_dim)
        kernel = self.param("output", self.kernel_init, (mixed.shape[-1], d_model), jnp.float32)
        return sharding.constrain(mixed @ kernel.astype(self.dtype), "batch", None, None)

    def _clip(self, x):
        return x if self.clip_qkv is None else jnp.clip(x, -self.clip_qkv, self.clip_qkv)
