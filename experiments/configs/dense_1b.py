"""The dense 1.3 B control of OLMoE's paper: the cost per token of OLMoE-1B-7B, without experts.

Command: `python -m experiments.train --config=experiments/configs/dense_1b.py --workdir=DIR
  --config.data.path=DATA --config.data.tokenizer=FILE`.
Hardware: the reference ran at 37,500 tokens/s on each of 128 H100, 7.5 hours for its 130 B tokens.
Result of the reference: training loss 2.565, C4 validation loss 2.861, HellaSwag 56.2 %.

As its file has it: no QK-norm, no weight decay of the embeddings, no mask of repetitive windows.
"""

from olmoe_jax import config, presets


def get_config():
    return config.to_flags(
        config.Config(
            model=presets.get("dense-1b", dtype="bfloat16", remat=True),
            data=config.DataConfig(sequence_length=4096),
            losses=config.LossesConfig(
                load_balancing_weight=0.0, router_z_weight=0.0, count_masked=True
            ),
            optimizer=config.OptimizerConfig(
                learning_rate=4e-4,
                warmup_tokens=8_388_608_000,
                decay_tokens=130_000_000_000,
                decay_embeddings=False,
            ),
            training=config.TrainingConfig(num_steps=30_993, seed=6198, batch_size=1024),
            checkpoint=config.CheckpointConfig(interval=5000, dtype="bfloat16"),
            mesh=config.MeshConfig(data=1, fsdp=-1),
        )
    )
