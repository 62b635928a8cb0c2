"""Tokens sorted by expert: what the backends that run experts one after the other start from."""

import typing

import jax
import jax.numpy as jnp


class Slots(typing.NamedTuple):
    """One row per (token, chosen expert), by rising expert id; rows without an expert come last.

    Attributes:
      token_ids: int32 [slots], the row of x.
      weights: [slots]; 0 where there is no expert.
      counts: int32 [experts], rows of each expert.
      of_choice: int32 [t, k], the row of each choice; the number of slots where it has none.
    """

    token_ids: jax.Array
    weights: jax.Array
    counts: jax.Array
    of_choice: jax.Array


def sort_by_expert(expert_ids, weights, *, num_slots, num_experts) -> Slots:
    """[t, k] choices → Slots; the order of tokens within an expert is kept.

    Args:
      expert_ids: int32 [t, k]; −1 is no expert.
      weights: [t, k].
      num_slots: rows of the result; at least the number of choices that are not −1.
    """
    k = expert_ids.shape[1]
    flat = jnp.where(expert_ids < 0, num_experts, expert_ids).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    place = jnp.arange(flat.size, dtype=jnp.int32)
    of_choice = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    of_choice = jnp.where(flat < num_experts, of_choice, num_slots).reshape(expert_ids.shape)
    kept = order[:num_slots]
    sorted_weights = jnp.where(flat[kept] < num_experts, weights.reshape(-1)[kept], 0)
    return Slots((kept // k).astype(jnp.int32), sorted_weights, counts, of_choice)


def swiglu(gate, up):
    """silu(gate) · up."""
    return jax.nn.silu(gate) * up
