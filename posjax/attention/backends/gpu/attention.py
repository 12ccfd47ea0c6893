"""Attention on NVIDIA GPUs: the entry point of the Pallas kernels, the operands they take and the calls they do not support.

XLA does two things before the kernels run, in time linear in T. It rotates queries and keys: a kernel would have to rotate a key
tile again for every query tile, on its way to tensor cores that read it from shared memory. It also computes q.e of CoPE,
z [T, P] per head, because the kernels look up single numbers of a row, which is possible only in memory. The kernels compute the
gradient of z.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.deferred import deferred
from posjax.attention.backends.gpu import triton
from posjax.attention.backends.gpu.blocks import LEAST, LOWERINGS, GpuBlocks, blocks_for, capability, mosaic_refusal
from posjax.attention.backends.gpu.plan import Operands, Plan, visits
from posjax.attention.backends.shards import ShardSpec, exact, infer_shard_spec, per_shard
from posjax.core.bias import BiasTerm, Interpolation, Lookup, Penalty
from posjax.core.masks import Mask, Rules, with_padding
from posjax.typing import Array, Float, Int

_log = logging.getLogger(__package__)
BLOCK_SIZES_CLS = GpuBlocks  # the type of ``block_sizes`` for these kernels
_WIDEST = 288  # channels of a head: 256, or 128 with the channels that untied positions append


def refusal(
    query: Array, value: Array, terms: tuple[BiasTerm, ...], mask: Mask, block_sizes: GpuBlocks | None = None, **rest: Any
) -> str | None:
    """Returns why the kernels do not support a call, naming the argument, or None if they do. Arguments as in ``attention``."""
    if capability() < LEAST:
        return f"the GPU has compute capability {capability() / 10} (NVIDIA's from {LEAST / 10} on are supported)"
    if mask.boolean is not None:
        return "mask is an array (is_causal, segment_ids and local_window_size are made inside of the tile)"
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype} (bfloat16, float16 and float32 are supported)"
    if _channels(query, value) > _WIDEST:
        return f"query has {query.shape[-1]} channels and value {value.shape[-1]} (at most {_WIDEST})"
    for term in terms:
        if term.fused is None:
            return f"encoding has a bias that the kernel does not know ({term.function})"
    kinds = [type(term.fused) for term in terms]
    for kind, name in ((Interpolation, "cope"), (Lookup, "t5"), (Penalty, "alibi")):
        if kinds.count(kind) > 1:
            return f"encoding chains {name} twice"
    if block_sizes is not None and block_sizes.lowering == "mosaic":
        reason = mosaic_refusal(capability(), query.dtype, _channels(query, value), _entries(terms), block_sizes)
        return None if reason is None else f"block_sizes has lowering='mosaic': {reason} (lowering='triton' can)"
    return None


def _channels(query: Array, value: Array) -> int:
    return max(query.shape[-1], value.shape[-1])


def _entries(terms: tuple[BiasTerm, ...]) -> int:
    return next((term.tables.shape[0] for term in terms if isinstance(term.fused, Lookup)), 0)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    scale: Array | float,
    logits_soft_cap: float | None = None,
    *,
    tile: GpuBlocks | None = None,
    cut: ShardSpec | None = None,
    interpret: Any = None,
) -> Float[Array, "B T N V"]:
    """Computes attention with the GPU kernels, on each device's own rows and heads.

    Args:
      query, ..., logits_soft_cap: as in ``reference.attention``. ``refusal`` must have returned None for them; this is not checked
        again.
      tile: block sizes; None for those of the device.
      cut: how a mesh shards batch and heads; None to infer it from the query's type.
      interpret: None to interpret the kernels where the program is lowered for a CPU, or what ``pallas_call`` takes.

    Returns:
      [B, T, N, V] in the dtype of value. Rows without an allowed key are zero.
    """
    cut = infer_shard_spec(query) if cut is None else cut
    call = dict(query=query, key=key, value=value, terms=terms, mask=mask, scale=scale, logits_soft_cap=logits_soft_cap)
    call |= dict(query_positions=query_positions, key_positions=key_positions)
    out = _attend(*laid_out(default_blocks(query, value, terms) if tile is None else tile, cut, interpret, **call))
    return joined(out, query.shape[1], value.shape[-1])


def joined(out: Array, length: int, width: int) -> Array:
    """Removes the padding of T and V from the kernels' output [B, T, N, V]."""
    return out[:, :length, :, :width]


def laid_out(
    blocks: GpuBlocks,
    cut: ShardSpec,
    interpret: Any,
    *,
    query: Array,
    key: Array,
    value: Array,
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Array,
    key_positions: Array,
    scale: Array | float,
    logits_soft_cap: float | None = None,
) -> tuple[Plan, ShardSpec, Operands]:
    """Converts a call to the static plan and the operands that the kernels take. Arguments as in ``attention``."""
    kinds = {type(term.fused): term for term in terms}
    counts, looks, penalty = (kinds.get(kind) for kind in (Interpolation, Lookup, Penalty))
    repeats = np.lcm(key.shape[2], cut.num_head_shards) // key.shape[2]  # more shards than key heads: each needs its own
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    padding = -key.shape[1] % blocks.keys
    key_positions, query_segments, key_segments = with_padding(mask, query.shape[1], key_positions, padding)

    def by_query(x: Array | None, axis: int = 1) -> Array | None:
        return None if x is None else _padded(x, blocks.queries, axis)

    plan = Plan(
        blocks=blocks,
        rules=Rules(mask.is_causal, *mask.window, segmented=query_segments is not None),
        soft_cap=logits_soft_cap,
        last=None if counts is None else counts.tables[1].shape[-2] - 1,
        index=looks.fused.index if looks else None,
        uniform=looks.fused.uniform if looks else None,
        penalised=penalty is not None,
        interpret=interpret,
    )
    operands = Operands(
        query=_widened(by_query(query)),
        key=_widened(_padded(key, blocks.keys, 1)),
        value=_widened(_padded(value, blocks.keys, 1)),
        scale=jnp.asarray(scale, jnp.float32).reshape(1),
        query_positions=by_query(query_positions),
        key_positions=key_positions,
        query_segments=by_query(query_segments),
        key_segments=key_segments,
        z=None if counts is None else by_query(_products(counts), 2),
        table=None if looks is None else looks.tables.astype(jnp.float32).T,
        slopes=None if penalty is None else penalty.tables.astype(jnp.float32),
    )
    return plan, cut, operands


def default_blocks(query: Array, value: Array, terms: tuple[BiasTerm, ...], lowerings: tuple[str, ...] = LOWERINGS) -> GpuBlocks:
    """Returns the block sizes that ``blocks_for`` chooses for the current device."""
    counts = any(isinstance(term.fused, Interpolation) for term in terms)
    return blocks_for(capability(), query.dtype, _channels(query, value), counts, _entries(terms), lowerings)


def _products(counts: BiasTerm) -> Array:
    """Computes z [B, N, T, P] in float32, the products of each query with the position embedding."""
    query, embedding = counts.rows["query"].astype(jnp.float32), counts.tables[1].astype(jnp.float32)
    form = "bnth,nph->bntp" if embedding.ndim == 3 else "bnth,ph->bntp"
    return jnp.einsum(form, query, embedding, precision=jax.lax.Precision.HIGHEST)


def _padded(x: Array, to: int, axis: int) -> Array:
    """Pads x to a multiple of ``to`` along an axis by repeating its last element."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths, mode="edge") if widths[axis][1] else x


def _widened(x: Array) -> Array:
    """Pads x with zeros to a multiple of 16 channels."""
    more = -x.shape[-1] % 16
    return jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) if more else x


# Forward and backward, on each shard of a mesh ---------------------------------------------------------------------------

_LETTERS = dict(  # the axis letters of each operand, for ``per_shard``
    query="b.n.",
    key="b.n.",
    value="b.n.",
    scale=".",
    query_positions="b.",
    key_positions="b.",
    query_segments="b.",
    key_segments="b.",
    z="bn..",
    table="n.",
    slopes="n",
    high="bn.",
    low="bn.",
)
LEARNED = ("query", "key", "value", "scale", "z", "table")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function: Any, plan: Plan, present: tuple[str, ...], interpret: Any, *arrays: Array) -> tuple[Array, ...]:
    """Calls function(plan, operands, *more); ``arrays`` holds the operands named in ``present``, then ``more``."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Operands)) | dict(zip(present, arrays, strict=False))
    return function(dataclasses.replace(plan, interpret=interpret), Operands(**fields), *arrays[len(present) :])


def sharded(
    function: Any, plan: Plan, cut: ShardSpec, x: Operands, more: tuple[Array, ...], letters: tuple[str, ...], results: Any
) -> Any:
    """Calls function(plan, operands, *more) on each device's shard; where lowered for a CPU, the kernels are interpreted."""
    present = tuple(field.name for field in dataclasses.fields(x) if getattr(x, field.name) is not None)
    if plan.interpret is None:
        part = functools.partial(deferred, _run, (function, plan, present))
    else:
        part = functools.partial(_run, function, plan, present, plan.interpret)
    arrays = [getattr(x, name) for name in present]
    return per_shard(part, cut, (*[_LETTERS[name] for name in present], *letters), results)(*arrays, *more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, cut: ShardSpec, x: Operands) -> Array:
    """Computes attention [B, T, N, V] in the dtype of value, with the gradient of the backward kernels."""
    return _forward(plan, cut, x)[0]


def _forward(plan: Plan, cut: ShardSpec, x: Operands) -> tuple[Array, Any]:
    rows = 1 if plan.last is None else 4
    out, *saved = sharded(_attended, plan, cut, x, (), (), ("b.n.", *["bn."] * rows))
    return out, (x, out, tuple(saved))


def _attended(plan: Plan, x: Operands) -> tuple[Array, ...]:
    """Runs the forward kernels of the plan's lowering on one shard; returns what ``triton.forward`` returns."""
    seen = visits(plan, x)
    if plan.interpret is False:
        _say(plan.blocks.lowering, _why(plan, x))
    if plan.blocks.lowering == "triton":
        return triton.forward(plan, x, seen)
    from posjax.attention.backends.gpu import mosaic  # not available in every version of jax

    counted = {} if plan.last is None else triton.forward_band(plan, x, seen)
    state = [counted.pop(name) for name in ("high", "low") if counted]
    return *mosaic.forward(plan, x, seen, counted), *state, *([counted["limit"]] if counted else [])


def _why(plan: Plan, x: Operands) -> str:
    if plan.blocks.lowering == "mosaic":
        return "its block sizes name it"
    entries = 0 if x.table is None else x.table.shape[1]
    refused = mosaic_refusal(capability(), x.query.dtype, _channels(x.query, x.value), entries)
    return f"mosaic cannot: {refused}" if refused else "its block sizes name it; mosaic could, too"


@functools.cache
def _say(lowering: str, why: str) -> None:
    """Logs which lowering is used and why, once for each reason."""
    _log.info("attention on a GPU of compute capability %s takes lowering=%r: %s", capability() / 10, lowering, why)


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, *saved: Array) -> tuple[Array, ...]:
    if plan.blocks.lowering == "triton":
        kernels: Any = triton
    else:
        from posjax.attention.backends.gpu import mosaic as kernels
    seen, (lse, *counts) = visits(plan, x), saved
    found = kernels.backward(plan, x, seen, lse, counts[-1] if counts else None, d_out, delta)
    tables = [found["d_table"]] if plan.index is not None else []
    if counts:
        found = triton.backward_band(plan, x, seen, saved, d_out, delta, found)
        tables += [found["d_table"]] if tables else []
    found = summed_up(x, found, tables)
    return tuple(found[name] for name in LEARNED if name in found)


def summed_up(x: Operands, found: dict[str, Array], tables: list[Array]) -> dict[str, Array]:
    """Converts the backward kernels' outputs to gradients of the operands; ``tables`` are parts of a lookup table's gradient."""
    d_query = found["d_query"]
    found |= {"d_query": d_query * x.scale, "d_key": found["d_key"] * x.scale}
    found["d_scale"] = (d_query * x.query.astype(jnp.float32)).sum().reshape(1)
    if tables:
        found["d_table"] = sum(table.sum((0, 2))[:, : x.table.shape[1]] for table in tables)
    return {name.removeprefix("d_"): x for name, x in found.items()}


def _backward(plan: Plan, cut: ShardSpec, kept: Any, d_out: Array) -> tuple[Operands]:
    x, out, saved = kept
    delta = jnp.swapaxes((d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), 1, 2)
    names = [name for name in LEARNED if getattr(x, name) is not None]
    results = tuple(exact(_LETTERS[name], getattr(x, name)) for name in names)
    found = sharded(_gradients, plan, cut, x, (d_out, delta, *saved), ("b.n.", *["bn."] * (1 + len(saved))), results)
    return (gradient_of(x, dict(zip(names, found, strict=True))),)


def gradient_of(x: Operands, given: dict[str, Array]) -> Operands:
    """Collects gradients, given by name, into one of the operands, in their dtypes; float0 where an operand holds integers."""

    def like(name: str) -> Any:
        primal = getattr(x, name)
        if primal is None:
            return None
        if name in given:
            return given[name].astype(primal.dtype)
        if jnp.issubdtype(primal.dtype, jnp.inexact):
            return jnp.zeros_like(primal)
        return np.zeros(primal.shape, jax.dtypes.float0)

    return Operands(**{field.name: like(field.name) for field in dataclasses.fields(x)})


_attend.defvjp(_forward, _backward)
