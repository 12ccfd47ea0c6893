"""Attention on TPU, forward: a Pallas kernel that applies the rotation and every bias inside the tile.

A grid step is one query tile of one head. Keys and values of up to ``Blocks.block_kv_resident`` positions stay in VMEM and serve
all query tiles and all query heads of their group; longer sequences are loaded block by block. The keys that the mask allows are
processed in two phases:

    counting region the keys that CoPE counts. In each step, every pair of query groups (256 queries) processes its next strip of
                    ``Blocks.block_kv_count`` keys, from the diagonal to the left, until all counts have reached the last position.
    key tiles       the remaining keys, with one product, one exponential and one product per tile: a bias that is constant along a
                    row costs nothing here. A tile in which T5 looks up more than one number is processed in strips.

The positions of CoPE divide the counts into cells, [n, n + 1). A counting step runs as branch-free code that assumes that no query
crosses more than eight cells, which holds where gates are small. If a query does, the step is repeated group by group. The backward
pass uses branch-free code where queries cross at most six cells in 128 keys; the forward pass saves the first and the last step of
a query tile in which that does not hold.

The backward pass receives the log-sum-exp of the scores, the counts at the left end, the strip where counting ended and those two
steps, all [T]. It walks through the counting region from the left to the right and subtracts the gates from the counts again.

``tiles.py`` holds the mathematics of a tile, ``step.py`` the code that both passes share, ``band.py`` the counting region.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.tpu.band import CountingRegion, GatherWorklist, QueryGroupState, StripCursor, StripPiece, strip_of
from posjax.attention.backends.tpu.step import (
    OPTIONAL,
    Groups,
    Operands,
    Plan,
    Scalars,
    Step,
    apply_soft_cap,
    blocks_of,
    inputs_of,
    make_scalars,
    masked_or_not,
    scratch_of,
)
from posjax.attention.backends.tpu.tiles import (
    LANES,
    MEDIUM,
    NARROW,
    NT,
    SUBLANES,
    TN,
    WIDE,
    concatenate,
    interpolate,
    interpolate_in_window,
    product,
    software_pipeline,
    suffix_sums,
)
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """Computes the output of one query tile of one head from one resident block of keys, by an online softmax.

    Scratch holds the state of the softmax between blocks, in float32: the running maximum ``m`` [1, t], the denominator ``l``
    [1, t] and the accumulator ``acc`` [V, t].

    Attributes:
      step: the query tile, with the references to operands, results and scratch.
      factor: the scale of the scores in units of log2 e, a scalar.
    """

    step: Step
    factor: Array

    @property
    def every(self) -> Groups:
        return Groups(0, self.step.plan.groups)

    def initialise(self) -> None:
        """Rotates the queries, multiplies them with the embedding, and empties the softmax."""
        s = self.step
        s.prepare_queries()
        s.m[...] = jnp.full(s.m.shape, INIT_MAX, jnp.float32)
        s.l[...] = jnp.zeros(s.l.shape, jnp.float32)
        s.acc[...] = jnp.zeros(s.acc.shape, jnp.float32)

    def logits(self, start: Array, size: int, groups: Groups | None = None) -> Array:
        """Computes the scores of ``size`` keys from ``start`` on before any bias, [s, t]."""
        key = self.step.keys(start, size)
        return product(key, self.step.queries(groups), NT, key.dtype == jnp.float32) * self.factor

    def update_softmax(self, scores: list[Array], start: Array, size: int, groups: Groups) -> None:
        """Updates the softmax with ``size`` keys from ``start`` on.

        Args:
          scores: [s, t], split along t; they include CoPE and T5 biases and are masked.
          start, size: the keys.
          groups: the query groups.
        """
        s, weights, lane = self.step, [], 0
        bias = s.pair_biases(start, size, groups) if s.plan.pairs else None
        for piece in scores:
            part = slice(lane, lane := lane + piece.shape[1])
            at = pl.ds(groups.first * LANES + part.start, piece.shape[1])
            piece = piece if bias is None else piece + bias[:, part]
            piece = apply_soft_cap(s.plan, piece)
            m_prev = s.m[:, at]
            m_next = jnp.maximum(m_prev, piece.max(0, keepdims=True))
            weight, alpha = jnp.exp2(piece - m_next), jnp.exp2(m_prev - m_next)
            s.l[:, at] = s.l[:, at] * alpha + weight.sum(0, keepdims=True)
            s.m[:, at] = m_next
            s.acc[:, at] = s.acc[:, at] * alpha
            weights.append(weight.astype(s.value.dtype))
        value = s.value[pl.ds(start, size), :]
        s.acc[:, groups.lanes] += product(value, concatenate(weights, 1), TN, value.dtype == jnp.float32)

    def key_tiles(self) -> None:
        """Processes the keys of the block outside the counting region."""
        self.step.for_key_tiles(lambda j, is_full: self.step.dispatch_tile(j, is_full, self.plain_tile, self.lookup_tile))

    def plain_tile(self, j: Array, masked: bool) -> None:
        """Processes key tile j, in which the bias is constant along a row."""
        s, size = self.step, self.step.plan.blocks.block_kv
        start = pl.multiple_of(j * size, size)
        scores, constant = self.logits(start, size), s.constant(s.query_extent(), s.key_extent(j))
        if constant is not None:
            scores = scores + constant
        self.update_softmax([s.apply_mask(scores, start) if masked else scores], start, size, self.every)

    def lookup_tile(self, j: Array, is_full: Array) -> None:
        """Processes key tile j strip by strip, with T5 lookups; ``is_full`` is True if its pairs need no mask."""
        s, size = self.step, self.step.plan.blocks.block_kv_count

        def one(n: Array, _: None) -> None:
            strip = j * s.plan.per_tile + n
            start = s.start_of(strip)
            scores = self.logits(start, size) + s.lookup_biases(lambda g: strip)
            scores = scores if s.plan.counting is None else scores + s.last_bias()

            def take(masked: bool) -> None:
                self.update_softmax([s.apply_mask(scores, start) if masked else scores], start, size, self.every)

            masked_or_not(take, is_full)

        jax.lax.fori_loop(0, s.plan.per_tile, one, None)

    def finish(self) -> None:
        """Writes the output, the log-sum-exp and, with CoPE, what the backward pass needs to walk back through the counts."""
        s, plan = self.step, self.step.plan
        denominator = s.l[...]
        is_empty = denominator == 0.0
        denominator = jnp.where(is_empty, 1.0, denominator)
        s.out[...] = (s.acc[...] / denominator).T.astype(s.out.dtype)
        lse = jnp.where(is_empty, -MASK_VALUE, s.m[...] + jnp.log2(denominator))
        for g in range(plan.groups):
            s.lse[pl.ds(g, 1), :] = lse[:, g * LANES : (g + 1) * LANES]
            if plan.counting is not None:
                s.out_limit[pl.ds(g, 1), :] = jnp.full((1, LANES), s.limit[g // plan.groups_side_by_side], jnp.int32)
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
                s.out_wide_steps[pl.ds(g, 1), :] = jnp.where(lane == 0, s.wide_steps[0], s.wide_steps[1])
        if plan.counting is not None:
            s.out_high[...], s.out_low[...] = s.high[...], s.low[...]


@dataclasses.dataclass(frozen=True)
class ForwardCounting:
    """Processes the counting region of a query tile in the resident block, from the diagonal to the left.

    Attributes:
      tile: the query tile.
      region: its counting region in the block.
    """

    tile: ForwardTile
    region: CountingRegion

    def initialise(self) -> None:
        """Sets the counts to those of other calls, or to zero, before the first block of a query tile."""
        s = self.tile.step
        for name in ("high", "low"):
            ref, given = getattr(s, name), s.refs.get(f"in_{name}")
            ref[...] = jnp.zeros(ref.shape, jnp.float32) if given is None else given[...]
        s.wide_steps[0] = s.wide_steps[1] = -1
        for a in range(self.region.num_pairs):
            s.limit[a] = self.region.visible_strips(a)[1]

        @pl.when(s.tile == 0)
        def _() -> None:
            s.cell_span[0] = NARROW

    def count(self) -> None:
        """Processes counting steps until all counts have reached the last position, or no strip is left."""
        begin, _ = self.region.step_range()
        jax.lax.while_loop(lambda x: x[1], lambda x: (x[0] + 1, self.count_step(x[0])), (begin, self.region.has_next(begin)))

    def count_step(self, n: Array) -> Array:
        """Processes counting step n; returns whether there is another."""
        s, cursors = self.tile.step, self.region.cursors(n)
        is_full = functools.reduce(jnp.logical_and, [cursor.is_full for cursor in cursors])
        if s.plan.index is None:
            masked_or_not(functools.partial(self.in_windows, cursors), is_full, s.cell_span[0] < WIDE)  # span of the previous step
            pl.when(s.cell_span[0] == WIDE)(lambda: self.by_gathers(cursors))

            @pl.when(s.cell_span[0] > NARROW)
            def _() -> None:
                s.wide_steps[0] = jnp.where(s.wide_steps[0] < 0, n, s.wide_steps[0])
                s.wide_steps[1] = n
        else:
            self.by_gathers(cursors)

        for a, cursor in enumerate(cursors):
            scores = [s.scores[g] for g, _ in cursor.groups.lane_slices()]
            self.tile.update_softmax(scores, s.start_of(cursor.strip), s.plan.blocks.block_kv_count, cursor.groups)
            s.limit[a] = jnp.where(cursor.is_active, s.key_block * s.strips + cursor.strip, s.limit[a])
        return self.region.has_next(n + 1)

    def in_windows(self, cursors: list[StripCursor], masked: bool) -> None:
        """Computes the scores of a step with CoPE biases, for queries that cross at most eight cells.

        Sets ``s.cell_span`` to the actual span. If it is WIDE, the scores are invalid and the counts are unchanged.
        """
        states, spans = [self.region.load_state(cursor) for cursor in cursors], []
        count = functools.partial(self.count_in_window, spans)
        software_pipeline(self.pieces_of(states), [functools.partial(self.compute_gates, masked), count, self.add_window_bias])
        span = jnp.max(functools.reduce(jnp.maximum, spans))
        self.tile.step.cell_span[0] = span
        self.region.store_counts(states, span < WIDE)

    def by_gathers(self, cursors: list[StripCursor]) -> None:
        """Computes the scores of a step with CoPE biases for any counts, group by group."""
        s, states = self.tile.step, [self.region.load_state(cursor) for cursor in cursors]
        last, worklist = s.last_bias(), GatherWorklist(self.region)
        software_pipeline(
            self.pieces_of(states),
            [functools.partial(self.compute_gates, True), functools.partial(self.add_to_worklist, worklist, last)],
        )
        s.cell_span[0] = jnp.where(worklist.write(cursors) < SUBLANES, MEDIUM, WIDE)
        self.region.store_counts(states)
        if s.plan.index is not None:
            s.by_group(s.scores, s.all_groups(s.scores) + s.lookup_biases(strip_of(cursors)))
        self.region.for_each_gather(self.add_bias)

    # Stages of a step, for one piece of 128 keys

    def pieces_of(self, states: list[QueryGroupState]) -> list[StripPiece]:
        """Returns the strips in pieces, each strip from the right to the left."""
        num_pieces = self.tile.step.plan.blocks.block_kv_count // LANES
        return [StripPiece(state, index) for state in states for index in reversed(range(num_pieces))]

    def compute_gates(self, masked: bool, piece: StripPiece) -> None:
        """Computes the logits and gates."""
        piece.locate()
        piece.compute_gates(self.tile.logits(piece.start, LANES, piece.groups), masked)

    def count_in_window(self, spans: list[Array], piece: StripPiece) -> None:
        """Adds the gates to the counts, relative to windows of eight cells, and appends the cell span of the piece to ``spans``."""
        counting = self.tile.step.counting
        piece.counts = piece.state.advance_in_window(suffix_sums(piece.gates, counting))
        spans.append(piece.counts.cell_span(counting.last))

    def add_window_bias(self, piece: StripPiece) -> None:
        """Writes the scores with the biases from the windows."""
        s = self.tile.step
        for (g, part), window in zip(piece.groups.lane_slices(), piece.counts.windows, strict=True):
            bias, _ = interpolate_in_window(window, piece.counts.inside[:, part], s.counting)
            s.scores[g, piece.rows, :] = piece.logits[:, part] + bias

    def add_to_worklist(self, worklist: GatherWorklist, last: Array, piece: StripPiece) -> None:
        """Writes the scores with the bias of saturated counts, ``last`` [1, t], and lists the counts that are not saturated."""
        s = self.tile.step
        worklist.add(piece.state.cursor, piece.index, piece.state.advance(suffix_sums(piece.gates, s.counting)))
        for g, part in piece.groups.lane_slices():
            s.scores[g, piece.rows, :] = piece.logits[:, part] + last[:, g * LANES : (g + 1) * LANES]

    def add_bias(self, g: Any, at: Any, few: bool) -> None:
        """Replaces the bias of saturated counts by that of the stored positions, for query group g and the keys ``at``."""
        s = self.tile.step
        bias, _ = interpolate(s.positions[g, at, :], s.z[g], s.slope[g], s.counting, few)
        s.scores[g, at, :] += bias - s.z[g, pl.ds(s.counting.last, 1), :]


def _body(plan: Plan, names: tuple[str, ...], rows: int, tiles_per_block: int, *refs: Any) -> None:
    """Runs one grid step of the kernel."""
    if plan.interpret is None:  # only the shapes of the results are needed
        return
    scalars, scale = Scalars(*refs[:6]), refs[6]
    rest: dict[str, Any] = {**dict.fromkeys(OPTIONAL), **dict(zip(names, refs[7:], strict=True))}
    batch, group, tile, block_step = (pl.program_id(n) for n in (0, 2, 3, 4))
    s = Step(plan, scalars, rest, batch if rows > 1 else 0, rows, tile, 0)
    first, last = s.entry("visible_tiles", tile)
    first_block, last_block = blocks_of(first, last, tiles_per_block)
    s.key_block = jnp.maximum(last_block - block_step, first_block)
    region = CountingRegion(s, lambda a: region.visible_strips(a)[0])
    query_tile = ForwardTile(s, scale[0] * LOG2E)
    counting = ForwardCounting(query_tile, region) if plan.counting is not None else None

    if plan.rotates_keys:  # all keys stay in VMEM
        pl.when((group == 0) & (tile == 0))(s.prepare_keys)

    @pl.when(block_step == 0)
    def _() -> None:
        query_tile.initialise()
        if counting is not None:
            counting.initialise()

    @pl.when(last_block - block_step >= first_block)
    def _() -> None:
        if counting is not None:
            counting.count()
        query_tile.key_tiles()

    pl.when(block_step == pl.num_programs(4) - 1)(query_tile.finish)


def forward(plan: Plan, x: Operands, dtype: Any = None) -> tuple[Array, ...]:
    """Runs the forward kernel.

    Args:
      plan: the static part of the call.
      x: its operands.
      dtype: dtype of the output; None: that of value.

    Returns:
      The output [B, K, G, T, V], then arrays of rows by query tile, [B, K, G, I, t / 128, 128]: the log-sum-exp to base 2 and, with
      CoPE, the counts (high, low) at the left end, the strip where counting ended, and the first and last step whose cell span was
      not NARROW, in lanes 0 and 1.
    """
    batch, kv_heads, group, length, _ = x.query.shape
    blocks, keys = plan.blocks, x.key.shape[2]
    resident = min(blocks.block_kv_resident, keys)
    tiles_per_block, num_blocks, tiles = resident // blocks.block_kv, keys // resident, length // blocks.block_q
    scalars = make_scalars(plan, x)
    rows = scalars[0].shape[0] // (tiles * 2)

    def key_block(b, i, r, visible_tiles, *_):
        at = ((b if rows > 1 else 0) * tiles + i) * 2
        first, last = blocks_of(visible_tiles[at], visible_tiles[at + 1], tiles_per_block)
        return jnp.maximum(last - r, first)

    names, arrays, specs = inputs_of(plan, x, key_block)
    by_tile = (batch, kv_heads, group, tiles, plan.groups, LANES)
    row_spec = pl.BlockSpec((None,) * 4 + by_tile[4:], lambda b, k, g, i, r, *_: (b, k, g, i, 0, 0))
    width = x.value.shape[-1]
    out = jax.ShapeDtypeStruct((*x.query.shape[:4], width), dtype or x.value.dtype)
    outs = {"out": out, "lse": jax.ShapeDtypeStruct(by_tile, jnp.float32)}
    if plan.counting is not None:
        outs |= {f"out_{name}": jax.ShapeDtypeStruct(by_tile, jnp.float32) for name in ("high", "low")}
        outs |= {f"out_{name}": jax.ShapeDtypeStruct(by_tile, jnp.int32) for name in ("limit", "wide_steps")}
    out_specs = [row_spec] * len(outs)
    out_specs[0] = pl.BlockSpec((None,) * 3 + (blocks.block_q, width), lambda b, k, g, i, r, *_: (b, k, g, i, 0))
    scratch = scratch_of(plan, x) | {
        "m": pltpu.VMEM((1, blocks.block_q), jnp.float32),
        "l": pltpu.VMEM((1, blocks.block_q), jnp.float32),
        "acc": pltpu.VMEM((width, blocks.block_q), jnp.float32),
    }
    if plan.counting is not None:
        scratch |= {name: pltpu.SMEM((n,), jnp.int32) for name, n in (("cell_span", 1), ("wide_steps", 2))}
    return pl.pallas_call(
        functools.partial(_body, plan, (*names, *outs, *scratch), rows, tiles_per_block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(batch, kv_heads, group, tiles, num_blocks),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=plan.interpret,
        name="posjax_attention_forward",
    )(*scalars, x.scale, *arrays)
