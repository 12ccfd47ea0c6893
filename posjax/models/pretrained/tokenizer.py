"""The tokenizer of a checkpoint: its tokenizer.json, or that of its GGUF file, and which of its tokens begin and end a text."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posjax.checks import checked
from posjax.data.corpus import cache_folder
from posjax.data.gguf_file import read_gguf
from posjax.data.sources import TOKENIZERS
from posjax.data.tokenizers import Vocabulary, cached_tokenizer, import_tokenizers, load_tokenizer, num_ids
from posjax.files import read_json
from posjax.models.pretrained.files import Checkpoint, open_checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedTokenizer(Vocabulary):
    """Converts between text and the tokens of a model that was trained elsewhere.

    Attributes:
      vocab_size: V of the model, whose last ids its tokenizer may not use.
      tokenizer_path: path of a tokenizer.json in the cache.
      special_ids: the token that begins a document, twice: a decoder has no [MASK].
      adds_bos: whether a prompt begins with this token.
      stop_tokens: ids that end a generated text.
      num_bytes: length of a text in bytes, as in ``Vocabulary``; 0, because there is none.
    """

    vocab_size: int
    tokenizer_path: Path
    special_ids: tuple[int, int]
    adds_bos: bool = False
    stop_tokens: tuple[int, ...] = ()
    num_bytes: int | None = 0

    @checked()
    def encode(self, text: str | bytes, *, special: bool = False) -> np.ndarray:
        """Encodes a text as tokens, int32 [n].

        Args:
          text: the text.
          special: whether names of special tokens in the text, such as "<|im_start|>", are these tokens. By default they are text.

        Returns:
          The tokens.
        """
        if not special:
            return super().encode(text)
        content = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return np.asarray(_with_special_tokens(self.tokenizer_path).encode(content, add_special_tokens=False).ids, np.int32)

    def prompt(self, text: str) -> np.ndarray:
        """Encodes a prompt, int32 [n], with special tokens, and with ``bos`` if the model expects it or the text is empty.

        Args:
          text: the text.

        Returns:
          The tokens.
        """
        tokens = self.encode(text, special=True)
        begins = len(tokens) > 0 and tokens[0] == self.bos
        return tokens if len(tokens) and (begins or not self.adds_bos) else np.concatenate([[self.bos], tokens]).astype(np.int32)


def tokenizer_of(source: str | os.PathLike | Checkpoint, *, data_dir: str | Path | None = None) -> PretrainedTokenizer:
    """Returns the tokenizer of a checkpoint.

    Args:
      source: a folder with config.json and tokenizer.json, a .gguf file, or a checkpoint that is open.
      data_dir: folder of the caches, by default $POSJAX_DATA_DIR or ~/.cache/posjax.

    Raises:
      ValueError: there is no tokenizer, it cannot be used, it has more ids than the model, or config.json names no token that
        begins a text.
      ImportError: tokenizers is not installed.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.tokenizer is None:
        raise ValueError(f"path must hold a tokenizer.json, got {str(checkpoint.path)!r} without one")
    path = cached_tokenizer(str(checkpoint.tokenizer), cache_folder(data_dir) / TOKENIZERS)
    size, own = int(checkpoint.config["vocab_size"]), num_ids(path)
    if own > size:
        raise ValueError(f"{checkpoint.path}: the tokenizer must have at most the {size:,} ids of the model, got {own:,}")
    return opened(with_all_stops(checkpoint), path, adds_bos(checkpoint))


def opened(config: Mapping[str, Any], path: Path, adds_bos: bool) -> PretrainedTokenizer:
    """Returns a tokenizer from a config.json, the tokenizer.json, and whether prompts begin with bos."""
    begin, stops = special_tokens(config)
    return PretrainedTokenizer(int(config["vocab_size"]), path, (begin, begin), adds_bos, stops)


def with_all_stops(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns config.json with the stop tokens of generation_config.json too: chat models often end a turn by another token."""
    config, path = dict(checkpoint.config), checkpoint.path / "generation_config.json"
    if not path.is_file():
        return config
    stops = [token for one in (config, read_json(path)) for token in _stops(one)]
    return config | ({"eos_token_id": list(dict.fromkeys(stops))} if stops else {})


def _stops(config: Mapping[str, Any]) -> tuple[int, ...]:
    ends = config.get("eos_token_id")
    return tuple(map(int, ends)) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),)


def special_tokens(config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Returns the token that begins a document, and those that end a text, by config.json.

    Raises:
      ValueError: it names neither.
    """
    stops = _stops(config)
    begin = config.get("bos_token_id")
    begin = (stops or (None,))[0] if begin is None else begin
    if begin is None:
        raise ValueError("config.json must have bos_token_id or eos_token_id, got neither")
    return int(begin), stops


def adds_bos(checkpoint: Checkpoint) -> bool:
    """Returns whether the tokenizer of a checkpoint puts ``bos`` before a text."""
    if checkpoint.tokenizer is None:
        return False
    if checkpoint.tokenizer.suffix.lower() == ".gguf":
        keys = read_gguf(checkpoint.tokenizer).keys
        return bool(keys.get("tokenizer.ggml.add_bos_token", keys.get("tokenizer.ggml.model") == "llama"))
    begin, _ = special_tokens(checkpoint.config)
    settings = checkpoint.path / "tokenizer_config.json"
    if settings.is_file() and (stated := read_json(settings).get("add_bos_token")) is not None:
        return bool(stated)
    return load_tokenizer(checkpoint.tokenizer).encode("", add_special_tokens=True).ids[:1] == [begin]


@functools.lru_cache(maxsize=8)
def _with_special_tokens(path: Path) -> Any:
    """Loads a tokenizer that reads the names of special tokens as these tokens."""
    tokenizer = import_tokenizers().Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
