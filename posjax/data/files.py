"""Files on a disk or in a bucket: which files a folder holds, patterns of their names, and errors that name them."""

import functools
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posjax.storage import is_bucket, with_retries

VALIDATION_SHARE = 0.1
_SPECIAL = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_IGNORED = ("__pycache__", "__MACOSX", "Thumbs.db", "desktop.ini")  # beside all names that begin with a dot
_RUN_FIELDS = {"workdir", "encodings", "seq_length"}  # in the config.json of a workdir, and hardly in another


class File(NamedTuple):
    """Describes a file of a folder.

    Attributes:
      path: path relative to the folder, with "/" as separator.
      size: size in bytes.
      version: text that changes with the content: the time of the last change, or what a bucket has for it.
      id: device and inode, which are the same for two names of one file, or the path in a bucket.
      is_link: whether the last part of the path is a symbolic link.
    """

    path: str
    size: int
    version: str
    id: tuple[Any, ...]
    is_link: bool = False


def shown(path: str | Path) -> str:
    """Returns a path for a message: in one line, with escapes for what a terminal would execute or cannot encode."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(path))


def read_file(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
      OSError: the file cannot be read. The message gives its name and the reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: Exception, path: str | Path | None = None) -> OSError:
    """Returns an error that names a file or folder and the reason why it cannot be read."""
    name = shown(error.filename if isinstance(error, OSError) and path is None else path)
    reason = getattr(error, "strerror", None) or shown(str(error).split("\n")[0]) or type(error).__name__
    return OSError(f"cannot read {name} ({reason}); make it readable or remove it from the source")


def describe(path: Path, name: str, *, is_link: bool = False) -> File:
    """Returns the description of a regular file or of an object in a bucket.

    Raises:
      ValueError: the path is a named pipe, a socket or a device.
      OSError: there is no such file, or its folder cannot be read.
    """
    if is_bucket(path):
        (file,) = _objects(path)
        return file._replace(path=name)
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(error, path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise ValueError(
            f"source must consist of regular files, but {shown(path)} is {kind}; remove it, or leave it out by exclude"
        )
    return File(name, status.st_size, str(status.st_mtime_ns), (status.st_dev, status.st_ino), is_link)


def find_files(
    root: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), left_out: Iterable[Path] = ()
) -> tuple[list[File], list[str]]:
    """Finds the files under a folder, sorted by path. Symbolic links are followed, and each folder is entered once.

    Hidden files and folders, ``__pycache__`` and files that file managers write are ignored.

    Args:
      root: the folder.
      include: patterns, see ``matches``, of which a file must match one; none means all files.
      exclude: patterns of files and folders to leave out.
      left_out: folders that are not entered.

    Returns:
      (files, runs): the files, and the paths of folders that are left out because posjax writes its runs there.

    Raises:
      ValueError: a file is a named pipe, a socket or a device.
      OSError: a folder or a file cannot be read. The message gives its name and the reason.
    """
    if is_bucket(root):
        return _find_objects(root, include, exclude, left_out)
    skipped = {_id(path) for path in left_out if os.path.exists(path)}
    entered = {_id(folder) for folder in root.resolve().parents}  # a link to a folder around the root is a loop
    files, runs = [], []
    folders, links = [""], []  # links come last, so that files keep the paths that they have without links
    while folders or links:
        relative = folders.pop() if folders else links.pop(0)
        if (identity := _id(root / relative)) in entered:
            continue
        entered.add(identity)
        for entry in _entries(root / relative):
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith(".") or entry.name in _IGNORED or any(matches(one, path) for one in exclude):
                continue
            if not os.path.isdir(entry.path):
                if not include or any(matches(one, path) for one in include):
                    files.append(describe(root / path, path, is_link=entry.is_symlink()))
            elif _id(root / path) in skipped or is_run(root / path):
                runs.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    return sorted(files), sorted(runs)


def _find_objects(
    root: Any, include: Sequence[str], exclude: Sequence[str], left_out: Iterable[Path]
) -> tuple[list[File], list[str]]:
    files = _objects(root)
    inside = {path.removeprefix(f"{root}/") for path in map(str, left_out) if path.startswith(f"{root}/")}
    configs = [file.path.removesuffix("/config.json") for file in files if file.path.endswith("/config.json")]
    runs = inside | {folder for folder in configs if is_run(root / folder)}

    def is_wanted(path: str) -> bool:
        names = path.split("/")
        return (
            not any(name.startswith(".") or name in _IGNORED for name in names)
            and not any("/".join(names[:depth]) in runs for depth in range(len(names)))
            and not any(matches(one, path) for one in exclude)
            and (not include or any(matches(one, path) for one in include))
        )

    return sorted(file for file in files if is_wanted(file.path)), sorted(runs)


def _objects(root: Any) -> list[File]:
    """Returns all objects under a path in a bucket, or the object at that path, with one request."""
    import fsspec

    try:
        system, top = fsspec.core.url_to_fs(str(root))
        system.invalidate_cache()
        found = with_retries(system.find, top, detail=True)
    except Exception as error:  # each file system raises its own
        raise unreadable(error, root) from error
    names = ("etag", "ETag", "generation", "mtime", "updated", "LastModified", "created")
    files = []
    for path, info in found.items():
        version = next((str(info[name]) for name in names if info.get(name)), "")
        files.append(File(path.removeprefix(top).lstrip("/"), info["size"], version, (path,)))
    return files


def _id(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(error, path) from error
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(error, folder) from error


def is_run(folder: Path) -> bool:
    """Returns whether a folder is a workdir of posjax, by its config.json."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except Exception:  # there is none, or it is another's; each file system of a bucket raises its own error
        return False
    return isinstance(config, dict) and config.keys() >= _RUN_FIELDS


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a relative path or a folder around it.

    ``*`` and ``?`` stand for characters other than "/", ``[...]`` for one of a set, and ``**`` for any number of folders. As in a
    .gitignore file, a pattern without "/" matches names at any depth, and any other pattern is relative to the root.
    """
    return _regex(pattern).match(path) is not None


@functools.lru_cache(maxsize=256)
def _regex(pattern: str) -> re.Pattern:
    parts = [part for part in pattern.removeprefix("./").strip("/").split("/") if part]
    regex = "" if "/" in pattern.removeprefix("./").rstrip("/") else "(?:.*/)?"
    for number, part in enumerate(parts):
        if part == "**":
            regex += "(?:.+/)?" if number < len(parts) - 1 else ".+"
            continue
        for piece in re.findall(r"\[!?\]?[^\]]*\]|\*+|\?|.", part, re.DOTALL):
            if piece[0] == "[" and len(piece) > 1:
                regex += "[" + re.sub(r"([\\\[^])", r"\\\1", piece[1:-1]).replace("!", "^", piece[1] == "!") + "]"
            else:
                regex += {"*": "[^/]*", "?": "[^/]"}.get(piece[0], re.escape(piece))
        regex += "/" if number < len(parts) - 1 else ""
    return re.compile(f"{regex}(?:/.*)?\\Z", re.DOTALL)
