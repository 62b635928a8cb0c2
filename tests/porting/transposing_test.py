import concurrent.futures

import ml_dtypes
import numpy as np
import pytest

from olmoe_jax.porting import transposing

FLOATS = ("float32", "bfloat16", "float16")
SMALL = ("float8_e5m2", "float8_e4m3fn", "float8_e4m3b11fnuz")
SHAPES = [
    (3, 5),
    (1, 7),
    (255, 257),
    (256, 512),
    (517, 263),
    (257, 2),
    (0, 3),
]  # about the size of a block


def _random(dtype, shape, seed=0):
    """Random bits: subnormal numbers, infinities and NaNs with payloads among them."""
    rng = np.random.default_rng([seed, *shape])
    return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def _bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*FLOATS, "int8", "float64"])
def test_a_transpose_keeps_every_bit(dtype, shape):
    source, out = _random(dtype, shape), np.empty(shape[::-1], dtype)
    transposing.copy(source, out, transpose=True)
    np.testing.assert_array_equal(_bits(out), _bits(source).T)


@pytest.mark.parametrize("shape", [*SHAPES, (7,)])
def test_a_copy_keeps_every_bit(shape):
    for dtype in FLOATS:
        source, out = _random(dtype, shape), np.empty(shape, dtype)
        transposing.copy(source, out, transpose=False)
        np.testing.assert_array_equal(_bits(out), _bits(source))


def test_a_vector_is_its_own_transpose():
    source, out = _random("bfloat16", (7,)), np.empty(7, "bfloat16")
    transposing.copy(source, out, transpose=True)
    np.testing.assert_array_equal(_bits(out), _bits(source))


def _rounded(source):
    """float32 → bfloat16, round to nearest even by its definition on integers; no NaN."""
    bits = source.view(np.uint32).astype(np.uint64)
    upper, rest = bits >> 16, bits & 0xFFFF
    return (upper + ((rest > 0x8000) | ((rest == 0x8000) & (upper & 1 == 1)))).astype(np.uint16)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_cast_rounds_to_nearest_even(transpose):
    source = _random("float32", (263, 517))
    source[::3] = (_bits(source[::3]) & 0xFFFF0000 | 0x8000).view("float32")  # ties
    source[np.isnan(source)] = 3.0
    out = np.empty(source.shape[::-1] if transpose else source.shape, "bfloat16")
    transposing.copy(source, out, transpose=transpose)
    np.testing.assert_array_equal(_bits(out.T if transpose else out), _rounded(source))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("origin", FLOATS)
@pytest.mark.filterwarnings("error")
def test_casts_keep_nan_infinity_and_zero(origin, target, transpose):
    source = np.array([[np.nan, np.inf, -np.inf], [0.0, -0.0, 1.0]], origin)
    _bits(source)[0, 0] += 1 if origin == target else 0  # a payload
    out = np.empty(source.shape[::-1] if transpose else source.shape, target)
    transposing.copy(source, out, transpose=transpose)
    out = out.T if transpose else out
    np.testing.assert_array_equal(out.astype("float32"), source.astype("float32"))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(source))


@pytest.mark.filterwarnings("error")
def test_nan_with_only_low_payload_bits_stays_nan_and_too_large_becomes_infinite():
    source = np.array([[0x7F800001, 0xFF800001, 0x7F7FFFFF]], np.uint32).view("float32")
    for target in ("bfloat16", "float16"):
        out = np.empty((3, 1), target)
        transposing.copy(source, out, transpose=True)
        assert np.isnan(out[:2]).all() and np.isinf(out[2, 0])


def test_views_and_data_at_odd_bytes():
    data = np.zeros(3 + 2 * 300 * 400, np.uint8)
    data[3:] = np.random.default_rng(0).integers(0, 256, data.size - 3)
    whole = data[3:].view("bfloat16").reshape(300, 400)
    source, target = whole[5:, 7:271], np.zeros((2, 264, 600), "bfloat16")
    out = target[1, :, 1:591:2]
    transposing.copy(source, out, transpose=True)
    np.testing.assert_array_equal(_bits(out), _bits(source).T)
    assert not _bits(target[0]).any() and not _bits(target[1, :, ::2]).any()


def test_a_read_only_source_is_left_alone():
    source = _random("float32", (3, 5))
    source.flags.writeable = False
    transposing.copy(source, np.empty((5, 3), "bfloat16"), transpose=True)


def test_threads_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(transposing, "_BLOCK", 2048)  # long enough for the others to wake up
    sources = [_random("bfloat16", (1021, 1031), seed) for seed in range(3)]
    outs = [np.empty((1031, 1021), "bfloat16") for _ in sources]

    def work(source, out):
        for _ in range(5):
            transposing.copy(source, out, transpose=True)

    with concurrent.futures.ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(work, sources, outs))
    for source, out in zip(sources, outs, strict=True):
        np.testing.assert_array_equal(_bits(out), _bits(source).T)


@pytest.mark.parametrize("shape, transpose", [((3, 5), True), ((5, 3), False), ((1, 3), True)])
def test_shapes_that_do_not_fit_are_not_broadcast(shape, transpose):
    with pytest.raises(ValueError, match="the array to fill is .*: expected"):
        transposing.copy(np.zeros((3, 5)), np.zeros(shape), transpose=transpose)


@pytest.mark.parametrize("target", [*FLOATS, "float64", *SMALL])
@pytest.mark.parametrize("origin", ["bfloat16", "float16", *SMALL])
def test_loses_says_whether_any_of_all_values_changes(origin, target):
    size = np.dtype(origin).itemsize
    values = np.arange(256**size).astype(f"u{size}").view(origin)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values[np.isfinite(values)]
        back = values.astype(target).astype("float64")
    assert transposing.loses(origin, target) == (back != values.astype("float64")).any()


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_loses_from_float32(target):
    assert transposing.loses("float32", target)
    assert transposing.loses(np.dtype("float32"), ml_dtypes.bfloat16)
    assert not transposing.loses("float32", "float32")
    assert not transposing.loses("float32", "float64")
