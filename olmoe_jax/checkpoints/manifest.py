"""The manifest of a checkpoint: what its arrays are, with a hash of every piece that was written.

Orbax and TensorStore keep no checksum of array data and return wrong numbers for a flipped bit
without an error. So each process hashes the pieces that it holds (the shards with replica_id 0), in
the background, from the host memory that Orbax writes too, and its JSON file is part of the save:

    manifest/process_0.json   {"process": 0, "process_count": 1, "hash": "sha256",
                               "files": {"config.json": "…", …}, "leaves": {NAME:
                               {"shape": […], "dtype": "float32", "pieces":
                                [{"start": […], "shape": […], "sha256": "…"}, …]}}}

Hashed are the bytes of a piece in row-major order, little-endian. Pieces do not depend on the mesh
that reads: they are read from the disk as they are. Beside them, whole files are hashed:
config.json, and those that travel with ported weights.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from olmoe_jax.checkpoints import layout

FOLDER = "manifest"
READ_AT_ONCE = 256 << 20  # bytes of pieces read together while verifying


class DamagedError(ValueError):
    """A checkpoint's files are missing or not those that were saved."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A hyperrectangle of a leaf: first index, extent, and the hash of its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def digest(array) -> str:
    """SHA-256 of an array's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def own_pieces(leaves: dict) -> list[tuple[str, tuple, np.ndarray]]:
    """(name, start, bytes on the host) of the pieces of {name: jax.Array} that this process writes.

    On CPU the bytes are the array's own memory, which nobody may overwrite while they are in use.
    """
    out = []
    for name, leaf in leaves.items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(0 if index.start is None else index.start for index in shard.index)
                out.append((name, start, np.asarray(shard.data)))
    return out


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's writer of arrays, which also hashes them and adds the manifest and config.json.

    The files lie beside the folder of the arrays, inside the directory that is renamed as a whole.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")

    async def async_save(self, directory, args):
        """Starts both in the background. Copies nothing: nobody may overwrite what `args` holds."""
        arrays = await super().async_save(directory, args=args)
        # Last, so that a failure here does not abandon array writes under way.
        return [*(arrays or []), self._executor.submit(_write, directory.parent, args)]

    def close(self):
        """Ends the background thread."""
        self._executor.shutdown()
        super().close()


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass(repr=False, kw_only=True)
class SaveArgs(ocp.args.PyTreeSave):
    """What `Handler` saves.

    Attributes:
      item: nested dict of jax.Arrays.
      pieces: what `own_pieces` returned for its leaves.
      config_json: text of the config.json that lies in the checkpoint.
    """

    pieces: list
    config_json: str


@ocp.args.register_with_handler(Handler, for_restore=True)
class RestoreArgs(ocp.args.PyTreeRestore):
    """As Orbax's: reading needs no manifest."""


def _write(path, args):
    """Hashes the pieces and writes this process's files into the checkpoint's directory `path`."""
    leaves = {
        name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name, "pieces": []}
        for name, leaf in layout.flatten(args.item).items()
    }
    for name, start, data in args.pieces:
        piece = {"start": list(start), "shape": list(data.shape), "sha256": digest(data)}
        leaves[name]["pieces"].append(piece)
    config_json = args.config_json.encode()
    write_record(path, leaves, files={"config.json": hashlib.sha256(config_json).hexdigest()})
    if jax.process_index() == 0:
        (path / "config.json").write_bytes(config_json)


def write_record(path, leaves: dict, *, files: dict):
    """Writes this process's part of the manifest of the checkpoint in the directory `path`.

    Args:
      leaves: {name: {"shape", "dtype", "pieces"}} as in the file, with the pieces of this process.
      files: {path relative to `path`: SHA-256} of the files beside the arrays.
    """
    process = jax.process_index()
    record = {
        "process": process,
        "process_count": jax.process_count(),
        "hash": "sha256",
        "files": files,
        "leaves": leaves,
    }
    (path / FOLDER).mkdir(exist_ok=True)
    (path / FOLDER / f"process_{process}.json").write_text(json.dumps(record, indent=1) + "\n")


def read(path) -> dict[str, Leaf]:
    """{name: Leaf} of the checkpoint at `path`, its processes' files put together.

    Raises:
      DamagedError: a file is missing or damaged, or the pieces do not cover an array.
    """
    where, out, process, count = f"checkpoint {path.name}", {}, 0, 1
    while process < count:
        file = path / FOLDER / f"process_{process}.json"
        if not file.exists():
            raise DamagedError(f"{where}: {FOLDER}/{file.name} is missing, in {path}")
        try:
            record = json.loads(file.read_text())
            count = int(record["process_count"])
            dict(record.get("files", {}))
            for name, leaf in record["leaves"].items():
                jnp.dtype(leaf["dtype"])
                known = out.setdefault(name, (tuple(leaf["shape"]), leaf["dtype"], []))
                if known[:2] != (tuple(leaf["shape"]), leaf["dtype"]):
                    raise ValueError(name)
                known[2].extend(
                    Piece(tuple(p["start"]), tuple(p["shape"]), p["sha256"]) for p in leaf["pieces"]
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"{where}: {FOLDER}/{file.name} is damaged ({error!r}), in {path}"
            ) from error
        process += 1
    manifest = {
        name: Leaf(shape, dtype, tuple(pieces)) for name, (shape, dtype, pieces) in out.items()
    }
    for name, leaf in manifest.items():
        if sum(math.prod(p.shape) for p in leaf.pieces) != math.prod(leaf.shape):
            raise DamagedError(
                f"{where}: {FOLDER} is damaged (pieces of {name} do not cover it), in {path}"
            )
    return manifest


def damaged_files(path) -> list[str]:
    """Paths, relative to the checkpoint at `path`, of files that are not those that were saved."""
    noted, bad = {}, []
    for file in (path / FOLDER).glob("process_*.json"):
        try:
            record = json.loads(file.read_text())
            # The first checkpoints noted the hash of config.json alone, under this name.
            hashes = record.get("files") or {"config.json": record.get("config_sha256")}
            for name, sha256 in hashes.items():
                noted.setdefault(name, set()).add(sha256)
        except (ValueError, AttributeError, TypeError):
            bad.append(f"{FOLDER}/{file.name}")
    return bad + [n for n, hashes in noted.items() if hashes != {_file_digest(path / n)}]


def _file_digest(file) -> str | None:
    """SHA-256 of a file's bytes; None if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def damaged_leaves(path, item: str, manifest: dict[str, Leaf]) -> list[str]:
    """Names of the leaves whose bytes on disk cannot be read or are not those that were saved.

    Every process checks its part of the pieces and all get the same answer.

    Args:
      path: the checkpoint.
      item: the folder in it that holds the arrays.
    """
    names = list(manifest)
    bad = np.zeros(len(names), bool)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    jobs, pending, pending_bytes = [], [], 0
    for index, name in enumerate(names):
        jobs += [(index, name, piece) for piece in manifest[name].pieces]
    stores = {}

    def finish():
        nonlocal pending, pending_bytes
        for index, piece, future in pending:
            try:
                bad[index] |= digest(future.result()) != piece.sha256
            except Exception:  # whatever TensorStore makes of damaged bytes
                bad[index] = True
        pending, pending_bytes = [], 0

    for index, name, piece in jobs[jax.process_index() :: jax.process_count()]:
        if bad[index]:
            continue
        try:
            if name not in stores:
                stores[name] = ts.open(
                    spec(path / item, name), read=True, open=True, context=context
                ).result()
            store = stores[name]
            window = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
            same = (store.shape, store.dtype.name) == (manifest[name].shape, manifest[name].dtype)
            future = store[window].read() if same else None
        except Exception:  # as above
            future = None
        if future is None:
            bad[index] = True
            continue
        pending.append((index, piece, future))
        pending_bytes += math.prod(piece.shape) * jnp.dtype(manifest[name].dtype).itemsize
        if pending_bytes >= READ_AT_ONCE:
            finish()
    finish()
    if jax.process_count() > 1:
        bad = multihost_utils.process_allgather(bad).any(axis=0)
    return [name for name, damaged in zip(names, bad, strict=True) if damaged]


def spec(folder, name: str) -> dict:
    """TensorStore spec of the leaf `name` as Orbax lays it out in `folder`.

    Zarr arrays under names with dots, all in one OCDBT store or each in a folder of its own.
    """
    name = name.replace("/", ".") + "/"

    def base(suffix):  # a local path is no URL: it may hold % or #
        if "://" in str(folder):
            return f"{folder}/{suffix}"
        return {"driver": "file", "path": f"{folder.resolve()}/{suffix}"}

    if (folder / "manifest.ocdbt").exists():
        kvstore = {"driver": "ocdbt", "base": base(""), "path": name}
    else:
        kvstore = base(name)
    return {"driver": "zarr", "kvstore": kvstore}
