"""``attention_fn``: adapts ``attention`` to the attention modules of Flax NNX and Flax Linen."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.api import attention, auto_sharded
from posjax.attention.arguments import check_encoding, check_operands, check_params
from posjax.attention.backends import reference
from posjax.attention.call import prepare
from posjax.checks import check
from posjax.core.encoding import PositionalEncoding
from posjax.typing import Array, Params


def attention_fn(
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    is_causal: bool = False,
    decode: bool | None = None,
) -> Callable[..., Array]:
    """Returns ``attention`` in the form that Flax's attention modules call, in place of Flax's ``dot_product_attention``.

        flax.nnx.MultiHeadAttention(..., attention_fn=pj.attention_fn(encoding, params))
        flax.linen.MultiHeadDotProductAttention(..., attention_fn=pj.attention_fn(encoding, params))

    The function takes the same arguments as Flax's: query, key and value [batch..., T, N, H] with any number of batch axes;
    ``bias`` and ``mask``, which broadcast to [batch..., N, T, S]; attention dropout; and the module that sows the weights.
    Attention is causal if ``is_causal`` is true here or in the call, or if the mask is causal.

    Queries and keys have positions 0, 1, 2, ..., or ``input_positions``, which newer NNX modules pass. In cross attention an
    encoding thus uses the positions of queries and keys within their own sequences. Encodings that need causality, such as
    ``cope``, need a mask or ``is_causal`` there as well.

    Calls with attention dropout or ``sow_weights`` need the weights and are therefore dense, with [T, S] arrays, as in Flax. The
    same weights are dropped and sown as in Flax, except that those of a query without any allowed key are zero. All other calls,
    including those with ``deterministic=True``, run as ``attention`` does. The softmax is always in float32. ``precision`` is
    ignored; use ``jax.default_matmul_precision`` instead.

    Args:
      encoding, params: as in ``attention``.
      is_causal: whether every call is causal.
      decode: True for a module with ``decode=True``, which calls with one query and all slots of its cache as keys. The position of
        a key is then its slot, and that of the query the last slot that the mask allows, or ``input_positions``. False: one query
        with S keys and a mask is cross attention, and its position is 0. None: such calls raise an error, because they are
        ambiguous.

    Raises:
      ValueError: (in the call) an argument is invalid, a call may be either decoding or cross attention, or the module has custom
        einsums.
    """
    encoding, causal = check_encoding(encoding), check("is_causal", is_causal, bool)
    check_params(params)

    def call(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        input_positions: Array | None = None,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
    ) -> Array:
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError("the attention module must have no custom einsums, such as AQT's; attention_fn does not support them")
        _check_dropout(dropout_rate, dropout_rng, deterministic)
        dtype = dtype or jnp.result_type(query, key, value)
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        batch = query.shape[:-3]
        mask = None if mask is None else _one_batch_axis(mask, batch).astype(bool)  # Flax's masks are float ones and zeros
        bias = None if bias is None else _one_batch_axis(bias, batch)
        query, key, value = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value))
        if input_positions is not None:
            input_positions = input_positions.reshape(-1, input_positions.shape[-1])
        positions = _positions(query, key, mask, input_positions, decode)
        arrays: dict[str, Any] = dict(mask=mask, bias=bias, query_positions=positions[0], key_positions=positions[1])
        drops = dropout_rate > 0 and not deterministic
        if module is None and not drops:
            out: Any = attention(query, key, value, encoding, params, is_causal=is_causal or causal, **arrays)
            return out.reshape(*batch, *out.shape[1:])

        def dense(query: Array, key: Array, value: Array, params: Params, arrays: dict, rng: Array | None) -> tuple[Array, Array]:
            call = prepare(query, key, value, encoding, params, is_causal=is_causal or causal, **arrays)
            weights = reference.weights(call)
            kept = weights
            if drops and rng is not None:
                shape = (*batch, *weights.shape[1:])
                kept = weights * _dropout(rng, dropout_rate, shape, broadcast_dropout)
            return reference.weighted_values(call, kept), jnp.moveaxis(weights, 2, 1)

        check_operands(query, key, value)
        out, weights = auto_sharded(dense, query, key, value, params, arrays, dropout_rng)
        if module is not None:
            weights = jnp.moveaxis(weights, 1, 2).astype(dtype)
            _sow(module, weights.reshape(*batch, *weights.shape[1:]))
        return out.reshape(*batch, *out.shape[1:])

    return call


def _check_dropout(rate: float, rng: Array | None, deterministic: bool) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must lie in [0, 1), got {rate!r}")
    if rate > 0 and not deterministic and rng is None:
        raise ValueError(f"dropout_rng must be a PRNG key with dropout_rate={rate!r} and deterministic=False, got None")


def _dropout(rng: Array, rate: float, shape: tuple[int, ...], broadcast: bool) -> Array:
    """Returns the factors of weights [batch..., N, T, S], with one batch axis: 0 where a weight is dropped, else 1 / (1 - rate).

    With ``broadcast``, all batches and heads drop the same pairs.
    """
    drawn = (*(1,) * (len(shape) - 2), *shape[-2:]) if broadcast else shape
    keep = jax.random.bernoulli(rng, 1 - rate, drawn)
    return keep.reshape(-1, *drawn[-3:]).astype(jnp.float32) / (1 - rate)


def _one_batch_axis(x: Array, batch: tuple[int, ...]) -> Array:
    """Merges the batch axes of an array that broadcasts to [batch..., N, T, S]."""
    own = x.shape[:-3]
    if math.prod(own) != 1:
        x, own = jnp.broadcast_to(x, (*batch, *x.shape[-3:])) if len(batch) > 1 else x, batch
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x


def _positions(
    query: Array, key: Array, mask: Array | None, positions: Array | None, decode: bool | None
) -> tuple[Array | None, Array | None]:
    """Returns the positions of queries and keys; None for 0, 1, 2, ..."""
    (batch, length), keys = query.shape[:2], key.shape[1]
    if length == keys:
        return positions, positions
    if positions is not None or length != 1 or mask is None or decode is False:
        return positions, None
    if decode is None:
        raise ValueError(
            f"decode must be True or False in attention_fn for a call with one query, {keys} keys and a mask, got None; "
            "use True if the keys are the cache of a module with decode=True, False for cross attention"
        )
    allowed = jnp.broadcast_to(mask.any((-3, -2)), (batch, keys))
    return (keys - 1 - jnp.argmax(allowed[:, ::-1], axis=1))[:, None], None


def _sow(module: Any, weights: Array) -> None:
    """Stores the weights in the calling module, as Flax does."""
    from flax import nnx  # not at the top, because posjax.attention does not depend on Flax; a Flax module has imported it already

    module.sow(nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates", "attention_weights", weights)
