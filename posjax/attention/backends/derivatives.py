"""Derivatives of every order and mode for a backend with a hand-written backward pass.

``jax.custom_vjp`` allows only one derivative, in reverse mode. Here the first derivative in reverse mode also runs the hand-written
pass; every other derivative is that of ``walk``, which computes the same function in plain JAX:

    tangent(call, d_call)        evaluated by jax.jvp of the walk; its transpose is the hand-written backward pass
    gradients(call, d_out)       evaluated by the hand-written backward pass; its derivatives are those of jax.vjp of the walk
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from posjax.attention.call import AttentionCall
from posjax.core.linear_call import linear_call
from posjax.typing import Array

Attention = Callable[[AttentionCall], Array]


def with_every_derivative(backend: Attention, walk: Attention) -> Attention:
    """Returns ``backend`` with its own first reverse-mode derivative and, for all other derivatives, those of ``walk``.

    Args:
      backend: function of a call, with a first derivative in reverse mode.
      walk: the same function with derivatives of every order and mode.
    """

    @jax.custom_jvp
    def attention(call: AttentionCall) -> Array:
        return backend(call)

    def rule(primals: tuple[AttentionCall], tangents: tuple[Any]) -> tuple[Array, Array]:
        leaves, structure = jax.tree.flatten(primals[0])
        d_leaves = jax.tree.leaves(tangents[0])
        live = tuple(n for n, d in enumerate(d_leaves) if not isinstance(d, SymbolicZero))
        of_leaves = functools.partial(_of_leaves, structure, live)
        fixed = jax.lax.stop_gradient(leaves)  # ``_known`` supplies all further derivatives
        out, vjp = jax.vjp(of_leaves(backend, fixed), *[fixed[n] for n in live])
        saved, vjp_structure = jax.tree.flatten(vjp)

        def tangent(residuals: Sequence[Array], x: Sequence[Array]) -> list[Array]:
            leaves = residuals[: len(fixed)]
            return [jax.jvp(of_leaves(walk, leaves), [leaves[n] for n in live], list(x))[1]]

        @jax.custom_jvp
        def gradients(residuals: Sequence[Array], d_out: Sequence[Array]) -> tuple[Array, ...]:
            return jax.tree.unflatten(vjp_structure, residuals[len(fixed) :])(*d_out)

        @gradients.defjvp
        def of_gradients(primals: Any, tangents: Any) -> tuple[Any, Any]:
            def of_walk(leaves: Sequence[Array], d_out: Sequence[Array]) -> tuple[Array, ...]:
                return jax.vjp(of_leaves(walk, leaves), *[leaves[n] for n in live])[1](*d_out)

            (residuals, d_out), (d_residuals, dd_out) = primals, tangents
            primals, tangents = (residuals[: len(fixed)], d_out), (d_residuals[: len(fixed)], dd_out)
            return gradients(residuals, d_out), jax.jvp(of_walk, primals, tangents)[1]

        out = _known(walk, primals[0], out)
        residuals, live_tangents = [*leaves, *saved], [d_leaves[n] for n in live]
        (d_out,) = linear_call(tangent, gradients, residuals, live_tangents, [jax.typeof(out)])
        return out, d_out

    attention.defjvp(rule, symbolic_zeros=True)
    return attention


def _of_leaves(structure: Any, live: tuple[int, ...], attention: Attention, leaves: Sequence[Array]) -> Callable[..., Array]:
    """Returns ``attention`` as a function of only the leaves ``live`` of a call."""

    def function(*args: Array) -> Array:
        both = dict(enumerate(leaves)) | dict(zip(live, args, strict=True))
        return attention(jax.tree.unflatten(structure, both.values()))

    return function


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(walk: Attention, call: AttentionCall, out: Array) -> Array:
    """Returns ``out``, which must equal walk(call), with the derivatives of walk(call)."""
    return out


@_known.defjvp
def _of_known(walk: Attention, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (call, out), (d_call, _) = primals, tangents
    return _known(walk, call, out), jax.jvp(walk, (call,), (d_call,))[1]
