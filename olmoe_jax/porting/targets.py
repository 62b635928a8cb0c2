"""Where the weights of a port go: an Orbax checkpoint of ours, or a foreign folder.

Both take stored arrays (`layers/00/moe/w_gate`) slab by slab, write under a name that looks
unfinished, note the hash of every piece, keep finished pieces when the same job runs again, and
appear by one rename.
"""

import dataclasses
import hashlib
import json

import numpy as np

from olmoe_jax.checkpoints import manifest, partial, streamed
from olmoe_jax.porting import families, folders, olmo_names, safetensors, sources, transposing

SHARD_BYTES = 5 * 10**9  # of a Hugging Face folder that has no plan: the size of released folders


class Orbax:
    """A checkpoint in Orbax's format: `params/`, `manifest/`, config.json, `source/`.

    Args:
      path: directory that will appear.
      source: a `sources.Foreign` or `sources.Checkpoint`.
      dtype: name of the stored dtype, or None: each array keeps its own.
      step: training step of these weights, or None.
      job: dict that is equal for the same work only.
    """

    def __init__(self, path, source, *, dtype, step, job):
        self.leaves = {n: (shape, dtype or own) for n, (shape, own) in source.leaves.items()}
        content = {
            "config": dataclasses.asdict(source.config),
            "step": step,
            "ported": {"format": source.format, "dtype": dtype or source.cast_to},
        }
        files = {f"{sources.SOURCE}/{name}": data for name, data in source.files.items()}
        if source.plan is not None and dtype is None:
            files[f"{sources.SOURCE}/{sources.PLAN}"] = source.plan.to_json()
        self._writer = streamed.StreamedWriter(
            path,
            self.leaves,
            config_json=json.dumps(content, indent=2) + "\n",
            files=files,
            job=job,
        )

    def __enter__(self):
        self._writer.__enter__()
        return self

    def __exit__(self, *error):
        self._writer.__exit__(*error)

    def pending(self):
        """[(name, start, stop)] of the slabs that are not there yet."""
        return self._writer.pending()

    def write(self, name, start, array):
        """Rows start… of a stored array, in the target's dtype. Thread-safe."""
        self._writer.write(name, start, array)

    def finish(self):
        """Completes the manifest and gives the directory its name."""
        self._writer.finish()


class Foreign:
    """A Hugging Face folder, or a checkpoint as the original training code writes it.

    Args:
      path, job: as of `Orbax`.
      parts: of the family (`families.parts`).
      leaves: {stored name: (shape, dtype name)} in the dtypes to write.
      files: {name: bytes} to lie beside the weights, config.json or config.yaml among them.
      plan: a `sources.Plan` that is followed to the byte.
    """

    def __init__(self, path, *, parts, leaves, files, plan, job):
        self._parts, self._leaves = families.by_array(parts), leaves
        self._partial = partial.Partial(path, job)
        self._files = dict(files)
        if plan.index is not None:
            self._files[folders.INDEX] = plan.index.encode()
        for name, data in self._files.items():
            (self._partial.folder / name).write_bytes(data)
        self._writers, self._tensors = {}, {}
        for file, header in plan.headers.items():
            text = header.encode()
            self._writers[file] = safetensors.Writer(self._partial.folder / file, text)
            for name, tensor in safetensors.parse_header(text, file).tensors.items():
                known = olmo_names.decode(name) if plan.format == folders.OLMO else name
                self._tensors[known] = file, name, tensor
        self._check_headers(parts)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for writer in self._writers.values():
            writer.close()
        self._partial.__exit__(*error)

    def pending(self):
        """[(name, start, stop)] of the slabs not there yet; kept pieces are hashed again."""
        kept = set(self._partial.sound(self._read_piece))
        out = []
        for name, (shape, dtype) in self._leaves.items():
            parts = self._parts[name]
            if parts[0].index is None and parts[0].transpose:
                slabs = [(0, shape[0])]  # its rows are their columns: only whole ones are pieces
            else:
                slabs = streamed.slabs(shape, dtype)
            for start, stop in slabs:
                pieces = {(p.theirs, (first,)) for p, first in self._pieces(name, start, stop)}
                if pieces - kept:
                    out.append((name, start, stop))
        return out

    def write(self, name, start, array):
        """Rows start… of a stored array, in the target's dtype. Thread-safe."""
        for part, first in self._pieces(name, start, start + len(array)):
            block = array if part.index is None else array[part.index - start]
            if part.transpose:
                turned = np.empty(block.shape[::-1], block.dtype)
                transposing.copy(block, turned, transpose=True)
                block = turned
            file, stored_name, _ = self._tensors[part.theirs]
            try:
                self._writers[file].write(stored_name, block, first)
            except OSError as error:
                raise OSError(
                    f"{self._partial.folder / file}: {part.theirs} was not written: "
                    f"{error.strerror or error}; then run the same line again"
                ) from error
            self._partial.record(part.theirs, (first,), block.shape, manifest.digest(block))

    def finish(self):
        """Completes the manifest and gives the directory its name."""
        for writer in self._writers.values():
            writer.close()
        leaves = {
            name: {"shape": list(tensor.shape), "dtype": tensor.dtype, "pieces": []}
            for name, (_, _, tensor) in self._tensors.items()
        }
        rows = dict.fromkeys(leaves, 0)
        for (name, start), piece in sorted(self._partial.done.items()):
            full = list(start) + [0] * (len(piece.shape) - 1)
            leaves[name]["pieces"].append(
                {"start": full, "shape": list(piece.shape), "sha256": piece.sha256}
            )
            rows[name] += piece.shape[0]
        if wrong := [name for name, leaf in leaves.items() if rows[name] != leaf["shape"][0]]:
            raise ValueError(
                f"{self._partial.folder}: {len(wrong)} of {len(leaves)} tensors were not written "
                f"exactly once ({wrong[0]}, …)"
            )
        hashes = {n: hashlib.sha256(data).hexdigest() for n, data in self._files.items()}
        manifest.write_record(self._partial.folder, leaves, files=hashes)
        self._partial.commit()

    def _check_headers(self, parts):
        """The files have room for what will be written, and for nothing else."""
        dtypes = {part.theirs: self._leaves[part.ours][1] for part in parts}
        wanted = {n: (dtypes[n], shape) for n, shape in families.tensor_shapes(parts).items()}
        found = {n: (tensor.dtype, tensor.shape) for n, (_, _, tensor) in self._tensors.items()}
        if differ := sorted(n for n in wanted | found if wanted.get(n) != found.get(n)):
            name = differ[0]
            raise ValueError(
                f"{self._partial.path}: {len(differ)} tensors are not as the plan of the files has "
                f"them ({name}: {wanted.get(name)}, planned {found.get(name)})"
            )

    def _pieces(self, name, start, stop):
        """(part, first row in their tensor) of what a slab holds."""
        for part in self._parts[name]:
            if part.index is None:
                yield part, part.start + (0 if part.transpose else start)
            elif start <= part.index < stop:
                yield part, part.start

    def _read_piece(self, name, piece):
        """Rows of one of their tensors as they are on the disk; None if it is not one of them."""
        if name not in self._tensors:
            return None
        file, _, tensor = self._tensors[name]
        rows = safetensors.memory_map(self._partial.folder / file, tensor)
        return rows[piece.start[0] : piece.start[0] + piece.shape[0]]


def make_plan(shapes, dtypes, *, format):
    """A Plan for tensors that had none: shards of at most 5 GB (Hugging Face), or one file (OLMo).

    Args:
      shapes, dtypes: {tensor: shape}, {tensor: dtype name}, in the order of the model.
    """
    sizes = {n: safetensors.num_bytes(dtypes[n], shape) for n, shape in shapes.items()}
    shards, room = [[]], SHARD_BYTES
    for name, size in sizes.items():
        if shards[-1] and size > room and format == folders.HUGGING_FACE:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    headers, places = {}, {}
    for file, tensors in zip(names, shards, strict=True):
        encode = olmo_names.encode if format == folders.OLMO else str
        kinds = {encode(n): (dtypes[n], shapes[n]) for n in tensors}
        headers[file] = safetensors.build_header(kinds).decode()
        places |= dict.fromkeys(tensors, file)
    if count == 1:
        return sources.Plan(format, headers, None)
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    return sources.Plan(format, headers, json.dumps(index, indent=2, sort_keys=True) + "\n")
