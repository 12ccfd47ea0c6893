"""Selects the backend of a prepared call: the requested one, or the fastest that supports it on the platform of the program.

A backend is a module with the functions of ``Backend``. Those in XLA also have ``attention_and_lse``. The kernels of a platform
also have ``BLOCK_SIZES_CLS``, and are selected by ``jax.lax.platform_dependent`` under their ``NAME``, whatever devices this
process has.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from posjax.attention.backends import reference
from posjax.attention.backends.derivatives import with_every_derivative
from posjax.attention.backends.gpu.blocks import GpuBlocks, check_gpu_blocks
from posjax.attention.backends.kernel_call import block_sizes_for
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec, on_shards
from posjax.attention.backends.tpu.blocks import Blocks, check_blocks
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.backends.xla_chunked import ordered
from posjax.attention.call import AttentionCall
from posjax.attention.prefix_sums import with_prefix_sums
from posjax.checks import is_symbolic, short
from posjax.core.structures import StickBreaking
from posjax.typing import Array, Float

Implementation = Literal["xla", "xla_chunked", "pallas"]
_SMALL = 128 * 128  # query-key pairs; up to here tiled attention is a single tile, and dense attention compiles faster


@runtime_checkable
class Backend(Protocol):
    """Defines the interface of a backend's module."""

    NAME: str

    @staticmethod
    def unsupported_reason(call: AttentionCall, *args: Any, **options: Any) -> str | None:
        """Returns why the backend does not support a call, naming the argument at fault, or None if it does."""

    @staticmethod
    def attention(call: AttentionCall, *args: Any, **options: Any) -> Float[Array, "B T N V"]:
        """Computes attention, differentiably in every floating-point array of the call; rows without an allowed key are zero."""
        ...


_XLA: dict[str, Any] = {reference.NAME: reference, xla_chunked.NAME: xla_chunked}


def _kernels() -> dict[str, Backend]:
    """Returns the platforms' backends. They import Pallas, which would take a quarter of the time of ``import posjax``."""
    from posjax.attention.backends.gpu import attention as gpu
    from posjax.attention.backends.tpu import attention as tpu

    return {tpu.NAME: tpu, gpu.NAME: gpu}


def load_kernels(query: Array, key: Array, implementation: Implementation | None) -> None:
    """Imports the kernels if a call with this query and key may run one. Must be called before the first operation of the call.

    Importing Pallas changes the configuration in the keys of jax's caches, so that programs from before it are compiled again.
    """
    check_implementation(implementation)
    if implementation == "pallas" or (implementation is None and _has_kernels(query, key)):
        _kernels()


def check_implementation(implementation: Any) -> None:
    """Raises ValueError if ``implementation`` is neither None nor the name of one."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in ("xla", "xla_chunked", "pallas")):
        hint = (
            "; 'pallas' runs the kernels for NVIDIA GPUs" if isinstance(implementation, str) and implementation == "cudnn" else ""
        )
        raise ValueError(f"implementation must be None, 'xla', 'xla_chunked' or 'pallas', got {short(implementation)}{hint}")


def _has_kernels(query: Array, key: Array) -> bool:
    """Returns whether a kernel may run a call that names no implementation: not with symbolic sizes, nor where dense is best."""
    return not is_symbolic(*query.shape, *key.shape) and not _is_small(query, key)


def _is_small(query: Array, key: Array) -> bool:
    pairs = query.shape[1] * key.shape[1]
    return not is_symbolic(pairs) and pairs <= _SMALL


def run(
    call: AttentionCall,
    implementation: Implementation | None = None,
    *,
    spec: ShardSpec | None = None,
    context: Context | None = None,
    block_sizes: Blocks | GpuBlocks | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Runs attention on a prepared call with one of the backends.

    Args:
      call: result of ``prepare``.
      implementation, block_sizes: as in ``posjax.attention``.
      spec: how a mesh shards the call's batch and heads, for backends that run on each device's shard; None infers it from the
        query's type.
      context: mesh axis that shards sequences; None if there is none.
      return_lse: also returns the logarithm of the softmax's denominator, in float32. The ring and the kernels do not.

    Raises:
      ValueError: the implementation is unknown, or has no block sizes although some are given, or the weights whose denominator is
        to be returned have none.
      TypeError: ``block_sizes`` is neither Blocks nor GpuBlocks.
      NotImplementedError: the implementation does not support the call; the message names one that does.
    """
    check_implementation(implementation)
    if return_lse and isinstance(call.weights, StickBreaking):
        raise ValueError("return_residual must be False for weights of StickBreaking, which are not a softmax, got True")
    _check_block_sizes(block_sizes, implementation)
    spec = infer_shard_spec(call.query) if spec is None else spec
    return _run(call, implementation, spec, context, block_sizes, return_lse)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5), inline=True)  # so that a second call outside jit compiles nothing
def _run(
    call: AttentionCall,
    implementation: Implementation | None,
    spec: ShardSpec,
    context: Context | None,
    block_sizes: Blocks | GpuBlocks | None,
    return_lse: bool,
) -> Any:
    call = call if implementation == "xla" else with_prefix_sums(call)
    if return_lse:
        if implementation == "pallas":
            raise NotImplementedError("implementation='pallas' cannot return_residual=True; implementation='xla_chunked' can")
        backend = _XLA[implementation or ("xla" if _is_small(call.query, call.key) else "xla_chunked")]
        return on_shards(backend.attention_and_lse, spec)(call.transformed())
    ring: Callable[..., Array] | None = None
    if context is not None:
        from posjax.attention.backends.ring import attention as ring_attention  # imports Pallas

        def on_ring(**options: Any) -> Array:
            return _differentiable(lambda call: ring_attention.attention(call, context, **options), spec)(call)

        if implementation == "xla_chunked" or ring_attention.unsupported_reason(call, context) is None:
            ring = on_ring
    if implementation == "pallas":
        kernel = _kernels()["cuda" if platform_at_hand() == "gpu" else "tpu"]
        reason = kernel.unsupported_reason(call, block_sizes=block_sizes_for(kernel, block_sizes), spec=spec)
        if reason is not None:
            raise NotImplementedError(f"implementation='pallas' cannot run this call: {reason}; implementation='xla_chunked' can")
        if ring is not None:
            return ring(kernel=kernel.NAME, block_sizes=block_sizes)
        return _by_platform(call, spec, block_sizes, elsewhere=kernel)
    if implementation is None:
        if ring is not None:
            return ring(block_sizes=block_sizes)
        if _has_kernels(call.query, call.key):
            return _by_platform(call, spec, block_sizes)
        implementation = "xla" if _is_small(call.query, call.key) else "xla_chunked"
    if implementation == "xla_chunked" and ring is not None:
        return ring(kernel="xla")
    return _on_shards(reference.attention, spec)(call) if implementation == "xla" else _tile_walk(call, spec=spec)


def _on_shards(attention: Callable[[AttentionCall], Array], spec: ShardSpec) -> Callable[[AttentionCall], Array]:
    return lambda call: on_shards(attention, spec)(call.transformed())


def _tile_walk(call: AttentionCall, *, spec: ShardSpec) -> Array:
    walk = _on_shards(xla_chunked.attention, spec)
    return (walk if call.needs_order() is not None else _differentiable(walk, spec))(call)  # JAX differentiates ordered walks


def _differentiable(attention: Callable[[AttentionCall], Array], spec: ShardSpec) -> Callable[[AttentionCall], Array]:
    return with_every_derivative(attention, _on_shards(lambda call: ordered.attention(call)[0], spec))


def platform_at_hand() -> str:
    """Returns the platform of the mesh in context, or else of this process: "cpu", "tpu" or "gpu"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _check_block_sizes(block_sizes: Any, implementation: Implementation | None) -> None:
    if block_sizes is None:
        return
    (check_gpu_blocks if isinstance(block_sizes, GpuBlocks) else check_blocks)(block_sizes)
    if implementation not in (None, "pallas"):
        raise ValueError(
            f"block_sizes must be None with implementation={implementation!r}, got {block_sizes}; "
            "they apply to implementation='pallas'"
        )


def _by_platform(call: AttentionCall, spec: ShardSpec, block_sizes: Any, elsewhere: Backend | None = None) -> Array:
    """Runs the kernel of the platform that the program is lowered for.

    Args:
      elsewhere: kernel that runs in interpret mode on other platforms; None runs "xla_chunked" there.
    """

    def runner(kernel: Backend, sizes: Any, platforms: tuple[str, ...]) -> Callable[[AttentionCall], Array]:
        return _differentiable(lambda call: kernel.attention(call, block_sizes=sizes, spec=spec, platforms=platforms), spec)

    branches = {}
    for name, kernel in _kernels().items():
        sizes = block_sizes_for(kernel, block_sizes)
        if kernel.unsupported_reason(call, block_sizes=sizes, spec=spec) is None:
            branches[name] = runner(kernel, sizes, (name,))

    default: Callable[[AttentionCall], Array] = functools.partial(_tile_walk, spec=spec)
    if elsewhere is not None:
        others = tuple(name for name in ("cpu", *_kernels()) if name not in branches)
        default = runner(elsewhere, block_sizes_for(elsewhere, block_sizes), others)
    return jax.lax.platform_dependent(call, **branches, default=default) if branches else default(call)
