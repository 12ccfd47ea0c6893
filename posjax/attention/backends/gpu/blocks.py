"""Block sizes of the GPU kernels, by device."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.hardware import gpu_by_kind

LOWERINGS = ("triton", "mosaic")
_MOSAIC_JAX = 0, 11, 2  # the first whose Mosaic GPU has what the kernels ask for
_WIDEST = 144  # channels: 64 and what untied positions add, or 128
_SHARED = 226 * 1024  # bytes of a block on compute capability 9.0, without a few for barriers


class GpuBlocks(NamedTuple):
    """Sizes of the blocks of the GPU kernels, powers of two of at least 16.

    Attributes:
      queries: rows of a tile.
      keys: columns of a tile.
      strip: keys that are counted at a time, at most ``keys``.
      rows: queries that a tile of keys meets at a time in the backward pass, at most ``queries``.
      warps: of 32 threads, that work on a tile.
      stages: tiles that are loaded at a time.
      lowering: of all but what is counted, "triton" or "mosaic"; the latter takes 128 queries and keys, and 64 rows.
    """

    queries: int
    keys: int
    strip: int
    rows: int
    warps: int
    stages: int
    lowering: str = "triton"


def check_gpu_blocks(blocks: GpuBlocks) -> None:
    """Raises ValueError for sizes that no kernel has, before anything is compiled."""
    if blocks.lowering not in LOWERINGS:
        raise ValueError(f"block_sizes must have as lowering {' or '.join(LOWERINGS)}, got {blocks}")
    for name in GpuBlocks._fields[:-1]:
        size, (least, most) = getattr(blocks, name), {"warps": (1, 16), "stages": (1, 8)}.get(name, (16, 256))
        fits = isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
        if not fits or (name != "stages" and size & (size - 1)):
            what = "a number" if name == "stages" else "a power of two"
            raise ValueError(f"block_sizes must have as {name} {what} from {least} to {most}, got {blocks}")
    for part, of in (("strip", "keys"), ("rows", "queries")):
        if getattr(blocks, part) > getattr(blocks, of):
            raise ValueError(f"block_sizes must have as {part} at most its {of}, got {blocks}")
    if blocks.lowering == "mosaic" and (blocks.queries, blocks.keys, blocks.rows) != (128, 128, 64):
        raise ValueError(f"block_sizes must have queries=128, keys=128 and rows=64 with lowering='mosaic', got {blocks}")


def mosaic_refusal(capability: int, dtype: Any, channels: int, entries: int, blocks: GpuBlocks | None = None) -> str | None:
    """Why a call cannot take lowering "mosaic", with some blocks or any; None: it can.

    Args:
      channels: of a head of query and key, or of value, whichever are more.
      entries: of a table of biases, or 0.
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
    taken = 0 if blocks is None else 4 * (-(-channels // 16) * 16) * (blocks.queries + blocks.stages * blocks.keys)
    if taken > _SHARED:
        return f"its tiles take {taken // 1024} of {_SHARED // 1024} KiB of shared memory; fewer stages would fit"
    return None


# A line for each kind of call: the least compute capability, bytes of a number, the most channels, whether it counts, and sizes.
# Which lowering stands first is the one that is preferred.
_TABLE = json.loads(Path(__file__).with_name("gpu_blocks.json").read_text())
LEAST = 80  # Triton's


def capability() -> int:
    """Ten times the compute capability of the GPU of the mesh in context, or of this process; ``LEAST`` where there is none, and 0
    for one that is not NVIDIA's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        gpu = gpu_by_kind(device.device_kind)
        return LEAST if gpu is None else 10 * gpu.capability[0] + gpu.capability[1]
    here = jax.devices()[0]
    if here.platform != "gpu":
        return LEAST
    told = str(here.compute_capability)  # such as 9.0; of AMD's, gfx942
    return round(10 * float(told)) if re.fullmatch(r"\d+\.\d+", told) else 0


def blocks_for(
    capability: int, dtype: Any, channels: int, counts: bool, entries: int = 0, lowerings: tuple[str, ...] = LOWERINGS
) -> GpuBlocks:
    """The blocks of a call: of the newest capability that is none too new, and the fewest channels that are enough. Arguments as in
    ``mosaic_refusal``. Raises ValueError where none of the ``lowerings`` can do it; "triton" can all that the kernels do."""
    size = jnp.dtype(dtype).itemsize
    lines = [line for line in _TABLE if line["capability"] <= capability and (line["bytes"], line["counts"]) == (size, counts)]
    newest = max(line["capability"] for line in lines)
    lines = [line for line in lines if line["capability"] == newest and line["channels"] >= channels]
    preferred = list(dict.fromkeys(line["lowering"] for line in lines))
    for line in sorted(lines, key=lambda line: (preferred.index(line["lowering"]), line["channels"])):
        blocks = GpuBlocks(*(line[name] for name in GpuBlocks._fields))
        able = blocks.lowering == "triton" or mosaic_refusal(capability, dtype, channels, entries, blocks) is None
        if able and blocks.lowering in lowerings:
            return blocks
    raise ValueError(f"lowerings must name one that has blocks for {channels} channels of {dtype}, got {lowerings}")
