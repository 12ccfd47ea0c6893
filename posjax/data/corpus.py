"""A corpus: the tokens of one split of a text source, flat on disk, with the places where documents begin.

Sources are TFDS data sets (the Python standard library's own source code by default) and files or folders of text.
Tokens are bytes, or a byte-level BPE trained on the train split. Both are cached under the data directory, under names
that change with the text, and every cache entry is built aside and then renamed into place, so that two processes at
once, or one that is killed half-way, leave nothing wrong behind.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from posjax.checks import near
from posjax.data.sources import CORPORA, TOKENIZERS, Text, open_source

NUM_BYTES = 256
NUM_SPECIAL = 2  # beginning of a document (and [CLS]), [MASK]
DEFAULT_BPE_VOCAB = 8192
_LAYOUT = "1"  # part of every cache name: change it when the files change


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of one split of one source.

    Attributes:
      source: as given to `load_corpus`.
      split: "train" or "validation", or a TFDS split.
      tokens: [n], the documents one after another with nothing between them, in the smallest unsigned type; read-only
        and mapped from disk.
      offsets: int64 [documents + 1], where each document begins in `tokens`, and n.
      vocab_size: V, number of ids a model must know: the tokenizer's and the two special ones, which come last.
      num_bytes: length of the text in bytes, for bits per byte.
      tokenizer_path: the file of the BPE; None when tokens are bytes.
    """

    source: str
    split: str
    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    vocab_size: int
    num_bytes: int
    tokenizer_path: Path | None = None

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def bos(self) -> int:
        """The id that begins a document; 256 for bytes."""
        return self.vocab_size - 2

    @property
    def cls(self) -> int:
        """The id of [CLS], with which a row of a masked model begins; the same as `bos`."""
        return self.bos

    @property
    def mask(self) -> int:
        """The id of [MASK]; 257 for bytes."""
        return self.vocab_size - 1

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens of a text, int32 [n], without `bos`."""
        data = text.encode() if isinstance(text, str) else text
        return next(_encode([data], self.tokenizer_path)).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a row of tokens; special ones are shown as <bos> and <mask>.

        Raises:
          ValueError: if a token is not an id of this corpus.
        """
        tokens = np.asarray(tokens).ravel()
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens must be from 0 to {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
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
) -> Corpus:
    """Opens a corpus, building it first if it is not in the cache.

    Args:
      source: "stdlib", the .py files of the running Python's standard library, one in ten held out;
        "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:NAME:FEATURE", a text data set of TFDS (if it has no validation split,
        the last tenth of train is held out, from train too);
        or the path of a folder of UTF-8 text files, one file in ten held out (hidden ones and caches are ignored), or of one
        file, its last tenth held out.
      split: "train" or "validation"; for "tfds:" any split of TFDS, such as "test" or "train[:1%]".
      tokenizer: "bytes" (ids 0 to 255) or "bpe", a byte-level BPE trained on the train split.
      vocab_size: for "bpe" only, V with the two special ids: 259 or more, by default 8192. A small text may have
        nothing left to merge before that; the corpus then says a smaller one.
      data_dir: where caches live; by default $POSJAX_DATA_DIR or ~/.cache/posjax. Data sets that TFDS has prepared
        already are found where TFDS keeps them unless one of the two is given.

    Raises:
      ValueError: for an argument that is not understood, an empty split, or a file that is not text.
      OSError: if a file cannot be read.
      ImportError: if a package that this source or tokenizer needs is not installed.
    """
    if tokenizer not in ("bytes", "bpe"):
        raise ValueError(f"tokenizer must be 'bytes' or 'bpe', got {tokenizer!r}{near(tokenizer, ('bytes', 'bpe'))}")
    if tokenizer == "bytes" and vocab_size not in (None, NUM_BYTES + NUM_SPECIAL):
        raise ValueError(f"vocab_size must be 258 or left out when tokenizer is 'bytes', got {vocab_size!r}")
    vocab_size = DEFAULT_BPE_VOCAB if vocab_size is None else vocab_size
    if tokenizer == "bpe" and vocab_size <= NUM_BYTES + NUM_SPECIAL:
        raise ValueError(f"vocab_size must be at least 259 when tokenizer is 'bpe', got {vocab_size!r}")

    given = data_dir or os.environ.get("POSJAX_DATA_DIR")
    cache = Path(given or "~/.cache/posjax").expanduser()
    text = open_source(str(source), cache, Path(given).expanduser() if given else None)
    if not text.has_split(split):
        raise ValueError(f"split must be one of {', '.join(text.splits)}, got {split!r}{near(split, text.splits)}")
    tokenizer_path = _trained_bpe(text, vocab_size, cache) if tokenizer == "bpe" else None
    name = _cache_name(text.key, split, tokenizer, str(vocab_size) if tokenizer_path else "")
    folder = _build_once(cache / CORPORA / name, lambda new: _write_corpus(new, text, split, tokenizer_path))
    facts = json.loads((folder / "corpus.json").read_text())
    return Corpus(
        source=str(source),
        split=split,
        tokens=np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        vocab_size=facts["vocab_size"],
        num_bytes=facts["num_bytes"],
        tokenizer_path=tokenizer_path,
    )


def excerpts(corpus: Corpus, length: int, count: int) -> Corpus:
    """Up to ``count`` excerpts of ``length`` tokens, spread evenly over a corpus, each within one document.

    An evaluation on the first tokens of a split would be one on its first few documents. Each excerpt is a document of the corpus
    returned. Where no document is as long as that, the corpus is returned as it is.
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
    """Bits a byte of a model that knows how frequent each token is and nothing else: what any model must beat.

    It is the entropy of the corpus's own token frequencies times tokens per byte.
    """
    counts = np.bincount(corpus.tokens, minlength=1).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * len(corpus.tokens) / corpus.num_bytes)


# --------------------------------------------------------------------------------------------------- tokens and cache


def _cache_name(*parts: str) -> str:
    return hashlib.sha256("\0".join((_LAYOUT, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `build` if it is not there yet. What is there is always whole."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".unfinished-*"):  # of a build that was killed, more than a day ago
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left)
    unfinished = folder.parent / f".unfinished-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_corpus(folder: Path, text: Text, split: str, tokenizer_path: Path | None) -> None:
    size = _load_tokenizer(tokenizer_path).get_vocab_size() if tokenizer_path else NUM_BYTES
    dtype = np.min_scalar_type(size - 1)
    lengths, num_bytes = [], 0

    def counted():
        nonlocal num_bytes
        for document in text.documents(split):
            if document:
                num_bytes += len(document)
                yield document

    with (folder / "tokens.bin").open("wb") as file:
        for tokens in _encode(counted(), tokenizer_path):
            lengths.append(len(tokens))
            tokens.astype(dtype).tofile(file)
    if not num_bytes:
        raise ValueError(f"source must hold text, its {split} split has none (source {text.key.splitlines()[0]!r})")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    facts = {"dtype": dtype.name, "vocab_size": size + NUM_SPECIAL, "num_bytes": num_bytes}
    (folder / "corpus.json").write_text(json.dumps(facts))


def _encode(documents, tokenizer_path: Path | None) -> Iterator[np.ndarray]:
    """Tokens of each document in turn."""
    if tokenizer_path is None:
        for document in documents:
            yield np.frombuffer(document, np.uint8)
        return
    tokenizer = _load_tokenizer(tokenizer_path)
    for document in documents:
        yield np.asarray(tokenizer.encode(document.decode("utf-8", "replace")).ids, np.int64)


def _import_tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"tokenizer 'bpe' needs the package tokenizers ({error}): pip install tokenizers") from error
    return tokenizers


@functools.lru_cache(maxsize=8)  # a file in the cache never changes
def _load_tokenizer(path: Path):
    return _import_tokenizers().Tokenizer.from_file(str(path))


def _trained_bpe(text: Text, vocab_size: int, cache: Path) -> Path:
    """The file of a byte-level BPE trained on the train split, which the other splits share."""

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
        bpe.train_from_iterator((document.decode("utf-8", "replace") for document in text.documents("train")), trainer)
        bpe.save(str(folder / "bpe.json"))

    if "train" not in text.splits:
        raise ValueError(f"tokenizer 'bpe' needs a source with a train split, got splits {list(text.splits)}")
    return _build_once(cache / TOKENIZERS / _cache_name(text.key, str(vocab_size)), train) / "bpe.json"
