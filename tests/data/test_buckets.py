"""Data in a bucket."""

import json

import fsspec
import pytest
from bucket import Bucket, empty_bucket

from posjax import storage
from posjax.data import load_corpus
from posjax.data.files import find_files
from posjax.data.sources import open_source

TEXTS = [f"document {i}\n" * 9 for i in range(40)]


@pytest.fixture
def bucket():
    with empty_bucket():
        yield fsspec.filesystem("gs")


def read(source, tmp_path, **options):
    text = open_source(source, tmp_path / "cache", None, **options)
    return [[b"".join(document).decode() for document in text.documents(split)] for split in ("train", "validation")]


def test_formats_in_a_bucket(bucket, tmp_path):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = pa.table({"text": TEXTS})
    bucket.pipe("b/a.txt", "".join(TEXTS).encode())
    bucket.pipe("b/a.jsonl", rows)
    bucket.pipe("b/a.jsonl.gz", gzip.compress(rows))
    with bucket.open("b/a.parquet", "wb") as file:
        pq.write_table(table, file)
    with bucket.open("b/a.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"):
        assert read(f"gs://b/{name}", tmp_path) == [TEXTS[:36], TEXTS[36:]], name
    (train,), (validation,) = read("gs://b/a.txt", tmp_path)
    assert train + validation == "".join(TEXTS) and 0.08 < len(validation) / len(train) < 0.12
    assert load_corpus("gs://b/a.parquet", data_dir=tmp_path / "cache").num_documents == 36


def test_a_folder_in_a_bucket(bucket, tmp_path):
    files = {"train/a.txt": "a", "train/b.md": "b", "valid/a.txt": "c", "test/a.txt": "d", ".git/x": "\xff", "train/.x": "\xff"}
    files |= {"run/metrics.jsonl": "{}", "run/config.json": '{"workdir": "", "seq_length": 1, "encodings": []}'}
    for name, text in files.items():
        bucket.pipe(f"b/data/{name}", text.encode("latin-1"))
    assert read("gs://b/data/", tmp_path) == [["a", "b"], ["c"]]
    assert read("gs://b/data", tmp_path, exclude=("*.md",)) == [["a"], ["c"]]
    assert read("gs://b/data", tmp_path, include=("a.txt",), validation_data="gs://b/data/test") == [["a", "c"], ["d"]]
    files, runs = find_files(storage.run_path("gs://b/data"), left_out=[storage.run_path("gs://b/data/valid")])
    assert [file.path for file in files] == ["test/a.txt", "train/a.txt", "train/b.md"] and runs == ["run", "valid"]
    key = open_source("gs://b/data", tmp_path, None).key
    bucket.pipe("b/data/train/a.txt", b"A")
    assert open_source("gs://b/data", tmp_path, None).key != key


def test_what_is_not_there_is_named(bucket, tmp_path):
    with pytest.raises(ValueError, match="source must exist, but nothing is in the bucket at 'gs://b/gone'"):
        read("gs://b/gone", tmp_path)
    bucket.pipe("b/a.txt", b"text")
    Bucket.failures = 1.0
    with pytest.raises(OSError, match=r"cannot read gs://b/a\.txt \(the connection was reset\)"):
        read("gs://b/a.txt", tmp_path)
