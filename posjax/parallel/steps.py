"""The jit and pmap forms of a train step.

Both have the same signature, `(state, batch) -> (state, metrics)`, take a batch of host arrays [B, T, ...], keep no extra axis in
the state (so a checkpoint of one fits the other), and donate it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.parallel.mesh import batch_shardings, check_divisible, make_mesh, shard_batch
from posjax.parallel.partition_rules import PARTITION_RULES, Rules, shard_state, state_shardings

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]


def jit_for_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(function)`, whose results every process has whole where its first argument lies on devices of several.

    The other arguments are host arrays, the same on all processes.
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
    """`step` (made without an axis name) compiled for `mesh`: the main path.

    The state may live anywhere at first; it comes back sharded as `shard_state` does. It is donated: use the returned one
    from then on.
    """
    compiled = shardings = None

    def call(state, batch):
        nonlocal compiled, shardings
        batch = shard_batch(batch, mesh)
        if compiled is None:
            shardings = state_shardings(state, mesh, rules)
            compiled = _jit(step, mesh, shardings, batch)
        if state.step.sharding != shardings.step:  # the first call, or just restored
            state = shard_state(state, mesh, rules)
        return compiled(state, batch)

    return call


def abstract_train_step(
    step: Step, mesh: Mesh, state: Any, batch: Any, rules: Rules = PARTITION_RULES
) -> tuple[Any, tuple[Any, Any]]:
    """What `jit_train_step` compiles, and shapes to compile it with: for devices that are not attached.

        jitted, arguments = abstract_train_step(step, mesh, state, batch, SHARDED_RULES)
        jitted.lower(*arguments).compile().memory_analysis()

    Args:
      state, batch: pytrees of arrays or jax.ShapeDtypeStructs, of all devices together.

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


def pmap_train_step(step: Step, num_devices: int | None = None, axis_name: str = "data") -> Step:
    """The pmap twin of `jit_train_step`; `step` is made with `axis_name`.

    The state goes in and comes out replicated without a device axis (`in_axes=None`, `out_axes=None`): there is nothing to
    replicate or to unreplicate. The same batch gives the same loss as the jit form up to rounding; only noise drawn in
    `loss_fn` differs, as each device has its own key. For the devices of one process.
    """
    devices = make_mesh(num_devices).local_devices
    mapped = jax.pmap(step, axis_name, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)

    def cut(leaf):
        check_divisible(leaf, len(devices))
        return leaf.reshape(len(devices), leaf.shape[0] // len(devices), *leaf.shape[1:])

    def call(state, batch):
        return mapped(state, jax.tree.map(cut, batch))

    return call
