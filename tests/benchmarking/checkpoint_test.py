"""The suite `checkpoint`, with a trainer whose steps are cheap."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import app
from olmoe_jax import checkpoints
from olmoe_jax.benchmarking import checkpoint as checkpoint_suite
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import work
from olmoe_jax.checkpoints import manifest

TINY = {
    "vocab_size": 97, "max_length": 11, "num_layers": 2, "d_model": 10, "num_heads": 1,
    "num_kv_heads": 1, "d_ff": 7, "num_experts": 5, "num_experts_per_token": 2,
}  # fmt: skip
BYTES = 4 * (2 * 97 * 10 + 10 + 2 * (4 * 10 * 10 + 4 * 10 + 10 * 5 + 5 * 3 * 10 * 7))


class Trainer:
    """Stands for work.Trainer, which takes seconds to compile; a step doubles and donates."""

    def __init__(self, config):
        shapes = checkpoints.abstract_params(config.model)
        rng = np.random.default_rng(3)
        params = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), shapes)
        self.state = {"params": params, "moments": jax.tree.map(jnp.copy, params)}
        self._double = jax.jit(lambda state: jax.tree.map(lambda x: 2 * x, state), donate_argnums=0)

    def step(self, batch):
        del batch
        self.state = self._double(self.state)


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(work, "Trainer", Trainer)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)  # tests may run beside anything
    config = work.config(**TINY)
    monkeypatch.setattr(work, "config", lambda **changes: config)
    return checkpoint_suite


def test_saves_are_measured_and_come_back(suite, tmp_path, capsys):
    scratch = tmp_path / "scratch"
    result, is_right = suite.run(options_lib.Options(rounds=2, scratch=str(scratch)))
    assert is_right and not list(scratch.iterdir())
    assert result["parameter_bytes"] == BYTES
    rows = result["contestants"]
    saving, both = rows[suite.PARAMS], rows[suite.STATE]
    # Compressed, but with config.json, manifest and Orbax's own files.
    assert 0.5 * BYTES < saving["bytes"].median < BYTES + 50_000
    assert both["bytes"].median > saving["bytes"].median + 1.5 * BYTES
    assert (
        0 < saving["blocked_seconds"].low and saving["seconds"].low > saving["waited_seconds"].low
    )
    assert rows[suite.HASHING]["gb_per_second"] > 0 and rows[suite.WRITING]["gb_per_second"] > 0
    json.dumps(result, default=app._plain)
    assert "came back verified and bit for bit" in capsys.readouterr().out


def test_shares_are_of_the_step_time_of_an_interval():
    def samples(*seconds):
        return tuple(rounds_lib.Sample(x, {}) for x in seconds)

    suite = checkpoint_suite
    found = rounds_lib.Rounds(
        {
            suite.PLAIN: samples(2.0, 4.0, 6.0),  # of STEPS steps
            suite.PARAMS: samples(2.5, 4.5, 6.0),
            suite.STATE: samples(4.0, 4.0, 6.0),
            suite.HASHING: samples(2.0, 2.0, 2.0),
        },
        (0.0, 0.0, 0.0), 0, 0,
    )  # fmt: skip
    result = suite._figures(found, 8_000_000_000)
    # Half a second more, once in ten steps of a second each; then of two seconds each; then none.
    shares = result["contestants"][suite.PARAMS]["share_of_step_time"]
    assert (shares.high, shares.median, shares.low) == pytest.approx((0.05, 0.025, 0))
    assert result["ratio_share_of_step_time"] == shares.median
    assert result["ratio_share_of_step_time_with_state"] == 0
    assert result["seconds_per_step"] == 2.0
    assert result["contestants"][suite.HASHING]["gb_per_second"] == 4.0


@pytest.mark.parametrize("damage", ["other numbers", "damaged bytes"])
def test_a_save_that_does_not_come_back_fails_the_run(damage, suite, tmp_path, monkeypatch, capsys):
    if damage == "damaged bytes":
        monkeypatch.setattr(manifest, "digest", lambda array: str(np.asarray(array).ravel()[0]))
        write = manifest._write

        def other(path, args):
            args.pieces[0] = (*args.pieces[0][:2], args.pieces[0][2] + 1)
            write(path, args)

        monkeypatch.setattr(manifest, "_write", other)
    else:
        save = checkpoints.Checkpoints.save_params
        monkeypatch.setattr(
            checkpoints.Checkpoints, "save_params",
            lambda self, step, params: save(self, step, jax.tree.map(lambda x: x + 1, params)),
        )  # fmt: skip
    result, is_right = suite.run(options_lib.Options(rounds=1, scratch=str(tmp_path)))
    assert not is_right and not result["came_back"]
    assert "WRONG: a save did not come back" in capsys.readouterr().out


def test_a_disk_too_small_is_said_before_anything_is_written(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_suite.machine, "free_disk", lambda path: 100)
    scratch = pathlib.Path(tmp_path / "scratch")
    with pytest.raises(OSError, match="GB are needed .* name another --scratch"):
        suite.run(options_lib.Options(scratch=str(scratch)))
    assert not scratch.exists()
