"""Several biases of two tokens in one call, of every form that a ``Pair`` has, in every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import BACKENDS
from suite import normal

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.call import prepare

B, T, N, K, H = 2, 136, 4, 2, 8


def root(differences, args):
    return -args["a"] * jnp.sqrt(jnp.abs(differences[0]).astype(jnp.float32) + 1.0) * args["b"][1]


def waves(queries, keys, args):
    return -args * jnp.log1p(queries[0].astype(jnp.float32)) * jnp.cos(0.1 * keys[0].astype(jnp.float32))


def clipped(differences, args):
    return jnp.minimum(jnp.abs(differences[0]), 7)


def total(differences, args):
    return differences[0] + differences[1]


def nearness(differences, args):
    return jnp.abs(differences[0].astype(jnp.float32)) * 0.01


def of_root(params, inputs):
    return pj.Pair(root, args=dict(a=params["a"], b=params["b"])), None


def of_waves(params, inputs):
    return pj.Pair(waves, args=params["c"], relative=False), None


def of_table(params, inputs):
    return pj.Pair(clipped), pj.Table(params["table"])


def of_gates(params, inputs):
    """Two features of floats: one of each head that comes from the keys, and one that is learned."""
    heads = inputs.query.shape[2]
    sums = jnp.swapaxes(jnp.cumsum(jnp.tanh(inputs.key[..., 0]), 1), 1, 2)
    sums = jnp.repeat(sums, heads // sums.shape[1], axis=1)
    at = inputs.k.positions[:, None].astype(jnp.float32)
    mine = jnp.broadcast_to(0.01 * params["w"][None, :, None] * at, sums.shape)
    return pj.Pair(total, (sums, mine), (sums, mine)), None


def of_key_heads(params, inputs):
    """Features of queries that all heads share, and of keys by key head."""
    zeros = jnp.zeros((1, 1, inputs.query.shape[1]))
    return pj.Pair(nearness, (zeros,), (10.0 * jnp.swapaxes(jnp.sin(inputs.key[..., 1]), 1, 2),)), None


def of_integers(params, inputs):
    """Integers that no float32 tells apart, read by a network."""
    at = inputs.k.positions[:, None] * 3 + 2**29
    return pj.Pair(nearness, (at,), (at,)), pj.Hinges(params["h"], params["h"] + 0.1, params["z"])


FORMS = (of_root, of_waves, of_table, of_gates, of_table, of_integers, of_key_heads)


@dataclasses.dataclass(frozen=True)
class Attend:
    """``attend`` of an encoding with some of the biases; equal ones are one program."""

    which: tuple[int, ...]

    def __call__(self, params, inputs):
        biases = (pj.Bias(*FORMS[n](params, inputs)) for n in self.which)
        return pj.ScoreModifications(biases=tuple(biases))


CHAINS = {
    "two": pj.encoding("pairs", attend=Attend((0, 1))),
    "three": pj.encoding("pairs", attend=Attend((0, 2, 3))),
    "four": pj.encoding("pairs", attend=Attend((1, 2, 4, 5))),
    "six, with cope": pj.chain(pj.rope(), pj.cope(6), pj.encoding("pairs", attend=Attend((0, 2, 3, 4, 6))), pj.alibi()),
}


def params_of(encoding):
    sizes = dict(a=(N,), b=(N, 2), c=(1,), table=(N, 8), w=(N,), h=(1, 3), z=(N, 3))
    params = {name: 0.3 * normal(n, *shape) for n, (name, shape) in enumerate(sizes.items())}
    return params if encoding.name == "pairs" else {"pairs": params, "cope": {"embedding": 0.3 * normal(9, 6, H)}}


@functools.cache
def answers(name, backend):
    """The output, and the gradients of all operands."""
    encoding = CHAINS[name]
    operands = normal(11, B, T, N, H), normal(12, B, T, K, H), normal(13, B, T, K, H), params_of(encoding)

    def loss(query, key, value, params):
        out = backend(prepare(query, key, value, encoding, params, is_causal=True, local_window_size=(100, 0)))
        return (out * normal(14, B, T, N, H)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, range(4), has_aux=True))(*operands)
    return out, gradients


DEFAULT = {("three", "xla_chunked"), ("three", "tpu"), ("three", "gpu"), ("three", "ring")}  # the others are thorough


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[] if (name, backend) in DEFAULT else pytest.mark.thorough)
        for name in CHAINS
        for backend in BACKENDS
        if backend != "xla"  # what the others are compared with
    ],
)
def test_output_and_gradients(name, backend):
    got, want = answers(name, BACKENDS[backend]), answers(name, reference.attention)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6))  # what has no part in it is zero
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def test_the_oracle_against_numpy():
    """The four biases of the chain that has one of each form, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(CHAINS["four"]))
    query, key, value = (np.asarray(normal(n, B, T, heads, H), np.float64) for n, heads in ((11, N), (12, K), (13, K)))
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
    scores = scores - params["c"] * np.log1p(i) * np.cos(0.1 * j)
    scores = scores + 2 * params["table"][:, np.minimum(abs(i - j), 7)]
    at = 0.03 * abs(i - j)[..., None]
    scores = scores + np.moveaxis(np.maximum(params["h"][0] * at + params["h"][0] + 0.1, 0.0) @ params["z"].T, -1, 0)
    weights = np.where((i >= j) & (i - j <= 100), np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    want = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(answers("four", reference.attention)[0], want, atol=2e-5)
