"""Weights put together where they are used, and activations cut as the batch is."""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.parallel.mesh import ROWS, mesh_of
from posjax.parallel.partition_rules import SHARDED_RULES, WEIGHTS, Rules, axis_names, fitting_spec


def gather_params(weights: Any, path: str, rules: Rules = SHARDED_RULES) -> Any:
    """Weights as they are used, whole along WEIGHTS; their gradients come back summed into parts.

    Of weights that are cut like the batch the compiler would take over the cut: it moves every activation so that D is cut and B is
    not. What a layer needs is put together within the loop over layers, so that a device has one layer whole at a time.

    Args:
      weights: a pytree of arrays; what no rule cuts over WEIGHTS is returned as it is.
      path: of the pytree among the parameters, as the patterns of the rules have it. The leaves may lack leading axes that the
        rules have: those of one layer have lost the axis of layers.
    """

    def one(where, leaf):
        mesh = mesh_of(leaf)
        if mesh is None:
            return leaf
        name = f"{path}/{jax.tree_util.keystr(where, simple=True, separator='/')}"
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        kept = fitting_spec(PartitionSpec(*spec[max(0, len(spec) - leaf.ndim) :]), leaf.shape, mesh)
        used = PartitionSpec(*(tuple(name for name in axis_names(axes) if name not in WEIGHTS) or None for axes in kept))
        return leaf if used == kept else _whole(mesh, used, kept, leaf)

    return jax.tree_util.tree_map_with_path(one, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(mesh: Mesh, used: PartitionSpec, kept: PartitionSpec, leaf: jax.Array) -> jax.Array:
    """``leaf``, cut by ``used`` instead of ``kept``."""
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, used))


def _whole_forward(mesh, used, kept, leaf):
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, used)), None


def _whole_backward(mesh, used, kept, _, gradient):
    """A sum of which each device keeps a part; with either constraint alone the compiler would cut what it is a sum of."""
    summed = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, used))
    return (jax.lax.with_sharding_constraint(summed, NamedSharding(mesh, kept)),)


_whole.defvjp(_whole_forward, _whole_backward)


def in_rows(x: jax.Array) -> jax.Array:
    """Activations [B, T, ...] with rows cut over ROWS and tokens over "context", as the batch is."""
    mesh = mesh_of(x)
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting_spec(PartitionSpec(ROWS, "context"), x.shape, mesh)))
