"""`jax.lax.ragged_dot` over tokens sorted by expert: a grouped-matmul kernel on TPU."""

import jax
import jax.numpy as jnp

from olmoe_jax.model.experts import slots


def compute(x, expert_ids, weights, w_gate, w_up, w_down, *, num_slots, groups, capacity_factor):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k]."""
    del groups, capacity_factor
    num_experts = w_gate.shape[0]
    rows = slots.sort_by_expert(expert_ids, weights, num_slots=num_slots, num_experts=num_experts)
    gathered = x[rows.token_ids]
    gate = jax.lax.ragged_dot(gathered, w_gate, rows.counts)
    up = jax.lax.ragged_dot(gathered, w_up, rows.counts)
    # Rows behind the last group may be left uninitialised by a kernel: select, never multiply by 0.
    used = (rows.expert_ids < num_experts)[:, None]
    hidden = jnp.where(used, slots.swiglu(gate, up) * rows.weights[:, None], 0)
    down = jnp.where(used, jax.lax.ragged_dot(hidden, w_down, rows.counts), 0)
    return jnp.zeros_like(x).at[rows.token_ids].add(down)
