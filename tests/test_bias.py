"""Bias terms a tile at a time: walked from the right to the left, they equal their dense form, in gradients too."""

import jax
import jax.numpy as jnp
import pytest
from suite import (
    CASES,
    TOKENS,
    B,
    Case,
    N,
    T,
    close,
    normal,
    quick_compilation,  # noqa: F401, a fixture
    random_params,
    walk,
    whole_call,
)

import posjax as pj

SEGMENTS = jnp.stack([jnp.ones(T, jnp.int32), (jnp.arange(T) > 5).astype(jnp.int32)])
MASK = pj.Mask(normal(11, B, 1, T, T) < 0.8, SEGMENTS, SEGMENTS, is_causal=True, window=(6, None))


def different_terms() -> list[Case]:
    """One case for every function of tiles with rows, columns and tables of one structure."""
    found, cases = set(), []
    for case in CASES:
        terms, _ = whole_call(case.encoding, random_params(case.encoding), TOKENS, MASK, jnp.arange(T)[None])
        made_of = {(term.function, jax.tree.structure((term.rows, term.columns, term.tables))) for term in terms}
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
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, TOKENS, evaluate)
        for evaluate in (lambda term, whole: term.dense(whole), lambda term, whole: walk(term, MASK, whole, T // 2, T // 3))
    )
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), tiled, dense)
