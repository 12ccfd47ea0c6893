"""The TPU kernels over one part of the keys; implements the interface that ``ring.xla_chunked`` documents."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from posjax.attention.backends import kernel_call
from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.ring.kernels import by_key, carried, natural_lse, split_by_key, with_keys
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu.backward import backward
from posjax.attention.backends.tpu.blocks import Blocks, chip_at_hand
from posjax.attention.backends.tpu.forward import forward
from posjax.attention.backends.tpu.step import Operands, Plan, queries_of
from posjax.attention.backends.tpu.tiles import LANES
from posjax.attention.call import AttentionCall
from posjax.typing import Array

__all__ = ["by_key", "carried", "with_keys"]  # parts of the interface that are imported
BY_KEY = dict(key=2, value=2, segments=2, positions=2, features=4)


def to_operands(call: AttentionCall, block_sizes: Blocks | None) -> tuple[Plan, Operands]:
    chip = chip_at_hand(call.query)
    blocks = block_sizes or tpu.fitting(chip, call)
    assert blocks is not None  # unsupported_reason
    plan, x = tpu.to_operands(call, blocks, chip, ShardSpec())
    if plan.counting is not None:
        zeros = jnp.zeros((*x.query.shape[:3], *x.query_positions.shape[1:]), jnp.float32)
        x = dataclasses.replace(x, high=zeros, low=zeros)
    return plan, x


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    size, resident = x.key.shape[2] // parts, min(plan.blocks.block_kv_resident, x.key.shape[2])
    fits = x.key.shape[2] % parts == 0 and size % plan.blocks.block_kv == 0
    return plan if fits and (size <= resident or size % resident == 0) else None


def from_blocks(out: Array, length: int, width: int) -> Array:
    return tpu.from_blocks(out, length)


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return tuple(forward(plan, x, jnp.float32))


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    out, lse, *state = kernel_call.run(_outputs, plan, ShardSpec(), x, tpu.LETTERS)
    return out, natural_lse(lse).reshape(out.shape[:-1]), _numbers(*state[2:]) if state else (), state[:2]


def _numbers(limit: Array, wide_steps: Array) -> Array:
    """Compacts limit and wide_steps to [B, K, G, I (t / 128 + 2)]: one number per group of a query tile and two per tile.

    The kernel returns each number repeated along the lanes. Residuals are saved for every ring step, so one copy each is kept.
    """
    each = jnp.concatenate([limit[..., 0], wide_steps[..., 0, :2]], -1)
    return each.reshape(*each.shape[:3], -1)


def _to_rows(plan: Plan, numbers: Array) -> tuple[Array, Array]:
    """Expands the result of ``_numbers`` to limit and wide_steps in the kernels' layout."""
    each = numbers.reshape(*numbers.shape[:3], -1, plan.groups + 2)
    limit, first, last = jnp.split(each, (plan.groups, plan.groups + 1), axis=-1)
    shape = (*each.shape[:-1], plan.groups, LANES)
    wide_steps = jnp.where(jnp.arange(LANES) == 0, first[..., None], last[..., None])
    return jnp.broadcast_to(limit[..., None], shape), jnp.broadcast_to(wide_steps, shape)


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, lse: Array, *more: Array) -> tuple[Array, ...]:
    """Computes the gradients in the kernel.

    Args:
      more: high, low, limit, wide_steps and gathered if a term counts, then the accumulated gradients of the queries, if any.
    """
    counts, query_grads = (more[:5], more[5:]) if plan.counting is not None else ((), more)
    saved, gathered = (lse, *counts[:4]), counts[4] if counts else None
    acc = dict(zip(queries_of(x), query_grads, strict=False))
    grads = tpu.reduce_gradients(x, backward(plan, x, saved, d_out, delta, gathered, is_part=True, acc=acc))
    return tuple(grads[name] for name in _gradient_names(plan, x))


def _gradient_names(plan: Plan, x: Operands) -> list[str]:
    return tpu.differentiable_operands(plan, x) + ([] if x.embedding is None else ["gathered"])


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
    counts = (*carries_out, *_to_rows(plan, residuals), d_carries_out[0]) if d_carries_out else ()
    more = d_out, *(tpu.by_tile(plan, row) for row in (delta, lse * LOG2E)), *counts
    query_names = queries_of(x)  # the kernel accumulates these gradients itself
    if acc is not None:
        more += tuple(acc[name] for name in query_names)
    grads = dict(zip(_gradient_names(plan, x), kernel_call.run(_gradients, plan, ShardSpec(), x, tpu.LETTERS, *more), strict=True))
    received = [grads.pop("gathered"), d_carries_out[1]] if counts else []
    of_keys, rest = split_by_key(x, grads)
    if acc is not None:
        rest |= {name: acc[name] + part for name, part in rest.items() if name not in query_names}
    return of_keys, rest, received


def cotangent(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    (key,), (value,) = of_keys["key"], of_keys["value"]
    features = dict(key_features=of_keys["features"][0]) if of_keys["features"] else {}
    return kernel_call.cotangent(x, rest | features | dict(key=key, value=value))
