"""``attention``: scaled dot-product attention under any encoding and mask, on any of the kernels."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends import reference, xla_chunked
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu.blocks import GpuBlocks, check_gpu_blocks
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec, on_parts
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu.blocks import Blocks, check_blocks
from posjax.checks import is_traced
from posjax.core.bias import BiasTerm, rotated
from posjax.core.encoding import AttentionInputs, PositionalEncoding, identity
from posjax.core.masks import Mask
from posjax.typing import Array, Float, Params

Implementation = Literal["xla", "xla_chunked", "pallas"]
_NONE = identity()
_SMALL = 128 * 128  # query-key pairs; up to here tiled attention is a single tile, and dense attention compiles faster


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
      params: parameters from ``encoding.init`` (passed through ``condition`` for encodings that use hidden states).
      is_causal: True allows only keys whose position is not after the query's.
      mask: bool, [B or 1, N or 1, T or 1, S or 1] (leading axes may be omitted), True where attention is allowed.
      segment_ids: integers [B, T] if T = S, or a pair [B, T], [B, S]; only tokens of equal segments attend to each other.
      local_window_size: number of positions to the (left, right) of the query's in which keys are allowed, None for no limit; an
        integer w means (w, w).
      query_positions, key_positions: non-negative integers, [T] or [B, T] and [S] or [B, S]. None is 0, 1, 2, ...
      scale: factor of q.k; None is 1 / sqrt(H), with H the head dimension before an encoding widens it.
      logits_soft_cap: c; scores become c * tanh(scores / c), after the bias and before the mask. None leaves them as they are.
      implementation: None selects the fastest implementation that supports the call.
        "xla" is dense: the reference, with [T, S] arrays, and the only one with derivatives of every order and mode.
        "xla_chunked" processes one tile at a time on any device. Memory grows with T + S; gradients are first-order, reverse-mode.
        "pallas" is the kernel of the platform that the program is lowered for: TPU, NVIDIA GPU (Ampere or later), or, for tests on
        a CPU, the TPU kernel in interpret mode. It supports no mask arrays, and only the encodings rope, alibi, t5, tupe, cope with
        gates="logits", and their chains.
        On a mesh with an axis named "context" ("sequence", "seq", "cp" and "sp" work too), or with an explicit axis that shards T,
        None, "xla_chunked" and "pallas" run ring attention, in which each device holds its share of the sequence.
      block_sizes: tile sizes of the "pallas" kernel, ``Blocks`` on a TPU and ``GpuBlocks`` on a GPU. None takes the defaults of the
        chip, reduced if the call would not fit a TPU's VMEM. If ``implementation`` is None, they apply where the kernel runs.

    Returns:
      [B, T, N, V] in the dtype of value. A query without any allowed key gets zeros.

    Raises:
      ValueError: an argument has an unsupported shape, dtype or value; the message names it.
      TypeError: ``encoding`` is not a PositionalEncoding, or ``block_sizes`` is neither Blocks nor GpuBlocks.
      NotImplementedError: the given implementation does not support the call; the message names one that does.
    """
    check_operands(query, key, value)

    options = dict(is_causal=is_causal, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap)

    cut, context = infer_shard_spec(query), ring.find_context(query)

    def compute(query: Array, key: Array, value: Array, params: Params, arrays: dict[str, Any]) -> Array:
        call = prepare(query, key, value, encoding, params, **options, **arrays, rotated=False)
        return run(call, value, implementation, cut, block_sizes, context)

    positions = dict(query_positions=query_positions, key_positions=key_positions)
    arrays = dict(mask=mask, segment_ids=segment_ids, scale=scale) | positions
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
        these = iter(arrays)
        filled = [next(these) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return compute(query, *jax.tree.unflatten(structure, filled))

    return jax.sharding.auto_axes(automatic, out_sharding=out)(query, *arrays)


def run(
    call: dict[str, Any],
    value: Float[Array, "B S K V"],
    implementation: Implementation | None = None,
    cut: ShardSpec | None = None,
    block_sizes: Blocks | GpuBlocks | None = None,
    context: ring.Context | None = None,
) -> Array:
    """Runs attention on a prepared call with one of the kernels.

    Args:
      call: result of ``prepare``.
      value: [B, S, K, V].
      implementation: as in ``attention``.
      cut: how a mesh shards the call's batch and heads, for kernels that run on each device's shard; None infers it from the
        query's type.
      block_sizes: as in ``attention``.
      context: mesh axis that shards sequences; None if there is none.

    Raises:
      ValueError: the implementation is unknown, or has no block sizes although some are given.
      NotImplementedError: the implementation does not support the call; the message names one that does.
    """
    cut = infer_shard_spec(call["query"]) if cut is None else cut
    if implementation not in (None, "xla", "xla_chunked", "pallas"):
        raise ValueError(f"implementation must be None, 'xla', 'xla_chunked' or 'pallas', got {implementation!r}")
    if block_sizes is not None:
        (check_gpu_blocks if isinstance(block_sizes, GpuBlocks) else check_blocks)(block_sizes)
        if implementation not in (None, "pallas"):
            raise ValueError(
                f"block_sizes must be None with implementation={implementation!r}, got {block_sizes}; "
                "implementation='pallas' has block sizes"
            )
    around = context is not None and ring.refusal(context=context, **call) is None
    if implementation == "pallas":
        kernel = gpu if platform_at_hand() == "gpu" else tpu
        if (reason := _refusal(kernel, call, value, cut, block_sizes)) is not None:
            raise NotImplementedError(f"implementation='pallas' cannot run this call: {reason}; implementation='xla_chunked' can")
        if around:
            name = "cuda" if kernel is gpu else "tpu"
            return ring.attention(value=value, context=context, kernel=name, block_sizes=block_sizes, **call)
        return _of_the_platform(call, value, cut, block_sizes, otherwise=kernel)
    if implementation is None:
        if around:
            return ring.attention(value=value, context=context, block_sizes=block_sizes, **call)
        if call["query"].shape[1] * call["key"].shape[1] > _SMALL:
            return _of_the_platform(call, value, cut, block_sizes)
        implementation = "xla"
    if implementation == "xla_chunked" and context is not None:
        return ring.attention(value=value, context=context, kernel="xla", **call)
    kernel = {"xla": reference.attention, "xla_chunked": xla_chunked.attention}[implementation]
    return on_parts(kernel, cut)(value=value, **rotated(call))


def platform_at_hand() -> str:
    """Returns the platform of the mesh in context, or else of this process: "cpu", "tpu" or "gpu"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _refusal(kernel: Any, call: dict[str, Any], value: Array, cut: ShardSpec, block_sizes: Any) -> str | None:
    """Returns why the kernel of a platform, tpu or gpu, does not support a call; None if it does."""
    return kernel.refusal(value=value, block_sizes=_own(kernel, block_sizes), cut=cut, **call)


def _of_the_platform(call: dict[str, Any], value: Array, cut: ShardSpec, block_sizes: Any, otherwise: Any = None) -> Array:
    """Runs the kernel of the platform that the program is lowered for, whichever devices this process has.

    Args:
      otherwise: kernel, tpu or gpu, that runs in interpret mode on other platforms; None runs "xla_chunked" there.
    """
    static = {name: x for name, x in call.items() if x is None or isinstance(x, bool | int | float)}
    arrays = {name: x for name, x in call.items() if name not in static}

    def walk(arrays: dict[str, Any], value: Array) -> Array:
        return on_parts(xla_chunked.attention, cut)(value=value, **rotated(static | arrays))

    def of_tpu(arrays: dict[str, Any], value: Array) -> Array:
        return tpu.attention(value=value, **static, **arrays, tile=_own(tpu, block_sizes), cut=cut)

    def of_gpu(arrays: dict[str, Any], value: Array) -> Array:
        return gpu.attention(value=value, **rotated(static | arrays), tile=_own(gpu, block_sizes), cut=cut)

    kernels, runs = {"tpu": tpu, "cuda": gpu}, {tpu: of_tpu, gpu: of_gpu}
    branches = {name: runs[k] for name, k in kernels.items() if _refusal(k, call, value, cut, block_sizes) is None}
    default = walk if otherwise is None else runs[otherwise]
    return jax.lax.platform_dependent(arrays, value, **branches, default=default) if branches else default(arrays, value)


def _own(kernel: Any, block_sizes: Any) -> Any:
    """Returns the block sizes of a call if they are of this kernel's type, else None."""
    return block_sizes if isinstance(block_sizes, kernel.BLOCK_SIZES_CLS) else None


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    encoding: PositionalEncoding | None = None,
    params: Params | None = None,
    *,
    value: Array | None = None,
    **options: Any,
) -> Float[Array, "B N T S"]:
    """Returns the dense float32 probabilities by which ``attention`` weights the values, for inspection.

    Args:
      query, key, encoding, params: as in ``attention``.
      value: needed only if the encoding uses values (``cope(gates="values")``).
      **options: keyword arguments of ``attention`` other than ``implementation`` and ``block_sizes``.
    """
    check_operands(query, key, key if value is None else value)
    return reference.weights(**prepare(query, key, value, encoding, params, **options))


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
            raise ValueError("bias must be None: attention_fn takes its biases from the encoding; chain() adds encodings")
        if module is not None:
            raise ValueError("sow_weights must be False: attention_fn returns no weights; posjax.attention_weights does")
        if dropout_rate and not deterministic:
            raise ValueError(f"dropout_rate must be 0 in the attention module, got {dropout_rate}; drop out what it returns")
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query and key must have one length in attention_fn, got {query.shape[1]} and {key.shape[1]}; "
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
) -> dict[str, Any]:
    """Checks the options of a call and builds a kernel's operands: query, key, terms, mask, positions, scale, cap.

    The keyword arguments are those of ``attention``. By default query and key are returned rotated. With ``rotated`` false, a
    pairwise rotation is left to the kernel; only ``run`` accepts such a call.
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
        query_positions=place("query_positions", query_positions, query.shape[0], query.shape[1]),
        key_positions=place("key_positions", key_positions, key.shape[0], key.shape[1]),
        scale=scale,
    )
    params = {} if params is None else params
    terms: tuple[BiasTerm, ...] = encoding.bias(params, inputs)
    rotation = encoding.rotation(params, inputs) if encoding.rotation is not None and not rotated else None
    if rotation is None:
        query, key = encoding.rotate(params, query, key, inputs)
    left = {} if rotated else dict(rotation=rotation, raw=rotation is not None or not encoding.turns)
    return left | dict(
        query=query,
        key=key,
        terms=terms,
        mask=_mask(inputs, is_causal, mask, segment_ids, window),
        query_positions=inputs.query_positions,
        key_positions=inputs.key_positions,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )


def check_encoding(encoding: Any) -> PositionalEncoding:
    """Returns ``encoding``, or ``identity()`` for None; raises TypeError if it is not a PositionalEncoding."""
    if encoding is None:
        return _NONE
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(f"encoding must be a PositionalEncoding such as rope(), got {encoding!r}")
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


def place(name: str, positions: Array | None, batch: int, length: int) -> Array:
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
        whole = (batch, heads, length, keys)
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
        if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, whole, strict=True)):
            raise ValueError(f"mask must broadcast to [B, N, T, S] = {whole}, got {mask.shape}")
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
