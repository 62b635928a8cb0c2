"""The three scales at which a study runs, as the base config that its arms change.

All have OLMoE's proportions: 64 experts, 8 of them per token, and their widths together those of
the dense FFN (smoke: 16 and 4). A study may bring bases of its own.
"""

from olmoe_jax import config, presets

_SMOKE_BATCH, _SMOKE_LENGTH = 8, 32
_LAPTOP_BATCH, _LAPTOP_LENGTH = 8, 256

# Seconds per run: for tests, and to see that a declaration works.
_SMOKE = config.Config(
    model=config.ModelConfig(
        vocab_size=1024, max_length=_SMOKE_LENGTH, num_layers=2, d_model=16, num_heads=2,
        num_kv_heads=2, d_ff=8, num_experts=16, num_experts_per_token=4,
    ),
    data=config.DataConfig(sequence_length=_SMOKE_LENGTH, validation_windows=32),
    optimizer=config.OptimizerConfig(
        learning_rate=4e-3, warmup_tokens=2 * _SMOKE_BATCH * _SMOKE_LENGTH
    ),
    training=config.TrainingConfig(num_steps=20, batch_size=_SMOKE_BATCH),
    checkpoint=config.CheckpointConfig(interval=4),
)  # fmt: skip

# What a person can wait for: with a process on each of two Xeon cores 2 min 40 s per run (dense, of
# equal cost: 1 min 50 s), 2.9 M tokens, 100 MB. The FFN is most of a layer, as in OLMoE, so that
# experts can matter: with four layers, experts of 16 and 2,048 words, a pilot of moe_vs_dense (two
# seeds) showed no lead, -0.003 nats. The rate is the best one of that study's pilot at this scale.
# Below a bigram model (4.22 nats) from about 300 steps on.
_LAPTOP = config.Config(
    model=config.ModelConfig(
        vocab_size=1024, max_length=_LAPTOP_LENGTH, num_layers=2, d_model=64, num_heads=2,
        num_kv_heads=2, d_ff=32, num_experts=64, num_experts_per_token=8,
    ),
    data=config.DataConfig(sequence_length=_LAPTOP_LENGTH, validation_windows=96),
    optimizer=config.OptimizerConfig(
        learning_rate=4e-3, warmup_tokens=40 * _LAPTOP_BATCH * _LAPTOP_LENGTH
    ),
    training=config.TrainingConfig(num_steps=1400, batch_size=_LAPTOP_BATCH),
    checkpoint=config.CheckpointConfig(interval=70),
)  # fmt: skip

# The controlled runs of the paper (arXiv 2409.02060, "cx5"): 130 B tokens, no QK-norm.
_PAPER = config.Config(
    model=presets.get("olmoe-64x1024-top8", dtype="bfloat16", remat=True),
    data=config.DataConfig(sequence_length=4096, validation_windows=1024),
    losses=config.LossesConfig(
        load_balancing_group=4, router_z_weight=0.001 / 8, count_masked=True
    ),
    optimizer=config.OptimizerConfig(
        learning_rate=4e-4,
        warmup_tokens=8_388_608_000,
        decay_tokens=130_000_000_000,
        decay_embeddings=False,
    ),
    training=config.TrainingConfig(num_steps=30_993, batch_size=1024),
    checkpoint=config.CheckpointConfig(interval=1000, dtype="bfloat16"),
    mesh=config.MeshConfig(data=1, fsdp=-1),
)

BASES = {"smoke": _SMOKE, "laptop": _LAPTOP, "paper": _PAPER}
