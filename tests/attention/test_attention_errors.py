"""Every bad argument of attention is refused by an error that names it, its value, and what would work."""

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from bad_inputs import DIMS, B, H, K, N, S, T, X, blocks, call, check_refused, made, ones
from flax import nnx

import posjax as pj


def linear(*args, **options):
    return call(*args, function=pj.linear_attention, **options)


def weights(encoding=None, params=None, **options):
    return pj.attention_weights(ones(B, T, N, H), ones(B, T, K, H), encoding, params, **options)


def broken_sticks(params, inputs):
    return pj.ScoreModifications(weights=pj.StickBreaking())


def in_linen(attention_fn):
    module = flax.linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=attention_fn, decode=True)
    variables = module.init(jax.random.key(0), X)
    return module.apply(variables, X[:, :1], mutable=["cache"])


def in_nnx(attention_fn):
    module = nnx.MultiHeadAttention(N, N * H, attention_fn=attention_fn, decode=True, rngs=nnx.Rngs(0))
    module.init_cache(X.shape)
    return module(X[:, :1])


BAD = {
    # positions
    "sinusoidal: odd width": (
        lambda: pj.sinusoidal().embed({}, ones(B, T, 7), pj.Tokens.at(jnp.arange(T)[None])),
        ValueError,
        r"embed_dim must be even for sinusoidal, got 7",
    ),
    "rope: odd channels": (
        lambda: call(pj.rope(fraction=0.3)),
        ValueError,
        r"fraction \* head_dim must be an even number.*got 0\.3 \* 8 = 2\.4",
    ),
    "learned: a long sequence": (
        lambda: pj.learned().embed(made(pj.learned()), ones(B, 6, N * H), pj.Tokens.at(jnp.arange(6)[None])),
        ValueError,
        r"positions must be below the max_length of learned, 5, got a sequence that needs 6; .*rope\(\)",
    ),
    "learned: a long sequence under jit": (
        lambda: jax.jit(pj.learned().embed)(made(pj.learned()), ones(B, 6, N * H), pj.Tokens(jnp.arange(6)[None])),
        ValueError,
        r"positions must be below the max_length of learned, 5, got a sequence that needs 6",
    ),
    "learned: a far position": (
        lambda: pj.learned().embed(made(pj.learned()), X, pj.Tokens.at(jnp.array([[0, 1, 2, 9]]))),
        ValueError,
        r"max_length of learned, 5, got a sequence that needs 10",
    ),
    "learned: a negative position": (
        lambda: pj.learned().embed(made(pj.learned()), X, pj.Tokens.at(jnp.array([[-1, 0, 1, 2]]))),
        ValueError,
        r"positions must not be negative, got -1",
    ),
    "tupe: a far position": (
        lambda: call(pj.tupe(), made(pj.tupe()), key_positions=jnp.array([0, 1, 2, 5])),
        ValueError,
        r"positions must be below the max_length of tupe, 5, got a sequence that needs 6",
    ),
    "tupe: a long sequence": (
        lambda: call(pj.tupe(), made(pj.tupe()), key=ones(B, S, K, H), value=ones(B, S, K, H)),
        ValueError,
        r"positions must be below the max_length of tupe, 5, got a sequence that needs 6",
    ),
    "positions: negative": (
        lambda: call(query_positions=jnp.arange(T) - 1),
        ValueError,
        r"query_positions must not be negative, got -1; exclude",
    ),
    "positions: floats": (lambda: call(key_positions=jnp.arange(4.0)), ValueError, r"key_positions must be integers, got float32"),
    "positions: too few": (
        lambda: call(query_positions=jnp.arange(3)),
        ValueError,
        r"query_positions must have shape \(4,\) or \(2, 4\), got \(3,\)",
    ),
    "positions: fractions while decoding": (
        lambda: pj.attend(
            *[ones(B, T, n, H) for n in (N, K, K)], None, None, pj.init_cache(None, DIMS, B, max_length=8), positions=ones(T)
        ),
        ValueError,
        r"positions must be integers, got float32",
    ),
    "structures: a leaf of other heads": (
        lambda: call(pj.encoding("mine", attend=lambda params, inputs: pj.ScoreModifications(weights=pj.Softmax(ones(3))))),
        ValueError,
        r"weights.sink of mine must be an array of numbers \[1 or 4, \.\.\.\], got float32\[3\]",
    ),
    "structures: a list of biases": (
        lambda: call(pj.encoding("mine", attend=lambda params, inputs: pj.ScoreModifications(biases=[]))),
        ValueError,
        r"biases of mine must be a tuple, each Bias, got \[\]",
    ),
    # query, key and value
    "query: three axes": (
        lambda: call(query=ones(T, N, H)),
        ValueError,
        r"query, key and value must all have four axes, or all three .*got \(4, 4, 8\), \(2, 4, 2, 8\), \(2, 4, 2, 8\)",
    ),
    "query: two axes": (lambda: call(query=ones(T, N)), ValueError, r"query must have shape \[B, T, N, H\], got \(4, 4\)"),
    "query: a list": (lambda: call(query=[1.0]), ValueError, r"query must have shape \[B, T, N, H\], got \[1\.0\]"),
    "query: integers": (
        lambda: call(query=ones(B, T, N, H, dtype=jnp.int32)),
        ValueError,
        r"query must be floating point, got int32",
    ),
    "query: empty": (lambda: call(query=ones(B, 0, N, H)), ValueError, r"query must not be empty, got shape \(2, 0, 4, 8\)"),
    "key: dtype": (
        lambda: call(key=ones(B, T, K, H, dtype=jnp.bfloat16)),
        ValueError,
        r"key must have the dtype of query, float32, got bfloat16",
    ),
    "key: batch": (lambda: call(key=ones(1, T, K, H)), ValueError, r"key must have the batch size of query, 2, got 1"),
    "key: width": (lambda: call(key=ones(B, T, K, 4)), ValueError, r"key must have the head dimension of query, 8, got 4"),
    "key: heads": (
        lambda: call(key=ones(B, T, 3, H)),
        ValueError,
        r"key must have a number of heads that divides the query's 4, got 3",
    ),
    "value: length": (
        lambda: call(value=ones(B, 3, K, H)),
        ValueError,
        r"value must have shape \[B, S, K, V\].*\(2, 4, 2\), got \(2, 3, 2, 8\)",
    ),
    "value: heads": (lambda: call(value=ones(B, T, 1, H)), ValueError, r"value must have shape .*\(2, 4, 2\), got \(2, 4, 1, 8\)"),
    "value: dtype": (
        lambda: call(value=ones(B, T, K, H, dtype=jnp.bfloat16)),
        ValueError,
        r"value must have the dtype .*float32, got bfloat16",
    ),
    "value: another width for value gates": (
        lambda: call(pj.cope_alibi(gates="values"), value=ones(B, T, K, 3), is_causal=True),
        ValueError,
        r"value must have the head dimension of query, 8, .*gates='values', got 3",
    ),
    # the call
    "encoding: a name": (lambda: call("rope"), TypeError, r"encoding must be a PositionalEncoding such as rope\(\), got 'rope'"),
    "encoding: not called": (lambda: call(pj.alibi), TypeError, r"got the class Alibi; call it: alibi"),
    "implementation: unknown": (
        lambda: call(implementation="cudnn"),
        ValueError,
        r"implementation must be None, 'xla', .*got 'cudnn'; 'pallas' runs the kernels for NVIDIA GPUs",
    ),
    "cope: in both directions": (
        lambda: call(pj.cope(8), made(pj.cope(8))),
        ValueError,
        r"is_causal must be True .*for cope, got is_causal=False and mask=None",
    ),
    "chain: contextual in both directions": (
        lambda: call(pj.chain(pj.rope(), pj.cope_alibi())),
        ValueError,
        r"is_causal must be True .*for rope\+cope_alibi, got is_causal=False",
    ),
    "block_sizes: a tuple": (lambda: blocks((128,) * 4), TypeError, r"block_sizes must be None or posjax.Blocks.*got \(128, 128"),
    "block_sizes: no lanes": (
        lambda: blocks(pj.Blocks(200, 256, 128, 512)),
        ValueError,
        r"block_q of block_sizes must be a positive multiple of 128, such as 256, got Blocks\(block_q=200",
    ),
    "block_sizes: zero": (
        lambda: blocks(pj.Blocks(128, 0, 128, 512)),
        ValueError,
        r"block_kv of block_sizes must be a positive multiple of block_kv_count, 128, such as 128, got .*block_kv=0",
    ),
    "block_sizes: a float": (
        lambda: blocks(pj.Blocks(128, 128, 128.0, 128)),
        ValueError,
        r"block_kv_count of block_sizes must be a positive multiple of 128, s",
    ),
    "block_sizes: a bool": (
        lambda: blocks(pj.Blocks(128, 128, True, 128)),
        ValueError,
        r"block_kv_count of block_sizes must be a positive multiple of 128, s",
    ),
    "block_sizes: keys that are no strips": (
        lambda: blocks(pj.Blocks(128, 384, 256, 768)),
        ValueError,
        r"block_kv of block_sizes must be a positive multiple of block_kv_count, 256, such as 512, got .*block_kv=384",
    ),
    "block_sizes: resident that is no tiles": (
        lambda: blocks(pj.Blocks(128, 256, 128, 640)),
        ValueError,
        r"block_kv_resident of block_sizes must be a positive multiple of block_kv, 256, such as 768, got .*block_kv_resident=640",
    ),
    "block_sizes: many queries": (
        lambda: blocks(pj.Blocks(4096, 128, 128, 128)),
        ValueError,
        r"block_q of block_sizes must be at most 2048, got Blocks\(block_q=4096",
    ),
    "block_sizes: of dense attention": (
        lambda: blocks(pj.Blocks(128, 128, 128, 128), "xla"),
        ValueError,
        r"block_sizes must be None with implementation='xla', got Blocks.*; they apply to implementation='pallas'",
    ),
    "block_sizes: of the walk in XLA": (
        lambda: blocks(pj.Blocks(128, 128, 128, 128), "xla_chunked"),
        ValueError,
        r"block_sizes must be None with implementation='xla_chunked', got",
    ),
    "scale: zero": (lambda: call(scale=0.0), ValueError, r"scale must be positive and finite, got 0\.0; None"),
    "scale: negative": (lambda: call(scale=-1), ValueError, r"scale must be positive and finite, got -1; None"),
    "scale: nan": (lambda: call(scale=float("nan")), ValueError, r"scale must be positive and finite, got nan; None"),
    "soft cap: zero": (
        lambda: call(logits_soft_cap=0.0),
        ValueError,
        r"logits_soft_cap must be positive and finite, got 0\.0; None",
    ),
    "mask: integers": (
        lambda: call(mask=ones(T, T, dtype=jnp.int32)),
        ValueError,
        r"mask must be boolean, True where .*, got int32",
    ),
    "mask: twice": (
        lambda: pj.attention(*[ones(B, T, N, H)] * 3, None, ones(T, T, dtype=bool), mask=ones(T, T, dtype=bool)),
        ValueError,
        r"mask must be passed once, got an array in place of the params as well",
    ),
    "bias: twice": (
        lambda: pj.attention(*[ones(B, T, N, H)] * 3, ones(T, T), bias=ones(T, T)),
        ValueError,
        r"bias must be passed once, got an array in place of the encoding as well",
    ),
    "bias: a mask": (
        lambda: call(bias=ones(T, T, dtype=bool)),
        ValueError,
        r"bias must be an array of numbers, got bool; pass a boolean array as mask",
    ),
    "bias: a number": (lambda: call(bias=1.0), ValueError, r"bias must be an array of numbers, got float"),
    "bias: shape": (
        lambda: call(bias=ones(K, T, T)),
        ValueError,
        r"bias must broadcast to \[B, N, T, S\] = \(2, 4, 4, 4\), got \(1, 2, 4, 4\)",
    ),
    "lengths: shape": (
        lambda: call(query_seq_lengths=jnp.array([1, 2, 3])),
        ValueError,
        r"query_seq_lengths must be integers \[2\], the length of every sequence, got int32\[3\]",
    ),
    "lengths: one number for a batch": (
        lambda: call(key_value_seq_lengths=3),
        ValueError,
        r"key_value_seq_lengths must be integers \[2\], .*got 3",
    ),
    "lengths: floats": (
        lambda: call(key_value_seq_lengths=jnp.array([1.0, 2.0])),
        ValueError,
        r"key_value_seq_lengths must be integers \[2\], .*got float32\[2\]",
    ),
    "lengths: negative": (
        lambda: call(query_seq_lengths=jnp.array([1, -2])),
        ValueError,
        r"query_seq_lengths must not be negative, got -2",
    ),
    "return_residual: in a kernel": (
        lambda: call(return_residual=True, implementation="pallas"),
        NotImplementedError,
        r"implementation='pallas' cannot return_residual=True; implementation='xla_chunked' can",
    ),
    "return_residual: broken sticks": (
        lambda: call(pj.encoding("sticks", attend=broken_sticks, needs_causal=True), is_causal=True, return_residual=True),
        ValueError,
        r"return_residual must be False for weights of StickBreaking, .*got True",
    ),
    "mask: a list": (lambda: call(mask=[[True]]), ValueError, r"mask must be boolean, .*got list"),
    "mask: shape": (
        lambda: call(mask=ones(3, T, dtype=bool)),
        ValueError,
        r"mask must broadcast to .*\(2, 4, 4, 4\), got \(1, 1, 3, 4\)",
    ),
    "mask: five axes": (
        lambda: call(mask=ones(1, 1, 1, T, T, dtype=bool)),
        ValueError,
        r"mask must broadcast to .*got \(1, 1, 1, 4, 4\)",
    ),
    "segment_ids: shape": (
        lambda: call(segment_ids=ones(T, dtype=jnp.int32)),
        ValueError,
        r"segment_ids must be integers \[2, 4\] for the queries, got int32\[4\]; a pair",
    ),
    "segment_ids: floats": (
        lambda: call(segment_ids=ones(B, T)),
        ValueError,
        r"segment_ids must be integers .* got float32\[2, 4\]",
    ),
    "segment_ids: one array for two lengths": (
        lambda: call(key=ones(B, S, K, H), value=ones(B, S, K, H), segment_ids=ones(B, T, dtype=jnp.int32)),
        ValueError,
        r"segment_ids must be integers \[2, 6\] for the keys, got int32\[2, 4\]; a pair",
    ),
    "segment_ids: half a pair": (
        lambda: call(segment_ids=(ones(B, T, dtype=jnp.int32), None)),
        ValueError,
        r"segment_ids must be integers \[2, 4\] for the keys, got None; a pair",
    ),
    "window: negative": (lambda: call(local_window_size=-1), ValueError, r"local_window_size must be a non-negative .*got -1"),
    "window: a float": (
        lambda: call(local_window_size=(2.0, 0)),
        ValueError,
        r"local_window_size must be .*pair .*got \(2\.0, 0\)",
    ),
    "window: three": (lambda: call(local_window_size=(1, 2, 3)), ValueError, r"local_window_size must be .*got \(1, 2, 3\)"),
    "weights: value gates without values": (
        lambda: weights(pj.cope_alibi(gates="values"), is_causal=True),
        ValueError,
        r"value must be an array .*gates='values'.*got None",
    ),
    "weights: value of another length": (
        lambda: weights(value=ones(B, 3, K, H)),
        ValueError,
        r"value must have shape .*got \(2, 3, 2, 8\)",
    ),
    # linear attention
    "linear: biases": (lambda: linear(pj.alibi()), ValueError, r"encoding must act only by rotation .*rope\(\), got alibi"),
    "linear: widened heads": (
        lambda: linear(pj.tupe(), made(pj.tupe())),
        ValueError,
        r"encoding must act only by rotation .*rope\(\), got tupe",
    ),
    "linear: TUPE-R": (
        lambda: linear(pj.tupe(relative=True), made(pj.tupe(relative=True))),
        ValueError,
        r"encoding must act only by rotation .*rope\(\), got tupe\(relative=True\)",
    ),
    "linear: feature map": (lambda: linear(feature_map="relu"), ValueError, r"feature_map must be 'elu' or 'exp', got 'relu'"),
    "linear: causal of two lengths": (
        lambda: linear(key=ones(B, S, K, H), value=ones(B, S, K, H), is_causal=True),
        ValueError,
        r"query and key must have the same length .*got 4 and 6",
    ),
    "linear: segments' shape": (
        lambda: linear(segment_ids=ones(B, 3, dtype=jnp.int32)),
        ValueError,
        r"segment_ids must be integers \[2, 4\], got int32\[2, 3\]",
    ),
    "linear: segments of floats": (lambda: linear(segment_ids=ones(B, T)), ValueError, r"segment_ids must be integers.*float32"),
    "linear: encoding": (lambda: linear("rope"), TypeError, r"encoding must be a PositionalEncoding .*got 'rope'"),
    "linear: query": (lambda: linear(query=ones(B, T, N)), ValueError, r"query must have shape \[B, T, N, H\], got \(2, 4, 4\)"),
    # inside Flax's modules
    "attention_fn: not an encoding": (
        lambda: pj.attention_fn(pj.rope)(*[ones(B, T, N, H)] * 3),
        TypeError,
        r"encoding must be a PositionalEncoding .*got the class Rope; call it: rope",
    ),
    "attention_fn: bias": (
        lambda: pj.attention_fn(pj.rope())(*[ones(B, T, N, H)] * 3, bias=ones(3, 1, T, T)),
        ValueError,
        r"bias must broadcast to .*\(2, 4, 4, 4\), got \(3, 1, 4, 4\)",
    ),
    "attention_fn: no key for dropout": (
        lambda: pj.attention_fn()(*[ones(B, T, N, H)] * 3, dropout_rate=0.5, deterministic=False),
        ValueError,
        r"dropout_rng must be a PRNG key with dropout_rate=0\.5 and deterministic=False, got None",
    ),
    "attention_fn: dropout of all": (
        lambda: pj.attention_fn()(*[ones(B, T, N, H)] * 3, dropout_rate=1.0),
        ValueError,
        r"dropout_rate must lie in \[0, 1\), got 1\.0",
    ),
    "attention_fn: einsums": (
        lambda: pj.attention_fn()(*[ones(B, T, N, H)] * 3, qk_attn_weights_einsum=jnp.einsum),
        ValueError,
        r"the attention module must have no custom einsums",
    ),
    "attention_fn: counts across": (
        lambda: pj.attention_fn(pj.cope_alibi())(ones(B, T, N, H), *[ones(B, S, N, H)] * 2),
        ValueError,
        r"is_causal must be True \(or a mask given\) for cope_alibi, got is_causal=False and mask=None",
    ),
    "linen: decoding": (
        lambda: in_linen(pj.attention_fn(pj.rope())),
        ValueError,
        r"decode must be True or False in attention_fn .* one query, 4 keys and a mask, got None; use True if .* False for cross",
    ),
    "nnx: decoding": (
        lambda: in_nnx(pj.attention_fn(pj.rope())),
        ValueError,
        r"decode must be True or False in attention_fn .* one query, 4 keys and a mask, got None; use True if .* False for cross",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_by_name(name):
    check_refused(BAD[name])


def test_a_named_implementation_that_cannot_says_which_can():
    with pytest.raises(NotImplementedError, match=r"implementation='pallas' cannot .*implementation='xla_chunked' can"):
        call(pj.cope_alibi(), is_causal=True, implementation="pallas")
