"""What the compiler makes of the GPU kernels with their own block sizes, ahead of time; no GPU is needed.

    pip install 'posjax[gpu-aot]'
    python experiments/gpu_compiles.py                    # a quarter of an hour on two CPU cores

Each encoding that the kernels know, forward and backward, causal, 8 heads, for each GPU, type, head dimension and lowering. A row
of experiments/results/gpu_compiles.json has registers of a thread and the bytes of them that spill to memory, of every kernel, or
the reason of a failure. The exit code is 1 where a call failed.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from posjax.attention.backends.gpu.blocks import LOWERINGS, GpuBlocks, blocks_for
from posjax.bench import results
from posjax.bench.attention import show_progress, versions
from posjax.compile import aot
from posjax.encodings.spec import parse_encoding
from posjax.hardware import GPUS

RESULTS = Path(__file__).parent / "results" / "gpu_compiles.json"
LENGTH, HEADS = 8192, 8
KERNELS = ("forward", "query_plain", "key_plain", "query_band", "key_band")
Call = tuple[str, str, int, GpuBlocks]  # encoding, type, head dimension, block sizes


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Compiles attention, forward and backward, and writes down what came of it.

    Attributes:
      chips: GPUs.
      encodings: such as rope or "rope + cope(64)".
      dtypes: of query, key and value.
      head_dims: channels of a head.
      lowerings: of the kernels.
      out: the file of all rows.
    """

    chips: tuple[Literal["a100", "h100", "h200", "b200"], ...] = ("a100", "h200")
    encodings: tuple[str, ...] = ("identity", "rope", "alibi", "t5", "tupe", "cope(64)", "rope + cope(64)")
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    head_dims: tuple[int, ...] = (64, 128)
    lowerings: tuple[Literal["triton", "mosaic"], ...] = LOWERINGS
    out: Path = RESULTS


def calls_for(chip: str, config: Sweep) -> list[Call]:
    """With the blocks that each lowering has for them; where it has none, or cannot do a call, that is left out."""
    major, minor = GPUS[chip].capability
    calls = []
    for spec, dtype, head_dim in itertools.product(config.encodings, config.dtypes, config.head_dims):
        channels = 2 * head_dim + 2 if "tupe" in spec else head_dim
        for lowering in config.lowerings:
            with contextlib.suppress(ValueError):
                blocks = blocks_for(10 * major + minor, dtype, channels, parse_encoding(spec).needs_causal, lowerings=(lowering,))
                calls.append((spec, dtype, head_dim, blocks))
    return calls


def job(spec: str, dtype: str, head_dim: int, blocks: GpuBlocks) -> aot.Job:
    sizes = dict(seq_len=LENGTH, heads=HEADS, kv_heads=HEADS, head_dim=head_dim, batch=1, dtype=dtype)
    return "posjax.bench.schedule:posjax_job", sizes | dict(spec=spec, with_gradients=True, block_sizes=blocks._asdict())


def row_of(chip: str, call: Call, report: aot.Report) -> dict[str, Any]:
    spec, dtype, head_dim, blocks = call
    kernels = {k.name.removeprefix("posjax_attention_"): {"registers": k.registers, "spilled": k.spilled} for k in report.kernels}
    kernels = {name.removeprefix("mosaic_"): of for name, of in kernels.items()}
    failed = report.failed or (None if "forward" in kernels else "the program has no kernel in it")
    row = {"chip": chip, "encoding": spec, "dtype": dtype, "head_dim": head_dim, "blocks": blocks._asdict(), "failed": failed}
    return row | {"seconds": round(report.seconds, 1), "temp_bytes": report.memory.get("temp"), "kernels": kernels}


def run(config: Sweep) -> int:
    rows: list[dict[str, Any]] = []
    calls = [(chip, call) for chip in config.chips for call in calls_for(chip, config)]
    with show_progress(quiet=False) as progress:
        for done, (chip, call) in enumerate(calls):
            progress(f"{chip}: {' '.join(map(str, call[:3]))}, {call[3].lowering}", done, len(calls))
            (report,) = aot.compile_all([job(*call)], f"{chip}:1x1x1")
            rows.append(row_of(chip, call, report))
            config.out.write_text(json.dumps({"versions": versions(), "length": LENGTH, "rows": rows}, indent=1) + "\n")
    for chip in config.chips:
        show(chip, [row for row in rows if row["chip"] == chip])
    return int(any(row["failed"] for row in rows))


def show(chip: str, rows: list[dict[str, Any]]) -> None:
    """Prints a GPU's table."""
    lines, notes = [], ["registers of a thread, + bytes that spill; blocks: queries x keys, strip, rows, warps, stages, lowering"]
    for row in rows:
        name = f"{row['encoding']}, {row['dtype']}, {row['head_dim']}"
        if row["failed"]:
            notes.append(f"{name} failed: {row['failed'][:300]}")
            continue
        found = [row["kernels"].get(kernel) for kernel in KERNELS]
        cells = ["" if k is None else f"{k['registers']}" + (f" + {k['spilled']}" if k["spilled"] else "") for k in found]
        queries, keys, *rest = row["blocks"].values()
        lines.append([name, f"{queries} x {keys}, {', '.join(map(str, rest))}", *cells])
    results.print_table(chip, ["call", "blocks", *KERNELS], lines, notes)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Sweep, description=__doc__)))
