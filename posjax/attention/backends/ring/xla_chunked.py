"""The tile walk in plain XLA over one part of the keys, and the interface that ``ring.attention`` requires of every backend.

A backend of the ring is a module with these functions:

    to_operands            converts a call to a Plan and Operands
    in_parts               returns the Plan for one of several equal parts of the keys
    by_key, carried        return the per-key arrays and the carries of operands
    with_keys              replaces both
    outputs, gradients     run the forward and the backward pass over one part of the keys
    from_blocks, cotangent convert the result and the gradients to those of the call

Per-key arrays are a dict of pytrees, and BY_KEY holds the axis of the keys in each of them. Carries are passed from one part of the
keys to the next, from right to left.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.xla_chunked import backward, forward, layout
from posjax.attention.backends.xla_chunked.layout import Operands, Plan, block, unblock
from posjax.attention.call import AttentionCall
from posjax.typing import Array

BY_KEY = dict(key=0, value=0, columns=2, segments=1, positions=1)


def to_operands(call: AttentionCall, block_sizes: None) -> tuple[Plan, Operands]:
    return layout.to_operands(call.transformed(), is_part=True)


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    """Returns the plan for one of ``parts`` equal parts of the keys; None if the keys cannot be split into so many.

    Padding stands at the end of the keys, so the parts of padded keys would have different numbers of real ones.
    """
    is_padded = plan.keys < x.key_positions.shape[1]
    if x.key.shape[0] % parts or (is_padded and parts > 1):
        return None
    return dataclasses.replace(plan, keys=plan.keys // parts)


def by_key(x: Operands) -> dict[str, Any]:
    columns = [term.columns for term in x.terms]
    return dict(key=x.key, value=x.value, columns=columns, segments=x.mask.key_segments, positions=x.key_positions)


def carried(x: Operands) -> Any:
    return [term.carry for term in x.terms]


def with_keys(x: Operands, kv: dict[str, Any], carried: Any) -> Operands:
    """Returns x with the per-key arrays ``kv`` in place of its own, and the carries of its terms replaced by ``carried``."""
    parts = zip(x.terms, kv["columns"], carried, strict=True)
    return dataclasses.replace(
        x,
        key=kv["key"],
        value=kv["value"],
        terms=tuple(dataclasses.replace(term, columns=c, carry=k) for term, c, k in parts),
        mask=dataclasses.replace(x.mask, key_segments=kv["segments"]),
        key_positions=kv["positions"],
    )


def from_blocks(out: Array, length: int, width: int) -> Array:
    """Converts a result to [B, T, N, V] and removes the padding of T and V."""
    return layout.from_blocks(out, length)


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    """Runs the forward pass over one part of the keys.

    Returns:
      The result in float32, the log-sum-exp of its rows (``EMPTY_LSE`` where a row has no allowed key), the other residuals that
      ``gradients`` needs, and the carries for the next part.
    """
    out, (lse, first, final) = forward.outputs(plan, x)
    return out, lse, first, jax.tree.map(unblock, final)


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
    """Computes the gradients for one part of the keys, in float32.

    Args:
      plan, x: as in ``outputs``.
      lse, d_out, delta: the log-sum-exp, the gradient of the result and rowsum(d_out * out) of the complete rows, over all keys.
      residuals, carries_out: the residuals and the carries that ``outputs`` returned for this part.
      d_carries_out: the gradients of ``carries_out``.
      acc: the gradients that other parts have accumulated for everything that is not per key; None for none.

    Returns:
      The gradients of the floating-point per-key arrays, the gradients of everything else added to ``acc``, and the gradients of
      the carries that this part received.
    """
    final = jax.tree.map(lambda rows: block(rows, plan.rows), carries_out)
    d_final = [block(rows, plan.rows) for rows in d_carries_out]
    grads = backward.gradients(plan, x, (lse, residuals, final), d_out, delta, d_final)
    of_keys = dict(key=[grads["key"]], value=[grads["value"]], columns=grads["columns"], segments=[], positions=[])
    rest = {name: grads[name] for name in ("query", "rows", "bias", "tables", "scale")}
    return of_keys, added(acc, rest), [unblock(tiles) for tiles in grads["carries"]]


def added(acc: Any, grads: Any) -> Any:
    """Adds the gradients ``grads`` to ``acc``, which is None if there are none yet."""
    return grads if acc is None else jax.tree.map(jnp.add, acc, grads)


def cotangent(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    """Assembles the three results of ``gradients`` into the gradient of the operands."""
    (key,), (value,) = of_keys["key"], of_keys["value"]
    return backward.cotangent(x, rest | dict(key=key, value=value, columns=of_keys["columns"], carries=received))
