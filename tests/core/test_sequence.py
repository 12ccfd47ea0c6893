"""Sums along a sequence: exact over long ones, apart in every segment."""

import jax
import jax.numpy as jnp
import numpy as np

from posjax.core.sequence import prefix_sum


def between(x, i, j, segments=None):
    """The sums over j + 1 .. i, as a bias takes them."""
    high, low = (np.asarray(part)[0, 0] for part in prefix_sum(jnp.asarray(x)[None, None], segments))
    return (high[i] - high[j]) + (low[i] - low[j])


def test_log_gates_of_65536_tokens_within_1e_4_nats():
    """Wherever a bias matters, and to half a unit in the last place beyond; one float32 sum is off by 3e-2."""
    rng = np.random.default_rng(0)
    log_gates = -np.logaddexp(0.0, -rng.normal(1.0, 2.0, 65536)).astype(np.float32)
    i, j = rng.integers(0, 65536, (2, 200_000))
    sums = np.cumsum(log_gates.astype(np.float64))
    want = sums[i] - sums[j]
    error = np.abs(between(log_gates, i, j) - want)
    near = np.abs(want) < 1000.0  # a weight of exp(-1000) is zero
    assert near.sum() > 5000 and error[near].max() < 1e-4
    assert (error <= 2.0**-23 * np.maximum(np.abs(want), 1.0)).all()
    single = np.cumsum(log_gates, dtype=np.float32)
    assert np.abs((single[i] - single[j]) - want)[near].max() > 1e-2


def test_segments_are_summed_apart_even_where_they_alternate():
    x = np.random.default_rng(1).normal(size=12).astype(np.float32)
    segments = np.asarray([1, 1, 2, 1, 2, 2, 3, 1, 3, 2, 2, 1])
    high, low = prefix_sum(jnp.asarray(x)[None, None], jnp.asarray(segments)[None])
    for i in range(12):
        for j in range(i + 1):
            if segments[i] == segments[j]:
                inside = [x[l] for l in range(j + 1, i + 1) if segments[l] == segments[i]]
                np.testing.assert_allclose(high[0, 0, i] - high[0, 0, j], sum(inside), atol=1e-6)
    np.testing.assert_array_equal(np.abs(low) < 1e-6, True)


def test_exclusive_sums_and_gradients():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 9)), jnp.float32)
    high, _ = prefix_sum(x, exclusive=True)
    np.testing.assert_allclose(high, np.cumsum(x, -1) - x, atol=1e-6)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=x.shape), jnp.float32)
    got = jax.grad(lambda x: sum((part * weight).sum() for part in prefix_sum(x)))(x)
    np.testing.assert_allclose(got, np.cumsum(weight[..., ::-1], -1)[..., ::-1], atol=1e-5)
