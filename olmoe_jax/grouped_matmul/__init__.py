"""Matrix products of sorted rows with one weight matrix per group: what experts are made of.

Two functions, `matmul` and `outer`, with one module per backend behind them. Rows are sorted by
group: group g owns `counts[g]` rows behind those of the groups before it. Rows beyond sum(counts)
belong to nobody: their results are zero, whatever they hold. `counts` is data: nothing is compiled
again for another load, and no load is dropped. Rows may be given as ids into an array, each token
standing there once: the backends in `GATHERING` then read them where they lie.

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
# Those whose functions take ids and `init`; for the others rows are gathered first.
GATHERING = ("loop", "kernel")


def matmul(rows, weights, counts, *, row_ids=None, init=None, transpose=False, backend):
    """Each row times its group's matrix.

    Args:
      rows: [n, d]; with `transpose` [n, f]. float32 or bfloat16.
      weights: [e, d, f], the rows' dtype.
      counts: int32 [e], rows of each group; their sum must not exceed n.
      row_ids: int32 [n] or None: the rows are `rows[row_ids]`.
      init: like the result, or None: the products are added to it.
      transpose: multiply by the transposed matrices.
      backend: a key of BACKENDS.
    Returns:
      [n, f]; with `transpose` [n, d]. The rows' dtype; sums are float32.
    """
    function = _module(backend).matmul
    if backend in GATHERING:
        return function(rows, weights, counts, row_ids=row_ids, init=init, transpose=transpose)
    out = function(_gathered(rows, row_ids), weights, counts, transpose=transpose)
    return out if init is None else init + out


def outer(left, right, counts, *, left_ids=None, right_ids=None, dtype, backend):
    """Per group, the left rows transposed times the right rows: the weights' gradient.

    Args:
      left: [n, d]; right: [n, f], of the same dtype, float32 or bfloat16.
      counts: int32 [e], rows of each group; their sum must not exceed n.
      left_ids, right_ids: int32 [n] or None: the rows are `left[left_ids]`, `right[right_ids]`.
      dtype: of the result; sums are float32.
      backend: a key of BACKENDS.
    Returns:
      [e, d, f]; zeros where a group has no row.
    """
    function = _module(backend).outer
    if backend in GATHERING:
        return function(left, right, counts, left_ids=left_ids, right_ids=right_ids, dtype=dtype)
    left, right = _gathered(left, left_ids), _gathered(right, right_ids)
    return function(left, right, counts, dtype=dtype)


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


def _gathered(rows, ids):
    return rows if ids is None else rows[ids]


def _module(backend):
    return importlib.import_module(f"olmoe_jax.grouped_matmul.{BACKENDS[backend]}")
