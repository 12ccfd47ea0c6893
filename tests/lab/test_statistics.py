"""Intervals of means against tables and worked examples from outside."""

import math

import numpy as np
import pytest
from scipy import stats

from posjax.lab.statistics import benjamini_hochberg, binomial_bounds, crossed_contrast, difference, sign_flips, summary, within


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
        (lambda: summary([[1.0]]), r"values must have one axis with a value per seed, got shape \(1, 1\)"),
        (lambda: difference([], [1.0]), "at least one value each, got 0 and 1"),
        (lambda: difference([1.0, 2.0], [1.0], paired=True), "the same size with paired=True, got 2 and 1"),
        (lambda: difference([1.0], [float("inf")]), "second must be finite, got inf"),
    ],
)
def test_what_cannot_be_told_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Contrasts over seeds and items


def drawn(rng, seeds, items, of_seeds, of_items, rest, effect=0.0):
    """Differences with a part of the seed, one of the item and one of both, and an effect that all share."""
    parts = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_items, (1, items)) + rng.normal(0, rest, (seeds, items))
    return parts + effect


def test_the_error_of_a_crossed_contrast_in_closed_form():
    """Owen's variance of the bootstrap of [S, I] numbers with all counts equal, from the three mean squares."""
    x = drawn(np.random.default_rng(0), 6, 40, 0.3, 0.5, 1.0, effect=2.0)
    found = crossed_contrast(x, np.zeros_like(x), np.full(40, 3.0), resamples=40_000)
    rows, columns, overall = x.mean(1), x.mean(0), x.mean()
    whole = ((x - overall) ** 2).mean()
    variance = rows.var() / 6 + columns.var() / 40 + (whole - rows.var() - columns.var()) / 240
    assert found.mean == pytest.approx(overall / 3)
    assert found.error == pytest.approx(math.sqrt(variance * 6 / 5) / 3, rel=0.02)
    assert found.freedom == 5
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(2.5706 * found.error, rel=1e-4)  # t_{0.975, 5}
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(found.mean) / found.error, 5))


@pytest.mark.parametrize(("seeds", "of_seeds", "of_items"), [(5, 0.3, 0.02), (8, 0.1, 0.3)])
def test_crossed_intervals_hold_the_truth_at_least_as_often_as_they_say(seeds, of_seeds, of_items):
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        x = drawn(rng, seeds, 32, of_seeds, of_items, 0.3, effect=1.0)
        low, high = crossed_contrast(x, np.zeros_like(x), np.ones(32), resamples=300).interval
        held += low <= 1.0 <= high
    assert held / 200 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)


def test_items_that_count_more_weigh_more():
    first = np.array([[2.0, 0.0], [2.0, 0.0]])
    found = crossed_contrast(first, np.zeros((2, 2)), np.array([2.0, 6.0]))
    assert found.mean == 0.25  # 2 of 8, where the mean of the items' means is one half


def test_a_tie_needs_both_sides_within_the_margin():
    rng = np.random.default_rng(2)
    found = crossed_contrast(drawn(rng, 5, 50, 0.1, 0.1, 0.1), np.zeros((5, 50)), np.ones(50))
    high = stats.t.sf((0.5 - found.mean) / found.error, 4)  # of "the difference is at least the margin", and of the other side
    low = stats.t.sf((0.5 + found.mean) / found.error, 4)
    assert within(found, 0.5) == pytest.approx(max(high, low)) and within(found, 1e-3) > 0.4


def test_sign_flips_are_counted():
    # Of eight choices of signs of 1, 2 and 4 only +++ and --- are as far from zero as 7.
    assert sign_flips([1.0, 2.0, 4.0]) == 2 / 8
    assert sign_flips([1.0, -2.0, 4.0]) == 6 / 8  # 3, and beyond it 5 and 7
    assert sign_flips([0.0] * 8) == 1.0
    assert sign_flips(np.linspace(1, 2, 8)) == 2 / 256
    wanted = stats.permutation_test((np.array([3.0, 1.0, -2.0, 5.0, 4.0]),), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flips([3.0, 1.0, -2.0, 5.0, 4.0]) == pytest.approx(wanted.pvalue)


@pytest.mark.parametrize(("wrong", "total"), [(0, 10), (3, 10), (10, 10), (0, 5000), (1, 100)])
def test_binomial_bounds_against_scipy(wrong, total):
    wanted = stats.binomtest(wrong, total).proportion_ci(0.95, method="exact")
    assert binomial_bounds(wrong, total) == pytest.approx((wanted.low, wanted.high))


def test_adjusted_p_values_against_scipy_and_by_hand():
    values = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert benjamini_hochberg(values) == pytest.approx(stats.false_discovery_control(values))
    assert benjamini_hochberg([0.02, 0.03]) == pytest.approx([0.03, 0.03])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossed_contrast(np.ones((2, 3)), np.ones((2, 4)), np.ones(3)), r"got \(2, 3\), \(2, 4\) and \(3,\)"),
        (lambda: crossed_contrast(np.ones((1, 3)), np.ones((1, 3)), np.ones(3)), "at least two seeds and two items"),
        (lambda: crossed_contrast(np.full((2, 3), np.nan), np.ones((2, 3)), np.ones(3)), "replace the scores of a diverged seed"),
        (lambda: sign_flips(np.ones(21)), "1 to 20 numbers, got 21"),
        (lambda: binomial_bounds(3, 2), r"wrong must lie in \[0, total\] with total at least 1, got wrong=3 and total=2"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
