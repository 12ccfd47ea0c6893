"""``attention``: one entry for every encoding, mask and kernel."""

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
_SMALL = 128 * 128  # pairs of query and key up to which a walk is one tile, and dense attention the same thing with less to compile


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
    """Scaled dot-product attention under a positional encoding.

    out = softmax(scale * q.k + bias) v over the allowed keys, where the encoding rotates or widens q and k and gives the bias.
    The words and layout are those of ``jax.nn.dot_product_attention``, which it can replace.

    Args:
      query: [B, T, N, H] floating point.
      key: [B, S, K, H], K dividing N (grouped-query attention: query head n reads key head n // (N / K)).
      value: [B, S, K, V]; query, key and value have one dtype.
      encoding: None is ``identity()``.
      params: what ``encoding.init`` returned (after ``condition``, for encodings that read hidden states).
      is_causal: a key's position must not be past the query's.
      mask: bool, [B or 1, N or 1, T or 1, S or 1] (or fewer leading axes), True where a key may be attended to.
      segment_ids: integers [B, T] where T = S, or a pair [B, T], [B, S]; only equal segments attend to each other.
      local_window_size: keys from left to right of the query's position, as (left, right), None for no limit; w means (w, w).
      query_positions, key_positions: non-negative integers [T] or [B, T], [S] or [B, S]. None: 0, 1, 2, ...
      scale: what q.k is multiplied with; None: 1 / sqrt(H), of the head before an encoding widens it.
      logits_soft_cap: c, scores become c * tanh(scores / c) after the bias and before the mask.
      implementation: None takes the fastest that can do the call. "xla" is dense: the oracle, with [T, S] arrays, and the one that
        has derivatives of every order and mode. "xla_chunked" walks over tiles on any device: memory grows with T + S, gradients
        are of first order in reverse mode. "pallas" is the kernel of the platform that the program is lowered for: a TPU's, an
        NVIDIA GPU's (Ampere or later), and on a CPU the TPU's, interpreted, for tests; it takes no mask arrays, and of the
        encodings rope, alibi, t5, tupe, cope with gates="logits", and their chains. On a mesh with an axis "context" (or an
        explicit one that cuts T) None, "xla_chunked" and "pallas" are a ring of devices, each with its share of the sequence.
      block_sizes: of the "pallas" kernel, Blocks on a TPU, GpuBlocks on a GPU; None: those of the chip, smaller where the call
        would not fit a TPU's VMEM. With ``implementation`` None they count where the kernel is what runs.

    Returns:
      [B, T, N, V] in the dtype of value. A query without any allowed key gets zeros.

    Raises:
      ValueError: an argument whose shape, dtype or value cannot work, by name.
      TypeError: ``encoding`` is not a PositionalEncoding, or ``block_sizes`` no Blocks or GpuBlocks.
      NotImplementedError: a named implementation that cannot do the call, with one that can.
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
    """compute(query, *args), an array of query's axes but the last, on a mesh whose axes may be explicit (jax.make_mesh's are).

    A walk over tiles cannot state the sharding of each of its operations; inside, the compiler propagates it.
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
    """Attention of a prepared call in one of the kernels.

    Args:
      call: from ``prepare``.
      value: [B, S, K, V].
      implementation: as in ``attention``.
      cut: how a mesh cuts the call's batch and heads, for kernels that run on each device's part; None: as the query's type shows.
      block_sizes: as in ``attention``.
      context: the axis of a mesh that cuts sequences; None: there is none.

    Raises:
      ValueError: an unknown implementation, or block sizes that it does not have.
      NotImplementedError: one that cannot do the call, with one that can.
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
    """That of the devices of the mesh in context, or of this process: cpu, tpu or gpu."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _refusal(kernel: Any, call: dict[str, Any], value: Array, cut: ShardSpec, block_sizes: Any) -> str | None:
    """Why the kernel of a platform, tpu or gpu, cannot do a call; None: it can."""
    return kernel.refusal(value=value, block_sizes=_own(kernel, block_sizes), cut=cut, **call)


def _of_the_platform(call: dict[str, Any], value: Array, cut: ShardSpec, block_sizes: Any, otherwise: Any = None) -> Array:
    """The kernel of the platform that the program is lowered for, whatever devices this process has.

    Args:
      otherwise: the kernel, tpu or gpu, for other platforms, interpreted; None: the walk in XLA.
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
    """The block sizes of a call if they are of that kernel."""
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
    """The probabilities that ``attention`` would weigh the values with, dense, float32; for looking at.

    Args:
      query, key, encoding, params: as in ``attention``.
      value: needed only where the encoding reads values (``cope(gates="values")``).
      **options: the keyword arguments of ``attention``, but for ``implementation`` and ``block_sizes``.
    """
    check_operands(query, key, key if value is None else value)
    return reference.weights(**prepare(query, key, value, encoding, params, **options))


def attention_fn(
    encoding: PositionalEncoding | None = None, params: Params | None = None, *, is_causal: bool = False
) -> Callable[..., Array]:
    """``attention`` in the form that Flax's attention modules call.

        flax.nnx.MultiHeadAttention(..., attention_fn=pj.attention_fn(encoding, params))
        flax.linen.MultiHeadDotProductAttention(..., attention_fn=pj.attention_fn(encoding, params))

    The function takes query, key, value [B, T, N, H] and ``mask``. Attention is causal where ``is_causal`` is true here or in the
    call, or where the mask makes it so.

    Raises (in the call):
      ValueError: attention dropout, or a query and a key of different lengths (the module's own decoding): such calls bring no
        positions, and those of a token in a cache cannot be guessed.
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
            mask=None if mask is None else mask.astype(bool),  # Flax makes its masks of float ones and zeros
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
    """Checks a call's options and turns it into what a kernel takes: query, key, terms, mask, positions, scale, cap.

    The keyword arguments are those of ``attention``; query and key come out rotated. ``run`` takes the result. With ``rotated``
    false a plain rotation is left to the kernel: ``run`` alone takes that.
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
    """``identity()`` for None; TypeError for what is not an encoding."""
    if encoding is None:
        return _NONE
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(f"encoding must be a PositionalEncoding such as rope(), got {encoding!r}")
    return encoding


def check_operands(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError where query, key and value do not fit together, query and key first."""
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
    """[1 or B, length] int32: one row for the whole batch unless rows differ."""
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {positions.dtype}")
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape ({length},) or ({batch}, {length}), got {positions.shape}")
    # NumPy, because even on a known array a jax operation inside jit gives a value that is not.
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
