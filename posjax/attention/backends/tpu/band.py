"""The counting region: the keys left of the diagonal that CoPE counts, and the running counts of the queries.

A pair of query groups is two groups of 128 queries, or one where a tile has an odd number of groups. In each counting step, every
pair processes one strip of keys, starting at the rightmost strip that its mask allows. All pairs are then equally far from the
diagonal, and need equally many steps where their gates are alike. The kernel stores the strip at which a pair stopped; the keys to
its left are processed in plain key tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from posjax.attention.backends.constants import MASK_VALUE
from posjax.attention.backends.tpu.step import Groups, Step, as_row
from posjax.attention.backends.tpu.tiles import (
    LANES,
    MEDIUM,
    NARROW,
    OFFSET,
    QUARTER,
    SUBLANES,
    WIDE,
    Window,
    cell,
    concatenate,
    doubled_gates,
    positions,
    spans,
    two_sum,
    window,
)
from posjax.typing import Array


class StripCursor(NamedTuple):
    """Holds the strip that a pair of query groups processes in a step.

    Attributes:
      groups: the query groups.
      strip: index of the strip in the resident block; arbitrary where ``is_active`` is False.
      is_active: whether there is a strip in this step and in this block.
      is_full: whether the mask allows all pairs of the strip.
    """

    groups: Groups
    strip: Array
    is_active: Array
    is_full: Array


class WindowedCounts(NamedTuple):
    """Holds the counts of a pair of query groups at 128 keys, relative to windows of eight cells.

    Attributes:
      base: [1, t] int32, the first cell of the windows.
      inside: [128, t], the counts minus base and ``OFFSET``.
      windows: the eight cells from base on, for each group.
    """

    base: Array
    inside: Array
    windows: list[Window]

    def cell_span(self, last: int) -> Array:
        """Classifies how many cells queries crossed: [1, 128] of NARROW, MEDIUM or WIDE.

        NARROW is at most six cells in these 128 keys, WIDE more than seven since the start of the window. A margin covers the
        backward pass, which rounds differently.
        """
        margin = 2.0**-10
        medium = cell(self.inside[:1] + margin) - cell(self.inside[LANES - 1 :] - margin) >= SUBLANES - 1
        wide = (cell(self.inside[:1] + margin) >= SUBLANES) & (self.base < last)
        span = jnp.where(wide, WIDE, jnp.where(medium, MEDIUM, NARROW))
        return functools.reduce(jnp.maximum, jnp.split(span, span.shape[1] // LANES, 1))


def strip_of(cursors: list[StripCursor]) -> Callable[[Array], Array]:
    """Returns a function from the index of a query group to its strip."""

    def strip_of_group(g: Array) -> Array:
        pair = jax.lax.div(g, np.int32(cursors[0].groups.count))
        return functools.reduce(
            lambda strip, n: jnp.where(pair == n, cursors[n].strip, strip), range(len(cursors)), cursors[0].strip
        )

    return strip_of_group


def bits(flags: list[Array]) -> Array:
    """Packs flags [1, 128] into an integer: bit n is 1 if any entry of ``flags[n]`` is set."""
    is_set = concatenate([flag.astype(jnp.int32) for flag in flags], 0).max(1, keepdims=True)
    return jnp.sum(jnp.where(is_set > 0, 1 << jax.lax.broadcasted_iota(jnp.int32, is_set.shape, 0), 0), dtype=jnp.int32)


def for_bits(bitset: Array, body: Any) -> None:
    """Calls ``body(n)`` for the index n of each bit that is set."""

    def clear_lowest(remaining: Array) -> Array:
        body(31 - jax.lax.clz(remaining & -remaining))
        return remaining & (remaining - 1)

    jax.lax.while_loop(lambda remaining: remaining != 0, clear_lowest, bitset)


def for_each(flags: list[list[Array]], body: Any) -> None:
    """Calls ``body(row, n)`` where any entry of ``flags[row][n]`` [1, 128] is set; a row has at most 16 flags."""
    size, rows = len(flags[0]), 32 // len(flags[0])
    for first in range(0, len(flags), rows):
        bitsets = [bits(row) << (n * size) for n, row in enumerate(flags[first : first + rows])]

        def one(n: Array, first: int = first) -> None:
            row = jax.lax.div(n, np.int32(size))
            body(first + row, n - row * size)

        for_bits(functools.reduce(jnp.bitwise_or, bitsets), one)


@dataclasses.dataclass
class QueryGroupState:
    """Holds the running counts of a pair of query groups within a strip, in pieces of 128 keys.

    Attributes:
      step: the query tile, with the tables.
      cursor: the strip.
      is_backward: True subtracts gates from the counts, from the left; False adds them, from the right.
      high, low: [1, t]; their sum is the counts where the walk enters the strip, and ``advance`` updates it.
      base, offset: [1, t]; their sum is the current counts minus ``OFFSET`` in ``advance_in_window``.
      windows: the current windows, one for each group.
      gate_sums: [1, t] for each processed piece, the sum of its gates.
      gathered: [1, t], in the backward pass: the sum of the gradients of the counts at all keys to the left.
    """

    step: Step
    cursor: StripCursor
    is_backward: bool
    high: Array
    low: Array
    base: Array = dataclasses.field(init=False)
    offset: Array | None = None
    windows: list[Window] = dataclasses.field(default_factory=list)
    gate_sums: list[Array] = dataclasses.field(default_factory=list)
    gathered: Array = dataclasses.field(init=False)

    def advance(self, suffix_sums: Array) -> Array:
        """Returns the counts [128, t] of a piece with the gate sums ``suffix_sums``, and advances past the piece."""
        counts_before = self.high + self.low
        self.high, self.low = two_sum(self.high, self.low, -suffix_sums[:1] if self.is_backward else suffix_sums[:1])
        self.gate_sums.append(suffix_sums[:1])
        return suffix_sums + (self.high + self.low if self.is_backward else counts_before)

    def advance_in_window(self, suffix_sums: Array) -> WindowedCounts:
        """Does the same as ``advance``, but returns counts relative to windows of eight cells."""
        if self.offset is None:
            self.base = self.high.astype(jnp.int32)
            self.offset = (self.high - self.base.astype(jnp.float32)) + self.low - OFFSET
        if self.is_backward or not self.gate_sums:  # the forward pass uses one window for all pieces
            shift = cell(self.offset + 2.0**-10) - (SUBLANES - 2) if self.is_backward else cell(self.offset)
            self.base, self.offset = self.base + shift.astype(jnp.int32), self.offset - shift
            z, slope, counting = self.step.z, self.step.slope, self.step.counting
            self.windows = [window(z[g], slope[g], self.base[:, part], counting) for g, part in self.cursor.groups.lane_slices()]
        right_offset = self.offset - suffix_sums[:1] if self.is_backward else self.offset
        self.offset = right_offset if self.is_backward else right_offset + suffix_sums[:1]
        self.gate_sums.append(suffix_sums[:1])
        return WindowedCounts(self.base, suffix_sums + right_offset, self.windows)


@dataclasses.dataclass
class StripPiece:
    """Holds 128 keys of the strip of a pair of query groups, and the values that the stages of a counting step compute for them.

    Attributes:
      state: the running counts of the pair, which the pieces of its strip share.
      index: index of the piece in the strip.
      start: index of its first key in the resident block.
      logits: [128, t], the scores before any bias.
      gates: [128, t], ``doubled_gates`` of the logits.
      counts: the counts, where a step looks up their biases in windows.
    """

    state: QueryGroupState
    index: int
    start: Array = dataclasses.field(init=False)
    logits: Array = dataclasses.field(init=False)
    gates: Array = dataclasses.field(init=False)
    counts: WindowedCounts = dataclasses.field(init=False)

    @property
    def groups(self) -> Groups:
        return self.state.cursor.groups

    @property
    def rows(self) -> Any:
        """Returns the keys' slice of a buffer that holds a strip."""
        return pl.ds(self.index * LANES, LANES)

    def locate(self) -> None:
        """Computes ``start``."""
        self.start = pl.multiple_of(self.state.step.start_of(self.state.cursor.strip) + self.index * LANES, LANES)

    def compute_gates(self, logits: Array, masked: bool) -> None:
        """Stores scores [128, t] and computes the gates; ``masked`` applies the mask, which sets gates to zero."""
        s, cursor = self.state.step, self.state.cursor
        if masked:
            logits = jnp.where(s.pairs(self.start, LANES, cursor.groups, cursor.is_active), logits, MASK_VALUE)
        self.logits, self.gates = logits, doubled_gates(logits, s.counting.exact)


@dataclasses.dataclass
class CountingRegion:
    """Holds the part of a query tile's counting region that lies in the resident block of keys.

    Attributes:
      step: the query tile.
      first_strip: index of a pair of query groups -> the leftmost strip that it may count.
      is_backward: True subtracts gates from the counts, from the left; False adds them, from the right.
    """

    step: Step
    first_strip: Callable[[Any], Array]
    is_backward: bool = False

    @property
    def num_pairs(self) -> int:
        return self.step.plan.groups // self.step.plan.groups_side_by_side

    def visible_strips(self, a: Array | int) -> list[Array]:
        """Returns the first strip that the mask allows for pair a of query groups, and one past the last."""
        return self.step.entry("visible_strips", self.step.tile * self.num_pairs + a)

    def step_range(self) -> tuple[Array, Array]:
        """Returns the range (begin, end) of steps in which some pair of query groups may have a strip in this block."""
        begin, strips = self.step.key_block * self.step.strips, self.step.strips
        last = [self.visible_strips(a)[1] for a in range(self.num_pairs)]
        first = functools.reduce(jnp.minimum, [n - (begin + strips) for n in last])
        end = functools.reduce(jnp.maximum, [n - jnp.maximum(self.first_strip(a), begin) for a, n in enumerate(last)])
        return jnp.maximum(first, 0), end

    def cursor(self, n: Array, a: Array | int) -> StripCursor:
        """Returns the strip of pair a of query groups in step n."""
        s, size = self.step, self.step.plan.groups_side_by_side
        strip = self.visible_strips(a)[1] - 1 - n
        is_active = strip >= self.first_strip(a)
        strip = strip - s.key_block * s.strips
        is_active &= (strip >= 0) & (strip < s.strips)
        strip = jnp.clip(strip, 0, s.strips - 1)
        is_full = is_active
        for g in range(size):
            is_full &= s.plan.rules.all(s.group_extent(a * size + g), s.strip_extent(strip))
        return StripCursor(Groups(a * size, size), strip, is_active, is_full)

    def cursors(self, n: Array) -> list[StripCursor]:
        return [self.cursor(n, a) for a in range(self.num_pairs)]

    def load_state(self, cursor: StripCursor) -> QueryGroupState:
        """Returns the counts of a pair of query groups at the start of its strip."""
        high, low = (as_row(ref, cursor.groups) for ref in (self.step.high, self.step.low))
        return QueryGroupState(self.step, cursor, self.is_backward, high, low)

    def store_counts(self, states: list[QueryGroupState], valid: Array | bool = True) -> None:
        """Adds the gates of the processed strips to the stored counts, or subtracts them if ``is_backward``; only if ``valid``."""
        high, low = self.step.high, self.step.low
        for state in states:
            gate_sums = functools.reduce(jnp.add, state.gate_sums[::-1] if state.is_backward else state.gate_sums)
            gate_sums = jnp.where(valid, -gate_sums if state.is_backward else gate_sums, 0.0)
            for g, part in state.cursor.groups.lane_slices():
                row = pl.ds(g, 1)
                high[row, :], low[row, :] = two_sum(high[row, :], low[row, :], gate_sums[:, part])

    def has_next(self, n: Array) -> Array:
        """Returns whether queries with unsaturated counts have a strip in step n or later."""
        unsaturated, begin, size = self.unsaturated(), self.step.key_block * self.step.strips, self.step.plan.groups_side_by_side
        has_next = jnp.zeros((), bool)
        for a in range(self.num_pairs):
            mask = ((1 << size) - 1) << (a * size)
            has_next |= (self.visible_strips(a)[1] - 1 - n >= jnp.maximum(self.first_strip(a), begin)) & (unsaturated & mask != 0)
        return has_next

    def unsaturated(self) -> Array:
        """Returns an integer with a bit for each query group, 1 if a count of the group is below the last position."""
        s = self.step
        return bits([s.high[...] + s.low[...] < s.counting.last])

    def for_each_gather(self, body: Any) -> None:
        """Calls ``body(g, at, few)`` for each entry of the work-list: query group g and the slice ``at`` of 64 keys of its strip.

        ``few`` is True if every query crosses fewer than eight cells there.
        """

        def one_quarter(quarter: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
            for many in (0, 1):
                for_bits(self.step.worklist[2 * quarter + many], lambda g, few=not many: body(g, at, few))

        jax.lax.fori_loop(0, self.step.plan.blocks.block_kv_count // QUARTER, one_quarter, None)


@dataclasses.dataclass
class GatherWorklist:
    """Lists the gathers of a step: for each ``QUARTER`` (64 keys) of the strips, the query groups with unsaturated counts.

    Attributes:
      region: the counting region.
      groups: (quarter, group) -> [1, 128], 0 if all counts are saturated, 1 if few and 2 if many (eight or more) cells are crossed.
      ends: first group of a pair -> the cells of the first and last key of each piece, [1, t].
    """

    region: CountingRegion
    groups: dict[tuple[int, Array | int], Array] = dataclasses.field(default_factory=dict)
    ends: dict[Array | int, list[Array]] = dataclasses.field(default_factory=dict)

    def add(self, cursor: StripCursor, index: int, counts: Array) -> None:
        """Stores the positions of piece ``index`` (128 keys) of a strip, and adds the piece to the list."""
        s, last = self.region.step, self.region.step.counting.last
        clamped = positions(counts, s.counting)
        ends = self.ends.setdefault(cursor.groups.first, [])
        ends += [clamped[:1].astype(jnp.int32), clamped[-1:].astype(jnp.int32)]
        for g, part in cursor.groups.lane_slices():
            s.positions[g, pl.ds(index * LANES, LANES), :] = clamped[:, part]
            for at in range(0, LANES, QUARTER):
                quarter = clamped[at : at + QUARTER, part]
                many = 1 + (spans(quarter) >= SUBLANES).astype(jnp.int32)
                self.groups[(index * LANES + at) // QUARTER, g] = jnp.where(quarter[-1:] >= last, 0, many)

    def write(self, cursors: list[StripCursor]) -> Array:
        """Writes the list to SMEM for ``for_each_gather``.

        Returns:
          The greatest number of cells that a query crosses in the step, a scalar.
        """
        s, visible = self.region.step, jnp.zeros((), jnp.int32)
        for cursor in cursors:
            for g, _ in cursor.groups.lane_slices():
                is_masked = s.plan.rules.none(s.group_extent(g), s.strip_extent(cursor.strip))
                visible |= jnp.where(cursor.is_active & ~is_masked, 1 << g, 0)
        for n in range(s.plan.blocks.block_kv_count // QUARTER):
            kinds = [self.groups[n, g] for g in range(s.plan.groups)]
            many = bits([kind > 1 for kind in kinds]) & visible
            s.worklist[2 * n], s.worklist[2 * n + 1] = (bits(kinds) & visible) ^ many, many
        cells = [functools.reduce(jnp.maximum, ends) - functools.reduce(jnp.minimum, ends) for ends in self.ends.values()]
        return jnp.max(concatenate(cells, 1))
