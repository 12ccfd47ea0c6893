"""Attention on NVIDIA GPUs: the entry point of the Pallas kernels, the operands they take and the calls they do not support.

XLA does two things before the kernels run, in time linear in T. It rotates queries and keys: a kernel would have to rotate a key
tile again for every query tile, on its way to tensor cores that read it from shared memory. It also computes q.e of CoPE,
z [T, P] per head, because the kernels look up single numbers of a row, which is possible only in memory. The kernels compute the
gradient of z.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends import kernel_call
from posjax.attention.backends.gpu import triton
from posjax.attention.backends.gpu.blocks import LEAST, LOWERINGS, GpuBlocks, blocks_for, capability, mosaic_unsupported_reason
from posjax.attention.backends.gpu.plan import Operands, Plan, make_block_mask
from posjax.attention.backends.kernel_biases import (
    PairProgram,
    biases_by_form,
    features_of,
    index_of,
    numbers_of,
    uniform_of,
    unsupported_biases,
)
from posjax.attention.backends.kernel_call import pad_to_multiple
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec
from posjax.attention.backends.sinks import with_sink
from posjax.attention.call import AttentionCall
from posjax.core.masks import Rules, with_padding
from posjax.core.structures import Table
from posjax.typing import Array, Float

_log = logging.getLogger(__package__)
NAME: str = "cuda"  # the platform in jax.lax.platform_dependent
BLOCK_SIZES_CLS = GpuBlocks  # the type of ``block_sizes`` for these kernels
_WIDEST = 288  # channels of a head: 256, or 128 with the channels that untied positions append


def unsupported_reason(call: AttentionCall, *, block_sizes: GpuBlocks | None = None, spec: ShardSpec | None = None) -> str | None:
    """Returns why the kernels do not support a call, naming the argument at fault, or None if they do; see ``attention``."""
    query = call.query
    if capability() < LEAST:
        return f"the GPU has compute capability {capability() / 10} (NVIDIA's from {LEAST / 10} on are supported)"
    if (reason := kernel_call.unsupported_mask(call.mask)) is not None:
        return reason
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype} (bfloat16, float16 and float32 are supported)"
    if _channels(query, call.value) > _WIDEST:
        return f"query has {query.shape[-1]} channels and value {call.value.shape[-1]} (at most {_WIDEST})"
    if (reason := unsupported_biases(call)) is not None:
        return reason
    if block_sizes is not None and block_sizes.lowering == "mosaic":
        channels = _channels(query, call.value)
        reason = mosaic_unsupported_reason(capability(), query.dtype, channels, _entries(call), block_sizes, _programs(call))
        return None if reason is None else f"block_sizes has lowering='mosaic': {reason} (lowering='triton' can)"
    return None


def _channels(query: Array, value: Array) -> int:
    return max(query.shape[-1], value.shape[-1])


def _entries(call: AttentionCall) -> int:
    table = biases_by_form(call.biases).lookup_table
    return 0 if table is None else table.table.shape[1]


def _programs(call: AttentionCall) -> tuple[PairProgram, ...]:
    return tuple(map(PairProgram.of, biases_by_form(call.biases).pairs))


def attention(
    call: AttentionCall, *, block_sizes: GpuBlocks | None = None, spec: ShardSpec | None = None, interpret: Any = None
) -> Float[Array, "B T N V"]:
    """Computes attention with the GPU kernels, each device on its shard of batch and heads.

    Args:
      call: one for which ``unsupported_reason`` returns None; this is not checked again. Pending transforms are applied first.
      block_sizes: None takes those of the device.
      spec: how a mesh shards batch and heads; None infers it from the query's type.
      interpret: None interprets the kernels where the program is lowered for a CPU; else what ``pallas_call`` takes.

    Returns:
      [B, T, N, V] in the dtype of value. Rows without an allowed key are zero.
    """
    spec = infer_shard_spec(call.query) if spec is None else spec
    call = call.transformed()
    plan, operands = to_operands(call, default_blocks(call) if block_sizes is None else block_sizes, spec, interpret)
    out, lse = kernel_call.attend(_KERNELS, plan, spec, operands)
    length = call.query.shape[1]
    lse = jnp.swapaxes(lse, 1, 2)[:, :length]
    return with_sink(from_blocks(out, length, call.value.shape[-1]), lse, call.sink)


def from_blocks(out: Array, length: int, width: int) -> Array:
    """Removes the padding of T and V from the kernels' output [B, T, N, V]."""
    return out[:, :length, :, :width]


def to_operands(call: AttentionCall, blocks: GpuBlocks, spec: ShardSpec, interpret: Any = None) -> tuple[Plan, Operands]:
    """Converts a call without pending transforms to the static plan and the operands of the kernels.

    Arguments are those of ``attention``.
    """
    forms = biases_by_form(call.biases)
    counts, looks, pairs = forms.counting_table, forms.lookup_table, forms.pairs
    query, key, value = call.query, call.key, call.value
    repeats = np.lcm(key.shape[2], spec.num_head_shards) // key.shape[2]  # more shards than key heads: each needs its own
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    padding = -key.shape[1] % blocks.block_kv
    key_positions, query_segments, key_segments = with_padding(call.mask, query.shape[1], call.key_positions, padding)

    def by_query(x: Array | None, axis: int = 1) -> Array | None:
        return None if x is None else pad_to_multiple(x, blocks.block_q, axis)

    def of_heads(x: Array | None) -> Array | None:
        """Converts features [F, B or 1, N or K or 1, T or S] to [B or 1, N or K or 1, F, T or S]."""
        if x is None:
            return None
        if 1 < x.shape[2] < key.shape[2]:  # key heads that have been repeated
            x = jnp.repeat(x, key.shape[2] // x.shape[2], axis=2)
        return jnp.moveaxis(x, 0, 2)

    key_features = of_heads(features_of(pairs, "key"))
    plan = Plan(
        blocks=blocks,
        rules=Rules(call.mask.is_causal, *call.mask.window, segmented=query_segments is not None),
        soft_cap=call.logits_soft_cap,
        last=None if counts is None else counts.table.shape[1] - 1,
        index=index_of(forms.lookup),
        uniform=uniform_of(forms.lookup),
        pairs=tuple(map(PairProgram.of, pairs)),
        interpret=interpret,
    )
    operands = Operands(
        query=_pad_channels(pad_to_multiple(query, blocks.block_q, 1)),
        key=_pad_channels(pad_to_multiple(key, blocks.block_kv, 1)),
        value=_pad_channels(pad_to_multiple(value, blocks.block_kv, 1)),
        scale=call.scale.reshape(1),
        query_positions=pad_to_multiple(call.query_positions, blocks.block_q, 1),
        key_positions=key_positions,
        query_segments=by_query(query_segments),
        key_segments=key_segments,
        z=None if counts is None else by_query(_embedding_products(counts, query), 2),
        table=None if looks is None else jnp.broadcast_to(looks.table.astype(jnp.float32), (query.shape[2], _entries(call))),
        numbers=numbers_of(pairs, query.shape[2]),
        query_features=by_query(of_heads(features_of(pairs, "query")), 3),
        key_features=None if key_features is None else pad_to_multiple(key_features, blocks.block_kv, 3),
    )
    return plan, operands


def default_blocks(call: AttentionCall, lowerings: tuple[str, ...] = LOWERINGS) -> GpuBlocks:
    """Returns the block sizes that ``blocks_for`` chooses for a call on the current device."""
    counts, _, _ = biases_by_form(call.biases)
    channels, entries = _channels(call.query, call.value), _entries(call)
    return blocks_for(capability(), call.query.dtype, channels, counts is not None, entries, lowerings, _programs(call))


def _embedding_products(counts: Table, query: Array) -> Array:
    """Computes z [B, N, T, P] in float32, the products of each query with the position embedding; ``query`` is that of the call."""
    query = query if counts.query is None else counts.query
    embedding = counts.table.astype(jnp.float32)
    form = "btnh,nph->bntp" if embedding.shape[0] > 1 else "btnh,ph->bntp"
    embedding = embedding if embedding.shape[0] > 1 else embedding[0]
    return jnp.einsum(form, query.astype(jnp.float32), embedding, precision=jax.lax.Precision.HIGHEST)


def _pad_channels(x: Array) -> Array:
    """Pads x with zeros to a multiple of 16 channels."""
    more = -x.shape[-1] % 16
    return jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) if more else x


# Forward and backward, on each shard of a mesh ---------------------------------------------------------------------------

LETTERS = dict(  # the axis letters of each operand, for ``per_shard``
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
    numbers="n.",
    query_features="bn..",
    key_features="bn..",
    high="bn.",
    low="bn.",
)


def differentiable_operands(plan: Plan, x: Operands) -> list[str]:
    """Returns the names of the operands that have gradients."""
    names = [name for name in ("query", "key", "value", "scale", "z", "table") if getattr(x, name) is not None]
    names += ["numbers"] if plan.learns_numbers else []
    return names + (["query_features", "key_features"] if plan.float_features else [])


def _run_forward(plan: Plan, x: Operands) -> tuple[Array, ...]:
    """Runs the forward kernels of the plan's lowering on one shard; returns what ``triton.forward`` returns."""
    block_mask = make_block_mask(plan, x)
    if plan.interpret is False:
        _log_lowering(plan.blocks.lowering, _lowering_reason(plan, x))
    if plan.blocks.lowering == "triton":
        return triton.forward(plan, x, block_mask)
    from posjax.attention.backends.gpu import mosaic  # not available in every version of jax

    counted = {} if plan.last is None else triton.forward_band(plan, x, block_mask)
    state = [counted.pop(name) for name in ("high", "low") if counted]
    return *mosaic.forward(plan, x, block_mask, counted), *state, *([counted["limit"]] if counted else [])


def _lowering_reason(plan: Plan, x: Operands) -> str:
    if plan.blocks.lowering == "mosaic":
        return "its block sizes name it"
    entries = 0 if x.table is None else x.table.shape[1]
    reason = mosaic_unsupported_reason(capability(), x.query.dtype, _channels(x.query, x.value), entries, pairs=plan.pairs)
    return f"mosaic cannot: {reason}" if reason else "its block sizes name it; mosaic could, too"


@functools.cache
def _log_lowering(lowering: str, reason: str) -> None:
    """Logs which lowering is used and why, once for each reason."""
    _log.info("attention on a GPU of compute capability %s takes lowering=%r: %s", capability() / 10, lowering, reason)


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, *saved: Array) -> tuple[Array, ...]:
    if plan.blocks.lowering == "triton":
        kernels: Any = triton
    else:
        from posjax.attention.backends.gpu import mosaic as kernels
    block_mask, (lse, *counts) = make_block_mask(plan, x), saved
    grads = kernels.backward(plan, x, block_mask, lse, counts[-1] if counts else None, d_out, delta)
    tables = [grads["d_table"]] if plan.index is not None else []
    if counts:
        grads = triton.backward_band(plan, x, block_mask, saved, d_out, delta, grads)
        tables += [grads["d_table"]] if tables else []
    grads = reduce_gradients(plan, x, grads, tables)
    return tuple(grads[name] for name in differentiable_operands(plan, x))


def reduce_gradients(plan: Plan, x: Operands, grads: dict[str, Array], tables: list[Array]) -> dict[str, Array]:
    """Converts the backward kernels' outputs to gradients of the operands; ``tables`` are parts of a lookup table's gradient."""
    d_query = grads["d_query"]
    grads |= {"d_query": d_query * x.scale[0], "d_key": grads["d_key"] * x.scale[0]}
    grads["d_scale"] = (d_query * x.query.astype(jnp.float32)).sum().reshape(1)
    if x.table is not None:
        width = x.table.shape[1]
        grads["d_table"] = functools.reduce(jnp.add, [table.sum((0, 2))[:, :width] for table in tables])
    if x.numbers is not None and plan.learns_numbers:
        grads["d_numbers"] = grads["d_numbers"].sum((0, 2))[:, : x.numbers.shape[1]]
    for name in ("query_features", "key_features") if plan.float_features else ():
        grads[f"d_{name}"] = _of_features(plan, getattr(x, name), grads[f"d_{name}"])
    return {name.removeprefix("d_"): x for name, x in grads.items()}


def _of_features(plan: Plan, features: Array, gradient: Array) -> Array:
    """Sums the gradient [B, N, D, L] of the D features that have one over the batch rows and heads that share ``features``."""
    batch, heads = features.shape[:2]
    gradient = gradient.reshape(gradient.shape[0], heads, -1, *gradient.shape[2:]).sum(2)
    gradient = gradient if batch > 1 else gradient.sum(0, keepdims=True)
    return jnp.zeros_like(features).at[:, :, list(plan.float_features)].set(gradient)


_KERNELS = kernel_call.Kernels(
    letters=LETTERS,
    out="b.n.",
    rows="bn.",
    forward=_run_forward,
    num_residuals=lambda plan: 1 if plan.last is None else 4,
    backward=_gradients,
    differentiable=differentiable_operands,
    to_rows=lambda plan, rows: jnp.swapaxes(rows, 1, 2),
)
