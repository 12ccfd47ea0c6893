"""``linear_call``: which of the two functions runs where. The transpose here is deliberately twice the true one."""

import jax
import jax.numpy as jnp
import numpy as np

from posjax.core.linear_call import linear_call

W, X = (jnp.asarray(np.random.default_rng(n).normal(size=shape), jnp.float32) for n, shape in enumerate([(3, 4), (4,)]))
OUT = [jax.typeof(jnp.zeros(3))]


def times(w, x):
    """Returns w x. Reverse mode multiplies by 2 w^T."""
    return linear_call(lambda r, x: [r[0] @ x[0]], lambda r, ct: [2.0 * r[0].T @ ct[0]], [w], [x], OUT)[0]


def test_forward_mode_is_the_function_and_reverse_mode_the_transpose():
    for run in (lambda f: f(), lambda f: jax.jit(f)()):
        np.testing.assert_allclose(run(lambda: times(W, X)), W @ X, rtol=1e-6)
        np.testing.assert_allclose(run(lambda: jax.jvp(lambda x: times(W, x), (X,), (2 * X,))[1]), 2 * W @ X, rtol=1e-6)
        np.testing.assert_allclose(run(lambda: jax.vjp(lambda x: times(W, x), X)[1](W @ X)[0]), 2 * W.T @ (W @ X), rtol=1e-5)


def test_derivatives_by_residuals_are_those_of_jax():
    want = jnp.outer(jnp.ones(3), X)
    np.testing.assert_allclose(jax.grad(lambda w: times(w, X).sum())(W), want, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(lambda w: times(w, X), (W,), (want,))[1], want @ X, rtol=1e-5)
    both = jax.jvp(times, (W, X), (want, 2 * X))[1]
    np.testing.assert_allclose(both, want @ X + 2 * W @ X, rtol=1e-5)
    of_transpose = jax.grad(lambda w: jax.vjp(lambda x: times(w, x), X)[1](jnp.ones(3))[0] @ X)(W)
    np.testing.assert_allclose(of_transpose, 2 * want, rtol=1e-6)


def test_vmap_keeps_the_transpose():
    xs, ws = jnp.stack([X, -X, 3 * X]), jnp.stack([W, 2 * W, W + 1])
    cases = [(lambda x: jax.vmap(times, (None, 0))(W, x), xs, xs @ W.T, lambda ct: 2 * ct @ W)]
    cases += [(lambda x: jax.vmap(times, (0, None))(ws, x), X, ws @ X, lambda ct: 2 * jnp.einsum("bij,bi->j", ws, ct))]
    two = jax.vmap(jax.vmap(times, (None, 1)), (2, None))
    cases += [(lambda x: two(jnp.moveaxis(ws, 0, 2), x), xs.T, ws @ xs.T, None)]
    for function, x, want, transposed in cases:
        got = function(x)
        if transposed is None:
            np.testing.assert_allclose(jnp.swapaxes(got, 1, 2), want, rtol=1e-5)
            continue
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(jax.vjp(function, x)[1](got)[0], transposed(got), rtol=1e-5)


def test_cotangents_that_are_zero():
    def two(x):
        return linear_call(lambda r, x: [x[0], 3 * x[0]], lambda r, ct: [ct[0] + 3 * ct[1]], [], [x], [jax.typeof(x)] * 2)

    np.testing.assert_allclose(jax.grad(lambda x: two(x)[1].sum())(X), jnp.full(4, 3.0))
