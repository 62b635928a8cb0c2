"""Matrix products of sorted rows with one weight matrix per group: what experts are made of.

Two functions, `matmul` and `outer`, with one module per backend behind them. Rows are sorted by
group: group g owns `counts[g]` rows behind those of the groups before it. Rows beyond sum(counts)
belong to nobody: their results are zero, whatever they hold. `counts` is data: nothing is compiled
again for another load, and no load is dropped.

To add a backend, write a module with the same two functions and name it in `BACKENDS`. Which one
"auto" takes, and why: README.md beside this file.

Letters: n rows, e groups, d and f widths.
"""

import functools
import importlib
import warnings

import jax

# Name → module; imported when first used, as some need a library.
BACKENDS = {
    "loop": "loop",
    "kernel": "cpu_kernel",
    "ragged": "ragged",
    "megablox": "megablox",
    "tokamax": "tokamax",
}


def matmul(rows, weights, counts, *, transpose=False, backend):
    """Each row times its group's matrix.

    Args:
      rows: [n, d]; with `transpose` [n, f]. float32 or bfloat16.
      weights: [e, d, f], the rows' dtype.
      counts: int32 [e], rows of each group; their sum must not exceed n.
      transpose: multiply by the transposed matrices.
      backend: a key of BACKENDS.
    Returns:
      [n, f]; with `transpose` [n, d]. The rows' dtype; sums are float32.
    """
    return _module(backend).matmul(rows, weights, counts, transpose=transpose)


def outer(left, right, counts, *, dtype, backend):
    """Per group, the left rows transposed times the right rows: the weights' gradient.

    Args:
      left: [n, d]; right: [n, f], of the same dtype, float32 or bfloat16.
      counts: int32 [e], rows of each group; their sum must not exceed n.
      dtype: of the result; sums are float32.
      backend: a key of BACKENDS.
    Returns:
      [e, d, f]; zeros where a group has no row.
    """
    return _module(backend).outer(left, right, counts, dtype=dtype)


def resolve(platform=None) -> str:
    """The backend that "auto" takes on a platform ("cpu", "gpu", "tpu"; default: JAX's own)."""
    platform = platform or jax.default_backend()
    if platform == "tpu":
        return "megablox"
    if platform == "cpu":
        return "kernel" if missing("kernel") is None else "loop"
    reason = missing("tokamax")
    if reason is None:
        return "tokamax"
    _warn_of_loop(reason)
    return "loop"


@functools.cache  # once
def _warn_of_loop(reason):
    warnings.warn(
        f"experts run as a plain loop on this GPU, which is slow: {reason}. jax.lax.ragged_dot is "
        "not used: it multiplies by all groups (54 GiB of temporaries on an H100)",
        stacklevel=3,
    )


def missing(backend) -> str | None:
    """Why a backend cannot run on this machine, as a sentence; None if it can."""
    check = getattr(_module(backend), "missing", None)
    return check() if check else None


def _module(backend):
    return importlib.import_module(f"olmoe_jax.grouped_matmul.{BACKENDS[backend]}")
