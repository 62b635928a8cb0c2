"""The experts' matrices of a model on disk, one at a time: a model larger than memory will do."""

import collections.abc
import re

import numpy as np

from olmoe_jax.porting import sources

_NAME = re.compile(r"layers/(\d+)/moe/(w_gate|w_up|w_down)")
_SHARED = re.compile(r"experts/(w_gate|w_up|w_down)")  # of all layers


class Layer(collections.abc.Mapping):
    """name → [experts, …] of one layer; an array is read whenever it is asked for."""

    def __init__(self, source, names):
        self._source, self._names = source, names

    def __getitem__(self, name) -> np.ndarray:
        return self._source.read(self._names[name])

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


class Experts:
    """The MoE layers of a model, in order: iterating gives a `Layer` for each.

    Attributes:
      layers: their indices in the model.
      num_experts: in each of them.
    """

    def __init__(self, source):
        self._source, self._names = source, {}
        model = source.config.model
        for name in source.leaves:
            if found := _NAME.fullmatch(name):
                self._names.setdefault(int(found[1]), {})[found[2]] = name
            elif found := _SHARED.fullmatch(name):
                for layer in filter(model.is_moe_layer, range(model.num_layers)):
                    self._names.setdefault(layer, {})[found[1]] = name
        self._names = dict(sorted(self._names.items()))
        self.layers = tuple(self._names)
        self.num_experts = model.num_experts

    def __iter__(self):
        return (Layer(self._source, names) for names in self._names.values())

    def is_comparable(self, other) -> bool:
        """Whether both have as many MoE layers, and experts of the same shapes."""
        return self._shapes() == other._shapes()

    def _shapes(self):
        leaves = self._source.leaves
        return [
            sorted((kind, tuple(leaves[name][0][1:])) for kind, name in names.items())
            for names in self._names.values()
        ]


def open_experts(directory) -> Experts:
    """The Experts of a model directory of any kind that `olmoe_jax.load` takes.

    Raises:
      FileNotFoundError, ValueError: there is no model.
    """
    return Experts(sources.open_source(directory))
