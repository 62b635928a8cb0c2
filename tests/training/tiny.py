"""A tiny run whose train step compiles in seconds: what the tests of `training.step` share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import config as config_lib
from olmoe_jax import sharding
from olmoe_jax.model import transformer
from olmoe_jax.training import step as step_lib
from tests import oracles

# Order of summation, relative to a leaf's largest gradient; all-reduces sum in yet another order.
FP32_SUM = 5e-5

BATCH, LENGTH = 64, 5
MODEL = config_lib.ModelConfig(
    vocab_size=31, vocab_multiple=2, max_length=LENGTH, num_layers=2, d_model=16, num_heads=2,
    num_kv_heads=2, d_ff=6, num_experts=8, num_experts_per_token=3, expert_backend="dense",
    init_std=0.3,
)  # fmt: skip
CONFIG = config_lib.Config(
    model=MODEL,
    data=config_lib.DataConfig(sequence_length=LENGTH),
    losses=config_lib.LossesConfig(load_balancing_weight=0.5, router_z_weight=0.1),
    optimizer=config_lib.OptimizerConfig(learning_rate=0.01),
    training=config_lib.TrainingConfig(batch_size=BATCH),
)
MESHES = {
    "one device": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "expert 4 × data 2": {"expert": 4, "data": 2},
    "fsdp 2 × expert 2 × tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}


def make_config(**changes):
    """CONFIG with `section={field: value}`."""
    sections = {
        name: dataclasses.replace(getattr(CONFIG, name), **c) for name, c in changes.items()
    }
    return dataclasses.replace(CONFIG, **sections)


def make_mesh(name):
    sizes = MESHES[name]
    devices = jax.devices() if sizes else jax.devices()[:1]
    return sharding.make_mesh(config_lib.MeshConfig(**({"data": 1} | sizes)), devices)


def make_model(config):
    return transformer.Transformer(config.model, routing_group=config.losses.load_balancing_group)


@functools.cache
def random_params(model=MODEL):
    """Random parameters with unbalanced routing: experts like what all tokens have in common."""
    params = oracles.random_params(transformer.Transformer(model), jnp.zeros((1, 2), jnp.int32))
    common = np.random.default_rng(1).choice(np.float32([-1, 1]), model.d_model)
    params["embedding"] += 0.5 * common
    moe = params["layers"]["block_0"]["moe"]
    moe["router"] += (
        0.06 * common[:, None] * np.linspace(-1, 1, model.num_experts, dtype=np.float32)
    )
    return params


def random_batch(config=CONFIG, seed=0):
    """Rows of uneven length, empty rows, an empty group, windows that are read but not learnt."""
    rng = np.random.default_rng(seed)
    b = config.training.batch_size
    real = rng.integers(0, LENGTH + 1, (b, 1))
    real[: b // 4] = LENGTH  # the first micro-batch holds far more than the others
    real[b // 2 : b // 2 + 2] = 0
    mask = np.arange(LENGTH) < real
    # No token twice in two rows: equal beginnings tie exactly under expert choice, and which one is
    # chosen would be a matter of rounding.
    tokens = rng.permuted(np.tile(np.arange(31, dtype=np.int32), (b // 2, 1)), axis=1)
    tokens = tokens[:, : 2 * LENGTH].reshape(b, LENGTH)
    return {
        "tokens": tokens,
        "token_mask": mask,
        "loss_mask": mask & (rng.random((b, 1)) < 0.8),
    }


def gradient_on_devices(config, mesh="one device", params=None, batch=None):
    """(gradient, Parts), computed on a mesh and left there."""
    mesh, params = make_mesh(mesh), random_params(config.model) if params is None else params
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        batch = jax.device_put(batch or random_batch(config), sharding.batch_sharding(mesh))
        return _jitted_gradient(config)(params, batch)


def gradient(config, mesh="one device", params=None, batch=None):
    """(gradient, Parts) as NumPy arrays, computed on a mesh."""
    return jax.device_get(gradient_on_devices(config, mesh, params, batch))


@functools.cache
def _jitted_gradient(config):
    return jax.jit(
        functools.partial(step_lib.loss_and_gradient, model=make_model(config), config=config)
    )


def close(got, want, tolerance=FP32_SUM):
    scale = max(np.abs(want).max(), 1e-6)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance * scale)


def _state(config, mesh):
    """The state of a run that has made no step, with the random parameters of these tests."""
    init = functools.partial(step_lib.init_state, config=config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    state["params"] = random_params(config.model)
    return jax.device_put(state, sharding.state_shardings(shapes, mesh))


def after_steps(config, mesh, steps, batch=None):
    """(state, metrics of every step, the jitted step)."""
    mesh, seen = make_mesh(mesh), []
    with jax.set_mesh(mesh):
        state = _state(config, mesh)
        placed = jax.tree.map(lambda x: x.sharding, state)
        run = jax.jit(
            functools.partial(step_lib.train_step, model=make_model(config), config=config),
            donate_argnums=0, out_shardings=(placed, None),
        )  # fmt: skip
        batch = jax.device_put(batch or random_batch(config), sharding.batch_sharding(mesh))
        for _ in range(steps):
            state, metrics = run(state, batch)
            seen.append(jax.device_get(metrics))
    return state, seen, run
