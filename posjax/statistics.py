"""What a handful of seeds says: the mean, how sure it is, and whether two settings differ.

Intervals hold the truth in 95 % of experiments where seeds are independent and normally distributed; of three seeds, each is
4.3 standard errors to either side.
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
