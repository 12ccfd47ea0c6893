"""The bodies of the Pallas-Triton kernels; ``triton`` calls them.

    forward         one program per query tile: first the band of keys that are counted, from the diagonal to the left, until all
                    counts have reached the last position; then the remaining keys, where the bias of CoPE is one number per row
    query, plain    the gradient of a query tile from the keys that were not counted
    key, plain      the gradients of a key tile from the same pairs, for all query heads that share it
    query, band     the gradient of a query tile from the keys that were counted, and of its products with the embedding; it walks
                    from left to right, subtracts the gates from the counts, and records the state of each row at every strip
    key, band       the gradients of a strip of keys from these records

The query kernels also compute the gradients of the pairs' numbers and query features, the key kernels those of key features.

Each sum is accumulated by one program in a fixed order, so two runs agree bit for bit. The records would grow with the square of
the sequence length where gates are near zero. The two band kernels therefore alternate, ``ROUND`` strips at a time, from the left.
With gates of one half or more, CoPE of 64 positions takes one round.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.gpu.plan import Plan
from posjax.attention.backends.gpu.scores import (
    PairGradients,
    Rows,
    apply_mask,
    apply_soft_cap,
    biased,
    gradient_of,
    index_range,
    masked_scores,
    walk,
    weights_of,
    with_pair_gradients,
)
from posjax.attention.backends.gpu.tiles import (
    Channels,
    Counts,
    ScoreLayout,
    accumulate,
    channel_slices,
    counts_in_strip,
    gates_of,
    interpolate,
    keys_of,
    load_channels,
    matmul_nt,
    rows_of,
    store_channels,
    two_sum,
    zeros_like,
)
from posjax.typing import Array

SoftmaxState = tuple[Array, Array, Channels]  # running maximum, denominator and sum of values
ROUND = 32  # strips of keys that a query tile records at a time


# Forward -----------------------------------------------------------------------------------------------------------------


def forward(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:  # only the output shapes are needed
        return
    r, blocks, layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(transposed=False)
    first, full_begin, full_end, last = (r.by_queries[n] for n in range(4))
    rows = rows_of(plan, r, 0, blocks.block_q)
    query, factor = load_channels(r.query, slice(None)), r.scale[0] * LOG2E

    def z_at(n: Array) -> Array:
        return r.z[rows.row_index, n]

    def logits(start: Any, size: int) -> Array:
        return matmul_nt(plan, query, load_channels(r.key, pl.ds(start, size))) * factor

    def softmax(carry: SoftmaxState, scores: Array, start: Any) -> SoftmaxState:
        m, l, acc = carry
        value = load_channels(r.value, pl.ds(start, scores.shape[1]))
        m_new = jnp.maximum(m, scores.max(1))
        weights, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)
        acc = tuple(part * alpha[:, None] for part in acc)
        return m_new, l * alpha + weights.sum(1), accumulate(plan, acc, weights, value)

    def strip(state: tuple[Any, ...], start: Any) -> tuple[Any, ...]:
        """Processes a strip of the band: counts its gates and adds its keys to the softmax."""
        *carry, high, low = state
        raw_logits = logits(start, blocks.block_kv_count)
        masked = masked_scores(plan, layout, rows, keys_of(plan, r, start, blocks.block_kv_count), raw_logits)
        gates = gates_of(raw_logits, masked.allowed)
        parts = 3 if r.query.dtype == jnp.float32 else 2
        counts = counts_in_strip(plan, layout, high, low, layout.cumsum(plan, gates, later=True, parts=parts))
        bias, _ = interpolate(plan, layout, z_at, counts)
        m, l, acc = carry
        carry = softmax((m, l, acc), apply_mask(masked, apply_soft_cap(plan, masked.scores + bias * LOG2E)), start)
        return *carry, *two_sum(high, low, gates.sum(1))

    def count_key_tile(state: tuple[Any, ...]) -> tuple[Any, ...]:
        tile, *carry = state
        for n in reversed(range(plan.strips)):
            carry = strip(tuple(carry), (tile - 1) * blocks.block_kv + n * blocks.block_kv_count)
        return tile - 1, *carry

    def unsaturated(state: tuple[Any, ...]) -> Array:
        tile, *_, high, low = state
        return (tile > first) & ((high + low).min(0) < plan.last_position)

    size = blocks.block_q
    acc = tuple(jnp.zeros((size, piece.size), jnp.float32) for piece in channel_slices(r.value.shape[-1]))
    carry = jnp.full((size,), INIT_MAX, jnp.float32), jnp.zeros((size,), jnp.float32), acc
    constant, limit = None, last
    if plan.last is not None:
        received = [r.old_high[...], r.old_low[...]] if "old_high" in names else [jnp.zeros((size,), jnp.float32)] * 2
        state: tuple[Any, ...] = (last, *carry, *received)
        limit, *carry, r.high[...], r.low[...] = jax.lax.while_loop(unsaturated, count_key_tile, state)
        r.limit[0], carry = limit, tuple(carry)
        if "acc" in names:  # another kernel processes the remaining keys
            r.m[...], r.l[...] = carry[:2]
            store_channels(r.acc, carry[2])
            return
        constant = z_at(jnp.full((size,), plan.last)) * LOG2E

    def part(is_full_block: bool, start: Array, size: int, carry: SoftmaxState) -> SoftmaxState:
        scores = logits(start, size)
        scores = scores if constant is None else scores + constant[:, None]
        keys, common_index = keys_of(plan, r, start, size, is_full_block), _common_index(plan, r, start // blocks.block_kv)
        return softmax(carry, biased(plan, layout, rows, keys, scores, common_index, is_full_block)[0], start)

    def tile(is_full_block: bool, j: Array, carry: SoftmaxState) -> SoftmaxState:
        start = j * blocks.block_kv
        if is_full_block or plan.index is None:
            return part(is_full_block, start, blocks.block_kv, carry)

        def by_strips(n: Array, carry: SoftmaxState) -> SoftmaxState:  # table indices take registers, too
            return part(False, start + n * blocks.block_kv_count, blocks.block_kv_count, carry)

        return jax.lax.fori_loop(0, plan.strips, by_strips, carry)

    m, l, acc = walk(tile, first, full_begin, full_end, limit, carry)
    is_empty = l == 0.0
    l = jnp.where(is_empty, 1.0, l)
    store_channels(r.out, tuple((part / l[:, None]).astype(r.out.dtype) for part in acc))
    r.lse[...] = jnp.where(is_empty, -MASK_VALUE, m + jnp.log2(l))


def _common_index(plan: Plan, r: Any, j: Array) -> Array | None:
    """Returns the table index that all pairs of the query tile and key tile j share if their block is full."""
    return None if plan.index is None else plan.index(r.query_first[0], r.key_last[j])


# Backward ----------------------------------------------------------------------------------------------------------------


def into_table(rows: Rows, d_table: Array, index: Array, gradient: Array) -> Array:
    """Adds to each entry of ``d_table`` the sum of the gradients with its index; ``d_table`` has at least the table's length."""
    entry = jnp.arange(d_table.shape[0])

    def add(n: Array, d_table: Array) -> Array:
        return d_table + jnp.where(entry == n, jnp.where(index == n, gradient, 0.0).sum(1).sum(0), 0.0)

    return jax.lax.fori_loop(*index_range(rows, index), add, d_table)


def _store_of_queries(r: Any, grads: dict[str, Any]) -> None:
    """Stores the gradients that a query kernel carries, by name; "pairs" are those of pairs."""
    for name, x in grads.items():
        if name == "d_query":
            store_channels(r.d_query, x)
        elif name != "pairs":
            getattr(r, name)[...] = x
    if grads["pairs"].numbers is not None:
        r.d_numbers[...] = grads["pairs"].numbers
    for n, feature in enumerate(grads["pairs"].features):
        r.d_query_features[n, :] = feature


def query_plain(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(transposed=False)
    first, full_begin, full_end, last = (r.by_queries[n] for n in range(4))
    rows = rows_of(plan, r, 0, blocks.block_q)
    query, d_out, lse, delta = load_channels(r.query, slice(None)), load_channels(r.d_out, slice(None)), r.lse[...], r.delta[...]
    factor, size = r.scale[0] * LOG2E, blocks.block_q
    constant = None if plan.last is None else r.z[rows.row_index, jnp.full((size,), plan.last)] * LOG2E
    limit = last if plan.last is None else jnp.minimum(r.limit[0], last)

    def tile(is_full_block: bool, j: Array, carry: dict[str, Any]) -> dict[str, Any]:
        start = j * blocks.block_kv
        at = pl.ds(start, blocks.block_kv)
        key = load_channels(r.key, at)
        scores, d_weights = matmul_nt(plan, query, key) * factor, matmul_nt(plan, d_out, load_channels(r.value, at))
        scores = scores if constant is None else scores + constant[:, None]
        common_index = _common_index(plan, r, j)
        keys = keys_of(plan, r, start, blocks.block_kv, is_full_block)
        scores, index = biased(plan, layout, rows, keys, scores, common_index, is_full_block)
        gradient = gradient_of(plan, layout, scores, weights_of(layout, scores, lse), d_weights, delta)
        grads: dict[str, Any] = {"d_query": accumulate(plan, carry["d_query"], gradient, key)}
        if constant is not None:
            grads["d_last"] = carry["d_last"] + gradient.sum(1)
        if common_index is not None and is_full_block:
            entry = jnp.arange(carry["d_table"].shape[0])
            grads["d_table"] = carry["d_table"] + jnp.where(entry == common_index, gradient.sum(1).sum(0), 0.0)
        elif index is not None:
            grads["d_table"] = into_table(rows, carry["d_table"], index, gradient)
        grads["pairs"] = with_pair_gradients(plan, layout, rows, keys, gradient, "query", carry["pairs"])
        return grads

    carry: dict[str, Any] = {"d_query": zeros_like(query)}
    if constant is not None:
        carry["d_last"] = jnp.zeros((size,), jnp.float32)
    if plan.index is not None:
        carry["d_table"] = jnp.zeros(r.d_table.shape, jnp.float32)
    numbers = jnp.zeros(r.d_numbers.shape, jnp.float32) if plan.learns_numbers else None
    carry["pairs"] = PairGradients(numbers, (jnp.zeros((size,), jnp.float32),) * len(plan.float_features))
    _store_of_queries(r, walk(tile, first, full_begin, full_end, limit, carry))


KeyGradients = tuple[Channels, Channels, PairGradients]  # of key, value and, for one query head, of key features


def key_plain(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(transposed=True)
    first, full_begin, full_end, last = (r.by_keys[n] for n in range(4))
    j = pl.program_id(0)
    key, value, factor = load_channels(r.key, slice(None)), load_channels(r.value, slice(None)), r.scale[0] * LOG2E
    no_pairs = PairGradients(None, (jnp.zeros((blocks.block_kv,), jnp.float32),) * len(plan.float_features))

    def head(g: Array, d_kv: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
        def tile(is_full_block: bool, i: Array, carry: KeyGradients) -> KeyGradients:
            rows, at = (
                rows_of(plan, r, i * blocks.block_q_rows, blocks.block_q_rows, g),
                pl.ds(i * blocks.block_q_rows, blocks.block_q_rows),
            )
            query, d_out = load_channels(r.query, at, g), load_channels(r.d_out, at, g)
            scores, d_weights = matmul_nt(plan, key, query) * factor, matmul_nt(plan, value, d_out)
            if plan.last is not None:
                scores += layout.queries(r.z[g, rows.row_index, jnp.full(rows.positions.shape, plan.last)]) * LOG2E
            common_index = None if plan.index is None else plan.index(r.row_first[i], r.key_last[0])
            keys = keys_of(plan, r, 0, blocks.block_kv, is_full_block, g)
            scores, _ = biased(plan, layout, rows, keys, scores, common_index, is_full_block)
            weights = weights_of(layout, scores, r.lse[g, at])
            gradient = gradient_of(plan, layout, scores, weights, d_weights, r.delta[g, at])
            d_key, d_value, pairs = carry
            pairs = with_pair_gradients(plan, layout, rows, keys, gradient, "key", pairs)
            return accumulate(plan, d_key, gradient, query), accumulate(plan, d_value, weights, d_out), pairs

        def unless_counted(i: Array, carry: KeyGradients) -> KeyGradients:
            return jax.lax.cond(r.limit[g, i // plan.pieces] > j, lambda carry: tile(False, i, carry), lambda carry: carry, carry)

        begin, carry = first, (*d_kv, no_pairs)
        if plan.last is not None:
            begin = jnp.clip(r.counted_end[g] * plan.pieces, first, last)  # no query from this piece on has counted this key tile
            carry = jax.lax.fori_loop(first, begin, unless_counted, carry)
        d_key, d_value, pairs = walk(tile, begin, jnp.maximum(full_begin, begin), jnp.maximum(full_end, begin), last, carry)
        for n, feature in enumerate(pairs.features):
            r.d_key_features[g, n, :] = feature
        return d_key, d_value

    d_key, d_value = jax.lax.fori_loop(0, r.query.shape[1], head, (zeros_like(key), zeros_like(value)))
    store_channels(r.d_key, d_key)
    store_channels(r.d_value, d_value)


def strips_of_round(plan: Plan, limit: Array, last: Array, round_index: Array) -> tuple[Array, Array]:
    """Returns the range [from, to) of strips that a query tile processes in a round; it counted key tiles [limit, last)."""
    end = last * plan.strips
    return jnp.maximum(limit * plan.strips, end - (round_index + 1) * ROUND), end - round_index * ROUND


def query_band(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(transposed=False)
    begin, end = strips_of_round(plan, r.limit[0], r.by_queries[3], r.round_index[0])
    rows = rows_of(plan, r, 0, blocks.block_q)
    query, d_out, lse, delta = load_channels(r.query, slice(None)), load_channels(r.d_out, slice(None)), r.lse[...], r.delta[...]
    factor, exact = r.scale[0] * LOG2E, r.query.dtype == jnp.float32

    def strip(t: Array, carry: dict[str, Any]) -> dict[str, Any]:
        start = t * blocks.block_kv_count
        at, gathered = pl.ds(start, blocks.block_kv_count), carry["gathered"]
        key = load_channels(r.key, at)
        raw_logits, d_weights = matmul_nt(plan, query, key) * factor, matmul_nt(plan, d_out, load_channels(r.value, at))
        keys = keys_of(plan, r, start, blocks.block_kv_count)
        masked = masked_scores(plan, layout, rows, keys, raw_logits)
        gates = gates_of(raw_logits, masked.allowed)
        high, low = two_sum(carry["high"], carry["low"], -gates.sum(1))
        slot = end - 1 - t
        r.recorded_counts[slot, :], r.recorded_gathered[slot, :] = high + low, gathered
        counts = counts_in_strip(plan, layout, high, low, layout.cumsum(plan, gates, later=True, parts=3 if exact else 2))
        bias, slope = interpolate(plan, layout, lambda n: r.z[rows.row_index, n], counts)
        scores = apply_mask(masked, apply_soft_cap(plan, masked.scores + bias * LOG2E))
        gradient = gradient_of(plan, layout, scores, weights_of(layout, scores, lse), d_weights, delta)
        spread(plan, r, rows, counts, gradient)
        d_counts = gradient * slope
        d_gates = gathered[:, None] + layout.cumsum(plan, d_counts, later=False, parts=3 if exact else 1)
        grads: dict[str, Any] = dict(high=high, low=low, gathered=gathered + d_counts.sum(1))
        if masked.index is not None:
            grads["d_table"] = into_table(rows, carry["d_table"], masked.index, gradient)
        grads["pairs"] = with_pair_gradients(plan, layout, rows, keys, gradient, "query", carry["pairs"])
        gradient += d_gates * gates * (1.0 - gates)
        return grads | {"d_query": accumulate(plan, carry["d_query"], gradient, key)}

    state = {name: getattr(r, name)[...] for name in ("high", "low", "gathered", *(["d_table"] if plan.index is not None else []))}
    features = tuple(r.d_query_features[n, :] for n in range(len(plan.float_features)))
    state["pairs"] = PairGradients(r.d_numbers[...] if plan.learns_numbers else None, features)
    state["d_query"] = load_channels(r.d_query, slice(None))
    _store_of_queries(r, jax.lax.fori_loop(begin, end, strip, state))


def spread(plan: Plan, r: Any, rows: Rows, counts: Counts, gradient: Array) -> None:
    """Adds the gradients [t, s] of the biases to the gradient of z: the transpose of ``interpolated``."""
    if not plan.interpret:
        plgpu.debug_barrier()  # the thread that reads a node may not be the one that wrote it for the previous strip

    def node(n: Array, _: None) -> None:
        is_valid, at = counts.base + n <= plan.last_position, jnp.minimum(counts.base + n, plan.last_position)
        node_ref = r.d_z.at[rows.row_index, at]
        hat = jnp.maximum(1.0 - jnp.abs(counts.inside - n.astype(jnp.float32)), 0.0)
        increment = (gradient * hat).sum(1)
        plgpu.store(node_ref, plgpu.load(node_ref, mask=is_valid, other=0.0) + increment, mask=is_valid)

    jax.lax.fori_loop(0, counts.most + 2, node, None)


def key_band(plan: Plan, names: tuple[str, ...], *refs: Any) -> None:
    if plan.interpret is None:
        return
    r, blocks, layout = types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan.blocks, ScoreLayout(transposed=True)
    t, round_index = pl.program_id(0), r.round_index[0]
    key, value, factor = load_channels(r.key, slice(None)), load_channels(r.value, slice(None)), r.scale[0] * LOG2E
    exact = r.key.dtype == jnp.float32

    def head(g: Array, d_kv: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
        def tile(i: Array, slot: Array, carry: KeyGradients) -> KeyGradients:
            rows, at = (
                rows_of(plan, r, i * blocks.block_q_rows, blocks.block_q_rows, g),
                pl.ds(i * blocks.block_q_rows, blocks.block_q_rows),
            )
            query, d_out = load_channels(r.query, at, g), load_channels(r.d_out, at, g)
            raw_logits, d_weights = matmul_nt(plan, key, query) * factor, matmul_nt(plan, value, d_out)
            keys = keys_of(plan, r, 0, blocks.block_kv_count, head=g)
            masked = masked_scores(plan, layout, rows, keys, raw_logits)
            gates = gates_of(raw_logits, masked.allowed)
            count_before, gathered = r.recorded_counts[g, slot, at], r.recorded_gathered[g, slot, at]
            later = layout.cumsum(plan, gates, later=True, parts=3 if exact else 2)
            counts = counts_in_strip(plan, layout, count_before, jnp.zeros_like(count_before), later)
            bias, slope = interpolate(plan, layout, lambda n: r.z[g, rows.row_index, n], counts)
            scores = apply_mask(masked, apply_soft_cap(plan, masked.scores + bias * LOG2E))
            weights = weights_of(layout, scores, r.lse[g, at])
            gradient = gradient_of(plan, layout, scores, weights, d_weights, r.delta[g, at])
            d_gates = layout.queries(gathered) + layout.cumsum(plan, gradient * slope, later=False, parts=3 if exact else 1)
            d_key, d_value, pairs = carry
            pairs = with_pair_gradients(plan, layout, rows, keys, gradient, "key", pairs)
            gradient += d_gates * gates * (1.0 - gates)
            return accumulate(plan, d_key, gradient, query), accumulate(plan, d_value, weights, d_out), pairs

        def if_taken(i: Array, carry: KeyGradients) -> KeyGradients:
            tile_of_piece = i // plan.pieces
            begin, end = strips_of_round(plan, r.limit[g, tile_of_piece], r.by_queries[tile_of_piece, 3], round_index)
            is_in_round = (begin <= t) & (t < end)
            return jax.lax.cond(is_in_round, lambda carry: tile(i, end - 1 - t, carry), lambda carry: carry, carry)

        before = PairGradients(None, tuple(r.d_key_features[g, n, :] for n in range(len(plan.float_features))))
        d_key, d_value, pairs = jax.lax.fori_loop(
            r.tile_first[g] * plan.pieces, r.tile_last[g] * plan.pieces, if_taken, (*d_kv, before)
        )
        for n, feature in enumerate(pairs.features):
            r.d_key_features[g, n, :] = feature
        return d_key, d_value

    d_kv_before = load_channels(r.d_key, slice(None)), load_channels(r.d_value, slice(None))
    d_key, d_value = jax.lax.fori_loop(0, r.query.shape[1], head, d_kv_before)
    store_channels(r.d_key, d_key)
    store_channels(r.d_value, d_value)
