"""How long a device takes at the peaks of its data sheet: what it multiplies, what it reads, what it sends over which links."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from posjax.compile import aot, aot_gpu
from posjax.compile.hlo import Collective
from posjax.hardware import NETWORK


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of jax as the roofline sees it.

    Attributes:
      memory: bytes.
      flops: peak bfloat16 operations a second.
      bandwidth: bytes a second to and from memory.
      torus: bytes a second that leave it along one dimension of the torus, both ways together; of a GPU, to those of its host.
      network: bytes a second to other hosts, of a GPU; None: the torus is all there is.
    """

    memory: float
    flops: float
    bandwidth: float
    torus: float
    network: float | None = None


def chip_of(topology: str, cores: int) -> Chip:
    """The chip of a topology, of which a device of jax has that many TensorCores."""
    if (gpu := aot_gpu.gpu_of(topology)) is not None:
        return Chip(gpu.memory, gpu.flops, gpu.bandwidth, gpu.link, NETWORK)
    g = aot.generation_of(topology)
    return Chip(g.memory * cores, g.flops * cores, g.bandwidth * cores, g.torus * cores / g.cores)


def seconds_of(one: Collective, mesh: Mapping[str, int], places: Sequence[Sequence[int]], chip: Chip, topology: str) -> float:
    """How long the collectives of a kind take with nothing else on their links.

    Of V bytes on n chips an all-gather and a reduce-scatter bring (n - 1) / n V to every chip, an all-reduce is both. A group that
    lies along d dimensions of the torus has 2 d links of a chip, of which a line that does not close uses half.
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
    """Where the chips of the first group along those axes are."""
    ranges = [range(mesh[axis]) if axis in axes else range(1) for axis in mesh]
    strides = [math.prod(list(mesh.values())[n + 1 :]) for n in range(len(mesh))]
    return [tuple(places[sum(i * s for i, s in zip(at, strides, strict=True))]) for at in itertools.product(*ranges)]


def _dimensions(group: Sequence[tuple[int, ...]], topology: str) -> list[float]:
    """For each dimension that a group lies along 1, or 1/2 where it is a line and no ring."""
    size = [int(n) for n in topology.partition(":")[2].split("x")]
    found = []
    for n, length in enumerate(size):
        along = {place[n] for place in group}
        if len(along) > 1:
            closed = length % 4 == 0 and min(size) >= 4 if len(size) == 3 else length == 16
            found.append(1.0 if closed and len(along) == length else 0.5)
    return found or [0.5]
