"""The mesh of devices, and batches on it.

    mesh axis    cuts                       costs a step
    "data"       rows of the batch          one sum of the gradients
    "fsdp"       rows, and the state        parts of the weights put together where they are used, gradients summed into parts
    "context"    the sequence               a ring of keys and values in attention; weights as with "fsdp"
    "tensor"     heads, the MLP's width,    a sum of activations for each of the two branches of a layer
                 the vocabulary

A mesh has all four, most of them of one device. `partition_rules` says how the state is cut over them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")  # from devices that are far from each other to those that are near
ROWS = ("data", "fsdp")


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


def mesh_of(x: jax.Array) -> Mesh | None:
    """The mesh of AXES that a program runs on, as the type of a traced array tells it; None on one device and on other meshes."""
    mesh = jax.typeof(x).sharding.mesh
    is_ours = set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if is_ours and mesh.size > 1 else None


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
            check_divisible(leaf, devices)
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


def check_divisible(leaf: Any, devices: int) -> None:
    if leaf.shape[0] % devices:
        raise ValueError(
            f"the batch size must be a multiple of the number of devices: {leaf.shape[0]} rows do not divide over {devices} devices"
        )
