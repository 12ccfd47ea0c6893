"""The source code of the running Python's standard library, as a TFDS data set.

It is real text, available on every machine without a download: about 11 MB in 630 files with Python 3.13. This file
locates the text and depends only on the standard library and `posjax.data.files`. The TFDS builder next to it,
`stdlib_source_dataset_builder.py`, is imported when the data set is built or read.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from posjax.data.files import VALIDATION_SHARE, read_file, unreadable

# Installed packages, tests and build configuration are not part of the standard library's source.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}


def _is_source(path: Path) -> bool:
    if path.name in LEFT_OUT or path.name.startswith(("config-", "_sysconfigdata", ".")):
        return False
    return path.suffix in (".py", "")  # no suffix: a folder; source_files drops files without one


def stdlib_root() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: str | Path | None = None) -> list[str]:
    """Returns the sorted paths of the .py files under `root` (default: the standard library), relative to it.

    Raises:
      ValueError: there are no .py files.
    """
    root = stdlib_root() if root is None else Path(root)
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        relative = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if _is_source(relative / name)]
        found += [(relative / name).as_posix() for name in names if name.endswith(".py") and _is_source(relative / name)]
    if not found:
        raise ValueError(f"root must contain .py files, got {root}, which has none; pass another folder or source of text")
    return sorted(found)


def _raise_unreadable(error: OSError) -> None:
    raise unreadable(error) from error


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


def _hash(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def source_name(root: str | Path | None = None) -> str:
    """Returns a name such as "cpython-3.13.0-1a2b3c4d5e6f", which is unique to the Python version and the text."""
    root = stdlib_root() if root is None else Path(root)
    digest = hashlib.sha256()
    for path in source_files(root):
        text = read_file(root / path)
        digest.update(f"{path}\0{len(text)}\0".encode())
        digest.update(text)
    python = f"{platform.python_implementation()}-{platform.python_version()}".lower()
    return f"{python.replace('+', '')}-{digest.hexdigest()[:12]}"
