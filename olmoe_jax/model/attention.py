"""Causal self-attention with rotary positions, grouped key/value heads, and optionally QK-norm, a
clamp and a sliding window.

Letters: b batch, l length, h heads, g kv_heads, r heads / kv_heads, q queries, s keys, c head_dim.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmoe_jax import sharding
from olmoe_jax.grouped_matmul import dense
from olmoe_jax.model import norms

# A sequence is cut into this many blocks of queries, of at least SHORTEST: a block reads the keys
# up to its end only, 5/8 of the scores of the whole. Measured on two cores, 512 positions, forward
# and backward: 1, 2, 4, 8 blocks take 72, 58, 50, 56 ms (float32), 84, 58, 38, 46 (bfloat16).
BLOCKS, SHORTEST = 4, 64

# What a layer keeps under these names (`jax.checkpoint`) spares it the scores of the forward pass.
SAVED_NAMES = ("attention_mixed", "attention_normaliser")


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
    # Not to be fused with what follows, which would compute them once for every head.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(window, query, key, value, segment_ids):
    """Causal softmax(query · key / √c) · value, in blocks of queries: all scores never exist.

    Kept for the gradient are the arguments, the result and the softmax's normaliser; the scores
    are computed again there (one product of its five).

    Args:
      window: query t sees keys t − window < s <= t; None: all s <= t.
      query: [b, l, h, c].
      key, value: [b, l, g, c], where g divides h.
      segment_ids: int32 [b, l] or None; only equal ids see each other.
    Returns:
      [b, l, h, c] in query's dtype; scores, softmax and sums are float32.
    """
    return _attend_forward(window, query, key, value, segment_ids)[0]


def _attend_forward(window, query, key, value, segment_ids):
    q, k, v = _by_head(query, key.shape[2]), _by_head(key), _by_head(value)
    mixed, normalisers = [], []
    for start, stop, first in _blocks(q.shape[3], window):
        scores = _product("bgrqc,bgsc->bgrqs", q[:, :, :, start:stop], k[:, :, first:stop])
        visible = _visible(start, stop, first, window, segment_ids)
        scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        probs = jnp.exp(scores - peak)
        total = jnp.sum(probs, axis=-1, keepdims=True)
        out = _product("bgrqs,bgsc->bgrqc", probs.astype(v.dtype), v[:, :, first:stop])
        mixed.append((out / total).astype(query.dtype))
        normalisers.append(peak + jnp.log(total))
    mixed = checkpoint_name(_by_position(jnp.concatenate(mixed, axis=3)), "attention_mixed")
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), "attention_normaliser")
    return mixed, (query, key, value, segment_ids, mixed, normaliser)


def _attend_backward(window, residuals, d_mixed):
    query, key, value, segment_ids, mixed, normaliser = residuals
    groups, scale = key.shape[2], query.shape[-1] ** -0.5
    q, k, v = _by_head(query, groups), _by_head(key), _by_head(value)
    mixed, d_mixed = _by_head(mixed, groups), _by_head(d_mixed, groups)
    # Σ over keys of prob · d_prob, which the softmax's gradient subtracts, is d_mixed · mixed.
    drift = d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)
    drift = jnp.sum(drift, axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    # Scores lie as [s, r, q]: of the five products one then has to transpose them, not two.
    turned = lambda x: jnp.moveaxis(x, 4, 2)  # noqa: E731
    for start, stop, first in _blocks(q.shape[3], window):
        block = lambda x: x[:, :, :, start:stop]  # noqa: B023, E731
        keys = (slice(None), slice(None), slice(first, stop))
        visible = turned(_visible(start, stop, first, window, segment_ids))
        scores = _contract(k[keys], block(q), (3, 4))
        probs = jnp.where(visible, jnp.exp(scores * scale - turned(block(normaliser))), 0)
        d_probs = _contract(v[keys], block(d_mixed), (3, 4))
        d_scores = (probs * (d_probs - turned(block(drift))) * scale).astype(q.dtype)
        d_q.append(_contract(d_scores, k[keys], (2, 2)))
        d_k = d_k.at[keys].add(_contract(d_scores, block(q), ((3, 4), (2, 3))))
        probs = probs.astype(v.dtype)
        d_v = d_v.at[keys].add(_contract(probs, block(d_mixed), ((3, 4), (2, 3))))
    d_q = jnp.concatenate([x.astype(query.dtype) for x in d_q], axis=3)
    d_k, d_v = (jnp.swapaxes(x.astype(key.dtype), 1, 2) for x in (d_k, d_v))
    return _by_position(d_q), d_k, d_v, None


attend.defvjp(_attend_forward, _attend_backward)


def _blocks(length, window):
    """(start, stop) of each block of queries, and the first key that any of them sees."""
    size = max(SHORTEST, -(-length // BLOCKS))
    for start in range(0, length, size):
        first = 0 if window is None else max(0, start - window + 1)
        yield start, min(start + size, length), first


def _visible(start, stop, first, window, segment_ids):
    """Whether a block's queries see keys first … stop: bool [b or 1, 1, 1, q, s]."""
    queries, keys = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    visible = visible[None, None, None]
    if segment_ids is not None:
        same = segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]
        visible &= same[:, None, None]
    return visible


def _by_head(x, groups=None):
    """[b, l, h, c] → [b, h, l, c]; with groups → [b, g, r, l, c]."""
    if groups is None:
        return jnp.swapaxes(x, 1, 2)
    b, length, heads, width = x.shape
    return jnp.transpose(x.reshape(b, length, groups, heads // groups, width), (0, 2, 3, 1, 4))


def _by_position(x):
    """[b, g, r, l, c] → [b, l, h, c]."""
    b, groups, repeats, length, width = x.shape
    return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(b, length, groups * repeats, width)


def _product(letters, x, y):
    return jnp.einsum(letters, x, y, preferred_element_type=jnp.float32)


def _contract(x, y, axes):
    """The product over these axes of x and of y, batched over [b, g], in dot_general's own order of
    the axes that are left: einsum may swap x and y, and the result then has to be transposed."""
    axes = tuple((a,) if isinstance(a, int) else a for a in axes)
    return jax.lax.dot_general(x, y, (axes, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


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
            projected = dense.product(x, kernel)
            if self.clip_before_qk_norm:
                projected = self._clip(projected)
            if self.qk_norm and name != "value":
                if self.qk_norm_per_head:
                    projected = projected.reshape(b, length, count, self.head_dim)
                projected = norms.RMSNorm(self.norm_eps, name=f"{name}_norm")(projected)
            if not self.clip_before_qk_norm:
                projected = self._clip(projected)
            heads[name] = projected.reshape(b, length, count, self.head_dim)
        query, key = (
            rotary(heads[name], positions, theta=self.rope_theta) for name in ("query", "key")
        )
        mixed = attend(self.sliding_window, query, key, heads["value"], segment_ids)
        mixed = mixed.reshape(b, length, self.num_heads * self.head_dim)
        kernel = self.param("output", self.kernel_init, (mixed.shape[-1], d_model), jnp.float32)
        return sharding.constrain(dense.product(mixed, kernel), "batch", None, None)

    def _clip(self, x):
        return x if self.clip_qkv is None else jnp.clip(x, -self.clip_qkv, self.clip_qkv)
