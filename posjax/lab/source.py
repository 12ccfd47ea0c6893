"""Where batches come from: a corpus or a synthetic task, as a configuration names it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from posjax.data import synthetic
from posjax.data.corpus import Corpus, excerpts, load_corpus
from posjax.data.on_device import on_device as corpus_on_device
from posjax.data.pipeline import batches
from posjax.lab.config import Config
from posjax.typing import Array

EVAL_SEED, _EXAMPLES = 2**31, 2**31 + 1  # seeds of what models are tested on, and of examples that are drawn once
_EVAL_BATCH_TOKENS = 4096  # at least, in a batch of an evaluation: small batches cost more to start than to compute


@dataclasses.dataclass(frozen=True)
class Source:
    """Where batches come from: two splits of a corpus, or a synthetic task.

    Attributes:
      vocab_size: V.
      max_length: the longest sequence that the model will train on.
      train, validation: a text's splits, the second cut down to what is evaluated; None for synthetic tasks.
      task: a synthetic task; None for text.
    """

    vocab_size: int
    max_length: int
    train: Corpus | None = None
    validation: Corpus | None = None
    task: synthetic.Task | None = None


def open_source(config: Config) -> Source:
    """Loads (and on first use prepares) what the configuration trains on."""
    if config.task in ("lm", "mlm"):
        options = dict(
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size if config.tokenizer == "bpe" else None,
            data_dir=config.data_dir or None,
        )
        try:
            train, validation = (load_corpus(config.data, split, **options) for split in ("train", "validation"))
        except ValueError as error:
            raise ValueError(f"data {config.data!r} cannot be used: {error}") from error
        # One token less than the longest rows, which begin with the token that opens a document.
        longest = config.seq_length * max(config.eval_lengths) - 1
        validation = excerpts(validation, longest, max(1, config.eval_tokens // longest))
        return Source(train.vocab_size, config.seq_length, train=train, validation=validation)
    length = config.seq_length
    task = {
        "flip_flop": lambda: synthetic.flip_flop(length=length),
        "selective_copy": lambda: synthetic.selective_copy(num_tokens=length // 2, num_blanks=length // 2),
        "counting": lambda: synthetic.counting(config.num_variables, max_operations=length, length=length),
    }[config.task]()
    return Source(task.vocab_size, max(t.length for t in (task, *task.variants.values())), task=task)


def batch_key(seed: int | Array, number: int | Array) -> Array:
    """The key of one batch of a run whose data are drawn on the device."""
    return jax.random.fold_in(jax.random.key(seed), number)


def on_device(config: Config, source: Source) -> tuple[Any, Callable[[Any, Array], dict[str, Array]]]:
    """(data to put on the device, (data there, ``batch_key``) -> batch), for runs that are one program.

    Of a synthetic task these are the batches of ``train_batches``; of a text, rows drawn with replacement, as they are of a task
    with ``num_examples``, which are the same for every seed.
    """
    if source.task is not None and config.num_examples is None:
        return (), lambda data, key: source.task.batch(key, config.batch_size)
    if source.task is not None:
        examples = _examples(config, source.task)

        def draw(examples: dict[str, Array], key: Array) -> dict[str, Array]:
            index = jax.random.randint(key, (config.batch_size,), 0, config.num_examples)
            return jax.tree.map(lambda x: x[index], examples)

        return examples, draw
    options = dict(length=config.seq_length, batch_size=config.batch_size, masked=config.task == "mlm")
    return corpus_on_device(source.train, **options)


def _examples(config: Config, task: synthetic.Task) -> dict[str, Array]:
    """The rows that a run with ``num_examples`` is trained on, whatever its seed."""
    return jax.jit(lambda: task.batch(jax.random.key(_EXAMPLES), config.num_examples))()


class TaskBatches:
    """Endless batches of a seed, made of data by ``draw`` as ``on_device`` returns them.

    Of each, the rows of ``share``, (index, count). The whole batch is drawn all the same: what a row is depends on its size.
    """

    def __init__(self, data: Any, draw: Callable[[Any, Array], dict[str, Array]], seed: int, share: tuple[int, int] = (0, 1)):
        self.drawn, self.data, self.share = 0, data, share
        self.draw = jax.jit(lambda data, number: draw(data, batch_key(seed, number)))

    def __iter__(self) -> "TaskBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        index, count = self.share

        def own(leaf: np.ndarray) -> np.ndarray:
            rows = len(leaf) // count
            return leaf[index * rows : (index + 1) * rows]

        return jax.tree.map(own, jax.device_get(self.draw(self.data, self.drawn - 1)))

    def get_state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def set_state(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def test_rows(config: Config, source: Source, task: synthetic.Task) -> Iterator[dict[str, np.ndarray]]:
    """Draws what models are tested on, the same for every model: ``batch_size`` rows of ``task`` at a time.

    With ``num_examples``, rows that are among the examples of the run are left out and others take their place: a short program of
    the counting task is drawn again and again.
    """
    drawn = TaskBatches((), lambda data, key: task.batch(key, config.batch_size), EVAL_SEED)
    if config.num_examples is None:
        return drawn
    trained = {row.tobytes() for row in jax.device_get(_examples(config, source.task))["tokens"]}
    return _without(drawn, trained, config.batch_size)


def _without(drawn: Iterator[dict[str, np.ndarray]], trained: set[bytes], size: int) -> Iterator[dict[str, np.ndarray]]:
    kept: dict[str, np.ndarray] = {}
    for batch in drawn:
        new = np.asarray([row.tobytes() not in trained for row in batch["tokens"]])
        kept = {name: np.concatenate([kept[name], x[new]]) if kept else x[new] for name, x in batch.items()}
        if len(kept["tokens"]) >= size:
            yield {name: x[:size] for name, x in kept.items()}
            kept = {name: x[size:] for name, x in kept.items()}


def train_batches(
    config: Config, source: Source, seed: int, share: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a run: the same for every encoding.

    Args:
      share: (index, count), as ``mesh.row_share`` gives it: the rows of a process. States of the iterator fit any share.

    Raises:
      ValueError: a batch that the shares do not divide, or a text shorter than a sequence.
    """
    index, count = share
    if config.batch_size % count:
        raise ValueError(f"batch_size must be a multiple of {count}, the shares of the processes, got {config.batch_size}")
    if source.task is not None:
        return TaskBatches(*on_device(config, source), seed, share)
    return batches(
        source.train,
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=seed,
        masked=config.task == "mlm",
        process_index=index,
        process_count=count,
    )


def held_out(config: Config, source: Source, length: int) -> Iterator[dict[str, np.ndarray]]:
    """The validation text in its own order: every length reads the same."""
    if source.task is not None:
        return test_rows(config, source, source.task)
    rows = max(1, max(config.batch_size * config.seq_length, _EVAL_BATCH_TOKENS) // length)
    options = dict(length=length, batch_size=rows, seed=0, shuffle=False, repeat=False)
    return batches(source.validation, **options, masked=config.task == "mlm")
