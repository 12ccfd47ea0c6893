"""The reference of all errors: posjax's dense attention in float32 on the CPU.

One block of queries attends to all keys at a time, so that peak memory is that of one block. The tests compare dense attention
itself with formulas in float64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends import reference
from posjax.attention.backends.bias_terms import gates_and_sums
from posjax.attention.call import AttentionCall, prepare
from posjax.bench.contestants import PLAIN, Options, attention_options
from posjax.bench.inputs import flatten, unflatten
from posjax.encodings.spec import parse_encoding

_CELLS = 2**21  # scores in memory at once; gradients need about twenty arrays of that size


def attend(spec: str, arrays: dict[str, np.ndarray], first: int, options: Options = PLAIN) -> tuple[np.ndarray, float | None]:
    """Computes the output of the queries from ``first`` on, [B, T - first, N, H] float32, and the mean gate, if there are gates."""

    @functools.partial(jax.jit, static_argnums=2)
    def rows(inputs: dict[str, Any], start: Any, size: int) -> tuple[Any, Any]:
        call = _call(spec, inputs, start, size, options)
        gates = [gates for gates, _ in gates_and_sums(call)][-1:]
        allowed = call.mask.allowed(call.query_positions, call.key_positions)
        return reference.attention(call), [(x.sum(), jnp.broadcast_to(allowed, x.shape).sum()) for x in gates]

    inputs, parts, gates = _inputs(arrays), [], []
    for start, size in _blocks(arrays["query"].shape, first):
        out, sums = jax.device_get(rows(inputs, start, size))
        parts.append(out)
        gates += sums
    total, pairs = (sum(float(x[n]) for x in gates) for n in (0, 1))
    return np.concatenate(parts, axis=1), total / pairs if gates else None


def gradients(spec: str, arrays: dict[str, np.ndarray], first: int, options: Options = PLAIN) -> dict[str, np.ndarray]:
    """Computes the gradients of sum(output * cotangent) over the queries from ``first`` on, with the names of ``Prepared.fetch``.

    Raises:
      FloatingPointError: a gradient is not finite.
    """

    @functools.partial(jax.jit, static_argnums=3)
    def pull(inputs: dict[str, Any], cotangent: Any, start: Any, size: int) -> dict[str, Any]:
        _, backward = jax.vjp(lambda inputs: reference.attention(_call(spec, inputs, start, size, options)), inputs)
        return backward(cotangent)[0]

    inputs = _inputs(arrays)
    total = {name: np.zeros(x.shape) for name, x in flatten(inputs, "grads").items()}
    for start, size in _blocks(arrays["query"].shape, first):
        of_block = jax.device_get(pull(inputs, arrays["cotangent"][:, start : start + size], start, size))
        for name, x in flatten(of_block, "grads").items():
            total[name] += x
    if bad := [name for name, x in total.items() if not np.isfinite(x).all()]:
        raise FloatingPointError(f"gradients of {', '.join(bad)} are not finite")
    return total


def _inputs(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    given = {name: arrays[name] for name in ("query", "key", "value", "hidden") if name in arrays}
    return given | {"params": unflatten(arrays)}


def _blocks(shape: tuple[int, ...], first: int) -> list[tuple[int, int]]:
    """Returns the first query and the size of every block."""
    batch, length, heads, _ = shape
    size = max(1, _CELLS // (batch * heads * length))
    return [(start, min(size, length - start)) for start in range(first, length, size)]


def _call(spec: str, inputs: dict[str, Any], start: Any, size: int, options: Options) -> AttentionCall:
    """Returns the call of ``size`` queries, from ``start`` on, with all keys."""
    length = inputs["query"].shape[1]

    def of_block(x: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    asked = attention_options(options, inputs["query"])
    if (segments := asked.pop("segment_ids")) is not None:
        asked["segment_ids"] = (of_block(segments), segments)
    if (hidden := inputs.get("hidden")) is not None:
        asked["hidden"] = (of_block(hidden), hidden)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    asked |= dict(query_positions=of_block(positions)[0], key_positions=positions[0])
    query = of_block(inputs["query"])
    return prepare(query, inputs["key"], inputs["value"], parse_encoding(spec), inputs["params"], **asked)
