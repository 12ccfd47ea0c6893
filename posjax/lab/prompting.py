"""Generates text from prompts with a trained run, for ``posjax generate``."""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from posjax.checks import check_at_least
from posjax.encodings.spec import parse_encoding, slug
from posjax.inference.generation import stream
from posjax.inference.sampling import Sampling
from posjax.inference.text import TextRow
from posjax.lab import run as runs
from posjax.lab.config import Config, init_or_check_workdir
from posjax.lab.source import Source, open_source


@dataclasses.dataclass(frozen=True)
class Prompting:
    """Configures generation: the prompts, the sampling, and when to stop.

    Attributes:
      prompt: one or more texts, completed as one batch. Without any, generation starts at the beginning of a document. For a
        synthetic task, words of the task.
      prompt_file: file of UTF-8 text, used as one more prompt. Empty: none.
      max_new_tokens: maximum number of new tokens per prompt.
      temperature: sampling temperature; 0 takes the most likely token.
      top_k: samples from the k most likely tokens only; None means all.
      top_p: samples from the smallest set of most likely tokens with at least this total probability; None means all.
      seed: random seed for sampling (seeds is for training).
      stop: texts that end the output, which does not include them.
    """

    prompt: tuple[str, ...] = ()
    prompt_file: str = ""
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("seed", self.seed, 0)
        if "" in self.stop:
            raise ValueError("stop must not contain an empty text, got ''")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Returns all prompts, with the prompt file's text last.

        Raises:
          ValueError: the file cannot be read as UTF-8 text.
        """
        if not self.prompt_file:
            return self.prompt or ("",)
        try:
            return (*self.prompt, Path(self.prompt_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt_file must be a file of UTF-8 text, got {self.prompt_file!r}: {error}") from None


def continue_prompts(config: Config, prompting: Prompting, write: Callable[[str], None]) -> None:
    """Completes prompts with the newest intact checkpoint and streams each prompt and its completion to ``write``.

    All prompts are completed as one batch. The first completion is written while it is generated; each of the others follows once
    the one before it has ended.

    Args:
      config: the configuration of the run, with a workdir that ``posjax train`` or ``posjax compare`` wrote.
      prompting: the prompts and the sampling.
      write: called with each piece of text.

    Raises:
      ValueError: there is no checkpoint, the workdir belongs to another run, the model cannot read a prompt, or the sequence would
        be longer than the encoding supports.
      CheckpointError: no checkpoint is intact.
    """
    if config.task == "mlm":
        raise ValueError(
            "task must not be 'mlm', because an encoder cannot generate text; use a decoder, such as one trained with --task lm"
        )
    parse_encoding(config.encoding)
    prompts = prompting.prompts
    folder = _trained(config)
    source = open_source(config)
    rows = [_encode(source, text) for text in prompts]
    params = runs.restore_params(config, config.encoding, config.seed, folder, source)
    with_params, _ = runs.abstract_model(config, config.encoding, source)
    end = source.train.bos if source.task is None else source.task.pad_token  # None: no token ends the output
    tokens = stream(
        with_params,
        params,
        rows,
        max_new_tokens=prompting.max_new_tokens,
        sampling=prompting.sampling,
        seed=prompting.seed,
        stop_tokens=() if end is None else (end,),
    )
    bytes_of = token_bytes(source)
    texts = [TextRow(bytes_of, prompting.stop) for _ in rows]
    waiting = ["" if len(prompts) == 1 else f"--- {n} of {len(prompts)}\n" for n in range(1, len(prompts) + 1)]
    waiting = [heading + text for heading, text in zip(waiting, prompts, strict=True)]
    current = 0
    for drawn in tokens:
        for row, (text, token) in enumerate(zip(texts, drawn, strict=True)):
            waiting[row] += text.end() if token < 0 else text.add(int(token))
        while current < len(rows):
            write(waiting[current])
            waiting[current] = ""
            if not texts[current].ended:
                break
            write("\n")
            current += 1
        if current == len(rows):
            return
    for row in range(current, len(rows)):
        write(waiting[row] + texts[row].end() + "\n")


def _trained(config: Config) -> Path:
    """Returns the folder of the run that holds the checkpoints, without creating anything."""
    workdir = Path(config.workdir)
    folder = workdir
    if not (folder / "checkpoints").is_dir():  # a comparison has one folder per encoding and seed
        folder = workdir / slug(config.encoding) / f"seed-{config.seed}"
    if not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"workdir must hold checkpoints, which posjax train and posjax compare write, got {config.workdir!r}: neither "
            f"{workdir / 'checkpoints'} nor {folder / 'checkpoints'} exists"
        )
    stored = workdir / "config.json"
    if stored.exists():
        if folder != workdir:  # the folder name already fixes the encoding and the seed
            with contextlib.suppress(ValueError, KeyError, TypeError):  # init_or_check_workdir reports a broken file
                before = json.loads(stored.read_text())
                config = dataclasses.replace(config, encoding=before["encoding"], seeds=tuple(before["seeds"]))
        init_or_check_workdir(config)
    return folder


def _encode(source: Source, text: str) -> np.ndarray:
    """Encodes a prompt as token ids: a text becomes the beginning of a document, a prompt of a synthetic task a row of its words.

    Raises:
      ValueError: a prompt of a synthetic task is empty, or has a word that is not in the task's vocabulary.
    """
    if source.task is None:
        return np.concatenate([[source.train.bos], source.train.encode(text)]).astype(np.int32)
    words = text.split()
    if not words:
        known = ", ".join(source.task.words[:20])
        raise ValueError(f"prompt must have at least one word of {source.task.name}, such as {known}; got {text!r}")
    for word in words:
        if word not in source.task.words:
            near = difflib.get_close_matches(word, source.task.words, n=1)
            raise ValueError(
                f"prompt must be words of {source.task.name}, {', '.join(source.task.words[:20])}, got {word!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    return np.asarray([source.task.words.index(word) for word in words], np.int32)


def token_bytes(source: Source) -> Callable[[int], bytes]:
    """Returns a function from a token id to the bytes that it adds to a text; one character may span several tokens."""
    if source.task is not None:
        return lambda token: f" {source.task.words[token]}".encode()
    return source.train.token_bytes
