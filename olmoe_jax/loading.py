"""`load`: a model and its parameters from a directory, whichever of the four kinds it is.

The kinds: a run's workdir (its newest checkpoint), one checkpoint of a run, an Orbax directory
written by `experiments.port_weights`, and a folder of foreign weights: Hugging Face's, or of the
original training code.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp

from olmoe_jax import checkpoints
from olmoe_jax import config as config_lib
from olmoe_jax import sharding as sharding_lib
from olmoe_jax.checkpoints import manifest
from olmoe_jax.model import transformer
from olmoe_jax.porting import folders, reading, sources, translation


def load(directory, *, dtype=None, sharding=None, verify=False):
    """The model in `directory` and its parameters.

    Args:
      directory: a run's workdir (the newest checkpoint is taken), one checkpoint, what
        `experiments.port_weights` wrote, a Hugging Face folder, or a checkpoint of the original
        training code.
      dtype: str or dtype of the parameters and of the computation; None: parameters as they are
        stored, computation as in the run, and in float32 for weights from elsewhere.
      sharding: a jax.sharding.Mesh (leaves are laid out by `olmoe_jax.sharding`), one sharding for
        all leaves, or a tree of shardings; None: the first device.
      verify: recompute the hashes of the stored bytes first and name arrays that are damaged. A
        Hugging Face folder has hashes if `experiments.port_weights` wrote it.

    Returns:
      (Transformer, params).

    Raises:
      FileNotFoundError: there is no model in `directory`.
      ValueError: it is damaged, or of a family that this version does not read.
    """
    directory = os.path.expanduser(directory)
    foreign = sources.kind_of(directory) in sources.FOREIGN
    if foreign:
        source = sources.Foreign(directory)
        config = source.config
    else:
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
    if foreign:
        if verify:
            sources.check_hashes(source)
        params = reading.read_params(source, sharding, dtype=dtype)
    else:
        params = checkpoints.read_params(path, model_config, sharding, dtype=dtype, verify=verify)
    model = transformer.Transformer(model_config, routing_group=config.losses.load_balancing_group)
    return model, params


def has_hashes(directory) -> bool:
    """Whether `load(directory, verify=True)` has anything to verify: not so for a foreign folder
    that was written elsewhere.

    Raises:
      FileNotFoundError: there is no model in `directory`.
    """
    path = os.path.expanduser(directory)
    is_foreign = sources.kind_of(path) in sources.FOREIGN
    return not is_foreign or os.path.isdir(os.path.join(path, manifest.FOLDER))


def load_params(directory, model_config, *, sharding=None, dtype=None):
    """The parameters in `directory`, verified where it has hashes, for a model that is given.

    Args:
      directory: of any kind that `load` takes, or a step directory of a run's `resume`.
      model_config: the ModelConfig whose parameters they must be.
      sharding, dtype: as of `load`, but no mesh.

    Raises:
      FileNotFoundError: there is no model in `directory`.
      ValueError: it is of another architecture, or damaged.
    """
    if not folders.is_folder(os.path.expanduser(directory)):
        return checkpoints.read_params(directory, model_config, sharding, dtype=dtype, verify=True)
    source = sources.Foreign(os.path.expanduser(directory))
    if differ := translation.differences(source.config.model, model_config):
        raise ValueError(f"{directory} holds another model: it has {'; '.join(differ)}")
    sources.verify(source)
    return reading.read_params(source, sharding, dtype=dtype)
