"""Code that the experiments with SmolLM2 on long texts share: the texts, and the loss of every token, stored. Not a program."""

import hashlib
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from posjax.models.pretrained.tokenizer import PretrainedTokenizer
from posjax.models.transformer import Transformer
from posjax.typing import Params

THETA, TRAINED, LONGEST, HEAD_DIM = 100_000.0, 8192, 32_768, 64
MODULES = ("_pydecimal.py", "tkinter/__init__.py")  # long files of Python's library


def windows(tokenizer: PretrainedTokenizer, english: Path, count: int = 2, length: int = LONGEST) -> dict[str, np.ndarray]:
    """Returns texts of ``length`` + 1 tokens by name: the first of a file of English, and the beginnings of two modules of Python.

    Raises:
      SystemExit: a text is too short.
    """
    tokens = tokenizer.encode(english.read_text(encoding="utf-8"))
    texts = {f"English {n + 1}": tokens[n * length : (n + 1) * length + 1] for n in range(count)}
    for name in MODULES[:count]:
        source = Path(sysconfig.get_paths()["stdlib"], name).read_text(encoding="utf-8")
        texts[f"Python {name}"] = tokenizer.encode(source)[: length + 1]
    if short := [name for name, text in texts.items() if len(text) < length + 1]:
        raise SystemExit(f"{short[0]} must have {length + 1:,} tokens, got {len(texts[short[0]]):,}; give a longer --english")
    return texts


def digests(texts: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the beginning of the SHA-256 of each text's tokens, which says whether two machines read the same text."""
    return {name: hashlib.sha256(text.astype("<i4").tobytes()).hexdigest()[:16] for name, text in texts.items()}


def stored_losses(
    folder: Path,
    name: str,
    with_params: Callable[[Params], Transformer],
    params: Params,
    tokens: np.ndarray,
) -> np.ndarray:
    """Returns the loss of each token but the first, nats, float32 [T], from a file in ``folder`` or by a pass that is stored there.

    Args:
      folder: where losses are stored.
      name: what is read by which model; part of the file's name, together with a digest of the tokens.
      tokens: integers [T + 1].
    """
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:8]
    path = folder / f"{name.replace('/', '_').replace(' ', '_')}-{len(tokens) - 1}-{digest}.npy"
    if path.exists():
        return np.load(path)
    began = time.perf_counter()
    row = tokens[None].astype(np.int32)
    program = jax.jit(lambda p, x, y, w: with_params(p).losses(x, y, w))
    losses = np.asarray(program(params, row[:, :-1], row[:, 1:], np.ones((1, len(tokens) - 1), np.float32)))[0]
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npy")
    np.save(part, losses)
    part.replace(path)
    seconds = time.perf_counter() - began
    print(f"{name}: {len(losses):,} tokens in {seconds:,.0f} s, {losses.mean():.3f} nats", flush=True)
    return losses


def perplexities(losses: np.ndarray, lengths: Sequence[int]) -> list[float]:
    """Returns exp(mean loss) of the first tokens of a text, for each number of tokens."""
    return [float(np.exp(losses[:length].mean(dtype=np.float64))) for length in lengths]
