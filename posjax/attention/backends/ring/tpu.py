"""The TPU kernels over one part of the keys; implements the interface that ``ring.xla_chunked`` documents."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu.backward import backward
from posjax.attention.backends.tpu.blocks import Blocks, chip_at_hand
from posjax.attention.backends.tpu.forward import forward
from posjax.attention.backends.tpu.step import Operands, Plan, queries_of
from posjax.attention.backends.tpu.tiles import LANES, LOG2E, MASK_VALUE
from posjax.attention.backends.xla_chunked import EMPTY_LSE
from posjax.typing import Array

BY_KEY = dict(key=2, value=2, segments=2, positions=2)


def cut_up(call: dict[str, Any], blocks: Blocks | None) -> tuple[Plan, Operands]:
    chip = chip_at_hand(call["query"])
    plan, x = tpu.laid_out(blocks or tpu.fitting(chip, call), chip, ShardSpec(), None, **call)
    if plan.counting is not None:
        nothing = jnp.zeros((*x.query.shape[:3], *x.query_positions.shape[1:]), jnp.float32)
        x = dataclasses.replace(x, high=nothing, low=nothing)
    return plan, x


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    size, resident = x.key.shape[2] // parts, min(plan.blocks.resident, x.key.shape[2])
    fits = x.key.shape[2] % parts == 0 and size % plan.blocks.keys == 0
    return plan if fits and (size <= resident or size % resident == 0) else None


def by_key(x: Operands) -> dict[str, Any]:
    return dict(key=x.key, value=x.value, segments=x.key_segments, positions=x.key_positions)


def carried(x: Operands) -> Any:
    return [] if x.high is None else [x.high, x.low]


def with_keys(x: Operands, there: dict[str, Any], carried: Any) -> Operands:
    high, low = carried or (None, None)
    keys = dict(key_segments=there["segments"], key_positions=there["positions"])
    return dataclasses.replace(x, key=there["key"], value=there["value"], **keys, high=high, low=low)


def joined(out: Array, length: int, width: int) -> Array:
    return tpu.joined(out, length)


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return tuple(forward(plan, x, jnp.float32))


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    out, lse, *state = tpu.sharded(_outputs, plan, ShardSpec(), x, (), (), None)
    lse = jnp.where(lse < -0.5 * MASK_VALUE, lse / LOG2E, EMPTY_LSE).reshape(out.shape[:-1])
    return out, lse, _numbers(*state[2:]) if state else (), state[:2]


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
    counts, own = (more[:5], more[5:]) if plan.counting is not None else ((), more)
    saved, gathered = (lse, *counts[:4]), counts[4] if counts else None
    so_far = dict(zip(queries_of(x), own, strict=False))
    found = tpu.summed_up(x, backward(plan, x, saved, d_out, delta, gathered, is_part=True, so_far=so_far))
    return tuple(found[name] for name in _found(x))


def _found(x: Operands) -> list[str]:
    return tpu.learned(x) + ([] if x.embedding is None else ["gathered"])


def gradients(
    plan: Plan,
    x: Operands,
    lse: Array,
    kept: Any,
    handed_on: Any,
    d_out: Array,
    delta: Array,
    d_handed_on: list[Array],
    so_far: dict[str, Any] | None,
) -> tuple[dict[str, list[Array]], dict[str, Any], list[Array]]:
    counts = (*handed_on, *_to_rows(plan, kept), d_handed_on[0]) if d_handed_on else ()
    more = d_out, *(tpu.by_tile(plan, row) for row in (delta, lse * LOG2E)), *counts
    own = queries_of(x)  # the kernel accumulates these gradients itself
    if so_far is not None:
        more += tuple(so_far[name] for name in own)
    found = dict(zip(_found(x), tpu.sharded(_gradients, plan, ShardSpec(), x, more, (), None), strict=True))
    received = [found.pop("gathered"), d_handed_on[1]] if counts else []
    of_keys = dict(key=[found.pop("key")], value=[found.pop("value")], segments=[], positions=[])
    if so_far is not None:
        found |= {name: so_far[name] + part for name, part in found.items() if name not in own}
    return of_keys, found, received


def gradient_of(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    (key,), (value,) = of_keys["key"], of_keys["value"]
    return tpu.gradient_of(x, rest | dict(key=key, value=value))
