"""Where a model that is run layer by layer keeps all tokens between two layers.

    FOLDER/state.json            {"job", "parts", "layer", "batch"}: what the files hold; by rename
    FOLDER/activations_0, _1     [rows, length, d_model]: in front of even and of odd layers
    FOLDER/expert_ids, weights   [MoE layers, rows, length, k]
    FOLDER/near_ties             [MoE layers, rows]

A layer reads one file of activations and writes the other, so that a layer that was interrupted can
begin again. Files are read and written, not mapped: mapped pages would count as this process's
memory.
"""

import json
import math
import os
import pathlib
import shutil
import time

import ml_dtypes  # noqa: F401  np.dtype("bfloat16") exists once it is imported
import numpy as np

from olmoe_jax import files

STATE = "state.json"
MARK_SECONDS = 60.0  # between two marks within a layer


class Scratch:
    """The files of one group of windows. A context manager that closes them.

    Args:
      folder: created if need be; what another job left in it is overwritten.
      job: JSON values: what decides the contents of the rows, beside
      parts: of each batch: what its rows are.
      layers, rows, length, d_model, k: sizes (MoE layers; windows).
      dtype: of the activations.

    Attributes:
      layer, batch: what is to be computed next; (0, 0) if nothing is there.
    """

    def __init__(self, folder, job, parts, *, layers, rows, length, d_model, k, dtype):
        self._folder, self._job, self._parts = pathlib.Path(folder), job, parts
        self._folder.mkdir(parents=True, exist_ok=True)
        self._marked = time.monotonic()
        state = _read_state(self._folder, job)
        if state is not None and state["parts"] == json.loads(json.dumps(parts)):
            self.layer, self.batch = state["layer"], state["batch"]
        else:
            (self._folder / STATE).unlink(missing_ok=True)  # before its files are overwritten
            self.layer, self.batch = 0, 0
        shapes = {
            "activations_0": ((rows, length, d_model), dtype),
            "activations_1": ((rows, length, d_model), dtype),
            "expert_ids": ((layers * rows, length, k), "int16"),
            "weights": ((layers * rows, length, k), "float32"),
            "near_ties": ((layers * rows,), "int32"),
        }
        self._rows, self._moe_layers, self._files = rows, layers, {}
        for name, (shape, kind) in shapes.items():
            self._files[name] = _Rows(self._folder / name, shape, kind)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            file.close()

    def read_activations(self, layer, start, stop):
        """[rows, length, d_model] in front of layer number `layer`."""
        return self._files[f"activations_{layer % 2}"].read(start, stop)

    def write_activations(self, layer, start, array):
        """The rows from `start` on in front of layer number `layer`."""
        self._files[f"activations_{layer % 2}"].write(start, array)

    def write_choices(self, moe_layer, start, choices):
        """`layerwise.Choices` of the rows from `start` on in MoE layer number `moe_layer`."""
        for name, array in choices._asdict().items():
            self._files[name].write(moe_layer * self._rows + start, np.asarray(array))

    def read_choices(self, start, stop):
        """(expert_ids int16, weights float32 [MoE layers, rows, length, k], near_ties int32 [MoE
        layers, rows])."""
        return tuple(
            np.stack([
                self._files[name].read(layer * self._rows + start, layer * self._rows + stop)
                for layer in range(self._moe_layers)
            ])
            for name in ("expert_ids", "weights", "near_ties")
        )  # fmt: skip

    def mark(self, layer, batch, *, now=False):
        """Everything in front of (layer, batch) is done: notes it, when a minute has passed since
        the last note or `now`."""
        if not now and time.monotonic() - self._marked < MARK_SECONDS:
            return
        for file in self._files.values():
            file.sync()
        state = {"job": self._job, "parts": self._parts, "layer": layer, "batch": batch}
        files.write_text(self._folder / STATE, json.dumps(state))
        self._marked = time.monotonic()


def parts(folder, job) -> list:
    """What an interrupted run of the same job left in `folder`: as `Scratch` was told; or []."""
    state = _read_state(pathlib.Path(folder), job)
    return [] if state is None else state["parts"]


def _read_state(folder, job):
    try:
        state = json.loads((folder / STATE).read_text())
        return state if state["job"] == json.loads(json.dumps(job)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def num_bytes(*, layers, tokens, d_model, k, dtype) -> int:
    """Of the files for so many tokens."""
    return tokens * (2 * d_model * np.dtype(dtype).itemsize + layers * (6 * k))


def remove(folder):
    """Deletes the scratch files, if there are any."""
    shutil.rmtree(folder, ignore_errors=True)


class _Rows:
    """An array in a file, rows at a time."""

    def __init__(self, path, shape, dtype):
        self._shape, self._dtype = shape[1:], np.dtype(dtype)
        self._row = math.prod(self._shape) * self._dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0))
        self._path = path
        os.truncate(self._file, shape[0] * self._row)

    def read(self, start, stop):
        out = np.empty((stop - start, *self._shape), self._dtype)
        view, offset = memoryview(out.reshape(-1).view(np.uint8)), start * self._row
        while view:
            if not (count := os.preadv(self._file, [view], offset)):
                raise OSError(f"{self._path}: shorter than it was made; delete the scratch folder")
            view, offset = view[count:], offset + count
        return out

    def write(self, start, array):
        data = np.ascontiguousarray(array, self._dtype)
        view, offset = memoryview(data.reshape(-1).view(np.uint8)), start * self._row
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def sync(self):
        os.fsync(self._file)

    def close(self):
        os.close(self._file)
