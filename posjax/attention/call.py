"""``AttentionCall``: a checked and prepared call of attention, in the form that every backend takes.

``prepare`` is the only place where an encoding is applied. Its result consists of arrays, structures and a mask; backends do not
depend on encodings.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.arguments import (
    canonicalize_bias,
    canonicalize_mask,
    canonicalize_positions,
    canonicalize_window,
    check_encoding,
    check_params,
    check_scale,
    check_soft_cap,
    coordinates_of_sides,
    hidden_of_sides,
    mark_padding,
    segments_of_sides,
    valid_tokens,
)
from posjax.checks import check, is_symbolic, is_traced
from posjax.core.encoding import AttentionInputs, PositionalEncoding, Tokens
from posjax.core.masks import Mask
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
    check_structures,
)
from posjax.typing import Array, Float, Int, Params

_SOFTMAX = Softmax()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """Holds a prepared call of attention.

    Attributes:
      query: [B, T, N, H], as given or with new channels.
      key: [B, S, K, H], likewise.
      value: [B, S, K, V]; V is 0 if only the weights are computed.
      transforms: transforms of query and key that are still to be applied, by a backend or by ``transformed``, which leaves a
        ``Transport`` alone.
      biases: biases added to the scores. A read whose query or key is None reads those of this call.
      mask: the pairs that are allowed to attend.
      query_positions, key_positions: int32 [B or 1, T] and [B or 1, S], the order of the tokens.
      query_coordinates, key_coordinates: [B or 1, T, A] and [B or 1, S, A]; None: one axis, the positions.
      scale: float32 [], the factor of q.k.
      weights: how scores are converted to weights.
      bias: [B or 1, N or 1, T or 1, S or 1], the caller's bias of the scores; None for none.
      logits_soft_cap: c; scores become c * tanh(scores / c) after the bias and before the mask; None for no cap.
      is_self: whether queries and keys are the same tokens in the same order.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    transforms: tuple[Rotate | Transport, ...]
    biases: tuple[Bias, ...]
    mask: Mask
    query_positions: Int[Array, "_ T"]
    key_positions: Int[Array, "_ S"]
    query_coordinates: Array | None
    key_coordinates: Array | None
    scale: Float[Array, ""]
    weights: Softmax | StickBreaking = _SOFTMAX
    bias: Float[Array, "_ _ _ _"] | None = None
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
        """Returns the call with its pending rotations applied only to the key."""
        if not self.transforms:
            return self
        _, key = _applied(self.transforms, self.query, self.key)
        transforms = tuple(dataclasses.replace(rotation, key_phase=None, key_gain=None) for rotation in self.rotations)
        return self.replace(key=key, transforms=transforms, biases=_with_vectors(self.biases, None, self.key))

    @property
    def sink(self) -> Array | None:
        """Returns the logits of an additional key without a value, [N or 1]; None if there is none."""
        return getattr(self.weights, "sink", None)

    @property
    def rotations(self) -> tuple[Rotate, ...]:
        """Returns the rotations of query and key that are still to be applied."""
        return tuple(transform for transform in self.transforms if isinstance(transform, Rotate))

    @property
    def transport(self) -> Transport | None:
        """Returns the transport of keys along the tokens, or None if there is none."""
        return next((transform for transform in self.transforms if isinstance(transform, Transport)), None)

    def needs_order(self) -> str | None:
        """Returns which part of the call needs a walk along the keys other than a softmax of scores; None if no part does."""
        if isinstance(self.weights, StickBreaking):
            return "weights are those of StickBreaking"
        if self.transport is not None:
            return "keys are transformed by a Transport"
        if any(getattr(bias.read, "side", None) == "value" for bias in self.biases):
            return "a Table adds to the output (side='value')"
        return None

    def filled(self) -> "AttentionCall":
        """Returns the call with every None that stands for its own query, key or coordinates replaced by the array.

        The features of a ``Pair`` stay None if the coordinates are the positions, which every tile has.
        """
        biases = _with_vectors(self.biases, self.query, self.key)
        if self.query_coordinates is None or self.key_coordinates is None:
            return self.replace(biases=biases)
        query, key = (
            tuple(coordinates[:, None, :, axis] for axis in range(coordinates.shape[-1]))
            for coordinates in (self.query_coordinates, self.key_coordinates)
        )

        def of_bias(bias: Bias) -> Bias:
            if not isinstance(bias.at, Pair) or bias.at.query is not None:
                return bias
            return dataclasses.replace(bias, at=dataclasses.replace(bias.at, query=query, key=key))

        return self.replace(biases=tuple(map(of_bias, biases)))


def _applied(transforms: tuple[Any, ...], query: Array, key: Array) -> tuple[Array, Array]:
    return functools.reduce(lambda qk, transform: transform.applied(*qk), transforms, (query, key))


def _with_vectors(biases: tuple[Bias, ...], query: Array | None, key: Array | None) -> tuple[Bias, ...]:
    """Returns biases that read these vectors wherever they read those of the call; None leaves that side unchanged."""

    def of_bias(bias: Bias) -> Bias:
        read = bias.read
        if isinstance(read, Table | Hinges) and read.side == "query" and read.query is None and query is not None:
            return dataclasses.replace(bias, read=dataclasses.replace(read, query=query))
        if isinstance(read, Table) and read.side == "key" and read.key is None and key is not None:
            return dataclasses.replace(bias, read=dataclasses.replace(read, key=key))
        return bias

    return tuple(map(of_bias, biases))


def prepare(
    query: Array,
    key: Array,
    value: Array | None,
    encoding: PositionalEncoding | None,
    params: Params | None,
    **options: Any,
) -> AttentionCall:
    """Checks the options of a call on whole sequences and applies the encoding; arguments and errors as in ``prepare_next``."""
    return prepare_next(query, key, value, encoding, params, None, **options)[0]


def prepare_next(
    query: Array,
    key: Array,
    value: Array | None,
    encoding: PositionalEncoding | None,
    params: Params | None,
    state: Any,
    *,
    is_causal: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    segment_ids: Any = None,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: Any = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_coordinates: Array | None = None,
    key_coordinates: Array | None = None,
    hidden: Any = None,
    scale: Array | float | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[AttentionCall, Any]:
    """Checks the options of a call on the next tokens of sequences and applies the encoding.

    Args:
      state: the encoding's state after the tokens before; None at the start.

    The other arguments are those of ``posjax.attention``; ``check_operands`` must have accepted query, key and value.

    Returns:
      The call, and the encoding's state after these tokens.

    Raises:
      ValueError: an option has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding.
    """
    encoding, params, is_causal = check_encoding(encoding), check_params(params), check("is_causal", is_causal, bool)
    window = canonicalize_window(local_window_size)
    if encoding.needs_causal and not is_causal and mask is None and window[1] != 0:
        raise ValueError(
            f"is_causal must be True (or a mask given) for {encoding.name}, got is_causal={is_causal} and mask=None; "
            "the encoding sums over the keys between key and query, which is defined in one direction only"
        )
    scale, logits_soft_cap = check_scale(scale, query.shape[-1]), check_soft_cap(logits_soft_cap)
    mask, bias = canonicalize_mask(mask, query, key), canonicalize_bias(bias, query, key)
    segments = segments_of_sides(segment_ids, query, key)
    valid = (
        valid_tokens("query_seq_lengths", query_seq_lengths, query),
        valid_tokens("key_value_seq_lengths", key_value_seq_lengths, key),
    )
    is_self = query.shape[1] == key.shape[1] and query_positions is key_positions and segments[0] is segments[1]
    is_self = is_self and query_seq_lengths is key_value_seq_lengths
    segments, mask_segments = mark_padding(segments, valid, query, key)
    positions = [
        canonicalize_positions("query_positions", query_positions, query.shape[0], query.shape[1]),
        canonicalize_positions("key_positions", key_positions, key.shape[0], key.shape[1]),
    ]
    coordinates = coordinates_of_sides(encoding, query_coordinates, key_coordinates, positions, query.shape[0])
    query_hidden, key_hidden = hidden_of_sides(encoding, hidden, query, key)
    rules = Mask(mask, *mask_segments, is_causal, window)
    query = _cleared(query, valid[0])
    query_hidden, key_hidden = (
        None if x is None else _cleared(x, v) for x, v in ((query_hidden, valid[0]), (key_hidden, valid[1]))
    )
    key, value = _without_hidden_keys(key, value, rules)
    query_at, key_at = coordinates or (None, None)
    queries = Tokens.at(positions[0], coordinates=query_at, segments=segments[0], hidden=query_hidden)
    keys = Tokens.at(positions[1], coordinates=key_at, segments=segments[1], hidden=key_hidden)
    mods = encoding.attend(params, AttentionInputs(query, key, value, queries, keys, scale, state=state))
    check_structures(encoding.title, mods, query, key)
    if any(isinstance(bias.at, Scan) for bias in mods.biases) and not encoding.needs_causal:
        raise ValueError(f"needs_causal must be True for {encoding.name}, which has a Scan, got False")
    if encoding.needs_causal:
        # as given, because inside jit a jax operation returns a tracer even for a concrete array
        given = segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids
        ids = given if valid[1] is None else segments[1]
        _check_rising(encoding, positions[1] if key_positions is None else key_positions, ids)
    _check_weights(encoding, mods, is_causal, rules)
    biases = mods.biases
    first = max((n + 1 for n, transform in enumerate(mods.transforms) if isinstance(transform, Replace)), default=0)
    if first:  # a Replace holds the results of all transforms before it
        biases = _with_vectors(biases, query, key)
        query, key = mods.transforms[first - 1].applied(query, key)
    call = AttentionCall(
        query=query,
        key=key,
        value=key[..., :0] if value is None else value,
        transforms=tuple(
            t for n, t in enumerate(mods.transforms) if isinstance(t, Transport) or (n >= first and isinstance(t, Rotate))
        ),
        biases=biases,
        mask=rules,
        query_positions=positions[0],
        key_positions=positions[1],
        query_coordinates=query_at,
        key_coordinates=key_at,
        scale=jnp.asarray(scale, jnp.float32),
        weights=mods.weights,
        bias=bias,
        logits_soft_cap=logits_soft_cap,
        is_self=is_self,
    )
    return call, mods.state


def _check_weights(encoding: PositionalEncoding, mods: ScoreModifications, is_causal: bool, mask: Mask) -> None:
    """Raises ValueError if structures of an encoding that depend on the order of keys are incompatible with it or the call."""
    transports = sum(isinstance(transform, Transport) for transform in mods.transforms)
    if transports > 1:
        raise ValueError(f"encoding must have at most one Transport, got {transports} in {encoding.name}")
    if transports and not (is_causal and mask.boolean is None):
        raise ValueError(
            f"is_causal must be True and mask None for {encoding.name}, which has a Transport, got is_causal={is_causal}"
        )
    if isinstance(mods.weights, StickBreaking) and not encoding.needs_causal:
        raise ValueError(f"needs_causal must be True for {encoding.name}, whose weights are StickBreaking, got False")
    for bias in mods.biases:
        read = bias.read
        if isinstance(read, Table) and read.side == "value" and (read.interpolate or isinstance(bias.at, Scan)):
            raise ValueError(f"a Table with side='value' must have a Pair and interpolate=False, got another in {encoding.name}")


def _check_rising(encoding: PositionalEncoding, key_positions: Array, key_segments: Array | None) -> None:
    """Raises ValueError if the keys of a segment are not in the order of their positions, as far as values are concrete."""
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
            f"key_positions must not decrease along a segment for {encoding.name}, which sums over the keys between key and query, "
            f"got {positions[row, at]} before {positions[row, at + 1]} in row {row}"
        )


def _cleared(x: Any, valid: Array | None) -> Any:
    """Zeroes padding in x [B, T, ...], because NaN would reach gradients and whatever an encoding computes from ``hidden``."""
    if x is None or valid is None:
        return x
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def _without_hidden_keys(key: Array, value: Array | None, mask: Mask) -> tuple[Array, Array | None]:
    """Zeroes keys and values that are invisible to all queries by boolean mask or segments, because NaN would reach all rows.

    A weight of zero times NaN is NaN. If queries and keys have the same segments, every key is visible to some query.
    """
    visible = None
    if mask.boolean is not None:
        visible = jnp.broadcast_to(mask.boolean.any((1, 2)), key.shape[:2])
    if mask.key_segments is not mask.query_segments and mask.query_segments is not None and mask.key_segments is not None:
        if is_symbolic(query_count := mask.query_segments.shape[1]):  # which searchsorted does not take; XLA fuses the pairs away
            found = (mask.query_segments[:, None] == mask.key_segments[:, :, None]).any(-1)
        else:
            of_queries = jnp.sort(mask.query_segments, axis=1)
            at = jax.vmap(jnp.searchsorted)(of_queries, mask.key_segments)
            found = jnp.take_along_axis(of_queries, jnp.minimum(at, query_count - 1), axis=1) == mask.key_segments
        visible = found if visible is None else visible & found
    if visible is None:
        return key, value
    visible = visible[..., None, None]
    return jnp.where(visible, key, 0), None if value is None else jnp.where(visible, value, 0)
