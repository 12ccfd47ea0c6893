"""posjax bench attention | schedule | gpu | tune."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from posjax.cli.common import fail, parse_flags

BENCHMARKS = {
    "attention": "time, memory and error of attention, by encoding, implementation and package",
    "schedule": "cycles of the attention kernels as the TPU compiler schedules them; needs no TPU",
    "gpu": "speed and accuracy of the kernels on this machine's GPU, and speed of a decoder with a billion parameters",
    "tune": "the fastest block sizes of the kernels on this machine's GPU",
}


def bench(args: Sequence[str]) -> None:
    """Runs posjax bench attention | schedule | gpu | tune."""
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{about}" for name, about in BENCHMARKS.items()]
        usage, more = "usage: posjax bench NAME [--field value ...]", "Run posjax bench NAME --help for all fields."
        print("\n".join([usage, "", *lines, "", more]))
        sys.exit(0 if args else 2)
    if args[0] not in BENCHMARKS:
        near = difflib.get_close_matches(args[0], BENCHMARKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {args[0]!r}{hint}")
    module = importlib.import_module(f"posjax.bench.{args[0]}")
    tables = importlib.import_module("posjax.bench.results") if args[0] == "attention" else module
    names = {"attention": "AttentionBench", "schedule": "ScheduleBench", "gpu": "GpuBench", "tune": "Tune"}
    config = parse_flags(getattr(module, names[args[0]]), args[1:], f"posjax bench {args[0]}")
    try:
        rows = module.run(config)
    except KeyboardInterrupt:
        fail(f"interrupted; the results so far are in {config.out}", code=130)
    tables.show(rows)
    print("\n".join(str(Path(config.out) / name) for name in tables.FILES if (Path(config.out) / name).exists()))
