"""Rows named by ids, and products that share rows or a result: the same for every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import grouped_matmul
from olmoe_jax.grouped_matmul import loop

TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}  # order of summation; two roundings to 8 bits
T, N, D, F = 23, 61, 37, 43
LOADS = {
    "spread": (3, 0, 29, 1, 20),
    "all to one": (0, 0, 61, 0, 0),
    "nothing": (0, 0, 0, 0, 0),
    "longer than a block": (0, 701, 0, 2, 1),
}


@pytest.fixture(params=["loop", "static loop", "kernel", "ragged"])
def backend(request, monkeypatch):
    name = request.param.split()[-1]
    if reason := grouped_matmul.missing(name):
        pytest.skip(reason)
    if request.param == "static loop":
        monkeypatch.setattr(loop, "_over_sized_blocks", loop._over_static_blocks)
        monkeypatch.setattr(loop, "STATIC_SIZE", 8)
    jax.clear_caches()
    yield name
    jax.clear_caches()


def _case(load, dtype):
    counts = LOADS[load]
    n = max(N, sum(counts) + 5)
    rng = np.random.default_rng(len(load))
    ids = rng.integers(0, T, n).astype(np.int32)
    weights_shape = (len(counts), D, F)
    shapes = ((T, D), (n, F), (n, F), weights_shape, weights_shape)
    arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return counts, n, ids, *arrays


def _close(results, expected, dtype):
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=0, atol=TOLERANCE[dtype] * scale
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("load", LOADS)
def test_rows_by_ids_are_the_rows_themselves(backend, load, dtype):
    counts, n, ids, x, *arrays = _case(load, dtype)
    rights, weights = arrays[:2], arrays[2:]
    number = jnp.asarray(counts, jnp.int32)
    group = np.repeat(np.arange(len(counts) + 1), (*counts, n - sum(counts)))
    own = np.eye(len(counts) + 1)[group][:, : len(counts)]
    wide_rows, *wide = (np.asarray(a, np.float64) for a in (x[ids], *rights, *weights))

    matmuls = functools.partial(grouped_matmul.matmuls, backend=backend)
    want = [np.einsum("ne,nd,edf->nf", own, wide_rows, w) for w in wide[2:]]
    one = grouped_matmul.matmul(x, weights[0], number, row_ids=ids, backend=backend)
    _close([one], want[:1], dtype)
    _close(matmuls(x, weights, number, row_ids=ids), want, dtype)
    _close(matmuls(x[ids], weights, number), want, dtype)

    for transpose, rows, dims in (
        (True, rights, "nf,edf->nd"),
        (False, [x[ids]] * 2, "nd,edf->nf"),
    ):
        pairs = zip((np.asarray(r, np.float64) for r in rows), wide[2:], strict=True)
        want = sum(np.einsum(f"ne,{dims}", own, r, w) for r, w in pairs)
        total = grouped_matmul.matmul_sum(
            rows, weights, number, transpose=transpose, backend=backend
        )
        _close([total], [want], dtype)

    outers = functools.partial(grouped_matmul.outers, dtype=jnp.float32, backend=backend)
    want = [np.einsum("ne,nd,nf->edf", own, wide_rows, right) for right in wide[:2]]
    _close(outers(x, rights, number, left_ids=ids), want, dtype)
    for right, product in zip(rights, want, strict=True):
        swapped = outers(right, [x], number, right_ids=ids)
        _close(swapped, [product.swapaxes(1, 2)], dtype)


def test_an_id_beyond_the_rows_is_an_error_of_the_kernel_not_a_crash():
    if reason := grouped_matmul.missing("kernel"):
        pytest.skip(reason)
    counts, _, ids, x, right, _, weights, _ = _case("spread", "float32")
    number = jnp.asarray(counts, jnp.int32)
    for bad in (T, -1, 2**31 - 1):
        ids[7] = bad
        with pytest.raises(Exception, match=f"id {bad} at 7: there are {T} rows"):
            out = grouped_matmul.matmul(x, weights, number, row_ids=ids, backend="kernel")
            jax.block_until_ready(out)
        for name, left, other in (("left_ids", x, right), ("right_ids", right, x)):
            with pytest.raises(Exception, match=f"id {bad} at 7: there are {T} rows"):
                out = grouped_matmul.outer(
                    left, other, number, dtype=jnp.float32, backend="kernel", **{name: ids}
                )
                jax.block_until_ready(out)
    with pytest.raises(ValueError, match=r"int32\[n\]"):
        grouped_matmul.matmul(x, weights, number, row_ids=ids.astype(float), backend="kernel")
