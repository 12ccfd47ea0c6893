"""RoFormer's linear attention: rotated features in a sum that never forms a [T, S] array.

    out_t = sum_s (R_t phi(q_t))^T (R_s phi(k_s)) v_s  /  sum_s phi(q_t)^T phi(k_s)

Only the numerator is rotated, so weights may be negative and need not sum to one.
Su et al., arXiv:2104.09864, equation 19.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from posjax.attention.arguments import canonicalize_positions, check_encoding, check_operands, check_params, check_segment_ids
from posjax.checks import check, round_up, short
from posjax.core.encoding import AttentionInputs, PositionalEncoding, Tokens
from posjax.core.manual_axes import vary_alike
from posjax.core.structures import Rotate, Softmax, check_structures
from posjax.typing import Array, Bool, Float, Params

FeatureMap = Literal["elu", "exp"]
_CHUNK = 128


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    feature_map: FeatureMap = "elu",
    is_causal: bool = False,
    segment_ids: Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
) -> Float[Array, "B T N V"]:
    """Computes linear attention with features rotated by the encoding, in O(T) time and memory.

        out_t = sum_s (R_t phi(q_t))^T (R_s phi(k_s)) v_s  /  sum_s phi(q_t)^T phi(k_s)

    Args:
      query, key, value: as in ``attention``.
      encoding: encoding that only rotates (``rope``), or None; a bias cannot be added to a product of features.
      params: parameters of the encoding.
      feature_map: phi, "elu" (elu(x) + 1) or "exp".
      is_causal: True sums over s <= t, by index rather than by position.
      segment_ids: [B, T] integers, with T = S and each segment contiguous; only tokens of equal segments attend to each other.
      query_positions, key_positions: as in ``attention``.

    Returns:
      [B, T, N, V] in the dtype of value; sums are float32.

    Raises:
      ValueError: an argument is invalid, the encoding has biases, or T differs from S with is_causal or segment_ids.

    Example:
      >>> query = key = value = jax.random.normal(jax.random.key(0), (1, 16, 4, 8))
      >>> pj.linear_attention(query, key, value, pj.rope(), is_causal=True).shape
      (1, 16, 4, 8)

    Su et al., arXiv:2104.09864, equation 19.
    """
    check_operands(query, key, value)
    encoding, params = check_encoding(encoding), check_params(params)
    check("feature_map", feature_map, FeatureMap)
    is_causal = check("is_causal", is_causal, bool)
    batch, length, heads, _ = query.shape
    keys, group = key.shape[1], heads // key.shape[2]
    if (is_causal or segment_ids is not None) and length != keys:
        raise ValueError(f"query and key must have the same length with is_causal or segment_ids, got {length} and {keys}")
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length)
    query_positions = canonicalize_positions("query_positions", query_positions, batch, length)
    key_positions = canonicalize_positions("key_positions", key_positions, batch, keys)
    inputs = AttentionInputs(query, key, value, Tokens.at(query_positions), Tokens.at(key_positions), 1.0)
    query_features, key_features, rotated_query, rotated_key = _features(inputs, encoding, params, feature_map)
    values = jnp.repeat(value.astype(jnp.float32), group, axis=2)
    ones = jnp.ones_like(values[..., :1])
    if not is_causal and segment_ids is None:
        numerator = jnp.einsum("btnh,bnhv->btnv", rotated_query, jnp.einsum("bsnh,bsnv->bnhv", rotated_key, values))
        denominator = jnp.einsum("btnh,bnh->btn", query_features, key_features.sum(1))[..., None]
    else:
        segments = jnp.zeros((batch, length), jnp.int32)
        arrays = rotated_query, rotated_key, values, query_features, key_features, ones
        if segment_ids is not None:  # the sums run over contiguous segments
            order = jnp.argsort(segment_ids, axis=1, stable=True)
            segments, *arrays = (_reordered(x, order) for x in (segment_ids, *arrays))
        rotated_query, rotated_key, values, query_features, key_features, ones = arrays
        numerator = _chunked_sum(rotated_query, rotated_key, values, segments, is_causal)
        denominator = _chunked_sum(query_features, key_features, ones, segments, is_causal)
        if segment_ids is not None:
            numerator, denominator = (_reordered(x, jnp.argsort(order, axis=1)) for x in (numerator, denominator))
    return (numerator / denominator).astype(value.dtype)


def _reordered(x: Array, order: Array) -> Array:
    """Takes the tokens of x [B, T, ...] in the order [B, T]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearCache:
    """Holds the state of causal linear attention, float32; its size does not depend on the number of tokens.

    Attributes:
      memory: [B, N, H, V], sum of rotated key features times values.
      total: [B, N, H], sum of key features.
      next_position: int32 [B], one past the last token of each row.
    """

    memory: Array
    total: Array
    next_position: Array


def linear_attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    encoding: PositionalEncoding | None,
    params: Params | None,
    cache: LinearCache,
    *,
    positions: Array,
    real: Bool[Array, "B T"],
    feature_map: FeatureMap = "elu",
) -> tuple[Float[Array, "B T N V"], LinearCache]:
    """Computes causal linear attention of T new tokens to themselves and to all earlier ones, and updates the cache.

    Args:
      query, key, value, encoding, params, feature_map: as in ``linear_attention``.
      cache: result of the previous call; all zeros at the start.
      positions: [B, T] integers.
      real: False for padding, which does not change the cache. The caller updates ``next_position``.

    Raises:
      ValueError: as in ``linear_attention``.
    """
    check_operands(query, key, value)
    batch, length, heads, _ = query.shape
    tokens = Tokens.at(positions)
    inputs = AttentionInputs(query, key, value, tokens, tokens, 1.0)
    query_features, key_features, rotated_query, rotated_key = _features(inputs, check_encoding(encoding), params, feature_map)
    # Selected rather than multiplied by zero, because padding may hold NaN.
    keep = real[..., None, None]
    key_features, rotated_key = (jnp.where(keep, x, 0.0) for x in (key_features, rotated_key))
    values = jnp.where(keep, jnp.repeat(value.astype(jnp.float32), heads // value.shape[2], axis=2), 0.0)
    together = jnp.zeros((batch, length), jnp.int32)
    numerator = _chunked_sum(rotated_query, rotated_key, values, together, True)
    numerator += jnp.einsum("btnh,bnhv->btnv", rotated_query, cache.memory)
    denominator = _chunked_sum(query_features, key_features, jnp.ones_like(values[..., :1]), together, True)
    denominator += jnp.einsum("btnh,bnh->btn", query_features, cache.total)[..., None]
    memory = cache.memory + jnp.einsum("bsnh,bsnv->bnhv", rotated_key, values)
    cache = dataclasses.replace(cache, memory=memory, total=cache.total + key_features.sum(1))
    return (numerator / jnp.where(denominator == 0.0, 1.0, denominator)).astype(value.dtype), cache


def _features(
    inputs: AttentionInputs, encoding: PositionalEncoding, params: Params | None, feature_map: FeatureMap
) -> tuple[Array, Array, Array, Array]:
    """Returns phi of query and key, then both rotated; float32, with one key per query head."""
    phi = jnp.exp if feature_map == "exp" else lambda x: jax.nn.elu(x) + 1.0
    query, key = (phi(x.astype(jnp.float32)) for x in (inputs.query, inputs.key))
    inputs = dataclasses.replace(inputs, query=query, key=key)
    mods = encoding.attend(check_params(params), inputs)
    check_structures(encoding.title, mods, query, key)
    is_plain = isinstance(mods.weights, Softmax) and mods.weights.sink is None and not mods.biases
    if encoding.cache == "raw":
        raise ValueError(
            "encoding must rotate each key by its own position alone in linear_attention, such as rope(), got "
            f"{short(encoding)}, which changes with the length"
        )
    if not (is_plain and mods.state is None and all(isinstance(transform, Rotate) for transform in mods.transforms)):
        raise ValueError(
            f"encoding must act only by rotation and carry no state in linear_attention, such as rope(), got {encoding.title}"
        )
    rotated = dataclasses.replace(inputs, transforms=mods.transforms)
    rotated_query, rotated_key = rotated.turned_query, rotated.turned_key
    group = query.shape[2] // key.shape[2]
    return query, jnp.repeat(key, group, axis=2), rotated_query, jnp.repeat(rotated_key, group, axis=2)


@functools.partial(jax.jit, static_argnums=4, inline=True)  # a second call outside of jit compiles nothing
def _chunked_sum(query: Array, key: Array, value: Array, segments: Array, is_causal: bool) -> Array:
    """Computes the sum over allowed s of (q_t.k_s) v_s, [B, T, N, V] float32, in chunks with sum_s k_s v_s^T as the carried state.

    The state covers the keys of one segment, the one in which the last chunk ended. Without causality the scan runs in both
    directions; pairs inside a chunk are counted in the forward scan only.
    """
    batch, length, heads, _ = query.shape
    pad = round_up(length, _CHUNK) - length

    def chunks(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, _CHUNK, *x.shape[2:]), 1, 0)

    parts = chunks(query), chunks(key), chunks(value), chunks(segments, -1)

    def walk(
        state: tuple[Array, Array], part: tuple[Array, Array, Array, Array], reverse: bool
    ) -> tuple[tuple[Array, Array], Array]:
        memory, owner = state
        q, k, v, ids = part
        from_state = jnp.einsum("btnh,bnhv->btnv", q, memory) * (ids == owner[:, None])[..., None, None]
        edge = ids[:, 0] if reverse else ids[:, -1]
        carried_memory = memory * (owner == edge)[:, None, None, None]
        added = jnp.einsum("bsnh,bsnv->bnhv", k * (ids == edge[:, None])[..., None, None], v)
        if reverse:
            return (carried_memory + added, edge), from_state
        allowed = ids[:, :, None] == ids[:, None, :]
        if is_causal:
            allowed &= jnp.tril(jnp.ones((_CHUNK, _CHUNK), bool))
        inside = jnp.einsum("btnh,bsnh->bnts", q, k) * allowed[:, None]
        return (carried_memory + added, edge), from_state + jnp.einsum("bnts,bsnv->btnv", inside, v)

    start = jnp.zeros((batch, heads, key.shape[-1], value.shape[-1])), jnp.full((batch,), -2, segments.dtype)
    start, parts = vary_alike((start, parts))
    _, out = jax.lax.scan(lambda s, p: walk(s, p, False), start, parts)
    if not is_causal:
        _, later = jax.lax.scan(lambda s, p: walk(s, p, True), start, parts, reverse=True)
        out = out + later
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, value.shape[-1])[:, :length]
