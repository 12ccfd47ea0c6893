"""Shared parts of the TPU and GPU backends around their Pallas kernels: bias forms, padding, sharding, tracing and cotangents.

A backend lays a call out as a static plan, a frozen dataclass with a field ``interpret``, and as operands, a dataclass of arrays in
which a field that the call does not need is None. ``run`` calls a function of both on each device's shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.deferred import deferred
from posjax.attention.backends.shards import ShardSpec, exact, per_shard
from posjax.attention.call import AttentionCall
from posjax.core.masks import Mask
from posjax.core.structures import Bias, Pair, Scan, Table, sigmoid
from posjax.typing import Array

OperandsT = TypeVar("OperandsT")


class Biases(NamedTuple):
    """The biases of a call by the form in which the kernels evaluate them.

    Attributes:
      counting: a sum of sigmoid gates of the scores that interpolates products of the query with a table, as in CoPE; None without.
      lookup: a table of numbers at an index that is a function of two positions, as in T5; None without.
      functions: functions of the distance with one number per head, as in ALiBi.
    """

    counting: Bias | None
    lookup: Bias | None
    functions: tuple[Bias, ...]


def _form(bias: Bias) -> str | None:
    """Returns the field of ``Biases`` that a bias belongs to, or None if the kernels do not evaluate it."""
    at, read = bias.at, bias.read
    if isinstance(at, Scan):
        counts = at.gate is sigmoid and at.key is None and at.include_key and at.include_query
        interpolates = isinstance(read, Table) and read.side == "query" and read.interpolate
        return "counting" if counts and interpolates and at.bound == read.table.shape[1] - 1 else None
    if at.query is not None:
        return None
    args = jax.tree.leaves(at.args)
    if isinstance(read, Table) and read.side == "none" and not read.interpolate and not args:
        return "lookup"
    is_function = read is None and at.relative and not at.learned and len(args) == 1 and args[0].ndim == 1
    return "functions" if is_function else None


def biases_by_form(biases: tuple[Bias, ...]) -> Biases:
    """Returns the biases of a call that ``unsupported_biases`` accepts, by form."""
    forms = [(bias, _form(bias)) for bias in biases]
    first = {form: bias for bias, form in reversed(forms)}
    return Biases(first.get("counting"), first.get("lookup"), tuple(bias for bias, form in forms if form == "functions"))


def unsupported_biases(call: AttentionCall) -> str | None:
    """Returns why the kernels do not support the biases of a call, naming the argument at fault, or None if they do."""
    forms = [_form(bias) for bias in call.biases]
    for bias, form in zip(call.biases, forms, strict=True):
        if form is None:
            return f"encoding has a bias that the kernel does not evaluate ({_described(bias)})"
        if call.query_coordinates is not None and isinstance(bias.at, Pair):
            return f"query_coordinates are given, and the kernel evaluates a bias ({_described(bias)}) at positions"
    for form, what in {"counting": "counts by gates", "lookup": "reads a table at an index of positions"}.items():
        if forms.count(form) > 1:
            return f"encoding {what} twice"
    return None


def _described(bias: Bias) -> str:
    function = bias.at.function if isinstance(bias.at, Pair) else bias.at.gate
    parts = [f"{type(bias.at).__name__} of {getattr(function, '__name__', function)}"]
    if isinstance(bias.at, Scan) and bias.at.key is not None:
        parts.append("of keys" if bias.at.query is None else "of vectors of query and key")
    if bias.read is not None:
        parts.append(f"read by a {type(bias.read).__name__}")
    return ", ".join(parts)


def index_of(lookup: Bias | None) -> Callable[[Array, Array], Array] | None:
    """Returns the function from positions of queries and keys to the index of a lookup; None without one."""
    return None if lookup is None else _Index(lookup.at.function, lookup.at.relative)


def uniform_of(lookup: Bias | None) -> Callable[..., Any] | None:
    """Returns the test of whether all pairs in ranges of positions have one index; it is never sure if the function has none."""
    return None if lookup is None else getattr(lookup.at.function, "uniform", _unsure)


def _unsure(first_query: Array, last_query: Array, first_key: Array, last_key: Array) -> Array:
    return (first_query - first_query) != 0


@dataclasses.dataclass(frozen=True)
class _Index:
    function: Callable[..., Array]
    relative: bool

    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        if self.relative:
            return self.function((query_positions - key_positions,), ())
        return self.function((query_positions,), (key_positions,), ())


def args_of(functions: tuple[Bias, ...], heads: int) -> Array | None:
    """Returns the numbers of functions, [N, F] float32; None without functions."""
    if not functions:
        return None
    args = [jnp.broadcast_to(jax.tree.leaves(bias.at.args)[0].astype(jnp.float32), (heads,)) for bias in functions]
    return jnp.stack(args, -1)


@dataclasses.dataclass(frozen=True)
class DistanceFunction:
    """A function of the distance of two positions with one number per head, in units of log2 e.

    Attributes:
      function: of a ``Pair``.
      structure: that of its args.
    """

    function: Callable[..., Array]
    structure: Any

    @classmethod
    def of(cls, bias: Bias) -> "DistanceFunction":
        return cls(bias.at.function, jax.tree.structure(bias.at.args))

    def __call__(self, distance: Array, arg: Array) -> Array:
        """Returns the bias at ``distance``, integers [s, t], with ``arg`` broadcastable to it."""
        if getattr(self.function, "scales_with_args", False):  # few numbers to multiply in place of all biases
            return self.function((distance,), jax.tree.unflatten(self.structure, [arg * LOG2E]))
        return self.function((distance,), jax.tree.unflatten(self.structure, [arg])).astype(jnp.float32) * LOG2E


def unsupported_mask(mask: Mask) -> str | None:
    """Returns why the kernels do not support this mask, or None if they do."""
    if mask.boolean is None:
        return None
    return "mask is an array (is_causal, segment_ids and local_window_size are made inside of the tile)"


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
    """Calls function(plan, operands, *more) on each device's shard; its kernels are interpreted where it is lowered for a CPU.

    Args:
      function: hashable.
      plan, operands: of the call.
      spec: the axes that shard the call.
      letters: axis letters of every operand by its name, as in ``per_shard``.
      *more: further arrays.
      more_letters, results: axis letters of these and of the results; needed only if the mesh of ``spec`` is not None.
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
