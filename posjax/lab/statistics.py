"""Summarizes the results of a handful of seeds: the mean, its interval, and whether two settings differ.

``summary`` and ``difference`` take one number per seed and return Student's intervals, which contain the true value in 95 % of
experiments if seeds are independent and normally distributed. ``crossed_contrast`` takes scores by seed and item (an excerpt of
text, a string of a task) and accounts for the choice of both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from posjax.checks import check, checked, short
from posjax.typing import Array

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Holds summary statistics of the values of one setting, in the unit of the values.

    Attributes:
      count: number of values.
      mean: their mean; None if there are no values.
      deviation: standard deviation with denominator count - 1; None for fewer than two values.
      interval: (low, high), the 95 % interval of the mean; None for fewer than two values.
    """

    count: int
    mean: float | None
    deviation: float | None
    interval: tuple[float, float] | None


class Difference(NamedTuple):
    """Holds the difference of two means.

    Attributes:
      mean: mean of the first minus mean of the second.
      interval: (low, high), the 95 % interval; None if there are too few values. The means differ if it excludes zero.
    """

    mean: float
    interval: tuple[float, float] | None


def summary(values: Sequence[float] | Array) -> Summary:
    """Computes the mean, standard deviation and Student's interval of the mean, mean +- t_{0.975, n-1} deviation / sqrt(n).

    Args:
      values: [n], one for each seed; n may be 0 or 1.

    Raises:
      ValueError: values do not have exactly one axis, or one is not finite. Leave out diverged seeds, and report that.
    """
    values = _checked("values", values)
    if not values.size:
        return Summary(0, None, None, None)
    mean = float(values.mean())
    if values.size == 1:
        return Summary(1, mean, None, None)
    deviation = float(values.std(ddof=1))
    return Summary(values.size, mean, deviation, _around(mean, deviation / math.sqrt(values.size), values.size - 1))


def difference(first: Sequence[float] | Array, second: Sequence[float] | Array, *, paired: bool = False) -> Difference:
    """Computes the difference of two means and its 95 % interval.

    Args:
      first, second: [n] and [m], one value for each seed, at least one of each.
      paired: True if value i of both has the same seed (data, order): Student's interval of the n differences. False: Welch's
        interval, for two independent samples whose variances may differ.

    Raises:
      ValueError: as ``summary``; first or second is empty, or paired values differ in number.
    """
    check("paired", paired, bool)
    first, second = _checked("first", first), _checked("second", second)
    if not first.size or not second.size:
        raise ValueError(f"first and second must have at least one value each, got {first.size} and {second.size}")
    if paired:
        if first.size != second.size:
            raise ValueError(f"first and second must have the same size with paired=True, got {first.size} and {second.size}")
        pairs = summary(first - second)
        return Difference(pairs.mean, pairs.interval)
    mean = float(first.mean() - second.mean())
    if min(first.size, second.size) == 1:
        return Difference(mean, None)
    parts = [float(values.var(ddof=1)) / values.size for values in (first, second)]
    if sum(parts) == 0.0:
        return Difference(mean, (mean, mean))
    freedom = sum(parts) ** 2 / sum(p * p / (values.size - 1) for p, values in zip(parts, (first, second), strict=True))
    return Difference(mean, _around(mean, math.sqrt(sum(parts)), freedom))


class Contrast(NamedTuple):
    """Holds the difference between two settings, paired over seeds and items.

    Attributes:
      mean: mean of the first minus mean of the second.
      error: standard error over seeds and items.
      interval: (low, high), the 95 % interval.
      p_value: two-sided p value of the hypothesis of no difference.
      freedom: degrees of freedom of the t distribution: seeds - 1.
    """

    mean: float
    error: float
    interval: tuple[float, float]
    p_value: float
    freedom: int


def crossed_contrast(first: Array, second: Array, counts: Array, *, resamples: int = 2000) -> Contrast:
    """Compares two settings with the same seeds and items by a crossed bootstrap.

    D = sum_si (first_si - second_si) / (S sum_i counts_i). A resample draws S seeds and I items with replacement, the same ones for
    both settings, and computes D over them. The standard error is the standard deviation of D over resamples times
    sqrt(S / (S - 1)), which corrects the underestimate of a bootstrap of S seeds. The interval and the p value use Student's t with
    S - 1 degrees of freedom. The interval accounts for the variation over seeds and over items. (Owen 2007, "The
    pigeonhole bootstrap", shows that it is never too narrow if seeds and items interact; the factor is from Hesterberg 2015.)

    The draws are reproducible: with rng = ``numpy.random.default_rng(0)``, seeds are drawn first, by
    ``rng.multinomial(S, [1/S] * S, resamples)``, and items second, by the same call with I in place of S.

    Args:
      first, second: [S, I] sums of losses or of wrong answers, for each seed and item; lower is better.
      counts: [I], number of tokens or answers in each sum.
      resamples: number of bootstrap resamples.

    Raises:
      ValueError: the shapes do not match, a number is not finite, or there are fewer than two seeds or items.
    """
    first, second, counts = (np.asarray(x, float) for x in (first, second, counts))
    if first.ndim != 2 or first.shape != second.shape or counts.shape != first.shape[1:]:
        raise ValueError(f"first and second must be [S, I] and counts [I], got {first.shape}, {second.shape} and {counts.shape}")
    if min(first.shape) < 2:
        raise ValueError(f"first must have at least two seeds and two items, got shape {first.shape}")
    if not all(np.isfinite(x).all() for x in (first, second, counts)):
        raise ValueError("first, second and counts must be finite; replace the scores of a diverged seed by the worst seed's")
    (seeds, items), differences = first.shape, first - second
    mean = float(differences.sum() / (seeds * counts.sum()))
    rng = np.random.default_rng(0)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    item_counts = rng.multinomial(items, np.full(items, 1 / items), resamples)
    resampled = ((seed_counts @ differences) * item_counts).sum(1) / (seeds * (item_counts @ counts))
    error = float(resampled.std() * math.sqrt(seeds / (seeds - 1)))
    p_value = 1.0 if mean == 0 else float(2 * stats.t.sf(abs(mean) / error, seeds - 1)) if error else 0.0
    return Contrast(mean, error, _around(mean, error, seeds - 1), p_value, seeds - 1)


def within(contrast: Contrast, margin: float) -> float:
    """Tests whether a difference is within ``margin`` in either direction, by two one-sided tests (Schuirmann 1987).

    Returns:
      The p value; a small value shows that the two settings are equivalent.
    """
    if not contrast.error:
        return float(abs(contrast.mean) >= margin)
    return float(stats.t.sf((margin - abs(contrast.mean)) / contrast.error, contrast.freedom))


def sign_flips(differences: Sequence[float] | Array) -> float:
    """Computes the exact p value of paired differences [n], n at most 20, by a sign-flip permutation test.

    The p value is the fraction of all 2^n sign assignments whose sum is at least as far from zero. The test assumes only
    that differences are symmetric around zero if there is no effect, and thus suits models that either solve a task or fail, whose
    errors are far from normal.

    Raises:
      ValueError: there are no differences or more than 20, or one is not finite.
    """
    differences = _checked("differences", differences)
    if not 1 <= differences.size <= 20:
        raise ValueError(f"differences must be 1 to 20 numbers, got {differences.size}")
    signs = np.where(np.arange(2**differences.size)[:, None] >> np.arange(differences.size) & 1, -1.0, 1.0)
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] * (1 - 1e-12)).mean())


@checked()
def binomial_bounds(wrong: int, total: int) -> tuple[float, float]:
    """Computes the exact 95 % interval of an error rate, ``wrong`` of ``total`` independent answers (Clopper and Pearson 1934).

    Raises:
      ValueError: wrong is not between 0 and total, or total is below 1.
    """
    if not 0 <= wrong <= total or total < 1:
        raise ValueError(f"wrong must lie in [0, total] with total at least 1, got wrong={wrong} and total={total}")
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if wrong == 0 else float(stats.beta.ppf(tail, wrong, total - wrong + 1))
    return low, 1.0 if wrong == total else float(stats.beta.isf(tail, wrong + 1, total - wrong))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for multiple tests by controlling the false discovery rate.

    Among the tests with an adjusted p value of at most 0.05, no more than one in twenty is expected to be a false discovery:

    q_(k) = min over j >= k of m p_(j) / j, with the m p values in ascending order (Benjamini and Hochberg 1995).
    """
    values = _checked("p_values", p_values)
    order = np.argsort(values)
    scaled = values[order] * values.size / np.arange(1, values.size + 1)
    adjusted = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted[np.argsort(order)].tolist()


def _around(mean: float, error: float, freedom: float) -> tuple[float, float]:
    reach = error * float(stats.t.ppf((1.0 + CONFIDENCE) / 2.0, freedom))
    return mean - reach, mean + reach


def _checked(name: str, values: Sequence[float] | Array) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):  # rows of different lengths, or keys of random numbers
        array = np.asarray("")
    if array.dtype.kind not in "iuf" and array.size:
        raise ValueError(f"{name} must be numbers, got {short(values)}")
    values = array.astype(float)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one axis with a value per seed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}; leave diverged seeds out")
    return values
