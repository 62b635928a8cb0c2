"""References in NumPy, float64, written from the formulas with loops: what tests compare with.

Letters as in the package: b batch, l length, t tokens, d d_model, h heads, g kv_heads, c head_dim,
e experts, k chosen experts, f d_ff, v vocab, n layers.
"""

import math
import typing

import jax
import numpy as np


def random_params(module, *inputs, seed=0, std=0.3):
    """Random float32 parameters of a Flax module, norm scales around 1; the module is not run."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]

    def one(path, leaf):
        mean = 1 if path[-1].key == "scale" else 0
        return (mean + std * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def softmax(x):
    """exp(x) / Σ exp(x) over the last axis."""
    x = np.asarray(x, np.float64)
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def logsumexp(x):
    """log Σ exp(x) over the last axis."""
    x = np.asarray(x, np.float64)
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1))


def sigmoid(x):
    """1 / (1 + exp(−x))."""
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    """x / sqrt(mean(x²) + eps) · scale over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, eps):
    """(x − mean) / sqrt(variance + eps) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def rotary(x, positions, theta):
    """Complex rotation of x[…, i] + i·x[…, i + c/2] by position · theta^(−2i/c); x [b, l, h, c]."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def attention(
    x, params, *, num_heads, num_kv_heads, theta, eps=1e-5, clip=None, clip_first=False,
    window=None, positions=None, segments=None,
):  # fmt: skip
    """Causal attention of x [b, l, d]; one query at a time. A norm's scale says what it covers."""
    b, length, _ = x.shape
    if positions is None:
        positions = np.tile(np.arange(length), (b, 1))
    if segments is None:
        segments = np.zeros((b, length), int)
    q, k, v = (x @ np.asarray(params[name], np.float64) for name in ("query", "key", "value"))
    if clip is not None and clip_first:
        q, k, v = np.clip(q, -clip, clip), np.clip(k, -clip, clip), np.clip(v, -clip, clip)
    c = q.shape[-1] // num_heads
    if "query_norm" in params:
        q_scale, k_scale = (params[name]["scale"] for name in ("query_norm", "key_norm"))
        q = rms_norm(q.reshape(b, length, -1, len(q_scale)), q_scale, eps)
        k = rms_norm(k.reshape(b, length, -1, len(k_scale)), k_scale, eps)
    if clip is not None and not clip_first:
        q, k, v = np.clip(q, -clip, clip), np.clip(k, -clip, clip), np.clip(v, -clip, clip)
    q = rotary(q.reshape(b, length, num_heads, c), positions, theta)
    k = rotary(k.reshape(b, length, num_kv_heads, c), positions, theta)
    v = v.reshape(b, length, num_kv_heads, c)
    out = np.zeros((b, length, num_heads, c))
    for row in range(b):
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            seen = [s for s in range(first, t + 1) if segments[row, s] == segments[row, t]]
            for head in range(num_heads):
                group = head // (num_heads // num_kv_heads)
                scores = np.array([q[row, t, head] @ k[row, s, group] for s in seen]) / math.sqrt(c)
                out[row, t, head] = softmax(scores) @ v[row, seen, group]
    return out.reshape(b, length, -1) @ np.asarray(params["output"], np.float64)


def swiglu(x, w_gate, w_up, w_down):
    """(silu(x @ w_gate) · (x @ w_up)) @ w_down."""
    gate = x @ w_gate
    return (gate * sigmoid(gate) * (x @ w_up)) @ w_down


def scores_of(logits, scores):
    """The softmax over the last axis, or the sigmoid of each."""
    return softmax(logits) if scores == "softmax" else sigmoid(np.asarray(logits, np.float64))


def token_choice(logits, mask, k, normalize, scores="softmax", bias=0.0):
    """(ids, weights) [b, l, k] of the k largest scores + bias, ties to the lower id; padding −1.

    Weights are scores without the bias, and the ids of a token are in their order.
    """
    probs = scores_of(logits, scores)
    bias = np.broadcast_to(bias, probs.shape[-1])
    ids, weights = np.full((*probs.shape[:2], k), -1), np.zeros((*probs.shape[:2], k))
    for row, t in np.argwhere(mask):
        p = probs[row, t]
        best = sorted(range(len(p)), key=lambda e: (-(p[e] + bias[e]), e))[:k]
        best.sort(key=lambda e: -p[e])
        ids[row, t], weights[row, t] = best, p[best]
        if normalize:
            weights[row, t] /= p[best].sum()
    return ids, weights


def expert_choice(logits, mask, k, normalize, group, scores="softmax"):
    """(selected bool, weights) [b, l, e]: an expert's k · tokens // experts best of a group."""
    b, length, experts = logits.shape
    probs, group = scores_of(logits, scores), group or b
    selected = np.zeros(probs.shape, bool)
    for first in range(0, b, group):
        places = [(r, t) for r in range(first, first + group) for t in range(length)]
        count = max(1, k * len(places) // experts)
        real = [place for place in places if mask[place]]
        for e in range(experts):
            for place in sorted(real, key=lambda p: -probs[(*p, e)])[:count]:
                selected[(*place, e)] = True
    weights = np.where(selected, probs, 0)
    if normalize:
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return selected, weights


def capacity_kept(expert_ids, num_experts, num_groups, capacity):
    """bool [t, k]: the choices that still find room; first choices of a whole group come first."""
    kept = np.zeros(expert_ids.shape, bool)
    for tokens in np.split(np.arange(len(expert_ids)), num_groups):
        room = np.full(num_experts, capacity)
        for rank in range(expert_ids.shape[1]):
            for t in tokens:
                e = expert_ids[t, rank]
                if e >= 0 and room[e] > 0:
                    room[e] -= 1
                    kept[t, rank] = True
    return kept


def experts(x, expert_ids, factors, weights):
    """y [t, d]: for every token, Σ over its experts of factor · SwiGLU; x [t, d], ids [t, k]."""
    y = np.zeros(x.shape)
    for t, (ids, row) in enumerate(zip(expert_ids, factors, strict=True)):
        for e, factor in zip(ids, row, strict=True):
            if e >= 0:
                y[t] += factor * swiglu(
                    x[t], *(weights[w][e] for w in ("w_gate", "w_up", "w_down"))
                )
    return y


def experts_gradients(x, expert_ids, factors, weights, d_y):
    """(d_x, d_factors, d_weights) of Σ d_y · experts(…), by the chain rule, choice by choice."""
    d_x, d_factors = np.zeros(x.shape), np.zeros(factors.shape)
    d_weights = {name: np.zeros(w.shape) for name, w in weights.items()}
    for t, slot in np.argwhere(expert_ids >= 0):
        e, factor = expert_ids[t, slot], factors[t, slot]
        w_gate, w_up, w_down = (weights[name][e] for name in ("w_gate", "w_up", "w_down"))
        gate, up = x[t] @ w_gate, x[t] @ w_up
        s = sigmoid(gate)
        hidden = gate * s * up
        d_factors[t, slot] = d_y[t] @ (hidden @ w_down)
        d_weights["w_down"][e] += factor * np.outer(hidden, d_y[t])
        d_hidden = factor * (w_down @ d_y[t])
        d_gate, d_up = d_hidden * up * (s + gate * s * (1 - s)), d_hidden * gate * s
        d_weights["w_gate"][e] += np.outer(x[t], d_gate)
        d_weights["w_up"][e] += np.outer(x[t], d_up)
        d_x[t] += w_gate @ d_gate + w_up @ d_up
    return d_x, d_factors, d_weights


class Output(typing.NamedTuple):
    """logits [b, l, v], router_logits [n, b, l, e], expert_ids [n, b, l, k], layer_rms [layers]."""

    logits: np.ndarray
    router_logits: np.ndarray
    expert_ids: np.ndarray
    layer_rms: np.ndarray


def transformer(params, config, input_ids, *, mask=None, group=0, positions=None, segments=None):
    """The whole model, layer by layer."""
    params = _as_float64(params)
    b, length = input_ids.shape
    mask = np.ones((b, length), bool) if mask is None else mask
    x = params["embedding"][input_ids]
    router_logits, expert_ids, layer_rms = [], [], []

    def norm(x, scale):
        if config.norm == "layernorm_nonparametric":
            return layer_norm(x, config.norm_eps)
        return rms_norm(x, scale["scale"], config.norm_eps)

    for layer in range(config.num_layers):
        stack = params["layers"][f"block_{layer % config.moe_every}"]
        p = _index(stack, layer // config.moe_every)
        pre = config.norm_position == "pre"
        mixed = attention(
            norm(x, p.get("attention_norm")) if pre else x, p["attention"],
            num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, theta=config.rope_theta,
            eps=config.norm_eps, clip=config.clip_qkv, clip_first=config.clip_before_qk_norm,
            window=config.sliding_window, positions=positions, segments=segments,
        )  # fmt: skip
        x = x + (mixed if pre else norm(mixed, p.get("attention_norm")))
        h = norm(x, p.get("ffn_norm")) if pre else x
        if "ffn" in p:
            y = swiglu(h, p["ffn"]["w_gate"], p["ffn"]["w_up"], p["ffn"]["w_down"])
            x = x + (y if pre else norm(y, p.get("ffn_norm")))
            layer_rms.append(np.sqrt(np.mean(x**2)))
            continue
        moe = p["moe"]
        logits = h @ moe["router"]
        k, normalize = config.num_experts_per_token, config.normalize_expert_weights
        if config.router == "token_choice":
            bias = moe.get("router_bias", 0.0)
            ids, factors = token_choice(logits, mask, k, normalize, config.router_scores, bias)
        else:
            selected, factors = expert_choice(
                logits, mask, k, normalize, group, config.router_scores
            )
            ids = np.where(selected, np.arange(config.num_experts), -1)
        flat = [a.reshape(b * length, -1) for a in (h, ids, factors)]
        y = experts(*flat, moe).reshape(x.shape)
        if "shared" in moe:
            y += swiglu(h, *(moe["shared"][w] for w in ("w_gate", "w_up", "w_down")))
        x = x + (y if pre else norm(y, p.get("ffn_norm")))
        router_logits.append(logits)
        expert_ids.append(ids)
        layer_rms.append(np.sqrt(np.mean(x**2)))
    head = params.get("lm_head", params["embedding"])
    logits = norm(x, params.get("final_norm")) @ head.T
    return Output(logits, np.array(router_logits), np.array(expert_ids), np.array(layer_rms))


def cross_entropy(logits, tokens, loss_mask):
    """(Σ −log p(next token), number of targets) over the positions whose next token counts."""
    total, count = 0.0, 0
    for row in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            if loss_mask[row, t + 1]:
                total += logsumexp(logits[row, t]) - logits[row, t, tokens[row, t + 1]]
                count += 1
    return total, count


def load_balancing(router_logits, expert_ids, mask, convention, group, scores="softmax"):
    """The loss as each convention defines it, averaged over groups with a real token.

    router_logits [n, b, l, e], expert_ids [n, b, l, k] (−1: none), mask [b, l].
    """
    probs, b = scores_of(router_logits, scores), mask.shape[0]
    probs = probs / probs.sum(-1, keepdims=True)
    experts, k = probs.shape[-1], expert_ids.shape[-1]
    values = []
    for first in range(0, b, group or b):
        rows = slice(first, first + (group or b))
        if not mask[rows].any():
            continue
        shares, means = [], []
        for p, ids in zip(probs[:, rows], expert_ids[:, rows], strict=True):
            real_p, real_ids = p[mask[rows]], ids[mask[rows]]
            if convention == "switch":
                real_ids = real_p.argmax(-1)[:, None]
            count = np.array([(real_ids == e).sum() for e in range(experts)])
            shares.append(count / len(real_p) / (k if convention == "olmoe" else 1))
            means.append(real_p.mean(0))
        if (
            convention == "huggingface"
        ):  # all layers hold the same number of tokens: pooling is a mean
            values.append(experts * (np.mean(shares, 0) * np.mean(means, 0)).sum())
        else:
            values.append(
                experts * np.mean([(f * p).sum() for f, p in zip(shares, means, strict=True)])
            )
    return np.mean(values)


def router_z(router_logits, mask):
    """Mean over layers and real tokens of logsumexp²."""
    return np.mean([logsumexp(layer[mask]) ** 2 for layer in router_logits])


def _as_float64(tree):
    if isinstance(tree, dict):
        return {name: _as_float64(x) for name, x in tree.items()}
    return np.asarray(tree, np.float64)


def _index(tree, i):
    if isinstance(tree, dict):
        return {name: _index(x, i) for name, x in tree.items()}
    return tree[i]
