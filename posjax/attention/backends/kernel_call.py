"""Code that the TPU and GPU backends share around their Pallas kernels: padding, sharding, tracing and cotangents.

A backend converts a call to a static plan, a frozen dataclass with a field ``interpret``, and to operands, a dataclass of arrays in
which fields that the call does not need are None. ``run`` calls a function of both on each device's shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.deferred import deferred
from posjax.attention.backends.shards import ShardSpec, exact, per_shard
from posjax.core.masks import Mask
from posjax.typing import Array

OperandsT = TypeVar("OperandsT")


def unsupported_mask(mask: Mask) -> str | None:
    """Returns why the kernels do not support this mask, or None if they do."""
    if mask.boolean is None:
        return None
    return "mask is an array (is_causal, segment_ids and local_window_size are supported)"


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
        on_shard = functools.partial(deferred, _on_shard, static)
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
