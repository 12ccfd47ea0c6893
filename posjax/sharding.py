"""Where arrays live: one mesh, a small table of partition rules, and the jit and pmap forms of a train step.

    mesh axis    cuts the batch    cuts the state by SHARDED_RULES (by PARTITION_RULES, the default, it is whole on every device)
    "data"       along B           weights and their moments, along D
    "tensor"     not               heads, the MLP's hidden width, the vocabulary

Both forms of a step have the same signature, `(state, batch) -> (state, metrics)`, take a batch of host arrays [B, ...], keep no
extra axis in the state (so a checkpoint of one fits the other), and donate it. Activations are the compiler's to place.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
Rules = Sequence[tuple[str, PartitionSpec]]

# Batch leaves are cut along their leading axis. Leaves of the state follow the first rule whose pattern is found in their
# path ("params/layers/kernel", "opt_state/1/mu/layers/kernel", ...): the moments of a parameter lie where it does.
BATCH_SPEC = PartitionSpec("data")
PARTITION_RULES: Rules = ((r"", PartitionSpec()),)

# For `Transformer` on many devices, with `gathered`. Over "tensor" a pair of products costs one sum of activations (Megatron-LM,
# arXiv:1909.08053); over "data" lie parts that are put together where they are used (ZeRO, arXiv:1910.02054). The first axis of a
# layer's weight is the layer, which the scan walks along; the embedding is whole along D, for tokens pick its rows.
SHARDED_RULES: Rules = (
    (r"layers/(query|key|value)/kernel$", PartitionSpec(None, "data", "tensor", None)),  # [L, D, N or K, H]
    (r"layers/out/kernel$", PartitionSpec(None, "tensor", None, "data")),  # [L, N, H, D]
    (r"layers/(up|gate)/kernel$", PartitionSpec(None, "data", "tensor")),  # [L, D, F]
    (r"layers/down/kernel$", PartitionSpec(None, "tensor", "data")),  # [L, F, D]
    (r"token_embedding/embedding$", PartitionSpec("tensor", None)),  # [V, D]
    (r"head/kernel$", PartitionSpec(None, "tensor")),  # [D, V]
    (r"", PartitionSpec()),
)


def make_mesh(num_devices: int | None = None, *, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axis "data" and, where `tensor` is not 1, the axis "tensor" over the first `num_devices` devices.

    Args:
      num_devices: None takes all.
      tensor: how many devices share the heads and the MLP of one sequence.
      devices: None takes those of this machine; others may be ones that are only compiled for.

    Raises:
      ValueError: there are fewer devices than asked for, or fewer than 1 is asked for, or `tensor` does not divide their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"num_devices must be between 1 and {len(devices)}, the devices at hand, got {count}")
    if tensor < 1 or count % tensor:
        raise ValueError(f"tensor must divide the number of devices, {count}, got {tensor}")
    if tensor == 1:
        return Mesh(np.asarray(devices[:count]), ("data",), axis_types=(AxisType.Auto,))
    # Those of one process lie next to each other, and it brings whole rows of a batch.
    ordered = sorted(devices[:count], key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered).reshape(-1, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def state_shardings(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """The NamedSharding of each leaf of `state` (arrays or ShapeDtypeStructs) by the rules, in a like pytree.

    An axis of a rule that the mesh has not, or that does not divide the leaf, is left out.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        fits = (axis if size % mesh.shape.get(axis, size + 1) == 0 else None for axis, size in zip(spec, leaf.shape, strict=False))
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, state)


def gathered(loss_fn: Callable[..., Any], rules: Rules = SHARDED_RULES) -> Callable[..., Any]:
    """`loss_fn(params, batch, key)` for parameters that are cut along "data": there they are put together first, once a call.

    Of weights that are cut like the batch the compiler would take over the cut: it moves every activation so that D is cut and B is
    not. Gradients come back cut as the parameters are.
    """
    whole = tuple((pattern, PartitionSpec(*(None if axis == "data" else axis for axis in spec))) for pattern, spec in rules)

    def loss(params, batch, key):
        mesh = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
        if not mesh.empty:
            params = jax.lax.with_sharding_constraint(params, state_shardings(params, mesh, whole))
        return loss_fn(params, batch, key)

    return loss


def shard_state(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """Puts a state on the devices of `mesh` by `state_shardings`; with several processes, all pass the same values."""
    shardings = state_shardings(state, mesh, rules)
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
      ValueError: the devices of this process do not divide B, or devices of several processes share a row.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    if mesh.local_mesh.shape.get("tensor") != mesh.shape.get("tensor"):
        raise ValueError(f"tensor must lie within a process, which brings rows of its own, got a mesh of {dict(mesh.shape)}")
    devices = mesh.local_mesh.shape["data"]

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


def jit_train_step(step: Step, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Step:
    """`step` (made without an axis name) compiled for `mesh`: the main path.

    The state may live anywhere at first; it comes back sharded as `shard_state` does. It is donated: use the returned one
    from then on.
    """
    compiled = shardings = None

    def call(state, batch):
        nonlocal compiled, shardings
        if compiled is None:
            shardings = state_shardings(state, mesh, rules)
            compiled = _jit(step, mesh, shardings)
        if state.step.sharding != shardings.step:  # the first call, or just restored
            state = shard_state(state, mesh, rules)
        return compiled(state, shard_batch(batch, mesh))

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
    shardings = state_shardings(state, mesh, rules), jax.tree.map(lambda _: NamedSharding(mesh, BATCH_SPEC), batch)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (state, batch), shardings)
    return _jit(step, mesh, shardings[0]), shapes


def _jit(step: Step, mesh: Mesh, shardings: Any) -> Any:
    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH_SPEC)),
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
