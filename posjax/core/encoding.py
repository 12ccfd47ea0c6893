"""What a positional encoding is: a value made of pure functions.

An encoding may act at four places, and most act at one:

    tokens -> embed -> [ per layer: condition; q, k -> rotate; scores + bias ] -> logits

``identity`` acts nowhere (NoPE); ``chain`` acts wherever its members do, in their order.
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
    """The sizes that an encoding's parameters depend on.

    Attributes:
      num_heads: N, query heads.
      head_dim: H, channels of one head.
      embed_dim: D, channels of the model; needed by learned and tupe. None: N * H.
      max_length: longest sequence, for encodings with a table of positions (learned, tupe).
      num_kv_heads: K, key heads, which divides N. None: N.

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
    """What attention was called with, for encodings whose bias depends on it.

    Attributes:
      query: [B, T, N, H] before rotation.
      key: [B, S, K, H] before rotation.
      value: [B, S, K, V]; None where only the weights are asked for.
      query_positions: [B or 1, T] integers.
      key_positions: [B or 1, S] integers.
      scale: what q.k is multiplied with.
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
    """A positional encoding. All functions are pure; parameters are a dict of learned arrays and nothing else.

    Attributes:
      name: for tables and messages.
      init: (key, dims) -> params: the learned leaves, float32; {} where nothing is learned.
      embed: (params, x [B, T, D], positions [B, T]) -> x, what is added to the embeddings.
      condition: (params, hidden [B, T, D]) -> params: per-token arrays made from the input of an attention layer join the
        parameters (CoPE's separate gate keys). Models call it once a layer before attention.
      rotate: (params, query, key, inputs) -> (query, key), rotated or widened. Query and key of equal new width.
      rotation: (params, inputs) -> the rotation that ``rotate`` is, where it is one of pairs of channels and nothing else; None: it
        is something else, or nothing.
      bias: (params, inputs) -> bias terms.
      per_layer: True where every layer learns its own params, False where one set serves all; or a dict of the params'
        form, down to where it is the same for all below.
      max_length: dims -> the longest sequence that the parameters can place; None: no limit.
      is_contextual: the bias counts over the keys between key and query, so attention must be causal or masked.
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
        """Whether query and key are changed at all."""
        return self.rotate is not _no_rotation


def identity() -> PositionalEncoding:
    """No positional encoding (NoPE): scores are scale * q.k and nothing else.

    A causal decoder still tells positions apart through its mask; a bidirectional one is symmetric under permutation.
    Kazemnejad et al., arXiv:2305.19466.
    """
    return PositionalEncoding(name="identity")


def leaf(params: Params, name: str, encoding: str, shape: tuple[int | None, ...] | None = None) -> Array:
    """params[name], or an error that says where it comes from. ``shape``: what it must have, None for an axis of any length."""
    if not params or name not in params:
        have = sorted(params) if params else params
        raise ValueError(f"params of {encoding} must hold {name!r}, got {have}; pass what encoding.init(key, dims) returned")
    found = params[name]
    if shape is not None and (found.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, found.shape, strict=True))):
        wanted = str(shape).replace("None", "any")
        raise ValueError(f"params[{name!r}] of {encoding} must have shape {wanted}, got {found.shape}")
    return found


# Settings: numbers of an encoding that change no shapes, so that one compiled program serves many values of them -------


def setting(value: Array | float | int) -> Float[Array, ""]:
    """A setting as a float32 scalar with gradient zero: some kernels have no gradient in it, so none has."""
    return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
