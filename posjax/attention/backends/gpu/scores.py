"""Scores of a tile on GPUs, for every lowering: biases of positions, masks, the soft cap, and what softmax makes of them.

A *face* is how scores stand, [queries, keys] or turned: it makes of a number for each query, or each key, what broadcasts over the
others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.gpu.plan import LOG2E, NEVER, Plan
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


class Sight(NamedTuple):
    """Scores of a query tile and some keys, and what is to be known of the pairs."""

    scores: Array  # in units of log2 e
    allowed: Array | None  # None: all pairs
    index: Array | None  # into the table


def penalised(plan: Plan, face: Any, rows: Rows, keys: Keys | None, scores: Array) -> Array:
    if not plan.penalised:
        return scores
    distance = jnp.abs(face.queries(rows.positions) - face.keys(keys.positions)).astype(jnp.float32)
    return scores - (rows.slope * LOG2E) * distance


def in_detail(plan: Plan, face: Any, rows: Rows, keys: Keys, scores: Array) -> Sight:
    """Scores with the biases of positions, for keys of which some may be out of sight."""
    of_queries, of_keys = face.queries(rows.positions), face.keys(keys.positions)
    segments = (face.queries(rows.segments), face.keys(keys.segments)) if plan.rules.segmented else (None, None)
    allowed = jnp.broadcast_to(plan.rules.pairs(of_queries, of_keys, *segments), scores.shape)
    scores = penalised(plan, face, rows, keys, scores)
    if plan.index is None:
        return Sight(scores, allowed, None)
    index = jnp.broadcast_to(plan.index(of_queries, of_keys), scores.shape)

    def add(n: Array, scores: Array) -> Array:
        return scores + jnp.where(index == n, rows.look(n) * LOG2E, 0.0)

    return Sight(jax.lax.fori_loop(*ends_of(rows, index), add, scores), allowed, index)


def ends_of(rows: Rows, index: Array) -> tuple[Array, Array]:
    """The places of a table that indices are among, from .. to."""
    return index.min(1).min(0), jnp.minimum(index.max(1).max(0) + 1, rows.entries)


def plainly(plan: Plan, face: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None) -> Array:
    """Scores with the biases of positions, for keys that are all in sight; ``common``: the place of all pairs in the table."""
    scores = penalised(plan, face, rows, keys, scores)
    if common is not None:  # an index past the table finds zero
        scores += jnp.where(common < rows.entries, rows.look(jnp.minimum(common, rows.entries - 1)) * LOG2E, 0.0)
    return scores


def capped(plan: Plan, scores: Array) -> Array:
    if plan.soft_cap is None:
        return scores
    cap = plan.soft_cap * LOG2E
    return cap * tanh(scores / cap)


def cap_slack(plan: Plan, scores: Array) -> Array | float:
    """The derivative of the soft cap where the capped score is ``scores``; any where that is NEVER."""
    return 1.0 if plan.soft_cap is None else 1.0 - jnp.square(jnp.maximum(scores / (plan.soft_cap * LOG2E), -1.0))


def tanh(x: Array) -> Array:
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def hidden(sight: Sight, scores: Array) -> Array:
    return scores if sight.allowed is None else jnp.where(sight.allowed, scores, NEVER)


def biased(
    plan: Plan, face: Any, rows: Rows, keys: Keys | None, scores: Array, common: Array | None, in_sight: bool
) -> tuple[Array, Array | None]:
    """Scores as softmax takes them, and the place of each pair in the table where not all have the ``common`` one."""
    if in_sight:
        return capped(plan, plainly(plan, face, rows, keys, scores, common)), None
    sight = in_detail(plan, face, rows, keys, scores)
    return hidden(sight, capped(plan, sight.scores)), sight.index


def weights_of(face: Any, scores: Array, log_sum: Array) -> Array:
    """Of softmax, from ``biased`` scores."""
    return jnp.exp2(scores - face.queries(log_sum))


def gradient_of(plan: Plan, face: Any, scores: Array, weights: Array, d_weights: Array, slack: Array) -> Array:
    """The gradient of scores before the soft cap, where ``scores`` are ``biased``."""
    return weights * (d_weights - face.queries(slack)) * cap_slack(plan, scores)


def walk(tile: Any, first: Array, plain: Array, detailed: Array, last: Array, kept: Any) -> Any:
    """Calls ``kept = tile(in_sight, n, kept)`` for each tile from first to last, which may lie anywhere next to the plain ones."""
    kept = jax.lax.fori_loop(first, jnp.minimum(plain, last), functools.partial(tile, False), kept)
    kept = jax.lax.fori_loop(plain, jnp.minimum(detailed, last), functools.partial(tile, True), kept)
    return jax.lax.fori_loop(jnp.maximum(detailed, first), last, functools.partial(tile, False), kept)
