"""Reads kept parameters and train states: onto any mesh, with or without recomputing the hashes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from olmoe_jax import config as config_lib
from olmoe_jax.checkpoints import layout, manifest, naming, quiet
from olmoe_jax.model import transformer

PARAMS = "params"  # the folder of a kept checkpoint that holds its arrays
STATE = "state"  # the same, of a whole train state
CONFIG = "config.json"


def abstract_params(model_config) -> dict:
    """The parameters of a ModelConfig as jax.ShapeDtypeStruct, in the layout of training."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(model_config))  # a tree of its own


@functools.lru_cache(maxsize=64)
def _abstract_params(model_config):
    model = transformer.Transformer(model_config)
    input_ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), input_ids)[
        "params"
    ]


def read_config(path) -> config_lib.Config:
    """The configuration of the run that wrote the checkpoint at `path`.

    Fields that did not exist when it was written have their defaults.

    Raises:
      ValueError: config.json does not fit this version; DamagedError: it is missing or damaged.
    """
    path = epath.Path(path)
    where = f"checkpoint {path.name}: {CONFIG}"
    try:
        values = json.loads((path / CONFIG).read_text())["config"]
        values = {name: dict(section) for name, section in values.items()}
    except FileNotFoundError:
        raise manifest.DamagedError(f"{where} is missing, in {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise manifest.DamagedError(f"{where} is damaged ({error!r}), in {path}") from error
    try:
        return config_lib.from_saved(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} does not fit this version ({error}), in {path}") from error


def read_params(path, model_config=None, shardings=None, *, dtype=None, verify=False) -> dict:
    """Parameters in the layout of training (layers stacked).

    Args:
      path: a checkpoint, a workdir (its newest is read), a directory that `streamed` wrote, or a
        step directory of a run's `resume`.
      model_config: ModelConfig whose parameters are wanted; None: that of the run that wrote them.
      shardings: where the leaves go: a tree of shardings, one for all, or None: the first device.
      dtype: dtype of the result; None: as stored.
      verify: recompute the hashes and name the files and arrays that are damaged.

    Raises:
      FileNotFoundError: `path` is no checkpoint.
      ValueError: it holds the parameters of another architecture; DamagedError: it is damaged.
    """
    path = naming.find(path)
    is_state = (path / STATE).is_dir() and not (path / PARAMS).is_dir()
    item, prefix = (STATE, f"{PARAMS}/") if is_state else (PARAMS, "")
    found = {n: x for n, x in manifest.read(path).items() if n.startswith(prefix)}
    if verify:
        check_files(path)
    stored_config = read_config(path)
    model_config = stored_config.model if model_config is None else model_config
    expected = abstract_params(model_config)
    on_disk = {PARAMS: expected} if is_state else layout.to_stored(expected, model_config)
    shapes = {n: (x.shape, None) for n, x in layout.flatten(on_disk).items()}
    _check_leaves(path, found, shapes, stored_config.model, model_config)
    if verify:
        check_hashes(path, item, found)
    expected, out = layout.flatten(expected), {}
    for name, sharding in sharding_of_each(shardings, expected).items():
        # One leaf of training at a time, so that little memory beside the result is needed.
        names = [prefix + name] if is_state else layout.stored_names(name, model_config)
        stack = layout.is_stacked(name) and not is_state
        part_sharding = layout.slice_sharding(sharding) if stack else sharding
        parts = _restore(path, item, found, {n: part_sharding for n in names})
        out[name] = _join(stack, dtype and jnp.dtype(dtype).name, sharding)(
            [parts[n] for n in names]
        )
    return layout.unflatten(out)


def find_state(path) -> epath.Path:
    """The train state at `path`, a step directory of a run's `resume`.

    Raises:
      FileNotFoundError: there is none: nothing, a workdir, parameters alone.
    """
    path = naming.absolute(path)
    is_kept = (path / PARAMS).is_dir()  # a kept checkpoint has the same name
    if is_kept or not naming.is_complete(path) or not (path / CONFIG).exists():
        raise FileNotFoundError(
            f"{path}: no train state; expected a step directory of a run's resume folder"
        )
    return path


def read_state(path, abstract_state, model_config=None):
    """A whole train state, its hashes recomputed.

    Args:
      path: a step directory of a run's `resume`.
      abstract_state: tree of jax.ShapeDtypeStruct with shardings (without: the first device).
      model_config: the ModelConfig of this run, to name what differs.

    Raises:
      FileNotFoundError: `path` holds no train state.
      ValueError: its arrays are not those of `abstract_state` (no cast); DamagedError: damaged.
    """
    path = find_state(path)
    found, wanted = manifest.read(path), layout.flatten(abstract_state)
    kinds = {n: (x.shape, jnp.dtype(x.dtype).name) for n, x in wanted.items()}
    _check_leaves(path, found, kinds, read_config(path).model, model_config)
    check_hashes(path, STATE, found)
    parts = _restore(path, STATE, found, sharding_of_each(None, wanted))
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [parts[n] for n in wanted])


def check_files(path):
    """Compares config.json, and the files that travel with the weights, with their hashes.

    Raises:
      DamagedError: one is not as it was saved.
    """
    if bad := manifest.damaged_files(path):
        state = "not the one that was saved" if (path / bad[0]).exists() else "missing"
        others = f" ({len(bad) - 1} more are damaged)" if len(bad) > 1 else ""
        raise manifest.DamagedError(
            f"checkpoint {path.name}: {bad[0]} is {state}{others}, in {path}"
        )


def check_hashes(path, item: str, leaves: dict):
    """Compares every piece of `leaves` ({name: manifest.Leaf}), and every file, with its hash.

    Raises:
      DamagedError: files or arrays are damaged; the first are named.
    """
    if not (path / item).is_dir():
        raise manifest.DamagedError(
            f"checkpoint {path.name}: the folder {item} is missing, in {path}"
        )
    check_files(path)
    if bad := manifest.damaged_leaves(path, item, leaves):
        raise manifest.DamagedError(
            f"checkpoint {path.name}: {len(bad)} of {len(leaves)} arrays damaged ({_some(bad)}), "
            f"in {path}"
        )


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _check_leaves(path, found, wanted, stored_model, model=None):
    """Holds the manifest against {name: (shape, dtype or None)}; says which settings differ."""
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    wrong = [n for n in wanted if n in found and found[n].shape != tuple(wanted[n][0])]
    cast = [n for n in wanted if n in found and wanted[n][1] not in (None, found[n].dtype)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} arrays missing ({_some(missing)})")
    if extra:
        problems.append(f"{len(extra)} arrays that are not wanted ({_some(extra)})")
    if wrong:
        n = min(wrong)
        problems.append(
            f"{len(wrong)} of {len(wanted)} arrays have another shape ({n}: {found[n].shape}, "
            f"wanted {tuple(wanted[n][0])})"
        )
    elif cast:
        n = min(cast)
        problems.append(
            f"{len(cast)} of {len(wanted)} arrays have another dtype ({n}: {found[n].dtype}, "
            f"wanted {wanted[n][1]})"
        )
    if not problems:
        return
    text = f"checkpoint {path.name}: {'; '.join(problems)}"
    if model is not None:
        pairs = (
            (f.name, getattr(stored_model, f.name), getattr(model, f.name))
            for f in dataclasses.fields(model)
        )
        if differ := [(name, a, b) for name, a, b in pairs if a != b]:
            theirs, ours = (", ".join(f"{d[0]}={d[i]}" for d in differ) for i in (1, 2))
            text += f"; it has {theirs}, this run {ours}"
    raise ValueError(f"{text}; in {path}")


def sharding_of_each(shardings, leaves: dict) -> dict:
    """{name: sharding} for {name: abstract leaf}.

    Args:
      shardings: a tree of shardings, one for all leaves, or None: the leaves' own, else the first
        device.

    Raises:
      ValueError: the tree has other leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(leaves, shardings)
    if shardings is not None:
        given = layout.flatten(shardings)
        if set(given) != set(leaves):
            raise ValueError(
                f"shardings: differ from the parameters in {_some(set(given) ^ set(leaves))}"
            )
        return {n: given[n] for n in leaves}
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {n: getattr(leaf, "sharding", None) or first for n, leaf in leaves.items()}


def _restore(path, item: str, leaves: dict, shardings: dict) -> dict:
    """{name: jax.Array} of the arrays named in `shardings`, in their stored dtype."""
    quiet.silence_orbax()
    # Neither names a dtype: Orbax would cast to it and say nothing.
    wanted = {
        n: ocp.ArrayRestoreArgs(sharding=s, global_shape=leaves[n].shape)
        for n, s in shardings.items()
    }
    args = ocp.args.PyTreeRestore(
        item=layout.unflatten(dict.fromkeys(wanted, 0)),
        restore_args=layout.unflatten(wanted),
        partial_restore=True,
    )
    try:
        restored = layout.flatten(ocp.PyTreeCheckpointHandler().restore(path / item, args=args))
    except Exception as error:  # whatever Orbax and TensorStore make of damaged files
        check_hashes(path, item, leaves)  # names the damaged arrays
        raise manifest.DamagedError(
            f"checkpoint {path.name}: {item} cannot be read, in {path}"
        ) from error
    for n, s in shardings.items():
        found = restored[n].shape, restored[n].dtype.name, restored[n].sharding
        if found != (expected := (leaves[n].shape, leaves[n].dtype, s)):
            raise manifest.DamagedError(
                f"checkpoint {path.name}: {n} was read as {found}, expected {expected}, in {path}"
            )
    return {n: restored[n] for n in shardings}


@functools.lru_cache(maxsize=256)
def _join(stack, dtype, sharding):
    """A compiled function from the parts of a training leaf to the leaf."""

    def join(parts):
        stored = parts[0].dtype
        if stack:
            # As integers: on CPU, XLA takes bfloat16 through float32, which alters some NaNs.
            bits = jnp.dtype(f"uint{8 * stored.itemsize}")
            parts = [jax.lax.bitcast_convert_type(part, bits) for part in parts]
            leaf = jax.lax.bitcast_convert_type(jnp.stack(parts), stored)
        else:
            leaf = parts[0]
        return leaf if dtype is None else leaf.astype(dtype)

    return jax.jit(join, out_shardings=sharding)
