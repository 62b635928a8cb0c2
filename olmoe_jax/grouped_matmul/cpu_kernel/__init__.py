"""Grouped products on x86 processors: a compiled kernel, called by XLA on its own threads.

Optional. `python -m olmoe_jax.grouped_matmul.cpu_kernel` (or `make`) builds it where a C++ compiler
is; `missing()` says why it cannot run here. The instruction set is chosen when it runs, so that a
compiled program may move to another processor: AVX-512 with bfloat16 products in matrix registers
(AMX) or in vectors, AVX-512, or AVX2 (the last two widen bfloat16 to float32). Sums are float32 in
an order that depends on the shapes and counts only: results are the same whatever the number of
threads.
"""

import functools

import jax
import jax.numpy as jnp

from olmoe_jax.grouped_matmul.cpu_kernel import build

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512", "avx2")
TARGETS = ("olmoe_jax_matmul", "olmoe_jax_outer")
COMMAND = "python -m olmoe_jax.grouped_matmul.cpu_kernel"


def matmul(rows, weights, counts, *, row_ids=None, init=None, transpose=False, instructions=""):
    """See `grouped_matmul.matmul`.

    Args:
      init: like the result, or None: the products are added to it, in place if nothing else needs
        it.
      instructions: one of INSTRUCTIONS, default the best here.
    Raises:
      ValueError: shapes or dtypes do not fit each other, or the kernel is `missing`.
    """
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[2 if transpose else 1]:
        raise ValueError(
            f"rows {rows.shape} do not fit weights {weights.shape}: expected [n, d] and [e, d, f], "
            "with transpose [n, f] and [e, d, f]"
        )
    _check(rows, weights, counts, groups=weights.shape[0])
    n = rows.shape[0] if row_ids is None else row_ids.shape[0]
    out = jax.ShapeDtypeStruct((n, weights.shape[1 if transpose else 2]), rows.dtype)
    return _call(
        "olmoe_jax_matmul",
        out,
        (rows, weights, counts, _ids(row_ids)),
        init,
        attributes=dict(transpose=transpose, instructions=instructions),
    )


def matmul_sum(rows, weights, counts, *, transpose=False):
    """See `grouped_matmul.matmul_sum`: each product is added to those before it, in place."""
    out = None
    for r, w in zip(rows, weights, strict=True):
        out = matmul(r, w, counts, init=out, transpose=transpose)
    return out


def outer(left, right, counts, *, left_ids=None, right_ids=None, dtype, init=None, instructions=""):
    """See `grouped_matmul.outer`.

    Args:
      init: [e, d, f] in `dtype`, or None: the products are added to it, in place if nothing else
        needs it.
      instructions: one of INSTRUCTIONS, default the best here.
    Raises:
      ValueError: shapes or dtypes do not fit each other, or the kernel is `missing`.
    """
    rows = [
        x.shape[:1] if ids is None else ids.shape
        for x, ids in ((left, left_ids), (right, right_ids))
    ]
    if left.ndim != 2 or right.ndim != 2 or rows[0] != rows[1]:
        raise ValueError(
            f"left {left.shape} does not fit right {right.shape}: expected [n, d], [n, f]; "
            f"with ids as many on both sides, they are {rows}"
        )
    _check(left, right, counts, groups=counts.shape[0])
    out = jax.ShapeDtypeStruct((counts.shape[0], left.shape[1], right.shape[1]), jnp.dtype(dtype))
    if out.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {out.dtype}: expected float32 or bfloat16")
    return _call(
        "olmoe_jax_outer",
        out,
        (left, right, counts, _ids(left_ids), _ids(right_ids)),
        init,
        attributes=dict(instructions=instructions),
    )


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot run here and what to do, as a sentence; None if it can."""
    if build.unsupported():
        return build.unsupported()
    if not build.library().exists():
        return f"the compiled kernel is not built: run make, or {COMMAND}"
    try:
        library = build.load()
        has_any, targets = library.olmoe_jax_has(b""), [getattr(library, name) for name in TARGETS]
    except (OSError, AttributeError) as error:
        return f"the compiled kernel cannot be loaded ({error}): delete it and run {COMMAND}"
    if not has_any:
        return "the compiled kernel needs AVX2, which this processor lacks"
    for name, target in zip(TARGETS, targets, strict=True):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(target), platform="cpu")
    return None


def supported(instructions) -> bool:
    """Whether the kernel is built and this processor has these INSTRUCTIONS."""
    return missing() is None and bool(build.load().olmoe_jax_has(instructions.encode()))


def _check(left, right, counts, *, groups):
    if counts.shape != (groups,) or counts.dtype != jnp.int32:
        raise ValueError(f"counts is {counts.dtype}{list(counts.shape)}: expected int32[{groups}]")
    if left.dtype != right.dtype or left.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"dtypes are {left.dtype} and {right.dtype}: expected both float32 or both bfloat16"
        )


def _ids(ids):
    """An empty array stands for rows in order."""
    if ids is None:
        return jnp.zeros(0, jnp.int32)
    if ids.ndim != 1 or ids.dtype != jnp.int32:
        raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}: expected int32[n]")
    return ids


def _call(name, out, arguments, init, *, attributes):
    if reason := missing():
        raise ValueError(reason)
    aliases = {}
    if init is not None:
        if (init.shape, init.dtype) != (out.shape, out.dtype):
            raise ValueError(
                f"init is {init.dtype}{list(init.shape)}: expected {out.dtype}{list(out.shape)}"
            )
        aliases = {len(arguments): 0}
        arguments += (init,)
    call = jax.ffi.ffi_call(name, out, vmap_method="sequential", input_output_aliases=aliases)
    return call(*arguments, **attributes)
