"""Tokens sorted by expert, and grouped matrix products over them: the dropless backends.

The gradient is written out here, once for every backend of `grouped_matmul`. The routing weight
multiplies the hidden activation, in front of the (linear) down projection: the backward pass then
needs neither the experts' outputs nor gradients weighted per choice. Kept for it are the tokens,
the two pre-activations and the weights themselves; rows are gathered again and the activation is
recomputed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmoe_jax import grouped_matmul
from olmoe_jax.model.experts import slots

# What a layer keeps under these names (`jax.checkpoint`) spares it products and the sorting.
SAVED_NAMES = ("expert_gate", "expert_up", "expert_rows")


def compute(x, expert_ids, weights, w_gate, w_up, w_down, *, num_slots, backend):
    """See `experts.compute`; x is [t, d], expert_ids and weights [t, k].

    Expert weights may be wider than x: they are rounded to x's dtype for the products, and their
    gradients come out in their own dtype, unrounded. (`experts.compute` hands weights in x's dtype
    to the devices between which it splits a batch: there each device's gradient is rounded.)
    """
    rows = slots.sort_by_expert(
        expert_ids, weights, num_slots=num_slots, num_experts=w_gate.shape[0]
    )
    order = checkpoint_name((rows.token_ids, rows.of_choice, rows.counts), "expert_rows")
    return _ffn(backend, x, rows.weights, (w_gate, w_up, w_down), order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(backend, x, factors, weights, order):
    """y [t, d]: every slot's SwiGLU times its factor, added to its token."""
    return _forward(backend, x, factors, weights, order)[0]


def _forward(backend, x, factors, weights, order):
    token_ids, of_choice, counts = order
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in weights)
    options = {"counts": counts, "backend": backend}
    gate, up = grouped_matmul.matmuls(x, (w_gate, w_up), row_ids=token_ids, **options)
    gate, up = checkpoint_name(gate, "expert_gate"), checkpoint_name(up, "expert_up")
    hidden = _weighted_swiglu(gate, up, factors).astype(x.dtype)
    y = _add_to_tokens(grouped_matmul.matmul(hidden, w_down, **options), of_choice)
    # The weights as they came: a scan over layers then does not store them a second time.
    return y, (x, factors, weights, order, gate, up)


def _backward(backend, residuals, d_y):
    x, factors, weights, (token_ids, of_choice, counts), gate, up = residuals
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in weights)
    options = {"counts": counts, "backend": backend}
    d_hidden = grouped_matmul.matmul(d_y, w_down, row_ids=token_ids, transpose=True, **options)
    # In float32 until the products need the compute dtype.
    hidden, pull = jax.vjp(_weighted_swiglu, gate, up, factors)
    d_gate, d_up, d_factors = pull(d_hidden.astype(hidden.dtype))
    outer_options = {"dtype": weights[0].dtype, **options}
    d_weights = (
        *grouped_matmul.outers(x, (d_gate, d_up), left_ids=token_ids, **outer_options),
        grouped_matmul.outer(hidden.astype(x.dtype), d_y, right_ids=token_ids, **outer_options),
    )
    d_rows = grouped_matmul.matmul_sum((d_gate, d_up), (w_gate, w_up), transpose=True, **options)
    return _add_to_tokens(d_rows, of_choice), d_factors, d_weights, None


_ffn.defvjp(_forward, _backward)


def _weighted_swiglu(gate, up, factors):
    """float32 [slots, f]: silu(gate) · up · factor."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return slots.swiglu(gate, up) * factors.astype(jnp.float32)[:, None]


def _add_to_tokens(rows, of_choice):
    """[slots, d] → [t, d]: the sum over each token's slots, in float32, in the rows' dtype.

    One gather per choice, which fuse into one loop: on CPU 3 to 7 times as fast as adding rows to
    tokens one by one, and on a GPU always in the same order.
    """
    columns = (of_choice[:, j] for j in range(of_choice.shape[1]))
    gathered = (rows.at[c].get(mode="fill", fill_value=0).astype(jnp.float32) for c in columns)
    return functools.reduce(jnp.add, gathered).astype(rows.dtype)
