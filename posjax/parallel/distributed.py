"""Several processes of one run: the same command everywhere. They meet, stop at the same step, and tell when one of them is lost.

    started by                                  they find each other through
    SLURM, Open MPI, a TPU pod, a K8s job       JAX's own detection of clusters
    hand                                        JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID

Process 0 serves the others as coordinator. A process that is not heard of for POSJAX_HEARTBEAT_SECONDS (60 where it is not set)
counts as lost, and all others stop; where they wait for a device of a killed process, its connections break and they stop at once.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "POSJAX_HEARTBEAT_SECONDS"
RESTART = 75  # EX_TEMPFAIL, the exit code of a run that the same command goes on with

_MEETING_SECONDS = 300
_POLL_SECONDS = 0.5  # how often a process asks whether another one wants to stop
_LONG_MS = 24 * 3600 * 1000  # for waits that a lost process ends, through its heartbeat
_numbers = itertools.count()  # waits and agreements need names of their own; all processes come to them in the same order


class ProcessLost(RuntimeError):
    """Another process of the run is gone, and with it a part of the state. The command line exits with RESTART."""


def join() -> None:
    """Joins the processes of this run, before JAX looks for devices; does nothing where there is but one.

    Raises:
      ValueError: an environment variable is wrong, or some are set and others missing.
      ConnectionError: the other processes, or what tells of them, cannot be reached.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    count, index = (_integer(name) if name in given else None for name in (COUNT, INDEX))
    if count is not None and count < 1:
        raise ValueError(f"{COUNT} must be at least 1, got {count}")
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"{INDEX} must be from 0 to {COUNT} - 1 = {count - 1}, got {index}")
    if ADDRESS in given and not given[ADDRESS].rpartition(":")[2].isdecimal():
        raise ValueError(f"{ADDRESS} must be host:port, got {given[ADDRESS]!r}")
    heartbeat = _integer(HEARTBEAT) if os.environ.get(HEARTBEAT) else 60
    if heartbeat < 1:
        raise ValueError(f"{HEARTBEAT} must be at least 1, got {heartbeat}")
    if count == 1 or jax.distributed.is_initialized():
        return
    where = f" at {ADDRESS}={given[ADDRESS]}" if ADDRESS in given else ""
    try:
        cluster = None if len(given) == 3 else _cluster()
        if cluster is None and 0 < len(given) < 3:
            missing = " and ".join(name for name in (ADDRESS, COUNT, INDEX) if name not in given)
            raise ValueError(f"{missing} must be set too, as {', '.join(given)} is: no cluster was found that would tell")
        if not given and (cluster is None or cluster.get_process_count() == 1):
            return
        # JAX's preemption service would take SIGTERM away from Python: until the loop runs, nothing would end the process.
        jax.config.update("jax_enable_preemption_service", False)
        with _abort_told(lambda: f"the processes of this run did not meet within {_MEETING_SECONDS} s{where}", 1):
            jax.distributed.initialize(
                given.get(ADDRESS),
                count,
                index,
                cluster_detection_method="deactivate" if cluster is None else None,
                initialization_timeout=_MEETING_SECONDS,
                heartbeat_timeout_seconds=heartbeat,
            )
    except (RuntimeError, KeyError, OSError) as error:
        alone = "" if COUNT in given else f" ({COUNT}=1 runs in this process alone)"
        raise ConnectionError(f"the processes of this run did not meet{alone}: {error}") from error


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {os.environ[name]!r}") from None


def _cluster() -> Any:
    """What JAX would ask for the processes, or None."""
    from jax._src import clusters

    left_out: list[Any] = []
    if "JOB_COMPLETION_INDEX" not in os.environ:  # only indexed jobs have several processes; of other pods JAX would ask in vain
        left_out += [clusters.K8sCluster]
    if jax.config.jax_platforms == "cpu":  # a try on one machine of a pod
        left_out += [clusters.GkeTpuCluster, clusters.GceTpuCluster]
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method and kind not in left_out)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def _client() -> Any:
    """The coordinator's key-value store and barriers, which need no device; JAX has no public name for it."""
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise ValueError(
            f"{jax.process_count()} processes must meet through jax.distributed.initialize() or posjax.parallel.distributed.join()"
        )
    return distributed.global_state.client


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.distributed.is_initialized():
        _client().wait_at_barrier(f"posjax/wait/{next(_numbers)}", _LONG_MS)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 does what is within, then all the others: what the first leaves on a shared disk, they find."""
    if jax.process_index() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            wait_for_all()


# Stopping together ---------------------------------------------------------------------------------------------------


class Agreement:
    """The step that all processes stop after, soon after a signal came to one of them.

    A process may be some steps ahead of another, as steps are dispatched and not waited for, and all must have run the same ones
    when they save. So a thread of each process asks the coordinator now and then whether a signal came (no device is asked, and no
    step waits). If so it answers with the last step that its process may have begun, and its process begins no other until all
    have answered: they stop after the latest of these steps. The threads answer whatever their processes wait for, so that none
    waits for ever. (JAX's own `reached_preemption_sync_point` does the like, but for SIGTERM only, by a handler of its own that
    Python's replaces.)

    Args:
      step: that all processes are at.
    """

    def __init__(self, step: int):
        self._step, self._asked, self._answer = step, False, None
        self._lock, self._agreed, self._closed = threading.Lock(), threading.Event(), threading.Event()

    def __enter__(self) -> "Agreement":
        if jax.process_count() > 1:
            self._client, self._name = _client(), f"posjax/stop/{next(_numbers)}"
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def signal_after(self, step: int, caught: Sequence[int]) -> int | None:
        """The signal to stop for after `step`, which has begun, or None to begin the next one.

        Args:
          step: the same calls, step by step, on all processes.
          caught: signals that came to this process so far.
        """
        if jax.process_count() == 1:
            return caught[0] if caught else None
        if caught and not self._asked:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self._client.key_value_set(f"{self._name}/signal", str(caught[0]))
        with self._lock:
            self._step, asked = step, self._asked
        if not asked:
            return None
        self._agreed.wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        last, number = self._answer
        return number if step >= last else None

    def _watch(self) -> None:
        number = None
        while number is None:
            if self._closed.wait(_POLL_SECONDS):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # not there
                number = int(self._client.key_value_try_get(f"{self._name}/signal"))
        with self._lock:
            self._asked, begun = True, self._step + 1
        try:
            self._client.key_value_set(f"{self._name}/{jax.process_index()}", str(begun))
            keys = [f"{self._name}/{index}" for index in range(jax.process_count())]
            self._answer = max(int(self._client.blocking_key_value_get(key, _LONG_MS)) for key in keys), number
        except jax.errors.JaxRuntimeError as error:
            self._answer = error
        self._agreed.set()


# Losing one ----------------------------------------------------------------------------------------------------------

# What an error of XLA has in it when a connection to another process broke, rather than something in this one.
_BROKEN = ("gloo", "nccl", "coordination", "connection reset", "connection closed", "socket closed", "unavailable:")

_tellings: list[tuple[Callable[[], str], int]] = []  # what an abort is told with, the innermost last, and the exit code
_leaving: int | None = None


@contextlib.contextmanager
def peer_loss_reported(telling: Callable[[], str]) -> Iterator[None]:
    """Within, the loss of another process ends this one with `telling()`, which says where the run stands and how to go on.

    Where a collective breaks, that is a ProcessLost. Where the coordinator is gone, or tells of a process that it has not heard of,
    JAX logs that and aborts from a thread of its own, with no way to be called before; so the abort is caught: it prints the
    same words and the process exits with RESTART.
    """
    if not jax.distributed.is_initialized():
        yield
        return

    def loss() -> str:
        return f"another process of this run was lost; {telling()}"

    with _abort_told(loss, RESTART):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not any(words in str(error).lower() for words in _BROKEN):
                raise
            raise ProcessLost(loss()) from error


@contextlib.contextmanager
def _abort_told(telling: Callable[[], str], code: int) -> Iterator[None]:
    _tellings.append((telling, code))
    _on_abort(_HANDLER)
    try:
        yield
    finally:
        _tellings.pop()
        if not _tellings:
            _on_abort(None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _HANDLER(number: int) -> None:  # Python's own handlers would wait for the main thread, which may wait for the lost process
    if _leaving is not None:
        os._exit(_leaving)
    telling, code = _tellings[-1]
    try:
        print(f"posjax: {telling()}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _on_abort(handler: Any) -> None:
    if os.name != "posix":
        return
    function = ctypes.CDLL(None).signal
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_void_p]
    function(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p) if handler else None)


def leave(code: int, together: bool = True) -> None:
    """Ends this process; unlike `sys.exit`, without the wait of minutes for other processes that do not end too.

    Args:
      code: the exit code.
      together: waits some seconds for others, which may be about to end for the same reason and shall say so themselves.
    """
    global _leaving
    if not jax.distributed.is_initialized():
        sys.exit(code)
    _leaving = code
    sys.stdout.flush()
    sys.stderr.flush()
    if together:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier("posjax/leave", 10_000)
    os._exit(code)
