"""`jax.lax.ragged_dot_general`: a Mosaic kernel on TPU, products over all groups elsewhere.

Elsewhere, and on TPU in the cases named in README.md, it is right but slow: every row is multiplied
by every group's matrix.
"""

import jax
import jax.numpy as jnp

# Any other number of rows is multiplied densely on TPU. Compilers have refused 120 rows, too.
ROWS = 32


def matmul(rows, weights, counts, *, transpose):
    """See `grouped_matmul.matmul`."""
    n = rows.shape[0]
    # The product's dtype is asked for directly: a float32 result would be written out in full.
    out = jax.lax.ragged_dot_general(
        _padded(rows), weights, counts, dimensions(1, 2 if transpose else 1, [0]),
        preferred_element_type=rows.dtype,
    )[:n]  # fmt: skip
    return jnp.where(used(out, counts), out, 0)


def outer(left, right, counts, *, dtype):
    """See `grouped_matmul.outer`."""
    left, right = (_padded(jnp.where(used(a, counts), a, 0)) for a in (left, right))
    return jax.lax.ragged_dot_general(
        left, right, counts, dimensions(0, 0, []), preferred_element_type=dtype
    )


def dimensions(left, right, groups):
    """Contract axis `left` of the rows, which are ragged along axis 0, with axis `right`."""
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([left], [right]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )


def _padded(rows):
    return jnp.pad(rows, ((0, -rows.shape[0] % ROWS), (0, 0)))


def used(rows, counts):
    """bool [n, 1]: does the row belong to a group? Select by it: 0 · NaN is NaN."""
    return (jnp.arange(rows.shape[0]) < jnp.sum(counts))[:, None]
