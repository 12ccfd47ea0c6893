"""``attention``: scaled dot-product attention under any encoding and mask, on any of the backends.

A call goes through ``call.prepare``, which applies the encoding, and ``dispatch.run``, which selects the backend.
"""

from collections.abc import Callable
from typing import Any

import jax

from posjax.attention.arguments import check_encoding, check_operands
from posjax.attention.backends import reference
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.ring.context import find_context
from posjax.attention.backends.shards import infer_shard_spec
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.call import prepare
from posjax.attention.dispatch import Implementation, load_kernels, run
from posjax.core.encoding import PositionalEncoding
from posjax.typing import Array, Float, Params


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    is_causal: bool = False,
    mask: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_coordinates: Array | None = None,
    key_coordinates: Array | None = None,
    hidden: Array | tuple[Array, Array] | None = None,
    scale: Array | float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
    block_sizes: Blocks | GpuBlocks | None = None,
) -> Float[Array, "B T N V"]:
    """Computes scaled dot-product attention under a positional encoding.

    out = softmax(scale * q.k + bias) v over the allowed keys; the encoding rotates or widens q and k and supplies the bias.
    Argument names and layout are those of ``jax.nn.dot_product_attention``, which this function can replace.

    Args:
      query: [B, T, N, H] floating point.
      key: [B, S, K, H], with K dividing N (grouped-query attention: query head n uses key head n // (N / K)).
      value: [B, S, K, V]; query, key and value have the same dtype.
      encoding: positional encoding; None is ``identity()``.
      params: parameters from ``encoding.init``.
      is_causal: True allows only keys whose position is not after the query's.
      mask: bool, [B or 1, N or 1, T or 1, S or 1] (leading axes may be omitted), True where attention is allowed.
      segment_ids: integers [B, T] if T = S, or a pair [B, T], [B, S]; only tokens of equal segments attend to each other.
      local_window_size: number of positions to the (left, right) of the query's in which keys are allowed, None for no limit; an
        integer w means (w, w).
      query_positions, key_positions: non-negative integers, [T] or [B, T] and [S] or [B, S]. None is 0, 1, 2, ...
      query_coordinates, key_coordinates: [T, A] or [B, T, A] and [S, A] or [B, S, A] integers or floats on A axes, which encodings
        read in place of the positions; masks, windows and counts still use the positions. None is the position on every axis.
      hidden: [B, T, D], the activations that query, key and value were projected from, or a pair for queries and keys; for
        encodings that need it, such as ``cope(64, gates="keys")``.
      scale: factor of q.k; None is 1 / sqrt(H), with H the head dimension before an encoding widens it.
      logits_soft_cap: c; scores become c * tanh(scores / c), after the bias and before the mask. None applies no cap.
      implementation: None selects the fastest implementation that supports the call.
        "xla" is dense: the reference, with [T, S] arrays, and the only one with derivatives of every order and mode.
        "xla_chunked" processes one tile at a time on any device. Memory grows with T + S; gradients are first-order, reverse-mode.
        "pallas" is the kernel of the platform that the program is lowered for: TPU, NVIDIA GPU (Ampere or later), or, for tests on
        a CPU, the TPU kernel in interpret mode. It supports no mask arrays. It takes any number of biases of two tokens (``Pair``,
        read as numbers, by tables or by small networks, with learned numbers and features), sums of the keys' own gates (``Scan``
        of keys), and one count of CoPE's form: rope, alibi, t5, tupe, cope with gates="logits", and their chains.
        On a mesh with an axis named "context" ("sequence", "seq", "cp" and "sp" work too), or with an explicit axis that shards T,
        None, "xla_chunked" and "pallas" run ring attention, in which each device holds a shard of the sequence.
      block_sizes: tile sizes of the "pallas" kernel, ``Blocks`` on a TPU and ``GpuBlocks`` on a GPU. None takes the defaults of the
        chip, reduced if the call would not fit into a TPU's VMEM. If ``implementation`` is None, they apply if the kernel runs.

    Returns:
      [B, T, N, V] in the dtype of value. A query without any allowed key gets zeros.

    Raises:
      ValueError: an argument has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding, or ``block_sizes`` is neither Blocks nor GpuBlocks.
      NotImplementedError: the given implementation does not support the call; the message names one that does.
    """
    check_operands(query, key, value)
    load_kernels(query, key, implementation)
    options = dict(is_causal=is_causal, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap)
    spec, context = infer_shard_spec(query), find_context(query)  # before auto_axes hides explicit shardings

    def compute(query: Array, key: Array, value: Array, params: Params, arrays: dict[str, Any]) -> Array:
        call = prepare(query, key, value, encoding, params, **options, **arrays)
        return run(call, implementation, spec=spec, context=context, block_sizes=block_sizes)

    tokens = dict(query_positions=query_positions, key_positions=key_positions, segment_ids=segment_ids, hidden=hidden)
    coordinates = dict(query_coordinates=query_coordinates, key_coordinates=key_coordinates)
    arrays = dict(mask=mask, scale=scale) | tokens | coordinates
    return auto_sharded(compute, query, key, value, params, arrays)


def auto_sharded(compute: Callable[..., Array], query: Array, *args: Any) -> Array:
    """Calls compute(query, *args) with explicit mesh axes, such as those of jax.make_mesh, turned into automatic ones.

    ``compute`` must return an array with query's axes except the last. Inside, the compiler propagates shardings, because a loop
    over tiles cannot state the sharding of each of its operations.
    """
    sharding = jax.typeof(query).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return compute(query, *args)
    out = jax.sharding.PartitionSpec(*sharding.spec[:3], None)
    leaves, structure = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def automatic(query: Array, *arrays: Array) -> Array:
        remaining_arrays = iter(arrays)
        new_leaves = [next(remaining_arrays) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return compute(query, *jax.tree.unflatten(structure, new_leaves))

    return jax.sharding.auto_axes(automatic, out_sharding=out)(query, *arrays)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    value: Array | None = None,
    **options: Any,
) -> Float[Array, "B N T S"]:
    """Computes the dense float32 probabilities with which ``attention`` weights the values, for inspection.

    Args:
      query, key, encoding, params: as in ``attention``.
      value: needed only if the encoding uses values (``cope(gates="values")``).
      **options: keyword arguments of ``attention`` other than ``implementation`` and ``block_sizes``.
    """
    check_operands(query, key, key if value is None else value)
    return reference.weights(prepare(query, key, value, encoding, params, **options))


def attention_fn(
    encoding: PositionalEncoding | None = None, params: Params | None = None, *, is_causal: bool = False
) -> Callable[..., Array]:
    """Returns ``attention`` in the form that Flax's attention modules call.

        flax.nnx.MultiHeadAttention(..., attention_fn=pj.attention_fn(encoding, params))
        flax.linen.MultiHeadDotProductAttention(..., attention_fn=pj.attention_fn(encoding, params))

    The function takes query, key and value [B, T, N, H] and ``mask``. Attention is causal if ``is_causal`` is true here or in the
    call, or if the mask is causal.

    Raises (in the call):
      ValueError: attention dropout is requested, or query and key have different lengths (the module's own decoding): such calls
        pass no positions, and those of cached tokens cannot be inferred.
    """

    def call(
        query: Array,
        key: Array,
        value: Array,
        bias: None = None,
        mask: Array | None = None,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = is_causal,
        input_positions: Array | None = None,
    ) -> Array:
        if bias is not None:
            raise ValueError("bias must be None in attention_fn; pass an encoding, such as chain(rope(), alibi()), instead")
        if module is not None:
            raise ValueError("sow_weights must be False with attention_fn; use posjax.attention_weights")
        if dropout_rate and not deterministic:
            raise ValueError(f"dropout_rate must be 0 with attention_fn, got {dropout_rate}; apply dropout to its result")
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query and key must have the same length in attention_fn, got {query.shape[1]} and {key.shape[1]}; "
                "call posjax.attention with query_positions and key_positions instead"
            )
        return attention(
            *(x.astype(dtype or x.dtype) for x in (query, key, value)),
            encoding,
            params,
            is_causal=is_causal or causal,
            mask=None if mask is None else mask.astype(bool),  # Flax's masks hold float ones and zeros
            query_positions=input_positions,
            key_positions=input_positions,
        )

    encoding, causal = check_encoding(encoding), is_causal
    return call
