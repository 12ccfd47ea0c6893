"""Known chips: data-sheet figures of TPU generations and GPUs, and the device names that JAX uses for them."""

import dataclasses
import re
from typing import Any

_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """Describes a TPU generation, with figures per TensorCore unless stated otherwise.

    Attributes:
      topology: smallest topology that libtpu compiles for; others, such as "v5e:16x16", work too.
      accelerator_type: value that libtpu expects in TPU_ACCELERATOR_TYPE.
      cores: TensorCores per chip.
      flops: peak bfloat16 operations per second.
      bandwidth: HBM bandwidth in bytes per second.
      vmem: bytes of vector memory.
      memory: bytes of HBM.
      torus: bytes per second that leave a whole chip along one dimension of the torus, in both directions together.
      clock: bundles per second. Google publishes only v4's; the others are flops divided by the operations of the matrix units per
        cycle, see below.
      delay_slots: bundles after a branch that run whether or not it is taken, as they appear in the compiler's output.
    """

    topology: str
    accelerator_type: str
    cores: int
    flops: float
    bandwidth: float
    vmem: int
    memory: int
    torus: float
    clock: float
    delay_slots: int


# A JAX device is one core of v4 and tpu7x, and both cores of v5p; topologies are counted in chips.
# flops, bandwidth, memory: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, per chip there, divided by the number of cores here.
# torus: the inter-chip bidirectional bandwidth on those pages, divided by the number of ports; a dimension has two ports.
# cores, vmem: docs.jax.dev/en/latest/pallas/tpu/hardware.html.
# clock: v4 has 1050 MHz, Jouppi et al. 2023, arXiv 2304.01433, table 4. The others are not published. v5e and v5p have 4 matrix
# units of 128 x 128 per core; 4 * 128 * 128 * 2 operations per cycle give 1.5 and 1.75 GHz (and 1.05 for v4). For v6e and tpu7x
# the compiler expects more than 2 units of 256 x 256 can do at one pass per cycle; 2 * 256 * 256 * 2 * 2 gives 1.75 and 2.2 GHz.
_PASS = 4 * 128**2 * 2
GENERATIONS = {
    "v4": Generation("v4:2x2x1", "v4-8", 2, 275e12 / 2, 1228e9 / 2, 16 * _MIB, 32 * _GIB // 2, 600e9 / 6, 1.05e9, 1),
    "v5e": Generation("v5e:2x2", "v5litepod-4", 1, 197e12, 819e9, 128 * _MIB, 16 * _GIB, 400e9 / 4, 197e12 / _PASS, 4),
    "v5p": Generation(
        "v5p:2x2x1", "v5p-8", 2, 459e12 / 2, 2765e9 / 2, 64 * _MIB, 95 * _GIB // 2, 1200e9 / 6, 459e12 / 2 / _PASS, 4
    ),
    "v6e": Generation("v6e:2x2", "v6e-4", 1, 918e12, 1640e9, 128 * _MIB, 32 * _GIB, 800e9 / 4, 918e12 / (4 * _PASS), 4),
    "tpu7x": Generation(
        "tpu7x:2x2x1", "tpu7x-8", 2, 2307e12 / 2, 7380e9 / 2, 64 * _MIB, 192 * _GIB // 2, 1200e9 / 6, 2307e12 / 2 / (4 * _PASS), 6
    ),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Describes a GPU model.

    Attributes:
      device_kind: name that JAX gives it.
      pattern: regular expression that matches the JAX device names of this GPU and of variants with the same peak.
      capability: compute capability.
      arch: name that ptxas gives it.
      shared: bytes of shared memory per streaming multiprocessor, and at most per block.
      processors: number of streaming multiprocessors.
      memory: bytes of device memory.
      bandwidth: memory bandwidth in bytes per second.
      l2: bytes of level 2 cache.
      clock: GHz.
      flops: peak dense bfloat16 operations per second.
      link: bytes per second to the other GPUs of a host, in one direction.
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


NETWORK = 50e9  # bytes per second from a GPU to other hosts, through one 400 Gb/s port per GPU
# Compute capability, its name in ptxas, and shared memory per multiprocessor and per block.
_SM_80, _SM_89 = ((8, 0), "sm_80", (167936, 166912)), ((8, 9), "sm_89", (102400, 101376))
_SM_90, _SM_100 = ((9, 0), "sm_90a", (233472, 232448)), ((10, 0), "sm_100a", (233472, 232448))
# From NVIDIA's data sheets and the CUDA programming guide's table of capabilities. The first entry whose pattern matches is used.
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
# Names that JAX gives TPUs, or has given them. A device is one chip, or one core where a chip is two devices.
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
    """Returns the key in ``GENERATIONS`` of a JAX device kind; None if it is not a known TPU."""
    return _TPU_KINDS.get(device_kind)


def gpu_by_kind(device_kind: str) -> Gpu | None:
    """Returns the entry of ``GPUS`` for a JAX device kind; None if it is not a known GPU."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_kind)), None)


def peak_flops(device: Any) -> float | None:
    """Returns the data-sheet peak of a JAX device in bfloat16 operations per second; None if unknown, as for a CPU."""
    generation, gpu = tpu_generation(device.device_kind), gpu_by_kind(device.device_kind)
    if generation is not None:
        return GENERATIONS[generation].flops * getattr(device, "num_cores", 1)
    return None if gpu is None else gpu.flops
