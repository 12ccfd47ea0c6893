"""Every format of text on small real files, written by the libraries that define the formats."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from posjax.data import load_corpus
from posjax.data.text import formats, streams

pa = pytest.importorskip("pyarrow")
TEXTS = [f"document {i}: " + "café ✓ 日本\n" * (i % 7) for i in range(40)]


def read(path, part="all", text_key="text"):
    return [b"".join(document).decode() for document in formats.documents(path, part, text_key)]


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()


def compress(codec, data):
    if codec == "zst":
        import zstandard

        return zstandard.compress(data)
    return {"gz": gzip, "bz2": bz2, "xz": lzma}[codec].compress(data)


def write_arrow(folder, texts, shards=1, key="text", split=None):
    """Writes a folder as ``datasets.Dataset.save_to_disk`` of version 4 lays it out."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for name, part in zip(names, np.array_split(texts, shards), strict=True):
        table = pa.table({key: part.tolist(), "id": list(range(len(part)))})
        with (folder / name).open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    (folder / "dataset_info.json").write_text(
        json.dumps({"citation": "", "features": {key: {"dtype": "string", "_type": "Value"}}})
    )
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_type": None, "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def field(number, content):
    """A field of a protocol buffer that holds bytes."""
    size, low = b"", len(content)
    while low >= 0x80:
        size, low = size + bytes([low & 0x7F | 0x80]), low >> 7
    return bytes([number << 3 | 2]) + size + bytes([low]) + content


def example(text, key="text"):
    """A tf.train.Example with a text, a list of integers and a list of floats."""
    features = {
        key: field(1, field(1, text.encode())),
        "id": field(3, field(1, b"\x96\x01")),
        "x": field(2, field(1, b"\0\0\x80\x3f")),
    }
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()))


@pytest.fixture(params=["text", "jsonl", "ndjson", "json", "parquet", "arrow", "arrow file", "array_record", "examples"])
def stored(request, tmp_path):
    """A file of TEXTS in each format; a text file holds all of them as one document."""
    if request.param == "text":
        path = tmp_path / "a.txt"
        path.write_text("".join(TEXTS))
    elif request.param in ("jsonl", "ndjson", "json"):
        path = tmp_path / f"a.{request.param}"
        path.write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS).replace(b"\n", b"\r\n\n"))
    elif request.param == "parquet":
        import pyarrow.parquet as pq

        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": pa.array(TEXTS).dictionary_encode()}), path, row_group_size=7)
    elif request.param == "arrow":
        path = write_arrow(tmp_path / "set", TEXTS) / "data-00000-of-00001.arrow"
    elif request.param == "arrow file":
        path, table = tmp_path / "a.feather", pa.table({"text": pa.array(TEXTS, pa.large_string())})
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=9)
    else:
        records = [example(text) if request.param == "examples" else text.encode() for text in TEXTS]
        path = write_array_record(tmp_path / "a.array_record-00000-of-00001", records)
    return path


def test_a_format_round_trips(stored):
    found, head, tail = (read(stored, part) for part in ("all", "head", "tail"))
    if len(found) == 1:
        assert found == ["".join(TEXTS)] == [head[0] + tail[0]]
        assert 0.9 <= len(head[0].encode()) / len(found[0].encode()) < 0.95 and head[0].endswith("\n")
    else:
        assert (found, head, tail) == (TEXTS, TEXTS[:36], TEXTS[36:])
    splits = [load_corpus(stored, split, data_dir=stored.parent / "cache") for split in ("train", "validation")]
    assert "".join(corpus.decode(corpus.tokens) for corpus in splits) == "".join(TEXTS)
    assert [corpus.num_documents for corpus in splits] == [len(head), len(tail)]


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "unnamed"])
def test_compressed_files(tmp_path, codec, name):
    plain = jsonl(TEXTS) if name == "a.jsonl" else "".join(TEXTS).encode()
    path = tmp_path / (name if name == "unnamed" else f"{name}.{codec}")
    path.write_bytes(compress(codec, plain[:700]) + compress(codec, plain[700:]))  # two streams are one file
    (tmp_path / name.replace("unnamed", "plain")).write_bytes(plain)
    for part in ("all", "head", "tail"):
        assert read(path, part) == read(tmp_path / name.replace("unnamed", "plain"), part)
    for data, why in ((compress(codec, plain)[:-7], ""), (compress(codec, plain)[:20] + b"damaged" * 9, "")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"source must be intact, but .*{path.name} is damaged: its .* data {why}"):
            read(path)


def test_data_sets_that_were_saved_to_disk(tmp_path):
    one = write_arrow(tmp_path / "one", TEXTS, shards=2)
    (one / "cache-0123.arrow").write_bytes(b"left by datasets.map")
    corpora = [load_corpus(one, split, data_dir=tmp_path / "cache") for split in ("train", "validation")]
    assert [corpus.num_documents for corpus in corpora] == [36, 4]
    both = tmp_path / "both"
    for split, texts in (("train", TEXTS[:30]), ("validation", TEXTS[30:35]), ("test", TEXTS[35:])):
        write_arrow(both / split, texts, key="body", split=split)
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    corpora = [load_corpus(both, split, data_dir=tmp_path / "cache", text_key="body") for split in ("train", "validation", "test")]
    assert [corpus.num_documents for corpus in corpora] == [30, 5, 5]
    assert corpora[1].decode(corpora[1].tokens) == "".join(TEXTS[30:35])
    (one / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002\.arrow is missing, which .*state\.json lists"):
        load_corpus(one, data_dir=tmp_path / "cache")


def test_a_card_beside_a_data_set_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "README.md").write_text("a data set")
    corpus = load_corpus(tmp_path, data_dir=tmp_path / "cache")
    assert corpus.num_documents == 36 and "left out: README.md, which describes the data set" in corpus.notes


def test_json_that_is_no_jsonl_is_text(tmp_path):
    for content in ('{"text": "a"}\n', '{\n "text": "a"\n}\n', '{"name": "a"}\n', "[1,\n2]\n"):
        (tmp_path / "a.json").write_text(content)
        assert read(tmp_path / "a.json") == (["a"] if content.startswith('{"text') else [content])


# streams


def cut(text, limit):
    chunks = [text[i : i + 7] for i in range(0, len(text), 7)]
    return list(streams.pieces(chunks, limit))


@pytest.mark.parametrize("limit", [16, 37, 100])
def test_pieces_join_to_the_document_and_end_where_words_do(limit):
    generator = random.Random(limit)
    words = ["word", "  indented", "\n", "\n\n", " ", "\r\n", "日本語", "x" * 3, ".\nNext", "\n    block"]
    for _ in range(50):
        text = "".join(generator.choices(words, k=60)).encode()
        found = cut(text, limit)
        assert b"".join(found) == text and all(0 < len(piece) <= limit and piece.decode() for piece in found)
    assert cut(b"aaaaaaaa\nbbbb\n  cc dddd", 16) == [b"aaaaaaaa\n", b"bbbb\n  cc dddd"]  # not before an indented line
    assert cut("日".encode() * 10, 16) == ["日".encode() * 5] * 2


def test_tokens_of_pieces_are_the_tokens_of_the_document():
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    generator = random.Random(0)
    words = ["word", " word", "  in", "\n", "\n\n", ".", " 12", "'s", "日本", "\n    if x:"]
    for _ in range(50):
        text = "".join(generator.choices(words, k=400))
        pieces = [piece.decode() for piece in cut(text.encode(), 150)]
        assert len(pieces) > 5
        assert [word for piece in pieces for word, _ in split(piece)] == [word for word, _ in split(text)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_utf_8_is_checked_across_blocks(tmp_path, size):
    def check(data):
        return b"".join(streams.checked((data[i : i + size] for i in range(0, len(data), size)), tmp_path / "a", start=100))

    text = "aé✓日🎉".encode()
    assert check(text) == text
    for data, byte, place in (
        (text + b"\xff", 0xFF, 113),
        (text[:-1], 0xF0, 109),
        (b"ab\xe2\x28\xa1", 0xE2, 102),
        (b"ab\0", 0, 102),
    ):
        with pytest.raises(ValueError, match=f"only UTF-8 text, but .*a has the byte {byte:#04x} at {place};"):
            check(data)


def test_lines_are_those_of_the_text():
    text = b"one\n\ntwo\nthree" * 20
    for size in (1, 4, 1000):
        assert list(streams.lines(text[i : i + size] for i in range(0, len(text), size))) == text.split(b"\n")


def test_an_error_in_the_last_tenth_comes_with_the_training_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 100 + b"\xff")
    with pytest.raises(ValueError, match="byte 0xff at 500"):
        read(tmp_path / "a.txt", "head")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_large_text_comes_in_pieces(tmp_path, name):
    line = "".join(random.Random(0).choices("abcdefgh ", k=999)) + "\n"
    path = tmp_path / name
    if name == "a.parquet":
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [line * 100] * 400}), path, compression="zstd", use_dictionary=False)
    else:
        data = (line * 40_000).encode()
        path.write_bytes(data if name == "a.txt" else compress(name.rpartition(".")[2], data))
    most = total = 0
    for piece in itertools.chain.from_iterable(formats.documents(path, "all", "text")):
        total, most = total + len(piece), max(most, len(piece))
    assert total == 40_000_000 and most <= 2**24


# what is not read


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return data.getvalue()


def saved(save, *args):
    data = io.BytesIO()
    save(data, *args)
    return data.getvalue()


BINARIES = {
    "a PNG image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a JPEG image": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "a PDF document": b"%PDF-1.4\n",
    "a ZIP archive": zipped(**{"a.txt": "text"}),
    "a PyTorch checkpoint": zipped(**{"model/data.pkl": b"\x80\x02}"}),
    "a Microsoft Office document": zipped(**{"[Content_Types].xml": "<?xml"}),
    "a tar archive": tarred(),
    "a NumPy array": saved(np.save, np.arange(3)),
    "an archive of NumPy arrays": saved(np.savez, np.arange(3)),
    "a safetensors file": (64).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(14),
    "a GGUF model": b"GGUF\x03\0\0\0",
    "a Python pickle": b"\x80\x04\x95\0\0",
    "an SQLite database": b"SQLite format 3\0",
    "a program or library": b"\x7fELF\x02\x01\x01\0",
    "text in UTF-16": "text".encode("utf-16"),
    "a tar archive within gzip": gzip.compress(tarred()),
}


@pytest.mark.parametrize("what", BINARIES)
def test_a_binary_file_is_named_as_what_it_is(tmp_path, what):
    path = tmp_path / "a.dat"
    path.write_bytes(BINARIES[what])
    with pytest.raises(ValueError, match=rf"a\.dat is {what.partition(' within')[0]}.*exclude"):
        read(path)


@pytest.mark.parametrize("text", ["BM is a word", "GIF8 and MZ", "Rar!", "PK\3\4", "OggS", "ID3 tags", "ORC and human"])
def test_a_text_that_begins_like_a_binary_file_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "a JSON object in each line of JSONL, but .*a.jsonl, line 3, is not JSON: Expecting property name"),
        (b"[1]", "a JSON object in each line of JSONL, but .*a.jsonl, line 3, has a list"),
        (b'{"txt": "a", "id": 1}', "a key of every row, but .*, line 3, has no 'text'; it has 'txt', 'id'; did you mean 'txt'"),
        (b'{"text": null}', "text_key must be the key of a string, but 'text' in .*a.jsonl, line 3, is null"),
        (b'{"text": ["a"]}', "'text' in .*a.jsonl, line 3, is a list"),
        (b'{"text": "\xff"}', "JSONL in UTF-8, but .*a.jsonl, line 3, has the byte 0xff at 10"),
        (b'{"text": "\\ud800"}', r"a.jsonl, line 3, has half a surrogate pair, U\+D800"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl")


def test_a_bad_column_is_named(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"txt": ["a", None], "id": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, which has no 'text'; it has 'txt', 'id'; did you mean 'txt'"):
        read(path)
    with pytest.raises(ValueError, match=r"must be a column of strings, but 'id' in .* has the type int64"):
        read(path, text_key="id")
    with pytest.raises(ValueError, match=r"'txt' is null in row 1 of .*a\.parquet"):
        read(path, text_key="txt")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: "):
        read(path)
    folder = write_arrow(tmp_path / "set", TEXTS)
    path = folder / "data-00000-of-00001.arrow"
    with pytest.raises(ValueError, match="which has no 'body'; it has 'text', 'id'"):
        read(path, text_key="body")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"\.arrow is damaged: "):
        read(path)


def test_a_bad_record_is_named(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [example("a"), example("b", "body")])
    with pytest.raises(ValueError, match=r"record 1 of .*a\.array_record has no 'text'; it has 'body', 'id', 'x'"):
        read(path)
    with pytest.raises(ValueError, match=r"'id' in record 0 of .* has 0"):
        read(path, text_key="id")
    write_array_record(path, [b"good", b"\xff"])
    with pytest.raises(ValueError, match=r"only UTF-8 text, but record 1 of .* has the byte 0xff at 0"):
        read(path)
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(ValueError, match=r"a\.array_record is damaged"):
        read(path)


@pytest.mark.parametrize("package", ["zstandard", "pyarrow", "array_record"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    name = {"zstandard": "a.zst", "pyarrow": "a.parquet", "array_record": "a.array_record"}[package]
    if package == "array_record":
        write_array_record(tmp_path / name, [b"text"])
    else:
        (tmp_path / name).write_bytes(compress("zst", b"text") if package == "zstandard" else b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"reading .*{name} needs {package}: pip install 'posjax\[lab\]'"):
        read(tmp_path / name)
