"""Block sizes of the TPU kernels, and the chip properties that they depend on."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.checks import INT32, short
from posjax.hardware import tpu_generation


class Blocks(NamedTuple):
    """Configures the block sizes of the TPU kernel; shorter calls use smaller blocks.

    Attributes:
      block_q: queries per tile, a multiple of 128, at most 2,048.
      block_kv: keys per tile, a multiple of ``block_kv_count``.
      block_kv_count: keys processed per counting step (a strip), a multiple of 128.
      block_kv_resident: keys held in VMEM at once, a multiple of ``block_kv``.
    """

    block_q: int
    block_kv: int
    block_kv_count: int
    block_kv_resident: int


def check_blocks(blocks: Any) -> None:
    """Validates block sizes before anything is compiled.

    Raises:
      TypeError: ``blocks`` is not a ``Blocks``.
      ValueError: the kernel does not support one of the sizes.
    """
    if not isinstance(blocks, Blocks):
        given = "posjax.Blocks(block_q, block_kv, block_kv_count, block_kv_resident) or posjax.GpuBlocks(...)"
        raise TypeError(f"block_sizes must be None or {given}, got {short(blocks)}")
    sizes = blocks._asdict()
    units = {"block_q": "", "block_kv_count": "", "block_kv": "block_kv_count", "block_kv_resident": "block_kv"}
    for name, of in units.items():
        size, unit = sizes[name], sizes.get(of, 128)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= INT32 or size % unit:
            near = max(1, -(-size // unit)) * unit if isinstance(size, int) and size <= INT32 else unit
            what = f"{of}, {unit}" if of else unit
            raise ValueError(f"{name} of block_sizes must be a positive multiple of {what}, such as {near}, got {short(blocks)}")
    if blocks.block_q > 2048:  # the kernel keeps one bit per 128 queries
        raise ValueError(f"block_q of block_sizes must be at most 2048, got {short(blocks)}")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes a TPU generation.

    Attributes:
      name: as in ``posjax.hardware.GENERATIONS``.
      vmem: bytes of VMEM that a kernel may use.
      has_sublane_gather: whether a register can be gathered along sublanes in one operation.
      sizes: default block sizes for bfloat16 and heads of 128 channels.
    """

    name: str
    vmem: int
    has_sublane_gather: bool
    sizes: Blocks

    def blocks(self, dtype: Any, width: int) -> Blocks:
        """Returns the default block sizes for a dtype and a head dimension; VMEM is not checked."""
        wide = max(1, width // 128) * jnp.dtype(dtype).itemsize // 2
        return self.sizes._replace(block_kv_resident=max(self.sizes.block_kv, self.sizes.block_kv_resident // wide))


_MIB = 2**20
# experiments/tpu_block_sizes.py writes the file, from compiled schedules.
_SIZES = {name: Blocks(**sizes) for name, sizes in json.loads(Path(__file__).with_name("blocks.json").read_text()).items()}
CHIPS = {
    "v4": Chip("v4", 15 * _MIB, False, _SIZES["v4"]),
    "v5e": Chip("v5e", 100 * _MIB, True, _SIZES["v5e"]),
    "v5p": Chip("v5p", 80 * _MIB, True, _SIZES["v5p"]),
    "v6e": Chip("v6e", 100 * _MIB, True, _SIZES["v6e"]),
    "tpu7x": Chip("tpu7x", 56 * _MIB, True, _SIZES["tpu7x"]),
}
# For programs lowered without a known chip: v5e and later can run them.
ANY = Chip("any", 30 * _MIB, True, Blocks(512, 512, 256, 1024))


def chip_at_hand(x: Any = None) -> Chip:
    """Returns the TPU generation that a program is lowered for.

    This is the generation of the mesh of ``x``, or else of the mesh in context, or else of this process's devices; ``ANY`` if it is
    not a known TPU.
    """
    meshes = [jax.sharding.get_abstract_mesh()] if x is None else [jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()]
    devices = [device for mesh in meshes if (device := getattr(mesh, "abstract_device", None)) is not None]
    kind = devices[0].device_kind if devices else jax.devices()[0].device_kind
    return CHIPS.get(tpu_generation(kind) or "", ANY)
