"""Tokenizers: bytes, a BPE trained on the corpus, a tokenizer.json, or the tokenizer of a GGUF file.

All but bytes are files of Hugging Face's tokenizers library, kept in the cache under a name that depends on their content. Text is
encoded in chunks on all cores, so that memory does not grow with the length of a document.
"""

import codecs
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from posjax.checks import check, checked, near, require, short
from posjax.data import cache

BYTES, BPE = KINDS = ("bytes", "bpe")
NUM_BYTES = 256
NUM_SPECIAL = 2  # bos (which is also [CLS]) and [MASK]
DEFAULT_BPE_VOCAB = 8192
MAX_BPE_TEXT = 2**28  # bytes of text from which a BPE is learned
CHUNK = 2**16  # characters that are encoded as one text
_BATCH = 2**21  # characters that are encoded at once: the library takes about 70 bytes per character while it encodes
FILE = "tokenizer.json"

# Where a text may be split without a change of its tokens: no pre-tokenizer in use joins a newline or a space that follows a
# visible character to what comes after the newline, or before the space.
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_WORD_START = re.compile(r"(?<=\S)(?= \S)")


class Vocabulary:
    """Converts between text and the tokens of a corpus: the ids of its tokenizer, followed by two special ones.

    Attributes:
      vocab_size: V.
      special_ids: `bos` and `mask` of a model that was trained elsewhere, which are ids of its tokenizer; None: the two last ids.
      tokenizer_path: path of a tokenizer.json. None: tokens are bytes, or ids of a tokenizer that is not known.
      num_bytes: length of the text in bytes; None where tokens are ids and the tokenizer is not known.
    """

    vocab_size: int
    tokenizer_path: Path | None
    num_bytes: int | None
    special_ids: tuple[int, int] | None = None

    @property
    def bos(self) -> int:
        """Returns the id of the token that begins a document; 256 for bytes."""
        return self.vocab_size - 2 if self.special_ids is None else self.special_ids[0]

    @property
    def cls(self) -> int:
        """Returns the id of [CLS], the first token of each row of a masked model; the same as `bos`."""
        return self.bos

    @property
    def mask(self) -> int:
        """Returns the id of [MASK]; 257 for bytes."""
        return self.vocab_size - 1 if self.special_ids is None else self.special_ids[1]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Returns the ids that end a generated text."""
        return (self.bos,)

    def prompt(self, text: str) -> np.ndarray:
        """Encodes a text as the beginning of a document, int32 [n]: ``bos`` and the text's tokens."""
        return np.concatenate([[self.bos], self.encode(text)]).astype(np.int32)

    @property
    def has_text(self) -> bool:
        """Returns whether tokens can be converted to text."""
        return self.num_bytes is not None or self.tokenizer_path is not None

    @property
    def is_bytes(self) -> bool:
        """Returns whether tokens are the bytes of the text."""
        return self.has_text and self.tokenizer_path is None

    @checked()
    def encode(self, text: str | bytes) -> np.ndarray:
        """Encodes a text as tokens, int32 [n], without `bos`. Without a tokenizer, a text is token ids such as "17 4 1023".

        Raises:
          ValueError: the text is not ids of this corpus.
        """
        if not self.has_text:
            return self._parse_ids(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        data = text.encode() if isinstance(text, str) else text
        tokens = [tokens for _, tokens in encode([[data]], self.tokenizer_path)]
        return np.concatenate([*tokens, np.zeros(0, np.int32)]).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes a row of tokens to text. Special tokens appear as <bos> and <mask>.

        Raises:
          ValueError: a token is not an id of this corpus.
        """
        try:
            ids = np.asarray(tokens).ravel()
        except (TypeError, ValueError):  # keys of random numbers, or rows of different lengths
            ids = np.zeros(1)
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got {short(tokens)}")
        tokens = ids
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens must lie in [0, {self.vocab_size - 1}], got {tokens.min()} to {tokens.max()}")
        pieces, start = [], 0
        is_special = (tokens >= self.bos) & (self.special_ids is None)  # else they are tokens of the tokenizer
        for end in [*np.flatnonzero(is_special), len(tokens)]:
            pieces.append(self._decode(tokens[start:end]))
            if end < len(tokens):
                pieces.append("<bos>" if tokens[end] == self.bos else "<mask>")
            start = end + 1
        return "".join(pieces)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that a token adds to a text; one character may span several tokens."""
        if token >= self.bos and self.special_ids is None:
            return b"<bos>" if token == self.bos else b"<mask>"
        if self.tokenizer_path is not None:
            return token_table(self.tokenizer_path)(token)
        return bytes([token]) if self.is_bytes else f" {token}".encode()

    def _decode(self, tokens: np.ndarray) -> str:
        if self.tokenizer_path is not None:
            return load_tokenizer(self.tokenizer_path).decode(tokens.tolist(), skip_special_tokens=False)
        if self.is_bytes:
            return tokens.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return " ".join(map(str, tokens.tolist()))

    def _parse_ids(self, text: str) -> np.ndarray:
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.bos for word in words):
            raise ValueError(
                f"text must be token ids below {self.bos}, such as '17 4 102', because the tokenizer of this corpus is not known, "
                f"got {text[:80]!r}; with tokenizer='path of its tokenizer.json' it can be text"
            )
        return np.asarray([int(word) for word in words], np.int32)


# Which tokenizer ------------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: str) -> None:
    """Raises ValueError if ``tokenizer`` is neither "bytes" nor "bpe" nor named like a tokenizer's file."""
    check("tokenizer", tokenizer, str)
    if tokenizer not in KINDS and Path(tokenizer).suffix.lower() not in (".json", ".gguf"):
        raise ValueError(
            f"tokenizer must be 'bytes', 'bpe', or the path of a tokenizer.json or a .gguf file, got {tokenizer!r}"
            f"{near(tokenizer, KINDS)}"
        )


def check_vocab_size(tokenizer: str, vocab_size: int | None) -> None:
    """Raises ValueError if a tokenizer cannot have this size."""
    if vocab_size is None:
        return
    if tokenizer == BYTES and vocab_size != NUM_BYTES + NUM_SPECIAL:
        raise ValueError(f"vocab_size must be 258 or None with tokenizer='bytes', got {vocab_size!r}")
    if tokenizer == BPE:
        check("vocab_size", vocab_size, int)
        if vocab_size <= NUM_BYTES + NUM_SPECIAL:
            raise ValueError(f"vocab_size must be at least 259 with tokenizer='bpe', got {vocab_size!r}")
    elif tokenizer != BYTES:
        raise ValueError(f"vocab_size must be None with the tokenizer of a file, which has its own, got {vocab_size!r}")


def cached_tokenizer(tokenizer: str, folder: Path) -> Path:
    """Returns the path of a tokenizer.json in the cache, with the content of a file or converted from a GGUF file.

    Args:
      tokenizer: path of a tokenizer.json or a .gguf file.
      folder: folder of the cache for tokenizers.

    Raises:
      ValueError: there is no such file, or it holds no tokenizer that can be used.
      ImportError: a package that reads it is not installed.
    """
    path = Path(os.path.expanduser(tokenizer))
    if not os.path.isfile(path):
        near_by = [str(path.parent / name) for name in os.listdir(path.parent)] if os.path.isdir(path.parent) else []
        raise ValueError(f"tokenizer must be an existing file, got {tokenizer!r}{near(tokenizer, near_by)}")
    if path.suffix.lower() == ".gguf":  # the file may be as large as a model: it is not read whole
        from posjax.data.gguf_tokenizer import convert

        stat = path.stat()
        name = cache.entry_name("gguf", str(path.resolve()), str(stat.st_size), str(stat.st_mtime_ns))
        return cache.cached(folder / name, lambda new: _check_file(new / FILE, convert(path), tokenizer)) / FILE
    text = path.read_bytes()
    name = cache.entry_name("json", cache.file_digest(path))
    return cache.cached(folder / name, lambda new: _check_file(new / FILE, text, tokenizer)) / FILE


def _check_file(path: Path, content: bytes, source: str) -> None:
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer.__wrapped__(path)
    except ImportError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(
            f"tokenizer must be a tokenizer.json of the tokenizers library, got {source!r}: {str(error)[:200]}"
        ) from None
    if not tokenizer.get_vocab_size():
        raise ValueError(f"tokenizer must have a vocabulary, got {source!r} without one")


def import_tokenizers() -> Any:
    require("a tokenizer other than bytes", "tokenizers")
    import tokenizers

    return tokenizers


@functools.lru_cache(maxsize=8)  # a file in the cache never changes
def load_tokenizer(path: Path) -> Any:
    """Loads a tokenizers.Tokenizer that encodes all text, special tokens' names included, without truncation or padding."""
    return _prepare(import_tokenizers().Tokenizer.from_file(str(path)))


def _prepare(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    return tokenizer


@functools.lru_cache(maxsize=8)
def num_ids(path: Path | None) -> int:
    """Returns the number of ids of a tokenizer without the two special ones: its highest id plus one; 256 for bytes."""
    return NUM_BYTES if path is None else max(load_tokenizer(path).get_vocab(with_added_tokens=True).values()) + 1


def train_bpe(texts: Iterator[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE and writes it to ``path``.

    Args:
      texts: chunks of documents; the library takes about 200 times the memory of the longest.
      vocab_size: V, including the two special ids.
      path: the tokenizer.json to write.
    """
    tokenizers = import_tokenizers()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(path))


# Encoding -------------------------------------------------------------------------------------------------------------


def encode(documents: Iterable[Iterable[bytes]], path: Path | None) -> Iterator[tuple[int, np.ndarray]]:
    """Encodes documents, on all cores.

    Args:
      documents: pieces of each document.
      path: the tokenizer.json; None: bytes.

    Yields:
      (document number, tokens [n]) for consecutive parts of documents.
    """
    if path is None:
        for number, document in enumerate(documents):
            for piece in document:
                yield number, np.frombuffer(piece, np.uint8)
        return
    first, later = load_tokenizer(path), _continuing(path)
    for batch in _batches(documents):
        texts = [text for _, _, text in batch]
        if later is first:
            encoded = first.encode_batch_fast(texts, add_special_tokens=False)
        else:
            begins = iter(first.encode_batch_fast([text for _, is_first, text in batch if is_first], add_special_tokens=False))
            rest = iter(later.encode_batch_fast([text for _, is_first, text in batch if not is_first], add_special_tokens=False))
            encoded = [next(begins if is_first else rest) for _, is_first, _ in batch]
        for (number, _, _), encoding in zip(batch, encoded, strict=True):
            yield number, np.asarray(encoding.ids, np.int64)


def chunks(pieces: Iterable[bytes]) -> Iterator[str]:
    """Splits a document into texts of about ``CHUNK`` characters, at places where this does not change its tokens.

    Invalid UTF-8 becomes U+FFFD. Where no such place comes for 16 chunks, the text is split anywhere.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for piece in itertools.chain(pieces, [None]):
        held += decoder.decode(b"", True) if piece is None else decoder.decode(piece)
        start = 0
        while len(held) - start > 2 * CHUNK:
            cut = _border(held, start + CHUNK)
            if cut is None:
                break
            yield held[start:cut]
            start = cut
        held = held[start:]
    if held:
        yield held


def _border(text: str, begin: int) -> int | None:
    """Returns the first place from ``begin`` on at which a text can be split; None if there is none and the text is not long."""
    for pattern, limit in ((_LINE_END, begin + 3 * CHUNK), (_WORD_START, begin + 15 * CHUNK)):
        if match := pattern.search(text, begin, limit):
            return match.end()
    return begin + 15 * CHUNK if len(text) > begin + 15 * CHUNK else None


def _batches(documents: Iterable[Iterable[bytes]]) -> Iterator[list[tuple[int, bool, str]]]:
    """Yields lists of (document number, whether it is the first of the document, text), each of about ``_BATCH`` characters."""
    batch, size = [], 0
    for number, document in enumerate(documents):
        for index, text in enumerate(chunks(document)):
            batch.append((number, index == 0, text))
            size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=8)
def _continuing(path: Path) -> Any:
    """Returns the tokenizer for the later chunks of a document: without the space that SentencePiece puts before a text."""
    before = json.loads(path.read_text(encoding="utf-8"))
    after = before | {name: _without_prefix(before.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return load_tokenizer(path) if after == before else _prepare(import_tokenizers().Tokenizer.from_str(json.dumps(after)))


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = part and part["type"]
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {name: value for name, value in part.items() if name != "add_prefix_space"} | {"prepend_scheme": "never"}
    if kind == "ByteLevel" and "add_prefix_space" in part:
        return part | {"add_prefix_space": False}
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        first = _without_prefix(part[name][0]) if part[name] else None  # later ones see words, and put a space before each
        rest = part[name][1:]
        return part | {name: [*([first] if first else []), *rest]}
    return part


# Bytes of tokens ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def token_table(path: Path) -> Callable[[int], bytes]:
    """Returns a function from an id of a tokenizer to the bytes that it adds to a text."""
    tokenizer = load_tokenizer(path)
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    convert = _converter(json.loads(path.read_text(encoding="utf-8")))

    def of(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        text = tokenizer.id_to_token(token)
        return b"" if text is None else convert(text)

    return of


def _converter(content: dict[str, Any]) -> Callable[[str], bytes]:
    """Returns a function from the text of a token in the vocabulary to its bytes, by the decoder of the tokenizer."""
    decoder = content.get("decoder") or {}
    steps = {step["type"]: step for step in [decoder, *decoder.get("decoders", ())] if step}
    if "ByteLevel" in steps:
        byte_of = byte_level_alphabet()
        return lambda text: b"".join(byte_of[c] if c in byte_of else c.encode() for c in text)
    if "WordPiece" in steps:
        prefix = steps["WordPiece"].get("prefix", "##")
        return lambda text: (text.removeprefix(prefix) if text.startswith(prefix) else f" {text}").encode()
    if "BPEDecoder" in steps:
        suffix = steps["BPEDecoder"].get("suffix", "</w>")
        return lambda text: text.replace(suffix, " ").encode()
    if "Metaspace" in steps or "Replace" in steps:
        replaced = steps["Metaspace"].get("replacement", "▁") if "Metaspace" in steps else steps["Replace"]["pattern"]["String"]
        new = " " if "Metaspace" in steps else steps["Replace"]["content"]
        falls_back = "ByteFallback" in steps

        def convert(text: str) -> bytes:
            if falls_back and re.fullmatch("<0x[0-9A-F]{2}>", text):
                return bytes([int(text[3:5], 16)])
            return text.replace(replaced, new).encode()

        return convert
    return lambda text: text.encode() if decoder else f" {text}".encode()  # without a decoder, the library joins with spaces


@functools.cache
def byte_level_alphabet() -> dict[str, bytes]:
    """Returns the byte of each character of a byte-level BPE: GPT-2's table.

    Printable bytes are written as themselves, and the others as characters from 256 on.
    """
    printable = [b for first, last in ("!~", "¡¬", "®ÿ") for b in range(ord(first), ord(last) + 1)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
