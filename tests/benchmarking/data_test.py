"""The suite `data`, at sizes that take a second."""

import contextlib
import json
import pathlib
import time

import numpy as np
import pytest

from experiments import app
from olmoe_jax.benchmarking import data as data_suite
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.data import pipeline

TINY = {
    "vocab_size": 97, "max_length": 11, "num_layers": 1, "d_model": 10, "num_heads": 1,
    "num_kv_heads": 1, "d_ff": 7, "num_experts": 5, "num_experts_per_token": 2,
}  # fmt: skip


class Windows:
    """Stands for PreparedData: 29 windows of 11 tokens, each its own number."""

    path = pathlib.Path("windows")

    def num_windows(self, split):
        assert split == "train"
        return 29

    def read_windows(self, split, indices):
        tokens = np.repeat(np.array(indices, np.int32)[:, None], 11, axis=1)
        return {"tokens": tokens, "documents": tokens + 1, "domains": tokens.astype(np.uint8)}


class Trainer:
    """Stands for work.Trainer, which takes seconds to compile; a step takes 10 ms."""

    state = None

    def __init__(self, config):
        self._shape = (config.training.batch_size, config.model.max_length)

    def step(self, batch):
        assert batch["tokens"].shape == self._shape
        time.sleep(0.01)


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(data_suite.work, "Trainer", Trainer)
    monkeypatch.setattr(data_suite, "CONSUMERS", {"work_a": TINY, "demo": TINY | {"d_ff": 3}})
    monkeypatch.setattr(data_suite, "_prepared", lambda folder, length, tokenizer: Windows())
    monkeypatch.setattr(data_suite, "SECONDS", 0.02)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)  # tests may run beside anything
    return data_suite


def test_pipelines_are_compared_with_the_steps_that_they_feed(suite, tmp_path, capsys):
    options = options_lib.Options(
        expert_backend="dense", rounds=2, scratch=str(tmp_path / "scratch")
    )
    result, is_right = suite.run(options)
    assert is_right and not list((tmp_path / "scratch").iterdir())
    rows = result["contestants"]
    assert len(rows) == 6
    seconds = rows["demo, pipeline, filtered"]["seconds"]
    assert rows["demo, pipeline, filtered"]["tokens_per_second"] == 4 * 11 / seconds.median
    wanted = {"ratio_work_a", "ratio_work_a_filtered", "ratio_demo", "ratio_demo_filtered"}
    assert {key for key in result if key.startswith("ratio_")} == wanted
    assert 0.01 <= rows["work_a, step"]["seconds"].low < 0.02
    speed = result["speeds"]["demo"]
    step, read = (rows[f"demo, {kind}"]["seconds"] for kind in ("step", "pipeline"))
    assert step.low / read.high <= speed.low <= speed.high <= step.high / read.low
    json.dumps(result, default=app._plain)
    assert "demo model, pipeline, filtered" in capsys.readouterr().out


def test_only_what_is_read_in_the_sample_counts(monkeypatch):
    class Slow(pipeline.Batches):
        def batch(self, step):
            time.sleep(0.01)  # each, on two threads
            return super().batch(step)

    reader = data_suite.Reader(Slow(Windows(), batch_size=3, seed=1), 0.2)
    with contextlib.closing(reader):
        reader._next()
        time.sleep(0.1)  # READ_AHEAD batches are ready now, and would look fast
        assert 0.0045 < reader.sample().seconds < 0.05
        assert reader.in_order()


def test_another_batch_than_the_step_s_is_noticed(suite, tmp_path, monkeypatch, capsys):
    iterate = pipeline.Batches.iterate
    monkeypatch.setattr(pipeline.Batches, "iterate", lambda self, first: iterate(self, first + 1))
    result, is_right = suite.run(options_lib.Options(rounds=1, scratch=str(tmp_path)))
    assert not is_right and not result["batches_in_order"]
    assert "WRONG: a batch" in capsys.readouterr().out
