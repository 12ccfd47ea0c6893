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
    args: list[Array]  # the head's number for each function of the distance
    lookup: Callable[[Array], Array]  # looks up indices in the head's table
    num_entries: int  # the length of that table
    row_index: Array | None = None  # row numbers within a program's arrays


class Keys(NamedTuple):
    """Holds the data of the keys of a tile, [s] each."""

    positions: Array
    segments: Array | None


class MaskedScores(NamedTuple):
    """Holds the scores of a query tile and some keys, with the mask and the table index of each pair."""

    scores: Array  # in units of log2 e
    allowed: Array | None  # None if all pairs are allowed
    index: Array | None  # into the table


def with_distance_biases(plan: Plan, layout: Any, rows: Rows, keys: Keys | None, scores: Array) -> Array:
    """Adds the biases that are functions of the distance."""
    for function, arg in zip(plan.functions, rows.args, strict=True):
        scores = scores + function(layout.queries(rows.positions) - layout.keys(keys.positions), arg)
    return scores


def masked_scores(plan: Plan, layout: Any, rows: Rows, keys: Keys, scores: Array) -> MaskedScores:
    """Adds the position biases to the scores of a partial block, and computes its mask and table indices."""
    of_queries, of_keys = layout.queries(rows.positions), layout.keys(keys.positions)
    segments = (layout.queries(rows.segments), layout.keys(keys.segments)) if plan.rules.segmented else (None, None)
    allowed = jnp.broadcast_to(plan.rules.pairs(of_queries, of_keys, *segments), scores.shape)
    scores = with_distance_biases(plan, layout, rows, keys, scores)
    if plan.index is None:
        return MaskedScores(scores, allowed, None)
    index = jnp.broadcast_to(plan.index(of_queries, of_keys), scores.shape)

    def add(n: Array, scores: Array) -> Array:
        return scores + jnp.where(index == n, rows.lookup(n) * LOG2E, 0.0)

    return MaskedScores(jax.lax.fori_loop(*index_range(rows, index), add, scores), allowed, index)


def index_range(rows: Rows, index: Array) -> tuple[Array, Array]:
    """Returns the range [from, to) of table entries that contains the indices."""
    return index.min(1).min(0), jnp.minimum(index.max(1).max(0) + 1, rows.num_entries)


def full_block_scores(plan: Plan, layout: Any, rows: Rows, keys: Keys | None, scores: Array, common_index: Array | None) -> Array:
    """Adds the position biases to the scores of a full block; ``common_index`` is the table index of all its pairs."""
    scores = with_distance_biases(plan, layout, rows, keys, scores)
    if common_index is not None:  # an index past the end of the table adds zero
        scores += jnp.where(
            common_index < rows.num_entries, rows.lookup(jnp.minimum(common_index, rows.num_entries - 1)) * LOG2E, 0.0
        )
    return scores


def apply_soft_cap(plan: Plan, scores: Array) -> Array:
    if plan.soft_cap is None:
        return scores
    cap = plan.soft_cap * LOG2E
    return cap * tanh(scores / cap)


def soft_cap_derivative(plan: Plan, scores: Array) -> Array | float:
    """Computes the derivative of the soft cap from the capped scores; its value is arbitrary where they are MASK_VALUE."""
    return 1.0 if plan.soft_cap is None else 1.0 - jnp.square(jnp.maximum(scores / (plan.soft_cap * LOG2E), -1.0))


def tanh(x: Array) -> Array:
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def apply_mask(masked: MaskedScores, scores: Array) -> Array:
    return scores if masked.allowed is None else jnp.where(masked.allowed, scores, MASK_VALUE)


def biased(
    plan: Plan, layout: Any, rows: Rows, keys: Keys | None, scores: Array, common_index: Array | None, is_full_block: bool
) -> tuple[Array, Array | None]:
    """Computes scores as softmax takes them, and the table index of each pair, or None for a full block: ``common_index``."""
    if is_full_block:
        return apply_soft_cap(plan, full_block_scores(plan, layout, rows, keys, scores, common_index)), None
    masked = masked_scores(plan, layout, rows, keys, scores)
    return apply_mask(masked, apply_soft_cap(plan, masked.scores)), masked.index


def weights_of(layout: Any, scores: Array, lse: Array) -> Array:
    """Computes the softmax weights from scores that ``biased`` returned."""
    return jnp.exp2(scores - layout.queries(lse))


def gradient_of(plan: Plan, layout: Any, scores: Array, weights: Array, d_weights: Array, delta: Array) -> Array:
    """Computes the gradient of the scores before the soft cap, from ``scores`` that ``biased`` returned."""
    return weights * (d_weights - layout.queries(delta)) * soft_cap_derivative(plan, scores)


def walk(tile: Any, first: Array, full_begin: Array, full_end: Array, last: Array, carry: Any) -> Any:
    """Calls ``carry = tile(is_full_block, n, carry)`` for each tile from first to last, and returns the last ``carry``.

    Tiles in [full_begin, full_end) are full blocks. This range may extend past ``last`` and, if it is empty, may lie anywhere.
    """
    carry = jax.lax.fori_loop(first, jnp.minimum(full_begin, last), functools.partial(tile, False), carry)
    carry = jax.lax.fori_loop(full_begin, jnp.minimum(full_end, last), functools.partial(tile, True), carry)
    return jax.lax.fori_loop(jnp.maximum(full_end, first), last, functools.partial(tile, False), carry)
