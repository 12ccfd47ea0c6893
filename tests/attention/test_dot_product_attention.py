"""What jax tests of ``jax.nn.dot_product_attention``, tested of ``attention`` beside it; and the calls of Flax's attention modules.

The cases are those of ``testDotProductAttention*`` in jax's tests/nn_test.py: dtypes, groups of heads, vmap, masks and their
combinations, the gradient of a bias, residuals, float64, and windows.
"""

import functools
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from suite import noisy, normal

import posjax as pj
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare

B, T, S, N, K, H = 2, 130, 150, 4, 2, 8  # more than one tile of 128 tokens
XLA = ["xla", "xla_chunked"]
of_jax = functools.partial(jax.nn.dot_product_attention, implementation="xla")
LENGTHS = jnp.array([T // 2, T // 4], jnp.int32), jnp.array([S // 4, S // 2], jnp.int32)


def of_posjax(implementation):
    """``attention`` under the strict promotion of ranks and dtypes; jax's tests forbid that of ranks."""

    def attend(*args, **options):
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            return pj.attention(*args, implementation=implementation, **options)

    return attend


def qkv(batch=B, length=T, keys=S, key_heads=K, dtype=jnp.float32):
    shapes = (batch, length, N, H), (batch, keys, key_heads, H), (batch, keys, key_heads, H)
    return [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]


def close(got, want, tolerance):
    """Compares pytrees in shapes, dtypes and numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=tolerance, rtol=tolerance)


def output_and_gradients(function, arrays):
    """The results of function(*arrays), and the gradients of all arrays for normal numbers as those of the results."""
    out, vjp = jax.vjp(function, *arrays)
    leaves, structure = jax.tree.flatten(out)
    return out, vjp(jax.tree.unflatten(structure, [normal(9, *leaf.shape).astype(leaf.dtype) for leaf in leaves]))


def agree(cases, tolerance=1e-5):
    """Compares the two functions of every case with each other, all in one program each: {name: (of posjax, of jax, arrays)}."""
    arrays = {name: case[2] for name, case in cases.items()}
    got, want = (
        jax.jit(lambda arrays, which=which: {name: output_and_gradients(cases[name][which], x) for name, x in arrays.items()})(
            arrays
        )
        for which in (0, 1)
    )
    for name in cases:
        close(got[name], want[name], tolerance.get(name, 1e-5) if isinstance(tolerance, dict) else tolerance)


# jax's tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", XLA)
def test_dtypes_groups_vmap_and_residuals(implementation):
    """Keys are repeated for their groups in what jax computes, as in jax's own test; ``None, None`` are its bias and mask."""
    ours = of_posjax(implementation)

    def repeated(query, key, value, **options):
        group = N // key.shape[2]
        arrays = query, jnp.repeat(key, group, 2), jnp.repeat(value, group, 2)
        if query.dtype != jnp.float16:
            return of_jax(*arrays, None, None, **options)
        return of_jax(*(x.astype(jnp.float32) for x in arrays), **options).astype(query.dtype)  # jax does not run it on a CPU

    def vmapped(*arrays):
        return jax.vmap(ours, in_axes=(0, 0, 0, None, None))(*arrays, None, None)

    residual = dict(return_residual=True)
    cases = {
        "bfloat16": (functools.partial(ours, **residual), functools.partial(repeated, **residual), qkv(dtype=jnp.bfloat16)),
        "float16": (vmapped, repeated, qkv(key_heads=1, dtype=jnp.float16)),
        "float32": (functools.partial(ours, **residual), functools.partial(repeated, **residual), qkv(key_heads=4)),
        "float32, vmap": (vmapped, repeated, qkv(length=7, keys=9)),
    }
    agree(cases, {"bfloat16": 0.03, "float16": 0.01})


def masks():
    """The cases of jax's test of masks, and two more: bias, mask and other arguments."""
    custom = jnp.tril(jnp.ones((T, S), bool))[None, None]
    bias = normal(5, 1, N, T, S)
    padding = dict(query_seq_lengths=LENGTHS[0], key_value_seq_lengths=LENGTHS[1])
    return {
        "bias": (bias, None, {}),
        "causal": (None, None, dict(is_causal=True)),
        "padding": (None, None, padding),
        "custom": (None, custom, {}),
        "causal, padding": (None, None, dict(is_causal=True) | padding),
        "custom, padding": (None, custom, padding),
        "bias, causal": (bias, None, dict(is_causal=True)),
        "bias, custom, padding": (bias, custom, padding),
        "causal, window": (None, None, dict(is_causal=True, local_window_size=(3, 2), scale=0.3)),
        "window to the left": (None, None, dict(local_window_size=(30, 0))),
    }


@pytest.mark.parametrize("implementation", XLA)
def test_masks_and_their_combinations(implementation):
    """Bias and mask stand in the fourth and fifth place, as in jax's test, which takes the gradient of the bias too."""
    cases = {}
    for name, (bias, mask, options) in masks().items():

        def function(attend, query, key, value, bias=None, mask=mask, options=options):
            return attend(query, key, value, bias, mask, **options)

        pair = (functools.partial(function, f) for f in (of_posjax(implementation), of_jax))
        cases[name] = (*pair, [*qkv(key_heads=N), *([] if bias is None else [bias])])
    agree(cases)


@pytest.mark.parametrize("implementation", XLA)
def test_the_gradient_of_a_bias_has_its_shape(implementation):
    """jax's test has a bias of full shape, alone and under vmap; others broadcast along every axis, by name and by position."""
    x = normal(0, B, T, N, H)
    mask = jnp.ones((1, 1, T), bool)

    def full(attend, x, bias):
        return attend(query=x, key=x, value=x, bias=bias, mask=mask, is_causal=False)

    cases = {"vmap": tuple(jax.vmap(functools.partial(full, f)) for f in (of_posjax(implementation), of_jax))}
    cases = {name: (*pair, [x, normal(1, B, N, T, T)]) for name, pair in cases.items()}
    for shape in [(T, T), (B, 1, 1, T), (1, N, T, 1), (1, 1, 1, 1)]:
        pair = (functools.partial(full, f) for f in (of_posjax(implementation), of_jax))
        cases[f"{shape}"] = (*pair, [x, normal(1, *shape)])
    agree(cases, {"(1, 1, 1, 1)": 1e-4})  # the gradient of one number for all pairs is a sum of rounding errors


@pytest.mark.parametrize("implementation", XLA)
def test_float64_and_a_mask_of_keys_have_no_infinities(implementation):
    with jax.enable_x64(), jax.debug_infs(True):
        query, key = jnp.zeros((5, 6, 11), jnp.float64), jnp.zeros((7, 3, 11), jnp.float64)
        out = pj.attention(query, key, key + 2.0, mask=jnp.arange(7) <= 3, implementation=implementation)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, 2.0, rtol=1e-6)


def test_windows_differ_without_a_mask():
    arrays = qkv(key_heads=N, keys=T)
    large, small = (pj.attention(*arrays, mask=None, local_window_size=size) for size in ((32, 32), (1, 1)))
    assert np.abs(large - small).max() > 0.1
    close(small, of_jax(*arrays, local_window_size=1), 1e-5)


def test_the_interpreted_tpu_kernel_takes_lengths():
    options = dict(is_causal=True, query_seq_lengths=LENGTHS[0], key_value_seq_lengths=LENGTHS[1])
    arrays = qkv()
    pair = (functools.partial(f, **options) for f in (of_posjax("pallas"), of_jax))
    agree({"padding": (*pair, arrays)}, 2e-5)


# Beyond jax's tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [*XLA, pytest.param("pallas", marks=pytest.mark.thorough)])
def test_padding_is_as_if_it_were_not_there_and_may_hold_nan(implementation):
    """Under encodings that read positions, or count along the keys; with segments as well, and with gradients."""
    lengths = [70, 130]
    arrays = [x.at[0, lengths[0] :].set(jnp.nan) for x in qkv(keys=T)]
    segments = jnp.asarray(np.repeat([[-3, 5]], B, 0).repeat([30, T - 30], 1), jnp.int32)
    encoding = pj.chain(pj.rope(), pj.alibi())
    options = dict(is_causal=True, implementation=implementation)
    counting = pj.cope(max_position=8)
    params = noisy(counting.init(jax.random.key(0), pj.Dims(N, H)))
    weight = normal(4, B, T, N, H)

    def padded(query, key, value):
        given = dict(query_seq_lengths=jnp.asarray(lengths), key_value_seq_lengths=jnp.asarray(lengths), **options)
        first = pj.attention(query, key, value, encoding, segment_ids=segments, **given)
        return first, pj.attention(query, key, value, counting, params, **given)

    def cut(query, key, value):
        def row(b, *more, **given):
            n = lengths[b]
            short = (x[b : b + 1, :n] for x in (query, key, value))
            ids = dict(segment_ids=segments[b : b + 1, :n]) if given.pop("segmented") else {}
            out = pj.attention(*short, *more, is_causal=True, implementation="xla", **ids)
            return jnp.pad(out, [(0, 0), (0, T - n), (0, 0), (0, 0)])

        both = ((encoding, {}), True), ((counting, params), False)
        return tuple(jnp.concatenate([row(b, *more, segmented=s) for b in range(B)]) for more, s in both)

    def results(function):
        loss = lambda *arrays: sum((out * weight).sum() for out in function(*arrays))  # noqa: E731
        return jax.jit(lambda *arrays: (function(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)))(*arrays)

    (out, grads), (want, want_grads) = results(padded), results(cut)
    close(out, want, 2e-5)
    assert (out[0][0, lengths[0] :] == 0).all()
    assert all((grad[0, lengths[0] :] == 0).all() for grad in grads)
    close(grads, jax.tree.map(jnp.nan_to_num, want_grads), 1e-4)


def itself(x, args):
    return x


def forget(params, inputs):
    """A bias that is the sum of one number per key and head over the keys after it: of ``hidden`` [B, S, N]."""
    return pj.ScoreModifications(biases=(pj.Bias(pj.Scan(itself, key=-(inputs.k.hidden[..., None] ** 2), include_key=False)),))


def test_padding_may_hold_nan_where_an_encoding_reads_hidden():
    encoding = pj.encoding("forgetting", attend=forget, needs_causal=True, needs_hidden=True)
    arrays, real = [*qkv(keys=T), normal(3, B, T, N).at[0, 70:].set(jnp.nan)], 70
    lengths = dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), jnp.array([real, T]))

    def function(query, key, value, hidden, **given):
        return pj.attention(query, key, value, encoding, {}, hidden=hidden, is_causal=True, **given)

    @jax.jit
    def results(*arrays):
        padded = [function(*arrays, implementation=name, **lengths) for name in ("xla_chunked", "pallas")]
        rows = (function(*(x[b : b + 1, :n] for x in arrays), implementation="xla") for b, n in enumerate((real, T)))
        return padded, jnp.concatenate([jnp.pad(row, [(0, 0), (0, T - row.shape[1]), (0, 0), (0, 0)]) for row in rows])

    padded, want = results(*arrays)
    close(padded, [want] * 2, 2e-5)


@pytest.mark.parametrize("implementation", XLA)
def test_queries_without_any_key_get_zeros_where_jax_spreads_them_over_all_keys(implementation):
    arrays = qkv(length=5, keys=7, key_heads=N)
    out, lse = pj.attention(*arrays, key_value_seq_lengths=jnp.array([0, 9]), implementation=implementation, return_residual=True)
    want, want_lse = of_jax(*arrays, key_value_seq_lengths=jnp.array([0, 9], jnp.int32), return_residual=True)
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_allclose(want[0], np.broadcast_to(arrays[2][0].mean(0), want[0].shape), atol=1e-6)
    close(out[1], want[1], 1e-5)
    close(lse[1], want_lse[1], 1e-5)
    assert (lse[0] < -1e38).all()
    assert (want_lse[0] < -1e38).all()


@pytest.mark.parametrize("implementation", XLA)
def test_minus_infinity_in_a_bias_masks(implementation):
    """Rows of nothing but -inf have zeros and no NaN, in gradients either."""
    arrays = qkv()
    allowed = jnp.asarray(np.random.default_rng(3).random((1, 1, T, S)) < 0.3).at[:, :, 3].set(False)

    def function(kind, *arrays):
        options = dict(mask=allowed) if kind == "mask" else dict(bias=jnp.where(allowed, 0.0, -jnp.inf))
        return pj.attention(*arrays, implementation=implementation, **options)

    agree({"": (functools.partial(function, "bias"), functools.partial(function, "mask"), arrays)})


def weights_only(weights):
    """An encoding that does nothing but turn scores into weights."""

    def attend(params, inputs):
        return pj.ScoreModifications(weights=weights)

    return pj.encoding("weights", attend=attend, needs_causal=isinstance(weights, pj.StickBreaking))


ENCODINGS = {
    "t5": pj.t5(),
    "cope": pj.cope(max_position=6),
    "sink": weights_only(pj.Softmax(jnp.array([0.5]))),
    "sticks": weights_only(pj.StickBreaking()),
}


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_bias_joins_the_scores_under_an_encoding(name, implementation):
    """Against the scores without it, to which the test adds it: under a soft cap, counts along the keys, a sink, broken sticks."""
    encoding, cap = ENCODINGS[name], 3.0 if name == "t5" else None
    params = noisy(encoding.init(jax.random.key(0), pj.Dims(N, H)))
    allowed = jnp.tril(jnp.ones((T, T), bool), -1 if name == "sticks" else 0)

    def ours(query, key, value, bias):
        options = dict(is_causal=True, logits_soft_cap=cap, implementation=implementation)
        return pj.attention(query, key, value, encoding, params, bias=bias, **options)

    def by_hand(query, key, value, bias):
        scores = scores_of(prepare(query, key, value, encoding, params, is_causal=True))[1] + bias
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        if name == "sticks":
            stays = jnp.where(allowed, jax.nn.log_sigmoid(-scores), 0.0)
            between = jnp.cumsum(stays[..., ::-1], -1)[..., ::-1] - stays
            weights = jnp.where(allowed, jnp.exp(jax.nn.log_sigmoid(scores) + between), 0.0)
        else:
            weights = jnp.where(allowed, jnp.exp(scores), 0.0)
            weights = weights / (weights.sum(-1, keepdims=True) + (math.exp(0.5) if name == "sink" else 0.0))
        return jnp.einsum("bkgts,bskh->btkgh", weights.reshape(B, K, -1, T, T), value).reshape(B, T, N, H)

    bias = normal(7, 1, N, T, 1) + normal(8, B, 1, 1, T)
    agree({name: (ours, by_hand, [*qkv(keys=T), bias])}, 2e-5)


@pytest.mark.parametrize("implementation", XLA)
def test_calls_without_a_batch(implementation):
    """Every array has the axes of a batch of one, less the first; lengths are numbers, or jax's arrays of one."""
    query, key, value = (x[0] for x in qkv(batch=1, length=9, keys=9))
    bias, mask = normal(5, N, 9, 9), jnp.asarray(np.random.default_rng(6).random((1, 9, 9)) < 0.8) | jnp.eye(9, dtype=bool)
    ours, keys = of_posjax(implementation), dict(key_value_seq_lengths=jnp.array([7]))
    lengths = dict(query_seq_lengths=jnp.array([5])) | keys

    def of_single(query, key, value, bias):
        single = dict(query_seq_lengths=5, key_value_seq_lengths=jnp.int32(7))
        return ours(query, key, value, bias, mask, **single), ours(query, key, value, return_residual=True, **keys)

    def of_jax_single(query, key, value, bias):
        return of_jax(query, key, value, bias, mask, **lengths), of_jax(query, key, value, return_residual=True, **keys)

    agree({"": (of_single, of_jax_single, [query, key, value, bias])})


def test_every_array_of_a_call_without_a_batch_loses_that_axis():
    query, key, value = (x[0] for x in qkv(batch=1, length=9, keys=9))
    segments, hidden, coordinates = jnp.array([1, 1, 1, 2, 2, 2, 2, 0, 0]), normal(7, 9, N * H), normal(8, 9, 1)
    encoding = pj.chain(pj.cope(4, gates="keys"), pj.alibi())
    params = noisy(encoding.init(jax.random.key(0), pj.Dims(N, H, num_kv_heads=K, embed_dim=N * H)))
    natural = dict(segment_ids=segments, hidden=hidden, query_coordinates=coordinates, key_coordinates=coordinates)
    options = dict(is_causal=True, query_positions=jnp.arange(9), key_positions=jnp.arange(9))
    batched = options | {name: x[None] for name, x in natural.items()}
    natural |= options
    pairs = {name: (natural[name],) * 2 for name in ("segment_ids", "hidden")}

    @jax.jit
    def results():
        with_batch = (x[None] for x in (query, key, value))
        want = pj.attention(*with_batch, encoding, params, **batched)
        want_weights = pj.attention_weights(query[None], key[None], encoding, params, **batched)
        outs = [pj.attention(query, key, value, encoding, params, **given) for given in (natural, natural | pairs)]
        return (*outs, pj.attention_weights(query, key, encoding, params, **natural)), (want[0], want[0], want_weights[0])

    close(*results(), 1e-6)


def test_numpy_arrays():
    arrays = [np.asarray(x, np.float64) for x in qkv(length=5, keys=7)]  # jax makes them float32
    bias, lengths = np.ones((5, 7), np.int32) * np.arange(7, dtype=np.int32), np.array([3, 7], np.int32)
    options = dict(bias=bias, key_value_seq_lengths=lengths)
    close(pj.attention(*arrays, **options), of_jax(*arrays, **options), 1e-5)


@pytest.mark.parametrize("implementation", XLA)
def test_a_bias_on_a_mesh_is_sharded_and_the_ring_passes_it_by(implementation):
    """Explicit and automatic axes shard batch and heads; an axis of sequences is left alone, as by a mask."""
    length, keys = 128, 160  # two devices can share them in a ring
    arrays = [*qkv(batch=4, length=length, keys=keys), normal(5, 4, N, 1, keys), normal(6, 1, N, length, 1)]

    def function(attend, query, key, value, *biases):
        return attend(query, key, value, bias=sum(biases))

    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)
    ours = of_posjax(implementation if implementation == "xla" else None)  # a named "xla_chunked" runs around the ring
    want = jax.jit(functools.partial(output_and_gradients, functools.partial(function, of_jax)))(arrays)
    with jax.set_mesh(mesh):
        close(jax.jit(functools.partial(output_and_gradients, functools.partial(function, ours)))(arrays), want, 1e-5)
        if implementation == "xla_chunked":
            with pytest.raises(NotImplementedError, match=r"cannot run this call: bias must be None"):
                jax.eval_shape(functools.partial(function, of_posjax(implementation)), *arrays)
    explicit = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    with jax.set_mesh(explicit):
        spec = jax.P("data", None, "tensor")
        query, key, value = (jax.device_put(x, spec) for x in arrays[:3])
        residual = functools.partial(of_posjax(implementation), return_residual=True)
        got = jax.jit(functools.partial(function, residual))(query, key, value, *arrays[3:])
        assert [jax.typeof(x).sharding.spec[:3] for x in got] == [(*spec,)] * 2
    close(got[0], want[0], 1e-5)


def test_lengths_and_a_bias_of_keys_make_no_array_of_all_pairs():
    """In the compiled gradient; dense attention, which does, is measured the same way."""
    length = 2048
    arrays = jax.eval_shape(lambda: (*qkv(batch=1, length=length, keys=length), jnp.zeros((1, N, 1, length)), jnp.array([700])))

    def temporary_bytes(implementation):
        def loss(query, key, value, bias, lengths):
            given = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation)
            return (pj.attention(query, key, value, bias=bias, **given) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("xla_chunked") < length * length < temporary_bytes("xla")  # a boolean for each pair


# Flax's attention modules ------------------------------------------------------------------------------------------------

WIDTH, SHORT, LONG = 16, 6, 9
X, Y = normal(0, B, SHORT, WIDTH), normal(1, B, LONG, WIDTH)
HOLES = jnp.asarray(np.random.default_rng(2).random((B, 1, SHORT, LONG)) < 0.6).at[..., 0].set(True)
DROPOUTS = {"shared": dict(dropout_rate=0.4), "own": dict(dropout_rate=0.4, broadcast_dropout=False), "none": {}}


def in_nnx(attention_fn, **options):
    return nnx.MultiHeadAttention(N, WIDTH, attention_fn=attention_fn, rngs=nnx.Rngs(0, dropout=1), **{"decode": False} | options)


def in_linen(attention_fn, **options):
    return flax.linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=attention_fn, **options)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_nnx_drops_out_crosses_and_sows_as_with_its_own_function(dropout):
    def results(attention_fn):
        outs = []
        for heads in (N, K):
            module = in_nnx(attention_fn, num_kv_heads=heads, **DROPOUTS[dropout])
            out, sown = nnx.capture(module, nnx.Intermediate)(X, Y, mask=HOLES, deterministic=False, sow_weights=True)
            outs.append((out, jax.tree.leaves(sown), module(X, Y, mask=HOLES, deterministic=True)))
        return outs

    got, want = results(pj.attention_fn()), results(nnx.dot_product_attention)
    close(got, want, 1e-5)
    assert got[0][1][0].shape == (B, N, SHORT, LONG)
    assert (np.abs(got[0][0] - got[0][2]).max() > 0.01) == (dropout != "none")


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_linen_drops_out_crosses_and_sows_as_with_its_own_function(dropout):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def results(attention_fn):
        module = in_linen(attention_fn, **DROPOUTS[dropout])
        variables = module.init(rngs, X, Y, deterministic=True)
        apply = functools.partial(module.apply, variables, X, Y, mask=HOLES, rngs=rngs)
        return apply(deterministic=False, sow_weights=True, mutable=["intermediates"]), apply(deterministic=True)

    got, want = results(pj.attention_fn()), results(flax.linen.dot_product_attention)
    close(got, want, 1e-5)
    assert (np.abs(got[0][0] - got[1]).max() > 0.01) == (dropout != "none")


def test_dropout_in_gradients_and_with_a_bias_under_an_encoding():
    """As the weights of ``attention_weights`` times what was kept; with two batch axes, no batch axis, and under jit."""
    shape = (2, 3, 5, N, H)
    query, key, value = (normal(seed, *shape) for seed in range(3))
    rng, keep = jax.random.key(3), 0.75
    options = dict(dropout_rng=rng, dropout_rate=1 - keep, deterministic=False)
    bias, encoding = normal(4, 2, 1, N, 5, 5), pj.chain(pj.rope(), pj.alibi())

    def ours(query, key, value, bias, broadcast=False, **more):
        attend = pj.attention_fn(encoding, is_causal=True)
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            return attend(query, key, value, bias=bias, broadcast_dropout=broadcast, **options, **more)

    def by_hand(query, key, value, bias, broadcast=False):
        batch = query.shape[:-3]
        query, key = (x.reshape(-1, 5, N, H) for x in (query, key))
        bias = jnp.broadcast_to(bias, (*batch, N, 5, 5)).reshape(-1, N, 5, 5)
        weights = pj.attention_weights(query, key, encoding, bias=bias, is_causal=True).reshape(*batch, N, 5, 5)
        drawn = (*(1,) * (weights.ndim - 2), 5, 5) if broadcast else weights.shape
        weights = weights * jax.random.bernoulli(rng, keep, drawn) / keep
        return jnp.einsum("...nts,...snh->...tnh", weights, value)

    agree({"two batch axes": (ours, by_hand, [query, key, value, bias])})
    one = [query[0, 0], key[0, 0], value[0, 0], bias[0, 0]]
    both = (functools.partial(f, broadcast=True) for f in (ours, by_hand))
    agree({"none": (*both, one)})


def test_flax_decodes_with_its_own_cache():
    """One token at a time equals the causal call on all of them, under encodings of positions and of counts."""
    encoding = pj.chain(pj.rope(), pj.cope(max_position=4))
    params = noisy(encoding.init(jax.random.key(0), pj.Dims(N, WIDTH // N)))
    whole, step = (pj.attention_fn(encoding, params, is_causal=True, decode=decode) for decode in (None, True))
    want = in_nnx(whole)(X)
    module = in_nnx(step, decode=True)
    module.init_cache(X.shape)
    close(jnp.concatenate([module(X[:, t : t + 1]) for t in range(SHORT)], 1), want, 1e-5)
    module = in_linen(step, decode=True)
    variables = module.init(jax.random.key(0), X)
    want = in_linen(whole).apply({"params": variables["params"]}, X)
    outs, cache = [], {"cache": variables["cache"]}
    for t in range(SHORT):
        out, cache = module.apply({"params": variables["params"]} | cache, X[:, t : t + 1], mutable=["cache"])
        outs.append(out)
    close(jnp.concatenate(outs, 1), want, 1e-5)


def test_cross_attention_has_positions_of_both_sides():
    """Each from 0, or where ``input_positions`` puts the queries; one query with a mask is of either kind, and says which."""
    query, key, value = qkv(length=SHORT, keys=LONG)
    attend = pj.attention_fn(pj.rope(), decode=False)
    mask = HOLES.astype(jnp.float32)
    close(attend(query, key, value, mask=mask), pj.attention(query, key, value, pj.rope(), mask=HOLES), 1e-6)
    at = jnp.arange(SHORT)[None] + jnp.array([[2], [3]])
    want = pj.attention(query, key, value, pj.rope(), query_positions=at, key_positions=jnp.arange(LONG))
    close(attend(query, key, value, input_positions=at), want, 1e-6)
    first, last = query[:, :1], mask[:, :, 4:5].at[..., LONG - 1].set(0.0).at[..., LONG - 2].set(1.0)
    for decode, position in ((False, 0), (True, LONG - 2)):
        want = pj.attention(first, key, value, pj.rope(), mask=last.astype(bool), query_positions=jnp.array([position]))
        close(pj.attention_fn(pj.rope(), decode=decode)(first, key, value, mask=last), want, 1e-6)
    close(pj.attention_fn(pj.rope())(first, key, value), pj.attention(first, key, value, pj.rope()), 1e-6)
