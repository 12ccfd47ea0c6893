"""Compiled forms of a train step with jit and pmap.

Both have the signature `(state, batch) -> (state, metrics)`, take a batch of host arrays [B, T, ...], add no axis to the state
(so their checkpoints are interchangeable), and donate it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.parallel.mesh import batch_shardings, check_divisible, make_mesh, shard_batch
from posjax.parallel.partition_rules import PARTITION_RULES, Rules, shard_state, state_shardings

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]


def jit_for_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `jax.jit(function)` with replicated outputs if the first argument spans the devices of several processes.

    Every process can then read the full results. The other arguments are host arrays, the same on all processes.
    """
    compiled = None

    def call(placed, *arguments):
        nonlocal compiled
        if compiled is None:
            meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(placed) if not getattr(leaf, "is_fully_addressable", True)]
            compiled = jax.jit(function, out_shardings=NamedSharding(meshes[0], PartitionSpec()) if meshes else None)
        return compiled(placed, *arguments)

    return call


def jit_train_step(step: Step, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Step:
    """Compiles `step` for `mesh` with jit. This is the main path.

    The input state may be on any device; the returned state is sharded as by `shard_state`. The input state is donated, so use
    only the returned one afterwards.

    Args:
      step: a train step made without an axis name.
      mesh: a mesh from `make_mesh`.
      rules: partition rules of the state.

    Raises:
      ValueError: the step was made with an axis name.
    """
    _check_axis(step, None)
    compiled = shardings = None

    def call(state, batch):
        nonlocal compiled, shardings
        batch = shard_batch(batch, mesh)
        if compiled is None:
            shardings = state_shardings(state, mesh, rules)
            compiled = _jit(step, mesh, shardings, batch)
        if state.step.sharding != shardings.step:  # on the first call, or after a restore
            state = shard_state(state, mesh, rules)
        return compiled(state, batch)

    return call


def abstract_train_step(
    step: Step, mesh: Mesh, state: Any, batch: Any, rules: Rules = PARTITION_RULES
) -> tuple[Any, tuple[Any, Any]]:
    """Returns the jitted step of `jit_train_step` and abstract arguments, to compile it for devices that are not attached.

        jitted, arguments = abstract_train_step(step, mesh, state, batch, SHARDED_RULES)
        jitted.lower(*arguments).compile().memory_analysis()

    Args:
      step, mesh, rules: as for `jit_train_step`.
      state, batch: pytrees of arrays or jax.ShapeDtypeStructs with global shapes.

    Returns:
      The jax.jit object, and (state, batch) as jax.ShapeDtypeStructs with shardings.
    """
    shardings = state_shardings(state, mesh, rules), batch_shardings(batch, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (state, batch), shardings)
    return _jit(step, mesh, shardings[0], batch), shapes


def _jit(step: Step, mesh: Mesh, shardings: Any, batch: Any) -> Any:
    return jax.jit(
        step,
        in_shardings=(shardings, batch_shardings(batch, mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def _check_axis(step: Step, axis_name: str | None) -> None:
    """Raises ValueError if ``make_train_step`` built the step for another mapped axis; other functions are not checked."""
    given = getattr(step, "axis_name", axis_name)
    if given != axis_name:
        raise ValueError(
            f"step must be built by make_train_step(..., axis_name={axis_name!r}), got a step with axis_name={given!r}"
        )


def pmap_train_step(step: Step, num_devices: int | None = None, axis_name: str = "data") -> Step:
    """Compiles `step` with pmap for the devices of one process, as an alternative to `jit_train_step`.

    The state is passed and returned without a device axis (`in_axes=None`, `out_axes=None`), so the caller need not replicate or
    unreplicate it. For the same batch, the loss matches that of the jit form up to rounding; only noise drawn in `loss_fn`
    differs, because each device has its own key.

    Args:
      step: a train step made with `axis_name`.
      num_devices: number of devices. None means all.
      axis_name: name of the mapped axis.

    Raises:
      ValueError: the step was made without this axis name, so that each device would train on its own gradients.
    """
    _check_axis(step, axis_name)
    devices = make_mesh(num_devices).local_devices
    mapped = jax.pmap(step, axis_name, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)

    def split(leaf):
        check_divisible(leaf, len(devices))
        return leaf.reshape(len(devices), leaf.shape[0] // len(devices), *leaf.shape[1:])

    def call(state, batch):
        return mapped(state, jax.tree.map(split, batch))

    return call
