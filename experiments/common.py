"""Code that all experiments share: writes results with the command, versions and hardware that produced them. Not a program."""

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
    """Returns the platform, kind and number of JAX's devices, and the number of CPU cores that this process may use."""
    first = jax.devices()[0]
    return {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count(), "cpu_cores": cores()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {"python": platform.python_version(), **packages, "posjax": posjax.__version__}


def command() -> str:
    """Returns the running command, as typed in the repository's root folder."""
    return shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(name: str, rows: Sequence[dict[str, Any]], **more: Any) -> Path:
    """Writes results/NAME.json atomically: command, versions, hardware, ``more`` and rows.

    Raises:
      ValueError: a number is not finite, which JSON cannot represent; use None for a missing number.
    """
    content = {"command": command(), **versions(), "hardware": hardware(), **more, "rows": list(rows)}
    path, part = RESULTS / f"{name}.json", RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)
    return path


def markdown(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Formats a Markdown table, with the first column aligned left and the others right."""
    head = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(head + ["| " + " | ".join(map(str, line)) + " |" for line in lines])
