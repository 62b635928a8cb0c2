"""Tokens sorted by expert and cut into blocks that each belong to one expert: plain batched
matmuls.

Dropless and right everywhere; made for CPU, where batched matmuls run near the machine's peak and
`ragged_dot` does not. Each expert's rows are padded up to whole blocks, so the work does not
depend on how unbalanced the routing is: slots / block + experts blocks, always.
"""

import jax.numpy as jnp

from olmoe_jax.model.experts import slots


def block_size(num_slots, num_experts) -> int:
    """Rows per block: about half of an expert's balanced share, a power of two in 8..128.

    Smaller blocks waste less on padding (half a block per expert); larger ones copy the experts'
    weights less often and multiply faster.
    """
    share = max(1, num_slots // (2 * num_experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def compute(x, expert_ids, weights, w_gate, w_up, w_down, *, num_slots, groups, capacity_factor):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k]."""
    del groups, capacity_factor
    num_experts, num_tokens = w_gate.shape[0], x.shape[0]
    rows = slots.sort_by_expert(expert_ids, weights, num_slots=num_slots, num_experts=num_experts)
    size = block_size(num_slots, num_experts)
    num_blocks = min(num_slots // size + num_experts, num_slots)
    blocks_of = -(-rows.counts // size)  # [e]
    block_end = jnp.cumsum(blocks_of)
    row_start, block_start = jnp.cumsum(rows.counts) - rows.counts, block_end - blocks_of
    # Row r of expert e goes to row (r − row_start[e]) of that expert's blocks; rows without an
    # expert go out of range and are dropped.
    expert = jnp.minimum(rows.expert_ids, num_experts - 1)
    target = block_start[expert] * size + jnp.arange(num_slots) - row_start[expert]
    target = jnp.where(rows.expert_ids < num_experts, target, num_blocks * size)
    # Unused rows read token `num_tokens`: a zero row.
    token_ids = jnp.full(num_blocks * size, num_tokens, jnp.int32)
    token_ids = token_ids.at[target].set(rows.token_ids.astype(jnp.int32), mode="drop")
    factors = jnp.zeros(num_blocks * size, x.dtype).at[target].set(rows.weights, mode="drop")
    block_expert = jnp.searchsorted(block_end, jnp.arange(num_blocks), side="right")
    block_expert = jnp.minimum(block_expert, num_experts - 1)

    gathered = x.at[token_ids].get(mode="fill", fill_value=0).reshape(num_blocks, size, -1)
    gate = jnp.einsum("bsd,bdf->bsf", gathered, w_gate[block_expert])
    up = jnp.einsum("bsd,bdf->bsf", gathered, w_up[block_expert])
    hidden = slots.swiglu(gate, up) * factors.reshape(num_blocks, size, 1)
    down = jnp.einsum("bsf,bfd->bsd", hidden, w_down[block_expert])
    return jnp.zeros_like(x).at[token_ids].add(down.reshape(-1, x.shape[1]), mode="drop")
