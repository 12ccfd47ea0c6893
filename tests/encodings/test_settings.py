"""Settings: numbers of an encoding that change no shapes, and so may be traced, as one program of a sweep does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import (
    DIMS,
    TOKENS,
    B,
    H,
    K,
    N,
    T,
    agree,
    close,
    differs,
    layer,
    normal,
    output_and_gradients,
    random_params,
)

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.backends.kernel_biases import biases_by_form
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

pytestmark = pytest.mark.thorough  # test_ablation.py trains with traced settings in the README's command too

# Traced equals concrete ----------------------------------------------------------------------------------------------

# An encoding of one setting, and values of it.
SETTINGS = {
    "sinusoidal theta": (pj.sinusoidal, (30.0, 10_000.0)),
    "rope theta": (pj.rope, (30.0, 10_000.0)),
    "alibi slope": (pj.alibi, (0.03, 1.5)),
    "cope_alibi slope": (pj.cope_alibi, (0.03, 1.5)),
    "cope gate_bias": (lambda x: pj.cope(4, gate_bias=x), (-2.0, 0.0, 1.5)),  # 0, where known, is another program
    "cope gate_bias of keys": (lambda x: pj.cope(4, "keys", per_head=True, gate_bias=x), (-2.0, 1.5)),
    "cope_alibi gate_bias": (lambda x: pj.cope_alibi(gate_bias=x), (-2.0, 1.5)),
    "cope_mlp gate_bias": (lambda x: pj.cope_mlp(8, gate_bias=x), (-2.0, 1.5)),
    "cope clamp": (lambda x: pj.cope(6, clamp=x), (1, 3, 5)),
    "two at once": (lambda x: pj.chain(pj.rope(100.0 * x), pj.cope(6, gate_bias=-x, clamp=x)), (1.0, 3.0)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_traced_under_jit_and_vmap_equals_concrete_forward_and_backward(name):
    make, values = SETTINGS[name]
    params = random_params(make(values[0]))

    def everything(value):
        def loss(params, x):
            out = layer(make(value), params, x, is_causal=True)
            return (out * normal(9, *out.shape)).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, TOKENS)

    concrete = [jax.jit(functools.partial(everything, value))() for value in values]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *concrete)
    jax.tree.map(functools.partial(close, atol=1e-4), jax.jit(jax.vmap(everything))(jnp.asarray(values)), stacked)
    jax.tree.map(functools.partial(close, atol=1e-4), jax.jit(everything)(values[0]), concrete[0])
    assert all(differs(concrete[0][0][1], other[0][1]) for other in concrete[1:])


def test_a_sweep_runs_in_the_walk_over_tiles_too():
    def make(x):
        return pj.chain(pj.rope(x + 9.0), pj.cope(6, gate_bias=x, clamp=x + 3.0), pj.alibi(x + 3.0))

    def sweep(value, implementation):
        return layer(make(value), random_params(make(-2.0)), TOKENS, is_causal=True, implementation=implementation)

    values = (-2.0, 1.0)
    swept = jax.jit(jax.vmap(lambda value: sweep(value, "xla_chunked")))(jnp.asarray(values))
    close(swept, jnp.stack([jax.jit(functools.partial(sweep, value, "xla"))() for value in values]))


def test_arrays_that_are_known_may_be_settings_under_jit():
    """An operation of jax on one is traced there, and then has no truth value."""
    three = jnp.float32(3.0)

    @jax.jit
    def function(params):
        encoding = pj.chain(pj.rope(three), pj.alibi(three), pj.cope(6, gate_bias=three, clamp=three), pj.cope_alibi(three))
        return layer(encoding, params, TOKENS, is_causal=True)

    encoding = pj.chain(pj.rope(3.0), pj.alibi(3.0), pj.cope(6, gate_bias=3.0, clamp=3), pj.cope_alibi(3.0))
    params = random_params(encoding)
    close(function(params), layer(encoding, params, TOKENS, is_causal=True))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.count(" ") == 1])
def test_a_setting_has_no_gradient(name):
    """Not in any kernel, because the fused ones do not make one."""
    make, values = SETTINGS[name]
    params = random_params(make(values[0]))
    gradient = jax.jit(jax.grad(lambda x: layer(make(x), params, TOKENS, is_causal=True).sum()))
    assert gradient(float(values[0])) == 0.0


@pytest.mark.parametrize(
    "make, bad",
    [
        (pj.rope, -1.0),
        (pj.sinusoidal, -1.0),
        (pj.alibi, -1.0),
        (pj.cope_alibi, 0.0),
        *((lambda x: pj.cope(4, clamp=x), bad) for bad in (0, 4, -1, math.nan)),
    ],
)
def test_a_traced_value_that_cannot_be_gives_nan(make, bad):
    """Nothing can be raised; nothing that looks like an answer comes out. The first query sees one key only, at any distance."""
    out = jax.jit(lambda x, params: layer(make(x), params, TOKENS, is_causal=True))(bad, make(1).init(jax.random.key(0), DIMS))
    assert jnp.isnan(out[:, 1:]).all()


# Frequencies ---------------------------------------------------------------------------------------------------------

THETAS = np.asarray([2.5, 100.0, 10_000.0, 500_000.0, 1e7], np.float32)
POSITIONS = np.asarray([0, 1, 3, 100, 1023, 4095, 4096])


@pytest.mark.parametrize("width", [6, 64, 80])
def test_phases_of_a_traced_theta_are_off_by_rounding_alone(width):
    """Within 2e-7 of themselves: 2.3 * 2^-24 of the frequency and 2^-24 of the product (measured: 1.5e-7). At position 4,096 that
    is 8e-4 radians; a frequency taken as exp2(-ratio * log2(theta)) is off by 2e-6 of itself, 8e-3 radians there.
    """
    x, at = jnp.ones((1, len(POSITIONS), 1, width)), jnp.asarray(POSITIONS)[None]
    inputs = pj.AttentionInputs(x, x, x, *[pj.Tokens.at(at)] * 2, 1.0)
    (rotation,) = jax.jit(jax.vmap(lambda theta: pj.rope(theta).attend({}, inputs).transforms))(THETAS)
    want = POSITIONS[:, None] * THETAS.astype(np.float64)[:, None, None] ** (-np.arange(0, width, 2) / width)
    for phase in (rotation.query_phase, rotation.key_phase):
        assert (np.abs(np.asarray(phase, np.float64)[:, 0, :, 0] - want) <= 2e-7 * want).all()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_vectors_rotated_by_a_traced_theta_are_off_by_at_most_8e_4_at_4096(pairing):
    x, at = normal(0, 1, len(POSITIONS), 2, 16), jnp.asarray(POSITIONS)[None]
    inputs = pj.AttentionInputs(x, x, x, *[pj.Tokens.at(at)] * 2, 1.0)

    def rotate(theta):
        (rotation,) = pj.rope(theta, pairing=pairing).attend({}, inputs).transforms
        return rotation.applied(x, x)[0]

    rotated = jax.jit(jax.vmap(rotate))(THETAS)
    turn = np.exp(1j * POSITIONS[:, None] * THETAS.astype(np.float64)[:, None, None] ** (-np.arange(0, 16, 2) / 16))[:, :, None]
    channels = np.arange(16).reshape(2, 8) if pairing == "half" else np.arange(16).reshape(8, 2).T
    exact = np.asarray(x[0], np.float64)
    pair = (exact[..., channels[0]] + 1j * exact[..., channels[1]]) * turn
    got = np.asarray(rotated, np.float64)[:, 0]
    error = np.abs(got[..., channels[0]] + 1j * got[..., channels[1]] - pair)
    assert (error <= (2e-7 * POSITIONS[:, None, None] + 5e-7) * np.abs(pair)).all()


def test_sinusoids_of_a_traced_theta():
    at = pj.Tokens.at(POSITIONS)
    table = jax.jit(jax.vmap(lambda theta: pj.sinusoidal(theta).embed({}, jnp.zeros((1, len(POSITIONS), 10)), at)))(THETAS)
    phase = POSITIONS[:, None] / THETAS.astype(np.float64)[:, None, None] ** (np.arange(0, 10, 2) / 10)
    want = np.stack([np.sin(phase), np.cos(phase)], -1).reshape(len(THETAS), len(POSITIONS), 10)
    error = np.abs(np.asarray(table, np.float64)[:, 0] - want)
    assert (error <= 2e-7 * POSITIONS[:, None] + 5e-7).all()


# Against NumPy in float64 --------------------------------------------------------------------------------------------


def attended(x: dict, bias_of) -> np.ndarray:
    """[B, T, N, V]: causal attention as its formula stands. ``bias_of``: (logits, query by heads, key by heads) -> bias."""
    query, key, value = (np.swapaxes(x[name], 1, 2) for name in ("query", "key", "value"))
    key, value = (np.repeat(a, N // K, axis=1) for a in (key, value))
    logits = query @ np.swapaxes(key, 2, 3) / math.sqrt(H)
    scores = np.where(np.tri(T, dtype=bool), logits + bias_of(logits, query, x["params"]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.swapaxes(weights / weights.sum(-1, keepdims=True) @ value, 1, 2)


def counted(logits: np.ndarray, gate_bias: float) -> np.ndarray:
    gates = np.where(np.tri(T, dtype=bool), 1 / (1 + np.exp(-(logits + gate_bias))), 0.0)
    return np.cumsum(gates[..., ::-1], -1)[..., ::-1]


def interpolated(logits, query, params, gate_bias=0.0, clamp=math.inf):
    z = query @ params["embedding"].T
    position = np.minimum(counted(logits, gate_bias), min(clamp, z.shape[-1] - 1))
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, z.shape[-1] - 1)
    share = position - low
    return (1 - share) * np.take_along_axis(z, low, -1) + share * np.take_along_axis(z, high, -1)


def by_network(logits, query, params, gate_bias):
    hidden = np.maximum(counted(logits, gate_bias)[..., None] * params["weight_in"] + params["bias_in"], 0.0)
    return np.einsum("bnth,fh,bntsf->bnts", query, params["weight_out"], hidden)


REFERENCES = {
    "cope gate_bias": (pj.cope(5, gate_bias=-1.3), functools.partial(interpolated, gate_bias=-1.3)),
    "cope gate_bias of content": (pj.cope(5, "content", gate_bias=0.7), functools.partial(interpolated, gate_bias=0.7)),
    "cope clamp": (pj.cope(8, clamp=3), functools.partial(interpolated, clamp=3)),
    "cope both": (pj.cope(8, gate_bias=-0.5, clamp=2), functools.partial(interpolated, gate_bias=-0.5, clamp=2)),
    "cope_alibi": (pj.cope_alibi(0.4, gate_bias=-1.3), lambda logits, query, params: -0.4 * counted(logits, -1.3)),
    "cope_mlp": (pj.cope_mlp(8, gate_bias=-1.3), functools.partial(by_network, gate_bias=-1.3)),
    "alibi": (pj.alibi(0.4), lambda logits, query, params: -0.4 * np.abs(np.arange(T)[:, None] - np.arange(T))),
}
WALKS = {"xla": reference.attention, "xla_chunked": functools.partial(xla_chunked.attention, tile=(5, 4))}


@pytest.mark.parametrize(
    "name, walk",
    [*((name, "xla") for name in REFERENCES), *((name, "xla_chunked") for name in ("cope gate_bias", "cope clamp", "cope_mlp"))],
)
def test_values_and_gradients_equal_the_formula_in_float64(name, walk):
    """Gradients by central differences: what is interpolated is straight between positions, so their error is that of softmax."""
    encoding, bias_of = REFERENCES[name]
    operands = dict(query=normal(0, B, T, N, H), key=normal(1, B, T, K, H), value=normal(2, B, T, K, H))
    operands["params"] = random_params(encoding)
    weight, step = normal(3, B, T, N, H), 1e-6
    exact, heads = jax.tree.map(lambda x: np.asarray(x, np.float64), (operands, weight))
    got = jax.jit(lambda x: output_and_gradients(WALKS[walk], encoding, x, TOKENS, weight, is_causal=True))(operands)
    close(got["out"], attended(exact, bias_of), atol=5e-6)

    leaves, tree = jax.tree.flatten(exact)
    gradients = jax.tree.leaves({part: got[part] for part in exact})
    for number, gradient in enumerate(gradients):
        direction = np.random.default_rng(number).normal(size=leaves[number].shape)
        ends = [
            (attended(tree.unflatten([*leaves[:number], leaves[number] + h, *leaves[number + 1 :]]), bias_of) * heads).sum()
            for h in (step * direction, -step * direction)
        ]
        want = (ends[0] - ends[1]) / (2 * step)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction) / math.sqrt(direction.size)
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), want, rtol=0, atol=2e-5 * size + 1e-6)


# The clamp and the gates' bias ---------------------------------------------------------------------------------------

LONG = 48  # with gates of about a half the count passes the clamp


def long_operands(embedding) -> dict:
    query, key, value = (normal(seed, 1, LONG, 2, H) for seed in range(3))
    return dict(query=query, key=key, value=value, params={"embedding": embedding})


@pytest.mark.parametrize("per_head, walk", [(False, "xla"), (True, "xla_chunked")])
def test_cope_64_clamped_to_15_is_cope_16(per_head, walk):
    embedding, weight = normal(3, *((2,) if per_head else ()), 64, H), normal(4, 1, LONG, 2, H)

    def results(encoding, operands):
        walked = functools.partial(output_and_gradients, WALKS[walk], encoding, is_causal=True)
        return jax.jit(lambda x: walked(x, weight[:, :, 0], weight))(operands)

    operands = long_operands(embedding[..., :16, :])
    short = results(pj.cope(16, per_head=per_head), operands)
    clamped = results(pj.cope(64, per_head=per_head, clamp=15), long_operands(embedding))
    beyond = clamped["params"]["embedding"][..., 16:, :]
    np.testing.assert_array_equal(beyond, 0.0)
    clamped["params"]["embedding"] = clamped["params"]["embedding"][..., :16, :]
    assert jnp.abs(short["params"]["embedding"][..., 15, :]).min() > 1e-3  # the clamp was reached
    agree(clamped, short, operands, 1e-5)


def test_kernels_know_a_clamp_and_not_a_bias_of_gates():
    x = TOKENS[..., None, :H]
    params = random_params(pj.cope(4))

    def form(**options):
        biases = prepare(x, x, x, pj.cope(4, **options), params, is_causal=True).biases
        return jax.tree.structure(biases), biases_by_form(biases).counting is not None

    plain = form()
    for zero in (0, 0.0, -0.0, np.float32(0)):
        assert form(gate_bias=zero) == plain  # the functions and what kernels know the term by are part of the structure
    assert plain[1]
    assert form(clamp=2) == plain
    assert not form(gate_bias=-1.0)[1] and not jax.make_jaxpr(lambda x: form(gate_bias=x)[1])(0.0).jaxpr.outvars[0].val


def test_the_fused_kernel_sweeps_in_one_program():
    """Interpreted: theta, clamp and slope at once, mapped over."""
    operands = long_operands(normal(3, 8, H))

    def sweep(value, implementation):
        encoding = pj.chain(pj.rope(100.0 * value), pj.cope(8, clamp=value), pj.alibi(value / 8))
        query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
        return pj.attention(query, key, value, encoding, {"cope": params}, is_causal=True, implementation=implementation)

    got = jax.jit(jax.vmap(lambda value: sweep(value, "pallas")))(jnp.asarray([2.0, 6.0]))
    close(got, jnp.stack([sweep(value, "xla") for value in (2.0, 6.0)]))


@pytest.mark.parametrize(
    "encoding", [pj.cope(4, gate_bias=-1.0), pj.cope_alibi(gate_bias=-1.0), pj.cope_mlp(gate_bias=-1.0)], ids=lambda x: x.name
)
def test_a_bias_of_gates_is_refused_by_the_named_kernel_alone(encoding):
    length = 130  # past the length up to which None is dense
    params = encoding.init(jax.random.key(0), DIMS)
    x = jnp.ones((1, length, N, H))

    def call(implementation):
        return jax.jit(lambda x: pj.attention(x, x, x, encoding, params, is_causal=True, implementation=implementation)).trace(x)

    with pytest.raises(NotImplementedError, match=r"a bias that .* \(Scan of shifted_sigmoid, .*'xla_chunked' can"):
        call("pallas")
    assert "posjax_kernel" not in str(call(None).jaxpr)
