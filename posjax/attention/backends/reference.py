"""Dense attention: the reference implementation that every other backend must match. It materializes [T, S] arrays.

scores = scale * q.k + bias;  scores = cap * tanh(scores / cap);  weights = softmax of the allowed scores;  out = weights v
"""

from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import Tile, bias_terms
from posjax.attention.backends.constants import MASK_VALUE
from posjax.attention.call import AttentionCall
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
    """Returns the attention probabilities in float32. Each row sums to one, less what a sink takes, or is zero where no key is allowed."""
    tile, scores = scores_of(call)
    if call.logits_soft_cap is not None:
        scores = call.logits_soft_cap * jnp.tanh(scores / call.logits_soft_cap)
    scores = jnp.where(tile.allowed, scores, MASK_VALUE)
    m = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    sink = None if call.sink is None else call.sink.astype(jnp.float32)[None, :, None, None]
    m = m if sink is None else jax.lax.stop_gradient(jnp.maximum(m, sink))
    unnormalized = jnp.where(tile.allowed, jnp.exp(scores - m), 0.0)
    l = unnormalized.sum(-1, keepdims=True)
    l = l if sink is None else l + jnp.exp(sink - m)
    return unnormalized / jnp.where(l == 0.0, 1.0, l)


def scores_of(call: AttentionCall) -> tuple[Tile, Float[Array, "B N T S"]]:
    """Returns the single tile that covers all queries and keys, and the scores with all biases, before soft cap and mask."""
    call = call.transformed()
    query, key = call.query, call.key
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * call.scale
    tile = Tile(
        logits=logits.reshape(batch, heads, length, key.shape[1]),
        allowed=call.mask.allowed(call.query_positions, call.key_positions),
        query_positions=call.query_positions,
        key_positions=call.key_positions,
    )
    return tile, tile.logits + sum(term.dense(tile) for term in bias_terms(call))
