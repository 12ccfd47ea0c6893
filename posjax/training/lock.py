"""The lock of a workdir, which one process at a time may write to.

    <workdir>/.lock     {"pid", "host", "since", "beat", "token"} of the process that holds the lock; removed with it

The lock itself is an advisory lock of the operating system (flock) on that file, which ends with the process that holds it, however
that ends. On file systems without such locks, the file alone is the lock: its holder renews `beat` every few seconds, and the lock
is stale once the process is gone or has not renewed it for a minute.
"""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from posjax.files import write_atomically
from posjax.parallel.distributed import on_first_process
from posjax.storage import is_bucket, run_path, with_retries

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

LOCK = ".lock"
_BEAT_SECONDS, _STALE_SECONDS = 10, 60


class WorkdirInUse(OSError):
    """Raised when another process holds the lock of a workdir. The message names that process."""


@dataclasses.dataclass
class _Held:
    """Represents a lock that this process holds: how often it was taken, and how to give it back."""

    count: int
    release: Callable[[], None]


_held: dict[str, _Held] = {}
_descriptors: set[int] = set()


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a workdir, which is created if it does not exist, and removed again if it is still empty at the end.

    A process may take a lock that it already holds. With several processes of one run, the first one holds it for all.

    Raises:
      WorkdirInUse: another process holds the lock.
      ValueError: the workdir cannot be created or written to.
    """
    holders: list[str] = []

    def take() -> None:
        holders.append(_take(run_path(workdir)))

    on_first_process(take, WorkdirInUse)
    try:
        yield
    finally:
        for key in holders:
            _give_back(key)


P, R = ParamSpec("P"), TypeVar("R")


def holds_lock(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function with a keyword argument `workdir`, whose lock it then holds while it runs."""

    @functools.wraps(function)
    def with_lock(*args: P.args, **keywords: P.kwargs) -> R:
        with locked(keywords["workdir"]) if "workdir" in keywords else contextlib.nullcontext():  # then the call itself fails
            return function(*args, **keywords)

    return with_lock


def _take(folder: Any) -> str:
    key = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    if key in _held:
        _held[key].count += 1
        return key
    try:
        created = _create(folder)
        release = _lock_file(folder / LOCK, folder)
    except WorkdirInUse:
        raise
    except OSError as error:
        raise ValueError(f"workdir must be a writable folder, got {str(folder)!r}: {error}") from None

    def release_all() -> None:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        release()
        for path in reversed(created):  # a run that was refused leaves no empty folder
            with contextlib.suppress(OSError):
                path.rmdir()

    _held[key] = _Held(1, release_all)
    return key


def _give_back(key: str) -> None:
    held = _held[key]
    held.count -= 1
    if not held.count:
        del _held[key]
        held.release()


def _create(folder: Any) -> list[Any]:
    """Creates a folder, and returns the folders that did not exist before."""
    missing = [path for path in (*reversed(folder.parents), folder) if not path.exists()] if isinstance(folder, Path) else []
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _lock_file(path: Any, workdir: Any) -> Callable[[], None]:
    """Takes the lock on a file, and returns a function that gives it back.

    Raises:
      WorkdirInUse: another process holds it.
    """
    while fcntl is not None and isinstance(path, Path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder that it created
            _create(workdir)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(workdir, _wait_for_owner(path)) from None
        except OSError:  # this file system has no such locks
            os.close(descriptor)
            break
        if not _is_same_file(descriptor, path):  # its last holder has removed it in the meantime
            os.close(descriptor)
            continue
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        _descriptors.add(descriptor)
        return functools.partial(_unlock, descriptor)
    return _lock_by_heartbeat(path, workdir)


def _unlock(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    # A forked worker would otherwise hold the lock for as long as it lives, even if the run itself is killed.
    while _descriptors:
        os.close(_descriptors.pop())
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_by_heartbeat(path: Any, workdir: Any) -> Callable[[], None]:
    owner = _owner(path)
    if owner and not _is_stale(owner):
        raise _in_use(workdir, owner)
    myself = _myself()
    write_atomically(path, json.dumps(myself))
    time.sleep(0.3)  # of two processes that find the lock free at once, the one that writes last gets it
    if (owner := _owner(path)).get("token") != myself["token"]:
        raise _in_use(workdir, owner)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                write_atomically(path, json.dumps(myself | {"beat": time.time()}))

    threading.Thread(target=renew, daemon=True).start()
    return ended.set


def _myself() -> dict[str, Any]:
    now = time.time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "beat": now, "token": uuid.uuid4().hex}


def _owner(path: Any) -> dict[str, Any]:
    """Returns the content of a lock file, or an empty dict if there is none."""
    try:
        content = json.loads(with_retries(path.read_text) if is_bucket(path) else path.read_text())
        return content if isinstance(content, dict) and {"pid", "host", "since", "beat"} <= set(content) else {}
    except (OSError, ValueError):
        return {}


def _wait_for_owner(path: Path) -> dict[str, Any]:
    """Returns the content of a lock file whose holder may be writing it at this moment."""
    for _ in range(20):
        if owner := _owner(path):
            return owner
        time.sleep(0.02)
    return {}


def _is_stale(owner: dict[str, Any]) -> bool:
    if time.time() - owner["beat"] > _STALE_SECONDS:
        return True
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists and belongs to someone else
        return False
    return False


def _in_use(workdir: Any, owner: dict[str, Any]) -> WorkdirInUse:
    who = "another process"
    if owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        who = f"process {owner['pid']} on {owner['host']} since {since}"
    return WorkdirInUse(f"workdir {workdir} is in use by {who}; stop it or use another --workdir")
