"""Which block sizes the TPU kernel takes on each generation, from schedules of its compiler; no TPU is needed.

    python experiments/tpu_block_sizes.py                                          # all generations: an hour or so on two CPU cores
    python experiments/tpu_block_sizes.py --generations v6e --tiles 512 512 256 1024 512 256 --table /tmp/blocks.json

Causal attention in bfloat16, heads of 128 channels, forward and backward, with no position and with rope + cope(64), is
compiled with every tile; with the best of them, then, as many keys are held at once as compile. What counts is bundles (cycles)
for each pair of query and key that may meet, of SEQUENCE tokens: those of a plain tile without a mask, over all tiles that the
walk visits (tiles at the diagonal are visited whole), and for the encoding that counts those of a strip in the place of every
eighth tile, about as many as cope(64) counts in with gates half open. Waiting for memory is not in it, nor what a grid step
does before and after its walk.

The best go to posjax/kernels/blocks.json, which the package reads; all numbers, with what the compiler refused, to
experiments/results/tpu_block_sizes.json.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import tyro

from posjax import aot
from posjax.bench import results
from posjax.bench.attention import show_progress, versions
from posjax.bench.schedule import forms_of
from posjax.kernels import blocks as shipped

SHIPPED = Path(shipped.__file__).with_name("blocks.json")
RESULTS = Path(__file__).parent / "results" / "tpu_block_sizes.json"
ENCODINGS = ("identity", "rope + cope(64)")
SEQUENCE = 16384
COUNTED = 1 / 8  # of the tiles
RESIDENT = (16384, 8192, 4096, 2048, 1024)  # keys held at once, the most first
TILES = ((512, 512, 256), (1024, 512, 256), (512, 1024, 256), (1024, 1024, 256), (2048, 512, 256), (1024, 512, 128))


@dataclasses.dataclass(frozen=True)
class Search:
    """Compiles the attention kernel with several block sizes and keeps the best.

    Attributes:
      generations: of TPU.
      tiles: queries, keys and strip of each tile to try.
      table: the file of the best; generations that are not searched stay as they are in it.
      numbers: the file of all numbers.
    """

    generations: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    tiles: tuple[tuple[int, int, int], ...] = TILES
    table: Path = SHIPPED
    numbers: Path = RESULTS


def measure(generation: str, sizes: shipped.Blocks) -> dict[str, Any]:
    """A row: bundles a pair of each encoding and pass, their cost, VMEM; or why it was rejected."""
    job = dict(with_gradients=True, seq_len=SEQUENCE, heads=4, kv_heads=2, head_dim=128, batch=1, dtype="bfloat16")
    jobs = [("posjax.bench.schedule:posjax_job", job | dict(spec=spec, block_sizes=list(sizes))) for spec in ENCODINGS]
    row: dict[str, Any] = {"generation": generation, **sizes._asdict(), "seconds": 0.0, "vmem_bytes": 0, "rejected": None}
    rows = range(0, SEQUENCE, sizes.queries)
    visited = sum(math.ceil((first + sizes.queries) / sizes.keys) for first in rows) * sizes.queries * sizes.keys
    waste = visited / (SEQUENCE * (SEQUENCE + 1) / 2)
    row["cost"] = 0.0
    for spec, report in zip(ENCODINGS, aot.compile_all(jobs, aot.GENERATIONS[generation].topology), strict=True):
        row["seconds"] += report.seconds
        if report.failed is not None:
            words = re.search(r"block_sizes=.*? VMEM|Used .*? vmem", report.failed) or [report.failed.split("\n")[0][:200]]
            return row | {"rejected": f"{spec}: {words[0]}", "cost": None}
        for kernel in report.kernels:
            found = forms_of(kernel)
            plain = [turn / (sizes.queries * sizes.keys) for _, turn, _, whole in found if whole]
            strips = [work.bundles / (sizes.queries * sizes.strip) for work, _, nested, _ in found if nested]
            if not plain:
                return row | {"rejected": f"{spec}: {kernel.name} has no loop over whole tiles that could be read", "cost": None}
            name = f"{spec}, {'backward' if 'backward' in kernel.name else 'forward'}"
            row[name] = {"plain": min(plain), "strip": min(strips, default=None)}
            counted = COUNTED if strips else 0.0
            row["cost"] += waste * ((1 - counted) * min(plain) + counted * min(strips, default=0.0))
            row["vmem_bytes"] = max(row["vmem_bytes"], kernel.vmem or 0)
    return row


def search(config: Search) -> None:
    tried = [shipped.Blocks(*tile, resident=max(tile[1], RESIDENT[-1])) for tile in config.tiles]
    for sizes in tried:
        shipped.check_blocks(sizes)
    rows: list[dict[str, Any]] = []
    best = {name: chip.sizes for name, chip in shipped.CHIPS.items()}
    for generation in config.generations:
        with show_progress(quiet=False) as progress:
            for number, sizes in enumerate(tried):
                progress(f"{generation}: {' x '.join(map(str, sizes[:3]))}", number, len(tried) + 1)
                rows.append(measure(generation, sizes))
            good = [row for row in rows if row["generation"] == generation and row["cost"] is not None]
            if good:
                first = min(good, key=lambda row: row["cost"])
                best[generation] = as_blocks(first)
                for resident in (n for n in RESIDENT if n > first["resident"] and n % first["keys"] == 0):
                    progress(f"{generation}: {resident} keys held", len(tried), len(tried) + 1)
                    rows.append(measure(generation, best[generation]._replace(resident=resident)))
                    if rows[-1]["cost"] is not None:
                        best[generation] = as_blocks(rows[-1])
                        break
        show(generation, [row for row in rows if row["generation"] == generation], best[generation])
        write(config, rows, best)


def as_blocks(row: dict[str, Any]) -> shipped.Blocks:
    return shipped.Blocks(*(row[name] for name in shipped.Blocks._fields))


def show(generation: str, rows: list[dict[str, Any]], best: shipped.Blocks) -> None:
    """Prints a generation's table."""
    names = [f"{spec}, {direction}" for spec in ENCODINGS for direction in ("forward", "backward")]
    lines = []
    for row in rows:
        found = [row.get(name) or {} for name in names]
        cells = [" / ".join(f"{1000 * n:.2f}" for n in numbers.values() if n is not None) for numbers in found]
        cells += ["-", "-"] if row["cost"] is None else [f"{1000 * row['cost']:.2f}", f"{row['vmem_bytes'] / 2**20:.1f}"]
        sizes = as_blocks(row)
        mark = "*" if sizes == best and row["cost"] is not None else ""
        lines.append([f"{sizes.queries}x{sizes.keys}{mark}", f"{sizes.strip}, {sizes.resident}", *cells])
    notes = [f"{tuple(as_blocks(row))} was rejected: {row['rejected']}" for row in rows if row["rejected"]]
    notes.append("Bundles of 1,000 pairs, of a plain tile / of a strip, and what a whole call costs; * is the best.")
    heads = ["tile", "strip, held", "identity", "back", "cope", "back", "cost", "MiB"]
    results.print_table(generation, heads, lines, notes)


def write(config: Search, rows: list[dict[str, Any]], best: dict[str, shipped.Blocks]) -> None:
    lines = [f' "{name}": {json.dumps(sizes._asdict())}' for name, sizes in best.items()]
    config.table.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found = {"versions": versions(), "sequence": SEQUENCE, "counted": COUNTED, "rows": rows}
    config.numbers.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    search(tyro.cli(Search, description=__doc__))
