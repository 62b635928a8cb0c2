import collections
import itertools

import numpy as np
import pytest

from olmoe_jax.analysis import coactivation, counting, results, words
from tests.analysis import synthetic


def slow_coactivation(ids, experts, definition):
    """Coact of one layer, pair by pair."""
    pairs, single = collections.Counter(), collections.Counter()
    for row in ids.tolist():
        row = [e for e in row if e >= 0]
        single.update(row)
        if definition == "paper":
            pairs.update(itertools.permutations(row, 2))
        else:
            for a, b in zip(row, row[1:], strict=False):
                pairs[a, b] += 1
                pairs[b, a] += 1
    return [
        [pairs[a, b] / single[a] if single[a] and a != b else np.nan for b in range(experts)]
        for a in range(experts)
    ]


@pytest.mark.parametrize("definition", ["paper", "adjacent"])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_coactivation_is_that_of_a_loop(definition, missing):
    source = synthetic.make_trace(k=4, missing=missing)
    result = coactivation.coactivation(counting.count(source), definition=definition)
    for row, layer in enumerate(result.layers):
        want = slow_coactivation(source.tokens.expert_ids[:, row], 7, definition)
        np.testing.assert_allclose(layer.matrix.value, want)


def test_the_two_definitions_differ_and_random_sets_reach_their_chance_level():
    source = synthetic.make_trace(experts=16, k=4, tokens=20000)
    counts = counting.count(source, vocabulary=False)
    for definition, chance in (("paper", 3 / 15), ("adjacent", 2 / 4 * 3 / 15)):
        result = coactivation.coactivation(counts, definition=definition)
        assert result.chance == pytest.approx(chance)
        assert np.nanmean(result.layers[0].matrix.value) == pytest.approx(chance, rel=0.01)
        assert np.nanmean(result.layers[0].lift) == pytest.approx(1, rel=0.01)
        assert all(layer.groups == () for layer in result.layers)
        assert "No two experts" in words.together(result)[0]


def test_a_planted_group_is_found_and_named():
    source = synthetic.make_trace(experts=16, k=4, tokens=4000)
    ids = source.tokens.expert_ids
    rows = np.flatnonzero((ids[:, 1] == 9).any(-1))
    for t in rows:
        rest = [e for e in ids[t, 1] if e not in (2, 9, 13)]
        ids[t, 1] = [9, 13, 2, rest[0]]
    counts = counting.count(source)
    result = coactivation.coactivation(counts)
    group = result.layers[1].groups[0]
    assert set(group.experts) == {2, 9, 13}
    matrix = slow_coactivation(ids[:, 1], 16, "paper")
    want = min(matrix[a][b] for a, b in itertools.permutations((2, 9, 13), 2))
    assert group.weakest == pytest.approx(want)
    assert "of layer 4 are the tightest group" in words.together(result)[0]
    assert set(result.layers[1].order[:3]) == {2, 9, 13} and len(result.layers[1].order) == 16
    written = results.plain(coactivation.to_json(result, most=5))["layers"]["4"]
    assert set(written["pairs"][0]["experts"]) <= {2, 9, 13} and len(written["pairs"]) == 5
    assert written["matrix"][3][3] is None
    top = written["pairs"][3]["value"]
    assert top["low"] <= top["value"] <= top["high"]


def test_what_has_no_pairs_is_refused():
    counts = counting.count(synthetic.make_trace(k=1))
    with pytest.raises(ValueError, match="to one expert"):
        coactivation.coactivation(counts)
    with pytest.raises(ValueError, match="'all': expected one of paper, adjacent"):
        coactivation.coactivation(counts, definition="all")
