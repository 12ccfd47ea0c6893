"""A bucket for tests: an fsspec file system in memory under gs://, which epath opens as it opens Google's, and which may fail.

There is one class, because epath opens the file system of a scheme once per process.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from posjax import storage


class Bucket(MemoryFileSystem):
    """Objects that appear whole, neither appends nor renames of folders, and `failures` of the operations that open or list."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures, rng, failed = 0.0, random.Random(0), 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol("/" + str(path).split("://", 1)[-1].lstrip("/"))

    @classmethod
    def may_fail(cls) -> None:
        if cls.rng.random() < cls.failures:
            cls.failed += 1
            raise ConnectionResetError("the connection was reset")

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), f"a bucket has no mode {mode}"
        self.may_fail()
        return super()._open(path, mode, **options)

    def find(self, *args, **options):
        self.may_fail()
        return super().find(*args, **options)

    def mv(self, *args, **options):
        raise AssertionError("a bucket has no rename")


@contextlib.contextmanager
def empty_bucket() -> Iterator[None]:
    """An empty bucket without failures under gs://, with short delays before operations are tried again."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.store.clear()
    with mock.patch.object(storage, "FIRST_DELAY_S", 0.001):
        yield
    Bucket.failures, Bucket.failed = 0.0, 0
