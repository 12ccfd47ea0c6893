"""Scores of a tile on GPUs, for every lowering: biases of positions, masks, the soft cap, and what softmax makes of them.

A *face* is how scores stand, [queries, keys] or turned: it makes of a number for each query, or each key, what broadcasts over the
others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.gpu.plan import LOG2E, MASK_VALUE, Plan
from posjax.typing import Array


class Rows(NamedTuple):
    """What is at hand of the queries of a tile, [t] each."""

    positions: Array
    segments: Array | None
    slope: Array | None  # of the head
    look: Callable[[Array], Array]  # into the head's table
    entries: int  # of that table
    number: Array | None = None  # within the arrays that a program sees


class Keys(NamedTuple):
    """The same of the keys of a tile, [s] each."""

    positions: Array
    segments: Array | None


class MaskedScores(NamedTuple):
    """Scores of a query tile and some keys, and what is to be known of the pairs."""

    scores: Array  # in units of log2 e
    allowed: Array | None  # None: all pairs
    index: Array | None  # into the table


def penalised(plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array) -> Array:
    if not plan.penalised:
        return scores
    distance = jnp.abs(score_layout.queries(rows.positions) - score_layout.keys(keys.positions)).astype(jnp.float32)
    return scores - (rows.slope * LOG2E) * distance


def masked_scores(plan: Plan, score_layout: Any, rows: Rows, keys: Keys, scores: Array) -> MaskedScores:
    """Scores with the biases of positions, for keys of which some may be out of sight."""
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
    """The places of a table that indices are among, from .. to."""
    return index.min(1).min(0), jnp.minimum(index.max(1).max(0) + 1, rows.entries)


def full_block_scores(plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None) -> Array:
    """Scores with the biases of positions, for keys that are all in sight; ``common``: the place of all pairs in the table."""
    scores = penalised(plan, score_layout, rows, keys, scores)
    if common is not None:  # an index past the table finds zero
        scores += jnp.where(common < rows.entries, rows.look(jnp.minimum(common, rows.entries - 1)) * LOG2E, 0.0)
    return scores


def capped(plan: Plan, scores: Array) -> Array:
    if plan.soft_cap is None:
        return scores
    cap = plan.soft_cap * LOG2E
    return cap * tanh(scores / cap)


def soft_cap_derivative(plan: Plan, scores: Array) -> Array | float:
    """The derivative of the soft cap where the capped score is ``scores``; any where that is MASK_VALUE."""
    return 1.0 if plan.soft_cap is None else 1.0 - jnp.square(jnp.maximum(scores / (plan.soft_cap * LOG2E), -1.0))


def tanh(x: Array) -> Array:
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def hidden(masked: MaskedScores, scores: Array) -> Array:
    return scores if masked.allowed is None else jnp.where(masked.allowed, scores, MASK_VALUE)


def biased(
    plan: Plan, score_layout: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None, is_full_block: bool
) -> tuple[Array, Array | None]:
    """Scores as softmax takes them, and the place of each pair in the table where not all have the ``common`` one."""
    if is_full_block:
        return capped(plan, full_block_scores(plan, score_layout, rows, keys, scores, common)), None
    masked = masked_scores(plan, score_layout, rows, keys, scores)
    return hidden(masked, capped(plan, masked.scores)), masked.index


def weights_of(score_layout: Any, scores: Array, lse: Array) -> Array:
    """Of softmax, from ``biased`` scores."""
    return jnp.exp2(scores - score_layout.queries(lse))


def gradient_of(plan: Plan, score_layout: Any, scores: Array, weights: Array, d_weights: Array, delta: Array) -> Array:
    """The gradient of scores before the soft cap, where ``scores`` are ``biased``."""
    return weights * (d_weights - score_layout.queries(delta)) * soft_cap_derivative(plan, scores)


def walk(tile: Any, first: Array, plain: Array, detailed: Array, last: Array, kept: Any) -> Any:
    """Calls ``kept = tile(is_full_block, n, kept)`` for each tile from first to last, anywhere next to the plain ones."""
    kept = jax.lax.fori_loop(first, jnp.minimum(plain, last), functools.partial(tile, False), kept)
    kept = jax.lax.fori_loop(plain, jnp.minimum(detailed, last), functools.partial(tile, True), kept)
    return jax.lax.fori_loop(jnp.maximum(detailed, first), last, functools.partial(tile, False), kept)
