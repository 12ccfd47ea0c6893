"""Attention on NVIDIA GPUs through Pallas-Triton, forward and backward, from Ampere on.

    forward         one program per query tile: first the band of keys that are counted, from the diagonal to the left, until all
                    counts have reached the last position; then the remaining keys, where the bias of CoPE is one number per row
    query, plain    the gradient of a query tile from the keys that were not counted
    key, plain      the gradients of a key tile from the same pairs, for all query heads that share it
    query, band     the gradient of a query tile from the keys that were counted, and of its products with the embedding; it walks
                    from left to right, subtracts the gates from the counts, and records the state of each row at every strip
    key, band       the gradients of a strip of keys from these records

Each sum is accumulated by one program in a fixed order, so two runs agree bit for bit. The records would grow with the square of
the sequence length where gates are near zero. The two band kernels therefore alternate, ``ROUND`` strips at a time, from the left.
With gates of one half or more, CoPE of 64 positions takes one round.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.gpu.plan import Operands, Plan, Visits, below
from posjax.attention.backends.gpu.scores import Rows, biased, capped, ends_of, gradient_of, hidden, masked_scores, walk, weights_of
from posjax.attention.backends.gpu.tiles import (
    Channels,
    Counts,
    ScoreLayout,
    added,
    counted,
    gates_of,
    inner,
    interpolated,
    keys_of,
    pieces_of,
    put,
    rows_of,
    taken,
    two_sum,
    zeros_like,
)
from posjax.typing import Array

ROUND = 32  # strips of keys that a query tile records at a time


# Forward -----------------------------------------------------------------------------------------------------------------


def _forward(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:  # only the output shapes are needed
        return
    r, blocks, score_layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(turned=False)
    first, plain, detailed, last = (r.by_queries[n] for n in range(4))
    rows = rows_of(plan, r, 0, blocks.queries)
    query, factor = taken(r.query, slice(None)), r.scale[0] * LOG2E
    height = None if plan.last is None else lambda n: r.z[rows.number, n]

    def logits(start: Any, size: int) -> Array:
        return inner(plan, query, taken(r.key, pl.ds(start, size))) * factor

    def softmax(kept: tuple[Array, ...], scores: Array, start: Any) -> tuple[Array, ...]:
        highest, total, sums = kept
        value = taken(r.value, pl.ds(start, scores.shape[1]))
        new = jnp.maximum(highest, scores.max(1))
        weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(highest - new)
        sums = tuple(part * shrink[:, None] for part in sums)
        return new, total * shrink + weights.sum(1), added(plan, sums, weights, value)

    def strip(kept: tuple[Array, ...], start: Any) -> tuple[Array, ...]:
        """Processes a strip of the band: counts its gates and adds its keys to the softmax."""
        *kept, high, low = kept
        raw = logits(start, blocks.strip)
        masked = masked_scores(plan, score_layout, rows, keys_of(plan, r, start, blocks.strip), raw)
        gates = gates_of(raw, masked.allowed)
        parts = 3 if r.query.dtype == jnp.float32 else 2
        counts = counted(plan, score_layout, high, low, score_layout.sums(plan, gates, later=True, parts=parts))
        bias, _ = interpolated(plan, score_layout, height, counts)
        kept = softmax(tuple(kept), hidden(masked, capped(plan, masked.scores + bias * LOG2E)), start)
        return *kept, *two_sum(high, low, gates.sum(1))

    def band(state: tuple[Array, ...]) -> tuple[Array, ...]:
        tile, *kept = state
        for n in reversed(range(plan.strips)):
            kept = strip(tuple(kept), (tile - 1) * blocks.keys + n * blocks.strip)
        return tile - 1, *kept

    def unsaturated(state: tuple[Array, ...]) -> Array:
        tile, *_, high, low = state
        return (tile > first) & ((high + low).min(0) < plan.last)

    size = blocks.queries
    sums = tuple(jnp.zeros((size, piece.size), jnp.float32) for piece in pieces_of(r.value.shape[-1]))
    kept = jnp.full((size,), INIT_MAX, jnp.float32), jnp.zeros((size,), jnp.float32), sums
    constant, limit = None, last
    if plan.last is not None:
        received = [r.old_high[...], r.old_low[...]] if "old_high" in names else [jnp.zeros((size,), jnp.float32)] * 2
        state = (last, *kept, *received)
        limit, *kept, r.high[...], r.low[...] = jax.lax.while_loop(unsaturated, band, state)
        r.limit[0], kept = limit, tuple(kept)
        if "sums" in names:  # another kernel processes the remaining keys
            r.highest[...], r.total[...] = kept[:2]
            put(r.sums, kept[2])
            return
        constant = height(jnp.full((size,), plan.last)) * LOG2E

    def part(is_full_block: bool, start: Array, size: int, kept: tuple[Array, ...]) -> tuple[Array, ...]:
        scores = logits(start, size)
        scores = scores if constant is None else scores + constant[:, None]
        keys, common = keys_of(plan, r, start, size, is_full_block), _common(plan, r, start // blocks.keys)
        return softmax(kept, biased(plan, score_layout, rows, keys, scores, common, is_full_block)[0], start)

    def tile(is_full_block: bool, j: Array, kept: tuple[Array, ...]) -> tuple[Array, ...]:
        start = j * blocks.keys
        if is_full_block or plan.index is None:
            return part(is_full_block, start, blocks.keys, kept)

        def by_strips(n: Array, kept: tuple[Array, ...]) -> tuple[Array, ...]:  # table indices take registers, too
            return part(False, start + n * blocks.strip, blocks.strip, kept)

        return jax.lax.fori_loop(0, plan.strips, by_strips, kept)

    highest, total, sums = walk(tile, first, plain, detailed, limit, kept)
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    put(r.out, tuple((part / total[:, None]).astype(r.out.dtype) for part in sums))
    r.lse[...] = jnp.where(nothing, -MASK_VALUE, highest + jnp.log2(total))


def _common(plan: Plan, r: Any, j: Array) -> Array | None:
    """Returns the table index that all pairs of the query tile and key tile j share if their block is full."""
    return None if plan.index is None else plan.index(r.query_first[0], r.key_last[j])


# Backward ----------------------------------------------------------------------------------------------------------------


def into_table(rows: Rows, found: Array, index: Array, gradient: Array) -> Array:
    """Adds to each entry of ``found`` the sum of the gradients with its index; ``found`` has at least the table's length."""
    place = jnp.arange(found.shape[0])

    def add(n: Array, found: Array) -> Array:
        return found + jnp.where(place == n, jnp.where(index == n, gradient, 0.0).sum(1).sum(0), 0.0)

    return jax.lax.fori_loop(*ends_of(rows, index), add, found)


def _query_plain(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, score_layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(turned=False)
    first, plain, detailed, last = (r.by_queries[n] for n in range(4))
    rows = rows_of(plan, r, 0, blocks.queries)
    query, d_out, lse, delta = taken(r.query, slice(None)), taken(r.d_out, slice(None)), r.lse[...], r.delta[...]
    factor, size = r.scale[0] * LOG2E, blocks.queries
    constant = None if plan.last is None else r.z[rows.number, jnp.full((size,), plan.last)] * LOG2E
    limit = last if plan.last is None else jnp.minimum(r.limit[0], last)

    def tile(is_full_block: bool, j: Array, kept: dict[str, Array]) -> dict[str, Array]:
        start = j * blocks.keys
        at = pl.ds(start, blocks.keys)
        key = taken(r.key, at)
        scores, d_weights = inner(plan, query, key) * factor, inner(plan, d_out, taken(r.value, at))
        scores = scores if constant is None else scores + constant[:, None]
        common = _common(plan, r, j)
        keys = keys_of(plan, r, start, blocks.keys, is_full_block)
        scores, index = biased(plan, score_layout, rows, keys, scores, common, is_full_block)
        gradient = gradient_of(plan, score_layout, scores, weights_of(score_layout, scores, lse), d_weights, delta)
        found = {"d_query": added(plan, kept["d_query"], gradient, key)}
        if constant is not None:
            found["d_last"] = kept["d_last"] + gradient.sum(1)
        if common is not None and is_full_block:
            place = jnp.arange(kept["d_table"].shape[0])
            found["d_table"] = kept["d_table"] + jnp.where(place == common, gradient.sum(1).sum(0), 0.0)
        elif common is not None:
            found["d_table"] = into_table(rows, kept["d_table"], index, gradient)
        return found

    kept = {"d_query": zeros_like(query)}
    if constant is not None:
        kept["d_last"] = jnp.zeros((size,), jnp.float32)
    if plan.index is not None:
        kept["d_table"] = jnp.zeros(r.d_table.shape, jnp.float32)
    found = walk(tile, first, plain, detailed, limit, kept)
    put(r.d_query, found.pop("d_query"))
    for name, x in found.items():
        getattr(r, name)[...] = x


def _key_plain(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, score_layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(turned=True)
    first, plain, detailed, last = (r.by_keys[n] for n in range(4))
    j = pl.program_id(0)
    key, value, factor = taken(r.key, slice(None)), taken(r.value, slice(None)), r.scale[0] * LOG2E

    def head(g: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
        def tile(is_full_block: bool, i: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
            rows, at = rows_of(plan, r, i * blocks.rows, blocks.rows, g), pl.ds(i * blocks.rows, blocks.rows)
            query, d_out = taken(r.query, at, g), taken(r.d_out, at, g)
            scores, d_weights = inner(plan, key, query) * factor, inner(plan, value, d_out)
            if plan.last is not None:
                scores += score_layout.queries(r.z[g, rows.number, jnp.full(rows.number.shape, plan.last)]) * LOG2E
            common = None if plan.index is None else plan.index(r.row_first[i], r.key_last[0])
            keys = keys_of(plan, r, 0, blocks.keys, is_full_block)
            scores, _ = biased(plan, score_layout, rows, keys, scores, common, is_full_block)
            weights = weights_of(score_layout, scores, r.lse[g, at])
            gradient = gradient_of(plan, score_layout, scores, weights, d_weights, r.delta[g, at])
            return added(plan, kept[0], gradient, query), added(plan, kept[1], weights, d_out)

        def unless_counted(i: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
            return jax.lax.cond(r.limit[g, i // plan.pieces] > j, lambda kept: tile(False, i, kept), lambda kept: kept, kept)

        if plan.last is None:
            return walk(tile, first, plain, detailed, last, kept)
        saturated = jnp.clip(r.saturated[g] * plan.pieces, first, last)  # no query from this piece on has counted this key tile
        kept = jax.lax.fori_loop(first, saturated, unless_counted, kept)
        return walk(tile, saturated, jnp.maximum(plain, saturated), jnp.maximum(detailed, saturated), last, kept)

    d_key, d_value = jax.lax.fori_loop(0, r.query.shape[1], head, (zeros_like(key), zeros_like(value)))
    put(r.d_key, d_key)
    put(r.d_value, d_value)


def _taken(plan: Plan, limit: Array, last: Array, turn: Array) -> tuple[Array, Array]:
    """Returns the range [from, to) of strips that a query tile processes in round ``turn``; it counted key tiles [limit, last)."""
    end = last * plan.strips
    return jnp.maximum(limit * plan.strips, end - (turn + 1) * ROUND), end - turn * ROUND


def _query_band(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, score_layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(turned=False)
    begin, end = _taken(plan, r.limit[0], r.by_queries[3], r.turn[0])
    rows = rows_of(plan, r, 0, blocks.queries)
    query, d_out, lse, delta = taken(r.query, slice(None)), taken(r.d_out, slice(None)), r.lse[...], r.delta[...]
    factor, exact = r.scale[0] * LOG2E, r.query.dtype == jnp.float32

    def strip(t: Array, kept: dict[str, Array]) -> dict[str, Array]:
        start = t * blocks.strip
        at, gathered = pl.ds(start, blocks.strip), kept["gathered"]
        key = taken(r.key, at)
        raw, d_weights = inner(plan, query, key) * factor, inner(plan, d_out, taken(r.value, at))
        masked = masked_scores(plan, score_layout, rows, keys_of(plan, r, start, blocks.strip), raw)
        gates = gates_of(raw, masked.allowed)
        high, low = two_sum(kept["high"], kept["low"], -gates.sum(1))
        slot = end - 1 - t
        r.counts_there[slot, :], r.gathered_there[slot, :] = high + low, gathered
        counts = counted(plan, score_layout, high, low, score_layout.sums(plan, gates, later=True, parts=3 if exact else 2))
        bias, slope = interpolated(plan, score_layout, lambda n: r.z[rows.number, n], counts)
        scores = hidden(masked, capped(plan, masked.scores + bias * LOG2E))
        gradient = gradient_of(plan, score_layout, scores, weights_of(score_layout, scores, lse), d_weights, delta)
        spread(plan, r, rows, counts, gradient)
        steps = gradient * slope
        reach = gathered[:, None] + score_layout.sums(plan, steps, later=False, parts=3 if exact else 1)
        found = dict(high=high, low=low, gathered=gathered + steps.sum(1))
        if plan.index is not None:
            found["d_table"] = into_table(rows, kept["d_table"], masked.index, gradient)
        gradient += reach * gates * (1.0 - gates)
        return found | {"d_query": added(plan, kept["d_query"], gradient, key)}

    state = {name: getattr(r, name)[...] for name in ("high", "low", "gathered", *(["d_table"] if plan.index is not None else []))}
    found = jax.lax.fori_loop(begin, end, strip, state | {"d_query": taken(r.d_query, slice(None))})
    put(r.d_query, found.pop("d_query"))
    for name, x in found.items():
        getattr(r, name)[...] = x


def spread(plan: Plan, r: Any, rows: Rows, counts: Counts, gradient: Array) -> None:
    """Adds the gradients [t, s] of the biases to the gradient of z: the transpose of ``interpolated``."""
    if not plan.interpret:
        plgpu.debug_barrier()  # the thread that reads a node may not be the one that wrote it for the previous strip

    def node(n: Array, _: None) -> None:
        there, at = counts.base + n <= plan.last, jnp.minimum(counts.base + n, plan.last)
        place = r.d_z.at[rows.number, at]
        hat = jnp.maximum(1.0 - jnp.abs(counts.inside - n.astype(jnp.float32)), 0.0)
        sums = (gradient * hat).sum(1)
        plgpu.store(place, plgpu.load(place, mask=there, other=0.0) + sums, mask=there)

    jax.lax.fori_loop(0, counts.most + 2, node, None)


def _key_band(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, score_layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(turned=True)
    t, turn = pl.program_id(0), r.turn[0]
    key, value, factor = taken(r.key, slice(None)), taken(r.value, slice(None)), r.scale[0] * LOG2E
    exact = r.key.dtype == jnp.float32

    def head(g: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
        def tile(i: Array, slot: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
            rows, at = rows_of(plan, r, i * blocks.rows, blocks.rows, g), pl.ds(i * blocks.rows, blocks.rows)
            query, d_out = taken(r.query, at, g), taken(r.d_out, at, g)
            raw, d_weights = inner(plan, key, query) * factor, inner(plan, value, d_out)
            masked = masked_scores(plan, score_layout, rows, keys_of(plan, r, 0, blocks.strip), raw)
            gates = gates_of(raw, masked.allowed)
            before, gathered = r.counts_there[g, slot, at], r.gathered_there[g, slot, at]
            later = score_layout.sums(plan, gates, later=True, parts=3 if exact else 2)
            counts = counted(plan, score_layout, before, jnp.zeros_like(before), later)
            bias, slope = interpolated(plan, score_layout, lambda n: r.z[g, rows.number, n], counts)
            scores = hidden(masked, capped(plan, masked.scores + bias * LOG2E))
            weights = weights_of(score_layout, scores, r.lse[g, at])
            gradient = gradient_of(plan, score_layout, scores, weights, d_weights, r.delta[g, at])
            reach = score_layout.queries(gathered) + score_layout.sums(plan, gradient * slope, later=False, parts=3 if exact else 1)
            gradient += reach * gates * (1.0 - gates)
            return added(plan, kept[0], gradient, query), added(plan, kept[1], weights, d_out)

        def if_taken(i: Array, kept: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
            tile_of_piece = i // plan.pieces
            begin, end = _taken(plan, r.limit[g, tile_of_piece], r.by_queries[tile_of_piece, 3], turn)
            there = (begin <= t) & (t < end)
            return jax.lax.cond(there, lambda kept: tile(i, end - 1 - t, kept), lambda kept: kept, kept)

        return jax.lax.fori_loop(r.tile_first[g] * plan.pieces, r.tile_last[g] * plan.pieces, if_taken, kept)

    before = taken(r.d_key, slice(None)), taken(r.d_value, slice(None))
    d_key, d_value = jax.lax.fori_loop(0, r.query.shape[1], head, before)
    put(r.d_key, d_key)
    put(r.d_value, d_value)


# Calls -------------------------------------------------------------------------------------------------------------------


def _of_queries(plan: Plan, x: Operands) -> tuple[tuple[int, ...], dict[str, tuple]]:
    """Returns the grid (query tile, head, batch), and the block shape and index map of each array; None is a squeezed axis."""
    batch, length, heads, width = x.query.shape
    span, group, value_width = x.key.shape[1], heads // x.key.shape[2], x.value.shape[-1]
    size = plan.blocks.queries
    tiles = length // size
    rows = (None, None, size), lambda i, n, b: (b, n, i)
    notes = (None, None, ROUND, size), lambda i, n, b: (b, n, 0, i)
    made = {
        "query": ((None, size, None, width), lambda i, n, b: (b, i, n, 0)),
        "out": ((None, size, None, value_width), lambda i, n, b: (b, i, n, 0)),
        "key": ((None, span, None, width), lambda i, n, b: (b, 0, n // group, 0)),
        "value": ((None, span, None, value_width), lambda i, n, b: (b, 0, n // group, 0)),
        "scale": ((1,), lambda i, n, b: (0,)),
        "slope": ((1,), lambda i, n, b: (n,)),
        "limit": ((None, None, 1), lambda i, n, b: (b, n, i)),
        "query_positions": ((None, size), lambda i, n, b: (b, i)),
        "key_positions": ((None, span), lambda i, n, b: (b, 0)),
        "by_queries": ((None, None, 4), lambda i, n, b: (b, i, 0)),
        "query_first": ((None, 1), lambda i, n, b: (b, i)),
        "key_last": ((None, span // plan.blocks.keys), lambda i, n, b: (b, 0)),
    }
    made |= dict(query_segments=made["query_positions"], key_segments=made["key_positions"], turn=made["scale"])
    made |= dict(d_query=made["query"], d_out=made["out"], sums=made["out"], counts_there=notes, gathered_there=notes)
    made |= dict.fromkeys(("lse", "delta", "high", "low", "gathered", "d_last", "highest", "total"), rows)
    if x.z is not None:
        made["z"] = made["d_z"] = (None, None, size, x.z.shape[-1]), lambda i, n, b: (b, n, i, 0)
    if x.table is not None:
        made["table"] = (None, x.table.shape[1]), lambda i, n, b: (n, 0)
        made["d_table"] = (None, None, None, _table_size(x)), lambda i, n, b: (b, n, i, 0)
    return (tiles, heads, batch), {name: (block, _late_first(tiles, index)) for name, (block, index) in made.items()}


def _late_first(tiles: int, index: Callable[..., tuple]) -> Callable[..., tuple]:
    """Runs the last query tiles first: under a causal mask they take longest, and the others must not wait for them at the end."""
    return lambda i, n, b: index(tiles - 1 - i, n, b)


def _of_keys(plan: Plan, x: Operands, size: int) -> tuple[tuple[int, ...], dict[str, tuple]]:
    """Returns the same for the grid (``size`` keys, key head, batch); its programs read all queries that share the key head."""
    batch, length, heads, width = x.query.shape
    kv_heads, value_width = x.key.shape[2], x.value.shape[-1]
    group, tiles = heads // kv_heads, length // plan.blocks.queries
    rows = (None, group, length), lambda j, k, b: (b, k, 0)
    notes = (None, group, ROUND, length), lambda j, k, b: (b, k, 0, 0)
    one = (None, group, None), lambda j, k, b: (b, k, j)
    made = {
        "query": ((None, length, group, width), lambda j, k, b: (b, 0, k, 0)),
        "d_out": ((None, length, group, value_width), lambda j, k, b: (b, 0, k, 0)),
        "key": ((None, size, None, width), lambda j, k, b: (b, j, k, 0)),
        "value": ((None, size, None, value_width), lambda j, k, b: (b, j, k, 0)),
        "scale": ((1,), lambda j, k, b: (0,)),
        "slope": ((group,), lambda j, k, b: (k,)),
        "limit": ((None, group, tiles), lambda j, k, b: (b, k, 0)),
        "query_positions": ((None, length), lambda j, k, b: (b, 0)),
        "key_positions": ((None, size), lambda j, k, b: (b, j)),
        "by_queries": ((None, tiles, 4), lambda j, k, b: (b, 0, 0)),
        "by_keys": ((None, None, 4), lambda j, k, b: (b, j, 0)),
        "row_first": ((None, tiles * plan.pieces), lambda j, k, b: (b, 0)),
        "key_last": ((None, 1), lambda j, k, b: (b, j)),
    }
    made |= dict(query_segments=made["query_positions"], key_segments=made["key_positions"], turn=made["scale"])
    made |= dict(d_key=made["key"], d_value=made["value"], counts_there=notes, gathered_there=notes)
    made |= dict.fromkeys(("lse", "delta"), rows) | dict.fromkeys(("saturated", "tile_first", "tile_last"), one)
    if x.z is not None:
        made["z"] = (None, group, length, x.z.shape[-1]), lambda j, k, b: (b, k, 0, 0)
    if x.table is not None:
        made["table"] = (group, x.table.shape[1]), lambda j, k, b: (k, 0)
    return (x.key.shape[1] // size, kv_heads, batch), made


_PER_ROW = ("query_positions", "key_positions", "query_segments", "key_segments")  # one row per batch row, or one for all
_PER_ROW += ("by_queries", "by_keys", "query_first", "row_first", "key_last")


def _call(
    body: Any, plan: Plan, programs: tuple[tuple[int, ...], dict[str, tuple]], inputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Array]:
    """Runs a kernel. An output that is also an input is updated in place."""
    grid, blocks = programs
    inputs = {name: array for name, array in inputs.items() if array is not None}

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        block, index = blocks[name]
        if name in _PER_ROW and shape[0] == 1:  # one row that the batch shares
            return pl.BlockSpec(block, lambda i, n, b: index(i, n, 0))
        return pl.BlockSpec(block, index)

    changed = [name for name in outputs if name in inputs]
    names = [name if name not in changed else f"old_{name}" for name in inputs]
    found = pl.pallas_call(
        functools.partial(body, plan, (*names, *outputs)),
        grid=grid,
        in_specs=[spec(name, array.shape) for name, array in inputs.items()],
        out_specs=[spec(name, shape.shape) for name, shape in outputs.items()],
        out_shape=list(outputs.values()),
        input_output_aliases={list(inputs).index(name): list(outputs).index(name) for name in changed},
        compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages),
        interpret=bool(plan.interpret),
        name=f"posjax_attention{body.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))


def _table_size(x: Operands) -> int:
    return max(16, pl.next_power_of_2(x.table.shape[1]))


def _inputs(plan: Plan, x: Operands, visits: dict[str, Array]) -> dict[str, Any]:
    """Returns the inputs that every kernel reads, with ``visits`` by name; only lookups read the positions among them."""
    names = ("query", "key", "value", "scale", "query_positions", "key_positions", "query_segments", "key_segments", "z", "table")
    visits = {name: n for name, n in visits.items() if plan.index is not None or name.startswith("by_")}
    return {name: getattr(x, name) for name in names} | {"slope": x.slopes} | visits


def _of_tiles(seen: Visits) -> dict[str, Array]:
    return {"by_queries": seen.by_queries, "query_first": seen.query_first, "key_last": seen.key_last}


def _like(*arrays: Array, dtype: Any = None) -> Any:
    return [jax.ShapeDtypeStruct(array.shape, dtype or array.dtype) for array in arrays]


def forward(plan: Plan, x: Operands, seen: Visits, dtype: Any = None) -> tuple[Array, ...]:
    """Runs the forward kernel on all keys.

    Args:
      dtype: of the output; None for that of value.

    Returns:
      The output [B, T, N, V] and [B, N, T] log2 of the softmax's denominator. If a term counts, also the state of the counts, high
      and low [B, N, T], and limit [B, N, I], the first key tile that each query tile counted.
    """
    batch, length, heads, _ = x.query.shape
    out = jax.ShapeDtypeStruct((batch, length, heads, x.value.shape[-1]), dtype or x.value.dtype)
    outputs = {"out": out, "lse": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)}
    outputs |= {} if plan.last is None else _counted(plan, x)
    inputs = _inputs(plan, x, _of_tiles(seen)) | dict(high=x.high, low=x.low)
    return tuple(_call(_forward, plan, _of_queries(plan, x), inputs, outputs).values())


def forward_band(plan: Plan, x: Operands, seen: Visits) -> dict[str, Array]:
    """Runs the forward kernel on the counted keys alone, for another kernel to continue with the others.

    Returns:
      By name, the state of the softmax: highest [B, N, T], its running maximum, total [B, N, T], its denominator, and sums
      [B, T, N, V], its accumulator. Also high, low and limit as ``forward`` returns them.
    """
    outputs = _counted(plan, x)
    outputs |= dict.fromkeys(("highest", "total"), outputs["high"])
    outputs["sums"] = jax.ShapeDtypeStruct((*x.query.shape[:3], x.value.shape[-1]), jnp.float32)
    return _call(_forward, plan, _of_queries(plan, x), _inputs(plan, x, _of_tiles(seen)), outputs)


def _counted(plan: Plan, x: Operands) -> dict[str, Any]:
    batch, length, heads, _ = x.query.shape
    row = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return {"high": row, "low": row, "limit": jax.ShapeDtypeStruct((batch, heads, length // plan.blocks.queries), jnp.int32)}


def backward(
    plan: Plan, x: Operands, seen: Visits, lse: Array, limit: Array | None, d_out: Array, delta: Array
) -> dict[str, Array]:
    """Computes gradients in float32 from all pairs that were not counted.

    Args:
      lse: [B, N, T], as ``forward`` returned it.
      limit: [B, N, I], as ``forward`` returned it; None if no term counts.
      d_out: [B, T, N, V].
      delta: [B, N, T], the sums of d_out * out.

    Returns:
      By name d_query (before the scale), d_key, d_value and, where they apply, d_table [B, N, I, W or more] and d_last [B, N, T],
      the gradient of z at the last position.
    """
    given = {"d_out": d_out, "lse": lse, "delta": delta}
    of_queries, of_keys = _of_queries(plan, x), _of_keys(plan, x, plan.blocks.keys)
    batch, length, heads, _ = x.query.shape
    tiles = length // plan.blocks.queries

    inputs, (query,) = _inputs(plan, x, _of_tiles(seen)) | given, _like(x.query, dtype=jnp.float32)
    outputs: dict[str, Any] = {"d_query": query}
    if plan.last is not None:
        inputs["limit"], outputs["d_last"] = limit, jax.ShapeDtypeStruct(lse.shape, jnp.float32)
    if plan.index is not None:
        outputs["d_table"] = jax.ShapeDtypeStruct((batch, heads, tiles, _table_size(x)), jnp.float32)
    found = _call(_query_plain, plan, of_queries, inputs, outputs)

    of_pieces = {"by_keys": seen.by_keys, "row_first": seen.row_first, "key_last": seen.key_last}
    inputs, key_and_value = _inputs(plan, x, of_pieces) | given, _like(x.key, x.value, dtype=jnp.float32)
    if plan.last is not None:
        inputs |= {"limit": limit, "saturated": below(limit, x.key.shape[1] // plan.blocks.keys)}
    return found | _call(_key_plain, plan, of_keys, inputs, dict(zip(("d_key", "d_value"), key_and_value, strict=True)))


def backward_band(
    plan: Plan,
    x: Operands,
    seen: Visits,
    saved: tuple[Array, ...],
    d_out: Array,
    delta: Array,
    found: dict[str, Array],
    gathered: Array | None = None,
) -> dict[str, Array]:
    """Adds the gradients from the counted pairs to those of ``backward``.

    Args:
      saved: lse, high, low and limit, as ``forward`` returned them.
      found: the result of ``backward``.
      gathered: [B, N, T], the gradient of the counts that this call passed on, from other calls on keys to the left; None for zero.

    Returns:
      By name d_query, d_key and d_value with the counted pairs, d_z, d_table of the band alone, and gathered, now the gradient of
      the counts that this call received.
    """
    lse, high, low, limit = saved
    given = {"d_out": d_out, "lse": lse, "delta": delta}
    d_z = jnp.zeros_like(x.z).at[..., plan.last].set(found["d_last"])
    found = {name: found[name] for name in ("d_query", "d_key", "d_value")}
    gathered = jnp.zeros_like(high) if gathered is None else gathered
    found |= {"d_z": d_z, "high": high, "low": low, "gathered": gathered}
    if plan.index is not None:
        found["d_table"] = jnp.zeros((*limit.shape, _table_size(x)), jnp.float32)
    ends = jnp.broadcast_to(seen.by_queries[:, None, :, 3], limit.shape)
    strips = (ends - limit) * plan.strips
    rounds = (strips.max() + ROUND - 1) // ROUND
    of_queries, of_keys = _of_queries(plan, x), _of_keys(plan, x, plan.blocks.strip)
    notes = jax.ShapeDtypeStruct((*limit.shape[:2], ROUND, x.query.shape[1]), jnp.float32)

    def round_(n: Array, found: dict[str, Any]) -> dict[str, Any]:
        turn = rounds - 1 - n
        inputs = _inputs(plan, x, {"by_queries": seen.by_queries}) | given | {"limit": limit, "turn": turn.reshape(1)}
        changed = [name for name in found if name not in ("d_key", "d_value")]
        outputs = dict(zip(changed, _like(*(found[name] for name in changed)), strict=True))
        both = {"counts_there": notes, "gathered_there": notes}
        made = _call(_query_band, plan, of_queries, inputs | {name: found[name] for name in changed}, outputs | both)
        found, kept = found | {name: made[name] for name in changed}, {name: made[name] for name in both}

        begin, end = _taken(plan, limit, ends, turn)
        inputs |= {"tile_first": below(end, x.key.shape[1] // plan.blocks.strip, first=True)}
        inputs |= {"tile_last": below(begin, x.key.shape[1] // plan.blocks.strip)}
        outputs = dict(zip(("d_key", "d_value"), _like(found["d_key"], found["d_value"]), strict=True))
        return found | _call(_key_band, plan, of_keys, inputs | kept | {name: found[name] for name in outputs}, outputs)

    return jax.lax.fori_loop(0, rounds, round_, found)
