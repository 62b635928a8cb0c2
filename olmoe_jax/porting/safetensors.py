"""The safetensors format: read by memory maps, written piece by piece.

    8 bytes  N, little-endian, at most 100,000,000
    N bytes  JSON {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets"}, …}; begins
             with "{", may end in spaces
    the rest data, row-major, little-endian; the offsets tile it without a hole

The library of the same name is not used, for two reasons. It can only write a file whose tensors
are all in memory, and a released file is 13.8 GB. And it takes a header in which a name occurs
twice, the last one winning (measured with 0.8.0); here that is an error, like everything that the
format forbids. Headers whose data begin at any byte are read: the library itself wrote such ones
before 0.3. Source: README and `safetensors/src/tensor.rs` of huggingface/safetensors.
"""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import types

import ml_dtypes  # noqa: F401  np.dtype("bfloat16") and the like exist once it is imported
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the library refuses more
PYTORCH = types.MappingProxyType({"format": "pt"})  # metadata that transformers asks for
MAX_RANK = 64  # of a tensor: NumPy's limit

# Names in a header → names in NumPy, in the order in which the library lays out tensors.
_DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_ORDER = {name: rank for rank, name in enumerate(_DTYPES.values())}
_LFS = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file.

    Attributes:
      dtype: as NumPy and ml_dtypes call it ("float32", "bfloat16", …).
      start, stop: bytes from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says that it holds.

    Attributes:
      text: the N bytes as they are, with their padding.
      tensors: {name: Tensor} in the order of the data.
      metadata: {str: str}.
    """

    text: bytes
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def file_bytes(self) -> int:
        """Size of a file with this header."""
        return max((t.stop for t in self.tensors.values()), default=8 + len(self.text))


def num_bytes(dtype, shape) -> int:
    """Bytes of an array; Python integers, so nothing overflows."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def read_header(path) -> Header:
    """The header of the file `path`, checked against the size of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not what the format asks for; names the file and the tensor.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        first = file.read(8)
        if first + file.read(len(_LFS) - 8) == _LFS:
            raise ValueError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
        length, actual = int.from_bytes(first, "little"), os.fstat(file.fileno()).st_size
        if length > MAX_HEADER:
            raise ValueError(
                f"{path}: not a safetensors file: its header would have {length} bytes, at most "
                f"{MAX_HEADER} are allowed"
            )
        if actual < 8 + length:
            raise ValueError(
                f"{path}: truncated: {actual} bytes, and the header alone needs {8 + length}; "
                "fetch the file again"
            )
        file.seek(8)
        header = parse_header(file.read(length), path)
    if actual != header.file_bytes:
        what = "truncated" if actual < header.file_bytes else "bytes after the last tensor"
        raise ValueError(
            f"{path}: {what}: {actual} bytes, its header describes {header.file_bytes}; fetch the "
            "file again"
        )
    return header


def parse_header(text, where) -> Header:
    """The Header that `text` (the N bytes) spells.

    Args:
      where: what to call the file in messages.

    Raises:
      ValueError: not what the format asks for; names the tensor.
    """
    if not text.startswith(b"{"):
        raise ValueError(f"{where}: not a safetensors file: its header does not begin with '{{'")
    entries = parse_json(text, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{where}: __metadata__ in its header must map strings to strings")
    begin = 8 + len(text)
    tensors = {name: _tensor(name, entry, begin, where) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, tensor in tensors.items():
        if tensor.start != begin:
            what = "a hole before" if tensor.start > begin else "another tensor overlaps"
            raise ValueError(
                f"{where}: {what} {name!r}: it begins at byte {tensor.start}, expected {begin}"
            )
        begin = tensor.stop
    return Header(text, tensors, metadata)


def parse_json(text, where) -> dict:
    """The JSON object that the bytes `text` spell.

    Args:
      where: what to call it in messages.

    Raises:
      ValueError: broken, not an object, or a key occurs twice (Python's reader takes the last).
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON {type(value).__name__}, expected an object")
    return value


def _without_duplicates(pairs):
    """A JSON object as a dict, if no key occurs twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in out if keys.count(key) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return out


def _tensor(name, entry, begin, where):
    """The Tensor that one entry of a header describes; data begin at byte `begin`."""

    def is_sizes(value, most):
        right = isinstance(value, list) and len(value) <= most
        return right and all(type(x) is int and 0 <= x < 2**63 for x in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: {name!r} must have dtype, shape and data_offsets, nothing else")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{where}: {name!r} has dtype {code!r}; known are {', '.join(_DTYPES)}")
    if not is_sizes(shape, MAX_RANK) or not is_sizes(offsets, 2) or len(offsets) < 2:
        raise ValueError(
            f"{where}: {name!r} must have a shape of at most {MAX_RANK} sizes and two "
            "data_offsets, all integers ≥ 0 and below 2**63"
        )
    start, stop = offsets
    expected = num_bytes(_DTYPES[code], shape)
    if stop - start != expected:
        raise ValueError(
            f"{where}: {name!r} ({code} {shape}) needs {expected} bytes, its data_offsets span "
            f"{stop - start}"
        )
    return Tensor(_DTYPES[code], tuple(shape), begin + start, begin + stop)


def memory_map(path, tensor) -> np.ndarray:
    """A read-only array over the bytes of one tensor; nothing is read before it is looked at."""
    if tensor.start == tensor.stop:
        out = np.empty(tensor.shape, tensor.dtype)
        out.flags.writeable = False
        return out
    first = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        length = tensor.stop - first
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=first)
    return np.ndarray(tensor.shape, tensor.dtype, mapped, tensor.start - first)


def build_header(tensors, metadata=PYTORCH) -> bytes:
    """The header that the library writes for these tensors, byte for byte.

    Tensors are laid out by dtype, then by name. With two or more metadata keys the library's own
    order changes from save to save; here it is that of `metadata`.

    Args:
      tensors: {name: (dtype, shape)}.
      metadata: {str: str}, or None for a header without.

    Raises:
      ValueError: a dtype that the format does not have.

    >>> build_header({"a": ("bfloat16", (2, 3))}, None)
    b'{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}      '
    """
    kinds = {name: (np.dtype(dtype).name, shape) for name, (dtype, shape) in tensors.items()}
    for name, (dtype, _) in kinds.items():
        if dtype not in _CODES:
            raise ValueError(f"{name!r} is {dtype}: safetensors has no such dtype")
    entries = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name in sorted(kinds, key=lambda name: (_ORDER[kinds[name][0]], name)):
        dtype, shape = kinds[name]
        stop = begin + num_bytes(dtype, shape)
        shape = [int(size) for size in shape]
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, stop]}
        begin = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class Writer(contextlib.AbstractContextManager):
    """Writes the tensors of one file in any order, from any thread.

    The file has its full size from the beginning, so that nothing moves later. One that is already
    there, with the same header, is taken up again with the tensors that it holds.

    Args:
      path: the file.
      header_text: bytes of the header (`build_header`, or another file's `Header.text`).

    Raises:
      ValueError: the header is wrong, or `path` exists with another header or size.
    """

    def __init__(self, path, header_text):
        self.path, self.header = path, parse_header(header_text, path)
        start = len(header_text).to_bytes(8, "little") + header_text
        if not os.path.exists(path):
            new = f"{path}.new"  # appears with its header and size, or not at all
            with open(new, "wb") as file:
                file.write(start)
                file.truncate(self.header.file_bytes)
            os.replace(new, path)
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        same = os.fstat(self._file).st_size == self.header.file_bytes
        if not same or os.pread(self._file, len(start), 0) != start:
            os.close(self._file)
            raise ValueError(
                f"{path}: exists with another header or size than the file to be written; remove it"
            )

    def write(self, name, array, start=0):
        """Writes rows `start`, `start` + 1, … of tensor `name`, the bytes as they are.

        Args:
          array: [rows, …] of the tensor's dtype and trailing shape; [] for a scalar.

        Raises:
          ValueError: no such tensor, another dtype or shape, or rows beyond its end.
        """
        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{self.path}: its header has no tensor {name!r}")
        array = np.asarray(array)
        if array.dtype != np.dtype(tensor.dtype) or array.ndim != len(tensor.shape):
            fits = False
        elif not tensor.shape:
            fits = start == 0
        else:
            fits = array.shape[1:] == tensor.shape[1:] and 0 <= start
            fits = fits and start + len(array) <= tensor.shape[0]
        if not fits:
            raise ValueError(
                f"{self.path}: {name!r} is {tensor.dtype} {list(tensor.shape)}: {array.dtype} "
                f"{list(array.shape)} does not fit into it at row {start}"
            )
        row = num_bytes(tensor.dtype, tensor.shape[1:])
        _write_all(self._file, array, tensor.start + start * row)

    def close(self):
        """Waits until the bytes are on the disk; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def __exit__(self, *_):
        self.close()


def _write_all(file, array, offset):
    """Writes all bytes of `array`; one system call moves at most 2 GiB, or less."""
    left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
