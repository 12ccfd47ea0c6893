"""Gradients of the counting region on TPU: the walk from the left to the right that subtracts the gates from the counts again.

As in the forward pass, a counting step is branch-free code with lookups in windows (``in_windows``), or, in the steps that the
forward pass reports as wide and with T5, gathers for any counts, group by group (``by_gathers``). Both process the strips in pieces
of 128 keys, and every piece goes through five stages:

    open gates         the logits, the gradient of the weights, and the gates
    count              the counts, after subtraction of the gates
    differentiate      the weights, the gradient of the scores, and its products with the slopes of the biases, which are the
                       gradients of the counts
    through the gates  the gradient of the logits: that of a count reaches the gates of all keys from its own to the query
    accumulate         the gradients of key, value and query, once for all pieces of a strip
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from posjax.attention.backends.tpu.backward_tile import BackwardTile
from posjax.attention.backends.tpu.band import (
    CountingRegion,
    GatherWorklist,
    QueryGroupState,
    StripCursor,
    StripPiece,
    for_each,
    strip_of,
)
from posjax.attention.backends.tpu.step import Groups, as_row, masked_or_not
from posjax.attention.backends.tpu.tiles import (
    FEW,
    LANES,
    QUARTER,
    cells_passed,
    gate_slope,
    interpolated,
    joined,
    placed,
    spans,
    spread,
    spread_beyond,
    spread_widely,
    spread_within,
    staggered,
    sums_to_the_left,
    sums_to_the_right,
    within,
)
from posjax.typing import Array


@dataclasses.dataclass
class GradientPiece(StripPiece):
    """Holds a piece of a strip with its gradients.

    Attributes:
      d_weights: [128, t], the gradient of the weights.
      weights: [128, t], in the dtype of value.
      d_scores: [128, t], the gradient of the scores.
      d_counts: [128, t], the gradient of the counts.
      d_logits: [128, t], the gradient of the scores before any bias, also through the gates, in the dtype of key.
    """

    d_weights: Array | None = None
    weights: Array | None = None
    d_scores: Array | None = None
    d_counts: Array | None = None
    d_logits: Array | None = None


@dataclasses.dataclass(frozen=True)
class BackwardCounting:
    """Processes the counting region of a query tile in the resident block, from the left to the diagonal.

    Scratch holds the gradients of z, ``d_z`` [t / 128, P, 128], and of the last position apart, ``d_last`` [t / 128, 128].

    Attributes:
      tile: the query tile.
      band: its counting region in the block.
    """

    tile: BackwardTile
    band: CountingRegion

    def initialise(self) -> None:
        """Loads the state in which the last block left the rows, and clears the gradients of z."""
        s = self.tile.step
        for name in ("high", "low", "gathered"):
            getattr(s, name)[...] = getattr(s, f"in_{name}")[...]
        s.d_z[...] = jnp.zeros(s.d_z.shape, jnp.float32)
        s.d_last[...] = jnp.zeros(s.d_last.shape, jnp.float32)
        for a in range(self.band.passages):
            s.limit[a] = jnp.min(s.in_limit[pl.ds(a * s.plan.groups_side_by_side, 1), :])
        s.wide_steps[0], s.wide_steps[1] = jnp.min(s.in_wide_steps[...]), jnp.max(s.in_wide_steps[...])

    def uncount(self) -> None:
        """Processes the counting steps of the forward pass in reverse order."""
        begin, end = self.band.steps()
        jax.lax.fori_loop(0, end - begin, lambda n, _: self.uncount_step(end - 1 - n), None)

    def uncount_step(self, n: Array) -> None:
        """Processes counting step n."""
        s, spots = self.tile.step, self.band.spots(n)
        if s.plan.index is None:
            wide_steps = (n >= s.wide_steps[0]) & (n <= s.wide_steps[1])
            whole = functools.reduce(jnp.logical_and, [spot.whole for spot in spots])
            masked_or_not(functools.partial(self.in_windows, n), whole, ~wide_steps)
            pl.when(wide_steps)(lambda: self.by_gathers(spots))
        else:
            self.by_gathers(spots)

    # Where no query crosses many cells

    def in_windows(self, n: Array, masked: bool) -> None:
        """Processes step n, in which no query crosses many cells, several pairs of query groups at a time.

        With few pairs, operations wait for each other; many take long to compile, which pays off in the code without a mask, which
        runs most.
        """
        band = self.band
        most = math.gcd(band.passages, (4 if masked else 8) // self.tile.step.plan.groups_side_by_side)

        def some(turn: Array, _: None) -> None:
            self.some_in_windows([band.spot(n, turn * most + a) for a in range(most)], masked)

        jax.lax.fori_loop(0, band.passages // most, some, None)

    def some_in_windows(self, spots: list[StripCursor], masked: bool) -> None:
        """Processes the strips of some pairs of query groups in which no query crosses many cells."""
        passages = [self.band.passage(spot) for spot in spots]
        pieces = self.pieces_of(passages)
        beyond: list[list[Array]] = [[] for _ in range(0, self.tile.step.plan.blocks.strip, QUARTER)]
        stages = [
            functools.partial(self.open_gates, masked),
            self.count_in_window,
            functools.partial(self.differentiate_in_window, beyond),
            self.through_gates,
            functools.partial(self.accumulate, pieces),
        ]
        staggered(pieces, stages)
        for_each(beyond, functools.partial(self.add_beyond, spots[0].groups.first))
        self.band.leave(passages)

    def count_in_window(self, piece: GradientPiece) -> None:
        """Subtracts the gates from the counts, relative to windows of eight cells."""
        piece.counts = piece.passage.through(sums_to_the_right(piece.gates, self.tile.step.plan.counting))

    def differentiate_in_window(self, beyond: list[list[Array]], piece: GradientPiece) -> None:
        """Computes weights and gradients with the biases of the windows, and adds the gradient of z for up to ``FEW`` cells.

        Args:
          beyond: for each 64 keys of the strips, flags [1, 128] by query group: whether a query crosses more cells.
          piece: the piece.
        """
        s, counting, found = self.tile.step, self.tile.step.plan.counting, []
        quarters = range(0, LANES, QUARTER)
        for (g, part), lines in zip(piece.groups.apart(), piece.counts.windows, strict=True):
            inside = piece.counts.inside[:, part]
            bias, slope = within(lines, inside, counting)
            scores, d_weights = piece.logits[:, part] + bias, piece.d_weights[:, part]
            weights, d_scores = self.tile.score_gradients(scores, d_weights, piece.start, LANES, Groups(g, 1))
            nodes = [spread_within(inside[row : row + QUARTER], d_scores[row : row + QUARTER]) for row in quarters]
            s.d_z[g] += placed(functools.reduce(jnp.add, nodes), piece.counts.base[:, part], counting)
            s.positions[g, piece.rows, :], s.d_scores[g, piece.rows, :] = inside, d_scores
            s.bases[g, pl.ds(piece.half, 1), :] = piece.counts.base[:, part]
            for row in quarters:
                beyond[(piece.half * LANES + row) // QUARTER].append(cells_passed(inside[row : row + QUARTER]) > FEW)
            found.append((weights.astype(s.value.dtype), d_scores, d_scores * slope))
        piece.weights, piece.d_scores, piece.d_counts = (joined([one[k] for one in found], 1) for k in range(3))

    def add_beyond(self, first: Array, quarter: Array, n: Array) -> None:
        """Adds the gradient of z for more than ``FEW`` cells: of 64 keys, and the n-th query group from ``first`` on."""
        s, counting = self.tile.step, self.tile.step.plan.counting
        g, at = first + n, pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
        inside, base = s.positions[g, at, :], s.bases[g, pl.ds(jax.lax.div(quarter, np.int32(LANES // QUARTER)), 1), :]
        nodes = spread_beyond(inside, s.d_scores[g, at, :], jnp.max(cells_passed(inside)).astype(jnp.int32))
        s.d_z[g] += placed(nodes, base, counting)

    # For any counts

    def by_gathers(self, spots: list[StripCursor]) -> None:
        """Processes a step for any counts, group by group."""
        s, passages = self.tile.step, [self.band.passage(spot) for spot in spots]
        last, needs = s.last_bias(), GatherWorklist(self.band)
        pieces = self.pieces_of(passages)
        staggered(pieces, [functools.partial(self.open_gates, True), functools.partial(self.note, needs, last)])
        needs.close(spots)
        if s.plan.index is not None:
            s.by_group(s.scores, s.all_groups(s.scores) + s.lookups(strip_of(spots)))
        self.band.by_need(self.add_bias)
        staggered(pieces, [self.differentiate, self.through_gates, functools.partial(self.accumulate, pieces)])
        self.band.by_need(self.add_gathered)
        if s.plan.index is not None:
            self.tile.add_strips_to_table(strip_of(spots))
        self.band.leave(passages)

    def note(self, needs: GatherWorklist, last: Array, piece: GradientPiece) -> None:
        """Writes the scores with the bias of saturated counts, ``last`` [1, t], and lists the counts that are not saturated."""
        s = self.tile.step
        needs.note(piece.passage.spot, piece.half, piece.passage.past(sums_to_the_right(piece.gates, s.plan.counting)))
        for g, part in piece.groups.apart():
            s.scores[g, piece.rows, :] = piece.logits[:, part] + last[:, g * LANES : (g + 1) * LANES]
            s.slopes_there[g, piece.rows, :] = jnp.zeros((LANES, LANES), jnp.float32)

    def add_bias(self, g: Any, at: Any, few: bool) -> None:
        """Replaces bias and slope of saturated counts by those at the stored positions, for query group g and the keys ``at``."""
        s, counting = self.tile.step, self.tile.step.plan.counting
        bias, slope = interpolated(s.positions[g, at, :], s.z[g], s.slope[g], counting, few)
        s.scores[g, at, :] += bias - s.z[g, pl.ds(counting.last, 1), :]
        s.slopes_there[g, at, :] = slope

    def differentiate(self, piece: GradientPiece) -> None:
        """Computes weights and gradients from the stored scores and slopes, as if the bias was that of saturated counts."""
        s, found = self.tile.step, []
        for g, part in piece.groups.apart():
            scores, d_weights = s.scores[g, piece.rows, :], piece.d_weights[:, part]
            weights, d_scores = self.tile.score_gradients(scores, d_weights, piece.start, LANES, Groups(g, 1))
            s.d_scores[g, piece.rows, :] = d_scores
            s.d_last[pl.ds(g, 1), :] += d_scores.sum(0, keepdims=True)
            found.append((weights.astype(s.value.dtype), d_scores, d_scores * s.slopes_there[g, piece.rows, :]))
        piece.weights, piece.d_scores, piece.d_counts = (joined([one[k] for one in found], 1) for k in range(3))

    def add_gathered(self, g: Any, at: Any, few: bool) -> None:
        """Moves the gradient of z from the last position to the stored positions, for query group g and keys ``at``."""
        s, counting = self.tile.step, self.tile.step.plan.counting
        where, part = s.positions[g, at, :], s.d_scores[g, at, :]
        if few:
            s.d_z[g] += spread(where, part, jnp.max(spans(where)), counting)
        else:
            s.d_z[g] += spread_widely(s.positions.at[g, at], s.d_scores.at[g, at], counting)
        s.d_last[pl.ds(g, 1), :] -= part.sum(0, keepdims=True)

    # For both

    def pieces_of(self, passages: list[QueryGroupState]) -> list[GradientPiece]:
        """Returns the strips in pieces, each strip from the left to the right, and loads ``gathered`` of each pair."""
        s = self.tile.step
        for passage in passages:
            passage.gathered = as_row(s.gathered, passage.spot.groups)
        return [GradientPiece(passage, half) for passage in passages for half in range(s.plan.blocks.strip // LANES)]

    def open_gates(self, masked: bool, piece: GradientPiece) -> None:
        """Computes the logits, the gradient of the weights, and the gates."""
        piece.locate()
        logits, piece.d_weights = self.tile.products(piece.start, LANES, piece.groups)
        piece.open_gates(logits, masked)

    def through_gates(self, piece: GradientPiece) -> None:
        """Adds the gradients through the gates: that of a count reaches the gates of all keys from its own to the query."""
        s, passage = self.tile.step, piece.passage
        d_gates = sums_to_the_left(piece.d_counts, s.plan.counting) + passage.gathered
        passage.gathered = d_gates[LANES - 1 :]
        piece.d_logits = (piece.d_scores + d_gates * gate_slope(piece.gates)).astype(s.key.dtype)

    def accumulate(self, pieces: list[GradientPiece], piece: GradientPiece) -> None:
        """Adds the gradients of the strip that ends with ``piece``, one of ``pieces``, and stores ``gathered`` of its pair."""
        s, passage = self.tile.step, piece.passage
        strip = [other for other in pieces if other.passage is passage]
        if piece is not strip[-1]:
            return
        weights, d_logits = (joined([getattr(one, name) for one in strip], 0) for name in ("weights", "d_logits"))
        self.tile.accumulate(s.start_of(passage.spot.strip), s.plan.blocks.strip, weights, d_logits, piece.groups)
        for g, part in piece.groups.apart():
            s.gathered[pl.ds(g, 1), :] = passage.gathered[:, part]
