"""Sampling of batches from a corpus on the device, by a pure function, so that a training run can be one compiled program.

    corpus -> data = {"text": [n], "starts": [documents]} on the device;  draw(data, key) -> batch

Rows are those of ``posjax.data.pipeline``, but are drawn with replacement, whereas Grain shuffles them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import checked
from posjax.data.corpus import Corpus, Mixture
from posjax.data.pipeline import HIDDEN_SHARE, MASKED_SHARE, REPLACED_SHARE, count_rows
from posjax.typing import Array

Data = dict[str, np.ndarray]
Draw = Callable[[dict[str, Array], Array], dict[str, Array]]


@checked(length=dict(least=1), batch_size=dict(least=1))
def on_device(corpus: Corpus | Mixture, *, length: int, batch_size: int, masked: bool = False) -> tuple[Data, Draw]:
    """Prepares a corpus for sampling batches on the device.

    Args:
      corpus: the text, or a mixture, of fewer than 2^31 tokens.
      length: T, tokens in a row.
      batch_size: rows in a batch, each drawn uniformly from all rows of the corpus; in a mixture, from the rows of a part that is
        drawn with its weight.
      masked: whether to return batches for an encoder.

    Returns:
      (data, draw): the arrays to put on the device, and a pure function (data, key) -> batch; ``pipeline.batches`` describes the
      batch. ``draw`` takes data as an argument, because a constant would enlarge the program by the size of the corpus.

    Raises:
      ValueError: the corpus is shorter than a row, or too long for 32-bit indices.
    """
    if corpus.num_tokens + corpus.num_documents >= 2**31:
        raise ValueError(
            f"corpus must have fewer than 2^31 tokens to be on the device, got {corpus.source!r} with {corpus.num_tokens:,}"
        )
    parts = corpus.parts
    rows = np.asarray([count_rows(part, length, masked=masked) for part in parts])
    # Places of tokens in the text of all parts, or in their stream, which has a BOS before each document.
    firsts = np.cumsum([0, *(part.num_tokens + (0 if masked else part.num_documents) for part in parts)])[:-1]
    begins = np.cumsum([0, *(part.num_tokens for part in parts)])[:-1]
    offsets = np.concatenate([part.offsets[:-1] + begin for part, begin in zip(parts, begins, strict=True)])
    starts = offsets + np.arange(corpus.num_documents)  # index of each document's BOS in the stream
    text = np.asarray(parts[0].tokens)
    if len(parts) > 1:
        text = np.concatenate([part.tokens for part in parts], dtype=np.min_scalar_type(corpus.vocab_size), casting="unsafe")
    data = {"text": text, "starts": starts.astype(np.int32)}

    def draw(data: dict[str, Array], key: Array) -> dict[str, Array]:
        row_key, mask_key = jax.random.split(key)
        limit, first = rows[0], 0
        if len(parts) > 1:
            row_key, part_key = jax.random.split(row_key)
            part = jax.random.categorical(part_key, jnp.log(jnp.asarray(corpus.weights)), shape=(batch_size,))
            limit, first = (jnp.asarray(of_parts, jnp.int32)[part] for of_parts in (rows, firsts))
        index = jax.random.randint(row_key, (batch_size,), 0, limit)
        if masked:
            return mask(_masked_rows(data, first + index * (length - 1), length, corpus.cls), mask_key, corpus.mask, corpus.bos)
        return language_rows(data, first + index * length, length, corpus.bos)

    return data, draw


def language_rows(data: dict[str, Array], first: Array, length: int, bos: int) -> dict[str, Array]:
    """Returns the language-model rows that begin at ``first`` [B] in the stream of documents."""
    begin = first[:, None]
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


def _masked_rows(data: dict[str, Array], first: Array, length: int, cls: int) -> dict[str, Array]:
    place = first[:, None] + jnp.arange(length - 1, dtype=jnp.int32)
    text = data["text"][place].astype(jnp.int32)
    tokens = jnp.concatenate([jnp.full((len(first), 1), cls, jnp.int32), text], axis=1)
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
