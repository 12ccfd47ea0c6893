"""Where arrays live: one mesh, a small table of partition rules, and the jit and pmap forms of a train step.

    mesh axis    cuts                       costs a step
    "data"       rows of the batch          one sum of the gradients
    "fsdp"       rows, and the state        parts of the weights put together where they are used, gradients summed into parts
    "context"    the sequence               a ring of keys and values in attention; weights as with "fsdp"
    "tensor"     heads, the MLP's width,    a sum of activations for each of the two branches of a layer
                 the vocabulary

A mesh has all four, most of them of one device. The state is cut by SHARDED_RULES; by PARTITION_RULES, the default, it is whole on
every device. Both forms of a step have the same signature, `(state, batch) -> (state, metrics)`, take a batch of host arrays
[B, T, ...], keep no extra axis in the state (so a checkpoint of one fits the other), and donate it.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "context", "tensor")  # from devices that are far from each other to those that are near
ROWS = ("data", "fsdp")
WEIGHTS = ("fsdp", "context")

# Leaves of the state follow the first rule whose pattern is found in their path ("params/layers/kernel",
# "opt_state/1/mu/layers/kernel", ...): the moments of a parameter lie where it does.
PARTITION_RULES: Rules = ((r"", PartitionSpec()),)

# For `Transformer` on many devices. Over "tensor" a pair of products costs one sum of activations (Megatron-LM, arXiv:1909.08053);
# over WEIGHTS lie parts that are put together where they are used, see `put_together` (ZeRO, arXiv:1910.02054). The first axis of a
# layer's weight is the layer, which the scan walks along.
SHARDED_RULES: Rules = (
    (r"layers/(query|key|value)/kernel$", PartitionSpec(None, WEIGHTS, "tensor", None)),  # [L, D, N or K, H]
    (r"layers/out/kernel$", PartitionSpec(None, "tensor", None, WEIGHTS)),  # [L, N, H, D]
    (r"layers/(up|gate)/kernel$", PartitionSpec(None, WEIGHTS, "tensor")),  # [L, D, F]
    (r"layers/down/kernel$", PartitionSpec(None, "tensor", WEIGHTS)),  # [L, F, D]
    (r"token_embedding/embedding$", PartitionSpec("tensor", WEIGHTS)),  # [V, D]
    (r"head/kernel$", PartitionSpec(WEIGHTS, "tensor")),  # [D, V]
    (r"", PartitionSpec()),
)


def parse_mesh(text: str) -> dict[str, int]:
    """"data=2,fsdp=4" as the arguments of `make_mesh`; "" is {}.

    Raises:
      ValueError: an axis that there is not, or twice, or a size that is neither a positive integer nor -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            axes = f"each of {', '.join(AXES)} once at most, -1 for what is left"
            raise ValueError(f"mesh must be like 'data=2,fsdp=4', {axes}, got {text!r} ({part!r})")
        sizes[name] = int(size)
    return sizes


def make_mesh(
    num_devices: int | None = None,
    *,
    data: int | None = None,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes AXES over the first `num_devices` devices.

    Args:
      num_devices: None takes all.
      data, fsdp, context, tensor: how many devices each cuts over. One of them may be -1, which takes what the others leave, as
        data=None does where none is.
      devices: None takes those of this machine; others may be ones that are only compiled for.

    Raises:
      ValueError: there are fewer devices than asked for, or fewer than 1 is asked for, or the axes do not take all of them.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"num_devices must be between 1 and {len(devices)}, the devices at hand, got {count}")
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    if data is None:
        sizes["data"] = 1 if -1 in sizes.values() else -1
    rest = math.prod(size for size in sizes.values() if size != -1)
    given = " * ".join(name for name, size in sizes.items() if size != -1)
    found = " * ".join(str(size) for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"one of data, fsdp, context, tensor at most must be -1, got {sizes}")
    if -1 in sizes.values() and (min(size for size in sizes.values() if size != -1) < 1 or count % rest):
        raise ValueError(f"{given} must divide the number of devices, {count}, got {found}")
    if -1 not in sizes.values() and (min(sizes.values()) < 1 or rest != count):
        raise ValueError(f"{given} must be the number of devices, {count}, got {found}")
    shape = tuple(count // rest if size == -1 else size for size in sizes.values())
    return Mesh(_laid_out(devices[:count], shape), AXES, axis_types=(AxisType.Auto,) * 4)


def _laid_out(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array: neighbours along an axis are neighbours on the torus of TPUs, and of one process elsewhere."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (ValueError, AssertionError, NotImplementedError):  # part of a torus
            pass
    return np.asarray(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): a batch comes in `count` shares of rows, and this process brings the one with that index.

    Processes that have the same rows on their devices, as where "context" or "tensor" spans them, bring the same share, whole.

    Raises:
      ValueError: processes that have some rows in common and others not, or a mesh without a device of this process.
    """
    return _row_parts(mesh)[:2]


def _row_parts(mesh: Mesh) -> tuple[int, int, list[int]]:
    """`row_share`, and which of the parts that the rows of a batch are cut into lie here: any, where a mesh follows a torus."""
    parts = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in ROWS), -1)
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(parts):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    if jax.process_index() not in held:
        raise ValueError(f"mesh must have devices of every process, got none of process {jax.process_index()}")
    own = sorted(held[jax.process_index()])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len(shares) * len(own) != len(parts) or len(set().union(*shares)) != len(parts):
        raise ValueError(
            f"processes must have all rows of a batch in common or none, got a mesh of {dict(mesh.shape)} in which "
            + ", ".join(f"process {index} has parts {sorted(rows)} of {len(parts)}" for index, rows in sorted(held.items()))
        )
    return shares.index(tuple(own)), len(shares), own


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf [B, T, ...] or [B] of a batch: rows over ROWS, tokens over "context"."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*(ROWS, "context")[: leaf.ndim])), batch)


def state_shardings(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """The NamedSharding of each leaf of `state` (arrays or ShapeDtypeStructs) by the rules, in a like pytree.

    Axes of a rule that the mesh has not, or that do not divide the leaf, are left out, the last ones first.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _fitting(next(spec for pattern, spec in rules if re.search(pattern, name)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _fitting(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """``spec`` without axes that the mesh has not, or that do not divide an array of that shape, the last ones first."""

    def fitting(axes, size):
        names = [name for name in _names(axes) if mesh.shape.get(name, 1) > 1]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        return tuple(names) or None

    return PartitionSpec(*(fitting(axes, size) for axes, size in zip(spec, shape, strict=False)))


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def mesh_of(x: jax.Array) -> Mesh | None:
    """The mesh of AXES that a program runs on, as the type of a traced array tells it; None on one device and on other meshes."""
    mesh = jax.typeof(x).sharding.mesh
    is_ours = set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if is_ours and mesh.size > 1 else None


def put_together(weights: Any, path: str, rules: Rules = SHARDED_RULES) -> Any:
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
        kept = _fitting(PartitionSpec(*spec[max(0, len(spec) - leaf.ndim) :]), leaf.shape, mesh)
        used = PartitionSpec(*(tuple(name for name in _names(axes) if name not in WEIGHTS) or None for axes in kept))
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
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fitting(PartitionSpec(ROWS, "context"), x.shape, mesh)))


def shard_state(state: Any, mesh: Mesh, rules: Rules = PARTITION_RULES) -> Any:
    """Puts a state on the devices of `mesh` by `state_shardings`; with several processes, all pass the same values."""
    shardings = state_shardings(state, mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)
    return jax.jit(lambda state: state, out_shardings=shardings)(state)  # device_put takes no keys to another process


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch, leaves [B, T, ...] or [B], on its devices.

    Args:
      batch: pytree of NumPy or JAX arrays; with several processes, each passes the rows of its `row_share`, whole. Leaves that
        are in place already are left alone.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the devices do not divide B or T, or as `row_share`.
    """
    _, count, parts = _row_parts(mesh)
    devices = len(parts)

    shardings = batch_shardings(batch, mesh)

    def is_there(leaf, sharding):
        return isinstance(leaf, jax.Array) and leaf.sharding == sharding

    for leaf, sharding in zip(jax.tree.leaves(batch), jax.tree.leaves(shardings), strict=True):
        if not is_there(leaf, sharding):
            _check_divisible(leaf, devices)
            if leaf.ndim > 1 and leaf.shape[1] % mesh.shape["context"]:
                raise ValueError(f"context must divide the length of a sequence, {leaf.shape[1]}, got {mesh.shape['context']}")
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)  # all leaves in one call: a call a leaf takes as long as a small step

    def put(leaf, sharding):
        if is_there(leaf, sharding):
            return leaf
        own = np.asarray(leaf).reshape(devices, -1, *leaf.shape[1:])
        shape = (count * leaf.shape[0], *leaf.shape[1:])

        def part(where):
            first = where[0].indices(shape[0])[0]
            return own[(parts.index(first // own.shape[1]), slice(None), *where[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch, shardings)


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
