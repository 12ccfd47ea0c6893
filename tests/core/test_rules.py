"""The rules that backends keep for encodings, each by a check that fails when the rule is broken on purpose."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import normal

import posjax as pj
from posjax.attention import arguments, dispatch, prefix_sums
from posjax.attention.backends import bias_terms, reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.backends.xla_chunked import forward, query_tile
from posjax.attention.call import prepare
from posjax.core import structures

B, T, N, K, H = 1, 13, 4, 2, 8
QUERY, KEY, VALUE = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H)
CAUSAL = np.tril(np.ones((T, T), bool))
HOLES = CAUSAL & (np.random.default_rng(0).random((T, T)) < 0.6) | np.eye(T, dtype=bool)
tiled = functools.partial(xla_chunked.attention, tile=(5, 4))


def log_gate(x, args):
    return jax.nn.log_sigmoid(x)


def forget(params, inputs):
    return pj.ScoreModifications(biases=(pj.Bias(pj.Scan(log_gate, key=inputs.key[..., :1], include_key=False)),))


def by_head(params, inputs):
    """Turns the channels from the fifth on, by a phase that each key head has of its own."""
    key = 0.2 * jnp.arange(T)[None, :, None, None] * jnp.arange(1.0, K + 1)[:, None]
    key = jnp.broadcast_to(key, (1, T, K, 2))
    return pj.ScoreModifications((pj.Rotate(jnp.repeat(key, N // K, axis=2), key, offset=4),))


def reflect(params, inputs):
    """Moves keys along the directions of the keys after them, halfway to a projection."""
    direction = inputs.key / jnp.linalg.norm(inputs.key, axis=-1, keepdims=True)
    return pj.ScoreModifications((pj.Transport(direction, jnp.full((*direction.shape[:3], 1), 0.5)),))


FORGETTING = pj.encoding("forgetting", attend=forget, needs_causal=True)
TRANSPORTING = pj.encoding("transporting", attend=reflect)
ROTATING = pj.encoding("rotating", attend=by_head)


def attended(scores, visible):
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    value = np.repeat(np.asarray(VALUE, np.float64), N // K, axis=2)
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


def products(query=QUERY, key=KEY):
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    return np.einsum("btnh,bsnh->bnts", query, np.repeat(key, N // K, axis=2)) / math.sqrt(H)


def counted(visible):
    """The sum of log gates over the keys that a row may see, after key j and up to query i."""
    gates = -np.logaddexp(0.0, -np.repeat(np.asarray(KEY[..., 0], np.float64), N // K, axis=2))  # [B, S, N]
    sums = np.zeros((B, N, T, T))
    for i in range(T):
        for j in range(i + 1):
            inside = [l for l in range(j + 1, i + 1) if visible[i, l]]
            sums[:, :, i, j] = gates[:, inside].sum(1)
    return sums


def same(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)


# The rules ----------------------------------------------------------------------------------------------------------


def scans_count_what_the_row_may_see():
    """Also where the mask has holes; a tile in which nothing is visible leaves the sum as it came."""
    call = prepare(QUERY, KEY, VALUE, FORGETTING, {}, mask=jnp.asarray(HOLES)[None, None])
    want = attended(products() + counted(HOLES), HOLES)
    same(reference.attention(call), want)
    same(tiled(call), want)


def prefix_sums_stand_only_where_the_mask_has_no_holes():
    masked = prepare(QUERY, KEY, VALUE, FORGETTING, {}, is_causal=True, mask=jnp.asarray(HOLES)[None, None])
    same(dispatch.run(masked, "xla_chunked"), attended(products() + counted(HOLES), HOLES))
    window = CAUSAL & (np.subtract.outer(np.arange(T), np.arange(T)) <= 5)
    plain = prepare(QUERY, KEY, VALUE, FORGETTING, {}, is_causal=True, local_window_size=(5, 0))
    assert isinstance(prefix_sums.with_prefix_sums(plain).biases[0].at, pj.Pair)
    same(dispatch.run(plain, "xla_chunked"), attended(products() + counted(window), window))


def masks_go_by_order_and_encodings_by_coordinates():
    at = jnp.asarray(np.random.default_rng(1).permutation(T))[:, None]
    call = prepare(QUERY, KEY, VALUE, pj.alibi(0.3), {}, is_causal=True, query_coordinates=at, key_coordinates=at)
    at = np.asarray(at[:, 0], np.float64)
    want = attended(products() - 0.3 * np.abs(np.subtract.outer(at, at)), CAUSAL)
    same(reference.attention(call), want)
    same(tiled(call), want)


def integers_stay_integers_up_to_the_difference():
    at = 2**24 + jnp.arange(T)[:, None]
    call = prepare(QUERY, KEY, VALUE, pj.alibi(0.3), {}, is_causal=True, query_coordinates=at, key_coordinates=at)
    same(tiled(call), attended(products() - 0.3 * np.abs(np.subtract.outer(np.arange(T), np.arange(T))), CAUSAL))


def the_soft_cap_comes_after_biases_and_the_scale_before():
    scores = 0.7 * math.sqrt(H) * products() - 0.3 * np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    want = attended(2.0 * np.tanh(scores / 2.0), CAUSAL)
    call = prepare(QUERY, KEY, VALUE, pj.alibi(0.3), {}, is_causal=True, scale=0.7, logits_soft_cap=2.0)
    same(reference.attention(call), want)
    same(tiled(call), want)


def rotations_have_heads_and_an_offset():
    """Channels from the offset on turn by the phase of their head."""
    phase = 0.2 * np.arange(T)[:, None] * np.arange(1.0, K + 1)

    def turned(x, phase):
        x = np.asarray(x, np.float64)
        pair = (x[..., 4:6] + 1j * x[..., 6:]) * np.exp(1j * phase)[None, :, :, None]
        return np.concatenate([x[..., :4], pair.real, pair.imag], -1)

    want = attended(products(turned(QUERY, np.repeat(phase, N // K, 1)), turned(KEY, phase)), CAUSAL)

    call = prepare(QUERY, KEY, VALUE, ROTATING, {}, is_causal=True)
    same(reference.attention(call), want)


def other_segments_transport_nothing():
    """Keys move along the tokens of their own segment: a segment among others, and padding, is as if it were alone."""
    segments = jnp.asarray([1, 1, 2, 1, 0, 2, 2, 1, 0, 2, 1, 2, 2])[None]
    call = prepare(QUERY, KEY, VALUE, TRANSPORTING, {}, is_causal=True, segment_ids=segments)
    for one in (1, 2):
        own = np.flatnonzero(np.asarray(segments[0]) == one)
        query, key, value = (np.asarray(x, np.float64)[:, own] for x in (QUERY, KEY, VALUE))
        key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
        scores = np.full((B, N, len(own), len(own)), -np.inf)
        for n, i, j in itertools.product(range(N), range(len(own)), range(len(own))):
            moved = key[0, j, n]
            for l in range(j + 1, i + 1):
                w = key[0, l, n] / np.linalg.norm(key[0, l, n])
                moved = moved - 0.5 * w * (w @ moved)
            if j <= i:
                scores[0, n, i, j] = query[0, i, n] @ moved / math.sqrt(H)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
        for attention in (reference.attention, tiled):
            same(attention(call)[:, own], want)


RULES = {
    rule.__name__: rule
    for rule in (
        scans_count_what_the_row_may_see,
        prefix_sums_stand_only_where_the_mask_has_no_holes,
        masks_go_by_order_and_encodings_by_coordinates,
        integers_stay_integers_up_to_the_difference,
        the_soft_cap_comes_after_biases_and_the_scale_before,
        rotations_have_heads_and_an_offset,
        other_segments_transport_nothing,
    )
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_rule_holds(rule):
    rule()


# Broken on purpose --------------------------------------------------------------------------------------------------


def gates_of_hidden_keys(patch):
    plain = bias_terms.scan_gates
    patch.setattr(bias_terms, "scan_gates", lambda scan, tile: plain(scan, dataclasses.replace(tile, allowed=tile.allowed | True)))


def prefix_sums_under_any_mask(patch):
    def replaced(call):
        return call.replace(biases=tuple(prefix_sums._as_pair(bias, call) for bias in call.biases))

    patch.setattr(dispatch, "with_prefix_sums", replaced)


def masks_by_coordinates(patch):
    plain = prepare

    def by_coordinates(*args, **options):
        call = plain(*args, **options)
        return call.replace(query_positions=call.query_coordinates[..., 0], key_positions=call.key_coordinates[..., 0])

    patch.setitem(globals(), "prepare", by_coordinates)


def coordinates_in_float32(patch):
    patch.setattr(
        arguments, "canonicalize_coordinates", lambda name, x, batch, length: x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    )


def cap_before_biases(patch):
    plain = query_tile.tile_scores

    def capped(row, kv_tile, logits, *rest):
        cap = row.plan.soft_cap
        plan = dataclasses.replace(row.plan, soft_cap=None)
        return plain(dataclasses.replace(row, plan=plan), kv_tile, cap * jnp.tanh(logits / cap), *rest)

    patch.setattr(forward, "tile_scores", capped)


def no_offset(patch):
    plain = structures.apply_rotation
    patch.setattr(structures, "apply_rotation", lambda x, phase, pairing, *, gain, offset: plain(x, phase, pairing, gain=gain))


def transport_across_segments(patch):
    plain = reference._transported

    def across(call):
        return plain(call.replace(mask=dataclasses.replace(call.mask, query_segments=None, key_segments=None)))

    patch.setattr(reference, "_transported", across)


BROKEN = {
    "scans_count_what_the_row_may_see": gates_of_hidden_keys,
    "prefix_sums_stand_only_where_the_mask_has_no_holes": prefix_sums_under_any_mask,
    "masks_go_by_order_and_encodings_by_coordinates": masks_by_coordinates,
    "integers_stay_integers_up_to_the_difference": coordinates_in_float32,
    "the_soft_cap_comes_after_biases_and_the_scale_before": cap_before_biases,
    "rotations_have_heads_and_an_offset": no_offset,
    "other_segments_transport_nothing": transport_across_segments,
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_noticed(rule, monkeypatch):
    BROKEN[rule](monkeypatch)
    with pytest.raises(AssertionError):
        RULES[rule]()
