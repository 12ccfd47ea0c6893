"""``linear_attention`` against sums over all pairs in float64, at the edges of the chunks that it walks."""

import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj

B, N, K = 2, 4, 2


def arrays_of(length, keys, width=2, value_width=3):
    rng = np.random.default_rng(0)
    shapes = (B, length, N, width), (B, keys, K, width), (B, keys, K, value_width)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def in_full(query, key, value, allowed):
    """sum over allowed s of phi(q).phi(k) v over the same sum without v, phi = elu + 1, from the [T, S] products in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    query, key = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (query, key))
    products = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, group, 2)) * allowed
    return np.einsum("bnts,bsnv->btnv", products / products.sum(-1, keepdims=True), np.repeat(value, group, 2))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
def test_the_edges_of_its_chunks(length, is_causal, segmented):
    arrays = arrays_of(length, length)
    t = np.arange(length)
    # One row's segments end at the edge of a chunk and are shorter than it, the other's end inside of one and are longer.
    segments = np.stack([np.minimum(t // 64, 3), (t > 150).astype(int)]).astype(np.int32)
    allowed = np.broadcast_to(t[:, None] >= t, (B, length, length)) if is_causal else np.ones((B, length, length), bool)
    if segmented:
        allowed = allowed & (segments[:, :, None] == segments[:, None])
    got = pj.linear_attention(
        *map(jnp.asarray, arrays), is_causal=is_causal, segment_ids=jnp.asarray(segments) if segmented else None
    )
    np.testing.assert_allclose(got, in_full(*arrays, allowed[:, None]), atol=1e-5)


def test_two_lengths_and_another_width_of_values():
    arrays = arrays_of(5, 7)
    got = pj.linear_attention(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, in_full(*arrays, np.ones((B, 1, 5, 7))), atol=1e-5)


def test_rope_sees_distance_alone_and_the_type_is_kept():
    arrays = [jnp.asarray(x) for x in arrays_of(5, 5, width=4)]
    here, there, still = (
        pj.linear_attention(*arrays, encoding, is_causal=True, query_positions=p, key_positions=p)
        for encoding, p in ((pj.rope(), jnp.arange(5)), (pj.rope(), jnp.arange(5) + 100_000), (None, jnp.arange(5)))
    )
    np.testing.assert_allclose(there, here, atol=1e-4)
    assert np.abs(here - still).max() > 1e-3
    half = pj.linear_attention(*(x.astype(jnp.bfloat16) for x in arrays), pj.rope(), is_causal=True)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), here, atol=0.05)
