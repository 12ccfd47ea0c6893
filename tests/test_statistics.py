"""Intervals of means against tables and worked examples from outside."""

import math

import numpy as np
import pytest
from scipy import stats

from posjax.statistics import difference, summary


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_half_width_is_that_of_the_table(count, quantile):
    values = np.arange(float(count))  # variance n (n + 1) / 12
    found = summary(values)
    deviation = math.sqrt(count * (count + 1) / 12)
    assert found.count == count and found.mean == (count - 1) / 2
    assert found.deviation == pytest.approx(deviation)
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(quantile * deviation / math.sqrt(count), rel=3e-4)
    assert (high + low) / 2 == pytest.approx(found.mean)


def test_one_value_has_no_interval_and_none_no_mean():
    assert summary([3.5]) == (1, 3.5, None, None)
    assert summary([]) == (0, None, None, None)
    assert summary([2.0, 2.0, 2.0]) == (3, 2.0, 0.0, (2.0, 2.0))


def test_intervals_hold_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(7.0, 3.0, (2000, 3))
    share = np.mean([low <= 7.0 <= high for low, high in (summary(row).interval for row in draws)])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_welch_in_closed_form():
    # Equal sizes and variances: Welch is Student's pooled interval with 2 (n - 1) degrees of freedom; t_{0.975, 8} = 2.306.
    found = difference([1.0, 2.0, 3.0, 4.0, 5.0], [11.0, 12.0, 13.0, 14.0, 15.0])
    assert found.mean == -10.0
    low, high = found.interval
    assert (low, high) == pytest.approx((-10 - 2.306, -10 + 2.306), abs=1e-3)  # the standard error is sqrt(2.5 * 2 / 5) = 1
    # One of the two without any spread: that of the other alone, t_{0.975, 4}.
    low, high = difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0]).interval
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-4)
    assert difference([2.0, 2.0], [1.0, 1.0, 1.0]) == (1.0, (1.0, 1.0))


def test_welch_of_unequal_samples_against_scipy():
    draw = np.random.default_rng(1).normal
    first, second = draw(2.0, 0.5, 4), draw(1.0, 3.0, 9)
    wanted = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = difference(first, second)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert found.interval == pytest.approx((wanted.low, wanted.high))


def test_pairs_take_out_what_a_seed_does_to_both():
    second = np.array([10.0, 50.0, 90.0])
    first = second + np.array([1.0, 2.0, 3.0])
    low, high = difference(first, second, paired=True).interval
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)
    low, high = difference(first, second).interval
    assert low < -80 and high > 80
    assert difference([3.0], [1.0], paired=True) == difference([3.0], [1.0]) == (2.0, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summary([1.0, float("nan")]), "values must be finite, got nan; leave diverged seeds out"),
        (lambda: summary([[1.0]]), r"values must have one axis, a value for each seed, got shape \(1, 1\)"),
        (lambda: difference([], [1.0]), "at least one value each, got 0 and 1"),
        (lambda: difference([1.0, 2.0], [1.0], paired=True), "one value for each seed where paired, got 2 and 1"),
        (lambda: difference([1.0], [float("inf")]), "second must be finite, got inf"),
    ],
)
def test_what_cannot_be_told_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
