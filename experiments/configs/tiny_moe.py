"""The shape of OLMoE's routing (64 experts, top-8) in a model that trains in seconds, for any data.

Command: `python -m experiments.train --config=experiments/configs/tiny_moe.py --workdir=runs/tiny
  --config.data.path=DIR --config.data.sequence_length=N`, DIR and N those of `prepare_data`.
  The vocabulary is that of the OLMoE tokenizer, so any smaller one fits as well.
Hardware: a laptop's CPU.
"""

from olmoe_jax import config


def get_config():
    return config.to_flags(
        config.Config(
            model=config.ModelConfig(
                vocab_size=50280,
                vocab_multiple=128,
                num_layers=2,
                d_model=64,
                num_heads=4,
                num_kv_heads=4,
                d_ff=32,
                num_experts=64,
                num_experts_per_token=8,
            ),
            data=config.DataConfig(sequence_length=128),
            optimizer=config.OptimizerConfig(learning_rate=2e-3, warmup_tokens=5 * 8 * 128),
            training=config.TrainingConfig(num_steps=50, batch_size=8),
            checkpoint=config.CheckpointConfig(interval=10),
        )
    )
