"""Sinks: one more key without a value in the denominator, once, in every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import BACKENDS
from suite import normal

import posjax as pj
from posjax.attention import kv_cache
from posjax.attention.backends import reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

B, T, N, K, H = 2, 136, 4, 2, 8


def init(key, dims):
    return {"sink": jnp.zeros(dims.num_heads)}


def sinking(params, inputs):
    return pj.ScoreModifications(weights=pj.Softmax(params["sink"]))


SINK = pj.encoding("sink", init=init, attend=sinking)
ENCODING = pj.chain(pj.alibi(), SINK)
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[:, 100:] = 2


def operands():
    return normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H), {"sink": {"sink": 2.0 + normal(4, N)}}


def formula(query, key, value, params):
    """In float64 with jax, so that it has gradients."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    slopes = 2.0 ** (-2.0 * np.arange(1, N + 1))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H) - slopes[:, None, None] * abs(i - j)
    visible = (i >= j) & (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :])
    weights = jnp.where(visible, jnp.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True) + jnp.exp(params["sink"]["sink"])[:, None, None]
    return jnp.einsum("bnts,bsnh->btnh", weights / total, value)


def answers(function, operands):
    def loss(*operands):
        out = function(*operands)
        return (out * normal(5, B, T, N, H)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, range(4), has_aux=True))(*operands)
    return out, gradients


@functools.cache
def wanted():
    with jax.enable_x64(True):
        given = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), operands())
        return jax.tree.map(np.asarray, answers(formula, given))


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.thorough] if name.startswith("ring,") else []) for name in BACKENDS]
)
def test_output_and_gradients(backend):
    def function(*operands):
        return BACKENDS[backend](prepare(*operands[:3], ENCODING, operands[3], is_causal=True, segment_ids=jnp.asarray(SEGMENTS)))

    got = answers(function, operands())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted()), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_a_row_without_keys_gets_zeros():
    query, key, value, params = operands()
    mask = jnp.asarray(np.arange(T)[:, None] != 7)
    for backend in (reference.attention, xla_chunked.attention):
        out = backend(prepare(query, key, value, SINK, params["sink"], mask=mask))
        assert not np.asarray(out[:, 7]).any() and np.isfinite(out).all()


def test_decoding():
    query, key, value, params = operands()
    cache = kv_cache.init_cache(ENCODING, pj.Dims(N, H, num_kv_heads=K), B, max_length=T)
    outs = []
    for now in (slice(0, 100), slice(100, 101), slice(101, T)):
        out, cache = kv_cache.attend(query[:, now], key[:, now], value[:, now], ENCODING, params, cache)
        outs.append(out)
    want = reference.attention(prepare(query, key, value, ENCODING, params, is_causal=True))
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=2e-5)


def test_two_members_with_weights_of_their_own_are_refused():
    with pytest.raises(ValueError, match="one member of a chain may have weights of its own, got sink and sink_1"):
        pj.attention(*operands()[:3], pj.chain(SINK, SINK), {"sink": {"sink": jnp.zeros(N)}, "sink_1": {"sink": jnp.zeros(N)}})
