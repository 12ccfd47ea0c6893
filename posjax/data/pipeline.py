"""A Grain pipeline of batches from a corpus, whose position can be saved and restored exactly.

    corpus -> windows of T tokens -> shuffle -> repeat -> (mask) -> batch -> this process's share

A corpus is read as one stream, with a BOS before each document, and split every T tokens. A row is one such window and
the token that follows it, so that each token of the stream except the first is predicted once per epoch. Row i depends
only on the seed and i, so resuming is exact and splitting over processes needs no communication. In a mixture, each corpus is
shuffled and repeated on its own, and row i of the mixture is the next row of the corpus whose share is due.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from posjax.checks import checked, require
from posjax.data.corpus import Corpus, Mixture

MASKED_SHARE = 0.15  # as in BERT: 15 % of the tokens are predicted; 80 % of these are masked, 10 % replaced, 10 % kept
HIDDEN_SHARE = 0.8
REPLACED_SHARE = 0.1


@checked(
    length=dict(least=1, what="be at least 1"),
    batch_size=dict(least=1, what="be at least 1"),
    process_count=dict(least=1, what="be at least 1"),
    seed=dict(least=0, most=2**32 - 1, what="be from 0 to 2^32 - 1"),
)
def batches(
    corpus: Corpus | Mixture,
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    masked: bool = False,
) -> "Batches":
    """Returns an iterator of batches with `get_state()` and `set_state(state)`, for exact resumption.

    A batch is a dict of arrays [batch_size / process_count, length]: tokens, targets, segment_ids and positions (int32)
    and weights (float32; 0 where a target does not count).

    For a language model, the target of a token is the next token. Segments are the documents of a row, counted from 1,
    and positions start at 0 in each. A target in the next document does not count. With `masked`, a row is [CLS]
    (position 0) and length - 1 tokens of the text, without separators between documents: one segment with positions 0 to
    length - 1. Each of these tokens is selected with probability 15 %. Of the selected tokens, 80 % are replaced by
    [MASK], 10 % by a random token other than the special ones, and 10 % are kept. The targets are the original tokens;
    only those at selected positions count.

    Args:
      corpus: the text, or a mixture of several, from which rows come in the proportion of the weights.
      length: T, tokens in a row.
      batch_size: rows in a batch over all processes; a multiple of process_count.
      seed: seed of the order and the masks, from 0 to 2^32 - 1.
      shuffle: whether to shuffle the rows, differently in each epoch. If False, rows come in the order of the text.
      repeat: whether to repeat forever, without the last tokens that do not fill a window. If False, the iterator stops
        after one epoch, which covers all tokens: the last window and the last batch are padded with segment 0 and weight 0.
        A mixture repeats its corpora independently, and forever.
      process_index, process_count: this process gets rows [index * b, (index + 1) * b) of each batch, with
        b = batch_size / process_count. The concatenated batches of all processes equal the batch of a single process.
      masked: whether to return batches for an encoder.

    Returns:
      A `Batches`. Its state is a JSON-serializable dict. A new iterator with the same arguments, set to this state, continues with
      exactly the batches that would have followed. Its `epoch` is the number of times that the corpus has been read; in a mixture,
      the corpus that has been read most often.

    Raises:
      ValueError: an argument is out of range, or length exceeds the length of the corpus.
      ImportError: grain is not installed.
    """
    if masked and length < 2:
        raise ValueError(f"length must be at least 2 with masked=True ([CLS] and a token), got {length}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, process_count={process_count}), got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of process_count ({process_count}), got {batch_size}")
    require("a pipeline of batches", "grain")
    import grain

    def rows_of(corpus: Corpus, seed: int):
        rows = (_MaskedRows if masked else _Rows)(corpus, length, None if repeat else batch_size)
        dataset = grain.MapDataset.source(rows).seed(seed)
        if shuffle:
            dataset = dataset.shuffle()
        if repeat:
            dataset = dataset.repeat()
        return dataset.random_map(functools.partial(_mask, corpus=corpus)) if masked else dataset

    if len(corpus.parts) == 1:
        dataset = rows_of(corpus.parts[0], seed)
    elif repeat:
        seeds = np.random.SeedSequence(seed).generate_state(len(corpus.parts))
        parts = [rows_of(part, int(own)) for part, own in zip(corpus.parts, seeds, strict=True)]
        dataset = grain.MapDataset.select_from_datasets(parts, _Proportions(corpus.weights))
    else:
        raise ValueError("repeat must be True with a mixture, whose corpora end at different rows, got False")
    share = batch_size // process_count
    dataset = dataset.batch(share, drop_remainder=True).slice(slice(process_index, None, process_count))
    # Rows are cheap to create, so two threads suffice to keep a few batches ready. Grain's default would buffer 500.
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    return Batches(iterator, lambda drawn: max(epochs(corpus, drawn * batch_size, length=length, masked=masked).values()))


class Batches:
    """Iterates over batches of a Grain iterator; see `batches`."""

    def __init__(self, iterator: Any, epochs_after: Callable[[int], float]):
        self._iterator, self._epochs_after = iterator, epochs_after

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)

    @property
    def epoch(self) -> float:
        return self._epochs_after(self.get_state()["next_index"])


def epochs(corpus: Corpus | Mixture, rows: int, *, length: int, masked: bool = False) -> dict[str, float]:
    """Returns how often each source has been read after a number of rows: {source: epochs}."""
    parts = zip(corpus.parts, corpus.weights, strict=True)
    return {part.source: rows * weight / count_rows(part, length, masked=masked) for part, weight in parts}


class _Proportions:
    """Maps an index of a mixture to (part, index in the part); among the first n, each part has its share of n, to within one.

    Grain's own ``mix`` rounds weights to a hundredth of the smallest.
    """

    def __init__(self, weights: tuple[float, ...]):
        self.units = [max(1, round(weight * 2**40)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        remaining, before, after = sum(self.units), int(index), int(index) + 1  # rows not given to the parts so far
        for part, units in enumerate(self.units):
            rest_before, rest_after = (n * (remaining - units) // remaining for n in (before, after))
            if rest_before == rest_after:  # this part has the row
                return part, before - rest_before
            remaining, before, after = remaining - units, rest_before, rest_after
        raise AssertionError("the last part has all remaining rows")


class _Rows:
    """Provides random access to the rows of a language model: the stream of BOS and documents, split every `length` tokens."""

    def __init__(self, corpus: Corpus, length: int, fill_to: int | None):
        self.corpus, self.length = corpus, length
        self.text = np.asarray(corpus.tokens)  # no copy; plain arrays are indexed faster than memmaps
        self.starts = corpus.offsets[:-1] + np.arange(corpus.num_documents)  # index of each document's BOS in the stream
        self.targets_total = len(corpus.tokens) + corpus.num_documents - 1
        self.count = _row_count(self.targets_total, length, length, fill_to)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = int(index) * self.length
        place = np.arange(begin, min(begin + self.length, self.targets_total) + 1)
        if len(place) < 2:
            return _fill_up({}, self.length)
        document = np.searchsorted(self.starts, place, side="right") - 1
        text = self.text[np.maximum(place - document - 1, 0)]
        stream = np.where(place == self.starts[document], self.corpus.bos, text.astype(np.int32))
        row = {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "weights": document[1:] == document[:-1],
            "segment_ids": document[:-1] - document[0] + 1,
            "positions": place[:-1] - np.maximum(self.starts[document[:-1]], begin),
        }
        return _fill_up(row, self.length)


class _MaskedRows:
    """Provides random access to the rows of a masked model before masking: [CLS] and length - 1 tokens of text."""

    def __init__(self, corpus: Corpus, length: int, fill_to: int | None):
        self.corpus, self.length = corpus, length
        self.count = _row_count(len(corpus.tokens), length - 1, length, fill_to)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = int(index) * (self.length - 1)
        text = self.corpus.tokens[begin : begin + self.length - 1].astype(np.int32)
        if not len(text):
            return _fill_up({}, self.length)
        tokens = np.concatenate([[self.corpus.cls], text])
        row = {"tokens": tokens, "targets": tokens, "weights": np.zeros(len(tokens))}
        row |= {"segment_ids": np.ones(len(tokens)), "positions": np.arange(len(tokens))}
        return _fill_up(row, self.length)


@checked(length=dict(least=1))
def count_rows(corpus: Corpus | Mixture, length: int, *, masked: bool = False) -> int:
    """Returns the number of full rows of ``length`` tokens in a corpus.

    Raises:
      ValueError: the corpus is shorter than a row.
    """
    return len((_MaskedRows if masked else _Rows)(corpus, length, None))


def _row_count(total: int, stride: int, length: int, fill_to: int | None) -> int:
    """Returns the number of rows in a stream of `total` tokens with `stride` tokens per row.

    Counts only full rows if fill_to is None. Otherwise also counts a partial last row, and rounds up to a multiple of fill_to.
    """
    if total < stride:
        raise ValueError(f"length must be at most {length - stride + total} for a corpus this small, got {length}")
    if fill_to is None:
        return total // stride
    rows = -(-total // stride)
    return -(-rows // fill_to) * fill_to


def _fill_up(row: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Casts a row to its final dtypes and pads it with zeros to `length`, so that padding has segment 0 and weight 0."""
    full = {}
    for name in ("tokens", "targets", "weights", "segment_ids", "positions"):
        full[name] = np.zeros(length, np.float32 if name == "weights" else np.int32)
        full[name][: len(row.get(name, ()))] = row.get(name, ())
    return full


def _mask(row: dict[str, np.ndarray], rng: np.random.Generator, *, corpus: Corpus) -> dict[str, np.ndarray]:
    """Selects the tokens to predict, and masks, replaces or keeps each of them."""
    tokens = row["tokens"]
    chosen = (rng.random(tokens.shape) < MASKED_SHARE) & (row["positions"] > 0)  # neither [CLS] nor padding
    fate = rng.random(tokens.shape)
    other = rng.integers(0, corpus.bos, tokens.shape)
    shown = np.where(fate < HIDDEN_SHARE, corpus.mask, np.where(fate < HIDDEN_SHARE + REPLACED_SHARE, other, tokens))
    return row | {"tokens": np.where(chosen, shown, tokens).astype(np.int32), "weights": chosen.astype(np.float32)}
