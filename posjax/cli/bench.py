"""posjax bench attention | schedule | gpu | tune."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from posjax.cli.common import fail


def bench(args: Sequence[str]) -> None:
    """Runs posjax bench attention | schedule | gpu | tune."""
    import tyro

    known = {
        "attention": "time, memory and error of attention: encodings, implementations and other packages",
        "schedule": "what the TPU compiler makes of attention, counted in cycles, with no TPU attached",
        "gpu": "speed and accuracy of the kernels on the GPU of this machine, and of a decoder of a billion parameters",
        "tune": "block sizes of the kernels for the GPU of this machine",
    }
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  bench {what:<12}{about}" for what, about in known.items()]
        print("usage: posjax bench WHAT [--field value ...]\n\n" + "\n".join(lines) + "\n\nposjax bench WHAT --help for more")
        sys.exit(0 if args else 2)
    if args[0] not in known:
        near = difflib.get_close_matches(args[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"what to bench must be {' or '.join(known)}, got {args[0]!r}{hint}")
    what = importlib.import_module(f"posjax.bench.{args[0]}")
    tables = importlib.import_module("posjax.bench.results") if args[0] == "attention" else what
    names = {"attention": "AttentionBench", "schedule": "ScheduleBench", "gpu": "GpuBench", "tune": "Tune"}
    config = tyro.cli(getattr(what, names[args[0]]), args=args[1:], prog=f"posjax bench {args[0]}")
    try:
        rows = what.run(config)
    except KeyboardInterrupt:
        fail(f"interrupted; what was measured stands in {config.out}", code=130)
    tables.show(rows)
    print("\n".join(str(Path(config.out) / name) for name in tables.FILES if (Path(config.out) / name).exists()))
