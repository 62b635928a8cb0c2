"""The losses: cross entropy, load-balancing loss, router z-loss.

Each returns a *part* of the batch's loss: a sum over the given tokens divided by a number that
belongs to the whole batch. So micro-batches add up to exactly the loss of the batch, on any mesh;
a caller with one micro-batch leaves the whole-batch arguments at their defaults.

Letters: n MoE layers, b batch, l length, e experts, k chosen experts, g groups, v vocab, d d_model.
"""

import typing

import jax
import jax.numpy as jnp

from olmoe_jax import sharding
from olmoe_jax.grouped_matmul import dense
from olmoe_jax.model import routing

# Tokens (per device) whose float32 logits exist at once. On two cores, vocabulary 4,096, chunks of
# 512 take 0.9 of the time of one chunk of 2,048: the logits stay nearer to the caches.
CHUNK_TOKENS = 512


def next_token_targets(tokens, loss_mask):
    """Targets of next-token prediction.

    Args:
      tokens: int32 [b, l].
      loss_mask: bool [b, l]; False: not a target.
    Returns:
      (int32 [b, l] targets, float32 [b, l] weights): target t is token t + 1; the last position
      has none.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    return targets, weights.astype(jnp.float32)


def _chunks(hidden, targets, weights):
    """Cuts along the length: [b, l, …] → [chunks, b, l / chunks, …]."""
    b, length = targets.shape
    mesh = jax.sharding.get_abstract_mesh()
    per_device = max(1, b // (1 if mesh.empty else sharding.batch_shards(mesh)))
    fits = [
        c
        for c in range(1, length + 1)
        if length % c == 0 and per_device * (length // c) <= CHUNK_TOKENS
    ]
    count = min(fits, default=length)
    split = lambda a: jnp.moveaxis(a.reshape(b, count, length // count, *a.shape[2:]), 1, 0)  # noqa: E731
    return split(hidden), split(targets), split(weights)


def _chunk_logits(hidden, head):
    """float32 logits of one chunk, [b, l, v]."""
    logits = jnp.einsum("bld,vd->blv", hidden, head, preferred_element_type=jnp.float32)
    return sharding.constrain(logits, "batch", None, "vocab")


def token_losses(hidden, head, targets):
    """−log p(target) of every position, without a gradient of its own: for validation.

    Args:
      hidden: [b, l, d].
      head: [v, d].
      targets: int32 [b, l].
    Returns:
      float32 [b, l], nats.
    """
    head = head.astype(hidden.dtype)
    h, t, _ = _chunks(hidden, targets, targets)

    def one_chunk(chunk):
        logits = _chunk_logits(chunk[0], head)
        target_logits = jnp.take_along_axis(logits, chunk[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits

    losses = jax.lax.map(one_chunk, (h, t))
    return jnp.moveaxis(losses, 0, 1).reshape(targets.shape)


@jax.custom_vjp
def cross_entropy_sum(hidden, head, targets, weights):
    """Σ weight · −log p(target), computed in chunks: the logits of the whole batch never exist.

    The gradient is formed while the loss is: three matrix products per chunk and nothing
    recomputed.

    Args:
      hidden: [b, l, d], the compute dtype.
      head: [v, d], float32; multiplied in hidden's dtype, sums in float32.
      targets: int32 [b, l].
      weights: float32 [b, l]; 0 leaves a position out.
    Returns:
      float32 scalar, nats. Divide by the number of targets.
    """
    losses = token_losses(hidden, head, targets)
    return jnp.sum(jnp.where(weights > 0, losses, 0) * weights)


def _cross_entropy_forward(hidden, head, targets, weights):
    cast = head.astype(hidden.dtype)

    def one_chunk(carry, chunk):
        total, d_head = carry
        h, t, w = chunk
        logits = _chunk_logits(h, cast)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        unnormalised = jnp.exp(logits - peak)  # one exponential serves the loss and the gradient
        normaliser = jnp.sum(unnormalised, axis=-1, keepdims=True)
        target_logits = jnp.take_along_axis(logits, t[..., None], axis=-1)
        losses = (jnp.log(normaliser) + peak - target_logits)[..., 0]
        total += jnp.sum(jnp.where(w > 0, losses, 0) * w)
        probs = unnormalised * (w[..., None] / normaliser)
        # Selected, not subtracted at an index: fuses with the product, and rows stay where they
        # are for the partitioner.
        is_target = jnp.arange(head.shape[0]) == t[..., None]
        d_logits = jnp.where(is_target, probs - w[..., None], probs).astype(hidden.dtype)
        d_h = jnp.einsum("blv,vd->bld", d_logits, cast)
        d_head = dense.add_outer(d_head, d_logits, h)
        return (total, sharding.constrain(d_head, None, "vocab", "d_model")), d_h

    start = (jnp.float32(0), jnp.zeros((1, *head.shape), jnp.float32))
    (total, d_head), d_hidden = jax.lax.scan(one_chunk, start, _chunks(hidden, targets, weights))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return total, (d_hidden, d_head[0].astype(head.dtype))


def _cross_entropy_backward(residuals, g):
    d_hidden, d_head = residuals
    d_hidden = (d_hidden * g).astype(
        d_hidden.dtype
    )  # g stays float32: rounded, it would bias all of it
    return (d_hidden, (d_head * g).astype(d_head.dtype), None, None)


cross_entropy_sum.defvjp(_cross_entropy_forward, _cross_entropy_backward)


class RoutingStatistics(typing.NamedTuple):
    """Sums over the real tokens of each group, from which every load-balancing convention is made.

    Attributes:
      counts: float32 [n, g, e], tokens whose choices (for `switch`: whose most probable expert)
        include e.
      probs: float32 [n, g, e], Σ over tokens of the router's scores, which sum to one in each
        token (`routing.probabilities`).
      tokens: float32 [g], real tokens.
    """

    counts: jax.Array
    probs: jax.Array
    tokens: jax.Array


def routing_statistics(
    router_logits, expert_ids, token_mask, *, convention, group, scores="softmax"
) -> RoutingStatistics:
    """Statistics per group of `group` consecutive sequences (0: all of them are one group).

    Args:
      router_logits: float32 [n, b, l, e].
      expert_ids: int32 [n, b, l, k]; −1 is no expert.
      token_mask: bool [b, l]; padding counts nowhere.
      convention: of the load-balancing loss; only `switch` counts differently.
      scores: the model's `router_scores`.
    """
    n, b, _, e = router_logits.shape
    groups = b // group if group else 1
    mask = token_mask.astype(jnp.float32)
    probs = routing.probabilities(router_logits, scores) * mask[..., None]
    if convention == "switch":
        expert_ids = jnp.argmax(router_logits, axis=-1, keepdims=True)
    chosen = jnp.sum(jax.nn.one_hot(expert_ids, e, dtype=jnp.float32), axis=-2) * mask[..., None]
    return RoutingStatistics(
        counts=jnp.sum(chosen.reshape(n, groups, -1, e), axis=2),
        probs=jnp.sum(probs.reshape(n, groups, -1, e), axis=2),
        tokens=jnp.sum(mask.reshape(groups, -1), axis=1),
    )


def load_balancing_loss(
    statistics, *, convention, num_experts_per_token, whole_batch=None, num_groups=None
):
    """How unevenly tokens are spread over experts; differentiable through the probabilities only.

    With f_i the share of expert i and P_i the mean probability of expert i over a group's real
    tokens:

      olmoe        mean over layers of E · Σ_i f_i P_i with Σ f = 1 (f: share of the tokens' k slots
                   each). Balanced: 1. Source: the megablocks fork that trained OLMoE.
      switch       the same with f_i the share of tokens whose most probable expert is i.
                   Balanced: 1. Source: Switch Transformer (arXiv 2101.03961), equations 4–6.
      huggingface  E · Σ_i f_i P_i with Σ f = k, and f and P pooled over all layers before the
                   product: an expert overused in one layer is offset by another. Balanced: k.
                   Source: transformers' `load_balancing_loss_func`.

    The groups' losses are averaged over the groups that hold a real token.

    Args:
      statistics: RoutingStatistics of these tokens.
      whole_batch: with micro-batches and one group over the whole batch: the RoutingStatistics of
        the whole batch, of which counts and tokens are used.
      num_groups: non-empty groups of the whole batch; default: of these tokens.
    Returns:
      float32 scalar as the convention defines it; divide by `balanced_value` to log it.
    """
    counts, tokens = statistics.counts, statistics.tokens
    if whole_batch is not None:
        counts, tokens = whole_batch.counts, whole_batch.tokens
    if num_groups is None:
        num_groups = jnp.sum(tokens > 0)
    slots = num_experts_per_token if convention == "olmoe" else 1
    per_token = 1 / jnp.maximum(tokens, 1)[None, :, None]
    f, p = jax.lax.stop_gradient(counts) * per_token / slots, statistics.probs * per_token
    if convention == "huggingface":
        f, p = jnp.mean(f, axis=0, keepdims=True), jnp.mean(p, axis=0, keepdims=True)
    per_layer_and_group = counts.shape[-1] * jnp.sum(f * p, axis=-1)
    return jnp.sum(jnp.mean(per_layer_and_group, axis=0)) / jnp.maximum(num_groups, 1)


def balanced_value(convention, num_experts_per_token) -> int:
    """The load-balancing loss of perfectly even routing: what the logged value is divided by."""
    return num_experts_per_token if convention == "huggingface" else 1


def router_z_loss(router_logits, token_mask, *, num_tokens=None):
    """Mean over layers and real tokens of (logsumexp of a token's router logits)²; keeps logits
    small.

    Args:
      router_logits: [n, b, l, e]; computed in float32.
      token_mask: bool [b, l]; False leaves the token out of sum and count.
      num_tokens: real tokens of the whole batch; default: of these tokens.
    Returns:
      float32 scalar (nats²), 0 if no token is real. Unweighted: the caller scales.
    Source: OLMoE (arXiv 2409.02060), equation 4. The code that trained the released weights also
      divides by k; the olmoe_1b_7b recipe does that through its weight, not here.
    """
    mask = token_mask.astype(jnp.float32)
    squares = jnp.square(jax.nn.logsumexp(router_logits.astype(jnp.float32), axis=-1)) * mask
    count = jnp.sum(mask) if num_tokens is None else num_tokens
    return jnp.sum(squares) / (router_logits.shape[0] * jnp.maximum(count, 1))
