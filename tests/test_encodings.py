"""What every encoding must do, whatever it is. The cases, and the layer that they run in, are in suite.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import (
    CASES,
    DIMS,
    TOKENS,
    B,
    D,
    H,
    N,
    T,
    causal,
    close,
    differs,
    every_case,
    layer,
    learned_cases,
    normal,
    project,
    quick_compilation,  # noqa: F401, a fixture
    random_params,
)

import posjax as pj

# Parameters ----------------------------------------------------------------------------------------------------------


@every_case
def test_init_returns_learned_float32_leaves_that_depend_on_the_key_alone(case):
    first, again = (case.encoding.init(jax.random.key(3), DIMS) for _ in range(2))
    assert all(leaf.dtype == jnp.float32 and leaf.size for leaf in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert isinstance(first, dict)


@learned_cases
def test_every_learned_leaf_has_a_finite_gradient_that_is_not_all_zero(case):
    params = random_params(case.encoding)
    weight = normal(5, B, T, N, H)
    gradients = jax.grad(lambda p: (layer(case.encoding, p, TOKENS, is_causal=True) * weight).sum())(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf).max() > 1e-4) == (path[-1].key != case.inert), path


# Order ---------------------------------------------------------------------------------------------------------------


@every_case
def test_no_output_depends_on_a_later_token(case):
    params, now = random_params(case.encoding), 5
    weight = normal(6, B, now, N, H)

    def past(x):
        return layer(case.encoding, params, x, is_causal=True)[:, :now]

    other = TOKENS.at[:, now:].set(normal(7, B, T - now, D))
    close(past(other), causal(case)[:, :now], atol=1e-6)
    gradient = jax.grad(lambda x: (past(x) * weight).sum())(TOKENS)
    np.testing.assert_array_equal(gradient[:, now:], 0.0)
    assert np.abs(gradient[:, :now]).max() > 1e-3


@every_case
def test_a_shift_of_all_positions_changes_nothing_exactly_where_that_is_claimed(case):
    params = random_params(case.encoding)
    for is_causal in case.is_causal_choices:
        here, there = (
            layer(case.encoding, params, TOKENS, jnp.arange(T) + shift, is_causal=is_causal)
            for shift in (0, case.shift if case.shift_invariant else 3)
        )
        if case.shift_invariant:
            close(there, here, atol=1e-4)
        else:
            assert differs(there, here)


@every_case
def test_the_last_query_sees_the_order_of_earlier_tokens(case):
    """Released code of one paper took ``--pos-emb rope`` and never applied it: every encoding must show that it acts."""
    params, swapped = random_params(case.encoding), np.array([0, T - 2, *range(2, T - 2), 1, T - 1])
    other = layer(case.encoding, params, TOKENS[:, swapped], is_causal=True)
    assert differs(other[:, -1], causal(case)[:, -1]) != case.order_blind


@pytest.mark.parametrize("case", [case for case in CASES if not case.encoding.is_contextual], ids=lambda case: case.name)
def test_without_a_mask_a_permutation_of_the_tokens_is_seen_unless_there_is_no_encoding(case):
    params, permutation = random_params(case.encoding), np.random.default_rng(8).permutation(T)
    out = layer(case.encoding, params, TOKENS)[:, permutation]
    permuted = layer(case.encoding, params, TOKENS[:, permutation])
    if case.order_blind:
        close(permuted, out, atol=1e-6)
    else:
        assert differs(permuted, out)


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
    hidden = case.encoding.embed(params, TOKENS.astype(jnp.bfloat16), jnp.broadcast_to(jnp.arange(T), (B, T)))
    assert hidden.dtype == jnp.bfloat16
    rounded = project(hidden)
    outs = [
        pj.attention(
            *(x.astype(dtype) for x in rounded),
            case.encoding,
            case.encoding.condition(params, hidden.astype(dtype)),
            is_causal=True,
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
    inputs = pj.AttentionInputs(ones[:, -last:], ones, ones, positions[:, -last:], positions, 0.5)
    (term,) = pj.cope_alibi(slope=1.0, gates="content").bias({}, inputs)
    allowed = pj.Mask(is_causal=True).allowed(inputs.query_positions, positions)
    bias = term.dense(pj.Tile(jnp.zeros((1, 1, last, length)), allowed, inputs.query_positions, positions))
    i, j = np.arange(length)[-last:, None], np.arange(length)[None]
    np.testing.assert_array_equal(-bias[0, 0], np.maximum(i - j + 1, 0))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("start", [4096, 131_072])
def test_rope_of_bfloat16_is_right_to_its_last_bit_at_far_positions(pairing, start):
    query = jnp.ones((1, 5, 1, H), jnp.bfloat16)
    positions = (start + jnp.arange(5))[None]
    rotated, _ = pj.rope(pairing=pairing).rotate(
        {}, query, query, pj.AttentionInputs(query, query, query, positions, positions, 1.0)
    )
    phase = np.asarray(positions[0], np.float64)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    pair = np.cos(phase) - np.sin(phase), np.sin(phase) + np.cos(phase)
    want = np.concatenate(pair, -1) if pairing == "half" else np.stack(pair, -1).reshape(5, H)
    assert rotated.dtype == jnp.bfloat16
    close(rotated[0, :, 0], want, atol=2.0**-8)
