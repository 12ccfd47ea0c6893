"""Test sets of the experiments: excerpts of text and strings of a task, as items that intervals resample. Not a program."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from posjax.data.corpus import Corpus
from posjax.data.synthetic import Task
from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source, test_rows

ITEMS = 256  # excerpts of a text, or blocks of a task's strings
_BATCH_TOKENS = 4096

Steps = frozenset[int]
Tests = Callable[[Config, int | None], Mapping[str, EvalSet | None]]


def excerpts_in_rows(config: Config, source: Source, steps: Steps = frozenset()) -> EvalSet:
    """Returns the validation excerpts, read in rows of the training length; all tokens are scored, and an excerpt is an item."""
    length = config.seq_length
    stream = _streams(source.validation)
    rows = stream.shape[1] // length
    inputs = stream[:, : rows * length].reshape(-1, length)
    after = np.concatenate([stream[:, 1:], np.zeros_like(stream[:, :1])], axis=1)[:, : rows * length].reshape(-1, length)
    weights = np.ones(inputs.shape, np.float32)
    if rows * length == stream.shape[1]:
        weights[rows - 1 :: rows, -1] = 0.0  # the last token of an excerpt has no target
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), inputs.shape)
    return EvalSet(_batches(inputs, after, weights, positions), np.repeat(np.arange(len(stream)), rows), steps=steps)


def ends_of_excerpts(config: Config, source: Source, length: int, window: int | None = None, steps: Steps = frozenset()) -> EvalSet:
    """Returns the ends of excerpts, each as long as a training row, read with the text before them in rows of ``length`` tokens.

    The same tokens are scored at every length, so that only the amount of preceding text differs. With a window, a layer attends
    ``window - 1`` tokens back; tokens that are out of reach of all layers together are left out of the row, whose other tokens keep
    their positions. The numbers then hold for rows of any length.
    """
    scored = config.seq_length - 1  # the last token of an excerpt has no target
    stream = _streams(source.validation)
    if stream.shape[1] < length:
        raise ValueError(f"excerpts must have {length} tokens, including BOS, got {stream.shape[1]}")
    begin = stream.shape[1] - length
    if window is not None:
        reach = scored + 1 + config.num_layers * (window - 1)
        begin = max(begin, stream.shape[1] - 64 * -(-reach // 64))
    inputs = stream[:, begin:]
    after = np.concatenate([inputs[:, 1:], np.zeros_like(inputs[:, :1])], axis=1)
    weights = np.zeros(inputs.shape, np.float32)
    weights[:, -scored - 1 : -1] = 1.0
    first = begin - (stream.shape[1] - length)
    positions = np.broadcast_to(first + np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return EvalSet(_batches(inputs, after, weights, positions), local_window_size=window, steps=steps)


def strings(config: Config, source: Source, task: Task, count: int, by_row: bool = False, steps: Steps = frozenset()) -> EvalSet:
    """Returns ``count`` strings of a task in ``ITEMS`` blocks; strings of a fixed training set are excluded."""
    size = count // ITEMS
    per_batch = max(n for n in range(1, count + 1) if count % n == 0 and n * task.length <= max(_BATCH_TOKENS, task.length))
    drawn = test_rows(config, source, task)
    rows = {}
    while sum(map(len, rows.get("tokens", ()))) < count:
        for name, x in next(drawn).items():
            rows.setdefault(name, []).append(x)
    joined = {name: np.concatenate(parts)[:count] for name, parts in rows.items()}
    batches = [{name: x[i : i + per_batch] for name, x in joined.items()} for i in range(0, count, per_batch)]
    return EvalSet(batches, np.minimum(np.arange(count) // size, ITEMS - 1), by_row=by_row, steps=steps)


def majority(tests: Mapping[str, EvalSet]) -> dict[str, float]:
    """Computes the error in percent of always giving the most common answer, by test set."""
    errors = {}
    for column, one in tests.items():
        answers = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in one.batches])
        errors[column] = 100.0 * (1.0 - np.bincount(answers).max() / len(answers))
    return errors


def _streams(corpus: Corpus) -> np.ndarray:
    """Returns every document with its BOS token, [documents, n]; documents must be excerpts of one length."""
    lengths = np.unique(np.diff(corpus.offsets))
    if len(lengths) != 1:
        raise ValueError(
            f"the validation text must have a document as long as the longest scored rows, got lengths {lengths.tolist()[:5]}"
        )
    text = np.asarray(corpus.tokens, np.int32).reshape(-1, lengths[0])
    return np.concatenate([np.full((len(text), 1), corpus.bos, np.int32), text], axis=1)


def _batches(inputs: np.ndarray, after: np.ndarray, weights: np.ndarray, positions: np.ndarray) -> list[dict[str, np.ndarray]]:
    whole = {"tokens": inputs, "targets": after, "weights": weights, "positions": positions, "segment_ids": np.ones_like(inputs)}
    rows = max(1, _BATCH_TOKENS // inputs.shape[1])
    rows = max(n for n in range(1, rows + 1) if len(inputs) % n == 0)
    return [jax.tree.map(lambda x, i=i: x[i : i + rows], whole) for i in range(0, len(inputs), rows)]


def text_digest(corpora: Sequence[Corpus]) -> Iterator[bytes]:
    """Yields the tokens and document offsets of corpora, for a hash that identifies the text behind a number."""
    for corpus in corpora:
        yield np.ascontiguousarray(corpus.offsets, np.int64).tobytes()
        yield np.ascontiguousarray(corpus.tokens, np.int32).tobytes()
