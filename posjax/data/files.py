"""Listing and reading of text files on disk, and selection of the files held out for validation."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

VALIDATION_SHARE = 0.1


def list_files(root: str | Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Returns the sorted paths of the files under `root`, relative to it, with "/" as separator.

    Args:
      root: folder to search.
      wanted: predicate on a relative path. Files that it rejects are left out; folders that it rejects are not entered.

    Raises:
      OSError: a folder cannot be read. The message gives its name and the reason.
    """
    root = Path(root)
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        relative = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if wanted(relative / name)]
        found += [(relative / name).as_posix() for name in names if wanted(relative / name)]
    return sorted(found)


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
      OSError: the file cannot be read. The message gives its name and the reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        _unreadable(error)
        raise


def _unreadable(error: OSError) -> None:
    message = f"cannot read {error.filename} ({error.strerror}); make it readable or remove it from the source"
    raise OSError(message) from error


def _hash(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def validation_paths(paths: Iterable[str]) -> set[str]:
    """Returns the paths held out for validation: those whose hash falls in the lowest tenth.

    The hash depends only on the path, so a file is in the same split on every machine, whatever files are added or removed. If this
    would hold out all or none of the files, as can happen with few files, the file with the lowest hash is held out instead.
    """
    paths = list(paths)
    limit = int(VALIDATION_SHARE * 2**64)
    held_out = {path for path in paths if int.from_bytes(_hash(path)[:8], "big") < limit}
    if paths and len(held_out) in (0, len(paths)):
        held_out = {min(paths, key=_hash)}
    return held_out
