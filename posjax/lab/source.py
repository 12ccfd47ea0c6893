"""Batches for training and evaluation, from the corpus or synthetic task that a configuration names."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from posjax.checks import short
from posjax.data import synthetic
from posjax.data.corpus import Corpus, Mixture, excerpts, holds_tokens, load_corpus, with_vocabulary
from posjax.data.files import shown
from posjax.data.on_device import on_device as corpus_on_device
from posjax.data.pipeline import batches
from posjax.lab.config import Config
from posjax.models.pretrained.tokenizer import special_tokens
from posjax.typing import Array

EVAL_SEED, _EXAMPLES_SEED = 2**31, 2**31 + 1  # seeds of the evaluation data and of fixed training sets
_COMPARED_DOCUMENTS = 200_000  # most documents of a split that are compared with those of the other, which takes a second
_TOLERATED_REPEATS = 0.001  # share of validation tokens: empty modules and licenses repeat in every folder of source code
_EVAL_BATCH_TOKENS = 4096  # minimum tokens per evaluation batch; smaller batches take longer to dispatch than to compute


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the data that batches are drawn from: two splits of a corpus, or a synthetic task.

    Attributes:
      vocab_size: V.
      max_length: length that the model's tables of positions must support: seq_length for text, or that of the checkpoint in
        from_pretrained; for a synthetic task, the length of the longest of the task and its variants.
      train, validation: the splits of a text, the second reduced to the excerpts that are evaluated; None for a synthetic task.
      task: the synthetic task; None for text.
      summary: lines that describe both splits of a text, for the opening of a run.
      digests: a SHA-256 sum of the tokens and documents of each whole split, by name; empty for a synthetic task.
    """

    vocab_size: int
    max_length: int
    train: Corpus | Mixture | None = None
    validation: Corpus | None = None
    task: synthetic.Task | None = None
    summary: tuple[str, ...] = ()
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_source(config: Config) -> Source:
    """Loads the data that a configuration trains on, preparing them on first use.

    Raises:
      ValueError: the data cannot be loaded.
    """
    if config.task in ("lm", "mlm"):
        has_size = config.tokenizer == "bpe" or (config.vocab_size != Config.vocab_size and holds_tokens(config.data))
        options = dict(
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size if has_size else None,
            data_dir=config.data_dir or None,
            validation_data=config.validation_data,
            include=config.include,
            exclude=config.exclude,
            text_key=config.text_key,
            workdir=config.workdir or None,
        )
        try:
            train, validation = (load_corpus(config.data, split, **options) for split in ("train", "validation"))
        except (ValueError, OSError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"data {short(config.data)} cannot be used: {str(error).strip().splitlines()[0]}") from error
        max_length = config.seq_length
        if config.from_pretrained:
            model = config.transformer(train.vocab_size)
            begin, _ = special_tokens(config.pretrained.config)
            train, validation = (with_vocabulary(one, model.vocab_size, (begin, begin)) for one in (train, validation))
            max_length = model.max_length
        summary = data_summary(config.data, train, validation)
        digests = {"train": train.digest, "validation": validation.digest}
        # The longest rows begin with a BOS token, so an excerpt is one token shorter.
        excerpt_length = config.seq_length * max(config.eval_lengths) - 1
        validation = excerpts(validation, excerpt_length, max(1, config.eval_tokens // excerpt_length))
        return Source(train.vocab_size, max_length, train, validation, summary=summary, digests=digests)
    length = config.seq_length
    task = {
        "flip_flop": lambda: synthetic.flip_flop(length=length),
        "selective_copy": lambda: synthetic.selective_copy(num_tokens=length // 2, num_blanks=length // 2),
        "counting": lambda: synthetic.counting(config.num_variables, max_operations=length, length=length),
    }[config.task]()
    return Source(task.vocab_size, max(t.length for t in (task, *task.variants.values())), task=task)


def data_summary(data: str, train: Corpus | Mixture, validation: Corpus | Mixture) -> tuple[str, ...]:
    """Describes two splits in lines: their sizes, how they were chosen, and warnings.

    A warning says that validation has more text than training, or that whole documents of validation also occur in training.
    """
    rows = [("", "documents", "bytes", "tokens")]
    for name, split in (("train", train), ("validation", validation)):
        sizes = (split.num_documents, split.num_bytes, split.num_tokens)
        rows.append((name, *("unknown" if size is None else f"{size:,}" for size in sizes)))
    lines = [f"data: {shown(data)}", *(f"  {row[0]:<10}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)]
    lines += [f"  {shown(note)}" for note in train.notes]
    if validation.num_tokens > train.num_tokens:
        lines.append(f"warning: validation has more tokens than training, {validation.num_tokens:,} and {train.num_tokens:,}")
    repeated, share = repeats(train, validation)
    if share > _TOLERATED_REPEATS:
        count = f"at least {repeated:,} of {validation.num_documents:,} validation documents"
        lines.append(f"warning: {count}, {share:.1%} of the validation tokens, are also training documents")
    return tuple(lines)


def repeats(train: Corpus | Mixture, validation: Corpus | Mixture) -> tuple[int, float]:
    """Returns the number of documents of ``validation`` that are also documents of ``train``, and their share of its tokens.

    Of very many documents, only some, spread evenly, are compared.
    """

    def some(numbers: np.ndarray) -> np.ndarray:
        return numbers[:: -(-len(numbers) // _COMPARED_DOCUMENTS) or 1]

    known: dict[bytes, list[int]] = {}  # digest -> lengths of the documents that have it
    for part in validation.parts:
        lengths = np.diff(part.offsets)
        for number in some(np.flatnonzero(lengths)):
            known.setdefault(_document_digest(part, number), []).append(int(lengths[number]))
    wanted = np.unique([length for lengths in known.values() for length in lengths])
    found: list[int] = []
    for part in train.parts:
        for number in some(np.flatnonzero(np.isin(np.diff(part.offsets), wanted))):
            found += known.pop(_document_digest(part, number), [])
    return len(found), sum(found) / max(1, validation.num_tokens)


def _document_digest(corpus: Corpus, number: int) -> bytes:
    return hashlib.sha256(corpus.tokens[corpus.offsets[number] : corpus.offsets[number + 1]]).digest()


def batch_key(seed: int | Array, number: int | Array) -> Array:
    """Returns the random key of batch ``number`` for a run that draws its data on the device."""
    return jax.random.fold_in(jax.random.key(seed), number)


def on_device(config: Config, source: Source) -> tuple[Any, Callable[[Any, Array], dict[str, Array]]]:
    """Returns a data set and a pure function that draws batches from it on the device, for runs compiled as one program.

    For a synthetic task, the batches equal those of ``train_batches``. For a text, rows are drawn with replacement. With
    ``num_examples``, rows are drawn with replacement from a fixed training set, which is the same for every seed.

    Returns:
      (data, draw): arrays to put on the device, and a function (data, key) -> batch, with keys from ``batch_key``.
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
    """Draws the fixed training set of a run with ``num_examples``; it does not depend on the run's seed."""
    return jax.jit(lambda: task.batch(jax.random.key(_EXAMPLES_SEED), config.num_examples))()


class TaskBatches:
    """Iterates without end over the batches of one seed; ``data`` and ``draw`` are as ``on_device`` returns them.

    Each batch is reduced to the rows of ``share``, (index, count). The full batch is drawn first, because the content of a row
    depends on the batch size.
    """

    def __init__(self, data: Any, draw: Callable[[Any, Array], dict[str, Array]], seed: int, share: tuple[int, int] = (0, 1)):
        self.drawn, self.data, self.share = 0, data, share
        self.draw = jax.jit(lambda data, number: draw(data, batch_key(seed, number)))

    def __iter__(self) -> "TaskBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        index, count = self.share

        def rows_of_share(leaf: np.ndarray) -> np.ndarray:
            rows = len(leaf) // count
            return leaf[index * rows : (index + 1) * rows]

        return jax.tree.map(rows_of_share, jax.device_get(self.draw(self.data, self.drawn - 1)))

    def get_state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def set_state(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def test_rows(config: Config, source: Source, task: synthetic.Task) -> Iterator[dict[str, np.ndarray]]:
    """Yields evaluation batches of ``batch_size`` rows of ``task``, the same for every model.

    With ``num_examples``, rows that also occur in the training set are replaced by further draws, because the counting task draws
    short programs repeatedly.
    """
    drawn = TaskBatches((), lambda data, key: task.batch(key, config.batch_size), EVAL_SEED)
    if config.num_examples is None:
        return drawn
    trained = {row.tobytes() for row in jax.device_get(_examples(config, source.task))["tokens"]}
    return _without(drawn, trained, config.batch_size)


def _without(drawn: Iterator[dict[str, np.ndarray]], trained: set[bytes], size: int) -> Iterator[dict[str, np.ndarray]]:
    remaining: dict[str, np.ndarray] = {}
    for batch in drawn:
        is_new = np.asarray([row.tobytes() not in trained for row in batch["tokens"]])
        remaining = {name: np.concatenate([remaining[name], x[is_new]]) if remaining else x[is_new] for name, x in batch.items()}
        if len(remaining["tokens"]) >= size:
            yield {name: x[:size] for name, x in remaining.items()}
            remaining = {name: x[size:] for name, x in remaining.items()}


def train_batches(config: Config, source: Source, seed: int, share: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over the training batches of a run, which depend on the seed but not on the encoding.

    Args:
      share: (index, count), as ``mesh.row_share`` returns it: the share of the rows that this process loads. The iterator's state
        can be restored with any share.

    Raises:
      ValueError: batch_size is not divisible by count, or the text is shorter than a sequence.
    """
    index, count = share
    if config.batch_size % count:
        raise ValueError(f"batch_size must be a multiple of {count}, the number of shares of processes, got {config.batch_size}")
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


def eval_batches(config: Config, source: Source, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Returns an iterator over the validation data.

    A text is read in order, so that every ``length`` covers the same text; a task yields its test rows.
    """
    if source.task is not None:
        return test_rows(config, source, source.task)
    rows = max(1, max(config.batch_size * config.seq_length, _EVAL_BATCH_TOKENS) // length)
    options = dict(length=length, batch_size=rows, seed=0, shuffle=False, repeat=False)
    return batches(source.validation, **options, masked=config.task == "mlm")
