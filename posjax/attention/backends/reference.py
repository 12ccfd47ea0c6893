"""Dense attention: the reference implementation that every other backend must match. It materializes [T, S] arrays.

scores = scale * q.k + bias;  scores = cap * tanh(scores / cap);  weights = softmax of the allowed scores;  out = weights v
"""

import jax
import jax.numpy as jnp

from posjax.core.bias import BiasTerm, Tile
from posjax.core.masks import Mask
from posjax.typing import Array, Float, Int

_MASK_VALUE = -1e30  # finite, not -inf, so that rows with no allowed key have no NaN in the result or the gradient


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    scale: Array | float,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B T N V"]:
    """Computes attention from the full matrix of scores.

    The softmax statistics are float32, and the result has the dtype of ``value``. A row with no allowed key gives zeros.
    """
    probabilities = weights(query, key, terms, mask, query_positions, key_positions, scale, logits_soft_cap)
    batch, heads, length, keys = probabilities.shape
    grouped = probabilities.reshape(batch, value.shape[2], -1, length, keys).astype(value.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, value.shape[3]).astype(value.dtype)


def weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    scale: Array | float,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B N T S"]:
    """Returns the attention probabilities in float32. Each row sums to one, or is zero where no key is allowed."""
    tile = whole_tile(query, key, mask, query_positions, key_positions, scale)
    scores = tile.logits + sum(term.dense(tile) for term in terms)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    scores = jnp.where(tile.allowed, scores, _MASK_VALUE)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    unnormalised = jnp.where(tile.allowed, jnp.exp(scores - highest), 0.0)
    total = unnormalised.sum(-1, keepdims=True)
    return unnormalised / jnp.where(total == 0.0, 1.0, total)


def whole_tile(query: Array, key: Array, mask: Mask, query_positions: Array, key_positions: Array, scale: Array | float) -> Tile:
    """Returns the single tile that covers all queries and keys."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
    return Tile(
        logits=logits.reshape(batch, heads, length, key.shape[1]),
        allowed=mask.allowed(query_positions, key_positions),
        query_positions=query_positions,
        key_positions=key_positions,
    )
