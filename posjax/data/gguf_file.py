"""The header of a GGUF file: its keys with their values, and where its tensors lie.

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    each key: name, type u32, value;  each tensor: name, number of axes u32, sizes u64, dtype u32, offset u64
    then, from a multiple of general.alignment on, the data

A string is its length as u64 and its bytes. Numbers are little-endian.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from posjax.files import DamagedFile

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # types of values
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_AXES = 4


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Locates a tensor in a file.

    Attributes:
      name: its name.
      shape: its shape, with the axis along which elements are neighbors last.
      dtype: number of its dtype, as in ``gguf.GGMLQuantizationType``.
      offset: of its first byte, from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Holds the keys of a GGUF file with their values, and its tensors by name."""

    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufHeader:
    """Reads the header of a GGUF file.

    Raises:
      DamagedFile: the file is no GGUF file, or its header is incomplete or damaged.
    """
    if path.stat().st_size < 24:
        raise DamagedFile(f"{path} is no GGUF file, or is incomplete: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise DamagedFile(f"{path} is no GGUF file: it must begin with GGUF, got {data[:4]!r}")
        try:
            return _Reader(data).read()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, ValueError) as error:
            is_ours = type(error) is ValueError
            why = str(error) if is_ours else "its header ends too early or is not text"
            raise DamagedFile(f"{path} is damaged or incomplete: {why}; copy or download it again") from None


class _Reader:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def read(self) -> GgufHeader:
        version = self.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version must be 2 or 3 in little-endian order, got {version}")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self.string()
            if name in keys:
                raise ValueError(f"it has the key {name} twice")
            keys[name] = self.value(self.number("I"))
        stored = [self.tensor() for _ in range(num_tensors)]
        names = [one.name for one in stored]
        if len(set(names)) < len(names):
            raise ValueError(f"it has the tensor {next(name for name in names if names.count(name) > 1)} twice")
        alignment = keys.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        return GgufHeader(keys, {one.name: dataclasses.replace(one, offset=start + one.offset) for one in stored})

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        size = self.number("Q")
        self._check(size)
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        kind, size = self.number("I"), self.number("Q")
        if kind not in _NUMBERS:
            self._check(size)
            return [self.value(kind) for _ in range(size)]
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        self._check(size * dtype.itemsize)
        found = np.frombuffer(self.data[self.at : self.at + size * dtype.itemsize], dtype).tolist()
        self.at += size * dtype.itemsize
        return found

    def tensor(self) -> StoredTensor:
        name, axes = self.string(), self.number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name} must have at most {_MOST_AXES} axes, got {axes}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if math.prod(shape) >= 2**63:
            raise ValueError(f"tensor {name} has the shape {list(shape)}")
        return StoredTensor(name, shape, self.number("I"), self.number("Q"))

    def _check(self, size: int) -> None:
        """Raises ValueError if the file has fewer bytes left."""
        if size > len(self.data) - self.at:
            raise ValueError(f"its header has {size:,} more bytes, the file has {len(self.data) - self.at:,}")
