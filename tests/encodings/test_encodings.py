"""What every encoding must do, whatever it is: parameters and order. The cases, and the layer they run in, are in suite.py."""

import jax
import jax.numpy as jnp
import numpy as np
from suite import (
    CASES,
    DIMS,
    PAST,
    TOKENS,
    B,
    D,
    T,
    causal,
    close,
    differs,
    every_case,
    layer,
    learned_cases,
    normal,
    parametrized,
    past_gradients,
    random_params,
)

# Parameters ----------------------------------------------------------------------------------------------------------


@every_case
def test_init_returns_learned_float32_leaves_that_depend_on_the_key_alone(case):
    first, again = (case.encoding.init(jax.random.key(3), DIMS) for _ in range(2))
    assert all(leaf.dtype == jnp.float32 and leaf.size for leaf in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert isinstance(first, dict)


@learned_cases
def test_every_learned_leaf_has_a_finite_gradient_that_is_not_all_zero(case):
    gradients, _ = past_gradients(case)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf).max() > 1e-4) == (path[-1].key != case.inert), path


# Order ---------------------------------------------------------------------------------------------------------------


@every_case
def test_no_output_depends_on_a_later_token(case):
    other = TOKENS.at[:, PAST:].set(normal(7, B, T - PAST, D))
    changed = layer(case.encoding, random_params(case.encoding), other, is_causal=True)
    close(changed[:, :PAST], causal(case)[:, :PAST], atol=1e-6)
    assert differs(changed[:, PAST:], causal(case)[:, PAST:])
    _, gradient = past_gradients(case)
    np.testing.assert_array_equal(gradient[:, PAST:], 0.0)
    assert np.abs(gradient[:, :PAST]).max() > 1e-3


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


@parametrized([case for case in CASES if not case.encoding.needs_causal])
def test_without_a_mask_a_permutation_of_the_tokens_is_seen_unless_there_is_no_encoding(case):
    params, permutation = random_params(case.encoding), np.random.default_rng(8).permutation(T)
    out = layer(case.encoding, params, TOKENS)[:, permutation]
    permuted = layer(case.encoding, params, TOKENS[:, permutation])
    if case.order_blind:
        close(permuted, out, atol=1e-6)
    else:
        assert differs(permuted, out)
