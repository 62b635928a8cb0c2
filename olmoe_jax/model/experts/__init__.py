"""Expert computation: one function, `compute`, with one file per backend behind it.

A backend computes, for every token, the weighted sum of its experts' SwiGLU outputs:

    y[t] = Σ over the token's experts e of weight · (silu(x[t] @ w_gate[e]) · (x[t] @ w_up[e])) @
    w_down[e]

All but `capacity` are dropless and agree to the order of summation; `dense` is the reference. To
add one, write a file here with a function of the same arguments and name it in `BACKENDS`.

Letters: t tokens, d d_model, e experts, f d_ff, k chosen experts.
"""

import difflib

import jax
from jax.sharding import PartitionSpec

from olmoe_jax import sharding
from olmoe_jax.model import routing as routing_lib
from olmoe_jax.model.experts import blocked, capacity, dense, ragged

BACKENDS = {
    "dense": dense.compute,
    "ragged": ragged.compute,
    "blocked": blocked.compute,
    "capacity": capacity.compute,
}

# Backends that sort tokens: on several devices each sorts its own tokens, with the weights
# gathered.
_LOCAL = ("ragged", "blocked")


def resolve(backend, platform=None) -> str:
    """The backend's name, with "auto" decided by platform ("cpu", "gpu", "tpu"; default: JAX's
    own).

    ragged_dot is a grouped-matmul kernel on TPU only: on CPU it runs 70–100 times slower than
    batched matmuls, on GPU XLA lowers it to dense work with buffers of tokens · experts.

    Raises:
      ValueError: no such backend.
    """
    if backend == "auto":
        return "ragged" if (platform or jax.default_backend()) == "tpu" else "blocked"
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, 1, cutoff=0.0)[0]
        raise ValueError(
            f"config.model.expert_backend is {backend!r}: must be auto or one of "
            f"{', '.join(BACKENDS)} (nearest: {near})"
        )
    return backend


def compute(x, routing, weights, *, backend, capacity_factor, group):
    """Weighted sum of the chosen experts' outputs.

    Args:
      x: [b, l, d], the compute dtype.
      routing: `routing.Routing` of the same tokens.
      weights: dict of w_gate [e, d, f], w_up [e, d, f], w_down [e, f, d], the compute dtype.
      backend: a key of BACKENDS, or "auto".
      capacity_factor, group: for the dropping backend: rows per expert relative to balance, and the
        consecutive sequences (0: the whole batch) over which they are counted.
    Returns:
      [b, l, d] in x's dtype.
    """
    name = resolve(backend)
    b, length, d = x.shape
    # Only a token's own k choices stay within a device; expert choice ranges over the batch.
    token_local = routing.num_slots == routing.expert_ids.size
    groups = routing_lib.num_groups(b, group) if name == "capacity" else 1

    def flat(x, expert_ids, factors, num_slots, groups, w):
        tokens = (-1, expert_ids.shape[-1])
        y = BACKENDS[name](
            x.reshape(-1, d), expert_ids.reshape(tokens), factors.reshape(tokens).astype(x.dtype),
            w["w_gate"], w["w_up"], w["w_down"],
            num_slots=num_slots, groups=groups, capacity_factor=capacity_factor,
        )  # fmt: skip
        return y.reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    if name not in _LOCAL or shards == 1 or b % shards or not token_local:
        return flat(x, routing.expert_ids, routing.weights, routing.num_slots, groups, weights)
    by_batch, whole = PartitionSpec(sharding.BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        lambda x, ids, factors, w: flat(x, ids, factors, ids.size, 1, w),
        mesh=mesh,
        in_specs=(by_batch, by_batch, by_batch, whole),
        out_specs=by_batch,
        check_vma=False,
    )(x, routing.expert_ids, routing.weights, weights)
