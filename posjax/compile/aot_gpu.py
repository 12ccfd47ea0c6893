"""Compilation for NVIDIA GPUs that are not attached, as ``posjax.compile.aot`` uses it, and the registers of kernels.

XLA accepts the description of a GPU in place of the GPU itself, and compiles for it to PTX. Running ``ptxas`` (package
nvidia-cuda-nvcc) on the PTX reports the registers that a kernel uses and the bytes that it spills.
"""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax.hardware import GPUS, Gpu

TRITON = "__gpu$xla.gpu.triton"  # the custom call of a Pallas-Triton kernel
MOSAIC = "mosaic_gpu"  # the prefix of the custom call of a Mosaic kernel


_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: {shared[0]} shared_memory_per_block_optin: {shared[1]}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {processors} fpus_per_core: 128 clock_rate_ghz: {clock}
  device_memory_size: {memory} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{device_kind}"
"""


def gpu_of(topology: str) -> Gpu | None:
    """Returns the GPU of a topology such as "h200:1x1x8" (slices, hosts, GPUs per host), or None for a topology of TPUs."""
    name = topology.partition(":")[0]
    if name in GPUS and not re.fullmatch(r"[^:]+:\d+x\d+x\d+", topology):
        raise ValueError(
            f"topology must be a GPU and the numbers of slices, hosts and GPUs per host, e.g. {name}:1x1x8, got {topology!r}"
        )
    return GPUS.get(name)


def check_installed() -> None:
    """Raises ImportError if jax's CUDA plugin is not installed."""
    if all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13)):
        missing = "compiling for a GPU that is not attached needs jax's CUDA plugin"
        raise ImportError(f"{missing}; add it with: pip install 'posjax[gpu-aot]'")


def environment(dump: Path | None, flags: Sequence[str]) -> dict[str, str]:
    """Returns the environment variables that jax must start with; ``dump`` is a folder for PTX, or None to write none."""
    xla = [] if _toolkit() is None else [f"--xla_gpu_cuda_data_dir={_toolkit()}"]
    xla += [] if dump is None else [f"--xla_dump_to={dump}", "--xla_dump_emitter_re=ptx"]
    mosaic = {} if _toolkit() is None else {"MOSAIC_GPU_CUDA_ROOT": str(_toolkit())}
    mosaic |= {} if dump is None else {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    return mosaic | {"XLA_FLAGS": " ".join([*xla, *flags]), "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}


def _toolkit() -> Path | None:
    """Returns the folder of nvidia-cuda-nvcc, which has bin/ptxas and nvvm/libdevice, or None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    folders = [Path(place) / name for place in places for name in ("cu13", "cuda_nvcc")]
    return next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)


def devices(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    shape = topology.partition(":")[2]
    description = _DESCRIPTION.format(**dataclasses.asdict(gpu_of(topology)))
    return topologies.get_topology_desc(platform="cuda", topology_name=shape, topology=shape, target_config=description).devices


def resources(dump: Path, gpu: Gpu) -> dict[str, dict[str, int]]:
    """Returns the registers per thread and the spilled bytes of each kernel in a dump, by name. Triton kernels need ptxas."""
    toolkit = _toolkit()
    ptxas = shutil.which("ptxas") if toolkit is None else str(toolkit / "bin" / "ptxas")
    found: dict[str, dict[str, int]] = {}
    for path in sorted(dump.glob("*.ptxas")):  # Mosaic runs ptxas itself and dumps its output
        found |= {name.removesuffix("_mosaic_gpu_kernel"): usage for name, usage in read_ptxas(path.read_text()).items()}
    for path in sorted(dump.glob("*.ptx")) if ptxas else ():
        if path.with_suffix(".ptxas").exists():
            continue
        command = [ptxas, "-v", f"-arch={gpu.arch}", str(path), "-o", os.devnull]
        found |= read_ptxas(subprocess.run(command, capture_output=True, text=True).stderr)
    return found


_ENTRY = re.compile(
    r"Compiling entry function '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


def read_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Parses registers and spilled bytes by kernel from the output of ``ptxas -v``."""
    return {
        name: {"registers": int(registers), "spilled": max(int(stores), int(loads))}
        for name, stores, loads, registers in _ENTRY.findall(text)
    }
