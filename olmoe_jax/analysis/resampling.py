"""Uncertainty and chance: documents drawn anew or left out, labels permuted, random routers.

Tokens of one document resemble each other, so documents are what is resampled, never tokens: an
interval over tokens would be several times too narrow.
"""

import dataclasses
import math

import numpy as np
from scipy import special

LEVEL = 0.95
DRAWS = 500
PERMUTATIONS = 200
SURE = 0.01  # share of chance draws up to which a number is called more than chance
_EXACT = 4e6  # random numbers per draw up to which a random router is run, not approximated


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Numbers and where the true ones lie.

    Attributes:
      value: array of any shape.
      low, high: ends of the interval at level LEVEL, same shape; None where nothing could be
        resampled (one document, or a source without documents).
    """

    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def __getitem__(self, index):
        ends = (None if end is None else end[index] for end in (self.low, self.high))
        return Estimate(self.value[index], *ends)


def draw_documents(groups, *, draws=DRAWS, seed=0):
    """float64 [draws, groups]: how often each was drawn, as many with replacement as there are."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)


def bootstrap(statistic, sums, *, draws=DRAWS, seed=0) -> Estimate:
    """A statistic of sums over documents, with its interval over drawn documents.

    The interval is the middle of the draws, moved by the difference between value and mean of the
    draws: what few documents add to a distance or an entropy, drawing them anew adds once more.

    Args:
      statistic: takes arrays [..., *shape] like `sums` without their first axis.
      sums: list of arrays [groups, *shape].
    Source: Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    value = statistic(*(array.sum(0) for array in sums))
    groups = len(sums[0])
    if groups < 2:
        return Estimate(np.asarray(value))
    weights = draw_documents(groups, draws=draws, seed=seed)
    drawn = [
        (weights @ array.reshape(groups, -1)).reshape(draws, *array.shape[1:]) for array in sums
    ]
    drawn = statistic(*drawn)
    low, high = percentiles(drawn - drawn.mean(0))
    return Estimate(np.asarray(value), value + low, value + high)


def percentiles(draws, level=LEVEL):
    """(low, high) of the middle `level` of draws [draws, …]."""
    return tuple(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0))


def jackknife(statistic, folds) -> Estimate:
    """A statistic of sums over folds, with the t interval of the delete-a-group jackknife.

    variance = (F − 1) / F · Σ_f (s_−f − mean)², F − 1 degrees of freedom.

    Args:
      statistic: takes an array like folds[0].
      folds: [F, …], sums over disjoint sets of documents; empty ones do not count.
    Source: Kott, The Delete-a-Group Jackknife, Journal of Official Statistics 17(4), 2001.
    """
    total = folds.sum(0)
    held = [f for f in range(len(folds)) if folds[f].any()]
    return from_left_out(statistic(total), [statistic(total - folds[f]) for f in held])


def from_left_out(value, left_out) -> Estimate:
    """The jackknife's Estimate, from the statistic without each fold in turn."""
    value, count = np.asarray(value, np.float64), len(left_out)
    if count < 2:
        return Estimate(value)
    left_out = np.stack([np.asarray(v, np.float64) for v in left_out])
    variance = (count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0)
    half = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * np.sqrt(variance)
    return Estimate(value, value - half, value + half)


def random_router(num_tokens, experts, k, *, draws=DRAWS, seed=0):
    """Loads of a router that sends each token to k of the experts, all sets equally likely.

    Few tokens are routed one by one; above, the loads are drawn from the normal distribution with
    the mean and covariance of these sums.

    Returns:
      float64 [draws, experts], tokens per expert.
    """
    rng = np.random.default_rng(seed)
    if k == experts:
        return np.full((draws, experts), float(num_tokens))
    if num_tokens * experts * draws <= _EXACT * 10 and num_tokens * experts <= _EXACT:
        loads = np.zeros((draws, experts))
        for draw in range(draws):
            ids = rng.random((num_tokens, experts)).argpartition(k, axis=-1)[:, :k]
            loads[draw] = np.bincount(ids.ravel(), minlength=experts)
        return loads
    share = k / experts
    noise = rng.normal(size=(draws, experts))
    noise -= noise.mean(-1, keepdims=True)  # loads sum to num_tokens · k
    spread = math.sqrt(num_tokens * share * (1 - share) * experts / (experts - 1))
    return num_tokens * share + spread * noise


def entropy(probs):
    """−Σ p log2 p over the last axis, in bits."""
    probs = np.asarray(probs, np.float64)
    logs = np.log2(probs, out=np.zeros_like(probs), where=probs > 0)
    return -(probs * logs).sum(-1)


def mutual_information(probs):
    """Bits that an expert tells of the domain if all domains are equally likely.

    I = H(mean over domains of p(e | d)) − mean over domains of H(p(e | d)); from 0 to
    log2 min(domains, experts). Domains weigh the same however many tokens each has, so the number
    compares between data sets.

    Args:
      probs: [domains, …, experts], each summing to one over experts.
    """
    return entropy(probs.mean(0)) - entropy(probs).mean(0)


def miller_madow_bias(tokens, experts):
    """What independent tokens add to `mutual_information`, in bits, to first order.

    A plug-in entropy of n draws lies (m − 1) / 2n nats too low (Miller 1955); the mixture's by
    the same with the variance of its D parts.

    Args:
      tokens: [domains], draws of each.
    """
    domains, tokens = len(tokens), np.asarray(tokens, np.float64)
    own = (experts - 1) / (2 * tokens) / math.log(2)
    return own.mean() - own.sum() / domains**2


def normalised(loads):
    """Shares over the last axis; a row of zeros stays zero."""
    total = loads.sum(-1, keepdims=True)
    return np.divide(loads, total, out=np.zeros(loads.shape, np.float64), where=total > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Information:
    """Mutual information between domain and expert, per layer, in bits.

    Attributes:
      plug_in: [layers], of the counts as they are; too high on few documents.
      corrected: [layers] Estimate, bias removed; a router that knows no domain scatters around 0,
        so values may lie below.
      correction: "jackknife" over documents, or "miller_madow" where documents are not known (it
        takes tokens for independent, and so removes too little).
      chance, chance_high: [layers], mean and 95 % quantile of the plug-in value with the labels of
        whole documents permuted; None where documents are not known.
      p_value: [layers], share of permutations that reach the plug-in value; or None.
      mean_p_value: the same of the mean over layers, one test for the whole model; or None.
      most: the largest possible value, log2 min(domains, experts).
    """

    plug_in: np.ndarray
    corrected: Estimate
    correction: str
    chance: np.ndarray | None
    chance_high: np.ndarray | None
    p_value: np.ndarray | None
    mean_p_value: float | None
    most: float


def information(loads, documents, *, permuted=None, seed=0) -> Information:
    """Mutual information with its bias removed and held against permuted labels.

    Bias by the jackknife over documents within each domain: Σ_d (G_d − 1) (mean of I without
    one document of d − I). Unlike Miller's formula it does not take the tokens of a document for
    independent; unlike subtraction of the permuted mean it stays right when domains do differ.

    Args:
      loads: [domains, layers, experts].
      documents: per domain [groups, layers, experts]; or None.
      permuted: what `permute` returned for these documents; default: it is called.
    Sources: Quenouille, Notes on Bias in Estimation, Biometrika 43, 1956; Miller, Note on the Bias
      of Information Estimates, 1955; Panzeri et al., J. Neurophysiology 98, 2007 (shuffling).
    """
    domains, _, experts = loads.shape
    plug_in = mutual_information(normalised(loads))
    most = math.log2(min(domains, experts))
    if documents is None or min(len(groups) for groups in documents) < 2:
        bias = miller_madow_bias(loads.sum(-1).min(-1), experts)
        corrected = Estimate(plug_in - bias)
        return Information(
            plug_in=plug_in, corrected=corrected, correction="miller_madow", chance=None,
            chance_high=None, p_value=None, mean_p_value=None, most=most,
        )  # fmt: skip
    bias = _jackknife_bias(loads, documents, plug_in)
    drawn = []
    for number, groups in enumerate(documents):
        weights = draw_documents(len(groups), seed=seed + number)
        sums = (weights @ groups.reshape(len(groups), -1)).reshape(-1, *groups.shape[1:])
        drawn.append(normalised(sums))
    drawn = mutual_information(np.stack(drawn))
    # drawing documents anew adds the bias once more: only the spread of the draws is used
    low, high = percentiles(drawn - drawn.mean(0))
    corrected = Estimate(plug_in - bias, plug_in - bias + low, plug_in - bias + high)
    permuted = permute(documents, seed=seed) if permuted is None else permuted
    chance = mutual_information(np.moveaxis(normalised(permuted), 1, 0))
    return Information(
        plug_in=plug_in, corrected=corrected, correction="jackknife", chance=chance.mean(0),
        chance_high=np.quantile(chance, LEVEL, axis=0), p_value=p_value(plug_in, chance),
        mean_p_value=float(p_value(plug_in.mean(), chance.mean(-1))), most=most,
    )  # fmt: skip


def p_value(value, chance):
    """(1 + number of chance draws [draws, …] that reach the value) / (1 + draws)."""
    # equal sums differ in their last bits with the order of summation
    return (1 + (chance >= value - 1e-12).sum(0)) / (1 + len(chance))


def least_p_value(groups):
    """The smallest p-value that permuting labels can reach with so many documents per label.

    >>> round(least_p_value([2, 2]), 3)
    0.333
    """
    arrangements = math.lgamma(sum(groups) + 1) - sum(math.lgamma(g + 1) for g in groups)
    same = math.prod(math.factorial(list(groups).count(g)) for g in set(groups))
    return min(1.0, round(same * math.exp(-arrangements), 12)) if arrangements < 700 else 0.0


def permute(documents, *, draws=PERMUTATIONS, seed=0):
    """Loads of each domain with the labels of whole documents permuted.

    Args:
      documents: per domain [groups, layers, experts].
    Returns:
      float64 [draws, domains, layers, experts].
    """
    rng = np.random.default_rng(seed)
    pooled = np.concatenate(documents).astype(np.float64)
    labels = np.repeat(np.arange(len(documents)), [len(groups) for groups in documents])
    flat = pooled.reshape(len(pooled), -1)
    out = np.empty((draws, len(documents), flat.shape[1]))
    for draw in range(draws):
        chosen = rng.permutation(labels)
        out[draw] = (chosen == np.arange(len(documents))[:, None]).astype(np.float64) @ flat
    return out.reshape(draws, len(documents), *pooled.shape[1:])


def _jackknife_bias(loads, documents, plug_in):
    """[layers]: Σ over domains of (G − 1) · (mean of I without one document − I)."""
    probs = normalised(loads)
    entropies, mixture = entropy(probs), probs.mean(0)
    bias, count = np.zeros(plug_in.shape), len(loads)
    for d, groups in enumerate(documents):
        without = normalised(loads[d] - groups)
        mixed = entropy(mixture + (without - probs[d]) / count)
        own = entropies.mean(0) + (entropy(without) - entropies[d]) / count
        bias += (len(groups) - 1) * ((mixed - own).mean(0) - plug_in)
    return bias
