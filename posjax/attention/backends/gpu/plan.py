"""Inputs of the GPU kernels: the static plan and operands of a call, and which key tiles each query tile visits.

A query tile visits the key tiles from ``first`` to ``last``. Those in [full_begin, full_end) are *full blocks*: every pair is
allowed and all pairs have the same lookup index, so the kernel evaluates neither per pair. If there are several runs of full
blocks, the longest is used; the kernel treats the tiles of the others as partial blocks.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.kernel_biases import PairProgram
from posjax.core.masks import Extent, Rules, extents
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the static parameters of a call. Batch and head sizes are not among them, because they differ on a shard of a mesh.

    Attributes:
      last: P - 1 of CoPE, at which counts saturate; None if no term counts.
      index, uniform: of a lookup, functions of positions; see ``kernel_biases.index_of`` and ``uniform_of``.
      pairs: the programs of biases that are functions of two tokens.
      interpret: None where only output shapes are needed.
    """

    blocks: GpuBlocks
    rules: Rules
    soft_cap: float | None
    last: int | None
    index: Any
    uniform: Any
    pairs: tuple[PairProgram, ...]
    interpret: Any
    platforms: tuple[str, ...] | None = None
    home: ClassVar[str] = "cuda"

    @property
    def last_position(self) -> int:
        """Returns ``last`` of a call that counts."""
        assert self.last is not None
        return self.last

    @property
    def strips(self) -> int:
        """Returns the number of strips in a key tile."""
        return self.blocks.block_kv // self.blocks.block_kv_count

    @property
    def pieces(self) -> int:
        """Returns the number of pieces of ``rows`` queries in a query tile."""
        return self.blocks.block_q // self.blocks.block_q_rows

    @property
    def args(self) -> tuple[int, ...]:
        """Returns which numbers are args of functions, numbered over all pairs; the others are what pairs read."""
        found, first = [], 0
        for program in self.pairs:
            found += range(first, first + sum(map(math.prod, arg_shapes(program))))
            first += program.size
        return tuple(found)

    @property
    def learns_numbers(self) -> bool:
        """Returns whether the numbers of any pair have gradients."""
        return any(program.learned for program in self.pairs)

    @property
    def float_features(self) -> tuple[int, ...]:
        """Returns which features have gradients, numbered over all pairs."""
        dtypes = [dtype for program in self.pairs for dtype in program.features]
        return tuple(n for n, dtype in enumerate(dtypes) if dtype == "float32")


def arg_shapes(program: PairProgram) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the args of a pair's function, which come before those of its read."""
    args, _ = program.structure.children()
    return program.shapes[: args.num_leaves]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds the arrays of a call, padded to full tiles and to a multiple of 16 channels."""

    query: Array  # [B, T, N, C]
    key: Array  # [B, S, K, C]
    value: Array  # [B, S, K, V]
    scale: Array  # [1]
    query_positions: Array  # [B or 1, T]
    key_positions: Array  # [B or 1, S]
    query_segments: Array | None
    key_segments: Array | None
    z: Array | None  # [B, N, T, P] float32, the products of queries with CoPE's embedding
    table: Array | None  # [N, W] float32, the table of a lookup
    numbers: Array | None  # [N, A] float32, the numbers of all pairs
    query_features: Array | None  # [B or 1, N or 1, F, T] float32, the features of all pairs as ``features_of`` stores them
    key_features: Array | None  # [B or 1, N or K or 1, F, S]
    high: Array | None = None  # [B, N, T] float32: high + low are the counts of other calls on keys to the right
    low: Array | None = None


class BlockMask(NamedTuple):
    """Holds the block mask. Letters: I query tiles, J key tiles, R pieces of ``rows`` queries.

    Attributes:
      by_queries: [B or 1, I, 4] int32: first, full_begin, full_end and last as in the module docstring, in key tiles.
      by_keys: [B or 1, J, 4]: the same with queries and keys exchanged, in pieces of ``rows`` queries.
      query_first: [B or 1, I], the lowest position in each query tile.
      row_first: [B or 1, R], the lowest position in each piece.
      key_last: [B or 1, J], the highest position in each key tile.
    """

    by_queries: Array
    by_keys: Array
    query_first: Array
    row_first: Array
    key_last: Array


def make_block_mask(plan: Plan, x: Operands) -> BlockMask:
    def of_queries(size: int) -> Array:
        return extents(x.query_positions, x.query_segments, size)

    queries, pieces = of_queries(plan.blocks.block_q), of_queries(plan.blocks.block_q_rows)
    keys = extents(x.key_positions, x.key_segments, plan.blocks.block_kv)
    by_keys = _tile_ranges(*(jnp.swapaxes(flags, 1, 2) for flags in _flags(plan, pieces, keys)))
    return BlockMask(_tile_ranges(*_flags(plan, queries, keys)), by_keys, queries[..., 0], pieces[..., 0], keys[..., 1])


def _flags(plan: Plan, queries: Array, keys: Array) -> tuple[Array, Array]:
    """Computes two flags [B or 1, I, J] from ``extents``: whether any pair of a block is allowed, and whether the block is full."""
    rows, columns = (jnp.moveaxis(e, -1, 0) for e in (queries, keys))
    rows, columns = Extent(*rows[..., None]), Extent(*columns[:, :, None])
    is_visible, is_full = ~plan.rules.none(rows, columns), plan.rules.all(rows, columns)
    if plan.uniform is not None:
        is_full &= plan.uniform(rows.first, rows.last, columns.first, columns.last)
    shape = max(len(queries), len(keys)), queries.shape[1], keys.shape[1]
    return jnp.broadcast_to(is_visible, shape), jnp.broadcast_to(is_full, shape)


def _tile_ranges(is_visible: Array, is_full: Array) -> Array:
    """Computes first, full_begin, full_end and last from flags along the last axis."""
    any_visible = is_visible.any(-1)
    first, last = is_visible.argmax(-1), is_visible.shape[-1] - is_visible[..., ::-1].argmax(-1)
    begin, end = longest_run(is_full)
    return jnp.stack([jnp.where(any_visible, n, 0) for n in (first, begin, end, last)], -1).astype(jnp.int32)


def longest_run(flags: Array) -> tuple[Array, Array]:
    """Returns the start of the longest run of True along the last axis, and one past its end; they are equal if there is none."""
    index = jnp.broadcast_to(jnp.arange(flags.shape[-1]), flags.shape)
    begin = jax.lax.cummax(jnp.where(flags, 0, index + 1), axis=flags.ndim - 1)
    length = jnp.where(flags, index + 1 - begin, 0)
    end = length.argmax(-1)
    size = jnp.take_along_axis(length, end[..., None], -1)[..., 0]
    return end + 1 - size, end + 1


def query_tile_bounds(border: Array, count: int, first: bool = False) -> Array:
    """Computes a bound on the query tiles for each of ``count`` key tiles or strips, from the query tiles' borders [B, N, I].

    For key tile j this is one past the last query tile whose border is at most j or, if ``first``, the first query tile whose
    border is greater than j.
    """
    hull = jax.lax.cummax(border, axis=2) if first else jax.lax.cummin(border, axis=2, reverse=True)
    search = functools.partial(jnp.searchsorted, side="right")
    bounds = jax.vmap(jax.vmap(search, (0, None)), (0, None))(hull, jnp.arange(count))
    return bounds.astype(jnp.int32)
