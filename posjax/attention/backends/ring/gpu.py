"""The Triton GPU kernels over one part of the keys; implements the interface that ``ring.xla_chunked`` documents."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu import triton
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.gpu.plan import LOG2E, MASK_VALUE, Operands, Plan, visits
from posjax.attention.backends.ring.xla_chunked import added
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.xla_chunked import EMPTY_LSE
from posjax.typing import Array

BY_KEY = dict(key=1, value=1, segments=1, positions=1)


def cut_up(call: dict[str, Any], blocks: GpuBlocks | None) -> tuple[Plan, Operands]:
    if blocks is not None and blocks.lowering != "triton":
        what = f"block_sizes has lowering={blocks.lowering!r}"
        raise NotImplementedError(f"{what}, which does not go around a ring of devices; lowering='triton' does")
    blocks = blocks or gpu.default_blocks(call["query"], call["value"], call["terms"], ("triton",))
    plan, _, x = gpu.laid_out(blocks, ShardSpec(), None, **call)
    if plan.last is not None:
        nothing = jnp.zeros(x.z.shape[:-1], jnp.float32)
        x = dataclasses.replace(x, high=nothing, low=nothing)
    return plan, x


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    return None if x.key.shape[1] % (parts * plan.blocks.keys) else plan


def by_key(x: Operands) -> dict[str, Any]:
    return dict(key=x.key, value=x.value, segments=x.key_segments, positions=x.key_positions)


def carried(x: Operands) -> Any:
    return [] if x.high is None else [x.high, x.low]


def with_keys(x: Operands, there: dict[str, Any], carried: Any) -> Operands:
    high, low = carried or (None, None)
    keys = dict(key_segments=there["segments"], key_positions=there["positions"])
    return dataclasses.replace(x, key=there["key"], value=there["value"], **keys, high=high, low=low)


def joined(out: Array, length: int, width: int) -> Array:
    return gpu.joined(jnp.swapaxes(out, 1, 2), length, width)


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return triton.forward(plan, x, visits(plan, x), jnp.float32)


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    out, lse, *state = gpu.sharded(_outputs, plan, ShardSpec(), x, (), (), None)
    lse = jnp.where(lse < -0.5 * MASK_VALUE, lse / LOG2E, EMPTY_LSE)
    return jnp.swapaxes(out, 1, 2), lse, state[2:], state[:2]


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, lse: Array, *counts: Array) -> tuple[Array, ...]:
    """Computes the gradients in the kernels. ``counts`` holds high, low, limit and gathered, or nothing."""
    seen = visits(plan, x)
    found = triton.backward(plan, x, seen, lse, counts[2] if counts else None, d_out, delta)
    tables = [found["d_table"]] if plan.index is not None else []
    if counts:
        found = triton.backward_band(plan, x, seen, (lse, *counts[:3]), d_out, delta, found, counts[3])
        tables += [found["d_table"]] if tables else []
    found = gpu.summed_up(x, found, tables)
    return tuple(found[name] for name in _found(x))


def _found(x: Operands) -> list[str]:
    names = [name for name in gpu.LEARNED if getattr(x, name) is not None]
    return names + ([] if x.z is None else ["gathered"])


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
    counts = (*handed_on, *kept, d_handed_on[0]) if d_handed_on else ()
    more = jnp.swapaxes(d_out, 1, 2), delta, lse * LOG2E, *counts
    found = dict(zip(_found(x), gpu.sharded(_gradients, plan, ShardSpec(), x, more, (), None), strict=True))
    received = [found.pop("gathered"), d_handed_on[1]] if counts else []
    of_keys = dict(key=[found.pop("key")], value=[found.pop("value")], segments=[], positions=[])
    return of_keys, added(so_far, found), received


def gradient_of(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    (key,), (value,) = of_keys["key"], of_keys["value"]
    return gpu.gradient_of(x, rest | dict(key=key, value=value))
