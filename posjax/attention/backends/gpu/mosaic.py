"""Attention on Hopper GPUs through Mosaic GPU, forward and backward, for all keys that are not counted.

    forward        one block per query tile, starting from the softmax state of the counted keys
    query, plain   the gradient of a query tile
    key, plain     the gradients of a key tile, for all query heads that share it

In each block one warpgroup copies tiles to shared memory, ``stages`` of them ahead. Two others compute 64 rows each, on tensor
cores that read shared memory (wgmma). These kernels do not count, because the rows of a tile have different counts, and Mosaic
cannot read registers or shared memory at an index that differs by row.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.gpu.plan import BlockMask, Operands, Plan, query_tile_bounds
from posjax.attention.backends.gpu.scores import Keys, Rows, biased, gradient_of, index_range, walk, weights_of
from posjax.typing import Array

_ACCUMULATOR: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # public, but jax does not declare it so
GROUP = 64  # rows of a warpgroup, as wgmma requires
GROUPS = 2  # warpgroups that compute; one more copies tiles
_REGISTERS = {"compute": 232, "load": 40}  # per thread; a warpgroup has 128 threads, and there are 65,536 registers in all


class ScoreLayout(NamedTuple):
    """Describes the layout of a tile of scores: [queries, keys] or, if ``transposed``, [keys, queries]."""

    transposed: bool
    shape: tuple[int, int]

    def queries(self, x: Array) -> Array:
        return lax.broadcast_in_dim(x, self.shape, [int(self.transposed)])

    def keys(self, x: Array) -> Array:
        return lax.broadcast_in_dim(x, self.shape, [int(not self.transposed)])


# Within a warpgroup: matrices are in wgmma's register layout, vectors of rows or columns in that of its reductions ----------


def _row(ref: Any, *at: Any) -> Array:
    return plgpu.load(ref.at[at], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _column(ref: Any, *at: Any) -> Array:
    return plgpu.load(ref.at[at], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def _write(ref: Any, x: Array) -> None:
    """Writes x to GPU memory, even where threads write partial 32-byte sectors, which newer versions of jax reject by default."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _filled(shape: tuple[int, ...], value: float) -> Array:
    """Creates a constant float32 matrix, or a vector with a number per row, in wgmma's register layout."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _matmul_nt(a: Any, b: Any) -> Array:
    """Computes a b^T of two tiles in shared memory."""

    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, _ACCUMULATOR((a.shape[0], b.shape[0]), jnp.float32))


def _accumulate(plan: Plan, acc: Array, weights: Array, x: Any) -> Array:
    """Returns total + weights x, with weights cast to the dtype of the tile x in shared memory."""
    weights = weights.astype(x.dtype)
    if plan.interpret:  # the interpreter supports neither operands in registers nor accumulating into a sum
        x = x[...]
        plgpu.commit_smem()  # wgmma would read x in the way that copies write it; this read does not
        return acc + jnp.dot(weights, x, preferred_element_type=jnp.float32)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, x))(_ACCUMULATOR.init(acc))


def _rows_of(plan: Plan, r: Any, load: Callable[..., Array], b: Array, head: Array, at: Any) -> Rows:
    numbers = [r.numbers[head, n] for n in range(len(plan.pairs))]  # one each: see ``mosaic_unsupported_reason``
    segments = load(r.query_segments, _batch_row(r.query_segments, b), at) if plan.rules.segmented else None
    num_entries = 0 if plan.index is None else r.table.shape[-1]
    positions = load(r.query_positions, _batch_row(r.query_positions, b), at)
    return Rows(positions, segments, numbers.__getitem__, [], lambda n: r.table[head, n], num_entries)


def _keys_of(plan: Plan, r: Any, load: Callable[..., Array], b: Array, at: Any, is_full_block: bool) -> Keys | None:
    """Loads keys; returns None if the block is full and no bias is a function of single keys."""
    if is_full_block and not plan.pairs:
        return None
    segments = load(r.key_segments, _batch_row(r.key_segments, b), at) if plan.rules.segmented else None
    return Keys(load(r.key_positions, _batch_row(r.key_positions, b), at), segments, [])


def _batch_row(ref: Any, b: Array) -> Array | int:
    """Returns the row of ``ref`` for batch row b: row 0 if the batch shares one row."""
    return b if ref.shape[0] > 1 else 0


def _common_index(plan: Plan, r: Any, b: Array, first: Any, last: Any) -> Array | None:
    """Returns the table index that all pairs of query tile ``first`` and key tile ``last`` share if their block is full."""
    if plan.index is None:
        return None
    return plan.index(r.query_first[_batch_row(r.query_first, b), first], r.key_last[_batch_row(r.key_last, b), last])


def _query_tile(plan: Plan, r: Any) -> tuple[Array, Array, Array, Array, tuple[Array, ...]]:
    """Returns the batch row, head, query tile and warpgroup of this thread, and the bounds of the key tiles that were not counted.

    The bounds are first, full_begin, full_end and last as in ``plan.py``.
    """
    b, head, i, group = (lax.axis_index(name) for name in ("batch", "heads", "tiles", "group"))
    i = r.query.shape[1] // plan.blocks.block_q - 1 - i  # under a causal mask the last tiles take longest, so they run first
    *others, last = (r.by_queries[_batch_row(r.by_queries, b), i, n] for n in range(4))
    return b, head, i, group, (*others, last if plan.last is None else jnp.minimum(r.limit[b, head, i], last))


def _rows_at(plan: Plan, i: Array, group: Array) -> Any:
    """Returns the slice of a warpgroup's rows in query tile i."""
    return pl.ds(i * plan.blocks.block_q + group * GROUP, GROUP)


# Kernels -----------------------------------------------------------------------------------------------------------------


def _forward(plan: Plan, r: Any) -> None:
    b, head, i, group, bounds = _query_tile(plan, r)
    first, full_begin, full_end, last = bounds

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(_REGISTERS["compute"], action="increase")
        query_smem = r.queries.at[group]
        at = _rows_at(plan, i, group)
        plgpu.copy_gmem_to_smem(r.query.at[b, at, head], query_smem, r.arrived.at[group])
        rows, factor = _rows_of(plan, r, _row, b, head, at), r.scale[0] * LOG2E
        if plan.last is None:
            carry = _filled((GROUP,), INIT_MAX), _filled((GROUP,), 0.0), _filled((GROUP, r.value.shape[-1]), 0.0)
            constant = None
        else:
            acc = plgpu.load(r.acc.at[b, at, head], layout=plgpu.Layout.WGMMA, optimized=False)
            carry = _row(r.m, b, head, at), _row(r.l, b, head, at), acc
            constant = _row(r.z_last, b, head, at) * LOG2E
        plgpu.barrier_wait(r.arrived.at[group])

        def tile(is_full_block: bool, j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            slot = lax.rem(j - first, plan.blocks.num_stages)
            size = plan.blocks.block_kv if is_full_block or plan.index is None else GROUP  # table indices take registers, too
            layout, pieces = ScoreLayout(False, (GROUP, size)), plan.blocks.block_kv // size

            def piece(n: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                m, l, acc = carry
                here = pl.ds(n * size, size)
                keys = _keys_of(plan, r, _column, b, pl.ds(j * plan.blocks.block_kv + n * size, size), is_full_block)
                scores = _matmul_nt(query_smem, r.keys.at[slot, here]) * factor
                if pieces == 1:
                    plgpu.barrier_arrive(r.key_done.at[slot])
                scores = scores if constant is None else scores + layout.queries(constant)
                scores, _ = biased(plan, layout, rows, keys, scores, _common_index(plan, r, b, i, j), is_full_block)
                m_new = jnp.maximum(m, scores.max(1))
                weights, alpha = jnp.exp2(scores - layout.queries(m_new)), jnp.exp2(m - m_new)
                l = l * alpha + weights.sum(1)
                acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
                if pieces == 1:
                    plgpu.barrier_wait(r.value_here.at[slot])
                return m_new, l, _accumulate(plan, acc, weights, r.values.at[slot, here])

            plgpu.barrier_wait(r.key_here.at[slot])
            if pieces == 1:
                carry = piece(0, carry)
            else:
                plgpu.barrier_wait(r.value_here.at[slot])
                carry = lax.fori_loop(0, pieces, piece, carry)
                plgpu.barrier_arrive(r.key_done.at[slot])
            plgpu.barrier_arrive(r.value_done.at[slot])
            return carry

        m, l, acc = walk(tile, first, full_begin, full_end, last, carry)
        is_empty = l == 0.0
        l = jnp.where(is_empty, 1.0, l)
        out = (acc / lax.broadcast_in_dim(l, acc.shape, [0])).astype(r.out.dtype)
        _write(r.out.at[b, at, head], out)
        _write(r.lse.at[b, head, at], jnp.where(is_empty, -MASK_VALUE, m + jnp.log2(l)))

    @pl.when(group == GROUPS)
    def _load() -> None:
        plgpu.set_max_registers(_REGISTERS["load"], action="decrease")
        _copy_keys(plan, r, b, head, first, last)


def _copy_keys(plan: Plan, r: Any, b: Array, head: Array, first: Array, last: Array) -> None:
    """Copies key and value tiles to shared memory, alternately."""
    kv_head = lax.div(head, r.query.shape[2] // r.key.shape[2])

    def copy_tile(j: Array, _: None) -> None:
        slot, again = lax.rem(j - first, plan.blocks.num_stages), j - first >= plan.blocks.num_stages
        from_ = b, pl.ds(j * plan.blocks.block_kv, plan.blocks.block_kv), kv_head
        pl.when(again)(lambda: plgpu.barrier_wait(r.key_done.at[slot]))
        plgpu.copy_gmem_to_smem(r.key.at[from_], r.keys.at[slot], r.key_here.at[slot])
        pl.when(again)(lambda: plgpu.barrier_wait(r.value_done.at[slot]))
        plgpu.copy_gmem_to_smem(r.value.at[from_], r.values.at[slot], r.value_here.at[slot])

    lax.fori_loop(first, last, copy_tile, None)


def _query_plain(plan: Plan, r: Any) -> None:
    b, head, i, group, bounds = _query_tile(plan, r)
    first, full_begin, full_end, last = bounds

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(_REGISTERS["compute"], action="increase")
        query_smem, d_out_smem = r.queries.at[group], r.d_outs.at[group]
        at = _rows_at(plan, i, group)
        plgpu.copy_gmem_to_smem(r.query.at[b, at, head], query_smem, r.arrived.at[group])
        plgpu.copy_gmem_to_smem(r.d_out.at[b, at, head], d_out_smem, r.arrived.at[group])
        rows, factor = _rows_of(plan, r, _row, b, head, at), r.scale[0] * LOG2E
        lse, delta = _row(r.lse, b, head, at), _row(r.delta, b, head, at)
        layout = ScoreLayout(False, (GROUP, GROUP))  # a key tile is processed in pieces to save registers
        constant = None if plan.last is None else layout.queries(_row(r.z_last, b, head, at) * LOG2E)
        carry = {"d_query": _filled((GROUP, r.query.shape[-1]), 0.0)}
        if plan.last is not None:
            carry["d_last"] = _filled((GROUP,), 0.0)
        if plan.index is not None:
            carry["d_table"] = _filled((GROUP, r.d_table.shape[-1]), 0.0)
        plgpu.barrier_wait(r.arrived.at[group])

        def tile(is_full_block: bool, j: Array, carry: dict[str, Array]) -> dict[str, Array]:
            slot, common_index = lax.rem(j - first, plan.blocks.num_stages), _common_index(plan, r, b, i, j)
            plgpu.barrier_wait(r.key_here.at[slot])
            plgpu.barrier_wait(r.value_here.at[slot])

            def piece(n: Array, carry: dict[str, Array]) -> dict[str, Array]:
                here = pl.ds(n * GROUP, GROUP)
                key = r.keys.at[slot, here]
                keys = _keys_of(plan, r, _column, b, pl.ds(j * plan.blocks.block_kv + n * GROUP, GROUP), is_full_block)
                scores, d_weights = _matmul_nt(query_smem, key) * factor, _matmul_nt(d_out_smem, r.values.at[slot, here])
                scores = scores if constant is None else scores + constant
                scores, index = biased(plan, layout, rows, keys, scores, common_index, is_full_block)
                gradient = gradient_of(plan, layout, scores, weights_of(layout, scores, lse), d_weights, delta)
                grads = {"d_query": _accumulate(plan, carry["d_query"], gradient, key)}
                if constant is not None:
                    grads["d_last"] = carry["d_last"] + gradient.sum(1)
                if common_index is not None:
                    grads["d_table"] = _into_table(rows, carry["d_table"], index, common_index, gradient)
                return grads

            carry = lax.fori_loop(0, plan.blocks.block_kv // GROUP, piece, carry)
            plgpu.barrier_arrive(r.key_done.at[slot])
            plgpu.barrier_arrive(r.value_done.at[slot])
            return carry

        grads = walk(tile, first, full_begin, full_end, last, carry)
        _write(r.d_query.at[b, at, head], grads["d_query"])
        if plan.last is not None:
            _write(r.d_last.at[b, head, at], grads["d_last"])
        if plan.index is not None:
            _write(r.d_table.at[b, head, at], grads["d_table"])

    @pl.when(group == GROUPS)
    def _load() -> None:
        plgpu.set_max_registers(_REGISTERS["load"], action="decrease")
        _copy_keys(plan, r, b, head, first, last)


def _into_table(rows: Rows, d_table: Array, index: Array | None, common_index: Array, gradient: Array) -> Array:
    """Adds each row's gradients with equal indices to ``d_table`` [rows, entries]; without ``index`` all have ``common_index``."""
    entry = plgpu.broadcasted_iota(jnp.int32, d_table.shape, 1, layout=plgpu.Layout.WGMMA)

    def add(n: Array, selected: Array, d_table: Array) -> Array:
        return d_table + jnp.where(entry == n, lax.broadcast_in_dim(selected.sum(1), d_table.shape, [0]), 0.0)

    if index is None:
        return add(common_index, gradient, d_table)
    return lax.fori_loop(
        *index_range(rows, index), lambda n, d_table: add(n, jnp.where(index == n, gradient, 0.0), d_table), d_table
    )


def _key_plain(plan: Plan, r: Any) -> None:
    b, kv_head, j, group = (lax.axis_index(name) for name in ("batch", "heads", "tiles", "group"))
    first, full_begin, full_end, last = (r.by_keys[_batch_row(r.by_keys, b), j, n] for n in range(4))
    heads = r.query.shape[2] // r.key.shape[2]
    of_tile = plan.blocks.block_q // GROUP

    def begin(head: Array) -> Array:
        """Returns the first piece of queries that did not count this key tile."""
        return first if plan.last is None else jnp.clip(r.first_uncounted[b, head, j] * of_tile, first, last)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(_REGISTERS["compute"], action="increase")
        key_smem, value_smem = r.keys.at[group], r.values.at[group]
        at = pl.ds(j * plan.blocks.block_kv + group * GROUP, GROUP)
        plgpu.copy_gmem_to_smem(r.key.at[b, at, kv_head], key_smem, r.arrived.at[group])
        plgpu.copy_gmem_to_smem(r.value.at[b, at, kv_head], value_smem, r.arrived.at[group])
        factor, layout = r.scale[0] * LOG2E, ScoreLayout(True, (GROUP, GROUP))
        of_keys = {is_full_block: _keys_of(plan, r, _row, b, at, is_full_block) for is_full_block in (False, True)}
        plgpu.barrier_wait(r.arrived.at[group])

        def one_head(g: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            head = kv_head * heads + g
            start, base = begin(head), carry[0]

            def tile(is_full_block: bool, i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                d_key, d_value = carry
                slot = lax.rem(base + i - start, plan.blocks.num_stages)
                at = pl.ds(i * GROUP, GROUP)
                rows = _rows_of(plan, r, _column, b, head, at)
                common_index = _common_index(plan, r, b, i, j)
                plgpu.barrier_wait(r.query_here.at[slot])
                scores = _matmul_nt(key_smem, r.queries.at[slot]) * factor
                if plan.last is not None:
                    scores += layout.queries(_column(r.z_last, b, head, at) * LOG2E)
                scores, _ = biased(plan, layout, rows, of_keys[is_full_block], scores, common_index, is_full_block)
                if plan.last is not None:
                    counted = r.limit[b, head, lax.div(i, of_tile)] <= j
                    scores = jnp.minimum(scores, jnp.where(counted, MASK_VALUE, -MASK_VALUE))
                plgpu.barrier_wait(r.d_out_here.at[slot])
                weights = weights_of(layout, scores, _column(r.lses, slot))
                d_value = _accumulate(plan, d_value, weights, r.d_outs.at[slot])
                d_weights = _matmul_nt(value_smem, r.d_outs.at[slot])
                gradient = gradient_of(plan, layout, scores, weights, d_weights, _column(r.deltas, slot))
                d_key = _accumulate(plan, d_key, gradient, r.queries.at[slot])
                plgpu.commit_smem()  # lse and delta are read in another way than the next copy writes them
                plgpu.barrier_arrive(r.query_done.at[slot])
                return d_key, d_value

            bounds = start, jnp.maximum(full_begin, start), jnp.maximum(full_end, start), last
            return base + last - start, *walk(tile, *bounds, carry[1:])

        carry = jnp.int32(0), _filled((GROUP, r.key.shape[-1]), 0.0), _filled((GROUP, r.value.shape[-1]), 0.0)
        _, d_key, d_value = lax.fori_loop(0, heads, one_head, carry)
        _write(r.d_key.at[b, at, kv_head], d_key)
        _write(r.d_value.at[b, at, kv_head], d_value)

    @pl.when(group == GROUPS)
    def _load() -> None:
        plgpu.set_max_registers(_REGISTERS["load"], action="decrease")

        def one_head(g: Array, base: Array) -> Array:
            head = kv_head * heads + g
            start = begin(head)

            def copy_tile(i: Array, _: None) -> None:
                number, at = base + i - start, pl.ds(i * GROUP, GROUP)
                slot = lax.rem(number, plan.blocks.num_stages)
                pl.when(number >= plan.blocks.num_stages)(lambda: plgpu.barrier_wait(r.query_done.at[slot]))
                plgpu.copy_gmem_to_smem(r.query.at[b, at, head], r.queries.at[slot], r.query_here.at[slot])
                plgpu.copy_gmem_to_smem(r.d_out.at[b, at, head], r.d_outs.at[slot], r.d_out_here.at[slot])
                plgpu.copy_gmem_to_smem(r.lse.at[b, head, at], r.lses.at[slot], r.d_out_here.at[slot])
                plgpu.copy_gmem_to_smem(r.delta.at[b, head, at], r.deltas.at[slot], r.d_out_here.at[slot])

            lax.fori_loop(start, last, copy_tile, None)
            return base + last - start

        lax.fori_loop(0, heads, one_head, jnp.int32(0))


# Calls -------------------------------------------------------------------------------------------------------------------


def _tiles(x: Array, *shape: int) -> Any:
    """Describes shared memory for tiles of x, with x's channels as the last axis, in the layout that wgmma reads."""
    width = next(n for n in (64, 32, 16) if x.shape[-1] % n == 0)
    tiling, swizzle = cast(Any, plgpu.TilingTransform), cast(Any, plgpu.SwizzleTransform)  # abstract by their annotations alone
    transforms = tiling((8, width)), swizzle(2 * width)
    return plgpu.SMEM((*shape, x.shape[-1]), x.dtype, transforms=transforms)


def _call(
    body: Any, plan: Plan, grid: tuple[int, int, int], inputs: dict[str, Any], outputs: dict[str, Any], scratch: dict[str, Any]
) -> dict[str, Array]:
    """Runs a kernel on a grid of heads, tiles and batch."""
    inputs = {name: array for name, array in inputs.items() if array is not None}

    def run(*refs: Any) -> None:
        body(plan, types.SimpleNamespace(**dict(zip((*inputs, *outputs, *scratch), refs, strict=True))))

    run.__name__ = f"posjax_attention_mosaic{body.__name__}"
    results = plgpu.kernel(
        run,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if plan.interpret is True else plan.interpret or None,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _inputs(plan: Plan, x: Operands, block_mask: BlockMask) -> dict[str, Any]:
    """Returns the inputs that every kernel reads."""
    inputs = {field.name: getattr(x, field.name) for field in dataclasses.fields(x) if field.name not in ("z", "high", "low")}
    if x.z is not None:
        inputs["z_last"] = x.z[..., plan.last]
    return inputs | ({"key_last": block_mask.key_last} if plan.index is not None else {})


def _key_memory(plan: Plan, x: Operands) -> dict[str, Any]:
    """Describes the shared memory and barriers through which the keys and values of a query tile are streamed."""
    stages, keys = plan.blocks.num_stages, plan.blocks.block_kv
    here, done = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages)
    tiles = {"keys": _tiles(x.key, stages, keys), "values": _tiles(x.value, stages, keys)}
    return tiles | {"key_here": here, "value_here": here, "key_done": done, "value_done": done}


def forward(plan: Plan, x: Operands, block_mask: BlockMask, counted: dict[str, Array]) -> tuple[Array, Array]:
    """Runs the forward kernel; returns the output [B, T, N, V] and [B, N, T] log2 of the softmax's denominator.

    Args:
      counted: m, l [B, N, T] and acc [B, T, N, V], the softmax state of the keys that were counted, and ``limit``
        [B, N, I], the first key tile that each query tile counted. Empty if no term counts.
    """
    batch, length, heads, _ = x.query.shape
    out = jax.ShapeDtypeStruct((batch, length, heads, x.value.shape[-1]), x.value.dtype)
    outputs = {"out": out, "lse": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)}
    inputs = _inputs(plan, x, block_mask) | {"by_queries": block_mask.by_queries} | counted
    if plan.index is not None:
        inputs["query_first"] = block_mask.query_first
    scratch = {"queries": _tiles(x.query, GROUPS, GROUP), "arrived": plgpu.Barrier(num_barriers=GROUPS)} | _key_memory(plan, x)
    grid = heads, length // plan.blocks.block_q, batch
    results = _call(_forward, plan, grid, inputs, outputs, scratch)
    return results["out"], results["lse"]


def backward(
    plan: Plan, x: Operands, block_mask: BlockMask, lse: Array, limit: Array | None, d_out: Array, delta: Array
) -> dict[str, Array]:
    """Computes gradients in float32 from all pairs that were not counted. Arguments as in ``triton.backward``.

    Returns:
      By name d_query (before the scale), d_key, d_value and, where they apply, d_table [B, N, T, W or more] and d_last [B, N, T],
      the gradient of z at the last position.
    """
    batch, length, heads, _ = x.query.shape
    residuals = {"d_out": d_out, "lse": lse, "delta": delta} | ({} if limit is None else {"limit": limit})
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = _inputs(plan, x, block_mask) | residuals

    outputs: dict[str, Any] = {"d_query": like(x.query.shape)}
    if plan.last is not None:
        outputs["d_last"] = like(lse.shape)
    if x.table is not None:
        outputs["d_table"] = like((batch, heads, length, -(-x.table.shape[1] // 8) * 8))
    query_smem = _tiles(x.query, GROUPS, GROUP), _tiles(d_out, GROUPS, GROUP), plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS)
    scratch = dict(zip(("queries", "d_outs", "arrived"), query_smem, strict=True)) | _key_memory(plan, x)
    of_queries = {"by_queries": block_mask.by_queries} | ({} if plan.index is None else {"query_first": block_mask.query_first})
    grid = heads, length // plan.blocks.block_q, batch
    grads = _call(_query_plain, plan, grid, inputs | of_queries, outputs, scratch)

    of_keys = {"by_keys": block_mask.by_keys} | ({} if plan.index is None else {"query_first": block_mask.row_first})
    if limit is not None:
        of_keys["first_uncounted"] = query_tile_bounds(limit, x.key.shape[1] // plan.blocks.block_kv, first=True)
    stages = plan.blocks.num_stages
    numbers = plgpu.SMEM((stages, GROUP), jnp.float32)
    scratch = {
        "keys": _tiles(x.key, GROUPS, GROUP),
        "values": _tiles(x.value, GROUPS, GROUP),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        "queries": _tiles(x.query, stages, GROUP),
        "d_outs": _tiles(d_out, stages, GROUP),
        "lses": numbers,
        "deltas": numbers,
        "query_here": plgpu.Barrier(num_barriers=stages),
        "d_out_here": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "query_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    }
    grid = x.key.shape[2], x.key.shape[1] // plan.blocks.block_kv, batch
    outputs = {"d_key": like(x.key.shape), "d_value": like(x.value.shape)}
    return grads | _call(_key_plain, plan, grid, inputs | of_keys, outputs, scratch)
