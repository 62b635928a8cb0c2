"""Orbax directories written slab by slab, for models that are larger than the memory at hand.

    PATH/params/NAME/…              an array per tensor and layer: zarr, no compression, plain files
                                    (PATH/state/NAME/… of a whole train state)
    PATH/manifest/process_0.json    the hashes, of every slab and of every file below
    PATH/config.json
    PATH/…                          files that travel with the weights

Orbax reads PATH/params as it does every other of its directories. Slabs are groups of leading
indices (experts, rows of the vocabulary): what is in memory at a time, what has one hash, and what
an interrupted run need not write again.
"""

import dataclasses
import errno
import hashlib
import json
import math
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from olmoe_jax.checkpoints import layout, manifest, naming, partial, quiet, reading

CHUNK = 16 << 20  # bytes of a chunk at most; restoring onto a mesh reads whole chunks
SLAB = 64 << 20  # bytes of a slab at most, unless one index is more


def slabs(shape: tuple, dtype) -> list[tuple[int, int]]:
    """(start, stop) along the leading axis of the slabs of an array, in order.

    An array of up to 16 MiB is one slab; a larger one has slabs of up to 64 MiB, but of one leading
    index at least. A scalar is one slab.

    >>> slabs((64, 2048, 1024), "bfloat16")[:2], slabs((), "int32")
    ([(0, 16), (16, 32)], [(0, 1)])
    """
    if not shape:
        return [(0, 1)]
    rows, chunk_rows = shape[0], chunk_shape(shape, dtype)[0]
    chunk_bytes = chunk_rows * math.prod(shape[1:]) * jnp.dtype(dtype).itemsize
    step = chunk_rows * max(1, SLAB // chunk_bytes)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def chunk_shape(shape: tuple, dtype) -> tuple:
    """Shape of the chunks that an array is stored in: even parts of up to 16 MiB.

    >>> chunk_shape((50304, 2048), "bfloat16"), chunk_shape((2, 4099, 4096), "float32")
    ((3870, 2048), (1, 820, 4096))
    """
    chunk, size = list(shape), math.prod(shape) * jnp.dtype(dtype).itemsize
    for axis, extent in enumerate(shape):
        if size <= CHUNK:
            break
        parts = math.ceil(extent / max(1, CHUNK * extent // size))
        chunk[axis] = math.ceil(extent / parts)
        size = size // extent * chunk[axis]
    return tuple(chunk)


class StreamedWriter:
    """Writes an Orbax directory slab by slab. A context manager; complete at `path` or absent.

    Leaving it before `finish` keeps `{path}.partial`, with which the same job goes on.

        with StreamedWriter(path, leaves, config_json=text, files={}, job={}) as writer:
            for name, start, stop in writer.pending():
                writer.write(name, start, array[start:stop])
            writer.finish()

    Args:
      path: where the directory comes to lie, on a local disk.
      leaves: {stored name: (shape, dtype)}; float32, bfloat16, float16 or integers.
      config_json: text of its config.json.
      files: {relative path: bytes} that lie beside the parameters.
      job: what is written from what, JSON values; another job cannot go on with the slabs.
      item: the folder in `path` that holds the arrays: "params", or "state" of a train state.

    Raises:
      FileExistsError: `path` exists.
      ValueError: `{path}.partial` is of another job, not ours, or another process writes it.
    """

    def __init__(
        self, path, leaves: dict, *, config_json: str, files: dict, job: dict, item=reading.PARAMS
    ):
        self._item = item
        self._leaves = {
            name: manifest.Leaf(tuple(shape), jnp.dtype(dtype).name, ())
            for name, (shape, dtype) in leaves.items()
        }
        self._slabs = {
            (name, start): stop
            for name, leaf in self._leaves.items()
            for start, stop in slabs(leaf.shape, leaf.dtype)
        }
        self._files = {reading.CONFIG: config_json.encode(), **files}
        # TensorStore syncs each file that it writes, so that the disk works from the start.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._stores, self._lock = {}, threading.Lock()
        # Other slabs or chunks, by another version of this file, make it another job.
        kinds = {name: (leaf.shape, leaf.dtype) for name, leaf in sorted(self._leaves.items())}
        parts = [(n, *kind, chunk_shape(*kind), slabs(*kind)) for n, kind in kinds.items()]
        parts = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._partial = partial.Partial(path, {**job, "parts": parts})
        try:
            sound = self._partial.sound(self._read_piece)
            self._done = {(name, sum(start[:1])): piece for (name, start), piece in sound.items()}
            self._remove_useless()
        except BaseException:
            self._partial.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self._partial.close()

    def pending(self) -> list[tuple[str, int, int]]:
        """(name, start, stop) of the slabs that are not there yet, leaf by leaf.

        After an interruption, slabs whose bytes on the disk are not those that were written count
        as not there: all were read and hashed when the directory was opened.
        """
        return [
            (name, start, stop)
            for (name, start), stop in self._slabs.items()
            if (name, start) not in self._done
        ]

    def write(self, name: str, start: int, array):
        """Writes and hashes one slab. May be called from several threads, for different slabs.

        Args:
          array: the rows start..stop of the leaf, or a scalar, in its dtype; bytes are written as
            they are.

        Raises:
          ValueError: `start`, the shape or the dtype is not that of a slab of `name`.
          OSError: the disk is full or broken.
        """
        leaf, stop = self._leaves.get(name), self._slabs.get((name, start))
        if stop is None:
            raise ValueError(f"{name}: no slab starts at {start}; see StreamedWriter.pending")
        expected = (stop - start, *leaf.shape[1:])[: len(leaf.shape)], leaf.dtype
        if expected != (found := (array.shape, array.dtype.name)):
            raise ValueError(f"{name}, slab {start}:{stop}: is {found}, expected {expected}")
        array = np.ascontiguousarray(array).reshape(array.shape)  # which makes a scalar a row
        try:
            # The array is not copied: nobody keeps it when the result is there.
            written = self._store(name)[_rows(start, stop, array.ndim)].write(
                array, can_reference_source_data_indefinitely=True
            )
            sha256 = manifest.digest(array)
            written.result()
        except Exception as error:  # whatever TensorStore makes of a full disk
            raise _failure(self._partial.folder, name, error) from error
        origin = (start, *[0] * (array.ndim - 1))[: array.ndim]
        self._partial.record(name, origin, array.shape, sha256)
        with self._lock:
            self._done[name, start] = manifest.Piece(origin, array.shape, sha256)

    def finish(self):
        """Adds what makes it a checkpoint, brings all to the disk and renames it to `path`.

        Raises:
          ValueError: slabs are missing.
        """
        if missing := self.pending():
            name, start, stop = missing[0]
            raise ValueError(
                f"{self._partial.folder}: {len(missing)} of {len(self._slabs)} slabs are missing "
                f"({name}, {start}:{stop}, …)"
            )
        folder = self._partial.folder
        _describe(folder / self._item, self._leaves)
        for name, content in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        leaves = {n: dataclasses.asdict(x) | {"pieces": []} for n, x in self._leaves.items()}
        for name, start in self._slabs:
            leaves[name]["pieces"].append(dataclasses.asdict(self._done[name, start]))
        hashes = {n: hashlib.sha256(content).hexdigest() for n, content in self._files.items()}
        manifest.write_record(folder, leaves, files=hashes)
        self._partial.commit()

    def _store(self, name):
        """The opened array of a leaf; made if it is not there."""
        with self._lock:
            if name not in self._stores:
                leaf = self._leaves[name]
                dtype = leaf.dtype if leaf.dtype == "bfloat16" else jnp.dtype(leaf.dtype).str
                spec = manifest.spec(epath.Path(self._partial.folder / self._item), name) | {
                    "metadata": {
                        "shape": leaf.shape,
                        "chunks": chunk_shape(leaf.shape, leaf.dtype),
                        "dtype": dtype,
                        "compressor": None,
                    },
                    "store_data_equal_to_fill_value": True,
                }
                self._stores[name] = ts.open(
                    spec, context=self._context, create=True, open=True
                ).result()
            return self._stores[name]

    def _read_piece(self, name, piece):
        """A piece as it is on the disk; None where it cannot be read."""
        start, rows = sum(piece.start[:1]), sum(piece.shape[:1])
        try:
            return self._store(name)[_rows(start, start + rows, len(piece.shape))].read().result()
        except Exception:  # whatever TensorStore makes of damaged files
            return None

    def _remove_useless(self):
        """Removes arrays without a sound piece: not even their description can be relied on."""
        sound = {name.replace("/", ".") for name, _ in self._done}
        for path in (self._partial.folder / self._item).glob("*"):
            if path.is_dir() and path.name not in sound:
                shutil.rmtree(path)
        self._stores.clear()


def _rows(start, stop, rank):
    """The index of rows start..stop; of a scalar, all of it."""
    return slice(start, stop) if rank else ...


def _failure(folder, name, error) -> OSError:
    """One line for whatever TensorStore raised."""
    full = "ENOSPC" in str(error) or "No space left" in str(error)
    reason = "no space left on the disk; free some" if full else str(error).splitlines()[0][:200]
    failure = OSError(f"{folder}: {name} was not written: {reason}, then run the same line again")
    failure.errno = errno.ENOSPC if full else None
    return failure


class _Written:
    """Stands for an array that is in its place already, while Orbax describes a tree of them."""


class _WrittenHandler(type_handlers.TypeHandler):
    """Tells Orbax that there is nothing to write."""

    def typestr(self):
        return "np.ndarray"  # what Orbax makes of it when it is not told where it shall go

    async def serialize(self, values, infos, args=None):
        return []

    async def deserialize(self, infos, args=None):
        raise NotImplementedError

    async def metadata(self, infos):
        raise NotImplementedError


def _describe(folder, leaves):
    """Lets Orbax write what it needs to know about the arrays in `folder`."""
    quiet.silence_orbax()
    registry = type_handlers.create_type_handler_registry((_Written, _WrittenHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    tree = layout.unflatten({name: _Written() for name in leaves})
    try:
        handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(tree))
        handler.finalize(epath.Path(folder))
    finally:
        handler.close()


class StreamedReader:
    """Reads arrays of a checkpoint part by part: of a run or written by `StreamedWriter`.

    Args:
      path: the checkpoint, or a workdir (its newest is read).
      item: "params", or "state": `path` is a step directory of a run's `resume`.

    Attributes:
      path: of the checkpoint.
      leaves: {stored name: manifest.Leaf}.

    Raises:
      FileNotFoundError: `path` is no checkpoint of parameters; DamagedError: its manifest is
        damaged.
    """

    def __init__(self, path, *, item=reading.PARAMS):
        self.path, self._item = naming.find(path), item
        if not (self.path / item).is_dir():
            other = " a resume state?" if item == reading.PARAMS else " a checkpoint of parameters?"
            raise FileNotFoundError(f"{self.path}: no folder {item};{other}")
        self.leaves = manifest.read(self.path)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._stores, self._lock = {}, threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out=None):
        """Rows start..stop (None: to the end) of a leaf: a NumPy array in the stored dtype.

        Nothing is verified. May be called from several threads.

        Args:
          out: array of that shape and dtype, row-major, to read into and return. Fresh memory costs
            the system four times what reading costs (measured on Linux in a virtual machine).

        Raises:
          ValueError: `out` is not such an array.
          DamagedError: they cannot be read, or the array is not what the manifest says.
        """
        leaf = self.leaves[name]
        stop = sum(leaf.shape[:1]) if stop is None else stop
        rank = len(leaf.shape)
        shape, dtype = (stop - start, *leaf.shape[1:])[:rank], jnp.dtype(leaf.dtype)
        if out is None:
            out = np.empty(shape, dtype)
        elif (out.shape, out.dtype) != (shape, dtype) or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}: must be row-major {dtype} {shape}")
        try:
            store = self._store(name)
            if (store.shape, store.dtype.name) == (leaf.shape, leaf.dtype):
                ts.array(out, copy=False).write(store[_rows(start, stop, rank)]).result()
                return out
        except Exception as error:  # as above
            raise manifest.DamagedError(
                f"checkpoint {self.path.name}: {name} cannot be read, in {self.path}"
            ) from error
        raise manifest.DamagedError(
            f"checkpoint {self.path.name}: {name} is {store.dtype.name} {store.shape}, expected "
            f"{leaf.dtype} {leaf.shape}, in {self.path}"
        )

    def _store(self, name):
        """The opened array of a leaf."""
        with self._lock:
            if name not in self._stores:
                spec = manifest.spec(self.path / self._item, name)
                spec["fill_missing_data_reads"] = False  # a lost chunk is not zeros
                self._stores[name] = ts.open(spec, read=True, context=self._context).result()
            return self._stores[name]
