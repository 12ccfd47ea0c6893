"""Attention inside a user's own ``jax.shard_map``, with and without its check_vma, equals attention outside of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from suite import DIMS, B, D, H, K, N, T, normal, random_params

import posjax as pj
from posjax.attention import kv_cache
from posjax.encodings.relative import alibi_slopes
from posjax.models.transformer import Transformer, TransformerConfig, functional

QUERY, KEY, VALUE, HIDDEN, WEIGHT = (normal(n, B, T, *s) for n, s in enumerate([(N, H), (K, H), (K, H), (D,), (N, H)]))
SEGMENTS = jnp.asarray([[1] * 7 + [2] * 5, [3] * T], jnp.int32)
ROWS = P("data")


def mesh_of(kind=AxisType.Auto, **axes):
    count = int(np.prod([*axes.values()]))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:count])


def agree(got, want, tolerance=2e-5):
    """Every array within a fraction of its largest number, or of one."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


# Structures of all kinds ------------------------------------------------------------------------------------------------


def log_gate(x, args):
    return jax.nn.log_sigmoid(x)


def forget(params, inputs):
    return pj.ScoreModifications(biases=(pj.Bias(pj.Scan(log_gate, key=(inputs.k.hidden @ params["gate"])[..., None])),))


def moved_sticks_with_values(params, inputs):
    direction = jnp.einsum("bsd,dnh->bsnh", inputs.k.hidden, params["direction"])
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    values = pj.Bias(pj.Pair(clipped), pj.Table(params["table"], side="value"))
    transport = pj.Transport(direction, jnp.ones((*direction.shape[:3], 1)))
    return pj.ScoreModifications((transport,), (values,), pj.StickBreaking())


def clipped(differences, args):
    return jnp.clip(differences[0], -4, 4) + 4


CLAIMS = dict(needs_causal=True, needs_hidden=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """An encoding, made of the params of a device where its own numbers are cut; ``heads`` are the params' axes of heads."""

    make: object
    params: dict
    heads: dict = dataclasses.field(default_factory=dict)

    def specs(self, name):
        def spec(path, leaf):
            axis = self.heads.get(path[-1].key)
            return P() if axis is None else P(*[None] * axis, name)

        return jax.tree_util.tree_map_with_path(spec, self.params)


def learned(encoding, **heads):
    return Case(lambda params: (encoding, params), random_params(encoding), heads)


CASES = {
    "rope": Case(lambda params: (pj.rope(), {}), {}),
    "alibi": Case(lambda params: (pj.alibi(params["slopes"]), {}), {"slopes": jnp.asarray(alibi_slopes(N))}, {"slopes": 0}),
    "t5": learned(pj.t5(6, 8), bias=1),
    "cope": learned(pj.cope(4)),
    "cope_mlp": learned(pj.cope_mlp(hidden_dim=32)),
    "tupe": learned(pj.tupe(relative=True), query_kernel=1, key_kernel=1, reset=1, bias=1),
    "rope + cope": learned(pj.chain(pj.rope(), pj.cope(4))),
    "forgetting gate": Case(
        lambda params: (pj.encoding("forgetting", attend=forget, **CLAIMS), params), {"gate": normal(7, D, N)}, {"gate": 1}
    ),
    "moved sticks": Case(
        lambda params: (pj.encoding("moved_sticks", attend=moved_sticks_with_values, **CLAIMS), params),
        {"direction": normal(8, D, N, H), "table": normal(9, N, 9, H)},
        {"direction": 1, "table": 0},
    ),
}


def attend(case, implementation, query, key, value, hidden, segments, params):
    encoding, params = case.make(params)
    own = dict(is_causal=True, segment_ids=segments, hidden=hidden, implementation=implementation)
    return pj.attention(query, key, value, encoding, params, **own)


def differentiated(calls):
    """The outputs and the gradients of a dict of functions of (query, key, value, hidden, segments, params)."""

    def of_one(name, call):
        def loss(query, key, value, hidden, params):
            out = call(query, key, value, hidden, SEGMENTS, params)
            return (out * WEIGHT).sum(), out

        return jax.value_and_grad(loss, range(5), has_aux=True)(QUERY, KEY, VALUE, HIDDEN, CASES[name].params)

    return jax.jit(lambda: {name: of_one(name, call) for name, call in calls.items()})()


@functools.cache
def outside(names):
    return differentiated({n: lambda *args, n=n: attend(CASES[n], "xla", *args) for n in names})


def inside(names, implementation, mesh, **options):
    rows, heads = (name if name in mesh.shape else None for name in ("data", "cut"))

    def call(name):
        x = P(rows, None, heads)
        specs = x, x, x, P(rows), P(rows), CASES[name].specs(heads)
        local = lambda *args: attend(CASES[name], implementation, *args)  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=x, **options)

    return differentiated({name: call(name) for name in names})


@pytest.mark.parametrize("implementation", [pytest.param("xla", marks=pytest.mark.thorough), "xla_chunked"])
def test_outputs_and_gradients(implementation):
    names = "alibi", "t5", "tupe", "rope + cope", "forgetting gate", "moved sticks"
    agree(inside(names, implementation, mesh_of(data=2, cut=2)), outside(names))


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [("data",), ("cut",), ("data", "cut")], ids=" ".join)
@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_all_encodings(implementation, axes):
    agree(inside(CASES, implementation, mesh_of(**dict.fromkeys(axes, 2))), outside(tuple(CASES)))


@pytest.mark.parametrize("names", [("alibi",), pytest.param(("t5", "rope + cope"), marks=pytest.mark.thorough)], ids=" ".join)
def test_kernels_interpreted(names):
    agree(inside(names, "pallas", mesh_of(data=2, cut=2)), outside(names))


@pytest.mark.parametrize("implementation", ["xla_chunked", pytest.param("pallas", marks=pytest.mark.thorough)])
def test_without_check_vma(implementation):
    agree(inside(["alibi"], implementation, mesh_of(data=2, cut=2), check_vma=False), outside(("alibi",)))


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", pytest.param("pallas", marks=pytest.mark.thorough)])
def test_axes_that_are_left_to_the_compiler(implementation):
    mesh = mesh_of(data=2, model=2)
    agree(inside(["t5"], implementation, mesh, axis_names={"data"}), outside(("t5",)))


@pytest.mark.thorough
def test_a_ring_over_another_axis():
    length, mesh = 16, mesh_of(data=2, context=2)
    encoding = pj.chain(pj.rope(), pj.cope(4))
    arrays = *(normal(n, B, length, heads, H) for n, heads in enumerate([N, K, K])), random_params(encoding)

    def call(*args):
        return pj.attention(*args[:3], encoding, args[3], is_causal=True)

    def both(call):
        return jax.value_and_grad(lambda args: (call(*args) * normal(5, B, length, N, H)).sum())

    specs = dict(mesh=mesh, in_specs=(ROWS, ROWS, ROWS, P()), out_specs=ROWS, axis_names={"data"})
    sharded = jax.jit(both(jax.shard_map(call, **specs)))
    assert "ppermute" in str(sharded.trace(arrays).jaxpr)
    agree(sharded(arrays), jax.jit(both(call))(arrays))


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_default_above_128_tokens(check_vma):
    query, key, value = (normal(n, 2, 136, heads, H) for n, heads in enumerate([N, K, K]))

    def call(query, key, value):
        return pj.attention(query, key, value, pj.rope(), is_causal=True)

    sharded = jax.shard_map(call, mesh=mesh_of(data=2), in_specs=ROWS, out_specs=ROWS, check_vma=check_vma)
    want = pj.attention(query, key, value, pj.rope(), is_causal=True, implementation="xla")
    agree(jax.jit(sharded)(query, key, value), want)


@pytest.mark.parametrize("implementation", ["xla_chunked", pytest.param("pallas", marks=pytest.mark.thorough)])
def test_gradients_inside_are_summed_once(implementation):
    encoding = pj.t5(6, 8)

    def gradients(query, key, value, weight, params):
        def loss(query, key, value, params):
            return (pj.attention(query, key, value, encoding, params, implementation=implementation) * weight).sum()

        return jax.grad(loss, range(4))(query, key, value, params)

    args = QUERY, KEY, VALUE, WEIGHT, random_params(encoding)
    specs = dict(in_specs=(ROWS, ROWS, ROWS, ROWS, P()), out_specs=(ROWS, ROWS, ROWS, P()))
    agree(jax.jit(jax.shard_map(gradients, mesh=mesh_of(data=2), **specs))(*args), gradients(*args))


def test_without_jit():
    def gradients(call):
        return jax.grad(lambda *x: (call(*x) * WEIGHT).sum(), range(3))(QUERY, KEY, VALUE)

    def call(*args):
        return pj.attention(*args, pj.rope(), is_causal=True, implementation="xla_chunked")

    agree(gradients(jax.shard_map(call, mesh=mesh_of(data=2), in_specs=ROWS, out_specs=ROWS)), gradients(call))


@pytest.mark.parametrize("implementation", ["xla_chunked", "pallas"])
def test_arrays_that_are_the_same_everywhere(implementation):
    def call(*args):
        return pj.attention(*args, pj.rope(), is_causal=True, implementation=implementation)

    sharded = jax.jit(jax.shard_map(call, mesh=mesh_of(data=2), in_specs=P(), out_specs=P()))
    agree(sharded(QUERY, KEY, VALUE), call(QUERY, KEY, VALUE))


@pytest.mark.thorough
def test_linear_attention_and_weights():
    def calls(query, key, value, segments):
        linear = [
            pj.linear_attention(query, key, value, pj.rope(), is_causal=is_causal, segment_ids=ids)
            for is_causal in (False, True)
            for ids in (None, segments)
        ]
        return linear, pj.attention_weights(query, key, pj.alibi(), is_causal=True)

    args = QUERY, KEY, VALUE, SEGMENTS
    agree(jax.jit(jax.shard_map(calls, mesh=mesh_of(data=2), in_specs=ROWS, out_specs=ROWS))(*args), calls(*args))

    def gradients(call):
        return jax.grad(lambda *x: (call(*x, SEGMENTS) * WEIGHT).sum(), range(3))(QUERY, KEY, VALUE)

    def causal(query, key, value, segments):
        return pj.linear_attention(query, key, value, pj.rope(), is_causal=True, segment_ids=segments)

    agree(gradients(jax.jit(jax.shard_map(causal, mesh=mesh_of(data=2), in_specs=ROWS, out_specs=ROWS))), gradients(causal))


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_decoding(implementation):
    encoding = pj.chain(pj.rope(), pj.cope(4))
    params = random_params(encoding)

    def decoded(query, key, value, params):
        cache, outs = kv_cache.init_cache(encoding, DIMS, len(query), max_length=T), []
        for now in (slice(0, 7), slice(7, T)):
            some = (x[:, now] for x in (query, key, value))
            out, cache = kv_cache.attend(*some, encoding, params, cache, implementation=implementation)
            outs.append(out)
        return jnp.concatenate(outs, 1)

    sharded = jax.shard_map(decoded, mesh=mesh_of(data=2), in_specs=(ROWS, ROWS, ROWS, P()), out_specs=ROWS)
    want = pj.attention(QUERY, KEY, VALUE, encoding, params, is_causal=True, implementation="xla")
    agree(jax.jit(sharded)(QUERY, KEY, VALUE, params), want)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_a_model(kind):
    config = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=16, num_heads=2, max_length=T, attention=kind)
    with_params, params = functional(Transformer(config, pj.rope(), rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (B, T)), jnp.int32)

    def loss(params, tokens):
        return jax.lax.psum((with_params(params)(tokens) ** 2).sum(), "data")

    def decoded(params, tokens):
        model = with_params(params)
        first, cache = model.decode(tokens[:, :7], model.init_cache(len(tokens), T))
        return jnp.concatenate([first, model.decode(tokens[:, 7:], cache)[0]], 1)

    specs = dict(mesh=mesh_of(data=2), in_specs=(P(), ROWS))
    got = jax.jit(jax.shard_map(jax.value_and_grad(loss), out_specs=P(), **specs))(params, tokens)
    agree(got, jax.jit(jax.value_and_grad(lambda params: (with_params(params)(tokens) ** 2).sum()))(params), 1e-4)
    agree(jax.jit(jax.shard_map(decoded, out_specs=ROWS, **specs))(params, tokens), with_params(params)(tokens))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_are_lowered(platform):
    query, key = (jax.ShapeDtypeStruct((B, 256, heads, 64), jnp.bfloat16) for heads in (N, K))
    x = P("data", None, "cut")

    def loss(*args):
        call = lambda *args: pj.attention(*args, pj.rope(), is_causal=True)  # noqa: E731
        return jax.shard_map(call, mesh=mesh_of(data=2, cut=2), in_specs=x, out_specs=x)(*args).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, range(3))).trace(query, key, key).lower(lowering_platforms=(platform,)).as_text()
    assert program.count({"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]) >= 2
