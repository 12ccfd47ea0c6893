"""Dense attention: the reference implementation that every other backend must match. It materializes [T, S] arrays.

scores = scale * q.k + bias;  scores = cap * tanh(scores / cap);  weights = softmax of the allowed scores;  out = weights v
"""

from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import Tile, bias_terms, value_reads
from posjax.attention.backends.constants import INIT_MAX, MASK_VALUE
from posjax.attention.call import AttentionCall
from posjax.core.manual_axes import vary_alike
from posjax.core.structures import StickBreaking
from posjax.typing import Array, Bool, Float

NAME: str = "xla"


def unsupported_reason(call: AttentionCall, **_: Any) -> None:
    """Returns None: every call is supported."""


def attention(call: AttentionCall) -> Float[Array, "B T N V"]:
    """Computes attention from the full matrix of scores.

    The softmax statistics are float32, and the result has the dtype of ``value``. A row with no allowed key gives zeros.
    """
    return weighted_values(call, weights(call))


def attention_and_lse(call: AttentionCall) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the result of ``attention``, and the logarithm of the softmax's denominator, float32.

    The denominator includes a sink. A row without any allowed key has ``MASK_VALUE``, or the sink's logit. The weights of the call
    must be those of a softmax.
    """
    probabilities, lse = _softmax(call)
    return weighted_values(call, probabilities), jnp.swapaxes(lse, 1, 2)


def weighted_values(call: AttentionCall, probabilities: Float[Array, "B N T S"]) -> Float[Array, "B T N V"]:
    """Returns the weighted sum of the values, plus the contributions of tables of values, in the dtype of ``value``."""
    value, (batch, heads, length, keys) = call.value, probabilities.shape
    grouped = probabilities.reshape(batch, value.shape[2], -1, length, keys).astype(value.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, preferred_element_type=jnp.float32)
    out = out.reshape(batch, length, heads, value.shape[3])
    for at, table in _read_values(call):
        index = jnp.where((at >= 0) & (at < table.shape[1]), at, table.shape[1])
        table = jnp.pad(table, [(0, 0), (0, 1), (0, 0)])
        values = jax.vmap(lambda rows, index: rows[index], (0, 1), 1)(jnp.broadcast_to(table, (heads, *table.shape[1:])), index)
        out = out + jnp.einsum("bnts,bntsv->btnv", probabilities, values)
    return out.astype(value.dtype)


def weights(call: AttentionCall) -> Float[Array, "B N T S"]:
    """Computes the attention probabilities in float32.

    Each row sums to one, minus the weight of a sink or of the rest of a stick. Rows without an allowed key are zero.
    """
    return _broken_sticks(call) if isinstance(call.weights, StickBreaking) else _softmax(call)[0]


def _broken_sticks(call: AttentionCall) -> Float[Array, "B N T S"]:
    allowed, scores = _capped_scores(call)
    if not getattr(call.weights, "attend_current", False):
        allowed &= call.query_positions[:, None, :, None] != call.key_positions[:, None, None, :]
    stays = jnp.where(allowed, jax.nn.log_sigmoid(-scores), 0.0)
    before = jax.lax.cumsum(stays, axis=3, reverse=True) - stays  # over the keys between
    return jnp.where(allowed, jnp.exp(jax.nn.log_sigmoid(scores) + before), 0.0)


def _softmax(call: AttentionCall) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """Returns the weights, and the logarithm of their denominator."""
    allowed, scores = _capped_scores(call)
    scores = jnp.where(allowed, scores, MASK_VALUE)
    m = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    if call.bias is not None:  # a row of -inf, which only a bias can cause, has zero weights and no NaN
        m = jnp.maximum(m, INIT_MAX)
    sink = None if call.sink is None else call.sink.astype(jnp.float32)[None, :, None, None]
    m = m if sink is None else jax.lax.stop_gradient(jnp.maximum(m, sink))
    unnormalized = jnp.where(allowed, jnp.exp(scores - m), 0.0)
    l = unnormalized.sum(-1, keepdims=True)
    l = l if sink is None else l + jnp.exp(sink - m)
    is_empty = l == 0.0
    l = jnp.where(is_empty, 1.0, l)
    return unnormalized / l, jnp.where(is_empty, MASK_VALUE, m + jnp.log(l))[..., 0]


def _capped_scores(call: AttentionCall) -> tuple[Bool[Array, "_ _ T S"], Float[Array, "B N T S"]]:
    """Returns which pairs are allowed, and the scores under the soft cap, before the mask."""
    tile, scores = scores_of(call)
    if call.logits_soft_cap is not None:
        scores = call.logits_soft_cap * jnp.tanh(scores / call.logits_soft_cap)
    return tile.allowed, scores


def scores_of(call: AttentionCall) -> tuple[Tile, Float[Array, "B N T S"]]:
    """Returns the single tile that covers all queries and keys, and the scores with all biases, before soft cap and mask."""
    call = call.transformed()
    query, key = call.query, call.key
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * call.scale
    if call.transport is not None:
        logits = _transported(call) * call.scale
    tile = Tile(
        logits=logits.reshape(batch, heads, length, key.shape[1]),
        allowed=call.mask.allowed(call.query_positions, call.key_positions),
        query_positions=call.query_positions,
        key_positions=call.key_positions,
    )
    scores = tile.logits + sum(term.dense(tile) for term in bias_terms(call))
    return tile, scores if call.bias is None else scores + call.bias.astype(jnp.float32)


def _transported(call: AttentionCall) -> Float[Array, "B N T S"]:
    """Computes q_i . M_i .. M_{j+1} k_j by applying the map of one token after another to all keys, for every query."""
    heads, transport = call.query.shape[2], call.transport
    assert transport is not None

    def of_heads(x: Array) -> Array:
        return jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2)

    key, query = of_heads(call.key), call.query.astype(jnp.float32)
    order, segments = call.key_positions, call.mask.key_segments
    rows = jnp.broadcast_to(key[:, None], (*query.shape[:2], *key.shape[1:]))  # [B, T, S, N, H]: the keys as query t sees them

    def step(l: Array, rows: Array) -> Array:
        """Applies the map of token l to the keys before it, for the queries at or after it."""
        at = jax.lax.dynamic_index_in_dim(order, l, 1, keepdims=True)
        passes = (call.query_positions >= at)[:, :, None] & (order < at)[:, None]
        if segments is not None:
            own = jax.lax.dynamic_index_in_dim(segments, l, 1, keepdims=True)
            passes &= (call.mask.query_segments == own)[:, :, None] & (segments == own)[:, None]
        if transport.log_decay is not None:
            decay = jax.lax.dynamic_index_in_dim(of_heads(transport.log_decay), l, 1)[:, None]
            moved = rows * jnp.exp(decay)
        else:
            w, strength = (
                jax.lax.dynamic_index_in_dim(of_heads(x), l, 1)[:, None] for x in (transport.direction, transport.strength)
            )
            moved = rows - strength * (rows * w).sum(-1, keepdims=True) * w
        return jnp.where(passes[..., None, None], moved, rows)

    rows = jax.lax.fori_loop(0, key.shape[1], step, vary_alike(rows, call))
    return jnp.einsum("btnh,btsnh->bnts", query, rows)


def _read_values(call: AttentionCall) -> list[tuple[Array, Array]]:
    """Returns the index [B, N, T, S] and the table [N or 1, W, V] of every bias that adds to the output."""
    heads = call.query.shape[2]
    shape = (call.query.shape[0], heads, call.query.shape[1], call.key.shape[1])
    logits, allowed = jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool)  # an index depends on neither
    tile = Tile(logits, allowed, call.query_positions, call.key_positions)
    return [(jnp.broadcast_to(at, shape), table.astype(jnp.float32)) for at, table in value_reads(call, tile)]
