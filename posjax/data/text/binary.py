"""Binary files: what they are, by their first bytes, and the text of a tf.train.Example."""

from collections.abc import Iterator

# First bytes of files, with the place at which they stand, and what the files are. Those that might begin a text count only if the
# file has bytes that no text has.
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"BM", "a BMP image"),
    (0, b"\0\0\1\0", "an icon"),
    (8, b"WAVE", "a WAV recording"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftyp", "an MP4 or HEIC file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"ID3", "an MP3 recording"),
    (0, b"\xff\xfb", "an MP3 recording"),
    (0, b"OggS", "an Ogg recording"),
    (0, b"fLaC", "a FLAC recording"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x9d", "a file compressed by compress"),
    (0, b"\x04\x22\x4d\x18", "a file compressed by LZ4"),
    (0, b"LZIP", "a file compressed by lzip"),
    (0, b"\xff\x06\0\0sNaPpY", "a file compressed by Snappy"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"CDF\x01", "a NetCDF file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"FEA1", "a Feather file"),
    (0, b"ORC", "an ORC file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"PARE", "an encrypted Parquet file"),
    (0, b"\x7fELF", "a program or library (ELF)"),
    (0, b"MZ", "a program or library of Windows"),
    (0, b"\xcf\xfa\xed\xfe", "a program or library of macOS"),
    (0, b"\xca\xfe\xba\xbe", "a Java class, or a program of macOS"),
    (0, b"\0asm", "a WebAssembly module"),
    (0, b"\xde\x12\x04\x95", "a gettext catalogue"),
    (0, b"\0\1\0\0", "a font"),
    (0, b"OTTO", "a font"),
    (0, b"wOF", "a font"),
    (0, b"\xff\xfe\0\0", "text in UTF-32"),
    (0, b"\0\0\xfe\xff", "text in UTF-32"),
    (0, b"\xff\xfe", "text in UTF-16"),
    (0, b"\xfe\xff", "text in UTF-16"),
)
_ZIPS = (  # what the first entries of a ZIP archive say
    (b"/data.pkl", "a PyTorch checkpoint"),
    (b".npy", "an archive of NumPy arrays (.npz)"),
    (b"mimetypeapplication/epub+zip", "an EPUB book"),
    (b"mimetypeapplication/vnd.oasis", "an OpenDocument file"),
    (b"[Content_Types].xml", "a Microsoft Office document"),
    (b"word/", "a Microsoft Office document"),
    (b"META-INF/", "a Java archive"),
)
_SUFFIXES = {  # formats without a signature
    ".tfrecord": "a TFRecord file (posjax reads ArrayRecord)",
    ".pyc": "compiled Python",
    ".msgpack": "a MessagePack file",
    ".npy": "a NumPy array",
    ".pt": "a PyTorch checkpoint",
    ".pth": "a PyTorch checkpoint",
}


def describe(head: bytes, name: str) -> str | None:
    """Returns what a file is in words, such as "a PNG image", or None if its first bytes may be those of a text.

    A file that has bytes which are not text, but of no known kind, also gives None, so that its reader can say where they are.
    """
    is_binary = b"\0" in head or not _may_be_utf8(head)
    for place, magic, what in _MAGIC:
        if head[place : place + len(magic)] == magic and (is_binary or magic == b"%PDF-" or place == 257):
            return what
    if not is_binary:
        return None
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return next((what for mark, what in _ZIPS if mark in head), "a ZIP archive")
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle, as old PyTorch checkpoints are"
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0" and (name.endswith(".safetensors") or b'"dtype"' in head):
        return "a safetensors file"
    return next((what for suffix, what in _SUFFIXES.items() if suffix in name.lower()), None)


def _may_be_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start >= len(head) - 3
    return True


# tf.train.Example ----------------------------------------------------------------------------------------------------


def parse_example(record: bytes) -> dict[str, list[bytes]] | None:
    """Parses a serialized tf.train.Example without TensorFlow.

    Returns:
      For each feature, its byte strings; a feature of numbers has none. None if the record is not an Example.
    """
    # message Example { Features features = 1; }  message Features { map<string, Feature> feature = 1; }
    # message Feature { oneof { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    features = {}
    try:
        for number, features_message in _fields(record):
            if number != 1:
                return None
            for number, entry in _fields(features_message):
                pair = dict(_fields(entry))
                if number != 1 or not pair.keys() <= {1, 2}:
                    return None
                (kind, values), *others = [*_fields(pair.get(2, b"")), (0, b"")]
                if kind not in (0, 1, 2, 3) or len(others) > 1:
                    return None
                features[pair[1].decode()] = [value for _, value in _fields(values)] if kind == 1 else []
    except (IndexError, KeyError, ValueError):
        return None
    return features or None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields number and content of the fields of a protocol buffer, which must all be strings, bytes or messages.

    Raises:
      IndexError, ValueError: the bytes are something else.
    """
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        size, place = _varint(message, place)
        if key & 7 != 2 or key >> 3 == 0 or place + size > len(message):
            raise ValueError("not a field of bytes")
        yield key >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
