"""Roofline model: how long a device computes, accesses memory and communicates at the peak rates of its data sheet."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from posjax.compile import aot, aot_gpu
from posjax.compile.hlo import Collective
from posjax.hardware import NETWORK


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes one jax device for the roofline.

    Attributes:
      memory: bytes.
      flops: peak bfloat16 operations per second.
      bandwidth: bytes per second to and from memory.
      torus: bytes per second that a TPU sends along one dimension of the torus, in both directions together, or that a GPU sends to
        other GPUs of its host.
      network: bytes per second that a GPU sends to other hosts; None for a TPU, which has only the torus.
    """

    memory: float
    flops: float
    bandwidth: float
    torus: float
    network: float | None = None


def chip_of(topology: str, cores: int) -> Chip:
    """Returns the chip of a topology. On TPUs, ``cores`` is the number of TensorCores of one jax device."""
    if (gpu := aot_gpu.gpu_of(topology)) is not None:
        return Chip(gpu.memory, gpu.flops, gpu.bandwidth, gpu.link, NETWORK)
    g = aot.generation_of(topology)
    return Chip(g.memory * cores, g.flops * cores, g.bandwidth * cores, g.torus * cores / g.cores)


def seconds_of(one: Collective, mesh: Mapping[str, int], places: Sequence[Sequence[int]], chip: Chip, topology: str) -> float:
    """Computes how many seconds the collectives of one kind take with nothing else on their links.

    With V bytes on n chips, an all-gather and a reduce-scatter each send (n - 1) / n V bytes to every chip; an all-reduce is one of
    each. A group that lies along d dimensions of the torus uses 2 d links of each chip; a dimension in which it is an open line
    instead of a ring contributes half as much.
    """
    parts = math.prod(mesh[axis] for axis in one.axes)
    if parts < 2:
        return 0.0
    if chip.network is not None:
        hosts = len({place[0] for place in _group(one.axes, mesh, places)})
        speed = chip.torus if hosts == 1 else chip.network
    else:
        speed = chip.torus * sum(_dimensions(_group(one.axes, mesh, places), topology))
    share = {"all-reduce": 2 * (parts - 1) / parts, "collective-permute": 1.0, "all-to-all": 0.25 * parts / max(parts - 1, 1)}
    return one.bytes * share.get(one.kind, (parts - 1) / parts) / speed


def _group(axes: Sequence[str], mesh: Mapping[str, int], places: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Returns the coordinates of the chips in the first group along the given axes."""
    ranges = [range(mesh[axis]) if axis in axes else range(1) for axis in mesh]
    strides = [math.prod(list(mesh.values())[n + 1 :]) for n in range(len(mesh))]
    return [tuple(places[sum(i * s for i, s in zip(at, strides, strict=True))]) for at in itertools.product(*ranges)]


def _dimensions(group: Sequence[tuple[int, ...]], topology: str) -> list[float]:
    """Returns, for each dimension that a group lies along, 1 if it is a ring there, or 1/2 if it is a line."""
    size = [int(n) for n in topology.partition(":")[2].split("x")]
    found = []
    for n, length in enumerate(size):
        along = {place[n] for place in group}
        if len(along) > 1:
            closed = length % 4 == 0 and min(size) >= 4 if len(size) == 3 else length == 16
            found.append(1.0 if closed and len(along) == length else 0.5)
    return found or [0.5]
