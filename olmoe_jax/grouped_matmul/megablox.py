"""The Pallas kernels for TPU that come with JAX (megablox); interpreted, slowly, on a CPU.

What a product writes to HBM and reads from it is its tiles: chosen here, so that a group's matrix
is read once and no column is computed twice.
"""

import functools

import jax
import jax.numpy as jnp

# Names: the package's attribute `gmm` is a function, not this module.
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from olmoe_jax.grouped_matmul import ragged

# Rows of a tile. A group that ends within a tile costs one more, so small; 256 is the MXU's side.
ROWS = 256
# A tile of a group's matrix has at most this many elements (4 MB with both buffers in bfloat16),
# and contracts over at most so many columns: a matrix tiled along both axes is read per row tile.
AREA, DEPTH = 2**20, 2048


def matmul(rows, weights, counts, *, transpose):
    """See `grouped_matmul.matmul`."""
    n, depth = rows.shape
    width = weights.shape[1 if transpose else 2]
    tile_rows, tile_depth = _tile_rows(n), _tile(depth, DEPTH)
    out = _call(
        gmm, _padded(rows, tile_rows), weights, counts, transpose_rhs=transpose,
        preferred_element_type=rows.dtype,
        tiling=(tile_rows, tile_depth, _tile(width, AREA // tile_depth)),
    )[:n]  # fmt: skip
    # Tiles that no group owns are not written at all: select, as whatever is there may be NaN.
    return jnp.where(ragged.used(out, counts), out, 0)


def outer(left, right, counts, *, dtype):
    """See `grouped_matmul.outer`."""
    tile_rows, width = _tile_rows(left.shape[0]), _tile(right.shape[1], 1024)
    # The kernel itself selects a group's rows, so what lies behind the last group is never seen.
    return _call(
        tgmm, _padded(left, tile_rows).T, _padded(right, tile_rows), counts,
        preferred_element_type=dtype,
        tiling=(tile_rows, _tile(left.shape[1], AREA // 2 // width), width),
    )  # fmt: skip


def _tile(size, limit):
    """The multiple of 128 that covers `size` in as few tiles of at most `limit` as can be, with
    the least excess."""
    tiles = -(-size // limit)
    return -(-size // (tiles * 128)) * 128


def _tile_rows(n):
    return min(ROWS, -(-n // 16) * 16)  # 16: the sublanes of a bfloat16 register


def _padded(rows, multiple):
    return jnp.pad(rows, ((0, -rows.shape[0] % multiple), (0, 0)))


def _call(kernel, *arrays, **options):
    """Decided when lowered: a program for TPU may well be compiled on a machine without one."""
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(kernel, **options),
        default=functools.partial(kernel, interpret=True, **options),
    )
