"""What every encoding must do in each way of making the same call: grouped heads, packed rows, decoding, tiles."""

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
    causal,
    close,
    every_case,
    layer,
    normal,
    project,
    quick_compilation,  # noqa: F401, a fixture
    random_params,
    repeat_key_heads,
    walk,
    whole_call,
)

import posjax as pj

SEGMENTS = jnp.stack([jnp.ones(T, jnp.int32), (jnp.arange(T) > 5).astype(jnp.int32)])
MASK = pj.Mask(normal(11, B, 1, T, T) < 0.8, SEGMENTS, SEGMENTS, is_causal=True, window=(6, None))


@every_case
def test_grouped_queries_equal_repeated_key_heads(case):
    params = random_params(case.encoding)
    hidden = case.encoding.embed(params, TOKENS, jnp.broadcast_to(jnp.arange(T), (B, T)))
    query, key, value = project(hidden)
    params = case.encoding.condition(repeat_key_heads(params), hidden)
    key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    close(pj.attention(query, key, value, case.encoding, params, is_causal=True), causal(case))


@every_case
def test_packed_segments_equal_separate_sequences(case):
    params, half = random_params(case.encoding), T // 2
    segments, positions = jnp.broadcast_to(jnp.arange(T) // half + 1, (B, T)), jnp.arange(T) % half
    for is_causal in case.is_causal_choices:
        packed = layer(case.encoding, params, TOKENS, positions, is_causal=is_causal, segment_ids=segments)
        apart = [layer(case.encoding, params, x, is_causal=is_causal) for x in (TOKENS[:, :half], TOKENS[:, half:])]
        close(packed, jnp.concatenate(apart, axis=1))


@every_case
def test_decoding_equals_the_full_computation(case):
    """A block of queries at the end, then one query at a time; the cache already holds later tokens, which must not count."""
    params, half = random_params(case.encoding), T // 2
    close(layer(case.encoding, params, TOKENS, rows=slice(half, T), is_causal=True), causal(case)[:, half:])
    for now in (0, 4, T - 1):
        one = slice(now, now + 1)
        close(layer(case.encoding, params, TOKENS, rows=one, is_causal=True), causal(case)[:, one])


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
