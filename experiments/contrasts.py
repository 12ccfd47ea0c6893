"""Statistics of claimed contrasts between encodings: their intervals, p values and verdicts. Not a program.

A claim is a contrast of two encodings on one test set, declared in the experiment's file before its final seeds are run. It is
measured after the same number of steps of both, and after the same training time of both, in which the faster one has taken more
steps. The p values of all claims in the README are adjusted together (Benjamini and Hochberg). The verdict on a claim is

    shown                  if both differences exclude zero, on the same side
    shown per step only    if only the difference at equal steps does
    tie shown              if two one-sided tests find both differences within the margin
    not resolved           otherwise
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from common import markdown

from posjax.lab.statistics import benjamini_hochberg, binomial_bounds, crossed_contrast, sign_flips, summary, within

Rows = list[dict[str, Any]]
Scores = Callable[[str, int, str], tuple[np.ndarray, np.ndarray]]
LEVEL = 0.05
SOLVED = 1.0  # error in percent below which a model counts as having solved a task


@dataclasses.dataclass(frozen=True)
class Claim:
    """Declares a contrast: whether ``first`` scores lower than ``second``.

    Attributes:
      first, second: labels of settings, such as "rope + cope(64)".
      column: the test set.
      margin: largest difference that counts as a tie, in the unit of the table.
      steps: number of steps of both; None: the smaller of the numbers that they were trained for.
      name: name of the row in the table; None: derived from the two labels.
      primary: whether the experiment was designed for this claim. Secondary claims are adjusted together with primary ones.
      other_column: the test set of ``second`` if it differs from ``first``'s; it must have the same items.
    """

    first: str
    second: str
    column: str
    margin: float
    steps: int | None = None
    name: str | None = None
    primary: bool = True
    other_column: str | None = None

    @property
    def title(self) -> str:
        return self.name or f"{self.first} less {self.second}"


def equal_time(steps: Mapping[str, int], costs: Mapping[str, float], first: str, second: str, piece: int) -> tuple[int, int]:
    """Returns the numbers of steps of two settings that take the same, longest possible time, as multiples of ``piece``."""
    seconds = min(steps[label] * costs[label] for label in (first, second))
    return tuple(max(piece, math.floor(seconds / costs[label] / piece + 1e-6) * piece) for label in (first, second))


def steps_asked(
    claims: Sequence[Claim], steps: Mapping[str, int], costs: Mapping[str, float], piece: int
) -> dict[tuple[str, str], frozenset[int]]:
    """Returns {(label, column): steps at which to score besides the last}, for claims at equal steps and in equal time."""
    asked: dict[tuple[str, str], set[int]] = {}
    for claim in claims:
        same = claim.steps or min(steps[claim.first], steps[claim.second])
        pair = equal_time(steps, costs, claim.first, claim.second, piece) if claim.steps is None else (same, same)
        for label, column, equal_time_steps in (
            (claim.first, claim.column, pair[0]),
            (claim.second, claim.other_column or claim.column, pair[1]),
        ):
            asked.setdefault((label, column), set()).update((same, equal_time_steps))
    return {key: frozenset(steps) for key, steps in asked.items()}


def scores_of(rows: Rows) -> Scores:
    """Returns a function (label, step, column) -> (sums [S, I] in the order of seeds, counts [I]) for the rows of one part.

    A seed that diverged gets the scores of the worst run of the part, item by item, because leaving it out would favour settings
    that diverge.
    """

    def scores(label: str, step: int, column: str) -> tuple[np.ndarray, np.ndarray]:
        by_seed = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seed"])
        counts = np.asarray(by_seed[0]["items"][step][column][1], float)
        every = [row["items"][step][column][0] for row in rows if step in row["items"] and column in row["items"][step]]
        worst = np.nanmax(np.where(np.isfinite(every), every, np.nan), axis=0)
        sums = [worst if row["diverged"] is not None else row["items"][step][column][0] for row in by_seed]
        return np.asarray(sums, float), counts

    return scores


def measured(claim: Claim, scores: Scores, first_step: int, second_step: int, scale: float, exact: bool) -> dict[str, Any]:
    """Measures the difference of a claim after the given steps of the two settings: mean, interval and p values.

    Args:
      claim: the claim.
      scores: the scores of the claim's part, from ``scores_of``.
      first_step, second_step: numbers of steps of the two settings.
      scale: factor from a mean score to the unit of the table.
      exact: whether the p value is that of sign flips over seeds, for tasks that a model either solves or fails.
    """
    first, counts = scores(claim.first, first_step, claim.column)
    second, other = scores(claim.second, second_step, claim.other_column or claim.column)
    if not np.array_equal(counts, other):
        raise ValueError(f"the items of {claim.column} and {claim.other_column} must have the same counts")
    contrast = crossed_contrast(first * scale, second * scale, counts)
    p_value, (low, high) = contrast.p_value, contrast.interval
    if exact:
        p_value = sign_flips((first - second).sum(1))
    if contrast.error == 0:  # no answer differs: use the bound that this number of answers allows
        reach = scale * binomial_bounds(0, int(counts.sum()))[1]
        low, high = contrast.mean - reach, contrast.mean + reach
        tie = float(max(abs(low), abs(high)) >= claim.margin)
    else:
        tie = within(contrast, claim.margin)
    return {
        "steps": [first_step, second_step],
        "mean": contrast.mean,
        "interval": [low, high],
        "p_value": p_value,
        "tie_p_value": tie,
        "seeds": len(first),
        "items": len(counts),
    }


def measured_claims(
    claims: Sequence[Claim], rows: Rows, costs: Mapping[str, float], piece: int, scale: float, exact: bool
) -> list[dict[str, Any]]:
    """Measures every claim of a part, at equal steps and in equal time, and returns JSON values."""
    scores = scores_of(rows)
    steps = {row["label"]: max(row["items"]) for row in rows}
    results = []
    for claim in claims:
        same = claim.steps or min(steps[claim.first], steps[claim.second])
        result = {"claim": claim.title, "labels": [claim.first, claim.second], "margin": claim.margin, "primary": claim.primary}
        result |= {"column": claim.column, "columns": [claim.column, claim.other_column or claim.column]}
        result |= {"equal_steps": measured(claim, scores, same, same, scale, exact), "equal_time": None}
        if claim.steps is None and claim.first != claim.second:
            pair = equal_time(steps, costs, claim.first, claim.second, piece)
            result["equal_time"] = measured(claim, scores, *pair, scale, exact)
        results.append(result)
    return results


def adjusted(experiments: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the claims of all experiments with a ``q_value`` for every p value, adjusted together."""
    copies = {name: [_copy(claim) for claim in claims] for name, claims in experiments.items()}
    every = [claim[kind] for claims in copies.values() for claim in claims for kind in KINDS if claim[kind]]
    for one, q_value in zip(every, benjamini_hochberg([one["p_value"] for one in every]) if every else [], strict=True):
        one["q_value"] = q_value
    return copies


KINDS = ("equal_steps", "equal_time")


def _copy(claim: dict[str, Any]) -> dict[str, Any]:
    return claim | {kind: dict(claim[kind]) if claim[kind] else None for kind in KINDS}


def word(claim: Mapping[str, Any]) -> str:
    """Returns the verdict on an adjusted claim."""
    steps, time = (claim[kind] for kind in KINDS)
    sides = [_side(one) for one in (steps, time)]
    side = {-1: "lower", 1: "higher"}
    same = claim["labels"][0] == claim["labels"][1]  # one model on two test sets: equal time does not apply
    if sides[0] and (same or sides[1] == sides[0]):
        return f"**shown: {side[sides[0]]}**"
    if sides[0]:
        return f"shown per step only: {side[sides[0]]}" + (f"; in equal time {side[sides[1]]}" if sides[1] else "")
    if sides[1]:
        return f"not resolved per step; in equal time {side[sides[1]]}"
    if all(one is None or one["tie_p_value"] < LEVEL for one in (steps, time)):
        return f"tie shown (within {claim['margin']:g})"
    return "not resolved"


def _side(one: Mapping[str, Any] | None) -> int:
    """Returns the sign of a difference that excludes zero by both its p value and its interval, or 0.

    With exact p values, a few seeds that fail can widen the interval to contain zero although all differences have one sign.
    """
    if one is None or one["q_value"] > LEVEL or one["interval"][0] <= 0 <= one["interval"][1]:
        return 0
    return int(math.copysign(1, one["mean"]))


def claims_table(claims: Sequence[Mapping[str, Any]], digits: int) -> str:
    """Formats the table of adjusted claims."""

    def cell(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "-"
        (low, high), steps = one["interval"], one["steps"]
        after = f"{steps[0]:,}" if steps[0] == steps[1] else f"{steps[0]:,} and {steps[1]:,}"
        return f"{one['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] after {after}"

    lines = [[("" if c["primary"] else "(") + c["claim"] + ("" if c["primary"] else ")"), c["column"]] for c in claims]
    lines = [[*line, cell(c["equal_steps"]), cell(c["equal_time"]), word(c)] for line, c in zip(lines, claims, strict=True)]
    return markdown(["contrast", "on", "equal steps", "equal time", "verdict"], lines)


def values(rows: Rows, step: int, column: str, scale: float) -> list[float]:
    """Returns the mean score of every seed of one setting, in the unit of the table, without seeds that diverged."""
    kept = [row["items"][step][column] for row in rows if row["diverged"] is None and column in row["items"].get(step, {})]
    return [float(scale * sums.sum() / counts.sum()) for sums, counts in kept]


def cell(rows: Rows, step: int, column: str, scale: float, digits: int, solved: bool = False) -> str:
    """Formats the scores of a setting as "mean (deviation)" over seeds.

    With ``solved``, adds how many seeds solved the task; adds how many diverged, if any. Without scores, the cell is "-".
    """
    scores = values(rows, step, column, scale)
    lost = sum(row["diverged"] is not None for row in rows)
    if not scores:
        return f"{lost} of {len(rows)} diverged" if lost else "-"
    statistics = summary(scores)
    text = f"{statistics.mean:.{digits}f}" + ("" if statistics.deviation is None else f" ({statistics.deviation:.{digits}f})")
    if solved and statistics.mean == 0:
        counts = next(row["items"][step][column][1] for row in rows if step in row["items"])
        text = f"0 (≤ {scale * binomial_bounds(0, int(counts.sum()))[1]:.1g})"
    if solved:
        text += f", {sum(score < SOLVED for score in scores)}/{len(rows)}"
    return text + (f", {lost} diverged" if lost else "")
