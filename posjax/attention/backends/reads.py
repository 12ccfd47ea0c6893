"""Evaluates the reads of biases on tiles: tables and networks of one number (``posjax.core.structures``).

Arrays have heads before tokens here, [B or 1, N or K or 1, t or s, ...]. ``load`` computes the arrays that a read needs per query
once per query tile: the products of the query with every entry of a table, or the linear pieces of a network.
"""

import functools

import jax
import jax.numpy as jnp

from posjax.core.manual_axes import vary_alike
from posjax.core.structures import Hinges, Table
from posjax.typing import Array

_FEW = 8  # hinges up to which a network is summed directly instead of looked up by its pieces


def load(read: Table | Hinges | None) -> Array | None:
    """Returns the array that ``evaluate`` needs per query, [B or 1, N or 1, t or 1, ...]; None if it needs none."""
    if isinstance(read, Hinges):
        z = read.table[None, :, None] if read.side == "none" else _products(read.query, read.table)
        return z if z.shape[-1] <= _FEW else _pieces(z, read)
    if not isinstance(read, Table) or read.side == "key":
        return None
    z = read.table.astype(jnp.float32)[None, :, None] if read.side == "none" else _products(read.query, read.table)
    return _with_steps(z) if read.interpolate else z


def evaluate(read: Table | Hinges | None, at: Array, z: Array | None) -> Array:
    """Returns the values read at ``at`` [B, N, t, s], float32, broadcastable to [B, N, t, s]; ``z`` is the result of ``load``."""
    if read is None:
        return at.astype(jnp.float32)
    if isinstance(read, Hinges):
        assert z is not None
        value = _summed(z, read, at) if z.shape[-1] <= _FEW and z.ndim == 4 else _looked_up_piece(z, read, at)
        return value if read.offset is None else value + read.offset[None, :, None, None]
    if read.side == "key":  # as with queries, with the two token axes exchanged
        of_keys = _products(read.key, read.table)
        of_keys = _with_steps(of_keys) if read.interpolate else of_keys
        return jnp.swapaxes(_entry(read, of_keys, jnp.swapaxes(at, 2, 3)), 2, 3)
    assert z is not None
    return _entry(read, z, at)


def at_bound(read: Table | Hinges | None, bound: float, z: Array | None) -> Array | None:
    """Returns the value read at ``bound``, [B or 1, N or 1, t or 1]; None if it differs between keys."""
    if isinstance(read, Table) and read.side == "key":
        return None
    if isinstance(read, Table) and read.interpolate and z is not None and bound == z.shape[-2] - 1:
        return z[..., -1, 0]
    return evaluate(read, jnp.full((1, 1, 1, 1), bound, jnp.float32), z)[..., 0]


def for_query_heads(x: Array, heads: int) -> Array:
    """Returns x [B, N or K or 1, ...] with the key heads repeated for their groups, [B, N or 1, ...]."""
    return x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1)


def _products(vectors: Array, table: Array) -> Array:
    """Returns the products of vectors [B, N or K or 1, t, R] with every row of a table [N or 1, W, R], [B, N, t, W] float32."""
    vectors = vectors.astype(jnp.float32)
    if table.shape[0] == 1:
        return jnp.einsum("bnth,ph->bntp", vectors, table[0])
    heads = table.shape[0]
    vectors = for_query_heads(vectors, heads)
    return jnp.einsum("bnth,nph->bntp", jnp.broadcast_to(vectors, (vectors.shape[0], heads, *vectors.shape[2:])), table)


# Tables --------------------------------------------------------------------------------------------------------------------------


def _with_steps(z: Array) -> Array:
    """Returns [..., W, 2], each entry with its step to the next; past the last entry the step is zero."""
    return jnp.stack([z, jnp.diff(z, axis=-1, append=z[..., -1:])], axis=-1)


def _entry(read: Table, z: Array, at: Array) -> Array:
    if read.interpolate:
        position = jnp.clip(at, 0, z.shape[-2] - 1)
        floor = jnp.floor(position)
        value_and_slope = _gathered(z, floor.astype(jnp.int32))
        return value_and_slope[..., 0] + (position - floor) * value_and_slope[..., 1]
    size = z.shape[-1]
    index = at.astype(jnp.int32)
    index = jnp.where((index >= 0) & (index < size), index, size)  # outside is a last entry of zero
    z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, 1)])
    if z.shape[0] == z.shape[2] == index.shape[1] == 1:  # one index and one table for all queries: a row of numbers for all heads
        return jnp.moveaxis(jnp.take(z[0, :, 0].T, index[:, 0], axis=0), -1, 1)
    return _gathered(z[..., None], index)[..., 0]


def _gathered(table: Array, index: Array) -> Array:
    """Gathers row ``index`` [B, N, t, s] from a table [B or 1, N or 1, t or 1, W, C] that may differ between queries.

    All C numbers come from one gather on a flat array, whose transpose is three times as fast on a CPU as that of several.
    """
    size = table.shape[:3]
    row = jnp.arange(size[0] * size[1] * size[2], dtype=jnp.int32).reshape(*size, 1)
    return table.reshape(-1, table.shape[-1]).at[row * table.shape[3] + index].get(mode="promise_in_bounds")


# Networks of one number -----------------------------------------------------------------------------------------------------------


def _summed(z: Array, read: Hinges, at: Array) -> Array:
    """Evaluates a small network unit by unit."""
    weight, offset = (x[None, :, None, None] for x in (read.weight_in, read.bias_in))
    units = (z[..., None, f] * jax.nn.relu(weight[..., f] * at + offset[..., f]) for f in range(z.shape[-1]))
    return functools.reduce(jnp.add, units)


def _kinks(read: Hinges) -> Array:
    """Returns the number at which each unit becomes active or inactive, [N or 1, F].

    It is infinite for a unit of zero weight, which is active everywhere or nowhere.
    """
    flat = read.weight_in == 0.0
    always = jnp.where(read.bias_in > 0, -jnp.inf, jnp.inf)
    return jnp.where(flat, always, -read.bias_in / jnp.where(flat, 1.0, read.weight_in))


def _pieces(z: Array, read: Hinges) -> Array:
    """Computes a network's linear pieces for every query, [B or 1, N, t or 1, F + 1, 2]: slope and intercept between two kinks.

    A unit of positive weight is active to the right of its kink -b/w, one of negative weight to the left.
    """
    order = jnp.argsort(_kinks(read), axis=-1)
    weight, offset = (jnp.take_along_axis(x, order, axis=-1) for x in (read.weight_in, read.bias_in))
    z = z[..., order[0]] if order.shape[0] == 1 else jnp.take_along_axis(z, order[None, :, None], axis=-1)
    lines = z[..., None] * jnp.stack([weight, offset], -1)[None, :, None]  # of each unit, where it is active
    falls = (weight < 0)[None, :, None, :, None]
    passed = jnp.cumsum(jnp.where(falls, -lines, lines), axis=-2)
    start = jnp.where(falls, lines, 0.0).sum(-2, keepdims=True)
    return start + jnp.concatenate([jnp.zeros_like(start), passed], axis=-2)


def _looked_up_piece(z: Array, read: Hinges, at: Array) -> Array:
    """Evaluates the network by looking up the linear piece of each number; a unit costs one comparison."""
    kinks = jax.lax.stop_gradient(jnp.sort(_kinks(read), axis=-1)).T[:, None, :, None, None]  # [F, 1, N or 1, 1, 1]
    here = jax.lax.stop_gradient(at)
    none = vary_alike(jnp.zeros(jnp.broadcast_shapes(at.shape, kinks.shape[1:]), jnp.int32), here, kinks)
    piece, _ = jax.lax.scan(
        lambda n, kink: (n + (here >= kink).astype(jnp.int32), None), none, kinks, unroll=min(kinks.shape[0], 64)
    )
    line = _gathered(z, piece)
    return line[..., 0] * at + line[..., 1]
