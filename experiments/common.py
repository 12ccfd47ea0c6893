"""What every experiment writes beside its numbers: the command, the versions and the machine. Not a program."""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import posjax
from posjax.bench.gpu_machine import cores

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """What JAX computes on: platform, kind and number of devices, and the CPU cores that this process may use."""
    first = jax.devices()[0]
    return {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count(), "cpu_cores": cores()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {"python": platform.python_version(), **packages, "posjax": posjax.__version__}


def command() -> str:
    """The one that runs, as it would be typed in the repository's folder."""
    return shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(name: str, rows: Sequence[dict[str, Any]], **more: Any) -> Path:
    """Writes results/NAME.json: command, versions, hardware, ``more``, rows. The file is never seen half written.

    Raises:
      ValueError: a number that is not finite, which JSON does not know; None says that there is none.
    """
    found = {"command": command(), **versions(), "hardware": hardware(), **more, "rows": list(rows)}
    path, part = RESULTS / f"{name}.json", RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    part.replace(path)
    return path


def markdown(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table: the first column to the left, the others to the right."""
    head = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(head + ["| " + " | ".join(map(str, line)) + " |" for line in lines])
