"""Against the same model written as loops over dictionaries."""

import collections
import math

import numpy as np
import pytest

from olmoe_jax.data import pipeline
from olmoe_jax.studies import bigram


def _targets(windows):
    """(before, after, domain) of every target."""
    batch = pipeline.as_batch(windows)
    for tokens, mask, domains in zip(
        batch["tokens"], batch["loss_mask"], batch["domains"], strict=True
    ):
        for i in range(1, len(tokens)):
            if mask[i]:
                yield int(tokens[i - 1]), int(tokens[i]), int(domains[i])


def test_loss_is_that_of_a_naive_bigram_model(prepared, tiny_base):
    data = pipeline.open(prepared)
    found = bigram.baseline(data, tiny_base)
    pairs = collections.Counter()
    windows = data.read_windows("train", range(data.num_windows("train")))
    for before, after, _ in _targets(windows):
        pairs[before, after] += 1
    contexts, followers = collections.Counter(), collections.Counter()
    for (before, _), count in pairs.items():
        contexts[before] += count
        followers[before] += 1
    counts = np.asarray(data.unigram_counts)[: data.info.vocab_size] + 1
    unigram = counts / counts.sum()
    nats, total = collections.Counter(), collections.Counter()
    for batch in pipeline.validation_batches(data, num_windows=10, batch_size=4):
        fields = {k: batch[k] for k in ("tokens", "documents", "domains")}
        for before, after, domain in _targets(fields):
            prob = unigram[after]
            if contexts[before]:
                kept = max(pairs[before, after] - bigram.DISCOUNT, 0) / contexts[before]
                prob = kept + bigram.DISCOUNT * followers[before] / contexts[before] * prob
            nats[domain] -= math.log(prob)
            total[domain] += 1
    want = sum(nats.values()) / sum(total.values())
    assert found["validation/bigram_loss"] == pytest.approx(want, rel=1e-9)
    for number, name in enumerate(data.info.domains):
        if total[number]:
            assert found[f"validation/{name}/bigram_loss"] == pytest.approx(
                nats[number] / total[number], rel=1e-9
            )


def test_its_probabilities_sum_to_one(prepared, tiny_base, monkeypatch):
    """Σ over the vocabulary of exp(−loss) behind one token."""
    data = pipeline.open(prepared)
    before, size = 40, data.info.vocab_size
    pairs, probs = bigram._pair_counts(data, size), []
    monkeypatch.setattr(bigram, "_pair_counts", lambda *a: pairs)  # once, not for each token
    for after in range(size):
        batch = {
            "tokens": np.array([[before, after]]), "loss_mask": np.array([[True, True]]),
            "domains": np.zeros((1, 2), np.int64), "documents": np.zeros((1, 2), np.int64),
        }  # fmt: skip
        monkeypatch.setattr(pipeline, "validation_batches", lambda *a, b=batch, **k: [b])
        probs.append(math.exp(-bigram.baseline(data, tiny_base)["validation/bigram_loss"]))
    assert sum(probs) == pytest.approx(1, rel=1e-9)
