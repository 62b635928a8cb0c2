"""Work A: the train step that suites measure, small enough for two cores, with true proportions.

4 layers, d_model 512, 8 heads, 64 experts of width 256, 8 for each token, vocabulary 50,304,
4 × 512 tokens; AdamW with a constant rate, clipping, the load-balancing loss as Hugging Face has
it. The router multiplies in the compute dtype, as there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import config as config_lib
from olmoe_jax import sharding
from olmoe_jax.model import transformer
from olmoe_jax.training import step as step_lib


def config(*, dtype="float32", expert_backend="auto", num_layers=4, **changes):
    """The Config of work A.

    Args:
      dtype: of the products, and of what `fresh_state` makes.
      changes: other fields of ModelConfig.
    """
    model = {
        "vocab_size": 50304, "max_length": 512, "num_layers": num_layers, "d_model": 512,
        "num_heads": 8, "num_kv_heads": 8, "d_ff": 256, "num_experts": 64,
        "num_experts_per_token": 8, "expert_backend": expert_backend, "dtype": dtype,
        "router_dtype": dtype,
    }  # fmt: skip
    model = config_lib.ModelConfig(**model | changes)
    return config_lib.Config(
        model=model,
        data=config_lib.DataConfig(sequence_length=model.max_length),
        losses=config_lib.LossesConfig(
            load_balancing_convention="huggingface", router_z_weight=0.0
        ),
        optimizer=config_lib.OptimizerConfig(schedule="constant"),
        training=config_lib.TrainingConfig(batch_size=4),
        checkpoint=config_lib.CheckpointConfig(dtype=dtype),
    )


def tokens(run_config, count, *, seed=0) -> np.ndarray:
    """int32 [count, b, l]: words drawn by Zipf's law, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    vocabulary = run_config.model.vocab_size
    frequency = 1 / np.arange(1, vocabulary + 1)
    shape = (count, run_config.training.batch_size, run_config.data.sequence_length)
    ranks = rng.choice(vocabulary, shape, p=frequency / frequency.sum())
    return rng.permutation(vocabulary).astype(np.int32)[ranks]


def batch(token_ids) -> dict:
    """What a train step takes, without padding.

    Args:
      token_ids: int32 [b, l].
    """
    everywhere = jnp.ones(token_ids.shape, bool)
    return {
        "tokens": jnp.asarray(token_ids), "token_mask": everywhere, "loss_mask": everywhere
    }  # fmt: skip


def lower(run_config) -> jax.stages.Lowered:
    """The train step of (state, batch), as the training loop jits it: the state is donated.

    No array is made, so that it can be of a model that does not fit.
    """
    mesh, state = _mesh(run_config), jax.eval_shape(_starting_state(run_config))
    shardings = sharding.state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings
    )
    shape = (run_config.training.batch_size, run_config.data.sequence_length)
    step = jax.jit(
        functools.partial(
            step_lib.train_step, model=transformer.Transformer(run_config.model), config=run_config
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, batch(np.zeros(shape, np.int32)))


def memory(compiled) -> dict[str, int]:
    """Bytes that XLA holds at once for a compiled step; results: those that reuse no argument."""
    sizes = compiled.memory_analysis()
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    }


class Trainer:
    """Train steps on jax.devices()[0]; parameters and moments are in `config.model.dtype`.

    Attributes:
      compiled: the step, a jax.stages.Compiled.
      state: the train state now.
    """

    def __init__(self, run_config):
        self._config = run_config
        self.compiled = lower(run_config).compile()
        self.restart()

    def restart(self):
        """Begins again from the same random weights."""
        self.state = None  # the memory of the old one
        mesh, start = _mesh(self._config), _starting_state(self._config)
        shardings = sharding.state_shardings(jax.eval_shape(start), mesh)
        with jax.set_mesh(mesh):
            self.state = jax.jit(start, out_shardings=shardings)()

    def step(self, step_batch):
        """One update; returns its metrics, which are not waited for."""
        self.state, metrics = self.compiled(self.state, step_batch)
        return metrics


def _mesh(run_config):
    return sharding.make_mesh(run_config.mesh, jax.devices()[:1])


def _starting_state(run_config):
    """A function without arguments that makes the train state, floats in the model's dtype."""
    dtype = run_config.model.dtype

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def start():
        return jax.tree.map(cast, step_lib.init_state(jax.random.key(0), config=run_config))

    return start
