"""Casts for arrays inside a user's ``jax.shard_map``, which tracks the mesh axes along which arrays vary (``check_vma=True``).

JAX casts the operands of an operation to the union of their axes, and sums the gradient of a cast array over the added axes. It
does not cast the initial values of loops, or the arguments and results of Pallas kernels and functions with custom derivatives:
``vary_alike`` casts initial values, and ``untracked`` wraps functions that contain the others. Outside such a ``shard_map`` both do
nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def vary_alike(tree: Any, *like: Any) -> Any:
    """Casts the arrays of a pytree to vary along all axes of any array in ``tree`` or ``like``.

    The gradient of an array that varied along fewer axes is summed over the added ones.
    """
    return _cast(tree, _varying_axes((tree, like)))


def untracked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps function(call, **options) so that JAX does not track axes inside it. Its results vary along all axes of ``call``.

    Inside a ``shard_map`` that tracks axes, gradients are first-order, reverse-mode.

    Args:
      function: a function of a pytree of arrays and static options.
    """

    @functools.wraps(function)
    def called(call: Any, **options: Any) -> Any:
        return _untracked(functools.partial(function, **options), call) if _is_tracked(call) else function(call, **options)

    return called


def _varying_axes(tree: Any) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def _cast(tree: Any, axes: frozenset[str]) -> Any:
    def of_leaf(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(of_leaf, tree) if axes else tree


def _is_tracked(tree: Any) -> bool:
    """Returns whether the call is inside a ``shard_map`` that tracks axes, even if no array of the pytree varies."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes or _varying_axes(tree):
        return bool(axes)
    cast: Any = jax.make_jaxpr(lambda: jax.lax.pcast(jnp.zeros(()), axes, to="varying"))()  # no effect without tracking
    return bool(cast.out_avals[0].manual_axis_type.varying)


def _untracked(function: Callable[[Any], Any], call: Any) -> Any:
    leaves, structure = jax.tree.flatten(call)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    axes = _varying_axes(call)

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function in a ``shard_map`` over no further axes, which tracks nothing."""
        no_axes: dict[str, Any] = dict(in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        in_shards: Any = jax.shard_map(lambda *args: function(*jax.tree.map(_as_result, args)), axis_names=manual, **no_axes)
        call = jax.jit(in_shards, inline=True)  # outside jit, JAX does not support nested shard_maps
        return lambda *args: _cast(call(*args), axes)

    def compute(floats: list, others: list) -> Any:
        rest = iter(floats), iter(others)
        return function(jax.tree.unflatten(structure, [next(rest[0] if x else rest[1]) for x in is_float]))

    @jax.custom_vjp
    def run(floats: list, others: list) -> Any:
        return inside(compute)(floats, others)

    def forward(floats: list, others: list) -> tuple[Any, Any]:
        return inside(lambda floats, others: jax.vjp(lambda floats: compute(floats, others), floats))(floats, others)

    def backward(vjp: Any, gradient: Any) -> tuple[list, None]:
        return inside(lambda vjp, gradient: vjp(gradient)[0])(vjp, gradient), None

    run.defvjp(forward, backward)
    floats, others = ([leaf for leaf, x in zip(leaves, is_float, strict=True) if x == kind] for kind in (True, False))
    return run(_cast(floats, axes), others)


def _as_result(x: Any) -> Any:
    """Returns x as the result of an operation: in a ``shard_map`` that tracks nothing, only arguments keep their axes."""
    return jax.lax.squeeze(jax.lax.expand_dims(x, (0,)), (0,))
