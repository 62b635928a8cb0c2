"""`jax.lax.ragged_dot` over tokens sorted by expert: a grouped-matmul kernel on TPU."""

import jax
import jax.numpy as jnp

from olmoe_jax.model.experts import slots


def compute(x, expert_ids, weights, w_gate, w_up, w_down, *, num_slots, groups, capacity_factor):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k]."""
    del groups, capacity_factor
    num_experts = w_gate.shape[0]
    rows = slots.sort_by_expert(expert_ids, weights, num_slots=num_slots, num_experts=num_experts)
    # Rows behind the last group may be left uninitialised by a kernel: select, never multiply by
    # 0. The select on the input does the same for the gradient, whose rows behind the last group
    # are as undefined.
    used = (rows.expert_ids < num_experts)[:, None]
    gathered = jnp.where(used, x[rows.token_ids], 0)
    gate = jnp.where(used, jax.lax.ragged_dot(gathered, w_gate, rows.counts), 0)
    up = jnp.where(used, jax.lax.ragged_dot(gathered, w_up, rows.counts), 0)
    hidden = slots.swiglu(gate, up) * rows.weights[:, None]
    down = jnp.where(used, jax.lax.ragged_dot(hidden, w_down, rows.counts), 0)
    return jnp.zeros_like(x).at[rows.token_ids].add(down)
