"""Text files on disk: which there are, what tells one state of them from another, and which are held out."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

VALIDATION_SHARE = 0.1


def list_files(root: str | Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths of the files under `root`, relative to it, with "/" and sorted; `wanted` takes the relative path.

    Folders that `wanted` turns down are not entered.

    Raises:
      OSError: if a folder cannot be read, saying which and why.
    """
    root = Path(root)
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        relative = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if wanted(relative / name)]
        found += [(relative / name).as_posix() for name in names if wanted(relative / name)]
    return sorted(found)


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
      OSError: if it cannot be read, saying which file and why.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        _unreadable(error)
        raise


def _unreadable(error: OSError) -> None:
    message = f"cannot read {error.filename} ({error.strerror}); correct it or take it out of the source"
    raise OSError(message) from error


def _hash(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def validation_paths(paths: Iterable[str]) -> set[str]:
    """The paths that are held out: those whose hash falls in the lowest tenth.

    It depends on nothing but the path, so a file stays on its side when others come and go, and on every machine.
    The exception are a few files of which all or none would be held out: then it is the one with the lowest hash.
    """
    paths = list(paths)
    limit = int(VALIDATION_SHARE * 2**64)
    held_out = {path for path in paths if int.from_bytes(_hash(path)[:8], "big") < limit}
    if paths and len(held_out) in (0, len(paths)):
        held_out = {min(paths, key=_hash)}
    return held_out
