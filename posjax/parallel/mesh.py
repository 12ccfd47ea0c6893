"""The device mesh, and the sharding of batches on it.

    mesh axis    shards                     communication per step
    "data"       rows of the batch          one all-reduce of the gradients
    "fsdp"       rows, and the state        an all-gather of the weights where they are used, a reduce-scatter of the gradients
    "context"    the sequence               a ring of keys and values in attention; weights as with "fsdp"
    "tensor"     heads, the MLP's width,    an all-reduce of activations for each of the two branches of a layer
                 the vocabulary

A mesh always has all four axes; most of them have size 1. `partition_rules` determines how the state is sharded over them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posjax.checks import check, checked

AXES = ("data", "fsdp", "context", "tensor")  # ordered from the most distant devices to the nearest
ROWS = ("data", "fsdp")


@checked()
def parse_mesh(text: str) -> dict[str, int]:
    """Parses a mesh specification such as "data=2,fsdp=4" into the keyword arguments of `make_mesh`. "" gives {}.

    Raises:
      ValueError: an axis is unknown or repeated, or a size is neither a positive integer nor -1.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            axes = f"each of {', '.join(AXES)} at most once, -1 for the remaining devices"
            raise ValueError(f"mesh must look like 'data=2,fsdp=4', {axes}, got {text!r} ({part!r})")
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
    """Returns a mesh with the axes AXES over the first `num_devices` devices.

    Args:
      num_devices: number of devices. None takes all.
      data, fsdp, context, tensor: sizes of the mesh axes. At most one may be -1, which stands for the remaining devices.
        data=None is -1 if no other axis is -1, else 1.
      devices: devices to choose from. None means `jax.devices()`. They may be devices that are not attached, to compile for them.

    Raises:
      ValueError: num_devices is below 1 or above the number of devices, or the axes do not use all of them.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices) if num_devices is None else num_devices
    check("num_devices", num_devices, int | None)
    for name, size in dict(data=data, fsdp=fsdp, context=context, tensor=tensor).items():
        check(name, size, int | None if name == "data" else int)
    if not 1 <= count <= len(devices):
        raise ValueError(f"num_devices must be between 1 and {len(devices)}, the number of available devices, got {count}")
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    if data is None:
        sizes["data"] = 1 if -1 in sizes.values() else -1
    rest = math.prod(size for size in sizes.values() if size != -1)
    given = " * ".join(name for name, size in sizes.items() if size != -1)
    product = " * ".join(str(size) for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"at most one of data, fsdp, context, tensor may be -1, got {sizes}")
    if -1 in sizes.values() and (min(size for size in sizes.values() if size != -1) < 1 or count % rest):
        raise ValueError(f"{given} must divide the number of devices, {count}, got {product}")
    if -1 not in sizes.values() and (min(sizes.values()) < 1 or rest != count):
        raise ValueError(f"{given} must be the number of devices, {count}, got {product}")
    shape = tuple(count // rest if size == -1 else size for size in sizes.values())
    return Mesh(_device_grid(devices[:count], shape), AXES, axis_types=(AxisType.Auto,) * 4)


def _device_grid(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Arranges devices in an array so that neighbors along an axis are neighbors on a TPU torus or, elsewhere, in one process."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (ValueError, AssertionError, NotImplementedError):  # the devices are a part of a torus
            pass
    return np.asarray(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)


def mesh_of(x: jax.Array) -> Mesh | None:
    """Returns the mesh in the type of a traced array; None for a single device or a mesh without the axes AXES."""
    mesh = jax.typeof(x).sharding.mesh
    is_ours = set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if is_ours and mesh.size > 1 else None


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): a batch is loaded in `count` shares of rows, and this process loads the share with this index.

    Processes whose devices hold the same rows, because "context" or "tensor" spans processes, all load the same share.

    Raises:
      ValueError: two processes share some rows but not all, or the mesh has no device of this process.
    """
    return _row_parts(mesh)[:2]


def _row_parts(mesh: Mesh) -> tuple[int, int, list[int]]:
    """Returns the result of `row_share` and the indices of the row blocks on this process's devices.

    The rows of a batch are split into one block per index along ROWS. The blocks of a process need not be contiguous if the mesh
    follows a torus.
    """
    parts = mesh.devices.reshape(math.prod(mesh.shape[axis] for axis in ROWS), -1)
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(parts):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    if jax.process_index() not in held:
        raise ValueError(f"mesh must have devices of every process, got none of process {jax.process_index()}")
    local = sorted(held[jax.process_index()])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len(shares) * len(local) != len(parts) or len(set().union(*shares)) != len(parts):
        raise ValueError(
            f"two processes must share either all rows of a batch or none, got a mesh of {dict(mesh.shape)} in which "
            + ", ".join(f"process {index} has parts {sorted(rows)} of {len(parts)}" for index, rows in sorted(held.items()))
        )
    return shares.index(tuple(local)), len(shares), local


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of each leaf [B, T, ...] or [B] of a batch: rows over ROWS, tokens over "context"."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*(ROWS, "context")[: leaf.ndim])), batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places this process's rows of a batch on its devices. Leaves are [B, T, ...] or [B].

    Args:
      batch: a pytree of NumPy or JAX arrays. With several processes, each passes all rows of its `row_share`. Leaves that already
        have the right sharding are left unchanged.
      mesh: a mesh from `make_mesh`.

    Raises:
      ValueError: B or T is not divisible over the mesh, or `row_share` raises.
    """
    _, count, parts = _row_parts(mesh)
    devices = len(parts)

    shardings = batch_shardings(batch, mesh)

    def is_placed(leaf, sharding):
        return isinstance(leaf, jax.Array) and leaf.sharding == sharding

    for leaf, sharding in zip(jax.tree.leaves(batch), jax.tree.leaves(shardings), strict=True):
        if not is_placed(leaf, sharding):
            check_divisible(leaf, devices)
            if leaf.ndim > 1 and leaf.shape[1] % mesh.shape["context"]:
                raise ValueError(f"context must divide the sequence length, {leaf.shape[1]}, got {mesh.shape['context']}")
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)  # one call for all leaves: a call per leaf takes as long as a small step

    def put(leaf, sharding):
        if is_placed(leaf, sharding):
            return leaf
        blocks = np.asarray(leaf).reshape(devices, -1, *leaf.shape[1:])
        shape = (count * leaf.shape[0], *leaf.shape[1:])

        def part(where):
            first = where[0].indices(shape[0])[0]
            return blocks[(parts.index(first // blocks.shape[1]), slice(None), *where[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch, shardings)


def check_divisible(leaf: Any, devices: int) -> None:
    if leaf.shape[0] % devices:
        raise ValueError(f"the batch size must be a multiple of the number of devices, {devices}, got {leaf.shape[0]} rows")
