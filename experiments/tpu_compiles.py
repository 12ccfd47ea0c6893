"""Tests whether every attention kernel compiles for every TPU generation, forward and backward, ahead of time; needs no TPU.

    python experiments/tpu_compiles.py                                        # all 840 calls: four hours on two CPU cores
    python experiments/tpu_compiles.py --chips v4 v6e --lengths 131072 1024   # a part of them

Compiles causal attention for each encoding that the kernel supports, on each chip, in bfloat16 and float32, with heads of 64, 128
and 256 channels: 4 query heads over 2 key heads with segments, and at PLAIN_LENGTH tokens also 4 over 4 without segments. Gradients
are taken of query, key, value and all parameters. A call whose program lacks a forward or a backward kernel counts as failed.

experiments/results/tpu_compiles.json has a row for each call, written a few calls at a time: seconds to trace and compile, and VMEM
of the kernels, or the reason of the failure. Calls that are in the file are skipped, as long as the versions and the kernel sources
are the same; otherwise all calls are repeated. The exit code is 1 if a call failed.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Group
from rich.live import Live
from rich.table import Table

import posjax as pj
from posjax.attention.backends import deferred, shards
from posjax.attention.backends.tpu import blocks
from posjax.bench.attention import versions
from posjax.compile import aot
from posjax.core import masks
from posjax.encodings.spec import parse_encoding
from posjax.hardware import GENERATIONS

SOURCES = Path(blocks.__file__).parent  # the kernels
SHARED = (Path(deferred.__file__), Path(shards.__file__), Path(masks.__file__))  # other code that a call runs
RESULTS = Path(__file__).parent / "results" / "tpu_compiles.json"
DTYPES = ("bfloat16", "float32")
HEAD_DIMS = (64, 128, 256)
PLAIN_LENGTH = 8192
CALL = ("length", "chip", "encoding", "dtype", "head_dim", "plain")  # fields that identify a call


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Configures the sweep.

    Attributes:
      chips: TPU generations.
      lengths: numbers of tokens; queries and keys have the same.
      encodings: encodings such as rope or "rope + cope(64)".
      workers: number of compilers that run in parallel.
    """

    chips: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    lengths: tuple[int, ...] = (1024, 8192, 131072)
    encodings: tuple[str, ...] = ("identity", "rope", "alibi", "t5", "tupe", "cope(64)", "rope + cope(64)")
    workers: int = 2


def attention_job(length: int, encoding: str, dtype: str, head_dim: int, plain: bool) -> tuple[Callable, tuple]:
    """Returns attention with its gradients, and their arguments, for posjax.compile.aot to compile in a separate process."""
    chosen = parse_encoding(encoding)
    heads, kv_heads = (4, 4) if plain else (4, 2)
    dims = pj.Dims(heads, head_dim, max_length=length, num_kv_heads=kv_heads)

    def parameters() -> Any:
        return chosen.init(jax.random.key(0), dims)

    def both(segments: Any, cotangent: Any, *operands: Any) -> Any:
        def forward(query: Any, key: Any, value: Any, params: Any) -> Any:
            within = None if plain else segments
            return pj.attention(query, key, value, chosen, params, is_causal=True, segment_ids=within, implementation="pallas")

        out, pull = jax.vjp(forward, *operands)
        return out, pull(cotangent)

    query, key = (jax.ShapeDtypeStruct((1, length, n, head_dim), dtype) for n in (heads, kv_heads))
    return both, (jax.ShapeDtypeStruct((1, length), jnp.int32), query, query, key, key, jax.eval_shape(parameters))


def measure(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compiles calls for one chip and returns their rows."""
    jobs = [("tpu_compiles:attention_job", {name: value for name, value in call.items() if name != "chip"}) for call in batch]
    reports = aot.compile_all(jobs, GENERATIONS[batch[0]["chip"]].topology, schedules=False)
    rows = []
    for call, report in zip(batch, reports, strict=True):
        kernels = [{"name": k.name, "vmem_bytes": k.vmem} for k in report.kernels]
        lacking = [part for part in ("forward", "backward") if not any(part in k.name for k in report.kernels)]
        failed = report.failed or (f"the program has no {' and no '.join(lacking)} kernel" if lacking else None)
        rows.append(call | {"seconds": round(report.seconds, 1), "kernels": kernels, "failed": failed})
    return rows


def calls(config: Sweep) -> list[tuple]:
    every = itertools.product(config.lengths, config.chips, config.encodings, DTYPES, HEAD_DIMS, (False, True))
    return [call for call in every if call[0] == PLAIN_LENGTH or not call[-1]]


def basis() -> dict[str, Any]:
    """Returns the versions and the hash of the sources that results depend on."""
    sources = sorted([*SOURCES.glob("*.py"), *SOURCES.glob("*.json"), *SHARED])
    digest = hashlib.sha256(b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in sources))
    named = ("python", "posjax", "jax", "jaxlib", "libtpu")
    return {"versions": {name: n for name, n in versions().items() if name in named}, "kernels_sha256": digest.hexdigest()}


def sweep(config: Sweep) -> int:
    """Compiles the calls that are not in the file yet, and returns the number of failures, including earlier ones."""
    started = basis()
    rows = {}
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
        rows = {tuple(row[name] for name in CALL): row for row in stored.pop("rows") if stored == started and not was_killed(row)}
    asked = calls(config)
    missing = [dict(zip(CALL, call, strict=True)) for call in asked if call not in rows]
    alike = itertools.groupby(missing, lambda call: [call[name] for name in ("length", "chip", "encoding")])
    batches = [list(batch) for _, batch in alike]
    with Live(summary(config, rows, "starting"), auto_refresh=False) as live, ThreadPoolExecutor(config.workers) as pool:
        try:
            for made in as_completed([pool.submit(measure, batch) for batch in batches]):
                if basis() != started:  # it is unknown which sources the calls were compiled from
                    raise RuntimeError("the sources changed during the sweep; run it again, from a copy if they keep changing")
                rows |= {tuple(row[name] for name in CALL): row for row in made.result()}
                write(started, rows)
                for row in made.result():
                    live.console.print(f"{describe(row)}: {outcome(row)}", markup=False, highlight=False, soft_wrap=True)
                left = sum(call not in rows for call in asked)
                live.update(summary(config, rows, f"{left} of {len(asked)} calls left"), refresh=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sum(rows[call]["failed"] is not None for call in asked)


def was_killed(row: dict[str, Any]) -> bool:
    """Returns whether the compiler was killed, by a user or for lack of memory, which says nothing about the kernel."""
    return re.search(r"killed by signal (2|9|15)\b", row["failed"] or "") is not None


def write(started: dict[str, Any], rows: dict[tuple, dict[str, Any]]) -> None:
    """Writes the results atomically, one row per line."""
    lines = ",\n  ".join(json.dumps(rows[key]) for key in sorted(rows))
    part = RESULTS.with_name(RESULTS.name + ".part")
    part.write_text(f'{json.dumps(started, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    part.replace(RESULTS)


def describe(call: dict[str, Any]) -> str:
    rest = "over 4" if call["plain"] else "over 2, segments"
    return f"{call['chip']}, {call['encoding']}, {call['length']:,} tokens, 4 x {call['head_dim']} {rest}, {call['dtype']}"


def outcome(row: dict[str, Any]) -> str:
    if row["failed"] is not None:
        return f"FAILED: {row['failed']}"
    parts = [f"{row['seconds']:.0f} s"]
    for kernel in row["kernels"]:
        name = re.sub(r"posjax_attention_|\.\d+$", "", kernel["name"])
        parts.append(f"{name} {(kernel['vmem_bytes'] or 0) / 2**20:.1f} MiB")
    return "; ".join(parts)


def summary(config: Sweep, rows: dict[tuple, dict[str, Any]], now: str) -> Group:
    """Builds a table of encodings by chips: how many calls compiled, and how many failed."""
    table = Table("encoding", *config.chips)
    for encoding in config.encodings:
        cells = []
        for chip in config.chips:
            here = calls(dataclasses.replace(config, chips=(chip,), encodings=(encoding,)))
            made = [rows[call]["failed"] is None for call in here if call in rows]
            cells.append(f"{sum(made)}/{len(here)}" + (f", [red]{made.count(False)} failed[/]" if not all(made) else ""))
        table.add_row(encoding, *cells)
    return Group(table, now, "")


if __name__ == "__main__":
    sys.exit(1 if sweep(tyro.cli(Sweep, description=__doc__)) else 0)
