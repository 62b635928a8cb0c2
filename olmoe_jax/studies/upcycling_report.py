"""compare.json: what the upcycling comparison has found, in numbers and words.

    study, scale, data, seeds, variant     which comparison
    paper                                  what there is to compare with, in words
    margin, definitions                    how a crossing is read off (`crossings`)
    learning_rates                         arm → peak rate of these runs
    protocol                               whether a pilot chose them
    dense      {tokens, flops, seconds}    seed → its budget; null where that is not known
    runs       arm → seed → {tokens_per_second, final, diverged}
    curves     arm → seed → {step, tokens, flops, seconds, metric: [...]}: at every validation; all
               of that arm's own training, without the dense model's
    crossings  axis → catch_up, overtaking → {each: seed → {place, at_most, begin, end}, mean, low,
               high, n, shares: seed → share, share: {mean, low, high}}; means are geometric, `low`
               and `high` the ends of Student's t interval of the logarithms. null: no such number
    lead       start, budget, end → {each: seed → nats, mean, low, high}: scratch − upcycled at the
               first validation (step 0), after as many tokens as the dense model's, at the last
    verdict    one of verdict.AGREES, DISAGREES, UNDECIDED; words: the answer, a sentence each
    missing    seed → why it has no curves;  bigram: {loss}, and arms not below it;  notes
    environment

Everything but words follows from metrics.jsonl and config.json of the runs. No NaN.
"""

import dataclasses
import math

from olmoe_jax.studies import crossings, equality, plans, report, statistics, verdict
from olmoe_jax.training import metrics, preflight, runs

DATA, PAGE, PICTURE = "compare.json", "report.html", "compare.png"
UPCYCLED, SCRATCH, DENSE = ARMS = ("upcycled", "scratch", "dense")
LOSS = "validation/loss"
PAPER = (
    "OLMoE (arXiv 2409.02060, figure 8): from scratch catches up after about 500 B tokens, 25 % of "
    "the dense model's 2 T, and is ahead from about 600 B on"
)
DEFINITIONS = (
    f"Catch-up: the first place at which scratch's validation loss is at most {crossings.MARGIN:g} "
    "nats above upcycled's at the same place. Overtaking: the last place from which on it is not "
    "above it any more. Between validations losses are linear in the logarithm of the place."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Finished runs, and what follows from them.

    Attributes:
      plan: the plans.Plan.
      found: (arm, seed) → results.Run.
      budgets: seed → crossings.Budget of the dense model.
      summaries: (axis, kind) → crossings.Summary.
      content: what compare.json holds.
    """

    plan: plans.Plan
    found: dict
    budgets: dict
    summaries: dict
    content: dict


def make(plan, *, dense_tokens=None, protocol=None, notes=(), announce=print) -> Comparison:
    """Judges a comparison whose runs are all done.

    Args:
      plan: a plans.Plan of a study with the arms "upcycled", "scratch" and, unless the dense model
        was there already, "dense".
      dense_tokens: of a dense model that was there; None: not known.
      protocol: the protocol.Protocol that the runs follow, or None.
      notes: lines that a reader should know.
    """
    found = report.read_runs(plan)
    missing = {
        seed: f"{bad[0].arm} diverged ({bad[0].problem})"
        for seed in plan.seeds
        if (bad := [found[arm, seed] for arm in plan.configs if found[arm, seed].problem])
    }
    usable = [seed for seed in plan.seeds if seed not in missing]
    budgets = {seed: _budget(plan, found, seed, dense_tokens) for seed in usable}
    pairs = {seed: (found[UPCYCLED, seed], found[SCRATCH, seed]) for seed in usable}
    summaries = crossings.compare(pairs, budgets) if pairs else {}
    leads = {
        "start": _lead(pairs, 0),
        "budget": _budget_lead(pairs, budgets),
        "end": _lead(pairs, -1),
    }
    bigram_loss = report.bigram_baseline(plan, announce)["validation/bigram_loss"]
    mine = {arm: [found[arm, seed] for seed in plan.seeds] for arm in plan.configs}
    weak = [arm for arm, each in mine.items() if not verdict.is_below(bigram_loss, each)]
    judged = judge(summaries, leads["budget"], missing, weak)
    notes = (*notes, *_order_notes(plan, announce))
    content = {
        "study": plan.study.name,
        "scale": plan.scale,
        "data": next(iter(plan.configs.values())).data.path,
        "seeds": list(plan.seeds),
        "variant": plan.study.variant,
        "paper": PAPER,
        "margin": crossings.MARGIN,
        "definitions": DEFINITIONS,
        "learning_rates": {a: c.optimizer.learning_rate for a, c in plan.configs.items()},
        "protocol": protocol is not None,
        "dense": {str(seed): dataclasses.asdict(b) for seed, b in budgets.items()},
        "runs": {arm: _runs(plan, found, arm) for arm in plan.configs},
        "curves": {arm: {str(s): curves(found[arm, s]) for s in usable} for arm in plan.configs},
        "crossings": _plain_summaries(summaries),
        "lead": {
            end: {"each": {str(seed): gap for seed, gap in each.items()}}
            | _ends(statistics.t_interval(list(each.values())) if each else None, log=False)
            for end, each in leads.items()
        },
        "verdict": judged,
        "words": words(plan, summaries, leads, missing, weak, judged),
        "missing": {str(seed): why for seed, why in missing.items()},
        "bigram": {"loss": bigram_loss, "not_below": weak},
        "notes": list(notes),
        "environment": runs.read_config(next(iter(found.values())).path)[1].get("environment"),
    }
    return Comparison(plan=plan, found=found, budgets=budgets, summaries=summaries, content=content)


def _budget(plan, found, seed, dense_tokens):
    """The dense model's Budget of a seed."""
    if DENSE in plan.configs:
        return crossings.budget_of(found[DENSE, seed])
    if dense_tokens is None:
        return crossings.Budget()
    dense = plan.study.configs(plan.scale)[SCRATCH]
    model = dataclasses.replace(dense.model, num_experts=0, num_experts_per_token=0,
                                normalize_expert_weights=False)  # fmt: skip
    flops = equality.cost(dataclasses.replace(dense, model=model)).flops_per_token
    return crossings.Budget(tokens=dense_tokens, flops=dense_tokens * flops)


def curves(run) -> dict:
    """A run's validations for compare.json: places, and every loss and bits per byte."""
    tokens = run.curve(LOSS).tokens
    out = {
        "step": [round(t / run.config.tokens_per_step) for t in tokens],
        **{axis: crossings.places(run, LOSS, axis).tolist()
           for axis in ("tokens", "flops", "seconds")},
    }  # fmt: skip
    for name, curve in run.curves.items():
        if name.endswith(("/loss", "/bits_per_byte")) and name.startswith("validation/"):
            out[name] = curve.values.tolist()
    return out


def _runs(plan, found, arm):
    each = {}
    for seed in plan.seeds:
        run = found[arm, seed]
        final = None if run.problem else {
            name: run.final(name) for name in (LOSS, "validation/bits_per_byte")
            if name in run.curves
        }  # fmt: skip
        each[str(seed)] = {"tokens_per_second": run.tokens_per_second, "final": final,
                           "diverged": run.problem}  # fmt: skip
    return each


def _lead(pairs, at):
    """seed → scratch − upcycled at a validation, by its place in the list."""
    return {
        seed: float(scratch.curve(LOSS).values[at] - upcycled.curve(LOSS).values[at])
        for seed, (upcycled, scratch) in pairs.items()
    }


def _budget_lead(pairs, budgets):
    """seed → scratch − upcycled after as many tokens as the dense model's, where that is known."""
    found = {}
    for seed, pair in pairs.items():
        curves = ((run.curve(LOSS).tokens, run.curve(LOSS).values) for run in pair)
        x, gap = crossings.lead(*curves)
        budget = budgets[seed].tokens
        value = None if budget is None else crossings.lead_at(x, gap, budget)
        if value is not None:
            found[seed] = value
    return found


def _ends(interval, *, log=True):
    """An Interval for JSON: mean, low, high, n; of logarithms turned back."""
    if interval is None:
        return {"mean": None, "low": None, "high": None, "n": 0}
    values = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    if log:
        values = {k: None if v is None else math.exp(v) for k, v in values.items()}
    return values | {"n": interval.n}


def _plain_summaries(summaries):
    out = {}
    for (axis, kind), summary in summaries.items():
        out.setdefault(axis, {})[kind] = {
            "each": {str(seed): dataclasses.asdict(c) for seed, c in summary.each.items()},
            **_ends(summary.interval),
            "shares": {str(seed): share for seed, share in summary.shares.items()},
            "share": _ends(summary.share),
        }
    return out


def judge(summaries, budget_leads, missing, weak) -> str:
    """Whether the paper's finding shows: from scratch catches up within the dense budget.

    By the interval over seeds of the catch-up's share of the dense model's tokens, if it lies on
    one side of 1. Where no seed has caught up within that budget, and some not at all, by the lead
    at the budget: its whole interval must be above the margin. Runs of one seed, diverged ones, and
    models no better than a bigram model decide nothing.
    """
    summary = summaries.get(("tokens", crossings.CATCH_UP))
    if summary is None or missing or weak:
        return verdict.UNDECIDED
    if summary.share is not None and summary.share.low is not None:
        if summary.share.high < 0:
            return verdict.AGREES
        return verdict.DISAGREES if summary.share.low > 0 else verdict.UNDECIDED
    behind = all(share > 1 for share in summary.shares.values())
    if behind and len(budget_leads) == len(summary.each) > 1:
        interval = statistics.t_interval(list(budget_leads.values()))
        return verdict.DISAGREES if interval.low > crossings.MARGIN else verdict.UNDECIDED
    return verdict.UNDECIDED


def words(plan, summaries, leads, missing, weak, judged) -> list[str]:
    """The answer, a sentence each."""
    reason = f" ({' and '.join(weak)} not below a bigram model)" if weak else ""
    out = [
        "Is the paper's finding seen, that training from scratch catches up within the dense "
        f"model's budget? {judged[0].upper()}{judged[1:]}{reason}. {PAPER}."
    ]
    if len(plan.seeds) == 1:
        out.append("One seed gives no interval and decides nothing.")
    for seed, why in missing.items():
        out.append(f"Seed {seed} has no curves: {why}.")
    if not summaries:
        return [*out, "No seed has all runs: nothing can be compared."]
    out.append(_lead_words(leads))
    for axis in crossings.AXES:
        for kind in crossings.KINDS:
            if (axis, kind) in summaries:
                out.append(_crossing_words(summaries[axis, kind]))
    unknown = [axis for axis in crossings.AXES if (axis, crossings.CATCH_UP) not in summaries]
    if unknown:
        out.append(f"What the dense model has cost is not known, so {', '.join(unknown)} are left "
                   "out.")  # fmt: skip
    if summaries["tokens", crossings.CATCH_UP].budgets == {}:
        out.append("The dense model's tokens are not known, so no share of its budget is stated.")
    return out


def _lead_words(leads):
    parts = []
    for end, text in (
        ("start", "before the first update"),
        ("budget", "after as many tokens as the dense model's"),
        ("end", "at the end"),
    ):
        if not leads[end]:
            continue
        interval = statistics.t_interval(list(leads[end].values()))
        spread = ""
        if interval.low is not None:
            spread = f" (95 % interval {interval.low:+.4f} to {interval.high:+.4f})"
        parts.append(f"{text} {interval.mean:+.4f}{spread}")
    return f"Scratch's validation loss minus upcycled's, in nats: {', '.join(parts)}."


_DID = {crossings.CATCH_UP: ("catches up with", "caught up with"),
        crossings.OVERTAKING: ("overtakes", "overtaken")}  # fmt: skip


def _crossing_words(summary):
    """One kind of crossing on one axis as a sentence."""
    does, done = _DID[summary.kind]
    where = summary.axis.replace("_with_dense", ", the dense model's training included")
    reached = {s: c for s, c in summary.each.items() if c.place is not None}
    without = {s: c for s, c in summary.each.items() if c.place is None}
    parts = []
    if summary.interval is not None:
        n = f"n = {len(reached)} {'seed' if len(reached) == 1 else 'seeds'}"
        place, spread = _interval_words(summary.interval, summary.axis)
        text = f"scratch {does} upcycled after {place} ({spread}{n})"
        if summary.share is not None:
            share, ends = _interval_words(summary.share, None)
            text += f", {share} of the dense model's" + (f" ({ends[:-2]})" if ends else "")
        parts.append(text)
    elif reached:
        listed = ", ".join(f"{shown(c.place, summary.axis)} (seed {s})" for s, c in reached.items())
        parts.append(f"scratch {does} upcycled after {listed}")
    bounds = [str(s) for s, c in reached.items() if c.at_most]
    if bounds:
        parts.append(
            f"it was there where both curves begin, so at most that, with seed {', '.join(bounds)}"
        )
    if without:
        ends = [c.end for c in without.values()]
        if None in ends:
            limit = "as its run ends before the upcycled one begins"
        else:
            limit = f"within {shown(min(ends), summary.axis)}"
            budget = [summary.budgets.get(s) for s in without]
            if None not in budget:
                share = min(c.end / summary.budgets[s] for s, c in without.items())
                limit += f", {share:.0%} of the dense model's"
        seeds = ", ".join(str(s) for s in without)
        parts.append(
            f"scratch has not {done} upcycled {limit} with seed {seeds}: no interval, and nothing "
            "is extrapolated"
        )
    return f"By {where}: {'; '.join(parts)}."


def _interval_words(interval, axis):
    """(the mean, its interval in words with a comma behind); shares if `axis` is None."""

    def text(log):
        return f"{math.exp(log):.0%}" if axis is None else shown(math.exp(log), axis)

    if interval.low is None:
        return text(interval.mean), ""
    return text(interval.mean), f"95 % interval {text(interval.low)} to {text(interval.high)}, "


def shown(value, axis) -> str:
    """A place on an axis, for a person."""
    unit = crossings.UNITS[axis]
    if unit == "seconds":
        return metrics.duration(value)
    return (
        f"{preflight.si(value)}FLOP" if unit == "FLOPs" else f"{preflight.si(value).strip()} tokens"
    )


def _order_notes(plan, announce):
    """Says how much of what the MoE runs read had been read before."""
    config = plan.config(SCRATCH, plan.seeds[0])
    data = runs.open_data(config, plan.path(SCRATCH, plan.seeds[0]), announce)
    windows, batch = data.num_windows("train"), config.training.batch_size
    begin = config.data.start_step * batch
    end = begin + config.training.num_steps * batch
    if end <= windows:
        return ()
    return (
        f"the training data hold {windows:,} windows, the MoE runs read those from {begin:,} to "
        f"{end:,} of an endless order: some of them again, which favours the upcycled run as far "
        "as its dense model had read them",
    )
