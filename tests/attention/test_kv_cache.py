"""Decoding: what comes out of a cache must equal ``pj.attention`` over the whole sequence, which knows no cache.

Every encoding of the suite goes through one layer; a handful goes through whole models.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suite import (
    DIMS,
    TOKENS,
    B,
    H,
    K,
    T,
    close,
    every_case,
    layer,
    noisy,
    project,
    random_params,
)

import posjax as pj
from posjax.attention import kv_cache
from posjax.encodings.spec import parse_encoding
from posjax.models.transformer import Transformer, TransformerConfig, functional

HALF = T // 2
CUTS = {"at once": (0, T), "in chunks": (0, HALF, T), "token by token": (0, HALF, *range(HALF + 1, T + 1))}
WINDOW = HALF  # a window and a chunk are as long as a full cache, and share what is compiled for it


def through_cache(encoding, x, cache, cuts, positions=None, segment_ids=None, **options):
    """Tokens x through embed, projections and a cache, piece by piece: ([B, T, N, H], the last cache)."""
    params, out = random_params(encoding), []
    for begin, end in itertools.pairwise(cuts):
        piece = slice(begin, end)
        place, segments = (None if a is None else jnp.broadcast_to(a, x.shape[:2])[:, piece] for a in (positions, segment_ids))
        given = dict(positions=None if positions is None else place, segment_ids=segments)
        place = kv_cache.next_positions(cache, end - begin, place, segments)[0]
        hidden = encoding.embed(params, x[:, piece], pj.Tokens.at(place))
        mixed, cache = kv_cache.attend(*project(hidden), encoding, params, cache, hidden=hidden, **given, **options)
        out.append(mixed)
    return jnp.concatenate(out, axis=1), cache


def whole(encoding, x=TOKENS, **options):
    """The same without a cache, by the dense oracle."""
    return layer(encoding, random_params(encoding), x, is_causal=True, implementation="xla", **options)


# Every encoding, one layer -------------------------------------------------------------------------------------------


@every_case
def test_any_split_equals_the_full_computation(case):
    expected = whole(case.encoding)
    for how, cuts in CUTS.items():
        out, cache = through_cache(case.encoding, TOKENS, kv_cache.init_cache(case.encoding, DIMS, B, max_length=T), cuts)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5, err_msg=how)
        assert cache.used == T and (cache.next_position == T).all()


@every_case
def test_a_window_equals_full_windowed_attention_past_the_training_length(case):
    far = 0 if case.encoding.max_length(DIMS) else 1000
    positions = far + jnp.arange(T)
    expected = whole(case.encoding, positions=positions, local_window_size=WINDOW)
    cache = kv_cache.init_cache(case.encoding, DIMS, B, window=WINDOW)
    before = jax.tree.map(jnp.shape, cache)
    out, cache = through_cache(case.encoding, TOKENS, cache, CUTS["in chunks"], positions)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == before
    assert (cache.positions == positions[-WINDOW:]).all()


@every_case
@pytest.mark.parametrize("window", [None, WINDOW])
def test_rows_of_different_lengths_never_see_their_padding(case, window):
    """Row 1 has a prompt of 3 tokens where row 0 has 6, or 12, which is enough padding to fill a window.

    What stands in the padding is as real as any token.
    """
    short, end = 3, HALF if window is None else T
    x = jnp.concatenate([TOKENS, TOKENS[:, :HALF]], axis=1)[:, : end + HALF]
    real = jnp.asarray([[1] * (end + HALF), [1] * short + [0] * (end - short) + [1] * HALF])
    options = dict(max_length=T) if window is None else dict(window=window)
    cache, cuts = kv_cache.init_cache(case.encoding, DIMS, B, **options), range(0, end + HALF + 1, HALF)
    if (limit := case.encoding.max_length(DIMS)) is not None and end + HALF > limit:
        x, real, cuts = x[:, :limit], real[:, :limit], (*cuts[:-1], limit)
    out, cache = through_cache(case.encoding, x, cache, cuts, segment_ids=real)
    row = np.flatnonzero(real[1])
    assert list(cache.next_position) == [x.shape[1], len(row)]

    alone = jnp.stack([x[0, :T], x[1, np.resize(row, T)]])  # each row from its own beginning; what follows is not looked at
    expected = whole(case.encoding, alone, local_window_size=window)
    close(out[0, :T], expected[0], 1e-5)
    close(out[1, row], expected[1, : len(row)], 1e-5)


# One layer, other calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
def test_packed_segments_stay_apart(window):
    encoding, begin = parse_encoding("rope + cope(4, gates='content')"), 5  # of the second segment, inside a chunk
    segments, positions = 1 + (jnp.arange(T) >= begin), jnp.arange(T) - begin * (jnp.arange(T) >= begin)
    options = dict(max_length=T) if window is None else dict(window=window)
    out, _ = through_cache(
        encoding, TOKENS, kv_cache.init_cache(encoding, DIMS, B, **options), CUTS["token by token"], positions, segments
    )
    packed = dict(segment_ids=jnp.broadcast_to(segments, (B, T)), local_window_size=window)
    close(out, whole(encoding, positions=positions, **packed), 1e-5)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_bias_of_gates_and_a_clamp_are_those_of_the_full_computation(cuts):
    encoding = parse_encoding("rope + cope(6, gate_bias=-0.5, clamp=3)")
    out, _ = through_cache(encoding, TOKENS, kv_cache.init_cache(encoding, DIMS, B, max_length=T), cuts)
    close(out, whole(encoding), 1e-5)


def test_scale_soft_cap_and_the_tiled_kernel():
    encoding, options = parse_encoding("rope + cope(4)"), dict(scale=0.7, logits_soft_cap=2.0)
    cache = kv_cache.init_cache(encoding, DIMS, B, max_length=T + 3)
    out, _ = through_cache(encoding, TOKENS, cache, CUTS["in chunks"], implementation="xla_chunked", **options)
    close(out, whole(encoding, **options), 1e-5)


def test_what_each_encoding_caches():
    def held(spec):
        return {entry.name: entry.holds for entry in pj.cache_layout(parse_encoding(spec), DIMS)}

    plain = {"key": "raw keys", "value": "values"}
    assert held("identity") == held("alibi") == held("cope(4)") == plain
    assert held("rope") == held("learned + rope") == plain | {"key": "rotated keys"}
    assert held("tupe") == plain | {"key": "widened keys"}
    assert held("rope + cope(4, gates='content')") == {"key": "rotated keys", "value": "values", "bias 0 at.key": "raw keys"}
    assert held("alibi + cope(4, gates='values')") == plain | {"bias 1 at.key": "values"}
    assert held("cope(4, gates='keys')") == plain | {"bias 0 at.key": "made by the encoding"}
    key = pj.cache_layout(pj.tupe(), DIMS, jnp.bfloat16)[0]
    assert str(key) == f"key: widened keys, bfloat16[{K}, {2 * H + 2}], {K * (2 * H + 2) * 2} bytes a token"


@pytest.mark.parametrize("spec", ["tupe", "rope + cope(4, gates='content')"])
def test_the_listing_adds_up_to_the_cache(spec):
    encoding = parse_encoding(spec)
    listed = sum(entry.bytes for entry in pj.cache_layout(encoding, DIMS))
    cache = kv_cache.init_cache(encoding, DIMS, 3, max_length=7)
    assert sum(x.nbytes for x in jax.tree.leaves((cache.key, cache.value, cache.columns))) == 3 * 7 * listed


def test_a_full_cache_says_so():
    cache = kv_cache.init_cache(None, DIMS, B, max_length=HALF)
    _, cache = through_cache(pj.identity(), TOKENS, cache, (0, HALF))
    with pytest.raises(ValueError, match="max_length of the cache must be at least 12 to hold 6 more tokens, got 6"):
        through_cache(pj.identity(), TOKENS, cache, (HALF, T))
    query, key, value = project(TOKENS[:, :1])
    out, _ = jax.jit(lambda cache: kv_cache.attend(query, key, value, None, None, cache))(cache)
    assert jnp.isnan(out).all()  # where nothing can be raised, nothing that looks right comes out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of max_length and window must be given, got max_length=None and window=None"),
        ({"max_length": 4, "window": 2}, "one of max_length and window"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        kv_cache.init_cache(pj.rope(), DIMS, B, **options)


def test_calls_that_cannot_be():
    query, key, value = project(TOKENS[:, :1])
    cache = kv_cache.init_cache(None, DIMS, B + 1, max_length=4)
    with pytest.raises(ValueError, match=r"batch size and dtype of the cache, 3 and float32, got 2 and float32"):
        kv_cache.attend(query, key, value, None, None, cache)
    cache = kv_cache.init_cache(None, DIMS, B, max_length=4)
    with pytest.raises(ValueError, match=r"segment_ids must be integers \[2, 1\], got int32\[2\]"):
        kv_cache.attend(query, key, value, None, None, cache, segment_ids=jnp.ones(B, jnp.int32))


# Whole models --------------------------------------------------------------------------------------------------------

V = 19
TINY = TransformerConfig(vocab_size=V, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=T)
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


def build(spec, **changes):
    """A model with noise on the encoding's parameters, as ``functional`` splits it."""
    model = Transformer(dataclasses.replace(TINY, **changes), parse_encoding(spec), rngs=nnx.Rngs(0))
    with_params, params = functional(model)
    learned = {name: noisy(part) for name, part in params.items() if name == "encoding"}
    return with_params, params | learned


MODELS = {
    "tupe(relative=True)": dict(norm="layernorm", norm_position="post", activation="swiglu", tie_embeddings=False),
    "cope(4, gates='keys') / identity": dict(compute_dtype="bfloat16"),
    "rope + cope(4, shared=False)": dict(num_layers=3, local_window_size=WINDOW, logits_soft_cap=5.0, remat="full"),
    "cope(4, shared=False) / alibi / alibi": dict(num_layers=3),
}


@pytest.mark.parametrize("spec", [pytest.param(m, marks=pytest.mark.thorough if "tupe" in m else ()) for m in MODELS])
def test_a_model_reads_a_chunk_and_token_by_token_as_it_reads_all(spec):
    with_params, params = build(spec, **MODELS[spec])
    far = spec.startswith("rope")  # past max_length
    positions = jnp.broadcast_to(jnp.arange(T) + 500 * far, (B, T))
    expected = jax.jit(lambda p: with_params(p)(TEXT, positions))(params)
    step = jax.jit(lambda p, tokens, cache, place: with_params(p).decode(tokens, cache, place))
    tolerance = 0.05 if with_params(params).config.compute_dtype == "bfloat16" else 1e-5
    cache = with_params(params).init_cache(B)
    for begin, end in itertools.pairwise(CUTS["token by token"]):
        place = positions[:, begin:end] if far else None
        logits, cache = step(params, TEXT[:, begin:end], cache, place)
        close(logits, expected[:, begin:end], tolerance)


def test_ten_thousand_tokens_in_constant_memory():
    """One scan over single tokens, its cache a carry of a few kilobytes; the last logits equal those of a window read at once."""
    length, window, layers = 10_000, 8, 2
    with_params, params = build("rope + cope(4)", num_layers=layers, local_window_size=window, embed_dim=8, num_heads=2)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (1, length)), jnp.int32)

    def read(params, tokens, cache):
        def one(cache, token):
            logits, cache = with_params(params).decode(token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(one, cache, tokens.T)

    cache = with_params(params).init_cache(1)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    short, long = (jax.jit(read, donate_argnums=2).lower(params, tokens[:, :n], cache).compile() for n in (100, length))
    assert short.memory_analysis().temp_size_in_bytes == long.memory_analysis().temp_size_in_bytes
    cache, logits = long(params, tokens, cache)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == size < 10_000
    assert int(cache[0].next_position[0, 0]) == length
    for end in (1234, length):
        begin = end - 4 - layers * window  # all that the last four tokens can know of
        whole = with_params(params)(tokens[:, begin:end], jnp.arange(begin, end)[None])
        close(logits[end - 4 : end, 0], whole[0, -4:], 1e-5)


def test_a_model_reads_all_at_once_and_an_explicit_window_is_a_local_one():
    for window in (None, 3):
        with_params, params = build("rope", num_layers=1)
        logits, _ = with_params(params).decode(TEXT, with_params(params).init_cache(B, window=window))
        close(logits, build("rope", num_layers=1, local_window_size=window)[0](params)(TEXT), 1e-5)
    with_params, params = build("rope", local_window_size=3)
    assert [with_params(params).init_cache(B, window=wish)[0].window for wish in (2, 5)] == [2, 3]  # the narrower of the two


def test_linear_attention_keeps_two_sums():
    """Row 1 brings padding of 3 tokens, which may hold anything, and goes on behind it."""
    with_params, params = build("rope", attention="linear")
    cache = with_params(params).init_cache(B)
    assert {x.shape for x in jax.tree.leaves(cache)} == {(2, B, 4, 4, 4), (2, B, 4, 4), (2, B)}
    expected, short = with_params(params)(TEXT), 3
    prompt = TEXT[:, :HALF].at[1, short:].set(0)
    real = jnp.asarray([[1] * HALF, [1] * short + [0] * (HALF - short)])
    step = jax.jit(lambda p, *args: with_params(p).decode(*args))
    logits, cache = step(params, prompt, cache, None, real)
    close(logits[0], expected[0, :HALF], 1e-5)
    close(logits[1, :short], expected[1, :short], 1e-5)
    for n in range(HALF):
        token = jnp.stack([TEXT[0, HALF + n], TEXT[1, short + n]])
        logits, cache = step(params, token[:, None], cache, None, None)
        close(logits[:, 0], jnp.stack([expected[0, HALF + n], expected[1, short + n]]), 1e-5)


def test_models_that_cannot_decode_say_so():
    for changes, window, message in (
        ({"is_causal": False}, None, "is_causal must be True to decode, got False"),
        ({"attention": "linear"}, 3, "window must be None where attention='linear', got 3"),
    ):
        with_params, params = build("rope", **changes)
        with pytest.raises(ValueError, match=message):
            with_params(params).init_cache(B, window=window)
    with_params, params = build("rope")
    cache = with_params(params).init_cache(B, T - 1)
    with pytest.raises(ValueError, match="max_length of the cache must be at least 12"):
        with_params(params).decode(TEXT, cache)
