"""``linear_call``: calls a linear function with a user-defined transpose.

It is like ``jax.custom_derivatives.linear_call``, but also supports ``jax.vmap`` and derivatives with respect to the arguments in
which the function is not linear.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from posjax.typing import Array

Arrays = Sequence[Array]
Function = Callable[[Arrays, Arrays], Arrays]

_linear_call = Primitive("posjax_linear_call")
_linear_call.multiple_results = True


def linear_call(function: Function, transpose: Function, residuals: Arrays, x: Arrays, out_types: Sequence[Any]) -> list[Array]:
    """Calls function(residuals, x), which is linear in ``x``, with a user-defined transpose.

    Reverse-mode differentiation calls transpose(residuals, cotangents of the results) for the cotangents of ``x``. Derivatives with
    respect to the residuals are JAX's derivatives of ``function`` or, after transposition, of ``transpose``; the two may use
    different residuals.

    Args:
      function, transpose: take and return sequences of arrays.
      residuals: arrays in which the two functions need not be linear.
      x: floating-point arrays.
      out_types: ``jax.typeof`` of each result, so that ``function`` need not be traced to find them.
    """
    return _linear_call.bind(*residuals, *x, functions=(function, transpose), count=len(residuals), types=tuple(out_types), axes=())


def _mapped(function: Function, axes: Any, residuals: Arrays, x: Arrays) -> Arrays:
    """Calls a function under nested ``jax.vmap``, innermost first, over axes of the residuals and the first axes of x."""

    def call(residuals: Arrays, x: Arrays) -> tuple[Array, ...]:
        return tuple(function(residuals, x))

    for dims in axes:
        call = jax.vmap(call, (dims, 0))
    return call(residuals, x)


def _traced(*args: Array, functions: tuple[Function, Function], count: int, types: Any, axes: Any) -> Arrays:
    return _mapped(functions[0], axes, args[:count], args[count:])


@_linear_call.def_abstract_eval
def _types(*args: Any, types: Any, **_: Any) -> Sequence[Any]:
    return types


def _jvp(primals: Arrays, tangents: Sequence[Any], *, count: int, **params: Any) -> tuple[Arrays, Arrays]:
    call = functools.partial(_linear_call.bind, count=count, **params)
    out = call(*primals)
    if all(isinstance(tangent, ad.Zero) for tangent in tangents[:count]):
        return out, call(*primals[:count], *map(ad.instantiate_zeros, tangents[count:]))
    live = [n for n, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_live(*args: Array) -> Arrays:
        both = dict(enumerate(primals)) | dict(zip(live, args, strict=True))
        return _traced(*both.values(), count=count, **params)

    return out, jax.jvp(of_live, [primals[n] for n in live], [tangents[n] for n in live])[1]


def _transposed(cotangents: Sequence[Any], *args: Any, functions: Any, count: int, axes: Any, **_: Any) -> list[Any]:
    # Called, not bound, so that JAX can drop results that the surrounding program does not use.
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    return [None] * count + list(_mapped(functions[1], axes, args[:count], cotangents))


def _batched(args: Arrays, dims: Sequence[int | None], *, count: int, types: Any, axes: Any, **params: Any) -> Any:
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    x = [batching.bdim_at_front(x, dim, size) for x, dim in zip(args[count:], dims[count:], strict=True)]
    params |= dict(types=tuple(unmapped_aval(size, 0, aval) for aval in types), axes=(*axes, tuple(dims[:count])))
    out = _linear_call.bind(*args[:count], *x, count=count, **params)
    return out, [0] * len(out)


_linear_call.def_impl(_traced)
ad.primitive_jvps[_linear_call] = _jvp
ad.primitive_transposes[_linear_call] = _transposed
batching.primitive_batchers[_linear_call] = _batched
mlir.register_lowering(_linear_call, mlir.lower_fun(_traced))
