"""Every array of an upcycled model, one window at a time, out of those of a dense model.

The names are those on disk (`checkpoints.layout`): `layers/00/ffn/w_gate` [d, f · G] becomes
`layers/00/moe/w_gate` [N, d, f]. Random numbers depend on the seed, the layer and the expert alone,
so an interrupted job goes on with the same ones.
"""

import re
import threading

import numpy as np

from olmoe_jax.porting import sources
from olmoe_jax.upcycling import recipe as recipe_lib

_FFN = re.compile(r"layers/(\d+)/moe/(shared/)?(w_gate|w_up|w_down)")
_ROUTER = re.compile(r"layers/(\d+)/moe/router")
_MATRICES = ("w_gate", "w_up", "w_down")
_ROUTER_STREAM, _CHOICE_STREAM, _VALUE_STREAM = range(3)  # of random numbers


class Upcycled:
    """The arrays of the upcycled model: a source, as `porting.sources` has them.

    Args:
      dense: has `leaves` ({stored name: (shape, dtype name)}) and `read(name, window)`.
      config: ModelConfig of the upcycled model.
      recipe: the Recipe.
      moments: `dense` are not weights but an optimizer's moments of them: whatever is new has none
        (0), and nothing is scaled, as Adam's step does not depend on a gradient's scale.

    Attributes:
      leaves: {stored name: (shape, dtype name)} of the upcycled model.
    """

    def __init__(self, dense, config, recipe, *, moments=False):
        self._dense, self._config, self._recipe = dense, config, recipe
        self._moments = moments
        self._lock, self._kept = threading.Lock(), (None, None)
        self.leaves = {}
        for name, leaf in sources.stored_leaves(config).items():
            kind = dense.leaves[_dense_name(name)][1]
            if kind == "float16" and _ROUTER.fullmatch(name):
                kind = "float32"  # the small router of "scaled" lies below float16's range
            self.leaves[name] = tuple(leaf.shape), kind

    def read(self, name, window=()) -> np.ndarray:
        """Rows of an array; `window` holds one slice, of the first axis, or nothing."""
        shape, kind = self.leaves[name]
        start, stop, _ = (window[0] if window else slice(None)).indices(shape[0])
        if match := _ROUTER.fullmatch(name):
            return self._router(int(match[1]))[start:stop].astype(kind)
        match = _FFN.fullmatch(name)
        if not match:
            return self._dense.read(name, window)
        layer, shared, matrix = int(match[1]), match[2], match[3]
        dense = self._whole(_dense_name(name))
        if shared:
            return self._scaled(dense[start:stop], matrix, self._recipe.shared_scale)
        out = np.empty((stop - start, *shape[1:]), dense.dtype)
        for row, expert in zip(out, range(start, stop), strict=True):
            row[...] = self._expert(dense, layer, expert, matrix)
        return out

    def _whole(self, name):
        """A whole array of the dense model; the last one stays, as all its copies are made in
        turn."""
        with self._lock:
            if self._kept[0] != name:
                self._kept = name, self._dense.read(name)
            return self._kept[1]

    def _expert(self, dense, layer, expert, matrix):
        part, width = expert % self._recipe.granularity, self._config.d_ff
        units = slice(part * width, (part + 1) * width)
        cut = dense[units] if matrix == "w_down" else dense[:, units]
        cut = self._diversified(cut, layer, expert, matrix)
        return self._scaled(cut, matrix, self._recipe.scale)

    def _scaled(self, array, matrix, scale):
        if matrix != "w_down" or scale == 1 or self._moments:
            return array
        return (array.astype(np.float32) * np.float32(scale)).astype(array.dtype)

    def _diversified(self, cut, layer, expert, matrix):
        """One expert's matrix with its new entries."""
        kind, fraction = self._recipe.diversify, self._recipe.fraction
        if kind == recipe_lib.NONE:
            return cut
        values = self._random(_VALUE_STREAM, layer, expert, _MATRICES.index(matrix))
        if kind == recipe_lib.NOISE:
            choice = self._random(_CHOICE_STREAM, layer, expert, _MATRICES.index(matrix))
            new = choice.random(cut.shape, np.float32) < fraction
            mean, std = 0.0, recipe_lib.NOISE_STD
        else:  # the same hidden units in all three matrices
            width = self._config.d_ff
            choice = self._random(_CHOICE_STREAM, layer, expert)
            dropped = choice.permutation(width)[: int(fraction * width)]
            new = np.zeros(width, bool)
            new[dropped] = True
            axis = 0 if matrix == "w_down" else 1
            old = np.compress(new, cut, axis=axis).astype(np.float32)
            mean, std = (old.mean(), old.std()) if old.size else (0.0, 0.0)
            new = np.broadcast_to(new[:, None] if axis == 0 else new, cut.shape)
        if self._moments:
            return np.where(new, np.zeros((), cut.dtype), cut)
        drawn = values.standard_normal(cut.shape, np.float32)
        drawn *= np.float32(std)
        drawn += np.float32(mean)
        return np.where(new, drawn.astype(cut.dtype), cut)

    def _router(self, layer):
        """float32 [d_model, N], the columns of a group equal."""
        recipe, d = self._recipe, self._config.d_model
        if self._moments:
            return np.zeros((d, recipe.num_experts), np.float32)
        rows = self._random(_ROUTER_STREAM, layer).standard_normal(
            (recipe.num_copies, d), np.float32
        )
        rows *= np.float32(recipe.router_std(d))
        return np.repeat(rows, recipe.granularity, axis=0).T

    def _random(self, *place):
        return np.random.default_rng([self._recipe.seed, *place])


def _dense_name(name) -> str:
    """The array of the dense model that one of the upcycled model comes from; of the router: the
    one whose dtype it takes."""
    if match := _FFN.fullmatch(name):
        return f"layers/{match[1]}/ffn/{match[3]}"
    if match := _ROUTER.fullmatch(name):
        return f"layers/{match[1]}/ffn/w_gate"
    return name
