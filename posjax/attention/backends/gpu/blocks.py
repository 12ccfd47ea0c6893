"""Block sizes of the GPU kernels, and their defaults for each device."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.kernel_biases import PairProgram
from posjax.checks import short
from posjax.hardware import gpu_by_kind

LOWERINGS = ("triton", "mosaic")
_MOSAIC_JAX = 0, 11, 2  # the first version whose Mosaic GPU has the features that the kernels use
_WIDEST = 144  # channels per head: 128, or 64 with the channels that TUPE appends
_SHARED = 226 * 1024  # bytes of shared memory per block on compute capability 9.0, minus some for barriers


class GpuBlocks(NamedTuple):
    """Configures the block sizes of the GPU kernels.

    The first four are powers of two from 16 to 256.

    Attributes:
      block_q: queries per tile.
      block_kv: keys per tile.
      block_kv_count: keys processed per counting step (a strip), at most ``block_kv``.
      block_q_rows: queries processed at a time for a key tile in the backward pass, at most ``block_q``.
      num_warps: warps of 32 threads per tile, a power of two from 1 to 16.
      num_stages: pipeline stages, i.e. tiles that are loaded at a time, from 1 to 8.
      lowering: "triton" or "mosaic", for all keys that are not counted. "mosaic" needs block_q=128, block_kv=128 and
        block_q_rows=64.
    """

    block_q: int
    block_kv: int
    block_kv_count: int
    block_q_rows: int
    num_warps: int
    num_stages: int
    lowering: str = "triton"


def check_gpu_blocks(blocks: GpuBlocks) -> None:
    """Raises ValueError for block sizes that no kernel supports, before anything is compiled."""
    if blocks.lowering not in LOWERINGS:
        raise ValueError(f"lowering of block_sizes must be {' or '.join(LOWERINGS)}, got {short(blocks)}")
    for name in GpuBlocks._fields[:-1]:
        size, (least, most) = getattr(blocks, name), {"num_warps": (1, 16), "num_stages": (1, 8)}.get(name, (16, 256))
        fits = isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
        if not fits or (name != "num_stages" and size & (size - 1)):
            what = "a number" if name == "num_stages" else "a power of two"
            raise ValueError(f"{name} of block_sizes must be {what} from {least} to {most}, got {short(blocks)}")
    for part, of in (("block_kv_count", "block_kv"), ("block_q_rows", "block_q")):
        if getattr(blocks, part) > getattr(blocks, of):
            raise ValueError(f"{part} of block_sizes must be at most {of}, got {short(blocks)}")
    if blocks.lowering == "mosaic" and (blocks.block_q, blocks.block_kv, blocks.block_q_rows) != (128, 128, 64):
        raise ValueError(
            f"block_sizes must have block_q=128, block_kv=128 and block_q_rows=64 with lowering='mosaic', got {short(blocks)}"
        )


def mosaic_unsupported_reason(
    capability: int,
    dtype: Any,
    channels: int,
    entries: int,
    blocks: GpuBlocks | None = None,
    pairs: tuple[PairProgram, ...] = (),
) -> str | None:
    """Returns why a call cannot use lowering "mosaic", with the given blocks or with any; None if it can.

    Args:
      channels: channels of a query or value head, whichever has more.
      entries: entries of the table of biases; 0 without a table.
      pairs: the programs of biases that are functions of two tokens.
    """
    if jax.__version_info__ < _MOSAIC_JAX:
        return f"it needs jax {'.'.join(map(str, _MOSAIC_JAX))} or later, and this is {jax.__version__}"
    if capability != 90:
        return f"it is for compute capability 9.0, and the GPU has {capability / 10}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"it takes bfloat16 and float16, and query has dtype {jnp.dtype(dtype)}"
    if channels > _WIDEST:
        return f"it takes heads of at most {_WIDEST} channels, and these have {channels}"
    if entries > 64:
        return f"it takes tables of at most 64 biases, and this one has {entries}"
    if not all(map(_is_function_of_distance, pairs)):
        return "it takes functions of the distance of two positions with one number per head that is not learned, and no others"
    smem_bytes = 0 if blocks is None else 4 * (-(-channels // 16) * 16) * (blocks.block_q + blocks.num_stages * blocks.block_kv)
    if smem_bytes > _SHARED:
        return f"its tiles take {smem_bytes // 1024} of {_SHARED // 1024} KiB of shared memory; fewer stages would fit"
    return None


def _is_function_of_distance(program: PairProgram) -> bool:
    is_relative = program.relative and not program.features
    return is_relative and program.reads == "number" and program.size == 1 and not program.learned


# A line per kind of call: minimum compute capability, bytes per number, maximum channels, whether it counts, and sizes.
# The lowering that comes first is preferred.
_TABLE = json.loads(Path(__file__).with_name("gpu_blocks.json").read_text())
LEAST = 80  # the lowest compute capability that Triton supports


def capability() -> int:
    """Returns ten times the compute capability of the GPU of the mesh in context, or else of this process.

    It is ``LEAST`` if there is no GPU, and 0 if the GPU is not from NVIDIA.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        gpu = gpu_by_kind(device.device_kind)
        return LEAST if gpu is None else 10 * gpu.capability[0] + gpu.capability[1]
    local_device = jax.devices()[0]
    if local_device.platform != "gpu":
        return LEAST
    version = str(local_device.compute_capability)  # such as 9.0, or gfx942 on AMD
    return round(10 * float(version)) if re.fullmatch(r"\d+\.\d+", version) else 0


def blocks_for(
    capability: int,
    dtype: Any,
    channels: int,
    counts: bool,
    entries: int = 0,
    lowerings: tuple[str, ...] = LOWERINGS,
    pairs: tuple[PairProgram, ...] = (),
) -> GpuBlocks:
    """Returns the block sizes for a call, from the table's lines for the newest capability that is not newer than the device's.

    Among these lines, the first lowering that supports the call is used, with the fewest channels that suffice. Arguments as in
    ``mosaic_unsupported_reason``.

    Raises:
      ValueError: none of the ``lowerings`` supports the call. "triton" supports every call that the kernels support.
    """
    size = jnp.dtype(dtype).itemsize
    lines = [line for line in _TABLE if line["capability"] <= capability and (line["bytes"], line["counts"]) == (size, counts)]
    newest = max(line["capability"] for line in lines)
    lines = [line for line in lines if line["capability"] == newest and line["channels"] >= channels]
    preferred = list(dict.fromkeys(line["lowering"] for line in lines))
    for line in sorted(lines, key=lambda line: (preferred.index(line["lowering"]), line["channels"])):
        blocks = GpuBlocks(*(line[name] for name in GpuBlocks._fields))
        is_mosaic = blocks.lowering == "mosaic"
        reason = mosaic_unsupported_reason(capability, dtype, channels, entries, blocks, pairs) if is_mosaic else None
        if reason is None and blocks.lowering in lowerings:
            return blocks
    raise ValueError(f"lowerings must name one that has blocks for {channels} channels of {dtype}, got {lowerings}")
