"""Attention on NVIDIA GPUs through Pallas-Triton, forward and backward, from Ampere on.

Lays out the grids, blocks and outputs of the kernels in ``triton_kernels``, and calls them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from posjax.attention.backends.gpu import triton_kernels as kernels
from posjax.attention.backends.gpu.plan import BlockMask, Operands, Plan, query_tile_bounds
from posjax.typing import Array


def _of_queries(plan: Plan, x: Operands) -> tuple[tuple[int, ...], dict[str, tuple]]:
    """Returns the grid (query tile, head, batch), and the block shape and index map of each array; None is a squeezed axis."""
    batch, length, heads, width = x.query.shape
    span, group, value_width = x.key.shape[1], heads // x.key.shape[2], x.value.shape[-1]
    size = plan.blocks.block_q
    tiles = length // size
    rows = (None, None, size), lambda i, n, b: (b, n, i)
    record = (None, None, kernels.ROUND, size), lambda i, n, b: (b, n, 0, i)
    specs = {
        "query": ((None, size, None, width), lambda i, n, b: (b, i, n, 0)),
        "out": ((None, size, None, value_width), lambda i, n, b: (b, i, n, 0)),
        "key": ((None, span, None, width), lambda i, n, b: (b, 0, n // group, 0)),
        "value": ((None, span, None, value_width), lambda i, n, b: (b, 0, n // group, 0)),
        "scale": ((1,), lambda i, n, b: (0,)),
        "limit": ((None, None, 1), lambda i, n, b: (b, n, i)),
        "query_positions": ((None, size), lambda i, n, b: (b, i)),
        "key_positions": ((None, span), lambda i, n, b: (b, 0)),
        "by_queries": ((None, None, 4), lambda i, n, b: (b, i, 0)),
        "query_first": ((None, 1), lambda i, n, b: (b, i)),
        "key_last": ((None, span // plan.blocks.block_kv), lambda i, n, b: (b, 0)),
    }
    specs |= dict(query_segments=specs["query_positions"], key_segments=specs["key_positions"], round_index=specs["scale"])
    specs |= dict(d_query=specs["query"], d_out=specs["out"], acc=specs["out"], recorded_counts=record, recorded_gathered=record)
    specs |= dict.fromkeys(("lse", "delta", "high", "low", "gathered", "d_last", "m", "l"), rows)
    if x.z is not None:
        specs["z"] = specs["d_z"] = (None, None, size, x.z.shape[-1]), lambda i, n, b: (b, n, i, 0)
    if x.table is not None:
        specs["table"] = (None, x.table.shape[1]), lambda i, n, b: (n, 0)
        specs["d_table"] = (None, None, None, _at_least(x.table.shape[1])), lambda i, n, b: (b, n, i, 0)
    if x.numbers is not None:
        specs["numbers"] = (1, x.numbers.shape[1]), lambda i, n, b: (n, 0)
        specs["d_numbers"] = (None, None, None, _at_least(x.numbers.shape[1])), lambda i, n, b: (b, n, i, 0)
    if x.query_features is not None and x.key_features is not None:
        of_queries, of_keys = (_shared(features, heads) for features in (x.query_features, x.key_features))
        count = x.query_features.shape[2]
        specs["query_features"] = (None, None, count, size), lambda i, n, b: (*of_queries(b, n), 0, i)
        specs["key_features"] = (None, None, count, span), lambda i, n, b: (*of_keys(b, n), 0, 0)
        specs["d_query_features"] = (None, None, len(plan.float_features), size), lambda i, n, b: (b, n, 0, i)
    return (tiles, heads, batch), {name: (block, _late_first(tiles, index)) for name, (block, index) in specs.items()}


def _late_first(tiles: int, index: Callable[..., tuple]) -> Callable[..., tuple]:
    """Runs the last query tiles first: under a causal mask they take longest, and the others must not wait for them at the end."""
    return lambda i, n, b: index(tiles - 1 - i, n, b)


def _of_keys(plan: Plan, x: Operands, size: int) -> tuple[tuple[int, ...], dict[str, tuple]]:
    """Returns the same for the grid (``size`` keys, key head, batch); its programs read all queries that share the key head."""
    batch, length, heads, width = x.query.shape
    kv_heads, value_width = x.key.shape[2], x.value.shape[-1]
    group, tiles = heads // kv_heads, length // plan.blocks.block_q
    rows = (None, group, length), lambda j, k, b: (b, k, 0)
    record = (None, group, kernels.ROUND, length), lambda j, k, b: (b, k, 0, 0)
    one = (None, group, None), lambda j, k, b: (b, k, j)
    specs = {
        "query": ((None, length, group, width), lambda j, k, b: (b, 0, k, 0)),
        "d_out": ((None, length, group, value_width), lambda j, k, b: (b, 0, k, 0)),
        "key": ((None, size, None, width), lambda j, k, b: (b, j, k, 0)),
        "value": ((None, size, None, value_width), lambda j, k, b: (b, j, k, 0)),
        "scale": ((1,), lambda j, k, b: (0,)),
        "limit": ((None, group, tiles), lambda j, k, b: (b, k, 0)),
        "query_positions": ((None, length), lambda j, k, b: (b, 0)),
        "key_positions": ((None, size), lambda j, k, b: (b, j)),
        "by_queries": ((None, tiles, 4), lambda j, k, b: (b, 0, 0)),
        "by_keys": ((None, None, 4), lambda j, k, b: (b, j, 0)),
        "row_first": ((None, tiles * plan.pieces), lambda j, k, b: (b, 0)),
        "key_last": ((None, 1), lambda j, k, b: (b, j)),
    }
    specs |= dict(query_segments=specs["query_positions"], key_segments=specs["key_positions"], round_index=specs["scale"])
    specs |= dict(d_key=specs["key"], d_value=specs["value"], recorded_counts=record, recorded_gathered=record)
    specs |= dict.fromkeys(("lse", "delta"), rows) | dict.fromkeys(("counted_end", "tile_first", "tile_last"), one)
    if x.z is not None:
        specs["z"] = (None, group, length, x.z.shape[-1]), lambda j, k, b: (b, k, 0, 0)
    if x.table is not None:
        specs["table"] = (group, x.table.shape[1]), lambda j, k, b: (k, 0)
    if x.numbers is not None:
        specs["numbers"] = (group, x.numbers.shape[1]), lambda j, k, b: (k, 0)
    if x.query_features is not None and x.key_features is not None:
        of_queries, of_keys = (_shared(features, kv_heads) for features in (x.query_features, x.key_features))
        count = x.query_features.shape[2]
        queries, keys = (max(features.shape[1] // kv_heads, 1) for features in (x.query_features, x.key_features))
        specs["query_features"] = (None, queries, count, length), lambda j, k, b: (*of_queries(b, k), 0, 0)
        specs["key_features"] = (None, keys, count, size), lambda j, k, b: (*of_keys(b, k), 0, j)
        specs["d_key_features"] = (None, group, len(plan.float_features), size), lambda j, k, b: (b, k, 0, j)
    return (x.key.shape[1] // size, kv_heads, batch), specs


def _shared(features: Array, heads: int) -> Callable[..., tuple]:
    """Returns a function from the batch row and one of ``heads`` heads to the block of features that it reads."""
    rows, blocks = features.shape[0], min(features.shape[1], heads)
    return lambda b, n: (b if rows > 1 else 0, n // (heads // blocks))


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

    updated = [name for name in outputs if name in inputs]
    names = [name if name not in updated else f"old_{name}" for name in inputs]
    results = pl.pallas_call(
        functools.partial(body, plan, (*names, *outputs)),
        grid=grid,
        in_specs=[spec(name, array.shape) for name, array in inputs.items()],
        out_specs=[spec(name, shape.shape) for name, shape in outputs.items()],
        out_shape=list(outputs.values()),
        input_output_aliases={list(inputs).index(name): list(outputs).index(name) for name in updated},
        compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.num_warps, num_stages=plan.blocks.num_stages),
        interpret=bool(plan.interpret),
        name=f"posjax_attention_{body.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _at_least(size: int) -> int:
    """Returns the length of a vector that holds ``size`` numbers."""
    return max(16, pl.next_power_of_2(size))


def _inputs(plan: Plan, x: Operands, ranges: dict[str, Array]) -> dict[str, Any]:
    """Returns the inputs that every kernel reads, with ``ranges`` by name; only lookups read the positions among them."""
    names = ("query", "key", "value", "scale", "query_positions", "key_positions", "query_segments", "key_segments")
    names += ("z", "table", "numbers", "query_features", "key_features")
    ranges = {name: n for name, n in ranges.items() if plan.index is not None or name.startswith("by_")}
    return {name: getattr(x, name) for name in names} | ranges


def _of_tiles(block_mask: BlockMask) -> dict[str, Array]:
    return {"by_queries": block_mask.by_queries, "query_first": block_mask.query_first, "key_last": block_mask.key_last}


def _like(*arrays: Array, dtype: Any = None) -> Any:
    return [jax.ShapeDtypeStruct(array.shape, dtype or array.dtype) for array in arrays]


def forward(plan: Plan, x: Operands, block_mask: BlockMask, dtype: Any = None) -> tuple[Array, ...]:
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
    outputs |= {} if plan.last is None else _count_outputs(plan, x)
    inputs = _inputs(plan, x, _of_tiles(block_mask)) | dict(high=x.high, low=x.low)
    return tuple(_call(kernels.forward, plan, _of_queries(plan, x), inputs, outputs).values())


def forward_band(plan: Plan, x: Operands, block_mask: BlockMask) -> dict[str, Array]:
    """Runs the forward kernel on the counted keys alone, for another kernel to continue with the others.

    Returns:
      By name, the state of the softmax: m [B, N, T], its running maximum, l [B, N, T], its denominator, and acc
      [B, T, N, V], its accumulator. Also high, low and limit as ``forward`` returns them.
    """
    outputs = _count_outputs(plan, x)
    outputs |= dict.fromkeys(("m", "l"), outputs["high"])
    outputs["acc"] = jax.ShapeDtypeStruct((*x.query.shape[:3], x.value.shape[-1]), jnp.float32)
    return _call(kernels.forward, plan, _of_queries(plan, x), _inputs(plan, x, _of_tiles(block_mask)), outputs)


def _count_outputs(plan: Plan, x: Operands) -> dict[str, Any]:
    batch, length, heads, _ = x.query.shape
    row = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return {"high": row, "low": row, "limit": jax.ShapeDtypeStruct((batch, heads, length // plan.blocks.block_q), jnp.int32)}


def backward(
    plan: Plan, x: Operands, block_mask: BlockMask, lse: Array, limit: Array | None, d_out: Array, delta: Array
) -> dict[str, Array]:
    """Computes gradients in float32 from all pairs that were not counted.

    Args:
      lse: [B, N, T], as ``forward`` returned it.
      limit: [B, N, I], as ``forward`` returned it; None if no term counts.
      d_out: [B, T, N, V].
      delta: [B, N, T], the sums of d_out * out.

    Returns:
      By name d_query (before the scale), d_key, d_value and, where they apply, d_table [B, N, I, W or more], d_last [B, N, T],
      the gradient of z at the last position, d_numbers [B, N, I, A or more] and, of the D features that have gradients,
      d_query_features [B, N, D, T] and d_key_features [B, N, D, S], by query head both.
    """
    residuals = {"d_out": d_out, "lse": lse, "delta": delta}
    of_queries, of_keys = _of_queries(plan, x), _of_keys(plan, x, plan.blocks.block_kv)
    batch, length, heads, _ = x.query.shape
    tiles = length // plan.blocks.block_q

    inputs, (query,) = _inputs(plan, x, _of_tiles(block_mask)) | residuals, _like(x.query, dtype=jnp.float32)
    outputs: dict[str, Any] = {"d_query": query}
    if plan.last is not None:
        inputs["limit"], outputs["d_last"] = limit, jax.ShapeDtypeStruct(lse.shape, jnp.float32)
    if x.table is not None:
        outputs["d_table"] = jax.ShapeDtypeStruct((batch, heads, tiles, _at_least(x.table.shape[1])), jnp.float32)
    if x.numbers is not None and plan.learns_numbers:
        outputs["d_numbers"] = jax.ShapeDtypeStruct((batch, heads, tiles, _at_least(x.numbers.shape[1])), jnp.float32)
    if count := len(plan.float_features):
        outputs["d_query_features"] = jax.ShapeDtypeStruct((batch, heads, count, length), jnp.float32)
    grads = _call(kernels.query_plain, plan, of_queries, inputs, outputs)

    of_pieces = {"by_keys": block_mask.by_keys, "row_first": block_mask.row_first, "key_last": block_mask.key_last}
    inputs, key_and_value = _inputs(plan, x, of_pieces) | residuals, _like(x.key, x.value, dtype=jnp.float32)
    if limit is not None:
        inputs |= {"limit": limit, "counted_end": query_tile_bounds(limit, x.key.shape[1] // plan.blocks.block_kv)}
    outputs = dict(zip(("d_key", "d_value"), key_and_value, strict=True))
    if count:
        outputs["d_key_features"] = jax.ShapeDtypeStruct((batch, heads, count, x.key.shape[1]), jnp.float32)
    return grads | _call(kernels.key_plain, plan, of_keys, inputs, outputs)


def backward_band(
    plan: Plan,
    x: Operands,
    block_mask: BlockMask,
    saved: tuple[Array, ...],
    d_out: Array,
    delta: Array,
    grads: dict[str, Array],
    gathered: Array | None = None,
) -> dict[str, Array]:
    """Adds the gradients from the counted pairs to those of ``backward``.

    Args:
      saved: lse, high, low and limit, as ``forward`` returned them.
      grads: the result of ``backward``.
      gathered: [B, N, T], the gradient of the counts that this call passed on, from other calls on keys to the left; None for zero.

    Returns:
      By name d_query, d_key, d_value, d_numbers and the gradients of features with the counted pairs, d_z, d_table of the band
      alone, and gathered, now the gradient of the counts that this call received.
    """
    lse, high, low, limit = saved
    residuals = {"d_out": d_out, "lse": lse, "delta": delta}
    assert x.z is not None
    d_z = jnp.zeros_like(x.z).at[..., plan.last].set(grads["d_last"])
    grads = {name: x for name, x in grads.items() if name not in ("d_last", "d_table")}
    of_key_tiles = [name for name in grads if name in ("d_key", "d_value", "d_key_features")]
    gathered = jnp.zeros_like(high) if gathered is None else gathered
    grads |= {"d_z": d_z, "high": high, "low": low, "gathered": gathered}
    if x.table is not None:
        grads["d_table"] = jnp.zeros((*limit.shape, _at_least(x.table.shape[1])), jnp.float32)
    ends = jnp.broadcast_to(block_mask.by_queries[:, None, :, 3], limit.shape)
    strips = (ends - limit) * plan.strips
    rounds = (strips.max() + kernels.ROUND - 1) // kernels.ROUND
    of_queries, of_keys = _of_queries(plan, x), _of_keys(plan, x, plan.blocks.block_kv_count)
    record = jax.ShapeDtypeStruct((*limit.shape[:2], kernels.ROUND, x.query.shape[1]), jnp.float32)

    def run_round(n: Array, grads: dict[str, Any]) -> dict[str, Any]:
        round_index = rounds - 1 - n
        inputs = (
            _inputs(plan, x, {"by_queries": block_mask.by_queries})
            | residuals
            | {"limit": limit, "round_index": round_index.reshape(1)}
        )
        updated = [name for name in grads if name not in of_key_tiles]
        outputs = dict(zip(updated, _like(*(grads[name] for name in updated)), strict=True))
        records_out = {"recorded_counts": record, "recorded_gathered": record}
        outs = _call(kernels.query_band, plan, of_queries, inputs | {name: grads[name] for name in updated}, outputs | records_out)
        grads, records = grads | {name: outs[name] for name in updated}, {name: outs[name] for name in records_out}

        begin, end = kernels.strips_of_round(plan, limit, ends, round_index)
        inputs |= {"tile_first": query_tile_bounds(end, x.key.shape[1] // plan.blocks.block_kv_count, first=True)}
        inputs |= {"tile_last": query_tile_bounds(begin, x.key.shape[1] // plan.blocks.block_kv_count)}
        outputs = dict(zip(of_key_tiles, _like(*(grads[name] for name in of_key_tiles)), strict=True))
        return grads | _call(kernels.key_band, plan, of_keys, inputs | records | {name: grads[name] for name in outputs}, outputs)

    return jax.lax.fori_loop(0, rounds, run_round, grads)
