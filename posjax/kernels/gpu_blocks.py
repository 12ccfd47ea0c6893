"""Block sizes of the GPU kernels, by device."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class GpuBlocks(NamedTuple):
    """Sizes of the blocks of the GPU kernels, powers of two of at least 16.

    Attributes:
      queries: rows of a tile.
      keys: columns of a tile.
      strip: keys that are counted at a time, at most ``keys``.
      rows: queries that a tile of keys meets at a time in the backward pass, at most ``queries``.
      warps: of 32 threads, that work on a tile.
      stages: tiles that are loaded at a time.
    """

    queries: int
    keys: int
    strip: int
    rows: int
    warps: int
    stages: int


def check_gpu_blocks(blocks: GpuBlocks) -> None:
    """Raises ValueError for sizes that no kernel has, before anything is compiled."""
    for name, size in blocks._asdict().items():
        least, most = {"warps": (1, 16), "stages": (1, 8)}.get(name, (16, 256))
        fits = isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
        if not fits or (name != "stages" and size & (size - 1)):
            what = "a number" if name == "stages" else "a power of two"
            raise ValueError(f"block_sizes must have as {name} {what} from {least} to {most}, got {blocks}")
    for part, of in (("strip", "keys"), ("rows", "queries")):
        if getattr(blocks, part) > getattr(blocks, of):
            raise ValueError(f"block_sizes must have as {part} at most its {of}, got {blocks}")


# A line for each kind of call: the least compute capability, bytes of a number, the most channels, and whether it counts.
_TABLE = json.loads(Path(__file__).with_name("gpu_blocks.json").read_text())
_KINDS = {"A100|A30": 80, "RTX 4090|L4|L40": 89, "H100|H200|GH200": 90, "B200|GB200": 100}
LEAST = 80  # Triton's


def capability() -> int:
    """Ten times the compute capability of the GPU of the mesh in context, or of this process; ``LEAST`` where there is none, and 0
    for one that is not NVIDIA's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return next((n for kind, n in _KINDS.items() if re.search(rf"\b({kind})\b", device.device_kind)), LEAST)
    here = jax.devices()[0]
    if here.platform != "gpu":
        return LEAST
    told = str(here.compute_capability)  # such as 9.0; of AMD's, gfx942
    return round(10 * float(told)) if re.fullmatch(r"\d+\.\d+", told) else 0


def blocks_for(capability: int, dtype: Any, channels: int, counts: bool) -> GpuBlocks:
    """The blocks of a call: of the newest capability that is none too new, and the fewest channels that are enough."""
    size = jnp.dtype(dtype).itemsize
    lines = [line for line in _TABLE if line["capability"] <= capability and (line["bytes"], line["counts"]) == (size, counts)]
    newest = max(line["capability"] for line in lines)
    lines = [line for line in lines if line["capability"] == newest and line["channels"] >= channels]
    found = min(lines, key=lambda line: line["channels"])
    return GpuBlocks(*(found[name] for name in GpuBlocks._fields))
