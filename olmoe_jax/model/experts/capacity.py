"""A fixed number of rows per expert and group; choices beyond it are dropped. For comparison
only."""

import math

import jax
import jax.numpy as jnp

from olmoe_jax.model.experts import slots


def rows_per_expert(tokens, k, num_experts, capacity_factor) -> int:
    """Rows that an expert computes of a group of `tokens` tokens."""
    return max(1, math.ceil(capacity_factor * k * tokens / num_experts))


def compute(x, expert_ids, weights, w_gate, w_up, w_down, *, groups, capacity_factor):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k]; t is split into `groups`
    groups.

    First choices of all tokens of a group come before second choices (Switch, GShard), so what is
    dropped is a token's least weighty expert first.
    """
    num_experts, d = w_gate.shape[0], x.shape[1]
    tokens, k = x.shape[0] // groups, expert_ids.shape[1]
    capacity = min(tokens, rows_per_expert(tokens, k, num_experts, capacity_factor))

    def one_group(x, ids, factors):
        by_rank = jnp.where(ids < 0, num_experts, ids).T.reshape(-1)  # [k · tokens]
        order = jnp.argsort(by_rank, stable=True)
        counts = jnp.zeros(num_experts + 1, jnp.int32).at[by_rank].add(1)
        start = jnp.cumsum(counts) - counts
        place = jnp.arange(k * tokens) - start[by_rank[order]]  # position within the expert
        target = jnp.where(
            place < capacity, by_rank[order] * capacity + place, num_experts * capacity
        )
        token_ids = jnp.full(num_experts * capacity, tokens, jnp.int32)
        token_ids = token_ids.at[target].set((order % tokens).astype(jnp.int32), mode="drop")
        kept = jnp.zeros(num_experts * capacity, x.dtype)
        kept = kept.at[target].set(factors.T.reshape(-1)[order], mode="drop")
        gathered = x.at[token_ids].get(mode="fill", fill_value=0).reshape(num_experts, capacity, d)
        hidden = slots.swiglu(
            jnp.einsum("ecd,edf->ecf", gathered, w_gate), jnp.einsum("ecd,edf->ecf", gathered, w_up)
        )
        hidden = hidden * kept.reshape(num_experts, capacity, 1)
        down = jnp.einsum("ecf,efd->ecd", hidden, w_down).reshape(-1, d)
        return jnp.zeros_like(x).at[token_ids].add(down, mode="drop")

    split = lambda a: a.reshape(groups, tokens, -1)  # noqa: E731
    return jax.vmap(one_group)(split(x), split(expert_ids), split(weights)).reshape(x.shape)
