"""``AttentionCall``: one call of attention, checked and prepared, in the form that every backend takes.

``prepare`` is the only place where an encoding is applied. What it returns holds arrays, structures and a mask; no backend knows
which encoding they came from.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import is_traced
from posjax.core.encoding import AttentionInputs, PositionalEncoding, Tokens, identity, what_is
from posjax.core.masks import FAR, Mask
from posjax.core.structures import (
    Bias,
    Hinges,
    Pair,
    Replace,
    Rotate,
    Scan,
    ScoreModifications,
    Softmax,
    StickBreaking,
    Table,
    Transport,
)
from posjax.typing import Array, Float, Int, Params

_NONE = identity()
_SOFTMAX = Softmax()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A prepared call of attention.

    Attributes:
      query: [B, T, N, H], as given or with new channels.
      key: [B, S, K, H], likewise.
      value: [B, S, K, V]; None if only the weights are computed.
      transforms: transforms of query and key that are still to be applied, by a backend or by ``transformed``, which leaves a
        ``Transport`` alone.
      biases: what is added to the scores. A read whose query or key is None reads those of this call.
      mask: the pairs that are allowed to attend.
      query_positions, key_positions: int32 [B or 1, T] and [B or 1, S], the order of the tokens.
      query_coordinates, key_coordinates: [B or 1, T, A] and [B or 1, S, A]; None: one axis, the positions.
      scale: float32 [], the factor of q.k.
      weights: what turns scores into weights.
      logits_soft_cap: c; scores become c * tanh(scores / c) after the bias and before the mask; None for no cap.
      is_self: whether queries and keys are the same tokens in the same order.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"] | None
    transforms: tuple[Rotate | Transport, ...]
    biases: tuple[Bias, ...]
    mask: Mask
    query_positions: Int[Array, "_ T"]
    key_positions: Int[Array, "_ S"]
    query_coordinates: Array | None
    key_coordinates: Array | None
    scale: Float[Array, ""]
    weights: Softmax | StickBreaking = _SOFTMAX
    logits_soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    is_self: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **fields: Any) -> "AttentionCall":
        """Returns the call with some of its fields replaced."""
        return dataclasses.replace(self, **fields)

    def transformed(self) -> "AttentionCall":
        """Returns the call with its pending rotations applied to query and key."""
        if all(isinstance(transform, Transport) for transform in self.transforms):
            return self
        query, key = _applied(self.transforms, self.query, self.key)
        rest = tuple(transform for transform in self.transforms if isinstance(transform, Transport))
        return self.replace(query=query, key=key, transforms=rest, biases=_with_vectors(self.biases, self.query, self.key))

    def with_transformed_keys(self) -> "AttentionCall":
        """Returns the call with its pending rotations applied to the key alone."""
        if not self.transforms:
            return self
        _, key = _applied(self.transforms, self.query, self.key)
        transforms = tuple(dataclasses.replace(transform, key_phase=None, key_gain=None) for transform in self.transforms)
        return self.replace(key=key, transforms=transforms, biases=_with_vectors(self.biases, None, self.key))

    @property
    def sink(self) -> Array | None:
        """Returns the logits of one more key without a value, [N or 1]; None if there is none."""
        return getattr(self.weights, "sink", None)

    @property
    def transport(self) -> Transport | None:
        """Returns the transport of keys along the tokens, or None if there is none."""
        return next((transform for transform in self.transforms if isinstance(transform, Transport)), None)

    def needs_order(self) -> str | None:
        """Returns what of the call only a walk along the keys can do that is not a softmax of their scores; None if nothing."""
        if isinstance(self.weights, StickBreaking):
            return "weights are those of StickBreaking"
        if self.transport is not None:
            return "keys are moved by a Transport"
        if any(getattr(bias.read, "side", None) == "value" for bias in self.biases):
            return "a Table adds to the output (side='value')"
        return None

    def filled(self) -> "AttentionCall":
        """Returns the call with arrays in place of every None that stands for the call's own query, key or coordinates.

        The features of a ``Pair`` stay None if the coordinates are the positions, which every tile has.
        """
        biases = _with_vectors(self.biases, self.query, self.key)
        if self.query_coordinates is None:
            return self.replace(biases=biases)

        def features(coordinates: Array) -> tuple[Array, ...]:
            return tuple(coordinates[:, None, :, axis] for axis in range(coordinates.shape[-1]))

        def of_bias(bias: Bias) -> Bias:
            if not isinstance(bias.at, Pair) or bias.at.query is not None:
                return bias
            own = dict(query=features(self.query_coordinates), key=features(self.key_coordinates))
            return dataclasses.replace(bias, at=dataclasses.replace(bias.at, **own))

        return self.replace(biases=tuple(map(of_bias, biases)))


def _applied(transforms: tuple[Any, ...], query: Array, key: Array) -> tuple[Array, Array]:
    return functools.reduce(lambda qk, transform: transform.applied(*qk), transforms, (query, key))


def _with_vectors(biases: tuple[Bias, ...], query: Array | None, key: Array | None) -> tuple[Bias, ...]:
    """Returns biases that read these vectors wherever they read those of the call; None leaves that side as it is."""

    def of_bias(bias: Bias) -> Bias:
        read, own = bias.read, {}
        if isinstance(read, Table | Hinges) and read.side == "query" and read.query is None and query is not None:
            own = dict(query=query)
        if isinstance(read, Table) and read.side == "key" and read.key is None and key is not None:
            own = dict(key=key)
        return dataclasses.replace(bias, read=dataclasses.replace(read, **own)) if own else bias

    return tuple(map(of_bias, biases))


def prepare(
    query: Array,
    key: Array,
    value: Array | None,
    encoding: PositionalEncoding | None,
    params: Params | None,
    *,
    is_causal: bool = False,
    mask: Array | None = None,
    segment_ids: Any = None,
    local_window_size: Any = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_coordinates: Array | None = None,
    key_coordinates: Array | None = None,
    hidden: Any = None,
    scale: Array | float | None = None,
    logits_soft_cap: float | None = None,
) -> AttentionCall:
    """Checks the options of a call and applies the encoding.

    The arguments are those of ``posjax.attention``; ``check_operands`` must have accepted query, key and value.

    Raises:
      ValueError: an option has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding.
    """
    encoding = check_encoding(encoding)
    window = _window(local_window_size)
    if encoding.needs_causal and not is_causal and mask is None and window[1] != 0:
        raise ValueError(
            f"is_causal must be True (or a mask given) for {encoding.name}, got is_causal={is_causal} and mask=None: "
            "it sums over the keys between key and query, which has no meaning in both directions"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    elif np.shape(scale) != ():
        raise ValueError(f"scale must be one number, got shape {np.shape(scale)}; None takes 1 / sqrt(head_dim)")
    elif not is_traced(scale) and not 0 < np.asarray(scale) < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale!r}; None takes 1 / sqrt(head_dim)")
    if is_traced(logits_soft_cap):
        raise ValueError("logits_soft_cap must be a number, got a traced array: it is part of the compiled program")
    if logits_soft_cap is not None and not (np.ndim(logits_soft_cap) == 0 and 0 < np.asarray(logits_soft_cap) < math.inf):
        raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap!r}; None leaves the scores as they are")
    query_segments, key_segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    is_self = query.shape[1] == key.shape[1] and query_positions is key_positions and query_segments is key_segments
    positions = [
        canonicalize_positions("query_positions", query_positions, query.shape[0], query.shape[1]),
        canonicalize_positions("key_positions", key_positions, key.shape[0], key.shape[1]),
    ]
    coordinates = _coordinates(encoding, query_coordinates, key_coordinates, positions, query.shape[0])
    query_hidden, key_hidden = _hidden(encoding, hidden, query, key)
    mask = _mask(query, key, is_causal, mask, query_segments, key_segments, window)
    key, value = _without_hidden_keys(key, value, mask, is_self)
    sides = []
    for order, at, segments, of_side in zip(
        positions, coordinates or (None, None), (query_segments, key_segments), (query_hidden, key_hidden), strict=True
    ):
        sides.append(Tokens.at(order, coordinates=at, segments=segments, hidden=of_side))
    mods = encoding.attend({} if params is None else params, AttentionInputs(query, key, value, *sides, scale))
    if any(isinstance(bias.at, Scan) for bias in mods.biases) and not encoding.needs_causal:
        raise ValueError(f"needs_causal must be True for {encoding.name}, whose bias is a Scan, got False")
    if encoding.needs_causal:
        _check_rising(encoding, positions[1] if key_positions is None else key_positions, key_segments)
    _check_weights(encoding, mods, is_causal, mask)
    biases = mods.biases
    first = max((n + 1 for n, transform in enumerate(mods.transforms) if isinstance(transform, Replace)), default=0)
    if first:  # what a Replace holds is made of what all transforms before it left
        biases = _with_vectors(biases, query, key)
        query, key = mods.transforms[first - 1].applied(query, key)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        transforms=tuple(t for n, t in enumerate(mods.transforms) if n >= first or isinstance(t, Transport)),
        biases=biases,
        mask=mask,
        query_positions=positions[0],
        key_positions=positions[1],
        query_coordinates=None if coordinates is None else coordinates[0],
        key_coordinates=None if coordinates is None else coordinates[1],
        scale=jnp.asarray(scale, jnp.float32),
        weights=mods.weights,
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        is_self=is_self,
    )


def check_encoding(encoding: Any) -> PositionalEncoding:
    """Returns ``encoding``, or ``identity()`` for None; raises TypeError if it is not a PositionalEncoding."""
    if encoding is None:
        return _NONE
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(f"encoding must be a PositionalEncoding such as rope(), got {what_is(encoding)}")
    return encoding


def check_operands(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError if query, key and value do not fit together; query and key are checked first."""
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


def canonicalize_positions(name: str, positions: Array | None, batch: int, length: int) -> Array:
    """Converts positions to int32 [1 or B, length], with one row for the whole batch unless rows differ; None gives 0, 1, 2, ...

    Raises:
      ValueError: positions are not integers, have the wrong shape, are negative or do not fit int32.
    """
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    known = None if is_traced(positions) else np.asarray(positions)  # NumPy: jax would wrap what does not fit, and trace under jit
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {positions.shape}")
    if known is not None and (least := known.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {least}; mask padding out by mask or segment_ids")
    if known is not None and (most := known.max()) >= FAR:
        raise ValueError(f"{name} must be below 2^31 - 1, got {most}; subtract the first one from all")
    return positions.astype(jnp.int32).reshape(-1, length)


def canonicalize_coordinates(name: str, coordinates: Array, batch: int, length: int) -> Array:
    """Converts coordinates [T, A] or [B, T, A] to int32 or float32 [1 or B, length, A].

    Raises:
      ValueError: coordinates are neither integers nor floating point, have the wrong shape, or lie so far out that int32 or float32
        does not hold them.
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
        raise ValueError(f"{name} must be below {what}, got {most:.10g}; subtract the first one from all")
    return coordinates.reshape(-1, length, shape[-1])


def _coordinates(
    encoding: PositionalEncoding, queries: Array | None, keys: Array | None, positions: list[Array], batch: int
) -> tuple[Array, Array] | None:
    """Returns the coordinates of queries and keys, or None if they are the positions on one axis."""
    if queries is None and keys is None and encoding.axes == 1:
        return None
    given = {"query_coordinates": queries, "key_coordinates": keys}
    if (queries is None) != (keys is None):
        missing = next(name for name, x in given.items() if x is None)
        raise ValueError(f"{missing} must be given where the other side's coordinates are, got None")
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
            "query_coordinates and key_coordinates must have as many axes and one dtype, "
            f"got {made[0].dtype}{list(made[0].shape)} and {made[1].dtype}{list(made[1].shape)}"
        )
    return tuple(made)


def _hidden(encoding: PositionalEncoding, hidden: Any, query: Array, key: Array) -> tuple[Array | None, Array | None]:
    """Returns what queries and keys were projected from, checked; None for each if it was not given."""
    if hidden is None:
        if encoding.needs_hidden:
            raise ValueError(
                f"hidden must be given for {encoding.name}, got None: "
                "the array [B, T, D] that query, key and value were projected from"
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


def _check_weights(encoding: PositionalEncoding, mods: ScoreModifications, is_causal: bool, mask: Mask) -> None:
    """Raises ValueError if what an encoding does along the order of keys does not fit the call or itself."""
    transports = sum(isinstance(transform, Transport) for transform in mods.transforms)
    if transports > 1:
        raise ValueError(f"encoding may transport keys once, got {transports} Transports in {encoding.name}")
    if transports and not (is_causal and mask.boolean is None):
        raise ValueError(
            f"is_causal must be True and mask None for {encoding.name}, which transports keys, got is_causal={is_causal}"
        )
    if isinstance(mods.weights, StickBreaking) and not encoding.needs_causal:
        raise ValueError(f"needs_causal must be True for {encoding.name}, whose weights are StickBreaking, got False")
    for bias in mods.biases:
        if getattr(bias.read, "side", None) == "value" and (bias.read.interpolate or isinstance(bias.at, Scan)):
            raise ValueError(f"a Table with side='value' must be read at integers of a Pair, got another in {encoding.name}")


def _check_rising(encoding: PositionalEncoding, key_positions: Array, key_segments: Array | None) -> None:
    """Raises ValueError if the keys of a segment do not stand in the order of their positions, as far as values are known."""
    if is_traced(key_positions) or is_traced(key_segments):
        return
    positions = np.atleast_2d(np.asarray(key_positions))
    segments = np.zeros_like(positions) if key_segments is None else np.asarray(key_segments)
    positions, segments = np.broadcast_arrays(positions, segments)
    order = np.argsort(segments, axis=1, kind="stable")
    positions, segments = (np.take_along_axis(x, order, axis=1) for x in (positions, segments))
    falls = (np.diff(positions, axis=1) < 0) & (np.diff(segments, axis=1) == 0)
    if falls.any():
        row, at = np.argwhere(falls)[0]
        raise ValueError(
            f"key_positions must not fall along a segment for {encoding.name}, which sums over the keys between key and query, "
            f"got {positions[row, at]} before {positions[row, at + 1]} in row {row}"
        )


def _mask(
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


def _without_hidden_keys(key: Array, value: Array | None, mask: Mask, is_self: bool) -> tuple[Array, Array | None]:
    """Returns key and value with zeros for keys that no query sees by boolean mask or segments: NaN there would reach all rows.

    A weight of zero times NaN is NaN. If queries and keys are the same tokens, every key of a segment sees itself.
    """
    visible = None
    if mask.boolean is not None:
        visible = jnp.broadcast_to(mask.boolean.any((1, 2)), key.shape[:2])
    if mask.key_segments is not None and not is_self:
        of_queries = jnp.sort(mask.query_segments, axis=1)
        at = jax.vmap(jnp.searchsorted)(of_queries, mask.key_segments)
        found = jnp.take_along_axis(of_queries, jnp.minimum(at, of_queries.shape[1] - 1), axis=1) == mask.key_segments
        visible = found if visible is None else visible & found
    if visible is None:
        return key, value
    return tuple(None if x is None else jnp.where(visible[..., None, None], x, 0) for x in (key, value))


def _segments(ids: Any) -> Array | None:
    """Returns segment ids as int32; None for None."""
    if ids is None:
        return None
    if not is_traced(ids) and ids.dtype.itemsize > 4 and np.abs(np.asarray(ids)).max() >= FAR:
        raise ValueError(f"segment_ids must be below 2^31 - 1, got {np.abs(np.asarray(ids)).max()}")
    return jnp.asarray(ids).astype(jnp.int32)


def _window(size: Any) -> tuple[int | None, int | None]:
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | np.integer) or side < 0):
            raise ValueError(f"local_window_size must be a non-negative integer or a pair (left, right) of them, got {size!r}")
    return tuple(None if side is None else int(side) for side in (left, right))
