"""Code that the forward and backward kernels on TPU share: plan, operands, scalars, and one query tile's view of them."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.kernel_biases import PairProgram, as_feature
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.backends.tpu.tiles import (
    LANES,
    NN,
    NT,
    QUARTER,
    SUBLANES,
    Counting,
    column,
    concatenate,
    matmul_bf16x3,
    product,
    register_gather,
)
from posjax.core.masks import Extent, Rules, extents
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the static part of a call; no sizes of batch and heads, which differ on the shards of a mesh."""

    blocks: Blocks
    rules: Rules
    soft_cap: float | None
    counting: Counting | None
    index: Any  # of a lookup: positions -> index in the table
    uniform: Any  # of a lookup: first and last positions -> whether all pairs have the same index
    pairs: tuple[PairProgram, ...]
    rotates_keys: bool  # keys are rotated when they arrive in VMEM
    vmem: int
    interpret: Any
    platforms: tuple[str, ...] | None = None
    home: ClassVar[str] = "tpu"

    @property
    def groups(self) -> int:
        return self.blocks.block_q // LANES

    @property
    def groups_side_by_side(self) -> int:
        """Returns the number of query groups that are counted together: two fill the matrix unit."""
        return 2 if self.groups % 2 == 0 else 1

    @property
    def per_tile(self) -> int:
        """Returns the number of strips in a key tile."""
        return self.blocks.block_kv // self.blocks.block_kv_count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds the arrays of a call in the kernel's layout, padded to whole blocks. There are I query tiles of t rows each."""

    query: Array  # [B, K, G, T, C]
    key: Array  # [B, K, S, C]
    value: Array  # [B, K, S, V]
    scale: Array  # [1]
    query_positions: Array  # [B or 1, I, t / 128, 128]
    key_positions: Array  # [B or 1, 1, S]
    query_segments: Array | None
    key_segments: Array | None
    counted_query: Array | None  # [B, K, G, T, H], multiplies the embedding; None: ``query`` does
    embedding: Array | None  # [K or 1, G or 1, 2, P, H]: each position, and its step to the next
    table: Array | None  # [K, G, 1, 128]
    numbers: Array | None  # [K, G, A, 128], the numbers of all pairs, each in every lane
    query_features: Array | None  # [B or 1, K or 1, G or 1, F, I, t / 128, 128], those of all pairs
    key_features: Array | None  # [B or 1, K or 1, G or 1, F, S]
    query_cos_sin: Array | None  # [B or 1, 2, T, C], cosines and sines
    key_cos_sin: Array | None  # [B or 1, 2, S, C]
    rotate_half_matrix: Array | None  # [C, C], the rotate-half matrix
    high: Array | None = None  # [B, K, G, I, t / 128, 128]: counts over the keys to the right, from other calls: high + low
    low: Array | None = None


def queries_of(x: Operands) -> list[str]:
    """Returns the names of the operands with gradients that are split by query tile."""
    return ["query"] + ([] if x.counted_query is None else ["counted_query"])


# Extents, for the scalar unit --------------------------------------------------------------------------------------------


def make_scalars(plan: Plan, x: Operands) -> tuple[Array, ...]:
    """Computes the arrays that the scalar unit reads, in the order of ``Scalars``.

    They are the range of key tiles that the mask allows for each query tile, the range of strips for each pair of query groups, and
    the extents of tiles, groups and strips.
    """
    blocks = plan.blocks

    def of_queries(size: int) -> Array:
        return extents(x.query_positions, x.query_segments, size)

    def of_keys(size: int) -> Array:
        return extents(x.key_positions, x.key_segments, size)

    q_tiles, k_tiles, strips = of_queries(blocks.block_q), of_keys(blocks.block_kv), of_keys(blocks.block_kv_count)
    visible_strips = plan.rules.visible_range(of_queries(plan.groups_side_by_side * LANES), strips)
    arrays = (plan.rules.visible_range(q_tiles, k_tiles), visible_strips, q_tiles, k_tiles, of_queries(LANES), strips)
    return tuple(a.astype(jnp.int32).reshape(-1) for a in arrays)


class Scalars(NamedTuple):
    """Holds references to the results of ``make_scalars`` inside the kernel."""

    visible_tiles: Any
    visible_strips: Any
    query_tiles: Any
    key_tiles: Any
    query_groups: Any
    key_strips: Any


class PairInputs(NamedTuple):
    """Holds the inputs of a pair's program for keys [s, 1 or t] and queries [1, t], and their places among those of all pairs."""

    program: PairProgram
    queries: tuple[Array, ...]
    keys: tuple[Array, ...]
    numbers: list[Array]
    first_number: int
    first_feature: int


# Inside a tile -------------------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Represents a range of a tile's groups of 128 queries: ``count`` groups from ``first`` on."""

    first: Array | int
    count: int

    @property
    def lanes(self) -> Any:
        return pl.ds(self.first * LANES, self.count * LANES)

    def lane_slices(self) -> list[tuple[Array | int, slice]]:
        """Returns each group's index in the tile and its lanes within the range."""
        return [(self.first + n, slice(n * LANES, (n + 1) * LANES)) for n in range(self.count)]


def as_row(ref: Any, groups: Groups | None = None) -> Array:
    """Reads row values [t / 128, 128], or some groups of them, as one lane vector [1, t]."""
    first, count = groups or (0, ref.shape[0])
    return jnp.concatenate([ref[pl.ds(first + n, 1), :] for n in range(count)], axis=1)


def apply_rotary(x: Array, cos_sin: Any, rotate_half_matrix: Array, inverse: bool = False) -> Array:
    """Rotates x [s, C] by the cosines and sines of ``cos_sin`` [2, s, C], or rotates it back; the result is float32."""
    cos, sin = cos_sin[0], cos_sin[1]
    exact = rotate_half_matrix.dtype == jnp.float32
    if inverse:
        return x * cos + matmul_bf16x3(x * sin, rotate_half_matrix, NT, exact)
    return x.astype(jnp.float32) * cos + product(x, rotate_half_matrix, NN, exact) * sin


def apply_soft_cap(plan: Plan, x: Array) -> Array:
    """Applies the soft cap to scores; masked scores stay MASK_VALUE."""
    if plan.soft_cap is None:
        return x
    cap = plan.soft_cap * LOG2E
    return jnp.where(x > INIT_MAX, cap * jnp.tanh(x / cap), MASK_VALUE)


def soft_cap_derivative(plan: Plan, x: Array) -> Array:
    """Returns the derivative of the soft cap where the capped score is x; zero where x is MASK_VALUE."""
    assert plan.soft_cap is not None
    return 1.0 - jnp.square(jnp.maximum(x / (plan.soft_cap * LOG2E), -1.0))


def masked_or_not(body: Any, is_full: Array, is_active: Array | bool = True) -> None:
    """Calls ``body(masked)`` if ``is_active``; masked is False if the mask allows all pairs (``is_full``)."""
    pl.when(is_full & is_active)(lambda: body(False))
    pl.when(~is_full & is_active)(lambda: body(True))


@dataclasses.dataclass
class Step:
    """Holds the state of a kernel body for one query tile of one head; shared by forward and backward."""

    plan: Plan
    scalars: Scalars
    refs: dict[str, Any]
    row: Array | int  # index in the batch of ``scalars``; 0 where it has one row
    rows: int
    tile: Array  # index of the query tile
    key_block: Array | int  # index of the resident block of keys

    def __getattr__(self, name: str) -> Any:
        return self.refs[name]

    @property
    def counting(self) -> Counting:
        """Returns how a call that counts by gates does so."""
        assert self.plan.counting is not None
        return self.plan.counting

    def entry(self, which: str, index: Array | int) -> list[Array]:
        """Reads one entry of ``scalars``: a range (two numbers) or an extent (four numbers)."""
        ref, size = getattr(self.scalars, which), 2 if which in ("visible_tiles", "visible_strips") else 4
        start = (self.row * (ref.shape[0] // self.rows // size) + index) * size
        return [ref[start + n] for n in range(size)]

    def query_extent(self) -> Extent:
        return Extent(*self.entry("query_tiles", self.tile))

    def key_extent(self, j: Array) -> Extent:
        return Extent(*self.entry("key_tiles", self.key_block * (self.strips // self.plan.per_tile) + j))

    def group_extent(self, g: Array | int) -> Extent:
        return Extent(*self.entry("query_groups", self.tile * self.plan.groups + g))

    def strip_extent(self, at: Array) -> Extent:
        return Extent(*self.entry("key_strips", self.key_block * self.strips + at))

    @property
    def strips(self) -> int:
        """Returns the number of strips in the resident block."""
        return self.key.shape[0] // self.plan.blocks.block_kv_count

    def for_key_tiles(self, body: Any) -> None:
        """Calls ``body(j, is_full)`` for each key tile of this block that has pairs outside the counting region, right to left.

        ``is_full`` is True if all pairs of the tile are outside the counting region and allowed.
        """
        per_tile, tiles_per_block = self.plan.per_tile, self.strips // self.plan.per_tile
        first, last = (
            jnp.clip(n - self.key_block * tiles_per_block, 0, tiles_per_block) for n in self.entry("visible_tiles", self.tile)
        )
        limits = [] if self.plan.counting is None else [self.limit_in_block(a) for a in range(self.limit.shape[0])]
        if limits:
            most = functools.reduce(jnp.maximum, limits)
            last = jnp.minimum(last, jax.lax.div(most + (per_tile - 1), np.int32(per_tile)))

        def one(n: Array, _: None) -> None:
            j = last - 1 - n
            is_full = self.plan.rules.all(self.query_extent(), self.key_extent(j))
            for limit in limits:
                is_full &= limit >= (j + 1) * per_tile
            body(j, is_full)

        jax.lax.fori_loop(0, last - first, one, None)

    def limit_in_block(self, a: Array | int) -> Array:
        """Returns the first strip of this block that pair a of query groups has counted; ``strips`` if it has counted none."""
        return jnp.clip(self.limit[a] - self.key_block * self.strips, 0, self.strips)

    def all_groups(self, ref: Any) -> Array:
        """Reads [t / 128, s, 128] as [s, t]."""
        return jnp.concatenate([ref[g] for g in range(self.plan.groups)], axis=1)

    def by_group(self, ref: Any, x: Array) -> None:
        """Writes [s, t] into [t / 128, s, 128]."""
        for g in range(self.plan.groups):
            ref[g] = x[:, g * LANES : (g + 1) * LANES]

    def last_bias(self) -> Array:
        """Returns the bias of saturated counts, [1, t]."""
        return jnp.concatenate([self.z[g, pl.ds(self.counting.last, 1), :] for g in range(self.plan.groups)], axis=1)

    def dispatch_tile(self, j: Array, is_full: Array, uniform_tile: Any, lookup_tile: Any) -> None:
        """Calls ``lookup_tile(j, is_full)`` on a tile with more than one table index, ``uniform_tile(j, masked)`` on any other."""
        is_uniform: Array | bool = True
        if self.plan.index is not None:
            is_uniform = self.is_uniform(self.query_extent(), self.key_extent(j))
            pl.when(~is_uniform)(lambda: lookup_tile(j, is_full))
        masked_or_not(functools.partial(uniform_tile, j), is_full, is_uniform)

    def lookup_biases(self, strip_of: Any) -> Array:
        """Returns the T5 bias of each query group g in its strip ``strip_of(g)``, [s, t]."""

        def one_group(g: Array, _: None) -> None:
            strip = strip_of(g)
            queries, keys = self.group_extent(g), self.strip_extent(strip)
            uniform = self.is_uniform(queries, keys)

            @pl.when(uniform)
            def _() -> None:
                bias = self.look_up(jnp.full((SUBLANES, LANES), self.common_index(queries, keys), jnp.int32))
                self.lookup_bias[g] = jnp.broadcast_to(bias[:1], self.lookup_bias.shape[1:])

            @pl.when(~uniform)
            def _() -> None:
                self.lookup_bias[g] = self.look_up(self.index_of(strip, g))

        jax.lax.fori_loop(0, self.plan.groups, one_group, None)
        return self.all_groups(self.lookup_bias)

    def start_of(self, strip: Array) -> Array:
        return pl.multiple_of(strip * self.plan.blocks.block_kv_count, self.plan.blocks.block_kv_count)

    def keys(self, start: Array, size: int) -> Array:
        ref = self.rotated_key if self.plan.rotates_keys else self.key
        return ref[pl.ds(start, size), :]

    def pairs(self, start: Array, size: int, groups: Groups | None = None, is_active: Array | None = None) -> Array:
        """Returns the mask of ``size`` keys and the queries, or some groups of them: bool [size, t], False if not ``is_active``."""
        rules = self.plan.rules

        def both(queries: Any, keys: Any) -> list[Array]:
            row = as_row(queries, groups)
            return [row, column(keys[:, pl.ds(start, size)], row.shape[1])]

        positions = both(self.query_positions, self.key_positions)
        if is_active is not None and rules.is_causal:  # a query position before all keys allows none
            positions[0] = jnp.where(is_active, positions[0], jnp.iinfo(jnp.int32).min)
        segments = both(self.query_segments, self.key_segments) if rules.segmented else (None, None)
        allowed = rules.pairs(*positions, *segments)
        return allowed if is_active is None or rules.is_causal else allowed & is_active

    def apply_mask(self, scores: Array, start: Array) -> Array:
        """Masks scores [s, t] of the keys from ``start`` on: MASK_VALUE for pairs that are not allowed or already counted."""
        size = scores.shape[0]
        allowed = self.pairs(start, size)
        if self.plan.counting is None:
            return jnp.where(allowed, scores, MASK_VALUE)
        limits = [self.limit_in_block(a) * self.plan.blocks.block_kv_count - start for a in range(self.limit.shape[0])]
        row = concatenate([jnp.full((1, self.plan.groups_side_by_side * LANES), limit, jnp.int32) for limit in limits], 1)
        allowed &= jax.lax.broadcasted_iota(jnp.int32, allowed.shape, 0) < row
        return jnp.where(allowed, scores, MASK_VALUE)

    def pair_inputs(self, start: Array, size: int, groups: Groups | None = None) -> list[PairInputs]:
        """Returns the inputs of every pair's program for ``size`` keys and the queries, or some groups of them."""
        inputs, first_number, first_feature = [], 0, 0
        width = LANES * (self.plan.groups if groups is None else groups.count)
        at = pl.ds(start, size)

        def number(n: int) -> Array:
            return jnp.tile(self.numbers[n : n + 1, :], (1, width // LANES))

        for program in self.plan.pairs:
            if program.features:
                kinds = list(enumerate(program.features, first_feature))
                queries = tuple(as_feature(as_row(self.query_features.at[n], groups), kind) for n, kind in kinds)
                keys = tuple(column(as_feature(self.key_features[n : n + 1, at], kind), width) for n, kind in kinds)
            else:
                queries, keys = (as_row(self.query_positions, groups),), (column(self.key_positions[:, at], width),)
            numbers = [number(first_number + n) for n in range(program.size)]
            inputs.append(PairInputs(program, queries, keys, numbers, first_number, first_feature))
            first_number, first_feature = first_number + program.size, first_feature + len(program.features)
        return inputs

    def pair_biases(self, start: Array, size: int, groups: Groups | None = None) -> Array:
        """Returns the biases that are functions of two tokens, [s, t]."""
        inputs = self.pair_inputs(start, size, groups)
        return functools.reduce(jnp.add, (x.program.in_log2(x.queries, x.keys, x.numbers) for x in inputs))

    def look_up(self, index: Array) -> Array:
        """Returns the table's entries at the given indices, [s, 128]."""
        table = jnp.broadcast_to(self.table[...] * LOG2E, (SUBLANES, LANES))
        rows = [register_gather(table, index[at : at + SUBLANES], 1) for at in range(0, index.shape[0], SUBLANES)]
        return jnp.concatenate(rows, axis=0)

    def index_of(self, strip: Array, group: Array) -> Array:
        """Returns the table indices of a strip and a query group, [s, 128]."""
        keys = column(self.key_positions[:, pl.ds(self.start_of(strip), self.plan.blocks.block_kv_count)], LANES)
        return self.plan.index(jnp.broadcast_to(self.query_positions[pl.ds(group, 1), :], keys.shape), keys)

    def is_uniform(self, queries: Extent, keys: Extent) -> Array:
        return self.plan.uniform(queries.first, queries.last, keys.first, keys.last)

    def common_index(self, queries: Extent, keys: Extent) -> Array:
        return self.plan.index(queries.first, keys.last)

    def constant(self, queries: Extent, keys: Extent) -> Array | None:
        """Returns the bias that is constant along a row, [1, t]: of saturated counts and of the T5 index common to all pairs."""
        bias = None
        if self.plan.counting is not None:
            bias = self.last_bias()
        if self.plan.index is not None:
            table_bias = self.look_up(jnp.full((SUBLANES, LANES), self.common_index(queries, keys), jnp.int32))[:1]
            table_bias = jnp.tile(table_bias, (1, self.plan.groups))
            bias = table_bias if bias is None else bias + table_bias
        return bias

    def prepare_queries(self) -> None:
        """Rotates the query tile and multiplies the query with the embedding, once for all key tiles."""
        query = self.query[...]
        if self.query_cos_sin is not None:
            self.rotated_query[...] = apply_rotary(query, self.query_cos_sin, self.rotate_half_matrix[...]).astype(query.dtype)
        if self.plan.counting is not None:
            counted = query if self.counted_query is None else self.counted_query[...]
            for n, ref in enumerate((self.z, self.slope)):
                self.by_group(ref, matmul_bf16x3(self.embedding[n], counted, NT, self.plan.counting.exact) * LOG2E)

    def queries(self, groups: Groups | None = None) -> Array:
        ref = self.query if self.query_cos_sin is None else self.rotated_query
        return ref[...] if groups is None else ref[groups.lanes, :]

    def prepare_keys(self) -> None:
        """Rotates the keys in VMEM, once for all query tiles."""
        size = self.plan.blocks.block_kv

        def one(n: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(n * size, size), size)
            key = self.key[at, :]
            cos_sin = self.key_cos_sin[0, at, :], self.key_cos_sin[1, at, :]
            self.rotated_key[at, :] = apply_rotary(key, cos_sin, self.rotate_half_matrix[...]).astype(key.dtype)

        jax.lax.fori_loop(0, self.key.shape[0] // size, one, None)


OPTIONAL = tuple(field.name for field in dataclasses.fields(Operands) if "None" in str(field.type))


def blocks_of(first: Array, last: Array, tiles: int) -> tuple[Array, Array]:
    """Returns the first and the last resident block of the key tiles first .. last - 1."""
    return jax.lax.div(first, np.int32(tiles)), jax.lax.div(jnp.maximum(last - 1, first), np.int32(tiles))  # // queries the chip


def inputs_of(plan: Plan, x: Operands, key_block: Any) -> tuple[list[str], list[Array], list[pl.BlockSpec]]:
    """Returns the names, arrays and block specs of the operands; ``key_block(b, i, r, *scalars)`` is the resident block's index."""
    blocks = plan.blocks
    resident = min(blocks.block_kv_resident, x.key.shape[2])
    operands: list[tuple[str, Array, tuple, Any]] = []

    def varies(array: Array, b: Any) -> Any:
        return b if array.shape[0] > 1 else 0

    def add(name: str, array: Array, shape: tuple, index: Any) -> None:
        operands.append((name, array, shape, index))

    def by_query(b, k, g, i, r, *scalars):
        return b, k, g, i, 0

    def by_key(b, k, g, i, r, *scalars):
        return b, k, key_block(b, i, r, *scalars), 0

    def flat(array: Array) -> Any:
        return lambda b, k, g, i, r, *scalars: (varies(array, b), 0, key_block(b, i, r, *scalars))

    def tiles(array: Array) -> Any:
        return lambda b, k, g, i, r, *scalars: (varies(array, b), i, 0, 0)

    none = (None,) * 3
    add("query", x.query, (*none, blocks.block_q, x.query.shape[-1]), by_query)
    add("key", x.key, (None, None, resident, x.key.shape[-1]), by_key)
    add("value", x.value, (None, None, resident, x.value.shape[-1]), by_key)
    for name in ("query_positions", "query_segments"):
        if (array := getattr(x, name)) is not None:
            add(name, array, (None, None, plan.groups, LANES), tiles(array))
    for name in ("key_positions", "key_segments"):
        if (array := getattr(x, name)) is not None:
            add(name, array, (None, 1, resident), flat(array))
    if x.counted_query is not None:
        add("counted_query", x.counted_query, (*none, blocks.block_q, x.counted_query.shape[-1]), by_query)
    if x.embedding is not None:
        per_head = x.embedding.shape[0] > 1 or x.embedding.shape[1] > 1
        head = (lambda b, k, g, *_: (k, g, 0, 0, 0)) if per_head else (lambda *_: (0,) * 5)
        add("embedding", x.embedding, (None, None, *x.embedding.shape[2:]), head)
    for name in ("table", "numbers"):
        if (array := getattr(x, name)) is not None:
            add(name, array, (None, None, *array.shape[2:]), lambda b, k, g, *_: (k, g, 0, 0))
    if x.query_features is not None and x.key_features is not None:
        query_head, key_head = (_leading(array.shape) for array in (x.query_features, x.key_features))
        count = x.query_features.shape[3]
        by_query_tile = (None, None, None, count, None, plan.groups, LANES)
        add("query_features", x.query_features, by_query_tile, lambda b, k, g, i, *_: (*query_head(b, k, g), 0, i, 0, 0))
        by_block = (None, None, None, count, resident)
        add(
            "key_features",
            x.key_features,
            by_block,
            lambda b, k, g, i, r, *scalars: (*key_head(b, k, g), 0, key_block(b, i, r, *scalars)),
        )
    if x.query_cos_sin is not None:
        cos_sin = x.query_cos_sin
        add(
            "query_cos_sin",
            cos_sin,
            (None, 2, blocks.block_q, cos_sin.shape[-1]),
            lambda b, k, g, i, *_: (varies(cos_sin, b), 0, i, 0),
        )
    if x.key_cos_sin is not None:
        of_keys = x.key_cos_sin
        add(
            "key_cos_sin",
            of_keys,
            (None, 2, resident, of_keys.shape[-1]),
            lambda b, k, g, i, r, *scalars: (varies(of_keys, b), 0, key_block(b, i, r, *scalars), 0),
        )
    if x.rotate_half_matrix is not None:
        add("rotate_half_matrix", x.rotate_half_matrix, x.rotate_half_matrix.shape, lambda *_: (0, 0))
    for name in ("high", "low"):
        if (array := getattr(x, name)) is not None:
            by_tile = (None,) * 4 + (plan.groups, LANES)
            add(f"in_{name}", array, by_tile, lambda b, k, g, i, *_: (b, k, g, i, 0, 0))
    specs = [pl.BlockSpec(shape, index) for _, _, shape, index in operands]
    return [name for name, *_ in operands], [array for _, array, *_ in operands], specs


def _leading(shape: tuple[int, ...]) -> Any:
    """Returns a function from batch, key head and group to the index in an array whose first three axes may have length 1."""
    return lambda *index: tuple(n if size > 1 else 0 for n, size in zip(index, shape[:3], strict=True))


def scratch_of(plan: Plan, x: Operands) -> dict[str, Any]:
    """Returns the scratch buffers that both passes use, by name."""
    blocks, width = plan.blocks, x.query.shape[-1]
    scratch = {}
    if x.query_cos_sin is not None:
        scratch["rotated_query"] = pltpu.VMEM((blocks.block_q, width), x.query.dtype)
    if plan.rotates_keys:
        scratch["rotated_key"] = pltpu.VMEM((min(blocks.block_kv_resident, x.key.shape[2]), width), x.key.dtype)
    if plan.counting is not None:
        for name in ("z", "slope"):
            scratch[name] = pltpu.VMEM((plan.groups, plan.counting.rows, LANES), jnp.float32)
        for name in ("high", "low"):
            scratch[name] = pltpu.VMEM((plan.groups, LANES), jnp.float32)
        for name in ("scores", "positions"):
            scratch[name] = pltpu.VMEM((plan.groups, blocks.block_kv_count, LANES), jnp.float32)
        scratch["limit"] = pltpu.SMEM((plan.groups // plan.groups_side_by_side,), jnp.int32)
        scratch["worklist"] = pltpu.SMEM((2 * blocks.block_kv_count // QUARTER,), jnp.int32)
    if plan.index is not None:
        scratch["lookup_bias"] = pltpu.VMEM((plan.groups, blocks.block_kv_count, LANES), jnp.float32)
    return scratch
