"""``AttentionCall``: one call of attention, checked and prepared, in the form that every backend takes.

``prepare`` is the only place where an encoding is applied. What it returns holds arrays, bias terms and a mask; no backend knows
which encoding they came from.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import is_traced
from posjax.core.bias import BiasTerm, Rotation
from posjax.core.encoding import AttentionInputs, PositionalEncoding, identity, what_is
from posjax.core.masks import Mask
from posjax.typing import Array, Float, Int, Params

_NONE = identity()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A prepared call of attention.

    Attributes:
      query: [B, T, N, H], rotated or widened by the encoding unless ``rotation`` is pending.
      key: [B, S, K, H], likewise.
      value: [B, S, K, V]; None if only the weights are computed.
      terms: the biases that are added to the scores.
      mask: the pairs that are allowed to attend.
      query_positions, key_positions: int32 [B or 1, T] and [B or 1, S].
      scale: float32 [], the factor of q.k.
      rotation: a rotation of query and key that the backend still has to apply, or ``rotated``; None if there is none.
      logits_soft_cap: c; scores become c * tanh(scores / c) after the bias and before the mask; None for no cap.
      query_is_unrotated: whether ``query`` is the one that CoPE multiplies with its embedding, from before any rotation. If False,
        the rows of the CoPE term hold that query.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"] | None
    terms: tuple[BiasTerm, ...]
    mask: Mask
    query_positions: Int[Array, "_ T"]
    key_positions: Int[Array, "_ S"]
    scale: Float[Array, ""]
    rotation: Rotation | None = None
    logits_soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    query_is_unrotated: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **fields: Any) -> "AttentionCall":
        """Returns the call with some of its fields replaced."""
        return dataclasses.replace(self, **fields)

    def rotated(self) -> "AttentionCall":
        """Returns the call with its pending rotation, if any, applied to query and key."""
        if self.rotation is None:
            return self.replace(query_is_unrotated=False)
        query, key = self.rotation.applied(self.query, self.key)
        return self.replace(query=query, key=key, rotation=None, query_is_unrotated=False)


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
    scale: Array | float | None = None,
    logits_soft_cap: float | None = None,
    rotated: bool = True,
) -> AttentionCall:
    """Checks the options of a call and applies the encoding.

    The arguments are those of ``posjax.attention``; ``check_operands`` must have accepted query, key and value.

    Args:
      rotated: whether query and key are returned rotated. If False, a pairwise rotation is left pending in the call, for backends
        that apply it themselves.

    Raises:
      ValueError: an option has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding.
    """
    encoding = check_encoding(encoding)
    window = _window(local_window_size)
    if encoding.is_contextual and not is_causal and mask is None and window[1] != 0:
        raise ValueError(
            f"is_causal must be True (or a mask given) for {encoding.name}, got is_causal={is_causal} and mask=None: "
            "it counts over the keys between key and query, which has no meaning in both directions"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    elif not isinstance(scale, jax.Array) and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}; None takes 1 / sqrt(head_dim)")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap!r}; None leaves the scores as they are")
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        query_positions=canonicalize_positions("query_positions", query_positions, query.shape[0], query.shape[1]),
        key_positions=canonicalize_positions("key_positions", key_positions, key.shape[0], key.shape[1]),
        scale=scale,
    )
    params = {} if params is None else params
    terms = encoding.bias(params, inputs)
    rotation = None if rotated else encoding.rotation(params, inputs)
    if rotation is None:
        query, key = encoding.rotate(params, query, key, inputs)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        terms=terms,
        mask=_mask(inputs, is_causal, mask, segment_ids, window),
        query_positions=inputs.query_positions,
        key_positions=inputs.key_positions,
        scale=jnp.asarray(scale, jnp.float32),
        rotation=rotation,
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        query_is_unrotated=not rotated and (rotation is not None or not encoding.changes_query),
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
      ValueError: positions are not integers, have the wrong shape or are negative.
    """
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {positions.shape}")
    # NumPy, because inside jit a jax operation returns a tracer even for a concrete array.
    if not is_traced(positions) and (least := np.asarray(positions).min()) < 0:
        raise ValueError(f"{name} must not be negative, got {least}; mask padding out by mask or segment_ids")
    return positions.astype(jnp.int32).reshape(-1, length)


def _mask(inputs: AttentionInputs, is_causal: bool, mask: Any, segment_ids: Any, window: tuple[int | None, int | None]) -> Mask:
    batch, length, heads, _ = inputs.query.shape
    keys = inputs.key.shape[1]
    if mask is not None:
        if getattr(mask, "dtype", None) != jnp.bool_:
            raise ValueError(
                f"mask must be boolean, True where attention is allowed, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        full_shape = (batch, heads, length, keys)
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
        if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, full_shape, strict=True)):
            raise ValueError(f"mask must broadcast to [B, N, T, S] = {full_shape}, got {mask.shape}")
    query_segments, key_segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if segment_ids is not None:
        for name, ids, size in (("queries", query_segments, length), ("keys", key_segments, keys)):
            if getattr(ids, "shape", None) != (batch, size) or not jnp.issubdtype(ids.dtype, jnp.integer):
                got = f"{ids.dtype}{list(ids.shape)}" if hasattr(ids, "shape") else repr(ids)
                raise ValueError(f"segment_ids must be integers [{batch}, {size}] for the {name}, got {got}; a pair gives both")
    return Mask(
        boolean=mask,
        query_segments=query_segments,
        key_segments=key_segments,
        is_causal=is_causal,
        window=window,
    )


def _window(size: Any) -> tuple[int | None, int | None]:
    left, right = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"local_window_size must be a non-negative integer or a pair (left, right) of them, got {size!r}")
    return left, right
