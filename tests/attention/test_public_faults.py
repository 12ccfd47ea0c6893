"""What users of other attention libraries have reported as wrong, and is right here."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from suite import DIMS, TOKENS, normal, random_params

import posjax as pj
from posjax.attention import kv_cache
from posjax.attention.backends import reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare
from posjax.core.sequence import prefix_sum
from posjax.encodings.relative import alibi_slopes
from posjax.models.losses import cross_entropy, z_loss

B, T, N, K, H = 2, 12, 4, 2, 8
QUERY, KEY, VALUE = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H)
ENCODINGS = [pj.rope(), pj.t5(6, 8), pj.tupe(relative=True), pj.chain(pj.rope(), pj.cope(4)), pj.cope_alibi(learned=True)]
BACKENDS = {"xla": reference.attention, "xla_chunked": xla_chunked.attention}


def close(a, b, atol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# Sixty-four bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x64_mode_changes_neither_numbers_nor_dtypes(encoding, backend):
    params = random_params(encoding)

    def answers():
        segments = jnp.asarray(np.repeat([[1, 2]], T // 2, 1).repeat(B, 0))  # int64 in x64 mode

        def loss(query, key, value, params):
            call = prepare(query, key, value, encoding, params, is_causal=True, segment_ids=segments)
            return (BACKENDS[backend](call) ** 2).sum()

        return jax.value_and_grad(loss, range(4))(QUERY, KEY, VALUE, params)

    want = answers()
    with jax.enable_x64(True):
        got = answers()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-5)


def test_the_cache_in_x64_mode():
    encoding = pj.chain(pj.rope(), pj.cope(4))
    with jax.enable_x64(True):
        cache = kv_cache.init_cache(encoding, DIMS, B, max_length=T)
        for now in (slice(0, 7), slice(7, T)):
            out, cache = kv_cache.attend(QUERY[:, now], KEY[:, now], VALUE[:, now], encoding, random_params(encoding), cache)
    assert cache.positions.dtype == cache.next_position.dtype == jnp.int32 and out.dtype == jnp.float32
    want = pj.attention(QUERY, KEY, VALUE, encoding, random_params(encoding), is_causal=True)
    close(out, want[:, 7:], 1e-5)


# Heads ------------------------------------------------------------------------------------------------------------------


def test_slopes_of_each_head_where_a_call_sees_some_heads():
    want = pj.attention(QUERY, KEY, VALUE, pj.alibi(), is_causal=True)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = P(None, None, "model")

    def local(query, key, value, slopes):
        return pj.attention(query, key, value, pj.alibi(slopes), is_causal=True)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, cut, P("model")), out_specs=cut)
    close(sharded(QUERY, KEY, VALUE, jnp.asarray(alibi_slopes(N))), want, 1e-5)
    without = jax.shard_map(lambda *x: pj.attention(*x, pj.alibi(), is_causal=True), mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)
    with pytest.raises(ValueError, match="slope must be an array inside a shard_map over the axis 'model'"):
        without(QUERY, KEY, VALUE)


def test_slopes_are_checked():
    with pytest.raises(ValueError, match=r"slope must be positive for each head, got \[ 0.1 -0.1\]"):
        pj.alibi(np.asarray([0.1, -0.1]))
    with pytest.raises(ValueError, match=r"slope must be one number or one for each of 4 heads, got shape \(3,\)"):
        pj.attention(QUERY, KEY, VALUE, pj.alibi(np.ones(3)), is_causal=True)
    each = pj.attention(QUERY, KEY, VALUE, pj.cope_alibi(np.full(N, 0.3)), is_causal=True)
    close(each, pj.attention(QUERY, KEY, VALUE, pj.cope_alibi(0.3), is_causal=True))


# Far positions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [2**30, 1_700_000_000, 2**31 - 2 - T])
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "pallas"])
def test_late_positions_see_no_future(start, implementation):
    at = start + jnp.arange(T)
    own = dict(is_causal=True, implementation=implementation)
    got = pj.attention(QUERY, KEY, VALUE, pj.rope(), query_positions=at, key_positions=at, **own)
    close(got, pj.attention(QUERY, KEY, VALUE, pj.rope(), is_causal=True, implementation="xla"), 2e-5)


def test_decoding_at_late_positions():
    cache = kv_cache.init_cache(pj.rope(), DIMS, B, max_length=T + 5)
    for now in (slice(0, 7), slice(7, T)):
        at = 1_700_000_000 + jnp.arange(T)[None, now]
        out, cache = kv_cache.attend(QUERY[:, now], KEY[:, now], VALUE[:, now], pj.rope(), {}, cache, positions=at)
    close(out, pj.attention(QUERY, KEY, VALUE, pj.rope(), is_causal=True)[:, 7:], 2e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(query_positions=np.arange(T) + 2**31 - 5), r"query_positions must be below 2\^31 - 1, got 2147483654"),
        (dict(key_positions=np.arange(T, dtype=np.uint32) + 2**31), r"key_positions must be below 2\^31 - 1, got 2147483659"),
        (dict.fromkeys(("query_coordinates", "key_coordinates"), np.full((T, 1), 1.7e9)), r"query_coordinates must be below 2\^24"),
        (dict.fromkeys(("query_coordinates", "key_coordinates"), np.full((T, 1), 2**33)), r"query_coordinates must be below 2\^31"),
        (dict(segment_ids=np.full((B, T), 2**40)), r"segment_ids must be below 2\^31 - 1, got 1099511627776"),
    ],
)
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        pj.attention(QUERY, KEY, VALUE, pj.rope(), is_causal=True, **given)


# NaN that must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("hidden_by", ["mask", "segments"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_nobody_sees(bad, side, hidden_by, backend):
    if hidden_by == "mask":
        options = dict(mask=jnp.asarray(np.arange(T) != 5)[None, None, None])
    else:
        options = dict(segment_ids=(jnp.ones((B, T), int), jnp.where(jnp.arange(T) == 5, 0, 1) + jnp.zeros((B, 1), int)))
    key, value = (x.at[:, 5].set(bad) if side == name else x for name, x in (("key", KEY), ("value", VALUE)))

    def answers(key, value):
        def loss(query, key, value):
            out = BACKENDS[backend](prepare(query, key, value, pj.alibi(), {}, **options))
            return (out**2).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(QUERY, key, value)

    for got, want in zip(jax.tree.leaves(answers(key, value)), jax.tree.leaves(answers(KEY, VALUE)), strict=True):
        close(got, want, 1e-5)


def test_gates_of_one_segment_do_not_reach_another():
    x = jnp.ones((1, 1, 6)).at[..., 1].set(jnp.nan)
    segments = jnp.asarray([[0, 0, 1, 1, 2, 2]])
    high, _ = prefix_sum(x, segments)
    close(high[0, 0, 2:], [1, 2, 1, 2])
    gradient = jax.grad(lambda x: prefix_sum(x, segments)[0][..., 2:].sum())(x)
    close(gradient[0, 0, 2:], [2, 1, 2, 1])


def test_targets_and_logits_without_weight():
    logits = normal(4, 1, 3, 5).at[0, 2].set(jnp.nan)
    targets, weights = jnp.asarray([[1, 4, -100]]), jnp.asarray([[1.0, 1.0, 0.0]])
    losses, total, weight = cross_entropy(logits, targets, weights)
    log_p = jax.nn.log_softmax(logits[0, :2])
    close(losses, [[-log_p[0, 1], -log_p[1, 4], 0.0]])
    close(total, -log_p[0, 1] - log_p[1, 4])
    assert weight == 2.0 and np.isfinite(z_loss(logits, weights))
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets, weights)[1] + z_loss(logits, weights))(logits)
    assert np.isfinite(gradient).all() and not gradient[0, 2].any()


# Strict promotion ---------------------------------------------------------------------------------------------------------

STRICT = [*ENCODINGS, pj.sinusoidal(), pj.tupe(released=True), pj.cope(4, gates="keys", per_head=True), pj.cope_mlp(16)]


@pytest.mark.parametrize("encoding", STRICT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_promoted_implicitly(encoding, backend):
    params, low = random_params(encoding), [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE, TOKENS)]

    def loss(query, key, value, tokens, params):
        hidden = encoding.embed(params, tokens, pj.Tokens(jnp.arange(T)[None]))
        segments = jnp.ones((B, T), jnp.int32)
        own = dict(is_causal=True, hidden=hidden, segment_ids=segments, local_window_size=(9, 0), logits_soft_cap=5.0, scale=0.3)
        return BACKENDS[backend](prepare(query, key, value, encoding, params, **own)).astype(jnp.float32).sum()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss, range(5)), *low, params)


# Options as people write them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [[3, 0], (np.int64(3), np.int32(0)), (3, 0)])
def test_windows_of_numpy_integers_and_lists(window):
    got = pj.attention(QUERY, KEY, VALUE, local_window_size=window)
    close(got, pj.attention(QUERY, KEY, VALUE, is_causal=True, local_window_size=3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(scale=np.ones(T)), r"scale must be one number, got shape \(12,\)"),
        (dict(scale=np.inf), "scale must be positive and finite, got inf"),
        (dict(logits_soft_cap=np.inf), "logits_soft_cap must be positive and finite, got inf"),
        (dict(local_window_size=[1, 2, 3]), "local_window_size must be a non-negative integer or a pair"),
        (dict(local_window_size=2.0), "local_window_size must be a non-negative integer or a pair"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "pallas"])
def test_options_that_no_implementation_takes(options, words, implementation):
    with pytest.raises(ValueError, match=words):
        pj.attention(QUERY, KEY, VALUE, implementation=implementation, **options)


def test_a_traced_soft_cap_is_refused():
    with pytest.raises(ValueError, match="logits_soft_cap must be a concrete number, got a traced array"):
        jax.jit(lambda cap: pj.attention(QUERY, KEY, VALUE, logits_soft_cap=cap))(5.0)


def test_arrays_that_a_jitted_function_closes_over_are_known():
    cap, bad = jnp.float32(5.0), jnp.float32(-5.0)
    want = pj.attention(QUERY, KEY, VALUE, logits_soft_cap=5.0)
    close(jax.jit(lambda x: pj.attention(x, KEY, VALUE, logits_soft_cap=cap))(QUERY), want)
    for options in (dict(logits_soft_cap=bad), dict(logits_soft_cap=jnp.ones(2)), dict(scale=bad)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            jax.jit(lambda x, options=options: pj.attention(x, KEY, VALUE, **options))(QUERY)
    cache = kv_cache.init_cache(None, DIMS, B, max_length=T - 1)
    with pytest.raises(ValueError, match=f"max_length of the cache must be at least {T}"):
        jax.jit(lambda x: kv_cache.attend(x, KEY, VALUE, None, {}, cache))(QUERY)


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_linear_attention_over_segments_that_alternate(is_causal):
    segments = jnp.asarray(np.random.default_rng(5).integers(0, 3, (B, T)))
    got = pj.linear_attention(QUERY, KEY, VALUE, pj.rope(), {}, is_causal=is_causal, segment_ids=segments)
    for row in range(B):
        for segment in range(3):
            here = np.flatnonzero(np.asarray(segments[row]) == segment)
            own = dict(query_positions=jnp.asarray(here), key_positions=jnp.asarray(here), is_causal=is_causal)
            alone = pj.linear_attention(*(x[row : row + 1, here] for x in (QUERY, KEY, VALUE)), pj.rope(), {}, **own)
            close(got[row, here], alone[0], 1e-5)


CACHED = [
    pj.identity(),
    pj.rope(),
    pj.rope(theta=500.0),
    pj.cope(4),
    pj.cope(4, gates="keys"),
    pj.cope(4, gates="values"),
    pj.chain(pj.rope(), pj.cope(4)),
]


@pytest.mark.parametrize("made_for", CACHED, ids=str)
def test_the_cache_of_another_encoding_is_refused(made_for):
    cache = kv_cache.init_cache(made_for, DIMS, B, max_length=T)
    hidden = jnp.zeros((B, T, DIMS.embed_dim))
    for encoding in CACHED:

        def attend(params, encoding=encoding):
            return kv_cache.attend(QUERY, KEY, VALUE, encoding, params, cache, hidden=hidden if encoding.needs_hidden else None)

        params = random_params(encoding)
        if encoding == made_for:
            jax.eval_shape(attend, params)
            continue
        with pytest.raises(ValueError, match="encoding must be the one that the cache was created for") as caught:
            attend(params)
        assert f"{made_for}, got {encoding}" in str(caught.value)


def test_the_cache_of_an_encoding_with_arrays_takes_it_with_others():
    cache = kv_cache.init_cache(pj.rope(theta=jnp.float32(500.0)), DIMS, B, max_length=T)
    jax.eval_shape(lambda theta: kv_cache.attend(QUERY, KEY, VALUE, pj.rope(theta=theta), {}, cache), jnp.float32(900.0))
    with pytest.raises(ValueError, match=r"created for, rope\(theta='...'\), got rope\(\)"):
        kv_cache.attend(QUERY, KEY, VALUE, pj.rope(), {}, cache)


# Outside of jit -------------------------------------------------------------------------------------------------------

TWICE = """
import logging
import jax, jax.numpy as jnp, numpy as np
import posjax as pj

compiled = []
class Log(logging.Handler):
    def emit(self, record):
        if "Finished XLA compilation" in record.getMessage():
            compiled.append(record.getMessage())
logging.getLogger("jax").addHandler(Log())
logging.getLogger("jax").propagate = False

x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 130, 2, 8)), jnp.float32)
encoding = pj.chain(pj.rope(), pj.cope(4))
params = encoding.init(jax.random.key(0), pj.Dims(num_heads=2, head_dim=8))
cache = pj.init_cache(encoding, pj.Dims(num_heads=2, head_dim=8), 1, max_length=400)
calls = [
    lambda x=x: pj.attention(x, x, x, encoding, params, is_causal=True),
    lambda x=x: pj.linear_attention(x, x, x, pj.rope(), is_causal=True),
    lambda: pj.attend(x, x, x, encoding, params, cache),
]
if jax.__version_info__ >= (0, 12):  # 0.10 makes conditionals and scans anew for each gradient, and compiles them
    calls += [lambda call=calls[i]: jax.grad(lambda x: call(x).sum())(x) for i in (0, 1)]
with jax.log_compiles():
    for call in calls:
        jax.block_until_ready(call())
        first = len(compiled)
        jax.block_until_ready(call())
        print(first > 0, compiled[first:])
        compiled.clear()
"""


def test_a_second_call_outside_of_jit_compiles_nothing():
    # In a process of its own: the first call imports the kernels, which must not make the second one compile again.
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["True []"] * (5 if jax.__version_info__ >= (0, 12) else 3)
