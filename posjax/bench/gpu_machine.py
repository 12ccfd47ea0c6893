"""Code that the benchmarks on a local GPU share: a time budget, parallel compilation, and interleaved timing."""

import concurrent.futures
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from posjax.attention.backends.gpu.blocks import LEAST, capability
from posjax.bench.contestants import Prepared

LATE = "not measured: the time limit was reached"
INTERRUPTED = "not measured: interrupted"
_BURST = 0.02  # seconds of back-to-back calls, which hide the launch time


class Clock:
    """Tracks a time budget in seconds, which starts at construction."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Returns the seconds left; negative once the time is used up."""
        return self.end - time.perf_counter()


def check_gpu(command: str, instead: str) -> None:
    """Checks that jax has a GPU that the kernels support.

    Args:
      command: the command that needs a GPU, for the error message.
      instead: a sentence for the error message on what works without a GPU.

    Raises:
      NotImplementedError: there is no such GPU.
    """
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError):  # jax raises these if a requested platform is missing
        missing = f"jax finds no device with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        raise NotImplementedError(f"{command} needs an NVIDIA GPU; {missing}. {instead}") from None
    if platform != "gpu":
        raise NotImplementedError(f"{command} needs an NVIDIA GPU, but jax's platform is {platform}. {instead}")
    if capability() < LEAST:
        kind = jax.devices()[0].device_kind
        needed = f"an NVIDIA GPU of compute capability {LEAST / 10} or later"
        raise NotImplementedError(f"{command} needs {needed}, got {kind}. {instead}")


def hardware() -> dict[str, Any]:
    """Returns the device and the number of CPU cores that compile for it."""
    first = jax.devices()[0]
    machine = {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count(), "cores": cores()}
    return machine | ({"compute_capability": str(first.compute_capability)} if first.platform == "gpu" else {})


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: Exception) -> str:
    """Formats an error for the notes of a row."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def side_by_side(tasks: Sequence[Callable[[], Any]], clock: Clock) -> Iterator[Any]:
    """Runs tasks in parallel threads and yields their results in order.

    A task that raises, or that would begin after the time limit, yields the reason as text. Most of the time of a benchmark is
    compilation, which uses one core per program.
    """

    def attempt(task: Callable[[], Any]) -> Any:
        if clock.left <= 0:
            return LATE
        try:
            return task()
        except Exception as error:  # a compiler and a kernel may raise anything
            return reason(error)

    pool = concurrent.futures.ThreadPoolExecutor(cores())
    try:
        yield from pool.map(attempt, tasks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


Times = list[list[float] | str]


def milliseconds(ready: Sequence[Prepared], repeats: int, clock: Clock, times: Times | None = None) -> Times:
    """Times all contestants in interleaved rounds, and returns for each the milliseconds per round, or the reason of a failure.

    At least one round is run; no further round begins after the time limit. ``times`` is an empty list that is filled and
    returned, so that an interrupted caller has the times measured so far.
    """
    times = [] if times is None else times
    times += [[] for _ in ready]
    sizes = [1] * len(ready)
    for turn in range(-1, repeats):  # round -1 sets the number of calls per burst
        if turn > 0 and clock.left <= 0:
            break
        for n, prepared in enumerate(ready):
            if isinstance(times[n], str):
                continue
            try:
                seconds = _timed(prepared, sizes[n])
            except Exception as error:  # it succeeded alone, but other contestants use memory here
                times[n] = reason(error)
                continue
            if turn < 0:
                sizes[n] = min(20, math.ceil(_BURST / max(seconds, 1e-6)))
            else:
                times[n].append(1000 * seconds)
    return times


def _timed(prepared: Prepared, size: int) -> float:
    """Returns the seconds per call of ``size`` back-to-back calls."""
    prepared.call()  # warms up clocks and caches
    start = time.perf_counter()
    for _ in range(size):
        result = prepared.launch()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / size
