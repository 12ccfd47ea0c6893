"""Partition rules: a table of path patterns that determines the sharding of each leaf of a train state.

SHARDED_RULES shards the state. PARTITION_RULES, the default, replicates it on every device.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, PartitionSpec]]
WEIGHTS = ("fsdp", "context")

# A leaf of the state follows the first rule whose pattern is found in its path ("params/layers/kernel",
# "opt_state/1/mu/layers/kernel", ...), so the moments of a parameter are sharded like the parameter.
PARTITION_RULES: Rules = ((r"", PartitionSpec()),)

# For `Transformer` on many devices. With "tensor", a pair of matrix products costs one all-reduce of activations (Megatron-LM,
# arXiv:1909.08053). Weights sharded over WEIGHTS are all-gathered where they are used, see `gather.gather_params` (ZeRO,
# arXiv:1910.02054). The first axis of a layer's weight is the layer, which the scan iterates over.
SHARDED_RULES: Rules = (
    (r"layers/(query|key|value)/kernel$", PartitionSpec(None, WEIGHTS, "tensor", None)),  # [L, D, N or K, H]
    (r"layers/out/kernel$", PartitionSpec(None, "tensor", None, WEIGHTS)),  # [L, N, H, D]
    (r"layers/(up|gate)/kernel$", PartitionSpec(None, WEIGHTS, "tensor")),  # [L, D, F]
    (r"layers/down/kernel$", PartitionSpec(None, "tensor", WEIGHTS)),  # [L, F, D]
    (r"layers/(query|key|value)/bias$", PartitionSpec(None, "tensor", None)),  # [L, N or K, H]
    (r"layers/(up|gate)/bias$", PartitionSpec(None, "tensor")),  # [L, F]
    (r"token_embedding/embedding$", PartitionSpec("tensor", WEIGHTS)),  # [V, D]
    (r"head_transform/kernel$", PartitionSpec(WEIGHTS, None)),  # [D, D]
    (r"head/kernel$", PartitionSpec(WEIGHTS, "tensor")),  # [D, V]
    (r"(head/bias|head_bias)$", PartitionSpec("tensor")),  # [V]
    (r"", PartitionSpec()),
)


def state_shardings(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """Returns the NamedSharding that the rules assign to each leaf of `state` (arrays or ShapeDtypeStructs), as a matching pytree.

    Axes of a rule that the mesh lacks or that do not divide the leaf are dropped, starting from the last one.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        return NamedSharding(mesh, fitting_spec(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def fitting_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns ``spec`` without axes that the mesh lacks or that do not divide the shape, dropped starting from the last one."""

    def fitting(axes, size):
        names = [name for name in axis_names(axes) if mesh.shape.get(name, 1) > 1]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        return tuple(names) or None

    return PartitionSpec(*(fitting(axes, size) for axes, size in zip(spec, shape, strict=False)))


def axis_names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shard_state(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """Places a state on the devices of `mesh` with `state_shardings`. With several processes, all must pass the same values."""
    shardings = state_shardings(state, mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)
    return jax.jit(lambda state: state, out_shardings=shardings)(state)  # device_put cannot move PRNG keys to other processes
