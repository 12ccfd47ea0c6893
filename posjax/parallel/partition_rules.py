"""Where the state lives: a small table of partition rules, and the sharding of each leaf of a state by them.

The state is cut by SHARDED_RULES; by PARTITION_RULES, the default, it is whole on every device.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, PartitionSpec]]
WEIGHTS = ("fsdp", "context")

# Leaves of the state follow the first rule whose pattern is found in their path ("params/layers/kernel",
# "opt_state/1/mu/layers/kernel", ...): the moments of a parameter lie where it does.
PARTITION_RULES: Rules = ((r"", PartitionSpec()),)

# For `Transformer` on many devices. Over "tensor" a pair of products costs one sum of activations (Megatron-LM, arXiv:1909.08053);
# over WEIGHTS lie parts that are put together where they are used, see `gather.gather_params` (ZeRO, arXiv:1910.02054). The first
# axis of a layer's weight is the layer, which the scan walks along.
SHARDED_RULES: Rules = (
    (r"layers/(query|key|value)/kernel$", PartitionSpec(None, WEIGHTS, "tensor", None)),  # [L, D, N or K, H]
    (r"layers/out/kernel$", PartitionSpec(None, "tensor", None, WEIGHTS)),  # [L, N, H, D]
    (r"layers/(up|gate)/kernel$", PartitionSpec(None, WEIGHTS, "tensor")),  # [L, D, F]
    (r"layers/down/kernel$", PartitionSpec(None, "tensor", WEIGHTS)),  # [L, F, D]
    (r"token_embedding/embedding$", PartitionSpec("tensor", WEIGHTS)),  # [V, D]
    (r"head/kernel$", PartitionSpec(WEIGHTS, "tensor")),  # [D, V]
    (r"", PartitionSpec()),
)


def state_shardings(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """The NamedSharding of each leaf of `state` (arrays or ShapeDtypeStructs) by the rules, in a like pytree.

    Axes of a rule that the mesh has not, or that do not divide the leaf, are left out, the last ones first.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        return NamedSharding(mesh, fitting_spec(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def fitting_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """``spec`` without axes that the mesh has not, or that do not divide an array of that shape, the last ones first."""

    def fitting(axes, size):
        names = [name for name in axis_names(axes) if mesh.shape.get(name, 1) > 1]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        return tuple(names) or None

    return PartitionSpec(*(fitting(axes, size) for axes, size in zip(spec, shape, strict=False)))


def axis_names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes of one axis of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shard_state(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """Puts a state on the devices of `mesh` by `state_shardings`; with several processes, all pass the same values."""
    shardings = state_shardings(state, mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)
    return jax.jit(lambda state: state, out_shardings=shardings)(state)  # device_put takes no keys to another process
