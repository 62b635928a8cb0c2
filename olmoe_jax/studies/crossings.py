"""Where a model trained from scratch catches up with an upcycled one, and where it overtakes it.

An upcycled Mixture of Experts begins with what a dense model has learnt, the same architecture from
scratch with nothing; both then read the same windows. So the upcycled run starts with a lower loss,
and the question is for how long. Definitions, for one pair of runs (one seed) and one place x:

  lead       scratch's validation loss − upcycled's, both at the same x. Between two validations
             a loss is taken as linear in log x.
  catch-up   the first x at which the lead is at most MARGIN nats: scratch "is there". The margin is
             the smallest difference that the study calls one, and about what a lead differs by from
             one validation to the next at a constant rate (laptop scale: standard deviation 0.015
             nats with rate 2e-3, 0.021 with 4e-3).
  overtaking the last x at which the lead goes from positive to at most zero: from there to the end
             of the runs scratch is not behind. Without a margin, so it comes after the catch-up.

Both are read off within the part of the axis on which both runs have been validated. A lead that
lasts to the end of it gives no place (Crossing.place None): nothing is extrapolated. One that is
gone where that part begins gives its beginning, as an upper bound (Crossing.at_most).

The axes, x:

  tokens              of training the Mixture of Experts; the same for both
  flops, seconds      of training the Mixture of Experts
  flops_with_dense,   the same, to which the upcycled run adds what the dense model has cost: its
  seconds_with_dense  curve begins at that budget. What counts where the dense model was not there
                      anyway. Here "caught up" can be true from the beginning: from scratch, the
                      dense model's budget alone may lead as far.

FLOPs are those of `accounting`; seconds the sum over steps of what metrics.jsonl has for each
(batch tokens ÷ perf/tokens_per_second: compiling included, validation and checkpoints not).

OLMoE (arXiv 2409.02060, section 4.1.5 and figure 8) reads off its curves, without a definition,
that scratch catches up at about 500 B tokens, a quarter of the dense model's 2 T, and is ahead from
about 600 B on.
"""

import dataclasses

import numpy as np

from olmoe_jax.studies import statistics, verdict

MARGIN = 0.02  # nats per token
CATCH_UP, OVERTAKING = KINDS = ("catch_up", "overtaking")
UNITS = {"tokens": "tokens", "flops": "FLOPs", "flops_with_dense": "FLOPs", "seconds": "seconds",
         "seconds_with_dense": "seconds"}  # fmt: skip
AXES = tuple(UNITS)
PAPER_SHARE = 0.25  # catch-up, of the dense model's tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What training the dense model has cost; None where that is not known."""

    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None

    def on(self, axis) -> float | None:
        """In the unit of an axis."""
        return getattr(self, axis.removesuffix("_with_dense"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where one pair of curves crosses.

    Attributes:
      place: on the axis; None: not within begin..end.
      at_most: it was crossed already where both curves begin, so `place` is an upper bound.
      begin, end: the part of the axis on which both curves are; None if there is none.
    """

    place: float | None
    at_most: bool = False
    begin: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One kind of crossing on one axis, over all seeds.

    Attributes:
      kind, axis: which.
      each: seed → Crossing.
      interval: statistics.Interval of the logarithms of the places; None unless every seed has one.
      budgets: seed → the dense model's on this axis, as far as it is known; none on an axis that
        includes it.
      shares: seed → place ÷ budget, where there are both.
      share: Interval of the logarithms of the shares; None unless every seed has one.
    """

    kind: str
    axis: str
    each: dict[int, Crossing]
    interval: statistics.Interval | None
    budgets: dict[int, float]
    shares: dict[int, float]
    share: statistics.Interval | None


def budget_of(run) -> Budget:
    """What a run has cost, all of it."""
    tokens = verdict.total_tokens(run)
    return Budget(
        tokens=tokens,
        flops=tokens * verdict.flops_per_token(run),
        seconds=float(run.step_seconds.sum()),
    )


def places(run, metric, axis, dense=None):
    """float64 [points]: where on an axis a metric of a run was measured; None if that is unknown.

    Args:
      run: a results.Run.
      dense: Budget of the dense model that it starts from, or None: from nothing.
    """
    tokens = run.curve(metric).tokens
    if axis.startswith("flops"):
        x = tokens * verdict.flops_per_token(run)
    elif axis.startswith("seconds"):
        steps = np.rint(tokens / run.config.tokens_per_step).astype(int)
        x = np.concatenate([[0.0], np.cumsum(run.step_seconds)])[steps]
    else:
        x = tokens
    if dense is None or not axis.endswith("_with_dense"):
        return x
    before = dense.on(axis)
    return None if before is None else x + before


def lead(upcycled, scratch):
    """(x, scratch − upcycled) where both curves are; both empty if they do not overlap.

    Args:
      upcycled, scratch: (x, y) float64 [points] each, x rising. Places at x = 0 are left out.
    """
    curves = []
    for x, y in (upcycled, scratch):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        curves.append((x[x > 0], y[x > 0]))
    begin, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    x = np.union1d(curves[0][0], curves[1][0])
    x = x[(begin <= x) & (x <= end)]
    one, two = (np.interp(np.log(x), np.log(places), y) for places, y in curves)
    return x, two - one


def lead_at(x, gap, place) -> float | None:
    """A lead, as `lead` returns it, at one place; None outside its part of the axis."""
    if not len(x) or not x[0] <= place <= x[-1]:
        return None
    return float(np.interp(np.log(place), np.log(x), gap))


def find(x, gap, kind) -> Crossing:
    """The Crossing of a kind in a lead, as `lead` returns it."""
    if not len(x):
        return Crossing(place=None)
    margin = MARGIN if kind == CATCH_UP else 0.0
    place = statistics.crossing(x, gap - margin, lasting=kind == OVERTAKING)
    ends = {"begin": float(x[0]), "end": float(x[-1])}
    return Crossing(place=place, at_most=bool(place == x[0]), **ends)


def summarise(kind, axis, each, budgets) -> Summary:
    """The Summary of each seed's Crossing.

    Args:
      budgets: seed → Budget of the dense model.
    """
    found = {seed: c.place for seed, c in each.items() if c.place is not None}
    known = {}
    if not axis.endswith("_with_dense"):
        known = {seed: whole for seed in each if (whole := budgets[seed].on(axis))}
    shares = {seed: found[seed] / known[seed] for seed in found if seed in known}

    def interval(values):
        complete = len(values) == len(each) > 0
        return statistics.t_interval(np.log(list(values.values()))) if complete else None

    return Summary(
        kind=kind, axis=axis, each=each, interval=interval(found), budgets=known, shares=shares,
        share=interval(shares),
    )  # fmt: skip


def compare(runs, budgets, metric="validation/loss") -> dict[tuple[str, str], Summary]:
    """(axis, kind) → Summary of all pairs; axes whose dense budget is not known are left out.

    Args:
      runs: seed → (upcycled, scratch), finished results.Runs.
      budgets: seed → Budget of the dense model.
    """
    found = {}
    for axis in AXES:
        each = {kind: {} for kind in KINDS}
        for seed, (upcycled, scratch) in runs.items():
            begun = places(upcycled, metric, axis, budgets[seed])
            if begun is None:
                break
            x, gap = lead(
                (begun, upcycled.curve(metric).values),
                (places(scratch, metric, axis), scratch.curve(metric).values),
            )
            for kind in KINDS:
                each[kind][seed] = find(x, gap, kind)
        else:
            for kind in KINDS:
                found[axis, kind] = summarise(kind, axis, each[kind], budgets)
    return found
