"""A tiny run: its config, random parameters, a train state with the optimizer's moments."""

import itertools
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config


@pytest.fixture(scope="session")
def make_config():
    """Config of sizes that are small and distinct; keywords go to the model section."""

    def make(*, checkpoint=None, **model):
        sizes = dict(
            vocab_size=22, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, d_ff=6,
            num_experts=4, num_experts_per_token=2, max_length=16,
        )  # fmt: skip
        return config.Config(
            model=config.ModelConfig(**{**sizes, **model}),
            data=config.DataConfig(sequence_length=16),
            training=config.TrainingConfig(batch_size=4),
            checkpoint=config.CheckpointConfig(interval=1, **(checkpoint or {})),
        )

    return make


@pytest.fixture(scope="session")
def random_params():
    """Random parameters of a ModelConfig, optionally laid out by a tree of shardings."""
    seeds = itertools.count(1)

    def make(model_config, shardings=None):
        rng = np.random.default_rng(next(seeds))
        tree = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
            checkpoints.abstract_params(model_config),
        )
        return tree if shardings is None else jax.device_put(tree, shardings)

    return make


@pytest.fixture(scope="session")
def make_state(random_params):
    """A train state whose moments differ from the parameters."""
    import optax

    def make(model_config, step=7):
        params = random_params(model_config)
        moments = optax.ScaleByAdamState(
            count=jnp.int32(step), mu=random_params(model_config), nu=random_params(model_config)
        )
        return {
            "params": params,
            "opt_state": (optax.EmptyState(), (moments, None)),
            "step": jnp.int32(step),
            "rng": jax.random.key_data(jax.random.key(step)),
        }

    return make


@pytest.fixture(scope="session")
def to_host():
    """Copies a tree into NumPy arrays that share no memory with it."""
    return lambda tree: jax.tree.map(lambda x: np.array(x, copy=True), tree)


@pytest.fixture(scope="session")
def same_bits():
    """Whether two trees have one structure, the same dtypes and the same bytes."""

    def compare(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.tobytes() == y.tobytes()
        return True

    return compare


@pytest.fixture(scope="session")
def unused_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
