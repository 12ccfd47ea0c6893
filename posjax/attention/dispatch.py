"""Selects the backend of a prepared call: the requested one, or the fastest that supports it on the platform of the program.

A backend is a module with the functions of ``Backend``. The kernels of a platform also have ``BLOCK_SIZES_CLS``, and are selected
by ``jax.lax.platform_dependent`` under their ``NAME``, whatever devices this process has.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from posjax.attention.backends import reference
from posjax.attention.backends.gpu.blocks import GpuBlocks, check_gpu_blocks
from posjax.attention.backends.kernel_call import block_sizes_for
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec, on_shards
from posjax.attention.backends.tpu.blocks import Blocks, check_blocks
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import AttentionCall
from posjax.attention.prefix_sums import with_prefix_sums
from posjax.typing import Array, Float

Implementation = Literal["xla", "xla_chunked", "pallas"]
_SMALL = 128 * 128  # query-key pairs; up to here tiled attention is a single tile, and dense attention compiles faster


@runtime_checkable
class Backend(Protocol):
    """Defines the interface of a backend's module."""

    NAME: str

    @staticmethod
    def unsupported_reason(call: AttentionCall, **options: Any) -> str | None:
        """Returns why the backend does not support a call, naming the argument at fault, or None if it does."""

    @staticmethod
    def attention(call: AttentionCall, **options: Any) -> Float[Array, "B T N V"]:
        """Computes attention, differentiably in every floating-point array of the call; rows without an allowed key are zero."""


_XLA: dict[str, Backend] = {backend.NAME: backend for backend in (reference, xla_chunked)}


def _kernels() -> dict[str, Backend]:
    """Returns the platforms' backends. They import Pallas, which would take a quarter of the time of ``import posjax``."""
    from posjax.attention.backends.gpu import attention as gpu
    from posjax.attention.backends.tpu import attention as tpu

    return {backend.NAME: backend for backend in (tpu, gpu)}


def load_kernels(query: Array, key: Array, implementation: Implementation | None) -> None:
    """Imports the kernels if a call with this query and key may run one. Must be called before the first operation of the call.

    Importing Pallas changes the configuration in the keys of jax's caches, so that programs from before it are compiled again.
    """
    if implementation == "pallas" or (implementation is None and not _is_small(query, key)):
        _kernels()


def _is_small(query: Array, key: Array) -> bool:
    return query.shape[1] * key.shape[1] <= _SMALL


def run(
    call: AttentionCall,
    implementation: Implementation | None = None,
    *,
    spec: ShardSpec | None = None,
    context: Context | None = None,
    block_sizes: Blocks | GpuBlocks | None = None,
) -> Float[Array, "B T N V"]:
    """Runs attention on a prepared call with one of the backends.

    Args:
      call: result of ``prepare``.
      implementation, block_sizes: as in ``posjax.attention``.
      spec: how a mesh shards the call's batch and heads, for backends that run on each device's shard; None infers it from the
        query's type.
      context: mesh axis that shards sequences; None if there is none.

    Raises:
      ValueError: the implementation is unknown, or has no block sizes although some are given.
      TypeError: ``block_sizes`` is neither Blocks nor GpuBlocks.
      NotImplementedError: the implementation does not support the call; the message names one that does.
    """
    if implementation not in (None, "xla", "xla_chunked", "pallas"):
        raise ValueError(f"implementation must be None, 'xla', 'xla_chunked' or 'pallas', got {implementation!r}")
    _check_block_sizes(block_sizes, implementation)
    return _run(call, implementation, infer_shard_spec(call.query) if spec is None else spec, context, block_sizes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)  # so that a second call outside jit compiles nothing
def _run(
    call: AttentionCall,
    implementation: Implementation | None,
    spec: ShardSpec,
    context: Context | None,
    block_sizes: Blocks | GpuBlocks | None,
) -> Float[Array, "B T N V"]:
    if context is not None:
        from posjax.attention.backends.ring import attention as ring
    call = call if implementation == "xla" else with_prefix_sums(call)
    rings = context is not None and ring.unsupported_reason(call, context) is None
    if implementation == "pallas":
        kernel = _kernels()["cuda" if platform_at_hand() == "gpu" else "tpu"]
        reason = kernel.unsupported_reason(call, block_sizes=block_sizes_for(kernel, block_sizes), spec=spec)
        if reason is not None:
            raise NotImplementedError(f"implementation='pallas' cannot run this call: {reason}; implementation='xla_chunked' can")
        if rings:
            return ring.attention(call, context, kernel=kernel.NAME, block_sizes=block_sizes)
        return _by_platform(call, spec, block_sizes, elsewhere=kernel)
    if implementation is None:
        if rings:
            return ring.attention(call, context, block_sizes=block_sizes)
        if not _is_small(call.query, call.key):
            return _by_platform(call, spec, block_sizes)
        implementation = "xla"
    if implementation == "xla_chunked" and context is not None:
        return ring.attention(call, context, kernel="xla")
    return on_shards(_XLA[implementation].attention, spec)(call.transformed())


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

    def runner(kernel: Backend, sizes: Any) -> Callable[[AttentionCall], Array]:
        return lambda call: kernel.attention(call, block_sizes=sizes, spec=spec)

    branches = {}
    for name, kernel in _kernels().items():
        sizes = block_sizes_for(kernel, block_sizes)
        if kernel.unsupported_reason(call, block_sizes=sizes, spec=spec) is None:
            branches[name] = runner(kernel, sizes)

    def walk(call: AttentionCall) -> Array:
        return on_shards(xla_chunked.attention, spec)(call.transformed())

    default = walk if elsewhere is None else runner(elsewhere, block_sizes_for(elsewhere, block_sizes))
    return jax.lax.platform_dependent(call, **branches, default=default) if branches else default(call)
