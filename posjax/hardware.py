"""The one table of chips: TPU generations and GPUs with the figures of their data sheets, and the names that jax gives them."""

import dataclasses
import re
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
      pattern: a regular expression that finds it, and its siblings with the same peak, in the names that jax gives devices.
      capability: compute capability.
      arch: as ptxas calls it.
      shared: bytes of shared memory of a streaming multiprocessor, and of a block at most.
      processors: streaming multiprocessors.
      memory: bytes.
      bandwidth: bytes a second.
      l2: bytes of level 2 cache.
      clock: GHz.
      flops: peak bfloat16 operations a second, dense.
      link: bytes a second to the other GPUs of a host, one way.
    """

    device_kind: str
    pattern: str
    capability: tuple[int, int]
    arch: str
    shared: tuple[int, int]
    processors: int
    memory: int
    bandwidth: float
    l2: int
    clock: float
    flops: float
    link: float


NETWORK = 50e9  # bytes a second from a GPU to other hosts, through a port of 400 Gb/s of its own
# Compute capability, the name that ptxas has for it, and shared memory of a multiprocessor and of a block.
_SM_80, _SM_89 = ((8, 0), "sm_80", (167936, 166912)), ((8, 9), "sm_89", (102400, 101376))
_SM_90, _SM_100 = ((9, 0), "sm_90a", (233472, 232448)), ((10, 0), "sm_100a", (233472, 232448))
# From NVIDIA's data sheets and the CUDA programming guide's table of capabilities. The first whose pattern is found counts.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "A100.*80GB", *_SM_80, 108, 80 * _GIB, 2039e9, 40 * _MIB, 1.41, 312e12, 300e9),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", "A100", *_SM_80, 108, 40 * _GIB, 1555e9, 40 * _MIB, 1.41, 312e12, 300e9),
    "a30": Gpu("NVIDIA A30", r"A30\b", *_SM_80, 56, 24 * _GIB, 933e9, 24 * _MIB, 1.44, 165e12, 32e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "RTX 4090", *_SM_89, 128, 24 * _GIB, 1008e9, 72 * _MIB, 2.52, 165e12, 32e9),
    "l4": Gpu("NVIDIA L4", r"L4\b", *_SM_89, 58, 24 * _GIB, 300e9, 48 * _MIB, 2.04, 121e12, 32e9),
    "l40": Gpu("NVIDIA L40", r"L40\b", *_SM_89, 142, 48 * _GIB, 864e9, 96 * _MIB, 2.49, 181e12, 32e9),
    "l40s": Gpu("NVIDIA L40S", "L40S", *_SM_89, 142, 48 * _GIB, 864e9, 96 * _MIB, 2.52, 362e12, 32e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", "H100 PCIe", *_SM_90, 114, 80 * _GIB, 2039e9, 50 * _MIB, 1.755, 756e12, 64e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "H100|GH200", *_SM_90, 132, 80 * _GIB, 3350e9, 50 * _MIB, 1.98, 989e12, 450e9),
    "h200": Gpu("NVIDIA H200", "H200", *_SM_90, 132, 141 * _GIB, 4800e9, 50 * _MIB, 1.98, 989e12, 450e9),
    "b200": Gpu("NVIDIA B200", "B200", *_SM_100, 148, 180 * _GIB, 8000e9, 126 * _MIB, 1.97, 2250e12, 900e9),
}
# As jax calls TPUs, or has called them; a device is one chip, or a core of one where a chip is two devices.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def tpu_generation(device_kind: str) -> str | None:
    """The name in ``GENERATIONS`` of a TPU as jax calls it; None where it is not known, as of a GPU."""
    return _TPU_KINDS.get(device_kind)


def gpu_by_kind(device_kind: str) -> Gpu | None:
    """The line of ``GPUS`` of a GPU as jax calls it; None where it is not known."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_kind)), None)


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 operations a second of a device of jax, from its data sheet; None where that is not known, as of a CPU."""
    generation, gpu = tpu_generation(device.device_kind), gpu_by_kind(device.device_kind)
    if generation is not None:
        return GENERATIONS[generation].flops * getattr(device, "num_cores", 1)
    return None if gpu is None else gpu.flops
