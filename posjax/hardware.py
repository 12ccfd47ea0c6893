"""Chips by the figures of their data sheets: TPU generations and GPUs, and the peak of a device at hand."""

import dataclasses
from typing import Any

_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU. Figures are of one TensorCore.

    Attributes:
      topology: the smallest that libtpu makes programs for; any other goes too, such as "v5e:16x16".
      accelerator_type: what libtpu wants in TPU_ACCELERATOR_TYPE.
      cores: TensorCores of a chip.
      flops: peak bfloat16 operations a second.
      bandwidth: bytes a second to and from HBM.
      vmem: bytes of vector memory.
      memory: bytes of HBM.
      torus: bytes a second, both ways together, that leave a whole chip along one dimension of the torus.
      clock: bundles a second. Google publishes v4's; the others are flops / (what the matrix units do in a cycle), see below.
      delay_slots: bundles after a branch that run whether it is taken or not, as they stand in the compiler's output.
    """

    topology: str
    accelerator_type: str
    cores: int
    flops: float
    bandwidth: float
    vmem: int
    memory: float
    torus: float
    clock: float
    delay_slots: int


# A device of jax is one core of v4 and tpu7x, and both cores of v5p; topologies are counted in chips.
# flops, bandwidth, memory: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, per chip there, so over the number of cores here.
# torus: the same pages' bidirectional bandwidth between chips over the number of ports, of which a dimension has two.
# cores and vmem: docs.jax.dev/en/latest/pallas/tpu/hardware.html. clock of v4: 1050 MHz, Jouppi et al. 2023, arXiv 2304.01433,
# table 4. The others' is not published: v5e and v5p have 4 matrix units of 128 x 128 a core, so 4 * 128 * 128 * 2 operations a
# cycle make 1.5 and 1.75 GHz (and of v4 1.05); of v6e and tpu7x the compiler expects more than 2 units of 256 x 256 could do at
# one pass a cycle, so 2 * 256 * 256 * 2 * 2, which makes 1.75 and 2.2 GHz.
_PASS = 4 * 128**2 * 2
GENERATIONS = {
    "v4": Generation("v4:2x2x1", "v4-8", 2, 275e12 / 2, 1228e9 / 2, 16 * _MIB, 32 * _GIB / 2, 600e9 / 6, 1.05e9, 1),
    "v5e": Generation("v5e:2x2", "v5litepod-4", 1, 197e12, 819e9, 128 * _MIB, 16 * _GIB, 400e9 / 4, 197e12 / _PASS, 4),
    "v5p": Generation("v5p:2x2x1", "v5p-8", 2, 459e12 / 2, 2765e9 / 2, 64 * _MIB, 95 * _GIB / 2, 1200e9 / 6, 459e12 / 2 / _PASS, 4),
    "v6e": Generation("v6e:2x2", "v6e-4", 1, 918e12, 1640e9, 128 * _MIB, 32 * _GIB, 800e9 / 4, 918e12 / (4 * _PASS), 4),
    "tpu7x": Generation(
        "tpu7x:2x2x1", "tpu7x-8", 2, 2307e12 / 2, 7380e9 / 2, 64 * _MIB, 192 * _GIB / 2, 1200e9 / 6, 2307e12 / 2 / (4 * _PASS), 6
    ),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      device_kind: as jax calls it.
      capability: compute capability.
      arch: as ptxas calls it.
      processors: streaming multiprocessors.
      shared: bytes of shared memory of one of them, and of a block at most.
      memory: bytes.
      bandwidth: bytes a second.
      l2: bytes of level 2 cache.
      clock: GHz.
      flops: peak bfloat16 operations a second, dense.
      link: bytes a second to the other GPUs of a host, one way.
    """

    device_kind: str
    capability: tuple[int, int]
    arch: str
    processors: int
    shared: tuple[int, int]
    memory: int
    bandwidth: float
    l2: int
    clock: float
    flops: float
    link: float


NETWORK = 50e9  # bytes a second from a GPU to other hosts, through a port of 400 Gb/s of its own
# From NVIDIA's data sheets and the CUDA programming guide's table of capabilities.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), "sm_80", 108, (167936, 166912), 80 * _GIB, 2039e9, 40 * 2**20, 1.41, 312e12, 300e9
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), "sm_89", 128, (102400, 101376), 24 * _GIB, 1008e9, 72 * 2**20, 2.52, 165e12, 32e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), "sm_90a", 132, (233472, 232448), 80 * _GIB, 3350e9, 50 * 2**20, 1.98, 989e12, 450e9
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), "sm_90a", 132, (233472, 232448), 141 * _GIB, 4800e9, 50 * 2**20, 1.98, 989e12, 450e9),
    "b200": Gpu("NVIDIA B200", (10, 0), "sm_100a", 148, (233472, 232448), 180 * _GIB, 8000e9, 126 * 2**20, 1.97, 2250e12, 900e9),
}
# As jax calls TPUs, of which a device is one chip, or a core of one where a chip is two devices.
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 operations a second of a device of jax, from its data sheet; None where that is not known, as of a CPU."""
    if device.device_kind in _KINDS:
        return GENERATIONS[_KINDS[device.device_kind]].flops * getattr(device, "num_cores", 1)
    return next((gpu.flops for gpu in GPUS.values() if gpu.device_kind == device.device_kind), None)
