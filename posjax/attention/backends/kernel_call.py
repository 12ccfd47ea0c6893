"""Code that the TPU and GPU backends share around their Pallas kernels: padding, sharding, tracing and differentiation.

A backend converts a call to a static plan, a frozen dataclass with fields ``interpret`` and ``platforms`` and an attribute ``home``
(see ``deferred``), and to operands, a dataclass of arrays in which fields that the call does not need are None. ``run`` calls a
function of both on each device's shard, and ``attend`` makes a differentiable function from a backend's ``Kernels``, which are its
forward pass with residuals and its backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.deferred import deferred
from posjax.attention.backends.shards import ShardSpec, exact, per_shard
from posjax.attention.call import AttentionCall
from posjax.checks import is_symbolic
from posjax.typing import Array

OperandsT = TypeVar("OperandsT", bound=Any)  # a dataclass


def unsupported_sizes(*arrays: Array) -> str | None:
    """Returns why the kernels do not support these query, key and value, or None if their sizes are known."""
    for name, x in zip(("query", "key", "value"), arrays, strict=True):
        if is_symbolic(*x.shape):
            return f"{name} has symbolic sizes, {x.shape} (kernels are compiled for known sizes)"
    return None


def unsupported_arrays(call: AttentionCall) -> str | None:
    """Returns why the kernels do not support the arrays of pairs that a call has, or None if it has none."""
    if call.mask.boolean is not None:
        return "mask is an array (is_causal, segment_ids, lengths and local_window_size are supported)"
    if call.bias is not None:
        return "bias is an array (biases of an encoding are supported)"
    return None


def block_sizes_for(backend: Any, block_sizes: Any) -> Any:
    """Returns the block sizes of a call if they are of this backend's type, else None."""
    return block_sizes if isinstance(block_sizes, backend.BLOCK_SIZES_CLS) else None


def pad_to_multiple(x: Array, of: int, axis: int) -> Array:
    """Pads x to a multiple of ``of`` along an axis by repeating its last entry."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % of)
    return jnp.pad(x, widths, mode="edge") if widths[axis][1] else x


def run(
    function: Callable[..., tuple[Array, ...]],
    plan: Any,
    spec: ShardSpec,
    operands: Any,
    letters: Mapping[str, str],
    *more: Array,
    more_letters: tuple[str, ...] = (),
    results: Any = None,
) -> Any:
    """Calls function(plan, operands, *more) on each device's shard; its kernels are interpreted if it is lowered for a CPU.

    Args:
      function: a hashable function.
      plan, operands: the plan and the operands of the call.
      spec: the axes that shard the call.
      letters: axis letters of every operand by its name, as in ``per_shard``.
      *more: further arrays.
      more_letters, results: axis letters of ``more`` and of the results; needed only if the mesh of ``spec`` is not None.
    """
    present = tuple(field.name for field in dataclasses.fields(operands) if getattr(operands, field.name) is not None)
    static = function, plan, type(operands), present
    if plan.interpret is None:
        on_shard = functools.partial(deferred, _on_shard, static, plan.home, plan.platforms)
    else:
        on_shard = functools.partial(_on_shard, *static, plan.interpret)
    arrays = [getattr(operands, name) for name in present]
    return per_shard(on_shard, spec, (*[letters[name] for name in present], *more_letters), results)(*arrays, *more)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _on_shard(
    function: Any, plan: Any, operands_cls: Any, present: tuple[str, ...], interpret: Any, *arrays: Array
) -> tuple[Array, ...]:
    """Calls ``function(plan, operands, *more)``, where ``arrays`` are the operands named in ``present``, then ``more``.

    The cache of this jit avoids tracing the kernel, ten thousand operations, again.
    """
    fields = dict.fromkeys(field.name for field in dataclasses.fields(operands_cls)) | dict(zip(present, arrays, strict=False))
    with jax.enable_x64(False):  # kernels use 32-bit numbers even in 64-bit programs
        return function(dataclasses.replace(plan, interpret=interpret), operands_cls(**fields), *arrays[len(present) :])


def gradient_letters(operands: Any, names: list[str], letters: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the axis letters of the gradients of the operands ``names``."""
    return tuple(exact(letters[name], getattr(operands, name)) for name in names)


def cotangent(operands: OperandsT, gradients: Mapping[str, Array]) -> OperandsT:
    """Returns the cotangent of the operands from gradients by name, in the operands' dtypes; float0 for integer operands."""

    def like(name: str) -> Any:
        primal = getattr(operands, name)
        if primal is None:
            return None
        if name in gradients:
            return gradients[name].astype(primal.dtype)
        if jnp.issubdtype(primal.dtype, jnp.inexact):
            return jnp.zeros_like(primal)
        return np.zeros(primal.shape, jax.dtypes.float0)

    return type(operands)(**{field.name: like(field.name) for field in dataclasses.fields(operands)})


@dataclasses.dataclass(frozen=True, eq=False)
class Kernels:
    """Holds the forward and backward kernels of a backend, functions of the operands of one shard.

    Attributes:
      letters: axis letters of every operand by its name, as in ``per_shard``.
      out: axis letters of the output.
      rows: axis letters of values by row of the scores, in the layout of the kernels.
      forward: (plan, operands) -> the output in the dtype of value, the base-2 log-sum-exp of its rows, further residuals by row.
      num_residuals: plan -> the number of residuals by row, the log-sum-exp included.
      backward: (plan, operands, d_out, delta, *residuals) -> the gradients of the operands that ``differentiable`` names.
      differentiable: (plan, operands) -> the names of the operands that have gradients.
      to_rows: (plan, values by row in the axes of the output) -> the layout of the kernels.
    """

    letters: Mapping[str, str]
    out: str
    rows: str
    forward: Callable[..., tuple[Array, ...]]
    num_residuals: Callable[[Any], int]
    backward: Callable[..., tuple[Array, ...]]
    differentiable: Callable[[Any, Any], list[str]]
    to_rows: Callable[[Any, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(kernels: Kernels, plan: Any, spec: ShardSpec, x: Any) -> tuple[Array, Array]:
    """Computes attention on operands, differentiably, each device on its shard.

    Returns:
      The output and the log-sum-exp of its rows in nats, both in the layout of the kernels.
    """
    return _forward(kernels, plan, spec, x)[0]


def _forward(kernels: Kernels, plan: Any, spec: ShardSpec, x: Any) -> tuple[tuple[Array, Array], Any]:
    results = kernels.out, *[kernels.rows] * kernels.num_residuals(plan)
    out, *residuals = run(kernels.forward, plan, spec, x, kernels.letters, results=results)
    return (out, residuals[0] / LOG2E), (x, out, residuals)


def _backward(kernels: Kernels, plan: Any, spec: ShardSpec, saved: Any, gradients_out: tuple[Array, Array]) -> tuple[Any]:
    (x, out, residuals), (d_out, d_lse) = saved, gradients_out
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    names = kernels.differentiable(plan, x)
    grads = run(
        kernels.backward,
        plan,
        spec,
        x,
        kernels.letters,
        d_out,
        kernels.to_rows(plan, delta) - d_lse,
        *residuals,
        more_letters=(kernels.out, *[kernels.rows] * (1 + len(residuals))),
        results=gradient_letters(x, names, kernels.letters),
    )
    return (cotangent(x, dict(zip(names, grads, strict=True))),)


attend.defvjp(_forward, _backward)
