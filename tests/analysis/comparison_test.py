import numpy as np
import pytest

from olmoe_jax.analysis import (
    comparison,
    counting,
    domains,
    load,
    resampling,
    results,
    saturation,
    vocabulary,
)
from olmoe_jax.analysis import counts as counts_lib
from tests.analysis import synthetic


def model(name, *, layers, experts, planted=0.0):
    parts = []
    for seed, domain in enumerate(("books", "code")):
        ids = synthetic.random_ids(np.random.default_rng(seed), 1500, len(layers), experts, 2)
        if domain == "code":
            ids = synthetic.plant(ids, 0, 1, planted)
        source = synthetic.make_trace(
            seed=seed, layers=layers, experts=experts, ids=ids, model=name, domain=domain
        )
        parts.append(counting.count(source))
    pooled = counts_lib.pool(parts)
    return comparison.curves(
        domains=domains.specialisation(parts), load=load.load(pooled), layers=layers,
        vocabulary=vocabulary.vocabulary(pooled), num_layers=5,
    )  # fmt: skip


def test_two_models_stand_on_one_axis():
    one = model("one", layers=(0, 2, 4), experts=8)
    two = model("two", layers=(0, 1, 2, 3, 4), experts=16, planted=0.9)
    written = results.plain(comparison.to_json({"one": one, "two": two}))
    assert written["models"] == ["one", "two"]
    assert set(written["metrics"]) == set(comparison.UNITS) - {"saturation"}
    metric = written["metrics"]["information"]
    assert metric["models"]["two"]["depth"] == [0, 0.25, 0.5, 0.75, 1]
    gap = metric["differences"]["two − one"]
    assert gap["depth"] == [0, 0.5, 1] and gap["low"][0] > 0.05 > gap["high"][1]
    want = metric["models"]["two"]["value"][2] - metric["models"]["one"]["value"][1]
    assert gap["value"][1] == pytest.approx(want, abs=1e-5)


def test_a_difference_is_interpolated_where_both_reach():
    few = comparison.Curve(
        depth=np.array([0.1, 0.5, 1]), value=resampling.Estimate(np.array([1.0, 2.0, 3.0]))
    )
    many = comparison.Curve(
        depth=np.array([0.25, 0.75, 1]), value=resampling.Estimate(np.array([10.0, 20.0, 40.0]))
    )
    gap = comparison.difference(few, many)
    np.testing.assert_allclose(gap.depth, [0.5, 1])
    np.testing.assert_allclose(gap.value.value, [13, 37])
    assert gap.value.low is None


def test_saturation_and_depth():
    np.testing.assert_allclose(comparison.depths((0, 7, 15), 32), [0, 7 / 31, 15 / 31])
    with pytest.raises(ValueError, match="layer 7 in a model of 4 layers"):
        comparison.depths((0, 7), 4)
    checkpoints = [[synthetic.make_trace(step=s, checkpoint=f"step{s}")] for s in (1, 2)]
    found = comparison.curves(saturation=saturation.over_training(checkpoints))
    np.testing.assert_allclose(found["saturation"].value.value, 1)
    with pytest.raises(ValueError, match="two models, got one"):
        comparison.to_json({"one": found})
