"""Generates text from prompts with a trained run, for ``posjax generate``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from posjax.checks import bounded, check_fields, short
from posjax.encodings.spec import parse_encoding
from posjax.inference.generation import stream
from posjax.inference.sampling import Sampling
from posjax.inference.text import TextRow
from posjax.lab.config import Config
from posjax.lab.trained import TrainedRun, one_run, open_pretrained, open_trained, task_tokens


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
    max_new_tokens: int = bounded(256, least=1)
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = bounded(0, least=0)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
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
            if Path(self.prompt_file).exists() and not Path(self.prompt_file).is_file():
                raise OSError("it is no regular file")
            return (*self.prompt, Path(self.prompt_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # not UTF-8, or a name with a null character
            why = error.strerror or error if isinstance(error, OSError) else error
            raise ValueError(f"prompt_file must be a file of UTF-8 text, got {short(self.prompt_file)}: {why}") from None


def continue_prompts(config: Config, prompting: Prompting, write: Callable[[str], None], *, is_pretrained: bool = False) -> None:
    """Completes prompts with the newest intact checkpoint and streams each prompt and its completion to ``write``.

    All prompts are completed as one batch. The first completion is written while it is generated; each of the others follows once
    the one before it has ended.

    Args:
      config: the configuration of the run, with a workdir that ``posjax train`` or ``posjax compare`` wrote.
      prompting: the prompts and the sampling.
      write: called with each piece of text.
      is_pretrained: whether the model is the checkpoint in ``from_pretrained`` instead of a run.

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
    run = open_pretrained(config) if is_pretrained else open_trained(*one_run(config))
    rows = [_encode(run, text) for text in prompts]
    tokens = stream(
        run.with_params,
        run.params,
        rows,
        max_new_tokens=prompting.max_new_tokens,
        sampling=prompting.sampling,
        seed=prompting.seed,
        stop_tokens=[end for end in ((run.task.pad_token,) if run.task else run.tokenizer.stop_tokens) if end is not None],
    )
    bytes_of = token_bytes(run)
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


def _encode(run: TrainedRun, text: str) -> np.ndarray:
    """Encodes a prompt as token ids: a text becomes the beginning of a document, a prompt of a synthetic task a row of its words.

    Raises:
      ValueError: a prompt of a synthetic task is empty, or has a word that is not in the task's vocabulary.
    """
    if run.task is not None:
        return task_tokens(run.task, text, "prompt")
    return run.tokenizer.prompt(text)


def token_bytes(run: TrainedRun) -> Callable[[int], bytes]:
    """Returns a function from a token id to the bytes that it adds to a text; one character may span several tokens."""
    if run.task is not None:
        words = run.task.words
        return lambda token: f" {words[token]}".encode()
    return run.tokenizer.token_bytes
