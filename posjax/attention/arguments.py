"""Checks and canonicalizes the arguments of ``attention`` before anything is compiled."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import INT32, check, is_array, is_traced, short
from posjax.core.encoding import PositionalEncoding, Tokens, identity, what_is
from posjax.core.masks import FAR
from posjax.typing import Array, Bool, Params

Sides = tuple[Array | None, Array | None]  # an array of queries and the corresponding one of keys
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
        if not is_array(x) or x.ndim != 4:
            raise ValueError(f"{name} must have shape {letters}, got {x.shape if is_array(x) else short(x)}")
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

    if not is_array(value) or value.ndim != 4 or value.shape[:3] != key.shape[:3] or not value.shape[3]:
        got = value.shape if is_array(value) else short(value)
        raise ValueError(f"value must have shape [B, S, K, V] with B, S, K of key, {key.shape[:3]}, got {got}")
    if value.dtype != key.dtype:
        raise ValueError(f"value must have the dtype of query and key, {key.dtype}, got {value.dtype}")


def in_jax_order(encoding: Any, params: Any, mask: Any, bias: Any) -> tuple[Any, Any, Any, Any]:
    """Returns encoding, params, mask and bias, after moving arrays in place of the first two to bias and mask.

    A positional call of ``jax.nn.dot_product_attention`` passes its bias and mask in their place. One number is neither.
    """
    if is_array(encoding, jnp.floating, jnp.integer) and encoding.ndim:
        if bias is not None:
            raise ValueError("bias must be passed once, got an array in place of the encoding as well")
        encoding, bias = None, encoding
    if encoding is None and is_array(params, jnp.bool_) and params.ndim:
        if mask is not None:
            raise ValueError("mask must be passed once, got an array in place of the params as well")
        params, mask = None, params
    return encoding, params, mask, bias


def add_batch_axis(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any], bool]:
    """Returns query, key, value and options, with a batch axis of one if the call has no batch, and whether it has none.

    NumPy arrays become JAX arrays. Masks, biases, positions, coordinates and lengths may omit their batch axis in any case.

    Raises:
      ValueError: some of query, key and value have three axes and others do not.
    """
    query, key, value = (
        jnp.asarray(x) if isinstance(x, np.ndarray) and is_array(x, jnp.number) else x for x in (query, key, value)
    )
    operands = query, key, value
    axes = [getattr(x, "ndim", None) for x in operands]
    if 3 not in axes:
        return query, key, value, options, False
    if axes != [3, 3, 3]:
        shapes = ", ".join(str(getattr(x, "shape", x)) for x in operands)
        raise ValueError(f"query, key and value must all have four axes, or all three for a call without a batch, got {shapes}")
    options = {
        name: jax.tree.map(lambda x: x[None] if hasattr(x, "ndim") else x, x) if name in ("segment_ids", "hidden") else x
        for name, x in options.items()
    }
    return query[None], key[None], value[None], options, True


def check_scale(scale: Any, head_dim: int) -> Any:
    """Returns the factor of q.k, 1 / sqrt(head_dim) for None; raises ValueError if it is not one positive, finite number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    own = dict(above=0, rank=0, what="be positive and finite", hint="None takes 1 / sqrt(head_dim)")
    return check("scale", scale, Array | float | None, **own)


def check_soft_cap(cap: Any) -> float | None:
    """Returns ``logits_soft_cap`` as a float, None for None; raises ValueError if it is not one positive, finite, known number."""
    if cap is None:
        return None
    if is_traced(cap):
        raise ValueError("logits_soft_cap must be a concrete number, got a traced array; it is part of the compiled program")
    own = dict(above=0, rank=0, what="be positive and finite", hint="None applies no cap")
    return float(check("logits_soft_cap", cap, Array | float | None, **own))


def check_params(params: Any) -> Params:
    """Returns ``params``, {} for None; raises ValueError if they are not a dict."""
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"params must be a dict, such as the result of encoding.init(key, dims), or None, got {short(params)}")
    return {} if params is None else params


def check_segment_ids(ids: Any, batch: int, length: int, tokens: str = "") -> None:
    """Raises ValueError if segment ids are not integers [batch, length].

    ``tokens``, such as " for the keys", follows the shape in the message.
    """
    if not is_array(ids, jnp.integer) or ids.shape != (batch, length):
        got = f"{ids.dtype}{list(ids.shape)}" if is_array(ids) else short(ids)
        pair = "; a pair gives both" if tokens else ""
        raise ValueError(f"segment_ids must be integers [{batch}, {length}]{tokens}, got {got}{pair}")


def of_both_sides(name: str, x: Any) -> tuple[Any, Any]:
    """Returns an argument for queries and for keys, from a pair or from one value for both."""
    if isinstance(x, tuple) and len(x) != 2:
        raise ValueError(f"{name} must be one array, or a pair for queries and keys, got a tuple of {len(x)}")
    return x if isinstance(x, tuple) else (x, x)


def _array_of(name: str, x: Any, what: str) -> Array:
    """Returns an array; nested lists of numbers become a NumPy array. Raises ValueError for anything else."""
    given = x
    if not is_array(x):
        try:
            x = np.asarray(x)
        except Exception:
            x = np.asarray("")
    if not is_array(x, jnp.integer, jnp.floating):
        raise ValueError(f"{name} must be {what}, got {short(given) if np.ndim(x) == 0 else x.dtype}")
    return x


def canonicalize_positions(name: str, positions: Array | None, batch: int, length: int) -> Array:
    """Converts positions to int32 [1 or B, length], with one row for the whole batch unless rows differ; None gives 0, 1, 2, ...

    Raises:
      ValueError: positions are not integers, have the wrong shape, are negative or do not fit int32.
    """
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = _array_of(name, positions, "integers")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {positions.shape}")
    # NumPy, because jax would wrap numbers that do not fit into int32, and trace them under jit.
    known = None if is_traced(positions) else np.asarray(positions)
    if known is not None and (least := known.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {least}; exclude padding by mask or segment_ids")
    if known is not None and (most := known.max()) >= FAR:
        raise ValueError(f"{name} must be below 2^31 - 1, got {most}; subtract the first from all")
    return jnp.asarray(positions, jnp.int32).reshape(-1, length)


def canonicalize_coordinates(name: str, coordinates: Array, batch: int, length: int) -> Array:
    """Converts coordinates [T, A] or [B, T, A] to int32 or float32 [1 or B, length, A].

    Raises:
      ValueError: coordinates are neither integers nor floating point, have the wrong shape, or are too large for int32 or float32.
    """
    coordinates = _array_of(name, coordinates, "integers or floating point")
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
    if not most < limit:  # also true for NaN
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
        of_queries, of_keys = (Tokens(order).on_axes(encoding.axes) for order in positions)
        return of_queries, of_keys
    made = []
    for (name, x), order in zip(given.items(), positions, strict=True):
        assert x is not None
        x = canonicalize_coordinates(name, x, batch, order.shape[1])
        if x.shape[-1] < encoding.axes:
            raise ValueError(f"{name} must have {encoding.axes} axes for {encoding.name}, got {x.shape[-1]}")
        made.append(x)
    if made[0].shape[-1] != made[1].shape[-1] or made[0].dtype != made[1].dtype:
        raise ValueError(
            "query_coordinates and key_coordinates must have the same number of axes and the same dtype, "
            f"got {made[0].dtype}{list(made[0].shape)} and {made[1].dtype}{list(made[1].shape)}"
        )
    return made[0], made[1]


def hidden_of_sides(encoding: PositionalEncoding, hidden: Any, query: Array, key: Array) -> tuple[Array | None, Array | None]:
    """Returns the activations that queries and keys were projected from, after checks; None for each if not given."""
    if hidden is None:
        if encoding.needs_hidden:
            raise ValueError(
                f"hidden must be an array [B, T, D] for {encoding.name}, got None; "
                "pass the activations that query, key and value were projected from"
            )
        return None, None
    sides = of_both_sides("hidden", hidden)
    for x, tokens, name in zip(sides, (query, key), ("queries", "keys"), strict=True):
        if not is_array(x) or x.ndim != 3 or x.shape[:2] != tokens.shape[:2]:
            got = x.shape if is_array(x) else short(x)
            raise ValueError(f"hidden must have shape {(*tokens.shape[:2], 'D')} for the {name}, got {got}; a pair gives both")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"hidden must be floating point, got {x.dtype}")
    return sides


def canonicalize_mask(mask: Any, query: Array, key: Array) -> Array | None:
    """Returns ``mask`` with four axes; raises ValueError if it is not boolean or does not broadcast to [B, N, T, S]."""
    if mask is None:
        return None
    if not is_array(mask, jnp.bool_):
        got = mask.dtype if is_array(mask) else type(mask).__name__
        raise ValueError(
            f"mask must be boolean, True where attention is allowed, got {got}; pass numbers to add to the scores as bias"
        )
    return _of_pairs("mask", mask, query, key)


def canonicalize_bias(bias: Any, query: Array, key: Array) -> Array | None:
    """Returns ``bias`` with four axes, floating point.

    Raises:
      ValueError: it is not an array of numbers, or does not broadcast to [B, N, T, S].
    """
    if bias is None:
        return None
    if not is_array(bias, jnp.floating, jnp.integer):
        hint = "; pass a boolean array as mask" if is_array(bias, jnp.bool_) else ""
        raise ValueError(f"bias must be an array of numbers, got {bias.dtype if is_array(bias) else type(bias).__name__}{hint}")
    bias = _of_pairs("bias", bias, query, key)
    return jnp.asarray(bias, None if jnp.issubdtype(bias.dtype, jnp.floating) else jnp.float32)


def _of_pairs(name: str, x: Array, query: Array, key: Array) -> Array:
    """Returns an array as [B or 1, N or 1, T or 1, S or 1], after adding the leading axes that it omits."""
    shape = (*query.shape[:1], query.shape[2], query.shape[1], key.shape[1])
    x = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    if x.ndim != 4 or any(size not in (1, full) for size, full in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to [B, N, T, S] = {shape}, got {x.shape}")
    return x


def segments_of_sides(segment_ids: Any, query: Array, key: Array) -> tuple[Array | None, Array | None]:
    """Returns the checked segments of queries and keys, the same array if one was given for both; two None without segments."""
    if segment_ids is None:
        return None, None
    sides = of_both_sides("segment_ids", segment_ids)
    for name, ids, tokens in zip(("queries", "keys"), sides, (query, key), strict=True):
        check_segment_ids(ids, tokens.shape[0], tokens.shape[1], f" for the {name}")
    queries = canonicalize_segments(sides[0])
    return queries, queries if sides[1] is sides[0] else canonicalize_segments(sides[1])


def valid_tokens(name: str, lengths: Any, tokens: Array) -> Bool[Array, "B T"] | None:
    """Returns which tokens of [B, T, ...] come before the end of their sequence; None if ``lengths`` is None.

    Raises:
      ValueError: lengths are not integers [B], or are negative.
    """
    if lengths is None:
        return None
    batch, what = tokens.shape[0], f"integers [{tokens.shape[0]}], the length of every sequence"
    given, lengths = lengths, _array_of(name, lengths, what)
    known = None if is_traced(lengths) else np.asarray(lengths)
    if not is_array(lengths, jnp.integer) or lengths.shape not in ((batch,), () if batch == 1 else (batch,)):
        got = f"{lengths.dtype}{list(lengths.shape)}" if is_array(given) else short(given)
        raise ValueError(f"{name} must be {what}, got {got}")
    if known is not None and (least := known.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {least}")
    lengths = jnp.asarray(lengths).reshape(-1, 1)
    lengths = lengths.astype(np.promote_types(lengths.dtype, np.int32))
    return jnp.arange(tokens.shape[1], dtype=lengths.dtype)[None] < lengths


def mark_padding(segments: Sides, valid: Sides, query: Array, key: Array) -> tuple[Sides, Sides]:
    """Returns segments of queries and keys, for encodings and for masks, in which invalid tokens (padding) are separate.

    For encodings, padding is segment 0. For masks, padding of the queries is below every other segment and padding of the keys is
    above: no query attends to padding, padding attends to nothing, and kernels skip blocks of either.
    """
    if valid[0] is None and valid[1] is None:
        return segments, segments
    of_queries, of_keys = segments
    below, above = 0, 2
    if of_queries is None or of_keys is None:
        of_queries, of_keys = (jnp.ones(x.shape[:2], jnp.int32) for x in (query, key))
    else:
        below = jnp.minimum(of_queries.min(), of_keys.min()) - 1
        above = jnp.maximum(of_queries.max(), of_keys.max()) + 1

    def marked(ids: Array, real: Array | None, marker: Any) -> Array:
        return ids if real is None else jnp.where(real, ids, marker)

    return (
        (marked(of_queries, valid[0], 0), marked(of_keys, valid[1], 0)),
        (marked(of_queries, valid[0], below), marked(of_keys, valid[1], above)),
    )


def canonicalize_segments(ids: Any) -> Array | None:
    """Returns segment ids as int32; None for None."""
    if ids is None:
        return None
    if not is_traced(ids) and ids.dtype.itemsize > 4 and np.abs(np.asarray(ids)).max() >= FAR:
        raise ValueError(f"segment_ids must be below 2^31 - 1, got {np.abs(np.asarray(ids)).max()}")
    return jnp.asarray(ids).astype(jnp.int32)


def canonicalize_window(size: Any) -> tuple[int | None, int | None]:
    """Returns ``local_window_size`` as a pair (left, right); raises ValueError if it is neither an integer nor a pair of them."""
    sides: Any = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    for side in sides:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | np.integer) or not 0 <= side <= INT32):
            what = "a non-negative integer or a pair (left, right) of them, below 2^31"
            raise ValueError(f"local_window_size must be {what}, got {short(size)}")
    left, right = (None if side is None else int(side) for side in sides)
    return left, right
