"""A walk over tiles for calls whose weights are not a softmax of scores alone: broken sticks, transported keys, tables of values.

    StickBreaking   a row carries the logarithm of the rest of its stick, from the query back
    Transport       a row carries its query, transformed by the maps of all tokens that the walk has passed
    Table("value")  a row carries the weight that every entry of a table has received

Each query tile walks over its key tiles from right to left, in a scan that JAX differentiates; the tile is recomputed in the
backward pass, so that memory grows with T + S. This walk is general but not fast; calls without these structures use ``forward``
and ``backward``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import BiasTerm, Tile, bias_terms, value_index, value_terms
from posjax.attention.backends.constants import EMPTY_LSE, INIT_MAX, MASK_VALUE
from posjax.attention.backends.sinks import with_sink
from posjax.attention.backends.xla_chunked.layout import SIZE, pad, pad_term, tile_size
from posjax.attention.backends.xla_chunked.query_tile import multiply_by_group
from posjax.attention.call import AttentionCall
from posjax.checks import round_up
from posjax.core.masks import cut_pairs
from posjax.core.structures import StickBreaking, Transport
from posjax.typing import Array, Float


def attention(call: AttentionCall, *, tile: tuple[int, int] | None = None) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Computes attention tile by tile, differentiably in every floating-point array of the call.

    Args:
      call: a call without pending rotations.
      tile: (queries, keys) per tile; None chooses both.

    Returns:
      The result of ``reference.attention``, and the log-sum-exp of every row without a sink, ``EMPTY_LSE`` where no key is allowed;
      under ``StickBreaking`` the logarithm of what is left of the stick.
    """
    length, keys = call.query.shape[1], call.key.shape[1]
    rows, columns = map(tile_size, tile or (SIZE, SIZE), (length, keys))
    padded, terms, values = _padded(call, rows, columns)
    tiles = round_up(length, rows) // rows

    @jax.checkpoint
    def query_tile(index: Array) -> tuple[Array, Array]:
        return _query_tile(padded, terms, values, index * rows, rows, columns, keys)

    out, lse = jax.lax.map(query_tile, jnp.arange(tiles))  # [I, B, N, t, V] and [I, B, N, t]
    out, lse = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :length] for x in (out, lse))
    out, lse = (jnp.swapaxes(x, 1, 2) for x in (out, lse))
    return with_sink(out, lse, call.sink).astype(call.value.dtype), lse


def _padded(call: AttentionCall, rows: int, columns: int) -> tuple[AttentionCall, tuple[BiasTerm, ...], tuple[BiasTerm, ...]]:
    """Pads a call and its terms to whole tiles."""
    by_query, by_key = functools.partial(pad, to=rows, axis=1), functools.partial(pad, to=columns, axis=1)
    terms, values = (tuple(pad_term(term, rows, columns) for term in of(call)) for of in (bias_terms, value_terms))
    moves = call.transport

    def by_pair(x: Array | None) -> Array | None:
        return pad(pad(x, to=rows, axis=2), to=columns, axis=3)

    mask = call.mask.replace(boolean=by_pair(call.mask.boolean))
    padded = call.replace(
        query=by_query(call.query),
        key=by_key(call.key),
        value=by_key(call.value),
        transforms=() if moves is None else (Transport(*map(by_key, (moves.direction, moves.strength, moves.log_decay))),),
        mask=mask.replace(query_segments=by_query(mask.query_segments), key_segments=by_key(mask.key_segments)),
        bias=by_pair(call.bias),
        query_positions=by_query(call.query_positions),
        key_positions=by_key(call.key_positions),
    )
    return padded, terms, values


def _query_tile(
    call: AttentionCall,
    terms: tuple[BiasTerm, ...],
    values: tuple[BiasTerm, ...],
    start: Array,
    rows: int,
    columns: int,
    keys: int,
) -> tuple[Array, Array]:
    """Returns the output [B, N, t, V] of one query tile and the log-sum-exp of its rows."""
    query = jnp.swapaxes(_part(call.query, start, rows), 1, 2)
    positions = _part(call.query_positions, start, rows)
    mine = [term.cut(start, rows, 0, columns).loaded() for term in terms]
    batch, heads, _, _ = query.shape
    zeros = jnp.zeros((batch, heads, rows), jnp.float32)
    entries = [jnp.zeros((batch, heads, rows, _table(term).shape[1]), jnp.float32) for term in values]
    stick = call.weights if isinstance(call.weights, StickBreaking) else None
    state = (
        (zeros if stick is not None else jnp.full_like(zeros, INIT_MAX)),  # the rest of the stick, or the running maximum
        zeros,
        jnp.zeros((batch, heads, rows, call.value.shape[-1]), jnp.float32),
        entries,
        [term.carry for term in mine],
        query.astype(jnp.float32) if call.transport is not None else None,
    )

    def step(state: Any, at: Array) -> tuple[Any, None]:
        m, l, acc, entries, carries, moved = state
        first = at * columns
        key, value = (jnp.swapaxes(_part(x, first, columns), 1, 2) for x in (call.key, call.value))
        key_positions = _part(call.key_positions, first, columns)
        allowed = call.mask.cut(start, rows, first, columns).allowed(positions, key_positions)
        allowed &= (first + jnp.arange(columns) < keys)[None, None, None]
        if moved is None:
            logits = multiply_by_group("bkgth,bksh->bkgts", query, key) * call.scale
        else:
            logits, moved = _transported(call, moved, start, rows, first, columns, keys)
        tile = Tile(logits, allowed, positions, key_positions)
        own_bias = cut_pairs(call.bias, start, rows, first, columns)
        scores, after = logits if own_bias is None else logits + own_bias.astype(jnp.float32), []
        for term, own, carry in zip(terms, mine, carries, strict=True):
            bias, carry = own.function(tile, own.rows, term.cut(0, rows, first, columns).columns, own.tables, carry)
            scores, after = scores + bias, [*after, carry]
        if call.logits_soft_cap is not None:
            scores = call.logits_soft_cap * jnp.tanh(scores / call.logits_soft_cap)
        if stick is not None:
            if not stick.attend_current:
                allowed &= positions[:, None, :, None] != key_positions[:, None, None, :]
            stays = jnp.where(allowed, jax.nn.log_sigmoid(-scores), 0.0)
            left = m[..., None] + jax.lax.cumsum(stays, axis=3, reverse=True)
            weights = jnp.where(allowed, jnp.exp(jax.nn.log_sigmoid(scores) + left - stays), 0.0)
            m, keep = left[..., 0], jnp.ones_like(l)
        else:
            scores = jnp.where(allowed, scores, MASK_VALUE)
            m_new = jax.lax.stop_gradient(jnp.maximum(m, scores.max(-1)))
            weights, keep, m = jnp.exp(scores - m_new[..., None]), jnp.exp(m - m_new), m_new
        acc = acc * keep[..., None] + multiply_by_group("bkgts,bksv->bkgtv", weights.astype(value.dtype), value)
        cut = [term.cut(start, rows, first, columns) for term in values]
        entries = [e * keep[..., None] + _spread(term, tile, weights) for term, e in zip(cut, entries, strict=True)]
        return (m, l * keep + weights.sum(-1), acc, entries, after, moved), None

    last = call.key.shape[1] // columns
    (m, l, acc, entries, _, _), _ = jax.lax.scan(jax.checkpoint(step), state, jnp.arange(last), reverse=True)
    for term, received in zip(values, entries, strict=True):
        table = jnp.broadcast_to(_table(term), (heads, *_table(term).shape[1:])).astype(jnp.float32)
        acc = acc + jnp.einsum("bntw,nwv->bntv", received, table)
    if stick is not None:
        return acc, m
    is_empty = l == 0.0
    l = jnp.where(is_empty, 1.0, l)
    return acc / l[..., None], jnp.where(is_empty, EMPTY_LSE, m + jnp.log(l))


def _part(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _table(term: BiasTerm) -> Array:
    (table,) = (x for x in term.tables.values() if x.ndim == 3)
    return table


def _spread(term: BiasTerm, tile: Tile, weights: Array) -> Array:
    """Sums weights [B, N, t, s] by the entry of the table that their pair reads, [B, N, t, W]."""
    at, table = value_index(term, tile)
    entries = jnp.arange(table.shape[1])
    return jax.lax.map(lambda entry: jnp.where(at == entry, weights, 0.0).sum(-1), entries).transpose(1, 2, 3, 0)


def _transported(
    call: AttentionCall, moved: Array, start: Array, rows: int, first: Array, columns: int, keys: int
) -> tuple[Array, Array]:
    """Returns the logits [B, N, t, s] of a tile, and the queries [B, N, t, H] after the maps of its tokens.

    A query is multiplied with key j after the maps of all tokens after j have been applied, and before the map of token j.
    """
    heads, transport = moved.shape[1], call.transport
    assert transport is not None
    positions, segments = _part(call.query_positions, start, rows), call.mask.query_segments
    segments = None if segments is None else _part(segments, start, rows)

    def token(x: Array, at: Array) -> Array:
        """Returns the vector of one token for every head, [B, N, 1, C]."""
        x = jax.lax.dynamic_index_in_dim(x.astype(jnp.float32), at, 1, keepdims=False)
        return jnp.repeat(x, heads // x.shape[1], axis=1)[:, :, None]

    def step(moved: Array, column: Array) -> tuple[Array, Array]:
        at = first + column
        logit = (moved * token(call.key, at)).sum(-1) * call.scale
        passes = (positions >= _part(call.key_positions, at, 1)) & (at < keys)
        if segments is not None and call.mask.key_segments is not None:
            passes &= segments == _part(call.mask.key_segments, at, 1)
        if transport.log_decay is not None:
            after = moved * jnp.exp(token(transport.log_decay, at))
        else:
            w, strength = token(transport.direction, at), token(transport.strength, at)
            after = moved - strength * (moved * w).sum(-1, keepdims=True) * w
        return jnp.where(passes[:, None, :, None], after, moved), logit

    moved, logits = jax.lax.scan(step, moved, jnp.arange(columns), reverse=True)
    return jnp.moveaxis(logits, 0, -1), moved
