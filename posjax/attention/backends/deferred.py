"""Functions that are traced only where the program is lowered for a platform that they run on.

``jax.lax.platform_dependent`` traces what it is given for every platform, and a Pallas kernel is traced where it is called: ten
thousand operations, seconds, also in programs for another device. ``deferred`` puts one equation in the kernel's place.
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

_INTERPRETED = {"cpu": True, "tpu": False, "cuda": False}  # by platform

_deferred = Primitive("posjax_kernel")
_deferred.multiple_results = True


def deferred(function: Callable[..., tuple[Array, ...]], static: tuple[Any, ...], *arrays: Array) -> tuple[Array, ...]:
    """function(*static, interpret, *arrays) in a program for a CPU, a TPU or a GPU. It can be mapped, but not differentiated.

    Args:
      function: called with interpret true for a CPU, false for the others, and None where only its results' shapes and dtypes are
        asked for: what they do not depend on may then be left out. A ``jax.jit`` in it spares tracing equal calls again.
      static: hashable, as is the function.
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
    with jax.disable_jit(False):  # the platform is known to what is compiled
        return _compiled(*arrays, **static)


_compiled = jax.jit(_deferred.bind, static_argnames=("function", "static", "axes"))


def _batched(arrays: Sequence[Array], dims: Sequence[int | None], *, axes: Any, **static: Any) -> Any:
    results = _deferred.bind(*arrays, axes=(*axes, tuple(dims)), **static)
    return results, [0] * len(results)


@contextlib.contextmanager
def _some_gpu() -> Iterator[None]:
    """Pallas asks which GPU a kernel is for. Where neither this process nor the mesh in context has one: the least that will do."""
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
