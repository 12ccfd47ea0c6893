"""Scores of a tile on GPUs, for every lowering: position biases, masks, the soft cap, softmax weights and gradients.

Biases that are functions of two tokens are ``PairProgram``s. Their numbers and features are numbered over all pairs of a call.

A *score layout* is [queries, keys] or its transpose. It reshapes a number per query so that it broadcasts over keys, and a number
per key so that it broadcasts over queries.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import LOG2E, MASK_VALUE
from posjax.attention.backends.gpu.plan import Plan, arg_shapes
from posjax.attention.backends.kernel_biases import PairProgram, as_feature
from posjax.typing import Array


class Rows(NamedTuple):
    """Holds the data of the queries of a tile, [t] each."""

    positions: Array
    segments: Array | None
    number: Callable[[Any], Array]  # looks up one of the head's numbers of all pairs
    features: list[Array]  # of all pairs, as ``features_of`` stores them
    lookup: Callable[[Array], Array]  # looks up indices in the head's table
    num_entries: int  # the length of that table
    row_index: Array | None = None  # row numbers within a program's arrays


class Keys(NamedTuple):
    """Holds the data of the keys of a tile, [s] each."""

    positions: Array
    segments: Array | None
    features: list[Array]


class MaskedScores(NamedTuple):
    """Holds the scores of a query tile and some keys, with the mask and the table index of each pair."""

    scores: Array  # in units of log2 e
    allowed: Array
    index: Array | None  # into the table


class PairInputs(NamedTuple):
    """Holds the inputs of a pair's program in a tile, and their places among those of all pairs."""

    program: PairProgram
    queries: tuple[Array, ...]  # in the score layout
    keys: tuple[Array, ...]
    number: Callable[[Any], Array]  # returns one of the numbers of the pair: first its args, then those of its read
    first_number: int
    first_feature: int

    @property
    def num_args(self) -> int:
        return sum(map(math.prod, arg_shapes(self.program)))

    @property
    def num_read(self) -> int:
        """Returns the number of entries of a table, or of hinges of a network."""
        return self.program.shapes[len(arg_shapes(self.program))][0]


def pair_inputs(plan: Plan, layout: Any, rows: Rows, keys: Keys | None) -> list[PairInputs]:
    """Returns the inputs of all pairs. ``keys`` may be None if there are none."""
    inputs, first_number, first_feature = [], 0, 0
    for program in plan.pairs:
        assert keys is not None  # ``keys_of`` loads them for pairs
        if program.features:
            kinds = list(enumerate(program.features, first_feature))
            of_queries = tuple(layout.queries(as_feature(rows.features[n], kind)) for n, kind in kinds)
            of_keys = tuple(layout.keys(as_feature(keys.features[n], kind)) for n, kind in kinds)
        else:
            of_queries, of_keys = (layout.queries(rows.positions),), (layout.keys(keys.positions),)
        number = functools.partial(_number, rows, first_number)
        inputs.append(PairInputs(program, of_queries, of_keys, number, first_number, first_feature))
        first_number, first_feature = first_number + program.size, first_feature + len(program.features)
    return inputs


def _number(rows: Rows, first: int, n: Any) -> Array:
    return rows.number(first + n)


def with_pair_biases(plan: Plan, layout: Any, rows: Rows, keys: Keys | None, scores: Array) -> Array:
    """Adds the biases that are functions of two tokens."""
    for x in pair_inputs(plan, layout, rows, keys):
        if x.program.reads == "table":
            scores = _with_entries(x, scores)
        else:
            scores = scores + x.program.in_log2(x.queries, x.keys, [x.number(n) for n in range(x.program.size)])
    return scores


def _with_entries(x: PairInputs, scores: Array) -> Array:
    """Adds the entries of a table; the loop is over those that the tile reads, often one."""
    at = jnp.broadcast_to(_at(x, x.queries, x.keys, _args(x)), scores.shape)

    def add(n: Array, scores: Array) -> Array:
        return scores + jnp.where(at == n, x.number(x.num_args + n) * LOG2E, 0.0)

    return jax.lax.fori_loop(*_entries(x, at), add, scores)


def _args(x: PairInputs) -> list[Array]:
    return [x.number(n) for n in range(x.num_args)]


def _at(x: PairInputs, queries: tuple[Array, ...], keys: tuple[Array, ...], args: list[Array]) -> Array:
    """Computes the number at which a pair reads, in float32; it is the bias itself if it reads nothing."""
    number = dataclasses.replace(x.program, reads="number")
    return number(queries, keys, [*args, *[0.0] * (x.program.size - len(args))])  # which does not read


def _entries(x: PairInputs, at: Array) -> tuple[Array, Array]:
    """Returns a range [from, to) of the entries of a table that holds all that are read ``at`` a tile."""
    first, last = jnp.maximum(at.min(1).min(0), 0.0), jnp.minimum(at.max(1).max(0), x.num_read - 1.0)
    return jnp.minimum(first, x.num_read).astype(jnp.int32), (jnp.maximum(last, -1.0) + 1.0).astype(jnp.int32)


def masked_scores(plan: Plan, layout: Any, rows: Rows, keys: Keys | None, scores: Array) -> MaskedScores:
    """Adds the position biases to the scores of a partial block, and computes its mask and table indices."""
    assert keys is not None  # ``keys_of`` loads them for partial blocks
    of_queries, of_keys = layout.queries(rows.positions), layout.keys(keys.positions)
    segments = (layout.queries(rows.segments), layout.keys(keys.segments)) if plan.rules.segmented else (None, None)
    allowed = jnp.broadcast_to(plan.rules.pairs(of_queries, of_keys, *segments), scores.shape)
    scores = with_pair_biases(plan, layout, rows, keys, scores)
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
    scores = with_pair_biases(plan, layout, rows, keys, scores)
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
    return jnp.where(masked.allowed, scores, MASK_VALUE)


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


# Gradients of pairs -------------------------------------------------------------------------------------------------------

# The read of a pair is differentiated in loops over its numbers. ``jax.vjp`` of all of them at once would keep a tile for each.


class PairGradients(NamedTuple):
    """Holds sums of gradients of the inputs of pairs' programs in a tile.

    Attributes:
      numbers: [A or more], those of one head and query tile; None on the side of keys, or if none have gradients.
      features: of float features of queries, [t] each, or of keys, [s] each.
    """

    numbers: Array | None
    features: tuple[Array, ...]


def with_pair_gradients(
    plan: Plan, layout: Any, rows: Rows, keys: Keys | None, gradient: Array, side: str, sums: PairGradients
) -> PairGradients:
    """Adds the gradients from a tile to ``sums``.

    Args:
      gradient: that of the scores in nats, before the soft cap.
      side: "query" or "key".
    """
    numbers, features = sums.numbers, dict(zip(plan.float_features, sums.features, strict=True))
    if numbers is None and not features:
        return sums
    for x in pair_inputs(plan, layout, rows, keys):
        is_learned = numbers is not None and x.program.learned
        floats, d_at = [x.first_feature + n for n in x.program.float_features], gradient
        if x.program.reads == "table":  # the index has no gradient
            numbers = _into_entries(x, gradient, numbers) if numbers is not None and is_learned else numbers
            continue
        if x.program.reads == "hinges" and (is_learned or floats):
            d_at, numbers = _through_hinges(x, gradient, numbers)
        # A number per query: Triton sums over one axis of a tile at a time, and the transpose of a scalar would sum over both.
        args = [jnp.full(rows.positions.shape, arg) for arg in _args(x)] if is_learned else []
        if args or floats:
            tokens = rows if side == "query" else keys
            given = [tokens.features[n] for n in floats] if tokens is not None else []
            _, pull = jax.vjp(functools.partial(_at_of, layout, x, gradient.shape, side), args, given)
            d_args, d_features = pull(d_at)
            for n, d_arg in enumerate(d_args, x.first_number):
                assert numbers is not None
                numbers = _into(numbers, n, d_arg.sum(0))
            features |= {n: features[n] + more for n, more in zip(floats, d_features, strict=True)}
    return PairGradients(numbers, tuple(features.values()))


def _at_of(layout: Any, x: PairInputs, shape: tuple[int, ...], side: str, args: list[Array], features: list[Array]) -> Array:
    """Computes the number at which a pair reads from its args, [t] each or none, and its float features on one side."""
    queries, keys = list(x.queries), list(x.keys)
    changed, as_scores = (queries, layout.queries) if side == "query" else (keys, layout.keys)
    for n, feature in zip(x.program.float_features, features, strict=True):
        changed[n] = as_scores(feature)
    args = [layout.queries(arg) for arg in args] or _args(x)
    return jnp.broadcast_to(_at(x, tuple(queries), tuple(keys), args), shape)


def _into(numbers: Array, n: Any, gradient: Array) -> Array:
    return numbers + jnp.where(jnp.arange(numbers.shape[0]) == n, gradient, 0.0)


def _into_entries(x: PairInputs, gradient: Array, numbers: Array) -> Array:
    """Adds to the gradients of the entries of a table."""
    at = jnp.broadcast_to(_at(x, x.queries, x.keys, _args(x)), gradient.shape)
    first = x.first_number + x.num_args

    def add(n: Array, numbers: Array) -> Array:
        return _into(numbers, first + n, jnp.where(at == n, gradient, 0.0).sum(1).sum(0))

    return jax.lax.fori_loop(*_entries(x, at), add, numbers)


def _through_hinges(x: PairInputs, gradient: Array, numbers: Array | None) -> tuple[Array, Array | None]:
    """Computes the gradient of the number at which a network is read, and adds to those of its numbers unless they are None."""
    at = jnp.broadcast_to(_at(x, x.queries, x.keys, _args(x)), gradient.shape)
    places = [x.num_args + n * x.num_read for n in range(3)]

    def one(n: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        d_at, numbers = carry
        weight, offset, unit = (x.number(place + n) for place in places)
        hinge = weight * at + offset
        bent = jnp.where(hinge > 0.0, gradient, 0.0)
        if numbers is not None:
            d_offset = bent.sum(1).sum(0)
            parts = (bent * at).sum(1).sum(0) * unit, d_offset * unit, (bent * hinge).sum(1).sum(0)
            for place, part in zip(places, parts, strict=True):
                numbers = _into(numbers, x.first_number + place + n, part)
        return d_at + bent * (unit * weight), numbers

    d_at, numbers = jax.lax.fori_loop(0, x.num_read, one, (jnp.zeros_like(gradient), numbers))
    if numbers is not None:
        for n in range(places[2] + x.num_read, x.program.size):  # the offset of the network
            numbers = _into(numbers, x.first_number + n, gradient.sum(1).sum(0))
    return d_at, numbers


# The tiles of a program ---------------------------------------------------------------------------------------------------


def walk(tile: Any, first: Array, full_begin: Array, full_end: Array, last: Array, carry: Any) -> Any:
    """Calls ``carry = tile(is_full_block, n, carry)`` for each tile from first to last, and returns the last ``carry``.

    Tiles in [full_begin, full_end) are full blocks. This range may extend past ``last`` and, if it is empty, may lie anywhere.
    """
    carry = jax.lax.fori_loop(first, jnp.minimum(full_begin, last), functools.partial(tile, False), carry)
    carry = jax.lax.fori_loop(full_begin, jnp.minimum(full_end, last), functools.partial(tile, True), carry)
    return jax.lax.fori_loop(jnp.maximum(full_end, first), last, functools.partial(tile, False), carry)
