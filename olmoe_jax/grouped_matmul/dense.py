"""Products of rows with one matrix: what attention, dense layers and the head are made of.

XLA's own products, but for bfloat16 on one CPU device where the compiled kernel is there: XLA
transposes or widens the operands of a bfloat16 gradient first, at half the kernel's speed or less.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmoe_jax.grouped_matmul import cpu_kernel

# What a layer keeps under these names (`jax.checkpoint`) spares it the product.
SAVED_NAMES = ("dense_product",)


@jax.custom_vjp
def product(x, weights):
    """x · weights.

    Args:
      x: [..., d].
      weights: [d, f], of x's dtype or wider: rounded to x's dtype for the product, while their
        gradient comes out unrounded.
    Returns:
      [..., f] in x's dtype; sums are float32.
    """
    return _matmul(x, weights.astype(x.dtype), transpose=False)


def _product_forward(x, weights):
    return checkpoint_name(product(x, weights), *SAVED_NAMES), (x, weights)


def _product_backward(residuals, d_y):
    x, weights = residuals
    d_x = _matmul(d_y, weights.astype(x.dtype), transpose=True)
    return d_x, _outer(x, d_y, weights.dtype)


product.defvjp(_product_forward, _product_backward)


def add_outer(total, left, right):
    """total + leftᵀ · right over all rows: the gradient of a matrix, in pieces.

    Args:
      total: float32 [1, d, f]; the kernel adds to it in place.
      left: [..., d]; right: [..., f], of the same dtype.
    Returns:
      float32 [1, d, f].
    """

    def kernel(total, left, right):
        return cpu_kernel.outer(left, right, _one(left), dtype=jnp.float32, init=total)

    def xla(total, left, right):
        return total + jnp.matmul(left.T, right, preferred_element_type=jnp.float32)

    return _choose(kernel, xla, total, _rows(left), _rows(right))


def _matmul(x, weights, *, transpose):
    def kernel(x, weights):
        rows = _rows(x)
        y = cpu_kernel.matmul(rows, weights[None], _one(rows), transpose=transpose)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def xla(x, weights):
        return x @ (weights.T if transpose else weights)

    return _choose(kernel, xla, x, weights)


def _outer(left, right, dtype):
    def kernel(left, right):
        return cpu_kernel.outer(left, right, _one(left), dtype=dtype)[0]

    def xla(left, right):
        return jnp.matmul(left.T, right, preferred_element_type=jnp.float32).astype(dtype)

    return _choose(kernel, xla, _rows(left), _rows(right))


def _choose(kernel, xla, *arguments):
    mesh = jax.sharding.get_abstract_mesh()
    one_device = mesh.empty or mesh.size == 1  # the partitioner cannot cut a compiled kernel
    bfloat16 = all(x.dtype == jnp.bfloat16 for x in arguments[-2:])
    if not bfloat16 or not one_device or cpu_kernel.missing() is not None:
        return xla(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=kernel, default=xla)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _one(rows):
    """The counts of a single group."""
    return jnp.full(1, rows.shape[0], jnp.int32)
