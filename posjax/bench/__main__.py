"""python -m posjax.bench JOB.json: runs one job of ``posjax bench`` in a separate process; not a user-facing command.

A job is {"task": ..., "result": path of the JSON file for the answer, ...}. A job that fails answers {"failed": reason}.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from posjax.attention.backends.compile_errors import translate_compile_errors
from posjax.bench import inputs, reference
from posjax.bench.contestants import Contestant, Options, prepare

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    task = {"device": device, "inputs": write_inputs, "reference": write_reference, "measure": measure}[job["task"]]
    try:
        with translate_compile_errors(job.get("contestant", {}).get("implementation")):
            answer = task(job)
    except Exception as error:  # a contestant may raise anything; the parent process reports it
        lines = str(error).strip().split("\n")
        answer = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    Path(job["result"]).write_text(json.dumps(answer))


def device(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the platform, the device kind and the number of devices of jax."""
    first = jax.devices()[0]
    return {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count()}


def write_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the inputs of every (encoding, gates, length) as an .npz file."""
    config = SimpleNamespace(**job["config"])
    recorded = None
    if config.workdir:
        recorded = inputs.recorded_inputs(config.workdir, config.layer, config.batch * max(config.lengths))
    for spec, gates, length, path in job["files"]:
        np.savez(path, **inputs.make_inputs(spec, gates, length, config, recorded))
    return {}


def write_reference(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the output of dense attention, and the gradients if the job requests them, and returns the mean gate."""
    arrays = dict(np.load(job["inputs"]))
    asked = job.get("options", {})
    options = Options(**asked | {"starts": tuple(asked.get("starts", ()))})  # JSON has no tuples
    out, mean_gate = reference.attend(job["encoding"], arrays, job["first"], options)
    found = {"out": out}
    if job["gradients"]:
        found |= reference.gradients(job["encoding"], arrays, job["first"], options)
    np.savez(job["arrays"], **found)
    return {"mean_gate": mean_gate}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Calls one contestant once, writes its results, and returns its time and peak memory."""
    contestant, first = Contestant(**job["contestant"]), job["first"]
    arrays = dict(np.load(job["inputs"]))
    arrays["cotangent"][:, :first] = 0.0  # so that gradients cover the same rows as the reference's
    prepared = prepare(contestant, job["gradients"], arrays, job["dtype"], {})
    uses_torch = "torch" in sys.modules and contestant.is_peer
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        _limit_memory(prepared.temp_bytes)
    before = _peak_bytes()
    start = _reset_peak()
    clock = time.perf_counter()
    result = prepared.call()
    seconds = time.perf_counter() - clock
    after = _peak_bytes()
    results = prepared.fetch(result)
    np.savez(job["arrays"], **results | {"out": results["out"][:, first:]})
    return {
        "seconds": seconds,
        "peak_bytes_process": max(before, after),
        "peak_bytes_growth": max(0, after - start),
        "temp_bytes": prepared.temp_bytes,
        "device_peak_bytes": None if on_cpu else _device_peak(uses_torch),
    }


def _peak_bytes() -> int:
    """Returns the process's peak resident memory in bytes.

    On Linux, ru_maxrss starts at the peak of the parent process, so VmHWM of /proc is used where it is available.
    """
    if _STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> int:
    """Resets the peak, which includes compilation, to the current resident memory if the system can; returns the peak."""
    if _RESET.exists():
        _RESET.write_text("5")
    return _peak_bytes()


def _limit_memory(temp_bytes: int | None) -> None:
    """Limits the process's memory to the free memory, so that a call that needs more raises an error instead of being killed.

    Raises:
      MemoryError: the program's temporary arrays do not fit.
    """
    if not _STATUS.exists():
        return
    import resource

    free = next(int(s.split()[1]) * 1024 for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable"))
    if temp_bytes is not None and temp_bytes > free:
        raise MemoryError(
            f"needs {temp_bytes / 2**30:.1f} GiB besides inputs and outputs, but only {free / 2**30:.1f} GiB are free"
        )
    size = next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + free, resource.RLIM_INFINITY))


def _device_peak(uses_torch: bool) -> int | None:
    if uses_torch:
        import torch

        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
