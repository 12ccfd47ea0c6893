"""Bytes of files, read in blocks: decompression, UTF-8 checks, lines, and the pieces of documents."""

import bz2
import contextlib
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from posjax.checks import require
from posjax.data.files import shown, unreadable
from posjax.storage import is_bucket, with_retries

BLOCK = 2**20  # bytes read at once
PIECE = 2**24  # most bytes of a piece of a document
_ZSTD_INPUT = 2**13  # a compressed block of 4 bytes may stand for 128 KiB, so this bounds the output of a call to 256 MiB
_SIGNATURES = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # more than the letters, with which a text may begin
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_OPEN = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}


def compression(head: bytes) -> str | None:
    """Returns the compression that the first bytes of a file show: "gzip", "bzip2", "xz", "zstd" or None."""
    return next((name for name, signature in _SIGNATURES.items() if signature.match(head)), None)


def blocks(path: Path, codec: str | None = None, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yields the bytes of a file from ``start`` to ``end`` in blocks, decompressed by ``codec``.

    Raises:
      OSError: the file cannot be read. The message gives its name and the reason.
      ValueError: the compressed data are damaged or end too early.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(with_retries(path.open, "rb") if is_bucket(path) else path.open("rb"))
            if codec is None:
                file.seek(start)
                chunks, place = iter(lambda: file.read(BLOCK), b""), start
            elif codec == "zstd":
                chunks, place = _unzstd(file, path), 0
            else:
                opened = stack.enter_context(_OPEN[codec](file))
                chunks, place = iter(lambda: opened.read(BLOCK), b""), 0
            for chunk in chunks:
                if end is not None and place >= end:
                    return
                inside = chunk[max(start - place, 0) : None if end is None else end - place]
                place += len(chunk)
                if inside:
                    yield inside
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise damaged(path, f"its {codec} data cannot be decompressed: {error}") from error
    except OSError as error:
        if codec == "bzip2" and error.errno is None:
            raise damaged(path, f"its bzip2 data cannot be decompressed: {error}") from error
        raise unreadable(error, path) from error
    except Exception as error:
        if is_bucket(path) and not isinstance(error, ValueError):  # each file system of a bucket raises its own
            raise unreadable(error, path) from error
        raise


def damaged(path: Path, why: str) -> ValueError:
    """Returns an error that names a damaged file."""
    return ValueError(
        f"source must be intact, but {shown(path)} is damaged: {shown(why)}; fetch it again, or leave it out by exclude"
    )


def _unzstd(file, path: Path) -> Iterator[bytes]:
    require(f"reading {shown(path)}", "zstandard")
    import zstandard

    decoder, ended = None, True
    while data := file.read(_ZSTD_INPUT):
        while data:
            decoder = zstandard.ZstdDecompressor().decompressobj() if decoder is None else decoder
            try:
                out = decoder.decompress(data)
            except zstandard.ZstdError as error:
                raise damaged(path, f"its zstd data cannot be decompressed: {error}") from error
            data, ended = (decoder.unused_data, True) if decoder.eof else (b"", False)
            decoder = None if ended else decoder
            if out:
                yield out
    if not ended:
        raise damaged(path, "its zstd data end too early")


def checked(chunks: Iterable[bytes], path: Path, start: int = 0) -> Iterator[bytes]:
    """Yields blocks that are complete UTF-8, and have no zero bytes.

    Args:
      chunks: the blocks.
      path: the file, for messages.
      start: place of the first byte in the file, for messages.

    Raises:
      ValueError: a byte is zero or not UTF-8; the message gives the byte and its place.
    """
    rest = b""
    for chunk in chunks:
        data, rest = rest + chunk if rest else chunk, b""
        place = data.find(b"\0")
        if not data.isascii():
            try:
                data.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":  # a character may continue in the next block
                    data, rest = data[: error.start], data[error.start :]
                else:
                    place = error.start if place < 0 else min(place, error.start)
        if place >= 0:
            raise _not_text(path, data[place], start + place)
        start += len(data)
        if data:
            yield data
    if rest:
        raise _not_text(path, rest[0], start)


def _not_text(path: Path, byte: int, place: int) -> ValueError:
    return ValueError(
        f"source must contain only UTF-8 text, but {shown(path)} has the byte {byte:#04x} at {place}; convert or move the file, or "
        "leave it out by exclude"
    )


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a stream, without their ends."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    if any(parts):
        yield b"".join(parts)


def pieces(chunks: Iterable[bytes], limit: int = PIECE) -> Iterator[bytes]:
    """Yields the pieces of a document, each of at most ``limit`` bytes.

    A piece ends, if there is such a place in its second half, behind a line end between two characters other than spaces; or else
    before the last space, or line end, of several; or else behind any space, or any character. Tokenizers that split text into
    words first, as byte-level BPE does, find the same tokens in the pieces as in the document, except in the last two cases.
    """
    data = bytearray()
    for chunk in chunks:
        data += chunk
        while len(data) > limit:
            border = _border(data, limit)
            yield bytes(data[:border])
            del data[:border]
    if data:
        yield bytes(data)


def _border(data: bytearray, limit: int) -> int:
    low = max(1, limit // 2)
    for separator, behind, is_single in ((b"\n", 1, True), (b" ", 0, False), (b"\n", 0, False)):
        place = data.rfind(separator, low, limit)
        while place >= low:
            if not (data[place + 1 : place + 2].isspace() or (is_single and data[place - 1 : place].isspace())):
                return place + behind
            place = data.rfind(separator, low, place)
    place = max(data.rfind(separator, low, limit) for separator in (b"\n", b" "))
    border = limit if place < 0 else place + 1
    while border > low and data[border] & 0xC0 == 0x80:
        border -= 1
    return border
