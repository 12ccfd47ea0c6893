"""Corpora of tokens: files of token ids that another program wrote, read in place.

    tokens.npy                 one file: the last tenth is held out, by document where documents are known
    folder/train.bin, val.bin  a folder with one file for each split

A .npy file is an array of integers, [n], or [documents, n] with one document per row. A .bin file holds uint16 or uint32 without a
header, as nanoGPT writes it, or begins with the header of llm.c. The places where documents begin are in NAME.offsets.npy beside
the file, integers [documents] or [documents + 1], or in NAME.idx, an index of Megatron-LM. Without either, a split is one document.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posjax.checks import near
from posjax.data.files import VALIDATION_SHARE
from posjax.data.tokenizers import num_ids, token_table
from posjax.progress import progress

SUFFIXES = (".npy", ".bin")
_NAMES = {"train": ("train",), "validation": ("val", "valid", "validation", "dev"), "test": ("test",)}
_LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # (magic, version) of its headers, 256 int32
_MEGATRON = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK = 2**22  # tokens that are read at once
_SAMPLE = 2**16  # bytes by which the kind of a .bin file is recognized
_ALL, _HEAD, _TAIL = "all", "head", "tail"


@dataclass(frozen=True)
class TokenFiles:
    """Represents an open source of tokens, as ``sources.Text`` represents a text.

    Attributes:
      key: text that changes whenever a file or the choice of the splits changes.
      files: the file of each split, and which part of it is the split: "all", "head" or "tail".
      notes: lines that say how the splits were chosen.
    """

    key: str
    files: dict[str, tuple[Path, str]]
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def has_split(self, split: str) -> bool:
        return split in self.files

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, offsets) of a split: tokens memory-mapped [n], and offsets int64 [documents + 1]."""
        path, part = self.files[split]
        tokens, offsets = _read(path)
        if part == _ALL:
            return tokens, offsets
        border = _border(offsets)
        if part == _HEAD:
            return tokens[:border], np.append(offsets[offsets < border], border)
        return tokens[border:], np.insert(offsets[offsets > border], 0, border) - border


def open_tokens(source: str, validation_data: str = "") -> TokenFiles | None:
    """Opens a file or folder of tokens; returns None if the source is something else.

    Raises:
      ValueError: a folder has several files of tokens and none for training, or validation_data is not tokens.
    """
    files = _split_files(source)
    if files is None:
        return None
    if validation_data:
        held_out = _split_files(validation_data)
        if held_out is None:
            raise ValueError(f"validation_data must be tokens in a .npy or .bin file, as data is, got {validation_data!r}")
        path, part = held_out["validation"]
        files = {"train": (files["train"][0], _ALL), "validation": (path, _ALL if part == _TAIL else part)}
    notes = tuple(f"{split}: {'' if part == _ALL else f'{part} of '}{path}" for split, (path, part) in files.items())
    state = [f"{split}:{part}:{_state(path)}" for split, (path, part) in files.items()]
    return TokenFiles("\n".join(["tokens", *state]), files, notes)


def scan(files: TokenFiles, tokenizer_path: Path | None) -> dict[str, Any]:
    """Reads all tokens once.

    Returns:
      A dict with "max_id", the highest id of all splits, "sha256", {split: digest of its tokens}, and "num_bytes", {split: length
      of its text in bytes, or None without a tokenizer}.

    Raises:
      ValueError: an id is negative or not one of the tokenizer, or a split is empty.
    """
    found: dict[str, Any] = {"max_id": 0, "sha256": {}, "num_bytes": {}}
    read = {split: files.read(split)[0] for split in files.splits}
    limit, sizes = 2**32, None
    if tokenizer_path is not None:
        limit, bytes_of = num_ids(tokenizer_path), token_table(tokenizer_path)
        sizes = np.asarray([len(bytes_of(token)) for token in range(limit)], np.int64)
    with progress("reading tokens", sum(tokens.nbytes for tokens in read.values())) as advance:
        for split, tokens in read.items():
            if not len(tokens):
                raise ValueError(f"source must contain tokens, but the {split} split of {files.files[split][0]} is empty")
            sha, num_bytes = hashlib.sha256(), 0
            for begin in range(0, len(tokens), _BLOCK):
                block = np.ascontiguousarray(tokens[begin : begin + _BLOCK])
                low, high = int(block.min()), int(block.max())
                if low < 0 or high >= limit:
                    wrong = low if low < 0 else high
                    of = "of 32 bits" if sizes is None else f"of the tokenizer, from 0 to {limit - 1:,}"
                    raise ValueError(f"token ids must be ids {of}, got {wrong:,} in {files.files[split][0]}")
                found["max_id"] = max(found["max_id"], high)
                sha.update(block.data)
                if sizes is not None:
                    num_bytes += int(np.bincount(block, minlength=limit) @ sizes)
                advance(block.nbytes)
            found["sha256"][split] = sha.hexdigest()
            found["num_bytes"][split] = None if sizes is None else num_bytes
    return found


# Files ----------------------------------------------------------------------------------------------------------------


def _split_files(source: str) -> dict[str, tuple[Path, str]] | None:
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        path = Path(path).resolve()
        return {"train": (path, _HEAD), "validation": (path, _TAIL)} if _is_tokens(path) else None
    if not source.strip() or not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        return None
    path = Path(path).resolve()
    inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
    candidates = [one for one in inside if one.suffix in SUFFIXES and not one.name.endswith(".offsets.npy") and one.is_file()]
    tokens = {one.stem: one for one in candidates if _is_tokens(one)}
    files = {split: (tokens[name], _ALL) for split, names in _NAMES.items() for name in reversed(names) if name in tokens}
    if "train" in files:
        train = files["train"][0]
        return files if "validation" in files else files | {"train": (train, _HEAD), "validation": (train, _TAIL)}
    if not tokens or any(one.is_dir() or one.suffix not in (*SUFFIXES, ".idx", ".json", ".pkl") for one in inside):
        return None
    if len(tokens) > 1:
        raise ValueError(
            f"source must have its training tokens in a file train.bin or train.npy, got {path} with "
            f"{', '.join(one.name for one in list(tokens.values())[:5])}{near('train', tokens)}; or name one file"
        )
    return _split_files(str(next(iter(tokens.values()))))


def _is_tokens(path: Path) -> bool:
    """Returns whether a .npy or .bin file is one of tokens; a .bin file that is UTF-8 text is not."""
    if path.suffix == ".npy":
        return True
    if path.suffix != ".bin" or not path.stat().st_size or path.stat().st_size % 2:
        return False
    with path.open("rb") as file:
        begin = file.read(_SAMPLE)
    try:
        begin.decode()
    except UnicodeDecodeError as error:
        if error.start < len(begin) - 3 or len(begin) < _SAMPLE:  # not a character that the sample cuts
            return True
    return b"\0" in begin


def _companions(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".offsets.npy"), path.with_suffix(".idx")


def _state(path: Path) -> str:
    stats = ((one, one.stat()) for one in (path, *_companions(path)) if one.is_file())
    return ",".join(f"{one}:{stat.st_size}:{stat.st_mtime_ns}" for one, stat in stats)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    tokens = _read_npy(path) if path.suffix == ".npy" else _read_bin(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise ValueError(f"tokens must be integers [n] or [documents, n], got {tokens.dtype}{list(tokens.shape)} in {path}")
    if not tokens.flags.c_contiguous:
        raise ValueError(f"tokens must be in C order, got an array in Fortran order in {path}")
    rows = tokens.shape[1] if tokens.ndim == 2 else None
    tokens = tokens.reshape(-1)
    offsets = np.arange(0, len(tokens), max(1, rows)) if rows is not None else _read_offsets(path)
    if len(offsets) and (offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(tokens)):
        raise ValueError(
            f"offsets of documents must begin with 0 and increase to at most {len(tokens):,}, the number of tokens, got "
            f"{offsets[:1].tolist()} to {offsets[-1:].tolist()} beside {path}"
        )
    return tokens, np.unique(np.concatenate([[0], offsets, [len(tokens)]])).astype(np.int64)  # without empty documents


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"source must be an array of token ids, but {path} cannot be read: {error}") from None


def _read_bin(path: Path) -> np.ndarray:
    header = np.fromfile(path, "<i4", 256)
    dtype = _LLM_C.get((int(header[0]), int(header[1]))) if len(header) == 256 else None
    if dtype is not None:
        held = (path.stat().st_size - 1024) // np.dtype(dtype).itemsize
        if held != header[2]:
            raise ValueError(f"source must be whole, but {path} has {held:,} tokens where its header says {header[2]:,}")
        return np.memmap(path, dtype, "r", offset=1024)
    dtype = _megatron_dtype(path) or _raw_dtype(path)
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise ValueError(f"source must be {np.dtype(dtype).name}, but {path} has {path.stat().st_size:,} bytes")
    return np.memmap(path, dtype, "r")


def _raw_dtype(path: Path) -> Any:
    """Recognizes uint32, whose upper halves are small because vocabularies have fewer than 2^20 ids; otherwise uint16."""
    halves = np.fromfile(path, "<u2", _SAMPLE)
    is_32 = path.stat().st_size % 4 == 0 and halves[1::2].max(initial=0) < 16 <= halves[::2].max(initial=0)
    return np.uint32 if is_32 else np.uint16


def _megatron_dtype(path: Path) -> Any:
    index = path.with_suffix(".idx")
    return _read_index(index)[0] if index.is_file() else None


def _read_offsets(path: Path) -> np.ndarray:
    offsets, index = _companions(path)
    if offsets.is_file():
        read = _read_npy(offsets)
        if read.dtype.kind not in "iu" or read.ndim != 1:
            raise ValueError(f"offsets of documents must be integers [documents], got {read.dtype}{list(read.shape)} in {offsets}")
        return np.asarray(read, np.int64)
    if path.suffix == ".bin" and index.is_file():
        return _read_index(index)[1]
    return np.zeros(0, np.int64)


def _read_index(path: Path) -> tuple[Any, np.ndarray]:
    """Reads (dtype, offsets of documents) from an index of Megatron-LM.

    It holds a magic string, version, code of the dtype, numbers of sequences and documents, lengths of sequences (int32), their
    places in bytes (int64), and the first sequence of each document (int64).
    """
    content = path.read_bytes()
    try:
        if content[:9] != b"MMIDIDX\0\0":
            raise ValueError("it does not begin with MMIDIDX")
        dtype = _MEGATRON[content[17]]
        sequences, documents = (int(n) for n in np.frombuffer(content, "<u8", 2, 18))
        lengths = np.frombuffer(content, "<i4", sequences, 34)
        first = np.frombuffer(content, "<i8", documents, 34 + 12 * sequences)
        return dtype, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[first]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"source must have an index of Megatron-LM in {path}, which cannot be read: {error}") from None


def _border(offsets: np.ndarray) -> int:
    """Returns where the last tenth begins: at a document, if there are several."""
    border = int(offsets[-1] * (1 - VALIDATION_SHARE))
    if len(offsets) == 2:
        return border
    return int(offsets[np.clip(np.searchsorted(offsets, border), 1, len(offsets) - 2)])
