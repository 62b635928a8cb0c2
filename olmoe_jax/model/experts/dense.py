"""Every expert computes every token; the reference, and E/k times the work."""

import jax.numpy as jnp

from olmoe_jax.model.experts import slots


def compute(x, expert_ids, weights, w_gate, w_up, w_down):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k]."""
    num_experts, num_tokens = w_gate.shape[0], x.shape[0]
    ids = jnp.where(expert_ids < 0, num_experts, expert_ids)  # out of range: dropped
    combine = jnp.zeros((num_tokens, num_experts), x.dtype)
    combine = combine.at[jnp.arange(num_tokens)[:, None], ids].add(weights, mode="drop")
    hidden = slots.swiglu(jnp.einsum("td,edf->tef", x, w_gate), jnp.einsum("td,edf->tef", x, w_up))
    # The weight goes on the hidden activation: the down projection is linear.
    return jnp.einsum("tef,efd->td", hidden * combine[..., None], w_down)
