"""Compares encodings: which contrasts an experiment claims, their intervals, and the words that a table may use. Not a program.

A claim is a contrast of two encodings on one test set, named in the experiment's file before its final seeds are run. It is
measured where both have had the same number of steps, and where both have had the same time: the faster one has then had more
steps. The p values of all claims in the README are adjusted together (Benjamini and Hochberg), and a claim is called

    shown                  where both differences are clear of zero, on one side
    shown per step only    where the one at equal steps is
    tie shown              where two one-sided tests find both differences within the margin
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
SOLVED = 1.0  # per cent of errors, below which a model is said to have solved a task


@dataclasses.dataclass(frozen=True)
class Claim:
    """A contrast: is ``first`` lower than ``second``?

    Attributes:
      first, second: labels of settings, such as "rope + cope(64)".
      column: the test set.
      margin: a difference that does not matter, in the unit of the table.
      steps: how many steps both have had; None: as many as the one that was trained for fewer.
      name: of the row in the table; None: made of the two labels.
      primary: the experiment is run for it; others are shown beside it and adjusted with it all the same.
      other_column: of ``second``, where it is another than ``first``'s, with the same items.
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
    """Steps of two settings that take the same time, the most that both were trained for, in whole pieces of ``piece`` steps."""
    seconds = min(steps[label] * costs[label] for label in (first, second))
    return tuple(max(piece, math.floor(seconds / costs[label] / piece + 1e-6) * piece) for label in (first, second))


def steps_asked(
    claims: Sequence[Claim], steps: Mapping[str, int], costs: Mapping[str, float], piece: int
) -> dict[tuple[str, str], frozenset[int]]:
    """{(label, column): after which steps it is scored besides the last}, for claims at equal steps and in equal time."""
    asked: dict[tuple[str, str], set[int]] = {}
    for claim in claims:
        same = claim.steps or min(steps[claim.first], steps[claim.second])
        pair = equal_time(steps, costs, claim.first, claim.second, piece) if claim.steps is None else (same, same)
        for label, column, own in (
            (claim.first, claim.column, pair[0]),
            (claim.second, claim.other_column or claim.column, pair[1]),
        ):
            asked.setdefault((label, column), set()).update((same, own))
    return {both: frozenset(own) for both, own in asked.items()}


def scores_of(rows: Rows) -> Scores:
    """Returns (label, step, column) -> sums [S, I] in the order of the seeds, and counts [I]; ``rows`` are of one part.

    A seed that diverged counts as the worst run of the part, item by item. Leaving it out would favour what diverges.
    """

    def found(label: str, step: int, column: str) -> tuple[np.ndarray, np.ndarray]:
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seed"])
        counts = np.asarray(own[0]["items"][step][column][1], float)
        every = [row["items"][step][column][0] for row in rows if step in row["items"] and column in row["items"][step]]
        worst = np.nanmax(np.where(np.isfinite(every), every, np.nan), axis=0)
        sums = [worst if row["diverged"] is not None else row["items"][step][column][0] for row in own]
        return np.asarray(sums, float), counts

    return found


def measured(claim: Claim, scores: Scores, first_step: int, second_step: int, scale: float, exact: bool) -> dict[str, Any]:
    """The difference of a claim after these steps of the two: mean, interval and p values.

    Args:
      scores: of the claim's part.
      scale: from a mean score to the unit of the table.
      exact: the p value is that of sign flips over seeds, as models that solve a task or do not call for.
    """
    first, counts = scores(claim.first, first_step, claim.column)
    second, other = scores(claim.second, second_step, claim.other_column or claim.column)
    if not np.array_equal(counts, other):
        raise ValueError(f"the items of {claim.column} and {claim.other_column} must count as much as each other")
    found = crossed_contrast(first * scale, second * scale, counts)
    p_value, (low, high) = found.p_value, found.interval
    if exact:
        p_value = sign_flips((first - second).sum(1))
    if found.error == 0:  # not one answer differs: what as many answers can tell
        reach = scale * binomial_bounds(0, int(counts.sum()))[1]
        low, high = found.mean - reach, found.mean + reach
        tie = float(max(abs(low), abs(high)) >= claim.margin)
    else:
        tie = within(found, claim.margin)
    return {
        "steps": [first_step, second_step],
        "mean": found.mean,
        "interval": [low, high],
        "p_value": p_value,
        "tie_p_value": tie,
        "seeds": len(first),
        "items": len(counts),
    }


def measured_claims(
    claims: Sequence[Claim], rows: Rows, costs: Mapping[str, float], piece: int, scale: float, exact: bool
) -> list[dict[str, Any]]:
    """Every claim of a part, at equal steps and in equal time, as JSON."""
    scores = scores_of(rows)
    steps = {row["label"]: max(row["items"]) for row in rows}
    found = []
    for claim in claims:
        same = claim.steps or min(steps[claim.first], steps[claim.second])
        made = {"claim": claim.title, "labels": [claim.first, claim.second], "margin": claim.margin, "primary": claim.primary}
        made |= {"column": claim.column, "columns": [claim.column, claim.other_column or claim.column]}
        made |= {"equal_steps": measured(claim, scores, same, same, scale, exact), "equal_time": None}
        if claim.steps is None and claim.first != claim.second:
            pair = equal_time(steps, costs, claim.first, claim.second, piece)
            made["equal_time"] = measured(claim, scores, *pair, scale, exact)
        found.append(made)
    return found


def adjusted(experiments: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The claims of all experiments with ``q_value`` beside every p value, adjusted together."""
    copies = {name: [_copy(claim) for claim in claims] for name, claims in experiments.items()}
    every = [claim[kind] for claims in copies.values() for claim in claims for kind in KINDS if claim[kind]]
    for one, q_value in zip(every, benjamini_hochberg([one["p_value"] for one in every]) if every else [], strict=True):
        one["q_value"] = q_value
    return copies


KINDS = ("equal_steps", "equal_time")


def _copy(claim: dict[str, Any]) -> dict[str, Any]:
    return claim | {kind: dict(claim[kind]) if claim[kind] else None for kind in KINDS}


def word(claim: Mapping[str, Any]) -> str:
    """What may be said of an adjusted claim."""
    steps, time = (claim[kind] for kind in KINDS)
    sides = [_side(one) for one in (steps, time)]
    side = {-1: "lower", 1: "higher"}
    same = claim["labels"][0] == claim["labels"][1]  # one model, on two test sets: there is no time to be equal
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
    """Which side of zero a difference is clear on, -1 or 1; 0 if on none: by its p value, and by its interval too.

    Where p values are exact, a few seeds that fail can make an interval that holds zero around a difference of one sign.
    """
    if one is None or one["q_value"] > LEVEL or one["interval"][0] <= 0 <= one["interval"][1]:
        return 0
    return int(math.copysign(1, one["mean"]))


def claims_table(claims: Sequence[Mapping[str, Any]], digits: int) -> str:
    """The table of adjusted claims."""

    def cell(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "-"
        (low, high), steps = one["interval"], one["steps"]
        after = f"{steps[0]:,}" if steps[0] == steps[1] else f"{steps[0]:,} and {steps[1]:,}"
        return f"{one['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] after {after}"

    lines = [[("" if c["primary"] else "(") + c["claim"] + ("" if c["primary"] else ")"), c["column"]] for c in claims]
    lines = [[*line, cell(c["equal_steps"]), cell(c["equal_time"]), word(c)] for line, c in zip(lines, claims, strict=True)]
    return markdown(["contrast", "on", "equal steps", "equal time", "so"], lines)


def values(rows: Rows, step: int, column: str, scale: float) -> list[float]:
    """The mean score of every seed of one setting, in the unit of the table; a seed that diverged is left out."""
    kept = [row["items"][step][column] for row in rows if row["diverged"] is None and column in row["items"].get(step, {})]
    return [float(scale * sums.sum() / counts.sum()) for sums, counts in kept]


def cell(rows: Rows, step: int, column: str, scale: float, digits: int, solved: bool = False) -> str:
    """ "mean (deviation)" over seeds; with ``solved``, how many seeds solved the task; how many diverged; "-" where nothing is."""
    own = values(rows, step, column, scale)
    lost = sum(row["diverged"] is not None for row in rows)
    if not own:
        return f"{lost} of {len(rows)} diverged" if lost else "-"
    found = summary(own)
    text = f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ({found.deviation:.{digits}f})")
    if solved and found.mean == 0:
        counts = next(row["items"][step][column][1] for row in rows if step in row["items"])
        text = f"0 (≤ {scale * binomial_bounds(0, int(counts.sum()))[1]:.1g})"
    if solved:
        text += f", {sum(value < SOLVED for value in own)}/{len(rows)}"
    return text + (f", {lost} diverged" if lost else "")
