"""What encodings may do beyond one call: draw coordinates while training, carry a state along the sequence, cache raw keys."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import posjax as pj
from posjax.attention import kv_cache
from posjax.core.sequence import short_conv
from posjax.lab.run import make_loss
from posjax.models.transformer import Transformer, TransformerConfig, functional

B, T, N, K, H = 2, 11, 4, 2, 8
DIMS = pj.Dims(num_heads=N, head_dim=H, num_kv_heads=K)
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (jnp.asarray(RNG.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
CUTS = (0, 4, 5, 6, T)
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 0, 1, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])


def test_short_convolutions_equal_their_sum_token_by_token_whole_and_in_pieces():
    x, taps = RNG.normal(size=(B, T, 3)), RNG.normal(size=(4, 3))
    want = np.zeros_like(x)
    for b, t in itertools.product(range(B), range(T)):
        if SEGMENTS[b, t]:
            before = [s for s in range(t, -1, -1) if SEGMENTS[b, s] != 0][:4]
            want[b, t] = sum(taps[w] * x[b, s] for w, s in enumerate(before) if SEGMENTS[b, s] == SEGMENTS[b, t])

    def in_pieces(x, taps, cuts, state=None):
        pieces = []
        for begin, end in itertools.pairwise(cuts):
            piece, state = short_conv(x[:, begin:end], taps, SEGMENTS[:, begin:end], state)
            pieces.append(piece)
        return jnp.concatenate(pieces, 1), state

    @jax.jit
    def all_ways(*arrays):
        whole, state = in_pieces(*arrays, (0, T))
        zeros = jax.tree.map(jnp.zeros_like, state)
        return whole, in_pieces(*arrays, (0, T), zeros)[0], in_pieces(*arrays, (0, 1, 4, 6, T))[0]

    for got in all_ways(jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def selective(params, inputs):
    """Rotates by angles that are made of the keys, convolved and summed along the sequence (as in Selective RoPE)."""
    before = inputs.state or {"angle": 0.0, "conv": None}
    heads = inputs.key.shape[2]
    steps, conv = short_conv(inputs.key[..., : H // 2].reshape(*inputs.key.shape[:2], -1), TAPS, inputs.k.segments, before["conv"])
    angle = jnp.cumsum(steps, axis=1) + (before["angle"] if inputs.state is None else before["angle"][:, None])
    phase = angle.reshape(*angle.shape[:2], heads, -1)
    rotation = pj.Rotate(jnp.repeat(phase, inputs.query.shape[2] // heads, axis=2), phase)
    return pj.ScoreModifications((rotation,), state={"angle": angle[:, -1], "conv": conv})


def forgetful(params, inputs):
    return dataclasses.replace(selective(params, dataclasses.replace(inputs, state=None)), state=None)


TAPS = jnp.asarray(RNG.normal(size=(3, K * H // 2)), jnp.float32)
SELECTIVE = pj.encoding("selective", attend=selective)


def decoded(encoding, cuts=CUTS, segments=None, **size):
    cache, out = kv_cache.init_cache(encoding, DIMS, B, **(size or {"max_length": T})), []
    for begin, end in itertools.pairwise(cuts):
        pieces = (x[:, begin:end] for x in (QUERY, KEY, VALUE))
        given = {} if segments is None else dict(segment_ids=segments[:, begin:end], positions=jnp.arange(begin, end)[None])
        mixed, cache = kv_cache.attend(*pieces, encoding, {}, cache, **given)
        out.append(mixed)
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "with segments and padding"])
@pytest.mark.parametrize("encoding", [SELECTIVE, pj.chain(pj.rope(), SELECTIVE, pj.alibi())], ids=["alone", "in a chain"])
def test_a_state_is_carried_from_call_to_call(encoding, packed):
    segments = SEGMENTS if packed else None
    want = pj.attention(QUERY, KEY, VALUE, encoding, {}, is_causal=True, segment_ids=segments)
    got = decoded(encoding, segments=segments)
    real = np.ones((B, T), bool) if segments is None else np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-6)


def test_without_the_state_decoding_differs():
    encoding = pj.encoding("forgetful", attend=forgetful)
    want = pj.attention(QUERY, KEY, VALUE, encoding, {}, is_causal=True)
    assert np.abs(decoded(encoding) - want).max() > 0.1


def test_a_state_is_listed_in_the_layout_of_the_cache():
    lines = [str(entry) for entry in pj.cache_layout(pj.chain(pj.alibi(), SELECTIVE), DIMS)]
    assert any(line.startswith("state['selective']['angle']") and "float32[8]" in line for line in lines), lines


def stretched(params, inputs):
    """Divides all positions by the number of tokens there are, as scalings by the length of the sequence do."""
    length = (inputs.k.segments != 0).sum(1)[:, None, None, None] if inputs.k.segments is not None else inputs.key.shape[1]
    return pj.ScoreModifications((pj.Rotate(*(8.0 * t.positions[..., None, None] / length for t in (inputs.q, inputs.k))),))


@pytest.mark.parametrize("size", [{"max_length": T + 2}, {"window": T}], ids=["full", "window"])
def test_raw_keys_are_prepared_again_in_every_call(size):
    raw = pj.encoding("stretched", attend=stretched, cache="raw")
    got = decoded(pj.chain(raw, pj.alibi()), **size)
    for begin, end in itertools.pairwise(CUTS):
        so_far = (x[:, :end] for x in (QUERY, KEY, VALUE))
        want = pj.attention(*so_far, pj.chain(raw, pj.alibi()), {}, is_causal=True)[:, begin:end]
        np.testing.assert_allclose(got[:, begin:end], want, atol=2e-6)
    stale = decoded(pj.chain(pj.encoding("stretched", attend=stretched), pj.alibi()), **size)
    assert np.abs(stale - got).max() > 0.01  # keys that were rotated under an old length


def test_what_raw_keys_do_not_go_with():
    for one in (pj.encoding("raw", attend=selective, cache="raw"), pj.encoding("raw", needs_hidden=True, cache="raw")):
        with pytest.raises(ValueError, match="cache must be 'transformed' for raw, which has a state or needs hidden, got 'raw'"):
            kv_cache.init_cache(one, DIMS, B, max_length=4)


def drawn(tokens, key):
    """Randomised positions: a sorted sample of a longer range while training, the positions in evaluation."""
    if key is None:
        return tokens.coordinates
    length = tokens.order.shape[1]
    return jnp.sort(jax.random.choice(key, 4 * length, (length,), replace=False))[None, :, None]


def test_coordinates_are_drawn_once_a_step_while_training():
    encoding = pj.chain(pj.encoding("randomised", place=drawn), pj.sinusoidal(), pj.rope())
    config = TransformerConfig(vocab_size=16, num_layers=2, num_heads=2, embed_dim=16, max_length=8)
    with_params, params = functional(Transformer(config, encoding, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(8)[None]
    batch = dict(tokens=tokens, targets=tokens, positions=tokens, segment_ids=jnp.ones_like(tokens), weights=jnp.ones((1, 8)))
    loss = jax.jit(make_loss(with_params, dropout=False))
    nats = [float(loss(params, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert nats[0] == nats[1] and abs(nats[0] - nats[2]) > 1e-3

    key = jax.random.key(7)
    inner = jax.random.split(jax.random.fold_in(key, 0), 3)[0]  # of the first encoding of the model, and its first member
    want = with_params(params)(tokens, coordinates=drawn(pj.Tokens.at(jnp.arange(8)), inner))
    np.testing.assert_allclose(with_params(params)(tokens, place_key=key), want, atol=1e-5)
    plain = with_params(params)(tokens)
    np.testing.assert_allclose(plain, with_params(params)(tokens, coordinates=tokens[..., None]), atol=1e-5)
    assert np.abs(plain - want).max() > 1e-2
