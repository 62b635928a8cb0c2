import json

import jax
import pytest

from experiments import app
from olmoe_jax import accounting
from olmoe_jax.benchmarking import layers, work
from olmoe_jax.benchmarking import options as options_lib

TINY = {
    "vocab_size": 31, "max_length": 11, "d_model": 12, "num_heads": 2, "num_kv_heads": 2, "d_ff": 5,
    "num_experts": 3, "num_experts_per_token": 2,
}  # fmt: skip


@pytest.mark.slow
def test_the_suite(monkeypatch, capsys):
    monkeypatch.setattr(layers, "FEW", 1)
    monkeypatch.setattr(layers, "MANY", 3)
    make = work.config
    monkeypatch.setattr(work, "config", lambda **options: make(**options | TINY))
    cleared, cached, lower, clear = [], [], work.lower, jax.clear_caches

    def recorded(config):
        cached.append(jax.config.jax_enable_compilation_cache)
        return lower(config)

    monkeypatch.setattr(work, "lower", recorded)
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(clear()))
    result, is_right = layers.run(options_lib.Options(rounds=1, expert_backend="dense"))
    assert is_right
    rounds = 1 + result["rounds_discarded"]
    assert len(cleared) == 2 * rounds and cached == [False] * (1 + 2 * rounds)
    rows = result["contestants"]
    for count in (1, 3):
        row = rows[f"{count} layers"]
        total = row["trace_seconds"].median + row["compile_seconds"].median
        assert row["seconds"].median == pytest.approx(total)
        config = work.config(dtype="float32", num_layers=count, expert_backend="dense")
        assert row["needed"] == accounting.step_bytes(config)
        # Of the state only step and batch have no place in the accounting.
        state = row["needed"].parameters + row["needed"].moments
        assert 0 < row["memory"]["arguments"] - state < 2000
        assert 0 < row["memory"]["results"] < 2000  # metrics: the state is updated in place
        ratio = sum(row["memory"].values()) / row["needed"].total
        assert result[f"ratio_memory_{count}_layers"] == ratio
    assert result["ratio_memory"] == max(
        result["ratio_memory_1_layers"], result["ratio_memory_3_layers"]
    )
    seconds = {count: rows[f"{count} layers"]["seconds"].median for count in (1, 3)}
    assert result["ratio_compile_3_to_1"] == pytest.approx(seconds[3] / seconds[1])
    assert jax.config.jax_enable_compilation_cache  # as before
    assert json.dumps(result, default=app._plain, allow_nan=False)
    assert "3 layers compile in" in capsys.readouterr().out
