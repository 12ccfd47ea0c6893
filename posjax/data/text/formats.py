"""From a file to documents: text, JSONL, Parquet, Arrow and ArrayRecord, the first two compressed or not.

A format is known by the first bytes of a file and, where these do not say enough, by its name. Nothing is ever held in memory but a
block, a row, or a batch of rows.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posjax.checks import near, require
from posjax.data.files import describe, shown, unreadable
from posjax.data.text import binary, streams
from posjax.data.text.splits import Part
from posjax.storage import is_bucket

_HEAD = 4096  # bytes that a format is known by
_BATCH_ROWS = 64  # rows of Parquet and ArrayRecord that are decoded at once
_ARRAY_RECORD = bytes.fromhex("83af70d10d884a3f0000000000000000")  # the signature of Riegeli, on which ArrayRecord builds
_JSONL = re.compile(r"\.(jsonl|ndjson|jsonlines)([.-]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """Describes how a file is read: its format ("text", "jsonl", "parquet", "arrow" or "array_record") and compression."""

    format: str
    codec: str | None = None


def kind_of(path: Path, text_key: str) -> Kind:
    """Returns how a file is read.

    Args:
      path: the file.
      text_key: a .json file is JSONL if its first line is an object with this key, and text otherwise.

    Raises:
      ValueError: the file is neither text nor a supported format; the message says what it is.
      OSError: the file cannot be read.
    """
    head = _first_bytes(path, None)
    codec = streams.compression(head)
    if codec:
        head = _first_bytes(path, codec)
    stored = _format(path, head, text_key)
    if codec and stored not in ("text", "jsonl"):
        raise ValueError(f"source may compress text and JSONL only, but {shown(path)} is {stored} within {codec}; decompress it")
    return Kind(stored, codec)


def _first_bytes(path: Path, codec: str | None) -> bytes:
    head = b""
    with contextlib.closing(streams.blocks(path, codec)) as chunks:
        for chunk in chunks:
            head += chunk
            if len(head) >= _HEAD:
                break
    return head[: max(_HEAD, head.find(b"\n") + 1)]


def _format(path: Path, head: bytes, text_key: str) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or (head.startswith(b"\xff\xff\xff\xff") and ".arrow" in path.name):
        return "arrow"
    if head.startswith(_ARRAY_RECORD):
        return "array_record"
    if what := binary.describe(head, path.name):
        raise ValueError(
            f"source must contain only text, JSONL, Parquet, Arrow or ArrayRecord, but {shown(path)} is {what}; convert it, or "
            f"leave it out, as by exclude={shown(_pattern(path))!r}"
        )
    if _JSONL.search(path.name):
        return "jsonl"
    if re.search(r"\.json([.-]|$)", path.name, re.IGNORECASE):
        with contextlib.suppress(ValueError, RecursionError):
            first = json.loads(head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0])
            return "jsonl" if isinstance(first, dict) and text_key in first else "text"
    return "text"


def _pattern(path: Path) -> str:
    return f"*{path.suffix}" if path.suffix else path.name


def documents(path: Path, part: Part, text_key: str) -> Iterator[Iterable[bytes]]:
    """Yields the documents of a file, or of a part of it, each in pieces.

    A text file is one document, or two if it gives its last tenth to another split: the border is the first end of a line behind
    nine tenths of the bytes. A file of rows has a document for each row, and its last tenth is counted in rows, at least one. The
    only row of a file is never held out.

    Args:
      path: the file.
      part: "all", "head" (all but the last tenth) or "tail" (the last tenth).
      text_key: the key or column of rows that holds the text.

    Raises:
      ValueError: the file is of no known format, or damaged, or not UTF-8, or lacks the text of a row.
      OSError: the file cannot be read.
      ModuleNotFoundError: a package for this format is not installed.
    """
    kind = kind_of(path, text_key)
    if kind.format == "text":
        start, end = _text_range(path, kind.codec, part)
        if end is None or end > start:
            yield streams.pieces(streams.checked(streams.blocks(path, kind.codec, start, end), path, start))
        if part == "head":  # an error in the last tenth is raised now, and not when training text has been tokenized
            for _ in streams.checked(streams.blocks(path, kind.codec, end), path, end):
                pass
        return
    count, read = _READERS[kind.format](path, kind, text_key)
    start, end = 0, None
    if part != "all":
        rows = count()
        border = rows - max(1, rows // 10) if rows > 1 else rows
        start, end = (0, border) if part == "head" else (border, rows)
    if end is None or end > start:
        for row in read(start, end):
            yield streams.pieces([row])


def _text_range(path: Path, codec: str | None, part: Part) -> tuple[int, int | None]:
    """Returns the first byte of a part of a text file, and the byte behind its last; None is the end of the file."""
    if part == "all":
        return 0, None
    size = describe(path, path.name).size if codec is None else sum(map(len, streams.blocks(path, codec)))
    border = max(1, size * 9 // 10)
    place = border - 1  # of a border at the beginning of a line, where it may stay
    for chunk in streams.blocks(path, codec, place):
        if (line_end := chunk.find(b"\n")) >= 0:
            place += line_end + 1
            border = place if place < size else border
            break
        place += len(chunk)
    characters = b"".join(streams.blocks(path, codec, border, border + 3))
    border += len(characters) - len(characters.lstrip(bytes(range(0x80, 0xC0))))  # do not split a UTF-8 character
    return (0, border) if part == "head" else (border, size)


# Rows ----------------------------------------------------------------------------------------------------------------
# A reader takes (path, kind, text_key) and returns (count, read): count() is the number of rows, read(start, end) their texts.

Reader = Callable[[Path, Kind, str], tuple[Callable[[], int], Callable[[int, int | None], Iterator[bytes]]]]


def _jsonl(path: Path, kind: Kind, text_key: str):
    def numbered() -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(streams.lines(streams.blocks(path, kind.codec)), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line and not line.isspace():
                yield number, line

    def read(start: int, end: int | None) -> Iterator[bytes]:
        for row, (number, line) in enumerate(numbered()):
            if end is not None and row >= end:
                return
            if row >= start:
                yield _text_of_line(line, path, number, text_key)

    return lambda: sum(1 for _ in numbered()), read


def _text_of_line(line: bytes, path: Path, number: int, text_key: str) -> bytes:
    where = f"{shown(path)}, line {number},"
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        byte = f"{line[error.start]:#04x} at {error.start}"
        raise ValueError(f"source must be JSONL in UTF-8, but {where} has the byte {byte}; convert or remove the file") from None
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"source must have a JSON object in each line of JSONL, but {where} is not JSON: {why}") from None
    if not isinstance(row, dict):
        raise ValueError(f"source must have a JSON object in each line of JSONL, but {where} has a {type(row).__name__}")
    if text_key not in row:
        raise ValueError(f"text_key must be a key of every row, but {where} has no {_keys(text_key, row)}")
    if not isinstance(row[text_key], str):
        raise ValueError(f"text_key must be the key of a string, but {text_key!r} in {where} is {_json_type(row[text_key])}")
    try:
        return row[text_key].encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(row[text_key][error.start]):04X}"
        raise ValueError(f"source must contain Unicode text, but {where} has half a surrogate pair, {code}") from None


def _keys(text_key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    return f"{text_key!r}; it has {', '.join(map(repr, keys[:10])) or 'nothing'}{near(text_key, keys)}"


def _json_type(value: object) -> str:
    return {type(None): "null", bool: "a Boolean", int: "a number", float: "a number", list: "a list"}.get(type(value), "an object")


def _parquet(path: Path, kind: Kind, text_key: str):
    require(f"reading {shown(path)}", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _arrow_errors(path), _opened(path) as opened, pq.ParquetFile(opened) as file:
        schema, sizes = file.schema_arrow, [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    _check_column(path, schema, text_key)

    def read(start: int, end: int | None) -> Iterator[bytes]:
        settings = dict(pre_buffer=False, buffer_size=streams.BLOCK)
        with _arrow_errors(path), _opened(path) as opened, pq.ParquetFile(opened, **settings) as file:
            first = 0
            for group, size in enumerate(sizes):
                if first + size > start and (end is None or first < end):
                    place = first
                    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_key]):
                        yield from _strings(pa, path, batch.column(0), place, start, end, text_key)
                        place += batch.num_rows
                first += size

    return lambda: sum(sizes), read


def _arrow(path: Path, kind: Kind, text_key: str):
    require(f"reading {shown(path)}", "pyarrow")
    import pyarrow as pa

    def mapped_or_read(opened: Any) -> Any:
        return pa.memory_map(opened) if isinstance(opened, str) else pa.PythonFile(opened, mode="r")

    @contextlib.contextmanager
    def batches() -> Iterator[tuple[object, Iterable]]:
        with _arrow_errors(path), _opened(path) as opened, mapped_or_read(opened) as mapped:
            if mapped.read(6) == b"ARROW1":
                file = pa.ipc.open_file(mapped)
                yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                mapped.seek(0)
                with pa.ipc.open_stream(mapped) as stream:
                    yield stream.schema, stream

    with batches() as (schema, _):
        _check_column(path, schema, text_key)

    def count() -> int:
        with batches() as (_, found):
            return sum(batch.num_rows for batch in found)

    def read(start: int, end: int | None) -> Iterator[bytes]:
        with batches() as (_, found):
            place = 0
            for batch in found:
                yield from _strings(pa, path, batch.column(text_key), place, start, end, text_key)
                place += batch.num_rows

    return count, read


def _opened(path: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context with what pyarrow opens: the path of a file on a disk, or an open file in a bucket."""
    return path.open("rb") if is_bucket(path) else contextlib.nullcontext(str(path))


def _check_column(path: Path, schema, text_key: str) -> None:
    import pyarrow as pa

    if text_key not in schema.names:
        raise ValueError(f"text_key must be a column of {shown(path)}, which has no {_keys(text_key, schema.names)}")
    found = schema.field(text_key).type
    found = found.value_type if pa.types.is_dictionary(found) else found
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_text(found) for is_text in texts):
        raise ValueError(f"text_key must be a column of strings, but {text_key!r} in {shown(path)} has the type {found}")


def _strings(pa, path: Path, column, place: int, start: int, end: int | None, text_key: str) -> Iterator[bytes]:
    """Yields the texts of the rows from ``start`` to ``end`` in a column whose first row is number ``place``."""
    column.validate(full=True)  # damaged offsets would lead outside of the memory
    low, high = max(start - place, 0), len(column) if end is None else min(end - place, len(column))
    for row in range(low, high):
        value = column[row].as_py()
        if value is None:
            raise ValueError(
                f"text_key must be a column of strings, but {text_key!r} is null in row {place + row} of {shown(path)}"
            )
        yield value.encode()


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise streams.damaged(path, str(error).splitlines()[0]) from error
    except UnicodeDecodeError as error:
        raise streams.damaged(path, f"a text is not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise (unreadable if error.errno else lambda e, p: streams.damaged(p, str(e).splitlines()[0]))(error, path) from error


def _array_record(path: Path, kind: Kind, text_key: str):
    require(f"reading {shown(path)}", "array_record")
    if is_bucket(path):
        raise ValueError(f"source must be on a disk if it is ArrayRecord, got {shown(path)}; copy it")
    from array_record.python.array_record_module import ArrayRecordReader

    @contextlib.contextmanager
    def opened() -> Iterator[ArrayRecordReader]:
        reader = ArrayRecordReader(str(path))
        try:
            if not reader.ok():
                raise streams.damaged(path, "it has no valid index of records")
            yield reader
        except RuntimeError as error:
            raise streams.damaged(path, str(error).splitlines()[0]) from error
        finally:
            with contextlib.suppress(RuntimeError):
                reader.close()

    def count() -> int:
        with opened() as reader:
            return reader.num_records()

    def read(start: int, end: int | None) -> Iterator[bytes]:
        with opened() as reader:
            end = reader.num_records() if end is None else end
            for first in range(start, end, _BATCH_ROWS):
                for number, record in enumerate(reader.read(first, min(first + _BATCH_ROWS, end)), first):
                    yield _text_of_record(record, path, number, text_key)

    return count, read


def _text_of_record(record: bytes, path: Path, number: int, text_key: str) -> bytes:
    """Returns a record itself, or the text of a tf.train.Example."""
    features = binary.parse_example(record)
    where = f"record {number} of {shown(path)}"
    if features is None:
        text = record
    elif text_key not in features:
        raise ValueError(f"text_key must be a feature of every record, but {where} has no {_keys(text_key, features)}")
    elif len(features[text_key]) != 1:
        raise ValueError(f"text_key must be a feature of one string, but {text_key!r} in {where} has {len(features[text_key])}")
    else:
        (text,) = features[text_key]
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source must contain only UTF-8 text, but {where} has the byte {text[error.start]:#04x} at {error.start}"
        ) from None
    return text


_READERS: dict[str, Reader] = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow, "array_record": _array_record}
