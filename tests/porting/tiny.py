"""A tiny model with random weights, without any other library's help."""

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import checkpoints, config
from olmoe_jax.porting import port

MODEL = config.ModelConfig(
    vocab_size=23, vocab_multiple=4, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, d_ff=6,
    num_experts=5, num_experts_per_token=2, max_length=29, init_std=0.5, rope_theta=700.0,
)  # fmt: skip


def quiet(line):
    """Announces nothing."""
    del line


def random_params():
    """Parameters of MODEL."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), jnp.float32),
        checkpoints.abstract_params(MODEL),
    )


def make(folder):
    """Writes `run`, a checkpoint of a run, and what it is ported to: `hf`, `olmo`, `orbax` (by
    `hf`)."""
    run = config.Config(model=MODEL, data=config.DataConfig(sequence_length=16))
    with checkpoints.Checkpoints(folder / "run", run) as kept:
        kept.save_params(2, random_params())
    for source, name, to in (("run", "hf", "huggingface"), ("run", "olmo", "olmo"),
                             ("hf", "orbax", "orbax")):  # fmt: skip
        port.port(folder / source, folder / name, to=to, announce=quiet)
    return folder
