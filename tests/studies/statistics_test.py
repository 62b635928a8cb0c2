import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from olmoe_jax.studies import statistics


def test_interval_is_the_paired_t_tests():
    rng = np.random.default_rng(0)
    one, two = rng.normal(3, 1, 7), rng.normal(2.8, 1, 7)
    interval = statistics.t_interval(one - two)
    test = stats.ttest_rel(one, two)
    want = test.confidence_interval(0.95)
    np.testing.assert_allclose((interval.low, interval.high), (want.low, want.high), rtol=1e-9)
    assert interval.excludes_zero == (test.pvalue < 0.05)


def test_one_value_has_no_interval_and_excludes_nothing():
    interval = statistics.t_interval([-3.0])
    assert (interval.mean, interval.low, interval.high, interval.n) == (-3.0, None, None, 1)
    assert not interval.excludes_zero and not interval.within(100)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="finite"):
        statistics.t_interval(values)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(1)
    draws = rng.normal(0, 1, (4000, 4))
    missed = np.mean([statistics.t_interval(values).excludes_zero for values in draws])
    assert abs(missed - 0.05) < 0.011  # three standard deviations of the count


def test_power_is_the_share_of_intervals_that_exclude_zero():
    rng = np.random.default_rng(2)
    draws = rng.normal(0.8, 1, (4000, 9))
    excluded = np.mean([statistics.t_interval(values).excludes_zero for values in draws])
    assert abs(statistics.power(0.8, 1, 9) - excluded) < 0.025


def test_as_many_seeds_as_power_needs():
    n = statistics.seeds_to_decide(0.3, 0.5)
    assert statistics.power(0.3, 0.5, n) >= 0.8 > statistics.power(0.3, 0.5, n - 1)
    assert statistics.seeds_to_decide(1e6, 1.0) == 2
    assert statistics.seeds_to_decide(0.0, 0.5) is None


@pytest.mark.parametrize("n", [2, 3, 40])
def test_the_effect_that_seeds_show_is_what_takes_that_many(n):
    effect = statistics.shown_effect(0.02, n)
    assert statistics.power(effect, 0.02, n) == pytest.approx(statistics.POWER, abs=1e-4)
    assert statistics.seeds_to_decide(effect, 0.02) == n
    assert statistics.shown_effect(0.0, n) == 0


def test_spread_is_pooled_within_groups():
    sd, freedom = statistics.pooled_sd([[0.0, 2.0], [101.0, 101.0, 104.0], [7.0]])
    assert freedom == 3 and sd == pytest.approx(math.sqrt((2 + 6) / 3))
    with pytest.raises(ValueError, match="two seeds"):
        statistics.pooled_sd([[1.0]])


def test_a_crossing_lies_where_a_line_on_the_log_axis_meets_zero():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    assert statistics.crossing(x, 1.5 - np.log10(x)) == pytest.approx(10**1.5)
    assert statistics.crossing(x, [2.0, 1.0, 0.0, -1.0]) == pytest.approx(100)


def test_first_and_lasting_crossing_of_a_curve_that_comes_back():
    x, gap = [1.0, 2.0, 4.0, 8.0], [1.0, -1.0, 1.0, -3.0]
    assert statistics.crossing(x, gap) == pytest.approx(math.sqrt(2))
    assert statistics.crossing(x, gap, lasting=True) == pytest.approx(4 * 2**0.25)
    assert statistics.crossing(x, [1.0, -1.0, -1.0, 2.0], lasting=True) is None


def test_nothing_is_extrapolated():
    assert statistics.crossing([1.0, 2.0], [2.0, 1.0]) is None
    assert statistics.crossing([3.0, 4.0], [-1.0, -2.0]) == 3.0


@pytest.mark.parametrize("freedom", [1, 4])
def test_the_true_spread_lies_below_its_bound_as_often_as_said(freedom):
    drawn = np.random.default_rng(0).normal(0, 0.3, (20_000, freedom + 1)).std(1, ddof=1)
    bounds = np.array([statistics.sd_bound(sd, freedom) for sd in drawn])
    assert (bounds > 0.3).mean() == pytest.approx(statistics.SD_CONFIDENCE, abs=0.01)


@pytest.mark.parametrize(
    ("x", "gap"),
    [([], []), ([0.0, 1.0], [1.0, 0.0]), ([2.0, 1.0], [1.0, 0.0]), ([1.0], [math.nan])],
)
def test_a_crossing_of_no_curve_is_refused(x, gap):
    with pytest.raises(ValueError, match="a crossing needs"):
        statistics.crossing(x, gap)


@hypothesis.given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.floats(0.01, 100), st.booleans()
)
def test_a_crossing_scales_with_its_axis(gap, unit, lasting):
    x = np.arange(1, len(gap) + 1) * 1.5
    found = statistics.crossing(x, gap, lasting=lasting)
    scaled = statistics.crossing(unit * x, gap, lasting=lasting)
    assert (found is None) == (scaled is None)
    assert found is None or scaled == pytest.approx(unit * found, rel=1e-9)


def test_document_bootstrap_is_the_standard_error_of_a_ratio():
    rng = np.random.default_rng(3)
    targets = rng.integers(20, 200, 400)
    baseline = targets * rng.normal(3, 0.5, 400)
    nats = baseline - targets * rng.normal(0.5, 0.1, 400)
    interval = statistics.document_bootstrap(nats, baseline, targets)
    residual = (nats - baseline) - interval.mean * targets
    error = math.sqrt(400 * residual.var(ddof=1)) / targets.sum()
    assert interval.sd == pytest.approx(error, rel=0.1)
    assert interval.low < interval.mean < interval.high and interval.n == 400
