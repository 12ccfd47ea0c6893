"""Attention on TPU, backward: the gradients of ``forward.py``, walking through the counting region from the left to the right.

Starting from the counts at the end of the forward pass, each step subtracts its gates again. The gradient of a count reaches the
gates of all keys from the count's key to the query, so each row accumulates one sum on the way (``gathered``). The gradients of the
keys of one resident block accumulate in VMEM over all queries. Where there are several blocks, the kernel runs once for each, from
the left, and passes the state of the rows on.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.tpu.band import CountingRegion, GatherWorklist, QueryGroupState, StripCursor, for_each, strip_of
from posjax.attention.backends.tpu.step import (
    OPTIONAL,
    Groups,
    Operands,
    Plan,
    Scalars,
    Step,
    as_row,
    inputs_of,
    make_scalars,
    masked_or_not,
    queries_of,
    scratch_of,
    soft,
    soft_cap_derivative,
    turned,
)
from posjax.attention.backends.tpu.tiles import (
    FEW,
    LANES,
    LOG2E,
    MASK_VALUE,
    NN,
    NT,
    QUARTER,
    SUBLANES,
    TN,
    cells_passed,
    doubled_gates,
    gate_slope,
    interpolated,
    joined,
    matmul_bf16x3,
    placed,
    product,
    spans,
    spread,
    spread_beyond,
    spread_widely,
    spread_within,
    staggered,
    sums_to_the_left,
    sums_to_the_right,
    to_sublanes,
    within,
)
from posjax.typing import Array


def _body(plan: Plan, names: tuple[str, ...], rows: int, *refs: Any) -> None:
    if plan.interpret is None:  # only the shapes of the results are needed
        return
    scalars, scale, block, rest = Scalars(*refs[:6]), refs[6], refs[7], dict(zip(names, refs[8:], strict=True))
    rest = dict.fromkeys(OPTIONAL) | rest
    batch, head, group, tile, _ = (pl.program_id(n) for n in range(5))
    row = batch if rows > 1 else 0
    blocks, counting = plan.blocks, plan.counting
    s = Step(plan, scalars, rest, row, rows, tile, block[0])
    band = CountingRegion(s, lambda a: s.limit[a], back=True)
    factor, every = scale[0] * LOG2E, Groups(0, plan.groups)

    @pl.when((group == 0) & (tile == 0))
    def _() -> None:
        if plan.turn_keys:
            s.prepare_keys()
        s.key_sums[...] = jnp.zeros(s.key_sums.shape, jnp.float32)
        s.value_sums[...] = jnp.zeros(s.value_sums.shape, jnp.float32)

    @pl.when(tile == 0)
    def _() -> None:
        s.d_scale[...] = jnp.zeros(s.d_scale.shape, jnp.float32)
        if counting is not None:
            s.d_embedding[...] = jnp.zeros(s.d_embedding.shape, jnp.float32)
        if plan.index is not None:
            s.table_sums[...] = jnp.zeros(s.table_sums.shape, jnp.float32)

    arriving = {}  # copies of earlier gradients to the output blocks that receive the sums
    for n, name in enumerate(name for name in ("query", "counted_query") if f"before_{name}" in rest):
        rows_here = pl.ds(pl.multiple_of(tile * blocks.queries, blocks.queries), blocks.queries)
        before = rest[f"before_{name}"].at[batch, head, group, rows_here]
        arriving[name] = pltpu.make_async_copy(before, rest[f"d_{name}"].at[0, 0, 0], s.arrivals.at[n])
        arriving[name].start()
    s.prepare_queries()
    s.query_sums[...] = jnp.zeros(s.query_sums.shape, jnp.float32)
    if counting is not None:
        for name in ("high", "low", "gathered"):
            getattr(s, name)[...] = getattr(s, f"in_{name}")[...]
        s.d_z[...] = jnp.zeros(s.d_z.shape, jnp.float32)
        s.d_last[...] = jnp.zeros(s.d_last.shape, jnp.float32)
        for a in range(band.passages):
            s.limit[a] = jnp.min(s.in_limit[pl.ds(a * plan.groups_side_by_side, 1), :])
        s.wide_steps[0], s.wide_steps[1] = jnp.min(s.in_wide_steps[...]), jnp.max(s.in_wide_steps[...])

    def products(start: Array, size: int, groups: Groups) -> tuple[Array, Array]:
        """Computes the scores before any bias and the gradient of the weights, [s, t] each."""
        key, value = s.keys(start, size), s.value[pl.ds(start, size), :]
        exact = key.dtype == jnp.float32
        return product(key, s.queries(groups), NT, exact) * factor, product(value, s.d_out[groups.lanes, :], NT, exact)

    def accumulate(start: Array, size: int, weights: Array, gradient: Array, groups: Groups) -> None:
        """Adds the contribution of a piece to the gradients of key, value and query."""
        at, key, d_out, queries = pl.ds(start, size), s.keys(start, size), s.d_out[groups.lanes, :], s.queries(groups)
        exact = key.dtype == jnp.float32
        weights, gradient = weights.astype(d_out.dtype), gradient.astype(key.dtype)
        s.value_sums[at, :] += product(weights, d_out, NN, exact)
        s.key_sums[at, :] += product(gradient, queries, NN, exact)
        s.query_sums[:, groups.lanes] += product(key, gradient, TN, exact)

    def into_table(index: Array, gradient: Array) -> None:
        """Adds to the gradient of the table: sums gradient [s, 128] over equal indices, of which a piece has one or a few."""
        low, high = jnp.min(index), jnp.max(index)

        def add(n: Array, _: None) -> None:
            s.table_sums[n] += to_sublanes(jnp.where(index == n, gradient, 0.0))

        jax.lax.fori_loop(low, high + 1, add, None)

    def weigh(scores: Array, d_weights: Array, start: Array, size: int, groups: Groups) -> tuple[Array, Array]:
        """Computes the weights and the gradient of the scores, [s, t] each, from scores that include CoPE and T5 biases."""
        if plan.penalised:
            scores = scores + s.penalty(start, size, groups)
        scores = soft(plan, scores)
        weights = jnp.exp2(scores - as_row(s.lse, groups))
        gradient = weights * (d_weights - as_row(s.delta, groups))
        return weights, gradient if plan.soft_cap is None else gradient * soft_cap_derivative(plan, scores)

    def plain(j: Array, masked: bool) -> None:
        start = pl.multiple_of(j * blocks.keys, blocks.keys)
        scores, d_weights = products(start, blocks.keys, every)
        queries, keys = s.query_extent(), s.key_extent(j)
        constant = s.constant(queries, keys)
        if constant is not None:
            scores = scores + constant
        scores = s.left(scores, start) if masked else scores
        weights, gradient = weigh(scores, d_weights, start, blocks.keys, every)
        if constant is not None:
            sums = gradient.sum(0, keepdims=True)
            if counting is not None:
                past_last(sums)
            if plan.index is not None:
                for _, part in every.apart():
                    s.table_sums[s.common_index(queries, keys), pl.ds(0, 1), :] += sums[:, part]
        accumulate(start, blocks.keys, weights, gradient, every)

    def past_last(sums: Array) -> None:
        """Adds sums [1, t] of the bias gradients of saturated counts to the gradient of the last position."""
        for g, part in every.apart():
            s.d_last[pl.ds(g, 1), :] += sums[:, part]

    def straight(n: Array, masked: bool) -> None:
        """Processes a step in which no query crosses many cells, several pairs of query groups at a time.

        With few pairs, operations wait for each other; many take long to compile, which pays off in the code without a mask, which
        runs most.
        """
        most = math.gcd(band.passages, (4 if masked else 8) // plan.groups_side_by_side)
        part = functools.partial(straight_part, masked)
        turns = band.passages // most
        jax.lax.fori_loop(0, turns, lambda turn, _: part([band.spot(n, turn * most + a) for a in range(most)]), None)

    def straight_part(masked: bool, spots: list[StripCursor]) -> None:
        passages, quarters = [band.passage(spot) for spot in spots], range(0, LANES, QUARTER)
        pieces, live, begin, finish, hand_on = pieces_of(passages, masked)
        beyond: list[list[Array]] = [[] for _ in range(0, blocks.strip, QUARTER)]

        def counts(n: int) -> None:
            live[n] = *live[n], pieces[n][0].through(sums_to_the_right(live[n][-1], counting))

        def gradients(n: int) -> None:
            (passage, half), (at, logits, d_weights, gates, piece) = pieces[n], live[n]
            found, rows = [], pl.ds(half * LANES, LANES)
            for (g, part), lines in zip(passage.spot.groups.apart(), piece.windows, strict=True):
                inside = piece.inside[:, part]
                bias, slope = within(lines, inside, counting)
                weights, gradient = weigh(logits[:, part] + bias, d_weights[:, part], at, LANES, Groups(g, 1))
                nodes = [spread_within(inside[row : row + QUARTER], gradient[row : row + QUARTER]) for row in quarters]
                s.d_z[g] += placed(functools.reduce(jnp.add, nodes), piece.base[:, part], counting)
                s.positions[g, rows, :], s.d_scores[g, rows, :] = inside, gradient
                s.bases[g, pl.ds(half, 1), :] = piece.base[:, part]
                for row in quarters:
                    beyond[(half * LANES + row) // QUARTER].append(cells_passed(inside[row : row + QUARTER]) > FEW)
                found.append((weights.astype(s.value.dtype), gradient, gradient * slope))
            live[n] = gates, *(joined([one[k] for one in found], 1) for k in range(3))

        def more(quarter: Array, n: Array) -> None:
            g, at = spots[0].groups.first + n, pl.ds(pl.multiple_of(quarter * QUARTER, QUARTER), QUARTER)
            inside, base = s.positions[g, at, :], s.bases[g, pl.ds(jax.lax.div(quarter, np.int32(LANES // QUARTER)), 1), :]
            nodes = spread_beyond(inside, s.d_scores[g, at, :], jnp.max(cells_passed(inside)).astype(jnp.int32))
            s.d_z[g] += placed(nodes, base, counting)

        staggered(len(pieces), [begin, counts, gradients, finish, hand_on])
        for_each(beyond, more)
        band.leave(passages)

    def pieces_of(passages: list[QueryGroupState], masked: bool) -> tuple[list, dict, Any, Any, Any]:
        """Returns the strips in pieces of 128 keys, left to right, a dict of values per piece, and the first and last stages.

        ``begin`` stores (start of the keys, logits, gradient of weights, gates) in the dict; ``finish`` and ``hand_on`` expect
        (gates, weights, gradient of scores, gradient of counts) there.
        """
        halves, live, spots = blocks.strip // LANES, {}, [passage.spot for passage in passages]
        gathered = [as_row(s.gathered, spot.groups) for spot in spots]
        pieces = [(passage, half) for passage in passages for half in range(halves)]

        def begin(n: int) -> None:
            spot, half = pieces[n][0].spot, pieces[n][1]
            at = pl.multiple_of(s.start_of(spot.strip) + half * LANES, LANES)
            logits, d_weights = products(at, LANES, spot.groups)
            if masked:
                logits = jnp.where(s.pairs(at, LANES, spot.groups, spot.here), logits, MASK_VALUE)
            live[n] = at, logits, d_weights, doubled_gates(logits, counting.exact)

        def finish(n: int) -> None:
            """Adds the gradients through the gates: that of a count reaches the gates of all keys from its own to the query."""
            gates, weights, gradient, steps = live[n]
            sums = sums_to_the_left(steps, counting) + gathered[n // halves]
            gathered[n // halves] = sums[LANES - 1 :]
            live[n] = weights, (gradient + sums * gate_slope(gates)).astype(s.key.dtype)

        def hand_on(n: int) -> None:
            a, half = divmod(n, halves)
            if half == halves - 1:
                weights, gradient = (joined([live[n - half + m][k] for m in range(halves)], 0) for k in range(2))
                accumulate(s.start_of(spots[a].strip), blocks.strip, weights, gradient, spots[a].groups)
                for g, part in spots[a].groups.apart():
                    s.gathered[pl.ds(g, 1), :] = gathered[a][:, part]

        return pieces, live, begin, finish, hand_on

    def bending(spots: list[StripCursor]) -> None:
        """Processes a step for any counts, group by group."""
        passages, last, needs = [band.passage(spot) for spot in spots], s.last_bias(), GatherWorklist(band)
        pieces, live, begin, finish, hand_on = pieces_of(passages, True)

        def counts(n: int) -> None:
            (passage, half), (at, logits, d_weights, gates) = pieces[n], live[n]
            needs.note(passage.spot, half, passage.past(sums_to_the_right(gates, counting)))
            live[n] = at, d_weights, gates
            for g, part in passage.spot.groups.apart():
                rows = pl.ds(half * LANES, LANES)
                s.scores[g, rows, :] = logits[:, part] + last[:, g * LANES : (g + 1) * LANES]
                s.slopes_there[g, rows, :] = jnp.zeros((LANES, LANES), jnp.float32)

        def add(g: Any, at: Any, few: bool) -> None:
            bias, slope = interpolated(s.positions[g, at, :], s.z[g], s.slope[g], counting, few)
            s.scores[g, at, :] += bias - s.z[g, pl.ds(counting.last, 1), :]
            s.slopes_there[g, at, :] = slope

        def gradients(n: int) -> None:
            (passage, half), (at, d_weights, gates) = pieces[n], live[n]
            rows, found = pl.ds(half * LANES, LANES), []
            for g, part in passage.spot.groups.apart():
                weights, gradient = weigh(s.scores[g, rows, :], d_weights[:, part], at, LANES, Groups(g, 1))
                s.d_scores[g, rows, :] = gradient
                s.d_last[pl.ds(g, 1), :] += gradient.sum(0, keepdims=True)
                found.append((weights.astype(s.value.dtype), gradient, gradient * s.slopes_there[g, rows, :]))
            live[n] = gates, *(joined([one[k] for one in found], 1) for k in range(3))

        def back(g: Any, at: Any, few: bool) -> None:
            where, part = s.positions[g, at, :], s.d_scores[g, at, :]
            if few:
                s.d_z[g] += spread(where, part, jnp.max(spans(where)), counting)
            else:
                s.d_z[g] += spread_widely(s.positions.at[g, at], s.d_scores.at[g, at], counting)
            s.d_last[pl.ds(g, 1), :] -= part.sum(0, keepdims=True)

        staggered(len(pieces), [begin, counts])
        needs.close(spots)
        if plan.index is not None:
            s.by_group(s.scores, s.all_groups(s.scores) + s.lookups(strip_of(spots)))
        band.by_need(add)
        staggered(len(pieces), [gradients, finish, hand_on])
        band.by_need(back)
        if plan.index is not None:
            into_tables(strip_of(spots))
        band.leave(passages)

    def uncount(n: Array) -> None:
        """Processes counting step n."""
        spots = band.spots(n)
        if plan.index is None:
            wide_steps = (n >= s.wide_steps[0]) & (n <= s.wide_steps[1])
            whole = functools.reduce(jnp.logical_and, [spot.whole for spot in spots])
            masked_or_not(functools.partial(straight, n), whole, ~wide_steps)
            pl.when(wide_steps)(lambda: bending(spots))
        else:
            bending(spots)

    def looking(j: Array, whole: Array) -> None:
        """Processes a tile strip by strip, with T5 lookups."""

        def one(n: Array, _: None) -> None:
            strip = j * plan.per_tile + n
            masked_or_not(functools.partial(look, strip), whole)

        jax.lax.fori_loop(0, plan.per_tile, one, None)

    def look(strip: Array, masked: bool) -> None:
        start = s.start_of(strip)
        scores, d_weights = products(start, blocks.strip, every)
        scores = scores + s.lookups(lambda g: strip)
        scores = scores if counting is None else scores + s.last_bias()
        scores = s.left(scores, start) if masked else scores
        weights, gradient = weigh(scores, d_weights, start, blocks.strip, every)
        if counting is not None:
            past_last(gradient.sum(0, keepdims=True))
        s.by_group(s.d_scores, gradient)
        into_tables(lambda g: strip)
        accumulate(start, blocks.strip, weights, gradient, every)

    def into_tables(strip_of: Any) -> None:
        """Adds ``d_scores`` of each query group g, in its strip ``strip_of(g)``, to the gradient of the table."""
        jax.lax.fori_loop(0, plan.groups, lambda g, _: into_table(s.index_of(strip_of(g), g), s.d_scores[g]), None)

    s.for_tiles(lambda j, whole: s.choose(j, whole, plain, looking))
    if counting is not None:
        begin, end = band.steps()
        jax.lax.fori_loop(0, end - begin, lambda n, _: uncount(end - 1 - n), None)

    def write(name: str, gradient: Array) -> None:
        out = rest[f"d_{name}"].at[0, 0, 0]
        if name in arriving:
            arriving[name].wait()
            gradient = out[...] + gradient
        out[...] = gradient.astype(out.dtype)

    sums = s.query_sums[...].T
    s.d_scale[...] += (sums * s.queries().astype(jnp.float32)).sum(0, keepdims=True)
    d_query = sums * scale[0]
    if s.query_turn is not None:
        d_query = turned(d_query, s.query_turn, s.partner[...], back=True)
    if counting is not None:
        s.d_z[:, pl.ds(counting.last, 1), :] += s.d_last[...][:, None, :]
        counted = (s.query if s.counted_query is None else s.counted_query)[...]
        gradient = s.all_groups(s.d_z)
        s.d_embedding[...] += matmul_bf16x3(gradient, counted, NN, counting.exact)
        more = matmul_bf16x3(gradient, s.embedding[0], TN, counting.exact)
        if s.counted_query is None:
            d_query += more
        else:
            write("counted_query", more)
        for name in ("high", "low", "gathered"):
            getattr(s, f"out_{name}")[...] = getattr(s, name)[...]
    write("query", d_query)
    if plan.index is not None:

        @pl.when(tile == pl.num_programs(3) - 1)
        def _() -> None:
            s.d_table[...] = s.table_sums[...].sum(1)

    @pl.when((group == pl.num_programs(2) - 1) & (tile == pl.num_programs(3) - 1))
    def _() -> None:
        s.d_value[...] = s.value_sums[...].astype(s.d_value.dtype)
        size = blocks.keys

        def finish(n: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(n * size, size), size)
            d_key = s.key_sums[at, :] * scale[0]
            if plan.turn_keys:
                d_key = turned(d_key, (s.key_turn[0, at, :], s.key_turn[1, at, :]), s.partner[...], back=True)
            s.d_key[at, :] = d_key.astype(s.d_key.dtype)

        jax.lax.fori_loop(0, s.key.shape[0] // size, finish, None)


def backward(
    plan: Plan,
    x: Operands,
    saved: tuple[Array, ...],
    d_out: Array,
    delta: Array,
    gathered: Array | None = None,
    is_part: bool = False,
    so_far: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Runs the backward kernel, once for each resident block of keys.

    Args:
      plan, x: as in ``forward``.
      saved: the results of ``forward`` after the output.
      d_out: [B, K, G, T, V], the gradient of the output.
      delta: sum of d_out * out over V, in the layout of rows, [B, K, G, I, t / 128, 128].
      gathered: the gradient of the counts that this call hands on, in the same layout, from keys to the left in other calls; None:
        zero.
      is_part: whether the gradients will be summed with those of other calls, and are thus float32.
      so_far: with ``is_part``, float32 gradients of the queries from other calls, by name, to which those of this call are added in
        place; None: zero.

    Returns:
      The gradients by the names of the operands, ``table`` and ``embedding`` by head, ``scale`` by head and channel; with CoPE also
      ``gathered``, the gradient of the counts that this call received.
    """
    turns = x.key.shape[2] // min(plan.blocks.resident, x.key.shape[2])
    state = (*saved[1:], jnp.zeros_like(saved[0]) if gathered is None else gathered) if plan.counting is not None else ()
    x = dataclasses.replace(x, high=None, low=None)  # the walk begins at the left, with the counts in ``saved``
    call = functools.partial(_backward_of_block, plan, x, saved[0], d_out, delta, is_part)
    if (turns > 1 or is_part) and not so_far:
        so_far = {name: jnp.zeros(getattr(x, name).shape, jnp.float32) for name in queries_of(x)}
    if turns == 1:
        found, state = call(jnp.zeros(1, jnp.int32), state, so_far or {})
        return found | (dict(gathered=state[-1]) if state else {})
    blocks = jnp.arange(turns, dtype=jnp.int32)[:, None]
    by_key = ("key", "value")

    def one(carry: Any, block: Array) -> Any:
        state, so_far, sums = carry
        found, state = call(block, state, so_far)
        of_keys, of_queries = ([found.pop(name) for name in names] for names in (by_key, so_far))
        return (state, dict(zip(so_far, of_queries, strict=True)), jax.tree.map(jnp.add, sums, found)), of_keys

    shapes = jax.eval_shape(call, blocks[0], state, so_far)[0]
    sums = {name: jnp.zeros(a.shape, a.dtype) for name, a in shapes.items() if name not in (*by_key, *so_far)}
    (state, so_far, sums), found = jax.lax.scan(one, (state, so_far, sums), blocks)
    joined = [jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1]) for a in found]
    return so_far | sums | dict(zip(by_key, joined, strict=True)) | (dict(gathered=state[-1]) if state else {})


def _backward_of_block(
    plan: Plan,
    x: Operands,
    lse: Array,
    d_out: Array,
    delta: Array,
    is_part: bool,
    block: Array,
    state: tuple[Array, ...],
    so_far: dict[str, Array],
) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Computes the gradients from one resident block of keys, adding those of queries to ``so_far``, and the state for the next."""
    batch, kv_heads, group, length, width = x.query.shape
    blocks, counting = plan.blocks, plan.counting
    resident, tiles = min(blocks.resident, x.key.shape[2]), length // blocks.queries
    scalars = make_scalars(plan, x)
    rows = scalars[0].shape[0] // (tiles * 2)
    names, arrays, specs = inputs_of(plan, x, lambda b, i, r, *scalars: scalars[7][0])
    by_tile = (batch, kv_heads, group, tiles, plan.groups, LANES)
    row_spec = pl.BlockSpec((None,) * 4 + by_tile[4:], lambda b, k, g, i, r, *_: (b, k, g, i, 0, 0))
    row_arrays = {"lse": lse, "delta": delta}
    if counting is not None:
        row_arrays |= dict(zip(("in_high", "in_low", "in_limit", "in_wide_steps", "in_gathered"), state, strict=True))

    def at_query(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None,) * 3 + (blocks.queries, array.shape[-1]), lambda b, k, g, i, r, *_: (b, k, g, i, 0))

    def by_head(shape: tuple) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        whole = jax.ShapeDtypeStruct((batch, kv_heads, group, *shape), jnp.float32)
        return whole, pl.BlockSpec((None,) * 3 + shape, lambda b, k, g, *_: (b, k, g) + (0,) * len(shape))

    def by_key(array: Array) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (batch, kv_heads, resident, array.shape[-1])
        made = jax.ShapeDtypeStruct(shape, jnp.float32 if is_part else array.dtype)
        return made, pl.BlockSpec((None, None, *shape[2:]), lambda b, k, *_: (b, k, 0, 0))

    def of_queries(name: str) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        array = getattr(x, name)
        spec = at_query(array)
        spec = pl.BlockSpec((1, 1, 1, *spec.block_shape[3:]), spec.index_map)  # the target of an async copy needs all axes
        return jax.ShapeDtypeStruct(array.shape, jnp.float32 if so_far else array.dtype), spec

    outs = {
        **{f"d_{name}": of_queries(name) for name in queries_of(x)},
        "d_key": by_key(x.key),
        "d_value": by_key(x.value),
        "d_scale": by_head((1, width)),
    }
    if counting is not None:
        outs["d_embedding"] = by_head(x.embedding.shape[3:])
        outs |= {f"out_{name}": (jax.ShapeDtypeStruct(by_tile, jnp.float32), row_spec) for name in ("high", "low", "gathered")}
    if plan.index is not None:
        outs["d_table"] = by_head((LANES, LANES))
    scratch = scratch_of(plan, x) | {
        "key_sums": pltpu.VMEM((resident, width), jnp.float32),
        "value_sums": pltpu.VMEM((resident, x.value.shape[-1]), jnp.float32),
        "query_sums": pltpu.VMEM((width, blocks.queries), jnp.float32),
    }
    if counting is not None:
        scratch["bases"] = pltpu.VMEM((plan.groups, blocks.strip // LANES, LANES), jnp.int32)
        scratch["slopes_there"] = pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32)
        scratch["d_z"] = pltpu.VMEM((plan.groups, counting.rows, LANES), jnp.float32)
        scratch |= {name: pltpu.VMEM((plan.groups, LANES), jnp.float32) for name in ("gathered", "d_last")}
        scratch["wide_steps"] = pltpu.SMEM((2,), jnp.int32)
    if plan.index is not None or counting is not None:
        scratch["d_scores"] = pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32)
    if plan.index is not None:
        scratch["table_sums"] = pltpu.VMEM((LANES, SUBLANES, LANES), jnp.float32)
    before = {f"before_{name}": array for name, array in so_far.items()}
    if before:
        scratch["arrivals"] = pltpu.SemaphoreType.DMA((len(before),))
    first = len(scalars) + 2 + len(names) + 1 + len(row_arrays)  # index of the first of ``before`` among the kernel's arguments
    found = pl.pallas_call(
        functools.partial(_body, plan, (*names, "d_out", *row_arrays, *before, *outs, *scratch), rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(batch, kv_heads, group, tiles, 1),
            in_specs=[*specs, at_query(d_out), *[row_spec] * len(row_arrays), *[pl.BlockSpec(memory_space=pl.ANY)] * len(before)],
            out_specs=[spec for _, spec in outs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=plan.interpret,
        input_output_aliases={first + n: list(outs).index(f"d_{name}") for n, name in enumerate(so_far)},
        name="posjax_attention_backward",
    )(*scalars, x.scale, block, *arrays, d_out, *row_arrays.values(), *before.values())
    found = dict(zip(outs, found, strict=True))
    state = tuple(found.pop(f"out_{name}") for name in ("high", "low", "gathered")) if counting is not None else ()
    if counting is not None:
        state = (*state[:2], row_arrays["in_limit"], row_arrays["in_wide_steps"], state[2])
    return {name.removeprefix("d_"): array for name, array in found.items()}, state
