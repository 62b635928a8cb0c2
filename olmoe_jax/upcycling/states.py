"""Whole train states, optimizer's moments included: read array by array, written upcycled.

A state holds trees in the layout of training, layers stacked (`layers/block_0/ffn/w_gate`
[n, d, f]): the parameters under `params/`, moments of the same shapes under prefixes of the
optimizer's (`opt_state/0/mu/`), and a few counters.
"""

import dataclasses
import json

import numpy as np

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import layout, naming, reading, streamed
from olmoe_jax.porting import port, safetensors
from olmoe_jax.upcycling import weights

PARAMS = "params/"
STEP = "step"


class State:
    """A step directory of a run's `resume`, its hashes recomputed.

    Attributes:
      path: of it.
      config: Config of the run.
      trees: {prefix: Tree} of the parameters and of each moment.

    Raises:
      FileNotFoundError: there is no train state at `path`. DamagedError: it is damaged.
    """

    def __init__(self, path):
        self._reader = streamed.StreamedReader(path, item=reading.STATE)
        self.path = self._reader.path
        self.config = checkpoints.read_config(self.path)
        leaves = self._reader.leaves
        reading.check_hashes(self.path, reading.STATE, leaves)
        prefixes = [n.removesuffix("embedding") for n in leaves if n.split("/")[-1] == "embedding"]
        self.trees = {p: Tree(self._reader, self.config.model, p) for p in prefixes}
        self.counters = {
            n: leaf for n, leaf in leaves.items() if not n.startswith(tuple(prefixes))
        }  # fmt: skip

    def counter(self, name) -> np.ndarray:
        """A counter, or the random key."""
        return self._reader.read(name)


class Tree:
    """One tree of a state, in stored names: a source, as `porting.sources` has them.

    Attributes:
      leaves: {stored name: (shape, dtype name)}.
    """

    def __init__(self, reader, model_config, prefix):
        self._reader, self._places, self.leaves = reader, {}, {}
        for name, leaf in reader.leaves.items():
            if not name.startswith(prefix):
                continue
            training = name.removeprefix(prefix)
            stacked = layout.is_stacked(training)
            for row, stored in enumerate(layout.stored_names(training, model_config)):
                self._places[stored] = name, row if stacked else None
                self.leaves[stored] = leaf.shape[stacked:], leaf.dtype

    def read(self, name, window=()) -> np.ndarray:
        """Rows of an array; `window` holds one slice, of the first axis, or nothing."""
        place, row = self._places[name]
        rows = window[0] if window else slice(None)
        if row is not None:
            return self._reader.read(place, row, row + 1)[0][rows]
        return self._reader.read(place, rows.start or 0, rows.stop)


class Writer:
    """Writes the state that a run with the upcycled model begins with. A context manager.

    It is that of step 0: parameters and moments are upcycled, the moments' count is the old one.

    Args:
      path: of the new step directory.
      state: a State.
      config: Config of the upcycled model.
      recipe: a Recipe.
      job: as of `streamed.StreamedWriter`.
    """

    def __init__(self, path, state, config, recipe, *, job):
        self._state, self._model = state, config.model
        self._trees = {
            prefix: weights.Upcycled(tree, config.model, recipe, moments=prefix != PARAMS)
            for prefix, tree in state.trees.items()
        }
        self.leaves = _stacked_leaves(self._trees, config.model)
        counters = {n: (leaf.shape, leaf.dtype) for n, leaf in state.counters.items()}
        self._writer = streamed.StreamedWriter(
            path,
            self.leaves | counters,
            config_json=json.dumps({"config": dataclasses.asdict(config), "step": 0}, indent=2),
            files={},
            job=job,
            item=reading.STATE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.__exit__(*error)

    def stream(self, description):
        """Writes all of it, with a progress bar, and gives the directory its name."""
        for name, start, _ in self._writer.pending():
            if name not in self.leaves:
                counter = self._state.counter(name)
                self._writer.write(name, start, counter * 0 if name == STEP else counter)
        total = sum(safetensors.num_bytes(kind, shape) for shape, kind in self.leaves.values())
        port.stream(self, self, self.leaves, total, description=description)
        self._writer.finish()

    def pending(self):
        """[(name, start, stop)] of the slabs that are not there yet."""
        return [slab for slab in self._writer.pending() if slab[0] in self.leaves]

    def write(self, name, start, array):
        """One slab. Thread-safe."""
        self._writer.write(name, start, array)

    def read(self, name, window):
        """One slab of the new state."""
        prefix = next(p for p in self._trees if name.startswith(p))
        training = name.removeprefix(prefix)
        if not layout.is_stacked(training):
            return self._trees[prefix].read(training, window)
        names = layout.stored_names(training, self._model)[window[0]]
        return np.stack([self._trees[prefix].read(stored) for stored in names])


def size(state, config, recipe) -> int:
    """Bytes of the upcycled state, but for its counters."""
    trees = {p: weights.Upcycled(t, config.model, recipe) for p, t in state.trees.items()}
    leaves = _stacked_leaves(trees, config.model).values()
    return sum(safetensors.num_bytes(kind, shape) for shape, kind in leaves)


def find(path):
    """The step directory at `path`, or the newest state of the run whose workdir it is; else
    None."""
    path = naming.absolute(path)
    if (path / reading.STATE).is_dir():
        return path
    found = naming.list_complete(path / naming.RESUME)
    return found[-1][1] if found else None


def _stacked_leaves(trees, model_config):
    """{name in a state: (shape, dtype name)} of {prefix: Upcycled}."""
    abstract = layout.flatten(checkpoints.abstract_params(model_config))
    return {
        prefix + name: (leaf.shape, tree.leaves[layout.stored_names(name, model_config)[0]][1])
        for prefix, tree in trees.items()
        for name, leaf in abstract.items()
    }
