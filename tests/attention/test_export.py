"""``jax.export``: programs of symbolic sizes, and one program for several platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suite import DIMS, H, K, N, normal, random_params

import posjax as pj
from posjax.attention import kv_cache
from posjax.models.transformer import Transformer, TransformerConfig, functional

ENCODINGS = pj.alibi(), pj.t5(6, 8), pj.chain(pj.rope(), pj.cope(4))
CALL = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")  # for which JAX promises no compatibility


def shapes(tree, **sizes):
    """The shapes of arrays, with other sizes for some of them: by their number, such as _12=t."""

    def of_leaf(x):
        return jax.ShapeDtypeStruct(tuple(sizes.get(f"_{size}", size) for size in x.shape), x.dtype)

    return jax.tree.map(of_leaf, tree)


def operands(batch, length, keys=None, heads=(N, K, K)):
    return tuple(normal(n, batch, keys or length if n else length, count, H) for n, count in enumerate(heads))


def agree(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


# Symbolic sizes -----------------------------------------------------------------------------------------------------------


def outputs_and_gradients(implementation, encodings=ENCODINGS):
    def of_all(query, key, value, segments):
        def loss(query, key, value, params, encoding):
            own = dict(is_causal=True, segment_ids=segments, implementation=implementation)
            out = pj.attention(query, key, value, encoding, params, **own)
            return (out * jnp.cos(jnp.arange(H))).sum(), out

        grad = jax.value_and_grad(loss, range(4), has_aux=True)
        return [grad(query, key, value, random_params(encoding), encoding) for encoding in encodings]

    return jax.jit(of_all)


@pytest.mark.parametrize("implementation", [*(pytest.param(i, marks=pytest.mark.thorough) for i in ("xla", "xla_chunked")), None])
def test_symbolic_batch_and_length(implementation):
    b, t = jax.export.symbolic_shape("b, t")
    segments = jnp.asarray([[1] * 7 + [2] * 5] * 3, jnp.int32)
    example = *operands(3, 12), segments
    exported = jax.export.export(outputs_and_gradients(implementation))(*shapes(example, _3=b, _12=t))
    longer = *operands(2, 136), jnp.asarray(np.arange(136) // 50)[None].repeat(2, 0).astype(jnp.int32)
    for args in (example, longer):
        agree(exported.call(*args), outputs_and_gradients("xla")(*args))


@pytest.mark.parametrize("implementation", ["xla", None])
def test_different_lengths_of_queries_and_keys(implementation):
    def call(query, key, value, query_segments, key_segments):
        return pj.attention(query, key, value, pj.rope(), segment_ids=(query_segments, key_segments), implementation=implementation)

    t, s = jax.export.symbolic_shape("t, s")
    args = *operands(2, 12, 19), jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 3, jnp.ones((2, 19), jnp.int32)
    agree(jax.export.export(jax.jit(call))(*shapes(args, _12=t, _19=s)).call(*args), call(*args))


def stick(params, inputs):
    values = pj.Bias(pj.Pair(clipped), pj.Table(params["table"], side="value"))
    return pj.ScoreModifications(biases=(values,), weights=pj.StickBreaking())


def clipped(differences, args):
    return jnp.clip(differences[0], -4, 4) + 4


@pytest.mark.parametrize("implementation", ["xla", None])
def test_weights_in_the_order_of_keys(implementation):
    encoding = pj.encoding("stick", attend=stick, needs_causal=True)
    params = {"table": normal(5, N, 9, H)}

    def call(*args):
        return pj.attention(*args, encoding, params, is_causal=True, implementation=implementation)

    (t,) = jax.export.symbolic_shape("t")
    exported = jax.export.export(jax.jit(call))(*shapes(operands(2, 12), _12=t))
    for args in (operands(2, 12), operands(2, 136)):
        agree(exported.call(*args), pj.attention(*args, encoding, params, is_causal=True, implementation="xla"))


def test_linear_attention():
    def call(query, key, value):
        return pj.linear_attention(query, key, value, pj.rope(), is_causal=True)

    b, t = jax.export.symbolic_shape("b, t")
    exported = jax.export.export(jax.jit(call))(*shapes(operands(3, 12), _3=b, _12=t))
    for args in (operands(3, 12), operands(2, 136)):
        agree(exported.call(*args), call(*args))


def test_kernels_need_known_sizes():
    (t,) = jax.export.symbolic_shape("t")
    call = jax.jit(lambda *args: pj.attention(*args, implementation="pallas"))
    with pytest.raises(NotImplementedError, match=r"query has symbolic sizes, \(2, t, 4, 8\).*implementation='xla_chunked' can"):
        jax.export.export(call)(*shapes(operands(2, 12), _12=t))


@pytest.mark.thorough
def test_a_cache_of_any_size():
    encoding = pj.chain(pj.rope(), pj.cope(4))
    params = random_params(encoding)

    def call(query, key, value, cache):
        return kv_cache.attend(query, key, value, encoding, params, cache)

    def exported(length, slots):
        example = *operands(2, 12), kv_cache.init_cache(encoding, DIMS, 2, max_length=19)
        return jax.export.export(jax.jit(call))(*shapes(example, _12=length, _19=slots))

    with pytest.raises(ValueError, match=r"query must be known to fit the cache.*constraints=\['s >= t'\]"):
        exported(*jax.export.symbolic_shape("t, s"))
    some = exported(*jax.export.symbolic_shape("t, s", constraints=["s >= t"]))
    args = operands(2, 12)
    want = pj.attention(*args, encoding, params, is_causal=True)
    for slots in (15, 200):
        cache, outs = kv_cache.init_cache(encoding, DIMS, 2, max_length=slots), []
        for now in (slice(0, 7), slice(7, 8), slice(8, 12)):
            out, cache = some.call(*(x[:, now] for x in args), cache)
            outs.append(out)
        agree(jnp.concatenate(outs, 1), want)


@pytest.mark.thorough
def test_a_model():
    config = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=16, num_heads=2, max_length=144)
    with_params, params = functional(Transformer(config, pj.learned(), rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 12)), jnp.int32)
    model = with_params(params)
    t, u = *jax.export.symbolic_shape("t"), *jax.export.symbolic_shape("u", constraints=["u <= 19"])
    logits = jax.export.export(jax.jit(lambda params, tokens: with_params(params)(tokens)))(shapes(params), shapes(tokens, _12=t))
    for some in (tokens, jnp.tile(tokens, (1, 12))):
        agree(logits.call(params, some), model(some))
    decode = jax.jit(lambda params, tokens, cache: with_params(params).decode(tokens, cache))
    cache = model.init_cache(2, 19)
    decode = jax.export.export(decode)(shapes(params), shapes(tokens, _12=u), shapes(cache))
    first, cache = decode.call(params, tokens[:, :7], cache)
    agree(jnp.concatenate([first, decode.call(params, tokens[:, 7:], cache)[0]], 1), model(tokens))


# Several platforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "length"), [(None, 136), ("pallas", 12)])
def test_one_program_for_all_platforms(implementation, length):
    def call(query, key, value):
        return pj.attention(query, key, value, pj.rope(), is_causal=True, implementation=implementation)

    def loss(*args):
        return call(*args).sum()

    args = operands(2, length)
    for function, counts in ((call, (1, 1)), (jax.grad(loss, range(3)), (2, 3))):
        exported = jax.export.export(jax.jit(function), platforms=("tpu", "cuda", "cpu"), disabled_checks=[CALL])(*args)
        text = exported.mlir_module()
        assert (text.count("tpu_custom_call"), text.count("__gpu$xla.gpu.triton")) == counts  # each kernel once
        if function is call:
            agree(exported.call(*args), pj.attention(*args, pj.rope(), is_causal=True, implementation="xla"))


def test_a_platform_whose_kernel_does_not_support_the_call():
    wide = [jax.ShapeDtypeStruct((1, 128, 1, 512), jnp.float32)] * 3
    call = jax.jit(lambda *args: pj.attention(*args, implementation="pallas"))
    for platforms in (("cuda",), ("tpu", "cuda")):
        with pytest.raises(NotImplementedError, match="must be lowered where a kernel supports the call, got 'cuda'"):
            jax.export.export(call, platforms=platforms)(*wide)
