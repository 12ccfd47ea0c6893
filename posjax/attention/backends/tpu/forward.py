"""Attention on TPU, forward: a Pallas kernel that applies the rotation and every bias inside the tile.

A grid step is one query tile of one head. Keys and values of up to ``Blocks.resident`` positions stay in VMEM and serve all query
tiles and all query heads of their group; longer sequences are loaded block by block. The keys that the mask allows are processed in
two phases:

    counting region the keys that CoPE counts. In each step, every pair of query groups (256 queries) processes its next strip of
                    ``Blocks.strip`` keys, from the diagonal to the left, until all counts have reached the last position.
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

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.tpu.band import CountingRegion, GatherWorklist, QueryGroupState, StripCursor, strip_of
from posjax.attention.backends.tpu.step import (
    OPTIONAL,
    Groups,
    Operands,
    Plan,
    Scalars,
    Step,
    blocks_of,
    inputs_of,
    make_scalars,
    masked_or_not,
    scratch_of,
    soft,
)
from posjax.attention.backends.tpu.tiles import (
    INIT_MAX,
    LANES,
    LOG2E,
    MASK_VALUE,
    MEDIUM,
    NARROW,
    NT,
    SUBLANES,
    TN,
    WIDE,
    doubled_gates,
    interpolated,
    joined,
    product,
    staggered,
    sums_to_the_right,
    within,
)
from posjax.typing import Array


def _body(plan: Plan, names: tuple[str, ...], rows: int, held: int, *refs: Any) -> None:
    if plan.interpret is None:  # only the shapes of the results are needed
        return
    scalars, scale, rest = Scalars(*refs[:6]), refs[6], dict(zip(names, refs[7:], strict=True))
    rest = dict.fromkeys(OPTIONAL) | rest
    batch, _, group, tile, turn = (pl.program_id(n) for n in range(5))
    row = batch if rows > 1 else 0
    blocks, counting = plan.blocks, plan.counting
    s = Step(plan, scalars, rest, row, rows, tile, 0)
    first_block, last_block = blocks_of(*s.entry("visits", tile), held)
    s.key_block = jnp.maximum(last_block - turn, first_block)
    band = CountingRegion(s, lambda a: band.seen(a)[0])
    factor, every = scale[0] * LOG2E, Groups(0, plan.groups)

    if plan.turn_keys:  # all keys stay in VMEM

        @pl.when((group == 0) & (tile == 0))
        def _() -> None:
            s.prepare_keys()

    @pl.when(turn == 0)
    def _() -> None:
        s.prepare_queries()
        s.highest[...] = jnp.full(s.highest.shape, INIT_MAX, jnp.float32)
        s.total[...] = jnp.zeros(s.total.shape, jnp.float32)
        s.sums[...] = jnp.zeros(s.sums.shape, jnp.float32)
        if counting is not None:
            for name in ("high", "low"):
                own, given = getattr(s, name), rest.get(f"in_{name}")
                own[...] = jnp.zeros(own.shape, jnp.float32) if given is None else given[...]
            s.wide_steps[0] = s.wide_steps[1] = -1
            for a in range(band.passages):
                s.limit[a] = band.seen(a)[1]

            @pl.when(tile == 0)
            def _() -> None:
                s.cell_span[0] = NARROW

    def logits(start: Array, size: int, groups: Groups | None = None) -> Array:
        key = s.keys(start, size)
        return product(key, s.queries(groups), NT, key.dtype == jnp.float32) * factor

    def softmax(scores: list[Array], start: Array, size: int, groups: Groups) -> None:
        """Updates the online softmax with ``size`` keys from ``start`` on; scores [s, t], split along t, include CoPE and T5."""
        weights, lane = [], 0
        penalty = s.penalty(start, size, groups) if plan.penalised else None
        for piece in scores:
            part = slice(lane, lane := lane + piece.shape[1])
            at = pl.ds(groups.first * LANES + part.start, piece.shape[1])
            piece = piece if penalty is None else piece + penalty[:, part]
            piece = soft(plan, piece)
            highest = s.highest[:, at]
            new = jnp.maximum(highest, piece.max(0, keepdims=True))
            weight, shrink = jnp.exp2(piece - new), jnp.exp2(highest - new)
            s.total[:, at] = s.total[:, at] * shrink + weight.sum(0, keepdims=True)
            s.highest[:, at] = new
            s.sums[:, at] = s.sums[:, at] * shrink
            weights.append(weight.astype(s.value.dtype))
        value = s.value[pl.ds(start, size), :]
        s.sums[:, groups.lanes] += product(value, joined(weights, 1), TN, value.dtype == jnp.float32)

    def pieces_of(passages: list[QueryGroupState], masked: bool) -> tuple[list, dict, Any]:
        """Returns the strips in pieces of 128 keys, right to left, a dict of values per piece, and the stage that fills it."""
        live: dict[int, Any] = {}
        pieces = [(passage, half) for passage in passages for half in reversed(range(blocks.strip // LANES))]

        def products(n: int) -> None:
            spot, half = pieces[n][0].spot, pieces[n][1]
            at = pl.multiple_of(s.start_of(spot.strip) + half * LANES, LANES)
            raw = logits(at, LANES, spot.groups)
            if masked:
                raw = jnp.where(s.pairs(at, LANES, spot.groups, spot.here), raw, MASK_VALUE)
            live[n] = raw, doubled_gates(raw, counting.exact)

        return pieces, live, products

    def straight(spots: list[StripCursor], masked: bool) -> None:
        """Computes the scores of a step with CoPE biases, for queries that cross at most eight cells.

        Sets ``s.cell_span`` to the actual span. If it is WIDE, the scores are invalid and the counts are unchanged.
        """
        passages, cell_span = [band.passage(spot) for spot in spots], []
        pieces, live, products = pieces_of(passages, masked)

        def counts(n: int) -> None:
            raw, gates = live[n]
            live[n] = raw, pieces[n][0].through(sums_to_the_right(gates, counting))
            cell_span.append(live[n][1].cell_span(counting.last))

        def biases(n: int) -> None:
            (passage, half), (raw, piece) = pieces[n], live.pop(n)
            for (g, part), lines in zip(passage.spot.groups.apart(), piece.windows, strict=True):
                bias, _ = within(lines, piece.inside[:, part], counting)
                s.scores[g, pl.ds(half * LANES, LANES), :] = raw[:, part] + bias

        staggered(len(pieces), [products, counts, biases])
        most = jnp.max(functools.reduce(jnp.maximum, cell_span))
        s.cell_span[0] = most
        band.leave(passages, most < WIDE)

    def bending(spots: list[StripCursor]) -> None:
        """Computes the scores of a step with CoPE biases for any counts, group by group."""
        passages, last, needs = [band.passage(spot) for spot in spots], s.last_bias(), GatherWorklist(band)
        pieces, live, products = pieces_of(passages, True)

        def counts(n: int) -> None:
            (passage, half), (raw, gates) = pieces[n], live.pop(n)
            needs.note(passage.spot, half, passage.past(sums_to_the_right(gates, counting)))
            for g, part in passage.spot.groups.apart():
                s.scores[g, pl.ds(half * LANES, LANES), :] = raw[:, part] + last[:, g * LANES : (g + 1) * LANES]

        def add(g: Any, at: Any, few: bool) -> None:
            bias, _ = interpolated(s.positions[g, at, :], s.z[g], s.slope[g], counting, few)
            s.scores[g, at, :] += bias - s.z[g, pl.ds(counting.last, 1), :]

        staggered(len(pieces), [products, counts])
        s.cell_span[0] = jnp.where(needs.close(spots) < SUBLANES, MEDIUM, WIDE)
        band.leave(passages)
        if plan.index is not None:
            s.by_group(s.scores, s.all_groups(s.scores) + s.lookups(strip_of(spots)))
        band.by_need(add)

    def count(n: Array) -> Array:
        """Processes counting step n; returns whether there is another."""
        spots = band.spots(n)
        whole = functools.reduce(jnp.logical_and, [spot.whole for spot in spots])
        if plan.index is None:
            masked_or_not(functools.partial(straight, spots), whole, s.cell_span[0] < WIDE)  # span of the previous step
            pl.when(s.cell_span[0] == WIDE)(lambda: bending(spots))

            @pl.when(s.cell_span[0] > NARROW)
            def _() -> None:
                s.wide_steps[0] = jnp.where(s.wide_steps[0] < 0, n, s.wide_steps[0])
                s.wide_steps[1] = n
        else:
            bending(spots)

        for a, spot in enumerate(spots):
            softmax([s.scores[g] for g, _ in spot.groups.apart()], s.start_of(spot.strip), blocks.strip, spot.groups)
            s.limit[a] = jnp.where(spot.here, s.key_block * s.strips + spot.strip, s.limit[a])
        return band.goes_on(n + 1)

    def plain(j: Array, masked: bool) -> None:
        start = pl.multiple_of(j * blocks.keys, blocks.keys)
        scores, constant = logits(start, blocks.keys), s.constant(s.query_extent(), s.key_extent(j))
        if constant is not None:
            scores = scores + constant
        softmax([s.left(scores, start) if masked else scores], start, blocks.keys, every)

    def looking(j: Array, whole: Array) -> None:
        """Processes a tile strip by strip, with T5 lookups."""

        def one(n: Array, _: None) -> None:
            strip = j * plan.per_tile + n
            start = s.start_of(strip)
            scores = logits(start, blocks.strip) + s.lookups(lambda g: strip)
            scores = scores if counting is None else scores + s.last_bias()

            def take(masked: bool) -> None:
                softmax([s.left(scores, start) if masked else scores], start, blocks.strip, every)

            masked_or_not(take, whole)

        jax.lax.fori_loop(0, plan.per_tile, one, None)

    @pl.when(last_block - turn >= first_block)
    def _() -> None:
        if counting is not None:
            begin, _ = band.steps()
            jax.lax.while_loop(lambda x: x[1], lambda x: (x[0] + 1, count(x[0])), (begin, band.goes_on(begin)))
        s.for_tiles(lambda j, whole: s.choose(j, whole, plain, looking))

    @pl.when(turn == pl.num_programs(4) - 1)
    def _() -> None:
        total = s.total[...]
        nothing = total == 0.0
        total = jnp.where(nothing, 1.0, total)
        s.out[...] = (s.sums[...] / total).T.astype(s.out.dtype)
        lse = jnp.where(nothing, -MASK_VALUE, s.highest[...] + jnp.log2(total))
        for g in range(plan.groups):
            s.lse[pl.ds(g, 1), :] = lse[:, g * LANES : (g + 1) * LANES]
            if counting is not None:
                s.out_limit[pl.ds(g, 1), :] = jnp.full((1, LANES), s.limit[g // plan.groups_side_by_side], jnp.int32)
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
                s.out_wide_steps[pl.ds(g, 1), :] = jnp.where(lane == 0, s.wide_steps[0], s.wide_steps[1])
        if counting is not None:
            s.out_high[...], s.out_low[...] = s.high[...], s.low[...]


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
    resident = min(blocks.resident, keys)
    held, turns, tiles = resident // blocks.keys, keys // resident, length // blocks.queries
    scalars = make_scalars(plan, x)
    rows = scalars[0].shape[0] // (tiles * 2)

    def key_block(b, i, r, visits, *_):
        at = ((b if rows > 1 else 0) * tiles + i) * 2
        first, last = blocks_of(visits[at], visits[at + 1], held)
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
    out_specs[0] = pl.BlockSpec((None,) * 3 + (blocks.queries, width), lambda b, k, g, i, r, *_: (b, k, g, i, 0))
    scratch = scratch_of(plan, x) | {
        "highest": pltpu.VMEM((1, blocks.queries), jnp.float32),
        "total": pltpu.VMEM((1, blocks.queries), jnp.float32),
        "sums": pltpu.VMEM((width, blocks.queries), jnp.float32),
    }
    if plan.counting is not None:
        scratch |= {name: pltpu.SMEM((n,), jnp.int32) for name, n in (("cell_span", 1), ("wide_steps", 2))}
    return pl.pallas_call(
        functools.partial(_body, plan, (*names, *outs, *scratch), rows, held),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(batch, kv_heads, group, tiles, turns),
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
