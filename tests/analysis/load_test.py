import collections
import dataclasses
import math

import numpy as np
import pytest

from olmoe_jax.analysis import counting, load, results, trace, words
from tests.analysis import synthetic


def test_health_is_that_of_a_loop():
    source = synthetic.make_trace(experts=16, k=4, tokens=3000)
    ids = source.tokens.expert_ids
    ids[:, 0][ids[:, 0] == 6] = -1  # expert 6 of the first layer is dead
    source.tokens.expert_ids[:, 0] = np.take_along_axis(
        ids[:, 0], np.argsort(ids[:, 0] < 0, axis=-1, kind="stable"), -1
    )
    counts = counting.count(source)
    one = load.load(counts)
    for layer in range(2):
        chosen = source.tokens.expert_ids[:, layer]
        found = collections.Counter(chosen[chosen >= 0].tolist())
        total = sum(found.values())
        assert one.max_violation.value[layer] == pytest.approx(
            max(found.values()) / (total / 16) - 1
        )
        want = -sum(n / total * math.log(n / total) for n in found.values()) / math.log(16)
        assert one.entropy.value[layer] == pytest.approx(want)
        real = chosen >= 0
        weights = source.tokens.weights[:, layer].astype(float)
        sums = [w[r].sum() for w, r in zip(weights, real, strict=True)]
        assert one.confidence.value[layer] == pytest.approx(np.mean(sums), rel=1e-5)
        gaps = [math.log(w[r][0] / w[r][-1]) for w, r in zip(weights, real, strict=True)]
        assert one.logit_spread.value[layer] == pytest.approx(np.mean(gaps), rel=1e-5)
        for name in ("max_violation", "entropy", "confidence", "logit_spread"):
            value = getattr(one, name)[layer]
            assert value.low < value.value < value.high
    assert one.dead == ((6,), ())
    assert one.dead_by_chance == pytest.approx(16 * 0.75**3000)
    assert (
        "1 of 32 experts got no token (layers 1); a balanced router would leave"
        in words.balanced(one)[1]
    )


def test_the_spread_of_the_weights_is_the_gap_of_the_logits():
    rng = np.random.default_rng(0)
    logits = np.sort(rng.normal(0, 2, (500, 2, 9)))[..., ::-1]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    source = synthetic.make_trace(experts=9, k=4, tokens=500)
    block = dataclasses.replace(source.tokens, weights=probs[..., :4].astype(np.float32))
    one = load.load(counting.count(trace.MemoryTrace(source.info, block)))
    np.testing.assert_allclose(
        one.logit_spread.value, (logits[..., 0] - logits[..., 3]).mean(0), rtol=1e-4
    )
    np.testing.assert_allclose(one.confidence.value, probs[..., :4].sum(-1).mean(0), rtol=1e-4)


def test_few_tokens_leave_experts_without_one_by_chance():
    counts = counting.count(synthetic.make_trace(experts=64, k=1, tokens=50, documents=5))
    one = load.load(counts)
    dead = sum(len(ids) for ids in one.dead)
    assert dead == pytest.approx(2 * one.dead_by_chance, rel=0.2)
    assert "so few tokens leave as many" in words.balanced(one)[1]


def test_over_training_is_in_order_of_steps():
    parts = [
        counting.count(synthetic.make_trace(step=step, checkpoint=f"step{step}", seed=step,
                                              weights=step != 9)) for step in (9, 2, 5)
    ]  # fmt: skip
    rows = load.over_training(parts, total_steps=20)
    assert [(one.info.step, share) for one, share in rows] == [(2, 0.1), (5, 0.25), (9, 0.45)]
    written = results.plain(load.to_json(rows))["rows"]
    assert written[2]["layers"]["4"]["confidence"] is None
    assert sum(written[0]["layers"]["1"]["load"]) == pytest.approx(1, rel=1e-4)
    other = counting.count(synthetic.make_trace(experts=8))
    with pytest.raises(ValueError, match="num_experts"):
        load.over_training([*parts, other])
    with pytest.raises(ValueError, match="at least one"):
        load.over_training([])
