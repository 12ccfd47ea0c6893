"""Signals that end a run. The loop notes them, finishes its step, saves and stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from posjax.parallel.distributed import RESTART

# SIGHUP comes from a terminal that is gone, SIGUSR1 from SLURM before the time limit (--signal=USR1@120). Windows has neither.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """Raised when a signal stops the run. The message names the step of the newest checkpoint.

    Attributes:
      exit_code: exit code of the command line: 130 after SIGINT, else posjax.parallel.distributed.RESTART, because the other
        signals come from schedulers and from lost connections.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """Returns the exit code of a process that a signal stopped after it had saved: 130 for SIGINT, else RESTART."""
    return 130 if number == signal.SIGINT else RESTART


def stoppable() -> tuple[signal.Signals, ...]:
    """Returns the signals of STOPPING that this process should handle: all but SIGHUP under nohup."""
    return tuple(n for n in STOPPING if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Defers the signals in STOPPING, so that they do not end the program within a step; yields a list of received signals.

    After the first signal, SIGINT raises KeyboardInterrupt again.
    """
    caught: list[int] = []

    def interrupt(number, frame):  # not Python's own handler, which asyncio, and with it Orbax, would replace for a while
        raise KeyboardInterrupt

    def note(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, interrupt)

    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python handles signals in the main thread only
        return
    before = {number: signal.signal(number, note) for number in stoppable()}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
