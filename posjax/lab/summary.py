"""The lines that a run prints before it compiles: on what, with what, and where it writes."""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

import posjax
from posjax.lab.config import Config
from posjax.lab.source import Source


def opening_lines(config: Config, spec: str, source: Source, parameters: int, mesh: Mapping[str, int], workdir: Any) -> list[str]:
    """Returns the summary of a run, a few lines without compiling anything.

    Args:
      config, source: the configuration and the data of the run.
      spec: the encoding.
      parameters: number of parameters.
      mesh: number of devices by axis.
      workdir: where the run writes.
    """
    length = config.seq_length if source.task is None else source.task.length
    per_step = config.batch_size * length
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "no sharding"
    lines = [
        f"devices   {hardware()['devices']}; {axes}; {config.parallel}",
        f"model     {spec}, {parameters:,} parameters, {config.num_layers} layers of width {config.embed_dim}, "
        f"{config.compute_dtype}",
        f"steps     {config.steps:,} of {per_step:,} tokens ({config.batch_size} x {length}), {config.steps * per_step:,} in total",
    ]
    if source.train is not None:
        text = source.train
        lines.append(f"data      {config.data}: {text.num_tokens:,} tokens, {text.num_documents:,} documents to train on")
    else:
        lines.append(f"data      {config.task}, {'drawn' if config.num_examples is None else f'{config.num_examples:,} examples'}")
    return [*lines, f"workdir   {workdir}"]


def hardware() -> dict[str, Any]:
    """Returns the devices and the machine of this process as JSON values."""
    device = jax.devices()[0]
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{jax.device_count()} x {device.device_kind}{processes}"
    return {"platform": device.platform, "devices": devices, "machine": platform.machine(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Returns the versions of Python, posjax and the packages that compute."""
    packages = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], "posjax": posjax.__version__} | packages
