"""Opens the checkpoints of other libraries: a folder with config.json and safetensors files, or a GGUF file.

    checkpoint = open_checkpoint("models/SmolLM2-135M")
    checkpoint.config["hidden_size"]                                  # the keys of config.json
    checkpoint.tensors["model.embed_tokens.weight"].read()            # [V, D]

Opening reads headers only. A tensor of a safetensors file is memory-mapped, so that a part of it can be read without the rest.
"""

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from posjax.checks import near, require
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

    Args:
      path: a folder, or a .gguf file.

    Returns:
      The checkpoint. Its tensors are read when they are needed.

    Raises:
      ValueError: there is no such path, it holds no weights that can be read, or a file is damaged or incomplete.
      ImportError: the package that reads such files is not installed.
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

    The package safetensors checks the file. It copies what it reads, so tensors are mapped here: of a mapped tensor, in any layout,
    the part that a device holds can be read without the rest.

    Raises:
      DamagedFile: the file is incomplete, or is no safetensors file.
      ImportError: safetensors is not installed.
    """
    require(path.name, "safetensors", extra="pretrained")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        why = textwrap.shorten(str(error).removeprefix("Error while deserializing header: "), 200)
        raise DamagedFile(f"{path} is damaged or incomplete: {why}; copy or download it again") from None
    with path.open("rb") as file:  # the length of the header, the header, the data
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    """Returns a tensor from its entry in a header, after which the data start."""
    stored, shape = entry["dtype"], tuple(entry["shape"])
    if stored not in DTYPES:
        raise ValueError(f"{path}: {name} must have one of the dtypes {', '.join(DTYPES)}, got {stored!r}")
    dtype = DTYPES[stored]

    def read() -> np.ndarray:
        if not math.prod(shape):  # nothing can be mapped
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", start + entry["data_offsets"][0], shape)

    return Tensor(shape, dtype, stored, path, read)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, which appears when it is complete."""
    require(path.name, "safetensors", extra="pretrained")
    from safetensors.numpy import save_file

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), part, metadata={"format": "pt"})  # transformers reads no file without a format
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
