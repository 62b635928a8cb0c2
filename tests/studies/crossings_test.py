import dataclasses
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from scipy import stats

from olmoe_jax import accounting
from olmoe_jax.studies import crossings, results
from olmoe_jax.studies.crossings import CATCH_UP, MARGIN, OVERTAKING, Budget
from tests.studies import synthetic

ROUNDING = 1e-9


def _find(upcycled, scratch, kind):
    return crossings.find(*crossings.lead(upcycled, scratch), kind)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=25)
@hypothesis.given(
    strategies.lists(strategies.floats(0.2, 9), min_size=2, max_size=9, unique=True),
    strategies.lists(strategies.floats(0.2, 9), min_size=2, max_size=9, unique=True),
    strategies.floats(0.5, 8),
    strategies.floats(0.1, 3),
)
def test_curves_of_known_form_cross_where_they_do_however_they_are_sampled(logs, others, at, slope):
    """lead = slope · (at − log x) is linear in log x, so the crossing is exact on any grid."""
    logs, others = (np.unique(np.round(grid, 3)) for grid in (logs, others))
    hypothesis.assume(min(len(logs), len(others)) > 1)
    hypothesis.assume(max(logs[0], others[0]) < min(logs[-1], others[-1]) - 0.01)
    upcycled = (np.exp(logs), 4 - 0.3 * logs)
    scratch = (np.exp(others), 4 - 0.3 * others + slope * (at - others))
    begin, end = max(logs[0], others[0]), min(logs[-1], others[-1])
    for kind, wanted in ((CATCH_UP, at - MARGIN / slope), (OVERTAKING, at)):
        if min(abs(wanted - begin), abs(wanted - end)) < 1e-6:
            continue
        found = _find(upcycled, scratch, kind)
        assert (math.log(found.begin), math.log(found.end)) == pytest.approx((begin, end))
        if wanted > end:
            assert found.place is None and not found.at_most
        elif wanted < begin:
            assert found.place == found.begin and found.at_most
        else:
            assert math.log(found.place) == pytest.approx(wanted, abs=ROUNDING)
            assert not found.at_most


def test_catch_up_is_the_first_place_within_the_margin_and_overtaking_the_last():
    x = np.array([0.0, 1, 2, 3, 4, 5, 6])
    scratch = np.array([9, 1.0, 0.3, MARGIN / 2, 0.2, -0.1, -0.2])
    upcycled = np.zeros(7)
    first, last = (_find((x, upcycled), (x, scratch), kind) for kind in (CATCH_UP, OVERTAKING))
    share = (0.3 - MARGIN) / (0.3 - MARGIN / 2)
    assert first.place == pytest.approx(2 * (3 / 2) ** share)
    assert last.place == pytest.approx(4 * (5 / 4) ** (2 / 3))
    ends_behind = np.array([9, 1.0, 0.3, -0.1, -0.2, -0.1, 0.001])
    assert _find((x, upcycled), (x, ends_behind), OVERTAKING).place is None
    assert _find((x, upcycled), (x, ends_behind), CATCH_UP).place < 3


def test_curves_that_do_not_overlap_are_not_compared():
    early, late = (np.array([1.0, 2.0]), np.ones(2)), (np.array([3.0, 4.0]), np.zeros(2))
    assert _find(late, early, CATCH_UP) == crossings.Crossing(place=None)


def _pair(folder, seed, upcycled, scratch, speeds=(1000.0, 500.0)):
    out = []
    for arm, losses, speed in (("upcycled", upcycled, speeds[0]), ("scratch", scratch, speeds[1])):
        path = folder / arm / f"seed_{seed}"
        synthetic.write_run(path, seed, losses, tokens_per_second=speed)
        out.append(results.read_run(path, arm, seed))
    return tuple(out)


def test_every_axis_has_its_unit_and_the_dense_models_part(tmp_path):
    upcycled, scratch = _pair(tmp_path, 1, [5.0, 4.5, 4.4, 4.3], [7.0, 5.0, 4.2, 4.0])
    tokens = np.array([0, 4, 8, 12]) * 8 * 32
    flops = accounting.flops_per_token(upcycled.config.model, 32).training
    dense = Budget(tokens=100.0, flops=3e6, seconds=2.5)
    wanted = {
        "tokens": tokens, "flops": tokens * flops, "flops_with_dense": tokens * flops + 3e6,
        "seconds": tokens / 1000, "seconds_with_dense": tokens / 1000 + 2.5,
    }  # fmt: skip
    assert set(wanted) == set(crossings.AXES)
    for axis, places in wanted.items():
        found = crossings.places(upcycled, "validation/loss", axis, dense)
        np.testing.assert_allclose(found, places)
    np.testing.assert_allclose(
        crossings.places(scratch, "validation/loss", "seconds_with_dense"), tokens / 500
    )
    assert crossings.places(upcycled, "validation/loss", "flops_with_dense", Budget()) is None
    whole = crossings.budget_of(scratch)
    assert (whole.tokens, whole.flops, whole.seconds) == pytest.approx(
        (3072, 3072 * flops, 3072 / 500)
    )


def test_seconds_are_those_of_every_step_and_the_median_of_those_not_logged(tmp_path):
    upcycled, _ = _pair(tmp_path, 1, [5.0, 4.0], [6.0, 5.0])
    path = upcycled.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace("1000.0", "25.6")  # 256 tokens: compiled for 10 s
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    run = results.read_run(upcycled.path, "upcycled", 1)
    np.testing.assert_allclose(run.step_seconds, [10, 0.256, 0.256, 0.256])
    at = crossings.places(run, "validation/loss", "seconds")
    np.testing.assert_allclose(at, [0, 10 + 3 * 0.256])


def test_with_the_dense_models_cost_scratch_may_be_ahead_from_the_beginning(tmp_path):
    pair = _pair(tmp_path, 1, [5.0, 4.5, 4.4, 4.3, 4.2], [7.0, 5.5, 5.2, 4.8, 4.6])
    flops = accounting.flops_per_token(pair[0].config.model, 32).training
    dense = Budget(tokens=2048.0, flops=2048.0 * flops, seconds=1e9)
    found = crossings.compare({1: pair}, {1: dense})
    assert found["tokens", CATCH_UP].each[1].place is None
    # upcycled begins at the FLOPs of 2048 tokens with a loss of 5.0, where scratch has 5.2
    crossing = found["flops_with_dense", CATCH_UP].each[1]
    assert crossing.begin == 2048 * flops and crossing.place is None
    cheap = dataclasses.replace(dense, flops=3072.0 * flops)  # where scratch has 4.8
    crossing = crossings.compare({1: pair}, {1: cheap})["flops_with_dense", OVERTAKING].each[1]
    assert crossing.place is None  # and is behind again at the end: 4.6 against 4.5
    crossing = crossings.compare({1: pair}, {1: cheap})["flops_with_dense", CATCH_UP].each[1]
    assert crossing.place == crossing.begin == 3072 * flops and crossing.at_most
    # scratch ends after 8 s, the upcycled run begins after more than 30 years
    assert found["seconds_with_dense", CATCH_UP].each[1] == crossings.Crossing(place=None)


def test_intervals_are_of_logarithms_and_only_of_complete_seeds(tmp_path):
    flat = [5.0] + [4.0] * 10
    pairs = {
        seed: _pair(tmp_path, seed, flat, [7.0, *np.linspace(start, 3.0, 10)])
        for seed, start in enumerate([5.0, 5.5, 6.2], start=1)
    }
    budgets = {seed: Budget(tokens=2000.0 * seed) for seed in pairs}
    summary = crossings.compare(pairs, budgets)["tokens", OVERTAKING]
    places = [summary.each[seed].place for seed in pairs]
    for seed, start in enumerate([5.0, 5.5, 6.2], start=1):  # by hand: linear in steps of 4
        above = np.flatnonzero(np.linspace(start, 3.0, 10) > 4)[-1]
        one, two = np.linspace(start, 3.0, 10)[above : above + 2]
        share = (one - 4) / (one - two)
        by_hand = 1024 * (above + 1) * ((above + 2) / (above + 1)) ** share
        assert summary.each[seed].place == pytest.approx(by_hand)
    for values, interval in (
        (places, summary.interval),
        ([p / b.tokens for p, b in zip(places, budgets.values(), strict=True)], summary.share),
    ):
        want = stats.ttest_1samp(np.log(values), 0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((want.low, want.high))
        assert math.exp(interval.mean) == pytest.approx(stats.gmean(values))
    pairs[2] = _pair(tmp_path / "other", 2, flat, [7.0, *np.linspace(6, 4.2, 10)])
    summary = crossings.compare(pairs, budgets)["tokens", OVERTAKING]
    assert summary.interval is None and summary.share is None
    assert list(summary.shares) == [1, 3] and summary.each[2].end == 40 * 256


def test_a_dense_budget_that_is_not_known_leaves_out_what_needs_it(tmp_path):
    pair = _pair(tmp_path, 1, [5.0, 4.5, 4.4], [7.0, 5.0, 4.2])
    found = crossings.compare({1: pair}, {1: Budget()})
    assert {axis for axis, _ in found} == {"tokens", "flops", "seconds"}
    assert all(s.shares == {} and s.share is None for s in found.values())
