"""Grouped matrix products in plain JAX: loops over blocks of rows that each belong to one group.

Right on every platform, made for CPU, where a block is one ordinary product that XLA spreads over
the cores. A block has one of a few sizes, so that a group's last one wastes little, and each size
has a loop of its own. How many steps a loop takes is data: groups without rows cost nothing. What a
block costs beside its product are copies, as XLA multiplies no slice in place and writes no product
into one.

Measured on two Zen 4 cores: one loop that picks each block's size is as fast on jax 0.12 (by a
`switch`), but on 0.10 it copies the whole result time and again (by inner loops of 0 or 1 steps: 16
times slower).

Elsewhere, a number of steps that depends on data waits for the host: there it is one loop of
n / 128 + e steps of 128 rows.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax

# Rows that a block may have, in sixteenths of a balanced group. More choices waste fewer rows, but
# each takes compile time; they are closest where a trained router's loads lie.
SIXTEENTHS = (2, 4, 8, 12, 14, 16, 18, 24)
STATIC_SIZE = 128  # rows, elsewhere than on CPU


def matmul(rows, weights, counts, *, row_ids=None, transpose=False):
    """See `grouped_matmul.matmul`."""
    return matmuls(rows, (weights,), counts, row_ids=row_ids, transpose=transpose)[0]


def matmuls(rows, weights, counts, *, row_ids=None, transpose=False):
    """See `grouped_matmul.matmuls`; the rows are cut out once."""
    table = [[w] for w in weights]
    function = functools.partial(_matmuls, transpose=transpose)
    return _by_platform(function, [(rows, row_ids)], table, counts)


def matmul_sum(rows, weights, counts, *, transpose=False):
    """See `grouped_matmul.matmul_sum`; the sum is written once."""
    function = functools.partial(_matmuls, transpose=transpose)
    return _by_platform(function, [(r, None) for r in rows], [list(weights)], counts)[0]


def outer(left, right, counts, *, left_ids=None, right_ids=None, dtype):
    """See `grouped_matmul.outer`."""
    return outers(left, (right,), counts, left_ids=left_ids, right_ids=right_ids, dtype=dtype)[0]


def outers(left, rights, counts, *, left_ids=None, right_ids=None, dtype):
    """See `grouped_matmul.outers`; the left rows are cut out and transposed once."""
    function = functools.partial(_outers, dtype=dtype)
    rights = [(right, right_ids) for right in rights]
    return _by_platform(function, (left, left_ids), rights, counts)


def _by_platform(function, *arrays):
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(function, _over_sized_blocks),
        default=functools.partial(function, _over_static_blocks),
    )


def _matmuls(over_blocks, rows, weights, counts, *, transpose):
    """[Σ over i of rows[i] times weights[j][i], for every j]: all in one loop."""
    dtype = weights[0][0].dtype
    rows = [_Rows.of(*r) for r in rows]
    n = rows[0].count
    multiply, width = (dot_transposed, 1) if transpose else (dot, 2)
    weights = [[_bits(w) for w in row] for row in weights]

    def body(block, outs):
        at, own = _position(block, n)
        # Unmasked: each row's product is its own, and that of another group's is not kept.
        cuts = [_values(r.cut(at, block.size), dtype) for r in rows]

        def updated(out, weights):
            matrices = (_values(_of_group(w, block), dtype) for w in weights)
            terms = (multiply(cut, w) for cut, w in zip(cuts, matrices, strict=True))
            y = _bits(functools.reduce(jnp.add, terms).astype(dtype))
            # Rows of other groups stay as they are: they may be done, or nobody's.
            y = jnp.where(own, y, lax.dynamic_slice_in_dim(out, at, block.size))
            return lax.dynamic_update_slice_in_dim(out, y, at, 0)

        return [updated(*pair) for pair in zip(outs, weights, strict=True)]

    outs = [_bits(jnp.zeros((n, w[0].shape[width]), dtype)) for w in weights]
    return [_values(out, dtype) for out in over_blocks(counts, n, body, outs)]


def _outers(over_blocks, left, rights, counts, *, dtype):
    """[leftᵀ · right per group, for every right]: all in one loop."""
    operand_dtype = left[0].dtype
    left, rights = _Rows.of(*left), [_Rows.of(*right) for right in rights]
    n, e = left.count, counts.shape[0]

    def body(block, outs):
        at, own = _position(block, n)

        def cut(rows):  # zeros in place of other groups' rows
            bits = rows.cut(at, block.size)
            return _values(jnp.where(own, bits, jnp.zeros((), bits.dtype)), operand_dtype)

        left_transposed = transposed(cut(left))

        def updated(out, right):
            old = jnp.where(block.is_first, 0, _of_group(out, block))
            new = dot(left_transposed, cut(right)) + old
            return lax.dynamic_update_index_in_dim(out, new, block.group, 0)

        return [updated(*pair) for pair in zip(outs, rights, strict=True)]

    outs = [jnp.zeros((e, left.width, right.width), jnp.float32) for right in rights]
    return [out.astype(dtype) for out in over_blocks(counts, n, body, outs)]


class _Block(typing.NamedTuple):
    """Rows start … start + count of one group, among `size` (static) rows that are computed."""

    size: int
    start: jax.Array
    count: jax.Array
    group: jax.Array
    is_first: jax.Array  # of its group


class _Rows(typing.NamedTuple):
    """Rows in order, or those of `ids`."""

    bits: jax.Array
    ids: jax.Array | None

    @classmethod
    def of(cls, rows, ids):
        return cls(_bits(rows), ids)

    @property
    def count(self):
        return (self.bits if self.ids is None else self.ids).shape[0]

    @property
    def width(self):
        return self.bits.shape[1]

    def cut(self, at, size):
        """`size` rows from the one at `at` on."""
        if self.ids is None:
            return lax.dynamic_slice_in_dim(self.bits, at, size)
        ids = lax.dynamic_slice_in_dim(self.ids, at, size)
        return self.bits.at[ids].get(mode="clip")


def _over_sized_blocks(counts, n, body, carry):
    """carry = body(block, carry) for every block that has rows, the largest first."""
    if n == 0:
        return carry
    sizes = _sizes(n, counts.shape[0])
    plan, used = _plan(counts, n, sizes[-1])
    # Term by term: an array of sizes may be empty, which shard_map's lowering does not take.
    smaller = sum(((plan[1] <= size).astype(jnp.int32) for size in sizes[:-1]), plan[1] * 0)
    # A group's only block that may be smaller is its last, so their order within it is kept.
    in_use = jnp.arange(plan[1].size) < used
    rank = jnp.where(in_use, smaller, len(sizes))
    order = jnp.argsort(rank, stable=True)
    plan = [a[order] for a in plan]
    stops = jnp.cumsum(jnp.bincount(rank, length=len(sizes)))
    start = 0
    for size, stop in zip(reversed(sizes), stops, strict=True):
        carry = lax.fori_loop(
            start, stop, lambda i, c, size=size: body(_Block(size, *(a[i] for a in plan)), c), carry
        )
        start = stop
    return carry


def _over_static_blocks(counts, n, body, carry):
    """The same with one size and a fixed number of blocks, some of them without rows."""
    if n == 0:
        return carry
    size = min(n, STATIC_SIZE)
    plan, _ = _plan(counts, n, size)
    return lax.scan(lambda c, block: (body(_Block(size, *block), c), None), carry, plan)[0]


def _sizes(n, e):
    """The rows that a block may have, ascending: multiples of 8, or n."""
    share = n / e
    return sorted({min(n, 8 * max(1, round(i * share / 128))) for i in SIXTEENTHS})


def _plan(counts, n, largest):
    """((start, count, group, is_first) of every block, each [n // largest + min(e, n)]; how many
    blocks have rows). Those behind have none, and the group of the last that has."""
    e = counts.shape[0]
    blocks = -(-counts // largest)
    ends, stops = jnp.cumsum(blocks), jnp.cumsum(counts)
    used = ends[-1]
    index = jnp.arange(n // largest + min(e, n), dtype=jnp.int32)
    place = jnp.clip(index, 0, jnp.maximum(used - 1, 0))
    group = jnp.minimum(jnp.searchsorted(ends, place, side="right"), e - 1).astype(jnp.int32)
    nth = place - (ends - blocks)[group]
    start = (stops - counts)[group] + nth * largest
    count = jnp.where(index < used, jnp.minimum(stops[group] - start, largest), 0)
    return (start, count, group, (nth == 0) & (index < used)), used


def _position(block, n):
    """Where the block begins, moved up if it would end behind row n; which rows are its own."""
    at = jnp.minimum(block.start, n - block.size)
    row = at + jnp.arange(block.size)
    return at, ((row >= block.start) & (row < block.start + block.count))[:, None]


def _of_group(array, block):
    return lax.dynamic_index_in_dim(array, block.group, keepdims=False)


def dot(a, b):
    """a @ b, summed in float32 and left so; this and the next two are a block's products."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def dot_transposed(a, b):
    """a @ b.T."""
    if a.dtype == jnp.bfloat16:  # by itself XLA multiplies in float32 then, at half the speed
        return dot(a, transposed(b))
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def transposed(x):
    """x.T, copied before it is multiplied: XLA's product with a transposed left side is slower."""
    if x.dtype != jnp.bfloat16:
        return lax.optimization_barrier(x.T)
    # In tiles: XLA transposes 16-bit numbers one by one, and a column of them is spread over few
    # cache lines' places (half the time at [256, 512]).
    rows, columns = x.shape
    p, q = math.gcd(rows, 32), math.gcd(columns, 32)
    tiles = _bits(x).reshape(rows // p, p, columns // q, q).transpose(2, 3, 0, 1)
    return _values(lax.optimization_barrier(tiles.reshape(columns, rows)), x.dtype)


def _bits(x):
    """bfloat16 as the integers it consists of: for a slice of bfloat16 out of an array, or into it,
    jax 0.10's XLA converts the whole array to float32 and back."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(bits, dtype):
    return lax.bitcast_convert_type(bits, dtype) if dtype == jnp.bfloat16 else bits
