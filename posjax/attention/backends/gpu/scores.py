"""Scores of a tile on GPUs, for every lowering: position biases, masks, the soft cap, softmax weights and gradients.

A *score layout* is [queries, keys] or its transpose. It reshapes a number per query so that it broadcasts over keys, and a number
per key so that it broadcasts over queries.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import LOG2E, MASK_VALUE
from posjax.attention.backends.gpu.plan import Plan
from posjax.typing import Array


class Rows(NamedTuple):
    """Holds the data of the queries of a tile, [t] each."""

    positions: Array
    segments: Array | None
    slope: Array | None  # the head's slope
    look: Callable[[Array], Array]  # looks up indices in the head's table
    entries: int  # the length of that table
    number: Array | None = None  # row numbers within a program's arrays


class Keys(NamedTuple):
    """Holds the data of the keys of a tile, [s] each."""

    positions: Array
    segments: Array | None


class MaskedScores(NamedTuple):
    """Holds the scores of a query tile and some keys, with the mask and the table index of each pair."""

    scores: Array  # in units of log2 e
    allowed: Array | None  # None if all pairs are allowed
    index: Array | None  # into the table


def penalised(plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array) -> Array:
    if not plan.penalised:
        return scores
    distance = jnp.abs(score_layout.queries(rows.positions) - score_layout.keys(keys.positions)).astype(jnp.float32)
    return scores - (rows.slope * LOG2E) * distance


def masked_scores(plan: Plan, score_layout: Any, rows: Rows, keys: Keys, scores: Array) -> MaskedScores:
    """Adds the position biases to the scores of a partial block, and computes its mask and table indices."""
    of_queries, of_keys = score_layout.queries(rows.positions), score_layout.keys(keys.positions)
    segments = (score_layout.queries(rows.segments), score_layout.keys(keys.segments)) if plan.rules.segmented else (None, None)
    allowed = jnp.broadcast_to(plan.rules.pairs(of_queries, of_keys, *segments), scores.shape)
    scores = penalised(plan, score_layout, rows, keys, scores)
    if plan.index is None:
        return MaskedScores(scores, allowed, None)
    index = jnp.broadcast_to(plan.index(of_queries, of_keys), scores.shape)

    def add(n: Array, scores: Array) -> Array:
        return scores + jnp.where(index == n, rows.look(n) * LOG2E, 0.0)

    return MaskedScores(jax.lax.fori_loop(*ends_of(rows, index), add, scores), allowed, index)


def ends_of(rows: Rows, index: Array) -> tuple[Array, Array]:
    """Returns the range [from, to) of table entries that contains the indices."""
    return index.min(1).min(0), jnp.minimum(index.max(1).max(0) + 1, rows.entries)


def full_block_scores(plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None) -> Array:
    """Adds the position biases to the scores of a full block; ``common`` is the table index of all its pairs."""
    scores = penalised(plan, score_layout, rows, keys, scores)
    if common is not None:  # an index past the end of the table adds zero
        scores += jnp.where(common < rows.entries, rows.look(jnp.minimum(common, rows.entries - 1)) * LOG2E, 0.0)
    return scores


def capped(plan: Plan, scores: Array) -> Array:
    if plan.soft_cap is None:
        return scores
    cap = plan.soft_cap * LOG2E
    return cap * tanh(scores / cap)


def soft_cap_derivative(plan: Plan, scores: Array) -> Array | float:
    """Computes the derivative of the soft cap from the capped scores; its value is arbitrary where they are MASK_VALUE."""
    return 1.0 if plan.soft_cap is None else 1.0 - jnp.square(jnp.maximum(scores / (plan.soft_cap * LOG2E), -1.0))


def tanh(x: Array) -> Array:
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def hidden(masked: MaskedScores, scores: Array) -> Array:
    return scores if masked.allowed is None else jnp.where(masked.allowed, scores, MASK_VALUE)


def biased(
    plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None, is_full_block: bool
) -> tuple[Array, Array | None]:
    """Computes scores as softmax takes them, and the table index of each pair; None for a full block, whose index is ``common``."""
    if is_full_block:
        return capped(plan, full_block_scores(plan, score_layout, rows, keys, scores, common)), None
    masked = masked_scores(plan, score_layout, rows, keys, scores)
    return hidden(masked, capped(plan, masked.scores)), masked.index


def weights_of(score_layout: Any, scores: Array, lse: Array) -> Array:
    """Computes the softmax weights from scores that ``biased`` returned."""
    return jnp.exp2(scores - score_layout.queries(lse))


def gradient_of(plan: Plan, score_layout: Any, scores: Array, weights: Array, d_weights: Array, delta: Array) -> Array:
    """Computes the gradient of the scores before the soft cap, from ``scores`` that ``biased`` returned."""
    return weights * (d_weights - score_layout.queries(delta)) * soft_cap_derivative(plan, scores)


def walk(tile: Any, first: Array, plain: Array, detailed: Array, last: Array, kept: Any) -> Any:
    """Calls ``kept = tile(is_full_block, n, kept)`` for each tile from first to last, and returns the last ``kept``.

    Tiles in [plain, detailed) are full blocks. This range may extend past ``last`` and, if it is empty, may lie anywhere.
    """
    kept = jax.lax.fori_loop(first, jnp.minimum(plain, last), functools.partial(tile, False), kept)
    kept = jax.lax.fori_loop(plain, jnp.minimum(detailed, last), functools.partial(tile, True), kept)
    return jax.lax.fori_loop(jnp.maximum(detailed, first), last, functools.partial(tile, False), kept)
