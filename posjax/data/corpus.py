"""Text corpora: the tokens of one split of a text source in a flat file on disk, with the offsets of the documents.

Sources are TFDS data sets (by default the source code of the Python standard library) and files or folders of text.
Tokens are bytes, or come from a byte-level BPE trained on the train split. Corpora and tokenizers are cached in the data
directory, under names that change with the text. Every cache entry is built in a temporary folder and then renamed, so
that concurrent processes, or a process killed half-way, leave no invalid entry behind.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from posjax.checks import near, require
from posjax.data.sources import CORPORA, TOKENIZERS, Text, open_source

NUM_BYTES = 256
NUM_SPECIAL = 2  # bos (which is also [CLS]) and [MASK]
DEFAULT_BPE_VOCAB = 8192
_LAYOUT = "1"  # part of every cache name: change it when the file format changes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Holds the tokens of one split of a source.

    Attributes:
      source: the source passed to `load_corpus`.
      split: "train" or "validation", or a TFDS split.
      tokens: tokens of all documents, concatenated without separators, [n] in the smallest unsigned dtype; read-only and
        memory-mapped.
      offsets: offset in `tokens` at which each document begins, followed by n; int64 [documents + 1].
      vocab_size: V, the number of token ids: the tokenizer's ids, followed by two special ones.
      num_bytes: length of the text in bytes, from which bits per byte are computed.
      tokenizer_path: path of the BPE file. None if tokens are bytes.
      notes: lines that say how the splits of the source were chosen.
    """

    source: str
    split: str
    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    vocab_size: int
    num_bytes: int
    tokenizer_path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def bos(self) -> int:
        """Returns the id of the token that begins a document; 256 for bytes."""
        return self.vocab_size - 2

    @property
    def cls(self) -> int:
        """Returns the id of [CLS], the first token of each row of a masked model; the same as `bos`."""
        return self.bos

    @property
    def mask(self) -> int:
        """Returns the id of [MASK]; 257 for bytes."""
        return self.vocab_size - 1

    def encode(self, text: str | bytes) -> np.ndarray:
        """Encodes a text as tokens, int32 [n], without `bos`."""
        data = text.encode() if isinstance(text, str) else text
        return next(_encode([data], self.tokenizer_path)).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes a row of tokens to text. Special tokens appear as <bos> and <mask>.

        Raises:
          ValueError: a token is not an id of this corpus.
        """
        tokens = np.asarray(tokens).ravel()
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens must lie in [0, {self.vocab_size - 1}], got {tokens.min()} to {tokens.max()}")
        pieces, start = [], 0
        for end in [*np.flatnonzero(tokens >= self.bos), len(tokens)]:
            if self.tokenizer_path is None:
                pieces.append(tokens[start:end].astype(np.uint8).tobytes().decode("utf-8", "replace"))
            else:
                pieces.append(_load_tokenizer(self.tokenizer_path).decode(tokens[start:end].tolist()))
            if end < len(tokens):
                pieces.append("<bos>" if tokens[end] == self.bos else "<mask>")
            start = end + 1
        return "".join(pieces)


def load_corpus(
    source: str = "stdlib",
    split: str = "train",
    *,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    data_dir: str | Path | None = None,
    validation_data: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_key: str = "text",
    workdir: str | Path | None = None,
) -> Corpus:
    """Loads a corpus from the cache, building it first if necessary.

    Args:
      source: one of three kinds. "stdlib" stands for the .py files of the running Python's standard library, with one file in ten
        held out for validation. "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:NAME:FEATURE" is a text data set of TFDS; if it
        has no validation split, the last tenth of train is held out and removed from train. Any other string is the path
        of a folder of UTF-8 text files, with one file in ten held out (hidden files and caches are ignored), or of one
        file, with its last tenth held out.
      split: "train" or "validation"; for "tfds:" any split of TFDS, such as "test" or "train[:1%]".
      tokenizer: "bytes" (ids 0 to 255) or "bpe", a byte-level BPE trained on the train split.
      vocab_size: for "bpe" only, V including the two special ids; at least 259, by default 8192. For a small text the BPE
        may run out of merges before that; `vocab_size` of the corpus is then smaller.
      data_dir: directory of the caches, by default $POSJAX_DATA_DIR or ~/.cache/posjax. If neither the argument nor the
        variable is set, TFDS data sets are read from, or prepared in, TFDS's default directory.
      validation_data: a source of its own for validation; all of `source` is then training text. Empty: part of `source`.
      include, exclude: patterns of the files of a folder to read and to leave out, such as "*.txt" or "books/**/*.txt".
      text_key: the key of JSONL, or column of Parquet and Arrow, that holds the text.
      workdir: folder of a run, which is not text even if it lies in the folder of the source.

    Raises:
      ValueError: an argument is invalid, the split is empty, or a file is not text.
      OSError: a file cannot be read.
      ImportError: a package that this source or tokenizer needs is not installed.
    """
    if tokenizer not in ("bytes", "bpe"):
        raise ValueError(f"tokenizer must be 'bytes' or 'bpe', got {tokenizer!r}{near(tokenizer, ('bytes', 'bpe'))}")
    if tokenizer == "bytes" and vocab_size not in (None, NUM_BYTES + NUM_SPECIAL):
        raise ValueError(f"vocab_size must be 258 or None with tokenizer='bytes', got {vocab_size!r}")
    vocab_size = DEFAULT_BPE_VOCAB if vocab_size is None else vocab_size
    if tokenizer == "bpe" and vocab_size <= NUM_BYTES + NUM_SPECIAL:
        raise ValueError(f"vocab_size must be at least 259 with tokenizer='bpe', got {vocab_size!r}")

    chosen_dir = data_dir or os.environ.get("POSJAX_DATA_DIR")
    cache = Path(chosen_dir or "~/.cache/posjax").expanduser()
    text = open_source(
        str(source),
        cache,
        Path(chosen_dir).expanduser() if chosen_dir else None,
        validation_data=validation_data,
        include=include,
        exclude=exclude,
        text_key=text_key,
        workdir=workdir,
    )
    if not text.has_split(split):
        raise ValueError(f"split must be one of {', '.join(text.splits)}, got {split!r}{near(split, text.splits)}")
    tokenizer_path = _trained_bpe(text, vocab_size, cache) if tokenizer == "bpe" else None
    name = _cache_name(text.key, split, tokenizer, str(vocab_size) if tokenizer_path else "")
    folder = _build_once(cache / CORPORA / name, lambda new: _write_corpus(new, text, split, tokenizer_path))
    metadata = json.loads((folder / "corpus.json").read_text())
    return Corpus(
        source=str(source),
        split=split,
        tokens=np.memmap(folder / "tokens.bin", dtype=metadata["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        vocab_size=metadata["vocab_size"],
        num_bytes=metadata["num_bytes"],
        tokenizer_path=tokenizer_path,
        notes=text.notes,
    )


def excerpts(corpus: Corpus, length: int, count: int) -> Corpus:
    """Selects up to ``count`` excerpts of ``length`` tokens, spread evenly over a corpus, each within one document.

    Intended for evaluation, because the first tokens of a split would cover only its first few documents. Each excerpt becomes one
    document of the returned corpus. If no document has ``length`` tokens, the corpus is returned unchanged.
    """
    fits = np.diff(corpus.offsets) // length
    total = int(fits.sum())
    if total == 0:
        return corpus
    chosen = np.linspace(0, total, min(count, total), endpoint=False).astype(np.int64)
    document = np.searchsorted(np.cumsum(fits), chosen, side="right")
    begins = corpus.offsets[document] + (chosen - (np.cumsum(fits) - fits)[document]) * length
    tokens = np.concatenate([corpus.tokens[begin : begin + length] for begin in begins])
    share = corpus.num_bytes / len(corpus.tokens)
    num_bytes = len(tokens) if corpus.tokenizer_path is None else round(len(tokens) * share)
    return replace(corpus, tokens=tokens, offsets=np.arange(len(chosen) + 1) * length, num_bytes=num_bytes)


def unigram_bits_per_byte(corpus: Corpus) -> float:
    """Returns the bits per byte of a unigram model, a baseline that any model must beat.

    It is the entropy of the corpus's token frequencies, times tokens per byte.
    """
    counts = np.bincount(corpus.tokens, minlength=1).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * len(corpus.tokens) / corpus.num_bytes)


# --------------------------------------------------------------------------------------------------- tokens and cache


def _cache_name(*parts: str) -> str:
    return hashlib.sha256("\0".join((_LAYOUT, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, which `build` fills first if it does not exist. An existing folder is always complete."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".unfinished-*"):  # removed if its build was killed more than a day ago
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 86_400:
                shutil.rmtree(leftover)
    unfinished = folder.parent / f".unfinished-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # if it exists, another process has built the same content first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_corpus(folder: Path, text: Text, split: str, tokenizer_path: Path | None) -> None:
    size = _load_tokenizer(tokenizer_path).get_vocab_size() if tokenizer_path else NUM_BYTES
    dtype = np.min_scalar_type(size - 1)
    lengths, num_bytes = [], 0

    def documents():
        nonlocal num_bytes
        for document in map(b"".join, text.documents(split)):
            if document:
                num_bytes += len(document)
                yield document

    with (folder / "tokens.bin").open("wb") as file:
        for tokens in _encode(documents(), tokenizer_path):
            lengths.append(len(tokens))
            tokens.astype(dtype).tofile(file)
    if not num_bytes:
        raise ValueError(f"source must contain text, but the {split} split of {text.key.splitlines()[0]!r} is empty")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    metadata = {"dtype": dtype.name, "vocab_size": size + NUM_SPECIAL, "num_bytes": num_bytes}
    (folder / "corpus.json").write_text(json.dumps(metadata))


def _encode(documents, tokenizer_path: Path | None) -> Iterator[np.ndarray]:
    """Yields the tokens of each document."""
    if tokenizer_path is None:
        for document in documents:
            yield np.frombuffer(document, np.uint8)
        return
    tokenizer = _load_tokenizer(tokenizer_path)
    for document in documents:
        yield np.asarray(tokenizer.encode(document.decode("utf-8", "replace")).ids, np.int64)


def _import_tokenizers():
    require("tokenizer 'bpe'", "tokenizers")
    import tokenizers

    return tokenizers


@functools.lru_cache(maxsize=8)  # a file in the cache never changes
def _load_tokenizer(path: Path):
    return _import_tokenizers().Tokenizer.from_file(str(path))


def _trained_bpe(text: Text, vocab_size: int, cache: Path) -> Path:
    """Returns the path of a byte-level BPE for all splits, trained on the train split if it is not in the cache."""

    def train(folder):
        tokenizers = _import_tokenizers()
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIAL,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (b"".join(document).decode("utf-8", "replace") for document in text.documents("train"))
        bpe.train_from_iterator(texts, trainer)
        bpe.save(str(folder / "bpe.json"))

    if "train" not in text.splits:
        raise ValueError(f"tokenizer='bpe' needs a source with a train split, got splits {list(text.splits)}")
    return _build_once(cache / TOKENIZERS / _cache_name(text.key, str(vocab_size)), train) / "bpe.json"
