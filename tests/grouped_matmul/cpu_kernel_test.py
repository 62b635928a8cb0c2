import ctypes
import itertools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.grouped_matmul import cpu_kernel
from olmoe_jax.grouped_matmul.cpu_kernel import build

if cpu_kernel.missing() and build.compiler() and not build.unsupported():
    build.build()
    cpu_kernel.missing.cache_clear()
pytestmark = pytest.mark.skipif(
    cpu_kernel.missing() is not None, reason=cpu_kernel.missing() or "the kernel is there"
)

FP32_SUM = 3e-6  # order of summation, against float64, relative to the largest result
BF16_ROUNDING = 5e-3  # the result is rounded to 8 bits once

INSTRUCTIONS = [
    pytest.param(name, marks=pytest.mark.skipif(not cpu_kernel.supported(name), reason="not here"))
    for name in cpu_kernel.INSTRUCTIONS
]
DTYPES = ("float32", "bfloat16")
# (n, d, f, counts): every tail of a register tile, pieces of the inner width, blocks of rows and
# columns; empty groups, one group, spare rows, no rows.
CASES = {
    "tiny": (11, 3, 5, (2, 0, 7, 1)),
    "tails": (43, 37, 67, (17, 1, 0, 23)),
    "one group": (397, 71, 307, (397,)),
    "all to the last": (53, 13, 17, (0, 0, 53)),
    "deep": (83, 1103, 37, (79, 0, 3)),
    "long group": (1301, 29, 31, (1201, 0, 37)),
    "long group, wide": (1301, 29, 67, (1201, 0, 37)),
    "whole tiles": (56, 96, 64, (28, 28)),
    "largest block": (1024, 336, 257, (1024,)),
    "no row used": (7, 5, 3, (0, 0)),
    "no row at all": (0, 5, 3, (0, 0)),
}


def _arrays(case, dtype, seed=0):
    """rows [n, d], right [n, f], weights [e, d, f], counts; the rows of nobody are NaN."""
    n, d, f, counts = CASES[case] if isinstance(case, str) else case
    rng = np.random.default_rng(seed)
    shapes = ((n, d), (n, f), (len(counts), d, f))
    rows, right, weights = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    used = sum(counts)
    return (
        rows.at[used:].set(np.nan),
        right.at[used:].set(np.nan),
        weights,
        jnp.asarray(counts, jnp.int32),
    )


def _slices(counts):
    counts = np.asarray(counts)
    ends = np.cumsum(counts)
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _expected_matmul(rows, weights, counts, transpose):
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    weights = weights.swapaxes(1, 2) if transpose else weights
    out = np.zeros((rows.shape[0], weights.shape[2]))
    for part, w in zip(_slices(counts), weights, strict=True):
        out[part] = rows[part] @ w
    return out


def _expected_outer(left, right, counts):
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return np.stack([left[part].T @ right[part] for part in _slices(counts)])


def _assert_close(got, expected):
    tolerance = BF16_ROUNDING if got.dtype == jnp.bfloat16 else FP32_SUM
    assert got.shape == expected.shape
    scale = max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_products_match_float64(case, dtype, instructions):
    rows, right, weights, counts = _arrays(case, dtype)
    for transpose, left in ((False, rows), (True, right)):
        got = cpu_kernel.matmul(
            left, weights, counts, transpose=transpose, instructions=instructions
        )
        assert got.dtype == dtype
        _assert_close(got, _expected_matmul(left, weights, counts, transpose))
        assert not np.asarray(got, np.float32)[sum(CASES[case][3]) :].any()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_products_are_added_to_init(case, dtype, instructions):
    rows, right, weights, counts = _arrays(case, dtype)
    for transpose, left, out in ((False, rows, right), (True, right, rows)):
        init = jnp.nan_to_num(out)  # its rows of nobody are kept
        got = cpu_kernel.matmul(
            left, weights, counts, init=init, transpose=transpose, instructions=instructions
        )
        assert got.dtype == dtype
        expected = _expected_matmul(left, weights, counts, transpose)
        _assert_close(got, expected + np.asarray(init, np.float64))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_outer_matches_float64_and_adds_to_init(case, out_dtype, dtype, instructions):
    rows, right, weights, counts = _arrays(case, dtype)
    expected = _expected_outer(rows, right, counts)
    got = cpu_kernel.outer(rows, right, counts, dtype=out_dtype, instructions=instructions)
    assert got.dtype == out_dtype
    _assert_close(got, expected)
    assert not np.asarray(got, np.float32)[np.asarray(counts) == 0].any()
    init = weights.astype(out_dtype)
    got = cpu_kernel.outer(
        rows, right, counts, dtype=out_dtype, init=init, instructions=instructions
    )
    _assert_close(got, expected + np.asarray(init, np.float64))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@hypothesis.given(data=st.data())
def test_any_shape(instructions, data):
    d, f = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    n, dtype = sum(counts) + data.draw(st.integers(0, 9)), data.draw(st.sampled_from(DTYPES))
    rows, right, weights, counts = _arrays((n, d, f, tuple(counts)), dtype)
    forward = cpu_kernel.matmul(rows, weights, counts, instructions=instructions)
    back = cpu_kernel.matmul(right, weights, counts, transpose=True, instructions=instructions)
    outer = cpu_kernel.outer(rows, right, counts, dtype="float32", instructions=instructions)
    _assert_close(forward, _expected_matmul(rows, weights, counts, False))
    _assert_close(back, _expected_matmul(right, weights, counts, True))
    _assert_close(outer, _expected_outer(rows, right, counts))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_bfloat16_is_rounded_to_nearest_even_and_keeps_nan_and_infinity(instructions):
    # Each row is a sum of two numbers: ties to even, just above a tie, what is not finite.
    high = [1, 1 + 2**-7, 1, -3e38, np.inf, np.nan]
    low = [2**-8, 2**-8, 2**-8 + 2**-12, 0, 0, 0]
    rows = jnp.asarray([high, low], jnp.bfloat16).T
    got = cpu_kernel.matmul(
        rows, jnp.ones((1, 2, 1), "bfloat16"), jnp.array([6], jnp.int32), instructions=instructions
    )
    exact = np.asarray(rows, np.float32).sum(1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got[:, 0], np.float32), exact.astype(np.float32))


def test_the_order_of_summation_does_not_depend_on_the_group():
    rows, _, weights, _ = _arrays((97, 601, 41, (97, 0)), "float32")
    alone = cpu_kernel.matmul(rows, weights[:1], jnp.array([97], jnp.int32))
    split = cpu_kernel.matmul(rows, weights[jnp.array([0, 0])], jnp.array([29, 68], jnp.int32))
    np.testing.assert_array_equal(alone, split)


def test_works_under_the_transformations(compilations):
    rows, right, weights, counts = _arrays("tails", "float32")
    expected = _expected_matmul(rows, weights, counts, False)
    both = jax.vmap(cpu_kernel.matmul)(*(jnp.stack([a, a]) for a in (rows, weights, counts)))
    _assert_close(both[1], expected)
    _, scanned = jax.lax.scan(
        lambda c, w: (c, cpu_kernel.matmul(rows, w, counts)), 0, jnp.stack([weights, 2 * weights])
    )
    _assert_close(scanned[1], 2 * expected)
    jitted = jax.jit(jax.checkpoint(cpu_kernel.matmul))
    _assert_close(jitted(rows, weights, counts), expected)
    other = jnp.array([1, 2, 3, 35], jnp.int32)
    rows = jnp.nan_to_num(rows)
    before = compilations()
    _assert_close(jitted(rows, weights, other), _expected_matmul(rows, weights, other, False))
    assert compilations() == before


def test_every_device_of_a_mesh_computes_its_own_groups():
    mesh = jax.make_mesh((8,), ("expert",))
    spec = jax.sharding.PartitionSpec("expert")
    arrays = _arrays((8 * 13, 37, 17, (5, 8) * 8), "bfloat16")
    rows, right, weights, counts = jax.device_put(arrays, jax.NamedSharding(mesh, spec))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, spec))
    def both(rows, right, weights, counts):
        outer = cpu_kernel.outer(rows, right, counts, dtype="float32")
        return cpu_kernel.matmul(rows, weights, counts), outer

    for _ in range(20):  # eight callers share one pool of threads
        got = both(rows, right, weights, counts)
    _assert_close(got[0], _expected_matmul(rows, weights, counts, False))
    _assert_close(got[1], _expected_outer(rows, right, counts))


def test_init_is_added_to_in_place_when_donated_and_left_alone_when_not():
    rows, right, weights, counts = _arrays("tails", "float32")

    def add(init, rows, right):
        return cpu_kernel.outer(rows, right, counts, dtype="float32", init=init)

    copy = jnp.array(weights)
    kept = np.asarray(weights).copy()
    expected = _expected_outer(rows, right, counts) + kept
    _assert_close(jax.jit(add)(weights, rows, right), expected)
    np.testing.assert_array_equal(weights, kept)
    pointer = copy.unsafe_buffer_pointer()
    got = jax.jit(add, donate_argnums=0)(copy, rows, right)
    _assert_close(got, expected)
    assert got.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize(
    "counts, message", [((3, -1), r"counts\[1\] is -1"), ((3, 9), "counts sum to 12: there are 11")]
)
def test_wrong_counts_are_an_error_not_a_crash(counts, message):
    counts = jnp.array(counts, jnp.int32)
    rows, weights = jnp.ones((11, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(cpu_kernel.matmul(rows, weights, counts))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(cpu_kernel.outer(rows, rows, counts, dtype="float32"))


def test_shapes_and_dtypes_are_checked():
    rows, right, weights, counts = _arrays("tiny", "float32")
    with pytest.raises(ValueError, match=r"rows \(11, 3\) do not fit weights"):
        cpu_kernel.matmul(rows, weights, counts, transpose=True)
    with pytest.raises(ValueError, match=r"counts is int32\[3\]: expected int32\[4\]"):
        cpu_kernel.matmul(rows, weights, counts[:3])
    with pytest.raises(ValueError, match="dtypes are float16 and float16"):
        cpu_kernel.matmul(rows.astype("float16"), weights.astype("float16"), counts)
    with pytest.raises(ValueError, match="dtypes are float32 and bfloat16"):
        cpu_kernel.outer(rows, right.astype("bfloat16"), counts, dtype="float32")
    with pytest.raises(ValueError, match="left .* does not fit right"):
        cpu_kernel.outer(rows, right[:5], counts, dtype="float32")
    with pytest.raises(ValueError, match="dtype is float16"):
        cpu_kernel.outer(rows, right, counts, dtype="float16")
    with pytest.raises(ValueError, match=r"init is float32\[4, 3, 5\]: expected bfloat16"):
        cpu_kernel.outer(rows, right, counts, dtype="bfloat16", init=weights)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The sources alone, in another folder."""
    for name in build.SOURCES:
        (tmp_path / name).write_bytes((build.FOLDER / name).read_bytes())
    caches = (build.library, build.load, cpu_kernel.missing)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_without_the_library_it_says_what_to_run(elsewhere):
    assert "python -m olmoe_jax.grouped_matmul.cpu_kernel" in cpu_kernel.missing()
    assert not cpu_kernel.supported("avx2")
    with pytest.raises(ValueError, match="not built: run make"):
        cpu_kernel.matmul(jnp.ones((2, 3)), jnp.ones((1, 3, 5)), jnp.array([2], jnp.int32))


def test_a_damaged_library_is_a_sentence(elsewhere):
    build.library().parent.mkdir()
    build.library().write_bytes(b"no library")
    assert "cannot be loaded" in cpu_kernel.missing()


def test_another_machine_is_a_sentence(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    cpu_kernel.missing.cache_clear()
    assert "Linux on x86-64 only; this is Linux arm64" in cpu_kernel.missing()
    monkeypatch.undo()
    cpu_kernel.missing.cache_clear()


def test_no_compiler_and_a_failing_compiler_are_one_line(elsewhere, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        build.build()
    monkeypatch.delenv("CXX")
    (elsewhere / "product.h").write_text("wrong;")
    build.library.cache_clear()
    with pytest.raises(ValueError, match="cannot compile the kernel: .*error"):
        build.build()
    assert not list((elsewhere / "build").iterdir())


def test_the_command_exits_0_without_a_compiler(tmp_path):
    code = (
        "import pathlib, runpy; from olmoe_jax.grouped_matmul.cpu_kernel import build;"
        f"build.library = lambda: pathlib.Path({str(tmp_path)!r}) / 'none.so';"
        "build.COMPILERS = ();"
        "runpy.run_module('olmoe_jax.grouped_matmul.cpu_kernel', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not built" in done.stdout and "no C++ compiler" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_both_compilers_build_it(cxx, elsewhere, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    if build.compiler() is None:
        pytest.skip(f"{cxx} is missing")
    assert build.build() == build.library()
    assert [path.name for path in (elsewhere / "build").iterdir()] == [build.library().name]
    # Not `missing()`, which registers: XLA takes a target from one library only.
    assert ctypes.CDLL(str(build.library())).olmoe_jax_has(b"")


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_number_of_rows_and_columns_of_a_tile(instructions):
    for rows, columns in itertools.product(range(1, 31), (1, 15, 16, 17, 31, 32, 33)):
        left, right, weights, counts = _arrays((rows, 7, columns, (rows,)), "bfloat16")
        got = cpu_kernel.matmul(left, weights, counts, instructions=instructions)
        _assert_close(got, _expected_matmul(left, weights, counts, False))
        got = cpu_kernel.outer(left, right, counts, dtype="float32", instructions=instructions)
        _assert_close(got, _expected_outer(left, right, counts))
