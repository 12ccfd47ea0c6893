"""The backward kernel on TPU: gradients of ``tpu_forward``, walking from the left to the right.

Counts are taken off again strip by strip, from what the forward pass ended with. The gradient of a count reaches the gates of all
keys between its own and the query, so one sum a row is gathered on the way. Keys of one resident block get their gradients in
VMEM, from all queries; where there are several blocks the kernel runs once for each, from the left, and hands the rows' state on.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu_step import (
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
    scratch_of,
    soft,
    soft_slack,
    turned,
)
from posjax.kernels.tpu_tiles import (
    LANES,
    LOG2E,
    NN,
    NT,
    QUARTER,
    SUBLANES,
    TN,
    doubled_gates,
    fine_product,
    gate_slope,
    interpolated,
    joined,
    placed,
    product,
    spans,
    spread,
    spread_within,
    staggered,
    sums_to_the_left,
    sums_to_the_right,
    to_sublanes,
    within,
)
from posjax.typing import Array


def _body(plan: Plan, names: tuple[str, ...], rows: int, *refs: Any) -> None:
    if plan.interpret is None:  # only the shapes of what comes out are asked for
        return
    scalars, scale, block, rest = Scalars(*refs[:5]), refs[5], refs[6], dict(zip(names, refs[7:], strict=True))
    rest = dict.fromkeys(OPTIONAL) | rest
    batch, _, group, tile, _ = (pl.program_id(n) for n in range(5))
    row = batch if rows > 1 else 0
    blocks, counting = plan.blocks, plan.counting
    s = Step(plan, scalars, rest, row, rows, tile, block[0])
    factor = scale[0] * LOG2E

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

    s.prepare_queries()
    s.query_sums[...] = jnp.zeros(s.query_sums.shape, jnp.float32)
    if counting is not None:
        for name in ("high", "low", "gathered"):
            getattr(s, name)[...] = getattr(s, f"in_{name}")[...]
        s.d_z[...] = jnp.zeros(s.d_z.shape, jnp.float32)
        s.d_last[...] = jnp.zeros(s.d_last.shape, jnp.float32)
        for g in range(plan.groups):
            s.first[g] = jnp.min(s.in_ended[pl.ds(g, 1), :])
        s.hasty[0], s.hasty[1] = jnp.min(s.in_hasty[...]), jnp.max(s.in_hasty[...])

    def d_out_of(groups: Groups | None) -> Array:
        return s.d_out[...] if groups is None else s.d_out[groups.lanes, :]

    def products(start: Array, size: int, groups: Groups | None = None) -> tuple[Array, Array]:
        """Scores before any bias, and the gradient of the weights, [s, t]."""
        key, value = s.keys(start, size), s.value[pl.ds(start, size), :]
        exact = key.dtype == jnp.float32
        return product(key, s.queries(groups), NT, exact) * factor, product(value, d_out_of(groups), NT, exact)

    def accumulate(start: Array, size: int, weights: Array, gradient: Array, groups: Groups | None = None) -> None:
        """Adds a piece's part of the gradients of key, value and query."""
        at, key, d_out, queries = pl.ds(start, size), s.keys(start, size), d_out_of(groups), s.queries(groups)
        exact = key.dtype == jnp.float32
        weights, gradient = weights.astype(d_out.dtype), gradient.astype(key.dtype)
        s.value_sums[at, :] += product(weights, d_out, NN, exact)
        s.key_sums[at, :] += product(gradient, queries, NN, exact)
        s.query_sums[:, Groups(0, plan.groups).lanes if groups is None else groups.lanes] += product(key, gradient, TN, exact)

    def into_table(index: Array, gradient: Array) -> None:
        """Adds the sums of gradient [s, 128] over equal indices, which all pairs of a piece have or few differ in."""
        low, high = jnp.min(index), jnp.max(index)

        def add(n: Array, _: None) -> None:
            s.table_sums[n] += to_sublanes(jnp.where(index == n, gradient, 0.0))

        jax.lax.fori_loop(low, high + 1, add, None)

    def weigh(
        scores: Array, d_weights: Array, allowed: Array | None, start: Array, size: int, groups: Groups | None = None
    ) -> tuple[Array, Array]:
        """Weights, and the gradient of the scores, from scores with their counts and lookups in, [s, t]."""
        if plan.penalised:
            scores = scores + s.penalty(start, size, groups)
        scores = soft(plan, scores)
        weights = jnp.exp2(scores - as_row(s.log_sum, groups))
        weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
        gradient = weights * (d_weights - as_row(s.slack, groups))
        return weights, gradient if plan.soft_cap is None else gradient * soft_slack(plan, scores)

    def plain(j: Array, masked: bool) -> None:
        start = pl.multiple_of(j * blocks.keys, blocks.keys)
        scores, d_weights = products(start, blocks.keys)
        queries, keys = s.query_extent(), s.key_extent(j)
        constant = s.constant(queries, keys)
        if constant is not None:
            scores = scores + constant
        allowed = s.pairs(start, blocks.keys) if masked else None
        weights, gradient = weigh(scores, d_weights, allowed, start, blocks.keys)
        if constant is not None:
            sums = gradient.sum(0, keepdims=True)
            for g in range(plan.groups):
                part = sums[:, g * LANES : (g + 1) * LANES]
                if counting is not None:
                    s.d_last[pl.ds(g, 1), :] += part
                if plan.index is not None:
                    s.table_sums[s.common_index(queries, keys), pl.ds(0, 1), :] += part
        accumulate(start, blocks.keys, weights, gradient)

    def straight(strip: Array, masked: bool) -> None:
        """A strip in which no query passes many cells, some groups at a time: fewer wait for each other, more take long to compile,
        which they are worth where they run most."""
        most = math.gcd(plan.groups, 4 if masked else 8)
        step = functools.partial(straight_part, strip, masked)
        jax.lax.fori_loop(0, plan.groups // most, lambda n, _: step(Groups(n * most, most)), None)

    def straight_part(strip: Array, masked: bool, groups: Groups) -> None:
        start, halves = pl.multiple_of(strip * blocks.strip, blocks.strip), blocks.strip // LANES
        passages, live, done = s.passages(groups, back=True), {}, []
        pieces = [(passage, half) for passage in passages for half in range(halves)]
        gathered = [as_row(s.gathered, passage.groups) for passage in passages]
        nodes: dict[Any, Array] = {}

        def begin(n: int) -> None:
            passage, half = pieces[n]
            at = pl.multiple_of(start + half * LANES, LANES)
            logits, d_weights = products(at, LANES, passage.groups)
            allowed = s.pairs(at, LANES, passage.groups) if masked else None
            live[n] = at, allowed, logits, d_weights, doubled_gates(logits, allowed, counting.exact)

        def counts(n: int) -> None:
            live[n] = *live[n], pieces[n][0].through(sums_to_the_right(live[n][-1], counting))

        def gradients(n: int) -> None:
            passage, (at, allowed, logits, d_weights, gates, inside) = pieces[n][0], live[n]
            found = []
            for (g, part), lines in zip(passage.by_group(), passage.windows, strict=True):
                bias, slope = within(lines, inside[:, part], counting)
                seen = None if allowed is None else allowed[:, part]
                weights, gradient = weigh(logits[:, part] + bias, d_weights[:, part], seen, at, LANES, Groups(g, 1))
                rows = [slice(row, row + QUARTER) for row in range(0, LANES, QUARTER)]
                for here in [spread_within(inside[row, part], gradient[row]) for row in rows]:
                    nodes[n // halves, part.start] = nodes.get((n // halves, part.start), 0.0) + here
                found.append((weights.astype(s.value.dtype), gradient, gradient * slope))
            live[n] = gates, *(joined([one[k] for one in found], 1) for k in range(3))

        def finish(n: int) -> None:
            gates, weights, gradient, steps = live.pop(n)
            sums = sums_to_the_left(steps, counting) + gathered[n // halves]
            gathered[n // halves] = sums[LANES - 1 :]
            done.append((weights, (gradient + sums * gate_slope(gates)).astype(s.key.dtype)))

        staggered(len(pieces), [begin, counts, gradients, finish])
        columns = [done[at : at + halves] for at in range(0, len(done), halves)]
        weights, gradient = (joined([joined([piece[k] for piece in one], 0) for one in columns], 1) for k in range(2))
        accumulate(start, blocks.strip, weights, gradient, groups)
        for n, passage in enumerate(passages):
            for g, part in passage.by_group():
                s.gathered[pl.ds(g, 1), :] = gathered[n][:, part]
                s.d_z[g] += placed(nodes[n, part.start], passage.base[:, part], counting)
        s.leave(passages)

    def bending(strip: Array) -> None:
        """The same for any counts, group by group."""
        start, every = pl.multiple_of(strip * blocks.strip, blocks.strip), range(plan.groups)
        logits, d_weights = products(start, blocks.strip)
        allowed = s.pairs(start, blocks.strip)
        scores = logits + s.last_bias()
        scores = scores if plan.index is None else scores + s.lookups(start, strip)
        gates = doubled_gates(logits, allowed, counting.exact)
        s.count(strip, sums_to_the_right(gates, counting), back=True)
        s.by_group(s.scores, scores)
        s.slopes_there[...] = jnp.zeros(s.slopes_there.shape, jnp.float32)

        def add(g: Any, at: Any, few: bool) -> None:
            bias, slope = interpolated(s.positions[g, at, :], s.z[g], s.slope[g], counting, few)
            s.scores[g, at, :] += bias - s.z[g, pl.ds(counting.last, 1), :]
            s.slopes_there[g, at, :] = slope

        def back(g: Any, at: Any, few: bool) -> None:
            where, part, rows = s.positions[g, at, :], s.d_scores[g, at, :], QUARTER if few else SUBLANES
            s.d_z[g] += spread(where, part, rows, jnp.max(spans(where, rows)), counting)
            s.d_last[pl.ds(g, 1), :] -= part.sum(0, keepdims=True)

        s.by_need(add)
        weights, gradient = weigh(s.all_groups(s.scores), d_weights, allowed, start, blocks.strip)
        s.by_group(s.d_scores, gradient)
        total = gradient.sum(0, keepdims=True)
        for g in every:
            s.d_last[pl.ds(g, 1), :] += total[:, g * LANES : (g + 1) * LANES]
        s.by_need(back)
        # Each count's gradient reaches the gates of all keys from its own to the query.
        steps = gradient * s.all_groups(s.slopes_there)
        sums = sums_to_the_left(steps, counting) + as_row(s.gathered)
        for g in every:
            s.gathered[pl.ds(g, 1), :] = sums[blocks.strip - 1 :, g * LANES : (g + 1) * LANES]
        done(start, strip, weights, gradient, gradient + sums * gate_slope(gates))

    def looking(strip: Array, masked: bool) -> None:
        """A strip with lookups alone."""
        start = pl.multiple_of(strip * blocks.strip, blocks.strip)
        logits, d_weights = products(start, blocks.strip)
        allowed = s.pairs(start, blocks.strip) if masked else None
        done(start, strip, *weigh(logits + s.lookups(start, strip), d_weights, allowed, start, blocks.strip))

    def detailed_strip(strip: Array, whole: Array) -> None:
        if counting is None:
            masked_or_not(functools.partial(looking, strip), whole)
        elif plan.index is None:
            number = s.key_block * (s.key.shape[0] // blocks.strip) + strip
            hasty = (number >= s.hasty[0]) & (number <= s.hasty[1])
            masked_or_not(functools.partial(straight, strip), whole, ~hasty)
            pl.when(hasty)(lambda: bending(strip))
        else:
            bending(strip)

    def done(start: Array, strip: Array, weights: Array, gradient: Array, d_logits: Array | None = None) -> None:
        """Hands on the gradient of a strip's scores, and that of its logits where gates have added to it."""
        if plan.index is not None:
            s.by_group(s.d_found, gradient)

            def one_group(g: Array, _: None) -> None:
                into_table(s.index_of(start, blocks.strip, g), s.d_found[g])

            jax.lax.fori_loop(0, plan.groups, one_group, None)
        accumulate(start, blocks.strip, weights, gradient if d_logits is None else d_logits)

    def detailed(j: Array, whole: Array) -> None:
        strips = blocks.keys // blocks.strip
        jax.lax.fori_loop(0, strips, lambda n, _: detailed_strip(j * strips + n, whole), None)

    def visit(j: Array, _: None) -> None:
        queries, keys = s.query_extent(), s.key_extent(j)
        fine = jnp.zeros((), bool)
        if counting is not None:
            for g in range(plan.groups):
                fine |= (s.first_tile() + j >= s.first[g]) & ~plan.rules.none(s.group_extent(g), keys)
        if plan.index is not None:
            fine |= ~s.is_uniform(queries, keys)
        s.choose(j, fine, plain, detailed)

    jax.lax.fori_loop(*s.visits(), visit, None)

    sums = s.query_sums[...].T
    s.d_scale[...] += (sums * s.queries().astype(jnp.float32)).sum(0, keepdims=True)
    d_query = sums * scale[0]
    if s.query_turn is not None:
        d_query = turned(d_query, s.query_turn, s.partner[...], back=True)
    if counting is not None:
        s.d_z[:, pl.ds(counting.last, 1), :] += s.d_last[...][:, None, :]
        counted = (s.query if s.counted_query is None else s.counted_query)[...]
        gradient = s.all_groups(s.d_z)
        s.d_embedding[...] += fine_product(gradient, counted, NN, counting.exact)
        more = fine_product(gradient, s.embedding[0], TN, counting.exact)
        if s.counted_query is None:
            d_query += more
        else:
            s.d_counted_query[...] = more.astype(s.d_counted_query.dtype)
        for name in ("high", "low", "gathered"):
            getattr(s, f"out_{name}")[...] = getattr(s, name)[...]
    s.d_query[...] = d_query.astype(s.d_query.dtype)
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


def backward(plan: Plan, x: Operands, saved: tuple[Array, ...], d_out: Array, slack: Array) -> dict[str, Array]:
    """Gradients by the names of the operands, ``table`` and ``embedding`` by head, ``scale`` by head and channel.

    Args:
      plan, x: of ``forward``.
      saved: what ``forward`` returned after out.
      d_out: [B, K, G, T, V].
      slack: sum of d_out * out over V, in the layout of rows, [B, K, G, I, t / 128, 128].
    """
    turns = x.key.shape[2] // min(plan.blocks.resident, x.key.shape[2])
    state = (*saved[1:], jnp.zeros_like(saved[0])) if plan.counting is not None else ()
    call = functools.partial(_backward_of_block, plan, x, saved[0], d_out, slack)
    if turns == 1:
        return call(x.query.dtype, jnp.zeros(1, jnp.int32), state)[0]
    blocks = jnp.arange(turns, dtype=jnp.int32)[:, None]
    call = functools.partial(call, jnp.float32)
    by_key = ("key", "value")

    def one(carry: Any, block: Array) -> Any:
        state, sums = carry
        found, state = call(block, state)
        return (state, {name: sums[name] + found[name] for name in sums}), [found[name] for name in by_key]

    shapes = jax.eval_shape(call, blocks[0], state)[0]
    sums = {name: jnp.zeros(a.shape, a.dtype) for name, a in shapes.items() if name not in by_key}
    (_, sums), found = jax.lax.scan(one, (state, sums), blocks)
    joined = [jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1]) for a in found]
    return sums | dict(zip(by_key, joined, strict=True))


def _backward_of_block(
    plan: Plan, x: Operands, log_sum: Array, d_out: Array, slack: Array, dtype: Any, block: Array, state: tuple[Array, ...]
) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """The gradients that come from one resident block of keys, those of queries in ``dtype``, and the state for the next."""
    batch, kv_heads, group, length, width = x.query.shape
    blocks, counting = plan.blocks, plan.counting
    resident, tiles = min(blocks.resident, x.key.shape[2]), length // blocks.queries
    scalars = make_scalars(plan, x)
    rows = scalars[1].shape[0] // (tiles * 4)
    names, arrays, specs = inputs_of(plan, x, lambda b, i, r, *scalars: scalars[6][0])
    by_tile = (batch, kv_heads, group, tiles, plan.groups, LANES)
    row_spec = pl.BlockSpec((None,) * 4 + by_tile[4:], lambda b, k, g, i, r, *_: (b, k, g, i, 0, 0))
    row_arrays = {"log_sum": log_sum, "slack": slack}
    if counting is not None:
        row_arrays |= dict(zip(("in_high", "in_low", "in_ended", "in_hasty", "in_gathered"), state, strict=True))

    def by_query(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None,) * 3 + (blocks.queries, array.shape[-1]), lambda b, k, g, i, r, *_: (b, k, g, i, 0))

    def by_head(shape: tuple) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        whole = jax.ShapeDtypeStruct((batch, kv_heads, group, *shape), jnp.float32)
        return whole, pl.BlockSpec((None,) * 3 + shape, lambda b, k, g, *_: (b, k, g) + (0,) * len(shape))

    def by_key(array: Array) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (batch, kv_heads, resident, array.shape[-1])
        return jax.ShapeDtypeStruct(shape, array.dtype), pl.BlockSpec((None, None, *shape[2:]), lambda b, k, *_: (b, k, 0, 0))

    outs = {
        "d_query": (jax.ShapeDtypeStruct(x.query.shape, dtype), by_query(x.query)),
        "d_key": by_key(x.key),
        "d_value": by_key(x.value),
        "d_scale": by_head((1, width)),
    }
    if counting is not None:
        outs["d_embedding"] = by_head(x.embedding.shape[3:])
        if x.counted_query is not None:
            outs["d_counted_query"] = jax.ShapeDtypeStruct(x.counted_query.shape, dtype), by_query(x.counted_query)
        outs |= {f"out_{name}": (jax.ShapeDtypeStruct(by_tile, jnp.float32), row_spec) for name in ("high", "low", "gathered")}
    if plan.index is not None:
        outs["d_table"] = by_head((LANES, LANES))
    scratch = scratch_of(plan, x) | {
        "key_sums": pltpu.VMEM((resident, width), jnp.float32),
        "value_sums": pltpu.VMEM((resident, x.value.shape[-1]), jnp.float32),
        "query_sums": pltpu.VMEM((width, blocks.queries), jnp.float32),
    }
    if counting is not None:
        scratch |= {name: pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32) for name in ("d_scores", "slopes_there")}
        scratch["d_z"] = pltpu.VMEM((plan.groups, counting.rows, LANES), jnp.float32)
        scratch |= {name: pltpu.VMEM((plan.groups, LANES), jnp.float32) for name in ("gathered", "d_last")}
        scratch |= {name: pltpu.SMEM((n,), jnp.int32) for name, n in (("first", plan.groups), ("hasty", 2))}
    if plan.index is not None:
        scratch["d_found"] = pltpu.VMEM((plan.groups, blocks.strip, LANES), jnp.float32)
        scratch["table_sums"] = pltpu.VMEM((LANES, SUBLANES, LANES), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_body, plan, (*names, "d_out", *row_arrays, *outs, *scratch), rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(batch, kv_heads, group, tiles, 1),
            in_specs=[*specs, by_query(d_out), *[row_spec] * len(row_arrays)],
            out_specs=[spec for _, spec in outs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=plan.interpret,
        name="posjax_attention_backward",
    )(*scalars, x.scale, block, *arrays, d_out, *row_arrays.values())
    found = dict(zip(outs, found, strict=True))
    state = tuple(found.pop(f"out_{name}") for name in ("high", "low", "gathered")) if counting is not None else ()
    if counting is not None:
        state = (*state[:2], row_arrays["in_ended"], row_arrays["in_hasty"], state[2])
    return {name.removeprefix("d_"): array for name, array in found.items()}, state
