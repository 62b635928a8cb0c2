"""A small prepared corpus, a study of tiny runs on it, and that study run to its end."""

import json

import jax
import pytest

from olmoe_jax import config, studies
from olmoe_jax.data import preparation
from olmoe_jax.studies import plans, report, runner

LENGTH = 16


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Path of prepared data: sentences of numbers in three domains, windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        {"id": str(i), "text": f"{i} and {i + 1} " * 20, "source": "abc"[i % 3]} for i in range(120)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    preparation.prepare(
        [str(folder / "corpus.jsonl")], folder / "data", sequence_length=LENGTH, vocab_size=270,
        validation_fraction=0.1, announce=lambda line: None,
    )  # fmt: skip
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_base(prepared):
    """Config of runs that take a second or two."""
    return config.Config(
        model=config.ModelConfig(
            vocab_size=270, max_length=LENGTH, num_layers=1, d_model=8, num_heads=2,
            num_kv_heads=2, d_ff=4, num_experts=4, num_experts_per_token=2,
            expert_backend="dense",
        ),
        data=config.DataConfig(path=str(prepared), sequence_length=LENGTH, validation_windows=10),
        optimizer=config.OptimizerConfig(learning_rate=0.02),
        training=config.TrainingConfig(num_steps=12, batch_size=4),
        checkpoint=config.CheckpointConfig(interval=4),
    )  # fmt: skip


@pytest.fixture(scope="session")
def planted(tiny_base):
    """A Study whose arm "worse" learns a hundred times as slowly as "good"."""
    slow = {"optimizer.learning_rate": lambda base: base.optimizer.learning_rate / 100}
    return studies.Study(
        name="planted",
        question="Is a planted worse arm declared worse?",
        base={"smoke": tiny_base},
        arms=(studies.Arm(name="good"), studies.Arm(name="worse", changes=slow)),
        outcomes=(
            studies.Outcome(arm="worse", against="good", expected="higher"),
            studies.Outcome(arm="good", against="worse", measure="tokens", expected="lower"),
        ),
    )


@pytest.fixture(scope="session")
def finished(planted, tmp_path_factory):
    """(plans.Plan, what report.json holds) of `planted`, run and judged."""
    plan = plans.make_plan(planted, tmp_path_factory.mktemp("study") / "planted", scale="smoke")
    quiet = {"announce": lambda line: None}
    runner.make_runs(plan, devices=jax.devices()[:1], **quiet)
    return plan, report.write(plan, notes=["a note"], **quiet)
