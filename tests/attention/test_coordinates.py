"""Coordinates apart from the order of tokens: several axes and fractions, in attention, the cache, the ring and the Transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import BACKENDS
from flax import nnx
from jax.sharding import AxisType, Mesh
from suite import normal

import posjax as pj
from posjax.attention import kv_cache
from posjax.attention.backends import reference
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare
from posjax.models.transformer import Transformer, TransformerConfig

B, T, N, K, H = 2, 24, 4, 2, 12
DIMS = pj.Dims(N, H, num_kv_heads=K)


def street_distance(differences, args):
    return -0.1 * sum(jnp.abs(d).astype(jnp.float32) for d in differences)


def attend_in_space(params, inputs):
    """A third of the channels turns by each axis, and the score falls with the sum of the distances."""
    frequencies = jnp.asarray([1.0, 0.1])
    phases = []
    for tokens in (inputs.q, inputs.k):
        at = tokens.on_axes(3).astype(jnp.float32)
        phases.append((at[..., None] * frequencies).reshape(*at.shape[:2], 1, -1))
    return pj.ScoreModifications((pj.Rotate(*phases, learned=False),), (pj.Bias(pj.Pair(street_distance)),))


IN_SPACE = pj.encoding("in_space", attend=attend_in_space, axes=3)


def operands():
    return normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H)


def places(kind):
    """Coordinates [B, T, 3] that have nothing to do with the order of the tokens."""
    at = np.random.default_rng(4).integers(0, 9, (B, T, 3))
    return jnp.asarray(at, jnp.int32) if kind == "integers" else jnp.asarray(at / 4.0 + 0.125, jnp.float32)


def formula(at):
    """Causal by index, everything else by coordinates, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in operands())
    at = np.asarray(at, np.float64)
    phase = (at[..., None] * np.asarray([1.0, 0.1])).reshape(B, T, 1, 6)

    def turned(x):
        pair = (x[..., :6] + 1j * x[..., 6:]) * np.exp(1j * phase)
        return np.concatenate([pair.real, pair.imag], -1)

    key, value = (np.repeat(x, N // K, axis=2) for x in (turned(key), value))
    scores = np.einsum("btnh,bsnh->bnts", turned(query), key) / np.sqrt(H)
    scores -= 0.1 * np.abs(at[:, :, None] - at[:, None]).sum(-1)[:, None]
    weights = np.where(np.tril(np.ones((T, T), bool)), np.exp(scores), 0.0)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


def around_a_ring(call):
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",), axis_types=(AxisType.Auto,))
    return ring.attention(call, Context(ShardSpec(mesh), "context"), kernel="xla")


@pytest.mark.parametrize("kind", ["integers", "fractions"])
@pytest.mark.parametrize(
    "backend",
    [reference.attention, functools.partial(xla_chunked.attention, tile=(7, 5)), around_a_ring],
    ids=["xla", "xla_chunked", "ring"],
)
def test_three_axes(kind, backend):
    at = places(kind)
    call = prepare(*operands(), IN_SPACE, {}, is_causal=True, query_coordinates=at, key_coordinates=at)
    np.testing.assert_allclose(jax.jit(backend)(call), formula(at), atol=1e-5)


def test_the_implementation_is_chosen_by_what_runs():
    at = places("fractions")
    own = dict(is_causal=True, query_coordinates=at, key_coordinates=at)
    np.testing.assert_allclose(pj.attention(*operands(), IN_SPACE, {}, **own), formula(at), atol=1e-5)
    with pytest.raises(NotImplementedError, match="query_coordinates are given, and the kernel evaluates a bias"):
        pj.attention(*operands(), IN_SPACE, {}, implementation="pallas", **own)


@pytest.mark.parametrize("kind", ["integers", "fractions"])
def test_the_cache(kind):
    at = places(kind)
    cache = kv_cache.init_cache(IN_SPACE, DIMS, B, max_length=T, coordinate_dtype=at.dtype)
    outs, start = [], 0
    for size in (10, 1, 13):
        now = slice(start, start := start + size)
        out, cache = kv_cache.attend(*(x[:, now] for x in operands()), IN_SPACE, {}, cache, coordinates=at[:, now])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), formula(at), atol=1e-5)


def test_a_cache_must_have_been_made_for_them():
    plain = kv_cache.init_cache(pj.rope(), DIMS, B, max_length=T)
    with pytest.raises(ValueError, match="None for a cache that was created without a coordinate_dtype, got an array"):
        kv_cache.attend(*operands(), pj.rope(), {}, plain, coordinates=jnp.zeros((T, 1)))
    three = kv_cache.init_cache(IN_SPACE, DIMS, B, max_length=T, coordinate_dtype=jnp.float32)
    whole = kv_cache.init_cache(IN_SPACE, DIMS, B, max_length=T, coordinate_dtype=jnp.int32)
    with pytest.raises(ValueError, match="coordinates must be integers for a cache of int32, got float32"):
        kv_cache.attend(*operands(), IN_SPACE, {}, whole, coordinates=jnp.zeros((T, 3)))
    with pytest.raises(ValueError, match="coordinates must have the 3 axes of the cache, got 2"):
        kv_cache.attend(*operands(), IN_SPACE, {}, three, coordinates=jnp.zeros((T, 2)))


@pytest.mark.parametrize("encoding", [pj.rope(), pj.alibi(), pj.chain(pj.rope(), pj.cope(4))], ids=lambda e: e.name)
def test_positions_as_coordinates_change_nothing(encoding):
    params = encoding.init(jax.random.key(0), DIMS)
    at = jnp.arange(T)
    plain = pj.attention(*operands(), encoding, params, is_causal=True)
    given = pj.attention(*operands(), encoding, params, is_causal=True, query_coordinates=at[:, None], key_coordinates=at[:, None])
    np.testing.assert_allclose(given, plain, atol=1e-6)
    moved = pj.attention(*operands(), encoding, params, is_causal=True, query_positions=3 * at, key_positions=3 * at)
    thrice = dict.fromkeys(("query_coordinates", "key_coordinates"), 3 * at[:, None])
    np.testing.assert_allclose(pj.attention(*operands(), encoding, params, is_causal=True, **thrice), moved, atol=1e-6)


def test_half_the_coordinates_are_half_the_distance():
    at = jnp.arange(T)[:, None] / 2
    own = dict(is_causal=True, query_coordinates=at, key_coordinates=at)
    got = pj.attention(*operands(), pj.alibi(0.2), {}, **own)
    np.testing.assert_allclose(got, pj.attention(*operands(), pj.alibi(0.1), {}, is_causal=True), atol=1e-6)


def test_the_transformer_and_its_decoder():
    """A model on tokens in space, at once and token by token; every layer sees the coordinates."""
    config = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=24, num_heads=2, max_length=T)
    model = Transformer(config, IN_SPACE, rngs=nnx.Rngs(0))
    tokens, at = jnp.asarray(np.random.default_rng(0).integers(0, 11, (B, T))), places("fractions")
    whole = model(tokens, coordinates=at)
    assert float(jnp.abs(whole - model(tokens)).max()) > 1e-2
    cache = model.init_cache(B, coordinate_dtype=jnp.float32)
    first, cache = model.decode(tokens[:, :9], cache, coordinates=at[:, :9])
    rest, _ = model.decode(tokens[:, 9:], cache, coordinates=at[:, 9:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-4)


# Rotations by several coordinates, in a model ------------------------------------------------------------------------------------


def mixed_layers():
    """A model whose layers alternate between M-RoPE and no encoding."""
    config = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=24, num_heads=2, num_kv_heads=1, max_length=T)
    return Transformer(config, [pj.identity(), pj.mrope((2, 2, 2), theta=100.0)], rngs=nnx.Rngs(0))


def conversation():
    """Tokens, segments and coordinates of two rows, the second left-padded: text, an image or a video, text."""
    parts = [[2, (1, 2, 3), 4], [1, (6, 1, 1), 3]]
    first, second = (pj.mrope_positions(row, merge_size=1)[0] for row in parts)
    at = np.stack([first, np.concatenate([np.zeros((2, 3), np.int32), second])])
    segments = np.ones(at.shape[:2], np.int32)
    segments[1, :2] = 0
    return np.random.default_rng(0).integers(0, 11, at.shape[:2]), segments, at


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [(9, 1, 1, 1), (4, 5, 3)])
def test_a_model_continues_each_row_from_its_largest_coordinate(sizes):
    """The last three tokens of both rows are text, whose coordinates the cache continues."""
    model, (tokens, segments, at) = mixed_layers(), conversation()
    whole = model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments), coordinates=at)
    assert float(jnp.abs(whole - model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments))).max()) > 1e-3
    cache, outs, start = model.init_cache(2, coordinate_dtype=jnp.int32), [], 0
    for size in sizes:
        now = slice(start, start := start + size)
        given = {"coordinates": at[:, now]} if start <= 9 else {}
        out, cache = model.decode(jnp.asarray(tokens[:, now]), cache, segment_ids=jnp.asarray(segments[:, now]), **given)
        outs.append(out)
    real = segments[..., None] != 0
    np.testing.assert_allclose(jnp.concatenate(outs, 1) * real, whole * real, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xla"])
@pytest.mark.parametrize(
    "encoding",
    [pj.mrope((2, 2, 2), "interleaved"), pj.axial_rope(layout="blocks"), pj.rope_mixed(), pj.xpos(), pj.pope()],
    ids=lambda encoding: encoding.name,
)
def test_rotations_of_each_row_in_every_backend(encoding, backend):
    """Two rows with coordinates of their own, forward and backward, equal dense attention of the rotated query and key."""
    length = 136
    query, key, value = normal(1, B, length, N, H), normal(2, B, length, K, H), normal(3, B, length, K, H)
    params = encoding.init(jax.random.key(0), DIMS)
    at = jnp.asarray(np.random.default_rng(4).integers(0, 60, (B, length, encoding.axes)), jnp.int32)

    def loss(query, key, backend):
        own = dict(is_causal=True, query_coordinates=at, key_coordinates=at)
        out = backend(prepare(query, key, value, encoding, params, **own))
        return (out * normal(5, B, length, N, H)).sum(), out

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, backend=BACKENDS[name]), (0, 1), has_aux=True))(query, key)
        for name in ("xla", backend)
    ]
    for want, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(jnp.abs(want).max())))
