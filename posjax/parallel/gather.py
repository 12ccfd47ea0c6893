"""All-gathers of sharded weights where they are used, and sharding of activations like the batch."""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.parallel.mesh import ROWS, mesh_of
from posjax.parallel.partition_rules import SHARDED_RULES, WEIGHTS, Rules, axis_names, fitting_spec


def gather_params(weights: Any, path: str, rules: Rules = SHARDED_RULES) -> Any:
    """All-gathers weights over WEIGHTS for use in the forward pass, and reduce-scatters their gradients in the backward pass.

    Without this, the compiler propagates the sharding of the weights: it reshards every activation so that D is sharded and B is
    not. The scan over layers calls this on the weights of one layer, so that a device holds one full layer at a time.

    Args:
      weights: a pytree of arrays. Leaves that no rule shards over WEIGHTS are returned unchanged.
      path: path of the pytree among the parameters, as the patterns of the rules spell it.
      rules: partition rules by which the weights are sharded. The leaves may lack leading axes of their rule: the weights of one
        layer, for example, lack the axis of layers.
    """

    def one(where, leaf):
        mesh = mesh_of(leaf)
        if mesh is None:
            return leaf
        name = f"{path}/{jax.tree_util.keystr(where, simple=True, separator='/')}"
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        kept = fitting_spec(PartitionSpec(*spec[max(0, len(spec) - leaf.ndim) :]), leaf.shape, mesh)
        used = PartitionSpec(*(tuple(name for name in axis_names(axes) if name not in WEIGHTS) or None for axes in kept))
        return leaf if used == kept else _gathered(mesh, used, kept, leaf)

    return jax.tree_util.tree_map_with_path(one, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(mesh: Mesh, used: PartitionSpec, kept: PartitionSpec, leaf: jax.Array) -> jax.Array:
    """Reshards ``leaf`` from ``kept`` to ``used``."""
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, used))


def _gathered_forward(mesh, used, kept, leaf):
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, used)), None


def _gathered_backward(mesh, used, kept, _, gradient):
    """Reduce-scatters the gradient. With only one of the two constraints, the compiler would shard the summands instead."""
    summed = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, used))
    return (jax.lax.with_sharding_constraint(summed, NamedSharding(mesh, kept)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def in_rows(x: jax.Array) -> jax.Array:
    """Constrains activations [B, T, ...] to the sharding of the batch: rows over ROWS, tokens over "context"."""
    mesh = mesh_of(x)
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting_spec(PartitionSpec(ROWS, "context"), x.shape, mesh)))
