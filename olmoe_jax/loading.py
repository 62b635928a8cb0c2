"""`load`: a model and its parameters from a directory, whichever of the four kinds it is.

The kinds: a run's workdir (its newest checkpoint), one checkpoint of a run, an Orbax directory
written by `experiments.port_weights`, and a Hugging Face folder.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
from etils import epath

from olmoe_jax import checkpoints
from olmoe_jax import config as config_lib
from olmoe_jax import sharding as sharding_lib
from olmoe_jax.checkpoints import naming
from olmoe_jax.model import transformer

WORKDIR = "workdir"
CHECKPOINT = "checkpoint"
ORBAX = "orbax"
HUGGING_FACE = "huggingface"


def kind_of(directory) -> str:
    """Which kind of model directory this is: "workdir", "checkpoint", "orbax" or "huggingface".

    Raises:
      FileNotFoundError: it does not exist, or is none; the message lists what was looked for.
    """
    path = epath.Path(directory)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such directory; expected {_EXPECTED}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: a file; expected {_EXPECTED}")
    if naming.is_complete(path):
        return CHECKPOINT
    if naming.TEMPORARY in path.name:
        raise FileNotFoundError(f"{path}: a save that did not finish; take another checkpoint")
    if (path / naming.CHECKPOINTS).is_dir():
        if naming.list_checkpoints(path):
            return WORKDIR
        raise FileNotFoundError(
            f"{path}: a workdir without a finished checkpoint in {path / naming.CHECKPOINTS}; "
            "train until the first is saved"
        )
    names = {p.name for p in path.iterdir()}
    weights = any(n.endswith(".safetensors") or n == "model.safetensors.index.json" for n in names)
    if weights and _has_model_type(path / "config.json"):
        return HUGGING_FACE
    if "_CHECKPOINT_METADATA" in names or ("params" in names and "config.json" in names):
        return ORBAX
    lacking = {
        "checkpoints/ (a workdir)": "checkpoints" in names,
        "_CHECKPOINT_METADATA (Orbax)": False,
        "*.safetensors (Hugging Face)": weights,
        "config.json": "config.json" in names,
    }
    there = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    missing = ", ".join(n for n, present in lacking.items() if not present)
    raise FileNotFoundError(
        f"{path}: no model; it holds {there}; missing {missing}; expected {_EXPECTED}"
    )


_EXPECTED = (
    "a run's workdir, one of its checkpoints (such as step5000-tokens20B), an Orbax directory "
    "written by experiments.port_weights, or a Hugging Face folder (config.json and *.safetensors)"
)


def _has_model_type(file) -> bool:
    try:
        return "model_type" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def load(directory, *, dtype=None, sharding=None, verify=False):
    """The model in `directory` and its parameters.

    Args:
      directory: a run's workdir (the newest checkpoint is taken) or one checkpoint.
      dtype: str or dtype of the parameters and of the computation; None: parameters as they are
        stored, computation as in the run.
      sharding: a jax.sharding.Mesh (leaves are laid out by `olmoe_jax.sharding`), one sharding for
        all leaves, or a tree of shardings; None: the first device.
      verify: recompute the hashes of the stored bytes first and name arrays that are damaged.

    Returns:
      (Transformer, params).

    Raises:
      FileNotFoundError: there is no model in `directory`.
      ValueError: it is damaged, or of a kind that this version does not read.
    """
    directory = os.path.expanduser(directory)
    kind = kind_of(directory)
    if kind not in (WORKDIR, CHECKPOINT):
        what = {ORBAX: "an Orbax directory", HUGGING_FACE: "a Hugging Face folder"}[kind]
        raise ValueError(
            f"{directory}: found {what}; this version reads only a run's workdir or one of its "
            "checkpoints"
        )
    path = checkpoints.find(directory)
    config = checkpoints.read_config(path)
    model_config = config.model
    if dtype is not None:
        try:
            dtype = jnp.dtype(dtype).name
        except TypeError:
            choices = ", ".join(config_lib.DTYPE_NAMES)
            raise ValueError(f"dtype is {dtype!r}: must be one of {choices}") from None
        model_config = dataclasses.replace(model_config, dtype=dtype)
    if isinstance(sharding, jax.sharding.Mesh):
        sharding = sharding_lib.parameter_shardings(
            checkpoints.abstract_params(model_config), sharding
        )
    params = checkpoints.read_params(path, model_config, sharding, dtype=dtype, verify=verify)
    return transformer.Transformer(
        model_config, routing_group=config.losses.load_balancing_group
    ), params
