"""The backward pass of the tile walk: softmax weights and carries are recomputed, and terms are differentiated tile by tile."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.xla_chunked.layout import Operands, Plan, unblock
from posjax.attention.backends.xla_chunked.query_tile import (
    KeyTile,
    QueryTile,
    can_saturate,
    multiply_by_group,
    one_by_one,
    saturated_biases,
    sum_over_groups,
    take_query_tile,
    tile_scores,
)
from posjax.typing import Array

Leaves = list[Array]  # the floating-point leaves of one part, such as the rows, of all terms


def floats(tree: Any) -> tuple[list[Array], Any]:
    """Returns the floating-point leaves of a pytree, and a function that returns the pytree with these leaves replaced."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def replaced(new: list[Array]) -> Any:
        remaining = iter(new)
        return jax.tree.unflatten(structure, [next(remaining) if c else leaf for leaf, c in zip(leaves, chosen, strict=True)])

    return [leaf for leaf, c in zip(leaves, chosen, strict=True) if c], replaced


def zeros_like(leaves: list[Array]) -> list[Array]:
    """Returns zeros of the leaves' shapes, in float32 at least."""
    return [jnp.zeros(leaf.shape, jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32) for leaf in leaves]


def _add_at(x: Array, part: Array, start: Array) -> Array:
    """Adds a tile to x [B, K, S, ...] at position ``start`` of the axis S."""
    here = jax.lax.dynamic_slice_in_dim(x, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, here + part.astype(x.dtype), start, axis=2)


def _add_pairs(x: Array, part: Array, row_start: Array, column_start: Array) -> Array:
    """Adds a tile to x [B or 1, N or 1, T or 1, S or 1]; along an axis of length 1 the tile was summed up."""
    at = (0, 0, row_start if x.shape[2] > 1 else 0, column_start if x.shape[3] > 1 else 0)
    here = jax.lax.dynamic_slice(x, at, part.shape)
    return jax.lax.dynamic_update_slice(x, here + part.astype(x.dtype), at)


def _sum(a: list[Array], b: list[Array]) -> list[Array]:
    return [x + y.astype(x.dtype) for x, y in zip(a, b, strict=True)]


def runtime_zero(delta: Array) -> Array:
    """Returns a zero that depends on the cotangent, so that XLA cannot hoist the accumulators to the start of the program.

    Constants have no fixed place in the schedule, and XLA puts these, which are as large as keys and values, at the very beginning.
    """
    magnitude = jax.lax.bitcast_convert_type(delta.ravel()[0], jnp.int32) & 0x7FFFFFFF  # not negative, even for NaN
    return jnp.minimum(magnitude, 0).astype(jnp.float32)


def delta_of(out: Array, d_out: Array) -> Array:
    """Computes rowsum(d_out * out) in float32, which the derivative of the softmax subtracts from the gradient of every weight."""
    # tile by tile, because the products of all rows at once would be materialized in float32
    return jax.lax.map(lambda both: (both[0].astype(jnp.float32) * both[1].astype(jnp.float32)).sum(-1), (out, d_out))


class _ByQuery(NamedTuple):
    """Holds gradients that one query tile accumulates over its key tiles; those of tables accumulate over all query tiles."""

    query: Array
    rows: Leaves
    tables: Leaves


class _ByKey(NamedTuple):
    """Holds gradients that are accumulated over all query tiles."""

    key: Array
    value: Array
    columns: Leaves
    bias: Leaves  # one array, or none


@dataclasses.dataclass(frozen=True)
class _TermLeaves:
    """Holds a query tile with its terms split into floating-point leaves, as ``jax.vjp`` needs them.

    Attributes:
      row: the query tile.
      raw_rows: rows before ``BiasTerm.load``.
      tables, carries: of the terms; carries are those that the rightmost key tile receives.
      put_raw_rows, put_rows, put_tables, put_carries: leaves -> that part of every term, with its other leaves as they are.
    """

    row: QueryTile
    raw_rows: Leaves
    tables: Leaves
    carries: Leaves
    put_raw_rows: Callable[[Leaves], list[Any]]
    put_rows: Callable[[Leaves], list[Any]]
    put_tables: Callable[[Leaves], list[Any]]
    put_carries: Callable[[Leaves], list[Any]]

    @classmethod
    def of(cls, row: QueryTile) -> "_TermLeaves":
        raw_rows, put_raw_rows = floats([term.rows for term in row.terms])
        tables, put_tables = floats([term.tables for term in row.terms])
        carries, put_carries = floats([term.carry for term in row.terms])
        put_rows = floats([term.loaded().rows for term in row.terms])[1]
        return cls(row, raw_rows, tables, carries, put_raw_rows, put_rows, put_tables, put_carries)

    def load(self, raw_rows: Leaves, tables: Leaves) -> Leaves:
        """Returns the rows as the terms' functions take them."""
        parts = zip(self.row.terms, self.put_raw_rows(raw_rows), self.put_tables(tables), strict=True)
        return floats([dataclasses.replace(term, rows=rows, tables=table).loaded().rows for term, rows, table in parts])[0]

    def scores(
        self,
        kv_tile: KeyTile,
        logits: Array,
        bias: Array | None,
        rows: Leaves,
        columns: Leaves,
        tables: Leaves,
        carries: Leaves,
        saturated: list,
    ) -> tuple[Array, Leaves]:
        """Computes ``tile_scores`` from leaves."""
        parts = self.put_rows(rows), floats(kv_tile.columns)[1](columns), self.put_tables(tables), self.put_carries(carries)
        scores, carries_out = tile_scores(self.row, kv_tile, logits, bias, *parts, saturated)
        return scores, floats(carries_out)[0]

    def saturated(self, rows: Leaves, tables: Leaves, carries: Leaves) -> list[Array | None]:
        """Returns the bias of every term's saturated rows."""
        return saturated_biases(self.row.terms, self.put_rows(rows), self.put_tables(tables), self.put_carries(carries))[1]

    def received(self, rows: Leaves, first: Array) -> Leaves:
        """Recomputes, from right to left, the carries that the visited key tiles from ``first`` on receive, [J, B, N, t, ...]."""
        row, unsaturated = self.row, [None] * len(self.row.terms)

        def step(i: Array, state: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves]:
            carries, received = state
            at = row.count - 1 - i
            kv_tile = row.key_tile(at)
            columns = floats(kv_tile.columns)[0]
            logits = row.logits(kv_tile.key)
            carries = self.scores(kv_tile, logits, kv_tile.bias, rows, columns, self.tables, carries, unsaturated)[1]
            return carries, [r.at[at - 1].set(c) for r, c in zip(received, carries, strict=True)]

        received = [jnp.broadcast_to(c, (row.operands.key.shape[0], *c.shape)) for c in self.carries]
        return jax.lax.fori_loop(0, row.count - first - 1, step, (self.carries, received))[1]


@dataclasses.dataclass(frozen=True)
class _Backward:
    """Computes the backward pass of one query tile.

    Attributes:
      leaves: the query tile.
      rows: loaded rows.
      lse, delta: [B, N, t], of the complete rows.
      d_out: [B, N, t, V] float32.
    """

    leaves: _TermLeaves
    rows: Leaves
    lse: Array
    delta: Array
    d_out: Array

    def step(self, at: Array, state: Any, carries: Leaves, saturated: list[Array | None]) -> Any:
        """Adds the gradients of one key tile to ``state``: those by query, those by key, of the carries, and of ``saturated``."""
        by_query, by_key, d_carries, d_saturated = state
        row = self.leaves.row
        kv_tile, j = row.key_tile(at), row.kv_tiles[at]
        key, value, columns = kv_tile.key, kv_tile.value, floats(kv_tile.columns)[0]
        inputs = row.logits(key), kv_tile.bias, self.rows, columns, self.leaves.tables, carries, saturated
        (scores, _), vjp = jax.vjp(functools.partial(self.leaves.scores, kv_tile), *inputs)
        weights = jnp.where(kv_tile.allowed, jnp.exp(scores - self.lse[..., None]), 0.0)
        d_weights = multiply_by_group("bkgtv,bksv->bkgts", self.d_out.astype(value.dtype), value)
        d_scores = weights * (d_weights - self.delta[..., None])
        d_logits, d_bias, d_rows, d_columns, d_tables, d_carries, more_saturated = vjp((d_scores, d_carries))
        d_logits = d_logits.astype(key.dtype)
        d_key = by_key.key.at[j].add(sum_over_groups(d_logits, row.query, key.shape[1]))
        d_value = by_key.value.at[j].add(sum_over_groups(weights.astype(value.dtype), self.d_out.astype(value.dtype), key.shape[1]))
        start = j * row.plan.columns
        d_columns = [_add_at(d, more, start) for d, more in zip(by_key.columns, d_columns, strict=True)]
        d_query = by_query.query + multiply_by_group("bkgts,bksh->bkgth", d_logits, key)
        return (
            _ByQuery(d_query, _sum(by_query.rows, d_rows), _sum(by_query.tables, d_tables)),
            _ByKey(d_key, d_value, d_columns, [_add_pairs(d, d_bias, row.index * row.plan.rows, start) for d in by_key.bias]),
            d_carries,
            jax.tree.map(jnp.add, d_saturated, more_saturated),
        )

    def plain_steps(self, first: Array, final: Leaves, state: Any) -> Any:
        """Processes the ``first`` key tiles, in which every row has saturated; ``final`` are the carries after them."""
        saturated, vjp = jax.vjp(self.leaves.saturated, self.rows, self.leaves.tables, final)
        by_query, by_key, d_carries, d_saturated = jax.lax.fori_loop(
            0,
            first,
            lambda at, state: self.step(at, state, final, saturated),
            (*state, jax.tree.map(jnp.zeros_like, saturated)),
        )
        d_rows, d_tables, more_carries = vjp(d_saturated)
        by_query = _ByQuery(by_query.query, _sum(by_query.rows, d_rows), _sum(by_query.tables, d_tables))
        return by_query, by_key, _sum(d_carries, more_carries)

    def counted_steps(self, first: Array, state: Any) -> Any:
        """Processes the key tiles from ``first`` on, in which the terms pass carries."""
        received = self.leaves.received(self.rows, first)
        unsaturated: list[Array | None] = [None] * len(self.leaves.row.terms)
        return jax.lax.fori_loop(
            first,
            self.leaves.row.count,
            lambda at, state: self.step(at, state, [r[at] for r in received], unsaturated),
            (*state, unsaturated),
        )[:3]


@one_by_one
def gradients(plan: Plan, x: Operands, saved: Any, d_out: Array, delta: Array, d_final: Leaves) -> dict[str, Any]:
    """Computes the gradients of the operands' floating-point leaves.

    Args:
      saved: the residuals from ``forward.outputs``. If ``plan.is_part``, the log-sum-exp must be that of the complete rows.
      d_out: the gradient of the result, of the complete rows.
      delta: ``delta_of`` the complete rows.
      d_final: the gradients of the floating-point leaves of the final carries, [I, B, N, t, ...].

    Returns:
      A dict of gradients. Query, rows and carries have query tiles as their first axis, key and value have key tiles. Rows,
      columns, tables and carries are lists of the floating-point leaves of all terms; bias is a list of one array or none.
    """
    lse, first, final = saved

    def one(totals: tuple[Leaves, _ByKey], step: Any) -> tuple[Any, Any]:
        (d_tables, by_key), (index, lse, first, final, d_out, delta, d_final) = totals, step
        row = take_query_tile(plan, x, index)
        leaves = _TermLeaves.of(row)
        rows, load_vjp = jax.vjp(leaves.load, leaves.raw_rows, leaves.tables)
        backward = _Backward(leaves, rows, lse, delta, d_out.astype(jnp.float32))
        state = _ByQuery(jnp.zeros(row.query.shape, jnp.float32), zeros_like(rows), d_tables), by_key, d_final
        if can_saturate(row.terms):
            state = backward.plain_steps(first, floats(final)[0], state)
        if leaves.carries:
            state = backward.counted_steps(first, state)
        (d_query, d_rows, d_tables), by_key, d_carries = state
        d_scale = (d_query * row.query.astype(jnp.float32)).sum()
        d_raw_rows, more_tables = load_vjp([d.astype(r.dtype) for d, r in zip(d_rows, rows, strict=True)])
        d_query = d_query * x.scale
        row_gradients = d_query if plan.is_part else d_query.astype(x.query.dtype), d_raw_rows, d_carries, d_scale
        return (_sum(d_tables, more_tables), by_key), row_gradients

    columns, tables = floats([term.columns for term in x.terms])[0], floats([term.tables for term in x.terms])[0]
    d_key, d_value = zeros_like([x.key, x.value])
    start = zeros_like(tables), _ByKey(d_key, d_value, zeros_like(columns), zeros_like(floats(x.bias)[0]))
    start = jax.tree.map(lambda zeros: jnp.full_like(zeros, runtime_zero(delta)), start)
    (d_tables, by_key), (d_query, d_rows, d_carries, d_scale) = jax.lax.scan(
        one, start, (jnp.arange(x.query.shape[0]), lse, first, final, d_out, delta, d_final)
    )
    return dict(
        query=d_query,
        key=by_key.key * x.scale,
        value=by_key.value,
        rows=d_rows,
        columns=by_key.columns,
        bias=by_key.bias,
        tables=d_tables,
        carries=d_carries,
        scale=d_scale.sum(),
    )


def cotangent(x: Operands, d: dict[str, Any]) -> Operands:
    """Assembles the results of ``gradients`` into the cotangent of the operands, in their dtypes; None for integer operands."""

    def like(primal: Any, gradients: list[Array]) -> Any:
        leaves, _ = floats(primal)
        cast_gradients = iter([d.astype(p.dtype) for d, p in zip(gradients, leaves, strict=True)])
        return jax.tree.map(lambda p: next(cast_gradients) if jnp.issubdtype(p.dtype, jnp.inexact) else None, primal)

    rows = like([term.rows for term in x.terms], [unblock(tiles) for tiles in d["rows"]])
    columns = like([term.columns for term in x.terms], d["columns"])
    tables = like([term.tables for term in x.terms], d["tables"])
    carries = like([term.carry for term in x.terms], d["carries"])
    parts = zip(x.terms, rows, columns, tables, carries, strict=True)
    return Operands(
        query=d["query"].astype(x.query.dtype),
        key=d["key"].astype(x.key.dtype),
        value=d["value"].astype(x.value.dtype),
        terms=tuple(dataclasses.replace(term, rows=r, columns=c, tables=t, carry=k) for term, r, c, t, k in parts),
        mask=like(x.mask, []),
        bias=like(x.bias, d["bias"]),
        query_positions=like(x.query_positions, []),
        key_positions=like(x.key_positions, []),
        scale=d["scale"].astype(x.scale.dtype),
    )
