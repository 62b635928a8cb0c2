"""How parameters lie on disk: one array per tensor and layer, however training stacks them.

In training, the layers of one place p in the repeating pattern are stacked (`layers/block_p/…`,
leading dimension j); on disk layer i = p + moe_every · j is `layers/II/…`. One layer can then be
read alone, a model can be read under another stacking, and no array outgrows a small machine.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from olmoe_jax import sharding

_BLOCK = re.compile(r"layers/block_(\d+)/(.+)")
_LAYER = re.compile(r"layers/(\d+)/(.+)")


def flatten(tree) -> dict:
    """Tree → {"layers/00/moe/router": leaf, …} in the tree's order; empty nodes vanish."""
    return {
        sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(leaves: dict) -> dict:
    """{"a/b": leaf, …} → nested dict."""
    out = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out


def stored_names(name: str, config) -> list[str]:
    """Names on disk of the training leaf `name`, in the order of its stacked dimension.

    Args:
      config: the ModelConfig.
    """
    match = _BLOCK.fullmatch(name)
    if not match:
        return [name]
    width = max(2, len(str(config.num_layers - 1)))
    layers = range(int(match[1]), config.num_layers, config.moe_every)
    return [f"layers/{layer:0{width}d}/{match[2]}" for layer in layers]


def training_name(name: str, config) -> str:
    """The training leaf that holds the leaf `name` of the disk."""
    match = _LAYER.fullmatch(name)
    return f"layers/block_{int(match[1]) % config.moe_every}/{match[2]}" if match else name


def is_stacked(name: str) -> bool:
    """Whether the training leaf `name` has a leading dimension of layers."""
    return _BLOCK.fullmatch(name) is not None


def slice_sharding(of):
    """Sharding of one layer of a stacked leaf that is laid out by `of`."""
    if isinstance(of, NamedSharding):
        return NamedSharding(of.mesh, PartitionSpec(*of.spec[1:]))
    return of


def to_stored(params, config) -> dict:
    """Training tree → nested dict as on disk: `layers/block_p/…` [n, …] → `layers/II/…` […].

    Works on arrays, under jit, and on trees of jax.ShapeDtypeStruct (shardings follow).

    Raises:
      ValueError: a stacked leaf has not as many layers as `config` says.
    """
    out = {}
    for name, leaf in flatten(params).items():
        if not is_stacked(name):
            out[name] = leaf
            continue
        names = stored_names(name, config)
        if leaf.shape[0] != len(names):
            raise ValueError(f"parameter {name} has {leaf.shape[0]} layers: expected {len(names)}")
        for index, stored in enumerate(names):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                one = slice_sharding(leaf.sharding)
                out[stored] = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=one)
            else:
                out[stored] = leaf[index]
    return unflatten(dict(sorted(out.items())))


def from_stored(stored, config) -> dict:
    """The inverse of `to_stored`. Abstract leaves lose their sharding.

    Raises:
      ValueError: layers are missing.
    """
    leaves, out = flatten(stored), {}
    for name in leaves:
        training = training_name(name, config)
        if training in out:
            continue
        names = stored_names(training, config)
        if missing := [n for n in names if n not in leaves]:
            raise ValueError(
                f"{len(missing)} of {len(names)} layers of {training} are missing ({missing[0]}, …)"
            )
        parts = [leaves[n] for n in names]
        if not is_stacked(training):
            out[training] = parts[0]
        elif isinstance(parts[0], jax.ShapeDtypeStruct):
            out[training] = jax.ShapeDtypeStruct((len(parts), *parts[0].shape), parts[0].dtype)
        else:
            out[training] = jnp.stack(parts)
    return unflatten(out)
