"""Studies and runs made of numbers, without training: what the tests of verdicts share."""

import dataclasses
import json
import pathlib

import numpy as np

from olmoe_jax import config as config_lib
from olmoe_jax import studies
from olmoe_jax.data import pipeline
from olmoe_jax.studies import scales
from olmoe_jax.training import runs

STEPS, INTERVAL = 40, 4


def outcome(**fields):
    """An Outcome of the arms "new" against "old"."""
    return studies.Outcome(
        **{"arm": "new", "against": "old", "expected": "lower", "paper": "it was"} | fields
    )


def study(**fields):
    """A valid Study of the arms "old" and "new", which differ in nothing."""
    defaults = {
        "name": "made_up",
        "question": "Is new better than old?",
        "arms": (studies.Arm(name="old"), studies.Arm(name="new")),
        "outcomes": (outcome(),),
    }
    return studies.Study(**defaults | fields)


def write_run(path, seed, losses, *, config=None, tokens_per_second=1000.0, load=None, data=None):
    """Writes config.json and metrics.jsonl of a run whose validation losses are `losses`.

    The losses lie INTERVAL steps apart; step 0 comes first. `data`: path of the prepared data that
    it has read, if it is to say so.
    """
    config = scales.BASES["smoke"] if config is None else config
    steps = (len(losses) - 1) * INTERVAL
    training = dataclasses.replace(config.training, seed=seed, num_steps=steps)
    config = dataclasses.replace(config, training=training)
    path = pathlib.Path(path)
    path.mkdir(parents=True)
    identity = {} if data is None else runs.identity(pipeline.open(data))
    content = {"config": dataclasses.asdict(config)} | identity
    (path / "config.json").write_text(json.dumps(content))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            record = {"step": step}
            if step < steps:
                record |= {"train/loss": 5.0 - step / 100, "router/max_load": 1.5,
                           "perf/tokens_per_second": tokens_per_second}  # fmt: skip
            if step % INTERVAL == 0:
                record["validation/loss"] = float(losses[step // INTERVAL])
                if load is not None:
                    record["router/load"] = load
            file.write(json.dumps(record) + "\n")
    return config_lib.from_saved(dataclasses.asdict(config))


def falling(end, points=STEPS // INTERVAL + 1, start=6.0):
    """Losses that fall in equal steps from `start` to `end`."""
    return np.linspace(start, end, points)
