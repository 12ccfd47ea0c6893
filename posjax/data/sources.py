"""Text sources: TFDS data sets, including the source code of the standard library, and files and folders.

`open_source` identifies a source and its current state. Text is read only when `documents` is iterated over.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posjax.checks import near, require
from posjax.data.files import VALIDATION_SHARE, list_files, read_file, validation_paths

SPLITS = ("train", "validation")
TFDS, CORPORA, TOKENIZERS = CACHED = ("tfds", "corpora", "tokenizers")  # folders of the cache


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
    if source == "stdlib":
        return _open_stdlib(cache)
    if source.startswith("tfds:"):
        return _open_tfds(source, tfds_dir)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path.resolve(), cache.resolve())
    if path.is_file():
        return _open_file(path.resolve())
    siblings = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = near(source, ["stdlib", *siblings])
    raise ValueError(f"source must be 'stdlib', 'tfds:NAME' or an existing file or folder, got {source!r}{hint}")


def _import_tfds():
    require("this source", "tensorflow_datasets", "array_record", "importlib_resources")  # TFDS reads its files with array_record
    import tensorflow_datasets as tfds

    return tfds


def _prepare(make_builder, progress):
    """Prepares a TFDS data set unless it is already prepared, and returns its builder.

    TFDS builds in a temporary folder and renames it. If another process finishes first, its result is used.
    """
    builder = make_builder()
    try:
        with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress):
            builder.download_and_prepare()
    except Exception:
        builder = make_builder()
        if not builder.data_path.exists():
            raise
    return builder


def _open_stdlib(cache: Path) -> Text:
    from posjax.data.stdlib_source import source_name

    def documents(split):
        _import_tfds()
        from posjax.data.stdlib_source.stdlib_source_dataset_builder import Builder

        builder = _prepare(lambda: Builder(data_dir=str(cache / TFDS), file_format="array_record"), io.StringIO())
        for example in builder.as_data_source(split=split):
            yield [example["text"]]

    return Text(f"stdlib:{source_name()}", documents)


def _open_tfds(source: str, data_dir: Path | None) -> Text:
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
    if "validation" not in split_of and "train" in split_of:
        border = f"{round(100 * (1 - VALIDATION_SHARE))}%"
        split_of |= {"train": f"train[:{border}]", "validation": f"train[{border}:]"}

    def documents(split):
        for example in builder.as_data_source(split=split_of.get(split, split)):
            yield [bytes(example[feature])]

    return Text(f"tfds:{builder.info.full_name}:{feature}", documents, tuple(split_of))


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


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _read_text(path: Path) -> bytes:
    data = read_file(path)
    try:
        data.decode()
        place = data.find(b"\0")
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        raise ValueError(
            f"source must contain only UTF-8 text, but {path} has the byte {data[place]:#04x} at {place}; convert or move the file"
        )
    return data


def _open_folder(folder: Path, cache: Path) -> Text:
    cached = {cache / name for name in CACHED}  # excluded, because the cache may be inside the folder, or be the folder itself
    paths = list_files(folder, lambda path: not path.name.startswith(".") and folder / path not in cached)
    if len(paths) == 1:
        return _open_file(folder / paths[0])
    held_out = validation_paths(paths)
    state = [f"{path}:{_state(folder / path) if (folder / path).exists() else ''}" for path in paths]

    def documents(split):
        for path in paths:
            if (path in held_out) == (split == "validation"):
                yield [_read_text(folder / path)]

    return Text("\n".join([f"folder:{folder}", *state]), documents)


def _open_file(path: Path) -> Text:
    def documents(split):
        data = _read_text(path)
        border = int(len(data) * (1 - VALIDATION_SHARE))
        line_end = data.find(b"\n", border) + 1
        border = line_end if 0 < line_end < len(data) else border
        while 0 < border < len(data) and data[border] & 0xC0 == 0x80:
            border += 1  # do not split a UTF-8 character
        yield [data[border:] if split == "validation" else data[:border]]

    return Text(f"file:{path}:{_state(path)}", documents)
