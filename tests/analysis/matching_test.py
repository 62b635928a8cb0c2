import dataclasses

import numpy as np
import pytest

from olmoe_jax.analysis import matching, results, trace, words
from tests.analysis import synthetic


def renumbered(source, permutation, noise=0.0, seed=3, **info):
    """The same router with its experts renumbered; a share `noise` of the tokens goes elsewhere."""
    rng = np.random.default_rng(seed)
    ids = np.asarray(permutation, np.int16)[source.tokens.expert_ids]
    other = synthetic.random_ids(rng, len(ids), ids.shape[1], len(permutation), ids.shape[2])
    ids = np.where((rng.random(len(ids)) < noise)[:, None, None], other, ids)
    return trace.MemoryTrace(
        dataclasses.replace(source.info, **{"model": "other"} | info),
        dataclasses.replace(source.tokens, expert_ids=ids),
    )


def test_renumbered_experts_are_found():
    source = synthetic.make_trace(experts=16, k=4, tokens=3000)
    permutation = np.random.default_rng(1).permutation(16)
    result = matching.by_routing(source, renumbered(source, permutation, noise=0.3))
    for row, layer in enumerate(result.layers):
        np.testing.assert_array_equal(layer.match, permutation)
        assert layer.overlap.value > 0.7 > 0.4 > layer.overlap_same_index
        assert layer.moved == pytest.approx((permutation != np.arange(16)).mean())
        assert layer.mean.low < layer.mean.value < layer.mean.high
        ids = source.tokens.expert_ids[:, row], None
        there = renumbered(source, permutation, noise=0.3).tokens.expert_ids[:, row]
        for e in (0, 7):
            a, b = (ids[0] == e).any(-1), (there == permutation[e]).any(-1)
            assert layer.similarity[e] == pytest.approx((a & b).sum() / (a | b).sum())
    assert "are alike by" in words.matched(result)[0]
    written = results.plain(matching.to_json(result))
    assert written["layers"]["4"]["match"] == permutation.tolist()


def test_unrelated_routers_match_as_well_as_chance():
    source = synthetic.make_trace(experts=16, k=4, tokens=3000)
    other = synthetic.make_trace(seed=8, experts=16, k=4, tokens=3000)
    other = trace.MemoryTrace(
        dataclasses.replace(source.info, model="other"),
        dataclasses.replace(source.tokens, expert_ids=other.tokens.expert_ids),
    )
    result = matching.by_routing([source], [other])
    for layer in result.layers:
        assert float(layer.mean.value) == pytest.approx(layer.chance, rel=0.05)
    assert "no better than chance" in words.matched(result)[0]


def test_models_with_other_numbers_of_experts_match_in_part():
    source = synthetic.make_trace(experts=6, k=2, tokens=2000)
    few = source.tokens.expert_ids[:, :, :1] // 2  # experts 2e and 2e + 1 are one of the other's
    other = trace.MemoryTrace(
        dataclasses.replace(source.info, num_experts=3, num_experts_per_token=1),
        dataclasses.replace(source.tokens, expert_ids=few.astype(np.int16), weights=None),
    )
    layer = matching.by_routing(source, other).layers[0]
    assert sorted(layer.match.tolist()) == [-1, -1, -1, 0, 1, 2]
    kept = np.flatnonzero(layer.match >= 0)
    np.testing.assert_array_equal(layer.match[kept], kept // 2)
    assert np.isnan(layer.moved) and layer.overlap_same_index is None


def test_weights_tell_a_later_checkpoint_from_strangers():
    rng = np.random.default_rng(0)
    shapes = {"w_gate": (5, 3, 7), "w_down": (5, 7, 3)}
    one = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(2)]
    order = np.array([3, 0, 4, 1, 2])
    two = [
        {n: (w + 0.2 * rng.normal(size=w.shape))[order] for n, w in layer.items()} for layer in one
    ]
    result = matching.by_weights(iter(one), iter(two), layers=(0, 2), names=("a", "b"))
    for layer, first, second in zip(result.layers, one, two, strict=True):
        np.testing.assert_array_equal(layer.match, np.argsort(order))
        x, y = (np.concatenate([w[n][e].ravel() for n in sorted(w)])
                for w, e in ((first, 3), (second, 0)))  # fmt: skip
        want = x @ y / np.sqrt((x @ x) * (y @ y))
        assert layer.similarity[3] == pytest.approx(want, rel=1e-5)
        assert layer.mean.value > 0.9 and abs(layer.chance) < 0.3
    assert "have the same weights" in words.matched(result)[0]
    with pytest.raises(ValueError, match="w_gate: an expert has 21 numbers"):
        matching.cosines(one[0], one[0] | {"w_gate": np.zeros((5, 3, 8))})
    with pytest.raises(ValueError, match="expected the same names"):
        matching.cosines(one[0], {"w_gate": one[0]["w_gate"]})


def test_copies_diverge():
    rng = np.random.default_rng(0)
    weights = np.repeat(rng.normal(size=(1, 4, 6)), 3, axis=0)
    start, later = ({"w": weights}, {"w": weights + 0.5 * rng.normal(size=weights.shape)})
    fresh, grown = matching.siblings([start, later], layers=(0, 1))
    assert fresh.mean == pytest.approx(1) and 0.4 < grown.mean < grown.closest < 0.95
    assert "still copies" in words.diverged((fresh,))[0]
    assert "in layer 1 to 1 in layer 0; copies start at 1" in words.diverged((fresh, grown))[0]
    written = results.plain(matching.siblings_to_json([("step2", (fresh, grown))]))
    (only,) = written["checkpoints"]
    assert only["name"] == "step2"
    assert only["layers"]["1"]["closest"] == pytest.approx(grown.closest, rel=1e-5)
    with pytest.raises(ValueError, match="one expert"):
        matching.siblings([{"w": weights[:1]}], layers=(0,))


def test_other_text_is_refused():
    source = synthetic.make_trace()
    other = synthetic.make_trace(data="else")
    with pytest.raises(ValueError, match="record both on the same text"):
        matching.by_routing(source, other)
    deeper = synthetic.make_trace(layers=(0, 1, 2))
    with pytest.raises(ValueError, match="2 MoE layers, .* 3"):
        matching.by_routing(source, deeper)
