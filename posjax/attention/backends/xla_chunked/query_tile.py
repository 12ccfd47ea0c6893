"""One query tile of the tile walk: its part of the operands, the key tiles it visits, and the scores of one tile."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import BiasTerm, Tile
from posjax.attention.backends.xla_chunked.layout import Operands, Plan
from posjax.core.masks import cut_pairs
from posjax.typing import Array


class KeyTile(NamedTuple):
    """Holds one key tile, with the mask and the bias array between it and a query tile."""

    key: Array  # [B, K, s, H]
    value: Array  # [B, K, s, V]
    columns: list[Any]  # one entry per term
    allowed: Array
    positions: Array
    bias: Array | None  # [B or 1, N or 1, t or 1, s or 1]


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """Holds one query tile: its part of the operands, and the key tiles that it visits, in ascending order."""

    plan: Plan
    operands: Operands
    index: Array
    query: Array  # [B, N, t, H]
    query_positions: Array
    terms: tuple[BiasTerm, ...]  # sliced to these queries, not loaded; do not use their columns
    kv_tiles: Array  # [J] indices of key tiles, of which the first ``count`` are valid
    count: Array
    leftmost: Array  # [1 or B, t] the first key tile in which a query may have an allowed key; J if none

    def key_tile(self, at: Array) -> KeyTile:
        """Returns entry ``at`` of ``kv_tiles``: the key tile with ``at`` visits left to do on its left."""
        plan, x = self.plan, self.operands
        j = self.kv_tiles[at]
        start = j * plan.columns
        key_positions = jax.lax.dynamic_slice_in_dim(x.key_positions, start, plan.columns, axis=1)
        pairs = self.index * plan.rows, plan.rows, start, plan.columns
        mask = x.mask.cut(*pairs)
        allowed = mask.allowed(self.query_positions, key_positions)
        if plan.keys != x.key_positions.shape[1]:  # in a form that symbolic lengths allow
            allowed &= (start + jnp.arange(plan.columns) < plan.keys)[None, None, None]
        columns = [term.cut(0, plan.rows, start, plan.columns).columns for term in x.terms]
        return KeyTile(x.key[j], x.value[j], columns, allowed, key_positions, cut_pairs(x.bias, *pairs))

    def logits(self, key: Array) -> Array:
        """Computes scale * q.k, [B, N, t, s] float32."""
        return multiply_by_group("bkgth,bksh->bkgts", self.query, key) * self.operands.scale


def multiply_by_group(form: str, x: Array, y: Array) -> Array:
    """Multiplies an array with query heads [B, N, ...] by one with key heads [B, K, ...]; the result is [B, N, ...] float32."""
    grouped = x.reshape(x.shape[0], y.shape[1], -1, *x.shape[2:])
    out = jnp.einsum(form, grouped, y, preferred_element_type=jnp.float32)
    return out.reshape(x.shape[0], x.shape[1], *out.shape[3:])


def sum_over_groups(x: Array, y: Array, heads: int) -> Array:
    """Computes x^T y, summed over queries and the heads of a group: [B, N, t, s], [B, N, t, H] -> [B, K, s, H] float32."""
    x, y = (a.reshape(a.shape[0], heads, -1, *a.shape[2:]) for a in (x, y))
    return jnp.einsum("bkgts,bkgth->bksh", x, y, preferred_element_type=jnp.float32)


def take_query_tile(plan: Plan, x: Operands, index: Array) -> QueryTile:
    """Returns query tile ``index``, with the key tiles in which the mask may allow a pair."""
    query_positions = jax.lax.dynamic_slice_in_dim(x.query_positions, index * plan.rows, plan.rows, axis=1)
    may_attend = _may_attend(plan, x, index, query_positions)
    is_visible = may_attend.any((0, 1))
    return QueryTile(
        plan=plan,
        operands=x,
        index=index,
        query=x.query[index],
        query_positions=query_positions,
        terms=tuple(term.cut(index * plan.rows, plan.rows, 0, plan.columns) for term in x.terms),
        kv_tiles=jnp.nonzero(is_visible, size=is_visible.size, fill_value=0)[0].astype(jnp.int32),
        count=is_visible.sum(dtype=jnp.int32),
        leftmost=jnp.where(may_attend.any(-1), may_attend.argmax(-1), is_visible.size),
    )


def _may_attend(plan: Plan, x: Operands, index: Array, query_positions: Array) -> Array:
    """Returns which queries may have an allowed key in which key tiles, [1 or B, t, J] bool.

    Positions and segments are compared by their range in each key tile, so the answer may be True for a tile with no allowed key.
    """

    def ranges(ids: Array) -> tuple[Array, Array]:
        tiles = ids.reshape(ids.shape[0], 1, -1, plan.columns)
        return tiles.min(-1), tiles.max(-1)

    mask, (left, right) = x.mask, x.mask.window
    (first, last), query_ids = ranges(x.key_positions), query_positions[..., None]
    may_attend = jnp.ones((1, plan.rows, first.shape[-1]), bool)
    if mask.is_causal:
        may_attend &= first <= query_ids
    if left is not None:
        may_attend &= last >= query_ids - left
    if right is not None:
        may_attend &= first <= query_ids + right
    if mask.query_segments is not None and mask.key_segments is not None:
        first, last = ranges(mask.key_segments)
        query_ids = jax.lax.dynamic_slice_in_dim(mask.query_segments, index * plan.rows, plan.rows, axis=1)[..., None]
        may_attend &= (first <= query_ids) & (query_ids <= last)
    if mask.boolean is not None:
        boolean = mask.cut(index * plan.rows, plan.rows, 0, x.key_positions.shape[1]).boolean
        assert boolean is not None
        boolean = boolean.any(1)
        boolean = jnp.broadcast_to(boolean, (*boolean.shape[:2], x.key_positions.shape[1]))
        may_attend &= boolean.reshape(*boolean.shape[:2], -1, plan.columns).any(-1)
    return may_attend


def tile_scores(
    row: QueryTile,
    kv_tile: KeyTile,
    logits: Array,
    bias: Array | None,
    rows: list,
    columns: list,
    tables: list,
    carries: list,
    saturated: list,
) -> tuple[Array, list[Any]]:
    """Computes the scores of one tile before the mask, and the carries for the tile to its left.

    Rows, columns, tables and carries are lists with one entry per term. So is ``saturated``: the bias of each row for a term that
    has saturated, and None for a term to evaluate.
    """
    tile = Tile(logits, kv_tile.allowed, row.query_positions, kv_tile.positions)
    scores, carries_out = logits if bias is None else logits + bias.astype(jnp.float32), []
    for term, term_rows, by_key, table, carry, constant in zip(row.terms, rows, columns, tables, carries, saturated, strict=True):
        if constant is not None:
            scores = scores + constant[..., None]
        else:
            of_term, carry = term.function(tile, term_rows, by_key, table, carry)
            scores = scores + of_term
        carries_out.append(carry)
    cap = row.plan.soft_cap
    return scores if cap is None else cap * jnp.tanh(scores / cap), carries_out


def can_saturate(terms: tuple[BiasTerm, ...]) -> bool:
    """Returns whether a walk has a plain part, that is, whether every term with a carry can saturate."""
    return all(term.carry is None or term.can_saturate for term in terms)


def saturated_biases(terms: tuple[BiasTerm, ...], rows, tables, carries) -> tuple[list[Array | None], list[Array | None]]:
    """Returns which rows have saturated, and their bias, as two lists over the terms; None for a term without a carry."""
    pairs = [
        (None, None) if term.carry is None else term.saturate(term_rows, table, carry)
        for term, term_rows, table, carry in zip(terms, rows, tables, carries, strict=True)
    ]
    return [saturated for saturated, _ in pairs], [bias for _, bias in pairs]


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes function(plan, *args) run its batch elements one after the other under vmap.

    In a batched loop, every element would run as many steps as the longest one and copy its accumulators at every tile.
    """

    @functools.wraps(function)
    def called(plan: Plan, *args: Any) -> Any:
        return jax.custom_batching.sequential_vmap(functools.partial(function, plan))(*args)

    return called
