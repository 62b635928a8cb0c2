import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.model import attention
from tests import oracles

FP32_SUM = 2e-5  # order of summation; values are of order 1
BF16 = 0.02  # two roundings of 2⁻⁸ each

B, LENGTH, D, HEADS, KV_HEADS, HEAD_DIM, THETA = 2, 7, 11, 6, 3, 4, 100.0


def _module(num_kv_heads=KV_HEADS, qk_norm=True, clip_qkv=None, window=None, **changes):
    options = {"qk_norm_per_head": False, "clip_before_qk_norm": False} | changes
    return attention.Attention(
        num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, rope_theta=THETA,
        qk_norm=qk_norm, clip_qkv=clip_qkv, sliding_window=window, norm_eps=1e-5,
        kernel_init=nn.initializers.normal(0.7), **options,
    )  # fmt: skip


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, LENGTH, D)).astype(np.float32), np.tile(np.arange(LENGTH), (B, 1))


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, x, positions, segments=None):
    return module.apply({"params": params}, x, positions, segments)


@pytest.mark.parametrize(
    ("num_kv_heads", "qk_norm", "clip"),
    [(HEADS, True, None), (KV_HEADS, True, 0.4), (KV_HEADS, False, 0.4), (1, False, None)],
)
def test_attention_equals_numpy(num_kv_heads, qk_norm, clip):
    module = _module(num_kv_heads, qk_norm, clip)
    x, positions = _inputs()
    params = oracles.random_params(module, x, positions, std=0.7)
    want = oracles.attention(
        x, params, num_heads=HEADS, num_kv_heads=num_kv_heads, theta=THETA, clip=clip
    )
    np.testing.assert_allclose(
        _apply(module, params, x, positions), want, atol=FP32_SUM * np.abs(want).max()
    )


def test_norm_covers_the_full_projection_before_the_split_into_heads():
    module = _module()
    params = oracles.random_params(module, *_inputs())
    assert params["query_norm"]["scale"].shape == (HEADS * HEAD_DIM,)
    assert params["key_norm"]["scale"].shape == (KV_HEADS * HEAD_DIM,)


@pytest.mark.parametrize("num_kv_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("clip_first", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_norms_of_heads_and_order_of_the_clamp_equal_numpy(num_kv_heads, clip_first, per_head):
    x, positions = _inputs()
    module, swapped = (
        _module(num_kv_heads, clip_qkv=0.8, qk_norm_per_head=per_head, clip_before_qk_norm=first)
        for first in (clip_first, not clip_first)
    )
    params = oracles.random_params(module, x, positions, std=0.7)
    widths = [HEAD_DIM] * 2 if per_head else [HEADS * HEAD_DIM, num_kv_heads * HEAD_DIM]
    assert [params[name]["scale"].size for name in ("query_norm", "key_norm")] == widths
    want = oracles.attention(
        x, params, num_heads=HEADS, num_kv_heads=num_kv_heads, theta=THETA, clip=0.8,
        clip_first=clip_first,
    )  # fmt: skip
    got = _apply(module, params, x, positions)
    np.testing.assert_allclose(got, want, atol=FP32_SUM * np.abs(want).max())
    assert np.abs(_apply(swapped, params, x, positions) - got).max() > 0.01


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("num_kv_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("window", [1, 3, LENGTH - 1, LENGTH + 2])
def test_sliding_window_equals_numpy(window, num_kv_heads, segmented):
    x, positions = _inputs()
    segments = np.repeat([[5, 2]] * B, (2, 5), axis=1) if segmented else None
    module = _module(num_kv_heads, window=window)
    params = oracles.random_params(module, x, positions, std=0.7)
    want = oracles.attention(
        x, params, num_heads=HEADS, num_kv_heads=num_kv_heads, theta=THETA, window=window,
        segments=segments,
    )  # fmt: skip
    got = _apply(module, params, x, positions, segments)
    np.testing.assert_allclose(got, want, atol=FP32_SUM * np.abs(want).max())


def _reach(module):
    """[output position, input position]: largest derivative."""
    x, positions = _inputs()
    params = oracles.random_params(module, x, positions, std=0.7)

    def outputs(x):
        return module.apply({"params": params}, x[None], positions[:1])[0].sum(-1)

    return np.abs(jax.jit(jax.jacrev(outputs))(x[0])).max(-1)


@pytest.mark.parametrize("window", [1, 3])
def test_a_sliding_window_ends_the_gradients_reach(window):
    reach = _reach(_module(window=window))
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    np.testing.assert_array_equal(reach > 0, (distance >= 0) & (distance < window))


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    x, positions = _inputs()
    grouped, full = _module(KV_HEADS, qk_norm=False), _module(HEADS, qk_norm=False)
    params = oracles.random_params(grouped, x, positions, std=0.7)
    repeated = dict(params)
    for name in ("key", "value"):
        per_head = params[name].reshape(D, KV_HEADS, HEAD_DIM)
        repeated[name] = np.repeat(per_head, HEADS // KV_HEADS, axis=1).reshape(D, -1)
    np.testing.assert_allclose(
        _apply(grouped, params, x, positions), _apply(full, repeated, x, positions), atol=FP32_SUM
    )


def test_no_gradient_from_the_future_and_some_from_all_of_the_past():
    reach = _reach(_module())
    assert (reach[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (reach[np.tril_indices(LENGTH)] > 0).all()


def test_segments_equal_separate_sequences():
    module = _module()
    x, _ = _inputs()
    lengths = (3, 4)
    segments = np.repeat([[5, 2]] * B, lengths, axis=1)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (B, 1))
    params = oracles.random_params(module, x, positions, std=0.7)
    packed = _apply(module, params, x, positions, segments)
    alone = [
        _apply(module, params, x[:, :3], positions[:, :3]),
        _apply(module, params, x[:, 3:], positions[:, 3:]),
    ]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=FP32_SUM)


# Blocks of queries and the gradient

SEGMENTS = np.repeat([[5, 2]] * B, (2, 5), axis=1)


def _plain(window, query, key, value, segments):
    """Softmax over all scores at once, for autodiff."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhc,bshc->bhqs", query, key, precision="highest") / HEAD_DIM**0.5
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    visible = (distance >= 0) & (distance < (window or LENGTH))
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])[:, None]
    probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bhqs,bshc->bqhc", probs, value, precision="highest")


def _heads(dtype=jnp.float32, num_kv_heads=KV_HEADS):
    rng = np.random.default_rng(6)
    shapes = [(B, LENGTH, heads, HEAD_DIM) for heads in (HEADS, num_kv_heads, num_kv_heads, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _pulled(function, window, arrays, segments):
    """Result and gradients for one cotangent; no two of its entries are equal."""
    *arguments, cotangent = arrays
    run = lambda *qkv: function(window, *qkv, segments)  # noqa: E731
    out, pull = jax.vjp(run, *arguments)
    return out, *pull(cotangent.astype(out.dtype))


@pytest.mark.parametrize(
    ("blocks", "window", "num_kv_heads", "segments"),
    [
        (1, None, HEADS, None),
        (3, None, KV_HEADS, None),
        (LENGTH, 2, 1, None),
        (4, 3, KV_HEADS, SEGMENTS),
        (4, None, HEADS, SEGMENTS),
    ],
)
def test_attention_and_its_gradient_equal_autodiff_for_any_blocks(
    monkeypatch, blocks, window, num_kv_heads, segments
):
    monkeypatch.setattr(attention, "BLOCKS", blocks)
    monkeypatch.setattr(attention, "SHORTEST", 1)
    arrays = _heads(num_kv_heads=num_kv_heads)
    got = _pulled(attention.attend, window, arrays, segments)
    want = _pulled(_plain, window, arrays, segments)
    for name, x, y in zip(("mixed", "query", "key", "value"), got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=FP32_SUM * np.abs(y).max(), err_msg=name)


def test_attention_of_bf16_is_close_to_float32_and_keeps_its_dtype(monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST", 1)
    arrays = _heads(jnp.bfloat16)
    got = _pulled(attention.attend, None, arrays, None)
    want = _pulled(_plain, None, arrays, None)
    for name, x, y in zip(("mixed", "query", "key", "value"), got, want, strict=True):
        assert x.dtype == jnp.bfloat16, name
        y = np.asarray(y, np.float32)
        np.testing.assert_allclose(
            np.asarray(x, np.float32), y, atol=BF16 * np.abs(y).max(), err_msg=name
        )


def test_large_scores_do_not_overflow():
    query, key, value, _ = _heads()
    out, *gradients = _pulled(attention.attend, None, (300 * query, 300 * key, value, query), None)
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    np.testing.assert_allclose(out[:, 0], np.repeat(value[:, 0], HEADS // KV_HEADS, axis=1))


def test_neither_all_scores_nor_a_second_forward_pass(monkeypatch):
    """In a layer that is computed again, the named results are kept: two products per block go
    forward, five back."""
    monkeypatch.setattr(attention, "SHORTEST", 1)
    *arguments, cotangent = _heads()
    policy = jax.checkpoint_policies.save_only_these_names(*attention.SAVED_NAMES)

    def gradient(*qkv):
        layer = jax.checkpoint(functools.partial(attention.attend, None), policy=policy)
        return jax.vjp(lambda *qkv: layer(*qkv, None), *qkv)[1](cotangent)

    text = jax.jit(gradient).lower(*arguments).as_text()
    assert text.count("stablehlo.dot_general") == 7 * attention.BLOCKS
    assert f"{LENGTH}x{LENGTH}xf32" not in text


def test_rotary_equals_numpy_and_keeps_dtype():
    rng = np.random.default_rng(3)
    x, positions = rng.normal(size=(B, LENGTH, 3, 10)), rng.integers(0, 4096, (B, LENGTH))
    want = oracles.rotary(x, positions, 10000.0)
    rotated = attention.rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta=10000.0)
    np.testing.assert_allclose(
        rotated, want, atol=1e-3
    )  # an angle of 4096 rad has 2⁻¹² rad in fp32
    assert (
        attention.rotary(jnp.asarray(x, jnp.bfloat16), positions, theta=1e4).dtype == jnp.bfloat16
    )


def test_rotary_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(4)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 6)), jnp.float32)

    def score(query_position, key_position):
        turned = [
            attention.rotary(a, jnp.full((1, 1), p), theta=THETA)
            for a, p in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(13, 8) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(13, 8) != pytest.approx(score(13, 9), abs=1e-2)
