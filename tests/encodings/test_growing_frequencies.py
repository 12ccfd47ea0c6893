"""Frequencies that change with the length of a sequence (dynamic NTK, LongRoPE across its boundary), whole and while decoding.

The reference is attention in float64 in which every row is rotated by the frequencies of its own length, with keys that are rotated
anew for every query.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj
from posjax.testing import check_encoding

B, T, N, K, H, L = 2, 12, 2, 1, 8, 6
DIMS = pj.Dims(num_heads=N, head_dim=H, num_kv_heads=K)
SHORT, LONG = (1.0, 1.1, 1.2, 1.3), (1.0, 3.0, 5.0, 8.0)
LONGROPE = pj.rope(100.0, scaling=pj.longrope_scaling(SHORT, LONG, L, factor=4.0))
DYNAMIC = pj.rope(100.0, scaling=pj.dynamic_ntk_scaling(4.0, L))
ENCODINGS = {"dynamic_ntk": DYNAMIC, "longrope": LONGROPE}
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H)


def frequencies(encoding, length):
    """The closed form, and the factor of scores."""
    ratio = np.arange(0, H, 2) / H
    if encoding is DYNAMIC:
        stretch = 4.0 * max(length, L) / L - 3.0
        return (100.0 * stretch ** (H / (H - 2))) ** -ratio, 1.0
    return 100.0**-ratio / np.asarray(LONG if length > L else SHORT), 1 + np.log(4.0) / np.log(L)


def expected(encoding, row, count, start=0):
    """The last query's output in a sequence of ``count`` tokens of a row from ``start`` on, [N, H] float64."""
    here = slice(start, start + count)
    turns, gain = frequencies(encoding, count)

    def rotated(x):
        phase = np.arange(count)[:, None, None] * turns
        a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
        return np.concatenate([a * np.cos(phase) - b * np.sin(phase), a * np.sin(phase) + b * np.cos(phase)], -1)

    query, key = rotated(QUERY[row, here]), rotated(KEY[row, here])
    scores = gain * np.einsum("nh,snh->ns", query[-1], np.broadcast_to(key, (count, N, H))) / np.sqrt(H)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ns,sh->nh", weights / weights.sum(-1, keepdims=True), VALUE[row, here, 0].astype(np.float64))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@jax.jit
def attend(encoding, cache, query, key, value, segments):
    return pj.attend(query, key, value, encoding, {}, cache, segment_ids=segments)


def decoded(encoding, cuts, segments):
    """The outputs of calls on the pieces between cuts, and where each ends."""
    cache = pj.init_cache(encoding, DIMS, B, max_length=T)
    for begin, end in itertools.pairwise(cuts):
        part = (x[:, begin:end] for x in (QUERY, KEY, VALUE, segments))
        out, cache = attend(encoding, cache, *part)
        yield end, out[:, -1]


@every_encoding
def test_the_last_token_equals_the_full_computation_of_that_length(encoding):
    """Token by token, in chunks that cross the boundary, and at once; both lists are exact, and L tokens are short."""
    want = {n: np.stack([expected(encoding, row, n) for row in range(B)]) for n in range(1, T + 1)}
    whole = jnp.ones((B, T), jnp.int32)
    for cuts in (range(T + 1), (0, 4, 8, 12), (0, 12)):
        for end, out in decoded(encoding, cuts, whole):
            close(out, want[end])
    close(pj.attention(QUERY, KEY, VALUE, encoding, is_causal=True)[:, -1], want[T])


@every_encoding
def test_a_row_does_not_depend_on_the_length_of_other_rows(encoding):
    """Row 1 has four tokens of padding on the left, so it crosses the boundary later."""
    segments = np.ones((B, T), np.int32)
    segments[1, :4] = 0
    for end, out in decoded(encoding, (0, 4, 8, 9, 10, 11, 12), segments):  # programs of the test above
        close(out[0], expected(encoding, 0, end))
        if end == 4:
            continue
        close(out[1], expected(encoding, 1, end - 4, start=4))
    positions = jnp.asarray([range(T), [0] * 4 + list(range(T - 4))])
    options = dict(segment_ids=segments, query_positions=positions, key_positions=positions)
    out = pj.attention(QUERY, KEY, VALUE, encoding, is_causal=True, **options)[:, -1]
    close(out, np.stack([expected(encoding, 0, T), expected(encoding, 1, T - 4, start=4)]))


@pytest.mark.thorough
@every_encoding
def test_sequences_that_are_packed_into_a_row_have_their_own_lengths(encoding):
    segments = np.repeat([[7] * 5 + [3] * 7], B, axis=0)
    positions = jnp.asarray([*range(5), *range(7)])
    options = dict(segment_ids=segments, query_positions=positions, key_positions=positions)
    out = pj.attention(QUERY, KEY, VALUE, encoding, is_causal=True, **options)
    close(out[:, 4], np.stack([expected(encoding, row, 5) for row in range(B)]))
    close(out[:, -1], np.stack([expected(encoding, row, 7, start=5) for row in range(B)]))


def test_keys_are_cached_as_given():
    assert [entry.holds for entry in pj.cache_layout(DYNAMIC, DIMS)] == ["raw keys", "values"]
    assert [entry.holds for entry in pj.cache_layout(pj.rope(scaling=pj.yarn_scaling(4.0, 64)), DIMS)] == ["rotated keys", "values"]


def test_what_cannot_follow_the_length_is_refused_by_name():
    with pytest.raises(ValueError, match=r"linear_attention.*got rope\(.*dynamic_ntk_scaling.*changes with the length"):
        pj.linear_attention(QUERY, KEY, VALUE, DYNAMIC, is_causal=True)
    with pytest.raises(ValueError, match=r"cache must be 'transformed' for rope\+cope.*got 'raw'; .* as dynamic_ntk_scaling does"):
        pj.init_cache(pj.chain(DYNAMIC, pj.cope(8, gates="keys")), DIMS, B, max_length=T)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "encoding", [DYNAMIC, LONGROPE, pj.chain(DYNAMIC, pj.cope(8)), pj.chain(pj.log_scale(4), LONGROPE, pj.alibi())]
)
def test_every_rule_holds(encoding):
    check_encoding(encoding)
