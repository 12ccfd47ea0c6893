"""What the forward and the backward kernel on TPU have in common: plan, operands, scalars, and a query tile's view of them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.blocks import Blocks
from posjax.kernels.tpu_tiles import (
    CALM,
    FEW,
    HASTY,
    LANES,
    LOG2E,
    NN,
    NT,
    OFFSET,
    QUARTER,
    SUBLANES,
    WIDE,
    Counting,
    Extent,
    Rules,
    Window,
    add_exactly,
    cell,
    column,
    fine_product,
    gathered,
    joined,
    positions,
    product,
    spans,
    window,
)
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before compilation; no sizes of batch and heads, which a shard of a mesh has its own of."""

    blocks: Blocks
    rules: Rules
    soft_cap: float | None
    counting: Counting | None
    index: Any  # of a lookup: positions -> place in the table
    uniform: Any  # of a lookup: first and last positions -> whether all pairs have one place
    penalised: bool
    turn_keys: bool  # keys are rotated when they arrive in VMEM
    vmem: int
    interpret: Any

    @property
    def groups(self) -> int:
        return self.blocks.queries // LANES

    @property
    def detailed(self) -> bool:
        return self.counting is not None or self.index is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """A call in the kernel's layout, padded to whole blocks. Letters: I query tiles of t rows, R blocks of resident keys."""

    query: Array  # [B, K, G, T, C]
    key: Array  # [B, K, S, C]
    value: Array  # [B, K, S, V]
    scale: Array  # [1]
    query_positions: Array  # [B or 1, I, t / 128, 128]
    key_positions: Array  # [B or 1, 1, S]
    query_segments: Array | None
    key_segments: Array | None
    counted_query: Array | None  # [B, K, G, T, H], what meets the embedding, where that is not ``query``
    embedding: Array | None  # [K or 1, G or 1, 2, P, H]: of the positions, and the step to the next
    table: Array | None  # [K, G, 1, 128]
    slopes: Array | None  # [K, G, 1, 128]
    query_turn: Array | None  # [B or 1, 2, T, C], cosines and sines
    key_turn: Array | None  # [B or 1, 2, S, C]
    partner: Array | None  # [C, C], which channel turns into which


# Extents, for the scalar unit --------------------------------------------------------------------------------------------


def _extents(positions: Array, segments: Array | None, size: int) -> Array:
    """Flat [B, pieces, 4]: first and last position and segment of every ``size`` tokens."""

    def ends(x: Array) -> list[Array]:
        x = x.reshape(x.shape[0], -1, size)
        return [x.min(-1), x.max(-1)]

    parts = ends(positions.reshape(positions.shape[0], -1))
    parts += ends(segments.reshape(segments.shape[0], -1)) if segments is not None else [jnp.zeros_like(parts[0])] * 2
    batch = max(part.shape[0] for part in parts)
    return jnp.stack([jnp.broadcast_to(part, (batch, part.shape[1])) for part in parts], -1)


def make_scalars(plan: Plan, x: Operands) -> tuple[Array, ...]:
    """What the scalar unit reads: which key tiles a query tile visits, and the extents of tiles, groups and strips."""
    blocks = plan.blocks
    q_tiles = _extents(x.query_positions, x.query_segments, blocks.queries)
    k_tiles = _extents(x.key_positions, x.key_segments, blocks.keys)
    by_queries, by_keys = (Extent(*jnp.moveaxis(e, -1, 0)) for e in (q_tiles, k_tiles))
    live = ~plan.rules.none(Extent(*(e[:, :, None] for e in by_queries)), Extent(*(e[:, None] for e in by_keys)))
    live = jnp.broadcast_to(live, (max(len(q_tiles), len(k_tiles)), q_tiles.shape[1], k_tiles.shape[1]))
    first, last = live.argmax(-1), live.shape[-1] - live[..., ::-1].argmax(-1)
    visits = jnp.stack([first, jnp.where(live.any(-1), last, first)], -1)
    groups = _extents(x.query_positions, x.query_segments, LANES)
    strips = _extents(x.key_positions, x.key_segments, blocks.strip)
    return tuple(a.astype(jnp.int32).reshape(-1) for a in (visits, q_tiles, k_tiles, groups, strips))


class Scalars(NamedTuple):
    """The same as the kernel sees it."""

    visits: Any
    query_tiles: Any
    key_tiles: Any
    query_groups: Any
    key_strips: Any

    def extent(self, which: str, row: Array, index: Array, rows: int) -> Extent:
        ref = getattr(self, which)
        start = (row * (ref.shape[0] // rows // 4) + index) * 4
        return Extent(*(ref[start + n] for n in range(4)))


# Inside of a tile ----------------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Some of a tile's groups of 128 queries: ``count`` from ``first`` on."""

    first: Array | int
    count: int

    @property
    def lanes(self) -> Any:
        return pl.ds(self.first * LANES, self.count * LANES)


def as_row(ref: Any, groups: Groups | None = None) -> Array:
    """[t / 128, 128], or some groups of it, as one lane vector [1, t]."""
    first, count = groups or (0, ref.shape[0])
    return jnp.concatenate([ref[pl.ds(first + n, 1), :] for n in range(count)], axis=1)


def turned(x: Array, turn: Any, partner: Array, back: bool = False) -> Array:
    """x [s, C] rotated by the cosines and sines of ``turn`` [2, s, C], or rotated back; float32."""
    cos, sin = turn[0], turn[1]
    exact = partner.dtype == jnp.float32
    if back:
        return x * cos + fine_product(x * sin, partner, NT, exact)
    return x.astype(jnp.float32) * cos + product(x, partner, NN, exact) * sin


@dataclasses.dataclass
class Passage:
    """The counts of one or two groups of queries on their way through a strip, in pieces of 128 keys.

    Attributes:
      groups: which.
      base: [1, t] int32, the cell that counts are given from.
      now: [1, t], the counts at hand, less base.
      windows: eight cells from base on, for each group.
      back: counts are taken off, from the left; otherwise added, from the right.
      sums: [1, t] for each piece passed, of its gates.
      ends: of each quarter passed the counts with its first and with its last key.
    """

    groups: Groups
    base: Array
    now: Array
    windows: list[Window]
    back: bool
    sums: list[Array] = dataclasses.field(default_factory=list)
    ends: list[Array] = dataclasses.field(default_factory=list)

    def by_group(self) -> list[tuple[Array | int, slice]]:
        """The number of each group and its lanes here."""
        return [(self.groups.first + n, slice(n * LANES, (n + 1) * LANES)) for n in range(self.groups.count)]

    def through(self, later: Array) -> Array:
        """The counts, less base, of a piece whose gates add up to ``later`` [128, t]."""
        self.sums.append(later[:1])
        right = self.now - later[:1] if self.back else self.now
        self.now = right if self.back else right + later[:1]
        inside = later + right
        for at in range(0, LANES, QUARTER):
            self.ends.append((inside[at : at + 1], inside[at + QUARTER - 1 : at + QUARTER]))
        return inside

    def haste(self, counting: Counting) -> Array:
        """[1, 128] of CALM, where queries passed at most ``FEW`` cells in any quarter and seven in all, HASTY, or WIDE, where they
        passed more than eight in all; with a margin for the backward pass, which rounds otherwise."""
        margin = 2.0**-10

        def passed(first: Array, last: Array) -> Array:
            return cell(first + margin) - cell(last - margin)

        first, last = self.ends[-2][0], self.ends[1][1]
        hasty = passed(first, last) >= SUBLANES - 1
        for ends in self.ends:
            hasty |= passed(*ends) > FEW
        wide = (cell(first + margin) >= SUBLANES) & (self.base < counting.last)
        found = jnp.where(wide, WIDE, jnp.where(hasty, HASTY, CALM))
        return functools.reduce(jnp.maximum, jnp.split(found, found.shape[1] // LANES, 1))


def soft(plan: Plan, x: Array) -> Array:
    if plan.soft_cap is None:
        return x
    cap = plan.soft_cap * LOG2E
    return cap * jnp.tanh(x / cap)


def soft_slack(plan: Plan, x: Array) -> Array:
    """The derivative of the soft cap where the capped score is x."""
    return 1.0 - jnp.square(x / (plan.soft_cap * LOG2E))


def masked_or_not(do: Any, whole: Array, here: Array | bool = True) -> None:
    """``do(masked)``, if ``here``, on pairs that all may meet (``whole``) or not."""
    pl.when(whole & here)(lambda: do(False))
    pl.when(~whole & here)(lambda: do(True))


@dataclasses.dataclass
class Step:
    """One query tile of one head as the kernel body sees it: what forward and backward have in common."""

    plan: Plan
    scalars: Scalars
    refs: dict[str, Any]
    row: Array  # of the batch, 0 where rows do not differ
    rows: int
    tile: Array  # the query tile
    key_block: Array  # which resident block of keys

    def __getattr__(self, name: str) -> Any:
        return self.refs[name]

    def query_extent(self) -> Extent:
        return self.scalars.extent("query_tiles", self.row, self.tile, self.rows)

    def key_extent(self, j: Array) -> Extent:
        return self.scalars.extent("key_tiles", self.row, self.first_tile() + j, self.rows)

    def group_extent(self, g: Array) -> Extent:
        return self.scalars.extent("query_groups", self.row, self.tile * self.plan.groups + g, self.rows)

    def strip_extent(self, at: Array) -> Extent:
        strips = self.key.shape[0] // self.plan.blocks.strip
        return self.scalars.extent("key_strips", self.row, self.key_block * strips + at, self.rows)

    def first_tile(self) -> Array:
        return self.key_block * (self.key.shape[0] // self.plan.blocks.keys)

    def visits(self) -> tuple[Array, Array]:
        """The key tiles of this block that the query tile visits, from .. to."""
        held = self.key.shape[0] // self.plan.blocks.keys
        at = (self.row * (self.scalars.visits.shape[0] // self.rows // 2) + self.tile) * 2
        first, last = self.scalars.visits[at], self.scalars.visits[at + 1]
        return jnp.clip(first - self.first_tile(), 0, held), jnp.clip(last - self.first_tile(), 0, held)

    def all_groups(self, ref: Any) -> Array:
        """[t / 128, s, 128] as [s, t]."""
        return jnp.concatenate([ref[g] for g in range(self.plan.groups)], axis=1)

    def by_group(self, ref: Any, x: Array) -> None:
        """[s, t] into [t / 128, s, 128]."""
        for g in range(self.plan.groups):
            ref[g] = x[:, g * LANES : (g + 1) * LANES]

    def passages(self, groups: Groups, back: bool = False) -> list[Passage]:
        """Of two groups of queries each, which fill the matrix unit."""
        made, size, counting = [], 2 if groups.count % 2 == 0 else 1, self.plan.counting
        for start in range(0, groups.count, size):
            two = Groups(groups.first + start, size)
            high, low = as_row(self.high, two), as_row(self.low, two)
            base = (high + low + 2.0**-10).astype(jnp.int32) - (SUBLANES - 2) if back else (high + low).astype(jnp.int32)
            passage = Passage(two, base, (high - base.astype(jnp.float32)) + low - OFFSET, [], back)
            for g, part in passage.by_group():
                passage.windows.append(window(self.z[g], self.slope[g], base[:, part], counting))
            made.append(passage)
        return made

    def leave(self, passages: list[Passage], valid: Array | bool = True) -> None:
        """Moves the counts past a strip, if ``valid``."""
        for passage in passages:
            sums = functools.reduce(jnp.add, passage.sums[::-1] if passage.back else passage.sums)
            sums = jnp.where(valid, -sums if passage.back else sums, 0.0)
            for g, part in passage.by_group():
                row = pl.ds(g, 1)
                self.high[row, :], self.low[row, :] = add_exactly(self.high[row, :], self.low[row, :], sums[:, part])

    def count(self, strip: Array, later: Array, back: bool = False) -> Array:
        """Puts the positions in a strip, whose gates add up to ``later`` [s, t], in their place, and who is to look them up in
        ``self.need``; and moves the counts on past it. The counts kept are those right of the strip, ``back`` those with it.

        Returns:
          The greatest number of cells that a query passes in the strip, a scalar.
        """
        counting, widest = self.plan.counting, jnp.zeros((1, LANES), jnp.int32)
        quarters = [slice(at, at + QUARTER) for at in range(0, later.shape[0], QUARTER)]
        needs: list[list[Array]] = [[] for _ in quarters]
        seen, keys = jnp.zeros((), jnp.int32), self.strip_extent(strip)
        for g in range(self.plan.groups):
            row, sums = pl.ds(g, 1), later[:, g * LANES : (g + 1) * LANES]
            high, low = self.high[row, :], self.low[row, :]
            moved = add_exactly(high, low, -sums[:1] if back else sums[:1])
            received = moved if back else (high, low)
            where = positions(sums + (received[0] + received[1]), counting)
            self.high[row, :], self.low[row, :] = moved
            self.positions[g] = where
            widest = jnp.maximum(widest, spans(where, where.shape[0]))
            for found, quarter in zip(needs, quarters, strict=True):
                many = 1 + (spans(where[quarter], QUARTER) >= SUBLANES).astype(jnp.int32)
                found.append(jnp.where(where[quarter][-1:] >= counting.last, 0, many))
            seen |= jnp.where(self.plan.rules.none(self.group_extent(g), keys), 0, 1 << g)
        for n, found in enumerate(needs):
            most = joined(found, 0).max(1, keepdims=True)  # of each group: nothing, few or many cells to look up
            bit = 1 << jax.lax.broadcasted_iota(jnp.int32, most.shape, 0)
            for many in (0, 1):
                self.need[2 * n + many] = jnp.sum(jnp.where(most == 1 + many, bit, 0)) & seen
        return jnp.max(widest)

    def unsettled_groups(self) -> Array:
        """A bit for each group of queries of which one has not counted up to the last position."""
        short = (self.high[...] + self.low[...] < self.plan.counting.last).astype(jnp.int32)
        group = jax.lax.broadcasted_iota(jnp.int32, short.shape, 0)
        return jnp.sum(short.max(1, keepdims=True) << group[:, :1])

    def by_need(self, add: Any) -> None:
        """Calls ``add(g, at, few)`` for every quarter ``at`` of a strip and every group of queries that sees it with counts there
        before the last position; ``few``: no query passes as many as eight cells."""

        def one(quarter: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
            for many in (0, 1):

                def lowest(groups: Array, few: bool = not many) -> Array:
                    add(31 - jax.lax.clz(groups & -groups), at, few)
                    return groups & (groups - 1)

                jax.lax.while_loop(lambda groups: groups != 0, lowest, self.need[2 * quarter + many])

        jax.lax.fori_loop(0, self.plan.blocks.strip // QUARTER, one, None)

    def last_bias(self) -> Array:
        """What counts past the last position add, [1, t]."""
        return jnp.concatenate([self.z[g, pl.ds(self.plan.counting.last, 1), :] for g in range(self.plan.groups)], axis=1)

    def choose(self, j: Array, fine: Array, plain: Any, detailed: Any) -> None:
        """Calls ``detailed(j, whole)`` on a tile that counts or looks up, ``plain(j, masked)`` on any other."""
        whole = self.plan.rules.all(self.query_extent(), self.key_extent(j))
        if self.plan.detailed:
            pl.when(fine)(lambda: detailed(j, whole))
        masked_or_not(functools.partial(plain, j), whole, ~fine)

    def lookups(self, start: Array, strip: Array) -> Array:
        """What the table adds to a strip, [s, t]."""

        def one_group(g: Array, _: None) -> None:
            queries, keys = self.group_extent(g), self.strip_extent(strip)
            uniform = self.is_uniform(queries, keys)

            @pl.when(uniform)
            def _() -> None:
                found = self.looked_up(jnp.full((SUBLANES, LANES), self.common_index(queries, keys), jnp.int32))
                self.found[g] = jnp.broadcast_to(found[:1], self.found.shape[1:])

            @pl.when(~uniform)
            def _() -> None:
                self.found[g] = self.looked_up(self.index_of(start, self.found.shape[1], g))

        jax.lax.fori_loop(0, self.plan.groups, one_group, None)
        return self.all_groups(self.found)

    def keys(self, start: Array, size: int) -> Array:
        ref = self.turned_key if self.plan.turn_keys else self.key
        return ref[pl.ds(start, size), :]

    def pairs(self, start: Array, size: int, groups: Groups | None = None) -> Array:
        """Which pairs of ``size`` keys and the tile's queries, or some groups of them, may meet, [size, t]."""

        def both(queries: Any, keys: Any) -> tuple[Array, Array]:
            row = as_row(queries, groups)
            return row, column(keys[:, pl.ds(start, size)], row.shape[1])

        segments = both(self.query_segments, self.key_segments) if self.plan.rules.segmented else (None, None)
        return self.plan.rules.pairs(*both(self.query_positions, self.key_positions), *segments)

    def penalty(self, start: Array, size: int, groups: Groups | None = None) -> Array:
        row = as_row(self.query_positions, groups)
        distance = row - column(self.key_positions[:, pl.ds(start, size)], row.shape[1])
        slope = jnp.tile(self.slopes[...] * -LOG2E, (1, row.shape[1] // LANES))
        return slope * jnp.abs(distance).astype(jnp.float32)

    def looked_up(self, index: Array) -> Array:
        """The table's entries at [s, 128]."""
        table = jnp.broadcast_to(self.table[...] * LOG2E, (SUBLANES, LANES))
        rows = [gathered(table, index[at : at + SUBLANES], 1) for at in range(0, index.shape[0], SUBLANES)]
        return jnp.concatenate(rows, axis=0)

    def index_of(self, start: Array, size: int, group: Array) -> Array:
        keys = column(self.key_positions[:, pl.ds(start, size)], LANES)
        return self.plan.index(jnp.broadcast_to(self.query_positions[pl.ds(group, 1), :], keys.shape), keys)

    def is_uniform(self, queries: Extent, keys: Extent) -> Array:
        return self.plan.uniform(queries.first, queries.last, keys.first, keys.last)

    def common_index(self, queries: Extent, keys: Extent) -> Array:
        return self.plan.index(queries.first, keys.last)

    def constant(self, queries: Extent, keys: Extent) -> Array | None:
        """The bias that is one number a row, [1, t]: a count past the last position, a distance past all others."""
        total = None
        if self.plan.counting is not None:
            total = self.last_bias()
        if self.plan.index is not None:
            found = self.looked_up(jnp.full((SUBLANES, LANES), self.common_index(queries, keys), jnp.int32))[:1]
            found = jnp.tile(found, (1, self.plan.groups))
            total = found if total is None else total + found
        return total

    def prepare_queries(self) -> None:
        """Rotates the query tile and multiplies it with the embedding, once for all its key tiles."""
        raw = self.query[...]
        if self.query_turn is not None:
            self.turned_query[...] = turned(raw, self.query_turn, self.partner[...]).astype(raw.dtype)
        if self.plan.counting is not None:
            counted = raw if self.counted_query is None else self.counted_query[...]
            for n, ref in enumerate((self.z, self.slope)):
                self.by_group(ref, fine_product(self.embedding[n], counted, NT, self.plan.counting.exact) * LOG2E)

    def queries(self, groups: Groups | None = None) -> Array:
        ref = self.query if self.query_turn is None else self.turned_query
        return ref[...] if groups is None else ref[groups.lanes, :]

    def prepare_keys(self) -> None:
        """Rotates the keys in VMEM, once for all query tiles."""
        size = self.plan.blocks.keys

        def one(n: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(n * size, size), size)
            raw = self.key[at, :]
            turn = self.key_turn[0, at, :], self.key_turn[1, at, :]
            self.turned_key[at, :] = turned(raw, turn, self.partner[...]).astype(raw.dtype)

        jax.lax.fori_loop(0, self.key.shape[0] // size, one, None)


OPTIONAL = tuple(field.name for field in dataclasses.fields(Operands) if "None" in str(field.type))


def blocks_of(first: Array, last: Array, held: int) -> tuple[Array, Array]:
    """The first and the last resident block that key tiles first .. last - 1 lie in."""
    return jax.lax.div(first, np.int32(held)), jax.lax.div(jnp.maximum(last - 1, first), np.int32(held))  # // asks for the chip


def inputs_of(plan: Plan, x: Operands, key_block: Any) -> tuple[list[str], list[Array], list[pl.BlockSpec]]:
    """Names, arrays and blocks of the operands; ``key_block(b, i, r, *scalars)`` gives the block of resident keys."""
    blocks = plan.blocks
    held = min(blocks.resident, x.key.shape[2])
    made: list[tuple[str, Array, tuple, Any]] = []

    def varies(array: Array, b: Any) -> Any:
        return b if array.shape[0] > 1 else 0

    def add(name: str, array: Array | None, shape: tuple, index: Any) -> None:
        if array is not None:
            made.append((name, array, shape, index))

    def by_query(b, k, g, i, r, *scalars):
        return b, k, g, i, 0

    def by_key(b, k, g, i, r, *scalars):
        return b, k, key_block(b, i, r, *scalars), 0

    def flat(array: Array) -> Any:
        return lambda b, k, g, i, r, *scalars: (varies(array, b), 0, key_block(b, i, r, *scalars))

    def tiles(array: Array) -> Any:
        return lambda b, k, g, i, r, *scalars: (varies(array, b), i, 0, 0)

    none = (None,) * 3
    add("query", x.query, (*none, blocks.queries, x.query.shape[-1]), by_query)
    add("key", x.key, (None, None, held, x.key.shape[-1]), by_key)
    add("value", x.value, (None, None, held, x.value.shape[-1]), by_key)
    for name in ("query_positions", "query_segments"):
        array = getattr(x, name)
        add(name, array, (None, None, plan.groups, LANES), array is not None and tiles(array))
    for name in ("key_positions", "key_segments"):
        array = getattr(x, name)
        add(name, array, (None, 1, held), array is not None and flat(array))
    if x.counted_query is not None:
        add("counted_query", x.counted_query, (*none, blocks.queries, x.counted_query.shape[-1]), by_query)
    if x.embedding is not None:
        own = x.embedding.shape[0] > 1 or x.embedding.shape[1] > 1
        head = (lambda b, k, g, *_: (k, g, 0, 0, 0)) if own else (lambda *_: (0,) * 5)
        add("embedding", x.embedding, (None, None, *x.embedding.shape[2:]), head)
    for name in ("table", "slopes"):
        add(name, getattr(x, name), (None, None, 1, LANES), lambda b, k, g, *_: (k, g, 0, 0))
    if x.query_turn is not None:
        turn = x.query_turn
        add("query_turn", turn, (None, 2, blocks.queries, turn.shape[-1]), lambda b, k, g, i, *_: (varies(turn, b), 0, i, 0))
        if plan.turn_keys:
            add(
                "key_turn",
                x.key_turn,
                (None, 2, held, turn.shape[-1]),
                lambda b, k, g, i, r, *scalars: (varies(x.key_turn, b), 0, key_block(b, i, r, *scalars), 0),
            )
        add("partner", x.partner, x.partner.shape, lambda *_: (0, 0))
    specs = [pl.BlockSpec(shape, index) for _, _, shape, index in made]
    return [name for name, *_ in made], [array for _, array, *_ in made], specs


def scratch_of(plan: Plan, x: Operands) -> dict[str, Any]:
    """What both passes keep in VMEM besides their operands."""
    blocks, width = plan.blocks, x.query.shape[-1]
    made = {}
    if x.query_turn is not None:
        made["turned_query"] = pltpu.VMEM((blocks.queries, width), x.query.dtype)
    if plan.turn_keys:
        made["turned_key"] = pltpu.VMEM((min(blocks.resident, x.key.shape[2]), width), x.key.dtype)
    if plan.counting is not None:
        for name in ("z", "slope"):
            made[name] = pltpu.VMEM((plan.groups, plan.counting.rows, LANES), jnp.float32)
        for name in ("high", "low"):
            made[name] = pltpu.VMEM((plan.groups, LANES), jnp.float32)
        for name in ("scores", "positions"):
            made[name] = pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32)
        made["unsettled"] = pltpu.SMEM((1,), jnp.int32)
        made["need"] = pltpu.SMEM((2 * blocks.strip // QUARTER,), jnp.int32)
    if plan.index is not None:
        made["found"] = pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32)
    return made
