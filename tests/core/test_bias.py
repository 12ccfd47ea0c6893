"""Bias terms a tile at a time: walked from the right to the left, they equal their dense form, in gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import (
    CASES,
    DIMS,
    TOKENS,
    B,
    Case,
    N,
    T,
    close,
    normal,
    random_params,
    walk,
    whole_call,
)

import posjax as pj
from posjax.attention.backends.bias_terms import Tile, bias_terms
from posjax.attention.call import prepare

SEGMENTS = jnp.stack([jnp.ones(T, jnp.int32), (jnp.arange(T) > 5).astype(jnp.int32)])
MASK = pj.Mask(normal(11, B, 1, T, T) < 0.8, SEGMENTS, SEGMENTS, is_causal=True, window=(6, None))


def different_terms() -> list[Case]:
    """One case for every function of tiles with rows, columns and tables of one structure.

    Of shapes alone: every test process collects them.
    """

    def call(case):
        return whole_call(case.encoding, case.encoding.init(jax.random.key(0), DIMS), TOKENS, MASK, jnp.arange(T)[None])

    found, cases = set(), []
    for case in CASES:
        terms, _ = jax.eval_shape(functools.partial(call, case))
        made_of = {term.form for term in terms}
        if made_of - found:
            cases.append(case)
        found |= made_of
    return cases


@pytest.mark.parametrize("case", different_terms(), ids=lambda case: case.name)
def test_tiles_walked_from_right_to_left_equal_the_dense_bias(case):
    positions = jnp.arange(T)[None]
    weight = normal(12, B, N, T, T)

    def loss(params, x, evaluate):
        terms, whole = whole_call(case.encoding, params, x, MASK, positions)
        biases = [evaluate(term, whole) for term in terms]
        return sum((bias * weight).sum() for bias in biases), biases

    params = random_params(case.encoding)
    dense, tiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)(params, TOKENS, evaluate)
        for evaluate in (lambda term, whole: term.dense(whole), lambda term, whole: walk(term, MASK, whole, T // 2, T // 3))
    )
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), tiled, dense)


def test_the_network_of_cope_mlp_is_its_formula():
    """e(p) = W_2 relu(w_1 p + b_1) at every count, with weights of both signs and none, on gates of one."""
    hidden, length, width = 7, 9, 3
    rng = np.random.default_rng(0)
    weight, offset = rng.normal(size=hidden), 4 * rng.normal(size=hidden)
    weight[:2], offset[:2] = 0.0, [1.5, -1.5]  # one acts everywhere, one nowhere
    out, query = rng.normal(size=(hidden, width)), rng.normal(size=(1, length, 2, width))
    params = {"weight_in": weight, "bias_in": offset, "weight_out": out}
    query, key = jnp.asarray(query, jnp.float32), jnp.full((1, length, 2, width), 0.0)

    def biases(params, query):
        (term,) = bias_terms(prepare(query, key, None, pj.cope_mlp(hidden), params, is_causal=True))
        counted = jnp.full((1, 2, length, length), 40.0)  # logits at which a gate is one
        allowed, positions = jnp.tril(jnp.ones((1, 1, length, length), bool)), jnp.arange(length)[None]
        return term.dense(Tile(counted, allowed, positions, positions))

    def formula(params, query):
        counts = jnp.arange(length)[:, None] - jnp.arange(length)[None] + 1.0
        e = jax.nn.relu(params["weight_in"] * counts[..., None] + params["bias_in"]) @ params["weight_out"]
        return jnp.einsum("btnh,tsh->bnts", query, e)

    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    weights = jnp.tril(normal(3, 1, 2, length, length))
    for got, want in zip(
        *(jax.value_and_grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1))(params, query) for f in (biases, formula)),
        strict=True,
    ):
        jax.tree.map(lambda a, b: close(a, b, atol=1e-4), got, want)
