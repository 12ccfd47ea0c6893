"""Opens the checkpoints of other libraries: a folder with config.json and safetensors files, or a GGUF file.

    checkpoint = open_checkpoint("models/SmolLM2-135M")
    checkpoint.config["hidden_size"]                                  # the keys of config.json
    checkpoint.tensors["model.embed_tokens.weight"].read()            # [V, D]

Opening reads headers only. A tensor of a safetensors file is memory-mapped, so that a part of it can be read without the rest.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from posjax.checks import near
from posjax.files import DamagedFile, read_json

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
INDEX = f"{WEIGHTS}.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{sign}{8 * size}": np.dtype(f"{kind}{size}") for sign, kind in (("I", "i"), ("U", "u")) for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
_LARGEST_HEADER = 100_000_000  # bytes, by the format


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint that has not been read yet.

    Attributes:
      shape: its shape.
      dtype: dtype of the array that ``read`` returns.
      stored: name of the dtype in the file, such as BF16 or Q4_1.
      file: the file that holds it.
      read: returns the array, read-only; that of a safetensors file is memory-mapped.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: str
    file: Path
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another library.

    Attributes:
      path: the folder or the GGUF file.
      config: the keys and values of its config.json; those of a GGUF file are translated into the same keys.
      tensors: its tensors by the names that transformers gives them.
      tokenizer: file of its tokenizer, a tokenizer.json or the GGUF file; None if there is none.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Path | None


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a folder with config.json and safetensors files, in one piece or in shards, or a GGUF file.

    Raises:
      ValueError: there is no such path, it holds no weights that can be read, or a file is damaged or incomplete.
      ImportError: a package that reads GGUF files is not installed.
    """
    folder = Path(os.fspath(path)).expanduser()
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        from posjax.models.pretrained.gguf import open_gguf

        return open_gguf(folder)
    if not folder.is_dir():
        what = "which is another file" if folder.exists() else "which does not exist; models are not downloaded"
        siblings = [str(one) for one in folder.parent.iterdir()] if not folder.exists() and folder.parent.is_dir() else []
        hint = near(str(folder), siblings)
        raise ValueError(f"path must be a folder with {CONFIG} and {WEIGHTS}, or a .gguf file, got {str(path)!r}, {what}{hint}")
    if not (folder / CONFIG).is_file():
        found = sorted(folder.glob("*.gguf"))
        hint = f"; did you mean {str(found[0])!r}?" if found else ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter, which must be merged into its model first, for example by PEFT's merge_and_unload()"
        raise ValueError(f"path must be a folder with {CONFIG}, got {str(path)!r} without one{hint}")
    config = read_json(folder / CONFIG)
    tokenizer = folder / TOKENIZER
    return Checkpoint(folder, config, _tensors_of(folder), tokenizer if tokenizer.is_file() else None)


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder, of one file or of the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    others = [one for one in sorted(folder.glob("*.safetensors")) if not one.name.startswith("adapter")]
    if len(others) == 1:
        return read_header(others[0])
    if others:
        names = ", ".join(one.name for one in others[:3])
        raise ValueError(f"path must be a folder with {WEIGHTS} or {INDEX}, got {str(folder)!r} with {names} and no index of them")
    pickled = sorted(one.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for one in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"path must be a folder with safetensors files, got {str(folder)!r} with {pickled[0]}, a pickle, which can run code "
            "when it is read; load it with transformers and call save_pretrained(folder), which writes safetensors"
        )
    raise ValueError(f"path must be a folder with {WEIGHTS} or {INDEX}, got {str(folder)!r} without either")


def _indexed(index: Path) -> dict[str, Tensor]:
    files = read_json(index, "weight_map")["weight_map"]
    if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
        raise DamagedFile(f"{index} is damaged: its weight_map must hold names of files beside it")
    shards: dict[str, dict[str, Tensor]] = {}
    for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
            raise ValueError(f"{index} names {file}, which does not exist; copy or download all files of the model")
        shards[file] = read_header(index.parent / file)
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{index} places {name} in {file}, which does not hold it; the files are of different models")
    return {name: shards[file][name] for name, file in files.items()}


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, of which only the header is read.

        bytes 0 to 8: the length n of the header, little-endian;  8 to 8 + n: JSON {name: {dtype, shape, data_offsets}};  then data

    Raises:
      DamagedFile: the file is incomplete, or its header is not that of a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            what = f"its header would have {length:,} bytes, the file has {size:,}" if size >= 8 else f"it has {size} bytes"
            raise DamagedFile(f"{path} is no safetensors file, or is incomplete: {what}; copy or download it again")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: its header cannot be read: {error}") from None
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _entry(path, name, entry, 8 + length, size)
        spans.append((*span, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise DamagedFile(f"{path} is damaged: the data of {name} and {other} overlap")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Returns a tensor from its entry in a header, and where its bytes begin and end after the header."""
    try:
        stored, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        stored, shape, begin, end = "", (), -1, -1
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise DamagedFile(f"{path} is damaged: {name} must have a dtype, a shape and data_offsets, got {str(entry)[:100]}")
    if stored not in DTYPES:
        raise ValueError(f"{path}: {name} must have one of the dtypes {', '.join(DTYPES)}, got {stored!r}")
    dtype = DTYPES[stored]
    if end - begin != math.prod(shape) * dtype.itemsize:
        expected = math.prod(shape) * dtype.itemsize
        raise DamagedFile(f"{path} is damaged: {name} of {stored}{list(shape)} must have {expected:,} bytes, got {end - begin:,}")
    if start + end > size:
        raise DamagedFile(
            f"{path} is incomplete: {name} ends at byte {start + end:,}, the file has {size:,}; copy or download it again"
        )

    def read() -> np.ndarray:
        if not math.prod(shape):  # nothing can be mapped
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", start + begin, shape)

    return Tensor(shape, dtype, stored, path, read), (begin, end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of JSON pairs, and raises ValueError if a name occurs twice, which JSON readers otherwise accept."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)} twice")
    return found


def write_tensors(path: Path, entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file, of which one array at a time is in memory.

    Args:
      path: the file, which appears when it is complete.
      entries: dtype and shape of each tensor by name.
      arrays: the tensors in the same order.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without a format
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (dtype, shape), array in zip(entries.values(), arrays, strict=True):
                assert array.shape == shape
                file.write(array.astype(dtype, copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
