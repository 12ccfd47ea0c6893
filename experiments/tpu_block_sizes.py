"""Selects the block sizes of the TPU kernel for each generation from compiled schedules; needs no TPU.

    python experiments/tpu_block_sizes.py                                          # all generations: half an hour on two CPU cores
    python experiments/tpu_block_sizes.py --generations v6e --tiles 512 512 256 1024 512 256 --table blocks.json

Compiles causal attention in bfloat16 with heads of 128 channels, forward and backward, with every tile and as many resident keys as
compile: without positions, and with rope + cope(64), which gets a smaller tile if this one does not fit, as in an actual call. The
cost of a tile is the number of bundles (cycles) of a head of SEQUENCE tokens, computed as in ``tpu_cost_of_counting.py``: the mean
over attention without positions, rope + cope(64) with gates around one half, and rope + cope(64) with small gates. It excludes
stalls on memory.

Writes the best block sizes to posjax/attention/backends/tpu/blocks.json, which the package reads, and all numbers, including
rejected block sizes, to experiments/results/tpu_block_sizes.json.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, Literal

import tpu_cost_of_counting as costs
import tyro

from posjax.attention.backends.tpu import blocks as shipped
from posjax.attention.backends.tpu.vmem import smaller
from posjax.bench import results
from posjax.bench.attention import show_progress, versions

SHIPPED = Path(shipped.__file__).with_name("blocks.json")
RESULTS = Path(__file__).parent / "results" / "tpu_block_sizes.json"
SEQUENCE = 8192
GATES = ("half", "small")
TILES = ((512, 512, 256), (1024, 512, 256), (512, 1024, 256), (1024, 1024, 256), (2048, 512, 256), (1024, 512, 128))
SMALL = ((512, 512, 256), (256, 512, 256), (512, 256, 256), (256, 256, 256))  # for chips with at most LITTLE VMEM
LITTLE = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Search:
    """Compiles the attention kernel with several block sizes and keeps the best.

    Attributes:
      generations: TPU generations.
      tiles: queries, keys and strip of each tile to try; by default TILES, or SMALL on chips with at most LITTLE VMEM.
      table: JSON file for the best block sizes; generations that are not searched keep theirs.
      numbers: JSON file for all numbers.
    """

    generations: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    tiles: tuple[tuple[int, int, int], ...] = ()
    table: Path = SHIPPED
    numbers: Path = RESULTS


@functools.cache
def gates_of(kind: str) -> costs.Gates:
    (gates,) = costs.drawn(kind, SEQUENCE)
    return gates


def compiled(generation: str, first: shipped.Blocks, spec: str, rejected: list[str]) -> tuple[shipped.Blocks, Any]:
    """Returns the first blocks, from ``first`` downwards, that compile, and the parts of their kernels; extends ``rejected``."""
    for blocks in smaller(first):
        try:
            return blocks, costs.compiled(generation, blocks, (spec,))
        except (RuntimeError, AssertionError) as error:
            words = re.search(r"takes about .*? VMEM|Used .*? vmem", str(error)) or [str(error).split("\n")[0][:200]]
            rejected.append(f"{spec}, {tuple(blocks)}: {words[0]}")
    raise RuntimeError(f"{spec} does not compile with any block sizes for {generation}; the last error is: {rejected[-1]}")


def measure(generation: str, tile: tuple[int, int, int]) -> dict[str, Any]:
    """Returns a row: the blocks of each encoding, the bundles of a head for each kind of gates and pass, and their mean."""
    rejected: list[str] = []
    row: dict[str, Any] = {"generation": generation, "tile": list(tile), "rejected": rejected, "blocks": {}, "bundles": {}}
    held = shipped.Blocks(*tile, block_kv_resident=SEQUENCE)
    for spec, kinds in {"identity": {"identity": None}, costs.SPEC: {kind: gates_of(kind) for kind in GATES}}.items():
        blocks, built = compiled(generation, held, spec, rejected)
        row["blocks"][spec] = list(blocks)
        for kind, gates in kinds.items():
            turns = zip(costs.PASSES, costs.walk_over(gates, SEQUENCE, blocks), strict=True)
            row["bundles"][kind] = [costs.bundles(built[spec, way], of_way) for way, of_way in turns]
    return row | {"cost": sum(map(sum, row["bundles"].values())) / len(row["bundles"])}


def search(config: Search) -> None:
    for tile in config.tiles:
        shipped.check_blocks(shipped.Blocks(*tile, block_kv_resident=tile[1]))
    rows: list[dict[str, Any]] = []
    best = {name: chip.sizes for name, chip in shipped.CHIPS.items()}
    for generation in config.generations:
        tiles = config.tiles or (SMALL if shipped.CHIPS[generation].vmem <= LITTLE else TILES)
        with show_progress(quiet=False) as progress:
            for number, tile in enumerate(tiles):
                progress(f"{generation}: {' x '.join(map(str, tile))}", number, len(tiles))
                rows.append(measure(generation, tile))
        measured = [row for row in rows if row["generation"] == generation]
        cheapest = min(measured, key=lambda row: row["cost"])
        best[generation] = shipped.Blocks(*cheapest["blocks"]["identity"])
        show(generation, measured, cheapest)
        write(config, rows, best)


def show(generation: str, rows: list[dict[str, Any]], cheapest: dict[str, Any]) -> None:
    """Prints the table of one generation."""
    lines, notes = [], []
    for row in rows:
        name = f"{' x '.join(map(str, row['tile']))}{'*' if row is cheapest else ''}"
        cells = [" / ".join(f"{n / 1000:,.0f}" for n in both) for both in row["bundles"].values()]
        sizes = [" x ".join(map(str, row["blocks"][spec])) for spec in ("identity", costs.SPEC)]
        lines.append([name, *sizes, *cells, f"{row['cost'] / 1000:,.0f}"])
        notes += row["rejected"]
    notes.append(f"Thousands of bundles for a head of {SEQUENCE:,} tokens, forward / backward; * has the lowest mean.")
    heads = ["tile", "identity's blocks", f"{costs.SPEC}'s", "identity", *(f"{kind} gates" for kind in GATES), "mean"]
    results.print_table(generation, heads, lines, notes)


def write(config: Search, rows: list[dict[str, Any]], best: dict[str, shipped.Blocks]) -> None:
    lines = [f' "{name}": {json.dumps(sizes._asdict())}' for name, sizes in best.items()]
    config.table.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found = {"versions": versions(), "sequence": SEQUENCE, "spec": costs.SPEC, "rows": rows}
    config.numbers.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    search(tyro.cli(Search, description=__doc__))
