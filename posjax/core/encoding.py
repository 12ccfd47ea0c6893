"""The interface of a positional encoding: a value made of pure functions.

An encoding may act at four points of a model, and most act at one:

    tokens -> embed -> [ per layer: condition; q, k -> rotate; scores + bias ] -> logits

``identity`` acts at none (NoPE); ``chain`` acts wherever its members do, in their order.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posjax.checks import check_at_least
from posjax.core.bias import BiasTerm, Rotation
from posjax.typing import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes of a model that determine the shapes of an encoding's parameters.

    Attributes:
      num_heads: N, number of query heads.
      head_dim: H, channels per head.
      embed_dim: D, channels of the model; needed by learned and tupe. None is N * H.
      max_length: longest sequence in tokens, for encodings with a table of positions (learned, tupe).
      num_kv_heads: K, number of key heads, which divides N. None is N.

    Raises:
      ValueError: a size is not a positive integer, or num_kv_heads does not divide num_heads.
    """

    num_heads: int
    head_dim: int
    embed_dim: int | None = None
    max_length: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.embed_dim is None:
            object.__setattr__(self, "embed_dim", self.num_heads * self.head_dim)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "max_length" or value is not None:
                check_at_least(field.name, value, 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The inputs of an attention call, for encodings whose rotation or bias depends on them.

    Attributes:
      query: [B, T, N, H] before rotation.
      key: [B, S, K, H] before rotation.
      value: [B, S, K, V]; None if only the weights are computed.
      query_positions: [B or 1, T] integers.
      key_positions: [B or 1, S] integers.
      scale: factor of q.k.
    """

    query: Array
    key: Array
    value: Array | None
    query_positions: Array
    key_positions: Array
    scale: Any


def _no_params(key: Array, dims: Dims) -> Params:
    return {}


def _same_embedding(params: Params, x: Array, positions: Array) -> Array:
    return x


def _same_params(params: Params, hidden: Array) -> Params:
    return params


def _no_rotation(params: Params, query: Array, key: Array, inputs: AttentionInputs) -> tuple[Array, Array]:
    return query, key


def _no_bias(params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
    return ()


def _no_limit(dims: Dims) -> int | None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class PositionalEncoding:
    """A positional encoding: a bundle of pure functions whose parameters are a dict of learned arrays and nothing else.

    Attributes:
      name: name in tables and messages.
      init: (key, dims) -> params, the learned arrays, float32; {} if nothing is learned.
      embed: (params, x [B, T, D], positions [B, T]) -> x with the encoding of its positions added.
      condition: (params, hidden [B, T, D]) -> params extended by per-token arrays computed from the input of an attention layer
        (CoPE's separate gate keys). Models call it once per layer, before attention.
      rotate: (params, query, key, inputs) -> (query, key), rotated or widened. Both have the same new width.
      rotation: (params, inputs) -> ``rotate`` in structured form, for kernels that apply the rotation themselves. None if
        ``rotate`` is not a pairwise rotation of channels.
      bias: (params, inputs) -> bias terms.
      per_layer: True if every layer learns its own params, False if all layers share one set; or a dict with the structure of
        params, down to the level below which one value holds.
      max_length: dims -> the longest sequence that the parameters support, in tokens; None for no limit.
      is_contextual: True if the bias counts over the keys between key and query, so that attention must be causal or masked.
    """

    name: str
    init: Callable[[Array, Dims], Params] = _no_params
    embed: Callable[[Params, Array, Array], Array] = _same_embedding
    condition: Callable[[Params, Array], Params] = _same_params
    rotate: Callable[[Params, Array, Array, AttentionInputs], tuple[Array, Array]] = _no_rotation
    rotation: Callable[[Params, AttentionInputs], Rotation] | None = None
    bias: Callable[[Params, AttentionInputs], tuple[BiasTerm, ...]] = _no_bias
    per_layer: bool | Mapping[str, Any] = False
    max_length: Callable[[Dims], int | None] = _no_limit
    is_contextual: bool = False

    @property
    def turns(self) -> bool:
        """Returns whether ``rotate`` may change query and key."""
        return self.rotate is not _no_rotation


def identity() -> PositionalEncoding:
    """Adds no positional encoding (NoPE): scores are scale * q.k.

    A causal decoder can still distinguish positions through its mask; a bidirectional model is symmetric under permutation.
    Kazemnejad et al., arXiv:2305.19466.
    """
    return PositionalEncoding(name="identity")


def leaf(params: Params, name: str, encoding: str, shape: tuple[int | None, ...] | None = None) -> Array:
    """Returns params[name] after checking that it exists and has the right shape.

    Args:
      params: parameters of the encoding.
      name: key of the parameter.
      encoding: name of the encoding, for messages.
      shape: required shape, with None for an axis of any length; None accepts every shape.

    Raises:
      ValueError: the parameter is missing or has another shape.
    """
    if not params or name not in params:
        have = sorted(params) if params else params
        raise ValueError(f"params of {encoding} must hold {name!r}, got {have}; pass what encoding.init(key, dims) returned")
    found = params[name]
    if shape is not None and (found.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, found.shape, strict=True))):
        wanted = str(shape).replace("None", "any")
        raise ValueError(f"params[{name!r}] of {encoding} must have shape {wanted}, got {found.shape}")
    return found


# Traced hyperparameters: numbers that change no shapes, so that one compiled program serves many values -----------------


def setting(value: Array | float | int) -> Float[Array, ""]:
    """Converts a hyperparameter to a float32 scalar with gradient zero.

    Some kernels do not compute a gradient for it, so no implementation does.
    """
    return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
