"""Masks: the pairs of query and key that are allowed to attend.

``Mask`` holds the masking arguments of an attention call. ``Rules`` determines from the ranges of positions and segments of a block
of queries and a block of keys whether all, some or no pairs are allowed; kernels skip blocks without allowed pairs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.checks import check
from posjax.typing import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Holds the mask of an attention call.

    Attributes:
      boolean: [B or 1, N or 1, T or 1, S or 1], True where attention is allowed; None allows all pairs.
      query_segments, key_segments: [B, T] and [B, S] integers; only tokens of equal segments attend to each other.
      is_causal: True allows only keys whose position is not after the query's.
      window: (left, right); a key's position must be in [query - left, query + right]. None on a side is no limit.
    """

    boolean: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: tuple[int | None, int | None] = dataclasses.field(default=(None, None), metadata={"static": True})

    def __post_init__(self) -> None:
        check("is_causal", self.is_causal, bool)

    def replace(self, **fields: Any) -> "Mask":
        """Returns the mask with some of its fields replaced.

        Args:
          **fields: new values of the fields.
        """
        return dataclasses.replace(self, **fields)

    def cut(self, row_start: Any, row_size: int, column_start: Any, column_size: int) -> "Mask":
        """Returns the mask of one tile of ``row_size`` queries and ``column_size`` keys.

        Args:
          row_start, row_size: first query of the tile, which may be traced, and their number.
          column_start, column_size: likewise, for keys.
        """

        return dataclasses.replace(
            self,
            boolean=cut_pairs(self.boolean, row_start, row_size, column_start, column_size),
            query_segments=_along(self.query_segments, 1, row_start, row_size),
            key_segments=_along(self.key_segments, 1, column_start, column_size),
        )

    def allowed(self, query_positions: Int[Array, "_ t"], key_positions: Int[Array, "_ s"]) -> Bool[Array, "_ _ t s"]:
        """Returns the boolean mask of a tile for its positions, [B or 1, N or 1, t, s].

        The mask must have been cut to the tile.

        Args:
          query_positions: [B or 1, t] integers.
          key_positions: [B or 1, s] integers.
        """
        distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
        allowed = jnp.ones(distance.shape, bool)
        left, right = self.window
        if self.is_causal:
            allowed &= distance >= 0
        if left is not None:
            allowed &= distance <= left
        if right is not None:
            allowed &= distance >= -right
        if self.query_segments is not None and self.key_segments is not None:
            allowed &= self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
        if self.boolean is not None:
            allowed = allowed & self.boolean
        return allowed


def cut_pairs(x: Array | None, row_start: Any, row_size: int, column_start: Any, column_size: int) -> Array | None:
    """Returns one tile of an array [B or 1, N or 1, T or 1, S or 1]; an axis of length 1 stays, and so does None."""
    return _along(_along(x, 2, row_start, row_size), 3, column_start, column_size)


def _along(x: Array | None, axis: int, start: Any, size: int) -> Array | None:
    return x if x is None or x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


FAR = 2**31 - 1  # position of a padding key: after every query, so that a causal mask excludes it


class Extent(NamedTuple):
    """Holds the smallest and largest position and segment in a block of queries or keys."""

    first: Array
    last: Array
    first_segment: Array
    last_segment: Array


class Rules(NamedTuple):
    """Holds the rules of a mask for positions and segments, without its boolean array."""

    is_causal: bool
    left: int | None
    right: int | None
    segmented: bool

    def none(self, queries: Extent, keys: Extent) -> Array:
        """Returns whether the extents of two blocks exclude every pair."""
        no: Any = jnp.zeros((), bool) if isinstance(queries.first, jax.Array) else False
        if self.is_causal:
            no |= keys.first > queries.last
        if self.left is not None:
            no |= queries.first - keys.last > self.left
        if self.right is not None:
            no |= keys.first - queries.last > self.right
        if self.segmented:
            no |= (queries.first_segment > keys.last_segment) | (keys.first_segment > queries.last_segment)
        return no

    def all(self, queries: Extent, keys: Extent) -> Array:
        """Returns whether the extents of two blocks guarantee that every pair is allowed."""
        yes = jnp.ones((), bool)
        if self.is_causal:
            yes &= keys.last <= queries.first
        if self.left is not None:
            yes &= queries.last - keys.first <= self.left
        if self.right is not None:
            yes &= keys.last - queries.first <= self.right
        if self.segmented:
            one = (queries.first_segment == queries.last_segment) & (keys.first_segment == keys.last_segment)
            yes &= one & (queries.first_segment == keys.first_segment)
        return yes

    def pairs(self, query_positions: Array, key_positions: Array, query_segments: Any, key_segments: Any) -> Array:
        """Returns a boolean array of allowed pairs, for positions and segments of queries and keys that broadcast together."""
        allowed = jnp.ones(key_positions.shape, bool) if not self.is_causal else query_positions >= key_positions
        if self.left is not None:
            allowed &= query_positions - key_positions <= self.left
        if self.right is not None:
            allowed &= query_positions - key_positions >= -self.right
        if self.segmented:
            allowed &= query_segments == key_segments
        return allowed

    def visible_range(self, queries: Array, keys: Array) -> Array:
        """Returns the range of key blocks that each query block may attend to, [B, Q, 2]: the first, and one past the last.

        ``queries`` and ``keys`` are results of ``extents``.
        """
        by_queries, by_keys = (Extent(*jnp.moveaxis(e, -1, 0)) for e in (queries, keys))
        is_visible = ~self.none(Extent(*(e[:, :, None] for e in by_queries)), Extent(*(e[:, None] for e in by_keys)))
        is_visible = jnp.broadcast_to(is_visible, (max(len(queries), len(keys)), queries.shape[1], keys.shape[1]))
        first, last = is_visible.argmax(-1), is_visible.shape[-1] - is_visible[..., ::-1].argmax(-1)
        return jnp.stack([first, jnp.where(is_visible.any(-1), last, first)], -1)


def extents(positions: Array, segments: Array | None, size: int) -> Array:
    """Returns the first and last position and segment of every block of ``size`` tokens, [B, blocks, 4].

    All axes of positions and segments after the batch are flattened. Without segments, those are zero.
    """

    def ends(x: Array) -> list[Array]:
        x = x.reshape(x.shape[0], -1, size)
        return [x.min(-1), x.max(-1)]

    parts = ends(positions.reshape(positions.shape[0], -1))
    parts += ends(segments.reshape(segments.shape[0], -1)) if segments is not None else [jnp.zeros_like(parts[0])] * 2
    batch = max(part.shape[0] for part in parts)
    return jnp.stack([jnp.broadcast_to(part, (batch, part.shape[1])) for part in parts], -1)


def with_padding(mask: Mask, queries: int, key_positions: Array, padding: int) -> tuple[Array, Array | None, Array | None]:
    """Appends ``padding`` keys that no query attends to.

    Returns key positions, query segments and key segments. Segments are None if the mask excludes the padding without them.
    """
    segments = mask.query_segments, mask.key_segments
    length = key_positions.shape[1]
    key_positions = jnp.pad(key_positions, [(0, 0), (0, padding)], constant_values=FAR if mask.is_causal else 0)
    if padding and not mask.is_causal and segments[0] is None:
        segments = jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, length), jnp.int32)
    if segments[0] is None or segments[1] is None:
        return key_positions, None, None
    none = jnp.minimum(segments[0].min(), segments[1].min()) - 1  # below every segment in use
    of_padding = jnp.broadcast_to(none, (segments[1].shape[0], padding))
    return key_positions, segments[0], jnp.concatenate([segments[1], of_padding], 1)
