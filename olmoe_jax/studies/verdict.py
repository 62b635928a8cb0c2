"""From finished runs to words: effect, interval, number of seeds, and what the paper had."""

import dataclasses
import math

import numpy as np

from olmoe_jax.studies import declaration, equality, results, statistics

AGREES = "agrees with the paper"
DISAGREES = "disagrees with the paper"
UNDECIDED = "not decidable at this scale"
AS_EXPECTED = "as expected"
UNEXPECTED = "not as expected"
DECIDED = "decided"
FEWEST_DOCUMENTS = 20  # a bootstrap over fewer says little, and its interval is too narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one Outcome.

    Attributes:
      outcome: what was asked.
      effects: seed → difference (measure "final") or logarithm of the ratio.
      interval: statistics.Interval of the effects; None if there are none.
      documents: Interval over evaluated documents of the same difference, the runs fixed; None
        where it does not apply, or there are fewer than FEWEST_DOCUMENTS. Shown apart: it says
        nothing about seeds.
      missing: seed → why it has no effect.
      seeds_needed: so many would decide with 80 % probability; None if decided or unknown.
      agreement: AGREES, DISAGREES, UNDECIDED; of an outcome without a paper AS_EXPECTED,
        UNEXPECTED, UNDECIDED; of one that expects nothing DECIDED with "lower", "higher" or
        "equal", UNDECIDED. "equal" is found where the whole interval lies within the outcome's
        smallest effect; one that lies on the expected side of zero as well has the direction, which
        the words call small.
      words: the verdict in one or two sentences.
    """

    outcome: declaration.Outcome
    effects: dict[int, float]
    interval: statistics.Interval | None
    documents: statistics.Interval | None
    missing: dict[int, str]
    seeds_needed: int | None
    agreement: str
    words: str


def judge(outcome, runs, *, bigram_loss=None) -> Finding:
    """The Finding of an outcome.

    Args:
      outcome: an Outcome.
      runs: (arm, seed) → results.Run; seeds that have only one of the two arms are left out.
      bigram_loss: validation loss of a bigram model. Arms that are not below it with every seed
        say nothing about a paper: that is then not decidable, whatever the interval.
    Raises:
      ValueError: a run has not recorded the metric; or no seed has both arms.
    """
    seeds = sorted(seed for arm, seed in runs if arm == outcome.arm
                   and (outcome.against, seed) in runs)  # fmt: skip
    if not seeds:
        raise ValueError(f"{outcome.title}: no seed has both arms")
    effects, missing = {}, {}
    for seed in seeds:
        run, other = runs[outcome.arm, seed], runs[outcome.against, seed]
        if diverged := [r for r in (run, other) if r.problem]:
            missing[seed] = f"{diverged[0].arm} diverged ({diverged[0].problem})"
        elif (effect := _effect(outcome, run, other)) is None:
            missing[seed] = (
                f"ends at {run.final(outcome.metric):.4f} without having reached "
                f"{other.final(outcome.metric):.4f}"
            )
        else:
            effects[seed] = effect
    interval = statistics.t_interval(list(effects.values())) if effects else None
    bounds = [seed for seed in effects if _is_bound(outcome, runs, seed)]
    agreement, needed = _decide(outcome, interval, missing)
    weak = []
    if bigram_loss is not None and outcome.paper:
        weak = [arm for arm in (outcome.arm, outcome.against)
                if not is_below(bigram_loss, [runs[arm, seed] for seed in seeds])]  # fmt: skip
        agreement = UNDECIDED if weak else agreement
    return Finding(
        outcome=outcome,
        effects=effects,
        interval=interval,
        documents=_documents(outcome, runs, list(effects)),
        missing=missing,
        seeds_needed=needed,
        agreement=agreement,
        words=" ".join(
            [
                *_found_words(outcome, effects, interval, missing, bounds),
                _verdict_words(outcome, interval, missing, agreement, needed, weak, bigram_loss),
            ]
        ),
    )


def is_below(loss, runs) -> bool:
    """Whether the final validation loss of every run is below `loss`; diverged ones are not."""
    return all(not run.problem and run.final("validation/loss") < loss for run in runs)


def _effect(outcome, run, other):
    """Difference, or logarithm of the ratio; None if the other's final value is not reached."""
    if outcome.measure == "final":
        return run.final(outcome.metric) - other.final(outcome.metric)
    curve, target = run.curve(outcome.metric), other.final(outcome.metric)
    later = curve.tokens > 0  # the axis is logarithmic
    tokens = statistics.crossing(curve.tokens[later], curve.values[later] - target)
    if tokens is None:
        return None
    return math.log(tokens / total_tokens(other) * price(run, outcome) / price(other, outcome))


def _is_bound(outcome, runs, seed):
    """Whether a cost is only known to be at most that of the first validation behind step 0."""
    if outcome.measure == "final":
        return False
    curve = runs[outcome.arm, seed].curve(outcome.metric)
    first = curve.values[curve.tokens > 0][0]
    return bool(first <= runs[outcome.against, seed].final(outcome.metric))


def total_tokens(run) -> int:
    """Tokens that a run trains on."""
    return run.config.training.num_steps * run.config.tokens_per_step


def price(run, outcome) -> float:
    """What a token costs a run in the outcome's measure: 1, training FLOPs, or seconds.

    Seconds are by the median speed of the run's steps, which compiling, validating and being
    stopped do not enter.
    """
    if outcome.measure == "flops":
        return flops_per_token(run)
    return 1 / run.tokens_per_second if outcome.measure == "seconds" else 1.0


def flops_per_token(run) -> int:
    """Training FLOPs per token of a run, router included."""
    return equality.cost(run.config).flops_per_token


def _decide(outcome, interval, missing):
    """(agreement, seeds needed or None)."""
    if interval is None or missing or interval.low is None:
        return UNDECIDED, None
    small = interval.within(outcome.smallest_effect)
    if not interval.excludes_zero and not small:
        effect = max(abs(interval.mean), outcome.smallest_effect)
        return UNDECIDED, statistics.seeds_to_decide(effect, interval.sd, least=interval.n + 1)
    way = "lower" if interval.mean < 0 else "higher"
    found = "equal" if small else way
    if outcome.expected is None:
        return f"{DECIDED}: {found}", None
    right, wrong = (AGREES, DISAGREES) if outcome.paper else (AS_EXPECTED, UNEXPECTED)
    if outcome.expected == "equal" and not small:
        nearest = min(abs(interval.low), abs(interval.high))
        return (wrong if nearest > outcome.smallest_effect else UNDECIDED), None
    direction = interval.excludes_zero and way == outcome.expected  # a small one, too
    return (right if direction or found == outcome.expected else wrong), None


def _found_words(outcome, effects, interval, missing, bounds):
    """The sentences on what was measured."""
    parts = [] if interval is None else [_effect_words(outcome, effects, interval)]
    if bounds:
        listed = ", ".join(str(seed) for seed in bounds)
        parts.append(f"Reached by the first validation, so at most that, with seed {listed}.")
    if missing:
        listed = "; ".join(f"seed {seed}: {why}" for seed, why in missing.items())
        count = f"{len(missing)} of {len(missing) + len(effects)} seeds"
        parts.append(f"No value in {count} ({listed}); nothing is extrapolated.")
    return parts


def _verdict_words(outcome, interval, missing, agreement, needed, weak, bigram_loss):
    """The sentence on what follows."""
    verdict = agreement[0].upper() + agreement[1:]
    if weak:
        verdict += f": {' and '.join(weak)} not below a bigram model ({bigram_loss:.4f})"
    elif agreement == UNDECIDED and interval is not None and not missing and interval.n > 1:
        size = _size(outcome, max(abs(interval.mean), outcome.smallest_effect))
        enough = f"about {needed} seeds" if needed else f"more than {statistics.MOST_SEEDS} seeds"
        if interval.excludes_zero:
            least = _size(outcome, outcome.smallest_effect)
            verdict += f": there is a difference, but it may be below {least}"
        else:
            shown = _size(outcome, statistics.shown_effect(interval.sd, interval.n))
            verdict += (
                f": it would take {enough} to tell {size} from none; with these {interval.n}, "
                f"effects from about {shown} on would show"
            )
    return f"{verdict}{_paper(outcome)}."


def _paper(outcome):
    return f" (paper: {outcome.paper})" if outcome.paper else ""


def _effect_words(outcome, effects, interval):
    ratio = outcome.measure != "final"
    n = f"n = {interval.n} {'seed' if interval.n == 1 else 'seeds'}"
    if interval.low is None:
        spread = f"{n}: {next(iter(effects))}; one seed gives no interval and decides nothing"
    else:
        ends = [math.exp(x) if ratio else x for x in (interval.low, interval.high)]
        digits = "{:.3g}" if ratio else "{:+.4f}"
        low, high = (digits.format(end) for end in ends)
        spread = f"{100 * interval.level:g} % interval {low} to {high}, {n}"
    about = ""
    if interval.within(outcome.smallest_effect):
        about = f"; no difference as large as {_size(outcome, outcome.smallest_effect)}"
    if ratio:
        return (
            f"{outcome.arm} reaches the final {outcome.metric} of {outcome.against} with "
            f"{math.exp(interval.mean):.3g} × its {outcome.measure} ({spread}){about}."
        )
    size = f"{interval.mean:+.4f} {declaration.unit_of(outcome.metric)} ({spread}){about}."
    if interval.low is None:
        return f"{outcome.metric} of {outcome.arm} − {outcome.against}: {size}"
    if interval.excludes_zero:
        way = "lower" if interval.mean < 0 else "higher"
        return f"{outcome.arm} ends with a {way} {outcome.metric} than {outcome.against}: {size}"
    return (
        f"{outcome.arm} and {outcome.against} do not differ measurably in {outcome.metric}: {size}"
    )


def _size(outcome, effect):
    """An effect in the outcome's unit."""
    if outcome.measure == "final":
        return f"{effect:.3g} {declaration.unit_of(outcome.metric)}"
    return f"a ratio of {math.exp(effect):.3g}"


def _documents(outcome, runs, seeds):
    """Bootstrap over documents of a final validation loss; None where there is none."""
    if (outcome.measure, outcome.metric) != ("final", "validation/loss") or not seeds:
        return None
    sums = {}
    for arm in (outcome.arm, outcome.against):
        found = [results.read_documents(runs[arm, seed].path) for seed in seeds]
        if any(f is None for f in found):
            return None
        sums[arm] = found
    first = sums[outcome.arm][0]
    for found in (*sums[outcome.arm], *sums[outcome.against]):
        if not np.array_equal(found["documents"], first["documents"]):
            return None  # evaluated on other text
    if len(first["documents"]) < FEWEST_DOCUMENTS:
        return None
    means = {arm: np.mean([f["nats"] for f in found], axis=0) for arm, found in sums.items()}
    return statistics.document_bootstrap(
        means[outcome.arm], means[outcome.against], first["targets"]
    )
