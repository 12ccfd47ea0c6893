"""What the GPU kernels are given: a call as they take it, and which tiles of keys each tile of queries visits.

A query tile walks over key tiles from ``first`` to ``last``. Those in [plain, detailed) are *plain*: all pairs may meet and a
lookup is one number, so that neither is looked at. Where there are several runs of plain tiles the longest is taken for it, and the
others are done in detail like the rest.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.core.masks import Extent, Rules, extents
from posjax.typing import Array

LOG2E = 1.4426950408889634
MASK_VALUE = -2e38  # a score that is not allowed
INIT_MAX = -1e30  # the running maximum before anything was seen: above MASK_VALUE, so that what is forbidden weighs nothing


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before compilation; no sizes of batch and heads, which a shard of a mesh has its own of.

    Attributes:
      last: P - 1 of CoPE, where counts stop to matter; None: nothing is counted.
      index, uniform: of a lookup, as in ``posjax.core.bias.Lookup``.
      interpret: None where only shapes are asked for.
    """

    blocks: GpuBlocks
    rules: Rules
    soft_cap: float | None
    last: int | None
    index: Any
    uniform: Any
    penalised: bool
    interpret: Any

    @property
    def strips(self) -> int:
        """Of a key tile."""
        return self.blocks.keys // self.blocks.strip

    @property
    def pieces(self) -> int:
        """Of a query tile."""
        return self.blocks.queries // self.blocks.rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """A call, padded to whole tiles and to channels that are a multiple of 16."""

    query: Array  # [B, T, N, C]
    key: Array  # [B, S, K, C]
    value: Array  # [B, S, K, V]
    scale: Array  # [1]
    query_positions: Array  # [B or 1, T]
    key_positions: Array  # [B or 1, S]
    query_segments: Array | None
    key_segments: Array | None
    z: Array | None  # [B, N, T, P] float32, the query's products with the embedding of CoPE
    table: Array | None  # [N, W] float32, of a lookup
    slopes: Array | None  # [N] float32
    high: Array | None = None  # [B, N, T] float32: counts of keys to the right that other calls have, high + low
    low: Array | None = None


class Visits(NamedTuple):
    """Which tiles meet. Letters: I query tiles, J key tiles, R pieces of ``rows`` queries.

    Attributes:
      by_queries: [B or 1, I, 4] int32: first, plain, detailed, last as in this file's text, in key tiles.
      by_keys: [B or 1, J, 4], the same with queries and keys exchanged, in pieces of ``rows`` queries.
      query_first: [B or 1, I], the first position of each query tile.
      row_first: [B or 1, R], and of each piece.
      key_last: [B or 1, J], the last position of each key tile.
    """

    by_queries: Array
    by_keys: Array
    query_first: Array
    row_first: Array
    key_last: Array


def visits(plan: Plan, x: Operands) -> Visits:
    def of_queries(size: int) -> Array:
        return extents(x.query_positions, x.query_segments, size)

    queries, pieces = of_queries(plan.blocks.queries), of_queries(plan.blocks.rows)
    keys = extents(x.key_positions, x.key_segments, plan.blocks.keys)
    by_keys = _walk(*(jnp.swapaxes(flags, 1, 2) for flags in _flags(plan, pieces, keys)))
    return Visits(_walk(*_flags(plan, queries, keys)), by_keys, queries[..., 0], pieces[..., 0], keys[..., 1])


def _flags(plan: Plan, queries: Array, keys: Array) -> tuple[Array, Array]:
    """[B or 1, I, J] from ``extents``: whether any pairs meet, and whether the pairs are plain."""
    rows, columns = (jnp.moveaxis(e, -1, 0) for e in (queries, keys))
    rows, columns = Extent(*rows[..., None]), Extent(*columns[:, :, None])
    live, plain = ~plan.rules.none(rows, columns), plan.rules.all(rows, columns)
    if plan.uniform is not None:
        plain &= plan.uniform(rows.first, rows.last, columns.first, columns.last)
    shape = max(len(queries), len(keys)), queries.shape[1], keys.shape[1]
    return jnp.broadcast_to(live, shape), jnp.broadcast_to(plain, shape)


def _walk(live: Array, plain: Array) -> Array:
    """first, plain, detailed, last along the last axis."""
    found = live.any(-1)
    first, last = live.argmax(-1), live.shape[-1] - live[..., ::-1].argmax(-1)
    begin, end = longest_run(plain)
    return jnp.stack([jnp.where(found, n, 0) for n in (first, begin, end, last)], -1).astype(jnp.int32)


def longest_run(flags: Array) -> tuple[Array, Array]:
    """Where the longest run of true begins, and one past its end, along the last axis; the two are equal where there is none."""
    place = jnp.broadcast_to(jnp.arange(flags.shape[-1]), flags.shape)
    begin = jax.lax.cummax(jnp.where(flags, 0, place + 1), axis=flags.ndim - 1)
    length = jnp.where(flags, place + 1 - begin, 0)
    end = length.argmax(-1)
    size = jnp.take_along_axis(length, end[..., None], -1)[..., 0]
    return end + 1 - size, end + 1


def below(border: Array, count: int, first: bool = False) -> Array:
    """For each of ``count`` keys' tiles or strips, from borders [B, N, I] of query tiles: one past the last query tile whose border
    is not beyond it; or the first whose border is."""
    hull = jax.lax.cummax(border, axis=2) if first else jax.lax.cummin(border, axis=2, reverse=True)
    search = functools.partial(jnp.searchsorted, side="right")
    found = jax.vmap(jax.vmap(search, (0, None)), (0, None))(hull, jnp.arange(count))
    return found.astype(jnp.int32)
