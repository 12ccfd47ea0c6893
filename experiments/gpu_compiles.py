"""Compiles the GPU kernels ahead of time with their default block sizes and records their registers; needs no GPU.

    pip install 'posjax[gpu-aot]'
    python experiments/gpu_compiles.py                    # a quarter of an hour on two CPU cores

Compiles causal attention with 8 heads, forward and backward, for each encoding that the kernels support, GPU, dtype, head dimension
and lowering. A row of experiments/results/gpu_compiles.json has the registers per thread and the spilled bytes of every kernel, or
the reason of a failure. The exit code is 1 if a call failed.
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
Call = tuple[str, str, int, GpuBlocks]  # encoding, dtype, head dimension, block sizes


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Configures the sweep.

    Attributes:
      chips: GPU models.
      encodings: encodings such as rope or "rope + cope(64)".
      dtypes: dtypes of query, key and value.
      head_dims: channels per head.
      lowerings: lowerings of the kernels.
      out: JSON file for all rows.
    """

    chips: tuple[Literal["a100", "h100", "h200", "b200"], ...] = ("a100", "h200")
    encodings: tuple[str, ...] = ("identity", "rope", "alibi", "t5", "tupe", "cope(64)", "rope + cope(64)")
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    head_dims: tuple[int, ...] = (64, 128)
    lowerings: tuple[Literal["triton", "mosaic"], ...] = LOWERINGS
    out: Path = RESULTS


def calls_for(chip: str, config: Sweep) -> list[Call]:
    """Lists the calls with the default blocks of each lowering, without calls that a lowering does not support."""
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
    kernels = {name.removeprefix("mosaic_"): usage for name, usage in kernels.items()}
    failed = report.failed or (None if "forward" in kernels else "the program contains no kernel")
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
    """Prints the table of one GPU."""
    lines, notes = [], ["registers per thread + spilled bytes; blocks: queries x keys, strip, rows, warps, stages, lowering"]
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
