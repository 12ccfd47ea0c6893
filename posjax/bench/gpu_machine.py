"""What the benchmarks on a GPU at hand share: a clock that ends them, compiling side by side, timing side by side."""

import concurrent.futures
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from posjax.attention.backends.gpu.blocks import LEAST, capability
from posjax.bench.contestants import Prepared

LATE = "not measured: the time was over"
INTERRUPTED = "not measured: interrupted"
_BURST = 0.02  # seconds of calls without a wait between them, which the time that a launch takes would be part of


class Clock:
    """Some time that runs from now on."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds; below zero when it is over."""
        return self.end - time.perf_counter()


def check_gpu(what: str, instead: str) -> None:
    """Raises NotImplementedError where jax has no GPU that the kernels run on.

    Args:
      what: the command that needs one.
      instead: what works here.
    """
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError):  # what jax raises where a platform that was asked for is not there
        found = f"jax finds no device with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        raise NotImplementedError(f"{what} needs an NVIDIA GPU; {found}. {instead}") from None
    if platform != "gpu":
        raise NotImplementedError(f"{what} needs an NVIDIA GPU; jax's platform here is {platform}. {instead}")
    if capability() < LEAST:
        kind = jax.devices()[0].device_kind
        raise NotImplementedError(f"{what} needs an NVIDIA GPU of compute capability {LEAST / 10} or later, got {kind}. {instead}")


def hardware() -> dict[str, Any]:
    """The device, and cores that compile for it."""
    first = jax.devices()[0]
    found = {"platform": first.platform, "device_kind": first.device_kind, "devices": jax.device_count(), "cores": cores()}
    return found | ({"compute_capability": str(first.compute_capability)} if first.platform == "gpu" else {})


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: Exception) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def side_by_side(tasks: Sequence[Callable[[], Any]], clock: Clock) -> Iterator[Any]:
    """What each task returns, in their order; why not, as text, where it raised something or would have begun too late.

    Compiling takes most of the time of a benchmark and one core a program.
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


def milliseconds(ready: Sequence[Prepared], repeats: int, clock: Clock, found: Times | None = None) -> Times:
    """Of each a time for each round, in which all have their turn; why not, as text, where a call raised something.

    There is one round at least, and no further one when the time is over. ``found``: an empty list, which is filled and returned:
    who is interrupted has what was measured.
    """
    found = [] if found is None else found
    found += [[] for _ in ready]
    sizes = [1] * len(ready)
    for turn in range(-1, repeats):  # the one before the first tells how many calls make a burst
        if turn > 0 and clock.left <= 0:
            break
        for n, prepared in enumerate(ready):
            if isinstance(found[n], str):
                continue
            try:
                taken = _timed(prepared, sizes[n])
            except Exception as error:  # alone it was well; here others hold memory too
                found[n] = reason(error)
                continue
            if turn < 0:
                sizes[n] = min(20, math.ceil(_BURST / max(taken, 1e-6)))
            else:
                found[n].append(1000 * taken)
    return found


def _timed(prepared: Prepared, size: int) -> float:
    """Seconds of a call, from several one behind the other."""
    prepared.call()  # clocks and caches as they are in the midst of its own work
    start = time.perf_counter()
    for _ in range(size):
        result = prepared.launch()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / size
