"""Rotations by several coordinates, xPos, PoPE and query scales, against closed forms in float64, written out pair by pair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import close, normal

import posjax as pj
from posjax.attention.backends.shards import infer_shard_spec
from posjax.attention.backends.tpu.attention import to_operands
from posjax.attention.backends.tpu.blocks import CHIPS, Blocks
from posjax.attention.call import prepare

B, T, N, K = 2, 6, 2, 1
FAR = 1_000_000
thorough = pytest.mark.thorough


def transformed(encoding, query, key, at, params=None, key_at=None):
    """Query and key after the transforms of an encoding, at coordinates [B or 1, T, A]."""
    order = jnp.arange(query.shape[1])[None]
    sides = [pj.Tokens(order, jnp.asarray(x)) for x in (at, at if key_at is None else key_at)]
    inputs = pj.AttentionInputs(query, key, key, *sides, 1.0)
    for transform in encoding.attend(params or {}, inputs).transforms:
        query, key = transform.applied(query, key)
    return query, key


def rotated(x, at, pairs):
    """Rotates x [B, T, N, H] in float64; ``pairs`` lists (first channel, second, axis, frequency)."""
    x, at = np.asarray(x, np.float64), np.asarray(at, np.float64)
    out = x.copy()
    for a, b, axis, frequency in pairs:
        phase = (at[..., axis] * frequency)[..., None]
        out[..., a] = x[..., a] * np.cos(phase) - x[..., b] * np.sin(phase)
        out[..., b] = x[..., a] * np.sin(phase) + x[..., b] * np.cos(phase)
    return out


def far(axes, kind="integers"):
    at = np.random.default_rng(axes).integers(0, FAR, (B, T, axes))
    return at.astype(np.int32) if kind == "integers" else (at / 16 + np.float32(0.3)).astype(np.float32)


def channels(m, pairing, width, start=0):
    """The two channels of pair m."""
    return (start + m, start + m + width // 2) if pairing == "half" else (start + 2 * m, start + 2 * m + 1)


def agrees(encoding, pairs, at, head_dim):
    query, key = normal(1, B, T, N, head_dim), normal(2, B, T, K, head_dim)
    for got, x in zip(transformed(encoding, query, key, at), (query, key), strict=True):
        close(got, rotated(x, at, pairs), atol=1e-5)


# M-RoPE ------------------------------------------------------------------------------------------------------------------------

MROPE = {  # the axis of each of 12 pairs, as each model's code assigns it
    ("blocks", (3, 4, 5)): [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2],
    ("interleaved", (6, 3, 3)): [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0],
    ("interleaved", (4, 4, 4)): [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
    ("alternating", (4, 4, 4)): [1, 2, 1, 2, 1, 2, 1, 2, 0, 0, 0, 0],
}


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("layout", "sections"), MROPE, ids=lambda x: str(x))
def test_mrope_layouts_to_a_million_positions(layout, sections, pairing):
    """Pair m of the 24 rotated channels of 28 turns by its axis times 1e6^(-m/12)."""
    encoding = pj.mrope(sections, layout, theta=1e6, fraction=24 / 28, pairing=pairing)
    pairs = [(*channels(m, pairing, 24), axis, 1e6 ** (-m / 12)) for m, axis in enumerate(MROPE[layout, sections])]
    agrees(encoding, pairs, far(3), 28)


def test_trap_mrope_layouts_are_equal_on_text_and_differ_on_images():
    query = normal(1, 1, T, N, 24)
    text = np.repeat(np.arange(T, dtype=np.int32)[None, :, None], 3, axis=2)
    image, _ = pj.mrope_positions([1, (1, 2, 2), 1], merge_size=1)
    layouts = [pj.mrope((4, 4, 4), layout) for layout in ("blocks", "interleaved", "alternating")]
    (plain, _) = transformed(pj.rope(), query, query, text)
    on_text = [transformed(encoding, query, query, text)[0] for encoding in layouts]
    on_image = [transformed(encoding, query, query, image[None])[0] for encoding in layouts]
    for one in on_text:
        close(one, plain, atol=1e-6)
    for a in range(3):
        for b in range(a):
            assert float(jnp.abs(on_image[a] - on_image[b]).max()) > 0.1


def test_mrope_without_coordinates_equals_rope():
    query, key = normal(1, B, T, N, 24), normal(2, B, T, K, 24)
    got = pj.attention(query, key, key, pj.mrope((2, 5, 5), "alternating"), {}, is_causal=True)
    close(got, pj.attention(query, key, key, pj.rope(), {}, is_causal=True), atol=1e-6)


def test_trap_mrope_text_continues_after_the_largest_coordinate_of_a_video():
    """Text after an 8-frame 4 x 4 video that starts at 3 restarts at 11 by Qwen2-VL's rule; transformers 5.24 says 5."""
    coordinates, offset = pj.mrope_positions([3, (8, 4, 4), 2])
    assert coordinates[:3].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert coordinates[3:7].tolist() == [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4]]
    assert coordinates[34].tolist() == [10, 4, 4]
    assert coordinates[35:].tolist() == [[11] * 3, [12] * 3]
    assert len(coordinates) == 37 and offset == 13 - 37 and coordinates.dtype == np.int32


def test_mrope_positions_of_images_and_of_seconds():
    """An image wider than high is left by its width; Qwen2.5-VL's time steps are floor(frame * seconds * tokens per second)."""
    image, _ = pj.mrope_positions([(1, 2, 6), 1], merge_size=2)
    assert image.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [3, 3, 3]]
    video, offset = pj.mrope_positions([1, (4, 2, 2, 0.7), 1], tokens_per_second=2.0)
    assert video.tolist() == [[0, 0, 0], [1, 1, 1], [2, 1, 1], [3, 1, 1], [5, 1, 1], [6, 6, 6]] and offset == 1
    assert pj.mrope_positions([0, 2])[0].tolist() == [[0] * 3, [1] * 3]


# Axial -------------------------------------------------------------------------------------------------------------------------


def ladder(width, theta):
    return [theta ** (-2 * m / width) for m in range(width // 2)]


@pytest.mark.parametrize(
    ("pairing", "kind"),
    [
        ("half", "fractions"),
        pytest.param("half", "integers", marks=thorough),
        pytest.param("interleaved", "fractions", marks=thorough),
        pytest.param("interleaved", "integers", marks=thorough),
    ],
)
def test_axial_layouts_to_a_million_positions(pairing, kind):
    """24 channels; y has axis 0, x axis 1."""
    at = far(2, kind)
    shared = [(*channels(6 * axis + m, pairing, 24), axis, f) for axis in (0, 1) for m, f in enumerate(ladder(12, 100.0))]
    agrees(pj.axial_rope(theta=100.0, pairing=pairing), shared, at, 24)
    split = [(*channels(6 * (n % 2) + n // 2, pairing, 24), n % 2, f) for n, f in enumerate(ladder(24, 100.0))]
    agrees(pj.axial_rope(theta=100.0, layout="split", pairing=pairing), split, at, 24)
    blocks = [(*channels(m, pairing, 12, 12 * axis), axis, f) for axis in (0, 1) for m, f in enumerate(ladder(12, 100.0))]
    agrees(pj.axial_rope(theta=100.0, layout="blocks", pairing=pairing), blocks, at, 24)
    widths = [
        (*channels(m, pairing, n, start), axis, f)
        for axis, n, start in ((0, 4, 0), (1, 14, 4))
        for m, f in enumerate(ladder(n, 50.0))
    ]
    agrees(pj.axial_rope(theta=50.0, layout="widths", widths=(4, 14), pairing=pairing), widths, at, 24)


@pytest.mark.parametrize("axes", [3, 4])
def test_axial_of_volumes(axes):
    pairs = [(*channels(3 * axis + m, "half", 6 * axes), axis, f) for axis in range(axes) for m, f in enumerate(ladder(6, 1e4))]
    agrees(pj.axial_rope(axes=axes), pairs, far(axes), 6 * axes)


def test_trap_axial_pairings_and_orders_differ():
    """Shared and blocks differ only in the half pairing, which scores do not forgive; x first is another encoding than y first."""
    at, query = far(2), normal(1, B, T, N, 24)

    def of(**options):
        return transformed(pj.axial_rope(**options), query, query, at)[0]

    close(of(pairing="interleaved"), of(pairing="interleaved", layout="blocks"), atol=1e-6)
    assert float(jnp.abs(of() - of(layout="blocks")).max()) > 0.1
    assert float(jnp.abs(of() - of(order=(1, 0))).max()) > 0.1
    pairs = [
        (*channels(6 * place + m, "half", 24), axis, f) for place, axis in ((0, 1), (1, 0)) for m, f in enumerate(ladder(12, 1e4))
    ]
    agrees(pj.axial_rope(order=(1, 0)), pairs, at, 24)


def test_axial_does_not_rotate_cls_and_registers():
    query = normal(1, 1, 2 + 4, N, 24)
    at = pj.axial_coordinates((2, 2), num_prefix_tokens=2)
    assert at.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    encoding = pj.axial_rope(num_prefix_tokens=2)
    tokens = pj.Tokens.at(jnp.arange(6), coordinates=jnp.asarray(at[None] + 7))
    for key in (None, jax.random.key(0)):  # the augmentation of training leaves them alone, too
        placed = pj.axial_rope(num_prefix_tokens=2, shift=0.5, rescale=2.0).place(tokens, key)
        np.testing.assert_array_equal(transformed(encoding, query, query, placed)[0][:, :2], query[:, :2])
    got, _ = transformed(encoding, query, query, encoding.place(tokens))
    pairs = [(*channels(6 * axis + m, "half", 24), axis, f) for axis in (0, 1) for m, f in enumerate(ladder(12, 1e4))]
    close(got[:, 2:], rotated(query[:, 2:], at[None, 2:] + 7, pairs), atol=1e-5)


def test_dinov3_coordinates_by_each_normalization():
    rows, columns = 2 * (np.arange(2) + 0.5), 2 * (np.arange(4) + 0.5)
    for normalize, sizes in {"separate": (2, 4), "min": (2, 2), "max": (4, 4)}.items():
        want = [[r / sizes[0] - 1, c / sizes[1] - 1] for r in rows for c in columns]
        close(pj.axial_coordinates((2, 4), normalize=normalize), want, atol=1e-7)
    close(pj.axial_coordinates((2, 4), pretrained=(16, 16))[-1], [8.0, 12.0])  # EVA: onto the grid of pretraining


def test_trap_dinov3_is_augmented_once_per_call():
    """Both images of a batch move alike; the bounds are those of the configuration, and evaluation draws nothing."""
    encoding = pj.axial_rope(theta=100.0, scale=2 * math.pi, shift=0.1, jitter=1.05, rescale=2.0)
    at = jnp.asarray(pj.axial_coordinates((2, 3), normalize="separate"))[None].repeat(2, axis=0)
    tokens = pj.Tokens.at(jnp.arange(6), coordinates=at)
    assert encoding.place(tokens) is at
    moved = jnp.stack([encoding.place(tokens, jax.random.key(n)) for n in range(200)])
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    y, x = (moved[:, 0, a, axis] - moved[:, 0, b, axis] for axis, (a, b) in enumerate(((3, 0), (1, 0))))
    y, x = y / (at[0, 3, 0] - at[0, 0, 0]), x / (at[0, 1, 1] - at[0, 0, 1])  # the factors of both axes
    assert 1 / 1.05**2 - 1e-5 < float((y / x).min()) < 0.94 and 1.06 < float((y / x).max()) < 1.05**2 + 1e-5
    assert 0.47 < float(y.min()) < 0.6 and 1.7 < float(y.max()) < 2.1
    centre = moved[:, 0].mean(1) / jnp.stack([y, x], -1)
    assert 0.09 < float(jnp.abs(centre).max()) < 0.1 + 1e-5
    pairs = [
        (*channels(3 * axis + m, "half", 12), axis, 2 * math.pi * f) for axis in (0, 1) for m, f in enumerate(ladder(6, 100.0))
    ]
    agrees(encoding, pairs, np.asarray(far(2, "fractions") / FAR, np.float32), 12)


def test_trap_rope_mixed_has_frequencies_of_each_head_and_starts_with_right_angles():
    dims = pj.Dims(N, 8, num_kv_heads=N)
    frequencies = np.asarray(pj.rope_mixed().init(jax.random.key(3), dims)["frequencies"], np.float64)
    assert frequencies.shape == (2, N, 4)
    close(np.hypot(*frequencies), np.tile([1.0, 10**-0.5], 2)[None].repeat(N, 0), atol=1e-6)
    close((frequencies[..., :2] * frequencies[..., 2:]).sum(0), np.zeros((N, 2)), atol=1e-6)  # the second half at right angles
    angles = np.arctan2(frequencies[0], frequencies[1])
    close(angles[:, 0], angles[:, 1], atol=1e-6)
    assert abs(angles[0, 0] - angles[1, 0]) > 0.01
    assert pj.rope_mixed().per_layer is True


def mixed_operands():
    frequencies = jnp.asarray(np.random.default_rng(5).uniform(-2, 2, (2, 2, 4)), jnp.float32)
    return far(2), normal(1, B, T, 4, 8), normal(2, B, T, 2, 8), frequencies


def test_rope_mixed_to_a_million_positions_with_key_heads():
    at, query, key, frequencies = mixed_operands()
    got = transformed(pj.rope_mixed(), query, key, at, {"frequencies": frequencies})
    for x, of_heads, here in ((query, [0, 0, 1, 1], got[0]), (key, [0, 1], got[1])):
        for head, of_head in enumerate(of_heads):
            f = np.asarray(frequencies, np.float64)[:, of_head]
            phase = at.astype(np.float64) @ f
            pair = np.asarray(x, np.float64)[:, :, head, 0::2] + 1j * np.asarray(x, np.float64)[:, :, head, 1::2]
            want = pair * np.exp(1j * phase)
            close(here[:, :, head], np.stack([want.real, want.imag], -1).reshape(B, T, 8), atol=1e-5)


@thorough
def test_rope_mixed_learns_its_frequencies():
    at, query, key, frequencies = mixed_operands()

    def loss(f):
        return (transformed(pj.rope_mixed(), query, key, at % 5, {"frequencies": f})[0] * normal(3, B, T, 4, 8)).sum()

    gradient = jax.grad(loss)(frequencies)
    step = jnp.zeros_like(frequencies).at[1, 0, 2].set(1e-2)
    close(
        gradient[1, 0, 2],
        (loss(frequencies + step) - loss(frequencies - step)) / 2e-2,
        atol=2e-2 * float(jnp.abs(gradient[1, 0, 2])) + 1e-3,
    )


# xPos --------------------------------------------------------------------------------------------------------------------------


def xpos_scores(query, key, at, base=512.0, gamma=0.4):
    head_dim = query.shape[-1]
    zeta = (np.arange(0, head_dim, 2) / head_dim + gamma) / (1 + gamma)
    q, k = (np.asarray(x, np.float64)[:, :, 0, 0::2] + 1j * np.asarray(x, np.float64)[:, :, 0, 1::2] for x in (query, key))
    distance = at[:, None].astype(np.float64) - at[None]
    turn = np.exp(1j * distance[..., None] * 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim))
    return np.einsum("btm,bsm,tsm->bts", q, k.conj(), turn * zeta ** (distance[..., None] / base)).real


@pytest.mark.parametrize(
    ("base", "centre", "positions"),
    [
        (512.0, 0, [0, 3, 500, 28_000, 28_300]),
        (512.0, 28_000, [0, 5, 300, 56_000, 56_200]),
        (32768.0, 0, [0, 7, 999_000, 1_000_000]),
    ],
)
def test_xpos_products_to_the_end_of_its_reach(base, centre, positions):
    at = np.array(positions)
    query, key = normal(1, 1, len(at), 1, 16), normal(2, 1, len(at), 1, 16)
    q, k = transformed(pj.xpos(base, centre=centre), query, key, at[None, :, None])
    got = np.tril(np.einsum("btnh,bsnh->bts", np.asarray(q, np.float64), np.asarray(k, np.float64)))
    close(got, np.tril(xpos_scores(query, key, at, base)), atol=1e-5)


def test_trap_xpos_has_one_centre_for_query_and_cached_keys():
    """A key cached at 3 meets a query at 503 with zeta^(500/512); half the current length as the centre gives 1.84 times that."""
    ones = jnp.ones((1, 1, 1, 2))
    _, cached = transformed(pj.xpos(), ones, ones, np.array([[[3]]]))
    query, _ = transformed(pj.xpos(), ones, ones, np.array([[[503]]]))
    distance, zeta = 500, 0.4 / 1.4
    got = float((query[0, 0, 0] * cached[0, 0, 0]).sum())
    assert got == pytest.approx(2 * zeta ** (distance / 512) * math.cos(distance), rel=1e-5)
    assert zeta ** (-((504 // 2) - (4 // 2)) / 512) == pytest.approx(1.84, abs=0.01)


def test_xpos_out_of_reach_is_refused_or_nan():
    query = normal(1, 1, 2, 1, 16)
    with pytest.raises(
        ValueError, match=r"positions must be within 28328 of centre=0 for xpos in float32, got one at .* of 28329; .*scale_base"
    ):
        transformed(pj.xpos(), query, query, np.array([[[0], [28_329]]]))
    with pytest.raises(ValueError, match=r"within 1133 .* float16"):
        transformed(pj.xpos(), query.astype(jnp.float16), query.astype(jnp.float16), np.array([[[0], [1134]]]))
    got = jax.jit(lambda at: transformed(pj.xpos(), query, query, at)[0])(np.array([[[28_328], [28_329]]]))
    assert np.isfinite(got[0, 0]).all() and np.isnan(got[0, 1]).any()


# PoPE --------------------------------------------------------------------------------------------------------------------------


def test_trap_pope_scale_and_heads_of_delta():
    """The scale stays 1 / sqrt(H) though q, k are 2 H wide; delta by query head meets one cached key of 2 H channels."""
    head_dim, length = 8, 5
    query, key, value = normal(1, 1, length, 4, head_dim), normal(2, 1, length, 2, head_dim), normal(3, 1, length, 2, head_dim)
    delta = jnp.asarray(np.random.default_rng(2).uniform(-7.0, 1.0, (4, head_dim)), jnp.float32)
    positions = np.array([0, 1, 2, 999_998, 1_000_000])
    q, k = (np.log1p(np.exp(np.asarray(x, np.float64))) for x in (query, np.repeat(key, 2, axis=2)))
    clipped = np.clip(np.asarray(delta, np.float64), -2 * np.pi, 0)
    phase = (positions[None] - positions[:, None])[:, :, None] * 10_000.0 ** (-np.arange(head_dim) / head_dim)
    turn = np.cos(phase[None, None] + clipped[None, :, None, None])
    scores = np.einsum("btnh,bsnh,bntsh->bnts", q, k, turn) / np.sqrt(head_dim)
    weights = np.where(np.tril(np.ones((length, length), bool)), np.exp(scores - scores.max(-1, keepdims=True)), 0)
    want = np.einsum(
        "bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), np.repeat(np.asarray(value, np.float64), 2, axis=2)
    )
    at = dict(query_positions=positions, key_positions=positions)
    close(pj.attention(query, key, value, pj.pope(), {"delta": delta}, is_causal=True, **at), want, atol=1e-5)
    shapes = {entry.name: entry.shape for entry in pj.cache_layout(pj.pope(), pj.Dims(4, head_dim, num_kv_heads=2))}
    assert shapes["key"] == (2, 2 * head_dim)


@thorough
def test_pope_learns_from_its_first_delta_and_stops_beyond_the_bounds():
    query, at = normal(1, 1, T, 1, 8), np.arange(T)[None, :, None]

    def loss(delta):
        return (transformed(pj.pope(), query, query, at, {"delta": delta})[0] * normal(2, 1, T, 1, 16)).sum()

    at_zero = jax.grad(loss)(jnp.zeros((1, 8)))
    step = jnp.zeros((1, 8)).at[0, 2].set(-1e-2)
    close(at_zero[0, 2], (loss(step) - loss(0 * step)) / -1e-2, atol=5e-3)
    assert (jax.grad(loss)(jnp.full((1, 8), 0.1)) == 0).all() and (jnp.abs(at_zero) > 1e-4).any()


# Query scales ------------------------------------------------------------------------------------------------------------------


def test_trap_position_scales_differ_by_one_position_and_by_the_floor():
    at = np.array([0, 8190, 8191, 8192, 12_288, 16_383, FAR])
    rules = {
        "llama4": 1 + 0.1 * np.log(1 + np.floor((at + 1) / 8192)),
        "ministral3": 1 + 0.1 * np.log(1 + np.floor(at / 8192)),
        "inkling": 1 + 0.1 * np.log(np.maximum((at + 1) / 8192, 1)),
    }
    for rule, want in rules.items():
        query, key = jnp.ones((1, len(at), 1, 2)), normal(1, 1, len(at), 1, 2)
        q, k = transformed(pj.log_scale(8192, 0.1, rule), query, key, at[None, :, None])
        close(q[0, :, 0, 0], want, atol=1e-6)
        assert k is key
    assert rules["llama4"][2] > rules["ministral3"][2] == 1.0 and 1.0 < rules["inkling"][4] < rules["ministral3"][4]


# Kernels and decoding ----------------------------------------------------------------------------------------------------------

RELATIVES = {
    "mrope": pj.mrope((4, 4, 4), "interleaved"),
    "axial blocks": pj.axial_rope(layout="blocks", num_prefix_tokens=1),
    "axial widths": pj.axial_rope(axes=3, layout="widths", widths=(4, 8, 10), pairing="interleaved"),
    "xpos": pj.xpos(),
    "log_scale + rope": pj.chain(pj.log_scale(3), pj.rope()),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_rotations_of_each_row_stay_in_the_tpu_kernel(name):
    """Phases [B, T, 1, R / 2] and gains are cosines and sines that the kernel applies to its tiles; nothing is rotated before."""
    encoding = RELATIVES[name]
    query, key = (jax.ShapeDtypeStruct((B, 256, n, 24), jnp.float32) for n in (N, K))
    at = jax.ShapeDtypeStruct((B, 256, encoding.axes), jnp.int32)
    plans = []

    def prepared(query, key, at):
        call = prepare(query, key, key, encoding, {}, is_causal=True, query_coordinates=at, key_coordinates=at)
        plan, operands = to_operands(call, Blocks(128, 128, 128, 256), CHIPS["v6e"], infer_shard_spec(call.query))
        plans.append(plan)
        return operands

    operands = jax.eval_shape(prepared, query, key, at)
    assert operands.query_cos_sin.shape == operands.key_cos_sin.shape == (B, 2, 256, 24) and plans[0].rotates_keys


def conversation():
    """Coordinates of two rows: an image, a video and text, the second left-padded by two tokens; and the text that follows."""
    parts = [[2, (1, 2, 3), 2], [1, (5, 1, 1), 2]]
    coordinates, offsets = zip(*(pj.mrope_positions(row, merge_size=1) for row in parts), strict=True)
    padded = np.concatenate([np.zeros((2, 3), np.int32), coordinates[1]])
    at = np.stack([coordinates[0], padded])
    segments = np.ones(at.shape[:2], np.int32)
    segments[1, :2] = 0
    more = 3
    nexts = np.stack([at[row].max() + 1 + np.arange(more) for row in range(2)])[..., None].repeat(3, axis=2)
    assert [offset + 10 for offset in offsets] == [at[0].max() + 1, at[1].max() + 1 + 2]
    return at, segments, np.concatenate([at, nexts], axis=1), more


@pytest.mark.parametrize("sizes", [(10, 1, 1, 1), *(pytest.param(x, marks=thorough) for x in ((4, 6, 2, 1), (10, 3)))])
def test_mrope_decodes_with_one_offset_a_sequence(sizes):
    """The prompt has coordinates, what follows has none; whole, in chunks and token by token, left-padded rows included."""
    at, segments, full_at, more = conversation()
    length = at.shape[1] + more
    query, key, value = normal(1, B, length, N, 24), normal(2, B, length, K, 24), normal(3, B, length, K, 24)
    full_segments = np.concatenate([segments, np.ones((B, more), np.int32)], axis=1)
    encoding = pj.mrope((4, 4, 4))
    own = dict(query_coordinates=full_at, key_coordinates=full_at, segment_ids=jnp.asarray(full_segments))
    whole = pj.attention(query, key, value, encoding, {}, is_causal=True, **own)
    cache = pj.init_cache(encoding, pj.Dims(N, 24, num_kv_heads=K), B, max_length=length, coordinate_dtype=jnp.int32)
    outs, start = [], 0
    for size in sizes:
        now = slice(start, start := start + size)
        given = {"coordinates": at[:, now]} if start <= at.shape[1] else {}
        out, cache = pj.attend(
            query[:, now], key[:, now], value[:, now], encoding, {}, cache, segment_ids=jnp.asarray(full_segments[:, now]), **given
        )
        outs.append(out)
    real = full_segments[..., None, None] != 0
    close(jnp.concatenate(outs, 1) * real, whole * real, atol=1e-5)
    assert cache.next_coordinate.tolist() == (full_at.max((1, 2)) + 1).tolist()
