"""Scalings of RoPE's frequencies against closed forms in float64, and the mistakes that are common with each of them."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj
from posjax.encodings.frequencies import SCALINGS, sequence_lengths

R, THETA = 64, 10_000.0
SHORT, LONG = tuple(1.0 + m / 64 for m in range(R // 2)), tuple(1.0 + m for m in range(R // 2))
LONGROPE = pj.longrope_scaling(SHORT, LONG, original_max_length=4096, factor=32.0)
GPT_OSS = pj.yarn_scaling(32.0, 4096, truncate=False)


def base(theta=THETA, width=R):
    return [theta ** (-2 * m / width) for m in range(width // 2)]


def yarn(factor, length, fast=32.0, slow=1.0, truncate=True, theta=THETA, width=R):
    """YaRN, pair by pair."""

    def pair(turns):
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(fast), pair(slow)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramps = [min(max((m - low) / (high - low), 0.0), 1.0) for m in range(width // 2)]
    return [f / factor + (f - f / factor) * (1 - ramp) for f, ramp in zip(base(theta, width), ramps, strict=True)]


def llama3(factor, low, high, length, theta):
    found = []
    for f in base(theta):
        wavelength = 2 * math.pi / f
        t = (length / wavelength - low) / (high - low)
        found.append(f / factor if wavelength > length / low else f if wavelength < length / high else (1 - t) * f / factor + t * f)
    return found


CLOSED_FORMS = [
    (pj.linear_scaling(8.0), THETA, None, [f / 8 for f in base()]),
    (pj.ntk_scaling(8.0), THETA, None, base(THETA * 8.0 ** (R / (R - 2)))),
    (pj.ntk_theta_scaling(8.0), THETA, None, base(THETA * 8.0)),
    (pj.ntk_fixed_scaling(8.0), THETA, None, [f / 8.0 ** (2 * (m + 1) / R) for m, f in enumerate(base())]),
    (
        pj.ntk_fixed_scaling(8.0, mixed_b=0.625),
        THETA,
        None,
        [f * math.exp(-math.log(8.0) * ((m + 1) / (R / 2)) ** 0.625) for m, f in enumerate(base())],
    ),
    (pj.dynamic_ntk_scaling(2.0, 4096), THETA, 4096, base()),
    (pj.dynamic_ntk_scaling(2.0, 4096), THETA, 10_000, base(THETA * (2.0 * 10_000 / 4096 - 1) ** (R / (R - 2)))),
    (pj.yarn_scaling(4.0, 8192), THETA, None, yarn(4.0, 8192)),
    (pj.yarn_scaling(4.0, 8192, beta_fast=16.0, beta_slow=2.0), THETA, None, yarn(4.0, 8192, 16.0, 2.0)),
    (GPT_OSS, 150_000.0, None, yarn(32.0, 4096, truncate=False, theta=150_000.0)),
    (pj.yarn_scaling(4.0, 8192), 100.0, None, yarn(4.0, 8192, theta=100.0)),  # high is above R / 2 - 1, below R - 1
    (pj.yarn_scaling(4.0, 6), THETA, None, yarn(4.0, 6)),  # low and high are both 0
    (pj.llama3_scaling(), 500_000.0, None, llama3(8.0, 1.0, 4.0, 8192, 500_000.0)),
    (pj.llama3_scaling(32.0, 0.125, 0.5, 1024), 500_000.0, None, llama3(32.0, 0.125, 0.5, 1024, 500_000.0)),
    (LONGROPE, THETA, 4096, [f / s for f, s in zip(base(), SHORT, strict=True)]),
    (LONGROPE, THETA, 4097, [f / s for f, s in zip(base(), LONG, strict=True)]),
    (pj.proportional_scaling(0.25), 1e6, None, base(1e6)[:8] + [0.0] * 24),
    (pj.proportional_scaling(0.3, factor=2.0), 1e6, None, [f / 2 for f in base(1e6)[:9]] + [0.0] * 23),
]


@pytest.mark.parametrize(("scaling", "theta", "length", "want"), CLOSED_FORMS, ids=[repr(case[0])[:60] for case in CLOSED_FORMS])
def test_frequencies_equal_the_closed_form(scaling, theta, length, want):
    got = scaling.frequencies(theta, R, length)
    assert got.dtype == np.float64 and got.shape == (R // 2,)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)


def test_a_traced_theta_gives_the_same_frequencies():
    """In float32; a program serves every theta, as in a sweep."""
    for scaling, theta, _, _ in CLOSED_FORMS:
        got = jax.eval_shape(lambda theta, scaling=scaling: scaling.frequencies(theta, R), theta)
        assert got.dtype == jnp.float32
    made = [scaling for scaling, theta, _, _ in CLOSED_FORMS if theta == THETA]
    got = jax.jit(lambda theta: [scaling.frequencies(theta, R) for scaling in made])(THETA)
    for scaling, frequencies in zip(made, got, strict=True):
        np.testing.assert_allclose(frequencies, scaling.frequencies(THETA, R), rtol=1e-6, atol=1e-12)


def test_scalings_are_values():
    for scaling, *_ in CLOSED_FORMS:
        again = type(scaling)(**{field.name: getattr(scaling, field.name) for field in dataclasses.fields(scaling)})
        assert again == scaling and hash(again) == hash(scaling) and pickle.loads(pickle.dumps(scaling)) == scaling
        assert eval(repr(scaling), dict(SCALINGS)) == scaling
        assert jax.tree.leaves(pj.rope(scaling=scaling)) == [] and pj.rope(scaling=scaling) == pj.rope(scaling=again)
    assert pj.linear_scaling(4) == pj.linear_scaling(4.0) != pj.linear_scaling(2.0)


# Common mistakes -----------------------------------------------------------------------------------------------------


def test_three_ntk_scalings_have_different_frequencies():
    """NTK: three formulas with one name, up to 7 % apart at s = 8."""
    one, two, three = (make(8.0).frequencies(THETA, R) for make in (pj.ntk_scaling, pj.ntk_theta_scaling, pj.ntk_fixed_scaling))
    for a, b in ((one, two), (one, three), (two, three)):
        assert 0.06 < np.abs(a / b - 1).max() < 0.07
    assert one[0] == two[0] == 1.0 and three[0] < 0.94
    slowest = THETA ** (-(R - 2) / R) / 8
    np.testing.assert_allclose((one[-1], three[-1]), slowest)


def test_dynamic_ntk_moves_all_keys_with_every_token():
    """Dynamic NTK: a key at 8,000 turns by more than 0.05 rad for one more token, so rotated keys must not be cached."""
    scaling = pj.dynamic_ntk_scaling(4.0, 4096)
    before, after = (8000 * scaling.frequencies(THETA, 128, length) for length in (8001, 8002))
    assert 0.05 < np.abs(after - before).max() < 0.06
    assert pj.rope(scaling=scaling).cache == "raw" and pj.rope(scaling=GPT_OSS).cache == "transformed"


def test_dynamic_ntk_is_unchanged_up_to_the_original_length():
    scaling = pj.dynamic_ntk_scaling(4.0, 8192)
    for length in (None, 1, 8192):
        np.testing.assert_allclose(scaling.frequencies(THETA, R, length), base(), rtol=1e-14)


def test_truncation_of_yarn_matters():
    """YaRN: gpt-oss has truncate False; frequencies are up to 76 % apart."""
    rounded = dataclasses.replace(GPT_OSS, truncate=True)
    ratio = GPT_OSS.frequencies(150_000.0, R) / rounded.frequencies(150_000.0, R)
    assert 0.75 < np.abs(np.concatenate([ratio, 1 / ratio]) - 1).max() < 0.77


def test_an_attention_factor_replaces_yarns_own():
    """YaRN: 0.1 ln s + 1 is only the default; both mscales give a fraction, one alone or a zero gives the default."""
    default = 0.1 * math.log(40.0) + 1
    both = (0.1 * 0.707 * math.log(40.0) + 1) / (0.1 * 1.0 * math.log(40.0) + 1)
    for own, want in (
        ({}, default),
        ({"attention_factor": 0.8, "mscale": 0.707, "mscale_all_dim": 1.0}, 0.8),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, both),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707}, default),
        ({"mscale": 0.707, "mscale_all_dim": 0.0}, default),
    ):
        assert math.isclose(pj.yarn_scaling(40.0, 4096, **own).gain(), want, rel_tol=1e-15)
    assert pj.yarn_scaling(1.0, 4096).gain() == 1.0


def rotations(encoding, width=16, length=3):
    """The encoding's Rotate on a call of that size."""
    x, tokens = jnp.ones((1, length, 2, width)), pj.Tokens.at(jnp.arange(length))
    (rotate,) = encoding.attend({}, pj.AttentionInputs(x, x, x, tokens, tokens, 1.0)).transforms
    return rotate, x


def test_the_attention_factor_multiplies_rotated_queries_and_keys():
    """YaRN: scores of rotated channels get its square, others nothing."""
    encoding = pj.rope(fraction=0.5, scaling=pj.yarn_scaling(8.0, 64, attention_factor=1.5))
    rotate, x = rotations(encoding)
    query, key = rotate.applied(x, x)
    products = (query * key)[0, 0, 0]  # at position 0, where nothing turns
    np.testing.assert_allclose(products, [2.25] * 8 + [1.0] * 8)


def test_betas_of_yarn_are_not_exchanged():
    """YaRN: the fast beta is the larger one; equal ones (Kimi K2) are allowed."""
    with pytest.raises(ValueError, match=r"beta_fast must be at least beta_slow=32.0, got 1.0; 32 and 1 are usual"):
        pj.yarn_scaling(4.0, 2048, beta_fast=1.0, beta_slow=32.0)
    got = pj.yarn_scaling(32.0, 4096, beta_fast=1.0).frequencies(50_000.0, R)
    np.testing.assert_allclose(got, yarn(32.0, 4096, 1.0, 1.0, theta=50_000.0), rtol=1e-13)


def test_llama_3_without_a_ramp():
    """Llama 4 Scout has equal factors: a step from f to f / s."""
    frequencies = np.asarray(base(500_000.0))
    want = np.where(2 * np.pi / frequencies > 8192, frequencies / 16, frequencies)
    np.testing.assert_allclose(pj.llama3_scaling(16.0, 1.0, 1.0).frequencies(500_000.0, R), want, rtol=1e-13)


def test_the_original_length_of_longrope_is_short():
    """LongRoPE: a sequence of exactly L tokens has the short list; the attention factor holds at all lengths."""
    tokens = [pj.Tokens.at(jnp.asarray([[0, last]])) for last in (4095, 4096)]
    for sequence, list_of, length in zip(tokens, (SHORT, LONG), (4096, 4097), strict=True):
        lengths, _ = sequence_lengths(sequence, sequence)
        assert lengths.tolist() == [[length]]
        phase, gain = LONGROPE.rotation(THETA, R, sequence.order, lengths)
        want = (length - 1) * np.asarray(base()) / np.asarray(list_of)
        np.testing.assert_allclose(np.cos(phase[0, 1]), np.cos(want), atol=3e-6)  # exact in either list
        np.testing.assert_allclose(gain, math.sqrt(1 + math.log(32.0) / math.log(4096)), rtol=1e-6)


def test_longrope_may_be_fixed_to_a_list():
    for use, list_of in (("short", SHORT), ("long", LONG)):
        scaling = dataclasses.replace(LONGROPE, use=use)
        assert pj.rope(scaling=scaling).cache == "transformed" and pj.rope(scaling=LONGROPE).cache == "raw"
        for length in (None, 10, 10_000):
            np.testing.assert_allclose(scaling.frequencies(THETA, R, length), np.asarray(base()) / list_of)
    pair = dataclasses.replace(LONGROPE, attention_factor=(1.24, 1.25))
    assert (pair.gain(4096), pair.gain(4097)) == (1.24, 1.25)


def test_proportional_is_not_partial():
    """p-RoPE: exponents are of the whole head and pairs are H / 2 apart, so attention differs from that of partial rotation."""
    proportional = pj.rope(theta=1e6, scaling=pj.proportional_scaling(0.25))
    partial = pj.rope(theta=1e6, fraction=0.25)
    x = np.arange(16.0) + 1
    for encoding, moved in ((proportional, [0, 1, 8, 9]), (partial, [0, 1, 2, 3])):
        rotate, ones = rotations(encoding)
        turned, _ = rotate.applied(ones * x, ones * x)
        assert np.flatnonzero(np.abs(np.asarray(turned[0, 2, 0]) - x) > 1e-3).tolist() == moved
    with pytest.raises(ValueError, match=r"fraction must be 1.0 with proportional_scaling\(fraction=0.25\), .*, got 0.5"):
        pj.rope(fraction=0.5, scaling=pj.proportional_scaling(0.25))


def test_the_last_channels_of_a_head_may_be_rotated():
    """Multi-head latent attention rotates its separate part, which is the last; the first R channels are another model."""
    rotate, x = rotations(pj.rope(fraction=0.25, channels="last", pairing="interleaved"))
    query, _ = rotate.applied(x, x)
    np.testing.assert_array_equal(query[0, :, :, :12], 1.0)
    first, angle = np.asarray(query[0, 1, 0, 12:]), 1.0
    np.testing.assert_allclose(first[:2], [math.cos(angle) - math.sin(angle), math.cos(angle) + math.sin(angle)], rtol=1e-6)


def test_positions_up_to_a_million_are_exact():
    positions = jnp.asarray([[1_000_000]])
    for scaling in (pj.linear_scaling(8.0), GPT_OSS, pj.llama3_scaling(), dataclasses.replace(LONGROPE, use="long")):
        phase, _ = scaling.rotation(THETA, R, positions, None)
        want = 1_000_000 * scaling.frequencies(THETA, R)
        np.testing.assert_allclose(np.exp(1j * np.asarray(phase[0, 0], np.float64)), np.exp(1j * want), atol=3e-6)


def test_phases_of_dynamic_ntk_are_float32_products_past_the_original_length():
    scaling, length = pj.dynamic_ntk_scaling(4.0, 4096), 10_000
    phase, _ = scaling.rotation(THETA, R, jnp.asarray([[4095, 9999]]), jnp.asarray([[length]]))
    want = np.asarray([[4095], [9999]]) * scaling.frequencies(THETA, R, length)
    np.testing.assert_allclose(phase[0], want, rtol=2.5e-7)


WRONG = [
    (lambda: pj.linear_scaling(0.5), r"factor must be at least 1, got 0.5"),
    (lambda: pj.linear_scaling("4"), r"factor must be a number .*got '4'"),
    (lambda: pj.ntk_fixed_scaling(2.0, mixed_b=0.0), r"mixed_b must be positive.*got 0.0"),
    (lambda: pj.dynamic_ntk_scaling(2.0, 0), r"original_max_length must be .*at least 1, got 0"),
    (lambda: pj.dynamic_ntk_scaling(2.0, 4096.5), r"original_max_length must be an integer.*got 4096.5"),
    (lambda: pj.yarn_scaling(2.0, 64, attention_factor=0.0), r"attention_factor must be positive, got 0.0"),
    (lambda: pj.yarn_scaling(2.0, 64, truncate=1), r"truncate must be True or False, got 1"),
    (lambda: pj.yarn_scaling(2.0, 64).frequencies(1.0, R), r"theta must be above 1 for yarn_scaling, got 1.0"),
    (lambda: pj.llama3_scaling(8.0, 4.0, 1.0), r"high_freq_factor must be at least low_freq_factor=4.0, got 1.0"),
    (lambda: pj.longrope_scaling((), LONG, 64), r"short_factor and long_factor must have .*got 0 and 32"),
    (lambda: pj.longrope_scaling((1.0, -1.0), LONG, 64), r"short_factor must be .*positive.*, got \(1.0, -1.0\)"),
    (lambda: pj.longrope_scaling(SHORT, LONG, 64, use="both"), r"use must be .*'short'.*'long' or None, got 'both'"),
    (lambda: pj.longrope_scaling(SHORT, LONG, 64, attention_factor=(1.0,)), r"attention_factor must be one number, or a pair"),
    (lambda: LONGROPE.frequencies(THETA, 32), r"short_factor must have a number for each of the 16 pairs .*, got 32 numbers"),
    (lambda: pj.proportional_scaling(1.5), r"fraction must lie .*got 1.5"),
    (lambda: pj.proportional_scaling(0.01).frequencies(THETA, R), r"fraction of proportional_scaling must leave a pair .*got 0.01"),
    (lambda: pj.ntk_scaling(2.0).frequencies(THETA, 2), r"ntk_scaling needs at least 4 rotated channels, got 2"),
    (lambda: pj.rope(scaling=pj.llama3_scaling), r"scaling must be a scaling .*got the class Llama3Scaling; call it"),
    (lambda: pj.rope(scaling="yarn"), r"scaling must be a scaling such as linear_scaling\(4.0\), or None, got 'yarn'"),
    (lambda: pj.rope(channels="middle"), r"channels must be 'first' or 'last', got 'middle'"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
