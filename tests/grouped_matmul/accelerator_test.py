"""Backends for TPU and CUDA, on a CPU: values by interpretation, the rest by compiling and lowering
for a machine that is not there."""

import importlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from olmoe_jax.grouped_matmul import loop, megablox, ragged

FP32_SUM = 1e-5  # order of summation
BF16 = 1e-2  # 8 bits of mantissa in operands and result
N, D, F, E = 31, 13, 7, 5
# Some to none, rows beyond the last group, all to one, nothing at all.
COUNTS = [[5, 0, 11, 3, 0], [0, 0, 0, 0, 31], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


@pytest.fixture(params=["ragged", "megablox", "tokamax"])
def backend(request):
    if request.param == "tokamax":
        pytest.importorskip("tokamax", reason="tokamax is not installed")
    return importlib.import_module(f"olmoe_jax.grouped_matmul.{request.param}")


def _arrays(seed, counts, dtype, *shapes):
    """Random; rows behind the last group are NaN in arrays of N rows."""
    random = np.random.default_rng(seed)
    arrays = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return [a.at[sum(counts) :].set(jnp.nan) if a.shape[0] == N else a for a in arrays]


def _float(a):
    return np.asarray(a, np.float64)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, FP32_SUM), (jnp.bfloat16, BF16)])
@pytest.mark.parametrize("transpose", [False, True])
def test_matmul_multiplies_each_row_by_its_group_and_the_rest_is_zero(
    backend, transpose, dtype, tolerance
):
    product = jax.jit(lambda a, b, c: backend.matmul(a, b, c, transpose=transpose))
    for seed, counts in enumerate(COUNTS):
        rows, weights = _arrays(seed, counts, dtype, (N, F if transpose else D), (E, D, F))
        out = product(rows, weights, jnp.asarray(counts, jnp.int32))
        expected = np.zeros(out.shape)
        for row, group in enumerate(np.repeat(np.arange(E), counts)):
            w = _float(weights)[group]
            expected[row] = _float(rows)[row] @ (w.T if transpose else w)
        assert out.dtype == dtype
        np.testing.assert_allclose(_float(out), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_outer_sums_over_the_rows_of_each_group(backend, out_dtype):
    product = jax.jit(lambda a, b, c: backend.outer(a, b, c, dtype=out_dtype))
    tolerance = FP32_SUM if out_dtype == jnp.float32 else BF16
    for seed, counts in enumerate(COUNTS):
        left, right = _arrays(seed, counts, jnp.bfloat16, (N, D), (N, F))
        out = product(left, right, jnp.asarray(counts, jnp.int32))
        expected = np.zeros((E, D, F))
        for row, group in enumerate(np.repeat(np.arange(E), counts)):
            expected[group] += np.outer(_float(left)[row], _float(right)[row])
        assert out.dtype == out_dtype
        np.testing.assert_allclose(_float(out), expected, rtol=tolerance, atol=4 * tolerance)


def test_megablox_is_right_where_a_group_crosses_tiles_and_tiles_do_not_divide_the_matrix():
    n, d, f, counts = 600, 150, 2100, [255, 1, 0, 300]  # 44 rows beyond
    random = np.random.default_rng(7)
    rows, right = (jnp.asarray(random.standard_normal((n, w)), jnp.float32) for w in (d, f))
    weights = jnp.asarray(random.standard_normal((4, d, f)), jnp.float32)
    groups = np.repeat(np.arange(4), counts)
    counts = jnp.asarray(counts, jnp.int32)
    out = jax.jit(lambda *a: megablox.matmul(*a, transpose=False))(rows, weights, counts)
    back = jax.jit(lambda *a: megablox.matmul(*a, transpose=True))(right, weights, counts)
    outer = jax.jit(lambda *a: megablox.outer(*a, dtype=jnp.float32))(rows, right, counts)
    for group in range(4):
        of = np.flatnonzero(groups == group)
        a, b, w = _float(rows)[of], _float(right)[of], _float(weights)[group]
        np.testing.assert_allclose(_float(out)[of], a @ w, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(_float(back)[of], b @ w.T, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(_float(outer)[group], a.T @ b, rtol=1e-4, atol=1e-4)
    assert not _float(out)[len(groups) :].any() and not _float(back)[len(groups) :].any()


@pytest.mark.parametrize("size", [7, 128, 1024, 2048, 4096, 14336, 1408])
@pytest.mark.parametrize("limit", [512, 1024, 2048])
def test_tiles_cover_a_matrix_once(size, limit):
    tile = megablox._tile(size, limit)
    tiles = -(-size // tile)
    assert tile % 128 == 0 and tile <= limit
    assert tiles == -(-size // limit) and tiles * tile - size < 128 * tiles


def _exported_for_cuda(function, *arrays):
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
    return exported(*arrays).mlir_module()


def _products(module, n, d, f, e, dtype=jnp.bfloat16):
    """(function, abstract arguments) of the three products."""

    def shape(*dimensions, dtype=dtype):
        return jax.ShapeDtypeStruct(dimensions, dtype)

    counts = shape(e, dtype=jnp.int32)
    return {
        "matmul": (
            lambda *a: module.matmul(*a, transpose=False),
            (shape(n, d), shape(e, d, f), counts),
        ),
        "transpose": (
            lambda *a: module.matmul(*a, transpose=True),
            (shape(n, f), shape(e, d, f), counts),
        ),
        "outer": (
            lambda *a: module.outer(*a, dtype=jnp.float32),
            (shape(n, d), shape(n, f), counts),
        ),
    }


@pytest.mark.parametrize("product", ["matmul", "transpose", "outer"])
def test_lowered_for_cuda_the_loop_holds_no_buffer_over_rows_and_groups(product):
    n, d, f, e = 4096, 256, 128, 64
    function, arrays = _products(loop, n, d, f, e)[product]
    text = _exported_for_cuda(function, *arrays)
    sizes = [
        np.prod([int(size) for size in dimensions.split("x")[:-1]], dtype=int)
        for dimensions in re.findall(r"tensor<((?:\d+x)+\w+)>", text)
    ]
    assert "ragged_dot" not in text
    # Of the size of an argument or result, and the spare rows of the last block.
    assert max(sizes) <= 2 * e * d * f < n * e * min(d, f)


@pytest.mark.parametrize("product", ["matmul", "transpose", "outer"])
def test_lowered_for_a_hopper_gpu_tokamax_is_a_mosaic_kernel(product, monkeypatch):
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    gpu_utils = importlib.import_module("tokamax._src.gpu_utils")
    tokamax = importlib.import_module("olmoe_jax.grouped_matmul.tokamax")
    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setitem(tokamax.IMPLEMENTATIONS, "cpu", "mosaic_gpu")
    function, arrays = _products(tokamax, 4096, 256, 128, 64)[product]
    text = _exported_for_cuda(function, *arrays)
    assert "mosaic_gpu" in text and "stablehlo.dot_general" not in text


def test_tokamax_says_what_is_missing_on_a_gpu(monkeypatch):
    tokamax = importlib.import_module("olmoe_jax.grouped_matmul.tokamax")
    installed = {"tokamax"}
    gpu = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(tokamax.importlib.util, "find_spec", lambda name: name in installed)
    assert tokamax.missing().startswith("jax-triton not installed")
    installed.add("jax_triton")
    assert tokamax.missing() is None
    gpu.compute_capability = "7.5"
    assert "NVIDIA A100" in tokamax.missing()
    gpu.device_kind, gpu.compute_capability = "AMD Instinct MI300X", "gfx942"
    assert "AMD Instinct MI300X" in tokamax.missing()


def _compiled_for_tpu(function, arrays):
    evidence = _evidence()
    device = evidence.topologies.get_topology_desc(evidence.CHIPS["v6e"], "tpu").devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there) for a in arrays]
    return jax.jit(function).lower(*arrays).compile()


def _evidence():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    return importlib.import_module("tests.grouped_matmul.tpu_evidence")


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 509])
@pytest.mark.parametrize("module", [megablox, ragged], ids=["megablox", "ragged"])
@pytest.mark.parametrize("product", ["matmul", "transpose", "outer"])
def test_compiled_for_a_tpu_any_number_of_rows_takes_a_kernel(module, product, n):
    if module is ragged and product == "outer" and jax.version.__version_info__ < (0, 11):
        pytest.skip("this libtpu multiplies all groups: README.md")
    function, arrays = _products(module, n, 256, 128, 64)[product]
    compiled = _compiled_for_tpu(function, arrays)
    assert "tpu_custom_call" in compiled.as_text()
    assert "convolution(" not in compiled.as_text()


@pytest.mark.slow
def test_the_layer_compiled_for_a_tpu_copies_no_weights_and_does_no_work_twice():
    layer = _evidence().compile_layer("megablox", "v6e")
    assert layer.weight_copies == 0
    assert layer.flops < 1.01
    assert layer.temporary_bytes < 2**30
