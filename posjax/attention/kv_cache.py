"""Decoding: a key-value cache that works with any encoding, and attention through it.

A new token is prepared like any other, by ``prepare(query, key, value, encoding, ...)``, and the results for its key are cached:

    cache    key after all transforms | value | columns: arrays of biases per key | position | coordinates | segment
             [ k0 k1 k2 ... kn  .  .  . ]     full: each slot is written once; empty slots have segment 0, which is masked out
             [ k5 k6 k7 k8 ] <- k9            window: the most recent keys in order, in constant memory
    state    arrays that the encoding itself carries from call to call, such as sums along the sequence

The structures of an encoding thus determine what a decoder caches: rotated keys for RoPE, widened keys for TUPE, and unrotated keys
as well for CoPE with gates="content". An encoding in which earlier keys change as the sequence grows has ``cache = "raw"``: keys
are cached as given, and every call prepares all of them again. Keys are in the order of their positions, which encodings that count
along the keys require. ``cache_layout`` lists the arrays that are cached under an encoding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.arguments import (
    canonicalize_coordinates,
    canonicalize_positions,
    check_encoding,
    check_operands,
    check_segment_ids,
)
from posjax.attention.call import AttentionCall, prepare, prepare_next
from posjax.attention.dispatch import Implementation, load_kernels, run
from posjax.attention.linear import LinearCache
from posjax.checks import check_at_least, check_dtype, check_fits, is_traced, short
from posjax.core.encoding import Dims, PositionalEncoding
from posjax.core.masks import FAR
from posjax.core.structures import Bias, Rotate, Transport, key_arrays, map_arrays
from posjax.typing import Array, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds the cache of one attention layer, with S slots. It is immutable; ``attend`` returns an updated one.

    Attributes:
      key: [B, S, K, W], after the transforms of the encoding, or as given if the encoding's ``cache`` is "raw".
      value: [B, S, K, V].
      columns: for a transport and each bias, the arrays per key by name, [B, N or K or 1, S, ...].
      positions: int32 [B, S].
      coordinates: [B, S, A]; None if they are the positions.
      segments: int32 [B, S]; 0 for empty slots and padding.
      next_position: int32 [B], one past the last token of each row.
      used: int32 [], number of slots written; not counted in a window cache.
      state: the encoding's ``ScoreModifications.state`` after the last call, zeros before the first; None if it has none.
      next_coordinate: [B], one past the largest coordinate of each row on any axis; None if coordinates are the positions.
      window: number of earlier positions that a token attends to, equal to S; None: a full-length cache.
      local_window_size: number of earlier positions that a token attends to in a full-length cache; None: all.
      made_for: pytree structure of the encoding that the cache was created for.
    """

    key: Array
    value: Array
    columns: tuple[dict[str, Array], ...]
    positions: Array
    coordinates: Array | None
    segments: Array
    next_position: Array
    used: Array
    state: Any = None
    next_coordinate: Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    local_window_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    made_for: Any = dataclasses.field(default=None, metadata={"static": True})


LayerCache = Cache | LinearCache


def init_cache(
    encoding: PositionalEncoding | None,
    dims: Dims,
    batch_size: int,
    *,
    max_length: int | None = None,
    window: int | None = None,
    coordinate_dtype: Any = None,
    dtype: Any = jnp.float32,
) -> Cache:
    """Creates an empty cache for one attention layer.

    Exactly one of max_length and window must be given.

    Args:
      encoding: positional encoding; None is ``identity()``.
      dims: sizes of the layer; values have the head dimension of the keys.
      batch_size: B.
      max_length: number of slots of a full cache, in tokens, including padding of prompts.
      window: number of slots of a sliding window: a token attends to that many positions before it, as with ``local_window_size``.
      coordinate_dtype: int32 or float32 if some calls will pass coordinates, on as many axes as the encoding reads; None if
        coordinates are the positions.
      dtype: dtype of query, key and value.

    Returns:
      The cache, without tokens.

    Raises:
      ValueError: neither or both of max_length and window are given, a size is below 1, or the encoding caches raw keys although
        it has a state or needs ``hidden``.

    Example:
      >>> cache = pj.init_cache(pj.rope(), pj.Dims(num_heads=4, head_dim=8), batch_size=2, max_length=128)
      >>> int(cache.used)
      0
    """
    encoding = check_encoding(encoding)
    if (max_length is None) == (window is None):
        raise ValueError(f"exactly one of max_length and window must be set, got max_length={max_length} and window={window}")
    slots, name = (max_length, "max_length") if window is None else (window, "window")
    slots, batch_size = check_at_least(name, slots, 1), check_at_least("batch_size", batch_size, 1)
    _check_dims(dims)
    dtype = check_dtype("dtype", dtype, jnp.floating)
    if coordinate_dtype is not None:
        coordinate_dtype = check_dtype("coordinate_dtype", coordinate_dtype, jnp.integer, jnp.floating)

    def one_token(key: Array) -> tuple[Array, Array, tuple[Any, ...], Any]:
        hidden = jnp.zeros((batch_size, 1, dims.embed_dim), dtype)
        return _cached_arrays(encoding, encoding.init(key, dims), dims, hidden, key, coordinate_dtype)[1]

    def widen(axis: int) -> Callable[[Any], Array]:
        return lambda x: jnp.zeros((*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype)

    key, value, columns, state = jax.eval_shape(one_token, jax.random.key(0))
    if encoding.cache == "raw" and (encoding.needs_hidden or state is not None):
        raise ValueError(
            f"cache must be 'transformed' for {encoding.title}, which has a state or needs hidden, got 'raw'; no member may change "
            "earlier keys with the length, as dynamic_ntk_scaling does"
        )
    shapes = key, value, columns
    check_fits(f"a cache of batch_size={batch_size} and {name}={slots} for {dims}", shapes, slots)
    return Cache(
        key=widen(1)(key),
        value=widen(1)(value),
        columns=jax.tree.map(widen(2), columns),
        positions=jnp.full((batch_size, slots), FAR if window is None else 0, jnp.int32),
        coordinates=None if coordinate_dtype is None else jnp.zeros((batch_size, slots, encoding.axes), coordinate_dtype),
        segments=jnp.zeros((batch_size, slots), jnp.int32),
        next_position=jnp.zeros(batch_size, jnp.int32),
        used=jnp.zeros((), jnp.int32),
        state=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state),
        next_coordinate=None if coordinate_dtype is None else jnp.zeros(batch_size, coordinate_dtype),
        window=window,
        made_for=jax.tree.structure(encoding),
    )


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    encoding: PositionalEncoding | None,
    params: Params | None,
    cache: Cache,
    *,
    positions: Int[Array, "_ T"] | None = None,
    coordinates: Array | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    hidden: Array | None = None,
    scale: Array | float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Cache]:
    """Computes causal attention of T new tokens to themselves and to all cached tokens, and adds them to the cache.

    Decoding in chunks of any size matches one call of ``attention(..., is_causal=True, local_window_size=cache.window)`` on the
    full sequence. If the encoding caches raw keys, each call matches the last rows of one on the sequence so far.

    Args:
      query, key, value: operands of the new tokens, as in ``attention``, in the dtype of the cache.
      encoding, params: as in ``attention``; the cache must have been created for this encoding.
      cache: result of ``init_cache`` or of the previous call.
      positions: [T], [1, T] or [B, T] integers, non-decreasing along a row; None continues from ``cache.next_position``.
      coordinates: [T, A] or [B, T, A], as in ``attention``, for a cache that was created with a ``coordinate_dtype``. None
        continues each row from its own largest coordinate plus one, on all axes, as text after an image does under ``mrope``.
      segment_ids: [B, T] integers. 0 marks padding, to which no token attends; other tokens attend within their segment. None puts
        all tokens into segment 1.
      hidden: [B, T, D], as in ``attention``.
      scale, logits_soft_cap, implementation: as in ``attention``.

    Returns:
      The output [B, T, N, V] and the updated cache. If a traced call writes past the end of a full cache, the output is NaN.

    Raises:
      ValueError: an argument is invalid, or there are more tokens than the cache has free slots.

    Example:
      >>> encoding, dims = pj.rope(), pj.Dims(num_heads=4, head_dim=8)
      >>> cache = pj.init_cache(encoding, dims, batch_size=2, max_length=128)
      >>> query = key = value = jax.random.normal(jax.random.key(0), (2, 10, 4, 8))
      >>> out, cache = pj.attend(query, key, value, encoding, {}, cache)  # the next call continues after these ten tokens
      >>> int(cache.used)
      10
    """
    check_operands(query, key, value)
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must come from init_cache or the last call of attend, got {short(cache)}")
    if key.dtype != cache.key.dtype or key.shape[0] != cache.key.shape[0]:
        raise ValueError(
            f"query, key and value must have the batch size and dtype of the cache, {cache.key.shape[0]} and {cache.key.dtype}, "
            f"got {key.shape[0]} and {key.dtype}"
        )
    encoding = check_encoding(encoding)
    if cache.made_for != jax.tree.structure(encoding):
        made_for = jax.tree.unflatten(cache.made_for, ["..."] * cache.made_for.num_leaves)
        raise ValueError(f"encoding must be the one that the cache was created for, {made_for}, got {encoding}")
    check_room(cache, query.shape[1])
    load_kernels(query, cache.key, implementation)
    if coordinates is not None and cache.coordinates is None:
        raise ValueError("coordinates must be None for a cache that was created without a coordinate_dtype, got an array")
    positions, segments = next_positions(cache, key.shape[1], positions, segment_ids)
    coordinates, next_coordinate = _of_new_tokens(coordinates, cache, positions, segments)
    options: dict[str, Any] = dict(
        is_causal=True,
        local_window_size=cache.local_window_size if cache.window is None else cache.window,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        query_positions=positions,
    )
    new = dataclasses.replace(
        cache,
        key=key,
        value=value,
        positions=positions,
        coordinates=coordinates,
        segments=segments,
        next_position=position_after(positions, segments, cache.next_position),
        next_coordinate=next_coordinate,
    )
    if encoding.cache == "raw":
        full = _join(cache, new)
        seen = jnp.where(full.segments == 0, 0, full.positions)  # empty slots have position FAR, which no token has
        sides = dict(segment_ids=(segments, full.segments), query_coordinates=new.coordinates, key_coordinates=full.coordinates)
        call = prepare(query, full.key, full.value, encoding, params, key_positions=seen, **sides, **options)
        call = call.replace(key_positions=full.positions)
    else:
        sides = dict(segment_ids=segments, query_coordinates=new.coordinates, key_coordinates=new.coordinates)
        sides |= dict(key_positions=positions, hidden=hidden)
        call, state = prepare_next(query, key, value, encoding, params, cache.state, **sides, **options)
        call = call.transformed()
        full = _join(cache, dataclasses.replace(new, key=call.key, columns=_columns(call), state=state))
        call = call.replace(
            key=full.key,
            value=full.value,
            **_with_columns(call, full.columns),
            mask=dataclasses.replace(call.mask, key_segments=full.segments),
            key_positions=full.positions,
            key_coordinates=full.coordinates,
            is_self=False,
        )
    out: Any = run(call, implementation)
    if cache.window is None:
        out = jnp.where(full.used <= full.key.shape[1], out, jnp.nan)  # past the end, new tokens overwrite others
        return out, full
    return out, _last(full, cache.window, has_padding=segment_ids is not None)


def _check_dims(dims: Any) -> None:
    if not isinstance(dims, Dims):
        raise ValueError(f"dims must be sizes such as Dims(num_heads=8, head_dim=64), got {short(dims)}")


def _of_new_tokens(coordinates: Array | None, cache: Cache, positions: Array, segments: Array) -> tuple[Array | None, Array | None]:
    """Returns the coordinates of new tokens, [B, T, A] as in the cache, and the next coordinate; None for both without them."""
    if cache.coordinates is None or cache.next_coordinate is None:
        return None, None
    axes = cache.coordinates.shape[-1]
    if coordinates is None:
        coordinates = next_coordinates(cache, positions, axes)
    else:
        coordinates = canonicalize_coordinates("coordinates", coordinates, *segments.shape)
        if coordinates.dtype != cache.coordinates.dtype and not jnp.issubdtype(cache.coordinates.dtype, jnp.floating):
            raise ValueError(f"coordinates must be integers for a cache of {cache.coordinates.dtype}, got {coordinates.dtype}")
        if coordinates.shape[-1] < axes:
            raise ValueError(f"coordinates must have the {axes} axes of the cache, got {coordinates.shape[-1]}")
    largest = coordinates.astype(cache.next_coordinate.dtype).max(-1)
    after = jnp.where(segments != 0, largest + 1, 0).max(1)
    return _for_rows(coordinates[..., :axes], len(segments)), jnp.maximum(cache.next_coordinate, after)


def next_coordinates(cache: Cache, positions: Array, axes: int) -> Array:
    """Returns the coordinates [B, T, A] of next tokens at these positions, which differ from them by one offset in each row."""
    assert cache.next_coordinate is not None
    offset = cache.next_coordinate - cache.next_position.astype(cache.next_coordinate.dtype)
    return jnp.repeat((positions.astype(offset.dtype) + offset[:, None])[..., None], axes, axis=2)


def _columns(call: AttentionCall) -> tuple[dict[str, Array], ...]:
    """Returns the arrays per key of every bias, and of a transport before them, by name, [B, N or K or 1, S, ...]."""
    batch = call.key.shape[0]

    def of_bias(bias: Bias | Rotate | Transport) -> dict[str, Array]:
        columns = {}
        for name, x, axes in key_arrays(bias):
            columns[name] = _for_rows(jnp.swapaxes(x, 1, 2) if axes.tokens == 1 else x, batch)
        return columns

    return tuple(map(of_bias, (*call.transforms, *call.biases)))


def _for_rows(x: Array, batch: int) -> Array:
    """Broadcasts the first axis, B or 1."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def _with_columns(call: AttentionCall, columns: tuple[dict[str, Array], ...]) -> dict[str, Any]:
    """Returns the transforms and biases of a call with these arrays per key."""

    def of_bias(bias: Bias | Rotate | Transport, columns: dict[str, Array]) -> Bias | Rotate | Transport:
        arrays = iter(
            jnp.swapaxes(columns[name], 1, 2) if axes.tokens == 1 else columns[name] for name, _, axes in key_arrays(bias)
        )
        return map_arrays(lambda leaf, axes: next(arrays) if axes.side == "key" else leaf, bias)

    parts = tuple(of_bias(*pair) for pair in zip((*call.transforms, *call.biases), columns, strict=True))
    return dict(transforms=parts[: len(call.transforms)], biases=parts[len(call.transforms) :])


def check_room(cache: LayerCache, tokens: int) -> None:
    """Raises ValueError if a full cache has no room for ``tokens`` more tokens.

    Unchecked if ``cache.used`` is traced, except that symbolic numbers of tokens must be known to fit the slots.
    """
    if isinstance(cache, LinearCache) or cache.window is not None:
        return
    slots = cache.positions.shape[-1]
    try:
        bool(tokens <= slots)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"query must be known to fit the cache, got {tokens} tokens for {slots} slots; "
            f"declare it by jax.export.symbolic_shape(..., constraints=['{slots} >= {tokens}'])"
        ) from error
    if is_traced(cache.used):
        return
    used = int(np.asarray(cache.used).max())
    if used + tokens > slots:
        raise ValueError(f"max_length of the cache must be at least {used + tokens} to add {tokens} tokens, got {slots}")


def next_positions(cache: LayerCache, tokens: int, positions: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """Returns positions and segments [B, T] of the next tokens, with defaults for arguments that are None.

    Raises:
      ValueError: segment_ids are not integers [B, T], or positions not non-negative ones [T], [1, T] or [B, T].
    """
    batch = cache.next_position.shape[0]
    segments = jnp.ones((batch, tokens), jnp.int32) if segment_ids is None else segment_ids
    check_segment_ids(segments, batch, tokens)
    segments = jnp.asarray(segments, jnp.int32)
    if positions is None:
        # Padding repeats the position of the token before it, which keeps positions in order and within every table.
        positions = cache.next_position[:, None] + jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1
        positions = jnp.maximum(positions, 0)
    positions = canonicalize_positions("positions", positions, batch, tokens)
    return jnp.broadcast_to(positions, (batch, tokens)), segments


def position_after(positions: Array, segments: Array, before: Array) -> Array:
    """Returns one past the position of each row's last token that is not padding, or ``before`` if all are padding."""
    real = segments != 0
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.where(real.any(1), jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1, before)


def _slots(function: Callable[..., Array], *caches: Cache) -> dict[str, Any]:
    """Applies function(axis, array of each cache) to all arrays with an axis of slots; returns them by field name."""
    by_axis = {1: ("key", "value", "positions", "coordinates", "segments"), 2: ("columns",)}
    return {
        name: jax.tree.map(functools.partial(function, axis), *(getattr(c, name) for c in caches))
        for axis, names in by_axis.items()
        for name in names
    }


def _join(cache: Cache, new: Cache) -> Cache:
    """Adds the new keys to the cached ones: in place for a full cache, by concatenation for a window."""

    def join(axis: int, old: Array, new: Array) -> Array:
        if cache.window is None:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.used, axis)
        return jnp.concatenate([old, new.astype(old.dtype)], axis)

    return dataclasses.replace(new, **_slots(join, cache, new), used=cache.used + new.key.shape[1])


def _last(full: Cache, count: int, has_padding: bool) -> Cache:
    """Returns a cache of the last ``count`` keys of each row, in order and without padding."""
    total = full.key.shape[1]
    # A stable sort puts padding and empty slots first.
    order = jnp.argsort(full.segments != 0, axis=1, stable=True)[:, total - count :] if has_padding else None

    def take(axis: int, x: Array) -> Array:
        if order is None:
            return jax.lax.slice_in_dim(x, total - count, total, axis=axis)
        index = order.reshape(order.shape[0], *(1,) * (axis - 1), count, *(1,) * (x.ndim - axis - 1))
        return jnp.take_along_axis(x, index, axis=axis)

    return dataclasses.replace(full, **_slots(take, full), used=jnp.zeros_like(full.used))


def store(stacked: Any, layer: Array, cache: LayerCache, tokens: int) -> Any:
    """Writes the updated cache of one layer into the stacked caches of several layers [L, ...].

    For a full cache, only the slots of the new tokens are written.
    """
    updated = jax.tree.map(lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0), stacked, cache)
    if isinstance(cache, LinearCache) or cache.window is not None:
        return updated
    begin = cache.used - tokens

    def write(axis: int, stack: Array, x: Array) -> Array:
        new = jax.lax.dynamic_slice_in_dim(x, begin, tokens, axis)[None]
        return jax.lax.dynamic_update_slice(
            stack, new, [layer if a == 0 else begin if a == axis + 1 else 0 for a in range(stack.ndim)]
        )

    return dataclasses.replace(updated, **_slots(write, stacked, cache))


# Layout of a cache --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """Describes an array that a cache stores for every token and layer.

    Attributes:
      name: "key", "value", or the number of a bias and the name of the array in it.
      holds: "raw keys", "rotated keys", "widened keys", "values", or "made by the encoding".
      shape: shape for one token, key heads first.
      dtype: name of the dtype.
      bytes: bytes per token.
    """

    name: str
    holds: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {self.holds}, {self.dtype}{list(self.shape)}, {self.bytes:,} bytes per token"


def cache_layout(encoding: PositionalEncoding | None, dims: Dims, dtype: Any = jnp.float32) -> tuple[CacheEntry, ...]:
    """Lists the arrays that a decoder caches per token in one layer under an encoding.

        for line in cache_layout(chain(rope(), cope(64, gates="content")), dims): print(line)

    The list is determined by running the encoding on one random token.

    Args:
      encoding, dims, dtype: as in ``init_cache``.

    Returns:
      An entry for each array, with its shape, dtype and bytes per token.

    Example:
      >>> entries = pj.cache_layout(pj.rope(), pj.Dims(num_heads=4, head_dim=8))
    """
    encoding = check_encoding(encoding)
    _check_dims(dims)
    dtype = check_dtype("dtype", dtype, jnp.floating)
    params_key, hidden_key, key = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(hidden_key, (1, 1, dims.embed_dim), dtype)
    (unrotated, _), (rotated, value, columns, state) = _cached_arrays(encoding, encoding.init(params_key, dims), dims, hidden, key)

    def holds(x: Array) -> str:
        contents = {"raw keys": unrotated, "values": value, "rotated keys": rotated}
        matches = [content for content, array in contents.items() if x.shape == array.shape and bool((x == array).all())]
        return matches[0] if matches else "made by the encoding"

    entries = {
        "key": (rotated, "widened keys" if rotated.shape[-1] > unrotated.shape[-1] else holds(rotated)),
        "value": (value, "values"),
    }
    moves = {field.name for field in dataclasses.fields(Transport)}
    transports = sum(bool(moves & set(column)) for column in columns)
    for number, column in enumerate(columns, -transports):
        for name, x in column.items():
            x = jnp.moveaxis(x, 2, 1)
            entries[f"transport {name}" if number < 0 else f"bias {number} {name}"] = (x, holds(x))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        entries[f"state{jax.tree_util.keystr(path)}"] = (x[:, None], "made by the encoding")
    return tuple(CacheEntry(name, content, x.shape[2:], x.dtype.name, x[0, 0].nbytes) for name, (x, content) in entries.items())


def _cached_arrays(
    encoding: PositionalEncoding, params: Params, dims: Dims, hidden: Array, key: Array, coordinate_dtype: Any = None
) -> tuple[tuple[Array, Array], tuple[Array, Array, tuple[Any, ...], Any]]:
    """Returns the unrotated key and value of one random token [B, 1, K, H], and what is cached: key, value, columns and state."""
    keys = jax.random.split(key, 3)
    batch, heads = hidden.shape[0], (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)
    query, unrotated, value = (
        jax.random.normal(k, (batch, 1, n, dims.head_dim), hidden.dtype) for k, n in zip(keys, heads, strict=True)
    )
    limit = encoding.max_length(dims)
    position = jnp.full(
        (1, 1), 1 if limit is None else min(1, limit - 1), jnp.int32
    )  # not position 0, where rotations are the identity
    coordinates = None if coordinate_dtype is None else jnp.ones((1, 1, encoding.axes), coordinate_dtype)
    own: dict[str, Any] = dict(
        query_positions=position, key_positions=position, query_coordinates=coordinates, key_coordinates=coordinates
    )
    own |= dict(is_causal=True, hidden=hidden, segment_ids=jnp.ones((batch, 1), jnp.int32))
    call, state = prepare_next(query, unrotated, value, encoding, params, None, **own)
    if encoding.cache == "raw":
        return (unrotated, value), (unrotated, value, (), state)
    call = call.transformed()
    return (unrotated, value), (call.key, value, _columns(call), state)
