"""Vocabulary specialisation: does an expert handle particular tokens, and which.

VS(E_i, x) = times that token x went to E_i (first choice, or among the k) / times that x occurred
(OLMoE, arXiv 2409.02060, section 5.4); x is the input token, the model's predicted next token, or
the true next token. As in the released script, a layer's number is the unweighted mean over token
ids of the share of the id's favourite expert. That script takes ids seen once, whose favourite has
100 %: `min_count=1` reproduces it; the default is that of the paper's table 8. Even so few
occurrences favour some expert by chance: `random` is what a router with the same loads that does
not look at tokens would reach on the same numbers of occurrences.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import special

from olmoe_jax.analysis import counts as counts_lib
from olmoe_jax.analysis import resampling

MIN_COUNT = 10
_RANDOM_IDS = 4000  # token ids that the chance level is drawn for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One kind of token and one rank.

    Attributes:
      kind: "input", "predicted" or "next"; rank: "topk" or "top1".
      num_ids: token ids that occurred at least min_count times.
      mean: Estimate [layers].
      random: float64 [layers], chance level of `mean`.
      experts: float64 [layers, experts], mean over the ids whose favourite it is; NaN without any.
      favoured: int64 [layers, experts], number of these ids.
    """

    kind: str
    rank: str
    num_ids: int
    mean: resampling.Estimate
    random: np.ndarray
    experts: np.ndarray
    favoured: np.ndarray


@dataclasses.dataclass(frozen=True)
class Entries:
    """(token, expert) pairs that occurred, by token, then expert.

    Attributes:
      tokens, experts, counts: int64 [n].
      occurrences: int64 [largest token id + 1], of each id.
    """

    tokens: np.ndarray
    experts: np.ndarray
    counts: np.ndarray
    occurrences: np.ndarray


def vocabulary(counts, *, min_count=MIN_COUNT, seed=0) -> dict:
    """(kind, rank) → Vocabulary, for the kinds and ranks that the source has.

    Raises:
      ValueError: the source knows no tokens, or none occurred min_count times.
    """
    _check(counts, min_count)
    found = {}
    for kind, rank in counts.vocabulary:
        one = _one(counts, kind, rank, min_count, seed)
        if one is not None:
            found[kind, rank] = one
    if not found:
        raise ValueError(
            f"{counts_lib.describe(counts.info)}: no token occurs {min_count} times; take more "
            "text or a smaller minimum"
        )
    return found


def _check(counts, min_count):
    if not counts.vocabulary:
        raise ValueError(
            f"{counts_lib.describe(counts.info)}: which token went where is not in this source"
        )
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}: expected 1 or more")


def _one(counts, kind, rank, min_count, seed):
    info, experts = counts.info, counts.info.num_experts
    layers = range(len(info.layers))
    held = _held_folds(counts, kind)
    left_out = [[] for _ in held]
    values, rows = [], []
    for layer in layers:
        found = _score(_entries(counts, kind, rank, layer), min_count)
        if found is None:
            return None
        values.append(found[0])
        rows.append((found[1], found[2]))
        for place, fold in enumerate(held):
            without = _score(_entries(counts, kind, rank, layer, without=fold), min_count)
            left_out[place].append(math.nan if without is None else without[0])
    means = np.full((len(layers), experts), np.nan)
    favoured = np.zeros((len(layers), experts), np.int64)
    for layer, (favourite, share) in enumerate(rows):
        favoured[layer] = np.bincount(favourite, minlength=experts)
        total = np.bincount(favourite, share, minlength=experts)
        np.divide(total, favoured[layer], out=means[layer], where=favoured[layer] > 0)
    estimate = resampling.from_left_out(np.array(values), left_out)
    if estimate.low is not None and not np.isfinite(estimate.low).all():
        estimate = resampling.Estimate(estimate.value)
    occurrences = _occurrences(counts, kind)
    enough = occurrences[occurrences >= min_count]
    return Vocabulary(
        kind=kind, rank=rank, num_ids=len(enough), mean=estimate,
        random=_random(counts, rank, enough, seed), experts=means, favoured=favoured,
    )  # fmt: skip


def _held_folds(counts, kind):
    if counts.folds < 2:
        return []
    return sorted(set((counts.occurrences[kind].keys % np.uint32(counts.folds)).tolist()))


def entries(counts, kind, rank, layer) -> Entries:
    """What the source holds of a kind and rank, in the layer at that position.

    Raises:
      ValueError: it is not in this source.
    """
    if not counts.vocabulary or (kind, rank) not in counts.vocabulary:
        raise ValueError(
            f"{counts_lib.describe(counts.info)}: {kind} tokens of rank {rank} are not in this "
            "source"
        )
    return _entries(counts, kind, rank, layer)


def _entries(counts, kind, rank, layer, without=None):
    tally, folds = counts.vocabulary[kind, rank][layer], counts.folds
    pairs, found = _without_fold(tally, folds, without)
    tokens = (pairs // counts.info.num_experts).astype(np.int64)
    experts = (pairs % counts.info.num_experts).astype(np.int64)
    return Entries(tokens, experts, found, _occurrences(counts, kind, without))


def _occurrences(counts, kind, without=None):
    tokens, found = _without_fold(counts.occurrences[kind], counts.folds, without)
    out = np.zeros(int(tokens[-1]) + 1 if len(tokens) else 0, np.int64)
    out[tokens] = found
    return out


def _without_fold(tally, folds, fold):
    """(keys without their fold, rising and each once; int64 counts), leaving one fold out."""
    keys, counted = tally.keys, tally.counts
    if fold is not None:
        kept = keys % np.uint32(folds) != fold
        keys, counted = keys[kept], counted[kept]
    keys = keys // np.uint32(folds)
    if not len(keys):
        return keys, np.zeros(0, np.int64)
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counted.astype(np.int64), first)


def _score(found, min_count):
    """(mean, favourite of each id, its share) over ids that occur often enough; None: no id."""
    kept = found.occurrences[found.tokens] >= min_count
    tokens, experts, counted = found.tokens[kept], found.experts[kept], found.counts[kept]
    if not len(tokens):
        return None
    first = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]]))
    lengths = np.diff(np.append(first, len(tokens)))
    best = np.maximum.reduceat(counted, first)
    # the lowest of the ids that tie
    reach = np.flatnonzero(counted == np.repeat(best, lengths))
    place = reach[np.searchsorted(reach, first)]
    share = best / found.occurrences[tokens[first]]
    return float(share.mean()), experts[place], share


def _random(counts, rank, occurrences, seed):
    """[layers]: mean share of the favourite for a router that does not look at tokens."""
    rng, info = np.random.default_rng(seed), counts.info
    if len(occurrences) > _RANDOM_IDS:
        occurrences = rng.choice(occurrences, _RANDOM_IDS, replace=False)
    loads = getattr(counts, rank)
    k = info.num_experts_per_token if rank == "topk" else 1
    out = []
    for row in loads:
        if rank == "top1":
            drawn = rng.multinomial(occurrences, row / row.sum()).max(-1)
        else:
            share = np.minimum(row / info.num_tokens, 1)
            drawn = rng.binomial(occurrences[:, None], share).max(-1)
            # the experts of one id are drawn apart, but n tokens have n · k places to fill
            drawn = np.maximum(drawn, np.ceil(occurrences * k / info.num_experts))
        out.append((drawn / occurrences).mean())
    return np.array(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
    """A token of an expert: id, text, share of its occurrences that went there, how often."""

    id: int
    text: str
    share: float
    count: int


def _word(token, count, often, decode):
    text = decode(int(token)) if decode else ""
    return Word(id=int(token), text=text, share=float(count / often), count=int(count))


def expert_tokens(
    counts, kind, rank, layer, *, min_count=MIN_COUNT, most=15, decode: Callable | None = None
) -> dict[int, tuple[Word, ...]]:
    """expert → its tokens by falling share, then count; experts without any are left out.

    Args:
      layer: position in counts.info.layers.
      min_count: occurrences that a token must have.
      decode: token id → text; default: no text.
    """
    found = entries(counts, kind, rank, layer)
    often = found.occurrences[found.tokens]
    kept = np.flatnonzero(often >= min_count)
    tokens, experts, counted = found.tokens[kept], found.experts[kept], found.counts[kept]
    share = counted / often[kept]
    order = np.lexsort((tokens, -counted, -share, experts))
    first = np.searchsorted(experts[order], np.arange(counts.info.num_experts + 1))
    out = {}
    for expert in range(counts.info.num_experts):
        places = order[first[expert] : min(first[expert + 1], first[expert] + most)]
        words = [_word(tokens[i], counted[i], often[kept[i]], decode) for i in places]
        if words:
            out[expert] = tuple(words)
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Favourite:
    """A token that one expert takes far more often than its load: position of the layer, expert,
    token, and the chance of any such token in all of the layers, were tokens routed blindly."""

    layer: int
    expert: int
    word: Word
    chance: float


def clearest(counts, kind, rank, *, min_count=MIN_COUNT, decode=None) -> Favourite | None:
    """The token whose share at an expert stands out most, in standard deviations of a blind router.

    Its chance is the binomial tail times the number of pairs looked at (Bonferroni). None without
    a token that occurs min_count times.
    """
    best, looked_at = None, 0
    loads = getattr(counts, rank)
    for layer in range(len(counts.info.layers)):
        found = entries(counts, kind, rank, layer)
        kept = found.occurrences[found.tokens] >= min_count
        if not kept.any():
            continue
        tokens, experts, counted = found.tokens[kept], found.experts[kept], found.counts[kept]
        often = found.occurrences[tokens]
        looked_at += len(np.unique(tokens)) * counts.info.num_experts
        share = np.minimum(loads[layer] / counts.info.num_tokens, 1)[experts]
        deviation = np.sqrt(often * share * (1 - share))
        score = np.divide(
            counted - often * share, deviation, out=np.zeros(len(often)), where=deviation > 0
        )
        place = int(np.argmax(score))
        if best is None or score[place] > best[0]:
            n, p = int(often[place]), float(share[place])
            word = _word(tokens[place], counted[place], n, decode)
            tail = float(special.bdtrc(int(counted[place]) - 1, n, p))
            best = score[place], layer, int(experts[place]), word, tail
    if best is None:
        return None
    _, layer, expert, word, tail = best
    return Favourite(layer=layer, expert=expert, word=word, chance=min(1.0, tail * looked_at))


def to_json(counts, found, *, min_count=MIN_COUNT):
    """vocabulary_specialisation.json."""
    info, kinds = counts.info, {}
    for (kind, rank), one in found.items():
        layers = {
            layer: {
                "mean": one.mean[row], "random": one.random[row], "experts": one.experts[row],
                "num_ids": one.favoured[row],
            }
            for row, layer in enumerate(info.layers)
        }  # fmt: skip
        kinds.setdefault(kind, {})[rank] = {"num_ids": one.num_ids, "layers": layers}
    return {
        "model": info.model, "checkpoint": info.checkpoint, "domain": info.domain,
        "min_count": min_count, "kinds": kinds,
    }  # fmt: skip


def tokens_to_json(counts, *, min_count=MIN_COUNT, most=15, decode=None):
    """expert_tokens.json."""
    _check(counts, min_count)
    out = {layer: {} for layer in counts.info.layers}
    for kind, rank in counts.vocabulary:
        for row, layer in enumerate(counts.info.layers):
            out[layer].setdefault(kind, {})[rank] = expert_tokens(
                counts, kind, rank, row, min_count=min_count, most=most, decode=decode
            )
    return out
