"""Progress of long work on stderr: a bar on a terminal, and elsewhere a line every 15 seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

INTERVAL = 15.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes of some work are done, how fast, and how long the rest will take.

    Nothing is printed for work that ends at once.

    Args:
      what: the work, e.g. "tokenizing train".
      total: bytes of all the work; None: unknown.

    Yields:
      A function that adds a number of bytes to those done.
    """
    if not sys.stderr.isatty():
        yield _Lines(what, total).advance
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    except ImportError:
        yield _Lines(what, total).advance
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


class _Lines:
    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done = what, total, 0
        self.begin = self.printed = time.monotonic()

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.printed < INTERVAL:
            return
        self.printed = now
        rate = self.done / (now - self.begin)
        text = f"posjax: {self.what}: {self.done / 1e6:,.0f} MB"
        if self.total:
            text += f" of {self.total / 1e6:,.0f} MB"
        text += f", {rate / 1e6:,.1f} MB/s"
        if self.total and rate:
            text += f", {max(0.0, self.total - self.done) / rate:,.0f} s left"
        with contextlib.suppress(OSError):  # nobody reads stderr
            print(text, file=sys.stderr, flush=True)
