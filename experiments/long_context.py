"""Code that the experiments with SmolLM2 on long texts share: the texts, and the loss of every token, stored. Not a program."""

import hashlib
import io
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.files import write_atomically
from posjax.models.pretrained.tokenizer import PretrainedTokenizer
from posjax.models.transformer import Transformer
from posjax.typing import Params

THETA, TRAINED, LONGEST, HEAD_DIM = 100_000.0, 8192, 32_768, 64
MODULES = ("_pydecimal.py", "tkinter/__init__.py")  # long files of Python's library
_QUANTUM = 1024  # losses are stored as multiples of 1 / _QUANTUM nats


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


class Store:
    """Keeps arrays of finished passes in one .npz file, which is written after each, so that a program resumes where it stopped.

    Args:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.arrays: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}

    def get(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the array of a key, which is made and stored if there is none."""
        if key not in self.arrays:
            self.arrays[key] = make()
            content = io.BytesIO()
            np.savez_compressed(content, **self.arrays)
            write_atomically(self.path, content.getvalue())
        return self.arrays[key]


def losses_of(
    store: Store,
    name: str,
    model: Callable[[], tuple[Callable[[Params], Transformer], Params]],
    tokens: np.ndarray,
) -> np.ndarray:
    """Returns the loss of each token but the first, nats, float64 [T], from the store or by a pass that is stored there.

    Losses are rounded to multiples of 1/1024 nats.

    Args:
      store: where losses are stored.
      name: what is read by which model; the key, together with the number and a digest of the tokens.
      model: returns the model as ``functional`` does; not called if the losses are stored.
      tokens: integers [T + 1].
    """

    def make() -> np.ndarray:
        with_params, params = model()
        began = time.perf_counter()
        row = tokens[None].astype(np.int32)
        program = jax.jit(lambda p, x, y, w: with_params(p).losses(x, y, w))
        losses = np.asarray(program(params, row[:, :-1], row[:, 1:], np.ones((1, len(tokens) - 1), np.float32)))[0]
        print(f"{name}: {len(losses):,} tokens in {time.perf_counter() - began:,.0f} s, {losses.mean():.3f} nats", flush=True)
        if not np.isfinite(losses).all():
            raise SystemExit(f"{name}: a loss is not finite")
        return np.minimum(np.round(_QUANTUM * losses), 2**16 - 1).astype(np.uint16)

    return store.get(f"{name}|{len(tokens) - 1}|{digest(tokens)}", make) / _QUANTUM


def digest(tokens: np.ndarray) -> str:
    """Returns the beginning of the SHA-256 of tokens, which says whether two machines read the same text."""
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]


def perplexities(losses: np.ndarray, lengths: Sequence[int]) -> list[float]:
    """Returns exp(mean loss) of the first tokens of a text, for each number of tokens."""
    return [float(np.exp(losses[:length].mean(dtype=np.float64))) for length in lengths]


def fine_tune(workdir: Path, model: Path, english: Path, **flags: Any) -> None:
    """Fine-tunes a checkpoint by ``posjax train``, or resumes; half of the rows are English, half Python's library.

    Args:
      workdir: folder of the run.
      model: the checkpoint.
      english: file of English text.
      **flags: encoding, seeds, seq_length, steps, learning_rate and other flags.
    """
    shared = dict(batch_size=1, warmup_steps=max(1, flags["steps"] // 15), weight_decay=0.0, beta2=0.95, keep_last=1)
    shared |= dict(checkpoint_every=max(1, flags["steps"] // 2), eval_lengths=1, eval_tokens=flags["seq_length"])
    paths = dict(from_pretrained=model, data=f"{english}:0.5,stdlib:0.5", workdir=workdir)
    command = [sys.executable, "-m", "posjax", "train"]
    for flag, value in (paths | shared | flags).items():
        command += [f"--{flag}", str(value)]
    subprocess.run(command, check=True)
