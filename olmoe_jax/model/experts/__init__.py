"""Expert computation: one function, `compute`, with one file per backend behind it.

A backend computes, for every token, the weighted sum of its experts' SwiGLU outputs:

    y[t] = Σ over the token's experts e of weight · (silu(x[t] @ w_gate[e]) · (x[t] @ w_up[e])) @
    w_down[e]

All but `capacity` are dropless and agree to the order of summation; `dense` is the reference. The
others sort tokens by expert and differ in how they multiply (`grouped`, on `grouped_matmul`). To
add a way to multiply, add a backend there; to add another scheme, write a file here with a function
of the same arguments and name it in `BACKENDS`.

Letters: t tokens, d d_model, e experts, f d_ff, k chosen experts.
"""

import difflib
import functools
import warnings

import jax
from jax.sharding import PartitionSpec

from olmoe_jax import grouped_matmul, sharding
from olmoe_jax.model import routing as routing_lib
from olmoe_jax.model.experts import capacity, dense, grouped

BACKENDS = {
    "dense": dense.compute,
    "capacity": capacity.compute,
    **{name: functools.partial(grouped.compute, backend=name) for name in grouped_matmul.BACKENDS},
}

SAVED_NAMES = grouped.SAVED_NAMES

# Pallas kernels: the compiler does not split them over devices, so on several they run within a
# `shard_map` or not at all.
KERNELS = ("megablox", "tokamax")


def resolve(backend, platform=None) -> str:
    """The backend's name, with "auto" decided by platform ("cpu", "gpu", "tpu"; default: JAX's
    own) as `grouped_matmul.resolve` says.

    Raises:
      ValueError: no such backend, or it cannot run here.
    """
    if backend == "auto":
        return grouped_matmul.resolve(platform)
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, 1, cutoff=0.0)[0]
        raise ValueError(
            f"config.model.expert_backend is {backend!r}: must be auto or one of "
            f"{', '.join(BACKENDS)} (nearest: {near})"
        )
    if backend in grouped_matmul.BACKENDS and (reason := grouped_matmul.missing(backend)):
        raise ValueError(f"config.model.expert_backend is {backend!r}: {reason}")
    return backend


@functools.cache  # once
def _warn_of_loop(backend):
    warnings.warn(
        f"experts run as a plain loop, not with {backend}, which several devices can only run each "
        "on its own tokens: not under expert choice, and not for a batch that they do not divide",
        stacklevel=3,
    )


def compute(x, routing, weights, *, backend, capacity_factor, group):
    """Weighted sum of the chosen experts' outputs.

    Args:
      x: [b, l, d], the compute dtype.
      routing: `routing.Routing` of the same tokens.
      weights: dict of w_gate [e, d, f], w_up [e, d, f], w_down [e, f, d]; rounded to x's dtype for
        the products. Their gradients are not, but for `dense` and `capacity`, and where the devices
        split the batch: there weights are rounded before they are gathered, and each device's part
        of a gradient before the parts are added.
      backend: a key of BACKENDS, or "auto".
      capacity_factor, group: for the dropping backend: rows per expert relative to balance, and the
        consecutive sequences (0: the whole batch) over which they are counted.
    Returns:
      [b, l, d] in x's dtype.
    """
    name = resolve(backend)
    is_grouped = name in grouped_matmul.BACKENDS
    b, length, d = x.shape
    factors = routing.weights
    # Only a token's own k choices stay within a device; expert choice ranges over the batch.
    token_local = routing.num_slots == routing.expert_ids.size
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else sharding.batch_shards(mesh)
    kernel = name in KERNELS and not mesh.empty and mesh.size > 1
    sharded = is_grouped and (shards > 1 or kernel) and b % shards == 0 and token_local
    if kernel and not sharded:
        _warn_of_loop(name)
        name = "loop"
    if not is_grouped:
        factors = factors.astype(x.dtype)
    if not is_grouped or sharded:  # before they are gathered; `grouped` casts by itself
        weights = {name: w.astype(x.dtype) for name, w in weights.items()}

    def flat(x, expert_ids, factors, weights, **options):
        tokens = (-1, expert_ids.shape[-1])
        y = BACKENDS[name](
            x.reshape(-1, d), expert_ids.reshape(tokens), factors.reshape(tokens),
            weights["w_gate"], weights["w_up"], weights["w_down"], **options,
        )  # fmt: skip
        return y.reshape(x.shape)

    if name == "capacity":
        options = {
            "capacity_factor": capacity_factor,
            "groups": routing_lib.num_groups(b, group),
        }
    else:
        options = {"num_slots": routing.num_slots} if is_grouped else {}
    if not sharded:
        return flat(x, routing.expert_ids, factors, weights, **options)
    # Each device sorts its own tokens, with all experts' weights gathered.
    by_batch, whole = PartitionSpec(sharding.BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        lambda x, ids, factors, w: flat(x, ids, factors, w, num_slots=ids.size),
        mesh=mesh,
        in_specs=(by_batch, by_batch, by_batch, whole),
        out_specs=by_batch,
        check_vma=False,
    )(x, routing.expert_ids, factors, weights)
