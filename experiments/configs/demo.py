"""What `make demo` trains: a small OLMoE on text that every installation has.

Command: `make demo`, or `python -m experiments.train --config=experiments/configs/demo.py
  --workdir=runs/demo`; half as long with `--config.training.num_steps=350`.
Hardware: two CPU cores; 4 minutes and 2.1 GB with the corpus, validation and picture.
Result: 2.15 validation bits per byte (a unigram model: 2.98).
"""

from olmoe_jax import config

BATCH, LENGTH = 8, 256


def get_config():
    return config.to_flags(
        config.Config(
            model=config.ModelConfig(
                vocab_size=4096,
                max_length=LENGTH,
                num_layers=4,
                d_model=128,
                num_heads=2,
                num_kv_heads=2,
                d_ff=128,
                num_experts=16,
                num_experts_per_token=2,
            ),
            data=config.DataConfig(path="embedded", sequence_length=LENGTH),
            losses=config.LossesConfig(load_balancing_weight=0.05),  # 0.01: some near dead
            optimizer=config.OptimizerConfig(learning_rate=2e-3, warmup_tokens=40 * BATCH * LENGTH),
            training=config.TrainingConfig(num_steps=700, batch_size=BATCH),
            checkpoint=config.CheckpointConfig(interval=70),
        )
    )
