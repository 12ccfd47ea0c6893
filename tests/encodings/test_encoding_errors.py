"""Every bad argument and parameter of an encoding is refused by an error that names it, its value, and what would work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_inputs import B, H, N, T, X, call, check_refused, made, ones

import posjax as pj


def with_params(encoding, **leaves):
    return call(encoding, made(encoding) | leaves, is_causal=True)


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
}


@pytest.mark.parametrize("name", BAD)
def test_bad_encodings_are_refused_by_name(name):
    check_refused(BAD[name])


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
