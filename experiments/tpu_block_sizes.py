"""Which block sizes the TPU kernel takes on each generation, from schedules of its compiler; no TPU is needed.

    python experiments/tpu_block_sizes.py                                          # all generations: half an hour on two CPU cores
    python experiments/tpu_block_sizes.py --generations v6e --tiles 512 512 256 1024 512 256 --table /tmp/blocks.json

Causal attention in bfloat16, heads of 128 channels, forward and backward, with no position and with rope + cope(64), is compiled
with every tile, holding as many keys at once as compile. What counts is bundles (cycles) of a head of SEQUENCE tokens, as
``tpu_cost_of_counting.py`` finds them: without position, and with rope + cope(64) where gates are around one half and where they
are small, a third each. Waiting for memory is not in it.

The best go to posjax/kernels/blocks.json, which the package reads; all numbers, with what the compiler refused, to
experiments/results/tpu_block_sizes.json.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, Literal

import tpu_cost_of_counting as costs
import tyro

from posjax.bench import results
from posjax.bench.attention import show_progress, versions
from posjax.kernels import blocks as shipped

SHIPPED = Path(shipped.__file__).with_name("blocks.json")
RESULTS = Path(__file__).parent / "results" / "tpu_block_sizes.json"
SEQUENCE = 8192
GATES = ("half", "small")
RESIDENT = (8192, 4096, 2048, 1024, 512)  # keys held at once, the most first
TILES = ((512, 512, 256), (1024, 512, 256), (512, 1024, 256), (1024, 1024, 256), (2048, 512, 256), (1024, 512, 128))
SMALL = ((256, 512, 256), (512, 256, 256), (256, 256, 256), (512, 256, 128), (256, 512, 128))  # for little VMEM
LITTLE = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Search:
    """Compiles the attention kernel with several block sizes and keeps the best.

    Attributes:
      generations: of TPU.
      tiles: queries, keys and strip of each tile to try; by default TILES, or SMALL on chips of LITTLE VMEM.
      table: the file of the best; generations that are not searched stay as they are in it.
      numbers: the file of all numbers.
    """

    generations: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    tiles: tuple[tuple[int, int, int], ...] = ()
    table: Path = SHIPPED
    numbers: Path = RESULTS


@functools.cache
def gates_of(kind: str) -> costs.Gates:
    (gates,) = costs.drawn(kind, SEQUENCE)
    return gates


def measure(generation: str, sizes: shipped.Blocks) -> dict[str, Any]:
    """A row: bundles of a head, of each kind of gates and pass, and their mean; or why it was rejected."""
    row: dict[str, Any] = {"generation": generation, **sizes._asdict(), "cost": None, "rejected": None}
    try:
        built = costs.compiled(generation, sizes)
    except (RuntimeError, AssertionError) as error:
        words = re.search(r"block_sizes=.*? VMEM|Used .*? vmem", str(error)) or [str(error).split("\n")[0][:200]]
        return row | {"rejected": words[0]}
    found = {"identity": ("identity", None)} | {kind: (costs.SPEC, gates_of(kind)) for kind in GATES}
    for name, (spec, gates) in found.items():
        turns = costs.walk_over(gates, SEQUENCE, sizes)
        row[name] = [costs.bundles(built[spec, way], of_way) for way, of_way in zip(costs.PASSES, turns, strict=True)]
    return row | {"cost": sum(sum(row[name]) for name in found) / len(found)}


def search(config: Search) -> None:
    for tile in config.tiles:
        shipped.check_blocks(shipped.Blocks(*tile, resident=tile[1]))
    rows: list[dict[str, Any]] = []
    best = {name: chip.sizes for name, chip in shipped.CHIPS.items()}
    for generation in config.generations:
        tiles = config.tiles or (SMALL if shipped.CHIPS[generation].vmem <= LITTLE else TILES)
        with show_progress(quiet=False) as progress:
            for number, tile in enumerate(tiles):
                progress(f"{generation}: {' x '.join(map(str, tile))}", number, len(tiles))
                for resident in (n for n in RESIDENT if n % tile[1] == 0):
                    rows.append(measure(generation, shipped.Blocks(*tile, resident)))
                    if rows[-1]["cost"] is not None:
                        break
        own = [row for row in rows if row["generation"] == generation]
        good = [row for row in own if row["cost"] is not None]
        if good:
            best[generation] = as_blocks(min(good, key=lambda row: row["cost"]))
        show(generation, own, best[generation])
        write(config, rows, best)


def as_blocks(row: dict[str, Any]) -> shipped.Blocks:
    return shipped.Blocks(*(row[name] for name in shipped.Blocks._fields))


def show(generation: str, rows: list[dict[str, Any]], best: shipped.Blocks) -> None:
    """Prints a generation's table."""
    lines, notes = [], []
    for row in rows:
        sizes = as_blocks(row)
        if row["cost"] is None:
            notes.append(f"{tuple(sizes)} was rejected: {row['rejected']}")
            continue
        cells = [" / ".join(f"{n / 1000:,.0f}" for n in row[name]) for name in ("identity", *GATES)]
        mark = "*" if sizes == best else ""
        cells.append(f"{row['cost'] / 1000:,.0f}")
        lines.append([f"{sizes.queries}x{sizes.keys}{mark}", f"{sizes.strip}, {sizes.resident}", *cells])
    notes.append(f"Thousand bundles of a head of {SEQUENCE:,} tokens, forward / backward; * costs least in the mean.")
    results.print_table(generation, ["tile", "strip, held", "identity", *(f"{kind} gates" for kind in GATES), "mean"], lines, notes)


def write(config: Search, rows: list[dict[str, Any]], best: dict[str, shipped.Blocks]) -> None:
    lines = [f' "{name}": {json.dumps(sizes._asdict())}' for name, sizes in best.items()]
    config.table.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found = {"versions": versions(), "sequence": SEQUENCE, "spec": costs.SPEC, "rows": rows}
    config.numbers.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    search(tyro.cli(Search, description=__doc__))
