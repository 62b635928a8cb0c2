"""The last 100 B tokens of OLMoE-1B-7B-0924: learning rate from 4e-5 linearly to 0.

Command: `python -m experiments.train --config=experiments/configs/olmoe_1b_7b_anneal.py
  --workdir=DIR --config.training.initial_checkpoint=RUN/resume/step1200000-tokens5033B
  --config.data.path=DATA`, RUN the workdir of `olmoe_1b_7b.py`, DATA the same data.
Hardware: 2 % of the main run's time.

Weights and optimizer moments go on; step, data order and schedule begin anew, so seed 42 is a fresh
shuffle of the same mix. (The paper's appendix says "from 5.0E-04"; its table and the code: 4e-5.)
"""

import dataclasses

from experiments.configs import olmoe_1b_7b
from olmoe_jax import config

NUM_STEPS = 23_842


def get_config():
    main = config.from_flags(config.Config, olmoe_1b_7b.get_config())
    return config.to_flags(
        dataclasses.replace(
            main,
            optimizer=dataclasses.replace(
                main.optimizer,
                schedule="linear",
                learning_rate=4e-5,
                final_fraction=0.0,
                warmup_tokens=0,
                decay_tokens=NUM_STEPS * main.tokens_per_step,
            ),
            training=dataclasses.replace(
                main.training,
                num_steps=NUM_STEPS,
                seed=42,
                initial_checkpoint="runs/olmoe_1b_7b/resume/step1200000-tokens5033B",
                initial_optimizer_state=True,
            ),
            checkpoint=dataclasses.replace(main.checkpoint, full_state_at=()),
        )
    )
