import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import losses
from tests import oracles

FP32_SUM = 1e-5  # order of summation, relative to the largest value
BF16 = 0.02  # two roundings of 2⁻⁸ each

N, B, LENGTH, D, E, K, V = 3, 4, 5, 7, 11, 2, 13
CONVENTIONS = ("olmoe", "huggingface", "switch")


def _close(got, want, tolerance=FP32_SUM):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-6))


# Cross entropy


def _cross_entropy_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, LENGTH, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (B, LENGTH)), jnp.float32)
    return hidden, head, targets, weights


def _plain(hidden, head, targets, weights):
    log_probs = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head, precision="highest"))
    return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * weights)


@pytest.mark.parametrize("chunk_tokens", [1, B, 10**6])
def test_cross_entropy_and_its_gradient_equal_autodiff_for_any_chunk(monkeypatch, chunk_tokens):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets, weights = _cross_entropy_inputs()

    def run(f):
        scaled = lambda h, w: 0.3 * f(h, w, targets, weights)  # noqa: E731  a cotangent that is not 1
        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(hidden, head)

    (got, got_gradients), (want, want_gradients) = run(losses.cross_entropy_sum), run(_plain)
    _close(got, want)
    jax.tree.map(_close, got_gradients, want_gradients)
    _close(
        losses.cross_entropy_sum(hidden, head, targets, weights), want / 0.3
    )  # not differentiated


def test_chunks_bound_the_float32_logits(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", B)
    inputs = _cross_entropy_inputs()
    text = jax.jit(jax.grad(losses.cross_entropy_sum, argnums=(0, 1))).lower(*inputs).as_text()
    assert f"{B}x1x{V}xf32" in text and f"{B}x{LENGTH}x{V}xf32" not in text


def test_cross_entropy_of_bf16_is_close_to_float32():
    hidden, head, targets, weights = _cross_entropy_inputs(jnp.bfloat16)
    gradient = jax.value_and_grad(losses.cross_entropy_sum, argnums=(0, 1))
    got, (d_hidden, d_head) = gradient(hidden, head, targets, weights)
    want, (want_hidden, want_head) = jax.value_and_grad(_plain, argnums=(0, 1))(
        hidden.astype(jnp.float32), head, targets, weights
    )
    assert (got.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    _close(got, want, BF16)
    _close(d_hidden.astype(jnp.float32), want_hidden, BF16)
    _close(d_head, want_head, BF16)


def test_the_scale_of_the_loss_is_not_rounded_to_bf16():
    """1/1019 has more digits than bf16: rounded, it would bias the gradient of all but the head."""
    hidden, head, targets, weights = _cross_entropy_inputs(jnp.bfloat16)

    def gradient(scale):
        scaled = lambda h: scale * losses.cross_entropy_sum(h, head, targets, weights)  # noqa: E731
        return np.asarray(jax.grad(scaled)(hidden), np.float64)

    one, scaled = gradient(1.0), gradient(1 / 1019)
    used = np.abs(one) > 1e-3
    assert np.mean(scaled[used] * 1019 / one[used]) == pytest.approx(1, abs=1e-3)


def test_masked_positions_are_as_good_as_removed():
    hidden, head, targets, _ = _cross_entropy_inputs()
    weights = jnp.ones((B, LENGTH)).at[:, 3:].set(0)
    poisoned = hidden.at[:, 3:].set(1e4)
    run = jax.value_and_grad(losses.cross_entropy_sum)
    loss, gradient = run(poisoned, head, targets, weights)
    want, want_gradient = run(hidden[:, :3], head, targets[:, :3], weights[:, :3])
    _close(loss, want)
    _close(gradient[:, :3], want_gradient)
    assert (np.asarray(gradient[:, 3:]) == 0).all()


def test_nothing_but_masked_positions_gives_zero():
    hidden, head, targets, weights = _cross_entropy_inputs()
    loss, gradient = jax.value_and_grad(losses.cross_entropy_sum)(
        hidden, head, targets, weights * 0
    )
    assert loss == 0 and (np.asarray(gradient) == 0).all()


def test_cross_entropy_of_tokens_equals_numpy():
    rng = np.random.default_rng(1)
    hidden, head, _, _ = _cross_entropy_inputs()
    tokens, mask = rng.integers(0, V, (B, LENGTH)), rng.random((B, LENGTH)) < 0.6
    targets, weights = losses.next_token_targets(jnp.asarray(tokens), jnp.asarray(mask))
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    want, count = oracles.cross_entropy(logits, tokens, mask)
    _close(losses.cross_entropy_sum(hidden, head, targets, weights), want)
    assert weights.sum() == count
    nats = losses.token_losses(hidden, head, targets)
    _close(
        nats,
        oracles.logsumexp(logits)
        - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0],
    )


def test_targets_are_the_next_tokens_and_the_last_position_has_none():
    tokens = jnp.asarray([[5, 6, 7], [1, 2, 3]])
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    targets, weights = losses.next_token_targets(tokens, mask)
    np.testing.assert_array_equal(targets[:, :2], [[6, 7], [2, 3]])
    np.testing.assert_array_equal(weights, [[1, 0, 0], [1, 1, 0]])


# Load-balancing loss


def _routing_inputs(seed=0):
    """Unbalanced logits, their top-k, and an uneven mask with one empty row."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(N, B, LENGTH, E)) + np.linspace(0, 2, E)).astype(np.float32)
    mask = np.arange(LENGTH) < np.array([[LENGTH], [2], [0], [3]])
    ids = np.stack([oracles.token_choice(layer, mask, K, False)[0] for layer in logits])
    return logits, ids, mask


def _balance(logits, ids, mask, convention, group, k=K, scores="softmax"):
    statistics = losses.routing_statistics(
        jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(mask), convention=convention,
        group=group, scores=scores,
    )  # fmt: skip
    return losses.load_balancing_loss(statistics, convention=convention, num_experts_per_token=k)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_load_balancing_equals_numpy(convention, group, scores):
    logits, ids, mask = _routing_inputs()
    want = oracles.load_balancing(logits, ids, mask, convention, group, scores)
    _close(_balance(logits, ids, mask, convention, group, scores=scores), want)


def test_the_conventions_and_groups_differ_on_these_inputs():
    logits, ids, mask = _routing_inputs()
    values = [float(_balance(logits, ids, mask, c, g)) for c in CONVENTIONS for g in (0, 1, 2)]
    assert len({round(v, 4) for v in values}) == len(values)


@pytest.mark.parametrize(("convention", "value"), [("olmoe", 1), ("switch", 1), ("huggingface", K)])
def test_uniform_probabilities_are_balanced(convention, value):
    """Whatever is chosen: with equal probabilities Σ f · P is 1 / E times Σ f."""
    _, ids, mask = _routing_inputs()
    _close(_balance(np.zeros((N, B, LENGTH, E)), ids, mask, convention, 0), value)
    assert losses.balanced_value(convention, K) == value


@pytest.mark.parametrize(
    ("convention", "value"), [("olmoe", E / K), ("huggingface", E), ("switch", E)]
)
def test_the_same_experts_with_all_the_mass(convention, value):
    """k experts share the mass evenly: E / k under `olmoe`. Under `switch` one has it all."""
    logits = np.full((N, B, LENGTH, E), -50.0)
    logits[..., :K] = 0
    if convention == "switch":
        logits[..., 1:] = -50
    ids = np.broadcast_to(np.arange(K), (N, B, LENGTH, K))
    _close(_balance(logits, ids, np.ones((B, LENGTH), bool), convention, 0), value)


def test_huggingface_pools_the_layers_and_olmoe_does_not():
    """Layer 0 uses one expert, layer 1 the other: balanced when pooled, worst per layer."""
    logits = np.full((2, 1, 3, 2), -50.0)
    logits[0, ..., 0] = logits[1, ..., 1] = 0
    ids = logits.argmax(-1, keepdims=True)
    mask = np.ones((1, 3), bool)
    _close(_balance(logits, ids, mask, "huggingface", 0, k=1), 1)
    _close(_balance(logits, ids, mask, "olmoe", 0, k=1), 2)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_padding_counts_nowhere(convention):
    logits, ids, mask = _routing_inputs()
    other = np.where(mask[..., None], logits, 7 * logits[..., ::-1])
    want = _balance(logits, ids, mask, convention, 2)
    _close(_balance(other, np.where(mask[..., None], ids, 3), mask, convention, 2), want)
    nothing = np.zeros_like(mask)
    assert _balance(logits, ids, nothing, convention, 2) == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("group", [0, 1, 2])
def test_parts_of_micro_batches_add_up_to_the_batch(convention, group):
    logits, ids, mask = _routing_inputs()
    options = {"convention": convention, "group": group}
    whole = losses.routing_statistics(logits, ids, mask, **options)
    num_groups = jnp.sum(whole.tokens > 0)
    total = 0
    for rows in (slice(0, 2), slice(2, 4)):
        part = losses.routing_statistics(logits[:, rows], ids[:, rows], mask[rows], **options)
        total += losses.load_balancing_loss(
            part, convention=convention, num_experts_per_token=K, num_groups=num_groups,
            whole_batch=None if group else whole,
        )  # fmt: skip
    _close(total, _balance(logits, ids, mask, convention, group))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_load_balancing_gradient_goes_through_the_probabilities_only(convention):
    logits, ids, mask = _routing_inputs()
    gradient = jax.grad(lambda x: _balance(x, ids, mask, convention, 0))(jnp.asarray(logits))
    direction = np.random.default_rng(2).normal(size=logits.shape)
    step = 1e-4  # small enough for every arg-max to stay: f is then constant
    sides = [
        oracles.load_balancing(logits + sign * step * direction, ids, mask, convention, 0)
        for sign in (1, -1)
    ]
    _close(np.sum(np.asarray(gradient) * direction), (sides[0] - sides[1]) / (2 * step), 1e-4)


# Router z-loss


def test_router_z_loss_of_zero_logits_is_the_square_of_log_experts():
    z = losses.router_z_loss(jnp.zeros((N, B, LENGTH, 64)), jnp.ones((B, LENGTH), bool))
    assert (
        float(z) == pytest.approx(math.log(64) ** 2, rel=1e-6) == pytest.approx(17.2963, abs=1e-4)
    )


def test_router_z_loss_equals_numpy_and_adds_up():
    logits, _, mask = _routing_inputs()
    _close(losses.router_z_loss(logits, mask), oracles.router_z(logits, mask))
    parts = [
        losses.router_z_loss(logits[:, rows], mask[rows], num_tokens=mask.sum())
        for rows in (slice(0, 1), slice(1, 4))
    ]
    _close(sum(parts), oracles.router_z(logits, mask))


def test_router_z_loss_is_stable_and_zero_without_tokens():
    logits, _, mask = _routing_inputs()
    large, gradient = jax.value_and_grad(losses.router_z_loss)(jnp.asarray(logits) + 1000, mask)
    assert np.isfinite(large) and np.isfinite(gradient).all() and large > 1e6
    assert losses.router_z_loss(logits, np.zeros_like(mask)) == 0
    assert losses.router_z_loss(jnp.asarray(logits, jnp.bfloat16), mask).dtype == jnp.float32
