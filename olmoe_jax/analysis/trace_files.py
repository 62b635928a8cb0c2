"""A routing trace on disk: written chunk by chunk, complete or absent, read without the model.

    DIR/trace.json         {"format": 1, TraceInfo's fields, "chunks": [tokens of each chunk],
                           "job": what else it was made of, such as the model's weights, or null}
    DIR/chunk_00000.npz    consecutive tokens: what `numpy.load` reads, a zip of deflated arrays

Arrays of a chunk, little-endian, rows in the order of the tokens:

    expert_ids      int8 (int16 above 128 experts) [tokens, layers, k], by falling weight; -1: none
    weights         float16 [tokens, layers, k]: softmax over all experts before any
                    renormalisation; absent where it is not known
    input_ids, predicted_ids, next_ids, documents   int32 [tokens], as in `trace.Block`
    losses          float32 [tokens], nats; absent where they are not known
    near_ties       int64 [layers]: of this chunk (see TraceInfo); absent where it is not known

A token takes 3 · layers · k + 20 bytes before compression: 404 for OLMoE-1B-7B (16 layers, k 8).
float16 keeps a weight to 1/2048 of itself (to 3e-8 where it is below 6e-5). The zip holds a CRC-32
of every array, which reading checks. While it is written the directory is DIR.partial, with the
journal of `checkpoints.partial`; whatever chunks are whole there, the same recording goes on with.
"""

import dataclasses
import io
import json
import os
import pathlib
import zipfile

import numpy as np

from olmoe_jax.analysis import trace
from olmoe_jax.checkpoints import manifest, naming, partial

FORMAT = 1
INFO = "trace.json"
CHUNK_TOKENS = 65536  # at least, unless `flush` cuts it short
SMALL_IDS = 128  # up to so many experts an id is one byte
_COMPRESSION = 1  # of zlib: weights hardly compress, ids do so at any level

# Array of a chunk → its dtype; of expert_ids see `id_dtype`.
_DTYPES = {
    "weights": "<f2", "input_ids": "<i4", "predicted_ids": "<i4", "next_ids": "<i4",
    "documents": "<i4", "losses": "<f4",
}  # fmt: skip
_OPTIONAL = ("weights", "losses")


def id_dtype(num_experts) -> np.dtype:
    """Of expert_ids on disk.

    >>> id_dtype(128).name, id_dtype(129).name
    ('int8', 'int16')
    """
    return np.dtype("int8" if num_experts <= SMALL_IDS else "<i2")


class TraceWriter:
    """Writes a trace to the new directory `path`. A context manager.

        with TraceWriter(path, info) as writer:
            for block in blocks_behind(writer.tokens):
                writer.add(block)
            result = writer.finish()

    Leaving it before `finish` keeps `{path}.partial`, with which the same trace goes on.

    Args:
      path: of the directory, on a local disk.
      info: TraceInfo; its near_ties are ignored, and counted instead.
      job: JSON values: what else decides the contents, and must be equal for an interrupted trace
        to go on.

    Attributes:
      tokens: that are in whole chunks already; `add` continues behind them.

    Raises:
      FileExistsError: `path` exists.
      ValueError: `{path}.partial` is of another trace, or another process writes it.
    """

    def __init__(self, path, info, job=None):
        self._info, self._job = dataclasses.replace(info, near_ties=()), job
        self._partial = partial.Partial(path, {**dataclasses.asdict(self._info), "job": job})
        try:
            sound = self._partial.sound(lambda name, _: _bytes(self._partial.folder / name))
            self._chunks = []
            while (
                piece := sound.get((_chunk_name(len(self._chunks)), (self.tokens,)))
            ) is not None:
                self._chunks.append(piece.shape[0])
            kept = {_chunk_name(n) for n in range(len(self._chunks))} | {partial.JOURNAL}
            for file in self._partial.folder.iterdir():
                if file.name not in kept:
                    file.unlink()
        except BaseException:
            self._partial.close()
            raise
        self._waiting, self._near_ties = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._partial.close()

    @property
    def tokens(self) -> int:
        """Tokens in whole chunks."""
        return sum(self._chunks)

    def add(self, block, near_ties=None):
        """The next tokens.

        Args:
          block: trace.Block.
          near_ties: int [layers], how many of them were near-ties; None: not known.

        Raises:
          ValueError: shapes or expert ids are not those of `info`.
        """
        info, shape = self._info, block.expert_ids.shape
        if shape[1:] != (expected := (len(info.layers), info.num_experts_per_token)):
            raise ValueError(f"expert_ids are {list(shape)}: expected [tokens, {expected}]")
        low, high = block.expert_ids.min(initial=-1), block.expert_ids.max(initial=-1)
        if low < -1 or high >= info.num_experts:
            raise ValueError(
                f"expert_ids lie in {low}..{high}: expected -1..{info.num_experts - 1}"
            )
        self._waiting.append(block)
        self._near_ties.append(near_ties)
        if sum(map(len, self._waiting)) >= CHUNK_TOKENS:
            self.flush()

    def finish(self, near_ties=None) -> "FileTrace":
        """Writes what is left, and puts the directory in its place.

        Args:
          near_ties: int [layers] of the whole trace; None: the sum of what `add` was told.

        Raises:
          ValueError: there are more or fewer tokens than `info` says.
        """
        self.flush()
        if self.tokens != self._info.num_tokens:
            raise ValueError(
                f"{self._partial.path}: {self.tokens} tokens were added, info says "
                f"{self._info.num_tokens}"
            )
        folder, counted = self._partial.folder, []
        for n in range(len(self._chunks)):
            with np.load(folder / _chunk_name(n)) as arrays:
                counted.append(arrays["near_ties"] if "near_ties" in arrays else None)
        if near_ties is None and counted and all(c is not None for c in counted):
            near_ties = np.sum(counted, axis=0)
        ties = () if near_ties is None else tuple(int(n) for n in near_ties)
        info = dataclasses.replace(self._info, near_ties=ties)
        content = {"format": FORMAT, **dataclasses.asdict(info), "chunks": self._chunks}
        content["job"] = self._job
        (folder / INFO).write_text(json.dumps(content, indent=1) + "\n")
        self._partial.commit()
        return FileTrace(info, self._partial.path, tuple(self._chunks), self._job)

    def flush(self):
        """Writes what was added since the last chunk as one chunk, whatever its size."""
        if not self._waiting:
            return
        block, counts = trace.join(self._waiting), self._near_ties
        arrays = {"expert_ids": block.expert_ids.astype(id_dtype(self._info.num_experts))}
        for name, kind in _DTYPES.items():
            if (array := getattr(block, name)) is not None:
                arrays[name] = np.asarray(array).astype(kind)
        if all(c is not None for c in counts):
            arrays["near_ties"] = np.sum(counts, axis=0, dtype="<i8")
        name, data = _chunk_name(len(self._chunks)), _pack(arrays)
        (self._partial.folder / name).write_bytes(data)
        digest = manifest.digest(np.frombuffer(data, np.uint8))
        self._partial.record(name, (self.tokens,), (len(block),), digest)
        self._chunks.append(len(block))
        self._waiting, self._near_ties = [], []


@dataclasses.dataclass(frozen=True)
class FileTrace:
    """A trace on disk, with one chunk in memory at a time. A `trace.Trace`.

    Attributes:
      path: of its directory.
      chunks: tokens of each chunk.
      job: JSON values that its writer was given, or None.
    """

    info: trace.TraceInfo
    path: pathlib.Path
    chunks: tuple[int, ...]
    job: object = None

    def blocks(self, size: int = CHUNK_TOKENS):
        """All tokens in order, at most `size` at a time.

        Raises:
          ValueError: a chunk is missing, damaged or not what trace.json says.
        """
        for n, tokens in enumerate(self.chunks):
            block = self._read(self.path / _chunk_name(n), tokens)
            for start in range(0, tokens, size):
                yield trace.cut(block, slice(start, start + size))

    def _read(self, file, tokens):
        try:
            with np.load(file) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except Exception as error:  # a damaged zip raises nearly anything
            raise ValueError(
                f"{file}: missing or damaged ({error}); delete the trace and record it again"
            ) from error
        info = self.info
        wanted = {"expert_ids": (tokens, len(info.layers), info.num_experts_per_token)}
        wanted["weights"] = wanted["expert_ids"]
        for name in ("expert_ids", *_DTYPES):
            if name not in found and name in _OPTIONAL:
                found[name] = None
                continue
            shape = found[name].shape if name in found else "missing"
            if shape != (expected := wanted.get(name, (tokens,))):
                raise ValueError(f"{file}: {name} is {shape}, expected {expected}")
        return trace.Block(
            expert_ids=found["expert_ids"].astype(np.int16),
            **{
                name: None if found[name] is None else found[name].astype(kind)
                for name, kind in (_DTYPES | {"weights": np.float32}).items()
            },
        )


def open_trace(path) -> FileTrace:
    """The trace in the directory `path`.

    Raises:
      FileNotFoundError: there is none, or its recording did not finish.
      ValueError: it is damaged, or of another format.
    """
    path = pathlib.Path(os.path.expanduser(path)).absolute()
    if not (path / INFO).is_file():
        unfinished = path.with_name(path.name + naming.PARTIAL)
        hint = "; its recording did not finish: run it again" if unfinished.is_dir() else ""
        raise FileNotFoundError(f"{path}: no routing trace (no {INFO}){hint}")
    try:
        content = json.loads((path / INFO).read_text())
        if (found := content.pop("format")) != FORMAT:
            raise ValueError(f"{path}: a trace of format {found}, this version reads {FORMAT}")
        chunks = tuple(int(n) for n in content.pop("chunks"))
        job = content.pop("job", None)
        info = info_of(content)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / INFO}: damaged ({error!r}); record it again") from None
    if sum(chunks) != info.num_tokens:
        raise ValueError(
            f"{path / INFO}: chunks of {sum(chunks)} tokens, but num_tokens is {info.num_tokens}"
        )
    return FileTrace(info, path, chunks, job)


def info_of(values) -> trace.TraceInfo:
    """TraceInfo of its fields as JSON gives them.

    Raises:
      TypeError: fields are missing or unknown.
    """
    tuples = {n: tuple(values[n]) for n in ("layers", "near_ties") if n in values}
    return trace.TraceInfo(**{**values, **tuples})


def write(path, source) -> FileTrace:
    """Writes any Trace to the new directory `path`."""
    with TraceWriter(path, source.info) as writer:
        there = writer.tokens
        for block in source.blocks():
            there -= (skipped := min(there, len(block)))
            if skipped < len(block):
                writer.add(trace.cut(block, slice(skipped, None)))
        return writer.finish(source.info.near_ties or None)


def _chunk_name(n):
    return f"chunk_{n:05d}.npz"


def _bytes(file):
    try:
        return np.frombuffer(file.read_bytes(), np.uint8)
    except OSError:
        return None


def _pack(arrays) -> bytes:
    """The bytes of an .npz file: equal ones for equal arrays (numpy.savez writes the time)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue(), compresslevel=_COMPRESSION)
    return out.getvalue()
