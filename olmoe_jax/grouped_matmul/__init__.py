"""Matrix products of sorted rows with one weight matrix per group: what experts are made of.

Two functions, `matmul` and `outer`, with one module per backend behind them. Rows are sorted by
group: group g owns `counts[g]` rows behind those of the groups before it. Rows beyond sum(counts)
belong to nobody: their results are zero, whatever they hold. `counts` is data: nothing is compiled
again for another load, and no load is dropped. Rows may be given as ids into an array, each token
standing there once: the backends in `GATHERING` then read them where they lie. `matmuls`,
`matmul_sum` and `outers` are several products that share their rows or their result: a backend with
such a function does them at once.

To add a backend, write a module with the two functions and name it in `BACKENDS`. Which one "auto"
takes, and why: README.md beside this file.

Letters: n rows, e groups, d and f widths.
"""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp

# Name → module; imported when first used, as some need a library.
BACKENDS = {
    "loop": "loop",
    "kernel": "cpu_kernel",
    "ragged": "ragged",
    "megablox": "megablox",
    "tokamax": "tokamax",
}
# Those whose functions take ids; for the others rows are gathered first.
GATHERING = ("loop", "kernel")


def matmul(rows, weights, counts, *, row_ids=None, transpose=False, backend):
    """Each row times its group's matrix.

    Args:
      rows: [n, d]; with `transpose` [n, f]. float32 or bfloat16.
      weights: [e, d, f], the rows' dtype.
      counts: int32 [e], rows of each group; their sum must not exceed n.
      row_ids: int32 [n] or None: the rows are `rows[row_ids]`.
      transpose: multiply by the transposed matrices.
      backend: a key of BACKENDS.
    Returns:
      [n, f]; with `transpose` [n, d]. The rows' dtype; sums are float32.
    """
    function = _module(backend).matmul
    if backend in GATHERING:
        return function(rows, weights, counts, row_ids=row_ids, transpose=transpose)
    return function(_gathered(rows, row_ids), weights, counts, transpose=transpose)


def matmuls(rows, weights, counts, *, row_ids=None, transpose=False, backend):
    """`matmul` of the same rows with each of a sequence of weights: a list of results."""
    options = {"row_ids": row_ids, "transpose": transpose}
    if at_once := getattr(_module(backend), "matmuls", None):
        return at_once(rows, weights, counts, **options)
    return [matmul(rows, w, counts, **options, backend=backend) for w in weights]


def matmul_sum(rows, weights, counts, *, transpose=False, backend):
    """Σ over i of `matmul(rows[i], weights[i])`: two sequences of equal length, one result."""
    if at_once := getattr(_module(backend), "matmul_sum", None):
        return at_once(rows, weights, counts, transpose=transpose)
    terms = (
        matmul(r, w, counts, transpose=transpose, backend=backend)
        for r, w in zip(rows, weights, strict=True)
    )
    return functools.reduce(jnp.add, terms)


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


def outers(left, rights, counts, *, left_ids=None, right_ids=None, dtype, backend):
    """`outer` of the same left rows with each of a sequence of right ones: a list of results."""
    options = {"left_ids": left_ids, "right_ids": right_ids, "dtype": dtype}
    if at_once := getattr(_module(backend), "outers", None):
        return at_once(left, rights, counts, **options)
    return [outer(left, right, counts, **options, backend=backend) for right in rights]


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
