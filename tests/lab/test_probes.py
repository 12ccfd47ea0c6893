"""Probes against closed forms in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj
from posjax.lab import probes
from posjax.lab.evaluation import layer_weights
from posjax.models.transformer import LayerRecord, TransformerConfig

N, H = 4, 16
DIMS = pj.Dims(num_heads=N, head_dim=H, max_length=40)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Loss by index


def test_loss_by_index_is_the_weighted_mean_of_each_bin():
    losses = normal(0, 6, 10)
    weights = np.random.default_rng(1).integers(0, 3, (6, 10)).astype(np.float32)
    index, loss = jax.jit(probes.loss_by_index, static_argnums=2)(losses, weights, 4)
    edges = [(0, 3), (3, 5), (5, 8), (8, 10)]  # floor(t * 4 / 10)
    np.testing.assert_allclose(index, [1.0, 3.5, 6.0, 8.5])
    expected = [np.average(losses[:, a:b].astype(np.float64), weights=weights[:, a:b]) for a, b in edges]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_loss_by_index_ignores_what_has_no_weight_and_says_where_nothing_counts():
    losses = np.array([[1.0, np.nan, 3.0, 4.0]], np.float32)
    weights = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    _, loss = probes.loss_by_index(losses, weights, 2)
    np.testing.assert_array_equal(loss, [1.0, np.nan])


@pytest.mark.parametrize("num_bins", [0, 5, 2.0])
def test_loss_by_index_names_a_wrong_number_of_bins(num_bins):
    with pytest.raises(ValueError, match="num_bins must be"):
        probes.loss_by_index(np.ones((2, 4)), np.ones((2, 4)), num_bins)


# Attention


def causal_uniform(length):
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def test_uniform_causal_attention_looks_i_halves_back_with_entropy_log_i():
    length = 33
    weights = np.broadcast_to(causal_uniform(length), (2, N, length, length))
    i = np.arange(length)
    # Query i spreads over distances 0 .. i.
    np.testing.assert_allclose(probes.attention_distance(weights, i, i), np.full(N, (i / 2).mean()), rtol=1e-5)
    np.testing.assert_allclose(probes.attention_entropy(weights), np.full(N, np.log(i + 1).mean()), rtol=1e-5)


def test_a_head_that_looks_at_one_key_has_its_distance_and_no_entropy():
    length = 12
    weights = np.zeros((1, 3, length, length), np.float32)
    for head, back in enumerate((0, 1, 5)):
        for i in range(length):
            weights[0, head, i, max(i - back, 0)] = 1
    valid = (np.arange(length) >= 5)[None].astype(np.float32)
    i = np.arange(length)
    np.testing.assert_allclose(probes.attention_distance(weights, i, i, valid), [0, 1, 5], rtol=1e-6)
    np.testing.assert_array_equal(probes.attention_entropy(weights, valid), [0, 0, 0])


def test_distance_is_in_positions_of_each_row_not_in_indices():
    weights = np.zeros((2, 1, 1, 2), np.float32)
    weights[:, 0, 0] = [0.25, 0.75]
    query, key = np.array([[10], [3]]), np.array([[10, 2], [4, 3]])
    # 0.75 * 8 and 0.25 * 1: keys ahead are at a distance too.
    np.testing.assert_allclose(probes.attention_distance(weights, query, key), [(6.0 + 0.25) / 2])
    np.testing.assert_allclose(probes.attention_distance(weights, query, key, np.array([[3.0], [1.0]])), [(3 * 6.0 + 0.25) / 4])


def test_rows_without_weight_do_not_count_even_if_not_finite():
    weights = np.full((1, N, 2, 2), np.nan, np.float32)
    weights[:, :, 0] = [0.5, 0.5]
    valid = np.array([[1.0, 0.0]])
    np.testing.assert_allclose(probes.attention_entropy(weights, valid), np.full(N, np.log(2)), rtol=1e-6)
    assert np.isnan(probes.attention_entropy(weights, np.zeros((1, 2)))).all()


# Contextual positions


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def counted(logits, allowed):
    gates = np.where(allowed, sigmoid(logits), 0.0)
    return gates, np.cumsum(gates[..., ::-1], -1)[..., ::-1]


def test_gates_of_one_count_to_the_distance_and_one():
    length = 20
    ones = np.full((2, length, N, H), 4.0, np.float32)  # logits of 64: gates of exactly one
    encoding = pj.cope(8)
    params = encoding.init(jax.random.key(0), DIMS)
    gates, positions = jax.jit(lambda q: probes.cope_positions(q, q, q, encoding, params))(ones)
    i, j = np.arange(length)[:, None], np.arange(length)
    np.testing.assert_array_equal(gates, np.broadcast_to((j <= i) * 1.0, gates.shape))
    expected = np.where(j <= i, i - j + 1, 0)  # past the last of the 8 embeddings too
    np.testing.assert_array_equal(positions, np.broadcast_to(expected, positions.shape))


@pytest.mark.parametrize("kind", ["content", "values", "keys"])
def test_gates_come_from_where_the_encoding_says(kind):
    length = 9
    query, key, value = (normal(i, 1, length, N, H) for i in range(3))
    encoding = pj.cope(8, gates=kind)
    params = encoding.init(jax.random.key(0), DIMS)
    source = {"content": key, "values": value}.get(kind)
    own = {}
    if kind == "keys":
        hidden = normal(4, 1, length, N * H)
        own["hidden"] = jnp.asarray(hidden)
        source = np.einsum("btd,dkh->btkh", hidden, params["gate_kernel"])
    both = pj.chain(pj.rope(), encoding)
    gates, positions = jax.jit(lambda *a: probes.cope_positions(*a, both, {"cope": params}, **own))(query, key, value)
    logits = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), source) / np.sqrt(H)
    expected_gates, expected = counted(logits, np.tril(np.ones((length, length), bool)))
    np.testing.assert_allclose(gates, expected_gates, atol=2e-6)
    np.testing.assert_allclose(positions, expected, atol=1e-5)


def test_gates_see_rotated_logits_grouped_keys_and_segments():
    length = 9
    query, key = normal(0, 1, length, N, H), normal(1, 1, length, 2, H)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    encoding = pj.chain(pj.rope(), pj.cope(8))
    params = encoding.init(jax.random.key(0), DIMS)
    gates, counts = probes.cope_positions(
        query, key, key, encoding, params, segment_ids=segments, query_positions=positions, key_positions=positions, scale=0.7
    )
    theta = 10_000.0 ** (-2 * np.arange(H // 2) / H)
    turn = np.exp(1j * positions[0][:, None] * theta)[None, :, None]
    complex_of = lambda x: (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn  # noqa: E731
    logits = 0.7 * np.einsum("btnh,bsnh->bnts", complex_of(query), np.repeat(complex_of(key), 2, 2).conj()).real
    allowed = np.tril(np.ones((length, length), bool)) & (segments[0][:, None] == segments[0])
    expected_gates, expected = counted(logits, allowed)
    np.testing.assert_allclose(gates, expected_gates, atol=2e-6)
    np.testing.assert_allclose(counts, expected, atol=1e-5)


@pytest.mark.parametrize("make", [functools.partial(pj.cope, 8), pj.cope_alibi, pj.cope_mlp])
def test_gates_have_their_bias(make):
    length = 9
    query, key = normal(0, 1, length, N, H), normal(1, 1, length, N, H)
    params = make().init(jax.random.key(0), DIMS)
    logits = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key) / np.sqrt(H)
    expected_gates, expected = counted(logits - 1.5, np.tril(np.ones((length, length), bool)))
    traced = jax.jit(lambda x: probes.cope_positions(query, key, key, make(gate_bias=x), params))(-1.5)
    for gates, positions in (traced, probes.cope_positions(query, key, key, make(gate_bias=-1.5), params)):
        np.testing.assert_allclose(gates, expected_gates, atol=2e-6)
        np.testing.assert_allclose(positions, expected, atol=1e-5)


def log_gate(x, args):
    return jax.nn.log_sigmoid(x)


def forget(params, inputs):
    scan = pj.Scan(log_gate, key=inputs.key[..., :1], include_key=False)
    return pj.ScoreModifications(biases=(pj.Bias(scan),))


FORGETTING = pj.encoding("forgetting", attend=forget, needs_causal=True)


def test_a_forgetting_gate_beside_cope_does_not_count():
    length = 9
    query, key = normal(0, 1, length, N, H), normal(1, 1, length, N, H)
    both, params = pj.chain(FORGETTING, pj.cope(8)), {"cope": pj.cope(8).init(jax.random.key(0), DIMS)}
    assert probes.counts_by_gates(both, DIMS)
    logits = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key) / np.sqrt(H)
    expected_gates, expected = counted(logits, np.tril(np.ones((length, length), bool)))
    gates, positions = probes.cope_positions(query, key, key, both, params)
    np.testing.assert_allclose(gates, expected_gates, atol=2e-6)
    np.testing.assert_allclose(positions, expected, atol=1e-5)


@pytest.mark.parametrize("encoding", [pj.rope(), pj.chain(pj.cope(4), pj.cope(8)), FORGETTING])
def test_an_encoding_without_one_count_is_refused(encoding):
    x = jnp.ones((1, 3, N, H))
    assert not probes.counts_by_gates(encoding, DIMS)
    with pytest.raises(ValueError, match="encoding must have one bias that counts by gates"):
        probes.cope_positions(x, x, x, encoding, encoding.init(jax.random.key(0), DIMS))


# Decay

DISTANCES = np.array([0, 1, 2, 5, 17, 38])


def curve(encoding, params=None, distances=DISTANCES, **arrays):
    params = encoding.init(jax.random.key(0), DIMS) if params is None else params
    compiled = jax.jit(lambda params, arrays: probes.decay_curve(encoding, params, distances, DIMS, **arrays))
    return np.asarray(compiled(params, arrays))


def mean_cos(width):
    return np.cos(DISTANCES[:, None] * 10_000.0 ** (-2 * np.arange(width // 2) / width)).mean(-1)


def test_alibi_falls_by_its_slope():
    slopes = 2.0 ** (-2.0 * np.arange(1, N + 1))
    np.testing.assert_allclose(curve(pj.alibi()), -slopes[:, None] * DISTANCES, atol=1e-5)


def test_rope_follows_the_mean_cosine_and_its_bound_the_partial_sums():
    expected = np.sqrt(H) * (mean_cos(H) - 1)
    np.testing.assert_allclose(curve(pj.rope()), np.tile(expected, (N, 1)), atol=1e-5)
    np.testing.assert_allclose(curve(pj.rope(), distances=-DISTANCES), np.tile(expected, (N, 1)), atol=1e-5)
    theta = 10_000.0 ** (-2 * np.arange(H // 2) / H)
    partial = np.abs(np.cumsum(np.exp(1j * DISTANCES[:, None] * theta), -1)).mean(-1)
    bound = np.sqrt(H) * (partial / partial[0] - 1)
    np.testing.assert_allclose(probes.rope_bound(DISTANCES[1:], H), bound[1:], atol=1e-5)


def test_sinusoids_follow_half_the_mean_cosine_of_the_model_width():
    expected = np.sqrt(H) * (mean_cos(N * H) - 1) / 2
    np.testing.assert_allclose(curve(pj.sinusoidal()), np.tile(expected, (N, 1)), atol=1e-5)


def test_no_encoding_makes_no_difference():
    np.testing.assert_array_equal(curve(pj.identity()), np.zeros((N, len(DISTANCES))))


def test_learned_positions_give_their_mean_product():
    table = normal(0, 40, N * H)
    product = table[1:].astype(np.float64) @ table[1:].T / (N * np.sqrt(H))
    expected = [np.mean([product[i, i - d] - product[i, i] for i in range(d, 39)]) for d in DISTANCES]
    np.testing.assert_allclose(curve(pj.learned(), {"embedding": table}), np.tile(expected, (N, 1)), atol=1e-5)


def test_tupe_gives_its_untied_positions_without_cls():
    encoding = pj.tupe()
    params = jax.tree.map(np.asarray, encoding.init(jax.random.key(0), DIMS))
    params["reset"] = np.full((2, N), 100.0, np.float32)
    p = params["position"][1:].astype(np.float64)
    query, key = (np.einsum("td,dnh->nth", p, params[name]) for name in ("query_kernel", "key_kernel"))
    product = query @ key.swapaxes(1, 2) / np.sqrt(2 * H)
    expected = [np.mean([product[:, i, i - d] - product[:, i, i] for i in range(d, 39)], 0) for d in DISTANCES]
    np.testing.assert_allclose(curve(encoding, params), np.stack(expected, -1), atol=1e-4)


def test_t5_tells_the_sides_apart():
    table = normal(0, 8, N)
    values = curve(pj.t5(8, 16, bidirectional=True), {"bias": table}, np.array([0, 1, -1, 30, -30]))
    # Keys ahead have buckets of their own, from 4 on; the last of each side holds what is far.
    np.testing.assert_allclose(values, (table[[0, 1, 5, 3, 7]] - table[0]).T, atol=1e-6)


def test_cope_with_gates_of_a_half_moves_half_a_position_a_token():
    embedding, query = normal(0, 6, H), normal(1, N, H)
    values = curve(pj.cope(6), {"embedding": embedding}, np.arange(12), query=query, key=np.zeros(H))
    count = np.minimum((np.arange(12) + 1) / 2, 5.0)
    z = query.astype(np.float64) @ embedding.T
    expected = np.stack([np.interp(count, np.arange(6), row) for row in z])
    np.testing.assert_allclose(values, expected - expected[:, :1], atol=1e-5)


def test_members_of_a_chain_add_up():
    both = curve(pj.chain(pj.sinusoidal(), pj.rope(), pj.alibi()))
    np.testing.assert_allclose(both, curve(pj.sinusoidal()) + curve(pj.rope()) + curve(pj.alibi()), atol=1e-5)


def test_grouped_keys_and_gates_with_keys_of_their_own_work():
    dims = pj.Dims(num_heads=4, head_dim=H, num_kv_heads=2)
    encoding = pj.cope_alibi(slope=0.5, gates="keys")
    params = encoding.init(jax.random.key(0), dims)
    values = jax.jit(lambda params: probes.decay_curve(encoding, params, np.arange(5), dims))(params)
    # The hidden state is zero, so every gate is a half.
    np.testing.assert_allclose(values, np.tile(-0.25 * np.arange(5), (4, 1)), atol=1e-6)


@pytest.mark.parametrize(
    "encoding, distances, message",
    [
        (pj.learned(), np.array([0, 39]), "distances must be at most 38"),
        (pj.cope(4), np.array([0, -1]), "distances must not be negative"),
        (pj.rope(), np.array([0.5]), "distances must be a non-empty integer array"),
    ],
)
def test_distances_that_cannot_be_placed_are_named(encoding, distances, message):
    with pytest.raises(ValueError, match=message):
        curve(encoding, distances=distances)


# A model's attention


def test_probabilities_of_a_layer_are_those_of_its_window_and_scale():
    sizes = dict(vocab_size=11, num_layers=2, embed_dim=16, num_heads=2, max_length=8)
    config = TransformerConfig(**sizes, attention_scale=0.7, local_window_size=(2, None), logits_soft_cap=1.5)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32) for _ in range(3))
    record = LayerRecord(query, key, value, None, pj.identity(), {})
    distance = np.arange(6)[:, None] - np.arange(6)
    scores = 1.5 * np.tanh(0.7 * np.einsum("bqnh,bknh->bnqk", *(np.asarray(x, np.float64) for x in (query, key))) / 1.5)
    for layer, reach in enumerate((2, 6)):
        weights = np.where((distance >= 0) & (distance <= reach), np.exp(scores), 0.0)
        np.testing.assert_allclose(layer_weights(config, layer, record), weights / weights.sum(-1, keepdims=True), atol=1e-6)
