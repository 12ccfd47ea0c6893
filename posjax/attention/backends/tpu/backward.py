"""Attention on TPU, backward: the gradients of ``forward.py``, with a walk through the counting region from left to right.

Starting from the counts at the end of the forward pass, each step subtracts its gates again. The gradient of a count reaches the
gates of all keys from the count's key to the query, so each row accumulates one sum on the way (``gathered``). The gradients of the
keys of one resident block accumulate in VMEM over all queries. If there are several blocks, the kernel runs once for each, from the
left, and passes on the state of the rows.

``backward_tile.py`` holds the gradients of a query tile, ``backward_counting.py`` those of its counting region.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.tpu.backward_counting import BackwardCounting
from posjax.attention.backends.tpu.backward_tile import BackwardTile
from posjax.attention.backends.tpu.band import CountingRegion
from posjax.attention.backends.tpu.step import (
    OPTIONAL,
    Operands,
    Plan,
    Scalars,
    Step,
    inputs_of,
    make_scalars,
    queries_of,
    scratch_of,
)
from posjax.attention.backends.tpu.tiles import LANES, SUBLANES
from posjax.typing import Array


def _body(plan: Plan, names: tuple[str, ...], rows: int, *refs: Any) -> None:
    """Runs one grid step of the kernel: one query tile of one head, over all keys of the resident block."""
    if plan.interpret is None:  # only the shapes of the results are needed
        return
    scalars, scale, block, rest = Scalars(*refs[:6]), refs[6], refs[7], dict(zip(names, refs[8:], strict=True))
    rest = dict.fromkeys(OPTIONAL) | rest
    batch, head, group, tile, _ = (pl.program_id(n) for n in range(5))
    s = Step(plan, scalars, rest, batch if rows > 1 else 0, rows, tile, block[0])
    query_tile = BackwardTile(s, scale, scale[0] * LOG2E)
    region = CountingRegion(s, lambda a: s.limit[a], is_backward=True)
    counting = BackwardCounting(query_tile, region) if plan.counting is not None else None

    pl.when((group == 0) & (tile == 0))(query_tile.initialise_keys)
    pl.when(tile == 0)(query_tile.initialise_head)
    copies = query_tile.start_copies(batch, head, group)
    query_tile.initialise()
    if counting is not None:
        counting.initialise()
    query_tile.key_tiles()
    if counting is not None:
        counting.uncount()
    query_tile.finish(copies)
    pl.when((group == pl.num_programs(2) - 1) & (tile == pl.num_programs(3) - 1))(query_tile.finish_keys)


def backward(
    plan: Plan,
    x: Operands,
    saved: tuple[Array, ...],
    d_out: Array,
    delta: Array,
    gathered: Array | None = None,
    is_part: bool = False,
    acc: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Runs the backward kernel, once for each resident block of keys.

    Args:
      plan, x: as in ``forward``.
      saved: the results of ``forward`` after the output.
      d_out: [B, K, G, T, V], the gradient of the output.
      delta: sum of d_out * out over V, in the layout of rows, [B, K, G, I, t / 128, 128].
      gathered: the gradient of the counts that this call passes on, in the same layout, from keys to the left in other calls; None:
        zero.
      is_part: whether the gradients will be summed with those of other calls, and are thus float32.
      acc: with ``is_part``, float32 gradients of the queries from other calls, by name, to which those of this call are added in
        place; None: zero.

    Returns:
      The gradients by the names of the operands, ``table`` and ``embedding`` by head, ``scale`` by head and channel; with CoPE also
      ``gathered``, the gradient of the counts that this call received.
    """
    num_blocks = x.key.shape[2] // min(plan.blocks.block_kv_resident, x.key.shape[2])
    state = (*saved[1:], jnp.zeros_like(saved[0]) if gathered is None else gathered) if plan.counting is not None else ()
    x = dataclasses.replace(x, high=None, low=None)  # the walk begins at the left, with the counts in ``saved``
    call = functools.partial(_backward_of_block, plan, x, saved[0], d_out, delta, is_part)
    acc = acc or {}
    if (num_blocks > 1 or is_part) and not acc:
        acc = {name: jnp.zeros(getattr(x, name).shape, jnp.float32) for name in queries_of(x)}
    if num_blocks == 1:
        grads, state = call(jnp.zeros(1, jnp.int32), state, acc)
        return grads | (dict(gathered=state[-1]) if state else {})
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)[:, None]
    by_key = ("key", "value", *(["key_features"] if any(program.float_features for program in plan.pairs) else []))

    def block_step(carry: Any, block: Array) -> Any:
        state, acc, grad_sums = carry
        grads, state = call(block, state, acc)
        of_keys, of_queries = ([grads.pop(name) for name in names] for names in (by_key, acc))
        return (state, dict(zip(acc, of_queries, strict=True)), jax.tree.map(jnp.add, grad_sums, grads)), of_keys

    shapes = jax.eval_shape(call, blocks[0], state, acc)[0]
    grad_sums = {name: jnp.zeros(a.shape, a.dtype) for name, a in shapes.items() if name not in (*by_key, *acc)}
    (state, acc, grad_sums), grads = jax.lax.scan(block_step, (state, acc, grad_sums), blocks)
    key_grads = [jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, a.shape[-1]) for a in grads[:2]]
    key_grads += [jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1) for a in grads[2:]]
    return acc | grad_sums | dict(zip(by_key, key_grads, strict=True)) | (dict(gathered=state[-1]) if state else {})


def _backward_of_block(
    plan: Plan,
    x: Operands,
    lse: Array,
    d_out: Array,
    delta: Array,
    is_part: bool,
    block: Array,
    state: tuple[Array, ...],
    acc: dict[str, Array],
) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Computes the gradients from one resident block of keys, adding those of queries to ``acc``, and the state for the next."""
    batch, kv_heads, group, length, _ = x.query.shape
    tiles = length // plan.blocks.block_q
    scalars = make_scalars(plan, x)
    rows = scalars[0].shape[0] // (tiles * 2)
    names, arrays, specs = inputs_of(plan, x, lambda b, i, r, *scalars: scalars[7][0])
    _, row_spec = _by_tile(plan, x)
    row_arrays = {"lse": lse, "delta": delta}
    if plan.counting is not None:
        row_arrays |= dict(zip(("in_high", "in_low", "in_limit", "in_wide_steps", "in_gathered"), state, strict=True))
    before = {f"before_{name}": array for name, array in acc.items()}
    outs, scratch = _results_of(plan, x, is_part, bool(acc)), _scratch_of_backward(plan, x, len(before))
    first = len(scalars) + 2 + len(names) + 1 + len(row_arrays)  # index of the first of ``before`` among the kernel's arguments
    grads = pl.pallas_call(
        functools.partial(_body, plan, (*names, "d_out", *row_arrays, *before, *outs, *scratch), rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(batch, kv_heads, group, tiles, 1),
            in_specs=[
                *specs,
                _by_query(plan, d_out),
                *[row_spec] * len(row_arrays),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(before),
            ],
            out_specs=[spec for _, spec in outs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=plan.interpret,
        input_output_aliases={first + n: list(outs).index(f"d_{name}") for n, name in enumerate(acc)},
        name="posjax_attention_backward",
    )(*scalars, x.scale, block, *arrays, d_out, *row_arrays.values(), *before.values())
    grads = dict(zip(outs, grads, strict=True))
    if plan.counting is not None:
        high, low, gathered = (grads.pop(f"out_{name}") for name in ("high", "low", "gathered"))
        state = (high, low, row_arrays["in_limit"], row_arrays["in_wide_steps"], gathered)
    return {name.removeprefix("d_"): array for name, array in grads.items()}, state


_Result = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


def _by_query(plan: Plan, array: Array) -> pl.BlockSpec:
    """Returns the spec of an array by query, [B, K, G, T, C]."""
    return pl.BlockSpec((None,) * 3 + (plan.blocks.block_q, array.shape[-1]), lambda b, k, g, i, r, *_: (b, k, g, i, 0))


def _by_tile(plan: Plan, x: Operands) -> _Result:
    """Returns the shape and spec of float32 row values, [B, K, G, I, t / 128, 128]."""
    shape = (*x.query.shape[:3], x.query.shape[3] // plan.blocks.block_q, plan.groups, LANES)
    spec = pl.BlockSpec((None,) * 4 + shape[4:], lambda b, k, g, i, r, *_: (b, k, g, i, 0, 0))
    return jax.ShapeDtypeStruct(shape, jnp.float32), spec


def _results_of(plan: Plan, x: Operands, is_part: bool, adds: bool) -> dict[str, _Result]:
    """Returns the shapes and specs of the kernel's results by name.

    Args:
      plan, x, is_part: as in ``backward``.
      adds: whether the gradients of the queries are added to earlier ones, in float32.
    """
    batch, kv_heads, group, _, width = x.query.shape
    resident = min(plan.blocks.block_kv_resident, x.key.shape[2])

    def by_head(shape: tuple) -> _Result:
        struct = jax.ShapeDtypeStruct((batch, kv_heads, group, *shape), jnp.float32)
        return struct, pl.BlockSpec((None,) * 3 + shape, lambda b, k, g, *_: (b, k, g) + (0,) * len(shape))

    def by_key(array: Array) -> _Result:
        shape = (batch, kv_heads, resident, array.shape[-1])
        grad_struct = jax.ShapeDtypeStruct(shape, jnp.float32 if is_part else array.dtype)
        return grad_struct, pl.BlockSpec((None, None, *shape[2:]), lambda b, k, *_: (b, k, 0, 0))

    def of_queries(name: str) -> _Result:
        array = getattr(x, name)
        spec = _by_query(plan, array)
        shape: Any = spec.block_shape
        spec = pl.BlockSpec((1, 1, 1, *shape[3:]), spec.index_map)  # the target of an async copy needs all axes
        return jax.ShapeDtypeStruct(array.shape, jnp.float32 if adds else array.dtype), spec

    outs = {
        **{f"d_{name}": of_queries(name) for name in queries_of(x)},
        "d_key": by_key(x.key),
        "d_value": by_key(x.value),
        "d_scale": by_head((1, width)),
    }
    if x.embedding is not None:
        outs["d_embedding"] = by_head(x.embedding.shape[3:])
        outs |= {f"out_{name}": _by_tile(plan, x) for name in ("high", "low", "gathered")}
    if plan.index is not None:
        outs["d_table"] = by_head((LANES, LANES))
    if x.numbers is not None and any(program.learned for program in plan.pairs):
        outs["d_numbers"] = by_head(x.numbers.shape[2:])
    has_features = any(program.float_features for program in plan.pairs)
    if has_features and x.query_features is not None and x.key_features is not None:
        outs["d_key_features"] = by_head((x.key_features.shape[3], resident))
        shape = (batch, kv_heads, group, *x.query_features.shape[3:])
        spec = pl.BlockSpec((None,) * 3 + (shape[3], None, *shape[5:]), lambda b, k, g, i, r, *_: (b, k, g, 0, i, 0, 0))
        outs["d_query_features"] = jax.ShapeDtypeStruct(shape, jnp.float32), spec
    return outs


def _scratch_of_backward(plan: Plan, x: Operands, copies: int) -> dict[str, Any]:
    """Returns the scratch buffers of the backward pass by name; ``copies`` is the number of earlier gradients that are copied."""
    blocks, counting, width = plan.blocks, plan.counting, x.query.shape[-1]
    resident = min(blocks.block_kv_resident, x.key.shape[2])
    scratch = scratch_of(plan, x) | {
        "dk_acc": pltpu.VMEM((resident, width), jnp.float32),
        "dv_acc": pltpu.VMEM((resident, x.value.shape[-1]), jnp.float32),
        "dq_acc": pltpu.VMEM((width, blocks.block_q), jnp.float32),
    }
    if counting is not None:
        scratch["bases"] = pltpu.VMEM((plan.groups, blocks.block_kv_count // LANES, LANES), jnp.int32)
        scratch["bias_slopes"] = pltpu.VMEM((plan.groups, blocks.block_kv_count, LANES), jnp.float32)
        scratch["d_z"] = pltpu.VMEM((plan.groups, counting.rows, LANES), jnp.float32)
        scratch |= {name: pltpu.VMEM((plan.groups, LANES), jnp.float32) for name in ("gathered", "d_last")}
        scratch["wide_steps"] = pltpu.SMEM((2,), jnp.int32)
    if plan.index is not None or counting is not None:
        scratch["d_scores"] = pltpu.VMEM((plan.groups, blocks.block_kv_count, LANES), jnp.float32)
    if plan.index is not None:
        scratch["d_table_acc"] = pltpu.VMEM((LANES, SUBLANES, LANES), jnp.float32)
    if copies:
        scratch["arrivals"] = pltpu.SemaphoreType.DMA((copies,))
    return scratch
