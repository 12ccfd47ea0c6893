"""How a command ends: interrupts, output that nobody reads any more, missing devices, and memory that runs out."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

GRACE_S = 5.0  # between a second SIGINT and the end of the process
_GONE = {errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.ENXIO}  # closed pipe, lost terminal, full disk

_owned = False


class Terminated(KeyboardInterrupt):
    """Signals a SIGTERM, SIGHUP or SIGUSR1 outside the training loop; inside it, the loop notes signals and saves."""


def own_process() -> None:
    """Prepares a process that is this command and nothing else: its streams, its warnings, and its end by a second SIGINT."""
    global _owned
    _owned = True
    for name in ("stdout", "stderr"):
        setattr(sys, name, _unbreakable(getattr(sys, name)))
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest, **options: (
        f"posjax: {message}\n" if category is UserWarning else plain(message, category, *rest, **options)
    )
    if threading.current_thread() is threading.main_thread():  # a shell's job in the background ignores it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_kill"):  # not on Windows, where the descriptor must be a socket
        _end_at_second_interrupt()


def hide_tracebacks() -> None:
    """Hides tracebacks from the threads of Orbax and TensorStore, whose errors are raised, too, and end in one line."""
    if not _owned or os.environ.get("POSJAX_TRACEBACK"):
        return
    from absl import logging

    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    plain = sys.unraisablehook

    def is_noise(
        error: BaseException | None,
    ) -> bool:  # an interrupt that fell into a destructor is lost; the thread ends the process
        return isinstance(error, KeyboardInterrupt) or "Event loop is closed" in str(error)

    sys.unraisablehook = lambda args: None if is_noise(args.exc_value) else plain(args)


def exit_code(error: KeyboardInterrupt) -> int:
    """Returns the exit code of a command that was interrupted before it could save."""
    if not isinstance(error, Terminated):
        return 130
    from posjax.parallel.distributed import RESTART

    return RESTART


def defer_interrupts() -> None:
    """Keeps further SIGINTs from interrupting the last lines of a command; a third one still ends the process at once."""
    if _owned and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)  # not SIG_IGN, which would hide them from the thread, too


def leave(code: int) -> None:
    """Ends the process; one of its own at once, without waiting for threads that read data or write checkpoints."""
    defer_interrupts()
    if "posjax.parallel.distributed" in sys.modules:
        from posjax.parallel import distributed

        if not _owned or distributed.is_joined():
            distributed.leave(code)
    elif not _owned:
        sys.exit(code)
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class _Unbreakable(io.FileIO):
    """Writes to a descriptor, and to nothing once its reader, terminal or disk is gone: a run is worth more than its output."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(data)


def _unbreakable(stream: Any) -> Any:
    try:
        stream.flush()
        raw = _Unbreakable(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # no stream, or one of a host program without a descriptor
        return stream
    options = dict(encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering)
    return io.TextIOWrapper(io.BufferedWriter(raw), write_through=stream.write_through, **options)


def _end_at_second_interrupt() -> None:
    """Ends the process GRACE_S seconds after a second SIGINT, and at once after a third, whatever its threads are doing.

    Python's own handlers run in the main thread between two bytecodes, which may be minutes away while XLA compiles. The C handler
    writes the number of each signal to a pipe at once, and a thread reads it there.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def end_after(seconds: float) -> None:
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            os.write(2, b"posjax: interrupted again and ended; rerun the command to resume from the newest checkpoint\n")
        os._exit(130)

    def watch() -> None:
        interrupts = 0
        while True:
            interrupts += os.read(reader, 64).count(signal.SIGINT)
            if interrupts >= 3:
                end_after(0)
            if interrupts == 2:
                threading.Thread(target=end_after, args=(GRACE_S,), daemon=True).start()

    threading.Thread(target=watch, name="posjax_interrupts", daemon=True).start()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated at SIGTERM, SIGHUP and SIGUSR1 within the body."""
    from posjax.training.signals import stoppable

    def end(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in stoppable() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: BaseException, config: Any) -> str | None:
    """Returns a line for the user about an error of JAX: memory that ran out, or devices that do not exist; None for any other."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")):
        first = text.strip().split("\n")[0][:200]
        return f"out of memory{f' ({first})' if first else ''}. {memory_advice(config)}"
    import jax

    try:
        jax.devices()
    except Exception as missing:  # an AssertionError, too, for a platform whose plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(missing).split("\n")[0].strip()
        return (
            f"JAX cannot use {f'JAX_PLATFORMS={platforms}' if platforms else 'its devices'} on this machine"
            f"{f': {reason}' if reason else ': no such device or plugin'}; unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu"
        )
    return None


def with_space(error: Exception, config: Any) -> str:
    """Returns the message of an error, and for a full disk also the workdir and how to go on."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    workdir = getattr(config, "workdir", "")
    return f"{error}{f'; workdir {workdir}' if workdir else ''}; free space and rerun the command: checkpoints are intact"


def memory_advice(config: Any) -> str:
    """Returns what to change when memory runs out, with the fields of the configuration that matter, if there is one."""
    if config is None:
        return "Reduce batch_size or the size of the model, or recompute activations with --remat full"
    size = f"num_layers={config.num_layers}, embed_dim={config.embed_dim}, seq_length={config.seq_length}"
    remat = "" if config.remat == "full" else " To resume with less memory, rerun the command with --remat full."
    return (
        f"Reduce batch_size={config.batch_size} (or raise accumulate_steps={config.accumulate_steps}), or the size of the model "
        f"({size}); remat is {config.remat!r}.{remat} Checkpoints are intact"
    )


def abort_text(config: Any) -> str:
    """Returns a line about an abort of the process by a library, most often because an allocation failed."""
    return f"the process was aborted, for the reason above if there is one. If memory ran out: {memory_advice(config)}"
