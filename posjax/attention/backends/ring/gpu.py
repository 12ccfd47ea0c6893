"""The Triton GPU kernels over one part of the keys; implements the interface that ``ring.xla_chunked`` documents."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from posjax.attention.backends import kernel_call
from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu import triton
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.gpu.plan import Operands, Plan, make_block_mask
from posjax.attention.backends.ring.kernels import by_key, carried, natural_lse, split_by_key, with_keys
from posjax.attention.backends.ring.xla_chunked import added
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.call import AttentionCall
from posjax.typing import Array

__all__ = ["by_key", "carried", "with_keys"]  # parts of the interface that are imported
BY_KEY = dict(key=1, value=1, segments=1, positions=1, features=3)


def to_operands(call: AttentionCall, block_sizes: GpuBlocks | None) -> tuple[Plan, Operands]:
    if block_sizes is not None and block_sizes.lowering != "triton":
        what = f"block_sizes has lowering={block_sizes.lowering!r}"
        raise NotImplementedError(f"{what}, which ring attention does not support; lowering='triton' does")
    call = call.transformed()
    plan, x = gpu.to_operands(call, block_sizes or gpu.default_blocks(call, ("triton",)), ShardSpec())
    if x.z is not None:
        zeros = jnp.zeros(x.z.shape[:-1], jnp.float32)
        x = dataclasses.replace(x, high=zeros, low=zeros)
    return plan, x


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    return None if x.key.shape[1] % (parts * plan.blocks.block_kv) else plan


def from_blocks(out: Array, length: int, width: int) -> Array:
    return gpu.from_blocks(jnp.swapaxes(out, 1, 2), length, width)


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return triton.forward(plan, x, make_block_mask(plan, x), jnp.float32)


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    out, lse, *state = kernel_call.run(_outputs, plan, ShardSpec(), x, gpu.LETTERS)
    return jnp.swapaxes(out, 1, 2), natural_lse(lse), state[2:], state[:2]


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, lse: Array, *counts: Array) -> tuple[Array, ...]:
    """Computes the gradients in the kernels. ``counts`` holds high, low, limit and gathered, or nothing."""
    block_mask = make_block_mask(plan, x)
    grads = triton.backward(plan, x, block_mask, lse, counts[2] if counts else None, d_out, delta)
    tables = [grads["d_table"]] if plan.index is not None else []
    if counts:
        grads = triton.backward_band(plan, x, block_mask, (lse, *counts[:3]), d_out, delta, grads, counts[3])
        tables += [grads["d_table"]] if tables else []
    grads = gpu.reduce_gradients(plan, x, grads, tables)
    return tuple(grads[name] for name in _gradient_names(plan, x))


def _gradient_names(plan: Plan, x: Operands) -> list[str]:
    return gpu.differentiable_operands(plan, x) + ([] if x.z is None else ["gathered"])


def gradients(
    plan: Plan,
    x: Operands,
    lse: Array,
    residuals: Any,
    carries_out: Any,
    d_out: Array,
    delta: Array,
    d_carries_out: list[Array],
    acc: dict[str, Any] | None,
) -> tuple[dict[str, list[Array]], dict[str, Any], list[Array]]:
    counts = (*carries_out, *residuals, d_carries_out[0]) if d_carries_out else ()
    more = jnp.swapaxes(d_out, 1, 2), delta, lse * LOG2E, *counts
    grads = dict(zip(_gradient_names(plan, x), kernel_call.run(_gradients, plan, ShardSpec(), x, gpu.LETTERS, *more), strict=True))
    received = [grads.pop("gathered"), d_carries_out[1]] if counts else []
    of_keys, rest = split_by_key(x, grads)
    return of_keys, added(acc, rest), received


def cotangent(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    (key,), (value,) = of_keys["key"], of_keys["value"]
    features = dict(key_features=of_keys["features"][0]) if of_keys["features"] else {}
    return kernel_call.cotangent(x, rest | features | dict(key=key, value=value))
