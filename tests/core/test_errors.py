"""Every bad input of the core is refused by an error that names the argument, says what it was, and what would work."""

import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import posjax as pj

B, T, S, N, K, H = 2, 4, 6, 4, 2, 8
DIMS = pj.Dims(num_heads=N, head_dim=H, max_length=5, num_kv_heads=K)
X = jnp.ones((B, T, N * H))


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def call(encoding=None, params=None, query=None, key=None, value=None, function=pj.attention, **options):
    """A call that works, but for what is given."""
    query = ones(B, T, N, H) if query is None else query
    key = ones(B, T, K, H) if key is None else key
    value = ones(B, T, K, H) if value is None else value
    return function(query, key, value, encoding, params, **options)


def linear(*args, **options):
    return call(*args, function=pj.linear_attention, **options)


def blocks(sizes, implementation="pallas"):
    return call(block_sizes=sizes, implementation=implementation)


def made(encoding):
    return encoding.init(jax.random.key(0), DIMS)


def with_params(encoding, **leaves):
    return call(encoding, made(encoding) | leaves, is_causal=True)


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


# (what is tried, the exception, a pattern its message must match: the argument ... the value ... what would work)
BAD = {
    # sizes
    "Dims: no heads": (lambda: pj.Dims(0, 8), ValueError, r"num_heads must be an integer of at least 1, got 0"),
    "Dims: a float": (lambda: pj.Dims(4, 8.0), ValueError, r"head_dim must be an integer of at least 1, got 8\.0"),
    "Dims: a bool": (lambda: pj.Dims(True, 8), ValueError, r"num_heads must be an integer of at least 1, got True"),
    "Dims: negative width": (lambda: pj.Dims(4, 8, embed_dim=-3), ValueError, r"embed_dim must be .* at least 1, got -3"),
    "Dims: no length": (lambda: pj.Dims(4, 8, max_length=0), ValueError, r"max_length must be .* at least 1, got 0"),
    "Dims: key heads": (lambda: pj.Dims(4, 8, num_kv_heads=3), ValueError, r"num_kv_heads must divide num_heads=4, got 3"),
    # making an encoding
    "sinusoidal: theta": (lambda: pj.sinusoidal(0.0), ValueError, r"theta must be positive, got 0\.0; 10_000"),
    # several axes
    "mrope: two sections": (lambda: pj.mrope((4, 4)), ValueError, r"sections must be .*such as \(16, 24, 24\), got \(4, 4\)"),
    "mrope: negative": (lambda: pj.mrope((-1, 4, 1)), ValueError, r"sections must be numbers of pairs .*got \(-1, 4, 1\)"),
    "mrope: no pairs": (lambda: pj.mrope((0, 0, 0)), ValueError, r"sections must be numbers of pairs .*got \(0, 0, 0\)"),
    "mrope: floats": (lambda: pj.mrope((1.0, 2, 1)), ValueError, r"sections must be .*got \(1\.0, 2, 1\)"),
    "mrope: layout": (lambda: pj.mrope((2, 1, 1), "strided"), ValueError, r"layout must be 'blocks'.*got 'strided'"),
    "mrope: no such pairs": (
        lambda: pj.mrope((1, 1, 6), "interleaved"),
        ValueError,
        r"sections must fit layout='interleaved', in which pairs 1, 4, .* must exist, got \(1, 1, 6\)",
    ),
    "mrope: not alternating": (
        lambda: pj.mrope((1, 3, 1), "alternating"),
        ValueError,
        r"sections must fit layout='alternating', in which height and width .*same number of pairs, got \(1, 3, 1\)",
    ),
    "mrope: another sum": (
        lambda: call(pj.mrope((16, 24, 24))),
        ValueError,
        r"sections of mrope must sum to 4, half of the 8 rotated channels, got \(16, 24, 24\) with the sum 64",
    ),
    "mrope: a scaling by length": (
        lambda: pj.mrope((2, 1, 1), scaling=pj.dynamic_ntk_scaling(2.0, 100)),
        ValueError,
        r"scaling of mrope must be .*does not depend on the length.*got dynamic_ntk_scaling",
    ),
    "mrope: two coordinates": (
        lambda: call(pj.mrope((2, 1, 1)), query_coordinates=jnp.zeros((T, 2)), key_coordinates=jnp.zeros((T, 2))),
        ValueError,
        r"query_coordinates must have 3 axes for mrope, got 2",
    ),
    "mrope_positions: a number": (lambda: pj.mrope_positions(7), ValueError, r"parts must be a list such as .*got 7"),
    "mrope_positions: two sizes": (lambda: pj.mrope_positions([(4, 4)]), ValueError, r"parts must be .*grids.*got \(4, 4\)"),
    "mrope_positions: no frames": (lambda: pj.mrope_positions([(0, 4, 4)]), ValueError, r"parts must be .*got \(0, 4, 4\)"),
    "mrope_positions: fewer than none": (
        lambda: pj.mrope_positions([-2]),
        ValueError,
        r"parts must have 0 to 16777216 tokens each, got -2",
    ),
    "mrope_positions: too many": (lambda: pj.mrope_positions([10**12]), ValueError, r"parts must have 0 to .*got 10+"),
    "mrope_positions: too large": (
        lambda: pj.mrope_positions([(9, 10**6, 10**6)]),
        ValueError,
        r"parts must have .*patches each, got",
    ),
    "mrope_positions: too late": (
        lambda: pj.mrope_positions([(2, 2, 2, 1e30)]),
        ValueError,
        r"coordinates must be below 2\^31 - 1, got .*tokens per second",
    ),
    "mrope_positions: half a token": (
        lambda: pj.mrope_positions([(1, 3, 4)]),
        ValueError,
        r"height and width of parts must be multiples of merge_size=2, got \(1, 3, 4\)",
    ),
    "mrope_positions: backwards": (
        lambda: pj.mrope_positions([(2, 2, 2, -1.0)]),
        ValueError,
        r"seconds must be at least 0, got -1",
    ),
    "mrope_positions: merge": (lambda: pj.mrope_positions([1], merge_size=0), ValueError, r"merge_size must be .* 1, got 0"),
    "axial_rope: one axis": (lambda: pj.axial_rope(1), ValueError, r"axes must be an integer .*2.*got 1"),
    "axial_rope: five axes": (lambda: pj.axial_rope(5), ValueError, r"axes must be an integer from 2 to 4, got 5"),
    "axial_rope: no widths": (
        lambda: pj.axial_rope(layout="widths"),
        ValueError,
        r"widths must be given for layout='widths' and no other, got None",
    ),
    "axial_rope: odd widths": (
        lambda: pj.axial_rope(2, "widths", widths=(3, 5)),
        ValueError,
        r"widths must be even .*for 2 axes.*got \(3, 5\)",
    ),
    "axial_rope: too wide": (
        lambda: call(pj.axial_rope(2, "widths", widths=(6, 4))),
        ValueError,
        r"widths of axial_rope must sum .*head_dim=8, got \(6, 4\)",
    ),
    "axial_rope: order": (
        lambda: pj.axial_rope(order=(1, 2)),
        ValueError,
        r"order must be a permutation of \(0, 1\), got \(1, 2\)",
    ),
    "axial_rope: jitter": (lambda: pj.axial_rope(jitter=0.5), ValueError, r"jitter must be at least 1, got 0\.5"),
    "axial_rope: channels": (
        lambda: call(pj.axial_rope(3)),
        ValueError,
        r"fraction \* head_dim must be a multiple of 6 for 3 axes .*got 8; layout='widths'",
    ),
    "axial_coordinates: no patches": (lambda: pj.axial_coordinates((0, 3)), ValueError, r"sizes must be 1 to 4 .*got \(0, 3\)"),
    "axial_coordinates: normalize": (
        lambda: pj.axial_coordinates((2, 3), normalize="mean"),
        ValueError,
        r"normalize must be 'separate'.*got 'mean'",
    ),
    "axial_coordinates: both": (
        lambda: pj.axial_coordinates((2, 3), normalize="max", pretrained=(4, 4)),
        ValueError,
        r"pretrained must be 2 sizes, without normalize, got \(4, 4\) and normalize='max'",
    ),
    "rope_mixed: channels": (
        lambda: pj.rope_mixed().init(jax.random.key(0), pj.Dims(4, 6)),
        ValueError,
        r"head_dim must be a multiple of 4 .*got 6",
    ),
    "rope_mixed: frequencies": (
        lambda: call(pj.rope_mixed(), {"frequencies": ones(2, N, H)}),
        ValueError,
        r"params\['frequencies'\] of rope_mixed must have shape \(2, 2, 4\), got \(2, 4, 8\)",
    ),
    "xpos: base": (lambda: pj.xpos(0.0), ValueError, r"scale_base must be positive, got 0"),
    "xpos: gamma": (lambda: pj.xpos(gamma=-0.4), ValueError, r"gamma must be positive, got -0\.4"),
    "xpos: out of reach": (
        lambda: call(pj.xpos(), query_positions=jnp.arange(T) + 40_000),
        ValueError,
        r"positions must be within 28328 of centre=0 for xpos in float32, got one at a distance of 40003; a larger scale_base",
    ),
    "pope: delta": (lambda: call(pj.pope(), {}), ValueError, r"params of pope must have the key 'delta', got \{\}"),
    "log_scale: length": (lambda: pj.log_scale(0), ValueError, r"length must be an integer of at least 1, got 0"),
    "log_scale: beta": (lambda: pj.log_scale(beta=-1.0), ValueError, r"beta must be at least 0, got -1"),
    "log_scale: rule": (
        lambda: pj.log_scale(rule="yarn"),
        ValueError,
        r"rule must be 'llama4', 'ministral3' or 'inkling', got 'yarn'",
    ),
    # rope
    "rope: theta": (lambda: pj.rope(theta=-1.0), ValueError, r"theta must be positive, got -1\.0; 10_000"),
    "rope: several thetas": (lambda: pj.rope(jnp.ones(3)), ValueError, r"theta must be one number, .*got shape \(3,\); 10_000"),
    "rope: several traced thetas": (
        lambda: jax.jit(lambda theta: pj.rope(theta))(jnp.ones(3)),
        ValueError,
        r"theta must be one number, .*got shape \(3,\); 10_000",
    ),
    "rope: fraction 0": (lambda: pj.rope(fraction=0.0), ValueError, r"fraction must lie in \(0, 1\], got 0\.0"),
    "rope: fraction 1.5": (lambda: pj.rope(fraction=1.5), ValueError, r"fraction must lie in \(0, 1\], got 1\.5"),
    "rope: pairing": (lambda: pj.rope(pairing="neox"), ValueError, r"pairing must be 'half' or 'interleaved', got 'neox'"),
    "convert_pairing: source": (
        lambda: pj.convert_pairing(X, source="gptj", target="half"),
        ValueError,
        r"must be 'half' or 'interleaved', got 'gptj'",
    ),
    "t5: buckets": (lambda: pj.t5(num_buckets=1), ValueError, r"num_buckets must be .* at least 2, got 1"),
    "t5: buckets of both directions": (
        lambda: pj.t5(num_buckets=3, bidirectional=True),
        ValueError,
        r"num_buckets must be .* at least 4, got 3",
    ),
    "t5: odd buckets": (
        lambda: pj.t5(num_buckets=7, bidirectional=True),
        ValueError,
        r"num_buckets must be even with bidirectional=True, got 7",
    ),
    "t5: max_distance": (lambda: pj.t5(32, 16), ValueError, r"max_distance must be .* above the 16 exact buckets.*, got 16"),
    "t5: max_distance a float": (lambda: pj.t5(32, 64.0), ValueError, r"max_distance must be an integer.*, got 64\.0"),
    "tupe: buckets": (lambda: pj.tupe(num_buckets=2), ValueError, r"num_buckets must be .* at least 4, got 2"),
    "cope: max_position 1": (lambda: pj.cope(1), ValueError, r"max_position must be .* at least 2, got 1"),
    "cope: max_position a float": (lambda: pj.cope(64.0), ValueError, r"max_position must be an integer of at least 2, got 64\.0"),
    "cope: gates": (lambda: pj.cope(8, gates="query"), ValueError, r"gates must be 'logits', .* or 'values', got 'query'"),
    "cope_alibi: slope": (lambda: pj.cope_alibi(slope=0.0), ValueError, r"slope must be positive, got 0\.0; None"),
    "alibi: slope": (lambda: pj.alibi(-0.5), ValueError, r"slope must be positive, got -0\.5; None takes ALiBi's"),
    "alibi: slope nan": (lambda: pj.alibi(slope=float("nan")), ValueError, r"slope must be positive, got nan; None"),
    "cope: gate_bias nan": (lambda: pj.cope(8, gate_bias=float("nan")), ValueError, r"gate_bias must be a finite .*got nan"),
    "cope: gate_bias a name": (lambda: pj.cope(8, gate_bias="low"), ValueError, r"gate_bias must be a finite number, .*got 'low'"),
    "cope_alibi: gate_bias": (
        lambda: pj.cope_alibi(gate_bias=float("-inf")),
        ValueError,
        r"gate_bias must be a finite number, or a traced scalar, got -inf",
    ),
    "cope_mlp: gate_bias": (lambda: pj.cope_mlp(gate_bias=None), ValueError, r"gate_bias must be a finite number, .*got None"),
    "cope: several gate_biases": (
        lambda: jax.jit(lambda x: pj.cope(8, gate_bias=x))(jnp.ones(2)),
        ValueError,
        r"gate_bias must be one number, got shape \(2,\)",
    ),
    "cope: clamp 0": (lambda: pj.cope(8, clamp=0), ValueError, r"clamp must be .* 1 to max_position - 1 = 7, got 0; None"),
    "cope: clamp at the size": (lambda: pj.cope(8, clamp=8), ValueError, r"clamp must be an integer from 1 to .* = 7, got 8; None"),
    "cope: clamp between": (lambda: pj.cope(8, clamp=2.5), ValueError, r"clamp must be an integer from 1 to .* = 7, got 2\.5"),
    "cope: clamp a bool": (lambda: pj.cope(8, clamp=True), ValueError, r"clamp must be a finite number, .*got True"),
    "cope_alibi: gates": (lambda: pj.cope_alibi(gates="no"), ValueError, r"gates must be 'logits', .* got 'no'"),
    "cope_mlp: hidden_dim": (lambda: pj.cope_mlp(hidden_dim=0), ValueError, r"hidden_dim must be .* at least 1, got 0"),
    "cope_mlp: gates": (lambda: pj.cope_mlp(gates=None), ValueError, r"gates must be 'logits', .* got None"),
    "chain: nothing": (lambda: pj.chain(), ValueError, r"encodings must be at least one, got none; identity\(\)"),
    "chain: a function": (
        lambda: pj.chain(pj.rope),
        TypeError,
        r"encodings must be PositionalEncoding values such as rope\(\), got the class Rope; call it: rope",
    ),
    "chain: a list": (
        lambda: pj.chain([pj.rope()]),
        TypeError,
        r"encodings must be PositionalEncoding values such as rope\(\), got \[",
    ),
    # parameters of an encoding
    "learned: no length": (
        lambda: pj.learned().init(jax.random.key(0), pj.Dims(2, 4)),
        ValueError,
        r"max_length must be a number for learned, got None",
    ),
    "tupe: no length": (
        lambda: pj.tupe().init(jax.random.key(0), pj.Dims(2, 4)),
        ValueError,
        r"max_length must be a number for tupe, got None",
    ),
    "learned: no params": (
        lambda: pj.learned().embed({}, X, pj.Tokens.at(jnp.arange(T)[None])),
        ValueError,
        r"params of learned must have the key 'embedding', got .*; pass the result of encoding.init",
    ),
    "t5: no params": (lambda: call(pj.t5()), ValueError, r"params of t5 must have the key 'bias', got .*encoding.init"),
    "tupe: no params of TUPE-R": (
        lambda: call(pj.tupe(relative=True)),
        ValueError,
        r"params of tupe\(relative=True\) must have the key '\w+', got .*encoding.init",
    ),
    "chain: params of no member": (
        lambda: call(pj.chain(pj.t5(), pj.t5()), {"t5": made(pj.t5()), "t5_2": made(pj.t5())}),
        ValueError,
        r"params of chain\(t5\(\), t5\(\)\) must be a dict by the names of its members, 't5', 't5_1', got 't5_2'",
    ),
    "cope_alibi: no gate_kernel": (
        lambda: call(pj.cope_alibi(gates="keys"), is_causal=True, hidden=ones(B, T, 3)),
        ValueError,
        r"params of cope_alibi must have the key 'gate_kernel', got",
    ),
    "tupe: no params": (lambda: call(pj.tupe()), ValueError, r"params of tupe must have the key '\w+', got .*encoding.init"),
    "cope: other params": (
        lambda: call(pj.cope(8), {"bias": X}, is_causal=True),
        ValueError,
        r"params of cope must have the key 'embedding', got \['bias'\]; .*encoding.init",
    ),
    "cope_alibi: no params": (
        lambda: call(pj.cope_alibi(learned=True), is_causal=True),
        ValueError,
        r"params of cope_alibi must have the key 'slope', got",
    ),
    "cope_mlp: no params": (
        lambda: call(pj.cope_mlp(), is_causal=True),
        ValueError,
        r"params of cope_mlp must have the key 'weight_out', got",
    ),
    "cope_mlp: part of the params": (
        lambda: call(pj.cope_mlp(8), {"weight_out": ones(8, H)}, is_causal=True),
        ValueError,
        r"params of cope_mlp must have the key 'weight_in', got",
    ),
    "chain: params of one member": (
        lambda: call(pj.chain(pj.t5(), pj.cope(8)), {"t5": made(pj.t5())}, is_causal=True),
        ValueError,
        r"params of cope must have the key 'embedding', got",
    ),
    "cope keys: no hidden": (
        lambda: with_params(pj.cope(8, gates="keys")),
        ValueError,
        r"hidden must be an array \[B, T, D\] for cope, got None; pass the activations that query, key and value were",
    ),
    "hidden of another length": (
        lambda: call(pj.identity(), hidden=ones(B, T + 1, 4)),
        ValueError,
        r"hidden must have shape \(2, 4, 'D'\) for the queries, got \(2, 5, 4\); a pair gives both",
    ),
    "coordinates on one side": (
        lambda: call(pj.rope(), query_coordinates=jnp.zeros((T, 1))),
        ValueError,
        r"key_coordinates must be an array if the other side's coordinates are given, got None",
    ),
    "coordinates of another length": (
        lambda: call(pj.rope(), query_coordinates=jnp.zeros((T + 1, 1)), key_coordinates=jnp.zeros((T, 1))),
        ValueError,
        r"query_coordinates must have shape \(4, axes\) or \(2, 4, axes\), got \(5, 1\)",
    ),
    "coordinates that are neither integers nor floats": (
        lambda: call(pj.rope(), query_coordinates=jnp.zeros((T, 1), bool), key_coordinates=jnp.zeros((T, 1))),
        ValueError,
        r"query_coordinates must be integers or floating point, got bool",
    ),
    "coordinates of two types": (
        lambda: call(pj.rope(), query_coordinates=jnp.zeros((T, 1), int), key_coordinates=jnp.zeros((T, 1))),
        ValueError,
        r"key_coordinates must have the same number of axes and the same dtype, got int32\[1, 4, 1\] and float32\[1, 4, 1\]",
    ),
    "fractions in a table of positions": (
        lambda: pj.learned().embed(made(pj.learned()), X, pj.Tokens(jnp.arange(T)[None], jnp.zeros((1, T, 1)))),
        ValueError,
        r"coordinates must be integers for learned, which has a vector per position, got float32",
    ),
    "keys out of order": (
        lambda: call(
            pj.cope_alibi(),
            is_causal=True,
            query_positions=jnp.arange(T),
            key_positions=jnp.asarray([0, 2, 1, 3]),
            segment_ids=(jnp.ones((B, T), int), jnp.ones((B, T), int)),
        ),
        ValueError,
        r"key_positions must not decrease along a segment for cope_alibi, which sums over .*, got 2 before 1 in row 0",
    ),
    "a scan without needs_causal": (
        lambda: call(pj.encoding("mine", attend=pj.cope_alibi().attend), {}, is_causal=True),
        ValueError,
        r"needs_causal must be True for mine, which has a Scan, got False",
    ),
    "cope: embedding of another size": (
        lambda: with_params(pj.cope(8), embedding=ones(7, H)),
        ValueError,
        r"params\['embedding'\] of cope must have shape \(8, 8\), got \(7, 8\)",
    ),
    "cope: embedding without heads": (
        lambda: with_params(pj.cope(8, per_head=True), embedding=ones(8, H)),
        ValueError,
        r"params\['embedding'\] of cope must have shape \(4, 8, 8\), got \(8, 8\)",
    ),
    "t5: a table of other heads": (
        lambda: with_params(pj.t5(), bias=ones(32, 1)),
        ValueError,
        r"params\['bias'\] of t5 .*\(32, 4\), got \(32, 1\)",
    ),
    "t5: a table of other buckets": (
        lambda: with_params(pj.t5(), bias=ones(8, N)),
        ValueError,
        r"params\['bias'\] of t5 .*\(32, 4\), got \(8, 4\)",
    ),
    "tupe: a table of other heads": (
        lambda: with_params(pj.tupe(relative=True), bias=ones(32, 1)),
        ValueError,
        r"params\['bias'\] of tupe.* \(32, 4\), got \(32, 1\)",
    ),
    "cope_alibi: slopes of other heads": (
        lambda: with_params(pj.cope_alibi(learned=True), slope=ones(1)),
        ValueError,
        r"params\['slope'\] of cope_alibi .*\(4,\), got \(1,\)",
    ),
    "learned: a table of another width": (
        lambda: pj.learned().embed({"embedding": ones(5, 1)}, X, pj.Tokens.at(jnp.arange(T)[None])),
        ValueError,
        r"params\['embedding'\] of learned .*32.*, got \(5, 1\)",
    ),
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
def test_bad_input_is_refused_by_name(name):
    attempt, exception, pattern = BAD[name]
    with pytest.raises(exception) as caught:
        attempt()
    assert type(caught.value) is exception
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_a_named_implementation_that_cannot_says_which_can():
    with pytest.raises(NotImplementedError, match=r"implementation='pallas' cannot .*implementation='xla_chunked' can"):
        call(pj.cope_alibi(), is_causal=True, implementation="pallas")


@pytest.mark.parametrize("encoding", [pj.learned(), pj.tupe()], ids=lambda encoding: encoding.name)
def test_a_traced_position_past_the_table_gives_nan_and_never_another_row(encoding):
    """Its value is not known while tracing, so there is no error; what comes out must not look like an answer."""
    params, positions = made(encoding), jnp.array([0, 1, 2, 9])

    def function(positions):
        if encoding.name == "learned":
            return encoding.embed(params, X, pj.Tokens.at(positions))
        return call(encoding, params, query_positions=positions, key_positions=positions)

    out = jax.jit(function)(positions)
    assert np.isnan(out[:, 3]).all()
