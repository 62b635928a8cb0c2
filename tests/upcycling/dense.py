"""A tiny dense model, its directories, and what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import checkpoints, config, loading
from olmoe_jax.checkpoints import layout
from olmoe_jax.model import transformer
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle, weights
from tests import oracles

# d_ff has 2, 3 and 4 as divisors; weights large enough that the FFN matters.
MODEL = config.ModelConfig(
    vocab_size=23, max_length=13, num_layers=4, d_model=10, num_heads=5, num_kv_heads=5, d_ff=12,
    num_experts=0, num_experts_per_token=0, expert_backend="dense",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, MODEL.max_length))


def write_run(workdir, model=MODEL, *, step=6, start_step=0, losses=None):
    """A workdir with one checkpoint of random weights; the Config."""
    run = config.Config(
        model=model,
        data=config.DataConfig(sequence_length=model.max_length, start_step=start_step),
        losses=losses or config.LossesConfig(),
        training=config.TrainingConfig(batch_size=4, seed=7),
        checkpoint=config.CheckpointConfig(interval=3),
    )
    params = random_params(model)
    with checkpoints.Checkpoints(workdir, run, report=quiet) as kept:
        kept.save_params(step, jax.tree.map(jnp.asarray, params))
    return run


def quiet(line):
    """Announces nothing."""
    del line


def make(dense, output, **settings):
    """Upcycles into 4 experts top-2 but for `settings`; the Result."""
    numbers = {"num_experts": 4, "num_experts_per_token": 2} | settings
    return upcycle.upcycle(dense, output, recipe_lib.Recipe(**numbers), announce=quiet)


def logits(directory):
    """Logits of the model in a directory, on TOKENS, in float32."""
    model, params = loading.load(directory, dtype="float32")
    return compute(model.config, params)


def compute(model_config, params):
    """Logits of parameters as trained, on TOKENS."""
    return np.asarray(_compiled(model_config)({"params": params}))


@functools.cache
def _compiled(model_config):
    model = transformer.Transformer(model_config)
    return jax.jit(lambda variables: model.apply(variables, TOKENS).logits)


@functools.cache
def random_params(model):
    """Random float32 parameters of a dense ModelConfig, as trained."""
    return oracles.random_params(transformer.Transformer(model), jnp.zeros((1, 2), jnp.int32))


class Source:
    """The arrays of a training tree: a source, as `porting.sources` has them."""

    def __init__(self, params, model):
        stored = layout.flatten(layout.to_stored(params, model))
        self._arrays = {name: np.asarray(array) for name, array in stored.items()}
        self.leaves = {name: (x.shape, x.dtype.name) for name, x in self._arrays.items()}

    def read(self, name, window=()):
        return self._arrays[name][tuple(window)]


def upcycled(model, **settings):
    """(Recipe, ModelConfig, parameters as trained) of `random_params(model)`, 4 experts top-2 but
    for `settings`; nothing is written."""
    recipe = recipe_lib.Recipe(**{"num_experts": 4, "num_experts_per_token": 2} | settings)
    new = recipe_lib.moe_config(model, recipe)
    source = weights.Upcycled(Source(random_params(model), model), new, recipe)
    stored = {name: jnp.asarray(source.read(name)) for name in source.leaves}
    return recipe, new, layout.from_stored(layout.unflatten(stored), new)


def difference(a, b):
    """Largest difference relative to the largest of `b`."""
    return np.abs(a - b).max() / np.abs(b).max()


def change(**fields):
    """MODEL with other fields."""
    return dataclasses.replace(MODEL, **fields)
