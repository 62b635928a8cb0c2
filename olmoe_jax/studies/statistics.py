"""Intervals over seeds and documents, power, crossings of curves: plain numbers in and out."""

import dataclasses
import math

import numpy as np
from scipy import special

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000
SD_CONFIDENCE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and where the true one lies.

    Attributes:
      mean: of `n` values.
      low, high: ends of the interval; None of a single value, which has none.
      sd: standard deviation of the values (n − 1 degrees of freedom); None of a single value.
      level: share of such intervals that hold the true mean.
    """

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int
    level: float = LEVEL

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero; False if there is none."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    def within(self, bound) -> bool:
        """Whether all of the interval lies in −bound..bound; False if there is none."""
        return self.low is not None and -bound <= self.low and self.high <= bound


def t_interval(values, level=LEVEL) -> Interval:
    """Student's t interval of the mean: mean ± t · sd / √n with n − 1 degrees of freedom.

    Of differences between runs paired by seed and data order this is the paired t test's.

    >>> interval = t_interval([-0.10, -0.14, -0.12])
    >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3)
    (-0.12, -0.17, -0.07)

    Raises:
      ValueError: no value, or one that is not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{values.tolist()}: expected finite numbers, at least one")
    n, mean = values.size, float(values.mean())
    if n == 1:
        return Interval(mean=mean, low=None, high=None, sd=None, n=1, level=level)
    sd = float(values.std(ddof=1))
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, sd=sd, n=n, level=level)


def power(effect, sd, n, level=LEVEL) -> float:
    """Probability that the t interval of n values excludes zero, if their mean is `effect`.

    From the noncentral t distribution with n − 1 degrees of freedom.
    """
    if sd == 0:
        return 1.0 if effect else 0.0
    critical = special.stdtrit(n - 1, (1 + level) / 2)
    shift = abs(effect) / sd * math.sqrt(n)
    if shift > 30 + critical:  # certain; the series of the distribution ends before
        return 1.0
    above = 1 - special.nctdtr(n - 1, shift, critical)
    below = special.nctdtr(n - 1, shift, -critical)
    return float(above + (0 if math.isnan(below) else below))


def seeds_to_decide(effect, sd, *, least=2, level=LEVEL, wanted=POWER) -> int | None:
    """Fewest seeds whose interval excludes zero with probability `wanted`; None above MOST_SEEDS.

    Assumes that the mean difference is `effect` and its spread over seeds `sd`.

    >>> seeds_to_decide(0.02, 0.01), seeds_to_decide(0.0001, 0.01)
    (5, None)
    """
    if power(effect, sd, MOST_SEEDS, level) < wanted:
        return None
    few, enough = least - 1, MOST_SEEDS  # power rises with n
    while enough - few > 1:
        middle = (few + enough) // 2
        if power(effect, sd, middle, level) >= wanted:
            enough = middle
        else:
            few = middle
    return enough


def shown_effect(sd, n, *, level=LEVEL, wanted=POWER) -> float:
    """The least effect at which the interval of n ≥ 2 seeds excludes zero with probability
    `wanted`: the other way round than `seeds_to_decide`.

    >>> round(shown_effect(0.01, 5), 4), round(shown_effect(0.01, 20), 4)
    (0.0168, 0.0066)
    """
    if sd == 0:
        return 0.0
    low, high = 0.0, sd
    while power(high, sd, n, level) < wanted:
        low, high = high, 2 * high
    while high - low > 1e-6 * sd:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, sd, n, level) >= wanted else (middle, high)
    return high


def pooled_sd(groups) -> tuple[float, int]:
    """(standard deviation within groups of values, its degrees of freedom).

    Raises:
      ValueError: no group has two values.
    """
    groups = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    if not groups:
        raise ValueError("a spread needs two values of one kind: name at least two seeds")
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    freedom = sum(group.size - 1 for group in groups)
    return math.sqrt(squares / freedom), freedom


def sd_bound(sd, degrees_of_freedom, confidence=SD_CONFIDENCE) -> float:
    """What a true standard deviation lies below with this confidence, one-sided, if `sd` was found.

    Of a pilot's spread 80 % is usual: found in few runs it is as often far too small.

    >>> round(sd_bound(1, 1), 2), round(sd_bound(1, 5), 2), round(sd_bound(1, 50), 2)
    (3.95, 1.46, 1.1)

    Source: Browne, Statistics in Medicine 14 (1995) 1933; Cocks and Torgerson, Journal of Clinical
    Epidemiology 66 (2013) 197.
    """
    return sd * math.sqrt(degrees_of_freedom / special.chdtri(degrees_of_freedom, confidence))


def crossing(x, gap, *, lasting=False) -> float | None:
    """Where a curve's lead `gap` over a target has gone from positive to at most zero.

    Between two points the gap is taken as linear in log x. Nothing is extrapolated: a gap that is
    positive to the end gives None; one that begins at or below zero gives the first x, as an upper
    bound.

    Args:
      x: rising positive numbers (tokens, FLOPs, seconds).
      gap: what remains at each, such as loss − target.
      lasting: the last such place, behind which the gap stays at or below zero; default the first.
    Raises:
      ValueError: x does not rise or is not positive, a value is not finite, or nothing is given.
    """
    x, gap = np.asarray(x, np.float64), np.asarray(gap, np.float64)
    if not x.size or x.shape != gap.shape or (x <= 0).any() or (np.diff(x) <= 0).any():
        raise ValueError("a crossing needs as many values as places, and places that rise from 0")
    if not np.isfinite(gap).all():
        raise ValueError("a crossing needs finite values")
    above = gap > 0
    if lasting:
        if above[-1]:
            return None
        after = int(np.flatnonzero(above)[-1]) + 1 if above.any() else 0
    else:
        if above.all():
            return None
        after = int(np.flatnonzero(~above)[0])
    if after == 0:
        return float(x[0])
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    start, end = math.log(x[after - 1]), math.log(x[after])
    return math.exp(start + share * (end - start))


def document_bootstrap(nats, baseline, targets, *, draws=2000, level=LEVEL, seed=0) -> Interval:
    """Percentile interval of a difference in loss, over which documents were evaluated.

    Documents are drawn with replacement, the same for both sides; the runs stay as they are, so
    this says nothing about seeds.

    Args:
      nats, baseline: [documents], Σ nats of each document (means over seeds).
      targets: [documents], number of targets.
    Returns:
      Interval in nats per token; `n` counts documents, `sd` is that of the draws.
    """
    nats, baseline, targets = (np.asarray(a, np.float64) for a in (nats, baseline, targets))
    count, rng = len(targets), np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    differences = weights @ (nats - baseline) / (weights @ targets)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        mean=float((nats - baseline).sum() / targets.sum()), low=float(low), high=float(high),
        sd=float(differences.std(ddof=1)), n=count, level=level,
    )  # fmt: skip
