"""Every encoding under jit, vmap and bfloat16. The cases, and the layer they run in, are in suite.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import (
    TOKENS,
    B,
    D,
    H,
    T,
    causal,
    close,
    differs,
    every_case,
    layer,
    learned_cases,
    normal,
    project,
    random_params,
)

import posjax as pj
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare

# Transformations -----------------------------------------------------------------------------------------------------


@every_case
def test_jit_with_traced_params_and_positions_equals_eager(case):
    function = jax.jit(lambda params, x, positions: layer(case.encoding, params, x, positions, is_causal=True))
    close(function(random_params(case.encoding), TOKENS, jnp.arange(T)), causal(case))


@every_case
def test_vmap_over_inputs_equals_a_loop(case):
    params, stack = random_params(case.encoding), jnp.stack([TOKENS, normal(10, B, T, D)])

    def function(x):
        return layer(case.encoding, params, x, is_causal=True)

    close(jax.vmap(function)(stack), jnp.stack([causal(case), function(stack[1])]))


@learned_cases
def test_vmap_over_params_equals_a_loop(case):
    several = [random_params(case.encoding, seed) for seed in (0, 1)]

    def function(params):
        return layer(case.encoding, params, TOKENS, is_causal=True)

    one_by_one = jnp.stack([causal(case), function(several[1])])
    close(jax.vmap(function)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)), one_by_one)
    assert differs(*one_by_one)


# Types ---------------------------------------------------------------------------------------------------------------


@every_case
def test_bfloat16_gives_bfloat16_close_to_float32_on_the_same_rounded_inputs(case):
    params = random_params(case.encoding)
    hidden = case.encoding.embed(params, TOKENS.astype(jnp.bfloat16), pj.Tokens.at(jnp.arange(T)))
    assert hidden.dtype == jnp.bfloat16
    rounded = project(hidden)
    outs = [
        pj.attention(
            *(x.astype(dtype) for x in rounded),
            case.encoding,
            params,
            is_causal=True,
            hidden=hidden.astype(dtype),
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    ]
    assert [out.dtype for out in outs] == [jnp.bfloat16, jnp.float32]
    close(*outs, atol=0.06)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cope_counts_exactly_to_4096(dtype):
    """With all gates one the position is i - j + 1, the query itself included; bfloat16 counts are off by four there."""
    length, last = 4096, 3
    ones = jnp.full((1, length, 1, 4), 8.0, dtype)  # a logit of 128: the gate is one
    positions = jnp.arange(length)[None]
    own = dict(is_causal=True, query_positions=positions[:, -last:], scale=0.5)
    encoding = pj.cope_alibi(slope=1.0, gates="content")
    tile, scores = scores_of(prepare(ones[:, -last:], ones, ones, encoding, {}, **own))
    bias = scores - tile.logits
    i, j = np.arange(length)[-last:, None], np.arange(length)[None]
    np.testing.assert_array_equal(-bias[0, 0], np.maximum(i - j + 1, 0))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("start", [4096, 131_072])
def test_rope_of_bfloat16_is_right_to_its_last_bit_at_far_positions(pairing, start):
    query = jnp.ones((1, 5, 1, H), jnp.bfloat16)
    positions = (start + jnp.arange(5))[None]
    at = pj.Tokens.at(positions)
    (rotation,) = pj.rope(pairing=pairing).attend({}, pj.AttentionInputs(query, query, query, at, at, 1.0)).transforms
    rotated, _ = rotation.applied(query, query)
    phase = np.asarray(positions[0], np.float64)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    pair = np.cos(phase) - np.sin(phase), np.sin(phase) + np.cos(phase)
    want = np.concatenate(pair, -1) if pairing == "half" else np.stack(pair, -1).reshape(5, H)
    assert rotated.dtype == jnp.bfloat16
    close(rotated[0, :, 0], want, atol=2.0**-8)
