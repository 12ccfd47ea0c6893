"""``attention``: scaled dot-product attention under any encoding and mask, on any of the backends.

A call goes through ``call.prepare``, which applies the encoding, and ``dispatch.run``, which selects the backend.
"""

from collections.abc import Callable
from typing import Any

import jax

from posjax.attention.arguments import add_batch_axis, check_operands, in_jax_order
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
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    encoding: PositionalEncoding | Array | None = None,
    params: Params | None = None,
    *,
    is_causal: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
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
    return_residual: bool = False,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Computes scaled dot-product attention under a positional encoding.

    out = softmax(scale * q.k + biases) v over the allowed keys; the encoding rotates or widens q and k and supplies biases.

    This function replaces ``jax.nn.dot_product_attention``: it takes every argument of that function, with the same meaning and
    layout, and as there the fourth and fifth positional arguments may be a bias and a mask. It differs in three points. A query
    without any allowed key gets zeros, where jax spreads its weights evenly over all keys. ``scale`` must be positive. And
    ``implementation`` names posjax's own; "cudnn" is not one of them.

    Args:
      query: [B, T, N, H] floating point. Query, key and value may all omit the batch axis. The other arrays then have no batch axis
        either, except that ``mask`` and ``bias`` may have one of length 1, and lengths are single integers.
      key: [B, S, K, H], with K dividing N (grouped-query attention: query head n uses key head n // (N / K)).
      value: [B, S, K, V]; query, key and value have the same dtype.
      encoding: positional encoding; None is ``identity()``. An array is the ``bias``.
      params: parameters from ``encoding.init``. An array without an encoding is the ``mask``.
      is_causal: True allows only keys whose position is not after the query's.
      mask: bool, [B or 1, N or 1, T or 1, S or 1] (leading axes may be omitted), True where attention is allowed.
      bias: numbers [B or 1, N or 1, T or 1, S or 1] (leading axes may be omitted) that are added to the scaled scores, in
        addition to the biases of the encoding. Without a soft cap, -inf excludes a pair from the softmax; an encoding that counts
        along the keys still counts it. ``alibi``, ``t5`` and other encodings compute their biases tile by tile, without a [T, S]
        array.
      segment_ids: integers [B, T] if T = S, or a pair [B, T], [B, S]; only tokens of equal segments attend to each other.
      query_seq_lengths, key_value_seq_lengths: integers [B], the numbers of queries and of keys in each sequence; those after them
        are padding. Queries do not attend to padding, and padding gets zeros. Its values do not matter, not even NaN. A length
        beyond T or S means a full sequence. Masks of lengths are computed tile by tile, in the kernels too.
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
        "xla" is dense: the reference, with [T, S] arrays.
        "xla_chunked" processes one tile at a time on any device. Memory grows with T + S.
        "pallas" is the kernel of the platform that the program is lowered for: TPU, NVIDIA GPU (Ampere or later), or, for tests on
        a CPU, the TPU kernel in interpret mode. It supports neither ``mask`` nor ``bias``. It takes any number of biases of two
        tokens (``Pair``, read as numbers, by tables or by small networks, with learned numbers and features), sums of the keys' own
        gates (``Scan`` of keys), and one count of CoPE's form: rope, alibi, t5, tupe, cope with gates="logits", and their chains.
        On a mesh with an axis named "context" ("sequence", "seq", "cp" and "sp" work too), or with an explicit axis that shards T,
        None, "xla_chunked" and "pallas" run ring attention, in which each device holds a shard of the sequence.
        All have derivatives of every order and mode. ``jax.grad`` runs the backward pass of the implementation. Except in "xla",
        forward mode and derivatives of gradients process one tile at a time in plain XLA, in memory that grows with T + S, and
        gather the sequence of a ring.
      block_sizes: tile sizes of the "pallas" kernel, ``Blocks`` on a TPU and ``GpuBlocks`` on a GPU. None takes the defaults of the
        chip, reduced if the call would not fit into a TPU's VMEM. If ``implementation`` is None, they apply if the kernel runs.
      return_residual: True also returns the log-sum-exp of the scores of each query, with that of a sink if there is one. "pallas"
        and the ring do not return it, and None selects "xla" or "xla_chunked".

    Returns:
      [B, T, N, V] in the dtype of value. A query without any allowed key gets zeros. With ``return_residual`` also the log-sum-exp
      [B, T, N], in the dtype of key and without a gradient; without any allowed key it is a large negative number.

    Raises:
      ValueError: an argument has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding, or ``block_sizes`` is neither Blocks nor GpuBlocks.
      NotImplementedError: the given implementation does not support the call; the message names one that does.

    Example:
      >>> query = jax.random.normal(jax.random.key(0), (2, 16, 8, 64))
      >>> key = value = jax.random.normal(jax.random.key(1), (2, 16, 2, 64))  # two key heads for eight query heads
      >>> pj.attention(query, key, value, pj.rope(), is_causal=True, local_window_size=4).shape
      (2, 16, 8, 64)
    """
    plain, params, mask, bias = in_jax_order(encoding, params, mask, bias)
    tokens = dict(query_positions=query_positions, key_positions=key_positions, segment_ids=segment_ids, hidden=hidden)
    coordinates = dict(query_coordinates=query_coordinates, key_coordinates=key_coordinates)
    lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    arrays = dict(mask=mask, bias=bias, scale=scale) | tokens | coordinates | lengths
    query, key, value, arrays, is_single = add_batch_axis(query, key, value, arrays)
    check_operands(query, key, value)
    load_kernels(query, key, implementation)
    options = dict(is_causal=is_causal, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap)
    spec, context = infer_shard_spec(query), find_context(query)  # before auto_axes hides explicit shardings

    def compute(query: Array, key: Array, value: Array, params: Params, arrays: dict[str, Any]) -> Any:
        call = prepare(query, key, value, plain, params, **options, **arrays)
        return run(call, implementation, spec=spec, context=context, block_sizes=block_sizes, return_lse=return_residual)

    out = auto_sharded(compute, query, key, value, params, arrays)
    if return_residual:
        out = out[0], jax.lax.stop_gradient(out[1]).astype(key.dtype)
    return jax.tree.map(lambda x: x[0], out) if is_single else out


def auto_sharded(compute: Callable[..., Any], query: Array, *args: Any) -> Any:
    """Calls compute(query, *args) with explicit mesh axes, such as those of jax.make_mesh, turned into automatic ones.

    ``compute`` must return arrays with query's first three axes. Inside, the compiler propagates shardings, because a loop
    over tiles cannot state the sharding of each of its operations.
    """
    sharding = jax.typeof(query).sharding
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    explicit = tuple(name for name in types if types[name] == jax.sharding.AxisType.Explicit)
    if not explicit:
        return compute(query, *args)
    out = jax.sharding.PartitionSpec(*sharding.spec[:3])
    leaves, structure = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def automatic(query: Array, *arrays: Array) -> Array:
        remaining_arrays = iter(arrays)
        new_leaves = [next(remaining_arrays) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return compute(query, *jax.tree.unflatten(structure, new_leaves))

    with_automatic_axes: Any = jax.sharding.auto_axes(automatic, axes=explicit, out_sharding=out)
    return with_automatic_axes(query, *arrays)


def attention_weights(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    value: Array | None = None,
    **options: Any,
) -> Float[Array, "*B N T S"]:
    """Computes the dense float32 probabilities with which ``attention`` weights the values, for inspection.

    Args:
      query, key, encoding, params: as in ``attention``.
      value: needed only if the encoding uses values (``cope(gates="values")``).
      **options: keyword arguments of ``attention`` other than ``implementation``, ``block_sizes`` and ``return_residual``.

    Returns:
      [B, N, T, S] float32. Each row sums to one, or to less with a sink; rows without an allowed key are zero.

    Example:
      >>> query = key = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
      >>> weights = pj.attention_weights(query, key, pj.alibi(), is_causal=True)
      >>> bool(jnp.allclose(weights.sum(-1), 1.0))
      True
    """
    query, key, given, options, is_single = add_batch_axis(query, key, key if value is None else value, options)
    check_operands(query, key, given)
    weights = reference.weights(prepare(query, key, None if value is None else given, encoding, params, **options))
    return weights[0] if is_single else weights
