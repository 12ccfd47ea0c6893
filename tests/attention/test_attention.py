"""``attention`` without an encoding, against a loop in float64; and inside Flax's attention modules."""

import itertools
import math

import flax.linen
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import posjax as pj

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(length=T, keys=S, key_heads=K, value_width=H, width=H):
    return normal(0, B, length, N, width), normal(1, B, keys, key_heads, width), normal(2, B, keys, key_heads, value_width)


def loop(query, key, value, allowed=lambda b, n, t, s: True, scale=None, cap=None):
    """Attention one query at a time, in float64: its output [B, T, N, V] and its weights [B, N, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    group = heads // key.shape[2]
    weights = np.zeros((batch, heads, length, key.shape[1]))
    out = np.zeros((batch, length, heads, value.shape[3]))
    for b, n, t in np.ndindex(batch, heads, length):
        visible = [s for s in range(key.shape[1]) if allowed(b, n, t, s)]
        if not visible:
            continue
        scores = np.array([scale * (query[b, t, n] @ key[b, s, n // group]) for s in visible])
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        unnormalised = np.exp(scores - scores.max())
        weights[b, n, t, visible] = unnormalised / unnormalised.sum()
        out[b, t, n] = weights[b, n, t] @ value[b, :, n // group]
    return out, weights


def agrees(arrays, options, allowed=lambda b, n, t, s: True, scale=None, cap=None):
    """Output and weights of posjax equal the loop's."""
    query, key, value = arrays
    out, weights = loop(query, key, value, allowed, scale, cap)
    got = pj.attention(*(jnp.asarray(x) for x in arrays), implementation="xla", **options)
    np.testing.assert_allclose(got, out, atol=1e-5)
    got = pj.attention_weights(jnp.asarray(query), jnp.asarray(key), **options)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, weights, atol=1e-5)


# Masks ---------------------------------------------------------------------------------------------------------------


def test_without_a_mask_and_every_grouping_of_heads():
    for key_heads in (1, 2, 4):
        agrees(qkv(key_heads=key_heads), {})


def test_scale_and_soft_cap():
    agrees(qkv(), {"scale": 0.7}, scale=0.7)
    agrees(qkv(), {"scale": jnp.float32(2.0), "logits_soft_cap": 1.5}, scale=2.0, cap=1.5)
    out = pj.attention(*map(jnp.asarray, qkv()), logits_soft_cap=1e-6)
    np.testing.assert_allclose(out, np.broadcast_to(np.repeat(qkv()[2].mean(1, keepdims=True), 2, 2), out.shape), atol=1e-4)


@pytest.mark.parametrize("value_width", [1, 8])
def test_values_of_another_width_than_keys(value_width):
    agrees(qkv(value_width=value_width), {"is_causal": True}, lambda b, n, t, s: s <= t)


@pytest.mark.parametrize("shape", [*itertools.product((1, B), (1, N), (1, T), (1, S)), (T, S), (N, 1, S), (1,), (S,), ()])
def test_boolean_masks_of_every_broadcastable_shape(shape):
    mask = np.asarray(normal(3, *shape) < 0.4)
    whole = np.broadcast_to(mask, (B, N, T, S))
    agrees(qkv(), {"mask": jnp.asarray(mask)}, lambda *where: whole[where])


def test_causal_goes_by_position():
    agrees(qkv(), {"is_causal": True}, lambda b, n, t, s: s <= t)
    query_positions = np.array([[6, 5, 4, 3, 2], [0, 0, 1, 9, 3]])
    key_positions = np.array([4, 2, 8, 0, 1, 1, 3])
    agrees(
        qkv(),
        {"is_causal": True, "query_positions": query_positions, "key_positions": key_positions},
        lambda b, n, t, s: key_positions[s] <= query_positions[b, t],
    )


@pytest.mark.parametrize(
    ("window", "left", "right"),
    [(0, 0, 0), (2, 2, 2), ((1, 3), 1, 3), ((2, None), 2, None), ((None, 1), None, 1), ((None, None), None, None)],
)
@pytest.mark.parametrize("positions", [None, [5, 6, 7, 10, 30]])
def test_local_windows_go_by_position(window, left, right, positions):
    where = range(T) if positions is None else positions

    def allowed(b, n, t, s):
        return (left is None or s >= where[t] - left) and (right is None or s <= where[t] + right)

    agrees(qkv(), {"local_window_size": window, "query_positions": None if positions is None else jnp.array(positions)}, allowed)


def test_segments_of_one_length_and_as_a_pair():
    of_queries = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 3, 1]], np.int32)
    of_keys = np.array([[2, 2, 1, 1, 1, 0, 5], [1, 2, 3, 1, 2, 3, 3]], np.int32)
    agrees(
        qkv(),
        {"segment_ids": (jnp.asarray(of_queries), jnp.asarray(of_keys))},
        lambda b, n, t, s: of_queries[b, t] == of_keys[b, s],
    )
    agrees(
        qkv(keys=T),
        {"segment_ids": jnp.asarray(of_queries), "is_causal": True},
        lambda b, n, t, s: of_queries[b, t] == of_queries[b, s] and s <= t,
    )


def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients():
    arrays = [jnp.asarray(x) for x in qkv()]
    mask = jnp.ones((T, S), bool).at[2].set(False)

    def function(query, key, value):
        return pj.attention(query, key, value, mask=mask)

    out = function(*arrays)
    np.testing.assert_array_equal(out[:, 2], 0.0)
    assert np.abs(out[:, [0, 1, 3, 4]]).min() > 0
    for gradient in jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=(0, 1, 2))(*arrays):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
    np.testing.assert_array_equal(pj.attention_weights(*arrays[:2], mask=mask)[:, :, 2], 0.0)
    with_position = pj.attention(*arrays, pj.cope_alibi(), mask=mask, is_causal=True)
    np.testing.assert_array_equal(with_position[:, 2], 0.0)


sizes = st.sampled_from([1, 4])
sides = st.sampled_from([None, 0, 1, 2])


@hypothesis.settings(max_examples=12, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.data(), sizes, sizes, st.just(2), st.booleans(), sides, sides, st.booleans(), st.sampled_from([None, 2.0]))
def test_any_combination_of_masks(data, length, keys, groups, is_causal, left, right, segmented, cap):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((1, length, 2 * groups, 2), (1, keys, 2, 2), (1, keys, 2, 2))]
    query_positions, key_positions = rng.integers(0, 4, length), rng.integers(0, 4, keys)
    holes = rng.random((1, 2 * groups, length, keys)) < 0.8
    segments = rng.integers(0, 2, (1, length)), rng.integers(0, 2, (1, keys))

    def allowed(b, n, t, s):
        distance = query_positions[t] - key_positions[s]
        near = (left is None or distance <= left) and (right is None or distance >= -right)
        same = not segmented or segments[0][b, t] == segments[1][b, s]
        return holes[b, n, t, s] and near and same and (not is_causal or distance >= 0)

    options = {
        "is_causal": is_causal,
        "mask": holes,
        "local_window_size": (left, right),
        "segment_ids": segments if segmented else None,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "logits_soft_cap": cap,
    }
    agrees(arrays, options, allowed, cap=cap)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"local_window_size": 2},
        {"local_window_size": (3, 0)},
        {"is_causal": True, "local_window_size": (1, 0)},
        {"mask": np.random.default_rng(4).random((B, 1, T, T)) < 0.7},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("key_heads", [1, K, N])
def test_it_replaces_jax_dot_product_attention(options, key_heads):
    arrays = [jnp.asarray(x) for x in qkv(keys=T, key_heads=key_heads)]
    if "mask" in options:  # jax spreads a row that sees nothing over all keys
        options = options | {"mask": options["mask"] | np.eye(T, dtype=bool)}
    want = jax.nn.dot_product_attention(*arrays, **options, implementation="xla")
    np.testing.assert_allclose(pj.attention(*arrays, **options), want, atol=1e-5)


# Flax's modules ------------------------------------------------------------------------------------------------------


WIDTH = 16
FLAX = {
    "rope": pj.rope(),
    "alibi": pj.alibi(),
    "cope": pj.cope(max_position=4),
}
X = jnp.asarray(normal(5, B, T, WIDTH))
CAUSAL = jnp.tril(jnp.ones((1, 1, T, T), bool))


def flax_params(encoding):
    params = encoding.init(jax.random.key(0), pj.Dims(num_heads=N, head_dim=WIDTH // N))
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(normal(6, *leaf.shape)), params)


def by_hand(kernels, encoding, params):
    """The module in NumPy around one call of posjax, from {name: (kernel, bias)}."""
    query, key, value = (
        np.einsum("btd,dnh->btnh", X, kernels[name][0]) + np.asarray(kernels[name][1]) for name in ("query", "key", "value")
    )
    out = pj.attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), encoding, params, is_causal=True)
    return np.einsum("btnh,nhd->btd", out, kernels["out"][0]) + np.asarray(kernels["out"][1])


@pytest.mark.parametrize("name", FLAX)
def test_nnx_attention_module(name):
    encoding, params = FLAX[name], flax_params(FLAX[name])
    attention_fn = pj.attention_fn(encoding, params, is_causal=name == "alibi")
    module = nnx.MultiHeadAttention(N, WIDTH, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    module.query.bias[...] = jnp.asarray(normal(7, N, WIDTH // N))
    kernels = {
        part: (getattr(module, part).kernel[...], getattr(module, part).bias[...]) for part in ("query", "key", "value", "out")
    }
    want = by_hand(kernels, encoding, params)
    call = {"rope": {"is_causal": True}, "alibi": {}, "cope": {"mask": CAUSAL}}[name]  # the three ways to be causal
    np.testing.assert_allclose(module(X, **call), want, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda module, x: module(x, **call))(module, X), want, atol=1e-5)


@pytest.mark.parametrize("name", FLAX)
def test_linen_attention_module(name):
    encoding, params = FLAX[name], flax_params(FLAX[name])
    attention_fn = pj.attention_fn(encoding, params)
    module = flax.linen.MultiHeadDotProductAttention(
        num_heads=N, attention_fn=attention_fn, bias_init=flax.linen.initializers.normal()
    )
    variables = module.init(jax.random.key(0), X, mask=CAUSAL)
    want = by_hand({part: (leaves["kernel"], leaves["bias"]) for part, leaves in variables["params"].items()}, encoding, params)
    np.testing.assert_allclose(module.apply(variables, X, mask=CAUSAL), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, X, mask=CAUSAL), want, atol=1e-5)


def test_attention_fn_takes_the_masks_that_flax_makes():
    """flax.linen.make_causal_mask and nnx.make_causal_mask make ones and zeros of float32 unless told otherwise."""
    arrays = [jnp.asarray(x) for x in qkv(keys=T, key_heads=N)]
    want = pj.attention(*arrays, pj.alibi(), is_causal=True)
    for make in (flax.linen.make_causal_mask, nnx.make_causal_mask):
        np.testing.assert_allclose(pj.attention_fn(pj.alibi())(*arrays, mask=make(jnp.ones((B, T)))), want, atol=1e-6)
