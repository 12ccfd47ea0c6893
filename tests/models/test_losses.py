"""Losses in chunks, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.models import losses


@pytest.mark.parametrize("at_a_time", [2**26, 2 * 5 * 11, 2 * 3 * 11])
def test_losses_in_chunks_equal_the_definition_and_so_do_their_gradients(monkeypatch, at_a_time):
    """A length of 13 is one chunk, three chunks of 5, or five of 3; unknown targets without weight add nothing."""
    monkeypatch.setattr(losses, "_MOST_LOGITS", at_a_time)
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 13, 4)), rng.normal(size=(4, 11))
    targets, weights = rng.integers(11, size=(2, 13)), rng.uniform(size=(2, 13))
    targets[:, 3], weights[:, 3] = 10**6, 0.0

    largest = []

    def total(kernel, hidden):
        def logits_of(x):
            largest.append(x.shape[1])
            return x @ kernel

        found = losses.cross_entropy_of(logits_of, hidden, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), 11)
        return found.sum(), found

    arrays = jnp.asarray(kernel, jnp.float32), jnp.asarray(hidden, jnp.float32)
    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*arrays)
    assert max(largest) == {2**26: 13}.get(at_a_time, at_a_time // 22)

    logits = hidden @ kernel
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one_hot = np.eye(11)[np.where(weights == 0, 0, targets)]
    expected = -weights * np.log((odds * one_hot).sum(-1))
    cotangent = weights[..., None] * (odds - one_hot)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradients[0], np.einsum("btd,btv->dv", hidden, cotangent), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], cotangent @ kernel.T, rtol=1e-5, atol=1e-5)
