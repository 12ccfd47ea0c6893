"""Checks and canonicalizes the arguments of ``attention`` before anything is compiled."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from posjax.checks import is_traced
from posjax.core.encoding import PositionalEncoding, Tokens, identity, what_is
from posjax.core.masks import FAR, Mask
from posjax.typing import Array

_NONE = identity()


def check_encoding(encoding: Any) -> PositionalEncoding:
    """Returns ``encoding``, or ``identity()`` for None; raises TypeError if it is not a PositionalEncoding."""
    if encoding is None:
        return _NONE
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(f"encoding must be a PositionalEncoding such as rope(), got {what_is(encoding)}")
    return encoding


def check_operands(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError if query, key and value do not fit together; query and key are checked before value."""
    for name, x, letters in (("query", query, "[B, T, N, H]"), ("key", key, "[B, S, K, H]")):
        if getattr(x, "ndim", None) != 4:
            raise ValueError(f"{name} must have shape {letters}, got {getattr(x, 'shape', x)!r}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {x.shape}")
    if query.dtype != key.dtype:
        raise ValueError(f"key must have the dtype of query, {query.dtype}, got {key.dtype}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have the batch size of query, {query.shape[0]}, got {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"key must have the head dimension of query, {query.shape[3]}, got {key.shape[3]}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"key must have a number of heads that divides the query's {query.shape[2]}, got {key.shape[2]}")

    if getattr(value, "ndim", None) != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape [B, S, K, V] with B, S, K of key, {key.shape[:3]}, got {getattr(value, 'shape', value)!r}"
        )
    if value.dtype != key.dtype:
        raise ValueError(f"value must have the dtype of query and key, {key.dtype}, got {value.dtype}")


def check_scale(scale: Any, head_dim: int) -> Any:
    """Returns the factor of q.k, 1 / sqrt(head_dim) for None; raises ValueError if it is not one positive, finite number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if np.shape(scale) != ():
        raise ValueError(f"scale must be one number, got shape {np.shape(scale)}; None takes 1 / sqrt(head_dim)")
    if not is_traced(scale) and not 0 < np.asarray(scale) < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale!r}; None takes 1 / sqrt(head_dim)")
    return scale


def check_soft_cap(cap: Any) -> float | None:
    """Returns ``logits_soft_cap`` as a float, None for None; raises ValueError if it is not one positive, finite, known number."""
    if cap is None:
        return None
    if is_traced(cap):
        raise ValueError("logits_soft_cap must be a concrete number, got a traced array; it is part of the compiled program")
    if not (np.ndim(cap) == 0 and 0 < np.asarray(cap) < math.inf):
        raise ValueError(f"logits_soft_cap must be positive and finite, got {cap!r}; None applies no cap")
    return float(cap)


def canonicalize_positions(name: str, positions: Array | None, batch: int, length: int) -> Array:
    """Converts positions to int32 [1 or B, length], with one row for the whole batch unless rows differ; None gives 0, 1, 2, ...

    Raises:
      ValueError: positions are not integers, have the wrong shape, are negative or do not fit int32.
    """
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    # NumPy, because jax would wrap numbers that do not fit into int32, and trace them under jit.
    known = None if is_traced(positions) else np.asarray(positions)
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {positions.shape}")
    if known is not None and (least := known.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {least}; exclude padding by mask or segment_ids")
    if known is not None and (most := known.max()) >= FAR:
        raise ValueError(f"{name} must be below 2^31 - 1, got {most}; subtract the first from all")
    return positions.astype(jnp.int32).reshape(-1, length)


def canonicalize_coordinates(name: str, coordinates: Array, batch: int, length: int) -> Array:
    """Converts coordinates [T, A] or [B, T, A] to int32 or float32 [1 or B, length, A].

    Raises:
      ValueError: coordinates are neither integers nor floating point, have the wrong shape, or are too large for int32 or float32.
    """
    known = None if is_traced(coordinates) else np.asarray(coordinates)
    coordinates = jnp.asarray(coordinates)
    if jnp.issubdtype(coordinates.dtype, jnp.integer):
        coordinates = coordinates.astype(jnp.int32)
    elif jnp.issubdtype(coordinates.dtype, jnp.floating):
        coordinates = coordinates.astype(jnp.float32)
    else:
        raise ValueError(f"{name} must be integers or floating point, got {coordinates.dtype}")
    shape = coordinates.shape
    if coordinates.ndim not in (2, 3) or shape[-1] == 0 or shape[:-1] not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length}, axes) or ({batch}, {length}, axes), got {shape}")
    most = 0.0 if known is None else np.abs(known.astype(np.float64)).max()
    limit, what = (FAR, "2^31 - 1") if coordinates.dtype == jnp.int32 else (2.0**24, "2^24, beyond which float32 has no fractions")
    if most >= limit:
        raise ValueError(f"{name} must be below {what}, got {most:.10g}; subtract the first from all")
    return coordinates.reshape(-1, length, shape[-1])


def coordinates_of_sides(
    encoding: PositionalEncoding, queries: Array | None, keys: Array | None, positions: list[Array], batch: int
) -> tuple[Array, Array] | None:
    """Returns the coordinates of queries and keys, or None if they are the positions on one axis."""
    if queries is None and keys is None and encoding.axes == 1:
        return None
    given = {"query_coordinates": queries, "key_coordinates": keys}
    if (queries is None) != (keys is None):
        missing = next(name for name, x in given.items() if x is None)
        raise ValueError(f"{missing} must be an array if the other side's coordinates are given, got None")
    if queries is None:
        return tuple(Tokens(order).on_axes(encoding.axes) for order in positions)
    made = []
    for (name, x), order in zip(given.items(), positions, strict=True):
        x = canonicalize_coordinates(name, x, batch, order.shape[1])
        if x.shape[-1] < encoding.axes:
            raise ValueError(f"{name} must have {encoding.axes} axes for {encoding.name}, got {x.shape[-1]}")
        made.append(x)
    if made[0].shape[-1] != made[1].shape[-1] or made[0].dtype != made[1].dtype:
        raise ValueError(
            "query_coordinates and key_coordinates must have the same number of axes and the same dtype, "
            f"got {made[0].dtype}{list(made[0].shape)} and {made[1].dtype}{list(made[1].shape)}"
        )
    return tuple(made)


def hidden_of_sides(encoding: PositionalEncoding, hidden: Any, query: Array, key: Array) -> tuple[Array | None, Array | None]:
    """Returns the activations that queries and keys were projected from, after checks; None for each if not given."""
    if hidden is None:
        if encoding.needs_hidden:
            raise ValueError(
                f"hidden must be an array [B, T, D] for {encoding.name}, got None; "
                "pass the activations that query, key and value were projected from"
            )
        return None, None
    sides = hidden if isinstance(hidden, tuple) else (hidden, hidden)
    for x, tokens, name in zip(sides, (query, key), ("queries", "keys"), strict=True):
        if getattr(x, "ndim", None) != 3 or x.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"hidden must have shape {(*tokens.shape[:2], 'D')} for the {name}, got {getattr(x, 'shape', x)!r}; "
                "a pair gives both"
            )
    return sides


def make_mask(
    query: Array,
    key: Array,
    is_causal: bool,
    mask: Any,
    query_segments: Any,
    key_segments: Any,
    window: tuple[int | None, int | None],
) -> Mask:
    batch, length, heads, _ = query.shape
    keys = key.shape[1]
    if mask is not None:
        if getattr(mask, "dtype", None) != jnp.bool_:
            raise ValueError(
                f"mask must be boolean, True where attention is allowed, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        full_shape = (batch, heads, length, keys)
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
        if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, full_shape, strict=True)):
            raise ValueError(f"mask must broadcast to [B, N, T, S] = {full_shape}, got {mask.shape}")
    if query_segments is not None or key_segments is not None:
        for name, ids, size in (("queries", query_segments, length), ("keys", key_segments, keys)):
            if getattr(ids, "shape", None) != (batch, size) or not jnp.issubdtype(ids.dtype, jnp.integer):
                got = f"{ids.dtype}{list(ids.shape)}" if hasattr(ids, "shape") else repr(ids)
                raise ValueError(f"segment_ids must be integers [{batch}, {size}] for the {name}, got {got}; a pair gives both")
    return Mask(
        boolean=mask,
        query_segments=_segments(query_segments),
        key_segments=_segments(key_segments),
        is_causal=is_causal,
        window=window,
    )


def _segments(ids: Any) -> Array | None:
    """Returns segment ids as int32; None for None."""
    if ids is None:
        return None
    if not is_traced(ids) and ids.dtype.itemsize > 4 and np.abs(np.asarray(ids)).max() >= FAR:
        raise ValueError(f"segment_ids must be below 2^31 - 1, got {np.abs(np.asarray(ids)).max()}")
    return jnp.asarray(ids).astype(jnp.int32)


def canonicalize_window(size: Any) -> tuple[int | None, int | None]:
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | np.integer) or side < 0):
            raise ValueError(f"local_window_size must be a non-negative integer or a pair (left, right) of them, got {size!r}")
    return tuple(None if side is None else int(side) for side in (left, right))
