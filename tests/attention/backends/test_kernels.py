"""What every kernel must do besides equal dense attention on random calls (test_kernels_properties.py does that).

Lengths, terms that users write, which tiles are visited, types, transformations, memory, compilation. A kernel joins in suite.py.
By hand: ``PYTHONPATH=tests python tests/attention/backends/test_kernels.py 16384`` prints the errors against float64 there.
"""

import functools
import math
import sys

import conftest  # noqa: F401, before jax where this file is a program
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import (
    KERNELS,
    agree,
    equations,
    every_kernel,
    normal,
    output_and_gradients,
    relative_errors,
)

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.call import prepare
from posjax.parallel.mesh import make_mesh

B, T, N, K, H = 2, 24, 4, 2, 8
TILE = (8, 8)
DIMS = pj.Dims(num_heads=N, head_dim=H, max_length=64, num_kv_heads=K)


def noisy_params(encoding, dims=DIMS, size=0.3):
    params = encoding.init(jax.random.key(0), dims)
    return jax.tree.map(lambda leaf: leaf + size * normal(9, *leaf.shape), params)


def random_operands(encoding=None, length=T, batch=B, heads=N, kv_heads=K):
    params = {} if encoding is None else noisy_params(encoding)
    sizes = {"query": (1, heads), "key": (2, kv_heads), "value": (3, kv_heads)}
    return {name: normal(seed, batch, length, n, H) for name, (seed, n) in sizes.items()} | {"params": params}


def run(kernel, encoding, operands, tile=TILE, **options):
    """The output of a kernel, or of dense attention for ``tile=None``."""
    query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
    return kernel(prepare(query, key, value, encoding, params, **options), **({"tile": tile} if tile else {}))


def answers(kernel, encoding, operands, **options):
    """Output and gradients of a kernel, compiled."""
    weight = normal(4, *operands["query"].shape)
    function = functools.partial(
        output_and_gradients, kernel, encoding, hidden=jnp.zeros((*operands["key"].shape[:2], 1)), weight=weight, **options
    )
    return jax.jit(function)(operands)


def with_tile(kernel, tile=TILE):
    return functools.partial(kernel, tile=tile)


# Long sequences against float64 --------------------------------------------------------------------------------------

LAST, SLOPE = 64, 0.01
LONG = pj.chain(pj.cope(LAST), pj.cope_alibi(slope=SLOPE))  # one count that ends early, one that goes on to the first token


def float64_rows(operands, rows, weight):
    """Output of some query rows of a head [R, H] and the gradients of its weighted sum, in float64, by the equations of CoPE."""

    def loss(operands):
        query, key, value, embedding = operands
        logits = query @ key.T / math.sqrt(H)
        visible = np.arange(len(key)) <= rows[:, None]
        gates = jnp.where(visible, jax.nn.sigmoid(logits), 0.0)
        counts = gates.sum(1, keepdims=True) - jnp.cumsum(gates, 1) + gates
        position = jnp.minimum(counts, LAST - 1)
        below = jnp.floor(position).astype(int)
        above = jnp.minimum(below + 1, LAST - 1)
        z = query @ embedding.T
        below_z, above_z = (jnp.take_along_axis(z, index, 1) for index in (below, above))
        bias = (position - below) * above_z + (1 - position + below) * below_z - SLOPE * counts
        out = jax.nn.softmax(jnp.where(visible, logits + bias, -jnp.inf)) @ value
        return (out * weight).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(operands)
    return out, *gradients


def long_errors(kernel, length: int) -> dict[str, float]:
    """Relative errors of some rows' output, and of the gradients of a loss that reads these rows."""
    rows = np.unique(np.linspace(length // 8, length - 1, 8).astype(int))
    weight = np.zeros((1, length, 1, H), np.float32)
    weight[0, rows, 0] = normal(4, len(rows), H)
    operands = random_operands(length=length, batch=1, heads=1, kv_heads=1)
    embedding = 0.3 * normal(5, LAST, H)
    operands["params"] = {"cope": {"embedding": embedding}}
    function = functools.partial(output_and_gradients, with_tile(kernel, None), LONG, is_causal=True)
    answer = jax.jit(function)(operands, jnp.zeros((1, length, 1)), jnp.asarray(weight))
    of_rows = [answer[name][0, rows, 0] for name in ("out", "query")]
    got = [*of_rows, answer["key"][0, :, 0], answer["value"][0, :, 0], answer["params"]["cope"]["embedding"]]
    with jax.enable_x64(True):
        single = [np.asarray(operands[name][0, :, 0], np.float64) for name in ("query", "key", "value")]
        truth = (jnp.asarray(single[0][rows]), jnp.asarray(single[1]), jnp.asarray(single[2]), jnp.asarray(embedding, jnp.float64))
        want = jax.device_get(jax.jit(float64_rows)(truth, rows, np.asarray(weight[0, rows, 0], np.float64)))
    names = ("out", "query", "key", "value", "embedding")
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for name, a, b in zip(names, got, want, strict=True)
    }


@every_kernel
def test_errors_do_not_grow_with_the_length(kernel):
    short, long = long_errors(kernel, 1024), long_errors(kernel, 4096)
    for name in short:
        assert short[name] < 2e-5, short
        assert long[name] < max(4 * short[name], 5e-6), (short, long)


# Terms that users write ----------------------------------------------------------------------------------------------


def clipped_distance(differences, args):
    return jnp.minimum(jnp.abs(differences[0]), 5)


def table_of_distance(params, inputs):
    return pj.ScoreModifications(biases=(pj.Bias(pj.Pair(clipped_distance), pj.Table(params["table"].T)),))


def log_sigmoid_times(x, args):
    return args * jax.nn.log_sigmoid(x + 1.0)


def forget(params, inputs):
    """A forgetting gate (Lin et al., arXiv:2503.02130) with a slope by head: sum of m_n log f_k for k = j+1 .. i."""
    gates = jnp.einsum("bskh,h->bsk", inputs.key, params["key"])[..., None]
    scan = pj.Scan(log_sigmoid_times, key=gates, args=params["slope"], include_key=False)
    return pj.ScoreModifications(biases=(pj.Bias(scan),))


def plain_attention(operands, bias_of, mask):
    """softmax(q.k / sqrt(H) + bias) v, [B, T, N, V]."""
    query, key, value = operands["query"], *(jnp.repeat(operands[name], N // K, axis=2) for name in ("key", "value"))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H) + bias_of(operands["params"], query, key)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)), value)


def plain_answers(operands, bias_of, mask):
    def loss(operands):
        out = plain_attention(operands, bias_of, mask)
        return (out * normal(4, *out.shape)).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(operands)
    return {"out": out} | gradients


@every_kernel
def test_a_learned_table_of_distances(kernel):
    encoding = pj.encoding("mine", attend=table_of_distance)
    operands = random_operands() | {"params": {"table": normal(5, 6, N)}}
    distance = np.minimum(np.abs(np.subtract.outer(np.arange(T), np.arange(T))), 5)

    def bias(params, query, key):
        return jnp.einsum("tsd,dn->nts", np.eye(6, dtype=np.float32)[distance], params["table"])

    agree(answers(with_tile(kernel), encoding, operands), plain_answers(operands, bias, True), operands)


@every_kernel
def test_a_scan_of_the_keys_own_gates(kernel):
    encoding = pj.encoding("forgetting", attend=forget, needs_causal=True)
    operands = random_operands() | {"params": {"key": normal(6, H), "slope": jnp.arange(1.0, N + 1) / N}}

    def bias(params, query, key):
        log_forget = jnp.moveaxis(jax.nn.log_sigmoid(jnp.einsum("bsnh,h->bsn", key, params["key"]) + 1.0), 1, 2)
        to_here = jnp.cumsum(log_forget, 2)
        return (to_here[:, :, :, None] - to_here[:, :, None]) * params["slope"][:, None, None]

    want = plain_answers(operands, bias, jnp.tril(jnp.ones((T, T), bool)))
    agree(answers(with_tile(kernel), encoding, operands, is_causal=True), want, operands)


# Tiles that nobody sees ----------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("encoding", [pj.alibi(), pj.cope(4)], ids=lambda encoding: encoding.name)
@pytest.mark.parametrize(
    ("poisoned", "rows", "options"),
    [
        (slice(32, None), slice(0, 32), {"is_causal": True}),
        (slice(0, 16), slice(32, None), {"local_window_size": (10, 0)}),
        (slice(0, 32), slice(32, None), {"is_causal": True, "segment_ids": jnp.asarray([[1] * 32 + [2] * 16])}),
    ],
    ids=["above the diagonal", "outside of the window", "in another segment"],
)
def test_tiles_that_the_mask_rules_out_are_not_visited(kernel, encoding, poisoned, rows, options):
    """NaN in a key or a value reaches every row whose tiles hold it, through a weight of zero too."""
    operands = random_operands(encoding, length=48, batch=1)
    for name in ("key", "value"):
        operands[name] = operands[name].at[:, poisoned].set(jnp.nan)

    def outcome(query, kernel, tile):
        out = run(kernel, encoding, operands | {"query": query}, tile, **options)[:, rows]
        return out.sum(), out

    gradient, out = jax.jit(jax.grad(functools.partial(outcome, kernel=kernel, tile=TILE), has_aux=True))(operands["query"])
    assert np.isfinite(out).all()
    assert np.isfinite(gradient[:, rows]).all()
    assert np.isnan(outcome(operands["query"], reference.attention, None)[1]).all()


# Types ---------------------------------------------------------------------------------------------------------------


@every_kernel
def test_bfloat16_within_its_rounding_of_float32_on_the_same_inputs(kernel):
    """Scores and sums are float32; weights and the result are rounded to 8 bits: 2^-9 each, and 2^-6 in gradients."""
    encoding = pj.chain(pj.cope(4), pj.alibi())
    operands = random_operands(encoding)
    low = operands | {name: operands[name].astype(jnp.bfloat16) for name in ("query", "key", "value")}
    got = answers(with_tile(kernel), encoding, low, is_causal=True)
    assert [got[name].dtype for name in ("out", "query", "key", "value")] == [jnp.bfloat16] * 4
    assert got["params"]["cope"]["embedding"].dtype == jnp.float32
    want = answers(reference.attention, encoding, jax.tree.map(lambda x: x.astype(jnp.float32), low), is_causal=True)
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    errors = relative_errors(got, want, operands)
    assert errors.pop("['out']") < 2.0**-7
    assert max(errors.values()) < 2.0**-6, errors


# Transformations -----------------------------------------------------------------------------------------------------


ENCODING = pj.chain(pj.rope(), pj.cope(4))


@functools.cache
def plain(kernel):
    operands = random_operands(ENCODING)
    operands["query"] = 4 * operands["query"]  # gates near zero and one: some rows saturate in the first tile, some do not
    return operands, answers(with_tile(kernel), ENCODING, operands, is_causal=True)


def one_loss(kernel, operands):
    return (run(kernel, ENCODING, operands, is_causal=True) * normal(4, B, T, N, H)).sum()


def same(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, want)


def test_the_plain_call_of_the_transformations_equals_dense_attention_eagerly():
    for kernel in KERNELS.values():
        operands, want = plain(kernel)
        agree(want, answers(reference.attention, ENCODING, operands, is_causal=True), operands)
        np.testing.assert_allclose(run(kernel, ENCODING, operands, is_causal=True), want["out"], atol=1e-5)


@every_kernel
def test_vmap_with_rows_that_saturate_in_different_tiles(kernel):
    operands, want = plain(kernel)
    silent = operands | {"query": jnp.abs(operands["query"]), "key": -jnp.abs(operands["key"])}  # gates at zero: never saturates
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), operands, silent)
    gradients = jax.jit(jax.vmap(jax.grad(functools.partial(one_loss, kernel))))(stack)
    same(jax.tree.map(lambda x: x[0], gradients), {name: want[name] for name in operands})
    dense_gradients = answers(reference.attention, ENCODING, silent, is_causal=True)
    same(jax.tree.map(lambda x: x[1], gradients), {name: dense_gradients[name] for name in operands})


@every_kernel
def test_gradients_inside_a_scan_and_through_a_checkpoint(kernel):
    operands, want = plain(kernel)

    def step(carry, query):
        gradients = jax.grad(jax.checkpoint(functools.partial(one_loss, kernel)))(operands | {"query": query})
        return carry + 1, gradients

    stack = jnp.stack([operands["query"], operands["query"][::-1]])
    _, gradients = jax.jit(lambda stack: jax.lax.scan(step, 0, stack))(stack)
    same(jax.tree.map(lambda x: x[0], gradients), {name: want[name] for name in operands})


@every_kernel
def test_a_batch_over_eight_devices(kernel):
    assert jax.device_count() == 8
    mesh = make_mesh()
    operands, want = plain(kernel)
    spread = {name: jnp.tile(operands[name], (8 // B, 1, 1, 1)) for name in ("query", "key", "value")}
    spread = jax.device_put(spread, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    whole = jax.device_put(operands["params"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def loss(operands):
        out = run(kernel, ENCODING, operands, is_causal=True)
        return (out * jnp.tile(normal(4, B, T, N, H), (8 // B, 1, 1, 1))).sum()

    gradients = jax.jit(jax.grad(loss))(spread | {"params": whole})
    for name in ("query", "key", "value"):
        same(gradients[name], jnp.tile(want[name], (8 // B, 1, 1, 1)))
    same(gradients["params"], jax.tree.map(lambda x: 8 // B * x, want["params"]))


def gradients_of_a_mesh_loss(encoding, implementation, operands):
    """Gradients through ``pj.attention`` of a weighted sum, compiled."""

    def loss(operands):
        query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
        out = pj.attention(query, key, value, encoding, params, is_causal=True, implementation=implementation)
        return (out * normal(4, *out.shape)).sum()

    return jax.jit(jax.grad(loss))(operands)


@functools.cache
def without_a_mesh(encoding):
    operands = random_operands(encoding, batch=4)
    return operands, gradients_of_a_mesh_loss(encoding, "xla", operands)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
@pytest.mark.parametrize("encoding", [ENCODING, pj.tupe(relative=True)], ids=lambda encoding: encoding.name)
def test_a_mesh_with_explicit_axes(encoding, implementation):
    """What jax.make_mesh makes: arrays carry their sharding in their type, and each operation must say what becomes of it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    operands, want = without_a_mesh(encoding)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "model"))
    spread = {name: leaf if name == "params" else jax.device_put(leaf, sharding) for name, leaf in operands.items()}
    with jax.set_mesh(mesh):
        got = gradients_of_a_mesh_loss(encoding, implementation, spread)
    assert got["query"].sharding.spec[:3] == ("data", None, "model")
    same(jax.device_get(got), want)


# Memory and compilation ----------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize(
    "encoding",
    [pj.rope(), pj.alibi(), pj.t5(), pj.tupe(relative=True), pj.cope(64), pj.cope_mlp(), ENCODING, None],
    ids=lambda encoding: encoding.name if encoding else "cope as long as the call",
)
def test_no_array_of_all_pairs_forward_or_backward(kernel, encoding):
    """The largest array of twice as long a call is twice as large, not four times; P grows along with T where it is None."""

    def largest(kernel, length):
        made = encoding or pj.cope(length + 1, per_head=True)
        x, hidden = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32), jnp.zeros((1, length, H))
        params = jax.eval_shape(lambda: made.init(jax.random.key(0), pj.Dims(1, H, max_length=length)))
        operands = {"query": x, "key": x, "value": x, "params": params}
        function = functools.partial(output_and_gradients, kernel, made, hidden=hidden, weight=hidden[:, :, None], is_causal=True)
        made = (variable.aval for equation in equations(jax.make_jaxpr(function)(operands).jaxpr) for variable in equation.outvars)
        return max(math.prod(array.shape) for array in made)

    once, twice, bound = largest(with_tile(kernel, (32, 32)), 1024), largest(with_tile(kernel, (32, 32)), 2048), 1024 * 1024 / 8
    assert twice <= 2.1 * once
    assert once <= bound
    assert largest(reference.attention, 1024) >= 8 * bound  # the same search, where there is such an array


MADE_TWICE = [
    lambda: pj.chain(pj.cope(4), pj.t5(6, 8)),
    lambda: pj.tupe(relative=True),
    lambda: pj.cope_mlp(8, gates="content"),
]


@every_kernel
@pytest.mark.parametrize("make", MADE_TWICE, ids=lambda make: make().name)
def test_equal_encodings_made_twice_compile_once_and_stay_on_the_device(kernel, make):
    traced = []

    @jax.jit
    def compiled(call):
        traced.append(1)
        return kernel(call, tile=TILE)

    operands = random_operands(make(), batch=1)
    params, scale = operands.pop("params"), jnp.float32(0.4)
    calls = [prepare(**operands, encoding=make(), params=params, is_causal=True, scale=scale) for _ in range(2)]
    first = compiled(calls[0])
    with jax.transfer_guard("disallow"):
        second = compiled(calls[1]).block_until_ready()
    assert len(traced) == 1
    np.testing.assert_array_equal(first, second)


if __name__ == "__main__":
    for name, kernel in KERNELS.items():
        print(name, sys.argv[1], long_errors(kernel, int(sys.argv[1])))
