import collections

import numpy as np
import pytest

from olmoe_jax.analysis import counting, results, vocabulary, words
from tests.analysis import synthetic


def slow_scores(source, kind, rank, layer, min_count):
    """(layer mean, expert → mean, expert → {token: share}) by lists, as the definition reads."""
    tokens = getattr(source.tokens, f"{kind}_ids").tolist()
    routed, often = collections.defaultdict(list), collections.Counter(t for t in tokens if t >= 0)
    for token, ids in zip(tokens, source.tokens.expert_ids[:, layer].tolist(), strict=True):
        if token >= 0:
            chosen = ids if rank == "topk" else ids[:1]
            routed[token] += [e for e in chosen if e >= 0]
    shares, own, table = [], collections.defaultdict(list), collections.defaultdict(dict)
    for token, experts in routed.items():
        if often[token] < min_count or not experts:
            continue
        counted = collections.Counter(experts)
        best = min(counted, key=lambda e: (-counted[e], e))
        shares.append(counted[best] / often[token])
        own[best].append(shares[-1])
        for expert, n in counted.items():
            table[expert][token] = n / often[token]
    return np.mean(shares), {e: np.mean(s) for e, s in own.items()}, table


@pytest.mark.parametrize("missing, min_count", [(0.0, 10), (0.2, 1), (0.0, 1)])
def test_specialisation_is_that_of_a_loop(missing, min_count):
    source = synthetic.make_trace(missing=missing, vocab=61)
    counts = counting.count(source, size=100)
    found = vocabulary.vocabulary(counts, min_count=min_count)
    assert len(found) == 6
    for (kind, rank), one in found.items():
        for layer in range(2):
            mean, own, table = slow_scores(source, kind, rank, layer, min_count)
            assert one.mean.value[layer] == pytest.approx(mean)
            got = {e: m for e, m in enumerate(one.experts[layer]) if not np.isnan(m)}
            assert got == pytest.approx(own)
            listed = vocabulary.expert_tokens(
                counts, kind, rank, layer, min_count=min_count, most=99, decode=str
            )
            assert {e: {w.id: w.share for w in ws} for e, ws in listed.items()} == {
                e: pytest.approx(t) for e, t in table.items()
            }
            for ws in listed.values():
                assert [w.share for w in ws] == sorted((w.share for w in ws), reverse=True)
                assert all(w.text == str(w.id) for w in ws)
    assert found["input", "top1"].mean.low is not None


def test_a_router_that_ignores_tokens_reaches_the_random_level():
    source = synthetic.make_trace(tokens=30000, experts=16, k=4, vocab=400, documents=300)
    found = vocabulary.vocabulary(counting.count(source), min_count=10)
    for (_, rank), one in found.items():
        near = 0.01 if rank == "top1" else 0.02
        np.testing.assert_allclose(one.mean.value, one.random, atol=near)
    counts = counting.count(source)
    said = words.worded(counts, found)
    assert len(said) == 3 and all("no better than chance" in sentence for sentence in said)


def test_tokens_seen_once_inflate_the_released_scripts_number():
    source = synthetic.make_trace(tokens=3000, experts=16, k=4, vocab=5000, documents=50)
    counts = counting.count(source)
    loose = vocabulary.vocabulary(counts, min_count=1)["predicted", "top1"]
    assert loose.mean.value.min() > 0.8 and loose.random.min() > 0.8


def test_a_planted_token_specialist_is_found():
    source = synthetic.make_trace(tokens=8000, experts=16, k=4, documents=60)
    ids = source.tokens.expert_ids
    here = source.tokens.input_ids == 3
    ids[here, 1] = [11, 0, 1, 2]
    counts = counting.count(source)
    table = vocabulary.expert_tokens(counts, "input", "top1", 1)
    assert (table[11][0].id, table[11][0].share) == (3, 1.0)
    assert table[11][0].count == here.sum()
    said = words.worded(counts, vocabulary.vocabulary(counts))
    assert "expert is 11 of layer 4: it takes 100.0 % of the input token number 3" in " ".join(said)
    said = words.worded(counts, vocabulary.vocabulary(counts), decode=lambda token: "\n" * token)
    assert r"the input token '\n\n\n'" in " ".join(said)
    said = words.worded(counts, vocabulary.vocabulary(counts), decode=lambda token: " " * token)
    assert "the input token '   '" in " ".join(said)
    written = results.plain(vocabulary.tokens_to_json(counts, most=2))
    assert written["4"]["input"]["top1"]["11"][0]["id"] == 3
    found = vocabulary.vocabulary(counts)
    form = results.plain(vocabulary.to_json(counts, found))["kinds"]["input"]["top1"]
    want = found["input", "top1"]
    assert form["layers"]["4"]["experts"][11] == pytest.approx(want.experts[1, 11], rel=1e-5)
    assert form["layers"]["4"]["num_ids"] == want.favoured[1].tolist()


def test_what_has_no_tokens_is_refused():
    source = synthetic.make_trace()
    with pytest.raises(ValueError, match="not in this source"):
        vocabulary.vocabulary(counting.count(source, vocabulary=False))
    with pytest.raises(ValueError, match="no token occurs 9999 times"):
        vocabulary.vocabulary(counting.count(source), min_count=9999)
    with pytest.raises(ValueError, match="min_count is 0"):
        vocabulary.vocabulary(counting.count(source), min_count=0)
