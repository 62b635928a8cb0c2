import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import grouped_matmul
from olmoe_jax.grouped_matmul import loop

FP32_SUM = 1e-5  # order of summation, relative to the largest value
BF16_ROUNDING = 2**-7  # one rounding to 8 bits, and sums that land beside a boundary

E, D, F, N = 5, 13, 7, 67
ADVERSARIES = {
    "balanced": (13, 14, 13, 14, 13),
    "all to one": (0, 0, 67, 0, 0),
    "none to some": (0, 41, 0, 0, 26),
    "ones": (1, 1, 1, 1, 1),
    "spare rows": (3, 0, 17, 1, 20),
    "primes": (2, 29, 31, 3, 2),
    "last one large": (0, 1, 0, 0, 66),
    "nothing": (0, 0, 0, 0, 0),
}


def _reference(rows, weights, other, counts):
    """(matmul, matmul transposed, outer) in float64, group by group."""
    rows, weights, other = (np.asarray(a, np.float64) for a in (rows, weights, other))
    plain, transposed = np.zeros_like(other), np.zeros_like(rows)
    product, stop = np.zeros_like(weights), 0
    for group, count in enumerate(counts):
        own = slice(stop, stop + count)
        plain[own] = rows[own] @ weights[group]
        transposed[own] = other[own] @ weights[group].T
        product[group] = rows[own].T @ other[own]
        stop += count
    return plain, transposed, product


def _inputs(seed, n=N, e=E, d=D, f=F, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((n, d), (e, d, f), (n, f))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames="dtype")
def _all_three(rows, weights, other, counts, dtype=jnp.float32):
    multiply = functools.partial(grouped_matmul.matmul, backend="loop")
    return (
        multiply(rows, weights, counts),
        multiply(other, weights, counts, transpose=True),
        grouped_matmul.outer(rows, other, counts, dtype=dtype, backend="loop"),
    )


def _check(results, expected, tolerance):
    for result, want in zip(results, expected, strict=True):
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        error = np.abs(np.asarray(result, np.float64) - want).max(initial=0)
        assert error <= tolerance * scale


@pytest.fixture(params=["sized", "static"])
def structure(request, monkeypatch):
    """Both ways over the blocks: that of CPU, and that of other platforms."""
    if request.param == "static":
        monkeypatch.setattr(loop, "_over_sized_blocks", loop._over_static_blocks)
        monkeypatch.setattr(loop, "STATIC_SIZE", 8)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def test_any_load_gives_the_groups_products(structure):
    for seed, counts in enumerate(ADVERSARIES.values()):
        inputs = _inputs(seed)
        results = _all_three(*inputs, jnp.array(counts, jnp.int32))
        _check(results, _reference(*inputs, counts), FP32_SUM)


def test_bfloat16_is_rounded_once(structure):
    for counts in (ADVERSARIES["spare rows"], ADVERSARIES["all to one"]):
        inputs = _inputs(3, d=32, f=64, dtype=jnp.bfloat16)
        results = _all_three(*inputs, jnp.array(counts, jnp.int32), dtype=jnp.bfloat16)
        assert all(r.dtype == jnp.bfloat16 for r in results)
        for result, want in zip(results, _reference(*inputs, counts), strict=True):
            np.testing.assert_allclose(
                np.asarray(result, np.float64), want, rtol=BF16_ROUNDING, atol=FP32_SUM * 100
            )


def test_float32_gradient_of_bfloat16_rows_is_not_rounded():
    counts = ADVERSARIES["primes"]
    inputs = _inputs(4, dtype=jnp.bfloat16)
    product = _all_three(*inputs, jnp.array(counts, jnp.int32))[2]
    assert product.dtype == jnp.float32
    _check([product], _reference(*inputs, counts)[2:], FP32_SUM)


def test_nan_stays_in_its_group(structure):
    counts = ADVERSARIES["spare rows"]  # 41 rows; group 1 has none, group 4 begins at row 21
    rows, weights, other = _inputs(5)
    expected = _reference(rows, weights, other, counts)
    rows, other = (a.at[sum(counts) :].set(jnp.nan) for a in (rows, other))
    poisoned = [weights.at[1].set(jnp.nan), weights.at[2].set(jnp.nan)]
    for w, own in zip(poisoned, (slice(0, 0), slice(3, 20)), strict=True):
        *products, product = _all_three(rows, w, other, jnp.array(counts, jnp.int32))
        for result, want in zip(products, expected[:2], strict=True):
            assert np.isnan(result[own]).all()
            _check([np.delete(result, own, axis=0)], [np.delete(want, own, axis=0)], FP32_SUM)
        _check([product], expected[2:], FP32_SUM)


def test_a_row_of_nan_spoils_no_other_row(structure):
    counts = ADVERSARIES["spare rows"]
    rows, weights, other = _inputs(10)
    expected = _reference(rows, weights, other, counts)
    rows, other = (a.at[7].set(jnp.nan) for a in (rows, other))
    products = _all_three(rows, weights, other, jnp.array(counts, jnp.int32))[:2]
    for result, want in zip(products, expected, strict=False):
        assert np.isnan(result[7]).all()
        _check([np.delete(result, 7, axis=0)], [np.delete(want, 7, axis=0)], FP32_SUM)


def test_another_load_compiles_nothing(compilations):
    inputs = _inputs(6)
    _all_three(*inputs, jnp.array(ADVERSARIES["balanced"], jnp.int32))
    before = compilations()
    for counts in ADVERSARIES.values():
        _all_three(*inputs, jnp.array(counts, jnp.int32))
    assert compilations() == before


def test_fewer_rows_than_groups():
    inputs = _inputs(7, n=3, e=11)
    counts = (0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    results = _all_three(*inputs, jnp.array(counts, jnp.int32))
    _check(results, _reference(*inputs, counts), FP32_SUM)


def test_groups_without_rows_cost_no_block():
    counts = jnp.zeros(64, jnp.int32).at[jnp.array([3, 17, 63])].set(jnp.array([1, 5, 2]))
    plan, used = loop._plan(counts, 11, largest=11)
    assert int(used) == 3
    assert [int(g) for g in plan[2][:3]] == [3, 17, 63]


def test_blocks_waste_few_rows():
    n, e = 16384, 64
    sizes = loop._sizes(n, e)
    counts = np.random.default_rng(8).multinomial(n, [1 / e] * e)
    plan, used = loop._plan(jnp.array(counts), n, sizes[-1])
    computed = sum(min(s for s in sizes if s >= c) for c in np.asarray(plan[1][: int(used)]))
    assert n <= computed < 1.08 * n


def test_under_scan_checkpoint_and_devices():
    counts = jnp.array(ADVERSARIES["spare rows"], jnp.int32)
    inputs = _inputs(9)
    expected = _reference(*inputs, counts)
    _, scanned = jax.lax.scan(
        jax.checkpoint(lambda c, _: (c, _all_three(*inputs, c))), counts, None, length=2
    )
    _check([r[1] for r in scanned], expected, FP32_SUM)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    many = [np.stack([a] * 8) for a in (*inputs, counts)]
    split = jax.shard_map(
        lambda *a: [r[None] for r in _all_three(*(b[0] for b in a))],
        mesh=mesh, in_specs=(spec,) * 4, out_specs=[spec] * 3, check_vma=False,
    )  # fmt: skip
    _check([r[7] for r in jax.jit(split)(*many)], expected, FP32_SUM)


def test_elsewhere_than_on_cpu_each_product_is_one_loop():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _inputs(0)]
    shapes.append(jax.ShapeDtypeStruct((E,), jnp.int32))
    dots = {}
    for platform in ("cpu", "cuda"):
        module = jax.export.export(_all_three, platforms=[platform])(*shapes).mlir_module()
        dots[platform] = module.count("stablehlo.dot_general")
    assert dots == {"cpu": 3 * len(loop._sizes(N, E)), "cuda": 3}


def test_products_that_share_rows_share_a_loop_and_its_cuts():
    rows, weights, other = _inputs(0)
    ids, counts = jnp.zeros(N, jnp.int32), jnp.zeros(E, jnp.int32)
    products = {
        "matmuls": lambda w, o: loop.matmuls(rows, w, counts, row_ids=ids),
        "outers": lambda w, o: loop.outers(rows, o, counts, left_ids=ids, dtype=jnp.float32),
        "matmul_sum": lambda w, o: loop.matmul_sum(o, w, counts, transpose=True),
    }
    for name, function in products.items():
        seen = []
        for many in (1, 2):
            lowered = jax.export.export(jax.jit(function))([weights] * many, [other] * many)
            text = lowered.mlir_module()
            operations = ("while", "gather", "transpose", "dot_general")
            seen.append([text.count(f"stablehlo.{operation}") for operation in operations])
        (*one, dots), (*two, twice) = seen
        assert one == two and twice == 2 * dots, name


@hypothesis.given(
    st.sampled_from((1, 2, 83)),
    st.lists(st.integers(0, 83), min_size=3, max_size=3),
    st.integers(0),
)
def test_random_loads(n, stops, seed):
    counts = np.diff(sorted(min(s, n) for s in stops), prepend=0)
    inputs = _inputs(seed, n=n, e=3)
    results = _all_three(*inputs, jnp.array(counts, jnp.int32))
    _check(results, _reference(*inputs, counts), FP32_SUM)


def test_no_row_at_all_gives_zero_gradients():
    rows, other, counts = jnp.zeros((0, 5)), jnp.zeros((0, 3)), jnp.zeros(2, jnp.int32)
    forward, back, product = _all_three(rows, jnp.ones((2, 5, 3)), other, counts)
    assert (forward.shape, back.shape, product.shape) == ((0, 3), (0, 5), (2, 5, 3))
    assert not product.any()
