"""Bias terms: the form in which attention kernels receive a positional encoding, evaluated one tile at a time.

The score of a query and a key is ``scale * q.k + sum of the terms' biases``. A term is never a [T, S] array. It holds data per
query (``rows``), per key (``columns``) and shared by all (``tables``), and a pure function that maps one tile of these to one tile
of bias. A term whose bias depends on the keys between query and key (CoPE counts gates) also carries one value per row: tiles are
processed from right to left; each receives the carry of the tile to its right and returns its own.

    keys ->  0   1   2   3
    row 3  [ c <- c <- c <- start ]        carry moves from the diagonal to the left

A term has saturated once its carry shows that no key further left can change a row's bias any more (a count has reached the last
position). From there on the bias is one number per row, and a kernel may skip the term's function.

``BiasTerm.dense`` applies the same function to one tile that covers everything: the reference for every tiled kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from posjax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of attention scores, before any bias.

    Attributes:
      logits: [B, N, t, s] float32, scale * q.k after rotation, not masked.
      allowed: bool, broadcastable to logits; False where the mask forbids attention.
      query_positions: [B or 1, t] integers.
      key_positions: [B or 1, s] integers.
    """

    logits: Float[Array, "B N t s"]
    allowed: Bool[Array, "_ _ t s"]
    query_positions: Int[Array, "_ t"]
    key_positions: Int[Array, "_ s"]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """Marks a term whose bias is -slope_n |i - j|; ``tables`` holds the slopes [N], which are not learned."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Marks a term whose bias is table[index, n]; ``tables`` holds the table [W, N]. An index of W or more gives zero.

    Attributes:
      index: (query positions, key positions) -> index, elementwise.
      uniform: (first query position, last, first key position, last) -> True if all pairs in these ranges have the index of the
        first query and the last key.
    """

    index: Callable[[Array, Array], Array]
    uniform: Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Marks a term that counts gates sigmoid(logits) and interpolates q.e at the count.

    rows["query"] holds q, and ``tables`` holds (scale, e).
    """


TileFunction = Callable[[Tile, Any, Any, Any, Any], tuple[Array, Any]]
LoadFunction = Callable[[Any, Any], Any]
SaturateFunction = Callable[[Any, Any, Any], tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasTerm:
    """A bias on attention scores that is evaluated one tile at a time.

    Attributes:
      function: (tile, rows, columns, tables, carry) -> (bias [B, N, t, s] or broadcastable, float32; carry). It must return the
        carry unchanged for a tile without any allowed pair, because kernels skip such tiles.
      rows: arrays [B, N, T, ...], sliced along T with the query tile.
      columns: arrays [B, K, S, ...], sliced along S with the key tile. Column j must depend on key j alone, because a decoder
        caches it.
      tables: arrays that are passed to every tile in full.
      carry: initial carry, which the rightmost tile receives: arrays [B, N, T, ...], sliced along T; None if nothing is carried.
      load: (rows, tables) -> rows as ``function`` takes them, called once per query tile. Wide arrays are computed here (CoPE's
        q.e, one value per position), so that they never exist for all queries at once. None passes the rows unchanged.
      saturate: (rows, tables, carry) -> (saturated bool [B, N, t], bias float32 [B, N, t]). Where saturated, every pair further
        left has that bias, whatever its key. None: a term with a carry never saturates.
      fused: tag of the term's formula, for kernels that implement some formulas themselves; None if there is none.
      heads: head axis of each leaf of ``tables``, in the order of ``jax.tree.leaves``; None for a leaf without one. If given, each
        device of a mesh that shards the heads receives only its part of the tables. None: not specified.
    """

    function: TileFunction = dataclasses.field(metadata={"static": True})
    rows: Any = None
    columns: Any = None
    tables: Any = None
    carry: Any = None
    load: LoadFunction | None = dataclasses.field(default=None, metadata={"static": True})
    saturate: SaturateFunction | None = dataclasses.field(default=None, metadata={"static": True})
    fused: Penalty | Lookup | Interpolation | None = dataclasses.field(default=None, metadata={"static": True})
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def cut(self, row_start: Any, row_size: int, column_start: Any, column_size: int) -> "BiasTerm":
        """Returns the term for one tile: ``row_size`` queries from ``row_start`` and ``column_size`` keys from ``column_start``."""

        def along(start: Any, size: int) -> Callable[[Array], Array]:
            return lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)

        return dataclasses.replace(
            self,
            rows=jax.tree.map(along(row_start, row_size), self.rows),
            columns=jax.tree.map(along(column_start, column_size), self.columns),
            carry=jax.tree.map(along(row_start, row_size), self.carry),
        )

    def loaded(self) -> "BiasTerm":
        """Returns the term with its rows as ``function`` takes them. The term should have been cut to one query tile."""
        return self if self.load is None else dataclasses.replace(self, rows=self.load(self.rows, self.tables), load=None)

    def tile(self, tile: Tile, carry: Any) -> tuple[Array, Any]:
        """Returns the bias of one tile and the carry for the tile to its left. The term must have been cut to the tile."""
        term = self.loaded()
        return term.function(tile, term.rows, term.columns, term.tables, carry)

    def dense(self, tile: Tile) -> Array:
        """Returns the full bias [B, N, T, S] for a ``tile`` that covers all queries and keys."""
        bias, _ = self.tile(tile, self.carry)
        return jnp.broadcast_to(bias, tile.logits.shape)


def position_bias(
    function: Callable[[Array, Array, Any], Array],
    tables: Any = None,
    fused: Penalty | Lookup | None = None,
    heads: tuple[int | None, ...] | None = None,
) -> BiasTerm:
    """Creates a bias that is a function of query and key positions, such as ALiBi, T5 or one written by a user.

    Args:
      function: (query_positions [B or 1, 1, t, 1], key_positions [B or 1, 1, 1, s], tables) -> bias broadcastable to [B, N, t, s].
        It must be a module-level function, or the same object in every call, so that jit does not recompile.
      tables: arrays that ``function`` uses, learned ones included. Their gradients have their own shape, never [T, S].
      fused: tag of the formula, as in ``BiasTerm``, if it has one.
      heads: head axis of each leaf of ``tables``, as in ``BiasTerm``.
    """
    return BiasTerm(function=_PositionFunction(function), tables=tables, fused=fused, heads=heads)


@dataclasses.dataclass(frozen=True)
class _PositionFunction:
    """Wraps a function of positions; equal for equal functions, so that jit treats a term created twice as one."""

    function: Callable[[Array, Array, Any], Array]

    def __call__(self, tile: Tile, rows: Any, columns: Any, tables: Any, carry: Any) -> tuple[Array, Any]:
        query_positions = tile.query_positions[:, None, :, None]
        key_positions = tile.key_positions[:, None, None, :]
        return self.function(query_positions, key_positions, tables), carry


Pairing = Literal["half", "interleaved"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation of query and key channel pairs that is not yet applied: a kernel may apply it to tiles as it loads them.

    Attributes:
      query_phase: [B or 1, T, R / 2] float32 radians, with R the number of channels that are rotated, from the first on.
      key_phase: [B or 1, S, R / 2]; None if the keys are already rotated.
      pairing: "half" pairs channel c with c + R / 2, "interleaved" pairs 2c with 2c + 1.
    """

    query_phase: Array
    key_phase: Array | None
    pairing: Pairing = dataclasses.field(default="half", metadata={"static": True})

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns query and key rotated, in their own dtypes."""
        if self.key_phase is not None:
            key = apply_rotation(key, self.key_phase, self.pairing)
        return apply_rotation(query, self.query_phase, self.pairing), key


def rotated(call: dict[str, Any]) -> dict[str, Any]:
    """Applies the pending rotation of a kernel's call, if any, to its query and key."""
    rotation, rest = call.get("rotation"), {name: x for name, x in call.items() if name not in ("rotation", "raw")}
    if rotation is None:
        return rest
    query, key = rotation.applied(call["query"], call["key"])
    return rest | dict(query=query, key=key)


def apply_rotation(x: Float[Array, "B T N H"], phase: Float[Array, "_ T R2"], pairing: Pairing = "half") -> Float[Array, "B T N H"]:
    """Rotates the first 2 * phase.shape[-1] channels of x in float32; the result has x's dtype."""
    width = 2 * phase.shape[-1]
    cos, sin = jnp.cos(phase)[:, :, None, :], jnp.sin(phase)[:, :, None, :]
    x_rot = x[..., :width]
    pair = (x_rot[..., : width // 2], x_rot[..., width // 2 :]) if pairing == "half" else (x_rot[..., 0::2], x_rot[..., 1::2])
    first, second = (part.astype(jnp.float32) for part in pair)  # cast after the split, or XLA would keep a float32 copy of x
    pair = [part.astype(x.dtype) for part in (first * cos - second * sin, first * sin + second * cos)]
    rotated = jnp.concatenate(pair, -1) if pairing == "half" else jnp.stack(pair, -1).reshape(x_rot.shape)
    return jnp.concatenate([rotated, x[..., width:]], axis=-1)
