"""Gradients of the counting region on TPU: a walk from left to right that subtracts the gates from the counts again.

As in the forward pass, a counting step is branch-free code with lookups in windows (``in_windows``), or, in the steps that the
forward pass reports as wide and with T5, gathers for any counts, group by group (``by_gathers``). Both process the strips in pieces
of 128 keys, and every piece goes through five stages:

    compute gates      the logits, the gradient of the weights, and the gates
    count              the counts, after subtraction of the gates
    differentiate      the weights, the gradient of the scores, and its products with the slopes of the biases, which are the
                       gradients of the counts
    backprop gates     the gradient of the logits: that of a count reaches the gates of all keys from its own to the query
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
    cells_crossed,
    concatenate,
    gate_slope,
    interpolate,
    interpolate_in_window,
    prefix_sums,
    software_pipeline,
    spans,
    spread,
    spread_beyond,
    spread_widely,
    spread_within,
    suffix_sums,
    window_to_table,
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

    d_weights: Array = dataclasses.field(init=False)
    weights: Array = dataclasses.field(init=False)
    d_scores: Array = dataclasses.field(init=False)
    d_counts: Array = dataclasses.field(init=False)
    d_logits: Array = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class BackwardCounting:
    """Processes the counting region of a query tile in the resident block, from the left to the diagonal.

    Scratch holds the gradients of z, ``d_z`` [t / 128, P, 128], and of the last position apart, ``d_last`` [t / 128, 128].

    Attributes:
      tile: the query tile.
      region: its counting region in the block.
    """

    tile: BackwardTile
    region: CountingRegion

    def initialise(self) -> None:
        """Loads the state of the rows after the last block, and clears the gradients of z."""
        s = self.tile.step
        for name in ("high", "low", "gathered"):
            getattr(s, name)[...] = getattr(s, f"in_{name}")[...]
        s.d_z[...] = jnp.zeros(s.d_z.shape, jnp.float32)
        s.d_last[...] = jnp.zeros(s.d_last.shape, jnp.float32)
        for a in range(self.region.num_pairs):
            s.limit[a] = jnp.min(s.in_limit[pl.ds(a * s.plan.groups_side_by_side, 1), :])
        s.wide_steps[0], s.wide_steps[1] = jnp.min(s.in_wide_steps[...]), jnp.max(s.in_wide_steps[...])

    def uncount(self) -> None:
        """Processes the counting steps of the forward pass in reverse order."""
        begin, end = self.region.step_range()
        jax.lax.fori_loop(0, end - begin, lambda n, _: self.uncount_step(end - 1 - n), None)

    def uncount_step(self, n: Array) -> None:
        """Processes counting step n."""
        s, cursors = self.tile.step, self.region.cursors(n)
        if s.plan.index is None:
            wide_steps = (n >= s.wide_steps[0]) & (n <= s.wide_steps[1])
            is_full = functools.reduce(jnp.logical_and, [cursor.is_full for cursor in cursors])
            masked_or_not(functools.partial(self.in_windows, n), is_full, ~wide_steps)
            pl.when(wide_steps)(lambda: self.by_gathers(cursors))
        else:
            self.by_gathers(cursors)

    # Where no query crosses many cells

    def in_windows(self, n: Array, masked: bool) -> None:
        """Processes step n, in which no query crosses many cells, several pairs of query groups at a time.

        With few pairs, operations wait for each other; many take long to compile, which pays off in the code without a mask, which
        runs most.
        """
        region = self.region
        pairs_at_once = math.gcd(region.num_pairs, (4 if masked else 8) // self.tile.step.plan.groups_side_by_side)

        def process_chunk(chunk: Array, _: None) -> None:
            self.pairs_in_windows([region.cursor(n, chunk * pairs_at_once + a) for a in range(pairs_at_once)], masked)

        jax.lax.fori_loop(0, region.num_pairs // pairs_at_once, process_chunk, None)

    def pairs_in_windows(self, cursors: list[StripCursor], masked: bool) -> None:
        """Processes the strips of some pairs of query groups in which no query crosses many cells."""
        states = [self.region.load_state(cursor) for cursor in cursors]
        pieces = self.pieces_of(states)
        beyond: list[list[Array]] = [[] for _ in range(0, self.tile.step.plan.blocks.block_kv_count, QUARTER)]
        stages = [
            functools.partial(self.compute_gates, masked),
            self.count_in_window,
            functools.partial(self.differentiate_in_window, beyond),
            self.backprop_gates,
            functools.partial(self.accumulate, pieces),
        ]
        software_pipeline(pieces, stages)
        for_each(beyond, functools.partial(self.add_beyond, cursors[0].groups.first))
        self.region.store_counts(states)

    def count_in_window(self, piece: GradientPiece) -> None:
        """Subtracts the gates from the counts, relative to windows of eight cells."""
        piece.counts = piece.state.advance_in_window(suffix_sums(piece.gates, self.tile.step.counting))

    def differentiate_in_window(self, beyond: list[list[Array]], piece: GradientPiece) -> None:
        """Computes weights and gradients with the biases of the windows, and adds the gradient of z for up to ``FEW`` cells.

        Args:
          beyond: for each 64 keys of the strips, flags [1, 128] by query group: whether a query crosses more cells.
          piece: the piece.
        """
        s, counting, per_group = self.tile.step, self.tile.step.counting, []
        quarters = range(0, LANES, QUARTER)
        for (g, part), window in zip(piece.groups.lane_slices(), piece.counts.windows, strict=True):
            inside = piece.counts.inside[:, part]
            bias, slope = interpolate_in_window(window, inside, counting)
            scores, d_weights = piece.logits[:, part] + bias, piece.d_weights[:, part]
            weights, d_scores = self.tile.score_gradients(scores, d_weights, piece.start, LANES, Groups(g, 1))
            nodes = [spread_within(inside[row : row + QUARTER], d_scores[row : row + QUARTER]) for row in quarters]
            s.d_z[g] += window_to_table(functools.reduce(jnp.add, nodes), piece.counts.base[:, part], counting)
            s.positions[g, piece.rows, :], s.d_scores[g, piece.rows, :] = inside, d_scores
            s.bases[g, pl.ds(piece.index, 1), :] = piece.counts.base[:, part]
            for row in quarters:
                beyond[(piece.index * LANES + row) // QUARTER].append(cells_crossed(inside[row : row + QUARTER]) > FEW)
            per_group.append((weights.astype(s.value.dtype), d_scores, d_scores * slope))
        piece.weights, piece.d_scores, piece.d_counts = (concatenate([values[k] for values in per_group], 1) for k in range(3))

    def add_beyond(self, first: Array | int, quarter: Array, n: Array) -> None:
        """Adds the gradient of z for more than ``FEW`` cells: of 64 keys, and the n-th query group from ``first`` on."""
        s, counting = self.tile.step, self.tile.step.counting
        g, at = first + n, pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
        inside, base = s.positions[g, at, :], s.bases[g, pl.ds(jax.lax.div(quarter, np.int32(LANES // QUARTER)), 1), :]
        nodes = spread_beyond(inside, s.d_scores[g, at, :], jnp.max(cells_crossed(inside)).astype(jnp.int32))
        s.d_z[g] += window_to_table(nodes, base, counting)

    # For any counts

    def by_gathers(self, cursors: list[StripCursor]) -> None:
        """Processes a step for any counts, group by group."""
        s, states = self.tile.step, [self.region.load_state(cursor) for cursor in cursors]
        last, worklist = s.last_bias(), GatherWorklist(self.region)
        pieces = self.pieces_of(states)
        software_pipeline(
            pieces, [functools.partial(self.compute_gates, True), functools.partial(self.add_to_worklist, worklist, last)]
        )
        worklist.write(cursors)
        if s.plan.index is not None:
            s.by_group(s.scores, s.all_groups(s.scores) + s.lookup_biases(strip_of(cursors)))
        self.region.for_each_gather(self.add_bias)
        software_pipeline(pieces, [self.differentiate, self.backprop_gates, functools.partial(self.accumulate, pieces)])
        self.region.for_each_gather(self.add_gathered)
        if s.plan.index is not None:
            self.tile.add_strips_to_table(strip_of(cursors))
        self.region.store_counts(states)

    def add_to_worklist(self, worklist: GatherWorklist, last: Array, piece: GradientPiece) -> None:
        """Writes the scores with the bias of saturated counts, ``last`` [1, t], and lists the counts that are not saturated."""
        s = self.tile.step
        worklist.add(piece.state.cursor, piece.index, piece.state.advance(suffix_sums(piece.gates, s.counting)))
        for g, part in piece.groups.lane_slices():
            s.scores[g, piece.rows, :] = piece.logits[:, part] + last[:, g * LANES : (g + 1) * LANES]
            s.bias_slopes[g, piece.rows, :] = jnp.zeros((LANES, LANES), jnp.float32)

    def add_bias(self, g: Any, at: Any, few: bool) -> None:
        """Replaces bias and slope of saturated counts by those at the stored positions, for query group g and the keys ``at``."""
        s, counting = self.tile.step, self.tile.step.counting
        bias, slope = interpolate(s.positions[g, at, :], s.z[g], s.slope[g], counting, few)
        s.scores[g, at, :] += bias - s.z[g, pl.ds(counting.last, 1), :]
        s.bias_slopes[g, at, :] = slope

    def differentiate(self, piece: GradientPiece) -> None:
        """Computes weights and gradients from the stored scores and slopes, as if the bias was that of saturated counts."""
        s, per_group = self.tile.step, []
        for g, part in piece.groups.lane_slices():
            scores, d_weights = s.scores[g, piece.rows, :], piece.d_weights[:, part]
            weights, d_scores = self.tile.score_gradients(scores, d_weights, piece.start, LANES, Groups(g, 1))
            s.d_scores[g, piece.rows, :] = d_scores
            s.d_last[pl.ds(g, 1), :] += d_scores.sum(0, keepdims=True)
            per_group.append((weights.astype(s.value.dtype), d_scores, d_scores * s.bias_slopes[g, piece.rows, :]))
        piece.weights, piece.d_scores, piece.d_counts = (concatenate([values[k] for values in per_group], 1) for k in range(3))

    def add_gathered(self, g: Any, at: Any, few: bool) -> None:
        """Moves the gradient of z from the last position to the stored positions, for query group g and keys ``at``."""
        s, counting = self.tile.step, self.tile.step.counting
        positions, d_scores = s.positions[g, at, :], s.d_scores[g, at, :]
        if few:
            s.d_z[g] += spread(positions, d_scores, jnp.max(spans(positions)), counting)
        else:
            s.d_z[g] += spread_widely(s.positions.at[g, at], s.d_scores.at[g, at], counting)
        s.d_last[pl.ds(g, 1), :] -= d_scores.sum(0, keepdims=True)

    # For both

    def pieces_of(self, states: list[QueryGroupState]) -> list[GradientPiece]:
        """Returns the strips in pieces, each strip from the left to the right, and loads ``gathered`` of each pair."""
        s = self.tile.step
        for state in states:
            state.gathered = as_row(s.gathered, state.cursor.groups)
        return [GradientPiece(state, index) for state in states for index in range(s.plan.blocks.block_kv_count // LANES)]

    def compute_gates(self, masked: bool, piece: GradientPiece) -> None:
        """Computes the logits, the gradient of the weights, and the gates."""
        piece.locate()
        logits, piece.d_weights = self.tile.products(piece.start, LANES, piece.groups)
        piece.compute_gates(logits, masked)

    def backprop_gates(self, piece: GradientPiece) -> None:
        """Adds the gradients through the gates: that of a count reaches the gates of all keys from its own to the query."""
        s, state = self.tile.step, piece.state
        d_gates = prefix_sums(piece.d_counts, s.counting) + state.gathered
        state.gathered = d_gates[LANES - 1 :]
        piece.d_logits = (piece.d_scores + d_gates * gate_slope(piece.gates)).astype(s.key.dtype)

    def accumulate(self, pieces: list[GradientPiece], piece: GradientPiece) -> None:
        """Adds the gradients of the strip that ends with ``piece``, one of ``pieces``, and stores ``gathered`` of its pair."""
        s, state = self.tile.step, piece.state
        strip = [other for other in pieces if other.state is state]
        if piece is not strip[-1]:
            return
        weights, d_logits = (concatenate([getattr(member, name) for member in strip], 0) for name in ("weights", "d_logits"))
        self.tile.accumulate(s.start_of(state.cursor.strip), s.plan.blocks.block_kv_count, weights, d_logits, piece.groups)
        for g, part in piece.groups.lane_slices():
            s.gathered[pl.ds(g, 1), :] = state.gathered[:, part]
