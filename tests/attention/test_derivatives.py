"""Derivatives other than ``jax.grad``: forward mode, derivatives of gradients, and what ``jax.grad`` costs beside them.

Lengths are above 128, where dense attention is no longer the default. The reference is dense attention, which JAX differentiates,
and for ALiBi a second difference of attention in float64.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import posjax as pj
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from forgetting_gate import ForgettingGate

T, N, H = 132, 2, 8
DIMS = pj.Dims(num_heads=N, head_dim=H, embed_dim=12, max_length=T)
SEGMENTS = jnp.asarray(np.repeat([1, 2, 0], [50, 70, T - 120]))[None]
PACKED = dict(segment_ids=SEGMENTS, local_window_size=(60, 0), logits_soft_cap=2.0)
CASES = {
    "rope + cope in windows of packed rows, capped": (pj.chain(pj.rope(), pj.cope(12)), PACKED),
    "rope + cope": (pj.chain(pj.rope(), pj.cope(12)), {}),
    "alibi + t5 in windows of packed rows, capped": (pj.chain(pj.alibi(), pj.t5(8, 40)), PACKED),
    "identity": (pj.identity(), {}),
    "rope": (pj.rope(), dict(local_window_size=(20, 0))),
    "tupe": (pj.tupe(), {}),
    "cope": (pj.cope(12, gates="content"), dict(logits_soft_cap=3.0)),
    "forgetting gate": (ForgettingGate(), dict(segment_ids=SEGMENTS)),
}
QUICK = ("rope",)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def operands(encoding):
    params = jax.tree.map(lambda x: x + 0.1 * normal(9, *x.shape), encoding.init(jax.random.key(0), DIMS))
    return [normal(n, 1, T, N, H) for n in range(3)], normal(3, 1, T, 12), params


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def derivatives(function, args):
    """Tangents, and products of the Hessian with a vector in two ways, of all arguments."""
    vector = jax.tree.map(lambda x: normal(x.size, *x.shape), args)
    weight = normal(4, 1, T, N, H)
    gradient = jax.grad(lambda args: jnp.vdot(weight, jnp.sin(function(args))))
    return {
        "jvp": jax.jvp(function, (args,), (vector,))[1],
        "jvp of grad": jax.jvp(gradient, (args,), (vector,))[1],
        "grad of grad": jax.grad(lambda args: dot(gradient(args), vector))(args),
    }


def check(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=3e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.thorough) for n in CASES if n not in QUICK)])
def test_every_derivative_of_every_argument_is_that_of_dense_attention(name):
    encoding, options = CASES[name]

    def function(implementation, args):
        qkv, hidden, params = args
        options_ = options | (dict(hidden=hidden) if encoding.needs_hidden else {})
        return pj.attention(*qkv, encoding, params, is_causal=True, implementation=implementation, **options_)

    both = jax.jit(lambda args: [derivatives(functools.partial(function, name), args) for name in (None, "xla")])
    check(*both(operands(encoding)))


def alibi_float64(q, k, v):
    """Causal attention under ALiBi with two heads, by the definition."""
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    slopes = np.asarray([2.0**-4, 2.0**-8])
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H) - slopes[:, None, None] * distance
    weights = np.exp(np.where(distance >= 0, scores, -np.inf))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("implementation", [None, pytest.param("pallas", marks=pytest.mark.thorough)])
def test_first_and_second_derivatives_are_differences_in_float64(implementation):
    (q, k, v), *_ = operands(pj.identity())
    vector = tuple(normal(n, 1, T, N, H) for n in (5, 6, 7))
    weight = normal(4, 1, T, N, H)

    def along(step):
        moved = (np.asarray(x, np.float64) + step * np.asarray(d, np.float64) for x, d in zip((q, k, v), vector, strict=True))
        return np.vdot(weight, alibi_float64(*moved))

    def loss(qkv):
        return jnp.vdot(weight, pj.attention(*qkv, pj.alibi(), is_causal=True, implementation=implementation))

    @jax.jit
    def twice(qkv):
        forward = jax.jvp(loss, (qkv,), (vector,))[1]
        over_reverse = dot(jax.jvp(jax.grad(loss), (qkv,), (vector,))[1], vector)
        return forward, over_reverse, dot(jax.grad(lambda qkv: dot(jax.grad(loss)(qkv), vector))(qkv), vector)

    e = 1e-4
    first = (along(e) - along(-e)) / (2 * e)
    second = (along(e) - 2 * along(0.0) + along(-e)) / e**2
    np.testing.assert_allclose(twice((q, k, v)), [first, second, second], rtol=1e-4)


@pytest.mark.thorough
def test_the_transformations_of_jax():
    """Under jit and without it, under vmap, linearize, jacfwd, hessian and checkpoint, by one number: the scale of scores."""
    (q, k, v), *_ = operands(pj.identity())

    def loss(implementation, scale):
        out = pj.attention(q, k, v, pj.rope(), is_causal=True, scale=scale, implementation=implementation)
        return jnp.vdot(q, out)

    def results(implementation, scale):
        f = functools.partial(loss, implementation)
        return {
            "jacfwd": jax.jacfwd(f)(scale),
            "linearize": jax.linearize(f, scale)[1](2.0),
            "hessian": jax.hessian(f)(scale),
            "vmap of grad of grad": jax.vmap(jax.grad(jax.grad(f)))(jnp.stack([scale, 2 * scale])),
            "grad of checkpoint": jax.grad(jax.grad(jax.checkpoint(f)))(scale),
            "jvp of jvp": jax.jvp(jax.jacfwd(f), (scale,), (1.0,))[1],
        }

    scale = jnp.float32(0.3)
    want = jax.jit(functools.partial(results, "xla"))(scale)
    check(jax.jit(functools.partial(results, None))(scale), want)
    eager = functools.partial(loss, None)
    check(jax.jvp(eager, (scale,), (1.0,))[1], want["jacfwd"])


@pytest.mark.thorough
def test_around_a_ring():
    encoding = pj.rope()
    (q, k, v), *_ = operands(encoding)

    def function(implementation, args):
        return pj.attention(*args, encoding, is_causal=True, implementation=implementation)

    want = jax.jit(lambda args: derivatives(functools.partial(function, "xla"), args))((q, k, v))
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        args = jax.device_put((q, k, v), NamedSharding(mesh, PartitionSpec(None, "context")))
        check(jax.jit(lambda args: derivatives(functools.partial(function, None), args))(args), want)


def test_with_a_cache():
    """A chunk of 3 tokens after 129 others, by the queries and by the cached keys."""
    encoding = pj.rope()
    (q, k, v), *_ = operands(encoding)
    cache = pj.init_cache(encoding, DIMS, 1, max_length=T)
    early, late = [x[:, :-3] for x in (q, k, v)], [x[:, -3:] for x in (q, k, v)]

    def function(implementation, args):
        early, late = args
        _, full = pj.attend(*early, encoding, {}, cache, implementation=implementation)
        return pj.attend(*late, encoding, {}, full, implementation=implementation)[0]

    def tangents(implementation):
        f = functools.partial(function, implementation)
        args = early, late
        return jax.jvp(f, (args,), (jax.tree.map(jnp.cos, args),))[1]

    check(jax.jit(lambda: tangents("xla_chunked"))(), jax.jit(lambda: tangents("xla"))())


def test_linear_attention():
    q, k, v = operands(pj.identity())[0]

    def dense(q, k, v):
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        weights = jnp.tril(jnp.einsum("btnh,bsnh->bnts", q, k))
        return jnp.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)

    def function(args):
        return pj.linear_attention(*args, is_causal=True)

    both = jax.jit(lambda args: (derivatives(function, args), derivatives(lambda args: dense(*args), args)))
    check(*both((q, k, v)))


@pytest.mark.parametrize("by", [(0,), (0, 1, 2)])
def test_grad_compiles_to_the_program_of_the_backward_pass_alone(by):
    """The tile walk that the other derivatives take costs ``jax.grad`` nothing."""
    (q, k, v), *_ = operands(pj.identity())

    def alone(q, k, v):
        return xla_chunked.attention(prepare(q, k, v, pj.rope(), {}, is_causal=True))

    def public(q, k, v):
        return pj.attention(q, k, v, pj.rope(), is_causal=True, implementation="xla_chunked")

    def cost(function):
        compiled = jax.jit(jax.grad(lambda *args: jnp.sin(function(*args)).sum(), by)).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    assert cost(public) == cost(alone)
