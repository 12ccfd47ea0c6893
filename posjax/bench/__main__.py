"""python -m posjax.bench JOB.json: one job of ``posjax bench`` in a process of its own. Not for people.

A job is {"task": ..., "result": where the answer goes, as JSON, ...}. What goes wrong is an answer too: {"failed": why}.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from posjax.attention.backends.refused import naming_refusals
from posjax.bench import inputs, oracle
from posjax.bench.contestants import Contestant, prepare

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    task = {"device": device, "inputs": write_inputs, "oracle": write_oracle, "measure": measure}[job["task"]]
    try:
        with naming_refusals(job.get("contestant", {}).get("implementation")):
            answer = task(job)
    except Exception as error:  # the parent tells it; a contestant may raise anything
        lines = str(error).strip().split("\n")
        answer = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    Path(job["result"]).write_text(json.dumps(answer))


def device(job: dict[str, Any]) -> dict[str, Any]:
    """What jax computes on."""
    first = jax.devices()[0]
    return {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count()}


def write_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """The inputs of every (encoding, gates, length), each an .npz."""
    config = SimpleNamespace(**job["config"])
    recorded = None
    if config.workdir:
        recorded = inputs.recorded_inputs(config.workdir, config.layer, config.batch * max(config.lengths))
    for spec, gates, length, path in job["files"]:
        np.savez(path, **inputs.make_inputs(spec, gates, length, config, recorded))
    return {}


def write_oracle(job: dict[str, Any]) -> dict[str, Any]:
    """Output, and gradients where asked for, in float64."""
    arrays = dict(np.load(job["inputs"]))
    asked = job.get("options", {})
    options = oracle.Options(**asked | {"starts": tuple(asked.get("starts", ()))})  # of which JSON made a list
    out, mean_gate = oracle.attend(job["encoding"], arrays, job["first"], options)
    found = {"out": out}
    if job["gradients"]:
        found |= {f"grads/{name}": x for name, x in oracle.gradients(job["encoding"], arrays, job["first"], options).items()}
    np.savez(job["arrays"], **found)
    return {"mean_gate": mean_gate}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One call of one contestant: its time, peak memory and results."""
    contestant, first = Contestant(**job["contestant"]), job["first"]
    arrays = dict(np.load(job["inputs"]))
    arrays["cotangent"][:, :first] = 0.0  # gradients of the rows that the oracle has
    prepared = prepare(contestant, job["gradients"], arrays, job["dtype"], {})
    uses_torch = "torch" in sys.modules and contestant.is_peer
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        _limit_memory(prepared.temp_bytes)
    before = _peak_bytes()
    start = _forget_peak()
    clock = time.perf_counter()
    result = prepared.call()
    seconds = time.perf_counter() - clock
    after = _peak_bytes()
    found = prepared.fetch(result)
    np.savez(job["arrays"], **found | {"out": found["out"][:, first:]})
    return {
        "seconds": seconds,
        "peak_bytes_process": max(before, after),
        "peak_bytes_growth": max(0, after - start),
        "temp_bytes": prepared.temp_bytes,
        "device_peak_bytes": None if on_cpu else _device_peak(uses_torch),
    }


def _peak_bytes() -> int:
    """The most resident memory so far. Linux's ru_maxrss begins at that of the parent, so the kernel's own figure is preferred."""
    if _STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> int:
    """Lets the peak begin again at what is resident now, where the system can (compiling has a peak too), and returns it."""
    if _RESET.exists():
        _RESET.write_text("5")
    return _peak_bytes()


def _limit_memory(temp_bytes: int | None) -> None:
    """Refuses what would not fit, rather than have the system kill something."""
    if not _STATUS.exists():
        return
    import resource

    free = next(int(s.split()[1]) * 1024 for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable"))
    if temp_bytes is not None and temp_bytes > free:
        raise MemoryError(f"needs {temp_bytes / 2**30:.1f} GiB beside inputs and outputs, {free / 2**30:.1f} GiB are free")
    size = next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + free, resource.RLIM_INFINITY))


def _device_peak(uses_torch: bool) -> int | None:
    if uses_torch:
        import torch

        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
