"""A corpus: the tokens of one split of a text source, flat on disk, with the places where documents begin.

Sources are TFDS data sets (the Python standard library's own source code by default) and files or folders of text.
Tokens are bytes, or a byte-level BPE trained on the train split. Both are cached under the data directory, under names
that change with the text, and every cache entry is built aside and then renamed into place, so that two processes at
once, or one that is killed half-way, leave nothing wrong behind.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from posjax.datasets.files import VALIDATION_SHARE, list_files, read_file, validation_paths

NUM_BYTES = 256
NUM_SPECIAL = 2  # beginning of a document (and [CLS]), [MASK]
DEFAULT_BPE_VOCAB = 8192
SPLITS = ("train", "validation")
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
        or the path of a folder of UTF-8 text files, one file in ten held out (hidden ones are ignored), or of one
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
        raise ValueError(f"tokenizer must be 'bytes' or 'bpe', got {tokenizer!r}{_near(tokenizer, ('bytes', 'bpe'))}")
    if tokenizer == "bytes" and vocab_size not in (None, NUM_BYTES + NUM_SPECIAL):
        raise ValueError(f"vocab_size must be 258 or left out when tokenizer is 'bytes', got {vocab_size!r}")
    vocab_size = DEFAULT_BPE_VOCAB if vocab_size is None else vocab_size
    if tokenizer == "bpe" and vocab_size <= NUM_BYTES + NUM_SPECIAL:
        raise ValueError(f"vocab_size must be at least 259 when tokenizer is 'bpe', got {vocab_size!r}")

    given = data_dir or os.environ.get("POSJAX_DATA_DIR")
    cache = Path(given or "~/.cache/posjax").expanduser()
    text = _open_source(str(source), cache, Path(given).expanduser() if given else None)
    if not text.has_split(split):
        raise ValueError(f"split must be one of {', '.join(text.splits)}, got {split!r}{_near(split, text.splits)}")
    tokenizer_path = _trained_bpe(text, vocab_size, cache) if tokenizer == "bpe" else None
    name = _cache_name(text.key, split, tokenizer, str(vocab_size) if tokenizer_path else "")
    folder = _build_once(cache / "corpora" / name, lambda new: _write_corpus(new, text, split, tokenizer_path))
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


def unigram_bits_per_byte(corpus: Corpus) -> float:
    """Bits a byte of a model that knows how frequent each token is and nothing else: what any model must beat.

    It is the entropy of the corpus's own token frequencies times tokens per byte.
    """
    counts = np.bincount(corpus.tokens, minlength=1).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * len(corpus.tokens) / corpus.num_bytes)


# ------------------------------------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class _Text:
    """A source that is open: `documents(split)` gives its texts, and `key` changes whenever they do."""

    key: str
    documents: Callable[[str], Iterator[bytes]]
    splits: tuple[str, ...] = SPLITS

    def has_split(self, split: str) -> bool:
        return split.partition("[")[0] in self.splits if self.key.startswith("tfds:") else split in self.splits


def _near(word: str, candidates) -> str:
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _open_source(source: str, cache: Path, tfds_dir: Path | None) -> _Text:
    if source == "stdlib":
        return _open_stdlib(cache)
    if source.startswith("tfds:"):
        return _open_tfds(source, tfds_dir)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path.resolve())
    if path.is_file():
        return _open_file(path.resolve())
    siblings = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = _near(source, ["stdlib", *siblings])
    raise ValueError(f"source must be 'stdlib', 'tfds:NAME' or a file or folder that exists, got {source!r}{hint}")


def _import_tfds():
    try:
        import array_record  # noqa: F401 (what the files are read with)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"this source needs tensorflow-datasets and array_record ({error}): "
            "pip install tensorflow-datasets importlib_resources array_record grain"
        ) from error
    return tfds


def _prepare(make_builder, progress):
    """Builds a TFDS data set if need be. TFDS builds aside and renames; here the loser of a race takes the winner's."""
    builder = make_builder()
    try:
        with contextlib.redirect_stdout(progress), contextlib.redirect_stderr(progress):
            builder.download_and_prepare()
    except Exception:
        builder = make_builder()
        if not builder.data_path.exists():
            raise
    return builder


def _open_stdlib(cache: Path) -> _Text:
    from posjax.datasets.stdlib_source import source_name

    def documents(split):
        _import_tfds()
        from posjax.datasets.stdlib_source.stdlib_source_dataset_builder import Builder

        builder = _prepare(lambda: Builder(data_dir=str(cache / "tfds"), file_format="array_record"), io.StringIO())
        for example in builder.as_data_source(split=split):
            yield example["text"]

    return _Text(f"stdlib:{source_name()}", documents)


def _open_tfds(source: str, data_dir: Path | None) -> _Text:
    tfds = _import_tfds()
    name, _, feature = source.removeprefix("tfds:").partition(":")
    if feature[:1].isdigit():  # "NAME:1.0.0" is a version
        version, _, feature = feature.partition(":")
        name = f"{name}:{version}"
    try:
        where = {"data_dir": str(data_dir / "tfds")} if data_dir else {}
        builder = _prepare(lambda: tfds.builder(name, file_format="array_record", **where), sys.stderr)
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        hint = _near(name.partition("/")[0], names)
        raise ValueError(f"source names a data set that TFDS does not know, got {source!r}{hint}") from error
    feature = _text_feature(tfds, builder, feature, source)
    split_of = {split: split for split in builder.info.splits}
    if "validation" not in split_of and "train" in split_of:
        border = f"{round(100 * (1 - VALIDATION_SHARE))}%"
        split_of |= {"train": f"train[:{border}]", "validation": f"train[{border}:]"}

    def documents(split):
        for example in builder.as_data_source(split=split_of.get(split, split)):
            yield bytes(example[feature])

    return _Text(f"tfds:{builder.info.full_name}:{feature}", documents, tuple(split_of))


def _text_feature(tfds, builder, feature: str, source: str) -> str:
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    if feature:
        if feature not in texts:
            raise ValueError(f"source must name a text feature of {texts}, got {source!r}{_near(feature, texts)}")
        return feature
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise ValueError(f"source must name one text feature of {texts}, as in 'tfds:NAME:FEATURE', got {source!r}")


def _state(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size}:{facts.st_mtime_ns}"


def _read_text(path: Path) -> bytes:
    data = read_file(path)
    try:
        data.decode()
        place = data.find(b"\0")
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        raise ValueError(
            f"source must hold UTF-8 text only, {path} has the byte {data[place]:#04x} at {place}; "
            "convert it or move it elsewhere"
        )
    return data


def _open_folder(folder: Path) -> _Text:
    paths = list_files(folder, lambda path: not path.name.startswith("."))
    if len(paths) == 1:
        return _open_file(folder / paths[0])
    held_out = validation_paths(paths)
    state = [f"{path}:{_state(folder / path) if (folder / path).exists() else ''}" for path in paths]

    def documents(split):
        for path in paths:
            if (path in held_out) == (split == "validation"):
                yield _read_text(folder / path)

    return _Text("\n".join([f"folder:{folder}", *state]), documents)


def _open_file(path: Path) -> _Text:
    def documents(split):
        data = _read_text(path)
        border = int(len(data) * (1 - VALIDATION_SHARE))
        line_end = data.find(b"\n", border) + 1
        border = line_end if 0 < line_end < len(data) else border
        while 0 < border < len(data) and data[border] & 0xC0 == 0x80:
            border += 1  # never inside a character
        yield data[border:] if split == "validation" else data[:border]

    return _Text(f"file:{path}:{_state(path)}", documents)


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


def _write_corpus(folder: Path, text: _Text, split: str, tokenizer_path: Path | None) -> None:
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


def _trained_bpe(text: _Text, vocab_size: int, cache: Path) -> Path:
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
    return _build_once(cache / "tokenizers" / _cache_name(text.key, str(vocab_size)), train) / "bpe.json"
