"""What an attention kernel sees of a positional encoding: bias terms, evaluated a tile at a time.

The score of a query and a key is ``scale * q.k + sum of the terms' biases``. No term is ever a [T, S] array. It holds what it
needs by query (``rows``), by key (``columns``) and once (``tables``), and a pure function that turns one tile of those into one
tile of bias. A term whose bias depends on what stands between query and key (CoPE counts gates) also carries one value a row: tiles
are visited from the right to the left, each receives the carry of the tile to its right and returns its own.

    keys ->  0   1   2   3
    row 3  [ c <- c <- c <- start ]        carry moves from the diagonal to the left

Once the carry says that nothing to the left can change a row's bias any more (a count has reached the last position), the term has
saturated: from there on it is one number a row, and a kernel may leave the term's function out.

``BiasTerm.dense`` is the same function on one tile that covers everything: the oracle for every tiled kernel.
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
    """One tile of scores, before any bias.

    Attributes:
      logits: [B, N, t, s] float32, scale * q.k after rotation, not masked.
      allowed: bool, broadcastable to logits; False where the mask forbids the pair.
      query_positions: [B or 1, t] integers.
      key_positions: [B or 1, s] integers.
    """

    logits: Float[Array, "B N t s"]
    allowed: Bool[Array, "_ _ t s"]
    query_positions: Int[Array, "_ t"]
    key_positions: Int[Array, "_ s"]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A term whose bias is -slope_n |i - j|; ``tables`` is the slopes [N], which do not learn."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A term whose bias is table[index, n]; ``tables`` is the table [W, N]. An index of W or more finds zero.

    Attributes:
      index: (query positions, key positions) -> index, elementwise.
      uniform: (first query position, last, first key position, last) -> whether all pairs between have the index of the first
        query and the last key.
    """

    index: Callable[[Array, Array], Array]
    uniform: Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """A term that counts gates sigmoid(logits) and interpolates q.e there; rows["query"] is q, ``tables`` is (scale, e)."""


TileFunction = Callable[[Tile, Any, Any, Any, Any], tuple[Array, Any]]
LoadFunction = Callable[[Any, Any], Any]
SaturateFunction = Callable[[Any, Any, Any], tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasTerm:
    """A bias on attention scores, as a value.

    Attributes:
      function: (tile, rows, columns, tables, carry) -> (bias [B, N, t, s] or broadcastable, float32; carry). A tile without any
        allowed pair must hand its carry on as it came: kernels do not visit such tiles.
      rows: arrays [B, N, T, ...], cut along T with the query tile.
      columns: arrays [B, K, S, ...], cut along S with the key tile. Column j must depend on key j alone: a decoder caches it.
      tables: arrays every tile sees whole.
      carry: the carry that the rightmost tile receives, arrays [B, N, T, ...], cut along T; None where nothing is carried.
      load: (rows, tables) -> rows as ``function`` sees them, once for each query tile: what is wide is made here (CoPE's q.e, as
        wide as there are positions) and never exists for all queries at once. None: the rows as they are.
      saturate: (rows, tables, carry) -> (saturated bool [B, N, t], bias float32 [B, N, t]): where saturated, every pair further
        left has that bias, whatever its key. None: a term that carries never saturates.
      fused: what the term is, for kernels of their own machine code that know some terms by name; None: no more than its function.
      heads: which axis of each leaf of ``tables``, in the order of ``jax.tree.leaves``, is that of heads; None for one that has no
        such axis. With them told, devices that share the heads have each only its own. None: not told.
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
        """The same term, seen from the tile of ``row_size`` queries and ``column_size`` keys that begins there."""

        def along(start: Any, size: int) -> Callable[[Array], Array]:
            return lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)

        return dataclasses.replace(
            self,
            rows=jax.tree.map(along(row_start, row_size), self.rows),
            columns=jax.tree.map(along(column_start, column_size), self.columns),
            carry=jax.tree.map(along(row_start, row_size), self.carry),
        )

    def loaded(self) -> "BiasTerm":
        """The same term with its rows as the function sees them. The term should have been cut to one query tile."""
        return self if self.load is None else dataclasses.replace(self, rows=self.load(self.rows, self.tables), load=None)

    def tile(self, tile: Tile, carry: Any) -> tuple[Array, Any]:
        """The bias of one tile, and the carry for the tile to its left. The term must have been cut to the tile."""
        term = self.loaded()
        return term.function(tile, term.rows, term.columns, term.tables, carry)

    def dense(self, tile: Tile) -> Array:
        """The whole [B, N, T, S] bias, where ``tile`` covers all queries and keys."""
        bias, _ = self.tile(tile, self.carry)
        return jnp.broadcast_to(bias, tile.logits.shape)


def position_bias(
    function: Callable[[Array, Array, Any], Array],
    tables: Any = None,
    fused: Penalty | Lookup | None = None,
    heads: tuple[int | None, ...] | None = None,
) -> BiasTerm:
    """A bias that is a function of two positions: ALiBi, T5, and whatever a user writes.

    Args:
      function: (query_positions [B or 1, 1, t, 1], key_positions [B or 1, 1, 1, s], tables) -> bias broadcastable to [B, N, t, s].
        It must be a module-level function, or the same object at every call, so that jit does not compile again.
      tables: arrays that the function reads, learned ones included; their gradients have their own shape, never [T, S].
      fused: the same bias by name, where it has one.
      heads: the axis of heads of each leaf of ``tables``, as in ``BiasTerm``.
    """
    return BiasTerm(function=_PositionFunction(function), tables=tables, fused=fused, heads=heads)


@dataclasses.dataclass(frozen=True)
class _PositionFunction:
    """Equal for equal functions, so that a term made twice is one term to jit."""

    function: Callable[[Array, Array, Any], Array]

    def __call__(self, tile: Tile, rows: Any, columns: Any, tables: Any, carry: Any) -> tuple[Array, Any]:
        query_positions = tile.query_positions[:, None, :, None]
        key_positions = tile.key_positions[:, None, None, :]
        return self.function(query_positions, key_positions, tables), carry


Pairing = Literal["half", "interleaved"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation of pairs of channels of query and key that is still to be done: a kernel may do it on tiles as they are loaded.

    Attributes:
      query_phase: [B or 1, T, R / 2] float32 radians, R the number of channels that are rotated, from the first on.
      key_phase: [B or 1, S, R / 2]; None: the keys are rotated.
      pairing: "half" pairs channel c with c + R / 2, "interleaved" 2c with 2c + 1.
    """

    query_phase: Array
    key_phase: Array | None
    pairing: Pairing = dataclasses.field(default="half", metadata={"static": True})

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Both rotated, in their own types."""
        if self.key_phase is not None:
            key = apply_rotation(key, self.key_phase, self.pairing)
        return apply_rotation(query, self.query_phase, self.pairing), key


def rotated(call: dict[str, Any]) -> dict[str, Any]:
    """The call of a kernel with the rotation done that was left to it."""
    rotation, rest = call.get("rotation"), {name: x for name, x in call.items() if name not in ("rotation", "raw")}
    if rotation is None:
        return rest
    query, key = rotation.applied(call["query"], call["key"])
    return rest | dict(query=query, key=key)


def apply_rotation(x: Float[Array, "B T N H"], phase: Float[Array, "_ T R2"], pairing: Pairing = "half") -> Float[Array, "B T N H"]:
    """Rotates the first 2 * phase.shape[-1] channels of x; the products are float32, the result has x's dtype."""
    width = 2 * phase.shape[-1]
    cos, sin = jnp.cos(phase)[:, :, None, :], jnp.sin(phase)[:, :, None, :]
    raw = x[..., :width]
    pair = (raw[..., : width // 2], raw[..., width // 2 :]) if pairing == "half" else (raw[..., 0::2], raw[..., 1::2])
    first, second = (part.astype(jnp.float32) for part in pair)  # apart: the compiler may keep both, and whole in float32 it would
    pair = [part.astype(x.dtype) for part in (first * cos - second * sin, first * sin + second * cos)]
    turned = jnp.concatenate(pair, -1) if pairing == "half" else jnp.stack(pair, -1).reshape(raw.shape)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)
