"""posjax against recorded answers of other people's packages, and against the float64 references.

The recordings (tests/parity/golden, written by make_golden.py) need no torch here; test_live.py asks the packages
themselves, on fresh random inputs. Everything is float32 in posjax and must agree to 1e-5.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx
from ours import (
    attention,
    attention_weights,
    close,
    cope_params,
    dense_bias,
    golden,
    inputs_of,
    linear_attention,
    normal,
    random_leaves,
    rotate,
    rotate_at,
    tensors_of,
    turned,
    visible,
)

import posjax as pj
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare
from posjax.encodings.relative import alibi_slopes
from posjax.models.pretrained.architecture import params_from, tensors_from
from posjax.models.pretrained.families import architecture_of
from posjax.models.transformer import Transformer, functional

FORMS = {"listing": False, "released": True}


# --- sinusoidal --------------------------------------------------------------------------------------------------


def test_sinusoidal_equals_distilbert():
    table = golden("sinusoidal")["table"]
    got = pj.sinusoidal().embed({}, jnp.zeros((1, *table.shape)), pj.Tokens.at(jnp.arange(len(table))))
    close(got[0], table)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_sinusoidal_equals_the_paper_at_any_position(theta):
    positions = np.array([[0, 1, 63, 4_095], [99_999, 100_000, 524_287, 1_000_003]])
    (x,) = normal(0, (2, 4, 24))
    got = pj.sinusoidal(theta).embed({}, jnp.asarray(x), pj.Tokens.at(jnp.asarray(positions)))
    close(got, x + references.sinusoidal(positions, 24, theta))


# --- RoPE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("label", "theta", "fraction"), [("full", 10_000.0, 1.0), ("quarter", 500_000.0, 0.25)])
def test_rope_equals_packages(pairing, label, theta, fraction):
    """near: the packages' own tables, good in float32; far: positions to 100,000, phases in float64."""
    data = golden("rope")
    for reach in ("near", "far"):
        turned = rotate(pj.rope(theta, fraction, pairing=pairing), data["query"], data["key"], data[reach])
        for name, got in zip(("query", "key"), turned, strict=True):
            recorded = f"{pairing}_{label}_{reach}_{name}"
            if (pairing, label, reach) != ("interleaved", "quarter", "near"):  # GPT-J knows one theta only
                close(got, data[recorded])


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("theta", "fraction"), [(10_000.0, 1.0), (500_000.0, 0.25)])
def test_rope_equals_complex_rotation_at_position_100_000(pairing, fraction, theta):
    """The rotation of a pair of ones: its error is that of the phase, about 1e-6 where float32 phases give 6e-3."""
    positions = np.array([0, 1, 255, 4_095, 32_768, 65_537, 99_991, 100_000])
    query, key = normal(1, (2, 8, 4, 32), (2, 8, 2, 32))
    turned = rotate(pj.rope(theta, fraction, pairing=pairing), query, key, positions)
    for got, x in zip(turned, (query, key), strict=True):
        close(got, references.rope(x, positions, theta, fraction, pairing))
        unrotated = int(32 * fraction)
        np.testing.assert_array_equal(got[..., unrotated:], x[..., unrotated:])


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_rope_pairings_differ_by_a_permutation_of_channels(fraction):
    """Channel 2m + c of interleaved is channel m + c R/2 of half; without the permutation they do differ."""
    (x,) = normal(2, (1, 9, 2, 16))
    width = int(16 * fraction)
    to_half = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2), np.arange(width, 16)])
    positions = np.arange(40_000, 40_009)
    interleaved, _ = rotate(pj.rope(fraction=fraction, pairing="interleaved"), x, x, positions)
    half, _ = rotate(pj.rope(fraction=fraction, pairing="half"), x[..., to_half], x, positions)
    close(np.asarray(interleaved)[..., to_half], np.asarray(half), 1e-6)
    same_channels, _ = rotate(pj.rope(fraction=fraction, pairing="half"), x, x, positions)
    assert np.abs(np.asarray(interleaved) - np.asarray(same_channels)).max() > 0.1


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rope_attention_equals_complex_rotation(pairing):
    query, key, value = normal(3, (2, 20, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8))
    positions = np.arange(90_000, 90_020)
    scores = references.logits(*(references.rope(x, positions, fraction=0.5, pairing=pairing) for x in (query, key)))
    want, _ = references.attend(scores, value, references.causal(20))
    encoding = pj.rope(fraction=0.5, pairing=pairing)
    where = jnp.broadcast_to(jnp.asarray(positions), (2, 20))
    got = attention(
        query,
        key,
        value,
        encoding,
        {},
        is_causal=True,
        query_positions=where,
        key_positions=where,
    )
    close(got, want)


# --- linear attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["elu", "exp"])
@pytest.mark.parametrize("pairing", [None, "half"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_linear_attention_equals_equation_19(feature_map, pairing, is_causal):
    query, key, value = normal(4, *[(2, 20, 2, 8)] * 3)
    seen = references.causal(20) if is_causal else np.ones((20, 20), bool)
    want = references.linear_attention(query, key, value, seen, np.arange(20), feature_map, pairing=pairing)
    encoding = None if pairing is None else pj.rope(pairing=pairing)
    got = linear_attention(query, key, value, encoding, feature_map=feature_map, is_causal=is_causal)
    close(got, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_linear_attention_equals_equation_19_over_long_segments(is_causal):
    """Segments of 90, 1, 170 and 39 tokens: inside a chunk of the walk, across its edges, and longer than it."""
    query, key, value = normal(5, *[(1, 300, 1, 8)] * 3)
    segments = np.repeat([[1, 2, 3, 4]], [90, 1, 170, 39], axis=1)
    seen = segments[:, :, None] == segments[:, None, :]
    seen = seen & references.causal(300) if is_causal else seen
    want = references.linear_attention(query, key, value, seen, np.arange(300), pairing="half")
    got = linear_attention(
        query,
        key,
        value,
        pj.rope(),
        is_causal=is_causal,
        segment_ids=jnp.asarray(segments),
    )
    close(got, want)


# --- ALiBi -------------------------------------------------------------------------------------------------------


def test_alibi_slopes_equal_bloom_for_every_head_count():
    slopes = golden("alibi")["slopes"]
    for heads in range(1, 65):
        close(alibi_slopes(heads), slopes[heads - 1, :heads], 1e-6)
        close(alibi_slopes(heads), references.alibi_slopes(heads), 1e-6)


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_attention_equals_bloom(heads):
    """BLOOM adds slope * j where ALiBi adds -slope * (i - j): a constant a row, which softmax does not see."""
    data = golden("alibi")
    query, key, value = (data[f"{name}_{heads}"] for name in ("query", "key", "value"))
    got = attention(query, key, value, pj.alibi(), {}, is_causal=True)
    close(got, data[f"out_{heads}"])


@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_alibi_bias_equals_the_paper(heads):
    x = np.zeros((1, 40, heads, 4), np.float32)
    got = dense_bias(pj.alibi(), {}, x, x, x, is_causal=True)
    close(visible(got[0]), visible(references.alibi_bias(heads, 40, 40)))


# --- T5 ----------------------------------------------------------------------------------------------------------


def buckets_of(distances, **options):
    """The bucket that posjax gives each j - i, read off its bias: bucket b of the only head holds the number b."""
    encoding = pj.t5(**options)
    params = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.arange(leaf.shape[0], dtype=jnp.float32)[:, None], leaf.shape),
        encoding.init(jax.random.key(0), pj.Dims(num_heads=1, head_dim=2)),
    )
    query, key = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, len(distances), 1, 2))
    own = dict(query_positions=jnp.asarray([10_000]), key_positions=10_000 + jnp.asarray(distances, jnp.int32))
    _, scores = scores_of(prepare(query, key, key, encoding, params, **own))
    return np.asarray(scores)[0, 0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 50), (64, 4096)])
def test_t5_buckets_equal_transformers_to_distance_6000(num_buckets, max_distance, bidirectional):
    data = golden("t5")
    options = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    recorded = data[f"buckets_{num_buckets}_{max_distance}_{'both' if bidirectional else 'causal'}"]
    distances = data["distances"].astype(int)
    np.testing.assert_array_equal(buckets_of(distances, **options), recorded)
    np.testing.assert_array_equal(recorded, [references.t5_bucket(int(d), **options) for d in distances])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 50), (64, 4096)])
def test_t5_bias_equals_transformers(num_buckets, max_distance, bidirectional):
    data = golden("t5")
    label = f"{num_buckets}_{max_distance}_{'both' if bidirectional else 'causal'}"
    encoding = pj.t5(num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    x = np.zeros((1, 24, 3, 4), np.float32)
    got = dense_bias(encoding, {"bias": jnp.asarray(data[f"table_{label}"])}, x, x, x, is_causal=False)
    np.testing.assert_array_equal(got[0], data[f"bias_{label}"])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_attention_equals_the_definition(bidirectional):
    query, key, value, table = normal(6, *[(2, 20, 2, 8)] * 3, (12, 2))
    seen = np.ones((20, 20), bool) if bidirectional else references.causal(20)
    bias = references.t5_bias(table, 20, 20, max_distance=10, bidirectional=bidirectional)
    want, _ = references.attend(references.logits(query, key) + bias, value, seen)
    encoding = pj.t5(num_buckets=12, max_distance=10, bidirectional=bidirectional)
    got = attention(
        query,
        key,
        value,
        encoding,
        {"bias": jnp.asarray(table)},
        is_causal=not bidirectional,
    )
    close(got, want)


# --- CoPE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["logits", "keys", "values"])
@pytest.mark.parametrize("table", ["shared", "per_head"])
def test_cope_equals_x_transformers(form, gates, table):
    """Listing 1 is the package's own form; the released one is the package's with q / sqrt(H) against the embedding."""
    data = golden("cope")
    query, key, value = (data[name] for name in ("query", "key", "value"))
    encoding = pj.cope(6, gates=gates, scaled=FORMS[form], per_head=table == "per_head")
    params, hidden = cope_params(encoding, data[table], data["gate_keys"])
    got = attention(query, key, value, encoding, params, is_causal=True, hidden=hidden)
    close(got, data[f"out_{table}_{gates}_{form}"])
    if (gates, form) == ("logits", "listing"):
        bias = dense_bias(encoding, params, data["query"], data["key"], data["value"], is_causal=True)
        close(visible(bias), visible(data[f"bias_{table}"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["logits", "keys", "values"])
@pytest.mark.parametrize("per_head", [False, True])
def test_cope_equals_the_paper_and_the_released_code(form, gates, per_head):
    """With half as many key heads as query heads."""
    shape, table = (2, 20, 2, 8), (5, 8)
    query, key, value, gate_keys, embedding = normal(8, (2, 20, 4, 8), shape, shape, shape, (4, *table) if per_head else table)
    met = {"logits": None, "keys": gate_keys, "values": value}[gates]
    want, weights, bias = references.cope(query, key, value, embedding, met, FORMS[form])
    encoding = pj.cope(5, gates=gates, scaled=FORMS[form], per_head=per_head)
    params, hidden = cope_params(encoding, embedding, gate_keys)
    close(visible(dense_bias(encoding, params, query, key, value, is_causal=True, hidden=hidden)), visible(bias))
    close(attention(query, key, value, encoding, params, is_causal=True, hidden=hidden), want)
    close(attention_weights(query, key, value, encoding, params, is_causal=True, hidden=hidden), weights)


def test_cope_with_rope_gates_on_rotated_logits_and_reads_the_plain_query():
    query, key, value, embedding = normal(10, *[(2, 20, 2, 8)] * 3, (6, 8))
    seen, positions = references.causal(20), np.arange(20)
    turned = references.logits(references.rope(query, positions), references.rope(key, positions))
    want, _ = references.attend(turned + references.cope_bias(query, embedding, turned, seen), value, seen)
    encoding = pj.chain(pj.rope(), pj.cope(6))
    got = attention(
        query,
        key,
        value,
        encoding,
        {"cope": {"embedding": jnp.asarray(embedding)}},
        is_causal=True,
    )
    close(got, want)


# --- TUPE --------------------------------------------------------------------------------------------------------


def tupe_case(relative, released, length=20, heads=3, width=8):
    """(encoding, params, reference bias [N, T, T]): every leaf random, the table longer than the input."""
    encoding = pj.tupe(relative=relative, released=released)
    dims = pj.Dims(num_heads=heads, head_dim=width, embed_dim=20, max_length=30)
    params = random_leaves(encoding.init(jax.random.key(0), dims), seed=11)
    # N(0, 1) kernels of 20 inputs would make position logits of some tens; in proportion they stay near one
    params |= {name: params[name] / np.float32(math.sqrt(20)) for name in ("query_kernel", "key_kernel")}
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    kernels = exact["query_kernel"], exact["key_kernel"]
    if released:
        assert exact["position"].shape == (31, 20)
        bias = references.released_tupe(
            exact["position"][: length + 1],
            exact["norm_scale"],
            exact["norm_bias"],
            kernels[0],
            exact["query_bias"],
            kernels[1],
            exact["key_bias"],
            exact.get("bias"),
        )
    else:
        between = references.t5_bias(exact["bias"], length, length, max_distance=128) if relative else None
        bias = references.tupe(exact["position"][:length], *kernels, *exact["reset"], between)
    return encoding, params, bias


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tupe_attention_equals_the_paper_and_the_released_code(relative, released, is_causal):
    encoding, params, bias = tupe_case(relative, released)
    query, key, value = normal(12, *[(2, 20, 3, 8)] * 3)
    seen = references.causal(20) if is_causal else np.ones((20, 20), bool)
    want, weights = references.tupe_attention(query, key, value, bias, seen)
    close(attention(query, key, value, encoding, params, is_causal=is_causal), want)
    close(attention_weights(query, key, value, encoding, params, is_causal=is_causal), weights)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
def test_tupe_scores_equal_the_paper_and_the_released_code(relative, released):
    """The whole score before softmax, which would hide a constant a row: widened product plus bias terms."""
    encoding, params, bias = tupe_case(relative, released)
    query, key, value = normal(13, *[(2, 20, 3, 8)] * 3)
    inputs = inputs_of(query, key, value)
    turned_query, turned_key = turned(encoding, params, inputs)
    scores = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (turned_query, turned_key))) / math.sqrt(8)
    if relative:
        scores = scores + dense_bias(encoding, params, query, key, value, is_causal=False)
    close(scores, references.logits(query, key, 1 / math.sqrt(16)) + bias)


def test_tupe_without_reset_is_the_plain_position_product():
    encoding = pj.tupe(untie_cls=False)
    dims = pj.Dims(num_heads=2, head_dim=8, embed_dim=16, max_length=20)
    params = random_leaves(encoding.init(jax.random.key(0), dims), seed=14)
    params |= {name: params[name] / 4 for name in ("query_kernel", "key_kernel")}
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    product = np.einsum(
        "td,dnh,se,enh->nts", *[exact["position"], exact["query_kernel"]], *[exact["position"], exact["key_kernel"]]
    )
    query, key, value = normal(15, *[(2, 20, 2, 8)] * 3)
    want, _ = references.tupe_attention(query, key, value, product / 4, np.ones((20, 20), bool))
    close(attention(query, key, value, encoding, params), want)


# --- several axes ------------------------------------------------------------------------------------------------


def test_rope_mixed_equals_timm_whose_first_frequency_is_of_columns():
    data, at = golden("axes"), pj.axial_coordinates((3, 5))
    params = {"frequencies": jnp.asarray(data["mixed_frequencies"][::-1])}
    close(rotate_at(pj.rope_mixed(), data["query"], data["query"], at, params)[0], data["mixed"])


def test_axial_rope_equals_timm_on_a_grid_rescaled_as_in_eva():
    data, at = golden("axes"), pj.axial_coordinates((3, 5), pretrained=(16, 16))
    close(rotate_at(pj.axial_rope(pairing="interleaved"), data["query"], data["query"], at)[0], data["eva"])


@pytest.mark.parametrize("normalize", ["separate", "min", "max"])
def test_dinov3_coordinates_equal_timm(normalize):
    close(pj.axial_coordinates((3, 5), normalize=normalize), golden("axes")[f"dinov3_{normalize}"], 1e-6)


def test_axial_rope_of_widths_equals_flux():
    data = golden("axes")
    encoding = pj.axial_rope(3, "widths", widths=(4, 8, 12), pairing="interleaved")
    close(rotate_at(encoding, data["query"], data["query"], data["flux_coordinates"])[0], data["flux"])


def test_pope_scores_equal_its_package():
    data = golden("axes")
    query, key = rotate(pj.pope(), data["query"], data["key"], np.arange(15), {"delta": jnp.asarray(data["delta"])})
    close(np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (query, key))), data["pope_scores"], 2e-5)


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text", "gptj", "bloom", "bert"])
def test_logits_of_a_model_equal_those_of_transformers(family):
    """Norms in every place, windows, parallel and sequential branches, every kind of bias, and the layouts of all weights."""
    recorded = golden("families")
    architecture = architecture_of(json.loads(str(recorded[f"{family}_config"])))
    shapes = {name: weight.shape for name, _, weight in architecture.tensors()}
    assert sorted(shapes) == recorded[f"{family}_names"].tolist()
    tensors = tensors_of(shapes)
    params = params_from(architecture, tensors)
    with_params, _ = functional(nnx.eval_shape(lambda: Transformer(architecture.config, architecture.encodings, rngs=nnx.Rngs(0))))
    with jax.numpy_rank_promotion("raise"):
        logits = with_params(params)(jnp.asarray(recorded["tokens"], jnp.int32))
    close(logits, recorded[family])
    for name, tensor in tensors_from(architecture, params):
        np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=1e-7)  # 1 + w rounds w
