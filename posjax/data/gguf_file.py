"""GGUF files, read by the package gguf: keys with their values, and tensors that are memory-mapped."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posjax.checks import require
from posjax.files import DamagedFile

if TYPE_CHECKING:
    import gguf


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Holds the keys of a GGUF file with their values, and its tensors by name."""

    keys: dict[str, Any]
    tensors: "dict[str, gguf.ReaderTensor]"


def read_gguf(path: Path) -> GgufFile:
    """Reads the keys of a GGUF file, and maps its tensors.

    Raises:
      DamagedFile: the file is no GGUF file, or is incomplete or damaged.
      ImportError: gguf is not installed.
    """
    require("a .gguf file", "gguf", extra="pretrained")
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a model and its tokenizer are read one after the other; a vocabulary takes seconds
def _read(path: Path, size: int, modified: int) -> GgufFile:
    import gguf

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise DamagedFile(f"{path} is no GGUF file: it must begin with GGUF, got {magic!r}")
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError) as error:  # an index is out of range where a file ends too early
        raise DamagedFile(f"{path} is damaged or incomplete: {error.args[0]}; copy or download it again") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path} must be a GGUF file in the byte order of this machine, got the other one")
    return GgufFile(keys, {tensor.name: tensor for tensor in reader.tensors})
