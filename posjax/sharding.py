"""Where arrays live: one mesh, one small table of partition rules, and the jit and pmap forms of a train step.

Both forms have the same signature, `(state, batch) -> (state, metrics)`, take a batch of host arrays [B, ...], keep the state
replicated with no extra axis (so a checkpoint of one fits the other), and donate it.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]

# Batch leaves are cut along their leading axis. Leaves of the state follow the first rule whose pattern is found in their
# path ("params/layers/kernel", "opt_state/1/mu/layers/kernel", ...): the moments of a parameter lie where it does.
BATCH_SPEC = PartitionSpec("data")
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = ((r"", PartitionSpec()),)


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with the one axis "data" over the first `num_devices` devices (all of them when None).

    Raises:
      ValueError: there are fewer devices than asked for, or fewer than 1 is asked for.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"num_devices must be between 1 and {len(devices)}, the devices at hand, got {count}")
    return Mesh(np.asarray(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf of `state` (arrays or ShapeDtypeStructs) by PARTITION_RULES, in a like pytree."""

    def sharding(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, name)))

    return jax.tree_util.tree_map_with_path(sharding, state)


def shard_state(state: Any, mesh: Mesh) -> Any:
    """Puts a state on the devices of `mesh` by `state_shardings`; with several processes, all pass the same values."""
    shardings = state_shardings(state, mesh)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)
    return jax.jit(lambda state: state, out_shardings=shardings)(state)  # device_put takes no keys to another process


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch, leaves [B, ...], on its devices, cut along the leading axis.

    Args:
      batch: pytree of NumPy or JAX arrays; with several processes, each passes its own rows. Leaves that are in place already
        are left alone.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the devices of this process do not divide B.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    devices = len(mesh.local_devices)

    def put(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    for leaf in jax.tree.leaves(batch):
        if not (isinstance(leaf, jax.Array) and leaf.sharding == sharding):
            _check_divisible(leaf, devices)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # all leaves in one call: a call a leaf takes as long as a small step
    return jax.tree.map(put, batch)


def jit_train_step(step: Step, mesh: Mesh) -> Step:
    """`step` (made without an axis name) compiled for `mesh`: the main path.

    The state may live anywhere at first; it comes back sharded as `shard_state` does. It is donated: use the returned one
    from then on.
    """
    compiled = shardings = None

    def call(state, batch):
        nonlocal compiled, shardings
        if compiled is None:
            shardings = state_shardings(state, mesh)
            replicated = NamedSharding(mesh, PartitionSpec())
            compiled = jax.jit(
                step,
                in_shardings=(shardings, NamedSharding(mesh, BATCH_SPEC)),
                out_shardings=(shardings, replicated),
                donate_argnums=0,
            )
        if state.step.sharding != shardings.step:  # the first call, or just restored
            state = shard_state(state, mesh)
        return compiled(state, shard_batch(batch, mesh))

    return call


def pmap_train_step(step: Step, num_devices: int | None = None, axis_name: str = "data") -> Step:
    """The pmap twin of `jit_train_step`; `step` is made with `axis_name`.

    The state goes in and comes out replicated without a device axis (`in_axes=None`, `out_axes=None`): there is nothing to
    replicate or to unreplicate. The same batch gives the same loss as the jit form up to rounding; only noise drawn in
    `loss_fn` differs, as each device has its own key. For the devices of one process.
    """
    devices = make_mesh(num_devices).local_devices
    mapped = jax.pmap(step, axis_name, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)

    def cut(leaf):
        _check_divisible(leaf, len(devices))
        return leaf.reshape(len(devices), leaf.shape[0] // len(devices), *leaf.shape[1:])

    def call(state, batch):
        return mapped(state, jax.tree.map(cut, batch))

    return call


def _check_divisible(leaf: Any, devices: int) -> None:
    if leaf.shape[0] % devices:
        raise ValueError(
            f"the batch size must be a multiple of the number of devices: {leaf.shape[0]} rows do not divide over {devices} devices"
        )
