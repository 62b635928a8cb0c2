"""A bigram model of a run's training split: what a laptop-scale model must beat to count as one."""

import numpy as np

from olmoe_jax.data import pipeline
from olmoe_jax.training import validation

MOST_TOKENS = 50_000_000  # counted in memory; the first windows of a larger corpus stand for it
DISCOUNT = 0.75
_WINDOWS = 1024  # read at once


def baseline(data, config) -> dict:
    """validation/bigram_… losses: each token given only the one before it.

    Counts of the train split, with absolute discounting: the mass taken off goes to the unigram
    model (add-one). The same windows and targets as validation during training. The keys are those
    of `validation.by_domain` with "bigram_" before loss and bits_per_byte.

    Source: Ney, Essen and Kneser 1994, absolute discounting, interpolated.
    """
    size = data.info.vocab_size
    pairs, counts = _pair_counts(data, size)
    unigram = np.asarray(data.unigram_counts, np.float64)[:size] + 1
    unigram /= unigram.sum()
    contexts = pairs // size
    context_counts = np.bincount(contexts, counts, size)
    followers = np.bincount(contexts, minlength=size)
    batches = pipeline.validation_batches(
        data, num_windows=config.data.validation_windows, batch_size=config.training.batch_size
    )
    sums, targets = np.zeros(len(data.info.domains)), np.zeros(len(data.info.domains))
    for batch in batches:
        keep = batch["loss_mask"][:, 1:]
        before, after = batch["tokens"][:, :-1][keep], batch["tokens"][:, 1:][keep]
        wanted = before.astype(np.int64) * size + after
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where(pairs[place] == wanted, counts[place], 0)
        total = np.maximum(context_counts[before], 1)
        left = np.where(context_counts[before] > 0, DISCOUNT * followers[before] / total, 1)
        probs = np.maximum(seen - DISCOUNT, 0) / total + left * unigram[after]
        domains = batch["domains"][:, 1:][keep]
        sums += np.bincount(domains, -np.log(probs), len(sums))
        targets += np.bincount(domains, minlength=len(targets))
    num_bytes = validation.target_bytes(batches, data)
    return validation.by_domain(sums, targets, num_bytes, data.info.domains, suffix="bigram_")


def _pair_counts(data, size):
    """(sorted codes before · size + after, how often each occurs) of the train split."""
    windows = min(data.num_windows("train"), max(1, MOST_TOKENS // data.info.sequence_length))
    codes = []
    for first in range(0, windows, _WINDOWS):
        rows = range(first, min(first + _WINDOWS, windows))
        batch = pipeline.as_batch(data.read_windows("train", rows))
        keep = batch["loss_mask"][:, 1:]
        before, after = batch["tokens"][:, :-1][keep], batch["tokens"][:, 1:][keep]
        codes.append(before.astype(np.int64) * size + after)
    pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
    return pairs, counts.astype(np.float64)
