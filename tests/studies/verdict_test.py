import dataclasses
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from olmoe_jax.studies import declaration, results, scales, statistics, verdict
from tests.studies import synthetic


def _runs(folder, losses, **options):
    """(arm, seed) → Run of {arm: [losses of seed 1, of seed 2, …]}."""
    runs = {}
    for arm, curves in losses.items():
        for seed, curve in enumerate(curves, start=1):
            path = folder / arm / f"seed_{seed}"
            synthetic.write_run(path, seed, curve, **options)
            runs[arm, seed] = results.read_run(path, arm, seed)
    return runs


def _ending(folder, **ends):
    """Runs of arms whose losses end at the given values, one per seed."""
    return _runs(folder, {arm: [synthetic.falling(e) for e in ends[arm]] for arm in ends})


def test_a_planted_worse_arm_is_declared_worse(tmp_path):
    runs = _ending(tmp_path, new=[4.20, 4.31, 4.22], old=[4.00, 4.10, 4.03])
    finding = verdict.judge(synthetic.outcome(expected="lower"), runs)
    assert finding.interval.low > 0 and finding.agreement == verdict.DISAGREES
    assert "new ends with a higher validation/loss than old" in finding.words
    assert verdict.judge(synthetic.outcome(expected="higher"), runs).agreement == verdict.AGREES
    asked = verdict.judge(synthetic.outcome(expected=None), runs)
    assert asked.agreement == f"{verdict.DECIDED}: higher"
    own = synthetic.outcome(expected="higher", paper="")
    assert verdict.judge(own, runs).agreement == verdict.AS_EXPECTED


def test_two_identical_arms_do_not_differ_in_19_of_20_repeats(tmp_path):
    """Judged from files: 20 repeats; then from many, without files, to see that it is no luck."""
    rng = np.random.default_rng(1)
    decided = 0
    for repeat in range(20):
        ends = {arm: rng.normal(4, 0.05, 4) for arm in ("new", "old")}
        runs = _ending(tmp_path / str(repeat), **ends)
        finding = verdict.judge(synthetic.outcome(smallest_effect=1e-3), runs)
        decided += finding.interval.excludes_zero
        assert finding.interval.excludes_zero == (finding.agreement != verdict.UNDECIDED)
    assert decided <= 1
    decided, repeats = 0, 1000
    for _ in range(repeats):
        for key, run in runs.items():
            curve = results.Curve(tokens=np.ones(1), values=rng.normal(4, 0.05, 1))
            runs[key] = dataclasses.replace(run, curves={"validation/loss": curve})
        decided += verdict.judge(synthetic.outcome(), runs).interval.excludes_zero
    assert abs(decided / repeats - 0.05) < 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_the_same_runs_twice_are_equal(tmp_path):
    runs = _ending(tmp_path, new=[4.2, 4.1], old=[4.2, 4.1])
    finding = verdict.judge(synthetic.outcome(expected="equal"), runs)
    assert finding.interval.mean == 0 and finding.agreement == verdict.AGREES
    assert verdict.judge(synthetic.outcome(), runs).agreement == verdict.DISAGREES
    asked = verdict.judge(synthetic.outcome(expected=None), runs)
    assert asked.agreement == f"{verdict.DECIDED}: equal"


def test_the_verdict_is_recomputed_from_the_metrics_files(tmp_path):
    rng = np.random.default_rng(1)
    runs = _ending(tmp_path, new=rng.normal(3.9, 0.05, 6), old=rng.normal(4, 0.05, 6))
    finding = verdict.judge(synthetic.outcome(), runs)
    last = {}
    for arm in ("new", "old"):
        files = [tmp_path / arm / f"seed_{seed}" / "metrics.jsonl" for seed in range(1, 7)]
        last[arm] = [json.loads(f.read_text().splitlines()[-1])["validation/loss"] for f in files]
    want = stats.ttest_rel(last["new"], last["old"])
    ends = want.confidence_interval(0.95)
    assert finding.interval.mean == pytest.approx(np.mean(last["new"]) - np.mean(last["old"]))
    assert (finding.interval.low, finding.interval.high) == pytest.approx((ends.low, ends.high))
    assert f"interval {ends.low:+.4f} to {ends.high:+.4f}, n = 6 seeds" in finding.words


def test_undecided_says_how_many_seeds_would_decide(tmp_path):
    runs = _ending(tmp_path, new=[4.00, 4.20, 4.02, 3.9], old=[4.03, 4.10, 4.04, 4.0])
    finding = verdict.judge(synthetic.outcome(), runs)
    assert finding.agreement == verdict.UNDECIDED and finding.seeds_needed > 4
    assert f"about {finding.seeds_needed} seeds" in finding.words
    (shown,) = re.findall(r"with these 4, effects from about (.*?) nats per tok", finding.words)
    power = statistics.power(float(shown), finding.interval.sd, 4)
    assert power == pytest.approx(statistics.POWER, abs=0.01)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    finding = verdict.judge(synthetic.outcome(), _ending(tmp_path, new=[3.0], old=[4.0]))
    assert finding.interval.low is None and finding.agreement == verdict.UNDECIDED
    assert "one seed gives no interval" in finding.words
    assert finding.words.startswith("validation/loss of new − old: -1.0000 nats")


def test_small_differences_are_equal_only_if_the_interval_says_so(tmp_path):
    runs = _ending(tmp_path, new=[4.001, 4.103, 4.202], old=[4.0, 4.1, 4.2])
    equal = synthetic.outcome(expected="equal", smallest_effect=0.01)
    assert verdict.judge(equal, runs).agreement == verdict.AGREES
    strict = dataclasses.replace(equal, smallest_effect=0.0001)
    assert verdict.judge(strict, runs).agreement == verdict.UNDECIDED
    runs = _ending(tmp_path / "far", new=[5.0, 5.1, 5.21], old=[4.0, 4.1, 4.2])
    assert verdict.judge(equal, runs).agreement == verdict.DISAGREES


def test_an_effect_that_is_surely_below_the_smallest_is_equal_or_small(tmp_path):
    runs = _ending(tmp_path, new=[4.002, 4.1021, 4.2019], old=[4.0, 4.1, 4.2])
    agreement = {
        expected: verdict.judge(synthetic.outcome(expected=expected), runs).agreement
        for expected in ("higher", "equal", "lower", None)
    }
    assert agreement == {
        "higher": verdict.AGREES, "equal": verdict.AGREES, "lower": verdict.DISAGREES,
        None: f"{verdict.DECIDED}: equal",
    }  # fmt: skip
    finding = verdict.judge(synthetic.outcome(), runs)
    assert finding.interval.low > 0 and "no difference as large as 0.01 nats" in finding.words


def test_a_ratio_near_one_says_how_near(tmp_path):
    runs = _ending(tmp_path, new=[4.0, 4.0], old=[4.0, 4.0])
    finding = verdict.judge(synthetic.outcome(measure="tokens", smallest_effect=0.05), runs)
    assert "no difference as large as a ratio of 1.05." in finding.words


@pytest.mark.parametrize(("measure", "factor"), [("tokens", 1.0), ("flops", None), ("seconds", 2)])
def test_cost_to_the_same_loss_is_a_ratio_per_seed(tmp_path, measure, factor):
    """Losses fall linearly in steps; new falls twice as fast and is twice as slow per token."""
    base = scales.BASES["smoke"]
    wide = declaration.changed(base, {"model.d_ff": 24})
    runs = _runs(tmp_path, {"old": [synthetic.falling(4.0)] * 2}, config=base)
    fast = {"new": [synthetic.falling(2.0), synthetic.falling(2.1)]}
    runs |= _runs(tmp_path, fast, config=wide, tokens_per_second=500.0)
    finding = verdict.judge(synthetic.outcome(measure=measure), runs)
    if factor is None:
        factor = verdict.flops_per_token(runs["new", 1]) / verdict.flops_per_token(runs["old", 1])
        assert factor > 1.1
    assert math.exp(finding.effects[1]) == pytest.approx(0.5 * factor, rel=0.01)
    assert f"× its {measure}" in finding.words


def test_models_no_better_than_bigrams_say_nothing_about_a_paper(tmp_path):
    runs = _ending(tmp_path, new=[3.0, 3.1, 3.2], old=[4.0, 4.2, 4.1])
    assert verdict.judge(synthetic.outcome(), runs, bigram_loss=4.3).agreement == verdict.AGREES
    finding = verdict.judge(synthetic.outcome(), runs, bigram_loss=4.15)
    assert finding.agreement == verdict.UNDECIDED and finding.interval.excludes_zero
    assert "old not below a bigram model (4.1500)" in finding.words
    own = verdict.judge(synthetic.outcome(paper=""), runs, bigram_loss=4.15)
    assert own.agreement == verdict.AS_EXPECTED


def test_a_loss_that_is_not_reached_is_not_extrapolated(tmp_path):
    runs = _ending(tmp_path, new=[4.5, 3.0, 3.1], old=[4.0, 4.0, 4.0])
    finding = verdict.judge(synthetic.outcome(measure="tokens"), runs)
    assert list(finding.missing) == [1] and sorted(finding.effects) == [2, 3]
    assert finding.agreement == verdict.UNDECIDED and "nothing is extrapolated" in finding.words


def test_a_loss_reached_by_the_first_validation_is_an_upper_bound_and_said_to_be(tmp_path):
    curves = {"new": [[6, 3.9, 3.0], [6, 5.0, 3.9]], "old": [[6, 5.0, 4.0], [6, 5.0, 4.0]]}
    finding = verdict.judge(synthetic.outcome(measure="tokens"), _runs(tmp_path, curves))
    assert math.exp(finding.effects[1]) == pytest.approx(0.5)
    assert "by the first validation, so at most that, with seed 1." in finding.words


def test_a_diverged_run_decides_nothing_and_is_named(tmp_path):
    runs = _ending(tmp_path, new=[4.1, 4.2, 4.3], old=[4.0, 4.0, 4.0])
    runs["new", 2] = dataclasses.replace(runs["new", 2], problem="step 7: loss nan")
    finding = verdict.judge(synthetic.outcome(), runs)
    assert "new diverged (step 7: loss nan)" in finding.words
    assert finding.agreement == verdict.UNDECIDED and sorted(finding.effects) == [1, 3]


def test_documents_are_bootstrapped_apart(tmp_path):
    runs = _ending(tmp_path, new=[4.1, 4.2], old=[4.0, 4.1])
    assert verdict.judge(synthetic.outcome(), runs).documents is None
    rng = np.random.default_rng(2)
    targets = rng.integers(5, 50, 30)
    for (arm, _), run in runs.items():
        nats = targets * (4.1 if arm == "new" else 4.0) + rng.normal(0, 0.5, 30)
        np.savez(run.path / results.DOCUMENTS, documents=np.arange(30), nats=nats, targets=targets)
    interval = verdict.judge(synthetic.outcome(), runs).documents
    assert interval.n == 30 and interval.low < 0.1 < interval.high < 0.2
    for run in runs.values():  # too few documents to draw from
        few = {name: values[:19] for name, values in results.read_documents(run.path).items()}
        np.savez(run.path / results.DOCUMENTS, **few)
    assert verdict.judge(synthetic.outcome(), runs).documents is None
