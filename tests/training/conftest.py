"""A small prepared corpus of two domains, and configs of runs on it that take seconds."""

import numpy as np
import pytest

from olmoe_jax import config
from olmoe_jax.data import preparation

LENGTH = 16


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Path of prepared data: random sentences of two vocabularies, windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for domain, letters in (("vowels", "aeiou"), ("consonants", "bcdfghkl")):
        with (folder / f"{domain}.jsonl").open("w") as file:
            for number in range(60):
                words = ["".join(rng.choice(list(letters), rng.integers(1, 5))) for _ in range(40)]
                text = " ".join(words)
                file.write(
                    f'{{"id": "{domain}-{number}", "text": "{text}", "source": "{domain}"}}\n'
                )
    out = tmp_path_factory.mktemp("prepared") / "data"
    preparation.prepare(
        [str(folder / "*.jsonl")], out, sequence_length=LENGTH, vocab_size=280,
        validation_fraction=0.1, announce=lambda line: None,
    )  # fmt: skip
    return out


@pytest.fixture
def make_run(prepared):
    """Config of a tiny run on `prepared`; sections as keywords: training=dict(num_steps=3)."""

    def make(**sections):
        defaults = {
            "model": dict(
                vocab_size=280, max_length=LENGTH, num_layers=2, d_model=16, num_heads=2,
                num_kv_heads=2, d_ff=8, num_experts=5, num_experts_per_token=2,
            ),
            "data": dict(path=str(prepared), sequence_length=LENGTH, validation_windows=11),
            "losses": {},
            "optimizer": dict(learning_rate=3e-3, decay_tokens=10**5),
            "training": dict(num_steps=12, batch_size=8),
            "checkpoint": dict(interval=3),
            "mesh": {},
        }  # fmt: skip
        kinds = {
            "model": config.ModelConfig, "data": config.DataConfig, "losses": config.LossesConfig,
            "optimizer": config.OptimizerConfig, "training": config.TrainingConfig,
            "checkpoint": config.CheckpointConfig, "mesh": config.MeshConfig,
        }  # fmt: skip
        merged = {name: {**fields, **sections.get(name, {})} for name, fields in defaults.items()}
        return config.Config(**{name: kinds[name](**fields) for name, fields in merged.items()})

    return make
