"""Text sources: TFDS data sets, including the source code of the standard library, and files and folders.

`open_source` identifies a source and its current state. Text is read only when `documents` is iterated over.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posjax.checks import near, require
from posjax.data.files import VALIDATION_SHARE, File, describe, find_files, is_run, shown, unreadable
from posjax.data.text import formats
from posjax.data.text.splits import Splits, assign_splits, listed, split_names
from posjax.data.text.streams import pieces
from posjax.storage import SCHEMES, is_bucket, run_path, with_retries

SPLITS = ("train", "validation")
TFDS, CORPORA, TOKENIZERS = CACHED = ("tfds", "corpora", "tokenizers")  # folders of the cache
_RULES = "2"  # part of the key of files: change it when other splits, or other texts, come from the same files
Role = Literal["both", "train", "validation"]


@dataclass(frozen=True)
class Text:
    """Represents an open text source.

    Attributes:
      key: text that changes whenever a document or the choice of the splits changes.
      documents: function split -> documents, each an iterable of pieces of at most 16 MiB, whose concatenation is the document.
      splits: names of the splits.
      notes: lines that say how the splits were chosen.
    """

    key: str
    documents: Callable[[str], Iterator[Iterable[bytes]]]
    splits: tuple[str, ...] = SPLITS
    notes: tuple[str, ...] = ()

    def has_split(self, split: str) -> bool:
        return split.partition("[")[0] in self.splits if self.key.startswith("tfds:") else split in self.splits


@dataclass(frozen=True)
class Reading:
    """Describes what is read of a source, and how.

    Attributes:
      role: the split that the source gives, or "both".
      argument: the argument that names the source, for messages.
      taken: ids of files that the other split has.
      include, exclude: patterns of files, see ``files.matches``.
      text_key: the key of JSONL, or column of Parquet, Arrow and ArrayRecord, that holds the text.
      left_out: folders that hold no text: the caches and the workdir.
      workdir: the workdir among them, which must not be the folder of the text itself.
    """

    role: Role = "both"
    argument: str = "source"
    taken: frozenset[tuple[int, int]] = frozenset()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_key: str = "text"
    left_out: tuple[Path, ...] = ()
    workdir: Path | None = None


def open_source(
    source: str,
    cache: Path,
    tfds_dir: Path | None,
    *,
    validation_data: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_key: str = "text",
    workdir: str | Path | None = None,
) -> Text:
    """Opens a source of text.

    Args:
      source: "stdlib", "tfds:NAME", or the path of a file or folder, which may be in a bucket (gs://, s3://).
      cache: folder of the caches, which are not text.
      tfds_dir: folder of TFDS data sets; None for TFDS's default.
      validation_data: another source, for validation; all of ``source`` but its test files is then training text. Empty: none.
      include, exclude: patterns of the files of a folder to read and to leave out.
      text_key: the key of JSONL, or column of Parquet, Arrow and ArrayRecord, that holds the text.
      workdir: folder of a run, which is not text.

    Raises:
      ValueError: the source does not exist, has no text of a split, or is not made of regular files.
      OSError: a folder or file cannot be read.
      ImportError: a package that this source needs is not installed.
    """
    if not text_key:
        raise ValueError("text_key must be the name of a key or column, such as 'text', got ''")
    own = run_path(workdir) if workdir else None
    patterns = {"include": include, "exclude": exclude}
    for name, given in patterns.items():
        if isinstance(given, str) or not all(isinstance(pattern, str) and pattern.strip("/. ") for pattern in given):
            raise ValueError(f"{name} must be a tuple of patterns such as '*.txt' or 'books/**', got {given!r}")
        if given and not any(is_bucket(path) or os.path.isdir(os.path.expanduser(path)) for path in (source, validation_data)):
            raise ValueError(f"{name} must be empty unless a source is a folder, got {given} for {source!r}")
        patterns[name] = tuple(given)
    left_out = (*(cache / name for name in CACHED), *([own] if own else []))
    reading = Reading(**patterns, text_key=text_key, left_out=left_out, workdir=own)
    if not validation_data:  # a blank one is refused below
        return _open(source, cache, tfds_dir, reading)
    validation = _open(validation_data, cache, tfds_dir, replace(reading, role="validation", argument="validation_data"))
    taken = frozenset(file.id for file in validation.files) if isinstance(validation, _Files) else frozenset()
    train = _open(source, cache, tfds_dir, replace(reading, role="train", taken=taken))
    if train.key == validation.key:  # stdlib or a data set of TFDS
        raise ValueError(f"validation_data must be another source than {source!r}, or empty to hold out a part of it")

    def documents(split: str) -> Iterator[Iterable[bytes]]:
        return (validation if split == "validation" else train).documents(split)

    notes = (*train.notes, f"validation: {shown(validation_data)}", *validation.notes)
    return Text(f"{train.key}\nvalidation_data\n{validation.key}", documents, SPLITS, notes)


def _open(source: str, cache: Path, tfds_dir: Path | None, reading: Reading) -> Text:
    """Opens one source for both splits, or for one."""
    if source == "stdlib":
        return _open_stdlib(cache, reading.role)
    if source.startswith("tfds:"):
        return _open_tfds(source, tfds_dir, reading.role)
    path = _existing(source, reading.argument)
    if path.is_dir():
        return _open_folder(path if is_bucket(path) else path.resolve(), reading)
    path = path if is_bucket(path) else Path(os.path.abspath(path))  # a link keeps its name, which may say what the format is
    return _open_files(path.parent, [describe(path, path.name)], f"file:{path}", reading)


def _existing(source: str, argument: str) -> Path:
    """Returns the path of a file or folder that exists.

    Raises:
      ValueError: the path is blank, or there is nothing; the message suggests a neighbour with a similar name.
      OSError: its folder cannot be read.
    """
    hint = ""
    if source.strip():
        if source.partition("://")[0] in SCHEMES:
            return _in_bucket(source, argument)
        path = Path(os.path.expanduser(source))  # leaves "~" where there is no home folder
        try:
            path.stat()
            return path
        except (FileNotFoundError, NotADirectoryError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                hint = near(source, ["stdlib", *(str(path.parent / other.name) for other in path.parent.iterdir())])
        except OSError as error:
            raise unreadable(error, path) from error
    raise ValueError(f"{argument} must be 'stdlib', 'tfds:NAME' or an existing file or folder, got {source!r}{hint}")


def _in_bucket(source: str, argument: str) -> Any:
    path = run_path(source.rstrip("/"))
    try:
        exists = with_retries(path.exists, attempts=3)
    except Exception as error:  # each file system raises its own
        raise unreadable(error, source) from error
    if not exists:
        raise ValueError(f"{argument} must exist, but nothing is in the bucket at {source!r}")
    return path


def _import_tfds():
    require("this source", "tensorflow_datasets", "array_record", "importlib_resources")  # TFDS reads its files with array_record
    import tensorflow_datasets as tfds

    return tfds


def _prepare(make_builder, progress):
    """Prepares a TFDS data set unless it is already prepared, and returns its builder.

    TFDS builds in a temporary folder and renames it. If another process finishes first, its result is used.

    Raises:
      ConnectionError: the data set cannot be downloaded.
    """
    builder = make_builder()
    try:
        with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress), _first_retry_only():
            builder.download_and_prepare()
    except Exception as error:
        builder = make_builder()
        if builder.data_path.exists():
            return builder
        if isinstance(error, OSError) and type(error).__module__.startswith(("requests", "urllib")):
            reason = str(error).split("(Caused by ")[-1].removesuffix(")")
            raise ConnectionError(
                f"the data set {builder.info.full_name} cannot be downloaded: {reason}; check the network and rerun the command, "
                f"or copy a prepared data set to {builder.data_path}"
            ) from error
        raise
    return builder


@contextlib.contextmanager
def _first_retry_only() -> Iterator[None]:
    """Lets through the first of the warnings with which urllib3 repeats a request for minutes."""
    logger, seen = logging.getLogger("urllib3.connectionpool"), []

    def is_first(record: logging.LogRecord) -> bool:
        seen.append(record)
        return len(seen) == 1

    logger.addFilter(is_first)
    try:
        yield
    finally:
        logger.removeFilter(is_first)


def _open_stdlib(cache: Path, role: Role) -> Text:
    from posjax.data.stdlib_source import source_name

    def documents(split: str) -> Iterator[Iterable[bytes]]:
        _import_tfds()
        from posjax.data.stdlib_source.stdlib_source_dataset_builder import Builder

        builder = _prepare(lambda: Builder(data_dir=str(cache / TFDS), file_format="array_record"), io.StringIO())
        for name in SPLITS if role == "train" else (split,):
            for example in builder.as_data_source(split=name):
                yield pieces([example["text"]])

    notes = () if role == "train" else ("validation: one in ten files of the library, chosen by a hash of its path",)
    return Text(f"stdlib:{source_name()}", documents, notes=notes)


def _open_tfds(source: str, data_dir: Path | None, role: Role) -> Text:
    tfds = _import_tfds()
    name, _, feature = source.removeprefix("tfds:").partition(":")
    if feature[:1].isdigit():  # "NAME:1.0.0" is a version
        version, _, feature = feature.partition(":")
        name = f"{name}:{version}"
    where = {"data_dir": str(data_dir / TFDS)} if data_dir else {}

    def make_builder():
        return tfds.builder(name, file_format="array_record", **where)

    try:
        feature = _text_feature(tfds, make_builder(), feature, source)  # checked before anything is downloaded
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        hint = near(name.partition("/")[0], names)
        raise ValueError(f"source must name a TFDS data set, got {source!r}{hint}") from error
    builder = _prepare(make_builder, sys.stderr)
    split_of = {split: split for split in builder.info.splits}
    notes = ()
    if role == "train":  # several splits are read one after the other
        split_of["train"] = "+".join(split for split in SPLITS if split in split_of) or "+".join(split_of)
    elif role == "validation":
        split_of.setdefault("validation", "train")
    elif "validation" not in split_of and "train" in split_of:
        border = f"{round(100 * (1 - VALIDATION_SHARE))}%"
        split_of |= {"train": f"train[:{border}]", "validation": f"train[{border}:]"}
        notes = ("validation: the last tenth of train",)

    def documents(split: str) -> Iterator[Iterable[bytes]]:
        for name in split_of.get(split, split).split("+"):
            for example in builder.as_data_source(split=name):
                yield pieces([bytes(example[feature])])

    return Text(f"tfds:{builder.info.full_name}:{feature}", documents, tuple(split_of), notes)


def _text_feature(tfds, builder, feature: str, source: str) -> str:
    features = builder.info.features
    texts = sorted(name for name in features if isinstance(features[name], tfds.features.Text))
    if feature:
        if feature not in texts:
            raise ValueError(f"source must name one of the text features {texts}, got {source!r}{near(feature, texts)}")
        return feature
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise ValueError(f"source must name one of the text features {texts}, as in 'tfds:NAME:FEATURE', got {source!r}")


# Files and folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files(Text):
    files: tuple[File, ...] = ()  # those that are read in some split
    parts: frozenset[tuple[tuple[Any, ...], str, str]] = frozenset()  # id of a file, split, and part of the file in this split


def check_consistent(texts: Sequence[Text]) -> None:
    """Checks that no file has one split in one source and another split in another, so that a mixture trains on no validation text.

    Raises:
      ValueError: a file has; the message names it.
    """
    for one, other in itertools.combinations([text for text in texts if isinstance(text, _Files)], 2):
        paths = {file.id: file.path for file in (*other.files, *one.files)}
        both = {part[0] for part in one.parts} & {part[0] for part in other.parts}
        if differ := sorted({paths[part[0]] for part in one.parts ^ other.parts if part[0] in both}):
            raise ValueError(
                f"the sources of a mixture must agree on which text is for validation, but {listed(differ)} would be split in two "
                "ways; leave it out of one of them, or pass validation_data"
            )


def _open_folder(folder: Path, reading: Reading) -> Text:
    if str(folder) == str(reading.workdir and reading.workdir.resolve()) or is_run(folder):
        raise ValueError(f"{reading.argument} must be a folder of text, got {str(folder)!r}, which is the workdir of a run")
    files, runs = find_files(folder, include=reading.include, exclude=reading.exclude, left_out=reading.left_out)
    if reading.include and not files:
        raise ValueError(f"include must match files of {str(folder)!r}, got {reading.include}, which match none")
    if not files:
        raise ValueError(f"{reading.argument} must contain text, got {str(folder)!r}, a folder without files")
    text = _open_files(folder, _stored_by_datasets(folder, files), f"folder:{folder}", reading)
    runs = [run for run in runs if run not in CACHED]
    return replace(text, notes=(*text.notes, f"left out: {listed(runs)}, written by posjax")) if runs else text


def _stored_by_datasets(folder: Path, files: list[File]) -> list[File]:
    """Returns the files without those that ``datasets.Dataset.save_to_disk`` does not count among the data, such as caches."""
    paths = {file.path for file in files}
    dropped = set()
    for path in paths:
        parent = path.removesuffix("state.json")
        if path.rpartition("/")[2] != "state.json" or f"{parent}dataset_info.json" not in paths:
            continue
        try:
            state = json.loads((folder / path).read_bytes())
            stored = {parent + one["filename"] for one in state["_data_files"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another program's state.json
        if missing := [one for one in stored - paths if not (folder / one).exists()]:
            name = shown(folder / min(missing))
            raise ValueError(f"source must be intact, but {name} is missing, which {shown(folder / path)} lists")
        dropped |= {one for one in paths - stored if one.startswith(parent) and "/" not in one[len(parent) :]}
    dropped |= {path for path in paths if path.rpartition("/")[2] == "dataset_dict.json" and dropped}
    return [file for file in files if file.path not in dropped]


def _open_files(folder: Path, files: list[File], name: str, reading: Reading) -> _Files:
    files, notes = _once(files, reading.taken)
    path = name.partition(":")[2]
    if reading.taken and not files:
        raise ValueError(f"validation_data must leave files for training, but it has all files of {path!r}")
    splits = assign_splits({file.path: file.size for file in files}, reading.role)
    if reading.role == "both" and not splits.parts["train"]:
        why = f"but all files of {path!r} are named after other splits: {'; '.join(splits.notes)}"
        raise ValueError(f"{reading.argument} must contain training text, {why}")
    ids = {file.path: file.id for file in files}
    used = {path for parts in splits.parts.values() for path, _ in parts}

    def documents(split: str) -> Iterator[Iterable[bytes]]:
        parts = splits.parts[split]
        for path, _ in parts:  # before the first of them is read, which may take hours
            formats.kind_of(folder / path, reading.text_key)
        for path, part in parts:
            yield from formats.documents(folder / path, part, reading.text_key)

    return _Files(
        "\n".join([name, _RULES, reading.role, reading.text_key, *_state(files, splits)]),
        documents,
        tuple(split for split in (*SPLITS, "test") if split in splits.parts),
        (*splits.notes, *notes),
        tuple(file for file in files if file.path in used),
        frozenset((ids[path], split, part) for split, parts in splits.parts.items() for path, part in parts),
    )


def _once(files: list[File], taken: frozenset[tuple[int, int]]) -> tuple[list[File], list[str]]:
    """Returns the files without further names of the same file, so that no text is in two splits, and without ``taken`` files."""
    kept: dict[tuple[int, int], File] = {}
    named = split_names(file.path for file in files)
    order = [*SPLITS, "test", None]
    for file in sorted(files, key=lambda file: (order.index(named[file.path]), file.is_link, file.path)):
        if file.id not in taken:
            kept.setdefault(file.id, file)
    twice = [file.path for file in files if file.id in kept and kept[file.id] != file]
    notes = [f"left out: {listed(twice)}, another name of a file that is read"] if twice else []
    elsewhere = [file.path for file in files if file.id in taken]
    notes += [f"left out: {listed(elsewhere)}, validation text by validation_data"] if elsewhere else []
    return sorted(kept.values()), notes


def _state(files: list[File], splits: Splits) -> Iterator[str]:
    """Yields lines that change with the files and with the choice of splits."""
    state = {file.path: f"{file.size}:{file.version}" for file in files}
    for split, parts in splits.parts.items():
        yield from (f"{split}:{part}:{path}:{state[path]}" for path, part in parts)
