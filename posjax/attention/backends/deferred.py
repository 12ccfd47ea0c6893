"""Calls to Pallas kernels that are traced only when the program is lowered for a platform that runs the kernel.

``jax.lax.platform_dependent`` traces its branches for every platform, and a Pallas kernel of ten thousand operations is traced when
it is called, which takes seconds even in a program for another device. ``deferred`` binds a single primitive in place of the
kernel.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractDevice

from posjax.typing import Array

_INTERPRETED = {"cpu": True, "tpu": False, "cuda": False}  # whether kernels are interpreted, by platform

_deferred = Primitive("posjax_kernel")
_deferred.multiple_results = True


def deferred(
    function: Callable[..., tuple[Array, ...]],
    static: tuple[Any, ...],
    home: str,
    platforms: tuple[str, ...] | None,
    *arrays: Array,
) -> tuple[Array, ...]:
    """Calls function(*static, interpret, *arrays), tracing it only when the program is lowered for a CPU, a TPU or a GPU.

    The call supports ``jax.vmap`` but not differentiation.

    Args:
      function: a hashable function. It is called with interpret=True for a CPU, False for a TPU or a GPU, and None where only the
        shapes and dtypes of its results are needed; it may then skip everything that these do not depend on. Wrap its body in
        ``jax.jit`` to avoid tracing equal calls again.
      static: hashable arguments, passed before ``interpret``.
      home: the platform of the kernel, "tpu" or "cuda".
      platforms: those on which the call may run, None for all. A program for several platforms holds every branch for each of them;
        where a branch is never taken, the results are zeros.
      *arrays: array arguments, passed after ``interpret``.

    Returns:
      The results of ``function``.
    """
    return tuple(_deferred.bind(*arrays, function=function, static=static, home=home, platforms=platforms, axes=()))


def _traced(
    interpret: bool | None, *arrays: Array, function: Callable[..., Any], static: tuple[Any, ...], axes: Any, **_: Any
) -> Any:
    call = functools.partial(function, *static, interpret)
    for these in axes:
        call = jax.vmap(call, these)
    return call(*arrays)


@_deferred.def_abstract_eval
def _shapes(*arrays: Any, **static: Any) -> Sequence[Any]:
    return jax.make_jaxpr(functools.partial(_traced, None, **static))(*arrays).out_avals


@_deferred.def_impl
def _eager(*arrays: Array, **static: Any) -> Sequence[Array]:
    with jax.disable_jit(False):  # the platform is chosen at lowering, so this must compile even under disable_jit
        return _compiled(*arrays, **static)


_compiled = jax.jit(_deferred.bind, static_argnames=("function", "static", "home", "platforms", "axes"))


def _batched(arrays: Sequence[Array], dims: Sequence[int | None], *, axes: Any, **static: Any) -> Any:
    results = _deferred.bind(*arrays, axes=(*axes, tuple(dims)), **static)
    return results, [0] * len(results)


@contextlib.contextmanager
def _some_gpu() -> Iterator[None]:
    """Provides an abstract GPU to Pallas, which needs the GPU model when it lowers a kernel.

    If the mesh in context has no GPUs and this process has none either, it is an A100, the least capable supported model.
    Otherwise the context manager does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if getattr(device, "platform", None) in ("gpu", "cuda", "rocm") or jax.devices()[0].platform == "gpu":
        yield
        return
    # An empty mesh agrees with the arrays, whose mesh may be one of other devices.
    nowhere = jax.sharding.AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA A100", 108, "gpu"))
    with jax.sharding.use_abstract_mesh(nowhere):
        yield


def _lowered(platform: str) -> Callable[..., Any]:
    lower = mlir.lower_fun(functools.partial(_traced, _INTERPRETED[platform]))

    def on_platform(ctx: Any, *args: Any, home: str, platforms: tuple[str, ...] | None, **static: Any) -> Any:
        if platforms is not None and platform not in platforms:
            return mlir.lower_fun(lambda *_: [jnp.zeros(aval.shape, aval.dtype) for aval in ctx.avals_out])(ctx, *args)
        if platform not in (home, "cpu"):
            raise NotImplementedError(
                f"implementation='pallas' must be lowered where a kernel supports the call, got {platform!r} for the kernel of "
                f"{home!r}; implementation='xla_chunked' runs on both"
            )
        with _some_gpu() if platform == "cuda" else contextlib.nullcontext():
            return lower(ctx, *args, **static)

    return on_platform


batching.primitive_batchers[_deferred] = _batched
for _platform in _INTERPRETED:
    mlir.register_lowering(_deferred, _lowered(_platform), platform=_platform)
