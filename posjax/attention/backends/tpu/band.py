"""The counting region: the keys left of the diagonal that CoPE counts, and the running counts of the queries.

A pair of query groups (``passage`` in the code) is two groups of 128 queries, or one where a tile has an odd number of groups. In
each counting step, every pair processes one strip of keys, starting at the rightmost strip that its mask allows. All pairs are then
equally far from the diagonal, and need equally many steps where their gates are alike. The kernel stores the strip at which a pair
stopped; the keys to its left are processed in plain key tiles.
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
    doubled_gates,
    joined,
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
      strip: index of the strip in the resident block; arbitrary where ``here`` is False.
      here: whether there is a strip in this step and in this block.
      whole: whether the mask allows all pairs of the strip.
    """

    groups: Groups
    strip: Array
    here: Array
    whole: Array


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
        found = jnp.where(wide, WIDE, jnp.where(medium, MEDIUM, NARROW))
        return functools.reduce(jnp.maximum, jnp.split(found, found.shape[1] // LANES, 1))


def strip_of(spots: list[StripCursor]) -> Callable[[Array], Array]:
    """Returns a function from the index of a query group to its strip."""

    def find(g: Array) -> Array:
        a = jax.lax.div(g, np.int32(spots[0].groups.count))
        return functools.reduce(lambda found, n: jnp.where(a == n, spots[n].strip, found), range(len(spots)), spots[0].strip)

    return find


def bits(flags: list[Array]) -> Array:
    """Packs flags [1, 128] into an integer: bit n is 1 if any entry of ``flags[n]`` is set."""
    most = joined([flag.astype(jnp.int32) for flag in flags], 0).max(1, keepdims=True)
    return jnp.sum(jnp.where(most > 0, 1 << jax.lax.broadcasted_iota(jnp.int32, most.shape, 0), 0))


def for_bits(found: Array, do: Any) -> None:
    """Calls ``do(n)`` for the index n of each bit that is set."""

    def lowest(left: Array) -> Array:
        do(31 - jax.lax.clz(left & -left))
        return left & (left - 1)

    jax.lax.while_loop(lambda left: left != 0, lowest, found)


def for_each(flags: list[list[Array]], do: Any) -> None:
    """Calls ``do(row, n)`` where any entry of ``flags[row][n]`` [1, 128] is set; a row has at most 16 flags."""
    size, rows = len(flags[0]), 32 // len(flags[0])
    for first in range(0, len(flags), rows):
        found = [bits(row) << (n * size) for n, row in enumerate(flags[first : first + rows])]

        def one(n: Array, first: int = first) -> None:
            row = jax.lax.div(n, np.int32(size))
            do(first + row, n - row * size)

        for_bits(functools.reduce(jnp.bitwise_or, found), one)


@dataclasses.dataclass
class QueryGroupState:
    """Holds the running counts of a pair of query groups within a strip, in pieces of 128 keys.

    Attributes:
      step: the query tile, with the tables.
      spot: the strip.
      back: True subtracts gates from the counts, from the left; False adds them, from the right.
      high, low: [1, t]; their sum is the counts where the walk enters the strip, and ``past`` updates it.
      base, now: [1, t]; their sum is the current counts minus ``OFFSET`` in ``through``.
      windows: the current windows, one for each group.
      sums: [1, t] for each processed piece, the sum of its gates.
      gathered: [1, t], in the backward pass: the sum of the gradients of the counts at all keys to the left.
    """

    step: Step
    spot: StripCursor
    back: bool
    high: Array
    low: Array
    base: Array | None = None
    now: Array | None = None
    windows: list[Window] = dataclasses.field(default_factory=list)
    sums: list[Array] = dataclasses.field(default_factory=list)
    gathered: Array | None = None

    def past(self, later: Array) -> Array:
        """Returns the counts [128, t] of a piece with the gate sums ``later``, and advances past the piece."""
        before = self.high + self.low
        self.high, self.low = two_sum(self.high, self.low, -later[:1] if self.back else later[:1])
        self.sums.append(later[:1])
        return later + (self.high + self.low if self.back else before)

    def through(self, later: Array) -> WindowedCounts:
        """Does the same as ``past``, but returns counts relative to windows of eight cells."""
        if self.now is None:
            self.base = self.high.astype(jnp.int32)
            self.now = (self.high - self.base.astype(jnp.float32)) + self.low - OFFSET
        if self.back or not self.sums:  # the forward pass uses one window for all pieces
            cells = cell(self.now + 2.0**-10) - (SUBLANES - 2) if self.back else cell(self.now)
            self.base, self.now = self.base + cells.astype(jnp.int32), self.now - cells
            z, slope, counting = self.step.z, self.step.slope, self.step.plan.counting
            self.windows = [window(z[g], slope[g], self.base[:, part], counting) for g, part in self.spot.groups.apart()]
        right = self.now - later[:1] if self.back else self.now
        self.now = right if self.back else right + later[:1]
        self.sums.append(later[:1])
        return WindowedCounts(self.base, later + right, self.windows)


@dataclasses.dataclass
class StripPiece:
    """Holds 128 keys of the strip of a pair of query groups, and the values that the stages of a counting step compute for them.

    Attributes:
      passage: the running counts of the pair, which the pieces of its strip share.
      half: index of the piece in the strip.
      start: index of its first key in the resident block.
      logits: [128, t], the scores before any bias.
      gates: [128, t], ``doubled_gates`` of the logits.
      counts: the counts, where a step looks up their biases in windows.
    """

    passage: QueryGroupState
    half: int
    start: Array | None = None
    logits: Array | None = None
    gates: Array | None = None
    counts: WindowedCounts | None = None

    @property
    def groups(self) -> Groups:
        return self.passage.spot.groups

    @property
    def rows(self) -> Any:
        """Returns the keys' slice of a buffer that holds a strip."""
        return pl.ds(self.half * LANES, LANES)

    def locate(self) -> None:
        """Computes ``start``."""
        self.start = pl.multiple_of(self.passage.step.start_of(self.passage.spot.strip) + self.half * LANES, LANES)

    def open_gates(self, logits: Array, masked: bool) -> None:
        """Stores scores [128, t] and computes the gates; ``masked`` applies the mask, which sets gates to zero."""
        s, spot = self.passage.step, self.passage.spot
        if masked:
            logits = jnp.where(s.pairs(self.start, LANES, spot.groups, spot.here), logits, MASK_VALUE)
        self.logits, self.gates = logits, doubled_gates(logits, s.plan.counting.exact)


@dataclasses.dataclass
class CountingRegion:
    """Holds the part of a query tile's counting region that lies in the resident block of keys.

    Attributes:
      step: the query tile.
      lowest: index of a pair of query groups -> the leftmost strip that it may count.
      back: True subtracts gates from the counts, from the left; False adds them, from the right.
    """

    step: Step
    lowest: Callable[[Any], Array]
    back: bool = False

    @property
    def passages(self) -> int:
        return self.step.plan.groups // self.step.plan.groups_side_by_side

    def seen(self, a: Array | int) -> list[Array]:
        """Returns the first strip that the mask allows for pair a of query groups, and one past the last."""
        return self.step.entry("bands", self.step.tile * self.passages + a)

    def steps(self) -> tuple[Array, Array]:
        """Returns the range (begin, end) of steps in which some pair of query groups may have a strip in this block."""
        begins, strips = self.step.key_block * self.step.strips, self.step.strips
        last = [self.seen(a)[1] for a in range(self.passages)]
        first = functools.reduce(jnp.minimum, [n - (begins + strips) for n in last])
        end = functools.reduce(jnp.maximum, [n - jnp.maximum(self.lowest(a), begins) for a, n in enumerate(last)])
        return jnp.maximum(first, 0), end

    def spot(self, n: Array, a: Array | int) -> StripCursor:
        """Returns the strip of pair a of query groups in step n."""
        s, size = self.step, self.step.plan.groups_side_by_side
        strip = self.seen(a)[1] - 1 - n
        here = strip >= self.lowest(a)
        strip = strip - s.key_block * s.strips
        here &= (strip >= 0) & (strip < s.strips)
        strip = jnp.clip(strip, 0, s.strips - 1)
        whole = here
        for g in range(size):
            whole &= s.plan.rules.all(s.group_extent(a * size + g), s.strip_extent(strip))
        return StripCursor(Groups(a * size, size), strip, here, whole)

    def spots(self, n: Array) -> list[StripCursor]:
        return [self.spot(n, a) for a in range(self.passages)]

    def passage(self, spot: StripCursor) -> QueryGroupState:
        """Returns the counts of a pair of query groups at the start of its strip."""
        return QueryGroupState(self.step, spot, self.back, *(as_row(ref, spot.groups) for ref in (self.step.high, self.step.low)))

    def leave(self, passages: list[QueryGroupState], valid: Array | bool = True) -> None:
        """Adds the gates of the processed strips to the stored counts, or subtracts them if ``back``; only if ``valid``."""
        high, low = self.step.high, self.step.low
        for passage in passages:
            sums = functools.reduce(jnp.add, passage.sums[::-1] if passage.back else passage.sums)
            sums = jnp.where(valid, -sums if passage.back else sums, 0.0)
            for g, part in passage.spot.groups.apart():
                row = pl.ds(g, 1)
                high[row, :], low[row, :] = two_sum(high[row, :], low[row, :], sums[:, part])

    def goes_on(self, n: Array) -> Array:
        """Returns whether queries with unsaturated counts have a strip in step n or later."""
        unsaturated, begins, size = self.unsaturated(), self.step.key_block * self.step.strips, self.step.plan.groups_side_by_side
        found = jnp.zeros((), bool)
        for a in range(self.passages):
            own = ((1 << size) - 1) << (a * size)
            found |= (self.seen(a)[1] - 1 - n >= jnp.maximum(self.lowest(a), begins)) & (unsaturated & own != 0)
        return found

    def unsaturated(self) -> Array:
        """Returns an integer with a bit for each query group, 1 if a count of the group is below the last position."""
        s = self.step
        return bits([s.high[...] + s.low[...] < s.plan.counting.last])

    def by_need(self, add: Any) -> None:
        """Calls ``add(g, at, few)`` for each entry of the work-list: query group g and the slice ``at`` of 64 keys of its strip.

        ``few`` is True if every query crosses fewer than eight cells there.
        """

        def one(quarter: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
            for many in (0, 1):
                for_bits(self.step.need[2 * quarter + many], lambda g, few=not many: add(g, at, few))

        jax.lax.fori_loop(0, self.step.plan.blocks.strip // QUARTER, one, None)


@dataclasses.dataclass
class GatherWorklist:
    """Lists the gathers of a step: for each ``QUARTER`` (64 keys) of the strips, the query groups with unsaturated counts.

    Attributes:
      band: the counting region.
      groups: (quarter, group) -> [1, 128], 0 if all counts are saturated, 1 if few and 2 if many (eight or more) cells are crossed.
      ends: first group of a pair -> the cells of the first and last key of each piece, [1, t].
    """

    band: CountingRegion
    groups: dict[tuple[int, int], Array] = dataclasses.field(default_factory=dict)
    ends: dict[int, list[Array]] = dataclasses.field(default_factory=dict)

    def note(self, spot: StripCursor, half: int, counts: Array) -> None:
        """Stores the positions of piece ``half`` (128 keys) of a strip, and adds the piece to the list."""
        s, last = self.band.step, self.band.step.plan.counting.last
        where = positions(counts, s.plan.counting)
        ends = self.ends.setdefault(spot.groups.first, [])
        ends += [where[:1].astype(jnp.int32), where[-1:].astype(jnp.int32)]
        for g, part in spot.groups.apart():
            s.positions[g, pl.ds(half * LANES, LANES), :] = where[:, part]
            for at in range(0, LANES, QUARTER):
                quarter = where[at : at + QUARTER, part]
                many = 1 + (spans(quarter) >= SUBLANES).astype(jnp.int32)
                self.groups[(half * LANES + at) // QUARTER, g] = jnp.where(quarter[-1:] >= last, 0, many)

    def close(self, spots: list[StripCursor]) -> Array:
        """Writes the list to SMEM for ``by_need``.

        Returns:
          The greatest number of cells that a query crosses in the step, a scalar.
        """
        s, seen = self.band.step, jnp.zeros((), jnp.int32)
        for spot in spots:
            for g, _ in spot.groups.apart():
                unseen = s.plan.rules.none(s.group_extent(g), s.strip_extent(spot.strip))
                seen |= jnp.where(spot.here & ~unseen, 1 << g, 0)
        for n in range(s.plan.blocks.strip // QUARTER):
            own = [self.groups[n, g] for g in range(s.plan.groups)]
            many = bits([need > 1 for need in own]) & seen
            s.need[2 * n], s.need[2 * n + 1] = (bits(own) & seen) ^ many, many
        cells = [functools.reduce(jnp.maximum, ends) - functools.reduce(jnp.minimum, ends) for ends in self.ends.values()]
        return jnp.max(joined(cells, 1))
