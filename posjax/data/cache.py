"""Cache entries: folders that are written whole or not at all, with a manifest by which damage is noticed.

    NAME/manifest.json = {"files": {file name: {"size": bytes, "mtime_ns": ..., "sha256": ...}}}

An entry is built in a temporary folder, synchronized to disk and renamed, so that concurrent processes, a killed process and a loss
of power leave no invalid entry behind. Opening an entry compares the sizes of its files. It computes digests only of files whose
modification time has changed, because reading a gigabyte at every start would take seconds, and whatever writes to a file also
changes its time.
"""

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posjax.files import read_json, set_aside, write_json

MANIFEST = "manifest.json"


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns ``folder``, which ``build`` fills first if it does not exist.

    If the folder is damaged, it is renamed to NAME.damaged-N with a warning, and built again.

    Raises:
      OSError: the folder cannot be written, or is damaged and cannot be renamed.
    """
    if folder.exists() and (fault := _fault(folder)):
        damage = f"the cache entry {folder} is damaged ({fault})"
        try:
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                set_aside(folder, f"{damage} and made again")
        except OSError as error:
            raise OSError(f"{damage} and cannot be renamed ({error.strerror}); remove it") from error
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".unfinished-*"):  # removed if its build was killed more than a day ago
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 86_400:
                shutil.rmtree(leftover)
    unfinished = folder.parent / f".unfinished-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        build(unfinished)
        _seal(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # if it exists, another process has built the same content first
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def digest(folder: Path, name: str) -> str:
    """Returns the SHA-256 of a file of an entry, as its manifest records it."""
    return _manifest(folder)[name]["sha256"]


def entry_name(*parts: str) -> str:
    """Returns a name for the entry that these parts determine."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(folder: Path) -> None:
    """Writes the files of a folder to disk, and a manifest of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = _state(path) | {"sha256": file_digest(path)}
    write_json(folder / MANIFEST, {"files": files})


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some systems cannot synchronize folders
            raise


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = read_json(folder / MANIFEST, "files")["files"]
    if not files or not all({"size", "mtime_ns", "sha256"} <= set(state) for state in files.values()):
        raise ValueError
    return files


def _fault(folder: Path) -> str:
    """Returns what is wrong with an entry, or an empty string."""
    try:
        files = _manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no manifest"
    times = {}
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = _state(path)
        if found["size"] != wanted["size"]:
            return f"{name} has {found['size']:,} bytes instead of {wanted['size']:,}"
        if found["mtime_ns"] != wanted["mtime_ns"]:
            if file_digest(path) != wanted["sha256"]:
                return f"{name} was changed"
            times[name] = wanted | found
    if times:  # copied to another place: the digests need not be computed again
        with contextlib.suppress(OSError):
            write_json(folder / MANIFEST, {"files": files | times})
    return ""
