"""The source code of the running Python's standard library, as a TFDS data set.

It is real text, available on every machine without a download: about 11 MB in 630 files with Python 3.13. This file
locates the text and depends only on the standard library and `posjax.data.files`. The TFDS builder next to it,
`stdlib_source_dataset_builder.py`, is imported when the data set is built or read.
"""

import hashlib
import platform
import sysconfig
from pathlib import Path

from posjax.data.files import list_files, read_file

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
    found = [path for path in list_files(root, _is_source) if path.endswith(".py")]
    if not found:
        raise ValueError(f"root must contain .py files, got {root}, which has none; pass another folder or source of text")
    return found


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
