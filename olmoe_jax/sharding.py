"""The device mesh, and the one table that says how every parameter is laid out on it.

Mesh axes: `data` (replicas), `fsdp` (parameters split over d_model, gathered where used), `expert`
(experts split), `tensor` (heads, d_ff and vocabulary split). A laptop is the 1 × 1 × 1 × 1 mesh.
The batch is split over `data`, `fsdp` and `expert` together. Parameters are a plain tree without
boxes: a parameter's path decides its axes (`PARAMETER_AXES`), so the optimizer's moments, which
repeat the paths, follow by themselves.
"""

import dataclasses
import fnmatch
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Axis word → mesh axis. Words not listed (length, layers, …) are not split.
LOGICAL_AXES = {
    "batch": BATCH_AXES,
    "d_model": "fsdp",
    "experts": "expert",
    "heads": "tensor",
    "d_ff": "tensor",
    "vocab": "tensor",
}

# Parameter path → axis words of its trailing dimensions; a leading `layers` dimension is never
# split. Each path must match exactly one row (`parameter_spec`).
PARAMETER_AXES = (
    ("embedding", ("vocab", "d_model")),
    ("lm_head", ("vocab", "d_model")),
    ("final_norm/scale", (None,)),
    ("layers/*/*_norm/scale", (None,)),
    ("layers/*/attention/query", ("d_model", "heads")),
    ("layers/*/attention/key", ("d_model", "heads")),
    ("layers/*/attention/value", ("d_model", "heads")),
    ("layers/*/attention/output", ("heads", "d_model")),
    ("layers/*/moe/router", ("d_model", None)),
    ("layers/*/moe/router_bias", (None,)),
    ("layers/*/moe/w_gate", ("experts", "d_model", "d_ff")),
    ("layers/*/moe/w_up", ("experts", "d_model", "d_ff")),
    ("layers/*/moe/w_down", ("experts", "d_ff", "d_model")),
    ("layers/*/moe/shared/w_gate", ("d_model", "d_ff")),
    ("layers/*/moe/shared/w_up", ("d_model", "d_ff")),
    ("layers/*/moe/shared/w_down", ("d_ff", "d_model")),
    ("experts/w_gate", ("experts", "d_model", "d_ff")),  # of model.share_experts_across_layers
    ("experts/w_up", ("experts", "d_model", "d_ff")),
    ("experts/w_down", ("experts", "d_ff", "d_model")),
    ("layers/*/ffn/w_gate", ("d_model", "d_ff")),
    ("layers/*/ffn/w_up", ("d_model", "d_ff")),
    ("layers/*/ffn/w_down", ("d_ff", "d_model")),
)

# The config field that a mesh axis must divide, for the error message.
_FIELD_OF_AXIS = {
    "d_model": "d_model",
    "experts": "num_experts",
    "heads": "num_heads",
    "d_ff": "d_ff",
    "vocab": "vocab_multiple",  # the vocabulary is padded up to a multiple of it
}


def make_mesh(config, devices=None) -> Mesh:
    """Mesh of all devices with the sizes of `config` (a MeshConfig).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"config.mesh is {shape}: must multiply to the number of devices ({len(devices)})"
        )
    shape = tuple(len(devices) // fixed if sizes[name] == -1 else sizes[name] for name in MESH_AXES)
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)  # linen's scan and remat need Auto axes
    if len({d.platform for d in devices}) == 1 and devices[0].platform == "tpu":
        return jax.make_mesh(
            shape, MESH_AXES, axis_types=auto, devices=devices
        )  # places by the torus
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=auto)


def batch_shards(mesh) -> int:
    """Number of parts into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape)


def path_name(path) -> str:
    """A jax key path as "layers/block_0/moe/router"."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def parameter_axes(path: str) -> tuple:
    """Axis words of the trailing dimensions of the parameter at `path`.

    Raises:
      ValueError: no row, or more than one, of PARAMETER_AXES matches.
    """
    rows = [axes for pattern, axes in PARAMETER_AXES if fnmatch.fnmatchcase(path, pattern)]
    if len(rows) != 1:
        raise ValueError(
            f"parameter {path}: {len(rows)} rows of sharding.PARAMETER_AXES match, expected one"
        )
    return rows[0]


def parameter_spec(path: str, shape) -> PartitionSpec:
    """PartitionSpec of the parameter at `path`; dimensions in front of the table's are not
    split."""
    axes = parameter_axes(path)
    words = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(*(LOGICAL_AXES.get(word) for word in words))


def parameter_shardings(params, mesh):
    """NamedSharding of every leaf of a parameter tree (arrays or shapes).

    Raises:
      ValueError: a path that the table does not know, or a dimension that the mesh does not divide.
    """

    def one(path, leaf):
        name, spec = path_name(path), parameter_spec(path_name(path), leaf.shape)
        words = (None,) * (len(leaf.shape) - len(parameter_axes(name))) + parameter_axes(name)
        for size, axis, word in zip(leaf.shape, spec, words, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                field = f" (config.model.{_FIELD_OF_AXIS[word]})" if word in _FIELD_OF_AXIS else ""
                raise ValueError(
                    f"config.mesh.{axis} is {mesh.shape[axis]}: must divide the {word} "
                    f"dimension{field} of {name}, which is {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, params)


def state_shardings(state, mesh):
    """NamedSharding of every leaf of a train state: by the table for parameters and moments (which
    repeat the parameters' paths behind a prefix), everything else on every device."""
    by_path = {
        path_name(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            parameter_shardings(state["params"], mesh)
        )
    }

    def one(path, leaf):
        names = path_name(path).split("/")
        for start in range(len(names)):
            if (suffix := "/".join(names[start:])) in by_path and len(leaf.shape):
                return by_path[suffix]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is `batch`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(batch, sharding, *, names, batch_size, first_row=0) -> dict:
    """NumPy rows of a global batch → global arrays laid out by `sharding`.

    Args:
      batch: dict of arrays whose row 0 is row `first_row` of the global batch; they hold at least
        the rows of this process's devices.
      sharding: a `batch_sharding`.
      names: the entries to place.
      batch_size: rows of the global batch.
    """

    def one(local):
        def read(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first_row : stop - first_row]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, read)

    return {name: one(batch[name]) for name in names}


def constrain(x, *axes):
    """Asks the compiler to lay `x` out by axis words (None: not split). Nothing happens without a
    mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*(LOGICAL_AXES.get(axis) for axis in axes))
    )
