"""Why weights differ that should be equal: the mistakes that converters make, tried one by one.

`of_tensor` names what was done to the numbers of one array; `alternatives` gives models that differ
from a model by one such mistake, for logits that do not agree although the numbers do.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from olmoe_jax.checkpoints import layout

THETAS = (1e4, 5e5, 1e6)  # RoPE bases of the known families
EPSILONS = (1e-5, 1e-6)


def bits(array) -> np.ndarray:
    """The array's elements as unsigned integers, so that NaN equals itself."""
    return array.view(f"u{array.dtype.itemsize}")


def of_tensor(want, got, *, head_dim, others=()) -> str:
    """The likely cause why `got` is not `want`, in words.

    Args:
      want, got: arrays of one shape [i, j] or [i] and one dtype.
      head_dim: width of an attention head.
      others: (place, array) of the arrays that `got` may hold instead.
    """
    want, got = np.ascontiguousarray(want), np.ascontiguousarray(got)
    if not bits(got).any():
        return "never written: only zeros"
    if len(rest := np.flatnonzero(bits(want).ravel() != bits(got).ravel())) == 1:
        changed = int(bits(want).ravel()[rest[0]] ^ bits(got).ravel()[rest[0]])
        return "one flipped bit" if changed.bit_count() == 1 else "a single value changed"
    if want.ndim == 2:
        as_ours, as_theirs = got.reshape(want.T.shape), got.T.reshape(want.shape)
        if _equal(as_ours, want.T) or _equal(as_theirs, want):
            return "transposed"
    for place, array in others:
        if array.shape == want.shape and _equal(array, got):
            return f"permuted: it holds {place}"
        if array.shape == want.T.shape and _equal(array, got.T):
            return f"permuted and transposed: it holds {place}"
    if want.ndim == 2 and got.shape[1] % head_dim == 0:
        for text, order in _rotary_orders(want.shape[1], head_dim):
            if _equal(want[:, order], got):
                return f"columns in the order of {text}"
    for text, a, b in (("rows", want, got), ("columns", want.T, got.T)):
        if moved := _other_order(a, b):
            return f"{text} permuted: number {moved[0]} is number {moved[1]} of the input"
    if want.dtype == np.float32:
        for name in ("bfloat16", "float16"):
            with np.errstate(over="ignore"):
                short = want.astype(jnp.dtype(name)).astype(np.float32)
            if _equal(short, got):
                return f"rounded to {name} on the way"
    step = bits(want).astype(np.int64) - bits(got).astype(np.int64)
    if np.abs(step).max() == 1:
        return "rounded otherwise than to the nearest (all are neighbouring numbers)"
    return (
        "none of: transposed, permuted, rows or columns in another order, another array, rounded; "
        "was the input changed since?"
    )


def _equal(a, b) -> bool:
    return a.shape == b.shape and np.array_equal(bits(a), bits(b))


def _other_order(want, got) -> tuple[int, int] | None:
    """If both have the same rows: the first that is elsewhere in `want`, and where. Else None."""
    a, b = ([r.tobytes() for r in np.ascontiguousarray(x)] for x in (want, got))
    if sorted(a) != sorted(b):
        return None
    return next((i, a.index(y)) for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def _rotary_orders(width, head_dim):
    """(text, order of columns): half-split pairs (i, i + head_dim/2) ↔ neighbours (2i, 2i + 1)."""
    columns = np.arange(width)
    split = columns.reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()
    neighbours = columns.reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()
    yield "rotary pairs that are neighbours (as Meta's Llama has them)", split
    yield "rotary pairs split in halves, from neighbours", neighbours


def alternatives(config, params):
    """(change in words, ModelConfig, params) of models that differ from this one by one mistake.

    Args:
      config: the ModelConfig.
      params: nested dict in the layout of training (layers stacked); nothing in it is overwritten.
    """
    for text, changes in _other_options(config):
        yield text, dataclasses.replace(config, **changes), params
    leaves = layout.flatten(params)
    if not config.tie_embeddings:
        tied = {n: x for n, x in leaves.items() if n != "lm_head"}
        yield (
            "the embedding as the head (tied)",
            dataclasses.replace(config, tie_embeddings=True),
            layout.unflatten(tied),
        )
    if config.qk_norm_per_head:
        yield (
            "QK-norm over the full width instead of per head",
            dataclasses.replace(config, qk_norm_per_head=False),
            layout.unflatten(_tiled(config, leaves)),
        )
    for text, changed in _other_orders(config, leaves):
        yield text, config, layout.unflatten(changed)


def _other_options(c):
    """(text, fields of ModelConfig) that leave the parameters as they are."""
    for theta in THETAS:
        if theta != c.rope_theta:
            yield f"rope_theta={theta:g} instead of {c.rope_theta:g}", {"rope_theta": theta}
    if c.clip_qkv is not None:
        if c.qk_norm:
            before, after = "q, k, v clipped before QK-norm", "q, k, v clipped after QK-norm"
            changes = {"clip_before_qk_norm": not c.clip_before_qk_norm}
            yield after if c.clip_before_qk_norm else before, changes
        yield "clip_qkv left out", {"clip_qkv": None, "clip_before_qk_norm": False}
    if c.sliding_window is not None:
        yield "the sliding window left out", {"sliding_window": None}
        for step in (-1, 1):
            width = c.sliding_window + step
            if width > 0:
                yield f"a sliding window of {width}", {"sliding_window": width}
    position = "post" if c.norm_position == "pre" else "pre"
    yield f"norms in {position}-norm order", {"norm_position": position}
    if c.num_experts:
        text = "expert weights" + (" not" if c.normalize_expert_weights else "") + " renormalised"
        yield text, {"normalize_expert_weights": not c.normalize_expert_weights}
        for k in (1, 2, 4, 8):
            if k <= c.num_experts and k != c.num_experts_per_token:
                yield f"{k} experts per token", {"num_experts_per_token": k}
    if c.qk_norm:
        off = {"qk_norm": False, "qk_norm_per_head": False, "clip_before_qk_norm": False}
        yield "QK-norm left out", off
    for eps in EPSILONS:
        if eps != c.norm_eps:
            yield f"norm_eps={eps:g} instead of {c.norm_eps:g}", {"norm_eps": eps}


def _tiled(config, leaves):
    heads = {"query_norm": config.num_heads, "key_norm": config.num_kv_heads}
    out = dict(leaves)
    for name, leaf in leaves.items():
        for norm, count in heads.items():
            if f"/{norm}/" in name:
                out[name] = jnp.tile(leaf, (1, count))
    return out


def _other_orders(config, leaves):
    """(text, {name: leaf}) with the same numbers in other places."""
    swaps = (
        ("gate and up projections exchanged", "/w_gate", "/w_up"),
        ("attention_norm and ffn_norm exchanged", "/attention_norm/", "/ffn_norm/"),
        ("query and key norms exchanged", "/query_norm/", "/key_norm/"),
    )
    for text, a, b in swaps:
        pairs = {n: n.replace(a, b) for n in leaves if a in n}
        pairs |= {other: n for n, other in pairs.items()}
        if pairs and all(leaves[n].shape == leaves[pairs[n]].shape for n in pairs):
            yield text, {n: leaves[pairs.get(n, n)] for n in leaves}
    experts = [n for n in leaves if "/moe/w_" in n]
    layers = [n for n in leaves if layout.is_stacked(n)] if config.moe_every == 1 else []
    for what, names, axis in (("experts", experts, 1), ("layers", layers, 0)):
        count = leaves[names[0]].shape[axis] if names else 0
        if count > 10:
            as_text = np.array(sorted(range(count), key=str))
            for order in (as_text, np.argsort(as_text)):
                moved = {n: jnp.take(leaves[n], order, axis) for n in names}
                yield f"{what} in the order of their numbers as text (0, 1, 10, …)", leaves | moved
    for text, order in _rotary_orders(config.head_size, config.head_size):
        yield text, {n: _reordered(config, n, x, order) for n, x in leaves.items()}


def _reordered(config, name, leaf, order):
    """Queries and keys with the columns of each head in another order."""
    if not any(f"/attention/{part}" in name for part in ("query", "key")):
        return leaf
    if leaf.shape[-1] % config.head_size:
        return leaf
    heads = leaf.reshape(*leaf.shape[:-1], -1, config.head_size)
    return heads[..., order].reshape(leaf.shape)


def rounded(array, dtype):
    """A NumPy array cast to `dtype`, to nearest even; too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(jnp.dtype(dtype))
