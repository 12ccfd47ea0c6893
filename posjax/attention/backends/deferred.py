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
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractDevice

from posjax.typing import Array

_INTERPRETED = {"cpu": True, "tpu": False, "cuda": False}  # whether kernels are interpreted, by platform

_deferred = Primitive("posjax_kernel")
_deferred.multiple_results = True


def deferred(function: Callable[..., tuple[Array, ...]], static: tuple[Any, ...], *arrays: Array) -> tuple[Array, ...]:
    """Calls function(*static, interpret, *arrays), tracing it only when the program is lowered for a CPU, a TPU or a GPU.

    The call supports ``jax.vmap`` but not differentiation.

    Args:
      function: a hashable function. It is called with interpret=True for a CPU, False for a TPU or a GPU, and None where only the
        shapes and dtypes of its results are needed; it may then skip everything that these do not depend on. Wrap its body in
        ``jax.jit`` to avoid tracing equal calls again.
      static: hashable arguments, passed before ``interpret``.
      *arrays: array arguments, passed after ``interpret``.

    Returns:
      The results of ``function``.
    """
    return tuple(_deferred.bind(*arrays, function=function, static=static, axes=()))


def _traced(interpret: bool | None, *arrays: Array, function: Callable[..., Any], static: tuple[Any, ...], axes: Any) -> Any:
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


_compiled = jax.jit(_deferred.bind, static_argnames=("function", "static", "axes"))


def _batched(arrays: Sequence[Array], dims: Sequence[int | None], *, axes: Any, **static: Any) -> Any:
    results = _deferred.bind(*arrays, axes=(*axes, tuple(dims)), **static)
    return results, [0] * len(results)


@contextlib.contextmanager
def _some_gpu() -> Iterator[None]:
    """Provides an abstract GPU to Pallas, which needs the GPU model when it lowers a kernel.

    If the mesh in context has no abstract device and this process has no GPU, it is an A100, the least capable supported model.
    Otherwise the context manager does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if getattr(mesh, "abstract_device", None) is not None or jax.devices()[0].platform == "gpu":
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=AbstractDevice("NVIDIA A100", 108, "gpu"))):
        yield


def _lowered(platform: str) -> Callable[..., Any]:
    lower = mlir.lower_fun(functools.partial(_traced, _INTERPRETED[platform]))

    def for_gpu(*args: Any, **static: Any) -> Any:
        with _some_gpu():
            return lower(*args, **static)

    return for_gpu if platform == "cuda" else lower


batching.primitive_batchers[_deferred] = _batched
for _platform in _INTERPRETED:
    mlir.register_lowering(_deferred, _lowered(_platform), platform=_platform)
