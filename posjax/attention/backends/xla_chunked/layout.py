"""The layout of the tile walk: a call split into tiles, with T and S padded to whole tiles."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import BiasTerm, bias_terms
from posjax.attention.call import AttentionCall
from posjax.checks import is_symbolic, round_up
from posjax.core.masks import Mask
from posjax.typing import Array

# Queries and keys per tile: large enough for matrix products to run at full speed on a CPU, small enough for the scores of all
# heads to fit its cache and for rows to saturate early. Long sequences of few heads take wider tiles, in which the work around the
# products is a smaller part; there the pairs above the diagonal, of which they compute more, hardly count.
SIZE, WIDE = 128, 256
_LONG = 4096  # tokens
_MOST_SCORES = 2**20  # in a wide tile, over batch and heads


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
    bias: Array | None  # [B or 1, N or 1, T or 1, S or 1]
    query_positions: Array  # [1 or B, T]
    key_positions: Array  # [1 or B, S]
    scale: Array


def to_operands(call: AttentionCall, *, tile: tuple[int, int] | None = None, is_part: bool = False) -> tuple[Plan, Operands]:
    """Converts a call without pending transforms to the form that ``forward.outputs`` and ``backward.gradients`` take.

    Args:
      tile: (queries, keys) per tile; None chooses both.
      is_part: as in ``Plan``.
    """
    length, keys, terms = call.query.shape[1], call.key.shape[1], bias_terms(call)
    rows, columns = tile or _tile(call, terms)
    rows, columns = tile_size(rows, length), tile_size(columns, keys)
    pad_rows, pad_columns = functools.partial(pad, to=rows), functools.partial(pad, to=columns)
    plan = Plan(rows, columns, keys, call.logits_soft_cap, is_part)
    return plan, Operands(
        query=_blocks(pad_rows(call.query, axis=1), rows),
        key=_blocks(pad_columns(call.key, axis=1), columns),
        value=_blocks(pad_columns(call.value, axis=1), columns),
        terms=tuple(pad_term(term, rows, columns) for term in terms),
        mask=dataclasses.replace(
            call.mask,
            boolean=pad_columns(pad_rows(call.mask.boolean, axis=2), axis=3),
            query_segments=pad_rows(call.mask.query_segments, axis=1),
            key_segments=pad_columns(call.mask.key_segments, axis=1),
        ),
        bias=pad_columns(pad_rows(call.bias, axis=2), axis=3),
        query_positions=pad_rows(call.query_positions, axis=1),
        key_positions=pad_columns(call.key_positions, axis=1),
        scale=call.scale,
    )


def _tile(call: AttentionCall, terms: Sequence[BiasTerm]) -> tuple[int, int]:
    """Chooses (queries, keys) per tile."""
    batch, length, heads, _ = call.query.shape
    if is_symbolic(length):
        return SIZE, SIZE
    has_room = not is_symbolic(batch) and batch * heads * WIDE**2 <= _MOST_SCORES
    if has_room and length >= _LONG and call.mask.window == (None, None) and all(term.carry is None for term in terms):
        return WIDE, WIDE
    return SIZE, max(SIZE, SIZE**2 // length)  # more keys where there are few queries


def tile_size(size: int, length: int) -> int:
    """Returns the size of a tile along an axis, that of the axis if it is shorter."""
    return size if is_symbolic(length) else min(size, length)


def from_blocks(out: Array, length: int) -> Array:
    """Converts the result [I, B, N, t, V] to [B, T, N, V] and removes the padding of T."""
    out = jnp.swapaxes(jnp.moveaxis(out, 0, 1), 2, 3)  # [B, I, t, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def unblock(tiles: Array) -> Array:
    """Converts [I, B, N, t, ...] to [B, N, T, ...]."""
    tiles = jnp.moveaxis(tiles, 0, 2)
    return tiles.reshape(*tiles.shape[:2], -1, *tiles.shape[4:])


def block(x: Array, rows: int) -> Array:
    """Converts [B, N, T, ...] to [I, B, N, t, ...] with t = ``rows``, the inverse of ``unblock``."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, rows, *x.shape[3:]), 2, 0)


def _blocks(x: Array, size: int) -> Array:
    """Converts [B, L, N, H] to [L / size, B, N, size, H]. XLA fuses the transforms of query and key into this copy."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length // size, size, heads, width).transpose(1, 0, 3, 2, 4)


def pad(x: Any, *, to: int, axis: int) -> Any:
    """Pads x along an axis to a multiple of ``to``, repeating its last entry.

    A repeated query saturates when the last one does. None, and an x whose axis has length 1, are returned unchanged.
    """
    if x is None or x.shape[axis] == 1 or x.shape[axis] % to == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], to) - x.shape[axis])
    return jnp.pad(x, widths, mode="edge")


def pad_term(term: BiasTerm, rows: int, columns: int) -> BiasTerm:
    return dataclasses.replace(
        term,
        rows=jax.tree.map(functools.partial(pad, to=rows, axis=2), term.rows),
        columns=jax.tree.map(functools.partial(pad, to=columns, axis=2), term.columns),
        carry=jax.tree.map(functools.partial(pad, to=rows, axis=2), term.carry),
    )
