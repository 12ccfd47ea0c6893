"""Small files, written completely or not at all, and checked when they are read."""

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from posjax.storage import is_bucket, with_retries


class DamagedFile(ValueError):
    """Raised when a small file does not hold what was written into it. The message names the file and the damage."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers, and a process killed at any moment, find either the old content or all of the new one.

    The content goes through a temporary file beside it, fsync, and a rename. A bucket (a path with "://") replaces objects
    atomically by itself.

    Raises:
      OSError: the file cannot be written; the old one is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        with_retries(path.write_bytes, data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON value atomically; numbers that JSON cannot represent, NaN and infinities, become null."""
    write_atomically(path, json.dumps(finite(value), indent=indent, allow_nan=False) + "\n")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      needed: names that the object must have.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFile: the content is not JSON, such as half a file, is not an object, contains NaN, or lacks a needed name.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    try:
        contents = with_retries(path.read_bytes) if is_bucket(path) else path.read_bytes()
        value = json.loads(contents.decode(), parse_constant=refuse)
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: it must hold an object, got a {type(value).__name__}")
    if missing := [name for name in needed if name not in value]:
        raise DamagedFile(f"{path} is damaged: it lacks {', '.join(missing)}")
    return value


def set_aside(path: Path, reason: object) -> Path:
    """Renames a damaged file to NAME.damaged-1 (or -2, ...), warns, and returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.replace(aside)
    warnings.warn(f"{reason}; it is kept as {aside.name}", stacklevel=2)
    return aside


def finite(value: Any) -> Any:
    """Replaces the numbers in a JSON value that are NaN or infinite by None."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
