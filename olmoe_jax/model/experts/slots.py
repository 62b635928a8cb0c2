"""Tokens sorted by expert: what the backends that run experts one after the other start from."""

import typing

import jax
import jax.numpy as jnp


class Slots(typing.NamedTuple):
    """One row per (token, chosen expert), by rising expert id; rows without an expert come last.

    Attributes:
      token_ids: int32 [slots], the row of x.
      expert_ids: int32 [slots]; `num_experts` where there is no expert.
      weights: [slots]; 0 where there is no expert.
      counts: int32 [experts], rows of each expert.
    """

    token_ids: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    counts: jax.Array


def sort_by_expert(expert_ids, weights, *, num_slots, num_experts) -> Slots:
    """[t, k] choices → Slots; the order of tokens within an expert is kept.

    Args:
      expert_ids: int32 [t, k]; −1 is no expert.
      weights: [t, k].
      num_slots: rows of the result; at least the number of choices that are not −1.
    """
    k = expert_ids.shape[1]
    flat = jnp.where(expert_ids < 0, num_experts, expert_ids).reshape(-1)
    order = jnp.argsort(flat, stable=True)[:num_slots]
    counts = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    sorted_ids = flat[order]
    sorted_weights = jnp.where(sorted_ids < num_experts, weights.reshape(-1)[order], 0)
    return Slots(order // k, sorted_ids, sorted_weights, counts)


def swiglu(gate, up):
    """silu(gate) · up."""
    return jax.nn.silu(gate) * up
