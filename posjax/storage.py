"""Where a run writes: a folder on a disk, or a bucket (gs://, s3://) through etils.epath and fsspec.

A bucket has neither an atomic rename nor an append, and single requests fail now and then. Files are therefore written to a local
folder first and uploaded whole, each with a few attempts; a file of a bucket is either the old or the new one.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posjax.checks import require

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # with the package that fsspec needs for it
ATTEMPTS = 6
FIRST_DELAY_S = 0.5  # doubled after each attempt: an outage of 15 seconds costs nothing


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path names a bucket rather than a folder."""
    return "://" in os.fspath(path)


def run_path(path: str | os.PathLike) -> Any:
    """Returns a path of a run: a pathlib.Path on a disk, or an etils.epath.Path, which has the same methods, in a bucket.

    Raises:
      ValueError: the path is a URL but not one of a bucket, or the package for that kind of bucket is not installed.
    """
    if not is_bucket(path):
        return Path(path)
    require("a bucket", "etils", "fsspec")
    import fsspec
    from etils import epath

    scheme = os.fspath(path).partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(
            f"a run must be in a folder, or in a bucket as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, got {os.fspath(path)!r}"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = SCHEMES[scheme]
        raise ValueError(f"{os.fspath(path)} cannot be reached without the package {package}; pip install {package}") from None
    return epath.Path(path)


def check_bucket(path: Any) -> None:
    """Checks that a bucket can be written, by writing and removing a small file.

    Raises:
      ValueError: it cannot. The message gives the reason, such as missing credentials.
    """
    if not is_bucket(path):
        return
    probe = path / "posjax-write-test"
    try:
        with_retries(probe.write_text, "", attempts=3)
        with_retries(probe.unlink, missing_ok=True, attempts=3)
    except Exception as error:  # each file system raises its own
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be written: {reason}; check the name of the bucket and your credentials") from error


def with_retries(function: Callable[..., Any], *args: Any, attempts: int = ATTEMPTS, **options: Any) -> Any:
    """Calls a function of a bucket until it succeeds, at most `attempts` times with growing delays; then raises its last error.

    Errors that no repetition cures (a file that does not exist, missing permission) are raised at once.
    """
    for attempt in range(attempts):
        try:
            return function(*args, **options)
        except (FileNotFoundError, PermissionError, NotImplementedError):
            raise
        except Exception:  # each file system raises its own
            if attempt == attempts - 1:
                raise
            time.sleep(FIRST_DELAY_S * 2**attempt * random.uniform(0.5, 1.0))


def files_in(folder: Any) -> dict[str, Any]:
    """Returns {path relative to `folder`: path} of all files in a folder or bucket, in sorted order; {} if it does not exist."""
    found = {}

    def walk(path: Any, prefix: str) -> None:
        for entry in path.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            else:
                found[f"{prefix}{entry.name}"] = entry

    if folder.is_dir():
        walk(folder, "")
    return dict(sorted(found.items()))


def upload(source: Path, target: Any) -> None:
    """Uploads one file, in a few attempts, and checks the size that has arrived."""

    def attempt() -> None:
        with source.open("rb") as file, target.open("wb") as written:
            shutil.copyfileobj(file, written, 2**20)
        if (size := target.stat().length) != (expected := source.stat().st_size):
            raise OSError(f"{target} has {size} bytes after the upload of {expected}")

    with_retries(target.parent.mkdir, parents=True, exist_ok=True)
    with_retries(attempt)


def download(folder: Any, target: Path) -> None:
    """Downloads all files of a folder in a bucket."""

    def fetch(source: Any, path: Path) -> None:
        with source.open("rb") as file, path.open("wb") as written:
            shutil.copyfileobj(file, written, 2**20)

    for name, source in with_retries(files_in, folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with_retries(fetch, source, target / name)


def move(folder: Any, target: Any, last: str = "manifest.json") -> None:
    """Moves a folder to another place on the same disk, or file by file in the same bucket, the file named `last` at the end."""
    if not is_bucket(folder):
        folder.rename(target)
        return
    files = with_retries(files_in, folder)
    for name in sorted(files, key=lambda name: name == last):
        with_retries((target / name).parent.mkdir, parents=True, exist_ok=True)
        with_retries((target / name).write_bytes, with_retries(files[name].read_bytes))
    remove(folder)


def remove(folder: Any) -> None:
    """Removes a folder with all that it holds, if it exists."""
    if is_bucket(folder):
        with_retries(folder.rmtree, missing_ok=True)
    elif folder.is_dir():
        shutil.rmtree(folder)
