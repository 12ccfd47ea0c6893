"""Multi-process runs: initialization, stopping at the same step, and reporting the loss of a process.

Every process runs the same command.

    started by                                  processes are configured by
    SLURM, Open MPI, a TPU pod, a K8s job       JAX's cluster detection
    hand                                        JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID

Process 0 is the coordinator. A process that sends no heartbeat for POSJAX_HEARTBEAT_SECONDS (default 60) is considered lost, and
all others stop. Processes that wait for a device of a killed process stop at once, because their connections to it break.
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

from posjax.parallel.jax_private import coordinator_client, detect_cluster

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "POSJAX_HEARTBEAT_SECONDS"
RESTART = 75  # EX_TEMPFAIL: the exit code if rerunning the same command resumes the run

_MEETING_SECONDS = 300
_POLL_SECONDS = 0.5  # how often a process polls whether another one has received a signal
_LONG_MS = 24 * 3600 * 1000  # timeout of waits that end anyway if a process is lost, through its missing heartbeat
_numbers = itertools.count()  # barriers and syncs need unique names; all processes reach them in the same order


class ProcessLost(RuntimeError):
    """Raised when another process of the run, and with it a part of the state, is lost. The command line exits with RESTART."""


def join() -> None:
    """Connects the processes of this run. Must be called before JAX initializes its devices. Does nothing for a single process.

    Raises:
      ValueError: an environment variable is invalid, or some are set and others are missing.
      ConnectionError: the other processes, or the cluster's information about them, cannot be reached.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    count, index = (_integer(name) if name in given else None for name in (COUNT, INDEX))
    if count is not None and count < 1:
        raise ValueError(f"{COUNT} must be at least 1, got {count}")
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"{INDEX} must lie in [0, {COUNT}={count}), got {index}")
    if ADDRESS in given and not given[ADDRESS].rpartition(":")[2].isdecimal():
        raise ValueError(f"{ADDRESS} must be host:port, got {given[ADDRESS]!r}")
    heartbeat = _integer(HEARTBEAT) if os.environ.get(HEARTBEAT) else 60
    if heartbeat < 1:
        raise ValueError(f"{HEARTBEAT} must be at least 1, got {heartbeat}")
    if count == 1 or jax.distributed.is_initialized():
        return
    where = f" at {ADDRESS}={given[ADDRESS]}" if ADDRESS in given else ""
    try:
        cluster = None if len(given) == 3 else detect_cluster()
        if cluster is None and 0 < len(given) < 3:
            missing = " and ".join(name for name in (ADDRESS, COUNT, INDEX) if name not in given)
            raise ValueError(f"{missing} must be set along with {', '.join(given)}, because no cluster environment provides it")
        if not given and (cluster is None or cluster.get_process_count() == 1):
            return
        # JAX's preemption service would replace Python's SIGTERM handler, and SIGTERM would have no effect before the loop runs.
        jax.config.update("jax_enable_preemption_service", False)
        with abort_message(lambda: f"the processes of this run did not connect within {_MEETING_SECONDS} s{where}", 1):
            jax.distributed.initialize(
                given.get(ADDRESS),
                count,
                index,
                cluster_detection_method="deactivate" if cluster is None else None,
                initialization_timeout=_MEETING_SECONDS,
                heartbeat_timeout_seconds=heartbeat,
            )
    except (RuntimeError, KeyError, OSError) as error:
        alone = "" if COUNT in given else f"; set {COUNT}=1 to run in this process alone"
        raise ConnectionError(f"the processes of this run could not connect: {error}{alone}") from error


def is_joined() -> bool:
    """Returns whether this process is one of several of a run."""
    return jax.distributed.is_initialized()


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {os.environ[name]!r}") from None


def _client() -> Any:
    client = coordinator_client()
    if client is None:
        raise ValueError(
            f"{jax.process_count()} processes must first call jax.distributed.initialize() or posjax.parallel.distributed.join()"
        )
    return client


def wait_for_all() -> None:
    """Blocks until every process has reached this call."""
    if jax.distributed.is_initialized():
        _client().wait_at_barrier(f"posjax/wait/{next(_numbers)}", _LONG_MS)


def barrier(name: str) -> None:
    """Blocks until every process has reached the barrier of this name, from any thread; involves no device."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(name, _LONG_MS)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the body on process 0 first and then on all others, so that they find the files that it writes to a shared disk."""
    if jax.process_index() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            wait_for_all()


def text_of_first_process(function: Callable[[], str]) -> str:
    """Returns on all processes the text that a function returns on process 0."""
    text: list[str] = []
    on_first_process(lambda: text.append(function()))
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return text[0]
    key = f"posjax/text/{next(_numbers)}"
    if text:
        _client().key_value_set(key, text[0])
    return _client().blocking_key_value_get(key, _LONG_MS)


def on_first_process(function: Callable[[], None], error: type[Exception] = ValueError) -> None:
    """Runs a function on process 0 and waits for it on all others. If it fails, the others raise ``error`` with its message."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return function()
    key, failure = f"posjax/first/{next(_numbers)}", None
    if jax.process_index() == 0:
        try:
            function()
        except Exception as raised:  # the others wait
            failure = raised
        _client().key_value_set(key, f"-{failure}" if failure else "+")
        if failure:
            raise failure
        return None
    answer = _client().blocking_key_value_get(key, _LONG_MS)
    if answer.startswith("-"):
        raise error(answer[1:])
    return None


# Stopping at the same step -------------------------------------------------------------------------------------------


class PreemptionSync:
    """Makes all processes stop after the same step, soon after one of them has received a signal.

    Steps are dispatched asynchronously, so a process may be some steps ahead of another, but all must have run the same steps when
    they save. A thread of each process therefore polls the coordinator for a signal (this involves no device, and no step waits
    for it). If there is one, the thread publishes the last step that its process may have begun, and its process begins no further
    step until all processes have published theirs. All then stop after the latest of these steps. The threads publish even while
    their processes are blocked, so there is no deadlock. (JAX's `reached_preemption_sync_point` is similar, but works only for
    SIGTERM, through a handler that Python's handler replaces.)

    Args:
      step: the step that all processes are at.
    """

    def __init__(self, step: int):
        self._step, self._is_stopping, self._answer = step, False, None
        self._lock, self._agreed, self._closed = threading.Lock(), threading.Event(), threading.Event()

    def __enter__(self) -> "PreemptionSync":
        if jax.process_count() > 1:
            self._client, self._name = _client(), f"posjax/stop/{next(_numbers)}"
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def signal_after(self, step: int, caught: Sequence[int]) -> int | None:
        """Returns the signal that stops the run after `step`, or None to begin the next step.

        Args:
          step: the step that has begun. All processes make the same calls, step by step.
          caught: the signals that this process has received so far.
        """
        if jax.process_count() == 1:
            return caught[0] if caught else None
        if caught and not self._is_stopping:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has set it already
                self._client.key_value_set(f"{self._name}/signal", str(caught[0]))
        with self._lock:
            self._step, is_stopping = step, self._is_stopping
        if not is_stopping:
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
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # not set yet
                number = int(self._client.key_value_try_get(f"{self._name}/signal"))
        with self._lock:
            self._is_stopping, begun = True, self._step + 1
        try:
            self._client.key_value_set(f"{self._name}/{jax.process_index()}", str(begun))
            keys = [f"{self._name}/{index}" for index in range(jax.process_count())]
            self._answer = max(int(self._client.blocking_key_value_get(key, _LONG_MS)) for key in keys), number
        except jax.errors.JaxRuntimeError as error:
            self._answer = error
        self._agreed.set()


# Loss of a process ---------------------------------------------------------------------------------------------------

# Substrings of the XLA errors that mean a broken connection to another process, as opposed to a failure in this one.
_BROKEN = ("gloo", "nccl", "coordination", "connection reset", "connection closed", "socket closed", "unavailable:")

_abort_messages: list[tuple[Callable[[], str], int]] = []  # (message callback, exit code) of an abort, innermost last
_leaving: int | None = None


@contextlib.contextmanager
def on_peer_loss(message: Callable[[], str]) -> Iterator[None]:
    """Ends this process with the message `message()` if another process is lost within the body.

    If a collective fails, ProcessLost is raised. If the coordinator is lost, or reports a process without a heartbeat, JAX logs it
    and aborts from one of its threads without a callback. The abort is therefore caught: its handler prints the same message, and
    the process exits with RESTART.

    Args:
      message: returns the state of the run and how to resume it, for the message.
    """
    if not jax.distributed.is_initialized():
        yield
        return

    def loss() -> str:
        return f"another process of this run was lost; {message()}"

    with abort_message(loss, RESTART):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not any(words in str(error).lower() for words in _BROKEN):
                raise
            raise ProcessLost(loss()) from error


@contextlib.contextmanager
def abort_message(message: Callable[[], str], code: int) -> Iterator[None]:
    """Prints a message and exits with a code if the runtime aborts this process within the body, from any of its threads."""
    _abort_messages.append((message, code))
    _on_abort(_HANDLER)
    try:
        yield
    finally:
        _abort_messages.pop()
        if not _abort_messages:
            _on_abort(None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _HANDLER(number: int) -> None:  # Python's handlers run in the main thread, which may be waiting for the lost process
    if _leaving is not None:
        os._exit(_leaving)
    message, code = _abort_messages[-1]
    try:
        print(f"posjax: {message()}", file=sys.stderr, flush=True)
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
    """Ends this process without waiting for the others; `sys.exit` would wait minutes for processes that do not end.

    Args:
      code: the exit code.
      together: whether to wait up to 10 seconds for the others, so that processes that end for the same reason can print their own
        messages.
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
