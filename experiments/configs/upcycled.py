"""Whatever `experiments.upcycle` wrote to a directory: its model, its place in the data.

Command: `python -m experiments.train --config=experiments/configs/upcycled.py:DIR --workdir=RUN
  --config.training.num_steps=N`, DIR the --output of `experiments.upcycle`.
Hardware: what the dense run had; experts take N / k times the memory of the dense FFN they copy.

All else is the dense run's config: schedule, batch size, seed. The learning rate counts its tokens
from this run's first step. A dense model from elsewhere has no run: then name the data, and set
what the defaults do not fit.
"""

from olmoe_jax import config
from olmoe_jax.upcycling import upcycle


def get_config(directory=None):
    if not directory:
        raise ValueError(
            "name the directory that experiments.upcycle wrote: "
            "--config=experiments/configs/upcycled.py:DIR"
        )
    return config.to_flags(upcycle.read_config(directory))
