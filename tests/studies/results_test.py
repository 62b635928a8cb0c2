import json

import numpy as np
import pytest

from olmoe_jax.studies import results
from tests.studies import synthetic


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "seed_3"
    synthetic.write_run(path, 3, [6.0, 5.0, 4.5], load=[[0.5, 0.3, 0.2]])
    return results.read_run(path, "new", 3)


def test_curves_lie_at_the_tokens_trained_on_before(run):
    curve = run.curve("validation/loss")
    assert curve.tokens.tolist() == [step * run.config.tokens_per_step for step in (0, 4, 8)]
    assert curve.values.tolist() == [6.0, 5.0, 4.5]
    assert len(run.curve("train/loss").tokens) == 8  # the last record holds no step


def test_final_is_the_last_validation_and_the_mean_of_the_last_steps(run):
    assert run.final("validation/loss") == 4.5
    long = np.arange(100.0)
    run.curves["train/loss"] = results.Curve(tokens=long, values=long)
    assert run.final("train/loss") == np.mean([95, 96, 97, 98, 99])


def test_a_metric_that_was_not_recorded_is_named_with_the_nearest(run):
    with pytest.raises(ValueError, match="no metric 'validation/a/loss' .*'validation/loss'"):
        run.curve("validation/a/loss")


def test_speed_routing_and_how_it_ended_are_read(run):
    assert run.tokens_per_second == 1000 and run.problem is None
    np.testing.assert_array_equal(run.load, [[0.5, 0.3, 0.2]])
    (run.path / results.DIVERGED).write_text(json.dumps({"problem": "step 2: loss nan"}))
    assert results.read_run(run.path, "new", 3).problem == "step 2: loss nan"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        results.read_run(tmp_path, "new", 1)
    assert results.read_documents(tmp_path) is None
