"""Text corpora: the tokens of one split of a text source in a flat file on disk, with the offsets of the documents.

Sources are TFDS data sets (by default the source code of the Python standard library), files or folders of text, files of tokens,
and mixtures of these. Corpora and tokenizers are cached in the data directory (``posjax.data.cache``), under names that change with
the text.
"""

import array
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from posjax.checks import checked, near
from posjax.data import cache
from posjax.data.files import shown
from posjax.data.pretokenized import TokenFiles, open_tokens, scan
from posjax.data.sources import CORPORA, TOKENIZERS, Text, check_consistent, open_source
from posjax.data.tokenizers import (
    BPE,
    BYTES,
    DEFAULT_BPE_VOCAB,
    FILE,
    KINDS,
    MAX_BPE_TEXT,
    NUM_SPECIAL,
    Vocabulary,
    cached_tokenizer,
    check_tokenizer,
    check_vocab_size,
    chunks,
    encode,
    import_tokenizers,
    num_ids,
    train_bpe,
)
from posjax.progress import progress

_LAYOUT = "2"  # part of every cache name: change it when the file format changes


@dataclass(frozen=True, eq=False)
class Corpus(Vocabulary):
    """Holds the tokens of one split of a source.

    Attributes:
      source: the source passed to `load_corpus`.
      split: "train" or "validation", or a TFDS split.
      tokens: tokens of all documents, concatenated without separators, [n] of an integer dtype; read-only and memory-mapped.
      offsets: offset in `tokens` at which each document begins, followed by n; int64 [documents + 1].
      vocab_size: V, the number of token ids: the tokenizer's ids, followed by two special ones.
      num_bytes: length of the text in bytes, from which bits per byte are computed. None for tokens of an unknown tokenizer.
      tokenizer_path: path of the tokenizer's file in the cache. None if tokens are bytes, or their tokenizer is not known.
      digest: SHA-256 of the tokens and offsets of the split; the same wherever the text is stored.
      notes: lines that say how the splits of the source were chosen.
      special_ids: as in `Vocabulary`.
    """

    source: str
    split: str
    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    vocab_size: int
    num_bytes: int | None
    tokenizer_path: Path | None = None
    digest: str = ""
    notes: tuple[str, ...] = ()
    special_ids: tuple[int, int] | None = None

    @property
    def num_documents(self) -> int:
        """Returns the number of documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens."""
        return len(self.tokens)

    @property
    def parts(self) -> tuple["Corpus", ...]:
        """Returns the corpora that rows are drawn from: this one."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Returns the weight of each of ``parts``: one."""
        return (1.0,)


@dataclass(frozen=True, eq=False)
class Mixture(Vocabulary):
    """Holds one split of several sources, from which rows are drawn with weights.

    Attributes:
      source: the mixture as text, as passed to `load_corpus`.
      split: "train" or "validation".
      parts: the corpora, with one tokenizer.
      weights: share of the rows that come from each part; they sum to 1.
    """

    source: str
    split: str
    parts: tuple[Corpus, ...]
    weights: tuple[float, ...]

    @property
    def vocab_size(self) -> int:
        """Returns V, which all parts share."""
        return self.parts[0].vocab_size

    @property
    def special_ids(self) -> tuple[int, int] | None:
        return self.parts[0].special_ids

    @property
    def tokenizer_path(self) -> Path | None:
        """Returns the file of the tokenizer, which all parts share; None if tokens are bytes."""
        return self.parts[0].tokenizer_path

    @property
    def num_documents(self) -> int:
        """Returns the number of documents in all parts."""
        return sum(part.num_documents for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens in all parts."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_bytes(self) -> int | None:
        """Returns the number of bytes in all parts; None if that of a part is not known."""
        return _total(part.num_bytes for part in self.parts)

    @property
    def digest(self) -> str:
        """Returns the SHA-256 of the digests and weights of the parts."""
        return _digest(*(part.digest for part in self.parts), *map(repr, self.weights))

    @property
    def notes(self) -> tuple[str, ...]:
        """Returns a line for each part, with its share of the rows, and the notes of the parts."""
        shares = zip(self.parts, self.weights, strict=True)
        lines = (f"{shown(part.source)}: {share:.2%} of rows, {part.num_tokens:,} tokens" for part, share in shares)
        return (*lines, *(f"{shown(part.source)}: {note}" for part in self.parts for note in part.notes))


@checked()
def load_corpus(
    source: str | os.PathLike = "stdlib",
    split: str = "train",
    *,
    tokenizer: str = BYTES,
    vocab_size: int | None = None,
    data_dir: str | os.PathLike | None = None,
    validation_data: str | os.PathLike = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_key: str = "text",
    workdir: str | os.PathLike | None = None,
) -> Corpus | Mixture:
    """Loads a corpus from the cache, building it first if necessary.

    Args:
      source: one of five kinds. "stdlib" stands for the .py files of the running Python's standard library, with one file in ten
        held out for validation. "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:NAME:FEATURE" is a text data set of TFDS; if it
        has no validation split, the last tenth of train is held out and removed from train. Several sources with weights,
        "a:0.7,b:0.3", are a mixture (`parse_mixture`). A .npy or .bin file of token ids, or a folder with train.bin and val.bin,
        is a corpus of tokens (`posjax.data.pretokenized`). Any other string is the path of a file or folder, also in a bucket, of
        text, JSONL, Parquet, Arrow or ArrayRecord (`posjax.data.text.formats`). Files named after splits are these splits; without
        any, about a tenth of the text is held out (`posjax.data.text.splits`).
      split: "train" or "validation"; "test" for files of this name; for "tfds:" any split of TFDS, such as "test" or "train[:1%]".
      tokenizer: "bytes" (ids 0 to 255), "bpe", a byte-level BPE trained on the train split, or the path of a tokenizer.json or a
        .gguf file. For a corpus of tokens: the file of the tokenizer that they were made with, or "bytes" if it is not known.
      vocab_size: for "bpe", V including the two special ids; at least 259, by default 8192. For a small text the BPE
        may run out of merges before that; `vocab_size` of the corpus is then smaller. For a corpus of tokens, V without the
        two special ids, by default the highest id plus one.
      data_dir: directory of the caches, by default $POSJAX_DATA_DIR or ~/.cache/posjax. If neither the argument nor the
        variable is set, TFDS data sets are read from, or prepared in, TFDS's default directory.
      validation_data: a source of its own for validation; all of `source` is then training text. Empty: part of `source`.
      include, exclude: patterns of the files of a folder to read and to leave out, such as "*.txt" or "books/**/*.txt".
      text_key: the key of JSONL, or column of Parquet and Arrow, that holds the text.
      workdir: folder of a run, which is not text even if it lies in the folder of the source.

    Returns:
      A corpus, or a mixture if the source names several.

    Raises:
      ValueError: an argument is invalid, the split is empty, or a file is not text.
      OSError: a file cannot be read.
      ImportError: a package that this source or tokenizer needs is not installed.
    """
    check_tokenizer(tokenizer)
    if not text_key:
        raise ValueError("text_key must be the name of a key or column, got ''")
    chosen_dir = data_dir or os.environ.get("POSJAX_DATA_DIR")
    folder = cache_folder(data_dir)
    tokenizer_path = cached_tokenizer(tokenizer, folder / TOKENIZERS) if tokenizer not in KINDS else None
    options = dict(include=include, exclude=exclude, text_key=text_key, workdir=workdir, validation_data=validation_data)
    weights = parse_mixture(str(source))
    opened = [_open(name, folder, Path(os.path.expanduser(chosen_dir)) if chosen_dir else None, options) for name in weights]
    for one in opened:
        if not one.has_split(split):
            raise ValueError(f"split must be one of {', '.join(one.splits)}, got {split!r}{near(split, one.splits)}")
    texts = [one for one in opened if isinstance(one, Text)]
    check_consistent(texts)
    if len(texts) < len(opened):
        _check_tokens(tokenizer, dict(zip(weights, opened, strict=True)))
    else:
        check_vocab_size(tokenizer, vocab_size)
    if tokenizer == BPE:
        tokenizer_path = _trained_bpe(texts, DEFAULT_BPE_VOCAB if vocab_size is None else vocab_size, folder)
    if split == "validation" and validation_data:
        weights, opened = {str(source): None}, opened[:1]  # that of the first is that of all
    load_one = dict(split=split, folder=folder, tokenizer_path=tokenizer_path)
    parts = [
        _load_text(name, one, **load_one) if isinstance(one, Text) else _load_tokens(name, one, **load_one, vocab_size=vocab_size)
        for name, one in zip(weights, opened, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    parts = [replace(part, vocab_size=max(part.vocab_size for part in parts)) for part in parts]
    shares = [part.num_tokens if weight is None else weight for part, weight in zip(parts, weights.values(), strict=True)]
    return Mixture(str(source), split, tuple(parts), tuple(share / math.fsum(shares) for share in shares))


def with_vocabulary(corpus: Corpus | Mixture, vocab_size: int, special_ids: tuple[int, int]) -> Corpus | Mixture:
    """Returns a corpus for a model that was trained elsewhere, with its vocabulary size and special tokens.

    Raises:
      ValueError: the tokenizer of the corpus has more ids than the model.
    """
    size = corpus.vocab_size - NUM_SPECIAL
    if size > vocab_size:
        raise ValueError(f"tokenizer must have at most the {vocab_size:,} ids of the model, got {size:,}")
    if isinstance(corpus, Mixture):
        return replace(corpus, parts=tuple(replace(one, vocab_size=vocab_size, special_ids=special_ids) for one in corpus.parts))
    return replace(corpus, vocab_size=vocab_size, special_ids=special_ids)


def parse_mixture(source: str) -> dict[str, float | None]:
    """Returns the sources in a text, each with its weight.

    Sources are separated by commas. "a:0.7,b:0.3" draws 70 % of the rows from a; weights need not sum to 1. In "a,b" every source
    has weight None: rows are drawn in proportion to the sources' tokens. A weight is what follows the last colon of a source, if it
    is a number, so that "tfds:lm1b:0.5" is half of "tfds:lm1b". A text without a comma, or one that is the path of an existing file
    or folder, is one source.

    Raises:
      ValueError: a weight is not a positive number, only some sources have weights, or a source is empty or occurs twice.
    """
    if "," not in source or os.path.exists(os.path.expanduser(source)):
        return {source: None}
    weights: dict[str, float | None] = {}
    paths = set()
    for text in (part.strip() for part in source.split(",")):
        name, colon, last = text.rpartition(":")
        weight = _number(last) if colon else None
        name = text if weight is None else name
        if not name:
            raise ValueError(f"data must be sources separated by commas, such as 'a:0.7,b:0.3', got {source!r}, where one is empty")
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"weights of a mixture must be positive and finite, got {last!r} for {name!r} in {source!r}")
        path = os.path.realpath(os.path.expanduser(name))
        if path in paths:
            raise ValueError(f"sources of a mixture must differ, got {name!r} twice in {source!r}; add its weights")
        paths.add(path)
        weights[name] = weight
    if len({weight is None for weight in weights.values()}) > 1:
        without = next(name for name, weight in weights.items() if weight is None)
        raise ValueError(f"either all sources of a mixture have weights or none has, got {source!r}, where {without!r} has none")
    return weights


def holds_tokens(source: str) -> bool:
    """Returns whether a source, or any in a mixture, is a file or folder of tokens."""
    return any(one != "stdlib" and open_tokens(one) is not None for one in parse_mixture(source))


def vocab_size_of(tokenizer: str, vocab_size: int, data_dir: str | Path | None) -> int:
    """Returns V of a tokenizer without reading a text: ``vocab_size`` for a BPE to be trained, otherwise the tokenizer's own."""
    if tokenizer == BPE:
        return vocab_size
    path = None if tokenizer == BYTES else cached_tokenizer(tokenizer, cache_folder(data_dir) / TOKENIZERS)
    return num_ids(path) + NUM_SPECIAL


def cache_folder(data_dir: str | Path | None) -> Path:
    """Returns the folder of the caches: ``data_dir``, or $POSJAX_DATA_DIR, or ~/.cache/posjax.

    Raises:
      ValueError: neither is given, and the user has no home directory.
    """
    try:
        return Path(data_dir or os.environ.get("POSJAX_DATA_DIR") or "~/.cache/posjax").expanduser()
    except RuntimeError:  # a container's user without HOME and without an entry in the list of users
        raise ValueError("data_dir must be given, or POSJAX_DATA_DIR set, because this user has no home directory") from None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@checked(length=dict(least=1), count=dict(least=1))
def excerpts(corpus: Corpus | Mixture, length: int, count: int) -> Corpus:
    """Selects up to ``count`` excerpts of ``length`` tokens, spread evenly over a corpus, each within one document.

    Intended for evaluation, because the first tokens of a split would cover only its first few documents. Each excerpt becomes one
    document of the returned corpus. If no document has ``length`` tokens, the corpus is returned unchanged. The digest stays
    that of the whole split.

    The excerpts of a mixture are those of its parts, in proportion to their weights; a part without a document of ``length`` tokens
    contributes its first documents.
    """
    if isinstance(corpus, Mixture):
        counts = (max(1, round(count * weight)) for weight in corpus.weights)
        chosen = [(part, excerpts(part, length, n), n) for part, n in zip(corpus.parts, counts, strict=True)]
        return _concatenate(corpus, [_first_tokens(one, length * n) if one is part else one for part, one, n in chosen])
    fits = np.diff(corpus.offsets) // length
    total = int(fits.sum())
    if total == 0:
        return corpus
    chosen = np.linspace(0, total, min(count, total), endpoint=False).astype(np.int64)
    document = np.searchsorted(np.cumsum(fits), chosen, side="right")
    begins = corpus.offsets[document] + (chosen - (np.cumsum(fits) - fits)[document]) * length
    tokens = np.concatenate([corpus.tokens[begin : begin + length] for begin in begins])
    return replace(corpus, tokens=tokens, offsets=np.arange(len(chosen) + 1) * length, num_bytes=_share(corpus, len(tokens)))


def _first_tokens(corpus: Corpus, count: int) -> Corpus:
    count = min(count, corpus.num_tokens)
    offsets = np.append(corpus.offsets[corpus.offsets < count], count)
    return replace(corpus, tokens=corpus.tokens[:count], offsets=offsets, num_bytes=_share(corpus, count))


def _share(corpus: Corpus, count: int) -> int | None:
    """Returns the bytes of ``count`` tokens, at the corpus's mean number of bytes per token."""
    if corpus.num_bytes is None or corpus.is_bytes:
        return None if corpus.num_bytes is None else count
    return round(count * (corpus.num_bytes / corpus.num_tokens))


def _concatenate(mixture: Mixture, parts: Sequence[Corpus]) -> Corpus:
    begins = np.cumsum([0, *(part.num_tokens for part in parts)])
    offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, begins[:-1], strict=True)]
    return Corpus(
        source=mixture.source,
        split=mixture.split,
        tokens=np.concatenate([part.tokens for part in parts], dtype=np.int64, casting="unsafe"),
        offsets=np.concatenate([*offsets, begins[-1:]]),
        vocab_size=mixture.vocab_size,
        num_bytes=_total(part.num_bytes for part in parts),
        tokenizer_path=mixture.tokenizer_path,
        digest=mixture.digest,
        notes=mixture.notes,
    )


def _total(sizes: Iterable[int | None]) -> int | None:
    sizes = list(sizes)
    return None if None in sizes else sum(sizes)


def unigram_bits(corpus: Corpus) -> float:
    """Returns the bits per token of a unigram model: the entropy of the corpus's token frequencies."""
    counts = np.bincount(corpus.tokens, minlength=1).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def unigram_bits_per_byte(corpus: Corpus) -> float:
    """Returns the bits per byte of a unigram model, a baseline that any model must beat.

    Args:
      corpus: the text.

    Raises:
      ValueError: the corpus has tokens of an unknown tokenizer, and thus no bytes.
    """
    if corpus.num_bytes is None:
        raise ValueError(f"corpus must have a known tokenizer for bits per byte, got {corpus.source!r}")
    return unigram_bits(corpus) * len(corpus.tokens) / corpus.num_bytes


# From sources to files in the cache -----------------------------------------------------------------------------------


def _open(source: str, folder: Path, tfds_dir: Path | None, options: dict[str, Any]) -> Text | TokenFiles:
    is_path = source != "stdlib" and not source.startswith("tfds:")
    tokens = open_tokens(source, options["validation_data"]) if is_path else None
    if tokens is not None:
        for name in ("include", "exclude"):
            if options[name]:
                raise ValueError(f"{name} must be empty for a source of tokens, got {options[name]} for {source!r}")
    return open_source(source, folder, tfds_dir, **options) if tokens is None else tokens


def _check_tokens(tokenizer: str, opened: dict[str, Text | TokenFiles]) -> None:
    """Raises ValueError if a tokenizer cannot be that of sources some of which are tokens already."""
    name = next(name for name, one in opened.items() if isinstance(one, TokenFiles))
    if tokenizer == BPE:
        raise ValueError(
            f"tokenizer must be the file of the tokenizer that made the tokens of {name!r}, or 'bytes' if it is unknown, got 'bpe'"
        )
    text = next((name for name, one in opened.items() if isinstance(one, Text)), None)
    if text is not None and tokenizer == BYTES:
        raise ValueError(
            f"tokenizer must be the file of the tokenizer that made the tokens of {name!r}, because {text!r} is text, got 'bytes'"
        )


def _load_text(source: str, text: Text, *, split: str, folder: Path, tokenizer_path: Path | None) -> Corpus:
    of_tokenizer = "bytes" if tokenizer_path is None else cache.digest(tokenizer_path.parent, FILE)
    name = cache.entry_name(_LAYOUT, text.key, split, of_tokenizer)
    entry = cache.cached(folder / CORPORA / name, lambda new: _write_corpus(new, text, split, tokenizer_path))
    metadata = json.loads((entry / "corpus.json").read_text())
    return Corpus(
        source=source,
        split=split,
        tokens=np.memmap(entry / "tokens.bin", dtype=metadata["dtype"], mode="r"),
        offsets=np.load(entry / "offsets.npy"),
        vocab_size=metadata["vocab_size"],
        num_bytes=metadata["num_bytes"],
        tokenizer_path=tokenizer_path,
        digest=_digest(metadata["dtype"], cache.digest(entry, "tokens.bin"), cache.digest(entry, "offsets.npy")),
        notes=text.notes,
    )


def _load_tokens(
    source: str, files: TokenFiles, *, split: str, folder: Path, tokenizer_path: Path | None, vocab_size: int | None
) -> Corpus:
    of_tokenizer = "" if tokenizer_path is None else cache.digest(tokenizer_path.parent, FILE)
    name = cache.entry_name(_LAYOUT, files.key, of_tokenizer)

    def write(new: Path) -> None:
        (new / "corpus.json").write_text(json.dumps(scan(files, tokenizer_path), indent=1))

    entry = cache.cached(folder / CORPORA / name, write)
    found = json.loads((entry / "corpus.json").read_text())
    size = found["max_id"] + 1
    if tokenizer_path is not None:
        vocab_size = num_ids(tokenizer_path)
    if vocab_size is not None and vocab_size < size:
        raise ValueError(
            f"vocab_size must count all token ids of {source!r}, the highest of which is {size - 1:,}, got {vocab_size:,}"
        )
    tokens, offsets = files.read(split)
    return Corpus(
        source=source,
        split=split,
        tokens=tokens,
        offsets=offsets,
        vocab_size=(size if vocab_size is None else vocab_size) + NUM_SPECIAL,
        num_bytes=found["num_bytes"].get(split),
        tokenizer_path=tokenizer_path,
        digest=_digest(tokens.dtype.name, found["sha256"][split], hashlib.sha256(offsets.tobytes()).hexdigest()),
        notes=files.notes,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _write_corpus(folder: Path, text: Text, split: str, tokenizer_path: Path | None) -> None:
    size = num_ids(tokenizer_path)
    dtype = np.min_scalar_type(size - 1)
    total = None if tokenizer_path is None else _count_bytes(text, split)
    lengths, last, num_bytes = array.array("q"), -1, 0
    with (folder / "tokens.bin").open("wb") as file, progress(f"tokenizing the {split} split", total) as advance:

        def counted(document: Iterable[bytes]) -> Iterator[bytes]:
            nonlocal num_bytes
            for piece in filter(len, document):
                num_bytes += len(piece)
                yield piece
                advance(len(piece))

        for number, tokens in encode(map(counted, text.documents(split)), tokenizer_path):
            if number != last:
                lengths.append(0)
                last = number
            lengths[-1] += len(tokens)
            file.write(tokens.astype(dtype, copy=False).data)
    if not sum(lengths):
        raise ValueError(f"source must contain text, but the {split} split of {text.key.splitlines()[0]!r} is empty")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    metadata = {"dtype": dtype.name, "vocab_size": size + NUM_SPECIAL, "num_bytes": num_bytes}
    (folder / "corpus.json").write_text(json.dumps(metadata))


def _count_bytes(text: Text, split: str) -> int:
    return sum(len(piece) for document in text.documents(split) for piece in document)


def _trained_bpe(texts: Sequence[Text], vocab_size: int, folder: Path) -> Path:
    """Returns the path of a byte-level BPE, trained on the train splits of all sources if it is not in the cache.

    If there are more than ``MAX_BPE_TEXT`` bytes, it is trained on evenly spaced chunks with about as many bytes in all, because
    the trainer keeps every distinct word in memory.
    """
    import_tokenizers()
    for text in texts:
        if "train" not in text.splits:
            raise ValueError(f"tokenizer='bpe' needs a source with a train split, got splits {list(text.splits)}")

    def train(new: Path) -> None:
        total = sum(_count_bytes(text, "train") for text in texts)
        share = min(1.0, MAX_BPE_TEXT / max(1, total))
        with progress("training the BPE tokenizer", total) as advance:

            def sample() -> Iterator[str]:
                credit = 0.0
                for document in (document for text in texts for document in text.documents("train")):
                    for chunk in chunks(counted(document)):
                        credit += share
                        if credit >= 1.0:
                            credit -= 1.0
                            yield chunk

            def counted(document: Iterable[bytes]) -> Iterator[bytes]:
                for piece in document:
                    advance(len(piece))
                    yield piece

            train_bpe(sample(), vocab_size, new / FILE)

    name = cache.entry_name(_LAYOUT, *(text.key for text in texts), str(vocab_size))
    return cache.cached(folder / TOKENIZERS / name, train) / FILE
