"""A foreign folder straight into the layout of training, on one device or many."""

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import layout


def read_params(source, shardings=None, *, dtype=None) -> dict:
    """Parameters of a `sources.Foreign`, layers stacked; each device's part is read on its own.

    Args:
      shardings: a tree of shardings, one for all leaves, or None: the first device.
      dtype: of the result; None: as stored.
    """
    model_config = source.config.model
    expected = layout.flatten(checkpoints.abstract_params(model_config))
    out = {}
    for name, sharding in checkpoints.sharding_of_each(shardings, expected).items():
        names = layout.stored_names(name, model_config)
        stacked, shape = layout.is_stacked(name), expected[name].shape
        kind = jnp.dtype(dtype or source.leaves[names[0]][1])

        def read(index, names=names, stacked=stacked, shape=shape, kind=kind):
            if not stacked:
                return np.asarray(source.read(names[0], index)).astype(kind, copy=False)
            layers = names[index[0]]
            sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], shape[1:], strict=True)]
            leaf = np.empty((len(layers), *sizes), kind)
            for row, layer in zip(leaf, layers, strict=True):
                row[...] = source.read(layer, index[1:])
            return leaf

        out[name] = jax.make_array_from_callback(shape, sharding, read)
    return layout.unflatten(out)
