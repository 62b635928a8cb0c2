import dataclasses

import numpy as np
import pytest

from olmoe_jax.analysis import results, saturation, trace, words
from tests.analysis import synthetic


def training(kept=(0.0, 0.4, 0.8, 1.0), *, domain="books", **options):
    """Checkpoints of which a share of tokens already has its last choices."""
    last = synthetic.make_trace(experts=16, k=4, tokens=1500, domain=domain, **options)
    out = []
    for number, share in enumerate(kept):
        rng = np.random.default_rng(number + 1)
        ids = synthetic.random_ids(rng, 1500, 2, 16, 4)
        same = rng.random(1500) < share
        ids[same] = last.tokens.expert_ids[same]
        step = 5000 * number
        info = dataclasses.replace(
            last.info, checkpoint=f"step{step}", step=step, train_tokens=step * 10
        )
        out.append(trace.MemoryTrace(info, dataclasses.replace(last.tokens, expert_ids=ids)))
    return out


def slow_saturation(one, two):
    """(top-k, top-1) [layers], set by set."""
    layers = range(one.expert_ids.shape[1])
    topk, top1 = [], []
    for layer in layers:
        sets = [
            (set(a.tolist()) - {-1}, set(b.tolist()) - {-1})
            for a, b in zip(one.expert_ids[:, layer], two.expert_ids[:, layer], strict=True)
        ]
        topk.append(sum(len(a & b) for a, b in sets) / sum(len(b) for _, b in sets))
        firsts = one.expert_ids[:, layer, 0], two.expert_ids[:, layer, 0]
        top1.append(np.mean([a == b for a, b in zip(*firsts, strict=True) if b >= 0]))
    return topk, top1


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_saturation_is_that_of_a_loop(missing):
    one = synthetic.make_trace(seed=1, missing=missing)
    two = synthetic.make_trace(seed=2, missing=missing)
    tokens = dataclasses.replace(one.tokens, expert_ids=two.tokens.expert_ids)
    two = trace.MemoryTrace(one.info, tokens)
    both = saturation.overlap(one, two, size=101)
    topk, top1 = slow_saturation(one.tokens, two.tokens)
    np.testing.assert_allclose(both.topk.sum(0) / both.slots.sum(0), topk)
    np.testing.assert_allclose(both.top1.sum(0) / both.tokens.sum(0), top1)


def test_a_training_from_random_to_final():
    checkpoints = training()
    result = saturation.over_training([[one] for one in reversed(checkpoints)], total_steps=30000)
    assert result.chance == {"topk": 0.25, "top1": 1 / 16}
    assert result.reference == "step15000"
    assert [p.share for p in result.against_final] == [0, 1 / 6, 1 / 3]
    assert [p.to for p in result.neighbours] == ["step5000", "step10000", "step15000"]
    for point, earlier in zip(result.against_final, checkpoints, strict=False):
        topk, top1 = slow_saturation(earlier.tokens, checkpoints[-1].tokens)
        np.testing.assert_allclose(point.topk.value, topk)
        np.testing.assert_allclose(point.top1_mean.value, np.mean(top1))
        assert (point.topk.low < point.topk.value).all() and (
            point.topk.value < point.topk.high
        ).all()
    topk, _ = slow_saturation(checkpoints[0].tokens, checkpoints[1].tokens)
    np.testing.assert_allclose(result.neighbours[0].topk.value, topk)
    start = result.against_final[0]
    assert start.topk_mean.low < 0.25 < start.topk_mean.high
    written = results.plain(saturation.to_json(result))
    assert written["checkpoints"][2]["against_final"]["4"]["top1"]["value"] > 0.7


def test_the_untrained_router_is_a_baseline_and_no_finding():
    said = words.settled(saturation.over_training([[one] for one in training()]))
    assert said[0].startswith("At step5000 (33 % of training)")
    assert "Untrained, at step0, it was 2" in said[1] and said[2].startswith("At step10000")
    only = saturation.over_training([[one] for one in training((0.0, 1.0))])
    assert "Only step5000 was trained" in words.settled(only)[0]
    random = saturation.over_training([[one] for one in training((0.0, 0.0, 1.0))])
    assert "no better than chance" in words.settled(random)[0]


def test_words_of_a_settled_router():
    result = saturation.over_training([[one] for one in training((0.5, 0.6, 0.9, 1.0))])
    said = " ".join(words.settled(result))
    assert (
        "At step5000 (33 % of training)" in said
        and "chance: 25.0 %" in said
        and "settled first" in said
    )


def test_domains_are_pooled_over_their_tokens():
    books, code = training((0.2, 1.0)), training((0.6, 1.0), domain="code", seed=9)
    pooled = saturation.over_training([list(pair) for pair in zip(books, code, strict=True)])
    alone = [saturation.over_training([[x] for x in one]) for one in (books, code)]
    want = np.mean([one.against_final[0].topk.value for one in alone], axis=0)
    np.testing.assert_allclose(pooled.against_final[0].topk.value, want)  # as many tokens each
    assert pooled.domains == ("books", "code")


def test_what_cannot_be_compared_is_refused():
    one, two = training((0.5, 1.0))
    with pytest.raises(ValueError, match="expected two or more, got 1"):
        saturation.over_training([[one]])
    other = trace.MemoryTrace(dataclasses.replace(two.info, data="else"), two.tokens)
    with pytest.raises(ValueError, match="is of data 'd', .* of 'else'"):
        saturation.over_training([[one], [other]])
    fewer = synthetic.make_trace(experts=15, k=4, tokens=1500, checkpoint="step9", step=9)
    with pytest.raises(ValueError, match="num_experts 16, .* has 15"):
        saturation.over_training([[one], [fewer]])
    moved = dataclasses.replace(two.tokens, input_ids=np.roll(two.tokens.input_ids, 1))
    with pytest.raises(ValueError, match="tokens differ"):
        saturation.over_training([[one], [trace.MemoryTrace(two.info, moved)]])
    short = trace.MemoryTrace(two.info, trace.cut(two.tokens, slice(99)))
    with pytest.raises(ValueError, match="one has fewer tokens"):
        saturation.over_training([[one], [short]])
    with pytest.raises(ValueError, match="same step"):
        saturation.over_training([[one], [one]])
    with pytest.raises(ValueError, match="different domains"):
        saturation.over_training([[one], training((1.0,), domain="code")])
