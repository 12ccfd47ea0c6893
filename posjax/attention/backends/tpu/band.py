"""The band of keys in which queries count, left of each of them, and the counts on their way through it.

A passage is two groups of 128 queries. In every step each passage of a query tile counts a strip of its own, first the last one
that it sees: so all are equally far from the diagonal, and where gates are alike all are done after as many steps. What lies left
of where a passage stopped, which the kernel notes down, is for plain tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

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
    joined,
    positions,
    spans,
    two_sum,
    window,
)
from posjax.typing import Array


class StripCursor(NamedTuple):
    """Where a passage is in a step.

    Attributes:
      groups: its queries.
      strip: of the resident block; any where ``here`` is not.
      here: it has a strip in this step, and in this block.
      whole: all pairs may meet.
    """

    groups: Groups
    strip: Array
    here: Array
    whole: Array


class Piece(NamedTuple):
    """The counts of a passage with 128 keys.

    Attributes:
      base: [1, t] int32, the cell that counts are given from.
      inside: [128, t], the counts less base.
      windows: eight cells from base on, for each group.
    """

    base: Array
    inside: Array
    windows: list[Window]

    def cell_span(self, last: int) -> Array:
        """[1, 128] of NARROW, where queries passed at most six cells in 128 keys, MEDIUM, or WIDE, where they passed more than
        seven in all; with a margin for the backward pass, which rounds otherwise."""
        margin = 2.0**-10
        medium = cell(self.inside[:1] + margin) - cell(self.inside[LANES - 1 :] - margin) >= SUBLANES - 1
        wide = (cell(self.inside[:1] + margin) >= SUBLANES) & (self.base < last)
        found = jnp.where(wide, WIDE, jnp.where(medium, MEDIUM, NARROW))
        return functools.reduce(jnp.maximum, jnp.split(found, found.shape[1] // LANES, 1))


def strip_of(spots: list[StripCursor]) -> Callable[[Array], Array]:
    """The strip of each group of queries."""

    def find(g: Array) -> Array:
        a = jax.lax.div(g, np.int32(spots[0].groups.count))
        return functools.reduce(lambda found, n: jnp.where(a == n, spots[n].strip, found), range(len(spots)), spots[0].strip)

    return find


def bits(flags: list[Array]) -> Array:
    """A bit for each of the flags [1, 128], whether any of it is set."""
    most = joined([flag.astype(jnp.int32) for flag in flags], 0).max(1, keepdims=True)
    return jnp.sum(jnp.where(most > 0, 1 << jax.lax.broadcasted_iota(jnp.int32, most.shape, 0), 0))


def for_bits(found: Array, do: Any) -> None:
    """Calls ``do(n)`` for the number of each bit that is set."""

    def lowest(left: Array) -> Array:
        do(31 - jax.lax.clz(left & -left))
        return left & (left - 1)

    jax.lax.while_loop(lambda left: left != 0, lowest, found)


def for_each(flags: list[list[Array]], do: Any) -> None:
    """Calls ``do(row, n)`` for each of the flags [1, 128], in rows of at most 16, of which any is set."""
    size, rows = len(flags[0]), 32 // len(flags[0])
    for first in range(0, len(flags), rows):
        found = [bits(row) << (n * size) for n, row in enumerate(flags[first : first + rows])]

        def one(n: Array, first: int = first) -> None:
            row = jax.lax.div(n, np.int32(size))
            do(first + row, n - row * size)

        for_bits(functools.reduce(jnp.bitwise_or, found), one)


@dataclasses.dataclass
class QueryGroupState:
    """The counts of a passage on their way through a strip, in pieces of 128 keys.

    Attributes:
      step: where its tables are.
      spot: where it is.
      back: counts are taken off, from the left; otherwise added, from the right.
      high, low: [1, t], the counts before the strip are their sum.
      base, now: [1, t], the counts at hand are their sum on the way ``through`` windows.
      sums: [1, t] for each piece passed, of its gates.
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

    def past(self, later: Array) -> Array:
        """The counts [128, t] of a piece whose gates add up to ``later``, and past it."""
        before = self.high + self.low
        self.high, self.low = two_sum(self.high, self.low, -later[:1] if self.back else later[:1])
        self.sums.append(later[:1])
        return later + (self.high + self.low if self.back else before)

    def through(self, later: Array) -> Piece:
        """The same in windows."""
        if self.now is None:
            self.base = self.high.astype(jnp.int32)
            self.now = (self.high - self.base.astype(jnp.float32)) + self.low - OFFSET
        if self.back or not self.sums:  # forward one window does for all pieces
            cells = cell(self.now + 2.0**-10) - (SUBLANES - 2) if self.back else cell(self.now)
            self.base, self.now = self.base + cells.astype(jnp.int32), self.now - cells
            z, slope, counting = self.step.z, self.step.slope, self.step.plan.counting
            self.windows = [window(z[g], slope[g], self.base[:, part], counting) for g, part in self.spot.groups.apart()]
        right = self.now - later[:1] if self.back else self.now
        self.now = right if self.back else right + later[:1]
        self.sums.append(later[:1])
        return Piece(self.base, later + right, self.windows)


@dataclasses.dataclass
class CountingRegion:
    """The band of a query tile, as far as it lies in the resident block of keys.

    Attributes:
      step: the query tile.
      lowest: a(passage) -> the last strip that it may count, the leftmost.
      back: counts are taken off, from the left; otherwise added, from the right.
    """

    step: Step
    lowest: Callable[[Any], Array]
    back: bool = False

    @property
    def passages(self) -> int:
        return self.step.plan.groups // self.step.plan.groups_side_by_side

    def seen(self, a: Array | int) -> list[Array]:
        """The first strip that a passage sees, and one past the last."""
        return self.step.entry("bands", self.step.tile * self.passages + a)

    def steps(self) -> tuple[Array, Array]:
        """The steps in which some passage may have a strip in this block, from .. to."""
        begins, strips = self.step.key_block * self.step.strips, self.step.strips
        last = [self.seen(a)[1] for a in range(self.passages)]
        first = functools.reduce(jnp.minimum, [n - (begins + strips) for n in last])
        end = functools.reduce(jnp.maximum, [n - jnp.maximum(self.lowest(a), begins) for a, n in enumerate(last)])
        return jnp.maximum(first, 0), end

    def spot(self, n: Array, a: Array | int) -> StripCursor:
        """Of passage a in step n."""
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
        """Before its strip."""
        return QueryGroupState(self.step, spot, self.back, *(as_row(ref, spot.groups) for ref in (self.step.high, self.step.low)))

    def leave(self, passages: list[QueryGroupState], valid: Array | bool = True) -> None:
        """Moves the counts past a strip, if ``valid``."""
        high, low = self.step.high, self.step.low
        for passage in passages:
            sums = functools.reduce(jnp.add, passage.sums[::-1] if passage.back else passage.sums)
            sums = jnp.where(valid, -sums if passage.back else sums, 0.0)
            for g, part in passage.spot.groups.apart():
                row = pl.ds(g, 1)
                high[row, :], low[row, :] = two_sum(high[row, :], low[row, :], sums[:, part])

    def goes_on(self, n: Array) -> Array:
        """Whether queries that have not counted up to the last position have a strip in step n or later."""
        unsaturated, begins, size = self.unsaturated(), self.step.key_block * self.step.strips, self.step.plan.groups_side_by_side
        found = jnp.zeros((), bool)
        for a in range(self.passages):
            own = ((1 << size) - 1) << (a * size)
            found |= (self.seen(a)[1] - 1 - n >= jnp.maximum(self.lowest(a), begins)) & (unsaturated & own != 0)
        return found

    def unsaturated(self) -> Array:
        """A bit for each group of queries of which one has not counted up to the last position."""
        s = self.step
        return bits([s.high[...] + s.low[...] < s.plan.counting.last])

    def by_need(self, add: Any) -> None:
        """Calls ``add(g, at, few)`` for every quarter ``at`` of a strip and every group of queries g that is in ``GatherWorklist``
        there; ``few``: no query passes as many as eight cells."""

        def one(quarter: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
            for many in (0, 1):
                for_bits(self.step.need[2 * quarter + many], lambda g, few=not many: add(g, at, few))

        jax.lax.fori_loop(0, self.step.plan.blocks.strip // QUARTER, one, None)


@dataclasses.dataclass
class GatherWorklist:
    """Who is to look up what in a step: groups of queries with counts before the last position, by quarters of their strips.

    Attributes:
      band: of the step.
      groups: for each quarter and group 0 where there is nothing, or 1 for few or 2 for many cells, [1, 128].
      ends: for each passage the cells of its first and last key, [1, t].
    """

    band: CountingRegion
    groups: dict[tuple[int, int], Array] = dataclasses.field(default_factory=dict)
    ends: dict[int, list[Array]] = dataclasses.field(default_factory=dict)

    def note(self, spot: StripCursor, half: int, counts: Array) -> None:
        """Puts the positions of a piece, the ``half``th 128 keys of a strip, in their place."""
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
        """Leaves them to ``by_need``. Returns the greatest number of cells that a query passes in the step, a scalar."""
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
