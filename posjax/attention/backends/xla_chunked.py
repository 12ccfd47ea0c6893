"""Attention as a walk over tiles, in plain XLA: memory grows with T, not with T * S, forward and backward, on any device.

A query tile visits its key tiles from right to left and maintains an online softmax (Milakov & Gimelshein, arXiv:1805.02867;
Dao et al., arXiv:2205.14135). Tiles in which the mask allows no pair are skipped. Bias terms are evaluated in each tile, and the
carry of a term, one number per row, is passed from tile to tile. Once every row has saturated, the rest of the walk is plain: the
bias is one constant per row.

    keys ->      0       1       2       3
    queries 2  [plain] [plain] [count] .......      counting leftward from the diagonal until all rows have saturated
    queries 3  [plain] [plain] [count] [count]

The backward pass recomputes the softmax weights of each tile from its scores and the log-sum-exp of its rows, and differentiates
the function of a term by ``jax.vjp`` on that one tile. Tables therefore get table-sized gradients, and a term needs no hand-written
backward pass. The gradient of a carry flows from left to right, so for each query tile the carries that its key tiles received, one
number per row and tile, are recomputed first.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from posjax.core.bias import BiasTerm, Tile
from posjax.core.masks import Mask
from posjax.typing import Array, Float, Int

# Large enough for matrix products to run at full speed on a CPU, small enough to fit its cache and for rows to saturate early.
_ROWS = _COLUMNS = 128
_MASK_VALUE = -1e30  # the score of a masked pair: its softmax weight is zero
EMPTY_LSE = 1e30  # the log-sum-exp of a row with no allowed key: all its weights are zero
SAVED = "posjax_attention"  # checkpoint name of the residuals of the backward pass, for policies of jax.checkpoint
_INIT_MAX = -1e29  # initial running maximum, above _MASK_VALUE so that a row with no allowed key has zero weights


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    scale: Array | float,
    logits_soft_cap: float | None = None,
    *,
    tile: tuple[int, int] | None = None,
) -> Float[Array, "B T N V"]:
    """Computes attention tile by tile, with first-order gradients for every floating-point argument.

    Args:
      query, ..., logits_soft_cap: as in ``reference.attention``.
      tile: (queries, keys) per tile; None chooses both.

    Returns:
      The result of ``reference.attention``.
    """
    call = (query, key, value, terms, mask, query_positions, key_positions, scale, logits_soft_cap)
    return joined(_attend(*cut_up(*call, tile=tile)), query.shape[1])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the static parameters of a call.

    Attributes:
      rows, columns: the numbers of queries and keys per tile.
      keys: the number of keys that are not padding.
      soft_cap: the soft cap on the scores; None for no cap.
      is_part: whether the call covers only part of the keys of its rows. The results that are added up later are then float32.
    """

    rows: int
    columns: int
    keys: int
    soft_cap: float | None
    is_part: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds the arrays of a call, split into tiles: I query tiles of t rows and J key tiles of s columns, with T and S padded."""

    query: Array  # [I, B, N, t, H]
    key: Array  # [J, B, K, s, H]
    value: Array  # [J, B, K, s, V]
    terms: tuple[BiasTerm, ...]
    mask: Mask
    query_positions: Array  # [1 or B, T]
    key_positions: Array  # [1 or B, S]
    scale: Array


def cut_up(
    query: Array,
    key: Array,
    value: Array,
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Array,
    key_positions: Array,
    scale: Array | float,
    logits_soft_cap: float | None = None,
    *,
    tile: tuple[int, int] | None = None,
    is_part: bool = False,
) -> tuple[Plan, Operands]:
    """Converts the arguments of ``attention`` to the form that ``outputs`` and ``gradients`` take."""
    length, keys = query.shape[1], key.shape[1]
    rows, columns = tile or (_ROWS, max(_COLUMNS, _ROWS * _COLUMNS // length))  # wider tiles where there are few queries
    rows, columns = min(rows, length), min(columns, keys)
    along_rows, along_columns = functools.partial(_pad, to=rows), functools.partial(_pad, to=columns)
    plan = Plan(rows, columns, keys, None if logits_soft_cap is None else float(logits_soft_cap), is_part)
    return plan, Operands(
        query=_blocks(along_rows(query, axis=1), rows),
        key=_blocks(along_columns(key, axis=1), columns),
        value=_blocks(along_columns(value, axis=1), columns),
        terms=tuple(_pad_term(term, rows, columns) for term in terms),
        mask=dataclasses.replace(
            mask,
            boolean=None if mask.boolean is None else along_columns(along_rows(mask.boolean, axis=2), axis=3),
            query_segments=along_rows(mask.query_segments, axis=1),
            key_segments=along_columns(mask.key_segments, axis=1),
        ),
        query_positions=along_rows(query_positions, axis=1),
        key_positions=along_columns(key_positions, axis=1),
        scale=jnp.asarray(scale, jnp.float32),
    )


def joined(out: Array, length: int) -> Array:
    """Converts the result [I, B, N, t, V] to [B, T, N, V] and removes the padding of T."""
    out = jnp.swapaxes(jnp.moveaxis(out, 0, 1), 2, 3)  # [B, I, t, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def whole_rows(tiles: Array) -> Array:
    """Converts [I, B, N, t, ...] to [B, N, T, ...]."""
    tiles = jnp.moveaxis(tiles, 0, 2)
    return tiles.reshape(*tiles.shape[:2], -1, *tiles.shape[4:])


def tiles_of(x: Array, rows: int) -> Array:
    """Converts [B, N, T, ...] to [I, B, N, t, ...] with t = ``rows``, the inverse of ``whole_rows``."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, rows, *x.shape[3:]), 2, 0)


def _blocks(x: Array, size: int) -> Array:
    """Converts [B, L, N, H] to [L / size, B, N, size, H]. XLA fuses what an encoding does to query and key into this one copy."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length // size, size, heads, width).transpose(1, 0, 3, 2, 4)


def _pad(x: Any, *, to: int, axis: int) -> Any:
    """Pads x along an axis to a multiple of ``to``, repeating its last entry.

    A repeated query saturates when the last one does. None, and an x whose axis has length 1, are returned unchanged.
    """
    if x is None or x.shape[axis] == 1 or x.shape[axis] % to == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths, mode="edge")


def _pad_term(term: BiasTerm, rows: int, columns: int) -> BiasTerm:
    return dataclasses.replace(
        term,
        rows=jax.tree.map(functools.partial(_pad, to=rows, axis=2), term.rows),
        columns=jax.tree.map(functools.partial(_pad, to=columns, axis=2), term.columns),
        carry=jax.tree.map(functools.partial(_pad, to=rows, axis=2), term.carry),
    )


# One query tile --------------------------------------------------------------------------------------------------------


class _KeyTile(NamedTuple):
    """Holds one key tile, with the mask between it and a query tile."""

    key: Array  # [B, K, s, H]
    value: Array  # [B, K, s, V]
    columns: list[Any]  # one entry per term
    allowed: Array
    positions: Array


@dataclasses.dataclass(frozen=True)
class _Row:
    """Holds one query tile: its part of the operands, and the key tiles that it visits, in ascending order."""

    plan: Plan
    operands: Operands
    index: Array
    query: Array  # [B, N, t, H]
    query_positions: Array
    terms: tuple[BiasTerm, ...]  # sliced to these queries, not loaded; do not use their columns
    visits: Array  # [J] indices of key tiles, of which the first ``count`` are valid
    count: Array
    leftmost: Array  # [1 or B, t] the first key tile in which a query may have an allowed key; J if none

    def key_tile(self, at: Array) -> _KeyTile:
        """Returns entry ``at`` of ``visits``: the key tile with ``at`` visits left to do on its left."""
        plan, x = self.plan, self.operands
        j = self.visits[at]
        start = j * plan.columns
        key_positions = jax.lax.dynamic_slice_in_dim(x.key_positions, start, plan.columns, axis=1)
        mask = x.mask.cut(self.index * plan.rows, plan.rows, start, plan.columns)
        allowed = mask.allowed(self.query_positions, key_positions)
        if plan.keys < x.key_positions.shape[1]:
            allowed &= start + jnp.arange(plan.columns) < plan.keys
        columns = [term.cut(0, plan.rows, start, plan.columns).columns for term in x.terms]
        return _KeyTile(x.key[j], x.value[j], columns, allowed, key_positions)

    def logits(self, key: Array) -> Array:
        """Computes scale * q.k, [B, N, t, s] float32."""
        return _of_groups("bkgth,bksh->bkgts", self.query, key) * self.operands.scale


def _of_groups(form: str, x: Array, y: Array) -> Array:
    """Multiplies an array with query heads [B, N, ...] by one with key heads [B, K, ...]; the result is [B, N, ...] float32."""
    grouped = x.reshape(x.shape[0], y.shape[1], -1, *x.shape[2:])
    out = jnp.einsum(form, grouped, y, preferred_element_type=jnp.float32)
    return out.reshape(x.shape[0], x.shape[1], *out.shape[3:])


def _into_groups(x: Array, y: Array, heads: int) -> Array:
    """Computes x^T y, summed over queries and the heads of a group: [B, N, t, s], [B, N, t, H] -> [B, K, s, H] float32."""
    x, y = (a.reshape(a.shape[0], heads, -1, *a.shape[2:]) for a in (x, y))
    return jnp.einsum("bkgts,bkgth->bksh", x, y, preferred_element_type=jnp.float32)


def _row(plan: Plan, x: Operands, index: Array) -> _Row:
    query_positions = jax.lax.dynamic_slice_in_dim(x.query_positions, index * plan.rows, plan.rows, axis=1)
    may_meet = _may_meet(plan, x, index, query_positions)
    live = may_meet.any((0, 1))
    return _Row(
        plan=plan,
        operands=x,
        index=index,
        query=x.query[index],
        query_positions=query_positions,
        terms=tuple(term.cut(index * plan.rows, plan.rows, 0, plan.columns) for term in x.terms),
        visits=jnp.nonzero(live, size=live.size, fill_value=0)[0].astype(jnp.int32),
        count=live.sum(dtype=jnp.int32),
        leftmost=jnp.where(may_meet.any(-1), may_meet.argmax(-1), live.size),
    )


def _may_meet(plan: Plan, x: Operands, index: Array, query_positions: Array) -> Array:
    """Returns which queries may have an allowed key in which key tiles, [1 or B, t, J] bool.

    Positions and segments are compared by their range in each key tile, so the answer may be True for a tile with no allowed key.
    """

    def ranges(ids: Array) -> tuple[Array, Array]:
        tiles = ids.reshape(ids.shape[0], 1, -1, plan.columns)
        return tiles.min(-1), tiles.max(-1)

    mask, (left, right) = x.mask, x.mask.window
    (first, last), here = ranges(x.key_positions), query_positions[..., None]
    may = jnp.ones((1, plan.rows, first.shape[-1]), bool)
    if mask.is_causal:
        may &= first <= here
    if left is not None:
        may &= last >= here - left
    if right is not None:
        may &= first <= here + right
    if mask.query_segments is not None and mask.key_segments is not None:
        first, last = ranges(mask.key_segments)
        here = jax.lax.dynamic_slice_in_dim(mask.query_segments, index * plan.rows, plan.rows, axis=1)[..., None]
        may &= (first <= here) & (here <= last)
    if mask.boolean is not None:
        boolean = mask.cut(index * plan.rows, plan.rows, 0, x.key_positions.shape[1]).boolean.any(1)
        boolean = jnp.broadcast_to(boolean, (*boolean.shape[:2], x.key_positions.shape[1]))
        may &= boolean.reshape(*boolean.shape[:2], -1, plan.columns).any(-1)
    return may


def _scores(row: _Row, seen: _KeyTile, logits, rows, columns, tables, carries, saturated) -> tuple[Array, list[Any]]:
    """Computes the scores of one tile before the mask, and the carries for the tile to its left.

    Rows, columns, tables and carries are lists with one entry per term. So is ``saturated``: the bias of each row for a term that
    has saturated, and None for a term to evaluate.
    """
    tile = Tile(logits, seen.allowed, row.query_positions, seen.positions)
    scores, handed_on = logits, []
    for term, own, by_key, table, carry, constant in zip(row.terms, rows, columns, tables, carries, saturated, strict=True):
        if constant is not None:
            scores = scores + constant[..., None]
        else:
            bias, carry = term.function(tile, own, by_key, table, carry)
            scores = scores + bias
        handed_on.append(carry)
    cap = row.plan.soft_cap
    return scores if cap is None else cap * jnp.tanh(scores / cap), handed_on


def _can_saturate(terms: tuple[BiasTerm, ...]) -> bool:
    """Returns whether a walk has a plain part, that is, whether every term with a carry can saturate."""
    return all(term.carry is None or term.saturate is not None for term in terms)


def _constants(terms: tuple[BiasTerm, ...], rows, tables, carries) -> tuple[list[Array | None], list[Array | None]]:
    """Returns which rows have saturated, and their bias, as two lists over the terms; None for a term without a carry."""
    pairs = [
        (None, None) if term.carry is None else term.saturate(own, table, carry)
        for term, own, table, carry in zip(terms, rows, tables, carries, strict=True)
    ]
    return [saturated for saturated, _ in pairs], [bias for _, bias in pairs]


# Forward ---------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands) -> Array:
    """Computes attention on tiles, [I, B, N, t, V] in the dtype of value."""
    return _forward(plan, operands)[0]


def _one_by_one(function: Any) -> Any:
    """Makes ``function`` run its batch elements one after the other under vmap.

    In a batched loop, every element would run as many steps as the longest one and copy its accumulators at every tile.
    """

    def called(plan: Plan, *args: Any) -> Any:
        return jax.custom_batching.sequential_vmap(functools.partial(function, plan))(*args)

    return called


def _forward(plan: Plan, x: Operands) -> tuple[Array, tuple[Operands, Array, Any]]:
    out, saved = checkpoint_name(outputs(plan, x), SAVED)
    return out, (x, out, saved)


@_one_by_one
def outputs(plan: Plan, x: Operands) -> tuple[Array, Any]:
    """Runs the forward walk of every query tile.

    Returns:
      The result [I, B, N, t, V], and the residuals that ``gradients`` needs: the log-sum-exp of every row [I, B, N, t]
      (``EMPTY_LSE`` where a row has no allowed key), the number of plain tiles among the visited tiles of each query tile [I], and
      the carry of every term after its leftmost tile, [I, B, N, t, ...].
    """

    def one(index: Array) -> tuple[Array, Array, Array, Any]:
        row = _row(plan, x, index)
        loaded = [term.loaded() for term in row.terms]
        rows, tables = [term.rows for term in loaded], [term.tables for term in loaded]

        def visit(at: Array, softmax: tuple[Array, Array, Array], carries: list[Any], saturated: list[Array | None]) -> Any:
            seen = row.key_tile(at)
            scores, carries = _scores(row, seen, row.logits(seen.key), rows, seen.columns, tables, carries, saturated)
            scores = jnp.where(seen.allowed, scores, _MASK_VALUE)
            highest, total, out = softmax
            new = jnp.maximum(highest, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
            product = _of_groups("bkgts,bksv->bkgtv", weights.astype(seen.value.dtype), seen.value)
            return at - 1, (new, total * shrink + weights.sum(-1), out * shrink[..., None] + product), carries

        batch, heads, height, _ = row.query.shape
        statistics = jnp.full((batch, heads, height), _INIT_MAX), jnp.zeros((batch, heads, height))
        softmax = (*statistics, jnp.zeros((batch, heads, height, x.value.shape[-1])))
        state = row.count - 1, softmax, [term.carry for term in loaded]
        unsaturated = [None] * len(loaded)
        if any(term.carry is not None for term in loaded):

            def counts(state: Any) -> Array:
                at, _, carries = state
                if not _can_saturate(row.terms):
                    return at >= 0
                through = (row.visits[at] < row.leftmost)[:, None]  # rows with no allowed key from here on
                saturated = [s for s in _constants(row.terms, rows, tables, carries)[0] if s is not None]
                return (at >= 0) & ~functools.reduce(jnp.logical_and, [(s | through).all() for s in saturated])

            state = jax.lax.while_loop(counts, lambda state: visit(*state, unsaturated), state)
        first = state[0] + 1  # the number of visited tiles that are plain
        if _can_saturate(row.terms):
            at, softmax, carries = state
            constants = _constants(row.terms, rows, tables, carries)[1]
            at, softmax = jax.lax.while_loop(
                lambda state: state[0] >= 0, lambda state: visit(*state, carries, constants)[:2], (at, softmax)
            )
            state = at, softmax, carries
        highest, total, out = state[1]
        nothing = total == 0.0
        out = out / jnp.where(nothing, 1.0, total)[..., None]
        lse = jnp.where(nothing, EMPTY_LSE, highest + jnp.log(jnp.where(nothing, 1.0, total)))
        return out if plan.is_part else out.astype(x.value.dtype), lse, first, state[2]

    out, *saved = jax.lax.map(one, jnp.arange(x.query.shape[0]))
    return out, saved


# Backward --------------------------------------------------------------------------------------------------------------


def floats(tree: Any) -> tuple[list[Array], Any]:
    """Returns the floating-point leaves of a pytree, and a function that returns the pytree with these leaves replaced."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def replaced(new: list[Array]) -> Any:
        new = iter(new)
        return jax.tree.unflatten(structure, [next(new) if c else leaf for leaf, c in zip(leaves, chosen, strict=True)])

    return [leaf for leaf, c in zip(leaves, chosen, strict=True) if c], replaced


def _zeros(leaves: list[Array]) -> list[Array]:
    return [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]


def _add_at(x: Array, part: Array, start: Array) -> Array:
    """Adds a tile to x [B, K, S, ...] at position ``start`` of the axis S."""
    here = jax.lax.dynamic_slice_in_dim(x, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, here + part, start, axis=2)


def _sum(a: list[Array], b: list[Array]) -> list[Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


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


@_one_by_one
def gradients(plan: Plan, x: Operands, saved: Any, d_out: Array, delta: Array, d_final: list[Array]) -> dict[str, Any]:
    """Computes the gradients of the operands' floating-point leaves.

    Args:
      saved: the residuals from ``outputs``. If ``plan.is_part``, the log-sum-exp must be that of the complete rows.
      d_out: the gradient of the result, of the complete rows.
      delta: ``delta_of`` the complete rows.
      d_final: the gradients of the floating-point leaves of the final carries, [I, B, N, t, ...].

    Returns:
      A dict of gradients. Query, rows and carries have query tiles as their first axis, key and value have key tiles. Rows,
      columns, tables and carries are lists of the floating-point leaves of all terms.
    """
    lse, first, final = saved
    all_columns, _ = floats([term.columns for term in x.terms])
    all_tables, _ = floats([term.tables for term in x.terms])
    kv_heads = x.key.shape[2]

    def one(totals: Any, step: Any) -> tuple[Any, Any]:
        index, lse, first, final, d_out, delta, d_final = step
        row = _row(plan, x, index)
        raw_rows, with_raw_rows = floats([term.rows for term in row.terms])
        tables, with_tables = floats([term.tables for term in row.terms])

        def load(raw_rows: list[Array], tables: list[Array]) -> list[Array]:
            pairs = zip(row.terms, with_raw_rows(raw_rows), with_tables(tables), strict=True)
            made = [dataclasses.replace(term, rows=own, tables=table).loaded().rows for term, own, table in pairs]
            return floats(made)[0]

        rows, load_vjp = jax.vjp(load, raw_rows, tables)
        with_rows = floats([term.loaded().rows for term in row.terms])[1]
        carries, with_carries = floats([term.carry for term in row.terms])
        carrying = bool(carries)
        d_out = d_out.astype(jnp.float32)
        unsaturated = [None] * len(row.terms)

        def scores(seen: _KeyTile, logits, rows, columns, tables, carries, saturated) -> tuple[Array, list[Array]]:
            """Calls ``_scores`` on the floating-point leaves alone, for ``jax.vjp``."""
            _, with_columns = floats(seen.columns)
            others = with_rows(rows), with_columns(columns), with_tables(tables), with_carries(carries)
            total, handed_on = _scores(row, seen, logits, *others, saturated)
            return total, floats(handed_on)[0]

        def again(at: Array, state: Any) -> Any:
            """Recomputes, from right to left, the carry that each counted tile except the first receives."""
            carries, received = state
            at = row.count - 1 - at
            seen = row.key_tile(at)
            carries = scores(seen, row.logits(seen.key), rows, floats(seen.columns)[0], tables, carries, unsaturated)[1]
            return carries, [r.at[at - 1].set(c) for r, c in zip(received, carries, strict=True)]

        def visit(at: Array, state: Any, carries: list[Array], saturated: list[Array | None]) -> Any:
            (d_query, d_rows, d_tables), (d_key, d_value, d_columns), d_carries, d_saturated = state
            seen, j = row.key_tile(at), row.visits[at]
            key, value, columns = seen.key, seen.value, floats(seen.columns)[0]
            inputs = row.logits(key), rows, columns, tables, carries, saturated
            (total, _), vjp = jax.vjp(functools.partial(scores, seen), *inputs)
            weights = jnp.where(seen.allowed, jnp.exp(total - lse[..., None]), 0.0)
            d_weights = _of_groups("bkgtv,bksv->bkgts", d_out.astype(value.dtype), value)
            d_total = weights * (d_weights - delta[..., None])
            d_logits, more_rows, more_columns, more_tables, d_carries, more_saturated = vjp((d_total, d_carries))
            d_logits = d_logits.astype(key.dtype)
            d_key = d_key.at[j].add(_into_groups(d_logits, row.query, kv_heads))
            d_value = d_value.at[j].add(_into_groups(weights.astype(value.dtype), d_out.astype(value.dtype), kv_heads))
            d_columns = [_add_at(d, more, j * plan.columns) for d, more in zip(d_columns, more_columns, strict=True)]
            d_query = d_query + _of_groups("bkgts,bksh->bkgth", d_logits, key)
            d_saturated = jax.tree.map(jnp.add, d_saturated, more_saturated)
            return (
                (d_query, _sum(d_rows, more_rows), _sum(d_tables, more_tables)),
                (d_key, d_value, d_columns),
                d_carries,
                d_saturated,
            )

        d_tables, by_key = totals
        own = jnp.zeros(row.query.shape, jnp.float32), _zeros(rows), d_tables
        d_carries, final, received = d_final, floats(final)[0], None
        if carrying:
            received = [jnp.broadcast_to(c, (x.key.shape[0], *c.shape)) for c in carries]
            received = jax.lax.fori_loop(0, row.count - first - 1, again, (carries, received))[1]
        if _can_saturate(row.terms):

            def saturate(rows: list[Array], tables: list[Array], carries: list[Array]) -> list[Array | None]:
                return _constants(row.terms, with_rows(rows), with_tables(tables), with_carries(carries))[1]

            saturated, saturate_vjp = jax.vjp(saturate, rows, tables, final)
            own, by_key, d_carries, d_saturated = jax.lax.fori_loop(
                0,
                first,
                lambda at, state: visit(at, state, final, saturated),
                (own, by_key, d_carries, jax.tree.map(jnp.zeros_like, saturated)),
            )
            more_rows, more_tables, more_carries = saturate_vjp(d_saturated)
            own, d_carries = (own[0], _sum(own[1], more_rows), _sum(own[2], more_tables)), _sum(d_carries, more_carries)
        if carrying:
            own, by_key, d_carries, _ = jax.lax.fori_loop(
                first,
                row.count,
                lambda at, state: visit(at, state, [r[at] for r in received], unsaturated),
                (own, by_key, d_carries, unsaturated),
            )
        d_query, d_rows, d_tables = own
        d_scale = (d_query * row.query.astype(jnp.float32)).sum()
        d_raw_rows, more_tables = load_vjp([d.astype(r.dtype) for d, r in zip(d_rows, rows, strict=True)])
        d_query = d_query * x.scale
        made = d_query if plan.is_part else d_query.astype(x.query.dtype), d_raw_rows, d_carries, d_scale
        return (_sum(d_tables, more_tables), by_key), made

    start = _zeros(all_tables), (*_zeros([x.key, x.value]), _zeros(all_columns))
    start = jax.tree.map(lambda zeros: jnp.full_like(zeros, runtime_zero(delta)), start)
    (d_tables, (d_key, d_value, d_columns)), (d_query, d_rows, d_carries, d_scale) = jax.lax.scan(
        one, start, (jnp.arange(x.query.shape[0]), lse, first, final, d_out, delta, d_final)
    )
    return dict(
        query=d_query,
        key=d_key * x.scale,
        value=d_value,
        rows=d_rows,
        columns=d_columns,
        tables=d_tables,
        carries=d_carries,
        scale=d_scale.sum(),
    )


def _backward(plan: Plan, saved: tuple[Operands, Array, Any], d_out: Array) -> tuple[Operands]:
    x, out, walk = saved
    final = floats(walk[2])[0]
    found = gradients(plan, x, walk, d_out, delta_of(out, d_out), _zeros(final))
    return (gradient_of(x, found | dict(carries=[whole_rows(tiles) for tiles in found["carries"]])),)


def gradient_of(x: Operands, d: dict[str, Any]) -> Operands:
    """Assembles the results of ``gradients`` into the cotangent of the operands, in their dtypes; float0 for integer operands."""

    def like(primal: Any, gradients: list[Array]) -> Any:
        found, _ = floats(primal)
        made = iter([d.astype(p.dtype) for d, p in zip(gradients, found, strict=True)])
        return jax.tree.map(
            lambda p: next(made) if jnp.issubdtype(p.dtype, jnp.inexact) else np.zeros(p.shape, jax.dtypes.float0), primal
        )

    rows = like([term.rows for term in x.terms], [whole_rows(tiles) for tiles in d["rows"]])
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
        query_positions=like(x.query_positions, []),
        key_positions=like(x.key_positions, []),
        scale=d["scale"].astype(x.scale.dtype),
    )


_attend.defvjp(_forward, _backward)
