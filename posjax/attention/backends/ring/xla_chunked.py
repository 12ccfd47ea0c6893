"""A walk in plain XLA over some keys of many, as ``ring`` asks for it.

What belongs to keys is a dict of trees, and BY_KEY has the axis of keys of each. What is carried goes from one part to the next,
from the right to the left.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends import xla_chunked
from posjax.attention.backends.xla_chunked import Operands, Plan, whole_rows
from posjax.typing import Array

BY_KEY = dict(key=0, value=0, columns=2, segments=1, positions=1)


def cut_up(call: dict[str, Any], _: Any) -> tuple[Plan, Operands]:
    return xla_chunked.cut_up(**call, is_part=True)


def in_parts(plan: Plan, x: Operands, parts: int) -> Plan | None:
    """The plan of a walk over one of several equal parts of the keys; None where they cannot be cut so."""
    return None if x.key.shape[0] % parts else dataclasses.replace(plan, keys=plan.keys // parts)


def by_key(x: Operands) -> dict[str, Any]:
    columns = [term.columns for term in x.terms]
    return dict(key=x.key, value=x.value, columns=columns, segments=x.mask.key_segments, positions=x.key_positions)


def carried(x: Operands) -> Any:
    return [term.carry for term in x.terms]


def with_keys(x: Operands, there: dict[str, Any], carried: Any) -> Operands:
    """The queries of x with other keys, and with what their terms have carried so far."""
    parts = zip(x.terms, there["columns"], carried, strict=True)
    return dataclasses.replace(
        x,
        key=there["key"],
        value=there["value"],
        terms=tuple(dataclasses.replace(term, columns=c, carry=k) for term, c, k in parts),
        mask=dataclasses.replace(x.mask, key_segments=there["segments"]),
        key_positions=there["positions"],
    )


def joined(out: Array, length: int, width: int) -> Array:
    """A result [B, T, N, V] without what pads T and V."""
    return xla_chunked.joined(out, length)


def outputs(plan: Plan, x: Operands) -> tuple[Array, Array, Any, Any]:
    """(result, float32, log-sum-exp of its rows or EMPTY_LSE, what else the gradients need, what is handed on)."""
    out, (lse, first, final) = xla_chunked.outputs(plan, x)
    return out, lse, first, jax.tree.map(whole_rows, final)


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
    """Gradients of the floats that belong to keys, of all others, and of what was received; float32.

    Args:
      lse, d_out, delta: of the whole rows.
      kept, handed_on: of ``outputs``.
      so_far: what other parts have found for all others, to which this is added; None: nothing.
    """
    final = jax.tree.map(lambda rows: xla_chunked.tiles_of(rows, plan.rows), handed_on)
    d_final = [xla_chunked.tiles_of(rows, plan.rows) for rows in d_handed_on]
    found = xla_chunked.gradients(plan, x, (lse, kept, final), d_out, delta, d_final)
    of_keys = dict(key=[found["key"]], value=[found["value"]], columns=found["columns"], segments=[], positions=[])
    rest = {name: found[name] for name in ("query", "rows", "tables", "scale")}
    return of_keys, added(so_far, rest), [whole_rows(tiles) for tiles in found["carries"]]


def added(so_far: Any, found: Any) -> Any:
    """Of gradients of the same; None: there are none so far."""
    return found if so_far is None else jax.tree.map(jnp.add, so_far, found)


def gradient_of(x: Operands, of_keys: dict[str, list[Array]], rest: dict[str, Any], received: list[Array]) -> Operands:
    """The three as the gradient of the operands."""
    (key,), (value,) = of_keys["key"], of_keys["value"]
    return xla_chunked.gradient_of(x, rest | dict(key=key, value=value, columns=of_keys["columns"], carries=received))
