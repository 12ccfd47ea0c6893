"""Dense attention: the reference implementation that every other backend must match. It materializes [T, S] arrays.

scores = scale * q.k + bias;  scores = cap * tanh(scores / cap);  weights = softmax of the allowed scores;  out = weights v
"""

from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import MASK_VALUE
from posjax.attention.call import AttentionCall
from posjax.core.bias import Tile
from posjax.core.masks import Mask
from posjax.typing import Array, Float

NAME = "xla"


def unsupported_reason(call: AttentionCall, **_: Any) -> None:
    """Returns None: every call is supported."""


def attention(call: AttentionCall) -> Float[Array, "B T N V"]:
    """Computes attention from the full matrix of scores.

    The softmax statistics are float32, and the result has the dtype of ``value``. A row with no allowed key gives zeros.
    """
    probabilities, value = weights(call), call.value
    batch, heads, length, keys = probabilities.shape
    grouped = probabilities.reshape(batch, value.shape[2], -1, length, keys).astype(value.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, value.shape[3]).astype(value.dtype)


def weights(call: AttentionCall) -> Float[Array, "B N T S"]:
    """Returns the attention probabilities in float32. Each row sums to one, or is zero where no key is allowed."""
    call = call.rotated()
    tile = whole_tile(call.query, call.key, call.mask, call.query_positions, call.key_positions, call.scale)
    scores = tile.logits + sum(term.dense(tile) for term in call.terms)
    if call.logits_soft_cap is not None:
        scores = call.logits_soft_cap * jnp.tanh(scores / call.logits_soft_cap)
    scores = jnp.where(tile.allowed, scores, MASK_VALUE)
    m = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    unnormalized = jnp.where(tile.allowed, jnp.exp(scores - m), 0.0)
    l = unnormalized.sum(-1, keepdims=True)
    return unnormalized / jnp.where(l == 0.0, 1.0, l)


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
