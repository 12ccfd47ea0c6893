"""Broken sticks, transported keys and tables of values equal their formulas, tile by tile and while decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import normal

import posjax as pj
from posjax.attention import kv_cache
from posjax.attention.backends import reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

B, T, N, K, H, D = 2, 19, 4, 2, 6, 10
SEGMENTS = np.asarray([[1] * 19, [1] * 11 + [2] * 8], np.int32)
POSITIONS = np.asarray([list(range(19)), [*range(11), *range(8)]], np.int32)
tiled = functools.partial(xla_chunked.attention, tile=(7, 5))


def stick(params, inputs):
    return pj.ScoreModifications(weights=pj.StickBreaking())


def whole_stick(params, inputs):
    return pj.ScoreModifications(weights=pj.StickBreaking(attend_current=True))


def householder(params, inputs):
    """One reflection per token and key head, from the hidden states."""
    w = jnp.einsum("bsd,dkh->bskh", inputs.k.hidden, params["w"])
    strength = 2.0 * jax.nn.sigmoid(jnp.einsum("bsd,dk->bsk", inputs.k.hidden, params["beta"]))
    return pj.ScoreModifications((pj.Transport(w / jnp.linalg.norm(w, axis=-1, keepdims=True), strength[..., None]),))


def wall(params, inputs):
    """A decay per token and channel."""
    decay = -jax.nn.softplus(jnp.einsum("bsd,dkh->bskh", inputs.k.hidden, params["w"]))
    return pj.ScoreModifications((pj.Transport(log_decay=decay),))


def clipped(differences, args):
    return jnp.clip(differences[0], -4, 4) + 4


def of_values(params, inputs):
    """Shaw's relative positions in the values."""
    return pj.ScoreModifications(biases=(pj.Bias(pj.Pair(clipped), pj.Table(params["table"], side="value")),))


def init(key, dims):
    one, two, three = jax.random.split(key, 3)
    return {
        "w": jax.random.normal(one, (D, K, H)),
        "beta": jax.random.normal(two, (D, K)),
        "table": jax.random.normal(three, (N, 9, H)),
    }


def encoding(name, attend, **claims):
    return pj.encoding(name, init=init, attend=attend, needs_causal=True, **claims)


CASES = {
    "stick": encoding("stick", stick),
    "whole stick": encoding("stick", whole_stick),
    "householder": encoding("path", householder, needs_hidden=True),
    "wall": encoding("wall", wall, needs_hidden=True),
    "values": encoding("values", of_values),
    "rope, stick, values": pj.chain(pj.rope(), pj.alibi(), encoding("stick", stick), encoding("values", of_values)),
    "path, cope": pj.chain(encoding("path", householder, needs_hidden=True), pj.cope(4)),
}


def operands(name):
    params = CASES[name].init(jax.random.key(0), pj.Dims(N, H, D, num_kv_heads=K))
    if "cope" in params:
        params["cope"] = {"embedding": normal(8, 4, H)}
    return normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H), normal(4, B, T, D), params


def call_of(name, query, key, value, hidden, params, **options):
    own = dict(segment_ids=jnp.asarray(SEGMENTS), query_positions=jnp.asarray(POSITIONS), key_positions=jnp.asarray(POSITIONS))
    return prepare(query, key, value, CASES[name], params, is_causal=True, hidden=hidden, **own | options)


def formula(name):
    """In float64, row by row."""
    query, key, value, hidden, params = jax.tree.map(lambda x: np.asarray(x, np.float64), operands(name))
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
    w = np.repeat(np.einsum("bsd,dkh->bskh", hidden, params["w"]), N // K, axis=2)
    strength = np.repeat(2.0 / (1.0 + np.exp(-np.einsum("bsd,dk->bsk", hidden, params["beta"]))), N // K, axis=2)
    decay, unit = -np.logaddexp(0.0, w), w / np.linalg.norm(w, axis=-1, keepdims=True)
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            for i in range(T):
                moved, scores, values, seen = query[b, i, n].copy(), {}, {}, []
                for j in range(i, -1, -1):
                    if SEGMENTS[b, i] != SEGMENTS[b, j]:
                        break
                    scores[j] = moved @ key[b, j, n] / np.sqrt(H)
                    if name == "householder":
                        moved = moved - strength[b, j, n] * (moved @ unit[b, j, n]) * unit[b, j, n]
                    if name == "wall":
                        moved = moved * np.exp(decay[b, j, n])
                    values[j] = value[b, j, n] + (params["table"][n, min(i - j, 4) + 4] if name == "values" else 0.0)
                    seen.append(j)
                if "stick" in name:
                    left = 1.0
                    for j in seen:
                        if j == i and name == "stick":
                            continue
                        beta = 1.0 / (1.0 + np.exp(-scores[j]))
                        out[b, i, n] += left * beta * values[j]
                        left *= 1.0 - beta
                else:
                    weights = {j: np.exp(scores[j]) for j in seen}
                    out[b, i, n] = sum(weights[j] * values[j] for j in seen) / sum(weights.values())
    return out


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_formulas(name):
    want = formula(name)
    for backend in (reference.attention, tiled):
        np.testing.assert_allclose(backend(call_of(name, *operands(name))), want, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tiles_and_their_gradients_equal_dense_ones(name):
    def answers(backend):
        def loss(*operands):
            out = backend(call_of(name, *operands, logits_soft_cap=5.0))
            return (out * normal(9, B, T, N, H)).sum(), out

        return jax.jit(jax.grad(loss, range(5), has_aux=True))(*operands(name))

    for got, want in zip(jax.tree.leaves(answers(tiled)), jax.tree.leaves(answers(reference.attention)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.parametrize("name", CASES)
def test_decoding(name):
    query, key, value, hidden, params = operands(name)
    cache = kv_cache.init_cache(CASES[name], pj.Dims(N, H, D, num_kv_heads=K), B, max_length=T + 3)
    outs = []
    for now in (slice(0, 9), slice(9, 10), slice(10, T)):
        own = dict(hidden=hidden[:, now])
        out, cache = kv_cache.attend(query[:, now], key[:, now], value[:, now], CASES[name], params, cache, **own)
        outs.append(out)
    plain = dict(segment_ids=None, query_positions=None, key_positions=None)
    want = reference.attention(call_of(name, query, key, value, hidden, params, **plain))
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=2e-5)


def test_what_does_not_fit_is_refused():
    query, key, value, hidden, params = operands("wall")
    with pytest.raises(ValueError, match="is_causal must be True and mask None for wall, which transports keys"):
        call_of("wall", query, key, value, hidden, params, mask=jnp.ones((1, 1, T, T), bool))
    twice = pj.chain(CASES["wall"], CASES["wall"])
    with pytest.raises(ValueError, match=r"encoding may transport keys once, got 2 Transports in wall\+wall"):
        pj.attention(query, key, value, twice, {"wall": params, "wall_1": params}, is_causal=True, hidden=hidden)
    with pytest.raises(ValueError, match="needs_causal must be True for stick, whose weights are StickBreaking"):
        pj.attention(query, key, value, pj.encoding("stick", attend=stick), {}, is_causal=True)
    with pytest.raises(NotImplementedError, match="what the kernel does not do: weights are those of StickBreaking"):
        pj.attention(query, key, value, CASES["stick"], {}, is_causal=True, implementation="pallas")
