"""The tokenizer of a GGUF file, converted to a tokenizer.json.

A GGUF file stores what llama.cpp needs: the tokens, their kinds, merges or scores, and the name of a pre-tokenizer. Two of its
models are converted: "gpt2", a byte-level BPE with merges, and "llama", SentencePiece's BPE with scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax.data.gguf_file import read_gguf
from posjax.files import DamagedFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of tokens; 5 is unused, and 6 a byte
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (  # GPT-4's pattern, with the number of digits that are one word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2, _DIGITS = (_GPT4 % "{1,3}",), (_GPT4 % "",), (r"\p{N}", _GPT2)
# Names of pre-tokenizers, and the patterns by which they split a text, one after the other.
PATTERNS = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "pixtral", "lfm2", "glm4"), _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan"), _QWEN2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"}  # a word that is a token is not merged from parts


def convert(path: Path) -> bytes:
    """Returns the content of a tokenizer.json for the tokenizer of a GGUF file.

    Raises:
      ValueError: the file is not GGUF, has no tokenizer, or has one of a kind that cannot be converted.
      ImportError: tokenizers is not installed.
    """
    try:
        keys = read_gguf(path).keys
    except DamagedFile as error:
        raise ValueError(f"tokenizer must be a GGUF file: {error}") from None

    def get(name: str, default: Any = None) -> Any:
        return keys.get(f"tokenizer.ggml.{name}", default)

    model, tokens = get("model"), get("tokens")
    if model is None or not tokens:
        raise ValueError(f"tokenizer must be a GGUF file with a tokenizer, got {str(path)!r} without tokenizer.ggml.tokens")
    kinds = get("token_type") or [_NORMAL] * len(tokens)
    if model == "gpt2":
        tokenizer = _byte_level(tokens, get("merges") or (), get("pre") or "default", path)
    elif model == "llama":
        tokenizer = _sentencepiece(tokens, get("scores") or (), kinds, bool(get("add_space_prefix", True)), path)
    else:
        raise ValueError(f"tokenizer must be a GGUF file with a tokenizer of model gpt2 or llama, got {model!r} in {str(path)!r}")
    _add_tokens(tokenizer, tokens, kinds)
    return tokenizer.to_str().encode()


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str, path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in PATTERNS:
        raise ValueError(
            f"tokenizer must have one of the pre-tokenizers {', '.join(PATTERNS)}, got {pre!r} in {str(path)!r}; use the model's "
            "tokenizer.json instead"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(_ids(tokens), pairs, ignore_merges=pre in _WORDS_FIRST))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: bool, path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer must have a score for each token, got {len(scores)} scores of {len(tokens)} in {str(path)!r}")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(_ids(tokens), _merges(tokens, scores, kinds), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in reversed(list(enumerate(tokens)))}  # of equal tokens, the first


def _merges(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the merges of a SentencePiece BPE, which joins the neighbors whose union has the highest score.

    Every split of a token into two others is a merge. Merges of one score go by the ids of their parts.
    """
    ids = _ids(tokens)
    found = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-score, left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _add_tokens(tokenizer: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    from tokenizers import AddedToken

    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)]
    for kind, add in ((_USER_DEFINED, tokenizer.add_tokens), (_CONTROL, tokenizer.add_special_tokens)):
        add([AddedToken(token, normalized=False, special=kind != _USER_DEFINED) for token, own in added if own == kind])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, own in added if own == _UNKNOWN])
