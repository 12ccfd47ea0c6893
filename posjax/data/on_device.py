"""Sampling of batches from a corpus on the device, by a pure function, so that a training run can be one compiled program.

    corpus -> data = {"text": [n], "starts": [documents]} on the device;  draw(data, key) -> batch

Rows are those of ``posjax.data.pipeline``, but are drawn with replacement, whereas Grain shuffles them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from posjax.data.corpus import Corpus
from posjax.data.pipeline import HIDDEN_SHARE, MASKED_SHARE, REPLACED_SHARE, count_rows
from posjax.typing import Array

Data = dict[str, np.ndarray]
Draw = Callable[[dict[str, Array], Array], dict[str, Array]]


def on_device(corpus: Corpus, *, length: int, batch_size: int, masked: bool = False) -> tuple[Data, Draw]:
    """Prepares a corpus for sampling batches on the device.

    Args:
      corpus: the text, of fewer than 2^31 tokens.
      length: T, tokens in a row.
      batch_size: rows in a batch, each drawn uniformly from all rows of the corpus.
      masked: whether to return batches for an encoder.

    Returns:
      (data, draw): the arrays to put on the device, and a pure function (data, key) -> batch; ``pipeline.batches`` describes the
      batch. ``draw`` takes data as an argument, because a constant would enlarge the program by the size of the corpus.

    Raises:
      ValueError: the corpus is shorter than a row, or too long for 32-bit indices.
    """
    if len(corpus.tokens) + corpus.num_documents >= 2**31:
        raise ValueError(
            f"corpus must have fewer than 2^31 tokens to be on the device, got {corpus.source!r} with {len(corpus.tokens):,}"
        )
    rows = count_rows(corpus, length, masked=masked)
    starts = corpus.offsets[:-1] + np.arange(corpus.num_documents)  # index of each document's BOS in the stream
    data = {"text": np.asarray(corpus.tokens), "starts": starts.astype(np.int32)}

    def draw(data: dict[str, Array], key: Array) -> dict[str, Array]:
        row_key, mask_key = jax.random.split(key)
        index = jax.random.randint(row_key, (batch_size,), 0, rows)
        if masked:
            return mask(_masked_rows(data, index, length, corpus.cls), mask_key, corpus.mask, corpus.bos)
        return language_rows(data, index, length, corpus.bos)

    return data, draw


def language_rows(data: dict[str, Array], index: Array, length: int, bos: int) -> dict[str, Array]:
    """Returns the language-model rows with the given indices [B], from the stream of documents split every ``length`` tokens."""
    begin = index[:, None] * length
    place = begin + jnp.arange(length + 1, dtype=jnp.int32)
    starts = data["starts"]
    document = jnp.searchsorted(starts, place, side="right").astype(jnp.int32) - 1
    text = data["text"][jnp.maximum(place - document - 1, 0)].astype(jnp.int32)  # minus one BOS per document
    stream = jnp.where(place == starts[document], bos, text)
    return {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "weights": (document[:, 1:] == document[:, :-1]).astype(jnp.float32),
        "segment_ids": document[:, :-1] - document[:, :1] + 1,
        "positions": place[:, :-1] - jnp.maximum(starts[document[:, :-1]], begin),
    }


def _masked_rows(data: dict[str, Array], index: Array, length: int, cls: int) -> dict[str, Array]:
    place = index[:, None] * (length - 1) + jnp.arange(length - 1, dtype=jnp.int32)
    text = data["text"][place].astype(jnp.int32)
    tokens = jnp.concatenate([jnp.full((len(index), 1), cls, jnp.int32), text], axis=1)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return {"tokens": tokens, "targets": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}


def mask(rows: dict[str, Array], key: Array, mask_token: int, num_tokens: int) -> dict[str, Array]:
    """Selects the tokens to predict, and masks, replaces or keeps them, with the probabilities of the pipeline."""
    tokens = rows["tokens"]
    chosen_key, fate_key, other_key = jax.random.split(key, 3)
    chosen = (jax.random.uniform(chosen_key, tokens.shape) < MASKED_SHARE) & (rows["positions"] > 0)  # not [CLS]
    fate = jax.random.uniform(fate_key, tokens.shape)
    other = jax.random.randint(other_key, tokens.shape, 0, num_tokens)
    shown = jnp.where(fate < HIDDEN_SHARE, mask_token, jnp.where(fate < HIDDEN_SHARE + REPLACED_SHARE, other, tokens))
    return rows | {"tokens": jnp.where(chosen, shown, tokens), "weights": chosen.astype(jnp.float32)}
