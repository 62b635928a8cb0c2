import concurrent.futures
import json
import mmap
import os

import hypothesis
import hypothesis.strategies as st
import ml_dtypes  # noqa: F401  names its dtypes
import numpy as np
import pytest

from olmoe_jax.porting import safetensors

LIBRARY = "needs the safetensors library"
DTYPES = (
    "uint64 int64 float64 complex64 float32 uint32 int32 bfloat16 float16 uint16 int16 "
    "float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu float8_e4m3fn float8_e5m2 int8 uint8 bool"
).split()


def _random(dtype, shape, seed=0):
    """Random bits, NaNs with payloads among them; a bool is 0 or 1."""
    rng = np.random.default_rng([seed, *shape])
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = rng.integers(0, 2 if dtype == "bool" else 256, size, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def _model():
    """Tensors of several dtypes, a scalar and an empty one, in no particular order."""
    kinds = {
        "model.norm.weight": ("float32", (7,)),
        "model.layers.10.mlp.gate.weight": ("bfloat16", (5, 3)),
        "model.layers.2.mlp.gate.weight": ("bfloat16", (5, 3)),
        'a "quoted" \\ né\n\x01\x7f/\u2028': ("float16", (2, 3, 5)),
        "scalar": ("float32", ()),
        "empty": ("int8", (0, 11)),
        "odd": ("uint8", (13,)),
    }
    return {n: _random(*kind, seed) for seed, (n, kind) in enumerate(kinds.items())}


def _kinds(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def _write(path, tensors, **kwargs):
    with safetensors.Writer(path, safetensors.build_header(_kinds(tensors), **kwargs)) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def _same(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, None])
def test_a_written_file_is_the_librarys_byte_for_byte(metadata, tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason=LIBRARY)
    _write(tmp_path / "ours", _model(), metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == library.save(_model(), metadata)


def test_every_dtype_is_laid_out_and_read_as_the_library_does(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason=LIBRARY)
    tensors = {f"{i % 3}.{name}": _random(name, (3,), i) for i, name in enumerate(DTYPES)}
    expected = library.save(tensors, {"format": "pt"})
    (tmp_path / "file").write_bytes(expected)
    header = safetensors.read_header(tmp_path / "file")
    assert header.text == safetensors.build_header(_kinds(tensors))
    assert header.metadata == {"format": "pt"}
    for name, array in tensors.items():
        _same(safetensors.memory_map(tmp_path / "file", header.tensors[name]), array)


@hypothesis.given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5),
        st.tuples(st.sampled_from(["float32", "bfloat16", "uint8"]), st.integers(0, 3)),
        max_size=5,
    )
)
def test_headers_equal_the_librarys_whatever_the_names(kinds):
    library = pytest.importorskip("safetensors.numpy", reason=LIBRARY)
    kinds.pop("__metadata__", None)
    tensors = {name: _random(dtype, (size,)) for name, (dtype, size) in kinds.items()}
    text = safetensors.build_header(_kinds(tensors))
    assert library.save(tensors, {"format": "pt"}).startswith(
        len(text).to_bytes(8, "little") + text
    )
    assert dict(safetensors.parse_header(text, "here").tensors).keys() == tensors.keys()


def test_a_file_reads_back_as_written(tmp_path):
    _write(tmp_path / "file", _model())
    header = safetensors.read_header(tmp_path / "file")
    assert header.file_bytes == os.path.getsize(tmp_path / "file")
    assert header.metadata == {"format": "pt"} and len(header.text) % 8 == 0
    assert [t.start for t in header.tensors.values()] == sorted(
        t.start for t in header.tensors.values()
    )
    assert header.tensors.keys() == _model().keys()
    for name, array in _model().items():
        found = safetensors.memory_map(tmp_path / "file", header.tensors[name])
        _same(found, array)
        assert not found.flags.writeable and (found.size == 0 or not found.flags.owndata)


def test_data_that_begin_at_odd_bytes_are_read(tmp_path):
    text = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    array = _random("float32", (2, 3))
    assert len(text) % 4
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + array.tobytes())
    header = safetensors.read_header(tmp_path / "file")
    found = safetensors.memory_map(tmp_path / "file", header.tensors["a"])
    assert not found.flags.aligned
    _same(found, array)
    with np.errstate(invalid="ignore"):
        _same(found.astype("bfloat16"), array.astype("bfloat16"))


def test_an_empty_tensor_where_a_page_begins_is_read(tmp_path):
    text = safetensors.build_header({"a": ("float32", (0, 3))}).ljust(mmap.PAGESIZE - 8)
    safetensors.Writer(tmp_path / "file", text).close()
    tensor = safetensors.read_header(tmp_path / "file").tensors["a"]
    assert tensor.start == os.path.getsize(tmp_path / "file") == mmap.PAGESIZE
    found = safetensors.memory_map(tmp_path / "file", tensor)
    assert found.shape == (0, 3) and found.dtype == "float32" and not found.flags.writeable


def _entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


BAD_HEADERS = {
    "a duplicate": (b'{"a":' + json.dumps(_entry()).encode() + b',"a":1}', "'a' occurs twice"),
    "a duplicate inside": (b'{"a":{"dtype":"F32","dtype":"F16"}}', "'dtype' occurs twice"),
    "a leading space": (b' {"a":{}}', "does not begin with '{'"),
    "nothing": (b"", "does not begin with '{'"),
    "broken JSON": (b'{"a":', "broken JSON"),
    "two objects": (b"{} {}", "broken JSON"),
    "no UTF-8": (b'{"\xff":1}', "broken JSON"),
    "half a character": (b'{"\\ud800":1}', "broken JSON"),
    "depth": (b'{"a":' * 100_000, "broken JSON"),
    "a list": ({"a": [1]}, "'a' must have dtype, shape and data_offsets"),
    "another field": ({"a": _entry(other=1)}, "'a' must have dtype, shape"),
    "a missing field": ({"a": {"dtype": "F32", "shape": []}}, "'a' must have dtype, shape"),
    "an unknown dtype": ({"a": _entry(dtype="F33")}, "'a' has dtype 'F33'; known are U64"),
    "a dtype of half a byte": ({"a": _entry(dtype="F4")}, "'a' has dtype 'F4'"),
    "a dtype that is none": ({"a": _entry(dtype=["F32"])}, "'a' has dtype"),
    "a wrong size": ({"a": _entry(shape=(2, 5))}, r"\[2, 5\].* needs 40 bytes, .* span 24"),
    "a size too small": ({"a": _entry(shape=(2, 2))}, r"\[2, 2\].* needs 16 bytes, .* span 24"),
    "a negative size": ({"a": _entry(shape=(-2, -3))}, "'a' must have a shape of at most 64"),
    "a float": ({"a": _entry(shape=(2.0, 3))}, "'a' must have a shape"),
    "a bool": ({"a": _entry(shape=(True, 6))}, "'a' must have a shape"),
    "huge numbers": ({"a": _entry(shape=[10**400] * 9)}, "'a' must have a shape"),
    "many dimensions": ({"a": _entry(shape=[1] * 65)}, "'a' must have a shape of at most 64"),
    "overflow": ({"a": _entry(shape=[2**62] * 2 + [2**4])}, "needs 1361129467683753853853"),
    "three offsets": ({"a": _entry(offsets=(0, 24, 24))}, "two data_offsets"),
    "one offset": ({"a": _entry(offsets=(24,))}, "two data_offsets"),
    "swapped offsets": ({"a": _entry(offsets=(24, 0))}, "span -24"),
    "a hole": ({"a": _entry(offsets=(4, 28))}, "a hole before 'a': it begins at byte"),
    "a hole between": ({"a": _entry(), "b": _entry(offsets=(25, 49))}, "a hole before 'b'"),
    "an overlap": ({"a": _entry(), "b": _entry(offsets=(20, 44))}, "another tensor overlaps 'b'"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "metadata of text": ({"__metadata__": "a"}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(case, tmp_path):
    text, match = BAD_HEADERS[case]
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(24)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        safetensors.read_header(tmp_path / "file")
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=match):
        safetensors.Writer(tmp_path / "other", text)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda data: data[:-1], "truncated: 166 bytes, its header describes 167"),
        (lambda data: data[:100], "truncated: 100 bytes, and the header alone needs 152"),
        (lambda data: data[:5], "truncated: 5 bytes"),
        (lambda data: b"", "truncated: 0 bytes"),
        (lambda data: data + b"\0", "bytes after the last tensor: 168 .*describes 167"),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "would have 1099511627776 bytes"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_a_damaged_file_is_refused(change, match, tmp_path):
    _write(tmp_path / "file", {"a": _random("uint8", (3, 5)), "b": _random("uint8", (0,))})
    data = (tmp_path / "file").read_bytes()
    assert len(data) == 167
    (tmp_path / "file").write_bytes(change(data))
    with pytest.raises(ValueError, match=match):
        safetensors.read_header(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        safetensors.read_header(tmp_path / "nothing.safetensors")


@hypothesis.given(st.data())
def test_no_header_raises_anything_but_a_value_error(data):
    text = bytearray(safetensors.build_header(_kinds(_model())))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(1, len(text) - 1))
        text[position] = data.draw(st.sampled_from(list(b'0129-.eE,:[]{}"\\u tnF\x00\xff')))
    try:
        header = safetensors.parse_header(bytes(text), "here")
    except ValueError as error:
        assert str(error).startswith("here")
    else:
        stops = [t.stop for t in header.tensors.values()]
        assert header.file_bytes == max(stops) and header.text == bytes(text)


def test_rows_may_come_in_any_order_from_any_thread(tmp_path):
    tensors = _model()
    header = safetensors.build_header(_kinds(tensors))
    pieces = [
        (name, array[i : i + 1] if array.ndim else array, i)
        for name, array in tensors.items()
        for i in range(len(array) if array.ndim else 1)
    ]
    np.random.default_rng(1).shuffle(pieces)
    with safetensors.Writer(tmp_path / "file", header) as writer:
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
    _write(tmp_path / "other", tensors)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes()


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path):
    array = _random("bfloat16", (5, 7)).T
    _write(tmp_path / "file", {"a": array})
    tensor = safetensors.read_header(tmp_path / "file").tensors["a"]
    _same(safetensors.memory_map(tmp_path / "file", tensor), array)


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    _write(tmp_path / "file", _model())
    monkeypatch.undo()
    _write(tmp_path / "other", _model())
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    "name, array, start, match",
    [
        ("b", np.zeros((2, 3), "float32"), 0, "its header has no tensor 'b'"),
        ("a", np.zeros((5, 3), "float16"), 0, r"'a' is float32 \[5, 3\]: float16 \[5, 3\] does"),
        ("a", np.zeros((5, 3), ">f4"), 0, "does not fit"),
        ("a", np.zeros((3, 5), "float32"), 0, "does not fit"),
        ("a", np.zeros((15,), "float32"), 0, "does not fit"),
        ("a", np.zeros((2, 3), "float32"), 4, "does not fit into it at row 4"),
        ("a", np.zeros((2, 3), "float32"), -1, "does not fit into it at row -1"),
        ("scalar", np.zeros((), "float32"), 1, "does not fit into it at row 1"),
        ("scalar", np.zeros((1,), "float32"), 0, "does not fit"),
    ],
)
def test_what_does_not_fit_is_not_written(name, array, start, match, tmp_path):
    header = safetensors.build_header({"a": ("float32", (5, 3)), "scalar": ("float32", ())})
    with safetensors.Writer(tmp_path / "file", header) as writer:
        before = (tmp_path / "file").read_bytes()
        with pytest.raises(ValueError, match=match):
            writer.write(name, array, start)
    assert (tmp_path / "file").read_bytes() == before


def test_an_unfinished_file_is_taken_up_again(tmp_path):
    tensors = _model()
    header = safetensors.build_header(_kinds(tensors))
    first, *others = tensors
    writer = safetensors.Writer(tmp_path / "file", header)
    assert os.path.getsize(tmp_path / "file") == writer.header.file_bytes
    writer.write(first, tensors[first])
    writer.close()
    writer.close()
    with safetensors.Writer(tmp_path / "file", header) as writer:
        for name in others:
            writer.write(name, tensors[name])
    _write(tmp_path / "other", tensors)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_a_file_with_another_header_or_size_is_not_touched(tmp_path):
    _write(tmp_path / "file", {"a": _random("float32", (3,))})
    before = (tmp_path / "file").read_bytes()
    for kind in (("float32", (5,)), ("int32", (3,))):
        with pytest.raises(ValueError, match="file: exists with another header or size.*remove it"):
            safetensors.Writer(tmp_path / "file", safetensors.build_header({"a": kind}))
        assert (tmp_path / "file").read_bytes() == before
    (tmp_path / "file").write_bytes(before + b"\0")
    with pytest.raises(ValueError, match="exists with another header or size"):
        safetensors.Writer(tmp_path / "file", safetensors.build_header({"a": ("float32", (3,))}))


def test_a_file_appears_with_its_header_or_not_at_all(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    header = safetensors.build_header(_kinds(_model()))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        safetensors.Writer(tmp_path / "file", header)
    assert not (tmp_path / "file").exists()
    monkeypatch.undo()
    _write(tmp_path / "file", _model())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_dtype_without_a_code_is_refused():
    with pytest.raises(ValueError, match="'a' is complex128: safetensors has no such dtype"):
        safetensors.build_header({"a": ("complex128", (3,))})


def test_sizes_do_not_overflow():
    assert safetensors.num_bytes("bfloat16", (2**40, 2**40)) == 2**81
    assert safetensors.num_bytes("float32", ()) == 4
