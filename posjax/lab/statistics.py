"""Summarises a handful of seeds: the mean, its interval, and whether two settings differ.

``summary`` and ``difference`` take one number a seed and give Student's intervals, which hold the truth in 95 % of experiments
where seeds are independent and normally distributed. ``crossed_contrast`` takes scores by seed and item (an excerpt of text, a
string of a task) and covers the choice of both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from posjax.typing import Array

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Of the values of one setting, in their unit.

    Attributes:
      count: how many.
      mean: None of no values.
      deviation: standard deviation with count - 1 below; None of fewer than two values.
      interval: (low, high), the 95 % interval of the mean; None of fewer than two values.
    """

    count: int
    mean: float | None
    deviation: float | None
    interval: tuple[float, float] | None


class Difference(NamedTuple):
    """Of two means.

    Attributes:
      mean: that of the first less that of the second.
      interval: (low, high), 95 %; None where there are too few values for one. Zero outside of it: they differ.
    """

    mean: float
    interval: tuple[float, float] | None


def summary(values: Sequence[float] | Array) -> Summary:
    """Mean, standard deviation and Student's interval of the mean, mean +- t_{0.975, n-1} deviation / sqrt(n).

    Args:
      values: [n], one for each seed; n may be 0 or 1.

    Raises:
      ValueError: values of more than one axis, or one that is not finite: leave diverged seeds out, and say so.
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
    """The difference of two means with its 95 % interval.

    Args:
      first, second: [n] and [m], one value for each seed, at least one of each.
      paired: value i of both comes of the same seed (data, order): Student's interval of the n differences. Otherwise Welch's,
        for two independent samples whose variances may differ.

    Raises:
      ValueError: as ``summary``; nothing to compare, or paired values that are not as many.
    """
    first, second = _checked("first", first), _checked("second", second)
    if not first.size or not second.size:
        raise ValueError(f"first and second must have at least one value each, got {first.size} and {second.size}")
    if paired:
        if first.size != second.size:
            raise ValueError(f"first and second must have one value for each seed where paired, got {first.size} and {second.size}")
        of_pairs = summary(first - second)
        return Difference(of_pairs.mean, of_pairs.interval)
    mean = float(first.mean() - second.mean())
    if min(first.size, second.size) == 1:
        return Difference(mean, None)
    parts = [float(values.var(ddof=1)) / values.size for values in (first, second)]
    if sum(parts) == 0.0:
        return Difference(mean, (mean, mean))
    freedom = sum(parts) ** 2 / sum(p * p / (values.size - 1) for p, values in zip(parts, (first, second), strict=True))
    return Difference(mean, _around(mean, math.sqrt(sum(parts)), freedom))


class Contrast(NamedTuple):
    """How two settings differ, paired over seeds and items.

    Attributes:
      mean: that of the first less that of the second.
      error: the standard error, over seeds and items.
      interval: (low, high), 95 %.
      p_value: of no difference, two-sided.
      freedom: degrees of freedom of the t distribution: seeds - 1.
    """

    mean: float
    error: float
    interval: tuple[float, float]
    p_value: float
    freedom: int


def crossed_contrast(first: Array, second: Array, counts: Array, *, resamples: int = 2000) -> Contrast:
    """Compares two settings that were trained with the same seeds and scored on the same items, by a crossed bootstrap.

    D = sum_si (first_si - second_si) / (S sum_i counts_i). A resample draws S seeds and I items, each with replacement and both for
    the two settings alike; its D is that of the seeds and items drawn. The standard error is the standard deviation of D over
    resamples times sqrt(S / (S - 1)), which a bootstrap of S seeds falls short by; interval and p value take it to Student's t with
    S - 1 degrees of freedom. It covers both what another seed and what another text would have given. (Owen 2007, "The pigeonhole
    bootstrap", shows that it is never too narrow where seeds and items interact; Hesterberg 2015 has the factor.)

    The draws of seeds and of items are ``rng.multinomial(S, [1/S] * S, resamples)`` and then the same of I, of
    ``numpy.random.default_rng(0)``, so that anybody can make the same numbers again.

    Args:
      first, second: [S, I] sums of losses or of wrong answers, for every seed in every item; lower is better.
      counts: [I], how many tokens or answers each sum is over.
      resamples: of the bootstrap.

    Raises:
      ValueError: shapes that do not fit, a number that is not finite, or fewer than two seeds or items.
    """
    first, second, counts = (np.asarray(x, float) for x in (first, second, counts))
    if first.ndim != 2 or first.shape != second.shape or counts.shape != first.shape[1:]:
        raise ValueError(f"first and second must be [S, I] and counts [I], got {first.shape}, {second.shape} and {counts.shape}")
    if min(first.shape) < 2:
        raise ValueError(f"first must have at least two seeds and two items, got shape {first.shape}")
    if not all(np.isfinite(x).all() for x in (first, second, counts)):
        raise ValueError("first, second and counts must be finite; a seed that diverged counts as the worst one")
    (seeds, items), differences = first.shape, first - second
    mean = float(differences.sum() / (seeds * counts.sum()))
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    of_items = rng.multinomial(items, np.full(items, 1 / items), resamples)
    resampled = ((of_seeds @ differences) * of_items).sum(1) / (seeds * (of_items @ counts))
    error = float(resampled.std() * math.sqrt(seeds / (seeds - 1)))
    p_value = 1.0 if mean == 0 else float(2 * stats.t.sf(abs(mean) / error, seeds - 1)) if error else 0.0
    return Contrast(mean, error, _around(mean, error, seeds - 1), p_value, seeds - 1)


def within(contrast: Contrast, margin: float) -> float:
    """The p value of two one-sided tests that a difference is within ``margin``, either way (Schuirmann 1987). Small: a tie."""
    if not contrast.error:
        return float(abs(contrast.mean) >= margin)
    return float(stats.t.sf((margin - abs(contrast.mean)) / contrast.error, contrast.freedom))


def sign_flips(differences: Sequence[float] | Array) -> float:
    """The exact p value of paired differences [n], n up to 20: the share of all 2^n choices of signs whose sum is as far from zero.

    It takes differences to be symmetric around zero where there is no effect, and nothing else: errors of models that solve a task
    or do not are far from normal.
    """
    differences = _checked("differences", differences)
    if not 1 <= differences.size <= 20:
        raise ValueError(f"differences must be 1 to 20 numbers, got {differences.size}")
    signs = np.where(np.arange(2**differences.size)[:, None] >> np.arange(differences.size) & 1, -1.0, 1.0)
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] * (1 - 1e-12)).mean())


def binomial_bounds(wrong: int, total: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, ``wrong`` of ``total`` independent answers (Clopper and Pearson 1934)."""
    if not 0 <= wrong <= total or total < 1:
        raise ValueError(f"wrong must be from 0 to total, at least 1, got {wrong} of {total}")
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if wrong == 0 else float(stats.beta.ppf(tail, wrong, total - wrong + 1))
    return low, 1.0 if wrong == total else float(stats.beta.isf(tail, wrong + 1, total - wrong))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for how many there are: those up to 0.05 are, in the mean, wrong in one of twenty at most.

    q_(k) = min over j >= k of m p_(j) / j, of the p values in rising order (Benjamini and Hochberg 1995).
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
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one axis, a value for each seed, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}; leave diverged seeds out, and say so")
    return values
