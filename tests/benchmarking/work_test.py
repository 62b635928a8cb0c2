"""Work A: its size, its words, its steps."""

import jax
import numpy as np

from olmoe_jax import accounting
from olmoe_jax.benchmarking import work


def tiny(**changes):
    shape = {"vocab_size": 53, "max_length": 13, "num_layers": 2, "d_model": 12, "num_heads": 2,
             "num_kv_heads": 2, "d_ff": 5, "num_experts": 7, "num_experts_per_token": 3,
             "expert_backend": "dense"}  # fmt: skip
    return work.config(**shape | changes)


def test_work_a_has_the_size_that_is_claimed():
    config = work.config()
    assert config.tokens_per_step == 2048
    assert round(accounting.num_params(config.model).total / 1e6, 1) == 156.5
    flops = accounting.flops_per_token(config.model, config.data.sequence_length)
    assert round(flops.training * config.tokens_per_step / 1e9) == 537
    assert config.losses.load_balancing_convention == "huggingface"
    assert config.losses.load_balancing_weight > 0 and config.losses.router_z_weight == 0
    assert work.config(num_layers=3, d_ff=128).model.d_ff == 128


def test_words_follow_zipf_and_come_again():
    config = work.config()
    ids = work.tokens(config, 3)
    assert ids.shape == (3, 4, 512) and ids.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < config.model.vocab_size
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    assert 0.06 < counts[0] / ids.size < 0.11  # 1 / Σ 1/i over 50,304 is 0.088
    assert 1.4 < counts[0] / counts[1] < 2.8
    np.testing.assert_array_equal(ids, work.tokens(config, 3))
    assert (work.tokens(config, 3, seed=1) != ids).any()


def test_the_state_keeps_its_dtype_is_donated_and_begins_again():
    config = tiny(dtype="bfloat16")
    trainer, batch = work.Trainer(config), work.batch(work.tokens(config, 1)[0])
    first = [float(trainer.step(batch)["loss"]) for _ in range(3)]
    floats = [x for x in jax.tree.leaves(trainer.state) if np.issubdtype(x.dtype, np.floating)
              or x.dtype == "bfloat16"]  # fmt: skip
    assert {str(x.dtype) for x in floats} == {"bfloat16"}
    assert first[2] < first[0]
    trainer.restart()
    assert [float(trainer.step(batch)["loss"]) for _ in range(3)] == first
    sizes = trainer.compiled.memory_analysis()
    state = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
    assert sizes.alias_size_in_bytes >= 0.99 * state


def test_a_step_of_a_large_model_is_lowered_without_its_arrays():
    lowered = work.lower(tiny(num_layers=3, d_model=30_000, num_heads=3, num_kv_heads=3))
    assert "30000" in lowered.as_text()
