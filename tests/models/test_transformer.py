"""The Transformer: its options, its parts against forms written out here, and encodings that differ by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import posjax as pj
from posjax.models import layer as layer_module
from posjax.models import transformer
from posjax.models.losses import cross_entropy, z_loss
from posjax.models.transformer import Transformer, TransformerConfig, functional

TINY = TransformerConfig(vocab_size=19, num_layers=2, embed_dim=16, num_heads=4, max_length=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 12)), jnp.int32)


def build(encoding=None, seed=0, **changes):
    return Transformer(dataclasses.replace(TINY, **changes), encoding or pj.rope(), rngs=nnx.Rngs(seed))


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def test_the_whole_model_equals_its_equations_in_numpy():
    """A pre-norm decoder with grouped heads, SwiGLU and ALiBi, from its parameters alone, in float64."""
    model = build(pj.alibi(), num_kv_heads=2, activation="swiglu", mlp_dim=24)
    _, params = functional(model)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedding = p["token_embedding"]["embedding"]
    x = embedding[np.asarray(TOKENS)] * np.sqrt(16)
    length = TOKENS.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)
    slopes = 2.0 ** (-2.0 * np.arange(1, 5))
    for layer in range(2):
        w = jax.tree.map(lambda a, i=layer: a[i], p["layers"])
        h = rms(x, w["attention_norm"]["scale"])
        q, k, v = (np.einsum("btd,dnh->btnh", h, w[name]["kernel"]) for name in ("query", "key", "value"))
        k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / 2.0 - slopes[:, None, None] * distance
        scores = np.where(distance >= 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("bnts,bsnh,nhd->btd", weights, v, w["out"]["kernel"])
        h = rms(x, w["mlp_norm"]["scale"])
        gate = h @ w["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]
    expected = rms(x, p["outer_norm"]["scale"]) @ embedding.T
    np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5)


def test_post_norm_layer_norm_gelu_equals_its_equations():
    model = build(pj.identity(), norm="layernorm", norm_position="post", is_causal=False, num_layers=1, tie_embeddings=False)
    _, params = functional(model)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]

    w = jax.tree.map(lambda a: a[0], p["layers"])
    x = norm(p["token_embedding"]["embedding"][np.asarray(TOKENS)] * 4.0, p["outer_norm"])
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[name]["kernel"]) for name in ("query", "key", "value"))
    weights = np.asarray(jax.nn.softmax(np.einsum("btnh,bsnh->bnts", q, k) / 2.0, axis=-1))
    x = norm(x + np.einsum("bnts,bsnh,nhd->btd", weights, v, w["out"]["kernel"]), w["attention_norm"])
    up = x @ w["up"]["kernel"]
    gelu = up * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    x = norm(x + gelu @ w["down"]["kernel"], w["mlp_norm"])
    np.testing.assert_allclose(model(TOKENS), x @ p["head"]["kernel"], atol=2e-5)


def test_models_that_differ_in_encoding_start_from_the_same_weights():
    plain, rotated = functional(build(pj.cope(8)))[1], functional(build(pj.rope()))[1]
    encoding = plain.pop("encoding")
    assert jax.tree.map(jnp.shape, encoding) == {"0": {"embedding": (8, 4)}}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, rotated))


@pytest.mark.thorough
def test_remat_changes_nothing_but_memory():
    def loss(params, with_params):
        return cross_entropy(with_params(params)(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[1]

    results = []
    for remat in ("none", "attention", "full"):
        with_params, params = functional(build(pj.chain(pj.rope(), pj.cope(4)), remat=remat))
        results.append(jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, with_params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], result)

    def grows(remat):
        return saved(remat, 16) - saved(remat, 8)

    def saved(remat, layers):
        with_params, params = functional(build(remat=remat, num_layers=layers, embed_dim=32))
        text = jax.jit(jax.grad(loss), static_argnums=1).lower(params, with_params).compile().memory_analysis()
        return text.temp_size_in_bytes

    assert grows("full") < 0.5 * grows("attention") < 0.5 * grows("none")


@pytest.mark.parametrize("layers", [1, 8])
def test_initial_weights_have_the_variance_of_their_place(layers):
    """1 over the width that a matrix reads, and for the two that write to the residual stream 1 / 2L of that."""
    model = build(num_layers=layers, embed_dim=32, num_heads=2, head_dim=32, mlp_dim=48, activation="swiglu", tie_embeddings=False)
    params = functional(model)[1]
    stacked = {name: params["layers"][name]["kernel"] for name in ("query", "key", "value", "up", "gate", "out", "down")}
    variance = dict.fromkeys(stacked, 1 / 32) | {"out": 1 / 64 / (2 * layers), "down": 1 / 48 / (2 * layers)}
    cases = [(stacked[name], variance[name]) for name in stacked]
    cases += [(params["token_embedding"]["embedding"], 1 / 32), (params["head"]["kernel"], 1 / 32)]
    for x, want in cases:
        assert abs(float(jnp.square(x).mean()) / want - 1) < 5 * np.sqrt(2 / x.size)  # five standard errors
        assert abs(float(x.mean())) < 5 * np.sqrt(want / x.size)
    several = [x.reshape(-1) for kernel in stacked.values() for x in kernel]
    for n, x in enumerate(several):  # neither layers nor matrices are copies of each other
        for y in several[:n]:
            size = min(x.size, y.size)
            assert abs(np.corrcoef(x[:size], y[:size])[0, 1]) < 5 / np.sqrt(size)


def test_compile_size_does_not_grow_with_depth():
    def size(layers):
        with_params, params = functional(build(num_layers=layers))
        return len(jax.jit(lambda p: with_params(p)(TOKENS)).lower(params).as_text().splitlines())

    assert size(12) == size(3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_only_with_a_key_and_a_rate(dropout):
    model = build(dropout_rate=dropout)
    plain = model(TOKENS)
    noisy = model(TOKENS, dropout_key=jax.random.key(0))
    again = model(TOKENS, dropout_key=jax.random.key(0))
    assert (noisy == again).all()
    assert bool((plain == noisy).all()) == (dropout == 0.0)


def test_every_dropout_has_a_key_of_its_own(monkeypatch):
    """The embedding's, and those of both branches of every layer; those of another call are others."""
    keys, plain = [], layer_module.dropout

    def recorded(x, rate, key):
        jax.debug.callback(lambda key: keys.append(tuple(np.asarray(key).tolist())), jax.random.key_data(key))
        return plain(x, rate, key)

    for module in (layer_module, transformer):
        monkeypatch.setattr(module, "dropout", recorded)
    model = build(dropout_rate=0.3, num_layers=3)
    for seed in (0, 1):
        model(TOKENS, dropout_key=jax.random.key(seed))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * (1 + 2 * 3)


def test_dropout_keeps_the_mean():
    x = jnp.ones(100_000)
    kept = layer_module.dropout(x, 0.25, jax.random.key(1))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    # The share kept is binomial: five standard errors.
    assert abs(float((kept > 0).mean()) - 0.75) < 5 * np.sqrt(0.75 * 0.25 / x.size)


def test_bfloat16_compute_keeps_float32_parameters_and_logits_close():
    exact, low = build(pj.cope(8)), build(pj.cope(8), compute_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(functional(low)[1])} == {jnp.dtype("float32")}
    logits = low(TOKENS)
    assert logits.dtype == jnp.float32
    error = float(jnp.abs(logits - exact(TOKENS)).max())
    assert 0 < error < 0.15  # bfloat16 was used, and used for no more than rounding of order 2^-8 a step


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_packed_documents_equal_the_documents_alone(attention):
    model = build(pj.rope(), attention=attention)
    first, second = TOKENS[:1, :5], TOKENS[:1, 5:]
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    together = model(TOKENS[:1], positions, segments)
    np.testing.assert_allclose(together[:, :5], model(first), atol=2e-5)
    np.testing.assert_allclose(together[:, 5:], model(second), atol=2e-5)


def test_a_local_window_and_causality_bound_what_a_token_sees():
    model = build(num_layers=1, local_window_size=3)
    changed = TOKENS.at[:, 4].add(1) % 19
    differs = np.abs(np.asarray(model(TOKENS) - model(changed))).max((0, 2)) > 1e-6
    assert differs.tolist() == [4 <= t <= 7 for t in range(12)]


def test_windows_by_layer_are_of_the_cache_too():
    """Windows of 1 and 2 positions reach 3 back; a cache of each layer holds what its window needs."""
    model = build(pj.alibi(), local_window_size=(1, 2))
    differs = np.abs(np.asarray(model(TOKENS) - model(TOKENS.at[:, 4].add(1) % 19))).max((0, 2)) > 1e-6
    assert differs.tolist() == [4 <= t <= 7 for t in range(12)]
    mixed, same = (nnx.eval_shape(lambda windows=windows: build(local_window_size=windows)) for windows in ((3, None), (3, 3)))
    assert [cache.key.shape[2] for cache in mixed.init_cache(2, 9)] == [3, 9]
    assert [cache.key.shape[2] for cache in mixed.init_cache(2, 9, window=2)] == [2, 2]
    assert len(same.init_cache(2, 9)) == 1
    assert [(cache.key.shape[2], cache.window) for cache in mixed.init_cache(2, 2)] == [(2, None), (2, None)]
    with pytest.raises(ValueError, match=r"max_length of the cache must be at least 12 to add 12 tokens, got 9"):
        mixed.decode(TOKENS, mixed.init_cache(2, 9))


def test_a_full_cache_keeps_the_window_where_positions_have_gaps():
    model = build(num_layers=1, local_window_size=6)
    positions = jnp.asarray([[0, 1, 2, 8, 9, 20]])
    whole = model(TOKENS[:, :6], positions)
    cache, parts = model.init_cache(2, 6), []
    assert cache[0].window is None
    for start in (0, 3):
        logits, cache = model.decode(TOKENS[:, start : start + 3], cache, positions[:, start : start + 3])
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    assert float(jnp.abs(whole - model(TOKENS[:, :6])).max()) > 1e-3


def test_token_types_are_added_to_the_embedding():
    model = build(num_layers=1, is_causal=False, num_token_types=2, embedding_scale=1.0)
    types = jnp.asarray([[0] * 6 + [1] * 6])
    _, params = functional(model)
    other = dict(params, token_embedding={"embedding": params["token_embedding"]["embedding"]})
    difference = params["token_type_embedding"]["embedding"][1] - params["token_type_embedding"]["embedding"][0]
    np.testing.assert_array_equal(model(TOKENS), model(TOKENS, token_types=jnp.zeros((2, 12), jnp.int32)))
    # The same by hand: every token a row of a table of its own, with the difference of the types in it.
    rows = params["token_embedding"]["embedding"][TOKENS[0]] + types[0][:, None] * difference
    table = jnp.concatenate([rows, jnp.zeros((7, 16))])
    with_params, _ = functional(model)
    by_hand = with_params(dict(other, token_embedding={"embedding": table})).records(jnp.arange(12)[None])[0]
    record = model.records(TOKENS[:1], token_types=types)[0]
    np.testing.assert_allclose(record.query, by_hand.query, atol=2e-6)
    assert float(jnp.abs(record.query[:, 6:] - model.records(TOKENS[:1])[0].query[:, 6:]).max()) > 1e-3


# Encodings by layer --------------------------------------------------------------------------------------------------


def test_encodings_repeat_down_the_stack():
    model = build([pj.cope(4, shared=False), pj.identity()], num_layers=4)
    assert model.layout == (0, 1, 0, 1)
    assert jax.tree.map(jnp.shape, functional(model)[1]["encoding"]) == {"0": {"embedding": (2, 4, 4)}}
    assert [r.encoding.name for r in model.records(TOKENS)] == ["cope", "identity", "cope", "identity"]


@pytest.mark.parametrize("shared", [True, False])
def test_each_layer_uses_its_own_parameters(shared):
    """Changing the table of the second CoPE layer changes that layer's attention and no earlier one's."""
    encoding = pj.cope(4, shared=shared)
    with_params, params = functional(build([encoding, pj.identity()], num_layers=4))
    assert params["encoding"]["0"]["embedding"].shape == ((4, 4) if shared else (2, 4, 4))
    noise = jax.random.normal(jax.random.key(3), (4, 4))
    before = [r.query for r in with_params(params).records(TOKENS)]
    table = params["encoding"]["0"]["embedding"]
    params["encoding"]["0"]["embedding"] = noise if shared else table.at[1].set(noise)
    model = with_params(params)
    changed = [bool((a != b.query).any()) for a, b in zip(before, model.records(TOKENS), strict=True)]
    # A layer's query depends on the layers below it: a shared table acts from the first on, the other from the third.
    assert changed == ([False, True, True, True] if shared else [False, False, False, True])
    np.testing.assert_array_equal(model.encoding_params(2)["embedding"], noise)
    np.testing.assert_array_equal(model.encoding_params(0)["embedding"], noise if shared else table[0])


def test_scanned_layers_equal_layers_one_by_one():
    """A run of equal encodings is one scan; the same encoding as four distinct values is four."""
    one, four = build(pj.alibi(), num_layers=4), build([pj.alibi() for _ in range(4)], num_layers=4)
    np.testing.assert_allclose(one(TOKENS), four(TOKENS), atol=1e-5)


def test_records_give_the_models_own_attention():
    """The last layer's record, taken through attention and the rest of the layer, gives the model's logits."""
    model = build(pj.chain(pj.rope(), pj.cope(4, gates="keys", shared=False)), num_layers=1)
    record = model.records(TOKENS)[0]
    operands = record.query, record.key, record.value, record.encoding, record.params
    mixed = pj.attention(*operands, is_causal=True, hidden=record.hidden)
    _, params = functional(model)
    w = jax.tree.map(lambda a: a[0], params["layers"])
    x = params["token_embedding"]["embedding"][TOKENS] * 4.0 + jnp.einsum("btnh,nhd->btd", mixed, w["out"]["kernel"])
    x = x + jax.nn.gelu(rms(x, w["mlp_norm"]["scale"]) @ w["up"]["kernel"]) @ w["down"]["kernel"]
    logits = rms(x, params["outer_norm"]["scale"]) @ params["token_embedding"]["embedding"].T
    np.testing.assert_allclose(model(TOKENS), logits, atol=2e-5)


# The encoder ---------------------------------------------------------------------------------------------------------


ENCODER = [pj.tupe(), pj.tupe(relative=True)]


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", ENCODER, ids=lambda e: e.name)
def test_classification_on_cls_learns_where_a_token_stands(encoding):
    """Is token 3 in the first or the second half of the row? Words alone cannot tell."""
    import optax

    with_params, params = functional(build(encoding, is_causal=False, num_classes=2, norm="layernorm", norm_position="post"))
    rng = np.random.default_rng(1)
    place = rng.integers(1, 12, 256)
    tokens = rng.integers(4, 19, (256, 12))
    tokens[:, 0] = 0  # [CLS]
    tokens[np.arange(256), place] = 3
    labels = jnp.asarray(place > 5, jnp.int32)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, state):
        def loss(p):
            logits = with_params(p).classify(jnp.asarray(tokens, jnp.int32))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(80):
        params, state, value = step(params, state)
        losses.append(float(value))
    logits = jax.jit(lambda p: with_params(p).classify(jnp.asarray(tokens, jnp.int32)))(params)
    accuracy = (logits.argmax(-1) == labels).mean()
    assert accuracy > 0.9, losses[::10]


def test_cross_entropy_counts_weighted_tokens_only():
    logits = jnp.asarray([[[0.0, np.log(3.0)], [5.0, 5.0]]])
    losses, total, weight = cross_entropy(logits, jnp.asarray([[1, 0]]), jnp.asarray([[1.0, 0.0]]))
    np.testing.assert_allclose(losses, [[np.log(4 / 3), 0.0]], rtol=1e-6)
    assert float(total) == pytest.approx(np.log(4 / 3)) and float(weight) == 1.0


def test_z_loss_in_closed_form():
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(scale=3, size=(2, 3, 5)), np.array([[1.0, 0.5, 0.0], [1.0, 0.0, 2.0]])
    z = np.log(np.exp(logits).sum(-1))
    value, gradient = jax.value_and_grad(z_loss)(jnp.asarray(logits, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(value, (weights * z**2).sum(), rtol=1e-6)
    expected = (2 * weights * z)[..., None] * np.exp(logits - z[..., None])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size must be an integer of at least 1, got 0"),
        ({"num_layers": -1}, r"num_layers must be an integer of at least 1, got -1"),
        ({"embed_dim": 18}, r"num_heads must divide embed_dim=18 if head_dim is None, got 4"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads=4, got 3"),
        ({"norm": "batchnorm"}, r"norm must be 'rmsnorm' or 'layernorm', got 'batchnorm'"),
        ({"activation": "relu"}, r"activation must be 'gelu', 'gelu_exact', 'swiglu' or 'geglu', got 'relu'"),
        ({"compute_dtype": "float16"}, r"compute_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"dropout_rate": 1.0}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"mlp_dim": 0}, r"mlp_dim must be an integer of at least 1, got 0"),
        ({"attention": "linear", "local_window_size": 4}, r"local_window_size and logits_soft_cap must be None with attention="),
        ({"attention": "linear", "attention_scale": 0.5}, r"attention_scale must be None with attention='linear', got 0.5"),
        ({"local_window_size": (1, 2, 3)}, r"local_window_size must be one, or a tuple whose length divides num_layers=2, got 3"),
        ({"local_window_size": (1, 0)}, r"local_window_size must be an integer of at least 1, a tuple, .*got \(1, 0\)"),
        ({"norm_position": "both"}, r"norm_position must be 'pre', 'post', 'output' or 'sandwich', got 'both'"),
        ({"parallel_residual": True, "norm_position": "post"}, r"norm_position must be 'pre' with parallel_residual, got 'post'"),
        ({"shared_norm": True}, r"parallel_residual must be True with shared_norm, got False"),
        ({"embedding_norm": True, "norm_position": "post"}, r"embedding_norm must be False with norm_position='post'"),
        ({"biases": ("qkv", "key")}, r"biases must be a tuple, each 'qkv', 'out', 'mlp' or 'head', got \('qkv', 'key'\)"),
        ({"norm_epsilon": 0.0}, r"norm_epsilon must be positive, got 0.0"),
        ({"qk_norm": "all"}, r"qk_norm must be 'head', 'full' or None, got 'all'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"encoding must be one, or a sequence whose length divides num_layers=2, got 3"):
        build([pj.rope(), pj.alibi(), pj.identity()])
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\], got float32\[2, 12\]"):
        build()(TOKENS.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"num_classes must be a number to classify, got None"):
        build().classify(TOKENS)
    with pytest.raises(ValueError, match=r"positions must be below the max_length of learned, 8, got a sequence that needs 12"):
        build(pj.learned(), max_length=8)(TOKENS)
    with pytest.raises(ValueError, match=r"token_types must be None for a model without num_token_types, got int32\[2, 12\]"):
        build()(TOKENS, token_types=TOKENS)
    with pytest.raises(ValueError, match=r"token_types must be integers \[2, 12\] or \[1, 12\], got float32\[2, 12\]"):
        build(num_token_types=2)(TOKENS, token_types=TOKENS * 1.0)
    with pytest.raises(ValueError, match=r"is_causal must be True \(or a mask given\) for cope"):
        build(pj.cope(4), is_causal=False)(TOKENS)


def test_padding_may_have_an_id_outside_of_the_vocabulary():
    model = build(pj.rope(), num_layers=1)
    segments = jnp.ones_like(TOKENS).at[:, -3:].set(0)
    known, unknown = (model(TOKENS.at[:, -3:].set(token), segment_ids=segments)[:, :-3] for token in (0, -1))
    np.testing.assert_array_equal(unknown, known)
